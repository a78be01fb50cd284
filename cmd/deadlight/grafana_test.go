package main

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"deadlight/firewall"
	"deadlight/verify"
)

// writtenMetrics gives, of every metric that we write, the values of its labels by name.
func writtenMetrics(t *testing.T) map[string]map[string][]string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "watch.prom")
	if err := newMetrics(file).write(firewall.Stats{}, map[string]firewall.Counter{"c_dropped": {}}); err != nil {
		t.Fatal(err)
	}
	many, err := verify.Summarize(func(fn func(*verify.Brief) error) error {
		return fn(&verify.Brief{Name: "web", Target: "192.0.2.1"})
	})
	if err != nil {
		t.Fatal(err)
	}
	fleet, err := verificationOfMany(many, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string][]string{}
	add := func(families map[string]*dto.MetricFamily) {
		for name, f := range families {
			if out[name] == nil {
				out[name] = map[string][]string{}
			}
			for _, m := range f.Metric {
				for _, l := range m.Label {
					out[name][l.GetName()] = append(out[name][l.GetName()], l.GetValue())
				}
			}
		}
	}
	add(parseMetrics(t, file))
	for _, list := range [][]metricFamily{verification(&verify.Report{}, time.Now()), fleet} {
		var b bytes.Buffer
		if err := writeFamilies(&b, list); err != nil {
			t.Fatal(err)
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(&b)
		if err != nil {
			t.Fatal(err)
		}
		add(families)
	}
	return out
}

// The dashboard asks for the metrics that we write, by labels that they have, and for
// every one of them.
func TestGrafana(t *testing.T) {
	type query struct {
		Expr       string
		Datasource struct{ Type, UID string }
	}
	var dashboard struct {
		Panels []struct {
			ID          int
			Type, Title string
			Targets     []query
			FieldConfig struct {
				Defaults struct {
					Thresholds struct{ Steps []struct{ Value *float64 } }
				}
			}
		}
		Templating struct {
			List []struct {
				Name, Type, Definition string
				Query                  any
				Datasource             struct{ Type, UID string }
			}
		}
	}
	b, err := os.ReadFile("../../configs/grafana/deadlight.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &dashboard); err != nil {
		t.Fatal(err)
	}

	variables, queries := map[string]string{}, []query{}
	for _, v := range dashboard.Templating.List {
		variables[v.Name] = v.Type
		if v.Type != "query" {
			continue
		}
		queries = append(queries, query{v.Definition, v.Datasource})
		if q, ok := v.Query.(map[string]any); !ok || q["query"] != v.Definition {
			t.Errorf("variable %s shows another query than it asks: %v", v.Name, v.Query)
		}
	}
	if want := map[string]string{"datasource": "datasource", "instance": "query", "target": "query"}; !maps.Equal(variables, want) {
		t.Errorf("the variables are %v, want %v", variables, want)
	}
	shown := map[string]bool{} // by a panel: a variable shows nothing
	metric := regexp.MustCompile(`\bdeadlight_\w+`)
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if p.Title == "" || ids[p.ID] || (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("panel %d, %q, of type %s has no title, the id of another, or %d queries", p.ID, p.Title, p.Type, len(p.Targets))
		}
		ids[p.ID] = true
		last := 0.0
		for i, s := range p.FieldConfig.Defaults.Thresholds.Steps {
			if (s.Value == nil) != (i == 0) || s.Value != nil && i > 1 && *s.Value <= last {
				t.Errorf("%s: the thresholds do not go up", p.Title)
			}
			if s.Value != nil {
				last = *s.Value
			}
		}
		for _, q := range p.Targets {
			queries = append(queries, q)
			for _, name := range metric.FindAllString(q.Expr, -1) {
				shown[name] = true
			}
			if strings.Count(q.Expr, `instance=~"$instance"`) != len(metric.FindAllString(q.Expr, -1)) {
				t.Errorf("%s: not every metric is of the chosen hosts: %s", p.Title, q.Expr)
			}
		}
	}

	known := writtenMetrics(t)
	selector := regexp.MustCompile(`\b(deadlight_\w+)\{([^}]*)\}`)
	matcher := regexp.MustCompile(`(\w+)(=~?)"([^"]*)"`)
	grouped := regexp.MustCompile(`\b(?:by|on) \(([^)]*)\)`)
	for _, q := range queries {
		if q.Datasource.Type != "prometheus" || q.Datasource.UID != "${datasource}" {
			t.Errorf("%s: asks %v, not the data source that was chosen", q.Expr, q.Datasource)
		}
		names := metric.FindAllString(q.Expr, -1)
		if len(names) == 0 {
			t.Errorf("a query asks for nothing of ours: %s", q.Expr)
		}
		labels := []string{"instance"} // Prometheus adds it
		for _, name := range names {
			if known[name] == nil {
				t.Errorf("%s: nothing writes %s", q.Expr, name)
			}
			labels = slices.AppendSeq(labels, maps.Keys(known[name]))
		}
		for _, m := range grouped.FindAllStringSubmatch(q.Expr, -1) {
			for _, l := range strings.Split(m[1], ", ") {
				if !slices.Contains(labels, l) {
					t.Errorf("%s: no label %s", q.Expr, l)
				}
			}
		}
		for _, s := range selector.FindAllStringSubmatch(q.Expr, -1) {
			for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
				label, op, value := m[1], m[2], m[3]
				values, ok := known[s[1]][label]
				switch variable, isVariable := strings.CutPrefix(value, "$"); {
				case !ok && label != "instance":
					t.Errorf("%s has no label %s", s[1], label)
				case isVariable && (op != "=~" || variables[variable] != "query"):
					t.Errorf("%s: no variable %s, or not by =~", q.Expr, value)
				case !isVariable && !slices.Contains(values, value):
					t.Errorf("%s is never of %s %q", s[1], label, value)
				}
			}
		}
	}
	for name := range known {
		if !shown[name] {
			t.Errorf("no panel shows %s", name)
		}
	}
}
