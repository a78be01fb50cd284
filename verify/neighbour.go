package verify

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The reasons why [ResolveLink] finds no way for frames to a target.
var (
	// ErrLocalTarget: the target is an address of this machine, so probes would
	// never leave it.
	ErrLocalTarget = errors.New("target is an address of this machine")
	// ErrNoRoute: the kernel knows no route, or one that forbids.
	ErrNoRoute = errors.New("no route to target")
	// ErrNoNeighbour: the next hop answers neither ARP nor neighbour discovery.
	ErrNoNeighbour = errors.New("next hop does not answer")
	// ErrNotEthernet: the way leads over a device without Ethernet header, like
	// a tunnel.
	ErrNotEthernet = errors.New("interface is not Ethernet")
)

const (
	neighbourLimit = 2 * time.Second // the kernel gives up after three tries a second apart
	neighbourPoll  = 10 * time.Millisecond
	discardPort    = 9 // RFC 863
)

// ResolveLink asks the kernel of the calling thread's network namespace how
// packets to dst leave: over which interface, to which Ethernet address and
// from which source address. It makes the kernel look for the next hop if
// nobody did yet, with one UDP datagram to that hop, and waits up to two
// seconds for it.
func ResolveLink(dst netip.Addr) (Link, netip.Addr, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	dst = dst.Unmap()
	if !dst.IsValid() || dst.IsUnspecified() || dst.IsMulticast() {
		return Link{}, netip.Addr{}, fmt.Errorf("%v is no address of a host", dst)
	}
	route, err := routeTo(dst)
	if err != nil {
		return Link{}, netip.Addr{}, err
	}
	src, ok := netip.AddrFromSlice(route.Src)
	if !ok {
		return Link{}, netip.Addr{}, fmt.Errorf("%v: %w: no source address", dst, ErrNoRoute)
	}
	link, err := linkOf(route, dst)
	return link, src.Unmap(), err
}

// resolveLinkFrom is [ResolveLink] for what comes from another address of this machine.
func resolveLinkFrom(dst, src netip.Addr) (Link, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	route, err := routeBy(dst, &netlink.RouteGetOptions{SrcAddr: src.AsSlice()})
	if err != nil {
		return Link{}, err
	}
	return linkOf(route, dst)
}

// linkOf is how frames to dst leave by a route.
func linkOf(route netlink.Route, dst netip.Addr) (Link, error) {
	dev, err := netlink.LinkByIndex(route.LinkIndex)
	if err != nil {
		return Link{}, fmt.Errorf("interface %d: %w", route.LinkIndex, err)
	}
	at := dev.Attrs()
	if at.EncapType != "ether" || len(at.HardwareAddr) != 6 || at.RawFlags&unix.IFF_NOARP != 0 {
		return Link{}, fmt.Errorf("%v over %s: %w", dst, at.Name, ErrNotEthernet)
	}
	hop := dst
	if gw, ok := netip.AddrFromSlice(route.Gw); ok && !gw.Unmap().IsUnspecified() {
		hop = gw.Unmap()
	}
	if via, ok := route.Via.(*netlink.Via); ok { // an IPv6 router for IPv4: RFC 5549
		if gw, ok := netip.AddrFromSlice(via.Addr); ok {
			hop = gw
		}
	}
	mac, err := neighbour(hop.WithZone(""), at)
	if err != nil {
		return Link{}, err
	}
	return Link{Index: at.Index, Name: at.Name, Src: at.HardwareAddr, Dst: mac}, nil
}

// routeTo asks for the route of a packet to dst.
func routeTo(dst netip.Addr) (netlink.Route, error) {
	var opts *netlink.RouteGetOptions
	if z := dst.Zone(); z != "" {
		opts = &netlink.RouteGetOptions{Oif: z}
	}
	return routeBy(dst, opts)
}

// routeBy is routeTo with what else is known of the packet.
func routeBy(dst netip.Addr, opts *netlink.RouteGetOptions) (netlink.Route, error) {
	routes, err := netlink.RouteGetWithOptions(dst.AsSlice(), opts)
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH),
		errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL): // unreachable, prohibit, blackhole
		return netlink.Route{}, fmt.Errorf("%v: %w", dst, ErrNoRoute)
	case err != nil:
		return netlink.Route{}, fmt.Errorf("look up route to %v: %w", dst, err)
	case len(routes) == 0:
		return netlink.Route{}, fmt.Errorf("%v: %w", dst, ErrNoRoute)
	}
	r := routes[0]
	switch r.Type {
	case unix.RTN_LOCAL:
		return r, fmt.Errorf("%v: %w", dst, ErrLocalTarget)
	case unix.RTN_UNICAST:
		return r, nil
	case unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST:
		return r, fmt.Errorf("%v is no address of a host", dst)
	}
	return r, fmt.Errorf("%v: %w", dst, ErrNoRoute)
}

// neighbour returns the Ethernet address of hop, which the kernel looks for if
// it has to.
func neighbour(hop netip.Addr, at *netlink.LinkAttrs) (net.HardwareAddr, error) {
	family := netlink.FAMILY_V4
	if hop.Is6() {
		family = netlink.FAMILY_V6
	}
	until := time.Now().Add(neighbourLimit)
	for asked := false; ; asked = true {
		list, err := netlink.NeighList(at.Index, family)
		if err != nil {
			return nil, fmt.Errorf("list neighbours on %s: %w", at.Name, err)
		}
		for _, n := range list {
			const usable = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT
			if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap() == hop && n.State&usable != 0 && len(n.HardwareAddr) == 6 {
				return n.HardwareAddr, nil
			}
		}
		if !asked {
			if err := poke(hop, at.Name); err != nil {
				return nil, fmt.Errorf("ask for %v on %s: %w", hop, at.Name, err)
			}
		}
		if time.Now().After(until) {
			return nil, fmt.Errorf("%v on %s: %w", hop, at.Name, ErrNoNeighbour)
		}
		time.Sleep(neighbourPoll)
	}
}

// poke makes the kernel send something to hop, for which it must first know the
// Ethernet address. An IPv6 address of a link needs to be told the link.
func poke(hop netip.Addr, dev string) error {
	if hop.Is6() && hop.IsLinkLocalUnicast() {
		hop = hop.WithZone(dev)
	}
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(hop, discardPort)))
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte{0})
	return err
}
