package verify

import "fmt"

// State is what a port looks like from outside. The words are nmap's, but
// rejected (an ICMP unreachable that is not "port unreachable"), which nmap
// calls filtered as well.
type State uint8

// The port states.
const (
	Unknown  State = iota // not probed, or the path was not proven alive
	Open                  // SYN-ACK, or an answer over UDP
	Closed                // RST, or ICMP port unreachable: the packet reached the host
	Rejected              // another ICMP unreachable from the target: a firewall answers
	Filtered              // silence on a path that was proven alive
)

var stateNames = [...]string{"unknown", "open", "closed", "rejected", "filtered"}

// String gives the lower-case word of reports and JSON.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// Reason is why a port got its [State].
type Reason uint8

// The reasons, from the strongest evidence of an absent firewall down.
const (
	NotProbed        Reason = iota
	NoResponse              // nothing came back on a live path
	PathNotProven           // nothing came back, and no canary either
	SynAck                  // TCP SYN-ACK to our sequence number
	TCPReset                // TCP RST to our sequence number
	TCPOther                // any other TCP segment to our probe: the stack answered
	UDPAnswer               // a UDP datagram from the probed port
	PortUnreachable         // ICMP type 3 code 3, ICMPv6 type 1 code 4
	AdminProhibited         // ICMP 3/9, 3/10, 3/13; ICMPv6 1/1, 1/5, 1/6
	HostUnreachable         // ICMP 3/1, ICMPv6 1/3: from the target itself
	NetUnreachable          // ICMP 3/0, ICMPv6 1/0: from the target itself
	ProtoUnreachable        // ICMP 3/2, ICMPv6 4/1
	OtherICMP               // any other ICMP error from the target
	RouterError             // an ICMP error from somebody who is not the target
	PassedFirewall          // the tripwire saw the probe behind the last input chain, nothing came back
	PassedGate              // the tripwire saw the probe behind the gate; a later chain dropped it
	OtherAddress            // a UDP datagram from the probed port of another address
	ICMPReply               // an answer to an ICMP query
	SCTPInitAck             // SCTP INIT-ACK
	SCTPAbort               // SCTP ABORT: the packet reached the host
	OtherAnswer             // a packet of the probe's own protocol
	ReassemblyTime          // ICMP 11/1, ICMPv6 3/1: the host waited for the rest of a fragment
	ParameterProblem        // ICMP type 12, ICMPv6 type 4: the host read the header and refused it
)

var reasonNames = [...]string{
	"not probed", "no response", "path not proven", "syn-ack", "rst", "tcp answer", "udp answer",
	"port-unreachable", "admin-prohibited", "host-unreachable", "net-unreachable", "proto-unreachable",
	"icmp error", "error from a router", "passed the firewall, no answer", "passed the gate, stopped behind it",
	"answer from another address",
	"icmp reply", "sctp init-ack", "sctp abort", "answer", "reassembly time-exceeded", "parameter-problem",
}

// String gives the words of reports and JSON.
func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Verdict is the outcome of a whole run.
type Verdict uint8

// The verdicts, the worse the larger.
const (
	Pass Verdict = iota
	Inconclusive
	Fail
)

// String gives the lower-case word of reports and JSON.
func (v Verdict) String() string { return [...]string{"pass", "inconclusive", "fail"}[v] }
