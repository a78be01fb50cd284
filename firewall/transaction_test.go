package firewall

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/rules"
)

// An apply that ends after any of its steps leaves the old ruleset or the new
// one, and the next apply clears away what it left.
func TestStepsThatEndHalfWay(t *testing.T) {
	for _, tt := range []struct {
		name     string
		from, to string
	}{{"more", little, everything}, {"less", everything, little}, {"other", everything, others}, {"nothing before", "", everything}} {
		for n, steps := range []string{"prepared", "changed"} {
			t.Run(tt.name+", "+steps, func(t *testing.T) {
				inNamespace(t, func(t *testing.T) {
					c := dial(t)
					from, to := ruleset(t, tt.from), ruleset(t, tt.to)
					mustApply(t, c, from)
					now := time.Now()
					want, err := encode(&to.Table, now)
					if err != nil {
						t.Fatal(err)
					}
					wanted, err := meant(want, now)
					if err != nil {
						t.Fatal(err)
					}
					old, err := c.Snapshot(rules.TableName)
					if err != nil {
						t.Fatal(err)
					}
					s, err := (&transaction{table: rules.TableName, is: old, wanted: wanted, want: want, known: c.contentOf(old)}).steps()
					if err != nil {
						t.Fatal(err)
					}
					if len(s.prepare) == 0 || len(s.clear) == 0 && tt.from != "" {
						t.Fatal("nothing to prepare or to clear away")
					}
					for i, msgs := range [][]message{s.prepare, s.change}[:n+1] {
						if err := c.transact(old.Generation.ID+uint32(i), msgs); err != nil {
							t.Fatal(err)
						}
					}
					is, err := c.Snapshot(rules.TableName)
					if err != nil {
						t.Fatal(err)
					}
					if d := Diff(is, []*Snapshot{old, wanted}[n]); d != nil {
						t.Errorf("%s: %v", steps, d)
					}
					if d := Diff(is, []*Snapshot{wanted, old}[n]); d == nil {
						t.Errorf("%s: old and new are the same", steps)
					}
					if !is.left.any() && len(s.clear) > 0 {
						t.Error("nothing was left")
					}
					// Not what it wanted, but what was there before.
					mustApply(t, c, from)
					lines := func() []string {
						out := strings.Split(timeout.ReplaceAllString(strings.ReplaceAll(listTable(t), secondName, ""), ""), "\n")
						slices.Sort(out)
						return out
					}
					left := lines()
					nft(t, "delete", "table", "inet", "deadlight")
					mustApply(t, c, from)
					if d := cmp.Diff(lines(), left); d != "" {
						t.Errorf("fresh (-) and after the next apply (+):\n%s", d)
					}
				})
			})
		}
	}
}
