package verify

// The [[expect]] tables of a policy on the wire: each is sent as a packet from the
// address that it names, where the vantage can take that address, and is held
// against what the table says, whatever Decide makes of it.

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"

	"deadlight/rules"
)

// Expected is what a run showed of one [[expect]] of the policy.
type Expected struct {
	Place string `json:"place"` // of the table: "policy.toml:41"
	Port  string `json:"port"`  // "5432/tcp", or a protocol without ports
	From  string `json:"from"`
	// To and Interface are what was probed; as written, or "", where nothing was.
	To        string `json:"to"`
	Interface string `json:"interface"`
	Expected  string `json:"expected"` // open, filtered or rejected
	Observed  State  `json:"observed"` // unknown where nothing was probed
	// Result is met, failed, unknown (nothing came back, and nothing proves the path),
	// unproved (over UDP silence may be a service that does not answer; or a limit may
	// be used up) or unprobed.
	Result string `json:"result"`
	Reason string `json:"reason"` // for the observed state, or for why there is none
}

// The results of an [Expected].
const (
	expectMet      = "met"
	expectFailed   = "failed"
	expectUnknown  = "unknown"
	expectUnproved = "unproved"
	expectUnprobed = "unprobed"
)

// ExpectResults gives the words of Expected.Result.
func ExpectResults() []string {
	return []string{expectMet, expectFailed, expectUnknown, expectUnproved, expectUnprobed}
}

const tooMany = "there are too many sources to look from"

// unasked is an [[expect]] that cannot be probed, and why.
type unasked struct {
	of  *rules.Expect
	why string
}

// placeOf is file and line of an [[expect]].
func placeOf(x *rules.Expect) string {
	file := strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // the name of an include may steer a terminal
			return unicode.ReplacementChar
		}
		return r
	}, x.Pos.File)
	return fmt.Sprintf("%s:%d", file, x.Pos.Line)
}

// what is the test in words.
func (x *Expected) what() string {
	s := fmt.Sprintf("%s from %s", x.Port, x.From)
	if x.To != "" {
		s += " to " + x.To
	}
	if x.Interface != "" {
		s += " by " + x.Interface
	}
	return s
}

// newExpected is an [[expect]] of which nothing was seen.
func newExpected(x *rules.Expect, why string) Expected {
	e := Expected{
		Place: placeOf(x), Port: rules.PortName(x.Packet.Protocol, x.Packet.DstPort), From: x.Packet.Src.String(),
		Interface: x.Packet.In, Expected: x.State.String(), Result: expectUnprobed, Reason: why,
	}
	if x.Packet.Dst.IsValid() {
		e.To = x.Packet.Dst.String()
	}
	return e
}

// unaskable says what keeps an [[expect]] from being probed from anywhere, or "".
func unaskable(rs *rules.Ruleset, x *rules.Expect, swept Ports) string {
	p := x.Packet
	ports := swept.TCP
	whole := len(swept.TCP) == 65535 && len(swept.UDP) == 65535
	switch {
	case p.Protocol != rules.TCP && p.Protocol != rules.UDP && !isEcho(x):
		return "only those of TCP, UDP and echo requests are sent"
	case p.In == "lo":
		return "nothing comes in by lo from outside"
	case !usable(p.Src):
		return "no packet from a wire may bear " + p.Src.String()
	case rs.Policy.Default.Observe && x.State != rules.OutcomeOpen:
		return "enforce = false: nothing is dropped"
	case isEcho(x) && !whole:
		return "echo requests are sent only where all ports are asked for"
	case isEcho(x):
		return ""
	case p.Protocol == rules.UDP:
		ports = swept.UDP
	}
	if _, ok := slices.BinarySearch(ports, p.DstPort); !ok {
		return "it is not among the ports that were asked for"
	}
	return ""
}

// standsFor reports whether the policy decides of a packet by some interface to some
// address as of the one that an [[expect]] means: what it leaves out is an interface
// or an address that no rule names.
func standsFor(rs *rules.Ruleset, x *rules.Expect, in string, dst netip.Addr) bool {
	meant, sent := x.Packet, x.Packet
	meant.At = time.Now()
	sent.At, sent.In, sent.Dst = meant.At, in, dst
	a, b := rs.Decide(meant), rs.Decide(sent)
	return a.Outcome == b.Outcome && a.Limited == b.Limited
}

// isEcho reports whether an [[expect]] is about an echo request.
func isEcho(x *rules.Expect) bool {
	return x.Packet.Protocol == rules.ICMPv4 || x.Packet.Protocol == rules.ICMPv6
}

// pathPort is probed beside an echo request, so that its silence can be told from
// that of a dead path (discard, RFC 863).
const pathPort = 9

// asks makes a view probe what an [[expect]] is about. Of an echo request it proves
// the path; echoView asks it.
func (v *View) asks(x *rules.Expect) {
	port := []uint16{x.Packet.DstPort}
	if isEcho(x) {
		port[0] = pathPort
	} else {
		v.Expects = append(v.Expects, x)
	}
	switch {
	case v.Sweep: // it probes every port that was asked for
	case x.Packet.Protocol == rules.UDP:
		v.Path.UDP = union(v.Path.UDP, port)
	default:
		v.Path.TCP = union(v.Path.TCP, port)
	}
}

// echoView asks by echo requests alone, from where another view looks.
func echoView(beside *View, x *rules.Expect, port uint16) View {
	v := View{In: beside.In, Path: beside.Path, Expects: []*rules.Expect{x}, echo: true}
	v.Path.TCP, v.Path.UDP, v.Path.SrcPort = nil, nil, port
	v.Path.Canaries = []Canary{{Kind: CanaryEcho}}
	return v
}

// expects adds the views of every [[expect]].
func (b *outlookBuilder) expects(sweep Ports) {
	for i := range b.rs.Policy.Expect {
		x := &b.rs.Policy.Expect[i]
		why := unaskable(b.rs, x, sweep)
		if why == "" {
			why = b.expect(x)
		}
		if why != "" {
			b.out.unasked = append(b.out.unasked, unasked{x, why})
		}
	}
}

// expect adds the view of an [[expect]], or says why there is none.
func (b *outlookBuilder) expect(x *rules.Expect) (why string) {
	p := x.Packet
	at := slices.IndexFunc(b.families, func(f family) bool { return f.dst.Is4() == p.Src.Is4() })
	if at < 0 {
		return "this host has no " + kindOf(p.Src) + " address to be probed at"
	}
	f := b.families[at]
	own := append([]netip.Addr{f.dst}, b.out.More...)
	tos, ins := own, append([]string{f.main}, b.out.Links...)
	if p.Dst.IsValid() {
		tos = []netip.Addr{p.Dst}
		if !slices.Contains(own, p.Dst) && (b.real == nil || !b.real.local[p.Dst] || !usable(p.Dst)) {
			return p.Dst.String() + " is no address of this host at which it can be probed"
		}
	}
	if p.In != "" {
		ins = []string{p.In}
		if !slices.Contains(b.out.Links, p.In) {
			return "no interface " + p.In + " is up with a carrier and an address"
		}
	}
	if slices.Contains(own, p.Src) || b.real != nil && b.real.local[p.Src] {
		return p.Src.String() + " is an address of this host itself"
	}
	reached := false
	for _, in := range ins {
		if b.real != nil && !b.real.reaches(in, p.Src) {
			continue
		}
		reached = true
		for _, to := range tos {
			if to.Is4() != p.Src.Is4() || !standsFor(b.rs, x, in, to) {
				continue
			}
			left := b.out.Unprobed
			v := b.view(in, p.Src, to)
			if v == nil {
				b.out.Unprobed = left // that counts what shows restricted rules
				return tooMany
			}
			v.asks(x)
			if isEcho(x) {
				if len(b.ports) == 0 {
					return tooMany
				}
				b.out.Views = append(b.out.Views, echoView(v, x, b.ports[len(b.ports)-1]))
				b.ports = b.ports[:len(b.ports)-1]
			}
			return ""
		}
	}
	if reached {
		return "the policy decides otherwise by the interfaces and to the addresses that can be probed than by one that no rule names: say which is meant with in and to"
	}
	why = "this vantage cannot send from " + p.Src.String()
	if p.In != "" {
		why += " by " + p.In
	}
	if l := b.real.link(ins[0]); l != nil && l.strict && p.Src.Is4() {
		return why + ": " + b.real.whyNot(ins[0], p.Src)
	}
	return why + ": it is in use"
}

// targetAsker makes the views of targets probe every [[expect]] that this machine can.
type targetAsker struct {
	cfg   LookConfig
	views []View
	swept int      // of them; behind these are those of our other addresses
	ports []uint16 // fresh source ports
	left  []unasked
}

func (a *targetAsker) all() {
	for i := range a.cfg.Rules.Policy.Expect {
		x := &a.cfg.Rules.Policy.Expect[i]
		why := unaskable(a.cfg.Rules, x, a.cfg.Ports)
		switch in := x.Packet.In; {
		case why == "" && isEcho(x) && a.cfg.Connect:
			why = "connect(2) sends no echo requests"
		case why != "" || in == "" || in == a.cfg.In:
		case a.cfg.In == "":
			why = "by which interface the probes enter is not known: name it with --in"
		default:
			why = "the probes enter by " + a.cfg.In
		}
		if why == "" {
			why = a.ask(x)
		}
		if why != "" {
			a.left = append(a.left, unasked{x, why})
		}
	}
}

// ask probes an [[expect]] at every target that it may mean, or says why it cannot.
func (a *targetAsker) ask(x *rules.Expect) (why string) {
	src, dst := x.Packet.Src, x.Packet.Dst
	why = "no target has an " + kindOf(src) + " address"
	if dst.IsValid() {
		why = dst.String() + " is no target"
	}
	asked := false
	for t := range a.swept {
		to := a.views[t].Path.Dst
		switch {
		case to.Is4() != src.Is4() || dst.IsValid() && to != dst:
			continue
		case slices.ContainsFunc(newExpecter(a.cfg.Rules, &a.views[t]).in, func(in string) bool { return !standsFor(a.cfg.Rules, x, in, to) }):
			why = "the policy decides otherwise to " + to.String() + ", or by some interface, than to one that no rule names: say which is meant with in and to"
			if a.cfg.In == "" {
				why += ", and by which the probes enter with --in"
			}
			continue
		}
		v, err := a.view(t, src)
		if err != nil {
			why = fmt.Sprintf("from %v: %v", src, err)
			continue
		}
		if v == nil {
			why = "this vantage cannot send from " + src.String()
			continue
		}
		v.asks(x)
		asked = true
		if isEcho(x) {
			if len(a.ports) == 0 {
				return tooMany
			}
			a.views = append(a.views, echoView(v, x, a.ports[0]))
			a.ports = a.ports[1:]
		}
	}
	if asked {
		return ""
	}
	return why
}

// view gives the one that looks at a target from an address; nil when it is none of ours.
func (a *targetAsker) view(t int, src netip.Addr) (*View, error) {
	dst := a.views[t].Path.Dst
	if a.views[t].Path.Src == src {
		return &a.views[t], nil
	}
	for i := a.swept; i < len(a.views); i++ {
		if p := &a.views[i].Path; p.Src == src && p.Dst == dst && !a.views[i].echo {
			return &a.views[i], nil
		}
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of this machine: %w", err)
	}
	if len(a.ports) == 0 || !slices.ContainsFunc(own, func(n net.Addr) bool {
		p, err := netip.ParsePrefix(n.String())
		return err == nil && p.Addr().Unmap() == src
	}) {
		return nil, nil
	}
	link, err := resolveLinkFrom(dst, src)
	if err != nil {
		return nil, err
	}
	v := View{In: a.cfg.In, Path: Path{Link: link, Src: src, Dst: dst, SrcPort: a.ports[0]}}
	a.ports = a.ports[1:]
	v.Path.Canaries = append(canaries(newExpecter(a.cfg.Rules, &v), &v.Path), a.cfg.Canaries...)
	a.views = append(a.views, v)
	return &a.views[len(a.views)-1], nil
}

// expects judges every [[expect]] that a view was made to probe.
func (j *judge) expects(v *View, seen map[Target]sight, res *PathResult) {
	for _, x := range v.Expects {
		e := newExpected(x, "")
		e.To, e.Interface = v.Path.Dst.String(), v.In
		s, probed := seen[Target{x.Packet.Protocol, x.Packet.DstPort}]
		if !probed && !isEcho(x) {
			e.Reason = "it is not among the ports that were asked for"
			j.report.Expects = append(j.report.Expects, e)
			continue
		}
		if isEcho(x) {
			s.answer = j.echo(v, res)
			p := x.Packet
			p.Dst = v.Path.Dst
			s.said = newExpecter(j.cfg.Rules, v).decide(p)
		}
		silentUDP := x.Packet.Protocol == rules.UDP && s.answer.State == Filtered && !s.exact
		if silentUDP && j.cfg.HostProof != nil {
			s.answer = Answer{Unknown, PathNotProven} // there is a witness, and it did not see the probe arrive
		}
		e.Observed, e.Reason = s.answer.State, s.answer.Reason.String()
		met := Expectation{Outcome: x.State}.agrees(s.answer, x.Packet.Protocol)
		switch {
		case isEcho(x) && s.answer.State != Open && x.State == rules.OutcomeRejected:
			e.Result, e.Reason = expectUnproved, "nobody listened for what refuses an echo request"
		case s.answer.State == Unknown:
			e.Result = expectUnknown
		case silentUDP && (met || x.State == rules.OutcomeOpen):
			e.Result = expectUnproved
		case met:
			e.Result = expectMet
		case x.State == rules.OutcomeOpen && s.said.Limited:
			e.Result, e.Reason = expectUnproved, "limited, and other probes may have used the limit up"
		default:
			e.Result = expectFailed
		}
		j.report.Expects = append(j.report.Expects, e)
		if e.Result == expectFailed || e.Result == expectUnknown {
			j.expectFinding(v, x, s, res)
		}
	}
}

// echo says what a view of echo requests showed. Their silence is worth what the view
// beside proves of the path.
func (j *judge) echo(v *View, res *PathResult) Answer {
	if res.Alive || res.CanariesLost < res.CanariesSent {
		return Answer{Open, ICMPReply}
	}
	for i := range j.cfg.Views {
		w := &j.cfg.Views[i]
		if w.echo || w.In != v.In || w.Path.Src != v.Path.Src || w.Path.Dst != v.Path.Dst {
			continue
		}
		if r := &j.res.Paths[i]; r.Alive || r.ArrivedTCP {
			return Answer{Filtered, NoResponse}
		}
	}
	return Answer{Unknown, PathNotProven}
}

// sight is what one port showed.
type sight struct {
	answer Answer
	said   Expectation // of the policy
	exact  bool        // a tripwire counted every probe
}

// expectFinding names the table in the finding that the port has already, or makes one.
func (j *judge) expectFinding(v *View, x *rules.Expect, s sight, res *PathResult) {
	place := placeOf(x)
	proto, port := x.Packet.Protocol, x.Packet.DstPort
	for i := len(j.report.Findings) - 1; i >= j.before; i-- {
		f := &j.report.Findings[i]
		if f.Protocol == proto.String() && f.Port == port && f.Expected == x.State.String() {
			if f.Expect != "" {
				place = f.Expect + ", " + place
			}
			f.Expect = place
			return
		}
	}
	j.finding(v, familyOf(v.Path.Dst), proto, port, s.answer, Expectation{Outcome: x.State}, res)
	f := &j.report.Findings[len(j.report.Findings)-1]
	f.Expect = place
	if isEcho(x) {
		f.Probe = strings.Replace(f.Probe, "syn", "echo request", 1)
	}
}

// unasked lists those that were not probed, and puts all into the order of the policy.
func (j *judge) unasked() {
	r := j.report
	for _, u := range j.cfg.unasked {
		r.Expects = append(r.Expects, newExpected(u.of, u.why))
	}
	order := map[string]int{}
	for i := range j.cfg.Rules.Policy.Expect {
		order[placeOf(&j.cfg.Rules.Policy.Expect[i])] = i
	}
	slices.SortStableFunc(r.Expects, func(a, b Expected) int { return order[a.Place] - order[b.Place] })
	for i := range r.Expects {
		switch x := &r.Expects[i]; x.Result {
		case expectUnprobed:
			r.Notes = append(r.Notes, fmt.Sprintf("not probed: [[expect]] at %s, %s: %s", x.Place, x.what(), x.Reason))
		case expectUnproved:
			reason := x.Reason
			if x.Observed == Filtered && reason == NoResponse.String() {
				reason = "silence, which over UDP may be a service that does not answer"
			}
			r.Notes = append(r.Notes, fmt.Sprintf("unproved: [[expect]] at %s, %s is %s: %s", x.Place, x.what(), x.Expected, reason))
		}
	}
}

// expectText names those that were met, a line each.
func (r *Report) expectText(b *strings.Builder) {
	const most = 20
	met := 0
	for i := range r.Expects {
		x := &r.Expects[i]
		if x.Result != expectMet {
			continue // a finding or a note tells
		}
		if met++; met <= most {
			fmt.Fprintf(b, "  ok   [[expect]] at %s: %s is %s\n", x.Place, x.what(), x.Expected)
		}
	}
	if met > most {
		fmt.Fprintf(b, "  ok   %s more [[expect]] as they say\n", thousands(met-most))
	}
}

// expectCount says how many were met; "" where the policy has none.
func (r *Report) expectCount() string {
	if len(r.Expects) == 0 {
		return ""
	}
	n := map[string]int{}
	for _, x := range r.Expects {
		n[x.Result]++
	}
	s := fmt.Sprintf(", %s of %s met", thousands(n[expectMet]), count(len(r.Expects), "expectation", "expectations"))
	var rest []string
	for _, result := range []struct{ is, word string }{{expectUnprobed, "not probed"}, {expectUnproved, "unproved"}} {
		if n[result.is] > 0 {
			rest = append(rest, thousands(n[result.is])+" "+result.word)
		}
	}
	if len(rest) > 0 {
		s += " (" + strings.Join(rest, ", ") + ")"
	}
	return s
}
