package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

func mustApply(t *testing.T, c *Conn, rs *rules.Ruleset) Result {
	t.Helper()
	res, err := c.Apply(rs)
	if err != nil {
		t.Fatalf("apply: %v", err)
	}
	return res
}

func TestApplyIsIdempotent(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		for _, text := range []string{everything, little, "", others, observed, everything} {
			first := mustApply(t, c, ruleset(t, text))
			if len(first.Changed) == 0 {
				t.Errorf("apply of another policy reported no change")
			}
			second := mustApply(t, c, ruleset(t, text))
			if len(second.Changed) != 0 || second.Generation.ID != first.Generation.ID {
				t.Errorf("second apply changed %v, generation %d after %d", second.Changed, second.Generation.ID, first.Generation.ID)
			}
		}
	})
}

// The netlink encoder and the nft text are two ways to the same table; nft
// itself is the judge.
func TestShowLoadsTheSameTable(t *testing.T) {
	for name, text := range map[string]string{"everything": everything, "little": little, "empty": "", "others": others, "observed": observed} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				rs := ruleset(t, text)
				mustApply(t, dial(t), rs)
				ours := blocks(t)
				relisted := filepath.Join(t.TempDir(), "list.nft")
				if err := os.WriteFile(relisted, []byte(listTable(t)), 0o600); err != nil {
					t.Fatal(err)
				}
				var b bytes.Buffer
				if err := rs.Table.WriteNFT(&b, time.Now()); err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(t.TempDir(), "show.nft")
				if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
				nft(t, "-c", "-f", file)
				nft(t, "-f", file)
				if d := cmp.Diff(ours, blocks(t)); d != "" {
					t.Errorf("netlink (-) and nft text (+) differ:\n%s", d)
				}
				nft(t, "delete", "table", "inet", "deadlight")
				nft(t, "-f", relisted) // what nft lists loads again
			})
		})
	}
}

var handle = regexp.MustCompile(`chain (\w+) \{ # handle (\d+)`)

func baseHandles(t *testing.T) map[string]string {
	out := map[string]string{}
	for _, m := range handle.FindAllStringSubmatch(nft(t, "-a", "list", "table", "inet", "deadlight"), -1) {
		switch m[1] {
		case "gate", "backstop_in", "backstop_forward", "silence":
			out[m[1]] = m[2]
		}
	}
	return out
}

func TestReloadKeepsBaseChainsAndCounters(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, everything))
		before := baseHandles(t)
		if len(before) != 4 {
			t.Fatalf("base chains: %v", before)
		}
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("lo up: %v %s", err, out)
		}
		if out, err := exec.Command("ping", "-c1", "-W1", "127.0.0.1").CombinedOutput(); err != nil {
			// No ping on this machine: any packet over lo will do.
			_ = out
			exec.Command("bash", "-c", "echo > /dev/udp/127.0.0.1/9").Run()
		}
		counted := nft(t, "list", "counter", "inet", "deadlight", "c_loopback")
		if strings.Contains(counted, "packets 0 ") {
			t.Fatalf("nothing was counted: %s", counted)
		}
		for _, text := range []string{little, "", everything} {
			mustApply(t, c, ruleset(t, text))
			if d := cmp.Diff(before, baseHandles(t)); d != "" {
				t.Errorf("a reload replaced base chains:\n%s", d)
			}
		}
		if after := nft(t, "list", "counter", "inet", "deadlight", "c_loopback"); strings.Contains(after, "packets 0 ") {
			t.Errorf("a reload lost the counter: %s", after)
		}
	})
}

// Whatever another program does to the table is seen, and the next apply puts
// it right.
func TestApplyRepairsTampering(t *testing.T) {
	tamper := map[string]string{
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
		"address added":          `add element inet deadlight set_admins_4 { 4.0.1.128 }`,
		"set added":              `add set inet deadlight extra { type ipv4_addr; }`,
		"chain added":            `add chain inet deadlight extra`,
		"base chain added":       `add chain inet deadlight extra { type filter hook input priority -500; }`,
		"counter added":          `add counter inet deadlight extra`,
		"quota added":            `add quota inet deadlight extra { over 20 mbytes }`,
		"anonymous set":          `insert rule inet deadlight open_web tcp dport { 1, 2 } accept`,
		"anonymous chain":        `insert rule inet deadlight gate tcp dport 9 jump { accept; }`,
		"constant set":           `add set inet deadlight foo { type ipv4_addr; flags constant; elements = { 1.2.3.4 }; }; insert rule inet deadlight gate ip saddr @foo accept`,
		"expiry made permanent":  `delete element inet deadlight open_vendors_until { ipv4 }; add element inet deadlight open_vendors_until { ipv4 }`,
		"log to the console":     `insert rule inet deadlight open_web log level emerg`,
		"limit in a rule":        `insert rule inet deadlight open_web limit rate 1/day accept`,
	}
	for name, command := range tamper {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				c := dial(t)
				rs := ruleset(t, everything)
				mustApply(t, c, rs)
				want := blocks(t)
				nft(t, command)
				if name != "dormant" && name != "ruleset flushed" && name != "table deleted" {
					if got := blocks(t); got == want {
						t.Fatalf("the tampering did nothing")
					}
				}
				res := mustApply(t, c, rs)
				if len(res.Changed) == 0 {
					t.Errorf("not noticed")
				}
				if d := cmp.Diff(want, blocks(t)); d != "" {
					t.Errorf("not repaired:\n%s", d)
				}
			})
		})
	}
}

func TestApplyMovedBaseChain(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		rs := ruleset(t, everything)
		mustApply(t, c, rs)
		want := listTable(t)
		moved := strings.Replace(want, "hook prerouting priority dstnat - 10", "hook prerouting priority 200", 1)
		file := filepath.Join(t.TempDir(), "moved.nft")
		if err := os.WriteFile(file, []byte("delete table inet deadlight\n"+moved), 0o600); err != nil {
			t.Fatal(err)
		}
		nft(t, "-f", file)
		res := mustApply(t, c, rs)
		if !slices.ContainsFunc(res.Changed, func(d Difference) bool { return d.Action == "change" && d.Kind == "chain" && d.Name == "gate" }) {
			t.Errorf("changes = %v, want the chain gate among them", res.Changed)
		}
		if !strings.Contains(listTable(t), "hook prerouting priority dstnat - 10") {
			t.Errorf("not repaired:\n%s", listTable(t))
		}
	})
}

func TestOtherTablesAreLeftAlone(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		nft(t, `add table ip deadlight { chain input { type filter hook input priority 0; tcp dport 1 drop; }; }`)
		nft(t, `add table inet other { set s { type ipv4_addr; elements = { 1.2.3.4 }; }; chain c { ip saddr @s drop; }; }`)
		before := nft(t, "list", "ruleset")
		c := dial(t)
		mustApply(t, c, ruleset(t, everything))
		mustApply(t, c, ruleset(t, little))
		if found, err := c.Remove(rules.TableName); err != nil || !found {
			t.Fatalf("remove: %v, %v", found, err)
		}
		if d := cmp.Diff(before, nft(t, "list", "ruleset")); d != "" {
			t.Errorf("other tables changed:\n%s", d)
		}
		if found, err := c.Remove(rules.TableName); err != nil || found {
			t.Errorf("second remove: %v, %v", found, err)
		}
	})
}

func TestStaleGenerationChangesNothing(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, little))
		g, err := c.Generation()
		if err != nil {
			t.Fatal(err)
		}
		nft(t, "add table ip somebody")
		before := nft(t, "list", "ruleset")
		e, err := encode(&ruleset(t, everything).Table, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := c.transact(g.ID, e.small()); !errors.Is(err, ErrStale) {
			t.Errorf("transact at an old generation: %v", err)
		}
		if d := cmp.Diff(before, nft(t, "list", "ruleset")); d != "" {
			t.Errorf("a stale transaction changed something:\n%s", d)
		}
	})
}

func TestRefusedChangeNamesTheRule(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, little))
		before := listTable(t)
		rs := ruleset(t, everything)
		for i := range rs.Table.Chains {
			ch := &rs.Table.Chains[i]
			if ch.Name == "open_dns" || ch.Name == "open_six" {
				ch.Rules[len(ch.Rules)-1].Exprs[0] = rules.MatchSet{Field: rules.IPSaddr, Set: "missing"}
			}
		}
		_, err := c.Apply(rs)
		var te *TransactionError
		if !errors.As(err, &te) || len(te.Ops) != 2 {
			t.Fatalf("apply of a broken ruleset: %v", err)
		}
		if te.Ops[0].Op != `rule "open dns" in chain open_dns` || !errors.Is(err, unix.ENOENT) {
			t.Errorf("the error does not name the rule: %v", err)
		}
		if d := cmp.Diff(before, listTable(t)); d != "" {
			t.Errorf("a refused transaction changed something:\n%s", d)
		}
	})
}

func TestDialGoesWhereItWasTold(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		other, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		done := make(chan error)
		go func() { // from the namespace of the process into the one above
			runtime.LockOSThread()
			c, err := Dial(other)
			if err != nil {
				done <- err
				return
			}
			// A freed file and a busy garbage collector must not matter.
			other.Close()
			runtime.GC()
			_, err = c.Apply(ruleset(t, little))
			done <- errors.Join(err, c.Close())
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		listTable(t) // fails when it is not here
	})
	out, err := exec.Command("nft", "list", "tables").CombinedOutput()
	if err != nil || strings.Contains(string(out), "deadlight") {
		t.Errorf("the namespace of the process holds: %s (%v)", out, err)
	}
}

func TestSocketElsewhereIsRefused(t *testing.T) {
	home, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		own := c.ns
		c.ns = home
		if err := c.checkNamespace(); !errors.Is(err, ErrNamespace) {
			t.Errorf("a socket in another namespace: %v", err)
		}
		c.ns = own
		home.Close()
	})
}

func TestNoPermission(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		mustApply(t, dial(t), ruleset(t, little))
		before := listTable(t)
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var caps [2]unix.CapUserData
		if err := unix.Capget(&header, &caps[0]); err != nil {
			t.Fatal(err)
		}
		all := caps
		caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&header, &caps[0]); err != nil { // of this thread only
			t.Fatal(err)
		}
		if c, err := Dial(nil); !errors.Is(err, ErrPermission) {
			t.Errorf("dial without CAP_NET_ADMIN: %v, %v", c, err)
		}
		if err := unix.Capset(&header, &all[0]); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, listTable(t)); d != "" {
			t.Errorf("changed:\n%s", d)
		}
	})
}

func TestLargePolicy(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		var b strings.Builder
		for i := range 1000 {
			fmt.Fprintf(&b, "[open.r%d]\nports = [%d]\nfrom = [\"10.%d.%d.0/24\", \"2001:db8:%x::/48\"]\n", i, 1000+i, i/256, i%256, i)
		}
		b.WriteString("[open.list]\nports = 9\nfrom = \"@big\"\n[set.big]\naddresses = [")
		for i := range 5000 {
			fmt.Fprintf(&b, "\"198.%d.%d.%d\",", 18+i%2, i/256, i%256)
		}
		b.WriteString("]\n")
		c := dial(t)
		rs := ruleset(t, b.String())
		mustApply(t, c, rs)
		if res := mustApply(t, c, rs); len(res.Changed) != 0 {
			t.Errorf("second apply: %d changes", len(res.Changed))
		}
		if n := strings.Count(listTable(t), "\tchain open_r"); n != 1000 {
			t.Errorf("%d rule chains", n)
		}
	})
}

// A table that somebody else made first is taken over; its comment cannot change.
func TestApplyIntoForeignTable(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		nft(t, `add table inet deadlight { comment "mine"; }`)
		c := dial(t)
		mustApply(t, c, ruleset(t, little))
		if res := mustApply(t, c, ruleset(t, little)); len(res.Changed) != 0 {
			t.Errorf("second apply: %v", res.Changed)
		}
	})
}

// The elements of a meter carry the limit they were made with: a new limit must
// not leave them in force, an unchanged one must not forget what was counted.
func TestChangedLimitEmptiesItsMeter(t *testing.T) {
	policy := func(limit int) string {
		return fmt.Sprintf("[open.a]\nports = 80\nrate = { limit = \"%d/minute\" }\n", limit)
	}
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, policy(10)))
		nft(t, "add element inet deadlight open_a_rate4 { 192.0.2.1 limit rate 10/minute burst 5 packets }")
		held := func() bool {
			return strings.Contains(nft(t, "list", "set", "inet", "deadlight", "open_a_rate4"), "192.0.2.1")
		}
		mustApply(t, c, ruleset(t, policy(10)+"[open.b]\nports = 81\n"))
		if !held() {
			t.Error("a reload that did not change the limit emptied the meter")
		}
		// Without the limit of the rule it would admit its source without end.
		nft(t, "add element inet deadlight open_a_rate4 { 192.0.2.2 }")
		if res := mustApply(t, c, ruleset(t, policy(10)+"[open.b]\nports = 81\n")); len(res.Changed) != 1 || res.Changed[0].Kind != "element" || held() {
			t.Errorf("an element put into a meter by hand: %v", res.Changed)
		}
		mustApply(t, c, ruleset(t, policy(20)))
		if held() {
			t.Error("a changed limit left the meter as it was")
		}
	})
}

// A meter that several rules ask keeps what it has counted when one of them goes, and
// can be made anew at that moment too.
func TestSharedMeter(t *testing.T) {
	const a, b = "[open.a]\nports = 80\nrate = { limit = \"10/minute\" }\n", "[open.b]\nports = 81\nrate = { limit = \"10/minute\" }\n"
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		held := func() bool {
			return strings.Contains(nft(t, "list", "set", "inet", "deadlight", "charged4"), "192.0.2.")
		}
		mustApply(t, c, ruleset(t, a+b))
		nft(t, "add element inet deadlight charged4 { 192.0.2.1 counter }") // as packets do
		mustApply(t, c, ruleset(t, a))
		if !held() {
			t.Error("a rule that went emptied the meter")
		}
		mustApply(t, c, ruleset(t, a+b))
		nft(t, "add element inet deadlight charged4 { 192.0.2.2 }")
		mustApply(t, c, ruleset(t, a))
		if held() {
			t.Error("an element put there by hand was left")
		}
	})
}

// However many sources a meter has counted, it is what was applied: only an element
// with another limit is a difference.
func TestManySourcesAreNoDrift(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		rs := ruleset(t, "[open.a]\nports = 80\nrate = { limit = \"10/hour\" }\nconnections = 3\n")
		mustApply(t, c, rs)
		var b strings.Builder
		for i := range rules.LargeSet + 1 {
			addr := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
			fmt.Fprintf(&b, "add element inet deadlight open_a_rate4 { %v limit rate 10/hour burst 5 packets }\n", addr)
		}
		file := filepath.Join(t.TempDir(), "meter.nft")
		if err := os.WriteFile(file, []byte(b.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		nft(t, "-f", file)
		wanted, err := Meant(rs, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		check := func() []Difference {
			_, diff, err := c.Check(wanted, Samples)
			if err != nil {
				t.Fatal(err)
			}
			return diff
		}
		if diff := check(); len(diff) > 0 {
			t.Errorf("%v", diff)
		}
		if res := mustApply(t, c, rs); len(res.Changed) > 0 {
			t.Errorf("an apply of the same changed %v", res.Changed)
		}
		nft(t, "add element inet deadlight open_a_rate4 { 192.0.2.2 }")
		if diff := check(); len(diff) != 1 || diff[0].Kind != "element" {
			t.Errorf("an element put there by hand: %v", diff)
		}
	})
}
