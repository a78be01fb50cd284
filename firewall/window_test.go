package firewall

import (
	"bytes"
	"flag"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
	"deadlight/verify"
)

// repetitions is the full count when the soak tests were asked for by name
// (go test -run Soak), and a tenth of it otherwise.
func repetitions(full int) int {
	if strings.Contains(flag.Lookup("test.run").Value.String(), "Soak") {
		return full
	}
	return full / 10
}

// window is a host under load, and what it suffered.
type window struct {
	*traffic
	host *verify.World
	conn *Conn
	// The longest stall of the echo flows while the ruleset was reloaded, while
	// that of another host was, and in as much time without.
	reloading, elsewhere, quiet time.Duration
	took                        []time.Duration // each reload
}

// newHost makes a host under a ruleset.
func newHost(t *testing.T, first *rules.Ruleset) (*verify.World, *Conn) {
	t.Helper()
	host, err := verify.NewWorld(verify.WorldConfig{Host4: host4, Host6: host6, Links: []string{"eth0"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	conn, err := Dial(host.HostFile())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	mustApply(t, conn, first)
	return host, conn
}

// newWindow puts a host under a ruleset and then under load.
func newWindow(t *testing.T, first *rules.Ruleset) *window {
	t.Helper()
	w := &window{}
	w.host, w.conn = newHost(t, first)
	w.traffic = startTraffic(t, w.host)
	w.begin()
	time.Sleep(300 * time.Millisecond)
	return w
}

// reloads reloads n times, in blocks that alternate with the same reloads of
// another host, which cost the machine as much, and with as much time of rest. It
// gives what the traffic saw in all.
func (w *window) reloads(t *testing.T, n int, here, elsewhere func(i int)) account {
	t.Helper()
	const (
		block  = 5
		pause  = 30 * time.Millisecond  // between two reloads
		settle = 300 * time.Millisecond // more than a lost segment takes to come again
	)
	before := w.read()
	run := func(i int, reload func(i int)) (longest time.Duration) {
		for ; i < n; i++ {
			reload(i)
			time.Sleep(pause)
			now := w.read()
			longest = max(longest, now.Stall)
			if now.Leaked > before.Leaked || now.Failures > before.Failures {
				t.Logf("reload %d: %d answers of the closed port, %d failures", i, now.Leaked-before.Leaked, now.Failures-before.Failures)
			}
			before = now
			if i%block == block-1 {
				break
			}
		}
		time.Sleep(settle)
		return max(longest, w.read().Stall)
	}
	for i := 0; i < n; i += block {
		begun := time.Now()
		w.reloading = max(w.reloading, run(i, func(i int) {
			at := time.Now()
			here(i)
			w.took = append(w.took, time.Since(at))
		}))
		passed := time.Since(begun)
		if elsewhere != nil {
			w.elsewhere = max(w.elsewhere, run(i, elsewhere))
		}
		time.Sleep(passed)
		w.quiet = max(w.quiet, w.read().Stall)
	}
	a := w.end()
	var sum, most time.Duration
	for _, d := range w.took {
		sum, most = sum+d, max(most, d)
	}
	t.Logf("%d reloads, %v each, at most %v", n, (sum / time.Duration(n)).Round(100*time.Microsecond), most.Round(100*time.Microsecond))
	t.Logf("%d SYNs to the closed port, %d answers; %d canaries, %d lost; %d connects, %d failures, slowest %v",
		a.SYNs, a.Leaked, a.Canaries, a.lost(), a.Connects, a.Failures, a.SlowestConnect.Round(100*time.Microsecond))
	t.Logf("longest stall of the flows in %d messages: %v while reloading, %v while another host was, %v at rest",
		a.Messages, w.reloading.Round(100*time.Microsecond), w.elsewhere.Round(100*time.Microsecond), w.quiet.Round(100*time.Microsecond))
	return a
}

// lost counts the canaries that were not answered.
func (a *account) lost() uint64 { return a.Canaries - min(a.Canaries, a.CanaryAnswers) }

// longStall reports whether reloads stalled the flows for longer than a machine
// does that is as busy: the longest of few messages is a noisy thing.
func (w *window) longStall() bool {
	return w.reloading > 3*max(w.elsewhere, w.quiet)+60*time.Millisecond
}

// check holds what the host suffered against what was promised: nothing.
func (w *window) check(t *testing.T, a account) {
	t.Helper()
	if a.SYNs == 0 || a.Canaries == 0 || a.CanaryAnswers == 0 || a.Exchanges == 0 || a.Messages == 0 || a.Missed > 0 {
		t.Errorf("this proves nothing: %+v", a)
	}
	if a.Leaked > 0 {
		t.Errorf("the closed port answered %d times", a.Leaked)
	}
	if a.Failures > 0 {
		t.Errorf("%d of %d connects failed: %q", a.Failures, a.Connects, a.Why)
	}
	if a.lost() > 0 {
		t.Errorf("%d of %d SYNs to the open port were lost", a.lost(), a.Canaries)
	}
	if len(a.FlowsThatFailed) > 0 {
		t.Errorf("established flows ended: %q", a.FlowsThatFailed)
	}
	if w.longStall() {
		t.Errorf("the flows stalled for %v, for %v by reloads elsewhere and for %v without", w.reloading, w.elsewhere, w.quiet)
	}
}

// openToTraffic opens what the traffic needs.
const openToTraffic = `
[open.echo]
ports = 7000
[open.connect]
ports = 8000
[open.canary]
ports = 8001
`

// rotated is a policy of n rules, every one restricted to a source; the next
// turn has other ports, other sources and other sets.
func rotated(n, turn int) string {
	var b strings.Builder
	b.WriteString(openToTraffic)
	fmt.Fprintf(&b, "[set.partners]\naddresses = [\"192.0.2.%d\", \"2001:db8:5::%x\"]\n", 10+turn, 10+turn)
	fmt.Fprintf(&b, "[open.partners]\nports = [%d, %d]\nfrom = \"@partners\"\n", 9000+turn, 9100+turn)
	for i := 4; i < n; i++ {
		port := 10000 + (i+turn*17)%20000
		if i%2 == 0 {
			fmt.Fprintf(&b, "[open.r%d]\nports = %d\nfrom = \"10.%d.%d.%d\"\n", i, port, i>>8, i&255, turn+1)
		} else {
			fmt.Fprintf(&b, "[open.r%d]\nports = %d\nfrom = \"2001:db8:%x:%x::/64\"\n", i, port, i, turn+1)
		}
	}
	return b.String()
}

// ranged makes the maps of ports interval maps: the kernel keeps those, and
// replaces them, in another way.
func ranged(turn int) string {
	return fmt.Sprintf("[open.range]\nports = \"%d-%d\"\n", 50000+turn, 50010+turn)
}

// moved has a rule that lists the closed port for another source, and in the
// next turn other ports for anybody: rules and sets must change at one instant.
func moved(turn int, ports string) string {
	rule := "[open.moves]\nports = 4444\nfrom = \"10.99.0.0/16\"\n"
	if turn%2 == 1 {
		rule = "[open.moves]\nports = \"" + ports + "\"\n"
	}
	return rotated(1000, turn) + rule // many others: the longer the commit, the wider a window
}

// few is rotated, but that most rules stay as they are.
func few(n, turn int) string {
	return rotated(n-2, 0) + fmt.Sprintf("[open.more]\nports = [%d]\nfrom = \"10.9.9.%d\"\n[open.most]\nports = %d\n", 40000+turn, turn+1, 41000+turn)
}

// mixed changes at once what a change of the policy can change around a port
// that stays open: the kind of every set, restricted rules, rates, and a rule
// for another source on the closed port.
func mixed(turn int) string {
	var b strings.Builder
	list := func(name string, prefixes bool, n int, own bool) {
		fmt.Fprintf(&b, "[set.%s]\naddresses = [", name)
		if own {
			fmt.Fprintf(&b, "%q, %q, ", client4, client6)
		}
		for i := range n {
			if prefixes {
				fmt.Fprintf(&b, "\"10.%d.%d.0/24\", \"2001:db8:%x:%x::/64\", ", turn, i, turn, i)
			} else {
				fmt.Fprintf(&b, "\"10.%d.%d.7\", \"2001:db8:%x:%x::7\", ", turn, i, turn, i)
			}
		}
		b.WriteString("]\n")
	}
	list("friends", turn%2 == 0, 50+turn, true)
	list("bad", turn%2 == 1, 200-turn, false)
	b.WriteString("[block.bad]\nfrom = \"@bad\"\n")
	// A canary comes from anywhere, so its port stays open to all.
	b.WriteString("[open.canary]\nports = [8001, " + []string{"\"8003-8010\"", "8004", "\"8100-8200\""}[turn%3] + "]\n")
	switch turn % 4 {
	case 0:
		b.WriteString("[open.echo]\nports = 7000\n[open.connect]\nports = \"8000-8000\"\nfrom = \"@friends\"\n")
	case 1:
		b.WriteString("[open.both]\nports = [7000, 8000]\nfrom = \"@friends\"\n")
	case 2:
		b.WriteString("[open.echo]\nports = \"6990-7010\"\nfrom = [\"203.0.113.0/24\", \"2001:db8:77::/48\"]\n" +
			"[open.connect]\nports = [8000, 8002]\nrate = { limit = \"100000/second\", burst = 50000, per = \"rule\" }\n")
	case 3:
		b.WriteString("[open.echo]\nports = 7000\nrate = { limit = \"50000/second\", burst = 20000 }\n" +
			"[open.connect]\nports = 8000\nfrom = \"@friends\"\nconnections = 50000\n[open.other]\nports = 22\nrate = { limit = \"10/minute\" }\n")
	}
	if turn%2 == 1 {
		b.WriteString("[open.elsewhere]\nports = [4444, 4445]\nfrom = \"10.99.0.0/16\"\n[log]\ndropped = false\n")
	} else {
		b.WriteString("[open.elsewhere]\nports = \"4440-4443\"\n[default]\nestablished = \"keep\"\n")
	}
	return b.String()
}

// turns compiles what takes turns: each differs from the next, and the last from
// the first.
func turns(t *testing.T, n int, policy func(turn int) string) []*rules.Ruleset {
	t.Helper()
	var out []*rules.Ruleset
	for i := range n {
		out = append(out, ruleset(t, policy(i)))
	}
	return out
}

// A reload is not to be noticed: under a flood at a closed port with a listener
// behind it no answer comes from there, no connect to an open port fails, and no
// established flow stalls.
func TestSoakNoWindow(t *testing.T) {
	for _, tt := range []struct {
		name   string
		turns  int
		policy func(turn int) string
	}{
		{"10 rules", 6, func(turn int) string { return rotated(10, turn) }},
		{"1000 rules", 6, func(turn int) string { return rotated(1000, turn) }},
		{"5000 rules", 3, func(turn int) string { return rotated(5000, turn) }},
		{"few of 1000 rules and a range", 3, func(turn int) string { return few(999, turn) + ranged(turn) }},
		{"everything at once", 12, mixed},
		{"a rule leaves the closed port, single ports", 2, func(turn int) string { return moved(turn, "4500") }},
		{"a rule leaves the closed port, ranges", 2, func(turn int) string { return moved(turn, "4440-4443") + ranged(turn) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			all := turns(t, tt.turns, tt.policy)
			w := newWindow(t, all[0])
			_, elsewhere := newHost(t, all[0])
			reload := func(c *Conn) func(i int) {
				return func(i int) {
					if res := mustApply(t, c, all[(i+1)%len(all)]); len(res.Changed) == 0 {
						t.Error("the reload changed nothing")
					}
				}
			}
			a := w.reloads(t, repetitions(50), reload(w.conn), reload(elsewhere))
			w.check(t, a)
		})
	}
}

// The same measurement sees the window of a table that is deleted and added
// again, though in one transaction.
func TestSoakWindowIsSeen(t *testing.T) {
	all := turns(t, 2, func(turn int) string { return rotated(5000, turn) })
	var texts []string
	for _, rs := range all {
		var b bytes.Buffer
		if err := rs.Table.WriteNFT(&b, time.Now()); err != nil {
			t.Fatal(err)
		}
		texts = append(texts, b.String())
	}
	// How often the window opens under a packet depends on the machine: it is looked
	// for until it is seen.
	for round, seen := 0, false; !seen; round++ {
		if round == 12 {
			t.Fatal("nothing leaked and nothing was lost")
		}
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			w := newWindow(t, all[0])
			a := w.reloads(t, repetitions(50), func(i int) {
				if err := w.host.Host(func() error {
					cmd := exec.Command("nft", "-f", "-")
					cmd.Stdin = strings.NewReader(texts[(i+1)%len(texts)])
					out, err := cmd.CombinedOutput()
					if err != nil {
						err = fmt.Errorf("%w: %s", err, out)
					}
					return err
				}); err != nil {
					t.Fatal(err)
				}
			}, nil)
			t.Logf("a long stall: %v", w.longStall())
			seen = a.Leaked > 0 || a.Failures > 0 || a.lost() > 0
		})
		if t.Failed() {
			return
		}
	}
}
