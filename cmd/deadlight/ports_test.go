package main

import (
	"net/netip"
	"strings"
	"testing"

	"deadlight/firewall"
	"deadlight/rules"
)

// compiled is the ruleset of a policy given as text.
func compiled(t *testing.T, text string) *rules.Ruleset {
	t.Helper()
	p, problems := rules.Parse("policy.toml", []byte("version = 1\n"+text), nil)
	if p == nil {
		t.Fatal(problems)
	}
	return rules.Compile(p)
}

func TestChangedPorts(t *testing.T) {
	web := "[open.web]\nports = 80\n"
	tests := map[string]struct {
		before, after string // policies; before "none": no table
		want          string
	}{
		"nothing":        {web, web, ""},
		"another name":   {web, "[open.http]\nports = 80\n", ""},
		"order":          {"[open.a]\nports = [1, 2]\nfrom = [\"10.0.0.1\", \"10.0.0.9\"]\n", "[open.a]\nports = [2, 1]\nfrom = [\"10.0.0.9\", \"10.0.0.1\"]\n", ""},
		"opens":          {"", web, "80/tcp|filtered → open|httpd (pid 1) becomes reachable"},
		"closes":         {web, "", "80/tcp|open → filtered|httpd (pid 1) loses it"},
		"range grows":    {"[open.a]\nports = \"10-12\"\n", "[open.a]\nports = \"10-20\"\n", "13-20/tcp|filtered → open|nothing listens"},
		"split joined":   {"", "[open.a]\nports = \"10-15\"\n[open.b]\nports = \"16-20\"\n", "10-20/tcp|filtered → open|nothing listens"},
		"narrowed":       {web, web + "from = \"10.0.0.0/8\"\n", "80/tcp ipv4|open → open to 10.0.0.0/8|httpd (pid 1) listens\n80/tcp ipv6|open → filtered|httpd (pid 1) loses it"},
		"family":         {web, web + "family = \"ipv6\"\n", "80/tcp ipv4|open → filtered|httpd (pid 1) loses it"},
		"udp listener":   {"", "[open.a]\nports = 5353\nprotocol = \"udp\"\n", "5353/udp|filtered → open|mdns (pid 2) becomes reachable"},
		"rate":           {web, web + "rate = { limit = \"5/second\" }\n", "80/tcp|open → open to anywhere, 5/second a source|httpd (pid 1) listens"},
		"expired":        {web, web + "expires = 2001-01-01T00:00:00Z\n", "80/tcp|open → filtered|httpd (pid 1) loses it"},
		"wider beside":   {web, web + "[open.also]\nports = 80\nfrom = \"10.0.0.1\"\n", ""},
		"blocked port":   {web, web + "[block.bad]\nports = 80\nfrom = \"10.6.6.0/24\"\n", "80/tcp ipv4|open → open, blocked from 10.6.6.0/24|httpd (pid 1) listens"},
		"blocked whole":  {web, web + "[block.bad]\nports = 80\n", "80/tcp|open → filtered|httpd (pid 1) loses it"},
		"blocked source": {web, web + "[block.bad]\nfrom = \"10.6.6.0/24\"\n", "every port ipv4|- → blocked from 10.6.6.0/24"},
		"reject":         {web, "[default]\ninput = \"reject\"\n" + web, "5353/udp|filtered → rejected|mdns (pid 2) listens\nall other ports|filtered → rejected"},
		"observe":        {"", "[default]\nenforce = false\n", "80/tcp|filtered → open: enforce = false|httpd (pid 1) becomes reachable\n5353/udp|filtered → open: enforce = false|mdns (pid 2) becomes reachable\nall other ports|filtered → open: enforce = false"},
		"echo":           {"", "[icmp]\necho = false\n", "echo (ping)|answered → filtered"},
		"no ports":       {"", "[open.tunnel]\nprotocol = \"esp\"\n", "esp|filtered → open"},
		"trusted":        {web, web + "[open.vpn]\nprotocol = \"any\"\ninterfaces = \"wg*\"\n", "every port|- → open to anywhere by wg*"},
		"set":            {"[open.a]\nports = 7\nfrom = \"@s\"\n[set.s]\naddresses = [\"10.0.0.1\", \"10.0.0.5\"]\n", "[open.a]\nports = 7\nfrom = \"@s\"\n[set.s]\naddresses = [\"10.0.0.5\", \"10.0.0.7\", \"10.0.0.9\"]\n", "7/tcp ipv4|open to @s → open to @s: @s with 2 more and 1 fewer|nothing listens"},
		"first load":     {"none", web, "80/tcp|not filtered by deadlight → open|httpd (pid 1) listens\n5353/udp|not filtered by deadlight → filtered|mdns (pid 2) loses it\necho (ping)|not filtered by deadlight → answered\nall other ports|not filtered by deadlight → filtered"},
	}
	found := []listener{
		{Protocol: rules.TCP, Addr: netip.IPv6Unspecified(), Port: 80, PID: 1, Comm: "httpd"},
		{Protocol: rules.UDP, Addr: netip.MustParseAddr("192.0.2.1"), Port: 5353, PID: 2, Comm: "mdns"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var old *rules.Ruleset
			if tt.before != "none" {
				old = compiled(t, tt.before)
			}
			was, will := outlooks(old, compiled(t, tt.after))
			rows, err := changedPorts(&portsBefore{was: was}, will, found)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			if err := printPorts(&b, rows); err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, line := range strings.Split(strings.TrimSpace(b.String()), "\n") {
				var cells []string
				for _, cell := range strings.Split(line, "  ") {
					if cell = strings.TrimSpace(cell); cell != "" {
						cells = append(cells, cell)
					}
				}
				got = append(got, strings.Join(cells, "|"))
			}
			if text := strings.Join(got, "\n"); text != tt.want {
				t.Errorf("got\n%s\nwant\n%s", text, tt.want)
			}
		})
	}
}

func TestOwner(t *testing.T) {
	known := map[string]bool{"open web": true, "open web_from": true, "open a.b": true, "block bad": true, "egress dns": true, "set admins": true, "set admins_4": true}
	tests := map[string]struct {
		d    firewall.Difference
		want string
	}{
		"chain":              {firewall.Difference{Kind: "chain", Name: "open_web"}, "open web"},
		"admission":          {firewall.Difference{Kind: "chain", Name: "admit_a.b"}, "open a.b"},
		"sources":            {firewall.Difference{Kind: "set", Name: "open_web_from4"}, "open web"},
		"hosts":              {firewall.Difference{Kind: "set", Name: "open_web_from6_hosts"}, "open web"},
		"a name like one":    {firewall.Difference{Kind: "set", Name: "open_web_from_from4"}, "open web_from"},
		"meter":              {firewall.Difference{Kind: "set", Name: "open_a.b_rate4"}, "open a.b"},
		"counter":            {firewall.Difference{Kind: "object", Name: "counter block_bad"}, "block bad"},
		"limit":              {firewall.Difference{Kind: "object", Name: "limit rate_web"}, "open web"},
		"rule":               {firewall.Difference{Kind: "rule", Name: `3 of chain gate ("open a.b")`}, "open a.b"},
		"element":            {firewall.Difference{Kind: "element", Name: "80 of set tcp_open", After: "80 : jump open_web"}, "open web"},
		"address":            {firewall.Difference{Kind: "element", Name: "10.0.0.1 of set set_admins_4", After: "10.0.0.1"}, "set admins"},
		"set with an ending": {firewall.Difference{Kind: "set", Name: "set_admins_4_4"}, "set admins_4"},
		"egress":             {firewall.Difference{Kind: "chain", Name: "egress_dns"}, "egress dns"},
		"stranger":           {firewall.Difference{Kind: "chain", Name: "open_mine"}, ""},
		"base":               {firewall.Difference{Kind: "chain", Name: "gate"}, ""},
		"hostile":            {firewall.Difference{Kind: "rule", Name: `3 of chain gate ("\x1b open_web")`, After: `"`}, "open web"},
	}
	for name, tt := range tests {
		if got := owner(tt.d, known); got != tt.want {
			t.Errorf("%s: %q belongs to %q, want %q", name, tt.d.Name, got, tt.want)
		}
	}
}
