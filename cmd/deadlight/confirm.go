package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
)

func newConfirmCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:     "confirm",
		GroupID: groupApply,
		Short:   "Keep the policy that apply --confirm has put on trial",
		Long: `Makes the policy on trial the applied one: the kernel does not go back any more,
and the table is written clean, in one transaction.

It is refused when the trial is over, or within its last second. Where the policy
on trial says established = "keep", connections live on whether it admits them or
not; then it is also refused over the SSH connection that the trial was begun
from: open another one, which shows that you can.

Exit codes: 0 kept, 3 refused or nothing to confirm.`,
		Example: "  sudo deadlight apply --confirm 60s\n  sudo deadlight confirm",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.RunE = func(*cobra.Command, []string) error {
		r, err := confirmHere(e, *dir, false)
		if err != nil {
			return hostError(err, "deadlight confirm")
		}
		printf(e.stdout, "Confirmed: %s is applied, generation %d\n", oneLine(r.Policy), r.Generation)
		return nil
	}
	return c
}

// confirmHere keeps what is on trial in the network namespace of the calling thread;
// proven says that a verification passed, which shows more than a session does.
func confirmHere(e env, dir string, proven bool) (_ *firewall.Record, err error) {
	h, err := openHost(dir, true)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	last, err := h.state.Settle(h.look, h.here)
	switch {
	case errors.Is(err, firewall.ErrNoState):
		return nil, refused(errors.New("nothing to confirm: nothing is applied here"), "deadlight apply --confirm 60s")
	case err != nil:
		return nil, err
	case !last.OnTrial():
		if b := last.Back; b != nil && !b.Asked {
			return nil, tooLate(b, last.Policy)
		}
		return nil, refused(errors.New("nothing to confirm: no policy is on trial"), "deadlight apply --confirm 60s")
	}
	is, err := h.look()
	if err != nil {
		return nil, err
	}
	switch until, _ := is.Trial(); {
	case until.IsZero():
		b := &firewall.Back{Policy: last.Policy, At: last.Deadline}
		good, _, err := h.goBack(last, b)
		before := ""
		if good != nil {
			before = good.Policy
		}
		return nil, errors.Join(tooLate(b, before), err)
	case time.Until(until) < lastMoment:
		return nil, refused(errors.New("too late: the trial ends within a second"), "deadlight apply --confirm 60s "+last.Policy)
	}
	rs, err := h.state.Compile(last)
	if err != nil {
		return nil, err
	}
	if !proven && rs.Policy.Default.KeepFlows && sameSession(sshSession(), last.Session) {
		return nil, refused(errors.New(`this SSH connection began before the trial, and established = "keep" lets it live: it does not show that you can get in`),
			"open another SSH connection and confirm there")
	}
	h.conn.Known, h.conn.Hush = h.state.Known(last), h.hush(e)
	r := *last
	r.Deadline, r.Session = time.Time{}, ""
	if r.Snapshot, err = firewall.Meant(rs, time.Now()); err != nil {
		return nil, err
	}
	if err := h.state.Stage(&r); err != nil {
		return nil, err
	}
	res, err := h.conn.Apply(rs)
	if err != nil {
		_, settled := h.state.Settle(h.look, h.here)
		return nil, errors.Join(err, settled)
	}
	r.Generation = res.Generation.ID
	return &r, h.state.Commit(r.Generation)
}

func tooLate(b *firewall.Back, before string) error {
	return refused(fmt.Errorf("too late: the trial of %s ended at %s, and the kernel went back by itself to %s", b.Policy, clock(b.At), policyBefore(before, b.Policy)),
		"deadlight apply --confirm 60s "+b.Policy)
}

// sshSession names the far ends of the sessions that this command was typed over;
// "" when there is none: a console, a service.
func sshSession() string {
	var ends []string
	if list, err := operator(); err == nil {
		for _, s := range list {
			ends = append(ends, s.Remote.String())
		}
	}
	if remote, _, ok := parseConnection(os.Getenv("SSH_CONNECTION")); ok && ends == nil {
		ends = append(ends, remote.String())
	}
	return strings.Join(ends, " ")
}

// sameSession reports whether two have a far end in common.
func sameSession(a, b string) bool {
	return slices.ContainsFunc(strings.Fields(a), func(end string) bool { return slices.Contains(strings.Fields(b), end) })
}
