package rules

import (
	"fmt"
	"net/netip"
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
	File      string // as given by the caller
	Default   Default
	Open      []Open       // in file order
	Sets      []AddressSet // in file order
	Published Published
	ICMP      ICMP
	DHCP      DHCP
}

// Action is what happens to a packet that no rule admits.
type Action uint8

// The actions a policy may name.
const (
	Drop   Action = iota // silence: the port is filtered
	Reject               // RST for TCP, ICMP admin-prohibited for the rest
)

// String gives the word of the policy language.
func (a Action) String() string { return [...]string{"drop", "reject"}[a] }

// Default is the [default] table.
type Default struct {
	Input Action
	Pos   Pos // of the value of input; the zero Pos when it is not written
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
	ICMPv6 Protocol = 58
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
	case ICMPv6:
		return "icmpv6"
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

// Open is an [open.*] table. Its fields are ANDed, the values of each ORed.
type Open struct {
	Name       string
	Pos        Pos         // of the table's name
	Ports      []PortRange // merged and ascending, never empty
	Protocols  []Protocol  // each once, ascending, never empty
	From       Source
	Interfaces []string // names, one * at the end allowed; empty means every interface
	Family     Family
	Comment    string
}

// AddressSet is a [set.*] table.
type AddressSet struct {
	Name   string
	Pos    Pos
	Ranges []AddrRange // merged and ascending, IPv4 before IPv6, never empty
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
