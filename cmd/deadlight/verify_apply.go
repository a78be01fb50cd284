package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// apply --verify: the policy is on trial while the host is probed, and the verdict
// confirms it or takes it back. What happens to this process does not matter: the
// kernel goes back by itself.

const (
	verifyTrial = 2 * time.Minute // unless --confirm says how long
	// verifyMargin before the end of the trial the probing is given up, so that the
	// way back is ours to tell.
	verifyMargin = 2 * lastMoment
)

// verifyOnTrial probes the host and confirms what is on trial, or rolls it back.
func verifyOnTrial(ctx context.Context, e env, file, dir string, rs *rules.Ruleset, from *sources, r *firewall.Record) error {
	report, err := func() (*verify.Report, error) {
		abs, err := stateDirOf(dir)
		if err != nil {
			return nil, err
		}
		if err := startCleaner(abs, r); err != nil {
			printf(e.stderr, "deadlight: warning: nobody will clear up should this command be killed: %s; the next apply, confirm or rollback does\n", printable(err.Error()))
		}
		within, cancel := context.WithDeadline(ctx, r.Deadline.Add(-verifyMargin))
		defer cancel()
		return appliedReport(within, e, file, dir, rs, from)
	}()
	if err == nil && report.Verdict == verify.Pass {
		kept, err := confirmHere(e, dir, true)
		if err != nil {
			return hostError(err, "deadlight confirm")
		}
		printf(e.stdout, "Confirmed: %s is applied, generation %d\n", oneLine(kept.Policy), kept.Generation)
		return nil
	}
	if back := rollbackHere(e, dir); back != nil {
		return errors.Join(hostError(back, "deadlight rollback"), err)
	}
	var why error
	var x *exitError
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return &exitError{exitRolledBack, fmt.Errorf("%s was rolled back: the time of its trial was too short to verify it", printable(file)), "deadlight apply --verify --confirm 10m"}
	case errors.As(err, &x) && x.err != nil:
		return &exitError{exitRolledBack, fmt.Errorf("%s was rolled back: it could not be verified: %w", printable(file), x.err), x.hint}
	case err != nil:
		return &exitError{exitRolledBack, fmt.Errorf("%s was rolled back: it could not be verified: %w", printable(file), err), ""}
	case report.Verdict == verify.Fail:
		why = fmt.Errorf("%s was rolled back: the host was not as it says", printable(file))
	default:
		why = fmt.Errorf("%s was rolled back: it could not be told whether the host is as it says", printable(file))
	}
	return &exitError{exitRolledBack, why, "deadlight status names what else bears on the host"}
}

// verifyApplied probes the host where nothing is on trial: there is nothing to go
// back to.
func verifyApplied(ctx context.Context, e env, file, dir string, rs *rules.Ruleset, from *sources) error {
	report, err := appliedReport(ctx, e, file, dir, rs, from)
	if err != nil {
		return err
	}
	return codeOf(report.Verdict)
}

// appliedReport probes the host, prints what was seen and keeps the verdict.
func appliedReport(ctx context.Context, e env, file, dir string, rs *rules.Ruleset, from *sources) (*verify.Report, error) {
	all, err := verify.ParsePorts("all")
	if err != nil {
		return nil, err
	}
	if v := rs.Policy.Verify.Vantage; isAfar(v) {
		f := verifyFlags{lookFlags: lookFlags{Ports: "all", Thorough: -1}, report: reportFlags{format: "text"}, state: dir}
		report, output, err := lookFromAfar(ctx, e, v, file, from, f)
		if err != nil {
			return nil, err
		}
		noteVerdict(e, dir, newVerified(report, file, "all", from))
		_, err = e.stdout.Write(output)
		return report, err
	}
	// Not the slow probes: the policy may be on trial.
	report, err := verifyHost(ctx, e, withThose(e, dir, rs), hostCheck{ports: all, thorough: min(thoroughOf(rs, -1), 1)})
	if err != nil {
		return nil, err
	}
	noteVerdict(e, dir, newVerified(report, file, "all", from))
	return report, forPeople(e, report.WriteText)
}

// stateDirOf gives the directory of the state, for another process.
func stateDirOf(dir string) (string, error) {
	if dir == "" {
		var err error
		if dir, err = firewall.StateDir(); err != nil {
			return "", err
		}
	}
	return filepath.Abs(dir)
}
