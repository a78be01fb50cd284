package verify

// How fast the engine sends: as fast as nothing gets lost by it. Loss that does
// not depend on the rate must not slow the run down, so every slowdown is an
// experiment that is taken back if it did not help.

import (
	"math"
	"time"
)

const (
	tickLength  = int64(10e6) // ns, the stretch of time the rate is judged by
	tickMaximum = int64(2e8)  // ns, for a rate so low that canaries are rare
	tickSample  = 16          // canaries a judgement wants

	rateStart   = 100e3 // packets a second
	rateFloor   = 500
	rateCeiling = 10e6

	// A run begins with so many packets on their way, whatever the way's length.
	flightStart            = 1000
	rateSlowest, rateRange = 20e3, 20 // and that gives a rate from the slowest to so many times it

	// Canaries that all take this much longer than the fastest ever did wait in a
	// queue that we fill.
	queueLimit = 50 * time.Millisecond
)

// tick is a stretch of time with its canaries, over all paths. Its counts are
// guarded by engine.mu.
type tick struct {
	start, end int64 // ns since the run began
	packets    int
	sent, got  int
	kinds      map[*kind]tally // lost until it came back
}

func newTick(start int64) *tick { return &tick{start: start, kinds: make(map[*kind]tally)} }

// pacer sets the rate.
type pacer struct {
	rate, limit float64 // packets a second
	usual       float64 // loss that no slowdown mends
	knee        float64 // rate that lost packets once; above it growth is slow
	changed     int64   // ticks that began before this one saw another rate
	queued      bool    // what is sent waits in a queue
	braked      int64   // when a queue was the reason for the last time
	// trial is the rate before a slowdown whose effect is not known yet, else 0.
	trial, trialLoss, trialSample float64
}

func newPacer(maxRate int) *pacer {
	p := &pacer{limit: rateCeiling, knee: rateCeiling}
	if maxRate > 0 {
		p.limit = float64(maxRate)
	}
	p.rate = min(rateStart, p.limit)
	return p
}

// begin sets the rate of a run from the time an answer takes.
func (p *pacer) begin(rtt time.Duration) {
	rate := flightStart / max(rtt, time.Microsecond).Seconds()
	p.rate = min(max(rate, rateSlowest), rateSlowest*rateRange, p.limit)
}

// queue slows down while what is sent waits in a queue, given the least time by
// which one of the latest canaries was late. It must not wait for a judgement:
// that comes late itself when canaries do.
func (p *pacer) queue(late time.Duration, now int64) {
	p.queued = late > queueLimit
	if !p.queued || now < p.braked+2*int64(late) { // it takes its time to empty
		return
	}
	p.trial = 0
	p.knee = min(p.knee, p.rate)
	p.rate = max(p.rate/2, min(rateFloor, p.limit))
	p.changed, p.braked = now, now
}

// judge learns, at the given time, from a tick whose canaries had their time to
// return.
func (p *pacer) judge(t *tick, now int64) {
	// Nothing at all back is an outage, which is not the rate's doing.
	if t.start < p.changed || t.sent < tickSample/2 || t.got == 0 || t.end <= t.start {
		return
	}
	n := float64(t.sent)
	loss := 1 - float64(t.got)/n
	achieved := float64(t.packets) / float64(t.end-t.start) * 1e9
	if p.trial > 0 {
		p.conclude(loss, n, achieved*(1-loss))
		p.changed = now
		return
	}
	if loss > p.usual+0.02+3*math.Sqrt((p.usual+0.01)/n) {
		p.trial, p.trialLoss, p.trialSample = min(p.rate, achieved), loss, n
		p.rate = max(p.trial/2, min(rateFloor, p.limit))
		p.changed = now
		return
	}
	// Only a trial may raise it: a line slowly driven into loss would pass for a
	// lossy one.
	p.usual = min(p.usual, 0.9*p.usual+0.1*loss)
	if p.queued || p.rate > 2*achieved { // something else is the brake
		return
	}
	if safe := 0.8 * p.knee; p.rate < safe {
		p.rate = min(2*p.rate, safe)
		p.changed = now // the next doubling waits for what this one does
	} else {
		p.rate *= 1.05
		p.knee = max(p.knee, p.rate)
	}
	p.rate = min(p.rate, p.limit)
}

// conclude says whether the slowdown helped. It did if less got lost, beyond
// accident, or if as much got through: an overrun line passes its capacity at
// any rate above it.
func (p *pacer) conclude(loss, sample, through float64) {
	gain := p.trialLoss - loss
	noise := math.Sqrt(p.trialLoss * (1/sample + 1/p.trialSample))
	if gain > 2*noise && gain > 0.4*p.trialLoss || through > 0.7*p.trial*(1-p.trialLoss) {
		p.knee = p.trial
		p.usual = max(p.usual, loss/2) // what is left may be the line's own
	} else {
		p.rate = p.trial
		p.usual = max(p.usual, (loss+p.trialLoss)/2)
	}
	p.trial = 0
}

// burst is how many packets leave at once: a millisecond's worth, within what a
// batch holds.
func (p *pacer) burst() int { return int(min(max(p.rate/1000, 1), batchSize)) }
