package firewall

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// SeedResult says what Seed found and did, in flows.
type SeedResult struct {
	Entered int // made known to conntrack
	Turned  int // known the wrong way round, and turned
	Known   int // known already, and left alone
}

// Seed tells conntrack of the flows that run already, in the direction in which
// they began. Conntrack watches only while some rule asks it to; without the
// seed, the first ruleset would take the next packet of a running flow for a new
// one, and the host's own sessions would end when their peer speaks first.
//
// It goes by the sockets: TCP, and UDP that is connected. A flow whose local port
// somebody listens on was begun from outside, any other by the host; so what a
// listener began that is gone by now counts as the host's own. What has no
// connected socket (unconnected UDP, SCTP, tunnels, containers) is not seen.
func (c *Conn) Seed() (SeedResult, error) {
	var res SeedResult
	s, err := c.sockets()
	if err != nil {
		return res, err
	}
	for _, f := range s.flows {
		if err := c.seed(s.began(f), &res); err != nil {
			return res, fmt.Errorf("enter a flow into conntrack: %w", err)
		}
	}
	return res, nil
}

// seed enters one flow, by its original direction.
func (c *Conn) seed(orig tuple, res *SeedResult) error {
	want := entry{orig: orig, reply: orig.reversed(), status: statusSeenReply | statusAssured | statusConfirmed}
	if orig.protocol == rules.TCP {
		// The scale of the windows is unknown: without liberal, conntrack calls most
		// of what a fast flow sends invalid.
		want.tcpState, want.flags = tcpEstablished, [2]uint8{flagLiberal | flagSACK, flagLiberal | flagSACK}
	}
	const tries = 10 // packets may make entries between our steps
	turned := false
	for range tries {
		err := c.enter(want)
		if err == nil && turned {
			res.Turned++
			return nil
		}
		if err == nil {
			res.Entered++
			return nil
		}
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		is, found, err := c.entryOf(want.reply)
		if err == nil && !found {
			is, found, err = c.entryOf(want.orig)
		}
		if err != nil {
			return err
		}
		if !found {
			continue
		}
		if is.orig != want.reply || is.reply != want.orig || !is.midStream() {
			// It has the direction that we want, or one that is proved by the first
			// packet, or a NAT: then the socket does not have the ports of the wire.
			res.Known++
			return nil
		}
		if err := c.forget(is); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		turned = true
	}
	return nil // it is being used at this moment, and conntrack sees it
}

// seeds are those of a first apply: before the rules and once more behind them. A
// nil one is that of any other apply.
type seeds struct {
	done SeedResult
	err  error
}

func (c *Conn) newSeeds() *seeds {
	s := &seeds{}
	s.done, s.err = c.Seed()
	return s
}

func (s *seeds) again(c *Conn) {
	if s == nil || s.err != nil {
		return
	}
	var more SeedResult
	more, s.err = c.Seed()
	s.done.Entered += more.Entered
	s.done.Turned += more.Turned
}

// result adds what came of it. The ruleset stands whether or not it worked.
func (s *seeds) result(r Result) Result {
	if s == nil {
		return r
	}
	r.Seeded = s.done
	if s.err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf(
			"connections that run already may end: conntrack could not be told of them (%v)", s.err))
	}
	return r
}
