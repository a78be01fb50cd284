package importer

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"deadlight/rules"
)

// maxInline is how many addresses stand in a rule; more become a set.
const maxInline = 8

// text writes the policy.
func (p *plan) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Imported from %s by deadlight import. Read it before you apply it:\n#   deadlight check, deadlight explain PORT, deadlight try\n", p.format)
	b.WriteString("# What is not listed is closed. Replies, loopback, ICMP errors and neighbour\n# discovery are always on.\n")
	b.WriteString("version = 1\n")
	if len(p.notes) > 0 {
		fmt.Fprintf(&b, "\n# Not as in the original (%s):\n", count(len(p.notes), "place"))
		for _, n := range p.notes {
			for i, line := range wrap(plain(n.String(), 2000), 90) {
				b.WriteString([]string{"#   ", "#     "}[min(i, 1)] + line + "\n")
			}
		}
	}
	var def []string
	if p.reject {
		def = append(def, `input = "reject"`)
	}
	if p.output {
		word := "drop"
		if p.outReject {
			word = "reject"
		}
		def = append(def, "output = "+strconv.Quote(word))
	}
	if p.forward {
		def = append(def, `forward = "drop"`)
	}
	if len(def) > 0 {
		b.WriteString("\n[default]\n" + strings.Join(def, "\n") + "\n")
	}
	if p.echo != nil && !*p.echo {
		b.WriteString("\n[icmp]\necho = false\n")
	}
	if !p.dhcp {
		b.WriteString("\n[dhcp]\nclient = false\n")
	}
	if l := p.logDropped; l != nil {
		b.WriteString("\n[log]\n")
		if l.limit != nil && l.limit.rate != nil {
			fmt.Fprintf(&b, "dropped = { limit = %q, burst = %d }\n", perText(l.limit.rate), l.limit.rate.Burst)
		} else {
			b.WriteString("dropped = true\n")
		}
	}
	var sets strings.Builder
	names := map[string]string{} // set by its addresses
	for _, t := range p.tables {
		b.WriteString("\n")
		p.table(&b, &sets, names, t)
	}
	b.WriteString(sets.String())
	return b.String()
}

func (p *plan) table(b, sets *strings.Builder, names map[string]string, t *table) {
	var where []string
	for _, r := range t.by {
		if w := r.pos(); r.line > 0 && !slices.Contains(where, w) {
			where = append(where, w)
		}
	}
	if n := len(where); n > 4 {
		where = append(where[:3], fmt.Sprintf("and %d more", n-3))
	}
	if len(where) > 0 {
		fmt.Fprintf(b, "# %s\n", plain(strings.Join(where, ", "), 300))
	}
	name := t.name
	if strings.Contains(name, ".") {
		name = strconv.Quote(name)
	}
	fmt.Fprintf(b, "[%s.%s]\n", t.kind, name)
	t.what(b)
	key := "from"
	peers, own := t.from, t.to
	if t.kind == "egress" {
		key, peers, own = "to", t.to, [2]addrs{}
	}
	if list := p.peers(sets, names, t, peers); list != "" {
		fmt.Fprintf(b, "%s = %s\n", key, list)
	}
	if list := p.peers(sets, names, t, t.except); list != "" {
		fmt.Fprintf(b, "except = %s\n", list)
	}
	if list := p.peers(sets, names, t, own); list != "" {
		fmt.Fprintf(b, "to = %s\n", list)
	}
	if len(t.devices) > 0 {
		fmt.Fprintf(b, "interfaces = %s\n", tomlList(t.devices))
	}
	if t.v != [2]bool{true, true} && t.needsFamily() {
		fmt.Fprintf(b, "family = %q\n", map[bool]string{true: "ipv4", false: "ipv6"}[t.v[0]])
	}
	if l := t.limit; l != nil {
		if l.rate != nil {
			per := ""
			if !l.rate.PerSource {
				per = `, per = "rule"`
			}
			fmt.Fprintf(b, "rate = { limit = %q, burst = %d%s }\n", perText(l.rate), l.rate.Burst, per)
		}
		if l.conns > 0 {
			fmt.Fprintf(b, "connections = %d\n", l.conns)
		}
	}
	if t.log {
		b.WriteString("log = true\n")
	}
	if c := plain(t.comment, 128); c != "" {
		fmt.Fprintf(b, "comment = %s\n", tomlString(c))
	}
}

// needsFamily reports whether no address says the family already.
func (t *table) needsFamily() bool {
	f := 1
	if t.v[0] {
		f = 0
	}
	return t.from[f] == nil && t.to[f] == nil
}

func perText(r *rules.Rate) string {
	u := map[string]string{"1s": "second", "1m0s": "minute", "1h0m0s": "hour", "24h0m0s": "day"}[r.Per.String()]
	return fmt.Sprintf("%d/%s", r.Limit, u)
}

// what writes service, or ports and protocol.
func (t *table) what(b *strings.Builder) {
	if t.any {
		if t.kind != "block" {
			b.WriteString("protocol = \"any\"\n")
		}
		return
	}
	var protos []string
	for _, p := range t.on {
		protos = append(protos, protocolWord(p.proto))
	}
	ports := t.on[0].ports
	if ports != nil {
		if names, narrow := t.services(); names != nil {
			fmt.Fprintf(b, "service = %s\n", tomlList(names))
			if narrow {
				fmt.Fprintf(b, "protocol = %s\n", tomlList(protos))
			}
			return
		}
		var list []string
		for _, i := range ports {
			if i.lo == i.hi {
				list = append(list, fmt.Sprint(i.lo))
			} else {
				list = append(list, fmt.Sprintf("%q", fmt.Sprintf("%d-%d", i.lo, i.hi)))
			}
		}
		fmt.Fprintf(b, "ports = %s\n", single(list))
	}
	if len(protos) > 1 || protos[0] != `"tcp"` {
		fmt.Fprintf(b, "protocol = %s\n", single(protos))
	}
}

// services gives the names that stand for exactly these ports, and whether the
// protocol must be told because the service has another one too.
func (t *table) services() (names []string, narrow bool) {
	for _, i := range t.on[0].ports {
		if i.hi-i.lo > 1 {
			return nil, false
		}
		for port := i.lo; port <= i.hi; port++ {
			name := rules.ServiceName(rules.Protocol(t.on[0].proto), uint16(port))
			if name == "" {
				return nil, false
			}
			names = append(names, name)
			for _, p := range rules.ServicePorts(name) {
				at := slices.IndexFunc(t.on, func(o protoPorts) bool { return o.proto == num(p.Protocol) })
				if at < 0 {
					narrow = true
				} else if len(p.Ports) != 1 || p.Ports[0] != (rules.PortRange{Lo: uint16(port), Hi: uint16(port)}) {
					return nil, false
				}
			}
			for _, o := range t.on {
				if !slices.ContainsFunc(rules.ServicePorts(name), func(p rules.ProtoPorts) bool { return num(p.Protocol) == o.proto }) {
					return nil, false
				}
			}
		}
	}
	// With several services each must have every protocol that is named.
	return names, narrow
}

func protocolWord(p num) string {
	if w := rules.Protocol(p).String(); !strings.HasPrefix(w, "protocol ") {
		return strconv.Quote(w)
	}
	return fmt.Sprint(p)
}

// peers writes addresses of both families: in place, as a set of the original or
// as a new one.
func (p *plan) peers(sets *strings.Builder, names map[string]string, t *table, list [2]addrs) string {
	all := append(words(list[0]), words(list[1])...)
	if len(all) == 0 {
		return ""
	}
	both := union(append(slices.Clone(list[0]), list[1]...)...)
	key := strings.Join(all, " ")
	name := names[key]
	wanted, inline := t.name, len(all) <= maxInline
	for _, s := range p.sets {
		if len(all) > 1 && s.all.equal(both) { // a set in the original stays one
			wanted, inline = s.name, false
			break
		}
	}
	if inline {
		return tomlList(all)
	}
	if name == "" {
		taken := make([]string, 0, len(names))
		for _, n := range names {
			taken = append(taken, n)
		}
		name = unique(slug(wanted, "addresses"), taken)
		names[key] = name
		head := name
		if strings.Contains(name, ".") {
			head = strconv.Quote(name)
		}
		fmt.Fprintf(sets, "\n[set.%s]\naddresses = [\n", head)
		for _, a := range all {
			fmt.Fprintf(sets, "  %q,\n", a)
		}
		sets.WriteString("]\n")
	}
	return strconv.Quote("@" + name)
}

func single(list []string) string {
	if len(list) == 1 {
		return list[0]
	}
	return "[" + strings.Join(list, ", ") + "]"
}

func tomlList(list []string) string {
	out := make([]string, len(list))
	for i, s := range list {
		if out[i] = s; !strings.HasPrefix(s, `"`) {
			out[i] = tomlString(s)
		}
	}
	return single(out)
}

// tomlString quotes printable text.
func tomlString(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}

// plain makes one line of text without what could steer a terminal, of at most n
// bytes.
func plain(s string, n int) string {
	var b strings.Builder
	for _, r := range strings.Join(strings.Fields(s), " ") {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) || unicode.Is(unicode.Bidi_Control, r) {
			r = '?'
		}
		if b.Len()+len(string(r)) > n {
			break
		}
		b.WriteRune(r)
	}
	return strings.TrimSpace(b.String())
}

func wrap(s string, width int) []string {
	var out []string
	line := ""
	for _, w := range strings.Fields(s) {
		if line != "" && len(line)+1+len(w) > width {
			out, line = append(out, line), ""
		}
		if line != "" {
			line += " "
		}
		line += w
	}
	return append(out, line)
}

// slug makes a name of a table.
func slug(s, otherwise string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(s) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '_':
			b.WriteRune(r)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	out := b.String()
	if len(out) > 40 {
		out = out[:40]
	}
	if out = strings.Trim(out, "-._"); out == "" {
		return otherwise
	}
	return out
}

func unique(name string, taken []string) string {
	for n, try := 2, name; ; n++ {
		if !slices.Contains(taken, try) {
			return try
		}
		try = fmt.Sprintf("%s-%d", name, n)
	}
}

// nameTables gives every table a name that says what it is about.
func nameTables(list []*table) {
	taken := map[string][]string{}
	for _, t := range list {
		t.name = unique(t.title(), taken[t.kind])
		taken[t.kind] = append(taken[t.kind], t.name)
	}
}

func (t *table) title() string {
	where := ""
	if len(t.devices) > 0 {
		where = "-" + slug(t.devices[0], "interface")
	}
	if t.any {
		switch {
		case t.comment != "" && len(t.comment) <= 32:
			return slug(t.comment, "any")
		case where != "":
			return "any" + where
		case t.kind == "block":
			return "sources"
		case t.kind == "egress":
			return "any"
		}
		return "trusted"
	}
	p := t.on[0]
	if p.ports == nil && len(t.on) > 4 {
		return "others" + where
	}
	if p.ports == nil {
		return strings.Trim(slug(rules.Protocol(p.proto).String(), "protocol"), "-")
	}
	if t.comment != "" && len(t.comment) <= 24 {
		return slug(t.comment, "open")
	}
	if name := t.service(); name != "" {
		return slug(name, "open")
	}
	if p.ports.within(nums{{80, 80}, {443, 443}}) && len(p.ports) > 1 {
		return "web"
	}
	if names, _ := t.services(); len(names) > 1 && len(strings.Join(names, "-")) < 24 {
		return strings.Join(names, "-")
	}
	first := p.ports[0]
	if first.lo == first.hi && len(p.ports) == 1 {
		if name := rules.ServiceName(rules.Protocol(p.proto), uint16(first.lo)); name != "" {
			return name
		}
	}
	if first == (interval[num]{1, 65535}) {
		return "all-" + rules.Protocol(p.proto).String() + where
	}
	name := fmt.Sprintf("%s-%d", rules.Protocol(p.proto), first.lo)
	if first.hi != first.lo {
		name += fmt.Sprintf("-%d", first.hi)
	}
	return name
}

// sortTables puts blocks first, then openings as the original has them.
func sortTables(list []*table) {
	kinds := []string{"block", "open", "egress"}
	slices.SortStableFunc(list, func(a, b *table) int {
		if a.kind != b.kind || len(a.by) == 0 || len(b.by) == 0 {
			return slices.Index(kinds, a.kind) - slices.Index(kinds, b.kind)
		}
		return cmp.Or(cmp.Compare(a.by[0].file, b.by[0].file), a.by[0].line-b.by[0].line)
	})
}
