package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/firewall"
	"deadlight/rules"
)

const auditPolicy = `version = 1
[open.web]
ports = [80, 443]
[open.ssh]
ports = 22
from = ["192.0.2.0/24", "2001:db8:2::/48"]
[open.lan]
ports = 9100
interfaces = "eth1"
[open.vpn]
protocol = "any"
interfaces = "wg0"
[open.old-api]
ports = "8443-8445"
[open.local]
ports = 6379
from = "192.0.2.0/24"
[open.gone]
ports = 7
expires = 2020-01-01T00:00:00Z
`

// Every verdict, of fake sockets and a fake firewall that enforces the policy but
// where a test says otherwise.
func TestAudit(t *testing.T) {
	addr := netip.MustParseAddr
	v4, v6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	tcp := func(a netip.Addr, port uint16, comm string) listener {
		return listener{Protocol: rules.TCP, Addr: a, Port: port, PID: 7, Comm: comm, Inode: 1}
	}
	nat := func(port uint16) *fakeFirewall {
		return &fakeFirewall{nat: []fakeRule{{protocol: rules.TCP, port: port, in: "eth0"}}, rules: []fakeRule{{protocol: rules.TCP, port: port, in: "eth0", verdict: firewall.WalkAccept}}}
	}
	tests := map[string]struct {
		sockets []listener
		over    *fakeFirewall // its rules decide before the policy
		bare    bool          // there is no table of ours
		blind   bool          // not root
		policy  string        // added
		want    string        // of the sockets, then the exit code
	}{
		"as intended":         {sockets: []listener{tcp(v4, 80, "nginx"), tcp(v6, 443, "nginx")}, want: `80 exposed "web": exposed as intended: to anywhere "web"|443 exposed "web": exposed as intended: to anywhere "web"|0`},
		"restricted":          {sockets: []listener{tcp(v6, 22, "sshd")}, want: `22 exposed "ssh": exposed as intended: to 192.0.2.0/24, 2001:db8:2::/48 "ssh"|0`},
		"one family":          {sockets: []listener{tcp(v6, 6379, "redis")}, want: `6379 exposed "local": exposed as intended: to 192.0.2.0/24 "local", over IPv4 only|0`},
		"filtered":            {sockets: []listener{tcp(v4, 5432, "postgres")}, want: `5432 filtered "": listens but filtered: no rule opens it|0`},
		"rejected":            {sockets: []listener{tcp(v4, 5432, "postgres")}, policy: "[default]\ninput = \"reject\"\n", want: `5432 filtered "": listens but rejected: no rule opens it|0`},
		"too late":            {sockets: []listener{tcp(v4, 7, "echo")}, want: `7 filtered "": listens but filtered: "gone" opens it for nobody who comes here now|0`},
		"loopback":            {sockets: []listener{tcp(addr("127.0.0.1"), 5432, "postgres"), tcp(addr("::1"), 80, "x"), {Protocol: rules.UDP, Addr: v4, Port: 53, Device: "lo"}}, want: `80 loopback "": loopback only|5432 loopback "": loopback only|53 loopback "": loopback only|0`},
		"wide":                {sockets: []listener{tcp(v4, 9100, "node")}, want: `9100 wide "lan": exposed as intended: to anywhere by eth1 "lan"; it listens on every address, though the policy opens it on some only|0`},
		"not wide":            {sockets: []listener{tcp(addr("10.0.0.1"), 9100, "node")}, want: `9100 exposed "lan": exposed as intended: to anywhere by eth1 "lan"|0`},
		"bound to another":    {sockets: []listener{{Protocol: rules.TCP, Addr: v4, Port: 9100, Device: "eth0", Comm: "node", PID: 7}}, want: `9100 filtered "": listens but filtered: "lan" opens it for nobody who comes here now|0`},
		"no such address":     {sockets: []listener{{Protocol: rules.TCP, Addr: v6, Port: 80, Device: "eth1", V6Only: true}}, want: `80 unreachable "": not reachable: its interface has no such address|0`},
		"IPv6 alone":          {sockets: []listener{{Protocol: rules.TCP, Addr: v6, Port: 22, V6Only: true}}, want: `22 exposed "ssh": exposed as intended: to 2001:db8:2::/48 "ssh"|0`},
		"a hole":              {sockets: []listener{tcp(v4, 8080, "java")}, over: &fakeFirewall{rules: []fakeRule{{port: 8080, in: "eth1", verdict: firewall.WalkAccept}}}, want: `8080 unlisted "": REACHABLE THOUGH NOT LISTED: by eth1: table inet fake, chain in: accept|1`},
		"a hole for others":   {sockets: []listener{tcp(v4, 22, "sshd")}, over: &fakeFirewall{rules: []fakeRule{{port: 22, verdict: firewall.WalkAccept}}}, want: `22 unlisted "ssh": REACHABLE THOUGH NOT LISTED: table inet fake, chain in: accept; the policy opens it to 192.0.2.0/24 "ssh"|1`},
		"stopped":             {sockets: []listener{tcp(v4, 80, "nginx")}, over: &fakeFirewall{rules: []fakeRule{{port: 80, in: "eth0", verdict: firewall.WalkDrop}}}, want: `80 stopped "web": STOPPED, though the policy opens it to anywhere "web": by eth0: table inet fake, chain in: drop|1`},
		"no telling":          {sockets: []listener{tcp(v4, 5432, "postgres")}, over: &fakeFirewall{rules: []fakeRule{{port: 5432, verdict: firewall.WalkUnknown}}}, want: `5432 unknown "": cannot be told: it hinges on table inet fake, chain in: unknown|3`},
		"no table":            {sockets: []listener{tcp(v4, 80, "nginx"), tcp(v4, 5432, "postgres")}, bare: true, want: `80 exposed "web": exposed as intended: to anywhere "web"|5432 unlisted "": REACHABLE THOUGH NOT LISTED: no table filters it|1`},
		"not enforced":        {sockets: []listener{tcp(v4, 5432, "postgres")}, policy: "[default]\nenforce = false\n", bare: true, want: `5432 unlisted "": REACHABLE THOUGH NOT LISTED: enforce = false, nothing is filtered|1`},
		"without root":        {sockets: []listener{tcp(v4, 80, ""), tcp(v4, 5432, ""), tcp(addr("127.0.0.1"), 9, "")}, blind: true, want: `9 loopback "": loopback only|80 unknown "web": the policy opens it: to anywhere "web"; the kernel's rules are not visible without root|5432 unknown "": the policy does not open it; the kernel's rules are not visible without root|3`},
		"published, unlisted": {over: nat(8080), want: `8080 unlisted "": REACHABLE THOUGH NOT LISTED: table ip nat, chain pre sends it on to 172.17.0.2:80|1`},
		"published, listed":   {over: nat(443), want: `443 exposed "web": exposed as intended: to anywhere "web"; table ip nat, chain pre sends it on|0`},
		"published, a proxy":  {sockets: []listener{tcp(v4, 8080, "docker-proxy"), {Protocol: rules.TCP, Addr: v6, Port: 8080, V6Only: true, Comm: "docker-proxy", PID: 8}}, over: nat(8080), want: `8080 unlisted "": REACHABLE THOUGH NOT LISTED: by eth0: table ip nat, chain pre sends it on to 172.17.0.2:80|8080 unlisted "": REACHABLE THOUGH NOT LISTED: table ip nat, chain pre sends it on to 172.17.0.2:80|1`},
		"published elsewhere": {sockets: []listener{tcp(addr("127.0.0.1"), 8080, "x")}, over: nat(8080), want: `8080 loopback "": loopback only|8080 unlisted "": REACHABLE THOUGH NOT LISTED: table ip nat, chain pre sends it on to 172.17.0.2:80|1`},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			rs := compiled(t, strings.TrimPrefix(auditPolicy, "version = 1\n")+tt.policy)
			a := &auditor{rs: rs, now: time.Now(), root: !tt.blind, nics: []nic{
				{"eth0", []netip.Addr{addr("192.0.2.1"), addr("2001:db8:2::1"), addr("fe80::1")}}, {"eth1", []netip.Addr{addr("10.0.0.1")}},
			}}
			var runs []uint16
			if !tt.blind {
				a.asked.ask = func(packets []rules.Packet) ([]*firewall.Journey, error) {
					return enforced(rs, tt.over, tt.bare, packets)
				}
				if tt.over != nil {
					runs = tt.over.runs()
				}
			}
			out, err := a.audit(tt.sockets, runs)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range out.Sockets {
				if s.Verdict != auditUnheard {
					got = append(got, strings.Join([]string{cell(s.Port), s.Verdict, `"` + s.Rule + `":`, s.Text}, " "))
				}
			}
			got = append(got, cell(uint16(out.code())))
			if diff := cmp.Diff(strings.Split(tt.want, "|"), got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			for _, f := range out.Findings {
				if f.Hint == "" || f.Fact == "" || f.Port == "" {
					t.Errorf("a finding that says too little: %+v", f)
				}
			}
		})
	}
}

func cell(n uint16) string { return rules.PortRange{Lo: n, Hi: n}.String() }

// enforced is a kernel that holds the policy, over which other rules go.
func enforced(rs *rules.Ruleset, over *fakeFirewall, bare bool, packets []rules.Packet) ([]*firewall.Journey, error) {
	if over == nil {
		over = &fakeFirewall{}
	}
	out, err := over.ask(packets)
	for i, p := range packets {
		ruled := false
		for _, r := range over.rules {
			ruled = ruled || r.matches(p)
		}
		switch {
		case ruled:
		case bare:
			out[i] = &firewall.Journey{Verdict: firewall.WalkAccept}
		default:
			step := firewall.Step{Family: "inet", Table: rules.TableName, Chain: "gate", Verdict: "drop"}
			out[i].Verdict, out[i].By, out[i].Steps = firewall.WalkDrop, step, append(out[i].Steps, step)
			if rs.Decide(p).Outcome == rules.OutcomeOpen {
				out[i].Verdict = firewall.WalkAccept
			}
		}
	}
	return out, err
}

// What is open though nobody listens, in runs, and what does not count as that.
func TestAuditUnheard(t *testing.T) {
	rs := compiled(t, strings.TrimPrefix(auditPolicy, "version = 1\n"))
	a := &auditor{rs: rs, now: time.Now(), root: true}
	a.asked.ask = func(p []rules.Packet) ([]*firewall.Journey, error) { return enforced(rs, nil, false, p) }
	out, err := a.audit([]listener{
		{Protocol: rules.TCP, Addr: netip.IPv4Unspecified(), Port: 8444}, {Protocol: rules.TCP, Addr: netip.MustParseAddr("127.0.0.1"), Port: 6379},
		{Protocol: rules.UDP, Addr: netip.IPv4Unspecified(), Port: 80},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range out.Sockets {
		if s.Verdict == auditUnheard {
			got = append(got, s.Ports+" "+s.Text)
		}
	}
	want := []string{
		`22 open in the policy but nobody listens: "ssh"`, `80 open in the policy but nobody listens: "web"`, `443 open in the policy but nobody listens: "web"`,
		`6379 open in the policy but it listens on loopback only: "local"`, `8443 open in the policy but nobody listens: "old-api"`,
		`8445 open in the policy but nobody listens: "old-api"`, `9100 open in the policy but nobody listens: "lan"`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// The table as people see it; names from outside cannot steer the terminal.
func TestAuditPrint(t *testing.T) {
	rs := compiled(t, strings.TrimPrefix(auditPolicy, "version = 1\n"))
	a := &auditor{rs: rs, now: time.Now(), root: true, nics: []nic{{"eth0", []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}}}}
	over := &fakeFirewall{rules: []fakeRule{{port: 8080, verdict: firewall.WalkAccept}, {port: 443, verdict: firewall.WalkReject}}}
	a.asked.ask = func(p []rules.Packet) ([]*firewall.Journey, error) { return enforced(rs, over, false, p) }
	out, err := a.audit([]listener{
		{Protocol: rules.TCP, Addr: netip.IPv4Unspecified(), Port: 22, PID: 711, Comm: "sshd"},
		{Protocol: rules.TCP, Addr: netip.IPv6Unspecified(), Port: 22, PID: 711, Comm: "sshd", V6Only: true},
		{Protocol: rules.TCP, Addr: netip.MustParseAddr("127.0.0.1"), Port: 5432, PID: 902, Comm: "postgres"},
		{Protocol: rules.TCP, Addr: netip.IPv4Unspecified(), Port: 8080, PID: 2201, Comm: "ja\x1b[2Jva\n"},
		{Protocol: rules.TCP, Addr: netip.IPv4Unspecified(), Port: 443, PID: 4, Comm: "nginx", MPTCP: true},
		{Protocol: rules.UDP, Addr: netip.IPv4Unspecified(), Port: 67, PID: 5, Comm: "dnsmasq", Device: "eth0"},
		{Protocol: rules.UDP, Addr: netip.IPv6Unspecified(), Port: 51820},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	out.Policy = "policy.toml"
	for i := range out.Sockets {
		if out.Sockets[i].PID == 902 {
			out.Sockets[i].User, out.Sockets[i].Unit = "postgres", "postgresql.service"
		}
	}
	var b strings.Builder
	if err := out.print(&b); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", "audit.golden")
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
