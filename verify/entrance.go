package verify

// The outside of a real host: a network namespace that only this process holds, and
// a veth into the host for every interface to be looked at. What the vantage sends
// is redirected on the veth's end to arrive by the interface itself, as if from its
// wire. When the process ends, however it ends, the kernel takes down the namespace,
// with it the veths, and with them their queueing disciplines and routes.

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrOtherVerification says that another verification runs on this host.
var ErrOtherVerification = errors.New("another verification runs on this host")

// doorName is of the host's ends of the veths, with a number behind it.
const doorName = "dlv"

// isOurs reports whether an Ethernet address is one that a vantage makes up.
func isOurs(a net.HardwareAddr) bool {
	return len(a) == 6 && a[0] == 0x06 && a[1] == 'd' && a[2] == 'l' && a[3] == 'v'
}

// entrance is an outside of a host.
type entrance struct {
	host   Runner
	ns     *os.File
	id     nsID
	nonce  byte
	doors  []door
	strays []*netlink.Neigh // what the host was told of addresses that nobody has
	divert *diverter

	stop chan struct{} // ends the upkeep of strays
	kept sync.WaitGroup
}

// door is one veth.
type door struct {
	in    string // the host's interface that it leads to
	index int    // of its end in the host
	link  Link   // of its end outside
}

// openEntrance makes an outside of the network namespace that host runs in, with a
// door to each of some of its interfaces.
func openEntrance(host Runner, to []hostLink) (*entrance, error) {
	var nonce [1]byte
	if _, err := rand.Read(nonce[:]); err != nil {
		return nil, err
	}
	e := &entrance{host: host, nonce: nonce[0], stop: make(chan struct{})}
	if err := e.open(to); err != nil {
		return nil, errors.Join(fmt.Errorf("make an outside of this host: %w", err), e.close())
	}
	return e, nil
}

func (e *entrance) open(to []hostLink) error {
	if err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return newNamespaceError(err, false, readSetting)
		}
		var err error
		if e.id, err = threadNetNS(); err != nil {
			return err
		}
		e.ns, err = os.Open("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		return err
	}
	for i := range to {
		if err := e.host(func() error { return e.openDoor(i, &to[i]) }); err != nil {
			return fmt.Errorf("to %s: %w", to[i].name, err)
		}
	}
	if err := e.host(forgetStrays); err != nil {
		return err
	}
	return e.awaitCarrier()
}

// outside runs fn in the outside. It is a [Runner].
func (e *entrance) outside(fn func() error) error {
	return inNetNS(e.ns, e.id, "the outside", fn)
}

// openDoor makes the i-th veth; it runs in the host. The name is the lock against
// another verification: the kernel gives it once.
func (e *entrance) openDoor(i int, to *hostLink) error {
	mac := func(side byte) net.HardwareAddr {
		return net.HardwareAddr{0x06, 'd', 'l', 'v', e.nonce, byte(2*i) + side}
	}
	d := door{in: to.name, link: Link{Name: fmt.Sprintf("out%d", i), Src: mac(1), Dst: mac(0)}}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = fmt.Sprintf("%s%d", doorName, i), d.link.Dst
	attrs.MTU, attrs.TxQLen = 1500, 1000
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: d.link.Name, PeerHardwareAddr: d.link.Src, PeerNamespace: netlink.NsFd(int(e.ns.Fd()))}
	// The kernel takes the veth of a killed process away a moment after it.
	for until := time.Now().Add(3 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := netlink.LinkAdd(veth)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		if time.Now().After(until) {
			return ErrOtherVerification
		}
	}
	end, err := netlink.LinkByName(attrs.Name)
	if err != nil {
		return err
	}
	d.index, d.link.Index = end.Attrs().Index, end.Attrs().ParentIndex
	e.doors = append(e.doors, d)
	if err := netlink.LinkSetAlias(end, fmt.Sprintf("deadlight verify, pid %d: leads to %s", os.Getpid(), to.name)); err != nil {
		return err
	}
	if hasIPv6() { // no address of its own, so no neighbour discovery and no reports
		if err := netlink.LinkSetIP6AddrGenMode(end, 1); err != nil {
			return err
		}
	}
	// Before it is up: nothing may enter the host by the door itself.
	if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: d.index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}); err != nil {
		return fmt.Errorf("redirect what comes in (the kernel module sch_ingress): %w", err)
	}
	if err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: d.index, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions: []netlink.Action{&netlink.MirredAction{
			ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN}, MirredAction: netlink.TCA_INGRESS_REDIR, Ifindex: to.index,
		}},
	}); err != nil {
		return fmt.Errorf("redirect what comes in (the kernel modules cls_u32 and act_mirred): %w", err)
	}
	if err := netlink.LinkSetUp(end); err != nil {
		return err
	}
	return e.outside(func() error {
		out, err := netlink.LinkByIndex(d.link.Index)
		if err != nil {
			return err
		}
		if hasIPv6() {
			if err := netlink.LinkSetIP6AddrGenMode(out, 1); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(out)
	})
}

// awaitCarrier waits until both ends of every door carry frames.
func (e *entrance) awaitCarrier() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		down := ""
		for _, side := range []struct {
			in    Runner
			index func(door) int
		}{{e.host, func(d door) int { return d.index }}, {e.outside, func(d door) int { return d.link.Index }}} {
			if err := side.in(func() error {
				for _, d := range e.doors {
					l, err := netlink.LinkByIndex(side.index(d))
					if err != nil {
						return err
					}
					if l.Attrs().OperState != netlink.OperUp {
						down = d.in
					}
				}
				return nil
			}); err != nil {
				return err
			}
		}
		switch {
		case down == "":
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("the way to %s does not come up", down)
		}
		time.Sleep(time.Millisecond)
	}
}

// link gives the outside end of the door to an interface.
func (e *entrance) link(in string) Link {
	for _, d := range e.doors {
		if d.in == in {
			return d.link
		}
	}
	return Link{}
}

// admit makes the answers to the sources of some paths come out, and whatever goes to
// some strangers, whom nobody else may be; s tells how.
func (e *entrance) admit(paths, strangers []Path, s *surroundings) error {
	var ports []uint16
	local := map[netip.Addr]netip.Addr{}
	turned := map[*hostLink][]netip.Addr{}
	var routed []netip.Addr
	for i := range paths {
		p := &paths[i]
		ports = append(ports, p.SrcPort)
		if _, seen := local[p.Src]; seen {
			continue
		}
		local[p.Src] = p.Dst
		switch w := s.back(p.Src); {
		case w.divert == nil:
			routed = append(routed, p.Src)
		default:
			turned[w.divert] = append(turned[w.divert], p.Src)
			if w.strange {
				e.strays = append(e.strays, e.stray(p.Src, w))
			}
		}
	}
	out := e.doors[0].index
	apart := seclusion{to: out}
	for i := range strangers {
		p := &strangers[i]
		apart.addrs = append(apart.addrs, p.Src)
		local[p.Src] = p.Dst
		switch w := s.back(p.Src); {
		case w.divert == nil:
			routed = append(routed, p.Src)
		case w.strange:
			e.strays = append(e.strays, e.stray(p.Src, w))
		}
	}
	if len(turned)+len(strangers) > 0 {
		var list []diversion
		for l, addrs := range turned {
			list = append(list, diversion{l.name, addrs, out})
		}
		if err := e.host(func() (err error) {
			apart.links, err = s.present()
			return err
		}); err != nil {
			return err
		}
		var err error
		if e.divert, err = armDiverter(e.host, ports, list, apart); err != nil {
			return err
		}
	}
	return e.host(func() error {
		for _, gateway := range []string{gateway4, gateway6} {
			ip := net.ParseIP(gateway)
			if len(routed) == 0 || ip.To4() == nil && !hasIPv6() {
				continue
			}
			if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: out, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: e.doors[0].link.Src}); err != nil {
				return fmt.Errorf("name the outside on %s0: %w", doorName, err)
			}
		}
		for _, a := range routed {
			if err := routeBack(a, local[a], out); err != nil {
				return err
			}
		}
		return e.tellStrays()
	})
}

// stray is what the host is told of an address on its link that nobody has.
func (e *entrance) stray(a netip.Addr, w wayBack) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: w.divert.index, State: netlink.NUD_REACHABLE, IP: a.AsSlice(), HardwareAddr: e.doors[0].link.Src}
}

// comesBack reports whether what the host sends from an address of its own to a
// stranger leaves where it is turned to the outside; it runs in the host.
func (e *entrance) comesBack(from, stranger netip.Addr, s *surroundings) bool {
	want := e.doors[0].index
	if w := s.back(stranger); w.divert != nil {
		want = w.divert.index
	}
	routes, err := netlink.RouteGetWithOptions(stranger.AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.AsSlice()})
	return err == nil && len(routes) > 0 && routes[0].LinkIndex == want && routes[0].Encap == nil
}

// routeBack makes the host answer an address by the outside.
func routeBack(to, from netip.Addr, index int) error {
	gateway := gateway4
	if to.Is6() {
		gateway = gateway6
	}
	err := netlink.RouteAdd(&netlink.Route{
		LinkIndex: index, Dst: ipNet(netip.PrefixFrom(to, to.BitLen())), Gw: net.ParseIP(gateway), Flags: int(netlink.FLAG_ONLINK), Src: from.AsSlice(),
	})
	if err != nil {
		return fmt.Errorf("route to %s: %w", to, err)
	}
	route, err := routeTo(to)
	if err != nil {
		return err
	}
	if route.LinkIndex != index {
		return fmt.Errorf("the routing rules of this host (ip rule) send answers to %s elsewhere", to)
	}
	return nil
}

// tellStrays tells the host where the addresses on its links are that nobody has,
// again and again: the kernel forgets it by itself, should this process be killed.
func (e *entrance) tellStrays() error {
	if len(e.strays) == 0 {
		return nil
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	tell := func() error {
		for _, n := range e.strays {
			if err := h.NeighSet(n); err != nil {
				return fmt.Errorf("name %s on the link: %w", n.IP, err)
			}
		}
		return nil
	}
	if err := tell(); err != nil {
		h.Close()
		return err
	}
	e.kept.Add(1)
	go func() {
		defer e.kept.Done()
		defer h.Close()
		again := time.NewTicker(3 * time.Second)
		defer again.Stop()
		for {
			select {
			case <-e.stop:
				return
			case <-again.C:
				_ = tell() // else the canaries tell
			}
		}
	}()
	return nil
}

// forgetStrays removes from the host what it was told by a vantage that was killed;
// it runs in the host.
func forgetStrays() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.NeighList(0, family)
		if err != nil {
			return fmt.Errorf("list neighbours: %w", err)
		}
		for _, n := range list {
			if isOurs(n.HardwareAddr) {
				if err := netlink.NeighDel(&n); err != nil && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("forget %s: %w", n.IP, err)
				}
			}
		}
	}
	return nil
}

// close makes the host as it was. What is left of answers is diverted to the last.
func (e *entrance) close() error {
	close(e.stop)
	e.kept.Wait()
	var errs []error
	if len(e.doors) > 0 {
		errs = append(errs, e.host(func() error {
			var errs []error
			for _, d := range e.doors {
				err := netlink.LinkDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: d.index}})
				if err != nil && !errors.Is(err, unix.ENODEV) {
					errs = append(errs, fmt.Errorf("remove the way to %s: %w", d.in, err))
				}
			}
			if len(e.strays) > 0 {
				errs = append(errs, forgetStrays())
			}
			return errors.Join(errs...)
		}))
	}
	if e.divert != nil {
		errs = append(errs, e.divert.remove())
	}
	if e.ns != nil {
		errs = append(errs, e.ns.Close())
	}
	return errors.Join(errs...)
}
