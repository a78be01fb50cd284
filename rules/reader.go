package rules

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"
)

// complaint is what is wrong with a value, wherever it stands.
type complaint struct{ summary, hint string }

// finding is a problem whose place is not yet worked out.
type finding struct {
	severity Severity
	at       span
	list     *listLine // of a list of addresses, instead of at
	complaint
}

// listLine is a place in a list of addresses, which no span knows.
type listLine struct {
	file string
	place
}

// reader collects what is found in the files of a policy.
type reader struct {
	files    Files // nil: there are none
	docs     []*document
	homes    map[string]string       // where a key belongs, for those that stand elsewhere
	services map[string][]ProtoPorts // the built-in ones, once one is asked for

	serviceWords []string // their names, sorted
	found        []finding
	errors       int // found, also beyond maxFound
	dropped      int // found beyond maxFound
	guesses      int // how many near misses may still be weighed
}

func newReader(files Files) *reader {
	return &reader{files: files, homes: homes(), guesses: 1_000_000}
}

func (r *reader) report(s Severity, at span, c complaint) {
	r.note(finding{severity: s, at: at, complaint: c})
}

func (r *reader) note(f finding) {
	if f.severity == Error {
		r.errors++
	}
	if len(r.found) >= maxFound {
		r.dropped++
		return
	}
	r.found = append(r.found, f)
}

func (r *reader) errorf(at span, hint, format string, args ...any) {
	r.report(Error, at, complaint{fmt.Sprintf(format, args...), hint})
}

func (r *reader) warnf(at span, hint, format string, args ...any) {
	r.report(Warning, at, complaint{fmt.Sprintf(format, args...), hint})
}

// problems gives all that was found, in the order of the files and of their lines.
func (r *reader) problems() []Problem {
	sort.SliceStable(r.found, func(i, j int) bool {
		a, b := r.found[i], r.found[j]
		// Lists were read last, each from its start.
		return b.list != nil && a.list == nil || a.list == nil && a.at.start < b.at.start
	})
	var out []Problem
	for _, f := range r.found {
		at := f.list
		if at == nil {
			file, p := r.locate(f.at)
			at = &listLine{file, p}
		}
		out = append(out, Problem{
			Severity: f.severity,
			Pos:      Pos{at.file, at.line, at.column},
			Width:    at.width,
			Line:     at.text,
			Summary:  f.summary,
			Hint:     f.hint,
		})
	}
	if r.dropped > 0 {
		last := out[len(out)-1]
		last.Severity = Warning
		if r.errors > 0 {
			last.Severity = Error
		}
		last.Line, last.Hint = "", "mend those first"
		last.Summary = fmt.Sprintf("%d more problems are not shown", r.dropped)
		if r.dropped == 1 {
			last.Summary = "1 more problem is not shown"
		}
		out = append(out, last)
	}
	return out
}

// value is a decoded value with its place.
type value struct {
	v  any
	at *node
}

// span is where the value stands.
func (v value) span() span { return v.at.value }

// named is a value with the name it has in its table.
type named struct {
	name string
	key  span
	value
}

// fields gives the keys of a table in file order; nil if v is not a table.
func (v value) fields() []named {
	table, _ := v.v.(map[string]any)
	out := make([]named, 0, len(table))
	for name, f := range table {
		at := v.at.fields[name]
		if at == nil {
			// Never seen; a place nearby is better than a crash.
			at = &node{key: v.at.key, value: v.at.value}
		}
		out = append(out, named{name, at.key, value{f, at}})
	}
	sort.Slice(out, func(i, j int) bool {
		if out[i].key.start != out[j].key.start {
			return out[i].key.start < out[j].key.start
		}
		return out[i].name < out[j].name
	})
	return out
}

// elements gives what a list holds; false if v is not a list.
func (v value) elements() ([]value, bool) {
	list, ok := v.v.([]any)
	if !ok {
		return nil, false
	}
	out := make([]value, len(list))
	for i, e := range list {
		at := &node{key: v.at.key, value: v.at.value}
		if i < len(v.at.items) {
			at = v.at.items[i]
		}
		out[i] = value{e, at}
	}
	return out, true
}

// kind names the type of a value in the words of people.
func (v value) kind() string {
	switch v.v.(type) {
	case string:
		return "a string"
	case int64:
		return "a number"
	case float64:
		return "a fraction"
	case bool:
		return "a boolean"
	case time.Time:
		return "a date or time"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	case []map[string]any:
		return "a list of tables"
	}
	return "this"
}

// each calls read for every element of a list, or for a value that stands for a
// list of one. want completes "ports must be …".
func (r *reader) each(v named, want, empty string, read func(value, func())) {
	list, ok := v.elements()
	if !ok {
		read(v.value, func() {
			r.errorf(v.span(), "", "%s must be %s or a list of these, not %s", v.name, strings.Replace(want, " or ", ", ", 1), v.kind())
		})
		return
	}
	if len(list) == 0 {
		r.errorf(v.span(), empty, "%s is empty", v.name)
	}
	for _, e := range list {
		read(e, func() {
			r.errorf(e.span(), "", "an element of %s must be %s, not %s", v.name, want, e.kind())
		})
	}
}

// str gives the text of a value that must be a string.
func (r *reader) str(v named) (string, bool) {
	s, ok := v.v.(string)
	if !ok {
		r.errorf(v.span(), "", "%s must be a string, not %s", v.name, v.kind())
	}
	return s, ok
}

// boolean gives a value that must be true or false.
func (r *reader) boolean(v named) (bool, bool) {
	b, ok := v.v.(bool)
	if !ok {
		r.errorf(v.span(), "", "%s must be true or false, not %s", v.name, v.kind())
	}
	return b, ok
}

// integer gives a whole number of a range.
func (r *reader) integer(v named, least, most int64) (int64, bool) {
	n, ok := v.v.(int64)
	switch {
	case !ok:
		r.errorf(v.span(), "", "%s must be a whole number, not %s", v.name, v.kind())
	case n < least || n > most:
		r.errorf(v.span(), fmt.Sprintf("%s runs from %d to %d", v.name, least, most), "%s %d is out of range", v.name, n)
		return 0, false
	}
	return n, ok
}

// oneOf gives a string that must be one of a few words.
func (r *reader) oneOf(v named, words ...string) string {
	s, ok := r.str(v)
	if ok && !slices.Contains(words, s) {
		r.word(v.span(), v.name, s, words)
		return ""
	}
	return s
}

// word complains of a string that is none of the words that may stand there.
func (r *reader) word(at span, name, got string, words []string) {
	hint := "use " + alternatives(words)
	if near := r.nearest(got, words); near != "" {
		hint = "did you mean " + quote(near) + "?"
	}
	r.errorf(at, hint, "unknown %s %s", name, quote(got))
}

// alternatives writes words for a hint: "a", "b" or "c".
func alternatives(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = quote(w)
	}
	if n := len(quoted) - 1; n > 0 {
		return strings.Join(quoted[:n], ", ") + " or " + quoted[n]
	}
	return strings.Join(quoted, "")
}
