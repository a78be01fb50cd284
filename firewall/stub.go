package firewall

import (
	"bytes"
	"encoding/gob"
	"time"

	"deadlight/rules"
)

// Temporary: stands in until Snapshot has these itself.

type gobChain struct {
	Definition, Hook string
	Base, Anonymous  bool
	Rules            [][2]string
}
type gobSet struct {
	Definition                 string
	Anonymous, Constant, Meter bool
	Elements                   []string
	First, Last                time.Time
}
type gobObject struct {
	Name string
	Typ  uint32
	Data string
}
type gobSnapshot struct {
	Present bool
	At      time.Time
	Table   string
	Chains  map[string]gobChain
	Sets    map[string]gobSet
	Objects map[string]gobObject
	Flow    map[string]string
}

// MarshalBinary implements encoding.BinaryMarshaler.
func (s *Snapshot) MarshalBinary() ([]byte, error) {
	g := gobSnapshot{s.Present, s.at, s.table, map[string]gobChain{}, map[string]gobSet{}, map[string]gobObject{}, s.flowtables}
	for k, c := range s.chains {
		gc := gobChain{c.definition, c.hook, c.base, c.anonymous, nil}
		for _, r := range c.rules {
			gc.Rules = append(gc.Rules, [2]string{r.comment, r.raw})
		}
		g.Chains[k] = gc
	}
	for k, c := range s.sets {
		g.Sets[k] = gobSet{c.definition, c.anonymous, c.constant, c.meter, c.elements, c.first, c.last}
	}
	for k, c := range s.objects {
		g.Objects[k] = gobObject{c.name, c.typ, c.data}
	}
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(g)
	return b.Bytes(), err
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler.
func (s *Snapshot) UnmarshalBinary(b []byte) error {
	var g gobSnapshot
	if err := gob.NewDecoder(bytes.NewReader(b)).Decode(&g); err != nil {
		return err
	}
	*s = *newSnapshot()
	s.Present, s.at, s.table = g.Present, g.At, g.Table
	for k, c := range g.Chains {
		ch := chainState{definition: c.Definition, hook: c.Hook, base: c.Base, anonymous: c.Anonymous}
		for _, r := range c.Rules {
			ch.rules = append(ch.rules, ruleState{r[0], r[1]})
		}
		s.chains[k] = ch
	}
	for k, c := range g.Sets {
		s.sets[k] = setState{c.Definition, c.Anonymous, c.Constant, c.Meter, c.Elements, c.First, c.Last}
	}
	for k, c := range g.Objects {
		s.objects[k] = objectState{c.Name, c.Typ, c.Data}
	}
	for k, v := range g.Flow {
		s.flowtables[k] = v
	}
	return nil
}

// Meant is what a ruleset will be once it is loaded.
func Meant(rs *rules.Ruleset, now time.Time) (*Snapshot, error) {
	want, err := encode(&rs.Table, now)
	if err != nil {
		return nil, err
	}
	return snapshotOf(want.all(), now)
}
