package rules

import (
	"fmt"
	"net/netip"
	"time"
)

// Pos is a place in a policy file. Line and Column count from 1; Column counts
// runes. The zero Pos means "not written in any file" (a default).
type Pos struct {
	File   string
	Line   int
	Column int
}

// String gives file:line:column, or "default" for the zero Pos.
func (p Pos) String() string {
	if p.Line == 0 {
		return "default"
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// Policy is a policy that was read whole and found valid: every name resolves,
// every range runs forwards, every list holds something.
type Policy struct {
	File      string   // as given by the caller
	Files     []string // every file that was read: the policy, its includes, the lists of its sets
	Default   Default
	Open      []Open       // in file order
	Block     []Block      // in file order
	Egress    []Egress     // in file order
	Sets      []AddressSet // in file order
	Published Published
	ICMP      ICMP
	DHCP      DHCP
	Log       Log
	Failsafe  *Failsafe // nil: none
	Verify    Verify
	Expect    []Expect // in file order

	expiries []expiry // in file order, for Expired
}

// Action is what happens to a packet that no rule admits.
type Action uint8

// The actions a policy may name.
const (
	Drop   Action = iota // silence: the port is filtered
	Reject               // RST for TCP, ICMP admin-prohibited for the rest
	Accept               // of output only
)

// String gives the word of the policy language.
func (a Action) String() string { return [...]string{"drop", "reject", "accept"}[a] }

// Default is the [default] table.
type Default struct {
	Input           Action // Drop or Reject
	Output          Action
	IgnorePublished bool // published = "ignore"
	DropForward     bool // forward = "drop"
	KeepFlows       bool // established = "keep"
	Observe         bool // enforce = false
	Pos             Pos  // of the value of input; the zero Pos when it is not written
}

// Protocol is an IP protocol number
// (https://www.iana.org/assignments/protocol-numbers).
type Protocol uint8

// Protocols with ports that a policy may open, and the ICMPs.
const (
	ICMPv4 Protocol = 1
	IGMP   Protocol = 2
	TCP    Protocol = 6
	UDP    Protocol = 17
	GRE    Protocol = 47
	ESP    Protocol = 50
	AH     Protocol = 51
	ICMPv6 Protocol = 58
	VRRP   Protocol = 112
	SCTP   Protocol = 132
)

// String gives the word of the policy language, or the number.
func (p Protocol) String() string {
	switch p {
	case ICMPv4:
		return "icmp"
	case IGMP:
		return "igmp"
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case GRE:
		return "gre"
	case ESP:
		return "esp"
	case AH:
		return "ah"
	case ICMPv6:
		return "icmpv6"
	case VRRP:
		return "vrrp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Family is the IP family a rule is confined to.
type Family uint8

// The families of the policy language.
const (
	Both Family = iota
	IPv4
	IPv6
)

// String gives the word of the policy language; Both is "both".
func (f Family) String() string { return [...]string{"both", "ipv4", "ipv6"}[f] }

// Has reports whether an address of f4 (true for IPv4) belongs to the family.
func (f Family) Has(f4 bool) bool { return f == Both || (f == IPv4) == f4 }

// PortRange is an inclusive range of ports, 1–65535, Lo ≤ Hi.
type PortRange struct{ Lo, Hi uint16 }

// String writes "443" or "6000-6010".
func (r PortRange) String() string {
	if r.Lo == r.Hi {
		return fmt.Sprint(r.Lo)
	}
	return fmt.Sprintf("%d-%d", r.Lo, r.Hi)
}

// AddrRange is an inclusive range of addresses of one family, Lo ≤ Hi, neither
// with a zone nor IPv4-mapped.
type AddrRange struct{ Lo, Hi netip.Addr }

// Contains reports whether a lies in the range.
func (r AddrRange) Contains(a netip.Addr) bool {
	return a.Is4() == r.Lo.Is4() && r.Lo.Compare(a) <= 0 && a.Compare(r.Hi) <= 0
}

// Source is the value of from: addresses written in place and sets by name. A
// packet matches when any of them holds its source.
type Source struct {
	Any    bool        // from was omitted: anywhere
	Ranges []AddrRange // merged and ascending, IPv4 before IPv6
	Sets   []string    // names of [set.*], without the @, each once, in file order
}

// ProtoPorts is a protocol with the ports of it that a rule names.
type ProtoPorts struct {
	Protocol Protocol
	Ports    []PortRange // merged and ascending; nil for a protocol without ports
}

// Traffic is what [open.*], [block.*] and [egress.*] tables say of packets. Its
// fields are ANDed, the values of each ORed.
type Traffic struct {
	Name string
	Pos  Pos // of the table's name
	// Any is every protocol and port: protocol = "any", or a block that names
	// neither ports nor a protocol. On is then nil.
	Any        bool
	On         []ProtoPorts // ascending by protocol, each once
	From       Source
	Except     Source   // Any false and nothing in it: nobody
	To         Source   // the destination
	Interfaces []string // entered by (egress: left by); one * at the end allowed; empty means every interface
	Family     Family
	Expires    time.Time // zero: never
	Log        bool
	Comment    string
	// Bans are, of a block made of temporary ones, the addresses of From with the end
	// of each, ascending; nil of all others.
	Bans []Ban
}

// Ban is an address from which nothing gets in for some time.
type Ban struct {
	Addr    netip.Addr
	Expires time.Time // zero: not by itself
}

// Ports gives the ports of a protocol that the rule names.
func (t *Traffic) Ports(p Protocol) []PortRange {
	for _, o := range t.On {
		if o.Protocol == p {
			return o.Ports
		}
	}
	return nil
}

// Open is an [open.*] table.
type Open struct {
	Traffic
	Rate        *Rate // nil: none
	Connections int   // concurrent ones a source (IPv6: a /64); 0: any number
}

// Block is a [block.*] table: it wins over every open.
type Block struct{ Traffic }

// Egress is an [egress.*] table, in force when default.output is not accept.
type Egress struct {
	Traffic
	User, Group string // of the socket's owner; names or numbers, "" means any
}

// Rate is a limit on new flows, or on packets of echo and lines of the log.
type Rate struct {
	Limit uint64        // in a Per
	Per   time.Duration // a second, a minute, an hour or a day
	Burst uint32
	// PerSource counts each source alone, IPv6 by /64; else all together.
	PerSource bool
}

// Log is the [log] table.
type Log struct {
	Dropped bool
	Rate    *Rate   // of the lines; nil: no limit
	Prefix  string  // default "deadlight"
	Group   *uint16 // nflog group; nil: the kernel log
	// Knocks has what no rule admits counted by port and source. Default true.
	Knocks bool
}

// Failsafe is the [failsafe] table: what the boot lock-down admits.
type Failsafe struct {
	Pos        Pos
	On         []ProtoPorts
	From       Source
	Interfaces []string
}

// Verify is the [verify] table.
type Verify struct {
	Vantage  string // "netns" or "ssh://user@host"
	Thorough int
}

// Expect is an [[expect]] table: a test of the policy.
type Expect struct {
	Pos    Pos    // of the table
	Packet Packet // To and In are zero when they are not written
	State  Outcome
}

// AddressSet is a [set.*] table.
type AddressSet struct {
	Name   string
	Pos    Pos
	Files  []string   // that were read for it
	Ranges AddrRanges // merged; empty only if its lists are or are missing
}

// Published is the [published] table.
type Published struct {
	// Interfaces lead to container networks: nobody outside may reach a
	// container by its own address through them.
	Interfaces []string
}

// ICMP is the [icmp] table. Errors, neighbour discovery, MLD and IGMP queries
// are always admitted.
type ICMP struct {
	Echo bool
	Rate *Rate // of echo; nil: no limit
	Pos  Pos
}

// DHCP is the [dhcp] table.
type DHCP struct {
	Client     bool
	Interfaces []string // empty with Client means every interface
	Pos        Pos
}

// DefaultPolicy is the policy of an empty file: nothing is open, echo and DHCP
// are answered, container networks are shut.
func DefaultPolicy() Policy {
	return Policy{
		Published: Published{Interfaces: []string{"docker0", "br-*", "podman*", "cni*"}},
		ICMP:      ICMP{Echo: true},
		DHCP:      DHCP{Client: true},
		Default:   Default{Output: Accept},
		Log:       Log{Prefix: "deadlight", Knocks: true},
		Verify:    Verify{Vantage: "netns", Thorough: 1},
	}
}

// Set gives the set of that name, or nil.
func (p *Policy) Set(name string) *AddressSet {
	for i := range p.Sets {
		if p.Sets[i].Name == name {
			return &p.Sets[i]
		}
	}
	return nil
}

// MatchInterface reports whether the interface name matches pattern, which is a
// name or a prefix followed by one *.
func MatchInterface(pattern, name string) bool {
	if n := len(pattern); n > 0 && pattern[n-1] == '*' {
		return len(name) >= n-1 && name[:n-1] == pattern[:n-1]
	}
	return pattern == name
}

// Files is what Parse may read besides the policy itself. Names are as
// [Policy.File] makes them: relative to the directory of the policy unless they
// are absolute.
type Files interface {
	// Glob gives the names that match, sorted bytewise; none is no error.
	Glob(pattern string) ([]string, error)
	// ReadFile gives errors that fs.ErrNotExist and fs.ErrPermission tell apart.
	ReadFile(name string) ([]byte, error)
}
