package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/tools/txtar"

	"deadlight/configs"
	"deadlight/rules"
)

// schema/policy.json is for editors, which mark what it does not allow. It must
// name the same keys as the language, and mark nothing that is right. Editors know
// no draft beyond 7; the reader here is told by its $schema.

// asJSON gives a TOML document as the value that editors make of it: a date is a
// string.
func asJSON(t *testing.T, src []byte) (any, error) {
	t.Helper()
	var doc map[string]any
	if err := toml.Unmarshal(src, &doc); err != nil {
		return nil, err
	}
	b, err := json.Marshal(datesAsText(doc))
	if err != nil {
		t.Fatal(err)
	}
	return jsonschema.UnmarshalJSON(bytes.NewReader(b))
}

func datesAsText(v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for k, e := range v {
			out[k] = datesAsText(e)
		}
		return out
	case []map[string]any:
		out := []any{}
		for _, e := range v {
			out = append(out, datesAsText(e))
		}
		return out
	case []any:
		out := []any{}
		for _, e := range v {
			out = append(out, datesAsText(e))
		}
		return out
	case time.Time:
		if strings.Contains(v.Location().String(), "-local") { // a date or a time without its offset
			return v.Format(time.DateTime)
		}
		return v.Format(time.RFC3339)
	}
	return v
}

// Every example of configs/, and every policy of the tests that Parse takes, is
// right; what has an unknown key or table or a value of a wrong type is not.
func TestPolicySchema(t *testing.T) {
	s := compileSchema(t, "policy")
	for _, name := range configs.Names() {
		src, err := configs.Read(name)
		if err != nil {
			t.Fatal(err)
		}
		v, err := asJSON(t, src)
		if err == nil {
			err = s.Validate(v)
		}
		if err != nil {
			t.Errorf("configs/%s.toml: %v", name, err)
		}
	}
	var files []string
	for _, pattern := range []string{"errors/*.txtar", "tables/*.txtar"} {
		names, err := filepath.Glob("../../rules/testdata/" + pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, names...)
	}
	right, wrong := 0, 0
	for _, name := range files {
		a, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var src, want []byte
		for _, f := range a.Files {
			switch f.Name {
			case "policy.toml":
				src = f.Data
			case "want":
				want = f.Data
			}
		}
		v, err := asJSON(t, src)
		if src == nil || err != nil {
			continue // not TOML: editors say so without a schema
		}
		err = s.Validate(v)
		mistaken := regexp.MustCompile(`(?m)^policy\.toml:\d+:\d+: error: (unknown (key|table) .*|.* must be .*)$`).Find(want)
		switch {
		case mistaken != nil && err == nil:
			t.Errorf("%s: nothing is wrong with it, but\n%s", name, mistaken)
		case mistaken != nil:
			wrong++
		case !bytes.Contains(want, []byte(": error: ")):
			right++
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if right < 25 || wrong < 45 {
		t.Errorf("only %d right and %d wrong policies were looked at", right, wrong)
	}
}

// The schema has every key of the language, and no other.
func TestPolicySchemaKeys(t *testing.T) {
	var keys []string
	var walk func(s *jsonschema.Schema, path []string)
	walk = func(s *jsonschema.Schema, path []string) {
		for s.Ref != nil {
			s = s.Ref
		}
		// The tables, among what a value may be.
		for _, one := range slices.Concat(s.AllOf, s.AnyOf) {
			walk(one, path)
		}
		if items, ok := s.Items.(*jsonschema.Schema); ok {
			walk(items, append(slices.Clone(path), "*"))
		}
		for pattern, of := range s.PatternProperties {
			if !pattern.MatchString("a.B-1_") || pattern.MatchString("-a") || pattern.MatchString(strings.Repeat("a", 49)) {
				t.Errorf("the names of %v: %v", path, pattern)
			}
			walk(of, append(slices.Clone(path), "*"))
		}
		for name, of := range s.Properties {
			below := append(slices.Clone(path), name)
			if len(path) > 0 || name == "version" || name == "include" {
				keys = append(keys, strings.Join(below, "."))
			}
			walk(of, below)
		}
		if s.Properties != nil && s.AdditionalProperties != false {
			t.Errorf("%v: lets any key in", path)
		}
	}
	s := compileSchema(t, "policy")
	walk(s, nil)
	slices.Sort(keys)
	if diff := cmp.Diff(rules.Keys(), slices.Compact(keys)); diff != "" {
		t.Errorf("schema/policy.json (-language +schema):\n%s", diff)
	}
}

// What the schema calls the default is that.
func TestPolicySchemaDefaults(t *testing.T) {
	written := map[string]map[string]any{}
	s := compileSchema(t, "policy")
	for name, table := range s.Properties {
		for key, of := range table.Properties {
			for of.Ref != nil {
				of = of.Ref
			}
			if of.Default == nil {
				continue
			}
			if written[name] == nil {
				written[name] = map[string]any{}
			}
			written[name][key] = *of.Default
			if n, ok := (*of.Default).(json.Number); ok {
				i, err := n.Int64()
				if err != nil {
					t.Fatal(err)
				}
				written[name][key] = i
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(written)), []string{"default", "dhcp", "icmp", "log", "published", "verify"}; !slices.Equal(got, want) {
		t.Errorf("tables with defaults: %v, want %v", got, want)
	}
	var src bytes.Buffer
	src.WriteString("version = 1\n")
	if err := toml.NewEncoder(&src).Encode(written); err != nil {
		t.Fatal(err)
	}
	got, problems := rules.Parse("policy.toml", src.Bytes(), nil)
	want, _ := rules.Parse("policy.toml", []byte("version = 1\n"), nil)
	if got == nil || len(problems) > 0 {
		t.Fatalf("%v\n%s", problems, src.String())
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(rules.Policy{}), cmpopts.IgnoreTypes(rules.Pos{})); diff != "" {
		t.Errorf("the defaults of schema/policy.json (-left out +written):\n%s", diff)
	}
}
