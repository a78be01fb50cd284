package importer

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"deadlight/rules"
)

// element is an XML element with its line.
type element struct {
	name  string
	attrs map[string]string
	kids  []*element
	text  string
	file  string
	line  int
}

// parseXML reads one document.
func parseXML(file string, data []byte) (*element, error) {
	d := xml.NewDecoder(bytes.NewReader(data))
	var open []*element
	var root *element
	for {
		tok, err := d.Token()
		line, _ := d.InputPos()
		switch {
		case errors.Is(err, io.EOF) && root != nil && len(open) == 0:
			return root, nil
		case errors.Is(err, io.EOF):
			return nil, parseError(file, line, "the XML ends too early")
		case err != nil:
			return nil, parseError(file, line, "%v", err)
		}
		switch t := tok.(type) {
		case xml.StartElement:
			e := &element{name: t.Name.Local, attrs: map[string]string{}, file: file, line: line}
			for _, a := range t.Attr {
				e.attrs[a.Name.Local] = a.Value
			}
			if len(open) > 0 {
				top := open[len(open)-1]
				top.kids = append(top.kids, e)
			} else if root == nil {
				root = e
			}
			open = append(open, e)
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			if len(open) > 0 {
				open[len(open)-1].text += string(t)
			}
		}
	}
}

func (e *element) String() string {
	var b strings.Builder
	b.WriteString("<" + e.name)
	for _, k := range []string{"name", "value", "address", "ipset", "mac", "invert", "family", "priority", "port", "protocol", "to-port", "to-addr", "limit", "ipv", "chain"} {
		if v, ok := e.attrs[k]; ok {
			fmt.Fprintf(&b, " %s=%q", k, v)
		}
	}
	b.WriteString(">")
	for _, k := range e.kids {
		if k.name != "short" && k.name != "description" {
			b.WriteString(k.String())
		}
	}
	return plain(b.String()+strings.TrimSpace(e.text), 300)
}

func (e *element) child(name string) *element {
	for _, k := range e.kids {
		if k.name == name {
			return k
		}
	}
	return nil
}

// firewalld reads a directory like /etc/firewalld, over the built-ins.
type firewalld struct {
	set  *ruleset
	read func(name string) (file string, data []byte, err error)
	list func(dir string) ([]string, error) // of names in the directory itself
	conf map[string]string                  // firewalld.conf
}

// load makes chains of the zones.
func (p *firewalld) load(dir string) (*ruleset, error) {
	p.set = newRuleset("firewalld")
	p.set.families = [2]bool{true, true}
	var err error
	if p.conf, err = p.config(); err != nil {
		return nil, err
	}
	in := p.set.chain("the dispatch of firewalld")
	p.set.bases = []*base{
		{chain: in, hook: "input", policy: drop, file: dir, ours: 3},
		{chain: p.set.chain("what is forwarded"), hook: "forward", policy: drop, file: dir, ours: 3},
	}
	in.add(&rule{on: match(true, true), states: stEstablished | stRelated, verdict: accept})
	in.add(&rule{on: match(true, true), states: stOther, verdict: drop})
	if p.conf["IPv6_rpfilter"] != "no" {
		p.set.note("", 0, "", "wider than the original: firewalld drops IPv6 packets whose source is not reached by where they came in (IPv6_rpfilter), which Deadlight does not look at")
	}
	if err := p.before(in); err != nil {
		return nil, err
	}
	zones, err := p.zones()
	if err != nil {
		return nil, err
	}
	def := p.conf["DefaultZone"]
	if def == "" {
		def = "public"
	}
	if !slices.ContainsFunc(zones, func(z *element) bool { return z.attrs["zone"] == def }) {
		z, err := p.zone(def)
		if err != nil {
			return nil, err
		}
		zones = append(zones, z)
	}
	for _, what := range []string{"source", "interface"} {
		for _, z := range zones {
			for _, k := range z.kids {
				if k.name == what {
					p.dispatch(in, z, k)
				}
			}
		}
	}
	in.add(&rule{on: match(true, true), verdict: goTo, target: "zone " + def})
	for _, z := range zones {
		if err := p.fill(z); err != nil {
			return nil, err
		}
	}
	p.set.note("", 0, "", "interfaces that no zone names are taken for those of zone %s: NetworkManager may have put them into another", def)
	return p.set, nil
}

func (p *firewalld) config() (map[string]string, error) {
	conf := map[string]string{}
	_, data, err := p.read("firewalld.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(k, "#") {
			conf[k] = strings.TrimSpace(v)
		}
	}
	return conf, nil
}

// before reads what stands before the zones: policies and direct rules, of which
// those that may deny shut everything.
func (p *firewalld) before(in *chain) error {
	names, err := p.list("policies")
	if err != nil {
		return err
	}
	for _, n := range names {
		file, data, err := p.read("policies/" + n)
		if err != nil {
			return err
		}
		e, err := parseXML(file, data)
		if err != nil {
			return err
		}
		if z := e.child("egress-zone"); z == nil || z.attrs["name"] == "HOST" || z.attrs["name"] == "ANY" {
			in.add(&rule{file: file, line: e.line, text: e.String(), on: match(true, true), verdict: unclear, target: "a policy between zones"})
			continue
		}
		p.set.note(file, e.line, e.String(), "a policy between zones is about what is routed, which is not imported")
	}
	file, data, err := p.read("direct.xml")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	e, err := parseXML(file, data)
	if err != nil {
		return err
	}
	for _, k := range e.kids {
		v4 := k.attrs["ipv"] == "ipv4"
		words, err := splitWords(strings.TrimSpace(k.text))
		r := &rule{file: file, line: k.line, text: k.String(), on: match(v4, !v4)}
		ipt := &iptables{set: p.set, file: file, v4: v4, table: "filter"}
		switch {
		case k.name == "rule" && !strings.HasPrefix(k.attrs["chain"], "INPUT"):
			p.set.note(file, k.line, k.String(), "a direct rule of another chain is not imported")
		case k.name == "rule" && err == nil && ipt.options(r, words) == nil && (r.verdict == drop || r.verdict == reject):
			in.add(r)
		case k.name == "rule" && r.verdict == accept:
			p.set.note(file, k.line, k.String(), "a direct rule only admits to what the zones judge after it: not imported")
		default:
			r.on, r.verdict, r.target = match(true, true), unclear, "a direct rule"
			in.add(r)
		}
	}
	return nil
}

func (p *firewalld) zones() ([]*element, error) {
	names, err := p.list("zones")
	if err != nil {
		return nil, err
	}
	var out []*element
	for _, n := range names {
		z, err := p.zone(strings.TrimSuffix(n, ".xml"))
		if err != nil {
			return nil, err
		}
		out = append(out, z)
	}
	return out, nil
}

func (p *firewalld) zone(name string) (*element, error) {
	file, data, err := p.read("zones/" + name + ".xml")
	if err != nil {
		return nil, fmt.Errorf("zone %q: %w", name, err)
	}
	z, err := parseXML(file, data)
	if err == nil && z.name != "zone" {
		err = parseError(file, z.line, "<%s> in the place of <zone>", plain(z.name, 40))
	}
	if err != nil {
		return nil, err
	}
	z.attrs["zone"] = name
	return z, nil
}

func (p *firewalld) rule(e *element) *rule {
	return &rule{file: e.file, line: e.line, text: e.String(), on: match(true, true)}
}

// dispatch sends packets of a source or an interface to a zone.
func (p *firewalld) dispatch(in *chain, z, k *element) {
	r := p.rule(k)
	r.verdict, r.target = goTo, "zone "+z.attrs["zone"]
	if k.name == "interface" {
		name := k.attrs["name"]
		if strings.HasSuffix(name, "+") {
			name = strings.TrimSuffix(name, "+") + "*"
		}
		r.device([]string{name}, false)
	} else {
		p.peer(r, k, true)
	}
	in.add(r)
}

// peer confines a rule to what an element names by address, ipset or mac.
func (p *firewalld) peer(r *rule, k *element, source bool) {
	not := k.attrs["invert"] == "yes" || k.attrs["invert"] == "true" || k.attrs["invert"] == "True"
	switch {
	case k.attrs["address"] != "":
		set, err := addressList(k.attrs["address"])
		if err != nil {
			r.doubt("%v", err)
			return
		}
		if len(set) > 0 { // an address is of one family, negated too
			r.on[map[bool]int{true: 1, false: 0}[set[0].lo.Is4()]] = nil
		}
		r.address(set, not, source)
	case k.attrs["ipset"] != "":
		set, ok := p.ipset(k.attrs["ipset"])
		if !ok {
			r.doubt("ipset %s", k.attrs["ipset"])
			return
		}
		if len(set) > 0 {
			r.on[map[bool]int{true: 1, false: 0}[set[0].lo.Is4()]] = nil
		}
		r.address(set, not, source)
	default:
		r.doubt("a hardware address")
	}
}

func (p *firewalld) ipset(name string) (addrs, bool) {
	file, data, err := p.read("ipsets/" + name + ".xml")
	if err != nil {
		return nil, false
	}
	e, err := parseXML(file, data)
	if err != nil || e.attrs["type"] != "hash:ip" && e.attrs["type"] != "hash:net" {
		return nil, false
	}
	var list []interval[netip.Addr]
	for _, k := range e.kids {
		switch k.name {
		case "entry":
			i, ok := addressRange(strings.TrimSpace(k.text))
			if !ok {
				return nil, false
			}
			list = append(list, i)
		case "option":
			if k.attrs["name"] == "timeout" {
				return nil, false
			}
		}
	}
	all := union(list...)
	if !slices.ContainsFunc(p.set.sets, func(s namedSet) bool { return s.name == name }) {
		p.set.sets = append(p.set.sets, namedSet{name, all})
	}
	return all, true
}

// ordered is a rule with its place in a zone.
type ordered struct {
	priority int
	stage    int // 0 denies, 1 admits
	*rule
}

// fill makes the chain of a zone.
func (p *firewalld) fill(z *element) error {
	c := p.set.chain("zone " + z.attrs["zone"])
	var list []ordered
	put := func(priority int, rs ...*rule) {
		for _, r := range rs {
			stage := 1
			if r.verdict != accept {
				stage = 0
			}
			list = append(list, ordered{priority, stage, r})
		}
	}
	inverted := z.child("icmp-block-inversion") != nil
	for _, k := range z.kids {
		switch k.name {
		case "short", "description", "interface", "source", "forward", "icmp-block-inversion":
		case "service", "port", "protocol", "source-port":
			rs, err := p.matches(k, p.rule(k))
			if err != nil {
				return err
			}
			for _, r := range rs {
				r.verdict = accept
			}
			put(0, rs...)
		case "icmp-block":
			r := p.rule(k)
			p.icmp(r, k.attrs["name"])
			r.verdict = reject
			if inverted {
				r.verdict = accept
			}
			put(0, r)
		case "masquerade":
			p.set.note(k.file, k.line, k.String(), "masquerading is not imported: keep it in a table of its own")
		case "forward-port":
			put(-40000, p.forwardPort(k, p.rule(k)))
		case "rule":
			priority, rs, err := p.rich(k)
			if err != nil {
				return err
			}
			put(priority, rs...)
		default:
			r := p.rule(k)
			r.verdict, r.target = unclear, "<"+k.name+">"
			put(-40000, r)
		}
	}
	slices.SortStableFunc(list, func(a, b ordered) int {
		if a.priority != b.priority {
			return a.priority - b.priority
		}
		return a.stage - b.stage
	})
	for _, o := range list {
		c.add(o.rule)
	}
	end := p.rule(z)
	end.text = fmt.Sprintf("target of zone %s", z.attrs["zone"])
	switch t := z.attrs["target"]; t {
	case "ACCEPT":
		end.verdict = accept
	case "DROP":
		end.verdict = drop
	case "", "default":
		icmp := p.rule(z)
		icmp.text, icmp.verdict = "ICMP in zone "+z.attrs["zone"], accept
		if p.conf["FirewallBackend"] == "iptables" {
			icmp.on[0][0].proto, icmp.on[1][0].proto = one(protoICMP, protoICMP), one(protoICMPv6, protoICMPv6)
		} else { // one rule of the family inet
			icmp.protocol(nums{{protoICMP, protoICMP}, {protoICMPv6, protoICMPv6}})
		}
		if !inverted {
			c.add(icmp)
		}
		end.verdict = reject
	default:
		end.verdict = reject
	}
	c.add(end)
	return nil
}

// forwardPort is a port that goes elsewhere.
func (p *firewalld) forwardPort(k *element, r *rule) *rule {
	if rs, err := p.matches(&element{name: "port", attrs: k.attrs, file: k.file, line: k.line}, r); err == nil && len(rs) == 1 {
		r = rs[0]
	}
	r.verdict = rewrite
	return r
}

func (p *firewalld) icmp(r *rule, name string) {
	r.narrow(func(b *box, v4 bool) {
		set, ok := icmpType(name, v4)
		if !ok {
			b.proto = nil
			return
		}
		proto := num(protoICMPv6)
		if v4 {
			proto = protoICMP
		}
		b.proto, b.dport = b.proto.and(one(proto, proto)), b.dport.and(set)
	})
	_, four := icmpType(name, true)
	_, six := icmpType(name, false)
	if !four && !six { // one of many types: none of it can be told
		r.on = match(true, true)
		r.protocol(nums{{protoICMP, protoICMP}, {protoICMPv6, protoICMPv6}})
		r.doubt("ICMP type %s", name)
	}
}

// matches gives the rules of a service, a port or a protocol, each of them a copy
// of r that is narrower.
func (p *firewalld) matches(k *element, r *rule) ([]*rule, error) {
	c := *r
	switch k.name {
	case "port", "source-port":
		proto, ok1 := protocols(k.attrs["protocol"])
		ports, ok2 := portList(strings.ReplaceAll(k.attrs["port"], "-", ":"))
		if !ok1 || !ok2 {
			return nil, parseError(k.file, k.line, "%s is not understood", k)
		}
		c.protocol(proto)
		c.ports(ports, k.name == "source-port")
		return []*rule{&c}, nil
	case "protocol":
		proto, ok := protocols(k.attrs["value"])
		if !ok {
			return nil, parseError(k.file, k.line, "unknown protocol %q", plain(k.attrs["value"], 40))
		}
		c.protocol(proto)
		return []*rule{&c}, nil
	}
	return p.service(k.attrs["name"], r, k, nil)
}

// service gives the rules of a service and of those that it includes.
func (p *firewalld) service(name string, r *rule, at *element, seen []string) ([]*rule, error) {
	if slices.Contains(seen, name) {
		return nil, nil
	}
	file, data, err := p.read("services/" + name + ".xml")
	if errors.Is(err, fs.ErrNotExist) {
		c := *r
		c.doubt("service %s, which is not defined in what was read", name)
		return []*rule{&c}, nil
	}
	if err != nil {
		return nil, err
	}
	e, err := parseXML(file, data)
	if err != nil {
		return nil, err
	}
	base := *r
	if d := e.child("destination"); d != nil {
		var list []*rule
		for f, key := range []string{"ipv4", "ipv6"} {
			if a := d.attrs[key]; a != "" {
				c := base
				c.on[1-f] = nil
				set, err := addressList(a)
				if err != nil {
					return nil, parseError(file, d.line, "%v", err)
				}
				c.address(set, false, false)
				list = append(list, &c)
			}
		}
		for f := range base.on {
			base.on[f] = nil
			for _, c := range list {
				base.on[f] = append(base.on[f], c.on[f]...)
			}
		}
	}
	var out []*rule
	for _, k := range e.kids {
		switch k.name {
		case "port", "protocol", "source-port":
			rs, err := p.matches(k, &base)
			if err != nil {
				return nil, err
			}
			out = append(out, rs...)
		case "include":
			rs, err := p.service(k.attrs["service"], r, at, append(seen, name))
			if err != nil {
				return nil, err
			}
			out = append(out, rs...)
		}
	}
	for _, c := range out {
		if c.service == "" {
			c.service = name
		}
	}
	return out, nil
}

// rich reads a rich rule.
func (p *firewalld) rich(e *element) (int, []*rule, error) {
	priority := 0
	if s := e.attrs["priority"]; s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < -32768 || n > 32767 {
			return 0, nil, parseError(e.file, e.line, "priority %q is out of range", plain(s, 20))
		}
		priority = n
	}
	r := p.rule(e)
	switch e.attrs["family"] {
	case "ipv4":
		r.on[1] = nil
	case "ipv6":
		r.on[0] = nil
	}
	list := []*rule{r}
	var action, what *element
	for _, k := range e.kids {
		switch k.name {
		case "source":
			p.peer(r, k, true)
		case "destination":
			p.peer(r, k, false)
		case "accept", "reject", "drop", "mark":
			action = k
		case "log", "nflog":
			r.log = true
		case "audit":
		default:
			what = k
		}
	}
	if what != nil {
		switch what.name {
		case "service", "port", "protocol", "source-port":
			var err error
			if list, err = p.matches(what, r); err != nil {
				return 0, nil, err
			}
		case "icmp-block":
			p.icmp(r, what.attrs["name"])
			r.verdict = reject
		case "icmp-type":
			p.icmp(r, what.attrs["name"])
		case "forward-port":
			return -40000, []*rule{p.forwardPort(what, r)}, nil
		case "masquerade":
			p.set.note(e.file, e.line, e.String(), "masquerading is not imported: keep it in a table of its own")
			return 0, nil, nil
		default:
			r.doubt("<%s>", what.name)
		}
	}
	for _, c := range list {
		if action == nil {
			continue
		}
		c.verdict = map[string]verdict{"accept": accept, "reject": reject, "drop": drop, "mark": goOn}[action.name]
		if l := action.child("limit"); l != nil {
			n, per, ok := rateOf(l.attrs["value"])
			if !ok || l.attrs["burst"] != "" {
				c.doubt("limit %s", l.attrs["value"])
				continue
			}
			c.limit = &limit{rate: &rules.Rate{Limit: n, Per: per, Burst: 5}}
		}
	}
	return priority, list, nil
}
