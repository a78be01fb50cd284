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
	Links        []string // the host's interfaces; the first is named by no rule
	Views        []View   // without their links
	// Unprobed counts the sources that were left out: too many, or addresses
	// that no packet may carry.
	Unprobed int
}

// Limits of an outlook, so that a policy with a blocklist stays a matter of
// seconds. What is left out is counted.
const (
	mostViews        = 3000
	mostRanges       = 200 // of one rule
	mostPortsOfAView = 64
)

// NewOutlook chooses addresses, interfaces and views for a policy.
func NewOutlook(rs *rules.Ruleset, ipv6 bool) (*Outlook, error) {
	b := &outlookBuilder{rs: rs, index: map[[2]string]int{}, ports: freshPorts()}
	o := &b.out
	var ok4, ok6 bool
	var src4, src6 netip.Addr
	o.Host4, src4, ok4 = b.addresses(candidates4())
	o.Host6, src6, ok6 = b.addresses(candidates6())
	if !ok4 || !ok6 {
		return nil, errors.New("no address is left for the throw-away host: the policy names them all")
	}
	o.Links = b.links()
	b.families = []family{{o.Host4, src4}}
	if ipv6 {
		b.families = append(b.families, family{o.Host6, src6})
	}
	for _, f := range b.families {
		v := b.view(o.Links[0], f.src, f.dst, "", "")
		v.Path.TCP, v.Path.UDP = allPorts(), allPorts()
	}
	for i := range rs.Policy.Open {
		b.restriction(&rs.Policy.Open[i])
	}
	for i := range o.Views {
		v := &o.Views[i]
		v.Path.Canaries = canaries(newExpecter(rs, v), &v.Path)
	}
	return o, nil
}

type family struct{ dst, src netip.Addr }

type outlookBuilder struct {
	rs       *rules.Ruleset
	out      Outlook
	families []family
	index    map[[2]string]int // interface and source: place in out.Views
	ports    []uint16          // fresh source ports, used from the end
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
	named := func(a netip.Addr) bool {
		in := func(ranges []rules.AddrRange) bool {
			return slices.ContainsFunc(ranges, func(r rules.AddrRange) bool { return r.Contains(a) })
		}
		for _, s := range b.rs.Policy.Sets {
			if in(s.Ranges) {
				return true
			}
		}
		return slices.ContainsFunc(b.rs.Policy.Open, func(o rules.Open) bool { return in(o.From.Ranges) })
	}
	free := slices.DeleteFunc(slices.Clone(candidates), named)
	if len(free) < 2 {
		free = candidates
	}
	return free[0], free[1], len(free) >= 2
}

// links names the host's interfaces: one that no rule names, one for every
// pattern of the policy.
func (b *outlookBuilder) links() []string {
	var patterns []string
	for _, o := range b.rs.Policy.Open {
		patterns = append(patterns, o.Interfaces...)
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

// view gives the view of a source on an interface, made on first use.
func (b *outlookBuilder) view(in string, src, dst netip.Addr, rule, place string) *View {
	key := [2]string{in, src.String()}
	i, ok := b.index[key]
	if !ok {
		if len(b.out.Views) >= mostViews || len(b.ports) == 0 {
			b.out.Unprobed++
			return nil
		}
		sport := b.ports[len(b.ports)-1]
		b.ports = b.ports[:len(b.ports)-1]
		i = len(b.out.Views)
		b.index[key] = i
		b.out.Views = append(b.out.Views, View{In: in, Rule: rule, Place: place, Path: Path{Src: src, Dst: dst, SrcPort: sport}})
	}
	return &b.out.Views[i]
}

// restriction adds the views that show a restricted opening from every side.
func (b *outlookBuilder) restriction(o *rules.Open) {
	if o.From.Any && len(o.Interfaces) == 0 && o.Family == rules.Both {
		return // the sweep sees it
	}
	ports := representative(o.Ports)
	in := []string{b.out.Links[0]}
	for _, p := range o.Interfaces {
		if name := instance(p); name != "lo" && !slices.Contains(in, name) {
			in = append(in, name)
		}
	}
	for _, f := range b.families {
		for _, s := range b.sources(o, f) {
			for _, name := range in {
				if !usable(s.addr) || s.addr == f.dst {
					b.out.Unprobed++
					continue
				}
				v := b.view(name, s.addr, f.dst, o.Name, s.place)
				if v == nil || v.Sweep() {
					continue
				}
				if slices.Contains(o.Protocols, rules.TCP) {
					v.Path.TCP = union(v.Path.TCP, ports)
				}
				if slices.Contains(o.Protocols, rules.UDP) {
					v.Path.UDP = union(v.Path.UDP, ports)
				}
			}
		}
	}
}

type source struct {
	addr  netip.Addr
	place string
}

// sources are the addresses from which to look at a rule: the ends of each of
// its ranges, one within, the neighbours on both sides, and a stranger.
func (b *outlookBuilder) sources(o *rules.Open, f family) []source {
	out := []source{{f.src, "beside"}}
	if o.From.Any {
		out[0].place = "inside"
	}
	ranges := slices.Clone(o.From.Ranges)
	for _, name := range o.From.Sets {
		ranges = append(ranges, b.rs.Policy.Set(name).Ranges...)
	}
	ranges = slices.DeleteFunc(ranges, func(r rules.AddrRange) bool { return r.Lo.Is4() != f.dst.Is4() })
	if n := len(ranges) - mostRanges; n > 0 {
		b.out.Unprobed += n
		rand.Shuffle(len(ranges), func(i, j int) { ranges[i], ranges[j] = ranges[j], ranges[i] })
		ranges = ranges[:mostRanges]
	}
	for _, r := range ranges {
		out = append(out, source{r.Lo, "edge"})
		if r.Hi != r.Lo {
			out = append(out, source{r.Hi, "edge"})
			if mid := middle(r); mid != r.Lo && mid != r.Hi {
				out = append(out, source{mid, "inside"})
			}
		}
		if a := r.Lo.Prev(); a.IsValid() {
			out = append(out, source{a, "beside"})
		}
		if a := r.Hi.Next(); a.IsValid() {
			out = append(out, source{a, "beside"})
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

// union gives the ports of both lists, ascending and each once.
func union(a, b []uint16) []uint16 {
	out := append(slices.Clone(a), b...)
	slices.Sort(out)
	return slices.Compact(out)
}
