package main

import (
	"bytes"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"deadlight/verify"
)

// The metrics are what their own parser reads.
func TestVerificationMetrics(t *testing.T) {
	var b bytes.Buffer
	r := &verify.Report{Verdict: verify.Inconclusive, Target: "a \"host\"\n", Bound: 1e-7, Seconds: 2, Probes: 3, Counts: verify.Counts{Closed: 4}, Findings: make([]verify.Finding, 5),
		Expects: []verify.Expected{{Result: "met"}, {Result: "unprobed"}, {Result: "met"}}}
	if err := writeFamilies(&b, verification(r, time.UnixMilli(1500))); err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(&b)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for name, f := range families {
		if f.GetType() != dto.MetricType_GAUGE || f.GetHelp() == "" {
			t.Errorf("%s is a %s with the help %q", name, f.GetType(), f.GetHelp())
		}
		for _, m := range f.Metric {
			key := name
			for _, l := range m.Label {
				if l.GetName() == "target" && l.GetValue() != oneLine(r.Target) {
					t.Errorf("%s is of %q", name, l.GetValue())
				}
				if l.GetName() != "target" {
					key += " " + l.GetValue()
				}
			}
			got[key] = m.Gauge.GetValue()
		}
	}
	for key, want := range map[string]float64{
		"deadlight_verify_verdict inconclusive": 1, "deadlight_verify_verdict pass": 0, "deadlight_verify_verdict fail": 0,
		"deadlight_verify_findings": 5, "deadlight_verify_missed_answer_probability": 1e-7, "deadlight_verify_duration_seconds": 2,
		"deadlight_verify_probes": 3, "deadlight_verify_timestamp_seconds": 1.5, "deadlight_verify_ports closed": 4, "deadlight_verify_ports open": 0,
		"deadlight_verify_expectations met": 2, "deadlight_verify_expectations failed": 0, "deadlight_verify_expectations unprobed": 1,
	} {
		if v, ok := got[key]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", key, v, ok, want)
		}
	}
}
