package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"deadlight/verify"
)

// manyOverSSH looks at the two addresses of the outside as at two hosts, from the
// host of a lab: one has a hole that its policy does not know of.
func manyOverSSH(t *testing.T, l *sshLab, policy, hole, vantage, config string) {
	t.Helper()
	targets := l.file("targets.txt")
	if err := os.WriteFile(targets, fmt.Appendf(nil, "%s - four\n%s %s six\n", peer4, peer6, hole), 0o600); err != nil {
		t.Fatal(err)
	}
	journal := l.file("journal")
	args := []string{"verify", policy, "--targets", targets, "--resume", journal, "--vantage", vantage, "--ssh-config", config, "--ports", "70-90/tcp,8080/tcp", "--json"}
	c := exec.Command(l.file("deadlight"), args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "a host in the journal", func() bool {
		b, _ := os.ReadFile(journal) // not there yet
		return bytes.Count(b, []byte("\n")) > 1
	})
	if err := c.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = c.Wait() // the exit code tells
	if code := c.ProcessState.ExitCode(); code != exitInterrupted || !strings.Contains(errs.String(), "1 of 2 hosts done, kept in "+journal) {
		t.Errorf("interrupted: exit %d\n%s", code, errs.String())
	}
	code, out, said := runCode(args...)
	var m verify.Many
	if err := json.Unmarshal([]byte(out), &m); err != nil || code != exitFindings {
		t.Fatalf("exit %d, %v\n%s%s", code, err, out, said)
	}
	if m.Resumed != 1 || len(m.Targets) != 2 || m.Hosts != (verify.HostCounts{Pass: 1, Fail: 1}) {
		t.Errorf("%+v", m)
	}
	for i, b := range m.Targets {
		want, at, verdict := "four", vantage+": "+l.host4.String()+" (eth0)", verify.Fail
		if i == 1 {
			want, at, verdict = "six", vantage+": "+l.host6.String()+" (eth0)", verify.Pass
		}
		if b.Name != want || b.Vantage != at || b.Verdict != verdict || b.Bound > 1e-6 {
			t.Errorf("host %d: %+v", i, b)
		}
	}
}

// The far side reads nothing but its request.
func TestFromVantageMany(t *testing.T) {
	for in, want := range map[string]string{
		"": "no request on standard input",
		`{"policies":{"p.toml":{"files":{"p.toml":"dmVyc2lvbiA9IDMK"}}}}`:                                                                             "1 error: nothing probed",
		`{"hosts":[{"targets":"192.0.2.1","policy":"p.toml"}]}`:                                                                                       "the request has no policy \"p.toml\"",
		`{"policies":{"p.toml":{"files":{"p.toml":"dmVyc2lvbiA9IDEK"}}},"hosts":[{"targets":"a","policy":"p.toml"}]}`:                                 "--target wants an address: \"a\"",
		`{"policies":{"p.toml":{"files":{"p.toml":"dmVyc2lvbiA9IDEK"}}},"hosts":[{"targets":"192.0.2.1","policy":"p.toml"}],"look":{"ports":"none"}}`: "not a port specification",
	} {
		var out, errs bytes.Buffer
		if code := run([]string{fromVantageMany}, env{stdin: strings.NewReader(in), stdout: &out, stderr: &errs}); code != exitUsage || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit %d, want %q\n%s", in, code, want, errs.String())
		}
	}
}

// What the far side sends may come in pieces; what makes no sense ends the run.
func TestFarLines(t *testing.T) {
	for text, want := range map[string]string{
		"one\ntwo\n":        "one two ",
		"one\ntwo":          "one ",
		"one\nbad\nthree\n": "one bad stopped ",
	} {
		for _, size := range []int{1, 3, 100} {
			got := ""
			l := &farLines{stop: func() { got += "stopped " }, take: func(line []byte) error {
				got += string(line) + " "
				if string(line) == "bad" {
					return errors.New("no")
				}
				return nil
			}}
			for rest := []byte(text); len(rest) > 0; {
				n := min(size, len(rest))
				if wrote, err := l.Write(rest[:n]); wrote != n || err != nil {
					t.Errorf("%q: %d, %v", text, wrote, err)
				}
				rest = rest[n:]
			}
			if got != want || (l.err != nil) != strings.Contains(want, "stopped") {
				t.Errorf("%q by %d: %q, want %q, %v", text, size, got, want, l.err)
			}
		}
	}
}

// A far side that never ends its line does not fill the memory of this machine.
func TestFarLineWithoutEnd(t *testing.T) {
	stopped := 0
	l := &farLines{stop: func() { stopped++ }, take: func([]byte) error { return errors.New("no line has ended") }}
	piece := bytes.Repeat([]byte("x"), 1<<20)
	for range 2*longestLine/len(piece) + 1 {
		if n, err := l.Write(piece); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
	}
	if stopped != 1 || !errors.Is(l.err, verify.ErrVantage) || len(l.rest) > 0 {
		t.Errorf("stopped %d times, %v, and %d bytes are kept", stopped, l.err, len(l.rest))
	}
}
