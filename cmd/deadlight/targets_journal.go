package main

// The journal of a run over many hosts: what is known of each host, a line a host,
// written and synced when the host is done. A run that was interrupted goes on from
// it; without --resume it is a file that ends with the run.

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/verify"
)

// journalKind is in the first line of each journal.
const journalKind = "deadlight verify"

// journalHeader is the first line: what the rest of the run must be like.
type journalHeader struct {
	Schema   int               `json:"schema"` // 1
	Journal  string            `json:"journal"`
	Began    time.Time         `json:"began"`
	Targets  string            `json:"targets"`  // digest of the hosts, their names and policies
	Policies map[string]string `json:"policies"` // digest by file
	Flags    map[string]string `json:"flags"`    // that change what is probed
}

// newJournalHeader describes a run.
func newJournalHeader(hosts []target, policies map[string]*targetPolicy, f *verifyFlags) journalHeader {
	thorough := "not given"
	if f.Thorough >= 0 {
		thorough = fmt.Sprint(f.Thorough)
	}
	h := journalHeader{
		Schema: 1, Journal: journalKind, Began: time.Now().UTC().Truncate(time.Millisecond), Policies: map[string]string{},
		Flags: map[string]string{
			"--ports": f.Ports, "--canary": fmt.Sprint(f.Canaries), "--in": strconv.Quote(f.In), "--thorough": thorough,
			"--connect": fmt.Sprint(f.Connect), "--vantage": strconv.Quote(f.vantage),
		},
	}
	sum := sha256.New()
	for i := range hosts {
		fmt.Fprintf(sum, "%q %q %q\n", hosts[i].name, hosts[i].String(), hosts[i].policy)
	}
	h.Targets = hex.EncodeToString(sum.Sum(nil))
	for file, p := range policies {
		h.Policies[file] = p.digest
	}
	return h
}

// changed lists what is not as it was.
func (h *journalHeader) changed(now *journalHeader) []string {
	var out []string
	if h.Targets != now.Targets {
		out = append(out, "the targets are others")
	}
	for _, file := range slices.Sorted(maps.Keys(now.Policies)) {
		if was, ok := h.Policies[file]; ok && was != now.Policies[file] {
			out = append(out, file+" has changed")
		}
	}
	for _, flag := range slices.Sorted(maps.Keys(now.Flags)) {
		if was := h.Flags[flag]; was != now.Flags[flag] {
			out = append(out, fmt.Sprintf("%s was %s", flag, was))
		}
	}
	return out
}

// journal is one at work.
type journal struct {
	f     *os.File
	name  string // "" of one that ends with the run
	from  int64  // where the hosts begin
	end   int64
	began time.Time
}

// openJournal begins a journal, or goes on with the one that is there; done are its
// hosts. Without a name it is one that ends with the run.
func openJournal(name string, hosts []target, header journalHeader) (j *journal, done map[string]bool, err error) {
	if name == "" {
		j, err = temporaryJournal(header)
		return j, nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NONBLOCK, 0) // a pipe must not keep us waiting
	if errors.Is(err, fs.ErrNotExist) {
		if err := beginJournal(name, header); err != nil {
			return nil, nil, refused(fmt.Errorf("begin the journal: %w", err), "")
		}
		f, err = os.OpenFile(name, os.O_RDWR, 0)
	}
	if err != nil {
		return nil, nil, refused(fmt.Errorf("open the journal: %w", err), "")
	}
	j = &journal{f: f, name: name}
	if done, err = j.resume(hosts, header); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return j, done, nil
}

// temporaryJournal has no name, so that nothing is left of it.
func temporaryJournal(header journalHeader) (*journal, error) {
	f, err := os.CreateTemp("", "deadlight-")
	if err != nil {
		return nil, refused(fmt.Errorf("keep the reports: %w", err), "TMPDIR names another directory")
	}
	if err := os.Remove(f.Name()); err != nil {
		return nil, refused(errors.Join(fmt.Errorf("keep the reports: %w", err), f.Close()), "")
	}
	return &journal{f: f, began: header.Began}, nil
}

// beginJournal makes a file that has its first line, or none.
func beginJournal(name string, header journalHeader) (err error) {
	line, err := json.Marshal(header)
	if err != nil {
		return err
	}
	dir := filepath.Dir(name)
	f, err := os.CreateTemp(dir, ".deadlight-")
	if err != nil {
		return err
	}
	_, err = f.Write(append(line, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, name, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not on every file system
			err = os.Rename(f.Name(), name)
		}
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the first error is the one to tell
	}
	if errors.Is(err, fs.ErrExist) {
		return nil // another run has begun it meanwhile, and has it locked
	}
	if err != nil {
		return err
	}
	return syncDir(dir)
}

// resume reads a journal and makes it ready for more.
func (j *journal) resume(hosts []target, header journalHeader) (map[string]bool, error) {
	notOurs := func(format string, args ...any) error {
		return usageError("--resume takes a file that an interrupted run has left, or one that is not there yet", j.name+" "+format, args...)
	}
	info, err := j.f.Stat()
	if err != nil {
		return nil, refused(err, "")
	}
	if !info.Mode().IsRegular() {
		return nil, notOurs("is no regular file")
	}
	// Whoever writes it says which hosts need not be probed any more.
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Geteuid() {
		return nil, refused(fmt.Errorf("%s belongs to another user, who could have written verdicts into it", j.name), "name a journal in a directory of your own")
	} else if info.Mode().Perm()&0o022 != 0 {
		return nil, refused(fmt.Errorf("others may write %s (mode %04o), and could have written verdicts into it", j.name, info.Mode().Perm()), "remove it, and name one in a directory of your own")
	}
	if err := unix.Flock(int(j.f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil, refused(fmt.Errorf("another run writes %s", j.name), "wait for it to end")
	} else if err != nil {
		return nil, refused(fmt.Errorf("lock %s: %w", j.name, err), "")
	}
	if now, err := os.Stat(j.name); err != nil || !os.SameFile(info, now) {
		return nil, refused(fmt.Errorf("another run has just ended with %s", j.name), "start again")
	}
	r := bufio.NewReader(j.f)
	line, err := r.ReadBytes('\n')
	var was journalHeader
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, refused(fmt.Errorf("read %s: %w", j.name, err), "")
	}
	if err != nil || json.Unmarshal(line, &was) != nil || was.Journal != journalKind {
		return nil, notOurs("is no journal of deadlight verify")
	}
	if was.Schema != 1 {
		return nil, notOurs("has the schema %d, and 1 is known", was.Schema)
	}
	if changed := was.changed(&header); len(changed) > 0 {
		return nil, refused(fmt.Errorf("%s belongs to another run: %s", j.name, strings.Join(changed, "; ")),
			"undo that to go on, or remove "+j.name+" to begin again")
	}
	j.began, j.from = was.Began, int64(len(line))
	done, err := j.hosts(r, hosts)
	if err != nil {
		return nil, err
	}
	// What was torn goes, so that the next line begins one.
	if err := errors.Join(j.f.Truncate(j.end), j.f.Sync()); err != nil {
		return nil, refused(fmt.Errorf("write %s: %w", j.name, err), "")
	}
	return done, nil
}

// hosts reads which are done. The last line may be torn; no other.
func (j *journal) hosts(r *bufio.Reader, hosts []target) (map[string]bool, error) {
	known := map[string]*target{}
	for i := range hosts {
		known[hosts[i].String()] = &hosts[i]
	}
	done := map[string]bool{}
	j.end = j.from
	for n := 2; ; n++ {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return done, nil
		}
		if err != nil {
			return nil, refused(fmt.Errorf("read %s: %w", j.name, err), "")
		}
		var b verify.Brief
		err = json.Unmarshal(line, &b)
		if t := known[b.Target]; err == nil && (t == nil || t.name != b.Name || t.policy != b.Policy || done[b.Target]) {
			err = fmt.Errorf("no host that is due: %q", b.Target)
		}
		if err != nil {
			if _, end := r.Peek(1); errors.Is(end, io.EOF) {
				return done, nil
			}
			return nil, refused(fmt.Errorf("%s:%d is damaged: %w", j.name, n, err), "remove "+j.name+" to begin again")
		}
		done[b.Target] = true
		j.end += int64(len(line))
	}
}

// add writes a host down; after that it survives the machine.
func (j *journal) add(b *verify.Brief) error {
	line, err := json.Marshal(b)
	if err != nil {
		return err
	}
	line = append(line, '\n')
	if bytes.IndexByte(line, '\n') != len(line)-1 {
		return errors.New("a line of the journal is two")
	}
	_, err = j.f.WriteAt(line, j.end)
	if err == nil && j.name != "" {
		err = j.f.Sync()
	}
	if err != nil {
		return refused(fmt.Errorf("keep the report of %s: %w", b.Target, err), "")
	}
	j.end += int64(len(line))
	return nil
}

// each hands out what is written down, in order.
func (j *journal) each(fn func(*verify.Brief) error) error {
	d := json.NewDecoder(bufio.NewReader(io.NewSectionReader(j.f, j.from, j.end-j.from)))
	for {
		var b verify.Brief
		if err := d.Decode(&b); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the reports: %w", err)
		}
		if err := fn(&b); err != nil {
			return err
		}
	}
}

// summary is of all hosts, or none: a host that is missing would pass unseen.
func (j *journal) summary(hosts int) (*verify.Many, error) {
	m, err := verify.Summarize(j.each)
	if err != nil {
		return nil, err
	}
	if n := m.Hosts.Pass + m.Hosts.Fail + m.Hosts.Inconclusive; n != hosts {
		return nil, fmt.Errorf("read the reports: there are %d, of %d hosts", n, hosts)
	}
	return m, nil
}

// finish removes the journal of a run whose report is printed: the next run must
// look again.
func (j *journal) finish() error {
	if j.name == "" {
		return nil
	}
	if err := os.Remove(j.name); err != nil {
		return refused(fmt.Errorf("remove the journal: %w", err), "")
	}
	return nil
}
