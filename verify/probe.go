package verify

import (
	"net"
	"net/netip"
	"time"

	"deadlight/rules"
)

// Link is the interface a path leaves by, and the two Ethernet addresses on it.
type Link struct {
	Index    int    // of the vantage's interface
	Name     string // of the vantage's interface
	Src, Dst net.HardwareAddr
}

// CanaryKind is a packet that a living path answers.
type CanaryKind uint8

// The kinds of canary.
const (
	CanaryTCP  CanaryKind = iota // a SYN to a port the policy opens; SYN-ACK or RST answers
	CanaryEcho                   // an ICMP echo request
)

// Canary is one kind of canary on a [Path].
type Canary struct {
	Kind CanaryKind
	Port uint16 // of CanaryTCP
}

// Path is one source that looks at one address over one link, and what it asks
// there. Its canaries prove that path and no other.
type Path struct {
	Link     Link
	Src, Dst netip.Addr // of one family; Src need not be an address of this machine
	TCP, UDP []uint16   // ports to probe, ascending, each once; nil to leave the protocol out
	// SrcPort is the source port of the TCP probes and of the UDP probes of this
	// path, constant for the whole run. No two paths of a run share one.
	SrcPort  uint16
	Canaries []Canary // in order of preference; empty: silence stays Unknown
	// Host is the same of all paths to one host: a path with few canaries borrows the
	// loss of the others, which it must not do from another host.
	Host int
}

// Config is what [Sweep] needs.
type Config struct {
	Paths []Path
	// MissBound is the largest probability that any answer of a silent TCP port
	// was missed, over the whole run; 0 means 1e-6.
	MissBound float64
	// MaxRate bounds the send rate in packets per second; 0 means none.
	MaxRate int
	// Arrived, if not nil, is a witness on the target. A path whose every probe of
	// a round it counted is done with that round: its silence is called Filtered,
	// which means no more than that nothing came back, and whoever asks for a
	// witness asks it too which probes passed ([Judge] does).
	Arrived ArrivalCounter
	// Progress, if not nil, is called from the sending goroutine some times a
	// second with the probes sent so far and a current estimate of the total.
	Progress func(sent, total uint64)
}

// Answer is the state of one port with its reason.
type Answer struct {
	State  State
	Reason Reason
}

// PathResult is what one [Path] showed. TCP and UDP run parallel to the path's
// lists of ports.
type PathResult struct {
	TCP, UDP []Answer
	// From holds who answered, where it was not the probed address itself. The
	// key is the protocol and the port.
	From map[Target]netip.Addr
	// Stray are ports that answered over UDP though they were not asked: a
	// service that answers from another port than the one it was asked at, which
	// of the probed ones cannot be told.
	Stray []uint16
	// Alive says that canaries answered throughout and after the last probe.
	Alive                      bool
	CanariesSent, CanariesLost int
	// ArrivedTCP and ArrivedUDP say that Config.Arrived counted every probe of a
	// round that asked all silent ports of the protocol.
	ArrivedTCP, ArrivedUDP bool
	// SentTCP and SentUDP count the probes put on the wire, repeats included.
	SentTCP, SentUDP uint64
	Sent             uint64 // canaries included
	// Bound is the path's part of [Result.Bound].
	Bound float64
	// Err is why the path ended, where the vantage knows it: its link went down
	// or refused frames. It is nil for a path that merely fell silent.
	Err error
}

// Target is a port of a protocol.
type Target struct {
	Protocol rules.Protocol
	Port     uint16
}

// Result is what a [Sweep] showed.
type Result struct {
	Paths []PathResult // parallel to Config.Paths
	// Bound is an upper bound of the probability that any TCP answer was missed; 1
	// if no path lives. Ports whose probes were counted on arrival add nothing to it.
	Bound   float64
	Probes  uint64 // packets sent, canaries and repeats included
	Elapsed time.Duration
}
