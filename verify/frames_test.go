package verify

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

func testPaths() []Path {
	l := Link{Index: 1, Name: "eth0", Src: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Dst: net.HardwareAddr{2, 0, 0, 0, 0, 2}}
	return []Path{
		{Link: l, Src: vantage4, Dst: target4, SrcPort: 61000},
		{Link: l, Src: vantage6, Dst: target6, SrcPort: 61001},
	}
}

// checksumOK adds up a packet's transport part the way its receiver does.
func checksumOK(t *testing.T, packet []byte) bool {
	t.Helper()
	var src, dst netip.Addr
	var proto rules.Protocol
	var l4 []byte
	var ok bool
	if packet[0]>>4 == 4 {
		proto, l4, ok = parseIPv4(packet, &src, &dst)
		if fold16(sum16(0, packet[:ipv4Len])) != 0 {
			t.Error("IPv4 header checksum is wrong")
		}
	} else {
		proto, l4, ok = parseIPv6(packet, &src, &dst)
	}
	if !ok {
		t.Fatalf("own packet does not parse: %x", packet)
	}
	var s uint32
	if proto != rules.ICMPv4 {
		s = sum16(sum16(uint32(proto)+uint32(len(l4)), src.AsSlice()), dst.AsSlice())
	}
	return fold16(sum16(s, l4)) == 0
}

func TestFramesAreSound(t *testing.T) {
	for _, p := range testPaths() {
		syn, udp, echo, rst := synTemplate(&p), udpTemplate(&p), echoTemplate(&p), rstTemplate(&p)
		for _, n := range []uint32{0, 1, 0x7fff, 0xfffe, 0xffff, 0x12345678, 0xffffffff} {
			lo, hi := uint16(n), uint16(n>>16)
			frames := map[string]func(b []byte) int{
				"syn":  func(b []byte) int { return syn.tcp(b, lo, hi, n) },
				"rst":  func(b []byte) int { return rst.tcp(b, hi, lo, n) },
				"udp":  func(b []byte) int { return udp.udp(b, lo, hi) },
				"echo": func(b []byte) int { return echo.echo(b, hi, lo, n) },
			}
			for name, build := range frames {
				var b [maxFrame]byte
				f := b[:build(b[:])]
				if !checksumOK(t, f[etherLen:]) {
					t.Errorf("%s %#x to %v: checksum is wrong", name, n, p.Dst)
				}
				if !slices.Equal(f[:6], p.Link.Dst) || !slices.Equal(f[6:12], p.Link.Src) {
					t.Errorf("%s: Ethernet addresses %x", name, f[:12])
				}
			}
		}
		var b [maxFrame]byte
		var r reply
		if !parseReply(b[etherLen:syn.tcp(b[:], 61000, 443, 77)], &r) ||
			r.from != p.Src || r.to != p.Dst || r.sport != 61000 || r.dport != 443 || r.seq != 77 || r.flags != flagSYN {
			t.Errorf("syn reads back as %+v", r)
		}
	}
}

// ip4 and ip6 wrap a payload in a header.
func ip4(src, dst netip.Addr, proto byte, payload []byte, options ...byte) []byte {
	h := make([]byte, ipv4Len, ipv4Len+len(options)+len(payload))
	h[0] = 0x40 | byte(ipv4Len+len(options))/4
	binary.BigEndian.PutUint16(h[2:], uint16(ipv4Len+len(options)+len(payload)))
	h[8], h[9] = 64, proto
	copy(h[12:], src.AsSlice())
	copy(h[16:], dst.AsSlice())
	return append(append(h, options...), payload...)
}

func ip6(src, dst netip.Addr, next byte, payload []byte) []byte {
	h := make([]byte, ipv6Len, ipv6Len+len(payload))
	h[0] = 0x60
	binary.BigEndian.PutUint16(h[4:], uint16(len(payload)))
	h[6], h[7] = next, 64
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, payload...)
}

// ports is the start of a TCP or UDP header.
func ports(sport, dport uint16, rest ...byte) []byte {
	return append(binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, sport), dport), rest...)
}

func icmp(typ, code byte, rest []byte) []byte {
	return append([]byte{typ, code, 0, 0, 0, 0, 0, 0}, rest...)
}

func TestParseReply(t *testing.T) {
	tcp := ports(443, 61000, 0, 0, 0, 1, 0, 0, 0, 9, 0x50, flagSYN|flagACK, 0, 0, 0, 0, 0, 0)
	quoted4 := ip4(vantage4, target4, unix.IPPROTO_TCP, ports(61000, 443, 0, 0, 0, 5))
	quoted6 := ip6(vantage6, target6, unix.IPPROTO_UDP, ports(61001, 53, 0, 8, 0, 0))
	later := ip4(target4, vantage4, unix.IPPROTO_TCP, tcp)
	later[7] = 3 // fragment offset
	hopByHop := append([]byte{unix.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0}, tcp...)
	fragment := append([]byte{unix.IPPROTO_TCP, 0, 0, 1, 0, 0, 0, 0}, tcp...)
	laterFragment := append([]byte{unix.IPPROTO_TCP, 0, 0, 9, 0, 0, 0, 0}, tcp...)
	wantTCP := func(r *reply) bool {
		return r.kind == replyTCP && r.sport == 443 && r.dport == 61000 && r.seq == 1 && r.ack == 9 && r.flags == flagSYN|flagACK
	}
	for _, c := range []struct {
		name   string
		packet []byte
		want   func(r *reply) bool // nil: must be refused
	}{
		{"empty", nil, nil},
		{"version", []byte{0x50, 0, 0, 0}, nil},
		{"short IPv4", make([]byte, 19), nil},
		{"header length 4", append([]byte{0x41}, make([]byte, 60)...), nil},
		{"header longer than packet", append([]byte{0x4f}, make([]byte, 30)...), nil},
		{"TCP over IPv4", ip4(target4, vantage4, unix.IPPROTO_TCP, tcp), wantTCP},
		{"padded frame", append(ip4(target4, vantage4, unix.IPPROTO_TCP, tcp), 0, 0, 0, 0), wantTCP},
		{"IPv4 options", ip4(target4, vantage4, unix.IPPROTO_TCP, tcp, 1, 1, 1, 0), wantTCP},
		{"later fragment", later, nil},
		{"cut TCP", ip4(target4, vantage4, unix.IPPROTO_TCP, tcp[:19]), nil},
		{"TCP over IPv6", ip6(target6, vantage6, unix.IPPROTO_TCP, tcp), wantTCP},
		{"hop-by-hop", ip6(target6, vantage6, unix.IPPROTO_HOPOPTS, hopByHop), wantTCP},
		{"first fragment", ip6(target6, vantage6, unix.IPPROTO_FRAGMENT, fragment), wantTCP},
		{"later IPv6 fragment", ip6(target6, vantage6, unix.IPPROTO_FRAGMENT, laterFragment), nil},
		{"extension header too long", ip6(target6, vantage6, unix.IPPROTO_DSTOPTS, []byte{6, 9, 0, 0, 0, 0, 0, 0}), nil},
		{"extension header cut", ip6(target6, vantage6, unix.IPPROTO_ROUTING, []byte{6, 0}), nil},
		{"UDP", ip4(target4, vantage4, unix.IPPROTO_UDP, ports(53, 61000, 0, 8, 0, 0)), func(r *reply) bool {
			return r.kind == replyUDP && r.sport == 53 && r.dport == 61000
		}},
		{"cut UDP", ip4(target4, vantage4, unix.IPPROTO_UDP, ports(53, 61000)), nil},
		{"echo reply", ip4(target4, vantage4, unix.IPPROTO_ICMP, []byte{0, 0, 0, 0, 0, 7, 0, 8, 1, 2, 3, 4}), func(r *reply) bool {
			return r.kind == replyEcho && r.id == 7 && r.number == 8 && r.cookie == 0x01020304
		}},
		{"echo reply without cookie", ip4(target4, vantage4, unix.IPPROTO_ICMP, []byte{0, 0, 0, 0, 0, 7, 0, 8}), nil},
		{"echo request", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(8, 0, []byte{1, 2, 3, 4})), nil},
		{"ICMPv6 in IPv4", ip4(target4, vantage4, unix.IPPROTO_ICMPV6, icmp(1, 4, quoted4)), nil},
		{"error", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(3, 13, quoted4)), func(r *reply) bool {
			return r.kind == replyError && r.icmpType == 3 && r.icmpCode == 13 && r.quotedSrc == vantage4 && r.quotedDst == target4 &&
				r.quotedProto == rules.TCP && r.quotedSrcPort == 61000 && r.quotedDstPort == 443 && r.quotedSeq == 5
		}},
		{"error with cut quote", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(3, 13, quoted4[:27])), nil},
		{"error without quote", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(3, 13, nil)), nil},
		{"error that quotes IPv6", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(3, 13, quoted6)), nil},
		{"redirect", ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(5, 1, quoted4)), nil},
		{"ICMPv6 error", ip6(target6, vantage6, unix.IPPROTO_ICMPV6, icmp(1, 4, quoted6)), func(r *reply) bool {
			return r.kind == replyError && r.quotedProto == rules.UDP && r.quotedDstPort == 53 && r.quotedDst == target6
		}},
		{"neighbour advertisement", ip6(target6, vantage6, unix.IPPROTO_ICMPV6, icmp(136, 0, quoted6)), nil},
	} {
		var r reply
		if ok := parseReply(c.packet, &r); ok != (c.want != nil) {
			t.Errorf("%s: accepted %v", c.name, ok)
		} else if ok && !c.want(&r) {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
}

func TestICMPAnswer(t *testing.T) {
	other := netip.MustParseAddr("10.9.0.254")
	for _, c := range []struct {
		from      netip.Addr
		proto     rules.Protocol
		typ, code uint8
		want      Answer
	}{
		{target4, rules.UDP, 3, 3, Answer{Closed, PortUnreachable}},
		{target4, rules.TCP, 3, 3, Answer{Rejected, PortUnreachable}},
		{target4, rules.TCP, 3, 0, Answer{Rejected, NetUnreachable}},
		{target4, rules.TCP, 3, 1, Answer{Rejected, HostUnreachable}},
		{target4, rules.TCP, 3, 2, Answer{Rejected, ProtoUnreachable}},
		{target4, rules.TCP, 3, 9, Answer{Rejected, AdminProhibited}},
		{target4, rules.TCP, 3, 10, Answer{Rejected, AdminProhibited}},
		{target4, rules.UDP, 3, 13, Answer{Rejected, AdminProhibited}},
		{target4, rules.UDP, 3, 4, Answer{Rejected, OtherICMP}},
		{target4, rules.UDP, 11, 0, Answer{Rejected, OtherICMP}},
		{target4, rules.UDP, 12, 1, Answer{Rejected, OtherICMP}},
		{other, rules.UDP, 3, 3, Answer{Unknown, RouterError}},
		{other, rules.TCP, 11, 0, Answer{Unknown, RouterError}},
		{target6, rules.UDP, 1, 4, Answer{Closed, PortUnreachable}},
		{target6, rules.TCP, 1, 4, Answer{Rejected, PortUnreachable}},
		{target6, rules.TCP, 1, 0, Answer{Rejected, NetUnreachable}},
		{target6, rules.TCP, 1, 1, Answer{Rejected, AdminProhibited}},
		{target6, rules.TCP, 1, 2, Answer{Rejected, OtherICMP}},
		{target6, rules.TCP, 1, 3, Answer{Rejected, HostUnreachable}},
		{target6, rules.TCP, 1, 5, Answer{Rejected, AdminProhibited}},
		{target6, rules.TCP, 1, 6, Answer{Rejected, AdminProhibited}},
		{target6, rules.TCP, 4, 1, Answer{Rejected, ProtoUnreachable}},
		{target6, rules.TCP, 4, 2, Answer{Rejected, OtherICMP}},
		{target6, rules.TCP, 3, 0, Answer{Rejected, OtherICMP}},
	} {
		r := reply{from: c.from, quotedDst: target4, quotedProto: c.proto, icmpType: c.typ, icmpCode: c.code}
		if c.from.Is6() {
			r.quotedDst = target6
		}
		if got := icmpAnswer(&r); got != c.want {
			t.Errorf("%v type %d code %d from %v: got %v, want %v", c.proto, c.typ, c.code, c.from, got, c.want)
		}
	}
}

func FuzzParseReply(f *testing.F) {
	quoted := ip4(vantage4, target4, unix.IPPROTO_TCP, ports(61000, 443, 0, 0, 0, 5))
	f.Add(ip4(target4, vantage4, unix.IPPROTO_ICMP, icmp(3, 13, quoted)))
	f.Add(ip4(target4, vantage4, unix.IPPROTO_UDP, ports(53, 61000, 0, 8, 0, 0), 1, 1, 1, 0))
	f.Add(ip6(target6, vantage6, unix.IPPROTO_HOPOPTS, []byte{44, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0}))
	f.Add(ip6(target6, vantage6, unix.IPPROTO_ICMPV6, icmp(1, 4, ip6(vantage6, target6, 17, ports(1, 2, 3, 4, 5, 6)))))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := slices.Clone(b)
		var r reply
		if parseReply(b, &r) && (!r.from.IsValid() || !r.to.IsValid()) {
			t.Error("an answer without addresses")
		}
		if !slices.Equal(b, before) {
			t.Error("the parser wrote to the packet")
		}
	})
}

// machine runs a filter on packets of one EtherType. The interpreter of package
// bpf knows no extensions, so the protocol is patched in.
func machine(t *testing.T, paths []Path, etherType uint32) func([]byte) bool {
	t.Helper()
	raw, err := answerFilter(paths)
	if err != nil {
		t.Fatal(err)
	}
	code, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("filter does not disassemble")
	}
	code[0] = bpf.LoadConstant{Dst: bpf.RegA, Val: etherType}
	vm, err := bpf.NewVM(code)
	if err != nil {
		t.Fatal(err)
	}
	return func(b []byte) bool {
		n, err := vm.Run(b)
		return err == nil && n > 0
	}
}

func TestAnswerFilter(t *testing.T) {
	two := testPaths()
	more := append(testPaths(), two[0], two[1])
	more[2].Src, more[3].Src = netip.MustParseAddr("10.9.200.1"), netip.MustParseAddr("fd09::ffff:0:1")
	more[2].SrcPort, more[3].SrcPort = 50, 62000
	out4, out6 := netip.MustParseAddr("10.10.0.1"), netip.MustParseAddr("fd0a::1")
	tcp := func(port uint16) []byte { return ports(443, port, make([]byte, 16)...) }
	for _, c := range []struct {
		name      string
		etherType uint32
		packet    []byte
		two, more bool
	}{
		{"ARP", unix.ETH_P_ARP, make([]byte, 60), false, false},
		{"probe port", unix.ETH_P_IP, ip4(target4, two[0].Src, 6, tcp(61000)), true, true},
		{"options", unix.ETH_P_IP, ip4(target4, two[0].Src, 6, tcp(61000), 1, 1, 1, 0), true, true},
		{"another path's port", unix.ETH_P_IP, ip4(target4, two[0].Src, 17, tcp(50)), false, true},
		{"canary port", unix.ETH_P_IP, ip4(target4, two[0].Src, 6, tcp(canaryPortHigh)), true, true},
		{"port above", unix.ETH_P_IP, ip4(target4, two[0].Src, 6, tcp(62001)), false, false},
		{"port between", unix.ETH_P_IP, ip4(target4, two[0].Src, 6, tcp(canaryPortHigh+1)), false, true},
		{"other path's address", unix.ETH_P_IP, ip4(target4, more[2].Src, 6, tcp(61000)), false, true},
		{"stranger's address", unix.ETH_P_IP, ip4(target4, out4, 6, tcp(61000)), false, false},
		{"unreachable", unix.ETH_P_IP, ip4(out4, two[0].Src, 1, icmp(3, 1, nil)), true, true},
		{"echo reply", unix.ETH_P_IP, ip4(target4, two[0].Src, 1, icmp(0, 0, nil)), true, true},
		{"echo request", unix.ETH_P_IP, ip4(target4, two[0].Src, 1, icmp(8, 0, nil)), false, false},
		{"GRE", unix.ETH_P_IP, ip4(target4, two[0].Src, 47, tcp(61000)), false, false},
		{"probe port, IPv6", unix.ETH_P_IPV6, ip6(target6, two[1].Src, 6, tcp(61001)), true, true},
		{"port below, IPv6", unix.ETH_P_IPV6, ip6(target6, two[1].Src, 17, tcp(49)), false, false},
		{"other path's address, IPv6", unix.ETH_P_IPV6, ip6(target6, more[3].Src, 6, tcp(61001)), false, true},
		{"stranger's address, IPv6", unix.ETH_P_IPV6, ip6(target6, out6, 6, tcp(61001)), false, false},
		{"unreachable, IPv6", unix.ETH_P_IPV6, ip6(out6, two[1].Src, 58, icmp(1, 4, nil)), true, true},
		{"echo reply, IPv6", unix.ETH_P_IPV6, ip6(target6, two[1].Src, 58, icmp(129, 0, nil)), true, true},
		{"solicitation", unix.ETH_P_IPV6, ip6(target6, two[1].Src, 58, icmp(135, 0, nil)), false, false},
		{"extension header", unix.ETH_P_IPV6, ip6(target6, two[1].Src, 0, make([]byte, 8)), true, true},
	} {
		if got := machine(t, two, c.etherType)(c.packet); got != c.two {
			t.Errorf("%s, two paths: got %v", c.name, got)
		}
		if got := machine(t, more, c.etherType)(c.packet); got != c.more {
			t.Errorf("%s, four paths: got %v", c.name, got)
		}
	}
	if machine(t, two[:1], unix.ETH_P_IPV6)(ip6(target6, two[1].Src, 6, tcp(61001))) {
		t.Error("IPv6 passes though there is no path of it")
	}
}
