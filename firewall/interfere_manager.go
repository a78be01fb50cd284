package firewall

import (
	"io/fs"
	"regexp"
)

// ufwOff matches the setting by which ufw does nothing when it is started.
var ufwOff = regexp.MustCompile(`(?m)^\s*ENABLED\s*=\s*["']?no`)

// manager says what an enabled unit that keeps rules of its own means.
func (h *hostTree) manager(name string) (Interference, bool) {
	const beside = " It leaves Deadlight's table alone, so it cannot open what the policy closes."
	const one = "One program should decide: "
	i := Interference{Severity: May, Kind: "unit", Where: name}
	switch name {
	case "ufw.service":
		conf, err := fs.ReadFile(h.root, "etc/ufw/ufw.conf")
		h.missed("/etc/ufw/ufw.conf", err)
		if ufwOff.Match(conf) {
			return i, false
		}
		i.Fact = "ufw keeps its own list of open ports: once started it drops what that does not list, whatever the policy opens." + beside
		i.Advice = one + "ufw disable, or allow the same ports there."
	case "firewalld.service":
		i.Fact = "firewalld keeps its own list of open ports: once started it rejects what that does not list, whatever the policy opens." + beside
		i.Advice = one + "systemctl disable --now firewalld, or open the same ports there."
	case "netfilter-persistent.service", "iptables.service", "ip6tables.service":
		i.Fact = "It loads saved iptables rules at boot, which can drop what the policy opens." + beside
		i.Advice = one + "systemctl disable " + name + ", or keep the saved rules free of drops."
	case "shorewall.service", "shorewall6.service", "shorewall-lite.service", "shorewall6-lite.service", "foomuuri.service", "ferm.service":
		i.Fact = "It keeps its own list of open ports: once started it drops what that does not list, whatever the policy opens." + beside
		i.Advice = one + "systemctl disable " + name + ", or open the same ports there."
	case "fail2ban.service":
		i.Severity = Note
		i.Fact = "fail2ban drops or rejects the addresses that it bans, which the policy may admit; it opens nothing."
	case "crowdsec-firewall-bouncer.service":
		i.Severity = Note
		i.Fact = "CrowdSec's bouncer drops the addresses that it bans, which the policy may admit; it opens nothing."
	case "docker.service", "podman.service", "k3s.service", "k3s-agent.service", "kubelet.service":
		i.Severity = Note
		i.Fact = "It publishes ports of containers; by default the policy judges them too, by host port."
		i.Advice = "List published ports in the policy as you list others."
	default:
		return i, false
	}
	if h.unit(ourUnit) != nil && i.Severity == May {
		switch h.orderOf(name, ourUnit) {
		case earlier:
			i.Fact += " At boot it starts before " + ourUnit + "."
		case later:
			i.Fact += " At boot it starts after " + ourUnit + "."
		}
	}
	return i, true
}
