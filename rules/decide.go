package rules

import (
	"net/netip"
	"slices"
	"sort"
	"time"
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
	At       time.Time // when; the zero time is before every expiry
}

// Flow is what conntrack knows of a packet's flow.
type Flow uint8

// The flow states that matter to a verdict.
const (
	NewFlow     Flow = iota // first packet
	ReplyFlow               // an answer to what this host began
	RelatedFlow             // an ICMP error or an expected flow of one
	InvalidFlow
	StrangersFlow // a later packet of a flow that the far side began
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
	Kind    string // "open", "block", "echo", "icmp", "dhcp", "established", "loopback", "invalid", "default" ...
	Rule    string // the name of the [open.*] or [block.*], or ""
	Pos     Pos
	// Limited says that the packet is admitted only while its source keeps
	// within a rate or a number of connections.
	Limited bool
	// Observed says that nothing is enforced: Outcome is what would happen, and
	// the packet gets through.
	Observed bool
}

// Decide says what must happen to a packet addressed to this host. It reads the
// policy, not the compiled table, so that the two can be held against each
// other.
func (r *Ruleset) Decide(p Packet) Decision {
	d := r.decide(p)
	d.Observed = r.Policy.Default.Observe && d.Outcome != OutcomeOpen
	return d
}

func (r *Ruleset) decide(p Packet) Decision {
	switch {
	case p.In == "lo":
		return Decision{Outcome: OutcomeOpen, Kind: "loopback"}
	case fromLoopback(p.Src) || fromLoopback(p.Dst):
		return Decision{Outcome: OutcomeFiltered, Kind: "loopback address"}
	case p.Flow == ReplyFlow || p.Flow == RelatedFlow || p.Flow == StrangersFlow && r.Policy.Default.KeepFlows:
		return Decision{Outcome: OutcomeOpen, Kind: "established"}
	case r.essential(p):
		return Decision{Outcome: OutcomeOpen, Kind: "icmp"}
	case p.Flow == InvalidFlow:
		return Decision{Outcome: OutcomeFiltered, Kind: "invalid"}
	case r.dhcpReply(p):
		return Decision{Outcome: OutcomeOpen, Kind: "dhcp", Pos: r.Policy.DHCP.Pos}
	}
	for _, i := range r.blocks.find(p.Protocol, p.DstPort) {
		if b := &r.Policy.Block[i]; r.Matches(&b.Traffic, p) {
			return Decision{Outcome: OutcomeFiltered, Kind: "block", Rule: b.Name, Pos: b.Pos}
		}
	}
	if isEcho(p) && r.Policy.ICMP.Echo {
		return Decision{Outcome: OutcomeOpen, Kind: "echo", Pos: r.Policy.ICMP.Pos, Limited: r.Policy.ICMP.Rate != nil}
	}
	var limited *Open
	for _, i := range r.opens.find(p.Protocol, p.DstPort) {
		o := &r.Policy.Open[i]
		switch {
		case !r.Matches(&o.Traffic, p):
		case o.Limited() && p.Flow == NewFlow:
			if limited == nil {
				limited = o
			}
		default:
			return Decision{Outcome: OutcomeOpen, Kind: "open", Rule: o.Name, Pos: o.Pos}
		}
	}
	if limited != nil {
		return Decision{Outcome: OutcomeOpen, Kind: "open", Rule: limited.Name, Pos: limited.Pos, Limited: true}
	}
	d := Decision{Outcome: OutcomeFiltered, Kind: "default", Pos: r.Policy.Default.Pos}
	if r.Policy.Default.Input == Reject {
		d.Outcome = OutcomeRejected
	}
	return d
}

// Limited reports whether new flows must keep within a rate or a number.
func (o *Open) Limited() bool { return o.Rate != nil || o.Connections > 0 }

// OpensAt gives the openings that name a port, or a protocol without ports,
// whomever they admit, in file order.
func (r *Ruleset) OpensAt(proto Protocol, port uint16) []*Open {
	var out []*Open
	for _, i := range r.opens.find(proto, port) {
		out = append(out, &r.Policy.Open[i])
	}
	return out
}

// Matches reports whether a rule that names the packet's port is about the
// packet: its interface, family, addresses and time.
func (r *Ruleset) Matches(t *Traffic, p Packet) bool {
	return r.Miss(t, p) == ""
}

// Miss names the field of a rule that keeps it from being about a packet whose
// port it names: "expires", "family", "interfaces", "from", "except" or "to"; ""
// when it is about the packet.
func (r *Ruleset) Miss(t *Traffic, p Packet) string {
	switch {
	case !t.Expires.IsZero() && !p.At.Before(t.Expires):
		return "expires"
	case !t.Family.Has(p.Src.Is4()) || !p.Src.Is4() && p.Protocol.isExtension() && !t.Any:
		return "family"
	case len(t.Interfaces) > 0 && !matchAny(t.Interfaces, p.In):
		return "interfaces"
	case !t.To.anywhere() && !r.holds(&t.To, p.Dst):
		return "to"
	case r.holds(&t.Except, p.Src):
		return "except"
	case !t.From.Any && !r.holds(&t.From, p.Src):
		return "from"
	case t.Bans != nil && !lasts(t.Bans, p):
		return "expires"
	}
	return ""
}

// lasts reports whether the ban of a packet's source has not ended.
func lasts(bans []Ban, p Packet) bool {
	k := sort.Search(len(bans), func(i int) bool { return bans[i].Addr.Compare(p.Src) >= 0 })
	return k < len(bans) && bans[k].Addr == p.Src && (bans[k].Expires.IsZero() || p.At.Before(bans[k].Expires))
}

// holds reports whether an address is among those written in place or in a set.
func (r *Ruleset) holds(s *Source, a netip.Addr) bool {
	if inRanges(s.Ranges, a) {
		return true
	}
	for _, name := range s.Sets {
		if r.Policy.Set(name).Ranges.Contains(a) {
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
