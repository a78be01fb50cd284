package main

// The terminal's rules:
//
//   - stdout is the answer, and only that; everything else goes to stderr.
//   - An error is one line, `deadlight: error: fact`, and may be followed by one
//     `deadlight: hint: …`, a question or a command to paste. Only report prints them.
//   - Problems of a policy are printed as file:line:col with a caret; the last
//     line is the consequence.
//   - A progress line is drawn on stderr only if that is a terminal, and wiped.
//   - Text from a policy or the network is escaped before it is printed.

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/term"

	"deadlight/firewall"
)

// Exit codes, for all commands.
const (
	exitOK          = 0   // as the policy says
	exitFindings    = 1   // something is not as the policy says
	exitUsage       = 2   // usage or policy error, nothing touched
	exitRefused     = 3   // refused, no permission or could not tell; ruleset as before
	exitRolledBack  = 4   // applied, then rolled back
	exitBug         = 70  // a bug of ours
	exitInterrupted = 130 // Ctrl-C
)

// exitError is an error with its exit code and what to do about it.
type exitError struct {
	code int
	err  error // nil: everything was said already
	hint string
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

func usageError(hint, format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...), hint}
}

func refused(err error, hint string) error { return &exitError{exitRefused, err, hint} }

// silently ends with a code when the answer was printed already.
func silently(code int) error { return &exitError{code: code} }

// report prints an error and gives the exit code.
func report(e env, err error) int {
	if err == nil {
		return exitOK
	}
	var x *exitError
	if !errors.As(err, &x) {
		x = &exitError{code: exitUsage, err: err} // cobra's own: a flag or a command it does not know
	}
	if x.err != nil {
		fmt.Fprintf(e.stderr, "deadlight: error: %s\n", printable(x.err.Error()))
	}
	if x.hint != "" {
		fmt.Fprintf(e.stderr, "deadlight: hint: %s\n", printable(x.hint))
	}
	return x.code
}

// printable escapes what could steer a terminal.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if r == '\n' || strconv.IsPrint(r) {
			b.WriteRune(r)
		} else {
			fmt.Fprintf(&b, "\\u%04x", r)
		}
	}
	return b.String()
}

// kernelError says what an error of the kernel means for people.
func kernelError(err error, again string) error {
	switch {
	case errors.Is(err, firewall.ErrPermission):
		return refused(errors.New("no permission to change the firewall: ruleset as before"), "sudo "+again)
	case errors.Is(err, firewall.ErrTooLarge):
		return refused(err, "run it as root, or raise the limit: sysctl net.core.wmem_max")
	case errors.Is(err, firewall.ErrStale):
		return refused(errors.New("somebody else keeps changing the ruleset: nothing was changed"), "which program is it? nft monitor shows it")
	}
	return refused(err, "")
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// progress draws a line that is wiped when done is called.
type progress struct {
	w    io.Writer // nil: not a terminal
	last int
}

func newProgress(w io.Writer) *progress {
	if !isTerminal(w) {
		return &progress{}
	}
	return &progress{w: w, last: -1}
}

func (p *progress) update(what string, sent, total uint64) {
	if p.w == nil || total == 0 {
		return
	}
	percent := int(min(sent*100/total, 99))
	if percent != p.last {
		p.last = percent
		fmt.Fprintf(p.w, "\r\x1b[K%s %d %%", what, percent)
	}
}

func (p *progress) done() {
	if p.w != nil {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
