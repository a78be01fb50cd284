package main

import (
	"bytes"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// What guests lose, by the sockets that engines and libvirt open for them.
func TestCutGuests(t *testing.T) {
	addr := netip.MustParseAddr
	all := []nic{
		{"eth0", []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")}},
		{"virbr0", []netip.Addr{addr("192.168.122.1"), addr("fd12::1"), addr("fe80::1")}},
		{"podman0", []netip.Addr{addr("10.88.0.1")}},
		{"br0", []netip.Addr{addr("192.0.2.2")}}, // a bridge of the LAN
	}
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	sockets := []listener{
		{Protocol: rules.TCP, Addr: addr("192.168.122.1"), Port: 53, PID: 7, Comm: "dnsmasq"},
		{Protocol: rules.UDP, Addr: addr("192.168.122.1"), Port: 53, PID: 7, Comm: "dnsmasq"},
		{Protocol: rules.UDP, Addr: addr("fe80::1"), Port: 53, PID: 7, Comm: "dnsmasq", Device: "virbr0"},
		{Protocol: rules.UDP, Addr: any4, Port: 67, PID: 7, Comm: "dnsmasq", Device: "virbr0"},
		{Protocol: rules.UDP, Addr: any6, Port: 547, PID: 7, Comm: "dnsmasq", Device: "virbr0"},
		{Protocol: rules.UDP, Addr: addr("10.88.0.1"), Port: 53, PID: 8, Comm: "aardvark-dns"},
		{Protocol: rules.UDP, Addr: addr("192.0.2.2"), Port: 53, PID: 9, Comm: "named"},
		{Protocol: rules.TCP, Addr: any6, Port: 53, PID: 9, Comm: "named"},
		{Protocol: rules.TCP, Addr: addr("10.88.0.1"), Port: 80, PID: 9, Comm: "named"},
		{Protocol: rules.UDP, Addr: any4, Port: 67, PID: 10, Comm: "kea", Device: "eth0"},
		{Protocol: rules.TCP, Addr: addr("192.168.122.1"), Port: 67, PID: 9, Comm: "named"},
	}
	read := func(text string) *rules.Ruleset {
		t.Helper()
		rs, err := parsed("version = 1\n" + text)
		if err != nil {
			t.Fatalf("%v\n%s", err, text)
		}
		return rs
	}
	text := func(before, after *rules.Ruleset) string {
		var b bytes.Buffer
		printGuests(&b, "", cutGuests(before, after, sockets, all, time.Now()), after)
		return b.String()
	}
	const every = `guests of podman0 lose aardvark-dns (pid 8) of this host: nothing opens 53/udp to them
guests of podman0 lose named (pid 9) of this host: nothing opens 53/tcp to them
guests of virbr0 lose dnsmasq (pid 7) of this host: nothing opens 53/tcp, 53/udp, 67/udp, 547/udp to them
guests of virbr0 lose named (pid 9) of this host: nothing opens 53/tcp to them
      = hint: unless that is meant, add to the policy:
`
	none := read("")
	if got := text(nil, none); !strings.HasPrefix(got, every) {
		t.Errorf("got\n%s", got)
	}
	// What it says to add is a policy, and enough; a name that is taken is left alone.
	for _, policy := range []string{"", "[open.guest-dns]\nports = 9\n"} {
		after := read(policy)
		add := guestOpenings(cutGuests(nil, after, sockets, all, time.Now()), after)
		if left := cutGuests(nil, read(policy+add), sockets, all, time.Now()); len(left) > 0 {
			t.Errorf("with\n%s\nthey lose %+v", add, left)
		}
		if read(policy+add).Decide(rules.Packet{In: "eth0", Src: addr("192.0.2.9"), Dst: addr("192.0.2.1"), Protocol: rules.UDP, DstPort: 53}).Outcome == rules.OutcomeOpen {
			t.Errorf("it opens eth0:\n%s", add)
		}
	}
	// They lose nothing that they had not.
	if got := text(none, none); got != "" {
		t.Errorf("shut before: %s", got)
	}
	if got := text(nil, read("[default]\nenforce = false\n")); got != "" {
		t.Errorf("observed: %s", got)
	}
	virbr := read("[open.vm]\nprotocol = \"any\"\ninterfaces = \"virbr*\"\n")
	if got := cutGuests(nil, virbr, sockets, all, time.Now()); slices.ContainsFunc(got, func(g guestServiceJSON) bool { return g.Interface != "podman0" }) || len(got) != 2 {
		t.Errorf("trusted: %+v", got)
	}
	if got := cutGuests(virbr, none, sockets, all, time.Now()); slices.ContainsFunc(got, func(g guestServiceJSON) bool { return g.Interface != "virbr0" }) || len(got) != 5 {
		t.Errorf("trusted no more: %+v", got)
	}
}
