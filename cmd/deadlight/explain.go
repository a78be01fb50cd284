package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

type explainFlags struct {
	policy, from, to, in string
	state                string // directory
	json, live           bool
}

func newExplainCommand(e env) *cobra.Command {
	var f explainFlags
	c := &cobra.Command{
		Use:     "explain PORT[/PROTOCOL]",
		GroupID: groupWrite,
		Short:   "Say what happens to a packet, by which rule, and which rules it missed",
		Long: `Asks the policy what happens to the first packet of a connection: open, filtered
or rejected, by which rule of which line, and which rules were near but missed.
Open says that it is admitted, not that anybody listens. Without --from it comes
from a stranger whom no rule names, without --in by an interface that none names.

PROTOCOL is tcp unless named; without ports: explain esp.

With --live the packet is walked through every table of the running kernel too,
ours and others'; what deadlight open and block have added counts then. When the
kernel does something else than the policy says, the first chain that differs is
named and the exit code is 1; what cannot be told without the packet itself is
named, with exit code 3.`,
		Example: `  deadlight explain 22 --from 198.51.100.7
  sudo deadlight explain 443/tcp --live
  deadlight explain 53/udp --from 172.17.0.2 --in docker0 --policy ./policy.toml`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageError("deadlight explain 443/tcp", "name one port or protocol")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return explain(e, args[0], f) },
	}
	c.Flags().StringVar(&f.policy, "policy", defaultPolicy, "the policy to ask")
	c.Flags().StringVar(&f.from, "from", "", "source address (default: a stranger)")
	c.Flags().StringVar(&f.to, "to", "", "destination, one of this host's addresses (default: one that no rule names)")
	c.Flags().StringVar(&f.in, "in", "", "interface by which the packet enters (default: one that no rule names)")
	c.Flags().BoolVar(&f.live, "live", false, "walk the tables of the running kernel too, ours and others' (root)")
	c.Flags().BoolVar(&f.json, "json", false, "print one JSON object")
	dir := stateFlag(c)
	c.PreRun = func(*cobra.Command, []string) { f.state = *dir }
	return c
}

// explanation is the object of `explain --json`.
type explanation struct {
	Schema  int        `json:"schema"`
	Verdict string     `json:"verdict"` // open, filtered or rejected
	Rule    string     `json:"rule"`
	File    string     `json:"file"`
	Line    int        `json:"line"`
	Reason  string     `json:"reason"`
	Nearest []nearJSON `json:"nearest"`
	Live    *liveJSON  `json:"live,omitempty"`
}

// liveJSON is what the running kernel does to the packet.
type liveJSON struct {
	Verdict string   `json:"verdict"` // accept, drop, reject or unknown
	Same    bool     `json:"same"`    // as the policy says
	By      string   `json:"by"`      // the chain that decides, or the first that differs
	Steps   []string `json:"steps"`
	Notes   []string `json:"notes"`
}

// nearJSON is a rule that nearly matched.
type nearJSON struct {
	Rule string `json:"rule"`
	File string `json:"file"`
	Line int    `json:"line"`
	Why  string `json:"why"`
}

func explain(e env, what string, f explainFlags) error {
	p, err := packetOf(what, f)
	if err != nil {
		return err
	}
	rs, problems, err := parsePolicy(f.policy)
	if err != nil {
		return err
	}
	if rs == nil {
		return unusable(e, problems, "nothing explained")
	}
	if f.live {
		rs = withThose(e, f.state, rs)
	}
	d := rs.Decide(p)
	x := explanation{
		Schema: 1, Verdict: d.Outcome.String(), Rule: d.Rule, File: d.Pos.File, Line: d.Pos.Line,
		Reason: reason(rs, p, d), Nearest: []nearJSON{},
	}
	if d.Outcome != rules.OutcomeOpen {
		for _, n := range rs.Nearest(p) {
			x.Nearest = append(x.Nearest, nearJSON{n.Name, n.Pos.File, n.Pos.Line, n.Why})
		}
	}
	if f.live {
		if x.Live, err = live(p, d); err != nil {
			return kernelError(err, "deadlight explain "+what+" --live")
		}
	}
	if f.json {
		err = writeJSON(e.stdout, x)
	} else {
		err = forPeople(e, func(w io.Writer) error { x.print(w); return nil })
	}
	switch {
	case err != nil:
		return err
	case x.Live == nil || x.Live.Same:
		return nil
	case x.Live.Verdict == string(firewall.WalkUnknown):
		return silently(exitRefused)
	}
	return silently(exitFindings)
}

func (x *explanation) print(w io.Writer) {
	printf(w, "%s: %s\n", x.Verdict, printable(x.Reason))
	for _, n := range x.Nearest {
		printf(w, "nearest: open %q%s %s\n", n.Rule, printable(inFile(rules.Pos{File: n.File, Line: n.Line})), printable(n.Why))
	}
	l := x.Live
	if l == nil {
		return
	}
	word := "the same"
	switch {
	case l.Verdict == string(firewall.WalkUnknown):
		word = "cannot be told"
	case !l.Same:
		word = "NOT as the policy says"
	}
	printf(w, "kernel: %s, %s: %s\n", l.Verdict, word, printable(l.By))
	for _, s := range l.Steps {
		printf(w, "  step %s\n", printable(s))
	}
	for _, n := range l.Notes {
		printf(w, "  note %s\n", printable(n))
	}
}

// live walks a packet through the tables of the running kernel.
func live(p rules.Packet, d rules.Decision) (l *liveJSON, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if d.Observed {
		d.Outcome = rules.OutcomeOpen
	}
	j, err := conn.Walk(p)
	if err != nil {
		return nil, err
	}
	same, first := firewall.Compare(d, j)
	l = &liveJSON{Verdict: string(j.Verdict), Same: same, By: j.By.String(), Steps: []string{}, Notes: append([]string{}, j.Notes...)}
	if !same && first != nil {
		l.By = first.String()
	}
	for _, s := range j.Steps {
		l.Steps = append(l.Steps, s.String())
	}
	return l, nil
}

// reason says in words what decided.
func reason(rs *rules.Ruleset, p rules.Packet, d rules.Decision) string {
	at := inFile(d.Pos)
	port := rules.PortName(p.Protocol, p.DstPort)
	var s string
	switch d.Kind {
	case "open":
		s = fmt.Sprintf("open %q%s admits %s", d.Rule, at, port)
		if d.Limited {
			s += ", within its limits"
		}
	case "block":
		s = fmt.Sprintf("block %q%s", d.Rule, at)
	case "default":
		s = fmt.Sprintf("no [open.*] matches, the default is %s%s", rs.Policy.Default.Input, at)
	case "echo":
		s = "echo is answered" + at
		if d.Limited {
			s += ", within its rate"
		}
	case "dhcp":
		s = "an answer to the DHCP client" + at
	case "icmp":
		s = "without such messages a host cannot speak IP"
	default:
		s = d.Kind
	}
	if d.Observed {
		s += "; but enforce = false: it gets through and is counted"
	}
	return s
}

// inFile names the line of a rule, behind its name; a temporary rule stands in no
// file.
func inFile(p rules.Pos) string {
	if p.Line == 0 {
		return ""
	}
	return fmt.Sprintf(" (%s:%d)", p.File, p.Line)
}

// packetOf makes the packet that a command line describes.
func packetOf(what string, f explainFlags) (rules.Packet, error) {
	p := rules.Packet{In: f.in, At: time.Now()}
	const hint = "deadlight explain 443/tcp, 53/udp, esp"
	if _, err := strconv.Atoi(what); err == nil {
		what += "/tcp"
	}
	var err error
	if p.Protocol, p.DstPort, err = rules.ParsePort(what); err != nil {
		return p, usageError(hint, "%w", err)
	}
	switch p.Protocol {
	case rules.ICMPv4:
		p.ICMPType = 8
	case rules.ICMPv6:
		p.ICMPType = 128
	}
	for _, a := range []struct {
		flag, text string
		into       *netip.Addr
	}{{"--from", f.from, &p.Src}, {"--to", f.to, &p.Dst}} {
		if a.text == "" {
			continue
		}
		if *a.into, err = netip.ParseAddr(a.text); err != nil || a.into.Zone() != "" || a.into.Is4In6() {
			return p, usageError("names are not resolved", "%s wants an address: %s", a.flag, strconv.Quote(a.text))
		}
	}
	if p.Src.IsValid() && p.Dst.IsValid() && p.Src.Is4() != p.Dst.Is4() {
		return p, usageError("", "--from and --to are of different families")
	}
	six := p.Protocol == rules.ICMPv6 || p.Src.Is6() || p.Dst.Is6()
	if !p.Src.IsValid() {
		p.Src = stranger(six)
	}
	if !p.Dst.IsValid() {
		p.Dst = nowhere(six)
	}
	return p, nil
}

// stranger is an address that a packet may come from and that hardly any rule
// names (RFC 5737, RFC 3849).
func stranger(six bool) netip.Addr {
	if six {
		return netip.MustParseAddr("2001:db8:ffff:ffff::77")
	}
	return netip.MustParseAddr("203.0.113.251")
}

// nowhere stands for one of the host's addresses.
func nowhere(six bool) netip.Addr {
	if six {
		return netip.MustParseAddr("2001:db8:ffff:fffe::77")
	}
	return netip.MustParseAddr("203.0.113.252")
}
