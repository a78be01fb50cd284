package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"deadlight/rules"
)

// readPolicy reads and compiles a policy. Problems are printed; those that keep
// it from being used end the command with exit 2, and consequence says what did
// not happen.
func readPolicy(e env, file, consequence string) (*rules.Ruleset, error) {
	rs, _, err := readSources(e, file, consequence)
	return rs, err
}

// readSources is readPolicy, with what the policy was read from.
func readSources(e env, file, consequence string) (*rules.Ruleset, *sources, error) {
	return readGuarded(e, file, consequence, nil)
}

// readTrusted is readSources for what is put in force: what others can write is
// refused before anything of it is shown, unless insecure allows it.
func readTrusted(e env, file, consequence string, insecure bool) (*rules.Ruleset, *sources, error) {
	if insecure {
		return readSources(e, file, consequence)
	}
	g, err := newGuard()
	if err != nil {
		return nil, nil, refused(err, "")
	}
	return readGuarded(e, file, consequence, g)
}

func readGuarded(e env, file, consequence string, g *guard) (*rules.Ruleset, *sources, error) {
	rs, problems, from, err := parseGuarded(file, g)
	if unsafe := g.err(consequence); unsafe != nil {
		return nil, nil, unsafe
	}
	if err != nil {
		return nil, nil, err
	}
	if rs != nil {
		return rs, from, e.showProblems(problems, "")
	}
	return nil, nil, unusable(e, problems, consequence)
}

// unusable prints the problems that keep a policy from being used and, last, the
// consequence.
func unusable(e env, problems []rules.Problem, consequence string) error {
	last := fmt.Sprintf("deadlight: %s: %s", rules.Summary(problems), consequence)
	return errors.Join(e.showProblems(problems, last), silently(exitUsage))
}

// parsePolicy reads a policy without printing anything; rs is nil if a problem
// keeps it from being used.
func parsePolicy(file string) (rs *rules.Ruleset, problems []rules.Problem, err error) {
	rs, problems, _, err = parseSources(file)
	return rs, problems, err
}

// parseSources reads a policy and keeps what it was read from.
func parseSources(file string) (rs *rules.Ruleset, problems []rules.Problem, from *sources, err error) {
	return parseGuarded(file, nil)
}

// parseGuarded is parseSources; the guard, if there is one, judges what is opened.
func parseGuarded(file string, g *guard) (rs *rules.Ruleset, problems []rules.Problem, from *sources, err error) {
	src, err := readFile(file, g)
	switch {
	case errors.Is(err, fs.ErrNotExist) && file == defaultPolicy:
		return nil, nil, nil, usageError("name a policy, or write one from what listens now: sudo deadlight init", "there is no policy at %s", file)
	case err != nil:
		var p *fs.PathError
		if errors.As(err, &p) {
			err = p.Err
		}
		return nil, nil, nil, usageError("", "read %s: %w", file, err)
	}
	from = newSources(file, src, g)
	if rs, problems = compileFiles(file, src, from); rs == nil {
		return nil, problems, nil, nil
	}
	return rs, problems, from, nil
}

// parseFiles reads a policy that is among files.
func parseFiles(file string, files rules.Files) (*rules.Ruleset, []rules.Problem) {
	src, err := files.ReadFile(filepath.Base(file))
	if err != nil {
		return nil, []rules.Problem{{Severity: rules.Error, Pos: rules.Pos{File: file, Line: 1, Column: 1}, Summary: err.Error()}}
	}
	return compileFiles(file, src, files)
}

func compileFiles(file string, src []byte, files rules.Files) (*rules.Ruleset, []rules.Problem) {
	p, problems := rules.Parse(file, src, files)
	if p == nil {
		return nil, problems
	}
	if from, ok := files.(*sources); ok && from.hashed != nil {
		runtime.GC() // what reading a long list left behind makes room for compiling it
	}
	return rules.Compile(p), inFileOrder(append(problems, p.Expired(time.Now())...))
}

// largestFile is more than any policy or list may have; the parser says so in its
// own words.
const largestFile = 256<<20 + 1

// readFile reads a regular file, or a pipe that the shell has opened for us: any
// other pipe or device could keep us waiting, or never end.
func readFile(name string, g *guard) ([]byte, error) {
	open := os.Open
	if g != nil {
		open = g.open
	} else if info, err := os.Stat(name); err != nil {
		return nil, err
	} else if err := regular(name, info.Mode()); err != nil {
		return nil, err
	}
	f, err := open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := regular(name, info.Mode()); err != nil {
		return nil, err
	}
	// A long list is read into one piece of memory that never grows.
	b := bytes.NewBuffer(make([]byte, 0, min(info.Size(), largestFile)+bytes.MinRead))
	_, err = b.ReadFrom(io.LimitReader(f, largestFile))
	return b.Bytes(), err
}

// regular says why a file cannot be read to its end.
func regular(name string, mode fs.FileMode) error {
	if mode.IsRegular() || fromPipe(name) && mode&fs.ModeNamedPipe != 0 {
		return nil
	}
	err := errors.New("not a regular file")
	if mode.IsDir() {
		err = syscall.EISDIR
	}
	return &fs.PathError{Op: "read", Path: name, Err: err}
}

// fromPipe reports whether a name stands for what the shell has opened for us.
func fromPipe(name string) bool {
	return strings.HasPrefix(name, "/dev/fd/") || strings.HasPrefix(name, "/proc/self/fd/") || name == "/dev/stdin"
}

// inFileOrder sorts problems by place; files stay in the order they were read.
func inFileOrder(problems []rules.Problem) []rules.Problem {
	order := map[string]int{}
	for _, p := range problems {
		if _, ok := order[p.Pos.File]; !ok {
			order[p.Pos.File] = len(order)
		}
	}
	slices.SortStableFunc(problems, func(a, b rules.Problem) int {
		return cmp.Or(cmp.Compare(order[a.Pos.File], order[b.Pos.File]),
			cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Column, b.Pos.Column))
	})
	return problems
}

// disk lets a policy read its includes and lists, which stand relative to its
// own directory.
type disk struct {
	dir   string
	guard *guard // judges what is opened; nil: nobody does
}

func (d disk) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(d.dir, name)
}

// Glob implements [rules.Files].
func (d disk) Glob(pattern string) ([]string, error) {
	if filepath.IsAbs(pattern) {
		return d.glob(pattern)
	}
	// The directory is no pattern, whatever characters it holds.
	dir := strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(d.dir)
	names, err := d.glob(filepath.Join(dir, pattern))
	if err != nil {
		return nil, err
	}
	for i, name := range names {
		if names[i], err = filepath.Rel(d.dir, name); err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	return names, nil
}

func (d disk) glob(pattern string) ([]string, error) {
	if d.guard != nil {
		if err := d.guard.patternDirs(pattern); err != nil {
			return nil, err
		}
	}
	return filepath.Glob(pattern)
}

// ReadFile implements [rules.Files].
func (d disk) ReadFile(name string) ([]byte, error) { return readFile(d.path(name), d.guard) }

// writeJSON prints one documented object.
func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("write json: %w", err)
	}
	return nil
}
