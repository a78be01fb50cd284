package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"deadlight/rules"
	"deadlight/verify"
)

// audit --verify: beside what the policy says and what the kernel's rules do stands
// what probes from outside show.

// probeJSON is the verification that `audit --verify` ran.
type probeJSON struct {
	Verdict verify.Verdict `json:"verdict"`
	Vantage string         `json:"vantage"`
	Proof   string         `json:"proof"`
	Bound   float64        `json:"bound"` // the largest probability that a TCP answer was missed
	Seconds float64        `json:"seconds"`
	Probes  uint64         `json:"probes"`
}

// seenJSON is what a probe showed of the port of a socket, at an address that the
// socket takes.
type seenJSON struct {
	Interface string       `json:"interface"`
	From      string       `json:"from"`
	To        string       `json:"to"`
	State     verify.State `json:"state"`
}

// verify probes the network namespace of the calling thread, at the ports that the
// audit lists, and puts what was seen beside each socket.
func (a *auditJSON) verify(ctx context.Context, e env, rs *rules.Ruleset) error {
	var ports verify.Ports
	for _, s := range a.Sockets {
		list := &ports.TCP
		if s.listener.Protocol == rules.UDP {
			list = &ports.UDP
		}
		first, last := s.run()
		for n := first; n <= last; n++ {
			*list = append(*list, uint16(n))
		}
	}
	for _, list := range []*[]uint16{&ports.TCP, &ports.UDP} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	if len(ports.TCP)+len(ports.UDP) == 0 {
		a.Notes = append(a.Notes, "not probed: nothing listens, and nothing is opened")
		return nil
	}
	r, err := verifyHost(ctx, e, rs, hostCheck{ports: ports})
	if err != nil {
		return err
	}
	a.probed(r)
	a.Notes = append(a.Notes, "probed were the ports above and no others: deadlight verify probes all")
	return nil
}

// run is the ports that a line is about.
func (s *socketJSON) run() (first, last int) {
	first, last = int(s.Port), int(s.Port)
	if _, hi, ok := strings.Cut(s.Ports, "-"); ok {
		if n, err := strconv.Atoi(hi); err == nil {
			last = n
		}
	}
	return first, last
}

// probed fills in what a report shows.
func (a *auditJSON) probed(r *verify.Report) {
	a.Probe = &probeJSON{r.Verdict, r.Vantage, r.Proof, r.Bound, r.Seconds, r.Probes}
	for i := range a.Sockets {
		s := &a.Sockets[i]
		s.Seen = s.seen(r)
	}
	told := map[string]bool{}
	for _, f := range r.Findings {
		port := fmt.Sprintf("%d/%s", f.Port, f.Protocol)
		said := slices.ContainsFunc(a.Sockets, func(s socketJSON) bool {
			return (s.Verdict == auditUnlisted || s.Verdict == auditStopped) && s.Port == f.Port && s.listener.Protocol.String() == f.Protocol
		})
		if f.Observed == verify.Unknown || said || told[port+f.Observed.String()] {
			continue
		}
		told[port+f.Observed.String()] = true
		a.Findings = append(a.Findings, findingJSON{
			Kind: auditProbed, Protocol: f.Protocol, Address: f.Address, Port: fmt.Sprint(f.Port), Process: a.processAt(f.Protocol, f.Port), Rule: f.Rule,
			Fact: fmt.Sprintf("expected %s, and a probe found it %s: %s", f.Expected, f.Observed, f.Reason),
			Hint: "what neither the policy nor the rules tell, a probe shows: deadlight verify names every one",
		})
	}
	for _, n := range r.Notes {
		if !slices.Contains(a.Notes, n) {
			a.Notes = append(a.Notes, n)
		}
	}
}

// processAt names who listens at a port.
func (a *auditJSON) processAt(protocol string, port uint16) string {
	for _, s := range a.Sockets {
		if s.Address != "" && s.Port == port && s.listener.Protocol.String() == protocol {
			return s.Process
		}
	}
	return ""
}

// seen lists the probes that a socket, or what is published, would have taken.
func (s *socketJSON) seen(r *verify.Report) []seenJSON {
	if s.Port == 0 || s.Ports != "" && strings.Contains(s.Ports, "-") {
		return nil // a run of ports has no one state
	}
	var out []seenJSON
	for _, w := range r.Swept() {
		if state, ok := r.StateOf(w.Address.Is4(), s.listener.Protocol, s.Port); ok && s.takesProbe(w.Address, w.Interface) {
			out = append(out, seenJSON{w.Interface, w.Source.String(), w.Address.String(), state})
		}
	}
	port := fmt.Sprintf("%d/%s", s.Port, s.listener.Protocol)
	for _, x := range r.Restrictions {
		to, err := netip.ParseAddr(x.To)
		if err != nil || x.Place != "inside" || !s.takesProbe(to, x.Interface) {
			continue
		}
		seen := seenJSON{Interface: x.Interface, From: x.From, To: x.To, State: verify.Open}
		if slices.Contains(strings.Split(x.Silent, ","), port) {
			seen.State = verify.Filtered
		} else if !slices.Contains(strings.Split(x.Open, ","), port) {
			continue
		}
		if !slices.Contains(out, seen) {
			out = append(out, seen)
		}
	}
	return out
}

func (s *socketJSON) takesProbe(to netip.Addr, in string) bool {
	l := s.listener
	if s.Address == "" {
		return true // published, or nobody
	}
	return !l.loopback() && (l.Addr == to || l.Addr.IsUnspecified() && l.takes(to.Is4())) && (l.Device == "" || l.Device == in)
}

// probedText is the cell of a socket: what a stranger saw, and those whom an opening
// names.
func (s *socketJSON) probedText() string {
	if len(s.Seen) == 0 {
		return "-"
	}
	var parts []string
	for _, x := range s.Seen {
		family := "IPv6"
		if a, err := netip.ParseAddr(x.To); err == nil && a.Is4() {
			family = "IPv4"
		}
		text := x.State.String()
		if slices.ContainsFunc(s.Seen, func(o seenJSON) bool { return o.State != x.State }) {
			text += " over " + family + " from " + x.From
		}
		if !slices.Contains(parts, text) {
			parts = append(parts, text)
		}
	}
	const most = 3
	if n := len(parts) - most; n > 0 {
		parts = append(parts[:most], plural(n, "more view"))
	}
	return strings.Join(parts, ", ")
}
