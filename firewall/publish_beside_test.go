package firewall

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Others beside us that publish nothing: who bans addresses, libvirt, and the rest
// of Kubernetes. What coexists with a policy, and what a policy has to name.

// f2b is what fail2ban's nftables action runs when a jail starts, and CrowdSec's
// bouncer builds over netlink, for both families.
const (
	f2bRules = `
add table inet f2b-table
add chain inet f2b-table f2b-chain { type filter hook input priority -1; }
add set inet f2b-table addr-set-sshd { type ipv4_addr; flags interval; }
add rule inet f2b-table f2b-chain tcp dport { 22 } ip saddr @addr-set-sshd reject
add set inet f2b-table addr6-set-sshd { type ipv6_addr; flags interval; }
add rule inet f2b-table f2b-chain tcp dport { 22 } ip6 saddr @addr6-set-sshd reject
`
	crowdsecRules = `
table ip crowdsec {
	set crowdsec-blacklists-cscli { type ipv4_addr; flags timeout; }
	chain crowdsec-chain-input { type filter hook input priority -10; policy accept;
		ip saddr @crowdsec-blacklists-cscli counter drop
	}
	chain crowdsec-chain-forward { type filter hook forward priority -10; policy accept;
		ip saddr @crowdsec-blacklists-cscli counter drop
	}
}
table ip6 crowdsec6 {
	set crowdsec6-blacklists-cscli { type ipv6_addr; flags timeout; }
	chain crowdsec6-chain-input { type filter hook input priority -10; policy accept;
		ip6 saddr @crowdsec6-blacklists-cscli counter drop
	}
	chain crowdsec6-chain-forward { type filter hook forward priority -10; policy accept;
		ip6 saddr @crowdsec6-blacklists-cscli counter drop
	}
}
`
)

// A ban stops what the policy admits, and nothing that bans opens what it closes.
func TestBesideBans(t *testing.T) {
	for _, c := range []struct {
		name, rules  string
		sets         [2]string // of IPv4 and IPv6
		keeper       string
		timeout      string // of an element
		whole        bool   // every port, published ones too
		removeTables []string
	}{
		{"fail2ban", f2bRules, [2]string{"inet f2b-table addr-set-sshd", "inet f2b-table addr6-set-sshd"}, "fail2ban", "", false, []string{"inet f2b-table"}},
		{"crowdsec", crowdsecRules, [2]string{"ip crowdsec crowdsec-blacklists-cscli", "ip6 crowdsec6 crowdsec6-blacklists-cscli"}, "CrowdSec", " timeout 4h", true, []string{"ip crowdsec", "ip6 crowdsec6"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := containers(t)
			policy := "[open.ssh]\nports = [22, 8080]\n"
			w.load(t, policy)
			ours := func() string {
				parts := strings.Split(countedPackets.ReplaceAllString(withoutKnocks(w.run("", "nft", "list", "table", "inet", "deadlight")), ""), "\n\t}\n")
				slices.Sort(parts) // a set that left and came back stands last
				return strings.Join(parts, "\n\t}\n")
			}
			our := ours()
			w.script(c.rules)
			banned := [2]string{"198.51.100.77", "2001:db8:5::77"}
			ban := func(verb, timeout string) {
				for i, set := range c.sets {
					w.run("", "nft", verb, "element "+set+" { "+banned[i]+timeout+" }")
				}
			}
			try := func(when string, admitted bool) {
				t.Helper()
				for i, src := range []string{stranger4, stranger6} {
					w.expect(t,
						sight{when + ": banned at a listed port", admitted, w.tcp(banned[i], 22)},
						sight{when + ": banned at a published port", admitted || !c.whole, w.tcp(banned[i], 8080)},
						out(when+": banned at an unlisted port", w.tcp(banned[i], 23)),
						out(when+": banned at an unlisted published port", w.tcp(banned[i], 8081)),
						in(when+": a stranger at a listed port", w.tcp(src, 22)),
						in(when+": a stranger at a published port", w.tcp(src, 8080)),
						out(when+": a stranger at an unlisted port", w.tcp(src, 23)),
						out(when+": a stranger at an unlisted published port", w.tcp(src, 8081)),
					)
				}
			}
			try("no ban", true)
			ban("add", c.timeout)
			try("banned", false)
			rs := ruleset(t, policy)
			var found []Interference
			w.inHost(func() (err error) {
				found, err = w.conn.Interference(rs, noLegacy())
				return err
			})
			named := 0
			for _, i := range found {
				for _, table := range c.removeTables {
					if strings.Contains(i.Where, "table "+table+",") {
						named++
						if i.Severity != Note || !strings.Contains(i.Fact, "rules of "+c.keeper) {
							t.Errorf("%s: %+v", i.Severity, i)
						}
					}
				}
			}
			if named == 0 {
				t.Errorf("not listed: %+v", found)
			}
			// We write nothing of its.
			their := w.run("", "nft", "list", "table "+c.removeTables[0])
			w.load(t, policy+"[open.more]\nports = 443\n")
			if now := w.run("", "nft", "list", "table "+c.removeTables[0]); countedPackets.ReplaceAllString(withoutExpiry(now), "") != countedPackets.ReplaceAllString(withoutExpiry(their), "") {
				t.Errorf("apply changed its table:\n%s\nwas\n%s", now, their)
			}
			w.load(t, policy)
			ban("delete", "")
			try("unbanned", true)
			for _, table := range c.removeTables {
				w.run("", "nft", "delete", "table "+table)
			}
			w.script(c.rules)
			ban("add", c.timeout)
			try("banned after a restart", false)
			w.apply(rs)
			if got := ours(); got != our {
				t.Errorf("it changed our table:\n%s\nwas\n%s", got, our)
			}
		})
	}
}

// withoutExpiry leaves out how long elements still live.
func withoutExpiry(listing string) string { return timeout.ReplaceAllString(listing, "") }

// libvirt rejects what is routed to guests by itself; a port forward that a hook
// script makes is judged like any other, and its resolver has to be opened.
func TestBesideLibvirt(t *testing.T) {
	for _, file := range []string{"libvirt.nft", "libvirt.iptables"} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			e := engine{file: file, bridge: "virbr0", guest4: "192.168.122.10", guest6: "fd12::10", net4: "192.168.122.0/24", net6: "fd12::/64"}
			w := newEngine(t, e)
			w.script(`
				table ip forwards { chain pre { type nat hook prerouting priority -100; iifname "eth0" tcp dport { 2222, 2223 } dnat to 192.168.122.10:22; }; }
				table ip6 forwards { chain pre { type nat hook prerouting priority -100; iifname "eth0" tcp dport { 2222, 2223 } dnat to [fd12::10]:22; }; }`)
			// What a hook script opens for its forward, ahead of libvirt's reject.
			if file == "libvirt.nft" {
				w.run("", "nft", "insert rule ip libvirt_network guest_input ip daddr 192.168.122.10 tcp dport 22 ct status dnat accept")
				w.run("", "nft", "insert rule ip6 libvirt_network guest_input ip6 daddr fd12::10 tcp dport 22 ct status dnat accept")
			} else {
				w.run("", "iptables-nft", "-I", "FORWARD", "-d", "192.168.122.10", "-p", "tcp", "--dport", "22", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT")
				w.run("", "ip6tables-nft", "-I", "FORWARD", "-d", "fd12::10", "-p", "tcp", "--dport", "22", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT")
			}
			w.join("virbr0", netip.MustParseAddr("ff02::1:2"))
			const listed = "[open.vm]\nports = 2222\n"
			for _, v4 := range []bool{true, false} {
				src, far := stranger4, "203.0.113.9"
				if !v4 {
					src, far = stranger6, "2001:db8:9::9"
				}
				guest := func(p *packet) *packet { return p.by("virbr0") }
				dhcp := aimed("virbr0", "0.0.0.0", rules.UDP, 68, 67).at("255.255.255.255")
				if !v4 {
					dhcp = aimed("virbr0", "fe80::10", rules.UDP, 546, 547).at("ff02::1:2")
				}
				again := func() *packet { p := *dhcp; return &p }
				w.apply(ruleset(t, listed))
				w.expect(t,
					in("a listed forward", w.tcp(src, 2222)), out("an unlisted forward", w.tcp(src, 2223)),
					out("routed to a guest", w.tcp(src, 80).at(e.guest(v4))),
					in("a guest to the world", guest(w.tcp(e.guest(v4), 443)).at(far)),
					out("a guest to the host", guest(w.tcp(e.guest(v4), 22))),
					out("a guest to its resolver", guest(w.udp(e.guest(v4), 53))),
					out("a guest to its DHCP server", again()),
				)
				w.apply(ruleset(t, listed+"[open.guest-dns]\nports = 53\nprotocol = [\"tcp\", \"udp\"]\ninterfaces = \"virbr*\"\n[open.guest-dhcp]\nports = [67, 547]\nprotocol = \"udp\"\ninterfaces = \"virbr*\"\n"))
				w.expect(t,
					in("opened: a guest to its resolver", guest(w.udp(e.guest(v4), 53))), in("opened: over TCP", guest(w.tcp(e.guest(v4), 53))),
					in("opened: a guest to its DHCP server", again()),
					out("opened: not to a stranger", w.udp(src, 53)), out("opened: a guest to the host", guest(w.tcp(e.guest(v4), 22))),
				)
			}
			rs := ruleset(t, listed+"[open.web]\nports = 80\n")
			w.apply(rs)
			w.inHost(func() error {
				found, err := w.conn.Interference(rs, noLegacy())
				for _, i := range found {
					if !strings.Contains(i.Where, "table inet witness") && i.Severity != Note {
						t.Errorf("%s: %+v", i.Severity, i)
					}
				}
				return err
			})
			// Without libvirt's own rules guests are reached by routing, unless [published]
			// names their bridge.
			for _, table := range []string{"ip", "ip6"} {
				if name := map[string]string{"libvirt.nft": "libvirt_network", "libvirt.iptables": "filter"}[file]; name != "" {
					w.run("", "nft", "flush table "+table+" "+name)
				}
			}
			for _, v4 := range []bool{true, false} {
				src := map[bool]string{true: stranger4, false: stranger6}[v4]
				w.apply(ruleset(t, listed))
				w.expect(t, in("flushed: routed to a guest", w.tcp(src, 80).at(e.guest(v4))))
				w.apply(ruleset(t, listed+"[published]\ninterfaces = [\"virbr*\"]\n"))
				w.expect(t, out("flushed and named: routed to a guest", w.tcp(src, 80).at(e.guest(v4))), in("flushed and named: a listed forward", w.tcp(src, 2222)))
			}
		})
	}
}

// join makes the host take packets to a multicast address, as a server's socket does.
func (w *wire) join(link string, group netip.Addr) {
	w.Helper()
	w.inHost(func() error {
		on, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		w.Cleanup(func() { unix.Close(fd) })
		return unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: group.As16(), Interface: uint32(on.Index)})
	})
}

// What Kubernetes needs of a policy beyond its NodePorts, and what it cannot have.
func TestBesideKubernetes(t *testing.T) {
	for _, e := range engines() {
		if e.cluster[0] == "" {
			continue
		}
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			w := newEngine(t, e, "flannel.1", "cali1a2b")
			for _, r := range []struct{ to, by string }{{"10.244.99.0/24", "flannel.1"}, {"fd44:0:0:99::/64", "flannel.1"}, {"10.244.98.0/24", "cali1a2b"}, {"fd44:0:0:98::/64", "cali1a2b"}} {
				if err := w.Route(netip.MustParsePrefix(r.to), r.by); err != nil {
					t.Fatal(err)
				}
			}
			for i, v4 := range []bool{true, false} {
				src := [2]string{stranger4, stranger6}[i]
				service := e.cluster[i]
				far, near := [2]string{"10.244.99.5", "fd44:0:0:99::5"}[i], [2]string{"10.244.98.5", "fd44:0:0:98::5"}[i]
				pod := func(port uint16) *packet { return w.tcp(e.guest(v4), port).by(e.bridge) }
				w.apply(ruleset(t, e.listing()))
				w.expect(t,
					in("a pod to a service", pod(80).at(service)),
					out("a pod to the API server of this node, which answers at 6443", pod(443).at(service)),
					out("a stranger to a service, by routing", w.tcp(src, 80).at(service)),
					out("the kubelet", w.tcp(src, 10250)), out("VXLAN", w.udp(src, 8472)),
					out("a pod of another node", w.tcp(far, 80).by("flannel.1").at(e.guest(v4))),
					in("a pod to one of another node", pod(80).at(far)),
					out("a pod behind an interface that [published] does not name, to a service", w.tcp(near, 80).by("cali1a2b").at(service)),
					in("a stranger to a pod behind it, by routing", w.tcp(src, 80).at(near)),
				)
				w.apply(ruleset(t, e.listing()+`
[open.nodes]
ports = [10250]
from = ["192.0.2.0/24", "2001:db8:f::/48"]
[open.vxlan]
ports = 8472
protocol = "udp"
from = ["192.0.2.0/24", "2001:db8:f::/48"]
[open.pods]
protocol = "any"
interfaces = ["cni*", "cali*", "flannel*"]
[published]
interfaces = ["cni*", "cali*", "flannel*"]
`))
				node := [2]string{"192.0.2.9", "2001:db8:f::9"}[i]
				w.expect(t,
					in("named: a pod to a service", pod(80).at(service)),
					in("named: a pod to the API server of this node", pod(443).at(service)),
					in("named: a pod to this node", pod(10250)),
					in("named: the kubelet, from a node", w.tcp(node, 10250)), out("named: the kubelet, from a stranger", w.tcp(src, 10250)),
					in("named: VXLAN, from a node", w.udp(node, 8472)), out("named: VXLAN, from a stranger", w.udp(src, 8472)),
					in("named: a pod of another node", w.tcp(far, 80).by("flannel.1").at(e.guest(v4))),
					in("named: a pod behind cali* to a service", w.tcp(near, 80).by("cali1a2b").at(service)),
					out("named: a stranger to a pod behind it", w.tcp(src, 80).at(near)),
					out("named: a stranger to a service, by routing", w.tcp(src, 80).at(service)),
					in("named: a listed NodePort", w.tcp(src, e.listed)), out("named: an unlisted NodePort", w.tcp(src, e.unlisted)),
				)
				// The address of a service is not one of this host, and still its sources are
				// those of the rule that lists the port.
				w.apply(ruleset(t, e.listing()+"[open.web]\nports = [80, 443]\nfrom = [\"192.0.2.0/24\", \"2001:db8:f::/48\"]\n"))
				w.expect(t,
					out("a stranger to a port that is listed for others", w.tcp(src, 80)),
					out("the same at the address of a service", w.tcp(src, 80).at(service)),
					out("the same at that of the API server", w.tcp(src, 443).at(service)),
					in("a node at the address of a service", w.tcp(node, 80).at(service)),
					in("a node at that of the API server", w.tcp(node, 443).at(service)),
					in("a pod to a service", pod(80).at(service)),
					out("a pod to the API server of this node, which is listed for others", pod(443).at(service)),
				)
			}
		})
	}
}
