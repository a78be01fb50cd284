package firewall

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What was last applied, on disk. A record is a small index, `good` or `next`,
// that names blobs by their SHA-256: the policy, its includes and lists, and the
// snapshot of the table. Blobs are written before the index that names them, so
// that a whole index is a whole record; a list that did not change is not
// written again.

// Errors of the state, to test for with errors.Is; each comes in a [*StateError].
var (
	// ErrNoState: nothing was applied, or it was removed.
	ErrNoState = errors.New("nothing is recorded as applied here")
	// ErrStateDamaged: an index or a blob is not what was written.
	ErrStateDamaged = errors.New("damaged")
	// ErrStateVersion: another version of Deadlight wrote it.
	ErrStateVersion = errors.New("of another version")
	// ErrStateUnsafe: somebody else owns it or may write it.
	ErrStateUnsafe = errors.New("not safe from other users")
	// ErrLocked: another process has been holding the state for too long.
	ErrLocked = errors.New("another deadlight is at work")
)

// StateError says what is wrong with the state. The ruleset has nothing to do
// with it.
type StateError struct {
	Path string
	Err  error
	Hint string // the way out; may be empty
}

func (e *StateError) Error() string { return fmt.Sprintf("state %s: %v", e.Path, e.Err) }

// Unwrap gives the cause.
func (e *StateError) Unwrap() error { return e.Err }

// stateVersion is of the format. A change of what an index or a blob means
// makes it another.
const stateVersion = 1

// Names in the directory. A record of another kind gets a name here, and its
// blobs are kept.
const (
	indexGood    = "good"    // what was applied, and confirmed
	indexNext    = "next"    // what is being applied
	indexPending = "pending" // what is on trial
	lockName     = "lock"
	blobEnd      = ".blob"
	tempEnd      = ".tmp"
)

func indexes() []string { return []string{indexGood, indexNext, indexPending} }

// largestIndex is more than any index may have.
const largestIndex = 64 << 20

// Record is one application of a policy.
type Record struct {
	Applied    time.Time `json:"applied"`
	By         string    `json:"by"`     // the version of Deadlight
	Policy     string    `json:"policy"` // absolute path
	Sources    []Source  `json:"sources"`
	Globs      []Glob    `json:"globs,omitempty"`
	Beside     []string  `json:"beside,omitempty"` // [Interference.ID] of what stood beside it
	Namespace  Namespace `json:"namespace"`
	Generation uint32    `json:"generation"` // after which the kernel held it
	Snapshot   *Snapshot `json:"-"`

	Deadline time.Time `json:"deadline,omitzero"` // of a trial; zero: it is none
	Session  string    `json:"session,omitempty"` // of a trial: the SSH connection it was begun from
	Back     *Back     `json:"back,omitempty"`    // the last trial that came back to this

	Temporary []Temporary `json:"temporary,omitempty"` // rules beside the policy, those that have ended among them
	Bans      string      `json:"bans,omitempty"`      // SHA-256 of those of Temporary that are bans, which no index holds

	Version int    `json:"-"`        // of the format it was read from
	Table   string `json:"snapshot"` // SHA-256 of the snapshot
}

// Source is a file that a policy was read from.
type Source struct {
	Name   string `json:"name"` // as the policy names it; of the first, the policy itself, the last element of its path
	SHA256 string `json:"sha256,omitempty"`
	Size   int64  `json:"size"`
	Absent bool   `json:"absent,omitempty"` // an optional file that was not there

	data []byte
}

// NewSource makes a source of what was read.
func NewSource(name string, data []byte) Source {
	return Source{Name: name, SHA256: digest(data), Size: int64(len(data)), data: data}
}

// Is reports whether the source holds just these bytes.
func (s *Source) Is(data []byte) bool {
	return s.Size == int64(len(data)) && s.SHA256 == digest(data)
}

// Glob is a pattern of a policy with the names that it stood for.
type Glob struct {
	Pattern string   `json:"pattern"`
	Names   []string `json:"names"`
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// State is the directory that says what was last applied. It is not for
// concurrent use.
type State struct {
	dir       string
	lock      *os.File
	exclusive bool
	wait      time.Duration // for another process
	tick      func()        // called before every change of the disk; nil but in tests of a sudden end
}

// OpenState checks the directory; it need not exist before something is applied.
func OpenState(dir string) (*State, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, &StateError{Path: dir, Err: err}
	}
	s := &State{dir: dir, wait: 10 * time.Second}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return s, nil
	case err != nil:
		return nil, s.failed("", err)
	case !info.IsDir():
		return nil, s.failed("", unix.ENOTDIR)
	}
	return s, s.trust("", info)
}

// Dir is the absolute path of the directory.
func (s *State) Dir() string { return s.dir }

// trust refuses what another user owns or may write: it decides what this host
// lets in.
func (s *State) trust(name string, info fs.FileInfo) error {
	why := ""
	switch st, ok := info.Sys().(*syscall.Stat_t); {
	case !ok:
		why = "its owner cannot be told"
	case st.Uid != 0 && st.Uid != uint32(os.Geteuid()):
		why = fmt.Sprintf("it belongs to user %d", st.Uid)
	case info.Mode().Perm()&0o022 != 0:
		why = fmt.Sprintf("others may write it (mode %04o)", info.Mode().Perm())
	default:
		return nil
	}
	return &StateError{
		Path: filepath.Join(s.dir, name), Err: fmt.Errorf("%w: %s", ErrStateUnsafe, why),
		Hint: fmt.Sprintf("who did that? Then: chown -R root: %[1]s; chmod -R go= %[1]s", s.dir),
	}
}

func stat(path string) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, err
	}
	return &st, nil
}

// failed names the file that an error is about, and the way out.
func (s *State) failed(name string, err error) error {
	var known *StateError
	if errors.As(err, &known) {
		return err
	}
	var inner *fs.PathError
	if errors.As(err, &inner) {
		err = inner.Err
	}
	e := &StateError{Path: filepath.Join(s.dir, name), Err: err}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		e.Hint = "make room there, or keep the state elsewhere with --state-dir"
	case errors.Is(err, unix.EROFS):
		e.Hint = "mount it writable, or keep the state elsewhere with --state-dir"
	case errors.Is(err, ErrStateDamaged):
		e.Hint = "deadlight apply records anew what is applied; the ruleset in the kernel is untouched"
	case errors.Is(err, ErrStateVersion):
		e.Hint = fmt.Sprintf("use the deadlight that wrote it, or begin anew: rm -r %s, then deadlight apply", s.dir)
	}
	return e
}

// Lock makes this process the only one that writes the state, and makes the
// directory when there is none. Errors to test for: [ErrLocked].
func (s *State) Lock() error {
	if err := s.makeDir(); err != nil {
		return err
	}
	return s.flock(os.O_RDWR|os.O_CREATE, unix.LOCK_EX)
}

// TryLock is Lock without waiting: ok is false while another process is at work.
func (s *State) TryLock() (ok bool, err error) {
	now := *s
	now.wait = 0
	err = now.Lock()
	if errors.Is(err, ErrLocked) {
		return false, nil
	}
	s.lock, s.exclusive = now.lock, now.exclusive
	return err == nil, err
}

// LockShared keeps writers out while the state is read. Where nothing was ever
// written there is nothing to keep out.
func (s *State) LockShared() error {
	err := s.flock(os.O_RDONLY, unix.LOCK_SH)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (s *State) makeDir() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return s.failed("", err)
	}
	info, err := os.Stat(s.dir)
	if err != nil {
		return s.failed("", err)
	}
	return s.trust("", info)
}

func (s *State) flock(flags, how int) error {
	f, err := os.OpenFile(filepath.Join(s.dir, lockName), flags|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return s.failed(lockName, err)
	}
	info, err := f.Stat()
	if err == nil {
		err = s.trust(lockName, info)
	}
	if err != nil {
		return errors.Join(s.failed(lockName, err), f.Close())
	}
	for end := time.Now().Add(s.wait); ; time.Sleep(20 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return errors.Join(s.failed(lockName, err), f.Close())
		}
		if time.Now().After(end) {
			holder, _ := io.ReadAll(io.LimitReader(f, 20))
			return errors.Join(&StateError{
				Path: s.dir, Err: fmt.Errorf("%w (pid %s)", ErrLocked, strings.TrimSpace(string(holder))),
				Hint: "wait for it to end; an apply takes seconds at most",
			}, f.Close())
		}
	}
	s.lock, s.exclusive = f, how == unix.LOCK_EX
	if s.exclusive {
		// For people who wait; nothing depends on it.
		if f.Truncate(0) == nil {
			_, _ = fmt.Fprintf(f, "%d\n", os.Getpid())
		}
	}
	return nil
}

// Unlock lets others in; the end of the process does too.
func (s *State) Unlock() error {
	if s.lock == nil {
		return nil
	}
	err := s.lock.Close()
	s.lock, s.exclusive = nil, false
	if err != nil {
		return s.failed(lockName, err)
	}
	return nil
}

// Good is what was last applied. Errors to test for: [ErrNoState],
// [ErrStateDamaged], [ErrStateVersion], [ErrStateUnsafe], fs.ErrPermission.
func (s *State) Good() (*Record, error) { return s.record(indexGood) }

// Next is what an apply that did not come to its end meant to apply; whether the
// kernel holds it, only a look can tell: see [State.Settle]. Errors as of Good.
func (s *State) Next() (*Record, error) { return s.record(indexNext) }

// envelope is an index as it is written.
type envelope struct {
	Version int             `json:"version"`
	SHA256  string          `json:"sha256"` // of the record, byte for byte
	Record  json.RawMessage `json:"record"`
}

func (s *State) record(name string) (*Record, error) {
	r, err := s.index(name)
	if err != nil {
		return nil, err
	}
	raw, err := s.blob(r.Table)
	if err != nil {
		return nil, err
	}
	r.Snapshot = new(Snapshot)
	if err := r.Snapshot.UnmarshalBinary(raw); err != nil {
		return nil, s.failed(r.Table+blobEnd, fmt.Errorf("%w: %w", ErrStateDamaged, err))
	}
	return r, s.withBans(r)
}

// index reads a record without its blobs.
func (s *State) index(name string) (*Record, error) {
	raw, err := s.read(name, largestIndex)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, s.none()
	}
	if err != nil {
		return nil, err
	}
	var e envelope
	if err := json.Unmarshal(raw, &e); err != nil {
		return nil, s.failed(name, fmt.Errorf("%w: it is no longer what was written", ErrStateDamaged))
	}
	if e.Version != stateVersion {
		return nil, s.failed(name, fmt.Errorf("%w: %d, this deadlight knows %d", ErrStateVersion, e.Version, stateVersion))
	}
	if digest(e.Record) != e.SHA256 {
		return nil, s.failed(name, fmt.Errorf("%w: its digest does not match, it was changed by hand or by a fault", ErrStateDamaged))
	}
	r := &Record{Version: e.Version}
	if err := json.Unmarshal(e.Record, r); err != nil || len(r.Sources) == 0 {
		return nil, s.failed(name, fmt.Errorf("%w: no record in it", ErrStateDamaged))
	}
	return r, nil
}

// blob reads a blob and holds it against its name.
func (s *State) blob(sum string) ([]byte, error) {
	if !isDigest(sum) {
		return nil, s.failed(indexGood, fmt.Errorf("%w: a blob without a name", ErrStateDamaged))
	}
	b, err := s.read(sum+blobEnd, -1)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, s.failed(sum+blobEnd, fmt.Errorf("%w: it is missing", ErrStateDamaged))
	case err != nil:
		return nil, err
	case digest(b) != sum:
		e := s.failed(sum+blobEnd, fmt.Errorf("%w: its digest does not match, it was changed by hand or by a fault", ErrStateDamaged)).(*StateError)
		e.Hint = fmt.Sprintf("rm %s, then deadlight apply; the ruleset in the kernel is untouched", e.Path)
		return nil, e
	}
	return b, nil
}

func isDigest(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == sha256.Size
}

func (s *State) read(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, s.failed(name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, s.failed(name, err)
	}
	if !info.Mode().IsRegular() {
		return nil, s.failed(name, fmt.Errorf("%w: not a regular file", ErrStateDamaged))
	}
	if err := s.trust(name, info); err != nil {
		return nil, err
	}
	if limit >= 0 && info.Size() > limit {
		return nil, s.failed(name, fmt.Errorf("%w: %d bytes", ErrStateDamaged, info.Size()))
	}
	b := bytes.NewBuffer(make([]byte, 0, info.Size()+bytes.MinRead))
	if _, err := b.ReadFrom(f); err != nil {
		return nil, s.failed(name, err)
	}
	return b.Bytes(), nil
}

// Stage writes down what is about to be applied, durably: call it before the
// kernel's transaction, under [State.Lock]. What is there of an earlier record
// is not written again.
func (s *State) Stage(r *Record) error {
	if err := s.writable(); err != nil {
		return err
	}
	table, err := r.Snapshot.MarshalBinary()
	if err != nil {
		return s.failed(indexNext, err)
	}
	r.Version, r.Table = stateVersion, digest(table)
	if err := s.putBlob(r.Table, int64(len(table)), table); err != nil {
		return errors.Join(err, s.sweep())
	}
	if err := s.putBans(r); err != nil {
		return errors.Join(err, s.sweep())
	}
	for _, src := range r.Sources {
		if src.Absent {
			continue
		}
		if err := s.putBlob(src.SHA256, src.Size, src.data); err != nil {
			return errors.Join(err, s.sweep())
		}
	}
	if err := s.putIndex(indexNext, r); err != nil {
		return errors.Join(err, s.sweep())
	}
	// One sync for all names: an index whose blobs did not survive a power cut
	// was never acted on.
	return s.syncDir()
}

// Commit makes what was staged the record of what is applied, after the kernel
// has taken it; generation is the kernel's afterwards. A trial is recorded beside
// what is good, anything else ends one.
func (s *State) Commit(generation uint32) error {
	if err := s.writable(); err != nil {
		return err
	}
	r, err := s.index(indexNext)
	if err != nil {
		return err
	}
	r.Generation = generation
	index := indexGood
	if r.OnTrial() {
		index = indexPending
	}
	if err := s.putIndex(index, r); err != nil {
		return err
	}
	if err := s.syncDir(); err != nil {
		return err
	}
	if !r.OnTrial() {
		if err := s.unlink(indexPending); err != nil {
			return err
		}
	}
	return s.Discard()
}

// Discard forgets what was staged: the kernel did not take it.
func (s *State) Discard() error {
	if err := s.writable(); err != nil {
		return err
	}
	if err := s.unlink(indexNext); err != nil {
		return err
	}
	return s.sweep()
}

// Clear forgets everything: nothing is applied any more.
func (s *State) Clear() error {
	if err := s.writable(); err != nil {
		return err
	}
	for _, name := range append(indexes(), verifiedName) {
		if err := s.unlink(name); err != nil {
			return err
		}
	}
	if err := s.syncDir(); err != nil {
		return err
	}
	return s.sweep()
}

// Settle says what is applied. An apply that was killed may have come through:
// if the kernel holds what it meant, that is what is applied; look is asked only
// then. Under [State.Lock] the rest of its work is done. Errors as of Good, and
// those of look.
func (s *State) Settle(look func() (*Snapshot, error), here Namespace) (*Record, error) {
	next, err := s.Next()
	switch {
	case errors.Is(err, ErrNoState):
		return s.current(look, here)
	case errors.Is(err, ErrStateDamaged):
		// It was never acted on: it is written whole before the kernel is asked.
	case err != nil:
		return nil, err
	default:
		is, err := look()
		if err != nil {
			return nil, err
		}
		if next.Namespace.Is(here) && is.Present && len(Diff(is, next.Snapshot)) == 0 {
			next.Generation = is.Generation.ID
			if s.exclusive {
				err = s.Commit(next.Generation)
			}
			return next, err
		}
	}
	if s.exclusive {
		if err := s.Discard(); err != nil {
			return nil, err
		}
	}
	return s.current(look, here)
}

// goodOf is Good, unless that is of a namespace that has ended and left its
// number to this one.
func (s *State) goodOf(here Namespace) (*Record, error) {
	r, err := s.Good()
	if err == nil && r.Namespace.Heir(here) {
		return nil, s.none()
	}
	return r, err
}

func (s *State) none() error {
	return &StateError{Path: s.dir, Err: ErrNoState, Hint: "deadlight apply"}
}

func (s *State) writable() error {
	if !s.exclusive {
		return s.failed("", errors.New("written to without the lock"))
	}
	return nil
}

// putBlob writes a blob unless it is there.
func (s *State) putBlob(sum string, size int64, data []byte) error {
	name := sum + blobEnd
	if st, err := stat(filepath.Join(s.dir, name)); err == nil && st.Size == size {
		return nil
	}
	if int64(len(data)) != size {
		return s.failed(name, fmt.Errorf("%w: it is missing", ErrStateDamaged))
	}
	return s.put(name, data)
}

func (s *State) putIndex(name string, r *Record) error {
	index := *r
	if r.Bans != "" {
		index.Temporary = slices.DeleteFunc(slices.Clone(r.Temporary), isBan)
	}
	raw, err := json.Marshal(&index)
	if err != nil {
		return s.failed(name, err)
	}
	out, err := json.Marshal(envelope{stateVersion, digest(raw), raw})
	if err != nil {
		return s.failed(name, err)
	}
	return s.put(name, append(out, '\n'))
}

func (s *State) step() {
	if s.tick != nil {
		s.tick()
	}
}

// put makes a file whole or not at all.
func (s *State) put(name string, data []byte) (err error) {
	temp := filepath.Join(s.dir, name+tempEnd)
	s.step()
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return s.failed(name, err)
	}
	s.step()
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(0o600) // whatever was there before
	}
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	s.step()
	if err == nil {
		err = os.Rename(temp, filepath.Join(s.dir, name))
	}
	if err != nil {
		_ = os.Remove(temp) // the first error is the one to tell
		return s.failed(name, err)
	}
	return nil
}

func (s *State) unlink(name string) error {
	s.step()
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s.failed(name, err)
	}
	return nil
}

func (s *State) syncDir() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return s.failed("", err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return s.failed("", err)
	}
	return nil
}

// sweep removes what no index names. A damaged index names nothing.
func (s *State) sweep() error {
	used := map[string]bool{}
	for _, name := range indexes() {
		r, err := s.index(name)
		switch {
		case errors.Is(err, ErrNoState), errors.Is(err, ErrStateDamaged):
			continue
		case err != nil:
			return err
		}
		used[r.Table+blobEnd], used[r.Bans+blobEnd] = true, true
		for _, src := range r.Sources {
			used[src.SHA256+blobEnd] = true
		}
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return s.failed("", err)
	}
	for _, e := range entries {
		name := e.Name()
		sum, isBlob := strings.CutSuffix(name, blobEnd)
		ours := isBlob && isDigest(sum) && !used[name]
		if base, isTemp := strings.CutSuffix(name, tempEnd); isTemp {
			ours = slices.Contains(indexes(), base) || base == verifiedName || isDigest(strings.TrimSuffix(base, blobEnd))
		}
		if ours {
			if err := s.unlink(name); err != nil {
				return err
			}
		}
	}
	return nil
}
