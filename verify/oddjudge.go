package verify

// How the odd probes are set up for a run, and what they are worth in its report.

import (
	"context"
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

// rest sends what a tripwire must not stand beside, and probes across reloads.
func (o *odd) rest(ctx context.Context, w *World, cfg RehearseConfig) error {
	var wait time.Duration
	if err := w.Host(func() error {
		wait = shortenReassembly()
		return nil
	}); err != nil {
		return err
	}
	if err := o.run(ctx, oddBare, wait); err != nil {
		return err
	}
	reload := cfg.Reload
	if reload == nil {
		reload = cfg.Load
	}
	return o.across(ctx, func() error { return w.Host(reload) })
}

// Reassembly times of Linux (IP_FRAG_TIME and IPV6_FRAG_TIMEOUT), and what is
// added to them for the packet that tells of their end.
const (
	reassembly4 = 30 * time.Second
	reassembly6 = 60 * time.Second
	afterwards  = time.Second
)

// shortenReassembly makes the throw-away host give up on fragments soon, and says
// when it will have: rules do not see the difference.
func shortenReassembly() time.Duration {
	const soon = 1
	wait := time.Duration(0)
	for path, usual := range map[string]time.Duration{
		"ipv4/ipfrag_time": reassembly4, "ipv6/ip6frag_time": reassembly6, "netfilter/nf_conntrack_frag6_timeout": reassembly6,
	} {
		file := filepath.Join("/proc/sys/net", path)
		if _, err := os.Stat(file); err != nil {
			continue // the family, or connection tracking of it, is not there
		}
		_ = os.WriteFile(file, []byte(strconv.Itoa(soon)), 0o644) // where it is refused, we wait
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
	for _, stage := range []oddStage{oddBeside, oddBare} {
		if err := o.run(ctx, stage, wait+afterwards); err != nil {
			return nil, err
		}
	}
	return o, nil
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
	passed, open := map[Passage][]*oddProbe{}, map[Passage]bool{}
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
		if x.control || x.listed {
			for _, key := range x.passages() {
				open[key] = true
			}
		}
		switch {
		case x.control && x.answers > 0:
			k.Control = "answered"
		case x.control && k.Control == "none":
			k.Control = "silent"
		case x.listed:
			j.oddListed(o, x)
		case x.control, known[hole{x.dst.Is4(), x.proto.String(), x.dport}]:
		case x.answers > 0:
			if !x.expect.agrees(x.answer, x.proto) {
				k.Answered++
				j.oddFinding([]*oddProbe{x}, x.answer)
				for _, key := range x.passages() {
					open[key] = true // what passed was this one, as far as the tripwire can tell
				}
			}
		case j.cfg.HostProof != nil && x.kind.stage == oddBeside:
			for _, key := range x.passages() {
				passed[key] = append(passed[key], x)
			}
		}
	}
	for key, probes := range passed {
		var a Answer
		switch {
		case open[key]: // another one, from the same port: the tripwire cannot tell them apart
			continue
		case j.cfg.HostProof.Passed[key]:
			a = Answer{Closed, PassedFirewall}
		case j.cfg.HostProof.Gate[key] && !j.cfg.Rules.Policy.Default.IgnorePublished:
			a = Answer{Filtered, PassedGate}
		default:
			continue
		}
		j.oddFinding(probes, a)
		for _, x := range probes {
			kinds[x.kind.name].Answered++
		}
	}
	var silent []string
	for _, name := range order {
		r.Kinds = append(r.Kinds, *kinds[name])
		if kinds[name].Control == "silent" {
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
		j.oddPath(o, i, res)
	}
}

// oddListed judges a protocol, or a port of SCTP, that the policy opens.
func (j *judge) oddListed(o *odd, x *oddProbe) {
	if j.cfg.HostProof == nil {
		return
	}
	for _, key := range x.passages() {
		if x.answers > 0 && x.answer.State != Rejected || j.cfg.HostProof.Passed[key] {
			j.report.listed = append(j.report.listed, x.proto)
			return
		}
	}
	if o.paths[x.view].alive {
		j.report.listed = append(j.report.listed, x.proto)
		a := Answer{Filtered, NoResponse}
		if x.answers > 0 {
			a = x.answer
		}
		j.oddFinding([]*oddProbe{x}, a)
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

// oddPath tells where the silence of odd probes proves nothing.
func (j *judge) oddPath(o *odd, view int, res *Result) {
	if o.paths[view].alive && o.paths[view].unsent == 0 || o.arrived(view, j.cfg.HostProof) {
		return
	}
	v := &o.cfg.views[view]
	for i := range j.cfg.Views {
		if w := &j.cfg.Views[i]; w.Sweep && w.Path.Dst == v.Path.Dst && !res.Paths[i].Alive {
			j.report.Notes = append(j.report.Notes, fmt.Sprintf("odd probes to %s: their silence proves nothing, no canary answered", v.Path.Dst))
			return // the sweep says so too, port by port
		}
	}
	j.report.Findings = append(j.report.Findings, Finding{
		Family: familyOf(v.Path.Dst), Address: v.Path.Dst.String(), Protocol: "any", Probe: "odd probes from " + v.Path.Src.String(),
		Expected: rules.OutcomeFiltered.String(), Observed: Unknown, Reason: PathNotProven.String(), Interface: v.In, Odd: "odd probes", source: v.Path.Src.String(),
	})
}

// arrived reports whether a tripwire counted as many packets as were sent to a
// view, by every source port.
func (o *odd) arrived(view int, proof *HostProof) bool {
	if proof == nil {
		return false
	}
	type source struct {
		proto rules.Protocol
		port  uint16
	}
	sent, mine := map[source]uint64{}, map[source]bool{}
	for _, x := range o.probes {
		if x.kind.stage == oddBeside && (x.proto == rules.TCP || x.proto == rules.UDP) {
			s := source{x.proto, x.sport}
			sent[s] += x.sent
			mine[s] = mine[s] || x.view == view
		}
	}
	for s := range mine {
		if mine[s] && proof.Arrived[s.proto][s.port] < sent[s] {
			return false
		}
	}
	return len(mine) > 0
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "ipv4"
	}
	return "ipv6"
}

// oddFinding reports a probe that got through; of several, one of them did and
// the tripwire cannot tell which.
func (j *judge) oddFinding(probes []*oddProbe, a Answer) {
	x := probes[0]
	var names, to []string
	for _, p := range probes {
		if !slices.Contains(names, p.kind.name) {
			names = append(names, p.kind.name)
		}
		if s := p.dst.String(); !slices.Contains(to, s) {
			to = append(to, s)
		}
	}
	f := Finding{
		Family: familyOf(x.dst), Address: strings.Join(to, " or "), Protocol: x.proto.String(), Port: x.dport,
		Odd: strings.Join(names, " or "), Expected: x.expect.Outcome.String(), Observed: a.State, Reason: a.Reason.String(),
		Rule: x.expect.Rule, Interface: j.inOf(x), source: x.src.String(),
	}
	if slices.ContainsFunc(probes, func(p *oddProbe) bool { return p.dport != x.dport }) {
		f.Port = 0
	}
	f.Probe = f.Odd + " from " + f.source
	if f.Interface != "" {
		f.Probe += " by " + f.Interface
	}
	if x.answers > 0 && x.from != x.dst {
		f.Reason += " from " + x.from.String()
	}
	if x.kind.stage == oddReload {
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
