package firewall

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// tryOn loads will on trial after was, and gives when that ends. Nothing of ours
// is left that could have a hand in it.
func (w *wire) tryOn(t *testing.T, was, will string, within time.Duration) time.Time {
	t.Helper()
	w.load(t, was)
	until := time.Now().Add(within).Truncate(time.Millisecond)
	w.apply(rules.Trial(ruleset(t, was), ruleset(t, will), until))
	if err := w.conn.Close(); err != nil {
		t.Fatal(err)
	}
	w.conn = nil
	return until
}

// redial opens a socket in the host again.
func (w *wire) redial() {
	w.Helper()
	w.inHost(func() (err error) {
		w.conn, err = Dial(nil)
		return err
	})
}

// The kernel alone goes back, over IPv4 and IPv6, in what comes in and in what
// goes out; flows that only the new policy admits end with it.
func TestTrialEndsByItself(t *testing.T) {
	const (
		was  = "[default]\noutput = \"accept\"\n[open.old]\nports = 81\nprotocol = [\"tcp\", \"udp\"]\n[open.both]\nports = 80\n"
		will = "[default]\noutput = \"drop\"\n[open.new]\nports = 82\nprotocol = [\"tcp\", \"udp\"]\n[open.both]\nports = 80\n[egress.dns]\nports = 53\n"
	)
	w := newWire(t)
	e := w.listen("eth0")
	w.echoServers(nil, []uint16{81, 82})
	until := w.tryOn(t, was, will, 5*time.Second)
	flows := []*packet{w.strangersFlow(e, w.udp(stranger4, 82)), w.strangersFlow(e, w.udp(stranger6, 82))}
	w.expect(t, in("new", w.tcp(stranger4, 82)), in("new, IPv6", w.tcp(stranger6, 82)), out("old", w.tcp(stranger4, 81)), out("old, IPv6", w.tcp(stranger6, 81)),
		in("both", w.tcp(stranger4, 80)), out("neither", w.tcp(stranger4, 83)), in("a flow", flows[0]), in("a flow, IPv6", flows[1]))
	w.departs(t, "listed", true, w.leaving(rules.TCP, stranger4, 53))
	w.departs(t, "unlisted", false, w.leaving(rules.TCP, stranger4, 54))
	w.departs(t, "unlisted, IPv6", false, w.leaving(rules.TCP, stranger6, 54))
	if time.Now().After(until) {
		t.Fatal("this machine is too slow to look before the end")
	}
	for {
		sent := time.Now()
		through := w.deliver(w.tcp(stranger4, 82))[0]
		if through && sent.After(until.Add(time.Second)) {
			t.Fatalf("open %s after the end", sent.Sub(until))
		}
		if !through && time.Now().Before(until.Add(-10*time.Millisecond)) {
			t.Fatalf("closed %s before the end", time.Until(until))
		}
		if !through {
			break
		}
	}
	time.Sleep(time.Until(until.Add(time.Second)))
	after := func() {
		w.expect(t, out("new", w.tcp(stranger4, 82)), out("new, IPv6", w.tcp(stranger6, 82)), in("old", w.tcp(stranger4, 81)), in("old, IPv6", w.tcp(stranger6, 81)),
			in("both", w.tcp(stranger4, 80)), out("neither", w.tcp(stranger4, 83)), out("a flow", flows[0]), out("a flow, IPv6", flows[1]))
		w.departs(t, "unlisted, after", true, w.leaving(rules.TCP, stranger4, 54))
		w.departs(t, "unlisted, after, IPv6", true, w.leaving(rules.TCP, stranger6, 54))
	}
	after()
	w.redial()
	w.apply(ruleset(t, was))
	after()
}

// A limit that both policies have goes on counting through a trial, whichever way
// it ends; one that differs begins anew and leaves the old one as it was.
func TestTrialKeepsCounts(t *testing.T) {
	const limits = "[open.each]\nports = 22\nrate = { limit = \"1/hour\", burst = 3 }\n" +
		"[open.all]\nports = 23\nrate = { limit = \"1/hour\", burst = 3, per = \"rule\" }\n" +
		"[open.other]\nports = 24\nrate = { limit = \"1/hour\", burst = BURST }\n[icmp]\necho = { limit = \"1/hour\", burst = 2 }\n"
	w := newWire(t)
	was := strings.ReplaceAll(limits, "BURST", "1")
	will := strings.ReplaceAll(limits, "BURST", "4") + "[open.web]\nports = 80\n"
	w.load(t, was)
	each := func() *packet { return w.tcp(stranger4, 22) }
	all := func() *packet { return w.tcp(stranger6, 23) }
	other := func() *packet { return w.tcp(stranger4, 24) }
	echo := func() *packet { return w.ping(stranger4) }
	w.wantIn(t, "before, per source", 1, 1, each)
	w.wantIn(t, "before, per rule", 1, 1, all)
	w.wantIn(t, "before, echo", 1, 1, echo)
	w.wantIn(t, "before, that differs", 1, 2, other)
	trial := onTrial(ruleset(t, was), ruleset(t, will))
	w.apply(trial)
	w.wantIn(t, "on trial, per source", 1, 1, each)
	w.wantIn(t, "on trial, per rule", 1, 1, all)
	w.wantIn(t, "on trial, echo", 1, 2, echo)
	w.wantIn(t, "on trial, that differs", 4, 6, other)
	w.endTrial()
	w.wantIn(t, "over, per source", 1, 2, each)
	w.wantIn(t, "over, per rule", 1, 2, all)
	w.wantIn(t, "over, echo", 0, 2, echo)
	w.apply(ruleset(t, was))
	w.wantIn(t, "clean, per source", 0, 2, each)
	w.wantIn(t, "clean, per rule", 0, 2, all)
	w.wantIn(t, "clean, echo", 0, 2, echo)
	w.apply(trial)
	w.apply(ruleset(t, will))
	w.wantIn(t, "confirmed, per source", 0, 2, each)
	w.wantIn(t, "confirmed, per rule", 0, 2, all)
	w.wantIn(t, "confirmed, echo", 0, 2, echo)
}

// manyAddresses lists n networks, of which every seventh is at another place for
// another first.
func manyAddresses(first, n int) string {
	var b strings.Builder
	for i := range n {
		at := i * 8
		if i%7 == 0 {
			at += first
		}
		fmt.Fprintf(&b, "10.%d.%d.%d\n", at>>16, at>>8&255, at&255)
	}
	return b.String()
}

// Sets and maps come back as they were, the large ones too.
func TestTrialRestoresSets(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		large := func(first int) *rules.Ruleset {
			text := "version = 1\n[open.ssh]\nports = 22\nfrom = \"@list\"\n[open.p]\nports = [80, 443, \"1000-1010\"]\n[set.list]\nfiles = [\"list.txt\"]\n"
			p, problems := rules.Parse("policy.toml", []byte(text), filesOf(map[string]string{"list.txt": manyAddresses(first, 40000)}))
			if p == nil {
				t.Fatalf("%v", problems)
			}
			return rules.Compile(p)
		}
		was, will := large(0), large(7)
		c := dial(t)
		both := []*rules.Ruleset{was, will}
		c.Known = func(set, digest string) *rules.Set {
			for _, rs := range both {
				if got := KnownIn(&rs.Table)(set, digest); got != nil {
					return got
				}
			}
			return nil
		}
		for _, end := range []*rules.Ruleset{was, will} {
			mustApply(t, c, was)
			trial := onTrial(was, will)
			mustApply(t, c, trial)
			if res := mustApply(t, c, trial); len(res.Changed) > 0 {
				t.Errorf("applied twice: %v", res.Changed)
			}
			mustApply(t, c, end)
			meant, err := Meant(end, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			// Every element is looked up.
			if _, d, err := c.Check(meant, Everything); err != nil || len(d) > 0 {
				t.Errorf("%v %v", d, err)
			}
		}
	})
}

// Neither a trial, nor its end, nor what clears up behind it is to be noticed by
// those whom both policies admit or refuse.
func TestSoakTrial(t *testing.T) {
	all := turns(t, 6, func(turn int) string { return moved(turn, "4500-4510") + ranged(turn) })
	w := newWindow(t, all[0])
	now := 0
	for i := range repetitions(60) {
		next := (now + 1) % len(all)
		until := time.Now().Add(1200 * time.Millisecond)
		mustApply(t, w.conn, rules.Trial(all[now], all[next], until))
		switch i % 3 {
		case 0: // confirmed
			time.Sleep(100 * time.Millisecond)
			now = next
		case 1: // rolled back
			time.Sleep(100 * time.Millisecond)
		case 2:
			for {
				is, err := w.conn.Snapshot(rules.TableName)
				if err != nil {
					t.Fatal(err)
				}
				end, there := is.Trial()
				if there && end.IsZero() {
					break
				}
				if !there || time.Since(until) > patience {
					t.Fatalf("the trial ends at %v, it is %v", end, time.Now())
				}
				time.Sleep(max(time.Until(end), 10*time.Millisecond))
			}
		}
		mustApply(t, w.conn, all[now])
	}
	a := w.end()
	t.Logf("%d SYNs to the closed port, %d answers; %d canaries, %d lost; %d connects, %d failures", a.SYNs, a.Leaked, a.Canaries, a.lost(), a.Connects, a.Failures)
	w.check(t, a)
}
