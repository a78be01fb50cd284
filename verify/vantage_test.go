package verify

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// furnished is a throw-away host with a policy in force and listeners, to be looked
// at from inside: eth0 has the default routes, wg0 a network of its own.
func furnished(t *testing.T, text string, rpFilter string) *World {
	t.Helper()
	w, err := NewWorld(WorldConfig{Host4: netip.MustParseAddr("203.0.113.10"), Host6: netip.MustParseAddr("2001:db8:77::10"), Links: []string{"eth0", "wg0"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := w.Host(func() error {
		wg0, err := netlink.LinkByName("wg0")
		if err != nil {
			return err
		}
		for _, a := range []string{"10.8.0.1/24", "2001:db8:8::1/64"} {
			addr, err := netlink.ParseAddr(a)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(wg0, addr); err != nil {
				return err
			}
		}
		for _, conf := range []string{"all", "eth0", "wg0"} {
			if err := setNetSysctl("ipv4/conf/"+conf+"/rp_filter", rpFilter); err != nil {
				return err
			}
		}
		return errors.Join(loadText(t, text)(), awaitAddresses())
	}); err != nil {
		t.Fatal(err)
	}
	ports := []uint16{22, 25, 53, 80, 443, 3306, 7000, 8080, 9000, 9005}
	l, err := Listen(w.Host, ports, ports)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return w
}

// asItIs is what a host holds that a vantage could change, without counters.
func asItIs(t *testing.T, w *World) string {
	t.Helper()
	var out bytes.Buffer
	for _, argv := range []string{
		"ip -d link", "ip addr", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all",
		"ip neigh", "tc -d qdisc show", "tc filter show dev eth0 ingress", "tc filter show dev eth0 egress", "nft list ruleset",
	} {
		out.WriteString("# " + argv + "\n")
		if err := w.Command(t.Context(), strings.Fields(argv), &out, &out); err != nil {
			t.Fatalf("%s: %v\n%s", argv, err, out.String())
		}
	}
	// What is counted of the probes is not the host's: a command puts it back.
	text := regexp.MustCompile(`(set knocks[46]? \{[^}]*?)\n\t\telements = \{[^}]*\}`).ReplaceAllString(out.String(), "$1")
	return regexp.MustCompile(`packets \d+ bytes \d+| expires \w+| \w+ sec$`).ReplaceAllString(text, "")
}

const bound = host + `
[open.front]
ports = 7000
interfaces = "eth0"
`

func lookAt(t *testing.T, w *World, cfg HostConfig) *Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cfg.Host = w.Host
	if cfg.Ports.TCP == nil {
		few := allPorts()[:10000]
		cfg.Ports = Ports{few, few}
	}
	r, err := LookAtHost(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Rules for interfaces are judged by the interface, whatever the host thinks of
// where its answers leave, and the host is as before.
func TestVantageJudgesByInterface(t *testing.T) {
	rs := compileText(t, bound)
	for _, rpFilter := range []string{"0", "1", "2"} {
		t.Run("rp_filter="+rpFilter, func(t *testing.T) {
			w := furnished(t, compiled(t, rs), rpFilter)
			before := asItIs(t, w)
			r := lookAt(t, w, HostConfig{Rules: rs})
			if after := asItIs(t, w); after != before {
				t.Errorf("the host was\n%s\nand is\n%s", before, after)
			}
			if r.Verdict != Pass || !r.exact {
				t.Fatalf("verdict %s, exact %v:\n%s", r.Verdict, r.exact, text(t, r))
			}
			want := map[string]string{"tcp4": "53,80,443,7000", "tcp6": "25,53,80,443,7000", "udp4": "53", "udp6": "53"}
			for k, open := range want {
				if s := r.States[k]; s.Open != open || s.Closed != "" || s.Unknown != "" {
					t.Errorf("%s: %+v, want open %s", k, s, open)
				}
			}
			// The view by wg0 shows its opening over both families, that by eth0 does not.
			seen := map[string]bool{}
			for _, v := range r.Restrictions {
				if v.Open != "" {
					seen[v.Rule+" "+v.Interface+" "+map[bool]string{true: "4", false: "6"}[netip.MustParseAddr(v.From).Is4()]] = true
				}
			}
			for _, s := range []string{"admin wg0 4", "admin wg0 6", "front eth0 4", "front eth0 6", "ssh eth0 4", "ssh eth0 6"} {
				if !seen[s] {
					t.Errorf("not seen open: %s\n%s", s, text(t, r))
				}
			}
			for _, s := range []string{"admin eth0 4", "admin eth0 6", "front wg0 4", "front wg0 6"} {
				if seen[s] {
					t.Errorf("seen open: %s", s)
				}
			}
		})
	}
}

// A ruleset that takes one interface for another is found out.
func TestVantageFindsHoles(t *testing.T) {
	rs := compileText(t, bound)
	good := compiled(t, rs)
	for _, rpFilter := range []string{"0", "1"} {
		for name, c := range map[string]struct{ add, want string }{
			"by eth0": {"tcp dport 9005 iifname eth0 accept", "9005/tcp open by eth0"},
			"by wg0":  {"tcp dport 7000 iifname wg0 accept", "7000/tcp open by wg0"},
			"udp":     {"udp dport 161 iifname eth0 accept", "161/udp closed by eth0"},
		} {
			t.Run(name+", rp_filter="+rpFilter, func(t *testing.T) {
				w := furnished(t, good+"insert rule inet deadlight gate "+c.add+"\ninsert rule inet deadlight backstop_in "+c.add+"\n", rpFilter)
				r := lookAt(t, w, HostConfig{Rules: rs})
				if r.Verdict != Fail {
					t.Fatalf("verdict %s:\n%s", r.Verdict, text(t, r))
				}
				for _, f := range r.Findings {
					if got := (rules.PortRange{Lo: f.Port, Hi: f.Port}).String() + "/" + f.Protocol + " " + f.Observed.String() + " by " + f.Interface; got != c.want {
						t.Errorf("finding %s, want only %s", got, c.want)
					}
				}
			})
		}
	}
}

// What others have at the interface stays theirs, and what they drop there is a path
// that is not proven, not a filter.
func TestVantageForeignQdisc(t *testing.T) {
	rs := compileText(t, bound)
	for _, foreign := range []string{
		"tc qdisc add dev eth0 clsact",
		"tc qdisc add dev eth0 ingress",
		"tc qdisc add dev eth0 clsact; tc filter add dev eth0 egress protocol all prio 7 u32 match u32 0 0 action mirred egress redirect dev lo",
	} {
		t.Run(foreign, func(t *testing.T) {
			w := furnished(t, compiled(t, rs), "1")
			if err := w.Command(t.Context(), []string{"sh", "-c", foreign}, os.Stderr, os.Stderr); err != nil {
				t.Fatal(err)
			}
			before := asItIs(t, w)
			if r := lookAt(t, w, HostConfig{Rules: rs}); r.Verdict != Pass {
				t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
			}
			if after := asItIs(t, w); after != before {
				t.Errorf("the host was\n%s\nand is\n%s", before, after)
			}
		})
	}
	t.Run("drops what comes in", func(t *testing.T) {
		w := furnished(t, compiled(t, rs), "1")
		dead := "tc qdisc add dev eth0 ingress; tc filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev lo"
		if err := w.Command(t.Context(), []string{"sh", "-c", dead}, os.Stderr, os.Stderr); err != nil {
			t.Fatal(err)
		}
		few := allPorts()[:100]
		if r := lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}}); r.Verdict != Inconclusive || r.Counts.Filtered != 0 {
			t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
		}
	})
}

// An interrupted run leaves nothing behind.
func TestVantageInterrupted(t *testing.T) {
	rs := compileText(t, bound)
	w := furnished(t, compiled(t, rs), "1")
	before := asItIs(t, w)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := LookAtHost(ctx, HostConfig{Host: w.Host, Rules: rs, Ports: Ports{allPorts(), nil}, Progress: func(sent, _ uint64) {
		if sent > 1000 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if after := asItIs(t, w); after != before {
		t.Errorf("the host was\n%s\nand is\n%s", before, after)
	}
}

// Two verifications of one host would take each other's packets.
func TestVantageIsAlone(t *testing.T) {
	rs := compileText(t, bound)
	w := furnished(t, compiled(t, rs), "0")
	began := make(chan struct{})
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		first := true
		_, err := LookAtHost(ctx, HostConfig{Host: w.Host, Rules: rs, Ports: Ports{allPorts(), nil}, MaxRate: 2000, Progress: func(uint64, uint64) {
			if first {
				close(began)
			}
			first = false
		}})
		done <- err
	}()
	<-began
	if _, err := LookAtHost(t.Context(), HostConfig{Host: w.Host, Rules: rs}); !errors.Is(err, ErrOtherVerification) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EPERM) {
		t.Errorf("a second verification: %v", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v", err)
	}
}

func TestVantageNoWay(t *testing.T) {
	rs := compileText(t, bound)
	w := furnished(t, compiled(t, rs), "1")
	if _, err := LookAtHost(t.Context(), HostConfig{Host: w.Host, Rules: rs, In: "ppp0"}); !errors.Is(err, ErrNoInterface) {
		t.Errorf("an interface that is not there: %v", err)
	}
	// The gateway does not answer, and answers by any other way are not accepted.
	down := "ip neigh del 169.254.0.1 dev eth0; ip neigh del fe80::1 dev eth0; ip -6 route del default"
	if err := w.Command(t.Context(), []string{"sh", "-c", down}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	few := allPorts()[:100]
	r := lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}})
	if r.Verdict != Inconclusive || !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "IPv4 by eth0: rp_filter = 1") }) {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
}

// tcpdump, an independent witness, sees nothing of a vantage on the wire.
func TestVantageIsNotOnTheWire(t *testing.T) {
	rs := compileText(t, bound)
	w := furnished(t, compiled(t, rs), "1")
	var seen, said bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	dump := exec.CommandContext(ctx, "tcpdump", "-n", "-l", "-i", w.Link("eth0").Name, "--immediate-mode", "tcp or udp or icmp or icmp6")
	dump.Stdout, dump.Stderr = &seen, &said
	dump.Cancel = func() error { return dump.Process.Signal(os.Interrupt) }
	if err := dump.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	few := allPorts()[:1000]
	lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}})
	time.Sleep(1500 * time.Millisecond) // a SYN-ACK that was not reset would come again
	cancel()
	_ = dump.Wait() // it was interrupted
	if !strings.Contains(said.String(), "listening on") || strings.TrimSpace(seen.String()) != "" {
		t.Errorf("tcpdump: %s\n%s", said.String(), seen.String())
	}
}

// Others have the source ports of a vantage too: what they send to what is open to
// them is no passage of a probe.
func TestTripwireForSenders(t *testing.T) {
	w := furnished(t, "", "0")
	const port = 23456
	trip, err := ArmTripwireFor(w.Host, []uint16{port}, parseAddrs("198.51.100.7", "2001:db8:5::7"))
	if err != nil {
		t.Fatal(err)
	}
	defer trip.Remove()
	var paths []Path
	for _, src := range parseAddrs("198.51.100.7", "198.51.100.8", "2001:db8:5::7", "2001:db8:5::8") {
		dst := netip.MustParseAddr("203.0.113.10")
		if src.Is6() {
			dst = netip.MustParseAddr("2001:db8:77::10")
		}
		last := uint16(src.AsSlice()[len(src.AsSlice())-1])
		paths = append(paths, Path{Link: w.Link("eth0"), Src: src, Dst: dst, SrcPort: port, TCP: []uint16{last, 80 + last}})
	}
	if _, err := Sweep(t.Context(), Config{Paths: paths}); err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func() ([]Passage, error){"passed": trip.Passed, "gate": trip.GatePassed} {
		got, err := read()
		want := []Passage{{port, 7, rules.TCP, false}, {port, 87, rules.TCP, false}, {port, 7, rules.TCP, true}, {port, 87, rules.TCP, true}}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v %v, want %v", name, got, err, want)
		}
	}
}

// An address that the host talks to is not taken from it: a route of ours would.
func TestVantageLeavesPeersAlone(t *testing.T) {
	rs := compileText(t, "[open.web]\nports = 80\n[open.monitor]\nports = 9000\nfrom = \"198.51.100.7\"\n")
	w := furnished(t, compiled(t, rs), "0")
	// Without a gateway every way back is a route of ours.
	own := "ip neigh del 169.254.0.1 dev eth0; ip neigh del fe80::1 dev eth0"
	if err := w.Command(t.Context(), []string{"sh", "-c", own}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	few := append(allPorts()[:100], 8999, 9000, 9001)
	seen := func() bool {
		r := lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}})
		if r.Verdict != Pass {
			t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
		}
		return slices.ContainsFunc(r.Restrictions, func(x Restriction) bool { return x.From == "198.51.100.7" })
	}
	if !seen() {
		t.Error("an address that nobody uses was not looked from")
	}
	var peer int
	if err := w.Host(func() (err error) {
		if peer, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(peer, &unix.SockaddrInet4{Port: 514, Addr: [4]byte{198, 51, 100, 7}})
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(peer)
	if seen() {
		t.Error("an address that the host talks to was taken from it")
	}
}

// What has no Ethernet header is entered too, where the kernel takes answers by
// another way; where it does not, it is said.
func TestVantageTunnel(t *testing.T) {
	rs := compileText(t, "[open.web]\nports = 80\n[open.inner]\nports = 9000\ninterfaces = \"tun0\"\n")
	for rpFilter, want := range map[string]Verdict{"0": Pass, "1": Inconclusive} {
		w := furnished(t, compiled(t, rs), rpFilter)
		var fd int
		if err := w.Host(func() (err error) {
			if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return err
			}
			req, err := unix.NewIfreq("tun0")
			if err != nil {
				return err
			}
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			return unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}); err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		tunnel := "ip addr add 10.9.0.1/24 dev tun0 && ip link set tun0 up && echo " + rpFilter + " >/proc/sys/net/ipv4/conf/tun0/rp_filter"
		if err := w.Command(t.Context(), []string{"sh", "-c", tunnel}, os.Stderr, os.Stderr); err != nil {
			t.Fatal(err)
		}
		few := append(allPorts()[:100], 8999, 9000, 9001)
		r := lookAt(t, w, HostConfig{Rules: rs, Thorough: 1, Ports: Ports{few, few}})
		seen4 := slices.ContainsFunc(r.Restrictions, func(x Restriction) bool {
			return x.Interface == "tun0" && x.Rule == "inner" && x.Open == "9000/tcp" && netip.MustParseAddr(x.From).Is4()
		})
		if r.Verdict != want || seen4 != (want == Pass) {
			t.Errorf("rp_filter=%s: verdict %s, seen by tun0: %v\n%s", rpFilter, r.Verdict, seen4, text(t, r))
		}
	}
}
