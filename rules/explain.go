package rules

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Near is a rule that a packet missed, and why.
type Near struct {
	Kind string // "open" or "block"
	Name string
	Pos  Pos
	Why  string // "takes 22/tcp only from 192.0.2.0/24"
}

// Nearest lists the openings that name a packet's port but do not admit it, and
// then those that name the port of another protocol: at most ten.
func (r *Ruleset) Nearest(p Packet) []Near {
	const most = 10
	port := PortName(p.Protocol, p.DstPort)
	var out []Near
	for _, o := range r.OpensAt(p.Protocol, p.DstPort) {
		if field := r.Miss(&o.Traffic, p); field != "" {
			out = append(out, Near{"open", o.Name, o.Pos, fmt.Sprintf("takes %s %s", port, missed(field, &o.Traffic))})
		}
	}
	for i := range r.Policy.Open {
		o := &r.Policy.Open[i]
		for _, on := range o.On {
			if on.Protocol != p.Protocol && p.DstPort != 0 && inPorts(on.Ports, p.DstPort) && !o.Any {
				out = append(out, Near{"open", o.Name, o.Pos, "takes " + PortName(on.Protocol, p.DstPort) + ", not " + port})
			}
		}
	}
	return out[:min(len(out), most)]
}

// ParsePort reads "443/tcp", or the name or number of a protocol without ports.
func ParsePort(s string) (Protocol, uint16, error) {
	p, port, bad := parseExpectPort(s)
	if bad != nil {
		return 0, 0, errors.New(bad.summary)
	}
	return p, port, nil
}

func inPorts(ranges []PortRange, port uint16) bool {
	return slices.ContainsFunc(ranges, func(r PortRange) bool { return r.Lo <= port && port <= r.Hi })
}

// PortName writes "22/tcp", or the protocol alone where there are no ports.
func PortName(p Protocol, port uint16) string {
	if p.hasPorts() {
		return fmt.Sprintf("%d/%s", port, p)
	}
	return p.String()
}

// missed says what a rule asks for that a packet does not have.
func missed(field string, t *Traffic) string {
	switch field {
	case "expires":
		return "only until " + t.Expires.Format(time.RFC3339)
	case "family":
		if t.Family == Both {
			return "only over ipv4" // an extension header of IPv6
		}
		return "only over " + t.Family.String()
	case "interfaces":
		return "only by " + strings.Join(t.Interfaces, ", ")
	case "from":
		return "only from " + t.From.String()
	case "except":
		return "except from " + t.Except.String()
	}
	return "only to " + t.To.String()
}

// String lists a source in words: the first addresses and sets, and how many more.
func (s *Source) String() string {
	if s.Any {
		return "anywhere"
	}
	const most = 6
	var list []string
	for _, r := range s.Ranges {
		list = append(list, r.String())
	}
	for _, name := range s.Sets {
		list = append(list, "@"+name)
	}
	if n := len(list) - most; n > 0 {
		list = append(list[:most], fmt.Sprintf("%d more", n))
	}
	return strings.Join(list, ", ")
}
