package importer

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"deadlight/rules"
)

// nft reads what nft -j list ruleset prints.
type nft struct {
	set  *ruleset
	file string
	sets map[string]nftSet // by "family table name"
}

// nftSet is a named set or map.
type nftSet struct {
	elem  []any
	alive bool // elements come and go by themselves
}

type nftChain struct {
	Family, Table, Name, Type, Hook, Policy string
	Prio                                    any
	Dev                                     any
}

type nftRule struct {
	Family, Table, Chain, Comment string
	Handle                        int
	Expr                          []map[string]any
}

func loadNFT(s source) (*ruleset, error) {
	p := &nft{set: newRuleset("nft"), file: s.name, sets: map[string]nftSet{}}
	p.set.families = [2]bool{true, true} // the list is of everything that there is
	objects, lines, err := nftObjects(s)
	if err != nil {
		return nil, err
	}
	for i, o := range objects { // sets may stand behind the rules that use them
		if err := p.define(o, lines[i]); err != nil {
			return nil, err
		}
	}
	for i, o := range objects {
		raw, ok := o["rule"]
		if !ok {
			continue
		}
		var r nftRule
		if err := json.Unmarshal(raw, &r); err != nil {
			return nil, parseError(s.name, lines[i], "rule: %v", err)
		}
		if r.Family == "bridge" || r.Family == "arp" {
			p.set.note(s.name, lines[i], "", "table %s %s is not about IP packets to this host: not imported", r.Family, r.Table)
			continue
		}
		p.rule(&r, lines[i])
	}
	return p.set, nil
}

// nftObjects gives the objects of the list and their lines.
func nftObjects(s source) ([]map[string]json.RawMessage, []int, error) {
	line := func(at int64) int { return 1 + bytes.Count(s.data[:min(at, int64(len(s.data)))], []byte("\n")) }
	fail := func(at int64, err error) error {
		return parseError(s.name, line(at), "this is not what nft -j list ruleset prints: %v", err)
	}
	d := json.NewDecoder(bytes.NewReader(s.data))
	for _, want := range []any{json.Delim('{'), "nftables", json.Delim('[')} {
		got, err := d.Token()
		if err == nil && got != want {
			err = fmt.Errorf("%v in the place of %v", got, want)
		}
		if err != nil {
			return nil, nil, fail(d.InputOffset(), err)
		}
	}
	var out []map[string]json.RawMessage
	var lines []int
	for d.More() {
		var o map[string]json.RawMessage
		if err := d.Decode(&o); err != nil {
			return nil, nil, fail(d.InputOffset(), err)
		}
		out, lines = append(out, o), append(lines, line(d.InputOffset()))
	}
	if _, err := d.Token(); err != nil {
		return nil, nil, fail(d.InputOffset(), err)
	}
	return out, lines, nil
}

// define reads chains and sets.
func (p *nft) define(o map[string]json.RawMessage, line int) error {
	if raw, ok := o["chain"]; ok {
		var c nftChain
		if err := json.Unmarshal(raw, &c); err != nil {
			return parseError(p.file, line, "chain: %v", err)
		}
		p.chain(&c, line)
	}
	for _, kind := range []string{"set", "map"} {
		raw, ok := o[kind]
		if !ok {
			continue
		}
		var s struct {
			Family, Table, Name string
			Flags               any
			Elem                []any
		}
		if err := json.Unmarshal(raw, &s); err != nil {
			return parseError(p.file, line, "%s: %v", kind, err)
		}
		flags := fmt.Sprint(s.Flags)
		n := nftSet{s.Elem, strings.Contains(flags, "timeout") || strings.Contains(flags, "dynamic")}
		p.sets[s.Family+" "+s.Table+" "+s.Name] = n
		if kind == "set" && !n.alive {
			if all, ok := addressesOf(s.Elem); ok && len(all) > 0 {
				p.set.sets = append(p.set.sets, namedSet{s.Name, all})
			}
		}
	}
	return nil
}

func (p *nft) chain(c *nftChain, line int) {
	k := p.set.chain(c.Family + " " + c.Table + " " + c.Name)
	for _, word := range []string{"DOCKER", "KUBE-", "CNI-", "NETAVARK"} {
		p.set.docker = p.set.docker || strings.HasPrefix(c.Name, word) || strings.HasPrefix(strings.ToUpper(c.Table), word)
	}
	if c.Hook == "" || c.Family == "bridge" || c.Family == "arp" {
		return
	}
	b := &base{chain: k, hook: c.Hook, policy: accept, file: p.file, line: line, nat: c.Type == "nat",
		ours: map[string]int{"ip": 1, "ip6": 2, "inet": 3, "netdev": 3}[c.Family]}
	if c.Policy == "drop" {
		b.policy = drop
	}
	if n, ok := c.Prio.(float64); ok {
		b.prio = int(n)
	}
	switch d := c.Dev.(type) {
	case string:
		b.dev = []string{d}
	case []any:
		for _, x := range d {
			b.dev = append(b.dev, fmt.Sprint(x))
		}
	}
	switch c.Hook {
	case "ingress":
		b.hook, b.prio = "prerouting", b.prio-100000
	case "egress":
		b.hook, b.prio = "output", b.prio+100000
	}
	p.set.bases = append(p.set.bases, b)
}

// nftReading is a rule being read.
type nftReading struct {
	p      *nft
	r      *rule
	table  string // "family table"
	limits int
	alive  bool // it asks a set that changes by itself
	vmap   map[string]any
}

func (p *nft) rule(in *nftRule, line int) {
	place := fmt.Sprintf("%s %s %s handle %d", in.Family, in.Table, in.Chain, in.Handle)
	r := &rule{file: p.file, line: line, comment: in.Comment, on: match(in.Family != "ip6", in.Family != "ip"),
		text: plain(place+": "+nftWords(in.Expr), 400), where: place}
	m := &nftReading{p: p, r: r, table: in.Family + " " + in.Table}
	for _, s := range in.Expr {
		for name, arg := range s {
			m.statement(name, arg)
		}
	}
	c := p.set.chain(m.table + " " + in.Chain)
	if m.limits > 1 {
		r.limit, r.over = nil, false
		r.doubt("two limits")
	}
	if m.vmap == nil {
		m.finish()
		c.add(r)
		return
	}
	for _, v := range m.mapped() {
		c.add(v)
	}
}

func (m *nftReading) finish() {
	if !m.alive {
		return
	}
	switch m.r.verdict {
	case drop, reject, goOn:
		m.p.set.note(m.r.file, m.r.line, m.r.text, "asks a set that changes by itself: its members of now are taken over")
	default:
		m.r.doubt("a set that changes by itself")
	}
}

// verdict reads a statement that ends a rule.
func (m *nftReading) verdict(r *rule, name string, arg any) bool {
	target := func() string {
		o, _ := arg.(map[string]any)
		return m.table + " " + fmt.Sprint(o["target"])
	}
	switch name {
	case "accept":
		r.verdict = accept
	case "drop":
		r.verdict = drop
	case "reject":
		r.verdict = reject
	case "return":
		r.verdict = back
	case "continue":
		r.verdict = goOn
	case "jump":
		r.verdict, r.target = jump, target()
	case "goto":
		r.verdict, r.target = goTo, target()
	default:
		return false
	}
	return true
}

func (m *nftReading) statement(name string, arg any) {
	r := m.r
	if m.verdict(r, name, arg) {
		return
	}
	o, _ := arg.(map[string]any)
	switch name {
	case "counter", "mangle", "masquerade", "snat", "dup", "flow", "ct helper", "ct timeout", "ct expectation", "secmark", "quota", "last":
		if name == "quota" {
			r.doubt("a quota")
		}
	case "log":
		r.log = true
	case "dnat", "redirect", "tproxy":
		r.verdict = rewrite
	case "queue", "notrack", "synproxy", "fwd":
		r.verdict, r.target = unclear, name
	case "limit":
		m.limit(o, false)
	case "ct count":
		r.doubt("ct count without a source")
	case "set", "meter":
		m.meter(name, o)
	case "vmap":
		m.vmap = o
	case "match":
		if r.limit != nil {
			r.doubt("a limit that counts more than what it lets through")
		}
		m.match(o)
	case "xt":
		if o["type"] == "target" {
			m.target(fmt.Sprint(o["name"]))
			return
		}
		r.doubt("xt match %v, which nft does not show: import the output of iptables-save instead", o["name"])
	case "comment":
	default:
		r.doubt("%s", name)
	}
}

// target is one of iptables in an nft list, of which only the name shows.
func (m *nftReading) target(name string) {
	switch name {
	case "LOG", "NFLOG":
		m.r.log = true
	case "MARK", "CONNMARK", "TCPMSS", "CHECKSUM", "MASQUERADE", "SNAT":
	case "REJECT":
		m.r.verdict = reject
	case "DNAT", "REDIRECT", "NETMAP", "TPROXY":
		m.r.verdict = rewrite
	default:
		m.r.verdict, m.r.target = unclear, name
	}
}

func (m *nftReading) limit(o map[string]any, perSource bool) {
	m.limits++
	n, _ := o["rate"].(float64)
	per, ok := perUnit(fmt.Sprint(o["per"]))
	burst, has := o["burst"].(float64)
	if !has || burst == 0 {
		burst = 5
	}
	if !ok || n < 1 || n > 1<<31 || burst > 1<<31 || o["rate_unit"] != nil && o["rate_unit"] != "packets" {
		m.r.doubt("a limit of bytes")
		return
	}
	m.r.limit = &limit{rate: &rules.Rate{Limit: uint64(n), Per: per, Burst: uint32(burst), PerSource: perSource}}
	m.r.over = o["inv"] == true
}

// meter counts by a key, of which only the source is one that a policy has.
func (m *nftReading) meter(name string, o map[string]any) {
	key := o["elem"]
	if name == "meter" {
		key = o["key"]
	}
	if e, ok := key.(map[string]any); ok && e["elem"] != nil {
		if inner, ok := e["elem"].(map[string]any); ok {
			key = inner["val"]
		}
	}
	var stmts []any
	switch s := o["stmt"].(type) {
	case []any:
		stmts = s
	case map[string]any:
		stmts = []any{s}
	}
	if len(stmts) == 0 {
		m.alive = true // a full set ends the rule
		return
	}
	payload, _ := asMap(key)["payload"].(map[string]any)
	if len(stmts) != 1 || payload["field"] != "saddr" {
		m.r.doubt("a meter by something else than the source")
		return
	}
	switch payload["protocol"] {
	case "ip":
		m.family(true)
	case "ip6":
		m.family(false)
	}
	for what, arg := range asMap(stmts[0]) {
		switch what {
		case "limit":
			m.limit(asMap(arg), true)
		case "ct count":
			m.limits++
			c := asMap(arg)
			n, _ := c["val"].(float64)
			if n < 1 || n > 1<<31 {
				m.r.doubt("ct count")
				return
			}
			m.r.limit, m.r.over = &limit{conns: int(n)}, c["inv"] == true
		default:
			m.r.doubt("a meter of %s", what)
			return
		}
		if set := fmt.Sprint(o["set"], o["name"]); m.r.limit != nil && name == "set" {
			m.r.limit.key = "meter " + m.table + " " + set
		}
	}
}

func asMap(v any) map[string]any {
	o, _ := v.(map[string]any)
	return o
}

func (m *nftReading) family(v4 bool) {
	m.r.on[map[bool]int{true: 1, false: 0}[v4]] = nil
}

func (m *nftReading) match(o map[string]any) {
	op := fmt.Sprint(o["op"])
	if err := m.field(m.r, o["left"], op, o["right"]); err != "" {
		m.r.doubt("%s", err)
	}
}

// values gives the leaves of what a field is compared with.
func (m *nftReading) values(v any) ([]any, bool) {
	switch x := v.(type) {
	case string:
		if name, ok := strings.CutPrefix(x, "@"); ok {
			s, known := m.p.sets[m.table+" "+name]
			if !known {
				return nil, false
			}
			m.alive = m.alive || s.alive
			return m.flat(s.elem)
		}
	case []any:
		return m.flat(x)
	case map[string]any:
		if e, ok := x["elem"].(map[string]any); ok {
			if e["timeout"] != nil || e["expires"] != nil {
				m.alive = true
			}
			return m.values(e["val"])
		}
		if s, ok := x["set"]; ok {
			list, isList := s.([]any)
			if !isList {
				list = []any{s}
			}
			return m.flat(list)
		}
	}
	return []any{v}, true
}

func (m *nftReading) flat(list []any) ([]any, bool) {
	var out []any
	for _, e := range list {
		v, ok := m.values(e)
		if !ok {
			return nil, false
		}
		out = append(out, v...)
	}
	return out, true
}

// field narrows a rule by one comparison; it says what it does not understand.
func (m *nftReading) field(r *rule, left any, op string, right any) string {
	l := asMap(left)
	if parts, ok := l["concat"].([]any); ok {
		return m.concat(r, parts, op, right)
	}
	if and, ok := l["&"].([]any); ok && len(and) == 2 {
		return m.masked(r, asMap(and[0]), and[1], op, right)
	}
	not := op == "!="
	if op != "==" && op != "!=" && op != "in" && op != "<" && op != ">" && op != "<=" && op != ">=" {
		return "operator " + op
	}
	list, ok := m.values(right)
	if !ok {
		return "a set that is not in the list"
	}
	if p := asMap(l["payload"]); p != nil {
		return m.payload(r, fmt.Sprint(p["protocol"]), fmt.Sprint(p["field"]), op, not, list)
	}
	if k := asMap(l["meta"]); k != nil {
		return m.meta(r, fmt.Sprint(k["key"]), op, not, list)
	}
	if k := asMap(l["ct"]); k != nil {
		return m.ct(r, fmt.Sprint(k["key"]), not, list)
	}
	if k := asMap(l["fib"]); k != nil {
		flags := fmt.Sprint(k["flags"])
		switch {
		case k["result"] == "type" && (flags == "[daddr]" || flags == "daddr"):
			return m.types(r, not, list)
		case (k["result"] == "oif" || k["result"] == "oifname") && strings.Contains(flags, "saddr"):
			r.odd = reversePath
			return ""
		}
		return fmt.Sprintf("fib %v", k["result"])
	}
	for what := range l {
		return what
	}
	return "an expression"
}

func (m *nftReading) types(r *rule, not bool, list []any) string {
	var bits uint8
	for _, v := range list {
		b, ok := dstTypes(fmt.Sprint(v))
		if !ok {
			return fmt.Sprintf("fib type %v", v)
		}
		bits |= b
	}
	if not {
		bits = ^bits
	}
	r.narrow(func(b *box, _ bool) { b.types &= bits })
	return ""
}

func (m *nftReading) payload(r *rule, protocol, field, op string, not bool, list []any) string {
	number := map[string]num{"tcp": 6, "udp": 17, "sctp": 132}[protocol]
	switch {
	case protocol == "ip" || protocol == "ip6":
		v4 := protocol == "ip"
		r.on[map[bool]int{true: 1, false: 0}[v4]] = nil
		switch field {
		case "saddr", "daddr":
			set, ok := addressesOf(list)
			if !ok || op != "==" && op != "!=" && op != "in" {
				return protocol + " " + field
			}
			r.address(set, not, field == "saddr")
			return ""
		case "protocol", "nexthdr":
			return m.protocols(r, not, list)
		}
	case (number != 0 || protocol == "th") && (field == "dport" || field == "sport"):
		set, ok := numbersOf(list, portNumber, op)
		if !ok {
			return protocol + " " + field
		}
		if number != 0 {
			r.protocol(one(number, number))
		} else {
			r.protocol(nums{{6, 6}, {17, 17}, {132, 132}})
		}
		if not {
			set = one(0, 65535).minus(set)
		}
		r.ports(set, field == "sport")
		return ""
	case protocol == "tcp" && field == "flags":
		r.protocol(one(6, 6))
		syn := slices.ContainsFunc(list, func(v any) bool { return v == "syn" })
		if op == "==" && len(list) != 1 {
			syn = false
		}
		if syn == not {
			r.odd = noSYN
		}
		return ""
	case (protocol == "icmp" || protocol == "icmpv6") && field == "type":
		v4 := protocol == "icmp"
		r.on[map[bool]int{true: 1, false: 0}[v4]] = nil
		var all []interval[num]
		for _, v := range list {
			set, ok := icmpType(scalar(v), v4)
			if !ok {
				return fmt.Sprintf("%s type %v", protocol, v)
			}
			all = append(all, set...)
		}
		set := union(all...)
		if not {
			set = one(0, 65535).minus(set)
		}
		if v4 {
			r.protocol(one(1, 1))
		} else {
			r.protocol(one(58, 58))
		}
		r.ports(set, false)
		return ""
	}
	return protocol + " " + field
}

func (m *nftReading) protocols(r *rule, not bool, list []any) string {
	var all []interval[num]
	for _, v := range list {
		set, ok := protocols(scalar(v))
		if !ok {
			return fmt.Sprintf("protocol %v", v)
		}
		all = append(all, set...)
	}
	set := union(all...)
	if not {
		set = one(0, 255).minus(set)
	}
	r.protocol(set)
	return ""
}

func (m *nftReading) meta(r *rule, key, op string, not bool, list []any) string {
	if op != "==" && op != "!=" && op != "in" {
		return "meta " + key
	}
	switch key {
	case "l4proto":
		return m.protocols(r, not, list)
	case "nfproto", "protocol":
		var has [2]bool
		for _, v := range list {
			switch scalar(v) {
			case "ipv4", "ip", "2":
				has[0] = true
			case "ipv6", "ip6", "10":
				has[1] = true
			}
		}
		for f := range has {
			if has[f] == not {
				r.on[f] = nil
			}
		}
		return ""
	case "iifname", "iif", "oifname", "oif":
		var names []string
		for _, v := range list {
			s, ok := v.(string)
			if !ok || s == "" || strings.HasSuffix(s, `\*`) {
				return "meta " + key
			}
			names = append(names, s)
		}
		r.device(names, not)
		return ""
	case "pkttype":
		var bits uint8
		for _, v := range list {
			b := map[string]uint8{"host": toLocal | toAnycast, "unicast": toLocal | toAnycast, "broadcast": toBroadcast, "multicast": toMulticast}[scalar(v)]
			if b == 0 {
				return fmt.Sprintf("meta pkttype %v", v)
			}
			bits |= b
		}
		if not {
			bits = ^bits
		}
		r.narrow(func(b *box, _ bool) { b.types &= bits })
		return ""
	}
	return "meta " + key
}

func (m *nftReading) ct(r *rule, key string, not bool, list []any) string {
	var bits uint8
	switch key {
	case "state":
		for _, v := range list {
			b, ok := states(scalar(v))
			if !ok {
				return fmt.Sprintf("ct state %v", v)
			}
			bits |= b
		}
	case "direction":
		for _, v := range list {
			switch scalar(v) {
			case "original", "0":
				bits |= stNew | stEstablished | stRelated
			default:
				bits |= stEstablished | stRelated
			}
		}
		if not {
			return "ct direction"
		}
	case "status":
		for _, v := range list {
			if s := scalar(v); s != "dnat" && s != "snat" {
				return "ct status " + s
			}
		}
		bits = stOther
	default:
		return "ct " + key
	}
	if not {
		bits = (stNew | stEstablished | stRelated | stOther) &^ bits
	}
	if r.states != 0 {
		bits &= r.states
	}
	if r.states = bits; bits == 0 {
		r.on = [2][]box{}
	}
	return ""
}

// masked is a comparison of some bits.
func (m *nftReading) masked(r *rule, left map[string]any, mask any, op string, right any) string {
	p := asMap(left["payload"])
	if p["protocol"] != "tcp" || p["field"] != "flags" {
		return "a comparison of bits"
	}
	join := func(v any) string {
		list, _ := m.values(orList(v))
		var out []string
		for _, x := range list {
			out = append(out, scalar(x))
		}
		return strings.Join(out, ",")
	}
	r.protocol(one(6, 6))
	if synMatches(join(mask), join(right)) == (op == "!=") {
		r.odd = noSYN
	}
	return ""
}

// orList flattens {"|": [a, b]}.
func orList(v any) any {
	o, ok := v.(map[string]any)
	if !ok {
		return v
	}
	parts, ok := o["|"].([]any)
	if !ok {
		return v
	}
	var out []any
	for _, p := range parts {
		if l, ok := orList(p).([]any); ok {
			out = append(out, l...)
		} else {
			out = append(out, orList(p))
		}
	}
	return out
}

// maxConcat bounds how many tuples become boxes.
const maxConcat = 512

// concat makes an alternative of every tuple.
func (m *nftReading) concat(r *rule, parts []any, op string, right any) string {
	list, ok := m.values(right)
	if !ok || op != "==" && op != "in" || len(list) > maxConcat {
		return "a set of tuples"
	}
	var on [2][]box
	for _, v := range list {
		tuple, ok := asMap(v)["concat"].([]any)
		if !ok || len(tuple) != len(parts) {
			return "a set of tuples"
		}
		one := &rule{on: r.on}
		for i, part := range parts {
			if why := m.field(one, part, "==", tuple[i]); why != "" || one.odd != "" || one.states != 0 {
				return "a set of tuples with " + why
			}
		}
		for f := range on {
			on[f] = append(on[f], one.on[f]...)
		}
	}
	r.on = on
	return ""
}

// mapped makes a rule of each element of a verdict map.
func (m *nftReading) mapped() []*rule {
	var elems []any
	switch data := m.vmap["data"].(type) {
	case string:
		s := m.p.sets[m.table+" "+strings.TrimPrefix(data, "@")]
		elems, m.alive = s.elem, m.alive || s.alive
	case map[string]any:
		elems, _ = data["set"].([]any)
	}
	var out []*rule
	for _, e := range elems {
		pair, ok := e.([]any)
		if !ok || len(pair) != 2 {
			continue
		}
		r := *m.r
		r.opaque = slices.Clone(m.r.opaque)
		key := any(map[string]any{"set": []any{pair[0]}})
		if why := m.field(&r, m.vmap["key"], "==", key); why != "" {
			r.doubt("%s", why)
		}
		for name, arg := range asMap(pair[1]) {
			if !m.verdict(&r, name, arg) {
				r.verdict, r.target = unclear, name
			}
		}
		if m.alive {
			r.doubt("a map that changes by itself")
		}
		out = append(out, &r)
	}
	if len(out) == 0 && len(elems) > 0 {
		r := *m.r
		r.verdict, r.target = unclear, "a map that is not understood"
		out = append(out, &r)
	}
	return out
}

func scalar(v any) string {
	switch x := v.(type) {
	case string:
		return x
	case float64:
		return strconv.FormatFloat(x, 'f', -1, 64)
	}
	return fmt.Sprintf("%v", v)
}

// addressesOf reads addresses, prefixes and ranges.
func addressesOf(list []any) (addrs, bool) {
	var all []interval[netip.Addr]
	for _, v := range list {
		switch x := v.(type) {
		case string:
			i, ok := oneAddress(x)
			if !ok {
				return nil, false
			}
			all = append(all, i)
		case map[string]any:
			if e := asMap(x["elem"]); e != nil {
				inner, ok := addressesOf([]any{e["val"]})
				if !ok {
					return nil, false
				}
				all = append(all, inner...)
				continue
			}
			text := ""
			if p := asMap(x["prefix"]); p != nil {
				text = fmt.Sprintf("%v/%v", p["addr"], scalar(p["len"]))
			}
			if r, ok := x["range"].([]any); ok && len(r) == 2 {
				text = fmt.Sprintf("%v-%v", r[0], r[1])
			}
			i, ok := addressRange(text)
			if !ok {
				return nil, false
			}
			all = append(all, i)
		default:
			return nil, false
		}
	}
	return union(all...), true
}

// numbersOf reads numbers and ranges, or what is above or below one.
func numbersOf(list []any, name func(string) (num, bool), op string) (nums, bool) {
	var all []interval[num]
	for _, v := range list {
		if r, ok := asMap(v)["range"].([]any); ok && len(r) == 2 {
			a, ok1 := name(scalar(r[0]))
			b, ok2 := name(scalar(r[1]))
			if !ok1 || !ok2 || a > b || op != "==" && op != "!=" && op != "in" {
				return nil, false
			}
			all = append(all, interval[num]{a, b})
			continue
		}
		n, ok := name(scalar(v))
		if !ok {
			return nil, false
		}
		i := interval[num]{n, n}
		switch op {
		case "<", "<=":
			i.lo = 0
			if op == "<" {
				if n == 0 {
					return nil, false
				}
				i.hi = n - 1
			}
		case ">", ">=":
			i.hi = 65535
			if op == ">" {
				if n == 65535 {
					return nil, false
				}
				i.lo = n + 1
			}
		}
		all = append(all, i)
	}
	return union(all...), true
}

// nftWords writes the statements of a rule for people, about as nft does.
func nftWords(expr []map[string]any) string {
	var out []string
	for _, s := range expr {
		for name, arg := range s {
			o := asMap(arg)
			switch {
			case name == "match":
				op := fmt.Sprint(o["op"], " ")
				if op == "== " || op == "in " {
					op = ""
				}
				out = append(out, nftOperand(o["left"])+" "+op+nftOperand(o["right"]))
			case o["target"] != nil:
				out = append(out, name+" "+scalar(o["target"]))
			case name == "counter" || o == nil && arg == nil:
				out = append(out, name)
			default:
				out = append(out, name+" "+nftOperand(arg))
			}
		}
	}
	return strings.Join(out, " ")
}

func nftOperand(v any) string {
	switch x := v.(type) {
	case nil:
		return ""
	case []any:
		var out []string
		for _, e := range x {
			out = append(out, nftOperand(e))
		}
		return strings.Join(out, ", ")
	case map[string]any:
		switch {
		case x["payload"] != nil:
			p := asMap(x["payload"])
			return fmt.Sprint(p["protocol"], " ", p["field"])
		case x["meta"] != nil:
			return "meta " + scalar(asMap(x["meta"])["key"])
		case x["ct"] != nil:
			return "ct " + scalar(asMap(x["ct"])["key"])
		case x["set"] != nil && len(x) == 1:
			return "{ " + nftOperand(x["set"]) + " }"
		case x["prefix"] != nil:
			return scalar(asMap(x["prefix"])["addr"]) + "/" + scalar(asMap(x["prefix"])["len"])
		case x["range"] != nil:
			return strings.ReplaceAll(nftOperand(x["range"]), ", ", "-")
		}
		b, _ := json.Marshal(x) // it came from JSON
		return string(b)
	}
	return scalar(v)
}
