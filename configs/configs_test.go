package configs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"deadlight/configs"
	"deadlight/rules"
)

// here reads what an example includes.
type here struct{}

func (here) Glob(pattern string) ([]string, error) { return filepath.Glob(pattern) }
func (here) ReadFile(name string) ([]byte, error)  { return os.ReadFile(name) }

// parse reads an example that must have no problem, not even a warning.
func parse(t *testing.T, name string) *rules.Policy {
	t.Helper()
	src, err := configs.Read(name)
	if err != nil {
		t.Fatal(err)
	}
	p, problems := rules.Parse(name+".toml", src, here{})
	if len(problems) > 0 || p == nil {
		var b strings.Builder
		if err := rules.Render(&b, problems, rules.Summary(problems)); err != nil {
			t.Error(err)
		}
		t.Fatal(b.String())
	}
	return p
}

func TestExamples(t *testing.T) {
	for _, name := range configs.Names() {
		t.Run(name, func(t *testing.T) {
			first, again := rules.Compile(parse(t, name)), rules.Compile(parse(t, name))
			if !reflect.DeepEqual(first.Table, again.Table) {
				t.Error("compiled twice, two tables")
			}
			var a, b bytes.Buffer
			now := time.Now()
			if err := errors.Join(first.Table.WriteNFT(&a, now), again.Table.WriteNFT(&b, now)); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(a.String(), b.String()); d != "" {
				t.Errorf("compiled twice, two texts:\n%s", d)
			}
		})
	}
}

// TestNames: all examples are embedded, and nothing else is.
func TestNames(t *testing.T) {
	want := []string{"bastion", "docker-host", "minimal", "reference", "webserver", "workstation"}
	if d := cmp.Diff(want, configs.Names()); d != "" {
		t.Errorf("names (- want, + got):\n%s", d)
	}
	for _, name := range want {
		disk, err := os.ReadFile(name + ".toml")
		if err != nil {
			t.Fatal(err)
		}
		for _, as := range []string{name, name + ".toml"} {
			if got, err := configs.Read(as); err != nil || !bytes.Equal(got, disk) {
				t.Errorf("Read(%q) differs from the file, error %v", as, err)
			}
		}
	}
	for _, name := range []string{"", "nothing", "../go.mod", "configs.go"} {
		if _, err := configs.Read(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Read(%q): %v, want fs.ErrNotExist", name, err)
		}
	}
}

// TestAddresses: what an admin forgets to replace must not admit a stranger, so
// that examples name only addresses that are nobody's on the Internet.
func TestAddresses(t *testing.T) {
	var nobodys []netip.Prefix
	for _, p := range []string{
		"192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", // RFC 5737, RFC 3849
		"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", // RFC 1918, RFC 3927
		"fc00::/7", "fe80::/10", // RFC 4193, RFC 4291
	} {
		nobodys = append(nobodys, netip.MustParsePrefix(p))
	}
	for _, name := range configs.Names() {
		p := parse(t, name)
		var ranges []rules.AddrRange
		for _, s := range p.Sets {
			ranges = slices.AppendSeq(ranges, s.Ranges.All())
		}
		for _, o := range p.Open {
			ranges = append(ranges, o.From.Ranges...)
		}
		for _, r := range ranges {
			if !slices.ContainsFunc(nobodys, func(p netip.Prefix) bool { return p.Contains(r.Lo) && p.Contains(r.Hi) }) {
				t.Errorf("%s.toml: %s is somebody's address", name, r)
			}
		}
	}
}

// TestSSH: whoever applies an example to a server keeps a way in, and strangers
// get none.
func TestSSH(t *testing.T) {
	admins := map[string]string{
		"minimal": "198.51.100.7", "webserver": "198.51.100.7", "bastion": "192.0.2.7", "docker-host": "10.10.0.7",
	}
	for name, admin := range admins {
		rs := rules.Compile(parse(t, name))
		for src, want := range map[string]rules.Outcome{admin: rules.OutcomeOpen, "9.9.9.9": rules.OutcomeFiltered} {
			d := rs.Decide(rules.Packet{
				In: "eth0", Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr("192.168.1.1"),
				Protocol: rules.TCP, SrcPort: 50000, DstPort: 22,
			})
			if d.Outcome != want {
				t.Errorf("%s.toml: 22/tcp from %s is %s, want %s", name, src, d.Outcome, want)
			}
		}
	}
}

// TestReferenceNamesEveryKey: reference.toml is where an admin looks a key up.
func TestReferenceNamesEveryKey(t *testing.T) {
	src, err := configs.Read("reference")
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	meta, err := toml.Decode(string(src), &values)
	if err != nil {
		t.Fatal(err)
	}
	written := map[string]bool{}
	for _, key := range meta.Keys() {
		if len(key) > 1 && slices.Contains([]string{"open", "block", "egress", "set", "service"}, key[0]) {
			key[1] = "*"
		}
		if key[0] == "expect" && len(key) > 1 {
			key = slices.Insert(key, 1, "*")
		}
		written[strings.Join(key, ".")] = true
	}
	for _, key := range rules.Keys() {
		leaf := key[strings.LastIndex(key, ".")+1:]
		if strings.HasPrefix(key, "icmp.echo.") || strings.HasPrefix(key, "log.dropped.") || key == "failsafe.service" {
			// Of these the other form is written, and a comment shows this one.
			if !regexp.MustCompile(`(?m)^#.*\b` + leaf + ` = `).Match(src) {
				t.Errorf("no comment of reference.toml shows %s", key)
			}
			continue
		}
		if !written[key] {
			t.Errorf("reference.toml lacks %s", key)
		}
		if strings.HasPrefix(key, "open.*.rate.") {
			continue // the comment above rate explains them
		}
		if !regexp.MustCompile(`(?m)^#.*\n` + leaf + ` += `).Match(src) {
			t.Errorf("reference.toml does not explain %s in a comment above it", key)
		}
	}
}

// TestReferenceDefaults: where reference.toml need not name something of its
// own, it shows the default.
func TestReferenceDefaults(t *testing.T) {
	got, want := parse(t, "reference"), rules.DefaultPolicy()
	if got.Default.Input != want.Default.Input || got.ICMP.Echo != want.ICMP.Echo || got.DHCP.Client != want.DHCP.Client ||
		len(got.DHCP.Interfaces) > 0 || !slices.Equal(got.Published.Interfaces, want.Published.Interfaces) {
		t.Errorf("reference.toml shows %v %v %v %v, the defaults are %v %v %v %v",
			got.Default.Input, got.ICMP.Echo, got.DHCP, got.Published, want.Default.Input, want.ICMP.Echo, want.DHCP, want.Published)
	}
}

// TestReferenceRestrictions: trying reference.toml tries every kind of restriction.
func TestReferenceRestrictions(t *testing.T) {
	missing := map[string]bool{"port range": true, "udp": true, "family": true, "set": true, "interface": true, "interface*": true}
	for _, f := range []string{" IPv4", " IPv6"} {
		for _, kind := range []string{"address", "network or range", "set with"} {
			missing[kind+f] = true
		}
	}
	p := parse(t, "reference")
	sources := func(ranges []rules.AddrRange, in bool) {
		for _, r := range ranges {
			family := " IPv6"
			if r.Lo.Is4() {
				family = " IPv4"
			}
			switch {
			case in:
				delete(missing, "set with"+family)
			case r.Lo == r.Hi:
				delete(missing, "address"+family)
			default:
				delete(missing, "network or range"+family)
			}
		}
	}
	for _, o := range p.Open {
		sources(o.From.Ranges, false)
		for _, name := range o.From.Sets {
			delete(missing, "set")
			sources(slices.Collect(p.Set(name).Ranges.All()), true)
		}
		for _, name := range o.Interfaces {
			if strings.HasSuffix(name, "*") {
				delete(missing, "interface*")
			} else {
				delete(missing, "interface")
			}
		}
		if o.Family != rules.Both {
			delete(missing, "family")
		}
		for _, on := range o.On {
			if on.Protocol == rules.UDP {
				delete(missing, "udp")
			}
			for _, r := range on.Ports {
				if r.Lo < r.Hi {
					delete(missing, "port range")
				}
			}
		}
	}
	for kind := range missing {
		t.Errorf("reference.toml has no %s", kind)
	}
}

// TestReadme: an example that nobody is told of helps nobody.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join("..", "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range configs.Names() {
		if file := "configs/" + name + ".toml"; !bytes.Contains(readme, []byte(file)) {
			t.Errorf("README.md does not mention %s", file)
		}
	}
}

// TestStarter: the policy that packages install shuts nobody out who comes by
// SSH, opens nothing else, and does not pass over in silence that everyone may
// come. Who has never changed it gets the next one by an upgrade: so it may never
// open or close anything else than it does here.
func TestStarter(t *testing.T) {
	src, err := os.ReadFile("etc/policy.toml")
	if err != nil {
		t.Fatal(err)
	}
	p, problems := rules.Parse("etc/policy.toml", src, here{})
	if p == nil || len(problems) != 1 || problems[0].Severity != rules.Warning || problems[0].Summary != "open to the whole world: 22 (ssh)" {
		t.Fatalf("problems: %v", problems)
	}
	for name, rs := range map[string]*rules.Ruleset{"policy": rules.Compile(p), "lock-down": rules.Compile(rules.LockDown(p))} {
		for _, a := range [][2]string{{"9.9.9.9", "192.0.2.1"}, {"2001:db8:9::9", "2001:db8:1::1"}} {
			for _, protocol := range []rules.Protocol{rules.TCP, rules.UDP} {
				for port := 1; port <= 65535; port++ {
					want := rules.OutcomeFiltered
					if protocol == rules.TCP && port == 22 {
						want = rules.OutcomeOpen
					}
					d := rs.Decide(rules.Packet{
						In: "eth0", Src: netip.MustParseAddr(a[0]), Dst: netip.MustParseAddr(a[1]),
						Protocol: protocol, SrcPort: 50000, DstPort: uint16(port),
					})
					if d.Outcome != want {
						t.Fatalf("%s: %d of protocol %v from %s is %s, want %s", name, port, protocol, a[0], d.Outcome, want)
					}
				}
			}
		}
	}
}
