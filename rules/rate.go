package rules

import (
	"fmt"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"
)

// defaultBurst is how many may come at once before the limit counts.
const defaultBurst = 5

// rateSchema is the table of a rate, as of [open.*] and echo.
var rateSchema = slices.Concat(logRateSchema, schema[Rate]{
	{name: "per", also: []string{"by"}, read: func(r *reader, v named, rate *Rate) {
		rate.PerSource = r.oneOf(v, "source", "rule") != "rule"
	}},
})

// logRateSchema is that of the lines of the log, which have no source.
var logRateSchema = schema[Rate]{
	{name: "limit", also: []string{"rate", "max"}, read: func(r *reader, v named, rate *Rate) {
		s, ok := v.v.(string)
		if n, number := v.v.(int64); number {
			r.errorf(v.span(), fmt.Sprintf("write a unit: %s", quote(fmt.Sprintf("%d/minute", max(1, n)))), "limit has no unit of time")
			return
		}
		if !ok {
			r.errorf(v.span(), "", `limit must be a string like "10/minute", not %s`, v.kind())
			return
		}
		var bad *complaint
		if rate.Limit, rate.Per, bad = parseLimit(s); bad != nil {
			r.report(Error, v.span(), *bad)
		}
	}},
	{name: "burst", also: []string{"bursts"}, read: func(r *reader, v named, rate *Rate) {
		if n, ok := r.integer(v, 1, math.MaxUint32); ok {
			rate.Burst = uint32(n)
		}
	}},
}

// switched reads what is true, false or the table of a rate.
func (r *reader) switched(v named, s schema[Rate]) (bool, *Rate) {
	switch b := v.v.(type) {
	case bool:
		return b, nil
	case map[string]any:
		return true, r.rate(v, s)
	default:
		hint := ""
		switch b {
		case "yes", "on", "true":
			hint = "write true, without quotes"
		case "no", "off", "false":
			hint = "write false, without quotes"
		}
		r.errorf(v.span(), hint, "%s must be true, false or a table like { limit = \"10/second\" }, not %s", v.name, v.kind())
	}
	return false, nil
}

// rate reads the table of a rate.
func (r *reader) rate(v named, s schema[Rate]) *Rate {
	if _, ok := v.v.(map[string]any); !ok {
		hint := ""
		if _, ok := v.v.(string); ok {
			hint = fmt.Sprintf("write %s = { limit = \"10/minute\" }", v.name)
		}
		r.errorf(v.span(), hint, "%s must be a table, not %s", v.name, v.kind())
		return nil
	}
	rate := &Rate{Burst: defaultBurst, PerSource: true}
	before := r.errors
	if has := s.read(r, v.value, v.name, rate); !has["limit"] {
		r.errorf(v.span(), `write limit = "10/minute"`, "limit is missing in %s", v.name)
	}
	if r.errors > before {
		return rate
	}
	// The kernel keeps the time that a burst takes in 64 bits of nanoseconds.
	if over, took := bits.Mul64(uint64(rate.Per)/rate.Limit, uint64(rate.Burst)); over > 0 || took > math.MaxInt64 {
		r.errorf(v.span(), "lower the burst", "burst of %d is more than the kernel can count at %d/%s", rate.Burst, rate.Limit, unitName(rate.Per))
	}
	return rate
}

// unitNames are the units of a limit with what people write for them.
func unitNames() []struct {
	name string
	unit time.Duration
	also []string
} {
	return []struct {
		name string
		unit time.Duration
		also []string
	}{
		{"second", time.Second, []string{"s", "sec", "secs", "seconds"}},
		{"minute", time.Minute, []string{"m", "min", "mins", "minutes"}},
		{"hour", time.Hour, []string{"h", "hr", "hrs", "hours"}},
		{"day", 24 * time.Hour, []string{"d", "days"}},
	}
}

func unitName(d time.Duration) string {
	for _, u := range unitNames() {
		if u.unit == d {
			return u.name
		}
	}
	return d.String()
}

// parseLimit reads "10/minute".
func parseLimit(s string) (uint64, time.Duration, *complaint) {
	number, unit, ok := strings.Cut(s, "/")
	n, err := strconv.ParseUint(number, 10, 32)
	digits := number != "" && strings.Trim(number, "0123456789") == ""
	for _, u := range unitNames() {
		if ok && digits && unit == u.name {
			if plain := strings.TrimLeft(number, "0"); plain != number && plain != "" {
				return 0, 0, &complaint{"limit " + quote(s) + " has leading zeros", "did you mean " + quote(plain+"/"+unit) + "?"}
			}
			if err != nil || n == 0 {
				return 0, 0, &complaint{"limit " + quote(s) + " is out of range", fmt.Sprintf("from 1/%s to %d/%s", u.name, uint32(math.MaxUint32), u.name)}
			}
			return n, u.unit, nil
		}
	}
	bad := &complaint{quote(s) + " is not a limit", `write a number and a unit: "10/second", "10/minute", "10/hour" or "10/day"`}
	plain := strings.ToLower(strings.NewReplacer(" per ", "/", " ", "").Replace(s))
	number, unit, _ = strings.Cut(plain, "/")
	for _, u := range unitNames() {
		if number == "" || strings.Trim(number, "0123456789") != "" {
			break
		}
		for _, word := range append(u.also, u.name) {
			if unit == word {
				bad.hint = "did you mean " + quote(number+"/"+u.name) + "?"
			}
		}
	}
	return 0, 0, bad
}
