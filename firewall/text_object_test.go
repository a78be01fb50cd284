package firewall

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const handMadeObjects = `
table inet objects {
	comment "a table"
	counter hits { comment "a counter" }
	limit slow { rate 3/minute burst 7 packets }
	limit volume { rate over 10 mbytes/second }
	quota some { over 20 mbytes }
	synproxy proxy { mss 1460; wscale 7; timestamp sack-perm; }
	set plain { type inet_service; size 100; elements = { 22, 80 }; comment "a set"; }
	set names { type ifname; flags interval; elements = { "eth0", "tun*", "br-*" } }
	set nets { type ipv4_addr; flags interval; policy memory; elements = { 10.0.0.0/8, 192.0.2.1-192.0.2.9, 198.51.100.7, 255.0.0.0/8 } }
	set nets6 { type ipv6_addr; flags interval; elements = { 2001:db8::/32, 2001:db9::1-2001:db9::7 } }
	set pairs { type ipv4_addr . inet_service; flags interval; elements = { 192.0.2.1 . 22, 10.0.0.0/8 . 80-90 } }
	set triple { type inet_proto . ipv6_addr . ifname; elements = { tcp . ::1 . "eth0" } }
	set kept { type ipv4_addr; flags timeout; timeout 1h; gc-interval 1m; elements = { 192.0.2.1 comment "why", 192.0.2.2 timeout 2h } }
	set counted { type ipv4_addr; size 100; flags dynamic; counter; elements = { 192.0.2.1 counter packets 0 bytes 0 } }
	map verdicts { type inet_service : verdict; flags interval; elements = { 20-30 : jump side, 80 : accept, 65000-65535 : drop } }
	map marks { type ether_addr : mark; elements = { 00:11:22:33:44:55 : 0x00000005 } }
	map tallies { type icmp_type : counter; elements = { echo-request : "hits" } }
	map rest { type ipv4_addr : verdict; elements = { * : drop, 192.0.2.1 : accept } }
	chain side { comment "a chain"
	}
	chain b1 { type filter hook input priority filter - 5; policy drop; }
	chain b2 { type nat hook postrouting priority srcnat; policy accept; }
	chain b3 { type route hook output priority mangle; policy accept; }
	chain b4 { type filter hook ingress devices = { "lo" } priority -500; policy accept; }
	chain b5 { type filter hook prerouting priority 7777; policy accept; }
	chain b6 { type filter hook prerouting priority raw + 10; policy accept; }
}
`

func loadText(t *testing.T, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "load.nft")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	nft(t, "-f", file)
}

// elementTexts gives our lines for a set.
func elementTexts(t *testing.T, c *Conn, table string, set []byte) []string {
	t.Helper()
	name := attrText(set, unix.NFTA_SET_NAME)
	q := attrString(attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table), unix.NFTA_SET_ELEM_LIST_SET, name)
	var els [][]byte
	if err := c.dump(unix.NFT_MSG_GETSETELEM, q, func(r reply) error {
		for _, e := range attributes(attrOf(r.attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
			els = append(els, bytes.Clone(e))
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	key := func(e []byte) []byte { return dataValue(e, unix.NFTA_SET_ELEM_KEY) }
	ends := func(e []byte) bool {
		return attrNumber(e, unix.NFTA_SET_ELEM_FLAGS)&unix.NFT_SET_ELEM_INTERVAL_END != 0
	}
	var out []string
	for _, e := range els {
		if ends(e) {
			continue
		}
		var end []byte
		for _, f := range els {
			if ends(f) && bytes.Compare(key(f), key(e)) > 0 && (end == nil || bytes.Compare(key(f), key(end)) < 0) {
				end = f
			}
		}
		out = append(out, elementText(set, e, end))
	}
	slices.Sort(out)
	return out
}

// expires is what runs down while we look.
var expires = regexp.MustCompile(` expires \S+`)

// Of each object the witness says what we say, word for word where it has one form.
func TestObjectTextIsThatOfNft(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		loadText(t, handMadeObjects)
		c := dial(t)
		const table = "objects"
		inet := func(typ, attr uint16) [][]byte { return dumped(t, c, unix.NFPROTO_INET, typ, attr, table) }
		listed := func(kind, name string) string {
			text := strings.Join(strings.Fields(nft(t, "-s", "list", kind, "inet", table, name)), " ")
			_, text, _ = strings.Cut(text, kind+" "+name+" { ")
			return strings.TrimSuffix(text, " } }")
		}
		for _, m := range inet(unix.NFT_MSG_GETCHAIN, unix.NFTA_CHAIN_TABLE) {
			name, got := attrText(m, unix.NFTA_CHAIN_NAME), chainText(m)
			want := strings.TrimSuffix(listed("chain", name), ";")
			want = strings.ReplaceAll(want, `devices = { "lo" }`, `device "lo"`)
			if name == "side" {
				want = `regular chain; comment "a chain"`
			}
			if got != want {
				t.Errorf("chain %s\n nft: %s\nours: %s", name, want, got)
			}
		}
		sets := 0
		for _, m := range inet(unix.NFT_MSG_GETSET, unix.NFTA_SET_TABLE) {
			sets++
			name, kind := attrText(m, unix.NFTA_SET_NAME), "set"
			if attrNumber(m, unix.NFTA_SET_FLAGS)&(unix.NFT_SET_MAP|unix.NFT_SET_OBJECT) != 0 {
				kind = "map"
			}
			want := listed(kind, name)
			head, body, _ := strings.Cut(want, " elements = { ")
			body = strings.TrimSuffix(strings.TrimSpace(body), " }")
			if name == "kept" {
				head += " flags timeout" // which nft leaves out beside a timeout
			}
			if got := setText(m); !sameWords(got, head) {
				t.Errorf("set %s\n nft: %s\nours: %s", name, head, got)
			}
			wanted := strings.Split(body, ", ")
			slices.Sort(wanted)
			got := elementTexts(t, c, table, m)
			for i := range got {
				got[i] = expires.ReplaceAllString(got[i], "")
			}
			for i := range wanted {
				wanted[i] = expires.ReplaceAllString(wanted[i], "")
			}
			if !slices.Equal(got, wanted) {
				t.Errorf("elements of %s\n nft: %q\nours: %q", name, wanted, got)
			}
		}
		if sets < 12 {
			t.Errorf("only %d sets were compared", sets)
		}
		for _, m := range inet(unix.NFT_MSG_GETOBJ, unix.NFTA_OBJ_TABLE) {
			name, got := attrText(m, unix.NFTA_OBJ_NAME), objectText(m)
			kind := objectName(attrNumber(m, unix.NFTA_OBJ_TYPE))
			if want := strings.TrimSpace(kind + " " + listed(kind, name)); !sameWords(got, want) {
				t.Errorf("object %s\n nft: %s\nours: %s", name, want, got)
			}
		}
		for _, m := range inet(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME) {
			if got, want := tableText(m), `no flags; comment "a table"`; got != want {
				t.Errorf("table: %s, want %s", got, want)
			}
		}
		nft(t, "add table inet objects { flags dormant; }")
		for _, m := range inet(unix.NFT_MSG_GETTABLE, unix.NFTA_TABLE_NAME) {
			if got, want := tableText(m), `flags dormant; comment "a table"`; got != want {
				t.Errorf("table: %s, want %s", got, want)
			}
		}
	})
}

// sameWords: nft writes the parts of a set on lines of their own, in its order.
func sameWords(a, b string) bool {
	words := func(s string) []string {
		w := strings.Fields(strings.ReplaceAll(s, ";", " "))
		slices.Sort(w)
		return w
	}
	return slices.Equal(words(a), words(b))
}

// What iptables-nft makes: matches and targets of xtables.
func TestRuleTextNamesExtensionsOfIptables(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		for _, args := range []string{
			"-A INPUT -m comment --comment hello -j ACCEPT",
			"-A INPUT -p tcp -m multiport --dports 22,80 -m conntrack --ctstate NEW -j DROP",
		} {
			if out, err := exec.Command("iptables-nft", strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("iptables-nft %s: %v %s", args, err, out)
			}
		}
		var all string
		for _, rules := range dumpedRules(t, dial(t), unix.NFPROTO_IPV4, "filter") {
			for _, m := range rules {
				all += ruleTextOf(unix.NFPROTO_IPV4, m, nil) + "\n"
			}
		}
		for _, want := range []string{`xt match comment "hello"`, `xt match "multiport" [rev 1 0x`, `xt match "conntrack" [rev 3 0x`, "drop\n", "accept\n"} {
			if !strings.Contains(all, want) {
				t.Errorf("no %s in\n%s", want, all)
			}
		}
	})
}

func expression(name string, data []byte) []byte {
	e := attrString(nil, unix.NFTA_EXPR_NAME, name)
	return nest(nil, unix.NFTA_LIST_ELEM, nest(e, unix.NFTA_EXPR_DATA, data))
}

func ruleOf(expressions ...[]byte) []byte {
	return nest(nil, unix.NFTA_RULE_EXPRESSIONS, bytes.Join(expressions, nil))
}

func loadMeta(key, reg uint32) []byte {
	return expression("meta", attr32(attr32(nil, unix.NFTA_META_KEY, key), unix.NFTA_META_DREG, reg))
}

func compare(reg, op uint32, val ...byte) []byte {
	d := attr32(attr32(nil, unix.NFTA_CMP_SREG, reg), unix.NFTA_CMP_OP, op)
	return expression("cmp", nest(d, unix.NFTA_CMP_DATA, attr(nil, unix.NFTA_DATA_VALUE, val)))
}

func verdict(code int32, chain string) []byte {
	v := attr32(nil, unix.NFTA_VERDICT_CODE, uint32(code))
	if chain != "" {
		v = attrString(v, unix.NFTA_VERDICT_CHAIN, chain)
	}
	d := attr32(nil, unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT)
	return expression("immediate", nest(d, unix.NFTA_IMMEDIATE_DATA, nest(nil, unix.NFTA_DATA_VERDICT, v)))
}

// Rules that nft cannot make, or not on every kernel.
func TestRuleTextLeavesNothingOut(t *testing.T) {
	two := func(a, b uint32) []byte { return attr(nil, uint16(a), []byte{0, byte(b)}) }
	for _, test := range []struct {
		name string
		rule []byte
		want string
	}{
		{"unknown expression", ruleOf(expression("teleport", []byte{1, 2, 3}), verdict(verdictAccept, "")), "[teleport 0x010203] accept"},
		{"known expression, unknown key", ruleOf(loadMeta(99, 1)), "[meta 0x0800020000000063" + "0800010000000001]"},
		{"a value that nothing uses", ruleOf(loadMeta(unix.NFT_META_MARK, 1), verdict(verdictDrop, "")), "[meta mark] drop"},
		{"a value that is overwritten", ruleOf(loadMeta(unix.NFT_META_MARK, 1), loadMeta(unix.NFT_META_L4PROTO, 1), compare(1, 0, 6)), "[meta mark] meta l4proto tcp"},
		{"nothing in the register", ruleOf(compare(3, unix.NFT_CMP_EQ, 1, 2)), "[register 3] == 0x0102"},
		{"a register that does not exist", ruleOf(loadMeta(unix.NFT_META_MARK, 77)), "[meta mark in register 77]"},
		{"unknown comparison", ruleOf(loadMeta(unix.NFT_META_L4PROTO, 1), compare(1, 9, 6)), "meta l4proto op9 tcp"},
		{"unknown verdict", ruleOf(verdict(99, "")), "verdict 99"},
		{"a chain with a clever name", ruleOf(verdict(unix.NFT_JUMP, "x accept")), `jump "x accept"`},
		{"a chain with a colour", ruleOf(verdict(unix.NFT_GOTO, "\x1b[31m")), `goto "\x1b[31m"`},
		{"a log with a line feed", ruleOf(expression("log", attrString(nil, unix.NFTA_LOG_PREFIX, "a\nb\u202e"))), `log prefix "a\nb\u202e"`},
		{"queue", ruleOf(expression("queue", two(unix.NFTA_QUEUE_NUM, 1))), "queue to 1"},
		{"queues", ruleOf(expression("queue", append(append(two(unix.NFTA_QUEUE_NUM, 1), two(unix.NFTA_QUEUE_TOTAL, 3)...), two(unix.NFTA_QUEUE_FLAGS, 1)...))), "queue flags bypass to 1-3"},
		{"verdict queue", ruleOf(verdict(5<<16|3, "")), "queue to 5"},
		{"break", ruleOf(verdict(unix.NFT_BREAK, "")), "break"},
		{"a name that goes on after its end", ruleOf(loadMeta(unix.NFT_META_IIFNAME, 1), compare(1, unix.NFT_CMP_EQ, 'l', 'o', 0, 'x')), "iifname 0x6c6f0078"},
		{"no expressions", nil, ""},
	} {
		if got := ruleText(test.rule); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
	}
}

// checkLine is what every text holds to, whatever the bytes.
func checkLine(t *testing.T, what, s string) {
	t.Helper()
	if len(s) > maxText+3 {
		t.Errorf("%s: %d bytes", what, len(s))
	}
	if !utf8.ValidString(s) {
		t.Errorf("%s: not UTF-8: %q", what, s)
	}
	for _, c := range s {
		if !unicode.IsPrint(c) {
			t.Errorf("%s: %U in %q", what, c, s)
		}
	}
}

func expressionNames() []string {
	return []string{"meta", "payload", "cmp", "range", "bitwise", "byteorder", "lookup", "immediate", "ct", "fib", "rt", "socket", "osf", "xfrm",
		"exthdr", "numgen", "hash", "dynset", "objref", "nat", "masq", "redir", "tproxy", "queue", "dup", "fwd", "synproxy", "flow_offload", "match", "target", "log",
		"reject", "limit", "quota", "connlimit", "\x1b[31m"}
}

// Random rules of expressions that are known by name, with attributes that are
// near to right: what comes of a compiler that is broken, or of a later kernel.
func TestTextOfRandomObjects(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	names := expressionNames()
	for range 20000 {
		var list [][]byte
		for range 1 + rnd.IntN(6) {
			var d []byte
			for typ := range uint16(12) {
				switch rnd.IntN(6) {
				case 0, 1, 2:
					d = attr32(d, typ+1, uint32(rnd.IntN(24)))
				case 3:
					val := make([]byte, rnd.IntN(20))
					for i := range val {
						val[i] = byte(rnd.Uint32())
					}
					d = nest(d, typ+1, attr(nil, unix.NFTA_DATA_VALUE, val))
				case 4:
					d = attr(d, typ+1, []byte{byte(rnd.Uint32())})
				}
			}
			list = append(list, expression(names[rnd.IntN(len(names))], d))
		}
		checkLine(t, "rule", ruleTextOf([]byte{unix.NFPROTO_INET, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_NETDEV}[rnd.IntN(4)], ruleOf(list...), nil))
		key, end := make([]byte, rnd.IntN(66)), make([]byte, rnd.IntN(66))
		for i := range key {
			key[i] = byte(rnd.Uint32())
		}
		typ := uint32(rnd.IntN(48))
		for range rnd.IntN(4) {
			typ = typ<<6 | uint32(rnd.IntN(64))
		}
		checkLine(t, "key", keyText(typ, key, nil))
		checkLine(t, "interval", keyText(typ, key, end))
		checkLine(t, "interval", keyText(typ, key, key))
	}
}

func FuzzRuleText(f *testing.F) {
	rs := ruleset(f, everything)
	e, err := encode(&rs.Table, time.Unix(1<<30, 0))
	if err != nil {
		f.Fatal(err)
	}
	for i, m := range e.small() {
		if i%7 == 0 {
			f.Add(m.attrs, byte(unix.NFPROTO_INET))
		}
	}
	for _, name := range expressionNames() {
		var d []byte
		for t := range uint16(12) {
			d = attr32(d, t+1, uint32(t%4))
		}
		f.Add(ruleOf(loadMeta(unix.NFT_META_L4PROTO, 1), expression(name, d), expression(name, nil), expression(name, attr(nil, 1, []byte{1}))), byte(unix.NFPROTO_IPV4))
	}
	f.Fuzz(func(t *testing.T, b []byte, family byte) {
		checkLine(t, "rule", ruleTextOf(family, b, func(string) []string { return []string{"x"} }))
		checkLine(t, "rule of these expressions", ruleTextOf(family, ruleOf(b), nil))
		checkLine(t, "chain", chainTextOf(family, b))
		checkLine(t, "set", setText(b))
		checkLine(t, "element", elementText(b, b, nil))
		checkLine(t, "element", elementText(b, b, b))
		checkLine(t, "object", objectText(b))
		checkLine(t, "table", tableText(b))
	})
}
