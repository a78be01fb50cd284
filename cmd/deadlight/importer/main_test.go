package importer

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"deadlight/verify"
)

var update = flag.Bool("update", false, "rewrite the policies and notes that the fixtures expect")

// TestMain moves the tests into namespaces of their own: rules are loaded.
func TestMain(m *testing.M) {
	// The workers of the fuzzer talk to it by inherited files, and load nothing.
	if fuzzing := slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz=") || a == "-test.fuzzworker" }); fuzzing {
		os.Exit(m.Run())
	}
	if !verify.Isolated() {
		code, err := verify.Isolate(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		if err != nil {
			fmt.Fprintln(os.Stderr, "importer tests need namespaces:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := verify.EnterIsolated(); err != nil {
		fmt.Fprintln(os.Stderr, "importer tests need namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
