package rules

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Severity ranks a [Problem].
type Severity uint8

// Severities: an error keeps the policy from being used, a warning does not.
const (
	Error Severity = iota
	Warning
)

// String gives the word printed before the summary.
func (s Severity) String() string { return [...]string{"error", "warning"}[s] }

// Problem is one finding in a policy file.
type Problem struct {
	Severity Severity
	Pos      Pos
	Width    int    // runes under the caret, at least 1
	Line     string // the offending line as written, without its newline
	Summary  string // the fact: lower case, no period
	Hint     string // what to write instead; may be empty
}

// String gives the problem as [Render] prints it, without the last newline.
func (p Problem) String() string {
	var b strings.Builder
	new(renderer).problem(&b, p)
	return strings.TrimSuffix(b.String(), "\n")
}

// MarshalJSON gives the object that scripts read.
func (p Problem) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		Severity string `json:"severity"`
		File     string `json:"file"`
		Line     int    `json:"line"`
		Column   int    `json:"column"`
		Summary  string `json:"summary"`
		Hint     string `json:"hint"`
	}{p.Severity.String(), p.Pos.File, p.Pos.Line, p.Pos.Column, p.Summary, p.Hint})
}

// Render prints problems for people: file:line:column, the fact, the line with
// a caret, a hint; and last the consequence, unless it is "". Whatever the
// policy holds, only printable characters are written.
func Render(w io.Writer, problems []Problem, consequence string) error {
	var b strings.Builder
	r := new(renderer)
	for _, p := range problems {
		r.problem(&b, p)
		if _, err := io.WriteString(w, b.String()); err != nil {
			return err
		}
		b.Reset()
	}
	if consequence == "" {
		return nil
	}
	_, err := io.WriteString(w, printable(consequence)+"\n")
	return err
}

// Summary counts problems in words: "1 error, 2 warnings"; "" when there are none.
func Summary(problems []Problem) string {
	var n [2]int
	for _, p := range problems {
		n[p.Severity]++
	}
	var parts []string
	for s, count := range n {
		switch {
		case count == 1:
			parts = append(parts, fmt.Sprintf("1 %s", Severity(s)))
		case count > 1:
			parts = append(parts, fmt.Sprintf("%d %ss", count, Severity(s)))
		}
	}
	return strings.Join(parts, ", ")
}
