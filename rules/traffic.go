package rules

import (
	"fmt"
	"math"
)

// The tables that say of packets what happens to them: [open.*], [block.*],
// [egress.*] and [failsafe].

// rule is such a table being read, with the places its problems point at.
type rule struct {
	Open
	user, group string

	kind  string          // "open", "block", "egress" or "failsafe"
	table span            // its name
	at    *node           // what stands in it
	has   map[string]bool // keys that are there, or were probably meant

	ports     []placedPorts
	services  []placedName
	protocols []placedProtocol
	broken    bool // some protocol or service was not understood
	opened    []placedTraffic

	from, except, to placedSource

	sound bool // nothing is wrong with it, so that it can be compared with others
}

type placedPorts struct {
	PortRange
	at span
}

// placedTraffic is a range of ports of a protocol with the word that names it.
type placedTraffic struct {
	protocol Protocol
	PortRange
	at span
}

// placedSource is a list of addresses being read.
type placedSource struct {
	refs    []placedName // of sets
	written []placedRange
}

type placedRange struct {
	AddrRange
	at span
}

// title names the table as its header does.
func (o *rule) title() string {
	if o.kind == "failsafe" {
		return "[failsafe]"
	}
	return "[" + o.kind + "." + tableName(o.Name) + "]"
}

// word names the rule in a warning: openings, of which there are most, by name.
func (o *rule) word() string {
	if o.kind == "open" {
		return quote(o.Name)
	}
	return o.title()
}

// spot gives where the value of a key stands, or else the name of the table.
func (o *rule) spot(key string) span {
	if n := o.at.fields[key]; n != nil {
		return n.value
	}
	return o.table
}

var (
	portsKey = key[rule]{name: "ports", also: []string{"port", "dport", "dports", "destination-port"}, read: func(r *reader, v named, o *rule) {
		o.ports = r.ports(v)
	}}
	serviceKey = key[rule]{name: "service", also: []string{"services"}, read: func(r *reader, v named, o *rule) {
		o.services, o.broken = r.serviceNames(v, o.broken)
	}}
	protocolKey = key[rule]{name: "protocol", also: []string{"proto", "protocols", "transport"}, read: func(r *reader, v named, o *rule) {
		o.protocols, o.broken = r.protocols(v, o.broken)
	}}
	fromKey = key[rule]{name: "from", also: []string{"source", "sources", "src", "saddr", "allow"}, read: func(r *reader, v named, o *rule) {
		hint := "leave from out to admit everyone; remove the table to admit nobody"
		if o.kind == "block" {
			hint = "leave from out to block everyone; remove the table to block nobody"
		}
		o.from, o.From = r.source(v, hint)
	}}
	exceptKey = key[rule]{name: "except", also: []string{"exclude", "not", "without", "unless"}, read: func(r *reader, v named, o *rule) {
		o.except, o.Except = r.source(v, "leave except out to except nobody")
	}}
	interfacesKey = key[rule]{name: "interfaces", also: []string{"interface", "iface", "ifaces", "iif", "iifname", "oif", "oifname", "dev", "device", "in"}, read: func(r *reader, v named, o *rule) {
		o.Interfaces = r.interfaces(v, "leave interfaces out for every interface")
	}}
	familyKey = key[rule]{name: "family", also: []string{"ip", "ipversion"}, read: func(r *reader, v named, o *rule) {
		if s, _ := v.v.(string); s == "both" {
			r.errorf(v.span(), "leave family out for both", "unknown family %s", quote(s))
			return
		}
		switch r.oneOf(v, "ipv4", "ipv6") {
		case "ipv4":
			o.Family = IPv4
		case "ipv6":
			o.Family = IPv6
		}
	}}
	expiresKey = key[rule]{name: "expires", also: []string{"until", "expire", "expiry"}, read: func(r *reader, v named, o *rule) {
		o.Expires = r.moment(v)
	}}
	logKey = key[rule]{name: "log", also: []string{"logging"}, read: func(r *reader, v named, o *rule) {
		o.Log, _ = r.boolean(v)
	}}
	commentKey = key[rule]{name: "comment", also: []string{"description", "note", "title"}, read: func(r *reader, v named, o *rule) {
		o.Comment = r.comment(v)
	}}
	overrideKey = key[rule]{name: "override", also: []string{"overrides", "replace"}, read: ignore[rule]}
)

// toKey names the far end in [egress.*], else an address of this host.
func toKey(hint string, also ...string) key[rule] {
	return key[rule]{name: "to", also: also, read: func(r *reader, v named, o *rule) { o.to, o.To = r.source(v, hint) }}
}

// localKey is to where it names an address of this host.
func localKey() key[rule] {
	return toKey("leave to out for every address of this host", "destination", "dest", "dst", "daddr")
}

var openSchema = schema[rule]{
	portsKey, serviceKey, protocolKey, fromKey, exceptKey, localKey(), interfacesKey, familyKey,
	{name: "rate", also: []string{"limit", "ratelimit", "rate-limit"}, below: rateSchema.paths(), read: func(r *reader, v named, o *rule) {
		o.Rate = r.rate(v, rateSchema)
	}},
	{name: "connections", also: []string{"connlimit", "max-connections", "maxconn"}, read: func(r *reader, v named, o *rule) {
		n, _ := r.integer(v, 1, math.MaxUint32)
		o.Connections = int(n)
	}},
	expiresKey, logKey, commentKey, overrideKey,
}

var blockSchema = schema[rule]{
	portsKey, serviceKey, protocolKey, fromKey, exceptKey, localKey(), interfacesKey, familyKey, expiresKey, logKey, commentKey, overrideKey,
}

var egressSchema = schema[rule]{
	portsKey, serviceKey, protocolKey,
	toKey("leave to out for anywhere; remove the table for nowhere", "from", "source", "destination", "dest", "dst", "daddr"),
	interfacesKey, familyKey,
	{name: "user", also: []string{"uid", "owner", "users"}, read: func(r *reader, v named, o *rule) { o.user = r.account(v) }},
	{name: "group", also: []string{"gid", "groups"}, read: func(r *reader, v named, o *rule) { o.group = r.account(v) }},
	expiresKey, logKey, commentKey, overrideKey,
}

var failsafeSchema = schema[rule]{portsKey, serviceKey, protocolKey, fromKey, interfacesKey}

// readRules reads the tables of a kind.
func (d *draft) readRules(r *reader, kind string, s schema[rule]) []*rule {
	example := map[string]string{"open": "web", "block": "scanners", "egress": "dns"}[kind]
	var out []*rule
	for _, f := range d.gather(r, kind, example, s.names()) {
		out = append(out, d.readRule(r, kind, f, s))
	}
	return out
}

func (d *draft) readRule(r *reader, kind string, f named, s schema[rule]) *rule {
	before := r.errors
	o := &rule{kind: kind, table: f.key, at: f.at}
	o.Name, o.Pos = f.name, r.pos(f.key)
	o.From, o.To = Source{Any: true}, Source{Any: true}
	o.has = s.read(r, f.value, o.title(), o)
	o.traffic(r, d)
	o.from.resolve(r, d, &o.From)
	o.except.resolve(r, d, &o.Except)
	o.to.resolve(r, d, &o.To)
	if kind == "block" && o.blocksAll() {
		r.errorf(o.table, `name whom in from, or what in ports`, "%s would block everything", o.title())
	}
	o.sound = r.errors == before
	if o.sound {
		o.meet(r, d)
		o.sound = r.errors == before
	}
	return o
}

// blocksAll reports whether nothing confines a block.
func (o *rule) blocksAll() bool {
	for _, key := range []string{"from", "except", "to", "ports", "service", "interfaces"} {
		if o.has[key] {
			return false
		}
	}
	return !o.has["protocol"] || o.Any
}

// readFailsafe reads [failsafe].
func (d *draft) readFailsafe(r *reader) {
	if d.failsafe.at == nil || !r.isTable(d.failsafe, "failsafe") {
		return
	}
	o := d.readRule(r, "failsafe", d.failsafe, failsafeSchema)
	if o.Any {
		r.errorf(o.spot("protocol"), "name the ports that let you in", `protocol "any" would leave the host open when its policy is lost`)
	}
	d.Failsafe = &Failsafe{Pos: o.Pos, On: o.On, From: o.From, Interfaces: o.Interfaces}
}

// account reads the name or the number of a user or a group.
func (r *reader) account(v named) string {
	switch s := v.v.(type) {
	case int64:
		if s < 0 || s >= math.MaxUint32 {
			r.errorf(v.span(), "", "%s %d is out of range", v.name, s)
		}
		return fmt.Sprint(s)
	case string:
		if bad := checkAccount(v.name, s); bad != nil {
			r.report(Error, v.span(), *bad)
		}
		return s
	}
	r.errorf(v.span(), "", "%s must be a name or a number, not %s", v.name, v.kind())
	return ""
}
