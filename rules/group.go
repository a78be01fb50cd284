package rules

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
)

// portProtocols are the protocols with ports, in the order of the gate.
var portProtocols = [...]Protocol{TCP, UDP, SCTP}

func dport(p Protocol) Field {
	switch p {
	case UDP:
		return UDPDport
	case SCTP:
		return SCTPDport
	}
	return TCPDport
}

func listedSet(p Protocol) string { return p.String() + "_listed" }

func isRange(r PortRange) bool { return r.Lo != r.Hi }

// group is a kind of rule: one lookup a protocol finds the rules that name a
// port, however many there are.
type group struct {
	kind    string // "open", "block" or "egress"
	iface   Field
	verdict VerdictKind
	traffic []*Traffic
	index   portIndex
}

func (g *group) chain(t *Traffic) string { return g.kind + "_" + t.Name }

func plainCodes(x *portIndex) []uint32 {
	var codes []uint32
	for p := range x.plain {
		codes = append(codes, uint32(p))
	}
	slices.Sort(codes)
	return codes
}

// group compiles a kind of rule: its maps, sets and chains, and the rules that
// lead there.
func (c *compiler) group(g *group) []Rule {
	g.index = indexRules(g.traffic)
	var r []Rule
	for _, p := range portProtocols {
		segs := g.index.ports[p]
		if len(segs) == 0 {
			continue
		}
		m := Set{Name: p.String() + "_" + g.kind, Type: TypePort}
		seen := map[string]string{}
		for _, s := range segs {
			to := c.target(g, fmt.Sprintf("%s_%s_%d", p, g.kind, s.ports.Lo), s.rules, seen)
			if n := len(m.Ports) - 1; n >= 0 && m.Ports[n].Hi+1 == s.ports.Lo && m.Targets[n] == to {
				m.Ports[n].Hi = s.ports.Hi // another rule begins or ends here, but adds nothing
			} else {
				m.Ports, m.Targets = append(m.Ports, s.ports), append(m.Targets, to)
			}
		}
		m.Interval = slices.ContainsFunc(m.Ports, isRange)
		c.sets = append(c.sets, m)
		r = append(r, line(g.kind, VerdictMap{Field: dport(p), Map: m.Name}))
	}
	if codes := plainCodes(&g.index); len(codes) > 0 {
		m := Set{Name: "protocols_" + g.kind, Type: TypeProtocol, Codes: codes}
		seen := map[string]string{}
		for _, code := range codes {
			m.Targets = append(m.Targets, c.target(g, fmt.Sprintf("protocol_%s_%d", g.kind, code), g.index.plain[Protocol(code)], seen))
		}
		c.sets = append(c.sets, m)
		r = append(r, line(g.kind, VerdictMap{Field: MetaL4proto, Map: m.Name}))
	}
	for _, i := range g.index.any {
		r = append(r, line(g.kind+" "+g.traffic[i].Name, jump(g.chain(g.traffic[i]))))
	}
	for i := range g.traffic {
		c.ruleChain(g, i)
	}
	c.namedSets(g)
	return r
}

// target is the chain that judges what a list of rules names: that of its one
// rule, or one that asks each in turn.
func (c *compiler) target(g *group, name string, list []int, seen map[string]string) string {
	for _, i := range list {
		if c.unrestricted(g, i) {
			return g.chain(g.traffic[i]) // it takes everybody: the others cannot add to that
		}
	}
	if len(list) == 1 {
		return g.chain(g.traffic[list[0]])
	}
	key := fmt.Sprint(list)
	if old, ok := seen[key]; ok {
		return old
	}
	ch := Chain{Name: name}
	for _, i := range list {
		ch.Rules = append(ch.Rules, line(g.kind+" "+g.traffic[i].Name, jump(g.chain(g.traffic[i]))))
	}
	c.chains = append(c.chains, ch)
	seen[key] = name
	return name
}

// unrestricted reports whether a rule takes every packet that names its ports.
func (c *compiler) unrestricted(g *group, i int) bool {
	t := g.traffic[i]
	plain := t.From.Any && len(t.Interfaces) == 0 && t.Family == Both && t.Expires.IsZero() && t.To.anywhere() && t.Except.nobody()
	switch g.kind {
	case "open":
		o := &c.policy.Open[i]
		return plain && o.Rate == nil && o.Connections == 0
	case "egress":
		o := &c.policy.Egress[i]
		return plain && o.User == "" && o.Group == ""
	}
	return plain
}

// anywhere reports whether a source, or a destination, was left out.
func (s *Source) anywhere() bool { return s.Any || s.nobody() }

func (s *Source) nobody() bool { return !s.Any && len(s.Ranges) == 0 && len(s.Sets) == 0 }

// ruleChain gives a rule its chain: what it is not about returns, the rest meets
// its verdict.
func (c *compiler) ruleChain(g *group, i int) {
	t := g.traffic[i]
	name, comment := g.chain(t), g.kind+" "+t.Name
	ch := Chain{Name: name}
	if t.Bans != nil {
		for _, v4 := range []bool{true, false} {
			s := banSet(name, v4, t.Bans)
			c.sets = append(c.sets, s)
			ch.Rules = append(ch.Rules, line(comment, append([]Expr{MatchSet{Field: saddr(v4), Set: s.Name}}, c.verdict(g, i)...)...))
		}
		c.chains = append(c.chains, ch)
		return
	}
	miss := func(e ...Expr) {
		ch.Rules = append(ch.Rules, line(comment, append(e, Verdict{Kind: VerdictReturn})...))
	}
	if !t.Expires.IsZero() {
		// The kernel takes the elements away when the time has come, with no process alive.
		c.sets = append(c.sets, Set{Name: name + untilEnd, Type: TypeNfproto, Codes: []uint32{NfprotoIPv4, NfprotoIPv6}, Until: t.Expires})
		miss(MatchSet{Field: MetaNfproto, Set: name + untilEnd, Not: true})
	}
	if len(t.Interfaces) > 0 {
		c.sets = append(c.sets, ifnameSet(name+"_if", t.Interfaces))
		miss(MatchSet{Field: g.iface, Set: name + "_if", Not: true})
	}
	for _, v4 := range []bool{true, false} {
		if !t.Family.Has(v4) {
			continue
		}
		if !t.To.anywhere() {
			for _, m := range g.outside(c, t, v4) {
				miss(m...)
			}
			c.addrSets(name+"_to"+familySuffix(v4), RangesOf(ofFamily(t.To.Ranges, v4)...))
		}
		c.ownSet(name+"_except", &t.Except, v4)
		for _, m := range c.matches(name+"_except", &t.Except, v4) {
			miss(m)
		}
	}
	end := c.verdict(g, i)
	for _, from := range g.sources(c, t) {
		ch.Rules = append(ch.Rules, line(comment, append(slices.Clone(from), end...)...))
	}
	for _, v4 := range []bool{true, false} {
		if t.Family.Has(v4) {
			c.ownSet(name+"_from", &t.From, v4)
		}
	}
	c.chains = append(c.chains, ch)
	if g.kind == "open" {
		c.admission(&c.policy.Open[i])
	}
}

// verdict ends the rules of a chain.
func (c *compiler) verdict(g *group, i int) []Expr {
	t := g.traffic[i]
	var e []Expr
	switch g.kind {
	case "open":
		if o := &c.policy.Open[i]; o.Rate != nil || o.Connections > 0 || o.Log {
			return []Expr{Verdict{Kind: VerdictGoto, Chain: "admit_" + o.Name}}
		}
	case "egress":
		o := &c.policy.Egress[i]
		if o.User != "" {
			e = append(e, Match{Field: MetaSkuid, Name: o.User})
		}
		if o.Group != "" {
			e = append(e, Match{Field: MetaSkgid, Name: o.Group})
		}
	}
	if t.Log {
		e = append(e, c.log(g.kind+" "+t.Name))
	}
	return append(e, c.count(g.chain(t)), Verdict{Kind: g.verdict})
}

// admission is the rest of an opening with a rate, a number of connections or a
// log: running flows pass, new ones must keep within the limits.
func (c *compiler) admission(o *Open) {
	if o.Rate == nil && o.Connections == 0 && !o.Log {
		return
	}
	comment, name := "open "+o.Name, "open_"+o.Name
	ch := Chain{Name: "admit_" + o.Name, Rules: []Rule{line(comment, state(StateEstablished), c.count(name), accept())}}
	ch.Rules = append(ch.Rules, c.charged(comment, name)...)
	for _, v4 := range []bool{true, false} {
		if !o.Family.Has(v4) {
			continue
		}
		e := []Expr{nfproto(v4)}
		if o.Connections > 0 {
			e = append(e, c.meter(name+"_conn", v4, nil, o.Connections))
		}
		if o.Rate != nil && o.Rate.PerSource {
			e = append(e, c.meter(name+"_rate", v4, o.Rate, 0))
		} else if o.Rate != nil {
			e = append(e, c.limit("rate_"+o.Name, *o.Rate))
		}
		if o.Log {
			e = append(e, c.log(comment))
		}
		ch.Rules = append(ch.Rules, line(comment, append(e, c.count(name), accept())...))
	}
	if o.Log && (o.Rate != nil || o.Connections > 0) {
		ch.Rules = append(ch.Rules, line(comment, c.log("over the limit "+o.Name)))
	}
	c.chains = append(c.chains, ch)
}

func saddr(v4 bool) Field {
	if v4 {
		return IPSaddr
	}
	return IP6Saddr
}

func daddr(v4 bool) Field {
	if v4 {
		return IPDaddr
	}
	return IP6Daddr
}

// originalDaddr is the address as it stood on the wire.
func originalDaddr(v4 bool) Field {
	if v4 {
		return CtOriginalIPDaddr
	}
	return CtOriginalIP6Daddr
}

// sources are the alternatives by which a packet comes from where a rule says:
// one rule of a chain each.
func (g *group) sources(c *compiler, t *Traffic) [][]Expr {
	if t.From.Any {
		if t.Family == Both {
			return [][]Expr{nil}
		}
		return [][]Expr{{nfproto(t.Family == IPv4)}}
	}
	var out [][]Expr
	for _, v4 := range []bool{true, false} {
		if t.Family.Has(v4) {
			for _, m := range c.matches(g.chain(t)+"_from", &t.From, v4) {
				out = append(out, []Expr{m})
			}
		}
	}
	return out
}

func familySuffix(v4 bool) string {
	if v4 {
		return "4"
	}
	return "6"
}

func namedSet(name string, v4 bool) string { return "set_" + name + "_" + familySuffix(v4) }

// lookups match an address, of a packet of a family, that is in one of the kernel
// sets that hold ranges under a name: any of them.
func (c *compiler) lookups(name string, field Field, ranges AddrRanges) []MatchSet {
	var out []MatchSet
	c.parts(name, ranges, func(s Set) {
		m := MatchSet{Field: field, Set: s.Name}
		if p := s.Part; p > 0 && int(p) < ranges.At(0).Lo.BitLen() {
			m.Bits = int(p)
		}
		out = append(out, m)
	})
	return out
}

// addrSets makes the kernel sets that hold ranges under a name, once.
func (c *compiler) addrSets(name string, ranges AddrRanges) {
	if !c.made[name] {
		c.made[name] = true
		c.parts(name, ranges, func(s Set) { c.sets = append(c.sets, s) })
	}
}

// namedLookups are the lookups in the sets that a source names.
func (c *compiler) namedLookups(s *Source, field Field, v4 bool) []MatchSet {
	var out []MatchSet
	for _, name := range s.Sets {
		out = append(out, c.lookups(namedSet(name, v4), field, c.named[name].Ranges.Of(v4))...)
	}
	return out
}

// single is the prefix that a source's own addresses of a family are, if they are
// but one: it is compared in place, without a set.
func single(s *Source, v4 bool) (netip.Prefix, bool) {
	if own := ofFamily(s.Ranges, v4); len(own) == 1 {
		return own[0].Prefix()
	}
	return netip.Prefix{}, false
}

// matches are the alternatives by which a packet's source is among a Source's
// addresses of a family.
func (c *compiler) matches(own string, s *Source, v4 bool) []Expr {
	var out []Expr
	var sets []MatchSet
	if p, one := single(s, v4); one {
		out = append(out, Match{Field: saddr(v4), Prefix: p})
	} else {
		sets = c.lookups(own+familySuffix(v4), saddr(v4), RangesOf(ofFamily(s.Ranges, v4)...))
	}
	for _, m := range append(sets, c.namedLookups(s, saddr(v4), v4)...) {
		out = append(out, m)
	}
	return out
}

// outside are the alternatives by which a packet of a family does not go where a
// rule says.
func (g *group) outside(c *compiler, t *Traffic, v4 bool) [][]Expr {
	none := func(field Field, e ...Expr) []Expr {
		own := RangesOf(ofFamily(t.To.Ranges, v4)...)
		for _, m := range append(c.lookups(g.chain(t)+"_to"+familySuffix(v4), field, own), c.namedLookups(&t.To, field, v4)...) {
			m.Not = true
			e = append(e, m)
		}
		return e
	}
	to := none(daddr(v4))
	switch {
	case len(to) == 0:
		return [][]Expr{{nfproto(v4)}}
	case g.kind == "egress":
		return [][]Expr{to}
	}
	// These chains are asked behind a DNAT too. What is untracked has no original.
	return [][]Expr{none(originalDaddr(v4)), none(daddr(v4), state(StateUntracked))}
}

// ownSet makes the set of the addresses that a rule names itself, where matches
// asks for one.
func (c *compiler) ownSet(own string, s *Source, v4 bool) {
	if _, one := single(s, v4); !one {
		c.addrSets(own+familySuffix(v4), RangesOf(ofFamily(s.Ranges, v4)...))
	}
}

// namedSets makes the policy's sets that the rules of a group name.
func (c *compiler) namedSets(g *group) {
	for _, t := range g.traffic {
		for _, list := range [][]string{t.From.Sets, t.Except.Sets, t.To.Sets} {
			for _, name := range list {
				for _, v4 := range []bool{true, false} {
					c.addrSets(namedSet(name, v4), c.named[name].Ranges.Of(v4))
				}
			}
		}
	}
}

// ofFamily is the part of ranges, as [Source.Ranges] keeps them, of one family.
func ofFamily(ranges []AddrRange, v4 bool) []AddrRange {
	k := sort.Search(len(ranges), func(i int) bool { return !ranges[i].Lo.Is4() })
	if v4 {
		return ranges[:k]
	}
	return ranges[k:]
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
