package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"deadlight/firewall"
)

// metrics writes a file for the textfile collector of node_exporter. The format
// is small enough to be written here: the client library of Prometheus would be
// 3 MB of this program, for its HTTP server and its protobuf.
type metrics struct {
	file string
}

func newMetrics(file string) *metrics { return &metrics{file} }

// metric is one that has no labels.
type metric struct {
	kind, name, help string
	value            float64
}

func statMetrics(s firewall.Stats) []metric {
	var drift, checked float64
	if s.Drift {
		drift = 1
	}
	if !s.LastCheck.IsZero() {
		checked = float64(s.LastCheck.UnixMilli()) / 1000
	}
	return []metric{
		{"gauge", "drift", "Whether the kernel holds something else than was applied.", drift},
		{"counter", "heals_total", "Times that what was applied was put back.", float64(s.Heals)},
		{"counter", "events_total", "Transactions of the ruleset that were heard of, of every program and table.", float64(s.Transactions)},
		{"counter", "events_lost_total", "Times that the kernel dropped news of the ruleset.", float64(s.Lost)},
		{"gauge", "last_check_timestamp_seconds", "When the kernel was last held against what was applied; 0: not yet.", checked},
		{"gauge", "generation", "The generation of the ruleset at the last check.", float64(s.Generation)},
	}
}

// write replaces the file: a reader finds the old one or the new one.
func (m *metrics) write(s firewall.Stats, counters map[string]firewall.Counter) error {
	var b bytes.Buffer
	head := func(kind, name, help string) {
		printf(&b, "# HELP deadlight_%s %s\n# TYPE deadlight_%s %s\n", name, help, name, kind)
	}
	for _, v := range statMetrics(s) {
		head(v.kind, v.name, v.help)
		printf(&b, "deadlight_%s %s\n", v.name, strconv.FormatFloat(v.value, 'g', -1, 64))
	}
	if len(counters) > 0 {
		head("counter", "packets_total", "Packets counted by a named counter of the table.")
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	for _, name := range slices.Sorted(maps.Keys(counters)) {
		printf(&b, "deadlight_packets_total{counter=\"%s\"} %d\n", escape.Replace(oneLine(name)), counters[name].Packets)
	}
	if err := replaceFile(m.file, &b); err != nil {
		return fmt.Errorf("write %s: %w", m.file, err)
	}
	return nil
}

// replaceFile makes a file that all may read whole, or not at all.
func replaceFile(name string, from io.Reader) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, from)
	if err == nil {
		err = f.Chmod(0o644)
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the first error is the one to tell
	}
	return err
}
