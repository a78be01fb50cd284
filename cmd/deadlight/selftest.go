package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// selfTestPolicy has every kind of opening that a broken ruleset can betray.
const selfTestPolicy = `version = 1
[open.web]
ports = [80, 443]
[open.dns]
ports = 53
protocol = ["tcp", "udp"]
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "2001:db8:10::/64"]
[open.admin]
ports = "9000-9010"
interfaces = "wg0"
[open.six]
ports = 25
family = "ipv6"
`

// selfTestPorts hold every hole that is planted below.
const selfTestPorts = "1-100/tcp,443/tcp,8000-8100/tcp,8990-9020/tcp,65535/tcp,1-100/udp,8000-8100/udp,65535/udp"

// The ports of the holes: no opening names them, and the throw-away host listens
// on both.
const (
	holePort     = 8080
	redirectPort = 8081
)

// breakage is one way for a ruleset to be wrong.
type breakage struct {
	name     string
	want     verify.Verdict
	at       []verify.Target    // where it is wrong; nil: throughout
	empty    bool               // nothing is loaded
	edit     func(*rules.Table) // what is done to the compiled table
	beside   *rules.Table       // somebody else's
	redirect *firewall.Redirect // somebody else's
	hostOnly bool               // only the record on the host shows it
	cut      bool               // the links of the host go down
	six      bool               // it shows over IPv6 alone
}

func breakages() []breakage {
	tcp := func(ports ...uint16) []verify.Target {
		var out []verify.Target
		for _, p := range ports {
			out = append(out, verify.Target{Protocol: rules.TCP, Port: p})
		}
		return out
	}
	var admin []uint16
	for p := uint16(9000); p <= 9010; p++ {
		admin = append(admin, p)
	}
	accept, drop := rules.Verdict{Kind: rules.VerdictAccept}, rules.Verdict{Kind: rules.VerdictDrop}
	rule := func(e ...rules.Expr) rules.Rule { return rules.Rule{Comment: "broken", Exprs: e} }
	port := func(n uint32) rules.Expr { return rules.Match{Field: rules.TCPDport, Number: n} }
	l4 := func(p rules.Protocol) rules.Expr { return rules.Match{Field: rules.MetaL4proto, Number: uint32(p)} }
	first := func(r rules.Rule, chains ...string) func(*rules.Table) {
		return func(t *rules.Table) {
			for _, name := range chains {
				c := chainOf(t, name)
				c.Rules = slices.Insert(c.Rules, 0, r)
			}
		}
	}
	last := func(with ...rules.Rule) func(*rules.Table) { // in place of the drop at the end of the gate
		return func(t *rules.Table) {
			c := chainOf(t, "gate")
			c.Rules = append(c.Rules[:len(c.Rules)-1], with...)
		}
	}
	opens := func(with ...rules.Rule) func(*rules.Table) { // in place of the drop at the end of both, which accept
		return func(t *rules.Table) {
			for _, name := range []string{"gate", "backstop_in"} {
				c := chainOf(t, name)
				c.Rules = append(c.Rules[:len(c.Rules)-1], with...)
				c.Base.Accept = true
			}
		}
	}
	other := func(hook rules.Hook, priority int, r rules.Rule) *rules.Table {
		return &rules.Table{Name: "other", Chains: []rules.Chain{{
			Name: "c", Base: &rules.Base{Hook: hook, Priority: priority, Accept: true}, Rules: []rules.Rule{r},
		}}}
	}
	const gate, backstop = "gate", "backstop_in"
	return []breakage{
		{name: "the ruleset as it is compiled", want: verify.Pass},

		{name: "no ruleset at all", want: verify.Fail, empty: true},
		{name: "nothing is dropped: the policy of the chains is accept", want: verify.Fail, edit: opens()},
		{name: "IPv6 is forgotten", want: verify.Fail, six: true,
			edit: first(rule(rules.Match{Field: rules.MetaNfproto, Number: rules.NfprotoIPv6}, accept), gate, backstop)},
		{name: "UDP is forgotten", want: verify.Fail, edit: first(rule(l4(rules.UDP), accept), gate, backstop)},
		{name: "only SYN is dropped", want: verify.Fail,
			edit: opens(rule(rules.Match{Field: rules.TCPFlags, Number: rules.FlagSYN}, drop))},
		{name: "what is new passes as established", want: verify.Fail,
			edit: first(rule(rules.Match{Field: rules.CtState, Number: rules.StateEstablished | rules.StateNew}, accept), gate, backstop)},
		{name: "a port too many is open", want: verify.Fail, at: tcp(holePort), edit: func(t *rules.Table) {
			insertPort(setOf(t, "tcp_open"), holePort, "open_web")
			insertPort(setOf(t, "tcp_listed"), holePort, "")
		}},
		{name: "a source restriction is forgotten", want: verify.Fail, at: tcp(22), edit: func(t *rules.Table) {
			chainOf(t, "open_ssh").Rules = []rules.Rule{rule(accept)}
		}},
		{name: "an interface restriction is forgotten", want: verify.Fail, at: tcp(admin...), edit: func(t *rules.Table) {
			chainOf(t, "open_admin").Rules = []rules.Rule{rule(accept)}
		}},
		{name: "a family restriction is forgotten", want: verify.Fail, at: tcp(25), edit: func(t *rules.Table) {
			chainOf(t, "open_six").Rules = []rules.Rule{rule(accept)}
		}},
		{name: "unlisted ports are rejected, not dropped", want: verify.Fail, edit: last(rule(rules.RejectWith{}))},
		{name: "unlisted TCP ports are reset, not dropped", want: verify.Fail,
			edit: last(rule(l4(rules.TCP), rules.RejectWith{TCPReset: true}), rule(drop))},
		{name: "the gate lets a port through, the backstop holds", want: verify.Fail, at: tcp(holePort), hostOnly: true,
			edit: first(rule(port(holePort), accept), gate)},
		{name: "another table rejects ahead of the gate", want: verify.Fail, at: tcp(holePort),
			beside: other(rules.Prerouting, -150, rule(port(holePort), rules.RejectWith{}))},
		{name: "another table redirects, and the backstop goes by the new port", want: verify.Fail, at: tcp(redirectPort),
			redirect: &firewall.Redirect{From: redirectPort, To: 80},
			edit: func(t *rules.Table) {
				first(rule(port(redirectPort), accept), gate)(t)
				for _, name := range []string{backstop, "rewritten"} {
					for _, r := range chainOf(t, name).Rules {
						for i, e := range r.Exprs {
							if m, ok := e.(rules.MatchSet); ok && m.Field == rules.CtOriginalProtoDst && strings.HasPrefix(m.Set, "tcp_") {
								r.Exprs[i] = rules.MatchSet{Field: rules.TCPDport, Set: m.Set}
							}
						}
					}
				}
			}},

		{name: "the drop stands ahead of the openings", want: verify.Fail, edit: func(t *rules.Table) {
			c := chainOf(t, gate)
			n := len(c.Rules) - 1
			end := c.Rules[n]
			at := slices.IndexFunc(c.Rules, func(r rules.Rule) bool {
				_, ok := r.Exprs[0].(rules.VerdictMap)
				return ok
			})
			c.Rules = slices.Insert(c.Rules[:n], at, end)
		}},
		{name: "an open port is dropped", want: verify.Fail, at: tcp(443), edit: first(rule(port(443), drop), gate)},
		{name: "the end of an open range is missing", want: verify.Fail, at: tcp(9010), edit: func(t *rules.Table) {
			s := setOf(t, "tcp_open")
			s.Ports[len(s.Ports)-1].Hi--
		}},
		{name: "another table drops an open port", want: verify.Fail, at: tcp(443),
			beside: other(rules.Input, -5, rule(port(443), drop))},

		{name: "a dead path: all is dropped before anybody sees it", want: verify.Inconclusive,
			beside: other(rules.Prerouting, -450, rule(drop))},
		{name: "a dead path: the cable is pulled", want: verify.Inconclusive, cut: true},
	}
}

// chainOf and setOf find what every compiled ruleset of the policy above has; a
// test loads them all.
func chainOf(t *rules.Table, name string) *rules.Chain {
	return &t.Chains[slices.IndexFunc(t.Chains, func(c rules.Chain) bool { return c.Name == name })]
}

func setOf(t *rules.Table, name string) *rules.Set {
	return &t.Sets[slices.IndexFunc(t.Sets, func(s rules.Set) bool { return s.Name == name })]
}

// insertPort adds a port to a set or, with a target, to a verdict map.
func insertPort(s *rules.Set, port uint16, target string) {
	at := slices.IndexFunc(s.Ports, func(r rules.PortRange) bool { return r.Lo > port })
	s.Ports = slices.Insert(s.Ports, at, rules.PortRange{Lo: port, Hi: port})
	if target != "" {
		s.Targets = slices.Insert(s.Targets, at, target)
	}
}

// load puts the broken ruleset in force; it runs in the throw-away host.
func (b *breakage) load(p *rules.Policy) func() error {
	return func() error {
		if b.empty {
			return nil
		}
		rs := rules.Compile(p)
		if b.edit != nil {
			b.edit(&rs.Table)
		}
		if _, err := applyHere(rs); err != nil {
			return err
		}
		if b.beside != nil {
			if _, err := applyHere(&rules.Ruleset{Policy: p, Table: *b.beside}); err != nil {
				return err
			}
		}
		if b.redirect != nil {
			return redirectHere(*b.redirect)
		}
		return nil
	}
}

func redirectHere(r firewall.Redirect) (err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	return conn.PlantRedirect(r)
}

// selfTest shows on throw-away hosts that the verifier finds what is broken.
func selfTest(c *cobra.Command, e env, args []string, asJSON bool) error {
	alone := len(args) == 0
	c.Flags().Visit(func(f *pflag.Flag) { alone = alone && (f.Name == "self-test" || f.Name == "json") })
	if !alone {
		return usageError("deadlight verify --self-test", "--self-test takes no policy, and no flag but --json")
	}
	if !verify.Isolated() {
		code, err := verify.Isolate(c.Context(), os.Args[1:], e.stdin, e.stdout, e.stderr)
		var ns *verify.NamespaceError
		if errors.As(err, &ns) {
			return refused(err, strings.Replace(ns.Hint(), "deadlight try …", "deadlight verify --self-test", 1))
		}
		if err != nil {
			return refused(err, "")
		}
		if code != exitOK {
			return silently(code)
		}
		return nil
	}
	if err := verify.EnterIsolated(); err != nil {
		return namespaceError(err)
	}
	return selfTestOf(c.Context(), e, breakages(), asJSON)
}

// selfTestOf holds the verifier's verdicts against what they must be.
func selfTestOf(ctx context.Context, e env, list []breakage, asJSON bool) error {
	p, problems := rules.Parse("the policy of the self-test", []byte(selfTestPolicy), nil)
	if p == nil {
		return fmt.Errorf("the policy of the self-test: %v", problems)
	}
	ports, err := verify.ParsePorts(selfTestPorts)
	if err != nil {
		return err
	}
	cfg := verify.SelfTestConfig{Rules: rules.Compile(p), Ports: ports}
	for i := range list {
		b := &list[i]
		cfg.Cases = append(cfg.Cases, verify.SelfTestCase{
			Name: b.name, Load: b.load(p), Want: b.want, At: b.at, HostOnly: b.hostOnly, Cut: b.cut, IPv6: b.six,
		})
	}
	line := newProgress(e)
	done := uint64(0)
	cfg.Done = func(r verify.SelfTestResult) {
		done++
		line.done()
		if !asJSON {
			printf(e.stdout, "  %-4s %s: %s\n", selfTestWord(r), r.Name, r.Why)
		}
		line.update("self-test of the verifier", done, uint64(len(list)))
	}
	line.update("self-test of the verifier", 0, uint64(len(list)))
	r, err := verify.SelfTest(ctx, cfg)
	line.done()
	if err != nil {
		return kernelError(err, "deadlight verify --self-test")
	}
	if asJSON {
		if err := writeJSON(e.stdout, r); err != nil {
			return err
		}
	} else {
		printSelfTest(e, r)
	}
	return selfTestExit(r)
}

func selfTestWord(r verify.SelfTestResult) string {
	switch {
	case r.Skipped:
		return "skip"
	case !r.OK:
		return "FAIL"
	}
	return "ok"
}

func printSelfTest(e env, r *verify.SelfTestReport) {
	wrong, sound, broken := 0, 0, 0
	for _, c := range r.Cases {
		switch {
		case c.Skipped:
		case !c.OK:
			wrong++
		case c.Expected == verify.Pass:
			sound++
		default:
			broken++
		}
	}
	if r.OK {
		printf(e.stdout, "PASS: %s found out, %s passed, %.0f s\n", plural(broken, "broken ruleset"), plural(sound, "sound one"), r.Seconds)
		return
	}
	printf(e.stdout, "FAIL: %d of %d verdicts are not what they must be, %.0f s\n", wrong, len(r.Cases), r.Seconds)
}

// selfTestExit tells a verifier that is wrong, a bug of ours, from one that could
// not tell, as on a machine that is too busy.
func selfTestExit(r *verify.SelfTestReport) error {
	if r.OK {
		return nil
	}
	for _, c := range r.Cases {
		if c.Wrong {
			return &exitError{exitBug, errors.New("this is a bug of deadlight: do not trust what verify and try say here"),
				"please report it with the lines above, and with the version of the kernel (uname -r)"}
		}
	}
	return refused(errors.New("the verifier could not tell: its verdicts are no proof here"), "is this machine very busy? try again when it is not")
}
