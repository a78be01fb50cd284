package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newApplyCommand(e env) *cobra.Command {
	var dry, atBoot bool
	var f applyFlags
	c := &cobra.Command{
		Use:     "apply [POLICY]",
		GroupID: groupApply,
		Short:   "Put a policy in force, in one transaction",
		Long: `Makes the table inet deadlight of this network namespace hold what the policy
compiles to. Only what differs is written, and what packets meet changes in one
transaction and in place: no packet finds the host open in between. Sets that
change are loaded before it, and the old ones removed after it. Then the table is
read back and compared with what was meant.

What was applied is kept, with the text of the policy and its lists: deadlight
drift holds the kernel against it. An apply that was killed is either undone or
finished by the next one.

With --confirm D it is on trial for that time: until then the new policy judges,
and unless deadlight confirm comes first the kernel itself goes back to the old
one: rules, sets and maps, with no process alive, also when this host hangs up or
systemd is dead. On a terminal the time is counted down; Ctrl-C leaves the trial
running. After a reboot only what was confirmed is loaded. No other policy is
applied meanwhile; deadlight rollback ends a trial at once.

With --verify it is on trial while this host is probed from outside, as deadlight
verify does: what passes is confirmed at once, anything else is rolled back (exit
4). --confirm D gives it that time instead of two minutes. Should this command be
killed meanwhile, the kernel goes back by itself.

A policy that would not let your own SSH or mosh session in again is refused, with
the lines to add. The session is found through its socket, also under sudo, su,
tmux and screen; what a service or a timer runs has none.

As root, a policy is refused that others could write: its files, the directories
they stand in and those above, where these are not sticky. Of what the shell hands
over (/dev/stdin, /dev/fd/3) a pipe is taken as it is, and a file must be safe
itself.

With --boot, which is for deadlight.service, a policy that cannot be used is
replaced by what was last applied, else by a lock-down: replies, neighbour
discovery, ICMP errors, the DHCP client, and what [failsafe] of the policy, of what
was last applied or of failsafe.toml beside the policy admits. Exit 1 then, with
the reason in one line.`,
		Example: "  sudo deadlight apply\n  sudo deadlight apply ./policy.toml\n  sudo deadlight apply --confirm 60s\n  sudo deadlight apply --verify\n  sudo deadlight apply --dry-run",
		Args:    atMostPolicy,
	}
	dir := stateFlag(c)
	c.Flags().BoolVar(&dry, "dry-run", false, "change nothing: the same as deadlight plan")
	c.Flags().DurationVar(&f.within, "confirm", 0, "go back after this time, unless deadlight confirm is run: 60s, 5m")
	c.Flags().BoolVar(&f.noWait, "no-wait", false, "with --confirm: do not count down on a terminal")
	c.Flags().BoolVar(&f.verify, "verify", false, "probe this host from outside, and go back unless it is as the policy says")
	c.Flags().BoolVar(&f.acceptLockout, "accept-lockout", false, "apply also what does not admit your own session")
	c.Flags().BoolVar(&f.insecure, "insecure-policy", false, "apply also what others than root can write")
	c.Flags().BoolVar(&atBoot, "boot", false, "for the boot unit: load what can be had of the policy, the last known\ngood and a lock-down; exit 1 when it is not the policy")
	c.MarkFlagsMutuallyExclusive("boot", "dry-run")
	c.MarkFlagsMutuallyExclusive("boot", "confirm")
	c.MarkFlagsMutuallyExclusive("boot", "verify")
	c.RunE = func(c *cobra.Command, args []string) error {
		if atBoot {
			return boot(e, policyArg(args), *dir)
		}
		if c.Flags().Changed("confirm") && (f.within < shortestTrial || f.within > longestTrial) {
			return usageError("deadlight apply --confirm 60s", "--confirm takes from 2s to 24h: %s", f.within)
		}
		if f.verify && f.within == 0 {
			f.within = verifyTrial
		}
		if dry {
			return plan(e, policyArg(args), planFlags{state: *dir})
		}
		return apply(c.Context(), e, policyArg(args), *dir, f)
	}
	return c
}

type applyFlags struct {
	within                  time.Duration // on trial for so long; 0: not
	noWait, verify          bool
	acceptLockout, insecure bool
}

func apply(ctx context.Context, e env, file, dir string, f applyFlags) error {
	rs, from, err := readTrusted(e, file, "ruleset as before", f.insecure)
	if err != nil {
		return err
	}
	if f.verify && rs.Policy.Default.Observe {
		return usageError("deadlight apply "+file+", then watch deadlight status", "--verify proves nothing of a policy with enforce = false: it drops nothing")
	}
	if failed := failing(rs); len(failed) > 0 {
		for _, f := range failed {
			printf(e.stderr, "%s: %s\n", printable(f.pos.String()), printable(f.text))
		}
		return refused(errors.New("an expectation of the policy does not hold: ruleset as before"), "deadlight check "+file)
	}
	if !f.acceptLockout {
		// What is temporary may let the caller in; where it cannot be read, the apply
		// itself will say why.
		list, _ := temporaryOf(dir)
		judged, _ := withTemporary(rs, firewall.Running(list, time.Now()))
		if err := refuseLockout(e, "deadlight apply "+file, judged); err != nil {
			return err
		}
	}
	res, r, err := applyAndRecord(e, file, dir, rs, from, f.within)
	if err != nil {
		return hostError(err, "deadlight apply "+file)
	}
	if f.verify {
		rs, _ = withTemporary(rs, r.Temporary)
	}
	for _, w := range res.Warnings {
		printf(e.stderr, "deadlight: warning: %s\n", oneLine(w))
	}
	if len(res.Changed) == 0 {
		printf(e.stdout, "No changes: the kernel holds what %s says, generation %d\n", printable(file), res.Generation.ID)
		if f.verify {
			return verifyApplied(ctx, e, file, dir, rs, from)
		}
		return nil
	}
	if r.OnTrial() {
		printf(e.stdout, "Applied generation %d on trial: in one transaction, read back identical\n", res.Generation.ID)
		if f.verify {
			return verifyOnTrial(ctx, e, file, dir, rs, from, r)
		}
		return announce(ctx, e, dir, rs, r, f)
	}
	printf(e.stdout, "Applied generation %d: %s in one transaction, read back identical\n", res.Generation.ID, plural(len(res.Changed), "difference"))
	if f.within > 0 {
		printf(e.stdout, "Nothing to confirm: it judges like the policy that was applied before\n")
	}
	if f.verify {
		return verifyApplied(ctx, e, file, dir, rs, from)
	}
	return nil
}

// applyAndRecord loads a ruleset into the network namespace of the calling thread and
// keeps the record of it, on trial if within is not 0: what is meant is on disk
// before the kernel is asked.
func applyAndRecord(e env, file, dir string, rs *rules.Ruleset, from *sources, within time.Duration) (res firewall.Result, r *firewall.Record, err error) {
	h, err := openHost(dir, true)
	if err != nil {
		return res, nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	h.conn.Hush = h.hush(e)
	last, err := h.settle()
	switch {
	case errors.Is(err, firewall.ErrStateDamaged):
		printf(e.stderr, "deadlight: warning: %s: it is written anew\n", printable(err.Error()))
		last = nil
	case errors.Is(err, firewall.ErrNoState):
	case err != nil:
		return res, r, err
	case h.elsewhere(last):
		printf(e.stderr, "deadlight: warning: the state in %s is of another network namespace: it is written anew\n", printable(h.state.Dir()))
	}
	if last != nil {
		h.conn.Known = h.state.Known(last)
	}
	policy, kept := rs, h.temporary(last)
	rs, kept = withTemporary(policy, kept)
	if r, err = h.newRecord(file, rs, from); err != nil {
		return res, r, err
	}
	if err := h.warnGuests(e.stderr, last, rs); err != nil {
		return res, r, err
	}
	r.Temporary = kept
	// What has ended is cleared away with the next change, not for its own sake:
	// where plan says that nothing changes, nothing does.
	if left := firewall.Running(kept, time.Now()); len(left) < len(kept) && !samePolicy(last, r) {
		rs, left = withTemporary(policy, left)
		if r, err = h.newRecord(file, rs, from); err != nil {
			return res, r, err
		}
		r.Temporary = left
	}
	load := rs
	if within > 0 {
		if load, err = h.putOnTrial(r, rs, within); err != nil {
			return res, r, err
		}
	}
	now, err := h.conn.Generation()
	if err != nil {
		return res, r, err
	}
	if last != nil && last.Generation == now.ID && sameRecord(last, r) {
		if res, err = h.conn.Apply(load); err != nil || len(res.Changed) == 0 {
			return res, r, err
		}
	}
	if err := h.state.Stage(r); err != nil {
		return res, r, err
	}
	again, err := h.conn.Apply(load)
	if err != nil {
		// It may have been loaded all the same.
		_, settled := h.state.Settle(h.look, h.here)
		if errors.Is(settled, firewall.ErrNoState) {
			settled = nil
		}
		return res, r, errors.Join(err, settled)
	}
	if len(res.Changed) == 0 {
		res.Changed = again.Changed
	}
	res.Generation = again.Generation
	if err := h.state.Commit(res.Generation.ID); err != nil {
		printf(e.stderr, "deadlight: warning: the policy is in force, but not yet recorded as applied: the next apply will do that\n")
		return res, r, err
	}
	return res, r, nil
}

// applyHere loads a ruleset into the network namespace of the calling thread and
// keeps no record of it.
func applyHere(rs *rules.Ruleset) (res firewall.Result, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return conn.Apply(rs)
}

func newRemoveCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:     "remove",
		GroupID: groupApply,
		Short:   "Take Deadlight's table away: the host is open then",
		Long: `Deletes the table inet deadlight of this network namespace, and forgets what was
applied. From then on every port that a program listens on is reachable, unless
another table drops it.`,
		Example: "  sudo deadlight remove",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.RunE = func(*cobra.Command, []string) error {
		found, forgot, err := removeHere(*dir)
		if err != nil {
			return hostError(err, "deadlight remove")
		}
		switch {
		case !found && !forgot:
			printf(e.stdout, "Nothing to remove: there is no table inet %s\n", rules.TableName)
			return nil
		case !found:
			printf(e.stdout, "There was no table inet %s; nothing is recorded as applied any more\n", rules.TableName)
			return nil
		case forgot:
			printf(e.stdout, "Removed table inet %s; nothing is recorded as applied any more\n", rules.TableName)
		default:
			printf(e.stdout, "Removed table inet %s\n", rules.TableName)
		}
		printf(e.stderr, "deadlight: warning: nothing of deadlight filters any more: every port with a listener is reachable unless another table drops it\n")
		return nil
	}
	return c
}

// removeHere says whether there was a table, and whether there was a record.
func removeHere(dir string) (found, forgot bool, err error) {
	h, err := openHost(dir, true)
	if err != nil {
		return false, false, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	_, good := h.state.Good()
	_, next := h.state.Next()
	if found, err = h.conn.Remove(rules.TableName); err != nil {
		return false, false, err
	}
	forgot = !errors.Is(good, firewall.ErrNoState) || !errors.Is(next, firewall.ErrNoState)
	return found, forgot, h.state.Clear()
}
