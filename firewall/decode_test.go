package firewall

import (
	"errors"
	"testing"
	"time"

	"deadlight/rules"
)

func FuzzDecode(f *testing.F) {
	e, err := encode(&ruleset(f, everything).Table, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	for _, m := range e.all() {
		f.Add(m.typ, m.body())
	}
	f.Fuzz(func(t *testing.T, typ uint16, attrs []byte) {
		s := newSnapshot()
		if err := s.add(typ, attrs); err != nil {
			return
		}
		s.finish()
		if d := Diff(s, s); d != nil {
			t.Errorf("differs from itself: %v", d)
		}
	})
}

func FuzzReplies(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{20, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		replies, err := parseReplies(b)
		for _, r := range replies {
			if len(r.attrs) > len(b) {
				t.Errorf("reply longer than the message")
			}
		}
		_ = err
	})
}

// Values that look like attributes must not be mistaken for them: these two
// addresses once had the same canonical form.
func TestElementsThatLookLikeAttributesDiffer(t *testing.T) {
	element := func(a, b, c, d byte) string {
		return string(canonical(nil, appendElement(nil, []byte{a, b, c, d}, 0, "", 0)[4:], elementShape))
	}
	if element(4, 0, 1, 128) == element(4, 0, 1, 0) {
		t.Error("4.0.1.128 and 4.0.1.0 are the same")
	}
}

func TestDiffNamesEveryKind(t *testing.T) {
	snapshot := func(text string) *Snapshot {
		e, err := encode(&ruleset(t, text).Table, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := meant(e, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	a, b := snapshot(everything), snapshot(little)
	kinds := map[string]bool{}
	for _, d := range Diff(a, b) {
		kinds[d.Kind] = true
	}
	for _, kind := range []string{"chain", "rule", "set", "object"} {
		if !kinds[kind] {
			t.Errorf("no difference of kind %s", kind)
		}
	}
	if d := Diff(a, snapshot(everything)); d != nil {
		t.Errorf("equal tables differ: %v", d)
	}
	b.flowtables["f"] = "flowtable"
	if d := Diff(b, snapshot(little)); len(d) != 1 || d[0].Kind != "flowtable" {
		t.Errorf("a flowtable: %v", d)
	}
}

// FuzzRoundTrip: what is encoded decodes to the same table again, whole.
func FuzzRoundTrip(f *testing.F) {
	for _, text := range []string{everything, others, observed, little, ""} {
		f.Add([]byte("version = 1\n" + text))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		p, _ := rules.Parse("policy.toml", src, nil)
		if p == nil {
			return
		}
		rs := rules.Compile(p)
		now := time.Unix(0, 0)
		decode := func() *Snapshot {
			e, err := encode(&rs.Table, now)
			var missing *NameError
			if errors.As(err, &missing) {
				return nil
			}
			if err != nil {
				t.Fatal(err)
			}
			s, err := meant(e, now)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		a, b := decode(), decode()
		if a == nil {
			return
		}
		if d := Diff(a, b); d != nil {
			t.Fatalf("two encodings differ: %v", d)
		}
		if len(a.chains) != len(rs.Table.Chains) || len(a.sets) != len(rs.Table.Sets) || len(a.objects) != len(rs.Table.Counters)+len(rs.Table.Limits) {
			t.Errorf("decoded %d chains, %d sets, %d objects", len(a.chains), len(a.sets), len(a.objects))
		}
		for _, c := range rs.Table.Chains {
			if n := len(a.chains[c.Name].rules); n != len(c.Rules) {
				t.Errorf("chain %s: %d rules of %d", c.Name, n, len(c.Rules))
			}
		}
	})
}

// Only what keeps clear of everything else may change in an interval set that
// stays.
func TestApart(t *testing.T) {
	set := func(policy string) *setState {
		s, err := Meant(ruleset(t, policy), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return s.sets["tcp_open"]
	}
	one := func(ports string) *setState { return set("[open.a]\nports = [" + ports + "]\n") }
	two := func(a, b string) *setState {
		return set("[open.a]\nports = [" + a + "]\n[open.b]\nfrom = \"192.0.2.1\"\nports = [" + b + "]\n")
	}
	for _, tt := range []struct {
		name       string
		is, wanted *setState
		want       bool
	}{
		{"one more, alone", one(`"10-20"`), one(`"10-20", "30-40"`), true},
		{"one less, alone", one(`"10-20", "30-40"`), one(`"10-20"`), true},
		{"one more, a port between", one(`"10-20"`), one(`"10-20", 22`), true},
		{"one that grows", one(`"10-20"`), one(`"10-21"`), false},
		{"one that begins earlier", one(`"10-20"`), one(`"9-20"`), false},
		{"one in two", one(`"10-20"`), one(`"10-12", "14-20"`), false},
		{"another rule beside it", two(`"10-20"`, `30`), two(`"10-20"`, `21`), false},
		{"another rule goes from beside it", two(`"10-20"`, `21`), two(`"10-20"`, `30`), false},
		{"another rule for the same ports", two(`"10-20", "40-50"`, `30`), two(`"40-50"`, `"10-20", 30`), false},
		{"up to the last", one(`"10-20"`), one(`"10-20", "65000-65535"`), true},
		{"beyond the last", one(`"65000-65535"`), one(`"65100-65535"`), false},
	} {
		gone, missing := elementChanges(tt.is, tt.wanted)
		if len(gone)+len(missing) == 0 {
			t.Errorf("%s: nothing changes", tt.name)
		}
		if got := apart(tt.is.elements, gone, missing); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}
