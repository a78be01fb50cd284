package verify

import (
	"context"
	"errors"
	"strings"
	"testing"

	"deadlight/rules"
)

// A self-test that cannot fail would prove nothing.
func TestSelfTestJudges(t *testing.T) {
	at := []Target{{rules.TCP, 80}, {rules.UDP, 53}}
	found := func(v Verdict, findings ...Finding) *Report { return &Report{Verdict: v, Findings: findings, ports: 7} }
	tcp80 := Finding{Protocol: "tcp", Port: 80, Observed: Open, Reason: "syn-ack"}
	udp53 := Finding{Protocol: "udp", Port: 53, Observed: Closed, Reason: "port-unreachable"}
	tcp53 := Finding{Protocol: "tcp", Port: 53, Observed: Open, Reason: "syn-ack"}
	for _, c := range []struct {
		name               string
		c                  SelfTestCase
		witnessed, packets *Report
		ok                 bool
		why                string
	}{
		{"sound", SelfTestCase{Want: Pass}, found(Pass), found(Pass), true, "nothing found in 7 ports"},
		{"sound, but failed", SelfTestCase{Want: Pass}, found(Fail, tcp80), found(Fail, tcp80), false,
			"fail where pass is right, with the record of the host: found 80/tcp open (syn-ack)"},
		{"broken, but passed", SelfTestCase{Want: Fail}, found(Pass), found(Pass), false, "pass where fail is right"},
		{"broken, but passed by packets", SelfTestCase{Want: Fail}, found(Fail, tcp80), found(Pass), false, "pass where fail is right, by packets alone"},
		{"seen on the host only, as it must", SelfTestCase{Want: Fail, HostOnly: true}, found(Fail, tcp80), found(Pass), true, "by the record of the host"},
		{"broken, but inconclusive", SelfTestCase{Want: Fail}, found(Inconclusive), found(Fail, tcp80), false, "inconclusive where fail is right"},
		{"dead, but passed", SelfTestCase{Want: Inconclusive}, found(Pass), found(Inconclusive), false, "pass where inconclusive is right"},
		{"everywhere", SelfTestCase{Want: Fail}, found(Fail, tcp80, tcp53, udp53), found(Fail, tcp80), true,
			"found 2 tcp ports open (syn-ack), 53/udp closed (port-unreachable)"},
		{"where it is broken", SelfTestCase{Want: Fail, At: at}, found(Fail, tcp80, udp53, udp53), found(Fail, udp53, tcp80), true, "found 80/tcp open"},
		{"elsewhere too", SelfTestCase{Want: Fail, At: at}, found(Fail, tcp80, udp53, tcp53), found(Fail, udp53, tcp80), false, "53/tcp is not where it is broken"},
		{"not everywhere", SelfTestCase{Want: Fail, At: at}, found(Fail, tcp80, udp53), found(Fail, tcp80), false, "nothing found at 53/udp, by packets alone"},
	} {
		t.Run(c.name, func(t *testing.T) {
			why, ok := c.c.judge(c.witnessed, c.packets)
			if ok != c.ok || !strings.Contains(why, c.why) {
				t.Errorf("got %v, %q, want %v, %q", ok, why, c.ok, c.why)
			}
		})
	}
}

// What is untrue must not pass for a verifier that could not tell.
func TestSelfTestWrong(t *testing.T) {
	for _, c := range []struct {
		expected, verdict, packets Verdict
		hostOnly, wrong            bool
	}{
		{Fail, Pass, Pass, false, true},
		{Fail, Pass, Inconclusive, false, true},
		{Fail, Fail, Pass, false, true},
		{Pass, Fail, Inconclusive, false, true},
		{Inconclusive, Pass, Inconclusive, false, true},
		{Inconclusive, Inconclusive, Fail, false, true},
		{Fail, Fail, Fail, false, true}, // for a wrong reason
		{Fail, Inconclusive, Inconclusive, false, false},
		{Fail, Inconclusive, Fail, false, false},
		{Pass, Pass, Inconclusive, false, false},
		{Fail, Inconclusive, Pass, true, false},
		{Fail, Pass, Pass, true, true},
		{Fail, Fail, Pass, true, true}, // for a wrong reason
	} {
		r := SelfTestResult{Expected: c.expected, Verdict: c.verdict, Packets: c.packets, HostOnly: c.hostOnly}
		if r.wrong() != c.wrong {
			t.Errorf("%+v: wrong %v, want %v", r, r.wrong(), c.wrong)
		}
	}
}

func TestSelfTest(t *testing.T) {
	rs := compileText(t, host)
	ports, err := ParsePorts("1-100/tcp,443/tcp,1-100/udp")
	if err != nil {
		t.Fatal(err)
	}
	load := loadText(t, compiled(t, rs))
	var told []string
	r, err := SelfTest(context.Background(), SelfTestConfig{Rules: rs, Ports: ports, Cases: []SelfTestCase{
		{Name: "sound", Load: load, Want: Pass},
		{Name: "taken for broken", Load: load, Want: Fail},
		{Name: "nothing loaded", Want: Fail},
		{Name: "the cable is pulled", Load: load, Want: Inconclusive, Cut: true},
	}, Done: func(r SelfTestResult) { told = append(told, r.Name) }})
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		ok               bool
		verdict, packets Verdict
	}{{true, Pass, Pass}, {false, Pass, Pass}, {true, Fail, Fail}, {true, Inconclusive, Inconclusive}}
	if r.OK || len(r.Cases) != len(want) || len(told) != len(want) {
		t.Fatalf("%+v, told %q", r, told)
	}
	for i, w := range want {
		if c := r.Cases[i]; c.OK != w.ok || c.Verdict != w.verdict || c.Packets != w.packets || c.Name != told[i] || c.Why == "" {
			t.Errorf("%+v, want %+v", c, w)
		}
	}
	boom := errors.New("boom")
	_, err = SelfTest(context.Background(), SelfTestConfig{Rules: rs, Ports: ports, Cases: []SelfTestCase{
		{Name: "that one", Load: func() error { return boom }}}})
	for i, wrong := range []bool{false, true, false, false} {
		if r.Cases[i].Wrong != wrong {
			t.Errorf("%s: wrong %v", r.Cases[i].Name, r.Cases[i].Wrong)
		}
	}
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), `self-test "that one"`) {
		t.Errorf("a load that fails: %v", err)
	}
}
