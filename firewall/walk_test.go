package firewall

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

const outsider, friend, sixOutsider, sixFriend = "198.51.100.66", "10.1.2.3", "2001:db8::66", "2001:db8:6::7"

func TestWalkOwnTable(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		for _, input := range []string{"drop", "reject"} {
			rs := ruleset(t, `
[default]
input = "`+input+`"
[open.web]
ports = [80, 443, "8000-8010"]
protocol = ["tcp", "udp"]
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "2001:db8:6::/48"]
[open.elsewhere]
ports = 25
interfaces = "wg0"
[open.six]
ports = 7000
family = "ipv6"
`)
			mustApply(t, l.c, rs)
			for _, port := range []uint16{22, 23, 25, 80, 443, 7000, 7999, 8000, 8005, 8010, 8011, 65535} {
				for _, src := range []string{outsider, friend, sixOutsider, sixFriend} {
					for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
						p := l.to(proto, port, src)
						j := l.agree(p)
						d := rs.Decide(p)
						if same, first := Compare(d, j); !same {
							t.Errorf("%+v: policy says %s, walk %s by %s", p, d.Outcome, j.Verdict, first)
						}
						if j.Verdict == WalkAccept && !strings.HasPrefix(j.By.Comment, "open ") && !strings.HasPrefix(j.By.Chain, "backstop") {
							t.Errorf("%+v accepted by %s", p, j.By)
						}
						for _, n := range j.Notes {
							t.Errorf("note without need: %s", n)
						}
					}
				}
			}
			for _, p := range []rules.Packet{l.to(rules.ICMPv4, 0, outsider), l.to(rules.ICMPv6, 0, sixOutsider)} {
				if same, first := Compare(rs.Decide(p), l.agree(p)); !same {
					t.Errorf("%+v: differs by %s", p, first)
				}
			}
		}
	})
}

// What the host's own traffic brings in: the kernel is not asked, the policy is.
func TestWalkFlows(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		rs := ruleset(t, everything)
		mustApply(t, l.c, rs)
		for _, flow := range []rules.Flow{rules.NewFlow, rules.ReplyFlow, rules.RelatedFlow, rules.InvalidFlow} {
			for _, src := range []string{outsider, sixOutsider} {
				for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
					p := l.to(proto, 4711, src)
					p.Flow = flow
					d := rs.Decide(p)
					j := l.walk(p)
					if same, first := Compare(d, j); !same {
						t.Errorf("%+v: policy %s, walk %s by %s\n%s", p, d.Outcome, j.Verdict, first, tell(j))
					}
				}
			}
		}
		p := l.to(rules.TCP, 4711, "127.0.0.1")
		p.In = "lo"
		if j := l.walk(p); j.Verdict != WalkAccept {
			t.Errorf("loopback: %s", tell(j))
		}
	})
}

func TestWalkForeignTables(t *testing.T) {
	const admitsWeb = "[open.web]\nports = [80, 81]\n"
	for name, c := range map[string]struct {
		policy, text string
		port         uint16
		src          string
		want         Verdict
		by           string // part of By
		note         string
		unknown      bool // the walk cannot tell what the kernel does
	}{
		"foreign drop overrides our accept": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: `table ip filter, chain INPUT: drop (handle 2, "no web"): tcp dport 80 drop`,
			text: `table ip filter {
				chain INPUT { type filter hook input priority 0; policy accept;
					tcp dport 80 drop comment "no web"
				}
			}`,
		},
		"foreign policy drop": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "table ip filter, chain INPUT: policy drop",
			text: `table ip filter {
				chain INPUT { type filter hook input priority 0; policy drop;
					tcp dport 22 accept
				}
			}`,
		},
		"of the other family": {
			policy: admitsWeb, port: 80, src: sixOutsider, want: WalkAccept,
			text: `table ip filter {
				chain INPUT { type filter hook input priority 0; policy drop;
				}
			}`,
		},
		"foreign accept does not override our drop": {
			policy: "", port: 80, want: WalkDrop, by: "table inet deadlight, chain gate",
			text: `table inet first {
				chain c { type filter hook prerouting priority -300; policy accept;
					tcp dport 80 accept
				}
				chain d { type filter hook input priority -300; policy accept;
					accept
				}
			}`,
		},
		"foreign redirect after the gate": {
			policy: admitsWeb, port: 81, want: WalkAccept, note: "redirect to port 9999",
			text: `table ip nat {
				chain c { type nat hook prerouting priority -100; policy accept;
					tcp dport 81 redirect to :9999
				}
			}
			table ip after {
				chain c { type filter hook input priority 5; policy drop;
					tcp dport 9999 ct original proto-dst 81 ct status dnat accept
				}
			}`,
		},
		"redirect of a port that is not listed": {
			policy: admitsWeb, port: 9000, want: WalkDrop, by: "chain gate",
			text: `table ip nat {
				chain c { type nat hook prerouting priority -100; policy accept;
					tcp dport 9000 redirect to :80
				}
			}`,
		},
		"dnat to another host is forwarded": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: `table ip after, chain transit: drop`, note: "forward is walked",
			text: `table ip nat {
				chain c { type nat hook prerouting priority -100; policy accept;
					tcp dport 80 dnat to 172.17.0.5:8080
				}
			}
			table ip after {
				chain transit { type filter hook forward priority 5; policy accept;
					oifname "docker0" ip daddr 172.17.0.5 tcp dport 8080 drop
				}
			}`,
		},
		"dnat through a map": {
			policy: admitsWeb, port: 80, want: WalkReject, by: "reject",
			text: `table ip nat {
				map where {
					type inet_service : ipv4_addr . inet_service
					elements = { 80 : 192.0.2.1 . 8080 }
				}
				chain c { type nat hook prerouting priority -100; policy accept;
					dnat ip to tcp dport map @where
				}
			}
			table ip after {
				chain transit { type filter hook input priority 5; policy accept;
					tcp dport 8080 reject with tcp reset
				}
			}`,
		},
		"the first binding of chains of type nat holds": {
			policy: admitsWeb, port: 80, want: WalkAccept,
			text: `table ip early {
				chain c { type nat hook prerouting priority -150; policy accept;
					tcp dport 80 redirect to :1000
				}
			}
			table ip late {
				chain c { type nat hook prerouting priority -100; policy accept;
					tcp dport 80 redirect to :2000
				}
				chain d { type filter hook input priority 0; policy drop;
					tcp dport 1000 accept
				}
			}`,
		},
		"a stateless rewrite is what the gate sees": {
			policy: admitsWeb, port: 9000, want: WalkDrop, by: "table inet deadlight",
			text: `table ip raw {
				chain c { type filter hook prerouting priority -300; policy accept;
					tcp dport 9000 tcp dport set 9001
				}
			}`,
		},
		"jump, return, goto": {
			policy: admitsWeb, port: 80, want: WalkReject, by: "handle",
			text: `table inet t {
				chain far { tcp dport 22 drop
					return
				}
				chain further { tcp dport 81 accept
				}
				chain base { type filter hook input priority 0; policy accept;
					jump far
					tcp dport 80 jump further
					tcp dport 80 goto away
					drop
				}
				chain away { tcp dport 81 drop
					reject with tcp reset
				}
			}`,
		},
		"goto does not come back": {
			policy: admitsWeb, port: 80, want: WalkAccept,
			text: `table inet t {
				chain away { tcp dport 81 drop
				}
				chain base { type filter hook input priority 0; policy accept;
					goto away
					drop
				}
			}`,
		},
		"conntrack sees nothing before its place": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "ct state invalid",
			text: `table inet t {
				chain base { type filter hook prerouting priority -300; policy accept;
					ct state invalid drop
				}
			}`,
		},
		"untracked": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "ct state untracked",
			text: `table inet t {
				chain base { type filter hook prerouting priority -300; policy accept;
					tcp dport 80 notrack
				}
				chain in { type filter hook prerouting priority -150; policy accept;
					ct state untracked drop
				}
			}`,
		},
		"marks": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "meta mark 17",
			text: `table inet t {
				chain pre { type filter hook prerouting priority -150; policy accept;
					tcp dport 80 meta mark set 0x11 ct mark set 0x12
				}
				chain base { type filter hook input priority 0; policy accept;
					meta mark 0x11 ct mark 0x12 drop
				}
			}`,
		},
		"a concatenation with intervals": {
			policy: admitsWeb, port: 80, want: WalkReject, by: "chain no: reject",
			text: `table ip t {
				chain no { reject
				}
				map m {
					type ipv4_addr . inet_service : verdict
					flags interval
					elements = { 198.51.100.0/25 . 70-79 : accept, 198.51.100.0/25 . 80-90 : goto no }
				}
				chain base { type filter hook input priority 0; policy drop;
					ip saddr . tcp dport vmap @m
				}
			}`,
		},
		"a catch-all element": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "vmap",
			text: `table ip t {
				chain base { type filter hook input priority 0; policy accept;
					tcp dport vmap { 22 : accept, * : drop }
				}
			}`,
		},
		"negations and ranges": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "ip saddr != 10.0.0.0/8 tcp dport >= 50 tcp dport <= 100 iifname != { \"eth0\" }",
			text: `table ip t {
				chain base { type filter hook input priority 0; policy accept;
					ip saddr != 10.0.0.0/8 tcp dport >= 50 tcp dport <= 100 iifname != { "wg0", "lo" } tcp sport != 1-1023 ip ttl > 3 drop
				}
			}`,
		},
		"a limit is taken as kept": {
			policy: admitsWeb, port: 80, want: WalkAccept, note: "the rate limit in table ip t, chain base is not reached",
			text: `table ip t {
				chain base { type filter hook input priority 0; policy drop;
					tcp dport 80 limit rate over 100/second drop
					tcp dport 80 limit rate 100/second accept
				}
			}`,
		},
		"a limit for each source": {
			policy: admitsWeb, port: 80, want: WalkAccept, note: "not reached",
			text: `table ip t {
				set meters { type ipv4_addr
					size 100
					flags dynamic
				}
				chain base { type filter hook input priority 0; policy drop;
					tcp dport 80 add @meters { ip saddr limit rate over 100/second } drop
					tcp dport 80 ct count over 1000 drop
					tcp dport 80 accept
				}
			}`,
		},
		"the time decides": {
			policy: admitsWeb, port: 80, want: WalkUnknown, by: "it depends on the day", unknown: true,
			text: `table ip t {
				chain base { type filter hook input priority 0; policy accept;
					meta day "Sunday" drop
				}
			}`,
		},
		"unknown, and all the same": {
			policy: admitsWeb, port: 80, want: WalkDrop,
			text: `table ip t {
				chain base { type filter hook input priority 0; policy drop;
					meta random & 1 == 0 drop
					meta day "Sunday" jump more
					tcp dport 80 drop
					accept
				}
				chain more { meta length 40-4000 drop
				}
			}`,
		},
		"chance decides": {
			policy: admitsWeb, port: 80, want: WalkUnknown, by: "cannot tell", unknown: true,
			text: `table ip t {
				chain base { type filter hook input priority 0; policy accept;
					numgen random mod 2 == 0 drop
				}
			}`,
		},
		"chance decides between chains that agree": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "drop",
			text: `table ip t {
				chain one { drop
				}
				chain two { jump one
				}
				chain base { type filter hook input priority 0; policy accept;
					numgen random mod 2 vmap { 0 : goto one, 1 : goto two }
					drop
				}
			}`,
		},
		"chance decides between chains that do not": {
			policy: admitsWeb, port: 80, want: WalkUnknown, by: "cannot tell", unknown: true,
			text: `table ip t {
				chain one { drop
				}
				chain two { accept
				}
				chain base { type filter hook input priority 0; policy accept;
					numgen random mod 2 vmap { 0 : goto one, 1 : goto two }
				}
			}`,
		},
		"nothing is left to chance": {
			policy: admitsWeb, port: 80, want: WalkDrop, by: "drop",
			text: `table ip t {
				chain one { drop
				}
				chain base { type filter hook input priority 0; policy accept;
					numgen random mod 1 vmap { 0 : goto one }
				}
			}`,
		},
		"equal priorities that answer differently": {
			policy: admitsWeb, port: 80, want: WalkUnknown, note: "order unknown", unknown: true,
			text: `table ip t {
				chain base { type filter hook input priority 0; policy accept;
					tcp dport 80 drop
				}
			}
			table inet u {
				chain base { type filter hook input priority 0; policy accept;
					tcp dport 80 reject
				}
			}`,
		},
		"a dormant table": {
			policy: admitsWeb, port: 80, want: WalkAccept,
			text: `table ip t {
				flags dormant
				chain base { type filter hook input priority 0; policy drop;
				}
			}`,
		},
		"ingress": {
			policy: admitsWeb, port: 80, want: WalkAccept, note: "not walked: table netdev n, chain in judges what enters by eth0 before",
			text: `table netdev n {
				chain in { type filter hook ingress device "eth0" priority 0; policy accept;
				}
			}`,
		},
		"the reverse path": {
			policy: admitsWeb, port: 80, want: WalkAccept,
			text: `table inet t {
				chain base { type filter hook prerouting priority -300; policy accept;
					fib saddr . iif oif missing drop
					fib saddr type local drop
					fib daddr type != local drop
					fib daddr . iif type != { local, broadcast, multicast } drop
					fib daddr oifname "docker0" drop
				}
			}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				l := newLab(t)
				rs := ruleset(t, c.policy)
				mustApply(t, l.c, rs)
				l.load(c.text)
				src := c.src
				if src == "" {
					src = outsider
				}
				p := l.to(rules.TCP, c.port, src)
				var j *Journey
				if c.unknown {
					j = l.walk(p)
				} else {
					j = l.agree(p)
				}
				if j.Verdict != c.want || !strings.Contains(j.By.String(), c.by) {
					t.Errorf("%s, want %s by %q\n%s", j.Verdict, c.want, c.by, tell(j))
				}
				if c.note != "" && !strings.Contains(strings.Join(j.Notes, "\n"), c.note) {
					t.Errorf("notes %q, want %q", j.Notes, c.note)
				}
				same, first := Compare(rs.Decide(p), j)
				if same != (rs.Decide(p).Outcome == rules.OutcomeOpen == (j.Verdict == WalkAccept) && j.Verdict != WalkUnknown && j.Verdict != WalkReject) {
					t.Errorf("compare: %v, %v", same, first)
				}
			})
		})
	}
}

func TestCompareNamesTheOwnStep(t *testing.T) {
	foreign := Step{Family: "ip", Table: "filter", Chain: "INPUT", Verdict: "accept"}
	own := Step{Family: "inet", Table: rules.TableName, Chain: "gate", Verdict: "accept"}
	j := &Journey{Verdict: WalkAccept, Steps: []Step{foreign, own}, By: foreign}
	same, first := Compare(rules.Decision{Outcome: rules.OutcomeFiltered}, j)
	if same || *first != own {
		t.Errorf("compare: %v, %v", same, first)
	}
	if same, first := Compare(rules.Decision{Outcome: rules.OutcomeOpen}, j); !same || first != nil {
		t.Errorf("compare: %v, %v", same, first)
	}
}

func TestWalkWithoutRules(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		j, err := dial(t).Walk(rules.Packet{Protocol: rules.TCP, DstPort: 22})
		must(t, err)
		if j.Verdict != WalkAccept || j.By.String() != "no chain judges it" {
			t.Errorf("%s", tell(j))
		}
	})
}

// A set of any size costs one question, and a Conn of another namespace answers
// for that one.
func TestWalkLargeSetsElsewhere(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		var list strings.Builder
		for i := range 60000 {
			fmt.Fprintf(&list, "%q,\n", fmt.Sprintf("11.%d.%d.0/25", i>>8, i&255))
		}
		rs := ruleset(t, "[open.web]\nports = 80\nfrom = \"@many\"\n[set.many]\naddresses = [\n"+list.String()+"]\n")
		mustApply(t, l.c, rs)
		here, err := os.Open("/proc/thread-self/ns/net")
		must(t, err)
		defer here.Close()
		done := make(chan struct{})
		go func() { // on a thread of the namespace that the tests began in
			defer close(done)
			c, err := Dial(here)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for src, want := range map[string]Verdict{"11.7.9.127": WalkAccept, "11.7.9.128": WalkDrop} {
				start := time.Now()
				p := l.to(rules.TCP, 80, src)
				j, err := c.Walk(p)
				if err != nil {
					t.Error(err)
					return
				}
				if same, _ := Compare(rs.Decide(p), j); !same || j.Verdict != want {
					t.Errorf("%s: %s", src, tell(j))
				}
				for _, n := range j.Notes {
					t.Errorf("note without need: %s", n) // the address is known only there
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("took %s", took)
				}
			}
		}()
		<-done
	})
}

// A packet of which little is given: what is assumed is said where it mattered.
func TestWalkSaysWhatItAssumes(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		l.load(`table inet t {
			chain base { type filter hook input priority 0; policy accept;
				iifname "wg0" tcp dport 22 drop
				tcp sport 1-1023 tcp dport 23 drop
				ip ttl 255 tcp dport 24 drop
				fib daddr type local tcp dport 25 drop
				meta mark 7 tcp dport 26 drop
			}
		}`)
		for port, note := range map[uint16]string{
			22: "the packet enters by an interface that no rule names", 23: "the source port is an ephemeral one", 24: "the hop limit is 64",
			25: "the destination is an address of this host", 26: "the packet arrives without a mark", 27: "",
		} {
			p := rules.Packet{Src: netip.MustParseAddr(outsider), Dst: netip.MustParseAddr("203.0.113.1"), Protocol: rules.TCP, DstPort: port}
			j := l.walk(p)
			if want := map[bool]Verdict{true: WalkDrop, false: WalkAccept}[port == 25]; j.Verdict != want {
				t.Errorf("%d: %s", port, tell(j))
			}
			if note == "" && len(j.Notes) > 0 || note != "" && (len(j.Notes) != 1 || !strings.Contains(j.Notes[0], note)) {
				t.Errorf("%d: notes %q, want %q", port, j.Notes, note)
			}
		}
	})
}
