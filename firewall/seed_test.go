package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"deadlight/rules"
)

// What a host with sessions loads first: 7 is listed, 8 is not.
const first = "[open.service]\nports = 7\nprotocol = [\"tcp\", \"udp\"]\n"

// stage is a host and a peer between which flows run.
type stage struct {
	*wire
	peer      *peer
	listeners map[service]net.Listener
}

// service is where something listens.
type service struct {
	onHost bool
	proto  rules.Protocol
	port   uint16
}

func newStage(t *testing.T) *stage {
	w := newWire(t)
	return &stage{w, w.peer("eth0", stranger4, stranger6), map[service]net.Listener{}}
}

// serve listens, once, until the test ends. Of UDP it takes what comes from new
// peers.
func (s *stage) serve(t *testing.T, k service) net.Listener {
	t.Helper()
	if l, ok := s.listeners[k]; ok {
		return l
	}
	at := side(s.peer.in)
	if k.onHost {
		at = s.inHost
	}
	if k.proto == rules.TCP {
		s.listeners[k] = listenTCP(t, at, k.port)
		return s.listeners[k]
	}
	at(func() error {
		c, err := (&net.ListenConfig{Control: reuse}).ListenPacket(t.Context(), "udp", fmt.Sprintf("[::]:%d", k.port))
		if err == nil {
			t.Cleanup(func() { c.Close() })
		}
		return err
	})
	s.listeners[k] = nil
	return nil
}

// pair makes a flow between the host and the peer; the side that begins connects
// to the port of the other.
func (s *stage) pair(t *testing.T, b both, proto rules.Protocol, hostBegins bool, port uint16) flow {
	t.Helper()
	begins, serves := side(s.peer.in), side(s.inHost)
	from, to := netip.AddrPortFrom(b.peer, 0), netip.AddrPortFrom(b.host, port)
	if hostBegins {
		begins, serves = serves, begins
		from, to = netip.AddrPortFrom(b.host, 0), netip.AddrPortFrom(b.peer, port)
	}
	f := flow{what: fmt.Sprintf("%s, %s, begun by the host: %t, port %d", proto, b.family, hostBegins, port), hostBegan: hostBegins}
	var near, far net.Conn
	l := s.serve(t, service{!hostBegins, proto, port})
	if proto == rules.TCP {
		near, far = connect(t, begins, l, from, to)
	} else {
		near = datagrams(t, begins, from, to)
		far = datagrams(t, serves, to, tupleOf(t, proto, near).src)
	}
	if f.host, f.peer = far, near; hostBegins {
		f.host, f.peer = near, far
	}
	if !talks(t, near, far) {
		t.Fatalf("%s: no flow to begin with", f.what)
	}
	return f
}

// running makes flows of every kind, twice: in one the host will be the first to
// speak again, in the other the peer.
func (s *stage) running(t *testing.T, port uint16) []flow {
	t.Helper()
	var list []flow
	for _, b := range families() {
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			for _, hostBegins := range []bool{true, false} {
				for _, hostFirst := range []bool{true, false} {
					f := s.pair(t, b, proto, hostBegins, port)
					f.hostAtFirst = hostFirst
					f.what += fmt.Sprintf(", the host speaks first: %t", hostFirst)
					list = append(list, f)
				}
			}
		}
	}
	return list
}

// goesOn speaks in a flow again and reports whether both ends hear.
func (f flow) goesOn(t *testing.T) bool {
	t.Helper()
	if f.hostAtFirst {
		return talks(t, f.host, f.peer)
	}
	return talks(t, f.peer, f.host)
}

// unwatched fails unless conntrack knows of no flow at all.
func (w *wire) unwatched(t *testing.T) {
	t.Helper()
	if known, err := w.conn.entries(); err != nil || len(known) > 0 {
		t.Fatalf("conntrack should know nothing yet: %+v, %v", known, err)
	}
}

// Sessions that began before anything used conntrack live on behind the first
// apply, whoever of the two speaks first, and so does what runs at full speed.
func TestFirstApplyKeepsWhatRuns(t *testing.T) {
	t.Parallel()
	w := newStage(t)
	list := w.running(t, 7)
	var unlisted []flow
	for _, b := range families() {
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			unlisted = append(unlisted, w.pair(t, b, proto, false, 8))
		}
	}
	own := listenTCP(t, w.inHost, 11)
	near, far := connect(t, w.inHost, own, netip.AddrPortFrom(host4, 0), netip.AddrPortFrom(other4, 11))
	within := flow{what: "within the host", host: near, peer: far}
	var moved []*atomic.Int64
	for _, b := range families() {
		for _, hostBegins := range []bool{true, false} {
			f := w.pair(t, b, rules.TCP, hostBegins, 7)
			moved = append(moved, pump(t, f.host, f.peer), pump(t, f.peer, f.host))
		}
	}
	w.unwatched(t)
	before := make([]int64, len(moved))
	w.apply(ruleset(t, first)) // in the middle of it
	for i := range moved {
		before[i] = moved[i].Load()
	}

	for _, f := range append(list, within) {
		if !f.goesOn(t) {
			t.Errorf("%s: lost", f.what)
		}
	}
	for i := range moved {
		until(t, "a running transfer to go on", func() bool { return moved[i].Load() > before[i]+4<<20 })
	}
	for _, f := range unlisted {
		speaks(t, f.host) // the server tries to keep the port's flow alive
	}
	w.areCut(t, unlisted...)
	res := w.apply(ruleset(t, first+"[open.more]\nports = 12\n"))
	if res.Seeded != (SeedResult{}) {
		t.Errorf("only the first apply has flows to tell of: %+v", res.Seeded)
	}
}

// pump sends from one end to the other without pause until the test ends, and
// counts what arrives.
func pump(t *testing.T, from, to net.Conn) *atomic.Int64 {
	t.Helper()
	var n atomic.Int64
	done := make(chan struct{}, 2)
	if err := errors.Join(from.SetDeadline(time.Time{}), to.SetDeadline(time.Time{})); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer func() { done <- struct{}{} }()
		for b := make([]byte, 1<<16); ; {
			if _, err := from.Write(b); err != nil {
				return
			}
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for b := make([]byte, 1<<16); ; {
			k, err := to.Read(b)
			n.Add(int64(k))
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		from.Close()
		to.Close()
		<-done
		<-done
	})
	return &n
}

// The same rules, loaded by another program that tells conntrack nothing, end what
// the host began as soon as its peer speaks first. Were it not so, the test above
// would show nothing.
func TestWithoutSeedingFlowsAreLost(t *testing.T) {
	t.Parallel()
	w := newStage(t)
	list := w.running(t, 7)
	w.unwatched(t)
	var text strings.Builder
	rs := ruleset(t, first)
	if err := rs.Table.WriteNFT(&text, time.Now()); err != nil {
		t.Fatal(err)
	}
	w.script(text.String())
	var lost []flow
	for _, f := range list {
		if f.hostBegan && !f.hostAtFirst {
			lost = append(lost, f)
		}
	}
	if len(lost) != 4 {
		t.Fatalf("%d flows to lose", len(lost))
	}
	w.areCut(t, lost...)
}

// Conntrack may have seen the middle of a flow, and then has it in the direction
// of the first packet that it saw. That is turned, but not what it saw begin.
func TestSeedTurnsWhatIsReversed(t *testing.T) {
	t.Parallel()
	w := newStage(t)
	var own, unlisted []flow
	for _, b := range families() {
		f := w.pair(t, b, rules.TCP, true, 7)
		own = append(own, f)
		unlisted = append(unlisted, w.pair(t, b, rules.TCP, false, 8))
	}
	w.unwatched(t)
	w.script("table inet other { chain in { type filter hook input priority 0; ct state invalid counter; }; }")
	for _, f := range own {
		if !talks(t, f.peer, f.host) {
			t.Fatal(f.what)
		}
	}
	for _, f := range unlisted {
		if !talks(t, f.host, f.peer) {
			t.Fatal(f.what)
		}
	}
	// From a port that somebody listens on: not what it looks like.
	near, far := connect(t, w.inHost, w.serve(t, service{false, rules.TCP, 8}), netip.AddrPortFrom(host4, 8), netip.AddrPortFrom(netip.MustParseAddr(stranger4), 8))
	seen := flow{what: "begun from a port that listens", host: near, peer: far}
	if !talks(t, near, far) {
		t.Fatal(seen.what)
	}

	res := w.apply(ruleset(t, first))
	if want := (SeedResult{Turned: 4, Known: 1}); res.Seeded != want || len(res.Warnings) > 0 {
		t.Errorf("seeded %+v, want %+v; warnings %q", res.Seeded, want, res.Warnings)
	}
	for _, f := range append(own, seen) {
		if !f.goesOn(t) {
			t.Errorf("%s: lost", f.what)
		}
	}
	for _, f := range unlisted {
		speaks(t, f.host)
	}
	w.areCut(t, unlisted...)
	again, err := w.conn.Seed()
	if want := (SeedResult{Known: 5}); err != nil || again != want {
		t.Errorf("again: %+v, %v; want %+v", again, err, want)
	}
}

// What a NAT rewrote has no entry by the ports of its socket, and gets no second
// one.
func TestSeedLeavesNATAlone(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	p := w.peer("eth0", stranger4, stranger6)
	w.script("table inet nat { chain pre { type nat hook prerouting priority -100; tcp dport 8 redirect to :7; }; }")
	l := listenTCP(t, w.inHost, 7)
	var list []flow
	for _, b := range families() {
		near, far := connect(t, p.in, l, netip.AddrPortFrom(b.peer, 0), netip.AddrPortFrom(b.host, 8))
		list = append(list, flow{what: b.family, host: far, peer: near})
	}
	before, err := w.conn.entries()
	if err != nil {
		t.Fatal(err)
	}
	res := w.apply(ruleset(t, "[open.wire]\nports = 8\n"))
	if want := (SeedResult{Known: 2}); res.Seeded != want {
		t.Errorf("seeded %+v, want %+v", res.Seeded, want)
	}
	if after, err := w.conn.entries(); err != nil || len(after) != len(before) {
		t.Errorf("%d entries, before %d; %v", len(after), len(before), err)
	}
	for _, f := range list {
		if !f.goesOn(t) {
			t.Errorf("%s: lost", f.what)
		}
	}
}

// A ruleset stands whether or not conntrack could be told; the result says so.
func TestSeedThatFailsIsSaid(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	ns := w.conn.ns
	elsewhere, err := os.Open("/dev/null") // no namespace: its sockets cannot be read
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	w.conn.ns = elsewhere
	res, err := w.conn.Apply(ruleset(t, first))
	w.conn.ns = ns
	if err != nil || len(res.Changed) == 0 {
		t.Fatalf("apply: %+v, %v", res, err)
	}
	if len(res.Warnings) != 1 || !strings.Contains(res.Warnings[0], "connections that run already may end") {
		t.Errorf("warnings: %q", res.Warnings)
	}
}
