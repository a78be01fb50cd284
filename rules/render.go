package rules

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// How a problem looks on a terminal, whatever its line holds.

const (
	maxColumns = 160 // longer lines are shown around the caret
	lead       = 60  // columns before the caret in such a window
	tab        = "    "
)

// renderer remembers where it was in the line of the last problem: a file may
// be one long line with a thousand problems.
type renderer struct {
	line           string
	column, offset int
}

func (r *renderer) problem(b *strings.Builder, p Problem) {
	where := p.Pos.File
	if p.Pos.Line > 0 {
		where = p.Pos.String()
	}
	fmt.Fprintf(b, "%s: %s: %s\n", printable(where), p.Severity, printable(p.Summary))
	margin := max(5, len(strconv.Itoa(p.Pos.Line)))
	if p.Line != "" {
		text, before, width := window(p.Line, r.seek(p.Line, p.Pos.Column), p.Width)
		fmt.Fprintf(b, "%*d | %s\n", margin, p.Pos.Line, strings.TrimRight(text, " "))
		fmt.Fprintf(b, "%*s | %s%s\n", margin, "", strings.Repeat(" ", before), strings.Repeat("^", width))
	}
	if p.Hint != "" {
		fmt.Fprintf(b, "%*s = hint: %s\n", margin, "", printable(p.Hint))
	}
}

// seek gives the byte offset of a column of a line.
func (r *renderer) seek(line string, column int) int {
	if r.line != line || r.column > column || r.column == 0 {
		*r = renderer{line: line, column: 1}
	}
	for r.column < column && r.offset < len(line) {
		_, n := utf8.DecodeRuneInString(line[r.offset:])
		r.offset += n
		r.column++
	}
	return r.offset
}

// window gives the part of a line to show, the columns before the caret and
// those under it. offset is where the caret's span of that many runes begins.
func window(line string, offset, runes int) (text string, before, width int) {
	start, end := 0, 0
	columns := 0
	for end < len(line) && columns <= maxColumns {
		_, n, w := cell(line[end:])
		end, columns = end+n, columns+w
	}
	if end < len(line) || columns > maxColumns {
		start, columns = offset, 0
		for start > 0 && columns < lead {
			_, n := utf8.DecodeLastRuneInString(line[:start])
			_, _, w := cell(line[start-n:])
			start, columns = start-n, columns+w
		}
		end, columns = start, 0
		for end < len(line) && columns < maxColumns {
			_, n, w := cell(line[end:])
			end, columns = end+n, columns+w
		}
	}

	var b strings.Builder
	if start > 0 {
		b.WriteString("…")
		before++
	}
	for i := start; i < end; {
		s, n, w := cell(line[i:])
		b.WriteString(s)
		switch {
		case i < offset:
			before += w
		case runes > 0:
			width += w
			runes--
		}
		i += n
	}
	if end < len(line) {
		b.WriteString("…")
	}
	return b.String(), before, max(1, width)
}

// cell gives what is shown for the first rune of s, the rune's bytes and the
// columns it takes.
func cell(s string) (text string, size, columns int) {
	r, n := utf8.DecodeRuneInString(s)
	switch {
	case r >= ' ' && r < 0x7f:
		return s[:n], n, 1
	case r == '\t':
		return tab, n, len(tab)
	case r == utf8.RuneError && n == 1:
		text = fmt.Sprintf(`\x%02x`, s[0])
	case !strconv.IsPrint(r):
		text = strings.Trim(strconv.QuoteRuneToASCII(r), "'")
	case unicode.In(r, unicode.Mn, unicode.Me):
		return s[:n], n, 0
	case wide(r):
		return s[:n], n, 2
	default:
		return s[:n], n, 1
	}
	return text, n, len(text)
}

// wide reports whether terminals give a rune two columns.
func wide(r rune) bool {
	return unicode.In(r, unicode.Han, unicode.Hangul, unicode.Hiragana, unicode.Katakana) ||
		'\u3001' <= r && r <= '\u303e' || '\uff01' <= r && r <= '\uff60' ||
		'\U0001f300' <= r && r <= '\U0001f64f' || '\U0001f900' <= r && r <= '\U0001f9ff'
}

// printable makes text safe for a terminal and a single line.
func printable(text string) string {
	var b strings.Builder
	for text != "" {
		s, n, _ := cell(text)
		if text[0] == '\t' {
			s = `\t`
		}
		b.WriteString(s)
		text = text[n:]
	}
	return b.String()
}

const maxQuoted = 60

// cut shortens text of a policy for a message.
func cut(text string) string {
	if utf8.RuneCountInString(text) <= maxQuoted {
		return text
	}
	return string([]rune(text[:min(len(text), 4*maxQuoted)])[:maxQuoted-1]) + "…"
}

// quote writes text of a policy in a message.
func quote(text string) string { return strconv.Quote(cut(text)) }
