package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"deadlight/rules"
)

// The help of the language names every key, and fits a screen.
func TestPolicyTopicNamesEveryKey(t *testing.T) {
	var out bytes.Buffer
	if code := run([]string{"help", "policy"}, env{stdout: &out, stderr: &out}); code != exitOK {
		t.Fatalf("exit %d: %s", code, out.String())
	}
	sections := map[string]string{}
	name := ""
	for _, line := range strings.Split(policyLanguage, "\n") {
		if m := regexp.MustCompile(`^\[+([a-z]+)`).FindStringSubmatch(line); m != nil {
			name = m[1]
		}
		sections[name] += line + "\n"
		if n := len([]rune(line)); n > 88 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	for _, key := range rules.Keys() {
		parts := strings.Split(key, ".")
		section, leaf := parts[0], parts[len(parts)-1]
		if len(parts) == 1 {
			section = ""
		}
		if !regexp.MustCompile(`\b` + leaf + `\b`).MatchString(sections[section]) {
			t.Errorf("help policy does not name %s", key)
		}
	}
	if !strings.Contains(out.String(), "[open.NAME]") {
		t.Errorf("help policy prints something else:\n%s", out.String())
	}
}
