package firewall

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"deadlight/rules"
)

// stored gives a policy the files that it was read from, as they were then.
type stored struct {
	state  *State
	record *Record
	err    error // of the state, which the parser would take for one of the policy
}

// Glob implements [rules.Files].
func (f *stored) Glob(pattern string) ([]string, error) {
	for _, g := range f.record.Globs {
		if g.Pattern == pattern {
			return slices.Clone(g.Names), nil
		}
	}
	return nil, nil
}

// ReadFile implements [rules.Files].
func (f *stored) ReadFile(name string) ([]byte, error) {
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

// Compile makes the ruleset of a record again, from the stored sources alone.
func (s *State) Compile(r *Record) (*rules.Ruleset, error) {
	main, err := s.blob(r.Sources[0].SHA256)
	if err != nil {
		return nil, err
	}
	files := &stored{state: s, record: r}
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
	return rules.Compile(p), nil
}
