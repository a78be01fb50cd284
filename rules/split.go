package rules

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
)

// A long list of addresses is split by the length of its prefixes. The kernel puts
// a prefix into a hash set in a fraction of the time that a set of ranges takes,
// without an order to keep, and elements come and go there one by one.

// splitFrom is the number of ranges from which a list is split.
const splitFrom = 1024

// A length of prefixes has a set of its own if it is that of splitFrom ranges, and
// of one in lengthShare: every length is one more lookup a packet. Single addresses
// always have one.
const lengthShare = 16

// split says which ranges of a list are in which part, and how long the prefixes
// of the parts are.
type split struct {
	wide    AddrRanges
	lengths []int
	parts   [129]AddrRanges // by length
}

func splitOf(ranges AddrRanges) *split {
	var counts [129]int
	for _, r := range ranges.v4 {
		counts[prefixLength4(r)]++
	}
	for _, r := range ranges.v6 {
		counts[prefixLength6(r)]++
	}
	single := ranges.At(0).Lo.BitLen()
	room := func(n int) AddrRanges {
		if single == 32 {
			return AddrRanges{v4: make([]uint64, 0, n)}
		}
		return AddrRanges{v6: make([]range6, 0, n)}
	}
	p := &split{}
	var own [129]bool
	wide := 0
	for n, count := range counts {
		own[n] = n == single || n > 0 && count >= splitFrom && count >= ranges.Len()/lengthShare
		if own[n] {
			p.lengths = append(p.lengths, n)
			p.parts[n] = room(count)
		} else {
			wide += count
		}
	}
	p.wide = room(wide)
	part := func(n int) *AddrRanges {
		if own[n] {
			return &p.parts[n]
		}
		return &p.wide
	}
	for _, r := range ranges.v4 {
		into := part(prefixLength4(r))
		into.v4 = append(into.v4, r)
	}
	for _, r := range ranges.v6 {
		into := part(prefixLength6(r))
		into.v6 = append(into.v6, r)
	}
	return p
}

// prefixLength4 is the length of the prefix that a range is; 0 of everything, and
// of a range that is none.
func prefixLength4(r uint64) int {
	lo, hi := uint32(r>>32), uint32(r)
	if d := lo ^ hi; d&(d+1) == 0 && lo&d == 0 {
		return 32 - bits.Len32(d)
	}
	return 0
}

// prefixLength6 is prefixLength4 for IPv6.
func prefixLength6(r range6) int {
	high, low := r.lo.high^r.hi.high, r.lo.low^r.hi.low
	switch {
	case high == 0 && low&(low+1) == 0 && r.lo.low&low == 0:
		return 128 - bits.Len64(low)
	case low == 1<<64-1 && r.lo.low == 0 && high&(high+1) == 0 && r.lo.high&high == 0:
		return 64 - bits.Len64(high)
	}
	return 0
}

// netmask is the mask of a prefix of so many bits.
func netmask(v4 bool, n int) netip.Addr {
	all := netip.AddrFrom16([16]byte(slices.Repeat([]byte{0xff}, 16)))
	if v4 {
		all = netip.AddrFrom4([4]byte{0xff, 0xff, 0xff, 0xff})
	}
	return netip.PrefixFrom(all, n).Masked().Addr()
}

// partName names the set of the prefixes of a length of a long list. No other name
// of ours ends like this.
func partName(name string, length, single int) string {
	if length == single {
		return name + "_hosts"
	}
	return fmt.Sprintf("%s_net%d", name, length)
}

// SplitName gives the name of the list that a set holds a part of.
func SplitName(set string) string {
	if list, ok := strings.CutSuffix(set, "_hosts"); ok {
		return list
	}
	if i := strings.LastIndex(set, "_net"); i >= 0 && len(set) > i+4 && strings.Trim(set[i+4:], "0123456789") == "" {
		return set[:i]
	}
	return set
}

// parts gives the kernel sets that hold ranges of a family under a name: that of
// ranges first, then those of prefixes, the longest last. A long list always has the
// first and the last, so that a line more seldom changes which sets there are.
func (c *compiler) parts(name string, ranges AddrRanges, yield func(Set)) {
	n := ranges.Len()
	if n == 0 {
		return
	}
	t := TypeIPv6
	single := ranges.At(0).Lo.BitLen()
	if single == 32 {
		t = TypeIPv4
	}
	if n < splitFrom {
		wide := false
		for r := range ranges.All() {
			wide = wide || r.Lo != r.Hi
		}
		yield(Set{Name: name, Type: t, Interval: wide, Addrs: ranges})
		return
	}
	p := c.split[name]
	if p == nil {
		p = splitOf(ranges)
		c.split[name] = p
	}
	yield(Set{Name: name, Type: t, Interval: true, Addrs: p.wide, Part: Wide, list: n})
	for _, length := range p.lengths {
		yield(Set{Name: partName(name, length, single), Type: t, Addrs: p.parts[length], Part: Part(length), list: n})
	}
}
