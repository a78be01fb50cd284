package firewall

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// field is a part of a protocol header. Places are in bits.
type field struct {
	name     string
	from, to int
	kind     uint32 // 0: a number
}

// headerFields lists what nft has a name for (RFC 791, 8200, 9293, 768, 792,
// 4443 and so on).
func headerFields(header string) []field {
	ports := []field{{"sport", 0, 16, kindPort}, {"dport", 16, 32, kindPort}}
	switch header {
	case "ether":
		return []field{{"daddr", 0, 48, kindEther}, {"saddr", 48, 96, kindEther}, {"type", 96, 112, kindEtherType}}
	case "ip":
		return []field{{"version", 0, 4, 0}, {"hdrlength", 4, 8, 0}, {"dscp", 8, 14, kindDSCP}, {"ecn", 14, 16, 37}, {"length", 16, 32, 0},
			{"id", 32, 48, 0}, {"frag-off", 48, 64, 0}, {"ttl", 64, 72, 0}, {"protocol", 72, 80, kindProtocol}, {"checksum", 80, 96, 0},
			{"saddr", 96, 128, kindIPv4}, {"daddr", 128, 160, kindIPv4}}
	case "ip6":
		return []field{{"version", 0, 4, 0}, {"dscp", 4, 10, kindDSCP}, {"ecn", 10, 12, 37}, {"flowlabel", 12, 32, 0}, {"length", 32, 48, 0},
			{"nexthdr", 48, 56, kindProtocol}, {"hoplimit", 56, 64, 0}, {"saddr", 64, 192, kindIPv6}, {"daddr", 192, 320, kindIPv6}}
	case "arp":
		return []field{{"htype", 0, 16, 0}, {"ptype", 16, 32, kindEtherType}, {"hlen", 32, 40, 0}, {"plen", 40, 48, 0}, {"operation", 48, 64, kindARP},
			{"saddr ether", 64, 112, kindEther}, {"saddr ip", 112, 144, kindIPv4}, {"daddr ether", 144, 192, kindEther}, {"daddr ip", 192, 224, kindIPv4}}
	case "tcp":
		return append(ports, field{"sequence", 32, 64, 0}, field{"ackseq", 64, 96, 0}, field{"doff", 96, 100, 0}, field{"reserved", 100, 104, 0},
			field{"flags", 104, 112, kindTCPFlags}, field{"window", 112, 128, 0}, field{"checksum", 128, 144, 0}, field{"urgptr", 144, 160, 0})
	case "udp":
		return append(ports, field{"length", 32, 48, 0}, field{"checksum", 48, 64, 0})
	case "udplite":
		return append(ports, field{"csumcov", 32, 48, 0}, field{"checksum", 48, 64, 0})
	case "sctp":
		return append(ports, field{"vtag", 32, 64, 0}, field{"checksum", 64, 96, 0})
	case "dccp", "th":
		return ports
	case "icmp":
		return []field{{"type", 0, 8, kindICMP}, {"code", 8, 16, 32}, {"checksum", 16, 32, 0}, {"id", 32, 48, 0}, {"sequence", 48, 64, 0}}
	case "icmpv6":
		return []field{{"type", 0, 8, kindICMPv6}, {"code", 8, 16, 33}, {"checksum", 16, 32, 0}, {"id", 32, 48, 0}, {"sequence", 48, 64, 0}}
	case "igmp":
		return []field{{"type", 0, 8, kindIGMP}, {"mrt", 8, 16, 0}, {"checksum", 16, 32, 0}, {"group", 32, 64, kindIPv4}}
	case "esp":
		return []field{{"spi", 0, 32, 0}, {"sequence", 32, 64, 0}}
	case "ah":
		return []field{{"nexthdr", 0, 8, kindProtocol}, {"hdrlength", 8, 16, 0}, {"reserved", 16, 32, 0}, {"spi", 32, 64, 0}, {"sequence", 64, 96, 0}}
	case "comp":
		return []field{{"nexthdr", 0, 8, kindProtocol}, {"flags", 8, 16, 0}, {"cpi", 16, 32, 0}}
	}
	return nil
}

// transportHeader names the header of a protocol number; "th" when it has none.
func transportHeader(protocol byte) string {
	switch protocol {
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_IGMP:
		return "igmp"
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_DCCP:
		return "dccp"
	case unix.IPPROTO_ESP:
		return "esp"
	case unix.IPPROTO_AH:
		return "ah"
	case unix.IPPROTO_ICMPV6:
		return "icmpv6"
	case unix.IPPROTO_COMP:
		return "comp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	case unix.IPPROTO_UDPLITE:
		return "udplite"
	}
	return "th"
}

// place is where a payload expression reads or writes. In bits; uint32 numbers
// of the kernel fit.
type place struct {
	base     uint32
	header   string // by what the rule has tested before; "" when unknown
	from, to int64
}

// field finds the name of exactly this place.
func (p place) field() (field, bool) {
	for _, f := range headerFields(p.header) {
		if int64(f.from) == p.from && int64(f.to) == p.to {
			return f, true
		}
	}
	return field{}, false
}

// fields splits the place into whole fields that stand side by side; nil when
// it does not come out even.
func (p place) fields() []place {
	var out []place
	at := p.from
	if p.from%8 != 0 || p.to%8 != 0 {
		return nil
	}
	for _, f := range headerFields(p.header) {
		if int64(f.from) == at && int64(f.to) <= p.to && f.from%8 == 0 && f.to%8 == 0 {
			out = append(out, place{p.base, p.header, int64(f.from), int64(f.to)})
			at = int64(f.to)
		}
	}
	if at != p.to || len(out) < 2 {
		return nil
	}
	return out
}

func (p place) text() (string, kind) {
	if f, ok := p.field(); ok {
		k := kind{name: "integer"}
		if f.kind != 0 {
			k = kindOf(f.kind)
		}
		return p.header + " " + f.name, k
	}
	return p.raw(), raw()
}

func (p place) raw() string {
	base := map[uint32]string{
		unix.NFT_PAYLOAD_LL_HEADER: "ll", unix.NFT_PAYLOAD_NETWORK_HEADER: "nh", unix.NFT_PAYLOAD_TRANSPORT_HEADER: "th", unix.NFT_PAYLOAD_INNER_HEADER: "ih",
	}[p.base]
	if base == "" {
		base = fmt.Sprintf("base%d", p.base)
	}
	return fmt.Sprintf("@%s,%d,%d", base, p.from, p.to-p.from)
}

// within narrows the place to the bits that a mask keeps, if they are in one
// piece; shift is how far they stand from the end.
func (p place) within(mask []byte) (part place, shift int, ok bool) {
	first, last, ones := -1, -1, 0
	for i := range len(mask) * 8 {
		if mask[i/8]&(0x80>>(i%8)) != 0 {
			if first < 0 {
				first = i
			}
			last = i
			ones++
		}
	}
	if ones == 0 || ones != last-first+1 || int64(len(mask)*8) != p.to-p.from {
		return place{}, 0, false
	}
	part = place{p.base, p.header, p.from + int64(first), p.from + int64(last) + 1}
	_, ok = part.field()
	return part, len(mask)*8 - 1 - last, ok
}
