package firewall

import (
	"fmt"
	"math/rand"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// writer makes up rulesets of which nothing is left to chance but the making.
type writer struct {
	*rand.Rand
	family string
	chains []string // jumped to, later ones only: no loops
}

func (w *writer) pick(of ...string) string { return of[w.Intn(len(of))] }

func (w *writer) port() string { return w.pick("21", "22", "23", "24", "25") }

func (w *writer) ports() string {
	return w.pick(w.port(), "!= "+w.port(), "22-24", "!= 22-24", "{ 21, 23-24 }", "!= { 22, 25 }", "< 23", ">= 24", "@ports", "!= @ports", "@few")
}

func (w *writer) match() string {
	four := []string{
		"ip saddr 10.0.0.0/8", "ip saddr != 10.0.0.0/9", "ip saddr 198.51.100.64/26", "ip saddr { 10.1.2.3, 198.51.100.0/25 }",
		"ip saddr 10.1.0.0-10.1.2.255", "ip saddr != 10.1.2.3-10.1.2.9", "ip daddr 192.0.2.1", "ip ttl < 64", "ip ttl 64",
		"ct original ip saddr 10.0.0.0/8", "ip protocol udp", "ip protocol { tcp, icmp }", "ip saddr . tcp dport { 10.0.0.0/8 . 22-24, 198.51.100.66 . 21 }",
		"ip saddr . meta l4proto . th dport { 10.1.2.3 . tcp . 22, 198.51.100.66 . udp . 23 }", "icmp type echo-request", "icmp type != echo-request",
	}
	six := []string{
		"ip6 saddr 2001:db8:6::/48", "ip6 saddr != 2001:db8::/64", "ip6 hoplimit > 64", "ip6 nexthdr udp", "icmpv6 type echo-request",
		"ip6 saddr { 2001:db8::66, 2001:db8:6::/64 }", "ip6 daddr 2001:db8::1", "ip6 saddr . udp dport { 2001:db8:6::7 . 21-22, 2001:db8::66 . 24 }",
	}
	both := []string{
		"tcp dport " + w.ports(), "udp dport " + w.ports(), "th dport " + w.ports(), "tcp dport " + w.ports(), "udp dport " + w.ports(),
		"meta l4proto tcp", "meta l4proto { tcp, udp }", "meta l4proto != udp", "iifname \"eth0\"", "iifname \"eth*\"", "iifname != \"eth0\"",
		"iifname { \"lo\", \"wg0\" }", "iifname != { \"lo\", \"docker0\" }", "iif eth0", "iif != lo", "meta protocol ip6",
		"tcp flags syn", "tcp flags & (fin|syn|rst|ack) == syn", "tcp flags ack", "ct state new", "ct state established,related", "ct state invalid",
		"ct state != new", "ct direction original", "meta l4proto tcp ct original proto-dst " + w.port(), "ct status dnat", "ct mark 0", "meta mark 1", "meta mark & 2 == 2",
		"meta mark != 0", "fib daddr type local", "fib daddr type { broadcast, multicast }", "fib saddr type local", "fib saddr . iif oif exists",
		"oifname \"docker0\"", "tcp sport 1-1023", "udp sport >= 20000", "meta pkttype host",
		"ct original protocol tcp", "tcp option maxseg exists", "meta iifname . th dport { eth0 . 22, lo . 23 }",
	}
	if w.family != "ip6" {
		both = append(both, four...)
	}
	if w.family != "ip" {
		both = append(both, six...)
	}
	if w.family == "inet" {
		both = append(both, "meta nfproto ipv4")
	}
	return w.pick(both...)
}

func (w *writer) verdict() string {
	out := []string{"accept", "drop", "drop", "return", "reject", "counter", "counter accept", "meta mark set 1", "meta mark set meta mark or 2", "ct mark set 5",
		"log accept", "continue", "tcp dport vmap { 21 : accept, 22-23 : drop }", "udp dport vmap { 24 : drop, 25 : accept }", "meta l4proto tcp reject with tcp reset",
		"tcp dport set 24", "limit rate 10000/second accept", "limit rate over 10000/second drop"}
	for _, c := range w.chains {
		out = append(out, "jump "+c, "goto "+c, fmt.Sprintf("tcp dport vmap { %s : jump %s, 25 : goto %s }", w.pick("21", "22-24"), c, c))
	}
	return w.pick(out...)
}

// conflicts: nft refuses a rule that it can see is never true.
func conflicts(rule string) bool {
	for _, group := range [][]string{
		{"tcp dport", "tcp sport", "tcp flags", "tcp option", "udp dport", "udp sport", "icmp type", "icmpv6 type", "protocol", "nexthdr", "l4proto"},
		{"ip saddr", "ip daddr", "ip ttl", "ip protocol", "ip6 ", "icmp type", "icmpv6 type", "nfproto", "meta protocol"},
		{"ct state", "ct original", "fib", "iif", "meta mark"},
	} {
		found := 0
		for _, word := range group {
			found += strings.Count(rule, word)
		}
		if found > 1 {
			return true
		}
	}
	return false
}

func (w *writer) rule() string {
	for {
		var out []string
		for range w.Intn(3) {
			out = append(out, w.match())
		}
		out = append(out, w.verdict())
		if s := strings.Join(out, " "); len(out) < 2 || !conflicts(s) {
			return s
		}
	}
}

func (w *writer) table(name string, priority func(hook string) int) string {
	var b strings.Builder
	w.family = w.pick("inet", "inet", "ip", "ip6")
	fmt.Fprintf(&b, "table %s %s {\n", w.family, name)
	b.WriteString("set ports {\ntype inet_service\nflags interval\nelements = { 20-22, 25 }\n}\n")
	b.WriteString("set few {\ntype inet_service\nelements = { 21, 23 }\n}\n")
	w.chains = nil
	chain := func(title, head string) {
		fmt.Fprintf(&b, "chain %s {\n%s", title, head)
		for range 1 + w.Intn(5) {
			b.WriteString(w.rule() + "\n")
		}
		b.WriteString("}\n")
	}
	for i := range 3 {
		title := fmt.Sprintf("side%d", i)
		chain(title, "")
		w.chains = append(w.chains, title)
	}
	for i := range 1 + w.Intn(2) {
		hook := w.pick("prerouting", "input", "input")
		chain(fmt.Sprintf("base%d", i), fmt.Sprintf("type filter hook %s priority %d; policy %s;\n", hook, priority(hook), w.pick("accept", "accept", "accept", "drop")))
	}
	if w.Intn(3) == 0 {
		fmt.Fprintf(&b, "chain nat {\ntype nat hook prerouting priority %d; policy accept;\n", -100+w.Intn(20))
		fmt.Fprintf(&b, "tcp dport %s redirect to :%s\nudp dport %s redirect to :%s\n}\n", w.port(), w.port(), w.port(), w.port())
	}
	b.WriteString("}\n")
	return b.String()
}

func (w *writer) packet(l *lab) rules.Packet {
	proto := []rules.Protocol{rules.TCP, rules.TCP, rules.UDP, rules.UDP, rules.ICMPv4}[w.Intn(5)]
	src := w.pick(outsider, friend, "10.200.0.1", "198.51.100.7", sixOutsider, sixFriend, "2001:db8:6:1::1")
	if proto == rules.ICMPv4 && netip.MustParseAddr(src).Is6() {
		proto = rules.ICMPv6
	}
	p := l.to(proto, uint16(20+w.Intn(7)), src)
	p.HopLimit = uint8(60 + w.Intn(10))
	return p
}

// Random rulesets and random packets: the kernel says what is right.
func TestWalkAgreesWithTheKernel(t *testing.T) {
	const seeds, rulesets, packets = 4, 12, 10
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				l := newLab(t)
				w := &writer{Rand: rand.New(rand.NewSource(int64(seed)))}
				judged := map[Verdict]int{}
				for range rulesets {
					used := map[string]bool{}
					priority := func(hook string) int {
						for {
							n := []int{-300, -250, -150, -120, -50, 0, 10, 50, 150}[w.Intn(9)]
							if key := fmt.Sprint(hook, n); !used[key] {
								used[key] = true
								return n
							}
						}
					}
					text := w.table("one", priority) + w.table("two", priority)
					l.load(text)
					for range packets {
						p := w.packet(l)
						j := l.walk(p)
						judged[j.Verdict]++
						if j.Verdict == WalkUnknown {
							// What stands in a header beyond what a packet is described by.
							if by := j.By.String(); !strings.Contains(by, "option") && !strings.Contains(by, "@th") {
								t.Errorf("%+v: unknown\n%s\n%s", p, tell(j), text)
							}
							continue
						}
						if got := l.kernel(p); got != j.Verdict {
							t.Fatalf("%+v: walk says %s, the kernel did %s\n%s\n%s", p, j.Verdict, got, tell(j), text)
						}
					}
					for _, family := range []string{"inet", "ip", "ip6"} {
						for _, name := range []string{"one", "two"} {
							if strings.Contains(text, "table "+family+" "+name+" {") {
								nft(t, "delete", "table", family, name)
							}
						}
					}
				}
				if judged[WalkUnknown]*5 > rulesets*packets {
					t.Errorf("too much is unknown: %v", judged)
				}
				t.Logf("packets by verdict: %v", judged)
			})
		})
	}
}

// oneAnswer is a set that holds the same element whatever the key.
type oneAnswer []byte

func (a oneAnswer) element(*liveTable, *liveSet, []byte) ([]byte, error) { return a, nil }

func (a oneAnswer) allElements(*liveTable, *liveSet) ([][]byte, error) { return [][]byte{a}, nil }

// No bytes that a kernel might send may bring the walk down.
func FuzzWalk(f *testing.F) {
	expr := func(name string, data []byte) []byte {
		return nest(nil, unix.NFTA_LIST_ELEM, nest(attrString(nil, unix.NFTA_EXPR_NAME, name), unix.NFTA_EXPR_DATA, data))
	}
	load := attr32(attr32(nil, unix.NFTA_META_DREG, 1), unix.NFTA_META_KEY, unix.NFT_META_L4PROTO)
	equal := nest(attr32(attr32(nil, unix.NFTA_CMP_SREG, 1), unix.NFTA_CMP_OP, 0), unix.NFTA_CMP_DATA, attr(nil, unix.NFTA_DATA_VALUE, []byte{6}))
	verdict := nest(attr32(nil, unix.NFTA_IMMEDIATE_DREG, 0), unix.NFTA_IMMEDIATE_DATA,
		nest(nil, unix.NFTA_DATA_VERDICT, attrString(attr32(nil, unix.NFTA_VERDICT_CODE, 0xfffffffd), unix.NFTA_VERDICT_CHAIN, "c")))
	f.Add("", append(append(expr("meta", load), expr("cmp", equal)...), expr("immediate", verdict)...), []byte("element"))
	names := []string{"meta", "payload", "cmp", "range", "bitwise", "byteorder", "lookup", "immediate", "ct", "fib", "exthdr", "reject", "limit",
		"dynset", "objref", "nat", "redir", "masq", "notrack", "queue", "match", "target", "numgen", "socket"}
	for _, name := range names {
		f.Add(name, attr32(attr32(attr32(attr32(nil, 1, 1), 2, 2), 3, 3), 4, 4), attr(nil, 2, []byte{1, 2, 3, 4}))
	}
	f.Fuzz(func(t *testing.T, name string, data, el []byte) {
		table := &liveTable{family: unix.NFPROTO_INET, title: "t", rules: map[string][]*liveRule{}, sets: map[string]*liveSet{}, objects: map[liveObject][]byte{}}
		for _, typ := range []string{"filter", "nat"} {
			chain := attrString(nil, unix.NFTA_CHAIN_NAME, "c")
			chain = attrString(chain, unix.NFTA_CHAIN_TYPE, typ)
			table.takeChain(nest(chain, unix.NFTA_CHAIN_HOOK, attr32(attr32(nil, unix.NFTA_HOOK_HOOKNUM, 0), unix.NFTA_HOOK_PRIORITY, 0)))
		}
		table.takeChain(data)
		table.takeSet(data)
		table.takeObject(data)
		table.sets[""] = &liveSet{keyLen: 4}
		table.takeRule(data)
		exprs := expressions(data)
		if name != "" {
			exprs = append(exprs, liveExpr{name, data}, liveExpr{"cmp", data}, liveExpr{name, el}, liveExpr{"lookup", data})
		}
		table.rules["c"] = append(table.rules["c"], &liveRule{exprs: exprs}, &liveRule{exprs: expressions(el)})
		for _, p := range []rules.Packet{
			{},
			{In: "eth0", Src: netip.MustParseAddr(outsider), Dst: labAddress(true), Protocol: rules.TCP, DstPort: 22},
			{In: "lo", Src: netip.MustParseAddr(sixOutsider), Dst: labAddress(false), Protocol: rules.UDP, DstPort: 22, Flow: rules.ReplyFlow},
		} {
			w := newWalker(&liveRules{tables: []*liveTable{table}}, &hostView{}, p, oneAnswer(el))
			w.budget = 1000
			j := w.run()
			_, first := Compare(rules.Decision{}, j)
			if first != nil {
				_ = first.String()
			}
		}
	})
}
