package firewall

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// The record is read again when it is another, and only then; an apply that was
// killed counts if the kernel holds what it meant.
func TestAppliedStateFollowsTheRecord(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		here, err := c.Namespace()
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(t.TempDir(), "state")
		writer, err := OpenState(dir)
		if err != nil {
			t.Fatal(err)
		}
		reader, err := OpenState(dir)
		if err != nil {
			t.Fatal(err)
		}
		a := NewApplied(reader, here, func() (*Snapshot, error) { return c.Snapshot("deadlight") })
		if _, err := a.Target(); !errors.Is(err, ErrNoState) {
			t.Errorf("nothing applied: %v", err)
		}
		stage := func(text string) {
			t.Helper()
			rs := ruleset(t, text)
			s, err := Meant(rs, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			r := &Record{Applied: time.Now(), By: "test", Policy: "/policy.toml", Namespace: here, Snapshot: s,
				Sources: []Source{NewSource("policy.toml", []byte("version = 1\n"+text))}}
			if err := errors.Join(writer.Lock(), writer.Stage(r)); err != nil {
				t.Fatal(err)
			}
		}
		target := func() *Target {
			t.Helper()
			got, err := a.Target()
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		stage(little)
		if _, ok, err := a.TryLock(); ok || err != nil {
			t.Errorf("locked while an apply is at work: %v, %v", ok, err)
		}
		res := mustApply(t, c, ruleset(t, little))
		if err := errors.Join(writer.Commit(res.Generation.ID), writer.Unlock()); err != nil {
			t.Fatal(err)
		}
		first := target()
		if first != target() || first.Ruleset == nil || len(Diff(mustSnapshot(t, c), first.Snapshot)) != 0 {
			t.Errorf("the first record: %+v", first)
		}
		stage(others) // and killed before the kernel was asked
		writer.Unlock()
		if target() != first {
			t.Error("what the kernel never took is taken for applied")
		}
		mustApply(t, c, ruleset(t, others)) // killed after
		second := target()
		if second == first || len(Diff(mustSnapshot(t, c), second.Snapshot)) != 0 {
			t.Error("what the kernel took is not taken for applied")
		}
		unlock, ok, err := a.TryLock()
		if !ok || err != nil {
			t.Fatalf("lock: %v, %v", ok, err)
		}
		if target() != second {
			t.Error("under the lock it is another")
		}
		if err := unlock(); err != nil {
			t.Error(err)
		}
		if target() != second {
			t.Error("after it was settled it is another")
		}
		if _, err := os.Stat(filepath.Join(dir, indexNext)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the rest of the killed apply was left: %v", err)
		}
		if err := errors.Join(writer.Lock(), writer.Clear(), writer.Unlock()); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Target(); !errors.Is(err, ErrNoState) {
			t.Errorf("after it was cleared: %v", err)
		}
	})
}

func mustSnapshot(t *testing.T, c *Conn) *Snapshot {
	t.Helper()
	s, err := c.Snapshot("deadlight")
	if err != nil {
		t.Fatal(err)
	}
	return s
}
