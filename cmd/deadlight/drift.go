package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newDriftCommand(e env) *cobra.Command {
	var quiet, asJSON, full bool
	c := &cobra.Command{
		Use:     "drift",
		GroupID: groupWatch,
		Short:   "Say whether the kernel still holds what was applied, and who changed it",
		Long: `Holds the table in the kernel against what was last applied: rules, set elements,
priorities, policies, flags, everything. Of sets with more than 16,384 ranges it
compares the digest and the count, and looks up some elements drawn at random;
with --full all of them, about 5 seconds for a million. Then it holds the files
of the policy against the text that was applied, by content, and lists what other
tables, tc or XDP programs bear on the policy that did not when it was applied. It
changes nothing.

Who changed it is known when deadlight watch was listening: the kernel tells it
once. It is certain when only one change was made since the apply.

Exit codes: 0 no drift, 1 drift, 3 could not tell. With --quiet only errors are
printed: fit for cron, CI and configuration management.`,
		Example: "  sudo deadlight drift\n  sudo deadlight drift --quiet || sudo deadlight apply",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors: the exit code is the answer")
	c.Flags().BoolVar(&full, "full", false, "look up every element of sets of more than 16,384 ranges")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	c.RunE = func(*cobra.Command, []string) error {
		samples := firewall.Samples
		if full {
			samples = firewall.Everything
		}
		d, err := driftHere(*dir, samples)
		if err != nil {
			return hostError(err, "deadlight drift")
		}
		switch {
		case quiet:
		case asJSON:
			err = writeJSON(e.stdout, d)
		default:
			err = forPeople(e, func(w io.Writer) error { d.print(w); return nil })
		}
		if err == nil && d.Drift {
			err = silently(exitFindings)
		}
		return err
	}
	return c
}

// driftJSON is the object of `drift --json`; the text is made from it.
type driftJSON struct {
	Schema     int          `json:"schema"`
	Drift      bool         `json:"drift"`
	Policy     string       `json:"policy"`
	Applied    time.Time    `json:"applied"`
	Generation uint32       `json:"generation"`         // of the kernel, now
	AppliedGen uint32       `json:"applied_generation"` // after the apply; of no use after a reboot
	Loaded     bool         `json:"loaded"`             // there is a table
	Rebooted   bool         `json:"rebooted"`           // since the apply
	Changes    []changeJSON `json:"changes"`            // what was done to the kernel
	By         *byJSON      `json:"by,omitempty"`       // who is known to have changed the table last
	Since      uint32       `json:"generations_since"`  // changes to any table since the apply
	Files      []fileJSON   `json:"files"`              // that are not as they were applied
	Pending    *pendingJSON `json:"pending,omitempty"`  // a policy on trial
	// Interference is what bears on the policy from outside its table since then.
	Interference []interferenceJSON `json:"interference"`
}

// fileJSON is a file of the policy that is not as it was applied.
type fileJSON struct {
	Name string `json:"name"`
	Why  string `json:"why"` // changed, new, missing, unreadable
}

// driftHere holds the network namespace of the calling thread against its state.
func driftHere(dir string, samples int) (_ *driftJSON, err error) {
	h, err := openHost(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	// The kernel and the record are read side by side: each takes its time with ten
	// thousand rules.
	type settled struct {
		last *firewall.Record
		err  error
	}
	look, done := sync.OnceValues(h.look), make(chan settled, 1)
	go func() {
		last, err := h.state.Settle(look, h.here)
		done <- settled{last, err}
	}()
	is, lookErr := look()
	record := <-done
	if err := cmp.Or(record.err, lookErr); err != nil {
		return nil, err
	}
	last := record.last
	if h.elsewhere(last) {
		return nil, refused(fmt.Errorf("the state in %s is of another network namespace: could not tell", h.state.Dir()), "deadlight apply")
	}
	changes := firewall.Diff(is, last.Snapshot)
	if last.Snapshot.HoldsLarge() {
		h.conn.Known = h.state.Known(last)
		if is, changes, err = h.conn.Check(last.Snapshot, samples); err != nil {
			return nil, err
		}
	}
	d := &driftJSON{
		Schema: 1, Policy: last.Policy, Applied: last.Applied, Generation: is.Generation.ID, AppliedGen: last.Generation,
		Loaded: is.Present, Rebooted: last.Namespace.Gone(h.here), Changes: []changeJSON{}, Files: []fileJSON{},
	}
	for _, x := range changes {
		d.Changes = append(d.Changes, changeOf(seenFrom(x)))
	}
	if !d.Rebooted {
		d.Since = is.Generation.ID - last.Generation
	}
	if len(d.Changes) > 0 {
		if d.By, err = h.lastActor(last); err != nil {
			return nil, err
		}
		for i := range d.Changes {
			if d.Since == 1 { // no other can have done it
				d.Changes[i].By = d.By
			}
		}
	}
	var judges *firewall.Record
	if d.Pending, judges, err = h.pending(last, is); err != nil {
		return nil, err
	}
	if judges != nil {
		d.Files = append(d.Files, changedFiles(judges)...)
	}
	if d.Interference, err = h.newBeside(last); err != nil {
		return nil, err
	}
	d.Drift = len(d.Changes)+len(d.Files)+len(d.Interference) > 0
	return d, nil
}

// newBeside lists what bears on the policy from outside its table, and did not
// when it was applied.
func (h *host) newBeside(last *firewall.Record) ([]interferenceJSON, error) {
	list, err := h.beside(nil)
	if err != nil || len(list) == 0 {
		return []interferenceJSON{}, err
	}
	// Only now is the policy needed: to say what it opens, and by which interfaces.
	rs, err := h.state.Compile(last)
	if err != nil {
		return nil, err
	}
	if list, err = h.beside(rs); err != nil {
		return nil, err
	}
	return interferences(slices.DeleteFunc(list, func(i firewall.Interference) bool { return slices.Contains(last.Beside, i.ID()) })), nil
}

// seenFrom turns a difference round: what an apply would add was removed.
func seenFrom(d firewall.Difference) firewall.Difference {
	d.Before, d.After = d.After, d.Before
	switch d.Action {
	case "add":
		d.Action = "remove"
	case "remove":
		d.Action = "add"
	}
	return d
}

// changedFiles holds the files of a policy against what was applied.
func changedFiles(r *firewall.Record) []fileJSON {
	var out []fileJSON
	at := disk{dir: filepath.Dir(r.Policy)}
	if fromPipe(r.Policy) {
		return nil // which is gone
	}
	for _, src := range r.Sources {
		b, err := at.ReadFile(src.Name)
		why := ""
		switch missing := errors.Is(err, fs.ErrNotExist); {
		case missing && !src.Absent:
			why = "missing"
		case missing:
		case err != nil:
			why = "unreadable"
		case src.Absent:
			why = "new"
		case !src.Is(b):
			why = "changed"
		}
		if why != "" {
			out = append(out, fileJSON{at.path(src.Name), why})
		}
	}
	for _, g := range r.Globs {
		names, err := at.Glob(g.Pattern)
		if err != nil {
			out = append(out, fileJSON{at.path(g.Pattern), "unreadable"})
		}
		for _, name := range names {
			if !slices.Contains(g.Names, name) {
				out = append(out, fileJSON{at.path(name), "new"})
			}
		}
	}
	return out
}

// print renders the drift for people.
func (d *driftJSON) print(w io.Writer) {
	when := d.Applied.Local().Format(time.DateTime)
	if !d.Drift {
		printf(w, "No drift: the kernel holds what was applied at %s from %s, generation %d\n", when, oneLine(d.Policy), d.Generation)
	}
	if d.Pending != nil {
		printf(w, "%s\n", oneLine(d.Pending.text()))
	}
	switch {
	case len(d.Changes) > 0 && !d.Loaded && d.Rebooted:
		printf(w, "Drift: there is no table inet %s: nothing has loaded it since the host was started\n", rules.TableName)
	case len(d.Changes) > 0 && !d.Loaded:
		printf(w, "Drift: there is no table inet %s, though one was applied at %s: nothing of deadlight filters\n", rules.TableName, when)
	case len(d.Changes) > 0:
		printf(w, "Drift: the kernel does not hold what was applied at %s from %s:\n", when, oneLine(d.Policy))
	}
	if d.Loaded {
		for _, c := range d.Changes {
			c.print(w)
		}
	}
	switch {
	case len(d.Changes) == 0:
	case d.By == nil && d.Rebooted:
	case d.By == nil:
		printf(w, "by whom is not known: nobody watched; %s of any table since\n", plural(int(d.Since), "change"))
	case d.Since == 1:
		printf(w, "changed%s, the only change since\n", oneLine(by(d.By)))
	default:
		printf(w, "last change%s; %s of any table since\n", oneLine(by(d.By)), plural(int(d.Since), "change"))
	}
	if len(d.Files) > 0 {
		printf(w, "Drift: the policy is not what was applied at %s:\n", when)
	}
	for _, f := range d.Files {
		printf(w, "  %s %s\n", oneLine(f.Name), f.Why)
	}
	if len(d.Interference) > 0 {
		printf(w, "Drift: what stands beside deadlight was not there when the policy was applied\n")
		printInterferences(w, d.Interference)
	}
}
