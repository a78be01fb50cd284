package firewall

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Difference is one way in which two tables differ.
type Difference struct {
	Action string // "add": wanted but absent; "remove": there but not wanted; "change"
	Kind   string // "table", "chain", "rule", "set", "element", "object", "flowtable"
	Name   string // for a rule: its place and comment; for an element: it and its set
	Before string // as it is, like nft text; "" when it is absent
	After  string // as it is wanted; "" when it is not
}

// String gives a line for people.
func (d Difference) String() string {
	return map[string]string{"add": "missing", "remove": "unexpected", "change": "different"}[d.Action] + " " + d.Kind + " " + d.Name
}

// clockSlack is how far two deadlines may lie apart and still be one: the kernel
// counts down in its own ticks, and reading takes time.
const clockSlack = 2 * time.Second

// Diff lists what separates the table that is from the table that is wanted.
// Equal tables give nil. Of large sets it compares the count and the digest.
func Diff(is, wanted *Snapshot) []Difference {
	if is.left.any() { // then it is only what packets meet
		only := *wanted
		only.chains, only.sets, only.objects = maps.Clone(wanted.chains), maps.Clone(wanted.sets), maps.Clone(wanted.objects)
		only.unmet()
		wanted = &only
	}
	table := func(s *Snapshot) string {
		if !s.Present {
			return ""
		}
		return tableText([]byte(s.table))
	}
	if is.Present != wanted.Present {
		d := Difference{Action: "add", Kind: "table", Name: "inet deadlight", Before: table(is), After: table(wanted)}
		if is.Present {
			d.Action = "remove"
		}
		return []Difference{d}
	}
	var out []Difference
	if is.table != wanted.table {
		out = append(out, Difference{"change", "table", "inet deadlight", table(is), table(wanted)})
	}
	out = append(out, diffMaps("chain", is.chains, wanted.chains, func(ch *chainState) string { return chainText([]byte(ch.definition)) },
		func(name string, a, b *chainState) []Difference {
			var out []Difference
			if a.definition != b.definition {
				out = append(out, Difference{"change", "chain", name, chainText([]byte(a.definition)), chainText([]byte(b.definition))})
			}
			return append(out, diffRules(name, a.rules, b.rules, is.ruleText, wanted.ruleText)...)
		})...)
	out = append(out, diffMaps("set", is.sets, wanted.sets, (*setState).String, func(name string, a, b *setState) []Difference {
		return diffSets(name, a, b.aged(is.at, a), is.at)
	})...)
	out = append(out, diffMaps("object", is.objects, wanted.objects, objectState.String, func(name string, a, b objectState) []Difference {
		if a != b {
			return []Difference{{"change", "object", name, a.String(), b.String()}}
		}
		return nil
	})...)
	return append(out, diffMaps("flowtable", is.flowtables, wanted.flowtables, func(s string) string { return s },
		func(string, string, string) []Difference { return nil })...)
}

func (s *setState) String() string {
	text := setText([]byte(s.definition))
	if s.large != nil {
		text += s.large.String()
	}
	return text
}

func (l *largeState) String() string {
	text := ""
	if l.count >= 0 {
		text += fmt.Sprintf(" %d elements", l.count)
	}
	if l.digest != "" {
		text += " of content " + l.digest
	}
	return text
}

func (o objectState) String() string {
	return objectText(attr(attr32(nil, unix.NFTA_OBJ_TYPE, o.typ), unix.NFTA_OBJ_DATA, []byte(o.data)))
}

// diffSets compares a set at a time with what it should be.
func diffSets(name string, a, b *setState, now time.Time) []Difference {
	differ := []Difference{{"change", "set", name, a.String(), b.String()}}
	switch {
	case a.definition != b.definition:
		return differ
	case a.first.Sub(b.first).Abs() > clockSlack || a.last.Sub(b.last).Abs() > clockSlack: // it ends at another time
		differ[0].Before += a.endText()
		differ[0].After += b.endText()
		return differ
	case a.large == nil && b.large == nil:
		return diffElements(name, a, b, now)
	case a.large == nil || b.large == nil || a.large.digest != b.large.digest ||
		a.large.count != b.large.count && a.large.count >= 0 && b.large.count >= 0:
		return differ
	}
	return nil
}

// aged is the set at a later time, when elements may have vanished. Close to
// their end either answer of the kernel is right.
func (s *setState) aged(now time.Time, is *setState) *setState {
	over := !now.Before(s.last)
	if s.last.Sub(now).Abs() < clockSlack {
		over = is.last.IsZero()
	}
	if s.last.IsZero() || !over {
		return s
	}
	left := *s
	left.first, left.last, left.elements = time.Time{}, time.Time{}, nil
	for _, e := range s.elements {
		if !e.vanishes {
			left.elements = append(left.elements, e)
		}
	}
	return &left
}

func (s *setState) endText() string {
	switch {
	case !s.last.IsZero():
		return " until " + s.last.UTC().Format(time.RFC3339)
	case len(s.elements) == 0:
		return " without elements"
	}
	return " without end"
}

func diffMaps[V any](kind string, is, wanted map[string]V, text func(V) string, both func(string, V, V) []Difference) []Difference {
	var out []Difference
	for _, name := range sortedKeys(wanted) {
		if v, ok := is[name]; ok {
			out = append(out, both(name, v, wanted[name])...)
		} else {
			out = append(out, Difference{"add", kind, name, "", text(wanted[name])})
		}
	}
	for _, name := range sortedKeys(is) {
		if _, ok := wanted[name]; !ok {
			out = append(out, Difference{"remove", kind, name, text(is[name]), ""})
		}
	}
	return out
}

// ruleText writes a rule of the table, anonymous sets by what they hold.
func (s *Snapshot) ruleText(rule string) string {
	return ruleTextOf(unix.NFPROTO_INET, []byte(rule), func(name string) []string {
		set := s.sets[name]
		if set == nil || !set.is(unix.NFT_SET_ANONYMOUS) {
			return nil
		}
		var out []string
		for _, e := range set.elements {
			out = append(out, elementText([]byte(set.definition), []byte(e.start), []byte(e.end)))
		}
		return out
	})
}

// diffRules aligns two lists of rules and names those that stand in one only. Two
// of them at one place with one comment are a change.
func diffRules(chain string, is, wanted []string, before, after func(string) string) []Difference {
	place := func(i int, r string) string {
		return fmt.Sprintf("%d of chain %s (%q)", i+1, chain, comment([]byte(r)))
	}
	first := 0
	for first < len(is) && first < len(wanted) && is[first] == wanted[first] {
		first++
	}
	last := 0
	for last < min(len(is), len(wanted))-first && is[len(is)-1-last] == wanted[len(wanted)-1-last] {
		last++
	}
	a, b := is[first:len(is)-last], wanted[first:len(wanted)-last]
	common := commonRules(a, b)
	var out []Difference
	i, k := 0, 0
	for _, c := range append(common, [2]int{len(a), len(b)}) {
		// What both lists hold between two common rules, side by side.
		for ; i < c[0] && k < c[1] && comment([]byte(a[i])) == comment([]byte(b[k])); i, k = i+1, k+1 {
			out = append(out, Difference{"change", "rule", place(first+i, a[i]), before(a[i]), after(b[k])})
		}
		for ; i < c[0]; i++ {
			out = append(out, Difference{"remove", "rule", place(first+i, a[i]), before(a[i]), ""})
		}
		for ; k < c[1]; k++ {
			out = append(out, Difference{"add", "rule", place(first+k, b[k]), "", after(b[k])})
		}
		i, k = c[0]+1, c[1]+1
	}
	return out
}

// commonRules gives a longest common subsequence as pairs of indices. Lists too
// long for the table of it have none: then all of them differ.
func commonRules(a, b []string) [][2]int {
	const most = 1 << 22
	if len(a) == 0 || len(b) == 0 || len(a)*len(b) > most {
		return nil
	}
	width := len(b) + 1
	length := make([]uint16, (len(a)+1)*width)
	for i := len(a) - 1; i >= 0; i-- {
		for k := len(b) - 1; k >= 0; k-- {
			if a[i] == b[k] {
				length[i*width+k] = length[(i+1)*width+k+1] + 1
			} else {
				length[i*width+k] = max(length[(i+1)*width+k], length[i*width+k+1])
			}
		}
	}
	var out [][2]int
	for i, k := 0, 0; i < len(a) && k < len(b); {
		switch {
		case a[i] == b[k]:
			out = append(out, [2]int{i, k})
			i, k = i+1, k+1
		case length[(i+1)*width+k] >= length[i*width+k+1]:
			i++
		default:
			k++
		}
	}
	return out
}

// diffElements names the elements that one set has and the other has not, or has
// with another verdict.
func diffElements(set string, is, wanted *setState, now time.Time) []Difference {
	var out []Difference
	text := func(s *setState, e element) string {
		out := elementText([]byte(s.definition), []byte(e.start), []byte(e.end))
		if !e.until.IsZero() {
			out += " until " + e.until.UTC().Format(time.RFC3339)
		}
		return out
	}
	name := func(s *setState, e element) string {
		what, _, _ := strings.Cut(elementText([]byte(s.definition), []byte(e.start), []byte(e.end)), " : ")
		return what + " of set " + set
	}
	a, b := is.elements, wanted.elements
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(a) > 0 && len(b) > 0 && a[0].same(b[0]):
			a, b = a[1:], b[1:]
		case len(a) > 0 && len(b) > 0 && a[0].key() == b[0].key() && a[0].isEnd() == b[0].isEnd():
			out = append(out, Difference{"change", "element", name(is, a[0]), text(is, a[0]), text(wanted, b[0])})
			a, b = a[1:], b[1:]
		case len(b) == 0 || len(a) > 0 && precedes(a[0], b[0]):
			if !a[0].ending(now) {
				out = append(out, Difference{"remove", "element", name(is, a[0]), text(is, a[0]), ""})
			}
			a = a[1:]
		default:
			if !b[0].ending(now) {
				out = append(out, Difference{"add", "element", name(wanted, b[0]), "", text(wanted, b[0])})
			}
			b = b[1:]
		}
	}
	return out
}

// same reports whether two elements are the same and end together.
func (e element) same(o element) bool {
	near := e.until.IsZero() == o.until.IsZero() && e.until.Sub(o.until).Abs() <= clockSlack
	e.until, o.until = time.Time{}, time.Time{}
	return near && e == o
}

// ending reports whether a ban is over, or so near its end that either answer of the
// kernel is right.
func (e element) ending(now time.Time) bool {
	return !e.until.IsZero() && e.until.Before(now.Add(clockSlack))
}

// precedes is the order of [Snapshot.finish].
func precedes(a, b element) bool {
	if c := strings.Compare(a.key(), b.key()); c != 0 {
		return c < 0
	}
	return a.isEnd() && !b.isEnd()
}

// fillers are the different rules by which packets fill a set, wherever they stand.
func (s *Snapshot) fillers(set string) []string {
	var out []string
	for _, ch := range s.chains {
		for _, r := range ch.rules {
			for _, e := range expressions(attrOf([]byte(r), unix.NFTA_RULE_EXPRESSIONS)) {
				if e.name == "dynset" && attrText(e.data, unix.NFTA_DYNSET_SET_NAME) == set {
					out = append(out, r)
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// meterStays reports whether a meter keeps what it has counted: no rule that fills it
// changed, though they may have moved, and nobody put elements there. Its elements
// carry the limit they were made with, so a changed one must begin anew.
func meterStays(name string, is, wanted *Snapshot) bool {
	a, b := is.sets[name], wanted.sets[name]
	return b != nil && a.is(unix.NFT_SET_EVAL) && a.definition == b.definition && len(a.elements) == 0 && slices.Equal(is.fillers(name), wanted.fillers(name))
}
