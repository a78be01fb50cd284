package main

import (
	"bytes"
	"strings"
	"testing"

	"deadlight/firewall"
)

func TestPrintInterferences(t *testing.T) {
	var out bytes.Buffer
	printInterferences(&out, interferences(nil))
	if out.Len() > 0 {
		t.Errorf("of nothing: %q", out.String())
	}
	ports := strings.Fields("1/tcp 2/tcp 3/tcp 4/tcp 5/tcp 6/tcp 7/tcp 8/tcp 9/tcp 10/tcp 11/tcp 12/tcp 13-20/tcp 30/udp")
	printInterferences(&out, interferences([]firewall.Interference{
		{Severity: firewall.Breaks, Kind: "drop", Where: "table ip \x1b[2Jx, chain a\nb", Rule: "policy drop", Ports: ports, Fact: "It stops what the policy opens.", Advice: "Remove \u202eit."},
		{Severity: firewall.Note, Kind: "unit", Where: "docker.service", Fact: "It publishes ports."},
	}))
	const want = `Beside deadlight:
  breaks  table ip \u001b[2Jx, chain a\nb: policy drop
          1/tcp, 2/tcp, 3/tcp, 4/tcp, 5/tcp, 6/tcp, 7/tcp, 8/tcp, 9/tcp, 10/tcp, 11/tcp, 12/tcp and 2 more ranges. It stops what the policy opens.
          = hint: Remove \u202eit.
  note    docker.service
          It publishes ports.
`
	if got := out.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestStatusCode(t *testing.T) {
	fine := func() *statusJSON {
		return &statusJSON{Policy: policyStatusJSON{State: policyApplied}, Kernel: kernelStatusJSON{Table: tableEqual}, Counters: []counterJSON{{Name: "c_dropped", Packets: 9}}}
	}
	beside := func(list ...firewall.Interference) func(*statusJSON) {
		return func(s *statusJSON) { s.Interference = interferences(list) }
	}
	for name, c := range map[string]struct {
		change func(*statusJSON)
		want   int
	}{
		"fine":                   {func(*statusJSON) {}, exitOK},
		"a note":                 {beside(firewall.Interference{Severity: firewall.Note, Unknown: true}), exitOK},
		"it may":                 {beside(firewall.Interference{Severity: firewall.May}), exitFindings},
		"it breaks":              {beside(firewall.Interference{Severity: firewall.May, Unknown: true}, firewall.Interference{Severity: firewall.Breaks}), exitFindings},
		"could not tell":         {beside(firewall.Interference{Severity: firewall.May, Unknown: true}), exitRefused},
		"another table":          {func(s *statusJSON) { s.Kernel.Table = tableDifferent }, exitFindings},
		"no table":               {func(s *statusJSON) { s.Kernel.Table = tableAbsent }, exitFindings},
		"a newer policy":         {func(s *statusJSON) { s.Policy.Changed = []fileJSON{{"policy.toml", "changed"}} }, exitFindings},
		"nothing to compare":     {func(s *statusJSON) { s.Policy.State, s.Kernel.Table = policyNone, tablePresent }, exitRefused},
		"behind the gate":        {func(s *statusJSON) { s.count(map[string]firewall.Counter{"c_backstop_in": {Packets: 1, Bytes: 40}}) }, exitFindings},
		"behind a DNAT":          {func(s *statusJSON) { s.count(map[string]firewall.Counter{"c_rewritten_dropped": {Packets: 1}}) }, exitOK},
		"nothing behind it":      {func(s *statusJSON) { s.count(map[string]firewall.Counter{"c_backstop_in": {}, "c_dropped": {}}) }, exitOK},
		"a state that is broken": {func(s *statusJSON) { s.Policy.State = policyUnknown }, exitRefused},
	} {
		s := fine()
		c.change(s)
		if got := s.code(); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}
