package rules

import (
	"cmp"
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// Which rules admit nothing that another does not admit too. Ten thousand rules
// are compared, so candidates are looked up, not tried in turn.

// scope is what a rule admits.
type scope struct {
	protocols  []Protocol
	ports      []PortRange
	interfaces []string
	sources    [][]AddrRange // each of one family, merged and ascending
	unsure     bool          // sources are not all known
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
	return s.coversSource(all[0]) && s.coversSource(all[1])
}

// effort bounds the comparisons: in a file made to be slow, some covered rules
// go unnoticed.
const effort = 3_000_000

// covering gives for each scope the index of one that covers it, or -1. Of
// scopes that are equal, an earlier one covers the later ones.
func covering(scopes []scope) []int {
	// Rules open to everyone are told apart by port, the others by port or source.
	wide := &tree[uint16]{}
	ports := &tree[uint16]{}
	sources := &tree[netip.Addr]{}
	for i := range scopes {
		s := &scopes[i]
		byPort := ports
		if s.everyone() {
			byPort = wide
		}
		for _, p := range s.ports {
			byPort.add(p.Lo, p.Hi, i)
		}
		if byPort == wide {
			continue
		}
		for _, part := range s.sources {
			sources.add(part[0].Lo, part[len(part)-1].Hi, i)
		}
	}
	wide.build(cmp.Compare[uint16])
	ports.build(cmp.Compare[uint16])
	sources.build(netip.Addr.Compare)

	out := make([]int, len(scopes))
	left := effort
	for i := range scopes {
		out[i] = -1
		a := &scopes[i]
		if a.unsure || len(a.sources) == 0 || left < 0 {
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
		if wide.visit(a.ports[0].Lo, try) {
			for _, j := range fewest(ports, a.ports[0].Lo, sources, a.sources[0][0].Lo, left) {
				if !try(j) {
					break
				}
			}
		}
	}
	return out
}

// fewest looks up both keys and gives the shorter of the two answers.
func fewest(ports *tree[uint16], port uint16, sources *tree[netip.Addr], source netip.Addr, limit int) []int {
	for most := 64; ; most *= 4 {
		if found := ports.find(port, most); len(found) < most || most > limit {
			return found
		}
		if found := sources.find(source, most); len(found) < most {
			return found
		}
	}
}

// covers reports whether s admits all that a admits.
func (s *scope) covers(a *scope, left *int) bool {
	for _, p := range a.protocols {
		if !slices.Contains(s.protocols, p) {
			return false
		}
	}
	for _, p := range a.ports {
		*left--
		i := sort.Search(len(s.ports), func(i int) bool { return s.ports[i].Hi >= p.Lo })
		if i == len(s.ports) || s.ports[i].Lo > p.Lo || p.Hi > s.ports[i].Hi {
			return false
		}
	}
	*left -= len(s.interfaces) * len(a.interfaces)
	if *left < 0 || !coverInterfaces(s.interfaces, a.interfaces) {
		return false
	}
	for _, part := range a.sources {
		for _, r := range part {
			if *left -= len(s.sources); *left < 0 || !s.coversSource(r) {
				return false
			}
		}
	}
	return true
}

// coversSource reports whether one part of the sources holds all of r.
func (s *scope) coversSource(r AddrRange) bool {
	for _, part := range s.sources {
		i := sort.Search(len(part), func(i int) bool { return part[i].Hi.Compare(r.Lo) >= 0 })
		if i < len(part) && part[i].Contains(r.Lo) && part[i].Contains(r.Hi) {
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
