package firewall

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
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
	if t.IsBan() {
		set := s.sets[t.BanSet()]
		if set == nil {
			return time.Time{}, false
		}
		key := string(t.From[0].Lo.AsSlice())
		i, found := slices.BinarySearchFunc(set.elements, key, func(e element, key string) int { return strings.Compare(e.key(), key) })
		if !found {
			return time.Time{}, false
		}
		return set.elements[i].until, true
	}
	until := s.sets[t.UntilSet()]
	if until == nil {
		return time.Time{}, t.Expires.IsZero()
	}
	return until.first, !until.first.IsZero()
}

// isBan reports whether a temporary rule is kept in the blob of the bans: an index is
// read and written more often than they change, and must not grow with them.
func isBan(t Temporary) bool { return t.IsBan() }

// putBans writes the bans of a record into a blob of their own.
func (s *State) putBans(r *Record) error {
	list := slices.DeleteFunc(slices.Clone(r.Temporary), func(t Temporary) bool { return !isBan(t) })
	if r.Bans = ""; len(list) == 0 {
		return nil
	}
	b, err := json.Marshal(list)
	if err != nil {
		return s.failed(indexNext, err)
	}
	r.Bans = digest(b)
	return s.putBlob(r.Bans, int64(len(b)), b)
}

// withBans puts the bans of a record beside its other temporary rules.
func (s *State) withBans(r *Record) error {
	if r.Bans == "" {
		return nil
	}
	b, err := s.blob(r.Bans)
	if err != nil {
		return err
	}
	var list []Temporary
	if err := json.Unmarshal(b, &list); err != nil {
		return s.failed(r.Bans+blobEnd, fmt.Errorf("%w: %w", ErrStateDamaged, err))
	}
	r.Temporary = append(r.Temporary, list...)
	return nil
}
