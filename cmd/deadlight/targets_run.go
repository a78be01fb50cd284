package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime/debug"
	"strconv"
	"time"

	"deadlight/verify"
)

// verifyMany is verify of several hosts.
func verifyMany(ctx context.Context, e env, policy string, f verifyFlags) (err error) {
	if f.report.since != "" {
		return usageError("deadlight verify --target ADDR --since FILE", "--since is of one host")
	}
	ports, canaries, err := f.what()
	if err != nil {
		return err
	}
	far, err := f.far()
	if err != nil {
		return err
	}
	hosts, policies, err := readTargets(e, &f, policy, far != nil)
	if err != nil {
		return err
	}
	header := newJournalHeader(hosts, policies, &f)
	j, done, err := openJournal(f.resume, hosts, header)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.f.Close()) }()
	rest, earlier := remaining(hosts, done)
	// The command may save time at the cost of memory elsewhere (main), but not here.
	if os.Getenv("GOGC") == "" {
		defer debug.SetGCPercent(debug.SetGCPercent(100))
	}
	line := newManyProgress(e, len(hosts), len(done))
	each := func(i int, b *verify.Brief) error {
		b.Name, b.Policy, b.Ended = rest[i].name, rest[i].policy, time.Now().UTC().Truncate(time.Millisecond)
		if b.Target != rest[i].String() {
			return fmt.Errorf("the report of %s is of %s", rest[i].String(), b.Target)
		}
		if err := j.add(b); err != nil {
			return err
		}
		line.host(b)
		return nil
	}
	switch {
	case len(rest) == 0:
	case far != nil:
		err = lookAtManyOverSSH(ctx, e, *far, rest, policies, f.lookFlags, earlier, each, line.update)
	default:
		err = verify.LookAtMany(ctx, verify.ManyConfig{
			Hosts: lookHosts(rest, policies, f.Thorough), Ports: ports, Canaries: canaries, In: f.In, MaxRate: f.MaxRate,
			Connect: f.Connect, Earlier: earlier, Progress: line.update,
			Each: func(i int, r *verify.Report) error { return each(i, r.Brief("", "", time.Time{})) },
		})
	}
	line.done()
	if err != nil {
		return manyError(ctx, e, err, line.hosts, len(hosts), f.resume)
	}
	m, err := j.summary(len(hosts))
	if err != nil {
		return refused(err, "")
	}
	m.Began, m.Resumed = j.began, len(done)
	if err := f.report.printMany(e, m, len(hosts)); err != nil {
		return err
	}
	if err := j.finish(); err != nil {
		return err
	}
	return codeOf(m.Verdict)
}

// remaining gives the hosts that are not done yet, and how many addresses those have
// that are.
func remaining(hosts []target, done map[string]bool) (rest []target, earlier int) {
	for i := range hosts {
		if done[hosts[i].String()] {
			earlier += len(hosts[i].addresses)
		} else {
			rest = append(rest, hosts[i])
		}
	}
	return rest, earlier
}

// manyError says why a run over many hosts ended before all were done.
func manyError(ctx context.Context, e env, err error, done, all int, journal string) error {
	kept := "nothing is kept: --resume FILE keeps what is done"
	if journal != "" {
		kept = "kept in " + journal + ": the same command goes on from there"
	}
	if ctx.Err() != nil {
		printf(e.stderr, "deadlight: %d of %d hosts done, %s\n", done, all, printable(kept))
		return ctx.Err()
	}
	var x *exitError
	switch {
	case errors.As(err, &x):
		return err
	case errors.Is(err, fs.ErrPermission):
		return lookError(err)
	}
	return refused(err, fmt.Sprintf("%d of %d hosts done, %s", done, all, kept))
}

// printMany prints the summary.
func (f *reportFlags) printMany(e env, m *verify.Many, hosts int) error {
	out := bufio.NewWriter(e.stdout)
	var err error
	switch f.format {
	case "json":
		err = m.WriteJSON(out)
	case "junit":
		err = m.WriteJUnit(out)
	case "html":
		err = m.WriteHTML(out, time.Now())
	case "prometheus":
		var list []metricFamily
		if list, err = verificationOfMany(m, time.Now()); err == nil {
			err = writeFamilies(out, list)
		}
	default:
		err = forPeople(e, func(w io.Writer) error {
			printf(w, "%s against %s:\n", plural(hosts, "host"), policies(m.Policies))
			return m.WriteText(w)
		})
	}
	if err = errors.Join(err, out.Flush()); err != nil {
		return refused(fmt.Errorf("print the report: %w", err), "")
	}
	return nil
}

func policies(n int) string {
	if n == 1 {
		return "1 policy"
	}
	return strconv.Itoa(n) + " policies"
}

// manyProgress tells how far a run over many hosts is: on a terminal by a line that
// is drawn again and again and wiped at the end, elsewhere by a line a minute.
type manyProgress struct {
	w     io.Writer
	drawn bool // on a terminal that may be drawn on
	every time.Duration

	all, hosts, findings, unsure int

	began, last time.Time
	start       float64 // the part that was done when the run began
	sent        uint64  // at last
}

func newManyProgress(e env, all, done int) *manyProgress {
	p := &manyProgress{w: e.stderr, every: time.Minute, all: all, hosts: done, start: -1}
	if isTerminal(e.stderr) && !e.plain && os.Getenv("NO_COLOR") == "" {
		p.drawn, p.every = true, 250*time.Millisecond
	}
	p.began = time.Now()
	p.last = p.began
	return p
}

// host counts one that is done.
func (p *manyProgress) host(b *verify.Brief) {
	p.hosts++
	switch b.Verdict {
	case verify.Fail:
		for i := range b.Findings {
			if f := &b.Findings[i]; f.Observed != verify.Unknown {
				p.findings += f.Count
			}
		}
	case verify.Inconclusive:
		p.unsure++
	}
}

func (p *manyProgress) update(sent uint64, part float64) { p.at(time.Now(), sent, part) }

func (p *manyProgress) at(now time.Time, sent uint64, part float64) {
	if p.start < 0 {
		p.start = part
	}
	since := now.Sub(p.last)
	if since < p.every {
		return
	}
	text := fmt.Sprintf("probing: %d of %d hosts, %s", p.hosts, p.all, plural(p.findings, "finding"))
	if p.unsure > 0 {
		text += fmt.Sprintf(", %d not told", p.unsure)
	}
	text += fmt.Sprintf(", %d packets/s", int(float64(sent-min(p.sent, sent))/since.Seconds()))
	if gone := part - p.start; gone > 0 {
		left := time.Duration(float64(now.Sub(p.began)) * (1 - part) / gone)
		text += fmt.Sprintf(", %s left", left.Round(time.Second))
	}
	p.last, p.sent = now, sent
	if p.drawn {
		if columns := width(p.w); columns > 0 { // a line that is broken in two cannot be wiped
			text = text[:min(len(text), columns-1)]
		}
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
	} else {
		fmt.Fprintf(p.w, "deadlight: %s\n", text)
	}
}

func (p *manyProgress) done() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
