package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

func newAuditCommand(e env) *cobra.Command {
	var asJSON, probe bool
	c := &cobra.Command{
		Use:     "audit [POLICY]",
		GroupID: groupWatch,
		Short:   "Hold every listening socket against the policy and the running firewall",
		Long: `Lists every socket that listens, with its process, user and unit or container,
and says what the outside gets of it: by the policy, and by the rules that the
kernel runs, of every program. Then it lists what is published without a socket
here (DNAT, redirects), and what the policy opens though nobody listens.

  exposed as intended           the policy opens it, and the kernel admits it
  listens but filtered          no opening is for it
  loopback only                 only this host itself can reach it
  STOPPED                       the policy opens it, and some rule stops it
  REACHABLE THOUGH NOT LISTED   the kernel admits what the policy does not open

The rules are asked what they do to a stranger, and to those whom an opening
names, by each interface. Not seen: other protocols than TCP and UDP, and what
tables of legacy iptables, tc or XDP programs do (deadlight status lists them).

With --verify the ports of the list are probed from outside, as deadlight verify
does, and what the probes found stands beside each socket. A port that they found
otherwise than the policy says is a finding, also where the rules give no reason.

Exit codes: 0 as the policy says, 1 something is reachable though not listed, or
stopped though listed, 2 policy error, 3 could not tell, as without root.`,
		Example: "  sudo deadlight audit\n  sudo deadlight audit ./policy.toml\n  sudo deadlight audit --verify\n  sudo deadlight audit --json | jq '.findings[]'",
		Args:    atMostPolicy,
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	dir := stateFlag(c)
	c.Flags().BoolVar(&probe, "verify", false, "probe this host from outside, and say what was seen beside each socket")
	c.RunE = func(c *cobra.Command, args []string) error {
		rs, err := readPolicy(e, policyArg(args), "nothing audited")
		if err != nil {
			return err
		}
		rs = withThose(e, *dir, rs)
		a, err := auditHere(policyArg(args), rs)
		if err != nil {
			return kernelError(err, "deadlight audit "+policyArg(args))
		}
		if probe {
			if err := a.verify(c.Context(), e, rs); err != nil {
				return err
			}
		}
		if asJSON {
			err = writeJSON(e.stdout, a)
		} else {
			err = forPeople(e, a.print)
		}
		if code := a.code(); err == nil && code != exitOK {
			err = silently(code)
		}
		return err
	}
	return c
}

// auditJSON is the object of `audit --json`; the text is made from it.
type auditJSON struct {
	Schema int    `json:"schema"`
	Policy string `json:"policy"`
	Kernel bool   `json:"kernel"` // the running rules could be asked
	// Unenforced says that the policy has enforce = false: it would drop nothing.
	Unenforced bool          `json:"unenforced,omitempty"`
	Sockets    []socketJSON  `json:"sockets"`
	Findings   []findingJSON `json:"findings"`
	Notes      []string      `json:"notes"`
	Probe      *probeJSON    `json:"probe,omitempty"` // of --verify
}

// socketJSON is a socket, or a port that has none: one that is published, or
// opened though nobody listens.
type socketJSON struct {
	Protocol  string `json:"protocol"`  // tcp, udp or mptcp
	Address   string `json:"address"`   // "": there is no socket
	Interface string `json:"interface"` // that it is bound to; "": none
	V6Only    bool   `json:"v6only"`
	Port      uint16 `json:"port"`
	Ports     string `json:"ports,omitempty"` // without a socket: all of the run, "6000-6010"
	PID       int    `json:"pid"`             // 0: cannot be told
	Process   string `json:"process"`
	User      string `json:"user"`
	Unit      string `json:"unit"` // or container
	Verdict   string `json:"verdict"`
	Rule      string `json:"rule"` // the first opening that admits anybody
	Text      string `json:"text"` // the verdict for people
	// Knocked counts the packets to this port that no rule admitted, as far as they
	// are not forgotten.
	Knocked uint64 `json:"knocked,omitempty"`
	// Seen is what probes from outside showed of it, with --verify.
	Seen []seenJSON `json:"seen,omitempty"`

	listener listener
}

// findingJSON is what is not as the policy says.
type findingJSON struct {
	Kind     string `json:"kind"` // unlisted, stopped, or probed: only a probe shows it
	Protocol string `json:"protocol"`
	Address  string `json:"address"`
	Port     string `json:"port"`
	Process  string `json:"process"`
	Rule     string `json:"rule"`
	Fact     string `json:"fact"`
	Hint     string `json:"hint"`
}

// The verdicts on a socket.
const (
	auditExposed     = "exposed"     // the policy opens it, and so does the kernel
	auditWide        = "wide"        // so it is, but it listens on more than the policy opens
	auditFiltered    = "filtered"    // listens, and nothing opens it
	auditLoopback    = "loopback"    // only this host itself
	auditUnreachable = "unreachable" // no interface has an address of its family
	auditUnlisted    = "unlisted"    // reachable, and the policy does not open it
	auditStopped     = "stopped"     // the policy opens it, and the kernel stops it
	auditUnheard     = "unheard"     // the policy opens it, and nobody listens
	auditUnknown     = "unknown"     // cannot be told

	auditProbed = "probed" // a finding: a probe found it otherwise than the policy says
)

// auditHere audits the network namespace of the calling thread.
func auditHere(policy string, rs *rules.Ruleset) (_ *auditJSON, err error) {
	found, err := allListeners()
	if err != nil {
		return nil, err
	}
	at, err := nics()
	if err != nil {
		return nil, err
	}
	a := &auditor{rs: rs, nics: at, now: time.Now(), root: os.Geteuid() == 0}
	var runs []uint16
	conn, err := firewall.Dial(nil)
	if err == nil {
		defer func() { err = errors.Join(err, conn.Close()) }()
		runs, err = conn.PublishedRuns()
		a.asked.ask = conn.WalkAll
	}
	switch {
	case errors.Is(err, firewall.ErrPermission):
		a.asked.ask = nil
	case err != nil:
		return nil, err
	}
	out, err := a.audit(found, runs)
	if err != nil {
		return nil, err
	}
	out.Policy = policy
	if out.Unenforced = rs.Policy.Default.Observe; out.Unenforced {
		out.Notes = append(out.Notes, "NOTHING IS ENFORCED: the policy has enforce = false, and what it would drop gets through: deadlight status lists who knocked")
	}
	if out.Kernel {
		k, err := conn.Knocks(rules.TableName)
		if err != nil {
			return nil, err
		}
		out.knocked(k)
	}
	for i := range out.Sockets {
		s := &out.Sockets[i]
		if s.Address != "" {
			s.User, s.Unit = userOf("/proc", s.PID, s.listener.UID), unitOf("/proc", s.PID)
		}
	}
	return out, nil
}

// knocked fills in how often each socket was knocked at in vain, or would have been
// if the policy were enforced.
func (a *auditJSON) knocked(k *firewall.Knocks) {
	for i := range a.Sockets {
		s := &a.Sockets[i]
		if s.Address == "" || s.Verdict == auditLoopback {
			continue
		}
		for _, p := range k.Ports {
			if p.Protocol == s.listener.Protocol && p.Port == s.Port {
				s.Knocked = p.Packets
				s.Text += "; " + plural(int(p.Packets), "packet") + " came that no rule admits"
			}
		}
	}
}

// auditor holds sockets against a policy and the running rules.
type auditor struct {
	rs    *rules.Ruleset
	nics  []nic
	now   time.Time
	root  bool
	asked inquiry // its ask is nil when the running rules cannot be read
}

// view is one packet on its way to a socket.
type view struct {
	packet   rules.Packet
	decision rules.Decision
	journey  *firewall.Journey
}

// isUnlisted reports whether the kernel admits what the policy does not.
func isUnlisted(v *view) bool {
	return accepts(v.journey) && v.decision.Outcome != rules.OutcomeOpen
}

// isStopped reports whether the kernel stops what the policy admits.
func isStopped(v *view) bool {
	return !unsure(v.journey) && !accepts(v.journey) && v.decision.Outcome == rules.OutcomeOpen
}

func (a *auditor) audit(found []listener, runs []uint16) (*auditJSON, error) {
	published := a.candidates(found, runs)
	for _, l := range slices.Concat(found, published) {
		for _, p := range a.packets(l) {
			a.asked.note(p)
		}
	}
	out := &auditJSON{Schema: 1, Kernel: a.asked.ask != nil, Sockets: []socketJSON{}, Findings: []findingJSON{}, Notes: []string{}}
	if out.Kernel {
		left, err := a.asked.run()
		if err != nil {
			return nil, err
		}
		if left > 0 {
			out.Notes = append(out.Notes, fmt.Sprintf("the running rules were not asked about %s: too many", plural(left, "packet")))
		}
		for _, j := range a.asked.answers {
			for _, n := range j.Notes {
				if strings.HasPrefix(n, "not walked") && !slices.Contains(out.Notes, n) {
					out.Notes = append(out.Notes, n)
				}
			}
		}
	} else {
		out.Notes = append(out.Notes, "the kernel's rules are not visible without root: what the policy says is all that is known")
	}
	hidden := 0
	for _, l := range found {
		s := a.judge(l)
		if s.PID == 0 && !a.root && l.Inode != 0 {
			hidden++
		}
		out.Sockets = append(out.Sockets, s)
	}
	if hidden > 0 {
		out.Notes = append(out.Notes, fmt.Sprintf("%s: process not visible without root", plural(hidden, "socket")))
	}
	out.Sockets = append(out.Sockets, a.published(published, out.Sockets)...)
	out.Sockets = append(out.Sockets, a.unheard(out.Sockets)...)
	slices.SortStableFunc(out.Sockets, func(x, y socketJSON) int {
		return cmp.Or(cmp.Compare(x.listener.Protocol, y.listener.Protocol), cmp.Compare(x.Port, y.Port))
	})
	for _, s := range out.Sockets {
		if s.Verdict == auditUnlisted || s.Verdict == auditStopped {
			out.Findings = append(out.Findings, a.finding(s))
		}
	}
	return out, nil
}

// packets are those that show what the outside gets of a socket: on each way, from
// a stranger and from those whom the openings of the port name.
func (a *auditor) packets(l listener) []rules.Packet {
	var out []rules.Packet
	for _, v4 := range []bool{true, false} {
		for _, e := range l.entries(a.nics, v4) {
			out = append(out, e.packet(l.Protocol, l.Port, e.from(), a.now))
			for _, o := range a.rs.OpensAt(l.Protocol, l.Port) {
				out = append(out, a.named(o, e, l)...)
			}
		}
	}
	return out
}

// named gives packets of those whom an opening names: the first two that it is about.
func (a *auditor) named(o *rules.Open, e entry, l listener) []rules.Packet {
	const most, look = 2, 16
	var out []rules.Packet
	try := func(r rules.AddrRange) {
		for _, src := range []netip.Addr{r.Lo, r.Hi} {
			p := e.packet(l.Protocol, l.Port, src, a.now)
			if len(out) < most && src.Is4() == e.dst.Is4() && a.rs.Matches(&o.Traffic, p) && !slices.Contains(out, p) {
				out = append(out, p)
			}
		}
	}
	for i, r := range o.From.Ranges {
		if i < look {
			try(r)
		}
	}
	for _, name := range o.From.Sets {
		ranges := a.rs.Policy.Set(name).Ranges.Of(e.dst.Is4())
		for i := range min(look, ranges.Len()) {
			try(ranges.At(i))
		}
	}
	return out
}

func (a *auditor) views(l listener) []view {
	var out []view
	for _, p := range a.packets(l) {
		out = append(out, view{p, a.rs.Decide(p), a.asked.answer(p)})
	}
	return out
}

// judge gives the verdict on a socket.
func (a *auditor) judge(l listener) socketJSON {
	s := socketJSON{
		Protocol: l.Protocol.String(), Address: l.Addr.String(), Interface: l.Device, V6Only: l.V6Only,
		Port: l.Port, PID: l.PID, Process: l.Comm, listener: l,
	}
	if l.MPTCP {
		s.Protocol = "mptcp"
	}
	views := a.views(l)
	switch {
	case l.loopback():
		s.Verdict, s.Text = auditLoopback, "loopback only"
	case len(views) == 0 && l.Device != "":
		s.Verdict, s.Text = auditUnreachable, "not reachable: its interface has no such address"
	case len(views) == 0:
		s.Verdict, s.Text = auditUnreachable, "not reachable: no interface has such an address"
	default:
		a.compare(&s, views)
	}
	return s
}

// compare fills in the verdict of what the views show.
func (a *auditor) compare(s *socketJSON, views []view) {
	opened := map[string]bool{}
	var unlisted, stopped, unclear *view
	for i := range views {
		v := &views[i]
		if v.decision.Outcome == rules.OutcomeOpen {
			opened[v.decision.Rule] = true
			s.Rule = cmp.Or(s.Rule, v.decision.Rule)
		}
		switch {
		case unsure(v.journey):
			unclear = cmp.Or(unclear, v)
		case isUnlisted(v):
			unlisted = cmp.Or(unlisted, v)
		case isStopped(v):
			stopped = cmp.Or(stopped, v)
		}
	}
	words, limited := a.words(s.listener, opened)
	switch {
	case a.asked.ask == nil && len(opened) > 0:
		s.Verdict, s.Text = auditUnknown, "the policy opens it: "+words+"; the kernel's rules are not visible without root"
	case a.asked.ask == nil:
		s.Verdict, s.Text = auditUnknown, "the policy does not open it; the kernel's rules are not visible without root"
	case unlisted != nil:
		s.Verdict, s.Text = auditUnlisted, "REACHABLE THOUGH NOT LISTED: "+whence(unlisted, views, isUnlisted)+why(unlisted)
		if len(opened) > 0 {
			s.Text += "; the policy opens it " + words
		}
	case stopped != nil:
		s.Verdict, s.Text = auditStopped, fmt.Sprintf("STOPPED, though the policy opens it %s: %s", words, whence(stopped, views, isStopped)+stepText(stopped.journey.By))
	case unclear != nil && unclear.journey == nil:
		s.Verdict, s.Text = auditUnknown, "cannot be told: too many packets to ask about"
	case unclear != nil:
		s.Verdict, s.Text = auditUnknown, "cannot be told: it hinges on "+stepText(unclear.journey.By)
	case len(opened) > 0 && s.listener.Addr.IsUnspecified() && s.listener.Device == "" && limited:
		s.Verdict, s.Text = auditWide, "exposed as intended: "+words+"; it listens on every address, though the policy opens it on some only"
	case len(opened) > 0:
		s.Verdict, s.Text = auditExposed, "exposed as intended: "+words
	default:
		s.Verdict, s.Text = auditFiltered, "listens but filtered: no rule opens it"
		if a.rs.Policy.Default.Input == rules.Reject {
			s.Text = "listens but rejected: no rule opens it"
		}
		for _, o := range a.rs.OpensAt(s.listener.Protocol, s.listener.Port) {
			if !o.Any {
				s.Text = strings.Replace(s.Text, "no rule opens it", fmt.Sprintf("%q opens it for nobody who comes here now", o.Name), 1)
			}
		}
	}
}

// words says to whom openings open a socket; limited says that each is for some
// interfaces or addresses only.
func (a *auditor) words(l listener, opened map[string]bool) (text string, limited bool) {
	o := &outlook{rs: a.rs}
	var parts []string
	limited = true
	v4only, v6only := true, true
	for _, op := range a.rs.OpensAt(l.Protocol, l.Port) {
		if !opened[op.Name] {
			continue
		}
		limited = limited && (len(op.Interfaces) > 0 || !op.To.Any)
		var whom []string
		for _, v4 := range []bool{true, false} {
			if who, _, ok := o.who(&op.Traffic, v4); ok && l.takes(v4) {
				v4only, v6only = v4only && v4, v6only && !v4
				if !slices.Contains(whom, who) {
					whom = append(whom, who)
				}
			}
		}
		parts = append(parts, fmt.Sprintf("to %s %q", strings.Join(whom, ", "), op.Name))
	}
	if opened[""] { // not by an opening: an answer to the DHCP client
		parts, limited = append(parts, "by what is always admitted"), false
	}
	text = strings.Join(parts, ", ")
	switch {
	case l.takes(true) && l.takes(false) && v4only:
		text += ", over IPv4 only"
	case l.takes(true) && l.takes(false) && v6only:
		text += ", over IPv6 only"
	}
	return text, limited
}

// whence says of whom a view is, where it is not a stranger's, and which way the
// like of it come, where others come another.
func whence(v *view, all []view, alike func(*view) bool) string {
	var by []string
	others := false
	for i := range all {
		o := &all[i]
		switch {
		case !alike(o):
			others = others || !slices.ContainsFunc(all, func(x view) bool { return x.packet.In == o.packet.In && alike(&x) })
		case o.packet.In != "" && !slices.Contains(by, o.packet.In):
			by = append(by, o.packet.In)
		}
	}
	var parts []string
	if v.packet.Src != (entry{dst: v.packet.Dst}).from() {
		parts = append(parts, "from "+v.packet.Src.String())
	}
	if others && len(by) > 0 {
		parts = append(parts, "by "+strings.Join(by, ", "))
	}
	if parts == nil {
		return ""
	}
	return strings.Join(parts, " ") + ": "
}

// why says what lets a packet in.
func why(v *view) string {
	j := v.journey
	var text string
	switch {
	case j.Moved && j.Target.IsValid():
		text = fmt.Sprintf("%s sends it on to %s", mover(j), j.Target)
	case j.Moved:
		text = mover(j) + " sends it on"
	case v.decision.Observed:
		text = "enforce = false, nothing is filtered"
	case j.By.Table == "":
		text = "no table filters it"
	default:
		text = stepText(j.By)
	}
	return text
}

// candidates are the runs of ports that tables of others may send on, as if a
// socket listened on the first port of each.
func (a *auditor) candidates(found []listener, runs []uint16) []listener {
	if runs == nil {
		return nil
	}
	var out []listener
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
		cuts := slices.Clone(runs)
		cut := func(r rules.PortRange) {
			cuts = append(cuts, r.Lo)
			if r.Hi < 65535 {
				cuts = append(cuts, r.Hi+1)
			}
		}
		eachNamed(a.rs.Policy, p, cut)
		for _, l := range found {
			if l.Protocol == p {
				cut(rules.PortRange{Lo: l.Port, Hi: l.Port})
			}
		}
		slices.Sort(cuts)
		for _, lo := range slices.Compact(cuts) {
			out = append(out, listener{Protocol: p, Addr: netip.IPv6Unspecified(), Port: lo})
		}
	}
	return out
}

// published lists the candidates that are in fact sent on, and that no socket
// stands for.
func (a *auditor) published(candidates []listener, sockets []socketJSON) []socketJSON {
	var out []socketJSON
	for i, l := range candidates {
		var views []view
		for _, v := range a.views(l) {
			if v.journey != nil && v.journey.Moved && v.journey.Verdict != firewall.WalkDrop && v.journey.Verdict != firewall.WalkReject &&
				!slices.ContainsFunc(sockets, func(s socketJSON) bool { return s.standsFor(v.packet) }) {
				views = append(views, v)
			}
		}
		if len(views) == 0 {
			continue
		}
		hi := uint16(65535)
		if i+1 < len(candidates) && candidates[i+1].Protocol == l.Protocol {
			hi = candidates[i+1].Port - 1
		}
		s := socketJSON{Protocol: l.Protocol.String(), Port: l.Port, Ports: rules.PortRange{Lo: l.Port, Hi: hi}.String(), listener: l}
		a.compare(&s, views)
		if s.Verdict == auditExposed || s.Verdict == auditWide {
			s.Verdict, s.Text = auditExposed, strings.TrimSuffix(s.Text, "; it listens on every address, though the policy opens it on some only")+"; "+mover(views[0].journey)+" sends it on"
		}
		if n := len(out) - 1; n >= 0 && out[n].follows(s) {
			out[n].Ports = rules.PortRange{Lo: out[n].Port, Hi: hi}.String()
			continue
		}
		out = append(out, s)
	}
	return out
}

// standsFor reports whether a packet is for a socket that is listed.
func (s *socketJSON) standsFor(p rules.Packet) bool {
	l := s.listener
	return s.Address != "" && l.Protocol == p.Protocol && l.Port == p.DstPort && !l.loopback() &&
		(l.Addr == p.Dst || l.Addr.IsUnspecified() && l.takes(p.Dst.Is4())) && (l.Device == "" || l.Device == p.In)
}

// follows reports whether the next run says the same, and begins where this ends.
func (s *socketJSON) follows(next socketJSON) bool {
	_, hi, found := strings.Cut(s.Ports, "-")
	if !found {
		hi = s.Ports
	}
	return s.Protocol == next.Protocol && s.Text == next.Text && hi == fmt.Sprint(next.Port-1)
}

// unheard lists the ports that the policy opens though nobody listens.
func (a *auditor) unheard(sockets []socketJSON) []socketJSON {
	type key struct {
		p    rules.Protocol
		port int
	}
	heard, local := map[key]bool{}, map[key]bool{}
	for _, s := range sockets {
		first, last := s.run()
		for n := first; n <= last; n++ {
			if s.Verdict == auditLoopback {
				local[key{s.listener.Protocol, n}] = true
			} else {
				heard[key{s.listener.Protocol, n}] = true
			}
		}
	}
	var out []socketJSON
	for i := range a.rs.Policy.Open {
		o := &a.rs.Policy.Open[i]
		if o.Any || !o.Expires.IsZero() && !a.now.Before(o.Expires) {
			continue
		}
		for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
			for _, r := range o.Ports(p) {
				for lo := int(r.Lo); lo <= int(r.Hi); lo++ {
					hi := lo
					for hi <= int(r.Hi) && !heard[key{p, hi}] && local[key{p, hi}] == local[key{p, lo}] {
						hi++
					}
					if hi == lo {
						continue
					}
					text := "open in the policy but nobody listens"
					if local[key{p, lo}] {
						text = "open in the policy but it listens on loopback only"
					}
					out = append(out, socketJSON{
						Protocol: p.String(), Port: uint16(lo), Ports: rules.PortRange{Lo: uint16(lo), Hi: uint16(hi - 1)}.String(),
						Verdict: auditUnheard, Rule: o.Name, Text: fmt.Sprintf("%s: %q", text, o.Name),
						listener: listener{Protocol: p, Port: uint16(lo)},
					})
					lo = hi - 1
				}
			}
		}
	}
	return out
}

// finding says what to do about a socket.
func (a *auditor) finding(s socketJSON) findingJSON {
	port := cmp.Or(s.Ports, fmt.Sprint(s.Port))
	f := findingJSON{Kind: s.Verdict, Protocol: s.Protocol, Address: s.Address, Port: port, Process: s.Process, Rule: s.Rule, Fact: s.Text}
	explain := fmt.Sprintf("deadlight explain %d/%s --live", s.Port, s.listener.Protocol)
	switch {
	case s.Verdict == auditStopped:
		f.Hint = "which program keeps that rule? deadlight status lists what stops the policy; " + explain
	case a.rs.Policy.Default.Observe:
		f.Hint = "list it, or enforce the policy: enforce = true in [default]"
	case !a.inForce():
		f.Hint = "no table of deadlight is loaded: sudo deadlight apply; until then bind it to 127.0.0.1, or stop it"
	default:
		f.Hint = "is it meant? list it in the policy, or see what admits it: sudo " + explain
	}
	return f
}

// inForce reports whether a packet met Deadlight's own table.
func (a *auditor) inForce() bool {
	return slices.ContainsFunc(a.asked.answers, func(j *firewall.Journey) bool {
		return slices.ContainsFunc(j.Steps, func(s firewall.Step) bool { return s.Family == "inet" && s.Table == rules.TableName })
	})
}

// code is the exit code: a finding outweighs what could not be told.
func (a *auditJSON) code() int {
	switch {
	case len(a.Findings) > 0:
		return exitFindings
	case !a.Kernel || a.Probe != nil && a.Probe.Verdict != verify.Pass || slices.ContainsFunc(a.Sockets, func(s socketJSON) bool { return s.Verdict == auditUnknown }):
		return exitRefused
	}
	return exitOK
}
