package importer

import (
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"deadlight/rules"
)

// seeds adds the files of fixtures whose name ends so.
func seeds(f *testing.F, pattern, suffix string) {
	f.Helper()
	paths, err := fs.Glob(os.DirFS("testdata"), pattern)
	if err != nil || len(paths) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	for _, p := range paths {
		b, err := fs.ReadFile(os.DirFS("testdata"), p)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range txtar.Parse(b).Files {
			if strings.HasSuffix(file.Name, suffix) {
				f.Add(file.Data)
			}
		}
	}
}

// sound reports what must hold of every text: an error, or a policy that is valid.
func sound(t *testing.T, set *ruleset, err error) {
	t.Helper()
	if err != nil {
		return
	}
	p, err := convert(set)
	if err != nil {
		return
	}
	p.notes = gather(p.notes)
	text := p.text()
	if parsed, problems := rules.Parse("policy.toml", []byte(text), nil); parsed == nil {
		t.Fatalf("not a policy: %v\n%s", problems, text)
	}
}

func FuzzIptables(f *testing.F) {
	seeds(f, "iptables/*.txtar", ".v4")
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := loadIptables([]source{{"rules.v4", data}}, Options{Family: "ipv4"})
		sound(t, set, err)
	})
}

func FuzzIPSet(f *testing.F) {
	seeds(f, "iptables/ipset.txtar", "sets")
	f.Fuzz(func(t *testing.T, data []byte) {
		set := newRuleset("iptables")
		_ = readIPSet(source{"sets", data}, map[string]addrs{}, set) // an error is an answer too
		for _, s := range set.sets {
			if len(words(s.all)) != len(s.all) {
				t.Fatalf("%v", s)
			}
		}
	})
}

func FuzzUFW(f *testing.F) {
	seeds(f, "ufw/*.txtar", "user.rules")
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := loadUFWFiles([]source{{"user.rules", data}})
		sound(t, set, err)
	})
}

func FuzzNFT(f *testing.F) {
	seeds(f, "nft/*.txtar", ".json")
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := loadNFT(source{"ruleset.json", data})
		sound(t, set, err)
	})
}

func FuzzFirewalld(f *testing.F) {
	seeds(f, "firewalld/*.txtar", ".xml")
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &firewalld{
			read: func(name string) (string, []byte, error) {
				switch name {
				case "zones/public.xml", "services/ssh.xml", "ipsets/bad.xml":
					return name, data, nil
				}
				return "", nil, fs.ErrNotExist
			},
			list: func(string) ([]string, error) { return nil, nil },
		}
		set, err := p.load("etc/firewalld")
		sound(t, set, err)
	})
}
