package verify

// Looking without privileges: the vantage's own kernel sends the probes, by
// connect(2), and tells what came back.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

const (
	connectSockets = 2000 // at once, where the limit of open files allows it
	connectFewest  = 64   // when loss makes it send less at once
	connectReserve = 64   // file descriptors that are left to others

	connectGrace = 50 * time.Millisecond // at least: a kernel does the waiting, and much beside it
)

// ConnectNotes are the limits of [Connect], for reports.
func ConnectNotes() []string {
	return []string{
		"probed by connect(2), without raw sockets: only SYNs and empty datagrams, from source ports that the kernel chose",
		"a reset by the host and one by a firewall look alike to connect(2), as they do on the wire",
		"a firewall that keeps this machine's own connections from leaving looks like one on the target: connect(2) does not say",
		"answers that came after a port was given up are not seen, and open ports saw a connection that was reset",
	}
}

// Connect does what [Sweep] does for a user who may not open raw sockets, from
// the network namespace of the calling thread. Of a path it uses the target,
// the ports, the TCP canaries and the source, if there is one, which must be this
// machine's; MaxRate, MissBound and Progress hold as for Sweep, Arrived does not.
// It opens a bounded number of sockets at a time. See [ConnectNotes] for what it
// cannot tell.
//
// If ctx ends, Connect returns its error and no result.
func Connect(ctx context.Context, cfg Config) (*Result, error) {
	began := time.Now()
	if len(cfg.Paths) == 0 {
		return nil, errors.New("no path to probe")
	}
	if cfg.MissBound <= 0 {
		cfg.MissBound = defaultMissBound
	}
	res := &Result{Paths: make([]PathResult, len(cfg.Paths)), Bound: 1}
	cfg.Paths = slices.Clone(cfg.Paths) // Connect must not change what the caller owns
	c := &connector{ctx: ctx, cfg: cfg, most: connectSockets, res: res}
	for i := range cfg.Paths {
		p := cfg.Paths[i]
		p.Src, p.Dst = p.Src.Unmap().WithZone(""), p.Dst.Unmap().WithZone("")
		if err := checkConnectPath(&p); err != nil {
			return nil, fmt.Errorf("path %d to %v: %w", i, p.Dst, err)
		}
		c.total += uint64(len(p.TCP) + len(p.UDP))
		cfg.Paths[i] = p
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return nil, fmt.Errorf("read the limit of open files: %w", err)
	}
	if limit.Cur < connectSockets+connectReserve {
		c.most = int(limit.Cur) - connectReserve
	}
	if c.most < 2 {
		return nil, errors.New("the limit of open files is too low to probe by connect(2): raise it with ulimit -n")
	}
	c.size = c.most
	var err error
	if c.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("wait for sockets: %w", err)
	}
	defer unix.Close(c.epoll)

	sum, alive := 0.0, false
	for i := range cfg.Paths {
		p := &connectPath{Path: cfg.Paths[i], res: &res.Paths[i]}
		if err := c.path(p, cfg.MissBound/float64(len(cfg.Paths))); err != nil {
			return nil, err
		}
		alive = alive || p.res.Alive
		p.res.Bound = p.bound()
		sum += p.res.Bound
	}
	if alive {
		res.Bound = min(sum, 1)
	}
	res.Elapsed = time.Since(began)
	return res, nil
}

func checkConnectPath(p *Path) error {
	switch {
	case !p.Dst.IsValid() || p.Dst.IsMulticast() || p.Dst.IsUnspecified():
		return errors.New("target is no address of a host")
	case p.Src.IsValid() && p.Src.Is4() != p.Dst.Is4():
		return errors.New("source and target must be addresses of one family")
	}
	for _, ports := range [][]uint16{p.TCP, p.UDP} {
		if !slices.IsSorted(ports) || len(slices.Compact(slices.Clone(ports))) != len(ports) {
			return errors.New("ports must ascend")
		}
	}
	return nil
}

// connector is one run. Everything is one goroutine's.
type connector struct {
	ctx   context.Context
	cfg   Config
	res   *Result
	epoll int
	most  int // sockets at once
	size  int // sockets of the next volley
	total uint64
	due   time.Time // when the next probe may leave
	shown time.Time // when Progress was called last
	rtt   histogram
}

// connectPath is a path at work.
type connectPath struct {
	Path
	res      *PathResult
	tcp, udp []connectPort
	run      tally
	dead     bool
	turn     int
}

type connectPort struct {
	answer Answer
	good   uint8 // attempts among canaries that lost no more than usual
}

// attempt is a socket that waits for an answer.
type attempt struct {
	fd     int
	proto  rules.Protocol
	port   uint16
	at     time.Time
	canary bool
	answer Answer
	from   netip.Addr
	own    error // of this machine, which says nothing about the target
}

// path probes one path.
func (c *connector) path(p *connectPath, bound float64) error {
	p.tcp, p.udp = make([]connectPort, len(p.TCP)), make([]connectPort, len(p.UDP))
	p.Canaries = slices.DeleteFunc(slices.Clone(p.Canaries), func(k Canary) bool { return k.Kind != CanaryTCP })
	proven, err := c.prove(p, pilotLimit)
	if err != nil {
		return err
	}
	for r := range maxRounds {
		if r > 0 && (!proven || p.dead) {
			break
		}
		list := p.silentAttempts(r, bound)
		if len(list) == 0 {
			break
		}
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		for len(list) > 0 && !p.dead {
			part := list[:min(len(list), max(c.size*canaryEvery/(canaryEvery+1), 1))]
			list = list[len(part):]
			if err := c.ports(p, part, proven); err != nil {
				return err
			}
		}
	}
	if proven && !p.dead {
		alive, err := c.prove(p, finalLimit)
		if err != nil {
			return err
		}
		p.dead = !alive
	}
	p.res.Alive = proven && !p.dead
	p.res.TCP, p.res.UDP = p.results(p.tcp), p.results(p.udp)
	return nil
}

// prove says whether a canary answers within a limit, and drops those that
// never did.
func (c *connector) prove(p *connectPath, limit time.Duration) (bool, error) {
	if len(p.Canaries) == 0 {
		return false, nil
	}
	for end := time.Now().Add(limit); ; {
		var volley []*attempt
		for _, k := range p.Canaries {
			for range finalCanaries {
				volley = append(volley, &attempt{proto: rules.TCP, port: k.Port, canary: true})
			}
		}
		if len(volley) > c.most {
			volley = volley[:c.most]
		}
		if err := c.volley(p, volley, min(limit/4, time.Until(end))); err != nil {
			return false, err
		}
		var live []Canary
		for _, k := range p.Canaries {
			if slices.ContainsFunc(volley, func(a *attempt) bool { return a.port == k.Port && a.back() }) {
				live = append(live, k)
			}
		}
		if len(live) > 0 {
			p.Canaries = live
			return true, nil
		}
		if time.Now().After(end) {
			return false, nil
		}
	}
}

// back says that the target's own stack answered.
func (a *attempt) back() bool { return a.answer.State == Open || a.answer.State == Closed }

// silentAttempts lists what round r has to ask.
func (p *connectPath) silentAttempts(r int, bound float64) []*attempt {
	rate, silent, sum := p.run.upper(), 0, 0.0
	for _, x := range p.tcp {
		if x.answer.State == Unknown {
			silent++
			sum += math.Pow(rate, float64(x.good))
		}
	}
	var list []*attempt
	for _, f := range []struct {
		proto rules.Protocol
		ports []uint16
		state []connectPort
	}{{rules.TCP, p.TCP, p.tcp}, {rules.UDP, p.UDP, p.udp}} {
		for i, port := range f.ports {
			x := &f.state[i]
			miss := math.Pow(rate, float64(x.good))
			again := false
			switch {
			case x.answer.Reason == RouterError:
				again = r < 3
			case x.answer.State != Unknown:
			case r == 0:
				again = true
			case f.proto == rules.TCP:
				again = sum > bound && miss > bound/float64(silent)
			default:
				again = x.good < 2 || miss > udpMiss
			}
			if again {
				list = append(list, &attempt{proto: f.proto, port: port})
			}
		}
	}
	return list
}

// ports asks some ports at once, with canaries among them, and books what came
// back.
func (c *connector) ports(p *connectPath, list []*attempt, proven bool) error {
	volley := make([]*attempt, 0, len(list)+len(list)/canaryEvery+2)
	canary := func() {
		if proven {
			k := p.Canaries[p.turn%len(p.Canaries)]
			p.turn++
			volley = append(volley, &attempt{proto: rules.TCP, port: k.Port, canary: true})
		}
	}
	for i, a := range list {
		if i%canaryEvery == 0 {
			canary()
		}
		volley = append(volley, a)
	}
	canary()
	if err := c.volley(p, volley, c.grace()); err != nil {
		return err
	}
	var t tally
	for _, a := range volley {
		if a.canary && a.own == nil {
			t.sent++
			if !a.back() {
				t.lost++
			}
		}
	}
	proves := proven && t.sent > 0 && !t.dead()
	if proves {
		p.run.add(t)
		proves = p.run.upper() < 0.5 && !t.worseThan(p.run.upper())
	}
	for _, a := range list {
		p.book(a, proves)
	}
	switch {
	case proven && t.dead():
		alive, err := c.prove(p, reviveLimit)
		if err != nil {
			return err
		}
		p.dead = !alive
	case t.lost*10 > t.sent:
		c.size = max(c.size/2, min(connectFewest, c.most))
	case t.lost == 0:
		c.size = min(c.size+c.size/4, c.most)
	}
	return nil
}

// book takes in one port's answer, and keeps the strongest.
func (p *connectPath) book(a *attempt, proves bool) {
	ports, state := p.TCP, p.tcp
	if a.proto == rules.UDP {
		ports, state = p.UDP, p.udp
	}
	i, _ := slices.BinarySearch(ports, a.port)
	x := &state[i]
	if a.own != nil {
		p.res.Err = a.own
		return
	}
	if a.answer == (Answer{}) {
		if proves {
			x.good++
		}
		return
	}
	if a.answer.weight() <= x.answer.weight() {
		return
	}
	x.answer = a.answer
	target := Target{a.proto, a.port}
	delete(p.res.From, target)
	if a.from.IsValid() && a.from != p.Dst {
		if p.res.From == nil {
			p.res.From = make(map[Target]netip.Addr)
		}
		p.res.From[target] = a.from
	}
}

// results says what silence means.
func (p *connectPath) results(state []connectPort) []Answer {
	if len(state) == 0 {
		return nil
	}
	out := make([]Answer, len(state))
	rate := p.run.upper()
	for i, x := range state {
		out[i] = x.answer
		if x.answer == (Answer{}) {
			out[i] = Answer{Unknown, PathNotProven}
			if p.res.Alive && x.good > 0 && math.Pow(rate, float64(x.good)) <= filteredMiss {
				out[i] = Answer{Filtered, NoResponse}
			}
		}
	}
	return out
}

// bound is the probability that any answer of a silent TCP port was missed.
func (p *connectPath) bound() float64 {
	sum := 0.0
	for i, a := range p.res.TCP {
		if a.State == Filtered {
			sum += math.Pow(p.run.upper(), float64(p.tcp[i].good))
		}
	}
	return sum
}

func (c *connector) grace() time.Duration { return max(c.rtt.grace(), connectGrace) }

// volley opens a socket for every attempt, waits for answers until grace after
// the last one left, and closes them all.
func (c *connector) volley(p *connectPath, list []*attempt, grace time.Duration) error {
	for _, a := range list {
		a.fd = -1
	}
	defer func() {
		for _, a := range list {
			if a.fd >= 0 {
				unix.Close(a.fd)
			}
		}
	}()
	waiting := 0
	for i, a := range list {
		if err := c.pace(); err != nil {
			return err
		}
		if err := c.start(p, a, i); err != nil {
			return err
		}
		if a.fd >= 0 {
			waiting++
		}
		if i%64 == 63 { // what is answered needs no socket any more
			n, err := c.collect(p, list, 0)
			if err != nil {
				return err
			}
			waiting -= n
		}
	}
	for end := time.Now().Add(max(grace, 0)); waiting > 0; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		left := time.Until(end)
		n, err := c.collect(p, list, min(max(left, 0), 20*time.Millisecond))
		if err != nil {
			return err
		}
		waiting -= n
		if n == 0 && left <= 0 {
			break
		}
	}
	for _, a := range list {
		if a.canary {
			p.res.CanariesSent++
			if !a.back() {
				p.res.CanariesLost++
			}
		}
	}
	if c.cfg.Progress != nil && time.Since(c.shown) >= time.Duration(progressStep) {
		c.shown = time.Now()
		c.total = max(c.total, c.res.Probes)
		c.cfg.Progress(c.res.Probes, c.total)
	}
	return nil
}

// pace keeps to MaxRate.
func (c *connector) pace() error {
	if c.cfg.MaxRate > 0 {
		now := time.Now()
		if c.due.Before(now) {
			c.due = now
		}
		if d := c.due.Sub(now); d > time.Millisecond {
			time.Sleep(d)
		}
		c.due = c.due.Add(time.Second / time.Duration(c.cfg.MaxRate))
	}
	return c.ctx.Err()
}

// start opens a socket and sends. Only what concerns the whole run is an error.
func (c *connector) start(p *connectPath, a *attempt, id int) error {
	domain, level, errors4or6 := unix.AF_INET, unix.IPPROTO_IP, unix.IP_RECVERR
	if p.Dst.Is6() {
		domain, level, errors4or6 = unix.AF_INET6, unix.IPPROTO_IPV6, unix.IPV6_RECVERR
	}
	typ := unix.SOCK_STREAM
	if a.proto == rules.UDP {
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	a.fd, a.at = fd, time.Now()
	if err := unix.SetsockoptInt(fd, level, errors4or6, 1); err != nil {
		return fmt.Errorf("ask for ICMP errors: %w", err)
	}
	if a.proto == rules.TCP {
		// A connection is reset when its socket closes, and leaves no TIME_WAIT.
		if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return fmt.Errorf("set up socket: %w", err)
		}
	}
	if p.Src.IsValid() {
		if p.Src.Is4() {
			_ = unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		}
		if err := unix.Bind(fd, p.sockaddr(p.Src, 0)); err != nil {
			return fmt.Errorf("probe from %v: %w", p.Src, err)
		}
	}
	err = unix.Connect(fd, p.sockaddr(p.Dst, a.port))
	if err == nil && a.proto == rules.UDP {
		_, err = unix.Write(fd, nil)
	}
	c.res.Probes++
	p.res.Sent++
	switch {
	case a.canary:
	case a.proto == rules.TCP:
		p.res.SentTCP++
	default:
		p.res.SentUDP++
	}
	switch {
	case err == nil && a.proto == rules.TCP:
		a.answer = Answer{Open, SynAck} // at once, as from an address of this machine
		c.end(a)
		return nil
	case errors.Is(err, unix.ECONNREFUSED):
		c.read(p, a, err)
		c.end(a)
		return nil
	case err != nil && !errors.Is(err, unix.EINPROGRESS):
		a.own = fmt.Errorf("connect: %w", err) // no route, or an output filter
		c.end(a)
		return nil
	}
	if err := unix.EpollCtl(c.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{
		Events: pollEvents(a.proto), Fd: int32(id),
	}); err != nil {
		return fmt.Errorf("wait for sockets: %w", err)
	}
	return nil
}

func pollEvents(proto rules.Protocol) uint32 {
	if proto == rules.TCP {
		return unix.EPOLLOUT // and errors, always
	}
	return unix.EPOLLIN
}

// sockaddr needs the interface only where an address means nothing without one.
func (p *connectPath) sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	s := &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
	if a.IsLinkLocalUnicast() {
		s.ZoneId = uint32(p.Link.Index)
	}
	return s
}

// collect takes in what the kernel has, and says how many attempts ended.
func (c *connector) collect(p *connectPath, list []*attempt, wait time.Duration) (int, error) {
	var events [256]unix.EpollEvent
	n, err := unix.EpollWait(c.epoll, events[:], int(wait.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return 0, fmt.Errorf("wait for sockets: %w", err)
	}
	ended := 0
	for _, ev := range events[:max(n, 0)] {
		a := list[ev.Fd]
		if a.fd < 0 {
			continue
		}
		var failed error
		if errno, err := unix.GetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno != 0 {
			failed = unix.Errno(errno)
		}
		if c.read(p, a, failed) {
			c.end(a)
			ended++
		}
	}
	return ended, nil
}

// end frees the socket of an attempt that is over.
func (c *connector) end(a *attempt) {
	if a.back() && a.proto == rules.TCP {
		c.rtt.add(time.Since(a.at))
	}
	unix.Close(a.fd) // which takes it out of the epoll set, too
	a.fd = -1
}

// read says what a socket learnt, and false if it learnt nothing.
func (c *connector) read(p *connectPath, a *attempt, failed error) bool {
	if r, ok := icmpError(a.fd); ok {
		r.quotedDst, r.quotedProto = p.Dst, a.proto
		a.answer, a.from = icmpAnswer(&r), r.from
		return true
	}
	if a.proto == rules.UDP {
		var b [1]byte
		n, err := unix.Read(a.fd, b[:])
		switch {
		case n >= 0 && err == nil:
			a.answer = Answer{Open, UDPAnswer}
		case errors.Is(err, unix.ECONNREFUSED) || errors.Is(failed, unix.ECONNREFUSED):
			a.answer = Answer{Closed, PortUnreachable}
		default:
			return false
		}
		return true
	}
	switch {
	case failed == nil:
		a.answer = Answer{Open, SynAck}
	case errors.Is(failed, unix.ECONNREFUSED), errors.Is(failed, unix.ECONNRESET):
		a.answer = Answer{Closed, TCPReset}
	case errors.Is(failed, unix.ETIMEDOUT): // the kernel gave up: silence
	default:
		a.own = fmt.Errorf("connect: %w", failed)
	}
	return true
}

// icmpError reads an ICMP error about what a socket sent from its error queue
// (ip(7), IP_RECVERR).
func icmpError(fd int) (reply, bool) {
	oob := make([]byte, 512)
	for {
		_, n, _, _, err := unix.Recvmsg(fd, nil, oob, unix.MSG_ERRQUEUE|unix.MSG_DONTWAIT)
		if err != nil {
			return reply{}, false
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil {
			return reply{}, false
		}
		for _, m := range msgs {
			// struct sock_extended_err of linux/errqueue.h, and the offender behind it
			const origin, typ, code, offender = 4, 5, 6, 16
			v6 := m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_RECVERR
			if !v6 && (m.Header.Level != unix.IPPROTO_IP || m.Header.Type != unix.IP_RECVERR) || len(m.Data) < offender+8 {
				continue
			}
			r := reply{kind: replyError, icmpType: m.Data[typ], icmpCode: m.Data[code]}
			sa := m.Data[offender:]
			switch family := binary.NativeEndian.Uint16(sa); {
			case m.Data[origin] == unix.SO_EE_ORIGIN_ICMP && family == unix.AF_INET:
				r.from = netip.AddrFrom4([4]byte(sa[4:8]))
			case m.Data[origin] == unix.SO_EE_ORIGIN_ICMP6 && family == unix.AF_INET6 && len(sa) >= 24:
				r.from = netip.AddrFrom16([16]byte(sa[8:24]))
			default:
				continue // an error of this machine
			}
			return r, true
		}
	}
}
