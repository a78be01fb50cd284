package verify

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// nobody makes the calling thread that of a user without any capability. The
// thread is thrown away afterwards.
func nobody(s *space) {
	// In a user namespace that maps one user there is no other to become.
	const id = 65534
	_, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id)
	if errno != 0 && errno != unix.EINVAL {
		s.must(errno)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	s.must(unix.Capset(&hdr, &none[0]))
}

// connect sweeps as nobody.
func (w *world) connect(cfg Config) *Result {
	w.t.Helper()
	var res *Result
	w.vantage.do(func() {
		nobody(w.vantage)
		if _, err := Sweep(context.Background(), cfg); !errors.Is(err, unix.EPERM) {
			w.t.Errorf("raw sockets: %v, want EPERM", err)
		}
		var err error
		res, err = Connect(context.Background(), cfg)
		w.vantage.must(err)
	})
	return res
}

func TestConnect(t *testing.T) {
	w := newWorld(t)
	w.target.sysctl("net.ipv4.icmp_ratelimit", "0")
	w.target.sysctl("net.ipv6.icmp.ratelimit", "0")
	w.firewall("tcp dport 5000-5009 accept", "tcp dport 22 accept", "udp dport { 53, 123 } accept",
		"tcp dport 200 reject with tcp reset",
		"meta l4proto { tcp, udp } th dport 201 reject with icmpx admin-prohibited",
		"meta l4proto { tcp, udp } th dport 202 reject with icmpx port-unreachable",
		"meta l4proto { tcp, udp } th dport 203 reject with icmpx no-route")
	w.listen("tcp", target4, portRange(5000, 5009)...)
	w.listen("tcp", target6, portRange(5000, 5009)...)
	w.echoUDP(target4, 123)
	w.echoUDP(target6, 123)
	all, udp := portRange(1, 6000), portRange(1, 500)
	r := w.connect(Config{Paths: []Path{w.path(false, all, udp, canary22, canaryEcho), w.path(true, all, udp, canary22)}})
	w.wantAlive(r)
	for i, p := range r.Paths {
		unreachable := Answer{Rejected, NetUnreachable}
		want(t, fmt.Sprint("tcp path ", i), all, p.TCP, func(port uint16) Answer {
			switch {
			case port >= 5000 && port < 5010:
				return Answer{Open, SynAck}
			case port == 22 || port == 200:
				return Answer{Closed, TCPReset}
			case port == 201:
				return Answer{Rejected, AdminProhibited}
			case port == 202:
				return Answer{Rejected, PortUnreachable}
			case port == 203:
				return unreachable
			}
			return Answer{Filtered, NoResponse}
		})
		want(t, fmt.Sprint("udp path ", i), udp, p.UDP, func(port uint16) Answer {
			switch port {
			case 53, 202:
				return Answer{Closed, PortUnreachable}
			case 123:
				return Answer{Open, UDPAnswer}
			case 201:
				return Answer{Rejected, AdminProhibited}
			case 203:
				return unreachable
			}
			return Answer{Filtered, NoResponse}
		})
		if len(p.From) > 0 {
			t.Errorf("path %d: answers from others than the target: %v", i, p.From)
		}
	}
	if n := w.halfOpen(); n != 0 {
		t.Errorf("%d half-open connections left on the target", n)
	}
}

// Without a canary that answers silence is no evidence.
func TestConnectUnproven(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 80 accept", "icmp type echo-request accept")
	w.listen("tcp", target4, 80)
	ports := portRange(1, 300)
	for _, canaries := range [][]Canary{nil, {canary22}, {canaryEcho}} {
		p := w.connect(Config{Paths: []Path{w.path(false, ports, ports, canaries...)}}).Paths[0]
		want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
			if port == 80 {
				return Answer{Open, SynAck}
			}
			return Answer{Unknown, PathNotProven}
		})
		want(t, "udp", ports, p.UDP, always(Unknown, PathNotProven))
		if p.Alive {
			t.Error("alive without a canary")
		}
	}
}

func TestConnectLossyLine(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept", "tcp dport & 0x1f == 7 accept")
	w.lossy(3, 2)
	ports := portRange(1, 3000)
	r := w.connect(Config{Paths: []Path{w.path(false, ports, nil, canary22)}})
	w.wantAlive(r)
	want(t, "tcp", ports, r.Paths[0].TCP, func(port uint16) Answer {
		if port == 22 || port&0x1f == 7 {
			return Answer{Closed, TCPReset}
		}
		return Answer{Filtered, NoResponse}
	})
	if r.Paths[0].CanariesLost == 0 {
		t.Error("no canary got lost: the line was not lossy")
	}
}

func TestConnectShutOut(t *testing.T) {
	w := newWorld(t)
	w.target.nft(`table inet ips {
		set out { type ipv4_addr; flags dynamic; timeout 10m; size 1024; }
		chain in {
			type filter hook prerouting priority -200;
			ip saddr @out drop
			tcp flags syn limit rate over 1/hour burst 1500 packets add @out { ip saddr } drop
		}
	}`)
	w.firewall("tcp dport 22 accept")
	ports := portRange(1, 6000)
	p := w.connect(Config{Paths: []Path{w.path(false, ports, nil, canary22)}}).Paths[0]
	if p.Alive {
		t.Error("alive")
	}
	for i, a := range p.TCP {
		if a.State != Unknown && a != (Answer{Closed, TCPReset}) {
			t.Fatalf("port %d: %v (%v)", i+1, a.State, a.Reason)
		}
	}
}

// The vantage's own rules and routes say nothing about the target. The kernel
// hides a SYN that an output chain drops; that is one of the notes.
func TestConnectOwnErrors(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport { 22, 100 } accept")
	w.vantage.nft("table inet own { chain out { type filter hook output priority 0; udp dport 100 drop; }; }")
	ports := portRange(99, 101)
	p := w.connect(Config{Paths: []Path{w.path(false, ports, ports, canary22)}}).Paths[0]
	want(t, "udp", ports, p.UDP, func(port uint16) Answer {
		if port == 100 {
			return Answer{Unknown, PathNotProven}
		}
		return Answer{Filtered, NoResponse}
	})
	if !errors.Is(p.Err, unix.EPERM) {
		t.Errorf("error %v, want EPERM", p.Err)
	}
	w.vantage.do(func() {
		l, err := netlink.LinkByIndex(w.link.Index)
		w.vantage.must(err)
		w.vantage.must(netlink.LinkSetDown(l))
	})
	p = w.connect(Config{Paths: []Path{w.path(false, ports, ports, canary22)}}).Paths[0]
	want(t, "no route", ports, p.TCP, always(Unknown, PathNotProven))
}

func TestConnectBounds(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	ports := portRange(1, 400)
	r := w.connect(Config{Paths: []Path{w.path(false, ports, nil, canary22)}, MaxRate: 1000})
	w.wantAlive(r)
	if rate := float64(r.Probes) / r.Elapsed.Seconds(); rate > 1100 {
		t.Errorf("sent %.0f packets a second, allowed were 1000", rate)
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	w.vantage.do(func() {
		all := portRange(1, 65535)
		if r, err := Connect(ctx, Config{Paths: []Path{w.path(false, all, nil, canary22)}, MaxRate: 100}); !errors.Is(err, context.Canceled) || r != nil {
			t.Errorf("got %v, %v", r, err)
		}
	})
}

func TestConnectErrorsFromRouter(t *testing.T) {
	w, up, far4, far6 := newRoutedWorld(t)
	w.vantage.do(func() {
		for _, gw := range []string{"10.9.0.254", "fd09::fe"} {
			w.vantage.must(netlink.RouteAdd(&netlink.Route{LinkIndex: up.Index, Gw: net.ParseIP(gw)}))
			w.vantage.must(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: up.Index, IP: net.ParseIP(gw), HardwareAddr: up.Dst, State: netlink.NUD_PERMANENT,
			}))
		}
	})
	ports := []uint16{100, 101, 102}
	c := Canary{CanaryTCP, 102}
	r := w.connect(Config{Paths: []Path{
		{Link: up, Src: vantage4, Dst: far4, TCP: ports, UDP: ports[:1], SrcPort: 61004, Canaries: []Canary{c}},
		{Link: up, Src: vantage6, Dst: far6, TCP: ports, UDP: ports[:1], SrcPort: 61006, Canaries: []Canary{c}},
	}})
	w.wantAlive(r)
	routers := []netip.Addr{netip.MustParseAddr("10.9.0.254"), netip.MustParseAddr("fd09::fe")}
	for i, p := range r.Paths {
		want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
			return []Answer{{Unknown, RouterError}, {Filtered, NoResponse}, {Closed, TCPReset}}[port-100]
		})
		want(t, "udp", ports[:1], p.UDP, always(Unknown, RouterError))
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			if got := p.From[Target{proto, 100}]; got != routers[i] {
				t.Errorf("path %d, %v: error from %v, want %v", i, proto, got, routers[i])
			}
		}
	}
}

func BenchmarkConnectSilent(b *testing.B) {
	w := newWorld(b)
	w.firewall("tcp dport 22 accept")
	all := portRange(1, 65535)
	var probes uint64
	b.ResetTimer()
	for range b.N {
		r := w.connect(Config{Paths: []Path{w.path(false, all, nil, canary22)}})
		if !r.Paths[0].Alive {
			b.Fatal("path not alive")
		}
		probes += r.Probes
	}
	b.ReportMetric(float64(probes)/b.Elapsed().Seconds(), "probes/s")
}
