package verify

import (
	"context"
	"fmt"
	"os"
	"testing"
)

// TestMain runs every test of the package in throw-away namespaces: none of
// them ever sees the machine's own network, privileged or not.
func TestMain(m *testing.M) {
	if helper := os.Getenv(helperEnv); helper != "" {
		os.Exit(runHelper(helper))
	}
	if !Isolated() {
		code, err := Isolate(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		if err != nil {
			fmt.Fprintln(os.Stderr, "isolate tests:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := EnterIsolated(); err != nil {
		fmt.Fprintln(os.Stderr, "isolate tests:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}
