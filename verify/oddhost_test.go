package verify

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// onTheWire starts tcpdump, an independent witness, on the far side of a host's
// interfaces. What it gives ends them and tells what was seen.
func onTheWire(t *testing.T, w *World, links ...string) (seen func() string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var dumps []*exec.Cmd
	var outs, errs []*bytes.Buffer
	for _, l := range links {
		d := exec.CommandContext(ctx, "tcpdump", "-n", "-l", "-i", w.Link(l).Name, "--immediate-mode", "not dst host ff02::16") // reports of a host that has just come up
		out, said := &bytes.Buffer{}, &bytes.Buffer{}
		d.Stdout, d.Stderr = out, said
		d.Cancel = func() error { return d.Process.Signal(os.Interrupt) }
		if err := d.Start(); err != nil {
			t.Fatal(err)
		}
		dumps, outs, errs = append(dumps, d), append(outs, out), append(errs, said)
	}
	time.Sleep(time.Second)
	return func() string {
		time.Sleep(1500 * time.Millisecond) // a SYN-ACK that was not reset would come again
		cancel()
		all := ""
		for i, d := range dumps {
			_ = d.Wait() // it was interrupted
			if !strings.Contains(errs[i].String(), "listening on") {
				t.Fatalf("tcpdump: %s", errs[i].String())
			}
			all += strings.TrimSpace(outs[i].String())
		}
		return all
	}
}

// The witness itself: without what turns answers back they would be seen.
func TestOnTheWireSees(t *testing.T) {
	w := furnished(t, "", "1")
	seen := onTheWire(t, w, "eth0")
	say(t, w, "198.51.100.77:9")
	if got := seen(); !strings.Contains(got, "> 198.51.100.77.9: UDP") {
		t.Errorf("seen: %s", got)
	}
}

// say sends a datagram from a host.
func say(t *testing.T, w *World, to string) {
	t.Helper()
	if err := w.Host(func() error {
		c, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte("x"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
}

// oddKindsIn are the kinds of the findings of odd probes.
func oddKindsIn(t *testing.T, r *Report) []string {
	t.Helper()
	out := []string{}
	for _, f := range r.Findings {
		if f.Odd == "" {
			t.Errorf("the sweep alone finds it: %+v", f)
		}
		if !slices.Contains(out, f.Odd) {
			out = append(out, f.Odd)
		}
	}
	slices.Sort(out)
	return out
}

// A sound host passes, is as it was, and nobody on its wires hears of it.
func TestVantageSendsOddProbes(t *testing.T) {
	rs := compileText(t, bound+"[open.tunnel]\nprotocol = [\"esp\", \"gre\"]\n")
	for _, rpFilter := range []string{"0", "1"} {
		t.Run("rp_filter="+rpFilter, func(t *testing.T) {
			w := furnished(t, compiled(t, rs), rpFilter)
			before := asItIs(t, w)
			seen := onTheWire(t, w, "eth0", "wg0")
			few := Ports{allPorts()[:20000], allPorts()[:20000]}
			r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: few, all: true})
			if got := seen(); got != "" {
				t.Errorf("on the wire:\n%s", got)
			}
			if after := asItIs(t, w); after != before {
				t.Errorf("the host was\n%s\nand is\n%s", before, after)
			}
			if r.Verdict != Pass || !r.exact || r.Odd == nil {
				t.Fatalf("verdict %s, exact %v:\n%s", r.Verdict, r.exact, text(t, r))
			}
			if r.Odd.Packets*10 > r.Probes {
				t.Errorf("%d odd packets among %d are more than a tenth", r.Odd.Packets, r.Probes)
			}
			for _, a := range []string{"203.0.113.10", "2001:db8:77::10", "10.8.0.1", "2001:db8:8::1", "255.255.255.255", "224.0.0.1", "ff02::1"} {
				if !slices.Contains(r.Odd.Addresses, a) {
					t.Errorf("%s was not probed: %v", a, r.Odd.Addresses)
				}
			}
			if !slices.ContainsFunc(r.Odd.Addresses, func(a string) bool { return strings.HasPrefix(a, "fe80:") }) {
				t.Errorf("no link-local address was probed: %v", r.Odd.Addresses)
			}
			sent := map[string]uint64{}
			for _, k := range r.Odd.Kinds {
				sent[k.Name] = k.Packets
				if k.Control == "silent" {
					t.Errorf("%q drew no answer from an open port", k.Name)
				}
			}
			for _, k := range oddKinds() {
				if strings.HasPrefix(k.name, "echo request") {
					continue // the policy admits those
				}
				if want := k.level < 2 && !k.reload; want != (sent[k.name] > 0) {
					t.Errorf("%d packets of %q", sent[k.name], k.name)
				}
			}
			for _, note := range r.Notes {
				if strings.Contains(note, "esp") || strings.Contains(note, "gre") {
					t.Errorf("what is listed was not judged: %s", note)
				}
			}
		})
	}
}

// Mistakes that the sweep cannot see are found, by name and address, and what they let
// out never comes to a wire.
func TestVantageFindsOddHoles(t *testing.T) {
	rs := compileText(t, oddHost)
	// One of each sort; no two let the same packet in.
	tracked := compiled(t, rs)
	const plain = "ip hdrlength 5 " // a rule of inet that says so means IPv4 too
	for _, rule := range []string{
		"tcp sport 53 tcp flags == syn", "udp sport 53", "tcp sport 20000-65535 tcp flags == ack", "ip hdrlength > 5",
		"meta l4proto sctp", "meta l4proto gre", "icmp type timestamp-request",
		plain + "ip daddr 255.255.255.255 udp sport > 19999", plain + "ip daddr 10.8.0.1 tcp flags == 0x0",
	} {
		tracked += letIn(rule)
	}
	// As people write them without connection tracking.
	const stateless = `table inet t {
	chain in { type filter hook prerouting priority -110; policy drop;
		tcp dport { 80, 443, 53 } accept
		udp dport 53 accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		ip frag-off & 0x3fff != 0 accept
		exthdr frag exists accept
	}
	chain out { type filter hook output priority 0; icmpv6 type parameter-problem icmpv6 code 2 drop; }
}
`
	to := map[string]string{"datagram to broadcast": "255.255.255.255", "null": "10.8.0.1"}
	for _, c := range []struct {
		name, text, rpFilter string
		want                 []string
	}{
		{"tracked", tracked, "0", nil}, {"tracked", tracked, "1", nil},
		{"stateless", stateless, "1", []string{"atomic fragment", "fragmented datagram", "fragmented syn", "syn cut within its header"}},
	} {
		if c.want == nil {
			c.want = []string{"ack", "datagram from port 53", "datagram to broadcast", "datagram with record route", "null", "packet of another protocol", "sctp init", "syn from port 53",
				"syn with ip timestamp", "syn with loose source route", "syn with malformed ip option", "syn with record route", "syn with router alert", "timestamp request"}
		}
		t.Run(c.name+", rp_filter="+c.rpFilter, func(t *testing.T) {
			w := furnished(t, c.text, c.rpFilter)
			if err := w.Host(func() error { return setNetSysctl("ipv4/conf/all/accept_source_route", "1") }); err != nil {
				t.Fatal(err)
			}
			before := asItIs(t, w)
			seen := onTheWire(t, w, "eth0", "wg0")
			few := Ports{allPorts()[:3000], allPorts()[:3000]}
			r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: few, all: true})
			if got := seen(); got != "" {
				t.Errorf("on the wire:\n%s", got)
			}
			if after := asItIs(t, w); after != before {
				t.Errorf("the host was\n%s\nand is\n%s", before, after)
			}
			if got := oddKindsIn(t, r); r.Verdict != Fail || !slices.Equal(got, c.want) {
				t.Errorf("verdict %s, found by %q, want %q:\n%s", r.Verdict, got, c.want, text(t, r))
			}
			for _, f := range r.Findings {
				if only, ok := to[f.Odd]; ok && f.Address != only {
					t.Errorf("another address: %+v", f)
				}
			}
		})
	}
}

// Nothing at all filters: everything that a host can say, it says, and not on a wire.
func TestVantageOddProbesOfAnOpenHost(t *testing.T) {
	rs := compileText(t, oddHost)
	w := furnished(t, "", "1")
	seen := onTheWire(t, w, "eth0", "wg0")
	few := allPorts()[:3000]
	r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: Ports{few, few}, all: true})
	if got := seen(); got != "" {
		t.Errorf("on the wire:\n%s", got)
	}
	if r.Verdict != Fail {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
}

// Answers that policy routing sends elsewhere are not waited for, nor set off.
func TestVantageOddProbesKeepStraight(t *testing.T) {
	rs := compileText(t, oddHost)
	w := furnished(t, compiled(t, rs), "2")
	crooked := "ip rule add from 10.8.0.1 lookup 100 && ip route add default via 10.8.0.9 dev wg0 table 100 && ip neigh add 10.8.0.9 lladdr 02:00:00:00:00:09 dev wg0"
	if err := w.Command(t.Context(), []string{"sh", "-c", crooked}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	seen := onTheWire(t, w, "eth0", "wg0")
	few := allPorts()[:1000]
	r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: Ports{few, few}})
	if got := seen(); got != "" {
		t.Errorf("on the wire:\n%s", got)
	}
	if slices.Contains(r.Odd.Addresses, "10.8.0.1") || !slices.Contains(r.Odd.Addresses, "2001:db8:8::1") || r.Verdict != Pass ||
		!slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "those to 10.8.0.1: ") }) {
		t.Errorf("verdict %s, %v:\n%s", r.Verdict, r.Odd.Addresses, text(t, r))
	}
}

// Whatever the host sends to a stranger, by whatever interface and protocol, or passes
// on from one, stays here; what it sends to others does not.
func TestSeclusionKeepsStrangersOffTheWire(t *testing.T) {
	w := furnished(t, "", "0")
	a := netip.MustParseAddr("198.51.100.77")
	s := &surroundings{}
	if err := w.Host(func() (err error) {
		s, err = lookAround()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	lo := 1
	d, err := armDiverter(w.Host, nil, nil, seclusion{[]netip.Addr{a}, s.links, lo})
	if err != nil {
		t.Fatal(err)
	}
	seen := onTheWire(t, w, "eth0", "wg0")
	sh := func(script string) {
		if err := w.Command(t.Context(), []string{"sh", "-ec", script}, os.Stderr, os.Stderr); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		say(t, w, "198.51.100.77:9")
		say(t, w, "198.51.100.78:9")
		sh("ip neigh replace 10.8.0.9 lladdr 02:00:00:00:00:09 dev wg0; ip route replace 198.51.100.64/26 via 10.8.0.9 dev wg0")
	}
	sh("echo 1 >/proc/sys/net/ipv4/ip_forward")
	wire := newTestWire(t, w.Link("wg0"))
	for _, src := range []string{"198.51.100.77", "198.51.100.78"} { // in transit
		wire.send(t, netip.MustParseAddr(src), netip.MustParseAddr("192.0.2.1"), 17, 20001, 9)
	}
	got := seen()
	if err := d.remove(); err != nil {
		t.Fatal(err)
	}
	for want, n := range map[string]int{"> 198.51.100.77": 0, "> 198.51.100.78": 2, "198.51.100.77.20001 >": 1, "198.51.100.78.20001 >": 2} {
		if strings.Count(got, want) != n {
			t.Errorf("%d times %q, want %d:\n%s", strings.Count(got, want), want, n, got)
		}
	}
}

// By packets alone there is no witness, and fragments stay away.
func TestVantageOddProbesByPacketsAlone(t *testing.T) {
	rs := compileText(t, oddHost)
	few := allPorts()[:1000]
	hole := "tcp sport 53 tcp flags == syn accept\n"
	for text1, want := range map[string]Verdict{"": Pass, "insert rule inet deadlight gate " + hole + "insert rule inet deadlight backstop_in " + hole: Fail} {
		w := furnished(t, compiled(t, rs)+text1, "1")
		r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 2, PacketsOnly: true, Ports: Ports{few, nil}})
		if r.Verdict != want || r.Odd == nil {
			t.Fatalf("verdict %s, want %s:\n%s", r.Verdict, want, text(t, r))
		}
		for _, k := range r.Odd.Kinds {
			if strings.Contains(k.Name, "fragment") {
				t.Errorf("%q was sent", k.Name)
			}
		}
		if want == Fail && !slices.Equal(oddKindsIn(t, r), []string{"syn from port 53"}) {
			t.Errorf("found %q", oddKindsIn(t, r))
		}
	}
}

// soon makes the host give up on fragments after so many seconds: nobody waits a minute.
func soon(t *testing.T, w *World, seconds string) {
	t.Helper()
	if err := w.Host(func() error {
		for _, path := range []string{"ipv4/ipfrag_time", "ipv6/ip6frag_time", "netfilter/nf_conntrack_frag6_timeout"} {
			if err := setNetSysctl(path, seconds); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// What the host says of fragments when it gives up on them is waited for, and turned
// back as everything else: of a lone one at level 2, and at level 1 where a table ahead
// of ours keeps one back.
func TestVantageAwaitsReassembly(t *testing.T) {
	rs := compileText(t, oddHost)
	good := compiled(t, rs)
	var kept []string
	for _, l := range strings.Split(good, "\n") {
		if !strings.Contains(l, "reassembly time exceeded") {
			kept = append(kept, l)
		}
	}
	told := strings.Join(kept, "\n")
	const kept2nd = "table ip early { chain in { type filter hook prerouting priority -500; ip frag-off & 0x1fff != 0 meta l4proto udp drop; }; }\n"
	for name, c := range map[string]struct {
		text     string
		thorough int
		want     []string
	}{
		"sound":             {good, 2, []string{}},
		"told of":           {told, 2, []string{"lone first fragment"}},
		"the other is kept": {told + kept2nd, 1, []string{"fragmented datagram"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := furnished(t, c.text, "1")
			soon(t, w, "1")
			before := asItIs(t, w)
			seen := onTheWire(t, w, "eth0", "wg0")
			few := Ports{allPorts()[:3000], allPorts()[:3000]}
			r := lookAt(t, w, HostConfig{Rules: rs, Thorough: c.thorough, Ports: few})
			if got := seen(); got != "" {
				t.Errorf("on the wire:\n%s", got)
			}
			if after := asItIs(t, w); after != before {
				t.Errorf("the host was\n%s\nand is\n%s", before, after)
			}
			if got := oddKindsIn(t, r); !slices.Equal(got, c.want) {
				t.Errorf("found by %q, want %q:\n%s", got, c.want, text(t, r))
			}
		})
	}
}

// A port that the host passes on to a container is listed and answers the sweep; what
// the adversarial probes set off goes neither there nor to a wire, and is no finding.
func TestVantageOddProbesBesideContainers(t *testing.T) {
	rs := compileText(t, "[open.web]\nports = 80\n[icmp]\necho = false\n")
	nat := "table ip nat { chain pre { type nat hook prerouting priority dstnat; tcp dport 80 dnat to 10.8.0.9:8080; }; }\n"
	for name, c := range map[string]struct {
		text string
		want Verdict
	}{
		"sound":  {compiled(t, rs) + nat, Pass},
		"broken": {compiled(t, rs) + nat + "table ip first { chain pre { type nat hook prerouting priority -120; tcp sport 53 dnat to 10.8.0.9:8080; }; }\n" + letIn("tcp sport 53"), Fail},
	} {
		t.Run(name, func(t *testing.T) {
			w := furnished(t, c.text, "1")
			if err := w.Command(t.Context(), []string{"sh", "-ec", "echo 1 >/proc/sys/net/ipv4/ip_forward; ip neigh add 10.8.0.9 lladdr 02:00:00:00:00:09 dev wg0"}, os.Stderr, os.Stderr); err != nil {
				t.Fatal(err)
			}
			seen := onTheWire(t, w, "wg0")
			r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: Ports{allPorts()[:200], nil}})
			stranger := ""
			for _, l := range strings.Split(seen(), "\n") {
				if !strings.Contains(l, "203.0.113.77.") && l != "" { // the sweep's own
					stranger += l + "\n"
				}
			}
			if stranger != "" {
				t.Errorf("on the wire:\n%s", stranger)
			}
			if r.Verdict != c.want {
				t.Errorf("verdict %s, want %s:\n%s", r.Verdict, c.want, text(t, r))
			}
		})
	}
}

// letIn makes a rule for both lines of defence of ours.
func letIn(rule string) (text string) {
	for _, chain := range []string{"gate", "backstop_in", "backstop_forward"} {
		text += "insert rule inet deadlight " + chain + " " + rule + " accept\n"
	}
	return text
}
