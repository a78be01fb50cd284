package rules

import (
	"bytes"
	"net/netip"
	"slices"
	"unicode/utf8"
)

// Lists of addresses may have a million lines, nearly all of them IPv4 networks:
// those are read byte by byte and kept as numbers until the list is whole.

// addrList collects addresses.
type addrList struct {
	v4 []uint64 // the first address in the high half, the last in the low one
	v6 []AddrRange
}

func (l *addrList) add(a AddrRange) {
	if !a.Lo.Is4() {
		l.v6 = append(l.v6, a)
		return
	}
	l.v4 = append(l.v4, uint64(number4(a.Lo))<<32|uint64(number4(a.Hi)))
}

// ranges gives the addresses merged and ascending, IPv4 first.
func (l *addrList) ranges() []AddrRange {
	if !slices.IsSorted(l.v4) {
		slices.Sort(l.v4)
	}
	merged := l.v4[:0]
	for _, r := range l.v4 {
		if n := len(merged) - 1; n >= 0 && r>>32 <= merged[n]&0xffffffff+1 {
			merged[n] = max(merged[n], merged[n]&^0xffffffff|r&0xffffffff)
			continue
		}
		merged = append(merged, r)
	}
	v6 := mergeAddrs(l.v6)
	if len(merged)+len(v6) == 0 {
		return nil
	}
	out := make([]AddrRange, 0, len(merged)+len(v6))
	for _, r := range merged {
		out = append(out, AddrRange{addr4(uint32(r >> 32)), addr4(uint32(r))})
	}
	return append(out, v6...)
}

func addr4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

func number4(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

// maxBadLines is how many lines of a list are complained of before the rest is
// taken for something else than a list.
const maxBadLines = 20

// list reads a list of addresses: one a line, with # comments.
func (r *reader) list(file string, src []byte, into *addrList) {
	src = withoutBOM(src)
	into.v4 = slices.Grow(into.v4, bytes.Count(src, []byte("\n"))+1)
	bad := 0
	for number := 1; len(src) > 0; number++ {
		line, rest, _ := bytes.Cut(src, []byte("\n"))
		src = rest
		text := line
		if i := bytes.IndexByte(text, '#'); i >= 0 {
			text = text[:i]
		}
		if text = bytes.Trim(text, " \t\r"); len(text) == 0 {
			continue
		}
		if v4, ok := network4(text); ok {
			into.v4 = append(into.v4, v4)
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

// network4 reads an IPv4 address or network that is written as it should be, and
// leaves all else to people's words.
func network4(s []byte) (uint64, bool) {
	var n uint32
	i := 0
	for part := range 4 {
		if part > 0 {
			if i == len(s) || s[i] != '.' {
				return 0, false
			}
			i++
		}
		v, digits := decimal(s[i:])
		if digits == 0 || v > 255 {
			return 0, false
		}
		n, i = n<<8|v, i+digits
	}
	if i == len(s) {
		return uint64(n)<<32 | uint64(n), true
	}
	if s[i] != '/' {
		return 0, false
	}
	length, digits := decimal(s[i+1:])
	host := uint32(uint64(1)<<(32-min(length, 32)) - 1)
	if digits == 0 || i+1+digits != len(s) || length > 32 || n&host != 0 {
		return 0, false
	}
	return uint64(n)<<32 | uint64(n|host), true
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
