package rules

import (
	"slices"
	"sort"
)

// segment is a run of ports with the same rules.
type segment struct {
	ports PortRange
	rules []int // indices into the rules, ascending
}

// portIndex finds the rules that name a packet's protocol and port.
type portIndex struct {
	ports map[Protocol][]segment // ascending and disjoint
	plain map[Protocol][]int     // protocols without ports
	any   []int                  // rules for every protocol
}

// indexRules cuts the ports of every protocol where the list of rules changes.
func indexRules(traffic []*Traffic) portIndex {
	x := portIndex{ports: map[Protocol][]segment{}, plain: map[Protocol][]int{}}
	for _, p := range portProtocols {
		if segs := segments(traffic, p); len(segs) > 0 {
			x.ports[p] = segs
		}
	}
	for i, t := range traffic {
		if t.Any {
			x.any = append(x.any, i)
		}
		for _, o := range t.On {
			if o.Ports == nil {
				x.plain[o.Protocol] = append(x.plain[o.Protocol], i)
			}
		}
	}
	return x
}

// find gives the rules that name a protocol and port, ascending.
func (x *portIndex) find(proto Protocol, port uint16) []int {
	out := x.plain[proto]
	if segs := x.ports[proto]; len(segs) > 0 {
		k := sort.Search(len(segs), func(i int) bool { return segs[i].ports.Hi >= port })
		if k < len(segs) && segs[k].ports.Lo <= port {
			out = segs[k].rules
		}
	}
	if len(x.any) > 0 {
		out = append(slices.Clone(out), x.any...)
		slices.Sort(out)
	}
	return out
}

func segments(traffic []*Traffic, proto Protocol) []segment {
	type edge struct {
		at   int // a port, 65536 past the end
		rule int
		end  bool
	}
	var edges []edge
	for i, t := range traffic {
		for _, r := range t.Ports(proto) {
			edges = append(edges, edge{int(r.Lo), i, false}, edge{int(r.Hi) + 1, i, true})
		}
	}
	sort.Slice(edges, func(a, b int) bool { return edges[a].at < edges[b].at })
	var out []segment
	var active []int // sorted
	for i := 0; i < len(edges); {
		at := edges[i].at
		for ; i < len(edges) && edges[i].at == at; i++ {
			k, found := slices.BinarySearch(active, edges[i].rule)
			switch {
			case edges[i].end && found:
				active = slices.Delete(active, k, k+1)
			case !edges[i].end && !found:
				active = slices.Insert(active, k, edges[i].rule)
			}
		}
		if len(active) == 0 || i == len(edges) {
			continue
		}
		out = append(out, segment{PortRange{uint16(at), uint16(edges[i].at - 1)}, slices.Clone(active)})
	}
	return out
}
