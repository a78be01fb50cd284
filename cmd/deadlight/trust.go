package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Who can write a policy decides what the host admits. The files are opened one
// directory after the other, each held open while the next is looked up in it,
// so what was judged is what is read.

// unsafePath is a file or directory that somebody who is not trusted can write.
type unsafePath struct {
	path  string
	mode  fs.FileMode
	owner uint32
	dir   bool
	alien bool // of another owner
}

// String names path, mode and owner.
func (u unsafePath) String() string {
	kind := "file"
	if u.dir {
		kind = "directory"
	} else if u.mode&fs.ModeSymlink != 0 {
		kind = "symlink"
	}
	return fmt.Sprintf("%s %s (mode %04o, owner %s)", kind, u.path, permBits(u.mode), userName(u.owner))
}

// mend is the command that makes it safe.
func (u unsafePath) mend() string {
	var do []string
	if u.alien {
		word := "chown"
		if u.mode&fs.ModeSymlink != 0 {
			word = "chown -h"
		}
		do = append(do, fmt.Sprintf("%s %s %s", word, userName(uint32(os.Geteuid())), shellQuote(u.path)))
	}
	if u.mode&fs.ModeSymlink == 0 && u.mode.Perm()&0o022 != 0 && (!u.dir || u.mode&fs.ModeSticky == 0) {
		do = append(do, "chmod go-w "+shellQuote(u.path))
	}
	return strings.Join(do, " && ")
}

func permBits(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return id
}

// shellQuote makes one word of a shell.
func shellQuote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+:@%,", r)
	}
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) && s[0] != '-' {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// guard opens files and notes what others than root and the caller can write.
type guard struct {
	caller   uint32
	unmapped int64 // owner whom a user namespace does not know; -1: it knows all
	found    []unsafePath
}

// newGuard trusts root and the effective user. In a user namespace also whom it
// does not map: they stand above it.
func newGuard() (*guard, error) {
	m, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return nil, fmt.Errorf("identify the user namespace: %w", err)
	}
	b, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err != nil {
		return nil, fmt.Errorf("identify the user namespace: %w", err)
	}
	return &guard{caller: uint32(os.Geteuid()), unmapped: unmappedOwner(string(m), string(b))}, nil
}

// unmappedOwner is the owner that stands for everybody whom a user namespace does
// not map (user_namespaces(7)); -1 where it is somebody of its own.
func unmappedOwner(uidMap, overflow string) int64 {
	none, err := strconv.ParseInt(strings.TrimSpace(overflow), 10, 64)
	if err != nil {
		return -1
	}
	for line := range strings.Lines(uidMap) {
		var inside, outside, n int64
		if _, err := fmt.Sscan(line, &inside, &outside, &n); err != nil || inside <= none && none < inside+n {
			return -1
		}
	}
	return none
}

// err is nil when nobody else can write what was opened, or nobody is to judge.
func (g *guard) err(consequence string) error {
	if g == nil || len(g.found) == 0 {
		return nil
	}
	var mend []string
	elsewhere := false
	for _, u := range g.found {
		mend = append(mend, u.mend())
		elsewhere = elsewhere || u.dir && u.alien
	}
	hint := strings.Join(mend, " && ")
	if elsewhere {
		hint += "\nor keep the policy in a directory of root's, such as /etc/deadlight"
	}
	return refused(fmt.Errorf("%s: %s", g.text(), consequence), hint+"\nor pass --insecure-policy")
}

// text says in one line what others can write.
func (g *guard) text() string {
	var out []string
	for _, u := range g.found {
		out = append(out, u.String())
	}
	return "others can write the policy: " + strings.Join(out, ", ")
}

// judge notes a file or directory that is not safe.
func (g *guard) judge(path string, st *unix.Stat_t) {
	u := unsafePath{path: path, mode: fileMode(st), owner: st.Uid, dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}
	u.alien = st.Uid != 0 && st.Uid != g.caller && int64(st.Uid) != g.unmapped
	open := u.mode.Perm()&0o022 != 0
	switch {
	case u.mode&fs.ModeSymlink != 0:
		open = false // its mode means nothing
	case u.dir && u.mode&fs.ModeSticky != 0:
		open = false // others can neither take away nor replace what is not theirs
	}
	if (u.alien || open) && !slices.ContainsFunc(g.found, func(o unsafePath) bool { return o.path == path }) {
		g.found = append(g.found, u)
	}
}

func fileMode(st *unix.Stat_t) fs.FileMode {
	m := fs.FileMode(st.Mode & 0o777)
	if st.Mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		m |= fs.ModeDir
	case unix.S_IFLNK:
		m |= fs.ModeSymlink
	case unix.S_IFREG:
	default:
		m |= fs.ModeIrregular
	}
	return m
}

// open opens a regular file for reading, having judged it, every directory on the
// way and every symlink. What the shell has opened for us has no way: a pipe is
// the caller's word, a file is judged itself.
func (g *guard) open(name string) (*os.File, error) {
	if fromPipe(name) {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		return g.opened(name, f)
	}
	at, err := g.walk(name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(at.dir)
	var st unix.Stat_t
	if err := unix.Fstatat(at.dir, at.last, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if err := regular(name, fileMode(&st)); err != nil {
		return nil, err // opening a device may do something
	}
	// Not blocking: a pipe put there meanwhile must not keep us waiting.
	fd, err := unix.Openat(at.dir, at.last, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return g.opened(at.path, os.NewFile(uintptr(fd), name))
}

// opened judges an open file, and closes it if it cannot be judged.
func (g *guard) opened(path string, f *os.File) (*os.File, error) {
	var st unix.Stat_t
	err := unix.Fstat(int(f.Fd()), &st)
	if err == nil {
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			g.judge(path, &st)
		}
		return f, nil
	}
	return nil, errors.Join(&fs.PathError{Op: "stat", Path: path, Err: err}, f.Close())
}

// directory judges a directory, its symlinks and those above. One that is not
// there is fine: so are those above, where somebody could make it.
func (g *guard) directory(name string) error {
	at, err := g.walk(name + "/.")
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return nil
	case err != nil:
		return err
	}
	return unix.Close(at.dir)
}

// patternDirs judges the directories that a pattern looks into: who can write
// them can add files, or take some away.
func (g *guard) patternDirs(pattern string) error {
	dir := filepath.Dir(pattern)
	if !strings.ContainsAny(dir, `*?[\`) {
		return g.directory(dir)
	}
	names, err := filepath.Glob(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := g.directory(name); err != nil {
			return err
		}
	}
	return g.patternDirs(dir)
}

// place is a file that may be opened: its directory, open, its name in that,
// which was no symlink, and its path without symlinks.
type place struct {
	dir        int
	last, path string
}

// walk goes to the directory that holds a file, following symlinks by hand, and
// judges all on the way. The caller closes the directory.
func (g *guard) walk(name string) (place, error) {
	const mostLinks = 40 // the kernel's own limit, path_resolution(7)
	at := place{dir: -1, path: "/"}
	fail := func(err error) (place, error) {
		if at.dir >= 0 {
			unix.Close(at.dir)
		}
		return place{}, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	abs := name
	if !filepath.IsAbs(abs) {
		wd, err := os.Getwd()
		if err != nil {
			return fail(err)
		}
		abs = wd + "/" + name // not joined: link/.. is not what it seems
	}
	var err error
	if at.dir, err = g.root(); err != nil {
		return fail(err)
	}
	rest := strings.Split(abs, "/")
	for links := 0; ; {
		rest = slices.DeleteFunc(rest, func(s string) bool { return s == "" || s == "." })
		if len(rest) == 0 { // the name is that of a directory
			at.last = "."
			return at, nil
		}
		part, path := rest[0], filepath.Join(at.path, rest[0])
		rest = rest[1:]
		var st unix.Stat_t
		fd, err := unix.Openat(at.dir, part, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fail(err)
		}
		if err = unix.Fstat(fd, &st); err != nil {
			unix.Close(fd)
			return fail(err)
		}
		switch kind := st.Mode & unix.S_IFMT; {
		case kind == unix.S_IFLNK:
			g.judge(path, &st)
			target, err := readLink(fd)
			unix.Close(fd)
			if links++; err == nil && links > mostLinks {
				err = unix.ELOOP
			}
			if err != nil {
				return fail(err)
			}
			rest = append(strings.Split(target, "/"), rest...)
			if strings.HasPrefix(target, "/") {
				unix.Close(at.dir)
				at.path = "/"
				if at.dir, err = g.root(); err != nil {
					return fail(err)
				}
			}
		case kind == unix.S_IFDIR:
			g.judge(path, &st)
			unix.Close(at.dir)
			at.dir, at.path = fd, path
		case len(rest) > 0:
			unix.Close(fd)
			return fail(unix.ENOTDIR)
		default:
			unix.Close(fd)
			at.last, at.path = part, path
			return at, nil
		}
	}
}

// root opens and judges the root directory.
func (g *guard) root() (int, error) {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, err
	}
	g.judge("/", &st)
	return fd, nil
}

// readLink reads a symlink that is open.
func readLink(fd int) (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
