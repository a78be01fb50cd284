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
	vantage  string
	proof    string
	textfile string
	state    string // directory
	ports    string
	canaries []uint
	in       string
	maxRate  int
	json     bool
}

func newVerifyCommand(e env) *cobra.Command {
	var f verifyFlags
	c := &cobra.Command{
		Use:     "verify [POLICY]",
		GroupID: groupWatch,
		Short:   "Probe this host, or another, from outside and hold it against its policy",
		Long: `Sends a packet to every port of a host and reports which are open, closed,
rejected or filtered, and whether that is what the policy says.

Without --target it is this host. The probes come from a throw-away network
namespace, and enter by the real interfaces, so that rules for interfaces are
judged too: every port by the interface of the default route (or --in), by the
others those of rules that name interfaces. Restricted openings are looked at from
inside, from the edges of and from beside what they admit. Nothing of it goes out
on a wire. A tripwire, a table of its own that drops nothing, notes what passed:
that proves each port of TCP and UDP. --proof packets does without it. Afterwards
the host is as it was, also when this command is killed; counters, meters of
limits, and flows to open ports show that it ran. It needs root.

With --target this machine is the outside of another host. Silence there counts as
filtered only while the path is proven alive by ports that must answer: a listed
TCP port, echo, or --canary. Over UDP silence cannot tell a filter from a service
that does not answer; the report says so. Probe only hosts that are yours.

The verdict about this host is kept: deadlight status shows it. --textfile FILE
writes it for the textfile collector of node_exporter.

Exit codes: 0 the host is as the policy says, 1 it is not, 3 could not tell.`,
		Example: `  sudo deadlight verify
  sudo deadlight verify policy.toml --in wan0 --ports tcp
  sudo deadlight verify --textfile /var/lib/prometheus/node-exporter/deadlight_verify.prom
  sudo deadlight verify policy.toml --target 192.0.2.10 --target 2001:db8::10`,
		Args: atMostPolicy,
		RunE: func(c *cobra.Command, args []string) error {
			if len(f.targets) > 0 {
				return verifyTargets(c.Context(), e, policyArg(args), f)
			}
			return verifyHere(c.Context(), e, policyArg(args), f)
		},
	}
	c.Flags().StringArrayVar(&f.targets, "target", nil, "address of another host, repeatable (one per family)")
	c.Flags().StringVar(&f.vantage, "vantage", "", "from where this host is looked at: netns (default [verify] vantage of the policy)")
	c.Flags().StringVar(&f.proof, "proof", "host", "what proves this host: host (a tripwire on it) or packets (answers alone)")
	c.Flags().StringVar(&f.textfile, "textfile", "", "write the verdict for node_exporter to this `FILE`.prom")
	c.PersistentFlags().StringVar(&f.state, "state-dir", "", "where the verdict is kept (default as in deadlight status)")
	c.Flags().StringVar(&f.ports, "ports", "all", `what to probe: tcp, udp, all, 443/tcp, 1-1024/udp, comma-separated`)
	c.Flags().UintSliceVar(&f.canaries, "canary", nil, "a TCP port that surely answers, repeatable")
	c.Flags().StringVar(&f.in, "in", "", "the interface by which the probes enter; of a --target, if you know it")
	c.Flags().IntVar(&f.maxRate, "max-rate", 0, "packets per second at most (0: as fast as the path bears)")
	c.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	return c
}

func verifyTargets(ctx context.Context, e env, file string, f verifyFlags) error {
	if f.vantage != "" || f.textfile != "" {
		return usageError("", "--vantage and --textfile are of this host, and --target names another")
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
	canaries, err := f.canaryPorts()
	if err != nil {
		return err
	}
	rs, err := readPolicy(e, file, "nothing probed")
	if err != nil {
		return err
	}
	line := newProgress(e.stderr)
	report, err := verify.Look(ctx, verify.LookConfig{
		Rules: rs, Targets: targets, Ports: ports, Canaries: canaries, In: f.in, MaxRate: f.maxRate,
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

// canaryPorts reads --canary.
func (f *verifyFlags) canaryPorts() ([]verify.Canary, error) {
	var canaries []verify.Canary
	for _, p := range f.canaries {
		if p < 1 || p > 65535 {
			return nil, usageError("", "--canary wants a port, 1-65535: %d", p)
		}
		canaries = append(canaries, verify.Canary{Kind: verify.CanaryTCP, Port: uint16(p)})
	}
	return canaries, nil
}
