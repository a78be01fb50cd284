package firewall

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"deadlight/rules"
)

// told is a flow as a test writes it.
func told(f Flow) string {
	way := "from"
	if f.Outbound {
		way = "to"
	}
	s := fmt.Sprintf("%d/%s %s %s: %s", f.Port, f.Protocol, way, f.Peer, f.Kind)
	if f.Outbound {
		s = fmt.Sprintf("%s to %s %d: %s", f.Protocol, f.Peer, f.PeerPort, f.Kind)
	}
	if f.Rule != "" {
		s += " " + f.Rule
	}
	if f.Target.IsValid() {
		s += " at " + f.Target.String()
	}
	return s
}

func tellAll(list []Flow) string {
	var out []string
	for _, f := range list {
		out = append(out, told(f))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// What Ending foretells comes true, and nothing else ends: first by the sockets
// alone, then by what conntrack saw.
func TestEndingForetellsWhatEnds(t *testing.T) {
	for name, watched := range map[string]bool{"before anything is watched": false, "with what conntrack saw": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testEnding(t, watched)
		})
	}
}

func testEnding(t *testing.T, watched bool) {
	w := newStage(t)
	if watched {
		w.apply(ruleset(t, "[open.all]\nports = \"7-8\"\nprotocol = [\"tcp\", \"udp\"]\n"))
	}
	type running struct {
		flow
		port uint16
	}
	var list []running
	for _, b := range families() {
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			for _, port := range []uint16{7, 8} {
				list = append(list, running{w.pair(t, b, proto, false, port), port})
			}
			list = append(list, running{w.pair(t, b, proto, true, 7), 0})
		}
	}
	const (
		next = "[open.both]\nports = 7\nprotocol = [\"tcp\", \"udp\"]\n[block.some]\nfrom = \"" + stranger6 + "\"\nports = 7\n"
		want = `7/tcp from 2001:db8:5::9: block some
8/tcp from 198.51.100.9: default
8/tcp from 2001:db8:5::9: default
8/udp from 198.51.100.9: default
8/udp from 2001:db8:5::9: default`
	)
	ends := func(r running) bool {
		_, tcp := r.peer.(*net.TCPConn)
		return r.port == 8 || r.port == 7 && tcp && strings.Contains(r.what, "IPv6")
	}
	if !watched {
		w.unwatched(t)
	}
	rs := ruleset(t, next)
	foretold, err := w.conn.Ending(rs)
	if err != nil {
		t.Fatal(err)
	}
	if got := tellAll(foretold); got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	for _, f := range foretold {
		if f.PID != os.Getpid() || f.Process == "" {
			t.Errorf("%s: of process %d %q, want this one", told(f), f.PID, f.Process)
		}
	}
	for _, word := range []string{"established = \"keep\"", "enforce = false"} {
		if none, err := w.conn.Ending(ruleset(t, "[default]\n"+word+"\n"+next)); err != nil || len(none) > 0 {
			t.Errorf("%s: %v, %v", word, tellAll(none), err)
		}
	}
	w.apply(rs)
	var cut []flow
	for _, r := range list {
		if ends(r) {
			cut = append(cut, r.flow)
		} else if !r.goesOn(t) {
			t.Errorf("%s: ended, and was not foretold", r.what)
		}
	}
	w.areCut(t, cut...)
}

// What leaves, and what is rewritten or routed, is foretold too.
func TestEndingBeyondTheHost(t *testing.T) {
	t.Parallel()
	w := &stage{containers(t), nil, map[service]net.Listener{}}
	w.peer = w.wire.peer("eth0", stranger4, stranger6)
	box := w.wire.peer("docker0", "172.17.0.2", "fd17::2")
	w.apply(ruleset(t, "[open.all]\nports = [7, 8080]\n[published]\ninterfaces = \"none0\"\n"))
	l := listenTCP(t, box.in, 80)
	for _, b := range families() {
		inside := netip.MustParseAddr("172.17.0.2")
		if b.host.Is6() {
			inside = netip.MustParseAddr("fd17::2")
		}
		for _, to := range []netip.AddrPort{netip.AddrPortFrom(b.host, 8080), netip.AddrPortFrom(inside, 80)} {
			near, far := connect(t, w.peer.in, l, netip.AddrPortFrom(b.peer, 0), to)
			if !talks(t, near, far) {
				t.Fatal(to)
			}
		}
		near, far := connect(t, box.in, w.serve(t, service{false, rules.TCP, 9}), netip.AddrPortFrom(inside, 0), netip.AddrPortFrom(b.peer, 9))
		if !talks(t, near, far) {
			t.Fatal(inside)
		}
		for _, port := range []uint16{53, 80} {
			w.pair(t, b, rules.TCP, true, port)
		}
	}
	for _, c := range []struct{ policy, want string }{
		{"[default]\npublished = \"ignore\"\n", ""},
		{"[open.all]\nports = 8080\n[published]\ninterfaces = \"none0\"\n", ""},
		{"", `80/tcp from 198.51.100.9: container
80/tcp from 2001:db8:5::9: container
8080/tcp from 198.51.100.9: default at 172.17.0.2:80
8080/tcp from 2001:db8:5::9: default at [fd17::2]:80`},
		{"[default]\nforward = \"drop\"\n[open.all]\nports = 8080\n", `80/tcp from 198.51.100.9: container
80/tcp from 2001:db8:5::9: container
9/tcp from 172.17.0.2: transit
9/tcp from fd17::2: transit`},
		{"[default]\noutput = \"drop\"\npublished = \"ignore\"\n[egress.dns]\nports = 53\nto = \"" + stranger4 + "\"\n[egress.not]\nports = 80\nuser = 4711\n", `tcp to 198.51.100.9 80: egress
tcp to 2001:db8:5::9 53: egress
tcp to 2001:db8:5::9 80: egress`},
	} {
		list, err := w.conn.Ending(ruleset(t, c.policy))
		if got := tellAll(list); err != nil || got != c.want {
			t.Errorf("%s\n%s\nwant\n%s\n%v", c.policy, got, c.want, err)
		}
	}
}

func TestFlowInJSON(t *testing.T) {
	b, err := json.Marshal([]Flow{{
		Protocol: "tcp", Address: host4, Port: 8080, Peer: netip.MustParseAddr(stranger4), PeerPort: 4711,
		Target: netip.MustParseAddrPort("172.17.0.2:80"), Kind: "default",
	}, {Protocol: "udp", Address: host6, Port: 53, Peer: netip.MustParseAddr(stranger6), PeerPort: 9, PID: 7, Process: "named", Kind: "block", Rule: "bad"}})
	const want = `[{"protocol":"tcp","address":"192.0.2.1","port":8080,"peer":"198.51.100.9","peer_port":4711,"target":"172.17.0.2:80","kind":"default"},` +
		`{"protocol":"udp","address":"2001:db8::1","port":53,"peer":"2001:db8:5::9","peer_port":9,"pid":7,"process":"named","kind":"block","rule":"bad"}]`
	if err != nil || string(b) != want {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
}
