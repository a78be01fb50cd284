package verify

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"deadlight/rules"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Documentation addresses (RFC 5737, RFC 3849): nobody owns them.
var (
	testHost4    = netip.MustParseAddr("198.51.100.1")
	testHost6    = netip.MustParseAddr("2001:db8:51::1")
	testOutside4 = netip.MustParseAddr("192.0.2.10")
	testOutside6 = netip.MustParseAddr("2001:db8:10::10")
)

// newTestWorld makes a world with both families and no address outside.
func newTestWorld(t *testing.T, links ...string) *World {
	t.Helper()
	w, err := NewWorld(WorldConfig{Host4: testHost4, Host6: testHost6, Links: links})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

// giveOutsideAddresses lets ordinary sockets of the outside talk to the host.
func giveOutsideAddresses(t *testing.T, w *World, link string) {
	t.Helper()
	l := w.Link(link)
	end, err := netlink.LinkByIndex(l.Index)
	if err != nil {
		t.Fatal(err)
	}
	for outside, host := range map[netip.Addr]netip.Addr{testOutside4: testHost4, testOutside6: testHost6} {
		if err := netlink.AddrAdd(end, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(outside, outside.BitLen())), Flags: unix.IFA_F_NODAD}); err != nil {
			t.Fatal(err)
		}
		if err := netlink.RouteReplace(&netlink.Route{LinkIndex: l.Index, Dst: ipNet(netip.PrefixFrom(host, host.BitLen())), Scope: netlink.SCOPE_LINK}); err != nil {
			t.Fatal(err)
		}
		if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Index, State: netlink.NUD_PERMANENT, IP: host.AsSlice(), HardwareAddr: l.Dst}); err != nil {
			t.Fatal(err)
		}
	}
}

// testFrame is a TCP SYN or a UDP datagram of four bytes, built here so that
// the tests share no code with the engine.
func testFrame(l Link, src, dst netip.Addr, p rules.Protocol, sport, dport uint16) []byte {
	seg := binary.BigEndian.AppendUint16(nil, sport)
	seg = binary.BigEndian.AppendUint16(seg, dport)
	sumAt := 16
	if p == rules.TCP {
		seg = append(seg, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2, 255, 255, 0, 0, 0, 0)
	} else {
		seg = append(seg, 0, 12, 0, 0, 'p', 'i', 'n', 'g')
		sumAt = 6
	}
	pseudo := append(append(src.AsSlice(), dst.AsSlice()...), 0, byte(p), 0, byte(len(seg)))
	binary.BigEndian.PutUint16(seg[sumAt:], testSum(append(pseudo, seg...)))
	frame := append(append([]byte{}, l.Dst...), l.Src...)
	if src.Is4() {
		ip := []byte{0x45, 0, 0, byte(20 + len(seg)), 0, 1, 0x40, 0, 64, byte(p), 0, 0}
		ip = append(append(ip, src.AsSlice()...), dst.AsSlice()...)
		binary.BigEndian.PutUint16(ip[10:], testSum(ip))
		return append(append(append(frame, 0x08, 0x00), ip...), seg...)
	}
	ip := []byte{0x60, 0, 0, 0, 0, byte(len(seg)), byte(p), 64}
	ip = append(append(ip, src.AsSlice()...), dst.AsSlice()...)
	return append(append(append(frame, 0x86, 0xdd), ip...), seg...)
}

func testSum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i]) << 8
		if i+1 < len(b) {
			sum += uint32(b[i+1])
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// testWire sends and receives raw frames at the outside end of a link.
type testWire struct {
	fd   int
	link Link
}

func newTestWire(t *testing.T, l Link) testWire {
	t.Helper()
	const all = uint16(unix.ETH_P_ALL)<<8 | unix.ETH_P_ALL>>8
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: l.Index}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		t.Fatal(err)
	}
	return testWire{fd, l}
}

func (w testWire) send(t *testing.T, src, dst netip.Addr, p rules.Protocol, sport, dport uint16) {
	t.Helper()
	if _, err := unix.Write(w.fd, testFrame(w.link, src, dst, p, sport, dport)); err != nil {
		t.Fatal(err)
	}
}

// answer waits for a frame from host to an address and port of the outside and
// gives what stands behind its IP header, nil after a second of silence.
func (w testWire) answer(t *testing.T, from, to netip.Addr, port uint16) []byte {
	t.Helper()
	buf := make([]byte, 2048)
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
		n, addr, err := unix.Recvfrom(w.fd, buf, 0)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if addr.(*unix.SockaddrLinklayer).Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		head, addrs := 14+20, 14+12
		if from.Is6() {
			head, addrs = 14+40, 14+8
		}
		size := len(from.AsSlice())
		if n < head+8 || !bytes.Equal(buf[addrs:addrs+size], from.AsSlice()) || !bytes.Equal(buf[addrs+size:addrs+2*size], to.AsSlice()) {
			continue
		}
		if binary.BigEndian.Uint16(buf[head+2:]) == port {
			return buf[head:n]
		}
	}
	return nil
}

func TestWorldAnswersAnySource(t *testing.T) {
	w := newTestWorld(t, "eth0", "wg0", "name-15-bytes-x")
	first, second := newTestWire(t, w.Link("eth0")), newTestWire(t, w.Link("wg0"))
	third := newTestWire(t, w.Link("name-15-bytes-x"))
	const rstAck = 0x14
	for _, tt := range []struct {
		name     string
		src, dst netip.Addr
	}{
		{"v4", netip.MustParseAddr("203.0.113.77"), testHost4},
		{"v4 private", netip.MustParseAddr("10.1.2.3"), testHost4},
		{"v6", netip.MustParseAddr("2001:db8:77::77"), testHost6},
		{"v6 local", netip.MustParseAddr("fd77::1"), testHost6},
	} {
		for i, wire := range []testWire{first, second, third} {
			port := uint16(20001 + i)
			wire.send(t, tt.src, tt.dst, rules.TCP, port, 4444)
			if got := first.answer(t, tt.dst, tt.src, port); len(got) < 14 || got[13] != rstAck {
				t.Errorf("%s over %s: answered %x, want a RST", tt.name, wire.link.Name, got)
			}
		}
	}
	src := netip.MustParseAddr("203.0.113.78")
	if err := w.Route(netip.PrefixFrom(src, 32), "wg0"); err != nil {
		t.Fatal(err)
	}
	second.send(t, src, testHost4, rules.TCP, 20009, 4444)
	if got := second.answer(t, testHost4, src, 20009); len(got) < 14 || got[13] != rstAck {
		t.Errorf("routed by wg0: answered %x there, want a RST", got)
	}
}

// A world that is left alone says nothing: what is heard was asked for.
func TestWorldIsQuiet(t *testing.T) {
	w := newTestWorld(t, "eth0")
	wire := newTestWire(t, w.Link("eth0"))
	heard := 0
	for deadline := time.Now().Add(1500 * time.Millisecond); time.Now().Before(deadline); {
		buf := make([]byte, 256)
		n, addr, err := unix.Recvfrom(wire.fd, buf, 0)
		if err != nil {
			continue // the timeout of the socket
		}
		const hopByHop, icmp6 = 0, 58
		if mld := n > 14+48 && buf[14+6] == hopByHop && buf[14+40] == icmp6; mld {
			continue // the host joins the groups of its own addresses
		}
		heard++
		t.Logf("type %d: %x", addr.(*unix.SockaddrLinklayer).Pkttype, buf[:n])
	}
	if heard > 0 {
		t.Errorf("%d frames nobody asked for", heard)
	}
}

func TestWorldHostIsAnotherNetwork(t *testing.T) {
	before, err := threadNetNS()
	if err != nil {
		t.Fatal(err)
	}
	w := newTestWorld(t, "eth0")
	for range 50 {
		if err := w.Host(func() error {
			id, err := threadNetNS()
			if err != nil {
				return err
			}
			if id == before {
				t.Error("the host is the outside")
			}
			if _, err := netlink.LinkByName("eth0"); err != nil {
				t.Error(err)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if after, err := threadNetNS(); err != nil || after != before {
				t.Errorf("a thread stayed behind in %v, %v", after, err)
			}
		}()
		<-done
	}
	if main, err := os.Readlink("/proc/self/ns/net"); err != nil || !strings.Contains(main, "net:[") {
		t.Errorf("first thread: %q, %v", main, err)
	}
	want := errors.New("mine")
	if err := w.Host(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("error %v, want that of the function", err)
	}
}

func TestWorldCommandRunsInHost(t *testing.T) {
	w := newTestWorld(t, "eth0", "docker0")
	var out bytes.Buffer
	if err := w.Command(t.Context(), []string{"ip", "-o", "addr"}, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{": eth0", "docker0", "198.51.100.1/32", "2001:db8:51::1/128", "127.0.0.1/8"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
	var exit *exec.ExitError
	if err := w.Command(t.Context(), []string{"sh", "-c", "exit 5"}, &out, &out); !errors.As(err, &exit) || exit.ExitCode() != 5 {
		t.Errorf("error %v, want exit code 5", err)
	}
	if err := w.Command(t.Context(), []string{"/nonexistent"}, &out, &out); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v, want not exist", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if err := w.Command(ctx, []string{"sleep", "60"}, &out, &out); err == nil || time.Since(began) > 2*time.Second {
		t.Errorf("cancelled command: %v after %v", err, time.Since(began))
	}
}

// The end of the veth outside vanishes only when the kernel takes the host down.
func TestWorldCloseLeavesNothing(t *testing.T) {
	before, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	w := newTestWorld(t, "eth0")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "witness0"
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "witness1", PeerNamespace: netlink.NsFd(int(w.HostFile().Fd()))}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var after []net.Interface
	for range 300 {
		if after, err = net.Interfaces(); err != nil {
			t.Fatal(err)
		}
		if len(after) == len(before) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("interfaces left: %v", after)
}

func TestWorldRefusals(t *testing.T) {
	addr := netip.MustParseAddr
	for _, tt := range []struct {
		name string
		cfg  WorldConfig
		want string
	}{
		{"no address", WorldConfig{Links: []string{"eth0"}}, "no address"},
		{"no link", WorldConfig{Host4: testHost4}, "no interface"},
		{"families swapped", WorldConfig{Host4: testHost6, Links: []string{"eth0"}}, "not an IPv4 address"},
		{"mapped", WorldConfig{Host6: addr("::ffff:192.0.2.1"), Links: []string{"eth0"}}, "cannot be its address"},
		{"multicast", WorldConfig{Host4: addr("224.0.0.1"), Links: []string{"eth0"}}, "cannot be its address"},
		{"twice", WorldConfig{Host4: testHost4, Links: []string{"eth0", "eth0"}}, `"eth0" cannot be`},
		{"lo", WorldConfig{Host4: testHost4, Links: []string{"lo"}}, `"lo" cannot be`},
		{"a sysctl's word", WorldConfig{Host4: testHost4, Links: []string{"all"}}, `"all" cannot be`},
		{"a path", WorldConfig{Host4: testHost4, Links: []string{"../x"}}, `cannot be`},
		{"16 bytes", WorldConfig{Host4: testHost4, Links: []string{"abcdefghijklmnop"}}, `cannot be`},
		{"a template", WorldConfig{Host4: testHost4, Links: []string{"eth%d"}}, `cannot be`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, err := NewWorld(tt.cfg)
			if err == nil {
				w.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	t.Run("not isolated", func(t *testing.T) {
		t.Setenv(isolatedEnv, "")
		if _, err := NewWorld(WorldConfig{Host4: testHost4, Links: []string{"eth0"}}); err == nil {
			t.Error("made a world outside of throw-away namespaces")
		}
	})
}

func TestWorldOneFamily(t *testing.T) {
	w, err := NewWorld(WorldConfig{Host4: testHost4, Links: []string{"eth0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.has6 {
		if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
			t.Error(err)
		}
	}
	w6, err := NewWorld(WorldConfig{Host6: testHost6, Links: []string{"eth0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w6.Close()
	wire, src := newTestWire(t, w6.Link("eth0")), netip.MustParseAddr("2001:db8:77::77")
	wire.send(t, src, testHost6, rules.TCP, 20001, 4444)
	if wire.answer(t, testHost6, src, 20001) == nil {
		t.Error("two worlds at a time: no answer from the second")
	}
}

// A host is ready only when the kernel takes the packets to each of its addresses
// for its own, which it does later than it shows the address.
func TestWorldAwaitsItsAddresses(t *testing.T) {
	w := newTestWorld(t, "eth0")
	local := &netlink.Route{Dst: ipNet(netip.PrefixFrom(testHost6, 128)), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Protocol: unix.RTPROT_KERNEL}
	if err := w.Host(func() error {
		end, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		local.LinkIndex = end.Attrs().Index
		return netlink.RouteDel(local)
	}); err != nil {
		t.Fatal(err)
	}
	ready := make(chan error, 1)
	go func() { ready <- w.Host(awaitAddresses) }()
	select {
	case err := <-ready:
		t.Fatalf("ready without the route to its address: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := w.Host(func() error { return netlink.RouteAdd(local) }); err != nil {
		t.Fatal(err)
	}
	if err := <-ready; err != nil {
		t.Error(err)
	}
}
