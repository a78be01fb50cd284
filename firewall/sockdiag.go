package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// The one reader of sockets. It asks sock_diag(7) by itself: the library leaves
// out what tells a socket of IPv6 alone and one of MPTCP.

// SocketState is a state of a socket (include/net/tcp_states.h).
type SocketState uint8

// The states in use.
const (
	SocketEstablished SocketState = 1
	SocketFinWait1    SocketState = 4
	SocketFinWait2    SocketState = 5
	SocketClose       SocketState = 7 // a UDP socket without a peer
	SocketCloseWait   SocketState = 8
	SocketLastAck     SocketState = 9
	SocketListen      SocketState = 10
	SocketClosing     SocketState = 11
)

// Socket is a TCP or UDP socket.
type Socket struct {
	Protocol rules.Protocol
	// MPTCP says that it listens for Multipath TCP too. Kernels before 5.18 do not
	// tell.
	MPTCP  bool
	State  SocketState
	Local  netip.AddrPort
	Remote netip.AddrPort // no port: it has no peer
	V6Only bool           // bound to ::, and takes no IPv4
	Device int            // index of the interface it is bound to; 0: none
	Inode  uint32         // 0: the kernel's own, or one that nobody holds any more
	UID    uint32         // who made it
}

// Attributes and sizes of inet_diag (uapi/linux/inet_diag.h).
const (
	diagRequestProtocol = 3  // INET_DIAG_REQ_PROTOCOL
	diagV6Only          = 11 // INET_DIAG_SKV6ONLY

	diagRequestSize = 56
	diagMessageSize = 72
)

// diagRequest asks for the sockets of a protocol and a family in some states.
type diagRequest struct {
	family   uint8
	protocol uint32
	states   uint32
}

// Len implements [nl.NetlinkRequestData].
func (r *diagRequest) Len() int { return len(r.Serialize()) }

// Serialize implements [nl.NetlinkRequestData].
func (r *diagRequest) Serialize() []byte {
	b := make([]byte, diagRequestSize)
	b[0], b[1] = r.family, uint8(min(r.protocol, unix.IPPROTO_RAW))
	binary.NativeEndian.PutUint32(b[4:], r.states)
	if r.protocol > unix.IPPROTO_RAW { // it has no room in the header
		b = attr(b, diagRequestProtocol, binary.NativeEndian.AppendUint32(nil, r.protocol))
	}
	return b
}

// Sockets lists the sockets of a protocol, TCP or UDP, of both families in the
// calling thread's network namespace that are in one of the states.
func Sockets(protocol rules.Protocol, states ...SocketState) ([]Socket, error) {
	var mask uint32
	for _, s := range states {
		mask |= 1 << s
	}
	out, err := dumpSockets(uint32(protocol), mask)
	if err != nil {
		return nil, fmt.Errorf("list the sockets: %w", err)
	}
	if protocol == rules.TCP && mask&(1<<SocketListen) != 0 {
		multi, err := dumpSockets(unix.IPPROTO_MPTCP, 1<<SocketListen)
		if err != nil && !errors.Is(err, unix.ENOENT) { // a kernel without it
			return nil, fmt.Errorf("list the sockets of MPTCP: %w", err)
		}
		inodes := map[uint32]bool{}
		for _, s := range multi {
			inodes[s.Inode] = true
		}
		for i, s := range out {
			out[i].MPTCP = s.State == SocketListen && s.Inode != 0 && inodes[s.Inode]
		}
	}
	for i := range out {
		out[i].Protocol = protocol
	}
	return out, nil
}

// dumpSockets lists the sockets of both families.
func dumpSockets(protocol, states uint32) ([]Socket, error) {
	var out []Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var messages [][]byte
		err := error(nl.ErrDumpInterrupted)
		for tries := 0; tries < 10 && errors.Is(err, nl.ErrDumpInterrupted); tries++ {
			req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			req.AddData(&diagRequest{family, protocol, states})
			messages, err = req.Execute(unix.NETLINK_INET_DIAG, 0) // some came or went while they were listed
		}
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			s, ok := readSocket(m)
			if !ok {
				return nil, fmt.Errorf("%d bytes about one are too few", len(m))
			}
			out = append(out, s)
		}
	}
	return out, nil
}

// readSocket reads struct inet_diag_msg and its attributes.
func readSocket(b []byte) (Socket, bool) {
	if len(b) < diagMessageSize {
		return Socket{}, false
	}
	end := func(address, port int) netip.AddrPort {
		var a netip.Addr
		if b[0] == unix.AF_INET {
			a = netip.AddrFrom4([4]byte(b[address : address+4]))
		} else {
			a = netip.AddrFrom16([16]byte(b[address : address+16])).Unmap()
		}
		return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[port:]))
	}
	s := Socket{
		State: SocketState(b[1]),
		Local: end(8, 4), Remote: end(24, 6), Device: int(binary.NativeEndian.Uint32(b[40:])),
		UID: binary.NativeEndian.Uint32(b[64:]), Inode: binary.NativeEndian.Uint32(b[68:]),
	}
	if v := attrOf(b[diagMessageSize:], diagV6Only); len(v) == 1 {
		s.V6Only = v[0] != 0
	}
	return s, true
}

// Takes reports whether packets to an address of the host reach the socket, as
// far as its own address decides.
func (s *Socket) Takes(to netip.Addr) bool {
	a := s.Local.Addr()
	return a == to || a.IsUnspecified() && (a.Is4() == to.Is4() || a.Is6() && !s.V6Only)
}
