package verify

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const oddHost = `
[open.web]
ports = [80, 443]
[open.dns]
ports = 53
protocol = ["tcp", "udp"]
[icmp]
echo = false
`

// oddHole is a rule that lets one kind in, and nothing that the sweep sends.
type oddHole struct{ kind, rule string }

func (h oddHole) text(chain string) string {
	return fmt.Sprintf("insert rule inet deadlight %s %s accept\n", chain, h.rule)
}

// oddHoles has one for every kind that a stateful ruleset can let in by mistake.
// No two let the same packet in.
func oddHoles() map[string][]oddHole {
	const own = "tcp sport 20000-65535 " // not one that has a kind of its own
	flags := []oddHole{
		{"ack", own + "tcp flags == ack"},
		{"fin", "tcp flags == fin"},
		{"null", "tcp flags == 0x0"},
		{"xmas", own + "tcp flags == (fin | psh | urg)"},
		{"maimon (fin/ack)", "tcp flags == (fin | ack)"},
		{"syn/fin", "tcp flags == (syn | fin)"},
		{"syn-ack", "tcp flags == (syn | ack)"},
		{"syn/urg/psh", "tcp flags == (syn | urg | psh)"},
		{"syn with ecn", "tcp flags == (syn | ecn | cwr)"},
		{"syn with data", "tcp flags == syn ip hdrlength 5 ip length 52"},
		{"xmas from port 53", "tcp sport 53 tcp flags == (fin | psh | urg)"},
		{"syn to port 0", "tcp dport 0"},
		{"datagram to port 0", "udp dport 0"},
	}
	var sources []oddHole
	for _, p := range []int{20, 53, 67, 80, 88, 123, 443, 500} {
		sources = append(sources, oddHole{fmt.Sprintf("syn from port %d", p), fmt.Sprintf("tcp sport %d tcp flags == syn", p)})
	}
	for _, p := range []int{20, 53, 80, 443} {
		sources = append(sources, oddHole{fmt.Sprintf("ack from port %d", p), fmt.Sprintf("tcp sport %d tcp flags == ack", p)})
	}
	for _, p := range []int{53, 67, 68, 88, 123, 137, 500, 547, 1900, 4500, 5353} {
		sources = append(sources, oddHole{fmt.Sprintf("datagram from port %d", p), fmt.Sprintf("udp sport %d", p)})
	}
	return map[string][]oddHole{
		"flags":        flags,
		"source ports": sources,
		"headers": {
			{"syn with record route", "meta l4proto tcp meta nfproto ipv4 @nh,160,16 0x0707"},
			{"syn with ip timestamp", "meta nfproto ipv4 ip hdrlength > 5 @nh,160,8 68"},
			{"syn with router alert", "meta nfproto ipv4 ip hdrlength > 5 @nh,160,8 148"},
			{"syn with loose source route", "meta nfproto ipv4 ip hdrlength > 5 @nh,160,8 131"},
			{"syn with malformed ip option", "meta nfproto ipv4 ip hdrlength > 5 @nh,160,16 0x0728"},
			{"datagram with record route", "meta l4proto udp meta nfproto ipv4 ip hdrlength > 5 @nh,160,16 0x0707"},
			{"syn behind hop-by-hop options", "ip6 nexthdr 0 ip6 length 32 @nh,336,8 1"},
			{"syn behind destination options", "meta l4proto tcp ip6 nexthdr 60 ip6 length 32 @nh,336,8 1"},
			{"syn behind a routing header", "ip6 nexthdr 43"},
			{"syn behind four extension headers", "ip6 nexthdr 0 ip6 length 56"},
			{"syn behind an unknown destination option", "ip6 nexthdr 60 @nh,336,8 0x9e"},
			{"datagram behind destination options", "meta l4proto udp ip6 nexthdr 60"},
		},
		"protocols": {
			{"sctp init", "meta l4proto sctp"},
			{"udp-lite datagram", "meta l4proto 136"},
			{"dccp request", "meta l4proto 33"},
			{"packet of another protocol", "meta l4proto 47"},
		},
		"icmp and many": {
			{"echo request", "ip daddr != 255.255.255.255 icmp type echo-request"},
			{"timestamp request", "icmp type timestamp-request"},
			{"information request", "icmp type info-request"},
			{"address mask request", "icmp type address-mask-request"},
			{"node information query", "icmpv6 type 139"},
			{"echo request to multicast", "ip6 daddr ff02::1 icmpv6 type echo-request"},
			{"echo request to broadcast", "ip daddr 255.255.255.255 icmp type echo-request"},
			{"datagram to broadcast", "ip daddr 255.255.255.255 meta l4proto udp"},
			{"datagram to multicast", "ip6 daddr ff02::1 meta l4proto udp"},
		},
	}
}

// oddRun rehearses with a sweep over the ports that matter, and sees that the
// sweep finds nothing. It gives the kinds that did, by name.
func oddRun(t *testing.T, cfg RehearseConfig) (*Report, []string) {
	t.Helper()
	few := allPorts()[:3000]
	cfg.sweep = Ports{TCP: few, UDP: few}
	if cfg.Thorough == 0 {
		cfg.Thorough = 1
	}
	r := rehearse(t, cfg)
	found := map[string]bool{}
	for _, f := range r.Findings {
		if f.Odd == "" {
			t.Errorf("the sweep alone finds it: %+v", f)
			continue
		}
		for _, name := range strings.Split(f.Odd, " or ") {
			found[name] = true
		}
		if f.Address == "" || f.Reason == "" || !strings.HasPrefix(f.Probe, f.Odd+" from ") {
			t.Errorf("the finding does not say what answered: %+v", f)
		}
	}
	names := []string{}
	for n := range found {
		names = append(names, n)
	}
	slices.Sort(names)
	return r, names
}

func TestOddKindsFindWhatOnlyTheyCan(t *testing.T) {
	rs := compileText(t, oddHost)
	good := compiled(t, rs)
	for name, holes := range oddHoles() {
		t.Run(name, func(t *testing.T) {
			broken, want := good, []string{}
			for _, h := range holes {
				broken += h.text("gate") + h.text("backstop_in")
				want = append(want, h.kind)
			}
			slices.Sort(want)
			load := loadText(t, broken)
			r, got := oddRun(t, RehearseConfig{Rules: rs, Load: func() error {
				if err := os.WriteFile("/proc/sys/net/ipv4/conf/all/accept_source_route", []byte("1"), 0); err != nil {
					return err
				}
				return load()
			}})
			if r.Verdict != Fail || !slices.Equal(got, want) {
				t.Errorf("verdict %s, found by\n%q, want\n%q\n%s", r.Verdict, got, want, text(t, r))
			}
		})
	}
}

// Whole rulesets with the mistakes that people make.
func TestOddProbesFindCommonMistakes(t *testing.T) {
	rs := compileText(t, oddHost)
	const open = `tcp dport { 80, 443, 53 } accept
		udp dport 53 accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		icmp type { destination-unreachable, time-exceeded, parameter-problem } accept
		icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } accept
`
	chain := func(policy, body string) string {
		return "table inet t {\n\tchain in { type filter hook prerouting priority -110; policy " + policy + ";\n\t\t" + body + "\n\t}\n" +
			"\tchain out { type filter hook output priority 0; icmpv6 type parameter-problem icmpv6 code 2 drop; }\n}\n"
	}
	good := compiled(t, rs)
	without := func(comment string) string {
		var kept []string
		for _, l := range strings.Split(good, "\n") {
			if !strings.Contains(l, comment) {
				kept = append(kept, l)
			}
		}
		if len(kept) == strings.Count(good, "\n")+1 {
			t.Fatalf("the ruleset holds no %q", comment)
		}
		return strings.Join(kept, "\n")
	}
	for name, c := range map[string]struct {
		text     string
		thorough int
		want     []string // at least these
		only     bool     // and no others
	}{
		"nothing but SYN is dropped": {chain("accept", open+"tcp flags & (fin | syn | rst | ack) == syn drop\nmeta l4proto != tcp drop"), 1,
			[]string{"ack", "fin", "null", "xmas", "maimon (fin/ack)", "syn-ack", "syn/fin"}, false},
		"invalid is not dropped": {chain("accept", open+"ct state new drop"), 1,
			[]string{"fin", "null", "xmas", "maimon (fin/ack)", "syn-ack", "syn/fin", "xmas from port 53"}, false},
		"answers of name servers": {chain("drop", open+"tcp sport 53 accept\nudp sport 53 accept"), 1,
			[]string{"syn from port 53", "ack from port 53", "datagram from port 53", "xmas from port 53"}, true},
		"only TCP and UDP are dropped": {chain("accept", open+"meta l4proto { tcp, udp, icmp, ipv6-icmp } drop"), 1,
			[]string{"sctp init", "packet of another protocol", "udp-lite datagram", "dccp request"}, true},
		"every ICMP is accepted": {chain("drop", open+"meta l4proto { icmp, ipv6-icmp } accept"), 1,
			[]string{"timestamp request", "echo request", "echo request to multicast"}, false},
		"fragments are accepted": {chain("drop", open+"ip frag-off & 0x3fff != 0 accept\nexthdr frag exists accept"), 1,
			[]string{"syn cut within its header", "fragmented syn", "fragmented datagram", "atomic fragment"}, true},
		"a fragment cut in the header": {chain("drop", open+"ip frag-off & 0x2000 != 0 ip length 28 accept\nip frag-off & 0x1fff == 1 accept"), 1,
			[]string{"syn cut within its header"}, true},
		"atomic fragments": {chain("drop", open+"frag more-fragments 0 frag frag-off 0 accept"), 1, []string{"atomic fragment"}, true},
		"fragments of TCP": {chain("drop", open+"ip frag-off & 0x2000 != 0 ip length 44 accept\nip frag-off & 0x1fff == 3 accept"), 1,
			[]string{"fragmented syn"}, true},
		"fragments of UDP": {chain("drop", open+"ip frag-off & 0x2000 != 0 ip length 36 accept\nip frag-off & 0x1fff == 2 accept"), 1,
			[]string{"fragmented datagram"}, true},
		"the protocol is looked for in the first header": {chain("accept", open+"meta nfproto ipv4 drop\nip6 nexthdr { tcp, udp, ipv6-icmp } drop\nip6 nexthdr != { 0, 43, 44, 60 } drop\n"), 1,
			[]string{"syn behind hop-by-hop options", "syn behind destination options", "syn behind a routing header", "atomic fragment"}, false},
		"reassembly is told of":        {without("reassembly time exceeded"), 2, []string{"lone first fragment"}, true},
		"an unknown option is told of": {without("unknown ipv6 option"), 1, []string{"syn behind an unknown hop-by-hop option"}, true},
		"link-local addresses are trusted": {good + "insert rule inet deadlight gate ip6 daddr fe80::/10 meta l4proto { tcp, udp } accept\ninsert rule inet deadlight backstop_in ip6 daddr fe80::/10 accept\n", 1,
			[]string{"syn", "datagram"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			r, got := oddRun(t, RehearseConfig{Rules: rs, Load: loadText(t, c.text), Reload: func() error { return nil }, Thorough: c.thorough})
			for _, w := range c.want {
				if !slices.Contains(got, w) {
					t.Errorf("%q does not find it", w)
				}
			}
			for _, g := range got {
				if c.only && !slices.Contains(c.want, g) {
					t.Errorf("%q finds something", g)
				}
			}
			if r.Verdict != Fail || t.Failed() {
				t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
			}
		})
	}
}

// A further address that is open is found on that address, and on no other.
func TestOddProbesTryEveryAddress(t *testing.T) {
	rs := compileText(t, oddHost+"[open.vendor]\nports = 5000\nto = [\"192.0.2.99\", \"2001:db8:99::99\"]\n")
	hole := "ip daddr 192.0.2.99 tcp dport != 4999-5001 accept\n" // the sweep looks there from beside
	r, got := oddRun(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)+
		"insert rule inet deadlight gate "+hole+"insert rule inet deadlight backstop_in "+hole), Reload: func() error { return nil }})
	if !slices.Contains(got, "syn") {
		t.Errorf("found by %q:\n%s", got, text(t, r))
	}
	for _, f := range r.Findings {
		if f.Address != "192.0.2.99" {
			t.Errorf("a finding on another address: %+v", f)
		}
	}
	for _, a := range []string{"192.0.2.99", "2001:db8:99::99", "255.255.255.255", "224.0.0.1", "ff02::1"} {
		if !slices.Contains(r.Odd.Addresses, a) {
			t.Errorf("%s was not probed: %v", a, r.Odd.Addresses)
		}
	}
	if !slices.ContainsFunc(r.Odd.Addresses, func(a string) bool { return strings.HasPrefix(a, "fe80:") }) {
		t.Errorf("no link-local address was probed: %v", r.Odd.Addresses)
	}
}

// A sound ruleset passes at every level, within a tenth of the sweep's packets,
// and every kind that an open port must answer is answered there.
func TestOddProbesPassASoundRuleset(t *testing.T) {
	for name, policy := range map[string]string{
		"drop": host, "reject": "[default]\ninput = \"reject\"\n" + host, "keep": "[default]\nestablished = \"keep\"\n" + host,
		"nothing enforced": "[default]\nenforce = false\n" + oddHost, "nothing open": "[icmp]\necho = false\n",
	} {
		t.Run(name, func(t *testing.T) {
			rs := compileText(t, policy)
			few := allPorts()[:10000]
			r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), Thorough: 2, sweep: Ports{TCP: few, UDP: few}})
			want, says := Pass, "none got through"
			if rs.Policy.Default.Observe { // nothing passes then, and nothing is found
				want, says = Inconclusive, "no answer that should not be"
			}
			if r.Verdict != want || len(r.Findings) > 0 {
				t.Fatalf("verdict %s:\n%s", r.Verdict, text(t, r))
			}
			if r.Odd.Packets*10 > r.Probes {
				t.Errorf("%d odd packets among %d are more than a tenth", r.Odd.Packets, r.Probes)
			}
			answered := 0
			for _, k := range r.Odd.Kinds {
				switch {
				case k.Packets == 0 || k.Answered > 0:
					t.Errorf("%+v", k)
				case k.Control == "silent":
					t.Errorf("%q drew no answer from an open port", k.Name)
				case k.Control == "answered":
					answered++
				}
			}
			if name == "drop" && (len(r.Odd.Kinds) < 65 || answered < 30) {
				t.Errorf("%d kinds, %d answered by an open port: %+v", len(r.Odd.Kinds), answered, r.Odd.Kinds)
			}
			if !strings.Contains(text(t, r), says) {
				t.Errorf("the report does not say %q:\n%s", says, text(t, r))
			}
		})
	}
}

// A reload that takes the table away before it loads the new one opens the host
// for a moment, and only who probes at that moment sees it.
func TestOddProbesAcrossAReload(t *testing.T) {
	rs := compileText(t, oddHost)
	load := loadText(t, compiled(t, rs))
	r, got := oddRun(t, RehearseConfig{Rules: rs, Load: load, Reload: func() error {
		if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return load()
	}})
	if want := []string{"datagram across a reload", "syn across a reload"}; r.Verdict != Fail || !slices.Equal(got, want) {
		t.Errorf("verdict %s, found by %q, want %q:\n%s", r.Verdict, got, want, text(t, r))
	}
	for _, f := range r.Findings {
		if !strings.Contains(f.Reason, "answers in ") && !strings.Contains(f.Reason, "1 answer in ") {
			t.Errorf("the finding does not count: %+v", f)
		}
	}
}

// Every kind has a test that only it can pass.
func TestOddKindsAreAllTested(t *testing.T) {
	known := map[string]bool{ // those of whole rulesets above
		"syn cut within its header": true, "fragmented syn": true, "fragmented datagram": true, "lone first fragment": true,
		"atomic fragment": true, "syn behind an unknown hop-by-hop option": true, "syn": true, "datagram": true,
		"syn across a reload": true, "datagram across a reload": true,
	}
	for _, holes := range oddHoles() {
		for _, h := range holes {
			known[h.kind] = true
		}
	}
	for _, k := range oddKinds() {
		if !known[k.name] {
			t.Errorf("nothing tests %q", k.name)
		}
	}
}

// look probes the target of a world at some ports, with a listed port 80 and
// listeners at 80, 81 and 82.
func (w *world) look(ports string, thorough int) *Report {
	w.t.Helper()
	l, err := Listen(func(fn func() error) error {
		var err error
		w.target.do(func() { err = fn() })
		return err
	}, []uint16{80, 81, 82}, []uint16{81})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	spec, err := ParsePorts(ports)
	if err != nil {
		w.t.Fatal(err)
	}
	var r *Report
	w.vantage.do(func() {
		r, err = Look(context.Background(), LookConfig{
			Rules: compileText(w.t, "[open.web]\nports = 80\n"), Targets: []netip.Addr{target4, target6}, Ports: spec, Thorough: thorough,
		})
		w.vantage.must(err)
	})
	return r
}

// gate drops whatever the given rules do not decide, ahead of the stack's own
// complaints about options.
func (w *world) gate(rules string) {
	w.t.Helper()
	w.target.nft("table inet t {\n chain gate {\n  type filter hook prerouting priority -110; policy drop;\n" + rules +
		"\n  ct state invalid drop\n  tcp dport 80 accept\n  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\n }\n" +
		" chain out { type filter hook output priority 0; icmpv6 type parameter-problem icmpv6 code 2 drop; }\n}\n")
}

func TestLookSendsOddProbes(t *testing.T) {
	w := newWorld(t)
	w.gate("ip daddr 10.9.0.2 tcp sport 53 tcp flags == syn accept")
	r := w.look("1-3000/tcp", 1)
	if r.Verdict != Fail || len(r.Findings) == 0 {
		t.Fatalf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
	for _, f := range r.Findings {
		if f.Odd != "syn from port 53" || f.Family != "ipv4" || f.Address != "10.9.0.2" || f.Protocol != "tcp" || f.Port == 80 || f.Expected != "filtered" ||
			(f.Reason != "rst" && f.Reason != "syn-ack") {
			t.Errorf("%+v", f)
		}
	}
	if !strings.Contains(text(t, r), "to syn from port 53") {
		t.Errorf("the text does not name the kind:\n%s", text(t, r))
	}
	for _, k := range r.Odd.Kinds {
		for _, other := range []string{"datagram", "sctp", "dccp", "protocol", "request", "query", "broadcast", "reload"} {
			if strings.Contains(k.Name, other) {
				t.Errorf("--ports 1-3000/tcp, but %q was sent", k.Name)
			}
		}
	}
	if r := w.look0(t); r.Verdict != Pass || r.Odd != nil {
		t.Errorf("at level 0: verdict %s, %+v", r.Verdict, r.Odd)
	}
}

// look0 looks at the same host without odd probes.
func (w *world) look0(t *testing.T) *Report {
	t.Helper()
	spec, _ := ParsePorts("1-3000/tcp")
	var r *Report
	w.vantage.do(func() {
		var err error
		r, err = Look(context.Background(), LookConfig{Rules: compileText(t, "[open.web]\nports = 80\n"), Targets: []netip.Addr{target4}, Ports: spec})
		w.vantage.must(err)
	})
	return r
}

// Where something on the way drops a kind, its silence is not sold as proof.
func TestOddProbesSayWhatTheWayDrops(t *testing.T) {
	w := newWorld(t)
	w.gate("")
	w.target.nft("table ip way { chain p { type filter hook prerouting priority -500; ip frag-off & 0x3fff != 0 drop; ip hdrlength > 5 drop; }; }\n" +
		"table ip6 way { chain p { type filter hook prerouting priority -500; exthdr frag exists drop; }; }")
	r := w.look("1-3000/tcp", 1)
	note := ""
	for _, n := range r.Notes {
		if strings.HasPrefix(n, "silent also where") {
			note = n
		}
	}
	for _, kind := range []string{"fragmented syn", "syn with record route", "atomic fragment"} {
		if !strings.Contains(note, kind) {
			t.Errorf("the note does not name %q: %q", kind, note)
		}
	}
	if strings.Contains(note, "ack from") || strings.Contains(note, "syn from") || strings.Contains(note, "hop-by-hop") || r.Verdict != Pass {
		t.Errorf("verdict %s, note %q", r.Verdict, note)
	}
}

// What the policy opens of other protocols must get in, and the tripwire sees it.
func TestOddProbesProveListedProtocols(t *testing.T) {
	rs := compileText(t, oddHost+"[open.tunnel]\nprotocol = [\"esp\", \"gre\", \"vrrp\"]\n[open.signal]\nports = [2905, 3868]\nprotocol = \"sctp\"\n[open.office]\nprotocol = \"ah\"\nfrom = \"10.0.0.0/8\"\n")
	good := compiled(t, rs)
	r, _ := oddRun(t, RehearseConfig{Rules: rs, Load: loadText(t, good)})
	if r.Verdict != Pass || !slices.Contains(r.Notes, "not judged, whether what is listed gets in: ah") {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
	const shut = "insert rule inet deadlight gate meta l4proto gre drop\ninsert rule inet deadlight gate sctp dport 3868 drop\n"
	r, _ = oddRun(t, RehearseConfig{Rules: rs, Load: loadText(t, good+shut)})
	got := []string{}
	for _, f := range r.Findings {
		got = append(got, fmt.Sprintf("%d/%s %s %s expected %s by %s", f.Port, f.Protocol, f.Family, f.Observed, f.Expected, f.Rule))
	}
	slices.Sort(got)
	got = slices.Compact(got)
	want := []string{
		"0/gre ipv4 filtered expected open by tunnel", "0/gre ipv6 filtered expected open by tunnel",
		"3868/sctp ipv4 filtered expected open by signal", "3868/sctp ipv6 filtered expected open by signal",
	}
	if r.Verdict != Fail || !slices.Equal(got, want) {
		t.Errorf("verdict %s, %q, want %q", r.Verdict, got, want)
	}
}

// On a path that died behind the sweep the silence of odd probes is unknown.
func TestOddProbesOnADeadPath(t *testing.T) {
	for name, last := range map[string]bool{"dead from the start": false, "dead at the end": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.gate("")
			rs := compileText(t, "[open.web]\nports = 80\n")
			v := View{Sweep: true, Path: w.path(false, portRange(1, 2000), nil, Canary{CanaryTCP, 80})}
			o := planOdd(oddConfig{rules: rs, views: []View{v}, swept: Ports{TCP: v.Path.TCP}, level: 1, budget: 500})
			w.vantage.do(func() { w.vantage.must(o.open()) })
			defer o.close()
			kill := func() {
				w.target.nft("table ip dead { chain p { type filter hook prerouting priority -500; policy drop; }; }")
			}
			if !last {
				kill()
			}
			if err := o.run(context.Background(), 0); err != nil {
				t.Fatal(err)
			}
			if last {
				kill()
			}
			if err := o.run(context.Background(), 0); err != nil {
				t.Fatal(err)
			}
			silent := make([]Answer, 2000)
			for i := range silent {
				silent[i] = Answer{Filtered, NoResponse}
			}
			silent[79] = Answer{Open, SynAck}
			r := Judge(JudgeConfig{Rules: rs, Views: []View{v}, odd: o}, &Result{Paths: []PathResult{{TCP: silent, Alive: true}}, Bound: 1e-9})
			if r.Verdict != Inconclusive || len(r.Findings) != 1 || r.Findings[0].Observed != Unknown || r.Findings[0].Address != "10.9.0.2" {
				t.Errorf("verdict %s, %+v", r.Verdict, r.Findings)
			}
		})
	}
}

// Strangers send what they like: no packet makes the parser fall.
func FuzzParseOddReply(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		x := &oddProbe{src: testSrc4, dst: netip.MustParseAddr("203.0.113.9"), link: Link{Src: make([]byte, 6), Dst: make([]byte, 6)}, sport: 1, dport: 2}
		for _, k := range oddKinds() {
			if x.kind, x.proto = &k, k.proto; !k.only.Has(!v6) {
				continue
			}
			if v6 {
				x.src, x.dst = testSrc6, netip.MustParseAddr("2001:db8::9")
			}
			for _, frame := range k.frames(x) {
				f.Add(frame[etherLen:])
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, ok := parseOddReply(b); ok && (!r.key.ours.IsValid() || !r.from.IsValid()) {
			t.Errorf("an answer without addresses: %+v", r)
		}
	})
}
