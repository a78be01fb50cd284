package verify

import (
	"context"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"deadlight/rules"
)

// Ports says what to probe of a host.
type Ports struct{ TCP, UDP []uint16 }

// ParsePorts reads "tcp", "udp", "all", "443/tcp", "1-1024/udp" and lists of
// these with commas.
func ParsePorts(spec string) (Ports, error) {
	var p Ports
	add := func(proto string, ports []uint16) bool {
		switch proto {
		case "tcp":
			p.TCP = union(p.TCP, ports)
		case "udp":
			p.UDP = union(p.UDP, ports)
		default:
			return false
		}
		return true
	}
	for _, part := range strings.Split(spec, ",") {
		switch part = strings.TrimSpace(part); part {
		case "all":
			add("tcp", allPorts())
			add("udp", allPorts())
			continue
		case "tcp", "udp":
			add(part, allPorts())
			continue
		}
		ports, proto, ok := strings.Cut(part, "/")
		lo, hi, isRange := strings.Cut(ports, "-")
		if !isRange {
			hi = lo
		}
		from, err1 := strconv.ParseUint(lo, 10, 16)
		to, err2 := strconv.ParseUint(hi, 10, 16)
		if !ok || err1 != nil || err2 != nil || from < 1 || from > to {
			return Ports{}, fmt.Errorf("not a port specification: %q", part)
		}
		var list []uint16
		for n := from; n <= to; n++ {
			list = append(list, uint16(n))
		}
		if !add(proto, list) {
			return Ports{}, fmt.Errorf("not a protocol with ports: %q", part)
		}
	}
	return p, nil
}

// LookConfig is what [Look] needs.
type LookConfig struct {
	Rules    *rules.Ruleset
	Targets  []netip.Addr // addresses of one host
	Ports    Ports
	Canaries []Canary // that answer whatever the policy says
	In       string   // the target's interface, "" when it is not known
	MaxRate  int      // packets per second, 0 for none
	Progress func(sent, total uint64)
	// Thorough scales the adversarial probes: 0 for none, 1 for all that are quick,
	// 2 for the slow ones too.
	Thorough int
	// Connect probes by connect(2), without any privilege: see [ConnectNotes].
	Connect bool
}

// Look probes a host from this machine, which is the outside, and judges what
// it saw. Errors to test for: [fs.ErrPermission], [ErrLocalTarget], [ErrNoRoute],
// [ErrNoNeighbour], [ErrNotEthernet].
func Look(ctx context.Context, cfg LookConfig) (*Report, error) {
	var views []View
	var paths []Path
	var sources []string
	ports := freshPorts()
	many := ManyConfig{Ports: cfg.Ports, Canaries: cfg.Canaries, In: cfg.In}
	for i, w := range resolveLinks(cfg.Targets) {
		if w.err != nil {
			return nil, w.err
		}
		v := lookView(cfg.Rules, &many, cfg.Targets[i], w, ports[i])
		views, paths = append(views, v), append(paths, v.Path)
		sources = append(sources, fmt.Sprintf("%s (%s)", w.src, w.link.Name))
	}
	asker := targetAsker{cfg: cfg, views: views, swept: len(views), ports: ports[len(views):]}
	asker.all()
	for _, v := range asker.views[len(paths):] {
		paths = append(paths, v.Path)
	}
	probe := Sweep
	if cfg.Connect {
		probe, cfg.Thorough = Connect, 0
	}
	res, err := probe(ctx, Config{Paths: paths, MaxRate: cfg.MaxRate, Progress: cfg.Progress})
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", names(cfg.Targets), err)
	}
	odd, err := lookOdd(ctx, cfg, asker.views[:asker.swept])
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", names(cfg.Targets), err)
	}
	asker.cfg = cfg
	return lookReport(&asker, sources, res, odd), nil
}

// lookView is how all ports of an address are looked at.
func lookView(rs *rules.Ruleset, cfg *ManyConfig, dst netip.Addr, w wayOut, srcPort uint16) View {
	v := View{In: cfg.In, Sweep: true, Path: Path{
		Link: w.link, Src: w.src, Dst: dst, SrcPort: srcPort, TCP: cfg.Ports.TCP, UDP: cfg.Ports.UDP,
	}}
	v.Path.Canaries = append(canaries(newExpecter(rs, &v), &v.Path), cfg.Canaries...)
	return v
}

// lookReport judges what was seen of a host, and notes what that does not cover.
func lookReport(a *targetAsker, sources []string, res *Result, odd *odd) *Report {
	cfg := &a.cfg
	r := Judge(JudgeConfig{
		Target: names(cfg.Targets), Vantage: strings.Join(sources, ", "), Rules: cfg.Rules, Views: a.views, odd: odd, unasked: a.left,
	}, res)
	if other := otherProtocols(cfg.Rules.Policy, nil); other != "" {
		r.Notes = append(r.Notes, "not judged, whether what is listed gets in: "+other)
	}
	if cfg.Thorough > 0 && odd == nil {
		r.Notes = append(r.Notes, "no adversarial probes: no path to the host was proven alive")
	} else if note := oddNote(cfg.Thorough); note != "" {
		r.Notes = append(r.Notes, note)
	}
	if cfg.Connect {
		r.Notes = append(r.Notes, ConnectNotes()...)
	}
	for i := range a.swept {
		if p := &a.views[i].Path; len(p.Canaries) == 0 {
			r.Notes = append(r.Notes, fmt.Sprintf("%s has no canary: the policy opens no TCP port to this machine and answers no echo; name one with --canary", p.Dst))
		}
	}
	return r
}
