package verify

// The sending half of the engine: frames into batches, batches onto the wire at
// the right rate, and what must be looked after meanwhile.

import (
	"errors"
	"runtime"
	"slices"
	"time"

	"deadlight/rules"
)

// probe puts one probe into its link's batch.
func (e *engine) probe(f *flow, i int) error {
	p := f.path
	if len(p.windows) == 0 {
		p.windows = append(p.windows, new(window)) // without canaries: proves nothing
	}
	f.window[i] = uint16(len(p.windows))
	b, port := p.link.out.next(), f.ports[i]
	if f.proto == rules.TCP {
		seq := e.key.cookie(p.peer.id, p.SrcPort, port)
		return e.put(p.link, p.syn.tcp(b, p.SrcPort, port, seq), slot{count: &p.sentTCP, win: &f.window[i]})
	}
	return e.put(p.link, p.udp.udp(b, p.SrcPort, port), slot{count: &p.sentUDP, win: &f.window[i]})
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
	c := e.tick.kinds[k]
	c.add(tally{1, 1})
	e.tick.kinds[k] = c
	if w != nil {
		w.sent++
		w.last = now
		e.away++
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
	return e.put(p.link, n, slot{count: &p.sent, sent: canaryRef{t, i}})
}

// put adds a frame that stands in the batch's next buffer.
func (e *engine) put(l *sweepLink, length int, s slot) error {
	b := l.out
	b.slots[b.batch.n] = s
	b.add(length)
	if b.batch.n < e.pacer.burst() {
		return nil
	}
	return e.flush(l)
}

// flush hands what waits for a link to the senders, when the rate allows it.
func (e *engine) flush(l *sweepLink) error {
	b := l.out
	if b.batch.n == 0 {
		return nil
	}
	if err := e.ctx.Err(); err != nil {
		return err
	}
	if e.failed.Load() {
		return errors.New("receiving half stopped") // its own error comes first
	}
	b.n, b.before = b.batch.n, l.stalled.Load() != 0
	l.out = nil
	l.away++
	e.work <- b
	e.tick.packets += b.n
	for l.out == nil {
		if n := len(l.idle); n > 0 {
			l.out, l.idle = l.idle[n-1], l.idle[:n-1]
			break
		}
		if err := e.book(l); err != nil {
			return err
		}
	}

	now := e.now()
	// Time that was lost is made up for, but not by a flood.
	e.due = max(e.due, now-int64(5*time.Millisecond)) + int64(float64(b.n)/e.pacer.rate*1e9)
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

// book waits for a batch of a link to come back and books its frames.
func (e *engine) book(l *sweepLink) error {
	b := <-l.back
	l.away--
	l.idle = append(l.idle, b)
	for i, s := range b.slots[:b.n] {
		switch {
		case i < b.sent:
			*s.count++
		case s.win != nil:
			*s.win = 0
		}
	}
	e.probes += uint64(b.sent)
	if b.err != nil {
		return b.err
	}
	if b.sent < b.n {
		e.lossSeen = true
		if b.before {
			return e.sleep(time.Millisecond)
		}
	}
	return nil
}

// senders is how many threads put frames on the wire. The kernel does much for
// a frame before it takes the next one; over a veth it does all that the target
// does, too.
func senders() int { return min(runtime.GOMAXPROCS(0), 4) }

func newSweepLink(l *outLink) *sweepLink {
	s := &sweepLink{outLink: l, rst: newBatch()}
	n := senders() + 2 // one is filled, one waits
	s.back = make(chan *outBatch, n)
	for range n {
		s.idle = append(s.idle, &outBatch{batch: newBatch(), link: s})
	}
	s.out, s.idle = s.idle[n-1], s.idle[:n-1]
	return s
}

func (e *engine) startSenders() {
	e.work = make(chan *outBatch, 1)
	for range senders() {
		e.senders.Add(1)
		go func() {
			defer e.senders.Done()
			for b := range e.work {
				e.stamp(b)
				b.sent, b.err = b.send(b.link.outLink, stallLimit)
				b.link.back <- b
			}
		}()
	}
}

// stamp notes when the canaries of a batch leave: how long they waited for a
// sender is no part of their way.
func (e *engine) stamp(b *outBatch) {
	now := e.now()
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, s := range b.slots[:b.n] {
		if s.sent.of == nil {
			continue
		}
		c := &s.sent.of.used[s.sent.i]
		c.at = now
		if c.win != nil {
			c.win.last = now
		}
	}
}

func (e *engine) stopSenders() {
	close(e.work)
	e.senders.Wait()
}

// flushAll returns when all that was put is on the wire, or given up.
func (e *engine) flushAll() error {
	for _, l := range e.links {
		if err := e.flush(l); err != nil {
			return err
		}
	}
	for _, l := range e.links {
		for l.away > 0 {
			if err := e.book(l); err != nil {
				return err
			}
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
	e.tick = newTick(now)
	grace := int64(e.grace())
	e.mu.Lock()
	if e.returned >= len(e.late) {
		e.pacer.queue(slices.Min(e.late[:]), now)
	}
	for len(e.ticks) > 0 && e.ticks[0].end+grace < now {
		e.pacer.judge(e.ticks[0], now)
		for k, t := range e.ticks[0].kinds {
			k.settled.add(t)
		}
		e.ticks = e.ticks[1:]
	}
	for _, p := range e.paths {
		if p.demote() { // its loss is not the rate's doing
			e.ticks, e.tick = nil, newTick(now)
			e.pacer = newPacer(e.cfg.MaxRate)
		}
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
