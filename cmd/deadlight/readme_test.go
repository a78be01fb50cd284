package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

func readme(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReadme: the README tells of every command and every exit code.
func TestReadme(t *testing.T) {
	text := readme(t)
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	var tests []string
	for _, name := range append(scripts, "edit_test.go", "readme_test.go") {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tests = append(tests, string(b))
	}
	for _, c := range newRootCommand(env{}).Commands() {
		if !c.Runnable() || c.Hidden {
			continue // a topic of the help, or nothing for people
		}
		if row := "| `deadlight " + c.Use + "`"; !strings.Contains(text, row) {
			t.Errorf("README.md has no row that begins %q", row)
		}
		run := regexp.MustCompile(`(deadlight|built)("?, "| )` + c.Name() + `\b`)
		if !slices.ContainsFunc(tests, run.MatchString) {
			t.Errorf("no test runs deadlight %s", c.Name())
		}
	}
	for _, code := range []int{exitOK, exitFindings, exitUsage, exitRefused, exitRolledBack, exitBug, exitInterrupted} {
		if row := fmt.Sprintf("\n| %d | ", code); !strings.Contains(text, row) {
			t.Errorf("README.md does not explain exit code %d", code)
		}
	}
}

// covered says what becomes of a command of the README: it is run here as it stands,
// or with values for its placeholders, and ends with a code; or another test has it.
type covered struct {
	as   string // "" is the command itself
	code int
	in   string // a file of the tree that runs it, and
	has  string // what stands there
}

// readmeCommands are the commands of the README.
func readmeCommands(t *testing.T) map[string]covered {
	t.Helper()
	const own = "cmd/deadlight/"
	boot := func(has string) covered { return covered{in: own + "systemboot_test.go", has: has} }
	known := map[string]covered{
		"go run ./cmd/deadlight try configs/webserver.toml": {as: "deadlight try configs/webserver.toml", code: exitOK},
		"go run ./cmd/deadlight try configs/webserver.toml -- nft insert rule inet deadlight gate tcp dport 8080 accept": {
			as: "deadlight try configs/webserver.toml -- nft insert rule inet deadlight gate tcp dport 8080 accept", code: exitFindings},
		"deadlight try configs/webserver.toml":                                    {in: ".ci/picture", has: "deadlight try configs/webserver.toml"},
		"CGO_ENABLED=0 go build ./cmd/deadlight":                                  {as: "CGO_ENABLED=0 go build -o $T/built ./cmd/deadlight && $T/built version"},
		"go build ./cmd/deadlight && sudo ./deadlight try configs/webserver.toml": {in: own + "examples_test.go", has: `"try", name+".toml"`},
		".ci/test": {in: ".ci/run", has: "\n.ci/test\n"},
		".ci/test -run Soak -timeout 60m ./firewall":                                    {in: "firewall/window_test.go", has: "Soak"},
		".ci/test -run TestBoot ./cmd/deadlight":                                        boot("func TestBoot("),
		".ci/test -run TestMove ./cmd/deadlight":                                        {in: own + "move_test.go", has: "func TestMove("},
		".ci/test -run 'TestEngines|TestPublish|TestBeside' ./cmd/deadlight ./firewall": {in: own + "engines_test.go", has: "func TestEngines("},
		"sudo deadlight init --from-observed":                                           {in: own + "testdata/script/observe.txtar", has: "\ndeadlight init --from-observed\n"},
		"deadlight open 8443/tcp --for 2h --from 198.51.100.7":                          {as: "deadlight apply >/dev/null; deadlight open 8443/tcp --for 2h --from 198.51.100.7"},
		"deadlight block 203.0.113.9 --for 1d":                                          {as: "deadlight apply >/dev/null; deadlight block 203.0.113.9 --for 1d"},
		"deadlight verify --targets hosts.txt --resume hosts.journal":                   {in: own + "targets_fleet_test.go", has: "--resume"},
		".ci/run":                              {in: ".ci/run", has: "step tests"},
		".ci/picture":                          {in: own + "readme_test.go", has: `.ci/picture"`},
		"sudo .ci/compare":                     {in: own + "readme_test.go", has: `.ci/compare"`},
		".ci/package DIR":                      {in: own + "package_test.go", has: `".ci", "package"`},
		"man -l cmd/deadlight/man/deadlight.8": {as: "mandoc -T utf8 cmd/deadlight/man/deadlight.8"},
		"deadlight help policy":                {},
		"deadlight completion SHELL":           {as: "deadlight completion bash"},
		"sudo deadlight apply":                 {},
		"sudo deadlight apply --confirm 5s":    {as: "sed -i s/22/2222/ /etc/deadlight/policy.toml; deadlight apply --confirm 5s"},
		"sudo deadlight confirm":               {as: "deadlight apply >/dev/null; sed -i s/22/2222/ /etc/deadlight/policy.toml; deadlight apply --confirm 60s >/dev/null && deadlight confirm"},
		"echo $?":                              {},
		"sudo sed -i s/198.51.100.0/198.51.10.0/ /etc/deadlight/policy.toml": {},
		"deadlight apply --confirm":      {as: "deadlight apply --confirm 60s"},
		"deadlight apply --verify":       {in: own + "testdata/script/apply-verify.txtar", has: "--verify b.toml"},
		"deadlight plan":                 {code: exitFindings},
		"sudo deadlight init":            {},
		"deadlight drift --full":         {as: "deadlight apply >/dev/null; deadlight drift --full"},
		"deadlight watch --heal":         {in: own + "testdata/script/watch.txtar", has: "watch --heal"},
		"sudo deadlight verify":          {in: own + "testdata/script/verify-host.txtar", has: "deadlight verify"},
		"deadlight verify --target":      {in: own + "outside_test.go", has: `"verify", l.policy, "--target"`},
		"deadlight verify --target ADDR": {in: own + "outside_test.go", has: `"verify", l.policy, "--target"`},
		"deadlight verify --self-test":   {in: own + "testdata/script/verify.txtar", has: "exits 0 deadlight verify --self-test"},
		"systemctl status deadlight":     boot("systemctl status"),
		"systemctl reload deadlight":     boot("systemctl reload deadlight.service"),
		"systemctl restart deadlight":    boot("systemctl stop deadlight.service && probe && systemctl start deadlight.service"),
		"nft list":                       {as: "nft list ruleset"},
		"nft list ruleset":               {},
		"nft flush ruleset":              {},
		"nft monitor":                    {as: "timeout 0.2 nft monitor; test $? = 124"},
		"nft -f":                         {as: "deadlight show > $T/a.nft && nft -f $T/a.nft"},
		"conntrack -F":                   {in: "firewall/flows_test.go", has: "conntrack forgets the flow"},
		"sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0": {in: "verify/isolate.go", has: "kernel.apparmor_restrict_unprivileged_userns=0"},
		"sudo sysctl -w kernel.unprivileged_userns_clone=1":             {in: "verify/isolate.go", has: "kernel.unprivileged_userns_clone=1"},
		"sudo sysctl -w user.max_user_namespaces=15000":                 {in: "verify/isolate.go", has: "user.max_user_namespaces"},
	}
	before, after := installCommands(t)
	for _, line := range slices.Concat(before, []string{"sudo reboot"}, after) { // TestPackage runs them
		if _, ok := known[line]; !ok {
			known[line] = covered{in: own + "package_test.go", has: "installCommands(t)"}
		}
	}
	for _, name := range []string{"ufw", "firewalld", "nftables"} {
		for _, line := range moveCommands(t, name) { // TestMove runs them
			if _, ok := known[line]; !ok {
				known[line] = covered{in: own + "testdata/move/" + name + ".sh", has: line}
			}
		}
	}
	return known
}

// commandsOf finds the command lines of a text: the lines of sh blocks, those behind a
// prompt, and what looks like a command between backquotes.
func commandsOf(text string) []string {
	var out []string
	add := func(line string) {
		line, _, _ = strings.Cut(line, " #")
		if line = strings.Join(strings.Fields(line), " "); line != "" && !slices.Contains(out, line) {
			out = append(out, line)
		}
	}
	var prose strings.Builder
	for i, part := range strings.Split(text, "\n```") {
		if i%2 == 0 {
			prose.WriteString(part + "\n")
			continue
		}
		lang, body, _ := strings.Cut(part, "\n")
		for line := range strings.Lines(body) {
			if prompted, ok := strings.CutPrefix(line, "$ "); ok {
				add(prompted)
			} else if lang == "sh" {
				add(line)
			}
		}
	}
	_, ours := commandsForPeople()
	usage := map[string]bool{}
	for _, c := range ours {
		usage["deadlight "+c.Use] = true // a row of the table of commands
	}
	programs := []string{"sudo", "deadlight", "go", "systemctl", "nft", "conntrack", "man"}
	for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(prose.String(), -1) {
		span := strings.Join(strings.Fields(m[1]), " ")
		first, rest, more := strings.Cut(span, " ")
		_, word := ours[first]
		switch {
		case usage[span], span == "go run":
		case strings.HasPrefix(first, ".ci/"), slices.Contains(programs, first) && more && !strings.HasPrefix(span, "man ") || strings.HasPrefix(span, "man -l"):
			add(span)
		case word && more && (strings.HasPrefix(rest, "-") || strings.HasPrefix(rest, "[")):
			add("deadlight " + span)
		}
	}
	return out
}

// Every command of the README is run by a test, here or where the table says; and the
// README has no command that the table does not know.
func TestReadmeCommands(t *testing.T) {
	found, known := commandsOf(readme(t)), readmeCommands(t)
	for _, line := range found {
		if _, ok := known[line]; !ok {
			t.Errorf("README.md has a command that no test runs: %s", line)
		}
	}
	bin := t.TempDir()
	// Where all are root sudo has nothing to do.
	if err := os.WriteFile(filepath.Join(bin, "sudo"), []byte("#!/bin/sh\nexec \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for line, c := range known {
		if !slices.Contains(found, line) {
			t.Errorf("README.md does not have the command %q any more", line)
			continue
		}
		if strings.Contains(line, "deadlight ") && !strings.HasPrefix(line, ".ci/") && !strings.Contains(line, "go build") &&
			!strings.HasPrefix(line, "systemctl") && !strings.Contains(line, " sed ") && !strings.Contains(c.in, "/move/") && !strings.Contains(c.in, "package_test.go") && !strings.HasSuffix(line, " --confirm") && !strings.HasSuffix(line, " --target") {
			if err := possible(strings.ReplaceAll(strings.ReplaceAll(line, "./cmd/deadlight", "deadlight"), "SHELL", "bash")); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
		if c.in != "" {
			b, err := os.ReadFile(filepath.Join("../..", c.in))
			if err != nil || !strings.Contains(string(b), c.has) {
				t.Errorf("%s: %s has no %q: %v", line, c.in, c.has, err)
			}
			continue
		}
		t.Run(line, func(t *testing.T) {
			if c.as == "" {
				c.as = line
			}
			// /etc is ours for as long as it takes.
			const sandbox = `set -e
mount -t tmpfs tmpfs "$T"
mkdir "$T/upper" "$T/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$T/upper,workdir=$T/work" overlay /etc
mount -t tmpfs tmpfs /run
rm -rf /etc/deadlight
mkdir /etc/deadlight
cp configs/etc/policy.toml /etc/deadlight/
ip link set lo up
set +e
`
			cmd := exec.Command("unshare", "-n", "-m", "sh", "-c", sandbox+c.as+"\ncode=$?\ndeadlight rollback >/dev/null 2>&1\nexit $code") // what clears up behind a trial ends
			cmd.Dir = "../.."
			cmd.Env = append(os.Environ(), "T="+t.TempDir(), "PATH="+bin+":"+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if code := cmd.ProcessState.ExitCode(); code != c.code {
				t.Errorf("%s: exit %d, want %d:\n%s", c.as, code, c.code, out)
			}
		})
	}
}

// pictureLines gives the lines of text of a picture, each of which keeps its blanks.
func pictureLines(t *testing.T, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var out []string
	in := false
	for d := xml.NewDecoder(f); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		switch x := token.(type) {
		case xml.StartElement:
			if in = x.Name.Local == "text"; in {
				out = append(out, "")
				if !slices.ContainsFunc(x.Attr, func(a xml.Attr) bool { return a.Name.Local == "space" && a.Value == "preserve" }) {
					t.Errorf("%s: line %d loses its blanks", file, len(out))
				}
			}
		case xml.EndElement:
			in = false
		case xml.CharData:
			if in {
				out[len(out)-1] += string(x)
			}
		}
	}
}

// shape is a text without what differs from run to run: seconds, how many odd packets
// were sent, how sure the rounds alone made it, and where lines were folded.
func shape(lines []string) string {
	s := strings.Join(strings.Fields(strings.Join(lines, " ")), " ")
	s = regexp.MustCompile(`says, [0-9hms.]+; `).ReplaceAllString(s, "says, TIME; ")
	s = regexp.MustCompile(`[0-9,]+ packets`).ReplaceAllString(s, "N packets")
	return regexp.MustCompile(`chance that a TCP answer was missed ≤ \S+; `).ReplaceAllString(s, "")
}

// The picture of the README is what a terminal shows today, and its text the same.
func TestPicture(t *testing.T) {
	const there = "man/try.svg"
	now := filepath.Join(t.TempDir(), "try.svg")
	out, err := exec.Command("../../.ci/picture", now).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	old, today := pictureLines(t, there), pictureLines(t, now)
	if shape(old) != shape(today) {
		t.Errorf("%s is not what try shows today (.ci/picture draws it anew):\n%s\ntoday:\n%s", there, strings.Join(old, "\n"), strings.Join(today, "\n"))
	}
	if strings.TrimSpace(string(out)) != strings.TrimSpace(strings.Join(today, "\n")) {
		t.Errorf("the text is not that of the picture:\n%s", out)
	}
	if len(today) < 10 || !strings.HasPrefix(shape(today), "$ deadlight try configs/webserver.toml configs/webserver.toml: 3 openings, ") {
		t.Errorf("the picture shows %q", today)
	}
	text := readme(t)
	if !strings.Contains(text, "](cmd/deadlight/"+there+")") {
		t.Error("README.md does not show the picture")
	}
	if block := "\n```\n" + strings.Join(old, "\n") + "\n```\n"; !strings.Contains(text, block) {
		t.Errorf("README.md does not have the text of the picture:%s", block)
	}
}

// What the README says of Deadlight and of a file for nft is so today; of the others
// .ci/compare asks where they are installed.
func TestCompare(t *testing.T) {
	cmd := exec.Command("../../.ci/compare", "deadlight", "nft")
	program, err := exec.LookPath("deadlight")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(os.Environ(), "DEADLIGHT="+program)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		`deadlight +reload +the closed port answered 0 times, the open one failed 0 times, in [1-9][0-9]{2,} rounds`,
		`deadlight +flow +ends`,
		`deadlight +container +8088/tcp is filtered`,
		`deadlight +bad line +9999/tcp is filtered, 80/tcp is filtered, exit code 1`,
		`nft +reload +the closed port answered`,
		`nft +flow +goes on`,
		`nft +container +8088/tcp is open`,
		`nft +bad line +9999/tcp is open, 80/tcp is open, exit code 1`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).Match(out) {
			t.Errorf("no line %q:\n%s", want, out)
		}
	}
}
