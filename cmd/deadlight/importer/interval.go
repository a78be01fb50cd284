package importer

import (
	"net/netip"
	"slices"
)

// point is what intervals are made of.
type point[T any] interface {
	comparable
	Compare(T) int
	Next() T
	Prev() T
}

// num is a protocol, a port, or an ICMP type and code.
type num uint32

// Compare orders numbers.
func (n num) Compare(m num) int { return int(int64(n) - int64(m)) }

// Next is the number above.
func (n num) Next() num { return n + 1 }

// Prev is the number below.
func (n num) Prev() num { return n - 1 }

// interval is inclusive.
type interval[T point[T]] struct{ lo, hi T }

// intervals is a set: ascending, disjoint, not adjacent.
type intervals[T point[T]] []interval[T]

type (
	nums  = intervals[num]
	addrs = intervals[netip.Addr]
)

func one(lo, hi num) nums { return nums{{lo, hi}} }

// union joins intervals in any order.
func union[T point[T]](list ...interval[T]) intervals[T] {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b interval[T]) int { return a.lo.Compare(b.lo) })
	var out intervals[T]
	for _, i := range list {
		if n := len(out); n > 0 && (i.lo.Compare(out[n-1].hi) <= 0 || out[n-1].hi.Next() == i.lo) {
			if i.hi.Compare(out[n-1].hi) > 0 {
				out[n-1].hi = i.hi
			}
			continue
		}
		out = append(out, i)
	}
	return out
}

func (s intervals[T]) and(t intervals[T]) intervals[T] {
	var out intervals[T]
	for i, k := 0, 0; i < len(s) && k < len(t); {
		lo, hi := s[i].lo, s[i].hi
		if t[k].lo.Compare(lo) > 0 {
			lo = t[k].lo
		}
		if t[k].hi.Compare(hi) < 0 {
			hi = t[k].hi
		}
		if lo.Compare(hi) <= 0 {
			out = append(out, interval[T]{lo, hi})
		}
		if s[i].hi.Compare(t[k].hi) < 0 {
			i++
		} else {
			k++
		}
	}
	return out
}

func (s intervals[T]) minus(t intervals[T]) intervals[T] {
	var out intervals[T]
	k := 0
	for _, i := range s {
		for k < len(t) && t[k].hi.Compare(i.lo) < 0 {
			k++
		}
		lo, done := i.lo, false
		for j := k; j < len(t) && t[j].lo.Compare(i.hi) <= 0; j++ {
			if t[j].lo.Compare(lo) > 0 {
				out = append(out, interval[T]{lo, t[j].lo.Prev()})
			}
			if t[j].hi.Compare(i.hi) >= 0 {
				done = true
				break
			}
			lo = t[j].hi.Next()
		}
		if !done {
			out = append(out, interval[T]{lo, i.hi})
		}
	}
	return out
}

func (s intervals[T]) equal(t intervals[T]) bool { return slices.Equal(s, t) }

func (s intervals[T]) within(t intervals[T]) bool { return len(s.minus(t)) == 0 }

func (s intervals[T]) has(p T) bool {
	return slices.ContainsFunc(s, func(i interval[T]) bool { return i.lo.Compare(p) <= 0 && p.Compare(i.hi) <= 0 })
}

func prefixInterval(p netip.Prefix) interval[netip.Addr] {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	hi, _ := netip.AddrFromSlice(last)
	return interval[netip.Addr]{p.Addr(), hi}
}

// network is the set of a prefix that is known to be one.
func network(s string) addrs { return addrs{prefixInterval(netip.MustParsePrefix(s))} }

// words writes a set of addresses as a policy has them: prefixes or ranges.
func words(s addrs) []string {
	var out []string
	for _, i := range s {
		switch p, ok := exactPrefix(i); {
		case i.lo == i.hi:
			out = append(out, i.lo.String())
		case ok:
			out = append(out, p.String())
		default:
			out = append(out, i.lo.String()+"-"+i.hi.String())
		}
	}
	return out
}

// exactPrefix gives the prefix that is the interval, if there is one.
func exactPrefix(i interval[netip.Addr]) (netip.Prefix, bool) {
	for bits := 0; bits <= i.lo.BitLen(); bits++ {
		p := netip.PrefixFrom(i.lo, bits)
		if p.Masked().Addr() == i.lo {
			if prefixInterval(p).hi == i.hi {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}
