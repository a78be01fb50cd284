package firewall

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Result says what Apply did.
type Result struct {
	Generation Generation   // after the change
	Changed    []Difference // what separated the kernel from the policy before; nil: nothing was written
}

// Apply makes the kernel hold the ruleset: one transaction that replaces the
// table in place, then a read-back that must show what was meant. When nothing
// differs nothing is written. A concurrent change of the ruleset by somebody
// else makes it start over; nothing is ever half done. Errors to test for:
// [ErrPermission], [ErrStale] (somebody keeps writing), [ErrTooLarge],
// [*TransactionError], [*MismatchError].
func (c *Conn) Apply(rs *rules.Ruleset) (Result, error) {
	const tries = 10
	for range tries {
		now := time.Now()
		want, err := encode(&rs.Table, now)
		if err != nil {
			return Result{}, fmt.Errorf("encode the ruleset: %w", err)
		}
		wanted, err := snapshotOf(want.all(), now)
		if err != nil {
			return Result{}, err
		}
		is, err := c.Snapshot(rs.Table.Name)
		if err != nil {
			return Result{}, err
		}
		changes := Diff(is, wanted)
		if len(changes) == 0 {
			return Result{Generation: is.Generation}, nil
		}
		err = c.transact(is.Generation.ID, replace(rs.Table.Name, is, want))
		if errors.Is(err, ErrStale) {
			continue
		}
		if err != nil {
			return Result{}, fmt.Errorf("load the ruleset: %w", err)
		}
		got, err := c.Snapshot(rs.Table.Name)
		if err != nil {
			return Result{}, fmt.Errorf("loaded, but not confirmed: %w", err)
		}
		if left := Diff(got, wanted); len(left) > 0 {
			return Result{}, &MismatchError{left}
		}
		return Result{Generation: got.Generation, Changed: changes}, nil
	}
	return Result{}, ErrStale
}

// replace lists the messages that turn the table that is into the wanted one.
// The order is the kernel's: what is used goes after what uses it, and what is
// used comes before. Base chains stay hooked throughout: a chain that is deleted
// and added again accepts packets until its policy takes hold at the end of the
// commit.
func replace(table string, is *Snapshot, want *encoded) []message {
	out := []message{want.table}
	if is.Present {
		out = append(out, clear(table, is, want)...)
	}
	for _, part := range [][]message{want.objects, want.chains, want.sets, want.elements, want.rules} {
		out = append(out, part...)
	}
	return out
}

// clear empties the table but for the base chains and counters that stay.
func clear(table string, is *Snapshot, want *encoded) []message {
	wanted, err := snapshotOf(want.all(), time.Time{})
	if err != nil {
		wanted = newSnapshot() // then nothing stays
	}
	// A meter whose rules did not change keeps what it has counted. Its elements
	// carry the limit they were made with: a changed one must begin anew.
	stays := func(name string) bool {
		set := is.sets[name]
		return set.meter && set.definition == wanted.sets[name].definition && slices.Equal(is.users(name), wanted.users(name))
	}
	del := func(typ, tableAttr, nameAttr uint16, name, what string) message {
		b := attrString(nil, tableAttr, table)
		if name != "" {
			b = attrString(b, nameAttr, name)
		}
		return message{typ: typ, attrs: b, what: "removal of " + what + " " + name}
	}
	out := []message{del(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, 0, "", "the old rules")}
	// Maps hold on to the chains they jump to.
	for _, name := range sortedKeys(is.sets) {
		if !is.sets[name].anonymous && !is.sets[name].constant && !stays(name) {
			out = append(out, del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, name, "the elements of set"))
		}
	}
	for _, name := range sortedKeys(is.chains) {
		// The hook and priority of a base chain cannot change in place.
		if is.chains[name].anonymous {
			continue
		}
		if !is.chains[name].base || is.chains[name].hook != wanted.chains[name].hook {
			out = append(out, del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name, "chain"))
		}
	}
	for _, name := range sortedKeys(is.sets) {
		if !is.sets[name].anonymous && !stays(name) { // anonymous sets end with their rule
			out = append(out, del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name, "set"))
		}
	}
	for _, key := range sortedKeys(is.objects) {
		if o := is.objects[key]; o != wanted.objects[key] {
			b := attrString(nil, unix.NFTA_OBJ_TABLE, table)
			b = attrString(b, unix.NFTA_OBJ_NAME, o.name)
			b = attr32(b, unix.NFTA_OBJ_TYPE, o.typ)
			out = append(out, message{typ: unix.NFT_MSG_DELOBJ, attrs: b, what: "removal of " + key})
		}
	}
	for _, name := range sortedKeys(is.flowtables) {
		out = append(out, del(unix.NFT_MSG_DELFLOWTABLE, nftaFlowTable, nftaFlowName, name, "flowtable"))
	}
	return out
}

// users are the rules that name a set.
func (s *Snapshot) users(set string) []string {
	name := hex.EncodeToString(append([]byte(set), 0))
	var out []string
	for _, chain := range sortedKeys(s.chains) {
		for _, r := range s.chains[chain].rules {
			if strings.Contains(r.raw, ":"+name+" ") {
				out = append(out, chain+" "+r.raw)
			}
		}
	}
	return out
}

// Remove deletes the table. It says whether there was one.
func (c *Conn) Remove(table string) (bool, error) {
	const tries = 10
	for range tries {
		is, err := c.Snapshot(table)
		if err != nil {
			return false, err
		}
		if !is.Present {
			return false, nil
		}
		err = c.transact(is.Generation.ID, []message{{
			typ: unix.NFT_MSG_DELTABLE, attrs: attrString(nil, unix.NFTA_TABLE_NAME, table), what: "removal of table inet " + table}})
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
