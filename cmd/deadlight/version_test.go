package main

import (
	"runtime/debug"
	"testing"
)

func TestBuiltFrom(t *testing.T) {
	git := &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "cafe"}, {Key: "vcs.time", Value: "2026-11-21T11:00:00Z"}, {Key: "vcs.modified", Value: "true"},
	}}
	clean := &debug.BuildInfo{Main: debug.Module{Version: "v0.1.0"}, Settings: []debug.BuildSetting{
		{Key: "vcs.revision", Value: "cafe"}, {Key: "vcs.time", Value: "2026-11-21T11:00:00Z"}, {Key: "vcs.modified", Value: "false"},
	}}
	tests := map[string]struct {
		stamp string
		info  *debug.BuildInfo
		want  built
	}{
		"package":            {"0.1.0 beef 2026-11-20T00:00:00Z", git, built{"0.1.0", "beef", "2026-11-20T00:00:00Z"}},
		"checkout":           {"", clean, built{"v0.1.0", "cafe", "2026-11-21T11:00:00Z"}},
		"changed checkout":   {"", git, built{"(devel)", "cafe with changes", "2026-11-21T11:00:00Z"}},
		"without git":        {"", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}}, built{"(devel)", "unknown", "unknown date"}},
		"without build info": {"", nil, built{"unknown", "unknown", "unknown date"}},
		"half a stamp":       {"0.1.0 beef", nil, built{"unknown", "unknown", "unknown date"}},
	}
	for name, tt := range tests {
		if got := builtFrom(tt.stamp, tt.info); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}
