package verify

// How the odd probes are set up for a run, and what they are worth in its report.

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"deadlight/rules"
)

// OddProbes tells of the adversarial probes of a run.
type OddProbes struct {
	Packets   uint64    `json:"packets"` // canaries among them
	Addresses []string  `json:"addresses"`
	Kinds     []OddKind `json:"kinds"`
}

// OddKind is one kind of adversarial probe.
type OddKind struct {
	Name    string `json:"name"`
	Packets uint64 `json:"packets"`
	// Answered counts the probes that came through against the policy.
	Answered int `json:"answered"`
	// Control tells whether the kind drew an answer where the policy opens a port:
	// "answered", "silent", or "none" where nothing must answer it.
	Control string `json:"control"`
}

// oddShare is the part of a sweep's packets that odd probes may add.
const oddShare = 10

// oddBudget bounds the odd packets beside the sweeps of some views: each port of
// a sweep is probed at least once.
func oddBudget(views []View) int {
	n := 0
	for i := range views {
		if views[i].Sweep {
			n += len(views[i].Path.TCP) + len(views[i].Path.UDP)
		}
	}
	return n / oddShare
}

func sweptPorts(views []View) (p Ports) {
	for i := range views {
		if v := &views[i]; v.Sweep {
			return Ports{v.Path.TCP, v.Path.UDP}
		}
	}
	return p
}

func taken(views []View) map[uint16]bool {
	out := map[uint16]bool{}
	for i := range views {
		out[views[i].Path.SrcPort] = true
	}
	return out
}

// oddViews has one view for every address that the throw-away host listens at,
// those that the kernel gave it included.
func oddViews(w *World, rs *rules.Ruleset, outlook *Outlook) ([]View, error) {
	type address struct {
		in string
		netip.Addr
	}
	var addresses []address
	if err := w.Host(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			list, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, x := range list {
				if a, ok := netip.AddrFromSlice(x.IP); ok && !a.Unmap().IsLoopback() {
					addresses = append(addresses, address{l.Attrs().Name, a.Unmap()})
				}
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	var out []View
	for _, a := range addresses {
		i := slices.IndexFunc(outlook.Views, func(v View) bool { return v.Sweep && v.Path.Dst.Is4() == a.Is4() })
		if i < 0 || w.Link(a.in).Index == 0 {
			continue
		}
		swept := &outlook.Views[i]
		if swept.Path.Dst == a.Addr {
			out = append(out, *swept)
			out[len(out)-1].Path.Link = w.Link(a.in)
			continue
		}
		v := View{In: a.in, Path: Path{Link: w.Link(a.in), Src: swept.Path.Src, Dst: a.Addr}}
		if a.IsLinkLocalUnicast() {
			v.Path.Src = netip.MustParseAddr(gateway6) // the only neighbour it knows there
		}
		v.Path.Canaries = canaries(newExpecter(rs, &v), &v.Path)
		out = append(out, v)
	}
	return out, nil
}

// rehearse sends the odd probes to the throw-away host, and then those across
// reloads. It gives what the witness counted until then.
func (o *odd) rehearse(ctx context.Context, w *World, cfg RehearseConfig) (_ *oddProof, err error) {
	var wait time.Duration
	if err := w.Host(func() error {
		wait = reassemblyTime(true)
		return nil
	}); err != nil {
		return nil, err
	}
	if o.witness, err = armOddWitness(w.Host, o.sources(), o.marks()); err != nil {
		return nil, err
	}
	if err := o.open(); err != nil {
		return nil, errors.Join(err, o.witness.remove())
	}
	err = o.run(ctx, wait)
	var proof *oddProof
	if err == nil {
		proof, err = o.witness.proof()
	}
	if err := errors.Join(err, o.witness.remove()); err != nil {
		return nil, err
	}
	reload := cfg.Reload
	if reload == nil {
		reload = cfg.Load
	}
	return proof, o.across(ctx, func() error { return w.Host(reload) })
}

// Reassembly times of Linux (IP_FRAG_TIME and IPV6_FRAG_TIMEOUT), and what is
// added to them for the packet that tells of their end.
const (
	reassembly4 = 30 * time.Second
	reassembly6 = 60 * time.Second
	afterwards  = time.Second
)

// reassemblyTime says after which time the host of the calling thread has given up on
// fragments. A throw-away host may be made to do so soon: rules do not see the
// difference.
func reassemblyTime(shorten bool) time.Duration {
	const soon = 1
	wait := time.Duration(0)
	for path, usual := range map[string]time.Duration{
		"ipv4/ipfrag_time": reassembly4, "ipv6/ip6frag_time": reassembly6, "netfilter/nf_conntrack_frag6_timeout": reassembly6,
	} {
		file := filepath.Join("/proc/sys/net", path)
		if _, err := os.Stat(file); err != nil {
			continue // the family, or connection tracking of it, is not there
		}
		if shorten {
			_ = os.WriteFile(file, []byte(strconv.Itoa(soon)), 0o644) // where it is refused, we wait
		}
		b, err := os.ReadFile(file)
		if n, bad := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && bad == nil {
			usual = time.Duration(n) * time.Second
		}
		wait = max(wait, usual)
	}
	return wait + afterwards
}

// lookOdd sends the odd probes of [Look] behind its sweep.
func lookOdd(ctx context.Context, cfg LookConfig, views []View) (*odd, error) {
	if cfg.Thorough <= 0 {
		return nil, nil
	}
	o := planOdd(oddConfig{
		rules: cfg.Rules, views: views, swept: cfg.Ports, all: len(cfg.Ports.TCP) == 65535 && len(cfg.Ports.UDP) == 65535,
		level: cfg.Thorough, budget: oddBudget(views), taken: taken(views), maxRate: cfg.MaxRate,
	})
	if err := o.open(); err != nil {
		return nil, err
	}
	defer o.close()
	wait := reassembly4
	if slices.ContainsFunc(cfg.Targets, netip.Addr.Is6) {
		wait = reassembly6
	}
	return o, o.run(ctx, wait+afterwards)
}

// odd judges the odd probes of a run.
func (j *judge) odd(o *odd, res *Result) {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := &OddProbes{Packets: o.packets, Addresses: []string{}, Kinds: []OddKind{}}
	j.report.Odd = r
	j.report.Probes += o.packets
	j.report.Seconds += o.elapsed.Seconds()
	kinds := map[string]*OddKind{}
	var order []string
	known := j.knownHoles()
	lost, seen := map[oddLoss]*oddProbe{}, map[string]bool{}
	for _, x := range o.probes {
		k := kinds[x.kind.name]
		if k == nil {
			k = &OddKind{Name: x.kind.name, Control: "none"}
			kinds[x.kind.name] = k
			order = append(order, x.kind.name)
		}
		k.Packets += x.sent
		if to := x.dst.String(); !slices.Contains(r.Addresses, to) {
			r.Addresses = append(r.Addresses, to)
		}
		a := j.oddAnswer(x)
		switch {
		case x.control && x.answers > 0:
			k.Control = "answered"
		case x.control && k.Control == "none":
			k.Control = "silent"
			seen[x.kind.name] = x.arrived // so that nothing on the way drops them
		case x.control, known[hole{x.dst.Is4(), x.proto.String(), x.dport}]:
		case a.State == Unknown:
			lost[oddLoss{x.kind.name, x.view}] = x
		case x.listed:
			j.oddListed(x, a)
		case a.Reason == NoResponse: // nor is a refusal that got lost a finding
		case !x.expect.agrees(a, x.proto):
			k.Answered++
			j.oddFinding(x, a)
		}
	}
	var silent []string
	for _, name := range order {
		r.Kinds = append(r.Kinds, *kinds[name])
		if kinds[name].Control == "silent" && !seen[name] {
			silent = append(silent, name)
		}
	}
	if len(silent) > 0 {
		j.report.Notes = append(j.report.Notes, "silent also where the policy opens a port, so that something on the way may drop them: "+strings.Join(silent, ", "))
	}
	if o.routers > 0 {
		j.report.Notes = append(j.report.Notes, fmt.Sprintf("%s to odd probes came from somebody who is not the host", count(o.routers, "ICMP error", "ICMP errors")))
	}
	for i := range o.cfg.views {
		j.oddPath(o, i, res, lost)
	}
}

// oddLoss is a kind of which a probe to a view did not come to the host.
type oddLoss struct {
	kind string
	view int
}

// oddAnswer is what a probe showed, by what came back or else by what the witness
// counted. It is unknown where there is a witness that did not see it arrive.
func (j *judge) oddAnswer(x *oddProbe) Answer {
	if x.answers > 0 {
		return x.answer
	}
	if j.cfg.HostProof == nil || j.cfg.HostProof.odd == nil || x.kind.reload || x.kind.early {
		return Answer{Filtered, NoResponse}
	}
	p, m := j.cfg.HostProof.odd, x.mark()
	passed := p.passed[m]
	if m.ipv6 && x.kind.pieces && p.whole[m] == p.arrived[m] && passed < x.sent {
		passed = 0 // not all fragments, and nobody has put them together yet
	}
	switch {
	case passed > 0:
		return Answer{Closed, PassedFirewall}
	case p.gate[m] > 0 && !j.cfg.Rules.Policy.Default.IgnorePublished:
		return Answer{Filtered, PassedGate}
	case !x.arrived:
		return Answer{Unknown, PathNotProven}
	}
	return Answer{Filtered, NoResponse}
}

// oddListed judges a protocol, or a port of SCTP, that the policy opens. An answer
// other than a refusal shows that it is, and so does a passage.
func (j *judge) oddListed(x *oddProbe, a Answer) {
	j.report.listed = append(j.report.listed, x.proto)
	if a.State != Open && a.State != Closed {
		j.oddFinding(x, a)
	}
}

// hole is a port that the sweep found not as the policy says.
type hole struct {
	v4       bool
	protocol string
	port     uint16
}

// knownHoles are what odd probes need not tell again.
func (j *judge) knownHoles() map[hole]bool {
	out := map[hole]bool{}
	for _, f := range j.report.Findings {
		if f.Observed != Unknown {
			out[hole{f.Family == "ipv4", f.Protocol, f.Port}] = true
		}
	}
	return out
}

// oddPath tells where the silence of odd probes proves nothing: without a witness that
// of a path which did not live throughout, with one that of what it did not see arrive.
func (j *judge) oddPath(o *odd, view int, res *Result, lost map[oddLoss]*oddProbe) {
	v := &o.cfg.views[view]
	alive := o.paths[view].alive && o.paths[view].unsent == 0
	probes, arrived, early := 0, false, false
	for _, x := range o.probes {
		if x.view == view {
			probes, arrived, early = probes+1, arrived || x.arrived, early || x.kind.early
		}
	}
	switch {
	case probes == 0:
		return
	case o.witness == nil && alive:
		return
	case arrived:
		if early && !alive {
			j.report.Notes = append(j.report.Notes, fmt.Sprintf("options that %s refuses ahead of every rule: their silence proves nothing, no canary answered", v.Path.Dst))
		}
		j.oddLost(v, view, lost)
		return
	}
	for i := range j.cfg.Views {
		if w := &j.cfg.Views[i]; w.Sweep && w.Path.Dst == v.Path.Dst && !res.Paths[i].Alive {
			j.report.Notes = append(j.report.Notes, fmt.Sprintf("odd probes to %s: their silence proves nothing, no canary answered", v.Path.Dst))
			return // the sweep says so too, port by port
		}
	}
	j.oddUnknown(v, "any", "odd probes", Expectation{Outcome: rules.OutcomeFiltered}, PathNotProven.String())
}

// oddLost names the kinds of which some probe to a view never arrived, though others did.
func (j *judge) oddLost(v *View, view int, lost map[oddLoss]*oddProbe) {
	var kinds []string
	for l := range lost {
		if l.view == view {
			kinds = append(kinds, l.kind)
		}
	}
	slices.Sort(kinds)
	for _, kind := range kinds {
		x := lost[oddLoss{kind, view}]
		j.oddUnknown(v, x.proto.String(), kind, x.expect, "not all of them arrived at the host")
	}
}

// oddUnknown reports that nothing can be said.
func (j *judge) oddUnknown(v *View, protocol, kind string, x Expectation, reason string) {
	j.report.Findings = append(j.report.Findings, Finding{
		Family: familyOf(v.Path.Dst), Address: v.Path.Dst.String(), Protocol: protocol, Probe: kind + " from " + v.Path.Src.String(),
		Expected: x.Outcome.String(), Observed: Unknown, Reason: reason, Rule: x.Rule, Interface: v.In, Odd: kind, source: v.Path.Src.String(),
	})
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "ipv4"
	}
	return "ipv6"
}

// oddFinding reports a probe that is not as the policy says.
func (j *judge) oddFinding(x *oddProbe, a Answer) {
	f := Finding{
		Family: familyOf(x.dst), Address: x.dst.String(), Protocol: x.proto.String(), Port: x.dport,
		Odd: x.kind.name, Expected: x.expect.Outcome.String(), Observed: a.State, Reason: a.Reason.String(),
		Rule: x.expect.Rule, Interface: j.inOf(x), source: x.src.String(),
	}
	f.Probe = f.Odd + " from " + f.source
	if f.Interface != "" {
		f.Probe += " by " + f.Interface
	}
	if x.answers > 0 && x.from != x.dst {
		f.Reason += " from " + x.from.String()
	}
	if x.kind.reload {
		f.Reason += fmt.Sprintf(", %s in %s", count(x.answers, "answer", "answers"), count(int(x.sent), "probe", "probes"))
	}
	j.report.Findings = append(j.report.Findings, f)
}

func (j *judge) inOf(x *oddProbe) string { return j.cfg.odd.cfg.views[x.view].In }

// oddText is the line of the odd probes, where there were any.
func (r *Report) oddText(b *strings.Builder) {
	if r.Odd == nil {
		return
	}
	answered := 0
	for _, k := range r.Odd.Kinds {
		if k.Answered > 0 {
			answered++
		}
	}
	outcome := "none got through"
	switch {
	case answered == 0 && r.Verdict == Fail:
		outcome = "no more than the rest of the report tells"
	case answered == 0 && r.Verdict == Inconclusive:
		outcome = "no answer that should not be"
	case answered > 0:
		outcome = count(answered, "kind", "kinds") + " got through"
	}
	fmt.Fprintf(b, "       %-14s %s, %s to %s: %s\n", "odd probes", count(len(r.Odd.Kinds), "kind", "kinds"),
		count(int(r.Odd.Packets), "packet", "packets"), count(len(r.Odd.Addresses), "address", "addresses"), outcome)
}

// oddNote says what a level of --thorough leaves out.
func oddNote(level int) string {
	switch {
	case level <= 0:
		return "no adversarial probes (--thorough 0): other flags, source ports, fragments, IP options, extension headers, protocols and addresses"
	case level == 1:
		return "not probed at --thorough 1: a lone first fragment, to which a host may answer half a minute later"
	}
	return ""
}
