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

	"pgregory.net/rapid"
)

// The fast path reads what the careful one reads, and nothing else.
func TestNetwork4Property(t *testing.T) {
	number := rapid.OneOf(rapid.StringMatching(`[0-9]{0,4}`), rapid.SampledFrom([]string{"0", "10", "255", "256", "128", "01"}))
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(number, 4, rapid.SampledFrom([]int{4, 4, 4, 5}).Draw(t, "parts")).Draw(t, "numbers")
		s := strings.Join(parts, ".")
		if rapid.Bool().Draw(t, "network") {
			s += "/" + rapid.OneOf(rapid.StringMatching(`[0-9]{0,3}`), rapid.SampledFrom([]string{"0", "8", "24", "32", "33", "00"})).Draw(t, "length")
		}
		s += rapid.SampledFrom([]string{"", "", "", " ", "x", "-"}).Draw(t, "rest")
		checkNetwork4(t, s)
	})
}

func checkNetwork4(t interface{ Fatalf(string, ...any) }, s string) {
	want, bad := parseAddresses(s)
	got, ok := network4([]byte(s))
	if ok != (bad == nil && want.Lo.Is4() && !strings.Contains(s, "-")) {
		t.Fatalf("%q: understood is %v, complaint %v", s, ok, bad)
	}
	if ok && (AddrRange{addr4(uint32(got >> 32)), addr4(uint32(got))}) != want {
		t.Fatalf("%q is %x, want %v", s, got, want)
	}
}

// A list means what its addresses mean in a policy.
func TestAddrListProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l addrList
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

// FuzzList reads any bytes as a list.
func FuzzList(f *testing.F) {
	for _, s := range []string{"", "192.0.2.1\n10.0.0.0/8 # x\r\n", "::1\n::/0\n1.2.3.4-1.2.3.9", "\ufeff\t1.2.3.4/33", "\xff\n@x\n;", "1.2.3.4 5.6.7.8"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		r := newReader(nil)
		var l addrList
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
			checkNetwork4(t, string(line))
		}
	})
}

// oneFile is a directory of one file.
type oneFile []byte

func (f oneFile) Glob(string) ([]string, error)   { return nil, nil }
func (f oneFile) ReadFile(string) ([]byte, error) { return f, nil }

func BenchmarkParseList1M(b *testing.B) {
	const n = 1_000_000
	random := rand.New(rand.NewPCG(1, 2))
	var list bytes.Buffer
	for i := range n {
		switch a := random.Uint32(); {
		case i%10 == 0:
			fmt.Fprintf(&list, "2001:db8:%x:%x::/64\n", a>>16, a&0xffff)
		case i%2 == 0:
			fmt.Fprintf(&list, "%v\n", addr4(a))
		default:
			fmt.Fprintf(&list, "%v/24 # comment\n", addr4(a&^0xff))
		}
	}
	policy := []byte("version = 1\n[set.a]\nfiles = \"list.txt\"\n[block.a]\nfrom = \"@a\"\n")
	var peak, before runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	b.SetBytes(int64(list.Len()))
	b.ReportAllocs()
	for b.Loop() {
		p, problems := Parse("p.toml", policy, oneFile(list.Bytes()))
		if p == nil || len(problems) > 0 || len(p.Sets[0].Ranges) < n/2 {
			b.Fatal(len(problems))
		}
	}
	runtime.ReadMemStats(&peak)
	b.ReportMetric(float64(peak.TotalAlloc-before.TotalAlloc)/float64(b.N)/1e6, "MB-allocated/op")
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
