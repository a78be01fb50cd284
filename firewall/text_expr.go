package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// add writes one expression.
func (r *ruleWords) add(e liveExpr) {
	d := e.data
	ok := true
	switch e.name {
	case "meta":
		ok = r.meta(d)
	case "payload":
		ok = r.payload(d)
	case "cmp":
		r.cmp(d)
	case "range":
		r.inRange(d)
	case "bitwise":
		ok = r.bitwise(d)
	case "byteorder":
		ok = r.byteorder(d)
	case "lookup":
		r.lookup(d)
	case "immediate":
		ok = r.immediate(d)
	case "ct":
		ok = r.ct(d)
	case "fib":
		ok = r.fib(d)
	case "rt":
		ok = r.rt(d)
	case "socket":
		ok = r.socket(d)
	case "osf":
		ok = r.fingerprint(d)
	case "xfrm":
		ok = r.xfrm(d)
	case "exthdr":
		ok = r.exthdr(d)
	case "numgen":
		r.numgen(d)
	case "hash":
		r.hash(d)
	case "dynset":
		ok = r.dynset(d)
	case "objref":
		ok = r.objref(d)
	default:
		ok = r.statement(e)
	}
	if !ok {
		r.unknown(e)
	}
}

func signs(op uint32) string {
	if op < 6 {
		return []string{"", "!= ", "< ", "<= ", "> ", ">= "}[op]
	}
	return fmt.Sprintf("op%d ", op)
}

// explicit writes the sign of equality, which is else left out.
func explicit(sign string) string {
	if sign == "" {
		return "== "
	}
	return sign
}

func (r *ruleWords) cmp(data []byte) {
	reg, op, val := attrNumber(data, unix.NFTA_CMP_SREG), attrNumber(data, unix.NFTA_CMP_OP), dataValue(data, unix.NFTA_CMP_DATA)
	vs := r.several(reg, len(val))
	if len(vs) == 0 {
		r.say("[register %d] %s%s", reg, explicit(signs(op)), hexText(val))
		return
	}
	v := vs[0]
	if len(vs) > 1 {
		var keys, values []string
		rest := val
		for _, v := range vs {
			n := min(4*words4(v.size), len(rest))
			keys, values = append(keys, v.shown()), append(values, v.kind.text(rest[:min(v.size, n)]))
			rest = rest[n:]
		}
		r.say("%s %s%s", strings.Join(keys, " . "), signs(op), strings.Join(values, " . "))
		return
	}
	if op == unix.NFT_CMP_LTE && r.lower.of == v && v.mask == nil {
		r.words[r.lower.word] = fmt.Sprintf("%s %s-%s", v.text, v.kind.text(r.lower.from), v.kind.text(val))
		r.lower = lowerBound{}
		return
	}
	if op == unix.NFT_CMP_EQ && v.mask == nil && v.place != nil && len(val)*8 == int(v.place.to-v.place.from) {
		if parts := v.place.fields(); parts != nil {
			for _, p := range parts {
				s, k := p.text()
				part := val[(p.from-v.place.from)/8 : (p.to-v.place.from)/8]
				r.learn(&loaded{text: s, tests: tested(s)}, part, r.say("%s %s", s, k.text(part)))
			}
			return
		}
	}
	text := relation(v, op, val)
	if v.place != nil && strings.HasPrefix(text, v.place.header+" ") {
		r.drop(v.place.header)
	}
	word := r.say("%s", text)
	if op == unix.NFT_CMP_GTE {
		r.lower = lowerBound{v, word, val}
	}
	if op == unix.NFT_CMP_EQ && v.mask == nil {
		r.learn(v, val, word)
	}
}

// learn draws from a test what the headers are.
func (r *ruleWords) learn(v *loaded, val []byte, word int) {
	switch {
	case v.tests == "l4proto" && len(val) == 1:
		r.protocol = val[0]
		if h := transportHeader(val[0]); h != "th" && (strings.HasPrefix(v.text, "meta ") || v.text == "ip protocol" && r.family == unix.NFPROTO_IPV4) {
			r.tests[h] = word
		}
	case v.tests == "nfproto" && len(val) == 1:
		switch val[0] {
		case unix.NFPROTO_IPV4:
			r.network = "ip"
		case unix.NFPROTO_IPV6:
			r.network = "ip6"
		default:
			return
		}
		r.tests[r.network] = word
	case v.tests == "protocol" && len(val) == 2:
		h := map[uint16]string{0x0800: "ip", 0x86dd: "ip6", 0x0806: "arp"}[be16(val)]
		if h == "" {
			return
		}
		r.network = h
		r.tests[h] = word
	case v.tests == "iiftype" && len(val) == 2 && binary.NativeEndian.Uint16(val) == 1:
		r.link = "ether"
		r.tests["ether"] = word
	}
}

// relation writes one comparison.
func relation(v *loaded, op uint32, val []byte) string {
	sign := signs(op)
	zero := len(bytes.Trim(val, "\x00")) == 0
	plain := op == unix.NFT_CMP_EQ || op == unix.NFT_CMP_NEQ
	switch {
	case v.mask == nil && isAddress(v.kind) && len(val) < v.kind.size:
		full := make([]byte, v.kind.size)
		copy(full, val)
		return fmt.Sprintf("%s %s%s/%d", v.text, sign, v.kind.text(full), len(val)*8)
	case v.named && plain && len(val) == 1 && val[0] <= 1:
		return fmt.Sprintf("%s %s%s", v.text, sign, v.kind.text(val))
	case v.mask == nil && len(v.kind.bits) > 0:
		return fmt.Sprintf("%s %s%s", v.text, explicit(sign), alternatives(v.kind.text(val)))
	case v.mask == nil:
		return fmt.Sprintf("%s %s%s", v.text, sign, v.kind.text(val))
	case len(v.kind.bits) > 0 && zero && op == unix.NFT_CMP_NEQ:
		return v.text + " " + v.kind.text(v.mask)
	case len(v.kind.bits) > 0 && zero && op == unix.NFT_CMP_EQ:
		return v.text + " ! " + v.kind.text(v.mask)
	case len(v.kind.bits) > 0 && plain:
		return fmt.Sprintf("%s %s%s / %s", v.text, sign, v.kind.text(val), v.kind.text(v.mask))
	}
	if v.place != nil && len(v.mask) == len(val) {
		if part, shift, ok := v.place.within(v.mask); ok {
			s, k := part.text()
			return fmt.Sprintf("%s %s%s", s, sign, k.text(lowest(val, shift, part)))
		}
	}
	if plain && isAddress(v.kind) {
		if n, ok := maskLength(v.mask); ok {
			return fmt.Sprintf("%s %s%s/%d", v.text, sign, v.kind.text(val), n)
		}
	}
	return fmt.Sprintf("%s & %s %s%s", v.text, v.maskText(), explicit(sign), maskKind(v.kind).text(val))
}

// alternatives joins several bits of one value.
func alternatives(s string) string { return strings.ReplaceAll(s, ",", " | ") }

// lowest gives the bytes of a part that stands shift bits from the end.
func lowest(val []byte, shift int, part place) []byte {
	n := shiftRight(val, shift)
	return n[max(0, len(n)-max(1, int(part.to-part.from+7)/8)):]
}

func shiftRight(b []byte, n int) []byte {
	out := make([]byte, len(b))
	for i := range len(b) * 8 {
		if k := i + n; k < len(b)*8 && b[i/8]&(0x80>>(i%8)) != 0 {
			out[k/8] |= 0x80 >> (k % 8)
		}
	}
	return out
}

// maskLength counts the ones of a mask that has them all in front.
func maskLength(mask []byte) (int, bool) {
	n := 0
	for n < len(mask)*8 && mask[n/8]&(0x80>>(n%8)) != 0 {
		n++
	}
	for i := n; i < len(mask)*8; i++ {
		if mask[i/8]&(0x80>>(i%8)) != 0 {
			return 0, false
		}
	}
	return n, true
}

func (r *ruleWords) inRange(data []byte) {
	reg := attrNumber(data, unix.NFTA_RANGE_SREG)
	from, to := dataValue(data, unix.NFTA_RANGE_FROM_DATA), dataValue(data, unix.NFTA_RANGE_TO_DATA)
	sign := signs(attrNumber(data, unix.NFTA_RANGE_OP) & 0xff)
	v := r.one(reg)
	if v == nil {
		r.say("[register %d] %s%s-%s", reg, sign, hexText(from), hexText(to))
		return
	}
	r.consumed = r.seq
	r.say("%s %s%s-%s", v.shown(), sign, v.kind.text(from), v.kind.text(to))
}

// Operations of bitwise (enum nft_bitwise_ops), and attributes that
// golang.org/x/sys lacks.
const (
	nftaBitwiseOp   = 6
	nftaBitwiseData = 7
	bitwiseMask     = 0
	bitwiseLeft     = 1
	bitwiseRight    = 2
)

func (r *ruleWords) bitwise(data []byte) bool {
	v := r.one(attrNumber(data, unix.NFTA_BITWISE_SREG))
	n := int(attrNumber(data, unix.NFTA_BITWISE_LEN))
	dreg := attrNumber(data, unix.NFTA_BITWISE_DREG)
	if v == nil || n < 1 || n > 64 {
		return false
	}
	out := &loaded{text: v.shown(), kind: v.kind, size: n}
	if v.constant != nil {
		out.text = hexText(v.constant)
	}
	switch op := attrNumber(data, nftaBitwiseOp); op {
	case bitwiseMask:
	case bitwiseLeft, bitwiseRight:
		by := dataValue(data, nftaBitwiseData)
		if len(by) != 4 {
			return false
		}
		out.text = fmt.Sprintf("%s %s %d", out.text, map[uint32]string{bitwiseLeft: "<<", bitwiseRight: ">>"}[op], binary.NativeEndian.Uint32(by))
		r.load(dreg, out)
		return true
	default:
		return false
	}
	mask, xor := dataValue(data, unix.NFTA_BITWISE_MASK), dataValue(data, unix.NFTA_BITWISE_XOR)
	if len(mask) != n || len(xor) != n {
		return false
	}
	inverse, overlap, ones := make([]byte, n), false, true
	for i := range mask {
		inverse[i] = ^mask[i]
		overlap = overlap || mask[i]&xor[i] != 0
		ones = ones && mask[i] == 0xff
	}
	k := maskKind(v.kind)
	switch {
	case len(bytes.Trim(xor, "\x00")) == 0 && v.mask == nil && v.constant == nil:
		out.text, out.mask, out.place = v.text, mask, v.place
	case bytes.Equal(inverse, xor):
		out.text = fmt.Sprintf("%s | %s", out.text, k.text(xor))
	case ones:
		out.text = fmt.Sprintf("%s ^ %s", out.text, k.text(xor))
	case overlap:
		out.text = fmt.Sprintf("%s & %s ^ %s", out.text, k.text(mask), k.text(xor))
	default:
		both := make([]byte, n)
		for i := range both {
			both[i] = mask[i] | xor[i]
		}
		out.text = fmt.Sprintf("%s & %s | %s", out.text, k.text(both), k.text(xor))
	}
	if v.place != nil && v.mask == nil && out.mask == nil {
		out.place, out.merge = v.place, &merged{mask, xor}
	}
	r.load(dreg, out)
	return true
}

// byteorder leaves the text as it is.
func (r *ruleWords) byteorder(data []byte) bool {
	v := r.one(attrNumber(data, unix.NFTA_BYTEORDER_SREG))
	n := int(attrNumber(data, unix.NFTA_BYTEORDER_LEN))
	if v == nil || n < 1 || n > 64 {
		return false
	}
	out := *v
	out.size, out.used, out.kind = n, false, v.kind.swapped()
	if out.constant != nil {
		return false
	}
	out.text, out.mask, out.place, out.merge = v.shown(), nil, nil, nil
	r.load(attrNumber(data, unix.NFTA_BYTEORDER_DREG), &out)
	return true
}

func (r *ruleWords) lookup(data []byte) {
	key := r.key(attrNumber(data, unix.NFTA_LOOKUP_SREG))
	set := r.set(attrText(data, unix.NFTA_LOOKUP_SET))
	not := ""
	if attrNumber(data, unix.NFTA_LOOKUP_FLAGS)&unix.NFT_LOOKUP_F_INV != 0 {
		not = "!= "
	}
	dreg := attrOf(data, unix.NFTA_LOOKUP_DREG)
	switch {
	case dreg == nil:
		r.say("%s %s%s", key, not, set)
	case be32(dreg) == unix.NFT_REG_VERDICT:
		r.say("%s %svmap %s", key, not, set)
	default:
		r.load(be32(dreg), &loaded{text: fmt.Sprintf("%s %smap %s", key, not, set), kind: raw(), size: 4})
	}
}

func (r *ruleWords) immediate(data []byte) bool {
	dreg, d := attrNumber(data, unix.NFTA_IMMEDIATE_DREG), attrOf(data, unix.NFTA_IMMEDIATE_DATA)
	if dreg == unix.NFT_REG_VERDICT {
		s := verdictText(attrOf(d, unix.NFTA_DATA_VERDICT))
		if s == "" {
			return false
		}
		r.say("%s", s)
		return true
	}
	val := attrOf(d, unix.NFTA_DATA_VALUE)
	if len(val) == 0 || len(val) > 64 {
		return false
	}
	r.load(dreg, &loaded{kind: kind{write: hexText}, size: len(val), constant: val})
	return true
}

// verdictText reads the attributes of a verdict; "" when there is none.
func verdictText(v []byte) string {
	code := attrOf(v, unix.NFTA_VERDICT_CODE)
	if len(code) < 4 {
		return ""
	}
	chain := attrText(v, unix.NFTA_VERDICT_CHAIN)
	switch n := int32(be32(code)); n {
	case verdictAccept:
		return "accept"
	case verdictDrop:
		return "drop"
	case unix.NFT_CONTINUE:
		return "continue"
	case unix.NFT_BREAK:
		return "break"
	case unix.NFT_RETURN:
		return "return"
	case unix.NFT_JUMP:
		return "jump " + identifier(chain)
	case unix.NFT_GOTO:
		return "goto " + identifier(chain)
	default:
		if n&0xff == 3 { // NF_QUEUE
			return fmt.Sprintf("queue to %d", n>>16)
		}
		return fmt.Sprintf("verdict %d", n)
	}
}

// payload reads from the packet, or writes to it.
func (r *ruleWords) payload(data []byte) bool {
	base, n := attrNumber(data, unix.NFTA_PAYLOAD_BASE), attrNumber(data, unix.NFTA_PAYLOAD_LEN)
	from := int64(attrNumber(data, unix.NFTA_PAYLOAD_OFFSET)) * 8
	if n < 1 || n > 64 {
		return false
	}
	p := place{base: base, from: from, to: from + int64(n)*8}
	switch base {
	case unix.NFT_PAYLOAD_LL_HEADER:
		p.header = r.link
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		p.header = r.network
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		p.header = transportHeader(r.protocol)
	}
	if sreg := attrOf(data, unix.NFTA_PAYLOAD_SREG); sreg != nil {
		r.write(p, be32(sreg))
		return true
	}
	v := &loaded{size: int(n), place: &p}
	v.text, v.kind = p.text()
	for _, f := range headerFields(p.header) {
		if int64(f.from) == p.from && p.to < int64(f.to) && (f.kind == kindIPv4 || f.kind == kindIPv6) {
			v.text, v.kind = p.header+" "+f.name, kindOf(f.kind)
		}
	}
	if p.header != "" && (!strings.HasPrefix(v.text, "@") || p.fields() != nil) {
		r.drop(p.header)
	}
	v.tests = tested(v.text)
	r.load(attrNumber(data, unix.NFTA_PAYLOAD_DREG), v)
	return true
}

// tested says what a comparison with a field tells of the headers.
func tested(field string) string {
	switch field {
	case "ip protocol", "ip6 nexthdr":
		return "l4proto"
	case "ether type":
		return "protocol"
	}
	return ""
}

// write is a payload statement: it changes the packet.
func (r *ruleWords) write(p place, sreg uint32) {
	s, k := p.text()
	v := r.one(sreg)
	if v != nil && v.merge != nil && *v.place == p {
		inverse := make([]byte, len(v.merge.mask))
		for i, m := range v.merge.mask {
			inverse[i] = ^m
		}
		if part, shift, ok := p.within(inverse); ok {
			r.drop(p.header)
			s, k := part.text()
			r.say("%s set %s", s, k.text(lowest(v.merge.xor, shift, part)))
			return
		}
	}
	if !strings.HasPrefix(s, "@") {
		r.drop(p.header)
	}
	r.say("%s set %s", s, r.operand(sreg, k))
}

func metaKind(key uint32) (string, kind) {
	number := func() kind { return kind{size: 4, host: true} }
	switch key {
	case unix.NFT_META_LEN:
		return "meta length", number()
	case unix.NFT_META_PROTOCOL:
		return "meta protocol", kindOf(kindEtherType)
	case unix.NFT_META_PRIORITY:
		return "meta priority", kindOf(kindClass)
	case unix.NFT_META_MARK:
		return "meta mark", kindOf(kindMark)
	case unix.NFT_META_IIF:
		return "iif", kindOf(kindIndex)
	case unix.NFT_META_OIF:
		return "oif", kindOf(kindIndex)
	case unix.NFT_META_IIFNAME:
		return "iifname", kindOf(kindIfname)
	case unix.NFT_META_OIFNAME:
		return "oifname", kindOf(kindIfname)
	case unix.NFT_META_IIFTYPE:
		return "meta iiftype", kindOf(kindIfType)
	case unix.NFT_META_OIFTYPE:
		return "meta oiftype", kindOf(kindIfType)
	case unix.NFT_META_SKUID:
		return "meta skuid", kindOf(kindUser)
	case unix.NFT_META_SKGID:
		return "meta skgid", kindOf(kindGroup)
	case unix.NFT_META_NFTRACE:
		return "meta nftrace", kind{size: 1}
	case unix.NFT_META_RTCLASSID:
		return "meta rtclassid", kindOf(kindRealm)
	case unix.NFT_META_SECMARK:
		return "meta secmark", number()
	case unix.NFT_META_NFPROTO:
		return "meta nfproto", kindOf(kindFamily)
	case unix.NFT_META_L4PROTO:
		return "meta l4proto", kindOf(kindProtocol)
	case unix.NFT_META_BRI_IIFNAME:
		return "meta ibrname", kindOf(kindIfname)
	case unix.NFT_META_BRI_OIFNAME:
		return "meta obrname", kindOf(kindIfname)
	case unix.NFT_META_PKTTYPE:
		return "meta pkttype", kindOf(kindPacket)
	case unix.NFT_META_CPU:
		return "meta cpu", number()
	case unix.NFT_META_IIFGROUP:
		return "iifgroup", kindOf(kindDevGroup)
	case unix.NFT_META_OIFGROUP:
		return "oifgroup", kindOf(kindDevGroup)
	case unix.NFT_META_CGROUP:
		return "meta cgroup", number()
	case unix.NFT_META_PRANDOM:
		return "meta random", kind{size: 4}
	case metaSecpath:
		return "meta ipsec", kindOf(kindBoolean)
	case 26:
		return "meta iifkind", kindOf(kindIfname)
	case 27:
		return "meta oifkind", kindOf(kindIfname)
	case 28:
		return "meta ibrpvid", kind{size: 2, host: true}
	case 29:
		return "meta ibrvproto", kindOf(kindEtherType)
	case metaTimeNS:
		return "meta time", kindOf(kindMoment)
	case metaTimeDay:
		return "meta day", kindOf(kindDay)
	case metaTimeHour:
		return "meta hour", kindOf(kindHour)
	case metaSDIF:
		return "meta sdif", kindOf(kindIndex)
	case metaSDIFName:
		return "meta sdifname", kindOf(kindIfname)
	}
	return "", kind{}
}

func (r *ruleWords) meta(data []byte) bool {
	key := attrNumber(data, unix.NFTA_META_KEY)
	text, k := metaKind(key)
	if text == "" {
		return false
	}
	if sreg := attrOf(data, unix.NFTA_META_SREG); sreg != nil {
		r.say("%s set %s", text, r.operand(be32(sreg), k))
		return true
	}
	v := &loaded{text: text, kind: k, size: k.size}
	switch key {
	case unix.NFT_META_L4PROTO:
		v.tests = "l4proto"
	case unix.NFT_META_NFPROTO:
		v.tests = "nfproto"
	case unix.NFT_META_PROTOCOL:
		v.tests = "protocol"
	case unix.NFT_META_IIFTYPE:
		v.tests = "iiftype"
	case metaSecpath:
		v.named = true
	}
	r.load(attrNumber(data, unix.NFTA_META_DREG), v)
	return true
}

func ctKind(key uint32) (string, kind) {
	switch key {
	case unix.NFT_CT_STATE:
		return "state", kindOf(kindState)
	case unix.NFT_CT_DIRECTION:
		return "direction", kindOf(kindDirection)
	case unix.NFT_CT_STATUS:
		return "status", kindOf(kindStatus)
	case unix.NFT_CT_MARK:
		return "mark", kindOf(kindMark)
	case unix.NFT_CT_SECMARK:
		return "secmark", kind{size: 4, host: true}
	case unix.NFT_CT_EXPIRATION:
		k := kindOf(kindTime)
		k.size = 4
		return "expiration", k
	case unix.NFT_CT_HELPER:
		k := kindOf(kindString)
		k.size = 16
		return "helper", k
	case unix.NFT_CT_L3PROTOCOL:
		return "l3proto", kindOf(kindFamily)
	case unix.NFT_CT_SRC:
		return "saddr", kind{write: addressText, size: 16}
	case unix.NFT_CT_DST:
		return "daddr", kind{write: addressText, size: 16}
	case unix.NFT_CT_PROTOCOL:
		return "protocol", kindOf(kindProtocol)
	case unix.NFT_CT_PROTO_SRC:
		return "proto-src", kindOf(kindPort)
	case unix.NFT_CT_PROTO_DST:
		return "proto-dst", kindOf(kindPort)
	case unix.NFT_CT_LABELS:
		return "label", kindOf(kindLabel)
	case unix.NFT_CT_PKTS:
		return "packets", kind{size: 8, host: true}
	case unix.NFT_CT_BYTES:
		return "bytes", kind{size: 8, host: true}
	case unix.NFT_CT_AVGPKT:
		return "avgpkt", kind{size: 8, host: true}
	case unix.NFT_CT_ZONE:
		return "zone", kind{size: 2, host: true}
	case unix.NFT_CT_EVENTMASK:
		return "event", kindOf(kindEvent)
	case unix.NFT_CT_SRC_IP:
		return "ip saddr", kindOf(kindIPv4)
	case unix.NFT_CT_DST_IP:
		return "ip daddr", kindOf(kindIPv4)
	case unix.NFT_CT_SRC_IP6:
		return "ip6 saddr", kindOf(kindIPv6)
	case unix.NFT_CT_DST_IP6:
		return "ip6 daddr", kindOf(kindIPv6)
	case unix.NFT_CT_ID:
		return "id", kind{size: 4, hex: 8}
	}
	return "", kind{}
}

// ofDirection reports whether a key exists only in one direction of a flow.
func ofDirection(key uint32) bool {
	switch key {
	case unix.NFT_CT_SRC, unix.NFT_CT_DST, unix.NFT_CT_PROTO_SRC, unix.NFT_CT_PROTO_DST,
		unix.NFT_CT_SRC_IP, unix.NFT_CT_DST_IP, unix.NFT_CT_SRC_IP6, unix.NFT_CT_DST_IP6:
		return true
	}
	return false
}

func (r *ruleWords) ct(data []byte) bool {
	key := attrNumber(data, unix.NFTA_CT_KEY)
	text, k := ctKind(key)
	if text == "" {
		return false
	}
	switch dir := attrOf(data, unix.NFTA_CT_DIRECTION); {
	case len(dir) == 1:
		text = kindOf(kindDirection).text(dir) + " " + text
	case dir != nil:
		return false
	case ofDirection(key):
		text = "original " + text // the number of which is zero, and left out
	}
	text = "ct " + text
	if sreg := attrOf(data, unix.NFTA_CT_SREG); sreg != nil {
		r.say("%s set %s", text, r.operand(be32(sreg), k))
		return true
	}
	r.load(attrNumber(data, unix.NFTA_CT_DREG), &loaded{text: text, kind: k, size: k.size})
	return true
}

func (r *ruleWords) fib(data []byte) bool {
	flags := attrNumber(data, unix.NFTA_FIB_FLAGS)
	var by []string
	for _, f := range []bitName{{unix.NFTA_FIB_F_SADDR, "saddr"}, {unix.NFTA_FIB_F_DADDR, "daddr"}, {unix.NFTA_FIB_F_MARK, "mark"}, {unix.NFTA_FIB_F_IIF, "iif"}, {unix.NFTA_FIB_F_OIF, "oif"}} {
		if uint64(flags)&f.bit != 0 {
			by = append(by, f.name)
		}
	}
	v := &loaded{size: 4}
	var what string
	switch attrNumber(data, unix.NFTA_FIB_RESULT) {
	case unix.NFT_FIB_RESULT_OIF:
		what, v.kind = "oif", kindOf(kindIndex)
	case unix.NFT_FIB_RESULT_OIFNAME:
		what, v.kind, v.size = "oifname", kindOf(kindIfname), unix.IFNAMSIZ
	case unix.NFT_FIB_RESULT_ADDRTYPE:
		what, v.kind = "type", kindOf(kindAddrType)
	default:
		return false
	}
	if flags&unix.NFTA_FIB_F_PRESENT != 0 {
		v.kind, v.size, v.named = kindOf(kindBoolean), 1, true
	}
	v.text = fmt.Sprintf("fib %s %s", strings.Join(by, " . "), what)
	r.load(attrNumber(data, unix.NFTA_FIB_DREG), v)
	return true
}

func (r *ruleWords) rt(data []byte) bool {
	v := &loaded{}
	switch attrNumber(data, unix.NFTA_RT_KEY) {
	case unix.NFT_RT_CLASSID:
		v.text, v.kind = "rt classid", kindOf(kindRealm)
	case unix.NFT_RT_NEXTHOP4:
		v.text, v.kind = "rt ip nexthop", kindOf(kindIPv4)
	case unix.NFT_RT_NEXTHOP6:
		v.text, v.kind = "rt ip6 nexthop", kindOf(kindIPv6)
	case unix.NFT_RT_TCPMSS:
		v.text, v.kind = "rt mtu", kind{size: 2, host: true}
	case 4: // NFT_RT_XFRM
		v.text, v.kind, v.named = "rt ipsec", kindOf(kindBoolean), true
	default:
		return false
	}
	v.size = v.kind.size
	r.load(attrNumber(data, unix.NFTA_RT_DREG), v)
	return true
}

// socket and those below have attributes that golang.org/x/sys does not know: they
// stand as numbers (uapi/linux/netfilter/nf_tables.h).
func (r *ruleWords) socket(data []byte) bool {
	v := &loaded{}
	switch attrNumber(data, 1) { // NFTA_SOCKET_KEY
	case 0:
		v.text, v.kind = "socket transparent", kind{size: 1}
	case 1:
		v.text, v.kind = "socket mark", kindOf(kindMark)
	case 2:
		v.text, v.kind = "socket wildcard", kind{size: 1}
	case 3:
		v.text, v.kind = fmt.Sprintf("socket cgroupv2 level %d", attrNumber(data, 3)), kindOf(46)
	default:
		return false
	}
	v.size = v.kind.size
	r.load(attrNumber(data, 2), v)
	return true
}

// fingerprint reads osf: the operating system by its SYN.
func (r *ruleWords) fingerprint(data []byte) bool {
	text := "osf "
	if ttl := attrOf(data, 2); len(ttl) == 1 && ttl[0] != 0 {
		text += fmt.Sprintf("ttl %s ", kind{names: names(1, "loose", "skip")}.text(ttl))
	}
	switch attrNumber(data, 3) {
	case 0:
		text += "name"
	case 1:
		text += "version"
	default:
		return false
	}
	r.load(attrNumber(data, 1), &loaded{text: text, kind: kindOf(kindString), size: 16})
	return true
}

func (r *ruleWords) xfrm(data []byte) bool {
	dir := attrOf(data, 3)
	if len(dir) != 1 || dir[0] > 1 {
		return false
	}
	v := &loaded{}
	switch attrNumber(data, 2) {
	case 1:
		v.text, v.kind = "ip daddr", kindOf(kindIPv4)
	case 2:
		v.text, v.kind = "ip6 daddr", kindOf(kindIPv6)
	case 3:
		v.text, v.kind = "ip saddr", kindOf(kindIPv4)
	case 4:
		v.text, v.kind = "ip6 saddr", kindOf(kindIPv6)
	case 5:
		v.text, v.kind = "reqid", kind{size: 4, host: true}
	case 6:
		v.text, v.kind = "spi", kind{size: 4}
	default:
		return false
	}
	spnum := ""
	if n := attrNumber(data, 4); n != 0 {
		spnum = fmt.Sprintf("spnum %d ", n)
	}
	v.text = fmt.Sprintf("ipsec %s %s%s", []string{"in", "out"}[dir[0]], spnum, v.text)
	v.size = v.kind.size
	r.load(attrNumber(data, 1), v)
	return true
}

func (r *ruleWords) numgen(data []byte) {
	mode := map[uint32]string{unix.NFT_NG_INCREMENTAL: "inc", unix.NFT_NG_RANDOM: "random"}[attrNumber(data, unix.NFTA_NG_TYPE)]
	if mode == "" {
		mode = fmt.Sprintf("type%d", attrNumber(data, unix.NFTA_NG_TYPE))
	}
	text := fmt.Sprintf("numgen %s mod %d", mode, attrNumber(data, unix.NFTA_NG_MODULUS))
	if n := attrNumber(data, unix.NFTA_NG_OFFSET); n != 0 {
		text += fmt.Sprintf(" offset %d", n)
	}
	r.load(attrNumber(data, unix.NFTA_NG_DREG), &loaded{text: text, kind: kind{host: true}, size: 4})
}

func (r *ruleWords) hash(data []byte) {
	text := "symhash"
	if attrNumber(data, unix.NFTA_HASH_TYPE) == unix.NFT_HASH_JENKINS {
		text = "jhash " + r.key(attrNumber(data, unix.NFTA_HASH_SREG))
	}
	text += fmt.Sprintf(" mod %d", attrNumber(data, unix.NFTA_HASH_MODULUS))
	if seed := attrOf(data, unix.NFTA_HASH_SEED); seed != nil && be32(seed) != 0 {
		text += fmt.Sprintf(" seed 0x%x", be32(seed))
	}
	if n := attrNumber(data, unix.NFTA_HASH_OFFSET); n != 0 {
		text += fmt.Sprintf(" offset %d", n)
	}
	r.load(attrNumber(data, unix.NFTA_HASH_DREG), &loaded{text: text, kind: kind{host: true}, size: 4})
}

func (r *ruleWords) dynset(data []byte) bool {
	op := attrNumber(data, unix.NFTA_DYNSET_OP)
	if op > 2 {
		return false
	}
	el := r.key(attrNumber(data, unix.NFTA_DYNSET_SREG_KEY))
	if ms := value64(attrOf(data, unix.NFTA_DYNSET_TIMEOUT)); ms != 0 {
		el += " timeout " + durationText(ms)
	}
	for _, e := range statefulExpressions(data, walkDynsetExprs, unix.NFTA_DYNSET_EXPR) {
		el += " " + statefulText(e)
	}
	if sreg := attrOf(data, unix.NFTA_DYNSET_SREG_DATA); sreg != nil {
		el += " : " + r.operand(be32(sreg), kind{write: hexText}) // the map knows of what kind it is
	}
	r.say("%s @%s { %s }", []string{"add", "update", "delete"}[op], identifier(attrText(data, unix.NFTA_DYNSET_SET_NAME)), el)
	if attrNumber(data, unix.NFTA_DYNSET_FLAGS)&unix.NFT_DYNSET_F_INV != 0 {
		r.say("[inverted]")
	}
	return true
}

func (r *ruleWords) objref(data []byte) bool {
	if set := attrOf(data, unix.NFTA_OBJREF_SET_NAME); set != nil {
		// The kind of the objects stands in the map.
		r.say("object name %s map %s", r.key(attrNumber(data, unix.NFTA_OBJREF_SET_SREG)), r.set(cString(set)))
		return true
	}
	typ, name := attrNumber(data, unix.NFTA_OBJREF_IMM_TYPE), quoted(attrText(data, unix.NFTA_OBJREF_IMM_NAME))
	switch typ {
	case unix.NFT_OBJECT_COUNTER, unix.NFT_OBJECT_QUOTA, unix.NFT_OBJECT_LIMIT, objectSynproxy, unix.NFT_OBJECT_CONNLIMIT:
		r.say("%s name %s", objectName(typ), name)
	case unix.NFT_OBJECT_CT_HELPER, objectTimeout, objectExpect:
		r.say("%s set %s", objectName(typ), name)
	case objectSecmark:
		r.say("meta secmark set %s", name)
	default:
		return false
	}
	return true
}

// objectName is the word for a type of object.
func objectName(typ uint32) string {
	s := map[uint32]string{
		unix.NFT_OBJECT_COUNTER: "counter", unix.NFT_OBJECT_QUOTA: "quota", unix.NFT_OBJECT_CT_HELPER: "ct helper", unix.NFT_OBJECT_LIMIT: "limit",
		unix.NFT_OBJECT_CONNLIMIT: "ct count", unix.NFT_OBJECT_TUNNEL: "tunnel", objectTimeout: "ct timeout", objectSecmark: "secmark",
		objectExpect: "ct expectation", objectSynproxy: "synproxy",
	}[typ]
	if s == "" {
		return fmt.Sprintf("object of type %d", typ)
	}
	return s
}
