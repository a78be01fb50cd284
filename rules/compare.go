package rules

import (
	"fmt"
	"slices"
	"strings"
)

// Warnings: what is legal and yet probably not meant.

// adminPort is a port that hardly anybody means to open to the whole world.
type adminPort struct {
	port     uint16
	name     string
	protocol Protocol
}

func adminPorts() []adminPort {
	return []adminPort{
		{22, "ssh", TCP},
		{1433, "sql server", TCP},
		{1521, "oracle", TCP},
		{3306, "mysql", TCP},
		{3389, "rdp", TCP},
		{3389, "rdp", UDP},
		{5432, "postgresql", TCP},
		{5900, "vnc", TCP},
		{6379, "redis", TCP},
		{9200, "elasticsearch", TCP},
		{11211, "memcached", TCP},
		{11211, "memcached", UDP},
		{27017, "mongodb", TCP},
	}
}

// IsAdminPort reports whether hardly anybody means to open a port to the whole
// world: an opening of it that names neither sources nor interfaces is warned of.
func IsAdminPort(p Protocol, port uint16) bool {
	return slices.ContainsFunc(adminPorts(), func(a adminPort) bool { return a.protocol == p && a.port == port })
}

// compare warns of what only shows when rules and sets are seen together.
func (d *draft) compare(r *reader) {
	d.warnFamilies(r)
	for _, o := range d.opens {
		if o.sound {
			o.warnWorld(r)
		}
	}
	d.warnCovered(r)
	if n := len(d.egress); n > 0 && d.Default.Output == Accept {
		r.warnf(d.egress[0].table, `write output = "drop" in [default], or remove what has no effect`,
			`[egress.*] has no effect: output in [default] is "accept"`)
	}
	if d.partial {
		return // the file that could not be read may use them
	}
	for _, name := range d.setNames {
		if s := d.sets[name]; s.sound && !s.used {
			r.warnf(s.at, fmt.Sprintf("name it in from as %s, or remove it", quote("@"+name)), "set %s is not used", quote(name))
		}
	}
	for _, name := range d.serviceNames {
		if s := d.services[name]; !s.used && !s.broken {
			r.warnf(s.at, fmt.Sprintf("name it as service = %s, or remove it", quote(name)), "service %s is not used", quote(name))
		}
	}
}

// warnFamilies warns of rules without IPv6 in a policy that has IPv6.
func (d *draft) warnFamilies(r *reader) {
	v4only := make([]bool, len(d.opens))
	any6 := false
	for i, o := range d.opens {
		if !o.sound || o.From.Any {
			continue
		}
		v4, v6 := d.families(&o.From)
		v4only[i] = v4 && !v6 && o.Family == Both && o.To.Any
		any6 = any6 || v6
	}
	for i, o := range d.opens {
		if any6 && v4only[i] {
			r.warnf(o.spot("from"), `add IPv6 sources, or write family = "ipv4"`, "%s opens nothing over IPv6: every source is IPv4", quote(o.Name))
		}
	}
}

// warnWorld warns of admin ports open to everyone.
func (o *rule) warnWorld(r *reader) {
	if !o.From.Any || len(o.Interfaces) > 0 {
		return
	}
	hint := `name who may in from; if everyone may, write from = ["0.0.0.0/0", "::/0"]`
	if o.Any {
		r.warnf(o.spot("protocol"), hint, "open to the whole world: every port of every protocol")
		return
	}
	var names []string
	var at span
	for _, a := range adminPorts() {
		i := slices.IndexFunc(o.opened, func(t placedTraffic) bool { return t.protocol == a.protocol && t.Lo <= a.port && a.port <= t.Hi })
		if i < 0 {
			continue
		}
		if len(names) == 0 {
			at = o.opened[i].at
		}
		if n := fmt.Sprintf("%d (%s)", a.port, a.name); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	if len(names) > 0 {
		r.warnf(at, hint, "open to the whole world: %s", strings.Join(names, ", "))
	}
}

// warnCovered warns of rules that do nothing of their own.
func (d *draft) warnCovered(r *reader) {
	opens, scopes := d.scopes(d.opens)
	for i, by := range covering(scopes) {
		if by < 0 {
			continue
		}
		o, wide := opens[i], opens[by]
		what, key := "rate", "rate"
		if o.Rate == nil {
			what, key = "limit of connections", "connections"
		}
		if o.Rate != nil || o.Connections > 0 {
			r.warnf(o.spot(key), fmt.Sprintf("remove it, or narrow %s", quote(wide.Name)),
				"the %s of %s has no effect: %s (%s) admits the same without one", what, quote(o.Name), quote(wide.Name), o.whereIs(wide))
			continue
		}
		r.warnf(o.table, fmt.Sprintf("remove it, or narrow %s", quote(wide.Name)),
			"%s is wholly covered by %s (%s)", quote(o.Name), quote(wide.Name), o.whereIs(wide))
	}

	// Blocks cover each other and opens; opens cover no block.
	blocks, blocking := d.scopes(d.blocks)
	for i := range scopes {
		scopes[i].limited = true
	}
	all := slices.Concat(opens, blocks)
	for i, by := range covering(slices.Concat(scopes, blocking)) {
		if by < 0 {
			continue
		}
		o, wide := all[i], all[by]
		if o.kind == "open" {
			r.warnf(o.table, fmt.Sprintf("remove it, or narrow %s", wide.title()), "%s admits nobody: %s (%s) wins over it", quote(o.Name), wide.title(), o.whereIs(wide))
			continue
		}
		r.warnf(o.table, fmt.Sprintf("remove it, or narrow %s", wide.title()), "%s is wholly covered by %s (%s)", o.title(), wide.title(), o.whereIs(wide))
	}

	egress, scopes := d.scopes(d.egress)
	for i, by := range covering(scopes) {
		if by >= 0 {
			o, wide := egress[i], egress[by]
			r.warnf(o.table, fmt.Sprintf("remove it, or narrow %s", wide.title()), "%s is wholly covered by %s (%s)", o.title(), wide.title(), o.whereIs(wide))
		}
	}
}

// whereIs says where another rule stands, seen from o.
func (o *rule) whereIs(other *rule) string {
	if o.Pos.File == other.Pos.File {
		return fmt.Sprintf("line %d", other.Pos.Line)
	}
	return fmt.Sprintf("%s:%d", printable(other.Pos.File), other.Pos.Line)
}

// scopes gives what sound rules are about.
func (d *draft) scopes(rules []*rule) ([]*rule, []scope) {
	var sound []*rule
	var out []scope
	for _, o := range rules {
		if o.sound {
			sound, out = append(sound, o), append(out, d.scope(o))
		}
	}
	return sound, out
}

// scope gives what a rule is about.
func (d *draft) scope(o *rule) scope {
	s := scope{traffic: trafficKeys(&o.Traffic), interfaces: o.Interfaces, until: o.Expires, limited: o.Rate != nil || o.Connections > 0}
	sources, to := &o.From, &o.To
	if o.kind == "egress" {
		sources, to = to, sources
		if o.user+o.group != "" {
			s.owner = o.user + ":" + o.group // neither holds a colon
		}
	}
	sure, sure2, sure3 := true, true, true
	s.sources, sure = d.parts(sources, o.Family)
	s.except, sure2 = d.parts(&o.Except, o.Family)
	if !to.Any {
		if s.to, sure3 = d.parts(to, o.Family); len(s.to) == 0 {
			s.sources = nil // a set that is empty: the rule is about nothing
		}
	}
	s.unsure = !(sure && sure2 && sure3)
	return s
}
