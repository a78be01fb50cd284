package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

var (
	vantage4, target4 = netip.MustParseAddr("10.9.0.1"), netip.MustParseAddr("10.9.0.2")
	vantage6, target6 = netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::2")
)

// space is a network namespace that ends with its test.
type space struct {
	t  testing.TB
	ns netns.NsHandle
}

func newSpace(t testing.TB) *space {
	t.Helper()
	s := &space{t: t}
	enterThread(func() {
		var err error
		if s.ns, err = netns.New(); err != nil {
			t.Errorf("new network namespace: %v", err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { s.ns.Close() })
	s.do(func() {
		lo, err := netlink.LinkByName("lo")
		s.must(err)
		s.must(netlink.LinkSetUp(lo))
	})
	return s
}

// onThread runs fn on a thread that ends with it, whatever fn did to it.
func enterThread(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		fn()
	}()
	<-done
}

// do runs fn on a thread in the namespace.
func (s *space) do(fn func()) {
	s.t.Helper()
	enterThread(func() {
		if err := netns.Set(s.ns); err != nil {
			s.t.Errorf("enter network namespace: %v", err)
			return
		}
		fn()
	})
	if s.t.Failed() {
		s.t.FailNow()
	}
}

func (s *space) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Error(err)
		runtime.Goexit()
	}
}

func (s *space) sysctl(name, value string) {
	s.do(func() { s.must(os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0)) })
}

func (s *space) nft(script string) {
	s.t.Helper()
	s.do(func() {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(script)
		if out, err := cmd.CombinedOutput(); err != nil {
			s.t.Errorf("nft: %v\n%s\n%s", err, out, script)
		}
	})
}

// wire joins two namespaces by a veth pair and gives both ends as links.
func wire(t testing.TB, a, b *space, nameA, nameB string) (Link, Link) {
	t.Helper()
	var macA, macB net.HardwareAddr
	var idxA, idxB int
	a.do(func() {
		a.must(netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: nameA, TxQLen: 1000}, PeerName: nameB, PeerNamespace: netlink.NsFd(b.ns),
		}))
		l, err := netlink.LinkByName(nameA)
		a.must(err)
		macA, idxA = l.Attrs().HardwareAddr, l.Attrs().Index
	})
	for _, s := range []*space{a, b} {
		s.sysctl("net.ipv6.conf.default.accept_dad", "0")
		s.sysctl("net.ipv6.conf.all.accept_dad", "0")
	}
	b.do(func() {
		l, err := netlink.LinkByName(nameB)
		b.must(err)
		macB, idxB = l.Attrs().HardwareAddr, l.Attrs().Index
		b.must(netlink.LinkSetUp(l))
	})
	a.do(func() {
		l, err := netlink.LinkByName(nameA)
		a.must(err)
		a.must(netlink.LinkSetUp(l))
	})
	return Link{Index: idxA, Name: nameA, Src: macA, Dst: macB}, Link{Index: idxB, Name: nameB, Src: macB, Dst: macA}
}

// address gives a link an address and makes its neighbours' addresses known.
func (s *space) address(l Link, prefix string, neighbours ...netip.Addr) {
	s.t.Helper()
	s.do(func() {
		dev, err := netlink.LinkByIndex(l.Index)
		s.must(err)
		a, err := netlink.ParseAddr(prefix)
		s.must(err)
		a.Flags |= unix.IFA_F_NODAD
		s.must(netlink.AddrAdd(dev, a))
		for _, n := range neighbours {
			s.must(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: l.Index, IP: n.AsSlice(), HardwareAddr: l.Dst, State: netlink.NUD_PERMANENT,
			}))
		}
	})
}

// world is a vantage, a target, and a wire between them.
type world struct {
	t               testing.TB
	vantage, target *space
	link, back      Link
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, vantage: newSpace(t), target: newSpace(t)}
	w.link, w.back = wire(t, w.vantage, w.target, "veth0", "eth0")
	w.vantage.address(w.link, "10.9.0.1/16", target4)
	w.vantage.address(w.link, "fd09::1/64", target6)
	w.target.address(w.back, "10.9.0.2/16", vantage4)
	w.target.address(w.back, "fd09::2/64", vantage6)
	return w
}

// firewall drops whatever the given rules of an input chain do not decide.
func (w *world) firewall(input ...string) {
	w.t.Helper()
	w.target.nft("table inet t {\n chain in {\n  type filter hook input priority 0; policy drop;\n" +
		"  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\n  " + strings.Join(input, "\n  ") + "\n }\n}\n")
}

func portRange(low, high int) []uint16 {
	ports := make([]uint16, 0, high-low+1)
	for p := low; p <= high; p++ {
		ports = append(ports, uint16(p))
	}
	return ports
}

// path is one over the world's wire.
func (w *world) path(v6 bool, tcp, udp []uint16, canaries ...Canary) Path {
	p := Path{Link: w.link, Src: vantage4, Dst: target4, TCP: tcp, UDP: udp, SrcPort: 61004, Canaries: canaries}
	if v6 {
		p.Src, p.Dst, p.SrcPort = vantage6, target6, 61006
	}
	return p
}

func (w *world) sweep(cfg Config) *Result {
	w.t.Helper()
	var res *Result
	w.vantage.do(func() {
		var err error
		res, err = Sweep(context.Background(), cfg)
		w.vantage.must(err)
	})
	return res
}

// listen opens TCP listeners on the target that accept nothing.
func (w *world) listen(network string, addr netip.Addr, ports ...uint16) {
	w.t.Helper()
	w.target.do(func() {
		for _, p := range ports {
			l, err := net.Listen(network, netip.AddrPortFrom(addr, p).String())
			w.target.must(err)
			w.t.Cleanup(func() { l.Close() })
		}
	})
}

// echoUDP opens UDP sockets on the target that answer every datagram.
func (w *world) echoUDP(addr netip.Addr, ports ...uint16) {
	w.t.Helper()
	w.target.do(func() {
		for _, p := range ports {
			c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, p)))
			w.target.must(err)
			w.t.Cleanup(func() { c.Close() })
			go func() {
				var buf [64]byte
				for {
					n, from, err := c.ReadFromUDPAddrPort(buf[:])
					if err != nil {
						return
					}
					_, _ = c.WriteToUDPAddrPort(append(buf[:n:n], "pong"...), from)
				}
			}()
		}
	})
}

// halfOpen counts the connections of the target that wait for a handshake to
// end.
func (w *world) halfOpen() int {
	n := 0
	w.target.do(func() {
		for _, f := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + f)
			w.target.must(err)
			for _, line := range bytes.Split(b, []byte("\n")) {
				if f := bytes.Fields(line); len(f) > 3 && string(f[3]) == "03" { // TCP_SYN_RECV
					n++
				}
			}
		}
	})
	return n
}

// want checks every answer of a list against what fn expects of its port.
func want(t testing.TB, what string, ports []uint16, got []Answer, fn func(port uint16) Answer) {
	t.Helper()
	if len(got) != len(ports) {
		t.Fatalf("%s: %d answers for %d ports", what, len(got), len(ports))
	}
	wrong := 0
	for i, p := range ports {
		if w := fn(p); got[i] != w {
			if wrong++; wrong <= 5 {
				t.Errorf("%s port %d: got %v (%v), want %v (%v)", what, p, got[i].State, got[i].Reason, w.State, w.Reason)
			}
		}
	}
	if wrong > 5 {
		t.Errorf("%s: %d wrong answers in all", what, wrong)
	}
}

func always(s State, r Reason) func(uint16) Answer {
	return func(uint16) Answer { return Answer{s, r} }
}

func (w *world) wantAlive(r *Result) {
	w.t.Helper()
	for i, p := range r.Paths {
		if !p.Alive {
			w.t.Errorf("path %d: not alive: %v", i, p.Err)
		}
	}
	if r.Bound > 1e-6 {
		w.t.Errorf("bound %g, want at most 1e-6", r.Bound)
	}
	w.t.Logf("%d packets in %v, bound %.2g, canaries lost %d of %d", r.Probes, r.Elapsed, r.Bound,
		r.Paths[0].CanariesLost, r.Paths[0].CanariesSent)
}

var (
	canary22   = Canary{Kind: CanaryTCP, Port: 22}
	canaryEcho = Canary{Kind: CanaryEcho}
)

func TestSweepSilentHost(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	all := portRange(1, 65535)
	r := w.sweep(Config{Paths: []Path{w.path(false, all, all, canary22, canaryEcho), w.path(true, all, all, canary22, canaryEcho)}})
	w.wantAlive(r)
	for _, p := range r.Paths {
		want(t, "tcp", all, p.TCP, func(port uint16) Answer {
			if port == 22 {
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
		want(t, "udp", all, p.UDP, always(Filtered, NoResponse))
	}
}

func TestSweepOpenHost(t *testing.T) {
	w := newWorld(t)
	all := portRange(1, 65535)
	r := w.sweep(Config{Paths: []Path{w.path(false, all, nil, canaryEcho), w.path(true, all, nil, canaryEcho)}})
	w.wantAlive(r)
	for _, p := range r.Paths {
		want(t, "tcp", all, p.TCP, always(Closed, TCPReset))
	}
}

func TestSweepListenersAmongSilence(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 5000-5299 accept", "udp dport { 53, 123 } accept", "icmp type echo-request accept", "icmpv6 type echo-request accept")
	listeners := portRange(5000, 5299)
	for _, a := range []netip.Addr{target4, target6} {
		w.listen("tcp", a, listeners...)
		w.echoUDP(a, 53)
	}
	all := portRange(1, 65535)
	udp := portRange(1, 2000)
	r := w.sweep(Config{Paths: []Path{
		w.path(false, all, udp, Canary{CanaryTCP, 5000}), w.path(true, all, udp, canaryEcho),
	}})
	w.wantAlive(r)
	for _, p := range r.Paths {
		want(t, "tcp", all, p.TCP, func(port uint16) Answer {
			if port >= 5000 && port < 5300 {
				return Answer{Open, SynAck}
			}
			return Answer{Filtered, NoResponse}
		})
		want(t, "udp", udp, p.UDP, func(port uint16) Answer {
			switch port {
			case 53:
				return Answer{Open, UDPAnswer}
			case 123:
				return Answer{Closed, PortUnreachable}
			}
			return Answer{Filtered, NoResponse}
		})
	}
	if n := w.halfOpen(); n != 0 {
		t.Errorf("%d half-open connections left on the target", n)
	}
}

func TestSweepRejects(t *testing.T) {
	w := newWorld(t)
	// Linux sends so many ICMP errors at once and then one a second.
	w.target.sysctl("net.ipv4.icmp_ratelimit", "0")
	w.target.sysctl("net.ipv6.icmp.ratelimit", "0")
	cases := []struct {
		four, six string
		reason4   Reason
		reason6   Reason
	}{
		{"admin-prohibited", "admin-prohibited", AdminProhibited, AdminProhibited},
		{"host-prohibited", "policy-fail", AdminProhibited, AdminProhibited},
		{"net-prohibited", "reject-route", AdminProhibited, AdminProhibited},
		{"host-unreachable", "addr-unreachable", HostUnreachable, HostUnreachable},
		{"net-unreachable", "no-route", NetUnreachable, NetUnreachable},
		{"prot-unreachable", "no-route", ProtoUnreachable, NetUnreachable},
		{"port-unreachable", "port-unreachable", PortUnreachable, PortUnreachable},
	}
	var in []string
	var ports []uint16
	for i, c := range cases {
		port := uint16(100 + i)
		ports = append(ports, port)
		in = append(in,
			fmt.Sprintf("meta nfproto ipv4 meta l4proto {tcp, udp} th dport %d reject with icmp type %s", port, c.four),
			fmt.Sprintf("meta nfproto ipv6 meta l4proto {tcp, udp} th dport %d reject with icmpv6 type %s", port, c.six))
	}
	ports = append(ports, 200, 201)
	in = append(in, "tcp dport 200 reject with tcp reset", "tcp dport 22 accept")
	w.firewall(in...)
	r := w.sweep(Config{Paths: []Path{w.path(false, ports, ports, canary22), w.path(true, ports, ports, canary22)}})
	w.wantAlive(r)
	for i, p := range r.Paths {
		expect := func(port uint16, udp bool) Answer {
			if port == 200 && !udp {
				return Answer{Closed, TCPReset}
			}
			if port >= 200 {
				return Answer{Filtered, NoResponse}
			}
			reason := cases[port-100].reason4
			if i == 1 {
				reason = cases[port-100].reason6
			}
			if udp && reason == PortUnreachable {
				return Answer{Closed, reason}
			}
			return Answer{Rejected, reason}
		}
		want(t, fmt.Sprint("tcp path ", i), ports, p.TCP, func(port uint16) Answer { return expect(port, false) })
		want(t, fmt.Sprint("udp path ", i), ports, p.UDP, func(port uint16) Answer { return expect(port, true) })
		if len(p.From) > 0 {
			t.Errorf("path %d: answers from others than the target: %v", i, p.From)
		}
	}
}

// responder answers frames on the target's wire by hand.
func (w *world) responder(fn func(b []byte, send func([]byte))) {
	w.t.Helper()
	var fd int
	w.target.do(func() {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		w.target.must(err)
		w.target.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
		w.target.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20000}))
		w.target.must(unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: w.back.Index, Protocol: htons(unix.ETH_P_ALL)}))
	})
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		buf := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, err := unix.Read(fd, buf)
			if err != nil {
				continue
			}
			fn(buf[:n], func(f []byte) { _, _ = unix.Write(fd, f) })
		}
	}()
	w.t.Cleanup(func() {
		close(stop)
		<-ended
		unix.Close(fd)
	})
}

// reverse is the path as the target sees it, to build answers with.
func (w *world) reverse(v6 bool) *Path {
	p := w.path(v6, nil, nil)
	p.Link, p.Src, p.Dst = w.back, p.Dst, p.Src
	return &p
}

// segment is a TCP segment from the target.
func segment(p *Path, sport, dport uint16, ack uint32, flags byte) []byte {
	h := make([]byte, tcpLen)
	h[12] = tcpLen / 4 << 4
	h[8], h[9], h[10], h[11] = byte(ack>>24), byte(ack>>16), byte(ack>>8), byte(ack)
	h[tcpFlags] = flags
	t := newTemplate(p, rules.TCP, h)
	b := make([]byte, maxFrame)
	return b[:t.tcp(b, sport, dport, 1)]
}

// newRoutedWorld has a router between vantage and target that rejects port 100,
// drops 101/tcp, and whose addresses are 10.9.0.254 and fd09::fe. It gives the
// target's addresses.
func newRoutedWorld(t *testing.T) (w *world, up Link, far4, far6 netip.Addr) {
	t.Helper()
	vantage, router, target := newSpace(t), newSpace(t), newSpace(t)
	var down Link
	up, down = wire(t, vantage, router, "veth0", "lan")
	out, in := wire(t, router, target, "wan", "eth0")
	for _, s := range []string{"net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"} {
		router.sysctl(s, "1")
	}
	router.sysctl("net.ipv4.icmp_ratelimit", "0")
	router.sysctl("net.ipv6.icmp.ratelimit", "0")
	vantage.address(up, "10.9.0.1/24")
	vantage.address(up, "fd09::1/64")
	router.address(down, "10.9.0.254/24", vantage4)
	router.address(down, "fd09::fe/64", vantage6)
	far4, far6 = netip.MustParseAddr("10.8.0.2"), netip.MustParseAddr("fd08::2")
	near4, near6 := netip.MustParseAddr("10.8.0.254"), netip.MustParseAddr("fd08::fe")
	router.address(out, "10.8.0.254/24", far4)
	router.address(out, "fd08::fe/64", far6)
	target.address(in, "10.8.0.2/24", near4)
	target.address(in, "fd08::2/64", near6)
	target.do(func() {
		for _, gw := range []netip.Addr{near4, near6} {
			target.must(netlink.RouteAdd(&netlink.Route{LinkIndex: in.Index, Gw: gw.AsSlice()}))
		}
	})
	router.nft(`table inet t { chain f {
		type filter hook forward priority 0; policy accept;
		th dport 100 meta nfproto ipv4 reject with icmp type host-prohibited
		th dport 100 meta nfproto ipv6 reject with icmpv6 type no-route
		tcp dport 101 drop
	}
	}`)
	return &world{t: t, vantage: vantage, target: target}, up, far4, far6
}

func TestSweepErrorsFromRouter(t *testing.T) {
	w, up, far4, far6 := newRoutedWorld(t)
	ports := []uint16{100, 101, 102}
	paths := []Path{
		{Link: up, Src: vantage4, Dst: far4, TCP: ports, UDP: ports, SrcPort: 61004, Canaries: []Canary{canaryEcho}},
		{Link: up, Src: vantage6, Dst: far6, TCP: ports, SrcPort: 61006, Canaries: []Canary{canaryEcho}},
	}
	r := w.sweep(Config{Paths: paths})
	w.wantAlive(r)
	routers := []netip.Addr{netip.MustParseAddr("10.9.0.254"), netip.MustParseAddr("fd09::fe")}
	for i, p := range r.Paths {
		want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
			return []Answer{{Unknown, RouterError}, {Filtered, NoResponse}, {Closed, TCPReset}}[port-100]
		})
		if got := p.From[Target{rules.TCP, 100}]; got != routers[i] {
			t.Errorf("path %d: error from %v, want %v", i, got, routers[i])
		}
	}
	if a := r.Paths[0].UDP[0]; a != (Answer{Unknown, RouterError}) {
		t.Errorf("udp port 100: %v", a)
	}
}

// lossy drops a share of what comes in and goes out, before anything else sees
// it.
func (w *world) lossy(in, out int) {
	w.target.nft(fmt.Sprintf(`table inet loss {
		chain in { type filter hook prerouting priority -500; numgen random mod 100 < %d drop; }
		chain out { type filter hook postrouting priority 500; numgen random mod 100 < %d drop; }
	}`, in, out))
}

func TestSweepLossyLine(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 5000-5099 accept", "tcp dport 6000-8000 accept", "udp dport 53 accept", "icmp type echo-request accept")
	w.listen("tcp", target4, portRange(5000, 5099)...)
	w.echoUDP(target4, 53)
	w.lossy(7, 3)
	all := portRange(1, 65535)
	udp := portRange(1, 500)
	r := w.sweep(Config{Paths: []Path{w.path(false, all, udp, Canary{CanaryTCP, 5000}, canaryEcho)}})
	w.wantAlive(r)
	p := r.Paths[0]
	want(t, "tcp", all, p.TCP, func(port uint16) Answer {
		switch {
		case port >= 5000 && port < 5100:
			return Answer{Open, SynAck}
		case port >= 6000 && port <= 8000:
			return Answer{Closed, TCPReset}
		}
		return Answer{Filtered, NoResponse}
	})
	want(t, "udp", udp, p.UDP, func(port uint16) Answer {
		if port == 53 {
			return Answer{Open, UDPAnswer}
		}
		return Answer{Filtered, NoResponse}
	})
	if p.CanariesLost == 0 {
		t.Error("no canary got lost: the line was not lossy")
	}
	if r.Elapsed > time.Minute {
		t.Errorf("took %v: random loss must not slow the run down", r.Elapsed)
	}
}

// plug sets an end of the wire up or down.
func (s *space) plug(l Link, up bool) {
	s.do(func() {
		dev, err := netlink.LinkByIndex(l.Index)
		s.must(err)
		if up {
			s.must(netlink.LinkSetUp(dev))
			return
		}
		s.must(netlink.LinkSetDown(dev))
	})
}

// mute drops everything on the target, or nothing: an outage that the vantage's
// own interface does not notice.
func (w *world) mute(on bool) {
	if on {
		w.target.nft("table inet mute { chain in { type filter hook prerouting priority -600; policy drop; }; }")
		return
	}
	w.target.nft("delete table inet mute")
}

func TestSweepOutage(t *testing.T) {
	type outage struct {
		name string
		set  func(w *world, out bool)
	}
	kinds := []outage{
		{"cable", func(w *world, out bool) { w.target.plug(w.back, !out) }},
		{"own interface", func(w *world, out bool) { w.vantage.plug(w.link, !out) }},
		{"silent", func(w *world, out bool) { w.mute(out) }},
	}
	for _, k := range kinds {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/back=%v", k.name, back), func(t *testing.T) {
				w := newWorld(t)
				// Listeners on every 16th port: some fall into any dead window.
				w.firewall("tcp dport 22 accept", "tcp dport & 0xf == 7 accept")
				all := portRange(1, 65535)
				done := make(chan struct{})
				go func() {
					defer close(done)
					time.Sleep(150 * time.Millisecond)
					k.set(w, true)
					if back {
						time.Sleep(700 * time.Millisecond)
						k.set(w, false)
					}
				}()
				r := w.sweep(Config{Paths: []Path{w.path(false, all, all[:1000], canary22)}, MaxRate: 150000})
				<-done
				p := r.Paths[0]
				t.Logf("%d packets in %v, bound %.2g, err %v", r.Probes, r.Elapsed, r.Bound, p.Err)
				if !back {
					if p.Alive || r.Bound != 1 {
						t.Errorf("alive %v, bound %g after the cable was pulled", p.Alive, r.Bound)
					}
					for i, a := range append(p.TCP, p.UDP...) {
						if a.State == Filtered {
							t.Fatalf("answer %d: %v on a dead path", i, a)
						}
					}
					return
				}
				w.wantAlive(r)
				want(t, "tcp", all, p.TCP, func(port uint16) Answer {
					if port == 22 || port&0xf == 7 {
						return Answer{Closed, TCPReset}
					}
					return Answer{Filtered, NoResponse}
				})
			})
		}
	}
}

// An intrusion prevention that shuts the vantage out amid the scan makes every
// port silent. That is no filter of any port.
func TestSweepShutOut(t *testing.T) {
	for _, after := range []int{300, 30000, 70000} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			w := newWorld(t)
			w.target.nft(fmt.Sprintf(`table inet ips {
				set out { type ipv4_addr; flags dynamic; timeout 10m; size 1024; }
				chain in {
					type filter hook prerouting priority -200;
					ip saddr @out drop
					tcp flags syn limit rate over 1/hour burst %d packets add @out { ip saddr } drop
				}
			}`, after))
			w.firewall("tcp dport 22 accept", "tcp dport & 0xf == 7 accept")
			all := portRange(1, 65535)
			r := w.sweep(Config{Paths: []Path{w.path(false, all, nil, canary22)}})
			p := r.Paths[0]
			t.Logf("%d packets in %v, canaries lost %d of %d", r.Probes, r.Elapsed, p.CanariesLost, p.CanariesSent)
			if p.Alive || r.Bound != 1 {
				t.Errorf("alive %v, bound %g", p.Alive, r.Bound)
			}
			for i, a := range p.TCP {
				if a.State != Unknown && a != (Answer{Closed, TCPReset}) {
					t.Fatalf("port %d: %v (%v)", i+1, a.State, a.Reason)
				}
			}
		})
	}
}

// Answers must not be taken for those of a flow of the vantage's own, nor the
// other way round: no source port is one that the kernel hands out.
func TestSourcePortsAreNobodyElses(t *testing.T) {
	low, high := uint16(32768), uint16(60999) // ip_local_port_range, where nobody changed it
	tuples := newTCPTuples(rand.New(rand.NewPCG(5, 6)))
	for i := range canaryPorts {
		if p := tuples.port(i); p >= low && p <= high {
			t.Fatalf("canary port %d is one of %d-%d", p, low, high)
		}
	}
	fresh, again := freshPorts(), freshPorts()
	if slices.Equal(fresh[:8], again[:8]) {
		t.Error("two runs use the same source ports")
	}
	for _, p := range fresh {
		if p >= low && p <= high || p >= canaryPortLow && p <= canaryPortHigh {
			t.Fatalf("source port %d is the kernel's or the canaries'", p)
		}
	}
}

func TestSweepUnprovenPath(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 80 accept")
	w.listen("tcp", target4, 80)
	ports := portRange(1, 1000)
	for _, c := range []struct {
		name     string
		canaries []Canary
		sent     uint64
	}{
		{"no canary", nil, 2*999 + 1},
		{"none answers", []Canary{canary22, canaryEcho}, 1000},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := w.sweep(Config{Paths: []Path{w.path(false, ports, ports, c.canaries...)}})
			p := r.Paths[0]
			want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
				if port == 80 {
					return Answer{Open, SynAck}
				}
				return Answer{Unknown, PathNotProven}
			})
			want(t, "udp", ports, p.UDP, always(Unknown, PathNotProven))
			if p.Alive || r.Bound != 1 {
				t.Errorf("alive %v, bound %g without a canary", p.Alive, r.Bound)
			}
			if p.SentTCP != c.sent {
				t.Errorf("sent %d TCP probes, want %d", p.SentTCP, c.sent)
			}
		})
	}
}

func TestSweepManyPaths(t *testing.T) {
	w := newWorld(t)
	w.firewall("ip saddr 10.9.1.0/25 tcp dport { 80, 443 } accept", "tcp dport 22 accept")
	const n = 500
	ports := []uint16{79, 80, 81, 443, 8080}
	var paths []Path
	var sources []netip.Addr
	for i := range n {
		src := netip.AddrFrom4([4]byte{10, 9, byte(1 + i/250), byte(i % 250)})
		sources = append(sources, src)
		paths = append(paths, Path{
			Link: w.link, Src: src, Dst: target4, TCP: ports, UDP: ports[:2],
			SrcPort: uint16(61000 + i), Canaries: []Canary{canary22},
		})
	}
	w.target.do(func() {
		for _, s := range sources {
			w.target.must(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: w.back.Index, IP: s.AsSlice(), HardwareAddr: w.link.Src, State: netlink.NUD_PERMANENT,
			}))
		}
	})
	r := w.sweep(Config{Paths: paths})
	w.wantAlive(r)
	allowed := netip.MustParsePrefix("10.9.1.0/25")
	for i, p := range r.Paths {
		want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
			if (port == 80 || port == 443) && allowed.Contains(sources[i]) {
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
		want(t, "udp", ports[:2], p.UDP, always(Filtered, NoResponse))
	}
	t.Logf("500 paths in %v", r.Elapsed)
}

func TestSweepDeadPathAmongLiveOnes(t *testing.T) {
	w := newWorld(t)
	w.firewall("ip saddr 10.9.2.0/24 drop", "tcp dport { 22, 80 } accept")
	ports := []uint16{79, 80}
	var paths []Path
	w.target.do(func() {
		for i := range 40 {
			src := netip.AddrFrom4([4]byte{10, 9, byte(1 + i%2), byte(10 + i)})
			p := w.path(false, ports, nil, canary22)
			p.Src, p.SrcPort = src, uint16(61000+i)
			paths = append(paths, p)
			w.target.must(netlink.NeighSet(&netlink.Neigh{
				LinkIndex: w.back.Index, IP: src.AsSlice(), HardwareAddr: w.link.Src, State: netlink.NUD_PERMANENT,
			}))
		}
	})
	r := w.sweep(Config{Paths: paths})
	for i, p := range r.Paths {
		if p.Alive != (i%2 == 0) {
			t.Errorf("path %d: alive %v", i, p.Alive)
		}
		want(t, fmt.Sprint("path ", i), ports, p.TCP, func(port uint16) Answer {
			switch {
			case i%2 == 1:
				return Answer{Unknown, PathNotProven}
			case port == 80:
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
	}
	if r.Bound > 1e-6 {
		t.Errorf("bound %g", r.Bound)
	}
}

// Answers may come back over another link than their probes left by, and one
// run may have paths over several.
func TestSweepTwoLinks(t *testing.T) {
	w := newWorld(t)
	second, secondBack := wire(t, w.vantage, w.target, "veth1", "eth1")
	for _, dev := range []string{"all", "eth0", "eth1"} {
		w.target.sysctl("net.ipv4.conf."+dev+".rp_filter", "0")
	}
	src := netip.MustParseAddr("10.77.0.1")
	w.target.do(func() {
		w.target.must(netlink.RouteAdd(&netlink.Route{
			LinkIndex: secondBack.Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: src.AsSlice(), Mask: net.CIDRMask(32, 32)},
		}))
		w.target.must(netlink.NeighSet(&netlink.Neigh{
			LinkIndex: secondBack.Index, IP: src.AsSlice(), HardwareAddr: second.Src, State: netlink.NUD_PERMANENT,
		}))
	})
	w.firewall(`iifname "eth0" tcp dport 100-199 accept`, `iifname "eth1" tcp dport 200-299 accept`, "icmp type echo-request accept")
	ports := portRange(1, 1000)
	over0, over1 := w.path(false, ports, nil, canaryEcho), w.path(false, ports, nil, canaryEcho)
	over0.Src, over1.Src = src, src
	over1.Link, over1.SrcPort = second, 61005
	r := w.sweep(Config{Paths: []Path{over0, over1}})
	w.wantAlive(r)
	for i, p := range r.Paths {
		want(t, fmt.Sprint("link ", i), ports, p.TCP, func(port uint16) Answer {
			if int(port)/100 == i+1 {
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
	}
}

func TestRingCountsDrops(t *testing.T) {
	w := newWorld(t)
	paths := []Path{w.path(false, nil, nil)}
	filter, err := answerFilter(paths)
	if err != nil {
		t.Fatal(err)
	}
	var r *ring
	w.vantage.do(func() {
		r, err = openRing(filter)
		w.vantage.must(err)
	})
	defer r.close()
	const frames = 300000
	w.target.do(func() {
		l, err := openLink(w.back)
		w.target.must(err)
		defer l.close()
		rev, b := udpTemplate(w.reverse(false)), newBatch()
		for i := range frames {
			b.add(rev.udp(b.next(), uint16(i), paths[0].SrcPort))
			if b.n == batchSize {
				if _, err := b.send(l, stallLimit); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	var lost int // on the wire, since a processor had no room for more
	w.target.do(func() {
		l, err := netlink.LinkByIndex(w.back.Index)
		w.target.must(err)
		lost = int(l.Attrs().Statistics.TxDropped)
	})
	got, drops := 0, 0
	for until := time.Now().Add(5 * time.Second); got+drops+lost < frames-batchSize && time.Now().Before(until); time.Sleep(5 * time.Millisecond) {
		for r.block(func(p []byte, _ int64) {
			var a reply
			if parseReply(p, &a) && a.kind == replyUDP {
				got++
			}
		}) {
		}
		n, err := r.drops()
		if err != nil {
			t.Fatal(err)
		}
		drops += n
	}
	if drops == 0 || got+drops+lost < frames-batchSize || got < 20000 {
		t.Errorf("read %d, dropped %d, lost before that %d, of %d", got, drops, lost, frames)
	}
	if again, _ := r.drops(); again != 0 {
		t.Errorf("%d drops counted twice", again)
	}
}

// What our own ring lost is no silence.
func TestTaintedWindowsProveNothing(t *testing.T) {
	e := &engine{pools: []*pool{new(pool)}}
	p := &sweepPath{Path: &Path{}, pool: e.pools[0], proven: true}
	f := newFlow(p, rules.TCP, []uint16{1, 2})
	p.tcpFlow = f
	e.paths, e.flows = []*sweepPath{p}, []*flow{f}
	p.windows = []*window{{sent: 200, got: 200, last: 1000}, {sent: 200, got: 200, last: 2000}}
	f.window[0], f.window[1] = 1, 2
	e.taint(1500)
	e.judge([]sweepProbe{newSweepProbe(0, 0), newSweepProbe(0, 1)})
	if f.good[0] != 1 {
		t.Errorf("before the drops: %d good probes", f.good[0])
	}
	if f.good[1] != 0 {
		t.Errorf("amid the drops: %d good probes", f.good[1])
	}
	if !e.lossSeen {
		t.Error("drops are no loss")
	}
}

func TestSweepTinyPath(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	r := w.sweep(Config{Paths: []Path{w.path(true, []uint16{80, 443}, nil, canary22)}})
	w.wantAlive(r)
	want(t, "tcp", []uint16{80, 443}, r.Paths[0].TCP, always(Filtered, NoResponse))
	if n := r.Paths[0].CanariesSent; n > 150 {
		t.Errorf("%d canaries for two ports", n)
	}
}

func TestSweepTwoPathsOfOnePair(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept", "tcp sport 53 accept")
	ports := portRange(1, 300)
	a, b := w.path(false, ports, nil, canary22), w.path(false, ports, nil, canary22)
	b.SrcPort = 53
	r := w.sweep(Config{Paths: []Path{a, b}})
	w.wantAlive(r)
	want(t, "usual source port", ports, r.Paths[0].TCP, func(port uint16) Answer {
		if port == 22 {
			return Answer{Closed, TCPReset}
		}
		return Answer{Filtered, NoResponse}
	})
	want(t, "source port 53", ports, r.Paths[1].TCP, always(Closed, TCPReset))
}

func TestSweepCanaryOutOfTuples(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	w.lossy(20, 0)
	all := portRange(1, 65535)
	r := w.sweep(Config{Paths: []Path{w.path(false, all, nil, canary22)}})
	p := r.Paths[0]
	if !p.Alive || p.CanariesSent > canaryPorts {
		t.Errorf("alive %v, %d canaries of %d tuples", p.Alive, p.CanariesSent, canaryPorts)
	}
	t.Logf("%d packets in %v, bound %.2g, canaries lost %d of %d", r.Probes, r.Elapsed, r.Bound, p.CanariesLost, p.CanariesSent)
	want(t, "tcp", all, p.TCP, func(port uint16) Answer {
		if port == 22 {
			return Answer{Closed, TCPReset}
		}
		return Answer{Filtered, NoResponse}
	})
}

func TestSweepLimitedCanary(t *testing.T) {
	w := newWorld(t)
	w.firewall("icmp type echo-request limit rate 50/second accept", "tcp dport 22 accept")
	all := portRange(1, 20000)
	r := w.sweep(Config{Paths: []Path{w.path(false, all, nil, canaryEcho, canary22)}})
	w.wantAlive(r)
	if r.Elapsed > time.Minute { // every probe at the pace of the limit would take longer
		t.Errorf("took %v: a limited canary must give way to a better one", r.Elapsed)
	}
}

func TestSweepMaxRate(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	ports := portRange(1, 500)
	r := w.sweep(Config{Paths: []Path{w.path(false, ports, nil, canary22)}, MaxRate: 2000})
	w.wantAlive(r)
	if rate := float64(r.Probes) / r.Elapsed.Seconds(); rate > 2200 {
		t.Errorf("sent %.0f packets a second, allowed were 2000", rate)
	}
}

func TestSweepCancel(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	all := portRange(1, 65535)
	before := runtime.NumGoroutine()
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 200 * time.Millisecond} {
		for _, rate := range []int{0, 20} {
			ctx, cancel := context.WithCancel(context.Background())
			sent := func() (n uint64) {
				w.vantage.do(func() {
					l, err := netlink.LinkByIndex(w.link.Index)
					w.vantage.must(err)
					n = l.Attrs().Statistics.TxPackets
				})
				return n
			}
			soon := make(chan uint64, 1)
			time.AfterFunc(after, func() {
				cancel()
				time.Sleep(time.Second) // a busy machine may be late, an engine that goes on is not
				soon <- sent()
			})
			w.vantage.do(func() {
				r, err := Sweep(ctx, Config{Paths: []Path{w.path(false, all, all, canary22)}, MaxRate: rate})
				if !errors.Is(err, context.Canceled) || r != nil {
					t.Errorf("after %v: got %v, %v", after, r, err)
				}
			})
			n := <-soon
			if late := sent() - n; late > 0 {
				t.Errorf("after %v, rate %d: %d packets sent more than a second late", after, rate, late)
			}
		}
	}
	time.Sleep(20 * time.Millisecond)
	if n := runtime.NumGoroutine(); n > before {
		t.Errorf("%d goroutines, %d before", n, before)
	}
}

func TestSweepRefuses(t *testing.T) {
	w := newWorld(t)
	good := func() Path { return w.path(false, []uint16{1}, nil, canary22) }
	for _, c := range []struct {
		name   string
		change func(p *Path)
		want   string
	}{
		{"families", func(p *Path) { p.Src = vantage6 }, "one family"},
		{"no address", func(p *Path) { p.Dst = netip.Addr{} }, "one family"},
		{"multicast", func(p *Path) { p.Dst = netip.MustParseAddr("224.0.0.1") }, "no address of a host"},
		{"no MAC", func(p *Path) { p.Link.Dst = nil }, "Ethernet"},
		{"source port", func(p *Path) { p.SrcPort = 2000 }, "source port 2000"},
		{"order", func(p *Path) { p.TCP = []uint16{2, 2} }, "ascend"},
		{"index", func(p *Path) { p.Link.Index = 999 }, "interface veth0, index 999"},
		{"name", func(p *Path) { p.Link.Name = "eth9" }, "belongs to veth0"},
		{"down", func(p *Path) { p.Link.Index, p.Link.Name = 0, "" }, "interface"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := good()
			c.change(&p)
			w.vantage.do(func() {
				_, err := Sweep(context.Background(), Config{Paths: []Path{p}})
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
			})
		})
	}
	t.Run("link down", func(t *testing.T) {
		w.vantage.plug(w.link, false)
		w.vantage.do(func() {
			if _, err := Sweep(context.Background(), Config{Paths: []Path{good()}}); !errors.Is(err, unix.ENETDOWN) {
				t.Errorf("got %v, want ENETDOWN", err)
			}
		})
	})
	t.Run("no capability", func(t *testing.T) {
		w.vantage.do(func() {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var none [2]unix.CapUserData
			w.vantage.must(unix.Capset(&hdr, &none[0]))
			if _, err := Sweep(context.Background(), Config{Paths: []Path{good()}}); !errors.Is(err, unix.EPERM) {
				t.Errorf("got %v, want EPERM", err)
			}
		})
	})
}

func benchmarkSweep(b *testing.B, v6, udp bool) {
	w := newWorld(b)
	w.firewall("tcp dport 22 accept")
	all := portRange(1, 65535)
	paths := []Path{w.path(false, all, nil, canary22)}
	if v6 {
		paths = append(paths, w.path(true, all, nil, canary22))
	}
	ports := 0
	for i := range paths {
		if udp {
			paths[i].UDP = all
		}
		ports += len(paths[i].TCP) + len(paths[i].UDP)
	}
	var spent time.Duration
	var packets uint64
	b.ResetTimer()
	for range b.N {
		r := w.sweep(Config{Paths: paths})
		for _, p := range r.Paths {
			if !p.Alive {
				b.Fatal("path not alive")
			}
		}
		spent += r.Elapsed
		packets += r.Probes
	}
	b.ReportMetric(float64(ports*b.N)/spent.Seconds(), "ports/s")
	b.ReportMetric(float64(packets)/spent.Seconds(), "packets/s")
}

func BenchmarkSweepSilentTCP(b *testing.B) { benchmarkSweep(b, false, false) }
func BenchmarkSweepSilentAll(b *testing.B) { benchmarkSweep(b, true, true) }
