package rules

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"weak"

	"pgregory.net/rapid"
)

// The fast paths read what the careful one reads, and nothing else.
func TestNetworkProperty(t *testing.T) {
	number := rapid.OneOf(rapid.StringMatching(`[0-9]{0,4}`), rapid.SampledFrom([]string{"0", "10", "255", "256", "128", "01"}))
	group := rapid.OneOf(rapid.StringMatching(`[0-9a-fA-F]{0,5}`), rapid.SampledFrom([]string{"0", "ffff", "", "FF", "g"}))
	rapid.Check(t, func(t *rapid.T) {
		var s string
		if rapid.Bool().Draw(t, "v4") {
			parts := rapid.SliceOfN(number, 4, rapid.SampledFrom([]int{4, 4, 4, 5}).Draw(t, "parts")).Draw(t, "numbers")
			s = strings.Join(parts, ".")
		} else {
			s = strings.Join(rapid.SliceOfN(group, 1, 9).Draw(t, "groups"), ":")
			s = rapid.SampledFrom([]string{"", "", "", ":", "::", "::ffff:", "2001:db8::"}).Draw(t, "first") + s
			s += rapid.SampledFrom([]string{"", "", "::", ":", ":1.2.3.4", "%lo"}).Draw(t, "last")
		}
		if rapid.Bool().Draw(t, "network") {
			s += "/" + rapid.OneOf(rapid.StringMatching(`[0-9]{0,3}`), rapid.SampledFrom([]string{"0", "8", "24", "32", "33", "00", "64", "127", "128", "129"})).Draw(t, "length")
		}
		s += rapid.SampledFrom([]string{"", "", "", " ", "x", "-"}).Draw(t, "rest")
		checkNetwork(t, s)
	})
}

func TestNetwork6(t *testing.T) {
	for _, s := range []string{
		"::", "::/0", "::1", "1::", "1::/16", "2001:db8::/32", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8",
		"1:2:3:4::5:6:7:8", "1:2:3:4:5:6:7:8/128", "1:2:3:4:5:6:7:8/127", "1::2::3", ":1", "1:", ":::", "1:2:3:4:5:6:7",
		"1:2:3:4:5:6:7:8:9", "1:2:3:4:5:6:7:8:", "::ffff:1.2.3.4", "::ffff:102:304", "::fffe:102:304", "::1.2.3.4", "ABCD::/16",
		"12345::", "fe80::1%lo", "8000::/1", "::/65", "0:0:0:0:8000::/65", "2001:DB8:0:0::/64",
	} {
		checkNetwork(t, s)
	}
}

func checkNetwork(t interface{ Fatalf(string, ...any) }, s string) {
	want, bad := parseAddresses(s)
	v4, n4 := network4([]byte(s))
	v6, n6 := network6([]byte(s))
	var got AddrRange
	ok := false
	switch {
	case n4 > 0 && n6 > 0 && n4 == len(s) && n6 == len(s):
		t.Fatalf("%q is of both families", s)
	case n4 == len(s):
		got, ok = AddrRange{addr4(uint32(v4 >> 32)), addr4(uint32(v4))}, n4 > 0
	case n6 == len(s):
		got, ok = AddrRange{addr6(v6.lo), addr6(v6.hi)}, n6 > 0
	}
	// Ranges, and IPv4 in the last part, are left to the careful one.
	if simple := !strings.Contains(s, "-") && (want.Lo.Is4() || !strings.Contains(s, ".")); ok != (bad == nil && simple) {
		t.Fatalf("%q: understood is %v, complaint %v", s, ok, bad)
	}
	if ok && got != want {
		t.Fatalf("%q is %v, want %v", s, got, want)
	}
}

// A list means what its addresses mean in a policy.
func TestAddrListProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l AddrRanges
		var all []AddrRange
		for range rapid.IntRange(0, 20).Draw(t, "n") {
			lo := rapid.SampledFrom([]uint32{0, 10, 20, 1<<32 - 30}).Draw(t, "base") + rapid.Uint32Range(0, 15).Draw(t, "lo")
			r := AddrRange{addr4(lo), addr4(lo + rapid.Uint32Range(0, 14).Draw(t, "size"))}
			if rapid.IntRange(0, 4).Draw(t, "v6") == 0 {
				r = AddrRange{netip.AddrFrom16([16]byte{15: byte(lo)}), netip.AddrFrom16([16]byte{14: 1, 15: byte(lo)})}
			}
			l.add(r)
			all = append(all, r)
		}
		if got, want := l.ranges(), mergeAddrs(all); !slices.Equal(got, want) {
			t.Fatalf("%v, want %v", got, want)
		}
	})
}

// Long lists are sorted by other means than short ones.
func TestLongLists(t *testing.T) {
	for _, kind := range []string{"random", "ascending", "v6", "mixed"} {
		list := randomList(20_000, kind)
		var l AddrRanges
		newReader(nil).list("l", list, &l)
		var all []AddrRange
		for line := range strings.Lines(string(list)) {
			a, bad := parseAddresses(strings.TrimSpace(line))
			if bad != nil {
				t.Fatal(bad)
			}
			all = append(all, a)
		}
		if got, want := l.ranges(), mergeAddrs(all); !slices.Equal(got, want) {
			t.Errorf("%s: %d ranges, want %d", kind, len(got), len(want))
		}
	}
}

// Whatever IPv6 addresses of a long list have in common.
func TestSort6Property(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		random := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		high := rapid.Uint64().Draw(t, "varying high bits")
		low := rapid.Uint64().Draw(t, "varying low bits")
		all := make([]range6, rapid.SampledFrom([]int{0, 1, 1023, 1024, 3000}).Draw(t, "n"))
		for i := range all {
			all[i].lo = number6{random.Uint64() & high, random.Uint64() & low}
		}
		want := slices.Clone(all)
		byLo := func(a, b range6) int { return a.lo.compare(b.lo) }
		slices.SortFunc(want, byLo)
		if got := sort6(all); !slices.Equal(got, want) {
			t.Fatal("not sorted")
		}
	})
}

// Nothing is allocated line by line, and the text of a list is not kept, nor is
// it by what is complained of.
func TestListsAreReadFrugally(t *testing.T) {
	const n = 50_000
	for _, kind := range []string{"random", "v6", "mixed"} {
		list := randomList(n, kind)
		if got := testing.AllocsPerRun(1, func() { Parse("p.toml", []byte(listPolicy), oneFile(list)) }); got > n/10 {
			t.Errorf("%s: %v allocations for %d lines", kind, got, n)
		}
	}
	for _, last := range []string{"", "192.0.2.1/33 # bad"} {
		list := append(randomList(n, "mixed"), last...)
		text := weak.Make(&list[0])
		p, problems := Parse("p.toml", []byte(listPolicy), oneFile(list))
		if (p == nil) != (last != "") {
			t.Fatal(problems)
		}
		list = nil
		runtime.GC()
		if text.Value() != nil {
			t.Errorf("the text of a list that ends in %q is kept", last)
		}
		runtime.KeepAlive(p)
		runtime.KeepAlive(problems)
	}
}

// However a line ends, the last one too.
func TestLineEnds(t *testing.T) {
	for _, address := range []string{"192.0.2.1", "192.0.2.0/24", "::", "2001:db8::/32"} {
		for _, end := range []string{"", " ", "\r", "\t# x", "#", "# x", "\n", "\r\n", " # x\r\n", "\n\n", "\n# x"} {
			for _, next := range []string{"", "198.51.100.1", "2001:db9::1"} {
				if next != "" && !strings.Contains(end, "\n") || strings.HasSuffix(end, "x") && next != "" {
					continue
				}
				r := newReader(nil)
				var l AddrRanges
				r.list("l", []byte(address+end+next), &l)
				var want []AddrRange
				for _, s := range []string{address, next} {
					if a, bad := parseAddresses(s); bad == nil {
						want = append(want, a)
					}
				}
				if got := l.ranges(); !slices.Equal(got, mergeAddrs(want)) || r.errors > 0 {
					t.Errorf("%q: %v", address+end+next, got)
				}
			}
		}
	}
	// What follows an address on its line is an error, with its place.
	for _, text := range []string{"192.0.2.1x", "192.0.2.1 x", "192.0.2.1/24/24", "::1x", "::1 ::2", "2001:db8::/32,"} {
		r := newReader(nil)
		var l AddrRanges
		r.list("l", []byte("192.0.2.9\n"+text), &l)
		if p := r.problems(); len(p) != 1 || p[0].Pos.Line != 2 || len(l.ranges()) != 1 {
			t.Errorf("%q: %v, %v", text, p, l.ranges())
		}
	}
}

// FuzzList reads any bytes as a list.
func FuzzList(f *testing.F) {
	for _, s := range []string{"", "192.0.2.1\n10.0.0.0/8 # x\r\n", "::1\n::/0\n1.2.3.4-1.2.3.9", "\ufeff\t1.2.3.4/33", "\xff\n@x\n;", "1.2.3.4 5.6.7.8", "::", "192.0.2.1", "192.0.2.1 ", "2001:db8::/32 #"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		r := newReader(nil)
		var l AddrRanges
		r.list("l", src, &l)
		lines := bytes.Split(withoutBOM(src), []byte("\n"))
		for _, p := range r.problems() {
			if p.Pos.Line < 1 || p.Pos.Line > len(lines) || p.Pos.Column < 1 || p.Width < 1 || p.Pos.Column > len(lines[p.Pos.Line-1])+1 {
				t.Fatalf("%+v is not in %q", p, src)
			}
			_ = p.String()
		}
		last := AddrRange{}
		for _, a := range l.ranges() {
			if a.Hi.Less(a.Lo) || last.Hi.IsValid() && !last.Hi.Less(a.Lo) {
				t.Fatalf("%v after %v in %q", a, last, src)
			}
			last = a
		}
		for _, line := range lines {
			checkNetwork(t, string(line))
		}
	})
}

// oneFile is a directory of one file.
type oneFile []byte

func (f oneFile) Glob(string) ([]string, error)   { return nil, nil }
func (f oneFile) ReadFile(string) ([]byte, error) { return f, nil }

// randomList writes n random prefixes a line each: /24 to /32 of IPv4, /48 of
// IPv6, or both by turns.
func randomList(n int, kind string) []byte {
	random := rand.New(rand.NewPCG(1, 2))
	v4 := func() netip.Prefix {
		p, _ := addr4(random.Uint32()).Prefix(24 + random.IntN(9))
		return p
	}
	v6 := func() netip.Prefix {
		a := random.Uint64()
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, byte(a), byte(a >> 8), byte(a >> 16), byte(a >> 24), byte(a >> 32)}), 48)
	}
	prefixes := make([]netip.Prefix, n)
	for i := range prefixes {
		if kind == "v6" || kind == "mixed" && i%2 == 0 {
			prefixes[i] = v6()
		} else {
			prefixes[i] = v4()
		}
	}
	if kind == "ascending" {
		slices.SortFunc(prefixes, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	}
	var list []byte
	for _, p := range prefixes {
		list = append(p.AppendTo(list), '\n')
	}
	return list
}

// listPolicy blocks what one list holds.
const listPolicy = "version = 1\n[set.a]\nfiles = \"list.txt\"\n[block.a]\nfrom = \"@a\"\n"

func BenchmarkList1M(b *testing.B) {
	const n = 1_000_000
	for _, kind := range []string{"random", "ascending", "v6", "mixed"} {
		list := randomList(n, kind)
		b.Run(kind, func(b *testing.B) {
			b.SetBytes(int64(len(list)))
			b.ReportAllocs()
			for b.Loop() {
				p, problems := Parse("p.toml", []byte(listPolicy), oneFile(list))
				if p == nil || len(problems) > 0 || p.Sets[0].Ranges.Len() < n/2 {
					b.Fatal(len(problems))
				}
				if rs := Compile(p); len(rs.Table.Sets) == 0 {
					b.Fatal("no sets")
				}
			}
		})
	}
}

func BenchmarkParse10kRules(b *testing.B) {
	var src bytes.Buffer
	src.WriteString("version = 1\n[service.app]\nports = [8000, \"9000-9010\"]\n")
	for i := range 10_000 {
		fmt.Fprintf(&src, "[open.r%d]\nfrom = [\"10.%d.%d.0/24\", \"2001:db8:%x::/48\"]\n", i, i/256, i%256, i)
		switch i % 4 {
		case 0:
			src.WriteString("service = [\"app\", \"ssh\"]\nrate = { limit = \"10/minute\" }\n")
		case 1:
			src.WriteString("ports = [443, \"6000-6010\"]\nprotocol = [\"tcp\", \"udp\"]\nlog = true\n")
		default:
			fmt.Fprintf(&src, "ports = %d\ncomment = \"ticket %d\"\n", 10_000+i, i)
		}
	}
	b.SetBytes(int64(src.Len()))
	b.ReportAllocs()
	for b.Loop() {
		if p, problems := Parse("p.toml", src.Bytes(), nil); p == nil || len(p.Open) != 10_000 {
			b.Fatal(problems)
		}
	}
}

// The last line may lack its newline, and nothing may follow it in memory.
func TestListWithoutLastNewline(t *testing.T) {
	for _, text := range []string{"192.0.2.1", "192.0.2.0/24", "2001:db8::1", "192.0.2.1 # x", "192.0.2.1\n2001:db8::/32"} {
		r, into := &reader{}, AddrRanges{}
		src := []byte(text)
		r.list("list.txt", src[:len(src):len(src)], &into)
		if n := strings.Count(text, "\n") + 1; len(into.ranges()) != n || len(r.found) > 0 {
			t.Errorf("%q: %v, %v", text, into.ranges(), r.found)
		}
	}
}

// ranges is the list merged.
func (l *AddrRanges) ranges() []AddrRange {
	l.merge()
	return slices.Collect(l.All())
}
