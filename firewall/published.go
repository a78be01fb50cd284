package firewall

import (
	"errors"
	"fmt"
	"slices"
)

// PublishedRuns cuts the ports where a table may do something else to a packet:
// each number begins a run of ports that all meet the same, and the first
// is 1. nil says that no table of others sends packets on to another port or host: no
// DNAT, redirect or other rewrite. Whether a run is in fact sent on is for
// [Conn.WalkAll] to say. Errors to test for: [ErrPermission].
func (c *Conn) PublishedRuns() ([]uint16, error) {
	const tries = 10
	var out []uint16
	err := errTorn
	for i := 0; i < tries && errors.Is(err, errTorn); i++ {
		out, err = c.publishedRuns()
	}
	if err != nil {
		return nil, fmt.Errorf("look for published ports: %w", err)
	}
	return out, nil
}

func (c *Conn) publishedRuns() ([]uint16, error) {
	gen, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if alone, err := c.alone(); err != nil || alone {
		return nil, err
	}
	k, err := c.liveRules()
	if err != nil {
		return nil, err
	}
	k.tables = slices.DeleteFunc(k.tables, func(t *liveTable) bool { return t.dormant })
	if !k.sendOn() {
		return nil, nil
	}
	ports, err := k.namedPorts(c)
	if err != nil {
		return nil, err
	}
	now, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if now.ID != gen.ID {
		return nil, errTorn
	}
	return slices.Compact(append([]uint16{1}, ports...)), nil
}

// sendOn reports whether a rule can lead what arrives to another port or host.
func (k *liveRules) sendOn() bool {
	for _, t := range k.tables {
		if t.isOurs() {
			continue
		}
		for _, ch := range t.bases {
			if e := ch.effects(); !ch.leaving() && (e.nat != nil || e.moves != nil || e.proxy != nil) {
				return true
			}
		}
	}
	return false
}
