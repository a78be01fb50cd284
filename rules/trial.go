package rules

import (
	"slices"
	"sort"
	"time"
)

// TrialSet is the set of a table on trial. While its elements live the new policy
// judges, and when the kernel takes them away the old one does.
const TrialSet = "trial"

// What the two sides of a trial would call the same has a prefix: the contents of
// base chains, and what is not the same on the old side. No other name begins like
// these.
const (
	trialPrefix = "trial_"
	wasPrefix   = "was_"
)

// countUnjudged counts what passes where one side of a trial has no chain.
const countUnjudged = "c_unjudged"

// Trial gives one table that judges as will does until a moment, and as was does
// from then on, with no process alive. A nil was is no table: everything passes.
// What both have in common they share, so that nothing that packets have filled is
// lost. [Ruleset.Decide] of the result is that of will.
//
// One set turns every base chain over, so that the backstops always admit what the
// gate in force admits. A packet that is between two of them at that moment must
// please both policies.
func Trial(was, will *Ruleset, until time.Time) *Ruleset {
	if was == nil {
		was = &Ruleset{}
	}
	c := newCommon(&was.Table, &will.Table)
	t := Table{Name: will.Table.Name, Comment: will.Table.Comment}
	// First of all, since the kernel is told how much time is left.
	t.Sets = []Set{{Name: TrialSet, Type: TypeNfproto, Codes: []uint32{NfprotoIPv4, NfprotoIPv6}, Until: until}}
	t.Sets = append(t.Sets, will.Table.Sets...)
	for _, s := range was.Table.Sets {
		if p := (piece{setPiece, s.Name}); !c.shares(p) {
			s.Name = c.was(p)
			s.Targets = slices.Clone(s.Targets)
			for i := range s.Targets {
				s.Targets[i] = c.was(piece{chainPiece, s.Targets[i]})
			}
			t.Sets = append(t.Sets, s)
		}
	}
	t.Limits = slices.Clone(will.Table.Limits)
	for _, l := range was.Table.Limits {
		if p := (piece{limitPiece, l.Name}); !c.shares(p) {
			t.Limits = append(t.Limits, Limit{c.was(p), l.Rate})
		}
	}
	t.Counters = append(slices.Concat(was.Table.Counters, will.Table.Counters), countUnjudged)
	sort.Strings(t.Counters)
	t.Counters = slices.Compact(t.Counters)

	base, contents := c.baseChains()
	t.Chains = append(base, contents...)
	for _, ch := range will.Table.Chains {
		if ch.Base == nil && ch.Name != ChainApplied {
			t.Chains = append(t.Chains, ch)
		}
	}
	for _, ch := range was.Table.Chains {
		if p := (piece{chainPiece, ch.Name}); ch.Base == nil && ch.Name != ChainApplied && !c.shares(p) {
			t.Chains = append(t.Chains, Chain{Name: c.was(p), Rules: c.wasRules(&ch)})
		}
	}
	t.Chains = append(t.Chains, marks(t.Sets)...)
	return &Ruleset{Policy: will.Policy, Table: t, opens: will.opens, blocks: will.blocks}
}

// baseChains gives the base chains of both sides, and the contents they go to.
func (c *common) baseChains() (base, contents []Chain) {
	side := func(ch *Chain, name string, rules []Rule, when ...Expr) Rule {
		if ch == nil {
			return line("not judged", append(when, Count{countUnjudged}, accept())...)
		}
		contents = append(contents, Chain{Name: name, Rules: rules})
		return line("trial", append(when, Verdict{Kind: VerdictGoto, Chain: name})...)
	}
	for _, name := range c.baseNames() {
		was, will := c.old.chains[name], c.new.chains[name]
		if c.shares(piece{chainPiece, name}) {
			base = append(base, *will)
			continue
		}
		ch := Chain{Name: name, Base: &Base{Accept: true}}
		var before, now []Rule
		if was != nil {
			before, *ch.Base = c.wasRules(was), *was.Base
		}
		if will != nil {
			now = will.Rules
			*ch.Base = Base{will.Base.Hook, will.Base.Priority, ch.Base.Accept && will.Base.Accept}
		}
		// Each side ends in a verdict, and a goto does not come back: nothing follows.
		ch.Rules = []Rule{
			side(will, trialPrefix+name, now, MatchSet{Field: MetaNfproto, Set: TrialSet}),
			side(was, wasPrefix+name, before),
		}
		base = append(base, ch)
	}
	return base, contents
}

// baseNames are the base chains of both sides.
func (c *common) baseNames() []string {
	var out []string
	for _, t := range []*Table{c.new.table, c.old.table} {
		for _, ch := range t.Chains {
			if ch.Base != nil && !slices.Contains(out, ch.Name) {
				out = append(out, ch.Name)
			}
		}
	}
	return out
}

// was names a part of the old side: as it is called already, unless the new side
// calls something else so.
func (c *common) was(p piece) string {
	if c.new.has(p) && !c.shares(p) {
		return wasPrefix + p.name
	}
	return p.name
}

// wasRules are the rules of a chain of the old side.
func (c *common) wasRules(ch *Chain) []Rule {
	out := make([]Rule, 0, len(ch.Rules))
	for _, r := range ch.Rules {
		r.Exprs = slices.Clone(r.Exprs)
		for i, e := range r.Exprs {
			switch e := e.(type) {
			case MatchSet:
				e.Set = c.was(piece{setPiece, e.Set})
				r.Exprs[i] = e
			case VerdictMap:
				e.Map = c.was(piece{setPiece, e.Map})
				r.Exprs[i] = e
			case MeterAdd:
				e.Set = c.was(piece{setPiece, e.Set})
				r.Exprs[i] = e
			case Tally:
				e.Set = c.was(piece{setPiece, e.Set})
				r.Exprs[i] = e
			case WithinLimit:
				e.Limit = c.was(piece{limitPiece, e.Limit})
				r.Exprs[i] = e
			case Verdict:
				if e.Chain != "" {
					e.Chain = c.was(piece{chainPiece, e.Chain})
					r.Exprs[i] = e
				}
			}
		}
		out = append(out, r)
	}
	return out
}
