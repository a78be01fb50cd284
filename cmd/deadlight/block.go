package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newBlockCommand(e env) *cobra.Command {
	var within spanValue
	var comment string
	var f temporaryFlags
	c := &cobra.Command{
		Use:     "block ADDRESS",
		GroupID: groupApply,
		Short:   "Drop all that comes from an address, a network or a range",
		Long: `Drops whatever comes from an address, a network in CIDR notation or a range, echo
included, and ends the flows that it began, unless the policy says established =
"keep". It wins over every opening. Answers to what this host began pass.

With --for the kernel ends it by itself. Without, it lasts until deadlight unblock:
also over deadlight apply, rollback and a reboot. deadlight status shows it, and
deadlight remove forgets it. No file is changed.

Single addresses are looked up at once: 65,536 of them may be blocked. Networks and
ranges are asked for one by one: 256, together with what deadlight open has opened.

What blocks your own session is refused.`,
		Example: "  sudo deadlight block 203.0.113.9 --for 1d\n  sudo deadlight block 2001:db8:bad::/48 --comment ticket-4712",
		Args:    oneAddress("block"),
	}
	f.add(c)
	c.Flags().Var(&within, "for", "how long: 90s, 2h, 1d; at most 365d (default: until deadlight unblock)")
	c.Flags().StringVar(&comment, "comment", "", "why; deadlight status shows it")
	c.RunE = func(_ *cobra.Command, args []string) error {
		ranges, err := rangesOf(args)
		if err != nil {
			return err
		}
		t, err := newTemporary(rules.Temporary{Block: true, From: ranges, Comment: comment}, time.Duration(within))
		if err != nil {
			return err
		}
		return blockHere(e, f, t, time.Duration(within))
	}
	return c
}

// oneAddress refuses anything but one argument.
func oneAddress(command string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError("deadlight "+command+" 203.0.113.9", "name one address, network or range")
		}
		return nil
	}
}

// blockHere blocks addresses in the network namespace of the calling thread.
func blockHere(e env, f temporaryFlags, t firewall.Temporary, within time.Duration) error {
	again := "deadlight block " + t.What()
	if within > 0 {
		again += " --for " + spanText(within)
	}
	var before *firewall.Temporary
	rs, r, err := changeTemporary(e, f, again, func(_ *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error) {
		if within > 0 {
			t.Expires = time.Now().UTC().Add(within).Truncate(time.Millisecond) // reading the state takes time
		}
		list, before = put(list, t)
		return list, nil
	})
	if err != nil {
		return hostError(err, again)
	}
	byItself := ": the kernel ends it by itself"
	if within == 0 {
		byItself = ""
	}
	printf(e.stdout, "Blocked: %s %s%s%s, generation %d\n", oneLine(t.What()), endText(&t.Temporary, within), instead(before), byItself, r.Generation)
	warnKept(e, rs, "flows that run already live on")
	if rs.Policy.Default.Observe {
		printf(e.stderr, "deadlight: warning: enforce = false in the policy: it is counted, but gets through\n")
	}
	return nil
}

func newUnblockCommand(e env) *cobra.Command {
	var f temporaryFlags
	c := &cobra.Command{
		Use:     "unblock ADDRESS",
		GroupID: groupApply,
		Short:   "End what deadlight block has blocked",
		Long: `Ends the block of an address, a network or a range, written as it was blocked.

An address that the policy itself blocks stays blocked: the line to edit is named.

Exit codes: 0 it is not blocked any more, or was not; 1 the block has ended, but
another one holds the address too; 2 only another one does, nothing is changed.`,
		Example: "  sudo deadlight unblock 203.0.113.9",
		Args:    oneAddress("unblock"),
		ValidArgsFunction: temporaryArgs(func(t *rules.Temporary) string {
			if !t.Block {
				return ""
			}
			return t.What()
		}),
	}
	f.add(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		ranges, err := rangesOf(args)
		if err != nil {
			return err
		}
		return unblockHere(e, f, ranges[0])
	}
	return c
}

// unblockHere ends a temporary block in the network namespace of the calling thread.
func unblockHere(e env, f temporaryFlags, a rules.AddrRange) error {
	again := "deadlight unblock " + a.String()
	var others []string
	hint := "edit it there, then: sudo deadlight apply"
	gone := false
	_, r, err := changeTemporary(e, f, again, func(p *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error) {
		list = slices.DeleteFunc(list, func(t firewall.Temporary) bool {
			this := t.Block && len(t.From) == 1 && t.From[0] == a
			gone = gone || this
			return this
		})
		for _, t := range list {
			if t.Block && slices.ContainsFunc(t.From, func(r rules.AddrRange) bool { return overlap(r, a) }) {
				others = append(others, "the temporary block of "+t.What())
				hint = "sudo deadlight unblock " + t.What()
			}
		}
		for _, b := range policyBlocks(p, a) {
			others = append(others, fmt.Sprintf("[block.%s] (%s:%d)", b.Name, b.Pos.File, b.Pos.Line))
		}
		switch {
		case gone:
			return list, nil
		case len(others) > 0:
			return nil, usageError(hint, "%s is not blocked by itself but by %s: nothing is changed", a, strings.Join(others, " and "))
		}
		printf(e.stdout, "Nothing to unblock: no rule blocks %s\n", a)
		return nil, silently(exitOK)
	})
	if err != nil {
		return hostError(err, again)
	}
	printf(e.stdout, "Unblocked: %s, generation %d\n", a, r.Generation)
	if len(others) > 0 {
		return &exitError{exitFindings, fmt.Errorf("%s is still blocked, in part or whole, by %s", a, strings.Join(others, " and ")), hint}
	}
	return nil
}

// overlap reports whether two ranges have an address in common.
func overlap(a, b rules.AddrRange) bool {
	return a.Lo.Is4() == b.Lo.Is4() && a.Lo.Compare(b.Hi) <= 0 && b.Lo.Compare(a.Hi) <= 0
}

// policyBlocks gives the blocks of a policy that name some of a range and have not
// ended.
func policyBlocks(p *rules.Policy, a rules.AddrRange) []*rules.Block {
	var out []*rules.Block
	for i := range p.Block {
		b := &p.Block[i]
		named := slices.ContainsFunc(b.From.Ranges, func(r rules.AddrRange) bool { return overlap(r, a) })
		for _, set := range b.From.Sets {
			named = named || p.Set(set).Ranges.Overlaps(a)
		}
		spared := slices.ContainsFunc(b.Except.Ranges, func(r rules.AddrRange) bool { return r.Contains(a.Lo) && r.Contains(a.Hi) })
		if named && !spared && (b.Expires.IsZero() || time.Now().Before(b.Expires)) {
			out = append(out, b)
		}
	}
	return out
}
