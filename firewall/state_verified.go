package firewall

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"
)

// verifiedName is of the last verdict about this host. It stands beside the records:
// losing it loses nothing that is in force.
const (
	verifiedName    = "verified"
	largestVerified = 64 << 10
)

// Verified is the last verdict of a verification of this host.
type Verified struct {
	Version   int       `json:"version"` // set by NoteVerified
	At        time.Time `json:"at"`
	Verdict   string    `json:"verdict"` // pass, fail or inconclusive
	Findings  int       `json:"findings"`
	Proof     string    `json:"proof"`  // host or packets
	Ports     string    `json:"ports"`  // what was probed: "all", or as it was asked for
	Policy    string    `json:"policy"` // file
	Digest    string    `json:"digest"` // of the policy: [DigestOf] its sources
	Namespace Namespace `json:"namespace"`
}

// DigestOf makes one digest of a policy, its includes and lists.
func DigestOf(sources []Source) string {
	h := sha256.New()
	for _, s := range sources {
		fmt.Fprintf(h, "%q %s %t\n", s.Name, s.SHA256, s.Absent)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// NoteVerified writes a verdict down in place of the one before, under [State.Lock].
func (s *State) NoteVerified(v Verified) error {
	if err := s.writable(); err != nil {
		return err
	}
	v.Version = stateVersion
	b, err := json.Marshal(v)
	if err != nil {
		return s.failed(verifiedName, err)
	}
	if err := s.put(verifiedName, append(b, '\n')); err != nil {
		return err
	}
	return s.syncDir()
}

// Verified gives the last verdict, nil when there is none.
func (s *State) Verified() (*Verified, error) {
	b, err := s.read(verifiedName, largestVerified)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	v := &Verified{}
	if err := json.Unmarshal(b, v); err != nil {
		return nil, s.failed(verifiedName, fmt.Errorf("%w: it is no longer what was written", ErrStateDamaged))
	}
	if v.Version != stateVersion {
		return nil, s.failed(verifiedName, fmt.Errorf("%w: %d, this deadlight knows %d", ErrStateVersion, v.Version, stateVersion))
	}
	return v, nil
}
