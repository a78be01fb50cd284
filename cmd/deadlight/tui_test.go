package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"pgregory.net/rapid"
)

// Lines fold between words, below the column that they belong to.
func TestFold(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"fits", "  ok  80/tcp  open\n", "  ok  80/tcp  open\n"},
		{"sentence", "one two three four five\n", "one two three four\n  five\n"},
		{"below its column", "kernel  as it was applied\n", "kernel  as it was\n        applied\n"},
		{"indented", "  note one two three four\n", "  note one two three\n    four\n"},
		{"a list", "ports  1-79,81-442,444-65535\n", "ports  1-79,81-442,\n       444-65535\n"},
		{"a long word", "0123456789012345678901234567890\n", "0123456789012345678901234567890\n"},
		{"to paste", "= hint: sudo deadlight explain 443/tcp\n", "= hint: sudo deadlight explain 443/tcp\n"},
		{"no end", "one two three four five", "one two three four\n  five"},
		{"not ASCII", "éééé éééé éééé éééé éé\n", "éééé éééé éééé éééé\n  éé\n"},
	} {
		if got := fold(tt.text, 20); got != tt.want {
			t.Errorf("%s:\n%swant\n%s", tt.name, got, tt.want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.StringMatching(`( {0,4}([a-z0-9]{1,12}( {1,4}|,)){0,12}[a-zé]{1,9}\n){1,3}`).Draw(t, "text")
		width := rapid.IntRange(16, 60).Draw(t, "width")
		got := fold(text, width)
		if plainWords(got) != plainWords(text) {
			t.Fatalf("words are lost:\n%s", got)
		}
		for line := range strings.Lines(got) {
			line = strings.TrimSuffix(line, "\n")
			if utf8.RuneCountInString(line) > width && strings.ContainsAny(strings.TrimLeft(line, " "), " ,") && width >= 40 {
				t.Fatalf("wider than %d: %q", width, line)
			}
		}
	})
}

// plainWords is a text without blanks, and without the time of day.
func plainWords(s string) string {
	return regexp.MustCompile(`\d\d:\d\d:\d\d`).ReplaceAllString(strings.Join(strings.Fields(s), ""), "TIME")
}

// Columns are read with commas, and nothing else changes.
func TestSpoken(t *testing.T) {
	const text = "policy    /etc/p.toml, applied\n          since then\n  ok   80/tcp    open      \"web\"\nPASS: it is\n"
	const want = "policy, /etc/p.toml, applied\n          since then\n  ok, 80/tcp, open, \"web\"\nPASS: it is\n"
	if got := spoken(text); got != want {
		t.Errorf("%s", got)
	}
}

const wordyPolicy = `version = 1
[open.administration-from-everywhere]
ports = 22
from = ["10.0.0.0/8", "192.0.2.0/24", "198.51.100.7", "2001:db8:1::/48", "2001:db8:5::/48", "203.0.113.0/27"]
except = ["10.6.6.0/24"]
interfaces = ["enp3s0f0np0", "wg*"]
rate = { limit = "10/minute" }
[open.web]
ports = [80, 443, 8080, 8443, "9000-9100", "10000-10100", "11000-11100"]
comment = "what a long rule looks like"
[[expect]]
from = "192.0.2.1"
port = "80/tcp"
state = "open"
`

// inWidth runs lines of a shell in a network namespace of their own, on a terminal of
// so many columns; 0: piped.
func inWidth(t *testing.T, columns uint16, dir, lines string, env ...string) (code int, shown string) {
	t.Helper()
	cmd := exec.Command("unshare", "-n", "sh", "-c", lines)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "TERM=xterm", "DEADLIGHT_PLAIN="), env...)
	if columns > 0 {
		return onTerminal(t, columns, cmd).end(t)
	}
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func wordyDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"policy.toml": wordyPolicy, "bad.toml": "version = 1\n[open.web]\nport = 80\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Every report fits the terminal, in whole words, and says there what it says when it
// is piped.
func TestReportsFitTheTerminal(t *testing.T) {
	const apply = "deadlight apply --state-dir state policy.toml >/dev/null; "
	dir := wordyDir(t)
	for name, lines := range map[string]string{
		"check":   "deadlight check policy.toml",
		"explain": "deadlight explain 22 --policy policy.toml --from 192.0.2.77 --in eth0",
		"plan":    "deadlight plan --state-dir state policy.toml",
		"status":  apply + "nft add table ip nat; nft add chain ip nat pre '{ type nat hook prerouting priority -150; }'; nft add rule ip nat pre tcp dport 4000 redirect to :80; deadlight status --state-dir state",
		"drift":   apply + "nft insert rule inet deadlight gate tcp dport 4242 counter accept; deadlight drift --state-dir state",
		"audit":   apply + "deadlight audit policy.toml",
	} {
		t.Run(name, func(t *testing.T) {
			reset := "rm -rf state; "
			wantCode, want := inWidth(t, 0, dir, reset+lines)
			for _, columns := range []uint16{80, 200} {
				code, got := inWidth(t, columns, dir, reset+lines)
				if code != wantCode {
					t.Errorf("%d columns: exit %d, piped %d", columns, code, wantCode)
				}
				for line := range strings.Lines(got) {
					if n := utf8.RuneCountInString(strings.TrimRight(line, "\r\n")); n > int(columns) && !strings.Contains(line, "hint: ") {
						t.Errorf("%d columns: a line of %d: %q", columns, n, line)
					}
				}
				// An audit leaves out the columns that matter least.
				if name != "audit" && plainWords(got) != plainWords(want) {
					t.Errorf("%d columns:\n%s\npiped:\n%s", columns, got, want)
				}
				if strings.Contains(got, "\x1b") {
					t.Errorf("an escape: %q", got)
				}
			}
			if strings.TrimSpace(want) == "" {
				t.Error("nothing is said")
			}
		})
	}
}

// What programs read or people paste is the same everywhere.
func TestAnswersAreNotFolded(t *testing.T) {
	dir := wordyDir(t)
	for _, lines := range []string{"deadlight show policy.toml", "deadlight check --json policy.toml", "deadlight explain 22 --json --policy policy.toml", "deadlight init webserver"} {
		_, want := inWidth(t, 0, dir, lines)
		_, got := inWidth(t, 40, dir, lines)
		if got != want || got == "" {
			t.Errorf("%s on a terminal:\n%s\npiped:\n%s", lines, got, want)
		}
	}
}

// Plain: no carets, no columns, and no line that is drawn again; the exit codes stay.
func TestPlain(t *testing.T) {
	dir := wordyDir(t)
	const trial = "deadlight apply --state-dir state --confirm 2s policy.toml"
	for _, env := range []string{"DEADLIGHT_PLAIN=1", "TERM=dumb"} {
		code, shown := inWidth(t, 80, dir, "rm -rf state; "+trial, env)
		if code != exitRolledBack || strings.ContainsAny(shown, "\x1b\r") || !strings.Contains(shown, "was rolled back") {
			t.Errorf("%s: exit %d: %q", env, code, shown)
		}
		code, shown = inWidth(t, 80, dir, "deadlight check bad.toml", env)
		if code != exitUsage || strings.Contains(shown, "^") || !strings.Contains(shown, "bad.toml:3:1: error: ") || !strings.Contains(shown, "= hint: ") {
			t.Errorf("%s: exit %d: %q", env, code, shown)
		}
		_, shown = inWidth(t, 80, dir, "deadlight check policy.toml", env)
		if !strings.Contains(shown, `  open, 22/tcp, "administration-from-everywhere", from 10.0.0.0/8, `) {
			t.Errorf("%s: %s", env, shown)
		}
	}
	// Else the line is drawn, and a pipe is a pipe whatever the terminal.
	if _, shown := inWidth(t, 80, dir, "rm -rf state; "+trial); !strings.Contains(shown, "\x1b[K1 s left to confirm") {
		t.Errorf("no countdown: %q", shown)
	}
	_, want := inWidth(t, 0, dir, "deadlight check policy.toml")
	if _, got := inWidth(t, 0, dir, "deadlight check policy.toml", "TERM=dumb"); got != want {
		t.Errorf("TERM=dumb piped: %s", got)
	}
	if _, got := inWidth(t, 0, dir, "deadlight check policy.toml", "DEADLIGHT_PLAIN=1"); got == want {
		t.Error("DEADLIGHT_PLAIN means nothing to a pipe")
	}
	// What programs read stays as it is.
	for _, lines := range []string{"deadlight show policy.toml", "deadlight check --json policy.toml"} {
		_, want := inWidth(t, 0, dir, lines)
		if _, got := inWidth(t, 0, dir, lines, "DEADLIGHT_PLAIN=1"); got != want {
			t.Errorf("%s: %s", lines, got)
		}
	}
}

// NO_COLOR has nothing to take away: there is no colour, on a terminal either.
func TestNoColour(t *testing.T) {
	dir := wordyDir(t)
	for _, lines := range []string{"deadlight check policy.toml", "deadlight check bad.toml", "deadlight --help", "deadlight nonsense", "deadlight plan policy.toml"} {
		_, with := inWidth(t, 80, dir, lines)
		_, without := inWidth(t, 80, dir, lines, "NO_COLOR=1")
		if with != without || strings.Contains(with, "\x1b") || with == "" {
			t.Errorf("%s:\n%q\n%q", lines, with, without)
		}
	}
}

// The help of every command has its groups and an example that is possible.
func TestHelpExamples(t *testing.T) {
	_, commands := commandsForPeople()
	for name, c := range commands {
		if slices.Contains([]string{"help", "completion"}, name) {
			continue // cobra's own
		}
		if c.Example == "" {
			t.Errorf("%s --help has no example", name)
		}
		seen := false
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSpace(line)
			if err := possible(line); err != nil {
				t.Errorf("%s --help: %s: %v", name, line, err)
			}
			seen = seen || strings.Contains(line, "deadlight "+name)
		}
		if !seen {
			t.Errorf("no example of %s --help uses it", name)
		}
	}
}

// The help fits the terminal, in whole words, the tables of the language as they are.
func TestHelpFitsTheTerminal(t *testing.T) {
	dir := t.TempDir()
	_, commands := commandsForPeople()
	names := append(slices.Sorted(maps.Keys(commands)), "", "help policy", "completion bash")
	for _, name := range names {
		_, want := inWidth(t, 0, dir, "deadlight "+name+" --help")
		_, got := inWidth(t, 80, dir, "deadlight "+name+" --help")
		if plainWords(got) != plainWords(want) {
			t.Errorf("%s: %s", name, got)
		}
		for line := range strings.Lines(got) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\r\n")); n > 80 && !strings.Contains(line, "  deadlight ") && !strings.Contains(line, "  sudo deadlight ") {
				t.Errorf("%s: a line of %d columns: %s", name, n, line)
			}
		}
	}
}
