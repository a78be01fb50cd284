package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/spf13/cobra"

	"deadlight/rules"
	"deadlight/verify"
)

type verifyFlags struct {
	lookFlags
	hosts       []string // --target
	targetsFile string
	resume      string
	vantage     string
	sshConfig   string
	proof       string
	textfile    string
	state       string // directory
	selfTest    bool
	report      reportFlags
	changed     func(flag string) bool // it was given
}

// lookFlags say what is looked at, from wherever.
type lookFlags struct {
	Targets  []string `json:"targets"` // addresses of one host
	Ports    string   `json:"ports"`
	Canaries []uint   `json:"canaries"`
	In       string   `json:"in"`
	MaxRate  int      `json:"max_rate"`
	Thorough int      `json:"thorough"` // -1: as the policy says
	Connect  bool     `json:"connect"`
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

With --vantage ssh://USER@HOST, or that as vantage in [verify] of the policy, that
machine looks at the address of this host from which sshd there sees it come.

With --target this machine is the outside of another host, or with --vantage
ssh://USER@HOST that machine is. Silence there counts as filtered only while the
path is proven alive by ports that must answer: a listed TCP port, echo, or
--canary. Over UDP silence cannot tell a filter from a service that does not
answer; the report says so. Probe only hosts that are yours.

Several hosts: each --target is a host, and one host's addresses are joined by a
comma, --target 192.0.2.10,2001:db8::10. With --targets FILE each line is a host:

  # ADDR[,ADDR...]          [POLICY]   [NAME]
  192.0.2.10,2001:db8::10   web.toml   web-1
  192.0.2.20                -          db-1

The path of a policy is relative to FILE; - or none stands for the POLICY of the
command line. Hosts are probed in groups, so that memory is bounded. The report
has hosts that fail first, then those of which nothing can be said and why; those
that pass are a number. --json prints an object with all of them, --format junit a
suite a host, prometheus a label, html a table with each host folded behind it.
With --resume FILE each host that is done is written there: after Ctrl-C, a crash
or a reboot the same command goes on where it was. It refuses if the hosts, a
policy or a flag that matters are others than before. When the report is printed,
FILE is removed: the next run looks at every host again.

Behind the sweep follow adversarial probes (other flags, source ports, fragments,
options, protocols); --thorough says how many. Those other than of TCP and UDP need
--ports all.

Each [[expect]] of the policy is sent from the address that it names, where that can
be had: of this host strangers' addresses can, of a --target this machine's own. The
report names those that could not be probed.

The verdict about this host is kept: deadlight status shows it. --textfile FILE
writes it for the textfile collector of node_exporter.

With --self-test it shows instead, on throw-away hosts and without root, that it
finds out rulesets that are broken, and a path that is dead.

Exit codes: 0 the host is as the policy says, 1 it is not, 3 could not tell. Of
several hosts: 1 any is not, else 3 of any it could not be told, else 0.`,
		Example: `  sudo deadlight verify
  sudo deadlight verify policy.toml --in wan0 --ports tcp
  sudo deadlight verify --textfile /var/lib/prometheus/node-exporter/deadlight_verify.prom
  sudo deadlight verify policy.toml --target 192.0.2.10,2001:db8::10
  sudo deadlight verify --targets hosts.txt --resume hosts.journal
  deadlight verify policy.toml --target 192.0.2.10 --vantage ssh://root@198.51.100.7
  deadlight verify --self-test`,
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
			f.changed = c.Flags().Changed
			if err := f.severally(); err != nil {
				return err
			}
			if f.elsewhere() {
				if err := f.ofTheOther(true); err != nil {
					return err
				}
			}
			switch {
			case f.several():
				return verifyMany(c.Context(), e, policyArg(args), f)
			case f.elsewhere():
				f.Targets = strings.Split(f.hosts[0], ",")
				return verifyTarget(c.Context(), e, policyArg(args), f)
			}
			return verifyHere(c.Context(), e, policyArg(args), f)
		},
	}
	c.Flags().StringArrayVar(&f.hosts, "target", nil, "another host, by its `ADDR[,ADDR...]`; repeatable for several hosts with the same policy")
	c.Flags().StringVar(&f.targetsFile, "targets", "", "a `FILE` of hosts: ADDR[,ADDR...] [POLICY] [NAME], a line a host")
	c.Flags().StringVar(&f.resume, "resume", "", "keep what is done of several hosts in this `FILE`, and go on from it")
	c.Flags().StringVar(&f.vantage, "vantage", "", "from where to look: netns, at this host, or ssh://USER@HOST:PORT, at this host or a --target (without --target default [verify] vantage of the policy)")
	c.Flags().StringVar(&f.sshConfig, "ssh-config", "", "a configuration `FILE` for ssh, as of ssh -F")
	c.Flags().StringVar(&f.proof, "proof", "host", "what proves this host: host (a tripwire on it) or packets (answers alone)")
	addThorough(c, &f.Thorough)
	c.Flags().BoolVar(&f.Connect, "connect", false, "probe a --target by connect(2), without root; the report says what that cannot tell")
	c.Flags().StringVar(&f.textfile, "textfile", "", "write the verdict for node_exporter to this `FILE`.prom")
	c.PersistentFlags().StringVar(&f.state, "state-dir", "", "where the verdict is kept (default as in deadlight status)")
	c.Flags().StringVar(&f.Ports, "ports", "all", `what to probe: tcp, udp, all, 443/tcp, 1-1024/udp, comma-separated`)
	c.Flags().UintSliceVar(&f.Canaries, "canary", nil, "a TCP port that surely answers, repeatable")
	c.Flags().StringVar(&f.In, "in", "", "the interface by which the probes enter; of a --target, if you know it")
	c.Flags().IntVar(&f.MaxRate, "max-rate", 0, "packets per second at most (0: as fast as the path bears)")
	c.Flags().BoolVar(&f.selfTest, "self-test", false, "load broken rulesets into throw-away hosts and see whether they are found out")
	f.report.add(c)
	return c
}

// elsewhere says that other hosts are probed, and several that it may be more than one.
func (f *verifyFlags) elsewhere() bool { return f.several() || len(f.hosts) > 0 }

func (f *verifyFlags) several() bool { return f.targetsFile != "" || len(f.hosts) > 1 }

// severally refuses flags about several hosts that do not go together.
func (f *verifyFlags) severally() error {
	switch {
	case f.changed("targets") && f.targetsFile == "":
		return usageError("", "--targets wants a file")
	case f.targetsFile != "" && len(f.hosts) > 0:
		return usageError("write the host into "+f.targetsFile, "--target and --targets do not go together")
	case f.changed("resume") && f.resume == "":
		return usageError("", "--resume wants a file")
	case f.resume != "" && !f.several():
		return usageError("deadlight verify --targets FILE --resume "+f.resume, "--resume is of several hosts")
	}
	return nil
}

// ofTheOther refuses flags that mean nothing to how the host is probed: from itself,
// or from afar, which is another machine, or this one at a --target.
func (f *verifyFlags) ofTheOther(afar bool) error {
	if !afar {
		for _, name := range []string{"connect", "ssh-config"} {
			if f.changed(name) {
				return usageError("deadlight verify --target ADDR, on another machine", "--%s is of a --target, and this is the host itself", name)
			}
		}
		return nil
	}
	flag := "--target"
	if f.targetsFile != "" {
		flag = "--targets"
	}
	if f.vantage == "netns" {
		return usageError("", "--vantage netns is of this host, and %s names another", flag)
	}
	switch {
	case !f.elsewhere() && f.changed("proof"):
		return usageError("--vantage netns", "--proof is of this host as it looks at itself, and the vantage is another machine")
	case !f.elsewhere():
		return nil
	}
	for _, name := range []string{"textfile", "proof"} {
		if f.changed(name) {
			return usageError("", "--%s is of this host, and %s names another", name, flag)
		}
	}
	return nil
}

// far is the machine that looks in place of this one; nil if none does.
func (f *verifyFlags) far() (*verify.SSHVantage, error) {
	if f.vantage == "" {
		return nil, nil
	}
	v, err := verify.ParseSSHVantage(f.vantage)
	if err != nil {
		return nil, usageError("--vantage ssh://USER@HOST", "--vantage: %w", err)
	}
	v.Config = f.sshConfig
	return &v, nil
}

// verifyTarget is verify of one other host.
func verifyTarget(ctx context.Context, e env, file string, f verifyFlags) error {
	far, err := f.far()
	if err != nil {
		return err
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
	line := newProgress(e)
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
	if look.Ports, look.Canaries, err = f.what(); err != nil {
		return look, err
	}
	look.Rules, look.In, look.MaxRate, look.Connect = rs, f.In, f.MaxRate, f.Connect
	if rs != nil {
		look.Thorough = thoroughOf(rs, f.Thorough)
	}
	if len(f.Targets) == 0 {
		return look, usageError("deadlight verify --target 192.0.2.10, from another machine", "name the host to probe with --target")
	}
	look.Targets, err = aTarget(strings.Join(f.Targets, ","))
	return look, err
}

// what gives the ports that are probed and those that prove the path.
func (f *lookFlags) what() (ports verify.Ports, canaries []verify.Canary, err error) {
	if ports, err = verify.ParsePorts(f.Ports); err != nil {
		return ports, nil, usageError("--ports takes tcp, udp, all, 443/tcp or 1-1024/udp, comma-separated", "%w", err)
	}
	if f.MaxRate < 0 {
		return ports, nil, usageError("", "--max-rate runs from 0 up: %d", f.MaxRate)
	}
	for _, p := range f.Canaries {
		if p < 1 || p > 65535 {
			return ports, nil, usageError("", "--canary wants a port, 1-65535: %d", p)
		}
		canaries = append(canaries, verify.Canary{Kind: verify.CanaryTCP, Port: uint16(p)})
	}
	return ports, canaries, nil
}

// lookAt looks from this machine.
func lookAt(ctx context.Context, look verify.LookConfig) (*verify.Report, error) {
	report, err := verify.Look(ctx, look)
	if err != nil {
		return nil, lookError(err)
	}
	return report, nil
}

// lookError says for people why nothing could be seen.
func lookError(err error) error {
	switch {
	case errors.Is(err, verify.ErrLocalTarget):
		return refused(err, "deadlight verify without --target looks at this host: over loopback the policy is not asked")
	case errors.Is(err, fs.ErrPermission):
		return refused(fmt.Errorf("no permission to send raw packets (CAP_NET_RAW): %w", err), "sudo deadlight verify …, or --connect, which can tell less")
	}
	return refused(err, "")
}

func (f *verifyFlags) print(e env, file string, report *verify.Report) error {
	if f.report.format == "text" {
		err := forPeople(e, func(w io.Writer) error {
			printf(w, "%s against %s, seen from %s:\n", report.Target, printable(file), printable(report.Vantage))
			return nil
		})
		if err != nil {
			return err
		}
	}
	return f.report.print(e, report)
}
