package firewall

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"deadlight/rules"
	"deadlight/verify"
)

var (
	modelPolicies = flag.Int("model.policies", 200, "random policies to hold against the kernel")
	modelPackets  = flag.Int("model.packets", 200, "random packets to send at each of them")
	modelPairs    = flag.Int("model.pairs", 60, "pairs of random policies to apply one after the other")
)

// modelLinks are the interfaces of the host that random policies are tried on.
func modelLinks() []string { return []string{"eth0", "eth1", "wg0"} }

// checks makes rapid try n cases, without leaving files behind when one fails.
func checks(t *testing.T, n int, property func(*rapid.T)) {
	t.Helper()
	set := map[string]string{"rapid.checks": strconv.Itoa(n), "rapid.nofailfile": "true"}
	if flag.Lookup("rapid.seed").Value.String() == "0" {
		// The same policies in every run, so that a red one is about the change; others by -rapid.seed.
		set["rapid.seed"] = "20261121"
	}
	for name, value := range set {
		old := flag.Lookup(name).Value.String()
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
		defer flag.Set(name, old)
	}
	rapid.Check(t, property)
}

// tally counts what a property has tried.
type tally map[string]int

func (c tally) String() string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, " %s:%d", strings.ReplaceAll(k, " ", "-"), c[k])
	}
	return b.String()
}

// What the oracle says of a packet is what the kernel does with it, whatever the
// policy.
func TestModelAgreesWithKernel(t *testing.T) {
	kinds, tables := tally{}, tally{}
	policies, packets := 0, 0
	checks(t, *modelPolicies, func(t *rapid.T) {
		text := randomPolicy(t, tables)
		seed := rapid.Uint64().Draw(t, "packets")
		rs := compiled(t, text)
		w := newWire(t, modelLinks()...)
		m := newModel(w, rs, rand.New(rand.NewPCG(seed, 0)))
		defer m.close()
		m.beginFlows()
		w.apply(rs)
		m.flowPackets()
		for len(m.packets) < *modelPackets {
			m.add(m.random())
		}
		through := w.deliver(m.packets...)
		policies++
		var wrong []string
		for i, p := range m.packets {
			p.At = time.Now()
			d := rs.Decide(p.Packet)
			packets++
			want := d.Outcome == rules.OutcomeOpen || d.Observed
			if slow := slowly(rs, d, p.Packet); slow != "" {
				wrong = append(wrong, fmt.Sprintf("%s: model says %s by %s %q, but %s", p, d.Outcome, d.Kind, d.Rule, slow))
			}
			if d.Limited && !d.Observed {
				kinds["limited, not compared"]++
				continue
			}
			kinds[d.Kind+" "+map[bool]string{true: "in", false: "out"}[want]]++
			if through[i] != want {
				wrong = append(wrong, fmt.Sprintf("%s: kernel admitted %t, model says %s by %s %q", p, through[i], d.Outcome, d.Kind, d.Rule))
			}
		}
		if len(wrong) > 0 {
			t.Fatalf("%d of %d packets; policy:\n%s\n%s", len(wrong), len(m.packets), text, strings.Join(wrong[:min(len(wrong), 10)], "\n"))
		}
	})
	t.Logf("%d policies, %d packets", policies, packets)
	t.Logf("packets by verdict:%s", kinds)
	t.Logf("tables of the policies:%s", tables)
}

// slowly holds a decision against every rule in turn: the oracle finds rules by
// the index that the compiler uses too, so that the kernel cannot show a flaw in
// it. It says what is wrong.
func slowly(rs *rules.Ruleset, d rules.Decision, p rules.Packet) string {
	if d.Kind != "open" && d.Kind != "block" && d.Kind != "default" {
		return ""
	}
	about := func(t *rules.Traffic) bool {
		named := t.Any
		for _, on := range t.On {
			for _, r := range on.Ports {
				named = named || on.Protocol == p.Protocol && r.Lo <= p.DstPort && p.DstPort <= r.Hi
			}
			named = named || on.Ports == nil && on.Protocol == p.Protocol
		}
		return named && rs.Matches(t, p)
	}
	kind, rule := "default", ""
	for i := range rs.Policy.Open {
		if o := &rs.Policy.Open[i]; about(&o.Traffic) && (rule == "" || o.Name == d.Rule) {
			kind, rule = "open", o.Name
		}
	}
	for i := range rs.Policy.Block {
		if b := &rs.Policy.Block[i]; about(&b.Traffic) && (kind != "block" || b.Name == d.Rule) {
			kind, rule = "block", b.Name
		}
	}
	if kind != d.Kind || rule != d.Rule {
		return fmt.Sprintf("rule by rule it is %s %q", kind, rule)
	}
	return ""
}

// A policy that follows another leaves exactly the table that it makes from
// nothing.
func TestReplacedTableEqualsFresh(t *testing.T) {
	tables := tally{}
	checks(t, *modelPairs, func(t *rapid.T) {
		a, b := compiled(t, randomPolicy(t, tables)), compiled(t, randomPolicy(t, tables))
		replaced, fresh := listAfter(t, a, b), listAfter(t, b)
		if d := cmp.Diff(fresh, replaced); d != "" {
			t.Fatalf("fresh (-) and replaced (+) differ:\n%s", d)
		}
	})
	t.Logf("%d pairs; tables:%s", *modelPairs, tables)
}

var countedPackets = regexp.MustCompile(`packets \d+ bytes \d+`)

// listAfter lists the table, in order of name and without what was counted,
// after rulesets were applied in turn in a fresh network namespace.
func listAfter(t *rapid.T, list ...*rules.Ruleset) []string {
	var out []byte
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here, and its namespace with it
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return err
			}
			c, err := Dial(nil)
			if err != nil {
				return err
			}
			defer c.Close()
			for _, rs := range list {
				if _, err := c.Apply(rs); err != nil {
					return err
				}
			}
			out, err = exec.Command("nft", "list", "table", "inet", "deadlight").CombinedOutput()
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		}()
	}()
	if err := <-done; err != nil {
		t.Fatalf("%v", err)
	}
	text := countedPackets.ReplaceAllString(timeout.ReplaceAllString(strings.ReplaceAll(string(out), secondName, ""), "$1"), "")
	_, text, _ = strings.Cut(text, "comment \"managed by deadlight\"")
	parts := strings.Split(text, "\n\t}\n")
	slices.Sort(parts)
	return parts
}

// compiled compiles a policy that must be valid.
func compiled(t *rapid.T, text string) *rules.Ruleset {
	p, problems := rules.Parse("policy.toml", []byte(text), nil)
	if p == nil {
		var b bytes.Buffer
		rules.Render(&b, problems, "")
		t.Fatalf("%s\n%s", b.String(), text)
	}
	return rules.Compile(p)
}

// model makes packets that a policy's edges show by.
type model struct {
	*wire
	rs      *rules.Ruleset
	rand    *rand.Rand
	ports   map[rules.Protocol][]uint16
	sources []netip.Addr
	packets []*packet

	listeners *verify.Listeners
	strangers []*packet // later packets of flows that a stranger began
	replies   []*packet // answers to flows that the host began
	related   []*packet // errors about those
}

func newModel(w *wire, rs *rules.Ruleset, r *rand.Rand) *model {
	m := &model{wire: w, rs: rs, rand: r, ports: map[rules.Protocol][]uint16{}}
	p := rs.Policy
	var ranges []rules.AddrRange
	note := func(t *rules.Traffic) {
		for _, on := range t.On {
			for _, r := range on.Ports {
				for _, port := range []int{int(r.Lo) - 1, int(r.Lo), (int(r.Lo) + int(r.Hi)) / 2, int(r.Hi), int(r.Hi) + 1} {
					if port >= 0 && port <= 65535 {
						m.ports[on.Protocol] = append(m.ports[on.Protocol], uint16(port))
					}
				}
			}
		}
		ranges = append(append(ranges, t.From.Ranges...), t.Except.Ranges...)
	}
	for i := range p.Open {
		note(&p.Open[i].Traffic)
	}
	for i := range p.Block {
		note(&p.Block[i].Traffic)
	}
	for i := range p.Sets {
		ranges = slices.AppendSeq(ranges, p.Sets[i].Ranges.All())
	}
	for _, proto := range []rules.Protocol{rules.TCP, rules.UDP, rules.SCTP} {
		m.ports[proto] = append(m.ports[proto], 1, 80, 7777, 65535)
	}
	for _, r := range ranges {
		for _, a := range []netip.Addr{r.Lo.Prev(), r.Lo, r.Lo.Next(), r.Hi.Prev(), r.Hi, r.Hi.Next()} {
			if mayCome(a) {
				m.sources = append(m.sources, a)
			}
		}
	}
	for _, s := range []string{"198.51.100.77", "10.9.1.1", "2001:db8:77::7", "fd00::7"} {
		m.sources = append(m.sources, netip.MustParseAddr(s))
	}
	return m
}

// mayCome reports whether a host takes packets from an address that is not its
// own (ip_route_input_slow and ip6_rcv_core drop what may not be a source).
func mayCome(a netip.Addr) bool {
	switch {
	case !a.IsValid() || slices.Contains([]netip.Addr{host4, other4, third4, host6, other6, third6}, a):
		return false
	case a.Is4():
		first := a.As4()[0]
		return first > 0 && first != 127 && first < 224
	}
	for _, p := range []string{"2000::/3", "fc00::/7", "fe80::/10"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return true
		}
	}
	return false
}

func (m *model) close() {
	if m.listeners != nil {
		m.listeners.Close()
	}
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

func (m *model) add(p *packet) { m.packets = append(m.packets, p) }

// source gives one of the sources, of a family if need be.
func (m *model) source(wanted func(netip.Addr) bool) netip.Addr {
	for {
		if a := pick(m.rand, m.sources); wanted(a) {
			return a
		}
	}
}

func anyone(netip.Addr) bool { return true }

// addressed makes a packet from src to an address of the host.
func (m *model) addressed(src netip.Addr) *packet {
	p := &packet{Packet: rules.Packet{In: pick(m.rand, modelLinks()), Src: src}}
	if src.Is4() {
		p.Dst = pick(m.rand, []netip.Addr{host4, host4, host4, other4, third4})
	} else {
		p.Dst = pick(m.rand, []netip.Addr{host6, host6, host6, other6, third6})
	}
	return p
}

// many makes a packet to everybody on the link now and then.
func (m *model) many(p *packet) {
	switch {
	case m.rand.IntN(15) > 0:
	case p.Src.Is4():
		p.Dst = netip.MustParseAddr(pick(m.rand, []string{"255.255.255.255", "224.0.0.1"}))
	default:
		p.Dst = netip.MustParseAddr("ff02::1")
	}
}

// random makes a packet that begins a flow, or that belongs to none.
func (m *model) random() *packet {
	p := m.addressed(m.source(anyone))
	p.SrcPort = uint16(1024 + m.rand.IntN(60000))
	v4 := p.Src.Is4()
	icmp := rules.ICMPv6
	if v4 {
		icmp = rules.ICMPv4
	}
	switch n := m.rand.IntN(100); {
	case n < 28:
		p.Protocol, p.flags = rules.TCP, syn
		p.DstPort = pick(m.rand, m.ports[rules.TCP])
		m.many(p)
		if m.rand.IntN(12) == 0 {
			p.flags = ack // tcp_loose takes it for the beginning of a flow
		}
	case n < 54:
		p.Protocol = rules.UDP
		p.DstPort = pick(m.rand, m.ports[rules.UDP])
		m.many(p)
		if m.rand.IntN(10) == 0 {
			p.SrcPort = pick(m.rand, []uint16{53, 67, 123, 547})
		}
	case n < 65:
		p.Protocol, p.DstPort = rules.SCTP, max(1, pick(m.rand, m.ports[rules.SCTP]))
		m.many(p)
	case n < 71: // a ping
		p.Protocol, p.ICMPType = icmp, 8
		if !v4 {
			p.ICMPType = 128
		}
		m.many(p)
	case n < 82:
		m.otherICMP(p, icmp)
	case n < 91:
		p.Protocol = pick(m.rand, m.plainProtocols(v4))
		if p.Protocol == rules.IGMP && m.rand.IntN(2) == 0 {
			p.Dst = netip.MustParseAddr("224.0.0.1")
		}
	case n < 96:
		m.dhcp(p)
	default:
		m.invalid(p, icmp)
	}
	return p
}

// plainProtocols are those without ports that a packet may be of. Over IPv6
// conntrack looks behind an authentication header and calls what is not whole there
// invalid.
func (m *model) plainProtocols(v4 bool) []rules.Protocol {
	list := []rules.Protocol{rules.ESP, rules.GRE, rules.VRRP, 89, 252, 253}
	if v4 {
		list = append(list, rules.IGMP, rules.AH)
	}
	for i := range m.rs.Policy.Open {
		for _, on := range m.rs.Policy.Open[i].On {
			if p := on.Protocol; p > 90 && p < 132 && p != 115 && p != 103 && p != 94 && p != 98 {
				list = append(list, p)
			}
		}
	}
	return list
}

// otherICMP makes a message that is no ping: new, invalid or without any state.
func (m *model) otherICMP(p *packet, icmp rules.Protocol) {
	p.Protocol = icmp
	p.body = m.quote(p)
	if icmp == rules.ICMPv4 {
		p.ICMPType = pick(m.rand, []uint8{0, 3, 3, 4, 5, 11, 12, 13, 13, 17})
		switch p.ICMPType {
		case 0, 4, 5: // an answer to nothing, an error about nothing
			p.Flow = rules.InvalidFlow
		case 3, 11, 12:
			p.Flow = rules.InvalidFlow
			p.code = uint8(m.rand.IntN(2))
		}
		return
	}
	p.ICMPType = pick(m.rand, []uint8{1, 2, 3, 4, 100, 129, 130, 131, 133, 134, 135, 136, 137, 143, 139, 200})
	p.HopLimit = pick(m.rand, []uint8{255, 64})
	if m.rand.IntN(2) == 0 {
		p.Src = netip.MustParseAddr("fe80::77")
	}
	switch {
	case p.ICMPType < 128, p.ICMPType == 129, p.ICMPType == 200:
		p.Flow = rules.InvalidFlow
	case p.ICMPType == 137: // a redirect without the packet that it is about
		p.Flow = rules.InvalidFlow
	case p.ICMPType != 139: // a query for node information is tracked like a ping
		p.body = make([]byte, 16) // a target, and no option that could teach the host something
	}
}

// quote is a packet that the host never sent, as an error quotes it.
func (m *model) quote(p *packet) []byte {
	q := packet{Packet: rules.Packet{Src: p.Dst, Dst: p.Src, Protocol: rules.UDP, SrcPort: 4, DstPort: uint16(m.rand.IntN(65535))}}
	return q.bytes()
}

// dhcp makes what a DHCP server answers, and what only looks like it.
func (m *model) dhcp(p *packet) {
	p.Protocol, p.SrcPort, p.DstPort = rules.UDP, 67, 68
	if p.Src.Is4() {
		p.Dst = pick(m.rand, []netip.Addr{host4, netip.MustParseAddr("255.255.255.255")})
	} else {
		p.SrcPort, p.DstPort = 547, 546
		if m.rand.IntN(3) > 0 {
			p.Src = netip.MustParseAddr("fe80::77")
			p.Dst = netip.MustParseAddr("ff02::1")
			if m.rand.IntN(3) > 0 {
				p.Dst = m.linkLocal(p.In)
			}
		}
	}
	switch m.rand.IntN(6) {
	case 0:
		p.SrcPort++
	case 1:
		p.DstPort--
	}
}

// linkLocal is the address that the host gave itself on a link (RFC 4291 App. A).
func (m *model) linkLocal(link string) netip.Addr {
	mac := m.Link(link).Dst
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: mac[0] ^ 2, 9: mac[1], 10: mac[2], 11: 0xff, 12: 0xfe, 13: mac[3], 14: mac[4], 15: mac[5]})
}

// invalid makes what conntrack refuses to know.
func (m *model) invalid(p *packet, icmp rules.Protocol) {
	p.Flow = rules.InvalidFlow
	switch m.rand.IntN(4) {
	case 0:
		p.Protocol, p.flags = rules.TCP, pick(m.rand, []byte{0, fin, rst, syn | fin, syn | ack, syn | rst})
	case 1:
		p.Protocol, p.badSum = rules.UDP, true
	case 2:
		p.Protocol, p.badSum = rules.SCTP, true
	default:
		p.Protocol, p.badSum, p.ICMPType = icmp, true, 8
		if icmp == rules.ICMPv6 {
			p.ICMPType = 128
		}
		return
	}
	p.DstPort = max(1, pick(m.rand, m.ports[p.Protocol]))
}

const openAll = "version = 1\n[open.all]\nprotocol = \"any\"\n"

// beginFlows makes flows, in both directions, while everything is open.
func (m *model) beginFlows() {
	all, _ := rules.Parse("policy.toml", []byte(openAll), nil)
	m.apply(rules.Compile(all))
	ports := func(p rules.Protocol) []uint16 {
		var out []uint16
		for range 4 {
			if port := pick(m.rand, m.ports[p]); port > 0 && !slices.Contains(out, port) {
				out = append(out, port)
			}
		}
		return append(out, 4242)
	}
	tcp, udp := ports(rules.TCP), ports(rules.UDP)
	var err error
	if m.listeners, err = verify.Listen(m.Host, tcp, udp); err != nil {
		m.Fatalf("%v", err)
	}
	routed := func(a netip.Addr) bool { return !a.IsLinkLocalUnicast() }
	ear := m.wire.listen("eth0") // every answer leaves by the first link
	var first []*packet
	for i := range 10 {
		p := m.addressed(m.source(routed))
		p.Protocol, p.SrcPort, p.DstPort = rules.UDP, uint16(1100+i), pick(m.rand, udp)
		if i >= 6 {
			p.Protocol, p.DstPort, p.flags, p.seq = rules.TCP, pick(m.rand, tcp), syn, 1000
		}
		first = append(first, p)
	}
	m.send(first...)
	waiting := slices.Clone(first)
	var third []*packet
	for len(waiting) > 0 {
		ear.await("answer", func(a answer) bool {
			i := slices.IndexFunc(waiting, func(p *packet) bool { return a.answers(p) })
			if i < 0 || a.Protocol == rules.TCP && a.flags != syn|ack {
				return false
			}
			later := *waiting[i]
			later.Flow = rules.StrangersFlow
			if a.Protocol == rules.TCP {
				later.flags, later.seq, later.ack = ack, 1001, a.seq+1
				confirm := later
				third = append(third, &confirm)
			}
			m.strangers = append(m.strangers, &later)
			waiting = slices.Delete(waiting, i, i+1)
			return true
		})
	}
	m.send(third...)
	m.beginOwn(routed)
}

// beginOwn makes the host begin flows.
func (m *model) beginOwn(routed func(netip.Addr) bool) {
	for range 8 {
		reply := m.addressed(m.source(routed))
		reply.Protocol, reply.Flow = rules.UDP, rules.ReplyFlow
		reply.SrcPort = uint16(1 + m.rand.IntN(65535))
		m.replies = append(m.replies, reply)
	}
	m.inHost(func() error {
		for _, reply := range m.replies {
			if err := speak(reply); err != nil {
				return fmt.Errorf("send to %s: %w", reply.Src, err)
			}
		}
		return nil
	})
	for _, reply := range m.replies {
		// An error of a type that is never admitted for its own sake.
		e := m.addressed(reply.Src)
		e.Dst, e.Flow = reply.Dst, rules.RelatedFlow
		sent := packet{Packet: rules.Packet{Src: reply.Dst, Dst: reply.Src, Protocol: rules.UDP, SrcPort: reply.DstPort, DstPort: reply.SrcPort}}
		e.body = sent.bytes()
		if reply.Src.Is4() {
			e.Protocol, e.ICMPType = rules.ICMPv4, 4 // source quench
		} else {
			e.Protocol, e.ICMPType = rules.ICMPv6, 100 // an error for experiments
		}
		m.related = append(m.related, e)
	}
}

// speak sends the datagram that the reply answers, and notes from which port.
func speak(reply *packet) error {
	family := unix.AF_INET
	if reply.Src.Is6() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, sockaddr(reply.Dst, 0)); err != nil {
		return err
	}
	if err := unix.Sendto(fd, []byte{0}, 0, sockaddr(reply.Src, reply.SrcPort)); err != nil {
		return err
	}
	own, err := unix.Getsockname(fd)
	switch own := own.(type) {
	case *unix.SockaddrInet4:
		reply.DstPort = uint16(own.Port)
	case *unix.SockaddrInet6:
		reply.DstPort = uint16(own.Port)
	}
	return err
}

func sockaddr(a netip.Addr, port uint16) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4(), Port: int(port)}
	}
	return &unix.SockaddrInet6{Addr: a.As16(), Port: int(port)}
}

// flowPackets are the packets of the flows that began before the policy. What
// one of them says the next must not unsay, so errors come last.
func (m *model) flowPackets() {
	for _, list := range [][]*packet{m.strangers, m.replies, m.related} {
		for _, p := range list {
			if p.Flow == rules.StrangersFlow && m.rand.IntN(3) == 0 {
				p.In = pick(m.rand, modelLinks()) // flows may move
			}
			m.add(p)
		}
	}
}

// --- random policies ---

// author writes a random policy.
type author struct {
	*rapid.T
	tables tally
	sets   []string
}

func (a *author) chance(n int, what string) bool { return rapid.IntRange(1, n).Draw(a.T, what) == n }

func (a *author) one(what string, list ...string) string {
	return rapid.SampledFrom(list).Draw(a.T, what)
}

// value writes a list, or a single value now and then.
func value(list []string) string {
	if len(list) == 1 {
		return list[0]
	}
	return "[" + strings.Join(list, ", ") + "]"
}

func (a *author) list(what string, most int, one func() string) string {
	n := rapid.IntRange(1, most).Draw(a.T, what)
	list := make([]string, n)
	for i := range list {
		list[i] = one()
	}
	return value(list)
}

// port draws from few ports, so that ranges meet, adjoin and overlap.
func (a *author) port() int {
	base := rapid.SampledFrom([]int{1, 20, 80, 440, 1000, 65525}).Draw(a.T, "port")
	return base + rapid.IntRange(0, 10).Draw(a.T, "and")
}

func (a *author) ports() string {
	return a.list("ports", 4, func() string {
		lo := a.port()
		switch rapid.IntRange(0, 5).Draw(a.T, "shape of ports") {
		case 0, 1:
			return fmt.Sprint(lo)
		case 2:
			return strconv.Quote(fmt.Sprint(lo))
		case 3:
			return strconv.Quote(fmt.Sprintf("%d-%d", lo, max(lo, a.port())))
		}
		return strconv.Quote(fmt.Sprintf("%d-%d", lo, min(65535, lo+rapid.IntRange(0, 5).Draw(a.T, "more"))))
	})
}

// addresses draws from two small neighbourhoods that cross the border of a byte.
func (a *author) addresses(sets bool) string {
	return strconv.Quote(a.plainAddresses(sets))
}

func (a *author) plainAddresses(sets bool) string {
	if sets && len(a.sets) > 0 && a.chance(3, "a set") {
		return "@" + a.one("set", a.sets...)
	}
	if a.chance(12, "wide") {
		return a.one("wide", "0.0.0.0/0", "::/0", "0.0.0.0/1", "128.0.0.0/1", "2000::/3", "fe80::/10", "fe80::77", "10.0.0.0/8",
			"223.0.0.0-255.255.255.255", "0.0.0.0-10.9.0.250", "fc00::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "198.51.100.0/24", "192.0.2.0/24")
	}
	v4 := rapid.Bool().Draw(a.T, "ipv4")
	at := func(off int) netip.Addr {
		if v4 {
			n := 0xf0 + off
			return netip.AddrFrom4([4]byte{10, 9, byte(n >> 8), byte(n)})
		}
		n := 0xfff0 + off
		return netip.AddrFrom16([16]byte{0x20, 1, 0x0d, 0xb8, 0, 9, 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
	}
	lo := rapid.IntRange(0, 31).Draw(a.T, "address")
	switch rapid.IntRange(0, 3).Draw(a.T, "shape of addresses") {
	case 0, 1:
		return at(lo).String()
	case 2:
		return fmt.Sprintf("%s-%s", at(lo), at(lo+rapid.IntRange(0, 9).Draw(a.T, "more")))
	}
	bits := at(0).BitLen() - rapid.IntRange(0, 5).Draw(a.T, "host bits")
	return netip.PrefixFrom(at(lo), bits).Masked().String()
}

func (a *author) protocol() string { return a.one("protocol", `"tcp"`, `"udp"`, `"sctp"`) }

func (a *author) plainProtocol() string {
	return a.one("protocol without ports", `"esp"`, `"ah"`, `"gre"`, `"vrrp"`, `"igmp"`, `"icmp"`, `"icmpv6"`, `"ospf"`, "253", "252", "120")
}

func (a *author) rate() string {
	s := fmt.Sprintf(`{ limit = "%d/%s"`, rapid.IntRange(1, 50).Draw(a.T, "limit"), a.one("unit", "second", "minute", "hour", "day"))
	if a.chance(2, "burst") {
		s += fmt.Sprintf(", burst = %d", rapid.IntRange(1, 50).Draw(a.T, "burst"))
	}
	if a.chance(2, "per") {
		s += ", per = " + a.one("per", `"source"`, `"rule"`)
	}
	return s + " }"
}

func (a *author) interfaces() string {
	return a.list("interfaces", 3, func() string {
		return a.one("interface", `"eth0"`, `"eth1"`, `"wg0"`, `"eth*"`, `"e*"`, `"wg*"`, `"eth0*"`, `"none0"`, `"eth"`, `"w*"`)
	})
}

// what writes the traffic that a table is about.
func (a *author) what(kind string) string {
	n := rapid.IntRange(0, 9).Draw(a.T, "what")
	switch {
	case n < 2:
		return "ports = " + a.ports() + "\n"
	case n < 6:
		return "ports = " + a.ports() + "\nprotocol = " + a.list("protocols", 3, a.protocol) + "\n"
	case n == 6:
		return "service = " + a.list("services", 2, func() string { return a.one("service", `"ssh"`, `"domain"`, `"https"`, `"own"`, `"ntp"`) }) + "\n"
	case n == 7:
		return "protocol = " + a.list("protocols", 3, a.plainProtocol) + "\n"
	case n == 8 && kind == "block":
		return ""
	}
	return "protocol = \"any\"\n"
}

// table writes the body of an [open.*], [block.*] or [egress.*].
func (a *author) table(kind string) string {
	var b strings.Builder
	b.WriteString(a.what(kind))
	list := func(key string, sets bool) {
		fmt.Fprintf(&b, "%s = %s\n", key, a.list(key, 4, func() string { return a.addresses(sets) }))
	}
	if kind == "egress" {
		if a.chance(2, "to") {
			list("to", true)
		}
		if a.chance(4, "user") {
			b.WriteString("user = " + a.one("user", `"root"`, "0", "65534") + "\n")
		}
		if a.chance(4, "group") {
			b.WriteString("group = " + a.one("group", `"root"`, "0") + "\n")
		}
	} else {
		if !a.chance(3, "from anywhere") {
			list("from", true)
		}
		if a.chance(4, "except") {
			list("except", true)
		}
		if a.chance(4, "to") {
			b.WriteString("to = " + a.list("to", 3, func() string {
				return a.one("to", `"192.0.2.1"`, `"192.0.2.2"`, `"192.0.2.0/30"`, `"2001:db8::1"`, `"2001:db8::2-2001:db8::3"`, `"224.0.0.1"`, `"ff02::1"`)
			}) + "\n")
		}
	}
	if a.chance(4, "interfaces") {
		b.WriteString("interfaces = " + a.interfaces() + "\n")
	}
	if a.chance(6, "family") {
		b.WriteString("family = " + a.one("family", `"ipv4"`, `"ipv6"`) + "\n")
	}
	if a.chance(6, "expires") {
		b.WriteString("expires = " + a.one("expires", "2001-02-03T04:05:06Z", "2099-01-31T00:00:00Z", "2042-06-07T08:09:10+05:30", "1999-12-31T23:59:59.5-01:00") + "\n")
	}
	if a.chance(6, "comment") {
		b.WriteString("comment = \"ticket 4711 \\\"é\\\"\"\n")
	}
	if a.chance(8, "log") {
		b.WriteString("log = " + a.one("log", "true", "false") + "\n")
	}
	if kind == "open" {
		if a.chance(8, "rate") {
			b.WriteString("rate = " + a.rate() + "\n")
		}
		if a.chance(12, "connections") {
			fmt.Fprintf(&b, "connections = %d\n", rapid.IntRange(1, 100).Draw(a.T, "connections"))
		}
	}
	return b.String()
}

// single writes the tables that stand once.
func (a *author) single() string {
	var b strings.Builder
	key := func(n int, name string, values ...string) {
		if a.chance(n, name) {
			fmt.Fprintf(&b, "%s = %s\n", name, a.one(name, values...))
		}
	}
	b.WriteString("[default]\n")
	key(2, "input", `"drop"`, `"reject"`)
	key(2, "published", `"drop"`, `"ignore"`)
	key(3, "output", `"accept"`, `"drop"`, `"reject"`)
	key(3, "forward", `"ignore"`, `"drop"`)
	key(2, "established", `"recheck"`, `"keep"`)
	key(12, "enforce", "true", "false", "false")
	b.WriteString("[icmp]\n")
	if a.chance(6, "rate of echo") {
		b.WriteString("echo = " + a.rate() + "\n")
	} else {
		key(2, "echo", "true", "false")
	}
	b.WriteString("[dhcp]\n")
	key(2, "client", "true", "false", `"eth0"`, `["eth1", "w*"]`)
	b.WriteString("[log]\n")
	key(5, "dropped", "true", "false", `{ limit = "5/second", burst = 20 }`)
	key(4, "prefix", `"dl"`, `"fire wall"`)
	key(2, "group", "0", "7")
	b.WriteString("[published]\n")
	key(3, "interfaces", `"docker0"`, `["eth1", "br-*"]`, `["e*", "eth0"]`)
	return b.String()
}

// randomPolicy writes a policy. A table that the parser refuses, since its
// fields cannot meet, is left out.
func randomPolicy(t *rapid.T, tables tally) string {
	a := &author{T: t, tables: tables}
	text := "version = 1\n" + a.single() + "[service.own]\nports = [440, \"1000-1002\"]\nprotocol = [\"tcp\", \"udp\"]\n"
	for i := range rapid.IntRange(0, 3).Draw(t, "sets") {
		name := fmt.Sprintf("s%d", i)
		text += fmt.Sprintf("[set.%s]\naddresses = %s\n", name, a.list("members", 6, func() string { return a.addresses(false) }))
		a.sets = append(a.sets, name)
	}
	names := []string{"web", "b.c", "9-x", "A_b", "an-opening-whose-name-is-as-long-as-a-name-may-be"}
	for _, kind := range []struct {
		name string
		most int
	}{{"open", 6}, {"block", 3}, {"egress", 2}} {
		for i := range rapid.IntRange(0, kind.most).Draw(t, kind.name) {
			name := names[i%len(names)]
			if len(name) > 47 {
				name = name[:47]
			}
			table := fmt.Sprintf("[%s.%q]\n%s", kind.name, fmt.Sprintf("%s%d", name[:min(len(name), 47)], i), a.table(kind.name))
			if p, _ := rules.Parse("policy.toml", []byte(text+table), nil); p == nil {
				tables["refused"]++
				continue
			}
			tables[kind.name]++
			text += table
		}
	}
	return text
}
