package rules

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

func TestLockDown(t *testing.T) {
	p := compileText(t, `
[default]
published = "ignore"
enforce = false
[open.web]
ports = 80
[open.vpn]
protocol = "any"
interfaces = "wg0"
[set.admins]
addresses = "198.51.100.7"
[set.others]
addresses = "203.0.113.0/24"
[block.others]
from = "@others"
[failsafe]
ports = 22
from = ["10.0.0.0/8", "@admins"]
interfaces = "eth0"
`).Policy
	for _, c := range []struct {
		name string
		of   *Policy
		p    Packet
		want Outcome
	}{
		{"failsafe", p, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: TCP, DstPort: 22}, OutcomeOpen},
		{"by a set", p, Packet{Src: netip.MustParseAddr("198.51.100.7"), In: "eth0", Protocol: TCP, DstPort: 22}, OutcomeOpen},
		{"another source", p, Packet{Src: netip.MustParseAddr("203.0.113.9"), In: "eth0", Protocol: TCP, DstPort: 22}, OutcomeFiltered},
		{"another interface", p, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth1", Protocol: TCP, DstPort: 22}, OutcomeFiltered},
		{"what the policy opened", p, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: TCP, DstPort: 80}, OutcomeFiltered},
		{"a trusted interface", p, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "wg0", Protocol: TCP, DstPort: 80}, OutcomeFiltered},
		{"echo", p, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: ICMPv4, ICMPType: 8}, OutcomeFiltered},
		{"no failsafe", compileText(t, "").Policy, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: TCP, DstPort: 22}, OutcomeFiltered},
		{"no policy", nil, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: TCP, DstPort: 22}, OutcomeFiltered},
		{"loopback", nil, Packet{Src: netip.MustParseAddr("127.0.0.1"), In: "lo", Protocol: TCP, DstPort: 22}, OutcomeOpen},
		{"replies", nil, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: TCP, DstPort: 9, Flow: ReplyFlow}, OutcomeOpen},
		{"neighbour discovery", nil, Packet{Src: netip.MustParseAddr("fe80::1"), In: "eth0", Protocol: ICMPv6, ICMPType: 135, HopLimit: 255}, OutcomeOpen},
		{"dhcp", nil, Packet{Src: netip.MustParseAddr("10.1.1.1"), In: "eth0", Protocol: UDP, SrcPort: 67, DstPort: 68}, OutcomeOpen},
	} {
		c.p.Dst = netip.MustParseAddr("192.0.2.1")
		if c.p.Src.Is6() {
			c.p.Dst = netip.MustParseAddr("2001:db8::1")
		}
		if got := Compile(LockDown(c.of)).Decide(c.p).Outcome; got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if d := LockDown(p); len(d.Sets) != 1 || !d.Default.DropForward || d.Default.IgnorePublished || d.Default.Observe {
		t.Errorf("lock-down with %d sets and defaults %+v", len(d.Sets), d.Default)
	}
}

func TestWithoutExpiring(t *testing.T) {
	p := compileText(t, `
[default]
output = "drop"
[open.web]
ports = 80
[open.vendor]
ports = 5000
expires = 2100-01-01T00:00:00Z
[block.scanner]
from = "203.0.113.0/24"
expires = 2100-01-01T00:00:00Z
[egress.dns]
ports = 53
[egress.update]
ports = 443
expires = 2100-01-01T00:00:00Z
`).Policy
	got, closed := p.WithoutExpiring()
	if want := []string{"vendor", "update"}; !slices.Equal(closed, want) {
		t.Errorf("closed %q, want %q", closed, want)
	}
	if len(got.Open) != 1 || got.Open[0].Name != "web" || len(got.Egress) != 1 || got.Egress[0].Name != "dns" || len(got.Block) != 1 {
		t.Errorf("left %+v, %+v, %+v", got.Open, got.Egress, got.Block)
	}
	if len(p.Open) != 2 || len(p.Egress) != 2 {
		t.Error("the policy itself was changed")
	}
	in := Packet{Src: netip.MustParseAddr("10.1.1.1"), Dst: netip.MustParseAddr("192.0.2.1"), Protocol: TCP, DstPort: 5000, At: time.Unix(0, 0)}
	if got := Compile(got).Decide(in).Outcome; got != OutcomeFiltered {
		t.Errorf("an opening that expires is %v", got)
	}
}
