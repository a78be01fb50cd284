package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
)

// The kernel ends a trial by itself; the cleaner only writes the clean table
// behind it. Without one the next apply, confirm or rollback does.

func newCleanerCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:    "end-trial ID",
		Hidden: true, // apply --confirm starts it
		Short:  "Wait for the end of a trial and write the clean table behind it",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("deadlight rollback", "end-trial wants the id of a trial")
			}
			return nil
		},
	}
	dir := stateFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		if err := awaitEnd(c.Context(), *dir, args[0]); err != nil {
			return hostError(err, "deadlight rollback")
		}
		return nil
	}
	return c
}

// awaitEnd clears up when a trial is over, and ends early when it is not on any
// more.
func awaitEnd(ctx context.Context, dir, id string) error {
	const look = time.Second
	state, err := firewall.OpenState(dir)
	if err != nil {
		return err
	}
	for {
		r, err := state.PendingIndex()
		if errors.Is(err, firewall.ErrNoState) || err == nil && r.Table != id {
			return nil
		}
		if err != nil {
			return err
		}
		wait := time.Until(r.Deadline)
		if wait <= 0 {
			if wait, err = endTrial(dir, id); err != nil && !errors.Is(err, firewall.ErrLocked) {
				return err
			}
			if wait <= 0 {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(wait, look)):
		}
	}
}

// endTrial writes the clean table behind a trial that is over; else it says how
// long that takes. The kernel's clock counts: it stands still while the host sleeps.
func endTrial(dir, id string) (left time.Duration, err error) {
	const soon = 100 * time.Millisecond
	h, err := openHost(dir, true)
	if errors.Is(err, firewall.ErrLocked) {
		return soon, err
	}
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	last, err := h.state.Settle(h.look, h.here)
	if errors.Is(err, firewall.ErrNoState) || err == nil && (!last.OnTrial() || last.Table != id) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	is, err := h.look()
	if err != nil {
		return 0, err
	}
	if until, _ := is.Trial(); !until.IsZero() {
		return max(time.Until(until), soon), nil
	}
	_, _, err = h.goBack(last, &firewall.Back{Policy: last.Policy, At: last.Deadline})
	return 0, err
}

// startCleaner makes sure that somebody clears up: systemd where it runs, since it
// outlives the session, else a process of our own.
func startCleaner(dir string, r *firewall.Record) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{"end-trial", r.Table, "--state-dir", dir}
	if bySystemd() {
		wait := max(time.Until(r.Deadline), 0).Round(time.Second) + time.Second
		timer := append([]string{"--quiet", "--collect", "--unit=deadlight-trial-" + r.Table[:16],
			"--description=Deadlight: clear up behind a trial", fmt.Sprintf("--on-active=%ds", int(wait.Seconds())),
			"--timer-property=AccuracySec=1s", "--", exe}, args...)
		if exec.Command("/usr/bin/systemd-run", timer...).Run() == nil {
			return nil
		}
	}
	c := exec.Command("/proc/self/exe", args...)
	c.Args[0] = "deadlight"
	c.Dir, c.Env = "/", []string{}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal that could take it along
	if err := c.Start(); err != nil {
		return err
	}
	return c.Process.Release()
}

// bySystemd reports whether systemd runs, and in our network namespace: a timer of
// its own would otherwise write another table.
func bySystemd() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false
	}
	own, err := os.Stat("/proc/thread-self/ns/net")
	if err != nil {
		return false
	}
	first, err := os.Stat("/proc/1/ns/net")
	return err == nil && os.SameFile(own, first)
}
