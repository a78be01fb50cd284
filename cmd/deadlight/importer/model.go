package importer

import (
	"fmt"
	"strings"
	"time"

	"deadlight/rules"
)

// verdict is what a rule does with a packet that it matches.
type verdict uint8

const (
	goOn    verdict = iota // it only counts, marks or logs
	accept                 // ends the chain of its hook
	drop                   //
	reject                 //
	back                   // to the chain that jumped here
	jump                   //
	goTo                   // jump without coming back
	rewrite                // another address or port: who is meant no longer shows
	unclear                // something that we do not know, or that a program decides
)

// limit is what a rule counts.
type limit struct {
	rate  *rules.Rate
	conns int
	key   string // counters that are shared have the same
	note  string // how the original differs
}

// rule is a rule of any of the formats.
type rule struct {
	file    string
	line    int
	text    string // as it stands there
	where   string // what tells it better than its line, "" if nothing does
	comment string
	service string   // that it is made for, of firewalld
	on      [2][]box // what it matches, by family: IPv4, IPv6; several are ORed
	opaque  []string // conditions that we cannot tell
	states  uint8    // of conntrack; 0 means all
	odd     string   // it is only about packets that begin no flow, such as fragments
	limit   *limit
	over    bool // it matches what is above the limit
	verdict verdict
	target  string
	log     bool   // writes a log line
	policy  bool   // it only stands for the default of the whole
	chain   *chain // where it stands
}

func (r *rule) pos() string {
	if r.where != "" {
		return r.where
	}
	return fmt.Sprintf("%s:%d", r.file, r.line)
}

// States of conntrack, as bits of rule.states.
const (
	stNew = 1 << iota
	stEstablished
	stRelated
	stOther // invalid, untracked, and what a NAT has marked
)

// chain is an ordered list of rules.
type chain struct {
	name  string // with its table
	rules []*rule
}

// base is a chain that the kernel calls.
type base struct {
	*chain
	hook   string // "prerouting", "input", "forward", "output"
	policy verdict
	file   string
	line   int
	nat    bool
	dev    []string // of a netdev chain
	prio   int
	ours   int // families it sees: bit 0 IPv4, bit 1 IPv6
}

// ruleset is what a format became.
type ruleset struct {
	format   string
	chains   map[string]*chain
	bases    []*base
	families [2]bool // whether anything is known of IPv4 and IPv6
	sets     []namedSet
	notes    []Note
	docker   bool // containers are managed by somebody who filters for them
}

type namedSet struct {
	name string
	all  addrs
}

func newRuleset(format string) *ruleset {
	return &ruleset{format: format, chains: map[string]*chain{}}
}

func (s *ruleset) chain(name string) *chain {
	c := s.chains[name]
	if c == nil {
		c = &chain{name: name}
		s.chains[name] = c
	}
	return c
}

func (c *chain) add(r *rule) {
	r.chain = c
	c.rules = append(c.rules, r)
}

func (s *ruleset) note(file string, line int, text, format string, args ...any) {
	s.notes = append(s.notes, Note{File: file, Line: line, Text: text, Reason: fmt.Sprintf(format, args...)})
}

// Note is what a policy does not say as the original did.
type Note struct {
	File   string // "" where it is about the whole
	Line   int
	Text   string // of the rule, "" where it is about the whole
	Reason string
	Also   string // where the same holds
}

// String writes file:line: reason: text.
func (n Note) String() string {
	s := n.Reason
	if n.Text != "" {
		s += ": " + n.Text
	}
	if n.Also != "" {
		s += " (also " + n.Also + ")"
	}
	switch {
	case n.File == "":
		return s
	case n.Line == 0:
		return n.File + ": " + s
	}
	return fmt.Sprintf("%s:%d: %s", n.File, n.Line, s)
}

// match begins a rule that matches everything of the families.
func match(v4, v6 bool) [2][]box {
	var on [2][]box
	if v4 {
		on[0] = []box{anything(true)}
	}
	if v6 {
		on[1] = []box{anything(false)}
	}
	return on
}

// anything is every packet of a family, the loopback too.
func anything(v4 bool) box {
	b := everything(v4)
	b.src, b.dev = network("::/0"), devices{}
	if v4 {
		b.src = network("0.0.0.0/0")
	}
	b.dst = b.src
	return b
}

// narrow confines every alternative.
func (r *rule) narrow(fn func(b *box, v4 bool)) {
	for f := range r.on {
		var kept []box
		for _, b := range r.on[f] {
			if fn(&b, f == 0); !b.empty() {
				kept = append(kept, b)
			}
		}
		r.on[f] = kept
	}
}

func (r *rule) protocol(set nums) {
	r.narrow(func(b *box, _ bool) { b.proto = b.proto.and(set) })
}

func (r *rule) ports(set nums, source bool) {
	r.narrow(func(b *box, _ bool) {
		if source {
			b.sport = b.sport.and(set)
		} else {
			b.dport = b.dport.and(set)
		}
	})
}

// address confines the source or the destination; of a family that the set does
// not have nothing is left, unless it is negated.
func (r *rule) address(set addrs, not, source bool) {
	r.narrow(func(b *box, _ bool) {
		at := &b.dst
		if source {
			at = &b.src
		}
		if not {
			*at = at.minus(set)
		} else {
			*at = at.and(set)
		}
	})
}

func (r *rule) device(patterns []string, not bool) {
	d := devices{in: patterns}
	if not {
		d = devices{not: patterns}
	}
	r.narrow(func(b *box, _ bool) { b.dev = b.dev.and(d) })
}

func (r *rule) doubt(format string, args ...any) {
	r.opaque = append(r.opaque, fmt.Sprintf(format, args...))
}

// perUnit reads "second", "sec", "s" and the like.
func perUnit(s string) (time.Duration, bool) {
	for _, u := range []struct {
		word string
		unit time.Duration
	}{{"second", time.Second}, {"minute", time.Minute}, {"hour", time.Hour}, {"day", 24 * time.Hour}} {
		if s != "" && (strings.HasPrefix(u.word, s) || s == u.word+"s" || s == "secs" && u.word == "second" || s == "mins" && u.word == "minute") {
			return u.unit, true
		}
	}
	return 0, false
}
