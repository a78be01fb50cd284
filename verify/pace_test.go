package verify

import (
	"testing"
	"time"
)

// way is a model of a way: what is sent above its capacity waits in its queue,
// and what the queue has no room for gets lost, beside what always does.
type way struct {
	capacity float64       // packets a second
	room     time.Duration // that the queue holds
	loss     float64
}

// drive runs a pacer over a line for some seconds and gives the rate and the
// queue's length at the end.
func drive(p *pacer, l way, seconds float64) (rate float64, queue time.Duration) {
	const rtt = 20 * time.Millisecond
	type late struct {
		at int64
		by time.Duration
	}
	var back []late
	var waiting []*tick
	var backlog float64 // seconds
	for now := int64(0); now < int64(seconds*1e9); now += tickLength {
		packets := p.rate * float64(tickLength) / 1e9
		t := newTick(now)
		t.end = now + tickLength
		t.packets = int(packets)
		t.sent = max(tickSample, t.packets/17)
		backlog = max(0, backlog+packets/l.capacity-float64(tickLength)/1e9)
		lost := l.loss
		if full := l.room.Seconds(); backlog > full {
			lost += (backlog - full) / (packets / l.capacity)
			backlog = full
		}
		t.got = max(1, int(float64(t.sent)*(1-min(lost, 1))+0.5))
		for back = append(back, late{now + int64(rtt) + int64(backlog*1e9), time.Duration(backlog * 1e9)}); back[0].at <= now; back = back[1:] {
			p.queue(back[0].by, now)
		}
		waiting = append(waiting, t)
		grace := int64(3*rtt) + int64(backlog*1e9)
		for len(waiting) > 0 && waiting[0].end+grace < now {
			p.judge(waiting[0], now)
			waiting = waiting[1:]
		}
	}
	return p.rate, time.Duration(backlog * 1e9)
}

func TestPacerFindsTheCapacity(t *testing.T) {
	for _, c := range []struct {
		name string
		line way
	}{
		{"small queue", way{30e3, 5 * time.Millisecond, 0}},
		{"endless queue", way{30e3, time.Hour, 0}},
		{"fast", way{400e3, 5 * time.Millisecond, 0}},
		{"lossy, endless queue", way{30e3, time.Hour, 0.02}},
	} {
		p := newPacer(0)
		p.begin(20 * time.Millisecond)
		if p.rate != 50e3 {
			t.Errorf("%s: begins with %g", c.name, p.rate)
		}
		rate, queue := drive(p, c.line, 10)
		if rate < 0.3*c.line.capacity || rate > 2*c.line.capacity || queue > 400*time.Millisecond {
			t.Errorf("%s: %.0f packets a second, queue %v", c.name, rate, queue)
		}
	}
}

// Loss that has nothing to do with the rate must not slow a run down.
func TestPacerIgnoresRandomLoss(t *testing.T) {
	p := newPacer(0)
	p.begin(20 * time.Millisecond)
	if rate, _ := drive(p, way{1e9, time.Hour, 0.1}, 5); rate < 200e3 {
		t.Errorf("%.0f packets a second over a line that loses a tenth at any rate", rate)
	}
}

func TestPacerBegins(t *testing.T) {
	for _, c := range []struct {
		rtt   time.Duration
		limit int
		want  float64
	}{{time.Microsecond, 0, 400e3}, {10 * time.Millisecond, 0, 100e3}, {time.Second, 0, 20e3}, {time.Microsecond, 300, 300}} {
		p := newPacer(c.limit)
		if p.begin(c.rtt); p.rate != c.want {
			t.Errorf("%v, limit %d: %g, want %g", c.rtt, c.limit, p.rate, c.want)
		}
	}
}
