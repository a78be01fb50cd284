package rules

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

// A rule is found covered exactly if trying all rules in turn finds one.
func TestCoveringProperty(t *testing.T) {
	protocols := rapid.SampledFrom([][]Protocol{{TCP}, {UDP}, {TCP, UDP}})
	interfaces := rapid.SampledFrom([][]string{nil, nil, {"eth0"}, {"eth*"}, {"eth0", "wg0"}, {"e*"}})
	draw := rapid.Custom(func(t *rapid.T) scope {
		s := scope{protocols: protocols.Draw(t, "protocols"), interfaces: interfaces.Draw(t, "interfaces")}
		lo := rapid.Uint16Range(1, 6).Draw(t, "lo")
		s.ports = []PortRange{{lo, lo + rapid.Uint16Range(0, 3).Draw(t, "ports")}}
		if rapid.Bool().Draw(t, "more") {
			s.ports = append(s.ports, PortRange{20, 21})
		}
		if rapid.Bool().Draw(t, "any") {
			all := everywhere()
			s.sources = [][]AddrRange{all[:1], all[1:]}
			return s
		}
		for range rapid.IntRange(1, 2).Draw(t, "parts") {
			from := rapid.ByteRange(1, 6).Draw(t, "from")
			to := from + rapid.ByteRange(0, 4).Draw(t, "size")
			r := AddrRange{netip.AddrFrom4([4]byte{10, 0, 0, from}), netip.AddrFrom4([4]byte{10, 0, 0, to})}
			if rapid.Bool().Draw(t, "v6") {
				r = AddrRange{netip.AddrFrom16([16]byte{15: from}), netip.AddrFrom16([16]byte{15: to})}
			}
			s.sources = append(s.sources, []AddrRange{r})
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
	network := func(s string) [][]AddrRange {
		r, bad := parseAddresses(s)
		if bad != nil {
			t.Fatal(bad.summary)
		}
		return [][]AddrRange{{r}}
	}
	base := scope{protocols: []Protocol{TCP}, ports: []PortRange{{80, 90}}, interfaces: []string{"eth*"}, sources: network("10.0.0.0/8")}
	for _, test := range []struct {
		name   string
		change func(*scope)
		want   bool
	}{
		{"itself", func(*scope) {}, true},
		{"fewer ports", func(s *scope) { s.ports = []PortRange{{80, 80}, {82, 90}} }, true},
		{"more ports", func(s *scope) { s.ports = []PortRange{{79, 90}} }, false},
		{"a gap below", func(s *scope) { s.ports = []PortRange{{1, 2}} }, false},
		{"another port", func(s *scope) { s.ports = []PortRange{{80, 80}, {443, 443}} }, false},
		{"another protocol", func(s *scope) { s.protocols = []Protocol{TCP, UDP} }, false},
		{"one interface", func(s *scope) { s.interfaces = []string{"eth1", "eth1*"} }, true},
		{"wider interfaces", func(s *scope) { s.interfaces = []string{"et*"} }, false},
		{"every interface", func(s *scope) { s.interfaces = nil }, false},
		{"narrower source", func(s *scope) { s.sources = network("10.2.0.0/16") }, true},
		{"wider source", func(s *scope) { s.sources = network("10.0.0.0/7") }, false},
		{"other family", func(s *scope) { s.sources = network("::/0") }, false},
	} {
		a := base
		test.change(&a)
		left := effort
		if got := base.covers(&a, &left); got != test.want {
			t.Errorf("%s: got %v", test.name, got)
		}
	}
	left := 0
	if base.covers(&base, &left) {
		t.Error("covers works on after its effort is spent")
	}
}
