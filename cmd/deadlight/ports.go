package main

import (
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// Ports as seen from outside: who could reach what before a change, and who can
// after it.

// portJSON is a run of ports of a protocol that a change is about.
type portJSON struct {
	Protocol  string         `json:"protocol"` // tcp, udp …; "echo"; "any": of a rule for every protocol
	Port      string         `json:"port"`     // "443", "6000-6010"; "*": without ports, or all that no rule names
	Family    string         `json:"family"`   // ipv4, ipv6 or both
	Before    string         `json:"before"`
	After     string         `json:"after"`
	Listeners []listenerJSON `json:"listeners"`

	opened, closed bool // for somebody
	open           bool // afterwards
	lo, hi         int
}

// listenerJSON is a process that a change concerns.
type listenerJSON struct {
	PID     int    `json:"pid"` // 0: cannot be told
	Comm    string `json:"comm"`
	Address string `json:"address"`
	Effect  string `json:"effect"` // gains, loses or changes: who may reach it
}

// reach says who gets to a port.
type reach struct {
	text string
	key  string // equal for equal reach, whatever the words leave out
	open bool   // to somebody
}

const (
	unfiltered = "not filtered by deadlight"
	everyOther = "other"
)

// outlook is what a policy lets the outside reach.
type outlook struct {
	rs     *rules.Ruleset
	common map[string]bool // names of sets that hold the same in the policy it is compared with
	label  string          // tells its other sets apart
}

// outlooks compares two policies; before may be nil.
func outlooks(before, after *rules.Ruleset) (was, will *outlook) {
	common := map[string]bool{}
	if before == nil {
		return nil, &outlook{after, common, "after"}
	}
	for _, s := range before.Policy.Sets {
		o := after.Policy.Set(s.Name)
		common[s.Name] = o != nil && s.Ranges.Equal(o.Ranges)
	}
	return &outlook{before, common, "before"}, &outlook{after, common, "after"}
}

// ofFamily is the part of a source that lies in a family.
func (o *outlook) ofFamily(s rules.Source, v4 bool) rules.Source {
	in := func(ranges []rules.AddrRange) []rules.AddrRange {
		var out []rules.AddrRange
		for _, r := range ranges {
			if r.Lo.Is4() == v4 {
				out = append(out, r)
			}
		}
		return out
	}
	out := rules.Source{Any: s.Any, Ranges: in(s.Ranges)}
	for _, name := range s.Sets {
		if set := o.rs.Policy.Set(name); set != nil && set.Ranges.Of(v4).Len() > 0 {
			out.Sets = append(out.Sets, name)
		}
	}
	return out
}

// keyOf writes a source in full.
func (o *outlook) keyOf(s rules.Source) string {
	var b strings.Builder
	fmt.Fprint(&b, s.Any)
	for _, r := range s.Ranges {
		fmt.Fprintf(&b, " %s-%s", r.Lo, r.Hi)
	}
	for _, name := range s.Sets {
		fmt.Fprintf(&b, " @%s", name)
		if !o.common[name] {
			fmt.Fprintf(&b, "#%s", o.label)
		}
	}
	return b.String()
}

func empty(s rules.Source) bool { return !s.Any && len(s.Ranges) == 0 && len(s.Sets) == 0 }

// who says whom a rule is about in a family; nobody: ok is false.
func (o *outlook) who(t *rules.Traffic, v4 bool) (text, key string, ok bool) {
	from, except, to := o.ofFamily(t.From, v4), o.ofFamily(t.Except, v4), o.ofFamily(t.To, v4)
	toAny := t.To.Any || empty(t.To)
	if !t.Family.Has(v4) || empty(from) || !toAny && empty(to) || !t.Expires.IsZero() && !time.Now().Before(t.Expires) {
		return "", "", false
	}
	text = from.String()
	if !empty(except) {
		text += " except " + except.String()
	}
	if !toAny {
		text += " at " + to.String()
	}
	if len(t.Interfaces) > 0 {
		text += " by " + strings.Join(t.Interfaces, ", ")
	}
	interfaces := slices.Clone(t.Interfaces)
	slices.Sort(interfaces)
	key = fmt.Sprint(o.keyOf(from), "|", o.keyOf(except), "|", o.keyOf(to), "|", toAny, "|", interfaces, "|", t.Expires.Unix())
	return text, key, true
}

// at says who reaches a port, leaving aside rules for every protocol.
func (o *outlook) at(p rules.Protocol, port uint16, v4 bool) reach {
	var texts, keys []string
	for _, op := range o.rs.OpensAt(p, port) {
		if op.Any {
			continue
		}
		text, key, ok := o.who(&op.Traffic, v4)
		if !ok {
			continue
		}
		text += limits(op)
		key += limits(op)
		if text == "anywhere" { // the others add nothing
			texts, keys = []string{text}, []string{key}
			break
		}
		texts, keys = append(texts, text), append(keys, key)
	}
	if len(texts) == 0 {
		return o.closed()
	}
	text := "open to " + strings.Join(texts, "; ")
	if len(texts) == 1 && texts[0] == "anywhere" {
		text = "open"
	}
	for i := range o.rs.Policy.Block {
		b := &o.rs.Policy.Block[i]
		if b.Any || !names(&b.Traffic, p, port) {
			continue
		}
		who, key, ok := o.who(&b.Traffic, v4)
		switch {
		case !ok:
		case who == "anywhere":
			return o.closed()
		default:
			text += ", blocked from " + who
			keys = append(keys, "block "+key)
		}
	}
	slices.Sort(keys)
	return reach{text, strings.Join(keys, "; "), true}
}

func names(t *rules.Traffic, p rules.Protocol, port uint16) bool {
	for _, on := range t.On {
		if on.Protocol == p && (on.Ports == nil || slices.ContainsFunc(on.Ports, func(r rules.PortRange) bool { return r.Lo <= port && port <= r.Hi })) {
			return true
		}
	}
	return false
}

// names reports whether an opening names the port.
func (o *outlook) names(p rules.Protocol, port uint16) bool {
	return slices.ContainsFunc(o.rs.OpensAt(p, port), func(op *rules.Open) bool { return !op.Any })
}

// closed is what a port meets that nothing opens.
func (o *outlook) closed() reach {
	d := o.rs.Policy.Default
	switch {
	case d.Observe:
		return reach{"open: enforce = false", "observed", true}
	case d.Input == rules.Reject:
		return reach{"rejected", "rejected", false}
	}
	return reach{"filtered", "filtered", false}
}

// echo says who is answered a ping.
func (o *outlook) echo() reach {
	i := o.rs.Policy.ICMP
	if !i.Echo {
		return o.closed()
	}
	text := "answered"
	if i.Rate != nil {
		text += fmt.Sprintf(" within %d/%s", i.Rate.Limit, unit(i.Rate.Per))
	}
	return reach{text, fmt.Sprint(text, i.Rate != nil && i.Rate.PerSource), true}
}

// trusted says who reaches everything, and who nothing.
func (o *outlook) trusted(v4 bool) reach {
	var texts, keys []string
	add := func(kind string, t *rules.Traffic, more string) {
		if text, key, ok := o.who(t, v4); t.Any && ok {
			texts, keys = append(texts, kind+text+more), append(keys, kind+key+more)
		}
	}
	open := false
	for i := range o.rs.Policy.Open {
		op := &o.rs.Policy.Open[i]
		open = open || op.Any
		add("open to ", &op.Traffic, limits(op))
	}
	for i := range o.rs.Policy.Block {
		add("blocked from ", &o.rs.Policy.Block[i].Traffic, "")
	}
	if len(texts) == 0 {
		return reach{text: "-"}
	}
	slices.Sort(keys)
	return reach{strings.Join(texts, "; "), strings.Join(keys, "; "), open}
}

// portsBefore says who reached a port before the change.
type portsBefore struct {
	was *outlook // the policy that the kernel holds; nil: there is none
	// ask is the running kernel's word on a stranger, where it holds something
	// else than was last applied; nil: it holds was, or no table.
	ask func(p rules.Protocol, port uint16, v4 bool) (reach, error)
}

func (b *portsBefore) at(p rules.Protocol, port uint16, v4 bool) (reach, error) {
	switch {
	case b.ask != nil:
		return b.ask(p, port, v4)
	case b.was != nil:
		return b.was.at(p, port, v4), nil
	}
	return reach{unfiltered, unfiltered, true}, nil
}

// stranger judges who anywhere may reach, as the kernel was asked.
func (o *outlook) stranger(p rules.Protocol, port uint16, v4 bool) string {
	d := o.rs.Decide(strangersPacket(p, port, v4))
	if d.Observed {
		return rules.OutcomeOpen.String()
	}
	return d.Outcome.String()
}

func strangersPacket(p rules.Protocol, port uint16, v4 bool) rules.Packet {
	return rules.Packet{Protocol: p, DstPort: port, SrcPort: 40000, Src: stranger(!v4), Dst: nowhere(!v4), At: time.Now()}
}

// changedPorts lists where the outside's view changes.
func changedPorts(b *portsBefore, will *outlook, found []listener) ([]portJSON, error) {
	var out []portJSON
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP, rules.SCTP} {
		rows, err := changedRuns(b, will, p, found)
		if err != nil {
			return nil, err
		}
		out = append(out, rows...)
	}
	for _, p := range plainProtocols(b.was, will) {
		var rows []portJSON
		for _, v4 := range []bool{true, false} {
			row, changed, err := changedRow(b, will, p, 0, 0, v4)
			if err != nil {
				return nil, err
			}
			if changed {
				row.Port = "*"
				rows = append(rows, row)
			}
		}
		out = append(out, mergeFamilies(rows)...)
	}
	if b.ask == nil {
		out = append(out, changedWhole(b, will)...)
	}
	return out, nil
}

// changedWhole compares what is not about one port.
func changedWhole(b *portsBefore, will *outlook) []portJSON {
	var out []portJSON
	add := func(protocol, family string, was, is reach) {
		if was.key != is.key || was.text != is.text {
			out = append(out, portJSON{
				Protocol: protocol, Port: "*", Family: family, Before: was.text, After: is.text, Listeners: []listenerJSON{},
				opened: !was.open && is.open, closed: was.open && !is.open,
			})
		}
	}
	none := reach{unfiltered, unfiltered, true}
	var rows []portJSON
	for _, v4 := range []bool{true, false} {
		was := reach{text: "-"}
		if b.was != nil {
			was = b.was.trusted(v4)
		}
		before := len(out)
		add("any", family(v4), was, will.trusted(v4))
		rows = append(rows, out[before:]...)
		out = out[:before]
	}
	out = append(out, mergeFamilies(rows)...)
	echo, other := none, none
	if b.was != nil {
		echo, other = b.was.echo(), b.was.closed()
	}
	add("echo", "both", echo, will.echo())
	add(everyOther, "both", other, will.closed())
	return out
}

func family(v4 bool) string {
	if v4 {
		return "ipv4"
	}
	return "ipv6"
}

// eachNamed hands out the ports of a protocol that openings and blocks name.
func eachNamed(policy *rules.Policy, p rules.Protocol, fn func(rules.PortRange)) {
	for i := range policy.Open {
		for _, r := range policy.Open[i].Ports(p) {
			fn(r)
		}
	}
	for i := range policy.Block {
		for _, r := range policy.Block[i].Ports(p) {
			fn(r)
		}
	}
}

// changedRuns cuts the ports of a protocol where either policy or a listener
// does, and joins what changes alike.
func changedRuns(b *portsBefore, will *outlook, p rules.Protocol, found []listener) ([]portJSON, error) {
	var cuts []int
	named := map[int]bool{} // first ports of runs that are worth a word
	note := func(r rules.PortRange) { cuts = append(cuts, int(r.Lo), int(r.Hi)+1) }
	for _, o := range []*outlook{b.was, will} {
		if o != nil {
			eachNamed(o.rs.Policy, p, note)
		}
	}
	for _, l := range found {
		if l.Protocol == p {
			note(rules.PortRange{Lo: l.Port, Hi: l.Port})
			named[int(l.Port)] = true
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var byFamily [2][]portJSON
	for i := range len(cuts) - 1 {
		lo, hi := cuts[i], cuts[i+1]-1
		if !named[lo] && !will.names(p, uint16(lo)) && (b.was == nil || !b.was.names(p, uint16(lo))) {
			continue
		}
		for f, v4 := range []bool{true, false} {
			row, changed, err := changedRow(b, will, p, lo, hi, v4)
			if err != nil {
				return nil, err
			}
			if !changed {
				continue
			}
			rows := byFamily[f]
			if n := len(rows) - 1; n >= 0 && rows[n].hi+1 == lo && rows[n].Before == row.Before && rows[n].After == row.After {
				rows[n].hi = hi
			} else {
				rows = append(rows, row)
			}
			byFamily[f] = rows
		}
	}
	out := mergeFamilies(slices.Concat(byFamily[0], byFamily[1]))
	slices.SortStableFunc(out, func(a, b portJSON) int { return a.lo - b.lo })
	for i := range out {
		out[i].Port = rules.PortRange{Lo: uint16(out[i].lo), Hi: uint16(out[i].hi)}.String()
		out[i].name(found, p)
	}
	return out, nil
}

func changedRow(b *portsBefore, will *outlook, p rules.Protocol, lo, hi int, v4 bool) (portJSON, bool, error) {
	is := will.at(p, uint16(lo), v4)
	was, err := b.at(p, uint16(lo), v4)
	if err != nil {
		return portJSON{}, false, err
	}
	changed := was.key != is.key
	if b.ask != nil {
		// Only a stranger was asked for; whoever else was admitted before cannot be told.
		changed = was.text != will.stranger(p, uint16(lo), v4) || is.open && is.text != "open"
	}
	if b.was != nil && b.ask == nil && changed && was.text == is.text {
		is.text += ": " + changedSets(b.was, will)
	}
	return portJSON{
		Protocol: p.String(), Family: family(v4), Before: was.text, After: is.text, Listeners: []listenerJSON{},
		opened: !was.open && is.open, closed: was.open && !is.open, open: is.open, lo: lo, hi: hi,
	}, changed, nil
}

// changedSets says how many addresses came and went in the sets that differ.
func changedSets(was, will *outlook) string {
	var out []string
	for i := range will.rs.Policy.Sets {
		s := &will.rs.Policy.Sets[i]
		old := was.rs.Policy.Set(s.Name)
		if old == nil || was.common[s.Name] {
			continue
		}
		more, fewer := missing(s.Ranges, old.Ranges), missing(old.Ranges, s.Ranges)
		out = append(out, fmt.Sprintf("@%s with %d more and %d fewer", s.Name, more, fewer))
	}
	if out == nil {
		return "other limits"
	}
	return strings.Join(out, ", ")
}

// missing counts the ranges of a that are not in b; both ascend.
func missing(a, b rules.AddrRanges) int {
	n, k := 0, 0
	for r := range a.All() {
		for k < b.Len() && b.At(k).Lo.Compare(r.Lo) < 0 {
			k++
		}
		if k == b.Len() || b.At(k) != r {
			n++
		}
	}
	return n
}

// plainProtocols are the protocols without ports that either policy names.
func plainProtocols(all ...*outlook) []rules.Protocol {
	var out []rules.Protocol
	for _, o := range all {
		if o == nil {
			continue
		}
		for i := range o.rs.Policy.Open {
			for _, on := range o.rs.Policy.Open[i].On {
				if on.Ports == nil {
					out = append(out, on.Protocol)
				}
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// mergeFamilies joins rows that are the same over IPv4 and IPv6.
func mergeFamilies(rows []portJSON) []portJSON {
	var out []portJSON
	for _, r := range rows {
		same := func(o portJSON) bool {
			return o.Family != r.Family && o.Family != "both" && o.Protocol == r.Protocol && o.lo == r.lo && o.hi == r.hi && o.Before == r.Before && o.After == r.After
		}
		if i := slices.IndexFunc(out, same); i >= 0 {
			out[i].Family = "both"
		} else {
			out = append(out, r)
		}
	}
	return out
}

// name adds the processes that listen on the ports of a row.
func (r *portJSON) name(found []listener, p rules.Protocol) {
	effect := "changes"
	switch {
	case r.opened:
		effect = "gains"
	case r.closed:
		effect = "loses"
	}
	for _, l := range found {
		if l.Protocol != p || int(l.Port) < r.lo || int(l.Port) > r.hi ||
			r.Family != "both" && !l.takes(r.Family == "ipv4") {
			continue
		}
		x := listenerJSON{PID: l.PID, Comm: l.Comm, Address: netip.AddrPortFrom(l.Addr, l.Port).String(), Effect: effect}
		same := func(o listenerJSON) bool { return o.PID == x.PID && o.Comm == x.Comm && x.PID != 0 }
		if !slices.ContainsFunc(r.Listeners, same) {
			r.Listeners = append(r.Listeners, x)
		}
	}
}

// printPorts renders the table for people.
func printPorts(out io.Writer, rows []portJSON) error {
	w := newTable(out)
	for _, r := range rows {
		what := r.Port + "/" + r.Protocol
		switch {
		case r.Protocol == everyOther:
			what = "all other ports"
		case r.Protocol == "echo":
			what = "echo (ping)"
		case r.Protocol == "any":
			what = "every port"
		case r.Port == "*":
			what = r.Protocol
		}
		if r.Family != "both" {
			what += " " + r.Family
		}
		var by []string
		for _, l := range r.Listeners {
			name := listener{PID: l.PID, Comm: l.Comm}.String()
			by = append(by, map[string]string{
				"gains": name + " becomes reachable", "loses": name + " loses it", "changes": name + " listens"}[l.Effect])
		}
		if len(by) == 0 && r.open && r.lo > 0 && r.Protocol != rules.SCTP.String() {
			by = append(by, "nothing listens")
		}
		printf(w, "  %s\t%s → %s\t%s\n", printable(what), printable(r.Before), printable(r.After), printable(strings.Join(by, ", ")))
	}
	return w.Flush()
}

// mostWalks bounds how many packets the kernel's rules are asked about.
const mostWalks = 4096

// question is what the running kernel is asked about a stranger.
type question struct {
	protocol rules.Protocol
	port     uint16
	v4       bool
}

// askKernel lists what changes with the running rules as what was before: what
// to ask is collected first, since the rules are read once for all packets. left
// is how many questions were too many.
func askKernel(conn *firewall.Conn, b *portsBefore, will *outlook, found []listener) (rows []portJSON, left int, err error) {
	answers := map[question]reach{}
	var ask []question
	b.ask = func(p rules.Protocol, port uint16, v4 bool) (reach, error) {
		q := question{p, port, v4}
		r, asked := answers[q]
		if !asked {
			ask, answers[q] = append(ask, q), reach{text: "not asked for"}
		}
		return r, nil
	}
	if _, err := changedPorts(b, will, found); err != nil {
		return nil, 0, err
	}
	left = max(0, len(ask)-mostWalks)
	ask = ask[:len(ask)-left]
	var packets []rules.Packet
	for _, q := range ask {
		packets = append(packets, strangersPacket(q.protocol, q.port, q.v4))
	}
	journeys, err := conn.WalkAll(packets)
	if err != nil {
		return nil, 0, err
	}
	words := map[firewall.Verdict]string{
		firewall.WalkAccept: "open", firewall.WalkDrop: "filtered", firewall.WalkReject: "rejected", firewall.WalkUnknown: "cannot be told"}
	for i, j := range journeys {
		text := words[j.Verdict]
		answers[ask[i]] = reach{text, text, j.Verdict == firewall.WalkAccept}
	}
	rows, err = changedPorts(b, will, found)
	return rows, left, err
}
