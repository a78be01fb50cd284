package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/spf13/cobra"

	"deadlight/verify"
)

// fromVantage is the command that runs on a machine that looks for another one.
const fromVantage = "from-vantage"

// vantageRequest is what the far side needs: nothing is read there.
type vantageRequest struct {
	Policy  string              `json:"policy"` // its name
	Files   map[string][]byte   `json:"files"`  // by the names that the policy calls them; null: not there
	Globs   map[string][]string `json:"globs"`
	Look    lookFlags           `json:"look"`
	Format  string              `json:"format"`
	Old     *verify.Report      `json:"old,omitempty"`
	Vantage string              `json:"vantage"`
}

// lookOverSSH looks at a host from another machine.
func lookOverSSH(ctx context.Context, e env, v verify.SSHVantage, file string, from *sources, f verifyFlags) error {
	request := vantageRequest{
		Policy: file, Files: from.read, Globs: map[string][]string{},
		Look: f.lookFlags, Format: f.report.format, Old: f.report.old, Vantage: v.String(),
	}
	for _, g := range from.globs {
		request.Globs[g.Pattern] = g.Names
	}
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if isTerminal(e.stderr) {
		printf(e.stderr, "sending this program to %s, which looks from there\n", oneLine(v.String())) // ssh may ask for a password below
	}
	code, err := v.Run(ctx, "/proc/self/exe", []string{fromVantage}, b, e.stdout, e.stderr)
	switch {
	case errors.Is(err, verify.ErrVantage):
		return refused(err, "try it by hand: ssh "+v.Host+" uname -sm")
	case err != nil:
		return err
	case code != exitOK:
		return silently(code)
	}
	return nil
}

func newFromVantageCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:    fromVantage,
		Hidden: true, // verify --vantage ssh:// starts it
		Short:  "Look at a host for another machine, as standard input says",
		Args:   noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return lookForAnother(c.Context(), e)
		},
	}
	return c
}

// lookForAnother is the far side of lookOverSSH.
func lookForAnother(ctx context.Context, e env) error {
	d := json.NewDecoder(e.stdin)
	var r vantageRequest
	if err := d.Decode(&r); err != nil {
		return usageError("deadlight verify --vantage ssh://USER@HOST starts this command", "no request on standard input: %w", err)
	}
	// Who asked is gone when its input ends.
	ctx, gone := context.WithCancel(ctx)
	defer gone()
	go func() {
		_, _ = io.Copy(io.Discard, e.stdin)
		gone()
	}()
	rs, problems := parseFiles(r.Policy, sentFiles(r))
	if rs == nil {
		return unusable(e, problems, "nothing probed") // the near side has read it: another version
	}
	f := verifyFlags{lookFlags: r.Look, report: reportFlags{format: r.Format, old: r.Old}}
	look, err := f.config(rs)
	if err != nil {
		return err
	}
	report, err := lookAt(ctx, look)
	if err != nil {
		return err
	}
	report.Vantage = fmt.Sprintf("%s: %s", r.Vantage, report.Vantage)
	return f.print(e, r.Policy, report)
}

// sentFiles are the files of a policy as they were sent.
type sentFiles vantageRequest

// Glob implements [rules.Files].
func (s sentFiles) Glob(pattern string) ([]string, error) { return s.Globs[pattern], nil }

// ReadFile implements [rules.Files].
func (s sentFiles) ReadFile(name string) ([]byte, error) {
	b, sent := s.Files[name]
	if !sent || b == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return b, nil
}
