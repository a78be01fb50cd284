package verify

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"

	"deadlight/rules"
)

// Outlook is from where a throw-away host is looked at: the addresses and
// interfaces it gets, and the views that show every opening from inside, from
// the edges and from beside what it is restricted to.
type Outlook struct {
	Host4, Host6 netip.Addr
	// More are further addresses of the host: those that rules name as their
	// destination (to).
	More  []netip.Addr
	Links []string // the host's interfaces; the first is named by no rule
	Views []View   // without their links
	// Unprobed counts the sources that were left out: too many, or addresses
	// that no packet may carry.
	Unprobed int

	unasked []unasked // [[expect]]s that no view shows
}

// Limits of an outlook, so that a policy with a blocklist stays a matter of
// seconds. What is left out is counted.
const (
	mostViews        = 3000
	mostRanges       = 200 // of one rule
	mostPortsOfAView = 64
	mostAddresses    = 16 // of the host
	mostInterfaces   = 32 // of the host, for one rule
)

// NewOutlook chooses addresses, interfaces and views for a policy.
func NewOutlook(rs *rules.Ruleset, ipv6 bool) (*Outlook, error) {
	b := &outlookBuilder{rs: rs, index: map[[3]string]int{}, ports: freshPorts()}
	o := &b.out
	var ok4, ok6 bool
	var src4, src6 netip.Addr
	o.Host4, src4, ok4 = b.addresses(candidates4())
	o.Host6, src6, ok6 = b.addresses(candidates6())
	if !ok4 || !ok6 {
		return nil, errors.New("no address is left for the throw-away host: the policy names them all")
	}
	o.Links = b.links()
	b.families = []family{{o.Host4, src4, o.Links[0]}}
	if ipv6 {
		b.families = append(b.families, family{o.Host6, src6, o.Links[0]})
	}
	for i := range rs.Policy.Expect {
		if to := rs.Policy.Expect[i].Packet.Dst; to.IsValid() {
			b.destination(to)
		}
	}
	for _, t := range allTraffic(rs.Policy) {
		b.destinations(t)
	}
	b.views(Ports{allPorts(), allPorts()})
	return o, nil
}

// views adds the sweeps and all that shows a restricted rule.
func (b *outlookBuilder) views(sweep Ports) {
	for _, f := range b.families {
		if v := b.view(f.main, f.src, f.dst); v != nil {
			v.Sweep = true
			v.Path.TCP, v.Path.UDP = sweep.TCP, sweep.UDP
		}
	}
	b.expects(sweep)
	for i := range b.rs.Policy.Open {
		b.restriction(b.rs.Policy.Open[i].Name, &b.rs.Policy.Open[i].Traffic)
	}
	for i := range b.rs.Policy.Block {
		b.restriction("block "+b.rs.Policy.Block[i].Name, &b.rs.Policy.Block[i].Traffic)
	}
	for i := range b.out.Views {
		v := &b.out.Views[i]
		if v.echo {
			continue
		}
		v.Path.TCP, v.Path.UDP = among(v.Path.TCP, sweep.TCP), among(v.Path.UDP, sweep.UDP)
		for j := range v.Shows {
			v.Shows[j].TCP, v.Shows[j].UDP = among(v.Shows[j].TCP, sweep.TCP), among(v.Shows[j].UDP, sweep.UDP)
		}
		v.Shows = slices.DeleteFunc(v.Shows, func(s Shown) bool { return len(s.TCP)+len(s.UDP) == 0 })
		v.Path.Canaries = canaries(newExpecter(b.rs, v), &v.Path)
	}
}

// family is how the sweep of one goes: to which address of the host, from which
// of a stranger, by which interface.
type family struct {
	dst, src netip.Addr
	main     string
}

type outlookBuilder struct {
	rs       *rules.Ruleset
	out      Outlook
	families []family
	index    map[[3]string]int // interface, source and destination: place in out.Views
	ports    []uint16          // fresh source ports, used from the end
	real     *surroundings     // of a host that is not ours to furnish; nil: throw-away
}

// freshPorts are source ports in random order, outside the default
// ip_local_port_range and apart from those of the canaries.
func freshPorts() []uint16 {
	var out []uint16
	for p := 20000; p <= 32767; p++ {
		out = append(out, uint16(p))
	}
	for p := 61000; p <= 65535; p++ {
		out = append(out, uint16(p))
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// Ranges that are never routed on the Internet (RFC 5737, 2544, 6598, 3849,
// 9637, 4193), then some that are: nothing leaves the throw-away world.
func candidates4() []netip.Addr {
	return parseAddrs("203.0.113.77", "203.0.113.78", "198.51.100.77", "198.51.100.78", "192.0.2.77", "192.0.2.78", "198.18.7.77", "198.18.7.78",
		"100.64.7.77", "100.64.7.78", "10.77.7.77", "10.77.7.78", "172.20.7.77", "172.20.7.78", "192.168.77.77", "192.168.77.78",
		"9.77.7.77", "9.77.7.78", "77.77.7.77", "77.77.7.78", "177.77.7.77", "177.77.7.78")
}

func candidates6() []netip.Addr {
	return parseAddrs("2001:db8:77::77", "2001:db8:77::78", "3fff:77::77", "3fff:77::78", "fd77::77", "fd77::78", "2600:77::77", "2600:77::78")
}

func parseAddrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// addresses picks one for the host and one for an outsider whom no rule names;
// where the rules name every candidate, any two.
func (b *outlookBuilder) addresses(candidates []netip.Addr) (host, outside netip.Addr, ok bool) {
	free := b.unnamed(candidates)
	if len(free) < 2 {
		free = candidates
	}
	return free[0], free[1], len(free) >= 2
}

// unnamed gives the addresses that no rule and no set names.
func (b *outlookBuilder) unnamed(candidates []netip.Addr) []netip.Addr {
	named := func(a netip.Addr) bool {
		in := func(ranges []rules.AddrRange) bool {
			return slices.ContainsFunc(ranges, func(r rules.AddrRange) bool { return r.Contains(a) })
		}
		for _, s := range b.rs.Policy.Sets {
			if s.Ranges.Contains(a) {
				return true
			}
		}
		if slices.ContainsFunc(b.rs.Policy.Expect, func(x rules.Expect) bool { return x.Packet.Src == a || x.Packet.Dst == a }) {
			return true
		}
		return slices.ContainsFunc(allTraffic(b.rs.Policy), func(t *rules.Traffic) bool {
			return in(t.From.Ranges) || in(t.Except.Ranges) || in(t.To.Ranges)
		})
	}
	return slices.DeleteFunc(slices.Clone(candidates), named)
}

// links names the host's interfaces: one that no rule names, one for every
// pattern of the policy.
func (b *outlookBuilder) links() []string {
	var patterns []string
	for _, t := range allTraffic(b.rs.Policy) {
		patterns = append(patterns, t.Interfaces...)
	}
	for i := range b.rs.Policy.Expect {
		if in := b.rs.Policy.Expect[i].Packet.In; in != "" {
			patterns = append(patterns, in)
		}
	}
	all := append(slices.Clone(patterns), b.rs.Policy.Published.Interfaces...)
	main := ""
	for _, name := range []string{"eth0", "eth1", "eth2", "ens3", "enp1s0", "wan0", "outside0", "x0", "y0", "z0"} {
		if !slices.ContainsFunc(all, func(p string) bool { return rules.MatchInterface(p, name) }) {
			main = name
			break
		}
	}
	if main == "" {
		main = "eth0" // every name is taken: Decide still judges what each shows
	}
	out := []string{main}
	for _, p := range patterns {
		if name := instance(p); name != "lo" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// enters lists the interfaces by which to look at a rule: main, and where it names
// some those it names, and on a real host all others.
func (b *outlookBuilder) enters(t *rules.Traffic, main string) []string {
	in := []string{main}
	for _, p := range t.Interfaces {
		for _, name := range b.instances(p) {
			if name != "lo" && !slices.Contains(in, name) {
				in = append(in, name)
			}
		}
	}
	if b.real != nil && len(t.Interfaces) > 0 {
		for _, name := range b.out.Links {
			if !slices.Contains(in, name) && len(in) < mostInterfaces {
				in = append(in, name)
			}
		}
	}
	return in
}

// instances names the host's interfaces that a pattern means.
func (b *outlookBuilder) instances(pattern string) []string {
	if b.real == nil {
		return []string{instance(pattern)}
	}
	return slices.DeleteFunc(slices.Clone(b.out.Links), func(name string) bool { return !rules.MatchInterface(pattern, name) })
}

// view gives the view of a source on an interface, made on first use.
func (b *outlookBuilder) view(in string, src, dst netip.Addr) *View {
	key := [3]string{in, src.String(), dst.String()}
	i, ok := b.index[key]
	if !ok {
		if len(b.out.Views) >= mostViews || len(b.ports) == 0 || b.real != nil && !b.real.reaches(in, src) {
			b.out.Unprobed++
			return nil
		}
		sport := b.ports[len(b.ports)-1]
		b.ports = b.ports[:len(b.ports)-1]
		i = len(b.out.Views)
		b.index[key] = i
		b.out.Views = append(b.out.Views, View{In: in, Path: Path{Src: src, Dst: dst, SrcPort: sport}})
	}
	return &b.out.Views[i]
}

// destinations gives the host the addresses that a rule is restricted to.
func (b *outlookBuilder) destinations(t *rules.Traffic) {
	for _, r := range b.ranges(&t.To) {
		if !b.destination(r.Lo) {
			b.out.Unprobed++
		}
	}
}

// destination gives the host an address, unless it cannot have it.
func (b *outlookBuilder) destination(a netip.Addr) bool {
	switch {
	case slices.Contains(b.out.More, a) || a == b.out.Host4 || a == b.out.Host6:
	case !usable(a) || len(b.out.More) == mostAddresses || (!a.Is4() && len(b.families) == 1):
		return false
	default:
		b.out.More = append(b.out.More, a)
	}
	return true
}

// ranges are all addresses of a source, those of its sets included.
func (b *outlookBuilder) ranges(s *rules.Source) []rules.AddrRange {
	out := slices.Clone(s.Ranges)
	for _, name := range s.Sets {
		out = slices.AppendSeq(out, b.rs.Policy.Set(name).Ranges.All())
	}
	return out
}

// restriction adds the views that show a restricted rule from every side.
func (b *outlookBuilder) restriction(name string, t *rules.Traffic) {
	nobody := len(t.Except.Ranges) == 0 && len(t.Except.Sets) == 0
	anywhere := len(t.To.Ranges) == 0 && len(t.To.Sets) == 0
	if t.From.Any && len(t.Interfaces) == 0 && t.Family == rules.Both && nobody && anywhere {
		return // the sweep sees it
	}
	tcp, udp := b.portsOf(t)
	if len(tcp)+len(udp) == 0 {
		return // a protocol that is not probed
	}
	for _, f := range b.families {
		in := b.enters(t, f.main)
		dsts := []netip.Addr{f.dst}
		for _, r := range b.ranges(&t.To) {
			if r.Lo.Is4() == f.dst.Is4() && slices.Contains(b.out.More, r.Lo) {
				dsts = append(dsts, r.Lo)
			}
		}
		sources := b.sources(t, f)
		if b.real != nil {
			sources = append(sources, b.real.neighbours(in[1:], t, b.ranges, f)...)
		}
		for _, s := range sources {
			if !usable(s.addr) || s.addr == f.dst || slices.Contains(b.out.More, s.addr) {
				b.out.Unprobed++
				continue
			}
			for _, dst := range dsts {
				for _, ifname := range in {
					if s.in != "" && s.in != ifname {
						continue
					}
					v := b.view(ifname, s.addr, dst)
					if v == nil {
						continue
					}
					v.Shows = append(v.Shows, Shown{name, s.place, tcp, udp})
					if !v.Sweep {
						v.Path.TCP, v.Path.UDP = union(v.Path.TCP, tcp), union(v.Path.UDP, udp)
					}
				}
			}
		}
	}
}

// portsOf are the ports that show what a rule does: its own, and for one about
// every port some that are listed and some that are not.
func (b *outlookBuilder) portsOf(t *rules.Traffic) (tcp, udp []uint16) {
	if !t.Any {
		return representative(t.Ports(rules.TCP)), representative(t.Ports(rules.UDP))
	}
	const most = 8
	pick := func(proto rules.Protocol) []uint16 {
		out := []uint16{22, 31337, 65535}
		for i := range b.rs.Policy.Open {
			for _, r := range b.rs.Policy.Open[i].Ports(proto) {
				if len(out) < most {
					out = append(out, r.Lo)
				}
			}
		}
		return union(nil, out)
	}
	return pick(rules.TCP), pick(rules.UDP)
}

type source struct {
	addr  netip.Addr
	place string
	in    string // by this interface only; "" by each
}

// sources are the addresses from which to look at a rule: the ends of each of
// its ranges, one within, the neighbours on both sides, and a stranger.
func (b *outlookBuilder) sources(t *rules.Traffic, f family) []source {
	out := []source{{f.src, "beside", ""}}
	if t.From.Any {
		out[0].place = "inside"
	}
	ranges := append(b.ranges(&t.From), b.ranges(&t.Except)...)
	ranges = slices.DeleteFunc(ranges, func(r rules.AddrRange) bool { return r.Lo.Is4() != f.dst.Is4() })
	if n := len(ranges) - mostRanges; n > 0 {
		b.out.Unprobed += n
		rand.Shuffle(len(ranges), func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
		ranges = ranges[:mostRanges]
	}
	for _, r := range ranges {
		out = append(out, source{r.Lo, "edge", ""})
		if r.Hi != r.Lo {
			out = append(out, source{r.Hi, "edge", ""})
			if mid := middle(r); mid != r.Lo && mid != r.Hi {
				out = append(out, source{mid, "inside", ""})
			}
		}
		if a := r.Lo.Prev(); a.IsValid() {
			out = append(out, source{a, "beside", ""})
		}
		if a := r.Hi.Next(); a.IsValid() {
			out = append(out, source{a, "beside", ""})
		}
	}
	return out
}

// middle is an address halfway through a range.
func middle(r rules.AddrRange) netip.Addr {
	lo, hi := r.Lo.AsSlice(), r.Hi.AsSlice()
	sum := make([]byte, len(lo))
	carry := 0
	for i := len(lo) - 1; i >= 0; i-- {
		carry += int(lo[i]) + int(hi[i])
		sum[i] = byte(carry)
		carry >>= 8
	}
	for i := range sum {
		next := int(sum[i]) & 1
		sum[i] = byte(carry<<7) | sum[i]>>1
		carry = next
	}
	a, _ := netip.AddrFromSlice(sum)
	return a
}

// representative are the ports of a rule, or of a large one the ends of its
// ranges, and the neighbours of each range.
func representative(ranges []rules.PortRange) []uint16 {
	var out []uint16
	total := 0
	for _, r := range ranges {
		total += int(r.Hi) - int(r.Lo) + 1
	}
	for _, r := range ranges {
		if total <= mostPortsOfAView {
			for p := int(r.Lo); p <= int(r.Hi); p++ {
				out = append(out, uint16(p))
			}
		} else {
			out = append(out, r.Lo, r.Lo+(r.Hi-r.Lo)/2, r.Hi)
		}
		if r.Lo > 1 {
			out = append(out, r.Lo-1)
		}
		if r.Hi < 65535 {
			out = append(out, r.Hi+1)
		}
	}
	out = union(nil, out)
	if n := len(out); n > mostPortsOfAView*4 {
		thin := make([]uint16, 0, mostPortsOfAView*4)
		for i := range cap(thin) {
			thin = append(thin, out[i*n/cap(thin)])
		}
		out = thin
	}
	return out
}

// among gives the ports that were asked for, which ascend.
func among(ports, asked []uint16) []uint16 {
	return slices.DeleteFunc(slices.Clone(ports), func(p uint16) bool {
		_, ok := slices.BinarySearch(asked, p)
		return !ok
	})
}

// union gives the ports of both lists, ascending and each once.
func union(a, b []uint16) []uint16 {
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
