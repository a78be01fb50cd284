package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"deadlight/verify"
)

type verifyFlags struct {
	targets  []string
	ports    string
	canaries []uint
	in       string
	maxRate  int
	thorough int
	json     bool
}

func newVerifyCommand(e env) *cobra.Command {
	var f verifyFlags
	c := &cobra.Command{
		Use:     "verify [POLICY] --target ADDR",
		GroupID: groupWatch,
		Short:   "Probe a host from this machine and hold it against its policy",
		Long: `Sends a packet to every port of a host and reports which are open, closed,
rejected or filtered, and whether that is what the policy says. This machine is
the outside; the probes need root (CAP_NET_RAW). Probe only hosts that are yours.

Silence counts as filtered only while the path is proven alive by ports that
must answer: a listed TCP port, echo, or --canary. Over UDP silence cannot tell
a filter from a service that does not answer; the report says so. Adversarial
probes (other flags, source ports, fragments, options, protocols) follow the sweep;
--thorough says how many. Probes other than of TCP and UDP need --ports all.

Exit codes: 0 the host is as the policy says, 1 it is not, 3 could not tell.`,
		Example: `  sudo deadlight verify policy.toml --target 192.0.2.10
  sudo deadlight verify policy.toml --target 192.0.2.10 --target 2001:db8::10 --ports tcp`,
		Args: atMostPolicy,
		RunE: func(c *cobra.Command, args []string) error {
			if err := checkThorough(c, &f.thorough); err != nil {
				return err
			}
			return verifyTargets(c.Context(), e, policyArg(args), f)
		},
	}
	c.Flags().StringArrayVar(&f.targets, "target", nil, "address of the host, repeatable (one per family)")
	c.Flags().StringVar(&f.ports, "ports", "all", `what to probe: tcp, udp, all, 443/tcp, 1-1024/udp, comma-separated`)
	c.Flags().UintSliceVar(&f.canaries, "canary", nil, "a TCP port that surely answers, repeatable")
	c.Flags().StringVar(&f.in, "in", "", "the target's interface by which the probes enter, if you know it")
	c.Flags().IntVar(&f.maxRate, "max-rate", 0, "packets per second at most (0: as fast as the path bears)")
	addThorough(c, &f.thorough)
	c.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	return c
}

func verifyTargets(ctx context.Context, e env, file string, f verifyFlags) error {
	if len(f.targets) == 0 {
		return usageError("deadlight verify --target 192.0.2.10, from another machine", "name the host to probe with --target")
	}
	ports, err := verify.ParsePorts(f.ports)
	if err != nil {
		return usageError("--ports takes tcp, udp, all, 443/tcp or 1-1024/udp, comma-separated", "%w", err)
	}
	if f.maxRate < 0 {
		return usageError("", "--max-rate runs from 0 up: %d", f.maxRate)
	}
	var targets []netip.Addr
	for _, t := range f.targets {
		a, err := netip.ParseAddr(t)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return usageError("names are not resolved: the answer would decide what is probed", "--target wants an address: %s", strconv.Quote(t))
		}
		targets = append(targets, a)
	}
	var canaries []verify.Canary
	for _, p := range f.canaries {
		if p < 1 || p > 65535 {
			return usageError("", "--canary wants a port, 1-65535: %d", p)
		}
		canaries = append(canaries, verify.Canary{Kind: verify.CanaryTCP, Port: uint16(p)})
	}
	rs, err := readPolicy(e, file, "nothing probed")
	if err != nil {
		return err
	}
	line := newProgress(e.stderr)
	report, err := verify.Look(ctx, verify.LookConfig{
		Rules: rs, Targets: targets, Ports: ports, Canaries: canaries, In: f.in, MaxRate: f.maxRate,
		Thorough: thoroughOf(rs, f.thorough),
		Progress: func(sent, total uint64) { line.update("probing "+strings.Join(f.targets, ", "), sent, total) },
	})
	line.done()
	switch {
	case errors.Is(err, verify.ErrLocalTarget):
		return refused(err, "probe it from another machine: over loopback the policy is not asked")
	case errors.Is(err, fs.ErrPermission):
		return refused(fmt.Errorf("no permission to send raw packets (CAP_NET_RAW): %w", err), "sudo deadlight verify …")
	case err != nil:
		return refused(err, "")
	}
	if !f.json {
		printf(e.stdout, "%s against %s, seen from %s:\n", report.Target, printable(file), printable(report.Vantage))
	}
	return printReport(e, report, f.json)
}
