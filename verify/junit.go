package verify

import (
	"fmt"
	"html"
	"io"
	"strings"
)

// WriteJUnit writes the report in the XML that CI systems read: a test suite for
// each sweep, one for the views of restricted openings, one for the [[expect]] tables
// and one for the verdict. A finding is a failure; a port of which nothing can be said
// is an error, so that neither passes for success; an [[expect]] that could not be
// probed is skipped.
func (r *Report) WriteJUnit(w io.Writer) error {
	suites := r.junitSuites()
	var total junitSuite
	for _, s := range suites {
		tests, failures, errs, _ := s.counts()
		total.tests += tests
		total.failures += failures
		total.errs += errs
	}
	if err := junitHead(w, &total, r.Seconds); err != nil {
		return err
	}
	var b strings.Builder
	for _, s := range suites {
		s.write(&b, 0)
	}
	b.WriteString("</testsuites>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// junitHead begins a file whose suites have so many cases.
func junitHead(w io.Writer, total *junitSuite, seconds float64) error {
	_, err := fmt.Fprintf(w, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"deadlight\" tests=\"%d\" failures=\"%d\" errors=\"%d\" time=\"%.3f\">\n",
		total.tests, total.failures, total.errs, seconds)
	return err
}

func (s *junitSuite) write(b *strings.Builder, seconds float64) {
	tests, failures, errs, skipped := s.counts()
	fmt.Fprintf(b, "  <testsuite name=\"%s\" tests=\"%d\" failures=\"%d\" errors=\"%d\" skipped=\"%d\" time=\"%.3g\">\n", markup(s.name), tests, failures, errs, skipped, seconds)
	for _, c := range s.cases {
		c.write(b, s.name)
	}
	b.WriteString("  </testsuite>\n")
}

type junitSuite struct {
	name                  string
	cases                 []junitCase
	tests, failures, errs int
}

type junitCase struct {
	name    string
	failure string // what was found; "" is a success
	unknown bool   // the failure is that nothing can be said
	skipped string // why it was not tried; "": it was
	text    string // for who reads on
}

func (s *junitSuite) counts() (tests, failures, errs, skipped int) {
	for _, c := range s.cases {
		switch {
		case c.failure != "" && c.unknown:
			errs++
		case c.failure != "":
			failures++
		case c.skipped != "":
			skipped++
		}
	}
	return len(s.cases), failures, errs, skipped
}

func (c *junitCase) write(b *strings.Builder, suite string) {
	fmt.Fprintf(b, "    <testcase classname=\"%s\" name=\"%s\" time=\"0\">", markup("deadlight."+suite), markup(c.name))
	if c.failure != "" {
		kind := "failure"
		if c.unknown {
			kind = "error"
		}
		fmt.Fprintf(b, "<%s message=\"%s\">%s</%s>", kind, markup(c.failure), markup(c.failure), kind)
	}
	if c.skipped != "" {
		fmt.Fprintf(b, "<skipped message=\"%s\"/>", markup(c.skipped))
	}
	if c.text != "" {
		fmt.Fprintf(b, "<system-out>%s</system-out>", markup(c.text))
	}
	b.WriteString("</testcase>\n")
}

func (r *Report) junitSuites() []*junitSuite {
	var out []*junitSuite
	byName := map[string]*junitSuite{}
	suite := func(name string) *junitSuite {
		if byName[name] == nil {
			byName[name] = &junitSuite{name: name}
			out = append(out, byName[name])
		}
		return byName[name]
	}
	wrong := map[string]bool{}
	for i := range r.Findings {
		f := &r.Findings[i]
		wrong[fmt.Sprint(f.Family, f.Protocol, f.Port)] = true
	}
	for _, key := range sweepKeys {
		states, ok := r.States[key]
		if !ok {
			continue
		}
		s := suite(key)
		for _, o := range r.Openings {
			if o.Protocol+o.Family[len("ipv"):] == key && !wrong[fmt.Sprint(o.Family, o.Protocol, o.Port)] {
				s.cases = append(s.cases, junitCase{name: fmt.Sprintf("%d/%s is reachable: %s, %s", o.Port, o.Protocol, o.Rule, o.State)})
			}
		}
		c := junitCase{name: "ports that nothing lists", text: fmt.Sprintf("open %s\nclosed %s\nrejected %s\nfiltered %s\nunknown %s",
			states.Open, states.Closed, states.Rejected, states.Filtered, states.Unknown)}
		n, sure := 0, false
		for i := range r.Findings {
			if f := &r.Findings[i]; f.sweep() == key && f.Rule == "" && f.Odd == "" {
				n, sure = n+1, sure || f.Observed != Unknown
			}
		}
		if n > 0 {
			c.failure, c.unknown = count(n, "port is", "ports are")+" not as the policy says", !sure
		}
		s.cases = append(s.cases, c)
	}
	for i := range r.Findings {
		f := &r.Findings[i]
		name := fmt.Sprintf("%d/%s", f.Port, f.Protocol)
		if f.Port == 0 && f.Expect != "" {
			name = f.Protocol
		}
		if f.Probe != "" {
			name += fmt.Sprintf(" at %s: %s", f.Address, f.Probe)
		}
		said := fmt.Sprintf("expected %s, observed %s: %s", f.Expected, f.Observed, f.Reason)
		if f.Rule != "" {
			said += fmt.Sprintf(" (%s)", f.Rule)
		}
		if f.Expect != "" {
			said += fmt.Sprintf(", [[expect]] at %s", f.Expect)
		}
		key := f.sweep()
		if key == "" || f.Odd != "" {
			key = "other"
		}
		suite(key).cases = append(suite(key).cases, junitCase{name: name, failure: said, unknown: f.Observed == Unknown})
	}
	for _, v := range r.Restrictions {
		c := junitCase{name: fmt.Sprintf("%s from %s to %s by %s (%s)", v.Rule, v.From, v.To, v.Interface, v.Place)}
		if !v.OK {
			c.failure = fmt.Sprintf("reachable: %s; silent: %s", v.Open, v.Silent)
		}
		suite("restricted").cases = append(suite("restricted").cases, c)
	}
	for i := range r.Expects {
		x := &r.Expects[i]
		c := junitCase{name: fmt.Sprintf("%s: %s is %s", x.Place, x.what(), x.Expected)}
		switch x.Result {
		case expectFailed, expectUnknown:
			c.failure, c.unknown = fmt.Sprintf("observed %s: %s", x.Observed, x.Reason), x.Result == expectUnknown
		case expectUnproved, expectUnprobed:
			c.skipped = x.Result + ": " + x.Reason
		}
		suite("expect").cases = append(suite("expect").cases, c)
	}
	c := junitCase{name: r.Target, text: fmt.Sprintf("seen from %s, proof %s, %s\n%s", r.Vantage, r.Proof, r.conclusionText(), strings.Join(r.Notes, "\n"))}
	if r.Verdict != Pass {
		c.failure, c.unknown = r.conclusionText(), r.Verdict == Inconclusive
	}
	suite("verdict").cases = append(suite("verdict").cases, c)
	return out
}

// sweepKeys are the keys of [Report.States], in the order of reports.
var sweepKeys = [...]string{"tcp4", "tcp6", "udp4", "udp6"}

func (r *Report) conclusionText() string {
	var b strings.Builder
	r.conclusion(&b)
	return strings.TrimSpace(b.String())
}

// markup makes text of a policy or the network harmless in XML and HTML: control
// characters, which XML has no way to write, become U+FFFD.
func markup(s string) string {
	return html.EscapeString(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 || r == 0xfffe || r == 0xffff {
			return '\ufffd'
		}
		return r
	}, strings.ToValidUTF8(s, "\ufffd")))
}

// sweep is the key of [Report.States] that a finding belongs to, or "".
func (f *Finding) sweep() string {
	if len(f.Family) != len("ipv4") {
		return ""
	}
	return f.Protocol + f.Family[len("ipv"):]
}
