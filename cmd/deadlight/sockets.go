package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"deadlight/firewall"
	"deadlight/rules"
)

// listener is a socket that takes what comes from outside: TCP that listens, or
// UDP that is not connected.
type listener struct {
	Protocol rules.Protocol
	Addr     netip.Addr // unspecified: every address; of ::, IPv4 too unless V6Only
	Port     uint16
	PID      int    // the lowest that holds it; 0: cannot be told
	Comm     string // its name
	V6Only   bool
	MPTCP    bool
	Device   string // the interface it is bound to; "": none
	Inode    uint32 // 0: the kernel's own
	UID      uint32 // who made it
}

// String names the process, as far as it is known.
func (l listener) String() string {
	if l.PID == 0 {
		return "a process that cannot be told"
	}
	return fmt.Sprintf("%s (pid %d)", l.Comm, l.PID)
}

// takes reports whether packets of a family can reach the socket.
func (l listener) takes(v4 bool) bool {
	return l.Addr.Is4() == v4 || l.Addr == netip.IPv6Unspecified() && !l.V6Only
}

// loopback reports whether only this host itself can reach the socket.
func (l listener) loopback() bool { return l.Addr.IsLoopback() || l.Device == "lo" }

// listeners lists the sockets of the calling thread's network namespace that
// take what comes from outside, by protocol and port. Those bound to loopback
// are left out.
func listeners() ([]listener, error) {
	all, err := allListeners()
	return slices.DeleteFunc(all, listener.loopback), err
}

// allListeners is listeners with those that only this host itself can reach.
// Sockets that one process has bound alike are one.
func allListeners() ([]listener, error) {
	var found []listener
	owners := map[uint32]firewall.Process{}
	devices := map[int]string{}
	for _, kind := range []struct {
		protocol rules.Protocol
		state    firewall.SocketState
	}{{rules.TCP, firewall.SocketListen}, {rules.UDP, firewall.SocketClose}} {
		sockets, err := firewall.Sockets(kind.protocol, kind.state)
		if err != nil {
			return nil, err
		}
		for _, s := range sockets {
			if s.Local.Port() == 0 || s.Remote.Port() != 0 {
				continue
			}
			device, err := deviceName(devices, s.Device)
			if err != nil {
				return nil, err
			}
			owners[s.Inode] = firewall.Process{}
			found = append(found, listener{
				Protocol: s.Protocol, Addr: s.Local.Addr(), Port: s.Local.Port(), V6Only: s.V6Only, MPTCP: s.MPTCP,
				Device: device, Inode: s.Inode, UID: s.UID,
			})
		}
	}
	delete(owners, 0)
	firewall.Owners(owners)
	for i := range found {
		p := owners[found[i].Inode]
		found[i].PID, found[i].Comm = p.PID, p.Comm
	}
	slices.SortStableFunc(found, func(a, b listener) int {
		return cmp.Or(int(a.Protocol)-int(b.Protocol), int(a.Port)-int(b.Port), a.Addr.Compare(b.Addr),
			cmp.Compare(a.Device, b.Device), a.PID-b.PID)
	})
	return slices.CompactFunc(found, func(a, b listener) bool {
		a.Inode, b.Inode = 0, 0
		return a == b
	}), nil
}

// deviceName names an interface by its index, once; 0 is none.
func deviceName(known map[int]string, index int) (string, error) {
	if index == 0 {
		return "", nil
	}
	if name, ok := known[index]; ok {
		return name, nil
	}
	link, err := net.InterfaceByIndex(index)
	var op *net.OpError
	switch {
	case err == nil:
		known[index] = link.Name
	case errors.As(err, &op): // it has gone since: nothing enters by it any more
		known[index] = fmt.Sprintf("if%d", index)
	default:
		return "", fmt.Errorf("name interface %d: %w", index, err)
	}
	return known[index], nil
}
