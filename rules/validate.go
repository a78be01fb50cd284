package rules

import (
	"strings"
	"unicode"
)

// Values that several tables have.

// ports reads the value of ports.
func (r *reader) ports(v named) []placedPorts {
	var out []placedPorts
	r.each(v, `a number or a string like "6000-6010"`, "name at least one port, like 443", func(e value, mistyped func()) {
		switch p := e.v.(type) {
		case int64:
			if p < 1 || p > 65535 {
				r.errorf(e.span(), portHint, "port %d is out of range", p)
				return
			}
			out = append(out, placedPorts{PortRange{uint16(p), uint16(p)}, e.span()})
		case string:
			ports, bad := parsePorts(p)
			if bad != nil {
				r.report(Error, e.span(), *bad)
				return
			}
			out = append(out, placedPorts{ports, e.span()})
		default:
			mistyped()
		}
	})
	return out
}

// source reads a list of addresses and of sets by name.
func (r *reader) source(v named, empty string) (placedSource, Source) {
	var p placedSource
	var all []AddrRange
	r.addresses(v, empty, func(a AddrRange, at span) {
		p.written = append(p.written, placedRange{a, at})
		all = append(all, a)
	}, func(name string, at span) {
		p.refs = append(p.refs, placedName{name, at})
	})
	return p, Source{Ranges: mergeAddrs(all)}
}

// addresses reads a list of addresses; ref is called for every "@set" in it.
func (r *reader) addresses(v named, empty string, add func(a AddrRange, at span), ref func(name string, at span)) {
	r.each(v, `a string like "10.0.0.0/8"`, empty, func(e value, mistyped func()) {
		s, ok := e.v.(string)
		if !ok {
			mistyped()
			return
		}
		if name, ok := strings.CutPrefix(s, "@"); ok {
			ref(name, e.span())
			return
		}
		a, bad := parseAddresses(s)
		if bad != nil {
			r.report(Error, e.span(), *bad)
			return
		}
		add(a, e.span())
	})
}

// interfaces reads a list of interface names, each of them once.
func (r *reader) interfaces(v named, empty string) []string {
	var out []string
	seen := make(map[string]bool)
	r.each(v, `a string like "eth0"`, empty, func(e value, mistyped func()) {
		s, ok := e.v.(string)
		if !ok {
			mistyped()
			return
		}
		if bad := checkInterface(s); bad != nil {
			r.report(Error, e.span(), *bad)
			return
		}
		if !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	})
	return out
}

// maxComment leaves room for our own words in the comment of a kernel rule.
const maxComment = 128

func (r *reader) comment(v named) string {
	s, ok := r.str(v)
	if !ok {
		return ""
	}
	if bad := checkComment(s); bad != nil {
		if len(s) > maxComment {
			bad.hint += "; a # line has no limit"
		}
		r.report(Error, v.span(), *bad)
	}
	return s
}

// checkAccount says what is wrong with the name of a user or a group. It is
// looked up when the policy is applied.
func checkAccount(what, s string) *complaint {
	switch {
	case s == "":
		return &complaint{what + " is empty", "leave it out for any"}
	case len(s) > 256, s[0] == '-', strings.ContainsFunc(s, func(c rune) bool {
		return unicode.IsControl(c) || unicode.IsSpace(c) || unicode.Is(unicode.Bidi_Control, c) || strings.ContainsRune(":,/\"", c)
	}):
		return &complaint{what + " " + quote(s) + " is not possible", "one name or number, without blanks and any of : , / \""}
	}
	return nil
}
