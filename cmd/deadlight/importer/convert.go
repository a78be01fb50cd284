package importer

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// convert works out what a policy can say of a ruleset.
func convert(set *ruleset) (*plan, error) {
	p := &plan{sets: set.sets, families: set.families, format: set.format, notes: slices.Clone(set.notes)}
	c := &converter{set: set, plan: p, notes: map[*rule]string{}, used: map[*rule]bool{}}
	input := set.hooked("prerouting", "input")
	var opens, blocks, egress []*table
	echo, dhcp, judged := true, true, false
	for f, known := range set.families {
		v4 := f == 0
		if !known {
			echo, dhcp = false, false
			p.say("%s is not in what was read: the policy opens nothing over it", []string{"IPv4", "IPv6"}[f])
			continue
		}
		judged = true
		o, b, e, d, err := c.incoming(v4, input)
		if err != nil {
			return nil, err
		}
		opens, blocks = append(opens, o...), append(blocks, b...)
		echo, dhcp = echo && e, dhcp && d
	}
	if !judged {
		return nil, fmt.Errorf("nothing in it judges packets")
	}
	p.echo, p.dhcp = &echo, dhcp
	c.incomplete(echo, dhcp)
	opens = c.limited(tidied(opens))
	if err := c.outgoing(&egress); err != nil {
		return nil, err
	}
	c.forwarded()
	c.dead(input)
	c.logging()
	for r, why := range c.notes {
		p.notes = append(p.notes, Note{File: r.place(), Line: r.line, Text: r.text, Reason: why})
	}
	p.tables = append(append(tidied(blocks), opens...), tidied(egress)...)
	sortTables(p.tables)
	nameTables(p.tables)
	sortNotes(p.notes)
	p.notes = slices.Compact(p.notes)
	return p, nil
}

type converter struct {
	set   *ruleset
	plan  *plan
	notes map[*rule]string
	used  map[*rule]bool
	// What the original admits of ping and DHCP, by family.
	echo, dhcp [2]bool
	some       [2]bool // ping, to some only or within a rate
}

func (p *plan) say(format string, args ...any) {
	p.notes = append(p.notes, Note{Reason: fmt.Sprintf(format, args...)})
}

func (c *converter) tell(r *rule, format string, args ...any) {
	if c.notes[r] == "" {
		c.notes[r] = fmt.Sprintf(format, args...)
	}
}

// hooked gives the base chains of some hooks, in the order in which packets meet
// them.
func (s *ruleset) hooked(hooks ...string) []*base {
	var out []*base
	for _, h := range hooks {
		from := len(out)
		for _, b := range s.bases {
			if b.hook == h {
				out = append(out, b)
			}
		}
		slices.SortStableFunc(out[from:], func(a, b *base) int { return a.prio - b.prio })
	}
	return out
}

func boxes(grants []grant, free bool) []box {
	var out []box
	for _, g := range grants {
		if !free || g.limit == nil {
			out = append(out, g.box)
		}
	}
	return out
}

// incoming judges what comes to the host over one family.
func (c *converter) incoming(v4 bool, input []*base) (opens, blocks []*table, echo, dhcp bool, err error) {
	f := 1
	if v4 {
		f = 0
	}
	rejects := c.plan.reject
	first := &walk{set: c.set, v4: v4, state: stNew, denials: []denial{}, rejects: &rejects, used: c.used, notes: c.notes}
	grants, err := first.through(input)
	if err != nil {
		return nil, nil, false, false, err
	}
	c.plan.reject = rejects
	c.admitsReplies(v4, input)

	// A denial that takes nothing from what is admitted in the end may stand as a
	// block, which wins over every opening; the walk then passes over it.
	admitted := boxes(grants, false)
	skip := map[string]bool{}
	var candidates []denial
	for _, d := range first.denials {
		t, lost := express(d.box, nil, v4)
		if t == nil || len(lost) > 0 || !c.mayBlock(t, d, v4) || slices.ContainsFunc(admitted, func(b box) bool { return !b.and(d.box).empty() }) {
			continue
		}
		skip[d.path] = true
		candidates = append(candidates, d)
	}
	if len(candidates) > 0 {
		second := &walk{set: c.set, v4: v4, state: stNew, skip: skip}
		if grants, err = second.through(input); err != nil {
			return nil, nil, false, false, err
		}
	}
	var shut, asBlocks []box
	for _, d := range candidates {
		asBlocks = append(asBlocks, d.box)
	}
	grants = slices.DeleteFunc(grants, func(g grant) bool { return g.within(asBlocks) })
	for _, d := range candidates {
		bites := !d.and(echoBox(v4)).empty()
		for _, g := range grants {
			bites = bites || g.by != nil && !g.by.policy && !universal(g.by, v4) && !g.and(d.box).empty()
		}
		if !bites {
			continue
		}
		shut = append(shut, d.box)
		t, _ := express(d.box, nil, v4)
		t.kind, t.comment, t.by = "block", d.by.comment, []*rule{d.by}
		t.log = logs(d.by)
		blocks = append(blocks, t)
	}

	free := append(boxes(grants, true), shut...)
	echo = echoBox(v4).within(free)
	dhcp = dhcpBox(v4).within(boxes(grants, true))
	c.echo[f], c.dhcp[f] = echo, dhcp
	c.some[f] = !echo && slices.ContainsFunc(grants, func(g grant) bool { return !g.and(echoBox(v4)).empty() })
	covered := append(always(v4), echoBox(v4), dhcpBox(v4)) // what is said of those is said elsewhere
	closed := false
	for _, g := range grants {
		switch {
		case g.by == nil || g.by.policy:
			closed = true
			continue
		case universal(g.by, v4):
			c.tell(g.by, "admits everything that is left: Deadlight closes what no rule names")
			continue
		}
		opens = append(opens, c.open(g, v4, covered)...)
	}
	if closed {
		bit := map[bool]int{true: 1, false: 2}[v4]
		if !slices.ContainsFunc(input, func(b *base) bool { return b.hook == "input" && b.ours&bit != 0 }) {
			c.plan.say("no chain judges what comes in over %s: the original admits everything, and Deadlight closes it", []string{"IPv4", "IPv6"}[f])
		}
		for _, b := range input {
			if b.hook == "input" && b.policy == accept {
				c.plan.notes = append(c.plan.notes, Note{File: b.file, Line: b.line,
					Reason: fmt.Sprintf("chain %s admits by its policy what no rule denies: Deadlight closes it", b.name)})
			}
		}
	}
	return opens, blocks, echo, dhcp, nil
}

// open gives the tables of what a rule admits, and lists the rest.
func (c *converter) open(g grant, v4 bool, covered []box) []*table {
	t, lost := express(g.box, asked(g.by, v4), v4)
	if len(lost) > 0 {
		for _, rest := range g.without(covered) {
			if _, more := express(rest, nil, v4); len(more) > 0 {
				c.tell(g.by, "%s", lost[0])
			}
		}
	}
	if t == nil {
		return nil
	}
	t.kind, t.comment, t.by, t.limit, t.log = "open", g.by.comment, []*rule{g.by}, g.limit, logs(g.by)
	return []*table{t}
}

// asked is the source that a rule names.
func asked(r *rule, v4 bool) addrs {
	f := 1
	if v4 {
		f = 0
	}
	if len(r.on[f]) != 1 {
		return nil
	}
	return r.on[f][0].src
}

// universal reports whether a rule matches everything.
func universal(r *rule, v4 bool) bool {
	f := 1
	if v4 {
		f = 0
	}
	return everything(v4).within(r.on[f])
}

// mayBlock reports whether a denial is worth a table, and can be one.
func (c *converter) mayBlock(t *table, d denial, v4 bool) bool {
	all := everything(v4)
	if d.types != all.types || universal(d.by, v4) {
		return false
	}
	for _, on := range t.on {
		if on.proto == protoICMP || on.proto == protoICMPv6 {
			return false
		}
	}
	return t.from[0] != nil || t.from[1] != nil || t.to[0] != nil || t.to[1] != nil || len(t.devices) > 0 || !t.any
}

// logs reports whether a rule logs what it matches, by itself or through the one
// before it.
func logs(r *rule) bool {
	if r.log {
		return true
	}
	if r.chain == nil {
		return false
	}
	i := slices.Index(r.chain.rules, r)
	return i > 0 && r.chain.rules[i-1].log && r.chain.rules[i-1].verdict == goOn && reflect.DeepEqual(r.chain.rules[i-1].on, r.on)
}

// admitsReplies says so where the original does not admit what Deadlight always
// does.
func (c *converter) admitsReplies(v4 bool, input []*base) {
	w := &walk{set: c.set, v4: v4, state: stEstablished}
	// Later packets of a flow never meet the chains of nat.
	grants, err := w.through(slices.DeleteFunc(slices.Clone(input), func(b *base) bool { return b.nat }))
	if err != nil || !everything(v4).within(boxes(grants, true)) {
		c.plan.say("the original does not admit every answer to what this host began over %s: Deadlight does", []string{"IPv6", "IPv4"}[map[bool]int{true: 1}[v4]])
	}
}

// incomplete lists what of ping and DHCP one family admits and the policy cannot
// say for it alone.
func (c *converter) incomplete(echo, dhcp bool) {
	for f, name := range []string{"IPv4", "IPv6"} {
		if c.echo[f] && !echo {
			c.plan.say("ping is admitted over %s only: [icmp] has one switch for both, so it is off", name)
		}
		if c.some[f] {
			c.plan.say("ping over %s is admitted to some only, or at a rate: [icmp] has one switch for all, so it is off", name)
		}
		if c.dhcp[f] && !dhcp {
			c.plan.say("answers to a DHCP client are admitted over %s only: [dhcp] has one switch for both, so it is off", name)
		}
	}
}

// limited leaves out what would count in more places than the original.
func (c *converter) limited(list []*table) []*table {
	var out []*table
	for i, t := range list {
		leave := false
		for k, o := range list {
			switch {
			case i == k || t.limit == nil || o.limit == nil || apart(t.v, o.v) && t.limit.perSource():
			case t.limit == o.limit || sharesRule(t, o):
				leave = true
			case t.limit.key != "" && t.limit.key == o.limit.key && meet(t, o) && k < i:
				leave = true
			}
		}
		for _, r := range t.by {
			switch {
			case leave:
				c.tell(r, "its limit counts for several openings together, which a policy cannot say: left out")
			case t.limit != nil && t.limit.note != "":
				c.tell(r, "%s", t.limit.note)
			}
		}
		if !leave {
			out = append(out, t)
		}
	}
	return out
}

// meet reports whether somebody may use both tables.
func meet(t, o *table) bool {
	for f := range t.v {
		if !t.v[f] || !o.v[f] {
			continue
		}
		if t.from[f] == nil || o.from[f] == nil || len(t.from[f].and(o.from[f])) > 0 {
			return true
		}
	}
	return false
}

// outgoing makes tables of what may leave, where the original does not let
// everything.
func (c *converter) outgoing(out *[]*table) error {
	bases := c.set.hooked("output")
	judging := slices.DeleteFunc(slices.Clone(bases), func(b *base) bool { return b.nat })
	free := true
	var grants [2][]grant
	for f, known := range c.set.families {
		if !known {
			continue
		}
		rejects := false
		notes := map[*rule]string{}
		w := &walk{set: c.set, v4: f == 0, state: stNew, rejects: &rejects, notes: notes}
		admitted, err := w.through(judging)
		if err != nil {
			return err
		}
		if !everything(f == 0).within(boxes(admitted, true)) {
			free = false
			c.plan.outReject = c.plan.outReject || rejects
			for r, why := range notes {
				c.tell(r, "%s", why)
			}
		}
	}
	if free {
		return nil
	}
	c.plan.output = true
	for f, known := range c.set.families {
		if !known {
			continue
		}
		w := &walk{set: c.set, v4: f == 0, state: stNew, notes: c.notes}
		var err error
		if grants[f], err = w.through(bases); err != nil {
			return err
		}
	}
	for f, known := range c.set.families {
		if !known {
			c.plan.say("what leaves over %s is not in what was read: the policy lets only replies leave", []string{"IPv4", "IPv6"}[f])
			continue
		}
		for _, g := range grants[f] {
			by := g.by
			if by == nil {
				by = &rule{text: "what no rule denies may leave", file: "", line: 0}
			}
			t, lost := express(g.box, nil, f == 0)
			switch {
			case g.limit != nil:
				t, lost = nil, []string{"what leaves has no rate in a policy"}
			case t != nil && t.from[f] != nil:
				t, lost = nil, []string{"what leaves cannot be told by the address of this host"}
			}
			if len(lost) > 0 {
				c.tell(by, "%s", lost[0])
			}
			if t == nil {
				continue
			}
			t.kind, t.comment = "egress", by.comment
			if g.by != nil {
				t.by = []*rule{g.by}
			}
			t.log = g.by != nil && logs(g.by)
			*out = append(*out, t)
		}
	}
	return nil
}

// place is the file of a rule, "" of one that stands in none.
func (r *rule) place() string {
	if r.line == 0 {
		return ""
	}
	return r.file
}

// reachable gives the chains that packets of some base chains may walk, in order.
func (s *ruleset) reachable(bases []*base) []*chain {
	var out []*chain
	var visit func(c *chain)
	visit = func(c *chain) {
		if c == nil || slices.Contains(out, c) {
			return
		}
		out = append(out, c)
		for _, r := range c.rules {
			if r.verdict == jump || r.verdict == goTo {
				visit(s.chains[r.target])
			}
		}
	}
	for _, b := range bases {
		visit(b.chain)
	}
	return out
}

// forwarded lists the rules of what is routed, and of addresses that are
// rewritten.
func (c *converter) forwarded() {
	bases := c.set.hooked("forward")
	shut := false
	for f, known := range c.set.families {
		if !known || len(bases) == 0 {
			continue
		}
		w := &walk{set: c.set, v4: f == 0, state: stNew}
		grants, err := w.through(bases)
		shut = shut || err != nil || !everything(f == 0).within(boxes(grants, true))
	}
	c.plan.forward = shut && !c.set.docker
	if shut && c.set.docker {
		c.plan.say(`routed traffic is filtered by what manages the containers: forward = "ignore" leaves it to that`)
	}
	ours := c.set.reachable(c.set.hooked("prerouting", "input", "output"))
	for _, k := range c.set.reachable(append(bases, c.set.hooked("postrouting")...)) {
		written := slices.DeleteFunc(slices.Clone(k.rules), func(r *rule) bool { return r.line == 0 })
		if len(written) == 0 || slices.Contains(ours, k) {
			continue
		}
		says := slices.IndexFunc(written, func(r *rule) bool {
			switch r.verdict {
			case goOn:
				return !r.log
			case accept:
				return r.states == 0 || r.states&stNew != 0
			}
			return r.verdict != back
		})
		if says < 0 {
			continue // it logs, or admits replies, as Deadlight does
		}
		first := written[says]
		text := first.text
		if n := len(written); n > 1 {
			text += fmt.Sprintf(" … (%s, in chain %s)", count(n, "rule"), k.name)
		}
		c.plan.notes = append(c.plan.notes, Note{File: first.file, Line: first.line, Text: text, Reason: "it is about what is routed or rewritten, which is not imported"})
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// dead lists rules that admit and are never reached.
func (c *converter) dead(input []*base) {
	for _, k := range c.set.reachable(input) {
		for _, r := range k.rules {
			if r.odd != "" && r.line > 0 && r.verdict != accept && r.verdict != goOn && r.verdict != back && c.notes[r] == "" {
				c.tell(r, "wider than the original: this rule denies %s, which Deadlight does not look at", r.odd)
				continue
			}
			if r.verdict != accept || r.odd != "" || r.states != 0 && r.states&stNew == 0 || c.used[r] || c.notes[r] != "" {
				continue
			}
			for f := range r.on {
				outside := slices.ContainsFunc(r.on[f], func(b box) bool { return !b.and(everything(f == 0)).empty() })
				if c.set.families[f] && outside {
					c.tell(r, "never admits anything: earlier rules decide, or nothing leads here")
				}
			}
		}
	}
}

// logging finds the rule that logs what is about to be dropped.
func (c *converter) logging() {
	for _, b := range c.set.hooked("input") {
		for i := len(b.rules) - 1; i >= 0; i-- {
			r := b.rules[i]
			if r.log && (universal(r, true) || universal(r, false)) {
				c.plan.logDropped = &logged{r.limit}
				return
			}
			if !r.log && r.verdict != drop && r.verdict != reject {
				break
			}
		}
	}
}

// tidied makes tables that a policy can have, and as few as there need be.
func tidied(list []*table) []*table {
	var out []*table
	for _, t := range list {
		out = append(out, t.split()...)
	}
	return merge(out)
}

func sortNotes(notes []Note) {
	slices.SortStableFunc(notes, func(a, b Note) int {
		return cmp.Or(strings.Compare(a.File, b.File), a.Line-b.Line, strings.Compare(a.Reason, b.Reason), strings.Compare(a.Text, b.Text))
	})
}
