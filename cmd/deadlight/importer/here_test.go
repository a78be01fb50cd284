package importer

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// The firewall that starts with the system is found by its own switch.
func TestSwitchedOn(t *testing.T) {
	const conf, wanted = "etc/ufw/ufw.conf", "etc/systemd/system/multi-user.target.wants/firewalld.service"
	for name, c := range map[string]struct {
		files map[string]string
		want  []string
	}{
		"none":      {nil, nil},
		"installed": {map[string]string{conf: "# ENABLED=yes\nENABLED=no\nLOGLEVEL=low\n", "etc/firewalld/firewalld.conf": "DefaultZone=public\n"}, nil},
		"ufw":       {map[string]string{conf: "ENABLED=yes\n"}, []string{"ufw"}},
		"quoted":    {map[string]string{conf: "ENABLED=\"YES\"\n"}, []string{"ufw"}},
		"firewalld": {map[string]string{wanted: ""}, []string{"firewalld"}},
		"both":      {map[string]string{conf: "ENABLED=yes\n", wanted: ""}, []string{"ufw", "firewalld"}},
	} {
		root := t.TempDir()
		for file, text := range c.files {
			file = filepath.Join(root, file)
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := SwitchedOn(root); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
}

// Without the rules of the admin all would look shut: that is no policy to hand out.
func TestUFWUnreadable(t *testing.T) {
	_, err := readUFW(func(name string) ([]byte, error) {
		if name == "user.rules" {
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
		}
		return nil, fs.ErrNotExist
	}, "/etc/ufw", "/etc/default/ufw", nil)
	if !errors.Is(err, fs.ErrPermission) {
		t.Errorf("%v", err)
	}
}
