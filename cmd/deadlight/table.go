package main

import (
	"bytes"
	"io"
	"text/tabwriter"
)

// table aligns columns and leaves no blanks at the end of a line.
type table struct {
	*tabwriter.Writer
	aligned bytes.Buffer
	out     io.Writer
}

func newTable(out io.Writer) *table {
	t := &table{out: out}
	t.Writer = tabwriter.NewWriter(&t.aligned, 0, 8, 2, ' ', 0)
	return t
}

// Flush writes the table.
func (t *table) Flush() error {
	if err := t.Writer.Flush(); err != nil {
		return err
	}
	for _, line := range bytes.Split(bytes.TrimSuffix(t.aligned.Bytes(), []byte("\n")), []byte("\n")) {
		if t.aligned.Len() == 0 {
			break
		}
		if _, err := t.out.Write(append(bytes.TrimRight(line, " "), '\n')); err != nil {
			return err
		}
	}
	t.aligned.Reset()
	return nil
}
