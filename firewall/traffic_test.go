package firewall

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// What stands for a client outside, and the ports of the host.
const (
	client4 = "203.0.113.20"
	client6 = "2001:db8:77::20"

	closedPort  = 4444 // somebody listens, no policy opens it to the outside
	echoPort    = 7000 // the established flows
	connectPort = 8000 // the short connections
	canaryPort  = 8001 // open, and nobody listens: every SYN draws just one RST
)

// The load: packets a second, and how many of them are canaries.
const (
	floodRate   = 20000
	canaryEvery = 20
	connectRate = 500
	// slowConnect is less than a lost SYN takes: it is sent again after 1 s.
	slowConnect = 900 * time.Millisecond
)

// account is what the traffic saw: counts since its start, and the longest stall
// since the last reading.
type account struct {
	SYNs, Canaries  uint64 // sent to the closed port, and to the canary port
	Leaked          uint64 // answers of the closed port
	CanaryAnswers   uint64
	Missed          uint64 // frames that the capture lost
	Connects        uint64 // begun
	Exchanges       uint64 // that ended as they should
	Failures        uint64
	Why             []string // the first failures
	SlowestConnect  time.Duration
	Messages        uint64 // of the echo flows, answered
	Stall           time.Duration
	FlowsThatFailed []string
}

// traffic is the load on a host. It is a process of its own, so that neither the
// scheduler nor the garbage collector of the test delays it.
type traffic struct {
	tb  testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

// trafficEnv tells a child to be the traffic, and where.
const trafficEnv = "DEADLIGHT_TEST_TRAFFIC"

// startTraffic gives the outside addresses of its own and starts the listeners
// inside the host and, after begin, the load.
func startTraffic(tb testing.TB, w *verify.World) *traffic {
	tb.Helper()
	l := w.Link("eth0")
	for _, args := range []string{
		"addr add " + client4 + "/32 dev " + l.Name,
		"addr add " + client6 + "/128 nodad dev " + l.Name,
		"route add " + host4.String() + " src " + client4 + " dev " + l.Name,
		"-6 route add " + host6.String() + " src " + client6 + " dev " + l.Name,
		"neigh replace " + host4.String() + " nud permanent lladdr " + l.Dst.String() + " dev " + l.Name,
		"neigh replace " + host6.String() + " nud permanent lladdr " + l.Dst.String() + " dev " + l.Name,
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			tb.Fatalf("ip %s: %v\n%s", args, err, out)
		}
	}
	where, err := json.Marshal(l)
	if err != nil {
		tb.Fatal(err)
	}
	t := &traffic{tb: tb, cmd: exec.Command("/proc/self/exe")}
	t.cmd.Env = append(os.Environ(), trafficEnv+"="+string(where))
	t.cmd.ExtraFiles = []*os.File{w.HostFile()}
	t.cmd.Stderr = os.Stderr
	if t.in, err = t.cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	out, err := t.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	t.out = bufio.NewReader(out)
	if err := t.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		t.in.Close() // it ends
		if err := t.cmd.Wait(); err != nil {
			tb.Errorf("traffic: %v", err)
		}
	})
	t.ask("listen")
	return t
}

// ask sends one command and gives the answer.
func (t *traffic) ask(command string) account {
	t.tb.Helper()
	if _, err := fmt.Fprintln(t.in, command); err != nil {
		t.tb.Fatalf("traffic: %v", err)
	}
	line, err := t.out.ReadBytes('\n')
	if err != nil {
		t.tb.Fatalf("traffic: %v", err)
	}
	var a account
	if err := json.Unmarshal(line, &a); err != nil {
		t.tb.Fatalf("traffic: %v", err)
	}
	return a
}

// begin starts the load and returns once the echo flows stand.
func (t *traffic) begin() { t.tb.Helper(); t.ask("begin") }

// read gives the account so far, and begins a new longest stall.
func (t *traffic) read() account { t.tb.Helper(); return t.ask("read") }

// end stops the load, waits for the last answers and gives the whole account.
func (t *traffic) end() account { t.tb.Helper(); return t.ask("end") }

// runTraffic is the process: it obeys its standard input until that ends.
func runTraffic(where string) error {
	if err := goFirst(); err != nil {
		return err
	}
	runtime.GOMAXPROCS(16) // the kernel shares out the processors, not this program
	l := &load{stop: make(chan struct{})}
	if err := json.Unmarshal([]byte(where), &l.link); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		var err error
		switch in.Text() {
		case "listen":
			err = l.listen()
		case "begin":
			err = l.begin()
		case "end":
			close(l.stop)
			l.running.Wait()
			time.Sleep(200 * time.Millisecond)
		}
		if err == nil {
			var t account
			if t, err = l.read(); err == nil {
				err = out.Encode(t)
			}
		}
		if err != nil {
			return err
		}
	}
	return in.Err()
}

// goFirst puts the process before all others where it may: what stalls it then
// is what we look for, and not a busy machine.
func goFirst() error {
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy == unix.SCHED_RR {
		return err
	}
	runtime.LockOSThread() // whose policy a new program has for all its threads
	defer runtime.UnlockOSThread()
	err = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1}, 0)
	if errors.Is(err, unix.EPERM) {
		return nil
	}
	if err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}

// load is the state of that process.
type load struct {
	link    verify.Link
	ear     int // captures
	stop    chan struct{}
	running sync.WaitGroup

	syns, canaries, leaked, canaryAnswers, missed atomic.Uint64

	mu    sync.Mutex
	t     account
	flows []*echoFlow
}

// listen opens the ports inside the host, file 3, and the capture outside.
func (l *load) listen() error {
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		failed <- func() error {
			if err := unix.Setns(3, unix.CLONE_NEWNET); err != nil {
				return err
			}
			for _, port := range []int{closedPort, echoPort, connectPort} {
				ln, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
				if err != nil {
					return err
				}
				if port != closedPort { // the kernel answers without us
					go echo(ln)
				}
			}
			return nil
		}()
	}()
	if err := <-failed; err != nil {
		return fmt.Errorf("listen in the host: %w", err)
	}
	return l.capture()
}

func echo(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			_, _ = io.Copy(c, c) // the client tells whether it worked
		}()
	}
}

// capture counts what leaves the closed port and the canary port.
func (l *load) capture() error {
	var err error
	if l.ear, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return err
	}
	keep, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IPV6, SkipTrue: 5},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_IP, SkipTrue: 10},
		bpf.LoadAbsolute{Off: 23, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 8},
		bpf.LoadAbsolute{Off: 34, Size: 2},
		bpf.Jump{Skip: 3},
		bpf.LoadAbsolute{Off: 20, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.IPPROTO_TCP, SkipTrue: 4},
		bpf.LoadAbsolute{Off: 54, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: closedPort, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: canaryPort, SkipTrue: 1},
		bpf.RetConstant{Val: 128},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	program := make([]unix.SockFilter, len(keep))
	for i, k := range keep {
		program[i] = unix.SockFilter{Code: k.Op, Jt: k.Jt, Jf: k.Jf, K: k.K}
	}
	if err := unix.SetsockoptSockFprog(l.ear, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}); err != nil {
		return err
	}
	if err := grow(l.ear, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, 64<<20); err != nil {
		return err
	}
	const every = uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	if err := unix.Bind(l.ear, &unix.SockaddrLinklayer{Protocol: every, Ifindex: l.link.Index}); err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 256)
		for {
			n, _, err := unix.Recvfrom(l.ear, buf, 0)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				l.fail("capture: %v", err)
				return
			}
			if a, ok := parseAnswer(buf[:n]); ok && a.SrcPort == canaryPort {
				l.canaryAnswers.Add(1)
			} else {
				l.leaked.Add(1)
			}
		}
	}()
	return nil
}

func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.Failures++
	if len(l.t.Why) < 10 {
		l.t.Why = append(l.t.Why, fmt.Sprintf(format, args...))
	}
}

func (l *load) begin() error {
	for _, host := range []netip.Addr{host4, host6} {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(host, echoPort).String(), patience)
		if err != nil {
			return err
		}
		f := &echoFlow{c: c, sent: map[uint32]time.Time{}}
		l.flows = append(l.flows, f)
		l.running.Add(1)
		go func() { defer l.running.Done(); f.send(l.stop) }()
		go f.receive()
	}
	l.running.Add(2)
	go func() { defer l.running.Done(); l.flood() }()
	go func() { defer l.running.Done(); l.connect() }()
	return nil
}

func (l *load) read() (account, error) {
	stats, err := unix.GetsockoptTpacketStats(l.ear, unix.SOL_PACKET, unix.PACKET_STATISTICS) // since it was asked last
	if err != nil {
		return account{}, err
	}
	l.missed.Add(uint64(stats.Drops))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.SYNs, l.t.Canaries, l.t.Leaked = l.syns.Load(), l.canaries.Load(), l.leaked.Load()
	l.t.CanaryAnswers, l.t.Missed = l.canaryAnswers.Load(), l.missed.Load()
	l.t.Messages, l.t.Stall, l.t.FlowsThatFailed = 0, 0, nil
	for _, f := range l.flows {
		f.read(&l.t)
	}
	return l.t, nil
}

// paced calls fn with how many of rate a second are due, every millisecond.
func paced(rate int, stop chan struct{}, fn func(n int) error) error {
	begun, done := time.Now(), 0
	for {
		select {
		case <-stop:
			return nil
		case <-time.After(time.Millisecond):
		}
		due := int(time.Since(begun)*time.Duration(rate)/time.Second) - done
		if most := rate / 100; due > most { // what was missed is not made up for all at once
			begun = begun.Add(time.Duration(due-most) * time.Second / time.Duration(rate))
			due = most
		}
		if err := fn(due); err != nil {
			return err
		}
		done += due
	}
}

// flood sends SYNs from ever new ports of strangers, of both families in turn.
func (l *load) flood() {
	v, err := newVolley(l.link)
	if err != nil {
		l.fail("flood: %v", err)
		return
	}
	defer v.close()
	n := 0
	if err := paced(floodRate, l.stop, func(due int) error {
		v.frames = v.frames[:0]
		var canaries uint64
		for range due {
			n++
			p := packet{flags: syn, seq: uint32(n), Packet: rules.Packet{Protocol: rules.TCP, SrcPort: uint16(10000 + n/2%50000), DstPort: closedPort}}
			if n/2%canaryEvery == 0 {
				p.DstPort = canaryPort
				canaries++
			}
			stranger := byte(n/100000%250 + 1)
			p.Src, p.Dst = netip.AddrFrom4([4]byte{198, 51, 100, stranger}), host4
			if n%2 == 0 {
				p.Src, p.Dst = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0x99, 15: stranger}), host6
			}
			v.frames = append(v.frames, frame(l.link, p.bytes()))
		}
		if err := v.send(); err != nil {
			return err
		}
		l.syns.Add(uint64(due) - canaries)
		l.canaries.Add(canaries)
		return nil
	}); err != nil {
		l.fail("flood: %v", err)
	}
}

// connect begins short connections, of both families in turn.
func (l *load) connect() {
	n := 0
	if err := paced(connectRate, l.stop, func(due int) error {
		for range due {
			n++
			host := host4
			if n%2 == 0 {
				host = host6
			}
			l.running.Add(1)
			go func() { defer l.running.Done(); l.exchange(netip.AddrPortFrom(host, connectPort)) }()
		}
		return nil
	}); err != nil {
		l.fail("connect: %v", err)
	}
}

func (l *load) exchange(to netip.AddrPort) {
	begun := time.Now()
	c, err := net.DialTimeout("tcp", to.String(), patience)
	took := time.Since(begun)
	if err == nil {
		err = func() error {
			defer c.Close()
			if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
				return err
			}
			said := []byte("anybody there?")
			if _, err := c.Write(said); err != nil {
				return err
			}
			_, err := io.ReadFull(c, said)
			return err
		}()
	}
	if err != nil {
		l.fail("%s: %v", to, err)
	} else if took > slowConnect {
		l.fail("%s: connected after %v", to, took)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.t.Connects++
	if err == nil {
		l.t.Exchanges++
	}
	l.t.SlowestConnect = max(l.t.SlowestConnect, took)
}

// echoFlow is an established connection with a message every millisecond.
type echoFlow struct {
	c        net.Conn
	mu       sync.Mutex
	sent     map[uint32]time.Time // and not yet answered
	answered uint64
	stall    time.Duration // the longest time for an answer
	err      error
}

func (f *echoFlow) send(stop chan struct{}) {
	n := uint32(0)
	if err := paced(1000, stop, func(due int) error {
		if due == 0 {
			return nil
		}
		n++
		f.mu.Lock()
		f.sent[n] = time.Now()
		f.mu.Unlock()
		_, err := f.c.Write([]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
		return err
	}); err != nil {
		f.mu.Lock()
		f.err = err
		f.mu.Unlock()
	}
}

func (f *echoFlow) receive() {
	buf := make([]byte, 4)
	for {
		_, err := io.ReadFull(f.c, buf)
		now := time.Now()
		f.mu.Lock()
		if err != nil {
			f.err = err
			f.mu.Unlock()
			return
		}
		n := be32(buf)
		f.stall = max(f.stall, now.Sub(f.sent[n]))
		delete(f.sent, n)
		f.answered++
		f.mu.Unlock()
	}
}

// read adds what the flow saw; a message that still waits counts too.
func (f *echoFlow) read(t *account) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, at := range f.sent {
		f.stall = max(f.stall, time.Since(at))
	}
	t.Stall = max(t.Stall, f.stall)
	t.Messages += f.answered
	f.stall = 0
	if f.err != nil {
		t.FlowsThatFailed = append(t.FlowsThatFailed, f.err.Error())
	}
}

// volley sends many frames with one system call.
type volley struct {
	fd      int
	frames  [][]byte
	headers []multiHeader
	parts   []unix.Iovec
}

// multiHeader is struct mmsghdr (sendmmsg(2)).
type multiHeader struct {
	unix.Msghdr
	sent uint32
}

func newVolley(l verify.Link) (*volley, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1),
		unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: l.Index}),
	); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &volley{fd: fd}, nil
}

func (v *volley) close() { unix.Close(v.fd) }

// send sends the frames, all of them.
func (v *volley) send() error {
	v.headers = append(v.headers[:0], make([]multiHeader, len(v.frames))...)
	v.parts = append(v.parts[:0], make([]unix.Iovec, len(v.frames))...)
	for i, f := range v.frames {
		v.parts[i].Base = &f[0]
		v.parts[i].SetLen(len(f))
		v.headers[i].Iov = &v.parts[i]
		v.headers[i].SetIovlen(1)
	}
	for rest := v.headers; len(rest) > 0; {
		n, _, errno := syscall.Syscall6(unix.SYS_SENDMMSG, uintptr(v.fd), uintptr(unsafe.Pointer(&rest[0])), uintptr(len(rest)), 0, 0, 0)
		if errno != 0 && errno != unix.EINTR && errno != unix.ENOBUFS {
			return errno
		}
		if errno == 0 {
			rest = rest[n:]
		}
	}
	return nil
}
