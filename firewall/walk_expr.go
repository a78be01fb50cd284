package firewall

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Expressions of nf_tables (net/netfilter/nft_*.c).

// eval runs one expression. Any that is not known here makes the rule one that
// cannot be told.
func (r *ruleRun) eval(e liveExpr) {
	switch e.name {
	case "meta":
		r.meta(e.data)
	case "payload":
		r.payload(e.data)
	case "cmp":
		r.cmp(e.data)
	case "range":
		r.inRange(e.data)
	case "bitwise":
		r.bitwise(e.data)
	case "byteorder":
		r.byteorder(e.data)
	case "lookup":
		r.lookup(e.data)
	case "immediate":
		r.immediate(e.data)
	case "ct":
		r.ct(e.data)
	case "fib":
		r.fib(e.data)
	case "exthdr":
		r.exthdr(e.data)
	case "reject":
		r.reject(e.data)
	case "limit", "quota", "connlimit":
		r.kept(e.name, e.data)
	case "dynset":
		r.dynset(e.data)
	case "objref":
		r.objref(e.data)
	case "nat", "redir", "masq":
		r.nat(e.name, e.data)
	case "notrack":
		r.notrack()
	case "queue":
		r.outside(fmt.Sprintf("a program decides (queue %d)", be16(attrOf(e.data, unix.NFTA_QUEUE_NUM))))
	case "synproxy":
		r.outside("synproxy answers")
	case "fwd":
		r.outside("sent out by another interface (fwd)")
	case "counter", "log", "last", "dup", "flow_offload":
		// They see the packet and leave it alone.
	case "match":
		r.match(e.data)
	case "target":
		r.xtTarget(e.data)
	case "numgen":
		r.numgen(e.data)
	default:
		r.reg.forget()
		r.meet(maybe, false, "expression "+e.name)
	}
}

// numgen draws a number: what is then compared or looked up cannot be told, unless
// there is but one to draw.
func (r *ruleRun) numgen(data []byte) {
	b := blank(4, "numgen")
	if attrNumber(data, unix.NFTA_NG_MODULUS) == 1 {
		b = sure(native32(attrNumber(data, unix.NFTA_NG_OFFSET)), "numgen", asNative)
	}
	r.reg.set(attrNumber(data, unix.NFTA_NG_DREG), b)
}

func be16(b []byte) uint16 {
	if len(b) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(b)
}

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

// dataValue reads the plain bytes of a data attribute.
func dataValue(attrs []byte, typ uint16) []byte {
	return attrOf(attrOf(attrs, typ), unix.NFTA_DATA_VALUE)
}

// Keys of meta that golang.org/x/sys lacks.
const (
	metaSecpath  = 25
	metaTimeNS   = 30
	metaTimeDay  = 31
	metaTimeHour = 32
	metaSDIF     = 33
	metaSDIFName = 34
)

func (r *ruleRun) meta(data []byte) {
	key := attrNumber(data, unix.NFTA_META_KEY)
	if sreg := attrOf(data, unix.NFTA_META_SREG); sreg != nil {
		if r.acts() && key == unix.NFT_META_MARK {
			b := r.reg.get(be32(sreg), 4)
			b.about, b.kind = "meta mark", asNative
			r.w.p.mark.put(0, b, r.sure())
			r.w.p.mark.about = b.about
		}
		return
	}
	b, ok := r.w.metaValue(key)
	if !ok {
		r.meet(no, false, "")
		return
	}
	r.reg.set(attrNumber(data, unix.NFTA_META_DREG), b)
}

func nameBytes(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// metaValue is what meta loads (nft_meta_get_eval); not ok ends the rule.
func (w *walker) metaValue(key uint32) (bits, bool) {
	const anyInterface = "the packet enters by an interface that no rule names"
	const noDevice = "no VRF"
	switch key {
	case unix.NFT_META_PROTOCOL:
		if w.p.v4 {
			return sure([]byte{0x08, 0x00}, "meta protocol", asNumber), true
		}
		return sure([]byte{0x86, 0xdd}, "meta protocol", asNumber), true
	case unix.NFT_META_NFPROTO:
		proto := byte(unix.NFPROTO_IPV6)
		if w.p.v4 {
			proto = unix.NFPROTO_IPV4
		}
		return sure([]byte{proto}, "meta nfproto", asFamily), true
	case unix.NFT_META_L4PROTO:
		return sure([]byte{byte(w.packet.Protocol)}, "meta l4proto", asProtocol), true
	case unix.NFT_META_IIFNAME:
		if w.in == "" {
			return assumed(nameBytes(""), "iifname", asName, anyInterface), true
		}
		return sure(nameBytes(w.in), "iifname", asName), true
	case unix.NFT_META_IIF:
		if w.in == "" {
			return assumed(native32(0), "iif", asNative, anyInterface), true
		}
		if l, ok := w.host.links[w.in]; ok {
			return sure(native32(l.index), "iif", asNative), true
		}
		return blank(4, "iif"), true
	case unix.NFT_META_IIFGROUP:
		if l, ok := w.host.links[w.in]; ok {
			return sure(native32(l.group), "iifgroup", asNative), true
		}
		return blank(4, "iifgroup"), true
	case unix.NFT_META_OIFNAME:
		return w.p.outName, true
	case unix.NFT_META_OIF:
		return w.p.outIndex, true
	case unix.NFT_META_OIFGROUP, unix.NFT_META_OIFTYPE:
		// Without an outgoing device they end the rule.
		return blank(4, "the outgoing interface"), w.hk >= unix.NF_INET_FORWARD
	case unix.NFT_META_MARK:
		return w.p.mark, true
	case unix.NFT_META_NFTRACE:
		return assumed([]byte{0}, "meta nftrace", asNumber, "the packet is not traced"), true
	case unix.NFT_META_SKUID, unix.NFT_META_SKGID:
		// No socket is known to the first packet of a flow.
		return blank(4, "the owner of a socket"), w.packet.Flow != rules.NewFlow && w.hk == unix.NF_INET_LOCAL_IN || w.hk >= unix.NF_INET_LOCAL_OUT
	case unix.NFT_META_PKTTYPE:
		if a, ok := addressIn(w.p.dst()); ok {
			switch w.addrType(a, false) {
			case unix.RTN_MULTICAST:
				return sure([]byte{2}, "meta pkttype", asNumber), true
			case unix.RTN_BROADCAST:
				return sure([]byte{1}, "meta pkttype", asNumber), true
			}
			return assumed([]byte{0}, "meta pkttype", asNumber, "the packet came in a frame for this host alone"), true
		}
		return blank(1, "meta pkttype"), true
	case metaSecpath:
		return assumed([]byte{0}, "meta secpath", asNumber, "the packet did not come through IPsec"), true
	case metaSDIF:
		return assumed(native32(0), "sdif", asNative, noDevice), true
	case metaSDIFName:
		return assumed(nameBytes(""), "sdifname", asName, noDevice), true
	case metaTimeNS:
		return blank(8, "the time"), true
	case metaTimeDay:
		return blank(1, "the day"), true
	case metaTimeHour:
		return blank(4, "the hour"), true
	case unix.NFT_META_LEN:
		return blank(4, "the length of the packet"), true
	}
	return blank(16, fmt.Sprintf("meta key %d", key)), true
}

// addrType is the kernel's type of an address; 0 means that there is no telling.
func (w *walker) addrType(a netip.Addr, source bool) int {
	switch {
	case a.IsMulticast():
		return unix.RTN_MULTICAST
	case a.Is4() && (a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || a.As4()[0] == 0):
		return unix.RTN_BROADCAST
	case w.host.addrs[a]:
		return unix.RTN_LOCAL
	case source && w.host.route == nil:
		return 0
	case w.host.route != nil:
		if typ, _, ok := w.host.route(a); ok {
			return typ
		}
	}
	return 0
}

func (r *ruleRun) payload(data []byte) {
	base, at, n := int(attrNumber(data, unix.NFTA_PAYLOAD_BASE)), int(attrNumber(data, unix.NFTA_PAYLOAD_OFFSET)), int(attrNumber(data, unix.NFTA_PAYLOAD_LEN))
	if at > 1<<16 || n > 64 || at < 0 || n < 0 {
		r.reg.forget()
		r.meet(maybe, false, "an odd payload")
		return
	}
	p := &r.w.p
	if sreg := attrOf(data, unix.NFTA_PAYLOAD_SREG); sreg != nil {
		if !r.acts() {
			return
		}
		b := r.reg.get(be32(sreg), n)
		switch base {
		case unix.NFT_PAYLOAD_NETWORK_HEADER:
			p.network.put(at, b, r.sure())
		case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
			p.transport.put(at, b, r.sure())
		}
		r.rewritten(fmt.Sprintf("%s set", p.load(base, at, n, r.w.packet.Protocol).about))
		return
	}
	r.reg.set(attrNumber(data, unix.NFTA_PAYLOAD_DREG), p.load(base, at, n, r.w.packet.Protocol))
}

// rewritten remembers that the packet is no longer what came from the wire.
func (r *ruleRun) rewritten(text string) {
	r.rewrite = true
	r.w.rewrites++
	r.say("%s", text)
}

func (r *ruleRun) cmp(data []byte) {
	want := dataValue(data, unix.NFTA_CMP_DATA)
	b := r.reg.get(attrNumber(data, unix.NFTA_CMP_SREG), len(want))
	op := attrNumber(data, unix.NFTA_CMP_OP)
	word := [...]string{"", "!= ", "< ", "<= ", "> ", ">= "}
	if int(op) >= len(word) || len(b.val) != len(want) {
		r.meet(maybe, false, "an odd comparison")
		return
	}
	t, soft := b.equal(want)
	if op > unix.NFT_CMP_NEQ {
		soft = b.assumes()
		lo, hi := bytes.Compare(b.low(), want), bytes.Compare(b.high(), want)
		t = order(op, lo, hi)
	} else if op == unix.NFT_CMP_NEQ {
		t = t.not()
	}
	r.say("%s", compared(b, word[op], want))
	r.answer(b, t, soft)
}

func (r *ruleRun) answer(b bits, t truth, soft bool) {
	why := b.why
	if t == maybe {
		why = "it depends on " + b.about
		if b.about == "" {
			why = "it depends on what is not known here"
		}
	}
	r.meet(t, soft, why)
}

// order answers <, <=, >, >= from where the bounds of the value lie.
func order(op uint32, lo, hi int) truth {
	var least, most bool
	switch op {
	case unix.NFT_CMP_LT:
		least, most = lo < 0, hi < 0
	case unix.NFT_CMP_LTE:
		least, most = lo <= 0, hi <= 0
	case unix.NFT_CMP_GT:
		least, most = lo > 0, hi > 0
	default:
		least, most = lo >= 0, hi >= 0
	}
	switch {
	case least && most:
		return yes
	case !least && !most:
		return no
	}
	return maybe
}

func (r *ruleRun) inRange(data []byte) {
	from, to := dataValue(data, unix.NFTA_RANGE_FROM_DATA), dataValue(data, unix.NFTA_RANGE_TO_DATA)
	b := r.reg.get(attrNumber(data, unix.NFTA_RANGE_SREG), len(from))
	if len(from) != len(to) || len(b.val) != len(from) {
		r.meet(maybe, false, "an odd range")
		return
	}
	t := maybe
	switch {
	case bytes.Compare(b.low(), from) >= 0 && bytes.Compare(b.high(), to) <= 0:
		t = yes
	case bytes.Compare(b.high(), from) < 0 || bytes.Compare(b.low(), to) > 0:
		t = no
	}
	sign := ""
	if attrNumber(data, unix.NFTA_RANGE_OP) == unix.NFT_RANGE_NEQ {
		t, sign = t.not(), "!= "
	}
	r.say("%s %s%s-%s", b.about, sign, written(b.kind, from), written(b.kind, to))
	r.answer(b, t, b.assumes())
}

func (r *ruleRun) bitwise(data []byte) {
	n := int(attrNumber(data, unix.NFTA_BITWISE_LEN))
	dreg := attrNumber(data, unix.NFTA_BITWISE_DREG)
	b := r.reg.get(attrNumber(data, unix.NFTA_BITWISE_SREG), n)
	mask, xor := dataValue(data, unix.NFTA_BITWISE_MASK), dataValue(data, unix.NFTA_BITWISE_XOR)
	const boolean, bitwiseOp = 0, 6 // NFT_BITWISE_BOOL, NFTA_BITWISE_OP
	if attrNumber(data, bitwiseOp) != boolean || len(mask) != len(b.val) || len(xor) != len(b.val) {
		r.reg.set(dreg, blank(len(b.val), b.about))
		return
	}
	for i := range b.val {
		b.known[i] |= ^mask[i]
		b.soft[i] &= mask[i]
		b.val[i] = (b.val[i]&mask[i] ^ xor[i]) & b.known[i]
	}
	switch {
	case b.kind == asAddress4, b.kind == asAddress6:
		b.about += "/" + prefixLength(mask)
	case b.kind == asState:
		b.about += " " + stateNames(mask)
	default:
		b.about = fmt.Sprintf("%s & %#x", b.about, mask)
	}
	r.reg.set(dreg, b)
}

func prefixLength(mask []byte) string {
	ones, ended := 0, false
	for _, m := range mask {
		for bit := byte(0x80); bit != 0; bit >>= 1 {
			switch {
			case m&bit == 0:
				ended = true
			case ended:
				return hex.EncodeToString(mask)
			default:
				ones++
			}
		}
	}
	return fmt.Sprint(ones)
}

func (r *ruleRun) byteorder(data []byte) {
	n, size := int(attrNumber(data, unix.NFTA_BYTEORDER_LEN)), int(attrNumber(data, unix.NFTA_BYTEORDER_SIZE))
	b := r.reg.get(attrNumber(data, unix.NFTA_BYTEORDER_SREG), n)
	if size != 2 && size != 4 && size != 8 || n%size != 0 {
		b = blank(len(b.val), b.about)
	} else if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		for _, part := range [][]byte{b.val, b.known, b.soft} {
			for i := 0; i+size <= len(part); i += size {
				for k := range size / 2 {
					part[i+k], part[i+size-1-k] = part[i+size-1-k], part[i+k]
				}
			}
		}
	}
	r.reg.set(attrNumber(data, unix.NFTA_BYTEORDER_DREG), b)
}

func (r *ruleRun) immediate(data []byte) {
	dreg, d := attrNumber(data, unix.NFTA_IMMEDIATE_DREG), attrOf(data, unix.NFTA_IMMEDIATE_DATA)
	if dreg == unix.NFT_REG_VERDICT {
		r.verdictData(d)
		return
	}
	r.reg.set(dreg, sure(attrOf(d, unix.NFTA_DATA_VALUE), "", asNumber))
}

func (r *ruleRun) verdictData(d []byte) {
	v := attrOf(d, unix.NFTA_DATA_VERDICT)
	if len(attrOf(v, unix.NFTA_VERDICT_CODE)) < 4 {
		r.outside("a verdict that cannot be read")
		return
	}
	r.setVerdict(int32(attrNumber(v, unix.NFTA_VERDICT_CODE)), attrText(v, unix.NFTA_VERDICT_CHAIN))
}

// find looks a register up in a set: the element, and whether there is one.
func (r *ruleRun) find(name string, sreg uint32) (el []byte, key bits, set *liveSet, t truth) {
	set = r.t.sets[name]
	if set == nil {
		return nil, blank(0, "set "+name), nil, maybe
	}
	key = r.reg.get(sreg, set.keyLen)
	if set.keyLen <= 0 || set.keyLen > 64 {
		return nil, key, set, maybe
	}
	if !key.complete() {
		return nil, key, set, r.findPart(set, key)
	}
	el, err := r.w.sets.element(r.t, set, key.val)
	switch {
	case err != nil:
		r.w.err = err
		return nil, key, set, maybe
	case el == nil:
		return nil, key, set, no
	}
	return el, key, set, yes
}

// findPart looks up a key that is known in part: it may be that no element
// matches whatever the rest is.
func (r *ruleRun) findPart(set *liveSet, key bits) truth {
	all, err := r.w.sets.allElements(r.t, set)
	if err != nil {
		r.w.err = err
	}
	if all == nil || err != nil {
		return maybe
	}
	for _, el := range all {
		if set.mayHold(el, key) {
			return maybe
		}
	}
	return no
}

func (r *ruleRun) lookup(data []byte) {
	name := attrText(data, unix.NFTA_LOOKUP_SET)
	inverted := attrNumber(data, unix.NFTA_LOOKUP_FLAGS)&unix.NFT_LOOKUP_F_INV != 0
	dreg := attrOf(data, unix.NFTA_LOOKUP_DREG)
	el, key, set, t := r.find(name, attrNumber(data, unix.NFTA_LOOKUP_SREG))
	in := "@" + name
	if set != nil && set.flags&unix.NFT_SET_ANONYMOUS != 0 && key.complete() {
		in = "{ " + written(key.kind, key.val) + " }"
	}
	switch {
	case inverted:
		t = t.not()
		r.say("%s != %s", key.about, in)
	case dreg != nil && be32(dreg) == unix.NFT_REG_VERDICT:
		r.say("%s vmap %s", key.about, in)
	default:
		r.say("%s %s", key.about, in)
	}
	r.answer(key, t, key.assumes())
	switch {
	case t == maybe && dreg != nil && be32(dreg) == unix.NFT_REG_VERDICT:
		r.choose(set, key)
	case t == maybe:
		r.reg.forget()
	case t == yes && el != nil:
		if r.stateful(el); r.over() {
			return
		}
		if dreg == nil {
			return
		}
		d := attrOf(el, unix.NFTA_SET_ELEM_DATA)
		if be32(dreg) == unix.NFT_REG_VERDICT {
			r.verdictData(d)
			return
		}
		b := sure(attrOf(d, unix.NFTA_DATA_VALUE), key.about+" map "+in, asNumber)
		if key.assumes() {
			fill(b.soft)
			b.why = key.why
		}
		r.reg.set(be32(dreg), b)
	case dreg != nil && !inverted && t == no && r.guessed:
		r.reg.forget()
	}
}

// choose takes every verdict of a map that a key, known in part, may lead to: as
// where kube-proxy draws one of the endpoints of a service.
func (r *ruleRun) choose(set *liveSet, key bits) {
	var all [][]byte
	if set != nil && set.keyLen > 0 && set.keyLen <= 64 {
		var err error
		if all, err = r.w.sets.allElements(r.t, set); err != nil {
			r.w.err = err
		}
	}
	if all == nil {
		r.outside("the verdict depends on " + key.about)
		return
	}
	if !r.acts() {
		return
	}
	for _, el := range all {
		if !set.mayHold(el, key) {
			continue
		}
		one := *r
		one.words, one.end = nil, endNone
		one.verdictData(attrOf(el, unix.NFTA_SET_ELEM_DATA))
		r.choices = append(r.choices, way{one.end, one.target})
	}
	r.end = endChoice
	r.say("one of %d", len(r.choices))
}

// stateful runs the expressions that an element carries: a limit there can end
// the rule.
func (r *ruleRun) stateful(el []byte) {
	list := expressions(attrOf(el, walkElemExprs))
	if single := attrOf(el, unix.NFTA_SET_ELEM_EXPR); single != nil {
		list = append(list, liveExpr{attrText(single, unix.NFTA_EXPR_NAME), attrOf(single, unix.NFTA_EXPR_DATA)})
	}
	for _, e := range list {
		if r.over() {
			return
		}
		r.eval(e)
	}
}

// kept takes a limit, a quota or a count of connections as kept.
func (r *ruleRun) kept(name string, data []byte) {
	flag := map[string]uint16{"limit": unix.NFTA_LIMIT_FLAGS, "quota": unix.NFTA_QUOTA_FLAGS, "connlimit": 2}[name]
	over := attrNumber(data, flag)&1 != 0 // NFT_LIMIT_F_INV, NFT_QUOTA_F_INV, NFT_CONNLIMIT_F_INV
	what := map[string]string{"limit": "the rate limit", "quota": "the quota", "connlimit": "the limit of connections"}[name]
	t := yes
	if over {
		t = no
		r.say("%s over", name)
	} else {
		r.say("%s", name)
	}
	r.meet(t, true, fmt.Sprintf("%s in table %s %s, chain %s is not reached", what, r.t.name(), r.t.title, r.w.at.Chain))
}

func (r *ruleRun) dynset(data []byte) {
	const opDelete = 2 // NFT_DYNSET_OP_DELETE
	if attrNumber(data, unix.NFTA_DYNSET_OP) == opDelete {
		return
	}
	name := attrText(data, unix.NFTA_DYNSET_SET_NAME)
	r.say("update @%s", name)
	list := expressions(attrOf(data, walkDynsetExprs))
	if single := attrOf(data, unix.NFTA_DYNSET_EXPR); single != nil {
		list = append(list, liveExpr{attrText(single, unix.NFTA_EXPR_NAME), attrOf(single, unix.NFTA_EXPR_DATA)})
	}
	for _, e := range list {
		r.eval(e)
		if r.over() {
			return
		}
	}
	t := yes
	if attrNumber(data, unix.NFTA_DYNSET_FLAGS)&unix.NFT_DYNSET_F_INV != 0 {
		t = no
	}
	r.meet(t, true, fmt.Sprintf("set %s of table %s %s has room", name, r.t.name(), r.t.title))
}

// Types of objects that golang.org/x/sys lacks.
const (
	objectTimeout  = 7
	objectSecmark  = 8
	objectExpect   = 9
	objectSynproxy = 10
)

func (r *ruleRun) objref(data []byte) {
	typ, name := attrNumber(data, unix.NFTA_OBJREF_IMM_TYPE), attrText(data, unix.NFTA_OBJREF_IMM_NAME)
	if m := attrOf(data, unix.NFTA_OBJREF_SET_NAME); m != nil {
		el, key, set, t := r.find(cString(m), attrNumber(data, unix.NFTA_OBJREF_SET_SREG))
		r.answer(key, t, key.assumes())
		if set == nil || t != yes {
			return
		}
		typ, name = set.object, cString(attrOf(el, unix.NFTA_SET_ELEM_OBJREF))
	}
	obj := r.t.objects[liveObject{typ, name}]
	switch typ {
	case unix.NFT_OBJECT_COUNTER, unix.NFT_OBJECT_CT_HELPER, objectTimeout, objectSecmark, objectExpect:
	case unix.NFT_OBJECT_LIMIT:
		r.kept("limit", obj)
	case unix.NFT_OBJECT_QUOTA:
		r.kept("quota", obj)
	case unix.NFT_OBJECT_CONNLIMIT:
		r.kept("connlimit", obj)
	case objectSynproxy:
		r.outside("synproxy answers")
	default:
		r.meet(maybe, false, fmt.Sprintf("object %s of type %d", name, typ))
	}
}

func (r *ruleRun) reject(data []byte) {
	if !r.acts() {
		return
	}
	r.end = endReject
	if attrNumber(data, unix.NFTA_REJECT_TYPE) == unix.NFT_REJECT_TCP_RST {
		r.say("reject with tcp reset")
		if r.w.packet.Protocol != rules.TCP {
			r.end = endDrop // nf_send_reset answers TCP only
		}
		return
	}
	r.say("reject")
}

func (r *ruleRun) notrack() {
	if !r.acts() || r.w.ct != ctNone {
		return
	}
	r.say("notrack")
	r.w.ct = ctUnknown
	if r.sure() {
		r.w.ct = ctUntracked
	}
}

// Flags of NAT (uapi/linux/netfilter/nf_nat.h): the address is mapped prefix by
// prefix.
const natNetmap = 1 << 6

func (r *ruleRun) nat(name string, data []byte) {
	if !r.acts() {
		return
	}
	size := r.w.p.addressSize()
	switch {
	case name == "masq", name == "nat" && attrNumber(data, unix.NFTA_NAT_TYPE) == unix.NFT_NAT_SNAT:
		r.bindSource(map[string]string{"masq": "masquerade", "nat": "snat"}[name])
	case name == "redir":
		r.redirect(r.natValue(data, unix.NFTA_REDIR_REG_PROTO_MIN, unix.NFTA_REDIR_REG_PROTO_MAX, 2))
	default:
		addr := r.natValue(data, unix.NFTA_NAT_REG_ADDR_MIN, unix.NFTA_NAT_REG_ADDR_MAX, size)
		if attrNumber(data, unix.NFTA_NAT_FLAGS)&natNetmap != 0 {
			addr = blank(size, "")
		}
		r.dnat(addr, r.natValue(data, unix.NFTA_NAT_REG_PROTO_MIN, unix.NFTA_NAT_REG_PROTO_MAX, 2))
	}
}

// bound ends the chain: the flow has its translation.
func (r *ruleRun) bound() {
	r.end = endAccept
	switch {
	case r.sure():
		r.w.bound = yes
	case r.w.bound == no:
		r.w.bound = maybe
	}
}

// bindSource: the destination stays what it is.
func (r *ruleRun) bindSource(text string) {
	r.say("%s", text)
	r.bound()
}

func (r *ruleRun) redirect(port bits) {
	r.rewriteTo("redirect", r.w.redirectAddress(r.w.p.addressSize()), port)
}

func (r *ruleRun) dnat(addr, port bits) {
	text := "dnat"
	if addr.val != nil {
		text += " to " + natText(addr)
		r.w.moved(addr, r.sure())
	}
	r.rewriteTo(text, addr, port)
}

// rewriteTo changes the destination; nil bytes leave a part of it alone.
func (r *ruleRun) rewriteTo(text string, addr, port bits) {
	w, certain := r.w, r.sure()
	oldAddr, oldPort := w.p.dst(), w.p.transport.slice(2, 2)
	if addr.val != nil {
		w.p.setDst(addr, certain)
	}
	if port.val != nil && hasPorts(w.packet.Protocol) {
		w.p.transport.put(2, port, certain)
		text += " to port " + natText(port)
	}
	// What is rewritten to what it was is not called rewritten (nf_nat_setup_info).
	sameAddr, _ := w.p.dst().equal(oldAddr.val)
	samePort, _ := w.p.transport.slice(2, 2).equal(oldPort.val)
	switch {
	case !certain || !oldAddr.complete() || !oldPort.complete():
		w.p.dnat = maybe
	case sameAddr == no || samePort == no:
		w.p.dnat = yes
	case sameAddr == maybe || samePort == maybe:
		w.p.dnat = maybe
	}
	r.rewritten(text)
	w.note(fmt.Sprintf("table %s %s, chain %s rewrites the destination (%s): what follows sees the new one", r.t.name(), r.t.title, w.at.Chain, text))
	r.bound()
}

func natText(b bits) string {
	if !b.complete() {
		return "one that is not known here"
	}
	kind := asPort
	switch len(b.val) {
	case 4:
		kind = asAddress4
	case 16:
		kind = asAddress6
	}
	return written(kind, b.val)
}

// natValue is what a NAT statement sets: nil val when it sets nothing, unknown
// when the kernel chooses.
func (r *ruleRun) natValue(data []byte, least, most uint16, n int) bits {
	lo, hi := attrOf(data, least), attrOf(data, most)
	if lo == nil {
		return bits{}
	}
	b := r.reg.get(be32(lo), n)
	if hi == nil || bytes.Equal(lo, hi) {
		return b
	}
	if up := r.reg.get(be32(hi), n); b.complete() && up.complete() && bytes.Equal(b.val, up.val) {
		return b
	}
	return blank(n, b.about)
}

// redirectAddress is the address of the incoming interface that redirect
// chooses (nf_nat_redirect.c); of several it is not known which.
func (w *walker) redirectAddress(size int) bits {
	var own []netip.Addr
	for _, a := range w.host.links[w.in].addrs {
		if a.Is4() == w.p.v4 && !a.IsLinkLocalUnicast() {
			own = append(own, a)
		}
	}
	if len(own) != 1 {
		return blank(size, "the address of the interface")
	}
	return sure(own[0].AsSlice(), "", asNumber)
}

// moved decides whether a new destination is still this host.
func (w *walker) moved(to bits, certain bool) {
	there := maybe
	if a, ok := addressIn(to); ok {
		switch w.addrType(a, false) {
		case unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_MULTICAST, unix.RTN_ANYCAST:
			there = no
		case unix.RTN_UNICAST:
			there = yes
		}
	}
	if certain || there == w.p.elsewhere {
		w.p.elsewhere = there
	} else {
		w.p.elsewhere = maybe
	}
}

// setOut learns the interface by which a forwarded packet leaves.
func (w *walker) setOut() {
	w.p.outName, w.p.outIndex = blank(unix.IFNAMSIZ, "oifname"), blank(4, "oif")
	a, ok := addressIn(w.p.dst())
	if !ok || w.host.route == nil {
		return
	}
	if _, dev, ok := w.host.route(a); ok {
		w.p.outName = sure(nameBytes(dev), "oifname", asName)
		if l, ok := w.host.links[dev]; ok {
			w.p.outIndex = sure(native32(l.index), "oif", asNative)
		}
	}
}

// Operations of exthdr that golang.org/x/sys lacks.
const exthdrIPv4 = 2

func (r *ruleRun) exthdr(data []byte) {
	dreg := attrOf(data, unix.NFTA_EXTHDR_DREG)
	if dreg == nil {
		return // writes an option
	}
	op := attrNumber(data, unix.NFTA_EXTHDR_OP)
	present := attrNumber(data, unix.NFTA_EXTHDR_FLAGS)&unix.NFT_EXTHDR_F_PRESENT != 0
	const plainHeader = "the packet has no IP options or extension headers"
	switch {
	case op != unix.NFT_EXTHDR_OP_IPV6 && op != exthdrIPv4:
		r.reg.forget()
		r.meet(maybe, false, "it depends on an option of the transport header")
	case present:
		r.reg.set(be32(dreg), assumed([]byte{0}, "exthdr", asNumber, plainHeader))
	default:
		r.meet(no, true, plainHeader)
		r.reg.forget()
	}
}

func compared(b bits, sign string, want []byte) string {
	zero := len(bytes.Trim(want, "\x00")) == 0
	if b.kind == asState && strings.Contains(b.about, "ct state ") && zero && sign == "!= " {
		return b.about // "ct state new"
	}
	if name, mask, ok := strings.Cut(b.about, "/"); ok && (b.kind == asAddress4 || b.kind == asAddress6) {
		return fmt.Sprintf("%s %s%s/%s", name, sign, written(b.kind, want), mask)
	}
	return fmt.Sprintf("%s %s%s", b.about, sign, written(b.kind, want))
}

// written gives a value as people write it.
func written(kind writing, v []byte) string {
	switch kind {
	case asAddress4, asAddress6:
		full := make([]byte, map[writing]int{asAddress4: 4, asAddress6: 16}[kind])
		copy(full, v)
		if a, ok := netip.AddrFromSlice(full); ok {
			return a.String()
		}
	case asFamily:
		if len(v) == 1 && v[0] == unix.NFPROTO_IPV4 {
			return "ipv4"
		}
		if len(v) == 1 && v[0] == unix.NFPROTO_IPV6 {
			return "ipv6"
		}
	case asProtocol:
		if len(v) == 1 && protocolName(rules.Protocol(v[0])) != "" {
			return protocolName(rules.Protocol(v[0]))
		}
	case asPort:
		if len(v) == 2 {
			return fmt.Sprint(be16(v))
		}
	case asName:
		if len(v) < unix.IFNAMSIZ {
			return fmt.Sprintf("%q", string(v)+"*")
		}
		return fmt.Sprintf("%q", cString(v))
	case asState:
		return stateNames(v)
	case asNative:
		if len(v) == 4 {
			return fmt.Sprint(binary.NativeEndian.Uint32(v))
		}
	}
	if len(v) == 1 {
		return fmt.Sprint(v[0])
	}
	return "0x" + hex.EncodeToString(v)
}
