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

	"deadlight/rules"
	"deadlight/verify"
)

type verifyFlags struct {
	lookFlags
	vantage   string
	sshConfig string
	selfTest  bool
	report    reportFlags
}

// lookFlags say what is looked at, from wherever.
type lookFlags struct {
	Targets  []string `json:"targets"`
	Ports    string   `json:"ports"`
	Canaries []uint   `json:"canaries"`
	In       string   `json:"in"`
	MaxRate  int      `json:"max_rate"`
	Thorough int      `json:"thorough"` // -1: as the policy says
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

With --self-test it shows instead, on throw-away hosts and without root, that it
finds out rulesets that are broken, and a path that is dead.

Exit codes: 0 the host is as the policy says, 1 it is not, 3 could not tell.`,
		Example: `  sudo deadlight verify policy.toml --target 192.0.2.10
  sudo deadlight verify policy.toml --target 192.0.2.10 --target 2001:db8::10 --ports tcp
  deadlight verify --self-test
  deadlight verify policy.toml --target 192.0.2.10 --vantage ssh://root@198.51.100.7`,
		Args: atMostPolicy,
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.report.read(); err != nil {
				return err
			}
			if f.selfTest {
				return selfTest(c, e, args, f.report.json)
			}
			if err := checkThorough(c, &f.Thorough); err != nil {
				return err
			}
			return verifyTargets(c.Context(), e, policyArg(args), f)
		},
	}
	c.Flags().StringArrayVar(&f.Targets, "target", nil, "address of the host, repeatable (one per family)")
	c.Flags().StringVar(&f.Ports, "ports", "all", `what to probe: tcp, udp, all, 443/tcp, 1-1024/udp, comma-separated`)
	c.Flags().UintSliceVar(&f.Canaries, "canary", nil, "a TCP port that surely answers, repeatable")
	c.Flags().StringVar(&f.In, "in", "", "the target's interface by which the probes enter, if you know it")
	c.Flags().IntVar(&f.MaxRate, "max-rate", 0, "packets per second at most (0: as fast as the path bears)")
	addThorough(c, &f.Thorough)
	c.Flags().StringVar(&f.vantage, "vantage", "", "look from another machine: ssh://USER@HOST:PORT (this program runs there, and is removed)")
	c.Flags().StringVar(&f.sshConfig, "ssh-config", "", "a configuration file for ssh, as of ssh -F")
	c.Flags().BoolVar(&f.selfTest, "self-test", false, "load broken rulesets into throw-away hosts and see whether they are found out")
	f.report.add(c)
	return c
}

func verifyTargets(ctx context.Context, e env, file string, f verifyFlags) error {
	var far *verify.SSHVantage
	if f.vantage != "" {
		v, err := verify.ParseSSHVantage(f.vantage)
		if err != nil {
			return usageError("--vantage ssh://USER@HOST", "--vantage: %w", err)
		}
		v.Config = f.sshConfig
		far = &v
	}
	if _, err := f.config(nil); err != nil {
		return err
	}
	rs, from, err := readSources(e, file, "nothing probed")
	if err != nil {
		return err
	}
	if far != nil {
		return lookOverSSH(ctx, e, *far, file, from, f)
	}
	look, err := f.config(rs)
	if err != nil {
		return err
	}
	line := newProgress(e.stderr)
	look.Progress = func(sent, total uint64) { line.update("probing "+strings.Join(f.Targets, ", "), sent, total) }
	report, err := lookAt(ctx, look)
	line.done()
	if err != nil {
		return err
	}
	return f.print(e, file, report)
}

// config checks the flags.
func (f *verifyFlags) config(rs *rules.Ruleset) (look verify.LookConfig, err error) {
	if len(f.Targets) == 0 {
		return look, usageError("deadlight verify --target 192.0.2.10, from another machine", "name the host to probe with --target")
	}
	ports, err := verify.ParsePorts(f.Ports)
	if err != nil {
		return look, usageError("--ports takes tcp, udp, all, 443/tcp or 1-1024/udp, comma-separated", "%w", err)
	}
	if f.MaxRate < 0 {
		return look, usageError("", "--max-rate runs from 0 up: %d", f.MaxRate)
	}
	look = verify.LookConfig{Rules: rs, Ports: ports, In: f.In, MaxRate: f.MaxRate}
	if rs != nil {
		look.Thorough = thoroughOf(rs, f.Thorough)
	}
	for _, t := range f.Targets {
		a, err := netip.ParseAddr(t)
		if err != nil || a.Zone() != "" || a.Is4In6() {
			return look, usageError("names are not resolved: the answer would decide what is probed", "--target wants an address: %s", strconv.Quote(t))
		}
		look.Targets = append(look.Targets, a)
	}
	for _, p := range f.Canaries {
		if p < 1 || p > 65535 {
			return look, usageError("", "--canary wants a port, 1-65535: %d", p)
		}
		look.Canaries = append(look.Canaries, verify.Canary{Kind: verify.CanaryTCP, Port: uint16(p)})
	}
	return look, nil
}

// lookAt looks from this machine.
func lookAt(ctx context.Context, look verify.LookConfig) (*verify.Report, error) {
	report, err := verify.Look(ctx, look)
	switch {
	case errors.Is(err, verify.ErrLocalTarget):
		return nil, refused(err, "probe it from another machine: over loopback the policy is not asked")
	case errors.Is(err, fs.ErrPermission):
		return nil, refused(fmt.Errorf("no permission to send raw packets (CAP_NET_RAW): %w", err), "sudo deadlight verify …")
	case err != nil:
		return nil, refused(err, "")
	}
	return report, nil
}

func (f *verifyFlags) print(e env, file string, report *verify.Report) error {
	if f.report.format == "text" {
		printf(e.stdout, "%s against %s, seen from %s:\n", report.Target, printable(file), printable(report.Vantage))
	}
	return f.report.print(e, report)
}
