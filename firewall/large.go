package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// A large set is never dumped: for an interval set the kernel needs time that
// grows with the square of its size. What it holds is known by three proofs: the
// mark in the chain applied says which content was loaded, the kernel counts the
// elements (since Linux 6.14), and elements drawn at random are looked up.

// Samples is how many ranges of a large set are looked up by default. Whoever
// exchanged one element in n for another, count unchanged, escapes with a
// probability of 1 - Samples/n; every check draws anew.
const Samples = 4096

// applySamples is how many an apply looks up before and after it writes.
const applySamples = 512

// Everything makes a check look up every element of the large sets: about 5 s for
// a million of them.
const Everything = -1

// Check reads the table and lists what separates it from the wanted one. Of a
// large set it looks up as many elements as samples says, drawn at random; c.Known
// gives what they should be.
func (c *Conn) Check(wanted *Snapshot, samples int) (*Snapshot, []Difference, error) {
	const tries = 10
	for range tries {
		is, err := c.Snapshot(rules.TableName)
		if err != nil {
			return nil, nil, err
		}
		content := func(set string) *rules.Set {
			if c.Known == nil {
				return nil
			}
			return c.Known(set, wanted.sets[set].large.digest)
		}
		diff, _, err := c.differences(is, wanted, content, samples)
		if err != nil {
			return nil, nil, err
		}
		now, err := c.Generation()
		if err != nil {
			return nil, nil, err
		}
		if now.ID == is.Generation.ID {
			return is, diff, nil
		}
	}
	return nil, nil, fmt.Errorf("read table %s: %w", rules.TableName, errTorn)
}

// contentOf gives what the large sets of a table hold, as far as c.Known knows.
func (c *Conn) contentOf(is *Snapshot) func(set string) *rules.Set {
	return func(set string) *rules.Set {
		if l := is.sets[set].large; c.Known != nil && l != nil && l.digest != "" {
			return c.Known(set, l.digest)
		}
		return nil
	}
}

// confirm looks up what a transaction changed in large sets.
func (c *Conn) confirm(t *transaction) ([]Difference, error) {
	lookUp := func(name string, list []rules.AddrRange, present bool) ([]Difference, error) {
		return c.lookUp(name, t.real[name], t.wanted.sets[name], list, present)
	}
	for _, name := range sortedKeys(t.delta) {
		d, err := lookUp(name, sample(t.delta[name].missing, applySamples), true)
		if err != nil || d != nil {
			return d, err
		}
		for _, r := range sample(t.delta[name].gone, applySamples) {
			if t.sets[name].Addrs.Contains(r.Lo) {
				continue // another range holds it now
			}
			d, err := lookUp(name, []rules.AddrRange{{Lo: r.Lo, Hi: r.Lo}}, false)
			if err != nil || d != nil {
				return d, err
			}
		}
	}
	return nil, nil
}

// differences is Diff, and a look into the large sets that seem equal; spoiled are
// those that hold other elements than their mark says.
func (c *Conn) differences(is, wanted *Snapshot, content func(set string) *rules.Set, samples int) (out []Difference, spoiled map[string]bool, err error) {
	out, spoiled = Diff(is, wanted), map[string]bool{}
	if !is.Present || !wanted.Present {
		return out, nil, nil
	}
	for _, name := range sortedKeys(wanted.sets) {
		w, s := wanted.sets[name], is.sets[name]
		if w.large == nil || s == nil || len(diffSets(name, s, w, is.at)) > 0 {
			continue
		}
		set := content(name)
		if set == nil {
			continue
		}
		real := is.realName(name)
		d, err := c.lookUp(name, real, w, draw(set, samples), true)
		if err == nil && d == nil {
			d, err = c.edges(name, real, w, set)
		}
		if err != nil {
			return nil, nil, err
		}
		if d != nil {
			spoiled[name] = true
		}
		out = append(out, d...)
	}
	return out, spoiled, nil
}

// draw draws ranges of a set, n of the whole list that it may be a part of; all of
// them when n is negative or not smaller.
func draw(s *rules.Set, n int) []rules.AddrRange {
	if n < 0 || n >= s.OfList() {
		return slices.Collect(s.Addrs.All())
	}
	n = (n*s.Addrs.Len() + s.OfList() - 1) / s.OfList()
	out := make([]rules.AddrRange, n)
	for i := range out {
		out[i] = s.Addrs.At(rand.IntN(s.Addrs.Len()))
	}
	return out
}

// sample draws n ranges; all of them when n is negative or not smaller.
func sample(ranges []rules.AddrRange, n int) []rules.AddrRange {
	if n < 0 || n >= len(ranges) {
		return ranges
	}
	out := make([]rules.AddrRange, n)
	for i := range out {
		out[i] = ranges[rand.IntN(len(ranges))]
	}
	return out
}

// edges looks at the one address whose range has no end for the kernel to count.
func (c *Conn) edges(name, real string, set *setState, wanted *rules.Set) ([]Difference, error) {
	if !set.is(unix.NFT_SET_INTERVAL) {
		return nil, nil
	}
	if n := wanted.Addrs.Len(); n > 0 {
		if _, ok := endOf(wanted.Addrs.At(n - 1).Hi); !ok {
			return nil, nil
		}
	}
	size := 16
	if wanted.Type == rules.TypeIPv4 {
		size = 4
	}
	top, _ := netip.AddrFromSlice(bytes.Repeat([]byte{0xff}, size))
	return c.lookUp(name, real, set, []rules.AddrRange{{Lo: top, Hi: top}}, false)
}

// lookUp asks the kernel, which calls the set real, for ranges that must all be
// there, or the one that must be absent. The first that is not gives the difference.
func (c *Conn) lookUp(name, real string, set *setState, ranges []rules.AddrRange, present bool) ([]Difference, error) {
	const batch = 128
	w := &elementWriter{table: rules.TableName, name: real, set: &rules.Set{Name: name, Interval: set.is(unix.NFT_SET_INTERVAL)}, typ: unix.NFT_MSG_GETSETELEM}
	for ask := range slices.Chunk(ranges, batch) {
		w.out = nil
		w.ranges(ask)
		w.flush()
		i := 0
		wrong := -1
		keys := keysOf(ask, w.set.Interval)
		err := c.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_ACK, unix.NFPROTO_INET, w.out[0].attrs, func(r reply) error {
			for _, e := range attributes(attrOf(r.attrs, unix.NFTA_SET_ELEM_LIST_ELEMENTS)) {
				if i < len(keys) && wrong < 0 && (element{start: string(e)}).key() != keys[i].key {
					wrong = i
				}
				i++
			}
			return nil
		})
		missing := errors.Is(err, unix.ENOENT)
		if err != nil && !missing {
			return nil, fmt.Errorf("look up in set %s: %w", name, err)
		}
		if !present {
			if !missing {
				r := rangeText(ask[0])
				return []Difference{{Action: "remove", Kind: "element", Name: r + " of set " + name, Before: r}}, nil
			}
			continue
		}
		if missing && wrong < 0 {
			wrong = i // the kernel answers up to the first that is not there
		}
		if wrong >= 0 && wrong < len(keys) {
			r := rangeText(ask[keys[wrong].of])
			return []Difference{{Action: "add", Kind: "element", Name: r + " of set " + name, After: r}}, nil
		}
	}
	return nil, nil
}

// rangeText writes a range as a policy would.
func rangeText(r rules.AddrRange) string {
	if p, ok := r.Prefix(); ok && !p.IsSingleIP() {
		return p.String()
	}
	if r.Lo == r.Hi {
		return r.Lo.String()
	}
	return r.Lo.String() + "-" + r.Hi.String()
}

type askedKey struct {
	key string
	of  int // index of the range
}

// keysOf are the keys that addresses writes, in its order.
func keysOf(ranges []rules.AddrRange, interval bool) []askedKey {
	var out []askedKey
	for i, r := range ranges {
		out = append(out, askedKey{string(r.Lo.AsSlice()), i})
		if end, ok := endOf(r.Hi); ok && interval {
			out = append(out, askedKey{string(end.AsSlice()), i})
		}
	}
	return out
}
