package verify

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// The truth table of what may come back for a probe, and what it proves. The
// answers are made by hand, byte for byte; no kernel of the target has a say.

// Who answers, besides the target itself.
var (
	router4, router6 = netip.MustParseAddr("10.9.0.254"), netip.MustParseAddr("fd09::fe")
	other4, other6   = netip.MustParseAddr("10.9.0.77"), netip.MustParseAddr("fd09::77")
)

type sender uint8

const (
	target sender = iota
	router
	another // address: of the same host, perhaps
)

func (s sender) addr(v6 bool) netip.Addr {
	if v6 {
		return [...]netip.Addr{target6, router6, other6}[s]
	}
	return [...]netip.Addr{target4, router4, other4}[s]
}

// hand answers one probe.
type hand struct {
	w     *world
	v6    bool
	probe reply  // as the target read it
	frame []byte // from its IP header on
	send  func([]byte)
}

// as is the way back, from whoever answers.
func (h *hand) as(s sender) *Path {
	p := h.w.reverse(h.v6)
	p.Src = s.addr(h.v6)
	return p
}

func (h *hand) tcp(s sender, flags byte, ack uint32) {
	h.send(segment(h.as(s), h.probe.dport, h.probe.sport, ack, flags))
}

func (h *hand) udp(s sender, port uint16) {
	t, b := udpTemplate(h.as(s)), make([]byte, maxFrame)
	h.send(b[:t.udp(b, port, h.probe.sport)])
}

// icmp sends an error that quotes a packet.
func (h *hand) icmp(s sender, typ, code byte, quoted []byte) {
	proto := rules.ICMPv4
	if h.v6 {
		proto = rules.ICMPv6
	}
	t := newTemplate(h.as(s), proto, append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, quoted...))
	sum := fold16(t.sum)
	t.frame[t.l4+2], t.frame[t.l4+3] = byte(sum>>8), byte(sum)
	h.send(t.frame)
}

// after does something a while after the probe.
func (h hand) after(d time.Duration, then func(h *hand)) {
	h.frame = append([]byte{}, h.frame...)
	time.AfterFunc(d, func() { then(&h) })
}

// The answers of the table.
func segmentFrom(s sender, flags byte, beyond uint32) func(h *hand) {
	return func(h *hand) { h.tcp(s, flags, h.probe.seq+1+beyond) }
}

func datagramFrom(s sender, beyond uint16) func(h *hand) {
	return func(h *hand) { h.udp(s, h.probe.dport+beyond) }
}

// errorFrom sends an ICMP error: type and code over IPv4, then over IPv6.
func errorFrom(s sender, typ4, code4, typ6, code6 byte) func(h *hand) {
	return errorAbout(s, typ4, code4, typ6, code6, func(q []byte, _ int) []byte { return q })
}

// errorAbout sends one about something else than the probe; l4 is where the
// transport header of the quote begins.
func errorAbout(s sender, typ4, code4, typ6, code6 byte, change func(quote []byte, l4 int) []byte) func(h *hand) {
	return func(h *hand) {
		typ, code, l4 := typ4, code4, ipv4Len
		if h.v6 {
			typ, code, l4 = typ6, code6, ipv6Len
		}
		h.icmp(s, typ, code, change(append([]byte{}, h.frame[:l4+8]...), l4))
	}
}

func inTurn(all ...func(h *hand)) func(h *hand) {
	return func(h *hand) {
		for _, f := range all {
			f(h)
		}
	}
}

// evidence is a row: what comes back, what it says of the port, and the verdict
// where the policy does not list the port and where it does.
type evidence struct {
	name             string
	proto            rules.Protocol
	family           rules.Family
	answer           func(h *hand) // nil: nothing comes back
	want             Answer
	from             sender
	unlisted, listed Verdict
	// once says that only the first probe of the port is answered.
	once bool
}

func evidenceTable() []evidence {
	const (
		tcp, udp = rules.TCP, rules.UDP
		both, v4 = rules.Both, rules.IPv4
		v6       = rules.IPv6
		synAck   = flagSYN | flagACK
		rst      = flagRST | flagACK
	)
	silence := Answer{Filtered, NoResponse}
	routed := Answer{Unknown, RouterError}
	foreignPort := func(q []byte, l4 int) []byte { q[l4]++; return q }
	foreignSeq := func(q []byte, l4 int) []byte { q[l4+7]++; return q }
	foreignHost := func(q []byte, l4 int) []byte { q[l4-1]++; return q }
	cut := func(q []byte, l4 int) []byte { return q[:l4+4] }
	rows := []evidence{
		// What the stack or a service of the target says.
		{"syn-ack", tcp, both, segmentFrom(target, synAck, 0), Answer{Open, SynAck}, target, Fail, Pass, false},
		{"syn-ack, three times", tcp, both, inTurn(segmentFrom(target, synAck, 0), segmentFrom(target, synAck, 0), segmentFrom(target, synAck, 0)),
			Answer{Open, SynAck}, target, Fail, Pass, false},
		{"rst", tcp, both, segmentFrom(target, rst, 0), Answer{Closed, TCPReset}, target, Fail, Pass, false},
		{"ack alone", tcp, both, segmentFrom(target, flagACK, 0), Answer{Closed, TCPOther}, target, Fail, Pass, false},
		{"rst, then syn-ack", tcp, both, inTurn(segmentFrom(target, rst, 0), segmentFrom(target, synAck, 0)), Answer{Open, SynAck}, target, Fail, Pass, false},
		{"syn-ack, then rst", tcp, both, inTurn(segmentFrom(target, synAck, 0), segmentFrom(target, rst, 0)), Answer{Open, SynAck}, target, Fail, Pass, false},
		{"syn-ack, 1.1 s late", tcp, both, func(h *hand) { h.after(1100*time.Millisecond, segmentFrom(target, synAck, 0)) },
			Answer{Open, SynAck}, target, Fail, Pass, true},
		{"syn-ack from another address", tcp, both, segmentFrom(another, synAck, 0), Answer{Open, SynAck}, another, Fail, Pass, false},
		{"rst from another address", tcp, both, segmentFrom(another, rst, 0), Answer{Closed, TCPReset}, another, Fail, Pass, false},
		{"datagram", udp, both, datagramFrom(target, 0), Answer{Open, UDPAnswer}, target, Fail, Pass, false},
		{"datagram, 1.1 s late", udp, both, func(h *hand) { h.after(1100*time.Millisecond, datagramFrom(target, 0)) },
			Answer{Open, UDPAnswer}, target, Fail, Pass, true},
		{"datagram from another address", udp, both, datagramFrom(another, 0), Answer{Unknown, OtherAddress}, another, Inconclusive, Inconclusive, false},
		{"datagram from another address, then from the target", udp, both, inTurn(datagramFrom(another, 0), datagramFrom(target, 0)),
			Answer{Open, UDPAnswer}, target, Fail, Pass, false},

		// What answers no probe of ours.
		{"nothing", tcp, both, nil, silence, target, Pass, Fail, false},
		{"nothing", udp, both, nil, silence, target, Pass, Pass, false}, // unproved, says a note
		{"rst with a wrong ack", tcp, both, segmentFrom(target, rst, 1), silence, target, Pass, Fail, false},
		{"rst without an ack", tcp, both, segmentFrom(target, flagRST, 0), silence, target, Pass, Fail, false},
		{"syn-ack with a wrong ack", tcp, both, segmentFrom(target, synAck, 1), silence, target, Pass, Fail, false},
		{"syn-ack for another port, the next one", tcp, both, func(h *hand) {
			h.send(segment(h.as(target), h.probe.dport+1, h.probe.sport, h.probe.seq+1, synAck))
		}, silence, target, Pass, Fail, false},
		{"nothing but an answer to the one before", tcp, both, nil, silence, target, Pass, Fail, false},
		{"syn-ack from another address with a wrong ack", tcp, both, segmentFrom(another, synAck, 1), silence, target, Pass, Fail, false},
		{"error about another sequence number", tcp, both, errorAbout(target, 3, 3, 1, 4, foreignSeq), silence, target, Pass, Fail, false},
		{"error about another source port", tcp, both, errorAbout(target, 3, 3, 1, 4, foreignPort), silence, target, Pass, Fail, false},
		{"error about another source port", udp, both, errorAbout(target, 3, 3, 1, 4, foreignPort), silence, target, Pass, Pass, false},
		{"datagram from a port that was not probed", udp, both, datagramFrom(target, 10000), silence, target, Inconclusive, Inconclusive, false},
		{"error about another target", udp, both, errorAbout(target, 3, 3, 1, 4, foreignHost), silence, target, Pass, Pass, false},
		{"error that is cut short", tcp, both, errorAbout(target, 3, 3, 1, 4, cut), silence, target, Pass, Fail, false},
		{"source quench", tcp, v4, errorFrom(router, 4, 0, 0, 0), silence, target, Pass, Fail, false},

		// Strong and weak answers together.
		{"rejected, then rst", tcp, both, inTurn(errorFrom(target, 3, 13, 1, 1), segmentFrom(target, rst, 0)), Answer{Closed, TCPReset}, target, Fail, Pass, false},
		{"rst, then rejected", tcp, both, inTurn(segmentFrom(target, rst, 0), errorFrom(target, 3, 13, 1, 1)), Answer{Closed, TCPReset}, target, Fail, Pass, false},
		{"error from a router, then syn-ack", tcp, both, inTurn(errorFrom(router, 3, 1, 1, 3), segmentFrom(target, synAck, 0)), Answer{Open, SynAck}, target, Fail, Pass, false},
		{"error from a router, then rejected", udp, both, inTurn(errorFrom(router, 3, 1, 1, 3), errorFrom(target, 3, 13, 1, 1)),
			Answer{Rejected, AdminProhibited}, target, Fail, Fail, false},
	}
	// ICMP errors: over either protocol the same, but for port-unreachable.
	for _, proto := range []rules.Protocol{tcp, udp} {
		closed, listed := Answer{Rejected, PortUnreachable}, Fail
		if proto == udp {
			closed, listed = Answer{Closed, PortUnreachable}, Pass
		}
		rows = append(rows,
			evidence{"port-unreachable", proto, both, errorFrom(target, 3, 3, 1, 4), closed, target, Fail, listed, false},
			evidence{"port-unreachable from a router", proto, both, errorFrom(router, 3, 3, 1, 4), routed, router, Inconclusive, Inconclusive, false})
		for _, e := range []struct {
			name       string
			family     rules.Family
			typ4, c4   byte
			typ6, c6   byte
			fromTarget Reason
		}{
			{"net-unreachable", both, 3, 0, 1, 0, NetUnreachable},
			{"host-unreachable", both, 3, 1, 1, 3, HostUnreachable},
			{"proto-unreachable", both, 3, 2, 4, 1, ProtoUnreachable},
			{"net prohibited", v4, 3, 9, 0, 0, AdminProhibited},
			{"host prohibited", v4, 3, 10, 0, 0, AdminProhibited},
			{"admin-prohibited", both, 3, 13, 1, 1, AdminProhibited},
			{"policy failed", v6, 0, 0, 1, 5, AdminProhibited},
			{"reject route", v6, 0, 0, 1, 6, AdminProhibited},
			{"beyond scope", v6, 0, 0, 1, 2, OtherICMP},
			{"too big", both, 3, 4, 2, 0, OtherICMP},
			{"time exceeded in transit", both, 11, 0, 3, 0, OtherICMP},
			{"time exceeded in reassembly", both, 11, 1, 3, 1, OtherICMP},
			{"parameter problem", both, 12, 0, 4, 0, OtherICMP},
		} {
			rows = append(rows,
				evidence{e.name, proto, e.family, errorFrom(target, e.typ4, e.c4, e.typ6, e.c6), Answer{Rejected, e.fromTarget}, target, Fail, Fail, false},
				evidence{e.name + " from a router", proto, e.family, errorFrom(router, e.typ4, e.c4, e.typ6, e.c6), routed, router, Inconclusive, Inconclusive, false})
		}
	}
	return rows
}

// evidencePort is the port of a row.
func evidencePort(row int) uint16 { return uint16(1000 + row) }

func TestEvidence(t *testing.T) {
	rows := evidenceTable()
	for name, v6 := range map[string]bool{"ipv4": false, "ipv6": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.mute(true) // the kernel of the target says nothing
			seen := map[Target]bool{}
			w.responder(func(b []byte, send func([]byte)) {
				h := hand{w: w, v6: v6, send: send}
				if len(b) < etherLen || !parseReply(b[etherLen:], &h.probe) || h.probe.to != target.addr(v6) {
					return
				}
				h.frame = b[etherLen:]
				at := Target{rules.UDP, h.probe.dport}
				switch {
				case h.probe.kind == replyTCP && h.probe.flags == flagSYN:
					at.Protocol = rules.TCP
				case h.probe.kind != replyUDP:
					return
				}
				if at == (Target{rules.TCP, 22}) { // the canary
					h.tcp(target, flagRST|flagACK, h.probe.seq+1)
					return
				}
				i := int(at.Port) - int(evidencePort(0))
				if i < 0 || i >= len(rows) || rows[i].proto != at.Protocol || rows[i].answer == nil || rows[i].once && seen[at] {
					return
				}
				seen[at] = true
				rows[i].answer(&h)
			})
			var tcp, udp []uint16
			for i, row := range rows {
				switch {
				case !row.family.Has(!v6):
				case row.proto == rules.TCP:
					tcp = append(tcp, evidencePort(i))
				default:
					udp = append(udp, evidencePort(i))
				}
			}
			// Slow, so that what is late still comes in time.
			r := w.sweep(Config{Paths: []Path{w.path(v6, tcp, udp, canary22)}, MaxRate: 100})
			w.wantAlive(r)
			p := r.Paths[0]
			next := map[rules.Protocol]int{}
			for i, row := range rows {
				if !row.family.Has(!v6) {
					continue
				}
				one := *r
				one.Paths = []PathResult{r.Paths[0]}
				one.Paths[0].Stray = nil
				if stray := evidencePort(i) + 10000; slices.Contains(p.Stray, stray) {
					one.Paths[0].Stray = []uint16{stray}
				}
				n := next[row.proto]
				next[row.proto]++
				got, at := p.TCP, Target{row.proto, evidencePort(i)}
				if row.proto == rules.UDP {
					got = p.UDP
				}
				if got[n] != row.want {
					t.Errorf("%s %s: %v (%v), want %v (%v)", row.proto, row.name, got[n].State, got[n].Reason, row.want.State, row.want.Reason)
					continue
				}
				from := row.from.addr(v6)
				if a, ok := p.From[at]; ok != (row.from != target) || ok && a != from {
					t.Errorf("%s %s: from %v, want %v", row.proto, row.name, a, from)
				}
				for _, listed := range []bool{false, true} {
					report, want := judgeOne(t, &one, w.path(v6, nil, nil), at, got[n], listed), row.unlisted
					if listed {
						want = row.listed
					}
					if report.Verdict != want {
						t.Errorf("%s %s, listed %v: %v, want %v: %+v", row.proto, row.name, listed, report.Verdict, want, report.Findings)
					}
					for _, f := range report.Findings {
						if f.Reason != row.want.Reason.String() && f.Reason != fmt.Sprintf("%s from %s", row.want.Reason, from) || f.Observed != row.want.State {
							t.Errorf("%s %s, listed %v: %s (%s)", row.proto, row.name, listed, f.Observed, f.Reason)
						}
						if row.from != target && !strings.HasSuffix(f.Reason, from.String()) {
							t.Errorf("%s %s: %q does not name who answered", row.proto, row.name, f.Reason)
						}
					}
				}
			}
		})
	}
}

// judgeOne holds one answer of a sweep against a policy that lists the port, or
// does not.
func judgeOne(t *testing.T, r *Result, p Path, at Target, a Answer, listed bool) *Report {
	t.Helper()
	text := "[open.ssh]\nports = 22\n"
	if listed {
		text += fmt.Sprintf("[open.row]\nports = %d\nprotocol = %q\n", at.Port, at.Protocol)
	}
	one := PathResult{Alive: r.Paths[0].Alive, From: r.Paths[0].From, Stray: r.Paths[0].Stray}
	if at.Protocol == rules.TCP {
		p.TCP, one.TCP, one.SentTCP = []uint16{at.Port}, []Answer{a}, 1
	} else {
		p.UDP, one.UDP, one.SentUDP = []uint16{at.Port}, []Answer{a}, 1
	}
	return Judge(JudgeConfig{Rules: compileText(t, text), Views: []View{{Path: p, In: "eth0", Sweep: true}}},
		&Result{Paths: []PathResult{one}, Bound: r.Bound})
}

// What may be wrong with the vantage and its way, while the target drops all
// ports but 22 and answers there: silence then proves nothing. A cable that is
// pulled in mid-run, and one that is put back, are in TestSweepOutage; no route
// and a next hop that does not answer in TestResolveLink.
func TestVantageTroubles(t *testing.T) {
	const device = "veth0"
	hook := func(name, rest string) func(w *world, p *Path) {
		return func(w *world, _ *Path) {
			w.vantage.nft("table netdev own { chain c { type filter hook " + name + " device " + device + " priority 0; policy accept; " + rest + "\n}; }")
		}
	}
	chain := func(hook string) func(w *world, p *Path) {
		return func(w *world, _ *Path) {
			w.vantage.nft("table inet own { chain c { type filter hook " + hook + " priority -400; policy drop; }; }")
		}
	}
	const everything, nothing = "everything", ""
	for _, c := range []struct {
		name    string
		set     func(w *world, p *Path)
		unknown string // ports of which nothing can be said, but for 22
		alive   bool
		err     error
	}{
		{"no trouble", func(*world, *Path) {}, nothing, true, nil},
		{"no carrier: frames are refused", func(w *world, _ *Path) { w.target.plug(w.back, false) }, everything, false, unix.ENOBUFS},
		{"the Ethernet address of the next hop is wrong", func(_ *world, p *Path) { p.Link.Dst = []byte{2, 0, 0, 0, 0, 99} }, everything, false, nil},
		{"the target knows no way back", func(_ *world, p *Path) { p.Src = netip.MustParseAddr("10.99.0.1") }, everything, false, nil},
		{"own egress hook drops everything", hook("egress", "drop"), everything, false, unix.ENOBUFS},
		{"own egress hook drops one port", hook("egress", "tcp dport 25 drop"), "25", true, nil},
		// Packet sockets send past these, and read before them.
		{"own output chain drops everything", chain("output"), nothing, true, nil},
		{"own postrouting chain drops everything", chain("postrouting"), nothing, true, nil},
		{"own input chain drops everything", chain("input"), nothing, true, nil},
		{"own prerouting chain drops everything", chain("prerouting"), nothing, true, nil},
		{"own ingress hook drops everything", hook("ingress", "drop"), nothing, true, nil},
		// From then on the target is silent to the vantage, to canaries too.
		{"an IPS shuts the vantage out after 100 packets", func(w *world, _ *Path) {
			w.target.nft("table inet ips { chain c { type filter hook prerouting priority -500; policy accept; ip saddr 10.9.0.1 limit rate over 1/hour burst 100 packets drop; }; }")
		}, everything, false, nil},
		{"an IPS upstream shuts out what answers, too", func(w *world, _ *Path) {
			w.target.nft("table inet ips { chain c { type filter hook postrouting priority 500; policy accept; ip daddr 10.9.0.1 limit rate over 1/hour burst 20 packets drop; }; }")
		}, everything, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.firewall("tcp dport 22 accept")
			ports := portRange(1, 300)
			p := w.path(false, ports, nil, canary22)
			c.set(w, &p)
			r := w.sweep(Config{Paths: []Path{p}})
			got := r.Paths[0]
			t.Logf("%d packets in %v, bound %.2g, err %v", r.Probes, r.Elapsed, r.Bound, got.Err)
			if got.Alive != c.alive || !errors.Is(got.Err, c.err) {
				t.Errorf("alive %v, err %v, want %v, %v", got.Alive, got.Err, c.alive, c.err)
			}
			for i, a := range got.TCP {
				want := Answer{Filtered, NoResponse}
				if c.unknown == everything || c.unknown == Ranges(ports[i:i+1]) {
					want = Answer{Unknown, PathNotProven}
				}
				if ports[i] != 22 && a != want {
					t.Fatalf("port %d: %v (%v), want %v (%v)", ports[i], a.State, a.Reason, want.State, want.Reason)
				}
			}
			want := Inconclusive
			if c.unknown == nothing {
				want = Pass
			}
			why := ""
			if c.err != nil {
				why = "probes to 10.9.0.2 did not leave: send on veth0: no buffer space available"
			}
			report := Judge(JudgeConfig{Rules: compileText(t, "[open.ssh]\nports = 22\n"), Views: []View{{Path: p, In: "eth0", Sweep: true}}}, r)
			if report.Verdict != want {
				t.Errorf("verdict %v, want %v: %+v", report.Verdict, want, report.Findings)
			}
			if notes := strings.Join(report.Notes, "\n"); notes != why {
				t.Errorf("notes %q, want %q", notes, why)
			}
		})
	}
}

// A path that lived through every round but not beyond the last probe is dead:
// what its canaries proved before is worth nothing.
func TestSilenceOfADeadPath(t *testing.T) {
	f := newFlow(&sweepPath{Path: &Path{}, pool: &pool{}, run: tally{sent: 1000}}, rules.TCP, []uint16{80, 81})
	f.good[0] = 3 // 81 was not asked
	for alive, want := range map[bool][]Answer{
		true:  {{Filtered, NoResponse}, {Unknown, PathNotProven}},
		false: {{Unknown, PathNotProven}, {Unknown, PathNotProven}},
	} {
		if got := f.result(alive); !slices.Equal(got, want) {
			t.Errorf("alive %v: %v, want %v", alive, got, want)
		}
	}
}
