package firewall

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Process is who holds a socket; the zero Process cannot be told.
type Process struct {
	PID  int
	Comm string // its name, as it gives it to itself
}

// Owners fills in, by inode, which process has a socket open: the first of several
// (proc_pid_fd(5)), and init only if no other has, since it keeps the sockets that it
// hands to services. What this user may not see stays empty.
func Owners(wanted map[uint32]Process) {
	pids, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, d := range pids {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		dir := filepath.Join("/proc", d.Name())
		fds, err := os.ReadDir(filepath.Join(dir, "fd"))
		if err != nil {
			continue // another user's, or gone
		}
		for _, fd := range fds {
			link, err := os.Readlink(filepath.Join(dir, "fd", fd.Name()))
			if err != nil {
				continue
			}
			text, ok := strings.CutPrefix(link, "socket:[")
			if !ok {
				continue
			}
			inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32)
			if err != nil {
				continue
			}
			was, asked := wanted[uint32(inode)]
			if !asked || was.PID > 1 && (was.PID <= pid || pid == 1) || was.PID == pid {
				continue
			}
			comm, err := os.ReadFile(filepath.Join(dir, "comm"))
			if err != nil {
				continue
			}
			wanted[uint32(inode)] = Process{pid, strings.TrimSuffix(string(comm), "\n")}
		}
	}
}
