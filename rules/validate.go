package rules

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// draft is a policy being read.
type draft struct {
	Policy
	version bool
	open    named // the tables of tables, read once all of them are known
	set     named
	rules   []*rule
	sets    map[string]*setDraft
	names   []string // of the sets, in file order
}

// rule is an [open.*] table being read, with the places its problems point at.
type rule struct {
	Open
	table  span
	ports  []placedPorts
	from   span
	family span
	refs   []placedRef
	sound  bool // nothing is wrong with it, so that it can be compared with others
}

type placedPorts struct {
	PortRange
	at span
}

type placedRef struct {
	name string
	at   span
}

// setDraft is a [set.*] table being read.
type setDraft struct {
	AddressSet
	at    span
	sound bool
	used  bool
}

var fileSchema = schema[draft]{
	keys: []key[draft]{
		{name: "version", read: func(r *reader, v named, d *draft) {
			d.version = true
			if n, ok := v.v.(int64); !ok || n != 1 {
				r.errorf(v.span(), "write version = 1", "version must be 1, the only one this program knows")
			}
		}},
		{name: "default", also: []string{"defaults", "policy"}, read: readSingle(defaultSchema)},
		{name: "open", also: []string{"allow", "accept", "permit", "rule", "rules", "service"}, read: func(_ *reader, v named, d *draft) { d.open = v }},
		{name: "set", also: []string{"ipset", "group", "alias", "define"}, read: func(_ *reader, v named, d *draft) { d.set = v }},
		{name: "published", also: []string{"docker", "containers"}, read: readSingle(publishedSchema)},
		{name: "icmp", also: []string{"icmpv6", "ping"}, read: readSingle(icmpSchema)},
		{name: "dhcp", also: []string{"dhcpv6"}, read: readSingle(dhcpSchema)},
	},
	later: []string{"include", "block", "egress", "service", "log", "failsafe", "verify", "expect"},
}

var defaultSchema = schema[draft]{
	keys: []key[draft]{
		{name: "input", also: []string{"incoming", "inbound", "policy", "action"}, read: func(r *reader, v named, d *draft) {
			s, ok := r.str(v)
			if !ok {
				return
			}
			switch s {
			case "drop":
				d.Default.Input = Drop
			case "reject":
				d.Default.Input = Reject
			default:
				r.word(v.span(), "input", s, []string{"drop", "reject"}, nil)
			}
			d.Default.Pos = r.pos(v.span())
		}},
	},
	later: []string{"published", "output", "forward", "established", "enforce"},
}

var publishedSchema = schema[draft]{
	keys: []key[draft]{
		{name: "interfaces", also: []string{"interface", "iface", "dev"}, read: func(r *reader, v named, d *draft) {
			d.Published.Interfaces = r.interfaces(v, "leave interfaces out for the default")
		}},
	},
}

var icmpSchema = schema[draft]{
	keys: []key[draft]{
		{name: "echo", also: []string{"ping", "echo-request"}, read: func(r *reader, v named, d *draft) {
			d.ICMP.Pos = r.pos(v.span())
			if _, ok := v.v.(map[string]any); ok {
				r.errorf(v.span(), "write true or false", "a rate for echo is not supported by this version")
				return
			}
			if b, ok := r.boolean(v); ok {
				d.ICMP.Echo = b
			}
		}},
	},
}

var dhcpSchema = schema[draft]{
	keys: []key[draft]{
		{name: "client", read: func(r *reader, v named, d *draft) {
			d.DHCP.Pos = r.pos(v.span())
			switch b := v.v.(type) {
			case bool:
				d.DHCP.Client = b
			case string, []any:
				d.DHCP.Interfaces = r.interfaces(v, "write client = false to admit no DHCP")
			default:
				r.errorf(v.span(), "", "client must be true, false, the name of an interface or a list of those, not %s", v.kind())
			}
		}},
	},
}

var setSchema = schema[setDraft]{
	keys: []key[setDraft]{
		{name: "addresses", also: []string{"ip", "ips", "hosts", "members", "elements", "networks", "from"}, read: func(r *reader, v named, s *setDraft) {
			s.Ranges = mergeAddrs(r.addresses(v, "name at least one address, or remove the set", func(name string, at span) {
				r.errorf(at, "list its addresses here, or name both sets in from", "a set cannot hold another set: %s", quote("@"+name))
			}))
		}},
	},
	later: []string{"files", "optional", "override"},
}

var openSchema = schema[rule]{
	keys: []key[rule]{
		{name: "ports", also: []string{"dport", "dports", "destination-port"}, read: func(r *reader, v named, o *rule) { o.ports = r.ports(v) }},
		{name: "protocol", also: []string{"proto", "protocols", "transport"}, read: func(r *reader, v named, o *rule) { o.Protocols = r.protocols(v) }},
		{name: "from", also: []string{"source", "sources", "src", "saddr", "allow"}, read: func(r *reader, v named, o *rule) {
			o.from = v.span()
			o.From = Source{Ranges: mergeAddrs(r.addresses(v, "leave from out to admit everyone; remove the table to admit nobody", func(name string, at span) {
				o.refs = append(o.refs, placedRef{name, at})
			}))}
		}},
		{name: "interfaces", also: []string{"iface", "ifaces", "iif", "iifname", "dev", "device", "in"}, read: func(r *reader, v named, o *rule) {
			o.Interfaces = r.interfaces(v, "leave interfaces out for every interface")
		}},
		{name: "family", also: []string{"ip", "ipversion"}, read: func(r *reader, v named, o *rule) {
			o.family = v.span()
			s, ok := r.str(v)
			switch {
			case !ok:
			case s == "ipv4":
				o.Family = IPv4
			case s == "ipv6":
				o.Family = IPv6
			case s == "both":
				r.errorf(v.span(), "leave family out for both", "unknown family %s", quote(s))
			default:
				r.word(v.span(), "family", s, []string{"ipv4", "ipv6"}, nil)
			}
		}},
		{name: "comment", also: []string{"description", "note", "title"}, read: func(r *reader, v named, o *rule) { o.Comment = r.comment(v) }},
	},
	later: []string{"service", "except", "to", "rate", "connections", "expires", "log", "override"},
}

// readSingle reads a table that stands once, like [default].
func readSingle(s schema[draft]) func(*reader, named, *draft) {
	return func(r *reader, v named, d *draft) {
		if r.isTable(v, v.name) {
			s.read(r, v.value, "["+v.name+"]", d)
		}
	}
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

// policy reads the whole file.
func (r *reader) policy(root value) *Policy {
	d := &draft{Policy: DefaultPolicy(), sets: make(map[string]*setDraft)}
	d.File = r.file
	fileSchema.readFile(r, root, d)
	if !d.version {
		r.errorf(span{}, "begin the file with version = 1", "version is missing")
	}
	d.readSets(r)
	d.readOpens(r)
	d.compare(r)
	return &d.Policy
}

// readFile is [schema.read] for the top of the file, where what is not known is
// a table rather than a key.
func (s schema[T]) readFile(r *reader, root value, into *T) {
	known := value{v: map[string]any{}, at: root.at}
	for _, f := range root.fields() {
		if _, ok := f.v.(map[string]any); ok && !s.has(f.name) {
			r.unknownTable(f, s.meant(r, f.name, s.names()))
			continue
		}
		known.v.(map[string]any)[f.name] = f.v
	}
	s.read(r, known, "the policy", into)
}

// unknownTable complains of a [table] that is not of the language.
func (r *reader) unknownTable(f named, near string) {
	title := tableName(f.name)
	hint := "rules stand in tables like [open.web]"
	t := f.v.(map[string]any)
	switch _, rule := t["ports"]; {
	case near != "":
		hint = fmt.Sprintf("did you mean [%s]?", near)
	case rule:
		hint = fmt.Sprintf("did you mean [open.%s]?", title)
	}
	r.errorf(f.key, hint, "unknown table [%s]", title)
}

// tables gives the tables below [open] or [set] that have sound names.
func (r *reader) tables(v named, example string) []named {
	if v.at == nil {
		return nil
	}
	if !r.isTable(v, v.name+".NAME") {
		return nil
	}
	var out []named
	for _, f := range v.fields() {
		title := v.name + "." + tableName(f.name)
		_, isTable := f.v.(map[string]any)
		switch {
		case !isTable && homeOf(f.name) == "["+v.name+".NAME]":
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

func (d *draft) readSets(r *reader) {
	for _, f := range r.tables(d.set, "admins") {
		before := r.errors
		s := &setDraft{AddressSet: AddressSet{Name: f.name, Pos: r.pos(f.key)}, at: f.key}
		title := "[set." + tableName(f.name) + "]"
		if has := setSchema.read(r, f.value, title, s); !has["addresses"] && !has["files"] {
			r.errorf(f.key, `write addresses = ["192.0.2.0/24"]`, "addresses is missing in %s", title)
		}
		s.sound = r.errors == before
		d.sets[f.name] = s
		d.names = append(d.names, f.name)
		d.Sets = append(d.Sets, s.AddressSet)
	}
}

func (d *draft) readOpens(r *reader) {
	for _, f := range r.tables(d.open, "web") {
		before := r.errors
		o := &rule{
			Open:  Open{Name: f.name, Pos: r.pos(f.key), Protocols: []Protocol{TCP}, From: Source{Any: true}},
			table: f.key,
		}
		title := "[open." + tableName(f.name) + "]"
		if has := openSchema.read(r, f.value, title, o); !has["ports"] && !has["service"] {
			r.errorf(f.key, "write ports = [443]", "ports is missing in %s", title)
		}
		for _, p := range o.ports {
			o.Ports = append(o.Ports, p.PortRange)
		}
		o.Ports = mergePorts(o.Ports)
		o.resolve(r, d)
		o.sound = r.errors == before
		if o.sound {
			o.meet(r, d)
			o.sound = r.errors == before
		}
		d.rules = append(d.rules, o)
		d.Open = append(d.Open, o.Open)
	}
}

// resolve finds the sets that from names.
func (o *rule) resolve(r *reader, d *draft) {
	for _, ref := range o.refs {
		s := d.sets[ref.name]
		if s == nil {
			hint := fmt.Sprintf("define it: [set.%s]", tableName(ref.name))
			if near := r.nearest(ref.name, d.names); near != "" {
				hint = "did you mean " + quote("@"+near) + "?"
				d.sets[near].used = true
			} else if !isTableName(ref.name) {
				hint = `write @ and the name of a [set.NAME]`
			}
			r.errorf(ref.at, hint, "undefined set %s", quote("@"+ref.name))
			continue
		}
		s.used = true
		if !slices.Contains(o.From.Sets, ref.name) {
			o.From.Sets = append(o.From.Sets, ref.name)
		}
	}
}

// meet complains of a family that no source belongs to.
func (o *rule) meet(r *reader, d *draft) {
	v4, v6 := d.families(&o.Open)
	if o.Family == IPv4 && !v4 {
		r.errorf(o.family, "remove family, or add IPv4 sources", "family \"ipv4\" and from cannot meet: every source is IPv6")
	}
	if o.Family == IPv6 && !v6 {
		r.errorf(o.family, "remove family, or add IPv6 sources", "family \"ipv6\" and from cannot meet: every source is IPv4")
	}
}

// families reports of which families from has sources. A set that is broken may
// hold either.
func (d *draft) families(o *Open) (v4, v6 bool) {
	if o.From.Any {
		return true, true
	}
	add := func(ranges []AddrRange) {
		// IPv4 stands first.
		if n := len(ranges); n > 0 {
			v4 = v4 || ranges[0].Lo.Is4()
			v6 = v6 || ranges[n-1].Lo.Is6()
		}
	}
	add(o.From.Ranges)
	for _, name := range o.From.Sets {
		s := d.sets[name]
		if !s.sound {
			return true, true
		}
		add(s.Ranges)
	}
	return v4, v6
}

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

// protocols reads the value of protocol.
func (r *reader) protocols(v named) []Protocol {
	later := []string{"any", "all", "sctp", "udplite", "dccp", "esp", "ah", "gre", "vrrp", "igmp", "icmp", "icmpv6", "ospf", "ipip"}
	var out []Protocol
	r.each(v, `a string like "tcp"`, "leave protocol out for tcp", func(e value, mistyped func()) {
		s, ok := e.v.(string)
		switch {
		case ok && s == "tcp":
			out = append(out, TCP)
		case ok && s == "udp":
			out = append(out, UDP)
		case ok:
			r.word(e.span(), "protocol", s, []string{"tcp", "udp"}, later)
		default:
			if _, ok := e.v.(int64); ok {
				r.errorf(e.span(), `use "tcp" or "udp"`, "a protocol by number is not supported by this version")
				return
			}
			mistyped()
		}
	})
	slices.Sort(out)
	return slices.Compact(out)
}

// addresses reads a list of addresses; ref is called for every "@set" in it.
func (r *reader) addresses(v named, empty string, ref func(name string, at span)) []AddrRange {
	var out []AddrRange
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
		out = append(out, a)
	})
	return out
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
	if len(s) > maxComment {
		r.errorf(v.span(), fmt.Sprintf("%d bytes at most; a # line has no limit", maxComment), "comment is %d bytes long", len(s))
	}
	for _, c := range s {
		// Bidirectional controls make text look like what it is not.
		if unicode.IsControl(c) || unicode.Is(unicode.Bidi_Control, c) {
			r.errorf(v.span(), "write it as one line of plain text", "comment holds the control character U+%04X", c)
			break
		}
	}
	return s
}
