package main

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
)

// level is a syslog priority, as sd-daemon(3) writes it.
type level int

const (
	levelError   level = 3
	levelWarning level = 4
	levelNotice  level = 5
	levelInfo    level = 6
)

// daemonLog writes one line per thing that happens: with its level for the
// journal, else with its time. It keeps somebody who does much from filling the
// disk.
type daemonLog struct {
	w       io.Writer
	journal bool
	now     func() time.Time
	left    float64 // lines that may still be written
	last    time.Time
	missed  int
}

// At most this many lines at once, and per second in the long run.
const (
	logBurst = 200
	logRate  = 2.0
)

func newDaemonLog(w io.Writer) *daemonLog {
	return &daemonLog{w: w, journal: toJournal(w, os.Getenv("JOURNAL_STREAM")), now: time.Now, left: logBurst}
}

// toJournal reports whether w is the stream that the journal has named.
func toJournal(w io.Writer, stream string) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && stream == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

func (l *daemonLog) print(p level, format string, args ...any) {
	now := l.now()
	if !l.last.IsZero() {
		l.left = min(logBurst, l.left+now.Sub(l.last).Seconds()*logRate)
	}
	l.last = now
	if l.left < 1 {
		l.missed++
		return
	}
	l.left--
	if l.missed > 0 {
		n := l.missed
		l.missed = 0
		l.line(now, levelWarning, fmt.Sprintf("%s not logged: too much happens", plural(n, "line")))
	}
	l.line(now, p, fmt.Sprintf(format, args...))
}

func (l *daemonLog) line(now time.Time, p level, text string) {
	if l.journal {
		fmt.Fprintf(l.w, "<%d>deadlight: %s\n", p, text)
		return
	}
	fmt.Fprintf(l.w, "%s deadlight: %s\n", now.Format("2006-01-02T15:04:05.000Z07:00"), text)
}
