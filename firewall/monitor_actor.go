package firewall

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Actor is the process that made a transaction. All but PID and Comm is empty
// when it was gone before it could be looked at. The text is the process's own
// choice.
type Actor struct {
	PID     uint32 // as the first PID namespace counts
	Comm    string
	Command string // its command line
	UID     string
}

// String names the process in a few words.
func (a Actor) String() string {
	if a.Comm == "" {
		return "an unknown process"
	}
	s := fmt.Sprintf("%s (pid %d", a.Comm, a.PID)
	if a.UID != "" {
		s += ", user " + a.UID
	}
	if a.Command != "" {
		s += ": " + a.Command
	}
	return s + ")"
}

// pidsAreOurs reports whether the kernel's process numbers are those of our
// /proc. A question about the generation is answered with the number of the
// thread that asks.
func (c *Conn) pidsAreOurs() (bool, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	g, err := c.Generation()
	if err != nil {
		return false, err
	}
	return g.PID == uint32(unix.Gettid()), nil
}

// actor looks at the process of a generation in /proc, where pid is the number of
// the thread that wrote. Whatever does not fit is left out: the process may have
// ended, and its number may have gone to another.
func actor(proc string, g Generation) Actor {
	a := Actor{PID: g.PID, Comm: g.Comm}
	dir := proc + "/" + strconv.FormatUint(uint64(g.PID), 10)
	read := func(name string) string {
		b, err := os.ReadFile(dir + "/" + name)
		if err != nil {
			return ""
		}
		return string(b)
	}
	command := strings.TrimRight(strings.ReplaceAll(read("cmdline"), "\x00", " "), " ")
	status := read("status")
	if strings.TrimSuffix(read("comm"), "\n") != g.Comm {
		return a
	}
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		fields := strings.Fields(value)
		switch {
		case len(fields) == 0:
		case key == "Tgid":
			if pid, err := strconv.ParseUint(fields[0], 10, 32); err == nil {
				a.PID = uint32(pid)
			}
		case key == "Uid":
			a.UID = fields[0]
		}
	}
	const most = 200
	if len(command) > most {
		command = strings.ToValidUTF8(command[:most], "") + "…"
	}
	a.Command = command
	return a
}
