package firewall

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/rules"
)

// record is an [Applied] in memory.
type record struct {
	mu     sync.Mutex
	target *Target
	lock   sync.Mutex
	hushed atomic.Bool
}

func targetOf(t testing.TB, rs *rules.Ruleset) *Target {
	t.Helper()
	s, err := Meant(rs, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &Target{Policy: "policy.toml", Snapshot: s, Ruleset: rs, Known: KnownIn(&rs.Table)}
}

func (r *record) set(target *Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.target = target
}

func (r *record) Target() (*Target, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.target == nil {
		return nil, ErrNoState
	}
	return r.target, nil
}

func (r *record) Hushed() (bool, error) { return r.hushed.Load(), nil }

func (r *record) TryLock() (func() error, bool, error) {
	if !r.lock.TryLock() {
		return nil, false, nil
	}
	return func() error { r.lock.Unlock(); return nil }, true, nil
}

// guarded is a Guard at work in the namespace of the calling thread.
type guarded struct {
	*testing.T
	*Guard
	applied *record
	conn    *Conn
	reports chan Report
	stop    func()
}

func guard(t *testing.T, rs *rules.Ruleset, o GuardOptions) *guarded {
	t.Helper()
	return guardWith(t, rs, o, monitorBuffer, nil)
}

func guardWith(t *testing.T, rs *rules.Ruleset, o GuardOptions, buffer int, change func(*Guard)) *guarded {
	t.Helper()
	d := &guarded{T: t, applied: &record{}, conn: dial(t), reports: make(chan Report, 1000)}
	if rs != nil {
		mustApply(t, d.conn, rs)
		d.applied.set(targetOf(t, rs))
	}
	if o.Interval == 0 {
		o.Interval = time.Hour
	}
	o.Report = func(r Report) { d.reports <- r }
	g, err := newGuard(nil, d.applied, o, buffer)
	if err != nil {
		t.Fatalf("guard: %v", err)
	}
	if change != nil {
		change(g)
	}
	d.Guard = g
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx) }()
	d.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != context.Canceled {
			t.Errorf("guard ended: %v", err)
		}
		if err := g.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	t.Cleanup(d.stop)
	return d
}

// next waits for a report.
func (d *guarded) next() Report {
	d.Helper()
	select {
	case r := <-d.reports:
		return r
	case <-time.After(time.Minute):
		d.Fatalf("no report for a minute")
		return Report{}
	}
}

// await waits for a report of a kind; other kinds than those to be passed over
// are a failure.
func (d *guarded) await(kind ReportKind, over ...ReportKind) Report {
	d.Helper()
	for {
		r := d.next()
		if r.Kind == kind {
			return r
		}
		if !slices.Contains(over, r.Kind) {
			d.Fatalf("%s: %v %v, want %s", r.Kind, r.Differences, r.Err, kind)
		}
	}
}

// foreignChanges are what other programs may do to the table.
func foreignChanges() map[string]string {
	return map[string]string{
		"rule inserted":          `insert rule inet deadlight gate accept`,
		"rule with our comment":  `insert rule inet deadlight gate tcp dport 23 accept comment "open web"`,
		"chain flushed":          `flush chain inet deadlight gate`,
		"table flushed":          `flush table inet deadlight`,
		"table deleted":          `delete table inet deadlight`,
		"ruleset flushed":        `flush ruleset`,
		"dormant":                `add table inet deadlight { flags dormant; }`,
		"policy accept":          `add chain inet deadlight gate { policy accept; }`,
		"element added":          `add element inet deadlight tcp_listed { 5000 }`,
		"element of a map added": `add element inet deadlight udp_open { 23 : jump open_web }`,
		"element removed":        `delete element inet deadlight dhcp_if { "eth0" }`,
		"set added":              `add set inet deadlight extra { type ipv4_addr; }`,
		"base chain added":       `add chain inet deadlight extra { type filter hook input priority -500; }`,
		"counter added":          `add counter inet deadlight extra`,
		"anonymous chain":        `insert rule inet deadlight gate tcp dport 9 jump { accept; }`,
		"base chain deleted":     `flush chain inet deadlight silence; delete chain inet deadlight silence`,
		"made again, emptier":    `delete table inet deadlight; add table inet deadlight; add chain inet deadlight gate`,
	}
}

func TestGuardNoticesTampering(t *testing.T) {
	for name, command := range foreignChanges() {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				rs := ruleset(t, everything)
				d := guard(t, rs, GuardOptions{})
				d.await(ReportClean)
				pid := nftAs(t, command)
				r := d.await(ReportDrift)
				if want := (Actor{PID: pid, Comm: "nft"}); len(r.By) != 1 || r.By[0] != want {
					t.Errorf("by %v, want %v", r.By, want)
				}
				if len(r.Differences) == 0 {
					t.Errorf("without a difference: %+v", r)
				}
				left := blocksOrNone(t)
				mustApply(t, d.conn, rs) // by hand, with nothing new on record
				d.await(ReportUndone)
				if left == blocksOrNone(t) {
					t.Errorf("the drift was gone before it was repaired: the guard wrote")
				}
			})
		})
	}
}

func blocksOrNone(t *testing.T) string {
	if !strings.Contains(nft(t, "list", "tables"), "inet deadlight") {
		return ""
	}
	return blocks(t)
}

func TestGuardHeals(t *testing.T) {
	for name, command := range foreignChanges() {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				d := guard(t, ruleset(t, everything), GuardOptions{Heal: true})
				d.await(ReportClean)
				want := blocks(t)
				pid := nftAs(t, command)
				for _, kind := range []ReportKind{ReportDrift, ReportHealed} {
					r := d.await(kind)
					if by := (Actor{PID: pid, Comm: "nft"}); len(r.By) != 1 || r.By[0] != by {
						t.Errorf("%s: by %v, want %v", kind, r.By, by)
					}
					if len(r.Differences) == 0 {
						t.Errorf("%s without a difference", kind)
					}
				}
				comment := "\n\tcomment \"managed by deadlight\"" // cannot be given to a table that is there
				if diff := cmp.Diff(strings.ReplaceAll(want, comment, ""), strings.ReplaceAll(blocks(t), comment, "")); diff != "" {
					t.Errorf("not as it was:\n%s", diff)
				}
				d.stop()
				if d.Stats.Heals != 1 || d.Stats.Drift {
					t.Errorf("stats: %+v", d.Stats)
				}
			})
		})
	}
}

// What others do to their own tables is none of our business, and a change that
// changes nothing is no drift.
func TestGuardIsSilentAboutOthers(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guard(t, ruleset(t, everything), GuardOptions{Heal: true})
		d.await(ReportClean)
		before := blocks(t)
		nft(t, "add table inet other; add chain inet other gate { type filter hook input priority 0; }")
		nft(t, "delete table inet other")
		nft(t, "add counter inet deadlight extra; delete counter inet deadlight extra")
		d.await(ReportClean)
		if diff := cmp.Diff(before, blocks(t)); diff != "" {
			t.Errorf("the table changed:\n%s", diff)
		}
		d.stop()
		if len(d.reports) != 0 || d.Stats.Transactions != 3 || d.Stats.Heals != 0 {
			t.Errorf("%d more reports, %+v", len(d.reports), d.Stats)
		}
	})
}

func TestGuardTellsAnApplyFromDrift(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guard(t, ruleset(t, everything), GuardOptions{Heal: true})
		d.await(ReportClean)
		for _, text := range []string{little, others, everything} {
			rs := ruleset(t, text)
			d.applied.lock.Lock()
			mustApply(t, d.conn, rs)
			want := blocks(t)
			time.Sleep(2 * noisyMost) // the guard looks, and must wait for the record
			d.applied.set(targetOf(t, rs))
			d.applied.lock.Unlock()
			d.await(ReportApplied)
			if diff := cmp.Diff(want, blocks(t)); diff != "" {
				t.Errorf("what was applied was changed:\n%s", diff)
			}
		}
		d.applied.lock.Lock()
		if _, err := d.conn.Remove(rules.TableName); err != nil {
			t.Fatal(err)
		}
		d.applied.set(nil)
		d.applied.lock.Unlock()
		d.await(ReportAbsent)
		if got := blocksOrNone(t); got != "" {
			t.Errorf("what was removed is back:\n%s", got)
		}
		d.stop()
		if len(d.reports) != 0 || d.Stats.Heals != 0 {
			t.Errorf("%d more reports, %+v", len(d.reports), d.Stats)
		}
	})
}

func TestGuardLooksAtOnce(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guard(t, nil, GuardOptions{Heal: true})
		d.await(ReportAbsent)
		rs := ruleset(t, little)
		applied := &record{}
		applied.set(targetOf(t, rs))
		d = guardWith(t, nil, GuardOptions{Heal: true}, monitorBuffer, func(g *Guard) { g.applied = applied })
		if r := d.await(ReportDrift); r.By != nil {
			t.Errorf("nobody was seen, yet it was %v", r.By)
		}
		d.await(ReportHealed)
		listTable(t)
	})
}

// The interval finds what no event told of.
func TestGuardLooksFromTimeToTime(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guardWith(t, ruleset(t, little), GuardOptions{Interval: 50 * time.Millisecond}, monitorBuffer, func(g *Guard) {
			mon, err := dialMonitor(nil, "another", monitorBuffer) // deaf to our table
			if err != nil {
				t.Fatal(err)
			}
			g.mon.Close()
			g.mon = mon
		})
		d.await(ReportClean)
		nft(t, `flush chain inet deadlight gate`)
		d.await(ReportDrift, ReportClean)
	})
}

func TestGuardResyncsAfterLostEvents(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guardWith(t, ruleset(t, little), GuardOptions{Heal: true}, 1<<12, nil)
		d.await(ReportClean)
		want := blocks(t)
		// In one transaction, so that no event of ours gets through after the flood.
		var b strings.Builder
		b.WriteString("add table inet other\nadd set inet other s { type ipv4_addr; }\nadd element inet other s {")
		for i := range 100_000 {
			fmt.Fprintf(&b, "10.%d.%d.%d,", i>>16&255, i>>8&255, i&255)
		}
		b.WriteString("}\nflush chain inet deadlight gate\n")
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(b.String())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft -f: %v\n%s", err, out)
		}
		d.await(ReportLost)
		if r := d.await(ReportDrift, ReportLost, ReportClean); r.By != nil {
			t.Errorf("by %v, though events were lost", r.By)
		}
		d.await(ReportHealed, ReportLost, ReportFailed)
		if diff := cmp.Diff(want, blocks(t)); diff != "" {
			t.Errorf("not as it was:\n%s", diff)
		}
		nft(t, "delete table inet deadlight") // it still hears
		d.await(ReportHealed, ReportLost, ReportClean, ReportDrift, ReportFailed)
	})
}

// Another manager that keeps deleting the table is fought for a while, ever more
// slowly, then only reported, until somebody applies.
func TestGuardBacksOff(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		rs := ruleset(t, little)
		d := guardWith(t, rs, GuardOptions{Heal: true}, monitorBuffer, func(g *Guard) {
			g.backoff = backoff{free: 3, most: 6, first: 200 * time.Millisecond, longest: 400 * time.Millisecond, window: time.Hour}
		})
		d.await(ReportClean)
		script := exec.Command("sh", "-c", "while :; do nft delete table inet deadlight 2>/dev/null; sleep 0.01; done")
		if err := script.Start(); err != nil {
			t.Fatal(err)
		}
		ended := func() {
			script.Process.Kill()
			script.Wait()
		}
		defer ended()
		heals, held := 0, 0
		for gaveUp := false; !gaveUp; {
			switch r := d.next(); r.Kind {
			case ReportHealed:
				heals++
			case ReportHeld:
				held++
			case ReportGaveUp:
				gaveUp = true
			case ReportDrift, ReportClean, ReportUndone, ReportFailed: // it may delete between write and read-back
			default:
				t.Fatalf("%s: %v", r.Kind, r.Err)
			}
		}
		ended()
		// An apply that met another writer counts as a heal but is none.
		if heals == 0 || heals > 6 || held == 0 {
			t.Errorf("%d heals, %d times held", heals, held)
		}
		if got := blocksOrNone(t); got != "" {
			t.Errorf("healed after giving up:\n%s", got)
		}
		d.applied.lock.Lock()
		mustApply(t, d.conn, rs)
		d.applied.set(targetOf(t, rs))
		d.applied.lock.Unlock()
		// It may look before it is told what was applied.
		for r := d.next(); r.Kind != ReportApplied && r.Kind != ReportUndone; r = d.next() {
			if r.Kind != ReportDrift {
				t.Fatalf("%s: %v %v", r.Kind, r.Differences, r.Err)
			}
		}
		nft(t, "flush chain inet deadlight gate") // detection never ends
		d.await(ReportDrift)
		d.await(ReportHealed)
	})
}

func TestBackoff(t *testing.T) {
	b := newBackoff()
	now := time.Unix(1000, 0)
	var waits []time.Duration
	for !b.over() {
		w := b.wait(now)
		waits = append(waits, w)
		now = now.Add(w)
		b.healed(now)
	}
	s := time.Second
	want := []time.Duration{0, 0, 0, 0, 0, s, 2 * s, 4 * s, 8 * s, 16 * s, 32 * s, 64 * s, 120 * s, 120 * s, 120 * s}
	if !slices.Equal(waits, want) {
		t.Errorf("waits = %v", waits)
	}
	if b.wait(now.Add(time.Hour)); !b.over() {
		t.Error("it resumed by itself")
	}
	b = newBackoff()
	for range 7 {
		b.healed(now)
	}
	if b.wait(now) == 0 || b.wait(now.Add(b.window+s)) != 0 || b.over() {
		t.Error("a quiet window does not forgive")
	}
}

// Another version of the program may compile the recorded policy to another
// table: it puts back what it can, once, and says so.
func TestGuardDoesNotHealWhatItCannot(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		rs := ruleset(t, little)
		d := guard(t, rs, GuardOptions{Heal: true})
		d.await(ReportClean)
		d.applied.lock.Lock()
		old := targetOf(t, ruleset(t, others))
		mustApply(t, d.conn, old.Ruleset)
		old.Ruleset = rs
		d.applied.set(old)
		d.applied.lock.Unlock()
		d.await(ReportApplied)
		for range 2 {
			nft(t, "delete table inet deadlight")
			d.await(ReportDrift)
			d.await(ReportHealed)
			if r := d.await(ReportStuck); len(r.Differences) == 0 {
				t.Errorf("stuck without a difference")
			}
			listTable(t)
		}
		d.applied.set(&Target{Snapshot: old.Snapshot})
		nft(t, "delete table inet deadlight")
		d.await(ReportDrift)
		d.await(ReportStuck)
		if got := blocksOrNone(t); got != "" {
			t.Errorf("healed from nothing:\n%s", got)
		}
	})
}
