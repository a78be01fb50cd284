package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// failsafeName is a policy beside the one to load, of which only [failsafe]
// counts, and only when no other policy that can be read has one.
const failsafeName = "failsafe.toml"

// boot loads the first that can be had of the policy, what was last applied, and
// a lock-down. Whatever else is broken, the disk included, must not leave the
// host open: so the kernel comes first here, and the record second.
func boot(e env, file, dir string) (err error) {
	h, err := bootHost(dir)
	if err != nil {
		return kernelError(err, "deadlight apply --boot "+file)
	}
	defer func() { err = errors.Join(err, h.close()) }()
	b := &booting{env: e, host: h, file: file}
	b.recall()
	if b.never() {
		printf(e.stderr, "deadlight: warning: there is no policy at %s and none was ever applied: nothing of deadlight filters\n", printable(file))
		return nil
	}
	why := guarded(e, b.policy)
	if why == nil {
		return nil
	}
	alsoWhy := guarded(e, b.lastGood)
	if alsoWhy == nil {
		return found("%s: last known good of %s is in force", firstLine(why), b.good.Applied.Local().Format("2006-01-02 15:04:05"))
	}
	reason := firstLine(why) + "; " + firstLine(alsoWhy)
	// A host that already filters is better off with what it has.
	if is, err := h.look(); err != nil || is.Present {
		return refused(errors.Join(fmt.Errorf("%s: ruleset as before", reason), err), "")
	}
	if err := guarded(e, b.lockDown); err != nil {
		return refused(fmt.Errorf("%s; %s: nothing is loaded, ruleset as before", reason, firstLine(err)), "")
	}
	return found("%s: the lock-down is in force: %s", reason, b.admits())
}

// found is an end that is not as the policy says.
func found(format string, args ...any) error {
	return &exitError{exitFindings, fmt.Errorf(format, args...), ""}
}

// firstLine is what fits the one line that a unit shows of its failure.
func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return strings.TrimSuffix(line, ":")
}

// guarded takes a bug in one way of loading for a reason to go the next.
func guarded(e env, load func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			printf(e.stderr, "%s\n", debug.Stack())
			err = fmt.Errorf("a bug of deadlight, please report it: %v", r)
		}
	}()
	return load()
}

// bootHost is openHost, but for a state that cannot be used: that is no reason
// to load nothing.
func bootHost(dir string) (_ *bootState, err error) {
	h := &bootState{host: &host{}}
	if h.conn, err = firewall.Dial(nil); err != nil {
		return nil, err
	}
	if _, err = h.conn.Generation(); err != nil {
		return nil, errors.Join(err, h.conn.Close())
	}
	h.here, h.unwritable = h.conn.Namespace()
	if dir == "" {
		if dir, err = firewall.StateDir(); err != nil {
			h.unreadable, h.unwritable = err, err
			return h, nil
		}
	}
	if h.state, err = firewall.OpenState(dir); err != nil {
		h.state, h.unreadable, h.unwritable = nil, err, err
		return h, nil
	}
	if err = h.state.Lock(); h.unwritable == nil {
		h.unwritable = err
	}
	return h, nil
}

// bootState is a host whose state may be nil.
type bootState struct {
	*host
	unreadable, unwritable error // why
}

// booting is one run of boot.
type booting struct {
	env
	host *bootState
	file string

	good, next, pending *firewall.Record // nil: none, or unreadable
	goodErr             error            // why good is nil
	kept                []firewall.Temporary

	readable []*rules.Policy // best first: whose [failsafe] counts
	locked   *rules.Policy   // the lock-down
}

// recall reads the state.
func (b *booting) recall() {
	b.goodErr = b.host.unreadable
	if b.host.state == nil {
		return
	}
	b.good, b.goodErr = b.host.state.Good()
	// What was being applied matters where it can be read.
	b.next, _ = b.host.state.Next()
	b.pending, _ = b.host.state.PendingIndex()
	if b.good != nil {
		b.host.conn.Known = b.host.state.Known(b.good)
	}
}

// never reports whether nobody ever asked this host to filter.
func (b *booting) never() bool {
	return errors.Is(b.goodErr, firewall.ErrNoState) && b.next == nil && absent(b.file) && absent(b.failsafe())
}

// absent reports whether there is no such name; a link that leads nowhere is one.
func absent(name string) bool {
	_, err := os.Lstat(name)
	return errors.Is(err, fs.ErrNotExist)
}

func (b *booting) failsafe() string { return filepath.Join(filepath.Dir(b.file), failsafeName) }

// policy loads the policy and records it.
func (b *booting) policy() error {
	rs, problems, from, err := parseSafe(b.file)
	switch {
	case err != nil:
		return err
	case rs == nil:
		return invalid(problems)
	}
	b.readable = append(b.readable, rs.Policy)
	if b.unconfirmed(from) {
		return fmt.Errorf("%s was never confirmed", b.file)
	}
	if failed := failing(rs); len(failed) > 0 {
		return fmt.Errorf("%s: %s", failed[0].pos, failed[0].text)
	}
	rs = b.inTime(b.keep(rs))
	res, err := b.host.conn.Apply(rs)
	if err != nil {
		return fmt.Errorf("%s: %w", b.file, plainly(err))
	}
	if err := b.record(rs, from, res); err != nil {
		printf(b.stderr, "deadlight: warning: %s is in force, but not recorded as applied: %s\n", printable(b.file), oneLine(firstLine(err)))
	}
	if len(res.Changed) == 0 {
		printf(b.stdout, "No changes: the kernel holds what %s says, generation %d\n", printable(b.file), res.Generation.ID)
		return nil
	}
	printf(b.stdout, "Applied generation %d: %s in one transaction, read back identical\n", res.Generation.ID, plural(len(res.Changed), "difference"))
	return nil
}

// parseSafe is parseSources, but for what others than root can write.
func parseSafe(file string) (*rules.Ruleset, []rules.Problem, *sources, error) {
	g, err := newGuard()
	if err != nil {
		return nil, nil, nil, err
	}
	rs, problems, from, err := parseGuarded(file, g)
	if unsafe := g.err("not loaded"); unsafe != nil {
		return nil, nil, nil, unsafe
	}
	return rs, problems, from, err
}

// plainly is the error without where in the table it was met.
func plainly(err error) error {
	var unknown *firewall.NameError
	if errors.As(err, &unknown) {
		return unknown
	}
	return err
}

// invalid tells the first of the problems that keep a policy from being used.
func invalid(problems []rules.Problem) error {
	problems = slices.DeleteFunc(slices.Clone(problems), func(p rules.Problem) bool { return p.Severity != rules.Error })
	if len(problems) == 0 {
		return errors.New("the policy cannot be used, and nothing says why")
	}
	more := ""
	if n := len(problems) - 1; n > 0 {
		more = fmt.Sprintf(" (and %s)", plural(n, "more error"))
	}
	return fmt.Errorf("%s: %s%s", problems[0].Pos, problems[0].Summary, more)
}

// unconfirmed reports whether the host went down while this very policy was
// being applied over another, or was on trial: then a boot goes back to that.
func (b *booting) unconfirmed(from *sources) bool {
	list := from.list()
	if b.good == nil || sameSources(list, b.good.Sources) {
		return false
	}
	return b.next != nil && sameSources(list, b.next.Sources) || b.pending != nil && sameSources(list, b.pending.Sources)
}

func sameSources(a, b []firewall.Source) bool { return slices.EqualFunc(a, b, sameSource) }

// newest is the newest time that the state knows: no boot is earlier.
func (b *booting) newest() time.Time {
	var t time.Time
	for _, r := range []*firewall.Record{b.good, b.next, b.pending} {
		if r == nil {
			continue
		}
		if r.Applied.After(t) {
			t = r.Applied
		}
		for i := range r.Temporary {
			if begun := r.Temporary[i].Begun; begun.After(t) {
				t = begun
			}
		}
	}
	return t
}

// keep puts beside the policy what deadlight open and block have added and has not
// ended by itself.
func (b *booting) keep(rs *rules.Ruleset) *rules.Ruleset {
	list := firewall.Running(b.host.temporary(b.good), time.Now())
	rs, b.kept = withTemporary(rs, list)
	return rs
}

// inTime leaves out what expires when the clock cannot be right, as after an
// empty battery: an opening that has ended must not come back.
func (b *booting) inTime(rs *rules.Ruleset) *rules.Ruleset {
	now, newest := time.Now(), b.newest()
	lost := b.good == nil && !errors.Is(b.goodErr, firewall.ErrNoState)
	if !lost && !now.Before(newest) {
		return rs
	}
	p, closed := rs.Policy.WithoutExpiring()
	if len(closed) == 0 {
		return rs
	}
	why := "the state that would show whether the clock is right cannot be read"
	if !lost {
		why = fmt.Sprintf("the clock says %s, but a policy was applied at %s",
			now.UTC().Format(time.RFC3339), newest.UTC().Format(time.RFC3339))
	}
	printf(b.stderr, "deadlight: warning: %s: what expires stays closed until the next deadlight apply: %s\n", why, strings.Join(closed, ", "))
	return rules.Compile(p)
}

// record makes the policy what was last applied.
func (b *booting) record(rs *rules.Ruleset, from *sources, res firewall.Result) error {
	bad := b.goodErr
	if errors.Is(bad, firewall.ErrNoState) || errors.Is(bad, firewall.ErrStateDamaged) {
		bad = nil // to be written anew
	}
	if err := cmp.Or(b.host.unwritable, bad); err != nil {
		return err
	}
	r, err := b.host.newRecord(b.file, rs, from)
	if err != nil {
		return err
	}
	// An opening that the clock has kept closed is over: nobody else would end it.
	r.Temporary = slices.DeleteFunc(b.kept, func(t firewall.Temporary) bool {
		return !t.Block && !slices.ContainsFunc(rs.Policy.Open, func(o rules.Open) bool { return o.Name == t.Name })
	})
	if newest := b.newest(); r.Applied.Before(newest) {
		r.Applied = newest // or the next boot would take this clock for right
	}
	if len(res.Changed) == 0 && b.good != nil && sameRecord(b.good, r) {
		return nil
	}
	if err := b.host.state.Stage(r); err != nil {
		return err
	}
	return b.host.state.Commit(res.Generation.ID)
}

// lastGood loads what was last applied, from the state alone.
func (b *booting) lastGood() error {
	if b.good == nil {
		return b.goodErr
	}
	rs, err := b.host.state.Compile(b.good)
	if err != nil {
		return err
	}
	b.readable = append(b.readable, rs.Policy)
	if _, err := b.host.conn.Apply(b.inTime(rs)); err != nil {
		return fmt.Errorf("last known good: %w", plainly(err))
	}
	return nil
}

// lockDown loads what admits nothing but [failsafe].
func (b *booting) lockDown() error {
	if name := b.failsafe(); !absent(name) {
		rs, problems, _, err := parseSafe(name)
		if rs == nil && err == nil {
			err = invalid(problems)
		}
		if err != nil {
			printf(b.stderr, "deadlight: warning: no use can be made of %s: %s\n", printable(name), oneLine(firstLine(err)))
		} else {
			b.readable = append(b.readable, rs.Policy)
		}
	}
	var from *rules.Policy
	if i := slices.IndexFunc(b.readable, func(p *rules.Policy) bool { return p.Failsafe != nil }); i >= 0 {
		from = b.readable[i]
	}
	b.locked = rules.LockDown(from)
	_, err := b.host.conn.Apply(rules.Compile(b.locked))
	return err
}

// admits says what the lock-down lets in.
func (b *booting) admits() string {
	if len(b.locked.Open) == 0 {
		return "nothing gets in, there is no [failsafe]"
	}
	o := &b.locked.Open[0]
	return fmt.Sprintf("only %s gets in, as [failsafe] of %s says", what(&o.Traffic), o.Pos.File)
}
