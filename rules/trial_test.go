package rules

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func trialOf(t *testing.T, was, will string) *Ruleset {
	t.Helper()
	compile := func(text string) *Ruleset {
		p, problems := Parse("policy.toml", []byte("version = 1\n"+text), nil)
		if p == nil {
			t.Fatalf("%v", problems)
		}
		return Compile(p)
	}
	var old *Ruleset
	if was != "none" {
		old = compile(was)
	}
	return Trial(old, compile(will), time.Unix(2e9, 0))
}

// dangling lists what a table names but does not have, and what it has twice.
func dangling(t *Table) []string {
	have := map[piece]int{}
	for _, s := range t.Sets {
		have[piece{setPiece, s.Name}]++
	}
	for _, c := range t.Chains {
		have[piece{chainPiece, c.Name}]++
	}
	for _, l := range t.Limits {
		have[piece{limitPiece, l.Name}]++
	}
	var out []string
	for p, n := range have {
		if n > 1 {
			out = append(out, fmt.Sprintf("%v stands %d times", p, n))
		}
	}
	for _, s := range t.Sets {
		for _, to := range s.Targets {
			if have[piece{chainPiece, to}] == 0 {
				out = append(out, "map "+s.Name+" leads to "+to)
			}
		}
	}
	for _, c := range t.Chains {
		for _, r := range c.Rules {
			r.names(func(p piece) {
				if have[p] == 0 {
					out = append(out, fmt.Sprintf("chain %s names %v", c.Name, p))
				}
			})
			for _, e := range r.Exprs {
				if n, ok := e.(Count); ok && !slices.Contains(t.Counters, n.Counter) {
					out = append(out, "chain "+c.Name+" counts "+n.Counter)
				}
			}
		}
	}
	return out
}

const (
	trialSSH   = "[open.ssh]\nports = 22\nfrom = \"@admins\"\nrate = { limit = \"10/minute\" }\n[set.admins]\naddresses = [\"10.0.0.1\", \"10.1.0.0/16\"]\n"
	trialWeb   = "[open.web]\nports = [80, 443]\n"
	trialLimit = "[open.lim]\nports = 8080\nrate = { limit = \"5/second\", per = \"rule\" }\n"
)

func TestTrialSharesWhatIsTheSame(t *testing.T) {
	for name, tt := range map[string]struct {
		was, will   string
		have, havnt []string // lines of nft text
	}{
		"another rule": {
			trialSSH, trialSSH + trialWeb,
			[]string{"set trial {", "elements = { ipv4 timeout", "meta nfproto @trial goto trial_gate comment \"trial\"", "goto was_gate comment \"trial\"",
				"chain trial_gate {", "chain was_gate {", "map was_tcp_open {", "map tcp_open {", "chain open_ssh {", "set open_ssh_rate4 {", "tcp dport vmap @was_tcp_open"},
			[]string{"was_open_ssh", "was_open_ssh_rate4", "was_set_admins", "was_silence", "trial_silence", "was_icmp"},
		},
		"a changed set": {
			trialSSH, strings.Replace(trialSSH, "10.0.0.1", "10.0.0.2", 1),
			[]string{"set was_set_admins_4 {", "chain was_open_ssh {", "chain open_ssh {", "ip saddr @was_set_admins_4", "set open_ssh_rate4 {", "goto was_backstop_in"},
			[]string{"was_open_ssh_rate4", "was_admit_ssh", "was_tcp_listed", "was_charge"},
		},
		"a changed rate": {
			trialSSH, strings.Replace(trialSSH, "10/minute", "20/minute", 1),
			[]string{"set was_open_ssh_rate4 {", "update @was_open_ssh_rate4 { ip saddr limit rate 10/minute", "update @open_ssh_rate4 { ip saddr limit rate 20/minute", "chain was_open_ssh {"},
			[]string{"was_set_admins"},
		},
		"a changed limit": {
			trialLimit, strings.Replace(trialLimit, "5/second", "6/second", 1),
			[]string{"limit was_rate_lim {", "limit rate_lim {", "limit name \"was_rate_lim\""}, nil,
		},
		"only in the old": {
			trialSSH + trialWeb, trialSSH,
			[]string{"chain open_web {", "map was_tcp_open {"}, []string{"was_open_web"},
		},
		"egress comes": {
			trialWeb, "[default]\noutput = \"drop\"\n" + trialWeb,
			[]string{"chain egress {", "meta nfproto @trial goto trial_egress", "counter name \"c_unjudged\" accept comment \"not judged\""},
			[]string{"was_egress", "was_gate", "trial_gate", "was_silence"},
		},
		"egress goes": {
			"[default]\noutput = \"drop\"\n" + trialWeb, trialWeb,
			[]string{"meta nfproto @trial counter name \"c_unjudged\" accept comment \"not judged\"", "goto was_egress"},
			[]string{"trial_egress", "was_gate"},
		},
		"first of all": {
			"none", trialWeb,
			[]string{"meta nfproto @trial goto trial_gate", "meta nfproto @trial goto trial_silence", "counter name \"c_unjudged\" accept"},
			[]string{"was_", "hook prerouting priority -110; policy accept"},
		},
		"no enforcement before": {
			"[default]\nenforce = false\n" + trialWeb, trialWeb,
			[]string{"goto was_gate", "hook prerouting priority -110; policy drop"}, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			rs := trialOf(t, tt.was, tt.will)
			if wrong := dangling(&rs.Table); wrong != nil {
				t.Errorf("%q", wrong)
			}
			var b bytes.Buffer
			if err := rs.Table.WriteNFT(&b, time.Unix(2e9-60, 0)); err != nil {
				t.Fatal(err)
			}
			for _, want := range tt.have {
				if !strings.Contains(b.String(), want) {
					t.Errorf("no %q", want)
				}
			}
			for _, wrong := range tt.havnt {
				if strings.Contains(b.String(), wrong) {
					t.Errorf("there is %q", wrong)
				}
			}
			if t.Failed() {
				t.Log(b.String())
			}
			if rs.Table.Sets[0].Name != TrialSet {
				t.Errorf("the first set is %q", rs.Table.Sets[0].Name)
			}
		})
	}
}

// What two equal policies make on trial is their table, and a set that is not used.
func TestTrialOfTheSame(t *testing.T) {
	text := "[default]\noutput = \"reject\"\n" + trialSSH + trialWeb + trialLimit
	rs := trialOf(t, text, text)
	for _, c := range rs.Table.Chains {
		if strings.HasPrefix(c.Name, wasPrefix) || strings.HasPrefix(c.Name, trialPrefix) {
			t.Errorf("chain %s", c.Name)
		}
	}
	if n := len(rs.Table.Sets); n != len(trialOf(t, "none", text).Table.Sets) {
		t.Errorf("%d sets", n)
	}
}
