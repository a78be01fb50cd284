package rules

import (
	"slices"
	"time"
)

// A packet to an address that is not of this host is transit to the gate. Where a
// DNAT then takes it to a container or to this host (the address of a Kubernetes
// service), it is judged only behind the DNAT, by the rules that the gate has: the
// port and the address are those of the wire, the source and the interface are still
// the packet's.

func wasDNAT() Expr { return Match{Field: CtStatus, Number: StatusDNAT} }

// rewritten is the chain that judges what a DNAT sends on. What comes back from it
// names no port of the list.
func (c *compiler) rewritten(blocked, opened []Rule) []Chain {
	if c.policy.Default.IgnorePublished {
		return nil
	}
	const pass = "c_backstop_pass"
	r := byOriginalPort(blocked)
	asked := map[string]bool{} // maps that hold openings for some only
	var refused []Rule
	refuse := func(e ...Expr) {
		refused = append(refused, line("not for them", append(e, c.count("c_rewritten_dropped"), drop())...))
	}
	for _, p := range portProtocols {
		set, all := c.everybody(p)
		if set != "" {
			r = append(r, line("listed "+p.String(), l4proto(p), MatchSet{Field: CtOriginalProtoDst, Set: set}, c.count(pass), accept()))
		}
		if !all {
			asked[p.String()+"_open"] = true
			refuse(l4proto(p), MatchSet{Field: CtOriginalProtoDst, Set: listedSet(p)})
		}
	}
	for _, p := range []Protocol{ICMPv4, ICMPv6} {
		r = append(r, line("judged by the gate", l4proto(p), c.count(pass), accept()))
	}
	for _, rule := range opened {
		m, ok := rule.Exprs[0].(VerdictMap)
		if !ok || m.Field == MetaL4proto || asked[m.Map] {
			r = append(r, byOriginalPort([]Rule{rule})...)
		}
	}
	for _, list := range c.open.index.plain {
		if !c.forEverybody(list) {
			refuse(MatchSet{Field: MetaL4proto, Set: setPlain})
			break
		}
	}
	return []Chain{{Name: chainRewritten, Rules: append(r, refused...)}}
}

// byOriginalPort asks what rules of the gate ask, by the port as it stood on the wire.
func byOriginalPort(list []Rule) []Rule {
	out := slices.Clone(list)
	for i, r := range out {
		m, ok := r.Exprs[0].(VerdictMap)
		for _, p := range portProtocols {
			if ok && m.Field == dport(p) {
				out[i] = line(r.Comment, l4proto(p), VerdictMap{Field: CtOriginalProtoDst, Map: m.Map})
			}
		}
	}
	return out
}

// forEverybody reports whether one of some openings takes everybody.
func (c *compiler) forEverybody(list []int) bool {
	return slices.ContainsFunc(list, func(i int) bool { return c.unrestricted(c.open, i) })
}

// everybody names the set of the ports of a protocol that everybody may reach, ""
// if there are none; all says that no listed port is for some only.
func (c *compiler) everybody(p Protocol) (set string, all bool) {
	all = true
	var ports []PortRange
	for _, s := range c.open.index.ports[p] {
		if c.forEverybody(s.rules) {
			ports = append(ports, s.ports)
		} else {
			all = false
		}
	}
	switch {
	case len(ports) == 0:
		return "", all
	case all:
		return listedSet(p), true
	}
	s := Set{Name: p.String() + "_everybody", Type: TypePort, Ports: mergePorts(ports)}
	s.Interval = slices.ContainsFunc(s.Ports, isRange)
	c.sets = append(c.sets, s)
	return s.Name, false
}

// The addresses of this host at which the gate has charged a new flow to a limit. The
// packet itself keeps its address there until it is behind the DNAT, where it must not
// be charged again.
const (
	chainCharge    = "charge"
	setCharged     = "charged"
	chargedLast    = time.Minute
	chargedAddress = 1024
)

// charged admits what the gate has charged already, and notes what it charges now.
func (c *compiler) charged(comment, counter string) []Rule {
	if c.policy.Default.IgnorePublished {
		return nil
	}
	if !c.made[setCharged] {
		c.made[setCharged] = true
		for _, v4 := range []bool{true, false} {
			typ := TypeIPv4
			if !v4 {
				typ = TypeIPv6
			}
			c.sets = append(c.sets, Set{Name: setCharged + familySuffix(v4), Type: typ, Meter: true, Most: chargedAddress, MeterTimeout: chargedLast})
		}
	}
	var r []Rule
	for _, v4 := range []bool{true, false} {
		r = append(r, line(comment, wasDNAT(), MatchSet{Field: originalDaddr(v4), Set: setCharged + familySuffix(v4)}, c.count(counter), accept()))
	}
	return append(r, line(comment, Match{Field: FibDaddrType, Number: AddrLocal}, jump(chainCharge)))
}

// charge is the chain that notes addresses.
func (c *compiler) charge() []Chain {
	if !c.made[setCharged] {
		return nil
	}
	ch := Chain{Name: chainCharge}
	for _, v4 := range []bool{true, false} {
		ch.Rules = append(ch.Rules, line("address of this host", Tally{setCharged + familySuffix(v4), []Field{daddr(v4)}}))
	}
	return []Chain{ch}
}
