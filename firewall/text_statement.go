package firewall

import (
	"bytes"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// statement writes what acts on a packet; false for what is not known.
func (r *ruleWords) statement(e liveExpr) bool {
	d := e.data
	switch e.name {
	case "counter", "limit", "quota", "connlimit", "last":
		r.say("%s", statefulText(e))
	case "log":
		r.log(d)
	case "reject":
		return r.reject(d)
	case "nat":
		return r.nat(d)
	case "masq":
		r.say("masquerade%s%s", r.portsTo(d, unix.NFTA_MASQ_REG_PROTO_MIN, unix.NFTA_MASQ_REG_PROTO_MAX), natFlags(attrNumber(d, unix.NFTA_MASQ_FLAGS)))
	case "redir":
		r.say("redirect%s%s", r.portsTo(d, unix.NFTA_REDIR_REG_PROTO_MIN, unix.NFTA_REDIR_REG_PROTO_MAX), natFlags(attrNumber(d, unix.NFTA_REDIR_FLAGS)))
	case "tproxy":
		r.tproxy(d)
	case "notrack":
		r.say("notrack")
	case "queue":
		r.queue(d)
	case "dup":
		r.dup(attrOf(d, unix.NFTA_DUP_SREG_ADDR), attrOf(d, unix.NFTA_DUP_SREG_DEV))
	case "fwd":
		return r.fwd(d)
	case "synproxy":
		r.say("%s", synproxyText(d))
	case "flow_offload":
		r.say("flow add @%s", identifier(attrText(d, 1)))
	case "match", "target":
		// Structures of iptables: their bytes tell two apart.
		name, info := attrText(d, unix.NFTA_MATCH_NAME), attrOf(d, unix.NFTA_MATCH_INFO)
		switch {
		case len(bytes.Trim(info, "\x00")) == 0:
			r.say("xt %s %s", e.name, quoted(name))
		case name == "comment":
			r.say("xt %s %s %s", e.name, name, quoted(cString(info)))
		default:
			r.say("xt %s %s [rev %d %s]", e.name, quoted(name), attrNumber(d, unix.NFTA_MATCH_REV), hexText(info))
		}
	default:
		return false
	}
	return true
}

// statefulExpressions are what an element or a set carries, as a list or alone.
func statefulExpressions(attrs []byte, list, single uint16) []liveExpr {
	out := expressions(attrOf(attrs, list))
	if e := attrOf(attrs, single); e != nil && len(out) == 0 {
		out = append(out, liveExpr{attrText(e, unix.NFTA_EXPR_NAME), attrOf(e, unix.NFTA_EXPR_DATA)})
	}
	return out
}

// statefulText writes what keeps a state, without the state.
func statefulText(e liveExpr) string {
	switch e.name {
	case "counter":
		return "counter"
	case "last":
		return "last"
	case "limit":
		return "limit " + limitText(e.data)
	case "quota":
		return "quota " + quotaText(e.data)
	case "connlimit":
		over := ""
		if attrNumber(e.data, 2)&1 != 0 { // NFTA_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV
			over = "over "
		}
		return fmt.Sprintf("ct count %s%d", over, attrNumber(e.data, 1))
	}
	return opaque(e)
}

func limitText(d []byte) string {
	over := ""
	if attrNumber(d, unix.NFTA_LIMIT_FLAGS)&unix.NFT_LIMIT_F_INV != 0 {
		over = "over "
	}
	unit := map[uint64]string{1: "second", 60: "minute", 3600: "hour", 86400: "day", 604800: "week"}[value64(attrOf(d, unix.NFTA_LIMIT_UNIT))]
	if unit == "" {
		unit = fmt.Sprintf("%ds", value64(attrOf(d, unix.NFTA_LIMIT_UNIT)))
	}
	rate, burst := value64(attrOf(d, unix.NFTA_LIMIT_RATE)), attrNumber(d, unix.NFTA_LIMIT_BURST)
	if attrNumber(d, unix.NFTA_LIMIT_TYPE) == unix.NFT_LIMIT_PKT_BYTES {
		s := fmt.Sprintf("rate %s%s/%s", over, bytesText(rate), unit)
		if burst != 0 {
			s += " burst " + bytesText(uint64(burst))
		}
		return s
	}
	s := fmt.Sprintf("rate %s%d/%s", over, rate, unit)
	if burst != 5 { // the usual one
		s += fmt.Sprintf(" burst %d packets", burst)
	}
	return s
}

func quotaText(d []byte) string {
	over := ""
	if attrNumber(d, unix.NFTA_QUOTA_FLAGS)&unix.NFT_QUOTA_F_INV != 0 {
		over = "over "
	}
	return over + bytesText(value64(attrOf(d, unix.NFTA_QUOTA_BYTES)))
}

func (r *ruleWords) log(d []byte) {
	s := "log"
	if p := attrOf(d, unix.NFTA_LOG_PREFIX); p != nil {
		s += " prefix " + quoted(cString(p))
	}
	if g := attrOf(d, unix.NFTA_LOG_GROUP); g != nil {
		s += fmt.Sprintf(" group %d", be16(g))
	}
	if n := attrNumber(d, unix.NFTA_LOG_SNAPLEN); n != 0 {
		s += fmt.Sprintf(" snaplen %d", n)
	}
	if n := be16(attrOf(d, unix.NFTA_LOG_QTHRESHOLD)); n != 0 {
		s += fmt.Sprintf(" queue-threshold %d", n)
	}
	const warning = 4
	levels := []string{"emerg", "alert", "crit", "err", "warn", "notice", "info", "debug", "audit"}
	if l := attrOf(d, unix.NFTA_LOG_LEVEL); l != nil && be32(l) != warning {
		if n := be32(l); int(n) < len(levels) {
			s += " level " + levels[n]
		} else {
			s += fmt.Sprintf(" level %d", n)
		}
	}
	switch f := attrNumber(d, unix.NFTA_LOG_FLAGS); {
	case f == 0x2f:
		s += " flags all"
	case f != 0:
		switch f & 3 {
		case 1:
			s += " flags tcp sequence"
		case 2:
			s += " flags tcp options"
		case 3:
			s += " flags tcp sequence,options"
		}
		for _, b := range []bitName{{4, "ip options"}, {8, "skuid"}, {0x20, "ether"}} {
			if uint64(f)&b.bit != 0 {
				s += " flags " + b.name
			}
		}
		if f&^0x2f != 0 {
			s += fmt.Sprintf(" flags 0x%x", f&^0x2f)
		}
	}
	r.say("%s", s)
}

func (r *ruleWords) reject(d []byte) bool {
	val := attrOf(d, unix.NFTA_REJECT_ICMP_CODE)
	var code byte
	if len(val) == 1 {
		code = val[0]
	}
	table, usual := "", byte(0)
	var names map[byte]string
	switch attrNumber(d, unix.NFTA_REJECT_TYPE) {
	case unix.NFT_REJECT_TCP_RST:
		r.say("reject with tcp reset")
		return true
	case unix.NFT_REJECT_ICMPX_UNREACH:
		table, usual = "icmpx", unix.NFT_REJECT_ICMPX_PORT_UNREACH
		names = map[byte]string{0: "no-route", 1: "port-unreachable", 2: "host-unreachable", 3: "admin-prohibited"}
	case unix.NFT_REJECT_ICMP_UNREACH:
		if r.network == "ip6" {
			table, usual = "icmpv6", 4
			names = map[byte]string{0: "no-route", 1: "admin-prohibited", 3: "addr-unreachable", 4: "port-unreachable", 5: "policy-fail", 6: "reject-route"}
		} else {
			table, usual = "icmp", 3
			names = map[byte]string{0: "net-unreachable", 1: "host-unreachable", 2: "prot-unreachable", 3: "port-unreachable", 9: "net-prohibited", 10: "host-prohibited", 13: "admin-prohibited"}
		}
		r.drop(r.network)
	default:
		return false
	}
	name := names[code]
	if name == "" {
		name = fmt.Sprint(code)
	}
	if code == usual && (table == "icmpx" || r.family == unix.NFPROTO_IPV4 || r.family == unix.NFPROTO_IPV6) {
		r.say("reject")
		return true
	}
	r.say("reject with %s %s", table, name)
	return true
}

// address and port write what a rewrite takes from a register.
func (r *ruleWords) address(reg []byte) string {
	if reg == nil {
		return ""
	}
	v := r.one(be32(reg))
	if v != nil && (len(v.constant) == 4 || len(v.constant) == 16) {
		return addressText(v.constant)
	}
	return r.operand(be32(reg), raw())
}

func (r *ruleWords) port(reg []byte) string { return r.operand(be32(reg), kindOf(kindPort)) }

func (r *ruleWords) device(reg []byte) string {
	if reg == nil {
		return ""
	}
	return " device " + r.operand(be32(reg), kindOf(kindIndex))
}

// ports writes one port, or a range of them.
func (r *ruleWords) ports(lo, hi []byte) string {
	s := r.port(lo)
	if hi != nil && !bytes.Equal(lo, hi) {
		if t := r.port(hi); t != s {
			s += "-" + t
		}
	}
	return s
}

func (r *ruleWords) portsTo(d []byte, least, most uint16) string {
	lo := attrOf(d, least)
	if lo == nil {
		return ""
	}
	return " to :" + r.ports(lo, attrOf(d, most))
}

func natFlags(flags uint32) string {
	var out []string
	for _, f := range []bitName{{4, "random"}, {16, "fully-random"}, {8, "persistent"}} {
		if uint64(flags)&f.bit != 0 {
			out = append(out, f.name)
		}
	}
	if len(out) == 0 {
		return ""
	}
	return " " + strings.Join(out, ",")
}

func familyWord(family uint32) string {
	switch family {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	}
	return ""
}

func (r *ruleWords) nat(d []byte) bool {
	kindWord := map[uint32]string{unix.NFT_NAT_SNAT: "snat", unix.NFT_NAT_DNAT: "dnat"}[attrNumber(d, unix.NFTA_NAT_TYPE)]
	if kindWord == "" {
		return false
	}
	flags, family := attrNumber(d, unix.NFTA_NAT_FLAGS), attrNumber(d, unix.NFTA_NAT_FAMILY)
	s := kindWord
	if f := familyWord(family); f != "" && r.family == unix.NFPROTO_INET {
		s += " " + f
		r.drop(f)
	}
	if flags&natNetmap != 0 {
		s += " prefix"
	}
	lo, hi := attrOf(d, unix.NFTA_NAT_REG_ADDR_MIN), attrOf(d, unix.NFTA_NAT_REG_ADDR_MAX)
	plo, phi := attrOf(d, unix.NFTA_NAT_REG_PROTO_MIN), attrOf(d, unix.NFTA_NAT_REG_PROTO_MAX)
	to := r.address(lo)
	if hi != nil && !bytes.Equal(lo, hi) {
		if t := r.address(hi); t != to {
			to += "-" + t
		}
		if a, b := r.one(be32(lo)), r.one(be32(hi)); flags&natNetmap != 0 && a != nil && b != nil && len(a.constant) == len(b.constant) {
			switch len(a.constant) {
			case 4:
				to = spanText(kindOf(kindIPv4), a.constant, b.constant)
			case 16:
				to = spanText(kindOf(kindIPv6), a.constant, b.constant)
			}
		}
	}
	if plo != nil {
		if strings.Contains(to, ":") && lo != nil {
			to = "[" + strings.ReplaceAll(to, "-", "]-[") + "]"
		}
		switch {
		case r.one(be32(plo)) == nil && lo != nil:
			// The address and the port are one value of a map.
		default:
			to += ":" + r.ports(plo, phi)
		}
	}
	r.say("%s to %s%s", s, to, natFlags(flags))
	return true
}

func (r *ruleWords) tproxy(d []byte) {
	s := "tproxy"
	if f := familyWord(attrNumber(d, 1)); f != "" {
		s += " " + f
	}
	to := r.address(attrOf(d, 2))
	if port := attrOf(d, 3); port != nil {
		if strings.Contains(to, ":") {
			to = "[" + to + "]"
		}
		to += ":" + r.port(port)
	}
	r.say("%s to %s", s, to)
}

func (r *ruleWords) queue(d []byte) {
	s := "queue"
	if f := be16(attrOf(d, unix.NFTA_QUEUE_FLAGS)); f != 0 {
		s += " flags " + bitsText([]bitName{{unix.NFT_QUEUE_FLAG_BYPASS, "bypass"}, {unix.NFT_QUEUE_FLAG_CPU_FANOUT, "fanout"}}, uint64(f))
	}
	if sreg := attrOf(d, unix.NFTA_QUEUE_SREG_QNUM); sreg != nil {
		r.say("%s to %s", s, r.operand(be32(sreg), kind{host: true}))
		return
	}
	n, total := int(be16(attrOf(d, unix.NFTA_QUEUE_NUM))), int(be16(attrOf(d, unix.NFTA_QUEUE_TOTAL)))
	s += fmt.Sprintf(" to %d", n)
	if total > 1 {
		s += fmt.Sprintf("-%d", n+total-1)
	}
	r.say("%s", s)
}

func (r *ruleWords) dup(addr, dev []byte) {
	if addr == nil && dev != nil {
		r.say("dup to %s", r.operand(be32(dev), kindOf(kindIndex)))
		return
	}
	r.say("dup to %s%s", r.address(addr), r.device(dev))
}

func (r *ruleWords) fwd(d []byte) bool {
	dev, addr := attrOf(d, unix.NFTA_FWD_SREG_DEV), attrOf(d, 2) // NFTA_FWD_SREG_ADDR
	if dev == nil {
		return false
	}
	if addr == nil {
		r.say("fwd to %s", r.operand(be32(dev), kindOf(kindIndex)))
		return true
	}
	r.say("fwd %s to %s%s", familyWord(attrNumber(d, 3)), r.address(addr), r.device(dev))
	return true
}

func synproxyText(d []byte) string {
	flags := attrNumber(d, 3)
	s := "synproxy"
	if flags&1 != 0 {
		s += fmt.Sprintf(" mss %d", be16(attrOf(d, 1)))
	}
	if w := attrOf(d, 2); flags&2 != 0 && len(w) == 1 {
		s += fmt.Sprintf(" wscale %d", w[0])
	}
	if flags&8 != 0 {
		s += " timestamp"
	}
	if flags&4 != 0 {
		s += " sack-perm"
	}
	return s
}

// headerField names a place in an extension header or an option, in bytes.
type headerField struct {
	typ, from, size uint32
	name            string
	kind            uint32
}

// exthdr reads or changes extension headers and options (RFC 8200, 9293, 791).
func (r *ruleWords) exthdr(d []byte) bool {
	raw8 := attrOf(d, unix.NFTA_EXTHDR_TYPE)
	if len(raw8) != 1 {
		return false
	}
	typ, from, size := uint32(raw8[0]), attrNumber(d, unix.NFTA_EXTHDR_OFFSET), attrNumber(d, unix.NFTA_EXTHDR_LEN)
	var what map[uint32]string
	var fields []headerField
	prefix := ""
	switch attrNumber(d, unix.NFTA_EXTHDR_OP) {
	case unix.NFT_EXTHDR_OP_IPV6:
		r.drop("ip6")
		what = map[uint32]string{0: "hbh", 43: "rt", 44: "frag", 51: "auth", 60: "dst", 135: "mh"}
		fields = []headerField{
			{0, 0, 1, "nexthdr", kindProtocol}, {0, 1, 1, "hdrlength", 0}, {60, 0, 1, "nexthdr", kindProtocol}, {60, 1, 1, "hdrlength", 0},
			{43, 0, 1, "nexthdr", kindProtocol}, {43, 1, 1, "hdrlength", 0}, {43, 2, 1, "type", 0}, {43, 3, 1, "seg-left", 0},
			{44, 0, 1, "nexthdr", kindProtocol}, {44, 1, 1, "reserved", 0}, {44, 4, 4, "id", 0},
			{135, 0, 1, "nexthdr", kindProtocol}, {135, 1, 1, "hdrlength", 0}, {135, 2, 1, "type", 17},
		}
	case unix.NFT_EXTHDR_OP_TCPOPT:
		prefix = "tcp option "
		what = map[uint32]string{0: "eol", 1: "nop", 2: "maxseg", 3: "window", 4: "sack-perm", 5: "sack", 8: "timestamp", 19: "md5sig", 30: "mptcp", 34: "fastopen"}
		fields = []headerField{
			{2, 2, 2, "size", 0}, {3, 2, 1, "count", 0}, {8, 2, 4, "tsval", 0}, {8, 6, 4, "tsecr", 0},
			{5, 2, 4, "left", 0}, {5, 6, 4, "right", 0},
		}
	case exthdrIPv4:
		r.drop("ip")
		prefix = "ip option "
		what = map[uint32]string{7: "rr", 131: "lsrr", 137: "ssrr", 148: "ra"}
	default:
		return false
	}
	name := what[typ]
	if name == "" {
		name = fmt.Sprint(typ)
	}
	dreg, sreg := attrOf(d, unix.NFTA_EXTHDR_DREG), attrOf(d, unix.NFTA_EXTHDR_SREG)
	if dreg == nil && sreg == nil {
		r.say("reset %s%s", prefix, name)
		return true
	}
	if attrNumber(d, unix.NFTA_EXTHDR_FLAGS)&unix.NFT_EXTHDR_F_PRESENT != 0 {
		if prefix == "" {
			prefix = "exthdr "
		}
		r.load(be32(dreg), &loaded{text: prefix + name, kind: kindOf(kindBoolean), size: 1, named: true})
		return true
	}
	if size < 1 || size > 64 {
		return false
	}
	text, k := fmt.Sprintf("%s@%s,%d,%d", prefix, name, uint64(from)*8, size*8), raw()
	for _, f := range fields {
		if f.typ == typ && f.from == from && f.size == size {
			text, k = prefix+name+" "+f.name, kind{name: "integer"}
			if f.kind != 0 {
				k = kindOf(f.kind)
			}
		}
	}
	if sreg != nil {
		r.say("%s set %s", text, r.operand(be32(sreg), k))
		return true
	}
	r.load(be32(dreg), &loaded{text: text, kind: k, size: int(size)})
	return true
}
