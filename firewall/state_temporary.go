package firewall

import (
	"slices"
	"time"

	"deadlight/rules"
)

// Temporary is a temporary rule with who made it, and when. It is part of a
// record, so that it changes as one with the snapshot of the table that holds it.
type Temporary struct {
	rules.Temporary
	By    string    `json:"by"`
	Begun time.Time `json:"begun"`
}

// Beside puts temporary rules beside a policy and gives them as they are named
// there.
func Beside(p *rules.Policy, list []Temporary) (*rules.Policy, []Temporary) {
	plain := make([]rules.Temporary, len(list))
	for i := range list {
		plain[i] = list[i].Temporary
	}
	p, plain = p.With(plain)
	list = slices.Clone(list)
	for i := range list {
		list[i].Temporary = plain[i]
	}
	return p, list
}

// Running are the temporary rules that have not ended by themselves.
func Running(list []Temporary, now time.Time) []Temporary {
	return slices.DeleteFunc(slices.Clone(list), func(t Temporary) bool { return t.Over(now) })
}

// Ends says whether the table holds a temporary rule that has not ended, and when
// the kernel ends it; the zero time: not by itself.
func (s *Snapshot) Ends(t *rules.Temporary) (end time.Time, there bool) {
	if !s.Present || s.chains[t.Chain()] == nil {
		return time.Time{}, false
	}
	until := s.sets[t.UntilSet()]
	if until == nil {
		return time.Time{}, t.Expires.IsZero()
	}
	return until.first, !until.first.IsZero()
}
