package firewall

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// tampering is one edit of the table by somebody else, and what must be said
// of it.
type tampering struct {
	name  string
	first string // made before the table is looked at; the edit is judged against that
	edit  string // transactions of nft, one a line; <chain: words> is the handle of the first rule there with these words
	copy  func(listing string) string
	want  []named
	most  int // differences; 0: any number
}

// named is a difference that must be listed: its kind, and words of its name.
type named struct{ action, kind, name string }

var handleOf = regexp.MustCompile(`<([^:<>]+): ([^<>]+)>`)

// filled replaces what stands for handles.
func filled(t *testing.T, commands string) string {
	t.Helper()
	return handleOf.ReplaceAllStringFunc(commands, func(s string) string {
		m := handleOf.FindStringSubmatch(s)
		for _, line := range strings.Split(nft(t, "-a", "list", "chain", "inet", "deadlight", m[1]), "\n") {
			if _, handle, ok := strings.Cut(line, "# handle "); ok && strings.Contains(line, m[2]) && !strings.Contains(line, "chain ") {
				return handle
			}
		}
		t.Fatalf("chain %s has no rule with %q", m[1], m[2])
		return ""
	})
}

// swap edits a listing; it must hold what is replaced.
func swap(pairs ...string) func(string) string {
	return func(listing string) string {
		for i := 0; i < len(pairs); i += 2 {
			if !strings.Contains(listing, pairs[i]) {
				panic(fmt.Sprintf("no %q in the listing", pairs[i]))
			}
			listing = strings.Replace(listing, pairs[i], pairs[i+1], 1)
		}
		return listing
	}
}

// recreate puts a copy in the place of the table.
func recreate(t *testing.T, change func(string) string) {
	t.Helper()
	text := change(listTable(t))
	file := filepath.Join(t.TempDir(), "copy.nft")
	if err := os.WriteFile(file, []byte("delete table inet deadlight\n"+text), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, "-f", file)
}

func (w named) in(list []Difference) bool {
	return slices.ContainsFunc(list, func(d Difference) bool {
		kinds := strings.Split(w.kind, "|")
		return (w.action == "" || d.Action == w.action) && slices.Contains(kinds, d.Kind) && strings.Contains(d.Name, w.name)
	})
}

func (c tampering) run(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		conn := dial(t)
		rs := ruleset(t, everything)
		mustApply(t, conn, rs)
		listed := witnessed(t)
		c.judge(t, conn, rs)
		if now := witnessed(t); now != listed {
			t.Errorf("not repaired: %s", cmp.Diff(listed, now))
		}
	})
}

// witnessed is the table as nft sees it, but for its comment: that cannot be
// changed in place.
func witnessed(t *testing.T) string {
	return regexp.MustCompile(`(?m)^\tcomment .*\n`).ReplaceAllString(blocks(t), "")
}

// judge makes the edit of a table that holds the ruleset, and leaves it repaired.
func (c tampering) judge(t *testing.T, conn *Conn, rs *rules.Ruleset) {
	clean := snapshotNow(t, conn)
	before := clean
	if c.first != "" {
		nft(t, filled(t, c.first))
		before = snapshotNow(t, conn)
	}
	read := textsOf(t, conn)
	if c.copy != nil {
		recreate(t, c.copy)
	} else {
		for _, edit := range strings.Split(c.edit, "\n") {
			nft(t, filled(t, edit))
		}
	}
	got := Diff(snapshotNow(t, conn), before)
	if len(got) == 0 {
		t.Errorf("the edit is not noticed")
	}
	if cmp.Equal(read, textsOf(t, conn)) {
		t.Errorf("the table reads the same after the edit")
	}
	for _, w := range c.want {
		if !w.in(got) {
			t.Errorf("no difference %v in %v", w, got)
		}
	}
	if c.most > 0 && len(got) > c.most {
		t.Errorf("%d differences for one edit: %v", len(got), got)
	}
	if _, err := conn.Apply(rs); err != nil {
		t.Fatalf("repair: %v", err)
	}
	if left := Diff(snapshotNow(t, conn), clean); len(left) > 0 {
		t.Errorf("not repaired: %v", left)
	}
}

func snapshotNow(t *testing.T, c *Conn) *Snapshot {
	t.Helper()
	s, err := c.Snapshot("deadlight")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

const ours = "inet deadlight "

func ruleTamperings() []tampering {
	rule := func(action, chain, comment string) []named {
		return []named{{action, "rule", chain}, {action, "rule", comment}}
	}
	return []tampering{
		{name: "inserted with a comment of ours", edit: "insert rule " + ours + `gate tcp dport 23 accept comment "open web"`, want: rule("remove", "gate", "open web"), most: 1},
		{name: "inserted in the middle", edit: "add rule " + ours + `gate position <gate: "loopback"> tcp dport 23 accept comment "mine"`, want: rule("remove", "gate", "mine"), most: 1},
		{name: "deleted first", edit: "delete rule " + ours + `gate handle <gate: comment "loopback">`, want: rule("add", "gate", "loopback"), most: 1},
		{name: "deleted in the middle", edit: "delete rule " + ours + `gate handle <gate: comment "invalid">`, want: rule("add", "gate", "invalid"), most: 1},
		{name: "deleted last", edit: "delete rule " + ours + `gate handle <gate: comment "default drop">`, want: rule("add", "gate", "default drop"), most: 1},
		{name: "replaced", edit: "replace rule " + ours + `gate handle <gate: comment "invalid"> accept`, want: []named{{"", "rule", "gate"}}, most: 2},
		{name: "replaced, comment kept", edit: "replace rule " + ours + `gate handle <gate: comment "invalid"> ct state invalid counter name c_invalid accept comment "invalid"`, want: rule("change", "gate", "invalid"), most: 1},
		{name: "comment only", edit: "replace rule " + ours + `gate handle <gate: comment "invalid"> ct state invalid counter name c_invalid drop comment "Invalid"`, want: []named{{"", "rule", "gate"}, {"", "rule", "nvalid"}}, most: 2},
		{name: "comment removed", edit: "replace rule " + ours + `gate handle <gate: comment "invalid"> ct state invalid counter name c_invalid drop`, want: []named{{"", "rule", "gate"}}, most: 2},
		{name: "moved up", edit: "delete rule " + ours + `gate handle <gate: comment "default drop">; insert rule ` + ours + `gate counter name c_dropped drop comment "default drop"`,
			want: []named{{"", "rule", "gate"}, {"", "rule", "default drop"}}, most: 2},
		{name: "two swapped", edit: "delete rule " + ours + `gate handle <gate: comment "replies">; add rule ` + ours + `gate position <gate: comment "related"> ct state established ct direction reply counter name c_replies accept comment "replies"`,
			want: []named{{"", "rule", "gate"}}, most: 2},
		{name: "two of one comment swapped", edit: "delete rule " + ours + `gate handle <gate: ip saddr 127>; add rule ` + ours + `gate position <gate: ip daddr 127> ip saddr 127.0.0.0/8 counter name c_spoofed drop comment "loopback address from a wire"`,
			want: rule("", "gate", "loopback address from a wire"), most: 2},
		{name: "twice the same", edit: "insert rule " + ours + `gate iifname "lo" counter name c_loopback accept comment "loopback"`, want: rule("remove", "gate", "loopback"), most: 1},
		{name: "jump made goto", edit: "replace rule " + ours + `gate handle <gate: comment "block scanners"> goto block_scanners comment "block scanners"`, want: rule("change", "gate", "block scanners"), most: 1},
		{name: "test turned round", edit: "replace rule " + ours + `container_route handle <container_route: docker0> fib daddr oifname != "docker0" counter name c_container_route drop comment "container network reached by routing"`,
			want: rule("change", "container_route", "container network"), most: 1},
		{name: "another prefix length", edit: "replace rule " + ours + `open_six handle <open_six: 2001> ip6 saddr 2001:db8:6::/63 counter name open_six accept comment "open six"`, want: rule("change", "open_six", "open six"), most: 1},
		{name: "another hop limit", edit: "replace rule " + ours + `icmpv6_essential handle <icmpv6_essential: hoplimit> ip6 hoplimit 254 icmpv6 type @icmpv6_nd counter name c_icmp accept comment "neighbour discovery"`,
			want: rule("change", "icmpv6_essential", "neighbour discovery"), most: 1},
		{name: "another set", edit: "replace rule " + ours + `backstop_in handle <backstop_in: ct original proto-dst @sctp> meta l4proto sctp ct original proto-dst @tcp_listed counter name c_backstop_pass accept comment "listed sctp"`,
			want: rule("change", "backstop_in", "listed sctp"), most: 1},
		{name: "another map", edit: "replace rule " + ours + `gate handle <gate: @udp_open> udp dport vmap @tcp_open comment "open"`, want: rule("change", "gate", "open"), most: 1},
		{name: "another counter", edit: "replace rule " + ours + `gate handle <gate: comment "invalid"> ct state invalid counter name c_icmp drop comment "invalid"`, want: rule("change", "gate", "invalid"), most: 1},
		{name: "another log group", edit: "replace rule " + ours + `gate handle <gate: comment "log what is dropped"> limit rate 5/second burst 20 packets log prefix "deadlight drop: " group 6 comment "log what is dropped"`,
			want: rule("change", "gate", "log what is dropped"), most: 1},
		{name: "another log prefix", edit: "replace rule " + ours + `gate handle <gate: comment "log what is dropped"> limit rate 5/second burst 20 packets log prefix "deadlight drop; " group 5 comment "log what is dropped"`,
			want: rule("change", "gate", "log what is dropped"), most: 1},
		{name: "another burst", edit: "replace rule " + ours + `gate handle <gate: comment "log what is dropped"> limit rate 5/second burst 21 packets log prefix "deadlight drop: " group 5 comment "log what is dropped"`,
			want: rule("change", "gate", "log what is dropped"), most: 1},
		{name: "another reject", edit: "replace rule " + ours + `gate handle <gate: icmpx> counter name c_rejected reject with icmpx host-unreachable comment "default reject"`, want: rule("change", "gate", "default reject"), most: 1},
		{name: "another meter limit", edit: "replace rule " + ours + `gate handle <gate: @echo_rate4> icmp type echo-request update @echo_rate4 { ip saddr limit rate 11/second burst 20 packets } counter name c_echo accept comment "echo"`,
			want: rule("change", "gate", "echo"), most: 1},
		{name: "another user", edit: "replace rule " + ours + `egress_updates handle <egress_updates: skuid> meta skuid 1 meta skgid 0 counter name egress_updates accept comment "egress updates"`, want: rule("change", "egress_updates", "egress updates"), most: 1},
		{name: "inline counter", edit: "replace rule " + ours + `gate handle <gate: @udp_open> counter udp dport vmap @udp_open comment "open"`, want: rule("change", "gate", "open"), most: 1},
		{name: "anonymous set", edit: "insert rule " + ours + `open_web tcp dport { 1, 2 } accept`, want: []named{{"remove", "rule", "open_web"}}},
		{name: "anonymous chain", edit: "insert rule " + ours + `open_web tcp dport 9 jump { accept; }`, want: []named{{"remove", "rule", "open_web"}}},
		{name: "anonymous set of other elements", first: "insert rule " + ours + `open_web tcp dport { 1, 2 } accept comment "a"`, edit: "replace rule " + ours + `open_web handle <open_web: comment "a"> tcp dport { 1, 3 } accept comment "a"`,
			want: []named{{"", "set|element|rule", ""}}},
		// Expressions that few libraries know.
		{name: "socket added", edit: "insert rule " + ours + "gate socket transparent 1 accept", want: []named{{"remove", "rule", "gate"}}, most: 1},
		{name: "tproxy added", edit: "insert rule " + ours + "gate tcp dport 80 tproxy to :8080", want: []named{{"remove", "rule", "gate"}}, most: 1},
		{name: "byteorder added", edit: "insert rule " + ours + "gate meta mark set numgen inc mod 3", want: []named{{"remove", "rule", "gate"}}, most: 1},
		{name: "route added", edit: "insert rule " + ours + "gate rt ipsec exists accept", want: []named{{"remove", "rule", "gate"}}, most: 1},
		{name: "fingerprint added", edit: "insert rule " + ours + `gate osf name "Linux" accept`, want: []named{{"remove", "rule", "gate"}}, most: 1},
		{name: "socket for socket", first: "insert rule " + ours + `gate socket transparent 1 accept comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> socket wildcard 1 accept comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "tproxy for tproxy", first: "insert rule " + ours + `gate tcp dport 80 tproxy to :8080 comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> tcp dport 80 tproxy to :8081 comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "mark for mark", first: "insert rule " + ours + `gate meta mark 1-10 accept comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> meta mark 1-11 accept comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "ct mark for ct mark", first: "insert rule " + ours + `gate ct mark set 1 comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> ct mark set 2 comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "route for route", first: "insert rule " + ours + `egress rt classid 1 accept comment "s"`, edit: "replace rule " + ours + `egress handle <egress: comment "s"> rt ipsec exists accept comment "s"`, want: rule("change", "egress", "s"), most: 1},
		{name: "fingerprint for fingerprint", first: "insert rule " + ours + `gate osf name "Linux" accept comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> osf ttl skip name "Linux" accept comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "ipsec for ipsec", first: "insert rule " + ours + `gate ipsec in reqid 1 accept comment "s"`, edit: "replace rule " + ours + `gate handle <gate: comment "s"> ipsec in spnum 1 reqid 1 accept comment "s"`, want: rule("change", "gate", "s"), most: 1},
		{name: "synproxy for synproxy", first: "insert rule " + ours + `backstop_in synproxy mss 1460 wscale 7 comment "s"`, edit: "replace rule " + ours + `backstop_in handle <backstop_in: comment "s"> synproxy mss 1460 wscale 8 comment "s"`, want: rule("change", "backstop_in", "s"), most: 1},
	}
}

func chainTamperings() []tampering {
	return []tampering{
		{name: "added", edit: "add chain " + ours + "extra", want: []named{{"remove", "chain", "extra"}}, most: 1},
		{name: "base added", edit: "add chain " + ours + "extra { type filter hook input priority -500; }", want: []named{{"remove", "chain", "extra"}}, most: 1},
		{name: "base with a rule added", edit: "add chain " + ours + "extra { type filter hook input priority -500; }; add rule " + ours + "extra accept", want: []named{{"remove", "chain", "extra"}}},
		{name: "nat added", edit: "add chain " + ours + "extra { type nat hook prerouting priority -110; }; add rule " + ours + "extra tcp dport 80 redirect to :22", want: []named{{"remove", "chain", "extra"}}},
		{name: "ingress added", edit: "add chain " + ours + `extra { type filter hook ingress device "lo" priority 0; }`, want: []named{{"remove", "chain", "extra"}}, most: 1},
		{name: "gate policy accept", edit: "add chain " + ours + "gate { policy accept; }", want: []named{{"change", "chain", "gate"}}, most: 1},
		{name: "backstop policy accept", edit: "add chain " + ours + "backstop_in { policy accept; }", want: []named{{"change", "chain", "backstop_in"}}, most: 1},
		{name: "silence policy drop", edit: "add chain " + ours + "silence { policy drop; }", want: []named{{"change", "chain", "silence"}}, most: 1},
		{name: "renamed", edit: "rename chain " + ours + "open_web webopen", want: []named{{"remove", "chain", "webopen"}, {"add", "chain", "open_web"}}},
		{name: "base renamed", edit: "rename chain " + ours + "gate etag", want: []named{{"remove", "chain", "etag"}, {"add", "chain", "gate"}}},
		{name: "two exchanged names", edit: "rename chain " + ours + "open_dns tmp\nrename chain " + ours + "open_web open_dns\nrename chain " + ours + "tmp open_web", want: []named{{"", "rule", "open_web"}, {"", "rule", "open_dns"}}},
		{name: "all rules flushed", edit: "flush table inet deadlight", want: []named{{"add", "rule", "gate"}, {"add", "rule", "open_web"}}},
		{name: "another priority", copy: swap("hook prerouting priority dstnat - 10", "hook prerouting priority dstnat - 9"), want: []named{{"change", "chain", "gate"}}},
		{name: "another hook", copy: swap("hook output priority 11", "hook postrouting priority 11"), want: []named{{"change", "chain", "egress"}}},
		{name: "another type", copy: swap("type filter hook output priority 11", "type route hook output priority 11"), want: []named{{"change", "chain", "egress"}}},
		{name: "unhooked", copy: swap("type filter hook input priority filter + 10; policy drop;", ""), want: []named{{"change", "chain", "backstop_in"}}},
	}
}

func setTamperings() []tampering {
	more := func(set, element string) tampering {
		return tampering{name: "more in " + set, edit: "add element " + ours + set + " { " + element + " }", want: []named{{"remove", "element", set}}, most: 1}
	}
	less := func(set, element string) tampering {
		return tampering{name: "less in " + set, edit: "delete element " + ours + set + " { " + element + " }", want: []named{{"add", "element", set}}, most: 1}
	}
	other := func(what, set, gone, come string) tampering {
		return tampering{name: what + " in " + set, edit: "delete element " + ours + set + " { " + gone + " }; add element " + ours + set + " { " + come + " }", want: []named{{"", "element", set}}, most: 2}
	}
	list := []tampering{
		{name: "added", edit: "add set " + ours + "extra { type ipv4_addr; }", want: []named{{"remove", "set", "extra"}}, most: 1},
		{name: "with elements added", edit: "add set " + ours + "extra { type ipv4_addr; elements = { 192.0.2.1 }; }", want: []named{{"remove", "set", "extra"}}, most: 2},
		{name: "constant added", edit: "add set " + ours + "extra { type ipv4_addr; flags constant; elements = { 192.0.2.1 }; }; insert rule " + ours + "gate ip saddr @extra accept", want: []named{{"remove", "set", "extra"}, {"remove", "rule", "gate"}}},
		{name: "map added", edit: "add map " + ours + "extra { type ipv4_addr : verdict; }", want: []named{{"remove", "set", "extra"}}, most: 1},
		{name: "meter added", edit: "add set " + ours + "extra { type ipv4_addr; size 10; flags dynamic; }", want: []named{{"remove", "set", "extra"}}, most: 1},
		{name: "another size", copy: swap("set open_limited_conn4 {\n\t\ttype ipv4_addr\n\t\tsize 65536", "set open_limited_conn4 {\n\t\ttype ipv4_addr\n\t\tsize 65537"), want: []named{{"change", "set", "open_limited_conn4"}}},
		{name: "another timeout", copy: swap("set open_limited_rate4 {\n\t\ttype ipv4_addr\n\t\tsize 65536\n\t\tflags dynamic,timeout\n\t\ttimeout 1m", "set open_limited_rate4 {\n\t\ttype ipv4_addr\n\t\tsize 65536\n\t\tflags dynamic,timeout\n\t\ttimeout 2m"), want: []named{{"change", "set", "open_limited_rate4"}}},
		{name: "other flags", copy: swap("set set_admins_4 {\n\t\ttype ipv4_addr\n", "set set_admins_4 {\n\t\ttype ipv4_addr\n\t\tflags interval\n"), want: []named{{"change", "set", "set_admins_4"}}},
		{name: "a timeout for all", copy: swap("set dhcp_if {\n\t\ttype ifname\n", "set dhcp_if {\n\t\ttype ifname\n\t\ttimeout 1h\n"), want: []named{{"change", "set", "dhcp_if"}}},
		{name: "emptied", edit: "flush set " + ours + "set_bad_4", want: []named{{"add", "element", "set_bad_4"}}, most: 1},
		{name: "map emptied", edit: "flush map " + ours + "tcp_open", want: []named{{"add", "element", "tcp_open"}}},
		other("a wider prefix", "set_bad_4", "203.0.113.0/25", "203.0.113.0/24"),
		other("a narrower range", "tcp_listed", "65000-65535", "65000-65534"),
		{name: "a shorter wildcard", edit: "flush set " + ours + "open_vendor_if; add element " + ours + `open_vendor_if { "tu*", "wg0" }`, want: []named{{"", "element", "open_vendor_if"}}, most: 2},
		{name: "more in published_if", edit: "flush set " + ours + "published_if; add element " + ours + `published_if { "br-*", "cni*", "docker0", "podman*", "x*" }`, want: []named{{"remove", "element", "published_if"}}, most: 1},
		{name: "less in published_if", edit: "flush set " + ours + "published_if; add element " + ours + `published_if { "br-*", "docker0", "podman*" }`, want: []named{{"add", "element", "published_if"}}, most: 1},
		other("another target", "tcp_block", "25 : jump block_smtp", "25 : jump block_scanners"),
		other("another target", "tcp_open", "80 : jump open_web", "80 : jump open_vpn"),
		other("goto for jump", "tcp_open", "80 : jump open_web", "80 : goto open_web"),
		other("accept for jump", "protocols_open", "esp : jump open_ipsec", "esp : accept"),
		other("a comment", "set_admins_4", "198.51.100.7", `198.51.100.7 comment "x"`),
		{name: "permanent", edit: "delete element " + ours + "open_vendors_until { ipv4 }; add element " + ours + "open_vendors_until { ipv4 }", want: []named{{"", "element|set", "open_vendors_until"}}, most: 2},
		{name: "all permanent", edit: "delete element " + ours + "open_vendors_until { ipv4, ipv6 }; add element " + ours + "open_vendors_until { ipv4, ipv6 }", want: []named{{"", "element|set", "open_vendors_until"}}},
		{name: "sooner", edit: "delete element " + ours + "open_vendors_until { ipv4 }; add element " + ours + "open_vendors_until { ipv4 timeout 1h }", want: []named{{"change", "element|set", "open_vendors_until"}}, most: 1},
		{name: "later", edit: "delete element " + ours + "open_vendors_until { ipv6 }; add element " + ours + "open_vendors_until { ipv6 timeout 40000d }", want: []named{{"change", "element|set", "open_vendors_until"}}, most: 1},
		{name: "one family sooner, the other kept", edit: "delete element " + ours + "open_vendors_until { ipv6 }; add element " + ours + "open_vendors_until { ipv6 timeout 26000d }", want: []named{{"change", "element|set", "open_vendors_until"}}, most: 1},
	}
	for set, e := range map[string][2]string{
		"tcp_listed": {"5000", "80"}, "udp_listed": {"5000-5001", "53"}, "sctp_listed": {"9", "3868"}, "set_admins_4": {"4.0.1.128", "198.51.100.7"},
		"set_admins_6": {"2001:db9::/48", "2001:db8::/48"}, "open_ssh.a-b_from4": {"192.0.2.77", "192.0.2.1-192.0.2.9"}, "set_resolvers_4": {"0.0.0.0", "192.0.2.53"},
		"dhcp_if": {`"eth1"`, `"eth0"`}, "open_vpn_if": {`"x*"`, `"wg1"`}, "local_types": {"unicast", "anycast"},
		"icmp_errors": {"redirect", "time-exceeded"}, "icmpv6_nd": {"echo-request", "nd-redirect"}, "protocols_listed": {"gre", "esp"},
		"tcp_block": {"26 : jump block_smtp", "25 : jump block_smtp"}, "tcp_open": {"23456 : jump open_web", "443 : jump open_web"},
		"udp_open": {"23 : accept", "53 : jump open_dns"}, "protocols_open": {"gre : accept", "ah : jump open_ipsec"}, "tcp_egress": {"22 : accept", "53 : jump egress_dns"},
	} {
		list = append(list, more(set, e[0]), less(set, e[1]))
	}
	return append(list, less("open_vendors_until", "ipv6"))
}

func objectTamperings() []tampering {
	object := []named{{"remove", "object", "extra"}}
	return []tampering{
		{name: "counter added", edit: "add counter " + ours + "extra", want: object, most: 1},
		{name: "limit added", edit: "add limit " + ours + "extra { rate 1/second }", want: object, most: 1},
		{name: "quota added", edit: "add quota " + ours + "extra { over 20 mbytes }", want: object, most: 1},
		{name: "synproxy added", edit: "add synproxy " + ours + "extra { mss 1460; wscale 7; }", want: object, most: 1},
		{name: "expectation added", edit: "add ct expectation " + ours + "extra { protocol tcp; dport 9876; timeout 1m; size 12; l3proto ip; }", want: object, most: 1},
		{name: "quota of a name of ours", edit: "add quota " + ours + "open_web { over 20 mbytes }", want: []named{{"remove", "object", "open_web"}}, most: 1},
		{name: "limit changed", copy: swap("rate 1000/second burst 100 packets", "rate 1001/second burst 100 packets"), want: []named{{"change", "object", "rate_together"}}},
		{name: "burst changed", copy: swap("rate 1000/second burst 100 packets", "rate 1000/second burst 101 packets"), want: []named{{"change", "object", "rate_together"}}},
		{name: "limit turned round", copy: swap("rate 1000/second burst 100 packets", "rate over 1000/second burst 100 packets"), want: []named{{"change", "object", "rate_together"}}},
	}
}

func tableTamperings() []tampering {
	lessOne := regexp.MustCompile(`(?m)^\t\tct state invalid .*\n`)
	return []tampering{
		{name: "dormant", edit: "add table inet deadlight { flags dormant; }", want: []named{{"change", "table", "deadlight"}}, most: 1},
		{name: "deleted", edit: "delete table inet deadlight", want: []named{{"add", "table", "deadlight"}}, most: 1},
		{name: "ruleset flushed", edit: "flush ruleset", want: []named{{"add", "table", "deadlight"}}, most: 1},
		{name: "empty in its place", edit: "delete table inet deadlight; add table inet deadlight", want: []named{{"add", "chain", "gate"}, {"add", "set", "tcp_listed"}, {"add", "object", "open_web"}}},
		{name: "copy with a rule less", copy: func(s string) string { return lessOne.ReplaceAllString(s, "") }, want: []named{{"add", "rule", "gate"}, {"add", "rule", "invalid"}}},
		{name: "copy, dormant", copy: swap("comment \"managed by deadlight\"", "comment \"managed by deadlight\"\n\tflags dormant"), want: []named{{"change", "table", "deadlight"}}},
	}
}

// Every edit of every kind of object is noticed and named, and the next apply
// puts it right.
func TestNoTamperingEscapes(t *testing.T) {
	for kind, list := range map[string][]tampering{
		"rule": ruleTamperings(), "chain": chainTamperings(), "set": setTamperings(), "object": objectTamperings(), "table": tableTamperings(),
	} {
		for _, c := range list {
			t.Run(kind+"/"+c.name, c.run)
		}
	}
}

// The same few edits in every chain there is.
func TestNoTamperingEscapesInAnyChain(t *testing.T) {
	var chains []string
	for _, ch := range ruleset(t, everything).Table.Chains {
		chains = append(chains, ch.Name)
	}
	if len(chains) < 20 {
		t.Fatalf("only %d chains: %v", len(chains), chains)
	}
	for _, chain := range chains {
		inChain := func(action string) []named { return []named{{action, "rule", chain}} }
		t.Run(chain, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				conn, rs := dial(t), ruleset(t, everything)
				mustApply(t, conn, rs)
				for _, c := range []tampering{
					{name: "rule inserted", edit: "insert rule " + ours + chain + " tcp dport 23 accept", want: inChain("remove"), most: 1},
					{name: "rule appended", edit: "add rule " + ours + chain + " tcp dport 23 accept", want: inChain("remove"), most: 1},
					{name: "rule deleted", edit: "delete rule " + ours + chain + " handle <" + chain + ": comment>", want: inChain("add"), most: 1},
					{name: "rule replaced", edit: "replace rule " + ours + chain + " handle <" + chain + ": comment> continue", want: inChain(""), most: 2},
					{name: "flushed", edit: "flush chain " + ours + chain, want: inChain("add")},
				} {
					t.Log(c.name) // shown with what fails
					c.judge(t, conn, rs)
				}
			})
		})
	}
}

// A copy by nft is the same table, if not byte for byte: nft loads less of an
// address, and tests for families in another order. Whatever the bytes, it reads
// the same, and nothing else is called a difference.
func TestCopyOfTheTableReadsTheSame(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		conn := dial(t)
		mustApply(t, conn, ruleset(t, everything))
		before, rulesBefore := snapshotNow(t, conn), textsOf(t, conn)
		recreate(t, func(s string) string { return s })
		rulesAfter := textsOf(t, conn)
		delete(rulesBefore, "sets") // nft writes no size
		delete(rulesAfter, "sets")
		if d := cmp.Diff(rulesBefore, rulesAfter); d != "" {
			t.Errorf("a copy reads otherwise:\n%s", d)
		}
		for _, d := range Diff(snapshotNow(t, conn), before) {
			if d.Kind != "rule" && d.Kind != "set" && d.Kind != "element" {
				t.Errorf("a copy differs: %v", d)
			}
		}
	})
}

// textsOf is the table in our words. A test for the family before one for ICMP
// is left out, as nft does.
func textsOf(t *testing.T, c *Conn) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for chain, list := range dumpedRules(t, c, unix.NFPROTO_INET, "deadlight") {
		for _, m := range list {
			out[chain] = append(out[chain], familyOfICMP.ReplaceAllString(ruleText(m), "$1"))
		}
	}
	for _, m := range dumped(t, c, unix.NFPROTO_INET, unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE, "deadlight") {
		out["chains"] = append(out["chains"], attrText(m, unix.NFTA_CHAIN_NAME)+" "+chainText(m))
	}
	for _, m := range dumped(t, c, unix.NFPROTO_INET, unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE, "deadlight") {
		out["objects"] = append(out["objects"], attrText(m, unix.NFTA_OBJ_NAME)+" "+objectText(m))
	}
	for _, m := range dumped(t, c, unix.NFPROTO_INET, unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, "deadlight") {
		name := attrText(m, unix.NFTA_SET_NAME)
		out["sets"] = append(out["sets"], name+" "+setText(m))
		for _, e := range elementTexts(t, c, "deadlight", m) {
			out[name] = append(out[name], expires.ReplaceAllString(e, ""))
		}
	}
	for _, m := range dumped(t, c, unix.NFPROTO_INET, unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME, "deadlight") {
		out["table"] = append(out["table"], tableText(m))
	}
	slices.Sort(out["sets"])
	slices.Sort(out["chains"])
	slices.Sort(out["objects"])
	return out
}

// What packets and readers leave behind is no drift.
func TestCountsAreNoDrift(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		conn := dial(t)
		mustApply(t, conn, ruleset(t, everything))
		before := snapshotNow(t, conn)
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("lo up: %v %s", err, out)
		}
		nft(t, "reset", "counters", "table", "inet", "deadlight")
		nft(t, "add element "+ours+"open_limited_conn4 { 192.0.2.1 ct count 3 }")
		if got := Diff(snapshotNow(t, conn), before); len(got) > 0 {
			t.Errorf("counts are called drift: %v", got)
		}
	})
}
