package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// editLab is a policy and an editor that does what the test wrote down.
type editLab struct {
	dir, policy, tmp, state string
	editor                  string
}

const editBefore = "version = 1\ninclude = \"conf.d/*.toml\"\n[open.ssh]\nports = 22\nfrom = \"10.0.0.0/8\"\n"

const editAfter = editBefore + "[open.web]\nports = 80\n"

// newEditLab makes an editor of shell lines: $1 is the copy, $N the number of its run.
func newEditLab(t *testing.T, lines string) *editLab {
	t.Helper()
	dir := t.TempDir()
	l := &editLab{dir: filepath.Join(dir, "etc"), tmp: filepath.Join(dir, "tmp"), state: filepath.Join(dir, "state"), editor: filepath.Join(dir, "editor")}
	l.policy = filepath.Join(l.dir, "policy.toml")
	for _, d := range []string{filepath.Join(l.dir, "conf.d"), l.tmp} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		l.policy: editBefore,
		filepath.Join(l.dir, "conf.d", "more.toml"): "[open.dns]\nports = 53\n",
		filepath.Join(dir, "after"):                 editAfter,
		filepath.Join(dir, "broken"):                editAfter + "[open.more]\nport = 80\n",
		filepath.Join(dir, "unmet"):                 editAfter + "[[expect]]\nfrom = \"192.0.2.1\"\nport = \"80/tcp\"\nstate = \"filtered\"\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	script := "#!/bin/sh\ncd " + dir + "\necho >>runs\nN=$(wc -l <runs)\n" + lines + "\n"
	if err := os.WriteFile(l.editor, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return l
}

// edit starts the command in a network namespace of its own.
func (l *editLab) edit(t *testing.T, args ...string) *terminal {
	t.Helper()
	cmd := exec.Command("unshare", append([]string{"-n", "deadlight", "edit", "--state-dir", l.state}, args...)...)
	cmd.Env = append(os.Environ(), "EDITOR="+l.editor+" -x", "VISUAL=", "SUDO_EDITOR=", "TMPDIR="+l.tmp, "TERM=xterm")
	// The arguments of the editor come before the file.
	return onTerminal(t, 100, cmd)
}

// holds tells whether the policy has a text, and that nothing else stands beside it.
func (l *editLab) holds(t *testing.T, want string) {
	t.Helper()
	got, err := os.ReadFile(l.policy)
	if err != nil || string(got) != want {
		t.Errorf("the policy has %q, want %q: %v", got, want, err)
	}
	entries, err := os.ReadDir(l.dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("beside the policy stands %v: %v", entries, err)
	}
}

// copies are the directories of texts that were not saved.
func (l *editLab) copies(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(l.tmp, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// Every way in which an edit can end: what is shown, the exit code, the policy, and
// whether the text that was not saved is still there.
func TestEdit(t *testing.T) {
	for name, tt := range map[string]struct {
		editor string
		steps  []string // awaited and typed in turn
		code   int
		shown  []string
		saved  bool
		kept   bool // the copy
	}{
		"saved, not applied": {
			editor: `cp after "$2"`, steps: []string{"(n)o ", "n\r"}, saved: true,
			shown: []string{"Saved ", "+ open web", "Saved, not applied: sudo deadlight apply --confirm 60s "},
		},
		"unchanged": {editor: "true", shown: []string{"No changes: "}},
		"not valid, then valid": {
			editor: `if [ $N = 1 ]; then cp broken "$2"; else grep -q open.more "$2" && cp after "$2"; fi`,
			steps:  []string{"(q)uit without saving? ", "x\r", "(q)uit without saving? ", "e\r", "(n)o ", "n\r"}, saved: true,
			shown: []string{`policy.toml:9:1: error: `, "did you mean", "deadlight: 1 error: not saved", "Saved "},
		},
		"not valid": {
			editor: `cp broken "$2"`, steps: []string{"(q)uit without saving? ", "q\r"}, code: exitUsage,
			shown: []string{"deadlight: not saved: "},
		},
		"an expectation does not hold": {
			editor: `cp unmet "$2"`, steps: []string{"(q)uit without saving? ", "q\r"}, code: exitUsage,
			shown: []string{"to be filtered, but it is open", "deadlight: 1 expectation of 1 not as the policy says: not saved"},
		},
		"an include is missing": {
			editor: `sed s,conf.d/\\*,gone, "$2" >new; cp new "$2"`, steps: []string{"(q)uit without saving? ", "q\r"}, code: exitUsage,
			shown: []string{"gone.toml", ": not saved"},
		},
		"the editor fails": {
			editor: `cp after "$2"; exit 3`, code: exitRefused, kept: true,
			shown: []string{"deadlight: error: the editor ", "ended with an error (exit status 3)", "is as it was", "deadlight: hint: your text is in "},
		},
		"the editor fails before a change": {editor: "exit 1", code: exitRefused, shown: []string{"is as it was"}},
		"the editor takes the copy away": {
			editor: `rm "$2"`, code: exitRefused, kept: true, shown: []string{"read what was edited: ", "what the editor left is in "},
		},
		"an interrupt in the editor is the editor's": {
			editor: `trap "" INT; kill -INT 0; trap - INT; cp after "$2"`, steps: []string{"(n)o ", "n\r"}, saved: true, shown: []string{"Saved "},
		},
		"an interrupt at the question": {
			editor: `cp broken "$2"`, steps: []string{"(q)uit without saving? ", "\x03"}, code: exitInterrupted, kept: true,
			shown: []string{"deadlight: not saved: ", "your text is in "},
		},
		"an end of the input at the question": {
			editor: `cp broken "$2"`, steps: []string{"(q)uit without saving? ", "\x04"}, code: exitUsage, kept: true,
			shown: []string{"your text is in "},
		},
		"an interrupt before it is applied": {
			editor: `cp after "$2"`, steps: []string{"(n)o ", "\x03"}, code: exitInterrupted, saved: true,
			shown: []string{"the policy is saved, not applied"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := newEditLab(t, tt.editor)
			x := l.edit(t, l.policy)
			for i := 0; i < len(tt.steps); i += 2 {
				x.await(t, tt.steps[i])
				x.types(t, tt.steps[i+1])
			}
			code, shown := x.end(t)
			if code != tt.code {
				t.Errorf("exit %d, want %d", code, tt.code)
			}
			whole := strings.Join(strings.Fields(shown), " ") // folded to the terminal
			for _, want := range tt.shown {
				if !strings.Contains(whole, strings.TrimSpace(want)) {
					t.Errorf("%q is not shown", want)
				}
			}
			want := editBefore
			if tt.saved {
				want = editAfter
			}
			l.holds(t, want)
			if n := len(l.copies(t)); (n == 1) != tt.kept || n > 1 {
				t.Errorf("copies left: %d", n)
			}
			if t.Failed() {
				t.Log(shown)
			}
		})
	}
}

// The file keeps its owner and mode, and a symlink to it stays one.
func TestEditKeepsTheFile(t *testing.T) {
	l := newEditLab(t, `cp after "$2"`)
	owner := 0
	if mayChangeUser(t) {
		owner = 12345
	}
	link := filepath.Join(filepath.Dir(l.dir), "link.toml")
	for _, err := range []error{os.Chown(l.policy, owner, owner), os.Chmod(l.policy, 0o604), os.Symlink(l.policy, link)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	// The includes of a link stand beside the link.
	if err := os.Symlink(filepath.Join(l.dir, "conf.d"), filepath.Join(filepath.Dir(l.dir), "conf.d")); err != nil {
		t.Fatal(err)
	}
	x := l.edit(t, link)
	x.await(t, "(n)o ")
	x.types(t, "n\r")
	if code, shown := x.end(t); code != exitOK {
		t.Fatalf("exit %d:\n%s", code, shown)
	}
	l.holds(t, editAfter)
	info, err := os.Lstat(l.policy)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode() != 0o604 || st.Uid != uint32(owner) || st.Gid != uint32(owner) {
		t.Errorf("mode %v, owner %d:%d", info.Mode(), st.Uid, st.Gid)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link: %v, %v", info, err)
	}
}

// Of two edits one waits for nobody: it is refused. What other programs change
// meanwhile is not lost.
func TestEditMeanwhile(t *testing.T) {
	l := newEditLab(t, `cp after "$2"; echo editing; until [ -e go ]; do sleep 0.05; done`)
	first := l.edit(t, l.policy)
	first.await(t, "editing")
	second := l.edit(t, l.policy)
	if code, shown := second.end(t); code != exitRefused || !strings.Contains(strings.Join(strings.Fields(shown), " "), "somebody else edits "+l.policy) {
		t.Errorf("exit %d:\n%s", code, shown)
	}
	other := editBefore + "# by another\n"
	if err := os.WriteFile(l.policy, []byte(other), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(l.dir), "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	code, shown := first.end(t)
	shown = strings.Join(strings.Fields(shown), " ")
	if code != exitRefused || !strings.Contains(shown, "another program has changed "+l.policy+" meanwhile: not saved") {
		t.Errorf("exit %d:\n%s", code, shown)
	}
	l.holds(t, other)
	left := l.copies(t)
	if len(left) != 1 {
		t.Fatalf("copies: %v", left)
	}
	copied := filepath.Join(left[0], "policy.toml")
	if b, err := os.ReadFile(copied); err != nil || string(b) != editAfter || !strings.Contains(shown, "your text is in "+copied) {
		t.Errorf("%q, %v\n%s", b, err, shown)
	}
	// Whoever comes next is let in.
	third := l.edit(t, l.policy)
	third.await(t, "(n)o ")
	third.types(t, "n\r")
	if code, shown := third.end(t); code != exitOK {
		t.Errorf("exit %d:\n%s", code, shown)
	}
	l.holds(t, editAfter)
}

// What is valid can be put on trial, and confirmed from elsewhere.
func TestEditApplies(t *testing.T) {
	h := newTrialHost(t)
	h.must(t, "apply", h.files[0])
	l := newEditLab(t, `cat `+h.files[1]+` >"$2"`)
	var x *terminal
	if err := h.Host(func() error {
		cmd := exec.Command("deadlight", "edit", "--state-dir", h.state, h.files[0])
		cmd.Env = append(os.Environ(), "EDITOR="+l.editor+" -x", "VISUAL=", "SUDO_EDITOR=", "TMPDIR="+l.tmp, "TERM=xterm")
		x = onTerminal(t, 80, cmd)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	x.await(t, "Apply it, on trial for 1m0s? (y)es, or (n)o ")
	x.types(t, "y\r")
	x.await(t, " s left to confirm")
	h.must(t, "confirm")
	code, shown := x.end(t)
	if code != exitOK || !strings.Contains(shown, "Confirmed") {
		t.Errorf("exit %d:\n%s", code, shown)
	}
	if r := h.settled(t); r.OnTrial() || r.Policy != h.files[0] || heldOf(t, h.lab, h.files[1:]) != 0 {
		t.Errorf("the state says %s", r.Policy)
	}
}

// Without a terminal, an editor or a policy nothing is begun.
func TestEditRefused(t *testing.T) {
	l := newEditLab(t, "echo ran >../ran")
	for name, tt := range map[string]struct {
		terminal bool
		editor   string
		policy   string
		code     int
		want     string
	}{
		"no terminal":  {false, l.editor, l.policy, exitRefused, "edit needs a terminal: nothing was changed"},
		"no editor":    {true, "/nowhere/editor", l.policy, exitRefused, "the editor of $EDITOR cannot be run"},
		"no policy":    {true, l.editor, l.policy + "x", exitUsage, "there is no policy at " + l.policy + "x"},
		"a directory":  {true, l.editor, l.dir, exitRefused, "is a directory: nothing was changed"},
		"wrong trial":  {true, l.editor, "--confirm=1s", exitUsage, "--confirm takes from 2s to 24h: 1s"},
		"two policies": {true, l.editor, l.policy + " " + l.policy, exitUsage, "one policy at a time"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("deadlight", append([]string{"edit"}, strings.Fields(tt.policy)...)...)
			cmd.Env = append(os.Environ(), "EDITOR="+tt.editor, "VISUAL=", "SUDO_EDITOR=", "TMPDIR="+l.tmp, "TERM=xterm")
			var code int
			var shown string
			if tt.terminal {
				code, shown = onTerminal(t, 200, cmd).end(t)
			} else {
				out, err := cmd.CombinedOutput()
				shown, code = string(out), cmd.ProcessState.ExitCode()
				if err == nil {
					t.Error("exit 0")
				}
			}
			if code != tt.code || !strings.Contains(strings.Join(strings.Fields(shown), " "), tt.want) {
				t.Errorf("exit %d, want %d and %q:\n%s", code, tt.code, tt.want, shown)
			}
		})
	}
	l.holds(t, editBefore)
	if n := len(l.copies(t)); n > 0 {
		t.Errorf("%d copies left", n)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(l.dir), "runs")); err == nil {
		t.Error("the editor has run")
	}
}

// The editor is chosen as sudoedit does, and split into words without a shell.
func TestEditorWords(t *testing.T) {
	for _, tt := range []struct{ sudo, visual, editor, want string }{
		{"true -a", "false", "false", "[true -a]"},
		{"", "true  -w 'x y'", "false", "[true -w 'x y']"},
		{" ", "", "true", "[true]"},
	} {
		t.Setenv("SUDO_EDITOR", tt.sudo)
		t.Setenv("VISUAL", tt.visual)
		t.Setenv("EDITOR", tt.editor)
		got, err := editorWords()
		if err != nil || fmt.Sprint(got) != tt.want {
			t.Errorf("%+v: %v, %v", tt, got, err)
		}
	}
}
