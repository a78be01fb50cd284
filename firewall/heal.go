package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Target is what was last applied.
type Target struct {
	Policy   string // the path of it
	Snapshot *Snapshot
	// Ruleset loads it again; nil when the sources are not there any more. Reason
	// then says why.
	Ruleset *rules.Ruleset
	Reason  error
	Known   func(set, digest string) *rules.Set // as of [Conn]
}

// Applied tells a [Guard] what was last applied. It is used by one goroutine.
type Applied interface {
	// Target gives the same pointer until something else was applied. Its error is
	// [ErrNoState] when there is nothing to guard.
	Target() (*Target, error)
	// TryLock keeps applies out; ok is false while one is at work.
	TryLock() (unlock func() error, ok bool, err error)
	// Hushed reports whether an apply asks nobody to listen for events.
	Hushed() (bool, error)
}

// Guard compares the table in the kernel with what was last applied: at first,
// after every transaction that touches it, after events were lost, and from time
// to time. With Heal it puts back what was applied. It writes nothing else.
type Guard struct {
	GuardOptions
	Stats Stats

	conn    *Conn
	mon     *Monitor
	applied Applied
	proc    string // of the processes that the kernel names; empty: they are not ours to see

	due      time.Time // of the next comparison
	touched  time.Time // the first event since the last one; zero: none
	urgent   bool
	suspects []Actor
	heardOf  []Generation // for Touched
	own      uint32       // the generation of our last heal
	backoff  backoff
	heldTill time.Time

	ready   []message // what loads target into a namespace without the table; nil: nothing is ready
	readied time.Time
	gone    uint32 // the generation since which there is no table; 0: there may be one

	target *Target // of the last comparison
	absent bool
	looked bool         // a comparison has been made before
	drift  []Difference // as reported; nil: none
	stuck  *Target      // it cannot be put back, or not wholly
	rest   []Difference // what stays different after a heal of stuck
	failed string       // the last error that was reported
	deaf   bool         // an apply asked us not to listen
}

// GuardOptions are set before Run.
type GuardOptions struct {
	Heal     bool
	Interval time.Duration // between comparisons when nothing happens
	// Report is told what happens, on the goroutine of Run.
	Report func(Report)
	// Touched is told of every transaction of others that touched the table, on the
	// goroutine of Run. It may be nil.
	Touched func(Generation)
	// Tick is called about every TickEvery, on the goroutine of Run, to show that it
	// lives.
	Tick      func()
	TickEvery time.Duration
}

// Stats counts since the start.
type Stats struct {
	Transactions uint64 // of any table
	Lost         uint64 // times that the kernel dropped events
	Heals        uint64
	LastCheck    time.Time
	Generation   uint32 // of the last comparison
	Drift        bool
}

// Report is something that a [Guard] has found or done.
type Report struct {
	Kind        ReportKind
	Generation  Generation
	Differences []Difference // between the kernel and what was applied
	By          []Actor      // who wrote the table since the last comparison; nil: not known
	Wait        time.Duration
	Took        time.Duration // from the event to the end of the heal
	Policy      string
	Err         error
}

// ReportKind says what a [Report] is about.
type ReportKind string

// The kinds of reports.
const (
	ReportClean   ReportKind = "clean"   // a comparison found no difference
	ReportApplied ReportKind = "applied" // something else was applied, and the kernel holds it
	ReportDrift   ReportKind = "drift"   // the kernel holds something else than was applied
	ReportUndone  ReportKind = "undone"  // a drift ended without us
	ReportHealed  ReportKind = "healed"  // what was applied is back
	ReportHeld    ReportKind = "held"    // it is put back only after Wait: somebody keeps changing it
	ReportGaveUp  ReportKind = "gave up" // it is not put back any more, until something is applied
	ReportStuck   ReportKind = "stuck"   // it cannot be put back
	ReportLost    ReportKind = "lost"    // the kernel dropped events
	ReportAbsent  ReportKind = "absent"  // nothing is applied
	ReportFailed  ReportKind = "failed"  // a comparison or a heal failed; it is tried again
)

// After the last event of a change, and after the first, a comparison waits.
const (
	quiet     = 20 * time.Millisecond
	noisyMost = 200 * time.Millisecond
	busyWait  = 50 * time.Millisecond // for an apply that is at work
	failWait  = time.Second
	hushEvery = 100 * time.Millisecond
)

// NewGuard dials in the namespace that [Dial] would go to.
func NewGuard(ns *os.File, applied Applied, o GuardOptions) (*Guard, error) {
	return newGuard(ns, applied, o, monitorBuffer)
}

func newGuard(ns *os.File, applied Applied, o GuardOptions, buffer int) (_ *Guard, err error) {
	g := &Guard{GuardOptions: o, applied: applied, backoff: newBackoff()}
	// The events first: what happens after them is seen by the first comparison or
	// is an event.
	if g.mon, err = dialMonitor(ns, rules.TableName, buffer); err != nil {
		return nil, err
	}
	if g.conn, err = Dial(ns); err != nil {
		return nil, errors.Join(err, g.mon.Close())
	}
	g.conn.Hush = func(int) (func() error, error) { return g.listenAgain, g.mon.Pause() }
	ours, err := g.conn.pidsAreOurs()
	if err != nil {
		return nil, errors.Join(err, g.Close())
	}
	if ours {
		g.proc = "/proc"
	}
	return g, nil
}

// Close closes the sockets, after Run has ended.
func (g *Guard) Close() error { return errors.Join(g.mon.Close(), g.conn.Close()) }

// Counters reads the named counters of the table. It is for Report and Tick.
func (g *Guard) Counters() (map[string]Counter, error) { return g.conn.Counters(rules.TableName) }

// Run guards until ctx is done, and gives its error then.
func (g *Guard) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	heard, ended := make(chan heard, 64), make(chan error, 1)
	go func() { ended <- g.listen(ctx, heard) }()
	running := true
	defer func() {
		cancel()
		if running {
			<-ended
		}
	}()
	g.due = time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var tick <-chan time.Time
	if g.Tick != nil && g.TickEvery > 0 {
		t := time.NewTicker(g.TickEvery)
		defer t.Stop()
		tick = t.C
	}
	hush := time.NewTicker(hushEvery)
	defer hush.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-ended:
			running = false
			return err
		case h := <-heard:
			g.hear(h)
		case <-hush.C:
			if err := g.hush(); err != nil {
				g.fail(err)
			}
		case <-tick:
			g.Tick()
		case <-timer.C:
		}
		if !time.Now().Before(g.due) {
			g.compare(ctx)
		}
		if g.Touched != nil { // after a heal
			for _, gen := range g.heardOf {
				g.Touched(gen)
			}
		}
		g.heardOf = nil
		timer.Reset(time.Until(g.due))
	}
}

// hush listens no more while an apply asks for it, and looks afterwards what it
// has not heard of.
func (g *Guard) hush() error {
	deaf, err := g.applied.Hushed()
	if err != nil || deaf == g.deaf {
		return err
	}
	g.deaf = deaf
	if deaf {
		return g.mon.Pause()
	}
	return g.listenAgain()
}

func (g *Guard) listenAgain() error {
	g.due = time.Now()
	return g.mon.Resume()
}

type heard struct {
	Batch
	by Actor
}

// listen hands on what the monitor hears. A process is looked at as soon as it is
// heard of: nft lives for some milliseconds only.
func (g *Guard) listen(ctx context.Context, out chan<- heard) error {
	for {
		b, err := g.mon.Next(ctx)
		if err != nil {
			return err
		}
		h := heard{Batch: b, by: Actor{PID: b.Generation.PID, Comm: b.Generation.Comm}}
		if len(b.Touches) > 0 && g.proc != "" {
			h.by = actor(g.proc, b.Generation)
		}
		select {
		case out <- h:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *Guard) hear(h heard) {
	if h.Lost {
		g.Stats.Lost++
		g.due, g.touched = h.At, h.At
		g.suspects = append(g.suspects, Actor{})
		g.tell(Report{Kind: ReportLost})
		return
	}
	g.Stats.Transactions++
	if len(h.Touches) == 0 || h.Generation.ID == g.own {
		return
	}
	g.heardOf = append(g.heardOf, h.Generation)
	g.gone = 0
	if last := h.Touches[len(h.Touches)-1]; last.Kind == "table" && last.Action == "remove" {
		g.gone = h.Generation.ID
	}
	if !slices.Contains(g.suspects, h.by) && len(g.suspects) < 10 {
		g.suspects = append(g.suspects, h.by)
	}
	if g.touched.IsZero() {
		g.touched = h.At
	}
	if h.Urgent() {
		g.urgent, g.due = true, h.At
		return
	}
	due := h.At.Add(quiet)
	if most := g.touched.Add(noisyMost); due.After(most) {
		due = most
	}
	if !g.urgent {
		g.due = due
	}
}

// tell reports with who wrote, as far as that is known.
func (g *Guard) tell(r Report) {
	if g.Report == nil {
		return
	}
	if !slices.Contains(g.suspects, Actor{}) {
		r.By = g.suspects
	}
	g.Report(r)
}

// compare looks at the kernel, and heals.
func (g *Guard) compare(ctx context.Context) {
	now := time.Now()
	g.due = now.Add(g.Interval)
	target, err := g.applied.Target()
	if err != nil && !errors.Is(err, ErrNoState) {
		// An apply may have replaced what we were reading.
		unlock, ok, locked := g.applied.TryLock()
		if locked == nil && !ok {
			g.due = now.Add(busyWait)
			return
		}
		if locked == nil {
			target, err = g.applied.Target()
			err = errors.Join(err, unlock())
		}
	}
	switch {
	case errors.Is(err, ErrNoState):
		if !g.absent {
			g.tell(Report{Kind: ReportAbsent})
		}
		g.absent, g.looked, g.target, g.drift, g.Stats.Drift = true, true, nil, nil, false
		g.forget()
		return
	case err != nil:
		g.fail(err)
		return
	}
	g.absent = false
	if g.urgent && g.Heal && g.target == target && target.Ruleset != nil && g.backoff.wait(now) == 0 && !g.backoff.over() {
		// What is missing is said by Apply, after it is back.
		g.heal(target, true)
		return
	}
	is, d, err := g.check(target)
	if err != nil {
		g.fail(err)
		return
	}
	if len(d) == 0 {
		g.clean(target, is.Generation)
		return
	}
	// An apply changes the kernel first and the record then, under a lock: without
	// it, and with the same record as before, nobody but somebody else did this.
	if busy, err := g.busy(target); err != nil {
		g.fail(err)
		return
	} else if busy {
		g.due = now.Add(busyWait)
		return
	}
	fresh := g.target != target || !slices.Equal(d, g.drift)
	if g.target != target {
		g.ready = nil // it is of another
		g.renew()
	}
	g.target, g.Stats.Drift, g.looked = target, true, true
	if fresh || !g.touched.IsZero() {
		g.drift = d
		g.tell(Report{Kind: ReportDrift, Generation: is.Generation, Differences: d, Policy: target.Policy})
	}
	if g.Heal && ctx.Err() == nil {
		g.heal(target, false)
		return
	}
	g.forget()
}

// check holds the table against the target.
func (g *Guard) check(target *Target) (*Snapshot, []Difference, error) {
	g.conn.Known = target.Known
	is, d, err := g.conn.Check(target.Snapshot, Samples)
	if err == nil {
		g.failed = ""
		g.Stats.LastCheck, g.Stats.Generation = is.at, is.Generation.ID
	}
	return is, d, err
}

// forget drops what a comparison has dealt with.
func (g *Guard) forget() { g.suspects, g.touched, g.urgent = nil, time.Time{}, false }

func (g *Guard) fail(err error) {
	var state *StateError
	if !errors.As(err, &state) && (errors.Is(err, unix.ENOENT) || errors.Is(err, errTorn) || errors.Is(err, ErrStale)) {
		g.due = time.Now().Add(busyWait) // somebody writes while we read
		return
	}
	g.due = time.Now().Add(min(failWait, g.Interval))
	if err.Error() != g.failed {
		g.failed = err.Error()
		g.tell(Report{Kind: ReportFailed, Err: err, Wait: time.Until(g.due)})
	}
}

// renew begins anew with another target: somebody is at the wheel again.
func (g *Guard) renew() {
	g.backoff.forget()
	g.stuck, g.rest = nil, nil
}

func (g *Guard) clean(target *Target, gen Generation) {
	g.prepare(target)
	if g.target != target {
		g.renew()
	}
	kind := ReportClean
	switch {
	case g.target != target && g.looked:
		kind = ReportApplied
	case g.drift != nil:
		kind = ReportUndone
	}
	g.target, g.drift, g.Stats.Drift, g.looked = target, nil, false, true
	g.tell(Report{Kind: kind, Generation: gen, Policy: target.Policy})
	g.forget()
}

// busy reports whether an apply is at work, or was since the target was read.
func (g *Guard) busy(target *Target) (bool, error) {
	unlock, ok, err := g.applied.TryLock()
	if err != nil || !ok {
		return true, err
	}
	now, err := g.applied.Target()
	if errors.Is(err, ErrNoState) {
		now, err = nil, nil
	}
	return now != target, errors.Join(err, unlock())
}

// heal puts the target back. When the table is gone (urgent) nobody has looked
// what is missing, and nobody has been told.
func (g *Guard) heal(target *Target, urgent bool) {
	now := time.Now()
	switch {
	case target.Ruleset == nil:
		if g.stuck != target {
			g.stuck = target
			g.tell(Report{Kind: ReportStuck, Policy: target.Policy, Err: target.Reason})
		}
		g.forget()
		return
	case !urgent && g.stuck == target && slices.Equal(g.drift, g.rest):
		g.forget()
		return
	case g.backoff.over():
		if !g.backoff.said {
			g.backoff.said = true
			g.tell(Report{Kind: ReportGaveUp, Policy: target.Policy})
		}
		g.forget()
		return
	}
	if wait := g.backoff.wait(now); wait > 0 {
		if till := now.Add(wait); till.Sub(g.heldTill).Abs() > failWait/10 {
			g.heldTill = till
			g.tell(Report{Kind: ReportHeld, Wait: wait, Policy: target.Policy})
		}
		g.due = now.Add(min(wait, g.Interval))
		g.forget()
		return
	}
	unlock, ok, err := g.applied.TryLock()
	if err != nil {
		g.fail(err)
		return
	}
	if !ok {
		g.due = now.Add(busyWait)
		return
	}
	res, current, err := g.putBack(target)
	if err := errors.Join(err, unlock()); err != nil {
		g.backoff.healed(now)
		g.fail(fmt.Errorf("put back what was applied: %w", err))
		return
	}
	if !current {
		g.due = now
		return
	}
	if g.touched.IsZero() {
		g.touched = now
	}
	took := time.Since(g.touched)
	if urgent && len(res.Changed) > 0 {
		g.Stats.Drift = true
		g.tell(Report{Kind: ReportDrift, Generation: res.Generation, Differences: res.Changed, Policy: target.Policy})
	}
	if len(res.Changed) > 0 {
		g.backoff.healed(now)
		g.Stats.Heals++
		g.own = res.Generation.ID
		g.Stats.Drift, g.Stats.Generation = false, res.Generation.ID
		g.tell(Report{Kind: ReportHealed, Generation: res.Generation, Differences: res.Changed, Took: took, Policy: target.Policy})
	}
	g.settle(target, res.Generation.ID)
}

// putBack applies the target unless something else was applied meanwhile.
func (g *Guard) putBack(target *Target) (Result, bool, error) {
	now, err := g.applied.Target()
	if errors.Is(err, ErrNoState) || err == nil && now != target {
		return Result{}, false, nil
	}
	if err != nil {
		return Result{}, false, err
	}
	g.conn.Known = target.Known
	sent := false
	if g.gone != 0 && g.ready != nil {
		// Whatever comes of it, Apply looks at it.
		sent = g.conn.transact(g.gone, g.ready) == nil
		g.gone = 0
	}
	res, err := g.conn.Apply(target.Ruleset)
	if sent && err == nil && len(res.Changed) == 0 {
		res.Changed = Diff(newSnapshot(), target.Snapshot)
	}
	return res, true, err
}

// prepare keeps what would load the target, so that a host without its table does
// not wait for it. What large sets would take in memory is not worth it.
func (g *Guard) prepare(target *Target) {
	now := time.Now()
	if !g.Heal || target.Ruleset == nil || g.target == target && now.Sub(g.readied) < g.Interval {
		return
	}
	g.ready, g.readied = nil, now
	for i := range target.Ruleset.Table.Sets {
		// And no end, of a trial or of a rule, must wait for as long as this is kept.
		if s := &target.Ruleset.Table.Sets[i]; s.Large() || s.Name == rules.TrialSet || s.Left(now) > 0 {
			return
		}
	}
	want, err := encode(&target.Ruleset.Table, now)
	if err != nil {
		return // Apply will say it
	}
	wanted, err := meant(want, now)
	if err != nil {
		return
	}
	none := newSnapshot()
	s, err := (&transaction{table: rules.TableName, is: none, wanted: wanted, want: want, afresh: true, known: g.conn.contentOf(none)}).steps()
	if err == nil { // likewise
		g.ready = s.change
	}
}

// settle looks whether a heal led to what was recorded: another version of
// Deadlight may compile the same policy to another table.
func (g *Guard) settle(target *Target, healed uint32) {
	g.forget()
	is, d, err := g.check(target)
	if err != nil {
		g.fail(err)
		return
	}
	// Asked again, since a table that was not there is read without a second look.
	last, err := g.conn.Generation()
	if err != nil {
		g.fail(err)
		return
	}
	if last.ID != healed {
		g.due = time.Now() // somebody wrote again
		return
	}
	g.drift, g.Stats.Drift = d, len(d) > 0
	if len(d) > 0 {
		g.stuck, g.rest = target, d
		g.tell(Report{Kind: ReportStuck, Generation: is.Generation, Differences: d, Policy: target.Policy})
	}
}
