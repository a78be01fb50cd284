package firewall

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// effect shows what keys of the language do to packets. It stands for a key of
// another kind of rule too where both are tried.
type effect struct {
	name string
	keys []string
	test func(t *testing.T)
}

func effects() []effect {
	return []effect{
		{"input", []string{"default.input"}, testInput},
		{"published", []string{"default.published", "published.interfaces"}, testPublished},
		{"output", []string{"default.output"}, testOutput},
		{"egress", []string{"egress.*.ports", "egress.*.protocol", "egress.*.service", "egress.*.to", "egress.*.interfaces", "egress.*.family"}, testEgress},
		{"owner", []string{"egress.*.user", "egress.*.group"}, testOwner},
		{"forward", []string{"default.forward"}, testForward},
		{"established", []string{"default.established"}, testEstablished},
		{"enforce", []string{"default.enforce"}, testEnforce},
		{"knocks", []string{"log.knocks"}, testKnocks},
		{"ports", []string{"open.*.ports", "open.*.protocol", "open.*.service", "service.*.ports", "service.*.protocol"}, testPorts},
		{"any", []string{"open.*.protocol", "block.*.protocol"}, testAny},
		{"addresses", []string{"open.*.from", "open.*.except", "open.*.to", "open.*.family", "set.*.addresses"}, testAddresses},
		{"interfaces", []string{"open.*.interfaces", "block.*.interfaces"}, testInterfaces},
		{"block", []string{"block.*.from", "block.*.except", "block.*.to", "block.*.family", "block.*.ports", "block.*.protocol", "block.*.service"}, testBlock},
		{"rate per source", []string{"open.*.rate.burst", "open.*.rate.limit"}, testRate},
		{"rate per rule", []string{"open.*.rate", "open.*.rate.per"}, testRatePerRule},
		{"rates survive", []string{"open.*.rate"}, testRatesSurvive},
		{"a full meter", []string{"open.*.rate"}, testFullMeter},
		{"trusted and left", []string{"default.published", "open.*.protocol"}, testTrustedWhilePublished},
		{"connections", []string{"open.*.connections"}, testConnections},
		{"expires", []string{"open.*.expires", "block.*.expires", "egress.*.expires"}, testExpires},
		{"echo", []string{"icmp.echo", "icmp.echo.limit", "icmp.echo.burst", "icmp.echo.per"}, testEcho},
		{"dhcp", []string{"dhcp.client"}, testDHCP},
		{"log", []string{"open.*.log", "block.*.log", "egress.*.log", "log.dropped", "log.dropped.limit", "log.dropped.burst", "log.prefix", "log.group"}, testLog},
		{"files", []string{"set.*.files", "set.*.optional", "include", "open.*.override", "block.*.override", "egress.*.override", "set.*.override", "service.*.override"}, testFiles},
		{"words", []string{
			"version", "open.*.comment", "block.*.comment", "egress.*.comment", "verify.vantage", "verify.thorough",
			"failsafe.ports", "failsafe.protocol", "failsafe.service", "failsafe.from", "failsafe.interfaces",
			"expect.*.from", "expect.*.to", "expect.*.in", "expect.*.port", "expect.*.state",
		}, testWords}, // not in packets: what the other commands go by
	}
}

// Every key of the language does something, and a test shows what.
func TestEveryKeyHasAnEffect(t *testing.T) {
	var shown []string
	for _, e := range effects() {
		shown = append(shown, e.keys...)
	}
	for _, key := range rules.Keys() {
		if !slices.Contains(shown, key) {
			t.Errorf("no test shows the effect of %s", key)
		}
	}
	for _, key := range shown {
		if !slices.Contains(rules.Keys(), key) {
			t.Errorf("%s is no key of the language", key)
		}
	}
}

func TestEffects(t *testing.T) {
	for _, e := range effects() {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			e.test(t)
		})
	}
}

// load puts a policy in force.
func (w *wire) load(t *testing.T, text string) {
	t.Helper()
	w.apply(ruleset(t, text))
}

// sight is what a test wants to see of a packet.
type sight struct {
	what string
	in   bool
	p    *packet
}

func in(what string, p *packet) sight  { return sight{what, true, p} }
func out(what string, p *packet) sight { return sight{what, false, p} }

// expect sends packets in turn and says of which the fate is not as expected.
func (w *wire) expect(t *testing.T, list ...sight) {
	t.Helper()
	packets := make([]*packet, len(list))
	for i, s := range list {
		packets[i] = s.p
	}
	for i, through := range w.deliver(packets...) {
		if through != list[i].in {
			t.Errorf("%s: got through %t, want %t (%s)", list[i].what, through, list[i].in, list[i].p)
		}
	}
}

// aimed makes the first packet of a flow from src to the host.
func aimed(link, src string, proto rules.Protocol, sport, dport uint16) *packet {
	a := netip.MustParseAddr(src)
	p := &packet{Packet: rules.Packet{In: link, Src: a, Dst: host4, Protocol: proto, SrcPort: sport, DstPort: dport}}
	if a.Is6() {
		p.Dst = host6
	}
	if proto == rules.TCP {
		p.flags = syn
	}
	return p
}

// flow makes the first packet of a new flow to the host, by eth0.
func (w *wire) flow(proto rules.Protocol, src string, port uint16) *packet {
	w.port++
	return aimed("eth0", src, proto, 20000+w.port, port)
}

func (w *wire) tcp(src string, port uint16) *packet { return w.flow(rules.TCP, src, port) }
func (w *wire) udp(src string, port uint16) *packet { return w.flow(rules.UDP, src, port) }

func (w *wire) ping(src string) *packet {
	p := w.flow(rules.ICMPv4, src, 0)
	p.ICMPType = 8
	if p.Src.Is6() {
		p.Protocol, p.ICMPType = rules.ICMPv6, 128
	}
	return p
}

func (p *packet) by(link string) *packet { p.In = link; return p }
func (p *packet) at(dst string) *packet  { p.Dst = netip.MustParseAddr(dst); return p }

// Whom the tests send as. A friend is in the sources of rules, a stranger never.
const (
	friend4   = "10.0.0.5"
	friend6   = "2001:db8:f::5"
	stranger4 = "198.51.100.9"
	stranger6 = "2001:db8:5::9"
)

// answered gives what the host sends back for p before it answers a ping that
// follows it.
func (w *wire) answered(p *packet) []answer {
	w.Helper()
	e := w.listen("eth0") // a new one, that has heard of nothing before
	ping := w.ping("198.18.0.1")
	w.send(p, ping)
	var all []answer
	e.await("echo reply", func(a answer) bool {
		if a.Protocol == rules.ICMPv4 && a.ICMPType == 0 && a.Dst == ping.Src {
			return true
		}
		if a.Dst == p.Src {
			all = append(all, a)
		}
		return false
	})
	return all
}

func testInput(t *testing.T) {
	w := newWire(t)
	for _, src := range []string{stranger4, stranger6} {
		w.load(t, "[default]\ninput = \"drop\"\n[open.web]\nports = 80\n")
		w.expect(t, in("a listed port", w.tcp(src, 80)), out("an unlisted port", w.tcp(src, 81)))
		for _, p := range []*packet{w.tcp(src, 81), w.udp(src, 81), w.flow(rules.SCTP, src, 81), w.flow(rules.ESP, src, 0)} {
			if a := w.answered(p); len(a) > 0 {
				t.Errorf("drop: %s was answered: %+v", p, a)
			}
		}
		w.load(t, "[default]\ninput = \"reject\"\n[open.web]\nports = 80\n[block.bad]\nfrom = [\"203.0.113.1\", \"2001:db8:bad::1\"]\n")
		p := w.tcp(src, 81)
		if a := w.answered(p); len(a) != 1 || !a[0].answers(p) || a[0].flags != rst|ack {
			t.Errorf("reject: %s should draw a reset, not %+v", p, a)
		}
		for _, p := range []*packet{w.udp(src, 81), w.flow(rules.SCTP, src, 81), w.flow(rules.ESP, src, 0)} {
			// RFC 1812 5.2.7.1 and RFC 4443 3.1: administratively prohibited.
			want := [2]byte{3, 13}
			if p.Src.Is6() {
				want = [2]byte{1, 1}
			}
			if a := w.answered(p); len(a) != 1 || a[0].ICMPType != want[0] || a[0].code != want[1] {
				t.Errorf("reject: %s should draw an error %d, not %+v", p, want, a)
			}
		}
		w.expect(t, in("a listed port", w.tcp(src, 80)), out("an unlisted port", w.tcp(src, 81)))
	}
	p := w.tcp("203.0.113.1", 80)
	if a := w.answered(p); len(a) > 0 {
		t.Errorf("a block under reject was answered: %+v", a)
	}
}

// containers makes a world in which docker0 and pod0 lead to container networks,
// to which port 8080 and 8081 of the host are published.
func containers(t *testing.T) *wire {
	w := newWire(t, "eth0", "docker0", "pod0")
	w.forwarding()
	for prefix, link := range map[string]string{"172.17.0.0/16": "docker0", "fd17::/64": "docker0", "172.18.0.0/16": "pod0"} {
		if err := w.Route(netip.MustParsePrefix(prefix), link); err != nil {
			t.Fatal(err)
		}
	}
	w.script(`
		table ip nat {
			chain pre {
				type nat hook prerouting priority -100;
				iifname "eth0" tcp dport { 8080, 8081 } dnat to 172.17.0.2:80
			}
		}
		table ip6 nat {
			chain pre {
				type nat hook prerouting priority -100;
				iifname "eth0" tcp dport { 8080, 8081 } dnat to [fd17::2]:80
			}
		}`)
	return w
}

// forwarding makes the host a router.
func (w *wire) forwarding() {
	w.Helper()
	w.inHost(func() error {
		for _, path := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := os.WriteFile("/proc/sys/net/"+path, []byte("1"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

func testPublished(t *testing.T) {
	w := containers(t)
	const listed = "[open.web]\nports = 8080\n"
	routed := func(src, dst string) *packet { return w.tcp(src, 80).at(dst) }
	w.load(t, listed)
	w.expect(t,
		in("a listed port, published", w.tcp(stranger4, 8080)),
		in("a listed port, published, IPv6", w.tcp(stranger6, 8080)),
		out("an unlisted port, published", w.tcp(stranger4, 8081)),
		out("an unlisted port, published, IPv6", w.tcp(stranger6, 8081)),
		out("a container, by routing", routed(stranger4, "172.17.0.2")),
		out("a container, by routing, IPv6", routed(stranger6, "fd17::2")),
		in("no container network by default", routed(stranger4, "172.18.0.2")),
		in("a container to the outside", routed("172.17.0.2", "203.0.113.9").by("docker0")),
		in("a container to another", routed("172.17.0.2", "172.17.0.3").by("docker0")),
		out("a container to an unlisted port of the host", w.tcp("172.17.0.2", 22).by("docker0")),
	)
	w.load(t, listed+"[published]\ninterfaces = \"pod*\"\n")
	w.expect(t,
		in("no container network any more", routed(stranger4, "172.17.0.2")),
		out("a container network by its pattern", routed(stranger4, "172.18.0.2")),
		out("an unlisted port, published", w.tcp(stranger4, 8081)),
	)
	w.load(t, "[default]\npublished = \"ignore\"\n"+listed)
	w.expect(t,
		in("ignore: a listed port", w.tcp(stranger4, 8080)),
		in("ignore: an unlisted port", w.tcp(stranger4, 8081)),
		in("ignore: an unlisted port, IPv6", w.tcp(stranger6, 8081)),
		in("ignore: a container, by routing", routed(stranger4, "172.17.0.2")),
		in("ignore: a container, by routing, IPv6", routed(stranger6, "fd17::2")),
		out("ignore: an unlisted port of the host itself", w.tcp(stranger4, 22)),
		out("ignore: the same over IPv6 and UDP", w.udp(stranger6, 8081)),
	)
}

// An opening of every protocol that is not for everyone must not let in, by the
// way that is left to published ports, whom it does not admit.
func testTrustedWhilePublished(t *testing.T) {
	w := newWire(t, "eth0", "wg0")
	const ignore = "[default]\npublished = \"ignore\"\n[open.vpn]\nprotocol = \"any\"\n"
	for _, c := range []struct {
		rule    string
		in, out *packet
	}{
		{`except = "198.51.100.0/24"`, w.tcp(friend4, 22), w.tcp(stranger4, 22)},
		{`to = ["192.0.2.1"]`, w.udp(stranger4, 22), w.udp(stranger4, 22).at("192.0.2.2")},
		{`interfaces = "wg*"`, w.tcp(stranger4, 22).by("wg0"), w.tcp(stranger4, 22)},
		{`family = "ipv6"`, w.tcp(stranger6, 22), w.tcp(stranger4, 22)},
		{"interfaces = \"wg0\"\nexpires = 2001-01-01T00:00:00Z\n[open.web]\nports = 80", w.tcp(stranger4, 80), w.tcp(stranger4, 22).by("wg0")},
	} {
		w.load(t, ignore+c.rule+"\n")
		w.expect(t, in(c.rule, c.in), out(c.rule, c.out))
	}
	w.load(t, ignore+"rate = { limit = \"1/hour\", burst = 2 }\n")
	w.expect(t,
		in("first", w.tcp(stranger4, 22)), in("second", w.tcp(stranger4, 22)), out("third", w.tcp(stranger4, 22)),
		in("first of ESP", w.flow(rules.ESP, friend4, 0)), in("second of UDP", w.udp(friend4, 22)), out("third of SCTP", w.flow(rules.SCTP, friend4, 22)))
}

// emit makes the host send a packet, as a user and a group, and tells whether it
// left; false for ok says that this user is not known here.
func (w *wire) emit(p *packet, uid, gid int) (left, ok bool) {
	w.Helper()
	before := w.read().counters["left"]
	ok = true
	w.inHost(func() error {
		// Of this thread only, which ends with fn.
		for _, set := range []struct {
			id   int
			call func(int) (int, error)
		}{{gid, unix.SetfsgidRetGid}, {uid, unix.SetfsuidRetUid}} {
			_, _ = set.call(set.id) // a failure shows in the next line only
			if now, _ := set.call(-1); now != set.id {
				ok = false
				return nil
			}
		}
		family, to := unix.AF_INET, sockaddr(p.Dst, 0)
		if p.Dst.Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(p.Protocol))
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, sockaddr(p.Src, 0)); err != nil {
			return err
		}
		if err := unix.Sendto(fd, p.transport(), 0, to); err != nil && err != unix.EPERM {
			return err // EPERM is what a drop on output says
		}
		return nil
	})
	return w.read().counters["left"] > before, ok
}

// leaving makes the first packet of a flow of the host.
func (w *wire) leaving(proto rules.Protocol, dst string, port uint16) *packet {
	w.port++
	p := aimed("eth0", dst, proto, 20000+w.port, port)
	p.Src, p.Dst = p.Dst, p.Src
	return p
}

// departs checks whether what root sends leaves.
func (w *wire) departs(t *testing.T, what string, want bool, p *packet) {
	t.Helper()
	if left, _ := w.emit(p, 0, 0); left != want {
		t.Errorf("%s: left %t, want %t (%s)", what, left, want, p)
	}
}

func testOutput(t *testing.T) {
	w := newWire(t)
	e := w.listen("eth0")
	for _, far := range []string{stranger4, stranger6} {
		w.load(t, "")
		w.departs(t, "accept", true, w.leaving(rules.TCP, far, 80))
		for _, action := range []string{"drop", "reject"} {
			w.load(t, "[default]\noutput = \""+action+"\"\n[open.echo]\nports = 7\nprotocol = \"udp\"\n[egress.web]\nports = 443\n")
			w.departs(t, action+": listed", true, w.leaving(rules.TCP, far, 443))
			w.departs(t, action+": unlisted", false, w.leaving(rules.TCP, far, 80))
			w.departs(t, action+": another protocol", false, w.leaving(rules.UDP, far, 443))
			dhcp := w.leaving(rules.UDP, far, 67)
			dhcp.SrcPort = 68
			if dhcp.Dst.Is6() {
				dhcp.SrcPort, dhcp.DstPort = 546, 547
			}
			w.departs(t, action+": the DHCP client", true, dhcp)
			// A pong is a reply, and so is the error that a closed port draws.
			w.send(w.ping(far), w.udp(far, 7))
			e.await("echo reply", func(a answer) bool {
				return a.Dst.String() == far && (a.Protocol == rules.ICMPv4 && a.ICMPType == 0 || a.Protocol == rules.ICMPv6 && a.ICMPType == 129)
			})
			e.await("port unreachable", func(a answer) bool {
				return a.Dst.String() == far && (a.Protocol == rules.ICMPv4 && a.ICMPType == 3 || a.Protocol == rules.ICMPv6 && a.ICMPType == 1)
			})
			err := w.connect(far, 80)
			if refused := err == unix.ECONNREFUSED; refused != (action == "reject") {
				t.Errorf("%s: connect says %v", action, err)
			}
		}
	}
}

// connect begins a TCP connection from the host and gives what it knows at once.
func (w *wire) connect(dst string, port uint16) (result error) {
	w.inHost(func() error {
		family, a := unix.AF_INET, netip.MustParseAddr(dst)
		if a.Is6() {
			family = unix.AF_INET6
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if result = unix.Connect(fd, sockaddr(a, port)); result == unix.EINPROGRESS {
			n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			if err != nil {
				return err
			}
			if n != 0 {
				result = unix.Errno(n)
			}
		}
		return nil
	})
	return result
}

func testEgress(t *testing.T) {
	w := newWire(t, "eth0", "wg0")
	if err := w.Route(netip.MustParsePrefix("10.8.0.0/16"), "wg0"); err != nil {
		t.Fatal(err)
	}
	w.load(t, `
[default]
output = "drop"
[egress.dns]
ports = 53
protocol = ["udp", "tcp"]
to = ["@resolvers", "2001:db8:53::53"]
[set.resolvers]
addresses = "203.0.113.53"
[egress.time]
service = "ntp"
[egress.high]
ports = "6000-6010"
family = "ipv6"
[egress.tunnel]
protocol = "any"
interfaces = "wg*"
[egress.ipsec]
protocol = "esp"
to = "203.0.113.60-203.0.113.62"
[egress.signalling]
ports = 3868
protocol = "sctp"
`)
	for _, c := range []struct {
		what  string
		leave bool
		p     *packet
	}{
		{"a port of udp", true, w.leaving(rules.UDP, "203.0.113.53", 53)},
		{"a port of tcp", true, w.leaving(rules.TCP, "203.0.113.53", 53)},
		{"to, IPv6", true, w.leaving(rules.UDP, "2001:db8:53::53", 53)},
		{"not in to", false, w.leaving(rules.UDP, "203.0.113.54", 53)},
		{"not in to, IPv6", false, w.leaving(rules.UDP, "2001:db8:53::54", 53)},
		{"another port", false, w.leaving(rules.UDP, "203.0.113.53", 54)},
		{"a service", true, w.leaving(rules.UDP, stranger4, 123)},
		{"a service, its other protocol", false, w.leaving(rules.TCP, stranger4, 124)},
		{"a range", true, w.leaving(rules.TCP, stranger6, 6010)},
		{"beside a range", false, w.leaving(rules.TCP, stranger6, 6011)},
		{"the other family", false, w.leaving(rules.TCP, stranger4, 6010)},
		{"any by an interface", true, w.leaving(rules.TCP, "10.8.0.9", 999)},
		{"any by an interface, ESP", true, w.leaving(rules.ESP, "10.8.0.9", 0)},
		{"by another interface", false, w.leaving(rules.TCP, "10.9.0.9", 999)},
		{"ESP", true, w.leaving(rules.ESP, "203.0.113.62", 0)},
		{"ESP to others", false, w.leaving(rules.ESP, "203.0.113.63", 0)},
		{"AH", false, w.leaving(rules.AH, "203.0.113.62", 0)},
		{"SCTP", true, w.leaving(rules.SCTP, stranger4, 3868)},
		{"SCTP, another port", false, w.leaving(rules.SCTP, stranger4, 3869)},
	} {
		w.departs(t, c.what, c.leave, c.p)
	}
}

func testOwner(t *testing.T) {
	w := newWire(t)
	const nobody = 65534
	for _, c := range []struct {
		rule           string
		uid, gid       int
		leave, another bool // who is named, and with a number of the other kind only
	}{
		{"user = \"root\"", 0, 0, true, false},
		{"user = 0", 0, nobody, true, false},
		{"user = 65534", 0, 0, false, false},
		{"user = \"nobody\"", nobody, 0, true, false},
		{"user = 65534", nobody, nobody, true, false},
		{"user = \"root\"", nobody, 0, false, false},
		{"group = \"root\"", 0, 0, true, false},
		{"group = 0", nobody, 0, true, false},
		{"group = 65534", 0, 0, false, false},
		{"group = 65534", 0, nobody, true, false},
		{"user = \"root\"\ngroup = \"root\"", 0, 0, true, false},
		{"user = \"root\"\ngroup = \"root\"", 0, nobody, false, false},
		{"user = \"root\"\ngroup = \"root\"", nobody, 0, false, false},
	} {
		w.load(t, "[default]\noutput = \"drop\"\n[egress.web]\nports = 443\n"+c.rule+"\n")
		for _, far := range []string{stranger4, stranger6} {
			// Where only root is mapped, root alone is tried.
			if left, ok := w.emit(w.leaving(rules.TCP, far, 443), c.uid, c.gid); ok && left != c.leave {
				t.Errorf("%q, sent by %d:%d: left %t, want %t", c.rule, c.uid, c.gid, left, c.leave)
			}
			if left, ok := w.emit(w.leaving(rules.TCP, far, 444), c.uid, c.gid); ok && left {
				t.Errorf("%q, sent by %d:%d: another port left", c.rule, c.uid, c.gid)
			}
		}
	}
}

func testForward(t *testing.T) {
	w := containers(t)
	transit := func(src, dst string) *packet { return w.tcp(src, 80).at(dst) }
	for _, c := range []struct {
		action string
		pass   bool
	}{{"ignore", true}, {"drop", false}} {
		w.load(t, "[default]\nforward = \""+c.action+"\"\n[open.web]\nports = 8080\n")
		w.expect(t,
			sight{c.action + ": transit", c.pass, transit(stranger4, "172.18.0.2")},
			sight{c.action + ": transit, IPv6", c.pass, transit("fd17::2", stranger6).by("docker0")},
			sight{c.action + ": from a container", c.pass, transit("172.17.0.2", "203.0.113.9").by("docker0")},
			in(c.action+": a listed publish", w.tcp(stranger4, 8080)),
			in(c.action+": a listed publish, IPv6", w.tcp(stranger6, 8080)),
			out(c.action+": an unlisted publish", w.tcp(stranger4, 8081)),
			in(c.action+": the host itself", w.ping(stranger4)),
		)
	}
}

// strangersFlow begins a flow with an echo server of the host and gives a later
// packet of it.
func (w *wire) strangersFlow(e *ear, p *packet) *packet {
	w.Helper()
	w.send(p)
	wanted := byte(0)
	if p.Protocol == rules.TCP {
		wanted = syn | ack
	}
	a := e.await("answer of the server", func(a answer) bool { return a.answers(p) && a.flags == wanted })
	later := *p
	later.Flow = rules.StrangersFlow
	if p.Protocol == rules.TCP {
		later.flags, later.seq, later.ack = ack, p.seq+1, a.seq+1
		confirm := later
		w.send(&confirm)
	}
	return &later
}

// echoServers listen on ports of the host.
func (w *wire) echoServers(tcp, udp []uint16) {
	w.Helper()
	l, err := verify.Listen(w.Host, tcp, udp)
	if err != nil {
		w.Fatalf("%v", err)
	}
	w.Cleanup(func() { l.Close() })
}

func testEstablished(t *testing.T) {
	const open = "[open.web]\nports = 7\nprotocol = [\"tcp\", \"udp\"]\n"
	for _, c := range []struct {
		word  string
		lives bool
	}{{"recheck", false}, {"keep", true}} {
		w := newWire(t)
		e := w.listen("eth0")
		w.echoServers([]uint16{7}, []uint16{7})
		head := "[default]\nestablished = \"" + c.word + "\"\n"
		w.load(t, head+open)
		var list []sight
		for _, src := range []string{stranger4, stranger6} {
			for _, p := range []*packet{w.tcp(src, 7), w.udp(src, 7)} {
				list = append(list, sight{c.word + ": a flow whose port was closed", c.lives, w.strangersFlow(e, p)})
			}
			own := w.udp(src, 0)
			own.SrcPort = 53
			w.inHost(func() error { return speak(own) })
			list = append(list, in(c.word+": an answer to the host", own), out(c.word+": a new flow", w.tcp(src, 7)), out(c.word+": a new flow", w.udp(src, 7)))
		}
		w.load(t, head)
		w.expect(t, list...)
	}
}

func testEnforce(t *testing.T) {
	w := newWire(t)
	const rest = "[open.web]\nports = 80\nfrom = \"10.0.0.0/8\"\n[block.bad]\nfrom = [\"203.0.113.0/24\", \"2001:db8:bad::/48\"]\n"
	packets := func(in bool) []sight {
		return []sight{
			{"an unlisted port", in, w.tcp(stranger4, 22)}, {"an unlisted port, IPv6", in, w.udp(stranger6, 22)},
			{"an unlisted protocol", in, w.flow(rules.ESP, stranger4, 0)}, {"not in from", in, w.tcp(stranger4, 80)},
			{"blocked", in, w.ping("203.0.113.7")}, {"blocked, IPv6", in, w.tcp("2001:db8:bad::1", 80)},
		}
	}
	w.load(t, "[default]\nenforce = true\n"+rest)
	w.expect(t, packets(false)...)
	for _, input := range []string{"drop", "reject"} {
		w.run("", "nft", "delete", "table", "inet", "deadlight")
		w.load(t, "[default]\nenforce = false\nforward = \"drop\"\noutput = \"drop\"\ninput = \""+input+"\"\n"+rest)
		w.expect(t, packets(true)...)
		w.departs(t, "output", true, w.leaving(rules.TCP, stranger4, 80))
		n := w.readTable("deadlight").counters
		if got := n["c_dropped"] + n["c_rejected"]; got != 4 {
			t.Errorf("%s: %d packets counted that would be refused, want 4: %v", input, got, n)
		}
		if n["block_bad"] != 2 {
			t.Errorf("%s: %d packets counted that would be blocked, want 2", input, n["block_bad"])
		}
		if n["c_egress_dropped"] == 0 {
			t.Errorf("%s: nothing counted that would not leave", input)
		}
	}
}

func testPorts(t *testing.T) {
	w := newWire(t)
	w.load(t, `
[open.web]
ports = [80, "6000-6010", "6011-6020"]
[open.dns]
ports = 53
protocol = "udp"
[open.both]
ports = 443
protocol = ["tcp", "udp"]
[open.diameter]
ports = "3868-3870"
protocol = "sctp"
[open.ssh]
service = "ssh"
[open.names]
service = "domain"
protocol = "tcp"
from = "10.0.0.0/8"
[open.own]
service = "own"
[service.own]
ports = [9100, "9400-9410"]
protocol = ["udp", "tcp"]
[service.plain]
ports = 9999
[open.plain]
service = ["plain"]
`)
	for _, src := range []string{friend4, stranger6} {
		w.expect(t,
			in("a port", w.tcp(src, 80)), out("below it", w.tcp(src, 79)), out("above it", w.tcp(src, 81)), out("its twin of UDP", w.udp(src, 80)),
			out("below a range", w.tcp(src, 5999)), in("its first", w.tcp(src, 6000)), in("where two meet", w.tcp(src, 6010)),
			in("where two meet", w.tcp(src, 6011)), in("its last", w.tcp(src, 6020)), out("above a range", w.tcp(src, 6021)),
			in("UDP", w.udp(src, 53)), in("both", w.tcp(src, 443)), in("both", w.udp(src, 443)), out("neither SCTP", w.flow(rules.SCTP, src, 443)),
			in("SCTP", w.flow(rules.SCTP, src, 3868)), in("SCTP, last", w.flow(rules.SCTP, src, 3870)), out("SCTP, beside", w.flow(rules.SCTP, src, 3871)),
			out("SCTP's port of TCP", w.tcp(src, 3868)),
			in("ssh", w.tcp(src, 22)), sight{"domain, narrowed", src == friend4, w.tcp(src, 53)},
			in("own", w.udp(src, 9100)), in("own", w.tcp(src, 9410)), out("not own", w.tcp(src, 9411)),
			in("tcp by default", w.tcp(src, 9999)), out("not udp by default", w.udp(src, 9999)),
		)
	}
}

func testAny(t *testing.T) {
	w := newWire(t, "eth0", "wg0")
	w.load(t, `
[open.vpn]
protocol = "any"
interfaces = "wg0"
[open.ipsec]
protocol = ["esp", 253]
from = ["10.0.0.0/8", "2001:db8:f::/48"]
[block.any]
protocol = "any"
from = "10.66.0.0/16"
[block.esp]
protocol = ["esp"]
from = "10.67.0.0/16"
`)
	all := func(src string) []*packet {
		stamp := w.ping(src)
		stamp.ICMPType = 13
		if stamp.Src.Is6() {
			stamp.ICMPType = 139
		}
		return []*packet{w.tcp(src, 22), w.udp(src, 9), w.flow(rules.SCTP, src, 7), w.flow(rules.ESP, src, 0), w.flow(253, src, 0), w.flow(rules.GRE, src, 0), stamp}
	}
	for _, src := range []string{stranger4, stranger6} {
		for _, p := range all(src) {
			w.expect(t, in("any by its interface", p.by("wg0")))
		}
		for _, p := range all(src) {
			w.expect(t, out("any by another", p))
		}
	}
	for _, src := range []string{friend4, friend6} {
		w.expect(t, in("esp", w.flow(rules.ESP, src, 0)), in("253", w.flow(253, src, 0)), out("252", w.flow(252, src, 0)), out("gre", w.flow(rules.GRE, src, 0)))
	}
	for _, p := range all("10.66.0.1") {
		w.expect(t, out("any blocked", p.by("wg0")))
	}
	w.expect(t, out("any blocks echo", w.ping("10.66.0.1").by("wg0")),
		out("esp blocked", w.flow(rules.ESP, "10.67.0.1", 0).by("wg0")), in("the rest not", w.flow(253, "10.67.0.1", 0).by("wg0")))
}

func testAddresses(t *testing.T) {
	w := newWire(t)
	w.load(t, `
[open.vendor]
ports = 5000
from = ["10.0.0.0/24", "10.0.2.5-10.0.2.9", "@more", "2001:db8:f::/64"]
except = ["10.0.0.66", "10.0.0.128/25", "@evil"]
to = ["192.0.2.1", "2001:db8::1-2001:db8::2"]
[open.all-but]
ports = 5001
except = "10.0.0.0/8"
[open.four]
ports = 5002
family = "ipv4"
[open.six]
ports = 5003
family = "ipv6"
[set.more]
addresses = ["10.0.3.1", "10.0.4.0/31", "2001:db8:f:1::7"]
[set.evil]
addresses = ["10.0.4.1", "2001:db8:f::66"]
`)
	w.expect(t,
		in("in a network", w.tcp("10.0.0.0", 5000)), in("its last", w.tcp("10.0.0.127", 5000)), out("excepted network", w.tcp("10.0.0.128", 5000)),
		out("excepted network", w.tcp("10.0.0.255", 5000)), out("excepted address", w.tcp("10.0.0.66", 5000)), out("beside the network", w.tcp("10.0.1.0", 5000)),
		out("beside the range", w.tcp("10.0.2.4", 5000)), in("first of the range", w.tcp("10.0.2.5", 5000)), in("last of the range", w.tcp("10.0.2.9", 5000)),
		out("beside the range", w.tcp("10.0.2.10", 5000)), in("of a set", w.tcp("10.0.3.1", 5000)), in("of a set", w.tcp("10.0.4.0", 5000)),
		out("of an excepted set", w.tcp("10.0.4.1", 5000)), in("IPv6", w.tcp("2001:db8:f::1", 5000)), in("IPv6 of a set", w.tcp("2001:db8:f:1::7", 5000)),
		out("IPv6 excepted", w.tcp("2001:db8:f::66", 5000)), out("IPv6 beside", w.tcp("2001:db8:f:1::8", 5000)),
		out("another local address", w.tcp("10.0.0.1", 5000).at("192.0.2.2")), in("another local address", w.tcp("2001:db8:f::1", 5000).at("2001:db8::2")),
		out("another local address", w.tcp("2001:db8:f::1", 5000).at("2001:db8::3")),
		in("everyone but", w.tcp(stranger4, 5001)), out("whom it excepts", w.tcp(friend4, 5001)), in("everyone but, IPv6", w.tcp(stranger6, 5001)),
		in("ipv4", w.tcp(stranger4, 5002)), out("not ipv6", w.tcp(stranger6, 5002)), in("ipv6", w.tcp(stranger6, 5003)), out("not ipv4", w.tcp(stranger4, 5003)),
	)
}

func testInterfaces(t *testing.T) {
	w := newWire(t, "eth0", "eth1", "tun7", "tunnel0")
	w.load(t, `
[open.exact]
ports = 80
interfaces = "eth1"
[open.wild]
ports = 81
interfaces = ["tun*", "eth0", "absent0"]
[open.all]
ports = [82, 83]
[block.exact]
ports = 82
interfaces = "eth1"
[block.wild]
ports = 83
interfaces = ["tun*"]
`)
	for port, links := range map[uint16]string{80: "eth1", 81: "tun7 tunnel0 eth0", 82: "eth0 tun7 tunnel0", 83: "eth0 eth1"} {
		for _, link := range []string{"eth0", "eth1", "tun7", "tunnel0"} {
			want := slices.Contains(strings.Fields(links), link)
			w.expect(t, sight{"by " + link, want, w.tcp(stranger4, port).by(link)}, sight{"by " + link, want, w.tcp(stranger6, port).by(link)})
		}
	}
}

func testBlock(t *testing.T) {
	w := newWire(t)
	w.load(t, openedForBlocks)
	own := w.udp("10.1.0.5", 0)
	own.SrcPort = 53
	w.inHost(func() error { return speak(own) })
	w.load(t, openedForBlocks+`
[block.scanners]
from = ["10.1.0.0/16", "@evil"]
except = ["10.1.0.9", "2001:db8:bad::9"]
[set.evil]
addresses = "2001:db8:bad::/48"
[block.port]
ports = [25, "7000-7010"]
protocol = ["tcp", "udp"]
from = "10.2.0.0/16"
[block.service]
service = "smtp"
from = "10.3.0.0/16"
[block.family]
ports = 80
family = "ipv6"
[block.local]
ports = 81
to = "192.0.2.2"
`)
	unreachable := w.ping("10.1.0.6")
	unreachable.ICMPType, unreachable.body = 3, make([]byte, 28)
	w.expect(t,
		out("a port", w.tcp("10.1.0.5", 22)), out("UDP", w.udp("10.1.0.5", 22)), out("ESP", w.flow(rules.ESP, "10.1.0.5", 0)), out("echo", w.ping("10.1.0.5")),
		out("a set", w.tcp("2001:db8:bad::1", 22)), out("echo of a set", w.ping("2001:db8:bad::1")),
		in("excepted", w.tcp("10.1.0.9", 22)), in("excepted", w.ping("10.1.0.9")), in("excepted of a set", w.ping("2001:db8:bad::9")),
		in("an answer to the host", own), in("an error", unreachable), in("others", w.tcp("10.4.0.5", 22)),
		out("a port of tcp", w.tcp("10.2.0.5", 25)), out("a port of udp", w.udp("10.2.0.5", 7010)), in("another port", w.tcp("10.2.0.5", 7011)),
		in("SCTP's", w.flow(rules.SCTP, "10.2.0.5", 25)), in("echo", w.ping("10.2.0.5")), in("others", w.tcp("10.3.0.5", 7000)),
		out("a service", w.tcp("10.3.0.5", 25)), in("beside a service", w.tcp("10.3.0.5", 26)),
		out("a family", w.tcp(stranger6, 80)), in("the other family", w.tcp(stranger4, 80)),
		out("a local address", w.tcp(stranger4, 81).at("192.0.2.2")), in("another", w.tcp(stranger4, 81)),
	)
}

const openedForBlocks = "[open.all]\nprotocol = \"any\"\n"

// another gives different sources of a family.
func another(v4 bool, i int) string {
	if v4 {
		return fmt.Sprintf("198.51.100.%d", 10+i)
	}
	return fmt.Sprintf("2001:db8:5:%x::1", 10+i)
}

// another64 gives addresses of one /64, which differ from its first bit on.
func another64(i uint16) string { return fmt.Sprintf("2001:db8:5:0:%x::1", i*0x6000) }

// timesIn sends n new flows of a source and counts those that got through.
func (w *wire) timesIn(n int, one func() *packet) int {
	w.Helper()
	packets := make([]*packet, n)
	for i := range packets {
		packets[i] = one()
	}
	got := 0
	for _, through := range w.deliver(packets...) {
		if through {
			got++
		}
	}
	return got
}

func (w *wire) wantIn(t *testing.T, what string, want, n int, one func() *packet) {
	t.Helper()
	if got := w.timesIn(n, one); got != want {
		t.Errorf("%s: %d of %d got through, want %d", what, got, n, want)
	}
}

func testRate(t *testing.T) {
	w := newWire(t)
	e := w.listen("eth0")
	w.echoServers(nil, []uint16{22})
	w.load(t, "[open.ssh]\nports = 22\nprotocol = [\"tcp\", \"udp\"]\nrate = { limit = \"1/hour\", burst = 4 }\n"+
		"[open.quick]\nports = 23\nrate = { limit = \"2/second\", burst = 1 }\n[open.usual]\nports = 24\nrate = { limit = \"1/day\" }\n")
	first := w.strangersFlow(e, w.udp(stranger4, 22))
	w.wantIn(t, "one source", 3, 6, func() *packet { return w.tcp(stranger4, 22) })
	w.expect(t, in("a later packet of a flow, over the rate", first))
	w.wantIn(t, "another source", 4, 6, func() *packet { return w.tcp(another(true, 1), 22) })
	w.wantIn(t, "a /64", 4, 6, func() *packet { return w.tcp(another64(w.port), 22) })
	w.wantIn(t, "another /64", 4, 6, func() *packet { return w.tcp(another(false, 1), 22) })
	w.wantIn(t, "the default burst", 5, 8, func() *packet { return w.tcp(stranger4, 24) })
	// 2/second: a token is back after half a second, and not before.
	start := time.Now()
	got := 0
	for got < 4 && time.Since(start) < 10*time.Second {
		got += w.timesIn(1, func() *packet { return w.tcp(stranger4, 23) })
	}
	if most := 1 + int(time.Since(start)/(500*time.Millisecond)); got < 4 || got > most {
		t.Errorf("2/second: %d got through in %s, want 4 to %d", got, time.Since(start), most)
	}
}

func testRatePerRule(t *testing.T) {
	w := newWire(t)
	w.load(t, "[open.ssh]\nports = [22, 23]\nrate = { limit = \"1/hour\", burst = 4, per = \"rule\" }\n"+
		"[open.each]\nports = 24\nrate = { limit = \"1/hour\", burst = 2, per = \"source\" }\n")
	i := 0
	w.wantIn(t, "all sources together", 4, 10, func() *packet { i++; return w.tcp(another(i%2 == 0, i), uint16(22+i%2)) })
	i = 0
	w.wantIn(t, "each source", 10, 10, func() *packet { i++; return w.tcp(another(i%2 == 0, i), 24) })
}

// An apply that does not change a rule does not forget what it has counted.
func testRatesSurvive(t *testing.T) {
	w := newWire(t)
	const limits = "[open.each]\nports = 22\nrate = { limit = \"1/hour\", burst = 3 }\n" +
		"[open.all]\nports = 23\nrate = { limit = \"1/hour\", burst = 3, per = \"rule\" }\n"
	w.load(t, limits)
	w.wantIn(t, "per source", 3, 5, func() *packet { return w.tcp(stranger4, 22) })
	w.wantIn(t, "per rule", 3, 5, func() *packet { return w.tcp(stranger4, 23) })
	w.load(t, limits+"[open.web]\nports = [22, 80]\nfrom = \"10.0.0.0/8\"\n")
	w.wantIn(t, "per source, after an apply", 0, 5, func() *packet { return w.tcp(stranger4, 22) })
	w.wantIn(t, "per rule, after an apply", 0, 5, func() *packet { return w.tcp(another(true, 1), 23) })
	w.wantIn(t, "another source, after an apply", 3, 5, func() *packet { return w.tcp(another(true, 1), 22) })
	w.load(t, strings.ReplaceAll(limits, "burst = 3", "burst = 4"))
	w.wantIn(t, "per source, of another rate", 4, 6, func() *packet { return w.tcp(stranger4, 22) })
	w.wantIn(t, "per rule, of another rate", 4, 6, func() *packet { return w.tcp(stranger4, 23) })
}

// Who fills the meter keeps others out, but does not get in himself.
func testFullMeter(t *testing.T) {
	w := newWire(t)
	w.load(t, "[open.ssh]\nports = 22\nrate = { limit = \"1/day\", burst = 2 }\n")
	w.expect(t, in("a source that was there first", w.tcp(stranger4, 22)))
	p := w.tcp("10.0.0.0", 22)
	w.flood(rules.MeterSize, func(i int) *packet {
		next := *p
		next.Src = netip.AddrFrom4([4]byte{10, 1 + byte(i>>16), byte(i >> 8), byte(i)})
		return &next
	})
	w.expect(t,
		in("a source that the meter knows", w.tcp(stranger4, 22)), out("the same, over its rate", w.tcp(stranger4, 22)),
		out("a new source", w.tcp(another(true, 1), 22)), in("a new source of the other family", w.tcp(stranger6, 22)))
}

func testConnections(t *testing.T) {
	w := newWire(t)
	w.echoServers(nil, []uint16{7})
	w.load(t, "[open.echo]\nports = 7\nprotocol = \"udp\"\nconnections = 3\n")
	w.wantIn(t, "one source", 3, 6, func() *packet { return w.udp(stranger4, 7) })
	w.wantIn(t, "another source", 3, 6, func() *packet { return w.udp(another(true, 1), 7) })
	w.wantIn(t, "a /64", 3, 6, func() *packet { return w.udp(another64(w.port), 7) })
	w.wantIn(t, "another /64", 3, 6, func() *packet { return w.udp(another(false, 1), 7) })
	w.load(t, "[open.echo]\nports = 7\nprotocol = \"udp\"\nconnections = 3\nrate = { limit = \"1/hour\", burst = 2 }\n")
	w.wantIn(t, "both limits", 2, 6, func() *packet { return w.udp(another(true, 2), 7) })
}

// When the time has come the kernel alone ends a rule, whatever was applied
// meanwhile.
func testExpires(t *testing.T) {
	w := newWire(t)
	e := w.listen("eth0")
	w.echoServers(nil, []uint16{80})
	end := time.Now().Add(5 * time.Second).Truncate(time.Millisecond)
	at := end.UTC().Format("2006-01-02T15:04:05.000Z07:00")
	text := "[default]\noutput = \"drop\"\n[open.web]\nports = 80\nprotocol = [\"tcp\", \"udp\"]\nexpires = " + at +
		"\n[open.always]\nports = [80, 81]\nfrom = \"10.0.0.0/8\"\n[block.bad]\nports = 81\nexpires = " + at + "\n[egress.dns]\nports = 53\nexpires = " + at +
		"\n[open.past]\nports = 82\nexpires = 2001-01-01T00:00:00+01:00\n"
	before := func() {
		w.expect(t, in("before", w.tcp(stranger4, 80)), in("before, IPv6", w.tcp(stranger6, 80)), out("blocked before", w.tcp(friend4, 81)), out("long ago", w.tcp(stranger4, 82)))
		w.departs(t, "before", true, w.leaving(rules.TCP, stranger4, 53))
		if time.Now().After(end) {
			t.Fatal("this machine is too slow to look before the end")
		}
	}
	w.load(t, text)
	before()
	flow := w.strangersFlow(e, w.udp(stranger4, 80))
	w.load(t, text)
	w.load(t, text+"[open.other]\nports = 83\n")
	before()
	w.expect(t, in("a flow", flow))
	for {
		sent := time.Now()
		through := w.deliver(w.tcp(stranger4, 80))[0]
		switch now := time.Now(); {
		case through && sent.After(end.Add(time.Second)):
			t.Fatalf("open %s after the end", sent.Sub(end))
		case !through && now.Before(end.Add(-10*time.Millisecond)):
			t.Fatalf("closed %s before the end", end.Sub(now))
		case through:
			continue
		}
		break
	}
	time.Sleep(time.Until(end.Add(time.Second)))
	after := func() {
		w.expect(t, out("after", w.tcp(stranger4, 80)), out("after, IPv6", w.tcp(stranger6, 80)), out("a flow after", flow),
			in("another rule for the port", w.tcp(friend4, 80)), in("blocked no more", w.tcp(friend4, 81)))
		w.departs(t, "after", false, w.leaving(rules.TCP, stranger4, 53))
	}
	after()
	w.load(t, text)
	after()
}

func testEcho(t *testing.T) {
	w := newWire(t)
	w.load(t, "[icmp]\necho = true\n")
	w.expect(t, in("true", w.ping(stranger4)), in("true, IPv6", w.ping(stranger6)))
	w.load(t, "[icmp]\necho = false\n")
	w.expect(t, out("false", w.ping(stranger4)), out("false, IPv6", w.ping(stranger6)))
	w.load(t, "[icmp]\necho = { limit = \"1/hour\", burst = 3 }\n")
	w.wantIn(t, "one source", 3, 6, func() *packet { return w.ping(stranger4) })
	w.wantIn(t, "another source", 3, 6, func() *packet { return w.ping(another(true, 1)) })
	w.wantIn(t, "a /64", 3, 6, func() *packet { return w.ping(another64(w.port)) })
	w.load(t, "[icmp]\necho = { limit = \"1/hour\", burst = 3, per = \"rule\" }\n")
	i := 0
	w.wantIn(t, "all together", 3, 8, func() *packet { i++; return w.ping(another(i%2 == 0, i)) })
	w.load(t, "[icmp]\necho = { limit = \"2/second\", burst = 1 }\n")
	start := time.Now()
	got := 0
	for time.Since(start) < 1100*time.Millisecond {
		got += w.timesIn(1, func() *packet { return w.ping(stranger4) })
	}
	if most := 1 + int(time.Since(start)/(500*time.Millisecond)); got < 2 || got > most {
		t.Errorf("2/second: %d got through in %s, want 2 to %d", got, time.Since(start), most)
	}
}

func testDHCP(t *testing.T) {
	w := newWire(t, "eth0", "eth1")
	offer := func(link string) []*packet {
		four := aimed(link, "198.51.100.67", rules.UDP, 67, 68)
		all := aimed(link, "198.51.100.67", rules.UDP, 67, 68).at("255.255.255.255")
		six := aimed(link, "fe80::67", rules.UDP, 547, 546)
		mac := w.Link(link).Dst
		six.Dst = netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
		return []*packet{four, all, six}
	}
	for value, links := range map[string]string{"true": "eth0 eth1", "false": "", `"eth1"`: "eth1", `["eth*", "absent0"]`: "eth0 eth1", `["eth0"]`: "eth0"} {
		w.load(t, "[dhcp]\nclient = "+value+"\n")
		for _, link := range []string{"eth0", "eth1"} {
			for _, p := range offer(link) {
				w.expect(t, sight{value, slices.Contains(strings.Fields(links), link), p})
			}
		}
		far := aimed("eth1", stranger6, rules.UDP, 547, 546)
		wrong := aimed("eth1", stranger4, rules.UDP, 68, 68)
		w.expect(t, out("from far away", far), out("from another port", wrong))
	}
}

// logLines hears what the kernel logs to a group (NFULNL, linux/netfilter/nfnetlink_log.h).
type logLines struct {
	w *wire
	c *netlink.Conn
}

func (w *wire) logLines(group uint16) *logLines {
	w.Helper()
	l := &logLines{w: w}
	w.inHost(func() error {
		var err error
		if l.c, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return err
		}
		const (
			config             = 4<<8 | 1 // NFNL_SUBSYS_ULOG, NFULNL_MSG_CONFIG
			command, mode      = 1, 2
			timeout, threshold = 4, 5
		)
		attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: command, Data: []byte{1}},             // bind
			{Type: mode, Data: []byte{0, 0, 0, 0, 1, 0}}, // no payload
			{Type: timeout, Data: []byte{0, 0, 0, 1}},    // of 1/100 s
			{Type: threshold, Data: []byte{0, 0, 0, 1}},  // each line at once
		})
		if err != nil {
			return err
		}
		data := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, group)
		_, err = l.c.Execute(netlink.Message{
			Header: netlink.Header{Type: config, Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(data, attrs...),
		})
		return err
	})
	w.Cleanup(func() { l.c.Close() })
	return l
}

// until gives the prefixes of the lines up to one that begins with last.
func (l *logLines) until(last string) []string {
	l.w.Helper()
	const packetMessage, prefix = 4 << 8, 10
	var out []string
	if err := l.c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		l.w.Fatalf("%v", err)
	}
	for {
		messages, err := l.c.Receive()
		if err != nil {
			l.w.Fatalf("no line %q after %q: %v", last, out, err)
		}
		for _, m := range messages {
			if m.Header.Type != packetMessage {
				continue
			}
			attrs, err := netlink.UnmarshalAttributes(m.Data[4:])
			if err != nil {
				l.w.Fatalf("%v", err)
			}
			for _, a := range attrs {
				if a.Type == prefix {
					line := string(bytes.TrimRight(a.Data, "\x00"))
					if line == last {
						return out
					}
					out = append(out, line)
				}
			}
		}
	}
}

func testLog(t *testing.T) {
	w := newWire(t)
	l := w.logLines(5)
	// The last line of each batch is a port of its own.
	const rest = "[log]\ngroup = 5\n%s\n[open.end]\nports = 9\nlog = true\n" +
		"[open.web]\nports = 80\nlog = true\n[open.quiet]\nports = 81\nlog = false\n[open.slow]\nports = 82\nlog = true\nrate = { limit = \"1/hour\", burst = 1 }\n" +
		"[block.bad]\nfrom = \"10.66.0.0/16\"\nlog = true\n[block.still]\nfrom = \"10.67.0.0/16\"\n" +
		"[default]\noutput = \"drop\"\n[egress.dns]\nports = 53\nlog = true\n"
	want := func(what string, want []string, packets ...*packet) {
		t.Helper()
		w.send(append(packets, w.tcp(friend4, 9))...)
		if got := l.until(want[0] + " open end: "); !slices.Equal(got, want[1:]) {
			t.Errorf("%s: the log says %q, want %q", what, got, want[1:])
		}
	}
	w.load(t, fmt.Sprintf(rest, "prefix = \"dl\""))
	want("rules", []string{"dl", "dl open web: ", "dl open slow: ", "dl over the limit slow: ", "dl block bad: "},
		w.tcp(friend4, 80), w.tcp(friend4, 81), w.tcp(friend4, 82), w.tcp(friend4, 82), w.tcp("10.66.0.1", 80), w.tcp("10.67.0.1", 80), w.tcp(friend4, 83))
	w.departs(t, "a logged flow", true, w.leaving(rules.TCP, stranger4, 53))
	want("egress", []string{"dl", "dl egress dns: "}, w.tcp(friend4, 81))
	w.load(t, fmt.Sprintf(rest, "dropped = true"))
	want("dropped", []string{"deadlight", "deadlight drop: ", "deadlight drop: "}, w.tcp(friend4, 83), w.udp(stranger6, 84), w.tcp(friend4, 81))
	w.load(t, fmt.Sprintf(rest, "dropped = { limit = \"1/hour\", burst = 2 }"))
	late := w.tcp(friend4, 87)
	want("dropped, limited", []string{"deadlight", "deadlight drop: ", "deadlight drop: "}, w.tcp(friend4, 83), w.tcp(friend4, 84), w.tcp(friend4, 85), w.tcp(friend4, 86), late)
	w.expect(t, out("what no line is left for", late))
	w.load(t, strings.Replace(fmt.Sprintf(rest, ""), "group = 5", "group = 6", 1))
	six := w.logLines(6)
	w.send(w.tcp(friend4, 80), w.tcp(friend4, 9))
	if got := six.until("deadlight open end: "); !slices.Equal(got, []string{"deadlight open web: "}) {
		t.Errorf("another group: the log says %q", got)
	}
}

// mapFiles are files of a policy.
type mapFiles fstest.MapFS

func (f mapFiles) Glob(pattern string) ([]string, error) { return fs.Glob(fstest.MapFS(f), pattern) }
func (f mapFiles) ReadFile(name string) ([]byte, error) {
	return fstest.MapFS(f).ReadFile(path.Clean(name))
}

func filesOf(texts map[string]string) mapFiles {
	f := mapFiles{}
	for name, text := range texts {
		f[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return f
}

func testFiles(t *testing.T) {
	const policy = `
version = 1
include = ["conf.d/*.toml", "more.toml"]
[open.ssh]
ports = 22
from = "@admins"
[open.web]
ports = 80
[open.own]
service = "own"
[block.bad]
from = ["@bad", "@perhaps"]
[egress.dns]
ports = 53
[default]
output = "drop"
[set.admins]
files = ["lists/admins.txt"]
addresses = "10.3.0.1"
[set.bad]
addresses = "10.66.0.1"
[set.perhaps]
files = "lists/absent.txt"
optional = true
addresses = "10.69.0.1"
[service.own]
ports = 9100
`
	texts := map[string]string{
		"conf.d/10.toml":   "[open.mail]\nports = 25\n",
		"conf.d/20.toml":   "[open.web]\noverride = true\nports = 8080\n[block.bad]\noverride = true\nfrom = [\"10.67.0.1\", \"@bad\", \"@perhaps\"]\n",
		"more.toml":        "[egress.dns]\noverride = true\nports = 853\n[set.bad]\noverride = true\naddresses = \"10.68.0.1\"\n[service.own]\noverride = true\nports = 9200\n",
		"lists/admins.txt": "# offices\n10.0.0.0/24\n10.1.0.5-10.1.0.6 # two\n2001:db8:f::/64\n\n",
	}
	p, problems := rules.Parse("policy.toml", []byte(policy), filesOf(texts))
	if p == nil {
		t.Fatalf("%v", problems)
	}
	missing := slices.ContainsFunc(problems, func(p rules.Problem) bool {
		return p.Severity == rules.Warning && strings.Contains(p.Summary, "absent.txt")
	})
	if !missing {
		t.Errorf("an optional file that is missing is not warned of: %v", problems)
	}
	if p, _ := rules.Parse("policy.toml", []byte(strings.Replace(policy, "optional = true", "optional = false", 1)), filesOf(texts)); p != nil {
		t.Error("a missing file that is not optional is no error")
	}
	w := newWire(t)
	w.apply(rules.Compile(p))
	w.expect(t,
		in("of a list", w.tcp("10.0.0.77", 22)), in("of a list, a range", w.tcp("10.1.0.6", 22)), out("beside", w.tcp("10.1.0.7", 22)),
		in("of a list, IPv6", w.tcp("2001:db8:f::9", 22)), in("of addresses", w.tcp("10.3.0.1", 22)), out("a stranger", w.tcp(stranger4, 22)),
		in("included", w.tcp(stranger4, 25)), in("overriding", w.tcp(stranger4, 8080)), out("overridden", w.tcp(stranger4, 80)),
		out("an overriding block", w.tcp("10.67.0.1", 25)), in("an overridden set", w.tcp("10.66.0.1", 25)), out("an overriding set", w.tcp("10.68.0.1", 25)),
		out("a set whose list is missing", w.tcp("10.69.0.1", 25)),
		in("an overriding service", w.tcp(stranger4, 9200)), out("an overridden service", w.tcp(stranger4, 9100)),
	)
	w.departs(t, "overriding", true, w.leaving(rules.TCP, stranger4, 853))
	w.departs(t, "overridden", false, w.leaving(rules.TCP, stranger4, 53))
}

// What no packet shows is in the policy that the other commands go by.
func testWords(t *testing.T) {
	if p, _ := rules.Parse("policy.toml", []byte("[open.web]\nports = 80\n"), nil); p != nil {
		t.Error("a policy without version is valid")
	}
	p := ruleset(t, `
[open.web]
ports = 80
comment = "ticket 1"
[block.bad]
from = "10.0.0.1"
comment = "ticket 2"
[egress.dns]
ports = 53
comment = "ticket 3"
[failsafe]
ports = [22]
protocol = "udp"
from = "10.0.0.0/8"
interfaces = "eth0"
[verify]
vantage = "ssh://probe@host"
thorough = 2
[[expect]]
from = "198.51.100.9"
to = "192.0.2.1"
in = "eth0"
port = "5432/tcp"
state = "filtered"
`).Policy
	check := func(what string, ok bool) {
		t.Helper()
		if !ok {
			t.Errorf("%s is lost: %+v", what, p)
		}
	}
	check("a comment", p.Open[0].Comment == "ticket 1" && p.Block[0].Comment == "ticket 2" && p.Egress[0].Comment == "ticket 3")
	check("vantage", p.Verify.Vantage == "ssh://probe@host")
	check("thorough", p.Verify.Thorough == 2)
	f := p.Failsafe
	check("failsafe", f != nil && len(f.On) == 1 && f.On[0].Protocol == rules.UDP && f.On[0].Ports[0] == rules.PortRange{Lo: 22, Hi: 22} &&
		f.From.Ranges[0].String() == "10.0.0.0/8" && slices.Equal(f.Interfaces, []string{"eth0"}))
	e := p.Expect[0]
	check("expect", e.Packet.Src == netip.MustParseAddr("198.51.100.9") && e.Packet.Dst == host4 && e.Packet.In == "eth0" &&
		e.Packet.Protocol == rules.TCP && e.Packet.DstPort == 5432 && e.State == rules.OutcomeFiltered)
	p = ruleset(t, "[failsafe]\nservice = \"ssh\"\n").Policy
	check("service of failsafe", p.Failsafe.On[0].Ports[0].Lo == 22)
}
