package importer

import (
	"fmt"
	"slices"
	"strings"

	"deadlight/rules"
)

// protoPorts is a protocol with ports; ports are nil for one without.
type protoPorts struct {
	proto num
	ports nums
}

// table is an [open.*], [block.*] or [egress.*] in the making.
type table struct {
	kind    string
	name    string
	any     bool
	on      []protoPorts
	v       [2]bool  // IPv4, IPv6
	from    [2]addrs // nil: everyone
	to      [2]addrs
	devices []string
	limit   *limit
	log     bool
	comment string
	by      []*rule
	except  [2]addrs
}

// Protocols by number.
const (
	protoICMP   = 1
	protoIGMP   = 2
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58
	protoSCTP   = 132
)

func hasPorts(p num) bool { return p == protoTCP || p == protoUDP || p == protoSCTP }

// extension reports whether IPv6 has the number as an extension header, which no
// rule of a policy ever sees.
func extension(p num) bool { return p == 0 || p == 43 || p == 44 || p == 60 }

// usual are the protocols that are listed where a rule admits nearly all.
func usual() []num {
	return []num{protoICMP, protoIGMP, 4, protoTCP, protoUDP, 41, 47, 50, 51, protoICMPv6, 89, 103, 112, 115, protoSCTP}
}

// express says a box in the words of a policy. asked is the source that its rule
// names, of which earlier rules may have left a part. What it cannot say is left out,
// and lost says why; the table is nil if nothing is left.
func express(b box, asked addrs, v4 bool) (t *table, lost []string) {
	all := everything(v4)
	t = &table{}
	f := 1
	if v4 {
		f = 0
	}
	t.v[f] = true
	if !b.sport.equal(all.sport) {
		return nil, []string{"it names source ports"}
	}
	if b.types != all.types {
		// The kernel itself hands TCP and SCTP only to a local address.
		if b.types&toLocal == 0 || !b.proto.within(nums{{protoTCP, protoTCP}, {protoSCTP, protoSCTP}}) {
			return nil, []string{"it depends on the kind of the destination (local, broadcast, multicast)"}
		}
	}
	not := slices.DeleteFunc(slices.Clone(b.dev.not), func(n string) bool { return n == "lo" })
	if len(not) > 0 {
		return nil, []string{"it is about every interface except " + strings.Join(not, ", ") + ": name those that are meant"}
	}
	t.devices = b.dev.in
	for _, d := range t.devices {
		if !deviceName(d) {
			return nil, []string{fmt.Sprintf("Linux has no interface %q", d)}
		}
	}
	// By whom it is meant, what the rule says, or by whom not: whichever is shortest.
	t.from[f] = b.src
	if not := all.src.minus(b.src); len(not) < len(b.src) {
		t.from[f], t.except[f] = all.src, not
	}
	if asked = asked.and(all.src); len(asked) > 0 && b.src.within(asked) {
		if not := asked.minus(b.src); len(not) > 0 && len(asked)+len(not) <= len(t.from[f])+len(t.except[f]) {
			t.from[f], t.except[f] = asked, not
		}
	}
	if t.from[f].equal(all.src) {
		t.from[f] = nil
	}
	if !b.dst.equal(all.dst) {
		t.to[f] = b.dst
	}
	if b.proto.equal(all.proto) && b.dport.equal(all.dport) {
		t.any = true
		return t, nil
	}
	var list []num
	count := 0
	for _, i := range b.proto {
		count += int(i.hi-i.lo) + 1
	}
	if count > 32 {
		for _, p := range usual() {
			if b.proto.has(p) && (v4 || p != protoICMP && p != protoIGMP) && (!v4 || p != protoICMPv6) {
				list = append(list, p)
			}
		}
		lost = append(lost, "it is about nearly all protocols: only the usual are taken over")
	} else {
		for _, i := range b.proto {
			for p := i.lo; p <= i.hi; p++ {
				list = append(list, p)
			}
		}
	}
	for _, p := range list {
		switch {
		case hasPorts(p):
			if ports := b.dport.and(one(1, 65535)); len(ports) > 0 {
				t.on = append(t.on, protoPorts{p, ports})
			}
		case !v4 && extension(p):
		case v4 && p == protoICMPv6 && !slices.Contains(list, protoICMP), !v4 && p == protoICMP && !slices.Contains(list, protoICMPv6):
			// Nobody sends that, and it would look like a mistake.
		case b.dport.equal(all.dport):
			t.on = append(t.on, protoPorts{p, nil})
		case p == protoICMP || p == protoICMPv6:
			lost = append(lost, noICMPTypes)
		default:
			lost = append(lost, fmt.Sprintf("Deadlight knows no ports of %s", rules.Protocol(p)))
		}
	}
	if len(t.on) == 0 {
		return nil, lost
	}
	return t, lost
}

// deviceName reports whether a policy may name an interface so.
func deviceName(s string) bool {
	base := strings.TrimSuffix(s, "*")
	if base == "" || len(s) > 15 || base == "." || base == ".." {
		return false
	}
	for _, c := range base {
		if c <= ' ' || c > '~' || strings.ContainsRune(`/:",*\`, c) {
			return false
		}
	}
	return true
}

// plan is what a policy will say.
type plan struct {
	reject     bool
	echo       *bool
	dhcp       bool
	output     bool // egress tables are the list of what may leave
	outReject  bool
	forward    bool // routed traffic is dropped
	logDropped *logged
	tables     []*table
	notes      []Note
	sets       []namedSet
	families   [2]bool
	format     string
}

type logged struct{ limit *limit }

// echoBox is ping, or another type of ICMP.
func icmpBox(v4 bool, types ...num) []box {
	var out []box
	for _, t := range types {
		b := everything(v4)
		b.proto, b.dport = one(protoICMPv6, protoICMPv6), one(t<<8, t<<8|255)
		if v4 {
			b.proto = one(protoICMP, protoICMP)
		}
		out = append(out, b)
	}
	return out
}

func echoBox(v4 bool) box {
	if v4 {
		return icmpBox(true, 8)[0]
	}
	return icmpBox(false, 128)[0]
}

// dhcpBox is what [dhcp] admits.
func dhcpBox(v4 bool) box {
	b := everything(v4)
	b.proto = one(protoUDP, protoUDP)
	b.sport, b.dport = one(67, 67), one(68, 68)
	if !v4 {
		b.sport, b.dport = one(547, 547), one(546, 546)
		b.src, b.dst = network("fe80::/10"), network("fe80::/10")
	}
	return b
}

// always is what Deadlight admits whatever the policy says.
func always(v4 bool) []box {
	if v4 {
		igmp := everything(true)
		igmp.proto = one(protoIGMP, protoIGMP)
		return append(icmpBox(true, 3, 11, 12), igmp)
	}
	mld := icmpBox(false, 130, 131, 132, 143)
	for i := range mld {
		mld[i].src = network("fe80::/10")
	}
	return append(icmpBox(false, 1, 2, 3, 4, 133, 134, 135, 136, 137), mld...)
}

// merge joins tables that say the same of other packets.
func merge(list []*table) []*table {
	for again := true; again; {
		again = false
		for i := 0; i < len(list); i++ {
			for k := i + 1; k < len(list); k++ {
				if list[i].absorb(list[k]) {
					list = slices.Delete(list, k, k+1)
					again = true
					k--
				}
			}
		}
	}
	return list
}

// absorb takes another table in if one table can say both.
func (t *table) absorb(o *table) bool {
	if t.kind != o.kind || t.log != o.log || !slices.Equal(t.devices, o.devices) || t.comment != o.comment || !t.sameLimit(o) {
		return false
	}
	sameOn := t.any == o.any && slices.EqualFunc(t.on, o.on, func(a, b protoPorts) bool { return a.proto == b.proto && a.ports.equal(b.ports) })
	sameFrom := t.v == o.v && equalBoth(t.from, o.from) && equalBoth(t.except, o.except)
	sameTo := t.v == o.v && equalBoth(t.to, o.to)
	own := sharesRule(t, o)
	switch {
	case sameOn && sameFrom && sameTo:
	case sameOn && apart(t.v, o.v) && kindred(t, o):
		for f := range t.v {
			if o.v[f] {
				t.v[f], t.from[f], t.to[f], t.except[f] = true, o.from[f], o.to[f], o.except[f]
			}
		}
	case sameFrom && sameTo && !t.any && !o.any && (own || t.comment != "" || t.service() != "" && t.service() == o.service() || t.joins(o)) && (t.limit == nil || own || t.limit.key != ""):
		both := *t
		both.on = slices.Clone(t.on)
		for _, p := range o.on {
			both.addPorts(p)
		}
		if len(both.split()) > 1 { // a table opens each of its ports for each of its protocols
			return false
		}
		t.on = both.on
	case sameOn && sameTo && equalBoth(t.except, o.except) && t.except[0] == nil && t.except[1] == nil && (t.limit == nil || t.limit.perSource() && own) && t.bounded() && o.bounded():
		for f := range t.v {
			if t.v[f] {
				t.from[f] = union(append(slices.Clone(t.from[f]), o.from[f]...)...)
			}
		}
	default:
		return false
	}
	for _, r := range o.by {
		if !slices.Contains(t.by, r) {
			t.by = append(t.by, r)
		}
	}
	return true
}

func (l *limit) perSource() bool { return l.rate == nil || l.rate.PerSource }

func (t *table) sameLimit(o *table) bool {
	a, b := t.limit, o.limit
	switch {
	case a == b:
		return true
	case a == nil || b == nil || a.conns != b.conns || a.key != b.key || (a.rate == nil) != (b.rate == nil):
		return false
	case a.rate == nil:
	case *a.rate != *b.rate || !a.rate.PerSource:
		return false
	}
	return apart(t.v, o.v) || a.key != ""
}

func apart(a, b [2]bool) bool { return !(a[0] && b[0]) && !(a[1] && b[1]) }

func equalBoth(a, b [2]addrs) bool { return a[0].equal(b[0]) && a[1].equal(b[1]) }

// kindred reports whether a table of one family goes on in one of the other: both
// name their peers or neither does.
func kindred(t, o *table) bool {
	some := func(t *table, s [2]addrs) int {
		n := 0
		for f := range t.v {
			if t.v[f] && s[f] == nil {
				n |= 1
			} else if t.v[f] {
				n |= 2
			}
		}
		return n
	}
	return some(t, t.from) == some(o, o.from) && some(t, t.to) == some(o, o.to) && some(t, t.from) != 3 && some(t, t.to) != 3
}

func sharesRule(t, o *table) bool {
	return slices.ContainsFunc(t.by, func(r *rule) bool { return slices.Contains(o.by, r) })
}

// bounded reports whether the table names its sources in every family it has.
func (t *table) bounded() bool {
	return (!t.v[0] || t.from[0] != nil) && (!t.v[1] || t.from[1] != nil)
}

// joins reports whether ports belong together though nobody said so: the same
// port of TCP and UDP, and the web.
func (t *table) joins(o *table) bool {
	if len(t.on) == 0 || len(o.on) == 0 || t.on[0].ports == nil || o.on[0].ports == nil {
		return false
	}
	web := func(t *table) bool {
		return len(t.on) == 1 && t.on[0].proto == protoTCP && t.on[0].ports.within(nums{{80, 80}, {443, 443}})
	}
	return web(t) && web(o) || len(o.on) == 1 && t.on[0].ports.equal(o.on[0].ports)
}

// service is that of firewalld which all its rules are made for, if there is one.
func (t *table) service() string {
	name := ""
	for i, r := range t.by {
		if i > 0 && r.service != name {
			return ""
		}
		name = r.service
	}
	return name
}

func (t *table) addPorts(p protoPorts) {
	for i := range t.on {
		if t.on[i].proto == p.proto {
			if p.ports != nil {
				t.on[i].ports = union(append(slices.Clone(t.on[i].ports), p.ports...)...)
			}
			return
		}
	}
	t.on = append(t.on, p)
	slices.SortFunc(t.on, func(a, b protoPorts) int { return a.proto.Compare(b.proto) })
}

// split gives a table for each list of ports: a table opens every port of it for
// every protocol of it.
func (t *table) split() []*table {
	if t.any {
		return []*table{t}
	}
	var out []*table
	for _, p := range t.on {
		i := slices.IndexFunc(out, func(o *table) bool { return o.on[0].ports.equal(p.ports) && (o.on[0].ports == nil) == (p.ports == nil) })
		if i >= 0 {
			out[i].on = append(out[i].on, p)
			continue
		}
		c := *t
		c.on = []protoPorts{p}
		out = append(out, &c)
	}
	return out
}
