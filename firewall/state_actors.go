package firewall

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Who changed the table. The kernel names the process in the event of a
// transaction and never again: asked for the generation, it answers with the
// process that asks (nf_tables_fill_gen_info, net/netfilter/nf_tables_api.c). So
// whoever listened writes it down here, for those who come later.

const (
	actorsName    = "actors"
	largestActors = 64 << 10
)

type actorEntry struct {
	Namespace  Namespace  `json:"namespace"`
	Generation Generation `json:"generation"`
}

// NoteActor writes down who made a generation that changed the table. It needs
// no lock; only the last few hundred are kept.
func (s *State) NoteActor(here Namespace, g Generation) error {
	line, err := json.Marshal(actorEntry{here, g})
	if err != nil {
		return s.failed(actorsName, err)
	}
	old, err := s.read(actorsName, -1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(old) > largestActors {
		if err := s.unlink(actorsName); err != nil {
			return err
		}
		old = old[len(old)/2:]
		line = append(old[bytes.IndexByte(old, '\n')+1:], line...)
	}
	f, err := os.OpenFile(filepath.Join(s.dir, actorsName), os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return s.failed(actorsName, err)
	}
	_, err = f.Write(append(line, '\n'))
	if err = errors.Join(err, f.Close()); err != nil {
		return s.failed(actorsName, fmt.Errorf("write: %w", err))
	}
	return nil
}

// Actors lists who is known to have changed the table of a namespace after a
// generation, in order. Nobody may have listened: there may be others.
func (s *State) Actors(here Namespace, after uint32) ([]Generation, error) {
	b, err := s.read(actorsName, -1)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []Generation
	for line := range bytes.Lines(b) {
		var e actorEntry
		// A line that was cut short says nothing.
		if json.Unmarshal(line, &e) == nil && e.Namespace.Is(here) && e.Generation.ID > after {
			out = append(out, e.Generation)
		}
	}
	return out, nil
}
