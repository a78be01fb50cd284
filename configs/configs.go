// Package configs holds the example policies, embedded, so that the program can
// hand them out on a machine that has nothing but the program.
//
// Every one of them is valid, gives no warning and is tried on a throw-away
// host by the tests. reference.toml names every key of the language. Beside them
// stand, tested but not embedded, what packages put into /etc and what other
// programs read: Ansible, pipelines, cloud-init and Grafana.
//
// It holds files and does nothing.
package configs

import (
	"embed"
	"fmt"
	"io/fs"
	"strings"
)

//go:embed *.toml
var files embed.FS

const extension = ".toml"

// Names gives the examples in alphabetical order, without .toml.
func Names() []string {
	entries, err := fs.ReadDir(files, ".")
	if err != nil {
		panic(err) // embedded: there at build time or no build
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = strings.TrimSuffix(e.Name(), extension)
	}
	return names
}

// Read gives an example by its name, with or without .toml. For a name that is
// not among [Names] the error is [fs.ErrNotExist].
func Read(name string) ([]byte, error) {
	b, err := files.ReadFile(strings.TrimSuffix(name, extension) + extension)
	if err != nil {
		return nil, fmt.Errorf("read example %q: %w", name, err)
	}
	return b, nil
}
