package rules

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"
)

// Which rules say nothing that another does not say too. Ten thousand rules are
// compared, so candidates are looked up, not tried in turn.

// scope is the traffic that a rule is about.
type scope struct {
	traffic    []keyRange // protocols and ports, merged and ascending
	interfaces []string
	sources    []AddrRanges // each of one family, merged and ascending; of an [egress.*] the far ends
	except     []AddrRanges // taken from sources, likewise
	to         []AddrRanges // likewise; nil: every address of the host
	owner      string       // "" is any
	until      time.Time    // zero: forever
	limited    bool         // by a rate or a number: it can be covered, but covers nothing
	unsure     bool         // its addresses are not all known
}

// keyRange is a range of ports of a protocol: the protocol stands in the high
// half of a key.
type keyRange struct{ lo, hi uint32 }

func keys(p Protocol, r PortRange) keyRange {
	return keyRange{uint32(p)<<16 | uint32(r.Lo), uint32(p)<<16 | uint32(r.Hi)}
}

// trafficKeys gives the keys of what a rule names.
func trafficKeys(t *Traffic) []keyRange {
	if t.Any {
		return []keyRange{{0, 1<<24 - 1}}
	}
	var out []keyRange
	for _, on := range t.On {
		if len(on.Ports) == 0 {
			out = append(out, keys(on.Protocol, PortRange{0, 65535}))
		}
		for _, r := range on.Ports {
			out = append(out, keys(on.Protocol, r))
		}
	}
	return out
}

func everywhere() []AddrRange {
	return []AddrRange{
		{netip.IPv4Unspecified(), netip.MustParseAddr("255.255.255.255")},
		{netip.IPv6Unspecified(), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
	}
}

// everyone reports whether no address of any family is left out.
func (s *scope) everyone() bool {
	all := everywhere()
	return contains(s.sources, all[0]) && contains(s.sources, all[1])
}

// effort bounds the comparisons: in a file made to be slow, some covered rules
// go unnoticed.
const effort = 3_000_000

// covering gives for each scope the index of one that covers it, or -1. Of
// scopes that are equal, an earlier one covers the later ones.
func covering(scopes []scope) []int {
	// Rules open to everyone are told apart by port, the others by port or source.
	wide := &tree[uint32]{}
	ports := &tree[uint32]{}
	sources := &tree[netip.Addr]{}
	for i := range scopes {
		s := &scopes[i]
		byPort := ports
		if s.everyone() {
			byPort = wide
		}
		if s.limited {
			continue
		}
		for _, k := range s.traffic {
			byPort.add(k.lo, k.hi, i)
		}
		if byPort == wide {
			continue
		}
		for _, part := range s.sources {
			sources.add(part.At(0).Lo, part.At(part.Len()-1).Hi, i)
		}
	}
	wide.build(cmp.Compare[uint32])
	ports.build(cmp.Compare[uint32])
	sources.build(netip.Addr.Compare)

	out := make([]int, len(scopes))
	left := effort
	for i := range scopes {
		out[i] = -1
		a := &scopes[i]
		if a.unsure || len(a.sources) == 0 || len(a.traffic) == 0 || left < 0 {
			continue
		}
		// The first that covers will do, so that a thousand twins are no work.
		try := func(j int) bool {
			left--
			if b := &scopes[j]; j != i && b.covers(a, &left) && (j < i || !a.covers(b, &left)) {
				out[i] = j
			}
			return out[i] < 0 && left > 0
		}
		if wide.visit(a.traffic[0].lo, try) {
			for _, j := range fewest(ports, a.traffic[0].lo, sources, a.sources[0].At(0).Lo, left) {
				if !try(j) {
					break
				}
			}
		}
	}
	return out
}

// fewest looks up both keys and gives the shorter of the two answers.
func fewest(ports *tree[uint32], port uint32, sources *tree[netip.Addr], source netip.Addr, limit int) []int {
	for most := 64; ; most *= 4 {
		if found := ports.find(port, most); len(found) < most || most > limit {
			return found
		}
		if found := sources.find(source, most); len(found) < most {
			return found
		}
	}
}

// covers reports whether s is about all that a is about.
func (s *scope) covers(a *scope, left *int) bool {
	if s.limited || s.owner != "" && s.owner != a.owner ||
		!s.until.IsZero() && (a.until.IsZero() || s.until.Before(a.until)) {
		return false
	}
	for _, k := range a.traffic {
		*left--
		i := sort.Search(len(s.traffic), func(i int) bool { return s.traffic[i].hi >= k.lo })
		if i == len(s.traffic) || s.traffic[i].lo > k.lo || k.hi > s.traffic[i].hi {
			return false
		}
	}
	*left -= len(s.interfaces) * len(a.interfaces)
	if *left < 0 || !coverInterfaces(s.interfaces, a.interfaces) {
		return false
	}
	if s.to != nil && (a.to == nil || !coversAll(s.to, a.to, left)) {
		return false
	}
	if !coversAll(s.sources, a.sources, left) {
		return false
	}
	// What s leaves out must be out of a as well.
	for _, part := range s.except {
		for r := range part.All() {
			if *left--; *left < 0 || overlap(a.sources, r) && !contains(a.except, r) {
				return false
			}
		}
	}
	return *left >= 0 && !(s.unsure && len(s.except) > 0)
}

// coversAll reports whether every range of a lies in a range of s. It gives up
// when its effort is spent.
func coversAll(s, a []AddrRanges, left *int) bool {
	for _, part := range a {
		for r := range part.All() {
			if *left -= len(s); *left < 0 || !contains(s, r) {
				return false
			}
		}
	}
	return true
}

// contains reports whether one of the parts holds all of r in one range.
func contains(parts []AddrRanges, r AddrRange) bool {
	for _, part := range parts {
		if held, ok := part.reaching(r.Lo); ok && held.Contains(r.Lo) && held.Contains(r.Hi) {
			return true
		}
	}
	return false
}

// overlap reports whether one of the parts holds some of r.
func overlap(parts []AddrRanges, r AddrRange) bool {
	for _, part := range parts {
		if held, ok := part.reaching(r.Lo); ok && held.Lo.Compare(r.Hi) <= 0 {
			return true
		}
	}
	return false
}

// coverInterfaces reports whether every name that matches a of in matches one of s.
func coverInterfaces(s, a []string) bool {
	if len(s) == 0 {
		return true
	}
	if len(a) == 0 {
		return false
	}
	for _, name := range a {
		if !slices.ContainsFunc(s, func(pattern string) bool {
			prefix, ok := strings.CutSuffix(pattern, "*")
			return pattern == name || ok && strings.HasPrefix(strings.TrimSuffix(name, "*"), prefix)
		}) {
			return false
		}
	}
	return true
}

// tree finds the intervals that hold a key: it is sorted by their low ends and
// knows the highest end of each half.
type tree[K any] struct {
	all     []interval[K]
	highest []K // of the half that a middle stands for
	compare func(a, b K) int
}

type interval[K any] struct {
	lo, hi K
	id     int
}

func (t *tree[K]) add(lo, hi K, id int) { t.all = append(t.all, interval[K]{lo, hi, id}) }

// build must be called between the last add and the first find.
func (t *tree[K]) build(compare func(a, b K) int) {
	t.compare = compare
	slices.SortStableFunc(t.all, func(a, b interval[K]) int { return compare(a.lo, b.lo) })
	t.highest = make([]K, len(t.all))
	t.fill(0, len(t.all))
}

func (t *tree[K]) fill(from, to int) {
	if from == to {
		return
	}
	mid := (from + to) / 2
	t.highest[mid] = t.all[mid].hi
	for _, half := range [][2]int{{from, mid}, {mid + 1, to}} {
		t.fill(half[0], half[1])
		if half[0] < half[1] {
			if h := t.highest[(half[0]+half[1])/2]; t.compare(h, t.highest[mid]) > 0 {
				t.highest[mid] = h
			}
		}
	}
}

// find gives the ids of at most limit intervals that hold k.
func (t *tree[K]) find(k K, limit int) []int {
	var out []int
	t.visit(k, func(id int) bool {
		out = append(out, id)
		return len(out) < limit
	})
	return out
}

// visit calls more with the intervals that hold k, lowest first, until it gives
// false.
func (t *tree[K]) visit(k K, more func(id int) bool) bool {
	return t.walk(0, len(t.all), k, more)
}

func (t *tree[K]) walk(from, to int, k K, more func(id int) bool) bool {
	mid := (from + to) / 2
	if from == to || t.compare(t.highest[mid], k) < 0 {
		return true
	}
	if !t.walk(from, mid, k, more) {
		return false
	}
	if t.compare(t.all[mid].lo, k) > 0 {
		return true
	}
	if t.compare(k, t.all[mid].hi) <= 0 && !more(t.all[mid].id) {
		return false
	}
	return t.walk(mid+1, to, k, more)
}
