package rules

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"
)

// The other files of a policy: includes here, lists of addresses in lists.go.

// shown gives the name of a file as messages and [Policy.Files] have it: beside
// the policy, as the policy itself was named.
func (d *draft) shown(name string) string {
	if path.IsAbs(name) {
		return path.Clean(name)
	}
	return path.Join(path.Dir(d.File), name)
}

// noteFile keeps the name of a file that was read.
func (d *draft) noteFile(shown string) {
	if d.noted == nil {
		d.noted = make(map[string]bool)
	}
	if !d.noted[shown] {
		d.noted[shown] = true
		d.Files = append(d.Files, shown)
	}
}

func isMissing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func isGlob(name string) bool { return strings.ContainsAny(name, "*?[") }

// fileNames reads a list of names of files.
func (r *reader) fileNames(v named, example, empty string) []placedName {
	var out []placedName
	r.each(v, fmt.Sprintf("a string like %q", example), empty, func(e value, mistyped func()) {
		s, ok := e.v.(string)
		switch {
		case !ok:
			mistyped()
		case s == "":
			r.errorf(e.span(), fmt.Sprintf("write a name like %q", example), "name of a file is empty")
		case strings.Contains(s, "\x00"):
			r.errorf(e.span(), "", "name of a file holds the control character U+0000")
		default:
			out = append(out, placedName{s, e.span()})
		}
	})
	return out
}

// find gives the files that a name or a glob stands for; false if it is wrong.
func (r *reader) find(n placedName) ([]string, bool) {
	if r.files == nil {
		r.errorf(n.at, "give the policy as a file", "no other files can be read here")
		return nil, false
	}
	if !isGlob(n.name) {
		return []string{n.name}, true
	}
	names, err := r.files.Glob(n.name)
	if err != nil {
		r.errorf(n.at, "", "pattern %s: %s", quote(n.name), printable(err.Error()))
		return nil, false
	}
	return names, true
}

// unreadable puts an error of [Files.ReadFile] into words.
func unreadable(name string, err error) string {
	var inner *fs.PathError
	switch {
	case isMissing(err):
		return "there is no file " + quote(name)
	case errors.Is(err, fs.ErrPermission):
		return "permission to read " + quote(name) + " is denied"
	case errors.As(err, &inner):
		err = inner.Err
	}
	return fmt.Sprintf("read %s: %s", quote(name), printable(err.Error()))
}

// include reads and decodes the included files, each once: in the order they are
// named, those of a glob sorted.
func (d *draft) include(r *reader) []value {
	main := d.shown(path.Base(d.File))
	seen := map[string]bool{main: true}
	total := len(r.docs[0].src)
	var out []value
	for _, n := range d.includes {
		names, ok := r.find(n)
		if !ok {
			d.partial = true
		}
		for _, name := range names {
			shown := d.shown(name)
			if shown == main && !isGlob(n.name) {
				r.errorf(n.at, "remove it", "the policy includes itself")
			}
			if seen[shown] {
				continue
			}
			seen[shown] = true
			part, ok := d.readInclude(r, n, name, shown, &total)
			if ok {
				out = append(out, part)
			} else {
				d.partial = true
			}
			if total > maxTotal {
				return out
			}
		}
	}
	return out
}

func (d *draft) readInclude(r *reader, n placedName, name, shown string, total *int) (value, bool) {
	src, err := r.files.ReadFile(name)
	if err != nil {
		hint := ""
		if isMissing(err) {
			hint = "names are relative to the directory of the policy"
		}
		r.errorf(n.at, hint, "%s", unreadable(shown, err))
		return value{}, false
	}
	d.noteFile(shown)
	switch *total += len(src); {
	case len(src) > maxSize:
		r.errorf(n.at, "is this the right file?", "%s is larger than %d MiB", quote(shown), maxSize>>20)
		return value{}, false
	case *total > maxTotal:
		r.errorf(n.at, "are these the right files?", "the policy and its includes are larger than %d MiB together", maxTotal>>20)
		return value{}, false
	}
	return r.decode(r.add(shown, src))
}
