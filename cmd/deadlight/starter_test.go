package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"deadlight/firewall"
	"deadlight/rules"
)

// fakeRule is a line of another program's firewall: what is zero matches all.
type fakeRule struct {
	protocol rules.Protocol
	port     uint16
	in       string
	dst      netip.Addr
	verdict  firewall.Verdict
}

func (r fakeRule) matches(p rules.Packet) bool {
	return (r.protocol == 0 || r.protocol == p.Protocol) && (r.port == 0 || r.port == p.DstPort) &&
		(r.in == "" || r.in == p.In) && (!r.dst.IsValid() || r.dst == p.Dst)
}

// fakeFirewall has rules, of which the first that matches decides, and DNAT.
type fakeFirewall struct {
	rules    []fakeRule
	nat      []fakeRule
	drop     bool
	disabled bool
}

func (f *fakeFirewall) ask(packets []rules.Packet) ([]*firewall.Journey, error) {
	var out []*firewall.Journey
	for _, p := range packets {
		j := &firewall.Journey{Verdict: firewall.WalkAccept, By: firewall.Step{Family: "inet", Table: "fake", Chain: "in", Verdict: "accept"}}
		if f.drop {
			j.Verdict, j.By.Verdict = firewall.WalkDrop, "policy drop"
		}
		if i := slices.IndexFunc(f.rules, func(r fakeRule) bool { return r.matches(p) }); i >= 0 {
			j.Verdict, j.By.Verdict = f.rules[i].verdict, string(f.rules[i].verdict)
		}
		if slices.ContainsFunc(f.nat, func(r fakeRule) bool { return r.matches(p) }) {
			j.Moved, j.Target = true, netip.MustParseAddrPort("172.17.0.2:80")
			j.Steps = append(j.Steps, firewall.Step{Family: "ip", Table: "nat", Chain: "pre", Verdict: "rewrite"})
		}
		out = append(out, j)
	}
	return out, nil
}

// runs is what [firewall.Conn.PublishedRuns] would give.
func (f *fakeFirewall) runs() []uint16 {
	if len(f.nat) == 0 {
		return nil
	}
	out := []uint16{1}
	for _, r := range slices.Concat(f.rules, f.nat) {
		if r.port != 0 {
			out = append(out, r.port, max(r.port+1, 1))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Names that somebody may have thought of to break out of a comment or a key.
var nastyNames = [...]string{
	"nginx", "sshd", "dnsmasq", "docker-proxy", "aardvark-dns", "systemd", "", "a\nports = 1", "x\r[open.evil]", "\x1b[2Jx", "\"quoted\"",
	"\xff\xfe", "naïve", "日本", "open", "a.b", "---", "#", "\u202eevil", "\x00", "]]", "override", "1", "_x", "\u2028line",
}

func fakeHost(t *rapid.T) (*starter, *fakeFirewall) {
	addr := netip.MustParseAddr
	pools := map[string][]netip.Addr{
		"eth0":    {addr("192.0.2.1"), addr("192.0.2.2"), addr("2001:db8::1"), addr("fe80::1")},
		"wg0":     {addr("10.7.0.1"), addr("fd00::1")},
		"virbr0":  {addr("192.168.122.1")},
		"docker0": {addr("172.17.0.1"), addr("fe80::42")},
		"br-0123": {addr("172.18.0.1"), addr("fd00:18::1")},
		"we\"ird": {addr("10.9.0.1")},
	}
	names := []string{"eth0", "wg0", "virbr0", "docker0", "br-0123", "we\"ird"}
	s := &starter{units: map[int]string{}, now: time.Date(2026, 11, 21, 0, 0, 0, 0, time.UTC), ephemeral: [2]uint16{32768, 60999}}
	var all []netip.Addr
	for _, name := range names {
		if !rapid.Bool().Draw(t, name) {
			continue
		}
		n := nic{name: name}
		for _, a := range pools[name] {
			if rapid.IntRange(0, 3).Draw(t, a.String()) > 0 {
				n.addrs = append(n.addrs, a)
			}
		}
		if len(n.addrs) > 0 {
			s.nics = append(s.nics, n)
			all = append(all, n.addrs...)
		}
	}
	binds := append([]netip.Addr{
		netip.IPv4Unspecified(), netip.IPv6Unspecified(), netip.IPv4Unspecified(), netip.IPv6Unspecified(), addr("127.0.0.1"), addr("127.0.0.53"),
		addr("::1"), addr("224.0.0.251"), addr("ff02::fb"), addr("10.99.0.1"), addr("255.255.255.255"),
	}, all...)
	ports := []uint16{1, 22, 53, 67, 68, 80, 81, 443, 546, 3389, 5432, 8080, 11211, 32768, 40000, 60001, 65535}
	protocols := []rules.Protocol{rules.TCP, rules.UDP}
	for i := range rapid.IntRange(0, 14).Draw(t, "sockets") {
		l := listener{
			Protocol: rapid.SampledFrom(protocols).Draw(t, "protocol"), Addr: rapid.SampledFrom(binds).Draw(t, "bind"), Port: rapid.SampledFrom(ports).Draw(t, "port"),
			Comm: rapid.SampledFrom(nastyNames[:]).Draw(t, "comm"), PID: i % 9, Inode: uint32(100 + i), V6Only: rapid.Bool().Draw(t, "v6only"),
		}
		if rapid.IntRange(0, 5).Draw(t, "kernel") == 0 {
			l.PID, l.Comm, l.Inode = 0, "", 0
		}
		if rapid.IntRange(0, 4).Draw(t, "device") == 0 && len(s.nics) > 0 {
			l.Device = rapid.SampledFrom(s.nics).Draw(t, "on").name
		}
		s.units[l.PID] = rapid.SampledFrom(nastyNames[:]).Draw(t, "unit")
		s.sockets = append(s.sockets, l)
	}
	fw := &fakeFirewall{drop: rapid.Bool().Draw(t, "drop"), disabled: rapid.IntRange(0, 3).Draw(t, "none") == 0}
	if fw.disabled {
		fw.drop = false
	} else {
		rule := rapid.Custom(func(t *rapid.T) fakeRule {
			r := fakeRule{verdict: rapid.SampledFrom([]firewall.Verdict{firewall.WalkAccept, firewall.WalkDrop, firewall.WalkReject, firewall.WalkUnknown}).Draw(t, "verdict")}
			if rapid.Bool().Draw(t, "by port") {
				r.protocol, r.port = rapid.SampledFrom(protocols).Draw(t, "protocol"), rapid.SampledFrom(ports).Draw(t, "port")
			}
			if rapid.Bool().Draw(t, "by interface") {
				r.in = rapid.SampledFrom(names).Draw(t, "in")
			}
			if rapid.IntRange(0, 3).Draw(t, "by address") == 0 && len(all) > 0 {
				r.dst = rapid.SampledFrom(all).Draw(t, "dst")
			}
			return r
		})
		fw.rules = rapid.SliceOfN(rule, 0, 6).Draw(t, "rules")
		fw.nat = rapid.SliceOfN(rule, 0, 3).Draw(t, "nat")
	}
	s.asked.ask, s.runs = fw.ask, fw.runs()
	for range rapid.IntRange(0, 2).Draw(t, "sessions") {
		if len(s.nics) == 0 {
			break
		}
		n := rapid.SampledFrom(s.nics).Draw(t, "session by")
		local := rapid.SampledFrom(n.addrs).Draw(t, "session to")
		remote := addr("198.51.100.9")
		if local.Is6() {
			remote = addr("2001:db8:9::9")
		}
		o := session{Protocol: rapid.SampledFrom(protocols).Draw(t, "session"), Interface: n.name, Remote: netip.AddrPortFrom(remote, 50000)}
		o.Local = netip.AddrPortFrom(local, rapid.SampledFrom(ports).Draw(t, "session port"))
		o.Wire = o.Local
		s.sessions = append(s.sessions, o)
	}
	return s, fw
}

// Of every host: what init writes is clean, opens nothing that is closed now, keeps
// the operator in, and nothing of the host's names gets out of its comment.
func TestStarterProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s, fw := fakeHost(t)
		twin := *s
		text, err := s.policy()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := twin.policy(); err != nil || again != text {
			t.Fatalf("%v: another text of the same host:\n%s\n%s", err, text, again)
		}
		p, problems := rules.Parse("policy.toml", []byte(text), nil)
		if p == nil || len(problems) > 0 {
			t.Fatalf("%v\n%s", problems, text)
		}
		rs := rules.Compile(p)
		for _, line := range strings.Split(text, "\n") {
			if i := strings.IndexFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
				t.Fatalf("a control character in %q", line)
			}
			if line != "" && line[0] != '#' && line[0] != '[' && !strings.Contains(line, " = ") {
				t.Fatalf("a line that nobody meant: %q", line)
			}
		}
		for i := range p.Open {
			if name := p.Open[i].Name; strings.Contains(name, "evil") && !slices.ContainsFunc(s.sockets, func(l listener) bool { return strings.Contains(l.Comm, "evil") }) {
				t.Fatalf("[open.%s] came out of a comment", name)
			}
		}
		admitted := func(p rules.Packet) bool { d := rs.Decide(p); return d.Kind == "open" }
		own := func(p rules.Packet) bool {
			return slices.ContainsFunc(s.sessions, func(o session) bool { return o.Remote.Addr() == p.Src })
		}
		ports := []uint16{1, 2, 22, 53, 67, 68, 80, 81, 443, 546, 3389, 5432, 8080, 11211, 32768, 40000, 60001, 65535}
		var ways []entry
		for _, v4 := range []bool{true, false} {
			first := nowhere(!v4) // of an interface that is yet to come
			for _, n := range s.nics {
				if a, ok := n.own(v4); ok && first == nowhere(!v4) && !a.IsLinkLocalUnicast() {
					first = a
				}
			}
			ways = append(ways, entry{"", first}, entry{"new0", first})
		}
		unnamed := slices.Clone(ways)
		for _, n := range s.nics {
			for _, a := range n.addrs {
				ways = append(ways, entry{n.name, a})
			}
		}
		// What stands for every address of an interface is asked about by its own ones.
		alone := func(l listener, port uint16, e entry) bool {
			return l.Port == port && l.Addr == e.dst && len(fw.nat) == 0 && !slices.ContainsFunc(s.sockets, func(o listener) bool {
				return o.Port == port && o.Protocol == l.Protocol && o.Addr.IsUnspecified()
			})
		}
		for _, l := range s.sockets {
			for _, n := range s.nics {
				if _, ok := n.own(l.Addr.Is4()); ok && !l.Addr.IsUnspecified() {
					ways = append(ways, entry{"", l.Addr}, entry{n.name, l.Addr})
				}
			}
		}
		for _, e := range ways {
			for _, protocol := range []rules.Protocol{rules.TCP, rules.UDP} {
				for _, port := range ports {
					packet := e.packet(protocol, port, e.from(), s.now)
					theirs := slices.ContainsFunc(s.nics, func(n nic) bool { return n.name == e.in && slices.Contains(n.addrs, e.dst) })
					if own(packet) || !admitted(packet) || !theirs && !slices.Contains(unnamed, e) &&
						!slices.ContainsFunc(s.sockets, func(l listener) bool { return l.Protocol == protocol && alone(l, port, e) }) {
						continue
					}
					j, err := fw.ask([]rules.Packet{packet})
					if err != nil {
						t.Fatal(err)
					}
					takes := j[0].Moved || slices.ContainsFunc(s.sockets, func(l listener) bool {
						return l.Protocol == protocol && l.Port == port && !l.loopback() && (l.Device == "" || l.Device == e.in) &&
							(l.Addr == e.dst || l.Addr.IsUnspecified() && l.takes(e.dst.Is4()))
					})
					if j[0].Verdict != firewall.WalkAccept || !takes {
						t.Fatalf("opens %s by %q to %s, which is closed now (%s)\n%s", rules.PortName(protocol, port), e.in, e.dst, j[0].Verdict, text)
					}
				}
			}
		}
		for _, o := range s.sessions {
			for _, c := range cutOffs(rs, []session{o}, s.now) {
				t.Fatalf("%s\n%s", c.fact(rs), text)
			}
		}
		if !fw.disabled {
			return
		}
		// Without a firewall every socket that is worth it is opened.
		for _, l := range s.sockets {
			if l.Port == 68 || l.Port == 546 || l.Protocol == rules.UDP && l.Port >= s.ephemeral[0] && l.Port <= s.ephemeral[1] {
				continue
			}
			for _, v4 := range []bool{true, false} {
				for _, e := range l.entries(s.nics, v4) {
					guest := slices.ContainsFunc(s.nics, func(n nic) bool { return isGuestBridge(n.name) && slices.Contains(n.addrs, l.Addr) && n.name != e.in })
					if packet := e.packet(l.Protocol, l.Port, e.from(), s.now); plainName.MatchString(e.in) && !guest && !admitted(packet) {
						t.Fatalf("does not open %s by %q to %s\n%s", rules.PortName(l.Protocol, l.Port), e.in, e.dst, text)
					}
				}
			}
		}
	})
}

func TestBareName(t *testing.T) {
	for in, want := range map[string]string{
		"nginx": "nginx", "aardvark-dns": "aardvark-dns", "": "service", "---": "service", "a.b": "a-b", "(sd-pam)": "sd-pam",
		"a\nb": "a-b", "日本": "service", strings.Repeat("x", 99): strings.Repeat("x", 24), "_x": "x",
	} {
		if got := bareName(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestPortsTOML(t *testing.T) {
	one := func(p ...uint16) (out []rules.PortRange) {
		for _, n := range p {
			out = append(out, rules.PortRange{Lo: n, Hi: n})
		}
		return out
	}
	for want, in := range map[string][]rules.PortRange{
		"":                nil,
		"[80]":            one(80),
		"[80, 81, 443]":   one(443, 80, 81),
		`["1-22"]`:        append(one(22), rules.PortRange{Lo: 1, Hi: 21}),
		`["6000-6020"]`:   {{Lo: 6011, Hi: 6020}, {Lo: 6000, Hi: 6010}},
		`["65534-65535"]`: {{Lo: 65534, Hi: 65535}},
	} {
		if got := portsTOML(in); got != want {
			t.Errorf("%v: %s, want %s", in, got, fmt.Sprintf("%q", want))
		}
	}
}
