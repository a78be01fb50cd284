package verify

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	"deadlight/rules"

	"golang.org/x/sys/unix"
)

// Listeners are real sockets behind many ports: TCP accepts and closes, UDP
// sends every datagram back. One goroutine serves them all.
type Listeners struct {
	epoll, wake int
	sockets     map[int]rules.Protocol // by file descriptor
	done        chan struct{}
	close       sync.Once
}

// lowFDs stay free for others: select(2), which a netlink library uses, cannot
// watch a higher descriptor.
const lowFDs = 1024

// reservedFDs are left for everybody else when [MaxListeners] counts.
const reservedFDs = 256

// MaxListeners says how many more ports this process can listen on: its limit
// of open files (RLIMIT_NOFILE, the hard one), less those in use and a reserve.
func MaxListeners() int {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	used, err := os.ReadDir("/proc/thread-self/fd")
	if err != nil {
		return 0
	}
	most := min(limit.Max, 1<<20) // more than every port of every protocol
	return max(0, int(most)-len(used)-reservedFDs)
}

// Listen listens on every address of a network namespace, of both families
// where the kernel has IPv6. It raises the limit of open files as far as this
// process may. A port that is taken (EADDRINUSE) and a limit that is reached
// (EMFILE, see [MaxListeners]) are errors that name the port; then nothing
// listens.
func Listen(in Runner, tcp, udp []uint16) (*Listeners, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err == nil && limit.Cur < limit.Max {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) // without it fewer ports fit
	}
	l := &Listeners{epoll: -1, wake: -1, sockets: map[int]rules.Protocol{}, done: make(chan struct{})}
	if err := l.open(in, tcp, udp); err != nil {
		l.closeAll()
		return nil, err
	}
	go l.serve()
	return l, nil
}

func (l *Listeners) open(in Runner, tcp, udp []uint16) error {
	var err error
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if l.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if err := l.watch(l.wake); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	return in(func() error {
		family := unix.AF_INET6
		if _, err := os.Stat("/proc/thread-self/net/if_inet6"); err != nil {
			family = unix.AF_INET
		}
		for _, p := range []struct {
			protocol rules.Protocol
			ports    []uint16
		}{{rules.TCP, tcp}, {rules.UDP, udp}} {
			for _, port := range p.ports {
				if err := l.listen(family, p.protocol, port); err != nil {
					if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
						return fmt.Errorf("listen on %d/%s, the %dth socket: %w", port, p.protocol, len(l.sockets)+1, err)
					}
					return fmt.Errorf("listen on %d/%s: %w", port, p.protocol, err)
				}
			}
		}
		return nil
	})
}

// listen adds one socket.
func (l *Listeners) listen(family int, p rules.Protocol, port uint16) error {
	if port == 0 {
		return errors.New("port 0 is no port")
	}
	kind := unix.SOCK_STREAM
	if p == rules.UDP {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, lowFDs); err == nil {
		unix.Close(fd)
		fd = high
	} // else no high one is left, or the limit allows none
	if err := l.bind(fd, family, p, port); err != nil {
		unix.Close(fd)
		return err
	}
	l.sockets[fd] = p
	return nil
}

func (l *Listeners) bind(fd, family int, p rules.Protocol, port uint16) error {
	var any unix.Sockaddr = &unix.SockaddrInet4{Port: int(port)}
	if family == unix.AF_INET6 {
		// The default of V6ONLY is a sysctl.
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return err
		}
		any = &unix.SockaddrInet6{Port: int(port)}
	}
	if p == rules.UDP {
		// An answer must come from the address that was asked, of several.
		level, option := unix.IPPROTO_IP, unix.IP_PKTINFO
		if family == unix.AF_INET6 {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO
		}
		if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, any); err != nil {
		return err
	}
	if p == rules.TCP {
		if err := unix.Listen(fd, 128); err != nil {
			return err
		}
	}
	return l.watch(fd)
}

func (l *Listeners) watch(fd int) error {
	return unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// serve runs until the wake descriptor is readable.
func (l *Listeners) serve() {
	defer close(l.done)
	events := make([]unix.EpollEvent, 256)
	buf := make([]byte, 65536)
	control := make([]byte, 256)
	for {
		n, err := unix.EpollWait(l.epoll, events, -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return // only a bad descriptor, and it is ours alone
		}
		for _, e := range events[:max(n, 0)] {
			switch fd := int(e.Fd); {
			case fd == l.wake:
				return
			case l.sockets[fd] == rules.TCP:
				acceptAll(fd)
			default:
				echoAll(fd, buf, control)
			}
		}
	}
}

// turn bounds what one socket gets before the others have theirs.
const turn = 64

func acceptAll(fd int) {
	for range turn {
		c, _, err := unix.Accept4(fd, unix.SOCK_CLOEXEC)
		switch {
		case err == nil:
			unix.Close(c)
		case errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EINTR):
		default:
			return
		}
	}
}

func echoAll(fd int, buf, control []byte) {
	for range turn {
		n, cn, _, from, err := unix.Recvmsg(fd, buf, control, 0)
		switch {
		case err == nil:
			// What cannot be answered (a multicast address has no voice) is not.
			_ = unix.Sendmsg(fd, buf[:n], answerFrom(control[:cn]), from, unix.MSG_DONTWAIT)
		case errors.Is(err, unix.EAGAIN):
			return
		}
		// Other errors are what ICMP told about an earlier answer: the next call is fine.
	}
}

// answerFrom makes a control message that sends from the address a datagram was
// sent to, by whatever link the routes say.
func answerFrom(control []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[4:8])}) // behind the index of the link
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}) // IPv4 comes mapped
		}
	}
	return nil
}

// Close ends all of them.
func (l *Listeners) Close() error {
	l.close.Do(func() {
		_, _ = unix.Write(l.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		<-l.done
		l.closeAll()
	})
	return nil
}

func (l *Listeners) closeAll() {
	for fd := range l.sockets {
		unix.Close(fd)
	}
	for _, fd := range []int{l.epoll, l.wake} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// SpreadPorts chooses up to budget ports that are not listed, ascending, always
// the same ones: first the neighbours of listed ports, where a range that ends
// one too late would show, then ports that services are known by, 1 and 65535,
// and the rest spread evenly over all ports.
func SpreadPorts(listed []uint16, budget int) []uint16 {
	var taken [1 << 16]bool
	taken[0] = true
	free := 1<<16 - 1
	for _, p := range listed {
		if !taken[p] {
			taken[p] = true
			free--
		}
	}
	budget = min(budget, free)
	if budget <= 0 {
		return nil
	}
	chosen := make([]uint16, 0, budget)
	take := func(p int) {
		if p > 0 && p < 1<<16 && !taken[p] && len(chosen) < budget {
			taken[p] = true
			chosen = append(chosen, uint16(p))
		}
	}
	neighbours := slices.Clone(listed)
	slices.Sort(neighbours)
	for _, p := range slices.Compact(neighbours) {
		take(int(p) - 1)
		take(int(p) + 1)
	}
	for _, p := range knownPorts() {
		take(p)
	}
	take(1)
	take(1<<16 - 1)
	rest := budget - len(chosen)
	for i := range rest {
		p := 1 + (2*i+1)*(1<<16-1)/(2*rest) // the middle of each of rest equal parts
		for taken[p] {
			if p++; p == 1<<16 {
				p = 1
			}
		}
		take(p)
	}
	slices.Sort(chosen)
	return chosen
}

// knownPorts are those that intruders and scanners try first.
func knownPorts() []int {
	return []int{
		21, 22, 23, 25, 53, 67, 68, 69, 80, 88, 110, 111, 123, 135, 137, 138, 139, 143, 161, 162, 179,
		389, 443, 445, 500, 514, 515, 520, 546, 547, 548, 554, 587, 623, 631, 636, 853, 873, 993, 995,
		1080, 1194, 1433, 1434, 1521, 1701, 1723, 1812, 1883, 1900, 2049, 2181, 2375, 2376, 2377, 2379,
		2380, 3000, 3128, 3260, 3268, 3306, 3389, 3478, 4369, 4444, 4500, 4789, 5000, 5001, 5060, 5061,
		5353, 5355, 5432, 5555, 5601, 5671, 5672, 5683, 5900, 5984, 5985, 5986, 6000, 6379, 6443, 6667,
		7000, 7001, 7946, 8000, 8006, 8008, 8080, 8081, 8086, 8123, 8443, 8472, 8500, 8834, 8883, 8888,
		9000, 9042, 9090, 9092, 9093, 9100, 9200, 9300, 9418, 9443, 9999, 10000, 10050, 10051, 10250,
		10255, 10256, 11211, 15672, 16443, 25565, 27017, 30000, 32400, 32768, 49152, 50000, 51820, 60000,
	}
}
