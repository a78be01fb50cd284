package firewall

import (
	"encoding/xml"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/verify"
)

// A host on which every engine publishes at once, with guests that answer: nmap
// reaches the listed ports over both families, and not one that is unlisted.
func TestPublishNmap(t *testing.T) {
	links := []string{"eth0"}
	for _, e := range engines() {
		if e.bridge != "" {
			links = append(links, e.bridge)
		}
	}
	w := newWire(t, links...)
	w.forwarding()
	var listed, unlisted, own []uint16
	for _, e := range engines() {
		w.start(e)
		listed, unlisted = append(listed, e.listed), append(unlisted, e.unlisted)
		switch {
		case e.bridge != "":
			w.answering(t, e)
		case e.local != 0:
			own = append(own, e.local)
		default:
			own = append(own, e.listed, e.unlisted)
		}
	}
	own = append(own, 22)
	unlisted = append(unlisted, 22, 8488)
	l, err := verify.Listen(w.Host, own, own)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	w.outside(t)
	slices.Sort(listed)
	slices.Sort(unlisted)
	all := slices.Sorted(slices.Values(append(slices.Clone(listed), unlisted...)))
	hosts := []netip.Addr{host4, host6}
	for _, addr := range hosts {
		// Without a policy all of it is open: else the silence below would prove nothing.
		if open, _ := scan(t, addr, "-sS", "-p", ports(all)); !slices.Equal(open, all) {
			t.Errorf("without a policy %s has %d open, want %d", addr, open, all)
		}
	}
	w.load(t, "[open.published]\nports = ["+ports(listed)+"]\n")
	for _, addr := range hosts {
		open, reachable := scan(t, addr, "-sS", "-p-", "--min-rate", "10000", "--max-retries", "2")
		if !slices.Equal(open, listed) {
			// A starved nmap misses answers: it is asked again, with time.
			open, _ = scan(t, addr, "-sS", "-p", ports(all))
		}
		if !slices.Equal(open, listed) {
			t.Errorf("%s: %d open, want %d", addr, open, listed)
		}
		hidden := slices.DeleteFunc(reachable, func(p uint16) bool { return slices.Contains(listed, p) })
		if len(hidden) > 0 {
			t.Errorf("%s: unlisted and reachable: %d", addr, hidden)
		}
		t.Logf("%s: of 65535 TCP ports nmap finds %d open, %d unlisted and reachable", addr, len(open), len(hidden))
		if _, reachable := scan(t, addr, "-sU", "-p", ports(all)); len(reachable) > 0 {
			t.Errorf("%s: reachable over UDP: %d", addr, reachable)
		}
	}
}

// answering puts a guest behind an engine's bridge, in a namespace of its own, that
// listens on 80/tcp.
func (w *wire) answering(t *testing.T, e engine) {
	t.Helper()
	out := w.Link(e.bridge)
	var ns *os.File
	inside := func(fn func() error) error {
		done := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends here
			done <- func() error {
				if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
					return err
				}
				return fn()
			}()
		}()
		return <-done
	}
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		made <- func() (err error) {
			if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
				ns, err = os.Open("/proc/thread-self/ns/net")
			}
			return err
		}()
	}()
	must(t, <-made)
	t.Cleanup(func() { ns.Close() })
	link, err := netlink.LinkByIndex(out.Index)
	must(t, err)
	must(t, netlink.LinkSetNsFd(link, int(ns.Fd())))
	must(t, inside(func() error {
		for _, line := range []string{
			"link set lo up", "link set " + out.Name + " up",
			"addr add " + e.guest4 + "/32 dev " + out.Name, "addr add " + e.guest6 + "/128 nodad dev " + out.Name,
			"neigh replace 169.254.0.1 nud permanent lladdr " + out.Dst.String() + " dev " + out.Name,
			"neigh replace fe80::1 nud permanent lladdr " + out.Dst.String() + " dev " + out.Name,
			"route add default via 169.254.0.1 onlink src " + e.guest4 + " dev " + out.Name,
			"-6 route add default via fe80::1 src " + e.guest6 + " dev " + out.Name,
		} {
			if text, err := exec.Command("ip", strings.Fields(line)...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %s: %w\n%s", line, err, text)
			}
		}
		return nil
	}))
	l, err := verify.Listen(inside, []uint16{80}, []uint16{80})
	must(t, err)
	t.Cleanup(func() { l.Close() })
}

// outside gives the outside addresses from which other programs reach the host.
func (w *wire) outside(t *testing.T) {
	t.Helper()
	out := w.Link("eth0")
	link, err := netlink.LinkByIndex(out.Index)
	must(t, err)
	for _, a := range []struct{ own, host string }{{client4 + "/32", host4.String() + "/32"}, {client6 + "/128", host6.String() + "/128"}} {
		own, err := netlink.ParseAddr(a.own)
		must(t, err)
		own.Flags = unix.IFA_F_NODAD
		must(t, netlink.AddrAdd(link, own))
		_, dst, err := net.ParseCIDR(a.host)
		must(t, err)
		must(t, netlink.RouteAdd(&netlink.Route{LinkIndex: out.Index, Dst: dst, Src: own.IP, Scope: netlink.SCOPE_LINK}))
	}
}

func ports(list []uint16) string {
	var out []string
	for _, p := range list {
		out = append(out, strconv.Itoa(int(p)))
	}
	return strings.Join(out, ",")
}

// scan gives the ports that nmap finds open, and those that answer at all. Only
// silence may be summed up.
func scan(t *testing.T, addr netip.Addr, args ...string) (open, reachable []uint16) {
	t.Helper()
	args = append([]string{"-n", "-Pn", "-oX", "-"}, append(args, addr.String())...)
	if addr.Is6() {
		args = append([]string{"-6"}, args...)
	}
	out, err := exec.Command("nmap", args...).Output()
	if err != nil {
		t.Fatalf("nmap: %v", err)
	}
	var doc struct {
		Ports []struct {
			ID    uint16 `xml:"portid,attr"`
			State struct {
				State string `xml:"state,attr"`
			} `xml:"state"`
		} `xml:"host>ports>port"`
		Extra []struct {
			State string `xml:"state,attr"`
			Count int    `xml:"count,attr"`
		} `xml:"host>ports>extraports"`
	}
	if err := xml.Unmarshal(out, &doc); err != nil {
		t.Fatalf("nmap: %v", err)
	}
	for _, e := range doc.Extra {
		if e.State != "filtered" && e.State != "open|filtered" {
			t.Errorf("nmap: %d ports of %s are %s", e.Count, addr, e.State)
		}
	}
	for _, p := range doc.Ports {
		switch p.State.State {
		case "open":
			open = append(open, p.ID)
			reachable = append(reachable, p.ID)
		case "filtered", "open|filtered":
		default:
			reachable = append(reachable, p.ID)
		}
	}
	slices.Sort(open)
	slices.Sort(reachable)
	return open, reachable
}
