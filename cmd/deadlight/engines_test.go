package main

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/verify"
)

// TestEngines publishes ports with podman and with Docker as Debian packages them,
// on a throw-away host, and lets nmap look from outside: without a policy, with
// one that lists one port of two, and after what engines and we do then.
//
// It needs root, for the engines make namespaces and mounts of their own, and the
// archive of .ci/debian-root; -short leaves it out, but not where CI runs.
func TestEngines(t *testing.T) {
	t.Parallel() // a host of its own; what it waits for takes no processor
	if testing.Short() && os.Getenv("CI") == "" {
		t.Skip("-short")
	}
	ids, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^\s*0\s+0\s+4294967295\s*$`).Match(ids) {
		t.Fatal("running engines takes root: sudo -E go test -run TestEngines ./cmd/deadlight, or leave it out with -short")
	}
	root := unpackEngines(t)
	world, err := verify.Listen(verify.Here, []uint16{worldPort}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer world.Close()
	for _, e := range []containerEngine{{
		name: "podman", bridge: "podman1", guest4: "10.89.0.2", guest6: "fd89::2", gateway: "10.89.0.1", dns: true,
		// A module that Docker loads would have the bridge translate what a guest asks of
		// itself by the host, and then not send it back where it came from.
		start: `for f in /proc/sys/net/bridge/bridge-nf-call-ip*tables; do [ ! -e $f ] || echo 0 >$f; done
podman() { command podman --root /tmp/store --runroot /run/store --tmpdir /run/libpod --storage-driver vfs --cgroup-manager cgroupfs --events-backend file --network-backend netavark --network-config-dir /tmp/net "$@"; }
podman network create --ipv6 --subnet 10.89.0.0/24 --subnet fd89::/64 web`,
		run: `podman run -d --name web1 --cgroups=disabled --network web --ip 10.89.0.2 --ip6 fd89::2 -p 8080:80 -p 8081:80 -p 8053:53/udp --rootfs /srv/guest /bin/busybox httpd -f -p 80`,
		in:  `podman exec web1`, stop: `podman rm -f -t 0 web1`,
	}, {
		name: "docker", bridge: "docker0", guest4: "172.17.0.2", guest6: "fd17::242:ac11:2", gateway: "172.17.0.1",
		start: `docker() { command docker -H unix:///run/docker.sock "$@"; }
containerd --root /tmp/containerd --state /run/containerd -a /run/containerd.sock >/tmp/containerd.log 2>&1 &
dockerd --containerd /run/containerd.sock --data-root /tmp/docker --exec-root /run/docker -p /run/docker.pid -H unix:///run/docker.sock --storage-driver vfs --experimental --ip6tables --ipv6 --fixed-cidr-v6 fd17::/64 --exec-opt native.cgroupdriver=cgroupfs >/tmp/dockerd.log 2>&1 &
i=0; until docker info >/dev/null 2>&1; do i=$((i+1)); [ $i -lt 300 ] || { cat /tmp/containerd.log /tmp/dockerd.log >&2; exit 1; }; sleep 0.1; done
tar -C /srv/guest -c . | docker import - guest`,
		run:  `docker run -d --name web1 -p 8080:80 -p 8081:80 -p 8053:53/udp guest /bin/busybox httpd -f -p 80`,
		in:   `docker exec web1`,
		stop: `docker rm -f web1`,
		end:  `kill $(cat /run/docker.pid); i=0; while [ -e /run/docker.pid ] && [ $i -lt 100 ]; do i=$((i+1)); sleep 0.1; done`,
	}} {
		t.Run(e.name, func(t *testing.T) { testEngine(t, root, e) })
	}
}

// worldPort is one that guests ask the outside for.
const worldPort = 7999

// containerEngine is how a shell starts one, and what it makes.
type containerEngine struct {
	name                      string
	bridge, gateway           string
	guest4, guest6            string
	dns                       bool // it answers 53/udp to guests
	start, run, in, stop, end string
}

// unpackEngines gives a root directory with the engines, in memory, and in it
// what guests see.
func unpackEngines(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("../../.ci/debian-root", "engines").Output()
	if err != nil {
		t.Fatalf(".ci/debian-root engines: %v", err)
	}
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "mode=0755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", root, err)
		}
	})
	script := `tar --numeric-owner --xattrs -xpf "$1" -C "$2"
mkdir -p "$2"/srv/guest/{bin,dev,etc,proc,sys,tmp,run}
cp "$2"/bin/busybox "$2"/srv/guest/bin/
echo hello >"$2"/srv/guest/index.html`
	if out, err := exec.Command("bash", "-ec", script, "bash", strings.TrimSpace(string(out)), root).CombinedOutput(); err != nil {
		t.Fatalf("unpack: %v\n%s", err, out)
	}
	return root
}

// engineHost is a host on which a shell, in mount, process and cgroup namespaces
// of its own, runs the commands of an engine.
type engineHost struct {
	*lab
	t        *testing.T
	root     string
	commands *os.File // names of scripts
	done     *bufio.Scanner
	n        int
}

// engineInit is the first process of the engine's namespaces. It ends with its
// input, and the engine with it.
const engineInit = `
root=$1
mount --bind "$root" "$root"
cd "$root"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/dev/shm" # podman leaves its locks there
# Not chroot: runc enters a guest by the root of the mount namespace.
mkdir -p old
pivot_root . old
exec chroot . bash -c '
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
umount -l /old
while read -r n; do . /steps/$n </dev/null >/steps/$n.out 2>&1; echo "$n $?"; done'
`

// newEngineHost makes the host, with 22/tcp of its own.
func newEngineHost(t *testing.T, root string) *engineHost {
	t.Helper()
	h := &engineHost{t: t, root: root, lab: &lab{host4: netip.MustParseAddr("203.0.113.10"), host6: netip.MustParseAddr("2001:db8:77::10")}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	h.World, err = verify.NewWorld(verify.WorldConfig{Host4: h.host4, Host6: h.host6, Links: []string{"eth0"}})
	must(err)
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	h.settle(t)
	h.policy = filepath.Join(t.TempDir(), "policy.toml")
	must(os.RemoveAll(filepath.Join(root, "steps")))
	must(os.Mkdir(filepath.Join(root, "steps"), 0o755))

	groups := t.TempDir()
	must(unix.Mount("cgroup2", groups, "cgroup2", 0, ""))
	group := filepath.Join(groups, fmt.Sprintf("deadlight-test-%d", time.Now().UnixNano()))
	must(os.Mkdir(group, 0o755))
	in, commands, err := os.Pipe()
	must(err)
	done, out, err := os.Pipe()
	must(err)
	h.commands, h.done = commands, bufio.NewScanner(done)
	inGroup, err := os.Open(group)
	must(err)
	var errs lockedBuffer
	cmd := exec.Command("unshare", "--cgroup", "--mount", "--propagation", "private", "bash", "-ec", engineInit, "engine", root)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &errs
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, UseCgroupFD: true, CgroupFD: int(inGroup.Fd())}
	must(h.Host(cmd.Start))
	in.Close()
	out.Close()
	inGroup.Close()
	t.Cleanup(func() {
		commands.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the engine's shell: %v\n%s", err, errs.String())
		}
		done.Close()
		if err := os.WriteFile(filepath.Join(group, "cgroup.kill"), []byte("1"), 0); err != nil {
			t.Error(err)
		}
		removeCgroup(t, group)
		if err := unix.Unmount(groups, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return h
}

// do runs a script in the engine's shell, whose functions stay, and gives what it
// printed and whether it succeeded.
func (h *engineHost) do(script string) (string, bool) {
	h.t.Helper()
	h.n++
	file := filepath.Join(h.root, "steps", fmt.Sprint(h.n))
	if err := os.WriteFile(file, []byte(script+"\n"), 0o644); err != nil {
		h.t.Fatal(err)
	}
	if _, err := fmt.Fprintln(h.commands, h.n); err != nil {
		h.t.Fatalf("the engine's shell is gone: %v", err)
	}
	if !h.done.Scan() {
		h.t.Fatalf("the engine's shell ended in %q: %v", script, h.done.Err())
	}
	out, err := os.ReadFile(file + ".out")
	if err != nil {
		h.t.Fatal(err)
	}
	return string(out), h.done.Text() == fmt.Sprintf("%d 0", h.n)
}

// must is do for what has to succeed.
func (h *engineHost) must(script string) string {
	h.t.Helper()
	out, ok := h.do(script)
	if !ok {
		h.t.Fatalf("%s\n%s", script, out)
	}
	return out
}

// deadlight runs a command of ours on the host.
func (h *engineHost) deadlight(want int, args ...string) string {
	h.t.Helper()
	var out bytes.Buffer
	if err := h.Host(func() error {
		if code := run(args, env{stdin: strings.NewReader(""), stdout: &out, stderr: &out}); code != want {
			return fmt.Errorf("%q exits with %d, want %d:\n%s", args, code, want, out.String())
		}
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return out.String()
}

// apply puts a policy in force, as an admin does.
func (h *engineHost) apply(policy string) {
	h.t.Helper()
	if err := os.WriteFile(h.policy, []byte("version = 1\n"+policy), 0o600); err != nil {
		h.t.Fatal(err)
	}
	h.deadlight(exitOK, "apply", h.policy)
}

// prints runs a program on the host and gives what it printed, without counts and
// times.
func (h *engineHost) prints(argv ...string) string {
	h.t.Helper()
	var out, errs bytes.Buffer
	if err := h.Command(h.t.Context(), argv, &out, &errs); err != nil {
		h.t.Fatalf("%v\n%s", err, errs.Bytes())
	}
	return regexp.MustCompile(`(?m)packets \d+ bytes \d+|\[\d+:\d+\]|^#.*\n`).ReplaceAllString(out.String(), "")
}

// theirs lists the rules of the engine, ours those of deadlight.
func (h *engineHost) theirs() string {
	h.t.Helper()
	return h.prints("iptables-nft-save") + h.prints("ip6tables-nft-save")
}

func (h *engineHost) ours() string {
	h.t.Helper()
	return withoutKnocks(h.prints("nft", "-a", "list", "table", "inet", "deadlight"))
}

// sees says which TCP ports of an address nmap finds open, and which answer at all.
func (h *engineHost) sees(addr netip.Addr, args ...string) (open, reachable []uint16) {
	h.t.Helper()
	for port, state := range nmap(h.t, addr, args...) {
		switch state {
		case "open":
			open = append(open, port)
			reachable = append(reachable, port)
		case "closed":
			reachable = append(reachable, port)
		}
	}
	slices.Sort(open)
	slices.Sort(reachable)
	return open, reachable
}

// expect looks at the ports that matter, over both families.
func (h *engineHost) expect(what string, open ...uint16) {
	h.t.Helper()
	each([]netip.Addr{h.host4, h.host6}, func(addr netip.Addr) {
		got, reachable := h.sees(addr, "-p", "22,53,80,8053,8080,8081", "--max-retries", "3", "--max-rtt-timeout", "300ms")
		if !slices.Equal(got, open) {
			h.t.Errorf("%s: %s has %d open, want %d", what, addr, got, open)
		}
		// A port that is listed may be closed.
		for _, port := range reachable {
			if port != 8080 && !slices.Contains(open, port) {
				h.t.Errorf("%s: unlisted %d/tcp of %s is reachable", what, port, addr)
			}
		}
	})
}

// each asks about addresses at once: nmap mostly waits.
func each(addresses []netip.Addr, ask func(netip.Addr)) {
	var wait sync.WaitGroup
	for _, addr := range addresses {
		wait.Add(1)
		go func() {
			defer wait.Done()
			ask(addr)
		}()
	}
	wait.Wait()
}

func testEngine(t *testing.T, root string, e containerEngine) {
	h := newEngineHost(t, root)
	own, err := verify.Listen(h.Host, []uint16{22}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	guests := []netip.Addr{netip.MustParseAddr(e.guest4), netip.MustParseAddr(e.guest6)}
	h.wayTo(guests)
	h.must(e.start)
	if e.end != "" {
		defer h.do(e.end)
	}
	h.must(e.run)
	t.Logf("%s", h.must(e.name+" version"))
	reaches := func(what string, want bool, command string) {
		t.Helper()
		if out, ok := h.do(e.in + " /bin/busybox timeout 3 /bin/busybox " + command); ok != want {
			t.Errorf("%s: %q succeeds %t, want %t\n%s", what, command, ok, want, out)
		}
	}
	direct := func(what string, want ...uint16) {
		t.Helper()
		each(guests, func(guest netip.Addr) {
			if open, _ := h.sees(guest, "-p", "80,443,8080", "--max-retries", "3", "--max-rtt-timeout", "300ms"); !slices.Equal(open, want) {
				t.Errorf("%s: %s by routing: %d open, want %d", what, guest, open, want)
			}
		})
	}
	udp := func(what, want string) {
		t.Helper()
		each([]netip.Addr{h.host4, h.host6}, func(addr netip.Addr) {
			// Nobody listens behind it: what gets through is refused by the guest.
			if got := nmap(t, addr, "-sU", "-p", "8053", "--max-retries", "3", "--max-rtt-timeout", "300ms")[8053]; got != want {
				t.Errorf("%s: 8053/udp of %s is %s, want %s", what, addr, got, want)
			}
		})
	}

	// What there is to close.
	for _, addr := range []netip.Addr{h.host4, h.host6} {
		if open, _ := h.sees(addr, "-p", "1-10000"); !slices.Equal(open, []uint16{22, 8080, 8081}) {
			t.Errorf("without a policy: %s has %d open", addr, open)
		}
	}
	direct("without a policy", 80)
	udp("without a policy", "closed")
	reaches("without a policy", true, "nc "+e.gateway+" 22")
	reaches("without a policy: hairpin", true, "wget -q -O - http://"+h.host4.String()+":8081/")

	// The starter policy keeps what there is; one that forgets guests is warned of.
	if err := os.WriteFile(h.policy, []byte(h.deadlight(exitOK, "init")), 0o600); err != nil {
		t.Fatal(err)
	}
	starter := h.deadlight(exitFindings, "plan", h.policy)
	if strings.Contains(starter, "warning: guests") {
		t.Errorf("the starter policy cuts guests off:\n%s", starter)
	}
	h.deadlight(exitOK, "apply", h.policy)
	h.expect("the starter policy", 22, 8080, 8081)
	h.deadlight(exitOK, "remove")
	const listed = "[open.web]\nports = 8080\n"
	if err := os.WriteFile(h.policy, []byte("version = 1\n"+listed), 0o600); err != nil {
		t.Fatal(err)
	}
	warning := regexp.MustCompile(`(?m)^warning: guests of ` + e.bridge + ` lose aardvark-dns \(pid \d+\) of this host: nothing opens 53/udp to them$`)
	if plan := h.deadlight(exitFindings, "plan", h.policy); warning.MatchString(plan) != e.dns {
		t.Errorf("plan:\n%s", plan)
	}

	their := h.theirs()
	h.apply(listed)
	if got := h.theirs(); got != their {
		t.Errorf("apply changed what is not ours:\n%s\nwas\n%s", got, their)
	}
	h.expect("listed", 8080)
	direct("listed")
	udp("listed", "open|filtered")
	each([]netip.Addr{h.host4, h.host6}, func(addr netip.Addr) {
		open, reachable := h.sees(addr, "-p-", "--min-rate", "20000", "--max-retries", "2")
		for _, port := range reachable {
			if port != 8080 {
				t.Errorf("unlisted %d/tcp of %s is reachable", port, addr)
			}
		}
		t.Logf("%s: of 65535 ports nmap reaches %d, open %d", addr, reachable, open)
	})
	reaches("listed: a guest asks the host", false, "nc "+e.gateway+" 22")
	reaches("listed: hairpin", true, "wget -q -O - http://"+h.host4.String()+":8080/")
	reaches("listed: hairpin of an unlisted port", false, "wget -q -O - http://"+h.host4.String()+":8081/")
	reaches("listed: a guest asks the world", true, fmt.Sprintf("nc 203.0.113.20 %d", worldPort))
	if e.dns {
		reaches("listed: names", false, "nslookup web1 "+e.gateway)
	}
	if status := h.deadlight(exitOK, "status"); strings.Contains(status, "breaks") {
		t.Errorf("status:\n%s", status)
	}

	h.apply(listed + "[open.guests]\nports = [22, 53]\nprotocol = [\"tcp\", \"udp\"]\ninterfaces = \"" + e.bridge + "\"\n")
	h.expect("opened to guests", 8080)
	reaches("opened to guests: the host", true, "nc "+e.gateway+" 22")
	if e.dns {
		reaches("opened to guests: names", true, "nslookup web1 "+e.gateway)
	}

	// What the engine does now changes nothing of ours, nor we of its.
	our := h.ours()
	h.must(e.stop)
	h.expect("the guest is gone")
	h.must(e.run)
	if got := h.ours(); got != our {
		t.Errorf("%s changed our table:\n%s\nwas\n%s", e.name, got, our)
	}
	h.deadlight(exitOK, "drift")
	h.expect("the guest is back", 8080)
	their = h.theirs()
	h.apply(listed + "[default]\npublished = \"ignore\"\n")
	h.expect("ignored", 8080, 8081)
	udp("ignored", "closed")
	h.deadlight(exitOK, "remove")
	if got := h.theirs(); got != their {
		t.Errorf("apply and remove changed what is not ours:\n%s\nwas\n%s", got, their)
	}
	direct("removed", 80)
}

// wayTo lets the outside route to guests, as a neighbour may who knows of them.
func (h *engineHost) wayTo(guests []netip.Addr) {
	h.t.Helper()
	link, err := netlink.LinkByIndex(h.Link("eth0").Index)
	if err != nil {
		h.t.Fatal(err)
	}
	for i, guest := range guests {
		via := []netip.Addr{h.host4, h.host6}[i]
		route := &netlink.Route{
			LinkIndex: link.Attrs().Index, Gw: via.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
			Dst: &net.IPNet{IP: guest.AsSlice(), Mask: net.CIDRMask(guest.BitLen(), guest.BitLen())},
			Src: netip.MustParseAddr([]string{"203.0.113.20", "2001:db8:77::20"}[i]).AsSlice(),
		}
		if err := netlink.RouteAdd(route); err != nil {
			h.t.Fatalf("route to %s: %v", guest, err)
		}
	}
}
