package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

// stateFlag adds --state-dir to a command that touches the state.
func stateFlag(c *cobra.Command) *string {
	return c.PersistentFlags().String("state-dir", "",
		"where it is kept what was applied (default /var/lib/deadlight;\nin another network namespace /run/deadlight/netns-INODE)")
}

// host is what a command compares with a policy: the kernel of one network
// namespace, and the state that belongs to it.
type host struct {
	conn  *firewall.Conn
	state *firewall.State
	here  firewall.Namespace
}

// openHost opens the network namespace of the calling thread and its state, and
// locks the state: to write it, or against those who do.
func openHost(dir string, write bool) (_ *host, err error) {
	if dir == "" {
		if dir, err = firewall.StateDir(); err != nil {
			return nil, err
		}
	}
	h := &host{}
	if h.conn, err = firewall.Dial(nil); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.close())
		}
	}()
	if h.here, err = h.conn.Namespace(); err != nil {
		return nil, err
	}
	// Before anything is written: may this user change the firewall at all?
	if _, err = h.conn.Generation(); err != nil {
		return nil, err
	}
	if h.state, err = firewall.OpenState(dir); err != nil {
		return nil, err
	}
	lock := h.state.LockShared
	if write {
		lock = h.state.Lock
	}
	return h, lock()
}

func (h *host) close() error {
	var err error
	if h.state != nil {
		err = h.state.Unlock()
	}
	return errors.Join(err, h.conn.Close())
}

// look reads the table.
func (h *host) look() (*firewall.Snapshot, error) { return h.conn.Snapshot(rules.TableName) }

// hush waits until nobody listens for nftables events, which a watch of ours stops
// doing when it is asked to; of others it warns. What is loaded then takes a while,
// and is said on a terminal.
func (h *host) hush(e env) func(elements int) (func() error, error) {
	return func(elements int) (func() error, error) {
		asked, err := h.state.Hush()
		if err != nil {
			return nil, err
		}
		line := newProgress(e)
		loading := func() { line.say(fmt.Sprintf("loading %d elements of sets", elements)) }
		done := func() error {
			line.done()
			return asked()
		}
		for end := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
			list, err := firewall.Listeners()
			if err != nil {
				return nil, errors.Join(err, done())
			}
			if len(list) == 0 {
				loading()
				return done, nil
			}
			if time.Now().After(end) {
				printf(e.stderr, "deadlight: warning: %s (pid %d) listens for nftables events: the kernel makes one of each of %d elements, which takes many times longer and about %d MB until then\n",
					oneLine(list[0].Comm), list[0].PID, elements, elements*12/1000)
				loading()
				return done, nil
			}
		}
	}
}

// elsewhere reports whether a record is of another namespace that may live
// beside this one: not of this one, and not of one that ended with its boot.
func (h *host) elsewhere(r *firewall.Record) bool {
	return !r.Namespace.Is(h.here) && !r.Namespace.Gone(h.here)
}

// newRecord is what is written down of an application.
func (h *host) newRecord(file string, rs *rules.Ruleset, from *sources) (*firewall.Record, error) {
	now := time.Now()
	table, err := firewall.Meant(rs, now)
	if err != nil {
		return nil, err
	}
	beside, err := h.beside(rs)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, i := range beside {
		ids = append(ids, i.ID())
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return nil, fmt.Errorf("name the policy: %w", err)
	}
	return &firewall.Record{
		Applied: now.UTC().Truncate(time.Second), By: build().version, Policy: path,
		Sources: from.list(), Globs: from.globs, Beside: ids, Namespace: h.here, Snapshot: table,
	}, nil
}

func sameSource(x, y firewall.Source) bool {
	return x.Name == y.Name && x.SHA256 == y.SHA256 && x.Absent == y.Absent
}

// beside lists what in the kernel bears on a policy from outside its table.
func (h *host) beside(rs *rules.Ruleset) ([]firewall.Interference, error) {
	list, err := h.conn.Interference(rs, firewall.HostFiles{})
	return slices.DeleteFunc(list, func(i firewall.Interference) bool { return i.Severity == firewall.Note }), err
}

// samePolicy reports whether both are of the same files with the same content.
func samePolicy(a, b *firewall.Record) bool {
	sameGlob := func(x, y firewall.Glob) bool { return x.Pattern == y.Pattern && slices.Equal(x.Names, y.Names) }
	return a.Policy == b.Policy && a.By == b.By && sameSources(a.Sources, b.Sources) && slices.EqualFunc(a.Globs, b.Globs, sameGlob)
}

// sameRecord reports whether both say the same of policy and table.
func sameRecord(a, b *firewall.Record) bool {
	return samePolicy(a, b) && a.Namespace.Is(b.Namespace) && slices.Equal(a.Beside, b.Beside) &&
		slices.EqualFunc(a.Temporary, b.Temporary, func(x, y firewall.Temporary) bool { return x.Name == y.Name && x.Same(&y.Temporary) }) &&
		len(firewall.Diff(a.Snapshot, b.Snapshot)) == 0
}

// lastActor is who is known to have changed the table last since a record; nil:
// nobody listened.
func (h *host) lastActor(r *firewall.Record) (*byJSON, error) {
	all, err := h.state.Actors(h.here, r.Generation)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	g := all[len(all)-1]
	return &byJSON{g.PID, g.Comm}, nil
}

// hostError says what an error of the kernel or of the state means for people.
func hostError(err error, again string) error {
	var s *firewall.StateError
	var x *exitError
	switch {
	case errors.As(err, &x): // it is said for people already
		return err
	case !errors.As(err, &s):
		return kernelError(err, again)
	case errors.Is(err, fs.ErrPermission) && s.Hint == "":
		return refused(fmt.Errorf("no permission to use the state in %s", s.Path), "sudo "+again+"; in a user namespace name another place with --state-dir")
	}
	return refused(err, s.Hint)
}
