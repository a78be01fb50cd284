package firewall

import (
	"os/exec"
	"strings"
	"testing"

	"deadlight/rules"
)

// tool runs one of the iptables family, which .ci/test installs.
func tool(t *testing.T, line string) {
	t.Helper()
	words := strings.Fields(line)
	if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// The rules of ufw, Docker and their like, as iptables-nft writes them.
func TestWalkIptables(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		for _, line := range []string{
			"iptables-nft -P INPUT DROP",
			"iptables-nft -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			"iptables-nft -A INPUT -m conntrack --ctstate INVALID -j DROP",
			"iptables-nft -A INPUT -p tcp -m tcp --dport 22 -m comment --comment hello -j ACCEPT",
			"iptables-nft -A INPUT -p tcp -m multiport --dports 80,443,1000:1010 -j ACCEPT",
			"iptables-nft -A INPUT -p udp -m multiport ! --dports 53,60:70 -j REJECT",
			"iptables-nft -A INPUT -p tcp --syn --dport 25 -m addrtype --dst-type LOCAL -j REJECT --reject-with tcp-reset",
			"iptables-nft -A INPUT -p tcp --dport 26 -m addrtype ! --src-type LOCAL,UNICAST -j ACCEPT",
			"iptables-nft -A INPUT -p tcp --dport 27 -m limit --limit 100/sec -j LOG",
			"iptables-nft -A INPUT -p tcp --dport 9999 -m conntrack --ctstate DNAT -j ACCEPT",
			"iptables-nft -t nat -N DOCKER",
			"iptables-nft -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
			"iptables-nft -t nat -A DOCKER -p tcp --dport 8080 -j REDIRECT --to-ports 9999",
			"iptables-nft -t nat -A DOCKER ! -i docker0 -p tcp --dport 8081 -j DNAT --to-destination 172.17.0.5:80",
			"iptables-nft -t nat -A DOCKER ! -i docker0 -p tcp --dport 8082 -j DNAT --to-destination 172.17.0.5:81",
			"iptables-nft -P FORWARD DROP",
			"iptables-nft -A FORWARD -d 172.17.0.5/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT",
			"ip6tables-nft -A INPUT -p tcp --dport 22 -j REJECT",
			"ip6tables-nft -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 22",
		} {
			tool(t, line)
		}
		for port, want := range map[uint16]Verdict{
			22: WalkAccept, 23: WalkDrop, 25: WalkReject, 26: WalkDrop, 27: WalkDrop, 80: WalkAccept, 443: WalkAccept, 444: WalkDrop,
			1005: WalkAccept, 8080: WalkAccept, 8081: WalkAccept, 8082: WalkDrop, 9999: WalkDrop,
		} {
			if j := l.agree(l.to(rules.TCP, port, outsider)); j.Verdict != want {
				t.Errorf("tcp %d: %s, want %s\n%s", port, j.Verdict, want, tell(j))
			}
		}
		for port, want := range map[uint16]Verdict{52: WalkReject, 53: WalkDrop, 65: WalkDrop} {
			if j := l.agree(l.to(rules.UDP, port, outsider)); j.Verdict != want {
				t.Errorf("udp %d: %s, want %s\n%s", port, j.Verdict, want, tell(j))
			}
		}
		for port, want := range map[uint16]Verdict{22: WalkReject, 8080: WalkReject, 80: WalkAccept} {
			if j := l.agree(l.to(rules.TCP, port, sixOutsider)); j.Verdict != want {
				t.Errorf("tcp %d over IPv6: %s, want %s\n%s", port, j.Verdict, want, tell(j))
			}
		}
		tool(t, "iptables-nft -I INPUT -p tcp --dport 80 -m recent --set --name x -j DROP")
		j := l.walk(l.to(rules.TCP, 80, outsider))
		if j.Verdict != WalkUnknown || !strings.Contains(j.By.String(), `expression match "recent" of iptables`) {
			t.Errorf("%s", tell(j))
		}
	})
}

func TestWalkNotesLegacyTables(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		tool(t, "iptables-legacy -t filter -A INPUT -p tcp --dport 22 -j DROP")
		j, err := dial(t).Walk(rules.Packet{Protocol: rules.TCP, DstPort: 22})
		must(t, err)
		if notes := strings.Join(j.Notes, "\n"); !strings.Contains(notes, "not walked: the tables of iptables-legacy (filter)") {
			t.Errorf("notes: %s", notes)
		}
	})
}
