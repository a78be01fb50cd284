package firewall

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"text/template"

	"deadlight/rules"
)

// engine is a program that publishes ports of its guests: how its rules look, and
// what they let through by themselves. The rules in testdata/engines have the
// shape that its own documents and sources show, once for each family.
type engine struct {
	name             string
	file             string // of testdata/engines; "": it makes no rules
	bridge           string // where its guests are
	guest4, guest6   string
	net4, net6       string
	cluster          [2]string // addresses of services, of kube-proxy alone
	listed, unlisted uint16    // ports of the host that it publishes
	// local is where it sends published ports on the host itself; 0: to the guest.
	local uint16
	// proxied says that what a guest asks of a published port goes to a proxy on the
	// host, not to the guest.
	proxied bool
	// shut says that it lets nobody route to a guest past the published ports.
	shut bool
}

func engines() []engine {
	return []engine{
		{name: "docker by iptables-nft", file: "docker-29.iptables", bridge: "docker0", guest4: "172.17.0.2", guest6: "fd17::2", net4: "172.17.0.0/16", net6: "fd17::/64", listed: 8080, unlisted: 8081, proxied: true, shut: true},
		{name: "docker by nftables", file: "docker-29.nft", bridge: "br-d29a", guest4: "172.18.0.2", guest6: "fd18::2", net4: "172.18.0.0/16", net6: "fd18::/64", listed: 8180, unlisted: 8181, proxied: true, shut: true},
		{name: "podman by iptables-nft", file: "netavark.iptables", bridge: "podman0", guest4: "10.88.0.2", guest6: "fd88::2", net4: "10.88.0.0/16", net6: "fd88::/64", listed: 8280, unlisted: 8281},
		{name: "podman by nftables", file: "netavark.nft", bridge: "podman1", guest4: "10.89.0.2", guest6: "fd89::2", net4: "10.89.0.0/24", net6: "fd89::/64", listed: 8380, unlisted: 8381},
		{name: "NodePort by iptables-nft", file: "kube-proxy.iptables", bridge: "cni0", guest4: "10.244.0.2", guest6: "fd44::2", net4: "10.244.0.0/16", net6: "fd44::/64", cluster: [2]string{"10.96.0.1", "fd96::1"}, listed: 30080, unlisted: 30081},
		{name: "NodePort by nftables", file: "kube-proxy.nft", bridge: "cni1", guest4: "10.245.0.2", guest6: "fd45::2", net4: "10.245.0.0/16", net6: "fd45::/64", cluster: [2]string{"10.97.0.1", "fd97::1"}, listed: 30180, unlisted: 30181},
		{name: "REDIRECT", file: "redirect.nft", listed: 8480, unlisted: 8481, local: 8488},
		{name: "docker-proxy", listed: 8580, unlisted: 8581, proxied: true},
	}
}

// guest is that of a family.
func (e engine) guest(v4 bool) string {
	if v4 {
		return e.guest4
	}
	return e.guest6
}

// text is what the engine writes for a family.
func (e engine) text(t failer, v4 bool) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/engines", e.file))
	if err != nil {
		t.Fatalf("%v", err)
	}
	f := struct {
		IP, Proto, Addr, Bridge, Guest, Net, To, API, Loopback, Localhost, Multicast, Host, Cluster string
		Listed, Unlisted, Local                                                                     uint16
		Ports                                                                                       []uint16
	}{
		"ip", "ipv4", "ipv4_addr", e.bridge, e.guest4, e.net4, e.guest4 + ":80", host4.String() + ":6443", "127.0.0.0/8", "127.0.0.1", "224.0.0.0/4", host4.String(), e.cluster[0],
		e.listed, e.unlisted, e.local, []uint16{e.listed, e.unlisted},
	}
	if !v4 {
		f.IP, f.Proto, f.Addr, f.Guest, f.Net, f.To, f.API = "ip6", "ipv6", "ipv6_addr", e.guest6, e.net6, "["+e.guest6+"]:80", "["+host6.String()+"]:6443"
		f.Loopback, f.Localhost, f.Multicast, f.Host, f.Cluster = "::1/128", "::1", "ff00::/8", host6.String(), e.cluster[1]
	}
	var out strings.Builder
	tmpl, err := template.New(e.file).Parse(string(b))
	if err == nil {
		err = tmpl.Execute(&out, f)
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	return out.String()
}

// start makes an engine's routes and loads its rules, as it does when it starts.
func (w *wire) start(e engine) {
	w.Helper()
	for _, v4 := range []bool{true, false} {
		if e.bridge != "" {
			prefix := map[bool]string{true: e.net4, false: e.net6}[v4]
			if err := w.Route(netip.MustParsePrefix(prefix), e.bridge); err != nil {
				w.Fatalf("%v", err)
			}
		}
		if e.file != "" {
			w.run(e.text(w, v4), e.tool(v4)...)
		}
	}
}

// tool loads what an engine writes. --noflush leaves the chains of others alone,
// as engines do.
func (e engine) tool(v4 bool) []string {
	switch {
	case strings.HasSuffix(e.file, ".nft"):
		return []string{"nft", "-f", "-"}
	case v4:
		return []string{"iptables-nft-restore", "--noflush"}
	}
	return []string{"ip6tables-nft-restore", "--noflush"}
}

// newEngine makes a router with one engine, and more interfaces.
func newEngine(t failer, e engine, more ...string) *wire {
	links := append([]string{"eth0"}, more...)
	if e.bridge != "" {
		links = append(links, e.bridge)
	}
	w := newWire(t, links...)
	w.forwarding()
	w.start(e)
	return w
}

// listing is a policy that lists one of an engine's two ports.
func (e engine) listing() string { return fmt.Sprintf("[open.published]\nports = %d\n", e.listed) }

// What engines publish is judged by the port of the host, over both families.
func TestPublish(t *testing.T) {
	for _, e := range engines() {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			w := newEngine(t, e)
			both := func(what string, through bool, make func(v4 bool) *packet) []sight {
				return []sight{{what + ", IPv4", through, make(true)}, {what + ", IPv6", through, make(false)}}
			}
			from := func(port uint16) func(v4 bool) *packet {
				return func(v4 bool) *packet {
					if v4 {
						return w.tcp(stranger4, port)
					}
					return w.tcp(stranger6, port)
				}
			}
			routed := func(port uint16) func(v4 bool) *packet {
				return func(v4 bool) *packet { return from(port)(v4).at(e.guest(v4)) }
			}
			hairpin := func(port uint16) func(v4 bool) *packet {
				return func(v4 bool) *packet { return w.tcp(e.guest(v4), port).by(e.bridge) }
			}
			guests := e.bridge != ""

			// Without a policy all of it is open: else the silence below would prove nothing.
			list := append(both("no policy: published", true, from(e.listed)), both("no policy: published too", true, from(e.unlisted))...)
			if guests {
				list = append(list, both("no policy: routed to a guest", !e.shut, routed(80))...)
				list = append(list, both("no policy: a guest asks a published port", true, hairpin(e.unlisted))...)
			}
			w.expect(t, list...)

			w.load(t, e.listing())
			list = append(both("listed", true, from(e.listed)), both("unlisted", false, from(e.unlisted))...)
			list = append(list, both("the host's own port", false, from(22))...)
			if e.local != 0 {
				list = append(list, both("the port that it is sent to", false, from(e.local))...)
			}
			if guests {
				list = append(list, both("routed to a guest", false, routed(80))...)
				list = append(list, both("routed to a guest, a port of a listed number", false, routed(e.listed))...)
				list = append(list, both("a guest asks a listed port", true, hairpin(e.listed))...)
				list = append(list, both("a guest asks an unlisted port", false, hairpin(e.unlisted))...)
				list = append(list, both("a guest asks the host itself", false, hairpin(22))...)
				list = append(list, both("a guest asks the world", true, func(v4 bool) *packet {
					return hairpin(443)(v4).at(map[bool]string{true: "203.0.113.9", false: "2001:db8:9::9"}[v4])
				})...)
			}
			w.expect(t, list...)

			if guests {
				w.load(t, e.listing()+fmt.Sprintf("[open.guests]\nports = [22, %d]\ninterfaces = %q\n", e.unlisted, e.bridge))
				list = both("opened to guests: the host itself", true, hairpin(22))
				list = append(list, both("opened to guests: a published port", true, hairpin(e.unlisted))...)
				list = append(list, both("opened to guests: not to strangers", false, from(e.unlisted))...)
				list = append(list, both("opened to guests: nor the host itself", false, from(22))...)
				w.expect(t, list...)
			}

			w.load(t, "[default]\npublished = \"ignore\"\n"+e.listing())
			// A socket of a proxy is a port of the host like others.
			sentOn := e.file != ""
			list = append(both("ignore: listed", true, from(e.listed)), both("ignore: unlisted", sentOn, from(e.unlisted))...)
			list = append(list, both("ignore: the host's own port", false, from(22))...)
			if guests {
				list = append(list, both("ignore: routed to a guest", !e.shut, routed(80))...)
				list = append(list, both("ignore: a guest asks an unlisted port", !e.proxied, hairpin(e.unlisted))...)
			}
			w.expect(t, list...)
		})
	}
}

// Whatever an engine does later changes nothing of ours, and whatever we do
// nothing of its.
func TestPublishReload(t *testing.T) {
	for _, e := range engines() {
		if e.file == "" {
			continue
		}
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			w := newEngine(t, e)
			theirs := func() string {
				return withoutOurs(countedPackets.ReplaceAllString(w.run("", "nft", "list", "ruleset"), ""))
			}
			ours := func() string {
				return countedPackets.ReplaceAllString(withoutKnocks(w.run("", "nft", "-a", "list", "table", "inet", "deadlight")), "")
			}
			their := theirs()
			if !strings.Contains(their, "dnat") && !strings.Contains(their, "DNAT") && !strings.Contains(their, "redirect") {
				t.Fatalf("its rules do not show:\n%s", their)
			}
			w.load(t, e.listing())
			our := ours()
			if got := theirs(); got != their {
				t.Errorf("apply changed what is not ours:\n%s\nwas\n%s", got, their)
			}
			var is *Snapshot
			w.inHost(func() (err error) { is, err = w.conn.Snapshot(rules.TableName); return err })
			for _, again := range []string{"its reload", "its restart"} {
				if again == "its restart" {
					for _, table := range e.tables() {
						w.run("", "nft", "flush table "+table)
					}
				}
				for _, v4 := range []bool{true, false} {
					w.run(e.text(w, v4), e.tool(v4)...)
				}
				if got := ours(); got != our {
					t.Errorf("%s changed our table:\n%s\nwas\n%s", again, got, our)
				}
				w.inHost(func() error {
					now, err := w.conn.Snapshot(rules.TableName)
					if d := Diff(is, now); len(d) > 0 {
						t.Errorf("%s changed our table: %v", again, d)
					}
					return err
				})
				w.expect(t, in("listed after "+again, w.tcp(stranger4, e.listed)), out("unlisted after "+again, w.tcp(stranger6, e.unlisted)))
			}
			their = theirs()
			w.load(t, e.listing()+"[open.more]\nports = 443\n")
			w.inHost(func() error { _, err := w.conn.Remove(rules.TableName); return err })
			if got := theirs(); got != their {
				t.Errorf("apply and remove changed what is not ours:\n%s\nwas\n%s", got, their)
			}
			w.expect(t, in("unlisted, when we are gone", w.tcp(stranger4, e.unlisted)))
		})
	}
}

// Beside engines status and plan have nothing to complain of.
func TestPublishInterference(t *testing.T) {
	for _, e := range engines() {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			w := newEngine(t, e)
			rs := ruleset(t, e.listing()+"[open.web]\nports = [80, 443]\n")
			w.apply(rs)
			var found []Interference
			w.inHost(func() (err error) {
				found, err = w.conn.Interference(rs, noLegacy())
				return err
			})
			for _, i := range found {
				if !strings.Contains(i.Where, "table inet witness") && i.Severity != Note {
					t.Errorf("%s %s: %+v", i.Severity, i.Where, i)
				}
			}
		})
	}
}

// tables are where an engine's rules are.
func (e engine) tables() []string {
	switch e.file {
	case "docker-29.nft":
		return []string{"ip docker-bridges", "ip6 docker-bridges"}
	case "kube-proxy.nft":
		return []string{"ip kube-proxy", "ip6 kube-proxy"}
	case "netavark.nft":
		return []string{"inet netavark"}
	case "redirect.nft":
		return []string{"ip nat", "ip6 nat"}
	}
	return []string{"ip filter", "ip6 filter", "ip nat", "ip6 nat"}
}

// withoutOurs leaves our table and the witness out of a listing.
func withoutOurs(listing string) string {
	parts := strings.SplitAfter(listing, "\n}\n")
	return strings.Join(slices.DeleteFunc(parts, func(p string) bool {
		return strings.HasPrefix(p, "table inet deadlight") || strings.HasPrefix(p, "table inet witness")
	}), "")
}
