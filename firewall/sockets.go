package firewall

import (
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// socket is a TCP or UDP socket of the namespace.
type socket struct {
	tuple // src is ours, dst the peer; no port of a peer: it listens
	inode uint32
	uid   uint32
}

// sockets are all that talk or listen.
type sockets struct {
	flows   []socket // connected
	listens map[listening][]socket
}

type listening struct {
	protocol rules.Protocol
	port     uint16
}

// States of a socket (include/net/tcp_states.h).
const (
	stateEstablished = 1
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateClose       = 7 // a UDP socket without a peer
	stateCloseWait   = 8
	stateLastAck     = 9
	stateListen      = 10
	stateClosing     = 11
)

// sockets reads the sockets of the namespace. Flows within the host, of which it
// has both ends, are left out.
func (c *Conn) sockets() (*sockets, error) {
	s := &sockets{listens: map[listening][]socket{}}
	err := c.inside(func() error {
		if !c.here() {
			return ErrNamespace
		}
		h, err := netlink.NewHandle(unix.NETLINK_INET_DIAG)
		if err != nil {
			return err
		}
		defer h.Close()
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			tcp, err := h.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			udp, err := h.SocketDiagUDP(family)
			if err != nil {
				return err
			}
			s.add(rules.TCP, tcp)
			s.add(rules.UDP, udp)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the sockets: %w", err)
	}
	ends := map[tuple]bool{}
	for _, f := range s.flows {
		ends[f.tuple] = true
	}
	outward := s.flows[:0]
	for _, f := range s.flows {
		if !ends[f.reversed()] && !f.dst.Addr().IsLoopback() {
			outward = append(outward, f)
		}
	}
	s.flows = outward
	return s, nil
}

func (s *sockets) add(p rules.Protocol, list []*netlink.Socket) {
	for _, k := range list {
		src, ok := plainAddr(k.ID.Source)
		dst, both := plainAddr(k.ID.Destination)
		if !ok || !both {
			continue
		}
		o := socket{tuple{p, netip.AddrPortFrom(src, k.ID.SourcePort), netip.AddrPortFrom(dst, k.ID.DestinationPort)}, k.INode, k.UID}
		switch k.State {
		case stateListen, stateClose:
			key := listening{p, k.ID.SourcePort}
			s.listens[key] = append(s.listens[key], o)
		case stateEstablished, stateFinWait1, stateFinWait2, stateCloseWait, stateLastAck, stateClosing:
			s.flows = append(s.flows, o)
		}
	}
}

// listener finds who takes what is sent to an address and a port of the host.
func (s *sockets) listener(p rules.Protocol, to netip.AddrPort) (socket, bool) {
	for _, l := range s.listens[listening{p, to.Port()}] {
		a := l.src.Addr()
		// One bound to :: takes IPv4 too, unless it was told not to.
		if a == to.Addr() || a.IsUnspecified() && (a.Is6() || to.Addr().Is4()) {
			return l, true
		}
	}
	return socket{}, false
}

// began gives the first packet's direction of a socket's flow as far as it can be
// told: where somebody listens on the local port, the far side began.
func (s *sockets) began(f socket) tuple {
	if _, ok := s.listener(f.protocol, f.src); ok {
		return f.reversed()
	}
	return f.tuple
}
