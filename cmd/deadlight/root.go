package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

const defaultPolicy = "/etc/deadlight/policy.toml"

// Groups of the help, in the order in which an admin meets them.
const (
	groupWrite = "write"
	groupTry   = "try"
	groupApply = "apply"
	groupWatch = "watch"
)

func newRootCommand(e env) *cobra.Command {
	root := &cobra.Command{
		Use:   "deadlight",
		Short: "Keep every port of this host silent but those a policy opens, and prove it from outside",
		Long: `Deadlight keeps every port of a Linux host silent but those its policy opens,
and proves it from outside.

Exit codes: 0 as the policy says, 1 findings, 2 usage or policy error (nothing
touched), 3 refused or could not tell (ruleset as before), 4 applied, then rolled
back, 130 interrupted.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError("deadlight --help lists the commands", "unknown command %q", args[0])
			}
			return nil
		},
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetIn(e.stdin)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	root.CompletionOptions.DisableNoDescFlag = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError(c.CommandPath()+" --help lists the flags", "%w", err)
	})
	root.SetHelpFunc(func(c *cobra.Command, _ []string) {
		printf(e.stdout, "%s", help(c, width(e.stdout)))
	})
	root.AddGroup(
		&cobra.Group{ID: groupWrite, Title: "Write a policy"},
		&cobra.Group{ID: groupTry, Title: "Try it without risk"},
		&cobra.Group{ID: groupApply, Title: "Put it in force (root)"},
		&cobra.Group{ID: groupWatch, Title: "Watch and prove"},
	)
	root.AddCommand(
		newInitCommand(e), newImportCommand(e), newCheckCommand(e), newExplainCommand(e), newShowCommand(e), newEditCommand(e),
		newTryCommand(e),
		newPlanCommand(e), newApplyCommand(e), newConfirmCommand(e), newRollbackCommand(e), newRemoveCommand(e), newCleanerCommand(e),
		newOpenCommand(e), newCloseCommand(e), newBlockCommand(e), newUnblockCommand(e),
		newStatusCommand(e), newDriftCommand(e), newWatchCommand(e), newAuditCommand(e), newVerifyCommand(e), newFromVantageCommand(e), newFromVantageManyCommand(e),
		newVersionCommand(e),
		newPolicyTopic(),
	)
	addCompletions(root)
	return root
}

// help is the text of --help, fitted to a terminal of so many columns; 0: to none.
func help(c *cobra.Command, width int) string {
	about, usage := c.Long, ""
	if about == "" {
		about = c.Short
	}
	about = strings.TrimSpace(about)
	if c.Runnable() || c.HasSubCommands() {
		usage = "\n\n" + c.UsageString()
	}
	if width > 0 {
		return refill(about, width) + fold(usage, width)
	}
	return about + usage
}

// policyArg takes the optional POLICY.
func policyArg(args []string) string {
	if len(args) == 0 {
		return defaultPolicy
	}
	return args[0]
}

// atMostPolicy refuses more than one argument.
func atMostPolicy(c *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usageError(c.CommandPath()+" --help", "one policy at a time: %s", strings.Join(args[1:], " "))
	}
	return nil
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError(c.CommandPath()+" --help", "%s takes no argument: %s", c.Name(), strings.Join(args, " "))
	}
	return nil
}

// plural writes "1 opening", "3 openings".
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// printf writes to w; a reader who has gone away ends the command elsewhere.
func printf(w io.Writer, format string, args ...any) { fmt.Fprintf(w, format, args...) }
