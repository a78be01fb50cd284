package firewall

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// What conntrack knows of the flows, read and written over the same netlink
// socket as the rules (uapi/linux/netfilter/nfnetlink_conntrack.h).

// tuple is a flow as seen from one end: who speaks to whom.
type tuple struct {
	protocol rules.Protocol
	src, dst netip.AddrPort
}

func (t tuple) reversed() tuple { return tuple{t.protocol, t.dst, t.src} }

// entry is a flow that conntrack knows. It holds two tuples, because a NAT makes
// the answers come from somewhere else than the questions went.
type entry struct {
	orig, reply tuple
	status      uint32
	tcpState    uint8
	flags       [2]uint8 // of TCP: original, reply
	id          []byte
}

// A bit of an entry (enum ip_conntrack_status), states and flags of TCP
// (uapi/linux/netfilter/nf_conntrack_tcp.h).
const (
	statusAssured = 1 << 2

	tcpEstablished = 3
	tcpLastAlive   = 6 // LAST_ACK; what follows is over

	flagSACK    = 0x02
	flagLiberal = 0x08
)

// midStream says that conntrack never saw the flow begin: nothing proves that the
// entry has the right direction (tcp_new in nf_conntrack_proto_tcp.c).
func (e *entry) midStream() bool {
	return e.orig.protocol == rules.TCP && e.flags[0]&e.flags[1]&flagLiberal != 0
}

func conntrackType(t uint16) uint16 { return unix.NFNL_SUBSYS_CTNETLINK<<8 | t }

// entries reads all of conntrack but protocols without ports.
func (c *Conn) entries() ([]entry, error) {
	var out []entry
	err := c.request(conntrackType(nl.IPCTNL_MSG_CT_GET), unix.NLM_F_DUMP, unix.AF_UNSPEC, nil, func(r reply) error {
		if e, ok := parseEntry(r.attrs); ok {
			out = append(out, e)
		}
		return nil
	})
	return out, err
}

// entryOf finds the entry that a tuple belongs to, in either direction.
func (c *Conn) entryOf(t tuple) (e entry, found bool, err error) {
	err = c.request(conntrackType(nl.IPCTNL_MSG_CT_GET), 0, familyOf(t), appendTuple(nil, nl.CTA_TUPLE_ORIG, t), func(r reply) error {
		e, found = parseEntry(r.attrs)
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		err = nil
	}
	return e, found, err
}

// enter makes an entry; EEXIST when either direction is known already.
func (c *Conn) enter(e entry) error {
	// So long live what has been seen alive (nf_conntrack_tcp_timeout_established,
	// nf_conntrack_udp_timeout_stream); the next packet sets what the host has set.
	timeout := uint32(432000)
	if e.orig.protocol == rules.UDP {
		timeout = 120
	}
	b := appendTuple(nil, nl.CTA_TUPLE_ORIG, e.orig)
	b = appendTuple(b, nl.CTA_TUPLE_REPLY, e.reply)
	b = attr32(b, nl.CTA_STATUS, e.status)
	b = attr32(b, nl.CTA_TIMEOUT, timeout)
	if e.orig.protocol == rules.TCP {
		tcp := attr(nil, nl.CTA_PROTOINFO_TCP_STATE, []byte{e.tcpState})
		for i, typ := range []uint16{nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, nl.CTA_PROTOINFO_TCP_FLAGS_REPLY} {
			tcp = attr(tcp, typ, []byte{e.flags[i], e.flags[i]}) // value, mask
		}
		b = nest(b, nl.CTA_PROTOINFO, nest(nil, nl.CTA_PROTOINFO_TCP, tcp))
	}
	return c.change(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_CREATE|unix.NLM_F_EXCL, e.orig, b)
}

// forget deletes just this entry, not a later one of the same tuple.
func (c *Conn) forget(e entry) error {
	return c.change(nl.IPCTNL_MSG_CT_DELETE, 0, e.orig, attr(appendTuple(nil, nl.CTA_TUPLE_ORIG, e.orig), nl.CTA_ID, e.id))
}

func (c *Conn) change(typ, flags uint16, t tuple, attrs []byte) error {
	return c.request(conntrackType(typ), flags|unix.NLM_F_ACK, familyOf(t), attrs, func(reply) error { return nil })
}

func familyOf(t tuple) byte {
	if t.src.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func appendTuple(b []byte, typ uint16, t tuple) []byte {
	src, dst := uint16(nl.CTA_IP_V4_SRC), uint16(nl.CTA_IP_V4_DST)
	if t.src.Addr().Is6() {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	ip := attr(attr(nil, src, t.src.Addr().AsSlice()), dst, t.dst.Addr().AsSlice())
	proto := attr(nil, nl.CTA_PROTO_NUM, []byte{byte(t.protocol)})
	proto = attr(proto, nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, t.src.Port()))
	proto = attr(proto, nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, t.dst.Port()))
	return nest(b, typ, nest(nest(nil, nl.CTA_TUPLE_IP, ip), nl.CTA_TUPLE_PROTO, proto))
}

// parseEntry reads an entry; not ok when it has no ports.
func parseEntry(attrs []byte) (entry, bool) {
	var e entry
	ok := [2]bool{}
	for typ, v := range attributes(attrs) {
		switch typ {
		case nl.CTA_TUPLE_ORIG:
			e.orig, ok[0] = parseTuple(v)
		case nl.CTA_TUPLE_REPLY:
			e.reply, ok[1] = parseTuple(v)
		case nl.CTA_STATUS:
			e.status = be32(v)
		case nl.CTA_ID:
			e.id = append([]byte(nil), v...) // v is the buffer's
		case nl.CTA_PROTOINFO:
			tcp := attrOf(v, nl.CTA_PROTOINFO_TCP)
			e.tcpState = firstByte(attrOf(tcp, nl.CTA_PROTOINFO_TCP_STATE))
			e.flags[0] = firstByte(attrOf(tcp, nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL))
			e.flags[1] = firstByte(attrOf(tcp, nl.CTA_PROTOINFO_TCP_FLAGS_REPLY))
		}
	}
	return e, ok[0] && ok[1]
}

func parseTuple(attrs []byte) (tuple, bool) {
	var t tuple
	var src, dst netip.Addr
	for typ, v := range attributes(attrOf(attrs, nl.CTA_TUPLE_IP)) {
		switch typ {
		case nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC:
			src, _ = netip.AddrFromSlice(v)
		case nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST:
			dst, _ = netip.AddrFromSlice(v)
		}
	}
	proto := attrOf(attrs, nl.CTA_TUPLE_PROTO)
	t.protocol = rules.Protocol(firstByte(attrOf(proto, nl.CTA_PROTO_NUM)))
	from, to := attrOf(proto, nl.CTA_PROTO_SRC_PORT), attrOf(proto, nl.CTA_PROTO_DST_PORT)
	t.src, t.dst = netip.AddrPortFrom(src, be16(from)), netip.AddrPortFrom(dst, be16(to))
	return t, src.IsValid() && dst.IsValid() && from != nil && to != nil
}

func firstByte(b []byte) byte {
	if len(b) == 0 {
		return 0
	}
	return b[0]
}
