package rules

import (
	"cmp"
	"math/bits"
	"net/netip"
	"time"
)

// TableName is the one table Deadlight owns, in family inet.
const TableName = "deadlight"

// Ruleset is a compiled policy: the kernel's table and the oracle over it. Two
// equal policies compile to equal Rulesets on every machine.
type Ruleset struct {
	Policy *Policy
	Table  Table

	opens, blocks portIndex // for Decide
}

// Table is a table of family inet as the kernel shall hold it.
type Table struct {
	Name     string
	Comment  string
	Counters []string // named counters, sorted
	Limits   []Limit  // named limits, in file order
	Sets     []Set
	Chains   []Chain // base chains first, then in order of use
}

// SetType is the type of a set's key.
type SetType uint8

// The key types in use, by their nft names.
const (
	TypePort     SetType = iota // inet_service
	TypeIPv4                    // ipv4_addr
	TypeIPv6                    // ipv6_addr
	TypeIfname                  // ifname
	TypeICMP                    // icmp_type
	TypeICMPv6                  // icmpv6_type
	TypeFibAddr                 // fib_addrtype
	TypeProtocol                // inet_proto
	TypeNfproto                 // nf_proto
	TypeKnock                   // inet_proto . inet_service
	TypeKnock4                  // ipv4_addr . inet_proto . inet_service
	TypeKnock6                  // ipv6_addr . inet_proto . inet_service
)

// String gives the nft name of the type.
func (t SetType) String() string {
	return [...]string{"inet_service", "ipv4_addr", "ipv6_addr", "ifname", "icmp_type", "icmpv6_type", "fib_addrtype", "inet_proto", "nf_proto",
		"inet_proto . inet_service", "ipv4_addr . inet_proto . inet_service", "ipv6_addr . inet_proto . inet_service"}[t]
}

// Set is a named set, or a verdict map when Targets is not nil. Just one of
// Ports, Addrs, Bans, Names and Codes holds its elements, ascending and disjoint; a
// meter has none, the kernel fills it.
type Set struct {
	Name     string
	Type     SetType
	Interval bool        // an element may span more than one key
	Ports    []PortRange // TypePort
	Addrs    AddrRanges  // TypeIPv4, TypeIPv6; those of the Part
	Part     Part
	Names    []string // TypeIfname; a * at the end makes a prefix
	Codes    []uint32 // TypeICMP, TypeICMPv6, TypeFibAddr, TypeProtocol, TypeNfproto
	Targets  []string // of a verdict map: the chain each element jumps to
	// Bans are elements of TypeIPv4 or TypeIPv6 of which each vanishes at a time of its
	// own. Not nil: the set is for such, and they may come and go in place.
	Bans []Ban
	// Until is when the elements vanish by themselves; zero: never.
	Until time.Time
	// Meter is a set that packets fill, of at most MeterSize sources or, if it is
	// not 0, Most, each forgotten when it was not seen for MeterTimeout (0: never by
	// time).
	Meter        bool
	Most         int
	MeterTimeout time.Duration

	list int // how many ranges the list has that Addrs is a part of
}

// Part says what of a list a set holds: a long one is split, the prefixes of a
// length that many have into a set each, looked up by hash once the packet's
// address is masked, and all others into a set of ranges. A part above 0 is the
// length of its prefixes.
type Part int16

// The other parts.
const (
	Whole Part = 0
	Wide  Part = -1 // the ranges that are in no set of prefixes
)

// OfList counts the ranges of the list that Addrs, ranges of it, are a part of.
func (s *Set) OfList() int { return max(s.list, s.Addrs.Len()) }

// MeterSize is how many sources a meter holds. A full one admits nobody new.
const MeterSize = 65536

// Limit is a named limit, which keeps its state across a reload.
type Limit struct {
	Name string
	Rate Rate
}

// Len counts the elements.
func (s *Set) Len() int {
	return len(s.Ports) + s.Addrs.Len() + len(s.Bans) + len(s.Names) + len(s.Codes)
}

// sizedFrom is the number of elements from which a hash set declares its size.
const sizedFrom = 1024

// Size is the declared size: that of a meter, or of a large hash set, which the
// kernel then allocates once instead of growing it; 0 leaves it open. It has room
// for an eighth more and is a power of two, so that a list that changes a little
// keeps the definition of its set and elements can come and go in place.
func (s *Set) Size() int {
	if s.Meter {
		return cmp.Or(s.Most, MeterSize)
	}
	if n := s.Len(); !s.Interval && s.Bans == nil && n >= sizedFrom {
		return 1 << bits.Len(uint(n+n/8-1))
	}
	return 0
}

// Hook is a netfilter hook of family inet (uapi/linux/netfilter.h).
type Hook uint8

// The hooks in use.
const (
	Prerouting Hook = iota
	Input
	Forward
	Output
)

// String gives the nft name of the hook.
func (h Hook) String() string { return [...]string{"prerouting", "input", "forward", "output"}[h] }

// Base makes a chain a base chain of type filter.
type Base struct {
	Hook     Hook
	Priority int  // lower runs earlier
	Accept   bool // the chain's policy; false is drop
}

// Chain is a chain with its rules in order.
type Chain struct {
	Name  string
	Base  *Base // nil: only jumped to
	Rules []Rule
}

// Rule is one line of a chain.
type Rule struct {
	Comment string // kind and policy name: "open ssh"
	Exprs   []Expr // matches, then statements
}

// Expr is one part of a rule: [Match], [MatchSet], [VerdictMap], [MeterAdd], [Tally],
// [WithinLimit], [WithinRate], [LogPacket], [Count], [RejectWith] or [Verdict].
type Expr interface{ nft() string }

// Field is what a match looks at.
type Field uint8

// The fields in use, by their nft names. Those of a protocol or family imply
// the test for it, as in nft.
const (
	MetaIifname        Field = iota // meta iifname
	MetaNfproto                     // meta nfproto
	MetaL4proto                     // meta l4proto
	IPSaddr                         // ip saddr
	IPDaddr                         // ip daddr
	IP6Saddr                        // ip6 saddr
	IP6Daddr                        // ip6 daddr
	IP6Hoplimit                     // ip6 hoplimit
	TCPDport                        // tcp dport
	UDPSport                        // udp sport
	UDPDport                        // udp dport
	SCTPDport                       // sctp dport
	ICMPTypeField                   // icmp type
	ICMPCodeField                   // icmp code
	ICMPv6TypeField                 // icmpv6 type
	ICMPv6CodeField                 // icmpv6 code
	CtState                         // ct state
	CtStatus                        // ct status
	CtDirection                     // ct direction
	CtOriginalProtoDst              // ct original proto-dst
	FibDaddrType                    // fib daddr type
	FibDaddrOifname                 // fib daddr oifname
	MetaOifname                     // oifname
	MetaSkuid                       // meta skuid
	MetaSkgid                       // meta skgid
	TCPFlags                        // tcp flags
	THDport                         // th dport: of any protocol with ports
	CtOriginalIPDaddr               // ct original ip daddr
	CtOriginalIP6Daddr              // ct original ip6 daddr
)

// String gives the nft name of the field.
func (f Field) String() string {
	return [...]string{
		"iifname", "meta nfproto", "meta l4proto", "ip saddr", "ip daddr", "ip6 saddr", "ip6 daddr", "ip6 hoplimit",
		"tcp dport", "udp sport", "udp dport", "sctp dport", "icmp type", "icmp code", "icmpv6 type", "icmpv6 code",
		"ct state", "ct status", "ct direction", "ct original proto-dst", "fib daddr type", "fib daddr oifname",
		"oifname", "meta skuid", "meta skgid", "tcp flags", "th dport", "ct original ip daddr", "ct original ip6 daddr",
	}[f]
}

// NeedsFamily gives the family a field exists in, or Both.
func (f Field) NeedsFamily() Family {
	switch f {
	case IPSaddr, IPDaddr:
		return IPv4
	case IP6Saddr, IP6Daddr, IP6Hoplimit:
		return IPv6
	}
	return Both
}

// NeedsProtocol gives the transport protocol a field exists in, or 0.
func (f Field) NeedsProtocol() Protocol {
	switch f {
	case TCPDport, TCPFlags:
		return TCP
	case UDPSport, UDPDport:
		return UDP
	case SCTPDport:
		return SCTP
	case ICMPTypeField, ICMPCodeField:
		return ICMPv4
	case ICMPv6TypeField, ICMPv6CodeField:
		return ICMPv6
	}
	return 0
}

// Bits of CtState (NF_CT_STATE_BIT, uapi/linux/netfilter/nf_conntrack_common.h)
// and CtStatus (enum ip_conntrack_status).
const (
	StateInvalid     = 1 << 0
	StateEstablished = 1 << 1
	StateRelated     = 1 << 2
	StateNew         = 1 << 3
	StateUntracked   = 1 << 6
	StatusDNAT       = 1 << 5
)

// Values of MetaNfproto, CtDirection and FibDaddrType.
const (
	NfprotoIPv4   = 2
	NfprotoIPv6   = 10
	DirOriginal   = 0
	DirReply      = 1
	AddrUnicast   = 1
	AddrLocal     = 2
	AddrBroadcast = 3
	AddrAnycast   = 4
	AddrMulticast = 5
)

// Bits of TCPFlags (RFC 9293 3.1), and those that tell how a segment stands in a
// connection.
const (
	FlagFIN   = 1 << 0
	FlagSYN   = 1 << 1
	FlagRST   = 1 << 2
	FlagACK   = 1 << 4
	FlagsMask = FlagFIN | FlagSYN | FlagRST | FlagACK
)

// Match compares a field with a number, with the bits of a mask (CtState,
// CtStatus: any of them is set), with an interface name or with a prefix. Of
// TCPFlags it compares those of FlagsMask.
type Match struct {
	Field  Field
	Number uint32
	Name   string       // MetaIifname, MetaOifname, FibDaddrOifname; the user or group of MetaSkuid, MetaSkgid
	Prefix netip.Prefix // the address fields
	Not    bool         // MetaOifname, TCPFlags: anything else
}

// MatchSet looks a field up in a named set.
type MatchSet struct {
	Field Field
	Set   string
	Not   bool
	// Bits is the length of the prefix of an address that is looked up; 0: all of it.
	Bits int
}

// VerdictMap looks a field up in a named verdict map and does what it says.
type VerdictMap struct {
	Field Field
	Map   string
}

// Count adds to a named counter.
type Count struct{ Counter string }

// MeterAdd notes the source of a packet in a meter and matches while that source
// keeps within a rate of packets, or within a number of concurrent connections.
// IPv6 sources count by /64. It does not match when the meter is full.
type MeterAdd struct {
	Set         string
	Field       Field // IPSaddr or IP6Saddr
	Rate        *Rate
	Connections int // used when Rate is nil
}

// Tally counts a packet in a set, under the concatenation of some of its fields. It
// does not match when the set is full.
type Tally struct {
	Set string
	Key []Field
}

// WithinLimit matches while a named limit is kept.
type WithinLimit struct{ Limit string }

// WithinRate matches while a rate is kept; its state ends with the rule.
type WithinRate struct{ Rate Rate }

// LogPacket writes a line to the kernel log, or to an nflog group.
type LogPacket struct {
	Prefix string
	Group  *uint16
}

// RejectWith answers the packet: with a TCP reset, or else with the ICMP error
// "administratively prohibited".
type RejectWith struct{ TCPReset bool }

// VerdictKind is what a rule decides.
type VerdictKind uint8

// The verdicts.
const (
	VerdictAccept VerdictKind = iota
	VerdictDrop
	VerdictReturn
	VerdictJump
	VerdictGoto
)

// Verdict ends a rule.
type Verdict struct {
	Kind  VerdictKind
	Chain string // of VerdictJump and VerdictGoto
}
