package rules

import (
	"fmt"
	"slices"
	"strings"
)

// A schema is the list of the keys a table may have: a new key of the language
// is a new entry.
type schema[T any] struct {
	keys  []key[T]
	later []string // keys of the language that this version does not read yet
}

// key is a key of a table and what reads its value into a T.
type key[T any] struct {
	name string
	also []string // what people write for it
	read func(r *reader, v named, into *T)
}

func (s schema[T]) names() []string {
	names := make([]string, len(s.keys))
	for i, k := range s.keys {
		names[i] = k.name
	}
	return names
}

// has reports whether the language knows a key, now or later.
func (s schema[T]) has(name string) bool {
	return slices.Contains(s.names(), name) || slices.Contains(s.later, name)
}

// read reads a table into a T and complains of keys that do not belong. It gives
// the keys that are there, and those that were probably meant.
func (s schema[T]) read(r *reader, t value, title string, into *T) map[string]bool {
	names := s.names()
	present := make(map[string]bool)
	for _, f := range t.fields() {
		present[f.name] = true
		i := slices.Index(names, f.name)
		if i >= 0 {
			s.keys[i].read(r, f, into)
			continue
		}
		if slices.Contains(s.later, f.name) {
			r.errorf(f.key, "remove it", "%s is not supported by this version", quote(f.name))
			continue
		}
		hint := ""
		if near := s.meant(r, f.name, names); near != "" {
			hint = "did you mean " + quote(near) + "?"
			present[near] = true
		} else if home := homeOf(f.name); home != "" {
			hint = fmt.Sprintf("%s belongs in %s", f.name, home)
		} else if _, ok := f.v.(map[string]any); ok {
			hint = "a name with a dot needs quotes, like [open.\"web.eu\"]"
		} else {
			hint = "use " + alternatives(names)
		}
		r.errorf(f.key, hint, "unknown key %s in %s", quote(f.name), title)
	}
	return present
}

// meant gives the key that was probably meant.
func (s schema[T]) meant(r *reader, got string, names []string) string {
	for _, k := range s.keys {
		if slices.Contains(k.also, strings.ToLower(got)) {
			return k.name
		}
	}
	return r.nearest(got, names)
}

// homeOf gives the table that a key belongs in.
func homeOf(name string) string {
	switch name {
	case "input":
		return "[default]"
	case "ports", "protocol", "from", "interfaces", "family", "comment":
		return "[open.NAME]"
	case "addresses":
		return "[set.NAME]"
	case "echo":
		return "[icmp]"
	case "client":
		return "[dhcp]"
	case "version":
		return "the first line, above every table"
	}
	return ""
}

// Keys lists every key of the policy language as a dotted name, sorted; * stands
// for the name of a table: "open.*.ports".
func Keys() []string {
	var out []string
	for prefix, names := range map[string][]string{
		"default.": defaultSchema.names(), "open.*.": openSchema.names(), "set.*.": setSchema.names(),
		"published.": publishedSchema.names(), "icmp.": icmpSchema.names(), "dhcp.": dhcpSchema.names(),
	} {
		for _, n := range names {
			out = append(out, prefix+n)
		}
	}
	out = append(out, "version")
	slices.Sort(out)
	return out
}
