package verify

// The receiving half of the engine: a goroutine that reads the ring, books what
// answers and ends what answers began.

import (
	"net/netip"
	"slices"
	"time"

	"deadlight/rules"
)

// receive is the receiving half, until stop is set or the socket breaks.
func (e *engine) receive() {
	var r reply
	var at, clock int64
	handle := func(packet []byte, came int64) {
		if parseReply(packet, &r) {
			// It may have waited for us. A clock that was set meanwhile is not believed.
			e.handle(&r, at-min(max(clock-came, 0), int64(drainLimit)))
		}
	}
	for {
		at, clock = e.now(), time.Now().UnixNano()
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
		if p == nil { // a canary must come from the target, an answer to a probe need not
			if path := e.sources[netip.AddrPortFrom(r.to, r.dport)]; path != nil {
				p = path.peer
			}
		}
		if p == nil || r.flags&flagACK == 0 || r.ack != e.key.cookie(p.id, r.dport, r.sport)+1 {
			return
		}
		e.handleTCP(p, r, now)
	case replyUDP:
		if p := e.path(r.to, r.from, r.dport); p != nil {
			e.record(p.udpFlow, r.sport, Answer{Open, UDPAnswer}, r.from)
		} else if p := e.sources[netip.AddrPortFrom(r.to, r.dport)]; p != nil {
			e.record(p.udpFlow, r.sport, Answer{Unknown, OtherAddress}, r.from) // no cookie proves it
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
		if synAck && r.from == path.Dst {
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
	if !ok && f.proto == rules.UDP && a.Reason == UDPAnswer {
		e.mu.Lock()
		defer e.mu.Unlock()
		if p := f.path; !slices.Contains(p.stray, port) && len(p.stray) < mostStray {
			p.stray = append(p.stray, port)
		}
		return
	}
	if !ok || a.weight() <= f.answer(i).weight() {
		return
	}
	f.setAnswer(i, a)
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
	e.late[e.returned%len(e.late)] = rtt - p.minRTT
	e.returned++
	c.tick.got++
	if c.win != nil {
		c.win.got++
		e.away--
		if c.win.judged && rtt < p.minRTT+retransmitted {
			// Late, not lost.
			p.total.lost--
			p.run.lost--
			p.pool.run.lost--
		}
	}
	k := c.tick.kinds[c.kind]
	k.lost--
	c.tick.kinds[c.kind] = k
	c.kind.answers.Store(true)
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
