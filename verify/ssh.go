package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// SSHVantage is another machine that looks at the host: this program is sent there
// by OpenSSH's client, run, and removed again.
type SSHVantage struct {
	User, Host string
	Port       uint16 // 0: as the client's configuration says
	Config     string // a file for ssh -F; "" is the usual one
}

// ErrVantage is the error of a vantage that could not be reached, or on which this
// program does not run.
var ErrVantage = errors.New("the vantage could not look")

// ParseSSHVantage reads ssh://[USER@]HOST[:PORT].
func ParseSSHVantage(s string) (SSHVantage, error) {
	var v SSHVantage
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "ssh" || u.Opaque != "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.Hostname() == "" {
		return v, fmt.Errorf("not ssh://USER@HOST:PORT: %q", s)
	}
	v.Host = u.Hostname()
	if u.User != nil {
		if _, set := u.User.Password(); set {
			return v, errors.New("a password has no place on a command line")
		}
		v.User = u.User.Username()
	}
	if u.Port() != "" {
		n, err := strconv.ParseUint(u.Port(), 10, 16)
		if err != nil || n == 0 {
			return v, fmt.Errorf("not a port: %q", u.Port())
		}
		v.Port = uint16(n)
	}
	// The client would take them for options, or the far shell for its own words.
	for _, part := range []string{v.User, v.Host} {
		if strings.HasPrefix(part, "-") || strings.ContainsAny(part, " \t\r\n\x00'\"\\$`;&|<>()") {
			return v, fmt.Errorf("not a name: %q", part)
		}
	}
	return v, nil
}

// String gives the ssh:// form.
func (v SSHVantage) String() string {
	u := url.URL{Scheme: "ssh", Host: v.Host}
	if strings.Contains(v.Host, ":") {
		u.Host = "[" + v.Host + "]"
	}
	if v.User != "" {
		u.User = url.User(v.User)
	}
	if v.Port != 0 {
		u.Host += fmt.Sprintf(":%d", v.Port)
	}
	return u.String()
}

// Exit codes of [farScript], which this program has no use for.
const (
	exitArchitecture = 97
	exitNoRoom       = 98
)

// farScript takes the program from its standard input, runs it with what follows
// there, and leaves nothing behind. %d is its length, %s its words. The last word is
// the address that we come from; sudo would not hand the environment on.
const farScript = `set -u
here="$(uname -s) $(uname -m)"
if [ "$here" != '%s' ]; then echo "$here" >&2; exit 97; fi
umask 077
d=
clean() { if [ -n "$d" ]; then rm -rf -- "$d"; fi; }
trap clean EXIT
trap 'exit 130' HUP INT TERM PIPE
for base in "${TMPDIR:-/tmp}" /var/tmp "${HOME:-/}"; do
	d=$(mktemp -d "$base/deadlight.XXXXXXXXXX" 2>/dev/null) || { d=; continue; }
	printf '#!/bin/sh\n' >"$d/try" && chmod 700 "$d/try" && "$d/try" 2>/dev/null && break
	rm -rf -- "$d"
	d=
done
if [ -z "$d" ]; then exit 98; fi
head -c %d >"$d/deadlight" && chmod 700 "$d/deadlight" || exit 98
as=
if [ "$(id -u)" != 0 ] && sudo -n true 2>/dev/null; then as='sudo -n'; fi
from=${SSH_CONNECTION:-}
$as "$d/deadlight" %s "${from%%%% *}"
`

// unameMachine is what uname -m says of machines that run this program.
func unameMachine() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64"
	case "arm64":
		return "aarch64"
	}
	return runtime.GOARCH
}

// Run sends program, a file, to the vantage and runs it there with words, which
// must be plain, and behind them the address by which we are seen there ("" if sshd
// does not tell), and a request on its standard input, which stays open until the
// end: who reads its end has lost us. It gives the exit code of the program.
// Errors to test for: [ErrVantage].
func (v SSHVantage) Run(ctx context.Context, program string, words []string, request []byte, stdout, stderr io.Writer) (int, error) {
	f, err := os.Open(program)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	script := fmt.Sprintf(farScript, "Linux "+unameMachine(), info.Size(), strings.Join(words, " "))
	args := []string{"-T", "-e", "none", "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=20"}
	if tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		tty.Close()
	} else { // nobody is there to be asked
		args = append(args, "-o", "BatchMode=yes")
	}
	if v.Config != "" {
		args = append(args, "-F", v.Config)
	}
	if v.Port != 0 {
		args = append(args, "-p", fmt.Sprint(v.Port))
	}
	if v.User != "" {
		args = append(args, "-l", v.User)
	}
	// Whatever the login shell is, sh gets the script.
	args = append(args, "--", v.Host, "exec sh -c '"+strings.ReplaceAll(script, "'", `'\''`)+"'")
	cmd := exec.CommandContext(ctx, "ssh", args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	var said tail
	cmd.Stdout, cmd.Stderr = stdout, io.MultiWriter(stderr, &said)
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("%w: run ssh: %w", ErrVantage, err)
	}
	// Sent beside: a far side that refuses does not read.
	go func() {
		_, _ = io.Copy(in, io.MultiReader(f, bytes.NewReader(request))) // its end tells
	}()
	err = cmd.Wait()
	_ = in.Close()
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 0, fmt.Errorf("%w: %w", ErrVantage, err)
	}
	switch code := exit.ExitCode(); code {
	case 255:
		return 0, fmt.Errorf("%w: ssh to %s failed: %s", ErrVantage, v, said.last())
	case exitArchitecture:
		return 0, fmt.Errorf("%w: %s is %s, and this program is for Linux %s", ErrVantage, v, said.last(), unameMachine())
	case exitNoRoom:
		return 0, fmt.Errorf("%w: %s has no directory from which a program can be run: %s", ErrVantage, v, said.last())
	case -1:
		return 0, fmt.Errorf("%w: ssh to %s: %w", ErrVantage, v, err)
	default:
		return code, nil
	}
}

// tail keeps the end of what was said.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - 4096; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

// last is the last line.
func (t *tail) last() string {
	lines := strings.Split(strings.TrimSpace(string(t.b)), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
