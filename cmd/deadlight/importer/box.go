package importer

import (
	"slices"
	"strings"
)

// What a destination address is to the host (RTN_* of the kernel). A host has no
// broadcast over IPv6 and no anycast over IPv4.
const (
	toLocal = 1 << iota
	toBroadcast
	toMulticast
	toAnycast
)

// box is a set of packets of one IP family that begin a flow: those that are in
// every dimension.
type box struct {
	proto nums // 0 to 255
	dport nums // the port, or type<<8|code of ICMP
	sport nums
	types uint8 // of the destination
	src   addrs
	dst   addrs
	dev   devices // the interface: entered by, on output left by
}

// everything is what may come from outside: what the loopback carries, and
// loopback addresses on a wire, the kernel and Deadlight judge alike for every
// policy.
func everything(v4 bool) box {
	b := box{proto: one(0, 255), dport: one(0, 65535), sport: one(0, 65535), types: toLocal | toMulticast | toAnycast,
		src: network("::/0").minus(network("::1/128")), dev: devices{not: []string{"lo"}}}
	if v4 {
		b.types = toLocal | toMulticast | toBroadcast
		b.src = network("0.0.0.0/0").minus(network("127.0.0.0/8"))
	}
	b.dst = b.src
	return b
}

func (b box) empty() bool {
	return len(b.proto) == 0 || len(b.dport) == 0 || len(b.sport) == 0 || b.types == 0 || len(b.src) == 0 || len(b.dst) == 0 || b.dev.empty()
}

func (b box) and(c box) box {
	return box{b.proto.and(c.proto), b.dport.and(c.dport), b.sport.and(c.sport), b.types & c.types, b.src.and(c.src), b.dst.and(c.dst), b.dev.and(c.dev)}
}

// minus splits what is left of b without c into boxes.
func (b box) minus(c box) []box {
	in := b.and(c)
	if in.empty() {
		return []box{b}
	}
	var out []box
	keep := func(p box) {
		if !p.empty() {
			out = append(out, p)
		}
	}
	for _, d := range b.dev.minus(c.dev) {
		p := b
		p.dev = d
		keep(p)
	}
	b.dev = in.dev
	p := b
	p.proto = b.proto.minus(in.proto)
	keep(p)
	b.proto, p = in.proto, b
	p.proto, p.dport = in.proto, b.dport.minus(in.dport)
	keep(p)
	b.dport, p = in.dport, b
	p.dport, p.sport = in.dport, b.sport.minus(in.sport)
	keep(p)
	b.sport, p = in.sport, b
	p.sport, p.types = in.sport, b.types&^in.types
	keep(p)
	b.types, p = in.types, b
	p.types, p.dst = in.types, b.dst.minus(in.dst)
	keep(p)
	b.dst, p = in.dst, b
	p.dst, p.src = in.dst, b.src.minus(in.src)
	keep(p)
	return out
}

// without takes several boxes away.
func (b box) without(list []box) []box {
	left := []box{b}
	for _, c := range list {
		var next []box
		for _, l := range left {
			next = append(next, l.minus(c)...)
		}
		left = next
	}
	return left
}

// within reports whether one of the boxes, or several together, hold b.
func (b box) within(list []box) bool { return len(b.without(list)) == 0 }

// joined gives the box that is exactly both, if there is one.
func (b box) joined(c box) (box, bool) {
	same := [7]bool{b.proto.equal(c.proto), b.dport.equal(c.dport), b.sport.equal(c.sport), b.types == c.types, b.src.equal(c.src), b.dst.equal(c.dst),
		slices.Equal(b.dev.in, c.dev.in) && slices.Equal(b.dev.not, c.dev.not) && (b.dev.in == nil) == (c.dev.in == nil)}
	other := -1
	for i, s := range same {
		switch {
		case s:
		case other >= 0:
			return b, false
		default:
			other = i
		}
	}
	switch other {
	case 0:
		b.proto = union(append(slices.Clone(b.proto), c.proto...)...)
	case 1:
		b.dport = union(append(slices.Clone(b.dport), c.dport...)...)
	case 2:
		b.sport = union(append(slices.Clone(b.sport), c.sport...)...)
	case 3:
		b.types |= c.types
	case 4:
		b.src = union(append(slices.Clone(b.src), c.src...)...)
	case 5:
		b.dst = union(append(slices.Clone(b.dst), c.dst...)...)
	case 6:
		d, ok := b.dev.joined(c.dev)
		if !ok {
			d, ok = c.dev.joined(b.dev)
		}
		b.dev = d
		return b, ok
	}
	return b, true
}

// joined gives the set that is exactly both, if it can be said.
func (d devices) joined(e devices) (devices, bool) {
	switch {
	case d.in != nil && e.in != nil && len(d.not) == 0 && len(e.not) == 0:
		in := append(slices.Clone(d.in), e.in...)
		slices.Sort(in)
		return devices{in: slices.Compact(in)}, true
	case d.in == nil && len(e.not) == 0 && !slices.ContainsFunc(e.in, func(p string) bool { return !slices.Contains(d.not, p) }):
		return devices{not: slices.DeleteFunc(slices.Clone(d.not), func(n string) bool { return slices.Contains(e.in, n) })}, true
	}
	return devices{}, false
}

// devices is a set of interfaces: those that match one pattern of in (any, if it
// is nil) and none of not. A pattern is a name, or a prefix and one *.
type devices struct{ in, not []string }

func covers(pattern, other string) bool {
	p, wild := strings.CutSuffix(pattern, "*")
	if !wild {
		return pattern == other
	}
	return strings.HasPrefix(strings.TrimSuffix(other, "*"), p)
}

func (d devices) empty() bool {
	return d.in != nil && !slices.ContainsFunc(d.in, func(p string) bool {
		return !slices.ContainsFunc(d.not, func(n string) bool { return covers(n, p) })
	})
}

func (d devices) and(e devices) devices {
	out := devices{in: d.in, not: slices.Clone(d.not)}
	switch {
	case d.in == nil:
		out.in = e.in
	case e.in != nil:
		out.in = []string{}
		for _, p := range d.in {
			for _, q := range e.in {
				switch {
				case covers(p, q):
					out.in = append(out.in, q)
				case covers(q, p):
					out.in = append(out.in, p)
				}
			}
		}
		slices.Sort(out.in)
		out.in = slices.Compact(out.in)
	}
	out.not = append(out.not, e.not...)
	slices.Sort(out.not)
	out.not = slices.Compact(out.not)
	return out.tidy()
}

// tidy removes what says nothing.
func (d devices) tidy() devices {
	if d.in == nil {
		return d
	}
	in := slices.DeleteFunc(slices.Clone(d.in), func(p string) bool {
		return slices.ContainsFunc(d.not, func(n string) bool { return covers(n, p) })
	})
	not := slices.DeleteFunc(slices.Clone(d.not), func(n string) bool {
		return !slices.ContainsFunc(in, func(p string) bool { return covers(p, n) })
	})
	return devices{in, not}
}

// minus gives sets that may overlap.
func (d devices) minus(e devices) []devices {
	var out []devices
	if e.in != nil {
		rest := devices{in: d.in, not: append(slices.Clone(d.not), e.in...)}
		slices.Sort(rest.not)
		rest.not = slices.Compact(rest.not)
		if rest = rest.tidy(); !rest.empty() {
			out = append(out, rest)
		}
	}
	for _, n := range e.not {
		if rest := d.and(devices{in: []string{n}}); !rest.empty() {
			out = append(out, rest)
		}
	}
	return out
}
