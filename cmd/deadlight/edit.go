package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// edit is visudo's way: a copy is edited, and takes the place of the policy whole
// and valid, or not at all.

// editTrial is how long an edited policy is on trial: time to log in once more.
const editTrial = time.Minute

func newEditCommand(e env) *cobra.Command {
	var within time.Duration
	c := &cobra.Command{
		Use:     "edit [POLICY]",
		GroupID: groupWrite,
		Short:   "Edit a policy in your editor: check, plan, apply on trial",
		Long: `Opens a copy of the policy in an editor, and checks it when the editor ends. What
is not valid, or breaks an [[expect]], is never saved: you edit again, or quit.
What is valid takes the place of the file in one step, with its owner and mode;
then it is said what apply would change, and you are asked whether to put that in
force on trial, as apply --confirm does.

Two edits of one policy keep out of each other's way. If another program changed
the file meanwhile, nothing is saved. Text that was not saved stays in a directory
of your own, which is named, unless you quit without saving.

The editor is $SUDO_EDITOR, $VISUAL, $EDITOR, else sensible-editor, editor, vi or
nano. It is run without a shell: words are split at blanks. An editor that ends
with an error (:cq in vi) saves nothing.

Exit codes: 0 saved or unchanged, 2 not valid and not saved, 3 refused, 4 applied,
then rolled back.`,
		Example: "  sudo deadlight edit\n  sudo EDITOR=nano deadlight edit --confirm 5m\n  deadlight edit ./policy.toml",
		Args:    atMostPolicy,
	}
	dir := stateFlag(c)
	c.Flags().DurationVar(&within, "confirm", editTrial, "how long the policy is on trial, if you apply it")
	c.RunE = func(c *cobra.Command, args []string) error {
		if within < shortestTrial || within > longestTrial {
			return usageError("deadlight edit --confirm 60s", "--confirm takes from 2s to 24h: %s", within)
		}
		return edit(c.Context(), e, policyArg(args), *dir, within)
	}
	return c
}

func edit(ctx context.Context, e env, file, dir string, within time.Duration) error {
	if !isTerminal(e.stdin) || !isTerminal(e.stdout) || !isTerminal(e.stderr) {
		return refused(errors.New("edit needs a terminal: nothing was changed"), "change the file with a program of your own, then: deadlight check "+file)
	}
	editor, err := editorWords()
	if err != nil {
		return err
	}
	d, err := openDraft(file)
	if err != nil {
		return err
	}
	defer d.lock.Close()
	answers := bufio.NewReader(e.stdin)
	for {
		if err := runEditor(e, append(editor, d.copy)); err != nil {
			return refused(fmt.Errorf("%w: %s is as it was", err, file), d.left())
		}
		// Ctrl-C was the editor's so far; from here on it is ours again.
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
		defer stop()
		text, err := readFile(d.copy, nil)
		if err != nil {
			return refused(fmt.Errorf("read what was edited: %w: %s is as it was", err, file), d.left())
		}
		if bytes.Equal(text, d.before) {
			printf(e.stdout, "No changes: %s is as it was\n", printable(file))
			return d.discard()
		}
		good, err := d.check(e, text)
		if err != nil {
			return err
		}
		if !good {
			again, err := ask(ctx, e, answers, "(e)dit again, or (q)uit without saving? ", "eq")
			switch {
			case err != nil:
				return d.interrupted(e, err)
			case again == 'q':
				printf(e.stderr, "deadlight: not saved: %s is as it was\n", printable(file))
				return errors.Join(d.discard(), silently(exitUsage))
			}
			continue
		}
		if err := d.save(text); err != nil {
			return refused(fmt.Errorf("%w: not saved", err), d.left())
		}
		printf(e.stdout, "Saved %s\n", printable(file))
		if err := d.discard(); err != nil {
			return err
		}
		return offer(ctx, e, answers, file, dir, within)
	}
}

// offer says what apply would change, and applies it if that is wanted.
func offer(ctx context.Context, e env, answers *bufio.Reader, file, dir string, within time.Duration) error {
	err := plan(e, file, planFlags{state: dir})
	var x *exitError
	if !errors.As(err, &x) || x.code != exitFindings {
		return err // nothing to change, or it cannot be told
	}
	yes, err := ask(ctx, e, answers, fmt.Sprintf("Apply it, on trial for %s? (y)es, or (n)o ", within), "yn")
	switch {
	case err != nil:
		return &exitError{exitInterrupted, errors.New("interrupted: the policy is saved, not applied"), "sudo deadlight apply --confirm 60s " + file}
	case yes == 'n':
		printf(e.stdout, "Saved, not applied: sudo deadlight apply --confirm 60s %s\n", printable(file))
		return nil
	}
	return apply(ctx, e, file, dir, applyFlags{within: within})
}

// editorWords gives the editor and its arguments.
func editorWords() ([]string, error) {
	for _, name := range []string{"SUDO_EDITOR", "VISUAL", "EDITOR"} {
		words := strings.Fields(os.Getenv(name))
		if len(words) == 0 {
			continue
		}
		if _, err := exec.LookPath(words[0]); err != nil {
			return nil, refused(fmt.Errorf("the editor of $%s cannot be run: %w: nothing was changed", name, err), "EDITOR=vi deadlight edit")
		}
		return words, nil
	}
	for _, name := range []string{"sensible-editor", "editor", "vi", "nano"} {
		if _, err := exec.LookPath(name); err == nil {
			return []string{name}, nil
		}
	}
	return nil, refused(errors.New("there is no editor: nothing was changed"), "name one in $EDITOR")
}

// runEditor waits for an editor on our terminal. An interrupt meanwhile is meant for
// it: for vi Ctrl-C is a key like any other.
func runEditor(e env, words []string) error {
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.stdin, e.stdout, e.stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the editor: %w", err)
	}
	signal.Ignore(os.Interrupt, syscall.SIGQUIT) // after the start: the editor shall not inherit it
	err := cmd.Wait()
	signal.Reset(os.Interrupt, syscall.SIGQUIT)
	if err != nil {
		return fmt.Errorf("the editor %s ended with an error (%w)", words[0], err)
	}
	return nil
}

// ask puts a question until one of the letters is the answer. Its errors are that
// the input ended, or an interrupt.
func ask(ctx context.Context, e env, answers *bufio.Reader, question, letters string) (byte, error) {
	for {
		printf(e.stderr, "%s", question)
		type line struct {
			text string
			err  error
		}
		read := make(chan line, 1)
		go func() {
			text, err := answers.ReadString('\n')
			read <- line{text, err}
		}()
		select {
		case <-ctx.Done():
			printf(e.stderr, "\n")
			return 0, ctx.Err()
		case l := <-read:
			if answer := strings.ToLower(strings.TrimSpace(l.text)); answer != "" && strings.Contains(letters, answer[:1]) {
				return answer[0], nil
			}
			if l.err != nil {
				printf(e.stderr, "\n")
				return 0, l.err
			}
		}
	}
}

// draft is a policy and the copy of it that is edited.
type draft struct {
	name   string   // as it was given
	path   string   // without symlinks: what is replaced
	lock   *os.File // the policy, locked against other edits
	before []byte
	copy   string // in a directory of its own
}

// openDraft locks a policy and makes the copy.
func openDraft(file string) (_ *draft, err error) {
	d := &draft{name: file}
	if d.path, err = filepath.EvalSymlinks(file); err == nil {
		err = d.hold()
	}
	var x *exitError
	switch {
	case err == nil:
	case errors.As(err, &x):
		return nil, err
	case errors.Is(err, fs.ErrNotExist):
		return nil, usageError("write one from what listens now: sudo deadlight init > "+file, "there is no policy at %s", file)
	case errors.Is(err, fs.ErrPermission):
		return nil, refused(fmt.Errorf("no permission to change %s: it is as it was", file), "sudo deadlight edit "+file)
	default:
		return nil, refused(fmt.Errorf("%w: nothing was changed", err), "")
	}
	// Not beside the policy: no include could take it for one, and what an editor
	// leaves behind is not in the way. TMPDIR may name another place.
	own, err := os.MkdirTemp("", "deadlight-edit-")
	if err == nil {
		d.copy = filepath.Join(own, filepath.Base(d.path))
		err = os.WriteFile(d.copy, d.before, 0o600)
	}
	if err != nil {
		d.lock.Close()
		return nil, refused(fmt.Errorf("make a copy of %s: %w", file, err), "")
	}
	return d, nil
}

// hold locks the policy and reads it. Only who may write it can lock it.
func (d *draft) hold() error {
	for {
		info, err := os.Stat(d.path)
		if err == nil {
			err = regular(d.name, info.Mode())
		}
		if err != nil {
			return err
		}
		if d.lock, err = os.OpenFile(d.path, os.O_RDWR, 0); err != nil {
			return err
		}
		err = unix.FcntlFlock(d.lock.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = refused(fmt.Errorf("somebody else edits %s: nothing was changed", d.name), "wait until that deadlight edit has ended")
		}
		var opened, now fs.FileInfo
		if err == nil {
			opened, err = d.lock.Stat()
		}
		if err == nil {
			now, err = os.Stat(d.path)
		}
		if err == nil && !os.SameFile(opened, now) {
			d.lock.Close() // an edit has just replaced it
			continue
		}
		if err == nil {
			d.before, err = readFile(d.path, nil)
		}
		if err != nil {
			d.lock.Close()
		}
		return err
	}
}

// check says whether a text may take the place of the policy, and why not.
func (d *draft) check(e env, text []byte) (bool, error) {
	rs, problems := compileFiles(d.name, text, newSources(d.name, text, nil))
	if rs == nil {
		return false, e.showProblems(problems, fmt.Sprintf("deadlight: %s: not saved", rules.Summary(problems)))
	}
	if err := e.showProblems(problems, ""); err != nil {
		return false, err
	}
	failed := failing(rs)
	for _, f := range failed {
		printf(e.stderr, "%s: %s\n", printable(f.pos.String()), printable(f.text))
	}
	if len(failed) > 0 {
		printf(e.stderr, "deadlight: %s of %d not as the policy says: not saved\n", plural(len(failed), "expectation"), len(rs.Policy.Expect))
	}
	return len(failed) == 0, nil
}

// save replaces the policy in one step, unless another program has changed it.
func (d *draft) save(text []byte) error {
	info, err := os.Stat(d.path)
	if err != nil {
		return err
	}
	now, err := readFile(d.path, nil)
	if err != nil {
		return err
	}
	if !bytes.Equal(now, d.before) {
		return fmt.Errorf("another program has changed %s meanwhile", d.name)
	}
	f, err := os.CreateTemp(filepath.Dir(d.path), "."+filepath.Base(d.path)+".") // no include ends in such a number
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	_, err = f.Write(text)
	if err == nil {
		err = f.Chown(int(st.Uid), int(st.Gid))
	}
	if err == nil {
		err = f.Chmod(info.Mode().Perm())
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), d.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(filepath.Dir(d.path))
}

// syncDir makes a rename outlive a power cut.
func syncDir(name string) error {
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// discard removes the copy.
func (d *draft) discard() error { return os.RemoveAll(filepath.Dir(d.copy)) }

// left says where the text is that was not saved.
func (d *draft) left() string {
	text, err := os.ReadFile(d.copy)
	switch {
	case err != nil:
		return "what the editor left is in " + filepath.Dir(d.copy)
	case bytes.Equal(text, d.before):
		_ = d.discard() // nothing of value in it
		return ""
	}
	return "your text is in " + d.copy
}

// interrupted ends an edit by Ctrl-C, a hang-up, or the end of the input.
func (d *draft) interrupted(e env, err error) error {
	printf(e.stderr, "deadlight: not saved: %s is as it was; your text is in %s\n", printable(d.name), printable(d.copy))
	if errors.Is(err, context.Canceled) {
		return silently(exitInterrupted)
	}
	return silently(exitUsage)
}
