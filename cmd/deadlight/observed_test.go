package main

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// What knocked where somebody listens is proposed, to those who knocked; what met
// nobody is told; and the whole gives no warning.
func TestObserved(t *testing.T) {
	at := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	knock := func(src string, p rules.Protocol, port uint16, packets uint64) firewall.Knock {
		k := firewall.Knock{Protocol: p, Port: port, Packets: packets, Last: at}
		if src != "" {
			k.Source = netip.MustParseAddr(src)
		}
		return k
	}
	k := &firewall.Knocks{Counted: true, Memory: 8 * 24 * time.Hour}
	k.Ports = []firewall.Knock{
		knock("", rules.TCP, 8443, 900), knock("", rules.TCP, 5432, 40), knock("", rules.TCP, 23, 12), knock("", rules.TCP, 6379, 3),
		knock("", rules.UDP, 161, 2), knock("", rules.TCP, 22, 2), knock("", rules.SCTP, 5432, 1), knock("", rules.TCP, 8080, 1),
	}
	for i := range 40 {
		k.Sources = append(k.Sources, knock(fmt.Sprintf("198.51.100.%d", i), rules.TCP, 8443, 20))
	}
	k.Sources = append(k.Sources, knock("10.0.0.7", rules.TCP, 5432, 30), knock("2001:db8::7", rules.TCP, 5432, 10), knock("203.0.113.66", rules.TCP, 23, 12),
		knock("10.0.0.8", rules.TCP, 6379, 3), knock("fe80::1", rules.UDP, 161, 2), knock("10.0.0.9", rules.TCP, 22, 2), knock("10.0.0.9", rules.TCP, 8080, 1))
	v4, v6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	of := func(p rules.Protocol, a netip.Addr, port uint16, comm string) listener {
		return listener{Protocol: p, Addr: a, Port: port, PID: 7, Comm: comm, Inode: 9}
	}
	fw := &fakeFirewall{nat: []fakeRule{{protocol: rules.TCP, port: 8080}}}
	draw := func(full bool) string {
		t.Helper()
		k.SourcesFull = full
		s := &starter{
			sockets: []listener{
				of(rules.TCP, v6, 8443, "java\n[open.evil]"), of(rules.TCP, v4, 5432, "postgres"), of(rules.TCP, netip.MustParseAddr("127.0.0.1"), 6379, "redis"),
				of(rules.UDP, v4, 161, "snmpd"), of(rules.TCP, v4, 22, "sshd"),
			},
			units: map[int]string{}, now: at, asked: inquiry{ask: fw.ask}, runs: fw.runs(),
			nics: []nic{{name: "eth0", addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}},
		}
		text, err := s.observed(k)
		if err != nil {
			t.Fatal(err)
		}
		if p, problems := rules.Parse("policy.toml", []byte(text), nil); p == nil || len(problems) > 0 {
			t.Fatalf("%v\n%s", problems, text)
		}
		return text
	}
	text := draw(false)
	for _, want := range []string{
		"# WARNING: an attacker may have knocked too.",
		"# A port or a source that was silent for 8 days is forgotten.\nversion = 1\n",
		"ports = 8443\nfrom = [\"0.0.0.0/0\", \"::/0\"] # everyone",
		"# 5432/tcp: 40 packets, the last 2026-11-20 12:00:00 UTC\n# postgres listens at 0.0.0.0:5432\n# from 10.0.0.7 (30), 2001:db8::7 (10)\n[open.postgres]\nports = 5432\nfrom = [\"10.0.0.7\", \"2001:db8::7\"]\n",
		"[open.snmpd]\nports = 161\nprotocol = \"udp\"\nfrom = [\"fe80::1\"]\nfamily = \"ipv6\"\n",
		"[open.ssh]\nports = 22\nfrom = [\"10.0.0.9\"]\nfamily = \"ipv4\"\n",
		"[open.published]\nports = 8080\nfrom = [\"10.0.0.9\"]\nfamily = \"ipv4\"\n",
		"\n# Knocked at, but nobody listens there:\n#   23/tcp: 12 packets, the last 2026-11-20 12:00:00 UTC, from 203.0.113.66 (12)\n",
		"#   6379/tcp: 3 packets, the last 2026-11-20 12:00:00 UTC, from 10.0.0.8 (3), but redis listens on loopback only\n",
		"#   5432/sctp: 1 packet, the last 2026-11-20 12:00:00 UTC, but whether anybody listens is not known of SCTP\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it lacks %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "\n[open.evil]") {
		t.Errorf("a name left its comment:\n%s", text)
	}
	// A list of sources that has no room for all must not be taken for all.
	if text := draw(true); strings.Contains(text, `"10.0.0.7"`) || !strings.Contains(text, "# The list of sources is full: others may have come.\n") {
		t.Errorf("sources named though others may have come:\n%s", text)
	}
}
