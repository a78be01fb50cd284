package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// fakeProcess is an entry of a made /proc.
type fakeProcess struct {
	name   string
	parent int
	uid    int
	env    string
	fds    map[int]int // number to inode
	closed bool        // we may not look into it
}

// fakeProc writes a /proc; that of the thread is in network namespace 1.
func fakeProc(t *testing.T, all map[int]fakeProcess) string {
	t.Helper()
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	link := func(target, name string) {
		must(os.MkdirAll(filepath.Dir(name), 0o700))
		must(os.Symlink(target, name))
	}
	link("net:[1]", filepath.Join(root, "thread-self/ns/net"))
	for pid, p := range all {
		dir := filepath.Join(root, fmt.Sprint(pid))
		must(os.MkdirAll(filepath.Join(dir, "fd"), 0o700))
		must(os.WriteFile(filepath.Join(dir, "status"),
			fmt.Appendf(nil, "Name:\t%s\nState:\tS (sleeping)\nPPid:\t%d\nUid:\t%[3]d\t%[3]d\t%[3]d\t%[3]d\n", p.name, p.parent, p.uid), 0o600))
		must(os.WriteFile(filepath.Join(dir, "environ"), []byte("TERM=vt100\x00"+p.env+"\x00"), 0o600))
		link("/dev/null", filepath.Join(dir, "fd/0"))
		for n, inode := range p.fds {
			link(fmt.Sprintf("socket:[%d]", inode), filepath.Join(dir, "fd", fmt.Sprint(n)))
		}
		if p.closed {
			link("net:[1]", filepath.Join(dir, "ns/net"))
			link("closed", filepath.Join(dir, "fd/closed"))
		}
	}
	return root
}

// readOpenDir is os.ReadDir for one whom the made permissions bind.
func readOpenDir(dir string) ([]fs.DirEntry, error) {
	if _, err := os.Lstat(filepath.Join(dir, "closed")); err == nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: fs.ErrPermission}
	}
	return os.ReadDir(dir)
}

func end(inode uint32, local, remote string) endpoint {
	return endpoint{inode: inode, local: netip.MustParseAddrPort(local), remote: netip.MustParseAddrPort(remote)}
}

// TestOperator finds the peer behind every way to start a command.
func TestOperator(t *testing.T) {
	const caller = 100
	ssh := end(11, "203.0.113.10:22", "198.51.100.7:40000")
	other := end(12, "203.0.113.10:22", "192.0.2.66:50000")
	six := end(13, "[2001:db8::10]:22", "[2001:db8::7]:40000")
	forwarded := end(14, "203.0.113.10:50001", "192.0.2.80:443")
	// Both ends of a connection to this host itself.
	near, far := end(15, "127.0.0.1:22", "127.0.0.1:41000"), end(16, "127.0.0.1:41000", "127.0.0.1:22")
	mosh := endpoint{inode: 17, local: netip.MustParseAddrPort("0.0.0.0:60001"), remote: netip.MustParseAddrPort("0.0.0.0:0")}
	flow := end(0, "203.0.113.10:60001", "198.51.100.9:7000")

	const claim = "SSH_CONNECTION=198.51.100.7 40000 203.0.113.10 22"
	server := fakeProcess{name: "sshd", parent: 1}
	priv := fakeProcess{name: "sshd", parent: 10, fds: map[int]int{4: 11}}
	child := fakeProcess{name: "sshd", parent: 20, uid: 1000, fds: map[int]int{4: 11, 10: 14}}
	shell := func(parent int) fakeProcess { return fakeProcess{name: "bash", parent: parent, uid: 1000} }
	console := map[int]fakeProcess{
		1: {name: "systemd"}, 10: server, 20: priv, 21: child, 22: shell(21), 50: {name: "login", parent: 1}, 51: shell(50),
		caller: {name: "deadlight", parent: 51},
	}
	tests := map[string]struct {
		processes   map[int]fakeProcess // beside those of the first case
		connections []endpoint          // beside ssh and other
		connection  string              // SSH_CONNECTION
		flow        bool                // conntrack knows that of mosh
		want        []string
		unknown     bool
	}{
		"console":               {},
		"a service":             {processes: map[int]fakeProcess{caller: {name: "deadlight", parent: 1}}},
		"ssh":                   {processes: map[int]fakeProcess{caller: {name: "deadlight", parent: 22}}, want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"root's ssh":            {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, fds: map[int]int{3: 12}}, caller: {name: "deadlight", parent: 30}}, want: []string{"tcp 203.0.113.10:22 192.0.2.66:50000 30"}},
		"newer server":          {processes: map[int]fakeProcess{30: {name: "sshd-session", parent: 10, fds: map[int]int{3: 12}}, caller: {name: "deadlight", parent: 30}}, want: []string{"tcp 203.0.113.10:22 192.0.2.66:50000 30"}},
		"sudo":                  {processes: map[int]fakeProcess{31: {name: "sudo", parent: 22}, 32: {name: "sudo", parent: 31}, caller: {name: "deadlight", parent: 32}}, want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"ipv6":                  {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, fds: map[int]int{3: 13}}, caller: {name: "deadlight", parent: 30}}, connections: []endpoint{six}, want: []string{"tcp [2001:db8::10]:22 [2001:db8::7]:40000 30"}},
		"a forwarded port":      {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, fds: map[int]int{9: 12, 10: 14}}, caller: {name: "deadlight", parent: 30}}, connections: []endpoint{forwarded}, want: []string{"tcp 203.0.113.10:22 192.0.2.66:50000 30"}},
		"another namespace":     {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, fds: map[int]int{3: 99}}, caller: {name: "deadlight", parent: 30}}},
		"claim without socket":  {connection: "198.51.100.99 40000 203.0.113.10 22"},
		"claim with a socket":   {connection: "198.51.100.7 40000 203.0.113.10 22", want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 0"}},
		"claim of an ancestor":  {processes: map[int]fakeProcess{40: {name: "bash", parent: 1, env: claim}, caller: {name: "deadlight", parent: 40}}, want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 0"}},
		"a claim that is wrong": {processes: map[int]fakeProcess{caller: {name: "deadlight", parent: 22}}, connection: "192.0.2.66 50000 203.0.113.10 22", want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"nonsense":              {connection: "a b c d"},
		"tmux": {processes: map[int]fakeProcess{
			40: {name: "tmux: server", parent: 1, uid: 1000}, 41: {name: "tmux: client", parent: 22, uid: 1000}, 42: shell(40), caller: {name: "deadlight", parent: 42}},
			want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"screen, seen by two": {processes: map[int]fakeProcess{
			30: {name: "sshd", parent: 10, fds: map[int]int{3: 12}}, 31: {name: "screen", parent: 30, uid: 1000},
			40: {name: "screen", parent: 1, uid: 1000}, 41: {name: "screen", parent: 22, uid: 1000}, caller: {name: "deadlight", parent: 40}},
			want: []string{"tcp 203.0.113.10:22 192.0.2.66:50000 30", "tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"tmux, seen by another user": {processes: map[int]fakeProcess{
			40: {name: "tmux: server", parent: 1, uid: 1001}, 41: {name: "tmux: client", parent: 22, uid: 1000}, caller: {name: "deadlight", parent: 40}}},
		"ssh to this host and on": {processes: map[int]fakeProcess{
			30: {name: "ssh", parent: 22, uid: 1000, fds: map[int]int{3: 16}}, 31: {name: "sshd", parent: 10, fds: map[int]int{3: 15}}, caller: {name: "deadlight", parent: 31}},
			connections: []endpoint{near, far}, want: []string{"tcp 127.0.0.1:22 127.0.0.1:41000 31", "tcp 203.0.113.10:22 198.51.100.7:40000 20|21"}},
		"mosh": {processes: map[int]fakeProcess{40: {name: "mosh-server", parent: 1, uid: 1000, fds: map[int]int{4: 17}}, caller: {name: "deadlight", parent: 40}}, flow: true,
			want: []string{"udp 203.0.113.10:60001 198.51.100.9:7000 40"}},
		"mosh without conntrack": {processes: map[int]fakeProcess{40: {name: "mosh-server", parent: 1, uid: 1000, env: claim, fds: map[int]int{4: 17}}, caller: {name: "deadlight", parent: 40}},
			want: []string{"udp 203.0.113.10:60001 198.51.100.7:0 40"}},
		"mosh that says nothing": {processes: map[int]fakeProcess{40: {name: "mosh-server", parent: 1, fds: map[int]int{4: 17}}, caller: {name: "deadlight", parent: 40}}, unknown: true},
		"no permission":          {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, closed: true}, caller: {name: "deadlight", parent: 30}}, unknown: true},
		"no permission, but a claim": {processes: map[int]fakeProcess{30: {name: "sshd", parent: 10, closed: true}, 31: {name: "bash", parent: 30, env: claim}, caller: {name: "deadlight", parent: 31}},
			want: []string{"tcp 203.0.113.10:22 198.51.100.7:40000 0"}},
		"a loop": {processes: map[int]fakeProcess{51: {name: "bash", parent: caller}}},
		"orphan": {processes: map[int]fakeProcess{caller: {name: "deadlight", parent: 77}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			all := map[int]fakeProcess{}
			for _, m := range []map[int]fakeProcess{console, tt.processes} {
				for pid, p := range m {
					all[pid] = p
				}
			}
			got, err := (&tracer{
				proc: fakeProc(t, all), connection: tt.connection,
				established: func() ([]endpoint, error) { return append([]endpoint{ssh, other}, tt.connections...), nil },
				bound:       func() ([]endpoint, error) { return []endpoint{mosh}, nil },
				flows:       func(port uint16) (endpoint, bool, error) { return flow, tt.flow && port == 60001, nil },
				wire:        func(e endpoint) (netip.AddrPort, error) { return e.local, nil },
				inbound:     func(endpoint) (string, error) { return "eth0", nil },
				readDir:     readOpenDir,
			}).trace(caller)
			if errors.Is(err, errPeerUnknown) != tt.unknown || err != nil && !tt.unknown {
				t.Fatalf("error %v, want unknown %v", err, tt.unknown)
			}
			var is []string
			for _, s := range got {
				if s.Interface != "eth0" {
					t.Errorf("%v: interface %q", s, s.Interface)
				}
				pid := fmt.Sprint(s.PID)
				if s.PID == 20 || s.PID == 21 {
					pid = "20|21" // both hold it
				}
				is = append(is, fmt.Sprint(s.Protocol, " ", s.Local, " ", s.Remote, " ", pid))
			}
			slices.Sort(is)
			if !slices.Equal(is, tt.want) {
				t.Errorf("sessions %q, want %q", is, tt.want)
			}
		})
	}
}

// TestOperatorOtherNamespace: a server that we may not look into, but that is in
// another network, has no session in this one.
func TestOperatorOtherNamespace(t *testing.T) {
	proc := fakeProc(t, map[int]fakeProcess{1: {name: "init"}, 30: {name: "sshd", parent: 1, closed: true}, 40: {name: "deadlight", parent: 30}})
	for link, want := range map[string]bool{"net:[1]": true, "net:[2]": false} {
		name := filepath.Join(proc, "30/ns/net")
		if err := errors.Join(os.Remove(name), os.Symlink(link, name)); err != nil {
			t.Fatal(err)
		}
		for _, connections := range [][]endpoint{nil, {end(11, "203.0.113.10:22", "198.51.100.7:40000")}} {
			_, err := (&tracer{
				proc: proc, established: func() ([]endpoint, error) { return connections, nil },
				readDir: readOpenDir,
			}).trace(40)
			if got := errors.Is(err, errPeerUnknown); got != (want && connections != nil) {
				t.Errorf("server in %s, %d connections: %v", link, len(connections), err)
			}
		}
	}
}

// TestCutOffs asks a policy about sessions.
func TestCutOffs(t *testing.T) {
	const policy = `[open.ssh]
ports = 22
from = ["198.51.100.0/24", "2001:db8::/32"]
rate = { limit = "1/hour", burst = 1 }
[open.other]
ports = 2222
interfaces = "wg0"
[open.today]
ports = 23
expires = 2026-01-01T12:00:00Z
[open.twice]
ports = 24
expires = 2026-01-01T12:00:00Z
[open.longer]
ports = 24
[block.bad]
from = "198.51.100.66"
`
	now := mustTime(t, "2026-01-01T00:00:00Z")
	rs := compiled(t, policy)
	tests := map[string]struct {
		local, remote, in string
		protocol          rules.Protocol
		fact, hint        string // "" for none
	}{
		"admitted, though limited": {local: "203.0.113.10:22", remote: "198.51.100.7:4000", in: "eth0"},
		"over ipv6":                {local: "[2001:db8::1]:22", remote: "[2001:db8::7]:4000", in: "eth0"},
		"another source": {local: "203.0.113.10:22", remote: "192.0.2.7:4000", in: "eth0",
			fact: `your own SSH session from 192.0.2.7 to 22/tcp by eth0 would be cut: no [open.*] matches, the default is drop`, hint: `add "192.0.2.7" to from of [open.ssh] (policy.toml:2)`},
		"blocked": {local: "203.0.113.10:22", remote: "198.51.100.66:4000", in: "eth0",
			fact: `block "bad" (policy.toml:`, hint: `add to [block.bad] (policy.toml:17): except = ["198.51.100.66"]`},
		"another interface": {local: "203.0.113.10:2222", remote: "192.0.2.7:4000", in: "eth0",
			fact: "2222/tcp by eth0 would be cut", hint: "[open.ssh-own]\nports = [2222]\nfrom = [\"192.0.2.7\"]"},
		"its interface":   {local: "203.0.113.10:2222", remote: "192.0.2.7:4000", in: "wg0"},
		"itself":          {local: "127.0.0.1:9", remote: "127.0.0.1:4000", in: "lo"},
		"ends soon":       {local: "203.0.113.10:23", remote: "192.0.2.7:4000", in: "eth0", fact: `ends at 2026-01-01T12:00:00Z, when open "today" (policy.toml:9) expires`},
		"one of two ends": {local: "203.0.113.10:24", remote: "192.0.2.7:4000", in: "eth0"},
		"mosh": {local: "203.0.113.10:60001", remote: "192.0.2.7:0", in: "eth0", protocol: rules.UDP,
			fact: "your own mosh session from 192.0.2.7 to 60001/udp by eth0 would be cut", hint: "[open.mosh]\nports = [60001]\nfrom = [\"192.0.2.7\"]\nprotocol = \"udp\""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := session{Protocol: tt.protocol, Local: netip.MustParseAddrPort(tt.local), Remote: netip.MustParseAddrPort(tt.remote), Interface: tt.in}
			s.Wire = s.Local
			if s.Protocol == 0 {
				s.Protocol = rules.TCP
			}
			got := cutOffs(rs, []session{s}, now)
			if tt.fact == "" {
				if len(got) != 0 {
					t.Errorf("cut: %s", got[0].fact(rs))
				}
				return
			}
			if len(got) != 1 || !strings.Contains(got[0].fact(rs), tt.fact) || tt.hint != "" && !strings.Contains(got[0].hint(rs), tt.hint) {
				t.Fatalf("%d cut, want %q, %q; %+v", len(got), tt.fact, tt.hint, got)
			}
			if got[0].ends.IsZero() != (tt.hint != "") {
				t.Errorf("ends at %v", got[0].ends)
			}
		})
	}
}

func mustTime(t *testing.T, s string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		t.Fatal(err)
	}
	return at
}
