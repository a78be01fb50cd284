package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newWatchCommand(e env) *cobra.Command {
	var heal bool
	var file string
	var interval time.Duration
	c := &cobra.Command{
		Use:     "watch",
		GroupID: groupWatch,
		Short:   "Tell at once when anything else changes the ruleset, and put it back",
		Long: `Listens to the kernel's own news of every nftables transaction and holds the
table against what was last applied: at the start, after every change of it,
after news were lost, and every --interval. What differs is logged on stderr with
the process that changed it. Under systemd it says when it is ready, and levels
are marked for the journal.

With --heal what was applied is put back: at once when the table or a chain was
deleted, else some milliseconds after the last change. Another program that keeps
changing it is fought five times, then ever more slowly, and after fifteen times
only reported, until the next deadlight apply or a restart of watch.

--metrics writes a file for the textfile collector of node_exporter:
deadlight_drift, deadlight_heals_total, deadlight_events_total (transactions of
any program), deadlight_events_lost_total (times that the kernel dropped news),
deadlight_last_check_timestamp_seconds, deadlight_generation and
deadlight_packets_total of each named counter. Nothing listens.

It ends with SIGTERM (exit 0) or SIGINT (exit 130); the ruleset stays as it is.`,
		Example: "  sudo deadlight watch --heal\n  sudo deadlight watch --metrics /var/lib/prometheus/node-exporter/deadlight.prom",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.Flags().BoolVar(&heal, "heal", false, "put back what was applied")
	c.Flags().StringVar(&file, "metrics", "", "write metrics for node_exporter to this `FILE`.prom")
	c.Flags().DurationVar(&interval, "interval", time.Minute, "also look every so often, events or not")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if interval < time.Second {
			return usageError("the events are heard at once; the interval is for what they do not tell", "--interval is at least 1s: %s", interval)
		}
		if file != "" && filepath.Ext(file) != ".prom" {
			return usageError("--metrics "+file+".prom", "node_exporter reads only files that end in .prom: %s", file)
		}
		return watch(c.Context(), e, *dir, firewall.GuardOptions{Heal: heal, Interval: interval}, file)
	}
	return c
}

// watch guards the network namespace of the calling thread until a signal comes.
func watch(ctx context.Context, e env, dir string, o firewall.GuardOptions, file string) (err error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	h, err := openHost(dir, false)
	if err != nil {
		return hostError(err, "deadlight watch")
	}
	defer func() { err = errors.Join(err, h.close()) }()
	if err := h.state.Unlock(); err != nil {
		return hostError(err, "deadlight watch")
	}
	w := &watcher{log: newDaemonLog(e.stderr), heal: o.Heal, host: h}
	if file != "" {
		w.metrics = newMetrics(file)
	}
	alive, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return refused(fmt.Errorf("watchdog of systemd: %w", err), "")
	}
	o.Report, o.Touched = w.report, w.touched
	o.Tick, o.TickEvery = func() { w.notify(daemon.SdNotifyWatchdog) }, alive/2
	if w.guard, err = firewall.NewGuard(nil, firewall.NewApplied(h.state, h.here, h.look), o); err != nil {
		return hostError(err, "deadlight watch")
	}
	defer func() { err = errors.Join(err, w.guard.Close()) }()
	err = w.guard.Run(ctx)
	w.notify(daemon.SdNotifyStopping)
	if ctx.Err() == nil {
		return hostError(err, "deadlight watch")
	}
	select {
	case s := <-signals:
		if s == syscall.SIGTERM {
			w.log.print(levelInfo, "stopped: the ruleset stays as it is")
			return silently(exitOK)
		}
	case <-time.After(time.Second): // not by a signal
	}
	return ctx.Err()
}

// watcher tells people, systemd and node_exporter what the guard has to say.
type watcher struct {
	log     *daemonLog
	guard   *firewall.Guard
	host    *host
	metrics *metrics // nil: none
	heal    bool
	ready   bool
	mute    string // the last error of notify or metrics: said once
}

// touched writes down who changed the table, for deadlight drift.
func (w *watcher) touched(g firewall.Generation) {
	if err := w.host.state.NoteActor(w.host.here, g); err != nil {
		w.complain("note who changed the table", err)
	}
}

func (w *watcher) report(r firewall.Report) {
	level, text := sentence(r)
	first := !w.ready && (r.Kind == firewall.ReportClean || r.Kind == firewall.ReportDrift || r.Kind == firewall.ReportAbsent)
	switch {
	case r.Kind != firewall.ReportClean || first:
		w.log.print(level, "%s", text)
	}
	if r.Kind == firewall.ReportDrift {
		w.differences(r.Differences)
	}
	if first {
		w.ready = true
		w.notify(daemon.SdNotifyReady + "\nSTATUS=" + text)
	} else {
		w.notify("STATUS=" + text)
	}
	if w.metrics != nil {
		counters, err := w.guard.Counters()
		if err == nil {
			err = w.metrics.write(w.guard.Stats, counters)
		}
		if err != nil {
			w.complain("metrics", err)
		}
	}
}

// sentence says a report in one line, and how bad it is.
func sentence(r firewall.Report) (level, string) {
	where := fmt.Sprintf("table inet %s, generation %d", rules.TableName, r.Generation.ID)
	switch r.Kind {
	case firewall.ReportClean:
		return levelInfo, fmt.Sprintf("clean: the kernel holds what was applied from %s (%s)", oneLine(r.Policy), where)
	case firewall.ReportApplied:
		return levelNotice, fmt.Sprintf("applied: the kernel holds %s (%s), by %s", oneLine(r.Policy), where, who(r.By))
	case firewall.ReportDrift:
		return levelError, fmt.Sprintf("drift: %s (%s), by %s", plural(len(r.Differences), "difference"), where, who(r.By))
	case firewall.ReportUndone:
		return levelNotice, fmt.Sprintf("undone: the kernel holds again what was applied (%s), by %s", where, who(r.By))
	case firewall.ReportHealed:
		return levelWarning, fmt.Sprintf("healed: %s put back (%s) after %s, changed by %s",
			plural(len(r.Differences), "difference"), where, r.Took.Round(100*time.Microsecond), who(r.By))
	case firewall.ReportHeld:
		return levelWarning, fmt.Sprintf("held: somebody keeps changing the table (%s): next heal in %s", who(r.By), r.Wait.Round(time.Second/10))
	case firewall.ReportGaveUp:
		return levelError, fmt.Sprintf("gave up: %s keeps changing the table: drift is only reported from now on; to resume, stop it, then: deadlight apply", who(r.By))
	case firewall.ReportStuck:
		if r.Err != nil {
			return levelError, "stuck: cannot put back what was applied: " + oneLine(r.Err.Error()) + ": deadlight apply"
		}
		return levelError, fmt.Sprintf("stuck: this version of deadlight compiles %s to another table: %s left: deadlight apply",
			oneLine(r.Policy), plural(len(r.Differences), "difference"))
	case firewall.ReportLost:
		return levelWarning, "lost: the kernel dropped news of the ruleset: looking at all of it"
	case firewall.ReportAbsent:
		return levelWarning, "absent: nothing is applied here: nothing to watch until deadlight apply"
	}
	return levelError, "failed: " + oneLine(fmt.Sprint(r.Err)) + ": trying again"
}

func who(by []firewall.Actor) string {
	if len(by) == 0 {
		return "an unknown process"
	}
	var names []string
	for _, a := range by {
		names = append(names, oneLine(a.String()))
	}
	return strings.Join(names, ", ")
}

// differences lists what was done to the kernel.
func (w *watcher) differences(all []firewall.Difference) {
	const most = 10
	for i, d := range all {
		if i == most {
			w.log.print(levelError, "drift: and %d more: deadlight drift", len(all)-most)
			return
		}
		var b strings.Builder
		changeOf(seenFrom(d)).print(&b)
		for line := range strings.Lines(b.String()) {
			w.log.print(levelError, "drift: %s", strings.TrimRight(line, "\n"))
		}
	}
}

func (w *watcher) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		w.complain("notify systemd", err)
	}
}

// complain says once what keeps failing and does not matter to the watching.
func (w *watcher) complain(what string, err error) {
	text := what + ": " + err.Error()
	if text != w.mute {
		w.mute = text
		w.log.print(levelWarning, "%s", oneLine(text))
	}
}
