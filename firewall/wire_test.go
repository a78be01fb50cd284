package firewall

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// patience bounds every wait: long enough for a starved machine, since nothing
// waits that long unless something is broken.
const patience = 10 * time.Second

// The host of every wire: an address of each family, and two more.
var (
	host4  = netip.MustParseAddr("192.0.2.1")
	host6  = netip.MustParseAddr("2001:db8::1")
	other4 = netip.MustParseAddr("192.0.2.2")
	other6 = netip.MustParseAddr("2001:db8::2")
	third4 = netip.MustParseAddr("192.0.2.3")
	third6 = netip.MustParseAddr("2001:db8::3")
)

// failer is what tests and properties fail by.
type failer interface {
	Helper()
	Fatalf(format string, args ...any)
	Cleanup(func())
}

// wire is a throw-away host, a wire to it, and a witness that shares no code
// with us: a table of the nft program that notes which packets the kernel let
// through to the host.
type wire struct {
	failer
	*verify.World
	conn    *Conn
	socket  int // AF_PACKET, outside
	id      uint16
	port    uint16 // counts the flows of effects
	sent    int    // packets
	batches int
}

// witnessTable tells packets by the identification of IPv4 and the low half of
// the flow label of IPv6: unlike ports and ICMP ids, every packet of every
// protocol and flow has one of its own. The sentinel ends before any rule of
// ours: that it was counted says that all before it are done with.
const witnessTable = `
table inet witness {
	counter left { }
	counter arrived { }
	counter sentinel { }
	set seen4 { typeof ip id; size 65535; }
	set seen6 { typeof ip6 length; size 65535; }
	chain arrive {
		type filter hook prerouting priority -310; policy accept;
		ip saddr 198.18.255.255 udp sport 9 udp dport 9 counter name sentinel drop
		iifname != "lo" counter name arrived
	}
	chain onward {
		type filter hook forward priority 1073741824; policy accept;
		meta nfproto ipv4 add @seen4 { ip id }
		meta nfproto ipv6 add @seen6 { @nh,16,16 }
	}
	chain leave {
		type filter hook output priority 1073741824; policy accept;
		oifname != "lo" meta l4proto != { icmp, icmpv6, igmp } counter name left
	}
	chain pass {
		type filter hook input priority 1073741824; policy accept;
		meta nfproto ipv4 add @seen4 { ip id }
		meta nfproto ipv6 add @seen6 { @nh,16,16 }
	}
}
`

// newWire makes a host with these interfaces, eth0 if none is named.
func newWire(t failer, links ...string) *wire {
	t.Helper()
	if len(links) == 0 {
		links = []string{"eth0"}
	}
	w := &wire{failer: t, socket: -1}
	var err error
	if w.World, err = verify.NewWorld(verify.WorldConfig{
		Host4: host4, Host6: host6, More: []netip.Addr{other4, other6, third4, third6}, Links: links,
	}); err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(w.close)
	if w.socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		t.Fatalf("packet socket: %v", err)
	}
	w.inHost(func() error {
		w.conn, err = Dial(nil)
		return err
	})
	w.script(witnessTable)
	return w
}

func (w *wire) close() {
	if w.conn != nil {
		w.conn.Close()
	}
	if w.socket >= 0 {
		unix.Close(w.socket)
	}
	w.World.Close()
}

// inHost runs fn inside the host; an error ends the test on its own goroutine.
func (w *wire) inHost(fn func() error) {
	w.Helper()
	if err := w.Host(fn); err != nil {
		w.Fatalf("%v", err)
	}
}

// run runs a program inside the host and gives what it printed.
func (w *wire) run(stdin string, argv ...string) string {
	w.Helper()
	var out bytes.Buffer
	w.inHost(func() error {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w\n%s%s", strings.Join(argv, " "), err, out.Bytes(), stdin)
		}
		return nil
	})
	return out.String()
}

// script loads nft text inside the host.
func (w *wire) script(text string) {
	w.Helper()
	w.run(text, "nft", "-f", "-")
}

// apply makes the kernel hold a ruleset.
func (w *wire) apply(rs *rules.Ruleset) Result {
	w.Helper()
	var res Result
	w.inHost(func() error {
		var err error
		res, err = w.conn.Apply(rs)
		return err
	})
	return res
}

// packet is a packet that the outside sends, by the interface In.
type packet struct {
	rules.Packet
	id       uint16
	flags    byte // of TCP
	seq, ack uint32
	code     byte   // of ICMP
	body     []byte // behind the header of layer 4
	badSum   bool
	behind   *rules.Protocol // an extension header that stands before Protocol
}

// Bits of TCP flags (RFC 9293 3.1).
const (
	fin = 1 << 0
	syn = 1 << 1
	rst = 1 << 2
	ack = 1 << 4
)

// checksum is the Internet checksum (RFC 1071) of the parts, each of which but
// the last is even in length.
func checksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(b[0])<<8 | uint32(b[1])
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// transport writes the header of layer 4 and what is behind it.
func (p *packet) transport() []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, p.SrcPort), p.DstPort)
	pseudo := func(n int) []byte {
		b := append(p.Src.AsSlice(), p.Dst.AsSlice()...)
		return append(binary.BigEndian.AppendUint32(b, uint32(n)), 0, 0, 0, byte(p.Protocol))
	}
	var b []byte
	sum := -1 // where the checksum stands
	switch v4 := p.Src.Is4(); {
	case p.Protocol == rules.TCP:
		b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(ports, p.seq), p.ack)
		b = append(b, 5<<4, p.flags, 0x40, 0, 0, 0, 0, 0)
		sum = 16
	case p.Protocol == rules.UDP:
		b = binary.BigEndian.AppendUint16(ports, uint16(8+len(p.body)))
		b = append(b, 0, 0)
		sum = 6
	case p.Protocol == rules.SCTP: // an INIT (RFC 9260 3.3.2) with a tag of 0 in front
		b = append(ports, 0, 0, 0, 0, 0, 0, 0, 0)
		b = append(b, 1, 0, 0, 20, 1, 2, 3, 4, 0, 0, 0x80, 0, 0, 1, 0, 1, 0, 0, 0, 1)
		b = append(b, p.body...)
		crc := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
		if p.badSum {
			crc++
		}
		binary.LittleEndian.PutUint32(b[8:], crc)
		return b
	case v4 && p.Protocol == rules.ICMPv4, !v4 && p.Protocol == rules.ICMPv6:
		b = append([]byte{p.ICMPType, p.code, 0, 0, byte(p.id >> 8), byte(p.id)}, 0, 1) // of echo: id and sequence
		sum = 2
	case p.Protocol == rules.IGMP: // a query to all (RFC 3376 4.1)
		b = []byte{0x11, 1, 0, 0, 0, 0, 0, 0}
		binary.BigEndian.PutUint16(b[2:], checksum(b))
	default:
		b = []byte{0, 0, 0, 0, 0, 0, 0, byte(p.id)}
	}
	b = append(b, p.body...)
	if sum < 0 {
		return b
	}
	c := checksum(pseudo(len(b)), b)
	if p.Protocol == rules.ICMPv4 {
		c = checksum(b)
	}
	if p.badSum {
		c ^= 0x5555
	}
	if c == 0 && p.Protocol == rules.UDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b[sum:], c)
	return b
}

// bytes is the packet from its IP header on.
func (p *packet) bytes() []byte {
	b, next := p.transport(), byte(p.Protocol)
	if p.behind != nil { // RFC 8200 4, RFC 4302 2
		header := []byte{next, 0, 0, 0, 0, 0, 0, 0}
		switch *p.behind {
		case rules.AH:
			header = append(header, 0, 0, 0, 1, 1, 2, 3, 4)
			header[1], header[7] = 2, 1
		case 0, 60:
			header[2], header[3] = 1, 4 // padding
		}
		b, next = append(header, b...), byte(*p.behind)
	}
	ttl := p.HopLimit
	if ttl == 0 {
		ttl = 64
	}
	var ip []byte
	if p.Src.Is4() {
		ip = append(ip, 0x45, 0)
		ip = binary.BigEndian.AppendUint16(ip, uint16(20+len(b)))
		ip = binary.BigEndian.AppendUint16(ip, p.id)
		ip = append(ip, 0, 0, ttl, next, 0, 0)
		ip = append(append(ip, p.Src.AsSlice()...), p.Dst.AsSlice()...)
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	} else {
		ip = append(ip, 0x60, 0)
		ip = binary.BigEndian.AppendUint16(ip, p.id)
		ip = binary.BigEndian.AppendUint16(ip, uint16(len(b)))
		ip = append(ip, next, ttl)
		ip = append(append(ip, p.Src.AsSlice()...), p.Dst.AsSlice()...)
	}
	return append(ip, b...)
}

func (p *packet) String() string {
	s := fmt.Sprintf("%s %s > %s by %s", p.Protocol, p.Src, p.Dst, p.In)
	switch p.Protocol {
	case rules.TCP, rules.UDP, rules.SCTP:
		s += fmt.Sprintf(" ports %d > %d", p.SrcPort, p.DstPort)
	case rules.ICMPv4, rules.ICMPv6:
		s += fmt.Sprintf(" type %d code %d hop limit %d", p.ICMPType, p.code, p.HopLimit)
	}
	if p.Protocol == rules.TCP {
		s += fmt.Sprintf(" flags %#02x", p.flags)
	}
	return s + [...]string{" new", " reply", " related", " invalid", " of a stranger's flow"}[p.Flow]
}

// frame wraps what stands from the IP header on for a link.
func frame(l verify.Link, ip []byte) []byte {
	f := append(slices.Clone([]byte(l.Dst)), l.Src...)
	kind := uint16(unix.ETH_P_IP)
	if ip[0]>>4 == 6 {
		kind = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(f, kind), ip...)
}

// sentinel is the packet that the witness takes for the last of a batch.
func sentinel(link string) *packet {
	return &packet{Packet: rules.Packet{In: link, Src: netip.MustParseAddr("198.18.255.255"), Dst: host4, Protocol: rules.UDP, SrcPort: 9, DstPort: 9}}
}

// send sends packets, gives each an id of its own, and returns when the host has
// done with all of them. One processor sends all and thus also receives all, in
// order (netif_rx keeps the processor).
func (w *wire) send(packets ...*packet) testimony {
	w.Helper()
	for _, p := range packets {
		w.id++
		p.id = w.id
	}
	return w.finish(packets)
}

// flood sends n packets, more than there are ids. A batch is no longer than what
// the kernel queues for a processor (net.core.netdev_max_backlog).
func (w *wire) flood(n int, one func(i int) *packet) {
	w.Helper()
	const batch = 512
	for i := 0; i < n; i += batch {
		var packets []*packet
		for k := i; k < min(n, i+batch); k++ {
			packets = append(packets, one(k))
		}
		w.finish(packets)
	}
}

// finish sends packets and waits until the host has done with them.
func (w *wire) finish(packets []*packet) testimony {
	w.Helper()
	if err := w.transmit(packets); err != nil {
		w.Fatalf("send: %v", err)
	}
	deadline := time.Now().Add(patience)
	for {
		n := w.read()
		if n.counters["sentinel"] == w.batches && n.counters["arrived"] >= w.sent {
			return n
		}
		if n.counters["sentinel"] >= w.batches || time.Now().After(deadline) {
			w.Fatalf("%d of %d packets arrived, %d of %d sentinels", n.counters["arrived"], w.sent, n.counters["sentinel"], w.batches)
		}
	}
}

// transmit puts packets on the wire, without waiting.
func (w *wire) transmit(packets []*packet) error {
	if len(packets) == 0 {
		return errors.New("no packets")
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with its one processor
		done <- func() error {
			var one unix.CPUSet
			if err := unix.SchedGetaffinity(0, &one); err != nil {
				return err
			}
			for i := range len(one) * 64 {
				if one.IsSet(i) {
					one.Zero()
					one.Set(i)
					break
				}
			}
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				return err
			}
			for _, p := range append(slices.Clone(packets), sentinel(packets[0].In)) {
				l := w.Link(p.In)
				if l.Index == 0 {
					return fmt.Errorf("no interface %q", p.In)
				}
				if err := unix.Sendto(w.socket, frame(l, p.bytes()), 0, &unix.SockaddrLinklayer{Ifindex: l.Index}); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	w.sent += len(packets)
	w.batches++
	return <-done
}

// testimony is what the witness knows.
type testimony struct {
	counters map[string]int
	through  map[uint16]bool // ids of the packets that were seen behind every filter
}

// read asks the witness.
func (w *wire) read() testimony {
	w.Helper()
	return w.readTable("witness")
}

// readTable reads the named counters and the sets of numbers of a table.
func (w *wire) readTable(name string) testimony {
	w.Helper()
	var list struct {
		Nftables []struct {
			Counter *struct {
				Name    string
				Packets int
			}
			Set *struct {
				Elem []json.RawMessage
			}
		}
	}
	if err := json.Unmarshal([]byte(w.run("", "nft", "-j", "list", "table", "inet", name)), &list); err != nil {
		w.Fatalf("read table %s: %v", name, err)
	}
	out := testimony{map[string]int{}, map[uint16]bool{}}
	for _, o := range list.Nftables {
		if o.Counter != nil {
			out.counters[o.Counter.Name] = o.Counter.Packets
		}
		if o.Set != nil {
			for _, e := range o.Set.Elem {
				if id, err := strconv.ParseUint(string(e), 10, 16); err == nil {
					out.through[uint16(id)] = true
				}
			}
		}
	}
	return out
}

// deliver sends packets and tells of each whether it got through.
func (w *wire) deliver(packets ...*packet) []bool {
	w.Helper()
	through := w.send(packets...).through
	out := make([]bool, len(packets))
	for i, p := range packets {
		out[i] = through[p.id]
	}
	return out
}

// answer is a packet that left the host, as the outside saw it.
type answer struct {
	rules.Packet
	code     byte
	flags    byte
	seq, ack uint32
}

// ear hears what leaves the host by a link.
type ear struct {
	w  *wire
	fd int
}

// listen hears what leaves by a link from now on.
func (w *wire) listen(link string) *ear {
	w.Helper()
	const every = uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.Fatalf("listen on %s: %v", link, err)
	}
	w.Cleanup(func() { unix.Close(fd) })
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20) // the default holds some hundred frames
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: every, Ifindex: w.Link(link).Index}); err != nil {
		w.Fatalf("listen on %s: %v", link, err)
	}
	return &ear{w, fd}
}

// next gives the next packet that left the host; false when there is none within
// the time.
func (e *ear) next(within time.Duration) (answer, bool) {
	e.w.Helper()
	buf := make([]byte, 1<<16)
	deadline := time.Now().Add(within)
	for {
		left := time.Until(deadline)
		if left < 0 {
			left = 0
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(e.fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			e.w.Fatalf("poll: %v", err)
		}
		if n == 0 {
			return answer{}, false
		}
		n, from, err := unix.Recvfrom(e.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			e.w.Fatalf("read frames: %v", err)
		}
		if l, ok := from.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING {
			if a, ok := parseAnswer(buf[:n]); ok {
				return a, true
			}
		}
	}
}

// await gives the first packet that is as wanted.
func (e *ear) await(what string, wanted func(a answer) bool) answer {
	e.w.Helper()
	deadline := time.Now().Add(patience)
	for {
		a, ok := e.next(time.Until(deadline))
		if !ok {
			e.w.Fatalf("no %s came", what)
		}
		if wanted(a) {
			return a
		}
	}
}

func parseAnswer(f []byte) (answer, bool) {
	if len(f) < 14+20 {
		return answer{}, false
	}
	ip := f[14:]
	var a answer
	var b []byte
	switch {
	case ip[0]>>4 == 4:
		b = ip[int(ip[0]&15)*4:]
		a.Src, a.Dst = netip.AddrFrom4([4]byte(ip[12:16])), netip.AddrFrom4([4]byte(ip[16:20]))
		a.Protocol = rules.Protocol(ip[9])
	case ip[0]>>4 == 6 && len(ip) >= 40:
		b = ip[40:]
		a.Src, a.Dst = netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40]))
		a.Protocol = rules.Protocol(ip[6])
	default:
		return answer{}, false
	}
	if len(b) < 4 {
		return answer{}, false
	}
	a.SrcPort, a.DstPort = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	a.ICMPType, a.code = b[0], b[1]
	if a.Protocol == rules.TCP && len(b) >= 20 {
		a.flags, a.seq, a.ack = b[13], binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:])
	}
	return a, true
}

// answers reports whether a is what p makes the host send back over TCP or UDP.
func (a *answer) answers(p *packet) bool {
	return a.Protocol == p.Protocol && a.Src == p.Dst && a.Dst == p.Src && a.SrcPort == p.DstPort && a.DstPort == p.SrcPort
}
