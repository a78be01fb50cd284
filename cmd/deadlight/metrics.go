package main

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"

	"deadlight/firewall"
)

// metrics writes a file for the textfile collector of node_exporter.
type metrics struct {
	file     string
	registry *prometheus.Registry
	stats    firewall.Stats
	counters map[string]firewall.Counter
	packets  *prometheus.Desc
	values   []metric
}

// metric is one that has no labels.
type metric struct {
	desc  *prometheus.Desc
	typ   prometheus.ValueType
	value func(firewall.Stats) float64
}

func newMetrics(file string) *metrics {
	m := &metrics{
		file: file, registry: prometheus.NewRegistry(),
		packets: prometheus.NewDesc("deadlight_packets_total", "Packets counted by a named counter of the table.", []string{"counter"}, nil),
	}
	add := func(typ prometheus.ValueType, name, help string, value func(firewall.Stats) float64) {
		m.values = append(m.values, metric{prometheus.NewDesc("deadlight_"+name, help, nil, nil), typ, value})
	}
	add(prometheus.GaugeValue, "drift", "Whether the kernel holds something else than was applied.", func(s firewall.Stats) float64 {
		if s.Drift {
			return 1
		}
		return 0
	})
	add(prometheus.CounterValue, "heals_total", "Times that what was applied was put back.",
		func(s firewall.Stats) float64 { return float64(s.Heals) })
	add(prometheus.CounterValue, "events_total", "Transactions of the ruleset that were heard of, of every program and table.",
		func(s firewall.Stats) float64 { return float64(s.Transactions) })
	add(prometheus.CounterValue, "events_lost_total", "Times that the kernel dropped news of the ruleset.",
		func(s firewall.Stats) float64 { return float64(s.Lost) })
	add(prometheus.GaugeValue, "last_check_timestamp_seconds", "When the kernel was last held against what was applied; 0: not yet.",
		func(s firewall.Stats) float64 {
			if s.LastCheck.IsZero() {
				return 0
			}
			return float64(s.LastCheck.UnixMilli()) / 1000
		})
	add(prometheus.GaugeValue, "generation", "The generation of the ruleset at the last check.",
		func(s firewall.Stats) float64 { return float64(s.Generation) })
	m.registry.MustRegister(m)
	return m
}

// Describe implements [prometheus.Collector].
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- m.packets
	for _, v := range m.values {
		ch <- v.desc
	}
}

// Collect implements [prometheus.Collector].
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, v := range m.values {
		ch <- prometheus.MustNewConstMetric(v.desc, v.typ, v.value(m.stats))
	}
	for name, c := range m.counters {
		ch <- prometheus.MustNewConstMetric(m.packets, prometheus.CounterValue, float64(c.Packets), oneLine(name))
	}
}

// write replaces the file: a reader finds the old one or the new one.
func (m *metrics) write(s firewall.Stats, counters map[string]firewall.Counter) error {
	m.stats, m.counters = s, counters
	if err := prometheus.WriteToTextfile(m.file, m.registry); err != nil {
		return fmt.Errorf("write %s: %w", m.file, err)
	}
	return nil
}
