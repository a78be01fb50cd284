package main

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"

	"deadlight/firewall"
)

// sources lets a policy read its other files, and remembers what it was given:
// what was parsed is what is stored.
type sources struct {
	disk  disk
	read  map[string][]byte // nil: it is not there
	names []string          // of read, in order; the policy first
	globs []firewall.Glob
	// hashed are long files, which are hashed while they are parsed.
	hashed map[string]func() firewall.Source
}

func newSources(file string, policy []byte, g *guard) *sources {
	name := filepath.Base(file)
	return &sources{disk: disk{filepath.Dir(file), g}, read: map[string][]byte{name: policy}, names: []string{name}}
}

// Glob implements [rules.Files].
func (s *sources) Glob(pattern string) ([]string, error) {
	for _, g := range s.globs {
		if g.Pattern == pattern {
			return slices.Clone(g.Names), nil
		}
	}
	names, err := s.disk.Glob(pattern)
	if err == nil {
		s.globs = append(s.globs, firewall.Glob{Pattern: pattern, Names: slices.Clone(names)})
	}
	return names, err
}

// ReadFile implements [rules.Files].
func (s *sources) ReadFile(name string) ([]byte, error) {
	if b, ok := s.read[name]; ok && b != nil {
		return b, nil
	}
	b, err := s.disk.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if _, again := s.read[name]; !again {
		s.names = append(s.names, name)
	}
	s.read[name] = b
	if len(b) > longFile {
		if s.hashed == nil {
			s.hashed = map[string]func() firewall.Source{}
		}
		s.hashed[name] = meanwhile(func() firewall.Source { return firewall.NewSource(name, b) })
	}
	return b, err
}

// longFile is worth a goroutine.
const longFile = 1 << 20

// meanwhile begins something, and gives what comes of it to who asks.
func meanwhile[T any](f func() T) func() T {
	done := make(chan T, 1)
	go func() { done <- f() }()
	return sync.OnceValue(func() T { return <-done })
}

// list is what goes into the state.
func (s *sources) list() []firewall.Source {
	var out []firewall.Source
	for _, name := range s.names {
		if hashed := s.hashed[name]; hashed != nil {
			out = append(out, hashed())
		} else if b := s.read[name]; b != nil {
			out = append(out, firewall.NewSource(name, b))
		} else {
			out = append(out, firewall.Source{Name: name, Absent: true})
		}
	}
	return out
}
