package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// runCode runs a command line in this process.
func runCode(args ...string) (code int, out, errs string) {
	var o, e lockedBuffer
	code = run(args, env{stdin: strings.NewReader(""), stdout: &o, stderr: &e})
	return code, o.String(), e.String()
}

// A vantage is another machine, reached by a real sshd: it looks from there at
// this one, and nothing of us stays there.
func TestVerifyOverSSH(t *testing.T) {
	if !mayChangeUser(t) {
		if os.Getenv("CI") != "" {
			t.Fatal("sshd takes root: .ci/test runs this test so")
		}
		t.Skip("sshd cannot work in the user namespace of an ordinary user")
	}
	l := newSSHLab(t)
	write := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(l.file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return l.file(name)
	}
	config := write("client", fmt.Sprintf("Host *\nIdentityFile %s\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n", l.file("id")))
	// The lists of the policy are sent along.
	policy := write("own.toml", "version = 1\ninclude = [\"own.d/*.toml\"]\n[set.none]\nfiles = [\"none*.txt\"]\noptional = true\n[block.none]\nfrom = \"@none\"\n")
	if err := os.Mkdir(l.file("own.d"), 0o700); err != nil {
		t.Fatal(err)
	}
	write("own.d/web.toml", "[open.web]\nports = 80\n")
	write("none1.txt", "198.51.100.0/24\n")
	hole := write("hole.toml", "version = 1\n[open.web]\nports = [80, 8080]\n")
	state := l.file("outside")
	apply := func(file string) {
		t.Helper()
		if code, out, errs := runCode("apply", file, "--state-dir", state, "--insecure-policy"); code != exitOK {
			t.Fatalf("apply: exit %d\n%s%s", code, out, errs)
		}
	}
	t.Cleanup(func() {
		if code, out, errs := runCode("remove", "--state-dir", state); code != exitOK {
			t.Errorf("remove: exit %d\n%s%s", code, out, errs)
		}
	})
	vantage := fmt.Sprintf("ssh://root@%s:%d", l.host4, sshPort)
	verifyArgs := func(more ...string) []string {
		return append([]string{"verify", policy, "--vantage", vantage, "--ssh-config", config, "--target", peer4 + "," + peer6}, more...)
	}
	left := func() []string {
		t.Helper()
		names, err := filepath.Glob(filepath.Join(os.TempDir(), "deadlight.??????????"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}

	apply(policy)
	code, out, errs := runCode(verifyArgs("--ports", "1-2000/tcp", "--json")...)
	var r struct {
		Verdict, Vantage string
		States           map[string]struct{ Closed, Filtered string }
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitOK {
		t.Fatalf("exit %d, %v\n%s%s", code, err, out, errs)
	}
	if want := vantage + ": " + l.host4.String() + " (eth0), " + l.host6.String() + " (eth0)"; r.Vantage != want {
		t.Errorf("seen from %q, want %q", r.Vantage, want)
	}
	for _, key := range []string{"tcp4", "tcp6"} {
		if s := r.States[key]; s.Closed != "80" || s.Filtered != "1-79,81-2000" {
			t.Errorf("%s: %+v", key, s)
		}
	}

	apply(hole)
	code, out, errs = runCode(verifyArgs("--ports", "1-9000/tcp")...)
	if code != exitFindings || !strings.Contains(out, "FAIL  8080/tcp  closed  expected filtered") || !strings.Contains(out, "seen from "+vantage) {
		t.Errorf("a hole: exit %d\n%s%s", code, out, errs)
	}
	if names := left(); len(names) > 0 {
		t.Errorf("left behind: %q", names)
	}

	manyOverSSH(t, l, policy, hole, vantage, config)
	if names := left(); len(names) > 0 {
		t.Errorf("left behind: %q", names)
	}

	// Who is interrupted in the middle leaves nothing either.
	c := exec.Command(l.file("deadlight"), verifyArgs("--ports", "tcp", "--max-rate", "500")...)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the program at the vantage", func() bool { return len(left()) > 0 })
	time.Sleep(500 * time.Millisecond)
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // the exit code tells
	if code := c.ProcessState.ExitCode(); code != exitInterrupted {
		t.Errorf("interrupted: exit %d", code)
	}
	await(t, "nothing left at the vantage", func() bool { return len(left()) == 0 })

	// What cannot be reached.
	vantage = "ssh://root@" + peer4 + ":1"
	code, out, errs = runCode(verifyArgs("--ports", "80/tcp")...)
	if code != exitRefused || !strings.Contains(errs, "error: the vantage could not look: ssh to "+vantage+" failed: ") {
		t.Errorf("no sshd: exit %d\n%s%s", code, out, errs)
	}
	for arg, want := range map[string]string{
		"ssh://-oProxyCommand=x":  "not a name",
		"ssh://root:x@192.0.2.1":  "a password has no place on a command line",
		"ssh://192.0.2.1/path":    "not ssh://USER@HOST:PORT",
		"ftp://192.0.2.1":         "not ssh://USER@HOST:PORT",
		"ssh://192.0.2.1:0":       "not a port",
		"ssh://a$(reboot)@192.0.": "not a name",
	} {
		vantage = arg
		if code, _, errs := runCode(verifyArgs()...); code != exitUsage || !strings.Contains(errs, want) {
			t.Errorf("%s: exit %d, want %q\n%s", arg, code, want, errs)
		}
	}
}

// A vantage of the policy looks at the host that asks it, by the address from which
// that came, and the verdict is kept; behind a translation it refuses.
func TestVerifyHereOverSSH(t *testing.T) {
	if !mayChangeUser(t) {
		if os.Getenv("CI") != "" {
			t.Fatal("sshd takes root: .ci/test runs this test so")
		}
		t.Skip("sshd cannot work in the user namespace of an ordinary user")
	}
	l := newSSHLab(t)
	write := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(l.file(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return l.file(name)
	}
	config := write("client", fmt.Sprintf("Host *\nIdentityFile %s\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n", l.file("id")))
	vantage := fmt.Sprintf("ssh://root@%s:%d", l.host4, sshPort)
	const open80 = "[open.web]\nports = 80\n"
	expect := fmt.Sprintf("[[expect]]\nfrom = \"%s\"\nport = \"81/tcp\"\nstate = \"filtered\"\n", l.host4)
	policy := write("here.toml", fmt.Sprintf("version = 1\n[verify]\nvantage = %q\nthorough = 0\n", vantage)+open80+expect)
	hole := write("hole.toml", "version = 1\n[open.web]\nports = [80, 8080]\n")
	state := l.file("here")
	apply := func(file string, more ...string) (int, string, string) {
		t.Helper()
		return runCode(append([]string{"apply", file, "--state-dir", state, "--insecure-policy"}, more...)...)
	}
	t.Cleanup(func() {
		if code, out, errs := runCode("remove", "--state-dir", state); code != exitOK {
			t.Errorf("remove: exit %d\n%s%s", code, out, errs)
		}
	})
	verifyArgs := func(more ...string) []string {
		return append([]string{"verify", policy, "--state-dir", state, "--ssh-config", config}, more...)
	}
	verified := func() string {
		t.Helper()
		_, out, errs := runCode("status", "--state-dir", state)
		for _, line := range strings.Split(out, "\n") {
			if strings.HasPrefix(line, "verified") {
				return line
			}
		}
		t.Fatalf("no verdict:\n%s%s", out, errs)
		return ""
	}

	if code, out, errs := apply(policy); code != exitOK {
		t.Fatalf("apply: exit %d\n%s%s", code, out, errs)
	}
	metrics := l.file("verdict.prom")
	code, out, errs := runCode(verifyArgs("--ports", "1-2000/tcp", "--textfile", metrics)...)
	if code != exitOK {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	for _, want := range []string{
		peer4 + " against " + policy + ", seen from " + vantage + ": " + l.host4.String() + " (eth0):\n",
		"  ok   [[expect]] at " + policy + ":7: 81/tcp from " + l.host4.String() + " to " + peer4 + " is filtered\n",
		"  note of this host " + peer4 + " was looked at, by which it reached the vantage, and not " + peer6,
		"PASS: 2,000 ports as the policy says, 1 of 1 expectation met, ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s%s", want, out, errs)
		}
	}
	if line := verified(); !strings.HasPrefix(line, "verified  pass at ") {
		t.Errorf("kept: %s", line)
	}
	if b, err := os.ReadFile(metrics); err != nil || !strings.Contains(string(b), `verdict="pass"} 1`) {
		t.Errorf("%v %s", err, b)
	}
	code, out, errs = runCode(verifyArgs("--ports", "80/tcp", "--json")...)
	if code != exitOK || !strings.HasPrefix(out, "{\n") || !strings.Contains(out, `"target": "`+peer4+`"`) {
		t.Errorf("json: exit %d\n%s%s", code, out, errs)
	}

	// On trial: what the other machine sees confirms it, or takes it back.
	bin := filepath.Join(l.dir, "bin")
	if err := os.Mkdir(bin, 0o700); err != nil {
		t.Fatal(err)
	}
	client, err := exec.LookPath("ssh")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "ssh"), fmt.Appendf(nil, "#!/bin/sh\nexec %s -F %s \"$@\"\n", client, config), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	wider := write("wider.toml", fmt.Sprintf("version = 1\n[verify]\nvantage = %q\nthorough = 0\n[open.web]\nports = [80, 443]\n", vantage))
	if code, out, errs := apply(wider, "--verify", "--confirm", "5m", "--no-wait"); code != exitOK || !strings.Contains(out, "seen from "+vantage) || !strings.Contains(out, "\nConfirmed: ") {
		t.Errorf("apply --verify: exit %d\n%s%s", code, out, errs)
	}
	// Something else drops what the policy opens.
	nft := func(rules string) {
		t.Helper()
		if out, err := exec.Command("nft", rules).CombinedOutput(); err != nil {
			t.Fatalf("nft: %v\n%s", err, out)
		}
	}
	nft("add table ip foreign; add chain ip foreign in { type filter hook input priority 10; }; add rule ip foreign in tcp dport 443 drop")
	if code, out, errs := apply(policy); code != exitOK {
		t.Fatalf("apply: exit %d\n%s%s", code, out, errs)
	}
	if code, out, errs := apply(wider, "--verify"); code != exitRolledBack || !strings.Contains(out, "FAIL  443/tcp  filtered  expected open") {
		t.Errorf("apply --verify against a foreign drop: exit %d\n%s%s", code, out, errs)
	}
	nft("delete table ip foreign")

	if code, out, errs := apply(hole); code != exitOK {
		t.Fatalf("apply: exit %d\n%s%s", code, out, errs)
	}
	code, out, errs = runCode(verifyArgs("--ports", "1-9000/tcp")...)
	if code != exitFindings || !strings.Contains(out, "FAIL  8080/tcp  closed  expected filtered") {
		t.Errorf("a hole: exit %d\n%s%s", code, out, errs)
	}
	if line := verified(); !strings.HasPrefix(line, "verified  fail at ") {
		t.Errorf("kept: %s", line)
	}

	// Behind a translation the other machine would look at who translates.
	nft("add table ip masked; add chain ip masked out { type nat hook postrouting priority 100; }; add rule ip masked out tcp dport 2222 snat to 203.0.113.99")
	defer nft("delete table ip masked")
	code, out, errs = runCode(verifyArgs("--ports", "80/tcp")...)
	if code != exitRefused || out != "" || !strings.Contains(errs, "error: "+vantage+" sees this host as 203.0.113.99, which is no address of it") ||
		!strings.Contains(errs, "hint: deadlight verify --vantage "+vantage+" --target ADDR") {
		t.Errorf("translated: exit %d\n%s%s", code, out, errs)
	}
	if code, _, errs := runCode(verifyArgs("--proof", "host")...); code != exitUsage || !strings.Contains(errs, "--proof is of this host as it looks at itself") {
		t.Errorf("--proof: exit %d\n%s", code, errs)
	}
}

// What another machine says is kept up to a bound, and read to its end all the same.
func TestBoundedBuffer(t *testing.T) {
	for size, over := range map[int]bool{0: false, 1 << 16: false, 1<<16 + 1: true, 1 << 20: true} {
		full := 0
		b := boundedBuffer{most: 1 << 16, full: func() { full++ }}
		n, err := io.Copy(&b, strings.NewReader(strings.Repeat("x", size)))
		if n != int64(size) || err != nil || b.over != over || full != map[bool]int{true: 1}[over] || !over && b.kept.Len() != size || over && b.kept.Len() > 0 {
			t.Errorf("%d bytes: %d, %v; over %v, told %d times, %d kept", size, n, err, b.over, full, b.kept.Len())
		}
	}
}

// The host that asks is looked at by an address of its own, or not at all.
func TestTargetOf(t *testing.T) {
	r := &vantageRequest{Vantage: "ssh://probe@bastion", Self: []netip.Addr{netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8::7")}}
	for caller, want := range map[string]string{
		"203.0.113.7":        "203.0.113.7",
		"::ffff:203.0.113.7": "203.0.113.7",
		"2001:db8::7":        "2001:db8::7",
		"203.0.113.8":        "ssh://probe@bastion sees this host as 203.0.113.8, which is no address of it",
		"fe80::1%eth0":       "which is no address of it",
		"":                   "ssh://probe@bastion does not tell by which address it sees this host",
		"UNKNOWN":            "does not tell",
	} {
		a, err := targetOf(caller, r)
		var x *exitError
		switch {
		case err == nil && a.String() != want:
			t.Errorf("%q: %s, want %s", caller, a, want)
		case err != nil && (!errors.As(err, &x) || x.code != exitRefused || !strings.Contains(err.Error(), want) || !strings.Contains(x.hint, "--target ADDR")):
			t.Errorf("%q: %v, want %s", caller, err, want)
		}
	}
}

// The far side reads nothing but its request.
func TestFromVantage(t *testing.T) {
	for in, want := range map[string]string{
		"":   "no request on standard input",
		"{}": "1 error: nothing probed",
		`{"policy":"p.toml","files":{"p.toml":"dmVyc2lvbiA9IDEK"},"look":{"ports":"all"}}`:               "name the host to probe",
		`{"policy":"/etc/p.toml","files":{"p.toml":"dmVyc2lvbiA9IDEKW29wZW4ueF0Kc2VydmljZT0ibm9uZSIK"}}`: "/etc/p.toml:3:9: error",
	} {
		var out, errs bytes.Buffer
		if code := run([]string{fromVantage}, env{stdin: strings.NewReader(in), stdout: &out, stderr: &errs}); code != exitUsage || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit %d, want %q\n%s", in, code, want, errs.String())
		}
	}
}
