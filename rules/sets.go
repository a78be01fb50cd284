package rules

import (
	"fmt"
)

// setDraft is a [set.*] table being read.
type setDraft struct {
	AddressSet
	at       span
	files    []placedName
	filesAt  span
	optional bool
	sound    bool
	used     bool
}

var setSchema = schema[setDraft]{
	{name: "addresses", also: []string{"ip", "ips", "hosts", "members", "elements", "networks", "from"}, read: func(r *reader, v named, s *setDraft) {
		r.addresses(v, "name at least one address, or remove the set", func(a AddrRange, _ span) {
			s.Ranges.add(a)
		}, func(name string, at span) {
			r.errorf(at, "list its addresses here, or name both sets in from", "a set cannot hold another set: %s", quote("@"+name))
		})
	}},
	{name: "files", also: []string{"file", "list", "lists", "path"}, read: func(r *reader, v named, s *setDraft) {
		s.files, s.filesAt = r.fileNames(v, "lists/*.txt", "name at least one file, or remove files"), v.span()
	}},
	{name: "optional", also: []string{"missing"}, read: func(r *reader, v named, s *setDraft) { s.optional, _ = r.boolean(v) }},
	{name: "override", also: []string{"overrides", "replace"}, read: ignore[setDraft]},
}

// readSets reads [set.*] and the lists they name.
func (d *draft) readSets(r *reader) {
	for _, f := range d.gather(r, "set", "admins", setSchema.names()) {
		before := r.errors
		s := &setDraft{AddressSet: AddressSet{Name: f.name, Pos: r.pos(f.key)}, at: f.key}
		title := "[set." + tableName(f.name) + "]"
		has := setSchema.read(r, f.value, title, s)
		if !has["addresses"] && !has["files"] {
			r.errorf(f.key, `write addresses = ["192.0.2.0/24"] or files = ["lists/*.txt"]`, "addresses is missing in %s", title)
		}
		if has["optional"] && !has["files"] {
			r.warnf(f.key, "remove optional", "optional means nothing without files in %s", title)
		}
		whole := s.readLists(r, d)
		s.Ranges.merge()
		if s.Ranges.Len() == 0 && whole && r.errors == before {
			r.warnf(s.filesAt, "", "set %s is empty: its lists hold no address", quote(f.name))
		}
		s.sound = r.errors == before
		d.sets[f.name] = s
		d.setNames = append(d.setNames, f.name)
		d.Sets = append(d.Sets, s.AddressSet)
	}
}

// readLists reads the lists of a set, each once. It reports whether none was
// missing.
func (s *setDraft) readLists(r *reader, d *draft) bool {
	whole := true
	missing := func(n placedName, what string) {
		whole = false
		if s.optional {
			r.warnf(n.at, fmt.Sprintf("set %s goes without it", quote(s.Name)), "%s", what)
			return
		}
		r.errorf(n.at, "names are relative to the directory of the policy; optional = true lets it be missing", "%s", what)
	}
	seen := make(map[string]bool)
	for _, n := range s.files {
		names, ok := r.find(n)
		if ok && len(names) == 0 {
			missing(n, "no file matches "+quote(n.name))
		}
		for _, name := range names {
			shown := d.shown(name)
			if seen[shown] {
				continue
			}
			seen[shown] = true
			src, err := r.files.ReadFile(name)
			switch {
			case isMissing(err):
				missing(n, unreadable(shown, err))
				continue
			case err != nil:
				r.errorf(n.at, "", "%s", unreadable(shown, err))
				continue
			case len(src) > maxList:
				r.errorf(n.at, "is this the right file?", "%s is larger than %d MiB", quote(shown), maxList>>20)
				continue
			}
			s.Files = append(s.Files, shown)
			d.noteFile(shown)
			r.list(shown, src, &s.Ranges)
		}
	}
	return whole
}
