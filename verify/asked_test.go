package verify

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"deadlight/rules"
)

// tested has an [[expect]] of every kind; its first line is the second of the file.
const tested = `[open.web]
ports = 80
[open.admin]
ports = 2222
interfaces = "wg0"
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "2001:db8:10::/64"]
[[expect]]
from = "10.1.2.3"
port = "22/tcp"
state = "open"
[[expect]]
from = "198.51.100.9"
port = "5432/tcp"
state = "filtered"
[[expect]]
from = "2001:db8:99::9"
port = "5353/udp"
state = "filtered"
[[expect]]
from = "198.51.100.9"
in = "wg0"
port = "2222/tcp"
state = "open"
[[expect]]
from = "198.51.100.9"
port = "2222/tcp"
state = "filtered"
[[expect]]
from = "198.51.100.9"
to = "203.0.113.10"
port = "22/tcp"
state = "filtered"
[[expect]]
from = "198.51.100.9"
port = "gre"
state = "filtered"
[[expect]]
from = "127.0.0.1"
port = "22/tcp"
state = "filtered"
[[expect]]
from = "198.51.100.9"
port = "icmp"
state = "open"
`

// expectLines writes what became of each [[expect]].
func expectLines(r *Report) []string {
	var out []string
	for i := range r.Expects {
		x := &r.Expects[i]
		out = append(out, x.Place+" "+x.Result+": "+x.what()+" "+x.Expected+": "+x.Observed.String()+": "+x.Reason)
	}
	return out
}

// sourceOnly are changes beside our table that only one stranger meets.
const sourceOnly = `
table ip rewrite {
	chain in { type filter hook prerouting priority raw - 10; ip saddr 198.51.100.9 tcp dport 5432 tcp dport set 80 notrack; }
	chain out { type filter hook output priority raw - 10; ip daddr 198.51.100.9 tcp sport 80 tcp sport set 5432 notrack; }
}
table ip foreign {
	chain in { type filter hook input priority 10; ip saddr 10.1.2.3 drop; }
}
`

// On a throw-away host any address can be taken: each table is sent as it is written.
func TestRehearseExpects(t *testing.T) {
	rs := compileText(t, tested)
	few := Ports{allPorts()[:6000], allPorts()[:6000]}
	want := []string{
		"policy.toml:10 met: 22/tcp from 10.1.2.3 to 203.0.113.77 by eth0 open: open: syn-ack",
		"policy.toml:14 met: 5432/tcp from 198.51.100.9 to 203.0.113.77 by eth0 filtered: filtered: no response",
		"policy.toml:18 met: 5353/udp from 2001:db8:99::9 to 2001:db8:77::77 by eth0 filtered: filtered: no response",
		"policy.toml:22 met: 2222/tcp from 198.51.100.9 to 203.0.113.77 by wg0 open: open: syn-ack",
		"policy.toml:27 met: 2222/tcp from 198.51.100.9 to 203.0.113.77 by eth0 filtered: filtered: no response",
		"policy.toml:31 met: 22/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response",
		"policy.toml:36 unprobed: gre from 198.51.100.9 filtered: unknown: only those of TCP, UDP and echo requests are sent",
		"policy.toml:40 unprobed: 22/tcp from 127.0.0.1 filtered: unknown: no packet from a wire may bear 127.0.0.1",
		"policy.toml:44 met: icmp from 198.51.100.9 to 203.0.113.77 by eth0 open: open: icmp reply",
	}
	r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), sweep: few})
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
	said := text(t, r)
	if r.Verdict != Pass {
		t.Errorf("verdict %s:\n%s", r.Verdict, said)
	}
	for _, line := range []string{
		"  ok   [[expect]] at policy.toml:14: 5432/tcp from 198.51.100.9 to 203.0.113.77 by eth0 is filtered\n",
		"  note not probed: [[expect]] at policy.toml:36, gre from 198.51.100.9: only those of TCP, UDP and echo requests are sent\n",
		" as the policy says, 7 of 9 expectations met (2 not probed), ",
	} {
		if !strings.Contains(said, line) {
			t.Errorf("no %q in\n%s", line, said)
		}
	}
	if b, err := json.Marshal(r); err != nil || !strings.Contains(string(b), `"expects":[{"place":"policy.toml:10","port":"22/tcp"`) {
		t.Errorf("%v %s", err, b)
	}

	// What other tables do to one stranger no other probe meets.
	r = rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)+sourceOnly), sweep: few})
	want[0] = "policy.toml:10 failed: 22/tcp from 10.1.2.3 to 203.0.113.77 by eth0 open: filtered: passed the gate, stopped behind it"
	want[1] = "policy.toml:14 failed: 5432/tcp from 198.51.100.9 to 203.0.113.77 by eth0 filtered: open: syn-ack"
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
	var found []string
	for _, f := range r.Findings {
		found = append(found, f.Expect)
	}
	if slices.Sort(found); r.Verdict != Fail || !slices.Equal(found, []string{"policy.toml:10", "policy.toml:14"}) {
		t.Errorf("verdict %s, findings of %q:\n%s", r.Verdict, found, text(t, r))
	}
	said = text(t, r)
	for _, line := range []string{"  FAIL  5432/tcp  open      expected filtered, [[expect]] at policy.toml:14  ", " expected open, \"ssh\", [[expect]] at policy.toml:10  ", ", 5 of 9 expectations met (2 not probed), "} {
		if !strings.Contains(said, line) {
			t.Errorf("no %q in\n%s", line, said)
		}
	}
}

// The table is judged by what it says itself, also where the policy says otherwise.
func TestExpectAgainstPolicy(t *testing.T) {
	rs := compileText(t, "[open.web]\nports = 80\n[[expect]]\nfrom = \"198.51.100.9\"\nport = \"80/tcp\"\nstate = \"filtered\"\n")
	few := Ports{allPorts()[:100], allPorts()[:100]}
	r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), sweep: few})
	if r.Verdict != Fail || len(r.Findings) != 1 || r.Findings[0].Expect != "policy.toml:4" || r.Findings[0].Expected != "filtered" || r.Findings[0].Observed != Open {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
}

// Of a host itself strangers' addresses can be taken, its own cannot.
func TestVantageExpects(t *testing.T) {
	const more = `
[[expect]]
from = "203.0.113.10"
port = "80/tcp"
state = "open"
[[expect]]
from = "198.51.100.9"
in = "ppp0"
port = "80/tcp"
state = "open"
[[expect]]
from = "198.51.100.9"
to = "192.0.2.50"
port = "80/tcp"
state = "open"
[[expect]]
from = "198.51.100.9"
port = "50000/tcp"
state = "filtered"
`
	rs := compileText(t, tested+more)
	want := []string{
		"policy.toml:10 met: 22/tcp from 10.1.2.3 to 203.0.113.10 by eth0 open: open: syn-ack",
		"policy.toml:14 met: 5432/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response",
		"policy.toml:18 met: 5353/udp from 2001:db8:99::9 to 2001:db8:77::10 by eth0 filtered: filtered: no response",
		"policy.toml:22 met: 2222/tcp from 198.51.100.9 to 203.0.113.10 by wg0 open: closed: rst",
		"policy.toml:27 met: 2222/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response",
		"policy.toml:31 met: 22/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response",
		"policy.toml:36 unprobed: gre from 198.51.100.9 filtered: unknown: only those of TCP, UDP and echo requests are sent",
		"policy.toml:40 unprobed: 22/tcp from 127.0.0.1 filtered: unknown: no packet from a wire may bear 127.0.0.1",
		"policy.toml:44 unprobed: icmp from 198.51.100.9 open: unknown: echo requests are sent only where all ports are asked for",
		"policy.toml:49 unprobed: 80/tcp from 203.0.113.10 open: unknown: 203.0.113.10 is an address of this host itself",
		"policy.toml:53 unprobed: 80/tcp from 198.51.100.9 by ppp0 open: unknown: no interface ppp0 is up with a carrier and an address",
		"policy.toml:58 unprobed: 80/tcp from 198.51.100.9 to 192.0.2.50 open: unknown: 192.0.2.50 is no address of this host at which it can be probed",
		"policy.toml:63 unprobed: 50000/tcp from 198.51.100.9 filtered: unknown: it is not among the ports that were asked for",
	}
	w := furnished(t, compiled(t, rs), "2")
	before := asItIs(t, w)
	r := lookAt(t, w, HostConfig{Rules: rs})
	if after := asItIs(t, w); after != before {
		t.Errorf("the host was\n%s\nand is\n%s", before, after)
	}
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
	if r.Verdict != Pass || !strings.Contains(text(t, r), ", 6 of 13 expectations met (7 not probed), ") {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}

	if err := w.Host(loadText(t, sourceOnly)); err != nil {
		t.Fatal(err)
	}
	r = lookAt(t, w, HostConfig{Rules: rs})
	want[0] = "policy.toml:10 failed: 22/tcp from 10.1.2.3 to 203.0.113.10 by eth0 open: filtered: passed the gate, stopped behind it"
	want[1] = "policy.toml:14 failed: 5432/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: open: syn-ack"
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
	if r.Verdict != Fail || len(r.Findings) != 2 {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}

	// By rp_filter = 1 wg0 takes in only its own neighbours.
	w = furnished(t, compiled(t, rs), "1")
	r = lookAt(t, w, HostConfig{Rules: rs})
	want[0] = "policy.toml:10 met: 22/tcp from 10.1.2.3 to 203.0.113.10 by eth0 open: open: syn-ack"
	want[1] = "policy.toml:14 met: 5432/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response"
	want[3] = "policy.toml:22 unprobed: 2222/tcp from 198.51.100.9 by wg0 open: unknown: this vantage cannot send from 198.51.100.9 by wg0: " +
		"rp_filter = 1, and the routes lead to strangers by another interface, or its gateway does not answer"
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
}

// Where every interface that can be probed is one that the policy names, a table that
// names none is about another.
func TestExpectOfAnotherInterface(t *testing.T) {
	rs := compileText(t, `[open.ssh]
ports = 22
interfaces = ["eth0", "wg0"]
[[expect]]
from = "198.51.100.9"
port = "22/tcp"
state = "filtered"
[[expect]]
from = "198.51.100.9"
port = "23/tcp"
state = "filtered"
`)
	r := lookAt(t, furnished(t, compiled(t, rs), "2"), HostConfig{Rules: rs, Ports: Ports{allPorts()[:100], nil}})
	want := []string{
		"policy.toml:5 unprobed: 22/tcp from 198.51.100.9 filtered: unknown: the policy decides otherwise by the interfaces and to the addresses that can be probed than by one that no rule names: say which is meant with in and to",
		"policy.toml:9 met: 23/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response",
	}
	if d := cmp.Diff(want, expectLines(r)); d != "" {
		t.Error(d)
	}
}

// From another machine its own addresses can be taken, and no others.
func TestLookExpects(t *testing.T) {
	rs := compileText(t, tested)
	target := netip.MustParseAddr("203.0.113.10")
	look := func(t *testing.T, text, in string) *Report {
		w := furnished(t, text, "0")
		link := w.Link("eth0")
		out, err := netlink.LinkByIndex(link.Index)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range []string{"192.0.2.7/32", "198.51.100.9/32"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				t.Fatal(err)
			}
			if err := netlink.AddrAdd(out, addr); err != nil {
				t.Fatal(err)
			}
		}
		if err := netlink.RouteReplace(&netlink.Route{
			LinkIndex: link.Index, Dst: ipNet(netip.PrefixFrom(target, 32)), Src: netip.MustParseAddr("192.0.2.7").AsSlice(), Scope: netlink.SCOPE_LINK,
		}); err != nil {
			t.Fatal(err)
		}
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Index, State: netlink.NUD_PERMANENT, IP: target.AsSlice(), HardwareAddr: link.Dst}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		few := allPorts()[:6000]
		r, err := Look(ctx, LookConfig{Rules: rs, Targets: []netip.Addr{target}, Ports: Ports{few, few}, In: in})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	// Nothing answers one whom the policy opens a port to: echo proves the path.
	want := []string{
		"policy.toml:10 unprobed: 22/tcp from 10.1.2.3 open: unknown: this vantage cannot send from 10.1.2.3",
		"policy.toml:14 met: 5432/tcp from 198.51.100.9 to 203.0.113.10 filtered: filtered: no response",
		"policy.toml:18 unprobed: 5353/udp from 2001:db8:99::9 filtered: unknown: no target has an IPv6 address",
		"policy.toml:22 unprobed: 2222/tcp from 198.51.100.9 by wg0 open: unknown: by which interface the probes enter is not known: name it with --in",
		"policy.toml:27 unprobed: 2222/tcp from 198.51.100.9 filtered: unknown: the policy decides otherwise to 203.0.113.10, or by some interface, than to one that no rule names: " +
			"say which is meant with in and to, and by which the probes enter with --in",
		"policy.toml:31 met: 22/tcp from 198.51.100.9 to 203.0.113.10 filtered: filtered: no response",
		"policy.toml:36 unprobed: gre from 198.51.100.9 filtered: unknown: only those of TCP, UDP and echo requests are sent",
		"policy.toml:40 unprobed: 22/tcp from 127.0.0.1 filtered: unknown: no packet from a wire may bear 127.0.0.1",
		"policy.toml:44 unprobed: icmp from 198.51.100.9 open: unknown: echo requests are sent only where all ports are asked for",
	}
	r := look(t, compiled(t, rs), "")
	if d := cmp.Diff(want, expectLines(r)); d != "" || r.Verdict != Pass {
		t.Errorf("%s\nverdict %s:\n%s", d, r.Verdict, text(t, r))
	}
	r = look(t, compiled(t, rs)+sourceOnly, "eth0")
	want[1] = "policy.toml:14 failed: 5432/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: open: syn-ack"
	want[3] = "policy.toml:22 unprobed: 2222/tcp from 198.51.100.9 by wg0 open: unknown: the probes enter by eth0"
	want[4] = "policy.toml:27 met: 2222/tcp from 198.51.100.9 to 203.0.113.10 by eth0 filtered: filtered: no response"
	want[5] = strings.Replace(want[5], "10 filtered", "10 by eth0 filtered", 1)
	if d := cmp.Diff(want, expectLines(r)); d != "" || r.Verdict != Fail || len(r.Findings) != 1 {
		t.Errorf("%s\nverdict %s:\n%s", d, r.Verdict, text(t, r))
	}
}

// Where nothing is enforced, nothing shows what would be dropped.
func TestExpectObserved(t *testing.T) {
	rs := compileText(t, "[default]\nenforce = false\n[[expect]]\nfrom = \"198.51.100.9\"\nport = \"81/tcp\"\nstate = \"filtered\"\n")
	if why := unaskable(rs, &rs.Policy.Expect[0], Ports{TCP: allPorts()}); why != "enforce = false: nothing is dropped" {
		t.Error(why)
	}
	rs.Policy.Expect[0].State = rules.OutcomeOpen
	if why := unaskable(rs, &rs.Policy.Expect[0], Ports{TCP: allPorts()}); why != "" {
		t.Error(why)
	}
}

// The silence of an echo request is told from that of a dead path by what else comes
// from the same address.
func TestExpectEcho(t *testing.T) {
	rs := compileText(t, `[icmp]
echo = false
[open.web]
ports = 80
from = "10.0.0.0/8"
[[expect]]
from = "198.51.100.9"
port = "icmp"
state = "filtered"
[[expect]]
from = "2001:db8:99::9"
port = "icmpv6"
state = "filtered"
[[expect]]
from = "10.1.2.3"
port = "icmp"
state = "filtered"
`)
	want := func(to4, to6, result, observed, reason string) []string {
		return []string{
			"policy.toml:7 " + result + ": icmp from 198.51.100.9 to " + to4 + " by eth0 filtered: " + observed + ": " + reason,
			"policy.toml:11 met: icmpv6 from 2001:db8:99::9 to " + to6 + " by eth0 filtered: filtered: no response",
			"policy.toml:15 met: icmp from 10.1.2.3 to " + to4 + " by eth0 filtered: filtered: no response",
		}
	}
	hole := compiled(t, rs) + "insert rule inet deadlight gate ip saddr 198.51.100.9 icmp type echo-request accept\ninsert rule inet deadlight backstop_in ip saddr 198.51.100.9 icmp type echo-request accept\n"
	few := Ports{allPorts()[:100], allPorts()[:100]}
	r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), sweep: few})
	if d := cmp.Diff(want("203.0.113.77", "2001:db8:77::77", "met", "filtered", "no response"), expectLines(r)); d != "" || r.Verdict != Pass {
		t.Errorf("%s\nverdict %s:\n%s", d, r.Verdict, text(t, r))
	}
	r = rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, hole), sweep: few})
	if d := cmp.Diff(want("203.0.113.77", "2001:db8:77::77", "failed", "open", "icmp reply"), expectLines(r)); d != "" || r.Verdict != Fail {
		t.Errorf("%s\nverdict %s:\n%s", d, r.Verdict, text(t, r))
	}
	if said := text(t, r); !regexp.MustCompile(`(?m)^  FAIL  icmp +open +expected filtered, \[\[expect\]\] at policy.toml:7 +icmp reply +from 198.51.100.9 by eth0 *$`).MatchString(said) {
		t.Errorf("no finding of the echo request:\n%s", said)
	}

	all := Ports{allPorts(), allPorts()}
	r = lookAt(t, furnished(t, hole, "2"), HostConfig{Rules: rs, Ports: all})
	if d := cmp.Diff(want("203.0.113.10", "2001:db8:77::10", "failed", "open", "icmp reply"), expectLines(r)); d != "" || r.Verdict != Fail || len(r.Findings) != 1 {
		t.Errorf("%s\nverdict %s:\n%s", d, r.Verdict, text(t, r))
	}
}

// tcpdump, an independent witness, sees nothing of it on a wire: neither packets that
// bear a neighbour's address nor what answers them.
func TestExpectIsNotOnTheWire(t *testing.T) {
	var more strings.Builder
	for _, x := range [][3]string{
		{"10.8.0.7", "9005/tcp", "wg0"}, {"10.8.0.7", "icmp", "wg0"}, {"2001:db8:8::7", "9005/tcp", "wg0"}, {"2001:db8:8::7", "icmpv6", "wg0"},
		{"10.9.9.9", "22/tcp", "eth0"}, {"198.51.100.9", "icmp", "eth0"}, {"2001:db8:99::9", "icmpv6", "eth0"}, {"198.51.100.9", "53/udp", "eth0"},
	} {
		fmt.Fprintf(&more, "[[expect]]\nfrom = %q\nport = %q\nin = %q\nstate = \"open\"\n", x[0], x[1], x[2])
	}
	rs := compileText(t, bound+more.String())
	w := furnished(t, compiled(t, rs), "1")
	before := asItIs(t, w)
	var seen, said bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	dump := exec.CommandContext(ctx, "tcpdump", "-n", "-l", "-i", "any", "--immediate-mode", "tcp or udp or icmp or icmp6")
	dump.Stdout, dump.Stderr = &seen, &said
	dump.Cancel = func() error { return dump.Process.Signal(os.Interrupt) }
	if err := dump.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	r := lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{allPorts(), allPorts()}})
	time.Sleep(1500 * time.Millisecond) // a SYN-ACK that was not reset would come again
	cancel()
	_ = dump.Wait() // it was interrupted
	if !strings.Contains(said.String(), "listening on") || strings.TrimSpace(seen.String()) != "" {
		t.Errorf("tcpdump: %s\n%s", said.String(), seen.String())
	}
	if r.Verdict != Pass || !strings.Contains(text(t, r), ", 8 of 8 expectations met, ") {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
	if after := asItIs(t, w); after != before {
		t.Errorf("the host was\n%s\nand is\n%s", before, after)
	}
}
