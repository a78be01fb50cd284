package rules

import "slices"

// What two tables have in common: what is the same by itself, and names only what
// is the same.

type pieceKind uint8

const (
	setPiece pieceKind = iota
	chainPiece
	limitPiece
)

// piece is a part of a table that others name.
type piece struct {
	kind pieceKind
	name string
}

type common struct {
	old, new partIndex
	differs  map[piece]bool // of those that both have
}

// partIndex finds the parts of a table.
type partIndex struct {
	table  *Table
	sets   map[string]*Set
	chains map[string]*Chain
	limits map[string]Rate
	users  map[string][]Rule // of a meter
}

func indexParts(t *Table) partIndex {
	x := partIndex{t, map[string]*Set{}, map[string]*Chain{}, map[string]Rate{}, map[string][]Rule{}}
	for i := range t.Sets {
		x.sets[t.Sets[i].Name] = &t.Sets[i]
	}
	for i := range t.Chains {
		x.chains[t.Chains[i].Name] = &t.Chains[i]
		for _, r := range t.Chains[i].Rules {
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case MeterAdd:
					x.users[e.Set] = append(x.users[e.Set], r)
				case Tally:
					x.users[e.Set] = append(x.users[e.Set], r)
				}
			}
		}
	}
	for _, l := range t.Limits {
		x.limits[l.Name] = l.Rate
	}
	return x
}

func (x *partIndex) has(p piece) bool {
	ok := false
	switch p.kind {
	case setPiece:
		_, ok = x.sets[p.name]
	case chainPiece:
		_, ok = x.chains[p.name]
	case limitPiece:
		_, ok = x.limits[p.name]
	}
	return ok
}

func newCommon(was, will *Table) *common {
	c := &common{old: indexParts(was), new: indexParts(will), differs: map[piece]bool{}}
	for name, s := range c.old.sets {
		// The elements of a meter carry the limit of the rule that made them.
		if o := c.new.sets[name]; o != nil && (!s.same(o) || !slices.EqualFunc(c.old.users[name], c.new.users[name], sameRule)) {
			c.differs[piece{setPiece, name}] = true
		}
	}
	for name, ch := range c.old.chains {
		o := c.new.chains[name]
		if o != nil && (!sameBase(ch.Base, o.Base) || !slices.EqualFunc(ch.Rules, o.Rules, sameRule)) {
			c.differs[piece{chainPiece, name}] = true
		}
	}
	for name, r := range c.old.limits {
		if o, ok := c.new.limits[name]; ok && r != o {
			c.differs[piece{limitPiece, name}] = true
		}
	}
	for c.spread() {
	}
	return c
}

// spread marks what names something that differs. It reports whether there was any.
func (c *common) spread() bool {
	more := false
	check := func(p, named piece) {
		if !c.differs[p] && c.differs[named] {
			c.differs[p], more = true, true
		}
	}
	for name, s := range c.old.sets {
		for _, target := range s.Targets {
			check(piece{setPiece, name}, piece{chainPiece, target})
		}
		for _, r := range c.old.users[name] {
			r.names(func(named piece) { check(piece{setPiece, name}, named) })
		}
	}
	for name, ch := range c.old.chains {
		for _, r := range ch.Rules {
			r.names(func(named piece) { check(piece{chainPiece, name}, named) })
		}
	}
	return more
}

// shares reports whether a part of one side is just as it is on the other.
func (c *common) shares(p piece) bool { return !c.differs[p] && c.old.has(p) && c.new.has(p) }

// names lists the parts that a rule names.
func (r *Rule) names(yield func(piece)) {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case MatchSet:
			yield(piece{setPiece, e.Set})
		case VerdictMap:
			yield(piece{setPiece, e.Map})
		case MeterAdd:
			yield(piece{setPiece, e.Set})
		case Tally:
			yield(piece{setPiece, e.Set})
		case WithinLimit:
			yield(piece{limitPiece, e.Limit})
		case Verdict:
			if e.Chain != "" {
				yield(piece{chainPiece, e.Chain})
			}
		}
	}
}

func sameRule(a, b Rule) bool { return a.NFT() == b.NFT() }

func sameBase(a, b *Base) bool { return a == nil && b == nil || a != nil && b != nil && *a == *b }

func sameBan(a, b Ban) bool { return a.Addr == b.Addr && a.Expires.Equal(b.Expires) }

// same reports whether both hold the same in the same way.
func (s *Set) same(o *Set) bool {
	return s.Type == o.Type && s.Interval == o.Interval && s.Part == o.Part && (s.Targets == nil) == (o.Targets == nil) &&
		s.Until.Equal(o.Until) && s.Meter == o.Meter && s.MeterTimeout == o.MeterTimeout && s.Size() == o.Size() &&
		slices.Equal(s.Ports, o.Ports) && slices.Equal(s.Names, o.Names) && slices.Equal(s.Codes, o.Codes) &&
		slices.Equal(s.Targets, o.Targets) && s.Addrs.Equal(o.Addrs) && (s.Bans == nil) == (o.Bans == nil) && slices.EqualFunc(s.Bans, o.Bans, sameBan)
}
