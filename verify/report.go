package verify

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"text/tabwriter"
	"time"

	"deadlight/rules"
)

// Report is what a run showed, held against the policy. Its JSON form is what
// scripts rely on; the text is made from it.
type Report struct {
	Schema  int     `json:"schema"` // 1
	Verdict Verdict `json:"verdict"`
	Target  string  `json:"target"`
	Vantage string  `json:"vantage"`
	// Unenforced says that the policy has enforce = false: it drops nothing, and the
	// verdict is never "pass".
	Unenforced bool `json:"unenforced,omitempty"`
	// Proof is "host" when a tripwire on the host recorded what passed, else
	// "packets".
	Proof string `json:"proof"`
	// Bound is the largest probability that any TCP answer was missed.
	Bound   float64 `json:"bound"`
	Seconds float64 `json:"seconds"`
	Probes  uint64  `json:"probes"`
	Counts  Counts  `json:"counts"` // over the sweeps of all ports
	// States has the keys tcp4, tcp6, udp4 and udp6; a family or protocol that
	// was not probed is left out.
	States map[string]States `json:"states"`
	// Openings are the ports of the sweeps that the policy lists, as they were found.
	Openings []Opening `json:"openings"`
	// Restrictions are the views from inside, at the edge of and beside what
	// openings are restricted to.
	Restrictions []Restriction `json:"restrictions"`
	// Expects are the [[expect]] tables of the policy, as they were found.
	Expects  []Expected `json:"expects"`
	Findings []Finding  `json:"findings"`
	// Odd tells of the adversarial probes; nil where none were sent.
	Odd *OddProbes `json:"odd,omitempty"`
	// Listeners is set when the host was ours to start listeners on.
	Listeners *Listening `json:"listeners,omitempty"`
	// Notes tell what the verdict does not cover.
	Notes []string `json:"notes"`
	// Since is what changed from an older report, where one was given.
	Since *Since `json:"since,omitempty"`

	ports int  // judged in sweeps
	exact bool // the tripwire saw every probe arrive
	views int  // of restricted rules

	listed []rules.Protocol // other than TCP and UDP, that were judged
	swept  []Swept
}

// Listening counts the listeners of a throw-away host.
type Listening struct {
	ListedTCP   int `json:"listed_tcp"`
	ListedUDP   int `json:"listed_udp"`
	UnlistedTCP int `json:"unlisted_tcp"`
	UnlistedUDP int `json:"unlisted_udp"`
}

// Counts counts ports by state.
type Counts struct {
	Open     int `json:"open"`
	Closed   int `json:"closed"`
	Rejected int `json:"rejected"`
	Filtered int `json:"filtered"`
	Unknown  int `json:"unknown"`
}

func (c *Counts) of(s State) *int {
	return [...]*int{&c.Unknown, &c.Open, &c.Closed, &c.Rejected, &c.Filtered}[s]
}

// States lists the ports in each state as ranges: "1-21,23-79".
type States struct {
	Open     string `json:"open"`
	Closed   string `json:"closed"`
	Rejected string `json:"rejected"`
	Filtered string `json:"filtered"`
	Unknown  string `json:"unknown"`
}

// Opening is a listed port of a sweep.
type Opening struct {
	Family   string `json:"family"`
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port"`
	Rule     string `json:"rule"`
	State    State  `json:"state"`
}

// Restriction is what one source on one interface was shown of a rule.
type Restriction struct {
	Rule      string `json:"rule"`
	Interface string `json:"interface"`
	From      string `json:"from"`
	To        string `json:"to"`
	Place     string `json:"place"` // inside, edge or beside
	Open      string `json:"open"`  // reachable ports: "22/tcp,53/udp"
	Silent    string `json:"silent"`
	OK        bool   `json:"ok"`
}

// Finding is a port that is not as the policy says, or of which nothing can be
// said (observed "unknown").
type Finding struct {
	Family    string `json:"family"`  // ipv4 or ipv6
	Address   string `json:"address"` // the probed one
	Protocol  string `json:"protocol"`
	Port      uint16 `json:"port"`
	Probe     string `json:"probe"` // "syn from 203.0.113.78 by eth0"
	Expected  string `json:"expected"`
	Observed  State  `json:"observed"`
	Reason    string `json:"reason"`
	Rule      string `json:"rule"` // that should admit it, or ""
	Interface string `json:"interface,omitempty"`
	Odd       string `json:"odd,omitempty"` // the kind of adversarial probe: "xmas from port 53"
	// Expect is the place of the [[expect]] that says so, or places: "policy.toml:41".
	Expect string `json:"expect,omitempty"`

	source string
}

// MarshalJSON gives the lower-case word.
func (s State) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// MarshalJSON gives the lower-case word.
func (v Verdict) MarshalJSON() ([]byte, error) { return json.Marshal(v.String()) }

// JudgeConfig is what [Judge] needs besides what was seen.
type JudgeConfig struct {
	Target, Vantage string
	Rules           *rules.Ruleset
	Views           []View
	// HostProof, if not nil, is what a tripwire on the host recorded.
	HostProof *HostProof

	odd     *odd // nil: no odd probes
	unasked []unasked
}

// HostProof is a tripwire's record of a run.
type HostProof struct {
	Arrived map[rules.Protocol]map[uint16]uint64 // packets by source port
	Passed  map[Passage]bool                     // behind the last input and forward chain
	Gate    map[Passage]bool                     // behind the gate

	odd *oddProof // of the odd probes; nil: they had no witness
}

// Judge holds what a sweep showed against the policy.
func Judge(cfg JudgeConfig, res *Result) *Report {
	r := &Report{
		Schema: 1, Target: cfg.Target, Vantage: cfg.Vantage, Proof: "packets", Bound: res.Bound,
		Seconds: res.Elapsed.Seconds(), Probes: res.Probes, States: map[string]States{},
		Openings: []Opening{}, Restrictions: []Restriction{}, Expects: []Expected{}, Findings: []Finding{}, Notes: []string{},
	}
	if cfg.HostProof != nil {
		r.Proof = "host"
	}
	j := judge{cfg: cfg, res: res, report: r, either: map[string][]uint16{}, limited: map[string][]uint16{}, admitted: map[string]bool{}, silent: map[string][]uint16{}}
	for i := range cfg.Views {
		j.view(&cfg.Views[i], &res.Paths[i])
		if j.inexact || cfg.HostProof == nil {
			j.stray = union(j.stray, res.Paths[i].Stray)
		}
		if err := res.Paths[i].Err; err != nil {
			if note := fmt.Sprintf("probes to %s did not leave: %v", cfg.Views[i].Path.Dst, err); !slices.Contains(r.Notes, note) {
				r.Notes = append(r.Notes, note)
			}
		}
		switch v := &cfg.Views[i]; {
		case v.Sweep:
			r.swept = append(r.swept, Swept{v.In, v.Path.Src, v.Path.Dst})
		case len(v.Shows) > 0:
			r.views++
		}
	}
	j.neverAdmitted()
	if cfg.odd != nil {
		j.odd(cfg.odd, res)
	}
	r.Notes = append(r.Notes, j.notes()...)
	j.unasked()
	r.exact = cfg.HostProof != nil && !j.inexact
	sort.SliceStable(r.Findings, func(a, b int) bool {
		x, y := &r.Findings[a], &r.Findings[b]
		if (x.Observed == Unknown) != (y.Observed == Unknown) {
			return y.Observed == Unknown
		}
		if x.Port != y.Port {
			return x.Port < y.Port
		}
		return x.Protocol < y.Protocol
	})
	for _, f := range r.Findings {
		if f.Observed != Unknown {
			r.Verdict = Fail
			break
		}
		r.Verdict = Inconclusive
	}
	if r.Unenforced = cfg.Rules.Policy.Default.Observe; r.Unenforced {
		r.Notes = append(r.Notes, "NOTHING IS ENFORCED: the policy has enforce = false, so every port is reachable, listed or not; what it would drop is counted: deadlight status")
		if r.Verdict == Pass {
			r.Verdict = Inconclusive
		}
	}
	if r.Verdict == Pass && len(j.either)+len(j.stray) > 0 {
		r.Verdict = Inconclusive
	}
	if r.Verdict == Pass && !r.exact && r.Counts.Filtered > 0 && res.Bound > defaultMissBound && (r.States["tcp4"].Filtered != "" || r.States["tcp6"].Filtered != "") {
		r.Verdict = Inconclusive
		r.Notes = append(r.Notes, fmt.Sprintf("too much was lost on the way: an answer may have been missed with a chance of up to %.0e", res.Bound))
	}
	return r
}

// neverAdmitted finds limited openings that a tripwire saw admit nobody: the
// first probe at least keeps within any limit.
func (j *judge) neverAdmitted() {
	for i := range j.cfg.Rules.Policy.Open {
		o := &j.cfg.Rules.Policy.Open[i]
		if admitted, seen := j.admitted[o.Name]; !seen || admitted {
			continue
		}
		f := Finding{Protocol: "any", Expected: rules.OutcomeOpen.String(), Observed: Filtered, Reason: "no probe of this limited opening passed", Rule: o.Name}
		for _, on := range o.On {
			if len(on.Ports) > 0 {
				f.Protocol, f.Port = on.Protocol.String(), on.Ports[0].Lo
				break
			}
		}
		j.report.Findings = append(j.report.Findings, f)
	}
}

type judge struct {
	cfg      JudgeConfig
	res      *Result
	report   *Report
	unproved int  // UDP ports whose silence nothing but the path vouches for
	before   int  // findings of earlier views
	inexact  bool // the tripwire did not see every probe of a view arrive
	stray    []uint16
	// By protocol: ports that answer as only another interface allows, ports that
	// a rate or a number of connections limits, listed UDP ports without answer.
	either, limited, silent map[string][]uint16
	admitted                map[string]bool // by rule: a limited opening let a probe in
}

func (j *judge) view(v *View, res *PathResult) {
	e := newExpecter(j.cfg.Rules, v)
	reachable, wrong := map[Target]bool{}, map[Target]bool{}
	seen := map[Target]sight{} // of what an [[expect]] is about
	j.before = len(j.report.Findings)
	fam := "ipv6"
	if v.Path.Dst.Is4() {
		fam = "ipv4"
	}
	for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
		ports, answers, sent, counted := v.Path.TCP, res.TCP, res.SentTCP, res.ArrivedTCP
		if proto == rules.UDP {
			ports, answers, sent, counted = v.Path.UDP, res.UDP, res.SentUDP, res.ArrivedUDP
		}
		if len(ports) == 0 {
			continue
		}
		exact := j.cfg.HostProof != nil && sent > 0 && (counted || j.cfg.HostProof.Arrived[proto][v.Path.SrcPort] >= sent)
		j.inexact = j.inexact || !exact
		byState := [len(stateNames)][]uint16{}
		for i, port := range ports {
			a := j.settle(v, proto, port, answers[i], exact)
			x := e.expect(&v.Path, proto, port)
			byState[a.State] = append(byState[a.State], port)
			if len(v.Expects) > 0 {
				seen[Target{proto, port}] = sight{a, x, exact}
			}
			if a.State == Open || a.State == Closed {
				reachable[Target{proto, port}] = true
			}
			if v.Sweep {
				*j.report.Counts.of(a.State)++
				if x.Outcome == rules.OutcomeOpen && !x.Either {
					j.report.Openings = append(j.report.Openings, Opening{fam, proto.String(), port, x.Rule, a.State})
				}
			}
			switch {
			case x.Limited:
				j.limited[proto.String()] = append(j.limited[proto.String()], port)
				if reachable[Target{proto, port}] {
					j.admitted[x.Rule] = true
				} else if exact && !j.admitted[x.Rule] {
					j.admitted[x.Rule] = false
				}
				continue
			case x.Either && !x.unnamed().agrees(a, proto):
				j.either[proto.String()] = append(j.either[proto.String()], port)
				continue
			case proto == rules.UDP && a.State == Filtered && !exact:
				j.unproved++
				if x.Outcome == rules.OutcomeOpen && !x.Either {
					if j.cfg.HostProof != nil {
						// There is a witness, and it did not see the probe arrive: nothing is proven.
						a = Answer{Unknown, PathNotProven}
						break
					}
					// Without host proof a listed UDP service may simply not answer.
					j.silent["udp"] = append(j.silent["udp"], port)
					continue
				}
			}
			if v.Sweep {
				j.report.ports++
			}
			if x.Either {
				continue
			}
			if !x.agrees(a, proto) {
				wrong[Target{proto, port}] = true
				j.finding(v, fam, proto, port, a, x, res)
			}
		}
		if v.Sweep {
			j.report.States[proto.String()+fam[3:]] = States{
				Open: Ranges(byState[Open]), Closed: Ranges(byState[Closed]), Rejected: Ranges(byState[Rejected]),
				Filtered: Ranges(byState[Filtered]), Unknown: Ranges(byState[Unknown]),
			}
		}
	}
	j.expects(v, seen, res)
	for _, shown := range v.Shows {
		x := Restriction{Rule: shown.Rule, Interface: v.In, From: v.Path.Src.String(), To: v.Path.Dst.String(), Place: shown.Place, OK: true}
		var open, silent []string
		for proto, ports := range map[rules.Protocol][]uint16{rules.TCP: shown.TCP, rules.UDP: shown.UDP} {
			for _, port := range ports {
				t := Target{proto, port}
				x.OK = x.OK && !wrong[t]
				if reachable[t] {
					open = append(open, fmt.Sprintf("%d/%s", port, proto))
				} else {
					silent = append(silent, fmt.Sprintf("%d/%s", port, proto))
				}
			}
		}
		slices.Sort(open)
		slices.Sort(silent)
		x.Open, x.Silent = strings.Join(open, ","), strings.Join(silent, ",")
		j.report.Restrictions = append(j.report.Restrictions, x)
	}
}

// settle adds what the tripwire saw to what came back.
func (j *judge) settle(v *View, proto rules.Protocol, port uint16, a Answer, exact bool) Answer {
	if j.cfg.HostProof == nil || (a.State != Filtered && a.State != Unknown) {
		return a
	}
	key := Passage{SrcPort: v.Path.SrcPort, DstPort: port, Protocol: proto, IPv6: !v.Path.Dst.Is4()}
	switch {
	case j.cfg.HostProof.Passed[key]:
		return Answer{Closed, PassedFirewall}
	case exact && j.cfg.HostProof.Gate[key] && !j.cfg.Rules.Policy.Default.IgnorePublished:
		return Answer{Filtered, PassedGate}
	case exact:
		return Answer{Filtered, NoResponse}
	}
	return a
}

func (j *judge) finding(v *View, fam string, proto rules.Protocol, port uint16, a Answer, x Expectation, res *PathResult) {
	probe := "syn"
	if proto == rules.UDP {
		probe = "datagram"
	}
	probe += " from " + v.Path.Src.String()
	if v.In != "" {
		probe += " by " + v.In
	}
	reason := a.Reason.String()
	if from, ok := res.From[Target{proto, port}]; ok {
		reason += " from " + from.String()
	}
	j.report.Findings = append(j.report.Findings, Finding{
		Family: fam, Address: v.Path.Dst.String(), Protocol: proto.String(), Port: port, Probe: probe,
		Expected: x.Outcome.String(), Observed: a.State, Reason: reason, Rule: x.Rule, Interface: v.In,
		source: v.Path.Src.String(),
	})
}

func (j *judge) notes() []string {
	var out []string
	if j.unproved > 0 {
		out = append(out, fmt.Sprintf("%s: unproved: silence (no host proof)", count(j.unproved, "UDP port", "UDP ports")))
	}
	if len(j.silent) > 0 {
		out = append(out, fmt.Sprintf("listed but silent: %s: over UDP that may be a service that does not answer", portLists(j.silent)))
	}
	if len(j.stray) > 0 {
		out = append(out, fmt.Sprintf("answers over UDP from ports that were not probed: %s: a service there answers from another port than it is asked at", Ranges(j.stray)))
	}
	if len(j.limited) > 0 {
		out = append(out, fmt.Sprintf("limited, so that probes may use the limit up, and not judged: %s", portLists(j.limited)))
	}
	if len(j.either) > 0 {
		out = append(out, fmt.Sprintf("not judged: %s: reachable, which the policy allows by some interfaces only; name the one by which the probes enter with --in", portLists(j.either)))
	}
	return out
}

// portLists writes "80,443/tcp, 53/udp".
func portLists(byProtocol map[string][]uint16) string {
	var out []string
	for _, proto := range []string{"tcp", "udp"} {
		if ports := byProtocol[proto]; len(ports) > 0 {
			out = append(out, shorten(Ranges(union(nil, ports)), 90)+"/"+proto)
		}
	}
	return strings.Join(out, ", ")
}

// Ranges writes ascending ports as "1-21,23".
func Ranges(ports []uint16) string {
	var b strings.Builder
	for i := 0; i < len(ports); {
		k := i
		for k+1 < len(ports) && ports[k+1] == ports[k]+1 {
			k++
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(rules.PortRange{Lo: ports[i], Hi: ports[k]}.String())
		i = k + 1
	}
	return b.String()
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return thousands(n) + " " + many
}

// thousands writes 131067 as "131,067".
func thousands(n int) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// WriteText writes the report for people: failures first, what is fine folded.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	r.findings(&b)
	r.openings(&b)
	r.rest(&b)
	r.restrictions(&b)
	r.expectText(&b)
	r.oddText(&b)
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "  note %s\n", n)
	}
	if r.Since != nil {
		r.Since.write(&b)
	}
	r.conclusion(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

// mostFindings bounds the lines of the text; the JSON has them all.
const mostFindings = 40

// foldedFinding is findings that differ only in port, source or family.
type foldedFinding struct {
	kind    string // all that must be equal
	first   Finding
	ports   []uint16
	sources []string
}

// ends gives the ports as text and, at most two of them, the sources.
func (l *foldedFinding) ends() (ports, from string) {
	f := l.first
	if len(l.sources) == 1 && l.sources[0] == "" {
		return fmt.Sprintf("%d/%s", f.Port, f.Protocol), ""
	}
	sources, more := l.sources, ""
	if n := len(sources) - 2; n > 0 {
		sources, more = sources[:2], fmt.Sprintf(" and %d more", n)
	}
	from = strings.Join(sources, ", ") + more
	if f.Interface != "" {
		from += " by " + f.Interface
	}
	if f.Port == 0 && (f.Odd != "" || f.Expect != "") {
		return f.Protocol, from
	}
	return shorten(Ranges(l.ports), 60) + "/" + f.Protocol, from
}

// reason says why, and to which odd probe.
func (l *foldedFinding) reason() string {
	switch f := l.first; {
	case f.Odd == "":
		return f.Reason
	case f.Observed == Unknown:
		return f.Reason + " for " + f.Odd
	default:
		return f.Reason + " to " + f.Odd
	}
}

// expected is what the policy says, in words.
func (l *foldedFinding) expected() string {
	if l.first.Reason == PassedGate.String() && l.first.Expected != rules.OutcomeOpen.String() {
		return l.first.Expected + " at the gate"
	}
	return l.first.Expected
}

// folded folds what differs only in port, source or family into one line.
func (r *Report) folded() []*foldedFinding {
	fold := func(in []*foldedFinding, same func(*foldedFinding) string, add func(to, from *foldedFinding)) []*foldedFinding {
		var out []*foldedFinding
		seen := map[string]*foldedFinding{}
		for _, l := range in {
			k := same(l)
			if to := seen[k]; to != nil {
				add(to, l)
				continue
			}
			seen[k] = l
			out = append(out, l)
		}
		return out
	}
	var lines []*foldedFinding
	for _, f := range r.Findings {
		kind := strings.Join([]string{f.Protocol, f.Expected, f.Observed.String(), f.Reason, f.Rule, f.Interface, f.Odd, f.Expect}, "\x00")
		lines = append(lines, &foldedFinding{kind, f, []uint16{f.Port}, []string{f.source}})
	}
	lines = fold(lines, func(l *foldedFinding) string { return l.kind + "\x00" + l.first.Probe },
		func(to, from *foldedFinding) { to.ports = union(to.ports, from.ports) })
	return fold(lines, func(l *foldedFinding) string { return l.kind + "\x00" + Ranges(l.ports) },
		func(to, from *foldedFinding) { to.sources = append(to.sources, from.sources...) })
}

// findings writes a line for each kind of finding.
func (r *Report) findings(b *strings.Builder) {
	lines := r.folded()
	w := tabwriter.NewWriter(b, 0, 8, 2, ' ', 0)
	for i, l := range lines {
		if i == mostFindings {
			break
		}
		f := l.first
		word, rule := "FAIL", ""
		if f.Observed == Unknown {
			word = "?"
		}
		if f.Rule != "" {
			rule = fmt.Sprintf(", %q", f.Rule)
		}
		if f.Expect != "" {
			rule += ", [[expect]] at " + f.Expect
		}
		ports, from := l.ends()
		if from != "" {
			from = "from " + from
		}
		fmt.Fprintf(w, "  %s\t%s\t%s\texpected %s%s\t%s\t%s\n", word, ports, f.Observed, l.expected(), rule, l.reason(), from)
	}
	w.Flush() // into a strings.Builder: cannot fail
	if n := len(lines) - mostFindings; n > 0 {
		fmt.Fprintf(b, "  …  and %s; --json lists every one\n", count(n, "more line", "more lines"))
	}
}

// openings lists the listed ports that are reachable, both families in one line.
func (r *Report) openings(b *strings.Builder) {
	type row struct {
		port     uint16
		protocol string
	}
	var order []row
	families := map[row][]Opening{}
	beside := 0
	for _, o := range r.Openings {
		if r.Unenforced && o.Rule == "" {
			beside++
			continue
		}
		k := row{o.Port, o.Protocol}
		if families[k] == nil {
			order = append(order, k)
		}
		families[k] = append(families[k], o)
	}
	sort.SliceStable(order, func(i, j int) bool { return order[i].port < order[j].port })
	const most = 20
	shown := 0
	for _, k := range order {
		os := families[k]
		bad := slices.ContainsFunc(os, func(o Opening) bool { return o.State != Open && o.State != Closed })
		if bad {
			continue // a finding or a note tells
		}
		if shown++; shown > most {
			continue
		}
		state := os[0].State.String()
		only := ""
		if len(os) == 1 {
			only = "  " + os[0].Family + " only"
		}
		listens := ""
		if os[0].State == Closed {
			listens = "  reachable, but nobody listens"
		}
		fmt.Fprintf(b, "  ok   %-14s %-9s %q%s%s\n", fmt.Sprintf("%d/%s", k.port, k.protocol), state, os[0].Rule, only, listens)
	}
	if shown > most {
		fmt.Fprintf(b, "  ok   %s more listed, reachable\n", thousands(shown-most))
	}
	if beside > 0 {
		fmt.Fprintf(b, "       %s that the policy does not list: reachable, since nothing is enforced\n", count(beside, "port", "ports"))
	}
}

func (r *Report) rest(b *strings.Builder) {
	for _, key := range []string{"tcp4", "tcp6", "udp4", "udp6"} {
		s, ok := r.States[key]
		if !ok {
			continue
		}
		for _, part := range []struct{ state, ports string }{{"filtered", s.Filtered}, {"rejected", s.Rejected}} {
			if part.ports != "" {
				fmt.Fprintf(b, "       %-14s %-9s %s\n", key, part.state, shorten(part.ports, 90))
			}
		}
	}
}

// shorten cuts a list of ranges at a comma.
func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	cut := strings.LastIndexByte(s[:most], ',')
	if cut < 0 {
		return s
	}
	return fmt.Sprintf("%s,… %s more", s[:cut], thousands(strings.Count(s[cut:], ",")))
}

// restrictions folds the views that are as they should be into a line a rule.
func (r *Report) restrictions(b *strings.Builder) {
	var order []string
	type tally struct{ inside, outside, bad int }
	rulesSeen := map[string]*tally{}
	for _, v := range r.Restrictions {
		t := rulesSeen[v.Rule]
		if t == nil {
			t = &tally{}
			rulesSeen[v.Rule] = t
			order = append(order, v.Rule)
		}
		switch {
		case !v.OK:
			t.bad++
		case v.Open != "":
			t.inside++
		default:
			t.outside++
		}
	}
	for _, name := range order {
		t := rulesSeen[name]
		if t.bad == 0 {
			fmt.Fprintf(b, "  ok   %-24s reachable from %s, silent to %s, as it says\n",
				fmt.Sprintf("restricted %q", name), count(t.inside, "source", "sources"), thousands(t.outside))
		}
	}
}

func (r *Report) conclusion(b *strings.Builder) {
	took := time.Duration(r.Seconds * float64(time.Second)).Round(100 * time.Millisecond)
	var proofs []string
	if !r.exact { // else no loss of an answer could hide a port
		proofs = append(proofs, fmt.Sprintf("chance that a TCP answer was missed ≤ %.0e", r.Bound))
	}
	if r.exact {
		proofs = append(proofs, "proven on the host: a tripwire saw every probe arrive, and pass only where the policy says")
	}
	proof := strings.Join(proofs, "; ")
	views := ""
	if n := r.views; n > 0 {
		views = fmt.Sprintf(" and %s of restricted openings", count(n, "view", "views"))
	}
	if r.Unenforced && len(r.Findings) == 0 {
		fmt.Fprintf(b, "INCONCLUSIVE: NOTHING IS ENFORCED: %s probed, and the policy has enforce = false: that they are reachable says nothing of it\n", count(r.ports, "port", "ports"))
		return
	}
	switch r.Verdict {
	case Pass:
		fmt.Fprintf(b, "PASS: %s%s as the policy says%s, %s; %s\n", count(r.ports, "port", "ports"), views, r.expectCount(), took, proof)
	case Fail:
		n := 0
		for _, f := range r.Findings {
			if f.Observed != Unknown {
				n++
			}
		}
		fmt.Fprintf(b, "FAIL: %s in %s%s%s, %s\n", count(n, "finding", "findings"), count(r.ports, "port", "ports"), views, r.expectCount(), took)
	case Inconclusive:
		silent := func(f Finding) bool { return f.Reason == PathNotProven.String() }
		if n := len(r.Findings); n > 0 && !slices.ContainsFunc(r.Findings, silent) {
			fmt.Fprintf(b, "INCONCLUSIVE: nothing can be said of %s, for the reasons above\n", count(n, "port", "ports"))
		} else if n > 0 {
			fmt.Fprintf(b, "INCONCLUSIVE: nothing can be said of %s: the path was not proven alive, so silence proves nothing\n", count(n, "port", "ports"))
		} else {
			fmt.Fprintf(b, "INCONCLUSIVE: nothing is wrong with %s, but not all could be judged: see the notes\n", count(r.ports, "port", "ports"))
		}
	}
}
