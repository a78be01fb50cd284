package firewall

import (
	"maps"
	"testing"

	"deadlight/rules"
)

func TestCounters(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		l := newLab(t)
		got, err := l.c.Counters(rules.TableName)
		must(t, err)
		if len(got) != 0 {
			t.Errorf("without a table: %v", got)
		}
		rs := ruleset(t, "[open.web]\nports = 80\n")
		mustApply(t, l.c, rs)
		for range 3 {
			l.kernel(l.to(rules.TCP, 81, outsider))
		}
		got, err = l.c.Counters(rules.TableName)
		must(t, err)
		if want := (Counter{Packets: 3, Bytes: 3 * 40}); got["c_dropped"] != want {
			t.Errorf("c_dropped is %+v, want %+v", got["c_dropped"], want)
		}
		if _, theirs := got["arrived"]; theirs {
			t.Errorf("counters of another table: %v", got)
		}
		for _, name := range rs.Table.Counters {
			if _, ok := got[name]; !ok {
				t.Errorf("no counter %s in %v", name, maps.Keys(got))
			}
		}
	})
}
