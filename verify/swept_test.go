package verify

import (
	"testing"

	"deadlight/rules"
)

func TestStateOf(t *testing.T) {
	r := &Report{States: map[string]States{"tcp4": {Open: "22,8000-8010", Closed: "80", Rejected: "81", Filtered: "1-21,23-79", Unknown: "65535"}, "udp6": {}}}
	for _, c := range []struct {
		v4   bool
		p    rules.Protocol
		port uint16
		want State
		ok   bool
	}{
		{true, rules.TCP, 22, Open, true}, {true, rules.TCP, 8000, Open, true}, {true, rules.TCP, 8010, Open, true}, {true, rules.TCP, 8011, Unknown, false},
		{true, rules.TCP, 80, Closed, true}, {true, rules.TCP, 81, Rejected, true}, {true, rules.TCP, 1, Filtered, true}, {true, rules.TCP, 65535, Unknown, true},
		{false, rules.TCP, 22, Unknown, false}, {false, rules.UDP, 22, Unknown, false},
	} {
		if got, ok := r.StateOf(c.v4, c.p, c.port); got != c.want || ok != c.ok {
			t.Errorf("%+v: %s, %t", c, got, ok)
		}
	}
}
