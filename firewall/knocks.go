package firewall

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Knock is what was counted of packets to one port that no rule admitted.
type Knock struct {
	Source   netip.Addr // of these only; the zero Addr: of all
	Protocol rules.Protocol
	Port     uint16
	Packets  uint64
	Bytes    uint64
	Last     time.Time // when the last one came
}

// Knocks is what no rule admitted, as far as it was not forgotten.
type Knocks struct {
	// Counted says that the table counts. Without a table, or with
	// [rules.Log.Knocks] off, it does not.
	Counted bool
	Memory  time.Duration // for how long a port or source is remembered that was silent since
	Ports   []Knock       // most packets first
	Sources []Knock       // of each port the most packets first
	// PortsFull and SourcesFull say that a list had no room left: what else came is
	// not in it.
	PortsFull, SourcesFull bool
}

// Knocks reads who knocked at what in the table of that name. Errors to test for:
// [ErrPermission].
func (c *Conn) Knocks(table string) (*Knocks, error) {
	out := &Knocks{}
	for _, s := range rules.KnockSets() {
		memory, raw, err := c.knockSet(table, s.Name)
		if err != nil {
			return nil, fmt.Errorf("read who knocked: %w", err)
		}
		if memory == 0 {
			continue
		}
		out.Counted, out.Memory = true, memory
		now := time.Now()
		var list []Knock
		for _, el := range raw {
			if k, ok := knockOf(s, el, now, memory); ok {
				list = append(list, k)
			}
		}
		if s.V4 || s.V6 {
			out.Sources, out.SourcesFull = append(out.Sources, list...), out.SourcesFull || len(raw) >= s.Size
		} else {
			out.Ports, out.PortsFull = list, len(raw) >= s.Size
		}
	}
	slices.SortFunc(out.Ports, func(a, b Knock) int {
		return cmp.Or(cmp.Compare(b.Packets, a.Packets), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	slices.SortFunc(out.Sources, func(a, b Knock) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(b.Packets, a.Packets), a.Source.Compare(b.Source))
	})
	return out, nil
}

// knockSet reads how long a set remembers, and its elements as they are; 0 when it is
// not there.
func (c *Conn) knockSet(table, set string) (memory time.Duration, raw [][]byte, err error) {
	const tries = 10
	err = errTorn
	for i := 0; i < tries && errors.Is(err, errTorn); i++ {
		memory, raw = 0, nil
		q := attrString(attrString(nil, unix.NFTA_SET_TABLE, table), unix.NFTA_SET_NAME, set)
		err = c.ask(unix.NFT_MSG_GETSET, 0, unix.NFPROTO_INET, q, func(r reply) error {
			memory = time.Duration(value64(attrOf(r.attrs, unix.NFTA_SET_TIMEOUT))) * time.Millisecond
			return nil
		})
		if err == nil {
			q = attrString(attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table), unix.NFTA_SET_ELEM_LIST_SET, set)
			err = c.dump(unix.NFT_MSG_GETSETELEM, q, func(r reply) error {
				for _, el := range attributes(attrOf(r.attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
					raw = append(raw, slices.Clone(el))
				}
				return nil
			})
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return 0, nil, nil
	}
	return memory, raw, err
}

// knockOf reads an element.
func knockOf(s rules.KnockSet, el []byte, now time.Time, memory time.Duration) (Knock, bool) {
	key := attrOf(attrOf(el, unix.NFTA_SET_ELEM_KEY), unix.NFTA_DATA_VALUE)
	k := Knock{}
	size := 0
	switch {
	case s.V4:
		size = 4
	case s.V6:
		size = 16
	}
	if len(key) != size+8 { // the protocol and the port, 4 bytes each
		return k, false
	}
	if size > 0 {
		k.Source, _ = netip.AddrFromSlice(key[:size])
	}
	k.Protocol, k.Port = rules.Protocol(key[size]), binary.BigEndian.Uint16(key[size+4:])
	for _, e := range statefulExpressions(el, walkElemExprs, unix.NFTA_SET_ELEM_EXPR) {
		if e.name == "counter" {
			k.Packets, k.Bytes = value64(attrOf(e.data, unix.NFTA_COUNTER_PACKETS)), value64(attrOf(e.data, unix.NFTA_COUNTER_BYTES))
		}
	}
	k.Last = now.Add(timeLeft(el) - memory)
	return k, true
}

// KeptKnocks is the lists of who knocked as they were at a moment.
type KeptKnocks struct {
	table string
	sets  map[string][][]byte
}

// KeepKnocks notes the lists, for [Conn.PutKnocks].
func (c *Conn) KeepKnocks(table string) (*KeptKnocks, error) {
	kept := &KeptKnocks{table, map[string][][]byte{}}
	for _, s := range rules.KnockSets() {
		memory, raw, err := c.knockSet(table, s.Name)
		if err != nil {
			return nil, fmt.Errorf("read who knocked: %w", err)
		}
		if memory > 0 {
			kept.sets[s.Name] = raw
		}
	}
	return kept, nil
}

// PutKnocks makes the lists what they were, so that a verification of this host does
// not stand in them as its worst visitor. What others did meanwhile is lost with it.
// It decides nothing: no packet meets another verdict.
func (c *Conn) PutKnocks(kept *KeptKnocks) error {
	var msgs []message
	for _, s := range rules.KnockSets() {
		raw, there := kept.sets[s.Name]
		if !there {
			continue
		}
		q := attrString(attrString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, kept.table), unix.NFTA_SET_ELEM_LIST_SET, s.Name)
		msgs = append(msgs, message{typ: unix.NFT_MSG_DELSETELEM, attrs: q, what: "removal of the elements of set " + s.Name})
		w := elementWriter{table: kept.table, name: s.Name, typ: unix.NFT_MSG_NEWSETELEM, flags: unix.NLM_F_CREATE, what: "elements"}
		for _, el := range raw {
			w.room()
			w.buf = nest(w.buf, unix.NFTA_LIST_ELEM, el)
		}
		w.flush()
		msgs = append(msgs, w.out...)
	}
	if len(msgs) == 0 {
		return nil
	}
	const tries = 10
	err := ErrStale
	for i := 0; i < tries && errors.Is(err, ErrStale); i++ {
		var gen Generation
		if gen, err = c.Generation(); err == nil {
			err = c.transact(gen.ID, msgs)
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return nil // the table went away, or counts no more
	}
	if err != nil {
		return fmt.Errorf("put back who knocked: %w", err)
	}
	return nil
}
