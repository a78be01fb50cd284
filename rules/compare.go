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

// compare warns of what only shows when rules and sets are seen together.
func (d *draft) compare(r *reader) {
	anyIPv6 := make([]bool, len(d.rules))
	count := 0
	for i, o := range d.rules {
		if _, v6 := d.families(&o.Open); v6 && !o.From.Any && o.sound {
			anyIPv6[i] = true
			count++
		}
	}
	for i, o := range d.rules {
		if !o.sound {
			continue
		}
		o.warnWorld(r)
		others := count
		if anyIPv6[i] {
			others--
		}
		if v4, v6 := d.families(&o.Open); v4 && !v6 && o.Family == Both && others > 0 {
			r.warnf(o.from, `add IPv6 sources, or write family = "ipv4"`, "%s opens nothing over IPv6: every source is IPv4", quote(o.Name))
		}
	}
	d.warnCovered(r)
	for _, name := range d.names {
		if s := d.sets[name]; s.sound && !s.used {
			r.warnf(s.at, fmt.Sprintf("name it in from as %s, or remove it", quote("@"+name)), "set %s is not used", quote(name))
		}
	}
}

// warnWorld warns of admin ports open to everyone.
func (o *rule) warnWorld(r *reader) {
	if !o.From.Any || len(o.Interfaces) > 0 {
		return
	}
	var names []string
	var at span
	for _, a := range adminPorts() {
		if !slices.Contains(o.Protocols, a.protocol) {
			continue
		}
		i := slices.IndexFunc(o.ports, func(p placedPorts) bool { return p.Lo <= a.port && a.port <= p.Hi })
		if i < 0 {
			continue
		}
		if len(names) == 0 {
			at = o.ports[i].at
		}
		if n := fmt.Sprintf("%d (%s)", a.port, a.name); !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	if len(names) > 0 {
		r.warnf(at, `name who may in from; if everyone may, write from = ["0.0.0.0/0", "::/0"]`,
			"open to the whole world: %s", strings.Join(names, ", "))
	}
}

// warnCovered warns of rules that open nothing of their own.
func (d *draft) warnCovered(r *reader) {
	var rules []*rule
	var scopes []scope
	for _, o := range d.rules {
		if o.sound {
			rules = append(rules, o)
			scopes = append(scopes, d.scope(o))
		}
	}
	for i, by := range covering(scopes) {
		if by >= 0 {
			o := rules[by]
			r.warnf(rules[i].table, fmt.Sprintf("remove it, or narrow %s", quote(o.Name)),
				"%s is wholly covered by %s (line %d)", quote(rules[i].Name), quote(o.Name), o.Pos.Line)
		}
	}
}

// scope gives what a rule admits.
func (d *draft) scope(o *rule) scope {
	s := scope{protocols: o.Protocols, ports: o.Ports, interfaces: o.Interfaces}
	add := func(ranges []AddrRange) {
		// IPv4 stands first, so that a family is a part of the slice.
		split, _ := slices.BinarySearchFunc(ranges, true, func(a AddrRange, _ bool) int {
			if a.Lo.Is4() {
				return -1
			}
			return 1
		})
		for _, part := range [][]AddrRange{ranges[:split], ranges[split:]} {
			if len(part) > 0 && o.Family.Has(part[0].Lo.Is4()) {
				s.sources = append(s.sources, part)
			}
		}
	}
	if o.From.Any {
		add(everywhere())
		return s
	}
	add(o.From.Ranges)
	for _, name := range o.From.Sets {
		if set := d.sets[name]; set.sound {
			add(set.Ranges)
		} else {
			s.unsure = true
		}
	}
	return s
}
