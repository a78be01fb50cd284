package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"deadlight/verify"
)

var update = flag.Bool("update", false, "rewrite what the scripts expect")

// TestMain moves the tests into namespaces of their own: a script that forgets
// to make one cannot reach the machine's firewall.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "deadlight" { // a script runs the command
		main()
		return
	}
	if filepath.Base(os.Args[0]) == "sshd" {
		if err := standInSSHD(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(measureEnv) != "" {
		if err := measure(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "measure:", err)
			os.Exit(1)
		}
		return
	}
	// What a policy stands in must not be writable by a group.
	unix.Umask(0o022)
	if !verify.Isolated() {
		code, err := verify.Isolate(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
		if err != nil {
			fmt.Fprintln(os.Stderr, "command tests need namespaces:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := verify.EnterIsolated(); err != nil {
		fmt.Fprintln(os.Stderr, "command tests need namespaces:", err)
		os.Exit(1)
	}
	// What is applied is recorded in /run, which must not be the machine's.
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		fmt.Fprintln(os.Stderr, "command tests need a /run of their own:", err)
		os.Exit(1)
	}
	testscript.Main(m, map[string]func(){"deadlight": main})
}

// TestScripts runs testdata/script/*.txtar: every command with what it prints.
func TestScripts(t *testing.T) {
	examples, err := filepath.Abs("../../configs")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			env.Setenv("CONFIGS", examples)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":    exits,
			"conforms": conformsCmd(t),
		},
	})
}

// exits N CMD...: runs a command that must end with exit code N.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND [ARG...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		var exit interface{ ExitCode() int }
		if e, ok := err.(interface{ ExitCode() int }); ok {
			exit = e
		} else {
			ts.Fatalf("%v: %v", args[1:], err)
		}
		got = exit.ExitCode()
	}
	if want := args[0]; fmt.Sprint(got) != want {
		ts.Fatalf("%v exits with %d, want %s", args[1:], got, want)
	}
}
