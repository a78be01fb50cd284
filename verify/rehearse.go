package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"deadlight/rules"
)

// RehearseConfig is what [Rehearse] needs.
type RehearseConfig struct {
	Name  string // of the policy, for the report
	Rules *rules.Ruleset
	// Load puts the ruleset in force. It runs inside the throw-away host, with
	// the thread locked to its network namespace.
	Load func() error
	// Command, if any, runs in the host after Load and before the probes; its
	// output goes to Stdout and Stderr. A failing command is an error.
	Command        []string
	Stdout, Stderr io.Writer
	Progress       func(sent, total uint64)
	// Thorough scales the adversarial probes: 0 for none, 1 for all that are quick,
	// 2 for the slow ones too.
	Thorough int
	// Reload puts the ruleset in force anew, as a later change would, while probes
	// come in; nil is Load again. It runs where Load does.
	Reload func() error

	sweep Ports                      // what the sweeps probe; zero: every port
	cut   bool                       // the host's links go down before the first probe
	seen  func(JudgeConfig, *Result) // gets what is about to be judged; may be nil
}

// CommandError says that the command of a rehearsal failed. It unwraps to the
// error of os/exec.
type CommandError struct {
	Command []string
	Err     error
}

func (e *CommandError) Error() string { return fmt.Sprintf("%s: %v", e.Command[0], e.Err) }

// Unwrap gives the error of os/exec.
func (e *CommandError) Unwrap() error { return e.Err }

// Rehearse builds a throw-away host, puts a ruleset in force there, starts
// listeners behind listed and unlisted ports, probes the host from outside and
// judges what it saw. It must run in a process that [Isolate] started.
func Rehearse(ctx context.Context, cfg RehearseConfig) (*Report, error) {
	ipv6 := hasIPv6()
	outlook, err := NewOutlook(cfg.Rules, ipv6)
	if err != nil {
		return nil, err
	}
	if cfg.sweep.TCP != nil {
		for i := range outlook.Views {
			if v := &outlook.Views[i]; v.Sweep {
				v.Path.TCP, v.Path.UDP = cfg.sweep.TCP, cfg.sweep.UDP
			}
		}
	}
	world := WorldConfig{Host4: outlook.Host4, More: outlook.More, Links: outlook.Links}
	if ipv6 {
		world.Host6 = outlook.Host6
	}
	w, err := NewWorld(world)
	if err != nil {
		return nil, fmt.Errorf("build the throw-away host: %w", err)
	}
	defer w.Close()
	if err := w.Host(cfg.Load); err != nil {
		return nil, err
	}
	tcp, udp := listening(cfg.Rules, MaxListeners())
	l, err := Listen(w.Host, tcp.all(), udp.all())
	if err != nil {
		return nil, fmt.Errorf("start listeners: %w", err)
	}
	defer l.Close()
	if len(cfg.Command) > 0 {
		if err := w.Command(ctx, cfg.Command, cfg.Stdout, cfg.Stderr); err != nil {
			return nil, errors.Join(ctx.Err(), &CommandError{cfg.Command, err})
		}
	}
	paths := make([]Path, len(outlook.Views))
	sports := make([]uint16, len(outlook.Views))
	for i := range outlook.Views {
		v := &outlook.Views[i]
		v.Path.Link = w.Link(v.In)
		paths[i], sports[i] = v.Path, v.Path.SrcPort
	}
	trip, err := ArmTripwire(w.Host, sports)
	if err != nil {
		return nil, fmt.Errorf("arm the tripwire: %w", err)
	}
	if cfg.cut {
		if err := w.cut(); err != nil {
			return nil, err
		}
	}
	res, err := Sweep(ctx, Config{Paths: paths, Progress: cfg.Progress, Arrived: trip.Arrived})
	if err != nil {
		return nil, fmt.Errorf("probe the throw-away host: %w", err)
	}
	proof, err := trip.proof()
	if err != nil {
		return nil, fmt.Errorf("read the tripwire: %w", err)
	}
	if err := trip.Remove(); err != nil {
		return nil, fmt.Errorf("remove the tripwire: %w", err)
	}
	var odd *odd
	if cfg.Thorough > 0 {
		views, err := oddViews(w, cfg.Rules, outlook)
		if err != nil {
			return nil, fmt.Errorf("list the addresses of the throw-away host: %w", err)
		}
		odd = planOdd(oddConfig{
			rules: cfg.Rules, views: views, swept: sweptPorts(outlook.Views), all: true, own: true, many: true, witnessed: true,
			listening: Ports{tcp.unlisted, udp.unlisted}, level: cfg.Thorough, budget: oddBudget(outlook.Views), taken: taken(outlook.Views),
		})
		defer odd.close()
		if proof.odd, err = odd.rehearse(ctx, w, cfg); err != nil {
			return nil, fmt.Errorf("probe the throw-away host: %w", err)
		}
	}
	judge := JudgeConfig{
		Target: "throw-away host for " + cfg.Name, Vantage: "throw-away outside",
		Rules: cfg.Rules, Views: outlook.Views, HostProof: proof, odd: odd, unasked: outlook.unasked,
	}
	if cfg.seen != nil {
		cfg.seen(judge, res)
	}
	report := Judge(judge, res)
	report.Listeners = &Listening{
		ListedTCP: len(tcp.listed), ListedUDP: len(udp.listed), UnlistedTCP: len(tcp.unlisted), UnlistedUDP: len(udp.unlisted),
	}
	if other := otherProtocols(cfg.Rules.Policy, report.listed); other != "" {
		report.Notes = append(report.Notes, "not judged, whether what is listed gets in: "+other)
	}
	if note := oddNote(cfg.Thorough); note != "" {
		report.Notes = append(report.Notes, note)
	}
	if len(outlook.Links) > 1 {
		report.Notes = append(report.Notes, fmt.Sprintf("every port was probed by %s; by %s only those of the rules that name them",
			outlook.Links[0], strings.Join(outlook.Links[1:], ", ")))
	}
	if outlook.Unprobed > 0 {
		report.Notes = append(report.Notes, fmt.Sprintf("%s of restricted openings not looked from: too many, or no packet may carry them",
			count(outlook.Unprobed, "source", "sources")))
	}
	if tcp.left+udp.left > 0 {
		report.Notes = append(report.Notes, fmt.Sprintf("no listener behind %s: the limit of open files is too low (ulimit -n)",
			count(tcp.left+udp.left, "listed port", "listed ports")))
	}
	if !ipv6 {
		report.Notes = append(report.Notes, "IPv6 is not in this kernel: nothing was probed over it")
	}
	return report, nil
}

// otherProtocols names the listed protocols of which nothing was shown.
func otherProtocols(p *rules.Policy, shown []rules.Protocol) string {
	var out []string
	for _, o := range p.Open {
		for _, on := range o.On {
			if name := on.Protocol.String(); on.Protocol != rules.TCP && on.Protocol != rules.UDP && !slices.Contains(out, name) && !slices.Contains(shown, on.Protocol) {
				out = append(out, name)
			}
		}
	}
	return strings.Join(out, ", ")
}

// proof reads everything the tripwire recorded.
func (t *Tripwire) proof() (*HostProof, error) {
	p := &HostProof{Passed: map[Passage]bool{}, Gate: map[Passage]bool{}}
	var err error
	if p.Arrived, err = t.Arrived(); err != nil {
		return nil, err
	}
	for _, part := range []struct {
		read func() ([]Passage, error)
		into map[Passage]bool
	}{{t.Passed, p.Passed}, {t.GatePassed, p.Gate}} {
		list, err := part.read()
		if err != nil {
			return nil, err
		}
		for _, x := range list {
			part.into[x] = true
		}
	}
	return p, nil
}

type portPlan struct {
	listed, unlisted []uint16
	left             int // listed ports for which no file descriptor was left
}

func (p portPlan) all() []uint16 { return union(p.listed, p.unlisted) }

// listening chooses the ports that get a listener, TCP and UDP, within a number
// of sockets.
func listening(rs *rules.Ruleset, budget int) (tcp, udp portPlan) {
	const unlisted = 1024
	plan := func(proto rules.Protocol) portPlan {
		var p portPlan
		var all []uint16
		for i := range rs.Policy.Open {
			for _, r := range rs.Policy.Open[i].Ports(proto) {
				for port := int(r.Lo); port <= int(r.Hi); port++ {
					all = append(all, uint16(port))
				}
			}
		}
		all = union(nil, all)
		p.listed = all
		if most := max(budget/2-unlisted, 0); len(all) > most {
			p.listed, p.left = all[:most], len(all)-most
		}
		p.unlisted = SpreadPorts(all, min(unlisted, budget/2))
		return p
	}
	return plan(rules.TCP), plan(rules.UDP)
}
