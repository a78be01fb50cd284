package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The ruleset of every program, as far as a packet's way depends on it. Sets
// are known by definition only: their elements may be millions.

type liveRules struct{ tables []*liveTable }

type liveTable struct {
	family  byte // NFPROTO_*
	title   string
	dormant bool
	bases   []*liveChain // in the order of the dump, which is that of their making
	rules   map[string][]*liveRule
	sets    map[string]*liveSet
	objects map[liveObject][]byte // NFTA_OBJ_DATA
}

type liveChain struct {
	table    *liveTable
	title    string
	hook     uint32
	priority int
	typ      string // filter, nat, route
	drop     bool   // policy
	devices  []string
}

type liveRule struct {
	handle  uint64
	comment string
	exprs   []liveExpr
}

type liveExpr struct {
	name string
	data []byte // attributes
}

type liveSet struct {
	title  string
	keyLen int
	flags  uint32
	object uint32 // of a map to objects: NFT_OBJECT_*
}

type liveObject struct {
	typ   uint32
	title string
}

func (t *liveTable) name() string {
	switch t.family {
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	}
	return fmt.Sprintf("family %d", t.family)
}

// judges reports whether the table sees packets at the IP layer.
func (t *liveTable) judges() bool {
	return t.family == unix.NFPROTO_INET || t.family == unix.NFPROTO_IPV4 || t.family == unix.NFPROTO_IPV6
}

func (ch *liveChain) on() string {
	if len(ch.devices) == 0 {
		return "an interface"
	}
	return strings.Join(ch.devices, ", ")
}

// Attributes that golang.org/x/sys lacks (uapi/linux/netfilter/nf_tables.h).
const (
	walkHookDevs     = 4    // NFTA_HOOK_DEVS
	walkDeviceName   = 1    // NFTA_DEVICE_NAME
	walkDevicePrefix = 2    // NFTA_DEVICE_PREFIX
	walkElemKeyEnd   = 10   // NFTA_SET_ELEM_KEY_END
	walkElemExprs    = 11   // NFTA_SET_ELEM_EXPRESSIONS
	walkElemCatchall = 0x2  // NFT_SET_ELEM_CATCHALL
	walkDynsetExprs  = 0xa  // NFTA_DYNSET_EXPRESSIONS
	walkCommentType  = 0x00 // NFTNL_UDATA_RULE_COMMENT (libnftnl, udata.h)
)

// attrOf gives the first attribute of a type.
func attrOf(attrs []byte, typ uint16) []byte {
	for t, v := range attributes(attrs) {
		if t == typ {
			return v
		}
	}
	return nil
}

func attrNumber(attrs []byte, typ uint16) uint32 { return be32(attrOf(attrs, typ)) }

func attrText(attrs []byte, typ uint16) string { return cString(attrOf(attrs, typ)) }

// value64 reads a big-endian number of eight bytes.
func value64(b []byte) uint64 {
	if len(b) < 8 {
		return 0
	}
	return uint64(be32(b))<<32 | uint64(be32(b[4:]))
}

// liveRules dumps what can meet an inbound packet.
func (c *Conn) liveRules() (*liveRules, error) {
	k := &liveRules{}
	for _, family := range []byte{unix.NFPROTO_INET, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_NETDEV, unix.NFPROTO_BRIDGE} {
		tables, err := c.liveTables(family)
		if err != nil {
			return nil, err
		}
		k.tables = append(k.tables, tables...)
	}
	return k, nil
}

// liveTables dumps the tables of one family: the replies do not tell it.
func (c *Conn) liveTables(family byte) ([]*liveTable, error) {
	var tables []*liveTable
	byName := map[string]*liveTable{}
	err := c.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, family, nil, func(r reply) error {
		t := &liveTable{
			family: family, title: attrText(r.attrs, unix.NFTA_TABLE_NAME),
			dormant: attrNumber(r.attrs, unix.NFTA_TABLE_FLAGS)&unix.NFT_TABLE_F_DORMANT != 0,
			rules:   map[string][]*liveRule{}, sets: map[string]*liveSet{}, objects: map[liveObject][]byte{},
		}
		tables = append(tables, t)
		byName[t.title] = t
		return nil
	})
	if err != nil || len(tables) == 0 {
		return nil, err
	}
	dumps := []struct {
		typ, table uint16
		take       func(*liveTable, []byte)
	}{
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, (*liveTable).takeChain},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, (*liveTable).takeRule},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, (*liveTable).takeSet},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, (*liveTable).takeObject},
	}
	for _, d := range dumps {
		err := c.ask(d.typ, unix.NLM_F_DUMP, family, nil, func(r reply) error {
			t := byName[attrText(r.attrs, d.table)]
			if t == nil {
				return nil // made after the tables were read: the generation will tell
			}
			d.take(t, bytes.Clone(r.attrs)) // the buffer is used again
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return tables, nil
}

func (t *liveTable) takeChain(attrs []byte) {
	hook := attrOf(attrs, unix.NFTA_CHAIN_HOOK)
	if hook == nil {
		return
	}
	ch := &liveChain{
		table: t, title: attrText(attrs, unix.NFTA_CHAIN_NAME), typ: attrText(attrs, unix.NFTA_CHAIN_TYPE),
		hook: attrNumber(hook, unix.NFTA_HOOK_HOOKNUM), priority: int(int32(attrNumber(hook, unix.NFTA_HOOK_PRIORITY))),
		drop: len(attrOf(attrs, unix.NFTA_CHAIN_POLICY)) >= 4 && attrNumber(attrs, unix.NFTA_CHAIN_POLICY) == verdictDrop,
	}
	if dev := attrOf(hook, unix.NFTA_HOOK_DEV); dev != nil {
		ch.devices = append(ch.devices, cString(dev))
	}
	for typ, dev := range attributes(attrOf(hook, walkHookDevs)) {
		name := cString(dev)
		if typ == walkDevicePrefix {
			name += "*"
		}
		if (typ == walkDeviceName || typ == walkDevicePrefix) && !slices.Contains(ch.devices, name) {
			ch.devices = append(ch.devices, name)
		}
	}
	t.bases = append(t.bases, ch)
}

func (t *liveTable) takeRule(attrs []byte) {
	chain := attrText(attrs, unix.NFTA_RULE_CHAIN)
	r := &liveRule{
		handle: value64(attrOf(attrs, unix.NFTA_RULE_HANDLE)), comment: ruleNote(attrOf(attrs, unix.NFTA_RULE_USERDATA)),
		exprs: expressions(attrOf(attrs, unix.NFTA_RULE_EXPRESSIONS)),
	}
	t.rules[chain] = append(t.rules[chain], r)
}

func (t *liveTable) takeSet(attrs []byte) {
	s := &liveSet{
		title: attrText(attrs, unix.NFTA_SET_NAME), keyLen: int(attrNumber(attrs, unix.NFTA_SET_KEY_LEN)),
		flags: attrNumber(attrs, unix.NFTA_SET_FLAGS), object: attrNumber(attrs, unix.NFTA_SET_OBJ_TYPE),
	}
	t.sets[s.title] = s
}

func (t *liveTable) takeObject(attrs []byte) {
	o := liveObject{attrNumber(attrs, unix.NFTA_OBJ_TYPE), attrText(attrs, unix.NFTA_OBJ_NAME)}
	t.objects[o] = attrOf(attrs, unix.NFTA_OBJ_DATA)
}

// expressions reads a list of expressions.
func expressions(list []byte) []liveExpr {
	var out []liveExpr
	for _, e := range attributes(list) {
		out = append(out, liveExpr{attrText(e, unix.NFTA_EXPR_NAME), attrOf(e, unix.NFTA_EXPR_DATA)})
	}
	return out
}

// ruleNote reads the comment from a rule's user data: type, length, bytes.
func ruleNote(udata []byte) string {
	for len(udata) >= 2 {
		n := int(udata[1])
		if 2+n > len(udata) {
			return ""
		}
		if udata[0] == walkCommentType {
			return cString(udata[2 : 2+n])
		}
		udata = udata[2+n:]
	}
	return ""
}

// element asks the kernel for the element that a key falls into, which costs
// the same in a set of ten and of a million. nil means that there is none.
func (c *Conn) element(t *liveTable, s *liveSet, key []byte) ([]byte, error) {
	el := nest(nil, unix.NFTA_SET_ELEM_KEY, attr(nil, unix.NFTA_DATA_VALUE, key))
	got, err := c.oneElement(t, s, el)
	if err != nil || got != nil {
		return got, err
	}
	// An element * catches what no other does; kernels before 5.13 know none.
	got, err = c.oneElement(t, s, attr32(nil, unix.NFTA_SET_ELEM_FLAGS, walkElemCatchall))
	if errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	return got, err
}

func (c *Conn) oneElement(t *liveTable, s *liveSet, el []byte) ([]byte, error) {
	q := attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, t.title)
	q = attrString(q, unix.NFTA_SET_ELEM_LIST_SET, s.title)
	q = nest(q, unix.NFTA_SET_ELEM_LIST_ELEMENTS, nest(nil, unix.NFTA_LIST_ELEM, el))
	var out []byte
	err := c.ask(unix.NFT_MSG_GETSETELEM, 0, t.family, q, func(r reply) error {
		for _, e := range attributes(attrOf(r.attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			if attrNumber(e, unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END == 0 {
				out = bytes.Clone(e)
			}
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look up in set %s of table %s %s: %w", s.title, t.name(), t.title, err)
	}
	return out, nil
}
