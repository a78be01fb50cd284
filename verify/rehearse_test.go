package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"deadlight/rules"
)

// loadText loads nft text in the network namespace of the calling thread: the
// verifier's tests share no code with package firewall.
func loadText(t *testing.T, text string) func() error {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules.nft")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return func() error {
		if out, err := exec.Command("nft", "-f", file).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
}

func compiled(t *testing.T, rs *rules.Ruleset) string {
	t.Helper()
	var b bytes.Buffer
	if err := rs.Table.WriteNFT(&b, time.Now()); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func rehearse(t *testing.T, cfg RehearseConfig) *Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var out bytes.Buffer
	cfg.Stdout, cfg.Stderr = &out, &out
	r, err := Rehearse(ctx, cfg)
	if err != nil {
		t.Fatalf("rehearse: %v\n%s", err, out.String())
	}
	return r
}

func text(t *testing.T, r *Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

const host = `
[open.web]
ports = [80, 443]
[open.dns]
ports = 53
protocol = ["tcp", "udp"]
[open.ssh]
ports = 22
from = ["10.0.0.0/8", "2001:db8:10::/64"]
[open.admin]
ports = ["9000-9010"]
interfaces = ["wg0"]
[open.six]
ports = 25
family = "ipv6"
`

func TestRehearseGoodRuleset(t *testing.T) {
	rs := compileText(t, host)
	r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs))})
	if r.Verdict != Pass {
		t.Fatalf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
	want := map[string][2]string{ // reachable, filtered
		"tcp4": {"53,80,443", "1-52,54-79,81-442,444-65535"},
		"tcp6": {"25,53,80,443", "1-24,26-52,54-79,81-442,444-65535"},
		"udp4": {"53", "1-52,54-65535"},
		"udp6": {"53", "1-52,54-65535"},
	}
	for k, w := range want {
		if s := r.States[k]; s.Open != w[0] || s.Filtered != w[1] {
			t.Errorf("%s: open %s, filtered %s", k, s.Open, s.Filtered)
		}
	}
	if r.Bound > 1e-6 || r.Proof != "host" || r.Counts.Unknown != 0 {
		t.Errorf("bound %g, proof %s, unknown %d", r.Bound, r.Proof, r.Counts.Unknown)
	}
	open := map[string]bool{}
	for _, v := range r.Restrictions {
		if v.Open != "" {
			open[v.Rule] = true
		}
	}
	for _, name := range []string{"ssh", "admin"} {
		if !open[name] {
			t.Errorf("%q was not seen open from inside: %+v", name, r.Restrictions)
		}
	}
}

// Every broken ruleset must be reported, by port and reason.
func TestRehearseFindsHoles(t *testing.T) {
	rs := compileText(t, host)
	good := compiled(t, rs)
	replace := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the ruleset holds no %q", old)
		}
		return strings.ReplaceAll(good, old, new)
	}
	both := func(rule string) string { // into the gate and the backstop
		return good + fmt.Sprintf("insert rule inet deadlight gate %s\ninsert rule inet deadlight backstop_in %s\n", rule, rule)
	}
	const synOnly = `table inet deadlight { chain gate { type filter hook prerouting priority -110; policy accept;
		tcp dport { 53, 80, 443 } accept
		udp dport 53 accept
		tcp flags & (syn | ack) == syn drop
	}
}`
	for name, c := range map[string]struct {
		text string
		want []string // substrings that must stand in one finding each: port/protocol family observed reason
		only bool     // nothing else may be found
	}{
		"no rules at all": {"", []string{"8080/tcp ipv4 open syn-ack", "8080/tcp ipv6 open syn-ack", "7777/tcp ipv4 closed rst", "7777/udp ipv6 closed"}, false},
		"IPv4 only":       {strings.ReplaceAll(good, "chain gate {\n", "chain gate {\n") + "insert rule inet deadlight gate meta nfproto ipv6 accept\ninsert rule inet deadlight backstop_in meta nfproto ipv6 accept\n", []string{"8080/tcp ipv6 open syn-ack", "7777/udp ipv6 closed"}, false},
		"drops SYN only":  {synOnly, []string{"7777/udp ipv4 closed", "22/tcp ipv4 filtered"}, false},
		"reject for drop": {replace(`counter name "c_dropped" drop`, `counter name "c_dropped" reject with icmpx type admin-prohibited`), []string{"*/tcp ipv4 rejected admin-prohibited", "*/tcp ipv6 rejected admin-prohibited"}, false},
		"reset for drop":  {replace(`counter name "c_dropped" drop`, `meta l4proto tcp reject with tcp reset`), []string{"8080/tcp ipv4 closed rst"}, false},
		"one port":        {both("tcp dport 8080 accept"), []string{"8080/tcp ipv4 open syn-ack", "8080/tcp ipv6 open syn-ack"}, true},
		"one UDP port":    {both("meta nfproto ipv4 udp dport 161 accept"), []string{"161/udp ipv4 open udp answer"}, true},
		"nobody listens":  {both("meta nfproto ipv4 tcp dport 7777 accept"), []string{"7777/tcp ipv4 closed rst"}, true},
		"no UDP listener": {both("meta nfproto ipv6 udp dport 7777 accept"), []string{"7777/udp ipv6 closed"}, true},
		"the gate alone":  {good + "insert rule inet deadlight gate ip protocol tcp tcp dport 7777 accept\n", []string{"7777/tcp ipv4 filtered passed the gate"}, true},
		"too wide a source": {replace("ip saddr 10.0.0.0/8", "ip saddr 10.0.0.0/7"),
			[]string{"22/tcp ipv4 open syn-ack from 11.0.0.0"}, true},
		"too narrow a source": {replace("ip saddr 10.0.0.0/8", "ip saddr 10.0.0.0/9"),
			[]string{"22/tcp ipv4 filtered no response from 10.255.255.255"}, true},
		"any interface":   {replace("iifname != @open_admin_if return", "iifname @open_admin_if continue"), []string{"9000/tcp ipv4 open syn-ack", "9010/tcp ipv6 open syn-ack"}, true},
		"both families":   {replace(`meta nfproto ipv6 counter name "open_six" accept`, `counter name "open_six" accept`), []string{"25/tcp ipv4 open syn-ack"}, true},
		"a redirect":      {good + "table inet nat { chain p { type nat hook prerouting priority -100; tcp dport 80 accept; tcp dport 8081 redirect to :80; }; }\ninsert rule inet deadlight gate meta nfproto ipv4 tcp dport 8081 accept\ninsert rule inet deadlight backstop_in meta l4proto tcp ct original proto-dst 8081 accept\n", []string{"8081/tcp ipv4 open syn-ack"}, true},
		"shut altogether": {"table inet deadlight { chain gate { type filter hook prerouting priority -110; policy drop; }; }", []string{"80/tcp ipv4 filtered", "53/udp ipv6 filtered"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			// The first 10,000 ports hold every hole; the whole sweep has its own test.
			few := allPorts()[:10000]
			r := rehearse(t, RehearseConfig{Rules: rs, Load: loadText(t, c.text), sweep: Ports{TCP: few, UDP: few}})
			if r.Verdict != Fail {
				t.Fatalf("verdict %s:\n%s", r.Verdict, text(t, r))
			}
			matched := make([]bool, len(r.Findings))
			for _, w := range c.want {
				found := false
				for i, f := range r.Findings {
					s := fmt.Sprintf("%d/%s %s %s %s %s", f.Port, f.Protocol, f.Family, f.Observed, f.Reason, strings.TrimPrefix(f.Probe, "syn "))
					if rest, any := strings.CutPrefix(w, "*"); strings.HasPrefix(s, w) || any && strings.Contains(s, rest) {
						found, matched[i] = true, true
					}
				}
				if !found {
					t.Errorf("no finding %q:\n%s", w, text(t, r))
				}
			}
			if c.only && name != "any interface" {
				for i, f := range r.Findings {
					if !matched[i] {
						t.Errorf("unexpected finding %+v", f)
					}
				}
			}
		})
	}
}

func TestRehearseCommand(t *testing.T) {
	rs := compileText(t, host)
	cfg := RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), Command: []string{"false"}}
	_, err := Rehearse(context.Background(), cfg)
	var failed *CommandError
	var exit *exec.ExitError
	if !errors.As(err, &failed) || !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("a failing command: %v", err)
	}
}

func TestRehearseLoadError(t *testing.T) {
	boom := errors.New("boom")
	_, err := Rehearse(context.Background(), RehearseConfig{Rules: compileText(t, host), Load: func() error { return boom }})
	if !errors.Is(err, boom) {
		t.Errorf("a failing load: %v", err)
	}
}

func TestRehearseInterrupted(t *testing.T) {
	rs := compileText(t, host)
	ctx, cancel := context.WithCancel(context.Background())
	cfg := RehearseConfig{Rules: rs, Load: loadText(t, compiled(t, rs)), Progress: func(sent, _ uint64) {
		if sent > 1000 {
			cancel()
		}
	}}
	start := time.Now()
	_, err := Rehearse(ctx, cfg)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("stopped after %s", took)
	}
}
