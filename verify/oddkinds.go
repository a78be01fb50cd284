package verify

// The table of odd probes: what the sweep, which sends SYNs and empty datagrams
// from one port, would never notice.

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// oddPlace is where a kind goes.
type oddPlace uint8

const (
	toHost      oddPlace = iota // an address of the host
	toBroadcast                 // 255.255.255.255
	toMulticast                 // 224.0.0.1 or ff02::1, which every host listens to
)

// oddKind is one way to knock. The zero value of a field is the usual case.
type oddKind struct {
	name   string
	level  int // of --thorough, from which on it is sent; 0 means 1
	only   rules.Family
	proto  rules.Protocol
	protos []rules.Protocol // instead of proto, where there are no ports
	sport  uint16           // 0: one of its own
	port0  bool             // to port 0
	icmp   uint8            // the type
	flow   rules.Flow       // what conntrack makes of it
	quiet  bool             // an open port may be silent to it, or busy with another kind from the same port
	plain  bool             // what the sweep sends too, so that it goes elsewhere only
	reload bool             // sent while the ruleset is loaded again
	pieces bool             // sent as fragments
	early  bool             // the stack refuses it before any rule, or witness, sees it
	place  oddPlace
	frames func(x *oddProbe) [][]byte
}

// hasPorts says that the kind goes to a sample of ports.
func (k *oddKind) hasPorts() bool { return !k.port0 && k.icmp == 0 && k.protos == nil }

// oddKinds lists every kind. The names are read behind "answer to".
func oddKinds() []oddKind {
	tcp := func(flags uint8) func(x *oddProbe) [][]byte {
		return func(x *oddProbe) [][]byte { return x.plain(x.oddTCP(flags, nil)) }
	}
	udp := func(x *oddProbe) [][]byte { return x.plain(x.oddUDP(rules.UDP, nil)) }
	const xmas = flagFIN | flagPSH | flagURG

	// Flags. What conntrack thinks of each stands in tcp_valid_flags and
	// tcp_conntracks of nf_conntrack_proto_tcp.c.
	kinds := []oddKind{
		{name: "ack", proto: rules.TCP, frames: tcp(flagACK)},
		{name: "fin", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(flagFIN)},
		{name: "null", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(0)},
		{name: "xmas", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(xmas)},
		{name: "maimon (fin/ack)", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(flagFIN | flagACK)},
		{name: "syn/fin", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(flagSYN | flagFIN)},
		{name: "syn-ack", proto: rules.TCP, flow: rules.InvalidFlow, frames: tcp(flagSYN | flagACK)},
		{name: "syn/urg/psh", proto: rules.TCP, frames: tcp(flagSYN | flagURG | flagPSH)},
		{name: "syn with ecn", proto: rules.TCP, frames: tcp(flagSYN | flagECE | flagCWR)},
		{name: "syn with data", proto: rules.TCP, frames: func(x *oddProbe) [][]byte {
			return x.plain(x.oddTCP(flagSYN, []byte("GET / \r\n")))
		}},
		{name: "xmas from port 53", proto: rules.TCP, sport: 53, flow: rules.InvalidFlow, frames: tcp(xmas)},
		{name: "syn to port 0", proto: rules.TCP, port0: true, frames: tcp(flagSYN)},
		{name: "datagram to port 0", proto: rules.UDP, port0: true, frames: udp},
	}
	// Source ports that careless rules take for an answer.
	for _, p := range []uint16{20, 53, 67, 80, 88, 123, 443, 500} {
		kinds = append(kinds, oddKind{name: fmt.Sprintf("syn from port %d", p), proto: rules.TCP, sport: p, frames: tcp(flagSYN)})
	}
	for _, p := range []uint16{20, 53, 80, 443} {
		kinds = append(kinds, oddKind{name: fmt.Sprintf("ack from port %d", p), proto: rules.TCP, sport: p, quiet: true, frames: tcp(flagACK)})
	}
	for _, p := range []uint16{53, 67, 68, 88, 123, 137, 500, 547, 1900, 4500, 5353} {
		kinds = append(kinds, oddKind{name: fmt.Sprintf("datagram from port %d", p), proto: rules.UDP, sport: p, frames: udp})
	}

	// Fragments: within the TCP header, where no rule sees flags in the first nor
	// ports in the last, and behind it.
	const data = "sixteen bytes or" + "so many again..."
	fragmented := func(l4 func(x *oddProbe) []byte, cut int) func(x *oddProbe) [][]byte {
		return func(x *oddProbe) [][]byte {
			return x.fragments(l4(x), cut, true)
		}
	}
	syn := func(x *oddProbe) []byte { return x.oddTCP(flagSYN, nil) }
	full := func(x *oddProbe) []byte { return x.oddTCP(flagSYN, []byte(data)) }
	datagram := func(x *oddProbe) []byte { return x.oddUDP(rules.UDP, []byte(data)) }
	kinds = append(kinds,
		oddKind{name: "syn cut within its header", proto: rules.TCP, pieces: true, quiet: true, frames: fragmented(syn, 8)},
		oddKind{name: "fragmented syn", proto: rules.TCP, pieces: true, frames: fragmented(full, 24)},
		oddKind{name: "fragmented datagram", proto: rules.UDP, pieces: true, frames: fragmented(datagram, 16)},
		oddKind{name: "lone first fragment", level: 2, proto: rules.TCP, pieces: true, quiet: true, frames: func(x *oddProbe) [][]byte {
			return x.fragments(x.oddTCP(flagSYN, []byte(data)), 24, false)
		}},
		oddKind{name: "atomic fragment", only: rules.IPv6, proto: rules.TCP, pieces: true, frames: func(x *oddProbe) [][]byte {
			return x.behind(x.oddTCP(flagSYN, nil), atomic6())
		}},
	)

	// IP options (RFC 791 section 3.1, RFC 2113).
	for _, o := range []struct {
		name  string
		quiet bool
		bytes []byte
	}{
		{"record route", false, []byte{7, 7, 4, 0, 0, 0, 0, 0}},
		{"ip timestamp", false, []byte{68, 8, 5, 0, 0, 0, 0, 0}},
		{"router alert", false, []byte{148, 4, 0, 0}},
		{"loose source route", true, []byte{131, 7, 8, 0, 0, 0, 0, 0}}, // hosts refuse it (accept_source_route)
		{"malformed ip option", true, []byte{7, 40, 4, 0}},
	} {
		kinds = append(kinds, oddKind{name: "syn with " + o.name, only: rules.IPv4, proto: rules.TCP, quiet: o.quiet, frames: func(x *oddProbe) [][]byte {
			return [][]byte{x.ipv4(slices.Clone(o.bytes), 0x4000, x.oddTCP(flagSYN, nil))}
		}})
	}
	kinds = append(kinds, oddKind{name: "datagram with record route", only: rules.IPv4, proto: rules.UDP, frames: func(x *oddProbe) [][]byte {
		return [][]byte{x.ipv4([]byte{7, 7, 4, 0, 0, 0, 0, 0}, 0x4000, x.oddUDP(rules.UDP, nil))}
	}})

	// Extension headers (RFC 8200 section 4).
	for _, h := range []struct {
		name    string
		refused bool // by the stack, before any rule or behind all of them
		headers []oddHeader
	}{
		{"hop-by-hop options", false, []oddHeader{padding(unix.IPPROTO_HOPOPTS)}},
		{"destination options", false, []oddHeader{padding(unix.IPPROTO_DSTOPTS)}},
		{"a routing header", false, []oddHeader{routing()}},
		{"four extension headers", false, []oddHeader{padding(unix.IPPROTO_HOPOPTS), padding(unix.IPPROTO_DSTOPTS), routing(), padding(unix.IPPROTO_DSTOPTS)}},
		{"an unknown hop-by-hop option", true, []oddHeader{unknownOption(unix.IPPROTO_HOPOPTS)}},
		{"an unknown destination option", true, []oddHeader{unknownOption(unix.IPPROTO_DSTOPTS)}},
	} {
		k := oddKind{name: "syn behind " + h.name, only: rules.IPv6, proto: rules.TCP, quiet: h.refused, frames: func(x *oddProbe) [][]byte {
			return x.behind(x.oddTCP(flagSYN, nil), h.headers...)
		}}
		k.early = h.refused && h.headers[0].kind == unix.IPPROTO_HOPOPTS
		kinds = append(kinds, k)
	}
	kinds = append(kinds, oddKind{name: "datagram behind destination options", only: rules.IPv6, proto: rules.UDP, frames: func(x *oddProbe) [][]byte {
		return x.behind(x.oddUDP(rules.UDP, nil), padding(unix.IPPROTO_DSTOPTS))
	}})

	// Other protocols.
	kinds = append(kinds,
		oddKind{name: "sctp init", proto: rules.SCTP, frames: func(x *oddProbe) [][]byte { return x.plain(x.oddSCTP()) }},
		oddKind{name: "udp-lite datagram", proto: protoUDPLite, frames: func(x *oddProbe) [][]byte { return x.plain(x.oddUDP(protoUDPLite, nil)) }},
		oddKind{name: "dccp request", proto: protoDCCP, frames: func(x *oddProbe) [][]byte { return x.plain(x.oddDCCP()) }},
		oddKind{name: "packet of another protocol", protos: rawProtocols(), frames: func(x *oddProbe) [][]byte {
			return x.plain(make([]byte, 16))
		}},
	)

	// ICMP.
	for _, q := range []struct {
		name string
		only rules.Family
		typ  uint8
	}{
		{"echo request", rules.IPv4, icmp4EchoRequest},
		{"timestamp request", rules.IPv4, icmp4Timestamp},
		{"information request", rules.IPv4, icmp4Information},
		{"address mask request", rules.IPv4, icmp4Mask},
		{"echo request", rules.IPv6, icmp6EchoRequest},
		{"node information query", rules.IPv6, icmp6NodeInfo},
	} {
		proto := rules.ICMPv4
		if q.only == rules.IPv6 {
			proto = rules.ICMPv6
		}
		kinds = append(kinds, oddKind{name: q.name, only: q.only, proto: proto, icmp: q.typ, quiet: true, frames: func(x *oddProbe) [][]byte {
			return x.plain(x.oddICMP(x.proto, q.typ))
		}})
	}
	kinds = append(kinds,
		oddKind{name: "echo request to multicast", only: rules.IPv6, proto: rules.ICMPv6, icmp: icmp6EchoRequest, quiet: true, place: toMulticast,
			frames: func(x *oddProbe) [][]byte { return x.plain(x.oddICMP(x.proto, icmp6EchoRequest)) }},
		oddKind{name: "echo request to broadcast", only: rules.IPv4, proto: rules.ICMPv4, icmp: icmp4EchoRequest, quiet: true, place: toBroadcast,
			frames: func(x *oddProbe) [][]byte { return x.plain(x.oddICMP(x.proto, icmp4EchoRequest)) }},
		oddKind{name: "datagram to broadcast", only: rules.IPv4, proto: rules.UDP, quiet: true, place: toBroadcast, frames: udp},
		oddKind{name: "datagram to multicast", proto: rules.UDP, quiet: true, place: toMulticast, frames: udp},
	)

	// A plain knock, where the sweep does not come by: on further addresses, and
	// while the ruleset changes.
	return append(kinds,
		oddKind{name: "syn", proto: rules.TCP, plain: true, frames: tcp(flagSYN)},
		oddKind{name: "datagram", proto: rules.UDP, plain: true, frames: udp},
		oddKind{name: "syn across a reload", proto: rules.TCP, reload: true, frames: tcp(flagSYN)},
		oddKind{name: "datagram across a reload", proto: rules.UDP, reload: true, frames: udp},
	)
}

// rawProtocols are all that have no kind of their own.
func rawProtocols() []rules.Protocol {
	var out []rules.Protocol
	for n := range 256 {
		switch p := rules.Protocol(n); p {
		case rules.TCP, rules.UDP, rules.ICMPv4, rules.ICMPv6, rules.IGMP, rules.SCTP, protoUDPLite, protoDCCP:
		default:
			out = append(out, p)
		}
	}
	return out
}

// extends reports whether the number stands for a header that IPv6 steps over,
// or for none: no packet carries it as its protocol there.
func extends(p rules.Protocol) bool {
	switch p {
	case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_DSTOPTS,
		unix.IPPROTO_AH, unix.IPPROTO_NONE, unix.IPPROTO_MH, 139, 140: // HIP, Shim6
		return true
	}
	return false
}
