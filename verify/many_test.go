package verify

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var errStop = errors.New("enough")

// briefs hands out reports from memory.
func briefs(list ...*Brief) Briefs {
	return func(fn func(*Brief) error) error {
		for _, b := range list {
			if err := fn(b); err != nil {
				return err
			}
		}
		return nil
	}
}

// someHosts are a host that fails, with text that wants to break out, one of which
// nothing can be said, and one that passes.
func someHosts() []*Brief {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	bad := shown()
	bad.Findings, bad.Findings[0].Expect = bad.Findings[:3], ""
	silent := &Report{Schema: 1, Verdict: Inconclusive, Target: "192.0.2.2", Bound: 1, Notes: []string{"unproved", "not probed: 192.0.2.2 on eth0: next hop does not answer"}}
	good := &Report{Schema: 1, Target: "192.0.2.3, 2001:db8::3", Bound: 1e-8, Seconds: 2, Probes: 100, States: map[string]States{"tcp4": {Open: "80", Filtered: "1-79"}}}
	return []*Brief{bad.Brief("web<b>", "po\x1blicy.toml", at), silent.Brief("192.0.2.2", "other.toml", at), good.Brief("192.0.2.3", "other.toml", at)}
}

// Findings that differ in their port alone are one.
func TestBrief(t *testing.T) {
	b := someHosts()[0]
	want := []BriefFinding{
		{Family: "ipv4", Address: "192.0.2.1", Protocol: "tcp", Ports: "8192-8193", Count: 2, Probe: "syn from 192.0.2.9", Expected: "filtered", Observed: Open, Reason: "syn-ack"},
		{Family: "ipv4", Address: "192.0.2.1", Protocol: "tcp", Ports: "62001", Count: 1, Probe: "syn from 192.0.2.9", Expected: "filtered", Observed: Unknown, Reason: "path not proven"},
	}
	if d := cmp.Diff(want, b.Findings); d != "" {
		t.Error(d)
	}
	if b.wrong() != 2 || b.Why != "" {
		t.Errorf("%d wrong, %q", b.wrong(), b.Why)
	}
	for _, c := range []struct {
		notes    []string
		findings []Finding
		want     string
	}{
		{notes: []string{"50 UDP ports: unproved: silence", "probes to 192.0.2.1 did not leave: send on eth0: network is down"}, want: "probes to 192.0.2.1 did not leave: send on eth0: network is down"},
		{notes: []string{"192.0.2.1 has no canary: the policy opens no TCP port"}, findings: []Finding{{Reason: "path not proven"}}, want: "192.0.2.1 has no canary: the policy opens no TCP port"},
		{findings: []Finding{{Reason: "router"}, {Address: "192.0.2.1", Reason: "path not proven"}}, want: "no canary answers from 192.0.2.1: the path was not proven alive, so silence proves nothing"},
		{notes: []string{"unproved", "not judged: 80/tcp: reachable"}, want: "not judged: 80/tcp: reachable"},
		{findings: []Finding{{Observed: Unknown, Reason: "router"}}, want: "INCONCLUSIVE: nothing can be said of 1 port, for the reasons above"},
	} {
		r := &Report{Verdict: Inconclusive, Notes: c.notes, Findings: c.findings}
		if got := r.Brief("", "", time.Time{}).Why; got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestManyText(t *testing.T) {
	list := someHosts()
	for i, want := range []string{
		"  FAIL  web<b> (192.0.2.1 </title><script>alert(1)</script>): 2 findings against po\ufffdlicy.toml\n" +
			"          8192-8193/tcp  open     expected filtered  syn-ack          at 192.0.2.1\n" +
			"          62001/tcp      unknown  expected filtered  path not proven  at 192.0.2.1\n" +
			"  ?     192.0.2.2: 192.0.2.2 on eth0: next hop does not answer\n" +
			"  ok    1 host is as its policy says\n" +
			"FAIL: 2 findings in 1 of 3 hosts, nothing can be said of 1; 3.3s, 131,170 packets; chance that a TCP answer was missed ≤ 3e-07\n",
		"  ?     192.0.2.2: 192.0.2.2 on eth0: next hop does not answer\n" +
			"  ok    1 host is as its policy says\n" +
			"INCONCLUSIVE: nothing can be said of 1 of 2 hosts; 2s, 100 packets; chance that a TCP answer was missed ≤ 1e-08\n",
		"PASS: 1 host is as its policy says; 2s, 100 packets; chance that a TCP answer was missed ≤ 1e-08\n",
	} {
		m, err := Summarize(briefs(list[i:]...))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := m.WriteText(&b); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, b.String()); d != "" {
			t.Error(d)
		}
		if want := []Verdict{Fail, Inconclusive, Pass}[i]; m.Verdict != want {
			t.Errorf("verdict %s, want %s", m.Verdict, want)
		}
	}
	if m, err := Summarize(briefs(list[1])); err != nil || m.Bound != 1 {
		t.Errorf("without a living path: %v, bound %g", err, m.Bound)
	}
}

// Every format says of each host what it is, and no text of a host breaks out of it.
func TestManyFormats(t *testing.T) {
	list := someHosts()
	m, err := Summarize(briefs(list...))
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if err := m.WriteJSON(&text); err != nil {
		t.Fatal(err)
	}
	var read Many
	if err := json.Unmarshal(text.Bytes(), &read); err != nil {
		t.Fatalf("%v\n%s", err, text.Bytes())
	}
	for i := range read.Targets {
		if d := cmp.Diff(list[i], &read.Targets[i]); d != "" {
			t.Error(d)
		}
	}
	if read.Schema != 1 || read.Verdict != Fail || read.Hosts != (HostCounts{1, 1, 1}) || len(read.Targets) != 3 {
		t.Errorf("%+v", read)
	}

	text.Reset()
	if err := m.WriteJUnit(&text); err != nil {
		t.Fatal(err)
	}
	var x junitFile
	if err := xml.Unmarshal(text.Bytes(), &x); err != nil {
		t.Fatalf("%v\n%s", err, text.Bytes())
	}
	var got []string
	for _, s := range x.Suites {
		got = append(got, fmt.Sprintf("%s: %d tests, %d failures, %d errors", s.Name, len(s.Cases), s.Failures, s.Errors))
	}
	want := []string{
		"web<b> (192.0.2.1 </title><script>alert(1)</script>): 3 tests, 2 failures, 1 errors",
		"192.0.2.2: 1 tests, 0 failures, 1 errors",
		"192.0.2.3, 2001:db8::3: 1 tests, 0 failures, 0 errors",
	}
	if d := cmp.Diff(want, got); d != "" || x.Tests != 5 || x.Failures != 2 || x.Errors != 2 {
		t.Errorf("%d %d %d\n%s", x.Tests, x.Failures, x.Errors, d)
	}

	// Of many, the first are drawn and the others listed, those that fail first.
	for range 120 {
		list = append(list, list[2])
	}
	list = append(list, list[0])
	if m, err = Summarize(briefs(list...)); err != nil {
		t.Fatal(err)
	}
	text.Reset()
	if err := m.WriteHTML(&text, time.Date(2026, 1, 2, 3, 5, 0, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	page := text.String()
	if strings.Contains(page, "<script") || strings.Contains(page, "web<b>") || strings.Contains(page, "\x1b") || strings.Contains(page, "%!") {
		t.Error("text of a host is markup")
	}
	if rows, hosts, maps := strings.Count(page, "<td><a href="), strings.Count(page, "<details id="), strings.Count(page, "<svg"); rows != 124 || hosts != 124 || maps != 2*2+97 {
		t.Errorf("%d rows, %d hosts, %d maps", rows, hosts, maps)
	}
	for _, want := range []string{"<a href=\"#h1\">web&lt;b&gt;</a>", "<a href=\"#h2\">web&lt;b&gt;</a>", "<a href=\"#h3\">192.0.2.2</a>", "The ports of the first 100 hosts are drawn"} {
		if !strings.Contains(page, want) {
			t.Errorf("no %s", want)
		}
	}
	// Who reads no further ends it.
	for _, err := range []error{m.WriteText(closed{}), m.WriteJSON(closed{}), m.WriteJUnit(closed{}), m.WriteHTML(closed{}, time.Time{})} {
		if !errors.Is(err, errStop) {
			t.Errorf("got %v", err)
		}
	}
}

type closed struct{}

func (closed) Write([]byte) (int, error) { return 0, errStop }
