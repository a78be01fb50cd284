package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// peer is a machine at the other end of a wire whose own kernel speaks: flows with
// it are real ones, with windows, timers and retransmissions.
type peer struct {
	*wire
	ns     *os.File
	link   verify.Link
	socket int // AF_PACKET
}

// peer puts a machine with these addresses at the end of a link of the host. The
// wire cannot send by that link any more.
func (w *wire) peer(link string, addrs ...string) *peer {
	w.Helper()
	p := &peer{wire: w, link: w.Link(link), socket: -1}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends in the new namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			p.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		made <- err
	}()
	if err := <-made; err != nil {
		w.Fatalf("peer: %v", err)
	}
	w.Cleanup(func() {
		unix.Close(p.socket)
		p.ns.Close()
	})
	if err := netlink.LinkSetNsFd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: p.link.Index}}, int(p.ns.Fd())); err != nil {
		w.Fatalf("peer: %v", err)
	}
	p.in(func() error { return p.build(addrs) })
	return p
}

func (p *peer) build(addrs []string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	l, err := netlink.LinkByName(p.link.Name)
	if err != nil {
		return err
	}
	p.link.Index = l.Attrs().Index
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(l)); err != nil {
		return err
	}
	for _, a := range addrs {
		addr := netip.MustParseAddr(a)
		n := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
		if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	for gateway, everything := range map[string]string{"169.254.0.1": "0.0.0.0/0", "fe80::1": "::/0"} {
		_, to, err := net.ParseCIDR(everything)
		if err != nil {
			return err
		}
		gw := net.ParseIP(gateway)
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: p.link.Index, State: netlink.NUD_PERMANENT, IP: gw, HardwareAddr: p.link.Dst}); err != nil {
			return err
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: p.link.Index, Dst: to, Gw: gw, Flags: int(netlink.FLAG_ONLINK)}); err != nil {
			return err
		}
	}
	p.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	return err
}

// in runs fn in the peer.
func (p *peer) in(fn func() error) {
	p.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread has left its namespace
		if err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- fn()
	}()
	if err := <-done; err != nil {
		p.Fatalf("peer: %v", err)
	}
}

// inject puts a packet on the wire past the peer's kernel.
func (p *peer) inject(k *packet) {
	p.Helper()
	if err := unix.Sendto(p.socket, frame(p.link, k.bytes()), 0, &unix.SockaddrLinklayer{Ifindex: p.link.Index}); err != nil {
		p.Fatalf("inject: %v", err)
	}
}

// flow is a connection between the host and a machine outside.
type flow struct {
	what        string
	host, peer  net.Conn
	hostBegan   bool
	hostAtFirst bool // the host is the first to speak again
}

// side is where a socket is made: (*wire).inHost or (*peer).in.
type side func(func() error)

// reuse lets several sockets have one port.
func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}), err)
}

// listenTCP listens until the test ends.
func listenTCP(t testing.TB, at side, port uint16) net.Listener {
	t.Helper()
	var l net.Listener
	at(func() error {
		var err error
		lc := net.ListenConfig{Control: reuse}
		l, err = lc.Listen(t.Context(), "tcp", fmt.Sprintf("[::]:%d", port))
		return err
	})
	t.Cleanup(func() { l.Close() })
	return l
}

// connect makes a TCP flow to a listener.
func connect(t testing.TB, at side, l net.Listener, from, to netip.AddrPort) (near, far net.Conn) {
	t.Helper()
	at(func() error {
		d := net.Dialer{Timeout: patience, LocalAddr: net.TCPAddrFromAddrPort(from), Control: reuse}
		var err error
		near, err = d.Dial("tcp", to.String())
		return err
	})
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatalf("accept: %v", err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	return near, far
}

// datagrams makes a UDP socket that talks with one address alone.
func datagrams(t testing.TB, at side, from, to netip.AddrPort) net.Conn {
	t.Helper()
	var c net.Conn
	at(func() error {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(from), Control: reuse}
		var err error
		c, err = d.Dial("udp", to.String())
		return err
	})
	t.Cleanup(func() { c.Close() })
	return c
}

const token = "word"

// speaks sends a word from one end.
func speaks(t testing.TB, from net.Conn) {
	t.Helper()
	if _, err := from.Write([]byte(token)); err != nil {
		t.Errorf("write: %v", err)
	}
}

// hears waits for a word at one end.
func hears(to net.Conn, within time.Duration) bool {
	b := make([]byte, len(token))
	if err := to.SetReadDeadline(time.Now().Add(within)); err != nil {
		return false
	}
	n := 0
	for n < len(b) {
		k, err := to.Read(b[n:])
		if err != nil {
			return false
		}
		n += k
	}
	return true
}

// talks sends a word each way and reports whether both arrived.
func talks(t testing.TB, first, second net.Conn) bool {
	t.Helper()
	speaks(t, first)
	if !hears(second, patience) {
		return false
	}
	speaks(t, second)
	return hears(first, patience)
}

// until waits for something to come true.
func until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(3 * patience); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func (w *wire) counter(name string) int {
	w.Helper()
	return w.readTable("deadlight").counters[name]
}

// areCut wants that nothing which the peers send reaches the host's ends any more:
// the gate drops it, and drops it when it comes again.
func (w *wire) areCut(t testing.TB, list ...flow) {
	t.Helper()
	before := w.counter("c_dropped")
	for _, f := range list {
		speaks(t, f.peer)
		if _, tcp := f.peer.(*net.TCPConn); !tcp {
			speaks(t, f.peer)
		}
	}
	until(t, "what the peers sent to be dropped", func() bool { return w.counter("c_dropped") >= before+2*len(list) })
	for _, f := range list {
		if hears(f.host, 20*time.Millisecond) {
			t.Errorf("%s: the peer came through", f.what)
		}
	}
}

// tupleOf is a flow as the peer's end sees it.
func tupleOf(t testing.TB, p rules.Protocol, c net.Conn) tuple {
	t.Helper()
	parse := func(a net.Addr) netip.AddrPort {
		ap, err := netip.ParseAddrPort(a.String())
		if err != nil {
			t.Fatal(err)
		}
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return tuple{p, parse(c.LocalAddr()), parse(c.RemoteAddr())}
}

// control runs fn on the descriptor of a connection.
func control(t testing.TB, c net.Conn, fn func(fd int) error) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := errors.Join(raw.Control(func(fd uintptr) { failed = fn(int(fd)) }), failed); err != nil {
		t.Fatal(err)
	}
}

// reset gives the reset that the peer's kernel would send for a connection, which
// goes on living.
func reset(t testing.TB, c net.Conn) *packet {
	t.Helper()
	const on, off, sendQueue = 1, -1, 2 // uapi/linux/tcp.h; off without a window probe
	flow := tupleOf(t, rules.TCP, c)
	p := &packet{Packet: rules.Packet{Src: flow.src.Addr(), Dst: flow.dst.Addr(), Protocol: rules.TCP, SrcPort: flow.src.Port(), DstPort: flow.dst.Port()}, flags: rst}
	control(t, c, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, on); err != nil {
			return err
		}
		err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, sendQueue)
		seq, get := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		p.seq = uint32(seq)
		return errors.Join(err, get, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, off))
	})
	return p
}

// unacknowledged is how many bytes an end has sent in vain.
func unacknowledged(t testing.TB, c net.Conn) int {
	t.Helper()
	var n int
	control(t, c, func(fd int) error {
		var err error
		n, err = unix.IoctlGetInt(fd, unix.TIOCOUTQ)
		return err
	})
	return n
}

// both are the addresses of a machine and of what it talks with, in each family.
type both struct {
	family     string
	peer, host netip.Addr
}

func families() []both {
	return []both{
		{"IPv4", netip.MustParseAddr(stranger4), host4},
		{"IPv6", netip.MustParseAddr(stranger6), host6},
	}
}

// withoutCure is the ruleset without the rules that keep a flow from coming back.
func withoutCure(rs *rules.Ruleset) *rules.Ruleset {
	for i := range rs.Table.Chains {
		ch := &rs.Table.Chains[i]
		var kept []rules.Rule
		for _, r := range ch.Rules {
			if !strings.Contains(r.NFT(), "c_reversed") {
				kept = append(kept, r)
			}
		}
		ch.Rules = kept
	}
	return rs
}

// A stranger whose port was closed resets the flow: the gate drops the reset, but
// conntrack forgets the flow, and the server's next retransmission enters it anew
// as begun by the host. The rule against it holds for the host's own services, for
// containers and for a port that closed by an expiry; without it the flow is back.
func TestForgottenFlowsStayClosed(t *testing.T) {
	for name, cured := range map[string]bool{"with the rule": true, "without": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testEscape(t, cured)
		})
	}
}

func testEscape(t *testing.T, cured bool) {
	w := containers(t)
	p := w.peer("eth0", stranger4, stranger6)
	box := w.peer("docker0", "172.17.0.2", "fd17::2")
	p.in(func() error { // what is sent past the peer's kernel shall not draw its resets
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader("table inet quiet { chain out { type filter hook output priority 0; tcp flags rst drop; }; }")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	w.inHost(func() error { // as short as it goes: a closed flow is forgotten
		return os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close", []byte("1"), 0o644)
	})

	ends := time.Now().Add(3 * time.Second).UTC()
	brief := "[open.brief]\nports = 9\nexpires = " + ends.Format(time.RFC3339) + "\n"
	load := func(text string) {
		rs := ruleset(t, text)
		if !cured {
			rs = withoutCure(rs)
		}
		w.apply(rs)
	}
	load("[open.all]\nports = [7, 8080]\n" + brief)

	type escape struct {
		flow
		onWire  tuple // as the stranger sees it
		reverse tuple // the entry that must not be
	}
	var list []escape
	for _, b := range families() {
		for _, c := range []struct {
			what   string
			server side
			port   uint16 // of the wire
			bound  netip.AddrPort
		}{
			{"a service", w.inHost, 7, netip.AddrPortFrom(b.host, 7)},
			{"a service whose port closed by its expiry", w.inHost, 9, netip.AddrPortFrom(b.host, 9)},
			{"a container", box.in, 8080, netip.AddrPortFrom(map[bool]netip.Addr{true: netip.MustParseAddr("172.17.0.2"), false: netip.MustParseAddr("fd17::2")}[b.host.Is4()], 80)},
		} {
			var l net.Listener
			c.server(func() (err error) { l, err = net.Listen("tcp", c.bound.String()); return err })
			t.Cleanup(func() { l.Close() })
			near, far := connect(t, p.in, l, netip.AddrPortFrom(b.peer, 0), netip.AddrPortFrom(b.host, c.port))
			f := flow{what: c.what + ", " + b.family, host: far, peer: near}
			if !talks(t, near, far) {
				t.Fatalf("%s: no connection to begin with", f.what)
			}
			wire := tupleOf(t, rules.TCP, near)
			list = append(list, escape{f, wire, tuple{rules.TCP, c.bound, wire.src}})
		}
	}
	load(brief)
	until(t, "the expiry", func() bool { return time.Now().After(ends.Add(time.Second)) })
	for _, e := range list {
		// All that the peer sent is acknowledged: the reset has the one number that counts.
		until(t, "an acknowledgement", func() bool { return unacknowledged(t, e.peer) == 0 })
		p.inject(reset(t, e.peer))
	}
	for _, e := range list {
		until(t, e.what+": conntrack to forget it", func() bool {
			is, found, err := w.conn.entryOf(e.onWire)
			if err != nil {
				t.Fatal(err)
			}
			return !found || is.tcpState > tcpLastAlive
		})
		speaks(t, e.host) // and again and again, by itself
	}

	reversed := func(e escape) bool {
		is, found, err := w.conn.entryOf(e.reverse)
		if err != nil {
			t.Fatal(err)
		}
		return found && is.orig == e.reverse
	}
	if !cured {
		for _, e := range list {
			until(t, e.what+": the flow's return", func() bool { return reversed(e) })
			if e.reverse.src == e.onWire.dst {
				speaks(t, e.peer)
				if !hears(e.host, 3*patience) {
					t.Errorf("%s: the flow is not back: this test shows nothing", e.what)
				}
			}
		}
		return
	}
	// Each server tries again, twice as long after each time.
	until(t, "tries of every flow", func() bool { return w.counter("c_reversed") >= 2*len(list) })
	var hosts []flow
	for _, e := range list {
		if reversed(e) {
			t.Errorf("%s: it is back as begun by the host", e.what)
		}
		if unacknowledged(t, e.host) == 0 {
			t.Errorf("%s: the peer's acknowledgement came through", e.what)
		}
		if e.reverse.src == e.onWire.dst {
			hosts = append(hosts, e.flow)
		}
	}
	w.areCut(t, hosts...)
}
