package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// onWire is the address and port that the peer of a TCP connection aims at: of
// one that a DNAT or a redirect leads here, not those of the socket. Conntrack
// knows; where it does not run nothing is translated, and who may not ask it may
// not change a rule either.
func onWire(e endpoint) (netip.AddrPort, error) {
	family := uint8(unix.AF_INET)
	if e.local.Addr().Is6() {
		family = unix.AF_INET6
	}
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|nl.IPCTNL_MSG_CT_GET, unix.NLM_F_ACK)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	req.AddData(replyTuple(e))
	messages, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return e.local, nil
	case err != nil:
		return e.local, fmt.Errorf("find the flow of %s: %w", e.remote, err)
	}
	for _, m := range messages {
		if len(m) < nl.SizeofNfgenmsg {
			continue
		}
		if to, ok := originalDestination(m[nl.SizeofNfgenmsg:]); ok {
			return to, nil
		}
	}
	return e.local, nil
}

// replyTuple names a flow by its answers, which carry the addresses of the socket.
func replyTuple(e endpoint) *nl.RtAttr {
	src, dst := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if e.local.Addr().Is6() {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	tuple := nl.NewRtAttr(nl.CTA_TUPLE_REPLY|unix.NLA_F_NESTED, nil)
	ip := tuple.AddRtAttr(nl.CTA_TUPLE_IP|unix.NLA_F_NESTED, nil)
	ip.AddRtAttr(src, e.local.Addr().AsSlice())
	ip.AddRtAttr(dst, e.remote.Addr().AsSlice())
	proto := tuple.AddRtAttr(nl.CTA_TUPLE_PROTO|unix.NLA_F_NESTED, nil)
	proto.AddRtAttr(nl.CTA_PROTO_NUM, []byte{uint8(rules.TCP)})
	proto.AddRtAttr(nl.CTA_PROTO_SRC_PORT, binary.BigEndian.AppendUint16(nil, e.local.Port()))
	proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, binary.BigEndian.AppendUint16(nil, e.remote.Port()))
	return tuple
}

// originalDestination reads where the first packet of a flow went.
func originalDestination(attrs []byte) (netip.AddrPort, bool) {
	tuple := attribute(attrs, nl.CTA_TUPLE_ORIG)
	ip, proto := attribute(tuple, nl.CTA_TUPLE_IP), attribute(tuple, nl.CTA_TUPLE_PROTO)
	dst := attribute(ip, nl.CTA_IP_V4_DST)
	if dst == nil {
		dst = attribute(ip, nl.CTA_IP_V6_DST)
	}
	addr, ok := netip.AddrFromSlice(dst)
	port := attribute(proto, nl.CTA_PROTO_DST_PORT)
	if !ok || len(port) != 2 {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(port)), true
}

// attribute finds one of a list of netlink attributes; nil: it is not there.
func attribute(b []byte, kind uint16) []byte {
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == kind {
			return b[unix.SizeofNlAttr:n]
		}
		b = b[min((n+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return nil
}
