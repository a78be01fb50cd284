package verify

// The witness on the target: what it counted on arrival needs no second probe.

import (
	"fmt"
	"time"

	"deadlight/rules"
)

// ArrivalCounter counts the packets that came in on the target, by protocol and
// source port, before any filter could drop them, resets left out. It is
// [Tripwire.Arrived].
type ArrivalCounter func() (map[rules.Protocol]map[uint16]uint64, error)

// Waiting for a straggler is cheaper than another round.
const arrivalWait = 100 * time.Millisecond

// arrivals holds the sent and the arrived probes of a round against each other.
type arrivals struct {
	base map[rules.Protocol]map[uint16]uint64
	sent []uint64 // by flow, before the round
}

func (f *flow) sent() uint64 {
	if f.proto == rules.TCP {
		return f.path.sentTCP
	}
	return f.path.sentUDP
}

// begin is called before the first probe of a round.
func (a *arrivals) begin(e *engine) error {
	if e.cfg.Arrived == nil {
		return nil
	}
	var err error
	if a.base, err = e.countArrived(); err != nil {
		return err
	}
	a.sent = a.sent[:0]
	for _, f := range e.flows {
		a.sent = append(a.sent, f.sent())
	}
	return nil
}

// end is called when the answers to a round had their time. A flow is proven if
// every port of it was either answered or asked in this round, exactly as many
// probes arrived as left, and no answer of a canary is missing: then what is
// silent was neither lost on the way in nor, as far as can be told, on the way
// back. More arrivals than probes prove nothing: somebody else has our source
// port, or a line doubles packets and may hide a loss.
func (a *arrivals) end(e *engine) error {
	if e.cfg.Arrived == nil {
		return nil
	}
	for limit := e.now() + int64(e.grace()+arrivalWait); ; {
		now, err := e.countArrived()
		if err != nil {
			return err
		}
		missing := false
		for i, f := range e.flows {
			sent := f.sent() - a.sent[i]
			if f.arrived || sent == 0 {
				continue
			}
			port := f.path.SrcPort
			got := now[f.proto][port] - a.base[f.proto][port]
			f.arrived = got == sent && f.asked() && !e.canariesMissing(f.path)
			missing = missing || !f.arrived && got <= sent
		}
		if !missing || e.now() >= limit {
			return nil
		}
		if err := e.sleep(time.Millisecond); err != nil {
			return err
		}
	}
}

// asked says that no port of the flow is silent that was not sent in this round.
func (f *flow) asked() bool {
	for i := range f.ports {
		if f.window[i] == 0 && f.silent(i) {
			return false
		}
	}
	return true
}

func (e *engine) canariesMissing(p *sweepPath) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, w := range p.windows {
		if w.tainted || w.got < w.sent {
			return true
		}
	}
	return false
}

// countArrived asks the witness.
func (e *engine) countArrived() (map[rules.Protocol]map[uint16]uint64, error) {
	n, err := e.cfg.Arrived()
	if err != nil {
		return nil, fmt.Errorf("count what arrived: %w", err)
	}
	return n, nil
}

// canariesAway says whether canaries of some round never came back.
func (e *engine) canariesAway() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.away > 0
}
