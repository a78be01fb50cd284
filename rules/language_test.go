package rules_test

import (
	"io/fs"
	"net/netip"
	"path"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/rules"
)

// everyKey names every key of the language, and more than once where it has
// several forms.
const everyKey = `version = 1
include = ["conf.d/*.toml"]

[default]
input       = "reject"
published   = "ignore"
output      = "drop"
forward     = "drop"
established = "keep"
enforce     = false

[open.ssh]
service = "ssh"
from    = ["10.0.0.0/8", "@admins"]
rate    = { limit = "10/minute", burst = 7, per = "rule" }

[open.vendor]
ports       = ["5000-5010"]
protocol    = ["udp", "sctp"]
from        = ["192.0.2.0/24"]
except      = ["192.0.2.66", "@admins"]
to          = ["198.51.100.4"]
interfaces  = ["eth0"]
family      = "ipv4"
connections = 20
expires     = 2027-01-31T02:00:00+02:00
log         = true
comment     = "ticket 4711"
override    = false

[open.vpn]
protocol   = "any"
interfaces = ["wg0", "tun*"]

[open.routing]
protocol = ["esp", 89, "ah"]
from     = "10.0.0.0/8"
family   = "ipv4"

[open.metrics]
service  = ["metrics", "domain"]
protocol = "tcp"
from     = "@admins"

[block.scanners]
from = ["@blocklist"]

[block.smb]
ports      = 445
service    = []
protocol   = "tcp"
except     = "10.0.0.0/8"
to         = "198.51.100.4"
interfaces = "eth0"
family     = "ipv4"
expires    = 2027-01-31T00:00:00Z
log        = true
comment    = "noise"
override   = false

[set.admins]
addresses = ["198.51.100.7", "2001:db8::/48"]
override  = false
[set.resolvers]
addresses = ["192.0.2.53"]
[set.blocklist]
files    = ["lists/*.txt"]
optional = true

[service.metrics]
ports    = [9100, "9400-9410"]
protocol = ["tcp", "udp"]
override = false

[published]
interfaces = ["docker0"]
[icmp]
echo = { limit = "10/second", burst = 20, per = "source" }
[dhcp]
client = "eth0"
[log]
dropped = { limit = "5/second", burst = 20 }
prefix  = "gate"
group   = 0
knocks  = false

[egress.dns]
ports      = [53]
service    = "x"
protocol   = ["udp", "tcp"]
to         = ["@resolvers"]
interfaces = "eth0"
family     = "ipv4"
user       = "systemd-resolve"
group      = 101
expires    = 2027-01-31T00:00:00Z
log        = true
comment    = "names"
override   = false

[failsafe]
ports      = [22]
service    = "x"
protocol   = "tcp"
from       = ["10.0.0.0/8"]
interfaces = "eth0"

[verify]
vantage  = "ssh://probe@bastion:2222"
thorough = 2

[[expect]]
from  = "198.51.100.9"
to    = "198.51.100.4"
in    = "eth0"
port  = "5432/tcp"
state = "filtered"

[[expect]]
from  = "2001:db8::1"
port  = "icmpv6"
state = "open"
`

// exclusive are the lines of everyKey that do not go with their neighbours.
func withoutExclusive(src string) string {
	for _, line := range []string{"service    = []\n", "service    = \"x\"\n"} {
		src = strings.ReplaceAll(src, line, "")
	}
	return src
}

// memory is a directory in memory. Names are relative to it.
type memory map[string]string

func (m memory) Glob(pattern string) ([]string, error) {
	var out []string
	for name := range m {
		ok, err := path.Match(pattern, name)
		if err != nil {
			return nil, err
		}
		if ok {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out, nil
}

func (m memory) ReadFile(name string) ([]byte, error) {
	text, ok := m[name]
	switch {
	case !ok:
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	case text == "(secret)\n":
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return []byte(text), nil
}

func TestParseEverything(t *testing.T) {
	p, problems := rules.Parse("/etc/d/policy.toml", []byte(withoutExclusive(everyKey)), memory{
		"conf.d/b.toml":  "[open.b]\nports = 2\n[set.b]\naddresses = \"203.0.115.1\"\n[block.b]\nfrom = \"@b\"\n",
		"conf.d/a.toml":  "[open.a]\nports = 1\n",
		"lists/one.txt":  "# one\n\n203.0.113.0/24 # net\r\n2001:db8:1::/48\n198.51.100.0-198.51.100.9\n",
		"lists/two.txt":  "203.0.114.7\n",
		"lists/not.toml": "x",
	})
	for _, problem := range problems {
		t.Error(problem)
	}
	if p == nil {
		t.Fatal("no policy")
	}
	checkValid(t, p)
	port := func(p rules.Protocol, lo, hi uint16) rules.ProtoPorts {
		return rules.ProtoPorts{Protocol: p, Ports: []rules.PortRange{{Lo: lo, Hi: hi}}}
	}
	from := func(ranges ...string) rules.Source { return rules.Source{Ranges: addrs(t, ranges...)} }
	sets := func(names ...string) rules.Source { return rules.Source{Sets: names} }
	at := func(name string) rules.Pos {
		before, _, _ := strings.Cut(withoutExclusive(everyKey), name)
		return rules.Pos{File: "/etc/d/policy.toml", Line: strings.Count(before, "\n") + 1, Column: len(before) - strings.LastIndex(before, "\n")}
	}
	named := func(kind, name string) rules.Pos {
		p := at("[" + kind + "." + name + "]")
		p.Column += len(kind) + 2
		return p
	}
	anyone := rules.Source{Any: true}
	end := time.Date(2027, 1, 31, 0, 0, 0, 0, time.UTC)
	group := uint16(0)
	want := rules.Policy{
		File:    "/etc/d/policy.toml",
		Files:   []string{"/etc/d/policy.toml", "/etc/d/conf.d/a.toml", "/etc/d/conf.d/b.toml", "/etc/d/lists/one.txt", "/etc/d/lists/two.txt"},
		Default: rules.Default{Input: rules.Reject, Output: rules.Drop, IgnorePublished: true, DropForward: true, KeepFlows: true, Observe: true, Pos: at(`"reject"`)},
		Open: []rules.Open{
			{
				Traffic: rules.Traffic{Name: "ssh", Pos: named("open", "ssh"), On: []rules.ProtoPorts{port(rules.TCP, 22, 22)},
					From: rules.Source{Ranges: addrs(t, "10.0.0.0-10.255.255.255"), Sets: []string{"admins"}}, To: anyone},
				Rate: &rules.Rate{Limit: 10, Per: time.Minute, Burst: 7},
			},
			{
				Traffic: rules.Traffic{Name: "vendor", Pos: named("open", "vendor"),
					On:   []rules.ProtoPorts{port(rules.UDP, 5000, 5010), port(rules.SCTP, 5000, 5010)},
					From: from("192.0.2.0-192.0.2.255"), Except: rules.Source{Ranges: addrs(t, "192.0.2.66"), Sets: []string{"admins"}}, To: from("198.51.100.4"),
					Interfaces: []string{"eth0"}, Family: rules.IPv4, Expires: end, Log: true, Comment: "ticket 4711"},
				Connections: 20,
			},
			{Traffic: rules.Traffic{Name: "vpn", Pos: named("open", "vpn"), Any: true, From: anyone, To: anyone, Interfaces: []string{"wg0", "tun*"}}},
			{Traffic: rules.Traffic{Name: "routing", Pos: named("open", "routing"), On: []rules.ProtoPorts{{Protocol: rules.ESP}, {Protocol: rules.AH}, {Protocol: 89}},
				From: from("10.0.0.0-10.255.255.255"), To: anyone, Family: rules.IPv4}},
			{Traffic: rules.Traffic{Name: "metrics", Pos: named("open", "metrics"),
				On:   []rules.ProtoPorts{{Protocol: rules.TCP, Ports: []rules.PortRange{{Lo: 53, Hi: 53}, {Lo: 9100, Hi: 9100}, {Lo: 9400, Hi: 9410}}}},
				From: sets("admins"), To: anyone}},
			{Traffic: rules.Traffic{Name: "a", Pos: rules.Pos{File: "/etc/d/conf.d/a.toml", Line: 1, Column: 7}, On: []rules.ProtoPorts{port(rules.TCP, 1, 1)}, From: anyone, To: anyone}},
			{Traffic: rules.Traffic{Name: "b", Pos: rules.Pos{File: "/etc/d/conf.d/b.toml", Line: 1, Column: 7}, On: []rules.ProtoPorts{port(rules.TCP, 2, 2)}, From: anyone, To: anyone}},
		},
		Block: []rules.Block{
			{Traffic: rules.Traffic{Name: "scanners", Pos: named("block", "scanners"), Any: true, From: sets("blocklist"), To: anyone}},
			{Traffic: rules.Traffic{Name: "smb", Pos: named("block", "smb"), On: []rules.ProtoPorts{port(rules.TCP, 445, 445)}, From: anyone,
				Except: from("10.0.0.0-10.255.255.255"), To: from("198.51.100.4"), Interfaces: []string{"eth0"}, Family: rules.IPv4, Expires: end, Log: true, Comment: "noise"}},
			{Traffic: rules.Traffic{Name: "b", Pos: rules.Pos{File: "/etc/d/conf.d/b.toml", Line: 5, Column: 8}, Any: true, From: sets("b"), To: anyone}},
		},
		Egress: []rules.Egress{{
			Traffic: rules.Traffic{Name: "dns", Pos: named("egress", "dns"), On: []rules.ProtoPorts{port(rules.TCP, 53, 53), port(rules.UDP, 53, 53)},
				From: anyone, To: sets("resolvers"), Interfaces: []string{"eth0"}, Family: rules.IPv4, Expires: end, Log: true, Comment: "names"},
			User: "systemd-resolve", Group: "101",
		}},
		Sets: []rules.AddressSet{
			{Name: "admins", Pos: named("set", "admins"), Ranges: rules.RangesOf(addrs(t, "198.51.100.7", "2001:db8::-2001:db8:0:ffff:ffff:ffff:ffff:ffff")...)},
			{Name: "resolvers", Pos: named("set", "resolvers"), Ranges: rules.RangesOf(addrs(t, "192.0.2.53")...)},
			{Name: "blocklist", Pos: named("set", "blocklist"), Files: []string{"/etc/d/lists/one.txt", "/etc/d/lists/two.txt"},
				Ranges: rules.RangesOf(addrs(t, "198.51.100.0-198.51.100.9", "203.0.113.0-203.0.113.255", "203.0.114.7", "2001:db8:1::-2001:db8:1:ffff:ffff:ffff:ffff:ffff")...)},
			{Name: "b", Pos: rules.Pos{File: "/etc/d/conf.d/b.toml", Line: 3, Column: 6}, Ranges: rules.RangesOf(addrs(t, "203.0.115.1")...)},
		},
		Published: rules.Published{Interfaces: []string{"docker0"}},
		ICMP:      rules.ICMP{Echo: true, Rate: &rules.Rate{Limit: 10, Per: time.Second, Burst: 20, PerSource: true}, Pos: at(`{ limit = "10/second"`)},
		DHCP:      rules.DHCP{Client: true, Interfaces: []string{"eth0"}, Pos: at("\"eth0\"\n[log]")},
		Log:       rules.Log{Dropped: true, Rate: &rules.Rate{Limit: 5, Per: time.Second, Burst: 20}, Prefix: "gate", Group: &group},
		Failsafe:  &rules.Failsafe{Pos: at("failsafe]"), On: []rules.ProtoPorts{port(rules.TCP, 22, 22)}, From: from("10.0.0.0-10.255.255.255"), Interfaces: []string{"eth0"}},
		Verify:    rules.Verify{Vantage: "ssh://probe@bastion:2222", Thorough: 2},
		Expect: []rules.Expect{
			{
				Pos:    at("[[expect]]"),
				Packet: rules.Packet{In: "eth0", Src: netip.MustParseAddr("198.51.100.9"), Dst: netip.MustParseAddr("198.51.100.4"), Protocol: rules.TCP, DstPort: 5432},
				State:  rules.OutcomeFiltered,
			},
			{
				Pos:    at("[[expect]]\nfrom  = \"2001"),
				Packet: rules.Packet{Src: netip.MustParseAddr("2001:db8::1"), Protocol: rules.ICMPv6, ICMPType: 128},
				State:  rules.OutcomeOpen,
			},
		},
	}
	if diff := cmp.Diff(want, *p, comparePolicies); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
}

// A file has one name, however it is written, and is read once.
func TestParseFileNames(t *testing.T) {
	src := "version = 1\ninclude = [\"/etc/d/a.toml\", \"./a.toml\", \"a.toml\", \"../d/a.toml\", \"*.toml\"]\n" +
		"[set.s]\nfiles = [\"/srv/list\", \"list\", \"./list\"]\n[block.s]\nfrom = \"@s\"\n"
	p, problems := rules.Parse("/etc/d/policy.toml", []byte(src), memory{
		"/etc/d/a.toml": "[open.a]\nports = 1\n", "policy.toml": src, "a.toml": "not read", "./a.toml": "nor this",
		"/srv/list": "192.0.2.1\n", "list": "192.0.2.2\n", "./list": "not read\n",
	})
	if p == nil || len(problems) > 0 {
		t.Fatal(problems)
	}
	want := []string{"/etc/d/policy.toml", "/etc/d/a.toml", "/srv/list", "/etc/d/list"}
	if diff := cmp.Diff(want, p.Files); diff != "" {
		t.Errorf("differs (-want +got):\n%s", diff)
	}
}

// broken is a directory that cannot be read.
type broken struct{ err error }

func (b broken) Glob(string) ([]string, error)   { return nil, b.err }
func (b broken) ReadFile(string) ([]byte, error) { return nil, b.err }

func TestParseUnreadable(t *testing.T) {
	for _, err := range []error{&fs.PathError{Op: "read", Path: "x", Err: syscall.EISDIR}, syscall.EISDIR} {
		for _, src := range []string{"include = \"a.toml\"", "set.a.files = \"a.toml\"\nblock.a.from = \"@a\""} {
			p, problems := rules.Parse("p.toml", []byte("version = 1\n"+src), broken{err})
			if p != nil || len(problems) != 1 || problems[0].Summary != `read "a.toml": is a directory` {
				t.Errorf("got %v", problems)
			}
		}
	}
}
