package systemd_test

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"deadlight/systemd"
)

// mostExposure is what systemd-analyze security may say of a unit, of 10.
func mostExposure(unit string) float64 {
	if unit == "deadlight-verify.service" {
		return 2.4 // a network namespace takes CAP_SYS_ADMIN
	}
	return 2.0
}

// root is a directory with the units, and something in place of what they run.
func root(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) {
		name = filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(text), mode)); err != nil {
			t.Fatal(err)
		}
	}
	write("usr/sbin/deadlight", "#!/bin/true\n", 0o755)
	write("bin/sh", "#!/bin/true\n", 0o755)
	for _, target := range []string{"network-pre", "network-online", "local-fs", "sysinit", "multi-user", "timers", "basic", "shutdown"} {
		write("usr/lib/systemd/system/"+target+".target", "[Unit]\nDescription=stub\n", 0o644)
	}
	for _, name := range systemd.Names() {
		unit, err := systemd.Read(name)
		if err != nil {
			t.Fatal(err)
		}
		write("etc/systemd/system/"+name, string(unit), 0o644)
	}
	return dir
}

func TestVerify(t *testing.T) {
	args := append([]string{"verify", "--root=" + root(t)}, systemd.Names()...)
	out, err := exec.Command("systemd-analyze", args...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

func TestSecurity(t *testing.T) {
	dir := root(t)
	for _, name := range systemd.Names() {
		if !strings.HasSuffix(name, ".service") {
			continue
		}
		out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", "--root="+dir, name).CombinedOutput()
		found := regexp.MustCompile(`Overall exposure level for ` + regexp.QuoteMeta(name) + `: ([0-9.]+) `).FindSubmatch(out)
		if found == nil {
			t.Errorf("systemd-analyze security %s: %v\n%s", name, err, out)
			continue
		}
		exposure, err := strconv.ParseFloat(string(found[1]), 64)
		t.Logf("%s: %.1f", name, exposure)
		if err != nil || exposure > mostExposure(name) {
			t.Errorf("%s: exposure %.1f is more than %.1f (%v)", name, exposure, mostExposure(name), err)
		}
	}
}

// TestNeverOpen holds deadlight.service against what was seen to leave a host
// open, or to open it.
func TestNeverOpen(t *testing.T) {
	unit, err := systemd.Read("deadlight.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"ExecStop", "ExecStopPost", "StateDirectory", "PrivateDevices", "Requires", "RequiresMountsFor", "BindsTo", "WorkingDirectory", "EnvironmentFile"} {
		if regexp.MustCompile(`(?m)^` + key + `=`).Match(unit) {
			t.Errorf("%s= stands in deadlight.service", key)
		}
	}
	if !regexp.MustCompile(`(?m)^CapabilityBoundingSet=CAP_NET_ADMIN$`).Match(unit) {
		t.Error("deadlight.service may do more than CAP_NET_ADMIN")
	}
}

func TestNames(t *testing.T) {
	want := []string{"deadlight-verify.service", "deadlight-verify.timer", "deadlight-watch.service", "deadlight.service"}
	if got := systemd.Names(); !slices.Equal(got, want) {
		t.Errorf("units %q, want %q", got, want)
	}
	if _, err := systemd.Read("other.service"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a unit that is not there: %v", err)
	}
}
