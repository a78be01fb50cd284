package firewall

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// What iptables-nft leaves to the old extensions of xtables: a name, a revision
// and a C structure. Those that stand on most hosts are read, the others make a
// rule that cannot be told.

func (r *ruleRun) match(data []byte) {
	name, rev := attrText(data, unix.NFTA_MATCH_NAME), attrNumber(data, unix.NFTA_MATCH_REV)
	info := attrOf(data, unix.NFTA_MATCH_INFO)
	t, soft, why := maybe, false, ""
	switch {
	case name == "comment":
		return
	case name == "conntrack" && (rev == 2 || rev == 3):
		t, why = r.w.xtConntrack(info)
	case name == "multiport" && rev == 1:
		t, soft, why = r.w.xtMultiport(info)
	case (name == "tcp" || name == "udp") && rev == 0:
		t, soft, why = r.w.xtPorts(name, info)
	case name == "addrtype" && rev == 1:
		t, soft, why = r.w.xtAddrtype(info)
	case name == "limit":
		t, soft, why = yes, true, fmt.Sprintf("the rate limit in table %s %s, chain %s is not reached", r.t.name(), r.t.title, r.w.at.Chain)
	}
	r.say("xt match %q", name)
	if t == maybe && why == "" {
		why = fmt.Sprintf("expression match %q of iptables", name)
	}
	r.meet(t, soft, why)
}

// Flags of conntrack (uapi/linux/netfilter/xt_conntrack.h).
const (
	xtState      = 1 << 0
	xtDirection  = 1 << 12
	xtStateAlias = 1 << 13
	xtStateDNAT  = 1 << 7
	xtStateSNAT  = 1 << 6
	xtUntracked  = 1 << 8
)

// xtConntrack reads struct xt_conntrack_mtinfo3, of which mtinfo2 is a prefix.
func (w *walker) xtConntrack(info []byte) (truth, string) {
	if len(info) < 154 {
		return maybe, ""
	}
	half := func(at int) uint16 { return binary.NativeEndian.Uint16(info[at:]) }
	flags, invert, wanted := half(146), half(148), half(150)
	if flags&^(xtState|xtDirection|xtStateAlias) != 0 {
		return maybe, ""
	}
	b, _ := w.ctValue(unix.NFT_CT_STATE, false)
	if !b.complete() {
		return maybe, "it depends on ct state"
	}
	state := uint16(binary.NativeEndian.Uint32(b.val))
	if state == stateUntrackedBit {
		state = xtUntracked
	}
	entry := w.seen() == ctNew || w.seen() == ctReply || w.seen() == ctRelated
	if flags&xtState != 0 {
		hit := wanted&state != 0
		if !hit && entry && wanted&xtStateSNAT != 0 {
			return maybe, "it depends on ct status"
		}
		if !hit && entry && wanted&xtStateDNAT != 0 {
			if w.p.dnat == maybe || w.seen() != ctNew {
				return maybe, "it depends on ct status"
			}
			hit = w.p.dnat == yes
		}
		if hit == (invert&xtState != 0) {
			return no, ""
		}
	}
	if !entry {
		if flags&xtState == 0 {
			return no, ""
		}
		return yes, ""
	}
	if flags&xtDirection != 0 {
		if w.seen() == ctRelated {
			return maybe, "it depends on ct direction"
		}
		if (w.seen() == ctReply) != (invert&xtDirection != 0) {
			return no, ""
		}
	}
	return yes, ""
}

// xtMultiport reads struct xt_multiport_v1.
func (w *walker) xtMultiport(info []byte) (t truth, soft bool, why string) {
	const source, destination = 0, 1
	if len(info) < 48 || info[1] > 15 || info[0] > destination {
		return maybe, false, ""
	}
	if !hasPorts(w.packet.Protocol) {
		return maybe, false, ""
	}
	at := 2
	if info[0] == source {
		at = 0
	}
	b := w.p.load(unix.NFT_PAYLOAD_TRANSPORT_HEADER, at, 2, w.packet.Protocol)
	if !b.complete() {
		return maybe, false, "it depends on " + b.about
	}
	port := be16(b.val)
	ports := func(i int) uint16 { return binary.NativeEndian.Uint16(info[2+2*i:]) }
	t = no
	for i := 0; i < int(info[1]); i++ {
		lo, hi := ports(i), ports(i)
		if info[32+i] != 0 && i+1 < 15 { // the first of a range
			i++
			hi = ports(i)
		}
		if lo <= port && port <= hi {
			t = yes
		}
	}
	if info[47] != 0 {
		t = t.not()
	}
	return t, b.assumes(), b.why
}

// xtPorts reads struct xt_tcp and struct xt_udp, as far as they are about ports;
// iptables-nft leaves matches without any to them.
func (w *walker) xtPorts(name string, info []byte) (t truth, soft bool, why string) {
	proto, inverted := rules.TCP, 11 // the byte of flags
	if name == "udp" {
		proto, inverted = rules.UDP, 8
	}
	if len(info) <= inverted {
		return maybe, false, ""
	}
	if w.packet.Protocol != proto {
		return no, false, ""
	}
	ports := func(i int) uint16 { return binary.NativeEndian.Uint16(info[2*i:]) }
	every := func(i int) bool { return ports(i) == 0 && ports(i+1) == 65535 }
	if !every(0) || !every(2) || info[inverted] != 0 || name == "tcp" && (info[8] != 0 || info[9] != 0) {
		return maybe, false, ""
	}
	return yes, false, ""
}

// xtAddrtype reads struct xt_addrtype_info_v1, whose masks have a bit for every
// RTN_* type.
func (w *walker) xtAddrtype(info []byte) (t truth, soft bool, why string) {
	const invertSource, invertDest, known = 1, 2, 3
	if len(info) < 8 {
		return maybe, false, ""
	}
	flags := binary.NativeEndian.Uint32(info[4:])
	if flags&^known != 0 {
		return maybe, false, ""
	}
	t = yes
	for _, side := range []struct {
		mask   uint16
		source bool
		invert bool
	}{
		{binary.NativeEndian.Uint16(info), true, flags&invertSource != 0},
		{binary.NativeEndian.Uint16(info[2:]), false, flags&invertDest != 0},
	} {
		if side.mask == 0 {
			continue
		}
		fib := uint32(unix.NFTA_FIB_F_DADDR)
		if side.source {
			fib = unix.NFTA_FIB_F_SADDR
		}
		b := w.fibValue(unix.NFT_FIB_RESULT_ADDRTYPE, fib, side.source)
		if !b.complete() {
			return maybe, false, "it depends on " + b.about
		}
		if b.assumes() {
			soft, why = true, b.why
		}
		hit := side.mask>>(binary.NativeEndian.Uint32(b.val)&15)&1 != 0
		if hit == side.invert {
			t = no
		}
	}
	return t, soft, why
}

func (r *ruleRun) xtTarget(data []byte) {
	name, rev := attrText(data, unix.NFTA_TARGET_NAME), attrNumber(data, unix.NFTA_TARGET_REV)
	info := attrOf(data, unix.NFTA_TARGET_INFO)
	r.say("xt target %q", name)
	switch name {
	case "", "standard":
		// struct xt_standard_target: the verdict less one, negative.
		if len(info) < 4 {
			r.outside("a verdict that cannot be read")
			return
		}
		const xtReturn = -5
		switch v := int32(binary.NativeEndian.Uint32(info)); v {
		case -verdictDrop - 1, -verdictAccept - 1:
			r.setVerdict(-v-1, "")
		case xtReturn:
			r.setVerdict(unix.NFT_RETURN, "")
		default:
			r.outside(fmt.Sprintf("verdict %d of iptables", v))
		}
	case "REJECT":
		r.xtReject(info)
	case "MASQUERADE", "SNAT":
		if r.acts() {
			r.bindSource(name)
		}
	case "REDIRECT", "DNAT":
		if r.acts() {
			r.xtNAT(name, rev, info)
		}
	case "MARK":
		if r.acts() {
			r.w.p.mark.put(0, blank(4, ""), true)
		}
	case "CONNMARK":
		if r.acts() { // it may copy either way
			r.w.p.mark.put(0, blank(4, ""), true)
			r.w.p.ctMark.put(0, blank(4, ""), true)
		}
	case "CT", "NOTRACK":
		if r.acts() && r.w.ct == ctNone {
			r.w.ct = ctUnknown
		}
	case "TTL", "HL", "TOS", "DSCP":
		if r.acts() {
			r.w.p.forgetHead()
		}
	case "LOG", "NFLOG", "TRACE", "AUDIT", "CLASSIFY", "TCPMSS", "CHECKSUM", "SET", "RATEEST", "IDLETIMER", "LED", "SECMARK", "CONNSECMARK":
	default:
		r.outside(fmt.Sprintf("expression target %q of iptables", name))
	}
}

// xtReject: a TCP reset answers TCP only. The number of that answer differs
// between the families (ipt_REJECT.h, ip6t_REJECT.h).
func (r *ruleRun) xtReject(info []byte) {
	if !r.acts() {
		return
	}
	r.end = endReject
	reset := uint32(6) // IP6T_TCP_RESET
	if r.w.p.v4 {
		reset = 8 // IPT_TCP_RESET
	}
	if len(info) >= 4 && binary.NativeEndian.Uint32(info) == reset && r.w.packet.Protocol != rules.TCP {
		r.end = endDrop
	}
}

// xtNAT reads struct nf_nat_range, or for the oldest revisions of IPv4 struct
// nf_nat_ipv4_multi_range_compat (uapi/linux/netfilter/nf_nat.h).
func (r *ruleRun) xtNAT(name string, rev uint32, info []byte) {
	const mapAddress, mapPort = 1, 2
	size := r.w.p.addressSize()
	flagsAt, addrAt, addrEndAt, portAt := 0, 4, 20, 36
	if r.w.p.v4 && rev == 0 {
		flagsAt, addrAt, addrEndAt, portAt = 4, 8, 12, 16
	}
	addr, port := blank(size, ""), blank(2, "")
	if len(info) >= portAt+4 {
		flags := binary.NativeEndian.Uint32(info[flagsAt:])
		between := func(at, end, n int, unknown bits) bits {
			if string(info[at:at+n]) != string(info[end:end+n]) {
				return unknown
			}
			return sure(info[at:at+n], "", asNumber)
		}
		port = between(portAt, portAt+2, 2, port)
		addr = between(addrAt, addrEndAt, size, addr)
		if flags&mapPort == 0 {
			port = bits{}
		}
		if flags&mapAddress == 0 {
			addr = bits{}
		}
		if flags&natNetmap != 0 {
			addr = blank(size, "")
		}
	}
	if name == "REDIRECT" {
		r.redirect(port)
	} else {
		r.dnat(addr, port)
	}
}

// forgetHead makes the first bytes of the network header unknown, those with
// traffic class and hop limit, up to the protocol or addresses.
func (p *journeyPacket) forgetHead() {
	if p.v4 {
		p.network.put(1, blank(1, ""), true)
		p.network.put(ip4TTL, blank(1, ""), true)
		return
	}
	p.network.put(1, blank(1, ""), true)
	p.network.put(ip6Hops, blank(1, ""), true)
}
