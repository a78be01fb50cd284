package firewall

import (
	"fmt"
	"slices"
	"time"
)

// Difference is one way in which two tables differ.
type Difference struct {
	Action string // "add": wanted but absent; "remove": there but not wanted; "change"
	Kind   string // "table", "chain", "rule", "set", "element", "object", "flowtable"
	Name   string // for a rule: its place and comment
	Before string
	After  string
}

// String gives a line for people.
func (d Difference) String() string {
	return map[string]string{"add": "missing", "remove": "unexpected", "change": "different"}[d.Action] + " " + d.Kind + " " + d.Name
}

// clockSlack is how far two deadlines may lie apart and still be one: the kernel
// counts down in its own ticks, and reading takes time.
const clockSlack = 2 * time.Second

// Diff lists what separates the table that is from the table that is wanted.
// Equal tables give nil.
func Diff(is, wanted *Snapshot) []Difference {
	if is.Present != wanted.Present {
		action := "add"
		if is.Present {
			action = "remove"
		}
		return []Difference{{action, "table", "inet deadlight", "", ""}}
	}
	var out []Difference
	if is.table != wanted.table {
		out = append(out, Difference{"change", "table", "inet deadlight", "", ""})
	}
	out = append(out, diffMaps("chain", is.chains, wanted.chains, func(name string, a, b chainState) []Difference {
		var out []Difference
		if a.definition != b.definition {
			out = append(out, Difference{"change", "chain", name, "", ""})
		}
		return append(out, diffRules(name, a.rules, b.rules)...)
	})...)
	out = append(out, diffMaps("set", is.sets, wanted.sets, func(name string, a, b setState) []Difference {
		if a.definition != b.definition {
			return []Difference{{"change", "set", name, "", ""}}
		}
		if a.first.Sub(b.first).Abs() > clockSlack || a.last.Sub(b.last).Abs() > clockSlack {
			return []Difference{{"change", "set", name, "", ""}} // it ends at another time
		}
		return diffElements(name, a.elements, b.elements)
	})...)
	out = append(out, diffMaps("object", is.objects, wanted.objects, func(name string, a, b objectState) []Difference {
		if a != b {
			return []Difference{{"change", "object", name, "", ""}}
		}
		return nil
	})...)
	return append(out, diffMaps("flowtable", is.flowtables, wanted.flowtables, func(string, string, string) []Difference { return nil })...)
}

func diffMaps[V any](kind string, is, wanted map[string]V, both func(string, V, V) []Difference) []Difference {
	var out []Difference
	for _, name := range sortedKeys(wanted) {
		if v, ok := is[name]; ok {
			out = append(out, both(name, v, wanted[name])...)
		} else {
			out = append(out, Difference{"add", kind, name, "", ""})
		}
	}
	for _, name := range sortedKeys(is) {
		if _, ok := wanted[name]; !ok {
			out = append(out, Difference{"remove", kind, name, "", ""})
		}
	}
	return out
}

func diffRules(chain string, is, wanted []ruleState) []Difference {
	if slices.Equal(is, wanted) {
		return nil
	}
	var out []Difference
	for i := range max(len(is), len(wanted)) {
		place := func(r ruleState) string { return fmt.Sprintf("%d of chain %s (%q)", i+1, chain, r.comment) }
		switch {
		case i >= len(is):
			out = append(out, Difference{"add", "rule", place(wanted[i]), "", ""})
		case i >= len(wanted):
			out = append(out, Difference{"remove", "rule", place(is[i]), "", ""})
		case is[i] != wanted[i]:
			out = append(out, Difference{"change", "rule", place(is[i]), "", ""})
		}
	}
	return out
}

func diffElements(set string, is, wanted []string) []Difference {
	var out []Difference
	i, k := 0, 0
	for i < len(is) || k < len(wanted) {
		switch {
		case k == len(wanted) || i < len(is) && is[i] < wanted[k]:
			out = append(out, Difference{"remove", "element", "of set " + set, "", ""})
			i++
		case i == len(is) || is[i] > wanted[k]:
			out = append(out, Difference{"add", "element", "of set " + set, "", ""})
			k++
		default:
			i, k = i+1, k+1
		}
	}
	return out
}
