package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// Containers and virtual machines ask this host for names and addresses, by the
// bridge that an engine made for them. A policy that forgets them cuts them off.

// guestServiceJSON is a DNS or DHCP server of this host that a policy shuts off
// from the guests of a bridge.
type guestServiceJSON struct {
	Interface string `json:"interface"`
	Protocol  string `json:"protocol"`
	Port      uint16 `json:"port"`
	PID       int    `json:"pid"` // 0: cannot be told
	Comm      string `json:"comm"`
}

// Ports that guests need: DNS, and the servers of DHCP and DHCPv6.
const (
	portDNS    = 53
	portDHCP   = 67
	portDHCPv6 = 547
)

// guestPackets are the first that guests of a bridge send to a socket, if it is
// one that they need.
func guestPackets(l listener, n nic, now time.Time) []rules.Packet {
	if l.Device != "" && l.Device != n.name || !l.Addr.IsUnspecified() && !slices.Contains(n.addrs, l.Addr) {
		return nil
	}
	var out []rules.Packet
	add := func(src, dst netip.Addr, sport uint16) {
		out = append(out, rules.Packet{In: n.name, Src: src, Dst: dst, Protocol: l.Protocol, SrcPort: sport, DstPort: l.Port, At: now})
	}
	switch {
	case l.Port == portDNS:
		for _, a := range n.addrs {
			if l.takes(a.Is4()) && (l.Addr.IsUnspecified() || l.Addr == a) && !a.IsLinkLocalUnicast() {
				add(a.Next(), a, 40000)
			}
		}
	case l.Port == portDHCP && l.Protocol == rules.UDP && l.takes(true):
		add(netip.IPv4Unspecified(), netip.AddrFrom4([4]byte{255, 255, 255, 255}), 68)
	case l.Port == portDHCPv6 && l.Protocol == rules.UDP && l.takes(false):
		add(netip.MustParseAddr("fe80::7777:77ff:fe77:7777"), netip.MustParseAddr("ff02::1:2"), 546)
	}
	return out
}

// cutGuests lists what a policy shuts off from guests who reached it before; nil
// for before says that they reached everything.
func cutGuests(before, after *rules.Ruleset, sockets []listener, all []nic, now time.Time) []guestServiceJSON {
	out := []guestServiceJSON{}
	for _, l := range sockets {
		for _, n := range all {
			if !isGuestBridge(n.name) {
				continue
			}
			cut := slices.ContainsFunc(guestPackets(l, n, now), func(p rules.Packet) bool {
				return !admitted(after.Decide(p)) && (before == nil || admitted(before.Decide(p)))
			})
			g := guestServiceJSON{Interface: n.name, Protocol: l.Protocol.String(), Port: l.Port, PID: l.PID, Comm: l.Comm}
			if cut && !slices.Contains(out, g) {
				out = append(out, g)
			}
		}
	}
	slices.SortFunc(out, func(a, b guestServiceJSON) int {
		return cmp.Or(cmp.Compare(a.Interface, b.Interface), a.PID-b.PID, cmp.Compare(a.Comm, b.Comm), int(a.Port)-int(b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out
}

// cutGuestsHere is cutGuests for the network namespace of the calling thread.
func cutGuestsHere(before, after *rules.Ruleset) ([]guestServiceJSON, error) {
	all, err := nics()
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, func(n nic) bool { return isGuestBridge(n.name) }) {
		return []guestServiceJSON{}, nil
	}
	sockets, err := listeners()
	if err != nil {
		return nil, err
	}
	return cutGuests(before, after, sockets, all, time.Now()), nil
}

// warnGuests says before an apply what guests lose by it, and how to prevent that.
func (h *host) warnGuests(w io.Writer, last *firewall.Record, rs *rules.Ruleset) error {
	var before *rules.Ruleset
	if last != nil && !h.elsewhere(last) {
		var err error
		before, err = h.state.Compile(last)
		if err != nil && !errors.Is(err, firewall.ErrStateDamaged) && !errors.Is(err, firewall.ErrStateVersion) {
			return err
		}
	}
	cut, err := cutGuestsHere(before, rs)
	if err != nil {
		return err
	}
	printGuests(w, "deadlight: warning: ", cut, rs)
	return nil
}

// printGuests writes a line for each server and bridge, and the tables that open
// them again.
func printGuests(w io.Writer, prefix string, cut []guestServiceJSON, rs *rules.Ruleset) {
	if len(cut) == 0 {
		return
	}
	for i := 0; i < len(cut); {
		g, ports := cut[i], []string{}
		for ; i < len(cut) && cut[i].Interface == g.Interface && cut[i].PID == g.PID && cut[i].Comm == g.Comm; i++ {
			ports = append(ports, fmt.Sprintf("%d/%s", cut[i].Port, cut[i].Protocol))
		}
		who := listener{PID: g.PID, Comm: g.Comm}.String()
		printf(w, "%s%s\n", prefix, oneLine(fmt.Sprintf("guests of %s lose %s of this host: nothing opens %s to them", g.Interface, who, strings.Join(ports, ", "))))
	}
	printf(w, "      = hint: unless that is meant, add to the policy:\n")
	for _, line := range strings.Split(strings.TrimSpace(guestOpenings(cut, rs)), "\n") {
		printf(w, "        %s\n", oneLine(line))
	}
}

// guestOpenings writes the tables that admit guests to what they would lose.
func guestOpenings(cut []guestServiceJSON, rs *rules.Ruleset) string {
	var b strings.Builder
	for _, kind := range []struct {
		name string
		dns  bool
	}{{"guest-dns", true}, {"guest-dhcp", false}} {
		var ports, protocols, interfaces []string
		for _, g := range cut {
			if (g.Port == portDNS) != kind.dns {
				continue
			}
			ports = append(ports, fmt.Sprint(g.Port))
			protocols = append(protocols, strconv.Quote(g.Protocol))
			interfaces = append(interfaces, strconv.Quote(g.Interface))
		}
		if len(ports) == 0 {
			continue
		}
		name := kind.name
		for n := 2; taken(rs, name); n++ {
			name = fmt.Sprintf("%s-%d", kind.name, n)
		}
		fmt.Fprintf(&b, "[open.%s]\nports = %s\nprotocol = %s\ninterfaces = %s\n", name, oneOf(ports), oneOf(protocols), oneOf(interfaces))
	}
	return b.String()
}

// oneOf writes a list of TOML, once each; one value stands alone.
func oneOf(values []string) string {
	slices.Sort(values)
	if values = slices.Compact(values); len(values) == 1 {
		return values[0]
	}
	return "[" + strings.Join(values, ", ") + "]"
}
