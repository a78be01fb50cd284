package firewall

import (
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// transaction turns the table that is into the wanted one, in place: only what
// differs is written, base chains stay hooked throughout (one that is deleted and
// added again accepts packets until its policy takes hold at the end of the
// commit), and a set whose content changes keeps what stays.
type transaction struct {
	table      string
	is, wanted *Snapshot
	want       *encoded
	// afresh writes everything but base chains, counters and meters, whatever is
	// there: for tables that others have turned into something else.
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
}

// largeDelta is what changes in a large set.
type largeDelta struct{ gone, missing []rules.AddrRange }

// messages lists the messages of the transaction. Their order is the kernel's:
// what is used goes after what uses it, and what is used comes before.
func (t *transaction) messages() []message {
	t.plan()
	out := []message{t.want.table}
	if t.is.Present {
		out = append(out, t.removals()...)
	}
	for _, o := range t.want.objects {
		if t.newObj[o.name] {
			out = append(out, o.message)
		}
	}
	for _, ch := range t.want.chains {
		if is := t.is.chains[ch.name]; t.newChain[ch.name] || is.definition != t.wanted.chains[ch.name].definition {
			out = append(out, ch.message)
		}
	}
	for _, s := range t.want.sets {
		if t.newSet[s.set.Name] {
			out = append(out, s.message)
		}
	}
	for _, s := range t.want.sets {
		name := s.set.Name
		switch d := t.delta[name]; {
		case t.newSet[name]:
			out = append(out, t.want.elements(t.table, s.set)...)
		case d != nil:
			w := t.writer(s.set, unix.NFT_MSG_NEWSETELEM)
			w.addresses(d.missing, nil)
			w.flush()
			out = append(out, w.out...)
		default:
			w := t.writer(s.set, unix.NFT_MSG_NEWSETELEM)
			w.raw(t.small[name][1])
			out = append(out, w.out...)
		}
	}
	for _, ch := range t.want.chains {
		if t.rewrite[ch.name] || t.newChain[ch.name] {
			out = append(out, ch.rules...)
		}
	}
	return out
}

// plan decides what stays.
func (t *transaction) plan() {
	t.newSet, t.newChain, t.rewrite, t.newObj = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}
	t.delta, t.small, t.sets = map[string]*largeDelta{}, map[string][2][]element{}, map[string]*rules.Set{}
	for _, s := range t.want.sets {
		t.sets[s.set.Name] = s.set
		t.newSet[s.set.Name] = !t.keepsSet(s.set.Name)
	}
	for _, o := range t.want.objects {
		is, ok := t.is.objects[o.name]
		t.newObj[o.name] = !ok || is != t.wanted.objects[o.name]
	}
	for name, wanted := range t.wanted.chains {
		is := t.is.chains[name]
		if is == nil || is.anonymous || is.hook != wanted.hook || t.afresh && !is.base {
			t.newChain[name] = true
			continue
		}
		t.rewrite[name] = t.afresh || !equalRules(is.rules, wanted.rules) || t.loses(is.rules)
	}
}

func equalRules(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
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
func (t *transaction) keepsSet(name string) bool {
	is, wanted := t.is.sets[name], t.wanted.sets[name]
	switch {
	case is == nil || is.definition != wanted.definition || is.is(unix.NFT_SET_ANONYMOUS) || is.is(unix.NFT_SET_CONSTANT):
		return false
	case is.is(unix.NFT_SET_EVAL):
		return meterStays(name, t.is, t.wanted)
	case t.afresh:
		return false
	case wanted.large != nil:
		return t.keepsLarge(name, is, wanted)
	case is.large != nil || len(diffSets(name, is, wanted)) > 0 && !(wanted.first.IsZero() && is.first.IsZero()):
		return false // a deadline cannot be moved in place
	}
	gone, missing := elementChanges(is, wanted)
	if is.is(unix.NFT_SET_INTERVAL) && len(gone)+len(missing) > 0 && !apart(is.elements, gone, missing) {
		return false
	}
	t.small[name] = [2][]element{gone, missing}
	return true
}

// apart reports whether what changes in a set of intervals keeps clear of
// everything else in it. Where intervals touch or overlap, the lookup
// (net/netfilter/nft_set_rbtree.c) meets nodes of both generations while a
// transaction is committed, and finds what is neither in the one nor in the other:
// a set that changes so is made anew beside the old one.
func apart(is []element, gone, missing []element) bool {
	type interval struct {
		start, end string // end is the first key after it, "" when there is none
		changed    bool
	}
	changed := make(map[element]bool, len(gone))
	for _, e := range gone {
		changed[e] = true
	}
	var all []interval
	add := func(e element, changed bool) {
		all = append(all, interval{e.key(), element{start: e.end}.key(), changed})
	}
	for _, e := range is {
		add(e, changed[e])
	}
	for _, e := range missing {
		add(e, true)
	}
	slices.SortFunc(all, func(a, b interval) int { return strings.Compare(a.start, b.start) })
	for i := 1; i < len(all); i++ {
		// Those that stay are apart, so that no other can reach beyond its neighbour unseen.
		if before, here := all[i-1], all[i]; (before.changed || here.changed) && (before.end == "" || before.end >= here.start) {
			return false
		}
	}
	return true
}

func (t *transaction) keepsLarge(name string, is, wanted *setState) bool {
	if t.spoiled[name] || is.large == nil {
		return false
	}
	if len(diffSets(name, is, wanted)) == 0 {
		return true
	}
	old := t.known(name)
	set := t.sets[name]
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

// apartRanges is apart for ranges of addresses, of which few of many change.
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
	w := &elementWriter{table: t.table, set: set, typ: typ, what: "elements"}
	if typ == unix.NFT_MSG_NEWSETELEM {
		w.flags = unix.NLM_F_CREATE
	} else {
		w.what = "removal of elements"
	}
	return w
}

// removals takes away what does not stay.
func (t *transaction) removals() []message {
	var out []message
	del := func(typ, tableAttr, nameAttr uint16, name, what string) {
		b := attrString(nil, tableAttr, t.table)
		if name != "" {
			b = attrString(b, nameAttr, name)
		}
		out = append(out, message{typ: typ, attrs: b, what: "removal of " + what + " " + name})
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
			del(unix.NFT_MSG_DELSETELEM, unix.NFTA_SET_ELEM_LIST_TABLE, unix.NFTA_SET_ELEM_LIST_SET, name, "the elements of set")
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
			del(unix.NFT_MSG_DELSET, unix.NFTA_SET_TABLE, unix.NFTA_SET_NAME, name, "set")
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
