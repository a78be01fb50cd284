// Command deadlight keeps every port of a Linux host silent but those its
// policy opens, and proves it from outside.
//
// It has the words, the flags and the terminal: each command compares two of what a
// policy says (package rules), what the kernel holds (firewall) and what the network
// shows (verify). Its answer goes to the standard output, and the exit code says it
// too. It never listens, never runs nft, and changes nothing that it was only asked
// about.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
)

func main() {
	// A command is over before it has to save memory: with the default, half of the
	// time that a list of a million lines takes goes into collections.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	os.Exit(run(os.Args[1:], env{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, plain: wantsPlain()}))
}

// env is what a command may touch of the process it runs in.
type env struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	plain          bool // words alone: no columns, carets or lines that change
}

// run executes one command line and gives its exit code; it is the only way out.
func run(args []string, e env) (code int) {
	defer func() {
		if r := recover(); r != nil {
			fmt.Fprintf(e.stderr, "deadlight: error: this is a bug of deadlight: %v\n\n%s\n", r, debug.Stack())
			fmt.Fprintln(e.stderr, "deadlight: hint: please report it with the lines above and the policy, if you may share it")
			code = exitBug
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	root := newRootCommand(e)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	var x *exitError
	if ctx.Err() != nil && !(errors.As(err, &x) && x.err == nil) {
		fmt.Fprintln(e.stderr, "deadlight: interrupted")
		return exitInterrupted
	}
	return report(e, err)
}
