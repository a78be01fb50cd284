package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// A policy from who knocked: what came, was not admitted, and would have found
// somebody listening. What strangers sent stands there as numbers and addresses only.

const observedHead = `# Who knocked at this host and found somebody listening, as the kernel counted it.
#
# WARNING: an attacker may have knocked too. Every scan that met a listener is in
# here, and proposes to admit the scanner; sources can be forged. Keep only what you
# know, and read each from = [...].
#
# What the policy in force opens was admitted, not counted: it is missing here. Add
# these tables to that policy rather than applying them alone:
#
#   deadlight check policy.toml
#   sudo deadlight plan policy.toml
#   sudo deadlight apply policy.toml --confirm 60s
`

const (
	mostFrom      = 32  // sources that a table names; with more it is open to everyone
	mostCommented = 64  // ports that nobody listens at
	mostSentOn    = 256 // ports of which it is asked whether another table sends them on
)

// observedHere draws a policy from who knocked at the network namespace of the
// calling thread.
func observedHere() (_ string, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	k, err := conn.Knocks(rules.TableName)
	if err != nil {
		return "", err
	}
	if !k.Counted {
		return "", refused(errors.New("nothing is counted here: no policy is applied, or it has knocks = false in [log]"),
			"apply a policy with enforce = false in [default], wait until everybody has come once, then ask again")
	}
	s, err := starterOf(conn)
	if err != nil {
		return "", err
	}
	return s.observed(k)
}

// observed writes the policy.
func (s *starter) observed(k *firewall.Knocks) (string, error) {
	sources := map[portKey][]firewall.Knock{}
	for _, x := range k.Sources {
		sources[portKey{x.Protocol, x.Port}] = append(sources[portKey{x.Protocol, x.Port}], x)
	}
	sentOn, err := s.askSentOn(k.Ports)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(observedHead)
	fmt.Fprintf(&b, "#\n# A port or a source that was silent for %s is forgotten.\n", forgotten(k.Memory))
	if k.PortsFull {
		b.WriteString("# The list of ports is full, as after a scan of them all: other ports may have been\n# knocked at.\n")
	}
	if k.SourcesFull {
		b.WriteString("# The list of sources is full: others may have come.\n")
	}
	b.WriteString("version = 1\n")
	used := map[string]bool{}
	var nobody []string
	for _, p := range k.Ports {
		key := portKey{p.Protocol, p.Port}
		from := sources[key]
		line := fmt.Sprintf("%s: %s, the last %s", rules.PortName(p.Protocol, p.Port), plural(int(p.Packets), "packet"), p.Last.UTC().Format(time.DateTime+" MST"))
		var found []listener
		why := ""
		for _, l := range s.sockets {
			switch {
			case l.Protocol != p.Protocol || l.Port != p.Port:
			case l.loopback():
				why = ", but " + s.who(l) + " listens on loopback only"
			default:
				found = append(found, l)
			}
		}
		if len(found) == 0 && sentOn[key] == "" {
			if p.Protocol == rules.SCTP {
				why = ", but whether anybody listens is not known of SCTP"
			}
			nobody = append(nobody, line+knockers(from, 3)+why)
			continue
		}
		name := "published"
		b.WriteString("\n" + comment(line))
		for _, l := range found {
			name = s.name(&want{listener: l, hi: l.Port})
			b.WriteString(comment(s.who(l) + " listens at " + netip.AddrPortFrom(l.Addr, l.Port).String()))
		}
		if len(found) == 0 {
			b.WriteString(comment(sentOn[key]))
		}
		writeObserved(&b, unique(used, name), p, from, k.SourcesFull)
	}
	if len(nobody) > 0 {
		b.WriteString("\n# Knocked at, but nobody listens there:\n")
		for _, n := range nobody[:min(len(nobody), mostCommented)] {
			b.WriteString(comment("  " + n))
		}
		if n := len(nobody) - mostCommented; n > 0 {
			b.WriteString(comment("  and " + plural(n, "more port")))
		}
	}
	return s.admit(b.String())
}

type portKey struct {
	p    rules.Protocol
	port uint16
}

func forgotten(d time.Duration) string {
	if days := int(d.Hours() / 24); days > 1 {
		return plural(days, "day")
	}
	return "a day"
}

// knockers names the busiest sources.
func knockers(from []firewall.Knock, most int) string {
	if len(from) == 0 {
		return ""
	}
	var out []string
	for _, f := range from[:min(len(from), most)] {
		out = append(out, fmt.Sprintf("%s (%d)", f.Source, f.Packets))
	}
	if n := len(from) - most; n > 0 {
		out = append(out, plural(n, "more source"))
	}
	return ", from " + strings.Join(out, ", ")
}

// writeObserved writes a table. Sources are suggested where all of them are known.
func writeObserved(b *strings.Builder, name string, p firewall.Knock, from []firewall.Knock, full bool) {
	b.WriteString(comment(strings.TrimPrefix(knockers(from, 8), ", ")))
	fmt.Fprintf(b, "[open.%s]\nports = %d\n", name, p.Port)
	if p.Protocol != rules.TCP {
		fmt.Fprintf(b, "protocol = %q\n", p.Protocol)
	}
	if len(from) == 0 || len(from) > mostFrom || full {
		fmt.Fprintf(b, "from = [\"0.0.0.0/0\", \"::/0\"] # everyone: too many sources to name, better say who may\n")
		return
	}
	var list []string
	v4, v6 := false, false
	for _, f := range from {
		list = append(list, fmt.Sprintf("%q", f.Source))
		v4, v6 = v4 || f.Source.Is4(), v6 || f.Source.Is6()
	}
	slices.Sort(list)
	fmt.Fprintf(b, "from = [%s]\n", strings.Join(list, ", "))
	switch {
	case !v6:
		b.WriteString("family = \"ipv4\"\n")
	case !v4:
		b.WriteString("family = \"ipv6\"\n")
	}
}

// askSentOn finds the ports that tables of others send on, such as those that
// containers publish.
func (s *starter) askSentOn(ports []firewall.Knock) (map[portKey]string, error) {
	out := map[portKey]string{}
	if s.runs == nil {
		return out, nil
	}
	var wants []want
	for _, p := range ports[:min(len(ports), mostSentOn)] {
		if p.Protocol == rules.SCTP {
			continue
		}
		w := want{listener: listener{Protocol: p.Protocol, Addr: netip.IPv6Unspecified(), Port: p.Port}, hi: p.Port, published: true}
		wants = append(wants, w)
		for _, v4 := range []bool{true, false} {
			for _, q := range w.packets(s, v4) {
				s.asked.note(q.packet)
			}
		}
	}
	if _, err := s.asked.run(); err != nil {
		return nil, err
	}
	for i := range wants {
		w := &wants[i]
		for _, q := range slices.Concat(w.packets(s, true), w.packets(s, false)) {
			if j := s.asked.answer(q.packet); j != nil && j.Moved {
				out[portKey{w.Protocol, w.Port}] = mover(j) + " sends it on"
				if j.Target.IsValid() {
					out[portKey{w.Protocol, w.Port}] += " to " + j.Target.String()
				}
			}
		}
	}
	return out, nil
}
