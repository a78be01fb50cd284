package main

import (
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// Whose a process is: its user, and the unit or container that it runs in.

// userOf names the user that a process acts as, or who made its socket where the
// process cannot be seen.
func userOf(proc string, pid int, maker uint32) string {
	id := strconv.FormatUint(uint64(maker), 10)
	if pid != 0 {
		if b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "status")); err == nil {
			for line := range strings.Lines(string(b)) {
				// Real, effective, saved, of the file system (proc_pid_status(5)).
				if f := strings.Fields(line); len(f) == 5 && f[0] == "Uid:" {
					id = f[2]
				}
			}
		}
	}
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

// unitOf names the unit or the container of a process; "" where it cannot be told.
func unitOf(proc string, pid int) string {
	b, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return ""
	}
	return cgroupUnit(string(b))
}

// Containers as the engines name their cgroups: docker-ID.scope, libpod-ID.scope,
// cri-containerd-ID.scope, crio-ID.scope, /docker/ID, /kubepods/…/ID.
var containerScope = regexp.MustCompile(`^(?:([a-z-]+)-)?([0-9a-f]{64})(?:\.scope)?$`)

// cgroupUnit reads proc_pid_cgroup(5): the innermost part that names a container,
// else the innermost unit.
func cgroupUnit(text string) string {
	path := ""
	for line := range strings.Lines(strings.TrimSuffix(text, "\n")) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) == 3 && (f[1] == "name=systemd" || f[1] == "" && path == "") {
			path = f[2]
		}
	}
	parts := strings.Split(path, "/")
	unit := ""
	for i, p := range parts {
		before := ""
		if i > 0 {
			before = parts[i-1]
		}
		if m := containerScope.FindStringSubmatch(p); m != nil {
			engine := m[1]
			switch {
			case engine == "" && before == "docker":
				engine = "docker"
			case engine == "":
				engine = "container"
			case engine == "libpod":
				engine = "podman"
			}
			return engine + " " + m[2][:12]
		}
		if name, ok := strings.CutPrefix(p, "lxc.payload."); ok {
			return "lxc " + name
		}
		if before == "lxc" && p != "" {
			return "lxc " + p
		}
		if name, ok := strings.CutPrefix(p, "machine-"); ok && strings.HasSuffix(name, ".scope") {
			return "machine " + systemdUnescape(strings.TrimSuffix(name, ".scope"))
		}
		if name, ok := strings.CutPrefix(p, "systemd-nspawn@"); ok {
			return "machine " + systemdUnescape(strings.TrimSuffix(name, ".service"))
		}
		if strings.HasSuffix(p, ".service") || strings.HasSuffix(p, ".scope") || strings.HasSuffix(p, ".socket") {
			unit = systemdUnescape(p)
		}
	}
	return unit
}

// systemdUnescape undoes \x2d and its like (systemd-escape(1)).
func systemdUnescape(s string) string {
	var b strings.Builder
	for len(s) > 0 {
		if strings.HasPrefix(s, `\x`) && len(s) >= 4 {
			if n, err := strconv.ParseUint(s[2:4], 16, 8); err == nil {
				b.WriteByte(byte(n))
				s = s[4:]
				continue
			}
		}
		b.WriteByte(s[0])
		s = s[1:]
	}
	return b.String()
}
