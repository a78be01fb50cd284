package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// askEnv makes the test binary ask the kernel for its own process number, print
// it, and become the program in its arguments: the same process, so the number
// is the one that an event must carry, whatever PID namespace the test is in.
const askEnv = "DEADLIGHT_TEST_ASK_PID"

func becomeProgram() error {
	runtime.LockOSThread() // never unlocked: the next goroutine gets another thread
	if unix.Gettid() != os.Getpid() {
		again := make(chan error)
		go func() { again <- becomeProgram() }()
		return <-again
	}
	c, err := Dial(nil)
	if err != nil {
		return err
	}
	g, err := c.Generation()
	if err != nil {
		return err
	}
	fmt.Println(g.PID)
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		return err
	}
	return unix.Exec(path, os.Args[1:], os.Environ())
}

// nftAs runs nft and gives its process number as the kernel counts.
func nftAs(t *testing.T, args ...string) uint32 {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", append([]string{"nft"}, args...)...)
	cmd.Env = append(os.Environ(), askEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	pid, err := strconv.ParseUint(strings.TrimSpace(string(out)), 10, 32)
	if err != nil {
		t.Fatalf("nft %s printed %q", strings.Join(args, " "), out)
	}
	return uint32(pid)
}

func monitor(t *testing.T, buffer int) *Monitor {
	t.Helper()
	m, err := dialMonitor(nil, rules.TableName, buffer)
	if err != nil {
		t.Fatalf("monitor: %v", err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func next(t *testing.T, m *Monitor) Batch {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b, err := m.Next(ctx)
	if err != nil {
		t.Fatalf("no event: %v", err)
	}
	return b
}

func TestMonitorSaysWhatAndWho(t *testing.T) {
	tests := []struct {
		command string
		want    string // one of the touches
		urgent  bool
	}{
		{`insert rule inet deadlight gate accept`, "add rule gate 1", false},
		{`flush chain inet deadlight open_web`, "remove rule open_web", false},
		{`add chain inet deadlight gate { policy accept; }`, "add chain gate 1", false},
		{`add element inet deadlight tcp_listed { 5000, 5001 }`, "add element tcp_listed", false},
		{`delete element inet deadlight dhcp_if { "eth0" }`, "remove element dhcp_if", false},
		{`add set inet deadlight extra { type ipv4_addr; }`, "add set extra 1", false},
		{`add counter inet deadlight extra`, "add object extra 1", false},
		{`add chain inet deadlight extra; add chain inet deadlight more`, "add chain more 1", false},
		{`add table inet deadlight { flags dormant; }`, "add table deadlight 1", false},
		{`delete table inet deadlight`, "remove table deadlight 1", true},
		{`flush ruleset`, "remove table deadlight 1", true},
		{`delete table inet deadlight; add table inet deadlight`, "add table deadlight 1", true}, // without its chains
		{`flush chain inet deadlight silence; delete chain inet deadlight silence`, "remove chain silence 1", true},
		{`add table inet other; add chain inet other gate`, "", false},
		{`add table ip deadlight; add chain ip deadlight gate`, "", false},
	}
	for _, tt := range tests {
		t.Run(tt.command, func(t *testing.T) {
			inNamespace(t, func(t *testing.T) {
				mustApply(t, dial(t), ruleset(t, everything))
				m := monitor(t, monitorBuffer)
				pid := nftAs(t, tt.command)
				b := next(t, m)
				if b.Generation.Comm != "nft" || b.Generation.PID != pid {
					t.Errorf("made by %s (pid %d), want nft (pid %d)", b.Generation.Comm, b.Generation.PID, pid)
				}
				if g, err := dial(t).Generation(); err != nil || g.ID != b.Generation.ID {
					t.Errorf("generation %d, the kernel says %d (%v)", b.Generation.ID, g.ID, err)
				}
				found := tt.want == "" && b.Touches == nil
				for _, touch := range b.Touches {
					line := fmt.Sprintf("%s %s %s %d", touch.Action, touch.Kind, touch.Name, touch.Count)
					found = found || tt.want != "" && strings.HasPrefix(line+" ", tt.want)
				}
				if !found {
					t.Errorf("touches = %v, want %q", b.Touches, tt.want)
				}
				if b.Urgent() != tt.urgent {
					t.Errorf("urgent = %v: %v", b.Urgent(), b.Touches)
				}
			})
		})
	}
}

// loadTable is a foreign transaction of many elements.
func loadTable(t *testing.T, table string, n int) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "add table inet %[1]s\nadd set inet %[1]s s { type ipv4_addr; }\nadd element inet %[1]s s {", table)
	for i := range n {
		fmt.Fprintf(&b, "10.%d.%d.%d,", i>>16&255, i>>8&255, i&255)
	}
	b.WriteString("}\n")
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(b.String())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft -f: %v\n%s", err, out)
	}
}

func TestMonitorSaysThatItLostEvents(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		m := monitor(t, 1<<12)
		loadTable(t, "other", 100_000)
		if b := next(t, m); !b.Lost {
			t.Fatalf("100,000 elements in a buffer of 4 KiB: %+v", b)
		}
		nft(t, "add table inet deadlight")
		if b := next(t, m); b.Lost || len(b.Touches) != 1 || b.Generation.Comm != "nft" {
			t.Errorf("after the loss: %+v", b)
		}
	})
}

func TestMonitorHearsALargeTransaction(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		m := monitor(t, monitorBuffer)
		nft(t, "add table inet deadlight; add set inet deadlight s { type ipv4_addr; }")
		next(t, m)
		loadTable(t, rules.TableName, 2000)
		b := next(t, m)
		sum := 0
		for _, touch := range b.Touches {
			if touch.Kind == "element" {
				sum += touch.Count
			}
		}
		if b.Lost || sum == 0 || len(b.Touches) > 3 {
			t.Errorf("touches = %v, lost = %v", b.Touches, b.Lost)
		}
	})
}

func TestMonitorEndsWithItsContext(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		m := monitor(t, monitorBuffer)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() {
			_, err := m.Next(ctx)
			ended <- err
		}()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Next: %v", err)
		}
	})
}

func TestActor(t *testing.T) {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	own := Generation{PID: uint32(os.Getpid()), Comm: strings.TrimSpace(string(comm))}
	a := actor("/proc", own)
	if a.PID != own.PID || a.UID != strconv.Itoa(os.Getuid()) || !strings.HasPrefix(a.Command, os.Args[0]) {
		t.Errorf("actor = %+v", a)
	}
	own.Comm = "somebody else"
	if a := actor("/proc", own); a.Command != "" || a.UID != "" {
		t.Errorf("another process with the same number: %+v", a)
	}
	own.PID = 1 << 30
	if a := actor("/proc", own); a != (Actor{PID: own.PID, Comm: own.Comm}) {
		t.Errorf("a process that is gone: %+v", a)
	}
}
