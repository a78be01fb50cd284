package firewall

import (
	"encoding/binary"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// loadPass loads the eBPF program "return code" and gives its descriptor.
func loadPass(t *testing.T, typ uint32, code int32) int {
	t.Helper()
	insn := func(op byte, imm int32) []byte { // struct bpf_insn
		return binary.NativeEndian.AppendUint32([]byte{op, 0, 0, 0}, uint32(imm))
	}
	const mov, exit = 0xb7, 0x95 // BPF_ALU64|BPF_MOV|BPF_K of r0, BPF_JMP|BPF_EXIT
	insns := append(insn(mov, code), insn(exit, 0)...)
	license := []byte("GPL\x00")
	attr := struct {
		typ, count     uint32
		insns, license uint64
		_              [96]byte
	}{typ: typ, count: 2, insns: uint64(uintptr(unsafe.Pointer(&insns[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		t.Fatalf("load an eBPF program: %v (these tests need root of the machine)", errno)
	}
	t.Cleanup(func() { unix.Close(int(fd)) })
	return int(fd)
}

func link(t *testing.T, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func TestInterferenceXDP(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		must(t, netlink.LinkSetXdpFdWithFlags(link(t, "eth0"), loadPass(t, unix.BPF_PROG_TYPE_XDP, 2), int(unix.XDP_FLAGS_SKB_MODE)))
		got := l.interference(ruleset(t, interferePolicy))
		if s := shorts(got); !slices.Equal(s, []string{"may xdp interface eth0 unknown"}) {
			t.Fatalf("got %q", s)
		}
		if !strings.HasPrefix(got[0].Rule, "program ") {
			t.Errorf("got %+v", got[0])
		}
		elsewhere := ruleset(t, "[open.vpn]\nports = 22\ninterfaces = \"docker*\"\n")
		if got := l.interference(elsewhere); len(got) != 0 {
			t.Errorf("an interface that the policy does not name: %+v", got)
		}
		must(t, netlink.LinkSetXdpFdWithFlags(link(t, "eth0"), -1, int(unix.XDP_FLAGS_SKB_MODE)))
		if got := l.interference(nil); len(got) != 0 {
			t.Errorf("taken away: %+v", got)
		}
	})
}

func TestInterferenceTCX(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		for _, end := range []struct {
			attach uint32
			fact   string
		}{{unix.BPF_TCX_INGRESS, "that enter"}, {unix.BPF_TCX_EGRESS, "that leave"}} {
			attr := struct {
				prog, target, attach, flags uint32
				_                           [48]byte
			}{prog: uint32(loadPass(t, unix.BPF_PROG_TYPE_SCHED_CLS, -1)), target: uint32(link(t, "eth0").Attrs().Index), attach: end.attach}
			fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_LINK_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
			if errno != 0 {
				t.Fatalf("attach a tcx program: %v", errno)
			}
			got := l.interference(ruleset(t, interferePolicy))
			if s := shorts(got); !slices.Equal(s, []string{"may tcx interface eth0 unknown"}) || !strings.Contains(got[0].Fact, end.fact) {
				t.Errorf("got %+v", got)
			}
			unix.Close(int(fd))
			if got := l.interference(nil); len(got) != 0 {
				t.Errorf("taken away: %+v", got)
			}
		}
	})
}

func TestInterferenceTC(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		tc := func(args string) {
			t.Helper()
			if out, err := exec.Command("tc", strings.Fields(args)...).CombinedOutput(); err != nil {
				t.Fatalf("tc %s: %v\n%s", args, err, out)
			}
		}
		see := func(want ...string) {
			t.Helper()
			got := l.interference(ruleset(t, interferePolicy))
			var s []string
			for _, i := range got {
				s = append(s, short(i)+": "+i.Rule)
			}
			if !slices.Equal(s, want) {
				t.Errorf("got %q, want %q", s, want)
			}
		}
		tc("qdisc add dev eth0 clsact")
		see() // no filter
		tc("filter add dev eth0 ingress protocol ip u32 match ip dport 80 0xffff action mirred egress redirect dev docker0")
		see("may tc interface eth0 unknown: u32 at ingress")
		prog := loadPass(t, unix.BPF_PROG_TYPE_SCHED_CLS, -1)
		must(t, netlink.FilterAdd(&netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: link(t, "eth0").Attrs().Index, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		}, Fd: prog, Name: "pass", DirectAction: true}))
		see("may tc interface eth0 unknown: u32 at ingress", "may tc interface eth0 unknown: bpf at egress")
		tc("qdisc del dev eth0 clsact")
		see()
		tc("qdisc add dev eth0 ingress")
		tc("filter add dev eth0 parent ffff: protocol ip u32 match ip dport 80 0xffff action mirred egress redirect dev docker0")
		see("may tc interface eth0 unknown: u32 at ingress")
	})
}

// What an interface stands on counts as that interface.
func TestPolicyLinks(t *testing.T) {
	attrs := func(name string, index int) netlink.LinkAttrs { return netlink.LinkAttrs{Name: name, Index: index} }
	lo := &netlink.Device{LinkAttrs: attrs("lo", 1)}
	lo.Flags = unix.IFF_LOOPBACK
	eth0, eth1 := &netlink.Device{LinkAttrs: attrs("eth0", 2)}, &netlink.Device{LinkAttrs: attrs("eth1", 3)}
	bond := &netlink.Bond{LinkAttrs: attrs("bond0", 4)}
	eth0.MasterIndex = 4
	vlan := &netlink.Vlan{LinkAttrs: attrs("lan.5", 5)}
	vlan.ParentIndex = 4
	wg := &netlink.Wireguard{LinkAttrs: attrs("wg0", 6)}
	links := []netlink.Link{lo, eth0, eth1, bond, vlan, wg}
	for policy, want := range map[string]string{
		"":                       "eth0 eth1 bond0 lan.5 wg0",
		"[open.a]\nports = 22\n": "eth0 eth1 bond0 lan.5 wg0",
		"[open.a]\nports = 22\ninterfaces = \"lan*\"\n": "eth0 bond0 lan.5",
		"[open.a]\nports = 22\ninterfaces = \"wg0\"\n":  "wg0",
		"[open.a]\nports = 22\ninterfaces = \"lo\"\n":   "",
	} {
		var rs *rules.Ruleset
		if policy != "" {
			rs = ruleset(t, policy)
		}
		var got []string
		for _, l := range policyLinks(rs, links) {
			got = append(got, l.Attrs().Name)
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%q: %q, want %q", policy, s, want)
		}
	}
}

// The tables of iptables-legacy as the kernel lists them, where it has any.
func TestInterferenceLegacyKernel(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		out, err := exec.Command("iptables-legacy", "-t", "mangle", "-A", "PREROUTING", "-p", "tcp", "--dport", "80", "-j", "DROP").CombinedOutput()
		b, read := os.ReadFile("/proc/thread-self/net/ip_tables_names")
		var want []string
		if err == nil {
			want = []string{"may legacy iptables-legacy unknown"}
		} else if read == nil && len(b) > 0 {
			t.Fatalf("iptables-legacy: %v\n%s", err, out)
		}
		list, err := c.Interference(nil, HostFiles{})
		must(t, err)
		if got := shorts(list); !slices.Equal(got, want) {
			t.Errorf("got %+v, want %q (tables %q)", list, want, b)
		}
	})
}
