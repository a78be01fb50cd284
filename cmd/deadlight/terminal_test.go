package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// terminal is a terminal with a command that runs on it.
type terminal struct {
	*os.File
	cmd   *exec.Cmd
	shown lockedBuffer
	seen  int // of what was shown, by await
	ended chan error
}

// onTerminal starts a command on a terminal of its own.
func onTerminal(t *testing.T, columns uint16, cmd *exec.Cmd) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var n int
	err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	if err == nil {
		n, err = unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 40, Col: columns})
	}
	if err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	x := &terminal{File: master, cmd: cmd, ended: make(chan error, 1)}
	go func() {
		_, _ = io.Copy(&x.shown, master) // EIO when the last one has closed it
		x.ended <- cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		master.Close()
	})
	return x
}

// await waits until something new is shown.
func (x *terminal) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		all := x.shown.String()
		if i := strings.Index(all[x.seen:], text); i >= 0 {
			x.seen += i + len(text)
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%q is not shown after a minute:\n%s", text, all)
		}
	}
}

// types sends keys.
func (x *terminal) types(t *testing.T, keys string) {
	t.Helper()
	if _, err := io.WriteString(x, keys); err != nil {
		t.Fatal(err)
	}
}

// end waits for the command and gives its exit code and all that was shown.
func (x *terminal) end(t *testing.T) (code int, shown string) {
	t.Helper()
	select {
	case <-x.ended:
	case <-time.After(time.Minute):
		t.Fatalf("%v has not ended after a minute:\n%s", x.cmd.Args, x.shown.String())
	}
	return x.cmd.ProcessState.ExitCode(), strings.ReplaceAll(x.shown.String(), "\r\n", "\n")
}
