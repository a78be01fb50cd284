package verify

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
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
	witnessRounds    = 4 // to get one of which the witness counted everything

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
// All paths are probed at once: who has thousands of hosts cuts them into groups,
// as [LookAtMany] does.
//
// If ctx ends, Sweep returns its error and no result.
func Sweep(ctx context.Context, cfg Config) (*Result, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	e, err := newEngine(ctx, cfg, time.Now())
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

	paths  []*sweepPath
	flows  []*flow
	links  []*sweepLink
	pools  []*pool
	poolOf map[poolKey]*pool
	peers  map[pair]*peer
	ring   *ring
	// By our address and the source port of the probes: who is meant by an answer
	// that comes from another address than the target's.
	sources map[netip.AddrPort]*sweepPath

	stop    atomic.Bool
	drained atomic.Int64 // when the ring was last seen empty, ns since began
	failed  atomic.Bool  // receiveErr is set

	receiveErr error // of the receiving goroutine, to be read after it ended

	mu    sync.Mutex
	order uint64 // of the last canary
	away  int    // canaries of rounds that did not come back yet
	// By how much the latest canaries that came back were slower than the fastest
	// of their path, and how many came back in all.
	late     [tickSample]time.Duration
	returned int

	// The sending half's own.
	pacer     *pacer
	due       int64 // when the next packet may leave, ns since began
	tick      *tick
	ticks     []*tick // waiting for their canaries
	dropsRead int64   // when, ns since began
	lossSeen  bool    // frames that never left, or answers that our ring had no room for
	arrived   arrivals
	senders   sync.WaitGroup
	work      chan *outBatch
	lastProbe int64
	probes    uint64 // packets sent
	planned   uint64
	reported  int64
}

// sweepLink is an interface with the frames that wait for it. The receiving
// half has its own batch, for its RSTs.
type sweepLink struct {
	*outLink
	out  *outBatch // is being filled
	idle []*outBatch
	back chan *outBatch // from the senders
	away int            // at the senders
	rst  *batch
}

// outBatch is a batch with what must be booked when it has left.
type outBatch struct {
	*batch
	link   *sweepLink
	slots  [batchSize]slot
	n      int // frames handed to the senders
	sent   int
	err    error
	before bool // the link was stalled already
}

// slot tells whom a frame of a batch belongs to.
type slot struct {
	count *uint64 // of frames on the wire
	win   *uint16 // to be cleared if the frame never left; nil of a canary
	sent  canaryRef
}

// canaryRef finds a canary that waits to leave; the zero one is none.
type canaryRef struct {
	of *tuples
	i  int
}

// pool is all paths to one host over one link with one family. Small paths borrow
// its loss.
type pool struct {
	rtt    histogram
	run    tally // of canaries in rounds
	probes int   // in this round
}

type poolKey struct {
	link int
	six  bool
	host int
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
	run                    tally // of canaries in rounds
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
	answers []atomic.Uint32 // a State and a Reason for four ports each, written by the receiving half
	window  []uint16        // that the port was last sent in, from 1; 0: not sent in this round
	good    []uint8         // probes in windows that lost no more than their path usually does
	arrived bool            // a tripwire counted every probe of a round that asked all silent ports
}

// sweepProbe is a port of a flow: the flow's number and the port's position,
// in four bytes, since there is one for every port.
type sweepProbe uint32

func newSweepProbe(flow, i int) sweepProbe { return sweepProbe(flow<<16 | i) }

func (e *engine) at(x sweepProbe) (*flow, int) { return e.flows[x>>16], int(x & 0xffff) }

func newFlow(p *sweepPath, proto rules.Protocol, ports []uint16) *flow {
	return &flow{
		path: p, proto: proto, ports: ports,
		answers: make([]atomic.Uint32, (len(ports)+3)/4),
		window:  make([]uint16, len(ports)),
		good:    make([]uint8, len(ports)),
	}
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
	x := f.answers[i/4].Load() >> (i % 4 * 8)
	return Answer{State(x >> 5 & 7), Reason(x & 31)}
}

// setAnswer is the receiving half's alone: no other writes.
func (f *flow) setAnswer(i int, a Answer) {
	word, shift := &f.answers[i/4], i%4*8
	word.Store(word.Load()&^(0xff<<shift) | (uint32(a.State)<<5|uint32(a.Reason))<<shift)
}

func (f *flow) silent(i int) bool { return f.answers[i/4].Load()>>(i%4*8)&0xff == 0 }

// misses gives the chance that every answer to a port got lost, by the number
// of its good probes.
func (f *flow) misses() (chance [maxRounds + 1]float64) {
	p := f.path.missRate()
	chance[0] = 1
	for i := 1; i < len(chance); i++ {
		chance[i] = chance[i-1] * p
	}
	return chance
}

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
		poolOf: make(map[poolKey]*pool), peers: make(map[pair]*peer), sources: make(map[netip.AddrPort]*sweepPath),
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
		e.links = append(e.links, newSweepLink(l))
	}
	p.link = e.links[i]
	of := poolKey{c.Link.Index, c.Dst.Is6(), c.Host}
	if p.pool = e.poolOf[of]; p.pool == nil {
		p.pool = new(pool)
		e.poolOf[of], e.pools = p.pool, append(e.pools, p.pool)
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
	if len(e.flows) > 1<<16 {
		return errors.New("too many paths for one run")
	}
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
	e.startSenders()
	defer e.stopSenders()
	if err := e.pilot(); err != nil {
		return err
	}
	for r := range maxRounds {
		list := e.silentProbes(r)
		if len(list) == 0 {
			break
		}
		if err := e.round(r, list); err != nil {
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
	if (e.lossSeen || e.canariesAway()) && e.anySilentTCP() {
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
		if f.proto != rules.TCP || f.arrived || !f.path.proven || f.path.dead {
			continue
		}
		miss := f.misses()
		for i := range f.ports {
			if f.silent(i) {
				sum += miss[f.good[i]]
				count++
			}
		}
	}
	// Each port may have an equal part of the bound.
	enough := 1.0
	if sum > e.cfg.MissBound {
		enough = e.cfg.MissBound / float64(count)
	}
	var list []sweepProbe
	for n, f := range e.flows {
		p := f.path
		if p.dead || f.arrived {
			continue
		}
		rounds := maxRounds
		switch {
		case len(p.kinds) == 0:
			rounds = 2
		case !p.proven:
			rounds = 1
		}
		if e.cfg.Arrived != nil {
			rounds = max(rounds, witnessRounds)
		}
		if r >= rounds {
			continue
		}
		miss := f.misses()
		for i := range f.ports {
			a := f.answer(i)
			again := false
			switch {
			case a.Reason == RouterError:
				again = r < 3 // a router that was in a hurry must not hide an answer
			case a.State != Unknown:
			case r == 0 || !p.proven:
				again = true
			case e.cfg.Arrived != nil && r < witnessRounds:
				again = true // a full count proves more than any number of rounds
			case f.proto == rules.TCP:
				again = sum > e.cfg.MissBound && miss[f.good[i]] > enough
			default:
				again = f.good[i] < 2 || miss[f.good[i]] > udpMiss
			}
			if again {
				list = append(list, newSweepProbe(n, i))
			}
		}
	}
	return list
}

// round sends every probe of list once, in a new order, and judges what
// silence is worth.
func (e *engine) round(r int, list []sweepProbe) error {
	e.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	e.plan(r, list)
	e.planned = max(e.planned, e.probes+e.estimate(list))
	for _, f := range e.flows {
		clear(f.window)
	}
	if err := e.arrived.begin(e); err != nil {
		return err
	}
	for n, x := range list {
		if n%32 == 0 {
			if err := e.service(e.now()); err != nil {
				return err
			}
		}
		f, i := e.at(x)
		p := f.path
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
		if err := e.probe(f, i); err != nil {
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
	return e.arrived.end(e)
}

// estimate guesses the packets that this round and those behind it will send.
func (e *engine) estimate(list []sweepProbe) uint64 {
	if e.planned > 0 {
		return uint64(len(list))
	}
	n := 0
	for _, x := range list {
		f, _ := e.at(x)
		switch {
		case !f.path.proven || e.cfg.Arrived != nil:
			n++
		case f.proto == rules.TCP:
			n += 3
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
			w.judged = true
			t := tally{w.sent, w.sent - w.got}
			p.total.add(t)
			if t.sent < windowSize || !t.dead() { // an outage is no loss rate
				own[i].add(t)
			}
		}
		p.run.add(own[i])
		p.pool.run.add(own[i])
	}
	for i, p := range e.paths {
		rate := p.missRate()
		usual := rate < 0.5 && !own[i].dead() && !own[i].worseThan(rate)
		for _, w := range p.windows {
			t := tally{w.sent, w.sent - w.got}
			w.proves = usual && !w.tainted && !t.dead() && !t.worseThan(rate)
		}
	}
	for _, x := range list {
		f, i := e.at(x)
		if w := f.window[i]; w > 0 && f.path.windows[w-1].proves {
			f.good[i]++
		}
	}
}

// missRate bounds the loss in a path's rounds and windows that lost no more than usual:
// the path's own over the whole run, or that of all paths to its host over its link with
// its family if it has too few canaries to tell.
func (p *sweepPath) missRate() float64 {
	rate := p.run.upper()
	if p.run.sent < ownSample {
		rate = p.pool.run.upper()
		if p.run.worseThan(rate) {
			rate = max(rate, p.run.upper())
		}
	}
	return rate
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
		r.Sent = p.sentTCP + p.sentUDP + p.sent
		r.TCP, r.UDP = p.tcpFlow.result(r.Alive), p.udpFlow.result(r.Alive)
		r.Err = p.err
		if r.Err == nil && !r.Alive { // it never lived
			r.Err = p.link.err()
		}
		r.ArrivedTCP = p.tcpFlow != nil && p.tcpFlow.arrived
		r.ArrivedUDP = p.udpFlow != nil && p.udpFlow.arrived
		alive = alive || r.Alive || r.ArrivedTCP
		if p.tcpFlow == nil || r.ArrivedTCP {
			continue
		}
		miss := p.tcpFlow.misses()
		for j, a := range r.TCP {
			if a.State == Filtered {
				r.Bound += miss[p.tcpFlow.good[j]]
			}
		}
		sum += r.Bound
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
	miss := f.misses()
	for i := range answers {
		a := f.answer(i)
		if f.silent(i) {
			a = Answer{Unknown, PathNotProven}
			if f.arrived || alive && miss[f.good[i]] <= filteredMiss {
				a = Answer{Filtered, NoResponse}
			}
		}
		answers[i] = a
	}
	return answers
}
