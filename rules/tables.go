package rules

import (
	"fmt"
	"slices"
	"strings"
)

// The tables of a file.

var fileSchema = schema[draft]{
	{name: "version", read: func(r *reader, v named, d *draft) {
		d.version = true
		if n, ok := v.v.(int64); !ok || n != 1 {
			r.errorf(v.span(), "write version = 1", "version must be 1, the only one this program knows")
		}
	}},
	{name: "include", also: []string{"includes", "import", "imports"}, read: func(r *reader, v named, d *draft) {
		d.includes = r.fileNames(v, "conf.d/*.toml", "leave include out to include nothing")
	}},
	{name: "default", also: []string{"defaults", "policy"}, read: readOnce(defaultSchema), below: defaultSchema.paths(), head: true},
	{name: "open", also: []string{"allow", "accept", "permit", "rule", "rules"}, read: readLater, below: anyName(openSchema.paths()), head: true},
	{name: "block", also: []string{"deny", "drop", "reject", "ban", "blocks", "blocklist", "blacklist"}, read: readLater, below: anyName(blockSchema.paths()), head: true},
	{name: "egress", also: []string{"out", "outbound", "output", "outgoing"}, read: readLater, below: anyName(egressSchema.paths()), head: true},
	{name: "set", also: []string{"ipset", "group", "alias", "define"}, read: readLater, below: anyName(setSchema.paths()), head: true},
	{name: "service", also: []string{"services"}, read: readLater, below: anyName(serviceSchema.paths()), head: true},
	{name: "published", also: []string{"docker", "containers"}, read: readOnce(publishedSchema), below: publishedSchema.paths(), head: true},
	{name: "icmp", also: []string{"icmpv6", "ping"}, read: readOnce(icmpSchema), below: icmpSchema.paths(), head: true},
	{name: "dhcp", also: []string{"dhcpv6"}, read: readOnce(dhcpSchema), below: dhcpSchema.paths(), head: true},
	{name: "log", also: []string{"logging", "logs"}, read: readOnce(logSchema), below: logSchema.paths(), head: true},
	{name: "failsafe", also: []string{"fallback", "lockdown", "rescue"}, read: func(_ *reader, v named, d *draft) { d.failsafe = v }, below: failsafeSchema.paths(), head: true},
	{name: "verify", also: []string{"verifier"}, read: readOnce(verifySchema), below: verifySchema.paths(), head: true},
	{name: "expect", also: []string{"expects", "test", "tests"}, read: readLater, below: anyName(expectSchema.paths()), head: true},
}

// readLater keeps tables that an include may add to until all of them are known.
func readLater(_ *reader, v named, d *draft) { d.tables[v.name] = append(d.tables[v.name], v) }

// readOnce reads a table that stands once, like [default].
func readOnce(s schema[draft]) func(*reader, named, *draft) {
	return func(r *reader, v named, d *draft) {
		if r.isTable(v, v.name) {
			s.read(r, v.value, "["+v.name+"]", d)
		}
	}
}

// readFile reads the tables of the main file. What is not known there is a table
// rather than a key.
func (r *reader) readFile(root value, d *draft) {
	known := value{v: map[string]any{}, at: root.at}
	names := fileSchema.names()
	for _, f := range root.fields() {
		if _, ok := f.v.(map[string]any); ok && !slices.Contains(names, f.name) {
			r.unknownTable(f, fileSchema.meant(r, f.name))
			continue
		}
		known.v.(map[string]any)[f.name] = f.v
	}
	fileSchema.read(r, known, "the policy", d)
}

// readPart reads the tables of an included file.
func (r *reader) readPart(root value, d *draft) {
	known := value{v: map[string]any{}, at: root.at}
	names := fileSchema.names()
	main := r.docs[0].file
	for _, f := range root.fields() {
		switch {
		case f.name == "include":
			r.errorf(f.key, "name the file in include of "+printable(main), "an included file cannot include others")
		case f.name == "version":
			r.errorf(f.key, "remove it", "version belongs only in the main file, %s", printable(main))
		case slices.Contains(names, f.name) && !slices.Contains([]string{"open", "block", "egress", "set", "service", "expect"}, f.name):
			r.errorf(f.key, "move it there", "[%s] belongs only in the main file, %s", f.name, printable(main))
		default:
			known.v.(map[string]any)[f.name] = f.v
		}
	}
	r.readFile(known, d)
}

// unknownTable complains of a [table] that is not of the language.
func (r *reader) unknownTable(f named, near string) {
	title := tableName(f.name)
	hint := "rules stand in tables like [open.web]"
	t := f.v.(map[string]any)
	_, ports := t["ports"]
	_, service := t["service"]
	switch {
	case near != "":
		hint = fmt.Sprintf("did you mean [%s]?", near)
	case ports || service:
		hint = fmt.Sprintf("did you mean [open.%s]?", title)
	}
	r.errorf(f.key, hint, "unknown table [%s]", title)
}

// isTable complains of a value where a table must stand.
func (r *reader) isTable(v named, title string) bool {
	switch v.v.(type) {
	case map[string]any:
		return true
	case []map[string]any:
		r.errorf(v.span(), fmt.Sprintf("write [%s]", title), "[%s] is one table, not a list of tables", title)
	default:
		r.errorf(v.span(), "", "[%s] must be a table, not %s", title, v.kind())
	}
	return false
}

// gather gives the tables of a kind, like [open.*], that have sound names: of
// every file in turn, without those that a later file overrides.
func (d *draft) gather(r *reader, kind, example string, keys []string) []named {
	var out []named
	where := make(map[string]int) // in out
	for _, v := range d.tables[kind] {
		for _, f := range r.below(v, example, keys) {
			override := false
			if over, ok := f.v.(map[string]any)["override"]; ok {
				override, _ = over.(bool)
			}
			i, again := where[f.name]
			switch {
			case again && override:
				out[i].at = nil
			case again:
				r.errorf(f.key, fmt.Sprintf("first defined at %s: remove one, rename it, or write override = true here", printable(r.pos(out[i].key).String())),
					"[%s.%s] is defined twice", kind, tableName(f.name))
			case override && !d.partial:
				r.warnf(f.at.fields["override"].key, "remove override, or mend the name", "[%s.%s] overrides nothing", kind, tableName(f.name))
			}
			where[f.name] = len(out)
			out = append(out, f)
		}
	}
	return slices.DeleteFunc(out, func(f named) bool { return f.at == nil })
}

// below gives the tables below [open] and its like that have sound names.
func (r *reader) below(v named, example string, keys []string) []named {
	if !r.isTable(v, v.name+".NAME") {
		return nil
	}
	var out []named
	for _, f := range v.fields() {
		title := v.name + "." + tableName(f.name)
		_, isTable := f.v.(map[string]any)
		switch {
		case !isTable && slices.Contains(keys, f.name):
			r.errorf(f.key, fmt.Sprintf("write a name: [%s.%s]", v.name, example), "%s stands in [%s] itself", quote(f.name), v.name)
			continue
		case !r.isTable(f, title):
			continue
		case !isTableName(f.name):
			r.errorf(f.key, "up to 48 letters, digits and . _ -, a letter or digit first", "name %s of a table is not possible", quote(f.name))
			continue
		}
		out = append(out, f)
	}
	return out
}

// isTableName reports whether s may name a rule or a set.
func isTableName(s string) bool {
	const alnum = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	return s != "" && len(s) <= 48 && strings.IndexByte(alnum, s[0]) >= 0 && strings.Trim(s, alnum+"._-") == ""
}

// tableName writes a name as it stands in a [header].
func tableName(s string) string {
	if isTableName(s) && !strings.Contains(s, ".") {
		return s
	}
	return quote(s)
}

// ignore reads an override, which gather has obeyed.
func ignore[T any](r *reader, v named, _ *T) { r.boolean(v) }
