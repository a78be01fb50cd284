package firewall

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"deadlight/rules"
)

// storedFiles gives a policy the files that it was read from, as they were then.
type storedFiles struct {
	state  *State
	record *Record
	err    error // of the state, which the parser would take for one of the policy
}

// Glob implements [rules.Files].
func (f *storedFiles) Glob(pattern string) ([]string, error) {
	for _, g := range f.record.Globs {
		if g.Pattern == pattern {
			return slices.Clone(g.Names), nil
		}
	}
	return nil, nil
}

// ReadFile implements [rules.Files].
func (f *storedFiles) ReadFile(name string) ([]byte, error) {
	for _, src := range f.record.Sources {
		if src.Name != name || src.Absent {
			continue
		}
		b, err := f.state.blob(src.SHA256)
		if err != nil && f.err == nil {
			f.err = err
		}
		return b, err
	}
	return nil, &fs.PathError{Op: "read", Path: name, Err: fs.ErrNotExist}
}

// Compile makes the ruleset of a record again, from the stored sources and the
// temporary rules alone.
func (s *State) Compile(r *Record) (*rules.Ruleset, error) {
	p, err := s.Parse(r)
	if err != nil {
		return nil, err
	}
	p, _ = Beside(p, r.Temporary)
	return rules.Compile(p), nil
}

// Parse reads the policy of a record again, without the temporary rules.
func (s *State) Parse(r *Record) (*rules.Policy, error) {
	main, err := s.blob(r.Sources[0].SHA256)
	if err != nil {
		return nil, err
	}
	files := &storedFiles{state: s, record: r}
	p, problems := rules.Parse(r.Policy, main, files)
	if files.err != nil {
		return nil, files.err
	}
	if p == nil {
		var b strings.Builder
		if err := rules.Render(&b, problems, ""); err != nil {
			return nil, err
		}
		return nil, s.failed("", fmt.Errorf("%w: the stored policy is not valid for this version of deadlight:\n%s", ErrStateVersion, b.String()))
	}
	return p, nil
}

// Known gives a [Conn] the large sets of a record, compiled when one is asked
// for. What cannot be compiled any more is not known: then all of a set is sent,
// and none of it is looked up.
func (s *State) Known(r *Record) func(set, digest string) *rules.Set {
	var known func(set, digest string) *rules.Set
	return func(set, digest string) *rules.Set {
		if known == nil {
			table := &rules.Table{}
			if rs, err := s.Loaded(r); err == nil {
				table = &rs.Table
			}
			known = KnownIn(table)
		}
		return known(set, digest)
	}
}

// KnownIn gives a [Conn] the large sets of a table.
func KnownIn(table *rules.Table) func(set, digest string) *rules.Set {
	digests := map[string]string{}
	return func(set, digest string) *rules.Set {
		for i := range table.Sets {
			s := &table.Sets[i]
			if s.Name != set {
				continue
			}
			if digests[set] == "" {
				digests[set] = s.Digest()
			}
			if digests[set] == digest {
				return s
			}
		}
		return nil
	}
}

// HoldsLarge reports whether a table has sets too large to be read back: only
// [Conn.Check] looks into them.
func (s *Snapshot) HoldsLarge() bool {
	for _, set := range s.sets {
		if set.large != nil {
			return true
		}
	}
	return false
}
