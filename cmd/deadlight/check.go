package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/rules"
)

func newCheckCommand(e env) *cobra.Command {
	var asJSON bool
	var warnings string
	c := &cobra.Command{
		Use:     "check [POLICY]",
		GroupID: groupWrite,
		Short:   "Say whether a policy is valid and what it opens",
		Long: `Reads a policy whole, reports every problem at once and lists what it opens.
Nothing is loaded and nothing needs root. POLICY defaults to ` + defaultPolicy + `.`,
		Example: "  deadlight check\n  deadlight check configs/webserver.toml --json",
		Args:    atMostPolicy,
		RunE: func(_ *cobra.Command, args []string) error {
			if warnings != "show" && warnings != "error" {
				return usageError("--warnings=show or --warnings=error", "--warnings takes show or error, not %s", strconv.Quote(warnings))
			}
			file, strict := policyArg(args), warnings == "error"
			if asJSON {
				return checkJSON(e, file, strict)
			}
			return check(e, file, strict)
		},
	}
	c.Flags().StringVar(&warnings, "warnings", "show", "error: a policy with warnings is no good (exit 2)")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func check(e env, file string, strict bool) error {
	rs, problems, err := parsePolicy(file)
	if err != nil {
		return err
	}
	if rs == nil || strict && len(problems) > 0 {
		return unusable(e, problems, "policy not loaded")
	}
	if err := e.showProblems(problems, ""); err != nil {
		return err
	}
	if err := forPeople(e, func(out io.Writer) error { return printPolicy(out, file, rs.Policy) }); err != nil {
		return err
	}
	failed := failing(rs)
	for _, f := range failed {
		printf(e.stderr, "%s: %s\n", printable(f.pos.String()), printable(f.text))
	}
	if len(failed) > 0 {
		printf(e.stderr, "deadlight: %s of %d not as the policy says\n", plural(len(failed), "expectation"), len(rs.Policy.Expect))
		return silently(exitFindings)
	}
	if n := len(rs.Policy.Expect); n > 0 {
		printf(e.stdout, "%s met\n", plural(n, "expectation"))
	}
	return nil
}

// printPolicy says what a policy opens.
func printPolicy(out io.Writer, file string, p *rules.Policy) error {
	printf(out, "%s: valid, %s\n", printable(file), plural(len(p.Open), "opening"))
	w := newTable(out)
	for i := range p.Block {
		b := &p.Block[i]
		printf(w, "  block\t%s\t%q\t%s\n", what(&b.Traffic), b.Name, fromWhere(&b.Traffic))
	}
	for i := range p.Open {
		o := &p.Open[i]
		printf(w, "  open\t%s\t%q\t%s%s\n", what(&o.Traffic), o.Name, fromWhere(&o.Traffic), limits(o))
	}
	if p.Default.Output != rules.Accept {
		for i := range p.Egress {
			g := &p.Egress[i]
			printf(w, "  egress\t%s\t%q\t%s\n", what(&g.Traffic), g.Name, strings.TrimPrefix(fromWhere(&g.Traffic), "from anywhere "))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if p.Default.Observe {
		printf(out, "enforce = false: nothing is dropped, what would be is counted\n")
	}
	printf(out, "Everything else: %s\n", map[rules.Action]string{
		rules.Drop: "dropped, filtered as seen from outside", rules.Reject: "rejected, the sender is told"}[p.Default.Input])
	if p.Default.Output != rules.Accept {
		printf(out, "What leaves unlisted: %s\n", map[rules.Action]string{rules.Drop: "dropped", rules.Reject: "rejected"}[p.Default.Output])
	}
	if !p.ICMP.Echo {
		printf(out, "Echo requests (ping) are not answered\n")
	}
	return nil
}

// unmet is an [[expect]] that does not hold.
type unmet struct {
	pos  rules.Pos
	text string
}

// failing holds every [[expect]] of a policy against the model.
func failing(rs *rules.Ruleset) []unmet {
	var out []unmet
	for _, x := range rs.Policy.Expect {
		p := x.Packet
		p.At = time.Now()
		d := rs.Decide(p)
		if d.Outcome == x.State {
			continue
		}
		by := ""
		if d.Rule != "" {
			by = fmt.Sprintf(" by %s %q (%s)", d.Kind, d.Rule, d.Pos)
		}
		out = append(out, unmet{x.Pos, fmt.Sprintf("expected %s from %s to be %s, but it is %s%s",
			rules.PortName(p.Protocol, p.DstPort), p.Src, x.State, d.Outcome, by)})
	}
	return out
}

// what says in words which ports a rule is about: "22,80/tcp+udp".
func what(t *rules.Traffic) string {
	if t.Any {
		return "everything"
	}
	var parts []string
	for i, on := range t.On {
		if i > 0 && on.Ports != nil && slices.Equal(on.Ports, t.On[i-1].Ports) {
			parts[len(parts)-1] += "+" + on.Protocol.String()
			continue
		}
		var ports []string
		for _, r := range on.Ports {
			ports = append(ports, r.String())
		}
		if on.Ports == nil {
			parts = append(parts, on.Protocol.String())
		} else {
			parts = append(parts, strings.Join(ports, ",")+"/"+on.Protocol.String())
		}
	}
	return strings.Join(parts, " ")
}

// limits says how much of an opening is to be had.
func limits(o *rules.Open) string {
	var out []string
	if r := o.Rate; r != nil {
		per := "all together"
		if r.PerSource {
			per = "a source"
		}
		out = append(out, fmt.Sprintf("%d/%s %s", r.Limit, unit(r.Per), per))
	}
	if o.Connections > 0 {
		out = append(out, plural(o.Connections, "connection")+" a source")
	}
	if !o.Expires.IsZero() {
		out = append(out, "until "+o.Expires.Format(time.RFC3339))
	}
	if len(out) == 0 {
		return ""
	}
	return ", " + strings.Join(out, ", ")
}

func unit(d time.Duration) string {
	return map[time.Duration]string{time.Second: "second", time.Minute: "minute", time.Hour: "hour", 24 * time.Hour: "day"}[d]
}

// fromWhere says in words whom, and which of our addresses, a rule is about.
func fromWhere(t *rules.Traffic) string {
	from := "from anywhere"
	if !t.From.Any {
		from = "from " + t.From.String()
	}
	if except := t.Except.String(); except != "" {
		from += " except " + except
	}
	if to := t.To.String(); to != "" && !t.To.Any {
		from += " to " + to
	}
	if t.Family != rules.Both {
		from += " (" + t.Family.String() + ")"
	}
	if len(t.Interfaces) > 0 {
		from += " by " + strings.Join(t.Interfaces, ", ")
	}
	return from
}

// checked is the object of `check --json`.
type checked struct {
	Schema   int             `json:"schema"`
	OK       bool            `json:"ok"`
	Problems []rules.Problem `json:"problems"`
	Opens    []openJSON      `json:"opens"`
	Unmet    []unmetJSON     `json:"unmet"` // [[expect]] tables that do not hold
}

// openJSON is one opening of `check --json`.
type openJSON struct {
	Port       string   `json:"port"` // "443" or "6000-6010"; "*" of a protocol without ports
	Protocol   string   `json:"protocol"`
	Family     string   `json:"family"` // ipv4, ipv6 or both
	Rule       string   `json:"rule"`
	From       []string `json:"from"` // prefixes, ranges and @sets
	Except     []string `json:"except,omitempty"`
	To         []string `json:"to,omitempty"`
	Interfaces []string `json:"interfaces"` // "*" is every interface
	Limited    bool     `json:"limited,omitempty"`
}

func checkJSON(e env, file string, strict bool) error {
	rs, problems, err := parsePolicy(file)
	if err != nil {
		return err
	}
	out := checked{1, rs != nil && !(strict && len(problems) > 0), append([]rules.Problem{}, problems...), []openJSON{}, []unmetJSON{}}
	if rs != nil {
		for i := range rs.Policy.Open {
			out.Opens = append(out.Opens, opensOf(&rs.Policy.Open[i])...)
		}
		for _, f := range failing(rs) {
			out.Unmet = append(out.Unmet, unmetJSON{f.pos.File, f.pos.Line, f.text})
			out.OK = false
		}
	}
	if err := writeJSON(e.stdout, out); err != nil {
		return err
	}
	switch {
	case rs == nil || strict && len(problems) > 0:
		return silently(exitUsage)
	case len(out.Unmet) > 0:
		return silently(exitFindings)
	}
	return nil
}

// unmetJSON is an [[expect]] table that does not hold.
type unmetJSON struct {
	File string `json:"file"`
	Line int    `json:"line"`
	Text string `json:"text"`
}

func opensOf(o *rules.Open) []openJSON {
	from := []string{}
	if o.From.Any {
		if o.Family.Has(true) {
			from = append(from, "0.0.0.0/0")
		}
		if o.Family.Has(false) {
			from = append(from, "::/0")
		}
	}
	from = append(from, addresses(&o.From)...)
	interfaces := slices.Clone(o.Interfaces)
	if len(interfaces) == 0 {
		interfaces = []string{"*"}
	}
	var out []openJSON
	add := func(port, protocol string) {
		out = append(out, openJSON{
			Port: port, Protocol: protocol, Family: o.Family.String(), Rule: o.Name, From: from,
			Except: addresses(&o.Except), To: addresses(&o.To), Interfaces: interfaces, Limited: o.Limited(),
		})
	}
	if o.Any {
		add("*", "any")
	}
	for _, on := range o.On {
		if on.Ports == nil {
			add("*", on.Protocol.String())
		}
		for _, r := range on.Ports {
			add(r.String(), on.Protocol.String())
		}
	}
	return out
}

// addresses lists a source for machines.
func addresses(s *rules.Source) []string {
	var out []string
	for _, r := range s.Ranges {
		out = append(out, r.String())
	}
	for _, name := range s.Sets {
		out = append(out, "@"+name)
	}
	return out
}
