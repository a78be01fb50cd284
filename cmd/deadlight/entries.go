package main

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/firewall"
	"deadlight/rules"
)

// By which ways packets come to a socket, and what the running rules do to them.

// nic is an interface by which packets enter, with this host's addresses on it.
type nic struct {
	name  string
	addrs []netip.Addr
}

// nics lists the interfaces of the calling thread's network namespace that have
// an address, loopback left out.
func nics() ([]nic, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the interfaces: %w", err)
	}
	var out []nic
	for _, l := range links {
		if l.Attrs().RawFlags&unix.IFF_LOOPBACK != 0 {
			continue
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list the addresses of %s: %w", l.Attrs().Name, err)
		}
		p := nic{name: l.Attrs().Name}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok {
				p.addrs = append(p.addrs, ip.Unmap())
			}
		}
		if len(p.addrs) > 0 {
			out = append(out, p)
		}
	}
	return out, nil
}

// own gives an address of a family, one beyond the link if there is one.
func (p nic) own(v4 bool) (netip.Addr, bool) {
	var out netip.Addr
	for _, a := range p.addrs {
		if a.Is4() == v4 && (!out.IsValid() || out.IsLinkLocalUnicast()) {
			out = a
		}
	}
	return out, out.IsValid()
}

// entry is a way to a socket: by an interface, to an address.
type entry struct {
	in  string // "": an interface that no rule names
	dst netip.Addr
}

// entries are the ways by which packets of a family come to a socket.
func (l listener) entries(all []nic, v4 bool) []entry {
	if !l.takes(v4) || l.loopback() {
		return nil
	}
	var out []entry
	for _, p := range all {
		dst, ok := p.own(v4)
		if !ok || l.Device != "" && l.Device != p.name {
			continue
		}
		if !l.Addr.IsUnspecified() {
			dst = l.Addr
		}
		if dst.IsLinkLocalUnicast() && !slices.Contains(p.addrs, dst) {
			continue // an address of this link only
		}
		out = append(out, entry{p.name, dst})
	}
	return out
}

// from gives a stranger who can reach an address.
func (e entry) from() netip.Addr {
	if e.dst.IsLinkLocalUnicast() && e.dst.Is6() {
		return netip.MustParseAddr("fe80::7777:77ff:fe77:7777")
	}
	return stranger(e.dst.Is6())
}

// packet is the first of a flow to a port.
func (e entry) packet(p rules.Protocol, port uint16, src netip.Addr, at time.Time) rules.Packet {
	return rules.Packet{In: e.in, Src: src, Dst: e.dst, Protocol: p, SrcPort: 40000, DstPort: port, At: at}
}

// inquiry gathers packets, so that the running rules are read once for all.
type inquiry struct {
	packets []rules.Packet
	index   map[rules.Packet]int
	// ask is the kernel, or a test.
	ask     func([]rules.Packet) ([]*firewall.Journey, error)
	answers []*firewall.Journey
}

// note plans to ask about a packet.
func (q *inquiry) note(p rules.Packet) {
	if q.index == nil {
		q.index = map[rules.Packet]int{}
	}
	if _, known := q.index[p]; !known {
		q.index[p] = len(q.packets)
		q.packets = append(q.packets, p)
	}
}

// run asks; left is how many packets were too many.
func (q *inquiry) run() (left int, err error) {
	n := min(len(q.packets), mostWalks)
	q.answers, err = q.ask(q.packets[:n])
	return len(q.packets) - n, err
}

// answer is what becomes of a packet; nil: it was not asked about.
func (q *inquiry) answer(p rules.Packet) *firewall.Journey {
	if i, ok := q.index[p]; ok && i < len(q.answers) {
		return q.answers[i]
	}
	return nil
}

// accepts reports whether the running rules admit a packet for sure.
func accepts(j *firewall.Journey) bool { return j != nil && j.Verdict == firewall.WalkAccept }

// unsure reports whether it cannot be told what they do.
func unsure(j *firewall.Journey) bool { return j == nil || j.Verdict == firewall.WalkUnknown }

// stepText names a step in a few words: "table ip filter, chain INPUT: policy drop".
func stepText(s firewall.Step) string {
	s.Text, s.Handle = "", 0
	return s.String()
}

// mover is the rule that sent a packet on.
func mover(j *firewall.Journey) string {
	for _, s := range j.Steps {
		if s.Verdict == "rewrite" {
			return fmt.Sprintf("table %s %s, chain %s", s.Family, s.Table, s.Chain)
		}
	}
	return "a rule"
}
