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

// The reasons why resolveLinks finds no way for frames to a target.
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

// wayOut is how packets to an address leave, or why they do not.
type wayOut struct {
	link Link
	src  netip.Addr
	hop  netip.Addr
	err  error
}

// resolveLinks asks the kernel of the calling thread's network namespace how packets
// to some addresses leave: over which interface, to which Ethernet address and from
// which source address. It makes the kernel look for the next hops that nobody looked
// for yet, with one UDP datagram to each, and waits up to two seconds for all at once.
func resolveLinks(dsts []netip.Addr) []wayOut {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ways := make([]wayOut, len(dsts))
	for i, dst := range dsts {
		ways[i].err = ways[i].route(dst.Unmap())
	}
	neighbours(ways)
	return ways
}

// route finds all but the Ethernet address of the next hop.
func (w *wayOut) route(dst netip.Addr) error {
	if !dst.IsValid() || dst.IsUnspecified() || dst.IsMulticast() {
		return fmt.Errorf("%v is no address of a host", dst)
	}
	route, err := routeTo(dst)
	if err != nil {
		return err
	}
	src, ok := netip.AddrFromSlice(route.Src)
	if !ok {
		return fmt.Errorf("%v: %w: no source address", dst, ErrNoRoute)
	}
	w.src = src.Unmap()
	return w.by(route, dst)
}

// resolveLinkFrom is resolveLinks for what comes from another address of this machine.
func resolveLinkFrom(dst, src netip.Addr) (Link, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	route, err := routeBy(dst, &netlink.RouteGetOptions{SrcAddr: src.AsSlice()})
	if err != nil {
		return Link{}, err
	}
	ways := make([]wayOut, 1)
	if err := ways[0].by(route, dst); err != nil {
		return Link{}, err
	}
	neighbours(ways)
	return ways[0].link, ways[0].err
}

// by takes a route, for what it says of the interface and the next hop.
func (w *wayOut) by(route netlink.Route, dst netip.Addr) error {
	dev, err := netlink.LinkByIndex(route.LinkIndex)
	if err != nil {
		return fmt.Errorf("interface %d: %w", route.LinkIndex, err)
	}
	at := dev.Attrs()
	if at.EncapType != "ether" || len(at.HardwareAddr) != 6 || at.RawFlags&unix.IFF_NOARP != 0 {
		return fmt.Errorf("%v over %s: %w", dst, at.Name, ErrNotEthernet)
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
	w.link, w.hop = Link{Index: at.Index, Name: at.Name, Src: at.HardwareAddr}, hop.WithZone("")
	return nil
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

// neighbour returns the Ethernet address of one next hop.
func neighbour(hop netip.Addr, at *netlink.LinkAttrs) (net.HardwareAddr, error) {
	ways := []wayOut{{link: Link{Index: at.Index, Name: at.Name}, hop: hop.WithZone("")}}
	neighbours(ways)
	return ways[0].link.Dst, ways[0].err
}

// neighbours finds the Ethernet addresses of the next hops, which the kernel looks
// for if it has to.
func neighbours(ways []wayOut) {
	type wire struct{ index, family int }
	until := time.Now().Add(neighbourLimit)
	for asked := false; ; asked = true {
		known := map[wire]map[netip.Addr]net.HardwareAddr{}
		poked := map[netip.Addr]bool{}
		missing := false
		for i := range ways {
			w := &ways[i]
			if w.err != nil || w.link.Dst != nil {
				continue
			}
			at := wire{w.link.Index, netlink.FAMILY_V4}
			if w.hop.Is6() {
				at.family = netlink.FAMILY_V6
			}
			if known[at] == nil {
				if known[at], w.err = neighboursOn(at.index, at.family); w.err != nil {
					w.err = fmt.Errorf("list neighbours on %s: %w", w.link.Name, w.err)
					continue
				}
			}
			if mac := known[at][w.hop]; mac != nil {
				w.link.Dst = mac
				continue
			}
			missing = true
			if !asked && !poked[w.hop] {
				poked[w.hop] = true
				if err := poke(w.hop, w.link.Name); err != nil {
					w.err = fmt.Errorf("ask for %v on %s: %w", w.hop, w.link.Name, err)
				}
			}
		}
		if !missing {
			return
		}
		if time.Now().After(until) {
			break
		}
		time.Sleep(neighbourPoll)
	}
	for i := range ways {
		if w := &ways[i]; w.err == nil && w.link.Dst == nil {
			w.err = fmt.Errorf("%v on %s: %w", w.hop, w.link.Name, ErrNoNeighbour)
		}
	}
}

// neighboursOn lists whom the kernel knows on an interface.
func neighboursOn(index, family int) (map[netip.Addr]net.HardwareAddr, error) {
	list, err := netlink.NeighList(index, family)
	if err != nil {
		return nil, err
	}
	out := map[netip.Addr]net.HardwareAddr{}
	for _, n := range list {
		const usable = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State&usable != 0 && len(n.HardwareAddr) == 6 {
			out[a.Unmap()] = n.HardwareAddr
		}
	}
	return out, nil
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
