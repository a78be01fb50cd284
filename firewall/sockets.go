package firewall

import (
	"net/netip"

	"deadlight/rules"
)

// socket is a TCP or UDP socket of the namespace.
type socket struct {
	Socket
	tuple // src is ours, dst the peer; no port of a peer: it listens
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

// sockets reads the sockets of the namespace. Flows within the host, of which it
// has both ends, are left out.
func (c *Conn) sockets() (*sockets, error) {
	s := &sockets{listens: map[listening][]socket{}}
	err := c.inside(func() error {
		if !c.here() {
			return ErrNamespace
		}
		for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
			list, err := Sockets(p, SocketEstablished, SocketFinWait1, SocketFinWait2, SocketClose, SocketCloseWait,
				SocketLastAck, SocketListen, SocketClosing)
			if err != nil {
				return err
			}
			s.add(list)
		}
		return nil
	})
	if err != nil {
		return nil, err
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

func (s *sockets) add(list []Socket) {
	for _, k := range list {
		o := socket{k, tuple{k.Protocol, k.Local, k.Remote}}
		if k.State == SocketListen || k.State == SocketClose {
			key := listening{k.Protocol, k.Local.Port()}
			s.listens[key] = append(s.listens[key], o)
		} else {
			s.flows = append(s.flows, o)
		}
	}
}

// listener finds who takes what is sent to an address and a port of the host.
func (s *sockets) listener(p rules.Protocol, to netip.AddrPort) (socket, bool) {
	for _, l := range s.listens[listening{p, to.Port()}] {
		if l.Takes(to.Addr()) {
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
