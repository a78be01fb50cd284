package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/verify"
)

// Elsewhere than on a terminal a line a minute tells how far the run is.
func TestManyProgress(t *testing.T) {
	var b bytes.Buffer
	p := newManyProgress(env{stderr: &b}, 1000, 400)
	start := p.began
	p.at(start, 0, 0.4)
	p.host(&verify.Brief{Verdict: verify.Fail, Findings: []verify.BriefFinding{{Count: 3, Observed: verify.Open}, {Count: 7}}})
	p.host(&verify.Brief{Verdict: verify.Inconclusive, Findings: []verify.BriefFinding{{Count: 7}}})
	p.at(start.Add(59*time.Second), 1000, 0.41)
	p.at(start.Add(time.Minute), 600_000, 0.5)
	p.at(start.Add(90*time.Second), 900_000, 0.6)
	p.at(start.Add(2*time.Minute), 900_000, 1)
	p.done()
	want := "deadlight: probing: 402 of 1000 hosts, 3 findings, 1 not told, 10000 packets/s, 5m0s left\n" +
		"deadlight: probing: 402 of 1000 hosts, 3 findings, 1 not told, 5000 packets/s, 0s left\n"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
	b.Reset()
	p.drawn, p.every = true, 0
	p.at(start.Add(3*time.Minute), 900_000, 1)
	p.done()
	if !strings.HasPrefix(b.String(), "\r\x1b[Kprobing: 402 of") || !strings.HasSuffix(b.String(), "left\r\x1b[K") {
		t.Errorf("drawn as %q", b.String())
	}
}

// Whatever a file of targets holds, it is read or refused with a place in it.
func FuzzParseTargets(f *testing.F) {
	for _, s := range []string{
		"192.0.2.1", "192.0.2.1,2001:db8::1 a.toml web # x\n\n# y\r\n192.0.2.2 - b", "\ufeff192.0.2.1", "192.0.2.1,,\xff 1.toml", "a b c d",
		"\t192.0.2.1\u00a0x", "::ffff:192.0.2.1", "fe80::1%eth0", "192.0.2.1-9", "192.0.2.0/24",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		hosts, problems := parseTargets("fleet/hosts.txt", []byte(text), "policy.toml")
		if len(hosts) == 0 && len(problems) == 0 {
			t.Fatal("neither hosts nor problems")
		}
		for _, p := range problems {
			if p.Pos.Line < 1 || p.Pos.Column < 1 || p.Width < 1 || p.Summary == "" || !strings.Contains(p.String(), "fleet/hosts.txt:") {
				t.Errorf("%+v", p)
			}
		}
		seen := map[string]bool{}
		for _, h := range hosts {
			if len(problems) == 0 && (len(h.addresses) == 0 || h.name == "" || h.policy == "" || seen[h.String()]) {
				t.Errorf("%+v", h)
			}
			seen[h.String()] = true
		}
	})
}

// A journal says which hosts need not be probed any more: nobody else may have
// written it.
func TestJournalOfAnother(t *testing.T) {
	name := filepath.Join(t.TempDir(), "journal")
	var h journalHeader
	h.Schema, h.Journal = 1, journalKind
	begin := func() error {
		j, _, err := openJournal(name, nil, h)
		if err != nil {
			return err
		}
		return j.f.Close()
	}
	for range 2 { // begun, and gone on with
		if err := begin(); err != nil {
			t.Fatal(err)
		}
	}
	// Whoever begins it at the same moment does not take it from the first.
	before, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	other := h
	other.Began = time.Unix(2e9, 0)
	if err := beginJournal(name, other); err != nil {
		t.Fatal(err)
	}
	if now, err := os.ReadFile(name); err != nil || !bytes.Equal(now, before) {
		t.Errorf("begun twice: %v, %q, was %q", err, now, before)
	}
	if left, err := os.ReadDir(filepath.Dir(name)); err != nil || len(left) != 1 {
		t.Errorf("%v: %v", err, left)
	}
	refusedFor := func(want string) {
		t.Helper()
		var x *exitError
		if err := begin(); !errors.As(err, &x) || x.code != exitRefused || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := os.Chmod(name, 0o622); err != nil {
		t.Fatal(err)
	}
	refusedFor("others may write " + name + " (mode 0622)")
	if os.Geteuid() == 0 {
		if err := errors.Join(os.Chmod(name, 0o600), os.Chown(name, 1, 1)); err != nil {
			t.Fatal(err)
		}
		refusedFor(name + " belongs to another user")
	}
}

// What is missing from the reports does not pass.
func TestJournalCutShort(t *testing.T) {
	j, err := temporaryJournal(journalHeader{})
	if err != nil {
		t.Fatal(err)
	}
	defer j.f.Close()
	one := &verify.Brief{Name: "one", Target: "192.0.2.1", Policy: "p.toml"}
	if err := j.add(one); err != nil {
		t.Fatal(err)
	}
	first := j.end
	if err := j.add(&verify.Brief{Name: "two", Target: "192.0.2.2", Policy: "p.toml", Verdict: verify.Fail}); err != nil {
		t.Fatal(err)
	}
	if m, err := j.summary(2); err != nil || m.Verdict != verify.Fail {
		t.Fatalf("%+v, %v", m, err)
	}
	if err := j.f.Truncate(first); err != nil {
		t.Fatal(err)
	}
	if m, err := j.summary(2); err == nil || !strings.Contains(err.Error(), "there are 1, of 2 hosts") {
		t.Errorf("%+v, %v", m, err)
	}
}
