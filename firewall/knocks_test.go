package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"deadlight/rules"
)

// counted is a list of knocks, "23/tcp 3" or "198.51.100.9 23/tcp 3" each.
func counted(list []Knock) []string {
	var out []string
	for _, k := range list {
		text := fmt.Sprintf("%s %d", rules.PortName(k.Protocol, k.Port), k.Packets)
		if k.Source.IsValid() {
			text = k.Source.String() + " " + text
		}
		out = append(out, text)
	}
	return out
}

func (w *wire) knocks() *Knocks {
	w.Helper()
	k, err := w.conn.Knocks(rules.TableName)
	if err != nil {
		w.Fatalf("%v", err)
	}
	return k
}

// noDrift wants the table to be as the ruleset says.
func (w *wire) noDrift(t *testing.T, rs *rules.Ruleset) {
	t.Helper()
	wanted, err := Meant(rs, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, d, err := w.conn.Check(wanted, Samples); err != nil || len(d) > 0 {
		t.Errorf("drift: %v %v", d, err)
	}
}

// What no rule admits, and nothing else, is counted by port and by source, whether
// the policy drops it, rejects it, or only observes.
func TestKnocks(t *testing.T) {
	t.Parallel()
	const rest = `
[open.web]
ports = 80
[open.ssh]
ports = 22
from = "10.0.0.0/8"
[block.bad]
from = "203.0.113.0/24"
`
	for name, head := range map[string]string{
		"drop": "", "reject": "[default]\ninput = \"reject\"\n", "observe": "[default]\nenforce = false\n",
		"published": "[default]\npublished = \"ignore\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWire(t)
			if k := w.knocks(); k.Counted || len(k.Ports) > 0 {
				t.Errorf("without a table: %+v", k)
			}
			rs := ruleset(t, head+rest)
			w.apply(rs)
			began := time.Now()
			w.send(w.tcp(stranger4, 23), w.tcp(stranger4, 23), w.tcp(friend4, 23), w.tcp(stranger6, 23),
				w.udp(stranger4, 161), w.udp(stranger6, 161), w.flow(rules.SCTP, stranger4, 161),
				w.tcp(stranger4, 22), w.tcp(friend4, 22), w.tcp(stranger4, 80), w.tcp("203.0.113.7", 80), w.tcp("203.0.113.7", 23),
				w.ping(stranger4), w.flow(rules.ESP, stranger4, 0))
			k := w.knocks()
			want := []string{"23/tcp 4", "161/udp 2", "22/tcp 1", "161/sctp 1"}
			if d := cmp.Diff(want, counted(k.Ports)); d != "" {
				t.Errorf("ports, want (-) got (+):\n%s", d)
			}
			want = []string{
				"198.51.100.9 22/tcp 1", "198.51.100.9 23/tcp 2", "10.0.0.5 23/tcp 1", "2001:db8:5::9 23/tcp 1",
				"198.51.100.9 161/udp 1", "2001:db8:5::9 161/udp 1", "198.51.100.9 161/sctp 1",
			}
			if d := cmp.Diff(want, counted(k.Sources)); d != "" {
				t.Errorf("sources, want (-) got (+):\n%s", d)
			}
			memory := 24 * time.Hour
			if name == "observe" {
				memory = 8 * 24 * time.Hour
			}
			if !k.Counted || k.Memory != memory || k.PortsFull || k.SourcesFull {
				t.Errorf("%+v", k)
			}
			for _, p := range k.Ports {
				if p.Bytes < 20*p.Packets || p.Last.Before(began.Add(-clockSlack)) || p.Last.After(time.Now().Add(clockSlack)) {
					t.Errorf("%d bytes at %v: %+v", p.Bytes, p.Last, p)
				}
			}
			// nft as another reader of the same set.
			listed := w.run("", "nft", "list", "set", "inet", "deadlight", "knocks")
			for _, words := range []string{"tcp . 23 counter packets 4 ", "udp . 161 counter packets 2 "} {
				if !strings.Contains(listed, words) {
					t.Errorf("nft does not list %q:\n%s", words, listed)
				}
			}
			w.noDrift(t, rs)
		})
	}
}

// Counts survive an apply that leaves them alone, a trial and its end, and a
// verification that puts them back.
func TestKnocksSurvive(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	const was, will = "[open.web]\nports = 80\n", "[open.web]\nports = [80, 81]\n[block.bad]\nfrom = \"203.0.113.0/24\"\n"
	w.load(t, was)
	w.send(w.tcp(stranger4, 23), w.udp(stranger6, 161))
	still := func(when string) {
		t.Helper()
		want := []string{"23/tcp 1", "161/udp 1"}
		if d := cmp.Diff(want, counted(w.knocks().Ports)); d != "" {
			t.Errorf("%s, want (-) got (+):\n%s", when, d)
		}
		if k := w.knocks(); len(k.Sources) != 2 {
			t.Errorf("%s: sources %v", when, counted(k.Sources))
		}
	}
	w.load(t, will)
	still("after an apply")
	trial := onTrial(ruleset(t, will), ruleset(t, was))
	w.apply(trial)
	still("on trial")
	w.noDrift(t, trial)
	w.endTrial()
	still("when the trial is over")
	w.load(t, was)
	still("after the trial")

	kept, err := w.conn.KeepKnocks(rules.TableName)
	if err != nil {
		t.Fatal(err)
	}
	// While its hash table grows the kernel takes no more than it has room for
	// (rhashtable_insert_rehash), so who comes then is counted the next time.
	for range 10 {
		w.flood(3000, func(i int) *packet { return w.tcp(stranger4, uint16(1000+i)) })
		if len(w.knocks().Ports) == 3002 {
			break
		}
	}
	if n := len(w.knocks().Ports); n != 3002 {
		t.Errorf("%d ports counted, want 3002", n)
	}
	if err := w.conn.PutKnocks(kept); err != nil {
		t.Fatal(err)
	}
	still("put back")
	w.send(w.tcp(stranger4, 23))
	if got := counted(w.knocks().Ports); got[0] != "23/tcp 2" {
		t.Errorf("what was put back counts no more: %v", got)
	}
	w.noDrift(t, ruleset(t, was))
}

func testKnocks(t *testing.T) {
	w := newWire(t)
	const web = "[open.web]\nports = 80\n"
	for text, want := range map[string]bool{web: true, "[log]\nknocks = true\n" + web: true, "[log]\nknocks = false\n" + web: false} {
		w.load(t, text)
		kept, err := w.conn.KeepKnocks(rules.TableName)
		if err != nil {
			t.Fatal(err)
		}
		w.expect(t, out("an unlisted port", w.tcp(stranger4, 23)))
		if k := w.knocks(); k.Counted != want || (len(k.Ports) > 0) != want {
			t.Errorf("%q: %+v, want counted %t", text, k, want)
		}
		if err := w.conn.PutKnocks(kept); err != nil {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A flood from more sources to more ports than there is room for costs no more than
// a list that is not whole.
func TestKnocksFlood(t *testing.T) {
	t.Parallel()
	w := newWire(t)
	rs := ruleset(t, "[open.web]\nports = 80\n")
	w.apply(rs)
	before := w.counter("c_dropped")
	const n = 20000
	w.flood(n, func(i int) *packet {
		a := binary.BigEndian.AppendUint32(nil, 0xc6120000+uint32(i)) // 198.18.0.0/15
		return aimed("eth0", netip.AddrFrom4([4]byte(a)).String(), rules.TCP, 40000, uint16(1000+i))
	})
	if got := w.counter("c_dropped") - before; got != n {
		t.Errorf("%d of %d packets dropped", got, n)
	}
	k := w.knocks()
	sets := rules.KnockSets()
	if len(k.Ports) != sets[0].Size || len(k.Sources) != sets[1].Size || !k.PortsFull || !k.SourcesFull {
		t.Errorf("%d ports, %d sources, full %t and %t; want %d, %d", len(k.Ports), len(k.Sources), k.PortsFull, k.SourcesFull, sets[0].Size, sets[1].Size)
	}
	w.expect(t, in("a listed port", w.tcp(stranger4, 80)), out("an unlisted one", w.tcp(stranger4, 81)))
	w.noDrift(t, rs)
}

// withoutKnocks leaves out of a listing who knocked: any packet may.
func withoutKnocks(text string) string {
	return regexp.MustCompile(`(set knocks[46]? \{[^}]*?)\n\t\telements = \{[^}]*\}`).ReplaceAllString(text, "$1")
}
