package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// inBench makes a host for a benchmark.
func inBench(b *testing.B) (*verify.World, *Conn) {
	b.Helper()
	w, err := verify.NewWorld(verify.WorldConfig{Host4: host4, Host6: host6, Links: []string{"eth0"}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { w.Close() })
	c, err := Dial(w.HostFile())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { c.Close() })
	return w, c
}

// withSource is a policy of n rules with a port and a source each.
func withSource(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "[open.r%d]\nports = %d\nfrom = \"10.%d.%d.7\"\n", i, 10000+i, i>>8, i&255)
	}
	return b.String()
}

// listFile is the one file beside a policy.
type listFile []byte

func (l listFile) Glob(pattern string) ([]string, error) { return []string{pattern}, nil }
func (l listFile) ReadFile(name string) ([]byte, error)  { return l, nil }

// BenchmarkDrift is the check of the kernel against what was meant.
func BenchmarkDrift(b *testing.B) {
	large := func(n int) *rules.Ruleset {
		var list listFile
		for i := range n { // every other /28
			a := uint32(1<<28) + uint32(i)<<5
			list = fmt.Appendf(list, "%s/28\n", netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, a))))
		}
		p, problems := rules.Parse("policy.toml", []byte("version = 1\n[set.bad]\nfiles = [\"list\"]\n[block.bad]\nfrom = \"@bad\"\n[open.web]\nports = 80\n"), list)
		if p == nil {
			b.Fatalf("%v", problems)
		}
		return rules.Compile(p)
	}
	for _, tt := range []struct {
		name string
		rs   func() *rules.Ruleset
	}{
		{"10000 rules", func() *rules.Ruleset { return ruleset(b, withSource(10000)) }},
		{"1000000 prefixes", func() *rules.Ruleset { return large(1000000) }},
	} {
		b.Run(tt.name, func(b *testing.B) {
			_, c := inBench(b)
			rs := tt.rs()
			c.Known = func(set, _ string) *rules.Set {
				for i := range rs.Table.Sets {
					if s := &rs.Table.Sets[i]; s.Name == set {
						return s
					}
				}
				return nil
			}
			if _, err := c.Apply(rs); err != nil {
				b.Fatal(err)
			}
			wanted, err := Meant(rs, time.Now())
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				_, d, err := c.Check(wanted, Samples)
				if err != nil || len(d) > 0 {
					b.Fatalf("%v %v", d, err)
				}
			}
		})
	}
}

// The rulesets that a packet to a closed port is dropped by. That of one rule is
// what the path costs without a firewall: a packet must end the same way in all,
// for an answer costs more than any rule.
const (
	twoRules = `table inet filter { chain input { type filter hook input priority filter; policy drop;
		ct state established,related accept
		tcp dport 22 accept
	}; }`
	dropOnly = `table inet filter { chain input { type filter hook input priority filter; policy drop; }; }`
)

// bed is a host that packets are sent to.
type bed struct {
	name  string
	world *verify.World
	v     *volley
	costs []float64 // ns a packet
}

// BenchmarkPacket is the time from the sender of a packet to its drop at the end
// of the ruleset, on one processor: 5,000 rules with a source each beside the
// smallest stateful ruleset and none. Rounds take turns, and the medians count.
func BenchmarkPacket(b *testing.B) {
	paths := []*bed{}
	add := func(name string, load func(w *verify.World, c *Conn)) {
		w, c := inBench(b)
		load(w, c)
		v, err := newVolley(w.Link("eth0"))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(v.close)
		paths = append(paths, &bed{name: name, world: w, v: v})
	}
	text := func(script string) func(w *verify.World, c *Conn) {
		return func(w *verify.World, _ *Conn) {
			if err := w.Host(func() error {
				cmd := exec.Command("nft", "-f", "-")
				cmd.Stdin = strings.NewReader(script)
				if out, err := cmd.CombinedOutput(); err != nil {
					return fmt.Errorf("nft: %w: %s", err, out)
				}
				return nil
			}); err != nil {
				b.Fatal(err)
			}
		}
	}
	add("empty", text(dropOnly))
	add("two-rules", text(twoRules))
	add("deadlight-without-knocks", func(_ *verify.World, c *Conn) {
		if _, err := c.Apply(ruleset(b, "[log]\nknocks = false\n[open.ssh]\nports = 22\n"+withSource(5000))); err != nil {
			b.Fatal(err)
		}
	})
	add("deadlight", func(_ *verify.World, c *Conn) {
		if _, err := c.Apply(ruleset(b, "[open.ssh]\nports = 22\n"+withSource(5000))); err != nil {
			b.Fatal(err)
		}
	})

	for _, tt := range []struct {
		name     string
		protocol rules.Protocol
		src, dst netip.Addr
		port     uint16
	}{
		{"tcp/ipv4", rules.TCP, netip.MustParseAddr("198.51.100.7"), host4, 4444},
		{"tcp/ipv6", rules.TCP, netip.MustParseAddr("2001:db8:99::7"), host6, 4444},
		{"udp/ipv4", rules.UDP, netip.MustParseAddr("198.51.100.7"), host4, 4444},
		{"udp/ipv6", rules.UDP, netip.MustParseAddr("2001:db8:99::7"), host6, 4444},
		{"tcp/ipv4/other-source", rules.TCP, netip.MustParseAddr("198.51.100.7"), host4, 12500}, // of a port that a rule opens
	} {
		b.Run(tt.name, func(b *testing.B) {
			for _, p := range paths {
				p.costs, p.v.frames = nil, nil
				l := p.world.Link("eth0")
				for i := range 1024 {
					pk := packet{flags: syn, Packet: rules.Packet{Protocol: tt.protocol, Src: tt.src, Dst: tt.dst, SrcPort: uint16(20000 + i), DstPort: tt.port}}
					p.v.frames = append(p.v.frames, frame(l, pk.bytes()))
				}
			}
			ours := paths[len(paths)-1]
			lost, dropped := backlogDrops(b), defaultDrops(b, ours.world)
			done := make(chan error, 1)
			go func() {
				runtime.LockOSThread() // never unlocked: the thread ends with its one processor
				done <- func() error {
					if err := oneProcessor(); err != nil {
						return err
					}
					for b.Loop() {
						for range 41 {
							for _, p := range paths {
								begun := time.Now()
								for range 4 {
									if err := p.v.send(); err != nil {
										return err
									}
								}
								p.costs = append(p.costs, float64(time.Since(begun).Nanoseconds())/float64(4*len(p.v.frames)))
							}
						}
					}
					return nil
				}()
			}()
			if err := <-done; err != nil {
				b.Fatal(err)
			}
			if n := backlogDrops(b) - lost; n > 0 {
				b.Errorf("%d packets were dropped before the ruleset saw them", n)
			}
			if sent, n := 4*len(ours.v.frames)*len(ours.costs), defaultDrops(b, ours.world)-dropped; n != sent {
				b.Errorf("%d of %d packets came to the end of the ruleset", n, sent)
			}
			b.ReportMetric(0, "ns/op")
			ns := map[string]float64{}
			for _, p := range paths {
				slices.Sort(p.costs)
				ns[p.name] = p.costs[len(p.costs)/2]
				b.ReportMetric(ns[p.name], "ns-"+p.name)
			}
			b.ReportMetric(ns["deadlight"]/ns["two-rules"], "x-two-rules")
			b.ReportMetric((ns["deadlight"]-ns["empty"])/(ns["two-rules"]-ns["empty"]), "x-two-rules-less-empty")
		})
	}
}

// defaultDrops reads the counter of what no rule took.
func defaultDrops(b *testing.B, w *verify.World) int {
	b.Helper()
	n := 0
	if err := w.Host(func() error {
		out, err := exec.Command("nft", "list", "counter", "inet", rules.TableName, "c_dropped").CombinedOutput()
		if err != nil {
			return fmt.Errorf("nft: %w: %s", err, out)
		}
		_, after, _ := strings.Cut(string(out), "packets ")
		_, err = fmt.Sscan(after, &n)
		return err
	}); err != nil {
		b.Fatal(err)
	}
	return n
}

// oneProcessor keeps the calling thread on one processor: what it sends over a
// veth is received there too, before the call returns.
func oneProcessor() error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	for i := range len(all) * 64 {
		if all.IsSet(i) {
			one.Set(i)
			break
		}
	}
	return unix.SchedSetaffinity(0, &one)
}

// backlogDrops counts the packets that found the queue of a processor full
// (net/core/net-procfs.c: the second column).
func backlogDrops(b *testing.B) uint64 {
	b.Helper()
	text, err := os.ReadFile("/proc/net/softnet_stat")
	if err != nil {
		b.Fatal(err)
	}
	var sum uint64
	for line := range bytes.Lines(text) {
		n, err := strconv.ParseUint(string(bytes.Fields(line)[1]), 16, 64)
		if err != nil {
			b.Fatal(err)
		}
		sum += n
	}
	return sum
}
