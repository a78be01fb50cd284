package verify

import (
	"fmt"
	"net/netip"
	"strings"

	"deadlight/rules"
)

// Swept is from where and to where a sweep looked at ports over one family.
type Swept struct {
	Interface string // by which its probes entered; "" from another machine
	Source    netip.Addr
	Address   netip.Addr // the probed one
}

// Swept lists the sweeps of the run, as long as it was judged by this process.
func (r *Report) Swept() []Swept { return r.swept }

// StateOf is what a sweep showed of a port; ok is false when it was not probed.
func (r *Report) StateOf(v4 bool, p rules.Protocol, port uint16) (_ State, ok bool) {
	family := "6"
	if v4 {
		family = "4"
	}
	s, ok := r.States[p.String()+family]
	if !ok {
		return Unknown, false
	}
	for _, list := range []struct {
		state State
		ports string
	}{{Open, s.Open}, {Closed, s.Closed}, {Rejected, s.Rejected}, {Filtered, s.Filtered}, {Unknown, s.Unknown}} {
		for part := range strings.SplitSeq(list.ports, ",") {
			var lo, hi uint16
			if n, _ := fmt.Sscanf(part, "%d-%d", &lo, &hi); n == 1 {
				hi = lo
			} else if n == 0 {
				continue
			}
			if lo <= port && port <= hi {
				return list.state, true
			}
		}
	}
	return Unknown, false
}
