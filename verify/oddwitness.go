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

	"github.com/google/nftables"
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
// comes from some addresses is counted.
func armOddWitness(in Runner, from []netip.Addr) (*oddWitness, error) {
	trip, err := armTable(in, func(t *Tripwire) error { return t.composeOdd(from) })
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

// marks say where packets of a family bear theirs.
func marks() []struct {
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

// composeOdd queues what counts odd probes, as one transaction.
func (t *Tripwire) composeOdd(from []netip.Addr) error {
	if err := t.sendersOf(from); err != nil {
		return err
	}
	families := []nftables.SetElement{{Key: []byte{unix.NFPROTO_IPV4}}, {Key: []byte{unix.NFPROTO_IPV6}}}
	for _, place := range []string{oddArrived, oddWhole, oddGate, oddPassed} {
		for _, m := range marks() {
			// Two bytes, as a port has: the library knows no shorter integer. Every tag fits in.
			if err := t.conn.AddSet(&nftables.Set{
				Table: t.table, Name: place + m.suffix, KeyType: nftables.TypeInetService, Dynamic: true, Size: 1 << 16,
			}, nil); err != nil {
				return err
			}
		}
		if err := t.conn.AddSet(&nftables.Set{Table: t.table, Name: "lost_" + place, KeyType: nftables.TypeNFProto, Counter: true}, families); err != nil {
			return err
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
		for _, m := range marks() {
			t.countMarked(c, base.place, m.suffix, m.nfproto, m.offset)
		}
	}
	return nil
}

// countMarked adds the rules of one family. An add that fails, as memory is short,
// ends its rule only, so that the packet comes to the last one and is counted as lost.
func (t *Tripwire) countMarked(c *nftables.Chain, place, suffix string, nfproto byte, offset uint32) {
	marked := func(then ...expr.Any) []expr.Any {
		return append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{nfproto}},
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 2, DestRegister: reg0},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: []byte{0, 0}},
		}, then...)
	}
	t.rule(c, marked(
		&expr.Dynset{SrcRegKey: reg0, SetName: place + suffix, Operation: uint32(unix.NFT_DYNSET_OP_ADD), Exprs: []expr.Any{&expr.Counter{}}},
		&expr.Verdict{Kind: expr.VerdictAccept})...)
	t.rule(c, marked(
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
		&expr.Lookup{SourceRegister: reg0, SetName: "lost_" + place})...)
}

// counts reads what was counted at one place.
func (w *oddWitness) counts(place string) (oddCounts, error) {
	out := oddCounts{}
	for _, m := range marks() {
		if err := w.trip.dump.each(place+m.suffix, 2, func(key []byte, packets uint64) {
			out[oddMark{m.nfproto == unix.NFPROTO_IPV6, binary.BigEndian.Uint16(key)}] = packets
		}); err != nil {
			return nil, fmt.Errorf("read tripwire: %w", err)
		}
	}
	// Last, so that no loss goes unseen that came while the sets were read.
	var lost uint64
	if err := w.trip.dump.each("lost_"+place, 1, func(_ []byte, packets uint64) { lost += packets }); err != nil {
		return nil, fmt.Errorf("read tripwire: %w", err)
	}
	if lost > 0 {
		return nil, fmt.Errorf("read tripwire: %w: %d packets", ErrTripwireFull, lost)
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
