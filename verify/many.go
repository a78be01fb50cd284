package verify

// What a run over many hosts keeps of each, and the summary made of that. Nothing
// here grows with the number of hosts but what is written.

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Brief is the report of one host of many. Findings that differ only in their port
// are one.
type Brief struct {
	Name    string  `json:"name"`   // the first address where the host was given none
	Target  string  `json:"target"` // its addresses
	Policy  string  `json:"policy"`
	Verdict Verdict `json:"verdict"`
	// Why tells in a line why nothing can be said, where that is the verdict.
	Why     string    `json:"why,omitempty"`
	Ended   time.Time `json:"ended"`   // when the host was done
	Vantage string    `json:"vantage"` // "" where no address could be reached
	// Bound is the largest probability that any TCP answer of this host was missed.
	Bound    float64           `json:"bound"`
	Seconds  float64           `json:"seconds"` // hosts that are probed at once share the time
	Probes   uint64            `json:"probes"`
	Counts   Counts            `json:"counts"`  // over the sweeps of all ports
	States   map[string]States `json:"states"`  // by tcp4, tcp6, udp4 and udp6, what was probed
	Expects  []Expected        `json:"expects"` // the [[expect]] tables of the policy
	Findings []BriefFinding    `json:"findings"`
	Notes    []string          `json:"notes"` // what the verdict does not cover
}

// BriefFinding is ports that are not as the policy says, or of which nothing can be
// said (observed "unknown"), all for the same reason.
type BriefFinding struct {
	Family   string `json:"family"`
	Address  string `json:"address"`
	Protocol string `json:"protocol"`
	Ports    string `json:"ports"` // "1-21,23"
	Count    int    `json:"count"` // of findings
	Probe    string `json:"probe"`
	Expected string `json:"expected"`
	Observed State  `json:"observed"`
	Reason   string `json:"reason"`
	Rule     string `json:"rule"` // that should admit it, or ""
	// Odd is the kind of adversarial probe: "xmas from port 53".
	Odd string `json:"odd,omitempty"`
	// Expect is the place of the [[expect]] that says so, or places.
	Expect string `json:"expect,omitempty"`
}

// Brief folds the report of a host that has a name and a policy.
func (r *Report) Brief(name, policy string, ended time.Time) *Brief {
	b := &Brief{
		Name: name, Target: r.Target, Policy: policy, Verdict: r.Verdict, Ended: ended, Vantage: r.Vantage, Bound: r.Bound,
		Seconds: r.Seconds, Probes: r.Probes, Counts: r.Counts, States: r.States, Expects: r.Expects, Findings: []BriefFinding{}, Notes: r.Notes,
	}
	at := map[BriefFinding]int{}
	var ports [][]uint16
	for i := range r.Findings {
		f := &r.Findings[i]
		key := BriefFinding{
			Family: f.Family, Address: f.Address, Protocol: f.Protocol, Probe: f.Probe, Expected: f.Expected,
			Observed: f.Observed, Reason: f.Reason, Rule: f.Rule, Odd: f.Odd, Expect: f.Expect,
		}
		n, ok := at[key]
		if !ok {
			n = len(b.Findings)
			at[key] = n
			b.Findings, ports = append(b.Findings, key), append(ports, nil)
		}
		b.Findings[n].Count++
		ports[n] = append(ports[n], f.Port)
	}
	for i := range b.Findings {
		b.Findings[i].Ports = Ranges(union(nil, ports[i]))
	}
	if r.Verdict == Inconclusive {
		b.Why = r.why()
	}
	return b
}

// why is the first reason that keeps a report from telling.
func (r *Report) why() string {
	for _, of := range []string{"not probed: ", "probes to ", " has no canary: "} {
		for _, n := range r.Notes {
			if strings.Contains(n, of) {
				return strings.TrimPrefix(n, "not probed: ")
			}
		}
	}
	for i := range r.Findings {
		if f := &r.Findings[i]; f.Reason == PathNotProven.String() {
			return "no canary answers from " + f.Address + ": the path was not proven alive, so silence proves nothing"
		}
	}
	for _, of := range []string{"too much was lost ", "not judged: ", "answers over UDP from "} {
		for _, n := range r.Notes {
			if strings.HasPrefix(n, of) {
				return n
			}
		}
	}
	return r.conclusionText()
}

// wrong counts the findings of which something can be said.
func (b *Brief) wrong() int {
	n := 0
	for i := range b.Findings {
		if f := &b.Findings[i]; f.Observed != Unknown {
			n += f.Count
		}
	}
	return n
}

// title names a host to people.
func (b *Brief) title() string {
	if first, _, _ := strings.Cut(b.Target, ","); b.Name == first {
		return b.Target
	}
	return fmt.Sprintf("%s (%s)", b.Name, b.Target)
}

// HostCounts counts hosts by their verdict.
type HostCounts struct {
	Pass         int `json:"pass"`
	Fail         int `json:"fail"`
	Inconclusive int `json:"inconclusive"`
}

// Many is what a run over many hosts showed. The JSON form has the hosts in the
// order in which they were given.
type Many struct {
	Schema int `json:"schema"` // 1
	// Verdict is fail if any host fails, else inconclusive if any is, else pass.
	Verdict  Verdict    `json:"verdict"`
	Hosts    HostCounts `json:"hosts"`
	Policies int        `json:"policies"`
	Findings int        `json:"findings"` // ports that are not as a policy says, over all hosts
	// Bound is the largest probability that any TCP answer of any host was missed
	// whose path was proven alive; 1 if no path was.
	Bound   float64   `json:"bound"`
	Seconds float64   `json:"seconds"`
	Probes  uint64    `json:"probes"` // packets
	Began   time.Time `json:"began"`
	// Resumed counts the hosts that an earlier, interrupted run had done.
	Resumed int     `json:"resumed"`
	Targets []Brief `json:"targets"`

	each Briefs
}

// Briefs hands out the reports of a run, in order, as often as it is called.
type Briefs func(fn func(*Brief) error) error

// Summarize makes the summary of a run.
func Summarize(each Briefs) (*Many, error) {
	m := &Many{Schema: 1, Targets: []Brief{}, each: each}
	policies, alive := map[string]bool{}, false
	err := each(func(b *Brief) error {
		switch b.Verdict {
		case Pass:
			m.Hosts.Pass++
		case Fail:
			m.Hosts.Fail++
		default:
			m.Hosts.Inconclusive++
		}
		policies[b.Policy] = true
		m.Findings += b.wrong()
		m.Seconds += b.Seconds
		m.Probes += b.Probes
		if b.Bound < 1 { // else it calls no port filtered
			m.Bound += b.Bound
			alive = true
		}
		return nil
	})
	switch {
	case m.Hosts.Fail > 0:
		m.Verdict = Fail
	case m.Hosts.Inconclusive > 0:
		m.Verdict = Inconclusive
	}
	if !alive {
		m.Bound = 1
	}
	m.Bound, m.Policies = min(m.Bound, 1), len(policies)
	return m, err
}

// Each hands out the reports of the hosts, in order.
func (m *Many) Each(fn func(*Brief) error) error { return m.each(fn) }

// of calls fn with the hosts of a verdict.
func (m *Many) of(v Verdict, fn func(*Brief) error) error {
	return m.each(func(b *Brief) error {
		if b.Verdict != v {
			return nil
		}
		return fn(b)
	})
}

// mostLines bounds what the text says of one host.
const mostLines = 5

// WriteText writes the summary for people: hosts that fail first, then those of
// which nothing can be said; those that pass are a number.
func (m *Many) WriteText(w io.Writer) error {
	var text strings.Builder
	flush := func() error {
		_, err := io.WriteString(w, text.String())
		text.Reset()
		return err
	}
	if err := m.of(Fail, func(b *Brief) error {
		fmt.Fprintf(&text, "  FAIL  %s: %s against %s\n", visible(b.title()), count(b.wrong(), "finding", "findings"), visible(b.Policy))
		b.lines(&text)
		return flush()
	}); err != nil {
		return err
	}
	if err := m.of(Inconclusive, func(b *Brief) error {
		fmt.Fprintf(&text, "  ?     %s: %s\n", visible(b.title()), visible(b.Why))
		return flush()
	}); err != nil {
		return err
	}
	if n := m.Hosts.Pass; n > 0 && m.Verdict != Pass { // else the last line says it
		fmt.Fprintf(&text, "  ok    %s\n", count(n, "host is as its policy says", "hosts are as their policies say"))
	}
	if m.Resumed > 0 {
		fmt.Fprintf(&text, "  note  %s done by a run that was interrupted; the first probe was sent at %s\n",
			count(m.Resumed, "host was", "hosts were"), m.Began.Local().Format("2006-01-02 15:04:05"))
	}
	m.conclusion(&text)
	return flush()
}

// lines tells the findings of a host, the certain ones first, as the report has them.
func (b *Brief) lines(text *strings.Builder) {
	w := tabwriter.NewWriter(text, 0, 8, 2, ' ', 0)
	for i := range b.Findings {
		f := &b.Findings[i]
		if i == mostLines {
			break
		}
		rule, odd := "", ""
		if f.Rule != "" {
			rule = fmt.Sprintf(", %q", f.Rule)
		}
		if f.Odd != "" {
			odd = " to " + f.Odd
		}
		// Another machine may have written them.
		fmt.Fprintf(w, "          %s/%s\t%s\texpected %s%s\t%s%s\tat %s\n", visible(shorten(f.Ports, 60)), visible(f.Protocol), f.Observed,
			visible(f.Expected), rule, visible(f.Reason), visible(odd), visible(f.Address))
	}
	w.Flush() // into a strings.Builder: cannot fail
	if n := len(b.Findings) - mostLines; n > 0 {
		fmt.Fprintf(text, "          …  and %s; --json lists every one\n", count(n, "more line", "more lines"))
	}
}

// conclusion is the last line.
func (m *Many) conclusion(text *strings.Builder) {
	took := time.Duration(m.Seconds * float64(time.Second)).Round(100 * time.Millisecond)
	all := m.Hosts.Pass + m.Hosts.Fail + m.Hosts.Inconclusive
	end := fmt.Sprintf("%s, %s", took, count(int(min(m.Probes, math.MaxInt)), "packet", "packets"))
	if m.Bound < 1 {
		end += fmt.Sprintf("; chance that a TCP answer was missed ≤ %.0e", m.Bound)
	}
	unsure := ""
	if m.Hosts.Inconclusive > 0 {
		unsure = fmt.Sprintf(", nothing can be said of %s", thousands(m.Hosts.Inconclusive))
	}
	switch m.Verdict {
	case Pass:
		fmt.Fprintf(text, "PASS: %s; %s\n", count(all, "host is as its policy says", "hosts are as their policies say"), end)
	case Fail:
		fmt.Fprintf(text, "FAIL: %s in %s of %s%s; %s\n", count(m.Findings, "finding", "findings"), thousands(m.Hosts.Fail), count(all, "host", "hosts"), unsure, end)
	default:
		fmt.Fprintf(text, "INCONCLUSIVE: nothing can be said of %s of %s; %s\n", thousands(m.Hosts.Inconclusive), count(all, "host", "hosts"), end)
	}
}

// visible makes what a terminal would obey a sign of its own.
func visible(s string) string {
	return strings.Map(func(r rune) rune {
		if strconv.IsPrint(r) {
			return r
		}
		return '\ufffd'
	}, s)
}

// WriteJSON writes one object, host by host.
func (m *Many) WriteJSON(w io.Writer) error {
	head, err := encode(m, "")
	if err != nil {
		return err
	}
	// Targets is the last field and empty here: the hosts are put between its brackets.
	head, ok := strings.CutSuffix(head, "[]\n}")
	if !ok {
		return errors.New("targets is not the last field")
	}
	if _, err := io.WriteString(w, head+"["); err != nil {
		return err
	}
	between := "\n    "
	if err := m.each(func(b *Brief) error {
		text, err := encode(b, "    ")
		if err == nil {
			_, err = io.WriteString(w, between+text)
		}
		between = ",\n    "
		return err
	}); err != nil {
		return err
	}
	_, err = io.WriteString(w, "\n  ]\n}\n")
	return err
}

func encode(v any, prefix string) (string, error) {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent(prefix, "  ")
	err := e.Encode(v)
	return strings.TrimSuffix(b.String(), "\n"), err
}

// WriteJUnit writes a test suite a host: a finding is a failure, what nothing can be
// said of an error, and the verdict is the last case of each.
func (m *Many) WriteJUnit(w io.Writer) error {
	var total junitSuite
	if err := m.each(func(b *Brief) error {
		tests, failures, errs, _ := b.junit().counts()
		total.tests, total.failures, total.errs = total.tests+tests, total.failures+failures, total.errs+errs
		return nil
	}); err != nil {
		return err
	}
	if err := junitHead(w, &total, m.Seconds); err != nil {
		return err
	}
	if err := m.each(func(b *Brief) error {
		var text strings.Builder
		b.junit().write(&text, b.Seconds)
		_, err := io.WriteString(w, text.String())
		return err
	}); err != nil {
		return err
	}
	_, err := io.WriteString(w, "</testsuites>\n")
	return err
}

// junit is the test suite of a host.
func (b *Brief) junit() *junitSuite {
	s := &junitSuite{name: b.title()}
	for i := range b.Findings {
		f := &b.Findings[i]
		said := fmt.Sprintf("expected %s, observed %s: %s", f.Expected, f.Observed, f.Reason)
		if f.Rule != "" {
			said += fmt.Sprintf(" (%s)", f.Rule)
		}
		name := fmt.Sprintf("%s/%s", shorten(f.Ports, 200), f.Protocol)
		if f.Probe != "" {
			name += fmt.Sprintf(" at %s: %s", f.Address, f.Probe)
		}
		s.cases = append(s.cases, junitCase{name: name, failure: said, unknown: f.Observed == Unknown})
	}
	var text []string
	for _, key := range sweepKeys {
		if x, ok := b.States[key]; ok {
			text = append(text, fmt.Sprintf("%s: open %s; closed %s; rejected %s; filtered %s; unknown %s", key, x.Open, x.Closed, x.Rejected, x.Filtered, x.Unknown))
		}
	}
	c := junitCase{name: "the host is as " + b.Policy + " says", text: strings.Join(slices.Concat(text, b.Notes), "\n")}
	switch b.Verdict {
	case Fail:
		c.failure = count(b.wrong(), "finding", "findings")
	case Inconclusive:
		c.failure, c.unknown = b.Why, true
	}
	s.cases = append(s.cases, c)
	return s
}
