package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// Since is what became of a host from one report to a later one. Only what both
// probed is compared.
type Since struct {
	Verdict Verdict `json:"verdict"` // of the older report
	// Changes are ports whose state differs, in the order of the keys of
	// [Report.States] and of the states.
	Changes []StateChange `json:"changes"`
	// Unlike says what keeps the reports from being of one host and kind, or "".
	Unlike string `json:"unlike,omitempty"`
}

// StateChange is the ports of a sweep that went from one state to another.
type StateChange struct {
	Sweep string `json:"sweep"` // tcp4, tcp6, udp4 or udp6
	Was   State  `json:"was"`
	Is    State  `json:"is"`
	Ports string `json:"ports"` // "80,8000-8009"
}

// ErrNotReport is the error of a file that is no report of `verify --json`.
var ErrNotReport = errors.New("not a report of verify --json")

// ReadReport reads the JSON form of a report.
func ReadReport(src io.Reader) (*Report, error) {
	var r Report
	d := json.NewDecoder(src)
	if err := d.Decode(&r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotReport, err)
	}
	if r.Schema != 1 || r.States == nil {
		return nil, fmt.Errorf("%w: its schema is %d, and 1 is known", ErrNotReport, r.Schema)
	}
	for key, s := range r.States {
		if sweepName(key) == "" {
			return nil, fmt.Errorf("%w: states of %q", ErrNotReport, key)
		}
		if _, err := s.byPort(); err != nil {
			return nil, fmt.Errorf("%w: states of %s: %w", ErrNotReport, key, err)
		}
	}
	return &r, nil
}

// UnmarshalJSON refuses a report without a verdict, which none is to be taken for a pass.
func (r *Report) UnmarshalJSON(b []byte) error {
	type plain Report
	return readJudged(b, (*plain)(r))
}

// UnmarshalJSON refuses one without a verdict.
func (b *Brief) UnmarshalJSON(text []byte) error {
	type plain Brief
	return readJudged(text, (*plain)(b))
}

// readJudged reads an object that has a verdict.
func readJudged(text []byte, into any) error {
	var judged struct {
		Verdict *Verdict `json:"verdict"`
	}
	if err := json.Unmarshal(text, &judged); err != nil {
		return err
	}
	if judged.Verdict == nil {
		return errors.New("it has no verdict")
	}
	return json.Unmarshal(text, into)
}

// UnmarshalJSON reads the lower-case word.
func (s *State) UnmarshalJSON(b []byte) error {
	var word string
	if err := json.Unmarshal(b, &word); err != nil {
		return err
	}
	for i, name := range stateNames {
		if name == word {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("no state of a port: %q", word)
}

// UnmarshalJSON reads the lower-case word.
func (v *Verdict) UnmarshalJSON(b []byte) error {
	var word string
	if err := json.Unmarshal(b, &word); err != nil {
		return err
	}
	for i := Pass; i <= Fail; i++ {
		if i.String() == word {
			*v = i
			return nil
		}
	}
	return fmt.Errorf("no verdict: %q", word)
}

// of gives the ports in a state.
func (s States) of(state State) string {
	return [...]string{s.Unknown, s.Open, s.Closed, s.Rejected, s.Filtered}[state]
}

// byPort gives the state of each port that was probed; a port is probed when it is
// in a state.
func (s States) byPort() (map[uint16]State, error) {
	out := map[uint16]State{}
	for state := Unknown; state <= Filtered; state++ {
		ports, err := parseRanges(s.of(state))
		if err != nil {
			return nil, err
		}
		for _, p := range ports {
			if _, twice := out[p]; twice {
				return nil, fmt.Errorf("port %d is in two states", p)
			}
			out[p] = state
		}
	}
	return out, nil
}

// parseRanges reads what [Ranges] writes.
func parseRanges(s string) ([]uint16, error) {
	if s == "" {
		return nil, nil
	}
	var out []uint16
	for _, part := range strings.Split(s, ",") {
		from, to, isRange := strings.Cut(part, "-")
		lo, err := strconv.ParseUint(from, 10, 16)
		hi := lo
		if err == nil && isRange {
			hi, err = strconv.ParseUint(to, 10, 16)
		}
		if err != nil || hi < lo {
			return nil, fmt.Errorf("no list of ports: %q", s)
		}
		for p := lo; p <= hi; p++ {
			out = append(out, uint16(p))
		}
	}
	return out, nil
}

// Compare tells what changed since an older report, which [ReadReport] has read.
func (r *Report) Compare(old *Report) (*Since, error) {
	s := &Since{Verdict: old.Verdict, Changes: []StateChange{}}
	var unlike []string
	for _, d := range []struct{ what, was, is string }{{"target", old.Target, r.Target}, {"vantage", old.Vantage, r.Vantage}, {"proof", old.Proof, r.Proof}} {
		if d.was != d.is {
			unlike = append(unlike, fmt.Sprintf("%s was %s", d.what, d.was))
		}
	}
	s.Unlike = strings.Join(unlike, "; ")
	for _, key := range sweepKeys {
		was, err := old.States[key].byPort()
		if err != nil {
			return nil, err
		}
		is, err := r.States[key].byPort()
		if err != nil {
			return nil, err
		}
		changed := map[[2]State][]uint16{}
		for port, now := range is {
			if before, probed := was[port]; probed && before != now {
				changed[[2]State{before, now}] = append(changed[[2]State{before, now}], port)
			}
		}
		for before := Unknown; before <= Filtered; before++ {
			for now := Unknown; now <= Filtered; now++ {
				if ports := changed[[2]State{before, now}]; ports != nil {
					slices.Sort(ports)
					s.Changes = append(s.Changes, StateChange{key, before, now, Ranges(ports)})
				}
			}
		}
	}
	return s, nil
}

// write tells it to people, a line a change.
func (s *Since) write(b *strings.Builder) {
	if s.Unlike != "" {
		fmt.Fprintf(b, "  note the older report is of something else: %s\n", s.Unlike)
	}
	for _, c := range s.Changes {
		fmt.Fprintf(b, "  since  %-5s %s -> %s  %s\n", c.Sweep, c.Was, c.Is, shorten(c.Ports, 80))
	}
	if len(s.Changes) == 0 {
		fmt.Fprintf(b, "  since  no port that both reports probed changed; the verdict was %s\n", s.Verdict)
	}
}
