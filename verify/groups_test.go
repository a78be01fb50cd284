package verify

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
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

// crowdRules opens TCP port 22 and echo to all.
func crowdRules(t testing.TB) *rules.Ruleset {
	t.Helper()
	p, problems := rules.Parse("crowd.toml", []byte("version = 1\n[open.ssh]\nports = 22\n"), nil)
	if p == nil {
		t.Fatal(problems)
	}
	return rules.Compile(p)
}

// Hosts get the verdict of each, whatever group they fall into: in the order asked
// for, with the bound kept over all of them.
func TestLookAtMany(t *testing.T) {
	w := newWorld(t)
	w.firewall("ip daddr 10.8.0.3 drop", "tcp dport 22 accept", "icmp type echo-request accept", "ip daddr 10.8.0.5 tcp dport 80 accept")
	w.target.nft("table ip o {\n chain out {\n  type filter hook output priority 0;\n  icmp type parameter-problem drop\n }\n}\n") // to bad IP options
	w.crowd(7, nil, nil)
	w.vantage.do(func() {
		link, err := netlink.LinkByIndex(w.link.Index)
		w.vantage.must(err)
		w.vantage.must(netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(netip.MustParsePrefix("10.8.0.0/16")), Gw: target4.AsSlice()}))
	})
	rs := crowdRules(t)
	ports := Ports{TCP: portRange(1, 100), UDP: portRange(1, 50)}
	var hosts []Host
	for i := range 7 {
		h := Host{Rules: rs, Targets: []netip.Addr{netip.AddrFrom4([4]byte{10, 8, 0, byte(i)})}}
		switch i {
		case 2:
			h.Targets = append(h.Targets, netip.MustParseAddr("192.0.2.1")) // no route
		case 4:
			h.Targets = []netip.Addr{vantage4, netip.MustParseAddr("10.9.0.77")} // this machine; nobody
		case 6:
			h.Thorough = 1
		}
		hosts = append(hosts, h)
	}
	for _, group := range []int{150, 400, 0} { // each host alone, some, all at once
		next, last, bound := 0, 0.0, 0.0
		var sent, counted uint64
		err := error(nil)
		w.vantage.do(func() {
			err = LookAtMany(context.Background(), ManyConfig{Hosts: hosts, Ports: ports, group: group, Progress: func(n uint64, done float64) {
				if n < sent || done < last || done > 1 {
					t.Errorf("progress %d, %g after %d, %g", n, done, sent, last)
				}
				sent, last = n, done
			}, Each: func(i int, r *Report) error {
				if i != next {
					t.Errorf("host %d comes when %d is due", i, next)
				}
				next++
				counted += r.Probes
				notes := strings.Join(r.Notes, "\n")
				want, filtered, note := Pass, "1-21,23-100", "unproved: silence"
				switch i {
				case 2:
					want, note = Inconclusive, "not probed: 192.0.2.1: no route to target"
				case 3:
					want, filtered, note = Inconclusive, "", ""
				case 4:
					want, filtered, note = Inconclusive, "", "not probed: 10.9.0.1: target is an address of this machine\nnot probed: 10.9.0.77 on veth0: next hop does not answer"
				case 5:
					want, filtered = Fail, "1-21,23-79,81-100"
				case 6:
					note = "not probed at --thorough 1"
				}
				if got := r.States["tcp4"]; r.Verdict != want || got.Filtered != filtered || !strings.Contains(notes, note) || (r.Odd != nil) != (i == 6) {
					t.Errorf("group %d, host %d: %s %+v\n%s\n%+v", group, i, r.Verdict, got, notes, r.Findings)
				}
				if filtered != "" {
					bound += r.Bound
				} else if r.Bound != 1 {
					t.Errorf("host %d: bound %g", i, r.Bound)
				}
				return nil
			}})
		})
		if err != nil || next != len(hosts) || bound > 1e-6 || bound <= 0 || last != 1 || sent != counted {
			t.Errorf("group %d: %v, %d hosts, bound %g, progress %g and %d packets of %d", group, err, next, bound, last, sent, counted)
		}
	}
	stop := errors.New("enough")
	w.vantage.do(func() {
		calls := 0
		err := LookAtMany(context.Background(), ManyConfig{Hosts: hosts, Ports: ports, group: 150, Each: func(int, *Report) error { calls++; return stop }})
		if !errors.Is(err, stop) || calls != 1 {
			t.Errorf("got %v after %d hosts", err, calls)
		}
	})
}

// The miss bound of a host rests on its own canaries: that nothing got lost on the way
// to others says nothing about it.
func TestHostsDoNotBorrow(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	ports := portRange(1, 30)
	paths := w.crowd(40, ports, nil)
	for i := range paths {
		paths[i].Host = i
	}
	for i, p := range w.sweep(Config{Paths: paths}).Paths {
		rounds := float64(p.SentTCP-1) / 29 // port 22 answers at once
		if least := 29 * math.Pow(3/float64(p.CanariesSent), rounds); !p.Alive || p.Bound < least || p.Bound > 1e-6 {
			t.Errorf("host %d: %g rounds and %d canaries bound it to %g, and to %g at best", i, rounds, p.CanariesSent, p.Bound, least)
		}
	}
}

// A group has whole hosts, as many as its ports, its rate and its size allow.
func TestGroupsOfHosts(t *testing.T) {
	two := make([]netip.Addr, 2)
	for _, c := range []struct {
		group, rate, few int // few: ports a host of two addresses
		hosts            int
		want             string
	}{
		{group: 10, few: 3, hosts: 4, want: "[[1 6] [2 6] [3 6] [4 6]]"},
		{group: 12, few: 3, hosts: 5, want: "[[2 12] [4 12] [5 6]]"},
		{group: 2, few: 30, hosts: 2, want: "[[1 60] [2 60]]"},
		{rate: 1, few: 15, hosts: 3, want: "[[2 60] [3 30]]"},
		{few: 1, hosts: 600, want: "[[256 512] [512 512] [600 176]]"},
		{few: 0, hosts: 2, want: "[[2 2]]"},
	} {
		m := many{cfg: ManyConfig{Hosts: make([]Host, c.hosts), Ports: Ports{TCP: portRange(1, c.few)}, MaxRate: c.rate, group: c.group}}
		for i := range m.cfg.Hosts {
			m.cfg.Hosts[i].Targets = two
		}
		var got [][2]int
		for first := 0; first < c.hosts; {
			next, ports := m.nextGroup(first)
			got = append(got, [2]int{next, ports})
			first = next
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("%+v: got %v", c, got)
		}
	}
}

// BenchmarkSweepMemory says what a run over many hosts needs: the heap while a
// group is probed, by port, and from it what a full group needs, which is what
// thousands of hosts with 131,070 ports each do.
func BenchmarkSweepMemory(b *testing.B) {
	w := newWorld(b)
	w.firewall("tcp dport 22 accept")
	const hosts = 20
	ports := portRange(1, 10000)
	paths := w.crowd(hosts, ports, ports)
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	const group = hosts * 20000
	peak := uint64(0)
	look := func() {
		runtime.ReadMemStats(&now)
		peak = max(peak, now.HeapInuse)
	}
	b.ResetTimer()
	for range b.N {
		r := w.sweep(Config{Paths: paths, Progress: func(_, _ uint64) { look() }})
		look()
		for i, p := range r.Paths {
			if !p.Alive {
				b.Errorf("host %d is not alive", i)
			}
		}
		if r.Bound > 1e-6 {
			b.Errorf("bound %g", r.Bound)
		}
	}
	state := float64(peak - before.HeapInuse)
	b.ReportMetric(state/group, "heap-B/port")
	b.ReportMetric(float64(b.N*group)/b.Elapsed().Seconds(), "ports/s")
	b.ReportMetric((state/group*groupPorts+ringBlock*ringBlocks)/(1<<20), "MiB-of-a-group")
}
