package main

import (
	"errors"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
)

func newRollbackCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:     "rollback",
		GroupID: groupApply,
		Short:   "Go back to the last confirmed policy at once",
		Long: `Ends a trial begun by apply --confirm: the kernel holds again what was applied
before it, rules, sets and maps, in one transaction. Where there was no table
before, there is none again.

When no policy is on trial the kernel is made to hold what was last applied, which
undoes changes made by hand.

Neither the policy nor its lists need to be on disk: what was applied is kept. A
full disk does not hinder it.`,
		Example: "  sudo deadlight rollback",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.RunE = func(*cobra.Command, []string) error {
		if err := rollbackHere(e, *dir); err != nil {
			return hostError(err, "deadlight rollback")
		}
		return nil
	}
	return c
}

// rollbackHere takes back what is on trial in the network namespace of the calling
// thread.
func rollbackHere(e env, dir string) (err error) {
	h, err := openHost(dir, true)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	last, err := h.state.Settle(h.look, h.here)
	var trial *firewall.Record
	var why *firewall.Back
	switch {
	case errors.Is(err, firewall.ErrNoState):
		return refused(errors.New("nothing to go back to: nothing is recorded as applied here"), "deadlight apply")
	case errors.Is(err, firewall.ErrStateDamaged):
		// Of what is on trial or of an apply that was killed: the good one may be whole.
		printf(e.stderr, "deadlight: warning: %s\n", printable(err.Error()))
	case err != nil:
		return err
	case h.elsewhere(last):
		return refused(errors.New("the state in "+h.state.Dir()+" is of another network namespace: nothing to go back to"), "deadlight apply")
	case last.OnTrial():
		trial, why = last, &firewall.Back{Policy: last.Policy, At: time.Now().UTC().Truncate(time.Second), Asked: true}
		is, err := h.look()
		if err != nil {
			return err
		}
		if until, _ := is.Trial(); until.IsZero() { // it came back before we did
			why.At, why.Asked = last.Deadline, false
		}
	}
	good, res, err := h.goBack(trial, why)
	if err != nil {
		return err
	}
	what := "No policy is on trial"
	switch {
	case why != nil && why.Asked:
		what = "Rolled back " + oneLine(trial.Policy)
	case why != nil:
		what = "The trial of " + oneLine(trial.Policy) + " ended at " + clock(why.At)
	}
	switch {
	case good == nil:
		printf(e.stdout, "%s: there is no table any more, as before it\n", what)
		printf(e.stderr, "deadlight: warning: nothing of deadlight filters: every port with a listener is reachable unless another table drops it\n")
	case why == nil && len(res.Changed) == 0:
		printf(e.stdout, "%s, and the kernel holds %s as it was applied: nothing to do\n", what, oneLine(good.Policy))
	case why == nil:
		printf(e.stdout, "%s: put back %s as it was applied, %s undone, generation %d\n", what, oneLine(good.Policy), plural(len(res.Changed), "difference"), res.Generation.ID)
	default:
		printf(e.stdout, "%s: the kernel went back to %s, generation %d\n", what, oneLine(policyBefore(good.Policy, trial.Policy)), res.Generation.ID)
	}
	return nil
}
