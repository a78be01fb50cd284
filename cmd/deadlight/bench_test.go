package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
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
	wall   time.Duration
	memory float64 // MB, at most
}

// run runs a program inside the host; its exit code must be one of these.
func (s *bench) run(codes []int, argv ...string) (cost, []byte) {
	s.Helper()
	var out, errs bytes.Buffer
	var c cost
	if err := s.world.Host(func() error {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, &out, &errs
		begun := time.Now()
		err := cmd.Run()
		c.wall = time.Since(begun)
		if cmd.ProcessState == nil || !slices.Contains(codes, cmd.ProcessState.ExitCode()) {
			return fmt.Errorf("%q: %w\n%s", argv, err, errs.Bytes())
		}
		c.memory = float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss) / 1024
		return nil
	}); err != nil {
		s.Fatal(err)
	}
	return c, out.Bytes()
}

func (s *bench) apply() cost {
	s.Helper()
	c, _ := s.run([]int{exitOK}, s.file("deadlight"), "apply", "--state-dir", s.file("state"), "policy.toml")
	return c
}

// middle is the median, of time and memory each.
func middle(all []cost) cost {
	slices.SortFunc(all, func(a, b cost) int { return int(a.wall - b.wall) })
	wall := all[len(all)/2].wall
	slices.SortFunc(all, func(a, b cost) int { return int(a.memory - b.memory) })
	return cost{wall, all[len(all)/2].memory}
}

// prefixes are n different ones that cannot be merged, in random order.
func prefixes(n int, six func(i int) bool) [][]byte {
	out := make([][]byte, n)
	for i := range out {
		var p netip.Prefix
		if six(i) {
			p = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, byte(i >> 16), byte(i >> 8), byte(i), 0}), 56)
		} else { // every other /28 of 16.0.0.0/3
			a := uint32(1<<28) + uint32(i)<<5
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}), 28)
		}
		out[i] = []byte(p.String() + "\n")
	}
	random := rand.New(rand.NewPCG(1, 2))
	random.Shuffle(len(out), func(i, k int) { out[i], out[k] = out[k], out[i] })
	return out
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
			_, text := s.run([]int{exitOK}, s.file("deadlight"), "show", "policy.toml")
			s.write("show.nft", text)

			theirs := []cost{}
			for len(theirs) < max(1, 300000/tt.n) {
				s.fresh()
				c, _ := s.run([]int{0}, "nft", "-f", "show.nft")
				theirs = append(theirs, c)
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
					c, _ := s.run([]int{exitOK}, s.file("deadlight"), "drift", "--state-dir", s.file("state"))
					drift = append(drift, c)
				}
			}
			us, nft := middle(ours), middle(theirs)
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(us.wall.Seconds(), "s-apply")
			b.ReportMetric(us.memory, "MB-apply")
			b.ReportMetric(nft.wall.Seconds(), "s-nft")
			b.ReportMetric(nft.memory, "MB-nft")
			b.ReportMetric(nft.wall.Seconds()/us.wall.Seconds(), "x-faster-than-nft")
			b.ReportMetric(us.memory/nft.memory, "of-nft-memory")
			for _, m := range []struct {
				unit string
				all  []cost
			}{{"no-change", again}, {"policy-line", policyLine}, {"list-line", listLine}, {"drift", drift}} {
				c := middle(m.all)
				b.ReportMetric(c.wall.Seconds(), "s-"+m.unit)
				b.ReportMetric(c.memory, "MB-"+m.unit)
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
	_, nftText := s.run([]int{exitOK}, s.file("deadlight"), "show", "policy.toml")
	s.write("show.nft", nftText)
	var ours, theirs, line, drift []cost
	for b.Loop() {
		for range 3 {
			s.fresh()
			c, _ := s.run([]int{0}, "nft", "-f", "show.nft")
			theirs = append(theirs, c)
			s.write("policy.toml", []byte(policy))
			s.fresh()
			ours = append(ours, s.apply())
			s.write("policy.toml", []byte(strings.Replace(policy, "ports = 80\n", "ports = [80, 81]\n", 1)))
			line = append(line, s.apply())
			c, _ = s.run([]int{exitOK}, s.file("deadlight"), "drift", "--state-dir", s.file("state"))
			drift = append(drift, c)
		}
	}
	us, nft := middle(ours), middle(theirs)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(us.wall.Seconds(), "s-apply")
	b.ReportMetric(us.memory, "MB-apply")
	b.ReportMetric(nft.wall.Seconds(), "s-nft")
	b.ReportMetric(nft.memory, "MB-nft")
	b.ReportMetric(nft.wall.Seconds()/us.wall.Seconds(), "x-faster-than-nft")
	b.ReportMetric(middle(line).wall.Seconds(), "s-policy-line")
	b.ReportMetric(middle(drift).wall.Seconds(), "s-drift")
	b.ReportMetric(middle(drift).memory, "MB-drift")
}
