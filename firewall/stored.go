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

// stored is a Snapshot as it is kept in the state.
type stored struct {
	Version    int
	Table      string
	Chains     map[string]storedChain
	Sets       map[string]storedSet
	Objects    map[string]storedObject
	Flowtables map[string]string
}

type storedChain struct {
	Definition, Hook string
	Base, Anonymous  bool
	Rules            []string
}

type storedSet struct {
	Definition  string
	Flags       uint32
	Count       int
	Elements    []storedElement
	Large       *storedLarge
	First, Last time.Time
}

type storedElement struct {
	Start, End string
	Vanishes   bool
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

// ErrStored: the bytes are no snapshot of this version.
var ErrStored = errors.New("not a stored ruleset of this version")

// MarshalBinary implements [encoding.BinaryMarshaler]. The generation is not part
// of it: it belongs to a kernel, not to a content.
func (s *Snapshot) MarshalBinary() ([]byte, error) {
	if !s.Present {
		return nil, errors.New("store the ruleset: there is no table")
	}
	out := stored{
		Version: storedVersion, Table: s.table, Flowtables: s.flowtables,
		Chains: make(map[string]storedChain, len(s.chains)), Sets: make(map[string]storedSet, len(s.sets)),
		Objects: make(map[string]storedObject, len(s.objects)),
	}
	for name, ch := range s.chains {
		out.Chains[name] = storedChain{ch.definition, ch.hook, ch.base, ch.anonymous, ch.rules}
	}
	for name, set := range s.sets {
		o := storedSet{Definition: set.definition, Flags: set.flags, Count: set.count, First: set.first, Last: set.last}
		for _, e := range set.elements {
			o.Elements = append(o.Elements, storedElement{e.start, e.end, e.vanishes})
		}
		if set.large != nil {
			o.Large = &storedLarge{set.large.digest, set.large.count}
		}
		out.Sets[name] = o
	}
	for key, o := range s.objects {
		out.Objects[key] = storedObject{o.name, o.typ, o.data}
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
	for name, ch := range in.Chains {
		s.chains[name] = &chainState{ch.Definition, ch.Base, ch.Anonymous, ch.Hook, ch.Rules}
	}
	for name, set := range in.Sets {
		o := &setState{definition: set.Definition, flags: set.Flags, count: set.Count, first: set.First, last: set.Last}
		for _, e := range set.Elements {
			o.elements = append(o.elements, element{e.Start, e.End, e.Vanishes})
		}
		if set.Large != nil {
			o.large = &largeState{set.Large.Digest, set.Large.Count}
		}
		s.sets[name] = o
	}
	for key, o := range in.Objects {
		s.objects[key] = objectState{o.Name, o.Type, o.Data}
	}
	if in.Flowtables != nil {
		s.flowtables = in.Flowtables
	}
	return nil
}
