package firewall

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Sockets tells what tells one way to bind from another.
func TestSockets(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		open := func(family, typ, protocol int, at unix.Sockaddr, options ...func(fd int) error) {
			t.Helper()
			fd, err := unix.Socket(family, typ|unix.SOCK_CLOEXEC, protocol)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Close(fd) })
			for _, o := range options {
				if err := o(fd); err != nil {
					t.Fatal(err)
				}
			}
			if err := unix.Bind(fd, at); err != nil {
				t.Fatal(err)
			}
			if typ == unix.SOCK_STREAM {
				if err := unix.Listen(fd, 1); err != nil {
					t.Fatal(err)
				}
			}
		}
		alone := func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1) }
		both := func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0) }
		onLo := func(fd int) error { return unix.SetsockoptString(fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "lo") }
		open(unix.AF_INET6, unix.SOCK_STREAM, 0, &unix.SockaddrInet6{Port: 81}, alone)
		open(unix.AF_INET6, unix.SOCK_STREAM, 0, &unix.SockaddrInet6{Port: 82}, both)
		open(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, &unix.SockaddrInet4{Port: 83})
		open(unix.AF_INET, unix.SOCK_STREAM, 0, &unix.SockaddrInet4{Port: 84, Addr: [4]byte{127, 0, 0, 1}})
		open(unix.AF_INET, unix.SOCK_DGRAM, 0, &unix.SockaddrInet4{Port: 67}, onLo)
		open(unix.AF_INET6, unix.SOCK_STREAM, 0, &unix.SockaddrInet6{Port: 85, Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}, both)
		lo, err := net.InterfaceByName("lo")
		if err != nil {
			t.Fatal(err)
		}
		tcp, err := Sockets(rules.TCP, SocketListen)
		if err != nil {
			t.Fatal(err)
		}
		udp, err := Sockets(rules.UDP, SocketClose)
		if err != nil {
			t.Fatal(err)
		}
		got := map[uint16]Socket{}
		owners := map[uint32]Process{}
		for _, s := range slices.Concat(tcp, udp) {
			owners[s.Inode] = Process{}
			if s.UID != uint32(os.Geteuid()) || s.Inode == 0 {
				t.Errorf("%+v: whose is it?", s)
			}
			s.UID, s.Inode = 0, 0
			got[s.Local.Port()] = s
		}
		ap := netip.MustParseAddrPort
		none4, none6 := ap("0.0.0.0:0"), ap("[::]:0")
		want := map[uint16]Socket{
			81: {Protocol: rules.TCP, State: SocketListen, Local: ap("[::]:81"), Remote: none6, V6Only: true},
			82: {Protocol: rules.TCP, State: SocketListen, Local: ap("[::]:82"), Remote: none6},
			83: {Protocol: rules.TCP, State: SocketListen, Local: ap("0.0.0.0:83"), Remote: none4, MPTCP: true},
			84: {Protocol: rules.TCP, State: SocketListen, Local: ap("127.0.0.1:84"), Remote: none4},
			85: {Protocol: rules.TCP, State: SocketListen, Local: ap("127.0.0.1:85"), Remote: none6},
			67: {Protocol: rules.UDP, State: SocketClose, Local: ap("0.0.0.0:67"), Remote: none4, Device: lo.Index},
		}
		for port, w := range want {
			if got[port] != w {
				t.Errorf("port %d: %+v, want %+v", port, got[port], w)
			}
		}
		if len(got) != len(want) {
			t.Errorf("%d sockets, want %d: %+v", len(got), len(want), got)
		}
		Owners(owners)
		for inode, p := range owners {
			if p.PID != os.Getpid() {
				t.Errorf("socket %d is of process %d, not ours", inode, p.PID)
			}
		}
		for to, ports := range map[string][]uint16{"192.0.2.1": {82, 83}, "2001:db8::1": {81, 82}, "127.0.0.1": {82, 83, 84, 85}} {
			var takes []uint16
			for _, s := range tcp {
				if s.Takes(netip.MustParseAddr(to)) {
					takes = append(takes, s.Local.Port())
				}
			}
			slices.Sort(takes)
			if !slices.Equal(takes, ports) {
				t.Errorf("%s: taken at %v, want %v", to, takes, ports)
			}
		}
	})
}

// PublishedRuns begins a run wherever a rule names a port, and says nothing where
// nobody sends packets on. A walk tells where they go.
func TestPublishedRuns(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		runs := func() []uint16 {
			t.Helper()
			out, err := l.c.PublishedRuns()
			if err != nil {
				t.Fatal(err)
			}
			return out
		}
		if got := runs(); got != nil {
			t.Errorf("no table: %v", got)
		}
		tool(t, "iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT")
		if got := runs(); got != nil {
			t.Errorf("nobody sends on: %v", got)
		}
		tool(t, "iptables-nft -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 80")
		tool(t, "iptables-nft -t nat -A PREROUTING -p udp --dport 6000:6010 -j REDIRECT --to-ports 80")
		got := runs()
		for _, p := range []uint16{1, 8080, 8081, 6000} {
			if !slices.Contains(got, p) {
				t.Errorf("no run begins at %d: %v", p, got)
			}
		}
		if !slices.Contains(got, 6011) {
			t.Errorf("no run ends before 6011: %v", got)
		}
		for port, want := range map[uint16]bool{8080: true, 8081: false, 80: false} {
			j, err := l.c.Walk(l.to(rules.TCP, port, outsider))
			if err != nil {
				t.Fatal(err)
			}
			if j.Moved != want || want && j.Target.Port() != 80 {
				t.Errorf("%d: moved %t to %s", port, j.Moved, j.Target)
			}
		}
	})
}
