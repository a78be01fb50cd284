package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"deadlight/rules"
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
	// Self are the addresses of who asks, if that is the host to look at: then the one
	// by which it reached the vantage is the target, and the answer is a vantageAnswer.
	Self []netip.Addr `json:"self,omitempty"`
	// Temporary are the rules in no file that are in force on the host to look at.
	Temporary []rules.Temporary `json:"temporary,omitempty"`
}

// vantageAnswer is what the far side says of the host that asked.
type vantageAnswer struct {
	Output []byte          `json:"output"` // the report as it is to be printed
	Report json.RawMessage `json:"report"`
}

// lookOverSSH looks at a host from another machine.
func lookOverSSH(ctx context.Context, e env, v verify.SSHVantage, file string, from *sources, f verifyFlags) error {
	code, err := askVantage(ctx, e, v, file, from, f, nil, e.stdout)
	if err == nil && code != exitOK {
		return silently(code)
	}
	return err
}

// askVantage runs this program at the vantage.
func askVantage(ctx context.Context, e env, v verify.SSHVantage, file string, from *sources, f verifyFlags, self []netip.Addr, stdout io.Writer) (code int, err error) {
	request := vantageRequest{
		Policy: file, Files: from.read, Globs: map[string][]string{},
		Look: f.lookFlags, Format: f.report.format, Old: f.report.old, Vantage: v.String(), Self: self,
	}
	for _, g := range from.globs {
		request.Globs[g.Pattern] = g.Names
	}
	if self != nil {
		for _, t := range temporaryHere(e, f.state) {
			request.Temporary = append(request.Temporary, t.Temporary)
		}
	}
	b, err := json.Marshal(request)
	if err != nil {
		return 0, err
	}
	if isTerminal(e.stderr) {
		printf(e.stderr, "sending this program to %s, which looks from there\n", oneLine(v.String())) // ssh may ask for a password below
	}
	code, err = v.Run(ctx, "/proc/self/exe", []string{fromVantage}, b, stdout, e.stderr)
	if errors.Is(err, verify.ErrVantage) {
		return 0, refused(err, "try it by hand: ssh "+v.Host+" uname -sm")
	}
	return code, err
}

// lookFromAfar lets another machine look at this host. output is the report as it is
// to be printed.
func lookFromAfar(ctx context.Context, e env, vantage, file string, from *sources, f verifyFlags) (report *verify.Report, output []byte, err error) {
	v, err := verify.ParseSSHVantage(vantage)
	if err != nil {
		return nil, nil, usageError("--vantage ssh://USER@HOST", "vantage: %w", err)
	}
	v.Config = f.sshConfig
	self, err := ownAddresses()
	if err != nil {
		return nil, nil, refused(err, "")
	}
	if len(self) == 0 {
		return nil, nil, refused(errors.New("this host has no address but local ones"), "")
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	said := boundedBuffer{most: longestReport, full: stop}
	code, err := askVantage(ctx, e, v, file, from, f, self, &said)
	switch {
	case said.over:
		return nil, nil, refused(fmt.Errorf("%s gave no report: it says more than %d MB", v, longestReport>>20), "")
	case err != nil:
		return nil, nil, err
	case said.kept.Len() == 0 && code != exitOK:
		return nil, nil, silently(code) // the far side has said why
	}
	var answer vantageAnswer
	if err := json.Unmarshal(said.kept.Bytes(), &answer); err != nil {
		return nil, nil, refused(fmt.Errorf("%s gave no report: %w", v, err), "")
	}
	if report, err = verify.ReadReport(bytes.NewReader(answer.Report)); err != nil {
		return nil, nil, refused(fmt.Errorf("%s gave no report: %w", v, err), "")
	}
	if isTerminal(e.stdout) {
		answer.Output = []byte(printable(string(answer.Output))) // another machine shall not steer it
	}
	return report, answer.Output, nil
}

// longestReport is more than a report of every port of four families takes.
const longestReport = 512 << 20

// boundedBuffer keeps what another machine says, but no more than a report takes.
type boundedBuffer struct {
	kept bytes.Buffer
	most int
	full func() // called once there is more
	over bool
}

// Write implements [io.Writer]. It takes everything, so that the other side can end.
func (b *boundedBuffer) Write(p []byte) (int, error) {
	if !b.over && b.kept.Len()+len(p) > b.most {
		b.over, b.kept = true, bytes.Buffer{}
		b.full()
	}
	if b.over {
		return len(p), nil
	}
	return b.kept.Write(p)
}

// ownAddresses lists the addresses of this host by which others may reach it.
func ownAddresses() ([]netip.Addr, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the addresses of this host: %w", err)
	}
	var out []netip.Addr
	for _, x := range list {
		p, err := netip.ParsePrefix(x.String())
		if err != nil {
			return nil, fmt.Errorf("list the addresses of this host: %w", err)
		}
		if a := p.Addr().Unmap(); a.IsGlobalUnicast() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

// targetOf is the address of the host that asked: that by which sshd sees it, if it
// is one of its own. Behind a translation the verdict would be about who translates.
func targetOf(caller string, r *vantageRequest) (netip.Addr, error) {
	hint := fmt.Sprintf("deadlight verify --vantage %s --target ADDR, with an address by which that machine reaches this host", r.Vantage)
	a, err := netip.ParseAddr(caller)
	if err != nil {
		return a, refused(fmt.Errorf("%s does not tell by which address it sees this host", r.Vantage), hint)
	}
	if a = a.Unmap(); !slices.Contains(r.Self, a) {
		return a, refused(fmt.Errorf("%s sees this host as %s, which is no address of it that can be probed: something between them translates", r.Vantage, a), hint)
	}
	return a, nil
}

func newFromVantageCommand(e env) *cobra.Command {
	c := &cobra.Command{
		Use:    fromVantage,
		Hidden: true, // verify --vantage ssh:// starts it
		Short:  "Look at a host for another machine, as standard input says",
		Args:   cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			return lookForAnother(c.Context(), e, strings.Join(args, ""))
		},
	}
	return c
}

// lookForAnother is the far side of askVantage; caller is the address that asks, as
// sshd sees it.
func lookForAnother(ctx context.Context, e env, caller string) error {
	var r vantageRequest
	ctx, gone, err := takeRequest(ctx, e, &r)
	if err != nil {
		return err
	}
	defer gone()
	rs, problems := parseFiles(r.Policy, sentFiles(r))
	if rs == nil {
		return unusable(e, problems, "nothing probed") // the near side has read it: another version
	}
	if len(r.Temporary) > 0 {
		p, _ := rs.Policy.With(r.Temporary)
		rs = rules.Compile(p)
	}
	if r.Self != nil {
		target, err := targetOf(caller, &r)
		if err != nil {
			return err
		}
		r.Look.Targets = []string{target.String()}
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
	if r.Self == nil {
		return f.print(e, r.Policy, report)
	}
	var others []string
	for _, a := range r.Self {
		if a.String() != r.Look.Targets[0] {
			others = append(others, a.String())
		}
	}
	if len(others) > 0 {
		report.Notes = append(report.Notes, fmt.Sprintf("of this host %s was looked at, by which it reached the vantage, and not %s: name more with --target",
			r.Look.Targets[0], strings.Join(others, ", ")))
	}
	var out bytes.Buffer
	shown := e
	shown.stdout = &out
	verdict := f.print(shown, r.Policy, report)
	b, err := json.Marshal(report)
	if err == nil {
		err = writeJSON(e.stdout, vantageAnswer{out.Bytes(), b})
	}
	return errors.Join(err, verdict)
}

// takeRequest reads what is asked of the far side. The context ends when who asked is
// gone, which its input shows.
func takeRequest(ctx context.Context, e env, request any) (context.Context, context.CancelFunc, error) {
	if err := json.NewDecoder(e.stdin).Decode(request); err != nil {
		return nil, nil, usageError("deadlight verify --vantage ssh://USER@HOST starts this command", "no request on standard input: %w", err)
	}
	ctx, gone := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, e.stdin)
		gone()
	}()
	return ctx, gone, nil
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
