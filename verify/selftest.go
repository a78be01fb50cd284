package verify

import (
	"context"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"deadlight/rules"
)

// SelfTestCase is a ruleset, sound or broken in a known way, of which the right
// verdict is known beforehand.
type SelfTestCase struct {
	Name string // what is broken
	// Load puts it in force, as [RehearseConfig] says; nil loads nothing.
	Load func() error
	Want Verdict
	// At are the ports at which it is broken: a finding must name each of them,
	// and none another one. Nil means that it is broken throughout.
	At []Target
	// HostOnly says that only the record on the host shows it, packets do not.
	HostOnly bool
	// Cut takes the host's links down before the first probe.
	Cut bool
	// IPv6 says that it takes a kernel with IPv6 to see it.
	IPv6 bool
}

// SelfTestConfig is what [SelfTest] needs.
type SelfTestConfig struct {
	Rules *rules.Ruleset // what every case is held against
	Ports Ports          // that are probed
	Cases []SelfTestCase
	Done  func(SelfTestResult) // called after each case; may be nil
}

// SelfTestReport is what the verifier made of the cases.
type SelfTestReport struct {
	Schema  int              `json:"schema"` // 1
	OK      bool             `json:"ok"`
	Seconds float64          `json:"seconds"`
	Cases   []SelfTestResult `json:"cases"`
}

// SelfTestResult is what the verifier made of one case.
type SelfTestResult struct {
	Name     string  `json:"name"`
	Expected Verdict `json:"expected"`
	// Verdict is that of a run with the record of the host, Packets that of one
	// that has only what came back.
	Verdict Verdict `json:"verdict"`
	Packets Verdict `json:"packets"`
	// HostOnly says that packets alone need not show it.
	HostOnly bool `json:"host_only"`
	OK       bool `json:"ok"`
	// Wrong says that a verdict is not true, where one of a verifier that could
	// not tell is only inconclusive.
	Wrong   bool   `json:"wrong"`
	Skipped bool   `json:"skipped"` // the kernel has no IPv6
	Why     string `json:"why"`     // for people
}

// SelfTest shows whether the verifier can be believed: it loads rulesets that are
// broken, and at least one that is not, into a throw-away host each, and holds
// its own verdicts against what they must be. It must run in a process that
// [Isolate] started.
func SelfTest(ctx context.Context, cfg SelfTestConfig) (*SelfTestReport, error) {
	began := time.Now()
	r := &SelfTestReport{Schema: 1, OK: true, Cases: []SelfTestResult{}}
	for i := range cfg.Cases {
		one, err := cfg.run(ctx, &cfg.Cases[i])
		if err != nil {
			return nil, fmt.Errorf("self-test %q: %w", cfg.Cases[i].Name, err)
		}
		r.OK = r.OK && (one.OK || one.Skipped)
		r.Cases = append(r.Cases, one)
		if cfg.Done != nil {
			cfg.Done(one)
		}
	}
	r.Seconds = time.Since(began).Seconds()
	return r, nil
}

func (cfg *SelfTestConfig) run(ctx context.Context, c *SelfTestCase) (SelfTestResult, error) {
	out := SelfTestResult{Name: c.Name, Expected: c.Want, HostOnly: c.HostOnly}
	if c.IPv6 && !hasIPv6() {
		out.Skipped, out.Why = true, "not tested: this kernel has no IPv6"
		return out, nil
	}
	var packets *Report
	load := c.Load
	if load == nil {
		load = func() error { return nil }
	}
	witnessed, err := Rehearse(ctx, RehearseConfig{
		Name: c.Name, Rules: cfg.Rules, Load: load, sweep: cfg.Ports, cut: c.Cut,
		seen: func(j JudgeConfig, res *Result) {
			j.HostProof = nil // what a vantage without a tripwire would say
			packets = Judge(j, res)
		},
	})
	if err != nil {
		return out, err
	}
	out.Verdict, out.Packets = witnessed.Verdict, packets.Verdict
	out.Why, out.OK = c.judge(witnessed, packets)
	out.Wrong = !out.OK && out.wrong()
	return out, nil
}

// wrong says whether a result that is not as it must be is untrue: a verdict that
// is neither right nor inconclusive, or right ones for a wrong reason.
func (r *SelfTestResult) wrong() bool {
	untrue := func(v Verdict) bool { return v != r.Expected && v != Inconclusive }
	agree := r.Verdict == r.Expected && (r.HostOnly || r.Packets == r.Expected)
	return untrue(r.Verdict) || !r.HostOnly && untrue(r.Packets) || agree
}

// judge says whether the verifier saw what it must see, and what it saw.
func (c *SelfTestCase) judge(witnessed, packets *Report) (why string, ok bool) {
	for _, r := range []struct {
		*Report
		by string
	}{{witnessed, "with the record of the host"}, {packets, "by packets alone"}} {
		if r.Report == packets && c.HostOnly {
			continue
		}
		if r.Verdict != c.Want {
			return fmt.Sprintf("%s where %s is right, %s: %s", r.Verdict, c.Want, r.by, r.summary()), false
		}
		if astray := c.astray(r.Report); astray != "" {
			return fmt.Sprintf("%s, %s: %s", astray, r.by, r.summary()), false
		}
	}
	why = witnessed.summary()
	if c.HostOnly {
		why += ", by the record of the host"
	}
	return why, true
}

// astray says how the ports of the findings differ from where the ruleset is broken.
func (c *SelfTestCase) astray(r *Report) string {
	if c.At == nil {
		return ""
	}
	found := map[Target]bool{}
	for _, f := range r.Findings {
		proto := rules.TCP
		if f.Protocol == rules.UDP.String() {
			proto = rules.UDP
		}
		at := Target{proto, f.Port}
		found[at] = true
		if !slices.Contains(c.At, at) {
			return fmt.Sprintf("%d/%s is not where it is broken", f.Port, f.Protocol)
		}
	}
	for _, at := range c.At {
		if !found[at] {
			return fmt.Sprintf("nothing found at %d/%s", at.Port, at.Protocol)
		}
	}
	return ""
}

// summary tells the findings in one line, the most frequent kinds first.
func (r *Report) summary() string {
	type kind struct {
		protocol string
		state    State
		reason   string
	}
	ports := map[kind]map[uint16]bool{}
	for _, f := range r.Findings {
		k := kind{f.Protocol, f.Observed, f.Reason}
		if ports[k] == nil {
			ports[k] = map[uint16]bool{}
		}
		ports[k][f.Port] = true
	}
	if len(ports) == 0 {
		return fmt.Sprintf("nothing found in %s", count(r.ports, "port", "ports"))
	}
	var kinds []kind
	for k := range ports {
		kinds = append(kinds, k)
	}
	sort.Slice(kinds, func(i, j int) bool {
		a, b := kinds[i], kinds[j]
		if n, m := len(ports[a]), len(ports[b]); n != m {
			return n > m
		}
		return fmt.Sprint(a) < fmt.Sprint(b)
	})
	var parts []string
	for i, k := range kinds {
		if i == 2 {
			parts = append(parts, fmt.Sprintf("%d more", len(kinds)-i))
			break
		}
		what := fmt.Sprintf("%s %s ports", thousands(len(ports[k])), k.protocol)
		if len(ports[k]) == 1 {
			for port := range ports[k] {
				what = fmt.Sprintf("%d/%s", port, k.protocol)
			}
		}
		parts = append(parts, fmt.Sprintf("%s %s (%s)", what, k.state, k.reason))
	}
	return "found " + strings.Join(parts, ", ")
}
