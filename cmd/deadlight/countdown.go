package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// announce says when the trial ends and how to confirm, and waits on a terminal.
func announce(ctx context.Context, e env, dir string, rs *rules.Ruleset, r *firewall.Record, f applyFlags) error {
	again := "sudo deadlight confirm"
	if dir != "" {
		again += " --state-dir " + oneLine(dir)
	} else {
		var err error
		if dir, err = firewall.StateDir(); err != nil {
			return hostError(err, "deadlight status")
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	from := ""
	if rs.Policy.Default.KeepFlows {
		from = " over another SSH connection"
	}
	printf(e.stdout, "The kernel goes back by itself in %s, at %s, unless you run%s:  %s\n", f.within, clock(r.Deadline), from, again)
	if err := startCleaner(dir, r); err != nil {
		printf(e.stderr, "deadlight: warning: nobody will clear up behind the trial: %s; the next apply, confirm or rollback does\n", printable(err.Error()))
	}
	if f.noWait || !isTerminal(e.stderr) {
		return nil
	}
	return countDown(ctx, e, dir, r)
}

// countDown shows the time that is left of a trial until somebody ends it or it
// ends: exit 0 when it was confirmed, 4 when not.
func countDown(ctx context.Context, e env, dir string, trial *firewall.Record) error {
	const step = 200 * time.Millisecond
	state, err := firewall.OpenState(dir)
	if err != nil {
		return hostError(err, "deadlight status")
	}
	line := newProgress(e)
	for {
		now, err := state.PendingIndex()
		if errors.Is(err, firewall.ErrNoState) || err == nil && now.Table != trial.Table {
			line.done()
			return outcome(e, state, trial)
		}
		if err != nil {
			line.done()
			return hostError(err, "deadlight status")
		}
		left := time.Until(trial.Deadline)
		if left <= -step { // the cleaner had its time
			if _, err := endTrial(dir, trial.Table); err != nil && !errors.Is(err, firewall.ErrLocked) {
				line.done()
				return hostError(err, "deadlight rollback")
			}
		}
		line.say(fmt.Sprintf("%d s left to confirm", int(max(left+time.Second-1, 0).Seconds())))
		select {
		case <-ctx.Done():
			line.done()
			printf(e.stderr, "deadlight: the trial goes on until %s: deadlight confirm keeps the policy, deadlight rollback ends it\n", clock(trial.Deadline))
			return ctx.Err()
		case <-time.After(step):
		}
	}
}

// outcome says how a trial ended.
func outcome(e env, state *firewall.State, trial *firewall.Record) error {
	good, err := state.Good()
	switch {
	case errors.Is(err, firewall.ErrNoState):
		return rolledBack(trial, "")
	case err != nil:
		return hostError(err, "deadlight status")
	case good.Applied.Equal(trial.Applied) && sameSources(good.Sources, trial.Sources):
		printf(e.stdout, "Confirmed\n")
		return nil
	}
	return rolledBack(trial, good.Policy)
}

func rolledBack(trial *firewall.Record, before string) error {
	return &exitError{exitRolledBack, fmt.Errorf("%s was rolled back: the kernel went back to %s", trial.Policy, policyBefore(before, trial.Policy)), ""}
}
