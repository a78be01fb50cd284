package rules

import "time"

// What no rule admits is counted by port, and by source and port, in sets that
// forget and that are bounded: whoever floods the host fills them, and what does not
// fit is not listed. They decide nothing: the rules that fill them hold no verdict.

// KnockSet is a set that lists what no rule admits. The key of an element is the
// source, if it lists those, the protocol and the port.
type KnockSet struct {
	Name string
	Size int
	V4   bool // it lists IPv4 sources
	V6   bool // it lists IPv6 sources
}

// KnockSets are the sets of every table that counts knocks.
func KnockSets() []KnockSet {
	return []KnockSet{
		{Name: "knocks", Size: knockPorts},
		{Name: "knocks4", Size: knockSources, V4: true},
		{Name: "knocks6", Size: knockSources, V6: true},
	}
}

// An element takes 130 bytes and 16 more for each processor: all three sets hold
// 5 MB at most on two processors, 38 MB on 64.
const (
	knockPorts   = 16384
	knockSources = 8192
)

// What nobody has knocked at for so long is forgotten. Who observes waits for what
// comes once a week.
const (
	knocksLast         = 24 * time.Hour
	knocksLastObserved = 8 * 24 * time.Hour
)

const chainKnocked = "knocked"

// KnockMemory is how long a knock is remembered under this policy.
func (p *Policy) KnockMemory() time.Duration {
	if p.Default.Observe {
		return knocksLastObserved
	}
	return knocksLast
}

// knocks has a packet counted that is about to be refused.
func (c *compiler) knocks() []Rule {
	if !c.policy.Log.Knocks {
		return nil
	}
	return []Rule{line("count by port and source", MatchSet{Field: MetaL4proto, Set: c.ported()}, jump(chainKnocked))}
}

// knocked is the chain that counts.
func (c *compiler) knocked() []Chain {
	if !c.policy.Log.Knocks {
		return nil
	}
	ch := Chain{Name: chainKnocked}
	for _, k := range KnockSets() {
		s := Set{Name: k.Name, Type: TypeKnock, Meter: true, Most: k.Size, MeterTimeout: c.policy.KnockMemory()}
		key := []Field{MetaL4proto, THDport}
		switch {
		case k.V4:
			s.Type, key = TypeKnock4, []Field{IPSaddr, MetaL4proto, THDport}
		case k.V6:
			s.Type, key = TypeKnock6, []Field{IP6Saddr, MetaL4proto, THDport}
		}
		c.sets = append(c.sets, s)
		ch.Rules = append(ch.Rules, line("count by port and source", Tally{s.Name, key}))
	}
	return []Chain{ch}
}

// ported makes the set of protocols with ports on first use.
func (c *compiler) ported() string {
	if !c.made[setPorted] {
		c.made[setPorted] = true
		s := Set{Name: setPorted, Type: TypeProtocol}
		for _, p := range portProtocols {
			s.Codes = append(s.Codes, uint32(p))
		}
		c.sets = append(c.sets, s)
	}
	return setPorted
}
