package rules

import (
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A rule is found covered exactly if trying all rules in turn finds one.
func TestCoveringProperty(t *testing.T) {
	protocols := rapid.SampledFrom([][]Protocol{{TCP}, {UDP}, {TCP, UDP}})
	owners := rapid.SampledFrom([]string{"", "", "a", "b"})
	ends := rapid.SampledFrom([]time.Time{{}, {}, time.Unix(1, 0), time.Unix(2, 0)})
	interfaces := rapid.SampledFrom([][]string{nil, nil, {"eth0"}, {"eth*"}, {"eth0", "wg0"}, {"e*"}})
	draw := rapid.Custom(func(t *rapid.T) scope {
		s := scope{
			interfaces: interfaces.Draw(t, "interfaces"), owner: owners.Draw(t, "owner"), until: ends.Draw(t, "until"),
			limited: rapid.IntRange(0, 4).Draw(t, "limited") == 0,
		}
		lo := rapid.Uint16Range(1, 6).Draw(t, "lo")
		for _, p := range protocols.Draw(t, "protocols") {
			s.traffic = append(s.traffic, keys(p, PortRange{lo, lo + rapid.Uint16Range(0, 3).Draw(t, "ports")}))
			if rapid.Bool().Draw(t, "more") {
				s.traffic = append(s.traffic, keys(p, PortRange{20, 21}))
			}
		}
		if rapid.IntRange(0, 5).Draw(t, "everything") == 0 {
			s.traffic = trafficKeys(&Traffic{Any: true})
		}
		if rapid.Bool().Draw(t, "any") {
			all := everywhere()
			s.sources = []AddrRanges{RangesOf(all[0]), RangesOf(all[1])}
			return s
		}
		for range rapid.IntRange(1, 2).Draw(t, "parts") {
			from := rapid.ByteRange(1, 6).Draw(t, "from")
			to := from + rapid.ByteRange(0, 4).Draw(t, "size")
			r := AddrRange{netip.AddrFrom4([4]byte{10, 0, 0, from}), netip.AddrFrom4([4]byte{10, 0, 0, to})}
			if rapid.Bool().Draw(t, "v6") {
				r = AddrRange{netip.AddrFrom16([16]byte{15: from}), netip.AddrFrom16([16]byte{15: to})}
			}
			s.sources = append(s.sources, RangesOf(r))
		}
		return s
	})
	rapid.Check(t, func(t *rapid.T) {
		scopes := rapid.SliceOfN(draw, 1, 12).Draw(t, "scopes")
		left := effort
		for i, got := range covering(scopes) {
			covers := func(j int) bool {
				return i != j && scopes[j].covers(&scopes[i], &left) && (j < i || !scopes[i].covers(&scopes[j], &left))
			}
			any := -1
			for j := range scopes {
				if covers(j) {
					any = j
				}
			}
			if got < 0 && any >= 0 || got >= 0 && !covers(got) {
				t.Fatalf("scope %d is covered by %d, want one like %d", i, got, any)
			}
		}
	})
}

func TestCovers(t *testing.T) {
	network := func(s string) []AddrRanges {
		r, bad := parseAddresses(s)
		if bad != nil {
			t.Fatal(bad.summary)
		}
		return []AddrRanges{RangesOf(r)}
	}
	tcp := func(ports ...uint16) []keyRange {
		var out []keyRange
		for i := 0; i < len(ports); i += 2 {
			out = append(out, keys(TCP, PortRange{ports[i], ports[i+1]}))
		}
		return out
	}
	base := scope{traffic: tcp(80, 90), interfaces: []string{"eth*"}, sources: network("10.0.0.0/8")}
	for _, test := range []struct {
		name   string
		change func(*scope)
		want   bool
	}{
		{"itself", func(*scope) {}, true},
		{"fewer ports", func(s *scope) { s.traffic = tcp(80, 80, 82, 90) }, true},
		{"more ports", func(s *scope) { s.traffic = tcp(79, 90) }, false},
		{"a gap below", func(s *scope) { s.traffic = tcp(1, 2) }, false},
		{"another port", func(s *scope) { s.traffic = tcp(80, 80, 443, 443) }, false},
		{"another protocol", func(s *scope) { s.traffic = append(tcp(80, 90), keys(UDP, PortRange{80, 90})) }, false},
		{"one interface", func(s *scope) { s.interfaces = []string{"eth1", "eth1*"} }, true},
		{"wider interfaces", func(s *scope) { s.interfaces = []string{"et*"} }, false},
		{"every interface", func(s *scope) { s.interfaces = nil }, false},
		{"narrower source", func(s *scope) { s.sources = network("10.2.0.0/16") }, true},
		{"wider source", func(s *scope) { s.sources = network("10.0.0.0/7") }, false},
		{"every protocol", func(s *scope) { s.traffic = trafficKeys(&Traffic{Any: true}) }, false},
		{"an end", func(s *scope) { s.until = time.Unix(1, 0) }, true},
		{"a limit", func(s *scope) { s.limited = true }, true},
		{"an owner", func(s *scope) { s.owner = "a" }, true},
		{"one address of the host", func(s *scope) { s.to = network("192.0.2.1") }, true},
		{"fewer sources", func(s *scope) { s.except = network("10.1.0.0/16") }, true},
		{"other family", func(s *scope) { s.sources = network("::/0") }, false},
	} {
		a := base
		test.change(&a)
		left := effort
		if got := base.covers(&a, &left); got != test.want {
			t.Errorf("%s: got %v", test.name, got)
		}
	}
	for _, test := range []struct {
		name   string
		change func(s, a *scope)
		want   bool
	}{
		{"an end", func(s, _ *scope) { s.until = time.Unix(1, 0) }, false},
		{"a later end", func(s, a *scope) { s.until, a.until = time.Unix(2, 0), time.Unix(1, 0) }, true},
		{"an earlier end", func(s, a *scope) { s.until, a.until = time.Unix(1, 0), time.Unix(2, 0) }, false},
		{"a limit", func(s, _ *scope) { s.limited = true }, false},
		{"an owner", func(s, _ *scope) { s.owner = "a" }, false},
		{"the same owner", func(s, a *scope) { s.owner, a.owner = "a", "a" }, true},
		{"one address of the host", func(s, _ *scope) { s.to = network("192.0.2.1") }, false},
		{"a network of the host", func(s, a *scope) { s.to, a.to = network("192.0.2.0/24"), network("192.0.2.1") }, true},
		{"fewer sources", func(s, _ *scope) { s.except = network("10.1.0.0/16") }, false},
		{"the same fewer sources", func(s, a *scope) { s.except, a.except = network("10.1.0.0/16"), network("10.1.0.0/16") }, true},
		{"still fewer sources", func(s, a *scope) { s.except, a.except = network("10.1.0.0/16"), network("10.0.0.0/15") }, true},
		{"an exception elsewhere", func(s, _ *scope) { s.except = network("192.0.2.0/24") }, true},
	} {
		s, a := base, base
		test.change(&s, &a)
		left := effort
		if got := s.covers(&a, &left); got != test.want {
			t.Errorf("of the wider one, %s: got %v", test.name, got)
		}
	}
	left := 0
	if base.covers(&base, &left) {
		t.Error("covers works on after its effort is spent")
	}
}
