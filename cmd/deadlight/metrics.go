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

// metricFamily is a metric with its samples, in the text format of Prometheus.
type metricFamily struct {
	kind, name, help string // gauge or counter; the name without deadlight_
	samples          []sample
}

// sample is a value with the names and the values of its labels by turns.
type sample struct {
	value  float64
	labels []string
}

func single(kind, name, help string, value float64, labels ...string) metricFamily {
	return metricFamily{kind, name, help, []sample{{value, labels}}}
}

// writeFamilies writes metrics.
func writeFamilies(w io.Writer, list []metricFamily) error {
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`)
	var b bytes.Buffer
	for _, f := range list {
		printf(&b, "# HELP deadlight_%s %s\n# TYPE deadlight_%s %s\n", f.name, f.help, f.name, f.kind)
		for _, s := range f.samples {
			var labels []string
			for i := 0; i < len(s.labels); i += 2 {
				labels = append(labels, fmt.Sprintf(`%s="%s"`, s.labels[i], escape.Replace(oneLine(s.labels[i+1]))))
			}
			printf(&b, "deadlight_%s", f.name)
			if labels != nil {
				printf(&b, "{%s}", strings.Join(labels, ","))
			}
			printf(&b, " %s\n", strconv.FormatFloat(s.value, 'g', -1, 64))
		}
	}
	_, err := w.Write(b.Bytes())
	return err
}

// writeMetrics replaces a file: a reader finds the old one or the new one.
func writeMetrics(file string, list []metricFamily) error {
	var b bytes.Buffer
	if err := writeFamilies(&b, list); err != nil {
		return err
	}
	if err := replaceFile(file, &b); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

func (m *metrics) write(s firewall.Stats, counters map[string]firewall.Counter) error {
	var drift, checked float64
	if s.Drift {
		drift = 1
	}
	if !s.LastCheck.IsZero() {
		checked = float64(s.LastCheck.UnixMilli()) / 1000
	}
	list := []metricFamily{
		single("gauge", "drift", "Whether the kernel holds something else than was applied.", drift),
		single("counter", "heals_total", "Times that what was applied was put back.", float64(s.Heals)),
		single("counter", "events_total", "Transactions of the ruleset that were heard of, of every program and table.", float64(s.Transactions)),
		single("counter", "events_lost_total", "Times that the kernel dropped news of the ruleset.", float64(s.Lost)),
		single("gauge", "last_check_timestamp_seconds", "When the kernel was last held against what was applied; 0: not yet.", checked),
		single("gauge", "generation", "The generation of the ruleset at the last check.", float64(s.Generation)),
	}
	if len(counters) > 0 {
		packets := metricFamily{kind: "counter", name: "packets_total", help: "Packets counted by a named counter of the table."}
		for _, name := range slices.Sorted(maps.Keys(counters)) {
			packets.samples = append(packets.samples, sample{float64(counters[name].Packets), []string{"counter", name}})
		}
		list = append(list, packets)
	}
	return writeMetrics(m.file, list)
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
