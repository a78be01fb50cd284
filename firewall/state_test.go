package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// lockedState is a state of its own, locked, in a fresh directory.
func lockedState(t testing.TB, dir string) *State {
	t.Helper()
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Lock(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Unlock() })
	return s
}

// recordOf is the record of a policy given as text, beside other files.
func recordOf(t testing.TB, text string, others ...Source) *Record {
	t.Helper()
	want, err := Meant(ruleset(t, text), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sources := append([]Source{NewSource("policy.toml", []byte("version = 1\n"+text))}, others...)
	return &Record{Applied: time.Unix(1, 0).UTC(), By: "test", Policy: "/etc/deadlight/policy.toml", Sources: sources, Snapshot: want}
}

func apply(t testing.TB, s *State, r *Record, generation uint32) {
	t.Helper()
	if err := s.Stage(r); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(generation); err != nil {
		t.Fatal(err)
	}
}

func entries(t testing.TB, dir, end string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		if strings.HasSuffix(e.Name(), end) {
			out = append(out, e.Name())
		}
	}
	return out
}

func TestStateKeepsWhatWasApplied(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "state")
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Good(); !errors.Is(err, ErrNoState) {
		t.Fatalf("nothing applied yet: %v", err)
	}
	if err := s.LockShared(); err != nil {
		t.Fatalf("reading where nothing is: %v", err)
	}
	if err := s.Stage(recordOf(t, little)); err == nil {
		t.Error("written without the lock")
	}
	s = lockedState(t, dir)
	list := NewSource("lists/a.txt", []byte(strings.Repeat("192.0.2.0/24\n", 5000)))
	r := recordOf(t, little, list, Source{Name: "lists/none.txt", Absent: true})
	r.Globs = []Glob{{"lists/*.txt", []string{"lists/a.txt"}}}
	apply(t, s, r, 7)

	got, err := s.Good()
	if err != nil {
		t.Fatal(err)
	}
	if got.Generation != 7 || got.Policy != r.Policy || got.By != "test" || !got.Applied.Equal(r.Applied) || got.Version != stateVersion {
		t.Errorf("read back %+v", got)
	}
	if d := Diff(got.Snapshot, r.Snapshot); d != nil {
		t.Errorf("the snapshot changed on its way: %v", d)
	}
	if !reflect.DeepEqual(got.Globs, r.Globs) || len(got.Sources) != 3 || got.Sources[1].Size != list.Size || !got.Sources[2].Absent {
		t.Errorf("sources %+v, globs %+v", got.Sources, got.Globs)
	}
	if _, err := s.Next(); !errors.Is(err, ErrNoState) {
		t.Errorf("something is still staged: %v", err)
	}
	for name, want := range map[string]fs.FileMode{"": 0o700, indexGood: 0o600, list.SHA256 + blobEnd: 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%q has mode %04o", name, info.Mode().Perm())
		}
	}

	// Another policy with the same list: the list stays the file it was.
	before, err := stat(filepath.Join(dir, list.SHA256+blobEnd))
	if err != nil {
		t.Fatal(err)
	}
	apply(t, s, recordOf(t, others, list), 9)
	after, err := stat(filepath.Join(dir, list.SHA256+blobEnd))
	if err != nil {
		t.Fatal(err)
	}
	if before.Ino != after.Ino || before.Mtim != after.Mtim {
		t.Error("an unchanged list was written again")
	}
	if blobs := entries(t, dir, blobEnd); len(blobs) != 3 {
		t.Errorf("blobs that nothing names stay: %q", blobs)
	}
	if err := s.Clear(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Good(); !errors.Is(err, ErrNoState) {
		t.Errorf("after Clear: %v", err)
	}
	if left := entries(t, dir, ""); !slices.Equal(left, []string{lockName}) {
		t.Errorf("after Clear there are %q", left)
	}
}

// files is a policy's directory in memory.
type files map[string]string

func (f files) Glob(pattern string) ([]string, error) {
	var out []string
	for name := range f {
		if ok, err := filepath.Match(pattern, name); err != nil {
			return nil, err
		} else if ok {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out, nil
}

func (f files) ReadFile(name string) ([]byte, error) {
	if text, ok := f[name]; ok {
		return []byte(text), nil
	}
	return nil, fs.ErrNotExist
}

func TestStateCompilesFromItsOwnSources(t *testing.T) {
	const main = `version = 1
include = ["conf.d/*.toml"]
[open.web]
ports = 80
from = "@admins"
[set.admins]
files = ["admins.txt", "gone.txt"]
optional = true
`
	disk := files{"conf.d/a.toml": "[open.a]\nports = 1\n", "conf.d/b.toml": "[open.b]\nports = 2\n", "admins.txt": "192.0.2.1\n192.0.2.7\n"}
	p, problems := rules.Parse("policy.toml", []byte(main), disk)
	if p == nil {
		t.Fatal(problems)
	}
	want := rules.Compile(p)
	s := lockedState(t, t.TempDir())
	r := recordOf(t, little)
	r.Sources = []Source{NewSource("policy.toml", []byte(main)), {Name: "gone.txt", Absent: true}}
	for name, text := range disk {
		r.Sources = append(r.Sources, NewSource(name, []byte(text)))
	}
	r.Globs = []Glob{{"conf.d/*.toml", []string{"conf.d/a.toml", "conf.d/b.toml"}}}
	apply(t, s, r, 1)
	good, err := s.Good()
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.Compile(good)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Table, want.Table) {
		t.Error("another table than the policy's")
	}

	// A source that was changed by hand, of the same size.
	blob := filepath.Join(s.Dir(), good.Sources[0].SHA256+blobEnd)
	if err := os.WriteFile(blob, []byte(strings.Replace(main, "80", "81", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = s.Compile(good)
	var e *StateError
	if !errors.Is(err, ErrStateDamaged) || !errors.As(err, &e) || !strings.Contains(e.Hint, "rm "+blob) {
		t.Errorf("a forged policy: %v", err)
	}
	for _, src := range good.Sources[1:] {
		if src.Name == "admins.txt" {
			if err := os.Remove(filepath.Join(s.Dir(), src.SHA256+blobEnd)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(blob, []byte(main), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = s.Compile(good); !errors.Is(err, ErrStateDamaged) {
		t.Errorf("a lost list: %v", err)
	}
}

// TestStateSurvivesASuddenEnd ends an apply at every step that it takes on disk.
func TestStateSurvivesASuddenEnd(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		here, err := c.Namespace()
		if err != nil {
			t.Fatal(err)
		}
		oldText, newText := little, little+"[open.new]\nports = 8080\n"
		list := NewSource("list.txt", []byte("192.0.2.1\n"))
		ended := false
		for steps := 0; !ended; steps++ {
			if steps > 100 {
				t.Fatal("it never ends")
			}
			for _, loaded := range []bool{false, true} { // was the kernel's transaction still made?
				dir := t.TempDir()
				s := lockedState(t, dir)
				old := recordOf(t, oldText, list)
				old.Namespace = here
				res, err := c.Apply(ruleset(t, oldText))
				if err != nil {
					t.Fatal(err)
				}
				apply(t, s, old, res.Generation.ID)

				r := recordOf(t, newText, NewSource("list.txt", []byte("192.0.2.2\n")))
				r.Namespace = here
				left := steps
				s.tick = func() {
					if left--; left < 0 {
						runtime.Goexit()
					}
				}
				staged, done := false, make(chan bool, 1)
				go func() {
					complete := false
					defer func() { done <- complete }()
					if err := s.Stage(r); err != nil {
						t.Error(err)
					}
					staged = true
					if loaded {
						res, err := c.Apply(ruleset(t, newText))
						if err != nil {
							t.Error(err)
						}
						if err := s.Commit(res.Generation.ID); err != nil {
							t.Error(err)
						}
					} else if err := s.Discard(); err != nil {
						t.Error(err)
					}
					complete = true
				}()
				complete := <-done
				if err := s.Unlock(); err != nil {
					t.Fatal(err)
				}
				ended = complete && loaded

				is, err := c.Snapshot(rules.TableName)
				if err != nil {
					t.Fatal(err)
				}
				want := old.Snapshot
				if staged && loaded {
					want = r.Snapshot
				}
				where := fmt.Sprintf("after %d steps, loaded %v", steps, loaded && staged)
				if d := Diff(is, want); d != nil {
					t.Fatalf("%s: the kernel holds something else: %v", where, d)
				}
				// First a reader, then a writer, then what the writer left.
				for _, look := range []string{"reader", "writer", "reader again"} {
					s, err := OpenState(dir)
					if err != nil {
						t.Fatal(err)
					}
					lock := s.LockShared
					if look == "writer" {
						lock = s.Lock
					}
					if err := lock(); err != nil {
						t.Fatal(err)
					}
					if _, err := s.Good(); err != nil {
						t.Errorf("%s, %s: good: %v", where, look, err)
					}
					got, err := s.Settle(func() (*Snapshot, error) { return c.Snapshot(rules.TableName) }, here)
					if err != nil {
						t.Fatalf("%s, %s: %v", where, look, err)
					}
					if d := Diff(got.Snapshot, want); d != nil {
						t.Errorf("%s, %s: says that something else is applied: %v", where, look, d)
					}
					if _, err := s.Compile(got); err != nil {
						t.Errorf("%s, %s: %v", where, look, err)
					}
					if err := s.Unlock(); err != nil {
						t.Fatal(err)
					}
				}
				// The next apply leaves no litter: lock, good, snapshot, policy, list.
				s = lockedState(t, dir)
				apply(t, s, recordOf(t, others, list), 1)
				if left := entries(t, dir, ""); len(left) != 5 {
					t.Errorf("%s: left on disk: %q", where, left)
				}
				if _, err := c.Remove(rules.TableName); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

func TestStateTruncatedOrChanged(t *testing.T) {
	s := lockedState(t, t.TempDir())
	apply(t, s, recordOf(t, little), 3)
	good, err := s.Good()
	if err != nil {
		t.Fatal(err)
	}
	good.Snapshot = nil
	path := filepath.Join(s.Dir(), indexGood)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	look := func(what string, content []byte) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := s.Good()
		if err == nil {
			got.Snapshot = nil
			if !reflect.DeepEqual(got, good) {
				t.Fatalf("%s: read as another record: %+v", what, got)
			}
			return
		}
		var e *StateError
		if !errors.As(err, &e) || e.Hint == "" || !errors.Is(err, ErrStateDamaged) && !errors.Is(err, ErrStateVersion) {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for i := range len(whole) {
		look(fmt.Sprintf("cut after %d bytes", i), whole[:i])
		changed := slices.Clone(whole)
		changed[i] ^= 1
		look(fmt.Sprintf("byte %d changed", i), changed)
	}
	look("something behind it", append(slices.Clone(whole), "{}"...))
	look("another version", []byte(strings.Replace(string(whole), `"version":1`, `"version":2`, 1)))
	if _, err := s.Good(); !errors.Is(err, ErrStateVersion) {
		t.Errorf("another version: %v", err)
	}
	// A damaged record is no obstacle to the next apply.
	look("empty", nil)
	apply(t, s, recordOf(t, others), 4)
	if _, err := s.Good(); err != nil {
		t.Error(err)
	}
	// The snapshot is a file of its own.
	good, err = s.Good()
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(s.Dir(), good.Table+blobEnd)
	for _, spoil := range []func() error{func() error { return os.Truncate(blob, 9) }, func() error { return os.Remove(blob) }, func() error { return os.Mkdir(blob, 0o700) }} {
		if err := spoil(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Good(); !errors.Is(err, ErrStateDamaged) {
			t.Errorf("without its snapshot: %v", err)
		}
	}
}

func TestStateOfAnotherUser(t *testing.T) {
	base := t.TempDir()
	fresh := func(name string) string {
		dir := filepath.Join(base, name)
		s := lockedState(t, dir)
		apply(t, s, recordOf(t, little), 3)
		if err := s.Unlock(); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	good := func(dir string) error {
		s, err := OpenState(dir)
		if err != nil {
			return err
		}
		_, err = s.Good()
		return err
	}
	for name, spoil := range map[string]func(dir string) error{
		"directory": func(dir string) error { return os.Chmod(dir, 0o770) },
		"index":     func(dir string) error { return os.Chmod(filepath.Join(dir, indexGood), 0o602) },
		"blob":      func(dir string) error { return os.Chmod(filepath.Join(dir, entries(t, dir, blobEnd)[0]), 0o660) },
	} {
		dir := fresh(name)
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		err := good(dir)
		if name == "blob" && err == nil {
			var s *State
			if s, err = OpenState(dir); err == nil {
				var r *Record
				if r, err = s.Good(); err == nil {
					_, err = s.Compile(r)
				}
			}
		}
		var e *StateError
		if !errors.Is(err, ErrStateUnsafe) || !errors.As(err, &e) || !strings.Contains(e.Hint, "chmod") {
			t.Errorf("%s that others may write: %v", name, err)
		}
	}
	// In a user namespace of one user nothing can be given away; there / is somebody else's.
	dir := fresh("owner")
	if err := os.Chown(filepath.Join(dir, indexGood), 12345, -1); err != nil {
		dir = "/"
	}
	if err := good(dir); !errors.Is(err, ErrStateUnsafe) {
		t.Errorf("an index of somebody else: %v", err)
	}
	// A link in place of a file leads who knows where.
	dir = fresh("link")
	if err := os.Rename(filepath.Join(dir, indexGood), filepath.Join(base, "elsewhere")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(base, "elsewhere"), filepath.Join(dir, indexGood)); err != nil {
		t.Fatal(err)
	}
	if err := good(dir); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link: %v", err)
	}
	if _, err := OpenState(filepath.Join(base, "elsewhere")); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file as directory: %v", err)
	}
}

func TestStateFullAndReadOnlyDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	s := lockedState(t, dir)
	apply(t, s, recordOf(t, little), 3)
	left := entries(t, dir, "")
	tell := func(what string, err error, want error) {
		t.Helper()
		var e *StateError
		if !errors.Is(err, want) || !errors.As(err, &e) || !strings.Contains(e.Hint, "--state-dir") {
			t.Errorf("%s: %v", what, err)
		}
		if got, err := s.Good(); err != nil || got.Generation != 3 {
			t.Errorf("%s: then good: %v", what, err)
		}
		if now := entries(t, dir, ""); !slices.Equal(now, left) {
			t.Errorf("%s: left behind: %q, before %q", what, now, left)
		}
	}
	// Sizes that fill the disk at each of the files.
	for size := 1 << 20; size > 0; size -= 4096 {
		err := s.Stage(recordOf(t, others, NewSource("list.txt", []byte(strings.Repeat("x", size)))))
		if err == nil {
			// No room is left for the index after the kernel has taken it: it is still staged.
			filler := filepath.Join(dir, "filler")
			if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			left = entries(t, dir, "")
			tell("full disk at the end", s.Commit(9), unix.ENOSPC)
			if _, err := s.Next(); err != nil {
				t.Errorf("what was staged is lost: %v", err)
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			if err := s.Discard(); err != nil {
				t.Fatal(err)
			}
			left = entries(t, dir, "")
			break
		}
		tell(fmt.Sprintf("full disk, %d bytes", size), err, unix.ENOSPC)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err == nil {
		t.Error("the lock is held open for writing, and yet the disk became read-only")
	}
	if err := s.Unlock(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "size=256k"); err != nil {
		t.Fatal(err)
	}
	tell("read-only disk", s.Lock(), unix.EROFS)
	if err := s.LockShared(); err != nil {
		t.Errorf("reading a read-only disk: %v", err)
	}
}

func TestStateLock(t *testing.T) {
	dir := t.TempDir()
	first := lockedState(t, dir)
	second, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	second.wait = 0
	for _, lock := range []func() error{second.Lock, second.LockShared} {
		if err := lock(); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
			t.Errorf("while another holds it: %v", err)
		}
	}
	if ok, err := second.TryLock(); ok || err != nil {
		t.Errorf("TryLock while another holds it: %v, %v", ok, err)
	}
	if err := first.Unlock(); err != nil {
		t.Fatal(err)
	}
	if ok, err := second.TryLock(); !ok || err != nil {
		t.Errorf("TryLock of a free state: %v, %v", ok, err)
	}
	if err := second.Unlock(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*State{first, second} { // readers do not mind each other
		if err := s.LockShared(); err != nil {
			t.Fatal(err)
		}
	}
	if err := first.Unlock(); err != nil {
		t.Fatal(err)
	}
	first.wait = 0
	if err := first.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("a writer beside a reader: %v", err)
	}
	// Who waits gets it.
	first.wait = time.Minute
	go func() { second.Unlock() }()
	if err := first.Lock(); err != nil {
		t.Error(err)
	}
}

// besideMain runs fn on a thread that is not the process's first, which
// /proc/1 shows when the process is PID 1.
func besideMain(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: fn may leave the namespace
		if unix.Gettid() == os.Getpid() {
			besideMain(fn)
			return
		}
		fn()
	}()
	<-done
}

func TestStateDir(t *testing.T) {
	besideMain(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		own, err := stat("/proc/thread-self/ns/net")
		if err != nil {
			t.Error(err)
			return
		}
		dir, err := StateDir()
		if want := fmt.Sprintf("/run/deadlight/netns-%d", own.Ino); err != nil || dir != want {
			t.Errorf("got %s, %v, want %s", dir, err, want)
		}
		here, err := dial(t).Namespace()
		if err != nil {
			t.Error(err)
			return
		}
		if here.Cookie == 0 || here.Boot == "" || here.Inode != own.Ino {
			t.Errorf("namespace %+v", here)
		}
		next := here
		next.Cookie++
		if here.Is(next) || !here.Is(here) || !here.Heir(next) || here.Heir(here) {
			t.Error("a namespace with a used inode number is taken for the old one")
		}
		s := lockedState(t, t.TempDir())
		r := recordOf(t, little)
		r.Namespace = here
		apply(t, s, r, 1)
		if _, err := s.Settle(nil, here); err != nil {
			t.Error(err)
		}
		if _, err := s.Settle(nil, next); !errors.Is(err, ErrNoState) {
			t.Errorf("what was applied to a namespace that has ended is said of another: %v", err)
		}
	})
}

func TestStateActors(t *testing.T) {
	s := lockedState(t, t.TempDir())
	here, there := Namespace{Cookie: 1, Boot: "a"}, Namespace{Cookie: 2, Boot: "a"}
	if got, err := s.Actors(here, 0); err != nil || got != nil {
		t.Fatalf("before anybody listened: %v, %v", got, err)
	}
	for id := range uint32(2000) { // more than are kept
		if err := s.NoteActor(here, Generation{ID: id, PID: 7, Comm: "nft\n\x1b[2J"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.NoteActor(there, Generation{ID: 5000}); err != nil {
		t.Fatal(err)
	}
	got, err := s.Actors(here, 1997)
	want := []Generation{{1998, 7, "nft\n\x1b[2J"}, {1999, 7, "nft\n\x1b[2J"}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	path := filepath.Join(s.Dir(), actorsName)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > largestActors+1000 || info.Mode().Perm() != 0o600 {
		t.Errorf("%d bytes, mode %04o", info.Size(), info.Mode().Perm())
	}
	if err := os.Truncate(path, info.Size()-200); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Actors(here, 1997); err != nil || len(got) != 1 {
		t.Errorf("cut short: %v, %v", got, err)
	}
}

// BenchmarkState is the state's share of an apply that changes one line of a
// policy beside a list of 16 MB.
func BenchmarkState(b *testing.B) {
	s := lockedState(b, b.TempDir())
	text := []byte(strings.Repeat("198.51.100.0/24\n", 1<<20))
	for i := range 2 {
		apply(b, s, recordOf(b, fmt.Sprintf("%s# %d\n", little, i), NewSource("list.txt", text)), 1)
	}
	n := 0
	for b.Loop() {
		n++
		b.StopTimer()
		r := recordOf(b, fmt.Sprintf("%s# change %d\n", little, n))
		b.StartTimer()
		if _, err := s.Good(); err != nil {
			b.Fatal(err)
		}
		r.Sources = append(r.Sources, NewSource("list.txt", text))
		apply(b, s, r, 2)
	}
}

// A ban is kept with all that is said of it; a line of another shape is damage.
func TestBanLines(t *testing.T) {
	at := time.Date(2026, 11, 21, 12, 0, 0, int(7*time.Millisecond), time.UTC)
	var list []Temporary
	for _, addr := range []string{"192.0.2.1", "2001:db8::1", "255.255.255.255"} {
		for _, end := range []time.Time{{}, at.Add(time.Hour)} {
			for _, word := range []string{"", "ticket 4711", "a \"b\" \\ c", "ä\u2028"} {
				a := netip.MustParseAddr(addr)
				list = append(list, Temporary{
					Temporary: rules.Temporary{Name: "tmp-hosts", Block: true, From: []rules.AddrRange{{Lo: a, Hi: a}}, Expires: end, Comment: word},
					By:        "o " + word, Begun: at.Truncate(time.Second),
				})
			}
		}
	}
	for i := range list {
		line := string(appendBan(nil, &list[i]))
		got, err := banOf(line)
		if err != nil || strings.Count(line, "\n") != 1 || !reflect.DeepEqual(got, list[i]) {
			t.Errorf("%q: %+v, %v, want %+v", line, got, err, list[i])
		}
		for _, bad := range []string{line[:len(line)-1], line[1:], "x" + line, line + " ", line[:len(line)/2], strings.Replace(line, " ", "", 1)} {
			// Of an address, less or more may be another one.
			if got, err := banOf(bad); err == nil && got.From[0] == list[i].From[0] {
				t.Errorf("%q is read as %+v", bad, got)
			}
		}
	}
}

// Bans are kept whole beside an index that does not grow with them.
func TestStateKeepsBans(t *testing.T) {
	dir := t.TempDir()
	s := lockedState(t, dir)
	defer s.Unlock()
	r := recordOf(t, little)
	opening := Temporary{Temporary: rules.Temporary{Name: "tmp-80-tcp", Protocol: rules.TCP, Port: 80, Expires: time.Unix(2e9, 0).UTC()}, By: "root"}
	r.Temporary = []Temporary{opening}
	for i := range 1000 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})
		r.Temporary = append(r.Temporary, Temporary{Temporary: rules.Temporary{Name: "tmp-hosts", Block: true, From: []rules.AddrRange{{Lo: a, Hi: a}}}, By: "root", Begun: time.Unix(1e9, 0).UTC()})
	}
	apply(t, s, r, 7)
	good := func() []Temporary {
		t.Helper()
		got, err := s.Good()
		if err != nil {
			t.Fatal(err)
		}
		return got.Temporary
	}
	if got := good(); !reflect.DeepEqual(got, r.Temporary) {
		t.Errorf("%d rules, want %d: %+v", len(got), len(r.Temporary), got[:2])
	}
	if st, err := stat(filepath.Join(dir, indexGood)); err != nil || st.Size > 4096 {
		t.Errorf("the index: %+v, %v", st, err)
	}
	blob := filepath.Join(dir, r.Bans+blobEnd)
	text, err := os.ReadFile(blob)
	if err != nil {
		t.Fatal(err)
	}
	for _, damaged := range [][]byte{nil, text[:len(text)/2]} {
		if err := os.WriteFile(blob, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Good(); !errors.Is(err, ErrStateDamaged) {
			t.Errorf("with %d bytes of bans: %v", len(damaged), err)
		}
	}
	if err := os.Remove(blob); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Good(); !errors.Is(err, ErrStateDamaged) {
		t.Errorf("without the bans: %v", err)
	}
	// An index of an earlier version has all of them in it, also when it is put anew.
	r.Bans = ""
	for range 2 {
		if err := s.putIndex(indexGood, r); err != nil {
			t.Fatal(err)
		}
		if r, err = s.index(indexGood); err != nil {
			t.Fatal(err)
		}
	}
	if got := good(); len(got) != 1001 {
		t.Errorf("of an index of an earlier version: %d rules", len(got))
	}
	apply(t, s, recordOf(t, little), 8)
	if blobs := entries(t, dir, blobEnd); len(blobs) != 2 {
		t.Errorf("blobs that nothing names stay: %q", blobs)
	}
}
