package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

type planFlags struct {
	state     string
	json, all bool
}

func newPlanCommand(e env) *cobra.Command {
	var f planFlags
	c := &cobra.Command{
		Use:     "plan [POLICY]",
		GroupID: groupApply,
		Short:   "Say what apply would change, and who gains or loses which port",
		Long: `Compares a policy with the table that the kernel holds, and changes nothing.
Above stand the rules that come (+), go (-) or change (~); what neither the policy
nor the last applied one explains was changed by hand. Below stand the ports as
seen from outside, with the processes that listen on them, and what beside
Deadlight bears on the policy (deadlight status --help). It warns of DNS and DHCP
servers that containers and virtual machines would lose, with what to add.

When the kernel holds what was last applied, that policy says who reached a port
before; else the running rules are asked what they do to a stranger.

Exit codes: 0 no change, 1 changes, 2 policy error, 3 could not tell.`,
		Example: "  sudo deadlight plan\n  sudo deadlight plan ./policy.toml --all\n  sudo deadlight plan --json",
		Args:    atMostPolicy,
	}
	dir := stateFlag(c)
	c.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	c.Flags().BoolVar(&f.all, "all", false, "list every difference of the tables, also those that belong to a rule")
	c.RunE = func(_ *cobra.Command, args []string) error {
		f.state = *dir
		return plan(e, policyArg(args), f)
	}
	return c
}

// planJSON is the object of `plan --json`; the text is made from it.
type planJSON struct {
	Schema     int              `json:"schema"`
	Policy     string           `json:"policy"`
	Generation uint32           `json:"generation"`
	Loaded     bool             `json:"loaded"`   // there is a table
	Baseline   string           `json:"baseline"` // who says what was: "applied", "kernel" or "none"
	Rules      []ruleChangeJSON `json:"rules"`
	Changes    []changeJSON     `json:"changes"` // every difference of the tables
	Ports      []portJSON       `json:"ports"`
	Notes      []string         `json:"notes"`
	Lockout    []string         `json:"lockout"` // the caller's own sessions that it would cut
	Ending     []firewall.Flow  `json:"ending"`  // established flows that it would end
	// Guests are the DNS and DHCP servers that guests of a bridge would lose.
	Guests []guestServiceJSON `json:"guests"`
	// Interference is what beside Deadlight bears on the policy.
	Interference []interferenceJSON `json:"interference"`

	shown []changeJSON   // those that no rule of the policy stands for
	rs    *rules.Ruleset // of the policy
}

// Who says what a port was before.
const (
	baseApplied = "applied"
	baseKernel  = "kernel"
	baseNone    = "none"
)

func plan(e env, file string, f planFlags) error {
	g, err := newGuard()
	if err != nil {
		return refused(err, "")
	}
	rs, problems, _, err := parseGuarded(file, g)
	if err != nil {
		return err
	}
	if rs == nil {
		return unusable(e, problems, "nothing planned")
	}
	if err := e.showProblems(problems, ""); err != nil {
		return err
	}
	p, rs, err := planHere(file, f.state, rs)
	if err != nil {
		return hostError(err, "deadlight plan "+file)
	}
	p.Lockout = lockoutNotes(rs)
	if len(g.found) > 0 {
		p.Notes = append(p.Notes, g.text()+": apply refuses it")
	}
	if f.json {
		err = writeJSON(e.stdout, p)
	} else {
		err = forPeople(e, func(w io.Writer) error { return p.print(w, f.all) })
	}
	if err != nil || len(p.Changes) == 0 {
		return err
	}
	return silently(exitFindings)
}

// planHere compares a policy with the network namespace of the calling thread. It
// gives the policy with what is temporary beside it, which apply keeps.
func planHere(file, dir string, rs *rules.Ruleset) (_ *planJSON, _ *rules.Ruleset, err error) {
	h, err := openHost(dir, false)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	p := &planJSON{
		Schema: 1, Policy: file, Baseline: baseApplied,
		Rules: []ruleChangeJSON{}, Changes: []changeJSON{}, Ports: []portJSON{}, Notes: []string{}, Ending: []firewall.Flow{},
		Guests: []guestServiceJSON{}, rs: rs,
	}
	last, old, err := h.lastApplied(p)
	if err != nil {
		return nil, nil, err
	}
	rs, _ = withTemporary(rs, h.temporary(last))
	want, err := firewall.Meant(rs, time.Now())
	if err != nil {
		return nil, nil, err
	}
	beside, err := h.conn.Interference(rs, h.conn.HostFiles())
	if err != nil {
		return nil, nil, err
	}
	p.Interference = interferences(beside)
	// For the large sets of the policy; nothing is sent that the old ones could spare.
	h.conn.Known = firewall.KnownIn(&rs.Table)
	is, changes, err := h.conn.Check(want, firewall.Samples)
	if err != nil {
		return nil, nil, err
	}
	p.Generation, p.Loaded = is.Generation.ID, is.Present
	if len(changes) == 0 {
		return p, rs, nil
	}
	ending, err := h.conn.Ending(rs)
	if err != nil {
		return nil, nil, err
	}
	p.Ending = append(p.Ending, ending...)
	before := &portsBefore{}
	switch {
	case !is.Present && last != nil && last.Namespace.Is(h.here):
		p.Notes = append(p.Notes, "the table that was applied at "+last.Applied.Local().Format(time.DateTime)+" was taken away since")
		fallthrough
	case !is.Present:
		p.Baseline, old = baseNone, nil // of what was applied nothing is in force
	case last == nil || old == nil || len(firewall.Diff(is, last.Snapshot)) > 0:
		p.Baseline = baseKernel
	}
	var who *byJSON
	if last != nil && is.Generation.ID == last.Generation+1 {
		if who, err = h.lastActor(last); err != nil {
			return nil, nil, err
		}
	}
	p.explain(changes, is, want, last, old, rs, who)
	if p.Guests, err = cutGuestsHere(old, rs); err != nil {
		return nil, nil, err
	}
	found, err := listeners()
	if err != nil {
		return nil, nil, err
	}
	was, will := outlooks(old, rs)
	before.was = was
	left := 0
	if p.Baseline == baseKernel {
		p.Ports, left, err = askKernel(h.conn, before, will, found)
	} else {
		p.Ports, err = changedPorts(before, will, found)
	}
	if err != nil {
		return nil, nil, err
	}
	if left > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("the running rules were not asked about %s: too many", plural(left, "packet")))
	}
	if p.Ports == nil {
		p.Ports = []portJSON{}
	}
	return p, rs, nil
}

// lastApplied gives the record of what was last applied here with its ruleset;
// what keeps it from being used is noted.
func (h *host) lastApplied(p *planJSON) (*firewall.Record, *rules.Ruleset, error) {
	last, err := h.state.Settle(h.look, h.here)
	switch {
	case errors.Is(err, firewall.ErrNoState):
		return nil, nil, nil
	case errors.Is(err, firewall.ErrStateDamaged), errors.Is(err, firewall.ErrStateVersion):
		p.Notes = append(p.Notes, "what was last applied cannot be read: "+err.Error())
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	case h.elsewhere(last):
		p.Notes = append(p.Notes, "the state in "+h.state.Dir()+" is of another network namespace and was not used")
		return nil, nil, nil
	}
	if last.OnTrial() {
		is, err := h.look()
		if err != nil {
			return nil, nil, err
		}
		pending, judges, err := h.pending(last, is)
		if err != nil {
			return nil, nil, err
		}
		if pending.Running {
			return nil, nil, stillOnTrial(last, pending.Deadline)
		}
		p.Notes = append(p.Notes, pending.text()+"; apply clears up behind it first")
		if judges == nil {
			return nil, nil, nil
		}
		judges.Snapshot, judges.Generation = last.Snapshot, last.Generation // of the table that is still there
		last = judges
	}
	old, err := h.state.Compile(last)
	if errors.Is(err, firewall.ErrStateDamaged) || errors.Is(err, firewall.ErrStateVersion) {
		p.Notes = append(p.Notes, "the policy that was last applied cannot be read: "+err.Error())
		return last, nil, nil
	}
	return last, old, err
}

// explain fills in the rules and the differences.
func (p *planJSON) explain(changes []firewall.Difference, is, want *firewall.Snapshot, last *firewall.Record, old, rs *rules.Ruleset, who *byJSON) {
	before, after := rulesOf(old), rulesOf(rs)
	known := map[string]bool{}
	was := map[string]written{}
	for _, w := range before {
		known[w.rule], was[w.rule] = true, w
	}
	will := map[string]bool{}
	for _, w := range after {
		known[w.rule], will[w.rule] = true, true
	}
	hand := handiwork(changes, is, want, last)
	raw := map[string]int{}
	for _, d := range changes {
		c := changeOf(d)
		c.Rule = owner(d, known)
		if hand.did(d) {
			c.ByHand, c.By = true, who
		}
		p.Changes = append(p.Changes, c)
		if !c.ByHand {
			raw[c.Rule]++
		}
	}
	for _, w := range after {
		o, there := was[w.rule]
		r := ruleChangeJSON{Action: "change", Rule: w.rule, Before: o.text, After: w.text, File: w.pos.File, Line: w.pos.Line, Raw: raw[w.rule]}
		switch {
		case !there && old == nil && is.Present:
			// Without the old policy: only what the tables say.
			if r.Raw == 0 {
				continue
			}
			if !p.partly(w.rule) {
				r.Action = "add"
			}
		case !there:
			r.Action = "add"
		case o.text == w.text && r.Raw == 0:
			continue
		default:
			r.After += changedSet(w.rule, old, rs)
		}
		if r.Raw == 0 && is.Present && strings.HasPrefix(w.rule, "set ") {
			continue // no rule uses it
		}
		p.Rules = append(p.Rules, r)
	}
	for _, w := range before {
		if !will[w.rule] && (raw[w.rule] > 0 || !strings.HasPrefix(w.rule, "set ")) {
			p.Rules = append(p.Rules, ruleChangeJSON{Action: "remove", Rule: w.rule, Before: w.text, File: w.pos.File, Line: w.pos.Line, Raw: raw[w.rule]})
		}
	}
	for _, c := range p.Changes {
		covered := c.Rule != "" || c.Kind == "table" || c.Kind == "object" || len(p.Rules) > 0 && lookup(firewall.Difference{Kind: c.Kind, Name: c.Name})
		if c.ByHand || !covered {
			p.shown = append(p.shown, c)
		}
	}
	for _, d := range hand.hidden {
		c := changeOf(d)
		c.ByHand, c.By = true, who
		p.Changes, p.shown = append(p.Changes, c), append(p.shown, c)
	}
}

// handMade tells what somebody changed in the kernel from what two policies
// explain.
type handMade struct {
	meant  map[firewall.Difference]int // what they explain, however often; nil: it cannot be told
	hidden []firewall.Difference       // within a chain or a set that is replaced whole
}

func handiwork(changes []firewall.Difference, is, want *firewall.Snapshot, last *firewall.Record) *handMade {
	h := &handMade{}
	if last == nil || !is.Present {
		return h
	}
	h.meant = map[firewall.Difference]int{}
	for _, d := range firewall.Diff(last.Snapshot, want) {
		h.meant[placeless(d)]++
	}
	whole, listed := map[string]bool{}, map[firewall.Difference]bool{}
	for _, d := range changes {
		listed[placeless(d)] = true
		if d.Kind == "chain" || d.Kind == "set" {
			whole[d.Kind+" "+d.Name] = true
		}
	}
	for _, d := range firewall.Diff(is, last.Snapshot) {
		_, inside, ok := strings.Cut(d.Name, " of ")
		if fields := strings.Fields(inside); ok && len(fields) > 1 && !listed[placeless(d)] && whole[fields[0]+" "+fields[1]] {
			h.hidden = append(h.hidden, d)
		}
	}
	return h
}

// did reports whether a difference is somebody's work; each that is explained is
// used up.
func (h *handMade) did(d firewall.Difference) bool {
	if h.meant == nil {
		return false
	}
	d = placeless(d)
	h.meant[d]--
	return h.meant[d] < 0
}

// placeless leaves out where in its chain a rule stands: a rule more above it
// changes that.
func placeless(d firewall.Difference) firewall.Difference {
	if d.Kind == "rule" {
		_, d.Name, _ = strings.Cut(d.Name, " ")
	}
	return d
}

// changedSet says what became of the addresses of a set; of another rule, nothing.
func changedSet(rule string, old, rs *rules.Ruleset) string {
	name, ok := strings.CutPrefix(rule, "set ")
	if !ok || old == nil {
		return ""
	}
	was, is := old.Policy.Set(name), rs.Policy.Set(name)
	if was == nil || is == nil {
		return ""
	}
	return fmt.Sprintf(", %d new, %d gone", missing(is.Ranges, was.Ranges), missing(was.Ranges, is.Ranges))
}

// partly reports whether some of a rule is in the kernel already.
func (p *planJSON) partly(rule string) bool {
	for _, c := range p.Changes {
		if c.Rule == rule && c.Action != "add" {
			return true
		}
	}
	return false
}

// printEnding lists the flows that end.
func printEnding(out io.Writer, flows []firewall.Flow) {
	const most = 20
	if len(flows) == 0 {
		return
	}
	printf(out, "Ends: %s\n", plural(len(flows), "established flow"))
	for i, f := range flows {
		if i == most {
			printf(out, "  and %d more\n", len(flows)-most)
			return
		}
		direction := "from"
		if f.Outbound {
			direction = "to"
		}
		who := "process not known"
		if f.Process != "" {
			who = fmt.Sprintf("%s (pid %d)", f.Process, f.PID)
		}
		printf(out, "  %s %s %s  %s\n", oneLine(fmt.Sprintf("%d/%s at %s", f.Port, f.Protocol, f.Address)), direction,
			netip.AddrPortFrom(f.Peer, f.PeerPort), oneLine(who))
	}
}

// print renders the plan for people.
func (p *planJSON) print(out io.Writer, all bool) error {
	defer func() {
		printInterferences(out, p.Interference)
		printGuests(out, "warning: ", p.Guests, p.rs)
		for _, l := range p.Lockout {
			printf(out, "warning: %s\n", oneLine(l))
		}
		for _, n := range p.Notes {
			printf(out, "note: %s\n", oneLine(n))
		}
	}()
	if len(p.Changes) == 0 {
		printf(out, "No changes: the kernel holds what %s says, generation %d\n", printable(p.Policy), p.Generation)
		return nil
	}
	if p.Loaded {
		printf(out, "table inet %s, generation %d, against %s:\n", rules.TableName, p.Generation, printable(p.Policy))
	} else {
		printf(out, "there is no table inet %s, generation %d; against %s:\n", rules.TableName, p.Generation, printable(p.Policy))
	}
	var n struct{ add, change, remove int }
	count := func(action string) {
		switch action {
		case "add":
			n.add++
		case "remove":
			n.remove++
		default:
			n.change++
		}
	}
	w := newTable(out)
	for _, r := range p.Rules {
		count(r.Action)
		mark := sign(r.Action)
		if mark == "" {
			mark = "~"
		}
		place := rules.Pos{File: r.File, Line: r.Line, Column: 1}
		printf(w, "  %s %s\t%s\t%s:%d\n", mark, oneLine(r.Rule), oneLine(arrow(r.Before, r.After)), oneLine(place.File), place.Line)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, c := range p.shown {
		count(c.Action)
		c.print(out)
	}
	if all {
		printf(out, "In the tables:\n")
		for _, c := range p.Changes {
			c.print(out)
		}
	}
	if len(p.Ports) > 0 {
		printf(out, "Seen from outside:\n")
		if p.Baseline == baseKernel {
			printf(out, "  (before: what the running rules do to a stranger, for they are not what was last applied)\n")
		}
		if err := printPorts(out, p.Ports); err != nil {
			return err
		}
	}
	printEnding(out, p.Ending)
	printf(out, "Plan: %d to add, %d to change, %d to remove\n", n.add, n.change, n.remove)
	return nil
}
