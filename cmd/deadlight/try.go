package main

import (
	"context"
	"errors"
	"io"
	"os"

	"github.com/spf13/cobra"

	"deadlight/rules"
	"deadlight/verify"
)

func newTryCommand(e env) *cobra.Command {
	var f reportFlags
	var thorough int
	c := &cobra.Command{
		Use:     "try POLICY [-- COMMAND [ARG...]]",
		GroupID: groupTry,
		Short:   "Load a policy into a throw-away host and prove it from outside",
		Long: `Builds a host and an outside in network namespaces that end with this command,
loads the policy there, starts listeners behind open and closed ports alike,
runs COMMAND on that host if one is given, probes all TCP and UDP ports over
IPv4 and IPv6 from outside, and reports what it saw. Restricted openings are
looked at from inside, from the edges of and from beside what they admit. Then come
adversarial probes: other flags, source ports, fragments, IP options, extension
headers, protocols and ICMP queries, to every address of that host, and plain ones
while the ruleset is loaded again; --thorough says how many.

Needs no root, and touches nothing of this machine. Where an ordinary user may
not make user namespaces, run it with sudo.

Exit codes: 0 the host is as the policy says, 1 it is not, 3 could not tell.`,
		Example: `  deadlight try configs/webserver.toml
  deadlight try policy.toml -- nft insert rule inet deadlight gate accept`,
		Args: func(c *cobra.Command, args []string) error {
			n := c.ArgsLenAtDash()
			if n < 0 {
				n = len(args)
			}
			switch {
			case n == 0:
				return usageError("deadlight try POLICY", "name the policy to try")
			case n > 1:
				return usageError("put -- before a command that shall run on the throw-away host", "one policy at a time")
			case c.ArgsLenAtDash() == 1 && len(args) == 1:
				return usageError("deadlight try POLICY -- COMMAND", "no command after --")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.read(); err != nil {
				return err
			}
			if err := checkThorough(c, &thorough); err != nil {
				return err
			}
			return try(c.Context(), e, args[0], args[1:], thorough, &f)
		},
	}
	f.add(c)
	addThorough(c, &thorough)
	return c
}

const thoroughFlag = "thorough"

// addThorough adds the flag of the adversarial probes; without it the policy says.
func addThorough(c *cobra.Command, n *int) {
	c.Flags().IntVar(n, thoroughFlag, 1, "adversarial probes: 0 none, 1 all that are quick, 2 more, the slow ones too; else as [verify] says")
}

// checkThorough refuses what no level is; a flag that was not given becomes -1.
func checkThorough(c *cobra.Command, n *int) error {
	switch {
	case !c.Flags().Changed(thoroughFlag):
		*n = -1
	case *n < 0 || *n > 2:
		return usageError("", "--thorough runs from 0 to 2: %d", *n)
	}
	return nil
}

// thoroughOf is the level that the flag, or else the policy, asks for.
func thoroughOf(rs *rules.Ruleset, flag int) int {
	if flag < 0 {
		return rs.Policy.Verify.Thorough
	}
	return flag
}

// reloadOf is another ruleset of the same policy: nothing is open by name, and
// echo is the other way round.
func reloadOf(rs *rules.Ruleset) *rules.Ruleset {
	p := *rs.Policy
	p.Open = nil
	p.ICMP.Echo = !p.ICMP.Echo
	return rules.Compile(&p)
}

func try(ctx context.Context, e env, file string, command []string, thorough int, f *reportFlags) error {
	if !verify.Isolated() {
		return tryIsolated(ctx, e, file)
	}
	if err := verify.EnterIsolated(); err != nil {
		return namespaceError(err)
	}
	rs, err := readPolicy(e, file, "nothing tried")
	if err != nil {
		return err
	}
	line := newProgress(e)
	report, err := verify.Rehearse(ctx, verify.RehearseConfig{
		Name: file, Rules: rs, Command: command, Stdout: e.stderr, Stderr: e.stderr,
		Load: func() error {
			_, err := applyHere(rs)
			return err
		},
		Thorough: thoroughOf(rs, thorough),
		Reload: func() error {
			if _, err := applyHere(reloadOf(rs)); err != nil {
				return err
			}
			_, err := applyHere(rs)
			return err
		},
		Progress: func(sent, total uint64) { line.update("probing the throw-away host", sent, total) },
	})
	line.done()
	var failed *verify.CommandError
	switch {
	case errors.As(err, &failed):
		return refused(err, "the policy was not tried: the command must succeed on the throw-away host")
	case err != nil:
		return kernelError(err, "deadlight try "+file)
	}
	if f.format == "text" {
		err = forPeople(e, func(w io.Writer) error {
			printf(w, "%s: %s, loaded into a throw-away host and read back identical\n", printable(file), plural(len(rs.Policy.Open), "opening"))
			l := report.Listeners
			printf(w, "Listeners there: TCP behind %d listed and %d unlisted ports, UDP behind %d and %d\n",
				l.ListedTCP, l.UnlistedTCP, l.ListedUDP, l.UnlistedUDP)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return f.print(e, report)
}

// tryIsolated starts this command line again in namespaces of its own. A policy
// that is no good is told here: its problems need no namespace.
func tryIsolated(ctx context.Context, e env, file string) error {
	rs, problems, err := parsePolicy(file)
	if err != nil {
		return err
	}
	if rs == nil {
		return unusable(e, problems, "nothing tried")
	}
	code, err := verify.Isolate(ctx, os.Args[1:], e.stdin, e.stdout, e.stderr)
	if err != nil {
		return namespaceError(err)
	}
	if code != exitOK {
		return silently(code)
	}
	return nil
}

func namespaceError(err error) error {
	var ns *verify.NamespaceError
	if errors.As(err, &ns) {
		return refused(err, ns.Hint())
	}
	return refused(err, "")
}
