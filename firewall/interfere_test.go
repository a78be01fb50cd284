package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// noLegacy stands for a kernel without iptables-legacy.
func noLegacy() HostFiles { return HostFiles{Net: fstest.MapFS{}} }

func (l *lab) interference(rs *rules.Ruleset) []Interference {
	l.t.Helper()
	list, err := l.c.Interference(rs, noLegacy())
	must(l.t, err)
	// The witness of the lab is a foreign table like any other, and harmless.
	for _, i := range list {
		if strings.Contains(i.Where, "witness") {
			l.t.Errorf("the witness interferes: %+v", i)
		}
	}
	return list
}

// arrives reports whether a packet gets as far as prerouting; after does.
func (l *lab) arrives(p, after rules.Packet) bool {
	l.t.Helper()
	before := l.counts()
	_, err := unix.Write(l.fd, l.frame(p))
	must(l.t, err)
	l.kernel(after)
	return l.counts().arrived > before.arrived+1
}

// short writes a finding as tests expect it.
func short(i Interference) string {
	s := fmt.Sprintf("%s %s %s", i.Severity, i.Kind, i.Where)
	if len(i.Ports) > 0 {
		s += " [" + strings.Join(i.Ports, " ") + "]"
	}
	if i.Unknown {
		s += " unknown"
	}
	return s
}

func shorts(list []Interference) []string {
	var out []string
	for _, i := range list {
		out = append(out, short(i))
	}
	return out
}

const interferePolicy = `
[open.web]
ports = [80, 443]
protocol = ["tcp", "udp"]
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "2001:db8:6::/48"]
[open.many]
ports = "6000-9000"
[open.ipsec]
protocol = "esp"
`

// Each kind of foreign chain, in the kernel, with what is said of it. Where a
// port is named as dropped or passed, the kernel is asked with a packet.
func TestInterferenceChains(t *testing.T) {
	for name, c := range map[string]struct {
		text  string
		want  []string
		rule  string // in Rule of the first finding
		drops []uint16
		early []uint16 // dropped before any hook that the lab counts at
		pass  []uint16
	}{
		"nothing": {pass: []uint16{80}},
		"empty skeleton": {
			text: `table inet filter { chain input { type filter hook input priority 0; }; chain output { type filter hook output priority 0; policy accept; }; }`,
			pass: []uint16{80},
		},
		"an accept elsewhere": {
			text: `table inet filter { chain input { type filter hook input priority 0; tcp dport { 80, 81 } accept; }; }`,
			pass: []uint16{80},
		},
		"a rule that drops": {
			text:  `table inet filter { chain input { type filter hook input priority 0; tcp dport { 443, 7000-7003 } drop comment "no web"; }; }`,
			want:  []string{"breaks drop table inet filter, chain input [443/tcp 7000-7003/tcp]"},
			rule:  `drop (handle 3, "no web")`,
			drops: []uint16{443, 7000, 7003}, pass: []uint16{80, 6999, 7004},
		},
		"policy drop": {
			text:  `table ip filter { chain INPUT { type filter hook input priority 0; policy drop; tcp dport 80 accept; }; }`,
			want:  []string{"breaks drop table ip filter, chain INPUT [22/tcp 443/tcp 6000-9000/tcp 80/udp 443/udp esp]"},
			rule:  "policy drop",
			drops: []uint16{443, 6000}, pass: []uint16{80},
		},
		"reject behind a jump": {
			text: `table inet a { chain web { tcp dport 80 reject with tcp reset; }; chain pre { type filter hook prerouting priority -150; jump web; }; }`,
			want: []string{"breaks drop table inet a, chain web [80/tcp]"},
		},
		"a map of verdicts": {
			text:  `table inet a { map m { type inet_service : verdict; elements = { 80 : drop, 443 : accept }; }; chain in { type filter hook input priority 0; tcp dport vmap @m; }; }`,
			want:  []string{"breaks drop table inet a, chain in [80/tcp]"},
			drops: []uint16{80}, pass: []uint16{443},
		},
		"chosen sources": {
			text: `table inet bans { set bad { type ipv4_addr; elements = { 192.0.2.250 }; }; chain in { type filter hook input priority -1; ip saddr @bad drop; }; }`,
			want: []string{"note drop table inet bans, chain in"}, pass: []uint16{80},
		},
		"before the policy, by priority": {
			text:  `table ip early { chain pre { type filter hook prerouting priority -300; udp dport 53 drop; tcp dport 443 drop; }; }`,
			want:  []string{"breaks drop table ip early, chain pre [443/tcp]"},
			drops: []uint16{443}, pass: []uint16{80},
		},
		"what depends on the packet": {
			text: `table ip filter { chain INPUT { type filter hook input priority 0; tcp dport 443 meta length > 500 drop; }; }`,
			want: []string{"may drop table ip filter, chain INPUT [443/tcp] unknown"},
			rule: "cannot tell",
		},
		"answers": {
			text: `table inet out { chain o { type filter hook output priority 0; policy drop; ct state established tcp sport 80 accept; icmpv6 type != echo-reply accept; }; }`,
			want: []string{"breaks answers table inet out, chain o [22/tcp 443/tcp 6000-9000/tcp 80/udp 443/udp esp]"},
		},
		"answers pass": {
			text: `table inet out { chain o { type filter hook output priority 0; policy drop; ct state established,related accept; icmpv6 type != echo-reply accept; }; }`,
			want: []string{"note drop table inet out, chain o"},
		},
		"answers by owner": {
			text: `table inet out { chain o { type filter hook output priority 0; tcp sport 80 meta skuid 33 drop; }; }`,
			want: []string{"may answers table inet out, chain o [80/tcp] unknown"},
		},
		"forward": {
			text: `table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }`,
			want: []string{"note drop table ip filter, chain FORWARD"}, pass: []uint16{80},
		},
		"a rewrite before the policy": {
			text: `table ip raw { chain pre { type filter hook prerouting priority -300; tcp dport 8888 tcp dport set 80; }; }`,
			want: []string{"breaks rewrite table ip raw, chain pre"}, pass: []uint16{80, 8888}, // 8888 is closed by the policy
		},
		"a rewrite after the policy": {
			text: `table ip mangle { chain pre { type filter hook prerouting priority -90; tcp dport 80 tcp dport set 8080; }; }`,
			want: []string{"may rewrite table ip mangle, chain pre"},
		},
		"a rewrite that matters to nobody": {
			text: `table ip mangle { chain pre { type filter hook prerouting priority -150; ip ttl set 9; ip dscp set cs1; meta mark set 1; }; }`,
		},
		"notrack": {
			text: `table ip raw { chain pre { type filter hook prerouting priority -300; udp sport 53 notrack; }; }`,
			want: []string{"may notrack table ip raw, chain pre"},
		},
		"notrack too late": {
			text: `table ip raw { chain pre { type filter hook prerouting priority -100; udp sport 53 notrack; }; }`,
		},
		"nat": {
			text: `table ip nat { chain pre { type nat hook prerouting priority dstnat; tcp dport 80 redirect to :8080; }; chain post { type nat hook postrouting priority 100; masquerade; }; }`,
			want: []string{"note redirect table ip nat, chain pre"},
		},
		"tproxy": {
			text: `table ip mangle { chain pre { type filter hook prerouting priority -150; tcp dport 8080 tproxy to :3128 meta mark set 1; }; }`,
			want: []string{"may proxy table ip mangle, chain pre"},
		},
		"synproxy": {
			text: `table ip f { chain in { type filter hook input priority 0; tcp dport 80 ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp sack-perm; }; }`,
			want: []string{"may proxy table ip f, chain in"},
		},
		"ingress": {
			text:  `table netdev early { chain i { type filter hook ingress device "eth0" priority 0; tcp dport 443 drop; }; }`,
			want:  []string{"breaks drop table netdev early, chain i [443/tcp]"},
			early: []uint16{443}, pass: []uint16{80},
		},
		"ingress of inet": {
			text:  `table inet early { chain i { type filter hook ingress device "eth0" priority 0; policy drop; tcp dport != 443 accept; meta l4proto != tcp accept; meta protocol arp accept; }; }`,
			want:  []string{"breaks drop table inet early, chain i [443/tcp]"},
			early: []uint16{443}, pass: []uint16{80},
		},
		"ingress of a list": {
			text: `table netdev early { chain i { type filter hook ingress device "eth0" priority 0; ip saddr 192.0.2.250 drop; }; }`,
			want: []string{"note drop table netdev early, chain i"}, pass: []uint16{80},
		},
		"ingress of a port without address": {
			text: `table netdev early { chain i { type filter hook ingress device "inside" priority 0; policy drop; }; }`,
			want: []string{"may drop table netdev early, chain i unknown"},
		},
		"fwd": {
			text: `table netdev early { chain i { type filter hook ingress device "eth0" priority 0; tcp dport 80 fwd to "docker0"; }; }`,
			want: []string{"may drop table netdev early, chain i [80/tcp] unknown", "may redirect table netdev early, chain i"},
		},
		"dup": {
			text: `table netdev early { chain i { type filter hook ingress device "eth0" priority 0; tcp dport 80 dup to "docker0"; }; }`,
			want: []string{"note copy table netdev early, chain i"}, pass: []uint16{80},
		},
		"egress": {
			text: `table netdev late { chain e { type filter hook egress device "eth0" priority 0; tcp sport 80 drop; }; }`,
			want: []string{"may drop table netdev late, chain e unknown"},
		},
		"arp": {
			text: `table arp a { chain i { type filter hook input priority 0; arp operation 1 drop; }; }`,
			want: []string{"may drop table arp a, chain i unknown"},
		},
		"bridge": {
			text: `table bridge b { chain i { type filter hook input priority 0; policy drop; }; }`,
			want: []string{"may drop table bridge b, chain i unknown"},
		},
		"dormant": {
			text: `table ip filter { flags dormant; chain INPUT { type filter hook input priority 0; policy drop; }; }`,
			pass: []uint16{80},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				l := newLab(t)
				l.load(c.text)
				rs := ruleset(t, interferePolicy)
				got := l.interference(rs)
				if s := shorts(got); !slices.Equal(s, c.want) {
					t.Errorf("got %q\nwant %q\n%+v", s, c.want, got)
				}
				if c.rule != "" && (len(got) == 0 || !strings.Contains(got[0].Rule, c.rule)) {
					t.Errorf("rule of %+v, want %q", got, c.rule)
				}
				for _, i := range got {
					if i.Fact == "" || i.Advice == "" && i.Severity != Note {
						t.Errorf("no fact or advice: %+v", i)
					}
				}
				// Ours beside it must not change what is said of it.
				mustApply(t, l.c, rs)
				if with := shorts(l.interference(rs)); !slices.Equal(with, shorts(got)) {
					t.Errorf("with our table %q, without %q", with, shorts(got))
				}
				for _, port := range c.drops {
					if v := l.kernel(l.to(rules.TCP, port, outsider)); v != WalkDrop {
						t.Errorf("port %d: the kernel does %s, not drop", port, v)
					}
				}
				for _, port := range c.early {
					if l.arrives(l.to(rules.TCP, port, outsider), l.to(rules.TCP, 80, outsider)) {
						t.Errorf("port %d arrives", port)
					}
				}
				for _, port := range c.pass {
					if v := l.kernel(l.to(rules.TCP, port, outsider)); v != WalkAccept {
						t.Errorf("port %d: the kernel does %s, not accept", port, v)
					}
				}
			})
		})
	}
}

// Without a policy no packet can be tried: what can drop is not passed over.
func TestInterferenceWithoutPolicy(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load(`table ip filter { chain INPUT { type filter hook input priority 0; policy drop; }; chain OUTPUT { type filter hook output priority 0; policy accept; }; }`)
		want := []string{"may drop table ip filter, chain INPUT unknown"}
		if got := shorts(l.interference(nil)); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// A policy of more combinations than are tried says so.
func TestInterferenceTooMany(t *testing.T) {
	var text strings.Builder
	for i := range 90 {
		fmt.Fprintf(&text, "[open.n%d]\nports = \"%d-%d\"\n", i, 1000+i*200, 1000+i*200+120)
	}
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load(`table ip filter { chain INPUT { type filter hook input priority 0; policy accept; tcp dport 22 drop; }; }`)
		want := []string{"may chain other tables unknown", "note drop table ip filter, chain INPUT"}
		if got := shorts(l.interference(ruleset(t, text.String()))); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// An opening by an interface that does not exist yet is tried all the same, and
// a block or an end keeps a packet from being tried.
func TestInterferenceOpenings(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load(`table inet f { chain in { type filter hook input priority 0; iifname "wg0" tcp dport 22 drop; tcp dport { 25, 26, 27 } drop; }; }`)
		rs := ruleset(t, `
[open.admin]
ports = 22
interfaces = "wg*"
[open.blocked]
ports = 25
[open.over]
ports = 26
expires = 2020-01-01T00:00:00Z
[open.all]
protocol = "any"
interfaces = "eth0"
from = "10.0.0.0/8"
[block.mail]
ports = 25
`)
		want := []string{"breaks drop table inet f, chain in [22/tcp]", "breaks drop table inet f, chain in [26-27/tcp]"}
		if got := shorts(l.interference(rs)); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestInterferenceFlowtable(t *testing.T) {
	// This kernel may lack flowtables: the rule is made by hand, as the kernel
	// dumps it.
	table := &liveTable{family: 1, title: "f", rules: map[string][]*liveRule{"fw": {{handle: 7, exprs: []liveExpr{{name: "flow_offload"}}}}}}
	table.bases = []*liveChain{{table: table, title: "fw", hook: 2, typ: "filter"}}
	f := newFindings()
	f.scan(table.bases[0], true)
	want := []string{"may offload table inet f, chain fw"}
	if got := shorts(f.list()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestInterferenceQueue(t *testing.T) {
	table := &liveTable{family: 1, title: "f", rules: map[string][]*liveRule{"in": {{handle: 7, exprs: []liveExpr{{name: "queue"}}}}}}
	table.bases = []*liveChain{{table: table, title: "in", hook: 1, typ: "filter"}}
	rs := ruleset(t, "[open.web]\nports = 80\n")
	f := newFindings()
	tr := &trial{rs: rs, rules: &liveRules{tables: []*liveTable{table}}, host: &hostView{}, found: f}
	must(t, tr.run())
	f.scan(table.bases[0], true)
	want := []string{"may drop table inet f, chain in [80/tcp] unknown"}
	if got := shorts(f.list()); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Names of the kernel are given as they are: who prints them must escape them.
func TestInterferenceNames(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load("table ip filter { chain INPUT { type filter hook input priority 0; tcp dport 80 drop comment \"\x1b[31mred\"; }; }")
		got := l.interference(ruleset(t, interferePolicy))
		if len(got) != 1 || !strings.Contains(got[0].Rule, `\x1b[31mred`) {
			t.Errorf("got %+v", got)
		}
	})
}

func TestPortList(t *testing.T) {
	got := portList([]port{{rules.UDP, 53, 53}, {rules.TCP, 81, 90}, {rules.TCP, 80, 80}, {rules.TCP, 80, 80}, {rules.ESP, 0, 0}, {rules.TCP, 443, 443}, {rules.UDP, 65535, 65535}})
	want := []string{"80-90/tcp", "443/tcp", "53/udp", "65535/udp", "esp"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestInterferenceLegacy(t *testing.T) {
	for name, c := range map[string]struct {
		files fs.FS
		want  []string
	}{
		"no such kernel": {fstest.MapFS{}, nil},
		"no tables":      {fstest.MapFS{"ip_tables_names": {}, "ip6_tables_names": {}}, nil},
		"tables":         {fstest.MapFS{"ip_tables_names": {Data: []byte("filter\nnat\n")}, "ip6_tables_names": {}}, []string{"may legacy iptables-legacy unknown"}},
		"unreadable":     {unreadable{}, []string{"may legacy iptables-legacy unknown", "may legacy ip6tables-legacy unknown"}},
	} {
		if got := shorts(legacyInterference(c.files)); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		list, err := c.Interference(nil, HostFiles{})
		must(t, err)
		if len(list) != 0 {
			t.Errorf("a fresh namespace: %+v", list)
		}
	})
}

type unreadable struct{}

func (unreadable) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
}

// Rules as the managers of Debian load them.
func TestInterferenceManagers(t *testing.T) {
	for name, c := range map[string]struct {
		tool    []string
		text    string
		want    []string
		advice  string // in that of the first
		dropped []uint16
	}{
		"ufw": {
			tool: []string{"iptables-nft-restore"}, text: ufwRules,
			want: []string{
				"breaks drop table ip filter, chain INPUT [443/tcp]",
				"note drop table ip filter, chain FORWARD",
			},
			advice: "ufw allow", dropped: []uint16{443},
		},
		"firewalld": {
			tool: []string{"nft", "-f", "-"}, text: firewalldRules,
			want: []string{
				"breaks drop table inet firewalld, chain filter_INPUT [443/tcp]",
				"note drop table inet firewalld, chain filter_FORWARD",
				"note drop table inet firewalld, chain filter_PREROUTING",
			},
			advice: "firewall-cmd",
		},
		"fail2ban": {
			tool: []string{"nft", "-f", "-"}, text: fail2banRules,
			want: []string{"note drop table inet f2b-table, chain f2b-chain"},
		},
		"fail2ban by iptables": {
			tool: []string{"iptables-nft-restore"}, text: fail2banIptables,
			want: []string{"note drop table ip filter, chain INPUT"},
		},
		"docker": {
			tool: []string{"iptables-nft-restore"}, text: dockerRules,
			want: []string{"note drop table ip filter, chain FORWARD", "note redirect table ip nat, chain PREROUTING"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				l := newLab(t)
				rs := ruleset(t, "[open.web]\nports = [80, 443]\n")
				mustApply(t, l.c, rs)
				before, err := l.c.Snapshot(rules.TableName)
				must(t, err)
				cmd := exec.Command(c.tool[0], c.tool[1:]...)
				cmd.Stdin = strings.NewReader(c.text)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v: %v\n%s", c.tool, err, out)
				}
				got := l.interference(rs)
				slices.SortStableFunc(got, func(a, b Interference) int { return strings.Compare(short(a), short(b)) })
				if s := shorts(got); !slices.Equal(s, c.want) {
					t.Errorf("got %q\nwant %q\n%+v", s, c.want, got)
				}
				if c.advice != "" && !strings.Contains(got[0].Advice, c.advice) {
					t.Errorf("advice %q, want %q", got[0].Advice, c.advice)
				}
				now, err := l.c.Snapshot(rules.TableName)
				must(t, err)
				if d := Diff(before, now); len(d) > 0 {
					t.Errorf("our table changed: %v", d)
				}
				// What the policy closes stays closed, though the other admits it.
				for _, port := range []uint16{22, 8080} {
					if v := l.kernel(l.to(rules.TCP, port, outsider)); v != WalkDrop {
						t.Errorf("closed port %d: %s", port, v)
					}
				}
				if v := l.kernel(l.to(rules.TCP, 80, outsider)); v != WalkAccept {
					t.Errorf("open port 80: %s", v)
				}
				for _, port := range c.dropped {
					if v := l.kernel(l.to(rules.TCP, port, outsider)); v == WalkAccept {
						t.Errorf("port %d is said to be dropped, and is not", port)
					}
				}
				l.agree(l.to(rules.TCP, 443, outsider))
			})
		})
	}
}

// A banned source is dropped by fail2ban, and the list does not pretend else.
func TestInterferenceBanned(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load(fail2banRules)
		rs := ruleset(t, "[open.web]\nports = 22\nfrom = \"198.51.100.65-198.51.100.67\"\n")
		mustApply(t, l.c, rs)
		if v := l.kernel(l.to(rules.TCP, 22, outsider)); v != WalkReject {
			t.Fatalf("banned source: %s", v)
		}
		got := l.interference(rs)
		want := []string{"breaks drop table inet f2b-table, chain f2b-chain [22/tcp]"}
		if netip.MustParseAddr(outsider) != netip.MustParseAddr("198.51.100.66") {
			t.Fatal("the address that is tried is the second of the range")
		}
		if s := shorts(got); !slices.Equal(s, want) {
			t.Errorf("got %q, want %q", s, want)
		}
	})
}

func TestInterferencePermission(t *testing.T) {
	// Where nothing can be read, nothing is said to be fine.
	if _, err := (&Conn{fd: -1}).Interference(nil, noLegacy()); err == nil || errors.Is(err, errTorn) {
		t.Errorf("got %v", err)
	}
}

const ufwRules = `*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-before-input - [0:0]
:ufw-before-output - [0:0]
:ufw-after-input - [0:0]
:ufw-user-input - [0:0]
:ufw-skip-to-policy-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-after-input
-A OUTPUT -j ufw-before-output
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw-before-input -p icmp --icmp-type echo-request -j ACCEPT
-A ufw-before-input -j ufw-user-input
-A ufw-before-output -o lo -j ACCEPT
-A ufw-before-output -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-after-input -p udp --dport 137 -j ufw-skip-to-policy-input
-A ufw-skip-to-policy-input -j DROP
-A ufw-user-input -p tcp --dport 22 -j ACCEPT
-A ufw-user-input -p tcp --dport 80 -j ACCEPT
COMMIT
`

const firewalldRules = `
table inet firewalld {
	chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; }
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10; policy accept;
		ct state { established, related } accept
		oifname "lo" accept
	}
	chain filter_INPUT_ZONES {
		goto filter_IN_public
	}
	chain filter_IN_public {
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		tcp dport 80 accept
	}
}
`

const fail2banRules = `
table inet f2b-table {
	set addr-set-sshd { type ipv4_addr; elements = { 198.51.100.66 }; }
	chain f2b-chain {
		type filter hook input priority filter - 1; policy accept;
		tcp dport { 22 } ip saddr @addr-set-sshd reject with icmp port-unreachable
	}
}
`

const fail2banIptables = `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:f2b-sshd - [0:0]
-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd
-A f2b-sshd -s 198.51.100.66/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-sshd -j RETURN
COMMIT
`

const dockerRules = `*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp --dport 8081 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp --dport 80 -j ACCEPT
COMMIT
`
