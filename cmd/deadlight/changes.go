package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"deadlight/firewall"
	"deadlight/rules"
)

// The differences between two tables, in the words of the policy: what exists
// only because of an opening belongs to that opening.

// changeJSON is one difference of the tables.
type changeJSON struct {
	Action string  `json:"action"` // add, remove or change: what is done to the kernel; of drift, what was done to it
	Kind   string  `json:"kind"`   // table, chain, rule, set, element, object, flowtable
	Name   string  `json:"name"`
	Before string  `json:"before"`
	After  string  `json:"after"`
	Rule   string  `json:"rule,omitempty"`    // the rule of the policy it belongs to: "open ssh"
	ByHand bool    `json:"by_hand,omitempty"` // neither policy explains it: somebody changed the kernel
	By     *byJSON `json:"by,omitempty"`
}

// byJSON is a process that changed the table.
type byJSON struct {
	PID  uint32 `json:"pid"`
	Comm string `json:"comm"`
}

func changeOf(d firewall.Difference) changeJSON {
	return changeJSON{Action: d.Action, Kind: d.Kind, Name: d.Name, Before: d.Before, After: d.After}
}

// ruleChangeJSON is a rule of the policy that comes, goes or changes.
type ruleChangeJSON struct {
	Action string `json:"action"` // add, remove or change
	Rule   string `json:"rule"`   // "open ssh"
	Before string `json:"before"` // "22/tcp from anywhere"; "": it was not there
	After  string `json:"after"`
	File   string `json:"file"`
	Line   int    `json:"line"`
	Raw    int    `json:"changes"` // how many differences of the tables belong to it
}

// written is a rule of a policy in words.
type written struct {
	rule, text string
	pos        rules.Pos
}

// rulesOf lists the rules of a policy, in file order.
func rulesOf(rs *rules.Ruleset) []written {
	if rs == nil {
		return nil
	}
	var out []written
	p := rs.Policy
	for i := range p.Block {
		t := &p.Block[i].Traffic
		out = append(out, written{"block " + t.Name, what(t) + " " + fromWhere(t) + logged(t), t.Pos})
	}
	for i := range p.Open {
		t := &p.Open[i].Traffic
		out = append(out, written{"open " + t.Name, what(t) + " " + fromWhere(t) + limits(&p.Open[i]) + logged(t), t.Pos})
	}
	if p.Default.Output != rules.Accept {
		for i := range p.Egress {
			g := &p.Egress[i]
			text := what(&g.Traffic) + " " + strings.TrimPrefix(fromWhere(&g.Traffic), "from anywhere ")
			if g.User != "" {
				text += " of user " + g.User
			}
			if g.Group != "" {
				text += " of group " + g.Group
			}
			out = append(out, written{"egress " + g.Name, text + logged(&g.Traffic), g.Pos})
		}
	}
	for i := range p.Sets {
		s := &p.Sets[i]
		out = append(out, written{"set " + s.Name, plural(s.Ranges.Len(), "range") + " of addresses", s.Pos})
	}
	return out
}

func logged(t *rules.Traffic) string {
	if t.Log {
		return ", logged"
	}
	return ""
}

// owner gives the rule of a policy that a part of the table belongs to: chains,
// sets, counters and rules carry its name. known are the rules of both policies.
func owner(d firewall.Difference, known map[string]bool) string {
	for _, part := range strings.FieldsFunc(d.Name, func(r rune) bool { return strings.ContainsRune(" \"'()@,:{}", r) }) {
		if rule := ownerOf(part, known); rule != "" {
			return rule
		}
	}
	// The comment of a rule is the name itself; an element names where it jumps to.
	for _, text := range []string{d.Name, d.Before, d.After} {
		if i := strings.LastIndex(text, `"`); i > 0 {
			if k := strings.LastIndex(text[:i], `"`); k >= 0 && known[text[k+1:i]] {
				return text[k+1 : i]
			}
		}
		if _, chain, ok := strings.Cut(text, "jump "); ok {
			if rule := ownerOf(strings.Trim(chain, " }"), known); rule != "" {
				return rule
			}
		}
	}
	return ""
}

// ownerOf tells the rule from the name of a chain, set, counter or limit.
func ownerOf(name string, known map[string]bool) string {
	for _, kind := range []struct{ prefix, rule string }{
		{"open_", "open "}, {"admit_", "open "}, {"rate_", "open "}, {"block_", "block "}, {"egress_", "egress "}, {"set_", "set "}} {
		rest, ok := strings.CutPrefix(name, kind.prefix)
		if !ok {
			continue
		}
		if known[kind.rule+rest] && kind.rule != "set " { // of a set there is one for each family
			return kind.rule + rest
		}
		rest = rules.SplitName(rest)
		for _, end := range [...]string{"_from4", "_from6", "_except4", "_except6", "_to4", "_to6", "_if", "_until",
			"_rate4", "_rate6", "_conn4", "_conn6", "_4", "_6"} {
			if name, ok := strings.CutSuffix(rest, end); ok && known[kind.rule+name] {
				return kind.rule + name
			}
		}
	}
	return ""
}

// lookup reports whether a part of the table only finds the rules that own
// ports, or serves their limits: it changes whenever they do.
func lookup(d firewall.Difference) bool {
	for _, word := range strings.FieldsFunc(d.Name, func(r rune) bool { return strings.ContainsRune(" \"'()@,:{}", r) }) {
		if slices.Contains([]string{"charge", "charged4", "charged6"}, word) {
			return true
		}
		for _, p := range []string{"tcp", "udp", "sctp", "protocols", "protocol"} {
			rest, ok := strings.CutPrefix(word, p+"_")
			if ok && (rest == "listed" || rest == "everybody" || slices.ContainsFunc([]string{"open", "block", "egress"}, func(kind string) bool {
				return rest == kind || strings.HasPrefix(rest, kind+"_")
			})) {
				return true
			}
		}
	}
	for _, comment := range []string{`("open")`, `("block")`, `("egress")`, `("listed `, `("not for them")`} {
		if d.Kind == "rule" && strings.Contains(d.Name, comment) {
			return true
		}
	}
	return false
}

func sign(action string) string { return map[string]string{"add": "+", "remove": "-"}[action] }

// arrow writes what was and what is.
func arrow(before, after string) string {
	switch {
	case before == after || before == "":
		return after
	case after == "":
		return before
	}
	return before + " → " + after
}

// print writes one difference.
func (c changeJSON) print(w io.Writer) {
	mark := sign(c.Action)
	if mark == "" {
		mark = "~"
	}
	line := c.Kind + " " + strings.TrimSuffix(c.Name, ` ("")`) // of a rule without a comment
	if text := arrow(c.Before, c.After); text != "" && !strings.HasPrefix(c.Name, text+" of set ") {
		line += ": " + text
		if c.Action == "change" && c.Before == c.After {
			line += " (the words are the same, the bytes are not)"
		}
	}
	if c.ByHand {
		line += "  made by hand" + by(c.By)
	}
	printf(w, "  %s %s\n", mark, oneLine(line))
}

func by(b *byJSON) string {
	if b == nil {
		return ""
	}
	return fmt.Sprintf(" by %s (pid %d)", b.Comm, b.PID)
}

// oneLine escapes what could steer a terminal, line ends too.
func oneLine(s string) string { return strings.ReplaceAll(printable(s), "\n", `\n`) }
