package verify

// The frames the engine sends and the answers it reads. Both are hand-written:
// they stand on the hot path, and the parser reads what strangers send.

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

const (
	etherLen = 14
	ipv4Len  = 20
	ipv6Len  = 40
	tcpLen   = 20
	udpLen   = 8
	icmpLen  = 8

	mssLen   = 4  // the MSS option of a SYN; some stacks drop a SYN without it
	probeTTL = 64 // also the hop limit

	// maxFrame holds the longest frame of the engine: an IPv6 SYN with its option.
	maxFrame = etherLen + ipv6Len + tcpLen + mssLen + 2

	tcpFlags = 13 // offset of the flags in a TCP header

	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10

	icmp4EchoReply    = 0
	icmp4Unreachable  = 3
	icmp4EchoRequest  = 8
	icmp4TimeExceeded = 11
	icmp4ParamProblem = 12

	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6ParamProblem = 4
	icmp6EchoRequest  = 128
	icmp6EchoReply    = 129
)

// sum16 adds b to a one's-complement sum (RFC 1071) that is folded later.
func sum16(s uint32, b []byte) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

// fold16 ends a one's-complement sum.
func fold16(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// template is a frame but for its ports and numbers, which cost no more than a
// copy and a few additions to fill in.
type template struct {
	frame []byte
	l4    int    // offset of the transport header
	sum   uint32 // of the pseudo header and the transport header as they stand
}

// newTemplate wraps a transport header and its payload for a path.
func newTemplate(p *Path, proto rules.Protocol, l4 []byte) template {
	src, dst := p.Src.AsSlice(), p.Dst.AsSlice()
	f := make([]byte, 0, maxFrame)
	f = append(f, p.Link.Dst...)
	f = append(f, p.Link.Src...)
	if p.Dst.Is4() {
		f = binary.BigEndian.AppendUint16(f, unix.ETH_P_IP)
		// Don't fragment, and no identification then: RFC 6864 section 4.1.
		ip := []byte{0x45, 0, 0, byte(ipv4Len + len(l4)), 0, 0, 0x40, 0, probeTTL, byte(proto), 0, 0}
		ip = append(append(ip, src...), dst...)
		binary.BigEndian.PutUint16(ip[10:], fold16(sum16(0, ip)))
		f = append(f, ip...)
	} else {
		f = binary.BigEndian.AppendUint16(f, unix.ETH_P_IPV6)
		f = append(f, 0x60, 0, 0, 0, 0, byte(len(l4)), byte(proto), probeTTL)
		f = append(append(f, src...), dst...)
	}
	t := template{l4: len(f), frame: append(f, l4...)}
	if proto != rules.ICMPv4 { // the only one whose checksum has no pseudo header
		t.sum = sum16(sum16(uint32(proto)+uint32(len(l4)), src), dst)
	}
	t.sum = sum16(t.sum, l4)
	return t
}

func synTemplate(p *Path) template {
	h := make([]byte, tcpLen+mssLen)
	h[12] = (tcpLen + mssLen) / 4 << 4
	h[tcpFlags] = flagSYN
	binary.BigEndian.PutUint16(h[14:], 1024) // window
	copy(h[tcpLen:], []byte{2, mssLen, 0x05, 0xb4})
	return newTemplate(p, rules.TCP, h)
}

func rstTemplate(p *Path) template {
	h := make([]byte, tcpLen)
	h[12] = tcpLen / 4 << 4
	h[tcpFlags] = flagRST
	return newTemplate(p, rules.TCP, h)
}

func udpTemplate(p *Path) template {
	h := make([]byte, udpLen)
	h[5] = udpLen
	return newTemplate(p, rules.UDP, h)
}

// echoTemplate carries eight bytes of payload, the first four for the cookie.
func echoTemplate(p *Path) template {
	h := make([]byte, icmpLen+8)
	if p.Dst.Is4() {
		h[0] = icmp4EchoRequest
		return newTemplate(p, rules.ICMPv4, h)
	}
	h[0] = icmp6EchoRequest
	return newTemplate(p, rules.ICMPv6, h)
}

// tcp writes a segment to b and returns the frame's length in bytes.
func (t *template) tcp(b []byte, sport, dport uint16, seq uint32) int {
	n := copy(b, t.frame)
	h := b[t.l4:n]
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dport)
	binary.BigEndian.PutUint32(h[4:], seq)
	binary.BigEndian.PutUint16(h[16:], fold16(t.sum+uint32(sport)+uint32(dport)+seq>>16+seq&0xffff))
	return n
}

// udp writes an empty datagram to b and returns the frame's length in bytes.
func (t *template) udp(b []byte, sport, dport uint16) int {
	n := copy(b, t.frame)
	h := b[t.l4:n]
	binary.BigEndian.PutUint16(h, sport)
	binary.BigEndian.PutUint16(h[2:], dport)
	c := fold16(t.sum + uint32(sport) + uint32(dport))
	if c == 0 {
		c = 0xffff // zero means no checksum, which IPv6 forbids: RFC 8200 section 8.1
	}
	binary.BigEndian.PutUint16(h[6:], c)
	return n
}

// echo writes an echo request to b and returns the frame's length in bytes.
func (t *template) echo(b []byte, id, seq uint16, cookie uint32) int {
	n := copy(b, t.frame)
	h := b[t.l4:n]
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[6:], seq)
	binary.BigEndian.PutUint32(h[8:], cookie)
	binary.BigEndian.PutUint16(h[2:], fold16(t.sum+uint32(id)+uint32(seq)+cookie>>16+cookie&0xffff))
	return n
}

// replyKind tells which fields of a [reply] hold something.
type replyKind uint8

const (
	replyTCP   replyKind = iota // sport, dport, flags, seq, ack
	replyUDP                    // sport, dport
	replyEcho                   // id, number, cookie
	replyError                  // icmpType, icmpCode and the quoted packet
)

// reply is a packet that may answer a probe or a canary. Its quoted part is the
// packet of ours that an ICMP error speaks about.
type reply struct {
	kind         replyKind
	from, to     netip.Addr
	sport, dport uint16
	flags        uint8
	seq, ack     uint32

	id, number uint16
	cookie     uint32

	icmpType, icmpCode           uint8
	quotedSrc, quotedDst         netip.Addr
	quotedProto                  rules.Protocol
	quotedSrcPort, quotedDstPort uint16
	quotedSeq                    uint32 // of TCP; RFC 792 promises eight bytes, so it is always there
}

// parseReply reads a packet from its IP header on. It says false for all that
// cannot answer us; it checks no checksums, since the kernel hands over packets
// of a veth before they are filled in.
func parseReply(b []byte, r *reply) bool {
	if len(b) == 0 {
		return false
	}
	var proto rules.Protocol
	var l4 []byte
	var ok bool
	switch b[0] >> 4 {
	case 4:
		proto, l4, ok = parseIPv4(b, &r.from, &r.to)
	case 6:
		proto, l4, ok = parseIPv6(b, &r.from, &r.to)
	}
	if !ok {
		return false
	}
	switch {
	case proto == rules.TCP:
		if len(l4) < tcpLen {
			return false
		}
		r.kind = replyTCP
		r.sport, r.dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		r.seq, r.ack = binary.BigEndian.Uint32(l4[4:]), binary.BigEndian.Uint32(l4[8:])
		r.flags = l4[tcpFlags]
		return true
	case proto == rules.UDP:
		if len(l4) < udpLen {
			return false
		}
		r.kind = replyUDP
		r.sport, r.dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		return true
	case proto == rules.ICMPv4 && b[0]>>4 == 4, proto == rules.ICMPv6 && b[0]>>4 == 6:
		return parseICMP(proto, l4, r)
	}
	return false
}

// parseIPv4 returns the protocol and the payload, without what an Ethernet
// frame of minimal length has behind it.
func parseIPv4(b []byte, src, dst *netip.Addr) (rules.Protocol, []byte, bool) {
	if len(b) < ipv4Len {
		return 0, nil, false
	}
	ihl := int(b[0]&15) * 4
	if ihl < ipv4Len || len(b) < ihl {
		return 0, nil, false
	}
	if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 { // a later fragment has no header of layer 4
		return 0, nil, false
	}
	if n := int(binary.BigEndian.Uint16(b[2:])); n >= ihl && n < len(b) {
		b = b[:n]
	}
	*src, *dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	return rules.Protocol(b[9]), b[ihl:], true
}

// parseIPv6 steps over the extension headers an answer may carry (RFC 8200
// section 4); ESP and AH are left to their owners.
func parseIPv6(b []byte, src, dst *netip.Addr) (rules.Protocol, []byte, bool) {
	if len(b) < ipv6Len {
		return 0, nil, false
	}
	*src, *dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	next := b[6]
	if n := ipv6Len + int(binary.BigEndian.Uint16(b[4:])); n > ipv6Len && n < len(b) {
		b = b[:n]
	}
	b = b[ipv6Len:]
	for {
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) < 8 {
				return 0, nil, false
			}
			n := int(b[1])*8 + 8
			if len(b) < n {
				return 0, nil, false
			}
			next, b = b[0], b[n:]
		case unix.IPPROTO_FRAGMENT:
			if len(b) < 8 || binary.BigEndian.Uint16(b[2:])&^7 != 0 {
				return 0, nil, false
			}
			next, b = b[0], b[8:]
		default:
			return rules.Protocol(next), b, true
		}
	}
}

func parseICMP(proto rules.Protocol, b []byte, r *reply) bool {
	if len(b) < icmpLen {
		return false
	}
	r.icmpType, r.icmpCode = b[0], b[1]
	if proto == rules.ICMPv4 {
		switch r.icmpType {
		case icmp4EchoReply:
			return parseEcho(b, r)
		case icmp4Unreachable, icmp4TimeExceeded, icmp4ParamProblem:
			return parseQuote(b[icmpLen:], 4, r)
		}
		return false
	}
	switch r.icmpType {
	case icmp6EchoReply:
		return parseEcho(b, r)
	case icmp6Unreachable, icmp6TooBig, icmp6TimeExceeded, icmp6ParamProblem:
		return parseQuote(b[icmpLen:], 6, r)
	}
	return false
}

func parseEcho(b []byte, r *reply) bool {
	if len(b) < icmpLen+4 {
		return false
	}
	r.kind = replyEcho
	r.id, r.number = binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
	r.cookie = binary.BigEndian.Uint32(b[8:])
	return true
}

// parseQuote reads the packet within an ICMP error. All probes are plain, so a
// quoted one has no extension headers either.
func parseQuote(b []byte, version byte, r *reply) bool {
	if len(b) == 0 || b[0]>>4 != version {
		return false
	}
	var l4 []byte
	var ok bool
	if version == 4 {
		r.quotedProto, l4, ok = parseIPv4(b, &r.quotedSrc, &r.quotedDst)
	} else {
		r.quotedProto, l4, ok = parseIPv6(b, &r.quotedSrc, &r.quotedDst)
	}
	if !ok || len(l4) < 8 {
		return false
	}
	r.kind = replyError
	r.quotedSrcPort, r.quotedDstPort = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	r.quotedSeq = binary.BigEndian.Uint32(l4[4:])
	return true
}

// icmpReason names an ICMP error (RFC 792, RFC 1122 section 3.2.2.1, RFC 1812
// section 5.2.7.1) or an ICMPv6 error (RFC 4443 section 3) from the target.
func icmpReason(v6 bool, typ, code uint8) Reason {
	if v6 {
		switch typ {
		case icmp6Unreachable:
			switch code {
			case 0:
				return NetUnreachable
			case 1, 5, 6:
				return AdminProhibited
			case 3:
				return HostUnreachable
			case 4:
				return PortUnreachable
			}
		case icmp6ParamProblem:
			if code == 1 {
				return ProtoUnreachable
			}
		}
		return OtherICMP
	}
	if typ == icmp4Unreachable {
		switch code {
		case 0:
			return NetUnreachable
		case 1:
			return HostUnreachable
		case 2:
			return ProtoUnreachable
		case 3:
			return PortUnreachable
		case 9, 10, 13:
			return AdminProhibited
		}
	}
	return OtherICMP
}

// icmpAnswer is what an ICMP error to a probe says about its port. Only UDP has
// "port unreachable" for "closed": to a SYN a stack answers RST, so it is a
// firewall that speaks there.
func icmpAnswer(r *reply) Answer {
	if r.from != r.quotedDst {
		return Answer{Unknown, RouterError}
	}
	reason := icmpReason(r.from.Is6(), r.icmpType, r.icmpCode)
	if reason == PortUnreachable && r.quotedProto == rules.UDP {
		return Answer{Closed, reason}
	}
	return Answer{Rejected, reason}
}
