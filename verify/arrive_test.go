package verify

import (
	"errors"
	"testing"

	"deadlight/rules"
)

// witnessed sweeps with a tripwire on the target and gives what both saw.
func (w *world) witnessed(cfg Config) (*Result, *HostProof) {
	w.t.Helper()
	var ports []uint16
	for _, p := range cfg.Paths {
		ports = append(ports, p.SrcPort)
	}
	trip, err := ArmTripwire(w.target.run, ports)
	if err != nil {
		w.t.Fatal(err)
	}
	defer trip.Remove()
	cfg.Arrived = trip.Arrived
	r := w.sweep(cfg)
	proof, err := trip.proof()
	if err != nil {
		w.t.Fatal(err)
	}
	return r, proof
}

// run is the space's [Runner].
func (s *space) run(fn func() error) error {
	var err error
	s.do(func() { err = fn() })
	return err
}

func TestArrivedEndsTheRounds(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport { 22, 80 } accept", "udp dport 53 accept")
	w.listen("tcp", target4, 80)
	ports := portRange(1, 5000)
	// No canary on the second path: the witness is proof enough.
	r, proof := w.witnessed(Config{Paths: []Path{w.path(false, ports, ports, canary22), w.path(true, ports, nil)}})
	for i, p := range r.Paths {
		if !p.ArrivedTCP || p.ArrivedUDP != (i == 0) {
			t.Errorf("path %d: arrived %v and %v", i, p.ArrivedTCP, p.ArrivedUDP)
		}
		want(t, "tcp", ports, p.TCP, func(port uint16) Answer {
			switch {
			case port == 80 && i == 0:
				return Answer{Open, SynAck}
			case port == 22 || port == 80:
				return Answer{Closed, TCPReset}
			}
			return Answer{Filtered, NoResponse}
		})
	}
	// A busy machine may make a canary late, and that costs a round; four it never costs.
	if n := r.Paths[1].SentTCP; n >= 4*uint64(len(ports)) {
		t.Errorf("%d probes for %d ports that all arrived", n, len(ports))
	}
	if r.Bound != 0 {
		t.Errorf("bound %g although all arrived", r.Bound)
	}
	if !proof.Passed[Passage{SrcPort: 61004, DstPort: 53, Protocol: rules.UDP}] || len(proof.Passed) != 5 {
		t.Errorf("passed: %v", proof.Passed)
	}
}

// A probe that is lost before the witness is not filtered by the host: every
// such port is asked again, and without a full count silence is what it is
// without a witness.
func TestArrivedLossy(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept", "tcp dport & 0xf == 7 accept")
	w.target.nft(`table inet loss { chain in { type filter hook prerouting priority -500; numgen random mod 100 < 10 drop; }; }`)
	ports := portRange(1, 3000)
	r, _ := w.witnessed(Config{Paths: []Path{w.path(false, ports, nil, canary22)}})
	if r.Paths[0].ArrivedTCP {
		t.Error("everything arrived on a line that loses a tenth")
	}
	w.wantAlive(r)
	want(t, "tcp", ports, r.Paths[0].TCP, func(port uint16) Answer {
		if port == 22 || port&0xf == 7 {
			return Answer{Closed, TCPReset}
		}
		return Answer{Filtered, NoResponse}
	})
}

// Counts that do not match prove nothing, and without canaries nothing else does.
func TestArrivedMustMatch(t *testing.T) {
	w := newWorld(t)
	w.firewall("tcp dport 22 accept")
	ports := portRange(1, 100)
	for _, c := range []struct {
		name string
		add  int
		want Answer
	}{
		{"one less", -1, Answer{Unknown, PathNotProven}},
		{"one more", 1, Answer{Unknown, PathNotProven}},
		{"none", -100, Answer{Unknown, PathNotProven}},
		{"all", 0, Answer{Filtered, NoResponse}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := w.path(true, ports[30:], nil)
			trip, err := ArmTripwire(w.target.run, []uint16{p.SrcPort})
			if err != nil {
				t.Fatal(err)
			}
			defer trip.Remove()
			calls := uint64(0)
			r := w.sweep(Config{Paths: []Path{p}, Arrived: func() (map[rules.Protocol]map[uint16]uint64, error) {
				n, err := trip.Arrived()
				calls++
				if calls == 1 { // before the first round
					return n, err
				}
				n[rules.TCP][p.SrcPort] = uint64(max(int(n[rules.TCP][p.SrcPort])+c.add*int(calls), 0))
				return n, err
			}})
			want(t, "tcp", p.TCP, r.Paths[0].TCP, always(c.want.State, c.want.Reason))
			if r.Paths[0].ArrivedTCP != (c.add == 0) || c.add != 0 && r.Bound != 1 {
				t.Errorf("arrived %v, bound %g", r.Paths[0].ArrivedTCP, r.Bound)
			}
		})
	}
	t.Run("witness fails", func(t *testing.T) {
		broken := errors.New("gone")
		w.vantage.do(func() {
			_, err := Sweep(t.Context(), Config{Paths: []Path{w.path(true, ports, nil)},
				Arrived: func() (map[rules.Protocol]map[uint16]uint64, error) { return nil, broken }})
			if !errors.Is(err, broken) {
				t.Errorf("got %v", err)
			}
		})
	})
}
