package firewall

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// process is who holds a socket.
type process struct {
	pid  int
	comm string
}

// owners fills in, by inode, which process has a socket open: the first of several.
// What this user may not see stays empty.
func owners(wanted map[uint32]process) {
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
			if !asked || was.pid != 0 && was.pid <= pid {
				continue
			}
			comm, err := os.ReadFile(filepath.Join(dir, "comm"))
			if err != nil {
				continue
			}
			wanted[uint32(inode)] = process{pid, strings.TrimSuffix(string(comm), "\n")}
		}
	}
}
