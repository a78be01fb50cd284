package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"deadlight/rules"
)

// The starter policy as text. Names of processes, units and interfaces are
// anybody's: they stand in comments on one line, escaped, or not at all.

const starterHead = `# What this host's network reaches now, drawn from the sockets that listen and the
# rules that the kernel runs. Nothing else will be reachable once it is applied.
# Read it, take out what nobody needs, and narrow the rest with from = [...]:
#
#   deadlight check policy.toml
#   sudo deadlight plan policy.toml
#   sudo deadlight apply policy.toml --confirm 60s
#
# Protocols other than TCP and UDP (IPsec, VRRP, GRE) are not looked for.
version = 1
`

// who names the process of a socket, with its unit or container.
func (s *starter) who(l listener) string {
	switch unit := s.units[l.PID]; {
	case l.PID == 0 && l.Inode == 0:
		return "a socket of the kernel, such as WireGuard's"
	case l.PID == 0:
		return "a process that cannot be told"
	case unit != "":
		return fmt.Sprintf("%s (%s)", l.Comm, unit)
	}
	return l.Comm
}

// name suggests one for the opening of a want.
func (s *starter) name(w *want) string {
	switch {
	case w.published, w.Comm == "docker-proxy", w.Comm == "rootlessport":
		return "published"
	case w.Protocol == rules.TCP && s.works(w.listener), w.Comm == "sshd":
		return "ssh"
	case w.PID == 0 && w.Inode == 0:
		return "kernel"
	case w.PID == 0:
		return "unknown"
	case w.Comm == "systemd": // holds the sockets of many
		return fmt.Sprintf("socket-%d", w.Port)
	}
	return bareName(w.Comm)
}

// bareName makes a key that needs no quotes.
func bareName(s string) string {
	const longest = 24
	name := strings.Map(func(r rune) rune {
		switch {
		case r >= '0' && r <= '9', r >= 'A' && r <= 'Z', r >= 'a' && r <= 'z', r == '_':
			return r
		}
		return '-'
	}, s)
	name = strings.Trim(name, "-_")
	name = strings.TrimRight(name[:min(len(name), longest)], "-_")
	if name == "" {
		return "service"
	}
	return name
}

// comment writes what stands behind # on one line.
func comment(text string) string {
	const longest = 200
	text = oneLine(strings.ToValidUTF8(text, "\uFFFD"))
	if r := []rune(text); len(r) > longest {
		text = string(r[:longest]) + "…"
	}
	return "# " + text + "\n"
}

// text writes the tables.
func (s *starter) text(tables []*opening, left int) string {
	var b strings.Builder
	b.WriteString(starterHead)
	used := map[string]bool{}
	for _, o := range tables {
		for _, ports := range o.byProtocol() {
			name := o.owner
			if o.scope.interfaces != "" && !strings.Contains(o.scope.interfaces, " ") {
				name += "-" + bareName(o.scope.interfaces)
			}
			name = unique(used, name)
			b.WriteString("\n")
			for _, c := range ports.comments {
				b.WriteString(comment(c))
			}
			if o.owner == "ssh" {
				for _, own := range s.sessions {
					b.WriteString(comment(fmt.Sprintf("You work through your %s.", own)))
				}
			}
			o.write(&b, name, ports)
		}
	}
	writeFailsafe(&b, tables)
	if s.echoClosed() {
		b.WriteString("\n# A ping is not answered on every interface now.\n[icmp]\necho = false\n")
	}
	if len(s.closed) > 0 {
		b.WriteString("\n# Not opened:\n")
		for _, c := range s.closed {
			b.WriteString(comment("  " + c))
		}
	}
	if left > 0 {
		b.WriteString(comment(fmt.Sprintf("The running rules were not asked about %s: too many.", plural(left, "packet"))))
	}
	return b.String()
}

// echoClosed reports whether a ping is unanswered, or may be, on some way.
func (s *starter) echoClosed() bool {
	return slices.ContainsFunc(s.echo(), func(p rules.Packet) bool { return !accepts(s.asked.answer(p)) })
}

func unique(used map[string]bool, name string) string {
	out := name
	for n := 2; used[out]; n++ {
		out = fmt.Sprintf("%s-%d", name, n)
	}
	used[out] = true
	return out
}

// portLine is one line of ports with its protocols.
type portLine struct {
	ports     string
	protocols []string
	comments  []string
}

// byProtocol gives the ports of each protocol, those that both have alike at once.
func (o *opening) byProtocol() []portLine {
	tcp, udp := portsTOML(o.ports[rules.TCP]), portsTOML(o.ports[rules.UDP])
	of := func(p rules.Protocol) []string { return o.comments[p] }
	one, other := portLine{tcp, nil, of(rules.TCP)}, portLine{udp, []string{"udp"}, of(rules.UDP)}
	switch {
	case tcp == udp:
		one.protocols = []string{"tcp", "udp"}
		for _, c := range other.comments {
			if !slices.Contains(one.comments, c) {
				one.comments = append(one.comments, c)
			}
		}
		return []portLine{one}
	case udp == "":
		return []portLine{one}
	case tcp == "":
		return []portLine{other}
	}
	return []portLine{one, other}
}

// portsTOML writes ports; "" for none.
func portsTOML(ranges []rules.PortRange) string {
	if len(ranges) == 0 {
		return ""
	}
	slices.SortFunc(ranges, func(a, b rules.PortRange) int { return int(a.Lo) - int(b.Lo) })
	var joined []rules.PortRange
	for _, r := range ranges {
		// Neighbours that are named one by one stay so.
		if n := len(joined) - 1; n >= 0 && int(joined[n].Hi)+1 == int(r.Lo) && (joined[n].Lo != joined[n].Hi || r.Lo != r.Hi) {
			joined[n].Hi = r.Hi
			continue
		}
		joined = append(joined, r)
	}
	var out []string
	for _, r := range joined {
		if r.Lo == r.Hi {
			out = append(out, r.String())
		} else {
			out = append(out, strconv.Quote(r.String()))
		}
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// quoted writes strings that need no escapes of TOML's own.
func quoted(list []string) string {
	var out []string
	for _, s := range list {
		out = append(out, strconv.Quote(s))
	}
	if len(out) == 1 {
		return out[0]
	}
	return "[" + strings.Join(out, ", ") + "]"
}

// writeFailsafe lets administrators in where a boot cannot use the policy. It knows no
// destinations: what is open at one address only is left out.
func writeFailsafe(b *strings.Builder, tables []*opening) {
	i := slices.IndexFunc(tables, func(o *opening) bool {
		return o.owner == "ssh" && o.scope.to == "" && len(o.ports[rules.TCP]) > 0
	})
	if i < 0 {
		return
	}
	o := tables[i]
	fmt.Fprintf(b, "\n# All that gets in where a boot cannot use this policy.\n[failsafe]\nports = %s\n", portsTOML(o.ports[rules.TCP]))
	if o.scope.interfaces != "" {
		fmt.Fprintf(b, "interfaces = %s\n", quoted(strings.Fields(o.scope.interfaces)))
	}
	if !o.scope.v4 || !o.scope.v6 {
		fmt.Fprintf(b, "from = %s\n", quoted(o.scope.everyone()))
	}
}

// write writes one table.
func (o *opening) write(b *strings.Builder, name string, l portLine) {
	fmt.Fprintf(b, "[open.%s]\nports = %s\n", name, l.ports)
	if len(l.protocols) > 0 {
		fmt.Fprintf(b, "protocol = %s\n", quoted(l.protocols))
	}
	if o.scope.interfaces != "" {
		fmt.Fprintf(b, "interfaces = %s\n", quoted(strings.Fields(o.scope.interfaces)))
	}
	if o.scope.to != "" {
		fmt.Fprintf(b, "to = %s\n", quoted(strings.Fields(o.scope.to)))
	}
	if o.admin && o.scope.interfaces == "" {
		fmt.Fprintf(b, "from = %s # everyone, as now: better name who may\n", quoted(o.scope.everyone()))
	}
	switch {
	case !o.scope.v6:
		b.WriteString("family = \"ipv4\"\n")
	case !o.scope.v4:
		b.WriteString("family = \"ipv6\"\n")
	}
}

// admit adds what the caller's own sessions need that the text does not admit, and
// holds the whole against the language: what is handed out gives no warning.
func (s *starter) admit(text string) (string, error) {
	rs, err := parsed(text)
	if err != nil {
		return "", err
	}
	for _, own := range s.sessions {
		for _, c := range cutOffs(rs, []session{own}, s.now) {
			name := "ssh"
			if own.Protocol == rules.UDP {
				name = "mosh"
			}
			for taken(rs, name) {
				name += "-own"
			}
			family := "ipv6"
			if c.packet.Src.Is4() {
				family = "ipv4"
			}
			text += fmt.Sprintf("\n%s[open.%s]\nports = [%d]\nprotocol = %q\nfrom = %q\nfamily = %q\n",
				comment(fmt.Sprintf("Your %s, which nothing above admits.", own)), name, c.packet.DstPort, own.Protocol, c.packet.Src.WithZone(""), family)
			if rs, err = parsed(text); err != nil {
				return "", err
			}
		}
	}
	return text, nil
}

// parsed reads a policy of ours.
func parsed(text string) (*rules.Ruleset, error) {
	p, problems := rules.Parse("policy.toml", []byte(text), nil)
	if p == nil || len(problems) > 0 {
		return nil, fmt.Errorf("the policy drawn from this host has a fault, which is a bug of deadlight: line %d: %s", problems[0].Pos.Line, problems[0].Summary)
	}
	return rules.Compile(p), nil
}
