package firewall

import (
	"net/netip"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// transaction turns the table that is into the wanted one, in place: only what
// differs is written, and base chains stay hooked throughout (one that is deleted
// and added again accepts packets until its policy takes hold at the end of the
// commit).
//
// A packet on its way through a base chain keeps to the rules it began with, but
// meets sets as they are at that instant; sets of intervals change not with the
// rules but at the end of the commit. So that no packet meets old rules with new
// sets or the reverse, a set that changes is made anew, under its second name, in a
// transaction before the one that changes the rules, and the old one is removed in
// a transaction after it. Only a large set whose list changed, and nothing else,
// changes where it is.
type transaction struct {
	table      string
	is, wanted *Snapshot
	want       *encoded
	// afresh writes everything but base chains, counters and meters, whatever is
	// there, in one transaction: for tables that others have turned into something
	// else, or where there is none.
	afresh bool
	// known gives what a large set holds now; nil when nobody knows.
	known func(set string) *rules.Set
	// spoiled are the large sets that do not hold what their mark says.
	spoiled map[string]bool

	newSet   map[string]bool        // sets that must be made, or made anew
	newChain map[string]bool        // likewise, but their rules follow below
	rewrite  map[string]bool        // chains whose rules are written anew
	newObj   map[string]bool        // by kind and name
	delta    map[string]*largeDelta // of large sets that stay
	bans     map[string]*banDelta   // of sets of bans that stay
	sets     map[string]*rules.Set  // by name
	real     map[string]string      // the names of sets in the kernel, afterwards
}

// banDelta is what changes in a set of bans.
type banDelta struct{ gone, missing []rules.Ban }

// largeDelta is what changes in a large set.
type largeDelta struct{ gone, missing []rules.AddrRange }

// chainPreparing stands in a table while an apply is at work in it: what no base
// chain leads to is then no part of the ruleset.
const chainPreparing = "preparing"

// steps are the transactions: one prepares what no packet meets yet, one changes
// what judges, one clears away what no packet meets any more. The first and the
// last may be empty.
type steps struct{ prepare, change, clear []message }

func (s *steps) all() []message { return slices.Concat(s.prepare, s.change, s.clear) }

// steps lists the messages. Their order is the kernel's: what is used goes after
// what uses it, and what is used comes before.
func (t *transaction) steps() (*steps, error) {
	t.plan()
	s := &steps{}
	marker := encodeChain(t.table, &rules.Chain{Name: chainPreparing})
	var left []message
	if t.is.Present {
		left = t.clearLeft(&t.is.left)
	}
	if t.afresh {
		s.change = append(append(s.change, t.want.table), left...)
		s.change = append(s.change, t.removals(true)...)
		s.change = append(s.change, t.removals(false)...)
	} else {
		if s.prepare = t.prepare(); len(s.prepare) > 0 {
			s.prepare = append(append(left, marker), s.prepare...)
			if !t.is.Present {
				s.prepare = append([]message{t.want.table}, s.prepare...)
			}
			left = nil
		}
		s.clear = t.removals(false)
		s.change = append(append(s.change, t.want.table), left...)
		done := t.del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, chainPreparing, "chain")
		switch {
		case len(s.clear) > 0:
			if len(s.prepare) == 0 {
				s.change = append(s.change, marker)
			}
			s.clear = append(s.clear, done)
		case len(s.prepare) > 0:
			s.change = append(s.change, done)
		}
		s.change = append(s.change, t.removals(true)...)
	}
	err := t.additions(s)
	return s, err
}

// early reports whether a chain can be made before anything leads to it.
func (t *transaction) early(ch encodedChain) bool {
	return !t.afresh && t.newChain[ch.name] && ch.from.Base == nil
}

// prepare makes sets that change, and the chains that maps lead to.
func (t *transaction) prepare() (out []message) {
	for _, ch := range t.want.chains {
		if t.early(ch) {
			out = append(out, ch.message)
		}
	}
	for _, s := range t.want.sets {
		if name := s.set.Name; t.newSet[name] && !s.set.Meter {
			out = append(out, encodeSet(t.table, t.real[name], s.set))
		}
	}
	for _, s := range t.want.sets {
		if name := s.set.Name; t.newSet[name] && !s.set.Meter {
			out = append(out, t.want.elements(t.table, t.real[name], s.set)...)
		}
	}
	return out
}

// additions writes the rest of what is new.
func (t *transaction) additions(s *steps) error {
	for _, o := range t.want.objects {
		if t.newObj[o.name] {
			s.change = append(s.change, o.message)
		}
	}
	for _, ch := range t.want.chains {
		if !t.early(ch) && (t.newChain[ch.name] || t.is.chains[ch.name].definition != t.wanted.chains[ch.name].definition) {
			s.change = append(s.change, ch.message)
		}
	}
	if t.afresh {
		s.change = append(s.change, t.prepare()...)
	}
	for _, set := range t.want.sets {
		name := set.set.Name
		if d := t.bans[name]; d != nil {
			w := t.writer(set.set, unix.NFT_MSG_NEWSETELEM)
			w.bans(d.missing, t.want.now)
			w.flush()
			s.change = append(s.change, w.out...)
		}
		switch d := t.delta[name]; {
		case t.newSet[name] && set.set.Meter:
			s.change = append(s.change, encodeSet(t.table, t.real[name], set.set))
		case d != nil:
			w := t.writer(set.set, unix.NFT_MSG_NEWSETELEM)
			w.ranges(d.missing)
			w.flush()
			s.change = append(s.change, w.out...)
		}
	}
	for _, ch := range t.want.chains {
		if !t.rewrite[ch.name] && !t.newChain[ch.name] {
			continue
		}
		for _, r := range ch.from.Rules {
			m, err := encodeRule(t.table, ch.name, r, func(set string) string { return t.real[set] })
			if err != nil {
				return err
			}
			s.change = append(s.change, m)
		}
	}
	return nil
}

// plan decides what stays.
func (t *transaction) plan() {
	t.sets = map[string]*rules.Set{}
	for _, s := range t.want.sets {
		t.sets[s.set.Name] = s.set
	}
	t.decide(true)
	for name := range t.newChain {
		// A name that is taken by a chain of another kind is free only in the end.
		t.afresh = t.afresh || t.is.chains[name] != nil
	}
	if t.afresh || t.moreThanLists() {
		t.decide(false)
	}
	t.real = map[string]string{}
	for name, set := range t.sets {
		t.real[name] = t.is.realName(name)
		if t.newSet[name] && !set.Meter && !t.afresh && t.is.sets[name] != nil {
			if t.real[name] = name; t.is.realName(name) == name {
				t.real[name] = name + secondName
			}
		}
	}
}

// decide decides what stays; inPlace lets large sets change where they are.
func (t *transaction) decide(inPlace bool) {
	t.newSet, t.newChain, t.rewrite, t.newObj = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	t.delta, t.bans = map[string]*largeDelta{}, map[string]*banDelta{}
	for name := range t.sets {
		t.newSet[name] = !t.keepsSet(name, inPlace)
	}
	for _, o := range t.want.objects {
		is, ok := t.is.objects[o.name]
		t.newObj[o.name] = !ok || is != t.wanted.objects[o.name]
	}
	for name, wanted := range t.wanted.chains {
		is := t.is.chains[name]
		if is == nil || is.anonymous || is.hook != wanted.hook {
			t.newChain[name] = true
			continue
		}
		t.rewrite[name] = t.afresh || !slices.Equal(is.rules, wanted.rules) || t.loses(is.rules)
	}
}

// moreThanLists reports whether a list would change in place beside something
// else, or one of its parts take over what another held.
func (t *transaction) moreThanLists() bool {
	base := ""
	for name, d := range t.delta {
		// The two families and the single addresses of one list.
		list := strings.TrimRight(rules.SplitName(name), "46")
		if base != "" && base != list {
			return true
		}
		base = list
		for other, o := range t.delta {
			if other != name && rules.SplitName(other) == rules.SplitName(name) && overlap(d.missing, o.gone) {
				return true
			}
		}
	}
	for name := range t.newSet {
		if t.newSet[name] {
			return true
		}
	}
	for name := range t.newObj {
		if t.newObj[name] {
			return true
		}
	}
	for name := range t.wanted.chains {
		if name != rules.ChainApplied && (t.newChain[name] || t.rewrite[name]) {
			return true
		}
	}
	return len(t.is.chains) != len(t.wanted.chains) || len(t.is.sets) != len(t.wanted.sets)
}

// overlap reports whether two ascending lists have addresses in common.
func overlap(a, b []rules.AddrRange) bool {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].Hi.Less(b[0].Lo):
			a = a[1:]
		case b[0].Hi.Less(a[0].Lo):
			b = b[1:]
		default:
			return true
		}
	}
	return false
}

// loses reports whether rules name something that is made anew: the kernel lets
// nothing go that a rule uses.
func (t *transaction) loses(list []string) bool {
	lost := false
	for _, r := range list {
		uses([]byte(r), func(name string) {
			lost = lost || t.newSet[name] || t.newObj["counter "+name] || t.newObj["limit "+name]
		})
	}
	return lost
}

// keepsSet decides whether a set stays, and what of its content changes.
func (t *transaction) keepsSet(name string, inPlace bool) bool {
	is, wanted := t.is.sets[name], t.wanted.sets[name]
	switch {
	case is == nil || is.definition != wanted.definition || is.is(unix.NFT_SET_ANONYMOUS) || is.is(unix.NFT_SET_CONSTANT):
		return false
	case is.is(unix.NFT_SET_EVAL):
		return meterStays(name, t.is, t.wanted)
	case t.afresh:
		return false
	case wanted.bans():
		return t.keepsBans(name, is, wanted)
	case wanted.large != nil:
		return t.keepsLarge(name, is, wanted, inPlace)
	}
	return len(diffSets(name, is, wanted, t.is.at)) == 0
}

// keepsBans notes which bans come and go. One that is about to end is left alone: by
// the time of the transaction it may be gone.
func (t *transaction) keepsBans(name string, is, wanted *setState) bool {
	ban := func(e element) rules.Ban {
		a, _ := netip.AddrFromSlice([]byte(e.key()))
		return rules.Ban{Addr: a, Expires: e.until}
	}
	d := &banDelta{}
	a, b := is.elements, wanted.elements
	for len(a) > 0 || len(b) > 0 {
		order := 0
		switch {
		case len(a) == 0:
			order = 1
		case len(b) == 0:
			order = -1
		default:
			order = strings.Compare(a[0].key(), b[0].key())
		}
		switch {
		case order < 0:
			if !a[0].ending(t.is.at) {
				d.gone = append(d.gone, ban(a[0]))
			}
			a = a[1:]
		case order > 0:
			d.missing = append(d.missing, ban(b[0]))
			b = b[1:]
		default:
			if !a[0].same(b[0]) {
				if a[0].ending(t.is.at) {
					return false
				}
				d.gone, d.missing = append(d.gone, ban(a[0])), append(d.missing, ban(b[0]))
			}
			a, b = a[1:], b[1:]
		}
	}
	if len(d.gone)+len(d.missing) > 0 {
		t.bans[name] = d
	}
	return true
}

func (t *transaction) keepsLarge(name string, is, wanted *setState, inPlace bool) bool {
	if t.spoiled[name] || is.large == nil {
		return false
	}
	if len(diffSets(name, is, wanted, t.is.at)) == 0 {
		return true
	}
	set := t.sets[name]
	if !inPlace {
		return false
	}
	known := t.known(name)
	if known == nil || is.large.count >= 0 && is.large.count != kernelCount(known) {
		return false
	}
	old, now := slices.Collect(known.Addrs.All()), slices.Collect(set.Addrs.All())
	d := &largeDelta{}
	d.gone, d.missing = rangeChanges(old, now)
	if set.Interval && !apartRanges(d.gone, d.missing, old, now) {
		return false
	}
	t.delta[name] = d
	return true
}

// apartRanges reports whether what changes in a set of ranges keeps clear of
// everything else in it: where ranges touch or overlap, older kernels find what is
// neither in the one content nor in the other while they commit.
func apartRanges(gone, missing, old, now []rules.AddrRange) bool {
	alone := func(r rules.AddrRange, list []rules.AddrRange) bool {
		// The first that does not end before r, and does not touch it either.
		i := sort.Search(len(list), func(i int) bool {
			end, ok := endOf(list[i].Hi)
			return !ok || !end.Less(r.Lo)
		})
		if i < len(list) && list[i] == r {
			i++
		}
		if i == len(list) {
			return true
		}
		end, ok := endOf(r.Hi)
		return ok && end.Less(list[i].Lo)
	}
	for _, changed := range [][]rules.AddrRange{gone, missing} {
		for _, r := range changed {
			if !alone(r, old) || !alone(r, now) {
				return false
			}
		}
	}
	return true
}

// rangeChanges compares two ascending lists.
func rangeChanges(old, wanted []rules.AddrRange) (gone, missing []rules.AddrRange) {
	for len(old) > 0 && len(wanted) > 0 {
		switch {
		case old[0] == wanted[0]:
			old, wanted = old[1:], wanted[1:]
		case old[0].Lo.Less(wanted[0].Lo):
			gone, old = append(gone, old[0]), old[1:]
		case wanted[0].Lo.Less(old[0].Lo):
			missing, wanted = append(missing, wanted[0]), wanted[1:]
		default: // the same start, another end
			gone, old = append(gone, old[0]), old[1:]
			missing, wanted = append(missing, wanted[0]), wanted[1:]
		}
	}
	return append(gone, old...), append(missing, wanted...)
}

func (t *transaction) writer(set *rules.Set, typ uint16) *elementWriter {
	w := &elementWriter{table: t.table, name: t.is.realName(set.Name), set: set, typ: typ, what: "elements"}
	if typ == unix.NFT_MSG_NEWSETELEM {
		w.flags = unix.NLM_F_CREATE
	} else {
		w.what = "removal of elements"
	}
	return w
}

func (t *transaction) del(typ, tableAttr, nameAttr uint16, name, what string) message {
	b := attrString(attrString(nil, tableAttr, t.table), nameAttr, name)
	return message{typ: typ, attrs: b, what: "removal of " + what + " " + name}
}

// clearLeft takes away what an apply left that did not come to its end.
func (t *transaction) clearLeft(l *leftovers) []message {
	var out []message
	for _, name := range l.chains {
		out = append(out, t.del(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, name, "the rules of chain"))
	}
	for _, name := range l.sets {
		out = append(out, t.del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, name, "the elements of set"))
	}
	for _, name := range l.chains {
		out = append(out, t.del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name, "chain"))
	}
	for _, name := range l.sets {
		out = append(out, t.del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name, "set"))
	}
	for _, o := range l.objects {
		out = append(out, t.delObject(o))
	}
	return out
}

func (t *transaction) delObject(o objectState) message {
	b := attrString(nil, unix.NFTA_OBJ_TABLE, t.table)
	b = attrString(b, unix.NFTA_OBJ_NAME, o.name)
	b = attr32(b, unix.NFTA_OBJ_TYPE, o.typ)
	return message{typ: unix.NFT_MSG_DELOBJ, attrs: b, what: "removal of " + objectKind(o.typ) + " " + o.name}
}

// removals takes away what does not stay: with now, what packets meet or what is
// made anew under its name, and else the rest.
func (t *transaction) removals(now bool) []message {
	var out []message
	del := func(typ, tableAttr, nameAttr uint16, name, what string) {
		out = append(out, t.del(typ, tableAttr, nameAttr, name, what))
	}
	is := t.is
	leaves := func(name string) bool { // a chain of the table that is
		ch := is.chains[name]
		_, wanted := t.wanted.chains[name]
		return !ch.anonymous && (!wanted || t.newChain[name]) && now == (ch.base || t.newChain[name])
	}
	for _, name := range sortedKeys(is.chains) {
		// The rules of a chain that leaves later go now if what they name is made anew.
		if ch := is.chains[name]; !ch.anonymous && len(ch.rules) > 0 && (leaves(name) || now && (t.rewrite[name] || t.loses(ch.rules))) {
			del(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, name, "the rules of chain")
		}
	}
	goes := func(name string) bool { // a set of the table that is
		set := is.sets[name]
		if set.is(unix.NFT_SET_ANONYMOUS) || t.wanted.sets[name] != nil && !t.newSet[name] {
			return false // anonymous sets end with their rule
		}
		// Under its own name: a meter, or when all is written afresh.
		anew := t.newSet[name] && t.real[name] == is.realName(name)
		return now == anew
	}
	// Maps hold on to the chains they jump to. Other sets go with their elements:
	// packets of the old generation still find them.
	for _, name := range sortedKeys(is.sets) {
		if d := t.bans[name]; now && d != nil {
			w := t.writer(t.sets[name], unix.NFT_MSG_DELSETELEM)
			for _, b := range d.gone {
				w.element(b.Addr.AsSlice(), 0, "", 0)
			}
			w.flush()
			out = append(out, w.out...)
		}
		switch d := t.delta[name]; {
		case goes(name):
			if is.sets[name].is(unix.NFT_SET_MAP) && !is.sets[name].is(unix.NFT_SET_CONSTANT) {
				del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, is.realName(name), "the elements of set")
			}
		case now && d != nil:
			w := t.writer(t.sets[name], unix.NFT_MSG_DELSETELEM)
			w.ranges(d.gone)
			w.flush()
			out = append(out, w.out...)
		}
	}
	for _, name := range sortedKeys(is.chains) {
		if leaves(name) {
			del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name, "chain")
		}
	}
	for _, name := range sortedKeys(is.sets) {
		if goes(name) {
			del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, is.realName(name), "set")
		}
	}
	for _, key := range sortedKeys(is.objects) {
		if o := is.objects[key]; now == t.newObj[key] && (t.newObj[key] || t.wanted.objects[key].name == "") {
			out = append(out, t.delObject(o))
		}
	}
	if !now {
		for _, name := range sortedKeys(is.flowtables) {
			del(unix.NFT_MSG_DELFLOWTABLE, nftaFlowTable, nftaFlowName, name, "flowtable")
		}
	}
	return out
}
