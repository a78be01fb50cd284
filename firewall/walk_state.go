package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// What conntrack (nft_ct.c) and the routing table (nft_fib.c) say of a packet.

// stateUntracked is NF_CT_STATE_UNTRACKED_BIT; the others follow
// NF_CT_STATE_BIT (uapi/linux/netfilter/nf_conntrack_common.h).
const (
	stateInvalidBit     = 1 << 0
	stateEstablishedBit = 1 << 1
	stateRelatedBit     = 1 << 2
	stateNewBit         = 1 << 3
	stateUntrackedBit   = 1 << 6
)

// Bits of ct status (enum ip_conntrack_status).
const (
	statusSeenReply = 1 << 1
	statusConfirmed = 1 << 3
	statusDstNAT    = 1 << 5
	statusFirst     = 0x7f // those that a new flow has for sure or not, NAT apart
)

func stateNames(v []byte) string {
	if len(v) != 4 {
		return fmt.Sprintf("%#x", v)
	}
	var out []string
	n := binary.NativeEndian.Uint32(v)
	for _, s := range []struct {
		bit  uint32
		name string
	}{{stateInvalidBit, "invalid"}, {stateEstablishedBit, "established"}, {stateRelatedBit, "related"}, {stateNewBit, "new"}, {stateUntrackedBit, "untracked"}} {
		if n&s.bit != 0 {
			out = append(out, s.name)
			n &^= s.bit
		}
	}
	if n != 0 || len(out) == 0 {
		out = append(out, fmt.Sprintf("%#x", n))
	}
	return strings.Join(out, ",")
}

func (r *ruleRun) ct(data []byte) {
	key := attrNumber(data, unix.NFTA_CT_KEY)
	w := r.w
	if sreg := attrOf(data, unix.NFTA_CT_SREG); sreg != nil {
		if r.acts() && key == unix.NFT_CT_MARK {
			w.p.ctMark.put(0, r.reg.get(be32(sreg), 4), r.sure())
		}
		return
	}
	reply := false
	if d := attrOf(data, unix.NFTA_CT_DIRECTION); len(d) > 0 {
		reply = d[0] == 1
	}
	b, t := w.ctValue(key, reply)
	if t == no {
		r.meet(no, false, "")
		return
	}
	if t == maybe {
		r.meet(maybe, false, "it depends on "+b.about)
	}
	r.reg.set(attrNumber(data, unix.NFTA_CT_DREG), b)
}

// ctValue is what ct loads (nft_ct_get_eval); no ends the rule, maybe leaves
// open whether it does.
func (w *walker) ctValue(key uint32, reply bool) (bits, truth) {
	now := w.ct
	if now == ctNone && w.hk == unix.NF_INET_PRE_ROUTING && w.prio == priorityConntrack {
		now = ctUnknown // beside conntrack itself: before or after
	}
	if key == unix.NFT_CT_STATE {
		bit := map[tracking]uint32{ctNone: stateInvalidBit, ctNew: stateNewBit, ctReply: stateEstablishedBit,
			ctRelated: stateRelatedBit, ctInvalid: stateInvalidBit, ctUntracked: stateUntrackedBit}[now]
		if now == ctUnknown {
			return blank(4, "ct state"), yes
		}
		b := sure(native32(bit), "ct state", asState)
		return b, yes
	}
	switch now {
	case ctNone, ctInvalid, ctUntracked:
		return bits{}, no // there is no entry to read
	case ctUnknown:
		return blank(16, "what conntrack knows"), maybe
	}
	t := w.p.original
	if reply && now == ctNew {
		t = w.p.flow(w.packet.Protocol).inverse() // rewrites show in the other direction
	} else if reply {
		t = t.inverse()
	}
	name := func(b bits, about string, kind writing) (bits, truth) {
		b = b.clone()
		b.about, b.kind = about, kind
		return b, yes
	}
	kind := asAddress6
	if w.p.v4 {
		kind = asAddress4
	}
	dir := "original"
	if reply {
		dir = "reply"
	}
	switch key {
	case unix.NFT_CT_DIRECTION:
		switch now {
		case ctNew:
			return sure([]byte{0}, "ct direction", asNumber), yes
		case ctReply:
			return sure([]byte{1}, "ct direction", asNumber), yes
		}
		return blank(1, "ct direction"), yes
	case unix.NFT_CT_STATUS:
		return w.ctStatus(now), yes
	case unix.NFT_CT_MARK:
		return name(w.p.ctMark, "ct mark", asNative)
	case unix.NFT_CT_L3PROTOCOL:
		v, _ := w.metaValue(unix.NFT_META_NFPROTO)
		return name(v, "ct l3proto", asNumber)
	case unix.NFT_CT_PROTOCOL:
		if now == ctRelated {
			return blank(1, "ct protocol"), yes
		}
		return sure([]byte{byte(w.packet.Protocol)}, "ct protocol", asNumber), yes
	case unix.NFT_CT_ZONE:
		return assumed([]byte{0, 0}, "ct zone", asNumber, "conntrack has one zone"), yes
	case unix.NFT_CT_LABELS:
		if now == ctNew {
			return sure(make([]byte, 16), "ct label", asNumber), yes
		}
	case unix.NFT_CT_HELPER:
		if now == ctNew {
			return bits{}, no // only what is expected has a helper
		}
		return blank(16, "ct helper"), maybe
	case unix.NFT_CT_SRC:
		return name(t.src, "ct "+dir+" saddr", kind)
	case unix.NFT_CT_DST:
		return name(t.dst, "ct "+dir+" daddr", kind)
	case unix.NFT_CT_PROTO_SRC:
		return name(t.sport, "ct "+dir+" proto-src", asPort)
	case unix.NFT_CT_PROTO_DST:
		return name(t.dport, "ct "+dir+" proto-dst", asPort)
	case unix.NFT_CT_SRC_IP, unix.NFT_CT_DST_IP, unix.NFT_CT_SRC_IP6, unix.NFT_CT_DST_IP6:
		if w.p.v4 != (key == unix.NFT_CT_SRC_IP || key == unix.NFT_CT_DST_IP) {
			return bits{}, no
		}
		if key == unix.NFT_CT_SRC_IP || key == unix.NFT_CT_SRC_IP6 {
			return name(t.src, "ct "+dir+" saddr", kind)
		}
		return name(t.dst, "ct "+dir+" daddr", kind)
	}
	return blank(16, fmt.Sprintf("ct key %d", key)), yes
}

func (w *walker) ctStatus(now tracking) bits {
	b := blank(4, "ct status")
	set := func(val, known uint32) {
		b.put(0, sure(native32(val), "", asNumber), true)
		copy(b.known, native32(known))
		for i := range b.val {
			b.val[i] &= b.known[i]
		}
	}
	switch {
	case w.in == "lo", now == ctRelated:
		return b
	case now == ctReply:
		set(statusSeenReply|statusConfirmed, statusSeenReply|statusConfirmed)
		return b
	}
	switch {
	case w.p.dnat == yes:
		set(statusDstNAT, statusFirst)
	case w.p.dnat == maybe:
		set(0, statusFirst&^statusDstNAT)
	case !w.p.nat:
		set(0, 0x1ff)
	default:
		set(0, statusFirst)
	}
	return b
}

func (r *ruleRun) fib(data []byte) {
	flags := attrNumber(data, unix.NFTA_FIB_FLAGS)
	want := attrNumber(data, unix.NFTA_FIB_RESULT)
	source := flags&unix.NFTA_FIB_F_SADDR != 0
	b := r.w.fibValue(want, flags, source)
	r.reg.set(attrNumber(data, unix.NFTA_FIB_DREG), b)
}

func (w *walker) fibValue(want, flags uint32, source bool) bits {
	about, of := "fib daddr", w.p.dst()
	if source {
		about, of = "fib saddr", w.p.src()
	}
	a, ok := addressIn(of)
	typ, local := 0, ""
	if ok {
		typ = w.addrType(a, source)
	}
	if !source && w.p.dnat == no && w.rewrites == 0 && (typ == 0 || typ == unix.RTN_UNICAST) {
		typ = unix.RTN_LOCAL
		local = "the destination is an address of this host"
	}
	value := func(v []byte, kind writing) bits {
		if local != "" {
			return assumed(v, about, kind, local)
		}
		return sure(v, about, kind)
	}
	if want == unix.NFT_FIB_RESULT_ADDRTYPE {
		about += " type"
		switch {
		case typ == 0 && source:
			return assumed(native32(unix.RTN_UNICAST), about, asNative, "the source is an address of another host")
		case typ == 0, flags&unix.NFTA_FIB_F_OIF != 0:
			return blank(4, about)
		case flags&unix.NFTA_FIB_F_IIF != 0 && typ == unix.RTN_LOCAL && local == "":
			for _, own := range w.host.links[w.in].addrs {
				if own == a {
					return sure(native32(unix.RTN_LOCAL), about, asNative)
				}
			}
			return blank(4, about)
		}
		return value(native32(uint32(typ)), asNative)
	}
	return w.fibDevice(want, flags, source, a, typ, value)
}

// fibDevice is the interface that fib finds. What is local has none, except
// that a packet over loopback is told its own.
func (w *walker) fibDevice(want, flags uint32, source bool, a netip.Addr, typ int, value func([]byte, writing) bits) bits {
	about := "fib daddr oif"
	if source {
		about = "fib saddr oif"
	}
	found := func(dev string) bits {
		switch {
		case flags&unix.NFTA_FIB_F_PRESENT != 0 && dev != "":
			return value([]byte{1}, asNumber)
		case flags&unix.NFTA_FIB_F_PRESENT != 0:
			return value([]byte{0}, asNumber)
		case want == unix.NFT_FIB_RESULT_OIFNAME:
			return value(nameBytes(dev), asName)
		case dev == "":
			return value(native32(0), asNative)
		}
		if l, ok := w.host.links[dev]; ok {
			return value(native32(l.index), asNative)
		}
		return blank(4, about)
	}
	size := 4
	if want == unix.NFT_FIB_RESULT_OIFNAME {
		size = unix.IFNAMSIZ
	}
	switch {
	case w.in == "lo" && w.hk == unix.NF_INET_PRE_ROUTING:
		return found(w.in)
	case typ == unix.RTN_LOCAL:
		return found("")
	case typ == unix.RTN_UNICAST && w.host.route != nil:
		_, dev, ok := w.host.route(a)
		if ok && (flags&unix.NFTA_FIB_F_IIF == 0 || dev == w.in) {
			return found(dev)
		}
	}
	if source && w.in == "" && flags&unix.NFTA_FIB_F_PRESENT != 0 {
		return assumed([]byte{1}, about, asNumber, "answers leave by the interface that the packet came by")
	}
	return blank(size, about)
}
