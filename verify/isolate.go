package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// isolatedEnv tells a child of [Isolate] which network namespace its parent is
// in (device:inode), and whether it got a user namespace of its own.
const isolatedEnv = "DEADLIGHT_OUTER_NETNS"

// isolatedGrace is how long an interrupted child may take to stop by itself.
const isolatedGrace = 10 * time.Second

// Isolated reports whether this process is a child that [Isolate] started: the
// first process of a PID namespace, in another network namespace than its
// parent's. A forged or inherited marker, and any doubt, give false.
func Isolated() bool {
	outer, _, ok := isolatedMarker()
	if !ok || os.Getpid() != 1 {
		return false
	}
	own, err := threadNetNS()
	return err == nil && own != outer
}

// isolatedMarker reads the environment that Isolate left.
func isolatedMarker() (outer nsID, userNS, ok bool) {
	fields := strings.Split(os.Getenv(isolatedEnv), ":")
	if len(fields) != 3 {
		return nsID{}, false, false
	}
	dev, err1 := strconv.ParseUint(fields[0], 10, 64)
	ino, err2 := strconv.ParseUint(fields[1], 10, 64)
	if err1 != nil || err2 != nil || ino == 0 {
		return nsID{}, false, false
	}
	return nsID{dev, ino}, fields[2] == "user", true
}

// nsID identifies a namespace for as long as it lives (namespaces(7)).
type nsID struct{ dev, ino uint64 }

// threadNetNS identifies the network namespace of the calling thread, not of
// the process: /proc/self would show the thread group leader's.
func threadNetNS() (nsID, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return nsID{}, fmt.Errorf("identify network namespace: %w", err)
	}
	return nsID{uint64(st.Dev), st.Ino}, nil
}

// Isolate runs this program again, with args after its name, in throw-away
// network, PID and mount namespaces, and in a user namespace too if the caller
// lacks the capabilities for that. It returns the exit code of the child, and
// 130 for one that was interrupted.
//
// SIGINT, SIGTERM, SIGHUP and SIGQUIT are handed on, so that the child can stop
// by itself; from a terminal it may thus see a signal twice. A done ctx sends
// SIGINT and, ten seconds later, SIGKILL. Whatever way the parent or the child
// ends, kill -9 included, the kernel kills everything that ran inside, and the
// namespaces go with it.
//
// Where namespaces are forbidden the error is a [*NamespaceError]. The child
// must call [EnterIsolated] before anything else.
func Isolate(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) (int, error) {
	// Pdeathsig fires when the forking thread ends, so it must not end before the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	outer, err := threadNetNS()
	if err != nil {
		return 0, err
	}
	userNS := !mayIsolate()
	kind := "net"
	if userNS {
		kind = "user"
	}

	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, stdout, stderr
	cmd.Env = append(withoutMarker(os.Environ()), fmt.Sprintf("%s=%d:%d:%s", isolatedEnv, outer.dev, outer.ino, kind))
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = isolatedGrace
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		// A process that a tried command leaves behind would keep the namespaces
		// alive; as the child is its init, it dies with the child.
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
	}
	if userNS {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}

	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		return 0, newNamespaceError(err, userNS, readSetting)
	}
	interrupted := make(chan bool)
	ended := make(chan struct{})
	go func() {
		seen := false
		for {
			select {
			case s := <-signals:
				seen = seen || s == os.Interrupt
				_ = cmd.Process.Signal(s) // it may just have ended
			case <-ended:
				interrupted <- seen
				return
			}
		}
	}()
	err = cmd.Wait()
	close(ended)
	return isolatedExit(cmd.ProcessState, err, <-interrupted || ctx.Err() != nil)
}

// isolatedExit turns the end of the child into an exit code.
func isolatedExit(state *os.ProcessState, err error, interrupted bool) (int, error) {
	if state == nil {
		return 0, fmt.Errorf("isolated run: %w", err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	switch {
	case !ok:
		return 0, fmt.Errorf("isolated run: %s", state)
	case status.Signaled() && (interrupted || status.Signal() == syscall.SIGINT):
		return 130, nil
	case status.Signaled():
		return 0, fmt.Errorf("isolated run ended by signal: %s", status.Signal())
	case interrupted && status.ExitStatus() == 2:
		return 130, nil // an init cannot die by a signal of its own; the Go runtime leaves with 2 instead
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !interrupted {
		return status.ExitStatus(), fmt.Errorf("isolated run: %w", err)
	}
	return status.ExitStatus(), nil
}

// withoutMarker leaves out what an outer Isolate put there.
func withoutMarker(env []string) []string {
	kept := make([]string, 0, len(env)+1)
	for _, e := range env {
		if !strings.HasPrefix(e, isolatedEnv+"=") {
			kept = append(kept, e)
		}
	}
	return kept
}

// mayIsolate reports whether the calling thread can make the namespaces and
// work in them without a user namespace (capabilities(7)).
func mayIsolate() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	const want = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE
	return data[0].Effective&want == want
}

// EnterIsolated makes a child of [Isolate] ready: it brings lo up, which also
// proves that we may configure this network, and gives the PID namespace its
// own /proc where that is allowed. It refuses where [Isolated] is false and
// where a network interface other than lo is up already. Missing rights give
// a [*NamespaceError].
func EnterIsolated() error {
	if !Isolated() {
		return errors.New("enter throw-away namespace: this process is not in one")
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("enter throw-away namespace: %w", err)
	}
	var lo netlink.Link
	for _, l := range links {
		switch up := l.Attrs().RawFlags&unix.IFF_UP != 0; {
		case l.Attrs().RawFlags&unix.IFF_LOOPBACK != 0:
			lo = l
		case up:
			return fmt.Errorf("enter throw-away namespace: %q is in use here", l.Attrs().Name)
		}
	}
	if lo == nil {
		return errors.New("enter throw-away namespace: it has no loopback interface")
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		_, userNS, _ := isolatedMarker()
		return newNamespaceError(err, userNS, readSetting)
	}
	// The mount must not reach the machine: only on a tree that was made private.
	if unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") == nil {
		// A container may forbid it; then /proc shows the outer process numbers.
		_ = unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	return nil
}

// ErrNoNamespace is what every [*NamespaceError] is, for errors.Is.
var ErrNoNamespace = errors.New("no throw-away network namespace")

// NamespaceError says that this user may not make a throw-away network. It is
// [ErrNoNamespace] and unwraps to the kernel's errno.
type NamespaceError struct {
	Reason string // the fact, such as "user.max_user_namespaces is 0"
	Sysctl string // the assignment that lifts it, "" where none does
	Err    error  // from the kernel
	user   bool   // the caller was not privileged
}

// Error gives the fact in one line.
func (e *NamespaceError) Error() string {
	return fmt.Sprintf("%v: %s (%v)", ErrNoNamespace, e.Reason, rootCause(e.Err))
}

// Unwrap gives the kernel's error.
func (e *NamespaceError) Unwrap() error { return e.Err }

// Is reports whether target is [ErrNoNamespace].
func (e *NamespaceError) Is(target error) bool { return target == ErrNoNamespace }

// Hint names the way on, as commands to paste.
func (e *NamespaceError) Hint() string {
	switch {
	case e.Sysctl != "" && e.user:
		return "sudo deadlight try …, or once: sudo sysctl -w " + e.Sysctl
	case e.Sysctl != "":
		return "sudo sysctl -w " + e.Sysctl
	case e.user:
		return "sudo deadlight try …; in a container, run it on the host instead"
	}
	return "a container needs the capabilities SYS_ADMIN, NET_ADMIN and NET_RAW for this; or run it on the host"
}

// rootCause is the innermost error: "fork/exec /proc/self/exe" tells nobody anything.
func rootCause(err error) error {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return err
}

// readSetting gives a sysctl by its path below /proc/sys, "" where there is none.
func readSetting(path string) string {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// newNamespaceError finds out why the kernel refused (user_namespaces(7); the
// knobs of Debian and of Ubuntu 24.04 are not in mainline).
func newNamespaceError(err error, userNS bool, setting func(path string) string) *NamespaceError {
	e := &NamespaceError{Err: err, user: userNS}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		e.Reason = "the limit of namespaces is reached"
		for _, kind := range []string{"user", "net", "pid", "mnt"} {
			name := "max_" + kind + "_namespaces"
			if setting("user/"+name) == "0" {
				e.Reason, e.Sysctl = "user."+name+" is 0", "user."+name+"=15000"
				break
			}
		}
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		switch {
		case userNS && setting("kernel/unprivileged_userns_clone") == "0":
			e.Reason, e.Sysctl = "kernel.unprivileged_userns_clone is 0", "kernel.unprivileged_userns_clone=1"
		case userNS && setting("kernel/apparmor_restrict_unprivileged_userns") == "1":
			e.Reason, e.Sysctl = "kernel.apparmor_restrict_unprivileged_userns is 1", "kernel.apparmor_restrict_unprivileged_userns=0"
		default:
			e.Reason = "a container or a security module forbids it"
		}
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		e.Reason = "the kernel was built without user, network or PID namespaces"
	default:
		e.Reason = "this program could not be started again"
	}
	return e
}
