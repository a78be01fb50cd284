package firewall

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Snapshot is what a table holds, in a form in which two tables that judge alike
// are equal: handles, counts and orders that mean nothing are left out, and
// every attribute that this program does not know is kept as raw bytes. It is
// made from netlink messages, whether the kernel dumped them or Deadlight is
// about to send them.
type Snapshot struct {
	Generation Generation
	Present    bool
	at         time.Time // when it was read
	table      string
	chains     map[string]chainState
	sets       map[string]setState
	objects    map[string]objectState // by kind and name
	flowtables map[string]string
}

type chainState struct {
	definition string
	base       bool
	anonymous  bool   // it ends with the rule that jumps to it
	hook       string // what cannot change in place
	rules      []ruleState
}

type ruleState struct {
	comment string
	raw     string // canonical attributes
}

type setState struct {
	definition string
	anonymous  bool
	constant   bool
	meter      bool     // filled by packets: its elements are no part of a ruleset
	elements   []string // canonical, sorted
	// first and last say when elements vanish by themselves; zero: none does.
	first, last time.Time
}

type objectState struct {
	name string
	typ  uint32 // NFT_OBJECT_*
	data string // of a limit; what others hold is counts
}

func newSnapshot() *Snapshot {
	return &Snapshot{
		chains: map[string]chainState{}, sets: map[string]setState{},
		objects: map[string]objectState{}, flowtables: map[string]string{},
	}
}

// Attributes that say nothing about what a table does: where it sits, what the
// kernel counts, what a transaction numbers.

func skipTable() []uint16 {
	// The comment cannot change in place, and judges nothing.
	return []uint16{unix.NFTA_TABLE_NAME, unix.NFTA_TABLE_USE, nftaTableHandle, nftaTableUserdata}
}

func skipChain() []uint16 {
	return []uint16{unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, unix.NFTA_CHAIN_HANDLE, unix.NFTA_CHAIN_USE,
		unix.NFTA_CHAIN_COUNTERS, nftaChainFlags, nftaChainID, nftaChainUserdata}
}

func skipRule() []uint16 {
	return []uint16{unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, unix.NFTA_RULE_HANDLE, unix.NFTA_RULE_POSITION, nftaRuleID}
}

func skipSet() []uint16 {
	// The length of the data follows from its type, and of a verdict it is the kernel's own affair.
	return []uint16{unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, unix.NFTA_SET_DATA_LEN, nftaSetHandle, unix.NFTA_SET_ID, nftaSetType, nftaSetCount}
}

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

// add takes one NEW* message into the snapshot.
func (s *Snapshot) add(typ uint16, attrs []byte) error {
	get := func(t uint16) []byte {
		for k, v := range attributes(attrs) {
			if k == t {
				return v
			}
		}
		return nil
	}
	switch typ {
	case unix.NFT_MSG_NEWTABLE:
		s.Present = true
		s.table = canonical(attrs, skipTable(), nil)
	case unix.NFT_MSG_NEWCHAIN:
		name := cString(get(unix.NFTA_CHAIN_NAME))
		ch := s.chains[name]
		ch.definition = canonical(attrs, skipChain(), chainShape())
		ch.anonymous = be32(get(nftaChainFlags))&nftChainBinding != 0
		if hook := get(unix.NFTA_CHAIN_HOOK); hook != nil {
			ch.base = true
			ch.hook = canonical(hook, nil, nil) + " " + cString(get(unix.NFTA_CHAIN_TYPE))
		}
		s.chains[name] = ch
	case unix.NFT_MSG_NEWRULE:
		name := cString(get(unix.NFTA_RULE_CHAIN))
		ch := s.chains[name]
		comment, _ := comment(get(unix.NFTA_RULE_USERDATA))
		ch.rules = append(ch.rules, ruleState{comment, canonicalRule(attrs)})
		s.chains[name] = ch
	case unix.NFT_MSG_NEWSET:
		name := cString(get(unix.NFTA_SET_NAME))
		set := s.sets[name]
		set.definition = canonical(attrs, skipSet(), setShape())
		flags := be32(get(unix.NFTA_SET_FLAGS))
		set.anonymous, set.meter = flags&unix.NFT_SET_ANONYMOUS != 0, flags&unix.NFT_SET_EVAL != 0
		set.constant = flags&unix.NFT_SET_CONSTANT != 0
		s.sets[name] = set
	case unix.NFT_MSG_NEWSETELEM:
		name := cString(get(unix.NFTA_SET_ELEM_LIST_SET))
		set := s.sets[name]
		for _, el := range attributes(get(unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			text := canonical(el, []uint16{unix.NFTA_SET_ELEM_TIMEOUT, unix.NFTA_SET_ELEM_EXPIRATION}, elementShape())
			if left := timeLeft(el); left > 0 {
				text += "vanishes"
				end := s.at.Add(left)
				if set.first.IsZero() || end.Before(set.first) {
					set.first = end
				}
				if end.After(set.last) {
					set.last = end
				}
			}
			set.elements = append(set.elements, text)
		}
		s.sets[name] = set
	case unix.NFT_MSG_NEWOBJ:
		o := objectState{name: cString(get(unix.NFTA_OBJ_NAME)), typ: be32(get(unix.NFTA_OBJ_TYPE))}
		if o.typ == unix.NFT_OBJECT_LIMIT {
			o.data = canonical(get(unix.NFTA_OBJ_DATA), nil, nil)
		}
		s.objects[objectKind(o.typ)+" "+o.name] = o
	case unix.NFT_MSG_NEWFLOWTABLE:
		s.flowtables[cString(get(nftaFlowName))] = "flowtable"
	default:
		return fmt.Errorf("read the ruleset: unexpected message %d", typ)
	}
	return nil
}

// timeLeft is how long an element has to live: what the kernel says is left, or
// in a message of ours the whole timeout; 0 when it stays.
func timeLeft(el []byte) time.Duration {
	var left time.Duration
	for t, v := range attributes(el) {
		if len(v) != 8 {
			continue
		}
		ms := time.Duration(binary.BigEndian.Uint64(v)) * time.Millisecond
		if t == unix.NFTA_SET_ELEM_EXPIRATION {
			return ms
		}
		if t == unix.NFTA_SET_ELEM_TIMEOUT {
			left = ms
		}
	}
	return left
}

func objectKind(typ uint32) string {
	switch typ {
	case unix.NFT_OBJECT_COUNTER:
		return "counter"
	case unix.NFT_OBJECT_LIMIT:
		return "limit"
	}
	return fmt.Sprintf("object of type %d", typ)
}

// finish sorts what has no order.
func (s *Snapshot) finish() {
	for _, set := range s.sets {
		sort.Strings(set.elements)
	}
}

// comment reads a rule's comment; ok is false for user data that is broken.
func comment(udata []byte) (string, bool) {
	for len(udata) >= 2 {
		n := int(udata[1])
		if 2+n > len(udata) {
			return "", false
		}
		if userdata.Type(udata[0]) == userdata.TypeComment {
			return cString(udata[2 : 2+n]), true
		}
		udata = udata[2+n:]
	}
	return "", true
}

// shape tells which attributes hold attributes again. The kernel dumps them
// without NLA_F_NESTED, so only knowledge can tell them from plain bytes.
type shape map[uint16]shape

func dataShape() shape { return shape{unix.NFTA_DATA_VERDICT: {}} }

func chainShape() shape { return shape{unix.NFTA_CHAIN_HOOK: {}} }

func setShape() shape { return shape{unix.NFTA_SET_DESC: {}} }

func elementShape() shape {
	return shape{unix.NFTA_SET_ELEM_KEY: dataShape(), unix.NFTA_SET_ELEM_DATA: dataShape(), nftaSetElemKeyEnd: dataShape()}
}

// exprShape knows the expressions that Deadlight writes; all others are bytes.
func exprShape(name string) shape {
	switch name {
	case "cmp":
		return shape{unix.NFTA_CMP_DATA: dataShape()}
	case "bitwise":
		return shape{unix.NFTA_BITWISE_MASK: dataShape(), unix.NFTA_BITWISE_XOR: dataShape()}
	case "immediate":
		return shape{unix.NFTA_IMMEDIATE_DATA: dataShape()}
	case "dynset":
		return shape{unix.NFTA_DYNSET_EXPR: {unix.NFTA_EXPR_DATA: {}}}
	}
	return nil
}

// canonical writes attributes sorted by type, plain bytes as hex. An attribute
// of zero bytes only is left out: the kernel treats it like an absent one, and
// dumps some that nobody sent.
func canonical(b []byte, skip []uint16, sh shape) string {
	return canonicalAttrs(b, skip, sh, false)
}

func canonicalAttrs(b []byte, skip []uint16, sh shape, keepZeros bool) string {
	type item struct {
		typ  uint16
		text string
	}
	var items []item
	for t, v := range attributes(b) {
		if slices.Contains(skip, t) {
			continue
		}
		if inner, nested := sh[t]; nested {
			if text := canonical(v, nil, inner); text != "" {
				items = append(items, item{t, "{" + text + "}"})
			}
		} else if keepZeros || len(bytes.Trim(v, "\x00")) > 0 {
			items = append(items, item{t, hex.EncodeToString(v)})
		}
	}
	sort.SliceStable(items, func(i, j int) bool { return items[i].typ < items[j].typ })
	var out strings.Builder
	for _, i := range items {
		fmt.Fprintf(&out, "%d:%s ", i.typ, i.text)
	}
	return out.String()
}

// canonicalRule keeps the order of a rule's expressions. Counts of inline
// counters, quotas and the like stand in the payload of an expression; Deadlight
// writes none, so any is a difference.
func canonicalRule(attrs []byte) string {
	var out strings.Builder
	for t, v := range attributes(attrs) {
		if t != unix.NFTA_RULE_EXPRESSIONS {
			continue
		}
		for _, e := range attributes(v) {
			var name string
			var data []byte
			for t, v := range attributes(e) {
				switch t {
				case unix.NFTA_EXPR_NAME:
					name = cString(v)
				case unix.NFTA_EXPR_DATA:
					data = v
				}
			}
			// Group 0 and level 0 of a log are two different things.
			fmt.Fprintf(&out, "[%s %s]", name, canonicalAttrs(data, nil, exprShape(name), name == "log"))
		}
	}
	return out.String() + canonical(attrs, append(skipRule(), unix.NFTA_RULE_EXPRESSIONS), nil)
}

// snapshotOf says what a table will hold once the messages are committed.
func snapshotOf(msgs []message, now time.Time) (*Snapshot, error) {
	s := newSnapshot()
	s.at = now
	for _, m := range msgs {
		if err := s.add(m.typ, m.attrs); err != nil {
			return nil, err
		}
	}
	s.finish()
	return s, nil
}

// Snapshot reads the table of that name of family inet. A table that is not
// there gives a Snapshot with Present false.
func (c *Conn) Snapshot(table string) (*Snapshot, error) {
	const tries = 10
	for range tries {
		s, err := c.snapshot(table)
		if errors.Is(err, errTorn) {
			continue // somebody wrote while we read
		}
		if err != nil {
			return nil, fmt.Errorf("read table %s: %w", table, err)
		}
		return s, nil
	}
	return nil, fmt.Errorf("read table %s: %w", table, errTorn)
}

func (c *Conn) snapshot(table string) (*Snapshot, error) {
	s := newSnapshot()
	gen, err := c.Generation()
	if err != nil {
		return nil, err
	}
	s.Generation, s.at = gen, time.Now()
	into := func(r reply) error { return s.add(r.typ, r.attrs) }
	err = c.ask(unix.NFT_MSG_GETTABLE, 0, unix.NFPROTO_INET, attrString(nil, unix.NFTA_TABLE_NAME, table), into)
	if errors.Is(err, unix.ENOENT) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	// The dumps are of all tables of the family: only ours is kept.
	only := func(tableAttr uint16, fn func(reply) error) func(reply) error {
		return func(r reply) error {
			for t, v := range attributes(r.attrs) {
				if t == tableAttr && cString(v) == table {
					return fn(r)
				}
			}
			return nil
		}
	}
	dumps := []struct {
		typ   uint16
		table uint16
	}{
		{unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE},
		{unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE},
		{unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE},
		{unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE},
		{unix.NFT_MSG_GETFLOWTABLE, nftaFlowTable},
	}
	for _, d := range dumps {
		if err := c.dump(d.typ, attrString(nil, d.table, table), only(d.table, into)); err != nil {
			return nil, err
		}
	}
	for _, name := range sortedKeys(s.sets) {
		if s.sets[name].meter {
			continue
		}
		q := attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table)
		q = attrString(q, unix.NFTA_SET_ELEM_LIST_SET, name)
		if err := c.dump(unix.NFT_MSG_GETSETELEM, q, into); err != nil {
			return nil, err
		}
	}
	now, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if now.ID != gen.ID {
		return nil, errTorn
	}
	s.finish()
	return s, nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
