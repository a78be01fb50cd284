package verify

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestListenersAnswerOnThousandsOfPorts(t *testing.T) {
	w := newTestWorld(t, "eth0")
	giveOutsideAddresses(t, w, "eth0")
	ports := SpreadPorts(nil, 2000)
	began := time.Now()
	l, err := Listen(w.Host, ports, ports)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Logf("%d sockets in %v", 2*len(ports), time.Since(began))

	for _, host := range []netip.Addr{testHost4, testHost6} {
		udp, err := net.ListenUDP("udp", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer udp.Close()
		for _, port := range ports {
			to := netip.AddrPortFrom(host, port)
			c, err := net.DialTimeout("tcp", to.String(), 2*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
				t.Errorf("%v/tcp: %v, want the end of the stream", to, err)
			}
			c.Close()

			if err := udp.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := udp.WriteToUDPAddrPort(fmt.Append(nil, port), to); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 16)
			n, from, err := udp.ReadFromUDPAddrPort(buf)
			if err != nil || netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to || string(buf[:n]) != fmt.Sprint(port) {
				t.Fatalf("%v/udp: %q from %v, %v", to, buf[:n], from, err)
			}
		}
	}
}

// With two addresses an answer comes from the one that was asked.
func TestListenersAnswerFromTheAddressAsked(t *testing.T) {
	w := newTestWorld(t, "eth0")
	second4, second6 := netip.MustParseAddr("198.51.100.200"), netip.MustParseAddr("2001:db8:51::200")
	if err := w.Host(func() error {
		end, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range []netip.Addr{second4, second6} {
			if err := netlink.AddrAdd(end, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen())), Flags: unix.IFA_F_NODAD}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(w.Host, nil, []uint16{5353})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	wire := newTestWire(t, w.Link("eth0"))
	port := uint16(20001)
	for _, host := range []netip.Addr{testHost4, second4, testHost6, second6} {
		src := netip.MustParseAddr("203.0.113.9")
		if host.Is6() {
			src = netip.MustParseAddr("2001:db8:9::9")
		}
		wire.send(t, src, host, rules.UDP, port, 5353)
		if got := wire.answer(t, host, src, port); len(got) < 12 || string(got[8:12]) != "ping" {
			t.Errorf("%v answers %x, want an echo", host, got)
		}
		port++
	}
}

func TestListenersNamePortThatIsTaken(t *testing.T) {
	w := newTestWorld(t, "eth0")
	l, err := Listen(w.Host, []uint16{80}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, err = Listen(w.Host, []uint16{79, 80, 81}, nil)
	if !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(fmt.Sprint(err), "listen on 80/tcp") {
		t.Fatalf("error %v, want 80/tcp in use", err)
	}
	if l, err = Listen(w.Host, []uint16{79, 81}, []uint16{80}); err != nil {
		t.Fatalf("the refused ones still listen: %v", err)
	}
	l.Close()
	l.Close()
	if l, err = Listen(w.Host, []uint16{79, 81}, []uint16{80}); err != nil {
		t.Fatalf("the closed ones still listen: %v", err)
	}
	l.Close()
}

func TestListenersNameTheLimit(t *testing.T) {
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	most := MaxListeners()
	if most < 1 || most > int(before.Max) {
		t.Fatalf("MaxListeners %d with a limit of %d", most, before.Max)
	}
	// A helper lowers its own limit: the hard one never comes back.
	out, err := helperCommand(t.Context(), "isolate-few-files", nil).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !strings.Contains(string(out), "too many open files") || !strings.HasPrefix(string(out), "error: listen on ") {
		t.Errorf("error %v, %s; want the port and the limit", err, out)
	}
}

func TestSpreadPorts(t *testing.T) {
	for _, tt := range []struct {
		name   string
		listed []uint16
		budget int
		want   []uint16 // all of them
		has    []uint16
		count  int
	}{
		{name: "neighbours first", listed: []uint16{22, 443, 444}, budget: 4, want: []uint16{21, 23, 442, 445}, count: 4},
		{name: "edges", listed: []uint16{1, 65535}, budget: 2, want: []uint16{2, 65534}, count: 2},
		{name: "known ports and ends", budget: 500, has: []uint16{1, 22, 3306, 65535}, count: 500},
		{name: "every port", budget: 1 << 20, has: []uint16{1, 2, 65534, 65535}, count: 65535},
		{name: "all but listed", listed: []uint16{80, 80, 443}, budget: 1 << 20, count: 65533},
		{name: "nothing", budget: 0},
		{name: "less than nothing", budget: -1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := SpreadPorts(tt.listed, tt.budget)
			if len(got) != tt.count || tt.want != nil && !slices.Equal(got, tt.want) {
				t.Fatalf("%d ports %v; want %d %v", len(got), got[:min(len(got), 20)], tt.count, tt.want)
			}
			for i, p := range got {
				if p == 0 || slices.Contains(tt.listed, p) || i > 0 && got[i-1] >= p {
					t.Fatalf("port %d at %d is 0, listed or out of order", p, i)
				}
			}
			for _, p := range tt.has {
				if !slices.Contains(got, p) {
					t.Errorf("no port %d", p)
				}
			}
			if again := SpreadPorts(tt.listed, tt.budget); !slices.Equal(got, again) {
				t.Error("another choice the second time")
			}
		})
	}
	// The rest is spread: no large stretch goes without a listener.
	got, widest := SpreadPorts([]uint16{22}, 1000), 0
	for i := 1; i < len(got); i++ {
		widest = max(widest, int(got[i])-int(got[i-1]))
	}
	if widest > 200 {
		t.Errorf("a stretch of %d ports has no listener", widest)
	}
}
