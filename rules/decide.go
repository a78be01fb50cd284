package rules

import "net/netip"

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
