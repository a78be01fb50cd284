package firewall

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"deadlight/rules"
)

func FuzzDecode(f *testing.F) {
	e, err := encode(&ruleset(f, everything).Table, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	for _, m := range e.small() {
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

// Only what keeps clear of everything else may change in a list that stays.
func TestApartRanges(t *testing.T) {
	list := func(texts ...string) (out []rules.AddrRange) {
		for _, s := range texts {
			p := netip.MustParsePrefix(s)
			hi := p.Addr().As4()
			for i := p.Bits(); i < 32; i++ {
				hi[i/8] |= 0x80 >> (i % 8)
			}
			out = append(out, rules.AddrRange{Lo: p.Addr(), Hi: netip.AddrFrom4(hi)})
		}
		return out
	}
	for _, tt := range []struct {
		name    string
		is, now []rules.AddrRange
		want    bool
	}{
		{"one more, alone", list("10.0.0.0/24"), list("10.0.0.0/24", "10.0.2.0/24"), true},
		{"one less, alone", list("10.0.0.0/24", "10.0.2.0/24", "10.0.4.0/24"), list("10.0.0.0/24", "10.0.4.0/24"), true},
		{"one instead of another", list("10.0.0.0/24"), list("10.0.2.0/24"), true},
		{"one that grows", list("10.0.0.0/24"), list("10.0.0.0/23"), false},
		{"one that begins earlier", list("10.0.1.0/24"), list("10.0.0.0/23"), false},
		{"one in two", list("10.0.0.0/22"), list("10.0.0.0/24", "10.0.2.0/24"), false},
		{"one that takes the place beside", list("10.0.0.0/24"), list("10.0.1.0/24"), false},
		{"up to the last", list("10.0.0.0/24"), list("10.0.0.0/24", "255.0.0.0/8"), true},
		{"beyond the last", list("255.0.0.0/8"), list("255.0.0.0/9"), false},
	} {
		gone, missing := rangeChanges(tt.is, tt.now)
		if got := apartRanges(gone, missing, tt.is, tt.now); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}
