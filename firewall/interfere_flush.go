package firewall

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"

	"deadlight/rules"
)

// flush is a place that empties or deletes our table.
type flush struct {
	when string // "ExecStart", "ExecStop", ...; of a script: ""
	at   string // "/etc/nftables.conf:3", or the setting of a unit
}

// wipes matches the nft commands that take our table away, or what is in it:
// those on the whole ruleset, on all of family inet, and on the very table.
var wipes = regexp.MustCompile(`\b(flush\s+ruleset(\s+inet)?\s*($|[;"'}&|)>#]|\d>)|(flush|delete|destroy)\s+table\s+inet\s+` + rules.TableName + `\b)`)

// nftFile matches a call of nft that reads a file.
var nftFile = regexp.MustCompile(`\bnft\b[^;&|]*?\s(?:-\w*f|--file)[\s=]*["']?([^\s"';&|]+)`)

// included matches an include statement of nft.
var included = regexp.MustCompile(`^\s*include\s+["']([^"']+)["']`)

// sourced matches a script that runs another one, or reads it.
var sourced = regexp.MustCompile(`^\s*(?:\.|source|exec|sh|bash|/bin/sh|/bin/bash)?\s*["']?(/[\w./@+-]+)`)

// flushes lists where a unit takes our table away.
func (h *hostTree) flushes(name string, u *unit) []flush {
	var out []flush
	if name == "netfilter-persistent.service" { // it runs whatever stands there
		plugins, err := fs.Glob(h.root, "usr/share/netfilter-persistent/plugins.d/*")
		h.missed(name, err)
		for _, file := range plugins {
			for _, at := range h.scan(file, map[string]bool{}) {
				out = append(out, flush{"ExecStart", at})
			}
		}
	}
	for _, e := range u.execs {
		line := strings.TrimLeft(e.line, "@-:+!|")
		if wipes.MatchString(line) {
			out = append(out, flush{e.when, name + ", " + e.when})
		}
		for _, file := range h.calls(name, line) {
			for _, at := range h.scan(file, map[string]bool{}) {
				out = append(out, flush{e.when, at})
			}
		}
	}
	return out
}

// calls gives the files that a command line runs or feeds to nft.
func (h *hostTree) calls(where, line string) []string {
	var out []string
	for _, m := range nftFile.FindAllStringSubmatch(line, -1) {
		switch file := m[1]; {
		case strings.ContainsAny(file, "$%"):
			h.missed(where, fmt.Errorf("it loads %s, which is known only when it runs", file))
		case file != "-" && file != "/dev/stdin":
			out = append(out, file)
		}
	}
	if len(out) > 0 {
		return out
	}
	for i, word := range strings.Fields(line) {
		word = strings.Trim(word, `"'`)
		shell := i > 0 && slices.Contains([]string{"sh", "bash", "dash"}, path.Base(strings.Fields(line)[i-1]))
		if strings.HasPrefix(word, "/") && (i == 0 || shell) {
			out = append(out, word)
		}
	}
	return out
}

// scan looks through a script, or a file of nft, and what it reads in turn:
// places that take our table away, as file:line.
func (h *hostTree) scan(file string, seen map[string]bool) []string {
	const deepest = 64
	name := strings.TrimPrefix(path.Clean(file), "/")
	if seen[name] || len(seen) > deepest || !fs.ValidPath(name) {
		return nil
	}
	seen[name] = true
	info, err := fs.Stat(h.root, name)
	h.missed("/"+name, err)
	if err != nil || !info.Mode().IsRegular() {
		return nil
	}
	text, ok := h.script(name, info)
	if !ok {
		return nil
	}
	var out []string
	for i, line := range strings.Split(text, "\n") {
		if hash := strings.TrimSpace(line); hash == "" || hash[0] == '#' {
			continue
		}
		if at := strings.Index(line, " #"); at >= 0 {
			line = line[:at]
		}
		if wipes.MatchString(line) {
			out = append(out, fmt.Sprintf("/%s:%d", name, i+1))
		}
		for _, next := range h.named(name, line) {
			out = append(out, h.scan(next, seen)...)
		}
	}
	return out
}

// script reads a file that is text; a program is none.
func (h *hostTree) script(name string, info fs.FileInfo) (string, bool) {
	f, err := h.root.Open(name)
	if err != nil {
		h.missed("/"+name, err)
		return "", false
	}
	defer f.Close()
	head := make([]byte, 4)
	n, _ := f.Read(head) // of an empty file nothing
	if string(head[:n]) == "\x7fELF" {
		return "", false
	}
	if info.Size() > largestScript {
		h.missed("/"+name, fmt.Errorf("it is too large to look through"))
		return "", false
	}
	b, err := fs.ReadFile(h.root, name)
	h.missed("/"+name, err)
	if strings.ContainsRune(string(b), 0) {
		return "", false
	}
	return string(b), err == nil
}

// named gives the files that a line of a script includes or runs.
func (h *hostTree) named(script, line string) []string {
	if m := included.FindStringSubmatch(line); m != nil {
		return h.include(script, m[1])
	}
	var out []string
	for _, m := range nftFile.FindAllStringSubmatch(line, -1) {
		switch {
		case strings.ContainsAny(m[1], "$`"):
			h.missed("/"+script, fmt.Errorf("it loads %s, which is known only when it runs", m[1]))
		case strings.HasPrefix(m[1], "/"):
			out = append(out, m[1])
		}
	}
	if m := sourced.FindStringSubmatch(line); m != nil && len(out) == 0 && !strings.HasSuffix(m[1], "/nft") {
		out = append(out, m[1])
	}
	return out
}

// include resolves an include of nft: relative names stand below /etc.
func (h *hostTree) include(script, pattern string) []string {
	if strings.ContainsRune(pattern, '$') {
		h.missed("/"+script, fmt.Errorf("it includes %s, which is known only when it runs", pattern))
		return nil
	}
	var out []string
	dirs := []string{"", "etc", "usr/etc", path.Dir(script)}
	if path.IsAbs(pattern) {
		dirs = []string{""}
	}
	for _, dir := range dirs {
		names, err := fs.Glob(h.root, strings.TrimPrefix(path.Join(dir, pattern), "/"))
		h.missed("/"+script, err)
		out = append(out, names...)
	}
	return out
}

// flushing says what the flushes of a unit mean.
func (h *hostTree) flushing(name string, flushes []flush, ours bool) Interference {
	var places []string
	starts, reloads, stops := false, false, false
	for _, f := range flushes {
		if !slices.Contains(places, f.at) {
			places = append(places, f.at)
		}
		starts = starts || strings.HasPrefix(f.when, "ExecStart")
		reloads = reloads || f.when == "ExecReload"
		stops = stops || strings.HasPrefix(f.when, "ExecStop")
	}
	var when []string
	for _, w := range []struct {
		so   bool
		word string
	}{{starts, "starts"}, {reloads, "reloads"}, {stops, "stops"}} {
		if w.so {
			when = append(when, w.word)
		}
	}
	words := strings.Join(when, " or ")
	if len(when) == 3 {
		words = "starts, reloads or stops"
	}
	i := Interference{Severity: May, Kind: "unit", Where: name, Rule: strings.Join(places, ", ")}
	i.Fact = fmt.Sprintf("It takes Deadlight's table away when it %s.", words)
	i.Advice = fmt.Sprintf("Let it delete only its own tables there, or: systemctl disable %s; after each of its restarts: deadlight apply.", name)
	if !starts {
		return i
	}
	switch {
	case !ours || h.unit(ourUnit) == nil:
		i.Severity = Breaks
		i.Fact += " No enabled " + ourUnit + " loads the policy after it at boot."
	case h.orderOf(name, ourUnit) == earlier:
		i.Fact += " At boot it comes before " + ourUnit + ", which then loads the policy; a restart of it later leaves the host open."
	case h.orderOf(name, ourUnit) == later:
		i.Severity = Breaks
		i.Fact += " At boot it comes after " + ourUnit + " and leaves the host open."
	default:
		i.Severity = Breaks
		i.Fact += " Nothing says whether at boot it comes before or after " + ourUnit + "."
	}
	return i
}

// scripts lists what runs at boot, or when a link comes up, or by the clock,
// and takes our table away.
func (h *hostTree) scripts() []Interference {
	var out []Interference
	for _, p := range [...]struct {
		pattern string
		when    string
		program bool // runs only when it is executable
	}{
		{"etc/rc.local", "at boot", true},
		{"etc/rc.d/rc.local", "at boot", true},
		{"etc/local.d/*.start", "at boot", true},
		{"etc/ufw/*.init", "when ufw starts or stops", true},
		{"etc/network/interfaces", "when a link comes up", false},
		{"etc/network/interfaces.d/*", "when a link comes up", false},
		{"etc/network/if-*.d/*", "when a link comes up or goes", true},
		{"etc/NetworkManager/dispatcher.d/*", "when a link comes up or goes", true},
		{"etc/networkd-dispatcher/*.d/*", "when a link comes up or goes", true},
		{"etc/crontab", "by the clock", false},
		{"etc/cron.d/*", "by the clock", false},
		{"etc/cron.*ly/*", "by the clock", true},
		{"var/spool/cron/crontabs/*", "by the clock", false},
		{"var/spool/cron/*", "by the clock", false},
	} {
		names, err := fs.Glob(h.root, p.pattern)
		h.missed("/"+p.pattern, err)
		for _, name := range names {
			info, err := fs.Stat(h.root, name)
			h.missed("/"+name, err)
			if err != nil || !info.Mode().IsRegular() || p.program && info.Mode()&0o111 == 0 {
				continue
			}
			if places := h.scan(name, map[string]bool{}); len(places) > 0 {
				out = append(out, Interference{
					Severity: Breaks, Kind: "script", Where: "/" + name, Rule: strings.Join(places, ", "),
					Fact:   fmt.Sprintf("It takes Deadlight's table away %s, and leaves the host open.", p.when),
					Advice: "Let it delete only its own tables there.",
				})
			}
		}
	}
	return out
}
