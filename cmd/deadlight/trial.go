package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// A policy on trial: apply --confirm puts it in force with its end, which is the
// kernel's own; confirm and rollback come before that, or the cleaner after it.

// The shortest trial leaves time to type, the longest is one that nobody forgot.
const (
	shortestTrial = 2 * time.Second
	longestTrial  = 24 * time.Hour
)

// lastMoment before its end a trial is not confirmed any more: the kernel might
// go back and forth.
const lastMoment = time.Second

// settle says what is applied and clears up behind a trial that is over. One that
// runs is an error.
func (h *host) settle() (*firewall.Record, error) {
	last, err := h.state.Settle(h.look, h.here)
	if err != nil || !last.OnTrial() {
		return last, err
	}
	is, err := h.look()
	if err != nil {
		return nil, err
	}
	if until, _ := is.Trial(); !until.IsZero() {
		return nil, stillOnTrial(last, until)
	}
	if _, _, err := h.goBack(last, &firewall.Back{Policy: last.Policy, At: last.Deadline}); err != nil {
		return nil, err
	}
	return h.state.Settle(h.look, h.here)
}

// stillOnTrial refuses what would be mixed up with a trial.
func stillOnTrial(r *firewall.Record, until time.Time) error {
	return refused(fmt.Errorf("%s is on trial until %s: ruleset as before", r.Policy, clock(until)),
		"deadlight confirm keeps it, deadlight rollback ends it")
}

// putOnTrial makes a record that of a trial, and gives what the kernel shall hold
// meanwhile. Where the policy judges just like the one before it, nothing is tried.
func (h *host) putOnTrial(r *firewall.Record, rs *rules.Ruleset, within time.Duration) (*rules.Ruleset, error) {
	const hint = "apply it without --confirm if it surely admits you: deadlight explain 22/tcp --from ADDR --policy FILE"
	good, err := h.state.Before(h.here)
	var was *rules.Ruleset
	switch {
	case errors.Is(err, firewall.ErrNoState):
		is, err := h.look()
		if err != nil {
			return nil, err
		}
		if is.Present {
			return nil, refused(fmt.Errorf("it is not recorded which policy the table inet %s is of: nothing to go back to is known; ruleset as before", rules.TableName), hint)
		}
	case errors.Is(err, firewall.ErrStateDamaged), errors.Is(err, firewall.ErrStateVersion):
		return nil, refused(fmt.Errorf("%w: nothing to go back to is known; ruleset as before", err), hint)
	case err != nil:
		return nil, err
	default:
		if was, err = h.state.Compile(good); err != nil {
			return nil, refused(fmt.Errorf("%w: nothing to go back to is known; ruleset as before", err), hint)
		}
		before, err := firewall.Meant(was, time.Now())
		if err != nil {
			return nil, err
		}
		if len(firewall.Diff(before, r.Snapshot)) == 0 {
			return rs, nil
		}
	}
	now := time.Now().Truncate(time.Millisecond)
	r.Deadline, r.Session = now.Add(within).UTC(), sshSession()
	load := rules.Trial(was, rs, r.Deadline)
	r.Snapshot, err = firewall.Meant(load, now)
	return load, err
}

// goBack makes the kernel hold again what was applied before a trial, and writes
// down why; nil for both when none runs. It gives the record of that, nil when
// there is no table any more.
func (h *host) goBack(trial *firewall.Record, why *firewall.Back) (*firewall.Record, firewall.Result, error) {
	var res firewall.Result
	good, err := h.state.Before(h.here)
	if errors.Is(err, firewall.ErrNoState) {
		if _, err := h.conn.Remove(rules.TableName); err != nil {
			return nil, res, err
		}
		return nil, res, h.state.ForgetTrial()
	}
	if err != nil {
		return nil, res, err
	}
	rs, err := h.state.Compile(good)
	if err != nil {
		return nil, res, err
	}
	if trial != nil {
		h.conn.Known = h.state.Known(trial)
	} else {
		h.conn.Known = h.state.Known(good)
	}
	if good.Snapshot, err = firewall.Meant(rs, time.Now()); err != nil {
		return nil, res, err
	}
	hush := h.hush(env{stderr: io.Discard})
	h.conn.Hush = func(elements int) (func() error, error) {
		done, err := hush(elements)
		if err != nil { // slower, then
			return func() error { return nil }, nil
		}
		return done, nil
	}
	good.Namespace = h.here
	if why != nil {
		good.Back = why
	}
	// A full disk does not keep a policy from being taken back.
	staged := h.state.Stage(good)
	if res, err = h.conn.Apply(rs); err != nil {
		_, settled := h.state.Settle(h.look, h.here)
		return nil, res, errors.Join(err, staged, settled)
	}
	if staged != nil {
		return good, res, errors.Join(staged, h.state.ForgetTrial())
	}
	return good, res, h.state.Commit(res.Generation.ID)
}

// pendingJSON is a policy on trial.
type pendingJSON struct {
	Policy   string    `json:"policy"`
	Deadline time.Time `json:"deadline"`
	Running  bool      `json:"running"` // false: the kernel has gone back by itself
	Before   string    `json:"before"`  // the policy before it; "": there was no table
}

// pending describes the trial of a record, nil when it is of none, and gives the
// record of what the kernel judges by; nil: there was no table before.
func (h *host) pending(last *firewall.Record, is *firewall.Snapshot) (*pendingJSON, *firewall.Record, error) {
	if !last.OnTrial() {
		return nil, last, nil
	}
	until, _ := is.Trial()
	p := &pendingJSON{Policy: last.Policy, Deadline: last.Deadline, Running: !until.IsZero()}
	good, err := h.state.Before(h.here)
	switch {
	case errors.Is(err, firewall.ErrNoState):
		good = nil
	case err != nil:
		return nil, nil, err
	default:
		p.Before = good.Policy
	}
	if p.Running {
		return p, last, nil
	}
	return p, good, nil
}

// text says in one line how a trial stands.
func (p *pendingJSON) text() string {
	if p.Running {
		return fmt.Sprintf("%s is on trial until %s: deadlight confirm keeps it, else the kernel goes back to %s", p.Policy, clock(p.Deadline), policyBefore(p.Before, p.Policy))
	}
	return fmt.Sprintf("%s was on trial until %s: the kernel went back by itself to %s", p.Policy, clock(p.Deadline), policyBefore(p.Before, p.Policy))
}

// policyBefore names what was in force before a trial, mostly of the same file.
func policyBefore(before, trial string) string {
	switch before {
	case "":
		return "no table, which lets everything in"
	case trial:
		return before + " as it was applied before"
	}
	return before
}

// clock writes a time of today by its clock, any other with its date.
func clock(t time.Time) string {
	t = t.Local()
	if y, d := time.Now().Year(), time.Now().YearDay(); t.Year() == y && t.YearDay() == d {
		return t.Format("15:04:05")
	}
	return t.Format(time.DateTime)
}
