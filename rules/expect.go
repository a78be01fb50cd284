package rules

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// expectDraft is an [[expect]] table being read.
type expectDraft struct {
	Expect
	port span
	to   span
}

var expectSchema = schema[expectDraft]{
	{name: "from", also: []string{"source", "src", "saddr"}, read: func(r *reader, v named, e *expectDraft) {
		e.Packet.Src = r.address(v)
	}},
	{name: "to", also: []string{"destination", "dst", "daddr"}, read: func(r *reader, v named, e *expectDraft) {
		e.Packet.Dst, e.to = r.address(v), v.span()
	}},
	{name: "in", also: []string{"interface", "interfaces", "iif", "iface", "dev"}, read: func(r *reader, v named, e *expectDraft) {
		s, ok := r.str(v)
		if !ok {
			return
		}
		e.Packet.In = s
		if bad := checkInterface(s); bad != nil {
			r.errorf(v.span(), "a packet enters by one interface", "%s", bad.summary)
		} else if strings.HasSuffix(s, "*") {
			r.errorf(v.span(), "a packet enters by one interface", "in cannot hold a *: %s", quote(s))
		}
	}},
	{name: "port", also: []string{"ports", "dport", "protocol"}, read: func(r *reader, v named, e *expectDraft) {
		e.port = v.span()
		s, ok := v.v.(string)
		if !ok {
			hint := ""
			if n, ok := v.v.(int64); ok {
				hint = fmt.Sprintf("write %s", quote(fmt.Sprintf("%d/tcp", n)))
			}
			r.errorf(v.span(), hint, `port must be a string like "443/tcp", not %s`, v.kind())
			return
		}
		var bad *complaint
		if e.Packet.Protocol, e.Packet.DstPort, bad = parseExpectPort(s); bad != nil {
			r.report(Error, v.span(), *bad)
			return
		}
		switch e.Packet.Protocol {
		case ICMPv4:
			e.Packet.ICMPType = icmpEchoRequest
		case ICMPv6:
			e.Packet.ICMPType = icmp6EchoRequest
		}
	}},
	{name: "state", also: []string{"verdict", "result", "status", "outcome"}, read: func(r *reader, v named, e *expectDraft) {
		switch r.oneOf(v, "open", "filtered", "rejected") {
		case "open":
			e.State = OutcomeOpen
		case "rejected":
			e.State = OutcomeRejected
		}
	}},
}

// address reads one address.
func (r *reader) address(v named) netip.Addr {
	s, ok := v.v.(string)
	if !ok {
		r.errorf(v.span(), "", `%s must be a string like "192.0.2.1", not %s`, v.name, v.kind())
		return netip.Addr{}
	}
	a, bad := parseAddress(s)
	if bad == nil {
		return a
	}
	if many, worse := parseAddresses(s); worse == nil || strings.HasPrefix(s, "@") {
		bad = &complaint{fmt.Sprintf("%s must be one address, not %s", v.name, quote(s)), "a test sends one packet"}
		if worse == nil {
			one := many.Lo
			if many.Lo != many.Hi {
				one = one.Next() // the first of a network is that of no host
			}
			bad.hint += ": write " + quote(one.String())
		}
	}
	r.report(Error, v.span(), *bad)
	return netip.Addr{}
}

// parseExpectPort reads "443/tcp", or the name of a protocol without ports. The
// ICMPs stand for an echo request.
func parseExpectPort(s string) (Protocol, uint16, *complaint) {
	port, word, slash := strings.Cut(s, "/")
	if !slash {
		if p, ok := protocolNumber(s); ok && !p.hasPorts() {
			return p, 0, nil
		}
		bad := &complaint{quote(s) + " is not a port with its protocol", `write "443/tcp", or the name of a protocol without ports`}
		if n, err := strconv.ParseUint(s, 10, 16); err == nil && n > 0 {
			bad.hint = "did you mean " + quote(s+"/tcp") + "?"
		}
		return 0, 0, bad
	}
	p, ok := protocolNumber(word)
	if !ok || !p.hasPorts() {
		return 0, 0, &complaint{"unknown protocol " + quote(word) + " in " + quote(s), `use "tcp", "udp" or "sctp"`}
	}
	ports, bad := parsePorts(port)
	switch {
	case bad != nil:
		return 0, 0, bad
	case ports.Lo != ports.Hi:
		return 0, 0, &complaint{"port must be one port, not " + quote(s), "a test sends one packet"}
	}
	return p, ports.Lo, nil
}

// readExpects reads the [[expect]] tables.
func (d *draft) readExpects(r *reader) {
	for _, v := range d.tables["expect"] {
		var list []any
		switch tables := v.v.(type) {
		case []map[string]any:
			for _, t := range tables {
				list = append(list, t)
			}
		case []any:
			list = tables
		default:
			r.errorf(v.span(), "write [[expect]], once for each test", "[expect] is a list of tables, not %s", v.kind())
			continue
		}
		items, _ := value{list, v.at}.elements()
		for _, item := range items {
			if _, ok := item.v.(map[string]any); !ok {
				r.errorf(item.span(), "write [[expect]], once for each test", "a test must be a table, not %s", item.kind())
				continue
			}
			d.readExpect(r, item)
		}
	}
}

func (d *draft) readExpect(r *reader, v value) {
	e := &expectDraft{Expect: Expect{Pos: r.pos(v.at.key)}}
	before := r.errors
	has := expectSchema.read(r, v, "[[expect]]", e)
	for _, needed := range [][2]string{
		{"from", `write from = "198.51.100.9"`},
		{"port", `write port = "443/tcp"`},
		{"state", `write state = "open", "filtered" or "rejected"`},
	} {
		if !has[needed[0]] {
			r.errorf(v.at.key, needed[1], "%s is missing in [[expect]]", needed[0])
		}
	}
	if r.errors > before {
		return
	}
	p := e.Packet
	switch v4 := p.Src.Is4(); {
	case p.Dst.IsValid() && p.Dst.Is4() != v4:
		r.errorf(e.to, "name both of one family", "from and to are of different families")
	case p.Protocol == ICMPv4 && !v4:
		r.errorf(e.port, `did you mean "icmpv6"?`, "icmp has no IPv6 addresses")
	case p.Protocol == ICMPv6 && v4:
		r.errorf(e.port, `did you mean "icmp"?`, "icmpv6 has no IPv4 addresses")
	}
	d.Expect = append(d.Expect, e.Expect)
}
