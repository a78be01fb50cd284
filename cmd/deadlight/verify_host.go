package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// Verification of this host: verify without --target, and apply --verify.

// hostCheck is what verifyHost looks at.
type hostCheck struct {
	ports       verify.Ports
	canaries    []verify.Canary
	in          string
	maxRate     int
	packetsOnly bool
	thorough    int
}

// verifyHere is verify without --target.
func verifyHere(ctx context.Context, e env, file string, f verifyFlags) error {
	ports, canaries, err := f.what()
	if err != nil {
		return err
	}
	if f.proof != "host" && f.proof != "packets" {
		return usageError("", "--proof is host or packets: %q", f.proof)
	}
	if f.textfile != "" && filepath.Ext(f.textfile) != ".prom" {
		return usageError("--textfile "+f.textfile+".prom", "node_exporter reads only files that end in .prom: %s", f.textfile)
	}
	if f.vantage != "" && f.vantage != "netns" && !isAfar(f.vantage) {
		return usageError("netns, or ssh://USER@HOST", "--vantage knows no vantage %s", printable(f.vantage))
	}
	rs, from, err := readSources(e, file, "nothing probed")
	if err != nil {
		return err
	}
	vantage := cmp.Or(f.vantage, rs.Policy.Verify.Vantage)
	if err := f.ofTheOther(isAfar(vantage)); err != nil {
		return err
	}
	var report *verify.Report
	show := func() error { return f.print(e, file, report) }
	if isAfar(vantage) {
		var output []byte
		report, output, err = lookFromAfar(ctx, e, vantage, file, from, f)
		show = func() error {
			if _, err := e.stdout.Write(output); err != nil {
				return err
			}
			return codeOf(report.Verdict)
		}
	} else {
		report, err = verifyHost(ctx, e, withThose(e, f.state, rs), hostCheck{ports, canaries, f.In, f.MaxRate, f.proof == "packets", thoroughOf(rs, f.Thorough)})
	}
	if err != nil {
		return err
	}
	noteVerdict(e, f.state, newVerified(report, file, f.Ports, from))
	printed := show()
	if f.textfile != "" {
		if err := writeMetrics(f.textfile, verification(report, time.Now())); err != nil {
			return errors.Join(printed, refused(err, ""))
		}
	}
	return printed
}

// isAfar reports whether a vantage is another machine.
func isAfar(vantage string) bool { return strings.HasPrefix(vantage, "ssh://") }

// verifyHost probes the network namespace of the calling thread from outside. Its
// errors are said for people.
func verifyHost(ctx context.Context, e env, rs *rules.Ruleset, c hostCheck) (*verify.Report, error) {
	putBack := keepKnocks()
	line := newProgress(e)
	report, err := verify.LookAtHost(ctx, verify.HostConfig{
		Rules: rs, Ports: c.ports, Canaries: c.canaries, In: c.in, MaxRate: c.maxRate, PacketsOnly: c.packetsOnly, Thorough: c.thorough,
		Progress: func(sent, total uint64) { line.update("probing this host", sent, total) },
	})
	line.done()
	if back := putBack(); back != nil && err == nil {
		printf(e.stderr, "deadlight: warning: the probes stand among those who knocked: %s\n", printable(back.Error()))
	}
	switch {
	case err == nil:
		return report, nil
	case errors.Is(err, verify.ErrNoInterface):
		return nil, usageError("deadlight verify --in NAME", "--in %w", err)
	case errors.Is(err, verify.ErrOtherVerification):
		return nil, refused(err, "wait for it to end")
	case errors.Is(err, verify.ErrNoWay):
		return nil, refused(err, "deadlight verify --target ADDR on another machine")
	case errors.Is(err, verify.ErrNoNamespace):
		return nil, namespaceError(err)
	case errors.Is(err, fs.ErrPermission):
		return nil, refused(fmt.Errorf("no permission to look at this host from outside: %w", err),
			"sudo deadlight verify; a container or a unit needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_NET_RAW")
	}
	return nil, refused(err, "")
}

// keepKnocks notes who knocked at this host, and gives what puts it back: the verifier
// knocks at everything, and would be all that status has to tell.
func keepKnocks() (putBack func() error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return func() error { return err }
	}
	kept, err := conn.KeepKnocks(rules.TableName)
	if err != nil {
		return func() error { return errors.Join(err, conn.Close()) }
	}
	return func() error { return errors.Join(conn.PutKnocks(kept), conn.Close()) }
}

// newVerified is what is kept of a report.
func newVerified(r *verify.Report, file, ports string, from *sources) firewall.Verified {
	if abs, err := filepath.Abs(file); err == nil {
		file = abs
	}
	return firewall.Verified{
		At: time.Now().UTC().Truncate(time.Second), Verdict: r.Verdict.String(), Findings: len(r.Findings), Proof: r.Proof,
		Ports: ports, Policy: file, Digest: firewall.DigestOf(from.list()),
	}
}

// noteVerdict keeps a verdict. Where that cannot be, the verdict holds all the same.
func noteVerdict(e env, dir string, v firewall.Verified) {
	err := func() (err error) {
		h, err := openHost(dir, true)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, h.close()) }()
		v.Namespace = h.here
		return h.state.NoteVerified(v)
	}()
	if err != nil {
		printf(e.stderr, "deadlight: warning: the verdict is not kept: %s\n", printable(err.Error()))
	}
}
