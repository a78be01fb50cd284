package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What the walk must know of the host beside its rules: interfaces by number,
// and which addresses are its own.

type hostView struct {
	links map[string]hostLink // nil: could not be read
	addrs map[netip.Addr]bool
	route func(netip.Addr) (typ int, dev string, ok bool) // the way to an address; nil: unknown
}

type hostLink struct {
	index uint32
	group uint32
	addrs []netip.Addr
}

// inside runs fn on a thread in the namespace of the socket.
func (c *Conn) inside(fn func() error) error {
	runtime.LockOSThread()
	if c.here() {
		defer runtime.UnlockOSThread()
		return fn()
	}
	runtime.UnlockOSThread()
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread has left its namespace and ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(c.ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the network namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// here reports whether the calling thread is in the namespace of the socket.
func (c *Conn) here() bool {
	var own, want unix.Stat_t
	if unix.Stat("/proc/thread-self/ns/net", &own) != nil || unix.Fstat(int(c.ns.Fd()), &want) != nil {
		return false
	}
	return own.Ino == want.Ino && own.Dev == want.Dev
}

// lookAround reads interfaces, addresses and the tables of legacy iptables, and
// says what it could not read.
func (c *Conn) lookAround() (*hostView, []string) {
	h := &hostView{route: c.routeTo}
	var notes []string
	err := c.inside(func() error {
		notes = append(notes, legacyTables()...)
		return h.read()
	})
	if err != nil {
		notes = append(notes, fmt.Sprintf("the host's own addresses could not be read: %v", err))
		return &hostView{}, notes
	}
	return h, notes
}

func (h *hostView) read() error {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	links, err := nl.LinkList()
	if err != nil {
		return err
	}
	h.links, h.addrs = map[string]hostLink{}, map[netip.Addr]bool{}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		h.links[a.Name] = hostLink{index: uint32(a.Index), group: a.Group}
		names[a.Index] = a.Name
	}
	addrs, err := nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		ip, ok := plainAddr(a.IP)
		if !ok {
			continue
		}
		h.addrs[ip] = true
		l := h.links[names[a.LinkIndex]]
		l.addrs = append(l.addrs, ip)
		h.links[names[a.LinkIndex]] = l
	}
	return nil
}

// routeTo asks the kernel where packets to an address go: the type of the route
// (RTN_*) and the interface. ok is false when there is no telling.
func (c *Conn) routeTo(to netip.Addr) (typ int, dev string, ok bool) {
	err := c.inside(func() error {
		nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer nl.Close()
		routes, err := nl.RouteGet(to.AsSlice())
		if err != nil || len(routes) != 1 {
			return errors.Join(err, fmt.Errorf("%d routes to %s", len(routes), to))
		}
		link, err := nl.LinkByIndex(routes[0].LinkIndex)
		if err != nil {
			return err
		}
		typ, dev = routes[0].Type, link.Attrs().Name
		return nil
	})
	return typ, dev, err == nil
}

func plainAddr(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}

// legacyTables notes the tables of iptables-legacy in the thread's namespace:
// nf_tables cannot see them.
func legacyTables() []string {
	var notes []string
	for _, f := range []struct{ file, tool string }{{"ip_tables_names", "iptables-legacy"}, {"ip6_tables_names", "ip6tables-legacy"}} {
		b, err := os.ReadFile("/proc/thread-self/net/" + f.file)
		switch tables := strings.Fields(string(b)); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			notes = append(notes, fmt.Sprintf("whether %s has tables could not be read: %v", f.tool, err))
		case len(tables) > 0:
			notes = append(notes, fmt.Sprintf("not walked: the tables of %s (%s)", f.tool, strings.Join(tables, ", ")))
		}
	}
	return notes
}
