package rules

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
