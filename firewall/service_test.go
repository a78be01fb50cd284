package firewall

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"deadlight/rules"
)

// The addresses of services, as kube-proxy or a load balancer has them: none is an
// address of the host, and a DNAT takes what is routed to them on. Behind the first is
// a container, behind the second this host.
var (
	serviceAt = [2]string{"10.96.7.1", "fd96::7:1"}
	hostedAt  = [2]string{"10.96.7.2", "fd96::7:2"}
)

// services makes a host that publishes ports 7000 to 7099 at its own addresses too,
// and redirects port 7100.
func services(t *testing.T) *wire {
	w := newWire(t, "eth0", "docker0", "lan0")
	w.forwarding()
	for _, prefix := range []string{"172.17.0.0/16", "fd17::/64"} {
		if err := w.Route(netip.MustParsePrefix(prefix), "docker0"); err != nil {
			t.Fatal(err)
		}
	}
	for i, ip := range []string{"ip", "ip6"} {
		guest, host := [2]string{"172.17.0.2:80", "[fd17::2]:80"}[i], [2]string{host4.String() + ":6443", "[" + host6.String() + "]:6443"}[i]
		own := [2]string{host4.String(), host6.String()}[i]
		w.script(fmt.Sprintf(`table %[1]s nat {
			chain pre {
				type nat hook prerouting priority -100;
				%[1]s daddr %[2]s meta l4proto { tcp, udp } dnat to %[3]s
				%[1]s daddr %[4]s meta l4proto { tcp, udp } dnat to %[5]s
				%[1]s daddr %[6]s meta l4proto { tcp, udp } th dport 7000-7099 dnat to %[3]s
				%[1]s daddr %[6]s meta l4proto { tcp, udp } th dport 7100 redirect to :6443
			}
		}`, ip, serviceAt[i], guest, hostedAt[i], host, own))
	}
	return w
}

// A packet that is routed to the address of a service is judged by the whole of the
// rule that lists its port, as one to the host is.
func TestServiceAddress(t *testing.T) {
	t.Parallel()
	w := services(t)
	froms := `from = ["10.0.0.0/8", "2001:db8:f::/48"]`
	both := "\nprotocol = [\"tcp\", \"udp\"]\n"
	w.load(t, "[open.all]\nports = 7000"+both+
		"[open.some]\nports = 7001"+both+froms+"\n"+
		"[open.lan]\nports = 7002"+both+"interfaces = \"lan*\"\n"+
		"[open.but]\nports = 7003"+both+froms+"\nexcept = [\"10.0.0.6\", \"2001:db8:f::6\"]\n"+
		"[open.four]\nports = 7004"+both+"family = \"ipv4\"\n"+
		"[open.old]\nports = 7005"+both+"expires = 2020-01-01T00:00:00Z\n"+
		fmt.Sprintf("[open.here]\nports = 7006%sto = [%q, %q]\n", both, host4, host6)+
		fmt.Sprintf("[open.there]\nports = 7007%sto = [%q, %q, %q, %q]\n", both, serviceAt[0], serviceAt[1], hostedAt[0], hostedAt[1])+
		"[open.vpn]\nprotocol = \"any\"\ninterfaces = \"lan0\"\nfrom = [\"10.9.0.0/16\", \"2001:db8:f:9::/64\"]\n"+
		"[block.bad]\nfrom = [\"10.66.0.0/16\", \"2001:db8:f:66::/64\"]\n"+
		"[block.badport]\nports = 7000"+both+"from = [\"10.67.0.0/16\", \"2001:db8:f:67::/64\"]\n")
	counted := func(name string, n int, list ...sight) {
		t.Helper()
		before := w.counter(name)
		w.expect(t, list...)
		if got := w.counter(name) - before; got != n {
			t.Errorf("%s: counter %s rose by %d, want %d", list[0].what, name, got, n)
		}
	}
	for i := range 2 {
		friend, stranger := [2]string{friend4, friend6}[i], [2]string{stranger4, stranger6}[i]
		excepted := [2]string{"10.0.0.6", "2001:db8:f::6"}[i]
		bad, worse := [2]string{"10.66.0.1", "2001:db8:f:66::1"}[i], [2]string{"10.67.0.1", "2001:db8:f:67::1"}[i]
		peer := [2]string{"10.9.0.1", "2001:db8:f:9::1"}[i]
		guest, own := [2]string{"172.17.0.2", "fd17::2"}[i], [2]string{host4.String(), host6.String()}[i]
		for _, proto := range []rules.Protocol{rules.TCP, rules.UDP} {
			for _, to := range []string{serviceAt[i], hostedAt[i], own} {
				p := func(src string, port uint16) *packet { return w.flow(proto, src, port).at(to) }
				name := func(what string) string { return fmt.Sprintf("%s, %s to %s", what, proto, to) }
				service := to != own
				w.expect(t,
					in(name("listed for everybody"), p(stranger, 7000)),
					in(name("listed for its source"), p(friend, 7001)),
					in(name("by the interface of the rule"), p(stranger, 7002).by("lan0")),
					in(name("not excepted"), p(friend, 7003)),
					sight{name("the family of the rule"), i == 0, p(stranger, 7004)},
					sight{name("to this host only"), !service, p(stranger, 7006)},
					sight{name("to the service only"), service, p(stranger, 7007)},
					in(name("a peer to any port"), p(peer, 7050).by("lan0")),
				)
				refused := []sight{
					out(name("listed for another source"), p(stranger, 7001)),
					out(name("by another interface"), p(stranger, 7002)),
					out(name("excepted"), p(excepted, 7003)),
					out(name("expired"), p(stranger, 7005)),
				}
				blocked := []sight{
					out(name("blocked"), p(bad, 7001)), out(name("blocked, listed for everybody"), p(bad, 7000)), out(name("blocked at a port"), p(worse, 7000)),
				}
				unlisted := []sight{out(name("unlisted"), p(friend, 7051)), out(name("a peer by another interface"), p(peer, 7052))}
				counter := map[string]string{serviceAt[i]: "c_backstop_forward", hostedAt[i]: "c_backstop_in", own: "c_dropped"}[to]
				if service {
					counted("c_rewritten_dropped", len(refused), refused...)
					counted(counter, len(unlisted), unlisted...)
				} else {
					counted(counter, len(refused)+len(unlisted), append(refused, unlisted...)...)
				}
				counted("block_bad", 2, blocked...)
			}
			w.expect(t,
				in("a container to a service", w.flow(proto, guest, 7051).at(serviceAt[i]).by("docker0")),
				out("a container to a service of this host", w.flow(proto, guest, 7001).at(hostedAt[i]).by("docker0")),
				in("a container to one that is listed for everybody", w.flow(proto, guest, 7000).at(hostedAt[i]).by("docker0")),
				in("a container to a published port", w.flow(proto, guest, 7000).by("docker0")),
			)
		}
	}
	if got := w.counter("c_backstop_in") + w.counter("c_backstop_forward"); got != 2*2*2*2 {
		t.Errorf("the backstops dropped %d packets", got)
	}

	w.load(t, "[default]\npublished = \"ignore\"\n[open.some]\nports = 7001"+both+froms+"\n")
	for i, stranger := range []string{stranger4, stranger6} {
		w.expect(t,
			in("ignore: a service, listed for another source", w.tcp(stranger, 7001).at(serviceAt[i])),
			in("ignore: unlisted", w.udp(stranger, 7051).at(serviceAt[i])),
			in("ignore: a service of this host", w.tcp(stranger, 7051).at(hostedAt[i])),
			out("ignore: the host itself", w.tcp(stranger, 22)),
		)
	}
}

// A rule that changes ends what runs to a service, as it does at the host.
func TestServiceRecheck(t *testing.T) {
	t.Parallel()
	w := services(t)
	listed := "[open.some]\nports = 7001\nprotocol = \"udp\"\nfrom = [%q, %q]\n"
	open, shut := fmt.Sprintf(listed, stranger4, stranger6), fmt.Sprintf(listed, friend4, friend6)
	for i, src := range []string{stranger4, stranger6} {
		guest := [2]string{"172.17.0.2", "fd17::2"}[i]
		for _, to := range []string{serviceAt[i], [2]string{host4.String(), host6.String()}[i]} {
			w.load(t, open)
			asks := w.udp(src, 7001).at(to)
			answers := aimed("docker0", guest, rules.UDP, 80, asks.SrcPort).at(src)
			w.expect(t, in("new", asks), in("its answer", answers), in("established", again(asks)))
			w.load(t, shut)
			w.expect(t, out("established, and the rule is not for it any more", again(asks)))
			w.load(t, strings.Replace(shut, "[open", "[default]\nestablished = \"keep\"\n[open", 1))
			w.expect(t, in("kept", again(asks)), out("new", w.udp(src, 7001).at(to)))
			w.load(t, open+fmt.Sprintf("[block.it]\nfrom = %q\n", src))
			w.expect(t, out("established, and blocked", again(asks)))
		}
	}
}

// again is the same packet once more.
func again(p *packet) *packet { q := *p; return &q }

// A limit counts every new flow once, wherever it goes.
func TestServiceLimits(t *testing.T) {
	t.Parallel()
	w := services(t)
	for _, c := range []struct{ name, key string }{
		{"rate of a source", "rate = { limit = \"1/hour\", burst = 4, per = \"source\" }"},
		{"rate of the rule", "rate = { limit = \"1/hour\", burst = 4, per = \"rule\" }"},
		{"connections", "connections = 4"},
	} {
		for i := range 2 {
			src, other := [2]string{stranger4, stranger6}[i], [2]string{friend4, friend6}[i]
			own := [2]string{host4.String(), host6.String()}[i]
			type target struct {
				addr string
				port uint16
			}
			for _, to := range [][2]target{{{serviceAt[i], 7001}, {own, 7001}}, {{own, 7001}, {hostedAt[i], 7100}}, {{own, 7100}, {serviceAt[i], 7001}}} {
				t.Run(fmt.Sprint(c.name, to), func(t *testing.T) {
					w.inHost(func() error { _, err := w.conn.Remove(rules.TableName); return err })
					w.load(t, "[open.few]\nports = [7001, 7100]\nprotocol = \"udp\"\n"+c.key+"\n")
					var list []sight
					for n, to := range []target{to[0], to[0], to[0], to[1], to[0], to[1]} {
						list = append(list, sight{fmt.Sprintf("flow %d to %v", n+1, to), n < 4, w.udp(src, to.port).at(to.addr)})
					}
					list = append(list, sight{"another source", c.name != "rate of the rule", w.udp(other, to[0].port).at(to[0].addr)})
					w.expect(t, list...)
					if n := w.counter("c_backstop_in") + w.counter("c_backstop_forward"); n != 0 {
						t.Errorf("the backstops dropped %d packets", n)
					}
				})
			}
		}
	}
}

// Where a rule names an address of this host, an untracked packet is judged by the
// address that it bears.
func TestUntrackedTo(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	w.script(`table inet raw { chain pre { type filter hook prerouting priority raw; meta l4proto { tcp, udp } notrack; }; }`)
	w.load(t, fmt.Sprintf("[open.here]\nports = 80\nto = [%q, %q]\n[block.there]\nfrom = [%q, %q]\nto = [%q, %q]\n[open.web]\nports = 81\n",
		host4, host6, friend4, friend6, other4, other6))
	for i := range 2 {
		src, friend, other := [2]string{stranger4, stranger6}[i], [2]string{friend4, friend6}[i], [2]string{other4.String(), other6.String()}[i]
		w.expect(t,
			in("to the address", w.tcp(src, 80)), out("to another", w.tcp(src, 80).at(other)),
			in("not blocked at the address", w.tcp(friend, 81)), out("blocked at another", w.tcp(friend, 81).at(other)),
		)
	}
}
