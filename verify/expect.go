package verify

import (
	"net/netip"
	"slices"
	"time"

	"deadlight/rules"
)

// View is a [Path] as the target sees it: the interface by which it enters, and
// what it is there to show.
type View struct {
	Path Path
	// In is the target's interface by which the probes enter; "" when that is
	// not known, as from another machine.
	In string
	// Sweep says that the view looks at all ports, or at all that were asked for.
	Sweep bool
	// Shows are the restricted rules that the view looks at.
	Shows []Shown
	// Expects are the [[expect]] tables of the policy that the view is to show.
	Expects []*rules.Expect

	echo bool // it asks by echo requests alone
}

// Shown is what a [View] shows of one restricted rule.
type Shown struct {
	Rule     string // of an [open.*], or "block NAME"
	Place    string // where the view stands: "inside", "edge" or "beside" its sources
	TCP, UDP []uint16
}

// Expectation is what the policy says of one probe.
type Expectation struct {
	Outcome rules.Outcome
	Rule    string // that admits it
	// Either says that the policy decides by an interface that is not known
	// here; Unnamed is then the outcome by one that no rule names.
	Either  bool
	Unnamed rules.Outcome
	// Limited says that it is admitted only within a rate or a number of
	// connections, which the probes themselves use up.
	Limited bool
}

// expecter answers for one view; it holds what does not change from port to port.
type expecter struct {
	rs *rules.Ruleset
	in []string // the candidate interfaces
	at time.Time
}

// unnamed is an interface that no policy can name: / is not allowed in names.
const unnamed = "/"

func newExpecter(rs *rules.Ruleset, v *View) expecter {
	if v.In != "" {
		return expecter{rs, []string{v.In}, time.Now()}
	}
	in := []string{unnamed}
	for _, t := range allTraffic(rs.Policy) {
		for _, name := range t.Interfaces {
			if !slices.Contains(in, instance(name)) {
				in = append(in, instance(name))
			}
		}
	}
	return expecter{rs, in, time.Now()}
}

// allTraffic lists what the openings and the blocks are about.
func allTraffic(p *rules.Policy) []*rules.Traffic {
	var out []*rules.Traffic
	for i := range p.Open {
		out = append(out, &p.Open[i].Traffic)
	}
	for i := range p.Block {
		out = append(out, &p.Block[i].Traffic)
	}
	return out
}

// instance is an interface name that a pattern matches.
func instance(pattern string) string {
	if n := len(pattern) - 1; n >= 0 && pattern[n] == '*' {
		return pattern[:n] + "0"
	}
	return pattern
}

func (e expecter) expect(p *Path, proto rules.Protocol, port uint16) Expectation {
	in := e.in
	if len(e.rs.OpensAt(proto, port)) == 0 {
		in = in[:1] // filtered by every interface
	}
	var x Expectation
	for i, name := range in {
		d := e.rs.Decide(rules.Packet{In: name, Src: p.Src, Dst: p.Dst, Protocol: proto, SrcPort: p.SrcPort, DstPort: port, At: e.at})
		if d.Observed {
			d.Outcome = rules.OutcomeOpen // nothing is enforced
		}
		x.Limited = x.Limited || d.Limited
		if i > 0 && d.Outcome != x.Outcome {
			x.Either = true
		}
		if i == 0 {
			x.Unnamed = d.Outcome
		}
		if i == 0 || d.Outcome == rules.OutcomeOpen {
			x.Outcome, x.Rule = d.Outcome, d.Rule
		}
	}
	return x
}

// unnamed is the expectation of an interface that no rule names.
func (x Expectation) unnamed() Expectation { return Expectation{Outcome: x.Unnamed, Rule: x.Rule} }

// agrees reports whether an answer is what the policy says. A listed port is as
// it should be when it is reachable, listener or not.
func (x Expectation) agrees(a Answer, proto rules.Protocol) bool {
	if a.Reason == PassedGate {
		return false
	}
	open := a.State == Open || a.State == Closed
	switch {
	case x.Outcome == rules.OutcomeOpen:
		return open
	case x.Outcome == rules.OutcomeFiltered:
		return a.State == Filtered
	case a.Reason == PassedFirewall:
		return false
	case proto == rules.TCP: // a reject answers by RST, which a closed port does too
		return a.State == Closed || a.State == Rejected
	}
	return a.State == Rejected || a.State == Filtered // ICMP errors are rate-limited
}

// ICMP types (https://www.iana.org/assignments/icmp-parameters, icmpv6-parameters).
const (
	echoRequest4 = 8
	echoRequest6 = 128
)

// allPorts are the ports 1–65535.
func allPorts() []uint16 {
	out := make([]uint16, 65535)
	for i := range out {
		out[i] = uint16(i + 1)
	}
	return out
}

// canaries lists what must answer on a path according to the policy, the
// strongest proof first.
func canaries(e expecter, p *Path) []Canary {
	const most = 4
	var out []Canary
	seen := map[uint16]bool{}
	try := func(port uint16) {
		x := e.expect(p, rules.TCP, port)
		if x.Outcome == rules.OutcomeOpen && !x.Either && !x.Limited && !seen[port] && len(out) < most {
			seen[port] = true
			out = append(out, Canary{CanaryTCP, port})
		}
	}
	for i := range e.rs.Policy.Open {
		if len(out) == most {
			break
		}
		o := &e.rs.Policy.Open[i]
		for _, r := range o.Ports(rules.TCP) {
			try(r.Lo)
		}
		if o.Any {
			try(22)
		}
	}
	echo := rules.Packet{In: e.in[0], Src: p.Src, Dst: p.Dst, Protocol: rules.ICMPv4, ICMPType: echoRequest4, At: e.at}
	if !p.Src.Is4() {
		echo.Protocol, echo.ICMPType = rules.ICMPv6, echoRequest6
	}
	if d := e.rs.Decide(echo); d.Outcome == rules.OutcomeOpen && !d.Limited {
		out = append(out, Canary{Kind: CanaryEcho})
	}
	return out
}

// usable reports whether a packet may carry a as its source: the kernel drops
// the others as martians before any rule sees them (ip_route_input_slow,
// ipv6_rcv).
func usable(a netip.Addr) bool {
	if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return false
	}
	if a.Is4() {
		b := a.As4()
		return b[0] != 0 && b[0] < 240
	}
	return true
}
