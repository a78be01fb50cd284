package main

// The terminal's rules:
//
//   - stdout is the answer, and only that; everything else goes to stderr.
//   - An error is one line, `deadlight: error: fact`, and may be followed by one
//     `deadlight: hint: …`, a question or a command to paste. Only report prints them.
//   - Problems of a policy are printed as file:line:col with a caret; the last
//     line is the consequence.
//   - A progress line is drawn on stderr only if that is a terminal, and wiped.
//   - A report is folded to the width of a terminal, between words; what is meant
//     for programs or to be pasted (JSON, nft text, policies, hints) never is.
//   - DEADLIGHT_PLAIN: no columns, carets or lines that change; words alone.
//   - Text from a policy or the network is escaped before it is printed.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/term"

	"deadlight/firewall"
	"deadlight/rules"
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
		text := fmt.Sprintf("deadlight: error: %s\n", printable(x.err.Error()))
		if w := width(e.stderr); w > 0 && !e.plain {
			text = fold(text, w)
		}
		fmt.Fprint(e.stderr, text)
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

// wantsPlain reports whether the words alone are wanted: by DEADLIGHT_PLAIN, or
// because a terminal cannot move its cursor.
func wantsPlain() bool {
	return os.Getenv("DEADLIGHT_PLAIN") != "" || os.Getenv("TERM") == "dumb" && isTerminal(os.Stdout)
}

// isTerminal reports whether a stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// page is a report for people before it is printed.
type page struct {
	bytes.Buffer
	width int // of the terminal; 0: there is none, and lines may be of any length
}

// forPeople prints a report: on a terminal folded to its width, elsewhere as it is,
// and plain if that is wanted.
func forPeople(e env, write func(io.Writer) error) error {
	p := &page{}
	if !e.plain {
		p.width = width(e.stdout)
	}
	err := write(p)
	text := p.String()
	switch {
	case e.plain:
		text = spoken(text)
	case p.width > 0:
		text = fold(text, p.width)
	}
	_, failed := io.WriteString(e.stdout, text)
	return errors.Join(err, failed)
}

// width gives the columns of a terminal, 0 for anything else.
func width(stream any) int {
	f, ok := stream.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return max(columns, 0)
}

// fold breaks lines that are too wide at blanks, or else behind commas, and goes on
// below the last column that begins in the left half. Commands to paste stay whole.
func fold(text string, width int) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		line, end := strings.CutSuffix(line, "\n")
		rest := []rune(line)
		if len(rest) > width && !strings.Contains(line, "hint: ") {
			hang := hangOf(rest, width)
			for indent := 0; len(rest) > width-indent; {
				at := breakOf(rest, width-indent, hang-indent)
				if at < 0 {
					break // one long word: the terminal breaks it
				}
				out.WriteString(strings.TrimRight(string(rest[:at]), " ") + "\n" + strings.Repeat(" ", hang))
				rest, indent = []rune(strings.TrimLeft(string(rest[at:]), " ")), hang
			}
		}
		out.WriteString(string(rest))
		if end {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// refill breaks the lines of paragraphs anew if one is too wide. Lines that are indented
// or have columns stay as they are.
func refill(text string, width int) string {
	var out strings.Builder
	for i, paragraph := range strings.Split(text, "\n\n") {
		if i > 0 {
			out.WriteString("\n\n")
		}
		wide := slices.ContainsFunc(strings.Split(paragraph, "\n"), func(line string) bool { return utf8.RuneCountInString(line) > width })
		if !wide || strings.Contains(paragraph, "  ") {
			out.WriteString(paragraph)
			continue
		}
		column := 0
		for _, word := range strings.Fields(paragraph) {
			n := utf8.RuneCountInString(word)
			switch {
			case column == 0:
			case column+1+n > width:
				out.WriteByte('\n')
				column = 0
			default:
				out.WriteByte(' ')
				column++
			}
			out.WriteString(word)
			column += n
		}
	}
	return out.String()
}

// hangOf gives the column below which a line goes on.
func hangOf(line []rune, width int) int {
	text := len(line) - len([]rune(strings.TrimLeft(string(line), " ")))
	hang := text + 2
	for i := text + 2; i < min(len(line), width/2); i++ {
		if line[i] != ' ' && line[i-1] == ' ' && line[i-2] == ' ' {
			hang = i
		}
	}
	return hang
}

// breakOf gives where the part of a line ends that has room; -1: nowhere behind
// the column least.
func breakOf(line []rune, room, least int) int {
	for _, behind := range []rune{' ', ','} {
		for i := min(room, len(line)-1); i > max(least, 0); i-- {
			if behind == ' ' && line[i] == ' ' || behind == ',' && line[i-1] == ',' {
				return i
			}
		}
	}
	return -1
}

// spoken writes columns with commas, for what reads a screen aloud.
func spoken(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		words := strings.TrimLeft(line, " ")
		out.WriteString(line[:len(line)-len(words)])
		for i, column := range strings.Split(words, "  ") {
			column = strings.TrimLeft(column, " ")
			if i > 0 && column != "" {
				out.WriteString(", ")
			}
			out.WriteString(column)
		}
	}
	return out.String()
}

// showProblems prints problems of a policy, and last the consequence if there is one.
func (e env) showProblems(problems []rules.Problem, consequence string) error {
	if !e.plain {
		return rules.Render(e.stderr, problems, consequence)
	}
	// The place is told as file, line and column: no caret has to be looked for.
	var b strings.Builder
	if err := rules.Render(&b, problems, consequence); err != nil {
		return err
	}
	for line := range strings.Lines(b.String()) {
		if strings.Trim(line, " |^\n") == "" && strings.Contains(line, "^") {
			continue
		}
		if _, err := io.WriteString(e.stderr, line); err != nil {
			return err
		}
	}
	return nil
}

// progress draws a line that is wiped when done is called.
type progress struct {
	w    io.Writer // nil: nothing can be drawn
	last int
}

func newProgress(e env) *progress {
	if e.plain || !isTerminal(e.stderr) {
		return &progress{}
	}
	return &progress{w: e.stderr, last: -1}
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

// say draws what takes long and has no end in sight.
func (p *progress) say(what string) {
	if p.w != nil {
		fmt.Fprintf(p.w, "\r\x1b[K%s", what)
	}
}

func (p *progress) done() {
	if p.w != nil {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
