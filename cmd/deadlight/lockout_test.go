package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const sshPort = 2222

// sshLab is a host with an sshd, reached from outside.
type sshLab struct {
	*lab
	dir  string
	real bool // it is OpenSSH's
	port int  // that clients use
}

const (
	peer4 = "203.0.113.20"
	peer6 = "2001:db8:77::20"
)

// newSSHLab starts sshd on the throw-away host, with keys of its own.
func newSSHLab(t *testing.T) *sshLab {
	t.Helper()
	l := &sshLab{lab: newLab(t, "version = 1\n[open.ssh]\nports = 2222\n"), dir: t.TempDir(), real: mayChangeUser(t), port: sshPort}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"host", "id"} {
		out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", l.file(key)).CombinedOutput()
		if err != nil {
			t.Fatalf("ssh-keygen: %v\n%s", err, out)
		}
	}
	must(os.MkdirAll("/run/sshd", 0o755))
	must(os.Symlink(must1(t, os.Executable), l.file("deadlight")))
	must(os.WriteFile(l.file("conf"), fmt.Appendf(nil, `Port %d
HostKey %s
AuthorizedKeysFile %s
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
`, sshPort, l.file("host"), l.file("id.pub")), 0o600))
	for name, policy := range map[string]string{
		"admits": "from = [\"" + peer4 + "\", \"" + peer6 + "\"]\ninterfaces = \"eth0\"",
		"cuts":   "from = [\"192.0.2.0/24\", \"2001:db8:1::/48\"]",
		"wires":  "interfaces = \"wg0\"",
	} {
		must(os.WriteFile(l.file(name+".toml"), []byte("version = 1\n[open.ssh]\nports = 2222\n"+policy+"\n"), 0o600))
	}
	server := []string{l.file("sshd"), fmt.Sprint(sshPort)}
	if l.real {
		server = []string{must1(t, func() (string, error) { return exec.LookPath("sshd") }), "-D", "-e", "-f", l.file("conf")}
	} else {
		must(os.Symlink(must1(t, os.Executable), l.file("sshd")))
	}
	// A file: of a pipe the end would have to be waited for, which sessions hold.
	log := must1(t, func() (*os.File, error) { return os.Create(l.file("log")) })
	said := func() string {
		b, err := os.ReadFile(log.Name())
		must(err)
		return string(b)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Command(ctx, server, log, log) }()
	t.Cleanup(func() {
		stop()
		<-done
		if t.Failed() {
			t.Logf("sshd: %s", said())
		}
		log.Close()
	})
	await(t, "sshd", func() bool { return strings.Contains(said(), "listening on ::") })
	return l
}

// mayChangeUser reports whether sshd can work here: in the user namespace of an
// ordinary user nobody may set groups (user_namespaces(7)). A stand-in then takes
// its place in the chain of processes.
func mayChangeUser(t *testing.T) bool {
	t.Helper()
	b, err := os.ReadFile("/proc/self/setgroups")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b)) == "allow"
}

// standInSSHD is run under the name sshd: each connection gets a process of its
// own that holds it, and a shell below that runs the line that comes first.
func standInSSHD(args []string) error {
	if len(args) == 0 { // one connection, as file 3
		line, err := bufio.NewReader(os.NewFile(3, "connection")).ReadString('\n')
		if err != nil {
			return err
		}
		return exec.Command("sh", "-c", line).Run()
	}
	l, err := net.Listen("tcp", ":"+args[0])
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "stand-in listening on ::")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			return err
		}
		child := exec.Command(os.Args[0])
		child.ExtraFiles = []*os.File{f}
		if err := errors.Join(child.Start(), f.Close(), c.Close()); err != nil {
			return err
		}
		go child.Wait()
	}
}

func must1[T any](t *testing.T, fn func() (T, error)) T {
	t.Helper()
	v, err := fn()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func (l *sshLab) file(name string) string { return filepath.Join(l.dir, name) }

// await waits until something is so.
func await(t *testing.T, what string, so func() bool) {
	t.Helper()
	for start := time.Now(); !so(); time.Sleep(10 * time.Millisecond) {
		if time.Since(start) > 30*time.Second {
			t.Fatalf("%s: not so after 30 s", what)
		}
	}
}

// result is what a command line left in files: its connection may not survive it.
type result struct{ code, out string }

// ssh runs a command line on the host over SSH, after the way's own words, and
// waits for its result. %s in the way stands for what runs it.
func (l *sshLab) ssh(t *testing.T, host, way, command string) result {
	t.Helper()
	for _, name := range []string{"out", "code"} {
		if err := os.RemoveAll(l.file(name)); err != nil {
			t.Fatal(err)
		}
	}
	script := fmt.Sprintf("cd %s\n./deadlight %s --state-dir %s/state >out 2>&1\necho $? >code.new\nmv code.new code\n", l.dir, command, l.dir)
	if err := os.WriteFile(l.file("script"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	said, hangUp := l.login(t, host, fmt.Sprintf(way, "sh "+l.file("script")))
	defer hangUp()
	var code []byte
	var err error
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if code, err = os.ReadFile(l.file("code")); err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) || time.Since(start) > time.Minute {
			t.Fatalf("%s over ssh to %s left no result: %v\n%s", way, host, err, said.String())
		}
	}
	out, err := os.ReadFile(l.file("out"))
	if err != nil {
		t.Fatal(err)
	}
	return result{strings.TrimSpace(string(code)), string(out)}
}

// login runs a line on the host, until it is hung up.
func (l *sshLab) login(t *testing.T, host, line string) (said *lockedBuffer, hangUp func()) {
	t.Helper()
	said = &lockedBuffer{}
	if !l.real {
		c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(l.port)))
		if err == nil {
			_, err = fmt.Fprintln(c, line)
		}
		if err != nil {
			t.Fatal(err)
		}
		return said, func() { c.Close() }
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := exec.CommandContext(ctx, "ssh", "-tt", "-F", "none", "-i", l.file("id"), "-p", fmt.Sprint(l.port),
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@"+host, line)
	c.Env = append(os.Environ(), "TERM=xterm")
	c.Stdout, c.Stderr = said, said
	in, err := c.StdinPipe() // a terminal needs somebody who could type
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	return said, func() {
		in.Close()
		cancel()
		_ = c.Wait() // it was killed
	}
}

// table is what nft shows of the ruleset, without counts.
func (l *sshLab) table(t *testing.T) string {
	t.Helper()
	var out, errs bytes.Buffer
	if err := l.Command(t.Context(), []string{"nft", "-s", "list", "ruleset"}, &out, &errs); err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	return out.String()
}

// TestLockout applies policies over a real SSH connection, in the ways that
// people do it: those that would not let the caller in again are refused, and
// nothing is written.
func TestLockout(t *testing.T) {
	const quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
	for name, tt := range map[string]struct {
		way  string
		real bool // it takes a real login
		six  bool
	}{
		"directly":                {way: "%s"},
		"over ipv6":               {way: "%s", six: true},
		"without its environment": {way: "env -i /bin/%s", six: true},
		"in a session of its own": {way: "setsid -w %s"},
		"as another user's shell": {way: "su root -s /bin/sh -c '%s'", real: true},
		"in tmux":                 {way: "env -u SSH_CONNECTION tmux -L lockout -f /dev/null new-session '%s'", real: true},
		"in tmux over ipv6":       {way: "tmux -L lockout -f /dev/null new-session '%s'", real: true, six: true},
		"from the host itself":    {way: "ssh -tt -F none -i ID -p 2222 " + quiet + " root@127.0.0.1 %s", real: true},
	} {
		if tt.real && !mayChangeUser(t) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			l := newSSHLab(t)
			way := strings.ReplaceAll(tt.way, "ID", l.file("id"))
			host, peer := l.host4.String(), peer4
			if tt.six {
				host, peer = l.host6.String(), peer6
			}
			before := l.table(t)
			for policy, hint := range map[string]string{
				"cuts.toml":  fmt.Sprintf("hint: add %q to from of [open.ssh] (cuts.toml:2)", peer),
				"wires.toml": fmt.Sprintf("hint: add to your policy:\n[open.ssh-own]\nports = [2222]\nfrom = [%q]", peer),
			} {
				r := l.ssh(t, host, way, "apply "+policy)
				fact := fmt.Sprintf("error: your own SSH session from %s to 2222/tcp by eth0 would be cut: ", peer)
				if r.code != "3" || !strings.Contains(r.out, fact) || !strings.Contains(r.out, hint) || !strings.Contains(r.out, "ruleset as before") {
					t.Errorf("%s from %s: exit %s, want 3, %q and %q:\n%s", policy, peer, r.code, fact, hint, r.out)
				}
			}
			if after := l.table(t); after != before {
				t.Errorf("refused, and the ruleset has changed:\n%s", after)
			}
			if _, err := os.Stat(l.file("state")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("refused, and there is a state: %v", err)
			}
			r := l.ssh(t, host, way, "plan cuts.toml")
			if want := "warning: your own SSH session from " + peer + " to 2222/tcp by eth0 would be cut"; r.code != "1" || !strings.Contains(r.out, want) {
				t.Errorf("plan exits with %s, want 1 and %q:\n%s", r.code, want, r.out)
			}
			// What admits the peer is applied, and it can come again.
			if r = l.ssh(t, host, way, "apply admits.toml"); r.code != "0" || strings.Contains(r.out, "warning") {
				t.Errorf("a policy that admits %s: exit %s:\n%s", peer, r.code, r.out)
			}
			// Who insists gets it.
			r = l.ssh(t, host, way, "apply --accept-lockout cuts.toml")
			if r.code != "0" || !strings.Contains(l.table(t), "192.0.2.0/24") {
				t.Errorf("--accept-lockout: exit %s:\n%s", r.code, r.out)
			}
		})
	}
}

// TestLockoutRedirected: the policy judges the port on the wire, and so does the
// check, over both families.
func TestLockoutRedirected(t *testing.T) {
	l := newSSHLab(t)
	const front = 2022
	if err := l.Command(t.Context(), []string{"nft", fmt.Sprintf("add table inet other; add chain inet other pre { type nat hook prerouting priority dstnat; }; add rule inet other pre tcp dport %d redirect to :%d", front, sshPort)}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	for name, port := range map[string]int{"back.toml": sshPort, "front.toml": front} {
		if err := os.WriteFile(l.file(name), fmt.Appendf(nil, "version = 1\n[open.ssh]\nports = %d\n", port), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Command(t.Context(), []string{l.file("deadlight"), "apply", "--state-dir", l.file("state"), l.file("front.toml")}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	l.port = front
	for host, peer := range map[netip.Addr]string{l.host4: peer4, l.host6: peer6} {
		r := l.ssh(t, host.String(), "%s", "apply back.toml")
		if want := fmt.Sprintf("your own SSH session from %s to %d/tcp by eth0 would be cut", peer, front); r.code != "3" || !strings.Contains(r.out, want) {
			t.Errorf("exit %s, want 3 and %q:\n%s", r.code, want, r.out)
		}
		if r := l.ssh(t, host.String(), "%s", "apply front.toml"); r.code != "0" {
			t.Errorf("exit %s:\n%s", r.code, r.out)
		}
	}
}

// TestLockoutConsole: whoever has no session is asked nothing.
func TestLockoutConsole(t *testing.T) {
	l := newSSHLab(t)
	if err := l.Command(t.Context(), []string{l.file("deadlight"), "apply", "--state-dir", l.file("state"), l.file("cuts.toml")}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
}

// TestLockoutDetached: what has left its session has no peer.
func TestLockoutDetached(t *testing.T) {
	l := newSSHLab(t)
	r := l.ssh(t, l.host4.String(), "trap '' HUP; env -u SSH_CONNECTION setsid -f %s", "apply cuts.toml")
	if r.code != "0" {
		t.Errorf("exit %s:\n%s", r.code, r.out)
	}
}

// TestLockoutMosh: a mosh server is nobody's child and its socket is connected to
// nobody; conntrack tells whom it serves.
func TestLockoutMosh(t *testing.T) {
	l := newSSHLab(t)
	for name, policy := range map[string]string{
		"mosh.toml":      "[open.mosh]\nports = 60001\nprotocol = \"udp\"\n",
		"elsewhere.toml": "[open.mosh]\nports = 60001\nprotocol = \"udp\"\nfrom = \"192.0.2.0/24\"\n",
	} {
		if err := os.WriteFile(l.file(name), []byte("version = 1\n"+policy), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	apply := fmt.Sprintf("./deadlight apply --state-dir %s/state ", l.dir)
	if err := l.Command(t.Context(), []string{"sh", "-c", "cd " + l.dir + " && " + apply + "mosh.toml"}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	// Until the client has come nobody knows who it is.
	script := "cd " + l.dir + "\nuntil grep -q 'mosh session' cut; do\n\tsleep 0.1\n\t" + apply + "elsewhere.toml >cut 2>&1\ndone\n" +
		apply + "mosh.toml >out 2>&1\necho $? >code.new\nmv code.new code\n"
	if err := os.WriteFile(l.file("script"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	server := []string{"env", "-u", "SSH_CONNECTION", "LC_ALL=C.UTF-8", "mosh-server", "new", "-i", l.host4.String(), "-p", "60001", "--", "sh", l.file("script")}
	if err := l.Command(t.Context(), server, &said, &said); err != nil {
		t.Fatalf("%v\n%s", err, said.String())
	}
	_, key, ok := strings.Cut(said.String(), "MOSH CONNECT 60001 ")
	if !ok {
		t.Fatalf("mosh-server does not say its key: %s", said.String())
	}
	key, _, _ = strings.Cut(strings.TrimSpace(key), "\n")
	ctx, stop := context.WithCancel(context.Background())
	// A terminal of no size is none to mosh.
	client := exec.CommandContext(ctx, "script", "-qec", "stty rows 24 cols 80; mosh-client "+l.host4.String()+" 60001", "/dev/null")
	client.Env = append(os.Environ(), "MOSH_KEY="+strings.TrimSpace(key), "LC_ALL=C.UTF-8", "TERM=xterm")
	in, err := client.StdinPipe()
	if err == nil {
		err = client.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		stop()
		_ = client.Wait() // it was killed
	}()
	await(t, "result of the command in mosh", func() bool {
		_, err := os.Stat(l.file("code"))
		return err == nil
	})
	for name, want := range map[string]string{
		"cut":  "your own mosh session from " + peer4 + " to 60001/udp by eth0 would be cut",
		"code": "0",
	} {
		b, err := os.ReadFile(l.file(name))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %v, want %q:\n%s", name, err, want, b)
		}
	}
}
