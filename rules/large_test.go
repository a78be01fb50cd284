package rules

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// mixedSet writes a [set.*] of n single addresses and n networks of each family,
// none of which touch.
func mixedSet(name string, n int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "[set.%q]\naddresses = [\n", name)
	for i := range uint32(n) {
		fmt.Fprintf(&b, "\"%v\", \"%v/24\",\n", addr4(10<<24|i<<9|1), addr4(11<<24|i<<9))
		fmt.Fprintf(&b, "\"2001:db8:%x::1\", \"2001:db9:%x::/64\",\n", i, i)
	}
	b.WriteString("]\n")
	return b.String()
}

func setsByName(rs *Ruleset) map[string]*Set {
	out := map[string]*Set{}
	for i := range rs.Table.Sets {
		out[rs.Table.Sets[i].Name] = &rs.Table.Sets[i]
	}
	return out
}

func findChain(t *testing.T, rs *Ruleset, name string) *Chain {
	t.Helper()
	for i := range rs.Table.Chains {
		if rs.Table.Chains[i].Name == name {
			return &rs.Table.Chains[i]
		}
	}
	t.Fatalf("no chain %s", name)
	return nil
}

func ruleText(c *Chain) string {
	var b strings.Builder
	for _, r := range c.Rules {
		fmt.Fprintln(&b, r.NFT())
	}
	return b.String()
}

// A long list is two sets of a family, and each lookup asks both.
func TestLongSetsAreSplit(t *testing.T) {
	rs := compileText(t, `
[open.a]
ports = 1
from = "@long"
except = "@short"
to = ["@long", "@short", "192.0.2.1"]
`+mixedSet("long", splitFrom/2)+mixedSet("short", splitFrom/2-1))
	const want = `ct original ip daddr != @open_a_to4 ct original ip daddr != @set_long_4 ct original ip daddr != @set_long_4_hosts ct original ip daddr != @set_short_4 return comment "open a"
ct state untracked ip daddr != @open_a_to4 ip daddr != @set_long_4 ip daddr != @set_long_4_hosts ip daddr != @set_short_4 return comment "open a"
ip saddr @set_short_4 return comment "open a"
ct original ip6 daddr != @set_long_6 ct original ip6 daddr != @set_long_6_hosts ct original ip6 daddr != @set_short_6 return comment "open a"
ct state untracked ip6 daddr != @set_long_6 ip6 daddr != @set_long_6_hosts ip6 daddr != @set_short_6 return comment "open a"
ip6 saddr @set_short_6 return comment "open a"
ip saddr @set_long_4 counter name "open_a" accept comment "open a"
ip saddr @set_long_4_hosts counter name "open_a" accept comment "open a"
ip6 saddr @set_long_6 counter name "open_a" accept comment "open a"
ip6 saddr @set_long_6_hosts counter name "open_a" accept comment "open a"
`
	if got := ruleText(findChain(t, rs, "open_a")); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	sets := setsByName(rs)
	for _, family := range []string{"4", "6"} {
		wide, hosts, short := sets["set_long_"+family], sets["set_long_"+family+"_hosts"], sets["set_short_"+family]
		if !wide.Interval || hosts.Interval || !short.Interval || wide.Size() != 0 || short.Size() != 0 {
			t.Errorf("IPv%s: ranges %v %d, hosts %v, short %v %d", family, wide.Interval, wide.Size(), hosts.Interval, short.Interval, short.Size())
		}
		all := mergeAddrs(slices.Concat(slices.Collect(wide.Addrs.All()), slices.Collect(hosts.Addrs.All())))
		if want := rs.Policy.Set("long").Ranges.Of(family == "4"); !RangesOf(all...).Equal(want) || wide.Len() != hosts.Len() {
			t.Errorf("IPv%s: %d ranges and %d hosts of %d", family, wide.Len(), hosts.Len(), want.Len())
		}
	}
	if sets["set_short_4_hosts"] != nil || sets["set_short_4"].Len() != splitFrom-2 {
		t.Error("a short list was split")
	}
}

// A list keeps the sets it has when something else joins it.
func TestLongSetsOfOneKind(t *testing.T) {
	var hosts, networks strings.Builder
	for i := range uint32(splitFrom) {
		fmt.Fprintf(&hosts, "%v\n", addr4(10<<24|i<<1))
		fmt.Fprintf(&networks, "%v/24\n", addr4(10<<24|i<<9))
	}
	for list, want := range map[string]string{
		hosts.String():                                  "set_a_4 set_a_4_hosts",
		hosts.String() + "192.0.2.0/24\n":               "set_a_4 set_a_4_hosts",
		networks.String():                               "set_a_4 set_a_4_net24 set_a_4_hosts",
		networks.String() + "192.0.2.66\n":              "set_a_4 set_a_4_net24 set_a_4_hosts",
		networks.String() + "192.0.4.0/23\n":            "set_a_4 set_a_4_net24 set_a_4_hosts",
		networks.String() + "192.0.2.1-192.0.2.9\n::/0": "set_a_4 set_a_4_net24 set_a_4_hosts set_a_6",
	} {
		p, problems := Parse("p.toml", []byte(listPolicy), oneFile(list))
		if p == nil {
			t.Fatal(problems)
		}
		var got []string
		for _, s := range Compile(p).Table.Sets {
			if strings.HasPrefix(s.Name, "set_") {
				got = append(got, s.Name)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("sets %v, want %s", got, want)
		}
		var text strings.Builder
		if err := Compile(p).Table.WriteNFT(&text, goldenTime); err != nil || strings.Contains(text.String(), "{ }") {
			t.Errorf("nft refuses an empty list of elements (%v)", err)
		}
	}
}

func TestSetSizeHasRoom(t *testing.T) {
	for n, want := range map[int]int{1: 0, 1023: 0, 1024: 2048, 1821: 2048, 1822: 4096, 1 << 20: 1 << 21} {
		s := Set{Type: TypeIPv4, Addrs: AddrRanges{v4: make([]uint64, n)}}
		if got := s.Size(); got != want {
			t.Errorf("%d elements: size %d, want %d", n, got, want)
		}
		s.Interval = true
		if got := s.Size(); got != 0 {
			t.Errorf("%d ranges: size %d, want none", n, got)
		}
	}
}

func TestLarge(t *testing.T) {
	large := AddrRanges{v4: make([]uint64, LargeSet+1)}
	for _, c := range []struct {
		set  Set
		want bool
	}{
		{Set{Type: TypeIPv4, Addrs: large}, true},
		{Set{Type: TypeIPv6, Addrs: large, Interval: true}, true},
		{Set{Type: TypeIPv4, Addrs: AddrRanges{v4: large.v4[1:]}}, false},
		{Set{Type: TypeIPv4, Meter: true}, false},
		{Set{Type: TypeIPv4, Addrs: large, Targets: make([]string, large.Len())}, false},
		{Set{Type: TypePort, Ports: make([]PortRange, LargeSet+1)}, false},
	} {
		if got := c.set.Large(); got != c.want {
			t.Errorf("%v set of %d, meter %v: large is %v", c.set.Type, c.set.Len(), c.set.Meter, got)
		}
	}
}

// Whatever a set holds shows in its digest, and nothing else does.
func TestDigest(t *testing.T) {
	ranges := func(text ...string) AddrRanges {
		var out AddrRanges
		for _, s := range text {
			r, bad := parseAddresses(s)
			if bad != nil {
				t.Fatal(bad)
			}
			out.add(r)
		}
		return out
	}
	sets := []Set{
		{Type: TypeIPv4},
		{Type: TypeIPv6},
		{Type: TypeIPv4, Interval: true},
		{Type: TypeIPv4, Addrs: ranges("192.0.2.1", "192.0.2.3")},
		{Type: TypeIPv4, Addrs: ranges("192.0.2.1", "192.0.2.4")},
		{Type: TypeIPv4, Addrs: ranges("192.0.2.1")},
		{Type: TypeIPv4, Interval: true, Addrs: ranges("192.0.2.1-192.0.2.3")},
		{Type: TypeIPv4, Interval: true, Addrs: ranges("192.0.2.1", "192.0.2.3")},
		{Type: TypeIPv6, Addrs: ranges("2001:db8::1")},
		{Type: TypeIPv6, Interval: true, Addrs: ranges("2001:db8::/64")},
		{Type: TypePort, Ports: []PortRange{{1, 1}}},
		{Type: TypePort, Ports: []PortRange{{1, 1}}, Targets: []string{"a"}},
		{Type: TypePort, Ports: []PortRange{{1, 1}}, Targets: []string{"b"}},
		{Type: TypeIfname, Names: []string{"ab", "c"}},
		{Type: TypeIfname, Names: []string{"a", "bc"}},
		{Type: TypeProtocol, Codes: []uint32{50, 51}},
		{Type: TypeProtocol, Codes: []uint32{51}},
	}
	seen := map[string]int{}
	for i := range sets {
		s := &sets[i]
		d := s.Digest()
		if j, ok := seen[d]; ok || len(d) != 32 {
			t.Errorf("sets %d and %d have the digest %q", j, i, d)
		}
		seen[d] = i
		again := *s
		again.Name, again.Addrs = "other", RangesOf(slices.Collect(s.Addrs.All())...)
		if again.Digest() != d {
			t.Errorf("set %d: the digest is not of its content alone", i)
		}
	}
	// One bit in the middle of more than is hashed at once.
	var l AddrRanges
	newReader(nil).list("l", randomList(50_000, "mixed"), &l)
	s := Set{Type: TypeIPv4, Interval: true, Addrs: RangesOf(l.ranges()...)}
	before := s.Digest()
	s.Addrs.v4[20_000]++
	if s.Digest() == before {
		t.Error("an address more has the same digest")
	}
}

// The kernel is told what its large sets hold, and only those.
func TestMarks(t *testing.T) {
	p, problems := Parse("p.toml", []byte(listPolicy+"ports = 1\n[open.a]\nports = 2\nfrom = \"@a\"\n"), oneFile(randomList(5*LargeSet, "mixed")))
	if p == nil {
		t.Fatal(problems)
	}
	rs := Compile(p)
	last := rs.Table.Chains[len(rs.Table.Chains)-1]
	if last.Name != "applied" || last.Base != nil {
		t.Fatalf("the last chain is %s", last.Name)
	}
	marked := map[string]bool{}
	for _, r := range last.Rules {
		name, n, digest, ok := ParseMark(r.Comment)
		s := setsByName(rs)[name]
		if !ok || s == nil || !s.Large() || s.Len() != n || s.Digest() != digest {
			t.Errorf("mark %q", r.Comment)
		}
		if !slices.Equal(r.Exprs, []Expr{Verdict{Kind: VerdictReturn}}) {
			t.Errorf("a mark is %s", r.NFT())
		}
		marked[name] = true
	}
	for i := range rs.Table.Sets {
		if s := &rs.Table.Sets[i]; marked[s.Name] != s.Large() {
			t.Errorf("set %s of %d: marked %v", s.Name, s.Len(), marked[s.Name])
		}
	}
	if !marked["set_a_4"] || !marked["set_a_4_net24"] || !marked["set_a_6_net48"] {
		t.Errorf("marked: %v", marked)
	}
	for _, c := range rs.Table.Chains {
		if strings.Contains(ruleText(&c), "applied") {
			t.Errorf("chain %s leads to the marks", c.Name)
		}
	}
	var b bytes.Buffer
	if err := rs.Table.WriteNFT(&b, goldenTime); err != nil || !strings.Contains(b.String(), "\tchain applied {\n\t\treturn comment \"set_a_") {
		t.Errorf("marks are not in the text: %v", err)
	}
	for _, c := range compileText(t, "").Table.Chains {
		if c.Name == "applied" {
			t.Error("marks without a large set")
		}
	}
}

// The kernel's tools keep at most 128 bytes of a comment.
func TestLongestMark(t *testing.T) {
	s := Set{Name: "egress_" + strings.Repeat("x", 48) + "_except4_net30", Type: TypeIPv4, Addrs: AddrRanges{v4: make([]uint64, 100_000)}}
	mark := marks([]Set{s})[0].Rules[0].Comment
	name, n, _, ok := ParseMark(mark)
	if !ok || name != s.Name || n != s.Len() || len(mark)+len("000") >= 128 {
		t.Errorf("%d bytes: %q", len(mark), mark)
	}
}

func TestParseMarkRefuses(t *testing.T) {
	const digest = "0123456789abcdef0123456789abcdef"
	if set, n, d, ok := ParseMark("a 5 elements " + digest); set != "a" || n != 5 || d != digest || !ok {
		t.Error(set, n, d, ok)
	}
	for _, s := range []string{
		"", "open a", "a 5 elements", "a 5 elements " + digest + "0", "a 5 elements " + digest[1:] + "X", "a 5 ranges " + digest,
		"a 05 elements " + digest, "a -5 elements " + digest, "a x elements " + digest, " 5 elements " + digest, "a  5 elements " + digest,
	} {
		if set, n, d, ok := ParseMark(s); ok || set != "" || n != 0 || d != "" {
			t.Errorf("%q is a mark of %q, %d, %q", s, set, n, d)
		}
	}
}

// What a policy says of a source is what its sets hold.
func TestSplitSetsHoldWhatTheModelSays(t *testing.T) {
	p, problems := Parse("p.toml", []byte("version = 1\n[set.a]\nfiles = \"list.txt\"\n[open.a]\nports = 1\nfrom = \"@a\"\n"), oneFile(randomList(20_000, "mixed")))
	if p == nil {
		t.Fatal(problems)
	}
	rs := Compile(p)
	sets := setsByName(rs)
	random := rand.New(rand.NewPCG(3, 4))
	open := 0
	for range 5_000 {
		r := p.Sets[0].Ranges.At(random.IntN(p.Sets[0].Ranges.Len()))
		src := []netip.Addr{r.Lo, r.Hi, r.Lo.Prev(), r.Hi.Next(), addr4(random.Uint32())}[random.IntN(5)]
		packet := Packet{In: "eth0", Src: src, Dst: addr4(192<<24 | 2), Protocol: TCP, DstPort: 1}
		if fromLoopback(src) {
			continue
		}
		held := false
		for _, rule := range findChain(t, rs, "open_a").Rules {
			m, key := rule.Exprs[0].(MatchSet), src
			if m.Bits > 0 { // as the kernel does
				key = netip.PrefixFrom(src, m.Bits).Masked().Addr()
			}
			for _, r := range slices.Collect(sets[m.Set].Addrs.All()) {
				held = held || r.Lo == key || sets[m.Set].Interval && r.Contains(key)
			}
		}
		got := rs.Decide(packet).Outcome == OutcomeOpen
		if got {
			open++
		}
		if got != held {
			t.Fatalf("%v: the model says open %v, the sets hold it %v", src, got, held)
		}
	}
	if open == 0 {
		t.Error("nothing was open")
	}
}

func BenchmarkListDigest1M(b *testing.B) {
	for _, kind := range []string{"random", "v6"} {
		var l AddrRanges
		newReader(nil).list("l", randomList(1_000_000, kind), &l)
		s := Set{Type: TypeIPv4, Interval: true, Addrs: RangesOf(l.ranges()...)}
		b.Run(kind, func(b *testing.B) {
			for b.Loop() {
				if s.Digest() == "" {
					b.Fatal("no digest")
				}
			}
		})
	}
}
