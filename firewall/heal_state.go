package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// AppliedState is an [Applied] that reads the state directory, again whenever
// its files are others.
type AppliedState struct {
	state *State
	here  Namespace
	look  func() (*Snapshot, error)

	good, pending fileID // of what target was made of
	record        *Record
	target        *Target
}

// fileID changes when a file is replaced.
type fileID struct {
	dev, ino uint64
	size     int64
	changed  unix.Timespec
}

// NewApplied reads a state for the network namespace here; look reads the table
// there.
func NewApplied(state *State, here Namespace, look func() (*Snapshot, error)) *AppliedState {
	return &AppliedState{state: state, here: here, look: look}
}

func (a *AppliedState) id(name string) (fileID, error) {
	st, err := stat(filepath.Join(a.state.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return fileID{}, nil
	}
	if err != nil {
		return fileID{}, a.state.failed(name, err)
	}
	return fileID{uint64(st.Dev), st.Ino, st.Size, st.Ctim}, nil
}

// Target implements [Applied].
func (a *AppliedState) Target() (*Target, error) {
	good, err := a.id(indexGood)
	if err != nil {
		return nil, err
	}
	pending, err := a.id(indexPending)
	if err != nil {
		return nil, err
	}
	next, err := a.id(indexNext)
	if err != nil {
		return nil, err
	}
	// With an apply under way, or one that was killed, only a look tells.
	if a.target != nil && good == a.good && pending == a.pending && next == (fileID{}) {
		return a.target, nil
	}
	r, err := a.state.Settle(a.look, a.here)
	if err != nil {
		return nil, err
	}
	if !r.Namespace.Is(a.here) && !r.Namespace.Gone(a.here) {
		return nil, &StateError{Path: a.state.dir, Err: errors.New("it is of another network namespace"), Hint: "deadlight apply"}
	}
	a.good, a.pending = good, pending
	if a.record != nil && a.record.Table == r.Table && a.record.Applied.Equal(r.Applied) {
		return a.target, nil
	}
	a.record = r
	a.target = &Target{Policy: r.Policy, Snapshot: r.Snapshot}
	rs, err := a.state.Loaded(r)
	if err != nil {
		a.target.Reason = fmt.Errorf("compile what was applied: %w", err)
		return a.target, nil
	}
	a.target.Ruleset, a.target.Known = rs, KnownIn(&rs.Table)
	return a.target, nil
}

// Hushed implements [Applied].
func (a *AppliedState) Hushed() (bool, error) { return a.state.Hushed() }

// TryLock implements [Applied].
func (a *AppliedState) TryLock() (unlock func() error, ok bool, err error) {
	if ok, err = a.state.TryLock(); !ok || err != nil {
		return nil, false, err
	}
	return a.state.Unlock, true, nil
}
