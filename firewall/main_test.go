package firewall

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"deadlight/rules"
	"deadlight/verify"
)

// TestMain moves the whole test binary into namespaces of its own: no test can
// reach the machine's firewall.
func TestMain(m *testing.M) {
	if os.Getenv(askEnv) != "" {
		fmt.Fprintln(os.Stderr, becomeProgram()) // does not return
		os.Exit(1)
	}
	if where := os.Getenv(trafficEnv); where != "" {
		if err := runTraffic(where); err != nil {
			fmt.Fprintln(os.Stderr, "traffic:", err)
			os.Exit(1)
		}
		return
	}
	if !verify.Isolated() {
		code, err := verify.Isolate(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		if err != nil {
			fmt.Fprintln(os.Stderr, "firewall tests need namespaces:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := verify.EnterIsolated(); err != nil {
		fmt.Fprintln(os.Stderr, "firewall tests need namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// inNamespace runs fn on a thread in a fresh network namespace; programs that
// fn starts run there too.
func inNamespace(t *testing.T, fn func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends here, and its namespace with it
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("new network namespace: %v", err)
			return
		}
		fn(t)
	}()
	<-done
}

// dial opens a Conn in the namespace of the calling thread.
func dial(t *testing.T) *Conn {
	t.Helper()
	c, err := Dial(nil)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// nft runs the independent witness and gives what it printed.
func nft(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func listTable(t *testing.T) string {
	t.Helper()
	return nft(t, "list", "table", "inet", "deadlight")
}

// blocks is the table with its sets, chains and counters in order of name: a
// meter that stays keeps its old place. Sets have their first names.
func blocks(t *testing.T) string {
	t.Helper()
	parts := strings.Split(timeout.ReplaceAllString(strings.ReplaceAll(listTable(t), secondName, ""), ""), "\n\t}\n")
	slices.Sort(parts)
	return strings.Join(parts, "\n\t}\n")
}

// timeout is what runs down while we look.
var timeout = regexp.MustCompile(` timeout \S+ expires \S+?(,| )`)

// ruleset compiles a policy given as text.
func ruleset(t testing.TB, text string) *rules.Ruleset {
	t.Helper()
	p, problems := rules.Parse("policy.toml", []byte("version = 1\n"+text), nil)
	if p == nil {
		var b strings.Builder
		rules.Render(&b, problems, "")
		t.Fatalf("parse:\n%s", b.String())
	}
	return rules.Compile(p)
}

// everything uses every kind of rule, set and map there is.
const everything = `
[default]
input = "reject"
output = "drop"
[open.web]
ports = [80, 443, "65000-65535"]
protocol = ["tcp", "udp"]
[open."ssh.a-b"]
ports = 22
from = ["10.0.0.0/8", "192.0.2.1-192.0.2.9", "@admins"]
[open.vendor]
ports = ["20-30", "6000-6010"]
family = "ipv4"
interfaces = ["wg0", "tun*"]
[open.dns]
ports = 53
protocol = "udp"
interfaces = "eth0"
[open.six]
ports = [25]
from = "2001:db8:6::/64"
[set.admins]
addresses = ["198.51.100.7", "2001:db8::/48"]
[dhcp]
client = ["eth0"]
[open.limited]
ports = 2222
rate = { limit = "10/minute", burst = 5, per = "source" }
connections = 3
log = true
[open.together]
ports = [8080]
rate = { limit = "1000/second", burst = 100, per = "rule" }
[open.vendors]
ports = 9000
from = "203.0.113.0/24"
except = ["203.0.113.66", "@admins"]
to = ["198.51.100.4", "2001:db8::4"]
expires = 2099-01-31T00:00:00Z
[open.vpn]
protocol = "any"
interfaces = ["wg1", "vpn*"]
[open.ipsec]
protocol = ["esp", "ah"]
from = "192.0.2.0/24"
[open.diameter]
ports = 3868
protocol = ["tcp", "sctp"]
[block.scanners]
from = "@bad"
log = true
[block.smtp]
ports = 25
except = "10.0.0.0/8"
[egress.dns]
ports = 53
protocol = ["udp", "tcp"]
to = "@resolvers"
[egress.updates]
ports = [80, 443]
user = "root"
group = "root"
[set.resolvers]
addresses = ["192.0.2.53"]
[set.bad]
addresses = ["203.0.113.0/25", "2001:db8:bad::/48"]
[icmp]
echo = { limit = "10/second", burst = 20, per = "source" }
[log]
dropped = { limit = "5/second", burst = 20 }
group = 5
`

// others are the choices that everything cannot make at the same time.
const others = `
[default]
published = "ignore"
established = "keep"
forward = "drop"
output = "reject"
[open.web]
ports = 80
log = true
[log]
dropped = true
prefix = "dl"
`

const observed = "[default]\nenforce = false\noutput = \"drop\"\n" + little

const little = `
[open.web]
ports = 80
[open."ssh.a-b"]
ports = [22]
from = "@admins"
[set.admins]
addresses = ["198.51.100.0/24"]
`
