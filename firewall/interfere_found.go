package firewall

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

const familyARP = 3 // NFPROTO_ARP, which golang.org/x/sys lacks

func (t *liveTable) isOurs() bool {
	return t.family == unix.NFPROTO_INET && t.title == rules.TableName
}

// where names a chain in the words of nft.
func (t *liveTable) where(chain string) string {
	family := t.name()
	if t.family == familyARP {
		family = "arp"
	}
	return fmt.Sprintf("table %s %s, chain %s", family, t.title, chain)
}

// findings gathers what is found of chains; what several packets show is one.
type findings struct {
	all   []*Interference
	ports map[*Interference][]port
	byKey map[string]*Interference
	hit   map[*liveChain]bool // base chains that stopped a packet, or may have
	by    map[string]bool     // interfaces that a packet was tried by
}

// port is a range of ports of which the first stands for all, or a protocol
// without ports.
type port struct {
	protocol rules.Protocol
	lo, hi   uint16
}

func newFindings() *findings {
	return &findings{ports: map[*Interference][]port{}, byKey: map[string]*Interference{}, hit: map[*liveChain]bool{}, by: map[string]bool{}}
}

// add takes a finding, or gives the one that says the same already.
func (f *findings) add(i Interference) *Interference { return f.once(i.Rule, i) }

// once takes a finding unless one of that place and nature is there already.
func (f *findings) once(place string, i Interference) *Interference {
	key := strings.Join([]string{string(i.Severity), i.Kind, i.Where, place, i.Fact}, "\x00")
	if old := f.byKey[key]; old != nil {
		return old
	}
	f.byKey[key] = &i
	f.all = append(f.all, &i)
	return &i
}

// stopped files what a step does to a port; several packets meet one rule, which
// is written differently for each when it looks into a set.
func (f *findings) stopped(i Interference, by *Step, p port) {
	i.Rule = stepRule(by, by.Text)
	kept := f.once(fmt.Sprint(by.Handle, by.Verdict), i)
	if kept.Rule != i.Rule {
		kept.Rule = stepRule(by, by.Verdict)
	}
	f.ports[kept] = append(f.ports[kept], p)
}

func (f *findings) list() []Interference {
	var out []Interference
	for _, i := range f.all {
		i.Ports = portList(f.ports[i])
		out = append(out, *i)
	}
	return out
}

// portList writes ports ascending: "22/tcp", "6000-6010/tcp", "esp".
func portList(ports []port) []string {
	slices.SortFunc(ports, func(a, b port) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.lo, b.lo), cmp.Compare(b.hi, a.hi))
	})
	var joined []port
	for _, p := range ports {
		if n := len(joined) - 1; n >= 0 && joined[n].protocol == p.protocol && int(p.lo) <= int(joined[n].hi)+1 {
			joined[n].hi = max(joined[n].hi, p.hi)
			continue
		}
		joined = append(joined, p)
	}
	var out []string
	for _, p := range joined {
		if hasPorts(p.protocol) {
			out = append(out, rules.PortRange{Lo: p.lo, Hi: p.hi}.String()+"/"+p.protocol.String())
		} else {
			out = append(out, p.protocol.String())
		}
	}
	return out
}

// stepRule says in a line what a step of a walk was.
func stepRule(s *Step, text string) string {
	switch {
	case s.Handle == 0:
		return s.Verdict
	case s.Comment != "":
		return fmt.Sprintf("%s (handle %d, %q)", text, s.Handle, s.Comment)
	}
	return fmt.Sprintf("%s (handle %d)", text, s.Handle)
}

// keeper guesses from their names which program keeps a table's rules, and says
// how to open a port there.
func (t *liveTable) keeper() (program, advice string) {
	has := func(prefix string) bool {
		for chain := range t.rules {
			if strings.HasPrefix(chain, prefix) {
				return true
			}
		}
		return slices.ContainsFunc(t.bases, func(ch *liveChain) bool { return strings.HasPrefix(ch.title, prefix) })
	}
	switch {
	case t.title == "firewalld", t.title == "firewalld_policy_drop":
		return "firewalld", "One program should decide: systemctl disable --now firewalld, or open the port there too with firewall-cmd."
	case has("ufw-"), has("ufw6-"):
		return "ufw", "One program should decide: ufw disable, or open the port there too with ufw allow."
	case strings.HasPrefix(t.title, "f2b-"), has("f2b-"):
		return "fail2ban", "fail2ban-client status lists its jails; fail2ban-client unban takes an address out."
	case has("crowdsec-chain"), has("crowdsec6-chain"):
		return "CrowdSec", "cscli decisions list shows whom it bans; cscli decisions delete --ip takes an address out."
	case has("DOCKER"), t.title == "docker-bridges":
		return "docker", "Docker makes these rules; what it publishes is judged by the policy, by host port."
	case has("shorewall"), has("fw-net"), has("net-fw"):
		return "shorewall", "One program should decide: open the port in shorewall too, or disable it."
	case has("LIBVIRT_"), t.title == "libvirt_network":
		return "libvirt", "libvirt makes these rules for its networks."
	case has("NETAVARK"):
		return "podman", "Podman makes these rules; what it publishes is judged by the policy, by host port."
	case has("KUBE-"), strings.HasPrefix(t.title, "kube-"):
		return "kube-proxy", "Kubernetes makes these rules."
	}
	return "", ""
}

// remedy says what to do about a rule, or the policy, of a chain.
func (t *liveTable) remedy(chain string, handle uint64) string {
	if _, advice := t.keeper(); advice != "" {
		return advice
	}
	family := t.name()
	if t.family == familyARP {
		family = "arp"
	}
	if handle == 0 {
		return fmt.Sprintf("If nobody needs that table, remove it: nft delete table %s %s; else admit the packets there too.", family, t.title)
	}
	return fmt.Sprintf("If nobody needs that rule, remove it: nft delete rule %s %s %s handle %d.", family, t.title, chain, handle)
}
