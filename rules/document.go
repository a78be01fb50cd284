package rules

import "sort"

// document is one file of a policy: the policy itself or an include. The spans
// of all of them share one range of offsets, so that a span says which file it
// is of, and sorting spans sorts by file.
type document struct {
	file  string
	src   []byte
	base  int32 // the offset of its first byte
	lines lines
}

// shift moves a span that counts from the start of the document.
func (d *document) shift(s span) span { return span{s.start + d.base, s.end + d.base} }

// at gives the place of a span of the document.
func (d *document) at(s span) place { return d.lines.at(span{s.start - d.base, s.end - d.base}) }

// add takes a file in, behind those that were taken in before.
func (r *reader) add(file string, src []byte) *document {
	d := &document{file: file, src: withoutBOM(src), lines: newLines(withoutBOM(src))}
	if n := len(r.docs); n > 0 {
		last := r.docs[n-1]
		// One byte between them keeps an end apart from the next start.
		d.base = last.base + int32(len(last.src)) + 1
	}
	r.docs = append(r.docs, d)
	return d
}

// document gives the file that a span is of.
func (r *reader) document(s span) *document {
	i := sort.Search(len(r.docs), func(i int) bool { return r.docs[i].base > s.start })
	return r.docs[max(0, i-1)]
}

// locate gives the place of a span and its file.
func (r *reader) locate(s span) (string, place) {
	d := r.document(s)
	return d.file, d.at(s)
}

// pos gives the place of a span in its file.
func (r *reader) pos(s span) Pos {
	file, p := r.locate(s)
	return Pos{file, p.line, p.column}
}
