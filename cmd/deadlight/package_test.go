package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The version, commit and time that the packages of these tests claim.
const (
	packageVersion = "1.2.3~rc1"
	packageCommit  = "c0ffee0000000000000000000000000000000000"
	packageTime    = "1790000000"
	packageDate    = "2026-09-21T14:13:20Z"
)

// buildPackages runs .ci/package of the tree at top, and gives what it made by
// name.
func buildPackages(t *testing.T, top, version string, arch ...string) map[string]string {
	t.Helper()
	if testing.Short() && os.Getenv("CI") == "" {
		t.Skip("-short")
	}
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(top, ".ci", "package"), append([]string{dir}, arch...)...)
	cmd.Env = append(os.Environ(), "DEADLIGHT_VERSION="+version, "DEADLIGHT_COMMIT="+packageCommit, "SOURCE_DATE_EPOCH="+packageTime)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf(".ci/package: %v\n%s", err, out)
	}
	made, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, name := range made {
		found[filepath.Base(name)] = name
	}
	return found
}

// copyTree copies what git would, to where nothing but its name is the same.
func copyTree(t *testing.T) string {
	t.Helper()
	top := filepath.Join(t.TempDir(), "elsewhere", "source")
	err := fs.WalkDir(os.DirFS("../.."), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.Name() == ".git":
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return os.MkdirAll(filepath.Join(top, name), 0o700)
		case !d.Type().IsRegular():
			return nil
		}
		b, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(top, name), b, info.Mode().Perm()&0o700)
	})
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// output is what a program prints; it must end well.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return string(out)
}

// documentedFiles gives the lines of testdata/package-files.txt for a kind of
// package, as "MODE NAME", with those of the manual pages and the examples; conf:
// only the files of configuration.
func documentedFiles(t *testing.T, kind string, conf bool) []string {
	t.Helper()
	b, err := os.ReadFile("testdata/package-files.txt")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		isConf := len(f) == 4 && f[1] == "conf"
		switch {
		case f[0] == "#", f[0] != "both" && f[0] != kind, conf && !isConf:
		default:
			lines = append(lines, strings.Join(f[len(f)-2:], " "))
		}
	}
	pages, err := filepath.Glob("man/*.[1-8]")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		if !conf {
			lines = append(lines, fmt.Sprintf("0644 /usr/share/man/man%s/%s.gz", page[len(page)-1:], filepath.Base(page)))
		}
	}
	for _, dir := range []string{"ansible", "ci", "cloud-init", "grafana"} {
		err := fs.WalkDir(os.DirFS("../../configs"), dir, func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !conf {
				lines = append(lines, "0644 /usr/share/doc/deadlight/examples/"+name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[5:], b[5:]) })
	return lines
}

// debFiles are the files of a package, and the bytes of those that are asked for.
func debFiles(t *testing.T, file string, want ...string) (lines []string, contents map[string][]byte) {
	t.Helper()
	contents = map[string][]byte{}
	r := tar.NewReader(strings.NewReader(output(t, "dpkg-deb", "--fsys-tarfile", file)))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(h.Name, ".")
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "root" || h.Gname != "root" {
			t.Errorf("%s belongs to %d:%d %s:%s", name, h.Uid, h.Gid, h.Uname, h.Gname)
		}
		if fmt.Sprint(h.ModTime.Unix()) != packageTime {
			t.Errorf("%s is of %s, not of the commit", name, h.ModTime)
		}
		if h.Typeflag == tar.TypeDir {
			if h.Mode != 0o755 {
				t.Errorf("directory %s has mode %o", name, h.Mode)
			}
			continue
		}
		lines = append(lines, fmt.Sprintf("%04o %s", h.Mode, name))
		if slices.Contains(want, name) {
			if contents[name], err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[5:], b[5:]) })
	return lines, contents
}

// TestPackageFiles: the packages hold what is documented and nothing else, for
// both architectures, are free of errors for lintian, and are the same bytes when
// they are built in another place.
func TestPackageFiles(t *testing.T) {
	made := buildPackages(t, "../..", packageVersion)
	names := slices.Sorted(maps.Keys(made))
	want := []string{
		"deadlight-1.2.3~rc1-1.aarch64.rpm", "deadlight-1.2.3~rc1-1.x86_64.rpm",
		"deadlight_1.2.3~rc1_amd64.deb", "deadlight_1.2.3~rc1_arm64.deb",
	}
	if d := cmp.Diff(want, names); d != "" {
		t.Fatalf("packages (- want, + got):\n%s", d)
	}
	var debs []string
	for i, machine := range []elf.Machine{elf.EM_X86_64, elf.EM_AARCH64} {
		arch := []string{"amd64", "arm64"}[i]
		deb := made["deadlight_"+packageVersion+"_"+arch+".deb"]
		lines, contents := debFiles(t, deb, "/usr/sbin/deadlight", "/etc/deadlight/policy.toml")
		if d := cmp.Diff(documentedFiles(t, "deb", false), lines); d != "" {
			t.Errorf("%s (- documented, + in the package):\n%s", filepath.Base(deb), d)
		}
		starter, err := os.ReadFile("../../configs/etc/policy.toml")
		if err != nil || !bytes.Equal(contents["/etc/deadlight/policy.toml"], starter) {
			t.Errorf("%s: the policy is not that of configs/etc: %v", arch, err)
		}
		program := contents["/usr/sbin/deadlight"]
		checkProgram(t, program, machine)
		if arch == runtime.GOARCH {
			checkVersion(t, program)
		}
		for _, line := range strings.Fields(output(t, "dpkg-deb", "--info", deb, "conffiles")) {
			if conf := documentedFiles(t, "deb", true); !slices.Contains(conf, "0644 "+line) {
				t.Errorf("%s: conffile %s, documented are %q", arch, line, conf)
			}
		}
		debs = append(debs, deb)
	}
	output(t, "lintian", append([]string{"--allow-root", "--fail-on", "error"}, debs...)...)
	for _, arch := range []string{"x86_64", "aarch64"} {
		rpm := made["deadlight-"+packageVersion+"-1."+arch+".rpm"]
		var lines, conf []string
		for line := range strings.Lines(output(t, "rpm", "-qp", "--qf", "[%{FILEMODES:perms} %{FILEMODES:octal} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILEMTIMES} %{FILEFLAGS} %{FILENAMES}\n]", rpm)) {
			f := strings.Fields(line)
			if f[2] != "root:root" || f[3] != packageTime {
				t.Errorf("%s: %s", arch, line)
			}
			if strings.HasPrefix(f[0], "d") {
				continue
			}
			entry := f[1][len(f[1])-4:] + " " + f[5]
			lines = append(lines, entry)
			if f[4] == "17" { // RPMFILE_CONFIG | RPMFILE_NOREPLACE
				conf = append(conf, entry)
			}
		}
		slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[5:], b[5:]) })
		if d := cmp.Diff(documentedFiles(t, "rpm", false), lines); d != "" {
			t.Errorf("%s (- documented, + in the package):\n%s", filepath.Base(rpm), d)
		}
		if d := cmp.Diff(documentedFiles(t, "rpm", true), conf); d != "" {
			t.Errorf("%s, configuration (- documented, + in the package):\n%s", filepath.Base(rpm), d)
		}
	}

	t.Setenv("TZ", "Asia/Tokyo")
	again := buildPackages(t, copyTree(t), packageVersion)
	for _, name := range names {
		one, err := os.ReadFile(made[name])
		two, err2 := os.ReadFile(again[name])
		if err := errors.Join(err, err2); err != nil || !bytes.Equal(one, two) {
			t.Errorf("%s is not the same when it is built in another place: %v", name, err)
		}
	}
}

// checkProgram: one file runs everywhere, and is not larger than promised.
func checkProgram(t *testing.T, program []byte, machine elf.Machine) {
	t.Helper()
	if len(program) > 12_000_000 {
		t.Errorf("%s: %d bytes are more than 12 MB", machine, len(program))
	}
	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		t.Error(err)
		return
	}
	if f.Machine != machine || f.Section(".symtab") != nil || f.Section(".debug_info") != nil ||
		slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC }) {
		t.Errorf("%s: for %s, or not static, or not stripped", machine, f.Machine)
	}
}

func checkVersion(t *testing.T, program []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "deadlight")
	if err := os.WriteFile(file, program, 0o755); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("deadlight %s, commit %s of %s, %s linux/%s\n", packageVersion, packageCommit, packageDate, runtime.Version(), runtime.GOARCH)
	if got := output(t, file, "version"); got != want {
		t.Errorf("version prints %q, want %q", got, want)
	}
}

// installCommands are those of the README that lead from the package to a verified
// host: before its reboot and after it.
func installCommands(t *testing.T) (before, after []string) {
	t.Helper()
	_, section, found := strings.Cut(readme(t), "\n### Packages\n")
	_, section, foundToo := strings.Cut(section, "\n```sh\n")
	if !found || !foundToo {
		t.Fatal("README.md does not show how a package is installed")
	}
	block, _, _ := strings.Cut(section, "\n```")
	for line := range strings.Lines(block) {
		line, _, _ = strings.Cut(line, " #")
		before = append(before, strings.TrimSpace(line))
	}
	reboot := slices.Index(before, "sudo reboot")
	if reboot < 0 || reboot == len(before)-1 || !strings.HasPrefix(before[0], "sudo apt install ./") {
		t.Fatalf("README.md does not lead from apt install to a host that was started again: %q", before)
	}
	return before[:reboot], before[reboot+1:]
}

// What the host of TestPackage does between its boots, and writes to /report; see
// the places where that is read.
const (
	freshly = `
systemctl is-enabled deadlight.service deadlight-watch.service deadlight-verify.timer >/report/enabled
systemctl is-active deadlight.service deadlight-watch.service deadlight-verify.timer >/report/active
deadlight status --json >/report/fresh
deadlight check --json >/report/starter
probe                                                       # ask 2: installed
`
	lastly = `
systemctl is-enabled deadlight.service deadlight-watch.service deadlight-verify.timer >/report/enabled-then
systemctl is-active deadlight.service deadlight-watch.service deadlight-verify.timer >/report/active-then
cp /etc/deadlight/policy.toml /report/policy
probe                                                       # ask 3: the policy
`
	secondDay = `
systemctl is-active deadlight.service deadlight-watch.service deadlight-verify.timer >/report/active
deadlight status --json >/report/verified; echo $? >>/report/verified # 1 if the backstops counted anything
running() { systemctl show --property=ActiveState,InvocationID deadlight.service; }
systemctl show --property=ActiveState,MainPID deadlight-watch.service >/report/watch-before
running >/report/before
DEBIAN_FRONTEND=noninteractive apt-get install -y -o Dpkg::Options::=--force-confold /opt/two.deb </dev/null >/report/upgraded 2>&1
running >/report/after
systemctl show --property=ActiveState,MainPID deadlight-watch.service >/report/watch-after
deadlight version >/report/version
cmp /etc/deadlight/policy.toml /report/policy >/report/kept 2>&1
ls /etc/deadlight >/report/beside
deadlight drift >/report/drifted 2>&1; echo $? >>/report/drifted
probe
apt-get remove -y deadlight </dev/null >/report/removed 2>&1
ls /usr/sbin/deadlight /usr/lib/systemd/system/deadlight* /etc/deadlight/policy.toml /var/lib/deadlight/good >/report/left 2>/dev/null
find /etc/systemd/system -name 'deadlight*' >/report/links
systemctl is-active deadlight.service deadlight-watch.service >/report/inactive
probe
apt-get purge -y deadlight </dev/null >/report/purged 2>&1
find / -xdev -name '*deadlight*' -not -path '/proc/*' -not -path '/sys/*' -not -path '/report/*' -not -path '/root/*' >/report/rest
probe
`
)

// TestPackage lives through the life of the package on a host that boots with
// nothing of us: it comes to be verified by the commands of the README, is started
// and verified again, upgraded; then the package is removed and purged. The host is
// probed from outside all the while, also by nmap: from the first time that the
// policy is in force until the power is off no port that it closes answers.
//
// It needs what TestBoot needs.
func TestPackage(t *testing.T) {
	before, after := installCommands(t)
	one := buildPackages(t, "../..", "1.0.0", runtime.GOARCH)
	other := copyTree(t)
	starter := filepath.Join(other, "configs/etc/policy.toml")
	text, err := os.ReadFile(starter)
	if err == nil {
		err = os.WriteFile(starter, append(text, "# Another starter.\n"...), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	two := buildPackages(t, other, "1.0.1", runtime.GOARCH)

	m := newMachine(t)
	m.services()
	m.gateway()
	deb := "deadlight_1.0.0_" + runtime.GOARCH + ".deb"
	m.output("cp", one[deb], m.disk("root/"+deb))
	m.output("install", "-D", two["deadlight_1.0.1_"+runtime.GOARCH+".deb"], m.disk("opt/two.deb"))
	// Where all are root sudo has nothing to do; the admin has a web server.
	m.program("sudo", `exec "$@"`)
	m.program("sudoedit", `printf '[open.web]\nports = 80\n' >>"$1"`)

	t.Run("from apt install to verified", func(t *testing.T) {
		m.T = t
		script := "cd /root\n"
		for i, line := range before {
			line = strings.ReplaceAll(line, "amd64", runtime.GOARCH)
			if script += said(i, line); i == 0 {
				script += freshly
			}
		}
		m.during = map[int]func(){
			2: func() { m.scan("closed", 22, 80, 8080) },
			3: func() { m.scan("filtered", 22, 80) },
		}
		r := m.boot(script+lastly, "", false)
		for i, line := range before {
			m.went(i, line)
		}
		m.says("enabled", `^disabled\ndisabled\ndisabled\n$`)
		m.says("active", `^inactive\ninactive\ninactive\n$`)
		m.says("fresh", `"table": "absent"`)
		var opens struct{ Opens []struct{ Port string } }
		if err := json.Unmarshal([]byte(m.report("starter")), &opens); err != nil || len(opens.Opens) != 1 || opens.Opens[0].Port != "22" {
			t.Errorf("the policy of the package opens %v: %v", opens, err)
		}
		m.says("enabled-then", `^enabled\nenabled\nenabled\n$`)
		m.says("active-then", `^active\nactive\nactive\n$`)
		all := []string{listed, rescue, unlisted, nobody, datagram}
		for n, want := range map[int][]string{1: all, 2: all, 3: {listed, rescue}} {
			m.answered(n, r, want)
		}
		if t.Failed() {
			t.Logf("console:\n%s", r.console)
		}
	})
	if t.Failed() {
		return
	}
	policy := m.report("policy")
	m.clearReport()
	m.check(os.WriteFile(m.path("report/policy"), []byte(policy), 0o644))

	t.Run("verified again, upgraded, removed and purged", func(t *testing.T) {
		m.T = t
		script := ""
		for i, line := range after {
			script += said(i, line)
		}
		m.during = map[int]func(){1: func() { m.scan("filtered", 22, 80) }}
		r := m.boot(script+secondDay, "", false)
		m.during = nil
		for i, line := range after {
			m.went(i, line)
		}
		for _, p := range r.probes {
			kind, _, _ := strings.Cut(p.name, "/")
			if answers, want := p.answers.Load() > 0, kind == listed || kind == rescue; answers != want || p.sent.Load() == 0 {
				t.Errorf("%s answered %d of %d times", p.name, p.answers.Load(), p.sent.Load())
			}
		}
		m.says("active", `^active\nactive\nactive\n$`)
		m.says("verified", `(?s)"verdict": "pass".*\n0\n$`)
		m.says("upgraded", `(?m)^Unpacking deadlight \(1\.0\.1\) over \(1\.0\.0\)`)
		m.says("version", `^deadlight 1\.0\.1, `)
		m.says("before", `^ActiveState=active\nInvocationID=[0-9a-f]{32}\n$`)
		if before, after := m.report("before"), m.report("after"); before != after {
			t.Errorf("the upgrade started deadlight.service anew: %q, then %q", before, after)
		}
		m.says("watch-before", `MainPID=[1-9]`)
		m.says("watch-after", `MainPID=[1-9]`)
		if before, after := m.report("watch-before"), m.report("watch-after"); before == after {
			t.Errorf("the program that watches is the old one: %q", after)
		}
		m.says("kept", `^$`)
		m.says("beside", `^policy\.toml\npolicy\.toml\.dpkg-dist\n$`)
		m.says("drifted", `\n0\n$`)
		m.says("removed", `(?s)the ruleset stays in force: removing the package opens no port.*nft delete table inet deadlight`)
		m.says("left", `^/etc/deadlight/policy\.toml\n/var/lib/deadlight/good\n$`)
		m.says("links", `^$`)
		m.says("inactive", `^inactive\ninactive\n$`)
		m.says("purged", `policy and state are gone[^z]*still in the kernel`)
		m.says("rest", `^$`)
		if t.Failed() {
			t.Logf("console:\n%s\n%s\n%s\n%s", r.console, m.report("upgraded"), m.report("removed"), m.report("purged"))
		}
	})
	t.Run("rpm", func(t *testing.T) {
		m.T = t
		m.livesAsRPM(one["deadlight-1.0.0-1."+rpmArch()+".rpm"], two["deadlight-1.0.1-1."+rpmArch()+".rpm"])
	})
}

// program puts a script for sh onto the disk.
func (m *machine) program(name, text string) {
	m.Helper()
	m.write("usr/local/bin/"+name, "#!/bin/sh\n"+text+"\n")
	m.check(os.Chmod(m.disk("usr/local/bin/"+name), 0o755))
}

// scan asks nmap, which shares nothing with us: of many ports these are open, the
// rest is in another state.
func (m *machine) scan(rest string, open ...uint16) {
	m.Helper()
	for _, host := range []string{host4, host6} {
		states := nmap(m.T, netip.MustParseAddr(host), "-p", "1-1024,8080", "--min-rate", "1000", "--max-retries", "3")
		if len(states) != 1025 {
			m.Errorf("nmap tells of %d ports of %s", len(states), host)
		}
		for port, state := range states {
			want := rest
			if slices.Contains(open, port) {
				want = "open"
			}
			if state != want {
				m.Errorf("nmap finds %d/tcp of %s %s, not %s", port, host, state, want)
			}
		}
	}
}

// rpmArch is what rpm calls the architecture of this machine.
func rpmArch() string {
	if runtime.GOARCH == "arm64" {
		return "aarch64"
	}
	return "x86_64"
}

// livesAsRPM installs, upgrades and erases on the disk of a host that is off.
func (m *machine) livesAsRPM(one, two string) {
	m.Helper()
	rpm := func(args ...string) string {
		m.Helper()
		// Debian's rpm refuses without --force-debian, which others do not know.
		cmd := exec.Command("rpm", append([]string{"--define", "_dbpath /var/lib/rpm", "--force-debian", "--root", m.path("root")}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			m.Fatalf("rpm %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	units := func() string { return m.output("find", m.disk("etc/systemd"), "-name", "deadlight*") }
	rpm("-i", one)
	if got := units(); got != "" {
		m.Errorf("the installation enables %s", got)
	}
	policy, err := os.ReadFile(m.disk(policyFile))
	m.check(err)
	m.write(policyFile, string(policy)+"# mine\n")
	m.chroot("systemctl", "enable", "deadlight.service")
	rpm("-U", two)
	if got, err := os.ReadFile(m.disk(policyFile)); err != nil || string(got) != string(policy)+"# mine\n" {
		m.Errorf("the upgrade changes the policy: %v\n%s", err, got)
	}
	if units() == "" {
		m.Error("the upgrade disables the unit")
	}
	if got := m.output("chroot", m.path("root"), "deadlight", "version"); !strings.HasPrefix(got, "deadlight 1.0.1, ") {
		m.Errorf("after the upgrade: %s", got)
	}
	said := rpm("-e", "deadlight")
	if !strings.Contains(said, "the ruleset stays in force") || strings.Contains(said, "could not be stopped") {
		m.Errorf("the removal says:\n%s", said)
	}
	if got := units(); got != "" {
		m.Errorf("the removal leaves %s", got)
	}
	left := m.output("find", m.disk("etc"), m.disk("usr"), m.disk("var"), "-name", "*deadlight*", "-type", "f")
	if _, err := os.Stat(m.disk(policyFile + ".rpmsave")); err != nil || left != "" {
		m.Errorf("the removal leaves %q, and of the policy: %v", left, err)
	}
	m.remove("etc/deadlight")
}

// report is what the host wrote into a file of /report.
func (m *machine) report(name string) string {
	m.Helper()
	b, err := os.ReadFile(m.path("report/" + name))
	m.check(err)
	return string(b)
}

func (m *machine) says(name, want string) {
	m.Helper()
	if got := m.report(name); !regexp.MustCompile(want).MatchString(got) {
		m.Errorf("%s: %q, want %s", name, got, want)
	}
}

// answered holds the answers between an ask of the host and its end against what
// is open then.
func (m *machine) answered(ask int, r *bootReport, want []string) {
	m.Helper()
	if ask > len(r.asks) {
		m.Errorf("the host asked %d times, not %d", len(r.asks), ask)
		return
	}
	for i, p := range r.probes {
		kind, _, _ := strings.Cut(p.name, "/")
		if n := r.asks[ask-1][i]; (n > 0) != slices.Contains(want, kind) {
			m.Errorf("ask %d: %s answered %d times, open are %q", ask, p.name, n, want)
		}
	}
}
