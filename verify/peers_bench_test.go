package verify

// How long other scanners take for what a sweep does, and how often they are
// wrong. Every tool sees the same host in the same run:
//
//	go test ./verify -run '^$' -bench Peers -benchtime 10x -timeout 60m
//
// The number of runs is ours; a peer runs once a row.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// stage is a host with what every port of it truly is.
type stage struct {
	*world
	gateway net.HardwareAddr // that answers for the host on the vantage's wire
	truth   func(port uint16) State
}

// manyHosts is the host under 65,536 addresses: zmap asks one port of many
// hosts, others many ports of one. Those in quiet are silent.
var (
	manyHosts = netip.MustParsePrefix("10.8.0.0/16")
	zmapPort  = uint16(4321)
)

var peerRows = []struct {
	name  string
	lossy bool
	busy  bool
	input []string // nil: no firewall
	truth func(port uint16) State
	zmap  func(i uint16) bool // whether this address of manyHosts answers
}{
	{name: "silent", input: []string{"tcp dport 22 accept"},
		truth: func(p uint16) State { return pick(p == 22, Closed, Filtered) }, zmap: func(uint16) bool { return false }},
	{name: "open",
		truth: func(p uint16) State { return pick(p >= 5000 && p < 5010, Open, Closed) }, zmap: func(uint16) bool { return true }},
	{name: "mixed", input: mixedRules, truth: mixedTruth, zmap: mixedZmap},
	{name: "lossy", lossy: true, input: mixedRules, truth: mixedTruth, zmap: mixedZmap},
	{name: "lossy-silent", lossy: true, input: []string{"tcp dport 22 accept"},
		truth: func(p uint16) State { return pick(p == 22, Closed, Filtered) }, zmap: func(uint16) bool { return false }},
	{name: "busy", busy: true,
		truth: func(p uint16) State { return pick(p >= 5000 && p < 5010, Open, Closed) }, zmap: func(uint16) bool { return true }},
	{name: "busy-mixed", busy: true, input: mixedRules, truth: mixedTruth, zmap: mixedZmap},
}

var mixedRules = []string{"ip daddr 10.8.0.0/17 accept", "ip daddr 10.8.128.0/17 drop", "tcp dport & 0x7 == 0 accept"}

func mixedTruth(p uint16) State {
	if p&7 != 0 {
		return Filtered
	}
	return pick(p >= 5000 && p < 5010, Open, Closed)
}

func mixedZmap(i uint16) bool { return i < 1<<15 }

func pick(which bool, yes, no State) State {
	if which {
		return yes
	}
	return no
}

// peerResult is one tool in one row.
type peerResult struct {
	name  string
	times []time.Duration
	wrong int // verdicts, over all runs
	err   error
}

func (r *peerResult) median() time.Duration {
	t := slices.Clone(r.times)
	slices.Sort(t)
	if len(t) == 0 {
		return 0
	}
	return t[len(t)/2]
}

func BenchmarkPeers(b *testing.B) {
	for _, row := range peerRows {
		var others []*peerResult
		b.Run(row.name, func(b *testing.B) {
			s := newStage(b, row.lossy)
			s.truth = row.truth
			if row.input != nil {
				s.gate(row.input...)
			}
			if row.truth(5000) == Open {
				s.listen("tcp", target4, portRange(5000, 5009)...)
			}
			if row.busy {
				keepBusy(b)
			}
			ours := []*peerResult{{name: "sweep"}, {name: "host-proof"}}
			if row.name == "silent" {
				ours = append(ours, &peerResult{name: "families"})
			}
			b.ResetTimer()
			for range b.N {
				for _, r := range ours {
					took, wrong := s.our(r.name)
					r.times = append(r.times, took)
					r.wrong += wrong
				}
			}
			b.StopTimer()
			if others == nil { // once, however often the benchmark is called
				others = s.others(row.zmap)
			}
			s.report(b, ours, others)
		})
	}
}

// gate is a firewall where ours stands: in prerouting, before any DNAT.
func (s *stage) gate(rules ...string) {
	s.target.nft("table inet t {\n chain in {\n  type filter hook prerouting priority -110; policy drop;\n" +
		"  icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept\n  " + strings.Join(rules, "\n  ") + "\n }\n}\n")
}

// report prints a table and the ratios as metrics. A wrong verdict of ours fails.
func (s *stage) report(b *testing.B, ours, others []*peerResult) {
	b.Helper()
	var table strings.Builder
	base := ours[0].median()
	for i, r := range slices.Concat(ours, others) {
		if r.err != nil {
			fmt.Fprintf(&table, "  %-14s %v\n", r.name, r.err)
			b.ReportMetric(-1, r.name+"-s")
			continue
		}
		fmt.Fprintf(&table, "  %-14s median %8.3f s, slowest %8.3f s, %2d runs, %6d wrong verdicts, %.2f times our sweep\n", r.name,
			r.median().Seconds(), slices.Max(r.times).Seconds(), len(r.times), r.wrong, r.median().Seconds()/base.Seconds())
		b.ReportMetric(r.median().Seconds(), r.name+"-s")
		b.ReportMetric(float64(r.wrong), r.name+"-wrong")
		if i > 0 {
			b.ReportMetric(r.median().Seconds()/base.Seconds(), r.name+"/sweep")
		}
		if r.name == "nmap-forced" {
			b.ReportMetric(r.median().Seconds()/ours[1].median().Seconds(), r.name+"/host-proof")
		}
		if i < len(ours) && r.wrong > 0 {
			b.Errorf("%s: %d wrong verdicts", r.name, r.wrong)
		}
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		b.Error(err)
	}
	b.Logf("%d processors, load %s%s", runtime.NumCPU(), load, table.String())
}

// our runs one of our ways and counts its wrong verdicts; unknown is wrong, too.
func (s *stage) our(way string) (time.Duration, int) {
	s.t.Helper()
	all := portRange(1, 65535)
	path := s.path(false, all, nil, Canary{CanaryTCP, 22}, Canary{CanaryTCP, 8}, canaryEcho)
	path.Link = s.link
	path.SrcPort = uint16(61001 + rand.IntN(4000)) // a new one each run: the target remembers the last
	paths := []Path{path}
	if way == "families" {
		six := s.path(true, all, all, Canary{CanaryTCP, 22})
		six.SrcPort = path.SrcPort - 1
		paths[0].UDP = all
		paths = append(paths, six)
	}
	began := time.Now()
	cfg := Config{Paths: paths}
	if way != "host-proof" {
		r := s.sweep(cfg)
		took := time.Since(began)
		return took, s.wrong(way, paths, r, nil)
	}
	trip, err := ArmTripwire(s.target.run, []uint16{path.SrcPort})
	if err != nil {
		s.t.Fatal(err)
	}
	cfg.Arrived = trip.Arrived
	r := s.sweep(cfg)
	proof, err := trip.proof()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := trip.Remove(); err != nil {
		s.t.Fatal(err)
	}
	took := time.Since(began)
	return took, s.wrong(way, paths, r, proof)
}

func (s *stage) wrong(way string, paths []Path, r *Result, proof *HostProof) int {
	wrong, silent := 0, 0
	for i, p := range r.Paths {
		for j, a := range p.TCP {
			want := s.truth(uint16(j + 1))
			state := a.State
			if proof != nil && state == Filtered &&
				proof.Passed[Passage{SrcPort: paths[i].SrcPort, DstPort: uint16(j + 1), Protocol: rules.TCP, IPv6: i > 0}] {
				state = Closed
			}
			if state != want {
				if wrong++; wrong <= 3 {
					s.t.Logf("%s: port %d is %v (%v), want %v", way, j+1, a.State, a.Reason, want)
				}
			}
		}
		for _, a := range p.UDP {
			if a.State != Filtered {
				silent++
			}
		}
		if proof != nil && !p.ArrivedTCP {
			s.t.Logf("%s: not every probe was counted on arrival", way)
		}
	}
	return wrong + silent
}

// others runs the tools of others, each once.
func (s *stage) others(zmap func(i uint16) bool) []*peerResult {
	empty := filepath.Join(s.t.TempDir(), "none")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		s.t.Fatal(err)
	}
	s.trickle()
	const ports = "-p1-65535"
	target := target4.String()
	var results []*peerResult
	for _, p := range []struct {
		name  string
		argv  []string
		wrong func(out []byte) (int, error)
	}{
		{"nmap-forced", []string{"nmap", "-n", "-Pn", "-sS", "--min-rate", "50000", "--max-retries", "1", ports, "-oX", "-", target}, s.nmapWrong},
		// Resets are answers, too; ten seconds, its default, would wait for more.
		{"masscan-100k", []string{"masscan", target, ports, "--rate", "100000", "--wait", "1", "--interface", s.link.Name,
			"--adapter-ip", vantage4.String(), "--adapter-mac", s.link.Src.String(), "--router-mac", s.gateway.String(),
			"--show", "open,closed", "-oL", "-"}, s.masscanWrong},
		{"zmap-1probe", []string{"zmap", "-p", strconv.Itoa(int(zmapPort)), "-r", "1000000", "-c", "1", "-b", empty, "-i", s.link.Name,
			"-S", vantage4.String(), "-G", s.gateway.String(), "-O", "csv", "-f", "saddr", "--output-filter=repeat = 0",
			"-q", "-v", "0", "--disable-syslog", manyHosts.String()}, func(out []byte) (int, error) { return zmapWrong(out, zmap) }},
		{"nmap-T4", []string{"nmap", "-n", "-Pn", "-sS", "-T4", ports, "-oX", "-", target}, s.nmapWrong},
	} {
		r := &peerResult{name: p.name}
		results = append(results, r)
		if _, err := exec.LookPath(p.argv[0]); err != nil {
			r.err = fmt.Errorf("not measured: %w", err)
			continue
		}
		began := time.Now()
		out, err := s.runTool(p.argv)
		r.times = append(r.times, time.Since(began))
		if err == nil {
			r.wrong, err = p.wrong(out)
		}
		r.err = err
	}
	return results
}

// runTool runs a program on the vantage.
func (s *stage) runTool(argv []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	var out, problems bytes.Buffer
	var err error
	s.vantage.do(func() {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = &out, &problems
		err = cmd.Run()
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(problems.Bytes()))
	}
	return out.Bytes(), nil
}

// trickle sends the vantage a packet now and then, as any network does: masscan
// does not end before one comes.
func (s *stage) trickle() {
	stop, ended := make(chan struct{}), make(chan struct{})
	var c net.Conn
	s.target.do(func() {
		var err error
		c, err = net.Dial("udp", netip.AddrPortFrom(vantage4, 9).String())
		s.target.must(err)
	})
	go func() {
		defer close(ended)
		for {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
				_, _ = c.Write([]byte("x"))
			}
		}
	}()
	s.t.Cleanup(func() { close(stop); <-ended; c.Close() })
}

// wrongPorts counts the ports whose state is not the true one; what a tool does
// not name is filtered to it.
func (s *stage) wrongPorts(states map[uint16]string) int {
	wrong := 0
	for p := 1; p <= 65535; p++ {
		state, ok := states[uint16(p)]
		if !ok {
			state = "filtered"
		}
		if state != s.truth(uint16(p)).String() {
			wrong++
		}
	}
	return wrong
}

func (s *stage) nmapWrong(out []byte) (int, error) {
	var doc struct {
		Host struct {
			Ports struct {
				Extra []struct {
					State   string `xml:"state,attr"`
					Reasons []struct {
						Ports string `xml:"ports,attr"`
					} `xml:"extrareasons"`
				} `xml:"extraports"`
				Port []struct {
					ID    uint16 `xml:"portid,attr"`
					State struct {
						State string `xml:"state,attr"`
					} `xml:"state"`
				} `xml:"port"`
			} `xml:"ports"`
		} `xml:"host"`
	}
	if err := xml.Unmarshal(out, &doc); err != nil {
		return 0, fmt.Errorf("read nmap's XML: %w", err)
	}
	states := map[uint16]string{}
	for _, p := range doc.Host.Ports.Port {
		states[p.ID] = p.State.State
	}
	for _, x := range doc.Host.Ports.Extra {
		for _, r := range x.Reasons {
			for _, part := range strings.Split(r.Ports, ",") {
				low, high, found := strings.Cut(part, "-")
				if !found {
					high = low
				}
				a, err1 := strconv.ParseUint(low, 10, 16)
				z, err2 := strconv.ParseUint(high, 10, 16)
				if err := errors.Join(err1, err2); err != nil {
					return 0, fmt.Errorf("read nmap's XML: %w", err)
				}
				for p := a; p <= z; p++ {
					states[uint16(p)] = x.State
				}
			}
		}
	}
	if len(states) != 65535 {
		return 0, fmt.Errorf("nmap names the state of %d ports", len(states))
	}
	return s.wrongPorts(states), nil
}

func (s *stage) masscanWrong(out []byte) (int, error) {
	states := map[uint16]string{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); { // "closed tcp 22 10.9.0.2 1700000000"
		f := strings.Fields(lines.Text())
		if len(f) < 3 || strings.HasPrefix(f[0], "#") {
			continue
		}
		p, err := strconv.ParseUint(f[2], 10, 16)
		if err != nil {
			return 0, fmt.Errorf("read masscan's list: %w", err)
		}
		states[uint16(p)] = f[0]
	}
	return s.wrongPorts(states), nil
}

func zmapWrong(out []byte, answers func(i uint16) bool) (int, error) {
	seen := map[uint16]bool{}
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		a, err := netip.ParseAddr(strings.TrimSpace(lines.Text()))
		if err != nil {
			continue // the head
		}
		x := a.As4()
		seen[uint16(x[2])<<8|uint16(x[3])] = true
	}
	wrong := 0
	for i := range 1 << 16 {
		if seen[uint16(i)] != answers(uint16(i)) {
			wrong++
		}
	}
	return wrong, nil
}

// newStage is a world whose target has manyHosts as well, and whose wire may be
// long and lossy.
func newStage(b *testing.B, lossy bool) *stage {
	b.Helper()
	var s *stage
	if lossy {
		s = newLossyStage(b)
	} else {
		w := newWorld(b)
		s = &stage{world: w, gateway: w.link.Dst}
	}
	s.target.do(func() {
		lo, err := netlink.LinkByName("lo")
		s.target.must(err)
		s.target.must(netlink.RouteAdd(&netlink.Route{ // ip route add local 10.8.0.0/16 dev lo
			LinkIndex: lo.Attrs().Index, Dst: ipNet(manyHosts), Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
			Scope: netlink.SCOPE_HOST,
		}))
	})
	s.vantage.do(func() {
		s.vantage.must(netlink.RouteAdd(&netlink.Route{LinkIndex: s.link.Index, Gw: target4.AsSlice()}))
	})
	return s
}

const (
	relayDelay = 10 * time.Millisecond // each way
	relayLoss  = 0.01                  // each way
)

// newLossyStage has a relay between vantage and target, with 20 ms there and
// back and 2 % loss: the kernels of small machines have no netem.
func newLossyStage(b *testing.B) *stage {
	b.Helper()
	w := &world{t: b, vantage: newSpace(b), target: newSpace(b)}
	relay := newSpace(b)
	relay.sysctl("net.ipv6.conf.all.disable_ipv6", "1")
	relay.sysctl("net.ipv6.conf.default.disable_ipv6", "1")
	near, nearEnd := wire(b, w.vantage, relay, "veth0", "near")
	farEnd, far := wire(b, relay, w.target, "far", "eth0")
	near.Dst, far.Dst = far.Src, near.Src
	w.link, w.back = near, far
	w.vantage.address(near, "10.9.0.1/16", target4)
	w.target.address(far, "10.9.0.2/16", vantage4)
	// A frame that is carried by hand leaves its unfinished checksum behind.
	w.vantage.finishChecksums(near.Name)
	w.target.finishChecksums(far.Name)
	a, z := relay.tap(nearEnd), relay.tap(farEnd)
	carry(b, a, z)
	carry(b, z, a)
	return &stage{world: w, gateway: far.Src}
}

// finishChecksums is "ethtool -K NAME tx off".
func (s *space) finishChecksums(name string) {
	s.do(func() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		s.must(err)
		defer unix.Close(fd)
		value := struct{ cmd, data uint32 }{unix.ETHTOOL_STXCSUM, 0}
		var req struct {
			name [unix.IFNAMSIZ]byte
			data unsafe.Pointer
			_    [16]byte
		}
		copy(req.name[:], name)
		req.data = unsafe.Pointer(&value)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
			s.must(errno)
		}
	})
}

// tap opens a socket for all frames of a link.
func (s *space) tap(l Link) int {
	var fd int
	s.do(func() {
		var err error
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		s.must(err)
		s.must(unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
		if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20) != nil {
			s.t.Log("the relay has a small buffer: more will be lost than is meant")
		}
		s.must(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}))
		s.must(unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: l.Index, Protocol: htons(unix.ETH_P_ALL)}))
	})
	return fd
}

// carry brings frames from one tap to another, later and not all of them.
func carry(t testing.TB, from, to int) {
	type late struct {
		due   time.Time
		frame []byte
	}
	queue := make(chan late, 1<<18)
	stop, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(queue)
		buf := make([]byte, 2048)
		for {
			select {
			case <-stop:
				return
			default:
			}
			n, err := unix.Read(from, buf)
			if err != nil || rand.Float64() < relayLoss {
				continue
			}
			queue <- late{time.Now().Add(relayDelay), slices.Clone(buf[:n])}
		}
	}()
	go func() {
		defer close(ended)
		for f := range queue {
			if d := time.Until(f.due); d > 0 {
				time.Sleep(d)
			}
			_, _ = unix.Write(to, f.frame)
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-ended
		unix.Close(from)
	})
}

// keepBusy gives every processor something else to do.
func keepBusy(t testing.TB) {
	for range runtime.NumCPU() {
		cmd := exec.Command("timeout", "1800", "sh", "-c", "while :; do :; done") // should we be killed
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Signal(unix.SIGTERM) // timeout passes it on
			_ = cmd.Wait()
		})
	}
}
