package rules

import (
	"fmt"
	"slices"
	"strings"
)

// placedProtocol is an element of protocol.
type placedProtocol struct {
	Protocol
	any bool // "any"
	at  span
}

// hasPorts reports whether a rule names ports of the protocol.
func (p Protocol) hasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// isExtension reports whether the number is that of an IPv6 extension header, which
// the kernel passes over: it judges by what stands behind. Over IPv4 it is a
// protocol like others. An authentication header it judges in both families.
func (p Protocol) isExtension() bool {
	switch p {
	case 0, 43, 44, 60: // hop-by-hop options, routing, fragment, destination options
		return true
	}
	return false
}

// noExtensions complains of protocols that IPv6 has as extension headers: no
// packet would ever match.
func (o *rule) noExtensions(r *reader, v4, v6 bool) {
	for _, p := range o.protocols {
		if !v6 || p.any || !p.isExtension() {
			continue
		}
		const why = "%s is an extension header of IPv6 and never matches there: what stands behind it is judged"
		switch {
		case !v4:
			r.errorf(p.at, "name the protocols behind it", why, p.Protocol)
		case len(o.protocols) == 1:
			r.warnf(p.at, `write family = "ipv4"`, why, p.Protocol)
		default:
			r.warnf(p.at, `give it a table of its own with family = "ipv4"`, why, p.Protocol)
		}
	}
}

// protocolNumber gives the number of a protocol by the name a policy has for it.
// Names of those that a policy seldom opens are for reading only.
func protocolNumber(name string) (Protocol, bool) {
	for _, p := range []Protocol{TCP, UDP, SCTP, ESP, AH, GRE, VRRP, IGMP, ICMPv4, ICMPv6} {
		if p.String() == name {
			return p, true
		}
	}
	switch name {
	case "ipip":
		return 4, true
	case "ospf":
		return 89, true
	case "pim":
		return 103, true
	case "l2tp":
		return 115, true
	}
	return 0, false
}

// protocolWords are the names to suggest.
func protocolWords() []string {
	return []string{"tcp", "udp", "sctp", "esp", "ah", "gre", "vrrp", "igmp", "icmp", "icmpv6", "ipip", "ospf", "pim", "l2tp", "any"}
}

// protocols reads the value of protocol. It reports whether some of it was not
// understood.
func (r *reader) protocols(v named, broken bool) ([]placedProtocol, bool) {
	var out []placedProtocol
	// A list may repeat itself a hundred thousand times.
	var seen [256]bool
	add := func(p placedProtocol) {
		if p.any || !seen[p.Protocol] {
			out = append(out, p)
		}
		seen[p.Protocol] = !p.any || seen[p.Protocol]
	}
	r.each(v, `a string like "tcp" or a number`, "leave protocol out for tcp", func(e value, mistyped func()) {
		switch s := e.v.(type) {
		case string:
			p, ok := protocolNumber(s)
			if !ok && s != "any" {
				r.unknownProtocol(e.span(), s)
				broken = true
				return
			}
			add(placedProtocol{p, s == "any", e.span()})
		case int64:
			if s < 0 || s > 255 {
				r.errorf(e.span(), "protocols run from 0 to 255; a port belongs in ports", "protocol %d is out of range", s)
				broken = true
				return
			}
			add(placedProtocol{Protocol(s), false, e.span()})
		default:
			mistyped()
			broken = true
		}
	})
	return out, broken
}

func (r *reader) unknownProtocol(at span, s string) {
	switch s {
	case "all", "*", "ip":
		r.errorf(at, `did you mean "any"?`, "unknown protocol %s", quote(s))
	case "dccp":
		r.errorf(at, "write its number, 33", "unknown protocol %s", quote(s))
	case "udplite":
		r.errorf(at, "write its number, 136", "unknown protocol %s", quote(s))
	case "quic", "http3":
		r.errorf(at, `it is "udp"`, "unknown protocol %s", quote(s))
	default:
		r.word(at, "protocol", s, protocolWords())
	}
}

// traffic works out which ports of which protocols the rule is about.
func (o *rule) traffic(r *reader, d *draft) {
	before := r.errors
	o.checkProtocols(r)
	if r.errors > before || o.broken || o.Any {
		return
	}
	protocols := o.protocols
	if len(protocols) == 0 && !o.has["protocol"] && !o.has["service"] {
		protocols = []placedProtocol{{Protocol: TCP}}
	}
	if o.has["service"] {
		for _, s := range o.services {
			o.addService(r, d, s)
		}
	}
	for _, p := range protocols {
		switch {
		case o.has["service"]: // they narrowed it
		case p.hasPorts():
			for _, ports := range o.ports {
				o.opened = append(o.opened, placedTraffic{p.Protocol, ports.PortRange, ports.at})
			}
		default:
			o.opened = append(o.opened, placedTraffic{p.Protocol, PortRange{}, p.at})
		}
	}
	o.On = trafficOf(o.opened)
}

// checkProtocols complains of ports where none can be and of none where some
// must be.
func (o *rule) checkProtocols(r *reader) {
	ported := o.has["ports"] || o.has["service"]
	key := "ports"
	if !o.has["ports"] {
		key = "service"
	}
	if o.has["ports"] && o.has["service"] {
		r.errorf(o.spot("service"), "keep one of them; a [service.NAME] can hold several ports", "ports and service are both given in %s", o.title())
	}
	portless := false
	for _, p := range o.protocols {
		switch {
		case p.any && len(o.protocols) > 1:
			r.errorf(p.at, "remove the others, or it", `"any" holds every other protocol`)
			o.broken = true
		case p.any && ported:
			r.errorf(o.spot(key), "remove it, or name the protocols that have these ports", `%s cannot be given with protocol "any"`, key)
		case p.any:
			o.Any = true
		case p.hasPorts():
		case ported:
			hint := "give it a table of its own without " + key
			if p.Protocol == ICMPv4 || p.Protocol == ICMPv6 {
				hint += "; echo is governed by [icmp]"
			}
			r.errorf(p.at, hint, "%s has no ports", p.Protocol)
		default:
			portless = true
		}
	}
	withPorts := slices.ContainsFunc(o.protocols, func(p placedProtocol) bool { return !p.any && p.hasPorts() })
	switch {
	case ported || o.broken || o.Any:
	case withPorts && portless:
		r.errorf(o.table, "give the protocols without ports a table of their own", "ports is missing in %s", o.title())
	case withPorts && o.kind == "block":
		r.errorf(o.table, `write ports = "1-65535" for all of them`, "ports is missing in %s", o.title())
	case portless:
	case o.kind == "block" && !o.has["protocol"]:
		o.Any = true
	case o.has["protocol"] && len(o.protocols) == 0: // it was complained of
	default:
		hint := `write ports = [443] or service = "https"`
		if o.kind == "failsafe" {
			hint = "write ports = [22], the port that lets you in"
		}
		r.errorf(o.table, hint, "ports is missing in %s", o.title())
	}
}

// addService adds the ports of a service, of the protocols that are asked for.
func (o *rule) addService(r *reader, d *draft, s placedName) {
	on, ok := d.service(r, s)
	if !ok {
		return
	}
	met := false
	for _, p := range on {
		if len(o.protocols) > 0 && !slices.ContainsFunc(o.protocols, func(q placedProtocol) bool { return q.Protocol == p.Protocol }) {
			continue
		}
		met = true
		for _, ports := range p.Ports {
			o.opened = append(o.opened, placedTraffic{p.Protocol, ports, s.at})
		}
	}
	if !met {
		r.errorf(s.at, fmt.Sprintf("%s is %s: remove protocol", s.name, portList(on)), "service %s and protocol do not meet", quote(s.name))
	}
}

// portList writes ports for people: "53/tcp, 53/udp".
func portList(on []ProtoPorts) string {
	var out []string
	for _, p := range on {
		for _, r := range p.Ports {
			out = append(out, r.String()+"/"+p.Protocol.String())
		}
	}
	return strings.Join(out, ", ")
}

// trafficOf sorts what a rule names by protocol.
func trafficOf(opened []placedTraffic) []ProtoPorts {
	var protocols []Protocol
	for _, t := range opened {
		if !slices.Contains(protocols, t.protocol) {
			protocols = append(protocols, t.protocol)
		}
	}
	slices.Sort(protocols)
	var out []ProtoPorts
	for _, p := range protocols {
		var ports []PortRange
		for _, t := range opened {
			if t.protocol == p && p.hasPorts() {
				ports = append(ports, t.PortRange)
			}
		}
		out = append(out, ProtoPorts{p, mergePorts(ports)})
	}
	return out
}
