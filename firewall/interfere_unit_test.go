package firewall

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// The units of Debian, as far as they matter: what starts when, and runs what.
const (
	nftablesUnit = `[Unit]
Description=nftables
Wants=network-pre.target
Before=network-pre.target shutdown.target
Conflicts=shutdown.target
DefaultDependencies=no
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/nft -f /etc/nftables.conf
ExecReload=/usr/sbin/nft -f /etc/nftables.conf
ExecStop=/usr/sbin/nft flush ruleset
[Install]
WantedBy=sysinit.target
`
	nftablesConf = `#!/usr/sbin/nft -f

flush ruleset

table inet filter {
	chain input {
		type filter hook input priority filter;
	}
}
`
	deadlightUnit = `[Unit]
DefaultDependencies=no
Before=network-pre.target
After=nftables.service ufw.service firewalld.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/sbin/deadlight apply
[Install]
WantedBy=sysinit.target
`
	ufwUnit = `[Unit]
Description=Uncomplicated firewall
DefaultDependencies=no
Before=network-pre.target
After=local-fs.target
[Service]
Type=oneshot
ExecStart=/lib/ufw/ufw-init start quiet
ExecStop=/lib/ufw/ufw-init stop
`
	firewalldUnit = `[Unit]
Before=network-pre.target
Wants=network-pre.target
After=dbus.service
Conflicts=iptables.service nftables.service
[Service]
ExecStart=/usr/sbin/firewalld --nofork --nopid
Type=dbus
BusName=org.fedoraproject.FirewallD1
`
	fail2banUnit = `[Unit]
After=network.target iptables.service firewalld.service nftables.service
PartOf=firewalld.service
[Service]
ExecStart=/usr/bin/fail2ban-server -xf start
`
	networkTarget = "[Unit]\nDescription=Network\nAfter=network-pre.target\n"
)

// tree makes a root directory: files by path; "name.service" alone enables a
// unit.
func tree(files map[string]string, enabled ...string) fstest.MapFS {
	out := fstest.MapFS{}
	for name, text := range files {
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(text, "#!") {
			mode = 0o755
		}
		out[name] = &fstest.MapFile{Data: []byte(text), Mode: mode}
	}
	for _, name := range enabled {
		out["etc/systemd/system/multi-user.target.wants/"+name] = &fstest.MapFile{Data: []byte("x"), Mode: 0o644}
	}
	return out
}

const units = "usr/lib/systemd/system/"

func TestUnits(t *testing.T) {
	with := func(base map[string]string, more ...string) map[string]string {
		out := map[string]string{}
		for k, v := range base {
			out[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			out[more[i]] = more[i+1]
		}
		return out
	}
	debian := map[string]string{
		units + "nftables.service": nftablesUnit, "etc/nftables.conf": nftablesConf, units + "ufw.service": ufwUnit, "etc/ufw/ufw.conf": "ENABLED=yes\nLOGLEVEL=low\n",
		units + "firewalld.service": firewalldUnit, units + "fail2ban.service": fail2banUnit, units + "network.target": networkTarget,
		"lib/ufw/ufw-init": "#!/bin/sh\n. /lib/ufw/ufw-init-functions\nufw_start\n", "lib/ufw/ufw-init-functions": "ufw_start() {\n iptables -F\n}\n",
	}
	ours := with(debian, units+"deadlight.service", deadlightUnit)
	for name, c := range map[string]struct {
		files   map[string]string
		enabled []string
		want    []string
		rule    string // of the first
		fact    string // in that of the first
	}{
		"nothing enabled": {files: debian},
		"nftables without us": {
			files: debian, enabled: []string{"nftables.service"}, want: []string{"breaks unit nftables.service"},
			rule: "/etc/nftables.conf:3, nftables.service, ExecStop", fact: "No enabled deadlight.service",
		},
		"nftables before us": {
			files: ours, enabled: []string{"nftables.service", "deadlight.service"}, want: []string{"may unit nftables.service"},
			fact: "when it starts, reloads or stops. At boot it comes before deadlight.service",
		},
		"nftables, ours not enabled": {
			files: ours, enabled: []string{"nftables.service"}, want: []string{"breaks unit nftables.service"}, fact: "No enabled",
		},
		"nftables after us": {
			files:   with(ours, units+"deadlight.service", strings.Replace(deadlightUnit, "After=", "Before=", 1)),
			enabled: []string{"nftables.service", "deadlight.service"}, want: []string{"breaks unit nftables.service"}, fact: "comes after deadlight.service and leaves",
		},
		"nftables in no order": {
			files:   with(ours, units+"deadlight.service", "[Service]\nExecStart=/usr/sbin/deadlight apply\n", units+"nftables.service", strings.Replace(nftablesUnit, "Before=", "X=", 1)),
			enabled: []string{"nftables.service", "deadlight.service"}, want: []string{"breaks unit nftables.service"}, fact: "Nothing says whether",
		},
		"nftables masked": {
			files: with(debian, "etc/systemd/system/nftables.service", ""), enabled: []string{"nftables.service"},
		},
		"nftables that stops only": {
			files:   with(ours, "etc/nftables.conf", "#!/usr/sbin/nft -f\n# flush ruleset\ntable inet filter { }\n"),
			enabled: []string{"nftables.service", "deadlight.service"}, want: []string{"may unit nftables.service"},
			rule: "nftables.service, ExecStop", fact: "when it stops.",
		},
		"nftables with a drop-in": {
			files:   with(ours, "etc/nftables.conf", "table inet filter { }\n", "etc/systemd/system/nftables.service.d/keep.conf", "[Service]\nExecStop=\nExecStop=/usr/sbin/nft delete table inet filter\n"),
			enabled: []string{"nftables.service", "deadlight.service"},
		},
		"an include": {
			files:   with(debian, "etc/nftables.conf", "include \"/etc/nftables.d/*.nft\"\ninclude \"more.nft\"\n", "etc/nftables.d/a.nft", "table inet a\n\n  flush ruleset inet;\n", "etc/more.nft", "delete table inet deadlight\n"),
			enabled: []string{"nftables.service"}, want: []string{"breaks unit nftables.service"},
			rule: "/etc/nftables.d/a.nft:3, /etc/more.nft:1, nftables.service, ExecStop",
		},
		"an include of itself": {
			files:   with(debian, "etc/nftables.conf", "include \"nftables.conf\"\nflush ruleset\n"),
			enabled: []string{"nftables.service"}, want: []string{"breaks unit nftables.service"}, rule: "/etc/nftables.conf:2, nftables.service, ExecStop",
		},
		"of another family": {
			files: map[string]string{units + "a.service": "[Service]\nExecStart=/bin/sh -c 'nft flush ruleset ip; nft flush table inet deadlight_x'\n"}, enabled: []string{"a.service"},
		},
		"a unit of one's own": {
			files:   map[string]string{"etc/systemd/system/fw.service": "[Service]\nExecStart=-/usr/local/sbin/fw.sh up\n", "usr/local/sbin/fw.sh": "#!/bin/sh\n/usr/sbin/nft -f \"/etc/fw.nft\"\n", "etc/fw.nft": "flush ruleset\n"},
			enabled: []string{"fw.service"}, want: []string{"breaks unit fw.service"}, rule: "/etc/fw.nft:1",
		},
		"an instance": {
			files:   map[string]string{units + "fw@.service": "[Service]\nExecStart=/bin/sh -c \"nft flush ruleset 2>/dev/null\"\n"},
			enabled: []string{"fw@eth0.service"}, want: []string{"breaks unit fw@eth0.service"}, rule: "fw@eth0.service, ExecStart",
		},
		"a file known only when it runs": {
			files:   map[string]string{units + "fw.service": "[Service]\nExecStart=/usr/sbin/nft -f ${RULES}\n"},
			enabled: []string{"fw.service"}, want: []string{"may unit fw.service unknown"}, fact: "Could not tell",
		},
		"ufw before us": {
			files: ours, enabled: []string{"ufw.service", "deadlight.service"}, want: []string{"may unit ufw.service"}, fact: "At boot it starts before deadlight.service.",
		},
		"ufw switched off": {
			files: with(debian, "etc/ufw/ufw.conf", "# x\nENABLED=no\n"), enabled: []string{"ufw.service"},
		},
		"firewalld and fail2ban": {
			files: ours, enabled: []string{"firewalld.service", "fail2ban.service", "deadlight.service"},
			want: []string{"note unit fail2ban.service", "may unit firewalld.service"},
		},
		"a manager that starts after us": {
			files:   with(ours, units+"shorewall.service", "[Unit]\nAfter=network-online.target\n[Service]\nExecStart=/sbin/shorewall start\n", units+"network-online.target", "[Unit]\nAfter=network.target\n"),
			enabled: []string{"shorewall.service", "deadlight.service"}, want: []string{"may unit shorewall.service"}, fact: "starts after deadlight.service",
		},
		"saved rules": {
			files:   with(debian, units+"netfilter-persistent.service", "[Service]\nExecStart=/usr/sbin/netfilter-persistent start\n"),
			enabled: []string{"netfilter-persistent.service"}, want: []string{"may unit netfilter-persistent.service"},
		},
		"containers": {
			files:   with(debian, units+"docker.service", "[Unit]\nAfter=firewalld.service\n[Service]\nExecStart=/usr/bin/dockerd\n"),
			enabled: []string{"docker.service"}, want: []string{"note unit docker.service"},
		},
		"bans": {
			files:   with(debian, units+"crowdsec-firewall-bouncer.service", "[Service]\nExecStart=/usr/bin/crowdsec-firewall-bouncer\n"),
			enabled: []string{"crowdsec-firewall-bouncer.service"}, want: []string{"note unit crowdsec-firewall-bouncer.service"},
		},
		"a plugin that loads nftables": {
			files: with(debian, units+"netfilter-persistent.service", "[Service]\nExecStart=/usr/sbin/netfilter-persistent start\n",
				"usr/share/netfilter-persistent/plugins.d/35-nft", "#!/bin/sh\nnft -f /etc/nftables.conf\n"),
			enabled: []string{"netfilter-persistent.service"}, want: []string{"breaks unit netfilter-persistent.service", "may unit netfilter-persistent.service"},
			rule: "/etc/nftables.conf:3",
		},
		"pulled in by another": {
			files:   with(debian, units+"network-setup.service", "[Unit]\nWants=nftables.service\n[Service]\nExecStart=/bin/true\n"),
			enabled: []string{"network-setup.service"}, want: []string{"breaks unit nftables.service"},
		},
		"by a timer": {
			files: map[string]string{units + "fw.timer": "[Timer]\nOnBootSec=1min\n", units + "fw.service": "[Service]\nExecStart=nft flush ruleset\n",
				units + "other.timer": "[Timer]\nOnBootSec=1min\nUnit=wipe.service\n", units + "wipe.service": "[Service]\nExecStart=/usr/sbin/nft delete table inet deadlight\n"},
			enabled: []string{"fw.timer", "other.timer"}, want: []string{"breaks unit fw.service", "breaks unit wipe.service"},
		},
		"a hook of ufw": {
			files: map[string]string{"etc/ufw/after.init": "#!/bin/sh\nnft flush ruleset\n"}, want: []string{"breaks script /etc/ufw/after.init"},
		},
		"enabled, but not there": {files: map[string]string{}, enabled: []string{"nftables.service"}},
		"a script at boot": {
			files: map[string]string{"etc/rc.local": "#!/bin/sh\nnft flush ruleset && echo x\n"}, want: []string{"breaks script /etc/rc.local"}, rule: "/etc/rc.local:2",
		},
		"a script that is not run":  {files: map[string]string{"etc/rc.local": "nft flush ruleset\n"}},
		"a line of ifupdown":        {files: map[string]string{"etc/network/interfaces": "iface eth0 inet dhcp\n  pre-up nft flush ruleset\n"}, want: []string{"breaks script /etc/network/interfaces"}},
		"a script of a link":        {files: map[string]string{"etc/network/if-up.d/fw": "#!/bin/sh\nnft -f /etc/nftables.conf\n", "etc/nftables.conf": nftablesConf}, want: []string{"breaks script /etc/network/if-up.d/fw"}, rule: "/etc/nftables.conf:3"},
		"by the clock":              {files: map[string]string{"etc/cron.d/fw": "@reboot root /usr/sbin/nft flush ruleset\n"}, want: []string{"breaks script /etc/cron.d/fw"}},
		"a comment behind the line": {files: map[string]string{"etc/cron.d/fw": "@daily root true # nft flush ruleset\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := unitInterference(tree(c.files, c.enabled...))
			if s := shorts(got); !slices.Equal(s, c.want) {
				t.Fatalf("got %q, want %q\n%+v", s, c.want, got)
			}
			if c.rule != "" && got[0].Rule != c.rule {
				t.Errorf("rule %q, want %q", got[0].Rule, c.rule)
			}
			if c.fact != "" && !strings.Contains(got[0].Fact, c.fact) {
				t.Errorf("fact %q, want %q", got[0].Fact, c.fact)
			}
		})
	}
}

// closed hides a file from its reader.
type closed struct {
	fs.FS
	name string
}

func (c closed) Open(name string) (fs.File, error) {
	if name == c.name {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
	}
	return c.FS.Open(name)
}

// What cannot be read is said to be so.
func TestUnitsUnreadable(t *testing.T) {
	files := tree(map[string]string{units + "nftables.service": nftablesUnit, "etc/nftables.conf": nftablesConf}, "nftables.service")
	for name, want := range map[string]string{
		units + "nftables.service": "may unit nftables.service unknown",
		"etc/systemd/system":       "may unit /etc/systemd/system unknown",
	} {
		if got := shorts(unitInterference(closed{files, name})); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	got := shorts(unitInterference(closed{files, "etc/nftables.conf"}))
	if want := []string{"may unit nftables.service", "may unit /etc/nftables.conf unknown"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// Units that wait for each other end the search all the same.
func TestUnitsCircle(t *testing.T) {
	var files = map[string]string{}
	for i := range 50 {
		files[fmt.Sprintf("%sa%d.service", units, i)] = fmt.Sprintf("[Unit]\nAfter=a%d.service a%d.service\n[Service]\nExecStart=/usr/sbin/nft flush ruleset\n", (i+1)%50, (i+7)%50)
	}
	files[units+"deadlight.service"] = deadlightUnit
	if got := unitInterference(tree(files, "a0.service", "deadlight.service")); len(got) != 1 || !strings.Contains(got[0].Fact, "Nothing says") {
		t.Errorf("got %+v", got)
	}
}

// What Debian's nftables.service loads does take our table away, and is named.
func TestFlushIsReal(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		rs := ruleset(t, "[open.web]\nports = 80\n")
		mustApply(t, l.c, rs)
		files := noLegacy()
		files.Root = tree(map[string]string{units + "nftables.service": nftablesUnit, "etc/nftables.conf": nftablesConf}, "nftables.service")
		list, err := l.c.Interference(rs, files)
		must(t, err)
		if got := shorts(list); !slices.Equal(got, []string{"breaks unit nftables.service"}) {
			t.Errorf("got %+v", list)
		}
		l.load(nftablesConf)
		is, err := l.c.Snapshot(rules.TableName)
		must(t, err)
		if is.Present {
			t.Error("the table is still there")
		}
	})
}

// Units and scripts are those of the host: another namespace has none.
func TestHostFiles(t *testing.T) {
	first, err := os.Open("/proc/1/ns/net")
	must(t, err)
	defer first.Close()
	host, err := Dial(first)
	must(t, err)
	defer host.Close()
	if host.HostFiles().Root == nil {
		t.Error("no root directory in the namespace of process 1")
	}
	inNamespace(t, func(t *testing.T) {
		if unix.Gettid() == 1 { // process 1 here is the test, whose first thread this may be
			return
		}
		if c := dial(t); c.HostFiles().Root != nil {
			t.Error("a root directory in another namespace")
		}
	})
}
