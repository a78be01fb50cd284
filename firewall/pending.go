package firewall

import (
	"errors"
	"fmt"
	"time"

	"deadlight/rules"
)

// A policy on trial is recorded as `pending`, beside the good one: what the state
// calls applied is what the kernel judges by, and only a confirmed policy is good.

// Back says that a policy was tried and taken back.
type Back struct {
	Policy string    `json:"policy"` // that was tried
	At     time.Time `json:"at"`
	Asked  bool      `json:"asked"` // by somebody; else its time was over
}

// OnTrial reports whether a record is of a policy that nobody has confirmed.
func (r *Record) OnTrial() bool { return !r.Deadline.IsZero() }

// Trial says whether a table was made for a trial, and until when that runs by the
// kernel's own clock; the zero time when it is over.
func (s *Snapshot) Trial() (until time.Time, there bool) {
	set := s.sets[rules.TrialSet]
	if set == nil {
		return time.Time{}, false
	}
	return set.first, true
}

// Pending is the policy on trial. Errors as of Good.
func (s *State) Pending() (*Record, error) { return s.record(indexPending) }

// PendingIndex is Pending without the snapshot: it is read at once.
func (s *State) PendingIndex() (*Record, error) { return s.index(indexPending) }

// current is what is applied when no apply is under way: what is on trial as long
// as the kernel has a table for that, else what is good.
func (s *State) current(look func() (*Snapshot, error), here Namespace) (*Record, error) {
	p, err := s.Pending()
	if errors.Is(err, ErrNoState) {
		return s.goodOf(here)
	}
	if err != nil && !errors.Is(err, ErrStateDamaged) {
		return nil, err
	}
	is, lookErr := look()
	if lookErr != nil {
		return nil, lookErr
	}
	if _, there := is.Trial(); there && (err != nil || p.Namespace.Is(here)) {
		return p, err
	}
	if s.exclusive {
		if err := s.ForgetTrial(); err != nil {
			return nil, err
		}
	}
	return s.goodOf(here)
}

// ForgetTrial drops what is on trial: the kernel judges by what is good again. It
// needs no room on disk.
func (s *State) ForgetTrial() error {
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.unlink(indexPending); err != nil {
		return err
	}
	return s.sweep()
}

// Before is what was applied before a trial and is again after it. Errors as of
// Good, [ErrNoState] also when it was applied in another network namespace.
func (s *State) Before(here Namespace) (*Record, error) {
	r, err := s.goodOf(here)
	if err == nil && !r.Namespace.Is(here) && !r.Namespace.Gone(here) {
		return nil, s.none()
	}
	return r, err
}

// Loaded makes again the ruleset that the kernel was given for a record.
func (s *State) Loaded(r *Record) (*rules.Ruleset, error) {
	rs, err := s.Compile(r)
	if err != nil || !r.OnTrial() {
		return rs, err
	}
	good, err := s.Before(r.Namespace)
	if errors.Is(err, ErrNoState) {
		return rules.Trial(nil, rs, r.Deadline), nil
	}
	if err != nil {
		return nil, err
	}
	was, err := s.Compile(good)
	if err != nil {
		return nil, fmt.Errorf("compile what was applied before the trial: %w", err)
	}
	return rules.Trial(was, rs, r.Deadline), nil
}
