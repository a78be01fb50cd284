package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
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

// putBans writes the bans of a record into a blob of their own, a line each.
func (s *State) putBans(r *Record) error {
	var b []byte
	for i := range r.Temporary {
		if t := &r.Temporary[i]; isBan(*t) {
			b = appendBan(b, t)
		}
	}
	if r.Bans = ""; len(b) == 0 {
		return nil
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
	for line := range strings.Lines(string(b)) {
		t, err := banOf(line)
		if err != nil {
			return s.failed(r.Bans+blobEnd, fmt.Errorf("%w: %w", ErrStateDamaged, err))
		}
		r.Temporary = append(r.Temporary, t)
	}
	return nil
}

// appendBan writes a ban as a line: its address, its end and its beginning in
// milliseconds of Unix time (no end: 0), and quoted its name, who made it, and why.
func appendBan(b []byte, t *Temporary) []byte {
	b = append(t.From[0].Lo.AppendTo(b), ' ')
	end := int64(0)
	if !t.Expires.IsZero() {
		end = t.Expires.UnixMilli()
	}
	for _, n := range []int64{end, t.Begun.UnixMilli()} {
		b = append(strconv.AppendInt(b, n, 10), ' ')
	}
	for _, s := range []string{t.Name, t.By, t.Comment} {
		b = append(strconv.AppendQuote(b, s), ' ')
	}
	b[len(b)-1] = '\n'
	return b
}

// banOf reads what appendBan wrote.
func banOf(line string) (Temporary, error) {
	t := Temporary{Temporary: rules.Temporary{Block: true}}
	bad := func(err error) (Temporary, error) { return t, fmt.Errorf("no block of an address: %q: %w", line, err) }
	var words [3]string
	rest := line
	for i := range words {
		words[i], rest, _ = strings.Cut(rest, " ")
	}
	a, err := netip.ParseAddr(words[0])
	if err != nil {
		return bad(err)
	}
	t.From = []rules.AddrRange{{Lo: a, Hi: a}}
	for i, into := range []*time.Time{&t.Expires, &t.Begun} {
		n, err := strconv.ParseInt(words[1+i], 10, 64)
		if err != nil {
			return bad(err)
		}
		if n != 0 || into == &t.Begun {
			*into = time.UnixMilli(n).UTC()
		}
	}
	for _, into := range []*string{&t.Name, &t.By, &t.Comment} {
		quoted, err := strconv.QuotedPrefix(rest)
		if err == nil {
			*into, err = strconv.Unquote(quoted)
		}
		if err != nil {
			return bad(err)
		}
		rest = strings.TrimPrefix(rest[len(quoted):], " ")
	}
	if rest != "\n" {
		return bad(errors.New("more or less than a line"))
	}
	return t, nil
}
