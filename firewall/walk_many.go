package firewall

import (
	"errors"
	"fmt"

	"deadlight/rules"
)

// WalkAll is [Conn.Walk] for many packets, by one reading of the rules: all of
// them are judged by the same generation.
func (c *Conn) WalkAll(packets []rules.Packet) ([]*Journey, error) {
	const tries = 10
	for range tries {
		out, err := c.walkAll(packets)
		if errors.Is(err, errTorn) {
			continue // somebody wrote while we read
		}
		if err != nil {
			return nil, fmt.Errorf("walk the ruleset: %w", err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("walk the ruleset: %w", errTorn)
}

func (c *Conn) walkAll(packets []rules.Packet) ([]*Journey, error) {
	gen, err := c.Generation()
	if err != nil {
		return nil, err
	}
	k, err := c.liveRules()
	if err != nil {
		return nil, err
	}
	host, notes := c.lookAround()
	var out []*Journey
	for _, p := range packets {
		w := newWalker(k, host, p, c)
		w.notes = notes[:len(notes):len(notes)]
		out = append(out, w.run())
		if w.err != nil {
			return nil, w.err
		}
	}
	now, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if now.ID != gen.ID {
		return nil, errTorn
	}
	return out, nil
}
