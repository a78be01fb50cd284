package verify

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// crowd gives a target many addresses and a path to each of the first n.
func (w *world) crowd(n int, tcp, udp []uint16) []Path {
	w.t.Helper()
	prefix := netip.MustParsePrefix("10.8.0.0/16")
	w.target.do(func() {
		lo, err := netlink.LinkByName("lo")
		w.target.must(err)
		w.target.must(netlink.RouteAdd(&netlink.Route{ // ip route add local 10.8.0.0/16 dev lo
			LinkIndex: lo.Attrs().Index, Dst: ipNet(prefix), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		}))
	})
	var paths []Path
	for i := range n {
		p := w.path(false, tcp, udp, canary22)
		p.Dst = netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)})
		paths = append(paths, p)
	}
	return paths
}

func TestSweepInGroups(t *testing.T) {
	w := newWorld(t)
	w.firewall("ip daddr 10.8.0.3 drop", "tcp dport 22 accept", "ip daddr 10.8.0.5 tcp dport 80 accept")
	ports := portRange(1, 100)
	paths := w.crowd(7, ports, ports[:50])
	check := func(i int, p PathResult) {
		if p.Alive != (i != 3) {
			t.Errorf("path %d: alive %v", i, p.Alive)
		}
		want(t, fmt.Sprint("tcp path ", i), ports, p.TCP, func(port uint16) Answer {
			switch {
			case i == 3:
				return Answer{Unknown, PathNotProven}
			case port == 22 || port == 80 && i == 5:
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
	}
	for _, group := range []int{150, 0} { // each path alone, and all at once
		var next int
		var last, planned uint64
		cfg := Config{Paths: paths, group: group, Progress: func(sent, total uint64) {
			if sent < last || total < sent {
				t.Errorf("progress %d of %d after %d", sent, total, last)
			}
			last, planned = sent, total
		}}
		r := w.sweep(cfg)
		for i, p := range r.Paths {
			check(i, p)
		}
		if r.Bound > 1e-6 || len(r.Paths) != len(paths) || last != r.Probes || planned != r.Probes {
			t.Errorf("group %d: bound %g, %d paths, progress %d of %d, %d probes", group, r.Bound, len(r.Paths), last, planned, r.Probes)
		}
		cfg.Progress = nil
		cfg.Each = func(i int, p PathResult) error {
			if i != next {
				t.Errorf("path %d comes when %d is due", i, next)
			}
			next++
			check(i, p)
			return nil
		}
		if r := w.sweep(cfg); next != len(paths) || r.Paths != nil {
			t.Errorf("group %d: %d paths, and %d in the result", group, next, len(r.Paths))
		}
	}
	stop := errors.New("enough")
	w.vantage.do(func() {
		_, err := Sweep(context.Background(), Config{Paths: paths, group: 150, Each: func(int, PathResult) error { return stop }})
		if !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
	})
}

func TestGroupsKeepPairs(t *testing.T) {
	a, b, c := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3")
	path := func(dst netip.Addr, n int) Path { return Path{Dst: dst, TCP: portRange(1, n)} }
	cfg := Config{Paths: []Path{path(a, 6), path(a, 6), path(b, 1), path(c, 30), path(b, 4)}, group: 10}
	var got [][2]int
	for first := 0; first < len(cfg.Paths); {
		next, ports := nextGroup(cfg, first)
		got = append(got, [2]int{next, ports})
		first = next
	}
	if want := "[[2 12] [3 1] [4 30] [5 4]]"; fmt.Sprint(got) != want {
		t.Errorf("got %v, want %s", got, want)
	}
}

// BenchmarkSweepMemory says what a run over many hosts needs: the heap while a
// group is probed, by port, and from it what 10,000 hosts with 131,070 ports
// each would need, group after group.
func BenchmarkSweepMemory(b *testing.B) {
	w := newWorld(b)
	w.firewall("tcp dport 22 accept")
	const hosts = 100
	ports := portRange(1, 10000)
	paths := w.crowd(hosts, ports, ports)
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	// Twenty hosts at a time: the peak must be that of a group, not of all.
	const group = 20 * 20000
	peak := uint64(0)
	look := func() {
		runtime.ReadMemStats(&now)
		peak = max(peak, now.HeapInuse)
	}
	b.ResetTimer()
	for range b.N {
		cfg := Config{Paths: paths, group: group, Progress: func(_, _ uint64) { look() }, Each: func(i int, p PathResult) error {
			if i%20 == 0 {
				look()
			}
			if !p.Alive {
				b.Errorf("host %d is not alive", i)
			}
			return nil
		}}
		if r := w.sweep(cfg); r.Bound > 1e-6 {
			b.Errorf("bound %g", r.Bound)
		}
	}
	state := float64(peak - before.HeapInuse)
	b.ReportMetric(state/group, "heap-B/port")
	b.ReportMetric(float64(b.N*hosts*len(ports)*2)/b.Elapsed().Seconds(), "ports/s")
	b.ReportMetric((state/group*groupPorts+ringBlock*ringBlocks)/(1<<20), "MiB-at-10000x131070")
}
