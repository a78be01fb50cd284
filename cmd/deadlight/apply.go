package main

import (
	"errors"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newApplyCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:     "apply [POLICY]",
		GroupID: groupApply,
		Short:   "Put a policy in force, in one transaction",
		Long: `Replaces the table inet deadlight of this network namespace by what the policy
compiles to, in one transaction and in place: no packet finds the host open in
between. Then the table is read back and compared with what was meant. When
nothing differs nothing is written.

This version does not check whether the policy admits your own connection: look
with deadlight check and try it with deadlight try before you apply it remotely.`,
		Example: "  sudo deadlight apply\n  sudo deadlight apply ./policy.toml",
		Args:    atMostPolicy,
		RunE: func(_ *cobra.Command, args []string) error {
			file := policyArg(args)
			rs, err := readPolicy(e, file, "ruleset as before")
			if err != nil {
				return err
			}
			if failed := failing(rs); len(failed) > 0 {
				for _, f := range failed {
					printf(e.stderr, "%s: %s\n", printable(f.pos.String()), printable(f.text))
				}
				return refused(errors.New("an expectation of the policy does not hold: ruleset as before"), "deadlight check "+file)
			}
			res, err := applyHere(rs)
			if err != nil {
				return kernelError(err, "deadlight apply "+file)
			}
			if len(res.Changed) == 0 {
				printf(e.stdout, "No changes: the kernel holds what %s says, generation %d\n", printable(file), res.Generation.ID)
				return nil
			}
			printf(e.stdout, "Applied generation %d: %s in one transaction, read back identical\n", res.Generation.ID, plural(len(res.Changed), "difference"))
			return nil
		},
	}
	return c
}

// applyHere loads a ruleset into the network namespace of the calling thread.
func applyHere(rs *rules.Ruleset) (res firewall.Result, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return conn.Apply(rs)
}

func newRemoveCommand(e env) *cobra.Command {
	return &cobra.Command{
		Use:     "remove",
		GroupID: groupApply,
		Short:   "Take Deadlight's table away: the host is open then",
		Long: `Deletes the table inet deadlight of this network namespace. From then on every
port that a program listens on is reachable, unless another table drops it.`,
		Example: "  sudo deadlight remove",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			found, err := removeHere()
			if err != nil {
				return kernelError(err, "deadlight remove")
			}
			if !found {
				printf(e.stdout, "Nothing to remove: there is no table inet %s\n", rules.TableName)
				return nil
			}
			printf(e.stdout, "Removed table inet %s\n", rules.TableName)
			printf(e.stderr, "deadlight: warning: nothing of deadlight filters any more: every port with a listener is reachable unless another table drops it\n")
			return nil
		},
	}
}

func removeHere() (found bool, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return conn.Remove(rules.TableName)
}
