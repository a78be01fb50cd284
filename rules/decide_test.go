package rules

import (
	"net/netip"
	"testing"
)

func TestDecide(t *testing.T) {
	rs := compileText(t, `
[open.web]
ports = [80, "8000-8010"]
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "192.0.2.5-192.0.2.9", "@admins"]
[open.dns]
ports = 53
protocol = "udp"
interfaces = ["docker0", "br-*"]
[open.six]
ports = 25
family = "ipv6"
[open.two]
ports = [22]
from = "11.0.0.0/8"
interfaces = "wg0"
[set.admins]
addresses = ["198.51.100.7", "2001:db8::/48"]
[dhcp]
client = ["eth0"]
`)
	type p = Packet
	for _, c := range []struct {
		name string
		src  string
		p    Packet
		want Outcome
		rule string
	}{
		{"listed", "203.0.113.1", p{Protocol: TCP, DstPort: 80}, OutcomeOpen, "web"},
		{"listed over ipv6", "2001:db8:9::1", p{Protocol: TCP, DstPort: 80}, OutcomeOpen, "web"},
		{"first of a range", "203.0.113.1", p{Protocol: TCP, DstPort: 8000}, OutcomeOpen, "web"},
		{"last of a range", "203.0.113.1", p{Protocol: TCP, DstPort: 8010}, OutcomeOpen, "web"},
		{"below a range", "203.0.113.1", p{Protocol: TCP, DstPort: 7999}, OutcomeFiltered, ""},
		{"above a range", "203.0.113.1", p{Protocol: TCP, DstPort: 8011}, OutcomeFiltered, ""},
		{"other protocol", "203.0.113.1", p{Protocol: UDP, DstPort: 80}, OutcomeFiltered, ""},
		{"port 0", "203.0.113.1", p{Protocol: TCP}, OutcomeFiltered, ""},
		{"source inside", "10.1.2.3", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"first source", "10.0.0.0", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"last source", "10.255.255.255", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"below the sources", "9.255.255.255", p{Protocol: TCP, DstPort: 22}, OutcomeFiltered, ""},
		{"above the sources", "11.0.0.0", p{Protocol: TCP, DstPort: 22}, OutcomeFiltered, ""},
		{"range of addresses", "192.0.2.9", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"beside it", "192.0.2.10", p{Protocol: TCP, DstPort: 22}, OutcomeFiltered, ""},
		{"in the set", "198.51.100.7", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"in the set, ipv6", "2001:db8::1", p{Protocol: TCP, DstPort: 22}, OutcomeOpen, "ssh"},
		{"out of the set, ipv6", "2001:db8:1::1", p{Protocol: TCP, DstPort: 22}, OutcomeFiltered, ""},
		{"two rules, interface", "11.0.0.1", p{Protocol: TCP, DstPort: 22, In: "wg0"}, OutcomeOpen, "two"},
		{"two rules, other interface", "11.0.0.1", p{Protocol: TCP, DstPort: 22, In: "wg1"}, OutcomeFiltered, ""},
		{"interface", "172.17.0.2", p{Protocol: UDP, DstPort: 53, In: "docker0"}, OutcomeOpen, "dns"},
		{"interface by prefix", "172.17.0.2", p{Protocol: UDP, DstPort: 53, In: "br-1"}, OutcomeOpen, "dns"},
		{"prefix alone", "172.17.0.2", p{Protocol: UDP, DstPort: 53, In: "br-"}, OutcomeOpen, "dns"},
		{"other interface", "172.17.0.2", p{Protocol: UDP, DstPort: 53, In: "br"}, OutcomeFiltered, ""},
		{"family", "2001:db8:9::1", p{Protocol: TCP, DstPort: 25}, OutcomeOpen, "six"},
		{"other family", "203.0.113.1", p{Protocol: TCP, DstPort: 25}, OutcomeFiltered, ""},
		{"loopback", "203.0.113.1", p{Protocol: TCP, DstPort: 9, In: "lo"}, OutcomeOpen, ""},
		{"loopback address from a wire", "127.0.0.1", p{Protocol: TCP, DstPort: 80}, OutcomeFiltered, ""},
		{"an answer", "203.0.113.1", p{Protocol: TCP, DstPort: 9, Flow: ReplyFlow}, OutcomeOpen, ""},
		{"invalid", "203.0.113.1", p{Protocol: TCP, DstPort: 80, Flow: InvalidFlow}, OutcomeFiltered, ""},
		{"echo", "203.0.113.1", p{Protocol: ICMPv4, ICMPType: 8}, OutcomeOpen, ""},
		{"timestamp", "203.0.113.1", p{Protocol: ICMPv4, ICMPType: 13}, OutcomeFiltered, ""},
		{"unreachable", "203.0.113.1", p{Protocol: ICMPv4, ICMPType: 3}, OutcomeOpen, ""},
		{"packet too big", "2001:db8:9::1", p{Protocol: ICMPv6, ICMPType: 2}, OutcomeOpen, ""},
		{"neighbour discovery", "fe80::1", p{Protocol: ICMPv6, ICMPType: 135, HopLimit: 255}, OutcomeOpen, ""},
		{"forwarded discovery", "fe80::1", p{Protocol: ICMPv6, ICMPType: 135, HopLimit: 254}, OutcomeFiltered, ""},
		{"mld", "fe80::1", p{Protocol: ICMPv6, ICMPType: 130, HopLimit: 1}, OutcomeOpen, ""},
		{"mld from afar", "2001:db8:9::1", p{Protocol: ICMPv6, ICMPType: 130, HopLimit: 1}, OutcomeFiltered, ""},
		{"icmp over ipv6", "2001:db8:9::1", p{Protocol: ICMPv4, ICMPType: 8}, OutcomeFiltered, ""},
		{"dhcp", "192.168.0.1", p{Protocol: UDP, SrcPort: 67, DstPort: 68, In: "eth0"}, OutcomeOpen, ""},
		{"dhcp elsewhere", "192.168.0.1", p{Protocol: UDP, SrcPort: 67, DstPort: 68, In: "eth1"}, OutcomeFiltered, ""},
		{"port 68 from another port", "192.168.0.1", p{Protocol: UDP, SrcPort: 66, DstPort: 68, In: "eth0"}, OutcomeFiltered, ""},
		{"another protocol", "203.0.113.1", p{Protocol: 47}, OutcomeFiltered, ""},
	} {
		c.p.Src = netip.MustParseAddr(c.src)
		c.p.Dst = netip.MustParseAddr("198.18.0.1")
		if !c.p.Src.Is4() {
			c.p.Dst = netip.MustParseAddr("2001:db8:ffff::1")
		}
		if d := rs.Decide(c.p); d.Outcome != c.want || d.Rule != c.rule {
			t.Errorf("%s: %v by %q (%s), want %v by %q", c.name, d.Outcome, d.Rule, d.Kind, c.want, c.rule)
		}
	}
}

func TestDecideReject(t *testing.T) {
	rs := compileText(t, "[default]\ninput = \"reject\"\n")
	d := rs.Decide(Packet{Src: netip.MustParseAddr("203.0.113.1"), Dst: netip.MustParseAddr("198.18.0.1"), Protocol: TCP, DstPort: 1})
	if d.Outcome != OutcomeRejected || d.Pos.Line != 3 {
		t.Errorf("%+v", d)
	}
}

// The kernel passes over extension headers of IPv6: only what takes everything
// takes them.
func TestExtensionsOverIPv6(t *testing.T) {
	rs := compileText(t, "[open.opts]\nprotocol = [60, \"ah\"]\n[open.wire]\nprotocol = \"any\"\ninterfaces = \"wg0\"\n[block.routing]\nprotocol = 43\n")
	for _, c := range []struct {
		src, in string
		p       Protocol
		want    Outcome
		rule    string
	}{
		{"192.0.2.9", "eth0", 60, OutcomeOpen, "opts"},
		{"2001:db8::9", "eth0", 60, OutcomeFiltered, ""},
		{"2001:db8::9", "wg0", 60, OutcomeOpen, "wire"},
		{"192.0.2.9", "wg0", 43, OutcomeFiltered, "routing"},
		{"2001:db8::9", "wg0", 43, OutcomeOpen, "wire"},
		{"192.0.2.9", "eth0", AH, OutcomeOpen, "opts"},
		{"2001:db8::9", "eth0", AH, OutcomeOpen, "opts"},
	} {
		p := Packet{In: c.in, Src: netip.MustParseAddr(c.src), Protocol: c.p}
		if d := rs.Decide(p); d.Outcome != c.want || d.Rule != c.rule {
			t.Errorf("%v from %s by %s: %v by %q, want %v by %q", c.p, c.src, c.in, d.Outcome, d.Rule, c.want, c.rule)
		}
	}
	near := rs.Nearest(Packet{In: "eth0", Src: netip.MustParseAddr("2001:db8::9"), Protocol: 60})
	if len(near) != 2 || near[0].Name != "opts" || near[0].Why != "takes protocol 60 only over ipv4" {
		t.Errorf("nearest: %v", near)
	}
}
