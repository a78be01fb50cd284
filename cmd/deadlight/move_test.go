package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"deadlight/verify"
)

// moveCase is a host with a firewall of its own and the way that leads from there.
// The commands stand in testdata/move/NAME.sh.
type moveCase struct {
	name    string
	prepare func(m *machine)
	rejects bool // what is closed is refused
}

// movePorts are probed in every case, and open or closed before the move as after.
func movePorts() []movePort {
	return []movePort{
		{"tcp", 80, true}, {"tcp", 443, true}, {"udp", 51820, true},
		{"tcp", 8080, false}, {"udp", 8080, false}, // with a listener
		{"tcp", 9, false}, {"udp", 9, false}, // without
		{"tcp", 5432, false}, // open to others
	}
}

// alone runs a command on the disk of a host that is off, with a network of
// its own.
func (m *machine) alone(command string) {
	m.Helper()
	m.output("unshare", "--net", "--mount", "chroot", m.path("root"), "sh", "-ec", "mount -t proc proc /proc\n"+command)
}

func moveCases() []moveCase {
	return []moveCase{{
		name: "ufw",
		prepare: func(m *machine) {
			m.write("etc/ufw/applications.d/web", "[Nginx Full]\ntitle=Web server\ndescription=HTTP and HTTPS\nports=80,443/tcp\n")
			m.alone(`
ufw limit 22/tcp comment 'ssh'
ufw allow 'Nginx Full'
ufw allow 51820/udp comment 'WireGuard'
ufw allow proto tcp from 10.0.0.0/8 to any port 5432 comment 'app servers'
ufw allow proto tcp from 2001:db8:7::/48 to any port 5432 comment 'app servers'
ufw deny from 203.0.113.0/24 comment 'scanners'
ufw --force enable
systemctl enable ufw.service`)
		},
	}, {
		name:    "firewalld",
		rejects: true, // as its zone "public" does
		prepare: func(m *machine) {
			m.alone(`
firewall-offline-cmd --zone=public --add-service=http
firewall-offline-cmd --zone=public --add-service=https
firewall-offline-cmd --zone=public --add-port=51820/udp
firewall-offline-cmd --zone=public --add-rich-rule='rule family="ipv4" source address="10.0.0.0/8" port port="5432" protocol="tcp" accept'
firewall-offline-cmd --zone=drop --add-source=203.0.113.0/24
systemctl enable firewalld.service`)
		},
	}, {
		name: "nftables",
		prepare: func(m *machine) {
			m.write("etc/nftables.conf", `#!/usr/sbin/nft -f
flush ruleset

table inet filter {
	set app_servers {
		type ipv4_addr
		flags interval
		elements = { 10.0.0.0/8 }
	}
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		ct state invalid drop
		iif lo accept
		meta l4proto { icmp, ipv6-icmp } accept
		tcp dport 22 ct state new limit rate 10/minute burst 5 packets accept comment "ssh"
		tcp dport { 80, 443 } accept comment "web"
		udp dport 51820 accept comment "WireGuard"
		ip saddr @app_servers tcp dport 5432 accept comment "app servers"
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
	chain output {
		type filter hook output priority filter;
	}
}
`)
			m.chroot("systemctl", "enable", "nftables.service")
		},
	}}
}

// moveCommands are the lines of a file of commands.
func moveCommands(t *testing.T, name string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata/move", name+".sh"))
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestMove moves hosts in from other firewalls, by the commands that the README
// shows. A host boots with the other firewall on, moves, and boots again; from
// outside it is probed at every instant. No closed port answers and no open one
// fails to, from the first command until the power is off, and again after that.
//
// It needs what TestBoot needs.
func TestMove(t *testing.T) {
	if testing.Short() && os.Getenv("CI") == "" {
		t.Skip("-short")
	}
	m := newMachine(t, "firewalls")
	m.install()
	m.services()
	m.write("etc/systemd/system/listen.service", `[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/local/sbin/listen tcp/80 echo/443 udp/51820 tcp/8080 udp/8080 tcp/5432
[Install]
WantedBy=sysinit.target
`)
	m.gateway()
	m.write("etc/systemd/system/report.service", `[Unit]
After=network.target deadlight.service ufw.service firewalld.service nftables.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
ExecStart=/bin/bash /usr/local/sbin/report
[Install]
WantedBy=multi-user.target
`)
	m.output("install", "-D", "-m", "0644", "../../configs/etc/policy.toml", m.disk(policyFile)) // as the package does
	for _, c := range moveCases() {
		t.Run(c.name, func(t *testing.T) {
			m.T = t
			m.overlay()
			m.clearReport()
			c.prepare(m)
			if t.Failed() {
				return
			}
			if !t.Run("move", func(t *testing.T) { m.T = t; m.moves(c) }) {
				return
			}
			m.T = t
			m.clearReport()
			t.Run("reboot", func(t *testing.T) { m.T = t; m.lives(c) })
		})
	}
}

// gateway gives the host one, by which answers to strangers leave.
func (m *machine) gateway() {
	m.Helper()
	m.write("etc/systemd/network/10-host0.network.d/gateway.conf", "[Network]\nGateway="+outside4+"\nGateway="+outside6+"\n")
}

// said is a line of a script that keeps what the n-th command says and how it ends.
func said(n int, command string) string {
	return fmt.Sprintf("{\n%s\n} >/report/said-%d 2>&1 </dev/null\necho $? >/report/code-%[2]d\n", command, n)
}

// went holds the end of the n-th command against what the README promises.
func (m *machine) went(n int, command string) {
	m.Helper()
	words, code := m.report(fmt.Sprintf("said-%d", n)), strings.TrimSpace(m.report(fmt.Sprintf("code-%d", n)))
	m.Logf("$ %s\n%s[%s]", command, words, code)
	want := "0"
	if strings.Contains(command, "deadlight plan") {
		want = "1" // there is something to change
	}
	if code != want {
		m.Errorf("%s: exit code %s, want %s", command, code, want)
	}
	if strings.Contains(command, "deadlight verify") && !strings.Contains(command, "deadlight-verify") && !regexp.MustCompile(`(?m)^PASS: `).MatchString(words) {
		m.Errorf("%s: no PASS", command)
	}
}

// moveScript is what the host does between two asks: the commands, each with its
// time, what it says and how it ends.
func moveScript(commands []string) string {
	var b strings.Builder
	b.WriteString(`set -o pipefail
sudo() { "$@"; }
ask() {
	touch /report/ask-$1
	until [ -e /report/done-$1 ]; do sleep 0.02; done
}
ask 1
`)
	for i, line := range commands {
		b.WriteString("date +%s%N >>/report/steps\n" + said(i, line))
	}
	b.WriteString(`date +%s%N >>/report/steps
deadlight status >/report/status 2>&1
ask 2
systemctl poweroff
`)
	return b.String()
}

// live runs the host once, with probes from before the power is on until it is off.
func (m *machine) live(c moveCase, commands []string) (p *moveProbes, whole, up period, steps []time.Time) {
	m.Helper()
	m.write("usr/local/sbin/report", moveScript(commands))
	m.wire()
	link, err := netlink.LinkByName("to-host")
	m.check(err)
	whole.from = time.Now()
	p = startMoveProbes(m.T, verify.Link{Index: link.Attrs().Index, Src: link.Attrs().HardwareAddr, Dst: m.mac}, movePorts(), c.rejects)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	between := make(chan struct{})
	go func() {
		defer close(between)
		if !m.asks(ctx, 1) || !m.settled(ctx, p) {
			return
		}
		up.from = time.Now()
		var flows []*moveFlow
		for _, host := range []string{host4, host6} {
			flows = append(flows, startMoveFlow(m.T, host, 443))
		}
		m.answerAsk(1)
		if m.asks(ctx, 2) {
			time.Sleep(100 * time.Millisecond) // the last command has had its effect
			up.to = time.Now()
			m.answerAsk(2)
		}
		for _, f := range flows {
			f.end(m.T)
		}
	}()
	console, err := m.power(ctx)
	cancel()
	<-between
	p.close(m.T)
	whole.to = time.Now()
	if err != nil || up.to.IsZero() {
		for i := range commands {
			if said, err := os.ReadFile(m.path(fmt.Sprintf("report/said-%d", i))); err == nil {
				m.Logf("%s\n%s", commands[i], said)
			}
		}
		m.Fatalf("boot: %v\n%s", err, console)
	}
	for line := range strings.Lines(m.report("steps")) {
		n, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		m.check(err)
		steps = append(steps, time.Unix(0, n))
	}
	return p, whole, up, steps
}

// asks waits until the host asks.
func (m *machine) asks(ctx context.Context, n int) bool {
	for !m.has(fmt.Sprintf("report/ask-%d", n)) {
		if !pause(ctx) {
			return false
		}
	}
	return true
}

// settled waits until the ports have been open and closed for a while as they should
// be: firewalld's unit is active before its rules are there.
func (m *machine) settled(ctx context.Context, p *moveProbes) bool {
	const while, late = 200 * time.Millisecond, 500 * time.Millisecond
	for from := time.Now(); time.Since(from) < while+late || !p.asMeant(time.Now().Add(-while-late), time.Now().Add(-late)); {
		if !pause(ctx) {
			m.Errorf("the host is up, and not every port is as it should be")
			return false
		}
	}
	return true
}

func (m *machine) answerAsk(n int) {
	if err := os.WriteFile(m.path(fmt.Sprintf("report/done-%d", n)), nil, 0o644); err != nil {
		m.Error(err)
	}
}

// moves is the boot with the other firewall.
func (m *machine) moves(c moveCase) {
	m.Helper()
	commands := moveCommands(m.T, c.name)
	p, whole, up, steps := m.live(c, commands)
	for i, line := range commands {
		m.Logf("%.2fs:", steps[i].Sub(up.from).Seconds())
		m.went(i, line)
	}
	m.undisturbed()
	whole.from = up.from
	p.judge(m.T, whole, up, func(at time.Time) string {
		i, _ := slices.BinarySearchFunc(steps, at, time.Time.Compare)
		switch {
		case i == 0:
			return "(before the move)"
		case i > len(commands):
			return "(after the move, or the power going off)"
		}
		return commands[i-1]
	})
}

// lives is the boot after it.
func (m *machine) lives(c moveCase) {
	m.Helper()
	commands := []string{"deadlight drift", "nft list tables"}
	p, whole, up, _ := m.live(c, commands)
	p.judge(m.T, whole, up, func(time.Time) string { return "the life after the move" })
	if code := strings.TrimSpace(m.report("code-0")); code != "0" {
		m.Errorf("drift after the reboot: %s", m.report("said-0"))
	}
	m.says("said-1", `^table inet deadlight\n$`)
	m.undisturbed()
}

// undisturbed: what is left of the other firewall bears on nothing.
func (m *machine) undisturbed() {
	m.Helper()
	if status := m.report("status"); !strings.Contains(status, "is as it was applied") || regexp.MustCompile(`(?m)^ +(breaks|may) `).MatchString(status) {
		m.Errorf("status:\n%s", status)
	}
}
