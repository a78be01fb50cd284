package verify

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseSSHVantage(t *testing.T) {
	for in, want := range map[string]SSHVantage{
		"ssh://root@192.0.2.1":          {User: "root", Host: "192.0.2.1"},
		"ssh://vantage.example:2222":    {Host: "vantage.example", Port: 2222},
		"ssh://a.b-c@[2001:db8::1]:22":  {User: "a.b-c", Host: "2001:db8::1", Port: 22},
		"ssh://name-of-the-config-file": {Host: "name-of-the-config-file"},
	} {
		got, err := ParseSSHVantage(in)
		if err != nil || got != want || got.String() != in {
			t.Errorf("%s: %+v, %v, written %s", in, got, err, got)
		}
	}
	for _, bad := range []string{"", "root@192.0.2.1", "ssh://", "ssh:x", "ssh://-x", "ssh://-x@y", "ssh://a b@c", "ssh://x/?y", "ssh://x#y", "ssh://x:70000", "ssh://x:a", "ssh://u:p@h", "ssh://a;b@c", "ssh://a%0ab@c", "ssh://a%27b@c"} {
		if got, err := ParseSSHVantage(bad); err == nil {
			t.Errorf("%q is taken for %+v", bad, got)
		}
	}
}

// ssh is replaced by a shell: what the far side would do, done here.
func TestFarScript(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		return filepath.Join(dir, name)
	}
	file("ssh", "#!/bin/sh\nfor last; do :; done\nexec /bin/sh -c \"$last\"\n")
	// Its input ends only when we do.
	program := file("program", "#!/bin/sh\necho \"words $*\"\nread line; echo \"line $line\"\necho said >&2\nls -A \"$TMPDIR\" | sed 's/[^.]*$/X/'\nexit 5\n")
	room := filepath.Join(dir, "room")
	if err := os.Mkdir(room, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", room)
	t.Setenv("SSH_CONNECTION", "192.0.2.7 50000 192.0.2.1 22")
	v := SSHVantage{Host: "far", User: "root", Port: 22, Config: "none"}
	run := func() (code int, out, errs string, err error) {
		var o, e strings.Builder
		code, err = v.Run(t.Context(), program, []string{"a", "b"}, []byte("request\n"), &o, &e)
		return code, o.String(), e.String(), err
	}
	if code, out, errs, err := run(); err != nil || code != 5 || out != "words a b 192.0.2.7\nline request\ndeadlight.X\n" || errs != "said\n" {
		t.Errorf("exit %d, %v: %q %q", code, err, out, errs)
	}
	if left, err := os.ReadDir(room); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
	file("uname", "#!/bin/sh\n[ \"$1\" = -s ] && echo Linux || echo pdp11\n")
	if _, out, _, err := run(); err == nil || !strings.Contains(err.Error(), "ssh://root@far:22 is Linux pdp11, and this program is for Linux ") || out != "" {
		t.Errorf("another machine: %v %q", err, out)
	}
	if err := os.Remove(filepath.Join(dir, "uname")); err != nil {
		t.Fatal(err)
	}
	file("mktemp", "#!/bin/sh\necho no room >&2\nexit 1\n")
	if _, _, _, err := run(); err == nil || !strings.Contains(err.Error(), "has no directory from which a program can be run") {
		t.Errorf("no room: %v", err)
	}
	file("ssh", "#!/bin/sh\necho 'far: Connection refused' >&2\nexit 255\n")
	if _, _, _, err := run(); err == nil || !strings.Contains(err.Error(), "ssh to ssh://root@far:22 failed: far: Connection refused") {
		t.Errorf("no connection: %v", err)
	}
}
