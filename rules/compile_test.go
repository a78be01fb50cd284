package rules

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
)

var updateTables = flag.Bool("update-tables", false, "rewrite testdata/tables")

// TestCompile compares the nft text of each policy in testdata/tables; the
// kernel tests show that the netlink encoding is the same table.
func TestCompile(t *testing.T) {
	files, err := filepath.Glob("testdata/tables/*.txtar")
	if err != nil || len(files) < 5 {
		t.Fatalf("golden files: %v, %v", files, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p, problems := Parse("policy.toml", ar.Files[0].Data, nil)
			if p == nil {
				t.Fatalf("parse: %v", problems)
			}
			var b bytes.Buffer
			rs := Compile(p)
			if err := rs.Table.WriteNFT(&b); err != nil {
				t.Fatal(err)
			}
			if again := Compile(p); !reflect.DeepEqual(rs.Table, again.Table) {
				t.Errorf("two compilations differ")
			}
			if *updateTables {
				ar.Files = append(ar.Files[:1], txtar.File{Name: "table.nft", Data: b.Bytes()})
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if d := cmp.Diff(string(ar.Files[1].Data), b.String()); d != "" {
				t.Errorf("want (-) got (+), -update-tables rewrites:\n%s", d)
			}
		})
	}
}

func compileText(t testing.TB, text string) *Ruleset {
	t.Helper()
	p, problems := Parse("policy.toml", []byte("version = 1\n"+text), nil)
	if p == nil {
		t.Fatalf("parse: %v", problems)
	}
	return Compile(p)
}

func TestSegmentsAreDisjointAndComplete(t *testing.T) {
	rs := compileText(t, `
[open.a]
ports = ["1-100", 65535]
from = "10.0.0.0/8"
[open.b]
ports = ["50-150"]
from = "11.0.0.0/8"
[open.c]
ports = [100, "65000-65535"]
from = "12.0.0.0/8"
`)
	names := func(port uint16) string {
		var out []string
		for _, o := range rs.OpensAt(TCP, port) {
			out = append(out, o.Name)
		}
		return strings.Join(out, ",")
	}
	for port, want := range map[uint16]string{
		1: "a", 49: "a", 50: "a,b", 99: "a,b", 100: "a,b,c", 101: "b", 150: "b", 151: "", 64999: "", 65000: "c", 65534: "c", 65535: "a,c",
	} {
		if got := names(port); got != want {
			t.Errorf("port %d: %q, want %q", port, got, want)
		}
	}
	last := 0
	for _, s := range rs.index[TCP] {
		if int(s.ports.Lo) <= last || s.ports.Hi < s.ports.Lo {
			t.Errorf("segment %v after %d", s.ports, last)
		}
		last = int(s.ports.Hi)
	}
}

func TestNamesInTheKernelAreUnique(t *testing.T) {
	rs := compileText(t, `
[open.a]
ports = 1
interfaces = "x"
from = ["10.0.0.0/8", "@a", "@a_4", "@a_6"]
[open.a_if]
ports = 2
interfaces = "x"
[open.a_from4]
ports = 3
from = ["10.0.0.0/8", "2001:db8::/32"]
[open.22]
ports = [1, 22]
from = ["10.0.0.0/8"]
[set.a]
addresses = ["10.0.0.1", "2001:db8::1"]
[set.a_4]
addresses = ["10.0.0.1", "2001:db8::1"]
[set.a_6]
addresses = ["10.0.0.1", "2001:db8::1"]
`)
	seen := map[string]bool{}
	for _, s := range rs.Table.Sets {
		if seen[s.Name] {
			t.Errorf("two sets called %s", s.Name)
		}
		seen[s.Name] = true
	}
	seen = map[string]bool{}
	for _, c := range rs.Table.Chains {
		if seen[c.Name] {
			t.Errorf("two chains called %s", c.Name)
		}
		seen[c.Name] = true
	}
}

func TestIfnameSetHasNoOverlaps(t *testing.T) {
	got := ifnameSet("x", []string{"tun*", "tun0", "eth0", "tunnel*", "tu", "eth0"})
	if d := cmp.Diff([]string{"eth0", "tu", "tun*"}, got.Names); d != "" {
		t.Error(d)
	}
	if !got.Interval {
		t.Error("a prefix needs an interval set")
	}
}

// Every base chain that judges what comes in ends in an explicit drop, so that
// nothing hangs on a policy that the kernel defers.
func TestInboundChainsDropTwice(t *testing.T) {
	rs := compileText(t, "")
	for _, c := range rs.Table.Chains {
		if c.Base == nil || (c.Base.Hook != Prerouting && c.Base.Hook != Input) {
			continue
		}
		last := c.Rules[len(c.Rules)-1]
		if c.Base.Accept || last.Exprs[len(last.Exprs)-1] != (Verdict{Kind: VerdictDrop}) {
			t.Errorf("chain %s: policy accept %v, last rule %q", c.Name, c.Base.Accept, last.NFT())
		}
	}
}

func TestEveryVerdictHasACounter(t *testing.T) {
	rs := compileText(t, "[open.a]\nports = 1\nfrom = \"10.0.0.0/8\"\n[default]\ninput = \"reject\"\n")
	for _, c := range rs.Table.Chains {
		for _, r := range c.Rules {
			counted := false
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case Count:
					counted = true
				case RejectWith:
					if !counted {
						t.Errorf("chain %s: %s", c.Name, r.NFT())
					}
				case Verdict:
					if (e.Kind == VerdictAccept || e.Kind == VerdictDrop) && !counted {
						t.Errorf("chain %s: %s", c.Name, r.NFT())
					}
				}
			}
			if r.Comment == "" {
				t.Errorf("chain %s: no comment: %s", c.Name, r.NFT())
			}
		}
	}
}

func TestPrefixOfRange(t *testing.T) {
	for text, want := range map[string]string{
		"10.0.0.0/8":              "10.0.0.0/8",
		"10.0.0.1-10.0.0.1":       "10.0.0.1",
		"10.0.0.0-10.0.0.255":     "10.0.0.0/24",
		"10.0.0.1-10.0.0.255":     "10.0.0.1-10.0.0.255",
		"10.0.0.0-10.0.1.255":     "10.0.0.0/23",
		"10.0.1.0-10.0.2.255":     "10.0.1.0-10.0.2.255",
		"0.0.0.0/0":               "0.0.0.0/0",
		"::/0":                    "::/0",
		"2001:db8::/32":           "2001:db8::/32",
		"2001:db8::1-2001:db8::3": "2001:db8::1-2001:db8::3",
	} {
		r, c := parseAddresses(text)
		if c != nil {
			t.Fatalf("%s: %v", text, c)
		}
		if got := r.String(); got != want {
			t.Errorf("%s = %s, want %s", text, got, want)
		}
	}
}
