package firewall

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"deadlight/rules"
)

// trialRecord is the record of a policy on trial after another.
func trialRecord(t testing.TB, was, will string, until time.Time) (*Record, *rules.Ruleset) {
	t.Helper()
	var before *rules.Ruleset
	if was != "" {
		before = ruleset(t, was)
	}
	load := rules.Trial(before, ruleset(t, will), until)
	r := recordOf(t, will)
	var err error
	if r.Snapshot, err = Meant(load, time.Now()); err != nil {
		t.Fatal(err)
	}
	r.Deadline = until
	return r, load
}

// A policy on trial is what is applied as long as the kernel has its table, and
// never what is good.
func TestPendingIsWhatTheKernelHolds(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		here, err := c.Namespace()
		if err != nil {
			t.Fatal(err)
		}
		look := func() (*Snapshot, error) { return c.Snapshot(rules.TableName) }
		newText := little + "[open.new]\nports = 8080\n"
		dir := t.TempDir()
		s := lockedState(t, dir)
		good := recordOf(t, little)
		good.Namespace = here
		apply(t, s, good, mustApply(t, c, ruleset(t, little)).Generation.ID)
		until := time.Now().Add(time.Hour).Truncate(time.Millisecond)
		r, load := trialRecord(t, little, newText, until)
		r.Namespace = here
		apply(t, s, r, mustApply(t, c, load).Generation.ID)

		is, err := look()
		if err != nil {
			t.Fatal(err)
		}
		if end, there := is.Trial(); !there || end.Sub(until).Abs() > clockSlack {
			t.Errorf("the kernel ends it at %v, %v", end, there)
		}
		got, err := s.Settle(look, here)
		if err != nil || !got.OnTrial() || !got.Deadline.Equal(until) {
			t.Fatalf("on trial: %+v, %v", got, err)
		}
		again, err := s.Loaded(got)
		if err != nil {
			t.Fatal(err)
		}
		if res := mustApply(t, c, again); len(res.Changed) > 0 {
			t.Errorf("what is loaded again differs: %v", res.Changed)
		}
		if g, err := s.Good(); err != nil || g.OnTrial() || len(Diff(g.Snapshot, good.Snapshot)) > 0 {
			t.Errorf("good: %+v, %v", g, err)
		}

		// Its time is over: the table is still the one that was meant, and the sources
		// load it again as it is then.
		nft(t, "delete", "element", "inet", "deadlight", "trial", "{ ipv4, ipv6 }")
		if is, err = look(); err != nil {
			t.Fatal(err)
		}
		if end, there := is.Trial(); !there || !end.IsZero() {
			t.Errorf("over: %v, %v", end, there)
		}

		// A reader finds the good one where the table was taken away, and so does a
		// writer, who forgets the trial.
		if _, err := c.Remove(rules.TableName); err != nil {
			t.Fatal(err)
		}
		if err := s.Unlock(); err != nil {
			t.Fatal(err)
		}
		for _, who := range []string{"reader", "writer"} {
			if who == "writer" {
				if err := s.Lock(); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := s.Settle(look, here); err != nil || got.OnTrial() {
				t.Errorf("%s, without a table: %+v, %v", who, got, err)
			}
			_, err := s.Pending()
			if forgot := errors.Is(err, ErrNoState); forgot != (who == "writer") {
				t.Errorf("%s: pending: %v", who, err)
			}
		}
	})
}

// A damaged record of a trial is told as long as the trial is there.
func TestPendingDamaged(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		here, err := c.Namespace()
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		s := lockedState(t, dir)
		good := recordOf(t, little)
		good.Namespace = here
		apply(t, s, good, 1)
		r, load := trialRecord(t, little, others, time.Now().Add(time.Hour))
		r.Namespace = here
		apply(t, s, r, mustApply(t, c, load).Generation.ID)
		if err := os.Truncate(filepath.Join(dir, "pending"), 100); err != nil {
			t.Fatal(err)
		}
		look := func() (*Snapshot, error) { return c.Snapshot(rules.TableName) }
		if _, err := s.Settle(look, here); !errors.Is(err, ErrStateDamaged) {
			t.Errorf("settle: %v", err)
		}
		mustApply(t, c, ruleset(t, little))
		if got, err := s.Settle(look, here); err != nil || got.OnTrial() {
			t.Errorf("after the trial: %+v, %v", got, err)
		}
	})
}

// TestPendingSurvivesASuddenEnd ends a trial's apply, its confirmation and its
// rollback at every step that they take on disk.
func TestPendingSurvivesASuddenEnd(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		here, err := c.Namespace()
		if err != nil {
			t.Fatal(err)
		}
		look := func() (*Snapshot, error) { return c.Snapshot(rules.TableName) }
		newText := little + "[open.new]\nports = 8080\n"
		until := time.Now().Add(time.Hour).Truncate(time.Millisecond)
		onTrial, trial := trialRecord(t, little, newText, until)
		rulesets := map[string]*rules.Ruleset{"old": ruleset(t, little), "trial": trial, "new": ruleset(t, newText)}
		record := func(what string) *Record {
			r := map[string]*Record{"old": recordOf(t, little), "trial": onTrial, "new": recordOf(t, newText)}[what]
			r.Namespace = here
			return r
		}
		for _, steps := range []struct{ from, to string }{{"old", "trial"}, {"trial", "new"}, {"trial", "old"}} {
			ended := false
			for n := 0; !ended; n++ {
				if n > 100 {
					t.Fatal("it never ends")
				}
				dir := t.TempDir()
				s := lockedState(t, dir)
				apply(t, s, record("old"), mustApply(t, c, rulesets["old"]).Generation.ID)
				if steps.from == "trial" {
					apply(t, s, record("trial"), mustApply(t, c, rulesets["trial"]).Generation.ID)
				}
				left := n
				s.tick = func() {
					if left--; left < 0 {
						runtime.Goexit()
					}
				}
				loaded, done := false, make(chan bool, 1)
				go func() {
					complete := false
					defer func() { done <- complete }()
					if err := s.Stage(record(steps.to)); err != nil {
						t.Error(err)
					}
					res, err := c.Apply(rulesets[steps.to])
					if err != nil {
						t.Error(err)
					}
					loaded = true
					if err := s.Commit(res.Generation.ID); err != nil {
						t.Error(err)
					}
					complete = true
				}()
				ended = <-done
				if err := s.Unlock(); err != nil {
					t.Fatal(err)
				}
				want := steps.from
				if loaded {
					want = steps.to
				}
				where := fmt.Sprintf("%s to %s, after %d steps", steps.from, steps.to, n)
				for _, who := range []string{"reader", "writer", "reader again"} {
					lock := s.LockShared
					s.tick = nil
					if who == "writer" {
						lock = s.Lock
					}
					if err := lock(); err != nil {
						t.Fatal(err)
					}
					got, err := s.Settle(look, here)
					if err != nil {
						t.Fatalf("%s, %s: %v", where, who, err)
					}
					if d := Diff(got.Snapshot, record(want).Snapshot); d != nil || got.OnTrial() != (want == "trial") {
						t.Errorf("%s, %s: on trial %t, %v", where, who, got.OnTrial(), d)
					}
					if _, err := s.Loaded(got); err != nil {
						t.Errorf("%s, %s: %v", where, who, err)
					}
					if err := s.Unlock(); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	})
}
