package rules

import (
	"fmt"
	"slices"
	"time"
)

// Rules that end by themselves.

// moment reads a date and time that means the same everywhere.
func (r *reader) moment(v named) time.Time {
	const example = "2027-01-31T00:00:00Z"
	t, ok := v.v.(time.Time)
	if !ok {
		hint := "write it like " + example
		if s, ok := v.v.(string); ok {
			if _, err := time.Parse(time.RFC3339, s); err == nil {
				hint = "write it without quotes: " + s
			}
		}
		r.errorf(v.span(), hint, "%s must be a date and time, not %s", v.name, v.kind())
		return time.Time{}
	}
	// The TOML library tells local times apart by these names only.
	switch t.Location().String() {
	case "datetime-local":
		r.errorf(v.span(), "did you mean "+t.Format("2006-01-02T15:04:05")+"Z?", "%s has no offset from UTC", v.name)
	case "date-local":
		r.errorf(v.span(), "did you mean "+t.Format("2006-01-02")+"T00:00:00Z?", "%s is a date without a time", v.name)
	case "time-local":
		r.errorf(v.span(), "write it like "+example, "%s is a time without a date", v.name)
	default:
		// The zero time means never.
		if t.Unix() <= 0 {
			r.errorf(v.span(), "", "%s is before 1970", v.name)
		}
	}
	return t.UTC()
}

// soon is how long before its end a rule is warned of.
const soon = 14 * 24 * time.Hour

// expiry is the end of a rule, with its place.
type expiry struct {
	Problem
	word, after string
	at          time.Time
}

// noteExpiries keeps what [Policy.Expired] needs to know.
func (d *draft) noteExpiries(r *reader) {
	type end struct {
		o     *rule
		after string
	}
	var ends []end
	for _, group := range []struct {
		rules []*rule
		after string
	}{{d.opens, "opens nothing"}, {d.blocks, "blocks nothing"}, {d.egress, "lets nothing out"}} {
		for _, o := range group.rules {
			if !o.Expires.IsZero() {
				ends = append(ends, end{o, group.after})
			}
		}
	}
	slices.SortStableFunc(ends, func(a, b end) int { return int(a.o.spot("expires").start) - int(b.o.spot("expires").start) })
	for _, e := range ends {
		file, p := r.locate(e.o.spot("expires"))
		d.expiries = append(d.expiries, expiry{
			Problem: Problem{Severity: Warning, Pos: Pos{file, p.line, p.column}, Width: p.width, Line: p.text},
			word:    e.o.word(), after: e.after, at: e.o.Expires,
		})
	}
}

// Expired warns of rules that have ended by now or will within two weeks, in the
// order of the policy. It is apart from [Parse], which knows no clock.
func (p *Policy) Expired(now time.Time) []Problem {
	var out []Problem
	for _, e := range p.expiries {
		w := e.Problem
		switch left := e.at.Sub(now); {
		case left <= 0:
			w.Summary = fmt.Sprintf("%s expired %s ago and %s", e.word, days(-left), e.after)
			w.Hint = "remove it, or set a later time"
		case left < soon:
			w.Summary = fmt.Sprintf("%s expires in %s", e.word, days(left))
			w.Hint = "set a later time if it is still needed"
		default:
			continue
		}
		out = append(out, w)
	}
	return out
}

// days writes a duration in its largest unit.
func days(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}} {
		switch n := d / u.unit; {
		case n == 1:
			return "1 " + u.name
		case n > 1:
			return fmt.Sprintf("%d %ss", n, u.name)
		}
	}
	return "less than a minute"
}
