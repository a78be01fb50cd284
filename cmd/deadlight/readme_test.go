package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestReadme: the README tells of every command and every exit code.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	text := string(readme)
	for _, c := range newRootCommand(env{}).Commands() {
		if !c.Runnable() || c.Hidden {
			continue // a topic of the help, or nothing for people
		}
		if row := "| `deadlight " + c.Use + "`"; !strings.Contains(text, row) {
			t.Errorf("README.md has no row that begins %q", row)
		}
	}
	for _, code := range []int{exitOK, exitFindings, exitUsage, exitRefused, exitRolledBack, exitBug, exitInterrupted} {
		if row := fmt.Sprintf("\n| %d | ", code); !strings.Contains(text, row) {
			t.Errorf("README.md does not explain exit code %d", code)
		}
	}
}
