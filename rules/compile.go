package rules

import (
	"fmt"
	"slices"
	"sort"
	"strings"
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
	chainContainers = "container_route"
	setPublished    = "published_if"
	setDHCP         = "dhcp_if"
	setLocalTypes   = "local_types"
)

// Compile turns a policy into the table that enforces it. It cannot fail: a
// Policy is valid by construction.
func Compile(p *Policy) *Ruleset {
	c := &compiler{policy: p, counters: map[string]bool{}}
	c.baseSets()
	c.openSets()
	gate, rest := c.gate(), append(c.containerRoute(), c.essentials()...)
	rest = append(rest, c.openChains()...)
	chains := []Chain{gate, c.backstopInput(), c.backstopForward(), c.silence()}
	t := Table{
		Name:    TableName,
		Comment: "managed by deadlight",
		Sets:    c.sets,
		Chains:  append(chains, rest...),
	}
	for name := range c.counters {
		t.Counters = append(t.Counters, name)
	}
	sort.Strings(t.Counters)
	return &Ruleset{Policy: p, Table: t, index: c.index}
}

type compiler struct {
	policy   *Policy
	sets     []Set
	counters map[string]bool
	index    map[Protocol][]segment
	shared   []Chain // chains for ports that several openings share
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
func nfproto(f Family) Expr {
	if f == IPv4 {
		return Match{Field: MetaNfproto, Number: NfprotoIPv4}
	}
	return Match{Field: MetaNfproto, Number: NfprotoIPv6}
}
func line(comment string, e ...Expr) Rule {
	return Rule{Comment: comment, Exprs: e}
}

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
func (c *compiler) gate() Chain {
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
	if len(c.policy.Published.Interfaces) > 0 {
		r = append(r, line("container network reached by routing",
			MatchSet{Field: MetaIifname, Set: setPublished, Not: true},
			Match{Field: FibDaddrType, Number: AddrUnicast}, jump(chainContainers)))
	}
	r = append(r,
		line("transit", MatchSet{Field: FibDaddrType, Set: setLocalTypes, Not: true}, c.count("c_transit"), accept()),
		// Some of these are untracked, hence before any test of ct state.
		line("icmp essentials", nfproto(IPv6), l4proto(ICMPv6), jump(chainEssential6)),
		line("icmp essentials", nfproto(IPv4), l4proto(ICMPv4), jump(chainEssential4)),
		line("igmp", nfproto(IPv4), l4proto(IGMP), c.count("c_igmp"), accept()),
		line("invalid", state(StateInvalid), c.count("c_invalid"), drop()),
	)
	r = append(r, c.dhcp("c_dhcp")...)
	if c.policy.ICMP.Echo {
		r = append(r,
			line("echo", nfproto(IPv4), Match{Field: ICMPTypeField, Number: icmpEchoRequest}, c.count("c_echo"), accept()),
			line("echo", nfproto(IPv6), Match{Field: ICMPv6TypeField, Number: icmp6EchoRequest}, c.count("c_echo"), accept()))
	}
	for _, p := range portProtocols {
		if len(c.index[p]) > 0 {
			r = append(r, line("open", VerdictMap{Field: dport(p), Map: openMap(p)}))
		}
	}
	if c.policy.Default.Input == Reject {
		r = append(r,
			line("default reject", l4proto(TCP), c.count("c_rejected"), RejectWith{TCPReset: true}),
			line("default reject", c.count("c_rejected"), RejectWith{}))
	}
	// The explicit drop holds while a transaction still defers the chain's policy.
	r = append(r, line("default drop", c.count("c_dropped"), drop()))
	return Chain{Name: chainGate, Base: &Base{Hook: Prerouting, Priority: gatePriority}, Rules: r}
}

// containerRoute drops what leaves by an interface of a container network. One
// rule a pattern: nft has no named set for fib daddr oifname.
func (c *compiler) containerRoute() []Chain {
	ch := Chain{Name: chainContainers}
	for _, name := range c.policy.Published.Interfaces {
		ch.Rules = append(ch.Rules, line("container network reached by routing",
			Match{Field: FibDaddrOifname, Name: name}, c.count("c_container_route"), drop()))
	}
	if len(ch.Rules) == 0 {
		return nil
	}
	return []Chain{ch}
}

// replies admits answers to what this host began. What a stranger began is
// judged packet by packet, so that closing a port ends its flows.
func (c *compiler) replies(counter string) []Rule {
	return []Rule{
		line("replies", state(StateEstablished), Match{Field: CtDirection, Number: DirReply}, c.count(counter), accept()),
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
	v4 := append(slices.Clone(in), nfproto(IPv4),
		Match{Field: UDPSport, Number: 67}, Match{Field: UDPDport, Number: 68}, c.count(counter), accept())
	v6 := append(slices.Clone(in), Match{Field: IP6Saddr, Prefix: linkLocal6}, Match{Field: IP6Daddr, Prefix: linkLocal6},
		Match{Field: UDPSport, Number: 547}, Match{Field: UDPDport, Number: 546}, c.count(counter), accept())
	return []Rule{line("dhcp client", v4...), line("dhcp client", v6...)}
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
	r = append(r, line("transit taken in by tproxy", Match{Field: FibDaddrType, Number: AddrUnicast}, c.count(pass), accept()))
	r = append(r, c.dhcp(pass)...)
	r = append(r, c.listed(pass)...)
	r = append(r, line("backstop", c.count("c_backstop_in"), drop()))
	return Chain{Name: chainBackstopIn, Base: &Base{Hook: Input, Priority: backstopPriority}, Rules: r}
}

// listed admits what went to a listed port on the wire.
func (c *compiler) listed(counter string) []Rule {
	var r []Rule
	for _, p := range portProtocols {
		if len(c.index[p]) == 0 {
			continue
		}
		r = append(r,
			line("listed "+p.String(), l4proto(p), MatchSet{Field: CtOriginalProtoDst, Set: listedSet(p)}, c.count(counter), accept()),
			// Untracked packets have no original port; nothing stateful rewrote them.
			line("listed "+p.String(), state(StateUntracked), MatchSet{Field: dport(p), Set: listedSet(p)}, c.count(counter), accept()))
	}
	return r
}

// backstopForward judges what a DNAT sends on to a container; other transit is
// none of this host's ports.
func (c *compiler) backstopForward() Chain {
	const pass = "c_backstop_pass"
	r := c.replies(pass)
	if len(c.policy.Published.Interfaces) > 0 {
		r = append(r, line("from a container", MatchSet{Field: MetaIifname, Set: setPublished}, c.count(pass), accept()))
	}
	for _, p := range portProtocols {
		if len(c.index[p]) > 0 {
			r = append(r, line("listed "+p.String(), Match{Field: CtStatus, Number: StatusDNAT}, l4proto(p),
				MatchSet{Field: CtOriginalProtoDst, Set: listedSet(p)}, c.count(pass), accept()))
		}
	}
	r = append(r,
		line("backstop", Match{Field: CtStatus, Number: StatusDNAT}, c.count("c_backstop_forward"), drop()),
		line("transit", c.count("c_transit_forward"), accept()))
	return Chain{Name: chainBackstopFw, Base: &Base{Hook: Forward, Priority: backstopPriority, Accept: true}, Rules: r}
}

// silence keeps the host from betraying a filtered port by errors that it sends
// before any rule has seen the packet.
func (c *compiler) silence() Chain {
	out := func(comment string, e ...Expr) Rule {
		return line(comment, append(e, c.count("c_silenced"), drop())...)
	}
	return Chain{Name: chainSilence, Base: &Base{Hook: Output, Priority: backstopPriority, Accept: true}, Rules: []Rule{
		// Defragmentation (-400) gives up on a lone first fragment after 30 s.
		out("reassembly time exceeded", Match{Field: ICMPTypeField, Number: icmpTimeExceeded}, Match{Field: ICMPCodeField, Number: 1}),
		out("reassembly time exceeded", Match{Field: ICMPv6TypeField, Number: icmp6TimeExceeded}, Match{Field: ICMPv6CodeField, Number: 1}),
		// The answer to an unknown hop-by-hop option leaves before prerouting.
		out("unknown ipv6 option", Match{Field: ICMPv6TypeField, Number: icmp6ParameterProblem}, Match{Field: ICMPv6CodeField, Number: 2}),
		line("output", c.count("c_output"), accept()),
	}}
}

// portProtocols are the protocols with ports, in the order of the gate.
var portProtocols = [...]Protocol{TCP, UDP}

func dport(p Protocol) Field {
	if p == UDP {
		return UDPDport
	}
	return TCPDport
}

func openMap(p Protocol) string   { return p.String() + "_open" }
func listedSet(p Protocol) string { return p.String() + "_listed" }

// segment is a run of ports with the same openings.
type segment struct {
	ports PortRange
	opens []int // indices into Policy.Open, ascending
}

// segments cuts the ports of a protocol where the list of openings changes.
func segments(opens []Open, proto Protocol) []segment {
	type edge struct {
		at   int // a port, 65536 past the end
		open int
		end  bool
	}
	var edges []edge
	for i, o := range opens {
		for _, r := range o.Ports(proto) {
			edges = append(edges, edge{int(r.Lo), i, false}, edge{int(r.Hi) + 1, i, true})
		}
	}
	sort.Slice(edges, func(a, b int) bool { return edges[a].at < edges[b].at })
	var out []segment
	var active []int // sorted
	for i := 0; i < len(edges); {
		at := edges[i].at
		for ; i < len(edges) && edges[i].at == at; i++ {
			k, found := slices.BinarySearch(active, edges[i].open)
			switch {
			case edges[i].end && found:
				active = slices.Delete(active, k, k+1)
			case !edges[i].end && !found:
				active = slices.Insert(active, k, edges[i].open)
			}
		}
		if len(active) == 0 || i == len(edges) {
			continue
		}
		out = append(out, segment{PortRange{uint16(at), uint16(edges[i].at - 1)}, slices.Clone(active)})
	}
	return out
}

// openSets makes the verdict map of every protocol, the plain list of its ports
// for the backstops, and the sources and interfaces of the openings.
func (c *compiler) openSets() {
	c.index = map[Protocol][]segment{}
	for _, p := range portProtocols {
		segs := segments(c.policy.Open, p)
		if len(segs) == 0 {
			continue
		}
		c.index[p] = segs
		m := Set{Name: openMap(p), Type: TypePort}
		listed := Set{Name: listedSet(p), Type: TypePort}
		seen := map[string]string{}
		for _, s := range segs {
			listed.Ports = append(listed.Ports, s.ports)
			target := c.target(p, s, seen)
			if n := len(m.Ports) - 1; n >= 0 && m.Ports[n].Hi+1 == s.ports.Lo && m.Targets[n] == target {
				m.Ports[n].Hi = s.ports.Hi // another opening begins or ends here, but adds nothing
			} else {
				m.Ports, m.Targets = append(m.Ports, s.ports), append(m.Targets, target)
			}
		}
		m.Interval = slices.ContainsFunc(m.Ports, isRange)
		listed.Ports = mergePorts(listed.Ports)
		listed.Interval = slices.ContainsFunc(listed.Ports, isRange)
		c.sets = append(c.sets, m, listed)
	}
	used := map[string]bool{}
	for i := range c.policy.Open {
		o := &c.policy.Open[i]
		if len(o.Interfaces) > 0 {
			c.sets = append(c.sets, ifnameSet(openChain(o)+"_if", o.Interfaces))
		}
		v4, v6 := splitFamilies(o.From.Ranges)
		if o.Family.Has(true) {
			c.addrSet(openChain(o)+"_from4", TypeIPv4, v4)
		}
		if o.Family.Has(false) {
			c.addrSet(openChain(o)+"_from6", TypeIPv6, v6)
		}
		for _, name := range o.From.Sets {
			used[name] = true
		}
	}
	for i := range c.policy.Sets {
		s := &c.policy.Sets[i]
		if used[s.Name] {
			v4, v6 := splitFamilies(s.Ranges)
			c.addrSet(namedSet(s.Name, true), TypeIPv4, v4)
			c.addrSet(namedSet(s.Name, false), TypeIPv6, v6)
		}
	}
}

func isRange(r PortRange) bool { return r.Lo != r.Hi }

// target is the chain that judges a segment: that of its one opening, or one
// that asks each in turn.
func (c *compiler) target(p Protocol, s segment, seen map[string]string) string {
	for _, i := range s.opens {
		if unrestricted(&c.policy.Open[i]) {
			return openChain(&c.policy.Open[i]) // it admits everybody: the others cannot add to that
		}
	}
	if len(s.opens) == 1 {
		return openChain(&c.policy.Open[s.opens[0]])
	}
	key := fmt.Sprint(s.opens)
	if name, ok := seen[key]; ok {
		return name
	}
	ch := Chain{Name: fmt.Sprintf("%s_%d", p, s.ports.Lo)}
	for _, i := range s.opens {
		o := &c.policy.Open[i]
		ch.Rules = append(ch.Rules, line("open "+o.Name, jump(openChain(o))))
	}
	c.shared = append(c.shared, ch)
	seen[key] = ch.Name
	return ch.Name
}

func unrestricted(o *Open) bool {
	return o.From.Any && len(o.Interfaces) == 0 && o.Family == Both
}

func openChain(o *Open) string { return "open_" + o.Name }

func namedSet(name string, v4 bool) string {
	if v4 {
		return "set_" + name + "_4"
	}
	return "set_" + name + "_6"
}

func (c *compiler) addrSet(name string, t SetType, ranges []AddrRange) {
	if len(ranges) == 0 {
		return
	}
	interval := slices.ContainsFunc(ranges, func(r AddrRange) bool { return r.Lo != r.Hi })
	c.sets = append(c.sets, Set{Name: name, Type: t, Interval: interval, Addrs: ranges})
}

// ifnameSet keeps exact names in a hash set; a prefix makes it an interval set.
func ifnameSet(name string, names []string) Set {
	names = slices.Clone(names)
	slices.Sort(names)
	names = slices.Compact(names)
	// A prefix swallows the names it covers: intervals must not overlap.
	var kept []string
	for _, n := range names {
		if !slices.ContainsFunc(names, func(p string) bool {
			return p != n && strings.HasSuffix(p, "*") && MatchInterface(p, strings.TrimSuffix(n, "*"))
		}) {
			kept = append(kept, n)
		}
	}
	wild := slices.ContainsFunc(kept, func(n string) bool { return strings.HasSuffix(n, "*") })
	return Set{Name: name, Type: TypeIfname, Interval: wild, Names: kept}
}

func splitFamilies(ranges []AddrRange) (v4, v6 []AddrRange) {
	k := slices.IndexFunc(ranges, func(r AddrRange) bool { return !r.Lo.Is4() })
	if k < 0 {
		k = len(ranges)
	}
	return ranges[:k], ranges[k:]
}

// openChains gives each opening its chain: the restrictions, then the verdict.
func (c *compiler) openChains() []Chain {
	out := c.shared
	for i := range c.policy.Open {
		o := &c.policy.Open[i]
		comment := "open " + o.Name
		ch := Chain{Name: openChain(o)}
		if len(o.Interfaces) > 0 {
			ch.Rules = append(ch.Rules, line(comment,
				MatchSet{Field: MetaIifname, Set: openChain(o) + "_if", Not: true}, Verdict{Kind: VerdictReturn}))
		}
		admit := func(match ...Expr) {
			ch.Rules = append(ch.Rules, line(comment, append(match, c.count(openChain(o)), accept())...))
		}
		if o.From.Any {
			if o.Family == Both {
				admit()
			} else {
				admit(nfproto(o.Family))
			}
			out = append(out, ch)
			continue
		}
		for _, v4 := range []bool{true, false} {
			if !o.Family.Has(v4) {
				continue
			}
			field, suffix := IPSaddr, "_from4"
			if !v4 {
				field, suffix = IP6Saddr, "_from6"
			}
			if has(o.From.Ranges, v4) {
				admit(MatchSet{Field: field, Set: openChain(o) + suffix})
			}
			for _, name := range o.From.Sets {
				if has(c.policy.Set(name).Ranges, v4) {
					admit(MatchSet{Field: field, Set: namedSet(name, v4)})
				}
			}
		}
		out = append(out, ch)
	}
	return out
}

func has(ranges []AddrRange, v4 bool) bool {
	return slices.ContainsFunc(ranges, func(r AddrRange) bool { return r.Lo.Is4() == v4 })
}
