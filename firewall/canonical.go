package firewall

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// The canonical form of an object is its netlink attributes again, so that two
// objects that judge alike are equal bytes: sorted by type, without flags in the
// types, without what says where an object sits or what the kernel counts, and
// without attributes of zero bytes, which the kernel treats like absent ones and
// adds where nobody sent them. What this program does not know stays as it is.

// shape tells which attributes hold attributes again. The kernel dumps them
// without NLA_F_NESTED, so only knowledge can tell them from plain bytes.
type shape uint8

const (
	plain     shape = iota // bytes
	flatShape              // attributes that hold bytes
	tableShape
	chainShape
	hookShape
	ruleShape
	exprsShape // a list of expressions, in their order
	exprShape
	setShape
	descShape
	elementShape
	dataShape
	verdictShape
	cmpShape
	bitwiseShape
	immediateShape
	dynsetShape
	lookupShape
	logShape
	counterShape
)

// Newer than golang.org/x/sys knows them (uapi/linux/netfilter/nf_tables.h).
const (
	nftaTableHandle   = 4
	nftaTableUserdata = 6
	nftaChainFlags    = 10
	nftaChainID       = 11
	nftaChainUserdata = 12
	nftChainBinding   = 1 << 2
	nftaRuleID        = 9
	nftaSetHandle     = 16
	nftaSetType       = 19
	nftaSetCount      = 20
	nftaSetElemKeyEnd = 10
	nftaFlowTable     = 1
	nftaFlowName      = 2
)

// skips reports whether an attribute says nothing about what an object does.
func (s shape) skips(t uint16) bool {
	switch s {
	case tableShape:
		// The comment cannot change in place, and judges nothing.
		return t == unix.NFTA_TABLE_NAME || t == unix.NFTA_TABLE_USE || t == nftaTableHandle || t == nftaTableUserdata
	case chainShape:
		switch t {
		case unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE,
			unix.NFTA_CHAIN_COUNTERS, nftaChainFlags, nftaChainID, nftaChainUserdata:
			return true
		}
	case ruleShape:
		switch t {
		case unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION, nftaRuleID:
			return true
		}
	case setShape:
		// The length of the data follows from its type, and of a verdict it is the kernel's own affair.
		switch t {
		case unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, unix.NFTA_SET_DATA_LEN, nftaSetHandle, unix.NFTA_SET_ID, nftaSetType, nftaSetCount:
			return true
		}
	case elementShape:
		return t == unix.NFTA_SET_ELEM_TIMEOUT || t == unix.NFTA_SET_ELEM_EXPIRATION
	case counterShape:
		return t == unix.NFTA_COUNTER_BYTES || t == unix.NFTA_COUNTER_PACKETS
	}
	return false
}

// inner gives the shape of a nested attribute, plain when its bytes are data.
func (s shape) inner(t uint16) shape {
	switch {
	case s == chainShape && t == unix.NFTA_CHAIN_HOOK:
		return hookShape
	case s == ruleShape && t == unix.NFTA_RULE_EXPRESSIONS, s == dynsetShape && t == walkDynsetExprs:
		return exprsShape
	case s == exprsShape && t == unix.NFTA_LIST_ELEM, s == dynsetShape && t == unix.NFTA_DYNSET_EXPR:
		return exprShape
	case s == setShape && t == unix.NFTA_SET_DESC:
		return descShape
	case s == elementShape && (t == unix.NFTA_SET_ELEM_KEY || t == unix.NFTA_SET_ELEM_DATA || t == nftaSetElemKeyEnd),
		s == cmpShape && t == unix.NFTA_CMP_DATA,
		s == bitwiseShape && (t == unix.NFTA_BITWISE_MASK || t == unix.NFTA_BITWISE_XOR),
		s == immediateShape && t == unix.NFTA_IMMEDIATE_DATA:
		return dataShape
	case s == dataShape && t == unix.NFTA_DATA_VERDICT:
		return verdictShape
	}
	return plain
}

// keepsZeros: zero bytes of data are data, a verdict of zero is drop, and group 0
// and level 0 of a log are two different things.
func (s shape) keepsZeros() bool { return s == dataShape || s == verdictShape || s == logShape }

// dataOf gives the shape of an expression's data.
func dataOf(expression string) shape {
	switch expression {
	case "cmp":
		return cmpShape
	case "bitwise":
		return bitwiseShape
	case "immediate":
		return immediateShape
	case "dynset":
		return dynsetShape
	case "lookup":
		return lookupShape
	case "log":
		return logShape
	case "counter":
		return counterShape
	}
	return flatShape
}

// canonical appends the canonical form of attributes of a shape. What a quota and
// the like have used stands in the data of an expression; Deadlight writes none, so
// any is a difference.
func canonical(dst, b []byte, sh shape) []byte {
	type item struct {
		typ   uint16
		value []byte
	}
	var few [24]item
	items := few[:0]
	name := plain
	for t, v := range attributes(b) {
		if sh.skips(t) {
			continue
		}
		if sh == exprShape && t == unix.NFTA_EXPR_NAME {
			name = dataOf(cString(v))
		}
		items = append(items, item{t, v})
	}
	// Insertion: they are nearly always in order, and equal types must stay so.
	for i := 1; i < len(items); i++ {
		for k := i; k > 0 && items[k].typ < items[k-1].typ; k-- {
			items[k], items[k-1] = items[k-1], items[k]
		}
	}
	for _, it := range items {
		in := sh.inner(it.typ)
		if sh == exprShape && it.typ == unix.NFTA_EXPR_DATA {
			in = name
		}
		if sh == lookupShape && it.typ == unix.NFTA_LOOKUP_SET || sh == dynsetShape && it.typ == unix.NFTA_DYNSET_SET_NAME {
			it.value = bytes.TrimSuffix(it.value, []byte{0})
			it.value = append(bytes.Clone(bytes.TrimSuffix(it.value, []byte(secondName))), 0)
		}
		if in == plain {
			if sh.keepsZeros() || len(bytes.Trim(it.value, "\x00")) > 0 {
				dst = attr(dst, it.typ, it.value)
			}
			continue
		}
		head := len(dst)
		dst = append(dst, 0, 0, 0, 0)
		dst = canonical(dst, it.value, in)
		if len(dst) == head+4 {
			dst = dst[:head]
			continue
		}
		binary.NativeEndian.PutUint16(dst[head:], uint16(len(dst)-head))
		binary.NativeEndian.PutUint16(dst[head+2:], it.typ)
	}
	return dst
}

// secondName ends the name of a set that took the place of one of the same name
// while that was still in use. No name that a policy gives ends like this.
const secondName = "_alt"

// comment reads the comment of a rule.
func comment(rule []byte) string { return ruleNote(attrOf(rule, unix.NFTA_RULE_USERDATA)) }

// uses lists the sets and named objects that a rule names.
func uses(rule []byte, yield func(name string)) {
	for _, e := range attributes(attrOf(rule, unix.NFTA_RULE_EXPRESSIONS)) {
		data := attrOf(e, unix.NFTA_EXPR_DATA)
		name := func(t uint16) {
			if v := attrOf(data, t); v != nil {
				yield(cString(v))
			}
		}
		switch attrText(e, unix.NFTA_EXPR_NAME) {
		case "lookup":
			name(unix.NFTA_LOOKUP_SET)
		case "dynset":
			name(unix.NFTA_DYNSET_SET_NAME)
		case "objref":
			name(unix.NFTA_OBJREF_IMM_NAME)
			name(unix.NFTA_OBJREF_SET_NAME)
		}
	}
}
