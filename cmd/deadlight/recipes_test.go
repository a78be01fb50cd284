package main

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v2"
)

// What configs/ has for other people's machinery is run here, as that would.

func readYAML(t *testing.T, name string, into any) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../configs", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(b, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
}

// runScript gives what a script prints, and its exit code.
func runScript(t *testing.T, dir string, environment []string, name string, args ...string) (string, int) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), environment...)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// standIns makes shell scripts that stand before the programs of the same name.
func standIns(t *testing.T, scripts map[string]string) (path string) {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return "PATH=" + dir + ":" + os.Getenv("PATH")
}

// The examples for continuous integration build the commit that they are told, and
// let pass a repository of good policies only.
func TestContinuousIntegration(t *testing.T) {
	t.Parallel() // each try is in namespaces of its own
	source := copyTree(t)
	head := strings.TrimSpace(output(t, "sh", "-ec", `cd "$1"
git init -q
git add -A
git -c user.name=a -c user.email=a@deadlight.invalid commit -q -m a
git branch moving
git rev-parse HEAD`, "sh", source))

	var github struct {
		Permissions map[string]string
		Jobs        map[string]struct {
			Steps []struct {
				Uses, Run string
				With      map[string]string
				Env       map[string]string
			}
		}
	}
	readYAML(t, "ci/github-actions.yml", &github)
	if want := map[string]string{"contents": "read"}; !maps.Equal(github.Permissions, want) {
		t.Errorf("the permissions are %v, want %v", github.Permissions, want)
	}
	steps := github.Jobs["policies"].Steps
	if len(steps) != 4 || !strings.HasPrefix(steps[0].Uses, "actions/checkout@") || steps[0].With["persist-credentials"] != "false" ||
		!strings.HasPrefix(steps[1].Uses, "actions/setup-go@") || len(steps[2].Env) != 2 {
		t.Fatalf("the steps are %+v", steps)
	}
	for name, value := range steps[2].Env {
		if value != "${{ vars."+name+" }}" {
			t.Errorf("%s is %s, not what the admin sets", name, value)
		}
	}
	var gitlab struct {
		Policies struct {
			Before []string `yaml:"before_script"`
			Script []string
		}
	}
	readYAML(t, "ci/gitlab-ci.yml", &gitlab)

	const good = "version = 1\n[open.web]\nports = 80\n[verify]\nthorough = 0\n"
	repositories := map[string]struct {
		files map[string]string
		ok    bool
		want  []string // in the output
	}{
		"good": {map[string]string{"the web.toml": good}, true, []string{"== policies/the web.toml\n", "\nPASS: "}},
		"bad": {map[string]string{"a.toml": "version = 1\n[open.web]\nports = 80000\n", "b.toml": good}, false,
			[]string{"policies/a.toml:3:", "== policies/b.toml\n", "\nPASS: "}},
		"empty": {map[string]string{"README.md": ""}, false, []string{"no such file"}},
	}
	for system, s := range map[string]struct {
		shell         []string
		build, policy string
	}{
		"github": {[]string{"bash", "-ec"}, steps[2].Run, steps[3].Run},
		"gitlab": {[]string{"sh", "-ec"}, strings.Join(gitlab.Policies.Before, "\n"), strings.Join(gitlab.Policies.Script, "\n")},
	} {
		t.Run(system, func(t *testing.T) {
			environment := func(source, commit string) []string {
				return []string{"RUNNER_TEMP=" + t.TempDir(), "TMPDIR=" + t.TempDir(), "DEADLIGHT_SOURCE=" + source, "DEADLIGHT_COMMIT=" + commit,
					standIns(t, map[string]string{"sudo": `exec "$@"`})} // where all are root it has nothing to do
			}
			for what, e := range map[string]struct {
				environment []string
				want        string
			}{
				"no source":   {environment("", head), "DEADLIGHT_SOURCE"},
				"no commit":   {environment(source, ""), "DEADLIGHT_COMMIT"},
				"a branch":    {environment(source, "moving"), ""},
				"not a place": {environment(filepath.Join(source, "none"), head), "none"},
			} {
				out, code := runScript(t, t.TempDir(), e.environment, s.shell[0], append(s.shell[1:], s.build+"\necho BUILT")...)
				if code == 0 || strings.Contains(out, "BUILT") || !strings.Contains(out, e.want) {
					t.Errorf("%s: exit %d:\n%s", what, code, out)
				}
			}

			// Built once: a run of the policies goes on where the build has ended.
			var script strings.Builder
			script.WriteString(s.build + "\n")
			dirs := map[string]string{}
			for _, name := range slices.Sorted(maps.Keys(repositories)) {
				dirs[name] = t.TempDir()
				policies := filepath.Join(dirs[name], "policies")
				if err := os.Mkdir(policies, 0o755); err != nil {
					t.Fatal(err)
				}
				for file, text := range repositories[name].files {
					if err := os.WriteFile(filepath.Join(policies, file), []byte(text), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				script.WriteString("code=0\n(cd '" + dirs[name] + "'\n" + s.policy + ") >'" + dirs[name] + "/out' 2>&1 || code=$?\necho $code >'" + dirs[name] + "/code'\n")
			}
			if out, code := runScript(t, t.TempDir(), environment(source, head), s.shell[0], append(s.shell[1:], script.String())...); code != 0 {
				t.Fatalf("exit %d:\n%s", code, out)
			}
			for name, r := range repositories {
				code, err := os.ReadFile(filepath.Join(dirs[name], "code"))
				if err != nil {
					t.Fatal(err)
				}
				out, err := os.ReadFile(filepath.Join(dirs[name], "out"))
				if err != nil {
					t.Fatal(err)
				}
				if ok := string(code) == "0\n"; ok != r.ok {
					t.Errorf("%s: exit %s%s", name, code, out)
				}
				for _, want := range r.want {
					if !strings.Contains(string(out), want) {
						t.Errorf("%s: no %q in:\n%s", name, want, out)
					}
				}
			}
		})
	}
}

// The user-data leaves the policy as it is written there, and enables the service for
// a good one only.
func TestCloudInit(t *testing.T) {
	var data struct {
		Packages []string
		Files    []struct{ Path, Owner, Permissions, Content string } `yaml:"write_files"`
		Run      []string                                             `yaml:"runcmd"`
	}
	readYAML(t, "cloud-init/deadlight.yaml", &data)
	if b, err := os.ReadFile("../../configs/cloud-init/deadlight.yaml"); err != nil || !strings.HasPrefix(string(b), "#cloud-config\n") {
		t.Errorf("cloud-init does not know it by its first line: %v", err)
	}
	if len(data.Files) != 1 || data.Files[0].Path != defaultPolicy || data.Files[0].Owner != "root:root" || data.Files[0].Permissions != "0644" {
		t.Fatalf("it writes %+v", data.Files)
	}
	if len(data.Run) != 1 {
		t.Fatalf("runcmd is %q", data.Run)
	}
	policy, script := data.Files[0].Content, data.Run[0]

	file := filepath.Join(t.TempDir(), "policy.toml")
	if err := os.WriteFile(file, []byte(policy), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, code := runScript(t, "", nil, "deadlight", "check", "--warnings=error", file); code != exitOK {
		t.Errorf("check of its policy: exit %d:\n%s", code, out)
	}
	// What an admin forgets to replace admits no stranger.
	if out, code := runScript(t, "", nil, "deadlight", "explain", "22/tcp", "--from", "9.9.9.9", "--policy", file); code != exitOK || !strings.HasPrefix(out, "filtered") {
		t.Errorf("22/tcp from a stranger: exit %d:\n%s", code, out)
	}
	ours := 0
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "deadlight ") {
			ours++
			if err := possible(line); err != nil {
				t.Errorf("%s: %v", line, err)
			}
		}
		if unit, ok := strings.CutPrefix(line, "systemctl enable --now "); ok {
			if _, err := os.Stat(filepath.Join("../../systemd", unit)); err != nil {
				t.Error(err)
			}
		}
	}
	if ours == 0 {
		t.Error("it runs no command of ours")
	}

	set := func(name, value string) func(string) string {
		return func(s string) string {
			re := regexp.MustCompile(`(?m)^` + name + `= .*$`)
			if n := len(re.FindAllString(s, -1)); n != 1 {
				t.Fatalf("%d lines set %s", n, name)
			}
			return re.ReplaceAllLiteralString(s, name+"="+value)
		}
	}

	fixture := filepath.Join(t.TempDir(), "deb")
	if err := os.WriteFile(fixture, []byte("a package\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	right, _, _ := strings.Cut(output(t, "sha256sum", fixture), " ")
	both := func(sum string) func(string) string {
		return func(s string) string { return set("sum", sum)(set("package", "https://deadlight.invalid/a.deb")(s)) }
	}
	const (
		download = "curl --proto =https -fsSL -o /run/deadlight.deb https://deadlight.invalid/a.deb\n"
		// confold: a policy that is there already would make dpkg ask, and end.
		install = "apt-get install -y -o Dpkg::Options::=--force-confold /run/deadlight.deb\n"
		enable  = "systemctl enable --now deadlight.service\n"
	)
	for name, tt := range map[string]struct {
		policy string
		fill   func(string) string
		ok     bool
		done   string // by the stand-ins
		want   string // in the output
	}{
		"filled in":      {policy, both(right), true, download + install + enable, "valid, 2 openings"},
		"as it is":       {policy, func(s string) string { return s }, false, "", "set package"},
		"no sum":         {policy, set("package", "https://deadlight.invalid/a.deb"), false, "", "set sum"},
		"another sum":    {policy, both(strings.Repeat("0", 64)), false, download, "FAILED"},
		"a bad policy":   {strings.Replace(policy, "443", "80000", 1), both(right), false, download + install, "policy.toml:8:"},
		"a broken table": {policy + "[open", both(right), false, download + install, "policy.toml:"},
	} {
		t.Run(name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log")
			note := `echo "${0##*/} $*" >>` + log
			path := standIns(t, map[string]string{"curl": note + "\ncp " + fixture + " /run/deadlight.deb", "apt-get": note, "systemctl": note})
			if err := os.WriteFile(log, nil, 0o644); err != nil {
				t.Fatal(err)
			}
			// /etc and /run are ours for as long as it takes.
			const sandbox = `set -e
mount -t tmpfs tmpfs "$T"
mkdir "$T/upper" "$T/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$T/upper,workdir=$T/work" overlay /etc
mount -t tmpfs tmpfs /run
mkdir -p /etc/deadlight
printf %s "$POLICY" >/etc/deadlight/policy.toml
exec sh -c "$SCRIPT"
`
			out, code := runScript(t, "", []string{"T=" + t.TempDir(), path, "POLICY=" + tt.policy, "SCRIPT=" + tt.fill(script)},
				"unshare", "-n", "-m", "sh", "-c", sandbox)
			done, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if (code == 0) != tt.ok || string(done) != tt.done || !strings.Contains(out, tt.want) {
				t.Errorf("exit %d, done:\n%s\nprinted:\n%s", code, done, out)
			}
		})
	}
}
