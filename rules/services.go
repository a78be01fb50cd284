package rules

import (
	_ "embed" // of the table of services
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Names of services are looked up in the policy and in our own table, never in
// that of the host: a policy means the same everywhere.

//go:embed services.txt
var serviceTable string

// builtinServices gives the services of our own table.
func builtinServices() map[string][]ProtoPorts {
	out := make(map[string][]ProtoPorts)
	for line := range strings.Lines(serviceTable) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		port, word, _ := strings.Cut(f[1], "/")
		n, err := strconv.ParseUint(port, 10, 16)
		p, ok := protocolNumber(word)
		if err != nil || !ok {
			continue // a test keeps such lines out
		}
		for _, name := range append([]string{f[0]}, f[2:]...) {
			out[name] = addPort(out[name], p, PortRange{uint16(n), uint16(n)})
		}
	}
	return out
}

// addPort adds a range to the ports of its protocol.
func addPort(on []ProtoPorts, p Protocol, r PortRange) []ProtoPorts {
	for i := range on {
		if on[i].Protocol == p {
			on[i].Ports = mergePorts(append(on[i].Ports, r))
			return on
		}
	}
	on = append(on, ProtoPorts{p, []PortRange{r}})
	slices.SortFunc(on, func(a, b ProtoPorts) int { return int(a.Protocol) - int(b.Protocol) })
	return on
}

// serviceDraft is a [service.*] table being read.
type serviceDraft struct {
	on        []ProtoPorts
	at        span
	ports     []placedPorts
	protocols []placedProtocol
	broken    bool
	used      bool
}

// maxServiceRanges keeps ten thousand rules that name one service small.
const maxServiceRanges = 256

var serviceSchema = schema[serviceDraft]{
	{name: "ports", also: []string{"port", "dport", "dports", "destination-port"}, read: func(r *reader, v named, s *serviceDraft) { s.ports = r.ports(v) }},
	{name: "protocol", also: []string{"proto", "protocols", "transport"}, read: func(r *reader, v named, s *serviceDraft) {
		s.protocols, s.broken = r.protocols(v, false)
	}},
	{name: "override", also: []string{"overrides", "replace"}, read: ignore[serviceDraft]},
}

// readServices reads [service.*].
func (d *draft) readServices(r *reader) {
	for _, f := range d.gather(r, "service", "metrics", serviceSchema.names()) {
		s := &serviceDraft{at: f.key}
		title := "[service." + tableName(f.name) + "]"
		has := serviceSchema.read(r, f.value, title, s)
		if !has["ports"] {
			r.errorf(f.key, "write ports = [9100]", "ports is missing in %s", title)
		}
		if !has["protocol"] {
			s.protocols = []placedProtocol{{Protocol: TCP}}
		}
		var all []placedTraffic
		for _, p := range s.protocols {
			switch {
			case p.any:
				r.errorf(p.at, `use "tcp", "udp" or "sctp"`, `a service cannot be of protocol "any"`)
				s.broken = true
			case !p.hasPorts():
				r.errorf(p.at, "name it in protocol of a rule, without a service", "%s has no ports", p.Protocol)
				s.broken = true
			}
			for _, ports := range s.ports {
				all = append(all, placedTraffic{p.Protocol, ports.PortRange, ports.at})
			}
		}
		s.on = trafficOf(all)
		for _, on := range s.on {
			if len(on.Ports) > maxServiceRanges {
				r.errorf(f.key, "ports next to each other are one range", "%s has more than %d ranges of ports", title, maxServiceRanges)
				break
			}
		}
		d.services[f.name] = s
		d.serviceNames = append(d.serviceNames, f.name)
	}
}

// serviceNames reads the value of service. It reports whether some of it was not
// understood.
func (r *reader) serviceNames(v named, broken bool) ([]placedName, bool) {
	var out []placedName
	seen := make(map[string]bool)
	r.each(v, `a string like "ssh"`, `name at least one service, like "ssh"`, func(e value, mistyped func()) {
		s, ok := e.v.(string)
		if n, number := e.v.(int64); number {
			r.errorf(e.span(), fmt.Sprintf("write ports = %d", n), "%s is a port, not a service", strconv.FormatInt(n, 10))
			broken = true
			return
		}
		if !ok {
			mistyped()
			broken = true
			return
		}
		if !seen[s] {
			seen[s] = true
			out = append(out, placedName{s, e.span()})
		}
	})
	return out, broken
}

// service gives the ports of a service; false if they are not known.
func (d *draft) service(r *reader, n placedName) ([]ProtoPorts, bool) {
	if s := d.services[n.name]; s != nil {
		s.used = true
		return s.on, !s.broken && len(s.on) > 0
	}
	if r.services == nil {
		r.services = builtinServices()
		r.serviceWords = slices.Sorted(maps.Keys(r.services))
	}
	if on := r.services[n.name]; on != nil {
		return on, true
	}
	if d.partial {
		return nil, false
	}
	hint := fmt.Sprintf("define it: [service.%s]", tableName(n.name))
	if near := r.nearest(n.name, slices.Concat(d.serviceNames, r.serviceWords)); near != "" {
		hint = "did you mean " + quote(near) + "?"
		if s := d.services[near]; s != nil {
			s.used = true
		}
	} else if ports, bad := parsePorts(n.name); bad == nil {
		hint = "write ports = " + quote(ports.String())
	} else if !isTableName(n.name) {
		hint = "write the number in ports"
	}
	r.errorf(n.at, hint, "unknown service %s", quote(n.name))
	return nil, false
}

// ServiceName gives the name of our own table for a port, the first that stands
// there, or "".
func ServiceName(p Protocol, port uint16) string {
	for line := range strings.Lines(serviceTable) {
		line, _, _ = strings.Cut(line, "#")
		if f := strings.Fields(line); len(f) > 1 && f[1] == fmt.Sprintf("%d/%s", port, p) {
			return f[0]
		}
	}
	return ""
}

// ServicePorts gives the ports of a name of our own table, nil if it has none.
func ServicePorts(name string) []ProtoPorts { return builtinServices()[name] }
