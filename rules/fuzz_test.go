package rules

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"golang.org/x/tools/txtar"
)

// FuzzCompile: the same bytes give the same table, and its text is whole.
func FuzzCompile(f *testing.F) {
	files, err := filepath.Glob("testdata/tables/*.txtar")
	if err != nil || len(files) == 0 {
		f.Fatalf("seeds: %v, %v", files, err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(txtar.Parse(src).Files[0].Data)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		a, _ := Parse("policy.toml", src, nil)
		b, _ := Parse("policy.toml", src, nil)
		if (a == nil) != (b == nil) {
			t.Fatal("parsed once, not twice")
		}
		if a == nil {
			return
		}
		x, y := Compile(a), Compile(b)
		if !reflect.DeepEqual(x.Table, y.Table) {
			t.Fatal("two tables from the same bytes")
		}
		var text bytes.Buffer
		if err := x.Table.WriteNFT(&text, goldenTime); err != nil {
			t.Fatal(err)
		}
		chains := map[string]bool{}
		for _, c := range x.Table.Chains {
			if chains[c.Name] {
				t.Errorf("two chains called %s", c.Name)
			}
			chains[c.Name] = true
		}
		sets := map[string]bool{}
		for _, s := range x.Table.Sets {
			if sets[s.Name] {
				t.Errorf("two sets called %s", s.Name)
			}
			sets[s.Name] = true
			for _, to := range s.Targets {
				if !chains[to] {
					t.Errorf("map %s jumps to %s, which is not there", s.Name, to)
				}
			}
		}
		for _, c := range x.Table.Chains {
			for _, r := range c.Rules {
				for _, e := range r.Exprs {
					switch e := e.(type) {
					case Verdict:
						if e.Chain != "" && !chains[e.Chain] {
							t.Errorf("chain %s jumps to %s, which is not there", c.Name, e.Chain)
						}
					case MatchSet:
						if !sets[e.Set] {
							t.Errorf("chain %s asks set %s, which is not there", c.Name, e.Set)
						}
					case VerdictMap:
						if !sets[e.Map] {
							t.Errorf("chain %s asks map %s, which is not there", c.Name, e.Map)
						}
					case MeterAdd:
						if !sets[e.Set] {
							t.Errorf("chain %s counts in %s, which is not there", c.Name, e.Set)
						}
					}
				}
			}
		}
	})
}
