package importer

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
)

// fixture is an archive of testdata: files in/… are what is imported, policy.toml
// and notes what must come out. The comment of the archive says what it is about;
// a line "import:" in it has the arguments.
type fixture struct {
	name string // format/name
	path string
	*txtar.Archive
	args []string
}

func fixtures(t *testing.T) []fixture {
	t.Helper()
	paths, err := filepath.Glob("testdata/*/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	var out []fixture
	for _, p := range paths {
		a, err := txtar.ParseFile(p)
		if err != nil {
			t.Fatal(err)
		}
		f := fixture{name: strings.TrimSuffix(strings.TrimPrefix(p, "testdata/"), ".txtar"), path: p, Archive: a}
		for _, line := range strings.Split(string(a.Comment), "\n") {
			if rest, ok := strings.CutPrefix(line, "import: "); ok {
				f.args = strings.Fields(rest)
			}
		}
		if f.args == nil {
			t.Fatalf("%s: no line import:", p)
		}
		out = append(out, f)
	}
	return out
}

// unpack writes the files below a fresh directory and goes there.
func (f *fixture) unpack(t *testing.T) {
	t.Helper()
	dir := t.TempDir()
	for _, file := range f.Files {
		name := filepath.Join(dir, file.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, file.Data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
}

func (f *fixture) file(name string) []byte {
	i := slices.IndexFunc(f.Files, func(x txtar.File) bool { return x.Name == name })
	if i < 0 {
		return nil
	}
	return f.Files[i].Data
}

func (f *fixture) set(name string, data []byte) {
	i := slices.IndexFunc(f.Files, func(x txtar.File) bool { return x.Name == name })
	if i < 0 {
		f.Files = append(f.Files, txtar.File{Name: name})
		i = len(f.Files) - 1
	}
	f.Files[i].Data = data
}

func (f *fixture) imported(t *testing.T) (policy string, notes []Note, err error) {
	t.Helper()
	p, err := Import(f.args, Options{Stdin: bytes.NewReader(f.file("stdin"))})
	if err != nil {
		return "", nil, err
	}
	return p.Text, p.Notes, nil
}

// Every fixture gives the policy and the notes that stand in it.
func TestFixtures(t *testing.T) {
	count := map[string]int{}
	for _, f := range fixtures(t) {
		format, _, _ := strings.Cut(f.name, "/")
		count[format]++
		t.Run(f.name, func(t *testing.T) {
			path, err := filepath.Abs(f.path)
			if err != nil {
				t.Fatal(err)
			}
			if text := f.file("ruleset.nft"); *update && format == "nft" && text != nil && f.file("ruleset.json") == nil {
				w := judgeHost(t)
				inHost(t, w, string(text), "nft", "-f", "-")
				f.set("ruleset.json", append(bytes.TrimSpace(inHost(t, w, "", "nft", "-j", "list", "ruleset")), '\n'))
			}
			f.unpack(t)
			policy, notes, err := f.imported(t)
			var said strings.Builder
			for _, n := range notes {
				said.WriteString(n.String() + "\n")
			}
			got := map[string]string{"policy.toml": policy, "notes": said.String()}
			if err != nil {
				got = map[string]string{"error": err.Error() + "\n"}
			}
			if *update {
				f.Files = slices.DeleteFunc(f.Files, func(x txtar.File) bool { return x.Name == "error" || x.Name == "policy.toml" || x.Name == "notes" })
			}
			for _, name := range []string{"policy.toml", "notes", "error"} {
				text, ok := got[name]
				if !ok {
					if f.file(name) != nil {
						t.Errorf("there is no %s", name)
					}
					continue
				}
				if *update {
					f.set(name, []byte(text))
				} else if d := cmp.Diff(string(f.file(name)), text); d != "" {
					t.Errorf("%s (-want +got):\n%s", name, d)
				}
			}
			if *update {
				if err := os.WriteFile(path, txtar.Format(f.Archive), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
	t.Logf("%v", count)
}
