package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"deadlight/verify"
)

// fleet is a thousand hosts behind one wire: one kernel answers for all of their
// addresses, and nftables keeps the truth about each.
type fleet struct {
	*verify.World
	t       *testing.T
	dir     string
	command string // this program
}

const (
	fleetHosts = 1000
	fleetPorts = "20-59/tcp,80/tcp,7000/tcp,8080/tcp,50-59/udp"
)

func fleetAddress(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 8, byte(i >> 8), byte(i)}) }

// What is the matter with a host.
const (
	sound     = iota
	extraPort // 8080 is open
	noWeb     // what the policy lists is filtered
	noRules   // every TCP port is closed, none filtered
	dead
)

// trouble says what is the matter with each host, the dead ones in one group: they
// cost it seconds.
func trouble(i int) int {
	switch {
	case i >= 520 && i < 540:
		return dead
	case i%50 == 7:
		return extraPort
	case i%50 == 21:
		return noWeb
	case i%50 == 40:
		return noRules
	}
	return sound
}

// database says which of the two policies a host has.
func database(i int) bool { return i%3 == 0 }

func newFleet(t *testing.T) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: t.TempDir()}
	host := netip.MustParseAddr("203.0.113.10")
	var err error
	if f.World, err = verify.NewWorld(verify.WorldConfig{Host4: host, Links: []string{"eth0"}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	f.write("web.toml", "version = 1\n[open.mail]\nports = 25\n[open.web]\nports = 80\n")
	f.write("db.toml", "version = 1\n[open.mail]\nports = 25\n[open.db]\nports = 7000\n")
	sets := map[int][]string{}
	for i := range fleetHosts {
		sets[trouble(i)] = append(sets[trouble(i)], fleetAddress(i).String())
		if database(i) {
			sets[-1] = append(sets[-1], fleetAddress(i).String())
		}
	}
	f.onHost(fmt.Sprintf(`
ip route add local 10.8.0.0/15 dev lo
nft -f - <<end
table ip fleet {
	set database { type ipv4_addr; elements = { %s } }
	set extra { type ipv4_addr; elements = { %s } }
	set noweb { type ipv4_addr; elements = { %s } }
	set norules { type ipv4_addr; elements = { %s } }
	set dead { type ipv4_addr; elements = { %s } }
	set seen { type ipv4_addr; size 65535; flags dynamic; }
	chain in {
		type filter hook input priority 0; policy drop;
		ip daddr 10.8.0.0/16 add @seen { ip daddr }
		ip daddr @dead drop
		tcp dport 25 accept
		ip daddr 10.9.0.0/16 accept
		icmp type echo-request accept
		ip daddr @norules meta l4proto tcp accept
		ip daddr @extra tcp dport 8080 accept
		ip daddr @noweb drop
		ip daddr @database tcp dport 7000 accept
		ip daddr != @database tcp dport 80 accept
	}
}
end
`, strings.Join(sets[-1], ","), strings.Join(sets[extraPort], ","), strings.Join(sets[noWeb], ","), strings.Join(sets[noRules], ","), strings.Join(sets[dead], ",")))
	listeners, err := verify.Listen(f.Host, []uint16{80, 8080}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listeners.Close() })
	link, err := netlink.LinkByIndex(f.Link("eth0").Index)
	if err != nil {
		t.Fatal(err)
	}
	own, err := netlink.ParseAddr("203.0.113.20/24")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(link, own); err != nil {
		t.Fatal(err)
	}
	_, all, err := net.ParseCIDR("10.8.0.0/15")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: host.AsSlice()}); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f.command = filepath.Join(f.dir, "deadlight")
	if err := os.Symlink(self, f.command); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fleet) file(name string) string { return filepath.Join(f.dir, name) }

func (f *fleet) write(name, text string) string {
	f.t.Helper()
	if err := os.WriteFile(f.file(name), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.file(name)
}

// onHost runs a script on the host.
func (f *fleet) onHost(script string) string {
	f.t.Helper()
	var out, errs bytes.Buffer
	name := f.write("script", script)
	if err := f.Command(f.t.Context(), []string{"sh", "-e", name}, &out, &errs); err != nil {
		f.t.Fatalf("%v\n%s", err, errs.String())
	}
	return out.String()
}

// targets writes a file of the first n hosts.
func (f *fleet) targets(n int) string {
	var b strings.Builder
	b.WriteString("# ADDR  POLICY  NAME\n")
	for i := range n {
		policy := "-"
		if database(i) {
			policy = "db.toml"
		}
		fmt.Fprintf(&b, "%s %s host-%d\n", fleetAddress(i), policy, i)
	}
	return f.write(fmt.Sprintf("hosts-%d.txt", n), b.String())
}

// run is one run of the command; stop, if not 0, ends it when its journal has as many
// lines.
func (f *fleet) run(wantCode int, journal string, stop int, sig syscall.Signal, args ...string) (out []byte, rss int64, errs string) {
	f.t.Helper()
	args = append([]string{"verify", f.file("web.toml"), "--ports", fleetPorts, "--thorough", "0"}, args...)
	if journal != "" {
		args = append(args, "--resume", journal)
	}
	c := exec.Command(f.command, args...)
	var o, e bytes.Buffer
	c.Stdout, c.Stderr = &o, &e
	if err := c.Start(); err != nil {
		f.t.Fatal(err)
	}
	if stop > 0 {
		for began := time.Now(); time.Since(began) < 5*time.Minute; time.Sleep(10 * time.Millisecond) {
			if b, _ := os.ReadFile(journal); bytes.Count(b, []byte("\n")) >= stop { // or not there yet
				break
			}
		}
		if err := c.Process.Signal(sig); err != nil {
			f.t.Fatal(err)
		}
	}
	_ = c.Wait() // the exit code tells
	if code := c.ProcessState.ExitCode(); code != wantCode {
		f.t.Fatalf("%v: exit %d, want %d\n%s%s", args, code, wantCode, o.String(), e.String())
	}
	return o.Bytes(), c.ProcessState.SysUsage().(*syscall.Rusage).Maxrss, e.String()
}

// seen gives the hosts that packets arrived at since the last call.
func (f *fleet) seen() map[string]bool {
	f.t.Helper()
	out := map[string]bool{}
	for _, a := range regexp.MustCompile(`10\.8\.\d+\.\d+\b`).FindAllString(f.onHost("nft list set ip fleet seen; nft flush set ip fleet seen"), -1) {
		out[a] = true
	}
	return out
}

// hostsIn gives the hosts of a journal.
func hostsIn(t *testing.T, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, line := range bytes.Split(b, []byte("\n"))[1:] {
		var x struct{ Target string }
		if json.Unmarshal(line, &x) == nil {
			out = append(out, x.Target)
		}
	}
	return out
}

// A thousand hosts: the verdict of each, and a run that is interrupted and killed ends as one that is not.
func TestVerifyThousand(t *testing.T) {
	f := newFleet(t)
	targets := f.targets(fleetHosts)
	began := time.Now()
	whole, _, errs := f.run(exitFindings, "", 0, 0, "--targets", targets, "--json")
	t.Logf("%d hosts: %v", fleetHosts, time.Since(began))
	for line := range strings.Lines(errs) { // a slow machine is told how far it is
		if !strings.HasPrefix(line, "deadlight: probing: ") {
			t.Errorf("stderr: %s", line)
		}
	}
	if err := conforms(compileSchema(t, "verify-targets"), "verify-targets", whole); err != nil {
		t.Fatal(err)
	}
	var all verify.Many
	if err := json.Unmarshal(whole, &all); err != nil {
		t.Fatal(err)
	}
	f.check(&all)
	if seen := f.seen(); len(seen) != fleetHosts {
		t.Errorf("%d hosts were probed", len(seen))
	}

	// Interrupted, killed, and gone on with.
	journal := f.file("journal")
	began = time.Now()
	out, _, errs := f.run(exitInterrupted, journal, 150, syscall.SIGINT, "--targets", targets, "--json")
	done := hostsIn(t, journal)
	if len(out) > 0 || !strings.Contains(errs, fmt.Sprintf("deadlight: %d of 1000 hosts done, kept in %s", len(done), journal)) {
		t.Errorf("interrupted: %q\n%s", errs, out)
	}
	f.seen()
	f.run(-1, journal, len(done)+150, syscall.SIGKILL, "--targets", targets, "--json")
	f.untouched(done)
	done = hostsIn(t, journal)
	if len(done) >= fleetHosts {
		t.Errorf("killed when all %d hosts were done", len(done))
	}
	out, _, _ = f.run(exitFindings, journal, 0, 0, "--targets", targets, "--json")
	f.untouched(done)
	t.Logf("interrupted: %v", time.Since(began))
	var again verify.Many
	if err := json.Unmarshal(out, &again); err != nil {
		t.Fatal(err)
	}
	if again.Resumed != len(done) {
		t.Errorf("%d hosts from before, want %d", again.Resumed, len(done))
	}
	if d := cmp.Diff(lasting(all), lasting(again)); d != "" {
		t.Errorf("a run that was interrupted tells otherwise (-whole +interrupted):\n%s", d)
	}
	if _, err := os.Stat(journal); err == nil {
		t.Error("the journal is still there")
	}
}

// Memory does not grow with the hosts: each of these has 398 findings, which would be
// 100 MB if their reports were held.
func TestVerifyThousandMemory(t *testing.T) {
	f := newFleet(t)
	peak := func(n int) int64 {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, "%s\n", netip.AddrFrom4([4]byte{10, 9, byte(i >> 8), byte(i)}))
		}
		out, kilobytes, _ := f.run(exitFindings, "", 0, 0, "--targets", f.write("unguarded.txt", b.String()), "--ports", "1-400/tcp", "--json")
		var m verify.Many
		if err := json.Unmarshal(out, &m); err != nil {
			t.Fatal(err)
		}
		if m.Hosts.Fail != n || m.Findings != n*398 { // but for 25 and 80
			t.Errorf("%d hosts: %+v, %d findings", n, m.Hosts, m.Findings)
		}
		return kilobytes
	}
	few, many := peak(100), peak(fleetHosts)
	t.Logf("100 hosts: %d KB, %d hosts: %d KB", few, fleetHosts, many)
	if many > few+24<<10 {
		t.Errorf("%d hosts take %d KB, 100 take %d KB", fleetHosts, many, few)
	}
}

// untouched holds that hosts of a journal were not probed by the last run.
func (f *fleet) untouched(done []string) {
	f.t.Helper()
	if len(slices.Compact(slices.Sorted(slices.Values(done)))) != len(done) {
		f.t.Error("a host stands twice in the journal")
	}
	seen := f.seen()
	for _, a := range done {
		if seen[a] {
			f.t.Errorf("%s was done, and was probed again", a)
			return
		}
	}
}

// lasting is what two runs must have in common: times and counts of packets differ.
func lasting(m verify.Many) []verify.Brief {
	var out []verify.Brief
	for _, b := range m.Targets {
		b.Ended, b.Seconds, b.Probes, b.Bound = time.Time{}, 0, 0, 0
		out = append(out, b)
	}
	return out
}

// check holds every host against the truth about it.
func (f *fleet) check(m *verify.Many) {
	f.t.Helper()
	if len(m.Targets) != fleetHosts {
		f.t.Fatalf("%d hosts", len(m.Targets))
	}
	wrong, bound, probes := 0, 0.0, uint64(0)
	hosts := verify.HostCounts{}
	for i := range m.Targets {
		b := &m.Targets[i]
		open, closed, listed, policy := "80", "25", "80", "web.toml"
		if database(i) {
			open, closed, listed, policy = "", "25,7000", "7000", "db.toml"
		}
		verdict, unknown, why := verify.Pass, "", ""
		var ports []string
		switch trouble(i) {
		case extraPort:
			verdict, ports, open = verify.Fail, []string{"8080 open"}, strings.Trim(open+",8080", ",")
		case noWeb:
			verdict, ports, open, closed = verify.Fail, []string{listed + " filtered"}, "", "25"
		case noRules:
			verdict, open, closed = verify.Fail, "80,8080", "20-59,7000"
			if ports = []string{"20-24,26-59,7000 closed", "8080 open"}; database(i) {
				ports = []string{"20-24,26-59 closed", "80,8080 open"}
			}
		case dead:
			verdict, open, closed, unknown = verify.Inconclusive, "", "", "20-59,80,7000,8080"
			why = "no canary answers from " + b.Target
			if ports = []string{"20-24,26-59,7000,8080 unknown", "25 unknown", "50-59 unknown", "80 unknown"}; database(i) {
				ports = []string{"20-24,26-59,80,8080 unknown", "25 unknown", "50-59 unknown", "7000 unknown"}
			}
		}
		var got []string
		for _, x := range b.Findings {
			got = append(got, x.Ports+" "+x.Observed.String())
			if x.Observed != verify.Unknown {
				wrong += x.Count
			}
		}
		slices.Sort(got)
		s := b.States["tcp4"]
		if b.Name != fmt.Sprintf("host-%d", i) || b.Target != fleetAddress(i).String() || b.Policy != f.file(policy) || b.Verdict != verdict ||
			!slices.Equal(got, ports) || s.Open != open || s.Closed != closed || s.Unknown != unknown || !strings.HasPrefix(b.Why, why) {
			f.t.Errorf("host %d, trouble %d: %s %s %s: %s: %q, want %q; open %q, closed %q, unknown %q", i, trouble(i), b.Name, b.Policy, b.Verdict, b.Why, got, ports, s.Open, s.Closed, s.Unknown)
		}
		switch verdict {
		case verify.Pass:
			hosts.Pass++
		case verify.Fail:
			hosts.Fail++
		default:
			hosts.Inconclusive++
		}
		if b.Bound < 1 {
			bound += b.Bound
		}
		probes += b.Probes
	}
	if m.Hosts != hosts || m.Findings != wrong || m.Verdict != verify.Fail || m.Policies != 2 || m.Probes != probes || m.Bound > 1e-6 || m.Bound <= 0 || math.Abs(bound-m.Bound) > 1e-9 {
		f.t.Errorf("summary: %+v of %+v, %d findings of %d, bound %g of %g, %d packets of %d, %d policies", m.Hosts, hosts, m.Findings, wrong, m.Bound, bound, m.Probes, probes, m.Policies)
	}
}
