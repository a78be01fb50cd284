package rules

import (
	"fmt"
)

// Names of sets become sets, and fields that cannot meet are found.

// resolve finds the sets that a list of addresses names.
func (p *placedSource) resolve(r *reader, d *draft, into *Source) {
	seen := make(map[string]bool, len(p.refs))
	for _, ref := range p.refs {
		s := d.sets[ref.name]
		if s == nil {
			d.noSet(r, ref)
			continue
		}
		s.used = true
		if !seen[ref.name] {
			seen[ref.name] = true
			into.Sets = append(into.Sets, ref.name)
		}
	}
}

// noSet complains of a set that is not defined, unless a file that may define it
// could not be read.
func (d *draft) noSet(r *reader, ref placedName) {
	hint := fmt.Sprintf("define it: [set.%s]", tableName(ref.name))
	if near := r.nearest(ref.name, d.setNames); near != "" {
		hint = "did you mean " + quote("@"+near) + "?"
		d.sets[near].used = true
	} else if !isTableName(ref.name) {
		hint = `write @ and the name of a [set.NAME]`
	}
	if !d.partial {
		r.errorf(ref.at, hint, "undefined set %s", quote("@"+ref.name))
	}
}

// meet complains of fields that no packet has together.
func (o *rule) meet(r *reader, d *draft) {
	from4, from6 := d.families(&o.From)
	to4, to6 := d.families(&o.To)
	nobody, nowhere := !from4 && !from6, !to4 && !to6
	family := o.spot("family")
	switch {
	case nobody || nowhere: // a set that happens to be empty
	case o.Family == IPv4 && !from4:
		r.errorf(family, "remove family, or add IPv4 sources", `family "ipv4" and from cannot meet: every source is IPv6`)
	case o.Family == IPv6 && !from6:
		r.errorf(family, "remove family, or add IPv6 sources", `family "ipv6" and from cannot meet: every source is IPv4`)
	case o.Family == IPv4 && !to4:
		r.errorf(family, "remove family, or add IPv4 addresses to to", `family "ipv4" and to cannot meet: every address is IPv6`)
	case o.Family == IPv6 && !to6:
		r.errorf(family, "remove family, or add IPv6 addresses to to", `family "ipv6" and to cannot meet: every address is IPv4`)
	case !(from4 && to4) && !(from6 && to6):
		one, other := "IPv4", "IPv6"
		if from6 {
			one, other = other, one
		}
		r.errorf(o.spot("to"), "name both of one family", "from and to cannot meet: every source is %s, every address in to %s", one, other)
	default:
		o.excepts(r, d)
		o.noExtensions(r, o.Family.Has(true) && from4 && to4, o.Family.Has(false) && from6 && to6)
	}
}

// excepts complains of an except that leaves nobody, and warns of one that takes
// nobody away.
func (o *rule) excepts(r *reader, d *draft) {
	if !o.has["except"] || o.From.Any {
		return
	}
	from, sure := d.parts(&o.From, o.Family)
	except, sure2 := d.parts(&o.Except, o.Family)
	if !sure || !sure2 || len(from) == 0 {
		return
	}
	left := effort
	if coversAll(except, from, &left) && left > 0 {
		r.errorf(o.spot("except"), "narrow except, or remove the table", "except leaves nobody of from")
		return
	}
	for _, w := range o.except.written {
		if !overlap(from, w.AddrRange) {
			r.warnf(w.at, "remove it from except", "%s lies outside from", w.AddrRange)
		}
	}
}

// families reports of which families a source has addresses. A set that is
// broken may hold either.
func (d *draft) families(s *Source) (v4, v6 bool) {
	if s.Any {
		return true, true
	}
	add := func(ranges []AddrRange) {
		// IPv4 stands first.
		if n := len(ranges); n > 0 {
			v4 = v4 || ranges[0].Lo.Is4()
			v6 = v6 || ranges[n-1].Lo.Is6()
		}
	}
	add(s.Ranges)
	for _, name := range s.Sets {
		set := d.sets[name]
		if !set.sound {
			return true, true
		}
		v4 = v4 || set.Ranges.Of(true).Len() > 0
		v6 = v6 || set.Ranges.Of(false).Len() > 0
	}
	return v4, v6
}

// parts gives the addresses of a source that a family has, in lists of one family
// each; false if some of them are not known.
func (d *draft) parts(s *Source, f Family) (parts []AddrRanges, sure bool) {
	sure = true
	add := func(ranges AddrRanges) {
		for _, v4 := range []bool{true, false} {
			if part := ranges.Of(v4); part.Len() > 0 && f.Has(v4) {
				parts = append(parts, part)
			}
		}
	}
	if s.Any {
		add(RangesOf(everywhere()...))
		return parts, true
	}
	add(RangesOf(s.Ranges...))
	for _, name := range s.Sets {
		set := d.sets[name]
		sure = sure && set.sound
		add(set.Ranges)
	}
	return parts, sure
}
