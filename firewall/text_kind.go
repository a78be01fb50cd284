package firewall

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// kind says how bytes of one type are written, in the words of the nft program.
type kind struct {
	name  string
	size  int  // in bytes; 0: that of what holds it
	host  bool // in the byte order of the machine
	hex   int  // digits; 0: decimal
	names map[uint64]string
	bits  []bitName // a value is several of these
	write func([]byte) string
}

type bitName struct {
	bit  uint64
	name string
}

func (k kind) text(b []byte) string {
	if k.write != nil {
		if s := k.write(b); s != "" {
			return s
		}
		return hexText(b)
	}
	if len(b) == 0 || len(b) > 8 {
		return hexText(b)
	}
	n := k.number(b)
	if len(k.bits) > 0 {
		return bitsText(k.bits, n)
	}
	if s := k.names[n]; s != "" {
		return s
	}
	if k.hex > 0 {
		return fmt.Sprintf("0x%0*x", k.hex, n)
	}
	return strconv.FormatUint(n, 10)
}

// number reads up to eight bytes.
func (k kind) number(b []byte) uint64 {
	var n uint64
	for i := range b {
		c := b[i]
		if k.host && binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
			c = b[len(b)-1-i]
		}
		n = n<<8 | uint64(c)
	}
	return n
}

func bitsText(bits []bitName, n uint64) string {
	var out []string
	for _, b := range bits {
		if n&b.bit != 0 {
			out = append(out, b.name)
			n &^= b.bit
		}
	}
	if n != 0 || len(out) == 0 {
		out = append(out, fmt.Sprintf("0x%x", n))
	}
	return strings.Join(out, ",")
}

// hexText keeps a long value to its head, and a sum by which two can be told
// apart.
func hexText(b []byte) string {
	const most = 40
	if len(b) == 0 {
		return "0x"
	}
	if len(b) > most {
		return "0x" + hex.EncodeToString(b[:most]) + fmt.Sprintf("…(%d bytes, crc32 %08x)", len(b), crc32.ChecksumIEEE(b))
	}
	return "0x" + hex.EncodeToString(b)
}

func addressText(b []byte) string {
	a, ok := netip.AddrFromSlice(b)
	if !ok {
		return ""
	}
	return a.String()
}

// interfaceText: fewer bytes than a name has are what a name begins with.
func interfaceText(b []byte) string {
	if !ended(b) {
		return ""
	}
	name := strings.ReplaceAll(cString(b), "*", `\*`)
	if len(b) < unix.IFNAMSIZ && len(cString(b)) == len(b) {
		name += "*"
	}
	return quoted(name)
}

// ended reports whether nothing follows the end of a string.
func ended(b []byte) bool { return len(bytes.Trim(b[len(cString(b)):], "\x00")) == 0 }

func hardwareText(b []byte) string {
	if len(b) == 0 || len(b) > 20 {
		return ""
	}
	parts := make([]string, len(b))
	for i, c := range b {
		parts[i] = fmt.Sprintf("%02x", c)
	}
	return strings.Join(parts, ":")
}

func hourText(b []byte) string {
	if len(b) != 4 {
		return ""
	}
	n := binary.NativeEndian.Uint32(b)
	if n >= 86400 {
		return ""
	}
	s := fmt.Sprintf("%02d:%02d", n/3600, n/60%60)
	if n%60 != 0 {
		s += fmt.Sprintf(":%02d", n%60)
	}
	return quoted(s)
}

func momentText(b []byte) string {
	if len(b) != 8 {
		return ""
	}
	return quoted(time.Unix(0, int64(binary.NativeEndian.Uint64(b))).UTC().Format("2006-01-02 15:04:05"))
}

// durationText writes a time of whole milliseconds.
func durationText(ms uint64) string {
	if ms == 0 {
		return "0s"
	}
	var b strings.Builder
	for _, u := range []struct {
		size uint64
		name string
	}{{86400000, "d"}, {3600000, "h"}, {60000, "m"}, {1000, "s"}, {1, "ms"}} {
		if n := ms / u.size; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
		}
		ms %= u.size
	}
	return b.String()
}

// bytesText writes an amount of bytes in the largest unit that it fills.
func bytesText(n uint64) string {
	units := []string{"bytes", "kbytes", "mbytes"}
	i := 0
	for i < len(units)-1 && n > 0 && n%1024 == 0 {
		n /= 1024
		i++
	}
	return fmt.Sprintf("%d %s", n, units[i])
}

func names(first uint64, list ...string) map[uint64]string {
	m := map[uint64]string{}
	for i, s := range list {
		if s != "" {
			m[first+uint64(i)] = s
		}
	}
	return m
}

func flagNames(list ...string) []bitName {
	var out []bitName
	for i, s := range list {
		if s != "" {
			out = append(out, bitName{1 << i, s})
		}
	}
	return out
}

// Kinds by the number that nft gives to a type (enum datatypes), which sets carry.
const (
	kindVerdict   = 1
	kindFamily    = 2
	kindInteger   = 4
	kindString    = 5
	kindIPv4      = 7
	kindIPv6      = 8
	kindEther     = 9
	kindEtherType = 10
	kindARP       = 11
	kindProtocol  = 12
	kindPort      = 13
	kindICMP      = 14
	kindTCPFlags  = 15
	kindTime      = 18
	kindMark      = 19
	kindIndex     = 20
	kindIfType    = 21
	kindRealm     = 22
	kindClass     = 23
	kindUser      = 24
	kindGroup     = 25
	kindState     = 26
	kindDirection = 27
	kindStatus    = 28
	kindICMPv6    = 29
	kindLabel     = 30
	kindPacket    = 31
	kindDevGroup  = 35
	kindDSCP      = 36
	kindAddrType  = 38
	kindBoolean   = 39
	kindEvent     = 40
	kindIfname    = 41
	kindIGMP      = 42
	kindMoment    = 43
	kindHour      = 44
	kindDay       = 45
)

func kindOf(typ uint32) kind {
	switch typ {
	case kindVerdict:
		return kind{name: "verdict"}
	case kindFamily:
		return kind{name: "nf_proto", size: 1, host: true, names: map[uint64]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"}}
	case 3:
		return kind{name: "bitmask", hex: 1}
	case kindInteger:
		return kind{name: "integer"}
	case kindString:
		return kind{name: "string", host: true, write: func(b []byte) string {
			if !ended(b) {
				return ""
			}
			return quoted(cString(b))
		}}
	case 6:
		return kind{name: "ll_addr", write: hardwareText}
	case kindIPv4:
		return kind{name: "ipv4_addr", size: 4, write: addressText}
	case kindIPv6:
		return kind{name: "ipv6_addr", size: 16, write: addressText}
	case kindEther:
		return kind{name: "ether_addr", size: 6, write: hardwareText}
	case kindEtherType:
		return kind{name: "ether_type", size: 2, hex: 4, names: map[uint64]string{0x0800: "ip", 0x0806: "arp", 0x86dd: "ip6", 0x8100: "8021q", 0x88a8: "8021ad"}}
	case kindARP:
		return kind{name: "arp_op", size: 2, names: names(1, "request", "reply", "rrequest", "rreply", "", "", "", "inrequest", "inreply", "nak")}
	case kindProtocol:
		return kind{name: "inet_proto", size: 1, names: protocolNames()}
	case kindPort:
		return kind{name: "inet_service", size: 2}
	case kindICMP:
		return kind{name: "icmp_type", size: 1, names: map[uint64]string{
			0: "echo-reply", 3: "destination-unreachable", 4: "source-quench", 5: "redirect", 8: "echo-request",
			9: "router-advertisement", 10: "router-solicitation", 11: "time-exceeded", 12: "parameter-problem",
			13: "timestamp-request", 14: "timestamp-reply", 15: "info-request", 16: "info-reply",
			17: "address-mask-request", 18: "address-mask-reply"}}
	case kindTCPFlags:
		return kind{name: "tcp_flag", size: 1, bits: flagNames("fin", "syn", "rst", "psh", "ack", "urg", "ecn", "cwr")}
	case 16:
		return kind{name: "dccp_pkttype", size: 1, names: names(0, "request", "response", "data", "ack", "dataack", "closereq", "close", "reset", "sync", "syncack")}
	case 17:
		return kind{name: "mh_type", size: 1}
	case kindTime:
		return kind{name: "time", size: 8, host: true, write: func(b []byte) string {
			if len(b) == 4 {
				return durationText(uint64(binary.NativeEndian.Uint32(b)))
			}
			if len(b) != 8 {
				return ""
			}
			return durationText(binary.NativeEndian.Uint64(b))
		}}
	case kindMark:
		return kind{name: "mark", size: 4, host: true, hex: 8}
	case kindIndex:
		return kind{name: "iface_index", size: 4, host: true}
	case kindIfType:
		return kind{name: "iface_type", size: 2, host: true, names: map[uint64]string{
			1: "ether", 512: "ppp", 768: "ipip", 769: "ipip6", 772: "loopback", 776: "sit", 778: "ipgre", 0xfffe: "none"}}
	case kindRealm:
		return kind{name: "realm", size: 4, host: true}
	case kindClass:
		return kind{name: "classid", size: 4, host: true, write: func(b []byte) string {
			if len(b) != 4 {
				return ""
			}
			switch n := binary.NativeEndian.Uint32(b); n {
			case 0xffffffff:
				return "root"
			case 0:
				return "none"
			default:
				return fmt.Sprintf("%x:%x", n>>16, n&0xffff)
			}
		}}
	case kindUser:
		return kind{name: "uid", size: 4, host: true}
	case kindGroup:
		return kind{name: "gid", size: 4, host: true}
	case kindState:
		return kind{name: "ct_state", size: 4, host: true, bits: []bitName{{stateInvalidBit, "invalid"}, {stateEstablishedBit, "established"},
			{stateRelatedBit, "related"}, {stateNewBit, "new"}, {stateUntrackedBit, "untracked"}}}
	case kindDirection:
		return kind{name: "ct_dir", size: 1, names: names(0, "original", "reply")}
	case kindStatus:
		return kind{name: "ct_status", size: 4, host: true, bits: flagNames("expected", "seen-reply", "assured", "confirmed", "snat", "dnat", "", "", "", "dying")}
	case kindICMPv6:
		return kind{name: "icmpv6_type", size: 1, names: map[uint64]string{
			1: "destination-unreachable", 2: "packet-too-big", 3: "time-exceeded", 4: "parameter-problem",
			128: "echo-request", 129: "echo-reply", 130: "mld-listener-query", 131: "mld-listener-report", 132: "mld-listener-done",
			133: "nd-router-solicit", 134: "nd-router-advert", 135: "nd-neighbor-solicit", 136: "nd-neighbor-advert",
			137: "nd-redirect", 138: "router-renumbering", 141: "ind-neighbor-solicit", 142: "ind-neighbor-advert", 143: "mld2-listener-report"}}
	case kindLabel:
		return kind{name: "ct_label", size: 16, host: true}
	case kindPacket:
		return kind{name: "pkt_type", size: 1, host: true, names: names(0, "host", "broadcast", "multicast", "other")}
	case 32:
		return kind{name: "icmp_code", size: 1}
	case 33:
		return kind{name: "icmpv6_code", size: 1}
	case 34:
		return kind{name: "icmpx_code", size: 1}
	case kindDevGroup:
		return kind{name: "devgroup", size: 4, host: true, names: names(0, "default")}
	case kindDSCP:
		return kind{name: "dscp", size: 1, hex: 2, names: map[uint64]string{
			0: "cs0", 8: "cs1", 16: "cs2", 24: "cs3", 32: "cs4", 40: "cs5", 48: "cs6", 56: "cs7", 1: "lephb",
			10: "af11", 12: "af12", 14: "af13", 18: "af21", 20: "af22", 22: "af23", 26: "af31", 28: "af32", 30: "af33",
			34: "af41", 36: "af42", 38: "af43", 44: "va", 46: "ef"}}
	case 37:
		return kind{name: "ecn", size: 1, names: names(0, "not-ect", "ect1", "ect0", "ce")}
	case kindAddrType:
		return kind{name: "fib_addrtype", size: 4, host: true, names: names(0, "unspec", "unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit")}
	case kindBoolean:
		return kind{name: "boolean", size: 1, host: true, names: names(0, "missing", "exists")}
	case kindEvent:
		return kind{name: "ct_event", size: 4, host: true, bits: flagNames("new", "related", "destroy", "reply", "assured", "protoinfo", "helper", "mark", "seqadj", "secmark", "label")}
	case kindIfname:
		return kind{name: "ifname", size: unix.IFNAMSIZ, host: true, write: interfaceText}
	case kindIGMP:
		return kind{name: "igmp_type", size: 1, names: map[uint64]string{
			0x11: "membership-query", 0x12: "membership-report-v1", 0x16: "membership-report-v2", 0x17: "leave-group", 0x22: "membership-report-v3"}}
	case kindMoment:
		return kind{name: "time", size: 8, host: true, write: momentText}
	case kindHour:
		return kind{name: "hour", size: 4, host: true, write: hourText}
	case kindDay:
		return kind{name: "day", size: 1, host: true, names: names(0, `"Sunday"`, `"Monday"`, `"Tuesday"`, `"Wednesday"`, `"Thursday"`, `"Friday"`, `"Saturday"`)}
	case 46:
		return kind{name: "cgroupsv2", size: 8, host: true}
	}
	return kind{name: fmt.Sprintf("type %d", typ), write: hexText}
}

// swapped is the kind in the other byte order.
func (k kind) swapped() kind {
	if write := k.write; write != nil && k.host {
		k.write = func(b []byte) string {
			b = bytes.Clone(b)
			slices.Reverse(b)
			return write(b)
		}
	}
	k.host = !k.host
	return k
}

// raw is what nobody names.
func raw() kind { return kind{name: "integer", hex: 1} }

// protocolNames are the names of /etc/protocols, which nft prints.
func protocolNames() map[uint64]string {
	return map[uint64]string{
		0: "ip", 1: "icmp", 2: "igmp", 4: "ipencap", 6: "tcp", 8: "egp", 17: "udp", 33: "dccp", 41: "ipv6", 43: "ipv6-route", 44: "ipv6-frag", 46: "rsvp",
		47: "gre", 50: "esp", 51: "ah", 58: "ipv6-icmp", 59: "ipv6-nonxt", 60: "ipv6-opts", 89: "ospf", 94: "ipip", 97: "etherip",
		103: "pim", 108: "ipcomp", 112: "vrrp", 115: "l2tp", 132: "sctp", 136: "udplite",
	}
}
