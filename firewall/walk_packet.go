package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// truth is the answer of a comparison.
type truth uint8

const (
	no truth = iota
	yes
	maybe // it hinges on bits that nobody knows
)

func (t truth) not() truth {
	switch t {
	case no:
		return yes
	case yes:
		return no
	}
	return maybe
}

// bits are bytes of which not every bit is known.
type bits struct {
	val   []byte // zero where unknown
	known []byte // mask
	soft  []byte // mask, within known: an assumption
	about string // for people: "ip saddr"
	why   string // what the soft bits assume
	kind  writing
}

// writing says how people write a value.
type writing uint8

const (
	asNumber   writing = iota
	asAddress4         // the first bytes of one suffice
	asAddress6
	asPort
	asFamily
	asProtocol
	asName
	asState
	asNative // a number in the byte order of the machine
)

func blank(n int, about string) bits {
	return bits{val: make([]byte, n), known: make([]byte, n), soft: make([]byte, n), about: about}
}

func sure(val []byte, about string, kind writing) bits {
	b := blank(len(val), about)
	copy(b.val, val)
	fill(b.known)
	b.kind = kind
	return b
}

// assumed is a value that is probable, not certain.
func assumed(val []byte, about string, kind writing, why string) bits {
	b := sure(val, about, kind)
	fill(b.soft)
	b.why = why
	return b
}

func fill(mask []byte) {
	for i := range mask {
		mask[i] = 0xff
	}
}

func (b bits) clone() bits {
	b.val = append([]byte(nil), b.val...)
	b.known = append([]byte(nil), b.known...)
	b.soft = append([]byte(nil), b.soft...)
	return b
}

func (b bits) slice(from, n int) bits {
	out := blank(n, b.about)
	out.why, out.kind = b.why, b.kind
	if from < 0 || from >= len(b.val) {
		return out
	}
	copy(out.val, b.val[from:])
	copy(out.known, b.known[from:])
	copy(out.soft, b.soft[from:])
	return out
}

// put writes other over b from an offset on. When it is not certain to happen,
// only what both agree on stays known.
func (b bits) put(from int, other bits, certain bool) {
	for i := range other.val {
		k := from + i
		if k < 0 || k >= len(b.val) {
			return
		}
		if certain {
			b.val[k], b.known[k], b.soft[k] = other.val[i], other.known[i], other.soft[i]
			continue
		}
		b.known[k] &= other.known[i] & ^(b.val[k] ^ other.val[i])
		b.soft[k] = (b.soft[k] | other.soft[i]) & b.known[k]
		b.val[k] &= b.known[k]
	}
}

func (b bits) complete() bool {
	for _, k := range b.known {
		if k != 0xff {
			return false
		}
	}
	return true
}

func (b bits) assumes() bool {
	for _, s := range b.soft {
		if s != 0 {
			return true
		}
	}
	return false
}

// equal compares with data; soft says that only an assumption decides.
func (b bits) equal(data []byte) (t truth, soft bool) {
	t = yes
	for i := range b.val {
		d := byte(0)
		if i < len(data) {
			d = data[i]
		}
		differ := (b.val[i] ^ d) & b.known[i]
		switch {
		case differ&^b.soft[i] != 0:
			return no, false
		case differ != 0:
			t, soft = no, true
		case b.known[i] != 0xff && t == yes:
			t = maybe
		}
	}
	return t, soft || t == yes && b.assumes()
}

// low and high are the least and the greatest value that the known bits allow.
func (b bits) low() []byte { return b.val }

func (b bits) high() []byte {
	out := make([]byte, len(b.val))
	for i := range out {
		out[i] = b.val[i] | ^b.known[i]
	}
	return out
}

// tracking is what conntrack has said of the packet so far.
type tracking uint8

const (
	ctNone tracking = iota // not looked yet: the kernel calls that invalid
	ctNew
	ctReply
	ctRelated
	ctInvalid
	ctUntracked
	ctUnknown
)

// journeyPacket is the packet as it stands, rewrites included.
type journeyPacket struct {
	v4        bool
	network   bits // header
	transport bits // header, as far as anybody knows it
	mark      bits
	ctMark    bits
	original  flowTuple // as conntrack saw it first
	dnat      truth     // the destination was rewritten by NAT
	nat       bool      // the NAT hook was passed
	elsewhere truth     // routed on to another host
	outName   bits
	outIndex  bits
}

// flowTuple is one direction of a flow.
type flowTuple struct{ src, dst, sport, dport bits }

func (t flowTuple) inverse() flowTuple { return flowTuple{t.dst, t.src, t.dport, t.sport} }

// Offsets of header fields (RFC 791, 8200, 9293, 768, 792, 4443).
const (
	ip4TTL, ip4Protocol, ip4Src, ip4Dst = 8, 9, 12, 16
	ip6Next, ip6Hops, ip6Src, ip6Dst    = 6, 7, 8, 24
	tcpFlags, tcpSYN                    = 13, 0x02
)

// Protocols with ports at the head of the transport header, beside TCP and UDP
// (https://www.iana.org/assignments/protocol-numbers).
const (
	walkDCCP    = 33
	walkSCTP    = 132
	walkUDPLite = 136
)

func hasPorts(p rules.Protocol) bool {
	return p == rules.TCP || p == rules.UDP || p == walkDCCP || p == walkSCTP || p == walkUDPLite
}

// What is assumed of a packet that is not fully described.
const (
	usualHops   = 64
	usualSource = 54321 // ephemeral, and no service's
)

func setAll(b bits, at int, val []byte) { b.put(at, sure(val, "", asNumber), true) }

func newPacket(p rules.Packet) journeyPacket {
	src, dst := p.Src.Unmap(), p.Dst.Unmap()
	out := journeyPacket{v4: src.Is4() || !src.IsValid() && dst.Is4()}
	zero := make([]byte, 4)
	out.mark = assumed(zero, "meta mark", asNative, "the packet arrives without a mark")
	out.ctMark = sure(zero, "ct mark", asNative)
	out.outName = sure(make([]byte, unix.IFNAMSIZ), "oifname", asName)
	out.outIndex = sure(zero, "oif", asNative)

	hops := sure([]byte{p.HopLimit}, "", asNumber)
	if p.HopLimit == 0 {
		hops = assumed([]byte{usualHops}, "", asNumber, "")
	}
	addressIn := func(at int, a netip.Addr) {
		if a.IsValid() && a.Is4() == out.v4 {
			setAll(out.network, at, a.AsSlice())
		}
	}
	if out.v4 {
		out.network = blank(20, "")
		setAll(out.network, 0, []byte{0x45}) // version, no options
		out.network.put(6, assumed([]byte{0, 0}, "", asNumber, ""), true)
		out.network.known[6], out.network.soft[6] = 0xbf, 0xbf // all but "do not fragment"
		out.network.put(ip4TTL, hops, true)
		setAll(out.network, ip4Protocol, []byte{byte(p.Protocol)})
		addressIn(ip4Src, src)
		addressIn(ip4Dst, dst)
	} else {
		out.network = blank(40, "")
		out.network.val[0], out.network.known[0] = 0x60, 0xf0 // version
		setAll(out.network, ip6Next, []byte{byte(p.Protocol)})
		out.network.put(ip6Hops, hops, true)
		addressIn(ip6Src, src)
		addressIn(ip6Dst, dst)
	}
	out.transport = blank(20, "")
	switch {
	case hasPorts(p.Protocol):
		if p.SrcPort == 0 {
			out.transport.put(0, assumed(binary.BigEndian.AppendUint16(nil, usualSource), "", asPort, ""), true)
		} else {
			setAll(out.transport, 0, binary.BigEndian.AppendUint16(nil, p.SrcPort))
		}
		setAll(out.transport, 2, binary.BigEndian.AppendUint16(nil, p.DstPort))
		if p.Protocol == rules.TCP && p.Flow == rules.NewFlow {
			setAll(out.transport, tcpFlags, []byte{tcpSYN})
		}
	case p.Protocol == rules.ICMPv4 || p.Protocol == rules.ICMPv6:
		setAll(out.transport, 0, []byte{p.ICMPType})
		if plainCode(p.Protocol, p.ICMPType) {
			setAll(out.transport, 1, []byte{0})
		}
	}
	return out
}

// plainCode: messages whose code is always 0 (echo, ND, MLD).
func plainCode(p rules.Protocol, typ uint8) bool {
	if p == rules.ICMPv4 {
		return typ == 0 || typ == 8
	}
	return typ >= 128 && typ <= 143
}

func protocolName(p rules.Protocol) string {
	return map[rules.Protocol]string{rules.TCP: "tcp", rules.UDP: "udp", rules.ICMPv4: "icmp", rules.ICMPv6: "icmpv6",
		walkSCTP: "sctp", walkDCCP: "dccp", walkUDPLite: "udplite"}[p]
}

// load reads from a header and knows what people call the field.
func (p *journeyPacket) load(base, offset, n int, proto rules.Protocol) bits {
	switch base {
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		b := p.network.slice(offset, n)
		b.about = fmt.Sprintf("@nh,%d,%d", offset*8, n*8)
		b.why = "the packet is whole, not a fragment"
		type field struct{ at, n int }
		fields := map[field]string{{ip6Next, 1}: "ip6 nexthdr", {ip6Hops, 1}: "ip6 hoplimit"}
		hops := ip6Hops
		if p.v4 {
			fields = map[field]string{{ip4Protocol, 1}: "ip protocol", {ip4TTL, 1}: "ip ttl"}
			hops = ip4TTL
		}
		if name := fields[field{offset, n}]; name != "" {
			b.about = name
		}
		// nft reads no more of an address than its prefix has.
		for at, name := range map[int]string{p.srcAt(): "saddr", p.dstAt(): "daddr"} {
			switch {
			case offset != at || n > p.addressSize():
			case p.v4:
				b.about, b.kind = "ip "+name, asAddress4
			default:
				b.about, b.kind = "ip6 "+name, asAddress6
			}
			if offset == at && n < p.addressSize() {
				b.about += fmt.Sprintf("/%d", n*8)
			}
		}
		if offset <= hops && offset+n > hops {
			b.why = fmt.Sprintf("the hop limit is %d", usualHops)
		}
		return b
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		b := p.transport.slice(offset, n)
		b.about = fmt.Sprintf("@th,%d,%d", offset*8, n*8)
		b.why = fmt.Sprintf("the source port is an ephemeral one, such as %d", usualSource)
		name := protocolName(proto)
		switch {
		case hasPorts(proto) && n == 2 && offset == 0:
			b.about, b.kind = name+" sport", asPort
		case hasPorts(proto) && n == 2 && offset == 2:
			b.about, b.kind = name+" dport", asPort
		case proto == rules.TCP && n == 1 && offset == tcpFlags:
			b.about = "tcp flags"
		case (proto == rules.ICMPv4 || proto == rules.ICMPv6) && n == 1 && offset == 0:
			b.about = name + " type"
		case (proto == rules.ICMPv4 || proto == rules.ICMPv6) && n == 1 && offset == 1:
			b.about = name + " code"
		}
		return b
	}
	return blank(n, fmt.Sprintf("@%d,%d,%d", base, offset*8, n*8))
}

func (p *journeyPacket) srcAt() int {
	if p.v4 {
		return ip4Src
	}
	return ip6Src
}

func (p *journeyPacket) dstAt() int {
	if p.v4 {
		return ip4Dst
	}
	return ip6Dst
}

func (p *journeyPacket) addressSize() int {
	if p.v4 {
		return 4
	}
	return 16
}

func (p *journeyPacket) dst() bits { return p.network.slice(p.dstAt(), p.addressSize()) }

func (p *journeyPacket) src() bits { return p.network.slice(p.srcAt(), p.addressSize()) }

func (p *journeyPacket) setDst(a bits, certain bool) { p.network.put(p.dstAt(), a, certain) }

// addressIn gives a value as an address; ok is false when bits are missing.
func addressIn(b bits) (netip.Addr, bool) {
	if !b.complete() {
		return netip.Addr{}, false
	}
	return netip.AddrFromSlice(b.val)
}

// flow reads the packet's tuple (nf_ct_get_tuple, net/netfilter/nf_conntrack_core.c).
func (p *journeyPacket) flow(proto rules.Protocol) flowTuple {
	t := flowTuple{src: p.src(), dst: p.dst()}
	switch {
	case hasPorts(proto):
		t.sport, t.dport = p.transport.slice(0, 2), p.transport.slice(2, 2)
	case proto == rules.ICMPv4 || proto == rules.ICMPv6:
		t.sport, t.dport = blank(2, ""), p.transport.slice(0, 2) // identifier; type and code
	default:
		t.sport, t.dport = sure([]byte{0, 0}, "", asPort), sure([]byte{0, 0}, "", asPort)
	}
	return t
}

// copyOf makes the packet independent of what happens to the old one.
func (p journeyPacket) copyOf() journeyPacket {
	p.network, p.transport = p.network.clone(), p.transport.clone()
	p.mark, p.ctMark = p.mark.clone(), p.ctMark.clone()
	return p
}

// firstState is what conntrack calls the first packet of a flow
// (nf_conntrack_proto_icmp.c, nf_conntrack_proto_icmpv6.c).
func firstState(p rules.Packet) tracking {
	switch p.Flow {
	case rules.ReplyFlow:
		return ctReply
	case rules.RelatedFlow:
		return ctRelated
	case rules.InvalidFlow:
		return ctInvalid
	}
	switch p.Protocol {
	case rules.ICMPv4:
		switch p.ICMPType {
		case 8, 13, 15, 17: // questions
			return ctNew
		}
		return ctInvalid
	case rules.ICMPv6:
		switch p.ICMPType {
		case 130, 131, 132, 133, 134, 135, 136, 143: // MLD, ND
			return ctUntracked
		case 128, 139: // questions
			return ctNew
		}
		return ctInvalid
	}
	return ctNew
}
