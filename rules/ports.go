package rules

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

const portHint = "ports run from 1 to 65535"

// parsePorts reads "443" or "6000-6010".
func parsePorts(s string) (PortRange, *complaint) {
	from, to, isRange := strings.Cut(s, "-")
	if !isRange {
		to = from
	}
	lo, err := parsePort(from)
	if err != nil {
		return PortRange{}, portComplaint(s, err)
	}
	hi, err := parsePort(to)
	if err != nil {
		return PortRange{}, portComplaint(s, err)
	}
	if lo > hi {
		return PortRange{}, &complaint{"port range runs backwards: " + quote(s), "did you mean " + quote(to+"-"+from) + "?"}
	}
	return PortRange{lo, hi}, nil
}

// parsePort takes plain decimal digits only: 0443 or +443 may mean anything.
func parsePort(s string) (uint16, *complaint) {
	if s == "" || strings.Trim(s, "0123456789") != "" || len(s) > 1 && s[0] == '0' {
		return 0, &complaint{}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > 65535 {
		return 0, &complaint{"port " + cut(s) + " is out of range", portHint}
	}
	return uint16(n), nil
}

// portComplaint explains a string that holds no port, with what was probably meant.
func portComplaint(s string, why *complaint) *complaint {
	if why.summary != "" {
		return why
	}
	c := &complaint{quote(s) + " is not a port or a range of ports", `write 443 or "6000-6010"`}
	plain := strings.NewReplacer(" ", "", "\t", "", ":", "-", "–", "-", "..", "-").Replace(s)
	port, protocol, _ := strings.Cut(strings.ToLower(plain), "/")
	switch {
	case s == "":
		c.summary = "port is empty"
	case strings.Contains(s, ","):
		c.hint = "write a list: [80, 443]"
	case plain != s && isPorts(plain):
		c.hint = "did you mean " + quote(plain) + "?"
	case isPorts(port):
		c.hint = fmt.Sprintf("did you mean %s with protocol = %s?", quote(port), quote(protocol))
	case strings.Trim(s, "0123456789") == "":
		c.hint = "write it without leading zeros"
	case strings.Trim(plain, "0123456789-") != "":
		c.hint = `names of services are not supported by this version; write the number, like 443`
	}
	return c
}

func isPorts(s string) bool {
	_, err := parsePorts(s)
	return err == nil
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
