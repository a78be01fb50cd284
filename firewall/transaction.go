package firewall

import (
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
// Rules, chains and hash sets change for packets at one instant of the commit. Sets
// of intervals do not: their lookup (net/netfilter/nft_set_rbtree.c) changes at the
// end of it, and meets elements of both generations before. New rules must not meet
// old intervals, nor none: an interval set that changes is made anew, under its
// second name, in a transaction of its own before the one that changes the rules,
// and nothing asks it until then. Only a large set whose list changed, and nothing
// else, changes in place.
type transaction struct {
	table      string
	is, wanted *Snapshot
	want       *encoded
	// afresh writes everything but base chains, counters and meters, whatever is
	// there, in one transaction: for tables that others have turned into something
	// else, or where there is none.
	afresh bool
	// known gives what a large set holds now; nil when nobody knows.
	known func(set string) []rules.AddrRange
	// spoiled are the large sets that do not hold what their mark says.
	spoiled map[string]bool

	newSet   map[string]bool         // sets that must be made, or made anew
	newChain map[string]bool         // likewise, but their rules follow below
	rewrite  map[string]bool         // chains whose rules are written anew
	newObj   map[string]bool         // by kind and name
	delta    map[string]*largeDelta  // of large sets that stay
	small    map[string][2][]element // of small sets that stay: gone and missing
	sets     map[string]*rules.Set   // by name
	real     map[string]string       // the names of sets in the kernel, afterwards
}

// largeDelta is what changes in a large set.
type largeDelta struct{ gone, missing []rules.AddrRange }

// chainPreparing marks a table in which an apply prepares sets: what nothing uses
// there is no part of the ruleset.
const chainPreparing = "preparing"

// messages lists the messages of the transactions, one or two. Their order is the
// kernel's: what is used goes after what uses it, and what is used comes before.
func (t *transaction) messages() (first, second []message, err error) {
	t.plan()
	prepared := func(name string) bool { return !t.afresh && t.newSet[name] && t.sets[name].Interval }
	early := func(ch encodedChain) bool {
		return t.newChain[ch.name] && ch.from.Base == nil && t.is.chains[ch.name] == nil
	}
	var clean []message
	if t.is.Present {
		clean = t.leftovers()
	}
	two := slices.ContainsFunc(t.want.sets, func(s encodedSet) bool { return prepared(s.set.Name) })
	second = append(second, t.want.table)
	if two {
		if !t.is.Present {
			first = append(first, t.want.table)
		}
		first = append(first, clean...)
		first = append(first, encodeChain(t.table, &rules.Chain{Name: chainPreparing}))
		second = append(second, t.del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, chainPreparing, "chain"))
	} else {
		second = append(second, clean...)
	}
	if t.is.Present {
		second = append(second, t.removals()...)
	}
	for _, o := range t.want.objects {
		if t.newObj[o.name] {
			second = append(second, o.message)
		}
	}
	for _, ch := range t.want.chains {
		switch is := t.is.chains[ch.name]; {
		case two && early(ch):
			first = append(first, ch.message)
		case t.newChain[ch.name] || is.definition != t.wanted.chains[ch.name].definition:
			second = append(second, ch.message)
		}
	}
	for _, s := range t.want.sets {
		name := s.set.Name
		if !t.newSet[name] {
			continue
		}
		if m := encodeSet(t.table, t.real[name], s.set); prepared(name) {
			first = append(first, m)
		} else {
			second = append(second, m)
		}
	}
	for _, s := range t.want.sets {
		name := s.set.Name
		switch d := t.delta[name]; {
		case prepared(name):
			first = append(first, t.want.elements(t.table, t.real[name], s.set)...)
		case t.newSet[name]:
			second = append(second, t.want.elements(t.table, t.real[name], s.set)...)
		case d != nil:
			w := t.writer(s.set, unix.NFT_MSG_NEWSETELEM)
			w.addresses(d.missing, nil)
			w.flush()
			second = append(second, w.out...)
		default:
			w := t.writer(s.set, unix.NFT_MSG_NEWSETELEM)
			w.raw(t.small[name][1])
			second = append(second, w.out...)
		}
	}
	for _, ch := range t.want.chains {
		if !t.rewrite[ch.name] && !t.newChain[ch.name] {
			continue
		}
		for _, r := range ch.from.Rules {
			m, err := encodeRule(t.table, ch.name, r, func(set string) string { return t.real[set] })
			if err != nil {
				return nil, nil, err
			}
			second = append(second, m)
		}
	}
	return first, second, nil
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
		if t.newSet[name] && set.Interval && !t.afresh && t.is.sets[name] != nil {
			if t.real[name] = name; t.is.realName(name) == name {
				t.real[name] = name + secondName
			}
		}
	}
}

// decide decides what stays; inPlace lets large sets change where they are.
func (t *transaction) decide(inPlace bool) {
	t.newSet, t.newChain, t.rewrite, t.newObj = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	t.delta, t.small = map[string]*largeDelta{}, map[string][2][]element{}
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

// moreThanLists reports whether a list of intervals would change in place beside
// something else, or take over from the single addresses beside it.
func (t *transaction) moreThanLists() bool {
	intervals, base := false, ""
	for name, d := range t.delta {
		set := t.sets[name]
		intervals = intervals || set.Interval
		// The two families and the single addresses of one list.
		list := strings.TrimRight(strings.TrimSuffix(name, "_hosts"), "46")
		if base != "" && base != list {
			return true
		}
		base = list
		if hosts := t.delta[name+"_hosts"]; hosts != nil && (overlap(d.missing, hosts.gone) || overlap(d.gone, hosts.missing)) {
			return true
		}
	}
	if !intervals {
		return false
	}
	for name := range t.newSet {
		if t.newSet[name] || len(t.small[name][0])+len(t.small[name][1]) > 0 {
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
	case wanted.large != nil:
		return t.keepsLarge(name, is, wanted, inPlace)
	case is.large != nil || len(diffSets(name, is, wanted)) > 0 && !(wanted.first.IsZero() && is.first.IsZero()):
		return false // a deadline cannot be moved in place
	}
	gone, missing := elementChanges(is, wanted)
	if is.is(unix.NFT_SET_INTERVAL) && len(gone)+len(missing) > 0 {
		return false
	}
	t.small[name] = [2][]element{gone, missing}
	return true
}

func (t *transaction) keepsLarge(name string, is, wanted *setState, inPlace bool) bool {
	if t.spoiled[name] || is.large == nil {
		return false
	}
	if len(diffSets(name, is, wanted)) == 0 {
		return true
	}
	set := t.sets[name]
	if set.Interval && !inPlace {
		return false
	}
	old := t.known(name)
	if old == nil || is.large.count >= 0 && is.large.count != kernelCount(&rules.Set{Addrs: old, Interval: set.Interval}) {
		return false
	}
	now := set.Ranges()
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

// leftovers takes away what an apply prepared that did not come to its end.
func (t *transaction) leftovers() []message {
	var out []message
	for _, name := range t.is.leftSets {
		out = append(out,
			t.del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, name, "the elements of set"),
			t.del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name, "set"))
	}
	for _, name := range t.is.leftChains {
		out = append(out, t.del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name, "chain"))
	}
	return out
}

// removals takes away what does not stay.
func (t *transaction) removals() []message {
	var out []message
	del := func(typ, tableAttr, nameAttr uint16, name, what string) {
		out = append(out, t.del(typ, tableAttr, nameAttr, name, what))
	}
	leaves := func(name string) bool { // a chain of the table that is
		_, wanted := t.wanted.chains[name]
		return !wanted || t.newChain[name]
	}
	for _, name := range sortedKeys(t.is.chains) {
		if ch := t.is.chains[name]; !ch.anonymous && len(ch.rules) > 0 && (leaves(name) || t.rewrite[name]) {
			del(unix.NFT_MSG_DELRULE, unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, name, "the rules of chain")
		}
	}
	goes := func(name string) bool { // a set of the table that is
		is := t.is.sets[name]
		return !is.is(unix.NFT_SET_ANONYMOUS) && (t.wanted.sets[name] == nil || t.newSet[name]) // anonymous sets end with their rule
	}
	// Maps hold on to the chains they jump to. Other sets go with their elements:
	// packets of the old generation still find them.
	for _, name := range sortedKeys(t.is.sets) {
		is := t.is.sets[name]
		switch {
		case goes(name) && is.is(unix.NFT_SET_MAP) && !is.is(unix.NFT_SET_CONSTANT):
			del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, t.is.realName(name), "the elements of set")
		case goes(name):
		case t.delta[name] != nil:
			w := t.writer(t.sets[name], unix.NFT_MSG_DELSETELEM)
			w.addresses(t.delta[name].gone, nil)
			w.flush()
			out = append(out, w.out...)
		case len(t.small[name][0]) > 0:
			w := t.writer(t.sets[name], unix.NFT_MSG_DELSETELEM)
			w.raw(t.small[name][0])
			out = append(out, w.out...)
		}
	}
	for _, name := range sortedKeys(t.is.chains) {
		if leaves(name) && !t.is.chains[name].anonymous {
			del(unix.NFT_MSG_DELCHAIN, unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, name, "chain")
		}
	}
	for _, name := range sortedKeys(t.is.sets) {
		if goes(name) {
			del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, t.is.realName(name), "set")
		}
	}
	for _, key := range sortedKeys(t.is.objects) {
		if o := t.is.objects[key]; t.newObj[key] || t.wanted.objects[key].name == "" {
			b := attrString(nil, unix.NFTA_OBJ_TABLE, t.table)
			b = attrString(b, unix.NFTA_OBJ_NAME, o.name)
			b = attr32(b, unix.NFTA_OBJ_TYPE, o.typ)
			out = append(out, message{typ: unix.NFT_MSG_DELOBJ, attrs: b, what: "removal of " + key})
		}
	}
	for _, name := range sortedKeys(t.is.flowtables) {
		del(unix.NFT_MSG_DELFLOWTABLE, nftaFlowTable, nftaFlowName, name, "flowtable")
	}
	return out
}
