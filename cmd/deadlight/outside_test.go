package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"deadlight/verify"
)

// lab is a host under a policy and an outside with an address of its own, on
// which other scanners can look at the host too.
type lab struct {
	*verify.World
	host4, host6 netip.Addr
	policy       string // file
}

const labPolicy = `version = 1
[open.web]
ports = [80, 443]
[open.vendor]
ports = "6000-6005"
from = "192.0.2.0/24"
[open.six]
ports = 25
family = "ipv6"
[open.dns]
ports = 53
protocol = "udp"
[open.wireguard]
ports = 9000
interfaces = "wg0"
`

// newLab puts a policy in force and listeners behind listed and unlisted ports.
func newLab(t *testing.T, policy string) *lab {
	t.Helper()
	l := &lab{host4: netip.MustParseAddr("203.0.113.10"), host6: netip.MustParseAddr("2001:db8:77::10")}
	var err error
	if l.World, err = verify.NewWorld(verify.WorldConfig{Host4: l.host4, Host6: l.host6, Links: []string{"eth0"}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	l.policy = filepath.Join(t.TempDir(), "policy.toml")
	if err := os.WriteFile(l.policy, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Host(func() error {
		rs, problems, err := parsePolicy(l.policy)
		if err != nil || rs == nil {
			t.Errorf("%v %v", problems, err)
			return err
		}
		_, err = applyHere(rs)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	ports := []uint16{22, 25, 53, 80, 443, 3306, 6000, 6003, 8080, 9000, 50000}
	listeners, err := verify.Listen(l.Host, ports, ports)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listeners.Close() })
	l.settle(t)
	return l
}

// settle gives the outside addresses of its own, and the way to the host.
func (l *lab) settle(t *testing.T) {
	t.Helper()
	out := l.Link("eth0")
	link, err := netlink.LinkByIndex(out.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []struct{ own, host string }{{"203.0.113.20/32", "203.0.113.10/32"}, {"2001:db8:77::20/128", "2001:db8:77::10/128"}} {
		own, err := netlink.ParseAddr(a.own)
		if err != nil {
			t.Fatal(err)
		}
		own.Flags = 0x02 // IFA_F_NODAD
		if err := netlink.AddrAdd(link, own); err != nil {
			t.Fatal(err)
		}
		_, dst, err := net.ParseCIDR(a.host)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: out.Index, Dst: dst, Src: own.IP, Scope: netlink.SCOPE_LINK}); err != nil {
			t.Fatal(err)
		}
	}
}

// runJSON runs a command line in this process and decodes its report.
func runJSON(t *testing.T, wantCode int, args ...string) verifyReport {
	t.Helper()
	var out, errs bytes.Buffer
	if code := run(args, env{stdin: strings.NewReader(""), stdout: &out, stderr: &errs}); code != wantCode {
		t.Fatalf("%v exits with %d, want %d:\n%s%s", args, code, wantCode, out.String(), errs.String())
	}
	var r verifyReport
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, out.String())
	}
	if err := conforms(compileSchema(t, args[0]), args[0], out.Bytes()); err != nil {
		t.Fatal(err)
	}
	return r
}

type verifyReport struct {
	Verdict  string                   `json:"verdict"`
	Bound    float64                  `json:"bound"`
	States   map[string]verify.States `json:"states"`
	Findings []struct {
		Port     uint16
		Protocol string
		Observed string
		Family   string
	} `json:"findings"`
	Notes []string `json:"notes"`
}

func TestVerifyTarget(t *testing.T) {
	l := newLab(t, labPolicy)
	r := runJSON(t, exitOK, "verify", l.policy, "--target", l.host4.String()+","+l.host6.String(), "--json")
	want := map[string]string{"tcp4": "80,443", "tcp6": "25,80,443", "udp4": "53", "udp6": "53"}
	for k, open := range want {
		if r.States[k].Open != open || r.States[k].Closed != "" || r.States[k].Unknown != "" {
			t.Errorf("%s: %+v, want open %s", k, r.States[k], open)
		}
	}
	if r.Bound > 1e-6 {
		t.Errorf("bound %g", r.Bound)
	}
	notes := strings.Join(r.Notes, "\n")
	if !strings.Contains(notes, "unproved: silence") {
		t.Errorf("notes %q", r.Notes)
	}

	// A hole is named, by port and family, with exit 1.
	hole := []string{"sh", "-c", "for c in gate backstop_in; do nft insert rule inet deadlight $c meta nfproto ipv4 tcp dport 3306 accept; done"}
	if err := l.Command(t.Context(), hole, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	r = runJSON(t, exitFindings, "verify", l.policy, "--target", l.host4.String()+","+l.host6.String(), "--ports", "tcp", "--json")
	if len(r.Findings) != 1 || r.Findings[0].Port != 3306 || r.Findings[0].Family != "ipv4" || r.Findings[0].Observed != "open" {
		t.Errorf("findings %+v", r.Findings)
	}
	if _, ok := r.States["udp4"]; ok {
		t.Errorf("--ports tcp probed UDP")
	}
}

// Without the right to send raw packets connect(2) looks, and says what it cannot tell.
func TestVerifyConnect(t *testing.T) {
	l := newLab(t, labPolicy)
	r := runJSON(t, exitOK, "verify", l.policy, "--connect", "--target", l.host4.String()+","+l.host6.String(), "--ports", "1-1000/tcp,50-60/udp", "--json")
	for k, open := range map[string]string{"tcp4": "80,443", "tcp6": "25,80,443", "udp4": "53", "udp6": "53"} {
		if r.States[k].Open != open || r.States[k].Closed != "" || r.States[k].Unknown != "" {
			t.Errorf("%s: %+v, want open %s", k, r.States[k], open)
		}
	}
	if notes := strings.Join(r.Notes, "\n"); !strings.Contains(notes, "probed by connect(2), without raw sockets") {
		t.Errorf("notes %q", r.Notes)
	}
	hole := []string{"sh", "-c", "for c in gate backstop_in; do nft insert rule inet deadlight $c tcp dport 999 accept; done"}
	if err := l.Command(t.Context(), hole, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	r = runJSON(t, exitFindings, "verify", l.policy, "--connect", "--target", l.host4.String(), "--ports", "1-1000/tcp", "--json")
	if len(r.Findings) != 1 || r.Findings[0].Port != 999 || r.Findings[0].Observed != "closed" {
		t.Errorf("findings %+v", r.Findings)
	}
}

// A dead path proves nothing: every port is unknown, and the exit code says so.
func TestVerifyDeadPath(t *testing.T) {
	l := newLab(t, labPolicy)
	if err := l.Command(t.Context(), []string{"nft", "insert rule inet deadlight gate drop"}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	r := runJSON(t, exitRefused, "verify", l.policy, "--target", l.host4.String(), "--ports", "1-100/tcp", "--json")
	if r.Verdict != "inconclusive" || r.States["tcp4"].Unknown != "1-100" {
		t.Errorf("%s %+v", r.Verdict, r.States["tcp4"])
	}
}

func TestVerifyOwnAddress(t *testing.T) {
	l := newLab(t, labPolicy)
	var out, errs bytes.Buffer
	code := run([]string{"verify", l.policy, "--target", "203.0.113.20"}, env{stdout: &out, stderr: &errs})
	if code != exitRefused || !strings.Contains(errs.String(), "without --target looks at this host") {
		t.Errorf("exit %d: %s", code, errs.String())
	}
}

// nmap, an independent witness, must agree on every TCP port.
func TestNmapAgrees(t *testing.T) {
	for name, policy := range map[string]string{
		"drop":   labPolicy,
		"reject": labPolicy + "[default]\ninput = \"reject\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, policy)
			r := runJSON(t, exitOK, "verify", l.policy, "--target", l.host4.String()+","+l.host6.String(), "--ports", "tcp", "--json")
			for key, addr := range map[string]netip.Addr{"tcp4": l.host4, "tcp6": l.host6} {
				ours := asNmap(t, r.States[key])
				theirs := nmap(t, addr, "-p-", "--min-rate", "20000", "--max-retries", "2")
				// A starved nmap misses answers: where it differs it is asked again, with time.
				for _, rate := range []string{"4000", "500"} {
					again := differing(ours, theirs)
					t.Logf("%s: nmap differs on %d ports", key, len(again))
					for part := range slices.Chunk(again, 8192) { // one argument holds 128 KiB
						maps.Copy(theirs, nmap(t, addr, "-p", verify.Ranges(part), "--max-rate", rate, "--max-retries", "10"))
					}
				}
				for i, port := range differing(ours, theirs) {
					if i == 20 {
						break
					}
					t.Errorf("%s %d/tcp: nmap says %q three times, deadlight %q", key, port, theirs[port], ours[port])
				}
			}
		})
	}
}

// asNmap gives the state of every TCP port in nmap's words, which call rejected
// filtered as well.
func asNmap(t *testing.T, s verify.States) map[uint16]string {
	t.Helper()
	out := map[uint16]string{}
	for ranges, state := range map[string]string{s.Open: "open", s.Closed: "closed", s.Filtered: "filtered", s.Rejected: "filtered"} {
		if ranges == "" {
			continue
		}
		for _, port := range tcpPorts(t, ranges) {
			out[port] = state
		}
	}
	if len(out) != 65535 {
		t.Fatalf("deadlight judges %d ports", len(out))
	}
	return out
}

// differing lists the ports on which two scanners do not agree.
func differing(ours, theirs map[uint16]string) []uint16 {
	var out []uint16
	for port := uint16(1); port != 0; port++ {
		if ours[port] != theirs[port] {
			out = append(out, port)
		}
	}
	return out
}

// tcpdump on the host, an independent witness, must see every probe come in and
// nothing go out in answer.
func TestTcpdumpSeesSilence(t *testing.T) {
	l := newLab(t, labPolicy)
	var out, errs lockedBuffer
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- l.Command(ctx, []string{"tcpdump", "-Z", "root", "-i", "eth0", "-n", "-l", "-B", "65536", "tcp and portrange 1000-2000"}, &out, &errs)
	}()
	for start := time.Now(); !strings.Contains(errs.String(), "listening on"); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("tcpdump does not start: %s", errs.String())
		}
	}
	runJSON(t, exitOK, "verify", l.policy, "--target", l.host4.String(), "--ports", "1000-2000/tcp", "--json")
	// tcpdump on a busy machine comes late.
	seen, answers := witnessed(out.String(), l.host4)
	for start := time.Now(); seen < 1001 && time.Since(start) < 20*time.Second; seen, answers = witnessed(out.String(), l.host4) {
		time.Sleep(50 * time.Millisecond)
	}
	stop()
	<-done
	if seen != 1001 || answers != 0 {
		t.Errorf("tcpdump saw probes to %d ports and %d answers", seen, answers)
	}
}

// witnessed counts the ports from 1000 to 2000 that lines of tcpdump show a packet
// to, and the packets that the host sent from there: TIME IP SRC.PORT > DST.PORT: ...
// The probes themselves may come from one of these ports.
func witnessed(text string, host netip.Addr) (ports, answers int) {
	in := map[string]bool{}
	probed := func(end string) bool {
		port, err := strconv.Atoi(strings.TrimSuffix(end[strings.LastIndexByte(end, '.')+1:], ":"))
		return err == nil && port >= 1000 && port <= 2000
	}
	for _, line := range strings.Split(text, "\n") {
		switch f := strings.Fields(line); {
		case len(f) < 6:
		case strings.HasPrefix(f[2], host.String()+"."):
			if probed(f[2]) {
				answers++
			}
		case probed(f[4]):
			in[f[4]] = true
		}
	}
	return len(in), answers
}

// lockedBuffer can be read while a program writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// nmap scans TCP ports and gives the state of each.
func nmap(t *testing.T, addr netip.Addr, args ...string) map[uint16]string {
	t.Helper()
	args = append([]string{"-n", "-Pn", "-sS", "-oX", "-"}, append(args, addr.String())...)
	if addr.Is6() {
		args = append([]string{"-6"}, args...)
	}
	out, err := exec.Command("nmap", args...).Output()
	if err != nil {
		t.Fatalf("nmap: %v", err)
	}
	var doc struct {
		Ports []struct {
			ID    uint16 `xml:"portid,attr"`
			State struct {
				State string `xml:"state,attr"`
			} `xml:"state"`
		} `xml:"host>ports>port"`
		Extra []struct {
			State string `xml:"state,attr"`
			Why   []struct {
				Ports string `xml:"ports,attr"`
			} `xml:"extrareasons"`
		} `xml:"host>ports>extraports"`
	}
	if err := xml.Unmarshal(out, &doc); err != nil {
		t.Fatalf("nmap: %v", err)
	}
	states := map[uint16]string{}
	for _, p := range doc.Ports {
		states[p.ID] = p.State.State
	}
	for _, e := range doc.Extra {
		for _, w := range e.Why {
			for _, port := range tcpPorts(t, w.Ports) {
				states[port] = e.State
			}
		}
	}
	return states
}

// tcpPorts reads "80,443-445".
func tcpPorts(t *testing.T, ranges string) []uint16 {
	t.Helper()
	p, err := verify.ParsePorts(strings.ReplaceAll(ranges, ",", "/tcp,") + "/tcp")
	if err != nil {
		t.Fatal(err)
	}
	return p.TCP
}
