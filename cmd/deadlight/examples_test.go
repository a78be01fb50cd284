package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"deadlight/configs"
)

// public is a directory with the program and the examples that any user can read.
func public(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "deadlight-try-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "deadlight"), ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	if err := os.CopyFS(filepath.Join(dir, "lists"), os.DirFS("../../configs/lists")); err != nil {
		t.Fatal(err)
	}
	for _, name := range configs.Names() {
		src, err := configs.Read(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".toml"), src, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// ordinary makes a command run as a user without rights. Where there is but one
// user, we are that of an ordinary user's namespace already, and stay so.
func ordinary(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(string(ids)); len(f) >= 3 && f[2] == "1" {
		return
	}
	const nobody = 65534
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
}

// Every example passes try by an ordinary user, and one by root.
func TestTryExamples(t *testing.T) {
	t.Parallel() // each try is in namespaces of its own
	dir := public(t)
	for _, name := range configs.Names() {
		for _, root := range []bool{true, false} {
			if root && name != "webserver" {
				continue // root can do no less than an ordinary user
			}
			user := map[bool]string{true: "root", false: "ordinary"}[root]
			t.Run(name+"/"+user, func(t *testing.T) {
				var out, errs bytes.Buffer
				cmd := exec.Command(filepath.Join(dir, "deadlight"), "try", name+".toml")
				cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &errs
				if !root {
					ordinary(t, cmd)
				}
				if err := cmd.Run(); err != nil {
					t.Fatalf("%v\n%s%s", err, out.String(), errs.String())
				}
				if errs.Len() > 0 || !strings.Contains(out.String(), "\nPASS: 262,1") {
					t.Errorf("%s%s", out.String(), errs.String())
				}
			})
		}
	}
}

// Where user namespaces are forbidden try says so and names the way.
func TestTryForbidden(t *testing.T) {
	dir := public(t)
	var out, errs bytes.Buffer
	cmd := exec.Command("unshare", "-Ur", "sh", "-c", `echo 0 > /proc/sys/user/max_user_namespaces &&
		exec setpriv --bounding-set=-all --inh-caps=-all ./deadlight try minimal.toml`)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &out, &errs
	err := cmd.Run()
	if cmd.ProcessState.ExitCode() != exitRefused || out.Len() > 0 {
		t.Errorf("%v: %s%s", err, out.String(), errs.String())
	}
	for _, want := range []string{"deadlight: error: ", "deadlight: hint: ", "sudo deadlight try", "user.max_user_namespaces"} {
		if !strings.Contains(errs.String(), want) {
			t.Errorf("no %q in:\n%s", want, errs.String())
		}
	}
}
