package firewall

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// linkInterference lists what sees packets of the policy's interfaces before, or
// after, netfilter does. It runs in the namespace in question.
func linkInterference(rs *rules.Ruleset) []Interference {
	failed := func(where string, err error) []Interference {
		return []Interference{{Severity: May, Unknown: true, Kind: "tc", Where: where, Fact: fmt.Sprintf("Could not tell what tc filters and XDP programs are there: %v.", err)}}
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return failed("the interfaces", err)
	}
	defer nl.Close()
	links, err := nl.LinkList()
	if err != nil {
		return failed("the interfaces", err)
	}
	var out []Interference
	blind := false
	for _, l := range policyLinks(rs, links) {
		if x := xdpOn(l.Attrs()); x != nil {
			out = append(out, *x)
		}
		filters, err := filtersOn(nl, l)
		if err != nil {
			out = append(out, failed("interface "+l.Attrs().Name, err)...)
		}
		out = append(out, filters...)
		for _, d := range [...]struct {
			attach uint32
			what   string
		}{{unix.BPF_TCX_INGRESS, "that enter"}, {unix.BPF_TCX_EGRESS, "that leave"}} {
			n, err := tcxCount(l.Attrs().Index, d.attach)
			switch {
			case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS): // a kernel before 6.6, or without BPF: there is no tcx
			case err != nil:
				blind = true
			case n > 0:
				out = append(out, Interference{
					Severity: May, Unknown: true, Kind: "tcx", Where: "interface " + l.Attrs().Name, Rule: fmt.Sprintf("%d programs", n),
					Fact:   fmt.Sprintf("eBPF programs (tcx) see the packets %s, beside the policy; what they do cannot be read.", d.what),
					Advice: fmt.Sprintf("Look whose they are: bpftool net show dev %s.", l.Attrs().Name),
				})
			}
		}
	}
	if blind {
		out = append(out, Interference{Severity: Note, Unknown: true, Kind: "tcx", Where: "the interfaces",
			Fact: "Whether eBPF programs (tcx) are on them could not be read: that takes root of the whole machine."})
	}
	return out
}

// policyLinks are the interfaces that the openings name and what they stand on,
// or all but loopback when one names none.
func policyLinks(rs *rules.Ruleset, links []netlink.Link) []netlink.Link {
	var patterns []string
	all := rs == nil || len(rs.Policy.Open) == 0
	if rs != nil {
		for i := range rs.Policy.Open {
			names := rs.Policy.Open[i].Interfaces
			all = all || len(names) == 0
			patterns = append(patterns, names...)
		}
	}
	chosen := map[int]bool{}
	for _, l := range links {
		a := l.Attrs()
		chosen[a.Index] = a.RawFlags&unix.IFF_LOOPBACK == 0 && a.Name != "lo" &&
			(all || slices.ContainsFunc(patterns, func(p string) bool { return rules.MatchInterface(p, a.Name) }))
	}
	for range links { // a port of a bridge or bond, the parent of a VLAN, and so on down
		for _, l := range links {
			a := l.Attrs()
			if chosen[a.MasterIndex] {
				chosen[a.Index] = true
			}
			if _, vlan := l.(*netlink.Vlan); vlan && chosen[a.Index] && a.ParentIndex != 0 {
				chosen[a.ParentIndex] = true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(links), func(l netlink.Link) bool { return !chosen[l.Attrs().Index] })
}

// xdpOn gives the finding of a link's XDP program, or nil.
func xdpOn(a *netlink.LinkAttrs) *Interference {
	if a.Xdp == nil || !a.Xdp.Attached {
		return nil
	}
	return &Interference{
		Severity: May, Unknown: true, Kind: "xdp", Where: "interface " + a.Name, Rule: fmt.Sprintf("program %d", a.Xdp.ProgId),
		Fact:   "An XDP program sees every packet before the policy; what it does cannot be read: it can drop, rewrite or answer.",
		Advice: fmt.Sprintf("Look whose it is: bpftool prog show id %d; take it away: ip link set dev %s xdp off.", a.Xdp.ProgId, a.Name),
	}
}

// filtersOn lists the filters at the two ends of a link.
func filtersOn(nl *netlink.Handle, l netlink.Link) ([]Interference, error) {
	name := l.Attrs().Name
	qdiscs, err := nl.QdiscList(l)
	if err != nil {
		return nil, err
	}
	var out []Interference
	for _, q := range qdiscs {
		if kind := q.Type(); kind != "clsact" && kind != "ingress" {
			continue
		}
		for _, end := range [...]struct {
			parent uint32
			title  string
			fact   string
		}{
			{netlink.HANDLE_MIN_INGRESS, "ingress", "Filters of tc see the packets that enter before the policy does: they can drop, redirect or rewrite."},
			{netlink.HANDLE_MIN_EGRESS, "egress", "Filters of tc see the packets that leave: they can drop or redirect answers."},
		} {
			if q.Type() == "ingress" && end.parent == netlink.HANDLE_MIN_EGRESS {
				continue // it has one end, and gives its filters whatever the parent
			}
			filters, err := nl.FilterList(l, end.parent)
			if err != nil {
				return out, fmt.Errorf("filters at %s: %w", end.title, err)
			}
			kinds := map[string]bool{}
			for _, f := range filters {
				kinds[f.Type()] = true
			}
			for _, kind := range sortedKeys(kinds) {
				out = append(out, Interference{
					Severity: May, Unknown: true, Kind: "tc", Where: "interface " + name, Rule: kind + " at " + end.title,
					Fact: end.fact, Advice: fmt.Sprintf("Look what they do: tc filter show dev %s %s.", name, end.title),
				})
			}
		}
	}
	return out, nil
}

// bpfQuery is the part of union bpf_attr that BPF_PROG_QUERY reads and writes
// (uapi/linux/bpf.h).
type bpfQuery struct {
	target, attach, flags, attachFlags uint32
	ids                                uint64
	count, _                           uint32
	_, _, _, revision                  uint64
}

// tcxCount asks how many tcx programs are attached to one end of a link.
func tcxCount(index int, attach uint32) (int, error) {
	q := bpfQuery{target: uint32(index), attach: attach}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_QUERY, uintptr(unsafe.Pointer(&q)), unsafe.Sizeof(q))
	if errno == unix.ENOENT { // none was ever attached
		return 0, nil
	}
	if errno != 0 {
		return 0, errno
	}
	return int(q.count), nil
}
