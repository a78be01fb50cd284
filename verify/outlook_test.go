package verify

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"deadlight/rules"
)

func compileText(t testing.TB, text string) *rules.Ruleset {
	t.Helper()
	p, problems := rules.Parse("policy.toml", []byte("version = 1\n"+text), nil)
	if p == nil {
		var b strings.Builder
		if err := rules.Render(&b, problems, ""); err != nil {
			t.Fatal(err)
		}
		t.Fatalf("parse:\n%s", b.String())
	}
	return rules.Compile(p)
}

const restricted = `
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "@admins"]
[open.dns]
ports = 53
protocol = ["tcp", "udp"]
interfaces = ["docker0", "br-*"]
[open.web]
ports = 80
[open.six]
ports = 25
family = "ipv6"
[set.admins]
addresses = ["198.51.100.7", "2001:db8::/48"]
`

func TestOutlookSeesEveryRestriction(t *testing.T) {
	o, err := NewOutlook(compileText(t, restricted), true)
	if err != nil {
		t.Fatal(err)
	}
	find := func(in, src string) *View {
		for i := range o.Views {
			if v := &o.Views[i]; v.In == in && v.Path.Src.String() == src {
				return v
			}
		}
		return nil
	}
	for _, src := range []string{"10.0.0.0", "10.255.255.255", "9.255.255.255", "11.0.0.0", "10.127.255.255",
		"198.51.100.7", "198.51.100.6", "198.51.100.8", "2001:db8::", "2001:db8:0:ffff:ffff:ffff:ffff:ffff", "2001:db8:1::"} {
		if v := find("eth0", src); v == nil || !slices.Contains(v.Path.TCP, 22) {
			t.Errorf("22/tcp is not looked at from %s: %+v", src, v)
		}
	}
	sweeps := 0
	for _, v := range o.Views {
		if v.Sweep {
			sweeps++
			if len(v.Path.TCP) != 65535 || len(v.Path.UDP) != 65535 || v.In != "eth0" {
				t.Errorf("sweep of %d TCP and %d UDP ports by %s", len(v.Path.TCP), len(v.Path.UDP), v.In)
			}
		}
		if v.Path.Src == v.Path.Dst || v.Path.Src.Is4() != v.Path.Dst.Is4() {
			t.Errorf("%s looks at %s", v.Path.Src, v.Path.Dst)
		}
		if len(v.Path.Canaries) == 0 {
			t.Errorf("no canary for %s by %s", v.Path.Src, v.In)
		}
	}
	if sweeps != 2 {
		t.Errorf("%d sweeps, want one a family", sweeps)
	}
	if !slices.Equal(o.Links, []string{"eth0", "docker0", "br-0"}) {
		t.Errorf("links %v", o.Links)
	}
	for _, in := range []string{"docker0", "br-0"} {
		seen := false
		for _, v := range o.Views {
			seen = seen || v.In == in && slices.Contains(v.Path.UDP, 53) && slices.Contains(v.Path.TCP, 53)
		}
		if !seen {
			t.Errorf("53 is not looked at over %s", in)
		}
	}
	ports := map[uint16]bool{}
	for _, v := range o.Views {
		if ports[v.Path.SrcPort] || v.Path.SrcPort < 20000 {
			t.Errorf("source port %d is used twice or belongs to canaries", v.Path.SrcPort)
		}
		ports[v.Path.SrcPort] = true
	}
}

func TestOutlookAvoidsWhatRulesName(t *testing.T) {
	o, err := NewOutlook(compileText(t, `
[open.a]
ports = 1
from = ["203.0.113.0/24", "198.51.100.0/24", "2001:db8::/32"]
interfaces = ["eth*", "ens3"]
`), true)
	if err != nil {
		t.Fatal(err)
	}
	if o.Host4.String() != "192.0.2.77" || o.Host6.String() != "3fff:77::77" || o.Links[0] != "enp1s0" {
		t.Errorf("host %s %s by %s", o.Host4, o.Host6, o.Links[0])
	}
}

func TestOutlookIsBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString("[open.a]\nports = \"1-60000\"\nfrom = [")
	for i := range 60000 {
		b.WriteString("\"10." + itoa(i/256) + "." + itoa(i%256) + ".1\",")
	}
	b.WriteString("]\n")
	o, err := NewOutlook(compileText(t, b.String()), true)
	if err != nil {
		t.Fatal(err)
	}
	if len(o.Views) > mostViews || o.Unprobed == 0 {
		t.Errorf("%d views, %d unprobed", len(o.Views), o.Unprobed)
	}
}

func itoa(i int) string { return strconv.Itoa(i) }

func TestMiddle(t *testing.T) {
	for _, c := range [][3]string{
		{"10.0.0.0", "10.255.255.255", "10.127.255.255"},
		{"255.255.255.254", "255.255.255.255", "255.255.255.254"},
		{"0.0.0.0", "255.255.255.255", "127.255.255.255"},
		{"fe00::", "ffff::", "feff:8000::"},
	} {
		r := rules.AddrRange{Lo: netip.MustParseAddr(c[0]), Hi: netip.MustParseAddr(c[1])}
		if got := middle(r); got.String() != c[2] || !r.Contains(got) {
			t.Errorf("middle of %s-%s = %s, want %s", c[0], c[1], got, c[2])
		}
	}
}
