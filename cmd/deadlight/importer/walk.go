package importer

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// piece is a box of packets, and what must not be exceeded for them to get on.
type piece struct {
	box
	limit *limit
}

// grant is a piece that is admitted, by a rule or (nil) by the policy of a chain.
type grant struct {
	piece
	by *rule
}

// denial is a rule that denies exactly a box, wherever it stands.
type denial struct {
	box
	by   *rule
	path string
}

// walk follows packets of one family and conntrack state through chains. What it
// says is admitted certainly is: where a rule may or may not match, both ways
// are followed, and a packet that one of them denies is given up.
type walk struct {
	set     *ruleset
	v4      bool
	state   uint8
	skip    map[string]bool // denials that a [block.*] stands for
	denials []denial
	replies bool // an earlier rule admitted what belongs to a flow
	rejects *bool
	used    map[*rule]bool   // some packet of a flow's beginning reached it
	notes   map[*rule]string // what to say of a rule
	steps   int
}

var errTooComplex = errors.New("the rules cross each other in too many ways to be judged")

const (
	maxPieces = 2048
	maxSteps  = 2_000_000
	maxDepth  = 64
)

func (w *walk) say(r *rule, format string, args ...any) {
	if w.notes != nil && w.notes[r] == "" {
		w.notes[r] = fmt.Sprintf(format, args...)
	}
}

// base gives what a chain of a hook admits.
func (w *walk) base(b *base) ([]grant, error) {
	start := everything(w.v4)
	if b.dev != nil {
		start.dev = devices{in: b.dev}
	}
	all := start
	grants, fell, err := w.chain(b.chain, []piece{{box: start}}, &all, b.name)
	if err != nil {
		return nil, err
	}
	if b.policy == accept {
		for _, p := range fell {
			grants = append(grants, grant{p, nil})
		}
	} else if w.rejects != nil && len(fell) > 0 {
		w.defaultIs(fell, false)
	}
	if b.dev != nil { // what enters elsewhere does not meet it
		rest := everything(w.v4)
		for _, r := range rest.minus(start) {
			grants = append(grants, grant{piece{box: r}, nil})
		}
	}
	return grants, nil
}

// defaultIs notes what becomes of TCP from anywhere that no rule admits.
func (w *walk) defaultIs(list []piece, rejected bool) {
	probe := everything(w.v4)
	for _, p := range list {
		if p.proto.has(6) && p.src.equal(probe.src) && p.dev.in == nil && p.dport.has(1) && p.dport.has(50000) {
			*w.rejects = rejected
		}
	}
}

// cut takes a box out of pieces and gives both parts.
func cut(reach []piece, b box) (in, rest []piece) {
	for _, p := range reach {
		if i := p.and(b); !i.empty() {
			in = append(in, piece{i, p.limit})
			for _, o := range p.minus(b) {
				rest = append(rest, piece{o, p.limit})
			}
		} else {
			rest = append(rest, p)
		}
	}
	return in, rest
}

// chain gives what a chain admits and what leaves it at its end. path names this
// call of it, and all is every packet that can enter, nil if that is not one box.
func (w *walk) chain(c *chain, reach []piece, all *box, path string) (out []grant, fell []piece, err error) {
	if strings.Count(path, ">") > maxDepth {
		return nil, nil, fmt.Errorf("chain %s: jumps do not end", c.name)
	}
	for n, r := range c.rules {
		if len(reach) == 0 && w.denials == nil {
			break
		}
		w.steps += 1 + len(reach)
		if len(reach)+len(fell) > maxPieces || w.steps > maxSteps {
			return nil, nil, fmt.Errorf("%s: %w", r.pos(), errTooComplex)
		}
		here := fmt.Sprintf("%s>%d", path, n)
		family := 1
		if w.v4 {
			family = 0
		}
		if r.verdict == accept && r.states&stEstablished != 0 && len(r.opaque) == 0 && everything(w.v4).within(r.on[family]) {
			w.replies = true
		}
		if r.states != 0 && r.states&w.state == 0 || r.odd != "" || w.skip[here] {
			continue
		}
		var in []piece
		for _, b := range r.on[family] {
			i, rest := cut(reach, b)
			in, reach = append(in, i...), rest
		}
		if w.used != nil && len(in) > 0 {
			w.used[r] = true
		}
		exact := len(r.opaque) == 0 && r.limit == nil
		var whole *box
		if all != nil && exact && len(r.on[family]) == 1 {
			b := all.and(r.on[family][0])
			whole = &b
		}
		counted := r.limit != nil && len(r.opaque) == 0 && w.state == stNew && (w.replies || r.states == stNew)
		switch r.verdict {
		case goOn:
			reach = coalesce(append(reach, in...))
		case accept:
			for _, p := range in {
				switch {
				case exact:
					out = append(out, grant{p, r})
					// A later rule may say of it again that it is admitted: so openings
					// overlap instead of fraying.
					if !universal(r, w.v4) {
						reach = append(reach, p)
					}
				case counted && !r.over && p.limit == nil:
					out = append(out, grant{piece{p.box, r.limit}, r})
					reach = append(reach, p)
				default:
					if !p.within(always(w.v4)) {
						w.say(r, "%s", unsure(r))
					}
					reach = append(reach, p)
				}
			}
			reach = coalesce(reach)
		case drop, reject:
			reach = append(reach, w.deny(r, in, whole, exact, counted, here)...)
		case back:
			switch {
			case exact:
				fell = append(fell, in...)
			case counted && !r.over && allFree(in):
				for _, p := range in {
					fell = append(fell, piece{p.box, r.limit})
				}
			case len(in) > 0:
				w.say(r, "%s; what it may match is left shut", unsure(r))
			}
		case jump, goTo:
			target := w.set.chains[r.target]
			if target == nil {
				return nil, nil, fmt.Errorf("%s: chain %q is not in the file", r.pos(), r.target)
			}
			g, f, err := w.chain(target, in, whole, here+">"+r.target)
			if err != nil {
				return nil, nil, err
			}
			if whole != nil && !whole.empty() && len(g) == 0 && len(f) == 0 && w.denials != nil && w.set.onlyDenies(target) {
				w.denials = append(w.denials, denial{*whole, r, here})
			}
			if !universal(r, w.v4) {
				for i := range g { // who asked for it is the rule that chose, not an ACCEPT for all
					if g[i].by != nil && !g[i].by.policy && universal(g[i].by, w.v4) {
						g[i].by = r
					}
				}
			}
			switch {
			case exact:
				out = append(out, g...)
				if r.verdict == goTo {
					fell = append(fell, f...)
				} else {
					reach = coalesce(append(reach, f...))
				}
			case r.over && counted && len(g) == 0 && len(f) == 0:
				reach = append(reach, w.deny(r, in, nil, false, true, here)...)
			case r.verdict == jump:
				// It may jump or not: what comes through both ways goes on.
				for _, x := range g {
					f = append(f, x.piece)
				}
				reach = append(reach, f...)
				if len(in) > 0 {
					w.say(r, "%s", unsure(r))
				}
			case len(in) > 0:
				w.say(r, "%s; what it may match is left shut", unsure(r))
			}
		case rewrite:
			if len(in) > 0 {
				w.say(r, "changes where packets go before the rules of the host see them: what it matches is left shut")
			}
		case unclear:
			if len(in) > 0 {
				w.say(r, "%s decides; what it may match is left shut", r.target)
			}
		}
	}
	return out, append(fell, reach...), nil
}

// onlyDenies reports whether no rule that a chain leads to could admit anything new.
func (s *ruleset) onlyDenies(c *chain) bool {
	return !slices.ContainsFunc(s.reachable([]*base{{chain: c}}), func(c *chain) bool {
		return slices.ContainsFunc(c.rules, func(r *rule) bool {
			return (r.verdict == accept || r.verdict == rewrite || r.verdict == unclear) && (r.states == 0 || r.states&stNew != 0)
		})
	})
}

// coalesce joins pieces that differ in one dimension, as those that came back
// from a chain by several of its rules.
func coalesce(list []piece) []piece {
	if len(list) > 64 {
		return list
	}
	for i := 0; i < len(list); i++ {
		for k := i + 1; k < len(list); k++ {
			if list[i].limit != list[k].limit {
				continue
			}
			if b, ok := list[i].joined(list[k].box); ok {
				list[i].box = b
				list = slices.Delete(list, k, k+1)
				i, k = -1, len(list)
			}
		}
	}
	return list
}

// deny gives what of in goes on behind a rule that denies.
func (w *walk) deny(r *rule, in []piece, whole *box, exact, counted bool, here string) []piece {
	if w.rejects != nil && exact {
		w.defaultIs(in, r.verdict == reject)
	}
	if exact {
		if whole != nil && !whole.empty() {
			w.denials = append(w.denials, denial{*whole, r, here})
		}
		return nil
	}
	if counted && r.over && allFree(in) {
		for i := range in {
			in[i].limit = r.limit
		}
		return in
	}
	if len(in) > 0 {
		w.say(r, "denies by a condition that Deadlight has not (%s): all that it may match is left shut", strings.Join(r.reasons(), ", "))
	}
	return nil
}

func allFree(list []piece) bool {
	return !slices.ContainsFunc(list, func(p piece) bool { return p.limit != nil })
}

// unsure says why a rule cannot be followed.
func unsure(r *rule) string {
	if aboutICMP(r) {
		return noICMPTypes
	}
	return "depends on what Deadlight has not (" + strings.Join(r.reasons(), ", ") + ")"
}

// noICMPTypes says why a type of ICMP is left out.
const noICMPTypes = "Deadlight opens ICMP as a whole, or echo for everyone by [icmp]"

// aboutICMP reports whether a rule names types of ICMP and nothing else has a part in it.
func aboutICMP(r *rule) bool {
	some := false
	for f, on := range r.on {
		for _, b := range on {
			if !b.proto.within(nums{{protoICMP, protoICMP}, {protoICMPv6, protoICMPv6}}) || b.dport.equal(everything(f == 0).dport) {
				return false
			}
			some = true
		}
	}
	return some
}

func (r *rule) reasons() []string {
	out := slices.Clone(r.opaque)
	if r.limit != nil {
		out = append(out, "a limit in this place")
	}
	return out
}

// through gives what all chains of a hook together admit.
func (w *walk) through(bases []*base) ([]grant, error) {
	bit := 2
	if w.v4 {
		bit = 1
	}
	cur := []grant{{piece{box: everything(w.v4)}, nil}}
	for _, b := range bases {
		if b.ours&bit == 0 {
			continue
		}
		next, err := w.base(b)
		if err != nil {
			return nil, err
		}
		var both []grant
		for _, g := range cur {
			for _, h := range next {
				i := g.and(h.box)
				if i.empty() {
					continue
				}
				m := grant{piece{i, g.limit}, g.by}
				if m.by == nil {
					m.by = h.by
				}
				switch {
				case g.limit == nil:
					m.limit = h.limit
				case h.limit != nil: // two counters: neither alone is as narrow
					continue
				}
				both = append(both, m)
			}
			if len(both) > maxPieces*4 {
				return nil, errTooComplex
			}
		}
		cur = joinGrants(both)
	}
	return cur, nil
}

// joinGrants joins what one rule admits in several pieces.
func joinGrants(list []grant) []grant {
	var order []*rule
	by := map[*rule][]piece{}
	for _, g := range list {
		if _, ok := by[g.by]; !ok {
			order = append(order, g.by)
		}
		by[g.by] = append(by[g.by], g.piece)
	}
	var out []grant
	for _, r := range order {
		for _, p := range coalesce(by[r]) {
			out = append(out, grant{p, r})
		}
	}
	return out
}
