package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// inPolicy writes a temporary rule as a table of a policy, which says the same.
func inPolicy(t *Temporary) string {
	var b strings.Builder
	kind := "open"
	if t.Block {
		kind = "block"
	}
	fmt.Fprintf(&b, "[%s.%q]\n", kind, t.Name)
	if !t.Block {
		fmt.Fprintf(&b, "ports = %d\nprotocol = %q\n", t.Port, t.Protocol)
	}
	if len(t.From) > 0 {
		var from []string
		for _, a := range t.From {
			from = append(from, fmt.Sprintf("%q", a))
		}
		fmt.Fprintf(&b, "from = [%s]\n", strings.Join(from, ", "))
	}
	if t.Interface != "" {
		fmt.Fprintf(&b, "interfaces = %q\n", t.Interface)
	}
	if !t.Expires.IsZero() {
		fmt.Fprintf(&b, "expires = %s\n", t.Expires.Format(time.RFC3339Nano))
	}
	return b.String()
}

// A policy with temporary rules is the policy that has them as tables at its end:
// the same table of the kernel, and the same decision on every packet. What holds
// for the tables of a policy, which are tried in the kernel, holds for them.
func TestTemporaryIsLikeATable(t *testing.T) {
	const policy = `version = 1
[default]
input = "reject"
[open.web]
ports = [80, 8443]
from = ["192.0.2.0/24", "@friends"]
rate = { limit = "10/minute" }
[open.tmp-22-tcp]
ports = [22, "8440-8445"]
interfaces = "wg0"
[block.bad]
from = "198.51.100.0/25"
[set.friends]
addresses = ["198.51.100.7", "2001:db8::/48"]
`
	base, problems := Parse("policy.toml", []byte(policy), nil)
	if base == nil {
		t.Fatal(problems)
	}
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	addrs := []string{"192.0.2.1", "192.0.2.200", "198.51.100.7", "198.51.100.200", "203.0.113.9", "2001:db8::1", "2001:db8:1::1"}
	ranges := []string{"192.0.2.1", "192.0.2.0/24", "198.51.100.5-198.51.100.9", "0.0.0.0/0", "2001:db8::/32", "203.0.113.9"}
	ports := []uint16{22, 80, 8443, 9000}
	protocols := []Protocol{TCP, UDP, SCTP}
	names := []string{"", "wg0", "eth0", "eth*"}
	ends := []time.Time{{}, now.Add(-time.Hour), now.Add(time.Hour)}
	rapid.Check(t, func(t *rapid.T) {
		var list []Temporary
		for range rapid.IntRange(1, 6).Draw(t, "rules") {
			x := Temporary{Block: rapid.Bool().Draw(t, "block"), Expires: rapid.SampledFrom(ends).Draw(t, "end")}
			least := 0
			if x.Block {
				least = 1
			} else {
				x.Port, x.Protocol = rapid.SampledFrom(ports).Draw(t, "port"), rapid.SampledFrom(protocols).Draw(t, "protocol")
				x.Interface = rapid.SampledFrom(names).Draw(t, "interface")
			}
			for _, s := range rapid.SliceOfN(rapid.SampledFrom(ranges), least, 3).Draw(t, "from") {
				a, err := ParseAddresses(s)
				if err != nil {
					t.Fatal(err)
				}
				x.From = append(x.From, a)
			}
			x.From = MergeAddrs(x.From)
			list = append(list, x)
		}
		// both gives a list beside the policy, and as tables of it.
		both := func(list []Temporary) (beside, written *Ruleset, text string) {
			with, list := base.With(list)
			text = policy
			for i := range list {
				x := list[i]
				if x.IsBan() { // their name is one
					x.Name = fmt.Sprintf("%s-%d", x.Name, i+2)
				}
				text += inPolicy(&x)
			}
			p, problems := Parse("policy.toml", []byte(text), nil)
			if p == nil {
				t.Fatalf("%v\n%s", problems, text)
			}
			return Compile(with), Compile(p), text
		}
		// Blocks of one address are elements of one set; all others are as if written.
		got, want, text := both(slices.DeleteFunc(slices.Clone(list), func(x Temporary) bool { return x.IsBan() }))
		if d := cmp.Diff(want.Table, got.Table, cmp.AllowUnexported(Set{}, AddrRanges{}), cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}), cmpopts.EquateEmpty()); d != "" {
			t.Fatalf("another table (-written +temporary):\n%s\n%s", d, text)
		}
		got, want, text = both(list)
		p := Packet{
			In: rapid.SampledFrom(names[1:3]).Draw(t, "in"), Src: netip.MustParseAddr(rapid.SampledFrom(addrs).Draw(t, "src")),
			Protocol: rapid.SampledFrom(protocols).Draw(t, "of"), DstPort: rapid.SampledFrom(ports).Draw(t, "to"), SrcPort: 40000, At: now,
		}
		p.Dst = netip.MustParseAddr("203.0.113.10")
		if p.Src.Is6() {
			p.Dst = netip.MustParseAddr("2001:db8:77::10")
		}
		g, w := got.Decide(p), want.Decide(p)
		// Bans are looked up ahead of the other temporary blocks.
		sameRule := g.Rule == w.Rule || g.Kind == "block" && g.Rule == bans
		if g.Outcome != w.Outcome || g.Kind != w.Kind || !sameRule || g.Limited != w.Limited {
			t.Fatalf("%+v: %+v, and as tables %+v\n%s", p, g, w, text)
		}
	})
}

// Names are those of the language, differ from all others, and stay.
func TestTemporaryNames(t *testing.T) {
	p, problems := Parse("policy.toml", []byte("version = 1\n[open.tmp-80-tcp]\nports = 80\n[block.tmp-80-tcp-2]\nfrom = \"192.0.2.1\"\n"), nil)
	if p == nil {
		t.Fatal(problems)
	}
	from := func(s string) []AddrRange {
		a, err := ParseAddresses(s)
		if err != nil {
			t.Fatal(err)
		}
		return []AddrRange{a}
	}
	list := []Temporary{
		{Protocol: TCP, Port: 80}, {Protocol: TCP, Port: 80, Interface: "wg0"}, {Name: "kept", Protocol: UDP, Port: 53}, {Name: "tmp-80-tcp", Protocol: TCP, Port: 80},
		{Block: true, From: from("203.0.113.9")}, {Block: true, From: from("2001:db8:ffff:ffff:ffff:ffff:ffff:fff0-2001:db8:ffff:ffff:ffff:ffff:ffff:fff9")},
		{Block: true, From: from("2001:db8::/32")},
	}
	with, named := p.With(list)
	var got []string
	for _, x := range named {
		got = append(got, x.Name)
		if !isTableName(x.Name) {
			t.Errorf("%q is no name", x.Name)
		}
	}
	want := []string{"tmp-80-tcp-3", "tmp-80-tcp-4", "kept", "tmp-80-tcp-5", "tmp-hosts", "tmp-2001-db8-ffff-ffff-ffff-ffff-ffff-ff", "tmp-2001-db8---32"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if len(p.Open) != 1 || len(p.Block) != 1 || list[0].Name != "" {
		t.Error("what was given has changed")
	}
	if len(with.Open) != 5 || len(with.Block) != 4 {
		t.Errorf("%d openings and %d blocks", len(with.Open), len(with.Block))
	}
	if _, again := p.With(named); !cmp.Equal(again, named, cmpopts.EquateComparable(netip.Addr{})) {
		t.Errorf("with names they get others: %v", again)
	}
}

// What is not an address, an interface or a comment is told.
func TestTemporaryMistakes(t *testing.T) {
	for _, s := range []string{"", "any", "@set", "host.example", "10.0.0.1/8", "10.0.0.9-10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0", "10.0.0.0/33"} {
		if _, err := ParseAddresses(s); err == nil {
			t.Errorf("%q passes for addresses", s)
		} else if m, ok := err.(*Mistake); !ok || m.Summary == "" {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, x := range []Temporary{
		{Interface: "*"}, {Interface: "a,b"}, {Interface: strings.Repeat("x", 16)}, {Comment: "a\nb"}, {Comment: "a\u202eb"}, {Comment: "\xff"}, {Comment: strings.Repeat("x", 129)},
	} {
		if x.Check() == nil {
			t.Errorf("%+v passes", x)
		}
	}
	if x := (&Temporary{Interface: "wg*", Comment: "ticket 4711"}); x.Check() != nil {
		t.Error(x.Check())
	}
}
