package importer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// SwitchedOn names those of ufw and firewalld that start with the system whose root
// is given.
func SwitchedOn(root string) ([]string, error) {
	var on []string
	name := filepath.Join(root, "etc/ufw/ufw.conf")
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, readError(name, err)
	}
	if ufwEnabled(b) {
		on = append(on, "ufw")
	}
	// What systemctl enable makes; the unit may lead nowhere as seen from outside of root.
	wanted, err := filepath.Glob(filepath.Join(root, "etc/systemd/system/*.wants/firewalld.service"))
	if err != nil {
		return nil, err
	}
	if len(wanted) > 0 {
		on = append(on, "firewalld")
	}
	return on, nil
}

// ufwEnabled reads ufw.conf.
func ufwEnabled(conf []byte) bool {
	for line := range strings.Lines(string(conf)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		if strings.TrimSpace(key) == "ENABLED" && strings.EqualFold(strings.Trim(value, ` "'`), "yes") {
			return true
		}
	}
	return false
}
