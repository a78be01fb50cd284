package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// trusted makes a policy with an include and a list, all of it safe.
func trusted(t *testing.T) string {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"etc/policy.toml":   "version = 1\ninclude = \"conf.d/*.toml\"\n[set.bad]\nfiles = [\"../lists/*.txt\", \"more.txt\"]\noptional = true\n[block.bad]\nfrom = \"@bad\"\n",
		"etc/conf.d/a.toml": "[open.web]\nports = 80\n",
		"lists/a.txt":       "192.0.2.0/24\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestGuard: whoever else can write any of it is found, by path, with the command
// that mends it.
func TestGuard(t *testing.T) {
	chmod := func(name string, mode fs.FileMode) func(string) error {
		return func(dir string) error { return os.Chmod(filepath.Join(dir, name), mode) }
	}
	move := func(from, to, target string) func(string) error {
		return func(dir string) error {
			if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
				return err
			}
			return os.Symlink(strings.ReplaceAll(target, "DIR", dir), filepath.Join(dir, from))
		}
	}
	both := func(all ...func(string) error) func(string) error {
		return func(dir string) error {
			for _, fn := range all {
				if err := fn(dir); err != nil {
					return err
				}
			}
			return nil
		}
	}
	mkdir := func(name string, mode fs.FileMode) func(string) error {
		return both(func(dir string) error { return os.Mkdir(filepath.Join(dir, name), 0o755) }, chmod(name, mode))
	}
	tests := map[string]struct {
		change func(dir string) error
		want   []string // what is unsafe
	}{
		"safe":                                {func(string) error { return nil }, nil},
		"readable by its owner":               {chmod("etc/policy.toml", 0o400), nil},
		"group writes the policy":             {chmod("etc/policy.toml", 0o664), []string{"etc/policy.toml"}},
		"world writes the policy":             {chmod("etc/policy.toml", 0o646), []string{"etc/policy.toml"}},
		"group writes an include":             {chmod("etc/conf.d/a.toml", 0o664), []string{"etc/conf.d/a.toml"}},
		"world writes a list":                 {chmod("lists/a.txt", 0o666), []string{"lists/a.txt"}},
		"group writes the directory":          {chmod("etc", 0o775), []string{"etc"}},
		"world writes the directory":          {chmod("etc", 0o777), []string{"etc"}},
		"world writes a sticky directory":     {chmod("etc", 0o777|fs.ModeSticky), nil},
		"world writes that of the includes":   {chmod("etc/conf.d", 0o757), []string{"etc/conf.d"}},
		"world writes that of the lists":      {chmod("lists", 0o777), []string{"lists"}},
		"world writes one further up":         {chmod(".", 0o777), []string{"."}},
		"an empty directory of includes":      {both(chmod("etc/conf.d", 0o777), func(dir string) error { return os.Remove(filepath.Join(dir, "etc/conf.d/a.toml")) }), []string{"etc/conf.d"}},
		"all of it":                           {both(chmod("etc/policy.toml", 0o666), chmod("lists/a.txt", 0o666), chmod("etc", 0o777)), []string{"etc", "etc/policy.toml", "lists/a.txt"}},
		"a symlink to a safe file":            {both(mkdir("real", 0o755), move("etc/policy.toml", "real/p.toml", "../real/p.toml")), nil},
		"a symlink to an unsafe file":         {both(mkdir("real", 0o755), move("etc/policy.toml", "real/p.toml", "../real/p.toml"), chmod("real/p.toml", 0o666)), []string{"real/p.toml"}},
		"a symlink into an unsafe directory":  {both(mkdir("real", 0o777), move("etc/policy.toml", "real/p.toml", "DIR/real/p.toml")), []string{"real"}},
		"a symlink in an unsafe directory":    {both(mkdir("real", 0o755), move("etc/policy.toml", "real/p.toml", "../real/p.toml"), chmod("etc", 0o777)), []string{"etc"}},
		"a symlink through an unsafe one":     {both(mkdir("real", 0o755), mkdir("via", 0o777), move("etc/policy.toml", "real/p.toml", "../via/../real/p.toml")), []string{"via"}},
		"a symlinked directory of includes":   {both(mkdir("real", 0o777), move("etc/conf.d", "real/conf.d", "../real/conf.d")), []string{"real"}},
		"a symlinked list, unsafe":            {both(mkdir("real", 0o755), move("lists/a.txt", "real/a.txt", "DIR/real/a.txt"), chmod("real/a.txt", 0o622)), []string{"real/a.txt"}},
		"a missing list where all may put it": {chmod("etc", 0o777), []string{"etc"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := trusted(t)
			if err := tt.change(dir); err != nil {
				t.Fatal(err)
			}
			g := judged(t, filepath.Join(dir, "etc/policy.toml"))
			var got []string
			for _, u := range g.found {
				rel, err := filepath.Rel(dir, u.path)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, rel)
			}
			slices.Sort(got)
			if !slices.Equal(got, tt.want) {
				t.Fatalf("unsafe %q, want %q", got, tt.want)
			}
			// What is advised helps, and is enough.
			for _, u := range g.found {
				if want := "chmod go-w " + shellQuote(u.path); u.mend() != want {
					t.Errorf("advice %q, want %q", u.mend(), want)
				}
				if err := os.Chmod(u.path, u.mode.Perm()&^0o022); err != nil {
					t.Fatal(err)
				}
			}
			if g := judged(t, filepath.Join(dir, "etc/policy.toml")); len(g.found) > 0 {
				t.Errorf("mended, and still unsafe: %s", g.text())
			}
		})
	}
}

// judged reads a policy under a guard, by its own name and relative to elsewhere.
func judged(t *testing.T, policy string) *guard {
	t.Helper()
	var all [2]*guard
	for i, name := range []string{policy, ""} {
		if i == 1 {
			wd, err := os.Getwd()
			if err != nil {
				t.Fatal(err)
			}
			if name, err = filepath.Rel(wd, policy); err != nil {
				t.Fatal(err)
			}
		}
		g, err := newGuard()
		if err != nil {
			t.Fatal(err)
		}
		rs, problems, _, err := parseGuarded(name, g)
		if err != nil || rs == nil {
			t.Fatalf("%v %v", problems, err)
		}
		all[i] = g
	}
	// The second way leads also through the directory of this test.
	for _, u := range all[0].found {
		if !slices.ContainsFunc(all[1].found, func(o unsafePath) bool { return o.path == u.path }) {
			t.Errorf("%s is found only by its absolute name", u)
		}
	}
	return all[0]
}

// TestGuardOwner: what belongs to others is theirs to write, whatever its mode.
func TestGuardOwner(t *testing.T) {
	const stranger, nobody = 4711, 65534
	tests := map[string]struct {
		guard  guard
		mode   uint32
		owner  uint32
		unsafe bool
		mend   string
	}{
		"root's file":                {guard{unmapped: -1}, unix.S_IFREG | 0o644, 0, false, ""},
		"a stranger's file":          {guard{unmapped: -1}, unix.S_IFREG | 0o400, stranger, true, "chown root /x"},
		"a stranger's open file":     {guard{unmapped: -1}, unix.S_IFREG | 0o666, stranger, true, "chown root /x && chmod go-w /x"},
		"a stranger's directory":     {guard{unmapped: -1}, unix.S_IFDIR | 0o755, stranger, true, "chown root /x"},
		"a stranger's /tmp":          {guard{unmapped: -1}, unix.S_IFDIR | unix.S_ISVTX | 0o777, stranger, true, "chown root /x"},
		"root's /tmp":                {guard{unmapped: -1}, unix.S_IFDIR | unix.S_ISVTX | 0o777, 0, false, ""},
		"a sticky file":              {guard{unmapped: -1}, unix.S_IFREG | unix.S_ISVTX | 0o666, 0, true, "chmod go-w /x"},
		"root's symlink":             {guard{unmapped: -1}, unix.S_IFLNK | 0o777, 0, false, ""},
		"a stranger's symlink":       {guard{unmapped: -1}, unix.S_IFLNK | 0o777, stranger, true, "chown -h root /x"},
		"the caller's own file":      {guard{caller: stranger, unmapped: -1}, unix.S_IFREG | 0o644, stranger, false, ""},
		"nobody's file":              {guard{unmapped: -1}, unix.S_IFREG | 0o644, nobody, true, "chown root /x"},
		"above the user namespace":   {guard{unmapped: nobody}, unix.S_IFDIR | 0o755, nobody, false, ""},
		"open, above the namespace":  {guard{unmapped: nobody}, unix.S_IFDIR | 0o777, nobody, true, "chmod go-w /x"},
		"stranger in that namespace": {guard{unmapped: nobody}, unix.S_IFREG | 0o644, stranger, true, "chown root /x"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			tt.guard.judge("/x", &unix.Stat_t{Mode: tt.mode, Uid: tt.owner})
			if got := len(tt.guard.found) > 0; got != tt.unsafe {
				t.Fatalf("unsafe %v, want %v", got, tt.unsafe)
			}
			if tt.unsafe && tt.guard.found[0].mend() != tt.mend {
				t.Errorf("advice %q, want %q", tt.guard.found[0].mend(), tt.mend)
			}
		})
	}
	for _, tt := range []struct {
		uidMap string
		want   int64
	}{{"         0          0 4294967295\n", -1}, {"0 1000 1\n", nobody}, {"0 100000 65536\n", -1}, {"0 1000 1\n1 100000 60000\n", nobody}, {"", nobody}, {"?", -1}} {
		if got := unmappedOwner(tt.uidMap, "65534\n"); got != tt.want {
			t.Errorf("map %q: owner %d, want %d", tt.uidMap, got, tt.want)
		}
	}
}

// TestGuardChown: the same with real owners, where this user may give files away.
func TestGuardChown(t *testing.T) {
	const stranger = 4711
	dir := trusted(t)
	probe := filepath.Join(dir, "probe")
	if err := os.WriteFile(probe, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	uidMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		t.Fatal(err)
	}
	everybody := unmappedOwner(string(uidMap), "65534") < 0
	if err := os.Chown(probe, stranger, -1); (err == nil) != everybody {
		t.Fatalf("chown: %v; the namespace maps everybody: %v", err, everybody)
	}
	if !everybody {
		return // TestGuardOwner judges the same without the kernel
	}
	for _, name := range []string{"etc/policy.toml", "etc/conf.d/a.toml", "lists/a.txt", "etc", "etc/conf.d", "lists"} {
		path := filepath.Join(dir, name)
		if err := os.Chown(path, stranger, -1); err != nil {
			t.Fatal(err)
		}
		g := judged(t, filepath.Join(dir, "etc/policy.toml"))
		if len(g.found) != 1 || g.found[0].path != path || !strings.Contains(g.text(), "owner 4711") {
			t.Errorf("%s of a stranger: %s", name, g.text())
		}
		if err := os.Chown(path, 0, -1); err != nil {
			t.Fatal(err)
		}
	}
	// A symlink that a stranger made in a sticky directory.
	if err := os.Chmod(filepath.Join(dir, "etc/conf.d"), 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "etc/conf.d/b.toml")
	if err := os.Symlink("../conf.d/a.toml", link); err != nil {
		t.Fatal(err)
	}
	if err := os.Lchown(link, stranger, -1); err != nil {
		t.Fatal(err)
	}
	g, err := newGuard()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (disk{dir: filepath.Join(dir, "etc"), guard: g}).ReadFile("conf.d/b.toml"); err != nil || len(g.found) != 1 || g.found[0].path != link {
		t.Errorf("a stranger's symlink: %v, %s", err, g.text())
	}
}

// TestGuardOpen: what cannot be read is an error of the kernel's words, and
// nothing is left open.
func TestGuardOpen(t *testing.T) {
	dir := trusted(t)
	if err := unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{"loop": "loop", "dangling": "nothing", "up": "../../../../../../../../../.."} {
		if err := os.Symlink(to, filepath.Join(dir, from)); err != nil {
			t.Fatal(err)
		}
	}
	before := openFiles(t)
	for name, want := range map[string]error{
		"loop": syscall.ELOOP, "dangling": fs.ErrNotExist, "missing": fs.ErrNotExist, "missing/x": fs.ErrNotExist,
		"etc/policy.toml/x": syscall.ENOTDIR, "etc": syscall.EISDIR, "etc/": syscall.EISDIR, "up": syscall.EISDIR, ".": syscall.EISDIR, "..": syscall.EISDIR,
	} {
		g := &guard{unmapped: -1}
		if f, err := g.open(dir + "/" + name); err == nil || !errors.Is(err, want) {
			t.Errorf("%s: %v %v, want %v", name, f, err, want)
		}
	}
	if _, err := (&guard{}).open(filepath.Join(dir, "pipe")); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("pipe: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d files open, %d before", after, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}
