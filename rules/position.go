package rules

import (
	"bytes"
	"sort"
	"unicode/utf8"
)

// The TOML library says where a syntax error is, but not where a key or a value
// stands. This file and scan.go know it.

// span is a stretch of the source, in bytes: sources are far below 2 GiB.
type span struct{ start, end int32 }

// text gives what stands in the span.
func (s span) text(src []byte) string { return string(src[s.start:s.end]) }

// node says where a key or an array element was written. Nodes form the same
// tree as the decoded values.
type node struct {
	key    span             // the key, as written; of an array element its value
	value  span             // the value; of a [table] its header
	fields map[string]*node // of a table
	items  []*node          // of an array
	given  bool             // has a value or a header of its own, rather than being implied by a longer key
	closed bool             // has a value, which no other line may add to
}

// field gives the node of a key, making it when it is new.
func (n *node) field(name string, at span) *node {
	if f := n.fields[name]; f != nil {
		return f
	}
	if n.fields == nil {
		n.fields = make(map[string]*node)
	}
	f := &node{key: at, value: at}
	n.fields[name] = f
	return f
}

// lines turns byte offsets into lines and columns. One file may be one long
// line with ten thousand problems, so no lookup walks a line from its start.
type lines struct {
	src    []byte
	starts []int32 // where each line begins
	runes  []int32 // how many runes begin before every stride-th byte

	last     int32  // where the line of the last lookup begins
	lastText string // so that a thousand problems share one copy of a long line
}

const stride = 1024

func newLines(src []byte) lines {
	l := lines{src: src, starts: []int32{0}, last: -1}
	n := int32(0)
	for i, b := range src {
		if i%stride == 0 {
			l.runes = append(l.runes, n)
		}
		if utf8.RuneStart(b) {
			n++
		}
		if b == '\n' {
			l.starts = append(l.starts, int32(i+1))
		}
	}
	if len(src)%stride == 0 {
		l.runes = append(l.runes, n)
	}
	return l
}

// before counts the runes that begin before an offset.
func (l *lines) before(offset int32) int {
	block := offset / stride
	n := int(l.runes[block])
	for _, b := range l.src[block*stride : offset] {
		if utf8.RuneStart(b) {
			n++
		}
	}
	return n
}

// place is a span in the terms of people.
type place struct {
	line, column, width int
	text                string // of the line, without its newline
}

// at gives the place of a span. What goes on in later lines does not count in
// its width.
func (l *lines) at(s span) place {
	size := int32(len(l.src))
	s.start = min(max(s.start, 0), size)
	for s.start > 0 && s.start < size && !utf8.RuneStart(l.src[s.start]) {
		s.start--
	}
	i := sort.Search(len(l.starts), func(i int) bool { return l.starts[i] > s.start }) - 1
	start, end := l.starts[i], size
	if i+1 < len(l.starts) {
		end = l.starts[i+1] - 1
	}
	text := bytes.TrimSuffix(l.src[start:end], []byte("\r"))
	end = start + int32(len(text))
	if l.last != start {
		l.last, l.lastText = start, string(text)
	}
	begin := l.before(s.start)
	return place{
		line:   i + 1,
		column: begin - l.before(start) + 1,
		width:  max(1, l.before(max(s.start, min(s.end, end)))-begin),
		text:   l.lastText,
	}
}
