package main

import (
	"cmp"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
)

// stamp is the version, the commit and the date of a package, for which the
// source need not be a git checkout.
//
//deadlight:linker
var stamp string

func newVersionCommand(e env) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version and the commit it was built from",
		Example: "  deadlight version",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			b := build()
			printf(e.stdout, "deadlight %s, commit %s of %s, %s %s/%s\n", b.version, b.commit, b.date, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return nil
		},
	}
}

// built is what this program was built from. The date is that of the commit:
// that of the build would make every build another one.
type built struct{ version, commit, date string }

func build() built {
	info, _ := debug.ReadBuildInfo()
	return builtFrom(stamp, info)
}

// builtFrom asks the package first, then git, as the go command saw it. It says
// so where the source was not that of the commit.
func builtFrom(stamp string, info *debug.BuildInfo) built {
	if f := strings.Fields(stamp); len(f) == 3 {
		return built{f[0], f[1], f[2]}
	}
	var b built
	if info != nil {
		b.version = info.Main.Version
		modified := ""
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				b.commit = s.Value
			case "vcs.time":
				b.date = s.Value
			case "vcs.modified":
				if s.Value == "true" {
					modified = " with changes"
				}
			}
		}
		if b.commit != "" {
			b.commit += modified
		}
	}
	const unknown = "unknown"
	return built{cmp.Or(b.version, unknown), cmp.Or(b.commit, unknown), cmp.Or(b.date, "unknown date")}
}
