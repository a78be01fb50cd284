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

	// Linux repeats a SYN-ACK after one second: TCP_TIMEOUT_INIT in
	// include/net/tcp.h, RFC 6298 section 2.
	synAckAgain = 1100 * time.Millisecond
	// An answer that took this much longer than the fastest is such a repetition
	// and says nothing about the way.
	retransmitted = 900 * time.Millisecond

	receivePoll  = 5 * time.Millisecond
	drainLimit   = 2 * time.Second
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
	index int
	peer  *peer
	link  *sweepLink
	pool  *pool

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

	// Of this round.
	windows   []*window
	checked   int // windows that cannot be dead any more
	left      int // probes
	canaries  int
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
	case a.Reason == RouterError:
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
		peers: make(map[pair]*peer),
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
	p := &sweepPath{Path: c, index: index}
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
	e.tick = &tick{start: e.now()}
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
	if e.lossSeen && e.anySilentTCP() {
		// An open port's SYN-ACK may be the packet that got lost.
		return e.sleepUntil(e.lastProbe + int64(synAckAgain))
	}
	return nil
}

// pilot finds out which canaries of each path live, and how long they take.
func (e *engine) pilot() error {
	var paths []*sweepPath
	for _, p := range e.paths {
		if len(p.kinds) > 0 && (p.tcpFlow != nil || p.udpFlow != nil) {
			paths = append(paths, p)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	first := 2
	if len(paths) <= 8 {
		first = pilotCanaries
	}
	start := e.now()
	wait := int64(100 * time.Millisecond)
	for try := start; ; wait *= 2 {
		n := 1
		if try == start {
			n = first
		}
		for _, p := range paths {
			if p.proven {
				continue
			}
			for _, k := range p.kinds {
				for range n {
					if err := e.canary(p, k, nil); err != nil {
						return err
					}
				}
			}
		}
		if err := e.flushAll(); err != nil {
			return err
		}
		try = e.now()
		all, err := e.heard(paths, min(try+wait, start+int64(pilotLimit)))
		if err != nil {
			return err
		}
		if all || e.now()-start >= int64(pilotLimit) {
			break
		}
	}
	// The slower kinds get their chance too.
	if err := e.settle(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, p := range paths {
		p.prefer()
		p.proven = p.heard > 0
	}
	e.tick = &tick{start: e.now()} // what did not answer the pilot is no loss
	return nil
}

// heard waits until a canary came back on every path since p.asked, or for the
// given time, and says whether all did.
func (e *engine) heard(paths []*sweepPath, until int64) (bool, error) {
	for {
		e.mu.Lock()
		all := true
		for _, p := range paths {
			p.proven = p.proven || p.heard > 0
			all = all && p.heard > p.asked
		}
		e.mu.Unlock()
		if all || e.now() >= until {
			return all, nil
		}
		if err := e.sleep(time.Millisecond); err != nil {
			return false, err
		}
	}
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

// plan spreads the canaries of a round over the probes of each path.
func (e *engine) plan(list []sweepProbe) {
	for _, p := range e.pools {
		p.round, p.silent, p.probes = tally{}, 0, 0
	}
	for _, p := range e.paths {
		p.windows, p.checked, p.left, p.canaries, p.until, p.suspended = nil, 0, 0, 0, 0, false
		for _, k := range p.kinds {
			k.sent, k.got = 0, 0
		}
	}
	for _, x := range list {
		p := x.flow.path
		p.left++
		if p.proven {
			p.pool.probes++
			if x.flow.proto == rules.TCP {
				p.pool.silent++
			}
		}
	}
	for _, p := range e.paths {
		if p.left == 0 || !p.proven {
			continue
		}
		// With this many canaries over all paths of a pool, four rounds without
		// loss meet the bound: silent·(3/n)⁴ = bound.
		need := 3 * math.Pow(float64(p.pool.silent)/e.cfg.MissBound, 0.25)
		share := int(math.Ceil(need * float64(p.left) / float64(p.pool.probes)))
		n := max(p.left/canaryEvery, min(share, max(tinyCanaries, p.left/8)), 2)
		// Later rounds want some of the tuples too.
		n = max(2, min(n, e.tuplesLeft(p)/3))
		p.canaries = n
		p.every = max(1, (p.left+n-2)/(n-1))
	}
}

func (e *engine) tuplesLeft(p *sweepPath) int {
	n := 0
	for _, k := range p.kinds {
		if k.live {
			n += p.peer.tuples(k.Canary).left()
		}
	}
	return n
}

func (p *peer) tuples(c Canary) *tuples {
	if c.Kind == CanaryTCP {
		return p.tcp[c.Port]
	}
	return p.echo
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

// probe puts one probe into its link's batch.
func (e *engine) probe(f *flow, i int) error {
	p := f.path
	if len(p.windows) == 0 {
		p.windows = append(p.windows, new(window)) // without canaries: proves nothing
	}
	f.window[i] = uint32(len(p.windows))
	b, port := p.link.out.next(), f.ports[i]
	if f.proto == rules.TCP {
		seq := e.key.cookie(p.peer.id, p.SrcPort, port)
		return e.put(p.link, p.syn.tcp(b, p.SrcPort, port, seq), slot{&p.sentTCP, &f.window[i]})
	}
	return e.put(p.link, p.udp.udp(b, p.SrcPort, port), slot{&p.sentUDP, &f.window[i]})
}

// pathCanary sends the next canary of a round, where the path has live ones.
func (e *engine) pathCanary(p *sweepPath) error {
	if !p.proven {
		return nil
	}
	k := p.next()
	if k == nil {
		return nil
	}
	var w *window
	if n := len(p.windows); n > 0 {
		w = p.windows[n-1]
	}
	// The rest of a round that would make no window of its own joins the last.
	if w == nil || w.sent >= windowSize && p.left >= p.every*windowSize {
		w = &window{first: e.now()}
		p.windows = append(p.windows, w)
	}
	return e.canary(p, k, w)
}

// next picks the kind of the next canary: mostly the preferred one, but every
// eighth is another that lives, and any will do when tuples run out.
func (p *sweepPath) next() *kind {
	p.turn++
	n := len(p.kinds)
	start := p.primary
	if p.turn%8 == 0 && n > 1 {
		start = p.primary + 1 + p.turn/8%(n-1)
	}
	for i := range n {
		// From the chosen kind to the preferred one to all the others.
		k := p.kinds[(start+i)%n]
		if i == 0 && !k.live && start != p.primary {
			k = p.kinds[p.primary]
		}
		if k.live && p.peer.tuples(k.Canary).left() > 0 {
			return k
		}
	}
	return nil
}

// canary puts one canary into its link's batch.
func (e *engine) canary(p *sweepPath, k *kind, w *window) error {
	t := p.peer.tuples(k.Canary)
	if t.left() <= 0 {
		return nil
	}
	now := e.now()
	e.mu.Lock()
	i := len(t.used)
	e.order++
	t.used = append(t.used, canarySent{at: now, path: p, kind: k, win: w, tick: e.tick, order: e.order})
	e.tick.sent++
	k.sent++
	if w != nil {
		w.sent++
		w.last = now
	}
	e.mu.Unlock()

	b := p.link.out.next()
	var n int
	if k.Kind == CanaryTCP {
		sport := t.port(i)
		n = p.syn.tcp(b, sport, k.Port, e.key.cookie(p.peer.id, sport, k.Port))
	} else {
		id, seq := t.number(i)
		n = p.echo.echo(b, id, seq, e.key.cookie(p.peer.id, id, seq))
	}
	return e.put(p.link, n, slot{count: &p.sent})
}

// put adds a frame that stands in the batch's next buffer.
func (e *engine) put(l *sweepLink, length int, s slot) error {
	l.slots[l.out.n] = s
	l.out.add(length)
	if l.out.n < e.pacer.burst() {
		return nil
	}
	return e.flush(l)
}

// flush sends what waits for a link, when the rate allows it.
func (e *engine) flush(l *sweepLink) error {
	n := l.out.n
	if n == 0 {
		return nil
	}
	if err := e.ctx.Err(); err != nil {
		return err
	}
	if e.failed.Load() {
		return errors.New("receiving half stopped") // its own error comes first
	}
	stalled := l.stalled.Load() != 0
	sent, err := l.out.send(l.outLink, stallLimit)
	if err != nil {
		return err
	}
	for i, s := range l.slots[:n] {
		switch {
		case i < sent:
			*s.count++
		case s.win != nil:
			*s.win = 0
		}
	}
	e.probes += uint64(sent)
	e.tick.packets += n
	if sent < n {
		e.lossSeen = true
		if stalled {
			return e.sleep(time.Millisecond)
		}
	}

	now := e.now()
	// Time that was lost is made up for, but not by a flood.
	e.due = max(e.due, now-int64(5*time.Millisecond)) + int64(float64(n)/e.pacer.rate*1e9)
	for now < e.due {
		if d := time.Duration(e.due - now); d > 200*time.Microsecond {
			if err := e.sleep(d - 100*time.Microsecond); err != nil {
				return err
			}
		} else {
			runtime.Gosched()
		}
		now = e.now()
	}
	return nil
}

func (e *engine) flushAll() error {
	for _, l := range e.links {
		if err := e.flush(l); err != nil {
			return err
		}
	}
	return nil
}

// service does what is due now and then: judge the rate, look after our own
// ring, leave out paths that died.
func (e *engine) service(now int64) error {
	t := e.tick
	if now-t.start < tickLength || t.sent < tickSample && now-t.start < tickMaximum {
		return nil
	}
	if err := e.flushAll(); err != nil {
		return err
	}
	now = e.now()
	t.end = now
	e.ticks = append(e.ticks, t)
	e.tick = &tick{start: now}
	grace := int64(e.grace())
	e.mu.Lock()
	for len(e.ticks) > 0 && e.ticks[0].end+grace < now {
		e.pacer.judge(e.ticks[0], now)
		e.ticks = e.ticks[1:]
	}
	for _, p := range e.paths {
		p.suspended = p.suspended || p.left > 0 && p.lost(now-grace)
	}
	e.mu.Unlock()
	if e.cfg.Progress != nil && now-e.reported >= progressStep {
		e.reported = now
		e.planned = max(e.planned, e.probes)
		e.cfg.Progress(e.probes, e.planned)
	}
	return e.readDrops(now)
}

// lost says that a whole window of the path stayed without an answer, though
// its last canary left before the given time.
func (p *sweepPath) lost(before int64) bool {
	for ; p.checked < len(p.windows); p.checked++ {
		w := p.windows[p.checked]
		if w.sent < windowSize {
			return false
		}
		if w.got == 0 {
			return w.last < before
		}
	}
	return false
}

// readDrops makes every window prove nothing that was open while our own ring
// had no room.
func (e *engine) readDrops(now int64) error {
	drops, err := e.ring.drops()
	if err != nil {
		return err
	}
	if drops > 0 {
		e.taint(e.dropsRead - int64(e.grace()))
	}
	e.dropsRead = now
	return nil
}

func (e *engine) taint(since int64) {
	e.lossSeen = true
	for _, p := range e.paths {
		for i := len(p.windows) - 1; i >= 0; i-- {
			// Without canaries last is zero, and nothing is proved anyway.
			if p.windows[i].last < since {
				break
			}
			p.windows[i].tainted = true
		}
	}
}

// grace is how long answers to the slowest path may take.
func (e *engine) grace() time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	g := graceMin
	for _, p := range e.pools {
		g = max(g, p.rtt.grace())
	}
	for _, p := range e.paths {
		g = max(g, 3*p.minRTT)
	}
	return min(g, graceMax)
}

// settle waits until the answers to all that was sent had their time, and until
// the receiving half has read what is there.
func (e *engine) settle() error {
	until := e.now() + int64(e.grace())
	if err := e.sleepUntil(until); err != nil {
		return err
	}
	for e.drained.Load() < until {
		if e.now()-until > int64(drainLimit) {
			e.taint(0)
			break
		}
		if err := e.sleep(time.Millisecond); err != nil {
			return err
		}
	}
	return e.readDrops(e.now())
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
		p.demote()
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

// demote gives up a kind of canary that loses far more than the path does by
// another kind: something limits it, and its loss is not that of the probes.
func (p *sweepPath) demote() {
	best := 1.0
	for _, k := range p.kinds {
		if k.live && k.sent >= tinyCanaries {
			best = min(best, 1-float64(k.got)/float64(k.sent))
		}
	}
	for _, k := range p.kinds {
		if k.live && k.sent >= tinyCanaries && 1-float64(k.got)/float64(k.sent) > 0.25+3*best {
			k.live, k.demoted = false, true
		}
	}
	p.prefer()
}

// prefer makes the first kind that lives the usual one.
func (p *sweepPath) prefer() {
	p.primary = max(0, slices.IndexFunc(p.kinds, func(k *kind) bool { return k.live }))
}

// revive waits for the paths that were lost during a round; those that do not
// come back take no further part.
func (e *engine) revive() error {
	var lost []*sweepPath
	e.mu.Lock()
	for _, p := range e.paths {
		if p.dead || !p.proven || len(p.windows) == 0 {
			continue
		}
		if p.suspended || p.windows[len(p.windows)-1].got == 0 {
			lost = append(lost, p)
		}
	}
	e.mu.Unlock()
	if len(lost) == 0 {
		return nil
	}
	if err := e.demandCanaries(lost, reviveLimit); err != nil {
		return err
	}
	// An outage says nothing about the rate, though its edges looked like loss.
	e.pacer = newPacer(e.cfg.MaxRate)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ticks, e.tick = nil, &tick{start: e.now()}
	return nil
}

// last proves each path alive after its last probe.
func (e *engine) last() error {
	var paths []*sweepPath
	for _, p := range e.paths {
		if p.proven && !p.dead {
			paths = append(paths, p)
		}
	}
	return e.demandCanaries(paths, finalLimit)
}

// demandCanaries sends canaries over each path until one comes back; a path
// that has none within the limit is dead.
func (e *engine) demandCanaries(paths []*sweepPath, limit time.Duration) error {
	if len(paths) == 0 {
		return nil
	}
	windows := make([]*window, len(paths))
	e.mu.Lock()
	for i, p := range paths {
		windows[i] = new(window)
		p.asked = e.order
	}
	e.mu.Unlock()
	start := e.now()
	wait := int64(2 * e.grace())
	for {
		for i, p := range paths {
			if e.answeredSince(p) {
				continue
			}
			for range finalCanaries {
				if k := p.next(); k != nil {
					if err := e.canary(p, k, windows[i]); err != nil {
						return err
					}
				}
			}
		}
		if err := e.flushAll(); err != nil {
			return err
		}
		end := start + int64(limit)
		all, err := e.heard(paths, min(e.now()+wait, end))
		if err != nil {
			return err
		}
		if all || e.now() >= end {
			break
		}
	}
	if err := e.settle(); err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for i, p := range paths {
		t := tally{windows[i].sent, windows[i].sent - windows[i].got}
		p.total.add(t)
		e.lossSeen = e.lossSeen || t.lost > 0
		if p.heard <= p.asked {
			p.dead = true
			p.err = p.link.err()
		}
	}
	return nil
}

func (e *engine) answeredSince(p *sweepPath) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return p.heard > p.asked
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

func (e *engine) sleepUntil(t int64) error { return e.sleep(time.Duration(t - e.now())) }

func (e *engine) sleep(d time.Duration) error {
	if d <= 10*time.Millisecond { // a timer and a channel cost more than the delay they save
		time.Sleep(d)
		return e.ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-e.ctx.Done():
		return e.ctx.Err()
	}
}

// receive is the receiving half, until stop is set or the socket breaks.
func (e *engine) receive() {
	var r reply
	var at int64
	handle := func(packet []byte) {
		if parseReply(packet, &r) {
			e.handle(&r, at)
		}
	}
	for {
		at = e.now()
		more := e.ring.block(handle)
		for _, l := range e.links {
			e.sendRSTs(l)
		}
		if more {
			continue
		}
		e.drained.Store(at)
		if e.stop.Load() {
			return
		}
		if err := e.ring.wait(receivePoll); err != nil {
			e.receiveErr = err
			e.failed.Store(true)
			return
		}
	}
}

// handle takes one answer in.
func (e *engine) handle(r *reply, now int64) {
	switch r.kind {
	case replyTCP:
		p := e.peers[pair{r.to, r.from}]
		if p == nil || r.flags&flagACK == 0 || r.ack != e.key.cookie(p.id, r.dport, r.sport)+1 {
			return
		}
		e.handleTCP(p, r, now)
	case replyUDP:
		if p := e.path(r.to, r.from, r.dport); p != nil {
			e.record(p.udpFlow, r.sport, Answer{Open, UDPAnswer}, r.from)
		}
	case replyEcho:
		p := e.peers[pair{r.to, r.from}]
		if p != nil && r.cookie == e.key.cookie(p.id, r.id, r.number) {
			e.canaryBack(p.echo, p.echo.index(r.id, r.number), now)
		}
	case replyError:
		if r.to != r.quotedSrc {
			return
		}
		p := e.path(r.quotedSrc, r.quotedDst, r.quotedSrcPort)
		switch {
		case p == nil:
		case r.quotedProto == rules.UDP:
			e.record(p.udpFlow, r.quotedDstPort, icmpAnswer(r), r.from)
		case r.quotedProto == rules.TCP && r.quotedSeq == e.key.cookie(p.peer.id, r.quotedSrcPort, r.quotedDstPort):
			e.record(p.tcpFlow, r.quotedDstPort, icmpAnswer(r), r.from)
		}
	}
}

func (e *engine) path(ours, theirs netip.Addr, port uint16) *sweepPath {
	if p := e.peers[pair{ours, theirs}]; p != nil {
		return p.paths[port]
	}
	return nil
}

// handleTCP takes in a segment whose acknowledgement proves that it answers us.
func (e *engine) handleTCP(p *peer, r *reply, now int64) {
	synAck := r.flags&(flagSYN|flagRST) == flagSYN
	if path := p.paths[r.dport]; path != nil {
		if synAck {
			e.queueRST(path, r)
		}
		a := Answer{Closed, TCPOther}
		switch {
		case synAck:
			a = Answer{Open, SynAck}
		case r.flags&flagRST != 0:
			a.Reason = TCPReset
		}
		e.record(path.tcpFlow, r.sport, a, r.from)
		return
	}
	t := p.tcp[r.sport]
	if t == nil || r.flags&(flagSYN|flagRST) == 0 {
		return
	}
	if path := e.canaryBack(t, t.position(r.dport), now); path != nil && synAck {
		e.queueRST(path, r)
	}
}

// record keeps the strongest answer of a port.
func (e *engine) record(f *flow, port uint16, a Answer, from netip.Addr) {
	if f == nil {
		return
	}
	i, ok := f.find(port)
	if !ok || a.weight() <= f.answer(i).weight() {
		return
	}
	f.answers[i].Store(uint32(a.State)<<8 | uint32(a.Reason))
	p := f.path
	e.mu.Lock()
	defer e.mu.Unlock()
	target := Target{f.proto, port}
	if from == p.Dst {
		delete(p.from, target)
		return
	}
	if p.from == nil {
		p.from = make(map[Target]netip.Addr)
	}
	p.from[target] = from
}

// canaryBack books an answered canary, once, and returns its path.
func (e *engine) canaryBack(t *tuples, i int, now int64) *sweepPath {
	e.mu.Lock()
	defer e.mu.Unlock()
	if i < 0 || i >= len(t.used) {
		return nil
	}
	c := &t.used[i]
	if c.answered {
		return c.path
	}
	c.answered = true
	p, rtt := c.path, time.Duration(now-c.at)
	p.heard = max(p.heard, c.order)
	if p.minRTT == 0 || rtt < p.minRTT {
		p.minRTT = max(rtt, 1)
	}
	if rtt < p.minRTT+retransmitted {
		p.pool.rtt.add(rtt)
	}
	c.tick.got++
	if c.win != nil {
		c.win.got++
	}
	c.kind.got++
	c.kind.live = !c.kind.demoted
	return p
}

// queueRST ends the connection that a SYN-ACK began on the target (RFC 9293
// section 3.5.2).
func (e *engine) queueRST(p *sweepPath, r *reply) {
	l := p.link
	l.rst.add(p.rst.tcp(l.rst.next(), r.dport, r.sport, r.ack))
	if l.rst.n == batchSize {
		e.sendRSTs(l)
	}
}

// sendRSTs does not care for errors: the target sends its SYN-ACK again, and a
// link that is broken shows in the sending half.
func (e *engine) sendRSTs(l *sweepLink) {
	if l.rst.n > 0 {
		_, _ = l.rst.send(l.outLink, rstLimit)
	}
}

// result is called when both halves rest.
func (e *engine) result() *Result {
	res := &Result{Paths: make([]PathResult, len(e.paths)), Probes: e.probes, Bound: 1}
	sum, alive := 0.0, false
	for i, p := range e.paths {
		r := &res.Paths[i]
		r.Alive = p.proven && !p.dead
		r.From = p.from
		r.CanariesSent, r.CanariesLost = p.total.sent, p.total.lost
		r.SentTCP, r.SentUDP = p.sentTCP, p.sentUDP
		r.TCP, r.UDP = p.tcpFlow.result(r.Alive), p.udpFlow.result(r.Alive)
		r.Err = p.err
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
