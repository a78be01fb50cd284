package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/systemd"
)

// Names of what is probed, and the addresses of the two sides.
const (
	listed   = "listed"   // 80/tcp, with a listener
	rescue   = "rescue"   // 22/tcp, with a listener, in [failsafe] alone
	unlisted = "unlisted" // 8080/tcp, with a listener
	nobody   = "nobody"   // 9/tcp, without: an open host answers with RST
	datagram = "datagram" // 8080/udp, with a listener

	outside4, host4 = "192.0.2.1", "192.0.2.2"
	outside6, host6 = "2001:db8:1::1", "2001:db8:1::2"
)

const bootPolicy = `version = 1
[open.web]
ports = 80
[failsafe]
ports = 22
`

const lockDownPolicy = "version = 1\n[failsafe]\nports = 22\n"

// TestBoot boots a system in systemd-nspawn, again and again as one host that
// lives through it all. Its services listen before the network is there; it is
// probed from outside from before each boot until after the power is off.
//
// It needs root, systemd-nspawn and the archive of .ci/debian-root; -short leaves
// it out, but not where CI runs.
func TestBoot(t *testing.T) {
	if testing.Short() && os.Getenv("CI") == "" {
		t.Skip("-short")
	}
	m := newMachine(t)
	m.install()
	m.services()
	m.keepState()
	const loaded = `^Applied generation \d+: 1 difference in one transaction, read back identical$`
	const good = `: last known good of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d is in force$`
	const inLockDown = `: the lock-down is in force: only 22/tcp gets in, as \[failsafe\] of `
	cases := []struct {
		name    string
		prepare func() // on the disk of a host where the policy was applied
		then    string // is run on the host before it is shut down
		full    string // the directory that has no room left
		fixed   bool   // the disk is read-only
		answers []string
		unit    string // systemctl is-failed
		says    []string
	}{{
		name:    "first boot without a policy",
		prepare: func() { m.remove(policyFile); m.remove(stateDir) },
		answers: []string{listed, rescue, unlisted, nobody, datagram},
		unit:    "active", says: []string{`^deadlight: warning: there is no policy at /etc/deadlight/policy.toml and none was ever applied: nothing of deadlight filters$`},
	}, {
		name:    "unit disabled",
		prepare: func() { m.chroot("systemctl", "disable", "deadlight.service") },
		answers: []string{listed, rescue, unlisted, nobody, datagram},
		unit:    "inactive",
	}, {
		name:    "policy",
		prepare: func() { m.remove(stateDir) },
		// Neither a reload nor a stop opens anything.
		then:    "systemctl reload deadlight.service && probe && systemctl stop deadlight.service && probe && systemctl start deadlight.service && probe",
		answers: []string{listed},
		unit:    "active", says: []string{loaded, `^No changes: `, `^No changes: `},
	}, {
		name: "policy again, with its state",
		// First the host itself is verified, then the outside, which filters nothing.
		then: `
deadlight drift --quiet || touch /report/drift
mkdir -p /var/lib/prometheus/node-exporter
echo "DEADLIGHT_VERIFY=--ports 1-999/tcp,1-999/udp --textfile /var/lib/prometheus/node-exporter/deadlight_verify.prom" >/etc/deadlight/verify.env
systemctl start deadlight-verify.service
deadlight status --json >/report/status.json
cp /var/lib/prometheus/node-exporter/deadlight_verify.prom /report/prom
echo "DEADLIGHT_VERIFY=/etc/deadlight/policy.toml --json --target ` + outside4 + ` --ports 1-99/tcp" >/etc/deadlight/verify.env
systemctl start deadlight-verify.service
journalctl -b -q -o cat _SYSTEMD_UNIT=deadlight-verify.service >/report/verify`,
		answers: []string{listed},
		unit:    "active", says: []string{loaded},
	}, {
		name: "trial that nobody confirms",
		// The new policy holds for a while; then a timer of systemd clears up.
		then: `
sed 's/ports = 80/ports = [80, 8080]/' /etc/deadlight/policy.toml >/etc/deadlight/next.toml
deadlight apply /etc/deadlight/next.toml --confirm 5s --no-wait
systemctl list-units --all --plain --no-legend 'deadlight-trial-*.timer' | sed 's/^/while: /' >/report/trial
grep -la '[e]nd-trial' /proc/[0-9]*/cmdline | sed 's/^/process: /' >>/report/trial
probe
for i in $(seq 100); do
	systemctl list-units --all --plain --no-legend 'deadlight-trial-*' | grep -q . || break
	sleep 0.2
done
systemctl list-units --all --plain --no-legend 'deadlight-trial-*' | sed 's/^/after: /' >>/report/trial
deadlight plan /etc/deadlight/policy.toml >/dev/null && echo clean >>/report/trial
deadlight drift || touch /report/drift`,
		answers: []string{listed, unlisted},
		unit:    "active", says: []string{loaded},
	}, {
		name:    "other firewalls that flush every table",
		prepare: m.flushers,
		answers: []string{listed},
		unit:    "active", says: []string{loaded},
	}, {
		name:    "broken policy",
		prepare: func() { m.write(policyFile, bootPolicy+"[open.mail]\nport = 25\n") },
		answers: []string{listed},
		unit:    "failed", says: []string{`^deadlight: error: /etc/deadlight/policy.toml:7:1: unknown key "port" in \[open.mail\]` + good},
	}, {
		name:    "missing policy",
		prepare: func() { m.remove(policyFile) },
		answers: []string{listed},
		unit:    "failed", says: []string{`^deadlight: error: there is no policy at /etc/deadlight/policy.toml` + good},
	}, {
		name: "broken policy and truncated state",
		prepare: func() {
			m.write(policyFile, "version")
			m.write(failsafeFile, lockDownPolicy)
			m.truncate(stateDir + "/good")
		},
		answers: []string{rescue},
		unit:    "failed", says: []string{`^deadlight: error: /etc/deadlight/policy.toml:1:7: .*; state /var/lib/deadlight/good: damaged: it is no longer what was written` + inLockDown + `/etc/deadlight/failsafe.toml says$`},
	}, {
		name:    "truncated state",
		prepare: func() { m.truncate(stateDir + "/good") },
		answers: []string{listed},
		unit:    "active", says: []string{loaded},
	}, {
		name:    "full disk for the state",
		full:    stateDir,
		answers: []string{listed},
		unit:    "active", says: []string{`^deadlight: warning: /etc/deadlight/policy.toml is in force, but not recorded as applied: state /var/lib/deadlight/.*: no space left on device$`, loaded},
	}, {
		name:    "full disk for everything",
		full:    ".",
		answers: []string{listed},
		unit:    "active", says: []string{`^deadlight: warning: /etc/deadlight/policy.toml is in force, but not recorded as applied: state /var/lib/deadlight/.*: no space left on device$`, loaded},
	}, {
		name: "full disk, broken policy and no state",
		full: ".",
		prepare: func() {
			m.write(policyFile, "version = 1\n[open]\nssh = 22\n")
			m.write(failsafeFile, lockDownPolicy)
			m.remove(stateDir)
		},
		answers: []string{rescue},
		unit:    "failed", says: []string{`^deadlight: error: /etc/deadlight/policy.toml:3:.*; state /var/lib/deadlight: nothing is recorded as applied here` + inLockDown},
	}, {
		name:    "read-only disk without a state",
		fixed:   true,
		prepare: func() { m.remove(stateDir) },
		answers: []string{listed},
		unit:    "active", says: []string{`^deadlight: warning: /etc/deadlight/policy.toml is in force, but not recorded as applied: state /var/lib/deadlight: read-only file system$`, loaded},
	}, {
		name:    "full disk and broken policy",
		full:    stateDir,
		prepare: func() { m.write(policyFile, "version = 2\n") },
		answers: []string{listed},
		unit:    "failed", says: []string{`^deadlight: error: /etc/deadlight/policy.toml:1:11: .*` + good},
	}}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m.T = t
			m.restore()
			if c.prepare != nil {
				c.prepare()
			}
			r := m.boot(c.then, c.full, c.fixed)
			for _, p := range r.probes {
				t.Logf("%-8s %d of %d answered", p.name, p.answers.Load(), p.sent.Load())
				for _, err := range p.errors() {
					t.Errorf("%s: %v", p.name, err)
				}
				kind, _, _ := strings.Cut(p.name, "/")
				switch n := p.answers.Load(); {
				case p.sent.Load() == 0:
					t.Errorf("%s was never probed", p.name)
				case n > 0 && !slices.Contains(c.answers, kind):
					t.Errorf("%s answered %d times", p.name, n)
				case n == 0 && slices.Contains(c.answers, kind):
					t.Errorf("%s never answered", p.name)
				}
			}
			if r.unit != c.unit {
				t.Errorf("deadlight.service is %s, want %s", r.unit, c.unit)
			}
			if len(r.says) != len(c.says) {
				t.Errorf("it says %q, want %d lines", r.says, len(c.says))
			} else {
				for i, want := range c.says {
					if !regexp.MustCompile(want).MatchString(r.says[i]) {
						t.Errorf("it says %q, want %s", r.says[i], want)
					}
				}
			}
			// What an admin looks at shows the reason.
			status, err := os.ReadFile(m.path("report/status"))
			m.check(err)
			if n := len(r.says); c.unit == "failed" && n > 0 && !bytes.Contains(status, []byte(r.says[n-1]+"\n")) {
				t.Errorf("systemctl status does not show the reason:\n%s", status)
			}
			if m.has("report/drift") {
				t.Error("drift after the boot")
			}
			if strings.Contains(c.then, "--confirm") {
				trial, err := os.ReadFile(m.path("report/trial"))
				if err != nil || !regexp.MustCompile(`^while: deadlight-trial-\S+\.timer .*\nclean\n$`).Match(trial) {
					t.Errorf("the end of the trial: %v\n%s", err, trial)
				}
			}
			if strings.Contains(c.then, "deadlight-verify") {
				report, err := os.ReadFile(m.path("report/verify"))
				if err != nil || !bytes.Contains(report, []byte("\nPASS: ")) || !bytes.Contains(report, []byte(`"verdict": "fail"`)) {
					t.Errorf("deadlight-verify.service says %v\n%s", err, report)
				}
				for name, want := range map[string]string{"status.json": `"verdict": "pass"`, "prom": ",verdict=\"pass\"} 1\n"} {
					if b, err := os.ReadFile(m.path("report/" + name)); err != nil || !bytes.Contains(b, []byte(want)) {
						t.Errorf("%s: %v\n%s", name, err, b)
					}
				}
			}
			if t.Failed() {
				t.Logf("console:\n%s", r.console)
			}
		})
	}
}

// Names on the disk of the host.
const (
	policyFile   = "etc/deadlight/policy.toml"
	failsafeFile = "etc/deadlight/failsafe.toml"
	stateDir     = "var/lib/deadlight"
)

// machine is the host that is booted, and its outside, which is the network
// namespace of the test.
type machine struct {
	*testing.T
	dir    string // root, report, kept state, the file of its network namespace
	cgroup string
	mac    net.HardwareAddr
	during map[int]func() // what is done while the host waits at an ask
}

// newMachine has what .ci/debian-root makes of these words.
func newMachine(t *testing.T, words ...string) *machine {
	t.Helper()
	m := &machine{T: t, dir: t.TempDir()}
	ids, err := os.ReadFile("/proc/self/uid_map")
	m.check(err)
	if !regexp.MustCompile(`^\s*0\s+0\s+4294967295\s*$`).Match(ids) {
		t.Fatal("booting a system takes root: sudo -E go test -run TestBoot ./cmd/deadlight, or leave it out with -short")
	}
	if _, err := exec.LookPath("systemd-nspawn"); err != nil {
		t.Fatalf("install systemd-container, or use .ci/test: %v", err)
	}
	archive := strings.TrimSpace(m.output("../../.ci/debian-root", words...))
	m.mount("tmpfs", m.dir, "tmpfs", "size=64m,mode=0755")
	for _, d := range []string{"root", "report", "cgroup", "kept"} {
		m.check(os.Mkdir(filepath.Join(m.dir, d), 0o755))
	}
	m.mount("tmpfs", m.path("root"), "tmpfs", "size=320m,nr_inodes=16000,mode=0755")
	m.output("tar", "--numeric-owner", "--xattrs", "-xpf", archive, "-C", m.path("root"))
	m.mount("cgroup2", m.path("cgroup"), "cgroup2", "")
	m.cgroup = m.path("cgroup/deadlight-test-" + fmt.Sprint(time.Now().UnixNano()))
	m.check(os.Mkdir(m.cgroup, 0o755))
	t.Cleanup(func() {
		// After a boot that had to be killed.
		if err := os.WriteFile(filepath.Join(m.cgroup, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Error(err)
		}
		removeCgroup(t, m.cgroup)
	})
	return m
}

func (m *machine) check(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

func (m *machine) output(name string, args ...string) string {
	m.Helper()
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		m.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return string(out)
}

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }
func (m *machine) disk(name string) string { return filepath.Join(m.dir, "root", name) }

func (m *machine) has(name string) bool {
	_, err := os.Stat(m.path(name))
	return err == nil
}

// mount mounts in the mount namespace of the test.
func (m *machine) mount(what, where, kind, options string) {
	m.Helper()
	m.check(unix.Mount(what, where, kind, 0, options))
	t := m.T // of those that share the machine
	t.Cleanup(func() {
		if err := unix.Unmount(where, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", where, err)
		}
	})
}

// overlay takes what is written to the disk from now on, until the test ends.
func (m *machine) overlay() {
	m.Helper()
	over := m.path("over")
	m.check(os.MkdirAll(over, 0o755))
	m.mount("tmpfs", over, "tmpfs", "size=300m,mode=0755")
	for _, d := range []string{"upper", "work"} {
		m.check(os.Mkdir(filepath.Join(over, d), 0o755))
	}
	m.mount("overlay", m.path("root"), "overlay", fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%[2]s/work", m.path("root"), over))
}

func (m *machine) chroot(args ...string) {
	m.Helper()
	m.output("chroot", append([]string{m.path("root")}, args...)...)
}

func (m *machine) write(name, text string) {
	m.Helper()
	m.check(os.MkdirAll(filepath.Dir(m.disk(name)), 0o755))
	m.check(os.WriteFile(m.disk(name), []byte(text), 0o644))
}

func (m *machine) remove(name string) { m.Helper(); m.check(os.RemoveAll(m.disk(name))) }

func (m *machine) truncate(name string) { m.Helper(); m.check(os.Truncate(m.disk(name), 100)) }

// keepState applies the policy as an admin does, before the first boot under it,
// and keeps what that leaves on the disk.
func (m *machine) keepState() {
	m.Helper()
	m.write(policyFile, bootPolicy)
	m.output("unshare", "--net", "--mount", "chroot", m.path("root"), "sh", "-ec",
		"mount -t proc proc /proc && exec deadlight apply --state-dir /"+stateDir)
	m.output("cp", "-a", m.disk(stateDir), m.path("kept/state"))
}

// flushers are units in the places of others' that begin with a flush: one as
// early as it can be, one with the dependencies of an ordinary service.
func (m *machine) flushers() {
	m.Helper()
	for name, unit := range map[string]string{
		"nftables":  "DefaultDependencies=no\nWants=network-pre.target\nBefore=network-pre.target\n[Install]\nWantedBy=sysinit.target\n",
		"firewalld": "Wants=network-pre.target\nBefore=network-pre.target\n[Install]\nWantedBy=multi-user.target\n",
	} {
		m.write("etc/systemd/system/"+name+".service", `[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c "sleep 0.5; deadlight remove --state-dir /run/none"
[Unit]
`+unit)
		m.chroot("systemctl", "enable", name+".service")
	}
}

// fill leaves no room for a byte and none for a name.
func (m *machine) fill(dir string) {
	m.Helper()
	dir = filepath.Join(dir, "filler")
	m.check(os.Mkdir(dir, 0o755))
	f, err := os.Create(filepath.Join(dir, "0"))
	m.check(err)
	for _, size := range []int{1 << 20, 4096, 1} {
		for err == nil {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			m.Fatalf("fill the disk: %v", err)
		}
		err = nil
	}
	m.check(f.Close())
	for i := 1; err == nil; i++ {
		err = unix.Mknod(filepath.Join(dir, fmt.Sprint(i)), unix.S_IFREG, 0)
	}
	if !errors.Is(err, unix.ENOSPC) {
		m.Fatalf("fill the disk: %v", err)
	}
}

// restore undoes what a case did.
func (m *machine) restore() {
	m.Helper()
	m.remove("filler")
	for _, name := range []string{"nftables.service", "firewalld.service"} {
		if m.has("root/etc/systemd/system/" + name) {
			m.chroot("systemctl", "disable", name)
			m.remove("etc/systemd/system/" + name)
		}
	}
	m.chroot("systemctl", "enable", "deadlight.service")
	m.write(policyFile, bootPolicy)
	m.remove(failsafeFile)
	m.remove(stateDir)
	m.output("cp", "-a", m.path("kept/state"), m.disk(stateDir))
	m.clearReport()
}

// clearReport forgets what the host wrote.
func (m *machine) clearReport() {
	m.Helper()
	m.check(os.RemoveAll(m.path("report")))
	m.check(os.Mkdir(m.path("report"), 0o755))
}

// compile builds a program of ours onto the disk.
func (m *machine) compile(name, from string) {
	m.Helper()
	cmd := exec.Command("go", "build", "-buildvcs=false", "-o", m.disk(name), from)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		m.Fatalf("%v\n%s", err, out)
	}
}

// install puts the product onto the disk, without a package.
func (m *machine) install() {
	m.Helper()
	m.compile("usr/sbin/deadlight", ".")
	for _, name := range systemd.Names() {
		unit, err := systemd.Read(name)
		m.check(err)
		m.write("etc/systemd/system/"+name, string(unit))
	}
}

// services puts what listens, the network and the script of a boot onto the disk.
func (m *machine) services() {
	m.Helper()
	m.compile("usr/local/sbin/listen", "./testdata/listen")
	// As early as a service can be.
	m.write("etc/systemd/system/listen.service", `[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/local/sbin/listen tcp/80 tcp/22 tcp/8080 udp/8080
[Install]
WantedBy=sysinit.target
`)
	m.write("etc/systemd/network/10-host0.network", `[Match]
Name=host0
[Network]
IPv6AcceptRA=no
LinkLocalAddressing=no
[Address]
Address=`+host4+`/24
[Address]
Address=`+host6+`/64
DuplicateAddressDetection=none
`)
	m.write("etc/systemd/system/report.service", `[Unit]
After=network.target deadlight.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/sh /usr/local/sbin/report
[Install]
WantedBy=multi-user.target
`)
	m.chroot("systemctl", "enable", "listen.service", "report.service", "systemd-networkd.service")
}

// wire joins the test's network namespace and one that the host will get.
func (m *machine) wire() {
	m.Helper()
	file := m.path("netns")
	m.check(os.WriteFile(file, nil, 0o600))
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", file, "", unix.MS_BIND, "")
		}
		made <- err
	}()
	m.check(<-made)
	ns, err := os.Open(file)
	m.check(err)
	m.Cleanup(func() { m.check(errors.Join(ns.Close(), unix.Unmount(file, unix.MNT_DETACH))) })

	m.mac = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	m.check(netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "to-host"}, PeerName: "host0", PeerHardwareAddr: m.mac, PeerNamespace: netlink.NsFd(int(ns.Fd())),
	}))
	link, err := netlink.LinkByName("to-host")
	m.check(err)
	m.Cleanup(func() { m.check(netlink.LinkDel(link)) })
	m.check(netlink.LinkSetUp(link))
	for _, a := range []struct{ own, far, bits string }{{outside4, host4, "/24"}, {outside6, host6, "/64"}} {
		addr, err := netlink.ParseAddr(a.own + a.bits)
		m.check(err)
		addr.Flags = unix.IFA_F_NODAD
		m.check(netlink.AddrAdd(link, addr))
		// A packet is on the wire the moment there is one.
		m.check(netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.ParseIP(a.far), HardwareAddr: m.mac,
		}))
	}
}

// bootReport is what one boot showed.
type bootReport struct {
	probes  []*bootProbe
	asks    [][]int64 // answers to each of the probes while the host waited
	unit    string
	says    []string // of deadlight.service, a line each
	console string
}

// boot runs the host from power on to power off.
func (m *machine) boot(then, full string, fixed bool) *bootReport {
	m.Helper()
	if then == "" {
		then = ":"
	}
	// The host asks to be probed on; see answerAsk.
	m.write("usr/local/sbin/report", `
n=0
probe() {
	n=$((n + 1))
	touch /report/ask-$n
	until [ -e /report/done-$n ]; do sleep 0.05; done
}
probe
systemctl is-failed deadlight.service >/report/unit
systemctl status --no-pager --full deadlight.service >/report/status
`+then+`
journalctl --sync
journalctl -b -q -o cat _SYSTEMD_UNIT=deadlight.service >/report/says
systemctl poweroff
`)
	var args []string
	if fixed {
		args = append(args, "--read-only")
	}
	if full != "" {
		dir := m.disk(full)
		if full != "." {
			dir = m.path("full")
			m.check(os.MkdirAll(dir, 0o700))
			m.mount("tmpfs", dir, "tmpfs", "size=64k,nr_inodes=100,mode=0700")
			m.output("cp", "-a", m.disk(full)+"/.", dir)
			args = append(args, "--bind="+dir+":/"+full)
		}
		m.fill(dir)
	}

	m.wire()
	probes, stop := startProbes()
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var asks [][]int64
	answering := make(chan struct{})
	go func() {
		defer close(answering)
		defer cancel() // who waits for an answer would do so for ever
		asks = m.answerAsks(ctx, probes)
	}()
	console, err := m.power(ctx, args...)
	cancel()
	<-answering
	last := probes[0].sent.Load() + 10 // the power is off
	for probes[0].sent.Load() < last {
		time.Sleep(time.Millisecond)
	}
	stop()
	if err != nil {
		m.Fatalf("boot: %v\n%s", err, console)
	}
	r := &bootReport{probes: probes, asks: asks, console: console}
	unit, err := os.ReadFile(m.path("report/unit"))
	m.check(err)
	r.unit = strings.TrimSpace(string(unit))
	says, err := os.ReadFile(m.path("report/says"))
	m.check(err)
	if text := strings.TrimSpace(string(says)); text != "" {
		r.says = strings.Split(text, "\n")
	}
	return r
}

// power runs the host until its power is off, and gives what stands on its console.
func (m *machine) power(ctx context.Context, more ...string) (console string, err error) {
	args := append([]string{"--boot", "-D", m.path("root"), "--register=no", "--keep-unit", "--machine=deadlight-test", "--console=pipe", "--settings=no",
		"--network-namespace-path=" + m.path("netns"), "--capability=CAP_NET_ADMIN,CAP_NET_RAW", "--bind=" + m.path("report") + ":/report"}, more...)
	cmd := exec.CommandContext(ctx, "unshare", append([]string{"--mount", "--propagation", "private", "sh", "-ec", `
umount -R /sys/fs/cgroup 2>/dev/null || true
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo $$ >/sys/fs/cgroup/"$0"/cgroup.procs
exec systemd-nspawn "$@"`, filepath.Base(m.cgroup)}, args...)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Env = append(os.Environ(), "SYSTEMD_NSPAWN_TMPFS_TMP=0") // /tmp is on the disk, which may be full
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	return out.String(), err
}

// answerAsks lets the host go on once every port was probed often enough since
// it asked, and some port answered. It gives the answers to each ask.
func (m *machine) answerAsks(ctx context.Context, probes []*bootProbe) (asks [][]int64) {
	const enough = 20
	for n := 1; ; n++ {
		for !m.has(fmt.Sprintf("report/ask-%d", n)) {
			if !pause(ctx) {
				return asks
			}
		}
		var sent, answers []int64
		for _, p := range probes {
			sent, answers = append(sent, p.sent.Load()), append(answers, p.answers.Load())
		}
		asked := func() bool {
			answered := false
			for i, p := range probes {
				if p.sent.Load() < sent[i]+enough {
					return false
				}
				answered = answered || p.answers.Load() >= answers[i]+enough/2
			}
			return answered
		}
		for !asked() {
			if !pause(ctx) {
				return asks
			}
		}
		during := make([]int64, len(probes))
		for i, p := range probes {
			during[i] = p.answers.Load() - answers[i]
		}
		asks = append(asks, during)
		if do := m.during[n]; do != nil {
			do()
		}
		if err := os.WriteFile(m.path(fmt.Sprintf("report/done-%d", n)), nil, 0o644); err != nil {
			m.Error(err)
			return asks
		}
	}
}

func pause(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(10 * time.Millisecond):
		return true
	}
}

// bootProbe asks one port over one family, all the time.
type bootProbe struct {
	name          string // kind/family
	network, addr string
	sent, answers atomic.Int64

	mu    sync.Mutex
	other []error // that say nothing about the host
}

func (p *bootProbe) errors() []error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.other
}

// startProbes probes until stop is called, which waits for the last answer.
func startProbes() (probes []*bootProbe, stop func()) {
	for _, host := range []string{host4, host6} {
		family := "ipv4"
		if netip.MustParseAddr(host).Is6() {
			family = "ipv6"
		}
		for _, k := range []struct{ kind, network, port string }{
			{listed, "tcp", "80"}, {rescue, "tcp", "22"}, {unlisted, "tcp", "8080"}, {nobody, "tcp", "9"}, {datagram, "udp", "8080"},
		} {
			probes = append(probes, &bootProbe{name: k.kind + "/" + family, network: k.network, addr: net.JoinHostPort(host, k.port)})
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	for _, p := range probes {
		all.Add(1)
		go func() {
			defer all.Done()
			for pause(ctx) {
				all.Add(1)
				go func() {
					defer all.Done()
					p.ask()
				}()
			}
		}()
	}
	return probes, func() {
		cancel()
		all.Wait()
	}
}

// ask sends one packet. Whatever comes back is an answer, a refusal too.
func (p *bootProbe) ask() {
	p.sent.Add(1)
	const patience = 200 * time.Millisecond // less than a retransmission takes
	c, err := net.DialTimeout(p.network, p.addr, patience)
	if err == nil {
		if p.network == "udp" {
			_ = c.SetDeadline(time.Now().Add(patience))
			if _, err = c.Write([]byte("?")); err == nil {
				_, err = c.Read(make([]byte, 1))
			}
		}
		_ = c.Close()
	}
	var timeout net.Error
	switch {
	case err == nil, errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES):
		p.answers.Add(1)
	case errors.As(err, &timeout) && timeout.Timeout():
	default:
		p.mu.Lock()
		defer p.mu.Unlock()
		if len(p.other) < 3 {
			p.other = append(p.other, err)
		}
	}
}

// removeCgroup removes a cgroup that no process is in any more, and those below.
func removeCgroup(t *testing.T, dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if e.IsDir() {
			removeCgroup(t, filepath.Join(dir, e.Name()))
		}
	}
	// What was killed takes a moment to be gone.
	for range 200 {
		if err = os.Remove(dir); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Error(err)
	}
}
