package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestCgroupUnit(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	tests := map[string]string{
		"0::/system.slice/nginx.service\n":                                               "nginx.service",
		"0::/system.slice/system-getty.slice/getty@tty1.service\n":                       "getty@tty1.service",
		"0::/user.slice/user-1000.slice/user@1000.service/app.slice/syncthing.service\n": "syncthing.service",
		"0::/user.slice/user-0.slice/session-3.scope\n":                                  "session-3.scope",
		"0::/init.scope\n":                                                         "init.scope",
		"0::/system.slice/docker-" + id + ".scope\n":                               "docker 0123456789ab",
		"0::/docker/" + id + "\n":                                                  "docker 0123456789ab",
		"0::/machine.slice/libpod-" + id + ".scope/container\n":                    "podman 0123456789ab",
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope\n": "cri-containerd 0123456789ab",
		"0::/kubepods/burstable/pod1/" + id + "\n":                                 "container 0123456789ab",
		"0::/system.slice/docker-" + id + ".scope/system.slice/x.service":          "docker 0123456789ab",
		"0::/lxc.payload.web/system.slice/nginx.service\n":                         "lxc web",
		"0::/lxc/web/init.scope\n":                                                 "lxc web",
		"0::/machine.slice/machine-my\\x2dbox.scope/payload\n":                     "machine my-box",
		"0::/machine.slice/systemd-nspawn@box.service/payload\n":                   "machine box",
		"0::/system.slice/a\\x1b\\x5b2J.service\n":                                 "a\x1b[2J.service", // escaped where it is printed
		"0::/system.slice/bad\\xzz.service\n":                                      "bad\\xzz.service",
		"12:cpu:/x\n1:name=systemd:/system.slice/ssh.service\n0::/other.service\n": "ssh.service",
		"0::/\n": "",
		"":       "",
		"junk":   "",
	}
	for text, want := range tests {
		if got := cgroupUnit(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestUserOf(t *testing.T) {
	proc := t.TempDir()
	if err := os.Mkdir(filepath.Join(proc, "7"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(proc, "7/status"), []byte("Name:\tx\nUid:\t0\t4294967000\t0\t0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		pid   int
		maker uint32
		want  string
	}{{7, 0, "4294967000"}, {8, 4294967001, strconv.FormatUint(4294967001, 10)}, {0, 0, "root"}} {
		if got := userOf(proc, tt.pid, tt.maker); got != tt.want {
			t.Errorf("process %d: user %s, want %s", tt.pid, got, tt.want)
		}
	}
}
