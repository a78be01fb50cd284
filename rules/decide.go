package rules

import (
	"net/netip"
	"slices"
	"sort"
)

// Packet is a packet on its way to this host, as it stands on the wire (before
// any DNAT).
type Packet struct {
	In       string // the layer-3 interface it enters by
	Src, Dst netip.Addr
	Protocol Protocol
	SrcPort  uint16 // of TCP and UDP
	DstPort  uint16 // of TCP and UDP
	ICMPType uint8  // of ICMP and ICMPv6
	HopLimit uint8  // 0 means "not 255"
	Flow     Flow
}

// Flow is what conntrack knows of a packet's flow.
type Flow uint8

// The flow states that matter to a verdict.
const (
	NewFlow     Flow = iota // first packet, or one of a flow that the far side began
	ReplyFlow               // an answer to what this host began
	RelatedFlow             // an ICMP error or an expected flow of one
	InvalidFlow
)

// Outcome is what happens to a packet.
type Outcome uint8

// The outcomes, in the words of the command line.
const (
	OutcomeFiltered Outcome = iota
	OutcomeRejected
	OutcomeOpen // admitted; says nothing about a listener
)

// String gives the word of reports and JSON.
func (o Outcome) String() string { return [...]string{"filtered", "rejected", "open"}[o] }

// Decision is the verdict of [Ruleset.Decide] and what caused it.
type Decision struct {
	Outcome Outcome
	Kind    string // "open", "icmp", "dhcp", "established", "loopback", "invalid", "default"
	Rule    string // the name of the [open.*], or ""
	Pos     Pos
}

// Decide says what must happen to a packet addressed to this host. It reads the
// policy, not the compiled table, so that the two can be held against each
// other.
func (r *Ruleset) Decide(p Packet) Decision {
	if p.In == "lo" {
		return Decision{Outcome: OutcomeOpen, Kind: "loopback"}
	}
	if fromLoopback(p.Src) || fromLoopback(p.Dst) {
		return Decision{Outcome: OutcomeFiltered, Kind: "loopback address"}
	}
	if p.Flow == ReplyFlow || p.Flow == RelatedFlow {
		return Decision{Outcome: OutcomeOpen, Kind: "established"}
	}
	if r.essential(p) {
		return Decision{Outcome: OutcomeOpen, Kind: "icmp"}
	}
	if p.Flow == InvalidFlow {
		return Decision{Outcome: OutcomeFiltered, Kind: "invalid"}
	}
	if r.dhcpReply(p) {
		return Decision{Outcome: OutcomeOpen, Kind: "dhcp", Pos: r.Policy.DHCP.Pos}
	}
	if isEcho(p) && r.Policy.ICMP.Echo {
		return Decision{Outcome: OutcomeOpen, Kind: "echo", Pos: r.Policy.ICMP.Pos}
	}
	for _, i := range r.opensAt(p.Protocol, p.DstPort) {
		if o := &r.Policy.Open[i]; r.admits(o, p) {
			return Decision{Outcome: OutcomeOpen, Kind: "open", Rule: o.Name, Pos: o.Pos}
		}
	}
	d := Decision{Outcome: OutcomeFiltered, Kind: "default", Pos: r.Policy.Default.Pos}
	if r.Policy.Default.Input == Reject {
		d.Outcome = OutcomeRejected
	}
	return d
}

// OpensAt gives the openings that name a port, whomever they admit, in file
// order. The result must not be changed.
func (r *Ruleset) OpensAt(proto Protocol, port uint16) []*Open {
	var out []*Open
	for _, i := range r.opensAt(proto, port) {
		out = append(out, &r.Policy.Open[i])
	}
	return out
}

func (r *Ruleset) opensAt(proto Protocol, port uint16) []int {
	segs := r.index[proto]
	k := sort.Search(len(segs), func(i int) bool { return segs[i].ports.Hi >= port })
	if k < len(segs) && segs[k].ports.Lo <= port {
		return segs[k].opens
	}
	return nil
}

// admits reports whether an opening that names the packet's port admits it.
func (r *Ruleset) admits(o *Open, p Packet) bool {
	if !o.Family.Has(p.Src.Is4()) {
		return false
	}
	if len(o.Interfaces) > 0 && !matchAny(o.Interfaces, p.In) {
		return false
	}
	if o.From.Any || inRanges(o.From.Ranges, p.Src) {
		return true
	}
	for _, name := range o.From.Sets {
		if inRanges(r.Policy.Set(name).Ranges, p.Src) {
			return true
		}
	}
	return false
}

// essential are the ICMP messages that are always admitted.
func (r *Ruleset) essential(p Packet) bool {
	switch v4 := p.Src.Is4(); {
	case v4 && p.Protocol == IGMP:
		return true
	case v4 && p.Protocol == ICMPv4:
		switch p.ICMPType {
		case icmpUnreachable, icmpTimeExceeded, icmpParameterProblem:
			return true
		}
	case !v4 && p.Protocol == ICMPv6:
		switch p.ICMPType {
		case icmp6Unreachable, icmp6PacketTooBig, icmp6TimeExceeded, icmp6ParameterProblem:
			return true
		case icmp6RouterSolicit, icmp6RouterAdvert, icmp6NeighbourSolicit, icmp6NeighbourAdvert, icmp6Redirect:
			return p.HopLimit == 255
		case icmp6MLDQuery, icmp6MLDReport, icmp6MLDDone, icmp6MLD2Report:
			return linkLocal6.Contains(p.Src)
		}
	}
	return false
}

func (r *Ruleset) dhcpReply(p Packet) bool {
	d := r.Policy.DHCP
	if !d.Client || p.Protocol != UDP || (len(d.Interfaces) > 0 && !matchAny(d.Interfaces, p.In)) {
		return false
	}
	if p.Src.Is4() {
		return p.SrcPort == 67 && p.DstPort == 68
	}
	return p.SrcPort == 547 && p.DstPort == 546 && linkLocal6.Contains(p.Src) && linkLocal6.Contains(p.Dst)
}

func isEcho(p Packet) bool {
	if p.Src.Is4() {
		return p.Protocol == ICMPv4 && p.ICMPType == icmpEchoRequest
	}
	return p.Protocol == ICMPv6 && p.ICMPType == icmp6EchoRequest
}

func fromLoopback(a netip.Addr) bool { return loopback4.Contains(a) || loopback6.Contains(a) }

func matchAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return MatchInterface(p, name) })
}

// inRanges searches ranges as [Source.Ranges] keeps them.
func inRanges(ranges []AddrRange, a netip.Addr) bool {
	k := sort.Search(len(ranges), func(i int) bool { return ranges[i].Hi.Compare(a) >= 0 })
	return k < len(ranges) && ranges[k].Contains(a)
}
