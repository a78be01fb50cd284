package rules_test

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"deadlight/rules"
)

func addrs(t *testing.T, ranges ...string) []rules.AddrRange {
	t.Helper()
	var out []rules.AddrRange
	for _, r := range ranges {
		lo, hi, ok := strings.Cut(r, "-")
		if !ok {
			hi = lo
		}
		out = append(out, rules.AddrRange{Lo: netip.MustParseAddr(lo), Hi: netip.MustParseAddr(hi)})
	}
	return out
}

// comparePolicies leaves out what [rules.Policy.Expired] keeps to itself.
var comparePolicies = cmp.Options{
	cmp.Comparer(rules.AddrRanges.Equal),
	cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
	cmpopts.IgnoreUnexported(rules.Policy{}),
}

// mustParse parses a policy that has no problem at all.
func mustParse(t *testing.T, src string) *rules.Policy {
	t.Helper()
	p, problems := rules.Parse("p.toml", []byte(src), nil)
	for _, problem := range problems {
		t.Error(problem)
	}
	if p == nil {
		t.Fatal("no policy")
	}
	return p
}

func TestParse(t *testing.T) {
	got := mustParse(t, `version = 1
[default]
input = "reject"
[open.ssh]
ports   = [22, "2200-2202", 2203, "2201-2210", "22"]
from    = ["2001:db8::/48", "10.0.0.128/25", "10.0.0.0-10.0.0.127", "@admins", "192.0.2.1", "@admins"]
comment = "ticket 4711"
[set.admins]
addresses = ["198.51.100.7", "198.51.100.7", "2001:db8::1"]
[open.web]
ports      = 443
protocol   = ["udp", "tcp", "udp"]
interfaces = ["eth0", "wg*", "eth0"]
family     = "ipv6"
[published]
interfaces = "docker0"
[icmp]
echo = false
[dhcp]
client = ["eth0"]
`)
	at := func(line, column int) rules.Pos { return rules.Pos{File: "p.toml", Line: line, Column: column} }
	want := rules.DefaultPolicy()
	want.File, want.Files = "p.toml", []string{"p.toml"}
	want.Default.Input, want.Default.Pos = rules.Reject, at(3, 9)
	want.Open = []rules.Open{
		{Traffic: rules.Traffic{
			Name: "ssh", Pos: at(4, 7),
			On: []rules.ProtoPorts{{Protocol: rules.TCP, Ports: []rules.PortRange{{Lo: 22, Hi: 22}, {Lo: 2200, Hi: 2210}}}},
			From: rules.Source{
				Ranges: addrs(t, "10.0.0.0-10.0.0.255", "192.0.2.1", "2001:db8::-2001:db8:0:ffff:ffff:ffff:ffff:ffff"),
				Sets:   []string{"admins"},
			},
			To:      rules.Source{Any: true},
			Comment: "ticket 4711",
		}},
		{Traffic: rules.Traffic{
			Name: "web", Pos: at(10, 7),
			On: []rules.ProtoPorts{
				{Protocol: rules.TCP, Ports: []rules.PortRange{{Lo: 443, Hi: 443}}},
				{Protocol: rules.UDP, Ports: []rules.PortRange{{Lo: 443, Hi: 443}}},
			},
			From:       rules.Source{Any: true},
			To:         rules.Source{Any: true},
			Interfaces: []string{"eth0", "wg*"},
			Family:     rules.IPv6,
		}},
	}
	want.Sets = []rules.AddressSet{{Name: "admins", Pos: at(8, 6), Ranges: rules.RangesOf(addrs(t, "198.51.100.7", "2001:db8::1")...)}}
	want.Published.Interfaces = []string{"docker0"}
	want.ICMP = rules.ICMP{Echo: false, Pos: at(18, 8)}
	want.DHCP = rules.DHCP{Client: true, Interfaces: []string{"eth0"}, Pos: at(20, 10)}
	if diff := cmp.Diff(&want, got, comparePolicies); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
}

func TestParseDefault(t *testing.T) {
	want := rules.DefaultPolicy()
	want.File, want.Files = "p.toml", []string{"p.toml"}
	for _, src := range []string{"version = 1", "version = 1\n[default]\n[open]\n[set]\n[published]\n[icmp]\n[dhcp]\n[log]\n[verify]\n[block]\n[egress]\n[service]\n"} {
		if diff := cmp.Diff(&want, mustParse(t, src), comparePolicies); diff != "" {
			t.Errorf("%q differs (-want +got):\n%s", src, diff)
		}
	}
}

// Different spellings mean the same policy.
func TestParseSame(t *testing.T) {
	plain := "version = 1\n[open.web]\nports = [443]\nprotocol = [\"tcp\"]\nfrom = [\"10.0.0.0/8\"]\ninterfaces = [\"eth0\"]\n"
	want := mustParse(t, plain)
	for name, src := range map[string]string{
		"single values": "version = 1\n[open.web]\nports = 443\nprotocol = \"tcp\"\nfrom = \"10.0.0.0/8\"\ninterfaces = \"eth0\"\n",
		"port as text":  strings.Replace(plain, "[443]", `"443"`, 1),
		"hexadecimal":   strings.Replace(plain, "443", "0x1bb", 1),
		"range":         strings.Replace(plain, "10.0.0.0/8", "10.0.0.0-10.255.255.255", 1),
		"halves":        strings.Replace(plain, `"10.0.0.0/8"`, `"10.128.0.0/9", "10.0.0.0/9"`, 1),
		"crlf":          strings.ReplaceAll(plain, "\n", "\r\n"),
		"byte order":    "\ufeff" + plain,
		"inline":        `version = 1` + "\n" + `open = { web = { ports = 443, from = "10.0.0.0/8", interfaces = "eth0" } }`,
		"dotted":        "version = 1\nopen.web.ports = 443\nopen.web.from = \"10.0.0.0/8\"\nopen.web.interfaces = \"eth0\"\n",
		"quoted key":    strings.Replace(plain, "[open.web]", `['open'."web"]`, 1),
		"no newline":    strings.TrimSuffix(plain, "\n"),
		"tcp left out":  strings.Replace(plain, "protocol = [\"tcp\"]\n", "", 1),
		"escapes":       strings.Replace(plain, "eth0", `\x65th0`, 1),
		"multi-line":    strings.Replace(plain, "[443]", "[\n443, # https\n]", 1),
	} {
		t.Run(name, func(t *testing.T) {
			ignore := cmpopts.IgnoreTypes(rules.Pos{})
			if diff := cmp.Diff(want, mustParse(t, src), comparePolicies, ignore); diff != "" {
				t.Errorf("differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseTooLarge(t *testing.T) {
	p, problems := rules.Parse("p.toml", make([]byte, 8<<20+1), nil)
	if p != nil || len(problems) != 1 || problems[0].Summary != "file is larger than 8 MiB" {
		t.Errorf("got %v", problems)
	}
}

// A file full of errors says how many it has, not all of them.
func TestParseMany(t *testing.T) {
	for n, want := range map[int]string{
		1000: "port 0 is out of range",
		1001: "1 more problem is not shown",
		5000: "4000 more problems are not shown",
	} {
		_, problems := rules.Parse("p.toml", []byte("version = 1\n[open.a]\nports = ["+strings.Repeat("0,", n)+"]"), nil)
		last := problems[len(problems)-1]
		if len(problems) != min(n, 1001) || last.Summary != want || last.Severity != rules.Error {
			t.Errorf("%d problems, the last %v; want %q", len(problems), last, want)
		}
	}
}

// Merged ports are the ports that were written, in few ascending ranges.
func TestPortsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		small := rapid.IntRange(1, 30)
		high := rapid.IntRange(65520, 65535)
		port := rapid.OneOf(small, high)
		var written []string
		want := make(map[int]bool)
		for range rapid.IntRange(1, 8).Draw(t, "n") {
			lo, hi := port.Draw(t, "lo"), port.Draw(t, "hi")
			if lo > hi {
				lo, hi = hi, lo
			}
			written = append(written, fmt.Sprintf("%q", fmt.Sprintf("%d-%d", lo, hi)))
			for p := lo; p <= hi; p++ {
				want[p] = true
			}
		}
		p, problems := rules.Parse("p", []byte("version = 1\n[open.a]\ninterfaces = \"a\"\nports = ["+strings.Join(written, ",")+"]"), nil)
		if p == nil {
			t.Fatal(problems)
		}
		count, last := 0, -1
		for _, r := range p.Open[0].Ports(rules.TCP) {
			if int(r.Lo) <= last+1 || r.Hi < r.Lo {
				t.Fatalf("%v of %v", p.Open[0].On, written)
			}
			last = int(r.Hi)
			for q := int(r.Lo); q <= last; q++ {
				count++
				if !want[q] {
					t.Fatalf("%d is in %v, but not in %v", q, p.Open[0].On, written)
				}
			}
		}
		if count != len(want) {
			t.Fatalf("%v has %d ports, want %d", p.Open[0].On, count, len(want))
		}
	})
}

// Networks hold the addresses that netip says they hold, merged or not.
func TestAddressesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var written []string
		var nets []netip.Prefix
		probes := addrs4(0, 1, 1<<31, 1<<32-1)
		for range rapid.IntRange(1, 6).Draw(t, "n") {
			var a netip.Addr
			if rapid.Bool().Draw(t, "v4") {
				a = netip.AddrFrom4([4]byte{10, 0, rapid.Byte().Draw(t, "c") & 3, rapid.Byte().Draw(t, "d")})
			} else {
				a = netip.AddrFrom16([16]byte{0x20, 1, 15: rapid.Byte().Draw(t, "p")})
			}
			n, err := a.Prefix(rapid.IntRange(0, a.BitLen()).Draw(t, "bits"))
			if err != nil {
				t.Fatal(err)
			}
			nets = append(nets, n)
			written = append(written, strconv.Quote(n.String()))
			probes = append(probes, a, a.Next(), a.Prev(), n.Addr(), n.Addr().Prev())
		}
		p, problems := rules.Parse("p", []byte("version = 1\n[set.a]\naddresses = ["+strings.Join(written, ",")+"]"), nil)
		if p == nil {
			t.Fatal(problems)
		}
		got := slices.Collect(p.Sets[0].Ranges.All())
		for i, r := range got {
			if r.Hi.Less(r.Lo) || i > 0 && (r.Lo.Compare(got[i-1].Hi) <= 0 || got[i-1].Hi.Next() == r.Lo) {
				t.Fatalf("%v of %v", got, written)
			}
			probes = append(probes, r.Lo, r.Lo.Prev(), r.Hi, r.Hi.Next())
		}
		for _, a := range probes {
			want := slices.ContainsFunc(nets, func(n netip.Prefix) bool { return n.Contains(a) })
			if has := slices.ContainsFunc(got, func(r rules.AddrRange) bool { return r.Contains(a) }); a.IsValid() && has != want {
				t.Fatalf("%v holds %v: %v, want %v", got, a, has, want)
			}
		}
	})
}

func addrs4(numbers ...uint32) []netip.Addr {
	var out []netip.Addr
	for _, n := range numbers {
		out = append(out, netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}))
	}
	return out
}

// Nothing a policy holds may make reading it slow.
func TestParseLarge(t *testing.T) {
	const n = 10_000
	rule := func(each func(i int) string) string {
		var b strings.Builder
		b.WriteString("version = 1\n")
		for i := range n {
			fmt.Fprintf(&b, "[open.r%d]\n%s\n", i, each(i))
		}
		return b.String()
	}
	address := func(i int) string { return fmt.Sprintf("10.%d.%d.0/24", i/256, i%256) }
	for name, src := range map[string]string{
		"own port":      rule(func(i int) string { return fmt.Sprintf("ports = %d", 30_000+2*i) }),
		"own source":    rule(func(i int) string { return fmt.Sprintf("ports = 443\nfrom = %q", address(i)) }),
		"all the same":  rule(func(int) string { return "ports = 443" }),
		"nested ranges": rule(func(i int) string { return fmt.Sprintf("ports = \"%d-%d\"", 10_000+i, 60_000-i) }),
		"half open, half not": rule(func(i int) string {
			if i%2 == 0 {
				return fmt.Sprintf("ports = %d", 30_000+2*i)
			}
			return fmt.Sprintf("ports = 443\nfrom = %q", address(i))
		}),
		"crossing ranges": rule(func(i int) string {
			return fmt.Sprintf("ports = \"%d-%d\"\nfrom = \"10.0.0.%d-10.255.%d.%d\"", 10_000+i, 30_000+i, i%200, i/256, i%256)
		}),
		"undefined sets": rule(func(i int) string {
			return fmt.Sprintf("ports = 443\nfrom = \"@s%d\"\n[set.t%d]\naddresses = \"192.0.2.1\"", i, i)
		}),
		"one set for all": "version = 1\n[set.a]\naddresses = [" + strings.Repeat(`"192.0.2.1",`, n) + "]\n" +
			strings.TrimPrefix(rule(func(i int) string { return fmt.Sprintf("ports = %d\nfrom = \"@a\"", 30_000+2*i) }), "version = 1\n"),
		"one line": "version = 1\nopen = { a = { ports = [" + strings.Repeat("0, ", 200_000) + "] } }",
		"one range, many blocks": rule(func(i int) string { return fmt.Sprintf("ports = \"1-65535\"\nfrom = %q", address(i)) }) +
			strings.ReplaceAll(rule(func(i int) string { return fmt.Sprintf("from = %q\nexcept = \"10.0.0.1\"", address(i)) })[12:], "[open.", "[block."),
		"many far ends": "version = 1\ndefault.output = \"drop\"\n" +
			strings.ReplaceAll(rule(func(i int) string { return fmt.Sprintf("ports = 443\nto = %q\nuser = %d", address(i), i) })[12:], "[open.", "[egress."),
		"unknown services":   rule(func(i int) string { return fmt.Sprintf("service = \"s%d\"", i) }),
		"own services":       rule(func(i int) string { return fmt.Sprintf("service = \"s%d\"\n[service.s%d]\nports = %d", i, i, 1+i) }),
		"one large service":  "version = 1\n[service.s]\nports = [" + spread(256) + "]\n" + rule(func(i int) string { return fmt.Sprintf("service = \"s\"\nfrom = %q", address(i)) })[12:],
		"repeated protocols": "version = 1\n[open.a]\nports = [" + spread(30_000) + "]\nprotocol = [" + strings.Repeat("\"tcp\", 6,", 30_000) + "]\n",
		"repeated services":  "version = 1\n[open.a]\nservice = [" + strings.Repeat("\"http\", \"s\",", 100_000) + "]\n[service.s]\nports = [" + spread(200) + "]\n",
		"repeated sets":      "version = 1\n[open.a]\nports = 1\nfrom = [" + strings.Repeat("\"@a\",", 200_000) + "]\n[set.a]\naddresses = \"192.0.2.1\"\n",
		"all expire":         rule(func(i int) string { return fmt.Sprintf("ports = %d\nexpires = 2027-01-31T00:00:00Z", 1+i) }),
		"many tests":         "version = 1\n" + strings.Repeat("[[expect]]\nfrom = \"192.0.2.1\"\nport = \"1/tcp\"\nstate = \"filtered\"\n", n),
		"many interfaces":    "version = 1\n" + rule(func(i int) string { return "ports = 443\ninterfaces = [\"" + strings.Repeat("a\",\"", i%50) + "b\"]" })[12:],
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			_, problems := rules.Parse("p.toml", []byte(src), nil)
			parsed := time.Since(start)
			var out bytes.Buffer
			if err := rules.Render(&out, problems, ""); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d KiB, %d problems: parsed in %v, printed in %v", len(src)>>10, len(problems), parsed, time.Since(start)-parsed)
			// Ten times what an idle machine takes; quadratic work takes a minute.
			if took := time.Since(start); took > time.Minute {
				t.Errorf("took %v", took)
			}
		})
	}
}

// spread lists n ports that touch no other.
func spread(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "%d,", 1+2*i)
	}
	return b.String()
}

// huge is a directory of files of a size.
type huge map[string]int

func (h huge) Glob(string) ([]string, error) { return slices.Sorted(maps.Keys(h)), nil }
func (h huge) ReadFile(name string) ([]byte, error) {
	return bytes.Repeat([]byte(" "), h[name]), nil
}

func TestParseTooLargeElsewhere(t *testing.T) {
	for name, test := range map[string]struct {
		src   string
		files huge
		want  string
	}{
		"include":  {"include = \"*\"", huge{"a": 8<<20 + 1}, `"a" is larger than 8 MiB`},
		"list":     {"set.a.files = \"a\"\nblock.a.from = \"@a\"", huge{"a": 256<<20 + 1}, `"a" is larger than 256 MiB`},
		"includes": {"include = \"*\"", many(10, 8<<20), `the policy and its includes are larger than 64 MiB together`},
	} {
		t.Run(name, func(t *testing.T) {
			p, problems := rules.Parse("p.toml", []byte("version = 1\n"+test.src), test.files)
			if p != nil || len(problems) != 1 || problems[0].Summary != test.want {
				t.Errorf("got %v", problems)
			}
		})
	}
}

func many(n, size int) huge {
	h := huge{}
	for i := range n {
		h[fmt.Sprintf("z%02d", i)] = size
	}
	return h
}

// FuzzInclude reads any bytes as an include: problems stand in the files they
// are of, and a sound one makes a sound policy.
func FuzzInclude(f *testing.F) {
	for _, src := range []string{
		"", "[open.web]\nports = 1\noverride = true", "version = 1\ninclude = \"b\"", "[[expect]]\nfrom = \"::1\"\nport = \"esp\"\nstate = \"open\"",
		"[set.a]\nfiles = [\"a.toml\", \"*\", \"none\"]\noptional = true\n[block.a]\nfrom = \"@a\"", "[open.web]\nports = 2", "\xff", "[default]\n[x]",
	} {
		f.Add([]byte(src))
	}
	main := "version = 1\ninclude = \"*.toml\"\n[open.web]\nports = 80\n[service.s]\nports = 9\n"
	f.Fuzz(func(t *testing.T, src []byte) {
		files := memory{"a.toml": string(src)}
		p, problems := rules.Parse("policy.toml", []byte(main), files)
		hasError := false
		for _, problem := range problems {
			hasError = hasError || problem.Severity == rules.Error
			text := main
			if problem.Pos.File != "policy.toml" {
				text = strings.TrimLeft(files[problem.Pos.File], "\ufeff")
			}
			lines := strings.Split(text, "\n")
			if at := problem.Pos; at.Line < 1 || at.Line > len(lines) || at.Column < 1 || at.Column > utf8.RuneCountInString(lines[at.Line-1])+1 || problem.Width < 1 {
				t.Fatalf("%+v is not in %q", problem, src)
			}
		}
		if hasError != (p == nil) {
			t.Fatalf("policy %v with problems %v", p, problems)
		}
		if p != nil {
			checkValid(t, p)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, src := range []string{
		"", "version = 1", "version = 1\n[open.web]\nports = [443, \"80-90\"]\nfrom = [\"10.0.0.0/8\", \"@a\"]\n[set.a]\naddresses = \"::1-::2\"",
		"version = 1\n[open.a]\nports = 0443\n", "[[open]]\nfrom = 10.0.0.0/8", "a = \"\x1b\"", "\xff\xfe", "open = { a = { ports = [[[[1]]]] } }",
		everyKey,
		"version = 1\n[dhcp]\nclient = [\"eth*\"]\n[icmp]\necho = 1\n[published]\ninterfaces = []\n[default]\ninput = \"x\u202e\"",
	} {
		f.Add([]byte(src))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		p, problems := rules.Parse("p.toml", src, nil)
		lines := strings.Split(strings.TrimLeft(string(src), "\ufeff"), "\n")
		hasError := false
		last := rules.Pos{}
		for _, problem := range problems {
			hasError = hasError || problem.Severity == rules.Error
			at := problem.Pos
			if at.Line < 1 || at.Line > len(lines) || at.Column < 1 || at.Column > utf8.RuneCountInString(lines[at.Line-1])+1 || problem.Width < 1 {
				t.Fatalf("%+v is not in %q", problem, src)
			}
			if at.Line < last.Line || at.Line == last.Line && at.Column < last.Column {
				t.Fatalf("%v stands after %v", at, last)
			}
			last = at
			if problem.Summary == "" {
				t.Fatalf("%+v says nothing", problem)
			}
			for _, c := range problem.String() {
				if c != '\n' && !strconv.IsPrint(c) {
					t.Fatalf("%+v prints %q", problem, c)
				}
			}
		}
		if hasError != (p == nil) {
			t.Fatalf("policy %v with problems %v", p, problems)
		}
		if p != nil {
			checkValid(t, p)
		}
	})
}

// checkValid holds a policy against what its type promises.
func checkValid(t *testing.T, p *rules.Policy) {
	source := func(s rules.Source, given bool) {
		if s.Any && len(s.Ranges)+len(s.Sets) > 0 || given && !s.Any && len(s.Ranges)+len(s.Sets) == 0 {
			t.Fatalf("source %+v", s)
		}
		for _, name := range s.Sets {
			if p.Set(name) == nil {
				t.Fatalf("no set %q", name)
			}
		}
	}
	on := func(on []rules.ProtoPorts) {
		for i, o := range on {
			ported := o.Protocol == rules.TCP || o.Protocol == rules.UDP || o.Protocol == rules.SCTP
			if ported == (len(o.Ports) == 0) || i > 0 && on[i-1].Protocol >= o.Protocol {
				t.Fatalf("traffic %+v", on)
			}
			last := 0
			for _, r := range o.Ports {
				if int(r.Lo) <= last || r.Hi < r.Lo {
					t.Fatalf("ports %+v", o.Ports)
				}
				last = int(r.Hi) + 1
			}
		}
	}
	traffic := func(o rules.Traffic) {
		if o.Name == "" || o.Pos.Line < 1 || o.Any != (len(o.On) == 0) {
			t.Fatalf("rule %+v", o)
		}
		on(o.On)
		source(o.From, true)
		source(o.Except, false)
		source(o.To, true)
	}
	for _, o := range p.Open {
		traffic(o.Traffic)
		if o.Connections < 0 {
			t.Fatalf("rule %+v", o)
		}
		if r := o.Rate; r != nil && (r.Limit == 0 || r.Per < time.Second || r.Burst == 0) {
			t.Fatalf("rate %+v", r)
		}
	}
	for _, o := range p.Block {
		traffic(o.Traffic)
	}
	for _, o := range p.Egress {
		traffic(o.Traffic)
	}
	for _, s := range p.Sets {
		if s.Name == "" || s.Ranges.Len() == 0 && len(s.Files) > 0 && s.Files[0] == "" {
			t.Fatalf("set %+v", s)
		}
	}
	if f := p.Failsafe; f != nil {
		if len(f.On) == 0 {
			t.Fatalf("failsafe %+v", f)
		}
		on(f.On)
		source(f.From, true)
	}
	for _, e := range p.Expect {
		if !e.Packet.Src.IsValid() || e.Pos.Line < 1 {
			t.Fatalf("expect %+v", e)
		}
	}
}
