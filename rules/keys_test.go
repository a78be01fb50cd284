package rules_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"deadlight/rules"
)

// Keys are those that everyKey has, no more and no less.
func TestKeys(t *testing.T) {
	var tree map[string]any
	meta, err := toml.Decode(everyKey+"[x]\n", &tree)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, k := range meta.Keys() {
		parts := slices.Clone([]string(k))
		if slices.Contains([]string{"open", "block", "egress", "set", "service"}, parts[0]) && len(parts) > 1 {
			parts[1] = "*"
		}
		if parts[0] == "expect" && len(parts) > 1 {
			parts = slices.Insert(parts, 1, "*")
		}
		name := strings.Join(parts, ".")
		switch {
		case len(parts) == 1 && name != "version" && name != "include", strings.HasSuffix(name, "*"):
		default:
			want = append(want, name)
		}
	}
	slices.Sort(want)
	want = slices.Compact(want)
	got := rules.Keys()
	for _, k := range got {
		if !slices.Contains(want, k) {
			t.Errorf("%s is in Keys, but not in everyKey", k)
		}
	}
	for _, k := range want {
		if !slices.Contains(got, k) {
			t.Errorf("%s is in everyKey, but not in Keys", k)
		}
	}
	if !slices.IsSorted(got) || len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("not sorted, or not each once: %v", got)
	}
}
