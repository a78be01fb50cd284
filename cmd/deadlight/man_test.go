package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"deadlight/rules"
)

// The manual pages are written by hand, and held against the commands, the flags
// and the language here: what is missing fails, and so does what does not exist.

// manItem is an item of a list of a manual page: a command, a flag, a key.
type manItem struct {
	section, sub string   // the headings above it
	head         string   // what stands behind .It
	text         string   // what follows, without nested lists
	above        *manItem // that it is nested in
}

// manPage reads the items of a page, and its text without comments.
func manPage(t *testing.T, name string) (source string, items []*manItem) {
	t.Helper()
	b, err := os.ReadFile("man/" + name)
	if err != nil {
		t.Fatal(err)
	}
	section, sub := "", ""
	var open []*manItem // by depth of the list; nil before the first item of one
	for _, line := range strings.Split(string(b), "\n") {
		macro, rest, _ := strings.Cut(line, " ")
		switch macro {
		case `.\"`:
			continue
		case ".Sh":
			section, sub = rest, ""
		case ".Ss":
			sub = strings.TrimSuffix(rest, `\&`)
		case ".Bl":
			open = append(open, nil)
		case ".El":
			if len(open) == 0 {
				t.Fatalf("%s: .El without .Bl", name)
			}
			open = open[:len(open)-1]
		case ".It":
			item := &manItem{section: section, sub: sub, head: rest}
			if n := len(open); n > 1 {
				item.above = open[n-2]
			}
			open[len(open)-1] = item
			items = append(items, item)
		default:
			if n := len(open); n > 0 && open[n-1] != nil {
				open[n-1].text += line + "\n"
			}
		}
		source += line + "\n"
	}
	return source, items
}

// word gives the first word behind a macro at the start of an item's head.
func (i *manItem) word(macro string) (string, bool) {
	rest, ok := strings.CutPrefix(i.head, macro+" ")
	word, _, _ := strings.Cut(rest, " ")
	return word, ok
}

// flagsOf gives the flags that a command has, but help, which all have.
func flagsOf(c *cobra.Command) map[string]*pflag.Flag {
	out := map[string]*pflag.Flag{}
	add := func(f *pflag.Flag) {
		if f.Name != "help" && !f.Hidden {
			out[f.Name] = f
		}
	}
	c.LocalFlags().VisitAll(add)
	c.InheritedFlags().VisitAll(add)
	return out
}

// commandsForPeople gives the commands that the help lists, cobra's own included.
func commandsForPeople() (*cobra.Command, map[string]*cobra.Command) {
	root := newRootCommand(env{})
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd("help") // else it is made only when it is asked for
	out := map[string]*cobra.Command{}
	for _, c := range root.Commands() {
		if !c.Hidden && !c.IsAdditionalHelpTopicCommand() {
			out[c.Name()] = c
		}
	}
	return root, out
}

// deadlight(8) tells of every command, in the group of the help, and of every flag.
func TestManCommands(t *testing.T) {
	source, items := manPage(t, "deadlight.8")
	root, commands := commandsForPeople()
	titles := map[string]string{"": "Additional Commands"}
	var order []string
	for _, g := range root.Groups() {
		titles[g.ID] = g.Title
		order = append(order, g.Title)
	}
	order = append(order, titles[""])
	told, flags := map[string]bool{}, map[string]bool{}
	everyFlag := map[string]bool{"-help": true, "h": true, "-": true}
	for name, c := range commands {
		for _, f := range flagsOf(c) {
			everyFlag["-"+f.Name] = true
			everyFlag[f.Shorthand] = true
			flags[name+" --"+f.Name] = false
		}
	}
	var subs []string
	for _, i := range items {
		if i.section != "COMMANDS" {
			continue
		}
		if !slices.Contains(subs, i.sub) {
			subs = append(subs, i.sub)
		}
		if i.above == nil {
			name, ok := i.word("Cm")
			c := commands[name]
			switch {
			case !ok || c == nil:
				t.Errorf("deadlight(8) tells of a command that does not exist: %s", i.head)
			case told[name]:
				t.Errorf("deadlight(8) tells twice of %s", name)
			case titles[c.GroupID] != i.sub:
				t.Errorf("deadlight(8) has %s below %q, the help below %q", name, i.sub, titles[c.GroupID])
			}
			told[name] = true
			continue
		}
		name, _ := i.above.word("Cm")
		c := commands[name]
		if c == nil {
			continue // complained of above
		}
		heads := strings.Split(strings.TrimPrefix(i.head, "Fl "), " , ")
		last := strings.Fields(heads[len(heads)-1])[0]
		f := flagsOf(c)[strings.TrimPrefix(last, "-")]
		switch {
		case f == nil || !strings.HasPrefix(i.head, "Fl "):
			t.Errorf("deadlight(8) tells of a flag that %s does not have: %s", name, i.head)
			continue
		case (f.Shorthand != "") != (len(heads) == 2) || f.Shorthand != "" && heads[0] != f.Shorthand:
			t.Errorf("deadlight(8): %s --%s has the short form %q: .It %s", name, f.Name, f.Shorthand, i.head)
		case (f.Value.Type() == "bool") == strings.Contains(i.head, " Ar "):
			t.Errorf("deadlight(8): whether %s --%s takes a value: .It %s", name, f.Name, i.head)
		}
		flags[name+" --"+f.Name] = true
		def := strings.TrimSuffix(f.DefValue, "0s") // of 1m0s
		if !slices.Contains([]string{"", "false", "[]"}, def) && !regexp.MustCompile(`(?s)Default:.*`+regexp.QuoteMeta(def)).MatchString(i.text) {
			t.Errorf("deadlight(8) does not tell the default of %s --%s, %s", name, f.Name, f.DefValue)
		}
		// The synopsis of the command has it too.
		short := "Fl -" + f.Name
		if f.Shorthand != "" {
			short = "Fl " + f.Shorthand
		}
		if !regexp.MustCompile(regexp.QuoteMeta(short) + `( |$)`).MatchString(i.above.head) {
			t.Errorf("deadlight(8): the line of %s does not have --%s: .It %s", name, f.Name, i.above.head)
		}
	}
	for name := range commands {
		if !told[name] {
			t.Errorf("deadlight(8) does not tell of %s", name)
		}
	}
	for flag, there := range flags {
		if !there {
			t.Errorf("deadlight(8) does not tell of %s", flag)
		}
	}
	if !slices.Equal(subs, order) {
		t.Errorf("deadlight(8) has the groups %q, the help %q", subs, order)
	}
	for _, m := range regexp.MustCompile(`\bFl (\S+)`).FindAllStringSubmatch(source, -1) {
		if !everyFlag[m[1]] {
			t.Errorf("deadlight(8) names the flag -%s, which no command has", m[1])
		}
	}
	for _, m := range regexp.MustCompile(`\bCm (\S+)`).FindAllStringSubmatch(source, -1) {
		if commands[m[1]] == nil {
			t.Errorf("deadlight(8) names the command %s, which does not exist", m[1])
		}
	}
}

// deadlight(8) explains every exit code, and no other.
func TestManExitCodes(t *testing.T) {
	_, items := manPage(t, "deadlight.8")
	var got, want []string
	for _, i := range items {
		if i.section == "EXIT STATUS" {
			got = append(got, i.head)
		}
	}
	for _, code := range []int{exitOK, exitFindings, exitUsage, exitRefused, exitRolledBack, exitBug, exitInterrupted} {
		want = append(want, fmt.Sprint(code))
	}
	if !slices.Equal(got, want) {
		t.Errorf("deadlight(8) explains the exit codes %v, there are %v", got, want)
	}
}

// literals gives the lines of the displays of a page.
func literals(source string) string {
	var out strings.Builder
	for _, d := range strings.Split(source, "\n.Bd -literal")[1:] {
		_, d, _ = strings.Cut(d, "\n")
		d, _, _ = strings.Cut(d, "\n.Ed")
		out.WriteString(d + "\n")
	}
	return out.String()
}

// possible says why a command line of ours is none: words in front of the program
// (sudo, an assignment), a redirection, a comment and what follows a pipe or an
// alternative are not looked at.
func possible(line string) error {
	_, words, ok := strings.Cut(" "+line, " deadlight ")
	if !ok {
		return errors.New("no command of deadlight")
	}
	for _, end := range []string{" | ", " || ", " && ", " >", " #"} {
		words, _, _ = strings.Cut(words, end)
	}
	root, _ := commandsForPeople()
	c, args, err := root.Find(strings.Fields(words))
	if err == nil && c == root {
		err = errors.New("no such command")
	}
	if err == nil {
		err = c.ParseFlags(args)
	}
	if err == nil {
		err = c.ValidateArgs(c.Flags().Args())
	}
	return err
}

// The command lines of the examples are possible.
func TestManExamples(t *testing.T) {
	source, _ := manPage(t, "deadlight.8")
	seen := 0
	for _, line := range strings.Split(literals(source), "\n") {
		line, ok := strings.CutPrefix(strings.TrimLeft(line, "$# "), "deadlight ")
		if !ok {
			continue
		}
		line, _, _ = strings.Cut(line, " >")
		for _, one := range strings.Split(line, " || deadlight ") {
			seen++
			err := possible("deadlight " + one)
			if err != nil {
				t.Errorf("deadlight %s: %v", one, err)
			}
		}
	}
	if seen < 10 {
		t.Errorf("only %d command lines found", seen)
	}
}

// deadlight-policy(5) tells of every key, with its default, and of no other.
func TestManPolicyKeys(t *testing.T) {
	source, items := manPage(t, "deadlight-policy.5")
	keys := map[string]bool{}
	words := map[string]bool{"check": true, "apply": true, "try": true, "verify": true} // commands
	for _, k := range rules.Keys() {
		keys[k] = false
		words[k[strings.LastIndex(k, ".")+1:]] = true
	}
	for _, i := range items {
		if i.section != "TABLES" {
			continue
		}
		path, _ := i.word("Cm")
		for up := i.above; up != nil; up = up.above {
			name, _ := up.word("Cm")
			path = name + "." + path
		}
		if i.sub != "Top of the file" {
			table := strings.NewReplacer("[[", "", "]]", ".*", "[", "", "]", "", "NAME", "*").Replace(i.sub)
			path = table + "." + path
		}
		told, known := keys[path]
		switch {
		case !known:
			t.Errorf("deadlight-policy(5) tells of %s, which is not in the language", path)
			continue
		case told:
			t.Errorf("deadlight-policy(5) tells twice of %s", path)
		}
		keys[path] = true
		if !regexp.MustCompile(`(?i)\bDefault:|\brequired\b`).MatchString(i.text) {
			t.Errorf("deadlight-policy(5) does not tell what stands for %s when it is left out", path)
		}
	}
	for k, told := range keys {
		if !told {
			t.Errorf("deadlight-policy(5) does not tell of %s", k)
		}
	}
	for _, m := range regexp.MustCompile(`\bCm (\S+)`).FindAllStringSubmatch(source, -1) {
		if !words[m[1]] {
			t.Errorf("deadlight-policy(5) names the key %s, which is not in the language", m[1])
		}
	}
	p, problems := rules.Parse("policy.toml", []byte(literals(source)), nil)
	if p == nil || len(problems) > 0 {
		t.Fatalf("the example of deadlight-policy(5): %v", problems)
	}
	for _, f := range failing(rules.Compile(p)) {
		t.Errorf("the example of deadlight-policy(5): %s", f.text)
	}
}

// mandoc finds nothing to complain of, and the date is one.
func TestManLint(t *testing.T) {
	for _, page := range []string{"deadlight.8", "deadlight-policy.5"} {
		// Which pages this host has is no matter.
		out, err := exec.Command("mandoc", "-T", "lint", "man/"+page).Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("the Debian package mandoc is needed: %v", err)
		}
		for line := range bytes.Lines(out) {
			if !bytes.Contains(line, []byte("STYLE: referenced manual not found: ")) {
				t.Errorf("%s", line)
			}
		}
		if text, err := exec.Command("mandoc", "-T", "utf8", "man/"+page).Output(); err != nil || len(text) < 5000 {
			t.Errorf("%s: rendered to %d bytes: %v", page, len(text), err)
		}
		source, _ := manPage(t, page)
		m := regexp.MustCompile(`(?m)^\.Dd (.*)$`).FindStringSubmatch(source)
		if m == nil {
			t.Fatalf("%s has no date", page)
		}
		const layout = "January 2, 2006"
		if d, err := time.Parse(layout, m[1]); err != nil || d.Format(layout) != m[1] || d.Year() < 2026 || d.Year() > 2100 {
			t.Errorf("%s: the date %q: %v", page, m[1], err)
		}
		name, volume, _ := strings.Cut(page, ".")
		if title := ".Dt " + strings.ToUpper(name) + " " + volume + "\n"; !strings.Contains(source, title) {
			t.Errorf("%s has no %q", page, title)
		}
	}
}
