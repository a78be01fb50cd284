package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

// A bug in the way to one policy must not keep the next from being loaded.
func TestGuarded(t *testing.T) {
	var stderr bytes.Buffer
	e := env{stderr: &stderr}
	err := guarded(e, func() error {
		var none []int
		return errors.New(string(rune(none[0])))
	})
	if err == nil || !strings.Contains(err.Error(), "a bug of deadlight") || !strings.Contains(stderr.String(), "boot_test.go") {
		t.Errorf("a panic gives %v and prints %q", err, stderr.String())
	}
	want := errors.New("refused")
	if err := guarded(e, func() error { return want }); err != want {
		t.Errorf("an error gives %v", err)
	}
}

func TestFirstLine(t *testing.T) {
	if got := firstLine(errors.New("not valid:\nfile:1:1: error")); got != "not valid" {
		t.Errorf("%q", got)
	}
}
