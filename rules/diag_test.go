package rules_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"deadlight/rules"
)

var update = flag.Bool("update", false, "rewrite the expected output in testdata")

// Every testdata/errors/*.txtar holds a policy and what is printed of it, and
// maybe the files it names and the time "now". A file of bytes that no text file
// may hold is written as a Go string in "quoted", or in NAME.quoted.
func TestProblems(t *testing.T) {
	files, err := filepath.Glob("testdata/errors/*.txtar")
	if err != nil || len(files) < 200 {
		t.Fatalf("found %d files, want at least 200 (%v)", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			before, want, ok := strings.Cut(string(data), "-- want --\n")
			if !ok && !*update {
				t.Fatal("no section want")
			}
			src, files, now := input(t, before)
			policy, problems := rules.Parse("policy.toml", src, files)
			if policy != nil && !now.IsZero() {
				problems = append(problems, policy.Expired(now)...)
			}
			var out bytes.Buffer
			consequence := "deadlight: " + rules.Summary(problems)
			if policy == nil {
				consequence += ": policy not loaded"
			}
			if err := rules.Render(&out, problems, consequence); err != nil {
				t.Fatal(err)
			}
			if *update {
				want = out.String()
				if err := os.WriteFile(file, []byte(before+"-- want --\n"+want), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if len(problems) == 0 {
				t.Error("no problem was found")
			}
			if diff := cmp.Diff(want, out.String()); diff != "" {
				t.Errorf("output differs (-want +got):\n%s", diff)
			}
			hasError := false
			for _, p := range problems {
				hasError = hasError || p.Severity == rules.Error
			}
			if hasError != (policy == nil) {
				t.Errorf("error is %v, policy is nil: %v", hasError, policy == nil)
			}
		})
	}
}

// input gives the policy, the files and the time of a test; no files if there
// are none.
func input(t *testing.T, text string) (src []byte, files rules.Files, now time.Time) {
	t.Helper()
	unquote := func(s string) []byte {
		s, err := strconv.Unquote(strings.TrimSpace(s))
		if err != nil {
			t.Fatal(err)
		}
		return []byte(s)
	}
	archive := txtar.Parse([]byte(text))
	all := memory{}
	for _, f := range archive.Files[1:] {
		name, quoted := strings.CutSuffix(f.Name, ".quoted")
		switch {
		case f.Name == "now":
			var err error
			if now, err = time.Parse(time.RFC3339, strings.TrimSpace(string(f.Data))); err != nil {
				t.Fatal(err)
			}
		case quoted:
			all[name] = string(unquote(string(f.Data)))
		default:
			all[name] = string(f.Data)
		}
	}
	if len(all) > 0 {
		files = all
	}
	switch first := archive.Files[0]; first.Name {
	case "quoted":
		src = unquote(string(first.Data))
	case "policy.toml":
		src = first.Data
	default:
		t.Fatal("no policy")
	}
	return src, files, now
}

func problem(line string, column, width int) rules.Problem {
	return rules.Problem{Pos: rules.Pos{File: "p.toml", Line: 14, Column: column}, Width: width, Line: line, Summary: "fact"}
}

func TestProblemString(t *testing.T) {
	for _, test := range []struct {
		name string
		give rules.Problem
		want string
	}{
		{"brief", rules.Problem{
			Pos:   rules.Pos{File: "/etc/deadlight/policy.toml", Line: 14, Column: 12},
			Width: 8, Line: `ports   = ["443-80"]`,
			Summary: `port range runs backwards: "443-80"`, Hint: `did you mean "80-443"?`,
		}, `/etc/deadlight/policy.toml:14:12: error: port range runs backwards: "443-80"
   14 | ports   = ["443-80"]
      |            ^^^^^^^^
      = hint: did you mean "80-443"?`},
		{"nowhere", rules.Problem{Severity: rules.Warning, Pos: rules.Pos{File: "p.toml"}, Summary: "fact"}, "p.toml: warning: fact"},
		{"tab", problem("\ta\tb", 4, 1), "p.toml:14:4: error: fact\n   14 |     a    b\n      |          ^"},
		{"escape", problem("a\x1b[31mb", 7, 1), "p.toml:14:7: error: fact\n   14 | a\\x1b[31mb\n      |          ^"},
		{"caret under an escape", problem("a\u202eb", 2, 1), "p.toml:14:2: error: fact\n   14 | a\\u202eb\n      |  ^^^^^^"},
		{"invalid", problem("a\xffb", 3, 1), "p.toml:14:3: error: fact\n   14 | a\\xffb\n      |      ^"},
		{"wide", problem("名前b", 3, 1), "p.toml:14:3: error: fact\n   14 | 名前b\n      |     ^"},
		{"combining", problem("e\u0301b", 3, 1), "p.toml:14:3: error: fact\n   14 | e\u0301b\n      |  ^"},
		{"past the end", problem("ab", 3, 1), "p.toml:14:3: error: fact\n   14 | ab\n      |   ^"},
		{"summary", rules.Problem{Pos: rules.Pos{File: "a\nb", Line: 1, Column: 1}, Summary: "x\x1b\u009b\ty", Hint: "\u2066"},
			"a\\nb:1:1: error: x\\x1b\\u009b\\ty\n      = hint: \\u2066"},
		{"long line", problem(strings.Repeat("a", 300)+"HERE"+strings.Repeat("b", 300), 301, 4),
			"p.toml:14:301: error: fact\n   14 | …" + strings.Repeat("a", 60) + "HERE" + strings.Repeat("b", 96) +
				"…\n      | " + strings.Repeat(" ", 61) + "^^^^"},
		{"long value", problem(strings.Repeat("a", 300), 1, 300),
			"p.toml:14:1: error: fact\n   14 | " + strings.Repeat("a", 160) + "…\n      | " + strings.Repeat("^", 160)},
		{"exactly wide enough", problem(strings.Repeat("a", 160), 160, 1),
			"p.toml:14:160: error: fact\n   14 | " + strings.Repeat("a", 160) + "\n      | " + strings.Repeat(" ", 159) + "^"},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, test.give.String()); diff != "" {
				t.Errorf("differs (-want +got):\n%s", diff)
			}
		})
	}
}

// A line is shown the same whether or not the problem before it was on it.
func TestRenderSameLine(t *testing.T) {
	line := strings.Repeat("é", 400)
	var problems []rules.Problem
	want := ""
	for _, column := range []int{1, 200, 390, 7, 390} {
		p := problem(line, column, 2)
		problems = append(problems, p)
		want += p.String() + "\n"
	}
	var out bytes.Buffer
	if err := rules.Render(&out, problems, ""); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
}

type fullDisk struct{}

var errFull = errors.New("disk is full")

func (fullDisk) Write([]byte) (int, error) { return 0, errFull }

func TestRenderWriteError(t *testing.T) {
	if err := rules.Render(fullDisk{}, []rules.Problem{problem("a", 1, 1)}, ""); !errors.Is(err, errFull) {
		t.Errorf("got %v", err)
	}
	if err := rules.Render(fullDisk{}, nil, "deadlight: 1 error"); !errors.Is(err, errFull) {
		t.Errorf("got %v", err)
	}
}

func TestSummary(t *testing.T) {
	e, w := rules.Problem{}, rules.Problem{Severity: rules.Warning}
	for want, give := range map[string][]rules.Problem{
		"":                    nil,
		"1 error":             {e},
		"2 errors":            {e, e},
		"1 warning":           {w},
		"1 error, 2 warnings": {w, e, w},
	} {
		if got := rules.Summary(give); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestProblemJSON(t *testing.T) {
	got, err := json.Marshal([]rules.Problem{{
		Severity: rules.Warning, Pos: rules.Pos{File: "p.toml", Line: 3, Column: 7}, Width: 2, Line: "secret", Summary: "fact", Hint: "do this",
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"severity":"warning","file":"p.toml","line":3,"column":7,"summary":"fact","hint":"do this"}]`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
}
