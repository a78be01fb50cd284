package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"deadlight/verify"
)

// site is a controller with Ansible, which is this process's namespaces, and hosts
// around it that it reaches over SSH.
type site struct {
	t     *testing.T
	dir   string
	hosts map[string]*siteHost
	log   string // what Ansible printed last
}

// siteHost is a host of a site: a network namespace and a mount namespace of its own,
// with a real sshd.
type siteHost struct {
	*verify.World
	four, six netip.Addr
	pid       int            // of sshd
	vars      map[string]any // of the inventory
	answers   map[uint16]string
}

// What a port does, seen from the controller.
const (
	answersOpen    = "open"
	answersSilence = "silent"
	answersRefused = "refused"
)

// The ports of every host that have listeners.
var sitePorts = [...]uint16{25, 53, 80, 443, 587, 5432, 8080, 9999}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{t: t, dir: t.TempDir(), hosts: map[string]*siteHost{}}
	for _, key := range []string{"host", "id"} {
		output(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.file(key))
	}
	s.write("ansible.cfg", fmt.Sprintf(`[defaults]
inventory = %[1]s/hosts.json
host_key_checking = False
forks = 5
timeout = 30
interpreter_python = /usr/bin/python3
retry_files_enabled = False
[ssh_connection]
pipelining = True
control_path_dir = %[1]s/cp
ssh_args = -F none -i %[1]s/id -o ControlMaster=auto -o ControlPersist=60s -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
`, s.dir))
	t.Cleanup(s.hangUp)
	return s
}

// hangUp ends the connections that outlive a run of Ansible.
func (s *site) hangUp() {
	sockets, err := filepath.Glob(s.file("cp/*"))
	if err != nil {
		s.t.Error(err)
	}
	for _, socket := range sockets {
		out, err := exec.Command("ssh", "-F", "none", "-o", "ControlPath="+socket, "-O", "exit", "none").CombinedOutput()
		if _, gone := os.Stat(socket); err != nil && gone == nil {
			s.t.Errorf("%v: %s", err, out)
		}
	}
}

func (s *site) file(name string) string { return filepath.Join(s.dir, name) }

func (s *site) write(name, text string) {
	s.t.Helper()
	if err := os.WriteFile(s.file(name), []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// add starts a host. more are lines of its sshd's configuration, and of the script that
// makes it.
func (s *site) add(name, config, script string, vars map[string]any, answers map[uint16]string) {
	s.t.Helper()
	n := byte(11 + len(s.hosts))
	h := &siteHost{
		four: netip.AddrFrom4([4]byte{203, 0, 113, n}), six: netip.MustParseAddr(fmt.Sprintf("2001:db8:77::%d", n)),
		vars: vars, answers: answers,
	}
	h.vars["ansible_host"], h.vars["ansible_user"] = h.four.String(), "root"
	h.vars["deadlight_confirm"] = 600 // a slow machine is no reason to go back
	var err error
	if h.World, err = verify.NewWorld(verify.WorldConfig{Host4: h.four, Host6: h.six, Links: []string{"eth0"}}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := h.Close(); err != nil {
			s.t.Error(err)
		}
	})
	s.reach(h)
	listeners, err := verify.Listen(h.Host, sitePorts[:], nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { listeners.Close() })

	s.write(name+".sshd", fmt.Sprintf("HostKey %s\nAuthorizedKeysFile %s\nPidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\n%s",
		s.file("host"), s.file("id.pub"), config))
	sshd, err := exec.LookPath("sshd")
	if err != nil {
		s.t.Fatal(err)
	}
	// What a package or Ansible writes is the host's own.
	s.write(name+".sh", fmt.Sprintf(`set -e
mkdir %[1]s
mount -t tmpfs tmpfs %[1]s
for d in etc usr var root; do
	mkdir %[1]s/$d %[1]s/$d.work
	mount -t overlay -o lowerdir=/$d,upperdir=%[1]s/$d,workdir=%[1]s/$d.work overlay /$d
done
mount -t tmpfs tmpfs /run
mkdir /run/sshd
rm -rf /etc/deadlight /var/lib/deadlight /usr/sbin/deadlight
%[2]s
echo $$ >%[1]s.pid
exec %[3]s -D -e -f %[1]s.sshd
`, s.file(name), script, sshd))
	log, err := os.Create(s.file(name + ".log"))
	if err != nil {
		s.t.Fatal(err)
	}
	said := func() string {
		b, err := os.ReadFile(log.Name())
		if err != nil {
			s.t.Fatal(err)
		}
		return string(b)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Command(ctx, []string{"unshare", "-m", "sh", s.file(name + ".sh")}, log, log) }()
	s.t.Cleanup(func() {
		stop()
		<-done
		if s.t.Failed() {
			s.t.Logf("sshd of %s: %s", name, said())
		}
		log.Close()
	})
	await(s.t, "sshd", func() bool { return strings.Contains(said(), "listening on ::") })
	b, err := os.ReadFile(s.file(name + ".pid"))
	if err == nil {
		h.pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.hosts[name] = h
}

// reach gives the controller its addresses and the way to a host.
func (s *site) reach(h *siteHost) {
	s.t.Helper()
	link, err := netlink.LinkByIndex(h.Link("eth0").Index)
	if err != nil {
		s.t.Fatal(err)
	}
	for own, host := range map[string]netip.Addr{peer4: h.four, peer6: h.six} {
		a := netip.MustParseAddr(own)
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: hostNet(a), Flags: syscall.IFA_F_NODAD}); err != nil {
			s.t.Fatal(err)
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: hostNet(host), Src: a.AsSlice(), Scope: netlink.SCOPE_LINK}); err != nil {
			s.t.Fatal(err)
		}
	}
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// on runs a command on a host, past its network.
func (s *site) on(name string, args ...string) string {
	s.t.Helper()
	return output(s.t, "nsenter", append([]string{"-m", "-n", "-t", fmt.Sprint(s.hosts[name].pid), "--"}, args...)...)
}

// play runs a playbook of configs/ansible over the hosts, with other variables for some,
// and gives the recap of each.
func (s *site) play(playbook string, wantCode int, other map[string]map[string]any, args ...string) map[string]map[string]int {
	s.t.Helper()
	groups := map[string]any{"deadlight": map[string]any{"children": map[string]any{"web": nil, "database": nil, "others": nil}}}
	for _, group := range []string{"web", "database", "others"} {
		groups[group] = map[string]any{"hosts": map[string]any{}}
	}
	for name, h := range s.hosts {
		vars := maps.Clone(h.vars)
		maps.Copy(vars, other[name])
		group, ok := groups[name].(map[string]any)
		if !ok {
			group = groups["others"].(map[string]any)
		}
		group["hosts"].(map[string]any)[name+"1"] = vars
	}
	b, err := json.Marshal(groups)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("hosts.json", string(b))
	began := time.Now()
	cmd := exec.Command("ansible-playbook", append([]string{filepath.Join("../../configs/ansible", playbook)}, args...)...)
	cmd.Env = append(os.Environ(), "ANSIBLE_CONFIG="+s.file("ansible.cfg"), "HOME="+s.dir, "LC_ALL=C.UTF-8", "ANSIBLE_NOCOLOR=1")
	out, err := cmd.CombinedOutput()
	s.log = string(out)
	t := s.t
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s %q:\n%s", playbook, args, out)
		}
	})
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	s.t.Logf("%s %q: %v, %v of the processor here", playbook, args, time.Since(began).Round(time.Second/10), (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Round(time.Second/10))
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		s.t.Fatalf("%s: exit %d, want %d", playbook, code, wantCode)
	}
	recap := map[string]map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^(\w+)1 +: (ok=.*)$`).FindAllStringSubmatch(s.log, -1) {
		recap[m[1]] = map[string]int{}
		for _, f := range strings.Fields(m[2]) {
			key, value, _ := strings.Cut(f, "=")
			if recap[m[1]][key], err = strconv.Atoi(value); err != nil {
				s.t.Fatalf("recap: %s", m[0])
			}
		}
	}
	return recap
}

// look holds every host against what its policy says, by connections of the controller
// to ports that all have listeners; policies: they are in force.
func (s *site) look(policies bool) {
	s.t.Helper()
	var wait sync.WaitGroup
	for name, h := range s.hosts {
		for _, port := range sitePorts {
			for _, a := range []netip.Addr{h.four, h.six} {
				want := h.answers[port]
				if want == "" {
					want = h.answers[0]
				}
				if !policies {
					want = answersOpen
				}
				wait.Add(1)
				go func() {
					defer wait.Done()
					got := answersOpen
					c, err := net.DialTimeout("tcp", netip.AddrPortFrom(a, port).String(), 2*time.Second)
					var timeout net.Error
					switch {
					case err == nil:
						c.Close()
					case errors.Is(err, syscall.ECONNREFUSED):
						got = answersRefused
					case errors.As(err, &timeout) && timeout.Timeout():
						got = answersSilence
					default:
						got = err.Error()
					}
					if got != want {
						s.t.Errorf("%s: %d/tcp of %s is %s, want %s", name, port, a, got, want)
					}
				}()
			}
		}
	}
	wait.Wait()
}

// inForce is what a host holds: its policy and its rules.
func (s *site) inForce(name string) string {
	s.t.Helper()
	parts := strings.Split(s.on(name, "nft", "-s", "list", "table", "inet", "deadlight"), "\n\t}\n")
	parts = slices.DeleteFunc(parts, func(part string) bool { return strings.Contains(part, "\tset knocks") })
	slices.Sort(parts) // a set that left and came back stands last
	return s.on(name, "cat", defaultPolicy) + strings.Join(parts, "\n")
}

// A fleet gets a policy for each host by the role of configs/ansible, keeps only what
// lets Ansible in anew, and reports in one summary.
func TestAnsibleFleet(t *testing.T) {
	t.Parallel() // hosts of its own, by addresses of their own
	if !mayChangeUser(t) {
		if os.Getenv("CI") != "" {
			t.Fatal("sshd takes root: .ci/test runs this test so")
		}
		t.Skip("sshd cannot work in the user namespace of an ordinary user")
	}
	s := newSite(t)
	program, deb := s.build()
	inline := func(policy string) map[string]any {
		return map[string]any{"deadlight_binary": program, "deadlight_policy": policy}
	}
	example := func(kind, how, file string) map[string]any {
		return map[string]any{how: file, "admins": []string{peer4, peer6},
			"deadlight_policy": "{{ lookup('ansible.builtin.template', 'policies/" + kind + ".toml.j2') }}"}
	}
	const ssh = "version = 1\n[open.ssh]\nports = 22\n"
	s.add("web", "", "", example("web", "deadlight_package", deb), map[uint16]string{0: answersSilence, 80: answersOpen, 443: answersOpen})
	s.add("database", "", "", example("database", "deadlight_binary", program), map[uint16]string{0: answersSilence}) // of 5432 the web server is told alone
	const lists = "mkdir -p /etc/deadlight/lists && echo 198.51.100.0/24 >/etc/deadlight/lists/blocked.txt"
	s.add("mail", "", lists, inline(ssh+"[open.mail]\nports = [25, 587]\n[set.blocked]\nfiles = \"lists/blocked.txt\"\n[block.blocked]\nfrom = \"@blocked\"\n"),
		map[uint16]string{0: answersSilence, 25: answersOpen, 587: answersOpen})
	s.add("names", "", "", inline(ssh+"[default]\ninput = \"reject\"\n[open.dns]\nports = 53\nprotocol = [\"tcp\", \"udp\"]\n"),
		map[uint16]string{0: answersRefused, 53: answersOpen})
	// systemctl works on the files alone there: no systemd runs that has this as its /etc.
	const foreign = "mkdir -p /run/systemd/system\nnft 'add table ip foreign; add chain ip foreign in { type filter hook input priority 10; }; add rule ip foreign in tcp dport 8081 drop'"
	s.add("keeps", "SetEnv SYSTEMD_OFFLINE=1\n", foreign, inline(ssh+"[default]\nestablished = \"keep\"\n[open.app]\nports = \"8080-8081\"\n"),
		map[uint16]string{0: answersSilence, 8080: answersOpen})

	s.look(false)
	for name, r := range s.play("site.yml", 0, nil) {
		if r["changed"] == 0 {
			t.Errorf("%s: nothing changed: %v", name, r)
		}
	}
	s.look(true)
	if link := s.on("keeps", "readlink", "/etc/systemd/system/sysinit.target.wants/deadlight.service"); link != "/etc/systemd/system/deadlight.service\n" {
		t.Errorf("the unit that is enabled is %q", link)
	}
	before := map[string]string{}
	for name := range s.hosts {
		before[name] = s.inForce(name)
	}

	recap := s.play("site.yml", 0, nil)
	for name := range s.hosts {
		if r, ok := recap[name]; !ok || r["changed"] != 0 || r["failed"] != 0 || r["unreachable"] != 0 {
			t.Errorf("%s, the second time: %v", name, r)
		}
	}

	s.run("what would change", func(t *testing.T) {
		wider := map[string]any{"deadlight_policy": ssh + "[open.other]\nports = 9999\n"}
		recap := s.play("site.yml", 0, map[string]map[string]any{"web": wider}, "--check", "--diff", "--limit", "web1")
		if recap["web"]["changed"] == 0 {
			t.Errorf("nothing would change: %v", recap)
		}
		for _, want := range []string{"+[open.other]", "+ open other: 9999/tcp from anywhere", "- open web: "} {
			if !strings.Contains(s.log, want) {
				t.Errorf("no %q", want)
			}
		}
		s.as(before, "web")
	})

	s.run("trouble", func(t *testing.T) {
		const cuts = "version = 1\n[open.ssh]\nports = 22\nfrom = \"192.0.2.1\"\n"
		s.on("web", "nft", "insert", "rule", "inet", "deadlight", "gate", "tcp", "dport", "9999", "accept")
		recap := s.play("site.yml", 2, map[string]map[string]any{
			"mail":     {"deadlight_policy": "version = 1\n[open.ssh]\nports = 80000\n"},
			"names":    {"deadlight_policy": cuts},
			"database": {"deadlight_policy": cuts, "deadlight_accept_lockout": true, "deadlight_confirm": 12},
			"keeps":    {"deadlight_policy": cuts + "[default]\nestablished = \"keep\"\n", "deadlight_accept_lockout": true, "deadlight_confirm": 12},
		})
		for name := range s.hosts {
			if failed := recap[name]["failed"]; (failed == 0) != (name == "web") {
				t.Errorf("%s: %v", name, recap[name])
			}
		}
		for _, want := range []string{
			":3:9: error: ", // the place, of a broken policy
			"your own SSH session from " + peer4 + " to 22/tcp by eth0 would be cut",
		} {
			if !strings.Contains(s.log, want) {
				t.Errorf("no %q", want)
			}
		}
		for _, name := range []string{"database", "keeps"} {
			// On a slow machine the trial is over before.
			if !regexp.MustCompile(`fatal: \[` + name + `1\]: .*(Not kept: no new connection gets in\.|too late: the trial of ).*\(the host can be reached\)`).MatchString(s.log) {
				t.Errorf("%s is not told why", name)
			}
		}
		if recap["web"]["changed"] == 0 {
			t.Errorf("what was changed by hand is not undone: %v", recap["web"])
		}
		s.as(before, slices.Collect(maps.Keys(s.hosts))...)
		s.look(true)
	})

	s.run("report", func(t *testing.T) {
		s.on("database", "nft", "insert", "rule", "inet", "deadlight", "gate", "tcp", "dport", "9999", "accept")
		s.hangUp()
		if err := syscall.Kill(s.hosts["mail"].pid, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for _, h := range s.hosts {
			h.vars["deadlight_report"] = s.file("report")
			h.vars["deadlight_verify_args"] = []string{"--ports", "1-1000/tcp,8080-8081/tcp,9999/tcp", "--thorough", "0"}
		}
		recap := s.play("report.yml", 2, nil)
		b, err := os.ReadFile(s.file("report.json"))
		if err != nil {
			t.Fatal(err)
		}
		var report struct {
			Schema int
			OK     bool
			Counts map[string]int
			Hosts  []struct {
				Host, State, Drift, Verify string
				What                       []string
				Verification               json.RawMessage `json:"verify_report"`
			}
		}
		if err := json.Unmarshal(b, &report); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		if report.Schema != 1 || report.OK || !maps.Equal(report.Counts, map[string]int{"ok": 2, "findings": 2, "unknown": 1}) {
			t.Errorf("%+v", report)
		}
		table, err := os.ReadFile(s.file("report.txt"))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, h := range report.Hosts {
			got = append(got, strings.Join([]string{h.Host, h.State, h.Drift, h.Verify}, " "))
			if failed := recap[strings.TrimSuffix(h.Host, "1")]["failed"]; (failed == 0) != (h.State == "ok") {
				t.Errorf("%s: %s, and the recap says %v", h.Host, h.State, recap)
			}
			if row := regexp.MustCompile(`(?m)^` + h.Host + ` +` + h.State + ` +` + h.Drift + ` +` + h.Verify + `\b`); !row.Match(table) {
				t.Errorf("no row of %s", h.Host)
			}
			if h.Verify != "unknown" {
				if err := conforms(compileSchema(t, "verify"), "verify", h.Verification); err != nil {
					t.Error(err)
				}
			}
		}
		if d := cmp.Diff([]string{"database1 findings drift fail", "keeps1 findings none fail", "mail1 unknown unknown unknown", "names1 ok none pass", "web1 ok none pass"}, got); d != "" {
			t.Errorf("hosts (- want, + got):\n%s", d)
		}
		for _, want := range []string{"  drift: add rule ", "  verify: 9999/tcp of " + s.hosts["database"].four.String() + " is ", "  verify: 8081/tcp of ",
			" is filtered, expected open: ", "  unreachable: ", "\n5 hosts at ", ": 2 ok, 2 with findings, 1 unknown\n"} {
			if !strings.Contains(string(table), want) {
				t.Errorf("no %q", want)
			}
		}
		if t.Failed() {
			t.Logf("\n%s", table)
		}
	})
}

// run is a subtest.
func (s *site) run(name string, test func(t *testing.T)) {
	whole := s.t
	whole.Run(name, func(t *testing.T) {
		s.t = t
		defer func() { s.t = whole }()
		test(t)
	})
}

// as awaits that hosts hold what they held.
func (s *site) as(before map[string]string, names ...string) {
	s.t.Helper()
	for _, name := range names {
		for end := time.Now().Add(30 * time.Second); s.inForce(name) != before[name] && time.Now().Before(end); { // until what clears up behind a trial has
			time.Sleep(100 * time.Millisecond)
		}
		if d := cmp.Diff(before[name], s.inForce(name)); d != "" {
			s.t.Errorf("%s (- before, + now):\n%s", name, d)
		}
		if rest := s.on(name, "find", "/etc/deadlight", "-name", "*ansible*", "-o", "-name", "*next*"); rest != "" {
			s.t.Errorf("%s keeps %s", name, rest)
		}
	}
}

// build makes the program, and a package of it that is small to make.
func (s *site) build() (program, deb string) {
	s.t.Helper()
	program, deb = s.file("deadlight"), s.file("deadlight_1.0.0_all.deb")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("go build: %v\n%s", err, out)
	}
	var script bytes.Buffer
	fmt.Fprintf(&script, `set -e
umask 022
cd %s
mkdir -p deb/DEBIAN deb/usr/sbin deb/etc/deadlight
cp deadlight deb/usr/sbin/
cp "$1" deb/etc/deadlight/
echo /etc/deadlight/policy.toml >deb/DEBIAN/conffiles
printf 'Package: deadlight\nVersion: 1.0.0\nArchitecture: all\nMaintainer: a <a@deadlight.invalid>\nDescription: of a test\n' >deb/DEBIAN/control
dpkg-deb --root-owner-group -Znone --build deb %s >/dev/null
`, s.dir, deb)
	output(s.t, "sh", "-c", script.String(), "sh", must1(s.t, func() (string, error) { return filepath.Abs("../../configs/etc/policy.toml") }))
	return program, deb
}
