package verify

// What a host has that a vantage must fit into: interfaces, addresses, routes and
// sockets. All of it is read on a thread inside the host's network namespace.

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// surroundings are a host as it was found.
type surroundings struct {
	links   []hostLink
	local   map[netip.Addr]bool
	busy    map[netip.Addr]bool // the far ends of its sockets
	listens Ports               // some program listens there
	diverts bool                // the kernel can divert answers
	returns map[netip.Addr]wayBack
	hops    map[[2]string]bool // by interface and gateway: it is known or answers
}

// hostLink is an interface of the host that is up, has a carrier and is no loopback.
type hostLink struct {
	name   string
	index  int
	ether  bool // with Ethernet header
	strict bool // the kernel drops IPv4 packets that it would not answer by it
	addrs  []netip.Prefix
	onLink []netip.Addr // those of IPv6 that are known on the link only
	at     *netlink.LinkAttrs
}

// wayBack is how the host's answers to an address come to the vantage.
type wayBack struct {
	divert *hostLink // they leave by it as ever, and are turned away there
	// strange says that the address is on the link and nobody has it: the host
	// must be told where.
	strange bool
	route   bool // by a route of our own
}

// lookAround reads the surroundings of the calling thread's network namespace.
func lookAround() (*surroundings, error) {
	s := &surroundings{
		local: map[netip.Addr]bool{}, busy: map[netip.Addr]bool{},
		returns: map[netip.Addr]wayBack{}, hops: map[[2]string]bool{},
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		at := l.Attrs()
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", at.Name, err)
		}
		h := hostLink{
			name: at.Name, index: at.Index, at: at,
			ether:  at.EncapType == "ether" && len(at.HardwareAddr) == 6 && at.RawFlags&unix.IFF_NOARP == 0,
			strict: strictSource(at.Name),
		}
		for _, a := range addrs {
			addr, ok := netip.AddrFromSlice(a.IP)
			if !ok {
				continue
			}
			addr = addr.Unmap()
			s.local[addr] = true
			if addr.Is6() && addr.IsLinkLocalUnicast() {
				h.onLink = append(h.onLink, addr)
			}
			const unready = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
			if a.Flags&unready != 0 || !usable(addr) {
				continue
			}
			bits, _ := a.Mask.Size()
			p := netip.PrefixFrom(addr, bits)
			if a.Flags&unix.IFA_F_SECONDARY != 0 { // of IPv6 a temporary one
				h.addrs = append(h.addrs, p)
			} else {
				h.addrs = slices.Insert(h.addrs, 0, p)
			}
		}
		// Without a carrier nothing can come in, and the kernel redirects nothing there.
		const ready = unix.IFF_UP | unix.IFF_LOWER_UP
		if at.RawFlags&ready == ready && at.RawFlags&unix.IFF_LOOPBACK == 0 {
			s.links = append(s.links, h)
		}
	}
	return s, s.sockets()
}

// strictSource reports whether the kernel checks by this interface that answers
// would leave by it (rp_filter = 1; the larger of both settings counts). Where that
// cannot be read it may be so.
func strictSource(name string) bool {
	most := 0
	for _, conf := range []string{"all", name} {
		b, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv4/conf", conf, "rp_filter"))
		n, err2 := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || err2 != nil {
			return true
		}
		most = max(most, n)
	}
	return most == 1
}

// sockets notes to whom the host talks.
func (s *surroundings) sockets() error {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		for _, list := range []func(uint8) ([]*netlink.Socket, error){netlink.SocketDiagTCP, netlink.SocketDiagUDP} {
			sockets, err := list(family)
			if errors.Is(err, unix.ENOENT) {
				continue // the kernel has no such protocol
			}
			if err != nil {
				return fmt.Errorf("list sockets: %w", err)
			}
			for _, x := range sockets {
				if a, ok := netip.AddrFromSlice(x.ID.Destination); ok {
					s.busy[a.Unmap()] = true
				}
				switch x.State {
				case tcpListen:
					s.listens.TCP = append(s.listens.TCP, x.ID.SourcePort)
				case tcpClose: // of UDP it says that nobody is connected
					s.listens.UDP = append(s.listens.UDP, x.ID.SourcePort)
				}
			}
		}
	}
	s.listens = Ports{union(nil, s.listens.TCP), union(nil, s.listens.UDP)}
	return nil
}

// States of sockets (include/net/tcp_states.h).
const (
	tcpSynRecv = 3
	tcpClose   = 7
	tcpListen  = 10
)

// present are the interfaces that are still there.
func (s *surroundings) present() ([]hostLink, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var out []hostLink
	for _, h := range s.links {
		if slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Index == h.index && l.Attrs().Name == h.name }) {
			out = append(out, h)
		}
	}
	return out, nil
}

// localAddresses are those of a family to which packets that come in by an interface
// are the host's own, the first of them first.
func (s *surroundings) localAddresses(in string, first netip.Addr) []netip.Addr {
	l := s.link(in)
	if l == nil {
		return nil
	}
	var out []netip.Addr
	for a := range s.local {
		mine := a
		if a.Is6() && a.IsLinkLocalUnicast() {
			if !slices.Contains(l.onLink, a) {
				continue
			}
			mine = a.WithZone(in)
		}
		if a == first || a.Is4() != first.Is4() || a.IsLoopback() {
			continue
		}
		// An address that the kernel still tests is not its own yet.
		if _, err := routeTo(mine); errors.Is(err, ErrLocalTarget) {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return append([]netip.Addr{first}, out...)
}

// link gives an interface by its name, nil when there is none that is up.
func (s *surroundings) link(name string) *hostLink {
	for i := range s.links {
		if s.links[i].name == name {
			return &s.links[i]
		}
	}
	return nil
}

// main chooses the interface of the sweep and the address to sweep: those of the
// route to a stranger, unless in names an interface. ok is false when the host has
// no address of the family.
func (s *surroundings) main(in string, candidates []netip.Addr) (name string, dst netip.Addr, ok bool) {
	is4 := candidates[0].Is4()
	global := func(l *hostLink) (netip.Addr, bool) {
		for _, p := range l.addrs {
			if p.Addr().Is4() == is4 {
				return p.Addr(), true
			}
		}
		return netip.Addr{}, false
	}
	if in == "" {
		if route, err := routeTo(candidates[0]); err == nil {
			for i := range s.links {
				if s.links[i].index == route.LinkIndex {
					in = s.links[i].name
				}
			}
		}
	}
	if l := s.link(in); l != nil {
		if a, ok := global(l); ok {
			return in, a, true
		}
	}
	// An interface may lend the address of another.
	for i := range s.links {
		if a, ok := global(&s.links[i]); ok {
			if in == "" {
				in = s.links[i].name
			}
			return in, a, true
		}
	}
	return "", netip.Addr{}, false
}

// reaches reports whether the vantage can send from src by an interface and have
// the answers.
func (s *surroundings) reaches(in string, src netip.Addr) bool {
	l := s.link(in)
	if l == nil || s.local[src] || !usable(src) {
		return false
	}
	w := s.back(src)
	if l.strict && src.Is4() {
		return w.divert == l
	}
	return w.divert != nil || w.route
}

// back says how answers to src come to the vantage.
func (s *surroundings) back(src netip.Addr) wayBack {
	w, known := s.returns[src]
	if !known {
		w = s.findBack(src)
		s.returns[src] = w
	}
	return w
}

func (s *surroundings) findBack(src netip.Addr) wayBack {
	ours := wayBack{route: !s.busy[src]}
	route, err := routeTo(src)
	if err != nil {
		return ours
	}
	i := slices.IndexFunc(s.links, func(l hostLink) bool { return l.index == route.LinkIndex })
	if i < 0 || !s.links[i].ether || !s.diverts {
		return ours
	}
	l := &s.links[i]
	hop := src
	if gw, ok := netip.AddrFromSlice(route.Gw); ok && !gw.Unmap().IsUnspecified() {
		hop = gw.Unmap()
	}
	if via, ok := route.Via.(*netlink.Via); ok {
		if gw, ok := netip.AddrFromSlice(via.Addr); ok {
			hop = gw
		}
	}
	if hop == src {
		return wayBack{divert: l, strange: !s.resolved(src, l)}
	}
	key := [2]string{l.name, hop.String()}
	answers, asked := s.hops[key]
	if !asked {
		_, err := neighbour(hop, l.at)
		answers = err == nil
		s.hops[key] = answers
	}
	if !answers {
		return ours
	}
	return wayBack{divert: l}
}

// resolved reports whether the host knows the Ethernet address of a neighbour.
func (s *surroundings) resolved(a netip.Addr, l *hostLink) bool {
	family := netlink.FAMILY_V4
	if a.Is6() {
		family = netlink.FAMILY_V6
	}
	list, err := netlink.NeighList(l.index, family)
	if err != nil {
		return false
	}
	return slices.ContainsFunc(list, func(n netlink.Neigh) bool {
		got, ok := netip.AddrFromSlice(n.IP)
		return ok && got.Unmap() == a && len(n.HardwareAddr) == 6 && !isOurs(n.HardwareAddr) &&
			n.State&(netlink.NUD_REACHABLE|netlink.NUD_STALE|netlink.NUD_DELAY|netlink.NUD_PROBE|netlink.NUD_PERMANENT) != 0
	})
}

// neighbours gives for each interface an address on its link that nobody is known
// to have: who comes in by it by right is one of those.
func (s *surroundings) neighbours(in []string, t *rules.Traffic, ranges func(*rules.Source) []rules.AddrRange, f family) []source {
	contains := func(list []rules.AddrRange, a netip.Addr) bool {
		return slices.ContainsFunc(list, func(r rules.AddrRange) bool { return r.Contains(a) })
	}
	var out []source
	for _, name := range in {
		l := s.link(name)
		if l == nil {
			continue
		}
		for _, p := range l.addrs {
			if p.Addr().Is4() != f.dst.Is4() {
				continue
			}
			a, ok := s.free(p, l)
			if !ok {
				continue
			}
			place := "beside"
			if (t.From.Any || contains(ranges(&t.From), a)) && !contains(ranges(&t.Except), a) {
				place = "inside"
			}
			out = append(out, source{a, place, name})
			break
		}
	}
	return out
}

// free finds an address of a network that the host knows nobody to have, from its
// end down.
func (s *surroundings) free(p netip.Prefix, l *hostLink) (netip.Addr, bool) {
	if p.Bits() > p.Addr().BitLen()-2 {
		return netip.Addr{}, false
	}
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	for a := last.Prev(); last.IsValid() && p.Contains(a); a = a.Prev() {
		if !s.local[a] && !s.busy[a] && a != p.Masked().Addr() && !s.resolved(a, l) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// interfaces lists the names, those of the sweeps first.
func (s *surroundings) interfaces(first ...string) []string {
	var out []string
	for _, name := range first {
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	for i := range s.links {
		if l := &s.links[i]; len(l.addrs) > 0 && !slices.Contains(out, l.name) {
			out = append(out, l.name)
		}
	}
	return out
}
