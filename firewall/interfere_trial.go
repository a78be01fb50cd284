package firewall

import (
	"fmt"
	"iter"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// trial walks packets that the policy opens through the tables of others. Ours
// is left out: what it holds now need not be the policy.
type trial struct {
	rs    *rules.Ruleset
	rules *liveRules
	host  *hostView
	conn  *Conn
	found *findings
	named []uint16 // where, among ports, a foreign verdict may change
	walks int
	cut   bool
}

// maxWalks bounds the work of a policy of many openings and interfaces.
const maxWalks = 20000

// wholeRange is the longest range of which every port is tried.
const wholeRange = 128

func (t *trial) run() error {
	var err error
	if t.named, err = t.rules.namedPorts(t.conn); err != nil {
		return err
	}
	for i := range t.rs.Policy.Open {
		o := &t.rs.Policy.Open[i]
		for _, on := range t.interfaces(o.Interfaces) {
			for _, v4 := range []bool{true, false} {
				if !o.Family.Has(v4) || !t.speaks(on, v4) {
					continue
				}
				for _, src := range t.strangers(&o.From, on, v4) {
					for _, p := range t.ports(&o.Traffic, v4) {
						if err := t.try(o, on, src, p); err != nil {
							return err
						}
					}
				}
			}
		}
	}
	if t.cut {
		t.found.add(Interference{
			Severity: May, Unknown: true, Kind: "chain", Where: "other tables",
			Fact: fmt.Sprintf("Could not tell of every opening: the policy has more than the %d combinations of port, source and interface that are tried.", maxWalks),
		})
	}
	return nil
}

// interfaces are those that an opening's packets may enter by.
func (t *trial) interfaces(patterns []string) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(t.host.links)) {
		switch {
		case len(patterns) == 0 && name != "lo" && len(t.host.links[name].addrs) > 0:
			out = append(out, name)
		case slices.ContainsFunc(patterns, func(p string) bool { return rules.MatchInterface(p, name) }):
			out = append(out, name)
		}
	}
	if len(out) == 0 && len(patterns) > 0 {
		out = append(out, strings.Replace(patterns[0], "*", "0", 1)) // it need not exist yet
	}
	if len(out) == 0 {
		out = append(out, "")
	}
	return out
}

// speaks reports whether the interface has an address of the family that others
// than its neighbours reach; one that is not there may get one.
func (t *trial) speaks(in string, v4 bool) bool {
	l, there := t.host.links[in]
	return !there || t.address(l, v4).IsValid()
}

func (t *trial) address(l hostLink, v4 bool) netip.Addr {
	for _, a := range l.addrs {
		if a.Is4() == v4 && !a.IsLinkLocalUnicast() {
			return a
		}
	}
	return netip.Addr{}
}

// strangers gives the sources that an opening is tried from.
func (t *trial) strangers(from *rules.Source, in string, v4 bool) []netip.Addr {
	if !from.Any {
		return t.sources(from, v4)
	}
	a := netip.MustParseAddr("2001:db8:ffff:ffff::77") // RFC 3849
	if v4 {
		a = netip.MustParseAddr("203.0.113.251") // RFC 5737
	}
	if t.host.route != nil {
		_, _, reached := t.host.route(a)
		// Without a way to strangers only neighbours get an answer.
		if near := t.address(t.host.links[in], v4).Next(); !reached && near.IsValid() {
			a = near
		}
	}
	return []netip.Addr{a}
}

// sources gives an address of every list that an opening names.
func (t *trial) sources(from *rules.Source, v4 bool) []netip.Addr {
	var out []netip.Addr
	first := func(ranges iter.Seq[rules.AddrRange]) {
		for r := range ranges {
			if r.Lo.Is4() == v4 {
				out = append(out, inner(r))
				return
			}
		}
	}
	first(slices.Values(from.Ranges))
	for _, name := range from.Sets {
		if s := t.rs.Policy.Set(name); s != nil {
			first(s.Ranges.All())
		}
	}
	return out
}

// inner avoids the first address of a network, which no host has.
func inner(r rules.AddrRange) netip.Addr {
	if next := r.Lo.Next(); next.IsValid() && next.Compare(r.Hi) < 0 {
		return next
	}
	return r.Lo
}

// ports gives the ports of an opening that are tried.
func (t *trial) ports(o *rules.Traffic, v4 bool) []port {
	if o.Any {
		return append(t.split(rules.TCP, rules.PortRange{Lo: 1, Hi: 65535}), t.split(rules.UDP, rules.PortRange{Lo: 1, Hi: 65535})...)
	}
	var out []port
	for _, on := range o.On {
		if on.Protocol == rules.ICMPv4 && !v4 || on.Protocol == rules.ICMPv6 && v4 {
			continue
		}
		if len(on.Ports) == 0 {
			out = append(out, port{protocol: on.Protocol})
		}
		for _, r := range on.Ports {
			out = append(out, t.split(on.Protocol, r)...)
		}
	}
	return out
}

// split cuts a range of ports into parts of which one port stands for all: a
// short one into its ports, a long one where foreign rules name a port.
func (t *trial) split(proto rules.Protocol, r rules.PortRange) []port {
	var out []port
	if int(r.Hi)-int(r.Lo) < wholeRange {
		for n := int(r.Lo); n <= int(r.Hi); n++ {
			out = append(out, port{proto, uint16(n), uint16(n)})
		}
		return out
	}
	lo := r.Lo
	for _, n := range t.named {
		if lo < n && n <= r.Hi {
			out = append(out, port{proto, lo, n - 1})
			lo = n
		}
	}
	return append(out, port{proto, lo, r.Hi})
}

// destination is an address of this host that the opening is about.
func (t *trial) destination(o *rules.Open, in string, v4 bool) netip.Addr {
	to := o.To
	if len(to.Ranges) > 0 || len(to.Sets) > 0 {
		if a := t.sources(&to, v4); len(a) > 0 {
			return a[0]
		}
	}
	if a := t.address(t.host.links[in], v4); a.IsValid() {
		return a
	}
	if v4 {
		return netip.MustParseAddr("203.0.113.252")
	}
	return netip.MustParseAddr("2001:db8:ffff:fffe::77")
}

// try walks one packet in, and its answer out.
func (t *trial) try(o *rules.Open, in string, src netip.Addr, at port) error {
	if t.walks++; t.walks > maxWalks {
		t.cut = true
		return nil
	}
	p := rules.Packet{In: in, Src: src, Dst: t.destination(o, in, src.Is4()), Protocol: at.protocol, HopLimit: usualHops}
	if hasPorts(at.protocol) {
		p.SrcPort, p.DstPort = usualSource, at.lo
	}
	switch at.protocol {
	case rules.ICMPv4:
		p.ICMPType = 8
	case rules.ICMPv6:
		p.ICMPType = 128
	}
	if t.rs.Decide(p).Outcome != rules.OutcomeOpen {
		return nil // a block wins, or the opening has ended
	}
	t.found.by[in] = true
	w := newWalker(t.rules, t.host, p, t.conn)
	j, stopped := w.early()
	if !stopped {
		j = w.run()
	}
	if w.err != nil {
		return w.err
	}
	t.judge(j, at, "drop", "stops")
	if j.Verdict != WalkAccept || w.p.elsewhere != no {
		return nil
	}
	answer := rules.Packet{Src: p.Dst, Dst: p.Src, Protocol: p.Protocol, SrcPort: p.DstPort, DstPort: p.SrcPort, HopLimit: usualHops, Flow: rules.ReplyFlow}
	w = newWalker(t.rules, t.host, answer, t.conn)
	j = w.leave(in)
	if w.err != nil {
		return w.err
	}
	t.judge(j, at, "answers", "stops the answers of")
	return nil
}

// judge files what a journey says.
func (t *trial) judge(j *Journey, at port, kind, does string) {
	if j.Verdict == WalkAccept {
		return
	}
	table, chain := t.rules.find(&j.By)
	i := Interference{Kind: kind, Where: "other tables"}
	if j.By.Table != "" {
		i.Where = fmt.Sprintf("table %s %s, chain %s", j.By.Family, j.By.Table, j.By.Chain)
	}
	if table != nil {
		i.Advice = table.remedy(j.By.Chain, j.By.Handle)
	}
	if chain != nil {
		t.found.hit[chain] = true
	}
	switch {
	case j.Verdict == WalkUnknown:
		i.Severity, i.Unknown = May, true
		i.Fact = fmt.Sprintf("Could not tell whether it %s what the policy opens.", does)
	default:
		i.Severity = Breaks
		i.Fact = fmt.Sprintf("It %s what the policy opens.", does)
	}
	t.found.stopped(i, &j.By, at)
}

// find gives the table of a step, and the base chain that led there.
func (k *liveRules) find(s *Step) (*liveTable, *liveChain) {
	for _, t := range k.tables {
		if t.title != s.Table || t.name() != s.Family {
			continue
		}
		for _, ch := range t.bases {
			if hookName(ch.hook) == s.Hook && ch.priority == s.Priority && (ch.title == s.Chain || t.reaches(ch.title, s.Chain)) {
				return t, ch
			}
		}
		return t, nil
	}
	return nil, nil
}

// early walks the chains that a packet meets before any hook of the IP layer;
// true means that they settle, or leave open, what becomes of it.
func (w *walker) early() (*Journey, bool) {
	var possible endings
	w.hk, w.prio = unix.NF_INET_PRE_ROUTING, math.MinInt32
	for _, t := range w.rules.tables {
		for _, ch := range t.bases {
			if !ch.early() || !slices.ContainsFunc(ch.devices, func(d string) bool { return rules.MatchInterface(d, w.in) }) {
				continue
			}
			w.sure = possible.empty()
			r := w.base(ch)
			r.by[stateAccept] = nil
			possible.merge(r)
		}
	}
	if possible.empty() {
		return nil, false
	}
	if possible.doubt != nil { // else it is dropped for sure
		possible.put(stateAccept, Step{})
	}
	return w.journey(possible), true
}

// early reports whether the chain judges what enters by a device.
func (ch *liveChain) early() bool {
	return ch.table.family == unix.NFPROTO_NETDEV && ch.hook == ingressNetdev || ch.table.family == unix.NFPROTO_INET && ch.hook == ingressInet
}

// leave walks an answer through the hooks of what this host sends.
func (w *walker) leave(by string) *Journey {
	w.p.outName, w.p.outIndex = blank(unix.IFNAMSIZ, "oifname"), blank(4, "oif")
	if by != "" {
		w.p.outName = sure(nameBytes(by), "oifname", asName)
	}
	if l, ok := w.host.links[by]; ok {
		w.p.outIndex = sure(native32(l.index), "oif", asNative)
	}
	w.track()
	var possible endings
	if !w.hook(unix.NF_INET_LOCAL_OUT, &possible) && !w.hook(unix.NF_INET_POST_ROUTING, &possible) {
		possible.put(stateAccept, Step{})
	}
	return w.journey(possible)
}
