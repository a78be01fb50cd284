package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Flow is a connection that is alive now, with its ports as they stand on the
// wire.
type Flow struct {
	Protocol string     `json:"protocol"`
	Address  netip.Addr `json:"address"` // of this host; of transit, where it leads
	Port     uint16     `json:"port"`
	Peer     netip.Addr `json:"peer"`
	PeerPort uint16     `json:"peer_port"`
	Outbound bool       `json:"outbound,omitempty"` // the host began it
	// Target is where a NAT leads it; zero when nothing rewrites it.
	Target netip.AddrPort `json:"target,omitzero"`
	// PID and Process are who has the socket, as far as this user may see; 0 and
	// "" also for what ends in a container.
	PID     int    `json:"pid,omitempty"`
	Process string `json:"process,omitempty"`
	// Kind and Rule are what ends it, as in [rules.Decision]; of what Decide does
	// not judge: "egress", "transit" and "container".
	Kind string `json:"kind"`
	Rule string `json:"rule,omitempty"`
}

// Ending gives the flows that the ruleset will end once it is loaded: what is
// established now and what its next packet will not be admitted for. It goes by
// conntrack, and where that knows nothing by the sockets, as [Conn.Seed] does; the
// interface is that of the way back to the peer. A policy that keeps flows, or
// that enforces nothing, ends none.
func (c *Conn) Ending(rs *rules.Ruleset) ([]Flow, error) {
	if rs.Policy.Default.KeepFlows || rs.Policy.Default.Observe {
		return nil, nil
	}
	s, err := c.sockets()
	if err != nil {
		return nil, err
	}
	known, err := c.entries()
	if err != nil {
		return nil, fmt.Errorf("read conntrack: %w", err)
	}
	host := &hostView{}
	var routes *netlink.Handle // stays in the namespace that it was made in
	if err := c.inside(func() (err error) {
		if err = host.read(); err == nil {
			routes, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		}
		return err
	}); err != nil {
		return nil, fmt.Errorf("read the host's addresses: %w", err)
	}
	defer routes.Close()
	e := &census{routes: routes, rs: rs, host: host, sockets: s, now: time.Now(), ways: map[netip.Addr]string{}, bySocket: map[tuple]socket{}}
	s.flows = slices.DeleteFunc(s.flows, func(f socket) bool { return f.Inode == 0 }) // closed, the kernel says goodbye
	for _, f := range s.flows {
		e.bySocket[f.tuple] = f
	}
	table, err := c.Snapshot(rs.Table.Name)
	if err != nil {
		return nil, err
	}
	watched := map[tuple]bool{}
	for i := range known {
		k := &known[i]
		watched[k.orig], watched[k.reply] = true, true
		// What a first apply will turn, see Seed.
		if f, ok := e.bySocket[k.orig]; ok && !table.Present && k.midStream() && s.began(f) != k.orig {
			k.orig, k.reply = k.reply, k.orig
		}
		e.judge(k)
	}
	for _, f := range s.flows {
		if !watched[f.tuple] {
			began := s.began(f)
			e.judge(&entry{orig: began, reply: began.reversed(), status: statusSeenReply, tcpState: tcpEstablished})
		}
	}
	e.name()
	slices.SortFunc(e.out, func(a, b Flow) int {
		return cmp.Or(strings.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), a.Address.Compare(b.Address),
			a.Peer.Compare(b.Peer), cmp.Compare(a.PeerPort, b.PeerPort))
	})
	return e.out, nil
}

// census is the work of one Ending.
type census struct {
	routes   *netlink.Handle
	rs       *rules.Ruleset
	host     *hostView
	sockets  *sockets
	now      time.Time
	ways     map[netip.Addr]string // interfaces by which peers are reached
	bySocket map[tuple]socket
	out      []Flow
	inodes   []uint32 // of out; 0: no socket of this namespace
}

// judge notes a flow that the ruleset ends.
func (e *census) judge(k *entry) {
	if k.status&statusSeenReply == 0 || k.orig.protocol == rules.TCP && (k.tcpState < tcpEstablished || k.tcpState > tcpLastAlive) {
		return // nothing was established, or it is over
	}
	from, to := e.host.addrs[k.orig.src.Addr()], e.host.addrs[k.orig.dst.Addr()]
	switch {
	case k.orig.src.Addr().IsLoopback() || k.orig.dst.Addr().IsLoopback() || from && to:
	case from:
		e.outbound(k)
	case to:
		e.inbound(k)
	default:
		e.transit(k)
	}
}

// inbound is what a stranger began: the gate judges each of its packets.
func (e *census) inbound(k *entry) {
	f := Flow{
		Protocol: k.orig.protocol.String(), Address: k.orig.dst.Addr(), Port: k.orig.dst.Port(),
		Peer: k.orig.src.Addr(), PeerPort: k.orig.src.Port(),
	}
	if k.reply.src != k.orig.dst {
		if e.rs.Policy.Default.IgnorePublished {
			return
		}
		f.Target = k.reply.src
	}
	owner, here := e.owner(k.reply)
	if e.host.addrs[k.reply.src.Addr()] && !here {
		return // conntrack remembers what no socket has any more
	}
	d := e.rs.Decide(rules.Packet{
		In: e.way(k.orig.src.Addr(), k.orig.dst.Addr()), Src: k.orig.src.Addr(), Dst: k.orig.dst.Addr(), Protocol: k.orig.protocol,
		SrcPort: k.orig.src.Port(), DstPort: k.orig.dst.Port(), Flow: rules.StrangersFlow, At: e.now,
	})
	if d.Outcome != rules.OutcomeOpen {
		f.Kind, f.Rule = d.Kind, d.Rule
		e.note(f, owner.Inode)
	}
}

// outbound is what the host began: only a policy that lists what may leave ends it.
func (e *census) outbound(k *entry) {
	p := e.rs.Policy
	owner, here := e.owner(k.orig)
	if p.Default.Output == rules.Accept || !here && k.orig.protocol != rules.SCTP {
		return
	}
	leaving := rules.Packet{
		In: e.way(k.orig.dst.Addr(), k.orig.src.Addr()), Src: k.orig.src.Addr(), Dst: k.orig.dst.Addr(), Protocol: k.orig.protocol,
		SrcPort: k.orig.src.Port(), DstPort: k.orig.dst.Port(), At: e.now,
	}
	for i := range p.Egress {
		if g := &p.Egress[i]; mentions(&g.Traffic, leaving.Protocol, leaving.DstPort) && e.rs.Matches(&g.Traffic, leaving) && owns(g, owner) {
			return
		}
	}
	e.note(Flow{
		Protocol: k.orig.protocol.String(), Address: k.orig.src.Addr(), Port: k.orig.src.Port(),
		Peer: k.orig.dst.Addr(), PeerPort: k.orig.dst.Port(), Outbound: true, Kind: "egress",
	}, owner.Inode)
}

// mentions reports whether a rule is about a port of a protocol.
func mentions(t *rules.Traffic, p rules.Protocol, port uint16) bool {
	if t.Any {
		return true
	}
	for _, on := range t.On {
		if on.Protocol == p && (on.Ports == nil || slices.ContainsFunc(on.Ports, func(r rules.PortRange) bool { return r.Lo <= port && port <= r.Hi })) {
			return true
		}
	}
	return false
}

// owns reports whether a socket may be the user's that an egress rule is for. The
// group of a socket cannot be seen: it counts as right.
func owns(g *rules.Egress, s socket) bool {
	if g.User == "" {
		return true
	}
	id, err := lookupID(rules.MetaSkuid, g.User)
	return err != nil || id == s.UID // apply refuses a user that does not exist
}

// transit is what is routed through the host.
func (e *census) transit(k *entry) {
	p := e.rs.Policy
	f := Flow{
		Protocol: k.orig.protocol.String(), Address: k.orig.dst.Addr(), Port: k.orig.dst.Port(),
		Peer: k.orig.src.Addr(), PeerPort: k.orig.src.Port(),
	}
	switch {
	case !p.Default.IgnorePublished && e.isPublished(k.orig.dst.Addr()) && !e.isPublished(k.orig.src.Addr()):
		f.Kind = "container"
	case p.Default.DropForward:
		f.Kind = "transit"
	default:
		return
	}
	e.note(f, 0)
}

// isPublished reports whether an address is in a network of containers.
func (e *census) isPublished(a netip.Addr) bool {
	way := e.way(a, netip.Addr{})
	return way != "" && slices.ContainsFunc(e.rs.Policy.Published.Interfaces, func(p string) bool { return rules.MatchInterface(p, way) })
}

// way gives the interface by which a peer of an address of ours is reached, "" when
// there is no telling.
func (e *census) way(peer, own netip.Addr) string {
	if peer.IsLinkLocalUnicast() && peer.Is6() { // every link has such a route
		for name, l := range e.host.links {
			if slices.Contains(l.addrs, own) {
				return name
			}
		}
		return ""
	}
	if dev, ok := e.ways[peer]; ok {
		return dev
	}
	dev := ""
	if way, err := e.routes.RouteGet(peer.AsSlice()); err == nil && len(way) == 1 {
		for name, l := range e.host.links {
			if int(l.index) == way[0].LinkIndex {
				dev = name
			}
		}
	}
	e.ways[peer] = dev
	return dev
}

// owner finds the socket of a flow by its tuple as the host sends it: its own, or
// one that talks with many. SCTP's are not read, and are taken to be there.
func (e *census) owner(out tuple) (socket, bool) {
	if s, ok := e.bySocket[out]; ok {
		return s, true
	}
	if out.protocol == rules.UDP {
		return e.sockets.listener(rules.UDP, out.src)
	}
	return socket{}, out.protocol != rules.TCP
}

func (e *census) note(f Flow, inode uint32) {
	e.out = append(e.out, f)
	e.inodes = append(e.inodes, inode)
}

// name fills in whose sockets they are.
func (e *census) name() {
	wanted := map[uint32]Process{}
	for _, i := range e.inodes {
		if i != 0 {
			wanted[i] = Process{}
		}
	}
	if len(wanted) == 0 {
		return
	}
	Owners(wanted)
	for i, inode := range e.inodes {
		e.out[i].PID, e.out[i].Process = wanted[inode].PID, wanted[inode].Comm
	}
}
