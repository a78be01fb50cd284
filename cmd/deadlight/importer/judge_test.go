package importer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// The kernel is the judge: the original is loaded into one throw-away host and
// the imported policy into another, and both get the same packets.

var (
	host4  = netip.MustParseAddr("192.0.2.1")
	host6  = netip.MustParseAddr("2001:db8::1")
	other4 = netip.MustParseAddr("192.0.2.2")
	other6 = netip.MustParseAddr("2001:db8::2")
)

func judgeLinks() []string { return []string{"eth0", "eth1", "wg0"} }

// witness notes which packets the kernel lets through to the host, by the
// identification of IPv4 and the flow label of IPv6.
const witness = `
table inet witness {
	counter sentinel { }
	set seen4 { typeof ip id; size 65535; }
	set seen6 { typeof ip6 length; size 65535; }
	chain arrive {
		type filter hook prerouting priority -310; policy accept;
		ip saddr 198.18.255.255 udp sport 9 udp dport 9 counter name sentinel drop
	}
	chain pass {
		type filter hook input priority 1073741824; policy accept;
		meta nfproto ipv4 add @seen4 { ip id }
		meta nfproto ipv6 add @seen6 { @nh,16,16 }
	}
}
`

func judgeHost(t *testing.T) *verify.World {
	t.Helper()
	if !verify.Isolated() {
		t.Skip("no rules are loaded while the fuzzer runs")
	}
	w, err := verify.NewWorld(verify.WorldConfig{Host4: host4, Host6: host6, More: []netip.Addr{other4, other6}, Links: judgeLinks()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func inHost(t *testing.T, w *verify.World, stdin string, argv ...string) []byte {
	t.Helper()
	var out []byte
	if err := w.Host(func() error {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		var err error
		if out, err = cmd.Output(); err != nil {
			return fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, errs.String())
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

type judged struct {
	rules.Packet
	id uint16
}

func (p *judged) String() string {
	return fmt.Sprintf("%s %s > %s by %s, ports %d > %d, type %d", p.Protocol, p.Src, p.Dst, p.In, p.SrcPort, p.DstPort, p.ICMPType)
}

func sum16(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(b[0])<<8 | uint32(b[1])
		}
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// bytes is the packet from its IP header on.
func (p *judged) bytes() []byte {
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, p.SrcPort), p.DstPort)
	var b []byte
	sum := -1
	switch p.Protocol {
	case rules.TCP:
		b = append(ports, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2, 0x40, 0, 0, 0, 0, 0)
		sum = 16
	case rules.UDP:
		b = append(ports, 0, 8, 0, 0)
		sum = 6
	case rules.ICMPv4, rules.ICMPv6:
		b = []byte{p.ICMPType, 0, 0, 0, byte(p.id >> 8), byte(p.id), 0, 1}
		sum = 2
	default:
		b = []byte{0, 0, 0, 0, 0, 0, 0, byte(p.id)}
	}
	if sum > 0 {
		pseudo := binary.BigEndian.AppendUint32(append(p.Src.AsSlice(), p.Dst.AsSlice()...), uint32(len(b)))
		pseudo = append(pseudo, 0, 0, 0, byte(p.Protocol))
		if p.Protocol == rules.ICMPv4 {
			pseudo = nil
		}
		binary.BigEndian.PutUint16(b[sum:], sum16(pseudo, b))
	}
	if p.Src.Is4() {
		ip := binary.BigEndian.AppendUint16([]byte{0x45, 0}, uint16(20+len(b)))
		ip = append(binary.BigEndian.AppendUint16(ip, p.id), 0, 0, 64, byte(p.Protocol), 0, 0)
		ip = append(append(ip, p.Src.AsSlice()...), p.Dst.AsSlice()...)
		binary.BigEndian.PutUint16(ip[10:], sum16(ip))
		return append(ip, b...)
	}
	ip := binary.BigEndian.AppendUint16([]byte{0x60, 0}, p.id)
	ip = append(binary.BigEndian.AppendUint16(ip, uint16(len(b))), byte(p.Protocol), 64)
	return append(append(append(ip, p.Src.AsSlice()...), p.Dst.AsSlice()...), b...)
}

// deliver sends packets and tells of each whether it got through.
func deliver(t *testing.T, w *verify.World, list []*judged) []bool {
	t.Helper()
	end := &judged{Packet: rules.Packet{In: "eth0", Src: netip.MustParseAddr("198.18.255.255"), Dst: host4, Protocol: rules.UDP, SrcPort: 9, DstPort: 9}}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: one processor sends all and receives all, in order
		done <- func() error {
			var cpus unix.CPUSet
			if err := unix.SchedGetaffinity(0, &cpus); err != nil {
				return err
			}
			for i := range len(cpus) * 64 {
				if cpus.IsSet(i) {
					cpus.Zero()
					cpus.Set(i)
					break
				}
			}
			if err := unix.SchedSetaffinity(0, &cpus); err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			for _, p := range append(append([]*judged{}, list...), end) {
				l := w.Link(p.In)
				kind := uint16(unix.ETH_P_IP)
				if !p.Src.Is4() {
					kind = unix.ETH_P_IPV6
				}
				f := binary.BigEndian.AppendUint16(append(append([]byte{}, l.Dst...), l.Src...), kind)
				if err := unix.Sendto(fd, append(f, p.bytes()...), 0, &unix.SockaddrLinklayer{Ifindex: l.Index}); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	if err := <-done; err != nil {
		t.Fatalf("send: %v", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		sentinel, seen := testimony(t, w)
		if sentinel > 0 {
			out := make([]bool, len(list))
			for i, p := range list {
				out[i] = seen[p.id]
			}
			return out
		}
		if time.Now().After(deadline) {
			t.Fatal("the packets do not arrive")
		}
	}
}

func testimony(t *testing.T, w *verify.World) (int, map[uint16]bool) {
	t.Helper()
	var list struct {
		Nftables []struct {
			Counter *struct{ Packets int }
			Set     *struct{ Elem []json.RawMessage }
		}
	}
	if err := json.Unmarshal(inHost(t, w, "", "nft", "-j", "list", "table", "inet", "witness"), &list); err != nil {
		t.Fatal(err)
	}
	sentinel, seen := 0, map[uint16]bool{}
	for _, o := range list.Nftables {
		if o.Counter != nil {
			sentinel = o.Counter.Packets
		}
		if o.Set != nil {
			for _, e := range o.Set.Elem {
				if id, err := strconv.ParseUint(string(e), 10, 16); err == nil {
					seen[uint16(id)] = true
				}
			}
		}
	}
	return sentinel, seen
}

// edges are the addresses and ports that a text names, and their neighbours.
func edges(text string) (sources []netip.Addr, ports []uint16) {
	for _, m := range regexp.MustCompile(`[0-9a-fA-F:.]+(/\d+)?`).FindAllString(text, -1) {
		if i, ok := oneAddress(m); ok {
			for _, a := range []netip.Addr{i.lo.Prev(), i.lo, i.hi, i.hi.Next()} {
				if mayCome(a) {
					sources = append(sources, a)
				}
			}
		}
		if n, err := strconv.Atoi(m); err == nil && n > 0 && n < 65535 {
			ports = append(ports, uint16(n-1), uint16(n), uint16(n+1))
		}
	}
	for _, m := range regexp.MustCompile(`\b\d{1,5}\b`).FindAllString(text, -1) {
		if n, err := strconv.Atoi(m); err == nil && n > 1 && n < 65535 {
			ports = append(ports, uint16(n))
		}
	}
	for _, name := range regexp.MustCompile(`service = .*`).FindAllString(text, -1) {
		for _, s := range regexp.MustCompile(`"([^"]+)"`).FindAllStringSubmatch(name, -1) {
			for _, on := range rules.ServicePorts(s[1]) {
				for _, r := range on.Ports {
					ports = append(ports, r.Lo)
				}
			}
		}
	}
	for _, s := range []string{"198.51.100.77", "10.9.1.1", "2001:db8:77::7", "fd00::7"} {
		sources = append(sources, netip.MustParseAddr(s))
	}
	return sources, append(ports, 22, 80, 443, 1, 65535)
}

// mayCome reports whether the kernel takes packets from an address.
func mayCome(a netip.Addr) bool {
	switch {
	case !a.IsValid() || a == host4 || a == host6 || a == other4 || a == other6:
		return false
	case a.Is4():
		b := a.As4()
		return b[0] > 0 && b[0] != 127 && b[0] < 224 && a != netip.MustParseAddr("198.18.255.255")
	}
	return netip.MustParsePrefix("2000::/3").Contains(a) || netip.MustParsePrefix("fc00::/7").Contains(a) || netip.MustParsePrefix("fe80::/10").Contains(a)
}

// packets makes packets that begin flows. TCP goes to the host's own addresses
// only: the kernel hands it nothing else.
func packets(r *rand.Rand, text string, n int) []*judged {
	sources, ports := edges(text)
	pick := func(list []netip.Addr) netip.Addr { return list[r.IntN(len(list))] }
	var out []*judged
	for i := range n {
		p := &judged{id: uint16(i + 1)}
		p.In = judgeLinks()[r.IntN(len(judgeLinks()))]
		p.Src = pick(sources)
		hosts, many, icmp := []netip.Addr{host6, host6, other6}, []string{"ff02::1"}, rules.ICMPv6
		if p.Src.Is4() {
			hosts, many, icmp = []netip.Addr{host4, host4, other4}, []string{"224.0.0.1", "255.255.255.255"}, rules.ICMPv4
		}
		p.Dst = pick(hosts)
		p.SrcPort = uint16(1024 + r.IntN(60000))
		p.DstPort = ports[r.IntN(len(ports))]
		switch k := r.IntN(20); {
		case k < 9:
			p.Protocol = rules.TCP
		case k < 16:
			p.Protocol = rules.UDP
			if r.IntN(8) == 0 {
				p.SrcPort = []uint16{53, 67, 123, 547}[r.IntN(4)]
			}
			if r.IntN(6) == 0 {
				p.Dst = netip.MustParseAddr(many[r.IntN(len(many))])
			}
			if r.IntN(20) == 0 {
				p.SrcPort, p.DstPort = 67, 68
				if !p.Src.Is4() {
					p.SrcPort, p.DstPort, p.Src = 547, 546, netip.MustParseAddr("fe80::9")
				}
			}
		case k < 18:
			p.Protocol, p.ICMPType = icmp, map[rules.Protocol]uint8{rules.ICMPv4: 8, rules.ICMPv6: 128}[icmp]
			if r.IntN(4) == 0 {
				p.ICMPType = map[rules.Protocol]uint8{rules.ICMPv4: 13, rules.ICMPv6: 139}[icmp]
			}
		default:
			p.Protocol = []rules.Protocol{rules.ESP, rules.GRE, rules.VRRP}[r.IntN(3)]
		}
		out = append(out, p)
	}
	return out
}

// original loads what a fixture imports.
func (f *fixture) original(t *testing.T, w *verify.World) {
	t.Helper()
	switch format, _, _ := strings.Cut(f.name, "/"); format {
	case "iptables":
		for _, name := range f.args {
			text := f.file(name)
			for _, part := range splitFamilies(source{name, text}, "") {
				inHost(t, w, string(part.data), map[int]string{4: "iptables-nft-restore", 6: "ip6tables-nft-restore"}[part.family])
			}
		}
	case "ufw":
		defaults := string(f.file("etc/default/ufw"))
		policies := map[string]string{"INPUT": "DROP", "OUTPUT": "ACCEPT", "FORWARD": "DROP"}
		for k := range policies {
			if m := regexp.MustCompile(`(?m)^DEFAULT_` + k + `_POLICY="?(\w+)`).FindStringSubmatch(defaults); m != nil {
				policies[k] = m[1]
			}
		}
		for six, program := range map[string]string{"": "iptables-nft-restore", "6": "ip6tables-nft-restore"} {
			on := six == "" || !strings.Contains(defaults, "IPV6=no")
			inHost(t, w, ufwFrame("ufw"+six, policies, on), program, "-n")
			if !on {
				continue
			}
			for _, pattern := range ufwFiles() {
				if text := f.file("etc/ufw/" + fmt.Sprintf(pattern, six)); text != nil {
					inHost(t, w, string(text), program, "-n")
				}
			}
			var hooks strings.Builder
			for _, h := range []string{"input", "output", "forward"} {
				fmt.Fprintf(&hooks, "-A ufw%s-before-%s -j ufw%s-user-%s\n", six, h, six, h)
			}
			inHost(t, w, "*filter\n"+hooks.String()+"COMMIT\n", program, "-n")
		}
	default: // as nft text
		inHost(t, w, string(f.file("ruleset.nft")), "nft", "-f", "-")
	}
}

const judgePackets = 1500

// What the policy admits, the original admitted; what it does not admit of that
// is in the notes.
func TestImportNeverAdmitsMore(t *testing.T) {
	total := map[string]int{}
	for _, f := range fixtures(t) {
		if f.file("error") != nil || strings.Contains(string(f.Comment), "not judged:") {
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			f.unpack(t)
			policy, notes, err := f.imported(t)
			if err != nil {
				t.Fatal(err)
			}
			parsed, problems := rules.Parse("policy.toml", []byte(policy), nil)
			if parsed == nil {
				t.Fatalf("%v", problems)
			}
			compiled := rules.Compile(parsed)
			text := policy
			for _, file := range f.Files {
				if file.Name != "notes" && file.Name != "ruleset.json" {
					text += string(file.Data)
				}
			}
			list := packets(rand.New(rand.NewPCG(20261121, uint64(len(text)))), text, judgePackets)

			before, after := judgeHost(t), judgeHost(t)
			f.original(t, before)
			if err := after.Host(func() error {
				c, err := firewall.Dial(nil)
				if err != nil {
					return err
				}
				defer c.Close()
				_, err = c.Apply(compiled)
				return err
			}); err != nil {
				t.Fatal(err)
			}
			inHost(t, before, witness, "nft", "-f", "-")
			inHost(t, after, witness, "nft", "-f", "-")
			was, is := deliver(t, before, list), deliver(t, after, list)
			lost := 0
			for i, p := range list {
				d := compiled.Decide(p.Packet)
				switch {
				case is[i] && d.Outcome != rules.OutcomeOpen:
					t.Errorf("%s: in, though the policy says %s", p, d.Outcome)
				case d.Limited:
					total["limited"]++
				case is[i] && !was[i]:
					t.Errorf("%s: in by %s %q, and the original denies it", p, d.Kind, d.Rule)
				case was[i] && !is[i]:
					lost++
					total["left shut"]++
					if len(notes) == 0 {
						t.Errorf("%s: out, and nothing says so", p)
					}
				case is[i]:
					total["in"]++
				default:
					total["out"]++
				}
			}
			if t.Failed() {
				t.Logf("policy:\n%s", policy)
			}
		})
	}
	t.Logf("packets: %v", total)
	if total["in"] == 0 || total["out"] == 0 {
		t.Error("nothing was admitted, or everything: the test proves nothing")
	}
}
