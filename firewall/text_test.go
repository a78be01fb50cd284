package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// nftLists gives what the witness prints for the rules of each chain of a table,
// in order. -s leaves out counts.
func nftLists(t *testing.T, family, table string) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	chain := ""
	for _, line := range strings.Split(nft(t, "-s", "list", "table", family, table), "\n") {
		line = strings.Join(strings.Fields(line), " ")
		switch f := strings.Fields(line); {
		case len(f) == 3 && f[0] == "chain" && f[2] == "{":
			chain = f[1]
		case line == "}":
			chain = ""
		case chain != "" && line != "" && !strings.HasPrefix(line, "type "):
			out[chain] = append(out[chain], line)
		}
	}
	return out
}

// dumped gives the raw messages of a kind of one table.
func dumped(t *testing.T, c *Conn, family byte, typ, tableAttr uint16, table string) [][]byte {
	t.Helper()
	var out [][]byte
	err := c.ask(typ, unix.NLM_F_DUMP, family, attrString(nil, tableAttr, table), func(r reply) error {
		if attrText(r.attrs, tableAttr) == table {
			out = append(out, bytes.Clone(r.attrs))
		}
		return nil
	})
	if err != nil && !errors.Is(err, unix.ENOENT) { // there is no such table
		t.Fatal(err)
	}
	return out
}

func dumpedRules(t *testing.T, c *Conn, family byte, table string) map[string][][]byte {
	t.Helper()
	out := map[string][][]byte{}
	for _, m := range dumped(t, c, family, unix.NFT_MSG_GETRULE, unix.NFTA_RULE_TABLE, table) {
		chain := attrText(m, unix.NFTA_RULE_CHAIN)
		out[chain] = append(out[chain], m)
	}
	return out
}

// familyOfICMP is a test that nft leaves out before one for ICMP. ICMP of the
// other family exists, so two rules that judge differently would read alike.
var familyOfICMP = regexp.MustCompile(`meta nfproto ipv[46] ((meta l4proto )?(icmp|icmpv6|ipv6-icmp) )`)

// accepted turns nft's line into ours where the two mean to differ.
func accepted(line string) string {
	for _, d := range []struct{ nft, ours string }{
		// nft names a code by one list whatever the type: code 1 of
		// time-exceeded is not "host-unreachable".
		{"icmp code host-unreachable", "icmp code 1"},
		{"icmp code port-unreachable", "icmp code 3"},
		{"icmpv6 code admin-prohibited", "icmpv6 code 1"},
		// A name of an interface may change while the kernel keeps the index.
		{`iif "lo"`, "iif 1"},
		{`oif "lo"`, "oif 1"},
		{`device "lo"`, "device 1"},
		{`fwd to "lo"`, "fwd to 1"},
		{`dup to "lo"`, "dup to 1"},
		// What the objects and the values of a map are is not in the rule.
		{"@seen_mark { ip saddr : 0x00000005 }", "@seen_mark { ip saddr : " + hexText(native32(5)) + " }"},
		{"counter name tcp dport map", "object name tcp dport map"},
	} {
		line = strings.ReplaceAll(line, d.nft, d.ours)
	}
	return line
}

// inOrder sorts the elements of sets without a name: they have no order.
func inOrder(line string) string {
	return regexp.MustCompile(`\{ [^{}]*, [^{}]* \}`).ReplaceAllStringFunc(line, func(s string) string {
		list := strings.Split(strings.TrimSuffix(strings.TrimPrefix(s, "{ "), " }"), ", ")
		slices.Sort(list)
		return "{ " + strings.Join(list, ", ") + " }"
	})
}

// sameText compares our line with that of the witness.
func sameText(t *testing.T, line, ours string) {
	t.Helper()
	if inOrder(familyOfICMP.ReplaceAllString(ours, "$1")) != inOrder(accepted(line)) {
		t.Errorf("\n nft: %s\nours: %s", line, ours)
	}
}

func TestRuleTextIsThatOfNft(t *testing.T) {
	for name, text := range map[string]string{"everything": everything, "others": others, "observed": observed, "empty": ""} {
		t.Run(name, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				c := dial(t)
				rs := ruleset(t, text)
				mustApply(t, c, rs)
				want, got := nftLists(t, "inet", "deadlight"), dumpedRules(t, c, unix.NFPROTO_INET, "deadlight")
				sent := map[string][]string{}
				e, err := encode(&rs.Table, time.Now())
				if err != nil {
					t.Fatal(err)
				}
				for _, ch := range e.chains {
					for _, m := range ch.rules {
						sent[ch.name] = append(sent[ch.name], ruleText(m.attrs))
					}
				}
				seen := 0
				for chain, lines := range want {
					if len(lines) != len(got[chain]) || len(lines) != len(sent[chain]) {
						t.Errorf("chain %s: nft shows %d rules, the kernel dumps %d, we sent %d", chain, len(lines), len(got[chain]), len(sent[chain]))
						continue
					}
					for i, line := range lines {
						seen++
						sameText(t, line, ruleText(got[chain][i]))
						if text := ruleText(got[chain][i]); text != sent[chain][i] {
							t.Errorf("chain %s, rule %d\ndumped: %s\n  sent: %s", chain, i+1, text, sent[chain][i])
						}
					}
				}
				if seen < 20 {
					t.Errorf("only %d rules were compared", seen)
				}
			})
		})
	}
}

// handMade are rules as people write them, in chains where the kernel takes
// them, one table of family inet.
const handMade = `
table inet hand {
	counter hits { }
	quota some { over 20 mbytes }
	limit slow { rate 3/minute }
	ct helper ftp { type "ftp" protocol tcp; }
	ct timeout short { protocol tcp; policy = { established: 120 }; }
	ct expectation rtsp { protocol tcp; dport 9876; timeout 1m; size 12; l3proto ip; }
	synproxy proxy { mss 1460; wscale 7; timestamp sack-perm; }
	set conns { type ipv4_addr; size 100; flags dynamic; }
	set hosts { type ipv4_addr; flags interval; }
	set pairs { type ipv4_addr . inet_service; }
	set seen { type ipv4_addr; size 100; flags dynamic,timeout; timeout 1m; }
	map seen_mark { type ipv4_addr : mark; size 100; flags dynamic,timeout; timeout 1m; }
	map marks { type inet_service : mark; }
	map verdicts { type ifname : verdict; }
	map backends { type inet_service : ipv4_addr; }
	map counters { type inet_service : counter; }
	chain target { }
	chain filter {
		type filter hook input priority 0; policy accept;
		tcp dport 22 accept
		tcp dport != 22 drop
		tcp dport 1000-2000 continue
		tcp dport != 1000-2000 return
		tcp dport > 1024 accept
		tcp dport >= 1024 accept
		tcp dport < 1024 accept
		tcp dport <= 1024 accept
		tcp sport 22 tcp dport 1024 accept
		udp sport 53 udp length 100 accept
		th dport 53 accept
		meta l4proto udp th dport 53 accept
		sctp dport 80 sctp vtag 7 accept
		dccp sport 9 accept
		udplite dport 9 accept
		esp spi 100 accept
		ah spi 101 accept
		ip saddr 192.0.2.1 ip daddr 198.51.100.7 accept
		ip saddr 10.0.0.0/8 accept
		ip saddr 172.16.0.0/12 accept
		ip saddr != 192.168.0.0/16 drop
		ip daddr 192.0.2.1-192.0.2.9 accept
		ip6 saddr 2001:db8::/32 accept
		ip6 daddr != fe80::/10 drop
		ip6 saddr 2001:db8::1-2001:db8::9 accept
		ip saddr @hosts drop
		ip saddr != @hosts drop
		ip saddr . tcp dport @pairs accept
		ip ttl 64 ip length 100-200 accept
		ip dscp cs1 accept
		ip dscp != ef accept
		ip6 dscp af11 accept
		ip version 4 accept
		ip frag-off & 8191 != 0 drop
		ip protocol icmp accept
		ip6 nexthdr tcp accept
		ip6 flowlabel 22 accept
		ip6 hoplimit < 5 drop
		icmp type echo-request accept
		icmp type destination-unreachable icmp code 3 accept
		icmp id 33 accept
		tcp dport { 22, 80 } accept
		tcp dport { 22, 80-90, 10000-65535 } accept
		ip saddr { 10.0.0.0/8, 192.0.2.1 } drop
		ip6 saddr != { 2001:db8::/32 } drop
		iifname { "eth0", "lo" } accept
		ct state { established, new } accept
		ip saddr . tcp dport { 192.0.2.1 . 22, 192.0.2.2 . 80 } accept
		ip saddr . tcp dport { 10.0.0.0/8 . 22-25 } accept
		meta l4proto { tcp, udp } th dport 53 accept
		tcp dport vmap { 22 : accept, 80-90 : drop } 
		ct state vmap { established : accept, invalid : drop }
		meta mark set tcp dport map { 22 : 0x00000001, 80 : 0x00000002 }
		counter name tcp dport map { 22 : "hits" }
		meta pkttype { broadcast, multicast } drop
		icmpv6 type nd-neighbor-solicit accept
		igmp type membership-query accept
		tcp flags syn accept
		tcp flags == syn accept
		tcp flags != syn accept
		tcp flags & (fin | syn | rst | ack) == syn accept
		tcp flags & (syn | ack) == (syn | ack) accept
		tcp flags & (fin | syn) == 0 drop
		tcp flags ! syn drop
		tcp window 1000 tcp sequence 5 accept
		tcp option maxseg size 1360 accept
		tcp option sack-perm exists accept
		tcp option timestamp missing drop
		exthdr frag exists drop
		frag id 33 drop
		rt type 0 drop
		hbh nexthdr tcp drop
		ip option lsrr exists drop
		ct state new accept
		ct state established,related accept
		ct state != invalid accept
		ct state ! invalid accept
		ct status snat,dnat accept
		ct direction original accept
		ct mark 0x12 accept
		ct mark & 0xff == 0x10 accept
		ct mark 0x10-0x20 accept
		ct original ip saddr 10.0.0.0/8 accept
		ct original protocol 6 accept
		meta l4proto tcp ct reply proto-dst 80 accept
		ct original bytes > 100000 accept
		ct packets 5 accept
		ct avgpkt > 200 accept
		ct zone 7 accept
		ct expiration < 30s drop
		ct helper "ftp" accept
		ct count over 20 drop
		ct count 3 accept
		meta mark 0x1 accept
		meta mark != 0x1 accept
		meta mark & 0xff == 0x1 accept
		meta mark 1-10 accept
		meta priority 1:16 accept
		meta length 1000-1500 accept
		meta protocol ip accept
		meta nfproto ipv6 accept
		meta l4proto 47 accept
		meta l4proto > 100 accept
		meta skuid 1000 accept
		meta skgid 0-999 accept
		meta cpu 1 accept
		meta pkttype broadcast drop
		meta iiftype loopback accept
		meta cgroup 1048577 accept
		meta random <= 1000 accept
		meta ipsec exists accept
		meta hour "08:00"-"17:00" accept
		meta day "Monday" accept
		meta time > "2026-01-02 03:04:05" accept
		meta rtclassid 5 accept
		iifname "eth0" oifname "tun*" accept
		iifname != "br-*" drop
		iif "lo" accept
		iifgroup 5 accept
		iifname vmap @verdicts
		ether saddr 00:11:22:33:44:55 accept
		ether type ip accept
		fib saddr type local drop
		fib saddr . iif oif missing drop
		fib daddr . iif type != local drop
		fib daddr oifname "eth0" accept
		fib saddr oif exists accept
		socket transparent 1 accept
		socket mark 0x5 accept
		socket wildcard 0 accept
		rt ip nexthop 192.0.2.1 accept
		rt ipsec exists accept
		ipsec in reqid 1 accept
		ipsec in ip saddr 192.0.2.1 accept
		osf name "Linux" accept
		osf ttl skip name "Linux" accept
		osf ttl loose version "Linux:3.0" accept
		numgen inc mod 2 0 accept
		numgen random mod 10 < 3 accept
		numgen inc mod 4 offset 10 != 11 accept
		jhash ip saddr mod 2 1 accept
		jhash ip saddr . tcp sport mod 4 seed 0xdead 1 accept
		symhash mod 2 1 accept
		@th,16,16 22 accept
		@nh,64,8 6 accept
		@ll,0,48 5 accept
		limit rate 10/minute accept
		limit rate over 10/second burst 20 packets drop
		limit rate 10 mbytes/second accept
		limit rate over 1 kbytes/hour burst 2 kbytes drop
		quota 10 mbytes accept
		quota over 1000 bytes drop
		counter
		counter packets 5 bytes 500 accept
		counter name "hits" accept
		counter name tcp dport map @counters
		quota name "some" drop
		limit name "slow" accept
		ct helper set "ftp"
		ct timeout set "short"
		ct expectation set "rtsp"
		synproxy name "proxy"
		synproxy mss 1460 wscale 7 timestamp sack-perm
		log
		log prefix "a b: " level info
		log prefix "a b: " group 5 snaplen 100 queue-threshold 3
		log flags all
		log flags tcp sequence,options
		log flags skuid flags ether
		reject
		reject with tcp reset
		tcp dport 9 reject with tcp reset
		reject with icmpx admin-prohibited
		reject with icmp host-unreachable
		reject with icmpv6 no-route
		ip saddr 192.0.2.1 reject with icmp admin-prohibited
		meta mark set 0x7
		meta mark set ct mark
		meta mark set meta mark | 0x10
		meta mark set meta mark & 0xf0
		meta mark set meta mark ^ 0x1
		meta mark set tcp dport map @marks
		meta mark set numgen inc mod 3
		meta priority set 1:16
		meta nftrace set 1
		ct mark set 0x7
		ct mark set meta mark
		ct mark set ct mark & 0xff | 0x100
		ct event set new,destroy
		tcp dport set 80
		ip saddr set 192.0.2.7
		ip ttl set 64
		ip dscp set cs1
		tcp option maxseg size set 1400
		add @seen { ip saddr }
		update @seen { ip saddr timeout 5m }
		update @seen { ip saddr limit rate 10/second burst 5 packets } accept
		add @conns { ip saddr ct count over 3 } drop
		delete @seen { ip saddr }
		update @seen { ip saddr & 255.255.255.0 counter }
		update @seen_mark { ip saddr : 0x5 }
		jump target
		goto target
		tcp dport 5 jump target comment "a comment, with: things"
		tcp dport 5 counter log prefix "x" accept
	}
	chain raw {
		type filter hook prerouting priority raw; policy accept;
		notrack
		meta pkttype set host
		meta nftrace set 1
		ct zone set 5
		tcp dport 80 tproxy to :8080
		ip protocol tcp tproxy ip to 127.0.0.1:8080
		ip6 nexthdr tcp tproxy ip6 to [::1]:8080
		meta l4proto tcp tproxy to :8080
	}
	chain dstnat {
		type nat hook prerouting priority dstnat; policy accept;
		tcp dport 80 dnat ip to 192.0.2.1
		tcp dport 80 dnat ip to 192.0.2.1:8080
		tcp dport 80 dnat ip to 192.0.2.1-192.0.2.9:80-90
		tcp dport 80 dnat ip6 to [2001:db8::1]:8080
		tcp dport 80 dnat ip6 to 2001:db8::1
		tcp dport 80 dnat to :8080
		dnat ip to tcp dport map @backends
		tcp dport 80 redirect to :8080
		tcp dport 80 redirect to :8080-8090 random
		redirect
		dnat ip to 192.0.2.1 persistent
	}
	chain srcnat {
		type nat hook postrouting priority srcnat; policy accept;
		masquerade
		masquerade random
		tcp option maxseg size set rt mtu
		masquerade fully-random,persistent
		meta l4proto tcp masquerade to :1024-65535
		snat ip to 192.0.2.1
		oif "lo" snat ip to 192.0.2.1-192.0.2.5
		ip saddr 10.0.0.0/8 snat ip prefix to 192.0.2.0/24
	}
}
table ip hand4 {
	chain filter {
		type filter hook input priority 0; policy accept;
		ip saddr 10.0.0.0/8 tcp dport 22 accept
		ip protocol tcp accept
		ip protocol tcp tcp dport 22 accept
		icmp type echo-request accept
		reject
		reject with icmp host-unreachable
		ip saddr & 255.0.255.0 == 10.0.1.0 accept
	}
	chain nat {
		type nat hook prerouting priority dstnat; policy accept;
		tcp dport 80 dnat to 192.0.2.1:8080
	}
}
table ip dup4 {
	chain out {
		type filter hook prerouting priority 0; policy accept;
		dup to 192.0.2.9
		dup to 192.0.2.9 device "lo"
	}
}
table ip6 hand6 {
	chain filter {
		type filter hook input priority 0; policy accept;
		ip6 saddr 2001:db8::/64 tcp dport 22 accept
		icmpv6 type echo-request accept
		reject with icmpv6 addr-unreachable
	}
}
table netdev handdev {
	chain in {
		type filter hook ingress device "lo" priority 0; policy accept;
		ip saddr 192.0.2.1 drop
		meta protocol arp accept
		ether saddr 00:11:22:33:44:55 ip6 daddr ::1 drop
		fwd to "lo"
		dup to "lo"
	}
}
`

func TestRuleTextOfHandMadeRules(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "hand.nft")
		if err := os.WriteFile(file, []byte(handMade), 0o600); err != nil {
			t.Fatal(err)
		}
		nft(t, "-f", file)
		c := dial(t)
		seen, texts := 0, map[string]string{}
		for _, table := range []struct {
			family byte
			word   string
			name   string
		}{{unix.NFPROTO_INET, "inet", "hand"}, {unix.NFPROTO_IPV4, "ip", "hand4"}, {unix.NFPROTO_IPV4, "ip", "dup4"}, {unix.NFPROTO_IPV6, "ip6", "hand6"}, {unix.NFPROTO_NETDEV, "netdev", "handdev"}} {
			want, got := nftLists(t, table.word, table.name), dumpedRules(t, c, table.family, table.name)
			sets := map[string][]string{}
			if table.family == unix.NFPROTO_INET {
				for _, m := range dumped(t, c, table.family, unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE, table.name) {
					sets[attrText(m, unix.NFTA_SET_NAME)] = elementTexts(t, c, table.name, m)
				}
			}
			for chain, lines := range want {
				if len(lines) != len(got[chain]) {
					t.Errorf("chain %s: nft shows %d rules, the kernel dumps %d", chain, len(lines), len(got[chain]))
					continue
				}
				for i, line := range lines {
					seen++
					text := ruleTextOf(table.family, got[chain][i], func(set string) []string { return sets[set] })
					sameText(t, line, text)
					if other, ok := texts[text]; ok && other != line {
						t.Errorf("%q and %q both read %q", line, other, text)
					}
					texts[text] = line
				}
			}
		}
		if seen < 200 {
			t.Errorf("only %d rules were compared", seen)
		}
	})
}

// ruleText writes a rule of a table of family inet.
func ruleText(attrs []byte) string { return ruleTextOf(unix.NFPROTO_INET, attrs, nil) }

// Rules of our own, as differences show them, say which direction they ask for.
func TestOriginalDirection(t *testing.T) {
	s, err := Meant(ruleset(t, "[open.a]\nports = 80\nfrom = \"10.0.0.0/8\"\nto = [\"192.0.2.1\", \"2001:db8::1\"]\nconnections = 3\n"), time.Unix(2e9, 0))
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, name := range sortedKeys(s.chains) {
		for _, r := range s.chains[name].rules {
			fmt.Fprintln(&all, s.ruleText(r))
		}
	}
	for _, want := range []string{"ct original proto-dst @tcp_listed ", "ct original ip daddr != @open_a_to4 ", "ct status dnat ct original ip6 daddr @charged6 "} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("no %q in\n%s", want, all.String())
		}
	}
}
