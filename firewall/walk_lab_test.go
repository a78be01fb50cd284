package firewall

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// lab is a host with one interface on a wire, where the test is the outside: it
// puts frames on the wire and sees by counters what became of them. The kernel
// itself is thus the judge of the walk.
type lab struct {
	t    *testing.T
	c    *Conn
	fd   int
	mac  net.HardwareAddr
	port uint16 // the next source port that no packet has used
}

const labInterface = "eth0"

func labAddress(v4 bool) netip.Addr {
	if v4 {
		return netip.MustParseAddr("192.0.2.1")
	}
	return netip.MustParseAddr("2001:db8::1")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newLab is to be called inNamespace.
func newLab(t *testing.T) *lab {
	t.Helper()
	for name, value := range map[string]string{
		"ipv4/icmp_ratelimit": "0", "ipv6/icmp/ratelimit": "0", "ipv4/icmp_msgs_per_sec": "1000000", "ipv4/icmp_msgs_burst": "1000000",
		"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0", "ipv4/ip_forward": "1", "ipv6/conf/default/accept_dad": "0",
		"ipv6/conf/all/forwarding": "1",
	} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644); err != nil {
			t.Logf("sysctl %s: %v", name, err)
		}
	}
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: labInterface}, PeerName: "outside"}))
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}, PeerName: "inside"}))
	for _, name := range []string{"lo", "outside", labInterface, "docker0", "inside"} {
		l, err := netlink.LinkByName(name)
		must(t, err)
		must(t, netlink.LinkSetUp(l))
	}
	host, err := netlink.LinkByName(labInterface)
	must(t, err)
	bridge, err := netlink.LinkByName("docker0")
	must(t, err)
	add := func(l netlink.Link, s string) {
		a, err := netlink.ParseAddr(s)
		must(t, err)
		a.Flags = unix.IFA_F_NODAD
		if strings.Contains(s, ".") {
			a.Flags = 0
		}
		must(t, netlink.AddrAdd(l, a))
	}
	add(host, "192.0.2.1/24")
	add(host, "2001:db8::1/64")
	add(bridge, "172.17.0.1/16")
	add(bridge, "fd00:17::1/64")
	for _, dst := range []string{"10.0.0.0/8", "198.51.100.0/24", "2001:db8:6::/48"} {
		_, n, err := net.ParseCIDR(dst)
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: host.Attrs().Index, Dst: n, Scope: netlink.SCOPE_LINK}))
	}
	out, err := netlink.LinkByName("outside")
	must(t, err)
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: out.Attrs().Index}))
	l := &lab{t: t, c: dial(t), fd: fd, mac: host.Attrs().HardwareAddr, port: 20000}
	l.load(`
table inet witness {
	counter arrived {}
	counter accepted {}
	counter refused {}
	chain first {
		type filter hook prerouting priority -1073741824
		iifname "eth0" counter name arrived
	}
	chain last {
		type filter hook input priority 1073741824
		iifname "eth0" counter name accepted
	}
	chain through {
		type filter hook forward priority 1073741824
		iifname "eth0" counter name accepted
	}
	chain answer {
		type filter hook output priority -1073741824
		tcp flags & rst == rst counter name refused
		icmp type destination-unreachable counter name refused
		icmpv6 type destination-unreachable counter name refused
	}
}`)
	return l
}

func (l *lab) load(text string) {
	l.t.Helper()
	file := filepath.Join(l.t.TempDir(), "rules.nft")
	must(l.t, os.WriteFile(file, []byte(text), 0o600))
	nft(l.t, "-f", file)
}

type counts struct{ arrived, accepted, refused uint64 }

func (l *lab) counts() counts {
	l.t.Helper()
	var out counts
	err := l.c.ask(unix.NFT_MSG_GETOBJ, unix.NLM_F_DUMP, unix.NFPROTO_INET, attrString(nil, unix.NFTA_OBJ_TABLE, "witness"), func(r reply) error {
		n := value64(attrOf(attrOf(r.attrs, unix.NFTA_OBJ_DATA), unix.NFTA_COUNTER_PACKETS))
		if attrText(r.attrs, unix.NFTA_OBJ_TABLE) == "witness" {
			switch attrText(r.attrs, unix.NFTA_OBJ_NAME) {
			case "arrived":
				out.arrived = n
			case "accepted":
				out.accepted = n
			case "refused":
				out.refused = n
			}
		}
		return nil
	})
	must(l.t, err)
	return out
}

// kernel sends the packet and says what the kernel did.
func (l *lab) kernel(p rules.Packet) Verdict {
	l.t.Helper()
	before := l.counts()
	_, err := unix.Write(l.fd, l.frame(p))
	must(l.t, err)
	var now counts
	for range 1000 {
		if now = l.counts(); now.arrived > before.arrived {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if now.arrived == before.arrived {
		l.t.Fatalf("%v did not arrive", p)
	}
	if now.accepted == before.accepted && now.refused == before.refused {
		time.Sleep(time.Millisecond) // counted first, judged right after
		now = l.counts()
	}
	switch {
	case now.accepted > before.accepted:
		return WalkAccept // a closed port then answers by itself
	case now.refused > before.refused:
		return WalkReject
	}
	return WalkDrop
}

// tcp, udp and echo are packets from outside to this host.
func (l *lab) to(proto rules.Protocol, port uint16, src string) rules.Packet {
	a := netip.MustParseAddr(src)
	l.port++
	p := rules.Packet{In: labInterface, Src: a, Dst: labAddress(a.Is4()), Protocol: proto, HopLimit: 64}
	switch proto {
	case rules.ICMPv4:
		p.ICMPType = 8
	case rules.ICMPv6:
		p.ICMPType = 128
	default:
		p.SrcPort, p.DstPort = l.port, port
	}
	return p
}

func sum(b []byte, s uint32) uint32 {
	for i := 0; i+1 < len(b); i += 2 {
		s += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		s += uint32(b[len(b)-1]) << 8
	}
	return s
}

func folded(s uint32) uint16 {
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// frame builds the packet as it goes over the wire.
func (l *lab) frame(p rules.Packet) []byte {
	be := binary.BigEndian
	var l4 []byte
	at := 0 // of the checksum
	switch p.Protocol {
	case rules.TCP:
		l4 = make([]byte, 20)
		l4[12], l4[13] = 5<<4, 0x02
		l4[14] = 4
		be.PutUint32(l4[4:], 77777)
		at = 16
	case rules.UDP:
		l4 = make([]byte, 12)
		be.PutUint16(l4[4:], 12)
		at = 6
	default:
		l4 = make([]byte, 8)
		l4[0] = p.ICMPType
		be.PutUint16(l4[4:], l.port)
		at = 2
	}
	if hasPorts(p.Protocol) {
		be.PutUint16(l4, p.SrcPort)
		be.PutUint16(l4[2:], p.DstPort)
	}
	pseudo := append(append([]byte{}, p.Src.AsSlice()...), p.Dst.AsSlice()...)
	pseudo = append(pseudo, 0, byte(p.Protocol), 0, byte(len(l4)))
	if p.Protocol == rules.ICMPv4 {
		pseudo = nil
	}
	be.PutUint16(l4[at:], folded(sum(l4, sum(pseudo, 0))))
	eth := append(append([]byte{}, l.mac...), 2, 0, 0, 0, 0, 9)
	if p.Src.Is4() {
		h := make([]byte, 20)
		h[0], h[8], h[9] = 0x45, p.HopLimit, byte(p.Protocol)
		be.PutUint16(h[2:], uint16(20+len(l4)))
		copy(h[12:], p.Src.AsSlice())
		copy(h[16:], p.Dst.AsSlice())
		be.PutUint16(h[10:], folded(sum(h, 0)))
		return append(append(append(eth, 8, 0), h...), l4...)
	}
	h := make([]byte, 40)
	h[0], h[6], h[7] = 0x60, byte(p.Protocol), p.HopLimit
	be.PutUint16(h[4:], uint16(len(l4)))
	copy(h[8:], p.Src.AsSlice())
	copy(h[24:], p.Dst.AsSlice())
	return append(append(append(eth, 0x86, 0xdd), h...), l4...)
}

// walk says what the walk says.
func (l *lab) walk(p rules.Packet) *Journey {
	l.t.Helper()
	j, err := l.c.Walk(p)
	must(l.t, err)
	return j
}

// agree holds the walk against the kernel and gives the journey.
func (l *lab) agree(p rules.Packet) *Journey {
	l.t.Helper()
	j := l.walk(p)
	if got := l.kernel(p); got != j.Verdict {
		l.t.Errorf("%+v: walk says %s, the kernel did %s\n%s", p, j.Verdict, got, tell(j))
	}
	return j
}

func tell(j *Journey) string {
	var b strings.Builder
	for _, s := range j.Steps {
		b.WriteString("  " + s.Hook + ": " + s.String() + "\n")
	}
	b.WriteString("  by " + j.By.String() + "\n")
	for _, n := range j.Notes {
		b.WriteString("  note " + n + "\n")
	}
	return b.String()
}
