package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"deadlight/rules"
)

// The policy that the README shows is valid, and what it expects holds.
func TestReadmePolicy(t *testing.T) {
	_, text, _ := strings.Cut(readme(t), "\n```toml\n")
	text, _, found := strings.Cut(text, "\n```\n")
	file := filepath.Join(t.TempDir(), "policy.toml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil || !found {
		t.Fatalf("README.md shows no policy: %v", err)
	}
	out, err := exec.Command("deadlight", "check", file).CombinedOutput()
	if err != nil || !strings.Contains(string(out), ": valid, 4 openings\n") || !strings.Contains(string(out), "1 expectation") {
		t.Errorf("deadlight check: %v\n%s", err, out)
	}
}

// The README names the commands without --json, and those with --format and --since.
func TestReadmeJSON(t *testing.T) {
	text := strings.Join(strings.Fields(readme(t)), " ")
	m := regexp.MustCompile("All but ([^.]+) print one JSON object with `--json`; ([^.]+) also write JUnit, .* \\(`--since`\\)").FindStringSubmatch(text)
	if m == nil {
		t.Fatal("README.md does not say which commands print JSON")
	}
	named := func(s string) []string {
		var names []string
		for _, q := range regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(s, -1) {
			names = append(names, q[1])
		}
		return slices.Sorted(slices.Values(names))
	}
	_, commands := commandsForPeople()
	delete(commands, "help")
	delete(commands, "completion")
	var without, formats []string
	for _, name := range slices.Sorted(maps.Keys(commands)) {
		f := commands[name].Flags()
		if f.Lookup("json") == nil {
			without = append(without, name)
		}
		if f.Lookup("format") != nil && f.Lookup("since") != nil {
			formats = append(formats, name)
		}
	}
	if got := named(m[1]); !slices.Equal(got, without) {
		t.Errorf("README.md: all but %q print JSON; without --json are %q", got, without)
	}
	if got := named(m[2]); !slices.Equal(got, formats) {
		t.Errorf("README.md: %q have --format and --since; it is %q", got, formats)
	}
}

// The numbers of the README are those of the program.
func TestReadmeNumbers(t *testing.T) {
	text := strings.Join(strings.Fields(readme(t)), " ")
	for _, want := range []string{
		fmt.Sprintf("Sets of more than %d,%03d ranges are not read back whole", rules.LargeSet/1000, rules.LargeSet%1000),
		fmt.Sprintf("and temporary openings, are a rule each: %d at most, together. Single addresses are elements of one set, %d,%03d at most",
			mostTemporary, mostBans/1000, mostBans%1000),
		fmt.Sprintf("loads %d broken rulesets and dead paths, and a sound one", len(breakages())-1),
	} {
		if !strings.Contains(text, want) {
			t.Errorf("README.md does not say: %s", want)
		}
	}
}

// The column of the README that says which commands take root is right: those are
// refused to a user without rights, and the others are not.
func TestReadmeRoot(t *testing.T) {
	program, err := exec.LookPath("deadlight")
	if err != nil {
		t.Fatal(err)
	}
	policy, err := filepath.Abs("../../configs/minimal.toml")
	if err != nil {
		t.Fatal(err)
	}
	arguments := map[string]string{
		"init": "minimal", "import": "-", "check": policy, "explain": "22 --policy " + policy, "show": policy,
		"plan": policy, "apply": policy, "audit": policy, "verify": policy, "open": "8443/tcp --for 2h", "close": "22", "block": "203.0.113.9", "unblock": "203.0.113.9",
	}
	elsewhere := []string{"edit", "try"} // which has a terminal, and TestTryExamples
	rows := regexp.MustCompile("(?m)^\\| `deadlight ([a-z]+)[^`]*` \\|.*\\| ([^|]*)\\|$").FindAllStringSubmatch(readme(t), -1)
	if len(rows) < 20 {
		t.Fatalf("README.md has a table of %d commands", len(rows))
	}
	for _, row := range rows {
		name, root := row[1], strings.TrimSpace(row[2])
		if slices.Contains(elsewhere, name) {
			continue
		}
		args := append([]string{"--bounding-set=-all", "--inh-caps=-all", program, name}, strings.Fields(arguments[name])...)
		cmd := exec.Command("setpriv", args...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		refused := cmd.ProcessState.ExitCode() == exitRefused
		if refused != (root == "yes") {
			t.Errorf("deadlight %s %s: root %q, says README.md; without, exit code %d:\n%s", name, arguments[name], root, cmd.ProcessState.ExitCode(), out)
		}
	}
}
