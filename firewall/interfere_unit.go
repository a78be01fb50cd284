package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// What systemd starts, read from its files (systemd.unit(5)): which units are
// enabled, what they run, and in which order. Nobody is asked over a bus: the
// same holds of a tree that is not running.

const ourUnit = "deadlight.service"

// unitDirs are systemd's, the first wins.
func unitDirs() []string {
	return []string{
		"etc/systemd/system", "run/systemd/system", "run/systemd/generator", "usr/local/lib/systemd/system",
		"usr/lib/systemd/system", "lib/systemd/system", "run/systemd/generator.late",
	}
}

// unit is one unit as far as it matters here.
type unit struct {
	after, before []string
	pulls         []string // units that start with it
	execs         []unitExec
	defaults      bool // ordered after basic.target, as units are by default
}

// unitExec is one line that a unit runs.
type unitExec struct{ when, line string }

// hostTree reads a tree, and keeps what could not be read.
type hostTree struct {
	root  fs.FS
	units map[string]*unit // nil: there is none, or it is masked
	blind []Interference
}

// unitInterference lists the units and scripts of a tree that may change the
// ruleset behind Deadlight's back.
func unitInterference(root fs.FS) []Interference {
	h := &hostTree{root: root, units: map[string]*unit{}}
	enabled := h.enabled()
	var out []Interference
	for _, name := range enabled {
		u := h.unit(name)
		if u == nil || name == ourUnit {
			continue
		}
		flushes := h.flushes(name, u)
		if len(flushes) > 0 {
			out = append(out, h.flushing(name, flushes, slices.Contains(enabled, ourUnit)))
		}
		if i, ok := h.manager(name); ok {
			out = append(out, i)
		}
	}
	out = append(out, h.scripts()...)
	return append(out, h.blind...)
}

// missed keeps what could not be read; what is not there is nothing.
func (h *hostTree) missed(where string, err error) {
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return
	}
	i := Interference{Severity: May, Unknown: true, Kind: "unit", Where: where, Fact: fmt.Sprintf("Could not tell whether it flushes the ruleset: %v.", err)}
	if !slices.ContainsFunc(h.blind, func(o Interference) bool { return o.Where == i.Where && o.Fact == i.Fact }) {
		h.blind = append(h.blind, i)
	}
}

// entries lists a directory.
func (h *hostTree) entries(dir string) []fs.DirEntry {
	list, err := fs.ReadDir(h.root, dir)
	h.missed("/"+dir, err)
	return list
}

// enabled are the services that start by themselves, by name: those that some
// unit is told to want or require, and what they pull in in turn.
func (h *hostTree) enabled() []string {
	var queue []string
	for _, dir := range unitDirs() {
		for _, d := range h.entries(dir) {
			if ext := path.Ext(d.Name()); ext != ".wants" && ext != ".requires" {
				continue
			}
			for _, e := range h.entries(path.Join(dir, d.Name())) {
				queue = append(queue, e.Name())
			}
		}
	}
	seen := map[string]bool{}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if seen[name] || strings.ContainsAny(name, "/%") {
			continue
		}
		seen[name] = true
		u := h.unit(name)
		if u == nil {
			continue
		}
		queue = append(queue, u.pulls...)
		switch ext := path.Ext(name); ext { // what they start goes by their name unless they say else
		case ".timer", ".path", ".socket":
			queue = append(queue, strings.TrimSuffix(name, ext)+".service")
		}
	}
	return slices.DeleteFunc(sortedKeys(seen), func(name string) bool { return path.Ext(name) != ".service" })
}

// unit reads a unit with its drop-ins; nil when there is none or it is masked.
func (h *hostTree) unit(name string) *unit {
	if u, known := h.units[name]; known {
		return u
	}
	h.units[name] = nil
	names := []string{name}
	if at := strings.IndexByte(name, '@'); at >= 0 {
		names = append(names, name[:at+1]+path.Ext(name)) // the template of an instance
	}
	var text []byte
	found := false
	for _, n := range names {
		for _, dir := range unitDirs() {
			b, err := readUnit(h.root, path.Join(dir, n))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			h.missed(n, err)
			text, found = b, true
			break
		}
		if found {
			break
		}
	}
	if !found || len(bytes.TrimSpace(text)) == 0 { // an empty file masks, as /dev/null does
		return nil
	}
	u := &unit{defaults: path.Ext(name) == ".service"}
	u.read(text)
	for _, n := range names {
		dropIns := map[string]string{} // by name: the first directory wins
		for _, dir := range unitDirs() {
			for _, e := range h.entries(path.Join(dir, n+".d")) {
				if _, known := dropIns[e.Name()]; !known && path.Ext(e.Name()) == ".conf" {
					dropIns[e.Name()] = path.Join(dir, n+".d", e.Name())
				}
			}
		}
		for _, e := range sortedKeys(dropIns) {
			b, err := readUnit(h.root, dropIns[e])
			h.missed("/"+dropIns[e], err)
			u.read(b)
		}
	}
	h.units[name] = u
	return u
}

// readUnit reads a file; what is no regular file, such as /dev/null, is empty.
func readUnit(root fs.FS, name string) ([]byte, error) {
	info, err := fs.Stat(root, name)
	if err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	if info.Size() > largestScript {
		return nil, fmt.Errorf("/%s is too large", name)
	}
	return fs.ReadFile(root, name)
}

const largestScript = 1 << 20

// read takes the settings of a unit file or of a drop-in.
func (u *unit) read(text []byte) {
	section := ""
	for _, line := range strings.Split(strings.ReplaceAll(string(text), "\\\n", " "), "\n") {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
			continue
		}
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		switch {
		case section == "[Unit]" && key == "After":
			u.after = append(u.after, strings.Fields(value)...)
		case section == "[Unit]" && key == "Before":
			u.before = append(u.before, strings.Fields(value)...)
		case section == "[Unit]" && slices.Contains([]string{"Wants", "Requires", "BindsTo", "Upholds"}, key), key == "Unit":
			u.pulls = append(u.pulls, strings.Fields(value)...)
		case section == "[Unit]" && key == "DefaultDependencies":
			u.defaults = u.defaults && !slices.Contains([]string{"no", "false", "off", "0"}, strings.ToLower(value))
		case section == "[Service]" && strings.HasPrefix(key, "Exec"):
			if value == "" { // what stood there before is taken back
				u.execs = slices.DeleteFunc(u.execs, func(e unitExec) bool { return e.when == key })
				continue
			}
			u.execs = append(u.execs, unitExec{key, value})
		}
	}
}

// bootOrder says whether a unit starts before or after another, as far as their
// files and those of the targets between them say.
type bootOrder uint8

const (
	unordered bootOrder = iota
	earlier
	later
)

func (h *hostTree) orderOf(name, than string) bootOrder {
	switch {
	case h.follows(name, than, map[string]bool{}):
		return later
	case h.follows(than, name, map[string]bool{}):
		return earlier
	}
	return unordered
}

// follows reports whether a is ordered after b.
func (h *hostTree) follows(a, b string, seen map[string]bool) bool {
	if seen[a] {
		return false
	}
	seen[a] = true
	u := h.unit(a)
	if u == nil && path.Ext(a) != ".target" {
		return false
	}
	var after []string
	if u != nil {
		after = slices.Clone(u.after)
		if u.defaults {
			after = append(after, "sysinit.target", "basic.target")
		}
	}
	target := h.unit(b)
	if target != nil && slices.Contains(target.before, a) {
		return true
	}
	for _, next := range after {
		if next == b || h.follows(next, b, seen) {
			return true
		}
	}
	return false
}
