package verify

import (
	"errors"
	"net"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestResolveLink(t *testing.T) {
	near, far := newSpace(t), newSpace(t)
	up, down := wire(t, near, far, "veth0", "eth0")
	near.address(up, "10.9.0.1/24") // nobody knows anybody's Ethernet address yet
	near.address(up, "fd09::1/64")
	far.address(down, "10.9.0.2/24")
	far.address(down, "fd09::2/64")
	tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN}
	near.do(func() {
		for dst, gw := range map[string]string{"10.7.0.0/16": "10.9.0.2", "fd07::/64": "fd09::2"} {
			_, n, err := net.ParseCIDR(dst)
			near.must(err)
			near.must(netlink.RouteAdd(&netlink.Route{LinkIndex: up.Index, Dst: n, Gw: net.ParseIP(gw)}))
		}
		_, n, err := net.ParseCIDR("10.6.0.0/16")
		near.must(err)
		near.must(netlink.RouteAdd(&netlink.Route{Dst: n, Type: unix.RTN_BLACKHOLE}))
		lo, err := netlink.LinkByName("lo")
		near.must(err)
		_, n, err = net.ParseCIDR("10.5.0.0/16")
		near.must(err)
		near.must(netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Dst: n, Src: net.IPv4(10, 9, 0, 1)}))
		if err := netlink.LinkAdd(tun); err != nil {
			t.Logf("no tun device here: %v", err)
			tun = nil
			return
		}
		near.must(netlink.LinkSetUp(tun))
		_, n, err = net.ParseCIDR("10.4.0.0/16")
		near.must(err)
		near.must(netlink.RouteAdd(&netlink.Route{LinkIndex: tun.Attrs().Index, Dst: n, Src: net.IPv4(10, 9, 0, 1)}))
	})
	for _, c := range []struct {
		dst  string
		src  netip.Addr
		want error
	}{
		{"10.9.0.2", vantage4, nil},
		{"fd09::2", vantage6, nil},
		{"10.7.1.1", vantage4, nil},
		{"fd07::1", vantage6, nil},
		{"::ffff:10.9.0.2", vantage4, nil},
		{"10.9.0.1", vantage4, ErrLocalTarget},
		{"fd09::1", vantage4, ErrLocalTarget},
		{"127.0.0.1", vantage4, ErrLocalTarget},
		{"10.9.0.77", vantage4, ErrNoNeighbour},
		{"fd09::77", vantage4, ErrNoNeighbour},
		{"192.0.2.1", vantage4, ErrNoRoute},
		{"2001:db8::1", vantage4, ErrNoRoute},
		{"10.6.0.1", vantage4, ErrNoRoute},
		{"10.5.0.1", vantage4, ErrNotEthernet},
		{"10.4.0.1", vantage4, ErrNotEthernet},
	} {
		if c.dst == "10.4.0.1" && tun == nil {
			continue
		}
		near.do(func() {
			l, src, err := resolveLink(netip.MustParseAddr(c.dst))
			if c.want != nil || err != nil {
				if !errors.Is(err, c.want) {
					t.Errorf("%s: got %v, want %v", c.dst, err, c.want)
				}
				return
			}
			if l.Index != up.Index || l.Name != "veth0" || l.Src.String() != up.Src.String() || l.Dst.String() != up.Dst.String() || src != c.src {
				t.Errorf("%s: got %+v from %v, want %+v from %v", c.dst, l, src, up, c.src)
			}
		})
	}
	for _, dst := range []string{"10.9.0.255", "224.0.0.1", "0.0.0.0"} {
		near.do(func() {
			if _, _, err := resolveLink(netip.MustParseAddr(dst)); err == nil {
				t.Errorf("%s: no error", dst)
			}
		})
	}
}

// resolveLink is resolveLinks of one address.
func resolveLink(dst netip.Addr) (Link, netip.Addr, error) {
	w := resolveLinks([]netip.Addr{dst})[0]
	return w.link, w.src, w.err
}
