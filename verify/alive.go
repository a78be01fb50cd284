package verify

// When canaries are sent, of which kind, and what their absence means for a path.

import (
	"math"
	"slices"
	"time"

	"deadlight/rules"
)

// pilot finds out which canaries of each path live, and how long they take.
func (e *engine) pilot() error {
	var paths []*sweepPath
	for _, p := range e.paths {
		if len(p.kinds) > 0 {
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
	e.tick = newTick(e.now()) // what did not answer the pilot is no loss
	var rtt time.Duration
	for _, p := range paths {
		rtt = max(rtt, p.minRTT)
	}
	if rtt > 0 {
		e.pacer.begin(rtt)
	}
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

// plan spreads the canaries of a round over the probes of each path.
func (e *engine) plan(r int, list []sweepProbe) {
	for _, p := range e.pools {
		p.probes = 0
	}
	for _, p := range e.paths {
		p.windows, p.checked, p.left, p.until, p.suspended = nil, 0, 0, 0, false
	}
	silent := 0 // TCP ports of proven paths
	for _, x := range list {
		f, _ := e.at(x)
		p := f.path
		p.left++
		if p.proven {
			p.pool.probes++
			if f.proto == rules.TCP {
				silent++
			}
		}
	}
	for _, p := range e.paths {
		if p.left == 0 || !p.proven {
			continue
		}
		// With this many canaries over all paths of a pool, three rounds without
		// loss meet the bound: silent·(3/3n)³ = bound.
		need := math.Cbrt(float64(max(silent, 1)) / e.cfg.MissBound)
		share := int(math.Ceil(need * float64(p.left) / float64(p.pool.probes)))
		n := max(p.left/canaryEvery, min(share, max(tinyCanaries, p.left/8)), 2)
		// Other paths of the pair, later rounds and the last burst want tuples too:
		// three rounds may have three quarters, each of the rest half of what is left.
		part := 0.5
		if r < 3 {
			part = 0.75 / (3 - 0.75*float64(r))
		}
		n = max(2, min(n, int(part*float64(p.tuplesLeft()-reservedTuples))/len(p.peer.paths)))
		p.every = max(1, p.left/(n-1))
	}
}

func (p *sweepPath) tuplesLeft() int {
	n := 0
	for _, k := range p.kinds {
		if k.live() {
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
		w = new(window)
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
		if i == 0 && !k.live() && start != p.primary {
			k = p.kinds[p.primary]
		}
		if k.live() && p.peer.tuples(k.Canary).left() > 0 {
			return k
		}
	}
	// A limited kind is better than none.
	for _, k := range p.kinds {
		if k.demoted && p.peer.tuples(k.Canary).left() > 0 {
			return k
		}
	}
	return nil
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

// demote gives up a kind of canary that loses far more than the path does by
// another kind: something limits it, and its loss is not that of the probes.
func (p *sweepPath) demote() bool {
	var best *kind
	for _, k := range p.kinds {
		if k.live() && k.settled.sent >= tinyCanaries && (best == nil || k.settled.rate() < best.settled.rate()) {
			best = k
		}
	}
	any := false
	for _, k := range p.kinds {
		if k != best && k.live() && k.settled.sent >= tinyCanaries && k.settled.rate() > 0.25+3*best.settled.rate() {
			k.demoted, any = true, true
		}
	}
	if any {
		p.prefer()
	}
	return any
}

// prefer makes the first kind that lives the usual one.
func (p *sweepPath) prefer() {
	p.primary = max(0, slices.IndexFunc(p.kinds, (*kind).live))
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
	e.ticks, e.tick = nil, newTick(e.now())
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
		wait = min(2*wait, int64(reviveEvery))
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
