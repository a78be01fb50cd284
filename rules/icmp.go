package rules

import "net/netip"

// ICMP types (https://www.iana.org/assignments/icmp-parameters).
const (
	icmpUnreachable      = 3
	icmpEchoRequest      = 8
	icmpTimeExceeded     = 11
	icmpParameterProblem = 12
)

// ICMPv6 types (https://www.iana.org/assignments/icmpv6-parameters).
const (
	icmp6Unreachable      = 1
	icmp6PacketTooBig     = 2
	icmp6TimeExceeded     = 3
	icmp6ParameterProblem = 4
	icmp6EchoRequest      = 128
	icmp6MLDQuery         = 130
	icmp6MLDReport        = 131
	icmp6MLDDone          = 132
	icmp6RouterSolicit    = 133
	icmp6RouterAdvert     = 134
	icmp6NeighbourSolicit = 135
	icmp6NeighbourAdvert  = 136
	icmp6Redirect         = 137
	icmp6MLD2Report       = 143
)

// Prefixes that mean the same on every host (RFC 1122 3.2.1.3, RFC 4291 2.4).
var (
	loopback4  = netip.MustParsePrefix("127.0.0.0/8")
	loopback6  = netip.MustParsePrefix("::1/128")
	linkLocal6 = netip.MustParsePrefix("fe80::/10")
)
