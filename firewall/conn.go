package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Conn is a netlink socket in one network namespace. It is not for concurrent
// use.
type Conn struct {
	// Known gives a large set by its name and the digest of its content, or nil:
	// what was applied last. With it a changed list
	// is sent as its changes, and a check can look elements up. It may be nil.
	Known func(set, digest string) *rules.Set
	// Hush is called before a transaction of many elements, and done after it: for
	// whom listens, the kernel makes an event of each. It may be nil.
	Hush func(elements int) (done func() error, err error)

	fd  int
	ns  *os.File // kept open: a freed fd number could come to mean another namespace
	seq uint32
	buf []byte
}

// message is one netfilter netlink message, with its nfgenmsg family but
// without headers.
type message struct {
	typ   uint16 // NFT_MSG_*
	flags uint16 // NLM_F_* beyond NLM_F_REQUEST
	attrs []byte
	what  string // for people: what the message changes
	// write appends the attributes instead, size of them at most: a million
	// elements are encoded once, where they are sent from.
	write func(b []byte) []byte
	size  int
	many  int // how many ranges write writes
}

// body gives the attributes.
func (m message) body() []byte {
	if m.write != nil {
		return m.write(nil)
	}
	return m.attrs
}

const (
	nlmsgHeader = 16
	nfgenHeader = 4 // family, version, resource id
	headers     = nlmsgHeader + nfgenHeader
	maxRecv     = 1 << 17
)

// Dial opens a socket in the network namespace that ns refers to, or in that of
// the calling thread when ns is nil. The socket proves where it is before it is
// handed out: errors.Is(err, ErrNamespace) when it is elsewhere.
func Dial(ns *os.File) (*Conn, error) {
	type result struct {
		c   *Conn
		err error
	}
	if ns == nil {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			return nil, fmt.Errorf("find the network namespace: %w", err)
		}
		return open(own)
	}
	own, err := dup(ns)
	if err != nil {
		return nil, err
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread has left its namespace and ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: errors.Join(fmt.Errorf("enter the network namespace: %w", err), own.Close())}
			return
		}
		c, err := open(own)
		done <- result{c, err}
	}()
	r := <-done
	return r.c, r.err
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("keep the network namespace open: %w", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// open makes the socket on a thread that is in ns already, and takes ns over.
func open(ns *os.File) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open a netfilter socket: %w", err), ns.Close())
	}
	c := &Conn{fd: fd, ns: ns, buf: make([]byte, maxRecv)}
	if err := c.setup(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func (c *Conn) setup() error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("bind the netfilter socket: %w", err)
	}
	// The kernel's own words beside an errno, and short acks.
	for _, opt := range []int{unix.NETLINK_EXT_ACK, unix.NETLINK_CAP_ACK} {
		if err := unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, opt, 1); err != nil {
			return fmt.Errorf("set up the netfilter socket: %w", err)
		}
	}
	if err := grow(c.fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, 8<<20); err != nil {
		return fmt.Errorf("set up the netfilter socket: %w", err)
	}
	return c.checkNamespace()
}

// grow sets a buffer size, with force where the user may, else as far as
// net.core.*mem_max goes.
func grow(fd, force, polite, size int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size); err == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, polite, size)
}

// checkNamespace compares the namespace of the socket with the one it was meant
// for (SIOCGSKNS, net/socket.c). Any doubt is a refusal.
func (c *Conn) checkNamespace() error {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), unix.SIOCGSKNS, 0)
	if errno == unix.EPERM {
		return ErrPermission
	}
	if errno != 0 {
		return fmt.Errorf("%w: %w", ErrNamespace, errno)
	}
	defer unix.Close(int(fd))
	var got, want unix.Stat_t
	if err := unix.Fstat(int(fd), &got); err != nil {
		return fmt.Errorf("%w: %w", ErrNamespace, err)
	}
	if err := unix.Fstat(int(c.ns.Fd()), &want); err != nil {
		return fmt.Errorf("%w: %w", ErrNamespace, err)
	}
	if got.Ino != want.Ino || got.Dev != want.Dev {
		return ErrNamespace
	}
	return nil
}

// Close closes the socket.
func (c *Conn) Close() error {
	return errors.Join(unix.Close(c.fd), c.ns.Close())
}

// append writes one message, of the inet family but for the batch marks.
func (c *Conn) append(b []byte, typ, flags uint16, family byte, resource uint16, attrs []byte) []byte {
	return c.appendWith(b, typ, flags, family, resource, func(b []byte) []byte { return append(b, attrs...) })
}

func (c *Conn) appendWith(b []byte, typ, flags uint16, family byte, resource uint16, attrs func(b []byte) []byte) []byte {
	c.seq++
	ne, start := binary.NativeEndian, len(b)
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint16(b, typ)
	b = ne.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = ne.AppendUint32(b, c.seq)
	b = ne.AppendUint32(b, 0)
	b = append(b, family, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, resource)
	b = attrs(b)
	ne.PutUint32(b[start:], uint32(len(b)-start))
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func nftType(t uint16) uint16 { return unix.NFNL_SUBSYS_NFTABLES<<8 | t }

// reply is one received message of the nftables or the conntrack subsystem, or
// the end of a request.
type reply struct {
	typ   uint16 // NFT_MSG_*, IPCTNL_MSG_CT_*
	seq   uint32
	attrs []byte
	errno syscall.Errno // of NLMSG_ERROR; 0 is an ack
	ack   bool          // NLMSG_ERROR
	done  bool          // NLMSG_DONE
	text  string        // the kernel's words beside errno
	torn  bool          // NLM_F_DUMP_INTR: the dump is of two generations
}

// receive reads what is queued; without wait it returns nothing when nothing is
// there. The replies alias the Conn's buffer until the next call.
func (c *Conn) receive(wait bool) ([]reply, error) {
	flags := unix.MSG_TRUNC
	if !wait {
		flags |= unix.MSG_DONTWAIT
	}
	var n int
	var err error
	for {
		n, _, err = unix.Recvfrom(c.fd, c.buf, flags)
		if err != unix.EINTR {
			break
		}
	}
	if err == unix.EAGAIN {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read from the kernel: %w", err)
	}
	if n > len(c.buf) {
		return nil, fmt.Errorf("read from the kernel: message of %d bytes", n)
	}
	return parseReplies(c.buf[:n])
}

func parseReplies(b []byte) ([]reply, error) {
	ne := binary.NativeEndian
	var out []reply
	for len(b) >= nlmsgHeader {
		l := int(ne.Uint32(b))
		if l < nlmsgHeader || l > len(b) {
			return nil, errors.New("read from the kernel: broken message")
		}
		m := b[:l]
		b = b[min(len(b), (l+3)&^3):]
		typ, flags := ne.Uint16(m[4:]), ne.Uint16(m[6:])
		r := reply{seq: ne.Uint32(m[8:]), torn: flags&unix.NLM_F_DUMP_INTR != 0}
		switch {
		case typ == unix.NLMSG_DONE:
			r.done = true
			if len(m) >= nlmsgHeader+4 {
				r.errno = syscall.Errno(-int32(ne.Uint32(m[nlmsgHeader:])))
			}
		case typ == unix.NLMSG_ERROR:
			if len(m) < nlmsgHeader+4 {
				return nil, errors.New("read from the kernel: broken error")
			}
			r.ack = true
			r.errno = syscall.Errno(-int32(ne.Uint32(m[nlmsgHeader:])))
			// nlmsgerr repeats the header of the request; with NETLINK_CAP_ACK no payload follows it.
			if flags&unix.NLM_F_ACK_TLVS != 0 && len(m) > nlmsgHeader+4+nlmsgHeader {
				for t, v := range attributes(m[nlmsgHeader+4+nlmsgHeader:]) {
					if t == unix.NLMSGERR_ATTR_MSG {
						r.text = cString(v)
					}
				}
			}
		case (typ>>8 == unix.NFNL_SUBSYS_NFTABLES || typ>>8 == unix.NFNL_SUBSYS_CTNETLINK) && len(m) >= headers:
			r.typ, r.attrs = typ&0xff, m[headers:]
		default:
			continue
		}
		out = append(out, r)
	}
	return out, nil
}

// errTorn: the ruleset changed while it was dumped.
var errTorn = errors.New("the ruleset changed while it was read")

// dump asks for every object of a kind; each is handed to fn before the next
// message is read.
func (c *Conn) dump(typ uint16, attrs []byte, fn func(reply) error) error {
	return c.ask(typ, unix.NLM_F_DUMP, unix.NFPROTO_INET, attrs, fn)
}

func (c *Conn) ask(typ, flags uint16, family byte, attrs []byte, fn func(reply) error) error {
	return c.request(nftType(typ), flags, family, attrs, fn)
}

// request is ask of any subsystem of netfilter.
func (c *Conn) request(typ, flags uint16, family byte, attrs []byte, fn func(reply) error) error {
	req := c.append(nil, typ, flags, family, 0, attrs)
	seq := c.seq
	if err := c.send(req); err != nil {
		return err
	}
	torn := false
	for {
		replies, err := c.receive(true)
		if err != nil {
			return err
		}
		for _, r := range replies {
			if r.seq != seq {
				continue // left over from a request that failed half-way
			}
			torn = torn || r.torn
			switch {
			case r.done && r.errno == unix.EINTR || r.ack && r.errno == unix.EINTR:
				return errTorn
			case (r.done || r.ack) && r.errno != 0:
				if r.errno == unix.EPERM {
					return ErrPermission
				}
				return r.errno
			case r.done || r.ack:
				if torn {
					return errTorn
				}
				return nil
			}
			if err := fn(r); err != nil {
				return err
			}
			if flags&unix.NLM_F_DUMP == 0 && flags&unix.NLM_F_ACK == 0 {
				return nil
			}
		}
	}
}

func (c *Conn) send(b []byte) error {
	if err := grow(c.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, len(b)+1<<12); err != nil {
		return fmt.Errorf("write to the kernel: %w", err)
	}
	err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == unix.EMSGSIZE {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, len(b))
	}
	if err != nil {
		return fmt.Errorf("write to the kernel: %w", err)
	}
	return nil
}

// Generation counts the transactions of a namespace, of every program.
type Generation struct {
	ID uint32
	// PID and Comm are of the process that made it, when a [Monitor] hears of it;
	// to a question the kernel answers with the one who asks.
	PID  uint32
	Comm string
}

// Generation asks for the current generation.
func (c *Conn) Generation() (Generation, error) {
	var g Generation
	err := c.ask(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC, nil, func(r reply) error {
		g = generation(r.attrs)
		return nil
	})
	if err != nil {
		return g, fmt.Errorf("read the generation: %w", err)
	}
	return g, nil
}

const nfnlBatchGenID = 1 // NFNL_BATCH_GENID, uapi/linux/netfilter/nfnetlink.h

// transact sends the messages as one transaction that holds only at the given
// generation (ErrStale otherwise).
func (c *Conn) transact(generation uint32, msgs []message) error {
	size := 2*headers + 8
	for _, m := range msgs {
		size += headers + (len(m.attrs)+m.size+3)&^3
	}
	if size > 1<<20 {
		runtime.GC() // what came before makes room for a long list
	}
	b := make([]byte, 0, size)
	b = c.append(b, unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES,
		attr(nil, nfnlBatchGenID, binary.BigEndian.AppendUint32(nil, generation)))
	begin := c.seq
	for _, m := range msgs {
		if m.write != nil {
			b = c.appendWith(b, nftType(m.typ), m.flags, unix.NFPROTO_INET, 0, m.write)
		} else {
			b = c.append(b, nftType(m.typ), m.flags, unix.NFPROTO_INET, 0, m.attrs)
		}
	}
	// The ack of the end comes only when the whole batch was committed.
	b = c.append(b, unix.NFNL_MSG_BATCH_END, unix.NLM_F_ACK, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	end := c.seq
	if err := c.send(b); err != nil {
		return err
	}
	var refused TransactionError
	committed := false
	for {
		// The kernel has worked the batch off before sendto returned: all answers are queued.
		replies, err := c.receive(false)
		if err != nil {
			return err
		}
		if len(replies) == 0 {
			break
		}
		for _, r := range replies {
			switch {
			case !r.ack || r.seq < begin || r.seq > end:
			case r.errno == 0:
				committed = committed || r.seq == end
			case r.errno == unix.ERESTART:
				return ErrStale
			case r.errno == unix.EPERM && r.seq == begin:
				return ErrPermission
			default:
				op := &OpError{Op: "the transaction", Errno: r.errno, Detail: r.text}
				if i := int(r.seq - begin - 1); r.seq > begin && i < len(msgs) {
					op.Op = msgs[i].what
				}
				refused.Ops = append(refused.Ops, op)
			}
		}
	}
	switch {
	case len(refused.Ops) > 0:
		return &refused
	case !committed:
		return errors.New("write to the kernel: the transaction was not acknowledged")
	}
	return nil
}

// attr appends one netlink attribute.
func attr(b []byte, typ uint16, data []byte) []byte {
	ne := binary.NativeEndian
	b = ne.AppendUint16(b, uint16(4+len(data)))
	b = ne.AppendUint16(b, typ)
	b = append(b, data...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func attr32(b []byte, typ uint16, v uint32) []byte {
	return attr(b, typ, binary.BigEndian.AppendUint32(nil, v))
}

func attrString(b []byte, typ uint16, s string) []byte {
	return attr(b, typ, append([]byte(s), 0))
}

func nest(b []byte, typ uint16, inner []byte) []byte {
	return attr(b, typ|unix.NLA_F_NESTED, inner)
}

// attributes iterates over the attributes in b; it stops at a broken one.
func attributes(b []byte) func(yield func(uint16, []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			l := int(binary.NativeEndian.Uint16(b))
			t := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if l < 4 || l > len(b) || !yield(t, b[4:l]) {
				return
			}
			b = b[min(len(b), (l+3)&^3):]
		}
	}
}

func be32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}
