package firewall

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Result says what Apply did.
type Result struct {
	Generation Generation   // after the change
	Changed    []Difference // what separated the kernel from the policy before; nil: nothing was written
	Seeded     SeedResult   // of a first apply: the flows that ran already
	Warnings   []string     // what could not be done beside the ruleset
}

// Apply makes the kernel hold the ruleset: one transaction that changes the table
// in place, then a read-back that must show what was meant. Only what differs is
// written; nothing when nothing does. A concurrent change of the ruleset by
// somebody else makes it start over; nothing is ever half done. Errors to test
// for: [ErrPermission], [ErrStale] (somebody keeps writing), [ErrTooLarge],
// [*TransactionError], [*MismatchError], [*NameError].
func (c *Conn) Apply(rs *rules.Ruleset) (Result, error) {
	const tries = 10
	var changed []Difference
	var seeds *seeds // of a first apply
	afresh := false
	for range tries {
		now := time.Now()
		want, err := encode(&rs.Table, now)
		if err != nil {
			return Result{}, fmt.Errorf("encode the ruleset: %w", err)
		}
		wanted, err := meant(want, now)
		if err != nil {
			return Result{}, err
		}
		is, err := c.Snapshot(rs.Table.Name)
		if err != nil {
			return Result{}, err
		}
		changes, spoiled, err := c.differences(is, wanted, want.content, applySamples)
		if err != nil {
			return Result{}, err
		}
		if len(changes) == 0 && !is.left.any() {
			return seeds.result(Result{Generation: is.Generation, Changed: changed}), nil
		}
		if changed == nil {
			changed = changes
		}
		if !is.Present && seeds == nil {
			seeds = c.newSeeds()
		}
		t := &transaction{table: rs.Table.Name, is: is, wanted: wanted, want: want, afresh: afresh, known: c.contentOf(is), spoiled: spoiled}
		err = c.execute(t)
		var refused *TransactionError
		switch {
		case errors.Is(err, ErrStale):
			continue
		case errors.As(err, &refused) && is.Present && !afresh:
			afresh = true // the table holds something that does not let go: write all of it
			continue
		case err != nil:
			return Result{}, errors.Join(fmt.Errorf("load the ruleset: %w", err), c.tidy(rs.Table.Name))
		}
		got, err := c.Snapshot(rs.Table.Name)
		if err != nil {
			return Result{}, fmt.Errorf("loaded, but not confirmed: %w", err)
		}
		left, _, err := c.differences(got, wanted, want.content, applySamples)
		if err == nil && len(left) == 0 {
			left, err = c.confirm(t)
		}
		switch {
		case err != nil:
			return Result{}, fmt.Errorf("loaded, but not confirmed: %w", err)
		case len(left) > 0 && !afresh:
			afresh = true
			continue
		case len(left) > 0:
			return Result{}, &MismatchError{left}
		}
		// What began since the first look was not watched until now.
		seeds.again(c)
		return seeds.result(Result{Generation: got.Generation, Changed: changed}), nil
	}
	return Result{}, ErrStale
}

// tidy clears away what was prepared for a change that the kernel refused.
func (c *Conn) tidy(table string) error {
	is, err := c.Snapshot(table)
	if err != nil || !is.left.any() {
		return err
	}
	t := &transaction{table: table, is: is}
	err = c.transact(is.Generation.ID, t.clearLeft(&is.left))
	if errors.Is(err, ErrStale) {
		return nil // somebody is at work there; the next apply clears it away
	}
	return err
}

// execute sends the transactions that make one of it.
func (c *Conn) execute(t *transaction) error {
	s, err := t.steps()
	if err != nil {
		return err
	}
	gen := t.is.Generation.ID
	return c.hushed(s.all(), func() error {
		for _, msgs := range [][]message{s.prepare, s.change, s.clear} {
			if len(msgs) == 0 {
				continue
			}
			if err := c.transact(gen, msgs); err != nil {
				return err
			}
			now, err := c.Generation()
			if err != nil {
				return err
			}
			if gen = max(gen+1, 1); now.ID != gen { // the kernel leaves out 0
				return ErrStale
			}
		}
		return nil
	})
}

// Remove deletes the table. It says whether there was one.
func (c *Conn) Remove(table string) (bool, error) {
	const tries = 10
	for range tries {
		gen, err := c.Generation()
		if err != nil {
			return false, err
		}
		name := attrString(nil, unix.NFTA_TABLE_NAME, table)
		err = c.ask(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET, name, func(reply) error { return nil })
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read table %s: %w", table, err)
		}
		err = c.transact(gen.ID, []message{{typ: unix.NFT_MSG_DELTABLE, attrs: name, what: "removal of table inet " + table}})
		if errors.Is(err, ErrStale) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("remove the ruleset: %w", err)
		}
		return true, nil
	}
	return false, ErrStale
}
