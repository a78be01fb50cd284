package main

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"

	"deadlight/verify"
)

func newTryCommand(e env) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "try POLICY [-- COMMAND [ARG...]]",
		GroupID: groupTry,
		Short:   "Load a policy into a throw-away host and prove it from outside",
		Long: `Builds a host and an outside in network namespaces that end with this command,
loads the policy there, starts listeners behind open and closed ports alike,
runs COMMAND on that host if one is given, probes all TCP and UDP ports over
IPv4 and IPv6 from outside, and reports what it saw. Restricted openings are
looked at from inside, from the edges of and from beside what they admit.

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
			return try(c.Context(), e, args[0], args[1:], asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func try(ctx context.Context, e env, file string, command []string, asJSON bool) error {
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
	line := newProgress(e.stderr)
	report, err := verify.Rehearse(ctx, verify.RehearseConfig{
		Name: file, Rules: rs, Command: command, Stdout: e.stderr, Stderr: e.stderr,
		Load: func() error {
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
	if !asJSON {
		printf(e.stdout, "%s: %s, loaded into a throw-away host and read back identical\n", printable(file), plural(len(rs.Policy.Open), "opening"))
		l := report.Listeners
		printf(e.stdout, "Listeners there: TCP behind %d listed and %d unlisted ports, UDP behind %d and %d\n",
			l.ListedTCP, l.UnlistedTCP, l.ListedUDP, l.UnlistedUDP)
	}
	return printReport(e, report, asJSON)
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

// printReport prints a report and gives the exit code of its verdict.
func printReport(e env, r *verify.Report, asJSON bool) error {
	var err error
	if asJSON {
		err = writeJSON(e.stdout, r)
	} else {
		err = r.WriteText(e.stdout)
	}
	if err != nil {
		return err
	}
	return verdictCode(r)
}

// verdictCode is the exit code of a verdict.
func verdictCode(r *verify.Report) error {
	switch r.Verdict {
	case verify.Fail:
		return silently(exitFindings)
	case verify.Inconclusive:
		return silently(exitRefused)
	}
	return nil
}
