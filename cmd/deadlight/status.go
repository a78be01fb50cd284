package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

func newStatusCommand(e env) *cobra.Command {
	var asJSON bool
	var root string
	c := &cobra.Command{
		Use:     "status",
		GroupID: groupWatch,
		Short:   "Say on one screen what is in force, and what else bears on it",
		Long: `Says which policy is in force and since when, whether the kernel still holds it,
what was dropped, who knocked at which closed ports, and what beside Deadlight bears
on its verdict: chains of other tables that stop what the policy opens, NAT and
rewrites, tables of legacy iptables, tc filters and XDP programs on the interfaces
of the policy, units and scripts that flush the ruleset. It changes nothing.

Who knocked is counted in the kernel, by port and by source, as long as there is
room; a port or source that was silent for a day is forgotten. Sources may be
forged.

Of what is beside Deadlight:
  breaks  it stops what the policy opens, or can open what it closes
  may     it could, or it could not be told
  note    harmless as far as it can be judged, or intended

Units and scripts are read in the host's network namespace only, or where --root
says. Exit codes: 0 as the policy says, 1 findings, 3 could not tell.`,
		Example: "  sudo deadlight status\n  sudo deadlight status --json",
		Args:    noArgs,
	}
	dir := stateFlag(c)
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	c.Flags().StringVar(&root, "root", "", "the root directory whose units and scripts are read;\nsymbolic links are followed as they stand")
	c.RunE = func(*cobra.Command, []string) error {
		if root != "" {
			// What is not there would be taken for a host without units.
			if info, err := os.Stat(root); err != nil || !info.IsDir() {
				return usageError("", "--root wants a directory: %s", root)
			}
		}
		s, err := statusHere(*dir, root)
		if err != nil {
			return hostError(err, "deadlight status")
		}
		if asJSON {
			err = writeJSON(e.stdout, s)
		} else {
			err = forPeople(e, func(w io.Writer) error { s.print(w); return nil })
		}
		if code := s.code(); err == nil && code != exitOK {
			err = silently(code)
		}
		return err
	}
	return c
}

// statusJSON is the object of `status --json`; the text is made from it.
type statusJSON struct {
	Schema       int                `json:"schema"`
	Policy       policyStatusJSON   `json:"policy"`
	Kernel       kernelStatusJSON   `json:"kernel"`
	Verified     *verifiedJSON      `json:"verified,omitempty"` // the last verification of this host
	Temporary    []temporaryJSON    `json:"temporary"`          // rules beside the policy that have not ended
	Counters     []counterJSON      `json:"counters"`
	Knocks       *knocksJSON        `json:"knocks,omitempty"` // absent where nothing is counted by port
	Interference []interferenceJSON `json:"interference"`
	Notes        []string           `json:"notes"`
}

// policyStatusJSON is what was applied last.
type policyStatusJSON struct {
	State   string     `json:"state"` // applied, none, or unknown: it could not be read
	File    string     `json:"file,omitempty"`
	Applied *time.Time `json:"applied,omitempty"`
	Changed []fileJSON `json:"changed"` // files that are not as they were applied
	// Unenforced says that it has enforce = false: what it would drop gets through.
	Unenforced bool `json:"unenforced,omitempty"`
	// Pending is a policy on trial: File is what the kernel judges by.
	Pending *pendingJSON   `json:"pending,omitempty"`
	Back    *firewall.Back `json:"back,omitempty"` // the last trial that came back to this
}

// kernelStatusJSON is what the kernel holds.
type kernelStatusJSON struct {
	Table       string  `json:"table"` // equal to what was applied, different, absent, or present: with nothing to compare with
	Differences int     `json:"differences"`
	Generation  uint32  `json:"generation"`
	Since       uint32  `json:"generations_since"` // changes to any table since the apply
	Rebooted    bool    `json:"rebooted"`          // since the apply
	By          *byJSON `json:"by,omitempty"`      // who is known to have changed a table last, if not the apply
}

// verifiedJSON is the last verdict about this host.
type verifiedJSON struct {
	At       time.Time `json:"at"`
	Verdict  string    `json:"verdict"`
	Findings int       `json:"findings"`
	Proof    string    `json:"proof"`
	Ports    string    `json:"ports"`
	Policy   string    `json:"policy"`
	// Current says that it is of the policy that was applied last, as it was applied.
	Current bool `json:"current"`
}

// counterJSON is a named counter of the table.
type counterJSON struct {
	Name    string `json:"name"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
	Meaning string `json:"meaning"`
	Finding bool   `json:"finding,omitempty"` // it should be zero, and is not
}

// The states of a policy and of a table.
const (
	policyApplied = "applied"
	policyNone    = "none"
	policyUnknown = "unknown"

	tableEqual     = "equal"
	tableDifferent = "different"
	tableAbsent    = "absent"
	tablePresent   = "present"
)

// statusHere looks at the network namespace of the calling thread.
func statusHere(dir, root string) (_ *statusJSON, err error) {
	h, err := openHost(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	s := &statusJSON{Schema: 1, Temporary: []temporaryJSON{}, Counters: []counterJSON{}, Notes: []string{}}
	rs, err := s.applied(h)
	if err != nil {
		return nil, err
	}
	counted, err := h.conn.Counters(rules.TableName)
	if err != nil {
		return nil, err
	}
	s.count(counted)
	knocked, err := h.conn.Knocks(rules.TableName)
	if err != nil {
		return nil, err
	}
	s.Knocks = knocks(knocked)
	files := h.conn.HostFiles()
	switch {
	case root != "":
		files.Root = os.DirFS(root)
	case files.Root == nil:
		s.Notes = append(s.Notes, "this is not the host's network namespace: units and boot scripts were not read")
	}
	list, err := h.conn.Interference(rs, files)
	if err != nil {
		return nil, err
	}
	s.Interference = interferences(list)
	return s, nil
}

// applied fills in what was applied last and how the kernel stands to it, and
// gives its ruleset, nil when it cannot be had.
func (s *statusJSON) applied(h *host) (*rules.Ruleset, error) {
	s.Policy = policyStatusJSON{State: policyUnknown, Changed: []fileJSON{}}
	last, err := h.state.Settle(h.look, h.here)
	switch {
	case errors.Is(err, firewall.ErrNoState):
		s.Policy.State = policyNone
		if err := s.verified(h, nil); err != nil {
			return nil, err
		}
		return nil, s.uncompared(h)
	case errors.Is(err, firewall.ErrStateDamaged), errors.Is(err, firewall.ErrStateVersion):
		s.Notes = append(s.Notes, "what was last applied cannot be read: "+err.Error())
		return nil, s.uncompared(h)
	case err != nil:
		return nil, err
	case h.elsewhere(last):
		s.Notes = append(s.Notes, "the state in "+h.state.Dir()+" is of another network namespace and was not used")
		return nil, s.uncompared(h)
	}
	h.conn.Known = h.state.Known(last)
	is, changes, err := h.conn.Check(last.Snapshot, firewall.Samples)
	if err != nil {
		return nil, err
	}
	pending, judges, err := h.pending(last, is)
	if err != nil {
		return nil, err
	}
	s.Policy.State, s.Policy.Pending = policyNone, pending
	if judges != nil {
		s.Policy.State, s.Policy.File, s.Policy.Applied, s.Policy.Back = policyApplied, judges.Policy, &judges.Applied, judges.Back
		s.Policy.Changed = append(s.Policy.Changed, changedFiles(judges)...)
		s.Temporary = temporaries(judges, is)
	}
	if err := s.verified(h, judges); err != nil {
		return nil, err
	}
	s.Kernel = kernelStatusJSON{Table: tableEqual, Generation: is.Generation.ID, Rebooted: last.Namespace.Gone(h.here)}
	switch {
	case !is.Present:
		s.Kernel.Table = tableAbsent
	case len(changes) > 0:
		s.Kernel.Table, s.Kernel.Differences = tableDifferent, len(changes)
	}
	if !s.Kernel.Rebooted {
		s.Kernel.Since = is.Generation.ID - last.Generation
	}
	if s.Kernel.Since > 0 {
		if s.Kernel.By, err = h.lastActor(last); err != nil {
			return nil, err
		}
	}
	if judges == nil {
		return nil, nil
	}
	rs, err := h.state.Compile(judges)
	if err == nil {
		s.Policy.Unenforced = rs.Policy.Default.Observe
	}
	if errors.Is(err, firewall.ErrStateDamaged) || errors.Is(err, firewall.ErrStateVersion) {
		s.Notes = append(s.Notes, "the policy that was last applied cannot be read: "+err.Error())
		return nil, nil
	}
	return rs, err
}

// verified fills in the last verdict about this host; r is what is applied, or nil.
func (s *statusJSON) verified(h *host, r *firewall.Record) error {
	v, err := h.state.Verified()
	switch {
	case errors.Is(err, firewall.ErrStateDamaged), errors.Is(err, firewall.ErrStateVersion):
		s.Notes = append(s.Notes, "the last verdict cannot be read: "+err.Error())
		return nil
	case err != nil:
		return err
	case v == nil || !v.Namespace.Is(h.here) && !v.Namespace.Gone(h.here):
		return nil
	}
	s.Verified = &verifiedJSON{v.At, v.Verdict, v.Findings, v.Proof, v.Ports, v.Policy, r != nil && v.Digest == firewall.DigestOf(r.Sources)}
	return nil
}

// uncompared says what the kernel holds when nothing says what it should.
func (s *statusJSON) uncompared(h *host) error {
	is, err := h.look()
	if err != nil {
		return err
	}
	s.Kernel = kernelStatusJSON{Table: tablePresent, Generation: is.Generation.ID}
	if !is.Present {
		s.Kernel.Table = tableAbsent
	}
	return nil
}

// meanings are the counters worth seeing: what was stopped. Those of finding
// stay at zero on a sound host.
func meanings() []counterJSON {
	const behind = "stopped behind the gate: a rewrite took them past it"
	return []counterJSON{
		{Name: "c_dropped", Meaning: "dropped: no rule opens it"},
		{Name: "c_rejected", Meaning: "rejected: no rule opens it"},
		{Name: "c_invalid", Meaning: "dropped: no flow they could belong to"},
		{Name: "c_spoofed", Meaning: "dropped: a loopback address from a wire"},
		{Name: "c_container_route", Meaning: "dropped: to a container by its own address"},
		{Name: "c_rewritten_dropped", Meaning: "dropped: sent on by a DNAT, and no rule opens it to them"},
		{Name: "c_transit_dropped", Meaning: "dropped: to be sent on to another host"},
		{Name: "c_egress_dropped", Meaning: "dropped: may not leave"},
		{Name: "c_egress_rejected", Meaning: "rejected: may not leave"},
		{Name: "c_backstop_in", Meaning: behind, Finding: true},
		{Name: "c_backstop_forward", Meaning: behind, Finding: true},
	}
}

// count picks the counters worth seeing: what the policy dropped, and all else
// that is not zero.
func (s *statusJSON) count(counted map[string]firewall.Counter) {
	for _, m := range meanings() {
		c, there := counted[m.Name]
		if !there || c.Packets == 0 && m.Name != "c_dropped" {
			continue
		}
		m.Packets, m.Bytes = c.Packets, c.Bytes
		if s.Policy.Unenforced {
			m.Meaning, m.Finding = "got through: nothing is enforced, else "+m.Meaning, false
		}
		s.Counters = append(s.Counters, m)
	}
}

// code is the exit code: a finding outweighs what could not be told.
func (s *statusJSON) code() int {
	code := interferenceCode(s.Interference)
	found := code == exitFindings || len(s.Policy.Changed) > 0 || s.Kernel.Table == tableAbsent || s.Kernel.Table == tableDifferent
	for _, c := range s.Counters {
		found = found || c.Finding
	}
	switch {
	case found:
		return exitFindings
	case s.Policy.State != policyApplied:
		return exitRefused
	}
	return code
}

// print renders the status for people.
func (s *statusJSON) print(w io.Writer) {
	switch s.Policy.State {
	case policyApplied:
		printf(w, "policy    %s, applied %s\n", oneLine(s.Policy.File), s.Policy.Applied.Local().Format("2006-01-02 15:04:05"))
	case policyNone:
		printf(w, "policy    no state: nothing was applied here, or it is not known\n")
	default:
		printf(w, "policy    not known\n")
	}
	if s.Policy.Unenforced {
		printf(w, "          NOTHING IS ENFORCED: it has enforce = false, and what it would drop gets through\n")
	}
	switch b := s.Policy.Back; {
	case s.Policy.Pending != nil:
		printf(w, "          %s\n", oneLine(s.Policy.Pending.text()))
	case b != nil && !b.Asked:
		printf(w, "          %s was on trial until %s, and was not confirmed\n", oneLine(b.Policy), clock(b.At))
	case b != nil:
		printf(w, "          %s was on trial until %s, and was rolled back\n", oneLine(b.Policy), clock(b.At))
	}
	for _, f := range s.Policy.Changed {
		printf(w, "          %s: %s since\n", oneLine(f.Name), f.Why)
	}
	printf(w, "kernel    %s\n", s.Kernel.text())
	if by := s.Kernel.writer(); by != "" {
		printf(w, "          %s\n", oneLine(by))
	}
	if v := s.Verified; v != nil {
		printf(w, "verified  %s\n", oneLine(v.text()))
	}
	printTemporary(w, s.Temporary)
	title := "packets"
	for _, c := range s.Counters {
		mark := ""
		if c.Finding {
			mark = "finding: "
		}
		printf(w, "%-8s  %d %s%s (%s)\n", title, c.Packets, mark, c.Meaning, c.Name)
		title = ""
	}
	if s.Knocks != nil {
		s.Knocks.print(w)
	}
	printInterferences(w, s.Interference)
	for _, n := range s.Notes {
		printf(w, "note: %s\n", oneLine(n))
	}
}

func (v *verifiedJSON) text() string {
	out := v.Verdict + " at " + v.At.Local().Format(time.DateTime)
	if v.Findings > 0 {
		out += ", " + plural(v.Findings, "finding")
	}
	if v.Ports != "all" {
		out += ", only " + v.Ports
	}
	if v.Proof != "host" {
		out += ", by packets alone"
	}
	if !v.Current {
		out += "; that was another policy than is applied now: " + v.Policy
	}
	return out
}

func (k *kernelStatusJSON) text() string {
	const table = "table inet " + rules.TableName
	switch {
	case k.Table == tableAbsent && k.Rebooted:
		return fmt.Sprintf("there is no %s: nothing has loaded it since the host was started, generation %d", table, k.Generation)
	case k.Table == tableAbsent:
		return fmt.Sprintf("there is no %s: nothing of deadlight filters, generation %d", table, k.Generation)
	case k.Table == tableEqual:
		return fmt.Sprintf("%s is as it was applied, generation %d", table, k.Generation)
	case k.Table == tableDifferent:
		return fmt.Sprintf("%s is not as it was applied: %s, deadlight drift names them; generation %d", table, plural(k.Differences, "difference"), k.Generation)
	}
	return fmt.Sprintf("there is a %s, with nothing to compare it with, generation %d", table, k.Generation)
}

// writer says who changed a table since the apply; "" when nobody did.
func (k *kernelStatusJSON) writer() string {
	switch {
	case k.Since == 0:
		return ""
	case k.By == nil:
		return plural(int(k.Since), "change") + " of any table since; by whom is not known: nobody watched"
	}
	return fmt.Sprintf("%s of any table since, the last known by%s", plural(int(k.Since), "change"), by(k.By))
}
