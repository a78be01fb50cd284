package rules

import (
	"fmt"
	"slices"
	"strings"
)

// A schema is the list of the keys a table may have: a new key of the language
// is a new entry.
type schema[T any] []key[T]

// key is a key of a table and what reads its value into a T.
type key[T any] struct {
	name  string
	also  []string // what people write for it
	read  func(r *reader, v named, into *T)
	below []string // keys of the table that the value is or may be, with dots
	head  bool     // the value is always a table, so that the key alone says nothing
}

func (s schema[T]) names() []string {
	names := make([]string, len(s))
	for i, k := range s {
		names[i] = k.name
	}
	return names
}

// paths gives the keys of a table and those below them, with dots.
func (s schema[T]) paths() []string {
	var out []string
	for _, k := range s {
		if !k.head {
			out = append(out, k.name)
		}
		for _, b := range k.below {
			out = append(out, k.name+"."+b)
		}
	}
	return out
}

// anyName gives the paths below tables that the policy names itself.
func anyName(paths []string) []string {
	out := make([]string, len(paths))
	for i, p := range paths {
		out[i] = "*." + p
	}
	return out
}

// Keys gives every key of the language, sorted, as "default.input" or
// "open.*.rate.limit": a * stands for a name that the policy chooses, or for each
// of the [[expect]] tables.
func Keys() []string {
	keys := fileSchema.paths()
	slices.Sort(keys)
	return keys
}

// homes says for each key which table it belongs in, the likeliest if several.
func homes() map[string]string {
	out := make(map[string]string)
	for _, path := range fileSchema.paths() {
		parts := strings.Split(path, ".")
		home, name := "", parts[len(parts)-1]
		switch {
		case len(parts) == 1:
			home = "the top of the file, above every table"
		case len(parts) == 2:
			home = "[" + parts[0] + "]"
		case len(parts) == 3 && parts[1] == "*":
			home = "[" + parts[0] + ".NAME]"
		default:
			continue
		}
		if parts[0] == "expect" {
			home = "[[expect]]"
		}
		if out[name] == "" {
			out[name] = home
		}
	}
	return out
}

// read reads a table into a T and complains of keys that do not belong. It gives
// the keys that are there, and those that were probably meant.
func (s schema[T]) read(r *reader, t value, title string, into *T) map[string]bool {
	present := make(map[string]bool)
	for _, f := range t.fields() {
		present[f.name] = true
		if i := slices.IndexFunc(s, func(k key[T]) bool { return k.name == f.name }); i >= 0 {
			s[i].read(r, f, into)
			continue
		}
		names := s.names()
		hint := ""
		if near := s.meant(r, f.name); near != "" {
			hint = "did you mean " + quote(near) + "?"
			present[near] = true
		} else if home := r.homes[f.name]; home != "" {
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
func (s schema[T]) meant(r *reader, got string) string {
	for _, k := range s {
		if slices.Contains(k.also, strings.ToLower(got)) {
			return k.name
		}
	}
	return r.nearest(got, s.names())
}
