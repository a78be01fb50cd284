package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"deadlight/verify"
)

// bench is a throw-away host and the program as it is installed.
type bench struct {
	*testing.B
	world *verify.World
	dir   string
}

func newBench(b *testing.B) *bench {
	b.Helper()
	s := &bench{B: b, dir: b.TempDir()}
	out, err := exec.Command("go", "build", "-o", s.file("deadlight"), ".").CombinedOutput()
	if err != nil {
		b.Fatalf("go build: %v\n%s", err, out)
	}
	s.fresh()
	b.Cleanup(func() {
		if err := s.world.Close(); err != nil {
			b.Error(err)
		}
	})
	return s
}

// fresh makes a host without any rule.
func (s *bench) fresh() {
	s.Helper()
	if s.world != nil {
		if err := s.world.Close(); err != nil {
			s.Fatal(err)
		}
	}
	var err error
	if s.world, err = verify.NewWorld(verify.WorldConfig{Host4: netip.MustParseAddr("192.0.2.1"), Links: []string{"eth0"}}); err != nil {
		s.Fatal(err)
	}
	if err := os.RemoveAll(s.file("state")); err != nil {
		s.Fatal(err)
	}
}

func (s *bench) file(name string) string { return filepath.Join(s.dir, name) }

func (s *bench) write(name string, text []byte) {
	s.Helper()
	if err := os.WriteFile(s.file(name), text, 0o600); err != nil {
		s.Fatal(err)
	}
}

// cost is what a process took.
type cost struct {
	Wall   time.Duration
	Memory float64 // MB, at most
	Code   int
}

// measureEnv tells a child to start its arguments and write their cost to file 3.
const measureEnv = "DEADLIGHT_TEST_MEASURE"

// measure is a process of its own: a program inherits the peak of memory of the
// one that started it, and the tests hold long lists.
func measure(argv []string) error {
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	begun := time.Now()
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return err
	}
	return json.NewEncoder(os.NewFile(3, "cost")).Encode(cost{
		Wall:   time.Since(begun),
		Memory: float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) / 1024,
		Code:   cmd.ProcessState.ExitCode(),
	})
}

// run runs a program inside the host, which must end with exit code 0.
func (s *bench) run(argv ...string) (cost, []byte) {
	s.Helper()
	var out, errs bytes.Buffer
	var c cost
	if err := s.world.Host(func() error {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		cmd := exec.Command("/proc/self/exe", argv...)
		cmd.Env = append(os.Environ(), measureEnv+"=1")
		cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = s.dir, &out, &errs, []*os.File{w}
		err = cmd.Run()
		if err := errors.Join(err, w.Close()); err != nil {
			return fmt.Errorf("%q: %w\n%s", argv, err, errs.Bytes())
		}
		if err := json.NewDecoder(r).Decode(&c); err != nil {
			return err
		}
		if c.Code != exitOK {
			return fmt.Errorf("%q: exit code %d\n%s", argv, c.Code, errs.Bytes())
		}
		return nil
	}); err != nil {
		s.Fatal(err)
	}
	return c, out.Bytes()
}

func (s *bench) apply() cost {
	s.Helper()
	c, _ := s.run(s.file("deadlight"), "apply", "--state-dir", s.file("state"), "policy.toml")
	return c
}

// middle is the median, of time and memory each.
func middle(all []cost) cost {
	slices.SortFunc(all, func(a, b cost) int { return int(a.Wall - b.Wall) })
	wall := all[len(all)/2].Wall
	slices.SortFunc(all, func(a, b cost) int { return int(a.Memory - b.Memory) })
	return cost{Wall: wall, Memory: all[len(all)/2].Memory}
}

// prefixes are n different ones that cannot be merged, of the lengths that
// blocklists have, in random order.
func prefixes(n int, six func(i int) bool) [][]byte {
	out := make([][]byte, n)
	random := rand.New(rand.NewPCG(1, 2))
	lengths4, lengths6 := []int{24, 24, 24, 32, 32, 28, 29, 26, 25}, []int{56, 64, 64, 128, 60}
	for i := range out {
		var p netip.Prefix
		if six(i) { // one in every other /56
			p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(i >> 15), byte(i >> 7), byte(i << 1), 0}), lengths6[random.IntN(len(lengths6))])
		} else { // one in every other /24
			a := uint32(1<<28) + uint32(i)<<9
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}), lengths4[random.IntN(len(lengths4))])
		}
		out[i] = []byte(p.String() + "\n")
	}
	random.Shuffle(len(out), func(i, k int) { out[i], out[k] = out[k], out[i] })
	return out
}

var elementsOfBad = regexp.MustCompile(`(?s)(set set_bad_([46]) \{[^}]*?elements = )\{[^}]*\}`)

// asListed is nft text with the elements of a set in the order of the list.
func asListed(text []byte, list [][]byte) []byte {
	return elementsOfBad.ReplaceAllFunc(text, func(m []byte) []byte {
		parts := elementsOfBad.FindSubmatch(m)
		var own [][]byte
		for _, line := range list {
			if bytes.Contains(line, []byte(":")) == (parts[2][0] == '6') {
				own = append(own, bytes.TrimSpace(line))
			}
		}
		return slices.Concat(parts[1], []byte("{ "), bytes.Join(own, []byte(",\n")), []byte(" }"))
	})
}

const benchPolicy = `version = 1
[open.web]
ports = [80, 443]
[open.ssh]
ports = 22
from = "10.0.0.0/8"
[set.bad]
files = ["list.txt"]
[block.bad]
from = "@bad"
`

// BenchmarkBlocklist compares the whole of deadlight apply with nft -f of the
// same content, and tells what a change of one line costs on top.
func BenchmarkBlocklist(b *testing.B) {
	v4 := func(int) bool { return false }
	for _, tt := range []struct {
		name string
		n    int
		six  func(i int) bool
	}{
		{"100000/ipv4", 100000, v4},
		{"100000/ipv6", 100000, func(int) bool { return true }},
		{"100000/mixed", 100000, func(i int) bool { return i%2 == 1 }},
		{"1000000/ipv4", 1000000, v4},
	} {
		b.Run(tt.name, func(b *testing.B) {
			s := newBench(b)
			list := prefixes(tt.n, tt.six)
			s.write("list.txt", slices.Concat(list...))
			s.write("policy.toml", []byte(benchPolicy))
			_, text := s.run(s.file("deadlight"), "show", "policy.toml")
			s.write("show.nft", text)
			// One set of intervals a family is what a hand-written file has.
			var families []byte
			if slices.ContainsFunc(list, func(p []byte) bool { return !bytes.Contains(p, []byte(":")) }) {
				families = append(families, "192.0.2.0/24\n"...)
			}
			if slices.ContainsFunc(list, func(p []byte) bool { return bytes.Contains(p, []byte(":")) }) {
				families = append(families, "2001:db8::/64\n"...)
			}
			s.write("list.txt", families)
			_, text = s.run(s.file("deadlight"), "show", "policy.toml")
			s.write("list.nft", asListed(text, list))

			// nft takes the list as it stands, as we do; sorted, merged and split for it, by
			// us, it has less to do.
			var theirs, shown []cost
			for len(theirs) < max(1, 300000/tt.n) {
				s.fresh()
				c, _ := s.run("nft", "-f", "list.nft")
				theirs = append(theirs, c)
				s.fresh()
				c, _ = s.run("nft", "-f", "show.nft")
				shown = append(shown, c)
			}
			var ours, again, policyLine, listLine, drift []cost
			for b.Loop() {
				for range 3 {
					s.write("list.txt", slices.Concat(list...))
					s.write("policy.toml", []byte(benchPolicy))
					s.fresh()
					ours = append(ours, s.apply())
					again = append(again, s.apply())
					s.write("policy.toml", []byte(strings.Replace(benchPolicy, "[80, 443]", "[80, 443, 8080]", 1)))
					policyLine = append(policyLine, s.apply())
					s.write("list.txt", slices.Concat(slices.Concat(list[1:]...), []byte("203.0.113.64/27\n")))
					listLine = append(listLine, s.apply())
					c, _ := s.run(s.file("deadlight"), "drift", "--state-dir", s.file("state"))
					drift = append(drift, c)
				}
			}
			us, nft := middle(ours), middle(theirs)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(us.Wall.Seconds(), "s-apply")
			b.ReportMetric(us.Memory, "MB-apply")
			b.ReportMetric(nft.Wall.Seconds(), "s-nft")
			b.ReportMetric(nft.Memory, "MB-nft")
			b.ReportMetric(nft.Wall.Seconds()/us.Wall.Seconds(), "x-faster-than-nft")
			b.ReportMetric(us.Memory/nft.Memory, "of-nft-memory")
			b.ReportMetric(middle(shown).Wall.Seconds()/us.Wall.Seconds(), "x-faster-than-nft-of-show")
			for _, m := range []struct {
				unit string
				all  []cost
			}{{"no-change", again}, {"policy-line", policyLine}, {"list-line", listLine}, {"drift", drift}} {
				c := middle(m.all)
				b.ReportMetric(c.Wall.Seconds(), "s-"+m.unit)
				b.ReportMetric(c.Memory, "MB-"+m.unit)
			}
		})
	}
}

// BenchmarkRules is the same for 10,000 rules with a source each.
func BenchmarkRules(b *testing.B) {
	s := newBench(b)
	var text strings.Builder
	text.WriteString("version = 1\n[open.web]\nports = 80\n")
	for i := range 10000 {
		fmt.Fprintf(&text, "[open.r%d]\nports = %d\nfrom = \"10.%d.%d.7\"\n", i, 10000+i, i>>8, i&255)
	}
	policy := text.String()
	s.write("policy.toml", []byte(policy))
	_, nftText := s.run(s.file("deadlight"), "show", "policy.toml")
	s.write("show.nft", nftText)
	var ours, theirs, line, drift []cost
	for b.Loop() {
		for range 3 {
			s.fresh()
			c, _ := s.run("nft", "-f", "show.nft")
			theirs = append(theirs, c)
			s.write("policy.toml", []byte(policy))
			s.fresh()
			ours = append(ours, s.apply())
			s.write("policy.toml", []byte(strings.Replace(policy, "ports = 80\n", "ports = [80, 81]\n", 1)))
			line = append(line, s.apply())
			c, _ = s.run(s.file("deadlight"), "drift", "--state-dir", s.file("state"))
			drift = append(drift, c)
		}
	}
	us, nft := middle(ours), middle(theirs)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(us.Wall.Seconds(), "s-apply")
	b.ReportMetric(us.Memory, "MB-apply")
	b.ReportMetric(nft.Wall.Seconds(), "s-nft")
	b.ReportMetric(nft.Memory, "MB-nft")
	b.ReportMetric(nft.Wall.Seconds()/us.Wall.Seconds(), "x-faster-than-nft")
	b.ReportMetric(middle(line).Wall.Seconds(), "s-policy-line")
	b.ReportMetric(middle(drift).Wall.Seconds(), "s-drift")
	b.ReportMetric(middle(drift).Memory, "MB-drift")
}
