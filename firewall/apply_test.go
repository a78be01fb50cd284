package firewall

import (
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"deadlight/rules"
)

func samplePolicy() *rules.Policy {
	p := rules.DefaultPolicy()
	a := netip.MustParseAddr
	p.Sets = []rules.AddressSet{{Name: "admins", Ranges: []rules.AddrRange{{Lo: a("198.51.100.7"), Hi: a("198.51.100.7")}, {Lo: a("2001:db8::"), Hi: a("2001:db8:0:ffff:ffff:ffff:ffff:ffff")}}}}
	p.Open = []rules.Open{{Name: "web", Ports: []rules.PortRange{{Lo: 80, Hi: 80}, {Lo: 443, Hi: 443}, {Lo: 65000, Hi: 65535}}, Protocols: []rules.Protocol{rules.TCP, rules.UDP}, From: rules.Source{Any: true}},
		{Name: "ssh.a-b", Ports: []rules.PortRange{{Lo: 22, Hi: 22}}, Protocols: []rules.Protocol{rules.TCP}, From: rules.Source{Ranges: []rules.AddrRange{{Lo: a("10.0.0.0"), Hi: a("10.255.255.255")}, {Lo: a("192.0.2.1"), Hi: a("192.0.2.9")}}, Sets: []string{"admins"}}},
		{Name: "vendor", Ports: []rules.PortRange{{Lo: 20, Hi: 30}, {Lo: 6000, Hi: 6010}}, Protocols: []rules.Protocol{rules.TCP}, From: rules.Source{Any: true}, Family: rules.IPv4, Interfaces: []string{"wg0", "tun*"}},
		{Name: "dns", Ports: []rules.PortRange{{Lo: 53, Hi: 53}}, Protocols: []rules.Protocol{rules.UDP}, From: rules.Source{Any: true}, Interfaces: []string{"eth0"}},
	}
	p.DHCP.Interfaces = []string{"eth0"}
	p.Default.Input = rules.Reject
	return &p
}

func TestApplyZZ(t *testing.T) {
	c, err := Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	rs := rules.Compile(samplePolicy())
	res, err := c.Apply(rs)
	t.Log(res, err)
	out, e := exec.Command("nft", "list", "table", "inet", "deadlight").CombinedOutput()
	os.WriteFile("/tmp/s/lib", out, 0o644)
	t.Log(e)
	res, err = c.Apply(rs)
	t.Log(res, err)
	p := rules.DefaultPolicy()
	res, err = c.Apply(rules.Compile(&p))
	t.Log(res, err)
	res, err = c.Apply(rs)
	t.Log(res, err)
	f, _ := os.Create("/tmp/s/show.nft")
	rs.Table.WriteNFT(f)
	f.Close()
	out, e = exec.Command("nft", "-f", "/tmp/s/show.nft").CombinedOutput()
	t.Log(string(out), e)
	out, _ = exec.Command("nft", "list", "table", "inet", "deadlight").CombinedOutput()
	os.WriteFile("/tmp/s/nft", out, 0o644)
	res, err = c.Apply(rs)
	t.Log(res, err)
}
