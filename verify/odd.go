package verify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

const (
	oddRounds      = 2  // sendings of a silent probe
	oddRoundsLossy = 5  // where canaries get lost
	oddCanaryEvery = 12 // probes of an address a canary
	oddBurst       = 16 // packets between two pauses
	oddPause       = time.Millisecond
	oddGraceMin    = 60 * time.Millisecond
	oddGraceMax    = 2 * time.Second
	oddMostPorts   = 32 // of a kind and an address, at level 1
	oddMostDeep    = 128
	oddReloads     = 3
)

// oddConfig is what [planOdd] needs.
type oddConfig struct {
	rules *rules.Ruleset
	// views has one for each address of the host that is probed. Those with Sweep
	// set are swept too.
	views []View
	swept Ports
	// all says that the whole host is asked about: then ICMP and protocols other
	// than TCP and UDP are probed too.
	all bool
	// own says that the host is a throw-away one of ours: there are listeners behind
	// its ports, and its ruleset may be loaded again.
	own bool
	// many says that nobody but the host is on the link: what reaches everybody there
	// may be sent to it.
	many      bool
	witnessed bool  // a witness on the host counts what arrives
	entire    bool  // no fragments are sent
	listening Ports // unlisted ports with a listener
	level     int   // of --thorough
	budget    int   // packets at most, as far as one port a kind allows it
	taken     map[uint16]bool
	maxRate   int // packets per second, 0 for none
}

// oddProbe is one odd packet, or the fragments of one.
type oddProbe struct {
	kind         *oddKind
	view         int
	link         Link
	src, dst     netip.Addr
	proto        rules.Protocol
	sport, dport uint16
	number       uint32
	tag          uint16 // the mark of its packets; 0 of a canary
	expect       Expectation
	control      bool // the policy opens it: it shows that the kind gets there
	listed       bool // the policy names it: a tripwire shows whether it gets in
	canary       bool

	sent uint64
	// Of the witness: packets that were booked, what it had counted by then, and
	// whether all of one sending arrived.
	booked, counted uint64
	arrived         bool
	// Guarded by odd.mu.
	answer  Answer
	from    netip.Addr
	answers int
}

// oddKey finds the probe that a packet answers. One end is the key's, the other
// end the probe's: an answer to a broadcast comes from elsewhere.
type oddKey struct {
	ours         netip.Addr
	proto        rules.Protocol
	sport, dport uint16
	number       uint32 // of TCP, less what an answer may add to it
}

// A stack adds the length of data and flags to what it acknowledges.
const numberMask = ^uint32(63)

// oddPath is what canaries showed of one view.
type oddPath struct {
	sent, back int
	heard      bool // since the last demand
	alive      bool // so far at every demand
	unsent     int  // probes that the link refused
}

// odd is a run of odd probes.
type odd struct {
	cfg    oddConfig
	rng    *rand.Rand
	ports  []uint16 // fresh source ports, used from the end
	probes []*oddProbe

	witness *oddWitness // nil: none
	links   map[int]*outLink
	ring    *ring
	stop    atomic.Bool
	ended   chan error

	mu      sync.Mutex
	index   map[oddKey][]*oddProbe
	paths   []oddPath
	sentAt  map[*oddProbe]time.Time // of canaries
	slowest time.Duration           // round trip of a canary
	routers int                     // errors from somebody who is not the host
	packets uint64
	begun   bool // a stage has ended
	elapsed time.Duration
}

// planOdd chooses the probes; nothing is sent yet.
func planOdd(cfg oddConfig) *odd {
	o := &odd{
		cfg: cfg, rng: rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), index: map[oddKey][]*oddProbe{},
		paths: make([]oddPath, len(cfg.views)), sentAt: map[*oddProbe]time.Time{}, links: map[int]*outLink{},
	}
	o.ports = slices.DeleteFunc(freshPorts(), func(p uint16) bool { return cfg.taken[p] })
	kinds := slices.DeleteFunc(oddKinds(), func(k oddKind) bool { return !o.wanted(&k) })

	// As many ports a kind as the budget bears.
	rounds := oddRounds
	if cfg.witnessed {
		rounds = 1
	}
	each, fixed := 0, 0
	for i := range kinds {
		for v := range cfg.views {
			switch k := &kinds[i]; {
			case !o.fits(k, v):
			case k.hasPorts():
				each += 2 * rounds // a fragmented one is two packets
				fixed += rounds
			default:
				fixed += rounds * max(1, len(k.protos))
			}
		}
	}
	most := oddMostPorts
	if cfg.level > 1 {
		most = oddMostDeep
	}
	n := 0
	if each > 0 {
		n = min(max((cfg.budget-fixed)*oddCanaryEvery/(oddCanaryEvery+1)/each, 2), most)
	}
	for i := range kinds {
		for v := range cfg.views {
			if o.fits(&kinds[i], v) {
				o.add(&kinds[i], v, n)
			}
		}
	}
	o.mark()
	return o
}

// mark gives every probe a mark that no other one of its family has, and in an order
// of its own: a host may still hold fragments of an earlier run.
func (o *odd) mark() {
	var free [2][]int
	for i := range free {
		free[i] = o.rng.Perm(1<<16 - 1)
	}
	o.probes = slices.DeleteFunc(o.probes, func(x *oddProbe) bool {
		list := &free[0]
		if x.dst.Is6() {
			list = &free[1]
		}
		if len(*list) == 0 {
			return true
		}
		x.tag, *list = uint16((*list)[0]+1), (*list)[1:]
		return false
	})
}

// sources are the addresses that the probes come from.
func (o *odd) sources() []netip.Addr {
	var out []netip.Addr
	for i := range o.cfg.views {
		out = append(out, o.cfg.views[i].Path.Src)
	}
	return out
}

// marks are those of all probes.
func (o *odd) marks() []oddMark {
	var out []oddMark
	for _, x := range o.probes {
		out = append(out, x.mark())
	}
	return out
}

func (x *oddProbe) mark() oddMark { return oddMark{x.dst.Is6(), x.tag} }

// wanted reports whether a kind belongs to the run at all.
func (o *odd) wanted(k *oddKind) bool {
	switch {
	case max(k.level, 1) > o.cfg.level:
		return false
	case k.place != toHost && !o.cfg.many, k.reload && !o.cfg.own, k.pieces && o.cfg.entire:
		return false
	}
	switch k.proto {
	case rules.TCP:
		return len(o.cfg.swept.TCP) > 0
	case rules.UDP:
		return len(o.cfg.swept.UDP) > 0
	}
	return o.cfg.all
}

// fits reports whether a kind goes to a view.
func (o *odd) fits(k *oddKind, view int) bool {
	v := &o.cfg.views[view]
	switch {
	case !k.only.Has(v.Path.Dst.Is4()):
		return false
	case k.plain && v.Sweep, (k.place != toHost || k.reload) && !v.Sweep:
		return false
	}
	return true
}

// add makes the probes of a kind for a view: up to n unlisted ports, and a
// control.
func (o *odd) add(k *oddKind, view, n int) {
	v := &o.cfg.views[view]
	sport := k.sport
	if sport == 0 && k.protos == nil {
		if len(o.ports) == 0 {
			return
		}
		sport = o.ports[len(o.ports)-1]
		o.ports = o.ports[:len(o.ports)-1]
	}
	e := newExpecter(o.cfg.rules, v)
	probe := func(proto rules.Protocol, dport uint16) *oddProbe {
		x := &oddProbe{
			kind: k, view: view, link: v.Path.Link, src: v.Path.Src, dst: v.Path.Dst, proto: proto,
			sport: sport, dport: dport, number: o.rng.Uint32() & numberMask,
		}
		switch {
		case k.place == toBroadcast:
			x.dst = broadcast4()
		case k.place == toMulticast && x.dst.Is4():
			x.dst = netip.AddrFrom4([4]byte{224, 0, 0, 1})
		case k.place == toMulticast:
			x.dst = netip.MustParseAddr("ff02::1")
		}
		x.expect = e.decide(rules.Packet{
			Src: x.src, Dst: x.dst, Protocol: proto, SrcPort: sport, DstPort: dport, ICMPType: k.icmp, Flow: k.flow,
		})
		return x
	}
	take := func(x *oddProbe) {
		open := x.expect.Outcome == rules.OutcomeOpen
		x.listed = open && o.cfg.witnessed && !x.expect.Limited && k.icmp == 0 && o.names(x.proto, x.dport)
		if !x.expect.Either && (!open || x.listed) {
			o.probes = append(o.probes, x)
		}
	}
	switch {
	case k.protos != nil:
		for _, p := range k.protos {
			if v.Path.Dst.Is4() || !extends(p) {
				take(probe(p, 0))
			}
		}
		return
	case !k.hasPorts():
		take(probe(k.proto, 0))
		return
	}
	ports := o.sample(k)
	for taken := 0; len(ports) > 0 && taken < n; ports = ports[1:] {
		x := probe(k.proto, ports[0])
		// A port that is open to a SYN may answer what follows one: that betrays nothing.
		plain := e.decide(rules.Packet{Src: x.src, Dst: x.dst, Protocol: k.proto, SrcPort: sport, DstPort: x.dport})
		if x.expect.Outcome == rules.OutcomeOpen || x.expect.Either || plain.Outcome == rules.OutcomeOpen || plain.Either {
			continue
		}
		o.probes = append(o.probes, x)
		taken++
	}
	if k.proto == rules.SCTP {
		for _, port := range o.listedSCTP() {
			if x := probe(k.proto, port); x.expect.Outcome == rules.OutcomeOpen {
				take(x)
			}
		}
	}
	if k.quiet || k.flow != rules.NewFlow || k.reload {
		return
	}
	for _, port := range o.controls(k, v) {
		x := probe(k.proto, port)
		if x.control = x.expect.Outcome == rules.OutcomeOpen && !x.expect.Either && !x.expect.Limited; x.control {
			o.probes = append(o.probes, x)
			return
		}
	}
}

// names reports whether an opening names a protocol, and not just every one.
func (o *odd) names(proto rules.Protocol, port uint16) bool {
	return slices.ContainsFunc(o.cfg.rules.OpensAt(proto, port), func(open *rules.Open) bool { return !open.Any })
}

// listedSCTP are the ports of SCTP that openings name, the first ones of many.
func (o *odd) listedSCTP() []uint16 {
	var out []uint16
	for i := range o.cfg.rules.Policy.Open {
		for _, r := range o.cfg.rules.Policy.Open[i].Ports(rules.SCTP) {
			for p := int(r.Lo); p <= int(r.Hi) && len(out) < mostPortsOfAView; p++ {
				out = append(out, uint16(p))
			}
		}
	}
	return union(nil, out)
}

// sample lists ports in random order, those with a listener and those without by
// turns: a stack is silent to a FIN where somebody listens, and seldom speaks of
// closed UDP ports.
func (o *odd) sample(k *oddKind) []uint16 {
	swept, listening := o.cfg.swept.TCP, o.cfg.listening.TCP
	switch k.proto {
	case rules.TCP:
	case rules.UDP:
		swept, listening = o.cfg.swept.UDP, o.cfg.listening.UDP
	default:
		listening = nil
	}
	within := func(p uint16) bool { _, ok := slices.BinarySearch(swept, p); return ok }
	with := slices.DeleteFunc(slices.Clone(listening), func(p uint16) bool { return !within(p) })
	var without []uint16
	if len(swept) <= 4*oddMostDeep {
		without = slices.Clone(swept)
	} else {
		without = slices.DeleteFunc(SpreadPorts(listening, 8*oddMostDeep), func(p uint16) bool { return !within(p) })
	}
	without = slices.DeleteFunc(without, func(p uint16) bool { _, ok := slices.BinarySearch(with, p); return ok })
	for _, list := range [][]uint16{with, without} {
		o.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	}
	if k.reload {
		return with // one that hides nothing
	}
	var out []uint16
	for i := range max(len(with), len(without)) {
		if i < len(with) {
			out = append(out, with[i])
		}
		if i < len(without) {
			out = append(out, without[i])
		}
	}
	return out
}

// controls are ports at which a kind must draw an answer.
func (o *odd) controls(k *oddKind, v *View) []uint16 {
	var out []uint16
	switch {
	case k.proto == rules.TCP:
		for _, c := range v.Path.Canaries {
			if c.Kind == CanaryTCP {
				out = append(out, c.Port)
			}
		}
	case k.proto == rules.UDP && o.cfg.own: // elsewhere a service may keep silent
		for i := range o.cfg.rules.Policy.Open {
			for _, r := range o.cfg.rules.Policy.Open[i].Ports(rules.UDP) {
				out = append(out, r.Lo)
			}
		}
	}
	return out
}

// decide is what the policy says of any packet of the view.
func (e expecter) decide(p rules.Packet) Expectation {
	var x Expectation
	p.At = e.at
	for i, name := range e.in {
		p.In = name
		d := e.rs.Decide(p)
		if d.Observed {
			d.Outcome = rules.OutcomeOpen // nothing is enforced
		}
		if i == 0 {
			x = Expectation{Outcome: d.Outcome, Rule: d.Rule, Unnamed: d.Outcome}
		}
		x.Either = x.Either || d.Outcome != x.Outcome
		x.Limited = x.Limited || d.Limited
	}
	return x
}

// open makes the sockets, in the network namespace of the calling thread, and
// begins to listen.
func (o *odd) open() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	filter, err := toUsFilter(o.cfg.views)
	if err != nil {
		return err
	}
	if o.ring, err = openRing(filter); err != nil {
		return err
	}
	for i := range o.cfg.views {
		l := o.cfg.views[i].Path.Link
		if o.links[l.Index] != nil {
			continue
		}
		if o.links[l.Index], err = openLink(l); err != nil {
			delete(o.links, l.Index)
			o.close()
			return err
		}
	}
	for _, x := range o.probes {
		o.expectAnswer(x)
	}
	o.ended = make(chan error, 1)
	go func() { o.ended <- o.receive() }()
	return nil
}

func (o *odd) close() {
	o.stop.Store(true)
	if o.ended != nil {
		<-o.ended
		o.ended = nil
	}
	for _, l := range o.links {
		l.close()
	}
	o.links = nil
	if o.ring != nil {
		o.ring.close()
		o.ring = nil
	}
}

// toUsFilter lets pass what may be from the probed addresses to our sources, and
// ICMP from anybody. It need not be exact, only cheap: see [answerFilter].
func toUsFilter(views []View) ([]bpf.RawInstruction, error) {
	var ours, theirs [2][]netip.Addr // IPv4, IPv6
	for i := range views {
		p, f := &views[i].Path, 0
		if p.Dst.Is6() {
			f = 1
		}
		ours[f], theirs[f] = append(ours[f], p.Src), append(theirs[f], p.Dst)
	}
	const accept, reject = "accept", "reject"
	var a assembler
	a.add(bpf.LoadExtension{Num: bpf.ExtProto})
	a.jump(bpf.JumpEqual, unix.ETH_P_IP, "ipv4", "")
	a.jump(bpf.JumpEqual, unix.ETH_P_IPV6, "ipv6", reject)
	a.label("ipv4")
	a.prefix(16, ours[0], reject)
	a.add(bpf.LoadAbsolute{Off: 9, Size: 1})
	a.jump(bpf.JumpEqual, unix.IPPROTO_ICMP, accept, "")
	a.prefix(12, theirs[0], reject)
	a.goTo(accept)
	a.label("ipv6")
	a.prefix(24, ours[1], reject)
	a.add(bpf.LoadAbsolute{Off: 6, Size: 1})
	a.jump(bpf.JumpEqual, unix.IPPROTO_ICMPV6, accept, "")
	a.prefix(8, theirs[1], reject)
	a.label(accept)
	a.add(bpf.RetConstant{Val: ringSnap})
	a.label(reject)
	a.add(bpf.RetConstant{Val: 0})
	return a.assemble()
}

// key is how an answer to the probe is found.
func (x *oddProbe) key() oddKey {
	k := oddKey{ours: x.src, proto: x.proto, sport: x.sport, dport: x.dport}
	if x.proto == rules.TCP {
		k.number = x.number & numberMask
	}
	return k
}

func (o *odd) expectAnswer(x *oddProbe) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.index[x.key()] = append(o.index[x.key()], x)
}

// receive is the receiving half.
func (o *odd) receive() error {
	for {
		if o.ring.block(func(packet []byte, _ int64) {
			if r, ok := parseOddReply(packet); ok {
				o.book(&r)
			}
		}) {
			continue
		}
		if o.stop.Load() {
			return nil
		}
		if err := o.ring.wait(receivePoll); err != nil {
			return err
		}
	}
}

// book takes one answer in.
func (o *odd) book(r *oddReply) {
	o.mu.Lock()
	defer o.mu.Unlock()
	x := o.find(r)
	if x == nil {
		return
	}
	if r.fromAnyHost && !o.ofHost(r.from) {
		if !x.canary {
			o.routers++
		}
		return
	}
	if r.synAck {
		// No half-open connection stays behind; one that is refused comes again.
		_, _ = unix.Write(o.links[x.link.Index].fd, x.oddReset(r.ack))
	}
	x.answers++
	if x.answers == 1 || r.answer.weight() > x.answer.weight() {
		x.answer, x.from = r.answer, r.from
	}
	if x.canary && x.answers == 1 {
		p := &o.paths[x.view]
		p.back++
		p.heard = true
		if rtt := time.Since(o.sentAt[x]); rtt < retransmitted {
			o.slowest = max(o.slowest, rtt)
		}
	}
}

// find gives the probe that was answered: where several could have been meant,
// the one that went to the address that answers.
func (o *odd) find(r *oddReply) *oddProbe {
	numbers := []uint32{0}
	if r.key.proto == rules.TCP {
		numbers = []uint32{r.ack & numberMask, r.seq & numberMask}
	}
	for _, n := range numbers {
		k := r.key
		k.number = n
		var to *oddProbe
		for _, x := range o.index[k] {
			switch {
			case x.dst == r.theirs:
				return x
			case x.kind != nil && x.kind.place != toHost:
				to = x
			}
		}
		if to != nil {
			return to
		}
	}
	return nil
}

// ofHost reports whether an address is one of the host's that are probed.
func (o *odd) ofHost(a netip.Addr) bool {
	return slices.ContainsFunc(o.cfg.views, func(v View) bool { return v.Path.Dst == a })
}

// transmit puts the packets of a probe on the wire.
func (o *odd) transmit(ctx context.Context, x *oddProbe) error {
	frames := [][]byte(nil)
	if x.canary {
		frames = x.canaryFrames()
	} else {
		frames = x.kind.frames(x)
	}
	for _, f := range frames {
		var err error
		for try := 0; try < 100; try++ {
			if _, err = unix.Write(o.links[x.link.Index].fd, f); !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EAGAIN) {
				break
			}
			time.Sleep(oddPause)
		}
		if err != nil {
			// A link that is down proves nothing; its canaries will tell.
			o.mu.Lock()
			o.paths[x.view].unsent++
			o.mu.Unlock()
			return ctx.Err()
		}
		o.packets++
		switch {
		case o.cfg.maxRate > 0:
			time.Sleep(time.Second / time.Duration(o.cfg.maxRate))
		case o.packets%oddBurst == 0:
			time.Sleep(oddPause)
		}
	}
	x.sent += uint64(len(frames))
	return ctx.Err()
}

func (x *oddProbe) canaryFrames() [][]byte {
	if x.proto == rules.TCP {
		return x.plain(x.oddTCP(flagSYN, nil))
	}
	typ := uint8(icmp4EchoRequest)
	if x.proto == rules.ICMPv6 {
		typ = icmp6EchoRequest
	}
	return x.plain(x.oddICMP(x.proto, typ))
}

// canary sends one over a view's path; each has a source port of its own.
func (o *odd) canary(ctx context.Context, view int) error {
	v := &o.cfg.views[view]
	if len(v.Path.Canaries) == 0 || len(o.ports) == 0 {
		return nil
	}
	p := &o.paths[view]
	c := v.Path.Canaries[p.sent%len(v.Path.Canaries)]
	x := &oddProbe{
		canary: true, view: view, link: v.Path.Link, src: v.Path.Src, dst: v.Path.Dst, proto: rules.TCP,
		sport: o.ports[len(o.ports)-1], dport: c.Port, number: o.rng.Uint32() & numberMask,
	}
	o.ports = o.ports[:len(o.ports)-1]
	if c.Kind == CanaryEcho {
		x.dport, x.proto = 0, rules.ICMPv4
		if v.Path.Dst.Is6() {
			x.proto = rules.ICMPv6
		}
	}
	o.expectAnswer(x)
	o.mu.Lock()
	p.sent++
	o.sentAt[x] = time.Now()
	o.mu.Unlock()
	return o.transmit(ctx, x)
}

// demand asks every view for a sign of life.
func (o *odd) demand(ctx context.Context, first bool) error {
	o.mu.Lock()
	for i := range o.paths {
		o.paths[i].heard = false
	}
	o.mu.Unlock()
	until := time.Now().Add(finalLimit)
	for wait := oddGraceMin; ; wait *= 2 {
		missing := 0
		for i := range o.cfg.views {
			o.mu.Lock()
			heard := o.paths[i].heard || len(o.cfg.views[i].Path.Canaries) == 0 || !first && !o.paths[i].alive
			o.mu.Unlock()
			if heard {
				continue
			}
			missing++
			for range finalCanaries {
				if err := o.canary(ctx, i); err != nil {
					return err
				}
			}
		}
		if missing == 0 || time.Now().After(until) {
			break
		}
		if err := o.sleep(ctx, wait); err != nil {
			return err
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.paths {
		p := &o.paths[i]
		p.alive = p.heard && (first || p.alive)
	}
	return nil
}

// sleep waits, unless the receiving half has broken.
func (o *odd) sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case err := <-o.ended:
		o.ended <- err
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (o *odd) grace() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return min(max(4*o.slowest, oddGraceMin), oddGraceMax)
}

// lossy says that canaries of the run got lost.
func (o *odd) lossy() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	sent, back := 0, 0
	for _, p := range o.paths {
		if p.back > 0 {
			sent, back = sent+p.sent, back+p.back
		}
	}
	return sent-back > sent/50
}

// run sends the probes, but for those across a reload. Lone fragments get the given
// time for what a host says when it gives up waiting for the rest.
func (o *odd) run(ctx context.Context, reassembly time.Duration) error {
	var lone, list []*oddProbe
	for _, x := range o.probes {
		switch {
		case x.kind.reload:
		case x.kind.level > 1:
			lone = append(lone, x)
		default:
			list = append(list, x)
		}
	}
	if len(lone)+len(list) == 0 {
		return nil
	}
	start := time.Now()
	defer func() { o.elapsed += time.Since(start) }()
	if err := o.demand(ctx, !o.begun); err != nil {
		return err
	}
	began := time.Now()
	if err := o.rounds(ctx, lone); err != nil {
		return err
	}
	if err := o.rounds(ctx, list); err != nil {
		return err
	}
	if len(lone) > 0 {
		if err := o.sleep(ctx, reassembly-time.Since(began)+o.grace()); err != nil {
			return err
		}
	}
	return o.end(ctx)
}

// rounds sends some probes, and again what is silent: with a witness until all have
// arrived, without one as often as the loss of canaries demands.
func (o *odd) rounds(ctx context.Context, list []*oddProbe) error {
	count := 0
	for r := range oddRoundsLossy {
		o.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		again := r < oddRounds || o.lossy()
		sent := false
		for _, x := range list {
			o.mu.Lock()
			done := x.answers > 0
			o.mu.Unlock()
			if o.witness != nil && !x.kind.early {
				done = done || x.arrived
			} else {
				done = done || !again
			}
			if done {
				continue
			}
			if count++; count%oddCanaryEvery == 0 {
				if err := o.canary(ctx, x.view); err != nil {
					return err
				}
			}
			if err := o.transmit(ctx, x); err != nil {
				return err
			}
			sent = true
		}
		if !sent {
			break
		}
		if err := o.sleep(ctx, o.grace()); err != nil {
			return err
		}
		if err := o.countArrived(list); err != nil {
			return err
		}
	}
	return nil
}

// countArrived books what the witness counted of a round.
func (o *odd) countArrived(list []*oddProbe) error {
	if o.witness == nil {
		return nil
	}
	counts, err := o.witness.counts(oddArrived)
	if err != nil {
		return err
	}
	for _, x := range list {
		sent, got := x.sent-x.booked, counts[x.mark()]-x.counted
		x.booked, x.counted = x.sent, x.counted+got
		// Of fragments more than were sent prove nothing: a line that doubles may hide a loss.
		x.arrived = x.arrived || sent > 0 && got == sent || sent == 1 && got > 0
	}
	return nil
}

// end closes a stage: every path must be alive behind it, and our own ring must
// have had room for every answer.
func (o *odd) end(ctx context.Context) error {
	if err := o.demand(ctx, false); err != nil {
		return err
	}
	drops, err := o.ring.drops()
	if err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range o.paths {
		o.paths[i].alive = o.paths[i].alive && drops == 0
	}
	o.begun = true
	return nil
}

// across sends plain probes to unlisted ports with listeners while the ruleset is
// loaded again some times.
func (o *odd) across(ctx context.Context, reload func() error) error {
	var list []*oddProbe
	for _, x := range o.probes {
		if x.kind.reload {
			list = append(list, x)
		}
	}
	if len(list) == 0 {
		return nil
	}
	start := time.Now()
	defer func() { o.elapsed += time.Since(start) }()
	if err := o.demand(ctx, !o.begun); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		for range oddReloads {
			time.Sleep(5 * time.Millisecond)
			if err := reload(); err != nil {
				done <- err
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
		done <- nil
	}()
	// Half of the budget at full speed; a reload that takes long gets a probe now and then.
	fast := uint64(o.cfg.budget/2) + o.packets
	for i := 0; ; i++ {
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("load the ruleset again: %w", err)
			}
			return o.end(ctx)
		default:
		}
		if err := o.transmit(ctx, list[i%len(list)]); err != nil {
			<-done // it works on a host that the caller takes down
			return err
		}
		if o.packets > fast {
			time.Sleep(20 * time.Millisecond)
		}
	}
}
