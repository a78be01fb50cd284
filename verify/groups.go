package verify

// Many targets in bounded memory: a run is cut into groups of paths.

import (
	"context"
	"errors"
	"time"
)

// groupPorts is how many ports are in work at once: some 30 hosts with all their
// ports over both protocols, at some 35 bytes a port while they are probed.
const groupPorts = 1 << 22

// ports is how many a path has.
func (p *Path) ports() int { return len(p.TCP) + len(p.UDP) }

// sweepGroups sweeps one group after the other. Each gets a part of the miss
// bound, so that all of them together keep it.
func sweepGroups(ctx context.Context, cfg Config) (*Result, error) {
	began := time.Now()
	if len(cfg.Paths) == 0 {
		return nil, errors.New("no path to probe")
	}
	if cfg.MissBound <= 0 {
		cfg.MissBound = defaultMissBound
	}
	total, done := 0, 0
	for i := range cfg.Paths {
		total += cfg.Paths[i].ports()
	}
	all := &Result{}
	alive := false
	for first := 0; first < len(cfg.Paths); {
		next, ports := nextGroup(cfg, first)
		part := cfg
		part.Paths = cfg.Paths[first:next]
		if ports < total {
			part.MissBound *= float64(ports) / float64(total)
		}
		if cfg.Progress != nil {
			before, scale := all.Probes, float64(total-done)/float64(max(ports, 1))
			part.Progress = func(sent, planned uint64) {
				cfg.Progress(before+sent, before+max(sent, uint64(scale*float64(planned))))
			}
		}
		res, err := sweepGroup(ctx, part)
		if err != nil {
			return nil, err
		}
		here := false
		for i := range res.Paths {
			r := &res.Paths[i]
			here = here || r.Alive || r.ArrivedTCP
			if cfg.Each == nil {
				all.Paths = append(all.Paths, *r)
			} else if err := cfg.Each(first+i, *r); err != nil {
				return nil, err
			}
		}
		all.Probes += res.Probes
		if here { // a group without a living path calls no port filtered
			all.Bound += res.Bound
			alive = true
		}
		first, done = next, done+ports
	}
	all.Bound = min(all.Bound, 1)
	if !alive {
		all.Bound = 1
	}
	if cfg.Progress != nil {
		cfg.Progress(all.Probes, all.Probes)
	}
	all.Elapsed = time.Since(began)
	return all, nil
}

// nextGroup gives the end of the group that begins at first, and its ports. The
// paths of one pair of addresses share their canaries' tuples and stay together.
func nextGroup(cfg Config, first int) (next, ports int) {
	limit := cfg.group
	if limit <= 0 {
		limit = groupPorts
	}
	for next = first; next < len(cfg.Paths); next++ {
		p := &cfg.Paths[next]
		if next > first && ports+p.ports() > limit {
			if last := &cfg.Paths[next-1]; last.Src != p.Src || last.Dst != p.Dst {
				break
			}
		}
		ports += p.ports()
	}
	return next, ports
}
