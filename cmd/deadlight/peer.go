package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"deadlight/rules"
)

// Whom this command was started by from afar: the caller's ancestors are looked
// through for a process that carries a session, and its socket says who the peer
// is. What the environment claims counts only if a socket agrees.

// session is a connection by which somebody works on this host.
type session struct {
	Protocol rules.Protocol // TCP of SSH, UDP of mosh
	Local    netip.AddrPort // of the socket
	Remote   netip.AddrPort // of mosh without a port, where no flow tells it
	Wire     netip.AddrPort // what the peer aims at: not Local where a DNAT leads there
	// Interface is where a new connection of the peer would come in: the one that
	// the socket is bound to, else that of the way back; "" when there is none.
	Interface string
	PID       int // that holds the socket; 0: known by the environment alone
}

// String names the far end.
func (s session) String() string {
	name := "SSH"
	if s.Protocol == rules.UDP {
		name = "mosh"
	}
	return fmt.Sprintf("%s session from %s", name, s.Remote.Addr())
}

// errPeerUnknown says that there is a session whose socket cannot be seen.
var errPeerUnknown = errors.New("cannot tell who is at the other end of this SSH session")

// operator finds the sessions through which the caller works in the network
// namespace of the calling thread. None: the console, a service, or a session of
// another namespace. There may be several: ssh to this host itself and on, or a
// terminal that several look at. The error is [errPeerUnknown] when there is one
// and its peer cannot be told.
func operator() ([]session, error) {
	return (&tracer{
		proc: "/proc", connection: os.Getenv("SSH_CONNECTION"),
		established: establishedTCP, bound: boundUDP, flows: udpFlows, wire: onWire, inbound: wayBack, readDir: os.ReadDir,
	}).trace(os.Getpid())
}

// tracer walks the processes; its fields are the kernel, or a test.
type tracer struct {
	proc        string // where proc(5) is mounted
	connection  string // SSH_CONNECTION of the caller
	established func() ([]endpoint, error)
	bound       func() ([]endpoint, error)
	flows       func(port uint16) (endpoint, bool, error) // the newest UDP flow to a port
	wire        func(endpoint) (netip.AddrPort, error)
	inbound     func(endpoint) (string, error)
	readDir     func(string) ([]fs.DirEntry, error) // of /proc/PID/fd

	tcp    map[uint32]endpoint // by inode; nil: not asked for yet
	queue  []int
	seen   map[int]bool
	found  []session
	hidden []int    // session processes that we may not look into
	hints  []string // SSH_CONNECTION of the caller and its ancestors
}

// endpoint is a socket with its two ends.
type endpoint struct {
	inode         uint32
	local, remote netip.AddrPort
	bound         int // interface; 0: none
}

// process is what proc_pid_status(5) tells of one.
type process struct {
	name   string
	parent int
	uid    string // real
}

// The processes that carry a session, by their names. sshd-session is that of
// OpenSSH 9.8 and later.
func isSSHServer(name string) bool {
	return name == "sshd" || name == "sshd-session" || name == "dropbear"
}

func isMosh(name string) bool { return name == "mosh-server" }

// isMultiplexer reports whether a process keeps terminals for clients that come
// and go, so that its parent says nothing.
func isMultiplexer(name string) bool {
	return strings.HasPrefix(name, "tmux") || strings.EqualFold(name, "screen")
}

func (t *tracer) trace(pid int) ([]session, error) {
	t.seen = map[int]bool{}
	t.hints = append(t.hints, t.connection)
	t.queue = append(t.queue, pid)
	for len(t.queue) > 0 {
		next := t.queue[0]
		t.queue = t.queue[1:]
		if err := t.walk(next); err != nil {
			return nil, err
		}
	}
	if len(t.found) == 0 {
		if err := t.fromHints(); err != nil {
			return nil, err
		}
	}
	if len(t.found) == 0 && len(t.hidden) > 0 {
		return nil, t.unseen()
	}
	for i := range t.found {
		if err := t.complete(&t.found[i]); err != nil {
			return nil, err
		}
	}
	return t.found, nil
}

// complete asks by which way new connections of a session's peer come.
func (t *tracer) complete(s *session) (err error) {
	e := endpoint{local: s.Local, remote: s.Remote}
	if s.Wire = s.Local; s.Protocol == rules.TCP {
		if s.Wire, err = t.wire(e); err != nil {
			return err
		}
	}
	if s.Interface == "" {
		s.Interface, err = t.inbound(e)
	}
	return err
}

// walk goes from a process to the first one, and looks for sessions on the way.
func (t *tracer) walk(pid int) error {
	for pid > 0 && !t.seen[pid] {
		t.seen[pid] = true
		p, err := t.status(pid)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it has ended
		}
		if errors.Is(err, fs.ErrPermission) {
			t.hidden = append(t.hidden, pid)
			return nil
		}
		if err != nil {
			return err
		}
		t.hints = append(t.hints, t.claimed(pid))
		switch {
		case isSSHServer(p.name):
			err = t.server(pid)
		case isMosh(p.name):
			err = t.mosh(pid)
		case isMultiplexer(p.name):
			err = t.clients(p)
		}
		if err != nil {
			return err
		}
		pid = p.parent
	}
	return nil
}

// server takes the session of an SSH server: of its sockets the one that it was
// given first. Those of forwarded ports come later and have higher numbers.
func (t *tracer) server(pid int) error {
	inodes, err := t.sockets(pid)
	if err != nil {
		return err
	}
	if err := t.list(); err != nil {
		return err
	}
	for _, inode := range inodes {
		if e, ok := t.tcp[inode]; ok {
			return t.add(rules.TCP, e, pid)
		}
	}
	return nil
}

// list asks for the connections of this namespace, once.
func (t *tracer) list() error {
	if t.tcp != nil {
		return nil
	}
	all, err := t.established()
	if err != nil {
		return err
	}
	t.tcp = make(map[uint32]endpoint, len(all))
	for _, e := range all {
		t.tcp[e.inode] = e
	}
	return nil
}

// add notes a session, and follows one that came from this host to who made it.
func (t *tracer) add(p rules.Protocol, e endpoint, pid int) error {
	s := session{Protocol: p, Local: e.local, Remote: e.remote, PID: pid}
	known := func(o session) bool { return o.Protocol == p && o.Local == s.Local && o.Remote == s.Remote }
	if slices.ContainsFunc(t.found, known) {
		return nil
	}
	if e.bound != 0 {
		var err error
		if s.Interface, err = t.inbound(e); err != nil {
			return err
		}
	}
	t.found = append(t.found, s)
	for _, other := range t.tcp {
		if p == rules.TCP && other.local == e.remote && other.remote == e.local {
			holders, err := t.holders(other.inode)
			if err != nil {
				return err
			}
			t.queue = append(t.queue, holders...)
		}
	}
	return nil
}

// mosh takes the session of a mosh server. Its socket is bound and not
// connected: the peer is that of the newest flow to its port, else the one that
// began the session over SSH.
func (t *tracer) mosh(pid int) error {
	inodes, err := t.sockets(pid)
	if err != nil {
		return err
	}
	all, err := t.bound()
	if err != nil {
		return err
	}
	for _, e := range all {
		if !slices.Contains(inodes, e.inode) {
			continue
		}
		flow, ok, err := t.flows(e.local.Port())
		if err != nil {
			return err
		}
		if ok {
			flow.bound = e.bound
			return t.add(rules.UDP, flow, pid)
		}
		if remote, local, ok := parseConnection(t.claimed(pid)); ok {
			return t.add(rules.UDP, endpoint{
				local:  netip.AddrPortFrom(local.Addr(), e.local.Port()),
				remote: netip.AddrPortFrom(remote.Addr(), 0), bound: e.bound}, pid)
		}
		return fmt.Errorf("%w: mosh-server (pid %d) does not say", errPeerUnknown, pid)
	}
	return nil
}

// clients goes on from those who look at a multiplexer's terminals: its clients
// of the same user. A terminal that nobody looks at has no peer.
func (t *tracer) clients(server process) error {
	kind := strings.ToLower(server.name[:4])
	return t.every(func(pid int) error {
		p, err := t.status(pid)
		if err == nil && p.uid == server.uid && isMultiplexer(p.name) && strings.HasPrefix(strings.ToLower(p.name), kind) {
			t.queue = append(t.queue, pid)
		}
		return nil // one that has ended is no client
	})
}

// fromHints believes SSH_CONNECTION where a connection agrees with it.
func (t *tracer) fromHints() error {
	for _, h := range t.hints {
		remote, local, ok := parseConnection(h)
		if !ok {
			continue
		}
		if err := t.list(); err != nil {
			return err
		}
		for _, e := range t.tcp {
			if e.local == local && e.remote == remote {
				return t.add(rules.TCP, e, 0)
			}
		}
	}
	return nil
}

// unseen says that a session cannot be told, unless it cannot be one of this
// namespace.
func (t *tracer) unseen() error {
	if err := t.list(); err != nil {
		return err
	}
	if len(t.tcp) == 0 {
		return nil
	}
	own, err := os.Readlink(filepath.Join(t.proc, "thread-self/ns/net"))
	if err != nil {
		return fmt.Errorf("identify the network namespace: %w", err)
	}
	for _, pid := range t.hidden {
		theirs, err := os.Readlink(t.path(pid, "ns/net"))
		if err != nil || theirs == own {
			return fmt.Errorf("%w: no permission to look at process %d", errPeerUnknown, pid)
		}
	}
	return nil
}

// parseConnection reads SSH_CONNECTION: client address and port, then the
// server's (ssh(1)).
func parseConnection(s string) (remote, local netip.AddrPort, ok bool) {
	f := strings.Fields(s)
	if len(f) != 4 {
		return remote, local, false
	}
	ends := [2]netip.AddrPort{}
	for i := range ends {
		addr, err1 := netip.ParseAddr(f[2*i])
		port, err2 := strconv.ParseUint(f[2*i+1], 10, 16)
		if err1 != nil || err2 != nil {
			return remote, local, false
		}
		ends[i] = netip.AddrPortFrom(addr.Unmap().WithZone(""), uint16(port))
	}
	return ends[0], ends[1], true
}

func (t *tracer) path(pid int, name string) string {
	return filepath.Join(t.proc, strconv.Itoa(pid), name)
}

func (t *tracer) status(pid int) (process, error) {
	b, err := os.ReadFile(t.path(pid, "status"))
	if err != nil {
		return process{}, err
	}
	var p process
	for line := range strings.Lines(string(b)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":\t")
		switch key {
		case "Name":
			p.name = value
		case "PPid":
			if p.parent, err = strconv.Atoi(value); err != nil {
				return p, fmt.Errorf("read the parent of process %d: %w", pid, err)
			}
		case "Uid":
			p.uid, _, _ = strings.Cut(value, "\t")
		}
	}
	return p, nil
}

// claimed is SSH_CONNECTION in the environment a process was started with; ""
// where that may not be read.
func (t *tracer) claimed(pid int) string {
	b, err := os.ReadFile(t.path(pid, "environ"))
	if err != nil {
		return ""
	}
	for _, v := range strings.Split(string(b), "\x00") {
		if value, ok := strings.CutPrefix(v, "SSH_CONNECTION="); ok {
			return value
		}
	}
	return ""
}

// sockets lists the inodes of a session process's sockets, the first opened
// first. One that we may not look into is noted.
func (t *tracer) sockets(pid int) ([]uint32, error) {
	inodes, err := t.inodes(pid)
	switch {
	case errors.Is(err, fs.ErrPermission):
		t.hidden = append(t.hidden, pid)
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil // it has ended
	}
	return inodes, err
}

func (t *tracer) inodes(pid int) ([]uint32, error) {
	dir := t.path(pid, "fd")
	entries, err := t.readDir(dir)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int {
		return cmp.Or(cmp.Compare(len(a.Name()), len(b.Name())), cmp.Compare(a.Name(), b.Name()))
	})
	var out []uint32
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // closed since
		}
		if err != nil {
			return nil, err
		}
		if inode, ok := socketInode(link); ok {
			out = append(out, inode)
		}
	}
	return out, nil
}

// socketInode reads what a file descriptor in proc_pid_fd(5) links to.
func socketInode(link string) (uint32, bool) {
	text, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	inode, err := strconv.ParseUint(strings.TrimSuffix(text, "]"), 10, 32)
	return uint32(inode), err == nil
}

// holders finds the processes that hold a socket. Those that we may not look
// into do not count: the session is checked already, this is who began it.
func (t *tracer) holders(inode uint32) ([]int, error) {
	var out []int
	err := t.every(func(pid int) error {
		inodes, err := t.inodes(pid)
		if err == nil && slices.Contains(inodes, inode) {
			out = append(out, pid)
		}
		return nil
	})
	return out, err
}

// every calls fn for each process.
func (t *tracer) every(fn func(pid int) error) error {
	entries, err := os.ReadDir(t.proc)
	if err != nil {
		return fmt.Errorf("list the processes: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue // not a process
		}
		if err := fn(pid); err != nil {
			return err
		}
	}
	return nil
}
