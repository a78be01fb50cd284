package verify

// The frames of the odd probes, and the answers to them. They are few, so these
// are plain functions; those of the sweep are in frames.go.

import (
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

const (
	flagFIN = 0x01
	flagPSH = 0x08
	flagURG = 0x20
	flagECE = 0x40
	flagCWR = 0x80

	icmp4Timestamp        = 13
	icmp4TimestampReply   = 14
	icmp4Information      = 15
	icmp4InformationReply = 16
	icmp4Mask             = 17
	icmp4MaskReply        = 18
	icmp6NodeInfo         = 139
	icmp6NodeInfoReply    = 140
	nodeName              = 2 // the question: RFC 4620 section 5

	protoDCCP    rules.Protocol = 33
	protoUDPLite rules.Protocol = 136

	sctpInitAck = 2
	sctpAbort   = 6

	// Offsets in the field that an IPv4 header has of fragments.
	moreFragments = 0x2000
	fragmentUnit  = 8
)

// oddTCP makes a segment. The number stands as sequence number and, where ACK is
// set, as acknowledgement: whatever comes back names it.
func (x *oddProbe) oddTCP(flags uint8, payload []byte) []byte {
	n := tcpLen
	if flags&flagSYN != 0 {
		n += mssLen
	}
	h := make([]byte, n, n+len(payload))
	binary.BigEndian.PutUint16(h, x.sport)
	binary.BigEndian.PutUint16(h[2:], x.dport)
	binary.BigEndian.PutUint32(h[4:], x.number)
	if flags&flagACK != 0 {
		binary.BigEndian.PutUint32(h[8:], x.number)
	}
	h[12] = byte(n / 4 << 4)
	h[tcpFlags] = flags
	binary.BigEndian.PutUint16(h[14:], 1024) // window
	if n > tcpLen {
		copy(h[tcpLen:], []byte{2, mssLen, 0x05, 0xb4})
	}
	h = append(h, payload...)
	x.checksum(rules.TCP, h, 16)
	return h
}

// oddUDP makes a datagram, of UDP or of UDP-Lite (RFC 3828), which differ only in
// what the length field says: here the same.
func (x *oddProbe) oddUDP(proto rules.Protocol, payload []byte) []byte {
	h := make([]byte, udpLen, udpLen+len(payload))
	binary.BigEndian.PutUint16(h, x.sport)
	binary.BigEndian.PutUint16(h[2:], x.dport)
	binary.BigEndian.PutUint16(h[4:], uint16(udpLen+len(payload)))
	h = append(h, payload...)
	x.checksum(proto, h, 6)
	return h
}

// oddSCTP makes an INIT chunk (RFC 9260 section 3.3.2).
func (x *oddProbe) oddSCTP() []byte {
	h := make([]byte, 12+20)
	binary.BigEndian.PutUint16(h, x.sport)
	binary.BigEndian.PutUint16(h[2:], x.dport)
	c := h[12:]
	c[0], c[3] = 1, 20
	binary.BigEndian.PutUint32(c[4:], x.number|1) // initiate tag
	binary.BigEndian.PutUint32(c[8:], 65536)      // window
	binary.BigEndian.PutUint16(c[12:], 1)         // streams out
	binary.BigEndian.PutUint16(c[14:], 1)         // streams in
	binary.BigEndian.PutUint32(c[16:], x.number)  // initial TSN
	// RFC 9260 appendix A: the one checksum of the Internet that is sent low byte first.
	binary.LittleEndian.PutUint32(h[8:], crc32.Checksum(h, crc32.MakeTable(crc32.Castagnoli)))
	return h
}

// oddDCCP makes a DCCP-Request (RFC 4340 section 5.1).
func (x *oddProbe) oddDCCP() []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h, x.sport)
	binary.BigEndian.PutUint16(h[2:], x.dport)
	h[4] = 20 / 4
	h[8] = 0<<1 | 1 // a request, with a long sequence number
	binary.BigEndian.PutUint32(h[12:], x.number)
	x.checksum(protoDCCP, h, 6)
	return h
}

// oddICMP makes a query whose identifier is the source port.
func (x *oddProbe) oddICMP(proto rules.Protocol, typ uint8) []byte {
	h := make([]byte, 20) // the length of a timestamp, the longest but one
	h[0] = typ
	binary.BigEndian.PutUint16(h[4:], x.sport)
	binary.BigEndian.PutUint16(h[6:], uint16(x.number))
	switch {
	case proto == rules.ICMPv6 && typ == icmp6NodeInfo:
		// RFC 4620: a query for the node's name, told by its nonce.
		h = make([]byte, 16+16)
		h[0] = typ
		binary.BigEndian.PutUint16(h[4:], nodeName)
		binary.BigEndian.PutUint16(h[8:], x.sport)
		binary.BigEndian.PutUint32(h[10:], x.number)
		copy(h[16:], x.dst.AsSlice())
	case typ == icmp4Mask:
		h = h[:12]
	}
	x.checksum(proto, h, 2)
	return h
}

// checksum fills in a checksum (RFC 1071) at offset at.
func (x *oddProbe) checksum(proto rules.Protocol, l4 []byte, at int) {
	l4[at], l4[at+1] = 0, 0
	s := uint32(0)
	if proto != rules.ICMPv4 { // the only one without a pseudo header
		s = sum16(sum16(uint32(proto)+uint32(len(l4)), x.src.AsSlice()), x.dst.AsSlice())
	}
	c := fold16(sum16(s, l4))
	if c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(l4[at:], c)
}

// plain wraps a transport header in an IP header and an Ethernet header.
func (x *oddProbe) plain(l4 []byte) [][]byte {
	if x.dst.Is4() {
		return [][]byte{x.ipv4(nil, 0x4000, l4)}
	}
	return [][]byte{x.ipv6(uint8(x.proto), l4)}
}

// ipv4 writes a packet with options, which are padded, and a field of fragments. Its
// identification is the probe's mark, the same in every fragment.
func (x *oddProbe) ipv4(options []byte, fragment uint16, payload []byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, 0)
	}
	ihl := ipv4Len + len(options)
	ip := make([]byte, ihl, ihl+len(payload))
	ip[0] = 4<<4 | byte(ihl/4)
	binary.BigEndian.PutUint16(ip[2:], uint16(ihl+len(payload)))
	binary.BigEndian.PutUint16(ip[4:], x.tag)
	binary.BigEndian.PutUint16(ip[6:], fragment)
	ip[8], ip[9] = probeTTL, byte(x.proto)
	copy(ip[12:], x.src.AsSlice())
	copy(ip[16:], x.dst.AsSlice())
	copy(ip[20:], options)
	binary.BigEndian.PutUint16(ip[10:], fold16(sum16(0, ip)))
	return x.ethernet(unix.ETH_P_IP, append(ip, payload...))
}

// ipv6 writes a packet whose payload begins with the header that next names. Its flow
// label is the probe's mark.
func (x *oddProbe) ipv6(next uint8, payload []byte) []byte {
	ip := make([]byte, ipv6Len, ipv6Len+len(payload))
	ip[0] = 6 << 4
	binary.BigEndian.PutUint16(ip[2:], x.tag)
	binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
	ip[6], ip[7] = next, probeTTL
	copy(ip[8:], x.src.AsSlice())
	copy(ip[24:], x.dst.AsSlice())
	return x.ethernet(unix.ETH_P_IPV6, append(ip, payload...))
}

func (x *oddProbe) ethernet(kind uint16, packet []byte) []byte {
	f := make([]byte, 0, etherLen+len(packet))
	f = append(f, multicastMAC(x.dst, x.link.Dst)...)
	f = append(f, x.link.Src...)
	f = binary.BigEndian.AppendUint16(f, kind)
	return append(f, packet...)
}

// multicastMAC is where frames to many go (RFC 1112 section 6.4, RFC 2464
// section 7), else the given address.
func multicastMAC(dst netip.Addr, unicast net.HardwareAddr) net.HardwareAddr {
	switch b := dst.AsSlice(); {
	case dst == broadcast4():
		return net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	case dst.Is4() && dst.IsMulticast():
		return net.HardwareAddr{0x01, 0x00, 0x5e, b[1] & 0x7f, b[2], b[3]}
	case dst.IsMulticast():
		return net.HardwareAddr{0x33, 0x33, b[12], b[13], b[14], b[15]}
	}
	return unicast
}

func broadcast4() netip.Addr { return netip.AddrFrom4([4]byte{255, 255, 255, 255}) }

// fragments cuts a transport packet behind so many bytes. Without last, only the
// first part is made.
func (x *oddProbe) fragments(l4 []byte, cut int, last bool) [][]byte {
	if x.dst.Is4() {
		out := [][]byte{x.ipv4(nil, moreFragments, l4[:cut])}
		if last {
			out = append(out, x.ipv4(nil, uint16(cut/fragmentUnit), l4[cut:]))
		}
		return out
	}
	id := rand.Uint32()
	head := func(offset int, more byte) []byte { // RFC 8200 section 4.5
		h := []byte{byte(x.proto), 0, byte(offset >> 8), byte(offset) | more}
		return binary.BigEndian.AppendUint32(h, id)
	}
	out := [][]byte{x.ipv6(unix.IPPROTO_FRAGMENT, append(head(0, 1), l4[:cut]...))}
	if last {
		out = append(out, x.ipv6(unix.IPPROTO_FRAGMENT, append(head(cut, 0), l4[cut:]...)))
	}
	return out
}

// oddHeader is an extension header of IPv6: its kind and what stands behind the
// next header field.
type oddHeader struct {
	kind uint8
	rest []byte
}

// Extension headers that a host passes over, and an option that it must refuse
// (RFC 8200 section 4.2: the two highest bits).
func padding(kind uint8) oddHeader { return oddHeader{kind, []byte{0, 1, 4, 0, 0, 0, 0}} }
func unknownOption(kind uint8) oddHeader {
	return oddHeader{kind, []byte{0, 0x9e, 4, 0, 0, 0, 0}}
}
func routing() oddHeader { return oddHeader{unix.IPPROTO_ROUTING, []byte{0, 0, 0, 0, 0, 0, 0}} }
func atomic6() oddHeader { return oddHeader{unix.IPPROTO_FRAGMENT, []byte{0, 0, 0, 0, 0, 0, 1}} }

// behind puts extension headers before a transport header.
func (x *oddProbe) behind(l4 []byte, headers ...oddHeader) [][]byte {
	next := uint8(x.proto)
	for i := len(headers) - 1; i >= 0; i-- {
		l4 = append(append([]byte{next}, headers[i].rest...), l4...)
		next = headers[i].kind
	}
	return [][]byte{x.ipv6(next, l4)}
}

// oddReset ends the connection that a SYN-ACK to the probe began.
func (x *oddProbe) oddReset(seq uint32) []byte {
	y := *x
	y.number, y.tag = seq, 0 // it is no probe
	y.proto = rules.TCP
	return y.plain(y.oddTCP(flagRST, nil))[0]
}

// oddReply is a packet that may answer an odd probe, and what it says.
type oddReply struct {
	key         oddKey // of the probe it answers, without number
	seq, ack    uint32 // of TCP, or of the segment that an ICMP error quotes
	from        netip.Addr
	theirs      netip.Addr // whom the probe went to, as far as the answer tells
	synAck      bool
	answer      Answer
	fromAnyHost bool // an ICMP error: who sent it decides what it is worth
}

// parseOddReply reads a packet from its IP header on.
func parseOddReply(b []byte) (r oddReply, ok bool) {
	var to netip.Addr
	proto, l4, ok := parseIP(b, &r.from, &to)
	if !ok {
		return r, false
	}
	r.theirs = r.from
	r.key = oddKey{ours: to, proto: proto}
	ports := func(n int) bool {
		if len(l4) < n {
			return false
		}
		r.key.dport, r.key.sport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		return true
	}
	switch proto {
	case rules.TCP:
		if !ports(tcpLen) {
			return r, false
		}
		r.seq, r.ack = binary.BigEndian.Uint32(l4[4:]), binary.BigEndian.Uint32(l4[8:])
		switch flags := l4[tcpFlags]; {
		case flags&(flagSYN|flagRST) == flagSYN:
			r.answer, r.synAck = Answer{Open, SynAck}, true
		case flags&flagRST != 0:
			r.answer = Answer{Closed, TCPReset}
		default:
			r.answer = Answer{Closed, TCPOther}
		}
		return r, true
	case rules.UDP:
		r.answer = Answer{Open, UDPAnswer}
		return r, ports(udpLen)
	case protoUDPLite, protoDCCP:
		r.answer = Answer{Open, OtherAnswer}
		return r, ports(udpLen)
	case rules.SCTP:
		r.answer = Answer{Open, OtherAnswer}
		if len(l4) > 12 && l4[12] == sctpInitAck {
			r.answer = Answer{Open, SCTPInitAck}
		} else if len(l4) > 12 && l4[12] == sctpAbort {
			r.answer = Answer{Closed, SCTPAbort}
		}
		return r, ports(12)
	case rules.ICMPv4, rules.ICMPv6:
		return parseOddICMP(r, to.Is6(), l4)
	}
	r.answer = Answer{Open, OtherAnswer}
	return r, true
}

// parseIP steps over an IP header of either version and what extends it.
func parseIP(b []byte, src, dst *netip.Addr) (rules.Protocol, []byte, bool) {
	switch {
	case len(b) > 0 && b[0]>>4 == 4:
		return parseIPv4(b, src, dst)
	case len(b) > 0 && b[0]>>4 == 6:
		return parseIPv6(b, src, dst)
	}
	return 0, nil, false
}

func parseOddICMP(r oddReply, v6 bool, b []byte) (oddReply, bool) {
	if len(b) < icmpLen {
		return r, false
	}
	typ, code := b[0], b[1]
	r.answer = Answer{Open, ICMPReply}
	r.key.sport = binary.BigEndian.Uint16(b[4:])
	switch {
	case v6 && typ == icmp6EchoReply:
		return r, true
	case v6 && typ == icmp6NodeInfoReply:
		if len(b) < 16 {
			return r, false
		}
		r.key.sport = binary.BigEndian.Uint16(b[8:])
		return r, true
	case v6 && typ != icmp6Unreachable && typ != icmp6TooBig && typ != icmp6TimeExceeded && typ != icmp6ParamProblem:
		return r, false
	case v6:
	case typ == icmp4EchoReply, typ == icmp4TimestampReply, typ == icmp4InformationReply, typ == icmp4MaskReply:
		return r, true
	case typ != icmp4Unreachable && typ != icmp4TimeExceeded && typ != icmp4ParamProblem:
		return r, false
	}

	// An error: what it quotes is the probe.
	var ours netip.Addr
	proto, l4, ok := parseIP(b[icmpLen:], &ours, &r.theirs)
	if !ok || ours != r.key.ours {
		return r, false
	}
	r.fromAnyHost = true
	r.key = oddKey{ours: ours, proto: proto}
	switch proto {
	case rules.TCP, rules.UDP, rules.SCTP, protoUDPLite, protoDCCP:
		if len(l4) < 8 {
			return r, false
		}
		r.key.sport, r.key.dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		r.seq = binary.BigEndian.Uint32(l4[4:])
	case rules.ICMPv4, rules.ICMPv6:
		if len(l4) < 8 {
			return r, false
		}
		r.key.sport = binary.BigEndian.Uint16(l4[4:])
		if proto == rules.ICMPv6 && l4[0] == icmp6NodeInfo && len(l4) >= 10 {
			r.key.sport = binary.BigEndian.Uint16(l4[8:])
		}
	}
	reason := icmpReason(v6, typ, code)
	switch {
	case !v6 && typ == icmp4TimeExceeded && code == 1, v6 && typ == icmp6TimeExceeded && code == 1:
		r.answer = Answer{Closed, ReassemblyTime}
	case reason == ProtoUnreachable:
		// The stack has no such protocol: the packet reached it.
		r.answer = Answer{Closed, reason}
	case typ == icmp4ParamProblem && !v6, typ == icmp6ParamProblem && v6:
		r.answer = Answer{Closed, ParameterProblem}
	case reason == PortUnreachable && (proto == rules.UDP || proto == protoUDPLite):
		r.answer = Answer{Closed, reason}
	default:
		r.answer = Answer{Rejected, reason}
	}
	return r, true
}
