package importer

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"deadlight/rules"
)

// iptables reads the text of iptables-save and of its like. v4 says which of the
// two programs it is for.
type iptables struct {
	set   *ruleset
	file  string
	v4    bool
	table string
	// hint is the comment of what follows, as ufw writes it.
	hint  string
	ipset map[string]addrs
	frame bool // the lines are of no file
}

// parseError is a place in a file that cannot be read.
func parseError(file string, line int, format string, args ...any) error {
	return fmt.Errorf("%s:%d: %s", file, line, fmt.Sprintf(format, args...))
}

// hookOf gives the hook of a built-in chain and its priority in a table.
func hookOf(table, name string) (string, int) {
	prio := map[string]int{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}[table]
	hook := map[string]string{"PREROUTING": "prerouting", "INPUT": "input", "FORWARD": "forward", "OUTPUT": "output", "POSTROUTING": "postrouting"}[name]
	return hook, prio
}

// chainName keeps the chains of tables and families apart.
func (p *iptables) chainName(name string) string {
	return fmt.Sprintf("%s %s %s", map[bool]string{true: "ip", false: "ip6"}[p.v4], p.table, name)
}

// read adds the rules of a file.
func (p *iptables) read(data []byte) error {
	line := 0
	p.set.families[map[bool]int{true: 0, false: 1}[p.v4]] = true
	for text := range strings.Lines(string(data)) {
		line++
		text = strings.TrimSpace(text)
		switch {
		case text == "":
		case text[0] == '#':
			p.note(text)
		case text[0] == '*':
			p.table = strings.TrimSpace(text[1:])
			if _, ok := map[string]bool{"filter": true, "nat": true, "mangle": true, "raw": true, "security": true}[p.table]; !ok {
				return parseError(p.file, line, "unknown table %q", p.table)
			}
		case text == "COMMIT":
			p.table = ""
		case p.table == "":
			return parseError(p.file, line, "%q stands in no table: is this the output of iptables-save?", plain(text, 60))
		case text[0] == ':':
			if err := p.declare(line, text[1:]); err != nil {
				return err
			}
		default:
			if err := p.command(line, text); err != nil {
				return err
			}
		}
	}
	return nil
}

// note keeps what ufw says of the rules that follow.
func (p *iptables) note(text string) {
	tuple, ok := strings.CutPrefix(text, "### tuple ###")
	if !ok {
		if strings.HasPrefix(text, "### ") {
			p.hint = ""
		}
		return
	}
	p.hint = tupleComment(tuple)
}

func (p *iptables) declare(line int, text string) error {
	f := strings.Fields(text)
	if len(f) < 2 {
		return parseError(p.file, line, "a chain needs a name and a policy")
	}
	if hook, _ := hookOf(p.table, f[0]); hook == "" {
		p.set.chain(p.chainName(f[0])).rules = nil // iptables-restore empties what is declared
	}
	return p.policy(line, f[0], f[1])
}

func (p *iptables) policy(line int, name, policy string) error {
	c := p.set.chain(p.chainName(name))
	hook, prio := hookOf(p.table, name)
	if hook == "" {
		if policy != "-" {
			return parseError(p.file, line, "chain %q has no policy of its own", name)
		}
		return nil
	}
	v := map[string]verdict{"ACCEPT": accept, "DROP": drop}[policy]
	if v == goOn {
		return parseError(p.file, line, "unknown policy %q", policy)
	}
	for _, b := range p.set.bases {
		if b.chain == c {
			b.policy, b.line = v, line
			return nil
		}
	}
	p.set.bases = append(p.set.bases, &base{chain: c, hook: hook, policy: v, file: p.file, line: line,
		nat: p.table == "nat", prio: prio, ours: map[bool]int{true: 1, false: 2}[p.v4]})
	return nil
}

// words splits a line as iptables-restore does.
func splitWords(s string) ([]string, error) {
	var out []string
	var b strings.Builder
	in, quoted := false, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case quoted && c == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		case c == '"':
			quoted, in = !quoted, true
		case !quoted && (c == ' ' || c == '\t'):
			if in {
				out, in = append(out, b.String()), false
				b.Reset()
			}
		default:
			in = true
			b.WriteByte(c)
		}
	}
	if quoted {
		return nil, fmt.Errorf("a quotation mark is not closed")
	}
	if in {
		out = append(out, b.String())
	}
	return out, nil
}

func (p *iptables) command(line int, text string) error {
	w, err := splitWords(text)
	if err != nil {
		return parseError(p.file, line, "%v", err)
	}
	if len(w) > 0 && strings.HasPrefix(w[0], "[") { // counters
		w = w[1:]
	}
	if len(w) > 1 && w[0] == "-t" && w[1] == p.table {
		w = w[2:]
	}
	if len(w) < 2 {
		return parseError(p.file, line, "%q is not a rule of iptables-save", plain(text, 60))
	}
	at := -1
	name := w[1]
	rest := w[2:]
	switch w[0] {
	case "-A", "--append":
	case "-I", "--insert":
		at = 0
		if len(rest) > 0 {
			if n, err := strconv.Atoi(rest[0]); err == nil && n > 0 {
				at, rest = n-1, rest[1:]
			}
		}
	case "-N", "--new-chain":
		p.set.chain(p.chainName(name))
		return nil
	case "-P", "--policy":
		if len(rest) == 0 {
			return parseError(p.file, line, "-P without a policy")
		}
		return p.policy(line, name, rest[0])
	case "-F", "--flush":
		p.set.chain(p.chainName(name)).rules = nil
		return nil
	default:
		return parseError(p.file, line, "%q is not understood: -A, -I, -N, -P and -F are", plain(w[0], 30))
	}
	if p.frame {
		line = 0
	}
	r := &rule{file: p.file, line: line, text: plain(text, 400), comment: p.hint, on: match(p.v4, !p.v4)}
	if err := p.options(r, rest); err != nil {
		return parseError(p.file, line, "%v", err)
	}
	r.policy = p.frame && r.verdict == accept
	c := p.set.chain(p.chainName(name))
	c.add(r)
	if at >= 0 {
		copy(c.rules[min(at, len(c.rules)-1)+1:], c.rules[min(at, len(c.rules)-1):])
		c.rules[min(at, len(c.rules)-1)] = r
	}
	if hook, _ := hookOf(p.table, name); hook != "" && !slices.ContainsFunc(p.set.bases, func(b *base) bool { return b.chain == c }) {
		return p.policy(line, name, "ACCEPT")
	}
	return nil
}

// options reads what a rule matches and does.
func (p *iptables) options(r *rule, w []string) error {
	m := &iptMatch{p: p, r: r}
	for i := 0; i < len(w); {
		not := false
		if w[i] == "!" {
			not = true
			if i++; i >= len(w) {
				return fmt.Errorf("! at the end")
			}
		}
		if !strings.HasPrefix(w[i], "-") {
			return fmt.Errorf("%q is in the place of an option", plain(w[i], 40))
		}
		opt := w[i]
		i++
		var args []string
		if k, v, ok := strings.Cut(opt, "="); ok && strings.HasPrefix(opt, "--") {
			opt, args = k, []string{v}
		}
		for i < len(w) && w[i] != "!" && (!strings.HasPrefix(w[i], "-") || len(w[i]) > 1 && w[i][1] >= '0' && w[i][1] <= '9' || opt == "--comment" && len(args) == 0) {
			args = append(args, w[i])
			i++
		}
		// The old way: -s ! ADDRESS.
		if len(args) == 0 && i+1 < len(w) && w[i] == "!" && !strings.HasPrefix(w[i+1], "-") {
			not, args = true, []string{w[i+1]}
			i += 2
		}
		if err := m.option(opt, args, not); err != nil {
			return err
		}
	}
	return m.finish()
}

// iptMatch is a rule being read.
type iptMatch struct {
	p        *iptables
	r        *rule
	module   string
	target   string
	unknown  []string // options of nobody we know
	rate     string
	burst    int
	above    bool
	hash     map[string]string
	recent   map[string]string
	conns    int
	connOver bool
	mask     int
}

func (m *iptMatch) option(opt string, args []string, not bool) error {
	r := m.r
	arg := ""
	if len(args) > 0 {
		arg = args[0]
	}
	need := func() error {
		if arg == "" {
			return fmt.Errorf("%s without a value", opt)
		}
		return nil
	}
	switch opt {
	case "-m", "--match":
		m.module = arg
		switch {
		case slices.Contains([]string{"frag", "ipv6header", "hbh", "dst", "rt", "tcpmss"}, arg):
			r.odd = "packets with extension headers, fragments or TCP options"
		case arg == "rpfilter":
			r.odd = reversePath
		case !knownModule(arg):
			r.doubt("-m %s", arg)
		}
		return need()
	case "-j", "--jump", "-g", "--goto":
		m.target = arg
		if opt == "-g" || opt == "--goto" {
			r.verdict = goTo
		}
		return need()
	case "-c", "--set-counters", "--comment", "--hashlimit-htable-size", "--hashlimit-htable-max", "--hashlimit-htable-expire", "--hashlimit-htable-gcinterval":
		if opt == "--comment" {
			c := strings.Trim(strings.Join(args, " "), "'")
			if app, ok := strings.CutPrefix(c, "dapp_"); ok { // as ufw marks the rules of a profile
				app, _, _ = strings.Cut(app, ",")
				c = strings.ReplaceAll(app, "%20", " ")
			}
			if r.comment == "" {
				r.comment = c
			}
		}
	case "-p", "--protocol", "--proto":
		set, ok := protocols(arg)
		if !ok {
			r.doubt("protocol %s", arg)
			return need()
		}
		if not {
			set = one(0, 255).minus(set)
		}
		r.protocol(set)
		return need()
	case "-s", "--source", "--src", "-d", "--destination", "--dst":
		set, err := addressList(arg)
		if err != nil {
			return err
		}
		r.address(set, not, opt == "-s" || opt == "--source" || opt == "--src")
	case "--src-range", "--dst-range":
		i, ok := addressRange(arg)
		if !ok {
			return fmt.Errorf("%s %q is not a range of addresses", opt, plain(arg, 80))
		}
		r.address(addrs{i}, not, opt == "--src-range")
	case "-i", "--in-interface", "-o", "--out-interface":
		name := arg
		if strings.HasSuffix(name, "+") {
			name = strings.TrimSuffix(name, "+") + "*"
		}
		if name == "*" {
			if not {
				r.on = [2][]box{}
			}
			return nil
		}
		r.device([]string{name}, not)
		return need()
	case "-f", "--fragment":
		if !not {
			r.odd = "fragments of packets"
		}
	case "--dport", "--destination-port", "--dports", "--destination-ports", "--sport", "--source-port", "--sports", "--source-ports":
		set, ok := portList(arg)
		if !ok {
			r.doubt("%s %s", opt, arg)
			return need()
		}
		if not {
			set = one(0, 65535).minus(set)
		}
		r.ports(set, strings.HasPrefix(opt, "--sport") || strings.HasPrefix(opt, "--source"))
		if m.module == "udplite" || m.module == "dccp" {
			r.doubt("ports of %s", m.module)
		}
	case "--icmp-type", "--icmpv6-type":
		set, ok := icmpType(arg, m.p.v4)
		if !ok {
			r.doubt("%s %s", opt, arg)
			return need()
		}
		if not {
			set = one(0, 65535).minus(set)
		}
		r.ports(set, false)
	case "--ctstate", "--state":
		bits, ok := states(arg)
		if !ok {
			return fmt.Errorf("unknown state in %q", plain(arg, 60))
		}
		if not {
			bits = (stNew | stEstablished | stRelated | stOther) &^ bits
		}
		m.states(bits)
	case "--syn":
		if not {
			r.odd = noSYN
		}
	case "--tcp-flags":
		if len(args) < 2 {
			return fmt.Errorf("--tcp-flags needs two lists")
		}
		if synMatches(args[0], args[1]) == not {
			r.odd = noSYN
		}
	case "--tcp-option":
		r.odd = "TCP options"
	case "--match-set":
		return m.ipset(args, not)
	case "--dst-type":
		bits, ok := dstTypes(arg)
		if !ok {
			r.doubt("--dst-type %s", arg)
			return nil
		}
		if not {
			bits = ^bits
		}
		r.narrow(func(b *box, _ bool) { b.types &= bits })
	case "--pkt-type":
		bits := map[string]uint8{"unicast": toLocal | toAnycast, "host": toLocal | toAnycast, "broadcast": toBroadcast, "multicast": toMulticast}[arg]
		if bits == 0 {
			r.doubt("--pkt-type %s", arg)
			return nil
		}
		if not {
			bits = ^bits
		}
		r.narrow(func(b *box, _ bool) { b.types &= bits })
	case "--limit":
		m.rate = arg
		if not {
			m.above = true
		}
	case "--limit-burst", "--hashlimit-burst":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 {
			r.doubt("%s %s", opt, arg)
			return nil
		}
		m.burst = n
	case "--hashlimit-upto", "--hashlimit", "--hashlimit-above":
		m.rate = arg
		m.above = opt == "--hashlimit-above" || not
		m.hashed("kind", "hash")
	case "--hashlimit-mode", "--hashlimit-name", "--hashlimit-srcmask", "--hashlimit-dstmask":
		m.hashed(strings.TrimPrefix(opt, "--hashlimit-"), arg)
	case "--connlimit-above", "--connlimit-upto":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 {
			r.doubt("%s %s", opt, arg)
			return nil
		}
		m.conns, m.connOver = n, (opt == "--connlimit-above") != not
	case "--connlimit-mask":
		m.mask, _ = strconv.Atoi(arg)
	case "--connlimit-saddr":
	case "--set", "--update", "--rcheck", "--seconds", "--hitcount", "--name", "--rsource":
		if m.module == "recent" {
			if m.recent == nil {
				m.recent = map[string]string{}
			}
			m.recent[opt] = arg
			if not {
				r.doubt("! %s", opt)
			}
			return nil
		}
		m.other(opt, args, not)
	case "--mask":
		if m.module != "recent" {
			m.other(opt, args, not)
		} else if arg != "255.255.255.255" && arg != "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff" {
			r.doubt("--mask %s", arg)
		}
	default:
		m.other(opt, args, not)
	}
	return nil
}

func (m *iptMatch) hashed(key, value string) {
	if m.hash == nil {
		m.hash = map[string]string{}
	}
	m.hash[key] = value
}

// other is an option that only a target, or a match that we do not know, has.
func (m *iptMatch) other(opt string, args []string, not bool) {
	s := strings.TrimSpace(opt + " " + strings.Join(args, " "))
	if not {
		s = "! " + s
	}
	if m.target != "" && m.target != "ACCEPT" && m.target != "DROP" && m.target != "RETURN" {
		m.hashed("target", s)
		return
	}
	m.unknown = append(m.unknown, s)
}

func (m *iptMatch) states(bits uint8) {
	if m.r.states == 0 {
		m.r.states = bits
	} else {
		m.r.states &= bits
	}
	if m.r.states == 0 { // nothing is in two states
		m.r.on = [2][]box{}
	}
}

// noSYN is about TCP packets that belong to no flow and begin none.
const noSYN = "TCP packets that are no SYN (those that conntrack calls invalid are dropped, others only draw a RST)"

// reversePath is about packets with a source that is not reached by where they
// came in.
const reversePath = "packets whose source is not reached by where they came in (set rp_filter in the kernel)"

// knownModule reports whether every option of a match is read here, or doubted.
func knownModule(s string) bool {
	return slices.Contains([]string{"tcp", "udp", "sctp", "udplite", "dccp", "icmp", "icmp6", "icmpv6", "ipv6-icmp", "multiport", "state", "conntrack",
		"comment", "limit", "hashlimit", "connlimit", "recent", "set", "iprange", "addrtype", "pkttype"}, s)
}

// finish works out limits and the verdict.
func (m *iptMatch) finish() error {
	r := m.r
	for _, u := range m.unknown {
		r.doubt("%s", u)
	}
	if len(m.unknown) > 0 { // they tell more than the name of their match
		r.opaque = slices.DeleteFunc(r.opaque, func(s string) bool { return strings.HasPrefix(s, "-m ") })
	}
	m.limits()
	switch t := m.target; t {
	case "":
		r.verdict = goOn
	case "ACCEPT":
		r.verdict = accept
	case "DROP":
		r.verdict = drop
	case "REJECT":
		r.verdict = reject
	case "RETURN":
		r.verdict = back
	case "LOG", "NFLOG", "ULOG":
		r.verdict, r.log = goOn, true
	case "MARK", "CONNMARK", "AUDIT", "TRACE", "TCPMSS", "CLASSIFY", "DSCP", "TOS", "SET", "CHECKSUM", "SECMARK", "CONNSECMARK", "RATEEST", "IDLETIMER", "LED", "TTL", "HL", "ECN", "TCPOPTSTRIP", "MASQUERADE", "SNAT", "TEE":
		r.verdict = goOn
	case "DNAT", "REDIRECT", "NETMAP", "TPROXY", "DNPT", "SNPT":
		r.verdict = rewrite
	case "CT", "NOTRACK":
		r.verdict, r.target = unclear, t
		if strings.HasPrefix(m.hash["target"], "--helper") || strings.HasPrefix(m.hash["target"], "--zone") {
			r.verdict = goOn
		}
	case "QUEUE", "NFQUEUE", "SYNPROXY", "TARPIT", "CLUSTERIP":
		r.verdict, r.target = unclear, t
	default:
		r.target = m.p.chainName(t)
		if r.verdict != goTo {
			r.verdict = jump
		}
	}
	return nil
}

// limits reads what limit, hashlimit, connlimit and recent count.
func (m *iptMatch) limits() {
	r := m.r
	count := 0
	if m.rate != "" {
		count++
		l, why := m.rateLimit()
		if why != "" {
			r.doubt("%s", why)
		} else {
			r.limit, r.over = l, m.above
		}
	}
	if m.conns > 0 {
		count++
		full := 128
		if m.p.v4 {
			full = 32
		}
		if m.mask != 0 && m.mask != full {
			r.doubt("--connlimit-mask %d", m.mask)
		} else {
			r.limit, r.over = &limit{conns: m.conns}, m.connOver
		}
	}
	if m.recent != nil {
		_, set := m.recent["--set"]
		if set {
			// It only notes the source, and matches always.
			if len(m.recent) > 3 {
				r.doubt("-m recent")
			}
		} else {
			count++
			m.recently()
		}
	}
	if count > 1 {
		r.limit, r.over = nil, false
		r.doubt("two limits")
	}
}

func (m *iptMatch) rateLimit() (*limit, string) {
	n, per, ok := rateOf(m.rate)
	if !ok {
		return nil, "rate " + m.rate
	}
	burst := m.burst
	if burst == 0 {
		burst = 5
	}
	l := &limit{rate: &rules.Rate{Limit: n, Per: per, Burst: uint32(burst)}}
	if m.hash["kind"] == "" {
		return l, ""
	}
	for _, k := range strings.Split(m.hash["mode"], ",") {
		switch k {
		case "srcip":
			l.rate.PerSource = true
		case "", "dstip", "dstport", "srcport":
		default:
			return nil, "--hashlimit-mode " + k
		}
	}
	full := "128"
	if m.p.v4 {
		full = "32"
	}
	if s := m.hash["srcmask"]; l.rate.PerSource && s != "" && s != full {
		return nil, "--hashlimit-srcmask " + s
	}
	if n := m.hash["name"]; n != "" {
		l.key = "hashlimit " + n
	}
	return l, ""
}

// recently is "so many within so many seconds", which a rate says with a bucket
// that never lets more through in any such time.
func (m *iptMatch) recently() {
	seconds, err1 := strconv.Atoi(m.recent["--seconds"])
	hits, err2 := strconv.Atoi(m.recent["--hitcount"])
	_, update := m.recent["--update"]
	_, check := m.recent["--rcheck"]
	if err1 != nil || err2 != nil || seconds < 1 || hits < 3 || !(update || check) {
		m.r.doubt("-m recent")
		return
	}
	// hits-1 are let through within seconds: hits-2 at once, and one more in that time.
	rate := &rules.Rate{Limit: 1, Per: time.Minute, Burst: uint32(hits - 2), PerSource: true}
	switch {
	case seconds <= 60:
		rate.Limit = uint64(60 / seconds)
	case seconds <= 3600:
		rate.Limit, rate.Per = uint64(3600/seconds), time.Hour
	case seconds <= 86400:
		rate.Limit, rate.Per = uint64(86400/seconds), 24*time.Hour
	default:
		m.r.doubt("--seconds %d", seconds)
		return
	}
	name := m.recent["--name"]
	if name == "" {
		name = "DEFAULT"
	}
	m.r.over = true
	m.r.limit = &limit{rate: rate, key: "recent " + name,
		note: fmt.Sprintf("a source is let in %d times in %d s, as here, but the original also keeps it out while it goes on trying", hits-1, seconds)}
}

func rateOf(s string) (uint64, time.Duration, bool) {
	number, unit, ok := strings.Cut(s, "/")
	if !ok {
		unit = "second"
	}
	n, err := strconv.ParseUint(number, 10, 31)
	per, known := perUnit(unit)
	return n, per, err == nil && n > 0 && known
}

func (m *iptMatch) ipset(args []string, not bool) error {
	if len(args) < 2 {
		return fmt.Errorf("--match-set needs a name and src or dst")
	}
	set, ok := m.p.ipset[args[0]]
	if !ok || args[1] != "src" && args[1] != "dst" {
		m.r.doubt("set %s, which was not read or holds more than addresses", args[0])
		return nil
	}
	m.r.address(set, not, args[1] == "src")
	return nil
}

// protocols reads a protocol by name or number.
func protocols(s string) (nums, bool) {
	switch s = strings.ToLower(s); s {
	case "all", "0":
		return one(0, 255), true
	case "icmpv6", "ipv6-icmp":
		return one(58, 58), true
	case "udplite":
		return one(136, 136), true
	case "dccp":
		return one(33, 33), true
	case "ipv6":
		return one(41, 41), true
	case "ipencap", "ipip", "ip-encap":
		return one(4, 4), true
	}
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP, rules.SCTP, rules.ESP, rules.AH, rules.GRE, rules.VRRP, rules.IGMP, rules.ICMPv4} {
		if p.String() == s {
			return one(num(p), num(p)), true
		}
	}
	if n, ok := map[string]num{"ospf": 89, "pim": 103, "l2tp": 115}[s]; ok {
		return one(n, n), true
	}
	n, err := strconv.ParseUint(s, 10, 8)
	return one(num(n), num(n)), err == nil
}

// portList reads "22,80:90".
func portList(s string) (nums, bool) {
	var out []interval[num]
	for _, part := range strings.Split(s, ",") {
		lo, hi, isRange := strings.Cut(part, ":")
		if isRange && lo == "" {
			lo = "0"
		}
		if isRange && hi == "" {
			hi = "65535"
		}
		if !isRange {
			hi = lo
		}
		a, ok1 := portNumber(lo)
		b, ok2 := portNumber(hi)
		if !ok1 || !ok2 || a > b {
			return nil, false
		}
		out = append(out, interval[num]{a, b})
	}
	return union(out...), true
}

// portNumber reads a port by number, or by a name that means one port everywhere.
func portNumber(s string) (num, bool) {
	if n, err := strconv.ParseUint(s, 10, 16); err == nil {
		return num(n), true
	}
	var found []num
	for _, on := range rules.ServicePorts(s) {
		for _, r := range on.Ports {
			if r.Lo != r.Hi {
				return 0, false
			}
			if !slices.Contains(found, num(r.Lo)) {
				found = append(found, num(r.Lo))
			}
		}
	}
	if len(found) != 1 {
		return 0, false
	}
	return found[0], true
}

// icmpType reads "8", "3/4" or a name.
func icmpType(s string, v4 bool) (nums, bool) {
	if s == "any" || s == "255" && v4 {
		return one(0, 65535), true
	}
	v4names := map[string]num{"echo-reply": 0, "pong": 0, "destination-unreachable": 3, "source-quench": 4, "redirect": 5, "echo-request": 8, "ping": 8,
		"router-advertisement": 9, "router-solicitation": 10, "time-exceeded": 11, "ttl-exceeded": 11, "parameter-problem": 12, "timestamp-request": 13,
		"timestamp-reply": 14, "address-mask-request": 17, "address-mask-reply": 18}
	v6names := map[string]num{"destination-unreachable": 1, "packet-too-big": 2, "time-exceeded": 3, "ttl-exceeded": 3, "parameter-problem": 4,
		"echo-request": 128, "ping": 128, "echo-reply": 129, "pong": 129, "router-solicitation": 133, "router-advertisement": 134,
		"neighbour-solicitation": 135, "neighbor-solicitation": 135, "nd-neighbor-solicit": 135, "neighbour-advertisement": 136, "neighbor-advertisement": 136,
		"nd-neighbor-advert": 136, "nd-router-solicit": 133, "nd-router-advert": 134, "redirect": 137, "nd-redirect": 137, "mld-listener-query": 130,
		"mld-listener-report": 131, "mld-listener-done": 132, "mld-listener-reduction": 132, "mld2-listener-report": 143}
	names := v6names
	if v4 {
		names = v4names
	}
	if t, ok := names[s]; ok {
		return one(t<<8, t<<8|255), true
	}
	typ, code, has := strings.Cut(s, "/")
	t, err := strconv.ParseUint(typ, 10, 8)
	if err != nil {
		return nil, false
	}
	if !has {
		return one(num(t)<<8, num(t)<<8|255), true
	}
	c, err := strconv.ParseUint(code, 10, 8)
	return one(num(t)<<8|num(c), num(t)<<8|num(c)), err == nil
}

func states(s string) (uint8, bool) {
	var out uint8
	for _, w := range strings.Split(s, ",") {
		switch strings.ToUpper(w) {
		case "NEW":
			out |= stNew
		case "ESTABLISHED":
			out |= stEstablished
		case "RELATED":
			out |= stRelated
		case "INVALID", "UNTRACKED", "SNAT", "DNAT":
			out |= stOther
		default:
			return 0, false
		}
	}
	return out, true
}

func dstTypes(s string) (uint8, bool) {
	var out uint8
	for _, w := range strings.Split(s, ",") {
		switch strings.ToUpper(w) {
		case "LOCAL":
			out |= toLocal
		case "BROADCAST":
			out |= toBroadcast
		case "MULTICAST":
			out |= toMulticast
		case "ANYCAST":
			out |= toAnycast
		case "UNICAST", "UNREACHABLE", "BLACKHOLE", "PROHIBIT", "UNSPEC", "THROW", "NAT", "XRESOLVE":
			// Not to this host.
		default:
			return 0, false
		}
	}
	return out, true
}

// synMatches reports whether a packet that only has SYN matches.
func synMatches(mask, want string) bool {
	has := func(list, flag string) bool {
		f := strings.Split(strings.ToUpper(list), ",")
		return slices.Contains(f, flag) || slices.Contains(f, "ALL")
	}
	for _, f := range []string{"SYN", "ACK", "FIN", "RST", "URG", "PSH"} {
		if has(mask, f) && (f == "SYN") != has(want, f) {
			return false
		}
	}
	return !has(want, "SYN") || has(mask, "SYN")
}

// addressList reads "192.0.2.1,10.0.0.0/255.0.0.0".
func addressList(s string) (addrs, error) {
	var out []interval[netip.Addr]
	for _, w := range strings.Split(s, ",") {
		i, ok := oneAddress(w)
		if !ok {
			return nil, fmt.Errorf("%q is not an address: names are not looked up", plain(w, 80))
		}
		out = append(out, i)
	}
	return union(out...), nil
}

// oneAddress reads an address or a network, with the mask in bits or written out.
func oneAddress(s string) (interval[netip.Addr], bool) {
	none := interval[netip.Addr]{}
	base, mask, has := strings.Cut(s, "/")
	a, err := netip.ParseAddr(base)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return none, false
	}
	if !has {
		return interval[netip.Addr]{a, a}, true
	}
	if m, err := netip.ParseAddr(mask); err == nil {
		if m.BitLen() != a.BitLen() {
			return none, false
		}
		bits, ended := 0, false
		for _, c := range m.AsSlice() {
			for k := 7; k >= 0; k-- {
				on := c>>k&1 == 1
				if on && ended {
					return none, false
				}
				if on {
					bits++
				}
				ended = ended || !on
			}
		}
		mask = strconv.Itoa(bits)
	}
	bits, err := strconv.Atoi(mask)
	if err != nil || bits < 0 || bits > a.BitLen() {
		return none, false
	}
	return prefixInterval(netip.PrefixFrom(a, bits)), true
}

func addressRange(s string) (interval[netip.Addr], bool) {
	lo, hi, ok := strings.Cut(s, "-")
	if !ok {
		return oneAddress(s)
	}
	a, err1 := netip.ParseAddr(lo)
	b, err2 := netip.ParseAddr(hi)
	if err1 != nil || err2 != nil || a.BitLen() != b.BitLen() || b.Less(a) || a.Zone()+b.Zone() != "" || a.Is4In6() || b.Is4In6() {
		return interval[netip.Addr]{}, false
	}
	return interval[netip.Addr]{a, b}, true
}
