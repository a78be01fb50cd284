package verify

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"deadlight/rules"
)

const (
	defaultMissBound = 1e-6
	maxRounds        = 16

	// A silent UDP port is asked until the chance of a lost answer is this; a
	// union bound over all of them would promise more than UDP can keep, since
	// hosts limit their ICMP errors.
	udpMiss = 1e-4
	// A port whose answer may have got lost with more than this chance is not
	// called filtered.
	filteredMiss = 1e-2

	pilotCanaries = 16 // of the first kind, for a large path: they prime the round-trip time
	pilotLimit    = 2 * time.Second
	finalCanaries = 3
	finalLimit    = 2 * time.Second
	reviveLimit   = 3 * time.Second // a link that renegotiates is back by then
	reviveEvery   = 200 * time.Millisecond

	// Linux repeats a SYN-ACK after one second: TCP_TIMEOUT_INIT in
	// include/net/tcp.h, RFC 6298 section 2.
	synAckAgain = 1100 * time.Millisecond
	// An answer that took this much longer than the fastest is such a repetition
	// and says nothing about the way.
	retransmitted = 900 * time.Millisecond

	receivePoll  = 5 * time.Millisecond
	drainLimit   = 2 * time.Second
	mostStray    = 100
	progressStep = int64(200e6) // ns
)

// Sweep probes every port of every path of cfg, from the network namespace of
// the calling thread, and says what answered. It sends what is silent again, in
// a new order, until its canaries prove that no answer is missing; see [Config]
// and [Result]. It needs CAP_NET_RAW there and the interfaces up. Silence on a
// path whose canaries do not answer is [Unknown], never [Filtered].
//
// If ctx ends, Sweep returns its error and no result.
func Sweep(ctx context.Context, cfg Config) (*Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	began := time.Now()
	e, err := newEngine(ctx, cfg, began)
	if err != nil {
		return nil, err
	}
	defer e.close()

	var receiver sync.WaitGroup
	receiver.Add(1)
	go func() {
		defer receiver.Done()
		e.receive()
	}()
	err = e.run()
	e.stop.Store(true)
	receiver.Wait()
	if err := cmp.Or(e.receiveErr, err); err != nil {
		return nil, err
	}
	return e.result(), nil
}

// engine is one run. Its sending half is the caller's goroutine, its receiving
// half one of its own; mu guards what both touch, but for answers.
type engine struct {
	ctx   context.Context
	cfg   Config
	began time.Time
	key   secret
	rng   *rand.Rand

	paths []*sweepPath
	flows []*flow
	links []*sweepLink
	pools []*pool
	peers map[pair]*peer
	ring  *ring
	// By our address and the source port of the probes: who is meant by an answer
	// that comes from another address than the target's.
	sources map[netip.AddrPort]*sweepPath

	stop    atomic.Bool
	drained atomic.Int64 // when the ring was last seen empty, ns since began
	failed  atomic.Bool  // receiveErr is set

	receiveErr error // of the receiving goroutine, to be read after it ended

	mu    sync.Mutex
	order uint64 // of the last canary

	// The sending half's own.
	pacer     *pacer
	due       int64 // when the next packet may leave, ns since began
	tick      *tick
	ticks     []*tick // waiting for their canaries
	dropsRead int64   // when, ns since began
	lossSeen  bool
	lastProbe int64
	probes    uint64 // packets sent
	planned   uint64
	reported  int64
}

// sweepLink is an interface with the frames that wait for it. The receiving
// half has its own batch, for its RSTs.
type sweepLink struct {
	*outLink
	out   *batch
	slots [batchSize]slot
	rst   *batch
}

// slot tells whom a frame of a batch belongs to.
type slot struct {
	count *uint64 // of frames on the wire
	win   *uint32 // to be cleared if the frame never left; nil of a canary
}

// pool is all paths over one link with one family. Small paths borrow its loss.
type pool struct {
	rtt        histogram
	round, run tally
	silent     int // TCP ports to be sent in this round
	probes     int // in this round
}

// sweepPath is a [Path] at work.
type sweepPath struct {
	*Path
	peer *peer
	link *sweepLink
	pool *pool

	syn, udp, echo, rst    template
	tcpFlow, udpFlow       *flow // nil if there is nothing to probe
	kinds                  []*kind
	primary, turn          int
	proven                 bool // canaries answered the pilot
	dead                   bool // proven once, lost for good
	err                    error
	total                  tally // of canaries, but for the pilot's
	sentTCP, sentUDP, sent uint64

	// Guarded by engine.mu.
	heard  uint64        // the newest canary that came back
	minRTT time.Duration // 0 before the first
	from   map[Target]netip.Addr
	stray  []uint16 // ports that nobody asked over UDP and that answered

	// Of this round.
	windows   []*window
	checked   int // windows that cannot be dead any more
	left      int // probes
	every     int // probes a canary
	until     int // probes to the next canary
	suspended bool
	asked     uint64 // the last canary before a burst
}

// flow is a path's ports of one protocol. The slices run parallel to ports.
type flow struct {
	path    *sweepPath
	proto   rules.Protocol
	ports   []uint16
	answers []atomic.Uint32 // State<<8 | Reason, written by the receiving half
	miss    []float32       // chance that every answer so far got lost
	window  []uint32        // that the port was last sent in, from 1; 0: not sent in this round
	good    []uint8         // probes that a window proves something about
}

// sweepProbe is a port of a flow.
type sweepProbe struct {
	flow *flow
	i    uint16
}

func newFlow(p *sweepPath, proto rules.Protocol, ports []uint16) *flow {
	f := &flow{
		path: p, proto: proto, ports: ports,
		answers: make([]atomic.Uint32, len(ports)),
		miss:    make([]float32, len(ports)),
		window:  make([]uint32, len(ports)),
		good:    make([]uint8, len(ports)),
	}
	for i := range f.miss {
		f.miss[i] = 1
	}
	return f
}

// find returns the position of a port.
func (f *flow) find(port uint16) (int, bool) {
	// Most lists are a range without holes.
	if i := int(port) - int(f.ports[0]); i >= 0 && i < len(f.ports) && f.ports[i] == port {
		return i, true
	}
	return slices.BinarySearch(f.ports, port)
}

func (f *flow) answer(i int) Answer {
	x := f.answers[i].Load()
	return Answer{State(x >> 8), Reason(x)}
}

func (f *flow) silent(i int) bool { return f.answers[i].Load() == 0 }

// weight orders answers: a stronger one replaces a weaker one.
func (a Answer) weight() int {
	switch {
	case a.State == Open:
		return 4
	case a.State == Closed:
		return 3
	case a.State == Rejected:
		return 2
	case a.Reason == RouterError, a.Reason == OtherAddress:
		return 1
	}
	return 0
}

// newEngine checks cfg and opens the sockets.
func newEngine(ctx context.Context, cfg Config, began time.Time) (*engine, error) {
	if cfg.MissBound <= 0 {
		cfg.MissBound = defaultMissBound
	}
	e := &engine{
		ctx: ctx, cfg: cfg, began: began,
		peers: make(map[pair]*peer), sources: make(map[netip.AddrPort]*sweepPath),
		pacer: newPacer(cfg.MaxRate),
	}
	var seed [32]byte
	crand.Read(seed[:])
	e.rng = rand.New(rand.NewChaCha8(seed))
	e.key = secret{e.rng.Uint64(), e.rng.Uint64()}

	// A copy: Sweep must not change what the caller owns.
	e.cfg.Paths = slices.Clone(cfg.Paths)
	for i := range e.cfg.Paths {
		p := &e.cfg.Paths[i]
		p.Src, p.Dst = p.Src.Unmap().WithZone(""), p.Dst.Unmap().WithZone("")
		if err := checkPath(p); err != nil {
			return nil, fmt.Errorf("path %d, %v to %v: %w", i, p.Src, p.Dst, err)
		}
	}
	if len(e.cfg.Paths) == 0 {
		return nil, errors.New("no path to probe")
	}
	filter, err := answerFilter(e.cfg.Paths)
	if err != nil {
		return nil, err
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if e.ring, err = openRing(filter); err != nil {
		return nil, err
	}
	for i := range e.cfg.Paths {
		if err := e.addPath(i); err != nil {
			e.close()
			return nil, fmt.Errorf("path %d, %v to %v: %w", i, e.cfg.Paths[i].Src, e.cfg.Paths[i].Dst, err)
		}
	}
	return e, nil
}

func checkPath(p *Path) error {
	switch {
	case !p.Src.IsValid() || !p.Dst.IsValid() || p.Src.Is4() != p.Dst.Is4():
		return errors.New("source and target must be addresses of one family")
	case p.Dst.IsMulticast() || p.Dst.IsUnspecified():
		return errors.New("target is no address of a host")
	case len(p.Link.Src) != 6 || len(p.Link.Dst) != 6:
		return errors.New("both Ethernet addresses must be known")
	case p.SrcPort == 0 || p.SrcPort >= canaryPortLow && p.SrcPort <= canaryPortHigh:
		return fmt.Errorf("source port %d is not outside %d-%d, where canaries come from", p.SrcPort, canaryPortLow, canaryPortHigh)
	}
	for _, ports := range [][]uint16{p.TCP, p.UDP} {
		for i := 1; i < len(ports); i++ {
			if ports[i] <= ports[i-1] {
				return fmt.Errorf("ports must ascend, but %d stands before %d", ports[i-1], ports[i])
			}
		}
	}
	return nil
}

func (e *engine) addPath(index int) error {
	c := &e.cfg.Paths[index]
	p := &sweepPath{Path: c}
	p.syn, p.udp, p.echo, p.rst = synTemplate(c), udpTemplate(c), echoTemplate(c), rstTemplate(c)
	if len(c.TCP) > 0 {
		p.tcpFlow = newFlow(p, rules.TCP, c.TCP)
		e.flows = append(e.flows, p.tcpFlow)
	}
	if len(c.UDP) > 0 {
		p.udpFlow = newFlow(p, rules.UDP, c.UDP)
		e.flows = append(e.flows, p.udpFlow)
	}

	i := slices.IndexFunc(e.links, func(l *sweepLink) bool { return l.index == c.Link.Index })
	if i < 0 {
		l, err := openLink(c.Link)
		if err != nil {
			return err
		}
		i = len(e.links)
		e.links = append(e.links, &sweepLink{outLink: l, out: newBatch(), rst: newBatch()})
		e.pools = append(e.pools, new(pool), new(pool)) // IPv4 and IPv6
	}
	p.link, p.pool = e.links[i], e.pools[2*i]
	if c.Dst.Is6() {
		p.pool = e.pools[2*i+1]
	}

	key := pair{c.Src, c.Dst}
	p.peer = e.peers[key]
	if p.peer == nil {
		p.peer = &peer{
			id:    uint32(len(e.peers)),
			paths: make(map[uint16]*sweepPath),
			tcp:   make(map[uint16]*tuples),
			echo:  newEchoTuples(e.rng),
		}
		e.peers[key] = p.peer
	}
	if p.peer.paths[c.SrcPort] != nil {
		return fmt.Errorf("source port %d belongs to another path", c.SrcPort)
	}
	p.peer.paths[c.SrcPort] = p
	e.sources[netip.AddrPortFrom(c.Src, c.SrcPort)] = p
	for _, k := range c.Canaries {
		if k.Kind == CanaryTCP && p.peer.tcp[k.Port] == nil {
			p.peer.tcp[k.Port] = newTCPTuples(e.rng)
		}
		p.kinds = append(p.kinds, &kind{Canary: k})
	}
	e.paths = append(e.paths, p)
	return nil
}

func (e *engine) close() {
	for _, l := range e.links {
		l.close()
	}
	e.ring.close()
}

// now is the time since the run began in nanoseconds.
func (e *engine) now() int64 { return int64(time.Since(e.began)) }

// run is the sending half.
func (e *engine) run() error {
	e.tick = newTick(e.now())
	if err := e.pilot(); err != nil {
		return err
	}
	for r := range maxRounds {
		list := e.silentProbes(r)
		if len(list) == 0 {
			break
		}
		if err := e.round(list); err != nil {
			return err
		}
		if err := e.revive(); err != nil {
			return err
		}
	}
	if err := e.last(); err != nil {
		return err
	}
	if e.cfg.Progress != nil {
		e.cfg.Progress(e.probes, e.probes)
	}
	if e.lossSeen && e.anySilentTCP() {
		// An open port's SYN-ACK may be the packet that got lost.
		return e.sleepUntil(e.lastProbe + int64(synAckAgain))
	}
	return nil
}

// silentProbes lists what round r has to send.
func (e *engine) silentProbes(r int) []sweepProbe {
	var sum float64
	count := 0
	for _, f := range e.flows {
		if f.proto != rules.TCP || !f.path.proven || f.path.dead {
			continue
		}
		for i := range f.ports {
			if f.silent(i) {
				sum += float64(f.miss[i])
				count++
			}
		}
	}
	// Each port may have an equal part of the bound.
	enough := float32(1)
	if sum > e.cfg.MissBound {
		enough = float32(e.cfg.MissBound / float64(count))
	}
	var list []sweepProbe
	for _, f := range e.flows {
		p := f.path
		if p.dead {
			continue
		}
		rounds := maxRounds
		switch {
		case len(p.kinds) == 0:
			rounds = 2
		case !p.proven:
			rounds = 1
		}
		if r >= rounds {
			continue
		}
		for i := range f.ports {
			a := f.answer(i)
			again := false
			switch {
			case a.Reason == RouterError:
				again = r < 3 // a router that was in a hurry must not hide an answer
			case a.State != Unknown:
			case r == 0 || !p.proven:
				again = true
			case f.proto == rules.TCP:
				again = sum > e.cfg.MissBound && f.miss[i] > enough
			default:
				again = f.good[i] < 2 || f.miss[i] > udpMiss
			}
			if again {
				list = append(list, sweepProbe{f, uint16(i)})
			}
		}
	}
	return list
}

// round sends every probe of list once, in a new order, and judges what
// silence is worth.
func (e *engine) round(list []sweepProbe) error {
	e.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	e.plan(list)
	e.planned = max(e.planned, e.probes+e.estimate(list))
	for _, x := range list {
		x.flow.window[x.i] = 0
	}
	for n, x := range list {
		if n%32 == 0 {
			if err := e.service(e.now()); err != nil {
				return err
			}
		}
		p := x.flow.path
		p.left--
		if p.suspended {
			continue
		}
		if p.until == 0 {
			p.until = p.every
			if err := e.pathCanary(p); err != nil {
				return err
			}
		}
		p.until--
		if err := e.probe(x.flow, int(x.i)); err != nil {
			return err
		}
		if p.left == 0 {
			if err := e.pathCanary(p); err != nil {
				return err
			}
		}
	}
	if err := e.flushAll(); err != nil {
		return err
	}
	e.lastProbe = e.now()
	if err := e.settle(); err != nil {
		return err
	}
	e.judge(list)
	return nil
}

// estimate guesses the packets that this round and those behind it will send.
func (e *engine) estimate(list []sweepProbe) uint64 {
	if e.planned > 0 {
		return uint64(len(list))
	}
	n := 0
	for _, x := range list {
		switch {
		case !x.flow.path.proven:
			n++
		case x.flow.proto == rules.TCP:
			n += 4
		default:
			n += 2
		}
	}
	return uint64(n + n/canaryEvery)
}

// judge turns the canaries of a round into what silence is worth.
func (e *engine) judge(list []sweepProbe) {
	e.mu.Lock()
	defer e.mu.Unlock()
	own := make([]tally, len(e.paths))
	for i, p := range e.paths {
		for _, w := range p.windows {
			own[i].add(tally{w.sent, w.sent - w.got})
		}
		p.total.add(own[i])
		p.pool.round.add(own[i])
		e.lossSeen = e.lossSeen || own[i].lost > 0
	}
	for _, p := range e.pools {
		p.run.add(p.round)
	}
	for i, p := range e.paths {
		for _, w := range p.windows {
			w.miss = 1
			if !w.tainted {
				w.miss = missOf(tally{w.sent, w.sent - w.got}, own[i], p.pool.round, p.pool.run)
			}
		}
	}
	for _, x := range list {
		w := x.flow.window[x.i]
		if w == 0 {
			continue
		}
		miss := x.flow.path.windows[w-1].miss
		x.flow.miss[x.i] *= float32(miss)
		if miss < 0.5 && x.flow.good[x.i] < math.MaxUint8 {
			x.flow.good[x.i]++
		}
	}
}

func (e *engine) anySilentTCP() bool {
	for _, f := range e.flows {
		if f.proto != rules.TCP || !f.path.proven || f.path.dead {
			continue
		}
		for i := range f.ports {
			if f.silent(i) {
				return true
			}
		}
	}
	return false
}

// result is called when both halves rest.
func (e *engine) result() *Result {
	res := &Result{Paths: make([]PathResult, len(e.paths)), Probes: e.probes, Bound: 1}
	sum, alive := 0.0, false
	for i, p := range e.paths {
		r := &res.Paths[i]
		r.Alive = p.proven && !p.dead
		r.From, r.Stray = p.from, p.stray
		r.CanariesSent, r.CanariesLost = p.total.sent, p.total.lost
		r.SentTCP, r.SentUDP = p.sentTCP, p.sentUDP
		r.TCP, r.UDP = p.tcpFlow.result(r.Alive), p.udpFlow.result(r.Alive)
		r.Err = p.err
		if r.Err == nil && !r.Alive { // it never lived
			r.Err = p.link.err()
		}
		alive = alive || r.Alive
		for j, a := range r.TCP {
			if a.State == Filtered {
				sum += float64(p.tcpFlow.miss[j])
			}
		}
	}
	if alive {
		res.Bound = min(sum, 1)
	}
	res.Elapsed = time.Since(e.began)
	return res
}

// result says what silence means, for each port that kept it.
func (f *flow) result(alive bool) []Answer {
	if f == nil {
		return nil
	}
	answers := make([]Answer, len(f.ports))
	for i := range answers {
		a := f.answer(i)
		if f.silent(i) {
			a = Answer{Unknown, PathNotProven}
			if alive && f.miss[i] <= filteredMiss {
				a = Answer{Filtered, NoResponse}
			}
		}
		answers[i] = a
	}
	return answers
}
