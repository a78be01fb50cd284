package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/firewall"
	"deadlight/rules"
)

// What the kernel says of the calling thread's network namespace to a [tracer].

// establishedTCP lists the connections.
func establishedTCP() ([]endpoint, error) {
	return endpoints(rules.TCP, firewall.SocketEstablished)
}

// boundUDP lists the sockets that are bound and not connected.
func boundUDP() ([]endpoint, error) {
	return endpoints(rules.UDP, firewall.SocketClose)
}

func endpoints(p rules.Protocol, state firewall.SocketState) ([]endpoint, error) {
	sockets, err := firewall.Sockets(p, state)
	if err != nil {
		return nil, err
	}
	var out []endpoint
	for _, s := range sockets {
		out = append(out, endpoint{inode: s.Inode, bound: s.Device, local: s.Local, remote: s.Remote})
	}
	return out, nil
}

// udpFlows finds the flow to a local port that a packet of was seen last, in
// conntrack; none where that does not run.
func udpFlows(port uint16) (endpoint, bool, error) {
	var newest *netlink.ConntrackFlow
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		var flows []*netlink.ConntrackFlow
		err := error(netlink.ErrDumpInterrupted)
		for tries := 0; tries < 10 && errors.Is(err, netlink.ErrDumpInterrupted); tries++ {
			flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, family)
		}
		if errors.Is(err, unix.EPERM) {
			return endpoint{}, false, nil // who may not ask may not change a rule either
		}
		if err != nil {
			return endpoint{}, false, fmt.Errorf("list the flows: %w", err)
		}
		for _, f := range flows {
			// Each packet sets the time that is left anew.
			if f.Forward.Protocol == uint8(rules.UDP) && f.Forward.DstPort == port && (newest == nil || f.TimeOut > newest.TimeOut) {
				newest = f
			}
		}
	}
	if newest == nil {
		return endpoint{}, false, nil
	}
	local, ok1 := netip.AddrFromSlice(newest.Forward.DstIP)
	remote, ok2 := netip.AddrFromSlice(newest.Forward.SrcIP)
	return endpoint{
		local:  netip.AddrPortFrom(local.Unmap(), newest.Forward.DstPort),
		remote: netip.AddrPortFrom(remote.Unmap(), newest.Forward.SrcPort),
	}, ok1 && ok2, nil
}

// wayBack names the interface of a connection: the one it is bound to, else the
// one by which answers leave; "" when there is no way.
func wayBack(e endpoint) (string, error) {
	index := e.bound
	if index == 0 {
		routes, err := netlink.RouteGetWithOptions(e.remote.Addr().AsSlice(), &netlink.RouteGetOptions{SrcAddr: e.local.Addr().AsSlice()})
		switch {
		case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EACCES):
			return "", nil // unreachable, blackhole, prohibit, or an address that has gone
		case err != nil:
			return "", fmt.Errorf("find the way to %s: %w", e.remote.Addr(), err)
		case len(routes) == 0:
			return "", nil
		}
		index = routes[0].LinkIndex
	}
	link, err := netlink.LinkByIndex(index)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("name interface %d: %w", index, err)
	}
	return link.Attrs().Name, nil
}
