package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/verify"
)

// lowestProbe and highestProbe are the source ports of probes: the number of a probe
// among those that are on the way. The outside's own sockets have higher ones.
const (
	lowestProbe  = 1024
	highestProbe = 31999
)

// moveTarget is a port of the host over one family, asked all the time.
type moveTarget struct {
	name  string
	frame func(n uint16) []byte
	every int  // milliseconds
	open  bool // each probe must be answered; else none may be

	mu      sync.Mutex
	sent    int
	answers []time.Time          // of a closed port
	waiting map[uint16]time.Time // when the probes of an open port left that nothing answered yet
	lost    []time.Time          // the same, of those whose number was given away again
}

// movePort is what is probed over both families.
type movePort struct {
	network string
	port    uint16
	open    bool
}

func (p movePort) String() string { return fmt.Sprintf("%d/%s", p.port, p.network) }

// moveProbes look at the host from outside, by raw packets: the kernel's own
// connect would send a lost SYN again and show nothing.
type moveProbes struct {
	fd      int
	link    verify.Link
	targets []*moveTarget
	wire    *moveTarget // ARP, which no firewall of IP filters: what it loses is the wire's
	byPort  map[string]*moveTarget
	rejects bool          // the host refuses what is closed: that alone shows no open port
	gap     time.Duration // the longest between two rounds

	stop   chan struct{}
	done   sync.WaitGroup
	mu     sync.Mutex
	errs   []error
	strays map[string]int // what the host sent to others than us
}

func startMoveProbes(t *testing.T, link verify.Link, ports []movePort, rejects bool) *moveProbes {
	t.Helper()
	p := &moveProbes{link: link, byPort: map[string]*moveTarget{}, strays: map[string]int{}, rejects: rejects, stop: make(chan struct{})}
	add := func(name string, open bool, frame func(n uint16) []byte) *moveTarget {
		tg := &moveTarget{name: name, frame: frame, every: 1, open: open, waiting: map[uint16]time.Time{}}
		if open {
			tg.every = 4 // each leaves an entry of conntrack
		}
		p.targets = append(p.targets, tg)
		return tg
	}
	p.wire = add("the wire", true, p.arp)
	for _, port := range ports {
		for _, a := range [][2]string{{outside4, host4}, {outside6, host6}} {
			from, to := netip.MustParseAddr(a[0]), netip.AddrPortFrom(netip.MustParseAddr(a[1]), port.port)
			family := "ipv4"
			if to.Addr().Is6() {
				family = "ipv6"
			}
			frame := func(n uint16) []byte { return synFrame(link, netip.AddrPortFrom(from, n), to) }
			if port.network == "udp" {
				frame = func(n uint16) []byte { return udpFrame(link, netip.AddrPortFrom(from, n), to) }
			}
			p.byPort[probeKey(to.Addr().Is6(), port.network, port.port)] = add(port.String()+" over "+family, port.open, frame)
		}
	}
	const every = uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	var err error
	if p.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		unix.SetsockoptInt(p.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}),
		unix.SetsockoptInt(p.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),
		unix.Bind(p.fd, &unix.SockaddrLinklayer{Protocol: every, Ifindex: link.Index}),
	); err != nil {
		t.Fatal(err)
	}
	p.done.Add(2)
	go p.send()
	go p.receive()
	return p
}

func probeKey(six bool, network string, port uint16) string {
	return fmt.Sprint(six, network, port)
}

// stray notes a packet for somebody else.
func (p *moveProbes) stray(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.strays[what]++
}

func (p *moveProbes) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.errs = append(p.errs, err)
}

// first lets the calling goroutine run ahead of what else the machine does: probes
// that wait for a processor see nothing. Where it may not, their distance tells.
func first() {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), -20)
}

func (p *moveProbes) send() {
	defer p.done.Done()
	first()
	to := &unix.SockaddrLinklayer{Ifindex: p.link.Index}
	for tick, last := 0, time.Now(); ; tick++ {
		select {
		case <-p.stop:
			return
		case <-time.After(time.Millisecond):
		}
		p.gap = max(p.gap, time.Since(last))
		last = time.Now()
		for i, tg := range p.targets {
			if (tick+i)%tg.every != 0 {
				continue
			}
			tg.mu.Lock()
			n := uint16(lowestProbe + tg.sent%(highestProbe-lowestProbe+1))
			tg.sent++
			if tg.open {
				if at, ok := tg.waiting[n]; ok {
					tg.lost = append(tg.lost, at)
				}
				tg.waiting[n] = time.Now()
			}
			tg.mu.Unlock()
			// A link that is not up yet, or no more, carries nothing.
			if err := unix.Sendto(p.fd, tg.frame(n), 0, to); err != nil && !errors.Is(err, unix.ENETDOWN) {
				p.fail(err)
				return
			}
		}
	}
}

func (p *moveProbes) receive() {
	defer p.done.Done()
	first()
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(p.fd, buf, 0)
		if err == nil {
			p.got(buf[:n])
			continue
		}
		select {
		case <-p.stop:
			return
		default:
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENETDOWN) {
			p.fail(err)
			return
		}
	}
}

// answered notes what came back for a port.
func (t *moveTarget) answered(n uint16) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.waiting, n)
	if !t.open {
		t.answers = append(t.answers, time.Now())
	}
}

// refused notes a RST, or an ICMP error of a firewall. An open port gives none, and a
// closed one does if the policy says so.
func (p *moveProbes) refused(t *moveTarget, n uint16) {
	if !t.open && !p.rejects {
		t.answered(n)
	}
}

// got tells what a frame is about.
func (p *moveProbes) got(f []byte) {
	if len(f) < 42 {
		return
	}
	six := false
	var ip, body []byte
	var proto byte
	switch binary.BigEndian.Uint16(f[12:]) {
	case unix.ETH_P_ARP:
		if binary.BigEndian.Uint16(f[20:]) == 2 {
			p.wire.answered(binary.BigEndian.Uint16(f[36:]))
		}
		return
	case unix.ETH_P_IP:
		ip = f[14:]
		proto, body = ip[9], ip[20:]
	case unix.ETH_P_IPV6:
		if len(f) < 62 {
			return
		}
		ip, six = f[14:], true
		proto, body = ip[6], ip[40:]
	default:
		return
	}
	if len(body) < 8 {
		return
	}
	own := netip.MustParseAddr(map[bool]string{false: outside4, true: outside6}[six])
	to := ip[16:20]
	if six {
		to = ip[24:40]
	}
	if a, _ := netip.AddrFromSlice(to); a != own {
		if proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP { // not neighbour discovery and its like
			p.stray(fmt.Sprintf("protocol %d to %s from port %d", proto, a, binary.BigEndian.Uint16(body)))
		}
		return
	}
	switch from, to := binary.BigEndian.Uint16(body), binary.BigEndian.Uint16(body[2:]); proto {
	case unix.IPPROTO_TCP:
		const rst = 4
		switch tg := p.byPort[probeKey(six, "tcp", from)]; {
		case tg == nil || len(body) < 20 || to > highestProbe:
		case body[13]&rst != 0:
			p.refused(tg, to)
		default:
			tg.answered(to)
		}
	case unix.IPPROTO_UDP:
		if tg := p.byPort[probeKey(six, "udp", from)]; tg != nil {
			tg.answered(to)
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		p.gotError(six, body)
	}
}

// gotError reads an ICMP error: a port that nobody listens on shows that it is not
// filtered; the rest a firewall sends.
func (p *moveProbes) gotError(six bool, body []byte) {
	kind, portCode, header := byte(3), byte(3), 20
	if six {
		kind, portCode, header = 1, 4, 40
	}
	inner := body[8:]
	if body[0] != kind || len(inner) < header+4 {
		return
	}
	network := map[byte]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[inner[map[bool]int{false: 9, true: 6}[six]]]
	tg := p.byPort[probeKey(six, network, binary.BigEndian.Uint16(inner[header+2:]))]
	switch n := binary.BigEndian.Uint16(inner[header:]); {
	case tg == nil:
	case tg.open || body[1] != portCode:
		p.refused(tg, n)
	default:
		tg.answered(n)
	}
}

// arp asks for the address of the host without an address of the own, which
// teaches nobody anything. The number is in the asker's MAC address, which comes back.
func (p *moveProbes) arp(n uint16) []byte {
	asker := []byte{2, 0, 0, 1, byte(n >> 8), byte(n)}
	host := netip.MustParseAddr(host4).As4()
	return slices.Concat(p.link.Dst, p.link.Src, []byte{8, 6, 0, 1, 8, 0, 6, 4, 0, 1}, asker, make([]byte, 10), host[:])
}

// udpFrame is a datagram of two bytes.
func udpFrame(l verify.Link, from, to netip.AddrPort) []byte {
	udp := []byte{0, 0, 0, 0, 0, 10, 0, 0, '?', '?'}
	binary.BigEndian.PutUint16(udp, from.Port())
	binary.BigEndian.PutUint16(udp[2:], to.Port())
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, byte(len(udp)), 0, unix.IPPROTO_UDP}, udp)
	binary.BigEndian.PutUint16(udp[6:], inetSum(pseudo))
	f := slices.Concat([]byte(l.Dst), []byte(l.Src))
	if to.Addr().Is4() {
		ip := slices.Concat([]byte{0x45, 0, 0, 30, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.Addr().AsSlice(), to.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], inetSum(ip))
		return slices.Concat(f, []byte{0x08, 0x00}, ip, udp)
	}
	ip := slices.Concat([]byte{0x60, 0, 0, 0, 0, 10, unix.IPPROTO_UDP, 64}, from.Addr().AsSlice(), to.Addr().AsSlice())
	return slices.Concat(f, []byte{0x86, 0xdd}, ip, udp)
}

// asMeant reports whether all probes of open ports that left between two times were
// answered, and none of closed ones.
func (p *moveProbes) asMeant(since, until time.Time) bool {
	for _, tg := range p.targets {
		tg.mu.Lock()
		ok := tg.sent > 0 && (len(tg.answers) == 0 || tg.answers[len(tg.answers)-1].Before(since))
		for _, at := range tg.waiting {
			ok = ok && (at.Before(since) || at.After(until))
		}
		tg.mu.Unlock()
		if !ok {
			return false
		}
	}
	return true
}

// close ends the probes once the last had time to be answered.
func (p *moveProbes) close(t *testing.T) {
	t.Helper()
	time.Sleep(100 * time.Millisecond)
	close(p.stop)
	p.done.Wait()
	stats, err := unix.GetsockoptTpacketStats(p.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil && stats.Drops > 0 {
		err = fmt.Errorf("the outside lost %d packets that it was sent: nothing can be told", stats.Drops)
	}
	if err := errors.Join(err, errors.Join(p.errs...), unix.Close(p.fd)); err != nil {
		t.Error(err)
	}
}

// period is a part of what a host lives through.
type period struct{ from, to time.Time }

func (p period) has(at time.Time) bool { return !at.Before(p.from) && at.Before(p.to) }

// without gives when probes left that nothing answered.
func (t *moveTarget) without(within period) []time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []time.Time
	for _, at := range slices.AppendSeq(slices.Clone(t.lost), maps.Values(t.waiting)) {
		if within.has(at) {
			out = append(out, at)
		}
	}
	slices.SortFunc(out, time.Time.Compare)
	return out
}

// answersIn gives when a closed port answered.
func (t *moveTarget) answersIn(within period) []time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(t.answers), func(at time.Time) bool { return !within.has(at) })
}

// judge says what is wrong: answers of closed ports within one period, and probes of
// open ports without an answer within the other. A machine under load loses packets:
// what was lost beside a canary is not the firewall's. step names what was done at a
// time.
func (p *moveProbes) judge(t *testing.T, closed, open period, step func(time.Time) string) {
	t.Helper()
	byWire := p.wire.without(open)
	excused := 0
	for _, tg := range p.targets {
		what, bad := "answered", tg.answersIn(closed)
		if tg.open {
			what, bad = "got no answer", tg.without(open)
			all := len(bad)
			bad = slices.DeleteFunc(bad, func(at time.Time) bool {
				return slices.ContainsFunc(byWire, func(w time.Time) bool { return at.Sub(w).Abs() < 20*time.Millisecond })
			})
			excused += all - len(bad)
		}
		if tg.sent == 0 {
			t.Errorf("%s was never probed", tg.name)
		}
		if len(bad) == 0 {
			continue
		}
		var when []string
		for _, at := range bad {
			if s := step(at); !slices.Contains(when, s) {
				when = append(when, s)
			}
		}
		t.Errorf("%s %s %d times in %d, first %.3fs, last %.3fs into the move, during:\n\t%s", tg.name, what, len(bad), tg.sent,
			bad[0].Sub(open.from).Seconds(), bad[len(bad)-1].Sub(open.from).Seconds(), strings.Join(when, "\n\t"))
	}
	if len(byWire)*100 > p.wire.sent {
		t.Errorf("the wire alone lost %d of %d canaries: nothing can be told", len(byWire), p.wire.sent)
	}
	for what, n := range p.strays {
		t.Errorf("the host put %d packets on the wire that are for others: %s", n, what)
	}
	sent := 0
	for _, tg := range p.targets {
		sent += tg.sent
	}
	t.Logf("%d probes, %s apart at most; the wire lost %d of %d canaries, and with them %d probes", sent, p.gap.Round(time.Millisecond), len(byWire), p.wire.sent, excused-len(byWire))
}

// moveFlow is a session that an admin has, such as of SSH: a line goes there and
// comes back, all the time.
type moveFlow struct {
	addr  string
	stop  chan struct{}
	done  chan error
	lines int
}

func startMoveFlow(t *testing.T, host string, port uint16) *moveFlow {
	t.Helper()
	f := &moveFlow{addr: net.JoinHostPort(host, fmt.Sprint(port)), stop: make(chan struct{}), done: make(chan error, 1)}
	go func() { f.done <- f.run() }()
	return f
}

func (f *moveFlow) run() (err error) {
	c, err := net.DialTimeout("tcp", f.addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for b := []byte("?"); ; f.lines++ {
		select {
		case <-f.stop:
			return nil
		case <-time.After(10 * time.Millisecond):
		}
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return err
		}
		if _, err := c.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
	}
}

// end says whether the session lived until now.
func (f *moveFlow) end(t *testing.T) {
	t.Helper()
	close(f.stop)
	if err := <-f.done; err != nil || f.lines == 0 {
		t.Errorf("the session to %s ended after %d lines: %v", f.addr, f.lines, err)
	}
}
