package rules

import (
	"slices"
	"sort"
	"time"
)

// Priorities of the base chains. The gate runs after conntrack (-200) and ahead
// of every destination NAT (-100), so it sees ports as they stand on the wire.
const (
	gatePriority     = -100 - 10
	backstopPriority = 0 + 10
)

// Names that nft, status and the tests know.
const (
	chainGate       = "gate"
	chainEssential4 = "icmp_essential"
	chainEssential6 = "icmpv6_essential"
	chainBackstopIn = "backstop_in"
	chainBackstopFw = "backstop_forward"
	chainSilence    = "silence"
	chainEgress     = "egress"
	chainRewritten  = "rewritten"
	chainContainers = "container_route"
	countReversed   = "c_reversed"
	setPublished    = "published_if"
	setDHCP         = "dhcp_if"
	setLocalTypes   = "local_types"
	setPorted       = "protocols_ported"
	setPlain        = "protocols_listed"
)

// Compile turns a policy into the table that enforces it. It cannot fail: a
// Policy is valid by construction.
func Compile(p *Policy) *Ruleset {
	c := &compiler{policy: p, counters: map[string]bool{}, named: map[string]*AddressSet{}, made: map[string]bool{}, split: map[string]*split{}}
	for i := range p.Sets {
		c.named[p.Sets[i].Name] = &p.Sets[i]
	}
	rs := &Ruleset{Policy: p}
	c.baseSets()
	c.open = &group{kind: "open", iface: MetaIifname, verdict: VerdictAccept}
	for i := range p.Open {
		c.open.traffic = append(c.open.traffic, &p.Open[i].Traffic)
	}
	block := &group{kind: "block", iface: MetaIifname, verdict: VerdictDrop}
	for i := range p.Block {
		block.traffic = append(block.traffic, &p.Block[i].Traffic)
	}
	egress := &group{kind: "egress", iface: MetaOifname, verdict: VerdictAccept}
	if p.Default.Output != Accept {
		for i := range p.Egress {
			egress.traffic = append(egress.traffic, &p.Egress[i].Traffic)
		}
	}
	blocked, opened, leaving := c.group(block), c.group(c.open), c.group(egress)
	rs.opens, rs.blocks = c.open.index, block.index
	c.listedSets()

	chains := []Chain{c.gate(blocked, opened), c.backstopInput(), c.backstopForward(), c.silence()}
	if p.Default.Output != Accept {
		chains = append(chains, c.egress(leaving))
	}
	chains = append(chains, c.rewritten(blocked, opened)...)
	chains = append(chains, c.containerRoute()...)
	chains = append(chains, c.charge()...)
	chains = append(chains, c.knocked()...)
	chains = append(chains, c.essentials()...)
	chains = append(chains, c.chains...)
	if p.Default.Observe {
		observe(chains)
	}
	chains = append(chains, marks(c.sets)...)
	rs.Table = Table{Name: TableName, Comment: "managed by deadlight", Limits: c.limits, Sets: c.sets, Chains: chains}
	for name := range c.counters {
		rs.Table.Counters = append(rs.Table.Counters, name)
	}
	sort.Strings(rs.Table.Counters)
	return rs
}

type compiler struct {
	policy   *Policy
	open     *group
	sets     []Set
	limits   []Limit
	counters map[string]bool
	chains   []Chain // of the rules
	named    map[string]*AddressSet
	made     map[string]bool   // the names that address sets have been made under
	split    map[string]*split // of long lists, by such a name
}

// count names a counter and makes sure it exists.
func (c *compiler) count(name string) Expr {
	c.counters[name] = true
	return Count{name}
}

func accept() Expr            { return Verdict{Kind: VerdictAccept} }
func drop() Expr              { return Verdict{Kind: VerdictDrop} }
func jump(chain string) Expr  { return Verdict{Kind: VerdictJump, Chain: chain} }
func state(bits uint32) Expr  { return Match{Field: CtState, Number: bits} }
func l4proto(p Protocol) Expr { return Match{Field: MetaL4proto, Number: uint32(p)} }

func nfproto(v4 bool) Expr {
	if v4 {
		return Match{Field: MetaNfproto, Number: NfprotoIPv4}
	}
	return Match{Field: MetaNfproto, Number: NfprotoIPv6}
}

func line(comment string, e ...Expr) Rule { return Rule{Comment: comment, Exprs: e} }

func (c *compiler) baseSets() {
	c.sets = append(c.sets, Set{
		Name: setLocalTypes, Type: TypeFibAddr,
		Codes: []uint32{AddrLocal, AddrBroadcast, AddrAnycast, AddrMulticast},
	}, Set{
		Name: "icmp_errors", Type: TypeICMP,
		Codes: []uint32{icmpUnreachable, icmpTimeExceeded, icmpParameterProblem},
	}, Set{
		Name: "icmpv6_errors", Type: TypeICMPv6,
		Codes: []uint32{icmp6Unreachable, icmp6PacketTooBig, icmp6TimeExceeded, icmp6ParameterProblem},
	}, Set{
		Name: "icmpv6_nd", Type: TypeICMPv6,
		Codes: []uint32{icmp6RouterSolicit, icmp6RouterAdvert, icmp6NeighbourSolicit, icmp6NeighbourAdvert, icmp6Redirect},
	}, Set{
		Name: "icmpv6_mld", Type: TypeICMPv6,
		Codes: []uint32{icmp6MLDQuery, icmp6MLDReport, icmp6MLDDone, icmp6MLD2Report},
	})
	if names := c.policy.Published.Interfaces; len(names) > 0 {
		c.sets = append(c.sets, ifnameSet(setPublished, names))
	}
	if d := c.policy.DHCP; d.Client && len(d.Interfaces) > 0 {
		c.sets = append(c.sets, ifnameSet(setDHCP, d.Interfaces))
	}
}

// gate judges every packet that enters, before any DNAT.
func (c *compiler) gate(blocked, opened []Rule) Chain {
	r := []Rule{
		line("loopback", Match{Field: MetaIifname, Name: "lo"}, c.count("c_loopback"), accept()),
	}
	// route_localnet would make these reachable from a wire.
	for _, f := range []Field{IPSaddr, IPDaddr} {
		r = append(r, line("loopback address from a wire", Match{Field: f, Prefix: loopback4}, c.count("c_spoofed"), drop()))
	}
	for _, f := range []Field{IP6Saddr, IP6Daddr} {
		r = append(r, line("loopback address from a wire", Match{Field: f, Prefix: loopback6}, c.count("c_spoofed"), drop()))
	}
	r = append(r, c.replies("c_replies")...)
	if c.guardsContainers() {
		r = append(r, line("container network reached by routing",
			MatchSet{Field: MetaIifname, Set: setPublished, Not: true},
			Match{Field: FibDaddrType, Number: AddrUnicast}, jump(chainContainers)))
	}
	r = append(r,
		line("transit", MatchSet{Field: FibDaddrType, Set: setLocalTypes, Not: true}, c.count("c_transit"), accept()),
		// Some of these are untracked, hence before any test of ct state.
		line("icmp essentials", nfproto(false), l4proto(ICMPv6), jump(chainEssential6)),
		line("icmp essentials", nfproto(true), l4proto(ICMPv4), jump(chainEssential4)),
		line("igmp", nfproto(true), l4proto(IGMP), c.count("c_igmp"), accept()),
		line("invalid", state(StateInvalid), c.count("c_invalid"), drop()),
	)
	r = append(r, c.dhcp("c_dhcp")...)
	r = append(r, blocked...)
	r = append(r, c.echo()...)
	trusted := len(opened) - len(c.open.index.any)
	r = append(r, opened[:trusted]...)
	if c.policy.Default.IgnorePublished {
		r = append(r, c.leave()...)
	}
	r = append(r, opened[trusted:]...)
	r = append(r, c.knocks()...)
	r = append(r, c.refuse("c_dropped", "c_rejected", c.policy.Default.Input)...)
	return Chain{Name: chainGate, Base: &Base{Hook: Prerouting, Priority: gatePriority}, Rules: r}
}

// guardsContainers reports whether container networks may not be reached by
// routing through this host.
func (c *compiler) guardsContainers() bool {
	return !c.policy.Default.IgnorePublished && len(c.policy.Published.Interfaces) > 0
}

// leave lets pass what a DNAT may still take elsewhere: where it ends here, the
// backstop judges it. An opening of every protocol is then asked there and not at
// the gate, or each packet would count twice against its rate.
func (c *compiler) leave() []Rule {
	var r []Rule
	for _, p := range portProtocols {
		e := []Expr{l4proto(p)}
		if len(c.open.index.ports[p]) > 0 {
			e = []Expr{MatchSet{Field: dport(p), Set: listedSet(p), Not: true}}
		}
		r = append(r, line("left to published ports", append(e, c.count("c_deferred"), accept())...))
	}
	return r
}

// refuse ends a chain with the log, the reject and the drop that a policy asks for.
func (c *compiler) refuse(dropped, rejected string, action Action) []Rule {
	var r []Rule
	if log := c.policy.Log; log.Dropped {
		e := []Expr{}
		if log.Rate != nil {
			e = append(e, WithinRate{*log.Rate})
		}
		r = append(r, line("log what is dropped", append(e, c.log("drop"))...))
	}
	if action == Reject {
		r = append(r,
			line("default reject", l4proto(TCP), c.count(rejected), RejectWith{TCPReset: true}),
			line("default reject", c.count(rejected), RejectWith{}))
	}
	// The explicit drop holds while a transaction still defers the chain's policy.
	return append(r, line("default drop", c.count(dropped), drop()))
}

func (c *compiler) log(what string) Expr {
	return LogPacket{Prefix: c.policy.Log.Prefix + " " + what + ": ", Group: c.policy.Log.Group}
}

// containerRoute drops what leaves by an interface of a container network. One
// rule a pattern: nft has no named set for fib daddr oifname.
func (c *compiler) containerRoute() []Chain {
	if !c.guardsContainers() {
		return nil
	}
	ch := Chain{Name: chainContainers}
	for _, name := range c.policy.Published.Interfaces {
		ch.Rules = append(ch.Rules, line("container network reached by routing",
			Match{Field: FibDaddrOifname, Name: name}, c.count("c_container_route"), drop()))
	}
	return []Chain{ch}
}

// replies admits answers to what this host began. What a stranger began is
// judged packet by packet, so that closing a port ends its flows, unless the
// policy keeps flows.
func (c *compiler) replies(counter string) []Rule {
	established := []Expr{state(StateEstablished)}
	if !c.policy.Default.KeepFlows {
		established = append(established, Match{Field: CtDirection, Number: DirReply})
	}
	return []Rule{
		line("replies", append(established, c.count(counter), accept())...),
		line("related", state(StateRelated), c.count(counter), accept()),
	}
}

func (c *compiler) dhcp(counter string) []Rule {
	d := c.policy.DHCP
	if !d.Client {
		return nil
	}
	var in []Expr
	if len(d.Interfaces) > 0 {
		in = append(in, MatchSet{Field: MetaIifname, Set: setDHCP})
	}
	v4 := append(slices.Clone(in), nfproto(true),
		Match{Field: UDPSport, Number: 67}, Match{Field: UDPDport, Number: 68}, c.count(counter), accept())
	v6 := append(slices.Clone(in), Match{Field: IP6Saddr, Prefix: linkLocal6}, Match{Field: IP6Daddr, Prefix: linkLocal6},
		Match{Field: UDPSport, Number: 547}, Match{Field: UDPDport, Number: 546}, c.count(counter), accept())
	return []Rule{line("dhcp client", v4...), line("dhcp client", v6...)}
}

// meterTimeout is when a source is forgotten: long enough for the slowest rate
// to have refilled. It is whole seconds: the kernel keeps ticks, and nft text
// seconds, and both must read back as what was meant.
func meterTimeout(r *Rate) time.Duration {
	refill := r.Per / time.Duration(max(r.Limit, 1)) * time.Duration(max(r.Burst, 1))
	return time.Duration(seconds(max(refill, time.Minute))) * time.Second
}

// echo answers pings, within a rate if there is one.
func (c *compiler) echo() []Rule {
	i := c.policy.ICMP
	if !i.Echo {
		return nil
	}
	var r []Rule
	for _, v4 := range []bool{true, false} {
		e := []Expr{nfproto(v4), Match{Field: ICMPTypeField, Number: icmpEchoRequest}}
		if !v4 {
			e = []Expr{nfproto(v4), Match{Field: ICMPv6TypeField, Number: icmp6EchoRequest}}
		}
		switch {
		case i.Rate == nil:
		case i.Rate.PerSource:
			e = append(e, c.meter("echo_rate", v4, i.Rate, 0))
		default:
			e = append(e, c.limit("echo_limit", *i.Rate))
		}
		r = append(r, line("echo", append(e, c.count("c_echo"), accept())...))
	}
	return r
}

// limit makes a named limit on first use.
func (c *compiler) limit(name string, r Rate) Expr {
	if !slices.ContainsFunc(c.limits, func(l Limit) bool { return l.Name == name }) {
		c.limits = append(c.limits, Limit{name, r})
	}
	return WithinLimit{name}
}

// meter makes the meter of a family.
func (c *compiler) meter(name string, v4 bool, rate *Rate, connections int) Expr {
	s := Set{Name: name + "4", Type: TypeIPv4, Meter: true}
	m := MeterAdd{Field: IPSaddr, Rate: rate, Connections: connections}
	if !v4 {
		s.Name, s.Type, m.Field = name+"6", TypeIPv6, IP6Saddr
	}
	if rate != nil {
		s.MeterTimeout = meterTimeout(rate)
	}
	m.Set = s.Name
	c.sets = append(c.sets, s)
	return m
}

// essentials are the messages without which a host cannot speak IP: errors
// (RFC 4890 4.3.1, path-MTU discovery), neighbour discovery and MLD.
func (c *compiler) essentials() []Chain {
	return []Chain{{
		Name: chainEssential4,
		Rules: []Rule{
			line("icmp errors", MatchSet{Field: ICMPTypeField, Set: "icmp_errors"}, c.count("c_icmp"), accept()),
		},
	}, {
		Name: chainEssential6,
		Rules: []Rule{
			line("icmpv6 errors", MatchSet{Field: ICMPv6TypeField, Set: "icmpv6_errors"}, c.count("c_icmp"), accept()),
			// Hop limit 255 proves that no router forwarded it (RFC 4861 7.1).
			line("neighbour discovery", Match{Field: IP6Hoplimit, Number: 255},
				MatchSet{Field: ICMPv6TypeField, Set: "icmpv6_nd"}, c.count("c_icmp"), accept()),
			line("multicast listeners", Match{Field: IP6Saddr, Prefix: linkLocal6},
				MatchSet{Field: ICMPv6TypeField, Set: "icmpv6_mld"}, c.count("c_icmp"), accept()),
		},
	}}
}

// backstopInput repeats the gate's verdict by the port that conntrack saw on
// the wire: whatever rewrote the packet in between gains nothing.
func (c *compiler) backstopInput() Chain {
	const pass = "c_backstop_pass"
	r := []Rule{line("loopback", Match{Field: MetaIifname, Name: "lo"}, c.count("c_loopback_in"), accept())}
	r = append(r, c.replies(pass)...)
	for _, p := range []Protocol{ICMPv4, ICMPv6, IGMP} {
		r = append(r, line("judged by the gate", l4proto(p), c.count(pass), accept()))
	}
	r = append(r, c.dhcp(pass)...)
	if c.policy.Default.IgnorePublished {
		r = append(r, line("published", wasDNAT(), c.count(pass), accept()))
	} else {
		r = append(r, line("rewritten", wasDNAT(), jump(chainRewritten)), line("backstop", wasDNAT(), c.count("c_backstop_in"), drop()))
	}
	r = append(r, c.listed(pass)...)
	if c.policy.Default.IgnorePublished {
		if len(c.open.index.any) > 0 {
			r = append(r, line("judged by the gate", MatchSet{Field: MetaL4proto, Set: c.ported(), Not: true}, c.count(pass), accept()))
		}
		for _, i := range c.open.index.any {
			t := c.open.traffic[i]
			r = append(r, line("open "+t.Name, jump(c.open.chain(t))))
		}
		r = append(r, c.knocks()...)
		r = append(r, c.refuse("c_dropped", "c_rejected", c.policy.Default.Input)...)
		return Chain{Name: chainBackstopIn, Base: &Base{Hook: Input, Priority: backstopPriority}, Rules: r}
	}
	for _, i := range c.open.index.any {
		r = append(r, c.trusted(i, pass)...)
	}
	r = append(r, line("backstop", c.count("c_backstop_in"), drop()))
	return Chain{Name: chainBackstopIn, Base: &Base{Hook: Input, Priority: backstopPriority}, Rules: r}
}

// listedSets are the plain lists of what any opening names, for the backstops.
func (c *compiler) listedSets() {
	x := &c.open.index
	for _, p := range portProtocols {
		if segs := x.ports[p]; len(segs) > 0 {
			s := Set{Name: listedSet(p), Type: TypePort}
			for _, seg := range segs {
				s.Ports = append(s.Ports, seg.ports)
			}
			s.Ports = mergePorts(s.Ports)
			s.Interval = slices.ContainsFunc(s.Ports, isRange)
			c.sets = append(c.sets, s)
		}
	}
	if codes := plainCodes(x); len(codes) > 0 {
		c.sets = append(c.sets, Set{Name: setPlain, Type: TypeProtocol, Codes: codes})
	}
}

// listed admits what went to a listed port on the wire.
func (c *compiler) listed(counter string) []Rule {
	var r []Rule
	for _, p := range portProtocols {
		if len(c.open.index.ports[p]) == 0 {
			continue
		}
		r = append(r,
			line("listed "+p.String(), l4proto(p), MatchSet{Field: CtOriginalProtoDst, Set: listedSet(p)}, c.count(counter), accept()),
			// Untracked packets have no original port; nothing stateful rewrote them.
			line("listed "+p.String(), state(StateUntracked), MatchSet{Field: dport(p), Set: listedSet(p)}, c.count(counter), accept()))
	}
	if len(plainCodes(&c.open.index)) > 0 {
		r = append(r, line("listed protocols", MatchSet{Field: MetaL4proto, Set: setPlain}, c.count(counter), accept()))
	}
	return r
}

// trusted repeats the interface and the source of an opening for every protocol:
// there is no port to go by.
func (c *compiler) trusted(i int, counter string) []Rule {
	t := c.open.traffic[i]
	comment := "open " + t.Name
	var in []Expr
	if len(t.Interfaces) > 0 {
		in = append(in, MatchSet{Field: MetaIifname, Set: c.open.chain(t) + "_if"})
	}
	var r []Rule
	for _, from := range c.open.sources(c, t) {
		r = append(r, line(comment, append(append(slices.Clone(in), from...), c.count(counter), accept())...))
	}
	return r
}

// backstopForward judges what a DNAT sends on to a container, and with
// forward = "drop" all that is routed through this host.
func (c *compiler) backstopForward() Chain {
	const pass = "c_backstop_pass"
	d := c.policy.Default
	r := c.replies(pass)
	if d.IgnorePublished {
		r = append(r, line("published", wasDNAT(), c.count(pass), accept()))
	} else {
		if len(c.policy.Published.Interfaces) > 0 && !d.DropForward {
			from := MatchSet{Field: MetaIifname, Set: setPublished}
			r = append(r, c.notReversed(from, MatchSet{Field: MetaOifname, Set: setPublished, Not: true})...)
			r = append(r, line("from a container", from, c.count(pass), accept()))
		}
		r = append(r, line("rewritten", wasDNAT(), jump(chainRewritten)))
		r = append(r, line("backstop", wasDNAT(), c.count("c_backstop_forward"), drop()))
	}
	base := &Base{Hook: Forward, Priority: backstopPriority, Accept: !d.DropForward}
	if d.DropForward {
		r = append(r, line("transit", c.count("c_transit_dropped"), drop()))
	} else {
		r = append(r, line("transit", c.count("c_transit_forward"), accept()))
	}
	return Chain{Name: chainBackstopFw, Base: base, Rules: r}
}

// silence keeps the host from betraying a filtered port by errors that it sends
// before any rule has seen the packet.
func (c *compiler) silence() Chain {
	out := func(comment string, e ...Expr) Rule {
		return line(comment, append(e, c.count("c_silenced"), drop())...)
	}
	r := []Rule{
		// Defragmentation (-400) gives up on a lone first fragment after 30 s.
		out("reassembly time exceeded", Match{Field: ICMPTypeField, Number: icmpTimeExceeded}, Match{Field: ICMPCodeField, Number: 1}),
		out("reassembly time exceeded", Match{Field: ICMPv6TypeField, Number: icmp6TimeExceeded}, Match{Field: ICMPv6CodeField, Number: 1}),
		// The answer to an unknown hop-by-hop option leaves before prerouting.
		out("unknown ipv6 option", Match{Field: ICMPv6TypeField, Number: icmp6ParameterProblem}, Match{Field: ICMPv6CodeField, Number: 2}),
	}
	// What stays on loopback is nobody's to judge, and may be older than conntrack.
	r = append(r, c.notReversed(Match{Field: MetaOifname, Name: "lo", Not: true})...)
	r = append(r, line("output", c.count("c_output"), accept()))
	return Chain{Name: chainSilence, Base: &Base{Hook: Output, Priority: backstopPriority, Accept: true}, Rules: r}
}

// notReversed drops a segment from the middle of a connection that conntrack does
// not know. A stranger can make conntrack forget a flow, by a reset that the gate
// drops; the next segment from here would enter it anew as begun from here, and
// the closed port would be open to that stranger again.
func (c *compiler) notReversed(where ...Expr) []Rule {
	if c.policy.Default.KeepFlows {
		return nil
	}
	e := append([]Expr{state(StateNew), Match{Field: TCPFlags, Number: FlagSYN, Not: true}}, where...)
	return []Rule{line("flow that nobody began", append(e, c.count(countReversed), drop())...)}
}

// egress judges what leaves, when not everything may.
func (c *compiler) egress(leaving []Rule) Chain {
	const pass = "c_egress_pass"
	r := []Rule{
		line("loopback", Match{Field: MetaOifname, Name: "lo"}, c.count(pass), accept()),
		line("replies", state(StateEstablished), Match{Field: CtDirection, Number: DirReply}, c.count(pass), accept()),
		line("related", state(StateRelated), c.count(pass), accept()),
		line("icmp errors", nfproto(true), MatchSet{Field: ICMPTypeField, Set: "icmp_errors"}, c.count(pass), accept()),
		line("igmp", nfproto(true), l4proto(IGMP), c.count(pass), accept()),
	}
	for _, set := range []string{"icmpv6_errors", "icmpv6_nd", "icmpv6_mld"} {
		r = append(r, line("icmpv6 essentials", nfproto(false), MatchSet{Field: ICMPv6TypeField, Set: set}, c.count(pass), accept()))
	}
	if c.policy.Default.KeepFlows {
		r = append(r, line("established", state(StateEstablished), c.count(pass), accept()))
	}
	if c.policy.DHCP.Client {
		r = append(r,
			line("dhcp client", nfproto(true), Match{Field: UDPSport, Number: 68}, Match{Field: UDPDport, Number: 67}, c.count(pass), accept()),
			line("dhcp client", nfproto(false), Match{Field: UDPSport, Number: 546}, Match{Field: UDPDport, Number: 547}, c.count(pass), accept()))
	}
	r = append(r, leaving...)
	r = append(r, c.refuse("c_egress_dropped", "c_egress_rejected", c.policy.Default.Output)...)
	return Chain{Name: chainEgress, Base: &Base{Hook: Output, Priority: backstopPriority + 1}, Rules: r}
}

// observe turns every refusal into an acceptance that the same counter counts.
func observe(chains []Chain) {
	for i := range chains {
		ch := &chains[i]
		if ch.Base != nil {
			ch.Base.Accept = true
		}
		for _, r := range ch.Rules {
			last := len(r.Exprs) - 1
			switch e := r.Exprs[last].(type) {
			case RejectWith:
				r.Exprs[last] = accept()
			case Verdict:
				if e.Kind == VerdictDrop {
					r.Exprs[last] = accept()
				}
			}
		}
	}
}
