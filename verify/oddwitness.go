package verify

// The witness of the odd probes, on the host. They share ports, have none, or come
// in pieces, so that each bears a mark of its own: the identification of IPv4, or
// the low half of the flow label of IPv6, which filters, NAT and reassembly leave
// alone. No rule of the witness asks connection tracking, which would put fragments
// together for rules that would have seen them one by one.

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// oddMark is what the packets of one odd probe bear, and no others.
type oddMark struct {
	ipv6 bool
	tag  uint16 // 0 for packets that are no odd probes
}

// oddCounts are packets by probe.
type oddCounts map[oddMark]uint64

// oddProof is what the witness counted in a run.
type oddProof struct {
	arrived oddCounts // ahead of every filter but a driver's or tc's
	whole   oddCounts // behind defragmentation, where the host has it there
	gate    oddCounts // behind the gate
	passed  oddCounts // behind the last filter of input or forward
}

// oddWitness is a tripwire for odd probes.
type oddWitness struct{ trip *Tripwire }

// armOddWitness puts the table into the network namespace that in runs in. Only what
// comes from some addresses and bears one of some marks is counted.
func armOddWitness(in Runner, from []netip.Addr, of []oddMark) (*oddWitness, error) {
	trip, err := armTable(in, func(t *Tripwire) error { return t.composeOdd(from, of) })
	if err != nil {
		return nil, err
	}
	return &oddWitness{trip}, nil
}

const (
	oddArrived, oddWhole, oddGate, oddPassed = "arrived", "whole", "gate", "passed"

	defragmented = -399 // right behind NF_IP_PRI_CONNTRACK_DEFRAG
	behindGate   = -109 // ahead of DNAT
	lastOfAll    = 1 << 30
)

// markPlaces say where packets of a family bear their mark.
func markPlaces() []struct {
	suffix  string
	nfproto byte
	offset  uint32
} {
	return []struct {
		suffix  string
		nfproto byte
		offset  uint32
	}{{"4", unix.NFPROTO_IPV4, 4}, {"6", unix.NFPROTO_IPV6, 2}}
}

// oddElements is how many elements one transaction adds: what fits into a socket of a
// user without root.
const oddElements = 1000

// composeOdd makes what counts odd probes. The last part of it is queued: until there
// are chains, nothing is counted.
func (t *Tripwire) composeOdd(from []netip.Addr, of []oddMark) error {
	if err := t.sendersOf(from); err != nil {
		return err
	}
	for _, place := range []string{oddArrived, oddWhole, oddGate, oddPassed} {
		for _, m := range markPlaces() {
			// Two bytes, as a port has: the library knows no shorter integer.
			set := &nftables.Set{Table: t.table, Name: place + m.suffix, KeyType: nftables.TypeInetService, Counter: true}
			if err := t.conn.AddSet(set, nil); err != nil {
				return err
			}
			// Every element is there before the first probe: a rule that adds one takes the memory
			// of its counter from a reserve that a flood exhausts (mm/percpu.c, GFP_ATOMIC).
			var elements []nftables.SetElement
			for _, x := range of {
				if x.ipv6 == (m.nfproto == unix.NFPROTO_IPV6) {
					elements = append(elements, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(x.tag)})
				}
			}
			for part := range slices.Chunk(elements, oddElements) {
				if err := t.conn.SetAddElements(set, part); err != nil {
					return err
				}
				if err := t.conn.Flush(); err != nil {
					return err
				}
			}
		}
	}
	for _, base := range []struct {
		name, place string
		hook        *nftables.ChainHook
		priority    nftables.ChainPriority
	}{
		{"arrive", oddArrived, nftables.ChainHookPrerouting, -lastOfAll},
		{"whole", oddWhole, nftables.ChainHookPrerouting, defragmented},
		{"gate", oddGate, nftables.ChainHookPrerouting, behindGate},
		{"input", oddPassed, nftables.ChainHookInput, lastOfAll},
		{"forward", oddPassed, nftables.ChainHookForward, lastOfAll},
	} {
		c := t.chain(base.name, base.hook, base.priority)
		t.notLoopback(c)
		t.onlySenders(c, true)
		for _, m := range markPlaces() {
			t.countMarked(c, base.place, m.suffix, m.nfproto, m.offset)
		}
	}
	return nil
}

// countMarked adds the rule of one family. What bears no mark of ours is none of them.
func (t *Tripwire) countMarked(c *nftables.Chain, place, suffix string, nfproto byte, offset uint32) {
	t.rule(c,
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{nfproto}},
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 2, DestRegister: reg0},
		&expr.Lookup{SourceRegister: reg0, SetName: place + suffix})
}

// counts reads what was counted at one place.
func (w *oddWitness) counts(place string) (oddCounts, error) {
	out := oddCounts{}
	for _, m := range markPlaces() {
		if err := w.trip.dump.each(place+m.suffix, 2, func(key []byte, packets uint64) {
			if packets > 0 {
				out[oddMark{m.nfproto == unix.NFPROTO_IPV6, binary.BigEndian.Uint16(key)}] = packets
			}
		}); err != nil {
			return nil, fmt.Errorf("read tripwire: %w", err)
		}
	}
	return out, nil
}

// proof reads everything.
func (w *oddWitness) proof() (*oddProof, error) {
	p := &oddProof{}
	for _, part := range []struct {
		place string
		into  *oddCounts
	}{{oddArrived, &p.arrived}, {oddWhole, &p.whole}, {oddGate, &p.gate}, {oddPassed, &p.passed}} {
		var err error
		if *part.into, err = w.counts(part.place); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (w *oddWitness) remove() error { return w.trip.Remove() }
