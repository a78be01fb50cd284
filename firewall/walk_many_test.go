package firewall

import (
	"net/netip"
	"reflect"
	"testing"

	"deadlight/rules"
)

func TestWalkAllIsWalkForEach(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		mustApply(t, c, ruleset(t, little))
		nft(t, "add table ip other; add chain ip other in { type filter hook input priority 0; policy accept; }; add rule ip other in tcp dport 80 drop")
		var packets []rules.Packet
		for _, port := range []uint16{22, 80, 81} {
			packets = append(packets, rules.Packet{In: "eth0", Src: netip.MustParseAddr("198.51.100.9"), Dst: netip.MustParseAddr("192.0.2.1"), Protocol: rules.TCP, SrcPort: 40000, DstPort: port})
		}
		all, err := c.WalkAll(packets)
		if err != nil {
			t.Fatal(err)
		}
		verdicts := map[Verdict]bool{}
		for i, p := range packets {
			one, err := c.Walk(p)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(one, all[i]) {
				t.Errorf("port %d: together %+v, alone %+v", p.DstPort, all[i], one)
			}
			verdicts[one.Verdict] = true
		}
		if all[0].Verdict != WalkAccept || all[1].Verdict != WalkDrop || all[1].By.Table != "other" || all[2].Verdict != WalkDrop {
			t.Errorf("verdicts %v, %v, %v", all[0], all[1], all[2])
		}
	})
}
