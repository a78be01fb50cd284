package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newDriftCommand(e env) *cobra.Command {
	var quiet, asJSON bool
	c := &cobra.Command{
		Use:     "drift",
		GroupID: groupWatch,
		Short:   "Say whether the kernel still holds what was applied, and who changed it",
		Long: `Holds the table in the kernel against what was last applied: rules, set elements,
priorities, policies, flags, everything. Then it holds the files of the policy
against the text that was applied, by content. It changes nothing and needs no
policy to be readable.

Who changed it is known when deadlight watch was listening: the kernel tells it
once. It is certain when only one change was made since the apply.

Exit codes: 0 no drift, 1 drift, 3 could not tell. With --quiet only errors are
printed: fit for cron, CI and configuration management.`,
		Example: "  sudo deadlight drift\n  sudo deadlight drift --quiet || sudo deadlight apply",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors: the exit code is the answer")
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	c.RunE = func(*cobra.Command, []string) error {
		d, err := driftHere(*dir)
		if err != nil {
			return hostError(err, "deadlight drift")
		}
		switch {
		case quiet:
		case asJSON:
			err = writeJSON(e.stdout, d)
		default:
			d.print(e.stdout)
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
}

// fileJSON is a file of the policy that is not as it was applied.
type fileJSON struct {
	Name string `json:"name"`
	Why  string `json:"why"` // changed, new, missing, unreadable
}

// driftHere holds the network namespace of the calling thread against its state.
func driftHere(dir string) (_ *driftJSON, err error) {
	h, err := openHost(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	last, err := h.state.Settle(h.look, h.here)
	if err != nil {
		return nil, err
	}
	if h.elsewhere(last) {
		return nil, refused(fmt.Errorf("the state in %s is of another network namespace: could not tell", h.state.Dir()), "deadlight apply")
	}
	h.conn.Known = h.state.Known(last)
	is, changes, err := h.conn.Check(last.Snapshot, firewall.Samples)
	if err != nil {
		return nil, err
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
	d.Files = append(d.Files, changedFiles(last)...)
	d.Drift = len(d.Changes)+len(d.Files) > 0
	return d, nil
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
	at := disk{filepath.Dir(r.Policy)}
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
	when := d.Applied.Local().Format("2006-01-02 15:04:05")
	if !d.Drift {
		printf(w, "No drift: the kernel holds what was applied at %s from %s, generation %d\n", when, oneLine(d.Policy), d.Generation)
		return
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
}
