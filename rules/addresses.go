package rules

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const (
	addressHint = `write an address like "192.0.2.1", a network like "192.0.2.0/24" or a range like "192.0.2.1-192.0.2.9"`
	nameHint    = "names are never resolved: write the address"
)

// parseAddresses reads an address, a network in CIDR notation or a range.
func parseAddresses(s string) (AddrRange, *complaint) {
	switch {
	case s == "":
		return AddrRange{}, &complaint{"address is empty", addressHint}
	case strings.Contains(s, "/"):
		return parseNetwork(s)
	case strings.Contains(s, "-") && !isName(s):
		return parseAddressRange(s)
	}
	a, bad := parseAddress(s)
	return AddrRange{a, a}, bad
}

func parseAddress(s string) (netip.Addr, *complaint) {
	a, err := netip.ParseAddr(s)
	switch {
	case err == nil && a.Zone() != "":
		return a, &complaint{"address with a zone: " + quote(s), fmt.Sprintf("write %s, and the interface in interfaces", quote(a.WithZone("").String()))}
	case err == nil && a.Is4In6():
		return a, &complaint{"IPv4-mapped IPv6 address: " + quote(s), "did you mean " + quote(a.Unmap().String()) + "?"}
	case err == nil:
		return a, nil
	}
	bad := &complaint{quote(s) + " is not an address", addressHint}
	plain := strings.Trim(s, " \t[]")
	switch {
	case slices.Contains([]string{"any", "all", "*", "anywhere", "everyone", "0/0"}, strings.ToLower(plain)):
		bad.hint = "leave the key out to admit everyone"
	case plain != s && isAddresses(plain):
		bad.hint = "did you mean " + quote(plain) + "?"
	case isName(s):
		bad.summary, bad.hint = quote(s)+" is a name, not an address", nameHint
	}
	return a, bad
}

// isName reports whether s looks like the name of a host.
func isName(s string) bool {
	return !strings.Contains(s, ":") && strings.IndexFunc(s, unicode.IsLetter) >= 0
}

func isAddresses(s string) bool {
	_, bad := parseAddresses(s)
	return bad == nil
}

func parseNetwork(s string) (AddrRange, *complaint) {
	left, right, _ := strings.Cut(s, "/")
	a, bad := parseAddress(left)
	length, err := strconv.Atoi(right)
	switch {
	case bad != nil && bad.hint == addressHint:
		return AddrRange{}, &complaint{quote(s) + " is not a network", addressHint}
	case bad != nil && a.Is4In6() && length >= 96:
		bad.hint = fmt.Sprintf("did you mean %s?", quote(fmt.Sprintf("%s/%d", a.Unmap(), length-96)))
		return AddrRange{}, bad
	case bad != nil:
		return AddrRange{}, bad
	}
	if err != nil || strconv.Itoa(length) != right || length < 0 || length > a.BitLen() {
		c := &complaint{"prefix length is not a number from 0 to " + strconv.Itoa(a.BitLen()) + ": " + quote(s), ""}
		if mask, err := netip.ParseAddr(right); err == nil && mask.Is4() && a.Is4() {
			if n, ok := maskBits(mask); ok {
				c.hint = fmt.Sprintf("did you mean %s?", quote(fmt.Sprintf("%s/%d", a, n)))
			}
		}
		return AddrRange{}, c
	}
	p := netip.PrefixFrom(a, length)
	if p.Masked() != p {
		return AddrRange{}, &complaint{"host bits are set in " + quote(s), "did you mean " + quote(p.Masked().String()) + "?"}
	}
	return AddrRange{a, lastAddr(p)}, nil
}

// maskBits gives the prefix length of a netmask like 255.255.255.0.
func maskBits(mask netip.Addr) (int, bool) {
	b := mask.As4()
	m := binary.BigEndian.Uint32(b[:])
	ones := bits.LeadingZeros32(^m)
	return ones, m<<ones == 0
}

// lastAddr gives the highest address of a network.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func parseAddressRange(s string) (AddrRange, *complaint) {
	left, right, _ := strings.Cut(s, "-")
	if plain := strings.TrimSpace(left) + "-" + strings.TrimSpace(right); plain != s && isAddresses(plain) {
		return AddrRange{}, &complaint{"blanks in " + quote(s), "did you mean " + quote(plain) + "?"}
	}
	lo, bad := parseAddress(left)
	if bad != nil {
		return AddrRange{}, bad
	}
	// 10.0.0.1-9 is how other tools write it.
	if n, err := strconv.ParseUint(right, 10, 8); err == nil && lo.Is4() {
		b := lo.As4()
		b[3] = byte(n)
		return AddrRange{}, &complaint{"end of the range is not an address: " + quote(s), "did you mean " + quote(left+"-"+netip.AddrFrom4(b).String()) + "?"}
	}
	hi, bad := parseAddress(right)
	switch {
	case bad != nil:
		return AddrRange{}, bad
	case lo.Is4() != hi.Is4():
		return AddrRange{}, &complaint{"range mixes IPv4 and IPv6: " + quote(s), "write one range for each family"}
	case hi.Less(lo):
		return AddrRange{}, &complaint{"address range runs backwards: " + quote(s), "did you mean " + quote(right+"-"+left) + "?"}
	}
	return AddrRange{lo, hi}, nil
}

// MergeAddrs gives the same addresses as few ascending ranges, IPv4 first, as
// [Source.Ranges] and [Temporary.From] have them.
func MergeAddrs(list []AddrRange) []AddrRange { return mergeAddrs(list) }

// mergeAddrs gives the same addresses as few ascending ranges, IPv4 first.
func mergeAddrs(in []AddrRange) []AddrRange {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b AddrRange) int { return a.Lo.Compare(b.Lo) })
	var out []AddrRange
	for _, r := range in {
		if n := len(out) - 1; n >= 0 && out[n].Lo.Is4() == r.Lo.Is4() &&
			(r.Lo.Compare(out[n].Hi) <= 0 || out[n].Hi.Next() == r.Lo) {
			if out[n].Hi.Less(r.Hi) {
				out[n].Hi = r.Hi
			}
			continue
		}
		out = append(out, r)
	}
	return out
}
