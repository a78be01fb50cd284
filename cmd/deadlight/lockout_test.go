package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	dir string
}

const (
	outside4 = "203.0.113.20"
	outside6 = "2001:db8:77::20"
)

// newSSHLab starts sshd on the throw-away host, with keys of its own.
func newSSHLab(t *testing.T) *sshLab {
	t.Helper()
	l := &sshLab{lab: newLab(t, "version = 1\n[open.ssh]\nports = 2222\n"), dir: t.TempDir()}
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
		"admits": "from = [\"" + outside4 + "\", \"" + outside6 + "\"]\ninterfaces = \"eth0\"",
		"cuts":   "from = [\"192.0.2.0/24\", \"2001:db8:1::/48\"]",
		"wires":  "interfaces = \"wg0\"",
	} {
		must(os.WriteFile(l.file(name+".toml"), []byte("version = 1\n[open.ssh]\nports = 2222\n"+policy+"\n"), 0o600))
	}
	var log lockedBuffer
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- l.Command(ctx, []string{must1(t, func() (string, error) { return exec.LookPath("sshd") }), "-D", "-e", "-f", l.file("conf")}, &log, &log)
	}()
	t.Cleanup(func() {
		stop()
		<-done
		if t.Failed() {
			t.Logf("sshd: %s", log.String())
		}
	})
	await(t, "sshd", func() bool { return strings.Contains(log.String(), "listening on ::") })
	return l
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
// waits for its result. %s in the way stands for a script that runs it.
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
	args := []string{"-tt", "-F", "none", "-i", l.file("id"), "-p", fmt.Sprint(sshPort), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "root@" + host}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, "ssh", append(args, fmt.Sprintf(way, "sh "+l.file("script")))...)
	c.Env = append(os.Environ(), "TERM=xterm")
	// A terminal needs somebody who could type.
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var said bytes.Buffer
	c.Stdout, c.Stderr = &said, &said
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- c.Wait() }()
	defer func() {
		in.Close()
		cancel()
		<-ended
	}()
	var code []byte
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if code, err = os.ReadFile(l.file("code")); err == nil {
			break
		}
		if !errors.Is(err, os.ErrNotExist) || time.Since(start) > 50*time.Second {
			cancel()
			<-ended
			ended <- nil
			t.Fatalf("%s over ssh to %s left no result: %v\n%s", way, host, err, said.String())
		}
	}
	out, err := os.ReadFile(l.file("out"))
	if err != nil {
		t.Fatal(err)
	}
	return result{strings.TrimSpace(string(code)), string(out)}
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
	ways := map[string]string{
		"directly":                "%s",
		"without its environment": "env -i /bin/%s",
		"in a session of its own": "setsid -w %s",
		"as another user's shell": "su root -s /bin/sh -c '%s'",
		"in tmux":                 "tmux -L lockout -f /dev/null new-session '%s'",
		"from the host itself":    "ssh -tt -F none -i ID -p 2222 -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@127.0.0.1 %s",
	}
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			l := newSSHLab(t)
			way := strings.ReplaceAll(way, "ID", l.file("id"))
			for host, peer := range map[netip.Addr]string{l.host4: outside4, l.host6: outside6} {
				before := l.table(t)
				for policy, hint := range map[string]string{
					"cuts.toml":  fmt.Sprintf("hint: add %q to from of [open.ssh] (cuts.toml:2)", peer),
					"wires.toml": fmt.Sprintf("hint: add to your policy:\n[open.ssh-own]\nports = [2222]\nfrom = [%q]", peer),
				} {
					r := l.ssh(t, host.String(), way, "apply "+policy)
					fact := fmt.Sprintf("error: your own SSH session from %s to 2222/tcp by eth0 would be cut: ", peer)
					if r.code != "3" || !strings.Contains(r.out, fact) || !strings.Contains(r.out, hint) || !strings.Contains(r.out, "ruleset as before") {
						t.Errorf("%s from %s: exit %s, want 3, %q and %q:\n%s", policy, peer, r.code, fact, hint, r.out)
					}
					if after := l.table(t); after != before {
						t.Errorf("%s from %s: refused, and the ruleset has changed:\n%s", policy, peer, after)
					}
				}
				if _, err := os.Stat(l.file("state")); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("refused, and there is a state: %v", err)
				}
				// A plan says so.
				r := l.ssh(t, host.String(), way, "plan cuts.toml")
				if want := "warning: your own SSH session from " + peer + " to 2222/tcp by eth0 would be cut"; r.code != "1" || !strings.Contains(r.out, want) {
					t.Errorf("plan exits with %s, want 1 and %q:\n%s", r.code, want, r.out)
				}
				// What admits the peer is applied, and the connection goes on.
				r = l.ssh(t, host.String(), way, "apply admits.toml")
				if r.code != "0" || strings.Contains(r.out, "warning") {
					t.Errorf("a policy that admits %s: exit %s:\n%s", peer, r.code, r.out)
				}
				if r := l.ssh(t, host.String(), way, "plan admits.toml"); r.code != "0" || !strings.HasPrefix(r.out, "No changes") {
					t.Errorf("a policy that admits %s: plan exits with %s:\n%s", peer, r.code, r.out)
				}
				if err := l.Command(t.Context(), []string{l.file("deadlight"), "apply", "--state-dir", l.file("state"), l.policy}, os.Stderr, os.Stderr); err != nil {
					t.Fatal(err) // whoever has no session is asked nothing
				}
				if err := os.RemoveAll(l.file("state")); err != nil {
					t.Fatal(err)
				}
			}
			// Who insists gets it, and is out.
			r := l.ssh(t, l.host4.String(), way, "apply --accept-lockout cuts.toml")
			if r.code != "0" || !strings.Contains(l.table(t), "192.0.2.0/24") {
				t.Errorf("--accept-lockout: exit %s:\n%s", r.code, r.out)
			}
		})
	}
}

// TestLockoutDetached: a terminal that nobody looks at has no peer.
func TestLockoutDetached(t *testing.T) {
	l := newSSHLab(t)
	r := l.ssh(t, l.host4.String(), "env -u SSH_CONNECTION tmux -L detached -f /dev/null new-session -d '%s'", "apply cuts.toml")
	if r.code != "0" {
		t.Errorf("exit %s:\n%s", r.code, r.out)
	}
}
