// Package systemd holds the units of Deadlight, embedded, so that packages and
// tests install the same ones.
//
// deadlight.service loads the policy before the network is configured, and never
// leaves a host open because the policy, the state or the disk is broken; stopping
// it opens nothing. deadlight-watch.service undoes changes by others.
// deadlight-verify.timer runs deadlight-verify.service, which probes this host from
// outside. Each may do what its command needs and nothing else; tests hold that
// against systemd-analyze.
//
// It holds files and does nothing.
package systemd

import (
	"embed"
	"fmt"
	"io/fs"
)

//go:embed *.service *.timer
var files embed.FS

// Names gives the units in alphabetical order.
func Names() []string {
	entries, err := fs.ReadDir(files, ".")
	if err != nil {
		panic(err) // embedded: there at build time or no build
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names
}

// Read gives a unit by its name. For one that is not among [Names] the error is
// [fs.ErrNotExist].
func Read(name string) ([]byte, error) {
	b, err := files.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read unit: %w", err)
	}
	return b, nil
}
