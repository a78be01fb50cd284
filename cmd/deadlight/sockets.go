package main

import (
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

// listener is a socket that takes what comes from outside: TCP that listens, or
// UDP that is not connected.
type listener struct {
	Protocol rules.Protocol
	Addr     netip.Addr // unspecified: every address; of ::, IPv4 too unless the socket says no, which cannot be seen
	Port     uint16
	PID      int    // the lowest that holds it; 0: cannot be told
	Comm     string // its name
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
	return l.Addr.Is4() == v4 || l.Addr == netip.IPv6Unspecified()
}

// listeners lists the sockets of the calling thread's network namespace that
// take what comes from outside, by protocol and port. Those bound to loopback
// are left out.
func listeners() ([]listener, error) {
	const listen, closed = 10, 7 // TCP_LISTEN, TCP_CLOSE: include/net/tcp_states.h
	var found []listener
	inodes := map[uint32][]int{} // indexes of found
	for _, kind := range []struct {
		protocol rules.Protocol
		state    uint8
		dump     func(family uint8) ([]*netlink.Socket, error)
	}{{rules.TCP, listen, netlink.SocketDiagTCP}, {rules.UDP, closed, netlink.SocketDiagUDP}} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := kind.dump(family)
			if err != nil {
				return nil, fmt.Errorf("list the sockets: %w", err)
			}
			for _, s := range sockets {
				addr, ok := netip.AddrFromSlice(s.ID.Source)
				addr = addr.Unmap()
				if !ok || s.State != kind.state || s.ID.SourcePort == 0 || s.ID.DestinationPort != 0 || addr.IsLoopback() {
					continue
				}
				inodes[s.INode] = append(inodes[s.INode], len(found))
				found = append(found, listener{Protocol: kind.protocol, Addr: addr, Port: s.ID.SourcePort})
			}
		}
	}
	if err := nameHolders(found, inodes); err != nil {
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b listener) int {
		if a.Protocol != b.Protocol {
			return int(a.Protocol) - int(b.Protocol)
		}
		if a.Port != b.Port {
			return int(a.Port) - int(b.Port)
		}
		return a.Addr.Compare(b.Addr)
	})
	return found, nil
}

// nameHolders finds the processes that hold the sockets (proc_pid_fd(5)). What
// this user may not see stays without a name.
func nameHolders(found []listener, inodes map[uint32][]int) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return fmt.Errorf("list the processes: %w", err)
	}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue // it has ended, or is none of our business
		}
		for _, fd := range fds {
			link, err := os.Readlink(dir + "/fd/" + fd.Name())
			if err != nil {
				continue
			}
			text, ok := strings.CutPrefix(link, "socket:[")
			if !ok {
				continue
			}
			inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32)
			if err != nil {
				continue
			}
			for _, i := range inodes[uint32(inode)] {
				if found[i].PID == 0 || pid < found[i].PID {
					comm, err := os.ReadFile(dir + "/comm")
					if err == nil {
						found[i].PID, found[i].Comm = pid, strings.TrimSuffix(string(comm), "\n")
					}
				}
			}
		}
	}
	return nil
}
