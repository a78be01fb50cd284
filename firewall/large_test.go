package firewall

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// listPolicy is a policy that blocks what a list names.
const listPolicy = `version = 1
[open.web]
ports = 80
[block.bad]
from = "@bad"
[set.bad]
files = "bad.txt"
`

// listLength makes each kind of address a large set: a quarter of the lines each.
const listLength = 9 * rules.LargeSet / 2

func listRuleset(t testing.TB, policy string, lines []string) *rules.Ruleset {
	t.Helper()
	files := filesOf(map[string]string{"bad.txt": strings.Join(lines, "\n")})
	p, problems := rules.Parse("policy.toml", []byte(policy), files)
	if p == nil {
		t.Fatal(problems)
	}
	return rules.Compile(p)
}

// networks are n lines of a list: hosts, prefixes of a length, ranges that are no
// prefix, and IPv6.
func networks(n int) []string {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]string, n)
	for i := range out {
		a := uint32(i)*2048 + 1<<24
		v4 := netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)})
		switch r.IntN(4) {
		case 0:
			out[i] = v4.String()
		case 1:
			out[i] = fmt.Sprintf("%s/28", v4)
		case 2:
			last := v4.As4()
			last[3] += 2 + byte(r.IntN(100))*2
			out[i] = fmt.Sprintf("%s-%s", v4, netip.AddrFrom4(last))
		default:
			out[i] = fmt.Sprintf("2001:db8:%x:%x::/64", i>>8, i&0xff*2)
		}
	}
	return out
}

// knownFrom makes c.Known answer from a ruleset, as the state does.
func knownFrom(rs *rules.Ruleset) func(set, digest string) *rules.Set {
	return func(name, digest string) *rules.Set {
		for i := range rs.Table.Sets {
			if s := &rs.Table.Sets[i]; s.Name == name && s.Digest() == digest {
				return s
			}
		}
		return nil
	}
}

func largeSets(rs *rules.Ruleset) (out []*rules.Set) {
	for i := range rs.Table.Sets {
		if s := &rs.Table.Sets[i]; s.Large() {
			out = append(out, s)
		}
	}
	return out
}

func count(t *testing.T, set string) int {
	t.Helper()
	is, err := dial(t).Snapshot(rules.TableName)
	if err != nil {
		t.Fatal(err)
	}
	list := nft(t, "list", "set", "inet", "deadlight", is.realName(set))
	if !strings.Contains(list, "elements = {") {
		return 0
	}
	return strings.Count(list, ",") + 1
}

// A list that changed in a few lines is sent as these lines, and what the kernel
// then holds is what a fresh load would give.
func TestLargeSetChangesInPlace(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		lines := networks(listLength)
		rs := listRuleset(t, listPolicy, lines)
		if n := len(largeSets(rs)); n < 4 {
			t.Fatalf("%d large sets, want hosts, prefixes, ranges and IPv6", n)
		}
		mustApply(t, c, rs)
		changed := slices.Clone(lines)
		changed[7], changed[len(changed)-1] = "203.0.113.0/30", "203.0.113.77"
		changed[8], changed[9] = "203.0.113.128/28", "2001:db8:fffe::/64"
		changed = append(changed, "2001:db8:ffff::/48", "255.255.255.255", "0.0.0.0/16")
		changed = slices.Delete(changed, 100, 110)
		next := listRuleset(t, listPolicy, changed)
		for _, step := range []struct {
			rs, from *rules.Ruleset
			policy   string
		}{{next, rs, ""}, {rs, next, ""}, {next, nil, ""}} {
			c.Known = nil
			if step.from != nil {
				c.Known = knownFrom(step.from)
			}
			mustApply(t, c, step.rs)
			for _, s := range largeSets(step.rs) {
				if got := count(t, s.Name); got != s.Len() {
					t.Errorf("set %s has %d elements, want %d", s.Name, got, s.Len())
				}
			}
			wanted, err := Meant(step.rs, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			c.Known = knownFrom(step.rs)
			if _, d, err := c.Check(wanted, Everything); err != nil || len(d) > 0 {
				t.Errorf("after apply: %v %v", d, err)
			}
		}
		was := blocks(t)
		nft(t, "delete", "table", "inet", "deadlight")
		mustApply(t, c, next)
		if was != blocks(t) {
			t.Error("a table changed in place differs from one loaded afresh")
		}
	})
}

// The transaction of a changed line is small, whatever stands beside it.
func TestOnlyWhatChangedIsSent(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		rs := listRuleset(t, listPolicy, networks(listLength))
		mustApply(t, c, rs)
		size := func(next *rules.Ruleset) (n int) {
			now := time.Now()
			want, err := encode(&next.Table, now)
			if err != nil {
				t.Fatal(err)
			}
			wanted, err := meant(want, now)
			if err != nil {
				t.Fatal(err)
			}
			is, err := c.Snapshot(rules.TableName)
			if err != nil {
				t.Fatal(err)
			}
			c.Known = knownFrom(rs)
			tr := &transaction{table: rules.TableName, is: is, wanted: wanted, want: want, known: c.contentOf(is)}
			s, err := tr.steps()
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range s.all() {
				n += len(m.body())
			}
			return n
		}
		if n := size(listRuleset(t, strings.Replace(listPolicy, "80", "443", 1), networks(listLength))); n > 64<<10 {
			t.Errorf("a changed port is %d bytes", n)
		}
		if n := size(listRuleset(t, listPolicy, append(networks(listLength), "203.0.113.0/30"))); n > 64<<10 {
			t.Errorf("a line more is %d bytes", n)
		}
		everythingElse := size(listRuleset(t, listPolicy, networks(listLength)[listLength/2:]))
		if everythingElse < 1<<19 {
			t.Errorf("another list is %d bytes", everythingElse)
		}
	})
}

// Rules that a reload does not touch are not written again.
func TestUnchangedRulesKeepTheirHandles(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, everything))
		chain := func(name string) string { return nft(t, "-a", "list", "chain", "inet", "deadlight", name) }
		gate, vendors, web := chain("gate"), chain("open_vendors"), chain("open_web")
		mustApply(t, c, ruleset(t, strings.Replace(everything, `"203.0.113.66"`, `"203.0.113.67"`, 1)))
		if chain("gate") != gate || chain("open_web") != web {
			t.Error("rules were rewritten that did not change")
		}
		if chain("open_vendors") == vendors {
			t.Error("the changed rule was not written")
		}
	})
}

func TestLargeSetTampering(t *testing.T) {
	lines := networks(listLength)
	rs := listRuleset(t, listPolicy, lines)
	var nets, prefixes, hosts *rules.Set
	for _, s := range largeSets(rs) {
		switch {
		case s.Type == rules.TypeIPv4 && s.Interval:
			nets = s
		case s.Type == rules.TypeIPv4 && s.Part == 28:
			prefixes = s
		case s.Type == rules.TypeIPv4:
			hosts = s
		}
	}
	one := func(s *rules.Set) string { return rangeText(s.Addrs.At(s.Len() / 2)) }
	grown := nets.Addrs.At(nets.Len() / 2)
	grown.Hi = grown.Hi.Next()
	for name, tamper := range map[string]struct {
		script  string
		kind    string
		of      string
		samples int
	}{
		"a network more":       {"add element inet deadlight " + nets.Name + " { 198.18.0.0/15 }", "set", nets.Name, 0},
		"a network less":       {"delete element inet deadlight " + nets.Name + " { " + one(nets) + " }", "set", nets.Name, 0},
		"the last address":     {"add element inet deadlight " + nets.Name + " { 255.255.255.255 }", "element", nets.Name, 0},
		"a host more":          {"add element inet deadlight " + hosts.Name + " { 198.18.0.1 }", "set", hosts.Name, 0},
		"a host exchanged":     {"delete element inet deadlight " + hosts.Name + " { " + one(hosts) + " }; add element inet deadlight " + hosts.Name + " { 198.18.0.1 }", "element", hosts.Name, Everything},
		"a prefix more":        {"add element inet deadlight " + prefixes.Name + " { 198.18.0.16 }", "set", prefixes.Name, 0},
		"a prefix exchanged":   {"delete element inet deadlight " + prefixes.Name + " { " + prefixes.Addrs.At(99).Lo.String() + " }; add element inet deadlight " + prefixes.Name + " { 198.18.0.16 }", "element", prefixes.Addrs.At(99).String() + " of set " + prefixes.Name, Everything},
		"a network exchanged":  {"delete element inet deadlight " + nets.Name + " { " + one(nets) + " }; add element inet deadlight " + nets.Name + " { 198.18.0.0/15 }", "element", nets.Name, Everything},
		"flushed":              {"flush set inet deadlight " + nets.Name, "set", nets.Name, 0},
		"the mark is gone":     {"flush chain inet deadlight applied", "rule", "applied", 0},
		"another mark":         {"flush chain inet deadlight applied; add rule inet deadlight applied return comment \"" + nets.Name + " 5 00\"", "rule", "applied", 0},
		"a network that grows": {"delete element inet deadlight " + nets.Name + " { " + one(nets) + " }; add element inet deadlight " + nets.Name + " { " + rangeText(grown) + " }", "element", nets.Name, Everything},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				c := dial(t)
				mustApply(t, c, rs)
				c.Known = knownFrom(rs)
				wanted, err := Meant(rs, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				file := filepath.Join(t.TempDir(), "tamper.nft")
				if err := os.WriteFile(file, []byte(strings.ReplaceAll(tamper.script, "; ", "\n")), 0o600); err != nil {
					t.Fatal(err)
				}
				nft(t, "-f", file)
				_, d, err := c.Check(wanted, tamper.samples)
				if err != nil {
					t.Fatal(err)
				}
				if !slices.ContainsFunc(d, func(d Difference) bool { return d.Kind == tamper.kind && strings.Contains(d.Name, tamper.of) }) {
					t.Fatalf("differences: %v", d)
				}
				if tamper.samples == Everything {
					return // Apply draws samples, and may not meet the one
				}
				mustApply(t, c, rs)
				if _, d, err := c.Check(wanted, Everything); err != nil || len(d) > 0 {
					t.Errorf("after apply: %v %v", d, err)
				}
			})
		})
	}
}

// What expired by itself is no difference.
func TestExpiredElementsAreNoDifference(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		end := time.Now().Add(3 * time.Second).UTC().Format(time.RFC3339)
		rs := ruleset(t, "[open.a]\nports = 80\nexpires = "+end+"\n")
		mustApply(t, c, rs)
		wanted, err := Meant(rs, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for range 30 {
			if _, d, err := c.Check(wanted, Samples); err != nil || len(d) > 0 {
				t.Fatalf("%v %v", d, err)
			}
			time.Sleep(200 * time.Millisecond)
		}
		if strings.Contains(listTable(t), "expires") {
			t.Fatal("it has not expired")
		}
	})
}

func TestStoredSnapshot(t *testing.T) {
	for _, text := range []string{everything, others, observed, little, ""} {
		wanted, err := Meant(ruleset(t, text), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		b, err := wanted.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var got Snapshot
		if err := got.UnmarshalBinary(b); err != nil {
			t.Fatal(err)
		}
		if d := Diff(&got, wanted); d != nil {
			t.Errorf("stored and read again: %v", d)
		}
		if again, err := got.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("equal snapshots are not equal bytes (%v)", err)
		}
		for i := 0; i < len(b); i += 1 + len(b)/100 {
			if err := new(Snapshot).UnmarshalBinary(b[:i]); err == nil {
				t.Errorf("the first %d bytes were accepted", i)
				break
			}
		}
	}
}

// Close to their end elements may still be there or be gone, whatever the clock says.
func TestExpiryIsNotADifferenceOfClocks(t *testing.T) {
	rs := ruleset(t, "[open.a]\nports = 80\nexpires = 2100-01-01T00:00:00Z\n")
	end := time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	wanted, err := Meant(rs, end.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		at   time.Duration // after the end
		gone bool
		same bool
	}{
		{-time.Minute, false, true}, {-time.Minute, true, false},
		{-time.Second, false, true}, {-time.Second, true, true},
		{time.Second, false, true}, {time.Second, true, true},
		{time.Minute, false, false}, {time.Minute, true, true},
	} {
		is, err := Meant(rs, end.Add(-time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		is.at = end.Add(tt.at)
		if set := is.sets["open_a_until"]; tt.gone {
			set.first, set.last, set.elements = time.Time{}, time.Time{}, nil
		}
		if d := Diff(is, wanted); (d == nil) != tt.same {
			t.Errorf("%v after the end, gone %v: %v", tt.at, tt.gone, d)
		}
	}
}
