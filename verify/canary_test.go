package verify

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"deadlight/rules"
)

func TestTuplesAreUsedOnce(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	tcp := newTCPTuples(rng)
	seen := make(map[uint16]bool)
	for i := range canaryPorts {
		p := tcp.port(i)
		if p < canaryPortLow || p > canaryPortHigh || seen[p] {
			t.Fatalf("tuple %d: port %d", i, p)
		}
		seen[p] = true
		if tcp.position(p) != i {
			t.Fatalf("port %d: position %d, want %d", p, tcp.position(p), i)
		}
	}
	for _, p := range []uint16{0, canaryPortLow - 1, canaryPortHigh + 1, 65535} {
		if tcp.position(p) != -1 {
			t.Errorf("port %d has a position", p)
		}
	}
	echo := newEchoTuples(rng)
	echo.base = 0xffff0000 // wraps as well
	ids := make(map[uint16]bool)
	for _, i := range []int{0, 1, 65535, 65536, 200000} {
		id, seq := echo.number(i)
		ids[id] = true
		if echo.index(id, seq) != i {
			t.Errorf("echo %d: index %d", i, echo.index(id, seq))
		}
	}
	if len(ids) != 3 {
		t.Errorf("%d identifiers, want 3: they vary when the numbers wrap", len(ids))
	}
}

func TestCookieTellsTuplesApart(t *testing.T) {
	k := secret{0x0123456789abcdef, 0xfedcba9876543210}
	seen := make(map[uint32]int)
	for peer := range uint32(4) {
		for port := range 65536 {
			seen[k.cookie(peer, 61000, uint16(port))]++
		}
	}
	// Birthdays alone make n²/2³³ = 8 pairs.
	if n := 4*65536 - len(seen); n > 40 {
		t.Errorf("%d of %d cookies collide", n, 4*65536)
	}
	if k.cookie(1, 2, 3) == (secret{k[0] + 1, k[1]}).cookie(1, 2, 3) {
		t.Error("the cookie does not depend on the secret")
	}
}

func TestUpperBound(t *testing.T) {
	for _, c := range []struct {
		t    tally
		want float64
	}{
		{tally{0, 0}, 1}, {tally{2, 0}, 1}, {tally{3000, 0}, 0.001}, {tally{100, 16}, 0.27}, {tally{10, 10}, 1},
	} {
		if got := c.t.upper(); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%+v: got %g, want %g", c.t, got, c.want)
		}
	}
	// Above the true loss in all but a few of a hundred runs.
	rng := rand.New(rand.NewPCG(3, 4))
	for _, p := range []float64{0.001, 0.01, 0.1, 0.3} {
		bad := 0
		for range 2000 {
			s := tally{sent: 1000}
			for range s.sent {
				if rng.Float64() < p {
					s.lost++
				}
			}
			if s.upper() < p {
				bad++
			}
		}
		if bad > 100 {
			t.Errorf("loss %g: below it in %d of 2000 runs", p, bad)
		}
	}
}

func TestMissRate(t *testing.T) {
	for _, c := range []struct {
		name      string
		path, run tally
		want      float64
	}{
		{"own sample", tally{3000, 0}, tally{9000, 600}, 0.001},
		{"small path borrows", tally{3, 0}, tally{3000, 0}, 0.001},
		{"small pool", tally{3, 0}, tally{30, 0}, 0.1},
		{"bad small path", tally{60, 30}, tally{3000, 30}, tally{60, 30}.upper()},
		{"no canary", tally{}, tally{}, 1},
	} {
		p := &sweepPath{run: c.path, pool: &pool{run: c.run}}
		if got := p.missRate(); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("%s: got %g, want %g", c.name, got, c.want)
		}
	}
}

// What a window proves, by the canaries that came back in it.
func TestJudgeWindows(t *testing.T) {
	for _, c := range []struct {
		name    string
		windows []window
		proves  []bool
		before  tally
	}{
		{"no loss", []window{{sent: 200, got: 200}, {sent: 200, got: 200}}, []bool{true, true}, tally{}},
		{"even loss", []window{{sent: 200, got: 196}, {sent: 200, got: 195}}, []bool{true, true}, tally{}},
		{"dead window", []window{{sent: 2000, got: 2000}, {sent: 16}}, []bool{true, false}, tally{}},
		{"bad window", []window{{sent: 2000, got: 2000}, {sent: 50, got: 20}}, []bool{true, false}, tally{}},
		{"dead path", []window{{sent: 16}, {sent: 16}}, []bool{false, false}, tally{}},
		{"half is lost", []window{{sent: 200, got: 90}, {sent: 200, got: 80}}, []bool{false, false}, tally{}},
		{"no canary", []window{{}, {}}, []bool{false, false}, tally{}},
		{"tainted", []window{{sent: 200, got: 200, tainted: true}, {sent: 200, got: 200}}, []bool{false, true}, tally{}},
		{"a worse round", []window{{sent: 500, got: 400}, {sent: 500, got: 400}}, []bool{false, false}, tally{30000, 0}},
	} {
		p := &sweepPath{Path: &Path{}, pool: &pool{run: c.before}, proven: true, run: c.before}
		f := newFlow(p, rules.TCP, []uint16{1, 2})
		p.tcpFlow = f
		e := &engine{pools: []*pool{p.pool}, paths: []*sweepPath{p}, flows: []*flow{f}}
		for i := range c.windows {
			p.windows = append(p.windows, &c.windows[i])
			f.window[i] = uint16(i + 1)
		}
		e.judge([]sweepProbe{newSweepProbe(0, 0), newSweepProbe(0, 1)})
		for i, proves := range c.proves {
			if got := f.good[i] == 1; got != proves {
				t.Errorf("%s: window %d proves %v, want %v", c.name, i, got, proves)
			}
		}
	}
}

// Four ports share a word: none may touch another.
func TestAnswersArePacked(t *testing.T) {
	f := newFlow(nil, rules.TCP, portRange(1, 4099))
	answer := func(i int) Answer { return Answer{State(i % 5), Reason(i % 16)} }
	for i := range f.ports {
		f.setAnswer(i, Answer{Filtered, PassedGate})
		f.setAnswer(i, answer(i))
	}
	for i := range f.ports {
		if got := f.answer(i); got != answer(i) || f.silent(i) != (answer(i) == Answer{}) {
			t.Fatalf("port %d: %v, want %v", i, got, answer(i))
		}
	}
	if len(stateNames) > 1<<3 || len(reasonNames) > 1<<5 {
		t.Error("a byte holds no more than 8 states and 32 reasons")
	}
}

func TestDemote(t *testing.T) {
	for _, c := range []struct {
		name       string
		a, b       tally
		goneA      bool
		goneB      bool
		stillFirst bool
	}{
		{"both well", tally{100, 1}, tally{12, 0}, false, false, true},
		{"line lossy for both", tally{100, 30}, tally{12, 4}, false, false, true},
		{"first limited", tally{100, 90}, tally{12, 0}, true, false, false},
		{"second limited", tally{100, 0}, tally{12, 11}, false, true, true},
		{"outage", tally{100, 100}, tally{12, 12}, false, false, true},
		{"second too young", tally{100, 90}, tally{3, 0}, false, false, true},
	} {
		p := &sweepPath{kinds: []*kind{{settled: c.a}, {settled: c.b}}}
		for _, k := range p.kinds {
			k.answers.Store(true)
		}
		p.demote()
		if p.kinds[0].demoted != c.goneA || p.kinds[1].demoted != c.goneB || (p.primary == 0) != c.stillFirst {
			t.Errorf("%s: demoted %v and %v, %d is first", c.name, p.kinds[0].demoted, p.kinds[1].demoted, p.primary)
		}
	}
}

func TestCanaryBack(t *testing.T) {
	e := &engine{pools: []*pool{new(pool)}, tick: newTick(0)}
	k := new(kind)
	p := &sweepPath{Path: &Path{}, pool: e.pools[0], kinds: []*kind{k}}
	s := &tuples{size: canaryPorts}
	for order := range uint64(3) {
		s.used = append(s.used, canarySent{path: p, kind: k, tick: e.tick, order: order + 1})
	}
	e.tick.kinds[k] = tally{3, 3}
	for _, i := range []int{0, 2, 2, 0} { // twice, as by a repeated SYN-ACK
		if e.canaryBack(s, i, 5) != p {
			t.Fatalf("canary %d was not booked", i)
		}
	}
	if e.canaryBack(s, 3, 0) != nil || e.canaryBack(s, -1, 0) != nil {
		t.Error("a canary that was never sent came back")
	}
	if e.tick.got != 2 || e.tick.kinds[k] != (tally{3, 1}) || p.heard != 3 || !k.live() {
		t.Errorf("got %d, %+v, heard %d, live %v", e.tick.got, e.tick.kinds[k], p.heard, k.live())
	}
}

// When the tuples of a good kind run out, a limited one must do.
func TestNextKind(t *testing.T) {
	spent := &tuples{size: 0}
	fresh := &tuples{size: 10}
	a, b := &kind{Canary: Canary{CanaryTCP, 22}}, &kind{Canary: canaryEcho}
	a.answers.Store(true)
	b.answers.Store(true)
	p := &sweepPath{kinds: []*kind{a, b}, peer: &peer{tcp: map[uint16]*tuples{22: fresh}, echo: fresh}}
	first := 0
	for range 80 {
		if p.next() == a {
			first++
		}
	}
	if first != 70 {
		t.Errorf("the preferred kind %d times of 80, want 70", first)
	}
	p.peer.tcp[22] = spent
	b.demoted = true
	for range 20 {
		if p.next() != b {
			t.Fatal("no canary though echo has tuples")
		}
	}
	p.peer.echo = spent
	if p.next() != nil {
		t.Error("a canary without a tuple")
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	if h.grace() != graceMin {
		t.Errorf("without samples: %v", h.grace())
	}
	for i := range 1000 {
		h.add(time.Duration(i+1) * 10 * time.Microsecond)
	}
	for _, c := range []struct {
		q    float64
		want time.Duration
	}{{0.1, time.Millisecond}, {0.5, 5 * time.Millisecond}, {0.99, 9900 * time.Microsecond}} {
		if got := h.quantile(c.q); got < c.want || got > c.want*5/4 {
			t.Errorf("quantile %g: %v, want %v or a little more", c.q, got, c.want)
		}
	}
	h.add(0)
	h.add(3 * time.Hour)
	if g := h.grace(); g < 20*time.Millisecond || g > 100*time.Millisecond {
		t.Errorf("grace %v", g)
	}
	var slow histogram
	slow.add(5 * time.Second)
	if slow.grace() != graceMax {
		t.Errorf("grace %v, want %v", slow.grace(), graceMax)
	}
}

// line is a model of a way: it loses a share of everything, and all that goes
// beyond its capacity.
func line(p *pacer, random, capacity float64, ticks int, rng *rand.Rand) (mean float64) {
	var now int64
	for range ticks {
		rate := min(p.rate, 400e3) // what the sender can do
		length := max(float64(tickLength), tickSample*canaryEvery/rate*1e9)
		t := &tick{start: now, end: now + int64(length)}
		t.packets = int(rate * length / 1e9)
		t.sent = t.packets / canaryEvery
		pass := 1 - random
		if rate > capacity {
			pass *= capacity / rate
		}
		for range t.sent {
			if rng.Float64() < pass {
				t.got++
			}
		}
		now = t.end
		p.judge(t, now)
		mean += rate / float64(ticks)
	}
	return mean
}

func TestPacer(t *testing.T) {
	for _, c := range []struct {
		name             string
		limit            int
		random, capacity float64
		atLeast, atMost  float64
	}{
		{"clean line", 0, 0, 1e9, 300e3, 400e3},
		{"random loss", 0, 0.1, 1e9, 250e3, 400e3},
		{"heavy random loss", 0, 0.3, 1e9, 200e3, 400e3},
		{"narrow line", 0, 0, 100e3, 50e3, 130e3},
		{"very narrow line", 0, 0, 20e3, 8e3, 50e3},
		{"narrow and lossy line", 0, 0.05, 100e3, 40e3, 150e3},
		{"limit", 20000, 0.1, 1e9, 15e3, 20e3},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := line(newPacer(c.limit), c.random, c.capacity, 200, rand.New(rand.NewPCG(5, 6)))
			if got < c.atLeast || got > c.atMost {
				t.Errorf("%.0f packets a second, want %.0f to %.0f", got, c.atLeast, c.atMost)
			}
		})
	}
	// An outage must not leave the rate on the floor.
	p := newPacer(0)
	for i := range 50 {
		p.judge(&tick{start: int64(i) * tickLength, end: int64(i+1) * tickLength, packets: 1000, sent: 60}, int64(i+1)*tickLength)
	}
	if p.rate < rateStart {
		t.Errorf("rate %.0f after an outage", p.rate)
	}
}
