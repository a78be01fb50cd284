package verify

// The sockets of the engine: frames out in batches, answers in over a ring that
// is shared with the kernel. See packet(7) and the kernel's
// Documentation/networking/packet_mmap.rst.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"net/netip"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	batchSize = 64 // frames a system call; more gains nothing measurable

	// The kernel hands over a block after a timer tick (4 ms at 250 Hz), full or
	// not: many small blocks, so that a reader may oversleep by a second.
	ringBlock  = 1 << 16 // bytes
	ringBlocks = 256
	ringRetire = 1   // ms
	ringSnap   = 256 // bytes of a packet, from the IP header on; the longest quote fits

	sendBuffer = 8 << 20 // bytes
	// A full queue may take this long to empty before frames are given up. An
	// RST may not wait: the ring fills meanwhile, and its SYN-ACK comes again.
	stallLimit = 100 * time.Millisecond
	rstLimit   = 2 * time.Millisecond
)

// htons gives the byte order that protocol numbers have in socket addresses.
func htons(x uint16) uint16 { return binary.NativeEndian.Uint16([]byte{byte(x >> 8), byte(x)}) }

// outLink is an interface that frames leave by. Sending needs no lock: the
// kernel takes each frame whole.
type outLink struct {
	name  string
	index int
	fd    int
	// stalled holds the errno that keeps frames from leaving, or 0.
	stalled atomic.Uint32
}

// openLink opens a sending socket in the network namespace of the calling
// thread.
func openLink(l Link) (*outLink, error) {
	ifi, err := net.InterfaceByIndex(l.Index)
	if err != nil {
		return nil, fmt.Errorf("interface %s, index %d: %w", l.Name, l.Index, err)
	}
	if l.Name != "" && ifi.Name != l.Name {
		return nil, fmt.Errorf("interface %s, index %d: the index belongs to %s in this network namespace", l.Name, l.Index, ifi.Name)
	}
	if ifi.Flags&net.FlagUp == 0 {
		return nil, fmt.Errorf("interface %s: %w", ifi.Name, unix.ENETDOWN)
	}
	fd, err := packetSocket(unix.SOCK_RAW)
	if err != nil {
		return nil, err
	}
	// Past the queueing discipline: whoever shapes it would drop in silence.
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bypass queue of %s: %w", ifi.Name, err)
	}
	// Only speed hangs on it, and in a user namespace it is refused.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBuffer)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: l.Index}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bind packet socket to %s: %w", ifi.Name, err)
	}
	return &outLink{name: ifi.Name, index: l.Index, fd: fd}, nil
}

// packetSocket opens a socket that receives nothing until it is bound.
func packetSocket(typ int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("open packet socket, which needs CAP_NET_RAW: %w", err)
	}
	if err != nil {
		return -1, fmt.Errorf("open packet socket: %w", err)
	}
	return fd, nil
}

func (l *outLink) close() { unix.Close(l.fd) }

// err says why frames do not leave, or nil.
func (l *outLink) err() error {
	if e := l.stalled.Load(); e != 0 {
		return fmt.Errorf("send on %s: %w", l.name, unix.Errno(e))
	}
	return nil
}

// mmsghdr is struct mmsghdr of sendmmsg(2), which x/sys does not have.
type mmsghdr struct {
	hdr  unix.Msghdr
	sent uint32
}

// batch collects frames for one link. It must not be copied, since its headers
// point into it.
type batch struct {
	bufs [batchSize][maxFrame]byte
	iovs [batchSize]unix.Iovec
	msgs [batchSize]mmsghdr
	n    int
}

func newBatch() *batch {
	b := new(batch)
	for i := range b.msgs {
		b.iovs[i].Base = &b.bufs[i][0]
		b.msgs[i].hdr.Iov = &b.iovs[i]
		b.msgs[i].hdr.SetIovlen(1)
	}
	return b
}

// next is the buffer of the next frame, which add then takes in.
func (b *batch) next() []byte { return b.bufs[b.n][:] }

func (b *batch) add(length int) {
	b.iovs[b.n].SetLen(length)
	b.n++
}

// send empties the batch and says how many of its frames left. A queue that
// stays full for limit, or a link that is down, costs the frames; only what no
// waiting can mend is an error. A wait of stallLimit in vain is remembered in
// the link, and while a link is stalled nobody waits for it.
func (b *batch) send(l *outLink, limit time.Duration) (int, error) {
	n := b.n
	b.n = 0
	var began time.Time
	sent := 0
	for sent < n {
		// Never blocks, so the scheduler need not hear of it.
		done, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(l.fd),
			uintptr(unsafe.Pointer(&b.msgs[sent])), uintptr(n-sent), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			sent += int(done)
			if l.stalled.Load() != 0 {
				l.stalled.Store(0)
			}
			began = time.Time{}
			continue
		case unix.EINTR:
			continue
		case unix.ENOBUFS, unix.EAGAIN, unix.ENOMEM, unix.ENETDOWN, unix.ENXIO, unix.ENODEV:
		default:
			return sent, fmt.Errorf("send on %s: %w", l.name, errno)
		}
		if l.stalled.Load() != 0 {
			return sent, nil
		}
		now := time.Now()
		if began.IsZero() {
			began = now
		}
		if now.Sub(began) >= limit {
			if limit >= stallLimit {
				l.stalled.Store(uint32(errno))
			}
			return sent, nil
		}
		time.Sleep(50 * time.Microsecond)
	}
	return sent, nil
}

// ring receives over every interface of a namespace: an answer may come back by
// another one than its probe left by.
type ring struct {
	fd  int
	mem []byte
	cur int
}

// openRing opens the receiving socket in the network namespace of the calling
// thread. Packets come from their IP header on, whatever the device.
func openRing(filter []bpf.RawInstruction) (*ring, error) {
	fd, err := packetSocket(unix.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	r := &ring{fd: fd}
	if err := r.setup(filter); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *ring) setup(filter []bpf.RawInstruction) error {
	if err := unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("ignore outgoing packets: %w", err)
	}
	if err := unix.SetsockoptInt(r.fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3); err != nil {
		return fmt.Errorf("set packet ring version: %w", err)
	}
	req := unix.TpacketReq3{
		Block_size: ringBlock, Block_nr: ringBlocks,
		Frame_size: 2048, Frame_nr: ringBlock / 2048 * ringBlocks,
		Retire_blk_tov: ringRetire,
	}
	if err := unix.SetsockoptTpacketReq3(r.fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return fmt.Errorf("set up packet ring: %w", err)
	}
	mem, err := unix.Mmap(r.fd, 0, ringBlock*ringBlocks, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map packet ring: %w", err)
	}
	r.mem = mem
	code := make([]unix.SockFilter, len(filter))
	for i, ins := range filter {
		code[i] = unix.SockFilter{Code: ins.Op, Jt: ins.Jt, Jf: ins.Jf, K: ins.K}
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if err := unix.SetsockoptSockFprog(r.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("attach packet filter: %w", err)
	}
	if err := unix.Bind(r.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL)}); err != nil {
		return fmt.Errorf("bind packet ring: %w", err)
	}
	return nil
}

func (r *ring) close() {
	if r.mem != nil {
		_ = unix.Munmap(r.mem)
		r.mem = nil
	}
	unix.Close(r.fd)
}

// drops is the number of packets that the kernel had for us and no room for,
// since the last call.
func (r *ring) drops() (int, error) {
	st, err := unix.GetsockoptTpacketStatsV3(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, fmt.Errorf("read packet statistics: %w", err)
	}
	return int(st.Drops), nil
}

// block hands every packet of the next block to fn, with the time of day when
// it came in nanoseconds, and gives the block back to the kernel. It says false if the kernel has not filled one yet.
func (r *ring) block(fn func(packet []byte, at int64)) bool {
	mem := r.mem[r.cur*ringBlock : (r.cur+1)*ringBlock]
	desc := (*unix.TpacketHdrV1)(unsafe.Pointer(&(*unix.TpacketBlockDesc)(unsafe.Pointer(&mem[0])).Hdr[0]))
	if atomic.LoadUint32(&desc.Block_status)&unix.TP_STATUS_USER == 0 {
		return false
	}
	off := desc.Offset_to_first_pkt
	for n := desc.Num_pkts; n > 0; n-- {
		h := (*unix.Tpacket3Hdr)(unsafe.Pointer(&mem[off]))
		at := off + uint32(h.Net)
		fn(mem[at:at+h.Snaplen], int64(h.Sec)*1e9+int64(h.Nsec))
		off += h.Next_offset
	}
	atomic.StoreUint32(&desc.Block_status, unix.TP_STATUS_KERNEL)
	r.cur = (r.cur + 1) % ringBlocks
	return true
}

// wait returns when the kernel has something, or after timeout.
func (r *ring) wait(timeout time.Duration) error {
	fds := []unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}
	_, err := unix.Poll(fds, int(timeout.Milliseconds()))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for packets: %w", err)
	}
	if fds[0].Revents&unix.POLLERR != 0 {
		// A link went down; reading the error clears it, the others go on.
		_, _ = unix.GetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	}
	return nil
}

// answerFilter compiles the filter of the ring: what goes to an address within
// the common prefix of our sources, and of that TCP and UDP to the ports we
// send from, ICMP echo replies and ICMP errors. It need not be exact, only
// cheap however many paths there are; [parseReply] and the cookies are exact.
func answerFilter(paths []Path) ([]bpf.RawInstruction, error) {
	var four, six []netip.Addr
	low, high := uint16(65535), uint16(0)
	for i := range paths {
		p := &paths[i]
		low, high = min(low, p.SrcPort), max(high, p.SrcPort)
		if p.Src.Is4() {
			four = append(four, p.Src)
		} else {
			six = append(six, p.Src)
		}
	}
	const accept, reject = "accept", "reject"
	var a assembler
	a.add(bpf.LoadExtension{Num: bpf.ExtProto})
	a.jump(bpf.JumpEqual, unix.ETH_P_IP, "ipv4", "")
	a.jump(bpf.JumpEqual, unix.ETH_P_IPV6, "ipv6", reject)

	a.label("ipv4")
	a.prefix(16, four, reject)
	a.add(bpf.LoadAbsolute{Off: 9, Size: 1})
	a.jump(bpf.JumpEqual, unix.IPPROTO_ICMP, "icmp4", "")
	a.jump(bpf.JumpEqual, unix.IPPROTO_TCP, "ports4", "")
	a.jump(bpf.JumpEqual, unix.IPPROTO_UDP, "ports4", reject)
	a.label("ports4")
	a.add(bpf.LoadMemShift{Off: 0})
	a.add(bpf.LoadIndirect{Off: 2, Size: 2})
	a.goTo("ports")
	a.label("icmp4")
	a.add(bpf.LoadMemShift{Off: 0})
	a.add(bpf.LoadIndirect{Off: 0, Size: 1})
	for _, t := range []uint32{icmp4EchoReply, icmp4Unreachable, icmp4TimeExceeded} {
		a.jump(bpf.JumpEqual, t, accept, "")
	}
	a.jump(bpf.JumpEqual, icmp4ParamProblem, accept, reject)

	a.label("ipv6")
	a.prefix(24, six, reject)
	a.add(bpf.LoadAbsolute{Off: 6, Size: 1})
	a.jump(bpf.JumpEqual, unix.IPPROTO_ICMPV6, "icmp6", "")
	// Extension headers are rare and have no fixed length: let them pass.
	for _, h := range []uint32{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_FRAGMENT, unix.IPPROTO_DSTOPTS} {
		a.jump(bpf.JumpEqual, h, accept, "")
	}
	a.jump(bpf.JumpEqual, unix.IPPROTO_TCP, "ports6", "")
	a.jump(bpf.JumpEqual, unix.IPPROTO_UDP, "ports6", reject)
	a.label("ports6")
	a.add(bpf.LoadAbsolute{Off: ipv6Len + 2, Size: 2})
	a.goTo("ports")
	a.label("icmp6")
	a.add(bpf.LoadAbsolute{Off: ipv6Len, Size: 1})
	for _, t := range []uint32{icmp6Unreachable, icmp6TooBig, icmp6TimeExceeded, icmp6ParamProblem} {
		a.jump(bpf.JumpEqual, t, accept, "")
	}
	a.jump(bpf.JumpEqual, icmp6EchoReply, accept, reject)

	a.label("ports")
	a.jump(bpf.JumpLessThan, uint32(low), "canary", "")
	a.jump(bpf.JumpGreaterThan, uint32(high), reject, accept)
	a.label("canary")
	a.jump(bpf.JumpLessThan, canaryPortLow, reject, "")
	a.jump(bpf.JumpGreaterThan, canaryPortHigh, reject, accept)

	a.label(accept)
	a.add(bpf.RetConstant{Val: ringSnap})
	a.label(reject)
	a.add(bpf.RetConstant{Val: 0})
	return a.assemble()
}

// assembler resolves labels, which package bpf does not know.
type assembler struct {
	code   []bpf.Instruction
	labels map[string]int
	jumps  []labelled
}

// labelled is a jump whose targets are still names; an empty one is the next
// instruction.
type labelled struct {
	at      int
	yes, no string
}

func (a *assembler) add(i bpf.Instruction) { a.code = append(a.code, i) }

func (a *assembler) label(name string) {
	if a.labels == nil {
		a.labels = make(map[string]int)
	}
	a.labels[name] = len(a.code)
}

func (a *assembler) jump(cond bpf.JumpTest, val uint32, yes, no string) {
	a.jumps = append(a.jumps, labelled{len(a.code), yes, no})
	a.add(bpf.JumpIf{Cond: cond, Val: val})
}

func (a *assembler) goTo(name string) {
	a.jumps = append(a.jumps, labelled{len(a.code), name, ""})
	a.add(bpf.Jump{})
}

// prefix lets only addresses at offset off pass that share the leading bits
// which all of addrs share; without addrs it lets none pass.
func (a *assembler) prefix(off uint32, addrs []netip.Addr, reject string) {
	if len(addrs) == 0 {
		a.goTo(reject)
		return
	}
	first := addrs[0].AsSlice()
	same := len(first) * 8
	for _, x := range addrs[1:] {
		for i, b := range x.AsSlice() {
			if d := b ^ first[i]; d != 0 {
				same = min(same, i*8+bits.LeadingZeros8(d))
				break
			}
		}
	}
	for i := 0; i < same; i += 32 {
		mask := ^uint32(0)
		if same-i < 32 {
			mask <<= 32 - (same - i)
		}
		word := uint32(i / 8)
		a.add(bpf.LoadAbsolute{Off: off + word, Size: 4})
		a.add(bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask})
		a.jump(bpf.JumpNotEqual, binary.BigEndian.Uint32(first[word:])&mask, reject, "")
	}
}

func (a *assembler) assemble() ([]bpf.RawInstruction, error) {
	skip := func(from int, name string) int {
		if name == "" {
			return 0
		}
		return a.labels[name] - from - 1
	}
	for _, j := range a.jumps {
		switch ins := a.code[j.at].(type) {
		case bpf.Jump:
			a.code[j.at] = bpf.Jump{Skip: uint32(skip(j.at, j.yes))}
		case bpf.JumpIf:
			ins.SkipTrue, ins.SkipFalse = uint8(skip(j.at, j.yes)), uint8(skip(j.at, j.no))
			a.code[j.at] = ins
		}
	}
	raw, err := bpf.Assemble(a.code)
	if err != nil {
		return nil, fmt.Errorf("assemble packet filter: %w", err)
	}
	return raw, nil
}
