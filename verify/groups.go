package verify

// Many hosts in bounded memory: they are probed in groups, one after the other,
// and each report is handed on when it is made.

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"deadlight/rules"
)

const (
	// groupPorts is how many ports are in work at once: some 30 hosts with all their
	// ports over both protocols, at some 35 bytes a port while they are probed.
	groupPorts = 1 << 22
	// groupHosts bounds a group of few ports: what is lost when a run is interrupted.
	groupHosts = 256
	// groupTime bounds a group that a maximal rate makes slow.
	groupTime = time.Minute
)

// Host is one of many that are looked at.
type Host struct {
	Rules   *rules.Ruleset
	Targets []netip.Addr // its addresses
	// Thorough scales the adversarial probes, as in [LookConfig].
	Thorough int
}

// ManyConfig is what [LookAtMany] needs. What it shares with [LookConfig] means the
// same there.
type ManyConfig struct {
	Hosts    []Host
	Ports    Ports
	Canaries []Canary
	In       string
	MaxRate  int
	Connect  bool
	// Earlier counts addresses of hosts that are done already: of a run that goes on.
	// Their part of the bound is used up.
	Earlier int
	// MissBound is the largest probability that any answer of a silent TCP port was
	// missed, over all hosts; 0 means 1e-6.
	MissBound float64
	// Each gets the report of every host, in order, as soon as it is made. Its error
	// ends the run.
	Each func(host int, r *Report) error
	// Progress, if not nil, is called some times a second with the packets sent so
	// far and the part of the run that is done, from 0 to 1.
	Progress func(sent uint64, done float64)

	group int // ports at a time; 0 means groupPorts
}

// LookAtMany probes hosts from this machine, which is the outside of each, and
// judges what it saw. It needs no more memory for thousands of hosts than for some
// dozens. An address that cannot be reached is a note in the report of its host,
// which is then no pass. Errors to test for: [fs.ErrPermission].
//
// If ctx ends, LookAtMany returns its error; Each got the hosts that were done.
func LookAtMany(ctx context.Context, cfg ManyConfig) error {
	if cfg.MissBound <= 0 {
		cfg.MissBound = defaultMissBound
	}
	m := &many{cfg: cfg}
	m.done = cfg.Earlier * (len(cfg.Ports.TCP) + len(cfg.Ports.UDP))
	m.total = m.done
	for i := range cfg.Hosts {
		m.total += m.ports(i)
	}
	for first := 0; first < len(cfg.Hosts); {
		next, ports := m.nextGroup(first)
		if err := m.group(ctx, first, next, ports); err != nil {
			return err
		}
		first, m.done = next, m.done+ports
	}
	return nil
}

// many is a run over many hosts.
type many struct {
	cfg         ManyConfig
	total, done int // ports, of all addresses
	sent        uint64
}

// ports is how many a host has, over all its addresses; at least one, so that what
// is left can be told.
func (m *many) ports(host int) int {
	return max(1, len(m.cfg.Hosts[host].Targets)*(len(m.cfg.Ports.TCP)+len(m.cfg.Ports.UDP)))
}

// nextGroup gives the end of the group that begins at first, and its ports.
func (m *many) nextGroup(first int) (next, ports int) {
	limit := m.cfg.group
	if limit <= 0 {
		limit = groupPorts
	}
	if m.cfg.MaxRate > 0 {
		limit = min(limit, m.cfg.MaxRate*int(groupTime/time.Second))
	}
	for next = first; next < len(m.cfg.Hosts) && next-first < groupHosts; next++ {
		n := m.ports(next)
		if next > first && ports+n > limit {
			break
		}
		ports += n
	}
	return next, ports
}

// hostViews are the views of a host in a group.
type hostViews struct {
	asker   targetAsker
	first   int      // of the group's paths
	outside []string // how this machine reaches it, for people
	missing []string // why it does not reach some of its addresses
}

// group probes some hosts at once.
func (m *many) group(ctx context.Context, first, next, ports int) error {
	var dsts []netip.Addr
	for _, h := range m.cfg.Hosts[first:next] {
		dsts = append(dsts, h.Targets...)
	}
	ways := resolveLinks(dsts)
	free := freshPorts()
	if len(dsts) > len(free) {
		return fmt.Errorf("%d addresses of one host are too many", len(dsts))
	}
	hosts := make([]hostViews, next-first)
	var paths []Path
	for i := range hosts {
		h, own := &m.cfg.Hosts[first+i], &hosts[i]
		own.first = len(paths)
		own.asker.cfg = m.look(h)
		for _, dst := range h.Targets {
			w := ways[0]
			ways = ways[1:]
			if w.err != nil {
				own.missing = append(own.missing, w.err.Error())
				continue
			}
			own.asker.views = append(own.asker.views, lookView(h.Rules, &m.cfg, dst, w, free[0]))
			free = free[1:]
			own.outside = append(own.outside, fmt.Sprintf("%s (%s)", w.src, w.link.Name))
		}
		own.asker.swept = len(own.asker.views)
		spare := len(free) - len(ways) // the hosts behind this one need theirs
		own.asker.ports = free[:spare]
		own.asker.all()
		free = free[spare-len(own.asker.ports):]
		for k := range own.asker.views {
			own.asker.views[k].Path.Host = i
			paths = append(paths, own.asker.views[k].Path)
		}
	}
	res := &Result{Bound: 1}
	if len(paths) > 0 {
		part := Config{Paths: paths, MaxRate: m.cfg.MaxRate, MissBound: m.cfg.MissBound * float64(ports) / float64(m.total)}
		if m.cfg.Progress != nil {
			before := m.sent
			part.Progress = func(sent, planned uint64) {
				// The rest is for the adversarial probes.
				swept := 0.9 * float64(sent) / float64(max(planned, 1)) * float64(ports)
				m.cfg.Progress(before+sent, (float64(m.done)+swept)/float64(m.total))
			}
		}
		probe := Sweep
		if m.cfg.Connect {
			probe = Connect
		}
		var err error
		if res, err = probe(ctx, part); err != nil {
			return fmt.Errorf("look at %d hosts: %w", len(hosts), err)
		}
	}
	m.sent += res.Probes
	// Probed at once, they share the time.
	took := res.Elapsed / time.Duration(len(hosts))
	for i := range hosts {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, own := &m.cfg.Hosts[first+i], &hosts[i]
		r, err := m.judge(ctx, h, own, res, took)
		if err != nil {
			return err
		}
		if err := m.cfg.Each(first+i, r); err != nil {
			return err
		}
		if m.cfg.Progress != nil {
			part := (0.9 + 0.1*float64(i+1)/float64(len(hosts))) * float64(ports)
			m.cfg.Progress(m.sent, (float64(m.done)+part)/float64(m.total))
		}
	}
	return nil
}

// judge makes the report of one host of a group, whose odd probes are sent now.
func (m *many) judge(ctx context.Context, h *Host, own *hostViews, res *Result, took time.Duration) (*Report, error) {
	seen := &Result{Paths: res.Paths[own.first : own.first+len(own.asker.views)], Elapsed: took}
	alive := false
	for i := range seen.Paths {
		p := &seen.Paths[i]
		seen.Probes += p.Sent
		seen.Bound = min(seen.Bound+p.Bound, 1)
		alive = alive || p.Alive
	}
	if !alive {
		seen.Bound = 1
	}
	var beside *odd
	if alive { // else they would prove nothing, and cost seconds
		var err error
		if beside, err = lookOdd(ctx, own.asker.cfg, own.asker.views[:own.asker.swept]); err != nil {
			return nil, fmt.Errorf("look at %s: %w", names(h.Targets), err)
		}
	}
	r := lookReport(&own.asker, own.outside, seen, beside)
	m.sent += r.Probes - seen.Probes
	for _, why := range own.missing {
		r.Notes = append(r.Notes, "not probed: "+why)
		if r.Verdict == Pass {
			r.Verdict = Inconclusive
		}
	}
	return r, nil
}

// look is how a host is looked at if it were the only one.
func (m *many) look(h *Host) LookConfig {
	c := LookConfig{
		Rules: h.Rules, Targets: h.Targets, Ports: m.cfg.Ports, Canaries: m.cfg.Canaries, In: m.cfg.In, MaxRate: m.cfg.MaxRate,
		Thorough: h.Thorough, Connect: m.cfg.Connect,
	}
	if c.Connect {
		c.Thorough = 0
	}
	return c
}

// names writes addresses with commas.
func names(list []netip.Addr) string {
	var out []string
	for _, a := range list {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}
