package importer

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// tupleComment reads what ufw notes before the rules that it makes: the comment,
// or else the application profile.
func tupleComment(tuple string) string {
	f := strings.Fields(tuple)
	comment := ""
	if n := len(f); n > 0 {
		if c, ok := strings.CutPrefix(f[n-1], "comment="); ok {
			if b, err := hex.DecodeString(c); err == nil {
				comment = string(b)
			}
			f = f[:n-1]
		}
	}
	if len(f) >= 8 { // action protocol dport dst sport src dapp sapp direction
		for _, app := range f[6:8] {
			if app = strings.ReplaceAll(app, "%20", " "); app != "-" && comment == "" {
				comment = app
			}
		}
	}
	return comment
}

// ufwFiles are the files of /etc/ufw that hold rules, in the order in which ufw
// loads them. %s is "" or "6".
func ufwFiles() [3]string { return [3]string{"before%s.rules", "after%s.rules", "user%s.rules"} }

// readUFW reads a directory of ufw. dir is its name for messages, defaults the
// text of /etc/default/ufw.
func readUFW(read func(name string) ([]byte, error), dir, defaultsName string, defaults []byte) (*ruleset, error) {
	set := newRuleset("ufw")
	policies := map[string]string{"INPUT": "DROP", "OUTPUT": "ACCEPT", "FORWARD": "DROP"}
	ipv6 := true
	if defaults == nil {
		set.note("", 0, "", "%s is not there: taken are ufw's own defaults, incoming denied, outgoing allowed, routed denied", defaultsName)
	}
	line := 0
	for text := range strings.Lines(string(defaults)) {
		line++
		key, value, ok := strings.Cut(strings.TrimSpace(text), "=")
		value = strings.Trim(value, `"' `)
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		switch key {
		case "IPV6":
			ipv6 = strings.EqualFold(value, "yes")
		case "DEFAULT_INPUT_POLICY", "DEFAULT_OUTPUT_POLICY", "DEFAULT_FORWARD_POLICY":
			if value != "ACCEPT" && value != "DROP" && value != "REJECT" {
				return nil, parseError(defaultsName, line, "unknown policy %q", plain(value, 40))
			}
			policies[strings.TrimSuffix(strings.TrimPrefix(key, "DEFAULT_"), "_POLICY")] = value
		}
	}
	if b, err := read("ufw.conf"); err == nil && !ufwEnabled(b) {
		set.note(joined(dir, "ufw.conf"), 1, "", "ufw is disabled: the policy says what it would do when enabled")
	}
	for _, name := range []string{"before.init", "after.init"} {
		if b, err := read(name); err == nil && !bytes.Contains(b, []byte("# typically required")) && len(bytes.TrimSpace(b)) > 0 {
			set.note(joined(dir, name), 1, "", "what this script loads is not read")
		}
	}
	found := false
	for _, v4 := range []bool{true, false} {
		six := map[bool]string{true: "", false: "6"}[v4]
		p := &iptables{set: set, file: dir, v4: v4, frame: true}
		if err := p.read([]byte(ufwFrame("ufw"+six, policies, v4 || ipv6))); err != nil {
			return nil, fmt.Errorf("ufw's own chains: %w", err)
		}
		if !v4 && !ipv6 {
			continue
		}
		for _, pattern := range ufwFiles() {
			name := fmt.Sprintf(pattern, six)
			b, err := read(name)
			if errors.Is(err, fs.ErrPermission) { // without these rules everything would look shut
				return nil, readError(joined(dir, name), err)
			}
			if err != nil {
				set.note("", 0, "", "%s cannot be read: what it holds is not imported", joined(dir, name))
				continue
			}
			found = true
			p.file, p.hint, p.frame = joined(dir, name), "", false
			if err := p.read(b); err != nil {
				return nil, err
			}
			if strings.HasPrefix(pattern, "user") { // ufw hooks them in last
				p.file, p.hint, p.frame = dir, "", true
				for _, hook := range []string{"input", "output", "forward"} {
					hooked := fmt.Sprintf("*filter\n-A ufw%s-before-%s -j ufw%s-user-%s\nCOMMIT", six, hook, six, hook)
					if err := p.read([]byte(hooked)); err != nil {
						return nil, err
					}
				}
			}
		}
	}
	for _, b := range set.bases {
		b.file, b.line = defaultsName, 0
	}
	if !found {
		return nil, fmt.Errorf("%s holds none of ufw's rules", dir)
	}
	return set, nil
}

// ufwFrame is the chains that ufw-init makes around the rules in the files.
func ufwFrame(prefix string, policies map[string]string, on bool) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("*filter")
	for _, hook := range []string{"INPUT", "OUTPUT", "FORWARD"} {
		policy := policies[hook]
		kernel := policy
		if policy == "REJECT" || !on {
			kernel = "DROP"
		}
		line(":%s %s", hook, kernel)
		if !on {
			line("-A %s -%c lo -j ACCEPT", hook, map[bool]rune{true: 'o', false: 'i'}[hook == "OUTPUT"])
			continue
		}
		low := strings.ToLower(hook)
		for _, stage := range []string{"before-logging", "before", "after", "after-logging", "reject", "track"} {
			line(":%s-%s-%s -", prefix, stage, low)
			line("-A %s -j %s-%s-%s", hook, prefix, stage, low)
		}
		for _, c := range []string{"user", "user-logging", "skip-to-policy"} {
			line(":%s-%s-%s -", prefix, c, low)
		}
		line("-A %s-skip-to-policy-%s -j %s", prefix, low, policy)
		switch policy {
		case "REJECT":
			line("-A %s-reject-%s -j REJECT", prefix, low)
		case "ACCEPT":
			line("-A %s-track-%s -p tcp -m conntrack --ctstate NEW -j ACCEPT", prefix, low)
			line("-A %s-track-%s -p udp -m conntrack --ctstate NEW -j ACCEPT", prefix, low)
		}
	}
	if on {
		for _, c := range []string{"logging-deny", "logging-allow", "user-limit", "user-limit-accept"} {
			line(":%s-%s -", prefix, c)
		}
	}
	line("COMMIT")
	return b.String()
}

func joined(dir, name string) string { return filepath.Join(dir, name) }
