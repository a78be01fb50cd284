package verify

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary one of the processes below instead.
const helperEnv = "DEADLIGHT_TEST_HELPER"

// runHelper is a process that a test needs beside itself. Helpers whose name
// begins with "isolate" run on both sides of Isolate.
func runHelper(name string) int {
	fail := func(err error) int {
		fmt.Println("error:", err)
		var ns *NamespaceError
		if errors.As(err, &ns) {
			fmt.Println("hint:", ns.Hint())
		}
		return 99
	}
	if strings.HasPrefix(name, "isolate") && !Isolated() {
		code, err := Isolate(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		if err != nil {
			return fail(err)
		}
		return code
	}
	switch name {
	case "isolate-exit":
		if err := EnterIsolated(); err != nil {
			return fail(err)
		}
		code, err := strconv.Atoi(os.Args[1])
		if err != nil {
			return fail(err)
		}
		fmt.Println("uid", os.Getuid(), "pid", os.Getpid())
		return code
	case "isolate-signal":
		signals := make(chan os.Signal, 4)
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
		fmt.Println("ready")
		fmt.Println(<-signals)
		return 7
	case "isolate-world":
		if err := EnterIsolated(); err != nil {
			return fail(err)
		}
		w, err := NewWorld(WorldConfig{Host4: testHost4, Host6: testHost6, Links: []string{"eth0"}})
		if err != nil {
			return fail(err)
		}
		defer w.Close()
		go func() {
			_ = w.Command(context.Background(), []string{"sh", "-c", "setsid sleep 1000 & setsid sleep 1000"}, io.Discard, io.Discard)
		}()
		time.Sleep(200 * time.Millisecond) // the daemons start
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "isolate-few-files":
		if err := EnterIsolated(); err != nil {
			return fail(err)
		}
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1100, Max: 1100}); err != nil {
			return fail(err)
		}
		most := MaxListeners()
		if most > 1100-reservedFDs || most < 700 {
			return fail(fmt.Errorf("MaxListeners %d of 1100", most))
		}
		l, err := Listen(Here, SpreadPorts(nil, most), nil)
		if err != nil {
			return fail(fmt.Errorf("MaxListeners %d: %w", most, err))
		}
		l.Close()
		_, err = Listen(Here, SpreadPorts(nil, 2000), nil)
		return fail(err)
	case "no-user-namespaces":
		// In a user namespace of its own, whose limit is nobody else's.
		if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0o644); err != nil {
			return fail(err)
		}
		return execWithout(fail, "isolate-exit", unix.CAP_SYS_ADMIN)
	case "enter-without-rights":
		return execWithout(fail, "enter", unix.CAP_NET_ADMIN)
	case "enter":
		if err := EnterIsolated(); err != nil {
			return fail(err)
		}
	default:
		return fail(errors.New("no such helper: " + name))
	}
	return 0
}

// execWithout becomes another helper without one capability.
func execWithout(fail func(error) int, helper string, capability uintptr) int {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0); err != nil {
		return fail(err)
	}
	if err := os.Setenv(helperEnv, helper); err != nil {
		return fail(err)
	}
	return fail(syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// helperCommand prepares one; attr may be nil.
func helperCommand(ctx context.Context, name string, attr *syscall.SysProcAttr, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(withoutMarker(os.Environ()), helperEnv+"="+name)
	if attr == nil {
		attr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr = attr
	cmd.WaitDelay = 2 * time.Second // what it left behind may hold its output open
	return cmd
}

// asNobody runs a helper without any right, where we are root enough for that.
func asNobody(t *testing.T) *syscall.SysProcAttr {
	t.Helper()
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(string(b)); len(f) == 3 && f[2] == "1" {
		return nil // the tests themselves were started by somebody unprivileged
	}
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
}

func TestIsolateChildIsElsewhere(t *testing.T) {
	if !Isolated() {
		t.Fatal("the tests do not run isolated")
	}
	outer, _, _ := isolatedMarker()
	own, err := threadNetNS()
	if err != nil {
		t.Fatal(err)
	}
	if own == outer {
		t.Fatalf("network namespace is %v, the parent's", own)
	}
}

func TestIsolateExitCode(t *testing.T) {
	for _, who := range []struct {
		name string
		attr *syscall.SysProcAttr
	}{{"privileged", nil}, {"nobody", asNobody(t)}} {
		for _, code := range []int{0, 1, 3, 70} {
			t.Run(fmt.Sprintf("%s/%d", who.name, code), func(t *testing.T) {
				out, err := helperCommand(t.Context(), "isolate-exit", who.attr, strconv.Itoa(code)).CombinedOutput()
				got := 0
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					got = exit.ExitCode()
				} else if err != nil {
					t.Fatal(err)
				}
				if got != code || string(out) != "uid 0 pid 1\n" {
					t.Errorf("exit code %d, output %q; want %d", got, out, code)
				}
			})
		}
	}
}

func TestIsolateForwardsSignals(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		t.Run(s.String(), func(t *testing.T) {
			cmd := helperCommand(t.Context(), "isolate-signal", nil)
			out := startReady(t, cmd)
			if err := cmd.Process.Signal(s); err != nil {
				t.Fatal(err)
			}
			line, err := out.ReadString('\n')
			if err != nil || strings.TrimSpace(line) != s.String() {
				t.Errorf("child saw %q, %v; want %v", line, err, s)
			}
			var exit *exec.ExitError
			if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
				t.Errorf("exit: %v, want the child's 7", err)
			}
		})
	}
}

func TestIsolateUnhandledInterruptIs130(t *testing.T) {
	cmd := helperCommand(t.Context(), "isolate-world", nil)
	startReady(t, cmd)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 130 {
		t.Errorf("exit: %v, want 130", err)
	}
}

// Nothing of a world outlives its makers, a daemon of a tried command included.
func TestIsolateKillLeavesNothing(t *testing.T) {
	before := netNamespaces(t)
	for _, who := range []struct {
		name   string
		attr   *syscall.SysProcAttr
		victim func(parent int) int
	}{
		{"parent", nil, func(p int) int { return p }},
		{"child", nil, onlyChild(t)},
		{"parent of nobody", asNobody(t), func(p int) int { return p }},
	} {
		t.Run(who.name, func(t *testing.T) {
			cmd := helperCommand(t.Context(), "isolate-world", who.attr)
			startReady(t, cmd)
			if during := netNamespaces(t); len(during) < len(before)+2 {
				t.Fatalf("%d namespaces with a world, %d without: the count shows nothing", len(during), len(before))
			}
			if err := syscall.Kill(who.victim(cmd.Process.Pid), syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait() // it was killed
			var after map[string][]string
			for range 300 {
				if after = netNamespaces(t); len(after) == len(before) {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("left behind: %v, before: %v", after, before)
		})
	}
}

func TestIsolateForbidden(t *testing.T) {
	// A user namespace of ours, so that its limit is ours to change.
	attr := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := helperCommand(t.Context(), "no-user-namespaces", attr, "0").CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 99 {
		t.Fatalf("exit: %v, want 99; output %s", err, out)
	}
	const want = "error: no throw-away network namespace: user.max_user_namespaces is 0 (no space left on device)\n" +
		"hint: sudo deadlight try …, or once: sudo sysctl -w user.max_user_namespaces=15000\n"
	if string(out) != want {
		t.Errorf("got:\n%swant:\n%s", out, want)
	}
}

// What Ubuntu's AppArmor does: the namespaces are made, the rights in them are not.
func TestEnterIsolatedWithoutRights(t *testing.T) {
	own, err := threadNetNS()
	if err != nil {
		t.Fatal(err)
	}
	cmd := helperCommand(t.Context(), "enter-without-rights", &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWPID | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	})
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d:%d:user", isolatedEnv, own.dev, own.ino))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 99 || !strings.Contains(string(out), ErrNoNamespace.Error()) {
		t.Errorf("exit: %v, output %s; want a NamespaceError", err, out)
	}
}

func TestIsolatedRefusesForgedMarker(t *testing.T) {
	for _, marker := range []string{"4:1:net", "4:0:net", "", "1", "x:y:net"} {
		// The helper is process 1 nowhere, so it must not believe its environment.
		cmd := helperCommand(t.Context(), "enter", nil)
		cmd.Env = append(cmd.Env, isolatedEnv+"="+marker)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "not in one") {
			t.Errorf("marker %q: %v, %s; want a refusal", marker, err, out)
		}
	}
}

// Process 1 of a container, in the network that the marker calls the outer one.
func TestIsolatedRefusesOuterNetwork(t *testing.T) {
	own, err := threadNetNS()
	if err != nil {
		t.Fatal(err)
	}
	cmd := helperCommand(t.Context(), "enter", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID})
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d:%d:net", isolatedEnv, own.dev, own.ino))
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "not in one") {
		t.Errorf("%v, %s; want a refusal", err, out)
	}
}

func TestNamespaceErrorReasons(t *testing.T) {
	for _, tt := range []struct {
		name         string
		err          error
		user         bool
		settings     map[string]string
		reason, hint string
	}{
		{"old Debian", unix.EPERM, true, map[string]string{"kernel/unprivileged_userns_clone": "0"},
			"kernel.unprivileged_userns_clone is 0", "sudo deadlight try …, or once: sudo sysctl -w kernel.unprivileged_userns_clone=1"},
		{"Ubuntu 24.04", unix.EPERM, true, map[string]string{"kernel/apparmor_restrict_unprivileged_userns": "1"},
			"kernel.apparmor_restrict_unprivileged_userns is 1", "sudo deadlight try …, or once: sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"},
		{"limit 0", unix.ENOSPC, true, map[string]string{"user/max_net_namespaces": "0"},
			"user.max_net_namespaces is 0", "sudo deadlight try …, or once: sudo sysctl -w user.max_net_namespaces=15000"},
		{"limit reached", unix.ENOSPC, true, map[string]string{"user/max_user_namespaces": "5"},
			"the limit of namespaces is reached", "sudo deadlight try …; in a container, run it on the host instead"},
		{"container", unix.EPERM, true, nil,
			"a container or a security module forbids it", "sudo deadlight try …; in a container, run it on the host instead"},
		{"root in a container", unix.EPERM, false, map[string]string{"kernel/unprivileged_userns_clone": "0"},
			"a container or a security module forbids it", "a container needs the capabilities SYS_ADMIN, NET_ADMIN and NET_RAW for this; or run it on the host"},
		{"kernel without", unix.EINVAL, true, nil,
			"the kernel was built without user, network or PID namespaces", "sudo deadlight try …; in a container, run it on the host instead"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			wrapped := &os.PathError{Op: "fork/exec", Path: "/proc/self/exe", Err: tt.err}
			e := newNamespaceError(wrapped, tt.user, func(p string) string { return tt.settings[p] })
			if e.Reason != tt.reason || e.Hint() != tt.hint {
				t.Errorf("reason %q, hint %q; want %q, %q", e.Reason, e.Hint(), tt.reason, tt.hint)
			}
			if !errors.Is(e, ErrNoNamespace) || !errors.Is(e, tt.err) {
				t.Errorf("%v is not ErrNoNamespace and %v", e, tt.err)
			}
			if strings.Contains(e.Error(), "fork/exec") {
				t.Errorf("kernel words: %v", e)
			}
		})
	}
}

// startReady starts a helper and waits until it says so.
func startReady(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); err != nil || line != "ready\n" {
		rest, _ := io.ReadAll(r)
		t.Fatalf("helper says %q, %v\n%s%s", line, err, rest, stderr.String())
	}
	return r
}

// netNamespaces gives the processes of every network namespace that has any.
func netNamespaces(t *testing.T) map[string][]string {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil || len(links) == 0 {
		t.Fatalf("list namespaces: %v, %d", err, len(links))
	}
	found := map[string][]string{}
	for _, l := range links {
		if ns, err := os.Readlink(l); err == nil {
			comm, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(l)), "comm"))
			found[ns] = append(found[ns], strings.TrimSpace(string(comm)))
		}
	}
	return found
}

// onlyChild finds the child of a process that has one.
func onlyChild(t *testing.T) func(parent int) int {
	return func(parent int) int {
		t.Helper()
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if pids := strings.Fields(string(b)); len(pids) > 0 {
				pid, err := strconv.Atoi(pids[0])
				if err != nil {
					t.Fatal(err)
				}
				return pid
			}
		}
		t.Fatalf("process %d has no child", parent)
		return 0
	}
}
