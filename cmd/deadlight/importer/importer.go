package importer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"deadlight/rules"
)

// Formats are the names of what can be read.
func Formats() []string { return []string{"ufw", "firewalld", "iptables", "nft"} }

// Options say how to read.
type Options struct {
	Format string // one of Formats; "" tells it by the content
	Family string // "ipv4" or "ipv6": what iptables text is for; "" tells it by the content
	Stdin  io.Reader
}

// Policy is what was made of the rules of another firewall.
type Policy struct {
	Format string
	Text   string // the policy
	Notes  []Note // what it does not say as the original did
}

// source is a file that was read.
type source struct {
	name string
	data []byte
}

// maxFile is more than any of these files has.
const maxFile = 256 << 20

// Import reads files or directories ("-" is Options.Stdin) of one firewall and
// makes a policy of them.
func Import(names []string, o Options) (*Policy, error) {
	set, err := load(names, o)
	if err != nil {
		return nil, err
	}
	p, err := convert(set)
	if err != nil {
		return nil, err
	}
	out := &Policy{Format: set.format, Notes: gather(p.notes)}
	p.notes = out.Notes
	out.Text = p.text()
	// What we print must be a policy, whatever names and comments came in.
	if parsed, problems := rules.Parse("policy.toml", []byte(out.Text), nil); parsed == nil {
		var b strings.Builder
		_ = rules.Render(&b, problems, "") // a Builder takes everything
		return nil, fmt.Errorf("the policy that was made is not valid, which is a bug of deadlight:\n%s", b.String())
	}
	return out, nil
}

// gather makes one note of many that say the same of several lines, such as those
// for IPv4 and for IPv6.
func gather(notes []Note) []Note {
	var out []Note
	file := map[int]string{} // that the last place of a note is in
	for _, n := range notes {
		i := slices.IndexFunc(out, func(o Note) bool {
			return o.Reason == n.Reason && n.Line > 0 && o.Line > 0 && (o.File != n.File || o.Line != n.Line)
		})
		if i < 0 {
			file[len(out)] = n.File
			out = append(out, n)
			continue
		}
		o, where := &out[i], fmt.Sprintf("%s:%d", n.File, n.Line)
		switch {
		case o.Also == "" && n.File == o.File:
			where = fmt.Sprintf("line %d", n.Line)
		case n.File == file[i]:
			where = fmt.Sprint(n.Line)
		}
		if o.Also != "" {
			o.Also += ", "
		}
		o.Also += where
		file[i] = n.File
	}
	return out
}

func load(names []string, o Options) (*ruleset, error) {
	if len(names) == 1 && names[0] != "-" {
		info, err := os.Stat(names[0])
		if err != nil {
			return nil, readError(names[0], err)
		}
		if info.IsDir() {
			return loadDir(names[0], o)
		}
	}
	var list []source
	for _, name := range names {
		s, err := readSource(name, o.Stdin)
		if err != nil {
			return nil, err
		}
		list = append(list, s)
	}
	format := o.Format
	for _, s := range list {
		is := detect(s)
		switch {
		case o.Format != "" || is == "ipset":
		case is == "":
			return nil, fmt.Errorf("%s: this is none of %s", s.name, strings.Join(Formats(), ", "))
		case format != "" && is != format:
			return nil, fmt.Errorf("%s: this is %s, and the files before are %s: import one firewall at a time", s.name, is, format)
		default:
			format = is
		}
	}
	switch format {
	case "iptables":
		return loadIptables(list, o)
	case "ufw":
		return loadUFWFiles(list)
	case "nft":
		if len(list) > 1 {
			return nil, errors.New("one list of nft is all there is: import it alone")
		}
		return loadNFT(list[0])
	}
	return nil, fmt.Errorf("%s is read from a directory, such as /etc/%s", format, format)
}

func readError(name string, err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err
	}
	return fmt.Errorf("read %s: %w", name, err)
}

func readSource(name string, stdin io.Reader) (source, error) {
	if name == "-" {
		b, err := io.ReadAll(io.LimitReader(stdin, maxFile))
		if err != nil {
			return source{}, readError("standard input", err)
		}
		return source{"stdin", b}, nil
	}
	info, err := os.Stat(name)
	if err == nil && info.IsDir() {
		err = errors.New("a directory stands alone")
	}
	if err == nil && info.Size() > maxFile {
		err = fmt.Errorf("larger than %d MiB", maxFile>>20)
	}
	if err != nil {
		return source{}, readError(name, err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return source{}, readError(name, err)
	}
	return source{name, b}, nil
}

// detect tells a format by its content, "" if it is none.
func detect(s source) string {
	text := bytes.TrimSpace(s.data)
	switch {
	case bytes.HasPrefix(text, []byte("{")):
		return "nft"
	case bytes.Contains(text, []byte("### tuple ###")), bytes.Contains(text, []byte("ufw-user-input")) && bytes.Contains(text, []byte("### RULES ###")):
		return "ufw"
	case bytes.HasPrefix(text, []byte("create ")) && !bytes.Contains(text, []byte("\n*")):
		return "ipset"
	}
	for line := range bytes.Lines(text) {
		if line = bytes.TrimSpace(line); len(line) > 1 && line[0] == '*' {
			return "iptables"
		}
	}
	return ""
}

func loadDir(dir string, o Options) (*ruleset, error) {
	has := func(name string) bool {
		_, err := os.Stat(filepath.Join(dir, name))
		return err == nil
	}
	format := o.Format
	if format == "" {
		switch {
		case has("user.rules") || has("before.rules"):
			format = "ufw"
		case has("zones") || has("firewalld.conf"):
			format = "firewalld"
		case has("rules.v4") || has("rules.v6"):
			format = "iptables"
		}
	}
	switch format {
	case "ufw":
		defaults := filepath.Join(filepath.Dir(filepath.Clean(dir)), "default", "ufw")
		text, err := os.ReadFile(defaults)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, readError(defaults, err)
		}
		return readUFW(func(name string) ([]byte, error) { return os.ReadFile(filepath.Join(dir, name)) }, dir, defaults, text)
	case "firewalld":
		return loadFirewalld(dir)
	case "iptables":
		var names []string
		for _, n := range []string{"rules.v4", "rules.v6"} {
			if has(n) {
				names = append(names, filepath.Join(dir, n))
			}
		}
		if len(names) > 0 {
			return load(names, o)
		}
	}
	return nil, fmt.Errorf("%s: neither ufw's nor firewalld's directory", dir)
}

// loadUFWFiles reads user.rules and its like given one by one.
func loadUFWFiles(list []source) (*ruleset, error) {
	byName := map[string]source{}
	dir := filepath.Dir(list[0].name)
	for _, s := range list {
		name := filepath.Base(s.name)
		if !slices.Contains([]string{"user.rules", "user6.rules", "before.rules", "before6.rules", "after.rules", "after6.rules"}, name) {
			name = "user.rules"
			if bytes.Contains(s.data, []byte("ufw6-")) {
				name = "user6.rules"
			}
		}
		if _, twice := byName[name]; twice {
			return nil, fmt.Errorf("%s: two files stand for ufw's %s", s.name, name)
		}
		byName[name] = s
	}
	return readUFW(func(name string) ([]byte, error) {
		if s, ok := byName[name]; ok {
			return s.data, nil
		}
		return nil, fs.ErrNotExist
	}, dir, "/etc/default/ufw", nil)
}

func loadIptables(list []source, o Options) (*ruleset, error) {
	set := newRuleset("iptables")
	sets := map[string]addrs{}
	for _, s := range list {
		if detect(s) == "ipset" {
			if err := readIPSet(s, sets, set); err != nil {
				return nil, err
			}
		}
	}
	for _, s := range list {
		if detect(s) == "ipset" {
			continue
		}
		for _, part := range splitFamilies(s, o.Family) {
			if part.family == 0 {
				return nil, fmt.Errorf("%s: nothing in it tells whether it is for IPv4 or IPv6", s.name)
			}
			v4 := part.family == 4
			if set.families[map[bool]int{true: 0, false: 1}[v4]] {
				return nil, fmt.Errorf("%s: the rules for IPv%d were read already", s.name, part.family)
			}
			p := &iptables{set: set, file: s.name, v4: v4, ipset: sets}
			if err := p.read(part.data); err != nil {
				return nil, err
			}
		}
	}
	for name := range set.chains {
		for _, word := range []string{" DOCKER", " KUBE-", " CNI-", " NETAVARK"} {
			set.docker = set.docker || strings.Contains(name, word)
		}
	}
	return set, nil
}

// familyPart is the part of a file that is for one family; lines before it are
// blank, so that numbers stay.
type familyPart struct {
	family int // 4, 6, or 0 if nothing tells
	data   []byte
}

// splitFamilies parts what iptables-save and ip6tables-save wrote into one file.
func splitFamilies(s source, forced string) []familyPart {
	var parts []familyPart
	var cur *familyPart
	lines := 0
	begin := func(family int) {
		if cur != nil && cur.family == family {
			return
		}
		parts = append(parts, familyPart{family, bytes.Repeat([]byte("\n"), lines)})
		cur = &parts[len(parts)-1]
	}
	for line := range bytes.Lines(s.data) {
		if bytes.HasPrefix(line, []byte("# Generated by ip")) {
			if bytes.HasPrefix(line, []byte("# Generated by ip6tables")) {
				begin(6)
			} else {
				begin(4)
			}
		} else if cur == nil && !bytes.HasPrefix(bytes.TrimSpace(line), []byte("#")) && len(bytes.TrimSpace(line)) > 0 {
			begin(0)
		}
		if cur != nil {
			cur.data = append(cur.data, line...)
		}
		lines++
	}
	for i := range parts {
		if parts[i].family == 0 {
			parts[i].family = guessFamily(s.name, parts[i].data)
		}
		if forced != "" {
			parts[i].family = map[string]int{"ipv4": 4, "ipv6": 6}[forced]
		}
	}
	return parts
}

// guessFamily tells it by addresses and types, else by the name of the file.
func guessFamily(name string, data []byte) int {
	for line := range strings.Lines(string(data)) {
		w, err := splitWords(strings.TrimSpace(line))
		if err != nil {
			continue
		}
		for i := 1; i < len(w); i++ {
			switch w[i-1] {
			case "-s", "-d", "--source", "--destination":
				if a, ok := oneAddress(strings.Split(w[i], ",")[0]); ok {
					return map[bool]int{true: 4, false: 6}[a.lo.Is4()]
				}
			case "-p":
				if w[i] == "icmpv6" || w[i] == "ipv6-icmp" {
					return 6
				}
				if w[i] == "icmp" {
					return 4
				}
			case "--reject-with":
				if strings.HasPrefix(w[i], "icmp6-") {
					return 6
				}
				if strings.HasPrefix(w[i], "icmp-") {
					return 4
				}
			}
		}
	}
	switch base := filepath.Base(name); {
	case strings.Contains(base, "v6") || strings.Contains(base, "ip6"):
		return 6
	case strings.Contains(base, "v4") || base == "iptables" || strings.Contains(base, "iptables.") || strings.HasPrefix(base, "iptables-"):
		return 4
	}
	return 0
}

// readIPSet reads the text of ipset save.
func readIPSet(s source, sets map[string]addrs, set *ruleset) error {
	lines := map[string][]interval[netip.Addr]{}
	odd := map[string]bool{}
	n := 0
	for text := range strings.Lines(string(s.data)) {
		n++
		f := strings.Fields(text)
		switch {
		case len(f) == 0 || strings.HasPrefix(f[0], "#"):
		case f[0] == "create" && len(f) > 2:
			odd[f[1]] = f[2] != "hash:ip" && f[2] != "hash:net" || slices.Contains(f, "timeout")
			lines[f[1]] = nil
		case f[0] == "add" && len(f) > 2:
			i, ok := addressRange(f[2])
			if !ok || len(f) > 3 && f[3] != "comment" {
				odd[f[1]] = true // more than an address: the set as a whole is not known
				continue
			}
			lines[f[1]] = append(lines[f[1]], i)
		default:
			return parseError(s.name, n, "%q is not of ipset save", plain(text, 60))
		}
	}
	for name, list := range lines {
		if !odd[name] {
			sets[name] = union(list...)
			set.sets = append(set.sets, namedSet{name, sets[name]})
		}
	}
	slices.SortFunc(set.sets, func(a, b namedSet) int { return strings.Compare(a.name, b.name) })
	return nil
}

// loadFirewalld reads a directory over firewalld's own: that beside it, if it is
// part of a whole system, else that of this machine.
func loadFirewalld(dir string) (*ruleset, error) {
	builtin := filepath.Join(filepath.Dir(filepath.Dir(filepath.Clean(dir))), "usr", "lib", "firewalld")
	if _, err := os.Stat(builtin); err != nil {
		builtin = "/usr/lib/firewalld"
	}
	p := &firewalld{
		read: func(name string) (string, []byte, error) {
			if !filepath.IsLocal(name) {
				return "", nil, fs.ErrNotExist
			}
			for _, d := range []string{dir, builtin} {
				file := filepath.Join(d, name)
				b, err := os.ReadFile(file)
				if !errors.Is(err, fs.ErrNotExist) {
					if err != nil {
						err = readError(file, err)
					}
					return file, b, err
				}
			}
			return "", nil, fs.ErrNotExist
		},
		list: func(sub string) ([]string, error) {
			entries, err := os.ReadDir(filepath.Join(dir, sub))
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil
			}
			if err != nil {
				return nil, readError(filepath.Join(dir, sub), err)
			}
			var out []string
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".xml") {
					out = append(out, e.Name())
				}
			}
			return out, nil
		},
	}
	return p.load(dir)
}
