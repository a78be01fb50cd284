package rules

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

const portHint = "ports run from 1 to 65535"

// parsePorts reads "443" or "6000-6010".
func parsePorts(s string) (PortRange, *complaint) {
	lo, hi, ok := splitPorts(s)
	switch {
	case !ok:
		return PortRange{}, notPorts(s)
	case min(lo, hi) < 1 || max(lo, hi) > 65535:
		return PortRange{}, &complaint{"port out of range: " + quote(s), portHint}
	case lo > hi:
		return PortRange{}, &complaint{"port range runs backwards: " + quote(s), "did you mean " + quote(fmt.Sprintf("%d-%d", hi, lo)) + "?"}
	}
	return PortRange{uint16(lo), uint16(hi)}, nil
}

// splitPorts reads a number or two with a dash between, of any size. It takes
// plain decimal digits only: 0443 or +443 may mean anything.
func splitPorts(s string) (lo, hi uint64, ok bool) {
	number := func(s string) uint64 {
		n, err := strconv.ParseUint(s, 10, 64)
		ok = ok && !errors.Is(err, strconv.ErrSyntax) && (s[0] != '0' || s == "0")
		return n
	}
	left, right, isRange := strings.Cut(s, "-")
	if !isRange {
		right = left
	}
	ok = true
	return number(left), number(right), ok
}

// notPorts explains a string that holds no port, with what was probably meant.
func notPorts(s string) *complaint {
	isPorts := func(s string) bool { _, _, ok := splitPorts(s); return ok }
	c := &complaint{quote(s) + " is not a port or a range of ports", `write 443 or "6000-6010"`}
	plain := strings.NewReplacer(" ", "", "\t", "", ":", "-", "–", "-", "..", "-").Replace(s)
	port, protocol, _ := strings.Cut(strings.ToLower(plain), "/")
	switch {
	case s == "":
		c.summary = "port is empty"
	case strings.Contains(s, ","):
		c.hint = "write a list: [80, 443]"
	case isPorts(plain):
		c.hint = "did you mean " + quote(plain) + "?"
	case isPorts(port):
		c.hint = fmt.Sprintf("did you mean %s with protocol = %s?", quote(port), quote(protocol))
	case strings.Trim(s, "0123456789") == "":
		c.hint = "write it without leading zeros"
	case strings.IndexFunc(s, unicode.IsLetter) >= 0:
		c.hint = "names of services stand in service, as in service = \"https\""
	}
	return c
}

// mergePorts gives the same ports as few ascending ranges.
func mergePorts(in []PortRange) []PortRange {
	in = slices.Clone(in)
	slices.SortFunc(in, func(a, b PortRange) int { return cmp.Compare(a.Lo, b.Lo) })
	var out []PortRange
	for _, r := range in {
		if n := len(out) - 1; n >= 0 && int(r.Lo) <= int(out[n].Hi)+1 {
			out[n].Hi = max(out[n].Hi, r.Hi)
			continue
		}
		out = append(out, r)
	}
	return out
}
