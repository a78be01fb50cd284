package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"deadlight/rules"
)

// cutOff is a session of the caller that a policy would not admit again, or not
// for long.
type cutOff struct {
	session  session
	packet   rules.Packet // the first of a new connection
	decision rules.Decision
	ends     time.Time // when what admits it closes; zero: it is not admitted at all
}

// cutOffs asks a policy about a new connection of each peer.
func cutOffs(rs *rules.Ruleset, sessions []session, now time.Time) []cutOff {
	const soon = 24 * time.Hour
	var out []cutOff
	for _, s := range sessions {
		p := rules.Packet{
			In: s.Interface, Src: s.Remote.Addr(), Dst: s.Wire.Addr(), Protocol: s.Protocol,
			SrcPort: s.Remote.Port(), DstPort: s.Wire.Port(), At: now,
		}
		c := cutOff{session: s, packet: p, decision: rs.Decide(p)}
		if admitted(c.decision) {
			p.At = now.Add(soon)
			if admitted(rs.Decide(p)) {
				continue
			}
			for _, o := range rs.OpensAt(p.Protocol, p.DstPort) {
				if rs.Matches(&o.Traffic, c.packet) && o.Expires.After(c.ends) {
					c.ends, c.decision.Rule, c.decision.Pos = o.Expires, o.Name, o.Pos
				}
			}
		}
		out = append(out, c)
	}
	return out
}

func admitted(d rules.Decision) bool { return d.Outcome == rules.OutcomeOpen || d.Observed }

// fact says what happens to the session, in one line.
func (c *cutOff) fact(rs *rules.Ruleset) string {
	to := rules.PortName(c.packet.Protocol, c.packet.DstPort)
	if c.packet.In != "" {
		to += " by " + c.packet.In
	}
	if !c.ends.IsZero() {
		return fmt.Sprintf("your own %s to %s ends at %s, when open %q%s expires",
			c.session, to, c.ends.Format(time.RFC3339), c.decision.Rule, inFile(c.decision.Pos))
	}
	return fmt.Sprintf("your own %s to %s would be cut: %s", c.session, to, reason(rs, c.packet, c.decision))
}

// hint says which lines keep the session, to paste into the policy.
func (c *cutOff) hint(rs *rules.Ruleset) string {
	from := c.packet.Src.String()
	if c.decision.Kind == "block" && c.decision.Pos.Line == 0 {
		return fmt.Sprintf("block %q is temporary: an opening does not win over it", c.decision.Rule)
	}
	if c.decision.Kind == "block" {
		return fmt.Sprintf("add to [block.%s] (%s:%d): except = [%q]; an opening does not win over a block", c.decision.Rule, c.decision.Pos.File, c.decision.Pos.Line, from)
	}
	for _, o := range rs.OpensAt(c.packet.Protocol, c.packet.DstPort) {
		if o.Pos.Line > 0 && rs.Miss(&o.Traffic, c.packet) == "from" {
			return fmt.Sprintf("add %q to from of [open.%s] (%s:%d)", from, o.Name, o.Pos.File, o.Pos.Line)
		}
	}
	name := "ssh"
	if c.packet.Protocol == rules.UDP {
		name = "mosh"
	}
	for taken(rs, name) {
		name += "-own"
	}
	lines := fmt.Sprintf("add to your policy:\n[open.%s]\nports = [%d]\nfrom = [%q]", name, c.packet.DstPort, from)
	if c.packet.Protocol != rules.TCP {
		lines += fmt.Sprintf("\nprotocol = %q", c.packet.Protocol)
	}
	return lines
}

func taken(rs *rules.Ruleset, name string) bool {
	return slices.ContainsFunc(rs.Policy.Open, func(o rules.Open) bool { return o.Name == name })
}

// refuseLockout refuses a policy that does not admit the caller's own sessions,
// before anything is written, and warns of one that soon will not; again is the
// command line.
func refuseLockout(e env, again string, rs *rules.Ruleset) error {
	sessions, err := operator()
	if err != nil {
		return unknownPeer(err, again)
	}
	var facts, hints []string
	for _, c := range cutOffs(rs, sessions, time.Now()) {
		if !c.ends.IsZero() {
			printf(e.stderr, "deadlight: warning: %s\n", oneLine(c.fact(rs)))
			continue
		}
		facts = append(facts, c.fact(rs))
		if h := c.hint(rs); !slices.Contains(hints, h) {
			hints = append(hints, h)
		}
	}
	if len(facts) == 0 {
		return nil
	}
	return refused(fmt.Errorf("%s: ruleset as before", strings.Join(facts, "; ")), strings.Join(hints, "\n")+"\nor pass --accept-lockout")
}

// unknownPeer says what to do when it cannot be told whom a policy locks out.
func unknownPeer(err error, again string) error {
	hint := "whoever has another way in may pass --accept-lockout"
	if errors.Is(err, errPeerUnknown) && os.Geteuid() != 0 {
		hint = "sudo " + again
	}
	return refused(fmt.Errorf("check against a lock-out: %w: ruleset as before", err), hint)
}

// lockoutNotes says in a plan what refuseLockout would.
func lockoutNotes(rs *rules.Ruleset) []string {
	sessions, err := operator()
	if err != nil {
		return []string{"check against a lock-out: " + err.Error()}
	}
	out := []string{}
	for _, c := range cutOffs(rs, sessions, time.Now()) {
		out = append(out, c.fact(rs))
	}
	return out
}
