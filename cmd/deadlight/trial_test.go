package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"deadlight/firewall"
)

// trialHost is a host with two policies of which one is on trial now and then.
type trialHost struct {
	*lab
	state string
	files []string
}

func newTrialHost(t *testing.T) *trialHost {
	t.Helper()
	h := &trialHost{lab: newLab(t, labPolicy)}
	dir := t.TempDir()
	h.state = filepath.Join(dir, "state")
	h.files = []string{filepath.Join(dir, "a.toml"), filepath.Join(dir, "b.toml")}
	for i, text := range []string{killPolicy("a", 10000, 100), killPolicy("bb", 20000, 300)} {
		if err := os.WriteFile(h.files[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { h.killCleaners(t) })
	return h
}

// deadlight runs a command in the host; with a context that ends it is killed.
func (h *trialHost) deadlight(ctx context.Context, args ...string) error {
	return h.Host(func() error {
		cmd := exec.CommandContext(ctx, "deadlight", append(args, "--state-dir", h.state)...) // done: SIGKILL
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w\n%s", args[0], err, errs.Bytes())
		}
		return nil
	})
}

func (h *trialHost) must(t *testing.T, args ...string) {
	t.Helper()
	if err := h.deadlight(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

// killCleaners kills what clears up behind the trials of this host, and says how
// many there were.
func (h *trialHost) killCleaners(t *testing.T) int {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, name := range procs {
		line, _ := os.ReadFile(name) // it may have ended
		args := strings.Split(string(line), "\x00")
		if len(args) < 5 || args[1] != "end-trial" || args[4] != h.state {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
		n++
	}
	return n
}

// settled reads what the state calls applied, as a reader does, and whether the
// kernel holds just that.
func (h *trialHost) settled(t *testing.T) *firewall.Record {
	t.Helper()
	var r *firewall.Record
	if err := h.Host(func() error {
		host, err := openHost(h.state, false)
		if err != nil {
			return err
		}
		defer host.close()
		if r, err = host.state.Settle(host.look, host.here); err != nil {
			return err
		}
		is, err := host.look()
		if err != nil {
			return err
		}
		if d := firewall.Diff(is, r.Snapshot); len(d) > 0 {
			return fmt.Errorf("the state says %s, on trial %t, and the kernel holds something else: %#v", r.Policy, r.OnTrial(), d)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return r
}

// Whatever of ours is killed at whatever instant, the host ends with exactly the
// old or the new ruleset, what is recorded is at every instant what the kernel
// holds, and no stranger ever gets an answer. The full count runs when the test is
// asked for by name: go test -run Soak.
func TestSoakTrialKill(t *testing.T) {
	cycles := 10
	if strings.Contains(flag.Lookup("test.run").Value.String(), "Soak") {
		cycles = 100
	}
	h := newTrialHost(t)
	var usual time.Duration
	for _, file := range h.files {
		begun := time.Now()
		h.must(t, "apply", file)
		usual = time.Since(begun)
	}
	open, silent := newKnocker(t, h.lab, 80), newKnocker(t, h.lab, 3306) // somebody listens on both
	random := rand.New(rand.NewPCG(3, 4))
	now := 1 // which of the files holds
	ends := map[string]int{}
	killed := 0
	span := usual * 3 / 2 // follows the load of the machine
	for i := range cycles {
		next := 1 - now
		kill := func(args ...string) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.Int64N(int64(span))))
			defer cancel()
			before := h.settled(t).Table
			if err := h.deadlight(ctx, args...); err != nil {
				if ctx.Err() == nil {
					t.Fatal(err)
				}
				killed++
			}
			if h.settled(t).Table == before {
				span += span / 10
			} else {
				span -= span / 10
			}
		}
		const within = 3 * time.Second
		begun := time.Now()
		if i%4 == 0 {
			kill("apply", "--confirm", within.String(), h.files[next])
		} else {
			h.must(t, "apply", "--confirm", within.String(), h.files[next])
		}
		r := h.settled(t)
		began := r.OnTrial()
		how := "not begun"
		if began {
			how = []string{"confirm", "rollback", "nothing"}[i%3]
			if i%2 == 0 {
				h.killCleaners(t)
			}
			if how != "nothing" {
				kill(how)
				r = h.settled(t)
			}
		}
		// A trial that is still on ends by itself, and whoever comes next clears up.
		if r.OnTrial() {
			how += ", then by itself"
			time.Sleep(time.Until(r.Deadline.Add(200 * time.Millisecond)))
			h.settled(t)
			h.must(t, "rollback")
			r = h.settled(t)
			if time.Since(begun) < within {
				t.Fatalf("cycle %d: over after %v", i, time.Since(begun))
			}
		}
		if r.OnTrial() {
			t.Fatalf("cycle %d, %s: still on trial", i, how)
		}
		got := slices.Index(h.files, r.Policy)
		if got < 0 || heldOf(t, h.lab, h.files) != got {
			t.Fatalf("cycle %d, %s: the state says %s, and the kernel holds another table:\n%s", i, how, r.Policy, tableOf(t, h.lab))
		}
		if got == next && !strings.HasPrefix(how, "confirm") || got == next && !began {
			t.Fatalf("cycle %d: %s, and the new policy holds", i, how)
		}
		ends[how+map[bool]string{true: ": new", false: ": old"}[got == next]]++
		now = got
	}
	t.Logf("%d cycles, %d commands killed; %v; %d SYNs to the closed port, %d answers", cycles, killed, ends, silent.sent.Load(), silent.answers.Load())
	if killed == 0 || len(ends) < 3 {
		t.Error("the instants are not spread")
	}
	if open.answers.Load() == 0 || silent.sent.Load() == 0 {
		t.Error("the open port is not heard: silence proves nothing")
	}
	if n := silent.answers.Load(); n > 0 {
		t.Errorf("the closed port answered %d times", n)
	}
}

// The terminal hangs up while the time is counted down: the trial goes on, and the
// cleaner, which has none, writes the clean table behind it.
func TestTrialOutlivesItsTerminal(t *testing.T) {
	h := newTrialHost(t)
	h.must(t, "apply", h.files[0])
	old := tableOf(t, h.lab)
	var shown bytes.Buffer
	if err := h.Host(func() error {
		// script gives it a terminal of its own, which ends with script.
		cmd := exec.Command("script", "-qefc", "deadlight apply --confirm 3s "+h.files[1]+" --state-dir "+h.state, "/dev/null")
		cmd.Stdout, cmd.Stderr = &shown, &shown
		in, err := cmd.StdinPipe() // an end of the input would end it
		if err != nil {
			return err
		}
		defer in.Close()
		if err := cmd.Start(); err != nil {
			return err
		}
		for end := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
			state, err := firewall.OpenState(h.state)
			if err != nil {
				return err
			}
			if _, err := state.PendingIndex(); err == nil {
				break
			}
			if time.Now().After(end) {
				return errors.New("no trial began")
			}
		}
		time.Sleep(500 * time.Millisecond) // it counts
		err = cmd.Process.Kill()
		_ = cmd.Wait() // killed
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(shown.String(), " s left to confirm") {
		t.Errorf("no countdown:\n%s", shown.String())
	}
	r := h.settled(t)
	if !r.OnTrial() {
		t.Fatalf("%s is not on trial any more", r.Policy)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if r = h.settled(t); !r.OnTrial() {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nobody cleared up")
		}
	}
	if r.Policy != h.files[0] || r.Back == nil || r.Back.Asked || tableOf(t, h.lab) != old {
		t.Errorf("the state says %s, %+v", r.Policy, r.Back)
	}
}

// On a terminal the exit code tells how the trial ended.
func TestTrialIsCountedDown(t *testing.T) {
	for _, tt := range []struct {
		how  string
		want int
		says string
	}{{"confirm", exitOK, "Confirmed"}, {"rollback", exitRolledBack, "was rolled back: the kernel went back to"}, {"nothing", exitRolledBack, "was rolled back: the kernel went back to"}} {
		t.Run(tt.how, func(t *testing.T) {
			h := newTrialHost(t)
			h.must(t, "apply", h.files[0])
			within := "60s"
			if tt.how == "nothing" {
				within = "2s"
			}
			done := make(chan error, 1)
			var shown bytes.Buffer
			go func() {
				done <- h.Host(func() error {
					cmd := exec.Command("script", "-qefc", "deadlight apply --confirm "+within+" "+h.files[1]+" --state-dir "+h.state, "/dev/null")
					cmd.Stdout, cmd.Stderr = &shown, &shown
					in, err := cmd.StdinPipe()
					if err != nil {
						return err
					}
					defer in.Close()
					return cmd.Run()
				})
			}()
			state, err := firewall.OpenState(h.state)
			if err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(time.Minute); tt.how != "nothing"; time.Sleep(20 * time.Millisecond) {
				if _, err := state.PendingIndex(); err == nil {
					h.must(t, tt.how)
					break
				}
				if time.Now().After(end) {
					t.Fatal("no trial began")
				}
			}
			err = <-done
			code := 0
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				code = exit.ExitCode()
			}
			if code != tt.want || !strings.Contains(shown.String(), tt.says) {
				t.Errorf("%q: exit %d, want %d: %v\n%s", tt.how, code, tt.want, err, shown.String())
			}
		})
	}
}
