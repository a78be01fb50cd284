package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newOpenCommand(e env) *cobra.Command {
	var within spanValue
	var from []string
	var in, comment string
	var f temporaryFlags
	c := &cobra.Command{
		Use:     "open PORT[/PROTOCOL]",
		GroupID: groupApply,
		Short:   "Open a port for some time; the kernel closes it again",
		Long: `Opens a port beside the policy, for the time of --for: 90s, 2h, 1d, at most 365d.
Then the kernel closes it by itself, with no process alive, and ends the flows that
it admitted, unless the policy says established = "keep". No file is changed.

It stands beside what was last applied: edits of the policy since then wait for
deadlight apply, and that keeps the opening with the time it has left, as do
rollback and a boot. deadlight remove forgets it. Opened again for the same
addresses, it lasts the new time. Blocks win over it.

PROTOCOL is tcp unless named, else udp or sctp.`,
		Example: "  sudo deadlight open 8443/tcp --from 198.51.100.7 --for 2h --comment ticket-4711\n  sudo deadlight open 60001/udp --interface wg0 --for 1d",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("deadlight open 8443/tcp --from 198.51.100.7 --for 2h", "name one port")
			}
			return nil
		},
	}
	f.add(c)
	c.Flags().Var(&within, "for", "how long: 90s, 2h, 1d; at most 365d")
	c.Flags().StringSliceVar(&from, "from", nil, "address, network or range to admit, repeatable (default: anywhere)")
	c.Flags().StringVar(&in, "interface", "", "only by this interface; one * may end its name")
	c.Flags().StringVar(&comment, "comment", "", "why; deadlight status shows it")
	c.RunE = func(_ *cobra.Command, args []string) error {
		if within == 0 {
			return usageError("deadlight open "+args[0]+" --for 2h; what shall stay open belongs into the policy", "open needs --for: when does it end?")
		}
		proto, port, err := portOf(args[0])
		if err != nil {
			return err
		}
		ranges, err := rangesOf(from)
		if err != nil {
			return err
		}
		t, err := newTemporary(rules.Temporary{Protocol: proto, Port: port, From: ranges, Interface: in, Comment: comment}, time.Duration(within))
		if err != nil {
			return err
		}
		return openHere(e, f, t, time.Duration(within))
	}
	return c
}

// openHere opens a port in the network namespace of the calling thread.
func openHere(e env, f temporaryFlags, t firewall.Temporary, within time.Duration) error {
	again := "deadlight open " + rules.PortName(t.Protocol, t.Port) + " --for " + spanText(within)
	var before *firewall.Temporary
	var lasting []*rules.Open
	rs, r, err := changeTemporary(e, f, again, func(p *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error) {
		lasting = policyOpens(p, t.Protocol, t.Port)
		t.Expires = time.Now().UTC().Add(within).Truncate(time.Millisecond) // reading the state takes time
		list, before = put(list, t)
		return list, nil
	})
	if err != nil {
		return hostError(err, again)
	}
	printf(e.stdout, "Open: %s %s%s: the kernel closes it by itself, generation %d\n", oneLine(t.What()), endText(&t.Temporary, within), instead(before), r.Generation)
	if len(t.From) == 0 && t.Interface == "" && rules.IsAdminPort(t.Protocol, t.Port) {
		printf(e.stderr, "deadlight: warning: open to the whole world: %s; --from ADDR narrows it\n", rules.PortName(t.Protocol, t.Port))
	}
	if len(lasting) > 0 {
		printf(e.stderr, "deadlight: warning: the policy opens it too, before and after: %s\n", oneLine(places(lasting)))
	}
	warnKept(e, rs, "flows that it admits live on after its end")
	for _, d := range stopped(rs, &t.Temporary) {
		printf(e.stderr, "deadlight: warning: %s\n", oneLine(d))
	}
	return nil
}

// warnKept says what a policy with established = "keep" makes of an end.
func warnKept(e env, rs *rules.Ruleset, what string) {
	if rs.Policy.Default.KeepFlows {
		printf(e.stderr, "deadlight: warning: established = \"keep\" in the policy: %s\n", what)
	}
}

// stopped says who does not get in by an opening, since a block wins over it. One
// address of each source is asked for.
func stopped(rs *rules.Ruleset, t *rules.Temporary) []string {
	var out []string
	from := t.From
	if len(from) == 0 {
		from = []rules.AddrRange{{Lo: stranger(false), Hi: stranger(false)}}
	}
	for _, a := range from {
		p := rules.Packet{
			In: strings.TrimSuffix(t.Interface, "*"), Src: a.Lo, Dst: nowhere(a.Lo.Is6()), Protocol: t.Protocol, SrcPort: 40000, DstPort: t.Port, At: time.Now(),
		}
		if d := rs.Decide(p); d.Kind == "block" {
			out = append(out, fmt.Sprintf("from %s it is %s all the same: %s", a.Lo, d.Outcome, reason(rs, p, d)))
		}
	}
	return out
}

// portOf reads the port of a temporary opening.
func portOf(s string) (rules.Protocol, uint16, error) {
	const hint = "write a port like 8443/tcp or 51820/udp; anything else belongs into the policy"
	text := s
	if _, err := strconv.Atoi(s); err == nil {
		text += "/tcp"
	}
	proto, port, err := rules.ParsePort(text)
	switch {
	case err != nil:
		return 0, 0, usageError(hint, "%w", err)
	case proto != rules.TCP && proto != rules.UDP && proto != rules.SCTP:
		return 0, 0, usageError(hint, "%s has no port that could be opened or closed", printable(s))
	}
	return proto, port, nil
}

// rangesOf reads addresses, and gives them as [rules.Source] has them.
func rangesOf(list []string) ([]rules.AddrRange, error) {
	var out []rules.AddrRange
	for _, s := range list {
		a, err := rules.ParseAddresses(s)
		if err != nil {
			return nil, mistaken(err)
		}
		out = append(out, a)
	}
	return rules.MergeAddrs(out), nil
}

func newCloseCommand(e env) *cobra.Command {
	var f temporaryFlags
	c := &cobra.Command{
		Use:     "close PORT[/PROTOCOL]",
		GroupID: groupApply,
		Short:   "End what deadlight open has opened, before its time",
		Long: `Ends every temporary opening of a port, and the flows that only it admitted,
unless the policy says established = "keep".

A port that the policy itself opens stays open: the line to edit is named.

Exit codes: 0 it is closed, or was; 1 the opening has ended, but the policy opens the
port too; 2 only the policy opens it, nothing is changed.`,
		Example: "  sudo deadlight close 8443/tcp",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("deadlight close 8443/tcp; deadlight status lists what is open for some time", "name one port")
			}
			return nil
		},
		ValidArgsFunction: temporaryArgs(func(t *rules.Temporary) string {
			if t.Block {
				return ""
			}
			return rules.PortName(t.Protocol, t.Port)
		}),
	}
	f.add(c)
	c.RunE = func(_ *cobra.Command, args []string) error {
		proto, port, err := portOf(args[0])
		if err != nil {
			return err
		}
		return closeHere(e, f, proto, port)
	}
	return c
}

// closeHere ends the temporary openings of a port in the network namespace of the
// calling thread.
func closeHere(e env, f temporaryFlags, proto rules.Protocol, port uint16) error {
	name := rules.PortName(proto, port)
	again := "deadlight close " + name
	var ended []firewall.Temporary
	var lasting []*rules.Open
	rs, r, err := changeTemporary(e, f, again, func(p *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error) {
		lasting = policyOpens(p, proto, port)
		list = slices.DeleteFunc(list, func(t firewall.Temporary) bool {
			gone := !t.Block && t.Protocol == proto && t.Port == port
			if gone {
				ended = append(ended, t)
			}
			return gone
		})
		switch {
		case len(ended) > 0:
			return list, nil
		case len(lasting) > 0:
			return nil, usageError("edit it there, then: sudo deadlight apply", "%s is not open for some time but by the policy: %s: nothing is closed", name, places(lasting))
		}
		printf(e.stdout, "Nothing to close: no rule opens %s\n", name)
		return nil, silently(exitOK)
	})
	if err != nil {
		return hostError(err, again)
	}
	for _, t := range ended {
		left := ""
		if !t.Over(time.Now()) {
			left = ", which had " + spanText(time.Until(t.Expires)) + " left"
		}
		printf(e.stdout, "Closed: %s%s, generation %d\n", oneLine(t.What()), left, r.Generation)
	}
	warnKept(e, rs, "flows that it has admitted live on")
	if len(lasting) > 0 {
		return &exitError{exitFindings, fmt.Errorf("%s is still open, by the policy: %s", name, places(lasting)), "edit it there, then: sudo deadlight apply"}
	}
	return nil
}

// policyOpens gives the openings of a policy that name a port and have not ended.
func policyOpens(p *rules.Policy, proto rules.Protocol, port uint16) []*rules.Open {
	var out []*rules.Open
	for i := range p.Open {
		o := &p.Open[i]
		named := o.Any || slices.ContainsFunc(o.Ports(proto), func(r rules.PortRange) bool { return r.Lo <= port && port <= r.Hi })
		if named && (o.Expires.IsZero() || time.Now().Before(o.Expires)) {
			out = append(out, o)
		}
	}
	return out
}

// places names openings with the lines that they stand in.
func places(list []*rules.Open) string {
	var out []string
	for _, o := range list {
		out = append(out, fmt.Sprintf("[open.%s] (%s:%d) %s", o.Name, o.Pos.File, o.Pos.Line, fromWhere(&o.Traffic)))
	}
	return strings.Join(out, "; ")
}

// temporaryArgs offers the temporary rules by a word for each, "" for none.
func temporaryArgs(word func(*rules.Temporary) string) cobra.CompletionFunc {
	return func(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
		const directive = cobra.ShellCompDirectiveNoFileComp
		if len(args) > 0 {
			return nil, directive
		}
		dir := ""
		if flag := c.Flag("state-dir"); flag != nil {
			dir = flag.Value.String()
		}
		list, err := temporaryOf(dir)
		if err != nil {
			return nil, directive // a shell has no use for it
		}
		var out []cobra.Completion
		for _, t := range firewall.Running(list, time.Now()) {
			if w := word(&t.Temporary); w != "" && strings.HasPrefix(w, start) {
				out = append(out, cobra.CompletionWithDesc(w, printable(t.What())))
			}
		}
		return out, directive
	}
}
