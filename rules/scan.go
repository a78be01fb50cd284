package rules

import (
	"bytes"
	"strconv"
	"strings"
)

// scan says where every key and value of a TOML document stands. It trusts that
// the TOML library has accepted the document; of any other it reads as much as
// it understands, and never fails. Its spans count from base.
func scan(src []byte, base int32) *scanner {
	start := span{base, base}
	s := &scanner{src: src, base: base, root: &node{key: start, value: start}}
	s.table = s.root
	for !s.broken && s.skip() {
		if s.peek() == '[' {
			s.header()
		} else {
			s.pair(s.table)
		}
	}
	return s
}

type scanner struct {
	src    []byte
	base   int32
	pos    int
	root   *node
	table  *node // the one that keys go to
	broken bool

	empty        span // the first key that is "", which the library loses values of
	first, again span // of the first key or table that is defined twice, which the library does not always see
}

// part is one part of a dotted key.
type part struct {
	name string
	at   span
}

// peek gives the next byte, or 0 at the end.
func (s *scanner) peek() byte {
	if s.pos >= len(s.src) {
		return 0
	}
	return s.src[s.pos]
}

// has reports whether the rest begins with text.
func (s *scanner) has(text string) bool {
	return bytes.HasPrefix(s.src[s.pos:], []byte(text))
}

// expect steps over text, or gives up.
func (s *scanner) expect(text string) {
	if !s.has(text) {
		s.broken = true
		return
	}
	s.pos += len(text)
}

func (s *scanner) since(start int) span { return span{s.base + int32(start), s.base + int32(s.pos)} }

// blanks steps over spaces and tabs.
func (s *scanner) blanks() {
	for s.peek() == ' ' || s.peek() == '\t' {
		s.pos++
	}
}

// skip steps over blanks, newlines and comments; false means the end.
func (s *scanner) skip() bool {
	for s.pos < len(s.src) {
		switch s.peek() {
		case ' ', '\t', '\r', '\n':
			s.pos++
		case '#':
			n := bytes.IndexByte(s.src[s.pos:], '\n')
			if n < 0 {
				n = len(s.src) - s.pos
			}
			s.pos += n
		default:
			return true
		}
	}
	return false
}

// header reads [a.b] or [[a.b]].
func (s *scanner) header() {
	start, open, end := s.pos, "[", "]"
	if s.has("[[") {
		open, end = "[[", "]]"
	}
	s.expect(open)
	key := s.key()
	s.expect(end)
	if s.broken {
		return
	}
	whole := s.since(start)

	n := s.root
	for _, p := range key[:len(key)-1] {
		n = n.field(p.name, p.at)
		s.clash(n.closed, n, p.at)
		n = latest(n)
	}
	last := key[len(key)-1]
	n = n.field(last.name, last.at)
	s.clash(n.closed, n, last.at)
	if open == "[[" {
		s.clash(n.given || len(n.fields) > 0, n, last.at)
		if len(n.items) == 0 {
			n.key, n.value = last.at, whole
		}
		item := &node{key: whole, value: whole, given: true}
		n.items = append(n.items, item)
		s.table = item
		return
	}
	s.clash(n.given || len(n.items) > 0, n, last.at)
	n.key, n.value, n.given = last.at, whole, true
	s.table = n
}

// latest is where keys below n go: n, or the last table of a [[n]].
func latest(n *node) *node {
	if len(n.items) > 0 {
		return n.items[len(n.items)-1]
	}
	return n
}

// clash notes that n is defined in two ways, the second being here.
func (s *scanner) clash(is bool, n *node, at span) {
	if is && s.again == (span{}) {
		s.first, s.again = n.key, at
	}
}

// pair reads a.b = value into a table.
func (s *scanner) pair(n *node) {
	key := s.key()
	s.blanks()
	s.expect("=")
	s.blanks()
	if s.broken {
		return
	}
	for _, p := range key[:len(key)-1] {
		n = n.field(p.name, p.at)
		s.clash(n.closed || len(n.items) > 0, n, p.at)
	}
	last := key[len(key)-1]
	n = n.field(last.name, last.at)
	s.clash(n.given || len(n.fields) > 0 || len(n.items) > 0, n, last.at)
	n.key, n.given = last.at, true
	s.value(n)
}

// key reads a dotted key; it is never empty unless the scanner is broken.
func (s *scanner) key() []part {
	var parts []part
	for !s.broken {
		s.blanks()
		start := s.pos
		var name string
		switch s.peek() {
		case '"':
			s.quoted(`"`)
			name = unescape(string(s.inner(start, 1)))
		case '\'':
			s.quoted(`'`)
			name = string(s.inner(start, 1))
		default:
			for bareKey(s.peek()) {
				s.pos++
			}
			s.broken = s.pos == start
			name = string(s.src[start:s.pos])
		}
		parts = append(parts, part{name, s.since(start)})
		if name == "" && s.empty == (span{}) {
			s.empty = s.since(start)
		}
		s.blanks()
		if s.peek() != '.' {
			break
		}
		s.pos++
	}
	return parts
}

// inner gives what stands between the quotes of a string that began at start.
func (s *scanner) inner(start, quotes int) []byte {
	if s.broken {
		return nil
	}
	return s.src[start+quotes : s.pos-quotes]
}

func bareKey(b byte) bool {
	return b == '_' || b == '-' || '0' <= b && b <= '9' || 'A' <= b && b <= 'Z' || 'a' <= b && b <= 'z'
}

// value reads a value into its node.
func (s *scanner) value(n *node) {
	start := s.pos
	switch {
	case s.has(`"""`):
		s.quoted(`"""`)
	case s.has(`'''`):
		s.quoted(`'''`)
	case s.has(`"`):
		s.quoted(`"`)
	case s.has(`'`):
		s.quoted(`'`)
	case s.has("["):
		s.list("]", func() {
			item := &node{given: true}
			n.items = append(n.items, item)
			s.value(item)
			item.key = item.value
		})
	case s.has("{"):
		s.list("}", func() { s.pair(n) })
	default:
		s.bare()
	}
	n.value, n.closed = s.since(start), true
}

// list reads the elements of an array or an inline table.
func (s *scanner) list(end string, element func()) {
	s.pos++
	for !s.broken {
		if !s.skip() {
			s.broken = true
			return
		}
		if s.has(end) {
			s.pos++
			return
		}
		element()
		s.skip()
		if s.peek() == ',' {
			s.pos++
		} else if !s.has(end) {
			s.broken = true
		}
	}
}

// bare reads a number, a boolean or a date, which may hold a space.
func (s *scanner) bare() {
	n := bytes.IndexAny(s.src[s.pos:], ",]}#\r\n")
	if n < 0 {
		n = len(s.src) - s.pos
	}
	text := bytes.TrimRight(s.src[s.pos:s.pos+n], " \t")
	s.pos += len(text)
	s.broken = len(text) == 0
}

// quoted reads a string of any of the four kinds.
func (s *scanner) quoted(quote string) {
	s.pos += len(quote)
	for s.pos < len(s.src) {
		switch {
		case s.has(quote):
			s.pos += len(quote)
			// """a""""" holds two quotes of its own at the end.
			for n := 0; len(quote) == 3 && n < 2 && s.peek() == quote[0]; n++ {
				s.pos++
			}
			return
		case quote[0] == '"' && s.peek() == '\\':
			s.pos++
		case len(quote) == 1 && s.peek() == '\n':
			s.broken = true
			return
		}
		s.pos++
	}
	s.pos = len(s.src)
	s.broken = true
}

// unescape decodes the inside of a "quoted" key.
func unescape(text string) string {
	if !strings.Contains(text, `\`) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' || i+1 == len(text) {
			b.WriteByte(text[i])
			continue
		}
		i++
		digits := 0
		switch c := text[i]; c {
		case 'x':
			digits = 2
		case 'u':
			digits = 4
		case 'U':
			digits = 8
		default:
			if at := strings.IndexByte("btnfre", c); at >= 0 {
				c = "\b\t\n\f\r\x1b"[at]
			}
			b.WriteByte(c)
			continue
		}
		if i+digits >= len(text) {
			break
		}
		r, _ := strconv.ParseUint(text[i+1:i+1+digits], 16, 31)
		b.WriteRune(rune(r))
		i += digits
	}
	return b.String()
}
