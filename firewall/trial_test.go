package firewall

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"deadlight/rules"
)

var trialPairs = flag.Int("trial.pairs", 40, "pairs of random policies to try, the new one before the old one")

// endTrial takes away what the kernel takes away when the time is over.
func (w *wire) endTrial() {
	w.Helper()
	w.script("delete element inet deadlight trial { ipv4, ipv6 }")
}

// onTrial is a trial of an hour.
func onTrial(was, will *rules.Ruleset) *rules.Ruleset {
	return rules.Trial(was, will, time.Now().Add(time.Hour))
}

// While a trial runs the kernel does what the oracle says of the new policy, and
// when it is over what it says of the old one; then either is loaded clean.
func TestTrialAgreesWithKernel(t *testing.T) {
	kinds, tables := tally{}, tally{}
	checks(t, *trialPairs, func(t *rapid.T) {
		texts := [2]string{randomPolicy(t, tables), randomPolicy(t, tables)}
		seed := rapid.Uint64().Draw(t, "packets")
		first := rapid.IntRange(0, 9).Draw(t, "first of all") == 0
		was, will := compiled(t, texts[0]), compiled(t, texts[1])
		w := newWire(t, modelLinks()...)
		m := newModel(w, will, rand.New(rand.NewPCG(seed, 0)))
		if !first {
			old := newModel(w, was, m.rand)
			m.sources = append(m.sources, old.sources...)
			for p, list := range old.ports {
				m.ports[p] = append(m.ports[p], list...)
			}
		}
		defer m.close()
		m.beginFlows()
		trial := onTrial(was, will)
		if first {
			w.run("", "nft", "delete", "table", "inet", "deadlight")
			trial = onTrial(nil, will)
		} else {
			w.apply(was)
		}
		w.apply(trial)
		judged := func(when string, rs *rules.Ruleset) {
			m.packets = nil
			m.flowPackets()
			for len(m.packets) < *modelPackets {
				m.add(m.random())
			}
			through := w.deliver(m.packets...)
			var wrong []string
			for i, p := range m.packets {
				p.At = time.Now()
				d := rules.Decision{Outcome: rules.OutcomeOpen, Kind: "no table"}
				if rs != nil {
					d = rs.Decide(p.Packet)
				}
				want := d.Outcome == rules.OutcomeOpen || d.Observed
				if d.Limited && !d.Observed {
					continue
				}
				kinds[when+" "+d.Kind+" "+map[bool]string{true: "in", false: "out"}[want]]++
				if through[i] != want {
					wrong = append(wrong, fmt.Sprintf("%s: kernel admitted %t, model says %s by %s %q", p, through[i], d.Outcome, d.Kind, d.Rule))
				}
			}
			if len(wrong) > 0 {
				t.Fatalf("%s: %d of %d packets; old policy:\n%s\nnew policy:\n%s\n%s", when, len(wrong), len(m.packets), texts[0], texts[1],
					strings.Join(wrong[:min(len(wrong), 10)], "\n"))
			}
		}
		judged("on trial", will)
		w.endTrial()
		if first {
			judged("over", nil)
			return
		}
		judged("over", was)
		after := will
		if rapid.Bool().Draw(t, "confirmed") {
			w.apply(trial)
			judged("on trial again", will)
		} else {
			after = was
		}
		w.apply(after)
		judged("clean", after)
	})
	t.Logf("%d pairs; packets by verdict:%s", *trialPairs, kinds)
}

// A clean table follows a trial, whichever way it ends, and nothing of it is left.
func TestTrialLeavesNothing(t *testing.T) {
	tables := tally{}
	checks(t, *trialPairs, func(t *rapid.T) {
		a, b := compiled(t, randomPolicy(t, tables)), compiled(t, randomPolicy(t, tables))
		over := rules.Trial(a, b, time.Unix(1e9, 0))
		for _, tt := range []struct {
			name string
			end  *rules.Ruleset
			list []*rules.Ruleset
		}{
			{"confirmed", b, []*rules.Ruleset{a, onTrial(a, b), b}},
			{"rolled back", a, []*rules.Ruleset{a, onTrial(a, b), a}},
			{"over", a, []*rules.Ruleset{a, over, a}},
		} {
			fresh, left := listAfter(t, tt.end), listAfter(t, tt.list...)
			if strings.Join(fresh, "") != strings.Join(left, "") {
				t.Fatalf("%s: fresh:\n%s\nleft:\n%s", tt.name, strings.Join(fresh, "\n"), strings.Join(left, "\n"))
			}
		}
	})
}
