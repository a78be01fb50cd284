package firewall

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestStateVerified(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if v, err := s.Verified(); v != nil || err != nil {
		t.Errorf("before any: %v %v", v, err)
	}
	want := Verified{
		At: time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC), Verdict: "fail", Findings: 2, Proof: "host", Ports: "all",
		Policy: "/etc/deadlight/policy.toml", Digest: DigestOf([]Source{NewSource("policy.toml", []byte("version = 1"))}),
	}
	if err := s.NoteVerified(want); err == nil {
		t.Error("written without the lock")
	}
	if err := s.Lock(); err != nil {
		t.Fatal(err)
	}
	defer s.Unlock()
	if err := s.NoteVerified(want); err != nil {
		t.Fatal(err)
	}
	want.Version = stateVersion
	if v, err := s.Verified(); err != nil || *v != want {
		t.Errorf("%+v %v, want %+v", v, err, want)
	}
	// What a run that was killed left half written goes with the next sweep.
	half := filepath.Join(dir, verifiedName+tempEnd)
	if err := os.WriteFile(half, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("the half of a verdict is still there")
	}
	for text, cause := range map[string]error{"{": ErrStateDamaged, `{"version": 99}`: ErrStateVersion} {
		if err := os.WriteFile(filepath.Join(dir, verifiedName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, err := s.Verified(); v != nil || !errors.Is(err, cause) {
			t.Errorf("%s: %v %v, want %v", text, v, err, cause)
		}
	}
	if err := s.Clear(); err != nil {
		t.Fatal(err)
	}
	if v, err := s.Verified(); v != nil || err != nil {
		t.Errorf("after Clear: %v %v", v, err)
	}
}

// The digest tells policies apart by their text, their lists and what is missing.
func TestDigestOf(t *testing.T) {
	policy := NewSource("policy.toml", []byte("version = 1"))
	seen := map[string]bool{}
	for _, sources := range [][]Source{
		{policy}, {NewSource("policy.toml", []byte("version = 1\n"))}, {NewSource("other.toml", []byte("version = 1"))},
		{policy, NewSource("list.txt", nil)}, {policy, {Name: "list.txt", Absent: true}},
	} {
		if d := DigestOf(sources); seen[d] || DigestOf(sources) != d {
			t.Errorf("%+v: not a digest of its own", sources)
		} else {
			seen[d] = true
		}
	}
}
