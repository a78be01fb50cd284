package verify

// What makes silence evidence: canaries that share the way, the time and the
// fate of the probes, and the arithmetic on those that did not come back.

import (
	"math"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"
)

const (
	// TCP canaries have source ports of their own: below every
	// ip_local_port_range in use, away from those of the probes.
	canaryPortLow  = 1024
	canaryPortHigh = 19999
	canaryPorts    = canaryPortHigh - canaryPortLow + 1

	canaryEvery  = 16 // probes of a large path a canary
	windowSize   = 16 // canaries a window of a path has at least, unless the path has fewer
	ownSample    = 100
	tinyCanaries = 8 // a round, for a path with a handful of ports

	reservedTuples = 256 // for bursts; a round leaves them alone

	graceMin = 10 * time.Millisecond
	graceMax = 2 * time.Second
)

// secret keys the cookies of one run.
type secret [2]uint64

// cookie binds an answer to the tuple it answers. It is a keyed multiply-fold,
// not a MAC: a stranger off the path cannot guess it, and one on the path need
// not.
func (k secret) cookie(peer uint32, ours, theirs uint16) uint32 {
	x := uint64(peer)<<32 | uint64(ours)<<16 | uint64(theirs)
	hi, lo := bits.Mul64(x^k[0], k[1]|1)
	x = hi ^ lo
	hi, lo = bits.Mul64(x^k[1], k[0]|1)
	x = hi ^ lo
	return uint32(x>>32) ^ uint32(x)
}

// pair is the two addresses of a path, ours first.
type pair struct{ ours, theirs netip.Addr }

// peer is everything that one pair of addresses shares: the paths between them,
// which differ in their source ports, and the tuples their canaries used up.
type peer struct {
	id    uint32
	paths map[uint16]*sweepPath // by source port
	tcp   map[uint16]*tuples    // by canary port
	echo  *tuples
}

// tuples hands out source ports, or echo identifiers and numbers, each once in
// a run: a firewall's connection tracking judges a second use differently.
type tuples struct {
	base uint32
	size uint32
	used []canarySent
}

func newTCPTuples(rng *rand.Rand) *tuples {
	return &tuples{base: rng.Uint32N(canaryPorts), size: canaryPorts}
}

// newEchoTuples counts the 16 bits of the sequence number up first, so that the
// identifier varies only when they wrap.
func newEchoTuples(rng *rand.Rand) *tuples {
	return &tuples{base: rng.Uint32() &^ 0xffff, size: math.MaxUint32}
}

func (t *tuples) left() int { return int(t.size) - len(t.used) }

// port is the source port of the i-th TCP canary, position its inverse.
func (t *tuples) port(i int) uint16 {
	return uint16(canaryPortLow + (t.base+uint32(i))%canaryPorts)
}

func (t *tuples) position(port uint16) int {
	if port < canaryPortLow || port > canaryPortHigh {
		return -1
	}
	return int((uint32(port) - canaryPortLow + canaryPorts - t.base) % canaryPorts)
}

// number is the identifier and sequence number of the i-th echo, index its
// inverse.
func (t *tuples) number(i int) (id, seq uint16) {
	x := t.base + uint32(i)
	return uint16(x >> 16), uint16(x)
}

func (t *tuples) index(id, seq uint16) int {
	return int(uint32(id)<<16 + uint32(seq) - t.base)
}

// canarySent is a canary on its way.
type canarySent struct {
	at       int64 // ns since the run began
	path     *sweepPath
	kind     *kind
	win      *window
	tick     *tick
	order    uint64 // of all canaries of the run
	answered bool
}

// kind is one of a path's canaries with what it was worth so far.
type kind struct {
	Canary
	answers atomic.Bool // it did at least once
	demoted bool        // something limits it
	settled tally       // of its canaries that had their time to return
}

func (k *kind) live() bool { return k.answers.Load() && !k.demoted }

// window is a stretch of a round of one path: probes, and canaries among them.
type window struct {
	sent, got int   // canaries; got is guarded by engine.mu
	last      int64 // when the last canary left, ns since the run began
	tainted   bool  // our own ring dropped packets meanwhile
	judged    bool
	proves    bool // it lost no more than its path usually does
}

// tally counts canaries that were judged.
type tally struct{ sent, lost int }

func (t *tally) add(o tally) { t.sent += o.sent; t.lost += o.lost }

// rate is the loss seen.
func (t tally) rate() float64 { return float64(t.lost) / float64(t.sent) }

// upper bounds the loss, given the loss seen: (k+2√k+3)/n, which for k = 0 is
// the rule of three and above it a little more than two standard deviations.
func (t tally) upper() float64 {
	if t.sent == 0 {
		return 1
	}
	k := float64(t.lost)
	return min(1, (k+2*math.Sqrt(k)+3)/float64(t.sent))
}

// worseThan says that so much loss is no accident where p is the usual loss.
func (t tally) worseThan(p float64) bool {
	mean := p * float64(t.sent)
	return float64(t.lost) > mean+3*math.Sqrt(mean)+1
}

// dead says that nothing at all came back: whatever the numbers, silence then
// proves nothing.
func (t tally) dead() bool { return t.lost == t.sent }

// histogram holds round-trip times in buckets of an eighth of an octave, so
// that a million of them cost no more than one.
type histogram struct {
	count  int
	bucket [33 * 8]int
}

func (h *histogram) add(d time.Duration) {
	us := uint32(min(max(d.Microseconds(), 1), math.MaxUint32))
	n := bits.Len32(us)
	frac := uint64(us) << (36 - n) >> 32 & 7 // the three bits behind the leading one
	h.bucket[n*8+int(frac)]++
	h.count++
}

// quantile returns the upper end of the bucket that holds the q-th part.
func (h *histogram) quantile(q float64) time.Duration {
	want := int(math.Ceil(q * float64(h.count)))
	for i, c := range h.bucket {
		if want -= c; want <= 0 && c > 0 {
			n, frac := i/8, i%8
			return time.Duration(math.Exp2(float64(n-1))*(1+float64(frac+1)/8)*1000) * time.Nanosecond
		}
	}
	return 0
}

// grace is how long to wait for answers to the last packet. Never the largest
// time seen: a SYN-ACK that got lost comes back a second later by the target's
// own retransmission.
func (h *histogram) grace() time.Duration {
	if h.count == 0 {
		return graceMin
	}
	g := 2*h.quantile(0.99) + 4*(h.quantile(0.9)-h.quantile(0.1))
	return min(max(g, graceMin), graceMax)
}
