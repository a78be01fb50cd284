package rules

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// withoutBOM drops the byte order mark that some editors write.
func withoutBOM(src []byte) []byte {
	const bom = "\xef\xbb\xbf"
	for bytes.HasPrefix(src, []byte(bom)) {
		src = src[len(bom):]
	}
	return src
}

// decode gives the tree of a document, with the place of everything in it.
func (r *reader) decode(d *document) (value, bool) {
	if at, c, ok := findUnreadable(d.src); ok {
		r.report(Error, d.shift(at), c)
		return value{}, false
	}
	if at, c, ok := findExcess(d.src); ok {
		r.report(Error, d.shift(at), c)
		return value{}, false
	}
	tree, err := decodeTOML(d.src)
	if err != nil {
		at, c := d.syntax(err)
		r.report(Error, d.shift(at), c)
		return value{}, false
	}
	s := scan(d.src, d.base)
	if s.empty != (span{}) {
		r.report(Error, s.empty, complaint{"key is empty", "remove it"})
		return value{}, false
	}
	if s.again != (span{}) {
		at, c := d.twice(span{})
		r.report(Error, d.shift(at), c)
		return value{}, false
	}
	return value{v: tree, at: s.root}, true
}

// decodeTOML turns a panic of the library into an error: a policy may be
// anything, and the guards must not die of it.
func decodeTOML(src []byte) (tree any, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = errors.New("cannot be read as TOML")
		}
	}()
	_, err = toml.NewDecoder(bytes.NewReader(src)).Decode(&tree)
	return tree, err
}

// findUnreadable finds the first byte that no TOML file may hold.
func findUnreadable(src []byte) (span, complaint, bool) {
	if bytes.HasPrefix(src, []byte("\xff\xfe")) || bytes.HasPrefix(src, []byte("\xfe\xff")) ||
		bytes.IndexByte(src[:min(len(src), 4)], 0) >= 0 {
		return span{}, complaint{"file is not UTF-8 text; it looks like UTF-16", "save it as UTF-8"}, true
	}
	for i := 0; i < len(src); {
		b := src[i]
		switch {
		case b >= utf8.RuneSelf:
			_, n := utf8.DecodeRune(src[i:])
			if n == 1 {
				return span{int32(i), int32(i + 1)}, complaint{fmt.Sprintf("byte 0x%02x is not UTF-8 text", b), "save the file as UTF-8"}, true
			}
			i += n
			continue
		case b == '\r' && i+1 < len(src) && src[i+1] == '\n', b == '\n', b == '\t':
		case b < ' ' || b == 0x7f:
			return span{int32(i), int32(i + 1)}, complaint{fmt.Sprintf("control character U+%04X in the file", b), "remove it"}, true
		}
		i++
	}
	return span{}, complaint{}, false
}

// findExcess finds what would cost a recursive parser its stack or its memory:
// deep nesting and long words. It must hold for broken documents too.
func findExcess(src []byte) (span, complaint, bool) {
	s := &scanner{src: src}
	depth, parts := 0, 0
	for s.skip() && !s.broken {
		start := s.pos
		switch c := s.peek(); {
		case c == '"' || c == '\'':
			quote := string(c)
			if three := quote + quote + quote; s.has(three) {
				quote = three
			}
			s.quoted(quote)
		case bareKey(c):
			for bareKey(s.peek()) {
				s.pos++
			}
		default:
			s.pos++
			switch c {
			case '[', '{':
				depth, parts = depth+1, 0
			case ']', '}':
				depth = max(0, depth-1)
			case '.':
				parts++
			case '=', ',':
				parts = 0
			}
		}
		if depth >= maxNesting || parts >= maxNesting {
			return s.since(start), complaint{"nested too deeply", fmt.Sprintf("a policy has fewer than %d levels", maxNesting)}, true
		}
		if s.pos-start > maxWord {
			return span{int32(start), int32(start + 1)}, complaint{fmt.Sprintf("word of more than %d bytes", maxWord), "is a quote missing?"}, true
		}
	}
	return span{}, complaint{}, false
}

// syntax puts an error of the TOML library into our words.
func (d *document) syntax(err error) (span, complaint) {
	var pe toml.ParseError
	if !errors.As(err, &pe) {
		return span{}, complaint{printable(err.Error()), "please report this file as a bug"}
	}
	size := int32(len(d.src))
	at := span{int32(pe.Position.Start), int32(pe.Position.Start + max(1, pe.Position.Len))}
	at.start = min(max(at.start, 0), size)
	at.end = min(max(at.end, at.start), size)

	for at.start+1 < at.end && (d.src[at.start] == ' ' || d.src[at.start] == '\t') {
		at.start++
	}

	message := strings.TrimSuffix(pe.Message, ".")
	if strings.Contains(message, "already been defined") || strings.Contains(message, "was already created") {
		return d.twice(at)
	}
	if at, ok := d.unquoted(at); ok {
		word := at.text(d.src)
		c := complaint{"text without quotes: " + printable(cut(word)), "did you mean " + quote(word) + "?"}
		if cut(word) != word {
			c.hint = "put quotes around it"
		}
		return at, c
	}
	for _, w := range plainWords() {
		if strings.Contains(message, w.theirs) {
			return at, w.complaint
		}
	}
	if message != "" && !strings.HasPrefix(message, "TOML") {
		message = strings.ToLower(message[:1]) + message[1:]
	}
	return at, complaint{summary: printable(message)}
}

// twice explains a key or table that is defined twice.
func (d *document) twice(at span) (span, complaint) {
	c := complaint{hint: "remove one"}
	if s := scan(d.src, 0); s.again != (span{}) {
		at = s.again
		c.hint = fmt.Sprintf("first defined at line %d: remove one", d.lines.at(s.first).line)
	}
	c.summary = printable(cut(at.text(d.src))) + " is defined twice"
	if strings.HasPrefix(strings.TrimLeft(d.lines.at(at).text, " \t"), "[") {
		c.hint += ", or give it another name"
	}
	return at, c
}

// plainWords gives words for the errors of the TOML library that are common and
// hard to understand.
func plainWords() []struct {
	theirs string
	complaint
} {
	return []struct {
		theirs string
		complaint
	}{
		{"expected a top-level item to end", complaint{"more follows where the line should end", "several values need a list: [80, 443]"}},
		{"strings cannot contain newlines", complaint{"string is not closed", "put its quote at the end"}},
		{"unexpected EOF; expected value", complaint{"value is missing", ""}},
		{"unexpected EOF; expected '", complaint{"string is not closed", "put its quote at the end"}},
		{"expected value but found", complaint{"value is missing", ""}},
		{"array terminator", complaint{"list is not continued or closed", "put , between its elements and ] at its end"}},
		{"inline table terminator", complaint{"table is not continued or closed", "put , between its keys and } at its end"}},
		{"unexpected comma", complaint{"element is missing before the comma", ""}},
		{"to end table name", complaint{"header is not closed", "put ] at its end"}},
		{"table names cannot be empty", complaint{"name in a header is empty", ""}},
		{"expected '.' or '='", complaint{"= is missing after a key", ""}},
		{"key name appears blank", complaint{"key is missing before =", ""}},
		{"is out of range for int64", complaint{"number is too large", ""}},
		{"cannot have leading zeroes", complaint{"number has leading zeros", "write it without"}},
		{"invalid escape", complaint{`\ with no meaning in a string`, `write \\ for one \, or put the string in single quotes`}},
	}
}

// unquoted finds the word at a syntax error, if it stands where a value is due
// and could be meant as text: an address, a range of ports, a name.
func (d *document) unquoted(at span) (span, bool) {
	const ends = " \t\r\n,=[]{}#\"'"
	start, end := int(at.start), int(at.start)
	for start > 0 && strings.IndexByte(ends, d.src[start-1]) < 0 {
		start--
	}
	for end < len(d.src) && strings.IndexByte(ends, d.src[end]) < 0 {
		end++
	}
	before := bytes.TrimRight(d.src[:start], " \t")
	if start == end || len(before) == 0 || strings.IndexByte("=,[", before[len(before)-1]) < 0 {
		return span{}, false
	}
	// A [header] or an array that begins a line is not a value.
	line := before[bytes.LastIndexByte(before, '\n')+1:]
	if bytes.HasPrefix(bytes.TrimLeft(line, " \t"), []byte("[")) && !bytes.ContainsRune(line, '=') {
		return span{}, false
	}
	word := string(d.src[start:end])
	if strings.Trim(word, "0123456789_+-") == "" && !strings.Contains(strings.TrimLeft(word, "+-"), "-") {
		return span{}, false
	}
	return span{int32(start), int32(end)}, true
}
