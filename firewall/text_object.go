package firewall

import (
	"bytes"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Attributes and flags that golang.org/x/sys lacks
// (uapi/linux/netfilter/nf_tables.h).
const (
	nftaSetExpr        = 17
	nftaSetExprs       = 18
	nftaObjUserdata    = 8
	nftChainOffload    = 1 << 1
	nftSetExprFlag     = 1 << 8 // NFT_SET_EXPR
	setCommentUserdata = 7      // NFTNL_UDATA_SET_COMMENT (libnftnl, udata.h)
)

// commentText adds a comment to a text.
func commentText(s, note string) string {
	if note == "" {
		return s
	}
	return strings.TrimPrefix(s+"; comment "+quoted(note), "; ")
}

// tableText writes what a table is, from its NFT_MSG_NEWTABLE message.
func tableText(attrs []byte) string {
	s := "no flags"
	if f := attrNumber(attrs, unix.NFTA_TABLE_FLAGS); f != 0 {
		s = "flags " + bitsText(flagNames("dormant", "owner", "persist"), uint64(f))
	}
	return cutText(commentText(s, ruleNote(attrOf(attrs, nftaTableUserdata))))
}

// chainText writes what a chain of a table of family inet is, from its
// NFT_MSG_NEWCHAIN message.
func chainText(attrs []byte) string { return chainTextOf(unix.NFPROTO_INET, attrs) }

func chainTextOf(family byte, attrs []byte) string {
	s := "regular chain"
	if hook := attrOf(attrs, unix.NFTA_CHAIN_HOOK); hook != nil {
		num := attrNumber(hook, unix.NFTA_HOOK_HOOKNUM)
		s = fmt.Sprintf("type %s hook %s", identifier(attrText(attrs, unix.NFTA_CHAIN_TYPE)), hookText(family, num))
		s += devicesText(hook, walkHookDevs)
		s += " priority " + priorityText(family, num, int32(attrNumber(hook, unix.NFTA_HOOK_PRIORITY)))
	}
	if p := attrOf(attrs, unix.NFTA_CHAIN_POLICY); p != nil {
		switch be32(p) {
		case verdictAccept:
			s += "; policy accept"
		case verdictDrop:
			s += "; policy drop"
		default:
			s += fmt.Sprintf("; policy %d", be32(p))
		}
	}
	switch f := attrNumber(attrs, nftaChainFlags) &^ 1; { // 1: a base chain
	case f&nftChainBinding != 0:
		s += "; anonymous"
	case f&nftChainOffload != 0:
		s += "; flags offload"
	case f != 0:
		s += fmt.Sprintf("; flags 0x%x", f)
	}
	return cutText(commentText(s, ruleNote(attrOf(attrs, nftaChainUserdata))))
}

// devicesText lists the interfaces of a hook.
func devicesText(hook []byte, list uint16) string {
	var devices []string
	for t, v := range attributes(attrOf(hook, list)) {
		name := cString(v)
		if t == walkDevicePrefix {
			name += "*"
		}
		devices = append(devices, quoted(name))
	}
	if dev := attrOf(hook, unix.NFTA_HOOK_DEV); dev != nil && len(devices) == 0 {
		devices = append(devices, quoted(cString(dev)))
	}
	switch len(devices) {
	case 0:
		return ""
	case 1:
		return " device " + devices[0]
	}
	return " devices = { " + strings.Join(devices, ", ") + " }"
}

func hookText(family byte, num uint32) string {
	list := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"}
	switch family {
	case unix.NFPROTO_NETDEV:
		list = []string{"ingress", "egress"}
	case unix.NFPROTO_ARP:
		list = []string{"input", "output", "forward"}
	}
	if int(num) < len(list) {
		return list[num]
	}
	return fmt.Sprint(num)
}

// priorityText names a priority by the nearest standard one.
func priorityText(family byte, hook uint32, priority int32) string {
	type standard struct {
		name string
		at   int32
	}
	list := []standard{{"raw", -300}, {"mangle", -150}, {"filter", 0}, {"security", 50}}
	switch family {
	case unix.NFPROTO_BRIDGE:
		list = []standard{{"filter", -200}}
	case unix.NFPROTO_NETDEV, unix.NFPROTO_ARP:
		list = []standard{{"filter", 0}}
	default:
		switch hook {
		case unix.NF_INET_PRE_ROUTING:
			list = append(list, standard{"dstnat", -100})
		case unix.NF_INET_POST_ROUTING:
			list = append(list, standard{"srcnat", 100})
		}
	}
	for _, s := range list {
		switch off := int64(priority) - int64(s.at); {
		case off == 0:
			return s.name
		case off > 0 && off <= 10:
			return fmt.Sprintf("%s + %d", s.name, off)
		case off < 0 && off >= -10:
			return fmt.Sprintf("%s - %d", s.name, -off)
		}
	}
	return fmt.Sprint(priority)
}

// kindsOf splits the type of a set: a concatenation carries six bits a part.
func kindsOf(typ uint32) []kind {
	const bits, mask = 6, 0x3f
	var out []kind
	for ; typ > mask; typ >>= bits {
		out = append([]kind{kindOf(typ & mask)}, out...)
	}
	return append([]kind{kindOf(typ)}, out...)
}

func typeText(typ uint32, size int) string {
	var out []string
	for _, k := range kindsOf(typ) {
		out = append(out, k.name)
	}
	if len(out) == 1 && (typ == kindInteger || typ == kindString) {
		return fmt.Sprintf("%s,%d", out[0], size*8)
	}
	return strings.Join(out, " . ")
}

// setText writes what a set or map is, from its NFT_MSG_NEWSET message.
func setText(attrs []byte) string {
	flags := attrNumber(attrs, unix.NFTA_SET_FLAGS)
	s := "type " + typeText(attrNumber(attrs, unix.NFTA_SET_KEY_TYPE), int(attrNumber(attrs, unix.NFTA_SET_KEY_LEN)))
	switch {
	case flags&unix.NFT_SET_MAP != 0 && attrNumber(attrs, unix.NFTA_SET_DATA_TYPE) == unix.NFT_DATA_VERDICT:
		s += " : verdict"
	case flags&unix.NFT_SET_MAP != 0:
		s += " : " + typeText(attrNumber(attrs, unix.NFTA_SET_DATA_TYPE), int(attrNumber(attrs, unix.NFTA_SET_DATA_LEN)))
	case flags&unix.NFT_SET_OBJECT != 0:
		s += " : " + objectName(attrNumber(attrs, unix.NFTA_SET_OBJ_TYPE))
	}
	if f := flags &^ (unix.NFT_SET_ANONYMOUS | unix.NFT_SET_MAP | unix.NFT_SET_OBJECT | 0x80 | nftSetExprFlag); f != 0 { // 0x80: a concatenation
		s += "; flags " + bitsText([]bitName{{unix.NFT_SET_CONSTANT, "constant"}, {unix.NFT_SET_EVAL, "dynamic"}, {unix.NFT_SET_INTERVAL, "interval"}, {unix.NFT_SET_TIMEOUT, "timeout"}}, uint64(f))
	}
	if flags&unix.NFT_SET_ANONYMOUS != 0 {
		s += "; anonymous"
	}
	if n := attrNumber(attrOf(attrs, unix.NFTA_SET_DESC), unix.NFTA_SET_DESC_SIZE); n != 0 {
		s += fmt.Sprintf("; size %d", n)
	}
	if attrNumber(attrs, unix.NFTA_SET_POLICY) == unix.NFT_SET_POL_MEMORY {
		s += "; policy memory"
	}
	if ms := value64(attrOf(attrs, unix.NFTA_SET_TIMEOUT)); ms != 0 {
		s += "; timeout " + durationText(ms)
	}
	if ms := attrNumber(attrs, unix.NFTA_SET_GC_INTERVAL); ms != 0 {
		s += "; gc-interval " + durationText(uint64(ms))
	}
	for _, e := range statefulExpressions(attrs, nftaSetExprs, nftaSetExpr) {
		s += "; " + statefulText(e)
	}
	return cutText(commentText(s, userNote(attrOf(attrs, unix.NFTA_SET_USERDATA), setCommentUserdata)))
}

// userNote reads one string of user data.
func userNote(udata []byte, typ byte) string {
	for len(udata) >= 2 && 2+int(udata[1]) <= len(udata) {
		n := 2 + int(udata[1])
		if udata[0] == typ {
			return cString(udata[2:n])
		}
		udata = udata[n:]
	}
	return ""
}

// elementText writes one element of a set, given the attributes of the set's
// NFT_MSG_NEWSET message and of the element. In a set of plain intervals an end
// is an element of its own: end, or nil when the interval has none.
func elementText(set, el, end []byte) string {
	typ, flags := attrNumber(set, unix.NFTA_SET_KEY_TYPE), attrNumber(set, unix.NFTA_SET_FLAGS)
	from, to := dataValue(el, unix.NFTA_SET_ELEM_KEY), dataValue(el, walkElemKeyEnd)
	if to == nil && flags&unix.NFT_SET_INTERVAL != 0 {
		to = bytes.Repeat([]byte{0xff}, len(from))
		if e := dataValue(end, unix.NFTA_SET_ELEM_KEY); len(e) == len(from) {
			to = before(e)
		}
	}
	s := keyText(typ, from, to)
	if attrNumber(el, unix.NFTA_SET_ELEM_FLAGS)&walkElemCatchall != 0 {
		s = "*"
	}
	for _, e := range statefulExpressions(el, walkElemExprs, unix.NFTA_SET_ELEM_EXPR) {
		s += " " + statefulText(e)
	}
	if ms := value64(attrOf(el, unix.NFTA_SET_ELEM_TIMEOUT)); ms != 0 {
		s += " timeout " + durationText(ms)
	}
	if ms := value64(attrOf(el, unix.NFTA_SET_ELEM_EXPIRATION)); ms != 0 {
		s += " expires " + durationText(ms)
	}
	if note := ruleNote(attrOf(el, unix.NFTA_SET_ELEM_USERDATA)); note != "" {
		s += " comment " + quoted(note)
	}
	data := attrOf(el, unix.NFTA_SET_ELEM_DATA)
	switch {
	case attrOf(data, unix.NFTA_DATA_VERDICT) != nil:
		s += " : " + verdictText(attrOf(data, unix.NFTA_DATA_VERDICT))
	case attrOf(data, unix.NFTA_DATA_VALUE) != nil:
		s += " : " + keyText(attrNumber(set, unix.NFTA_SET_DATA_TYPE), attrOf(data, unix.NFTA_DATA_VALUE), nil)
	case attrOf(el, unix.NFTA_SET_ELEM_OBJREF) != nil:
		s += " : " + quoted(attrText(el, unix.NFTA_SET_ELEM_OBJREF))
	}
	return cutText(s)
}

// before takes one off a big-endian number.
func before(b []byte) []byte {
	out := bytes.Clone(b)
	for i := len(out) - 1; i >= 0; i-- {
		out[i]--
		if out[i] != 0xff {
			break
		}
	}
	return out
}

// keyText writes a key of a set of that type; to is the last key of an interval,
// nil when there is only one.
func keyText(typ uint32, from, to []byte) string {
	kinds := kindsOf(typ)
	if len(kinds) == 1 {
		return spanText(kinds[0], from, to)
	}
	var out []string
	for i, k := range kinds {
		n := k.size
		if n == 0 || i == len(kinds)-1 && n < len(from) && len(from) <= 4*words4(n) {
			n = min(max(n, 1), len(from))
		}
		if n > len(from) {
			n = len(from)
		}
		var end []byte
		if len(to) >= n {
			end = to[:n]
		}
		out = append(out, spanText(k, from[:n], end))
		step := min(4*words4(n), len(from)) // a part begins at a register
		from = from[step:]
		to = to[min(step, len(to)):]
	}
	if len(from) > 0 {
		out = append(out, hexText(from))
	}
	return strings.Join(out, " . ")
}

func spanText(k kind, from, to []byte) string {
	if to == nil || bytes.Equal(from, to) {
		return k.text(from)
	}
	if k.name == kindOf(kindIfname).name {
		if n := len(bytes.TrimRight(from, "\x00")); len(to) == len(from) && bytes.Equal(from[:n], to[:n]) && len(bytes.Trim(to[n:], "\xff")) == 0 {
			return k.text(from[:n])
		}
	}
	if n, ok := prefixOf(from, to); ok && (k.size == 4 || k.size == 16) && k.write != nil {
		if n == 0 && len(bytes.Trim(from, "\x00")) == 0 {
			return k.text(from) + "/0"
		}
		return fmt.Sprintf("%s/%d", k.text(from), n)
	}
	return k.text(from) + "-" + k.text(to)
}

// prefixOf tells whether an interval is all that begins with some bits.
func prefixOf(from, to []byte) (int, bool) {
	if len(from) != len(to) {
		return 0, false
	}
	mask := make([]byte, len(from))
	for i := range from {
		mask[i] = ^(from[i] ^ to[i])
		if from[i]&^mask[i] != 0 {
			return 0, false
		}
	}
	return maskLength(mask)
}

// objectText writes what an object is, from its NFT_MSG_NEWOBJ message; what it
// has counted is left out.
func objectText(attrs []byte) string {
	typ, d := attrNumber(attrs, unix.NFTA_OBJ_TYPE), attrOf(attrs, unix.NFTA_OBJ_DATA)
	s := objectName(typ)
	switch typ {
	case unix.NFT_OBJECT_COUNTER:
	case unix.NFT_OBJECT_LIMIT:
		s += " " + limitText(d)
	case unix.NFT_OBJECT_QUOTA:
		s += " " + quotaText(d)
	case objectSynproxy:
		s = synproxyText(d)
	case unix.NFT_OBJECT_CT_HELPER:
		s += fmt.Sprintf(" type %s protocol %s", quoted(attrText(d, unix.NFTA_CT_HELPER_NAME)), kindOf(kindProtocol).text(attrOf(d, unix.NFTA_CT_HELPER_L4PROTO)))
	default:
		s += " " + hexText(d)
	}
	return cutText(commentText(s, ruleNote(attrOf(attrs, nftaObjUserdata))))
}
