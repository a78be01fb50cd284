package main

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/verify"
)

// formats are the ways in which a report can be printed.
func formats() []string { return []string{"text", "json", "junit", "prometheus", "html"} }

// reportFlags say how a report is printed, and what it is held against.
type reportFlags struct {
	json   bool
	format string
	since  string

	old *verify.Report
}

func (f *reportFlags) add(c *cobra.Command) {
	c.Flags().BoolVar(&f.json, "json", false, "print one JSON object (the same as --format json)")
	c.Flags().StringVar(&f.format, "format", "text", "how to print the report: "+strings.Join(formats(), ", "))
	c.Flags().StringVar(&f.since, "since", "", "also tell what changed since an older report, a file of --json")
}

// read checks the flags and reads the older report, before anything is probed.
func (f *reportFlags) read() error {
	if f.json {
		if f.format != "text" && f.format != "json" {
			return usageError("leave one of them out", "--json and --format %s contradict each other", f.format)
		}
		f.format = "json"
	}
	if !slices.Contains(formats(), f.format) {
		return usageError("it takes "+strings.Join(formats(), ", "), "no format is called %s", strconv.Quote(f.format))
	}
	if f.since == "" {
		return nil
	}
	src, err := os.Open(f.since)
	if err != nil {
		return usageError("", "read the older report: %w", err)
	}
	defer src.Close()
	if f.old, err = verify.ReadReport(src); err != nil {
		return usageError("deadlight verify --json >"+f.since+" writes one", "%s: %w", f.since, err)
	}
	return nil
}

// print prints a report and gives the exit code of its verdict.
func (f *reportFlags) print(e env, r *verify.Report) error {
	var err error
	if f.old != nil {
		if r.Since, err = r.Compare(f.old); err != nil {
			return err
		}
	}
	switch f.format {
	case "json":
		err = writeJSON(e.stdout, r)
	case "junit":
		err = r.WriteJUnit(e.stdout)
	case "html":
		err = r.WriteHTML(e.stdout, time.Now())
	case "prometheus":
		err = writeFamilies(e.stdout, verification(r, time.Now()))
	default:
		err = forPeople(e, r.WriteText)
	}
	if err != nil {
		return err
	}
	return codeOf(r.Verdict)
}

// codeOf is the exit code of a verdict.
func codeOf(v verify.Verdict) error {
	switch v {
	case verify.Fail:
		return silently(exitFindings)
	case verify.Inconclusive:
		return silently(exitRefused)
	}
	return nil
}

// verification is a report as metrics, for the textfile collector of node_exporter
// or a push.
func verification(r *verify.Report, at time.Time) []metricFamily {
	return verificationOf([]string{"target", r.Target}, r.Brief("", "", at))
}

// verificationOfMany has the same metrics for each host.
func verificationOfMany(m *verify.Many, at time.Time) ([]metricFamily, error) {
	var out []metricFamily
	err := m.Each(func(b *verify.Brief) error {
		list := verificationOf([]string{"target", b.Target, "name", b.Name}, b)
		for i := range list {
			if out == nil {
				out = list
				break
			}
			out[i].samples = append(out[i].samples, list[i].samples...)
		}
		return nil
	})
	return append(out, single("gauge", "verify_run_timestamp_seconds", "When the run over all hosts ended.", float64(at.UnixMilli())/1000)), err
}

func verificationOf(target []string, b *verify.Brief) []metricFamily {
	with := func(more ...string) []string { return slices.Concat(target, more) }
	verdicts := metricFamily{kind: "gauge", name: "verify_verdict", help: "1 for the verdict of the last verification, 0 for the others."}
	for v := verify.Pass; v <= verify.Fail; v++ {
		is := 0.0
		if v == b.Verdict {
			is = 1
		}
		verdicts.samples = append(verdicts.samples, sample{is, with("verdict", v.String())})
	}
	ports := metricFamily{kind: "gauge", name: "verify_ports", help: "Ports of the sweeps by their state."}
	for _, c := range []struct {
		state verify.State
		n     int
	}{{verify.Open, b.Counts.Open}, {verify.Closed, b.Counts.Closed}, {verify.Rejected, b.Counts.Rejected}, {verify.Filtered, b.Counts.Filtered}, {verify.Unknown, b.Counts.Unknown}} {
		ports.samples = append(ports.samples, sample{float64(c.n), with("state", c.state.String())})
	}
	expects := metricFamily{kind: "gauge", name: "verify_expectations", help: "[[expect]] tables of the policy by what became of them."}
	for _, result := range verify.ExpectResults() {
		n := 0
		for _, x := range b.Expects {
			if x.Result == result {
				n++
			}
		}
		expects.samples = append(expects.samples, sample{float64(n), with("result", result)})
	}
	findings := 0
	for i := range b.Findings {
		findings += b.Findings[i].Count
	}
	return []metricFamily{
		verdicts, ports, expects,
		single("gauge", "verify_findings", "Ports that are not as the policy says, or of which nothing can be said.", float64(findings), target...),
		single("gauge", "verify_missed_answer_probability", "Upper bound of the probability that a TCP answer was missed.", b.Bound, target...),
		single("gauge", "verify_duration_seconds", "How long the probing took.", b.Seconds, target...),
		single("gauge", "verify_probes", "Packets sent.", float64(b.Probes), target...),
		single("gauge", "verify_timestamp_seconds", "When the verification ended.", float64(b.Ended.UnixMilli())/1000, target...),
	}
}
