package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Runner runs fn on a thread that is inside one network namespace for as long
// as fn lasts: [World.Host], or [Here]. Sockets that fn opens stay in that
// namespace; goroutines that fn starts do not run in it.
type Runner func(fn func() error) error

// Here is the [Runner] of the process's own network namespace.
func Here(fn func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return fn()
}

// WorldConfig is the host that [NewWorld] makes. One of the addresses may be
// the zero Addr: the host then lacks that family.
type WorldConfig struct {
	Host4, Host6 netip.Addr
	// More are further addresses of the host, each of a family that it has.
	More []netip.Addr
	// Links names the host's interfaces as the policy does, each up to 15 bytes
	// and once. The first holds the addresses and the default routes.
	Links []string
}

// World is a host and its outside, made of throw-away namespaces. The outside is
// the process's own network namespace, so that whatever goes astray in this
// process hits nobody; the host is a second one, kept alive by one open file.
//
// The host accepts packets to its addresses over every link (the weak host
// model, no reverse path filter). Its answers, whatever address they go to,
// leave by the first link unless [World.Route] says otherwise, and reach the
// outside without ARP or neighbour discovery. TCP and UDP checksums of frames
// that come out of the host may be unfinished, as on any veth.
type World struct {
	host  *os.File
	id    nsID
	links []worldLink
	has6  bool
}

// worldLink is both ends of one veth.
type worldLink struct {
	name      string // on the host
	hostIndex int
	out       Link
}

// The gateway every answer goes to. Nobody owns it: its neighbour entry is
// permanent, so that any address stands for "out by this link".
const (
	gateway4 = "169.254.0.1"
	gateway6 = "fe80::1"
)

// NewWorld makes a world. It refuses in a process that is not [Isolated]: the
// outside would be the machine's own network.
func NewWorld(cfg WorldConfig) (*World, error) {
	if !Isolated() {
		return nil, errors.New("make throw-away host: this process is not isolated")
	}
	if err := cfg.check(); err != nil {
		return nil, fmt.Errorf("make throw-away host: %w", err)
	}
	w := &World{}
	if err := w.build(cfg); err != nil {
		w.Close()
		return nil, fmt.Errorf("make throw-away host: %w", err)
	}
	return w, nil
}

// check finds what the kernel would refuse or, worse, take for something else.
func (cfg WorldConfig) check() error {
	if !cfg.Host4.IsValid() && !cfg.Host6.IsValid() {
		return errors.New("it has no address")
	}
	for _, a := range []netip.Addr{cfg.Host4, cfg.Host6} {
		if a.IsValid() && (a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Zone() != "" || a.Is4In6()) {
			return fmt.Errorf("%s cannot be its address", a)
		}
	}
	if cfg.Host4.IsValid() && !cfg.Host4.Is4() {
		return fmt.Errorf("%s is not an IPv4 address", cfg.Host4)
	}
	if cfg.Host6.IsValid() && !cfg.Host6.Is6() {
		return fmt.Errorf("%s is not an IPv6 address", cfg.Host6)
	}
	if len(cfg.Links) == 0 {
		return errors.New("it has no interface")
	}
	seen := map[string]bool{"lo": true, "all": true, "default": true, ".": true, "..": true}
	for _, name := range cfg.Links {
		// dev_valid_name of net/core/dev.c, and % that it takes for a template
		if name == "" || len(name) >= unix.IFNAMSIZ || strings.ContainsAny(name, "/: \t\n\v\f\r%\x00") || seen[name] {
			return fmt.Errorf("%q cannot be the name of an interface of it", name)
		}
		seen[name] = true
	}
	return nil
}

// build makes everything; Close undoes what a failure left.
func (w *World) build(cfg WorldConfig) error {
	if err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return newNamespaceError(err, false, readSetting)
		}
		var err error
		if w.id, err = threadNetNS(); err != nil {
			return err
		}
		w.host, err = os.Open("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		return err
	}
	w.has6 = hasIPv6()
	if cfg.Host6.IsValid() && !w.has6 {
		return errors.New("this kernel has no IPv6")
	}

	// Defaults first: what the kernel does with a new interface must be quiet already.
	if err := w.Host(func() error { return w.quietDefaults() }); err != nil {
		return err
	}
	for i, name := range cfg.Links {
		l, err := w.addLink(i, name)
		if l.out.Index != 0 {
			w.links = append(w.links, l)
		}
		if err != nil {
			return fmt.Errorf("interface %q: %w", name, err)
		}
	}
	if err := w.Host(func() error { return w.configureHost(cfg) }); err != nil {
		return err
	}
	if err := w.awaitCarrier(); err != nil {
		return err
	}
	return w.Host(awaitAddresses)
}

// Settings of the host that make it accept and answer what a test sends, and
// keep it from talking by itself (Documentation/networking/ip-sysctl.rst).
func (w *World) quietDefaults() error {
	for _, conf := range []string{"all", "default"} {
		if err := w.quiet(conf); err != nil {
			return err
		}
	}
	return nil
}

func (w *World) quiet(conf string) error {
	type setting struct{ path, value string }
	settings := []setting{
		{"ipv4/conf/" + conf + "/rp_filter", "0"}, // the largest of all and the interface counts
		{"ipv4/conf/" + conf + "/log_martians", "0"},
	}
	if w.has6 {
		settings = append(settings,
			setting{"ipv6/conf/" + conf + "/disable_ipv6", "0"}, // inherited from the machine on some
			setting{"ipv6/conf/" + conf + "/accept_dad", "0"},
			setting{"ipv6/conf/" + conf + "/accept_ra", "0"},
			setting{"ipv6/conf/" + conf + "/router_solicitations", "0"})
	}
	for _, s := range settings {
		if err := setNetSysctl(s.path, s.value); err != nil {
			return err
		}
	}
	return nil
}

// setNetSysctl writes below /proc/sys/net of the calling thread's namespace.
func setNetSysctl(path, value string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net", path), []byte(value), 0o644)
	if errors.Is(err, unix.EROFS) {
		return fmt.Errorf("/proc/sys is read-only here, as in a container without privileges: %w", err)
	}
	return err
}

// addLink makes the i-th veth. Its outside end has a name that no other world of
// this process has.
func (w *World) addLink(i int, name string) (worldLink, error) {
	outside := fmt.Sprintf("dl%08x-%d", uint32(w.id.ino), i)
	mac := func(side byte) net.HardwareAddr {
		return net.HardwareAddr{0x02, 0xde, 0xad, side, byte(i >> 8), byte(i)}
	}
	l := worldLink{name: name, out: Link{Name: outside, Src: mac(1), Dst: mac(2)}}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = outside, l.out.Src
	if err := netlink.LinkAdd(&netlink.Veth{
		LinkAttrs:        attrs,
		PeerName:         name,
		PeerHardwareAddr: l.out.Dst,
		PeerNamespace:    netlink.NsFd(int(w.host.Fd())),
	}); err != nil {
		return l, err
	}
	end, err := netlink.LinkByName(outside)
	if err != nil {
		return l, err
	}
	l.out.Index = end.Attrs().Index
	l.hostIndex = end.Attrs().ParentIndex // IFLA_LINK: the peer
	if w.has6 {
		// No link-local address outside, so no neighbour discovery and no MLD reports from there.
		if err := setNetSysctl("ipv6/conf/"+outside+"/addr_gen_mode", "1"); err != nil {
			return l, err
		}
	}
	return l, netlink.LinkSetUp(end)
}

// configureHost runs inside the host.
func (w *World) configureHost(cfg WorldConfig) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, l := range w.links {
		// Again for each: an interface may have been made before its defaults were.
		if err := w.quiet(l.name); err != nil {
			return err
		}
		end, err := netlink.LinkByIndex(l.hostIndex)
		if err != nil {
			return err
		}
		if got := end.Attrs().Name; got != l.name {
			return fmt.Errorf("interface %q came up as %q", l.name, got)
		}
		if err := netlink.LinkSetUp(end); err != nil {
			return fmt.Errorf("interface %q: %w", l.name, err)
		}
	}
	for _, f := range []struct {
		host    netip.Addr
		gateway string
	}{
		{cfg.Host4, gateway4},
		{cfg.Host6, gateway6},
	} {
		if !f.host.IsValid() {
			continue
		}
		first, err := netlink.LinkByIndex(w.links[0].hostIndex)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(first, &netlink.Addr{
			IPNet: ipNet(netip.PrefixFrom(f.host, f.host.BitLen())),
			Flags: unix.IFA_F_NODAD,
		}); err != nil {
			return fmt.Errorf("address %s: %w", f.host, err)
		}
		for _, a := range cfg.More {
			if a.Is4() != f.host.Is4() {
				continue
			}
			if err := netlink.AddrAdd(first, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}); err != nil {
				return fmt.Errorf("address %s: %w", a, err)
			}
		}
		for _, l := range w.links {
			if err := netlink.NeighSet(&netlink.Neigh{
				LinkIndex:    l.hostIndex,
				State:        netlink.NUD_PERMANENT,
				IP:           net.ParseIP(f.gateway),
				HardwareAddr: l.out.Src,
			}); err != nil {
				return fmt.Errorf("gateway of %q: %w", l.name, err)
			}
		}
		any := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if f.host.Is6() {
			any = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		if err := routeOut(any, w.links[0].hostIndex); err != nil {
			return fmt.Errorf("default route of %s: %w", f.host, err)
		}
	}
	return nil
}

// routeOut runs inside the host.
func routeOut(to netip.Prefix, index int) error {
	gateway := gateway4
	if to.Addr().Is6() {
		gateway = gateway6
	}
	return netlink.RouteReplace(&netlink.Route{
		LinkIndex: index,
		Dst:       ipNet(to),
		Gw:        net.ParseIP(gateway),
		Flags:     int(netlink.FLAG_ONLINK),
	})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// awaitCarrier waits until both ends of every link carry frames: right after
// "up" the kernel still drops what is sent, without an error.
func (w *World) awaitCarrier() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		down := ""
		look := func(name string, index int) error {
			end, err := netlink.LinkByIndex(index)
			if err == nil && end.Attrs().OperState != netlink.OperUp {
				down = name
			}
			return err
		}
		for _, l := range w.links {
			if err := look(l.out.Name, l.out.Index); err != nil {
				return err
			}
		}
		if err := w.Host(func() error {
			for _, l := range w.links {
				if err := look(l.name, l.hostIndex); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return err
		}
		switch {
		case down == "":
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("interface %q does not come up", down)
		}
		time.Sleep(time.Millisecond)
	}
}

// awaitAddresses waits until packets to every IPv6 address of the host are its
// own: the kernel adds that route later than the address (addrconf_dad_work), and
// takes the packets for transit until then. It runs inside the host.
func awaitAddresses() error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		missing := ""
		for _, l := range links {
			addrs, err := netlink.AddrList(l, netlink.FAMILY_V6)
			if err != nil {
				return err
			}
			for _, addr := range addrs {
				a, _ := netip.AddrFromSlice(addr.IP)
				if a.IsLinkLocalUnicast() {
					a = a.WithZone(l.Attrs().Name)
				}
				if _, err := routeTo(a); !errors.Is(err, ErrLocalTarget) {
					missing = a.String()
				}
			}
		}
		switch {
		case missing == "":
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("address %s does not come up", missing)
		}
		time.Sleep(time.Millisecond)
	}
}

// hasIPv6 reports whether the kernel knows IPv6 at all.
func hasIPv6() bool {
	_, err := os.Stat("/proc/thread-self/net/if_inet6")
	return err == nil
}

// Host runs fn inside the host. It is a [Runner].
func (w *World) Host(fn func() error) error {
	if w.host == nil {
		return errors.New("throw-away host: closed")
	}
	return inNetNS(w.host, w.id, "throw-away host", fn)
}

// inNetNS runs fn on a thread of its own in a network namespace, and only there.
func inNetNS(ns *os.File, id nsID, what string, fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter %s: %w", what, err)
		}
		runtime.KeepAlive(ns)
		got, err := threadNetNS()
		if err != nil {
			return err
		}
		if got != id {
			return fmt.Errorf("enter %s: this is another network", what)
		}
		return fn()
	})
}

// onThread runs fn on a thread that may change namespaces: it is thrown away
// afterwards instead of led back, so that nothing else ever runs on it.
func onThread(fn func() error) error {
	result := make(chan error, 1)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The first thread cannot be thrown away; while we hold it, the next try gets another.
			defer runtime.UnlockOSThread()
			done := make(chan struct{})
			go func() { defer close(done); run() }()
			<-done
			return
		}
		result <- errors.New("thread ended early") // what is left should fn call runtime.Goexit
		err := fn()
		<-result
		result <- err
	}
	done := make(chan struct{})
	go func() { defer close(done); run() }() // ends locked: Go ends the thread with it
	<-done
	return <-result
}

// Link gives the outside end of a host's interface, and the zero Link where
// there is no such interface.
func (w *World) Link(name string) Link {
	for _, l := range w.links {
		if l.name == name {
			return l.out
		}
	}
	return Link{}
}

// Route makes the host's answers to addresses of a prefix leave by a link.
func (w *World) Route(to netip.Prefix, link string) error {
	for _, l := range w.links {
		if l.name == link {
			if err := w.Host(func() error { return routeOut(to.Masked(), l.hostIndex) }); err != nil {
				return fmt.Errorf("route %s by %q: %w", to, link, err)
			}
			return nil
		}
	}
	return fmt.Errorf("route %s by %q: no such interface", to, link)
}

// cut takes the host's end of every link down, which the outside sees only as a
// lost carrier.
func (w *World) cut() error {
	return w.Host(func() error {
		for _, l := range w.links {
			end, err := netlink.LinkByIndex(l.hostIndex)
			if err == nil {
				err = netlink.LinkSetDown(end)
			}
			if err != nil {
				return fmt.Errorf("cut %q: %w", l.name, err)
			}
		}
		return nil
	})
}

// HostFile is the host's network namespace. It is the World's: valid until
// Close, and not to be closed by others.
func (w *World) HostFile() *os.File { return w.host }

// Command runs a program inside the host until it ends; a done ctx sends SIGTERM
// and, some seconds later, SIGKILL. Its standard input is ours. An exit code
// other than 0 is an [*exec.ExitError] in the error chain. Processes that it
// leaves behind live until this process ends.
func (w *World) Command(ctx context.Context, argv []string, stdout, stderr io.Writer) error {
	if len(argv) == 0 {
		return errors.New("run in throw-away host: no command")
	}
	return w.Host(func() error {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, stdout, stderr
		cmd.Env = withoutMarker(os.Environ())
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = 3 * time.Second
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("run %q in throw-away host: %w", argv[0], err)
		}
		return nil
	})
}

// Close takes the world down. Sockets that somebody still holds in the host keep
// its namespace, without any link, until they are closed.
func (w *World) Close() error {
	var errs []error
	for _, l := range w.links {
		err := netlink.LinkDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: l.out.Index}})
		if err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", l.out.Name, err))
		}
	}
	w.links = nil
	if w.host != nil {
		errs = append(errs, w.host.Close())
		w.host = nil
	}
	return errors.Join(errs...)
}
