package firewall

import (
	"fmt"
	"strings"
	"testing"

	"deadlight/rules"
)

// The kernel passes over the extension headers of IPv6 and judges by what stands
// behind: a policy cannot open them, and says so. Over IPv4 they are protocols
// like others.
func TestExtensionHeadersAreNoProtocols(t *testing.T) {
	w := newWire(t)
	for _, ext := range []rules.Protocol{0, 43, 44, 60} {
		behind := func(src string, inner rules.Protocol, port uint16) *packet {
			p := w.flow(inner, src, port)
			p.behind = &ext
			return p
		}
		opening := fmt.Sprintf("[open.a]\nprotocol = %d\n", ext)
		w.load(t, opening)
		w.expect(t,
			in(fmt.Sprintf("%v over IPv4", ext), behind(stranger4, 253, 0)),
			out(fmt.Sprintf("%v over IPv6", ext), behind(stranger6, 253, 0)))
		for src, want := range map[string]rules.Outcome{stranger4: rules.OutcomeOpen, stranger6: rules.OutcomeFiltered} {
			if d := ruleset(t, opening).Decide(w.flow(ext, src, 0).Packet); d.Outcome != want {
				t.Errorf("%v from %s: the model says %v", ext, src, d.Outcome)
			}
		}
		w.load(t, "[open.b]\nports = 80\n[open.c]\nprotocol = 253\n")
		w.expect(t,
			out(fmt.Sprintf("%v over IPv4 with an open port behind", ext), behind(stranger4, rules.TCP, 80)),
			in(fmt.Sprintf("an open protocol behind %v over IPv6", ext), behind(stranger6, 253, 0)),
			in(fmt.Sprintf("an open port behind %v over IPv6", ext), behind(stranger6, rules.TCP, 80)),
			out(fmt.Sprintf("a closed port behind %v over IPv6", ext), behind(stranger6, rules.TCP, 81)))
		w.load(t, "[open.d]\nprotocol = \"any\"\n")
		w.expect(t, in(fmt.Sprintf("%v in an opening of everything", ext), behind(stranger6, 253, 0)))
	}
}

// An authentication header is a protocol in both families: it is judged itself,
// and not what stands behind it.
func TestAuthenticationHeaders(t *testing.T) {
	w := newWire(t)
	ah := rules.AH
	for _, src := range []string{stranger4, stranger6} {
		behind := func(inner rules.Protocol, port uint16) *packet {
			p := w.flow(inner, src, port)
			p.behind = &ah
			return p
		}
		w.load(t, "[open.a]\nprotocol = \"ah\"\n")
		w.expect(t, in("ah", behind(rules.TCP, 81)), in("ah around ESP", behind(rules.ESP, 0)), out("what stands behind, alone", w.tcp(src, 81)))
		w.load(t, "[open.a]\nports = 80\n[open.b]\nprotocol = \"esp\"\n")
		w.expect(t, out("an open port behind", behind(rules.TCP, 80)), out("an open protocol behind", behind(rules.ESP, 0)), in("that port alone", w.tcp(src, 80)))
		w.load(t, "[open.a]\nports = 80\n[block.a]\nprotocol = \"ah\"\n[open.b]\nprotocol = \"any\"\n")
		w.expect(t, out("ah blocked", behind(rules.TCP, 80)), in("the rest not", w.flow(rules.ESP, src, 0)))
	}
}

// A list of both, long enough to be split, wherever a rule may name it.
func TestSplitSetsInTheKernel(t *testing.T) {
	var set strings.Builder
	set.WriteString("[set.long]\naddresses = [\n")
	for i := range 1100 { // single addresses, a length of prefixes, and ranges that are neither
		fmt.Fprintf(&set, "\"10.%d.%d.1\", \"11.%d.%d.0/25\", \"12.%d.%d.1-12.%[5]d.%d.9\", \"2001:db8:a:%[7]x::1\", \"2001:db8:b:%x::/64\", \"2001:db8:c:%x::1-2001:db8:c:%[9]x::9\",\n",
			i/256, i%256, i/256, i%256, i/256, i%256, i, 2*i, i)
	}
	set.WriteString("\"192.0.2.1\", \"192.0.2.2/31\", \"2001:db8::1\", \"2001:db8::2/127\"]\n")
	w := newWire(t)
	w.load(t, set.String()+`
[open.from]
ports = 1
from = "@long"
[open.except]
ports = 2
except = "@long"
[open.to]
ports = 3
to = "@long"
[open.both]
ports = 4
from = ["@long", "198.51.100.9"]
to = ["@long", "192.0.2.77"]
[open.any]
protocol = "any"
interfaces = "wg0"
from = "@long"
[block.bad]
ports = 5
from = "@long"
[open.rest]
ports = 5
`)
	held := []string{"10.0.0.1", "10.4.75.1", "11.0.0.0", "11.0.0.127", "11.4.75.5", "2001:db8:a:1::1", "2001:db8:b:0::1", "2001:db8:b:896::ffff", "12.0.0.1", "12.4.75.9", "2001:db8:c:1::9"}
	others := []string{"10.0.0.2", "10.4.76.1", "11.0.0.128", "11.4.76.5", "2001:db8:a:1::2", "2001:db8:b:897::1", "12.0.0.10", "12.4.75.0", "2001:db8:c:1::a"}
	for _, src := range held {
		w.expect(t, in("from "+src, w.tcp(src, 1)), out("except "+src, w.tcp(src, 2)), in("to us", w.tcp(src, 3)), in("from and to", w.tcp(src, 4)), out("blocked", w.tcp(src, 5)))
	}
	for _, src := range others {
		w.expect(t, out("not from "+src, w.tcp(src, 1)), in("not except "+src, w.tcp(src, 2)), out("only to us", w.tcp(src, 4)), in("not blocked", w.tcp(src, 5)))
	}
	printed := w.run("", "nft", "list", "table", "inet", "deadlight")
	for _, name := range []string{"set set_long_4 {", "set set_long_4_net25 {", "set set_long_4_hosts {", "set set_long_6 {", "set set_long_6_net64 {", "set set_long_6_hosts {", "ip saddr & 255.255.255.128 == @set_long_4_net25",
		"ip6 daddr & ffff:ffff:ffff:ffff:: != @set_long_6_net64", "size 2048"} {
		if !strings.Contains(printed, name) {
			t.Errorf("no %q in the kernel", name)
		}
	}
}
