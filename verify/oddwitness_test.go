package verify

import (
	"errors"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// also loads a ruleset and then runs nft on more.
func also(t *testing.T, text, more string) func() error {
	load := loadText(t, text)
	return func() error {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(more)
		out, err := []byte(nil), load()
		if err == nil {
			out, err = cmd.CombinedOutput()
		}
		if err != nil {
			return errors.Join(err, errors.New(string(out)))
		}
		return nil
	}
}

// What came in and was dropped is told from what never came in, for kinds that share
// their ports with others or have none.
func TestOddWitnessTellsSilenceFromLoss(t *testing.T) {
	rs := compileText(t, oddHost)
	const way = `table netdev way { chain in { type filter hook ingress device eth0 priority 0;
		meta l4proto { sctp, gre } drop
		icmp type timestamp-request drop
		tcp sport 53 tcp flags == (fin | psh | urg) drop
		ip frag-off & 0x1fff != 0 meta l4proto udp drop
	}; }`
	for name, c := range map[string]struct {
		text    string
		verdict Verdict
	}{
		"sound": {compiled(t, rs), Inconclusive},
		"a hole beside": {compiled(t, rs) + "insert rule inet deadlight gate meta l4proto esp accept\n" +
			"insert rule inet deadlight backstop_in meta l4proto esp accept\n", Fail},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := oddRun(t, RehearseConfig{Rules: rs, Load: also(t, c.text, way), Reload: func() error { return nil }})
			lost, through := map[string]bool{}, map[string]bool{}
			for _, f := range r.Findings {
				if f.Observed == Unknown {
					lost[f.Odd] = true
				} else {
					through[f.Odd+" "+f.Protocol] = true
				}
			}
			for _, want := range []string{"sctp init", "packet of another protocol", "timestamp request", "xmas from port 53", "fragmented datagram"} {
				if !lost[want] {
					t.Errorf("%q is not missed", want)
				}
				delete(lost, want)
			}
			if len(lost) > 0 || r.Verdict != c.verdict || len(through) > 0 != (c.verdict == Fail) || len(through) > 0 && !through["packet of another protocol esp"] {
				t.Errorf("verdict %s, missed %v, through %v:\n%s", r.Verdict, lost, through, text(t, r))
			}
		})
	}
}

// Probes that share both ports are told apart by kind and by address, though nothing
// comes back.
func TestOddWitnessIsExact(t *testing.T) {
	rs := compileText(t, oddHost+"[open.vendor]\nports = 5000\nto = [\"192.0.2.99\", \"2001:db8:99::99\"]\n")
	hole := "ip daddr 192.0.2.99 tcp dport != 4999-5001 tcp sport 53 tcp flags == ack accept\n" +
		"insert rule inet deadlight %s ip6 daddr 2001:db8:99::99 udp dport != 4999-5001 udp sport 53 accept\n" +
		"insert rule inet deadlight %s ip daddr 192.0.2.99 meta l4proto { gre, sctp } accept\n"
	broken := compiled(t, rs)
	for _, chain := range []string{"gate", "backstop_in"} {
		broken += "insert rule inet deadlight " + chain + " " + strings.ReplaceAll(hole, "%s", chain)
	}
	const mute = "table inet mute { chain out { type filter hook output priority 0; policy drop; tcp sport { 80, 443, 53 } accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }; }"
	r, got := oddRun(t, RehearseConfig{Rules: rs, Load: also(t, broken, mute), Reload: func() error { return nil }})
	want := []string{"ack from port 53", "datagram from port 53", "packet of another protocol", "sctp init"}
	if !slices.Equal(got, want) {
		t.Errorf("found by %q, want %q", got, want)
	}
	for _, f := range r.Findings {
		a, err := netip.ParseAddr(f.Address)
		to := netip.MustParseAddr("192.0.2.99")
		if f.Odd == "datagram from port 53" {
			to = netip.MustParseAddr("2001:db8:99::99")
		}
		if err != nil || a != to || f.Reason != PassedFirewall.String() || f.Odd == "packet of another protocol" && f.Protocol != "gre" {
			t.Errorf("%+v", f)
		}
	}
	if r.Verdict != Fail || t.Failed() {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
}

// The witness brings neither connection tracking nor defragmentation, and is gone
// with its socket.
func TestOddWitnessLeavesTheHostAlone(t *testing.T) {
	w := newTestWorld(t, "eth0")
	nft(t, w, "table inet own { chain in { type filter hook input priority 0; counter; }; }", "-f", "-")
	before := nft(t, w, "", "list", "ruleset")
	o, err := armOddWitness(w.Host, []netip.Addr{testSrc4, testSrc6}, []oddMark{{false, 7}, {true, 9}})
	if err != nil {
		t.Fatal(err)
	}
	listing := nft(t, w, "", "list", "table", "inet", tripwireTable)
	for _, want := range []string{"@arrived4", "@passed6", "hook forward"} {
		if !strings.Contains(listing, want) {
			t.Errorf("no %q in the listing", want)
		}
	}
	for _, not := range []string{"ct ", "drop", "reject", "queue"} {
		if strings.Contains(listing, not) {
			t.Errorf("%q in the listing", not)
		}
	}
	if _, err := ArmTripwire(w.Host, []uint16{20001}); err == nil {
		t.Error("two tripwires at once")
	}
	if t.Failed() || testing.Verbose() {
		t.Log(listing)
	}
	if err := o.remove(); err != nil {
		t.Fatal(err)
	}
	if after := nft(t, w, "", "list", "ruleset"); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
}
