package main

// The hosts of verify: --target, once for each, or a file of them with the policy of
// each. Everything that is wrong with them is told before a packet is sent.

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// target is a host to probe.
type target struct {
	name      string
	addresses []netip.Addr
	policy    string // file
	at        mark   // of the policy, if a file of targets names it; else of the host
}

// String gives the addresses as reports have them.
func (t *target) String() string {
	var out []string
	for _, a := range t.addresses {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

// targetPolicy is a policy that targets share.
type targetPolicy struct {
	rules  *rules.Ruleset
	from   *sources // nil unless they are sent elsewhere
	digest string
}

// aTarget reads ADDR[,ADDR...], the addresses of one host.
func aTarget(s string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, part := range strings.Split(s, ",") {
		a, err := targetAddress(part)
		if err != nil {
			return nil, err
		}
		if slices.Contains(out, a) {
			return nil, usageError("", "--target names %s twice", a)
		}
		out = append(out, a)
	}
	return out, nil
}

func targetAddress(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || a.Is4In6() {
		return a, usageError(noNames, "--target wants an address: %s", strconv.Quote(s))
	}
	return a, nil
}

const noNames = "names are not resolved: the answer would decide what is probed"

// targetsOf takes --target, each of which is a host.
func targetsOf(flags []string, policy string) ([]target, error) {
	var out []target
	host := map[netip.Addr]bool{}
	for _, s := range flags {
		list, err := aTarget(s)
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			if host[a] {
				return nil, usageError("each --target is a host; one host with several addresses is --target ADDR,ADDR", "%s is given twice", a)
			}
			host[a] = true
		}
		out = append(out, target{name: list[0].String(), addresses: list, policy: policy})
	}
	return out, nil
}

// mark is a place in a file of targets.
type mark struct {
	pos   rules.Pos
	line  string
	width int
}

func (m mark) problem(hint, format string, args ...any) rules.Problem {
	return rules.Problem{Severity: rules.Error, Pos: m.pos, Width: m.width, Line: m.line, Summary: fmt.Sprintf(format, args...), Hint: hint}
}

// isHostName is what a report calls a host.
func isHostName(s string) bool {
	return regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$`).MatchString(s)
}

const targetLine = "a line is ADDR[,ADDR...] [POLICY] [NAME]; - stands for the policy of the command line"

// parseTargets reads a file of targets; policy is that of lines that name none.
func parseTargets(file string, src []byte, policy string) ([]target, []rules.Problem) {
	p := targetParser{file: file, policy: policy, hosts: map[netip.Addr]int{}, names: map[string]int{}}
	text := strings.TrimPrefix(string(src), "\ufeff")
	for n, line := range strings.Split(text, "\n") {
		p.line(n+1, strings.TrimSuffix(line, "\r"))
	}
	if len(p.out) == 0 && len(p.problems) == 0 {
		p.problems = append(p.problems, mark{pos: rules.Pos{File: file, Line: 1, Column: 1}, width: 1}.problem(targetLine, "no host stands in it"))
	}
	return p.out, p.problems
}

type targetParser struct {
	file, policy string
	out          []target
	problems     []rules.Problem
	hosts        map[netip.Addr]int // the line that has them
	names        map[string]int
}

// word is a part of a line.
type word struct {
	text string
	mark
}

func (p *targetParser) fail(m mark, hint, format string, args ...any) {
	p.problems = append(p.problems, m.problem(hint, format, args...))
}

// words cuts a line at blanks; what stands behind a # at the start of a word is a comment.
func (p *targetParser) words(n int, line string) []word {
	var out []word
	column, start := 1, -1
	begin := 0
	end := func(at int) {
		if start >= 0 {
			text := line[begin:at]
			out = append(out, word{text, mark{rules.Pos{File: p.file, Line: n, Column: start}, line, utf8.RuneCountInString(text)}})
		}
		start = -1
	}
	for i, r := range line {
		switch {
		case unicode.IsSpace(r):
			end(i)
		case start < 0 && r == '#':
			return out
		case start < 0:
			start, begin = column, i
		}
		column++
	}
	end(len(line))
	return out
}

func (p *targetParser) line(n int, line string) {
	words := p.words(n, line)
	if len(words) == 0 {
		return
	}
	if !utf8.ValidString(line) {
		p.fail(words[0].mark, "", "the line is not UTF-8")
		return
	}
	t := target{policy: p.policy, at: words[0].mark}
	t.addresses = p.addresses(n, words[0])
	if len(words) > 1 && words[1].text != "-" {
		t.at = words[1].mark
		if t.policy = words[1].text; !filepath.IsAbs(t.policy) {
			t.policy = filepath.Join(filepath.Dir(p.file), t.policy)
		}
		t.policy = filepath.Clean(t.policy)
	}
	if len(t.addresses) > 0 {
		t.name = t.addresses[0].String()
	}
	if len(words) > 2 {
		w := words[2]
		t.name = w.text
		switch was := p.names[t.name]; {
		case !isHostName(t.name):
			p.fail(w.mark, "letters, digits, dots, dashes and underscores", "not a name of a host: %s", strconv.Quote(t.name))
		case was > 0:
			p.fail(w.mark, "names tell hosts apart in the report", "line %d is called %s already", was, t.name)
		default:
			p.names[t.name] = n
		}
	}
	if len(words) > 3 {
		p.fail(words[3].mark, targetLine, "more than a line may have: %s", strconv.Quote(words[3].text))
	}
	p.out = append(p.out, t)
}

// addresses reads the first word of a line.
func (p *targetParser) addresses(n int, w word) []netip.Addr {
	var out []netip.Addr
	m := w.mark
	for _, s := range strings.Split(w.text, ",") {
		m.width = max(1, utf8.RuneCountInString(s))
		a, err := netip.ParseAddr(s)
		switch was := p.hosts[a]; {
		case s == "":
			p.fail(m, "", "no address stands beside the comma")
		case err != nil && isNetwork(s):
			p.fail(m, "write a line for each host", "not one address: %s", strconv.Quote(s))
		case err != nil:
			p.fail(m, noNames, "not an address: %s", strconv.Quote(s))
		case a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast():
			p.fail(m, "", "not an address of another host: %s", s)
		case was == n:
			p.fail(m, "", "%s stands twice in this line", a)
		case was > 0:
			p.fail(m, "a host is one line, with all its addresses", "%s stands in line %d already", a, was)
		default:
			p.hosts[a] = n
			out = append(out, a)
		}
		m.pos.Column += utf8.RuneCountInString(s) + 1
	}
	return out
}

func isNetwork(s string) bool {
	_, err := netip.ParsePrefix(s)
	return err == nil || strings.Contains(s, "-") && !strings.ContainsFunc(s, unicode.IsLetter)
}

// readTargets reads the hosts and their policies, each policy once. What is wrong
// with any of them is printed.
func readTargets(e env, f *verifyFlags, policy string, keep bool) ([]target, map[string]*targetPolicy, error) {
	const consequence = "nothing probed"
	var hosts []target
	var problems []rules.Problem
	var err error
	if f.targetsFile == "" {
		hosts, err = targetsOf(f.hosts, policy)
	} else {
		var src []byte
		if src, err = readFile(f.targetsFile, nil); err != nil {
			err = unreadable(f.targetsFile, err)
		} else {
			hosts, problems = parseTargets(f.targetsFile, src, policy)
		}
	}
	if err != nil {
		return nil, nil, err
	}
	policies := map[string]*targetPolicy{}
	bad := len(problems) > 0
	for i := range hosts {
		t := &hosts[i]
		if _, read := policies[t.policy]; read {
			continue
		}
		policies[t.policy] = nil
		rs, more, from, err := parseSources(t.policy)
		switch {
		case err != nil && f.targetsFile == "":
			return nil, nil, err
		case err != nil:
			problems = append(problems, t.at.problem(policyHint(t.policy, policy), "%s", err))
			bad = true
			continue
		}
		problems = append(problems, more...)
		if rs == nil {
			bad = true
			continue
		}
		policies[t.policy] = &targetPolicy{rules: rs, digest: firewall.DigestOf(from.list())}
		if keep {
			policies[t.policy].from = from
		}
	}
	problems = inFileOrder(problems)
	if bad {
		return nil, nil, unusable(e, problems, consequence)
	}
	return hosts, policies, rules.Render(e.stderr, problems, "")
}

// policyHint says how a policy that cannot be read came to be meant.
func policyHint(file, byDefault string) string {
	if file == byDefault {
		return "it is for the lines that name no policy: give another on the command line, deadlight verify POLICY --targets FILE"
	}
	return "a path is relative to the file of targets"
}

// unreadable says why a file could not be read.
func unreadable(file string, err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	return usageError("", "read %s: %w", file, err)
}

// lookHosts are targets as they are probed.
func lookHosts(hosts []target, policies map[string]*targetPolicy, thorough int) []verify.Host {
	out := make([]verify.Host, len(hosts))
	for i := range hosts {
		rs := policies[hosts[i].policy].rules
		out[i] = verify.Host{Rules: rs, Targets: hosts[i].addresses, Thorough: thoroughOf(rs, thorough)}
	}
	return out
}
