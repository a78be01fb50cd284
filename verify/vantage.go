package verify

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"deadlight/rules"
)

// HostConfig is what [LookAtHost] needs.
type HostConfig struct {
	Host     Runner // of the host's network namespace; nil: [Here]
	Rules    *rules.Ruleset
	Ports    Ports
	Canaries []Canary // that answer whatever the policy says
	In       string   // the interface by which all ports are probed; "": that of the default route
	MaxRate  int      // packets per second, 0 for none
	// PacketsOnly leaves out the host proof: no tripwire.
	PacketsOnly bool
	// Thorough scales the adversarial probes: 0 for none, 1 for all that are quick,
	// 2 for the slow ones too.
	Thorough int
	Progress func(sent, total uint64)

	all bool // ICMP and other protocols are probed, whatever Ports are
}

var (
	// ErrNoInterface: the host has no interface of that name that is up.
	ErrNoInterface = errors.New("no such interface is up")
	// ErrNoWay: no source was found from which the host could be probed and have
	// its answers heard.
	ErrNoWay = errors.New("no way into this host")
)

// LookAtHost probes the host that this process runs on, from a throw-away network
// namespace: its packets arrive by the host's real interfaces, so that rules for
// interfaces are judged too. A tripwire on the host records what passed. What the
// probes set off is turned back before it comes to a wire.
//
// Afterwards the host is as before, but for what any packet leaves behind: counters,
// meters and flows that conntrack saw. What a killed run leaves the kernel removes,
// or else the next run. Errors to test for: [fs.ErrPermission], [ErrNoInterface],
// [ErrNoWay], [ErrOtherVerification], [ErrNoNamespace].
func LookAtHost(ctx context.Context, cfg HostConfig) (_ *Report, err error) {
	if cfg.Host == nil {
		cfg.Host = Here
	}
	diverts, err := canDivert(cfg.Host)
	if err != nil {
		return nil, err
	}
	var o *Outlook
	var s *surroundings
	var oddViews []View
	var left, oddLeft []string
	if err := cfg.Host(func() error {
		if s, err = lookAround(); err != nil {
			return err
		}
		s.diverts = diverts
		if o, left, err = hostOutlook(cfg, s); err == nil && cfg.Thorough > 0 {
			oddViews, oddLeft, err = oddHostViews(cfg, s, o)
		}
		return err
	}); err != nil {
		return nil, err
	}

	var doors []hostLink
	for i := range o.Views {
		if l := s.link(o.Views[i].In); !slices.ContainsFunc(doors, func(d hostLink) bool { return d.name == l.name }) {
			doors = append(doors, *l)
		}
	}
	e, err := openEntrance(cfg.Host, doors)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	paths := make([]Path, len(o.Views))
	sports := make([]uint16, len(o.Views))
	sources := make([]netip.Addr, len(o.Views))
	for i := range o.Views {
		v := &o.Views[i]
		v.Path.Link = e.link(v.In)
		if v.Sweep {
			v.Path.Canaries = append(v.Path.Canaries, cfg.Canaries...)
		}
		paths[i], sports[i], sources[i] = v.Path, v.Path.SrcPort, v.Path.Src
	}
	strangers := strangersOf(oddViews)
	if err := e.admit(paths, strangers, s); err != nil {
		return nil, fmt.Errorf("have the answers of this host: %w", err)
	}
	defer func() {
		err = errors.Join(err, cfg.Host(func() error {
			return hangUp(func(a netip.Addr, port uint16) bool {
				canary := port >= canaryPortLow && port <= canaryPortHigh
				return slices.ContainsFunc(strangers, func(p Path) bool { return p.Src == a }) ||
					slices.ContainsFunc(paths, func(p Path) bool { return p.Src == a && (canary || p.SrcPort == port) })
			})
		}))
	}()
	var trip *Tripwire
	if !cfg.PacketsOnly {
		if trip, err = ArmTripwireFor(cfg.Host, sports, sources); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, trip.Remove()) }()
	}
	var res *Result
	if err := e.outside(func() error {
		sweep := Config{Paths: paths, MaxRate: cfg.MaxRate, Progress: cfg.Progress}
		if trip != nil {
			sweep.Arrived = trip.Arrived
		}
		res, err = Sweep(ctx, sweep)
		return err
	}); err != nil {
		return nil, fmt.Errorf("probe this host: %w", err)
	}
	var proof *HostProof
	if trip != nil {
		if proof, err = trip.proof(); err != nil {
			return nil, fmt.Errorf("read the tripwire: %w", err)
		}
		if err := trip.Remove(); err != nil {
			return nil, err
		}
	}
	oddViews, crooked, err := e.keepStraight(oddViews, s)
	if err != nil {
		return nil, err
	}
	oddLeft = append(oddLeft, crooked...)
	var odd *odd
	if len(oddViews) > 0 {
		var counted *oddProof
		if odd, counted, err = sendOdd(ctx, cfg, e, s, o, oddViews); err != nil {
			return nil, fmt.Errorf("probe this host: %w", err)
		}
		if proof != nil {
			proof.odd = counted
		}
	}
	return hostReport(cfg, s, o, left, res, proof, odd, oddHostNote(cfg, odd, oddLeft)), nil
}

// hostOutlook chooses from where to look at a host as it was found. What cannot be
// looked at is told by left.
func hostOutlook(cfg HostConfig, s *surroundings) (o *Outlook, left []string, err error) {
	b := &outlookBuilder{rs: cfg.Rules, index: map[[3]string]int{}, ports: freshPorts(), real: s}
	if cfg.In != "" && s.link(cfg.In) == nil {
		return nil, nil, fmt.Errorf("%q: %w here: %s", cfg.In, ErrNoInterface, strings.Join(s.interfaces(), ", "))
	}
	var first []string
	for _, candidates := range [][]netip.Addr{candidates4(), candidates6()} {
		main, dst, ok := s.main(cfg.In, candidates)
		if !ok {
			continue // noted in the report
		}
		list := append(b.unnamed(candidates), candidates...)
		i := slices.IndexFunc(list, func(a netip.Addr) bool { return s.reaches(main, a) })
		if i < 0 {
			left = append(left, fmt.Sprintf("%s by %s: %s", kindOf(candidates[0]), main, s.whyNot(main, candidates[0])))
			continue
		}
		b.families = append(b.families, family{dst, list[i], main})
		first = append(first, main)
		if dst.Is4() {
			b.out.Host4 = dst
		} else {
			b.out.Host6 = dst
		}
	}
	if len(b.families) == 0 {
		if left == nil {
			left = []string{"it has no address but local ones"}
		}
		return nil, nil, fmt.Errorf("%w: %s", ErrNoWay, strings.Join(left, "; "))
	}
	b.out.Links = s.interfaces(first...)
	for _, t := range allTraffic(cfg.Rules.Policy) {
		for _, r := range b.ranges(&t.To) {
			for a := range s.local {
				if r.Contains(a) && usable(a) && a != b.out.Host4 && a != b.out.Host6 && !slices.Contains(b.out.More, a) && len(b.out.More) < mostAddresses {
					b.out.More = append(b.out.More, a)
				}
			}
		}
	}
	b.views(cfg.Ports)
	left = append(left, b.unseen()...)
	b.out.Views = slices.DeleteFunc(b.out.Views, func(v View) bool { return len(v.Path.TCP)+len(v.Path.UDP) == 0 && !v.echo })
	return &b.out, left, nil
}

// unseen names the interfaces that rules name and that nothing was to be sent by,
// though the host has an address there.
func (b *outlookBuilder) unseen() []string {
	var out []string
	for _, t := range allTraffic(b.rs.Policy) {
		if tcp, udp := b.portsOf(t); len(tcp)+len(udp) == 0 {
			continue // a protocol that is not probed
		}
		for _, p := range t.Interfaces {
			for _, name := range b.instances(p) {
				for _, f := range b.families {
					if what := b.unseenBy(name, f); t.Family.Has(f.dst.Is4()) && what != "" && !slices.Contains(out, what) {
						out = append(out, what)
					}
				}
			}
		}
	}
	return out
}

// unseenBy is unseen for one interface and family; "" when it is seen.
func (b *outlookBuilder) unseenBy(name string, f family) string {
	is4 := func(a netip.Addr) bool { return a.Is4() == f.dst.Is4() }
	has := slices.ContainsFunc(b.real.link(name).addrs, func(p netip.Prefix) bool { return is4(p.Addr()) })
	if !has || slices.ContainsFunc(b.out.Views, func(v View) bool { return v.In == name && is4(v.Path.Dst) }) {
		return ""
	}
	return fmt.Sprintf("%s by %s: %s", kindOf(f.dst), name, b.real.whyNot(name, f.src))
}

func kindOf(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// whyNot says why no stranger can be had at an interface.
func (s *surroundings) whyNot(in string, stranger netip.Addr) string {
	l := s.link(in)
	switch {
	case l.strict && stranger.Is4() && !s.diverts:
		return "rp_filter = 1, and this kernel has no egress hook (Linux 5.16)"
	case l.strict && stranger.Is4() && !l.ether:
		return "rp_filter = 1, and it is not Ethernet"
	case l.strict && stranger.Is4():
		return "rp_filter = 1, and the routes lead to strangers by another interface, or its gateway does not answer"
	}
	return "every stranger's address that could be used is in use"
}

// hostReport holds what was seen against the policy, and says what was not.
func hostReport(cfg HostConfig, s *surroundings, o *Outlook, left []string, res *Result, proof *HostProof, odd *odd, note string) *Report {
	var targets, vantages []string
	for i := range o.Views {
		if v := &o.Views[i]; v.Sweep {
			targets = append(targets, v.Path.Dst.String())
			vantages = append(vantages, fmt.Sprintf("%s by %s", v.Path.Src, v.In))
		}
	}
	r := Judge(JudgeConfig{
		Target: "this host, " + strings.Join(targets, ", "), Vantage: "netns: " + strings.Join(vantages, ", "),
		Rules: cfg.Rules, Views: o.Views, HostProof: proof, odd: odd, unasked: o.unasked,
	}, res)
	for _, x := range left {
		r.Notes = append(r.Notes, "not probed: "+x)
	}
	if len(left) > 0 && r.Verdict == Pass {
		r.Verdict = Inconclusive
	}
	r.Notes = append(r.Notes, note)
	var absent []string
	for _, t := range allTraffic(cfg.Rules.Policy) {
		for _, p := range t.Interfaces {
			if !slices.ContainsFunc(o.Links, func(name string) bool { return rules.MatchInterface(p, name) }) && !slices.Contains(absent, p) {
				absent = append(absent, p)
			}
		}
	}
	if len(absent) > 0 {
		r.Notes = append(r.Notes, "not probed: what comes in by "+strings.Join(absent, ", ")+": no such interface is up with a carrier and an address")
	}
	if other := otherProtocols(cfg.Rules.Policy, r.listed); other != "" {
		r.Notes = append(r.Notes, "not probed: "+other)
	}
	var mains, others []string
	for i := range o.Views {
		v := &o.Views[i]
		switch {
		case v.Sweep && !slices.Contains(mains, v.In):
			mains = append(mains, v.In)
		case !v.Sweep && !slices.Contains(mains, v.In) && !slices.Contains(others, v.In):
			others = append(others, v.In)
		}
	}
	if len(others) > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("every port was probed by %s; by %s only those of the rules that name them",
			strings.Join(mains, ", "), strings.Join(others, ", ")))
	}
	if o.Unprobed > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%s of restricted openings not looked from: in use, not right at the interface, or too many",
			count(o.Unprobed, "source", "sources")))
	}
	for _, f := range []struct {
		name string
		addr netip.Addr
	}{{"IPv4", o.Host4}, {"IPv6", o.Host6}} {
		if !f.addr.IsValid() && !slices.ContainsFunc(left, func(x string) bool { return strings.HasPrefix(x, f.name) }) {
			r.Notes = append(r.Notes, "this host has no "+f.name+" address but local ones: nothing was probed over it")
		}
	}
	return r
}
