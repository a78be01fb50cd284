package rules

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
	"sort"
	"unicode/utf8"
)

// Lists of addresses may have a million lines: what is written as it should be is
// read byte by byte and kept as numbers until the list is whole.

// AddrRanges are ranges of addresses, ascending and disjoint, IPv4 before IPv6. The
// zero value is empty. What holds one does not change it.
type AddrRanges struct {
	v4 []uint64 // the first address in the high half, the last in the low one
	v6 []range6
}

// RangesOf gives ranges that ascend already, without an overlap.
func RangesOf(list ...AddrRange) AddrRanges {
	var out AddrRanges
	for _, r := range list {
		out.add(r)
	}
	return out
}

// Len counts the ranges.
func (l AddrRanges) Len() int { return len(l.v4) + len(l.v6) }

// At gives the range i.
func (l AddrRanges) At(i int) AddrRange {
	if i < len(l.v4) {
		return range4(l.v4[i])
	}
	return l.v6[i-len(l.v4)].addresses()
}

// All iterates over the ranges.
func (l AddrRanges) All() iter.Seq[AddrRange] {
	return func(yield func(AddrRange) bool) {
		for i := range l.Len() {
			if !yield(l.At(i)) {
				return
			}
		}
	}
}

// Of gives those of a family.
func (l AddrRanges) Of(v4 bool) AddrRanges {
	if v4 {
		return AddrRanges{v4: l.v4}
	}
	return AddrRanges{v6: l.v6}
}

// reaching gives the first range of a's family that does not end before a.
func (l AddrRanges) reaching(a netip.Addr) (AddrRange, bool) {
	if a.Is4() {
		n := uint64(number4(a))
		i := sort.Search(len(l.v4), func(i int) bool { return l.v4[i]&0xffffffff >= n })
		if i == len(l.v4) {
			return AddrRange{}, false
		}
		return range4(l.v4[i]), true
	}
	n := numberOf6(a)
	i := sort.Search(len(l.v6), func(i int) bool { return l.v6[i].hi.compare(n) >= 0 })
	if i == len(l.v6) {
		return AddrRange{}, false
	}
	return l.v6[i].addresses(), true
}

// Contains reports whether an address lies in one of the ranges.
func (l AddrRanges) Contains(a netip.Addr) bool {
	r, ok := l.reaching(a)
	return ok && r.Contains(a)
}

// Overlaps reports whether some of r is among the ranges.
func (l AddrRanges) Overlaps(r AddrRange) bool {
	return overlap([]AddrRanges{l.Of(r.Lo.Is4())}, r)
}

// Equal reports whether both hold the same ranges.
func (l AddrRanges) Equal(o AddrRanges) bool {
	return slices.Equal(l.v4, o.v4) && slices.Equal(l.v6, o.v6)
}

// range6 is a range of IPv6 addresses.
type range6 struct{ lo, hi number6 }

// number6 is an IPv6 address as a number.
type number6 struct{ high, low uint64 }

func (a number6) compare(b number6) int {
	if a.high != b.high {
		return cmp.Compare(a.high, b.high)
	}
	return cmp.Compare(a.low, b.low)
}

// next is the address after a; that of the last one is the first.
func (a number6) next() number6 {
	low, carry := bits.Add64(a.low, 1, 0)
	return number6{a.high + carry, low}
}

func (r range6) addresses() AddrRange { return AddrRange{addr6(r.lo), addr6(r.hi)} }

func packed4(r AddrRange) uint64 { return uint64(number4(r.Lo))<<32 | uint64(number4(r.Hi)) }

func range4(r uint64) AddrRange { return AddrRange{addr4(uint32(r >> 32)), addr4(uint32(r))} }

func (l *AddrRanges) add(a AddrRange) {
	if a.Lo.Is4() {
		l.v4 = append(l.v4, packed4(a))
		return
	}
	l.v6 = append(l.v6, range6{numberOf6(a.Lo), numberOf6(a.Hi)})
}

// merge sorts and merges ranges that were added in any order, in their place.
func (l *AddrRanges) merge() { l.v4, l.v6 = merge4(l.v4), merge6(l.v6) }

// merge4 sorts and merges ranges, in their place.
func merge4(all []uint64) []uint64 {
	if !slices.IsSorted(all) {
		all = sort4(all)
	}
	merged := all[:0]
	for _, r := range all {
		if n := len(merged) - 1; n >= 0 && r>>32 <= merged[n]&0xffffffff+1 {
			merged[n] = max(merged[n], merged[n]&^0xffffffff|r&0xffffffff)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

// sort4 sorts ranges by their first address: three passes over its bits are
// several times faster than comparing a million of them.
func sort4(all []uint64) []uint64 {
	if len(all) < 1<<10 {
		slices.Sort(all)
		return all
	}
	const digit = 1<<11 - 1
	var starts [3][digit + 1]int
	for _, r := range all {
		starts[0][r>>32&digit]++
		starts[1][r>>43&digit]++
		starts[2][r>>54]++
	}
	other := make([]uint64, len(all))
	for pass := range starts {
		next, at := &starts[pass], 0
		for i, n := range next {
			next[i], at = at, at+n
		}
		shift := 32 + 11*pass
		for _, r := range all {
			d := r >> shift & digit
			other[next[d]] = r
			next[d]++
		}
		all, other = other, all
	}
	return all
}

// sort6 sorts ranges by their first address: by the 16 bits that follow what all
// have in common, and then the few that are left together by comparing them.
func sort6(all []range6) []range6 {
	byLo := func(a, b range6) int { return a.lo.compare(b.lo) }
	same := ^uint64(0)
	for _, r := range all {
		same &= ^(r.lo.high ^ all[0].lo.high)
	}
	shift := bits.LeadingZeros64(^same)
	if len(all) < 1<<10 || shift > 48 {
		slices.SortFunc(all, byLo)
		return all
	}
	ends := make([]int, 1<<16+1)
	for _, r := range all {
		ends[r.lo.high<<shift>>48+1]++
	}
	for i := range 1 << 16 {
		ends[i+1] += ends[i]
	}
	out := make([]range6, len(all))
	for _, r := range all {
		i := r.lo.high << shift >> 48
		out[ends[i]] = r
		ends[i]++
	}
	from := 0
	for _, to := range ends[:1<<16] {
		slices.SortFunc(out[from:to], byLo)
		from = to
	}
	return out
}

// merge6 is merge4 for IPv6.
func merge6(all []range6) []range6 {
	byLo := func(a, b range6) int { return a.lo.compare(b.lo) }
	if !slices.IsSortedFunc(all, byLo) {
		all = sort6(all)
	}
	merged := all[:0]
	for _, r := range all {
		n := len(merged) - 1
		if n < 0 || r.lo.compare(merged[n].hi) > 0 && r.lo != merged[n].hi.next() {
			merged = append(merged, r)
		} else if r.hi.compare(merged[n].hi) > 0 {
			merged[n].hi = r.hi
		}
	}
	return merged
}

func addr4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

func number4(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func addr6(n number6) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], n.high)
	binary.BigEndian.PutUint64(b[8:], n.low)
	return netip.AddrFrom16(b)
}

func numberOf6(a netip.Addr) number6 {
	b := a.As16()
	return number6{binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint64(b[8:])}
}

// maxBadLines is how many lines of a list are complained of before the rest is
// taken for something else than a list.
const maxBadLines = 20

// list reads a list of addresses: one a line, with # comments.
func (r *reader) list(file string, src []byte, into *AddrRanges) {
	src = withoutBOM(src)
	lines := bytes.Count(src, []byte("\n")) + 1
	into.v4 = slices.Grow(into.v4, min(lines, bytes.Count(src, []byte("."))/3))
	into.v6 = slices.Grow(into.v6, min(lines, bytes.Count(src, []byte(":"))/2))
	bad := 0
	for number := 1; len(src) > 0; number++ {
		if v4, n := network4(src); n > 0 {
			if end, ok := lineEnd(src[n:]); ok {
				into.v4, src = append(into.v4, v4), src[n+end:]
				continue
			}
		} else if v6, n := network6(src); n > 0 {
			if end, ok := lineEnd(src[n:]); ok {
				into.v6, src = append(into.v6, v6), src[n+end:]
				continue
			}
		}
		line, rest, _ := bytes.Cut(src, []byte("\n"))
		src = rest
		text := line
		if i := bytes.IndexByte(text, '#'); i >= 0 {
			text = text[:i]
		}
		if text = bytes.Trim(text, " \t\r"); len(text) == 0 {
			continue
		}
		a, wrong := parseLine(text)
		if wrong == nil {
			into.add(a)
			continue
		}
		if bad++; bad > maxBadLines {
			*wrong = complaint{"more bad lines follow; the list is read no further", "mend those first; is this a list of addresses?"}
		}
		r.note(finding{complaint: *wrong, list: &listLine{file, placeInLine(number, line, text)}})
		if bad > maxBadLines {
			return
		}
	}
}

// lineEnd gives the length of what ends the line after an address, the newline
// included; false if that is more than blanks and a comment.
func lineEnd(s []byte) (int, bool) {
	for i, c := range s {
		switch c {
		case '\n':
			return i + 1, true
		case ' ', '\t', '\r':
		case '#':
			if n := bytes.IndexByte(s[i:], '\n'); n >= 0 {
				return i + n + 1, true
			}
			return len(s), true
		default:
			return 0, false
		}
	}
	return len(s), true
}

// parseLine reads what the fast path has not.
func parseLine(text []byte) (AddrRange, *complaint) {
	const longest = 2*45 + 3 // a range of the longest addresses
	if !utf8.Valid(text) || bytes.IndexByte(text, 0) >= 0 {
		return AddrRange{}, &complaint{"line is not text", "is this a list of addresses?"}
	}
	s := string(text[:min(len(text), 4*longest)])
	a, bad := parseAddresses(s)
	if bad == nil {
		return a, nil
	}
	// Other tools put remarks and several addresses on a line.
	if i := bytes.IndexAny(text, " \t,;"); i > 0 {
		if _, worse := parseAddresses(string(text[:min(i, longest)])); worse == nil {
			return a, &complaint{"more follows after " + quote(string(text[:i])), "write one address a line, and # before a remark"}
		}
	}
	if s[0] == '@' {
		return a, &complaint{"a list cannot hold a set: " + quote(s), "write its addresses"}
	}
	if s[0] == ';' || s[0] == '/' {
		return a, &complaint{quote(s) + " is not an address", "comments begin with #"}
	}
	if bad.hint == "leave the key out to admit everyone" {
		bad.hint = `write "0.0.0.0/0" and "::/0" on lines of their own`
	}
	return a, bad
}

// maxShown is how much of a line of a list is shown.
const maxShown = 512

// placeInLine gives the place of the part of a line that is wrong.
func placeInLine(number int, line, text []byte) place {
	line = bytes.TrimSuffix(line, []byte("\r"))
	before := bytes.Index(line, text)
	shown := line[:min(len(line), max(before+1, maxShown))]
	return place{
		line:   number,
		column: utf8.RuneCount(line[:before]) + 1,
		width:  max(1, utf8.RuneCount(shown[min(before, len(shown)):min(before+len(text), len(shown))])),
		text:   string(shown),
	}
}

// network4 reads the IPv4 address or network that s begins with, if it is written
// as it should be, and gives the length of it. All else is left to people's words.
func network4(s []byte) (uint64, int) {
	var n uint32
	i := 0
	for part := range 4 {
		if part > 0 {
			if i == len(s) || s[i] != '.' {
				return 0, 0
			}
			i++
		}
		v, digits := decimal(s[i:])
		if digits == 0 || v > 255 {
			return 0, 0
		}
		n, i = n<<8|v, i+digits
	}
	if i == len(s) || s[i] != '/' {
		return uint64(n)<<32 | uint64(n), i
	}
	length, digits := decimal(s[i+1:])
	host := uint32(uint64(1)<<(32-min(length, 32)) - 1)
	if digits == 0 || length > 32 || n&host != 0 {
		return 0, 0
	}
	return uint64(n)<<32 | uint64(n|host), i + 1 + digits
}

// network6 is network4 for IPv6.
func network6(s []byte) (range6, int) {
	var parts [8]uint64
	n, i, gap := 0, 0, -1 // gap is where :: stands
	if len(s) >= 2 && s[0] == ':' && s[1] == ':' {
		gap, i = 0, 2
	}
	for {
		v, digits := hexadecimal(s[i:])
		if digits == 0 {
			if gap == n {
				break // it ends in ::
			}
			return range6{}, 0
		}
		if n == len(parts) {
			return range6{}, 0
		}
		parts[n] = v
		n, i = n+1, i+digits
		if i == len(s) || s[i] != ':' {
			break
		}
		i++
		if i < len(s) && s[i] == ':' {
			if gap >= 0 {
				return range6{}, 0
			}
			gap, i = n, i+1
		}
	}
	if i < len(s) && s[i] == '.' || (n == len(parts)) != (gap < 0) {
		return range6{}, 0
	}
	if gap >= 0 {
		copy(parts[gap+len(parts)-n:], parts[gap:n])
		clear(parts[gap : gap+len(parts)-n])
	}
	lo := number6{
		parts[0]<<48 | parts[1]<<32 | parts[2]<<16 | parts[3],
		parts[4]<<48 | parts[5]<<32 | parts[6]<<16 | parts[7],
	}
	if lo.high == 0 && lo.low>>32 == 0xffff {
		return range6{}, 0 // an IPv4 address in other clothes
	}
	if i == len(s) || s[i] != '/' {
		return range6{lo, lo}, i
	}
	length, digits := decimal(s[i+1:])
	if digits == 0 || length > 128 {
		return range6{}, 0
	}
	host := number6{^uint64(0) >> min(length, 64), ^uint64(0) >> (max(length, 64) - 64)}
	if lo.high&host.high != 0 || lo.low&host.low != 0 {
		return range6{}, 0
	}
	return range6{lo, number6{lo.high | host.high, lo.low | host.low}}, i + 1 + digits
}

// hexadecimal reads up to four digits.
func hexadecimal(s []byte) (v uint64, digits int) {
	for digits < len(s) && digits < 4 {
		switch c := s[digits]; {
		case '0' <= c && c <= '9':
			v = v<<4 | uint64(c-'0')
		case 'a' <= c|0x20 && c|0x20 <= 'f':
			v = v<<4 | uint64(c|0x20-'a'+10)
		default:
			return v, digits
		}
		digits++
	}
	return v, digits
}

// decimal reads up to three digits without leading zeros.
func decimal(s []byte) (v uint32, digits int) {
	for digits < len(s) && digits < 3 && '0' <= s[digits] && s[digits] <= '9' {
		v = v*10 + uint32(s[digits]-'0')
		digits++
	}
	if digits > 1 && s[0] == '0' {
		return 0, 0
	}
	return v, digits
}
