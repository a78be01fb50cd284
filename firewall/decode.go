package firewall

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
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
	table      string    // this and what follows: canonical attributes
	chains     map[string]*chainState
	sets       map[string]*setState
	objects    map[string]objectState // by kind and name
	flowtables map[string]string

	real map[string]string // the names of sets in the kernel, where they are second names
	// What an apply that did not come to its end left: packets never meet it.
	left leftovers
}

// leftovers are names in the kernel.
type leftovers struct {
	chains, sets []string
	objects      []objectState
}

func (l *leftovers) any() bool { return len(l.chains)+len(l.sets)+len(l.objects) > 0 }

type chainState struct {
	definition string
	base       bool
	anonymous  bool   // it ends with the rule that jumps to it
	hook       string // what cannot change in place
	rules      []string
	uses       []string // sets and objects that the rules name, as in the kernel
}

type setState struct {
	definition string
	flags      uint32 // NFT_SET_*
	count      int    // of elements, as the kernel counts them; -1: it does not say (before Linux 6.14)
	elements   []element
	// large is set instead of elements when there are too many to dump.
	large *largeState
	// first and last say when elements vanish by themselves; zero: none does.
	first, last time.Time
}

// largeState stands for the elements of a large set.
type largeState struct {
	digest string // of [rules.Set.Digest]; "" when the table does not say
	count  int    // of setState
}

// element is an element of a set, in an interval set from its start to its end.
type element struct {
	start, end string // canonical attributes; end is "" where there is none
	vanishes   bool
	until      time.Time // of a ban that vanishes: when
}

func (s *setState) is(flag uint32) bool { return s.flags&flag != 0 }

// bans reports whether each element of the set has an end of its own. Other sets that
// end are no longer than a family: see [rules.Set.Until].
func (s *setState) bans() bool {
	n := attrNumber([]byte(s.definition), unix.NFTA_SET_KEY_LEN)
	return s.is(unix.NFT_SET_TIMEOUT) && !s.is(unix.NFT_SET_EVAL) && n >= net.IPv4len
}

type objectState struct {
	name string
	typ  uint32 // NFT_OBJECT_*
	data string // but of a counter, which holds counts only
}

func newSnapshot() *Snapshot {
	return &Snapshot{
		chains: map[string]*chainState{}, sets: map[string]*setState{},
		objects: map[string]objectState{}, flowtables: map[string]string{},
		real: map[string]string{},
	}
}

// realName is the name of a set in the kernel.
func (s *Snapshot) realName(set string) string {
	if real := s.real[set]; real != "" {
		return real
	}
	return set
}

func (s *Snapshot) chain(name string) *chainState {
	if s.chains[name] == nil {
		s.chains[name] = &chainState{}
	}
	return s.chains[name]
}

func (s *Snapshot) set(name string) *setState {
	if s.sets[name] == nil {
		s.sets[name] = &setState{}
	}
	return s.sets[name]
}

// add takes one NEW* message into the snapshot.
func (s *Snapshot) add(typ uint16, attrs []byte) error {
	form := func(b []byte, sh shape) string { return string(canonical(nil, b, sh)) }
	switch typ {
	case unix.NFT_MSG_NEWTABLE:
		s.Present = true
		s.table = form(attrs, tableShape)
	case unix.NFT_MSG_NEWCHAIN:
		ch := s.chain(attrText(attrs, unix.NFTA_CHAIN_NAME))
		ch.definition = form(attrs, chainShape)
		ch.anonymous = attrNumber(attrs, nftaChainFlags)&nftChainBinding != 0
		if hook := attrOf(attrs, unix.NFTA_CHAIN_HOOK); hook != nil {
			ch.base = true
			ch.hook = form(hook, hookShape) + attrText(attrs, unix.NFTA_CHAIN_TYPE)
		}
	case unix.NFT_MSG_NEWRULE:
		ch := s.chain(attrText(attrs, unix.NFTA_RULE_CHAIN))
		ch.rules = append(ch.rules, form(attrs, ruleShape))
		uses(attrs, func(name string) { ch.uses = append(ch.uses, name) })
	case unix.NFT_MSG_NEWSET:
		set := s.set(attrText(attrs, unix.NFTA_SET_NAME))
		set.definition = form(attrs, setShape)
		set.flags = attrNumber(attrs, unix.NFTA_SET_FLAGS)
		set.count = -1
		if count := attrOf(attrs, nftaSetCount); count != nil {
			set.count = int(be32(count))
		}
		most := rules.LargeSet
		if set.is(unix.NFT_SET_EVAL) {
			most = rules.MeterSize // who lifts the limit of an address does so by an element
		}
		if set.count > most && !set.bans() {
			set.large = &largeState{count: set.count}
		}
	case unix.NFT_MSG_NEWSETELEM:
		set := s.set(attrText(attrs, unix.NFTA_SET_ELEM_LIST_SET))
		for _, el := range attributes(attrOf(attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			e := element{start: form(el, elementShape)}
			if set.is(unix.NFT_SET_EVAL) {
				set.elements = append(set.elements, e)
				continue
			}
			if left := timeLeft(el); left > 0 {
				e.vanishes = true
				end := s.at.Add(left)
				if set.bans() {
					e.until = end
					set.elements = append(set.elements, e)
					continue
				}
				if set.first.IsZero() || end.Before(set.first) {
					set.first = end
				}
				if end.After(set.last) {
					set.last = end
				}
			}
			set.elements = append(set.elements, e)
		}
	case unix.NFT_MSG_NEWOBJ:
		o := objectState{name: attrText(attrs, unix.NFTA_OBJ_NAME), typ: attrNumber(attrs, unix.NFTA_OBJ_TYPE)}
		if o.typ != unix.NFT_OBJECT_COUNTER {
			o.data = form(attrOf(attrs, unix.NFTA_OBJ_DATA), flatShape)
		}
		s.objects[objectKind(o.typ)+" "+o.name] = o
	case unix.NFT_MSG_NEWFLOWTABLE:
		s.flowtables[attrText(attrs, nftaFlowName)] = "flowtable"
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
	case unix.NFT_OBJECT_QUOTA:
		return "quota"
	}
	return fmt.Sprintf("object of type %d", typ)
}

func (e element) key() string {
	return string(attrOf(attrOf([]byte(e.start), unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE))
}

// isEnd reports whether the element only ends the interval before it.
func (e element) isEnd() bool {
	return attrNumber([]byte(e.start), unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END != 0
}

// finish sorts what has no order, and joins the starts and ends of intervals.
func (s *Snapshot) finish() {
	for _, set := range s.sets {
		type keyed struct {
			element
			key string
			end bool
		}
		list := make([]keyed, len(set.elements))
		for i, e := range set.elements {
			list[i] = keyed{e, e.key(), e.isEnd()}
		}
		slices.SortFunc(list, func(a, b keyed) int {
			if c := strings.Compare(a.key, b.key); c != 0 {
				return c
			}
			if a.end != b.end { // an interval ends before the next begins
				if a.end {
					return -1
				}
				return 1
			}
			return strings.Compare(a.start, b.start)
		})
		out := set.elements[:0]
		for _, e := range list {
			n := len(out) - 1
			switch {
			case !set.is(unix.NFT_SET_INTERVAL) || !e.end:
			case n < 0:
				continue // it ends nothing: nft writes one at zero
			case out[n].end == "" && !out[n].isEnd():
				out[n].end = e.start
				continue
			}
			out = append(out, e.element)
		}
		set.elements = out
	}
}

// meant says what a table will hold once it is loaded at now.
func meant(e *encoded, now time.Time) (*Snapshot, error) {
	s := newSnapshot()
	s.at = now
	for _, m := range e.small() {
		if err := s.add(m.typ, m.body()); err != nil {
			return nil, err
		}
	}
	s.takeMarks()
	for i := range e.sets {
		if set := e.sets[i].set; set.Large() {
			s.set(set.Name).large.count = kernelCount(set)
		}
	}
	s.finish()
	return s, nil
}

// Meant gives what the kernel will hold once the ruleset is loaded at now, which
// matters to what expires. Errors to test for: [*NameError].
func Meant(rs *rules.Ruleset, now time.Time) (*Snapshot, error) {
	e, err := encode(&rs.Table, now)
	if err != nil {
		return nil, fmt.Errorf("encode the ruleset: %w", err)
	}
	return meant(e, now)
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
	absent := errors.Is(err, unix.ENOENT)
	if err == nil {
		err = c.contents(s, table)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, err
	}
	now, genErr := c.Generation()
	if genErr != nil {
		return nil, genErr
	}
	if now.ID != gen.ID || err != nil && !absent { // or what was listed went away meanwhile
		return nil, errTorn
	}
	s.forgetCounted()
	s.finish()
	return s, nil
}

// contents reads what is in the table.
func (c *Conn) contents(s *Snapshot, table string) error {
	into := func(r reply) error { return s.add(r.typ, r.attrs) }
	// The dumps may be of all tables of the family: only ours is kept.
	name := append([]byte(table), 0)
	only := func(tableAttr uint16) func(reply) error {
		return func(r reply) error {
			if bytes.Equal(attrOf(r.attrs, tableAttr), name) {
				return into(r)
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
		if err := c.dump(d.typ, attrString(nil, d.table, table), only(d.table)); err != nil {
			return err
		}
	}
	s.takeMarks()
	for _, name := range sortedKeys(s.sets) {
		if s.sets[name].large != nil {
			continue
		}
		q := attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table)
		q = attrString(q, unix.NFTA_SET_ELEM_LIST_SET, name)
		if err := c.dump(unix.NFT_MSG_GETSETELEM, q, into); err != nil {
			return err
		}
	}
	s.leaveOut()
	s.nameSets()
	return nil
}

// met finds what packets can meet: the chains that a base chain leads to, and the
// sets and objects that their rules name.
func (s *Snapshot) met() (chains, names map[string]bool) {
	chains, names = map[string]bool{}, map[string]bool{}
	var follow func(chain string)
	follow = func(chain string) {
		ch := s.chains[chain]
		if ch == nil || chains[chain] {
			return
		}
		chains[chain] = true
		named := ch.uses
		for _, r := range ch.rules {
			for _, e := range expressions(attrOf([]byte(r), unix.NFTA_RULE_EXPRESSIONS)) {
				if e.name == "immediate" {
					follow(verdictChain(attrOf(e.data, unix.NFTA_IMMEDIATE_DATA)))
				}
			}
			if ch.uses == nil { // not of the kernel
				uses([]byte(r), func(name string) { named = append(named, name) })
			}
		}
		for _, name := range named {
			names[name] = true
			if set := s.sets[name]; set != nil && set.is(unix.NFT_SET_MAP) {
				for _, e := range set.elements {
					follow(verdictChain(attrOf([]byte(e.start), unix.NFTA_SET_ELEM_DATA)))
				}
			}
		}
	}
	for name, ch := range s.chains {
		// Nothing leads to the marks; they say what the sets that are met hold.
		if ch.base || name == rules.ChainApplied {
			follow(name)
		}
	}
	return chains, names
}

// leaveOut leaves out what an apply prepared or has not cleared away, while the
// table says that one is at work: all that packets cannot meet.
func (s *Snapshot) leaveOut() {
	if s.chains[chainPreparing] == nil {
		return
	}
	s.left = s.unmet()
}

// unmet takes away what packets cannot meet, and says what that was.
func (s *Snapshot) unmet() (l leftovers) {
	chains, names := s.met()
	for _, name := range sortedKeys(s.chains) {
		if !chains[name] {
			l.chains = append(l.chains, name)
			delete(s.chains, name)
		}
	}
	for _, name := range sortedKeys(s.sets) {
		if !names[name] {
			l.sets = append(l.sets, name)
			delete(s.sets, name)
		}
	}
	for _, key := range sortedKeys(s.objects) {
		if o := s.objects[key]; !names[o.name] {
			l.objects = append(l.objects, o)
			delete(s.objects, key)
		}
	}
	return l
}

// nameSets gives sets their first names.
func (s *Snapshot) nameSets() {
	for _, name := range sortedKeys(s.sets) {
		if first, isSecond := strings.CutSuffix(name, secondName); isSecond && s.sets[first] == nil {
			s.sets[first], s.real[first] = s.sets[name], name
			delete(s.sets, name)
		}
	}
}

// verdictChain is the chain that a verdict leads to.
func verdictChain(data []byte) string {
	return attrText(attrOf(data, unix.NFTA_DATA_VERDICT), unix.NFTA_VERDICT_CHAIN)
}

// forgetCounted leaves out what packets put into meters, which is no part of a
// ruleset: elements with the limit that a rule gives them. Others come from
// somebody who lifts the limit for an address.
func (s *Snapshot) forgetCounted() {
	given := map[string]map[string]bool{} // the limits that rules give, by meter
	for _, ch := range s.chains {
		for _, r := range ch.rules {
			for _, e := range expressions(attrOf([]byte(r), unix.NFTA_RULE_EXPRESSIONS)) {
				if e.name != "dynset" {
					continue
				}
				meter := attrText(e.data, unix.NFTA_DYNSET_SET_NAME)
				if given[meter] == nil {
					given[meter] = map[string]bool{}
				}
				given[meter][limitsOf(e.data, walkDynsetExprs, unix.NFTA_DYNSET_EXPR)] = true
			}
		}
	}
	for name, set := range s.sets {
		if set.is(unix.NFT_SET_EVAL) {
			set.elements = slices.DeleteFunc(set.elements, func(e element) bool {
				return given[name][limitsOf([]byte(e.start), walkElemExprs, unix.NFTA_SET_ELEM_EXPR)]
			})
		}
	}
}

// limitsOf gives the canonical form of what is counted for an element.
func limitsOf(attrs []byte, list, single uint16) string {
	if e := attrOf(attrs, single); e != nil {
		return string(canonical(nil, e, exprShape))
	}
	return string(canonical(nil, attrOf(attrs, list), exprsShape))
}

// takeMarks learns from the marks of the table which content its large sets were
// given.
func (s *Snapshot) takeMarks() {
	marks := s.chains[rules.ChainApplied]
	if marks == nil {
		return
	}
	for _, r := range marks.rules {
		name, _, digest, ok := rules.ParseMark(comment([]byte(r)))
		if !ok {
			continue
		}
		for _, name := range []string{name, name + secondName} {
			if set := s.sets[name]; set != nil {
				set.large = &largeState{digest, set.count}
			}
		}
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
