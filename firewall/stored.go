package firewall

import (
	"bytes"
	"encoding/gob"
	"errors"
	"fmt"
	"time"
)

// storedVersion changes when what is stored changes its meaning.
const storedVersion = 1

// stored is a Snapshot as it is kept in the state. Lists in order of name, so that
// equal snapshots are equal bytes.
type stored struct {
	Version int
	Table   string
	Chains  []storedChain
	Sets    []storedSet
	Objects []storedObject
}

type storedChain struct {
	Name, Definition, Hook string
	Base, Anonymous        bool
	Rules                  []string
}

type storedSet struct {
	Name, Definition string
	Flags            uint32
	Count            int
	Elements         []storedElement
	Large            *storedLarge
	First, Last      time.Time
}

type storedElement struct {
	Start, End string
	Vanishes   bool
	Until      time.Time // of a ban
}

type storedLarge struct {
	Digest string
	Count  int
}

type storedObject struct {
	Name string
	Type uint32
	Data string
}

// ErrStored means that bytes are no snapshot of this version.
var ErrStored = errors.New("not a stored ruleset of this version")

// MarshalBinary implements [encoding.BinaryMarshaler]. The generation is not part
// of it: it belongs to a kernel, not to a content. Nor are flowtables: Deadlight
// makes none.
func (s *Snapshot) MarshalBinary() ([]byte, error) {
	if !s.Present {
		return nil, errors.New("store the ruleset: there is no table")
	}
	out := stored{Version: storedVersion, Table: s.table}
	for _, name := range sortedKeys(s.chains) {
		ch := s.chains[name]
		out.Chains = append(out.Chains, storedChain{name, ch.definition, ch.hook, ch.base, ch.anonymous, ch.rules})
	}
	for _, name := range sortedKeys(s.sets) {
		set := s.sets[name]
		o := storedSet{Name: name, Definition: set.definition, Flags: set.flags, Count: set.count, First: set.first, Last: set.last}
		for _, e := range set.elements {
			o.Elements = append(o.Elements, storedElement{e.start, e.end, e.vanishes, e.until})
		}
		if set.large != nil {
			o.Large = &storedLarge{set.large.digest, set.large.count}
		}
		out.Sets = append(out.Sets, o)
	}
	for _, key := range sortedKeys(s.objects) {
		o := s.objects[key]
		out.Objects = append(out.Objects, storedObject{o.name, o.typ, o.data})
	}
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(&out); err != nil {
		return nil, fmt.Errorf("store the ruleset: %w", err)
	}
	return b.Bytes(), nil
}

// UnmarshalBinary implements [encoding.BinaryUnmarshaler]. Errors to test for:
// [ErrStored].
func (s *Snapshot) UnmarshalBinary(b []byte) error {
	var in stored
	if err := gob.NewDecoder(bytes.NewReader(b)).Decode(&in); err != nil {
		return fmt.Errorf("%w: %w", ErrStored, err)
	}
	if in.Version != storedVersion {
		return fmt.Errorf("%w: it is of version %d", ErrStored, in.Version)
	}
	*s = *newSnapshot()
	s.Present, s.table = true, in.Table
	for _, ch := range in.Chains {
		s.chains[ch.Name] = &chainState{ch.Definition, ch.Base, ch.Anonymous, ch.Hook, ch.Rules, nil}
	}
	for _, set := range in.Sets {
		o := &setState{definition: set.Definition, flags: set.Flags, count: set.Count, first: set.First, last: set.Last}
		for _, e := range set.Elements {
			o.elements = append(o.elements, element{e.Start, e.End, e.Vanishes, e.Until})
		}
		if set.Large != nil {
			o.large = &largeState{set.Large.Digest, set.Large.Count}
		}
		s.sets[set.Name] = o
	}
	for _, o := range in.Objects {
		s.objects[objectKind(o.Type)+" "+o.Name] = objectState{o.Name, o.Type, o.Data}
	}
	return nil
}
