package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/firewall"
	"deadlight/rules"
)

// Rules for some time, in no file: open and block add one, close and unblock end
// one. Each of them applies anew what was last applied, from the state, with other
// temporary rules beside it; files of the policy that were edited since wait for
// deadlight apply.

// The shortest time that a reader can still see, and the longest that belongs
// outside of a policy.
const (
	shortestTemporary = time.Second
	longestTemporary  = 365 * day
	day               = 24 * time.Hour
)

// mostTemporary are as many rules as packets can be asked for one by one. Blocks of
// single addresses are looked up at once, however many there are: mostBans bounds what
// an attacker who comes from many of them can have written to disk with each.
const (
	mostTemporary = 256
	mostBans      = 65_536
)

// spanValue is a flag that takes a time like 90s, 2h, 1d or 1d12h.
type spanValue time.Duration

// String implements [pflag.Value].
func (v *spanValue) String() string {
	if *v == 0 {
		return ""
	}
	return spanText(time.Duration(*v))
}

// Type implements [pflag.Value].
func (v *spanValue) Type() string { return "duration" }

// Set implements [pflag.Value].
func (v *spanValue) Set(s string) error {
	d, err := parseSpan(s)
	if err != nil {
		return err
	}
	if d < shortestTemporary || d > longestTemporary {
		return fmt.Errorf("it takes from 1s to 365d; what lasts longer belongs into the policy, with expires")
	}
	*v = spanValue(d)
	return nil
}

// parseSpan reads what time.ParseDuration does, with days in front.
func parseSpan(s string) (time.Duration, error) {
	const most = 10_000 // days; a duration holds more
	var d time.Duration
	rest := s
	if head, tail, ok := strings.Cut(s, "d"); ok {
		n, err := strconv.ParseUint(head, 10, 32)
		if err != nil || n > most {
			return 0, fmt.Errorf("write a time like 90s, 2h, 1d or 1d12h")
		}
		d, rest = time.Duration(n)*day, tail
	}
	if rest != "" {
		more, err := time.ParseDuration(rest)
		if err != nil || more < 0 {
			return 0, fmt.Errorf("write a time like 90s, 2h, 1d or 1d12h")
		}
		d += more
	}
	if s == "" {
		return 0, fmt.Errorf("write a time like 90s, 2h, 1d or 1d12h")
	}
	return d, nil
}

// spanText writes a time in its two largest units: 1d12h, 1h58m, 45s.
func spanText(d time.Duration) string {
	d = d.Round(time.Second)
	units := []struct {
		one  time.Duration
		name string
	}{{day, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}}
	for i, u := range units {
		if d < u.one && u.one > time.Second {
			continue
		}
		out := fmt.Sprintf("%d%s", d/u.one, u.name)
		if i+1 < len(units) {
			if n := d % u.one / units[i+1].one; n > 0 {
				out += fmt.Sprintf("%d%s", n, units[i+1].name)
			}
		}
		return out
	}
	return ""
}

// temporaryFlags are of all commands that change temporary rules.
type temporaryFlags struct {
	state         *string
	acceptLockout bool
}

func (f *temporaryFlags) add(c *cobra.Command) {
	f.state = stateFlag(c)
	c.Flags().BoolVar(&f.acceptLockout, "accept-lockout", false, "do it also when your own session is not admitted then")
}

// changeTemporary puts other temporary rules beside what was last applied, in the
// network namespace of the calling thread. change is given the policy as it was
// applied and the rules that run, and gives those that shall, or silently(exitOK)
// where there is nothing to do; again is the command line. It gives what was applied,
// which has the rules by the names they have there.
func changeTemporary(e env, f temporaryFlags, again string, change func(p *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error)) (rs *rules.Ruleset, r *firewall.Record, err error) {
	h, err := openHost(*f.state, true)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	h.conn.Hush = h.hush(e)
	last, err := h.settle()
	switch {
	case errors.Is(err, firewall.ErrNoState):
		return nil, nil, refused(errors.New("no policy is applied here that a temporary rule could stand beside: ruleset as before"), "sudo deadlight apply, then sudo "+again)
	case err != nil:
		return nil, nil, err
	case h.elsewhere(last):
		return nil, nil, refused(fmt.Errorf("the state in %s is of another network namespace: ruleset as before", h.state.Dir()), "deadlight apply")
	}
	is, err := h.look()
	if err != nil {
		return nil, nil, err
	}
	if !is.Present {
		return nil, nil, refused(fmt.Errorf("there is no table inet %s: nothing of deadlight filters, and nothing is changed", rules.TableName), "sudo deadlight apply, then sudo "+again)
	}
	p, err := h.state.Parse(last)
	if err != nil {
		return nil, nil, err
	}
	list, err := change(p, firewall.Running(last.Temporary, time.Now()))
	if err != nil {
		return nil, nil, err
	}
	if err := tooMany(list); err != nil {
		return nil, nil, err
	}
	next := *last
	p, next.Temporary = firewall.Beside(p, list)
	rs = rules.Compile(p)
	if !f.acceptLockout {
		if err := refuseLockout(e, again, rs); err != nil {
			return nil, nil, err
		}
	}
	if drifted := len(firewall.Diff(is, last.Snapshot)); drifted > 0 {
		printf(e.stderr, "deadlight: warning: the kernel did not hold what was applied: %s undone with this\n", plural(drifted, "difference"))
	}
	next.By, next.Namespace = build().version, h.here
	if next.Snapshot, err = firewall.Meant(rs, time.Now()); err != nil {
		return nil, nil, err
	}
	// The large sets are those of the policy as ever: none is sent again.
	h.conn.Known = firewall.KnownIn(&rs.Table)
	// On disk first: what opens must not outlive what the state says of it.
	if err := h.state.Stage(&next); err != nil {
		return nil, nil, err
	}
	res, err := h.conn.Apply(rs)
	if err != nil {
		// It may have been loaded all the same.
		_, settled := h.state.Settle(h.look, h.here)
		return nil, nil, errors.Join(err, settled)
	}
	for _, w := range res.Warnings {
		printf(e.stderr, "deadlight: warning: %s\n", oneLine(w))
	}
	next.Generation = res.Generation.ID
	if err := h.state.Commit(next.Generation); err != nil {
		printf(e.stderr, "deadlight: warning: it is in force, but not yet recorded: the next command will do that\n")
		return nil, nil, err
	}
	for _, u := range failing(rs) {
		printf(e.stderr, "deadlight: warning: while this lasts an expectation of the policy does not hold: %s: %s\n", oneLine(u.pos.String()), oneLine(u.text))
	}
	return rs, &next, nil
}

// tooMany refuses more temporary rules than there may be.
func tooMany(list []firewall.Temporary) error {
	const hint = "many addresses belong into a [set.*] with files, which a [block.*] names"
	hosts := 0
	for i := range list {
		if list[i].IsBan() {
			hosts++
		}
	}
	switch {
	case hosts > mostBans:
		return refused(fmt.Errorf("%d addresses are blocked already: ruleset as before", mostBans), hint)
	case len(list)-hosts > mostTemporary:
		return refused(fmt.Errorf("there are %d temporary rules already that are not blocks of one address: ruleset as before", mostTemporary), hint)
	}
	return nil
}

// newTemporary notes who makes a rule, and when.
func newTemporary(t rules.Temporary, within time.Duration) (firewall.Temporary, error) {
	now := time.Now().UTC()
	if within > 0 {
		t.Expires = now.Add(within).Truncate(time.Millisecond)
	}
	if err := t.Check(); err != nil {
		return firewall.Temporary{}, mistaken(err)
	}
	return firewall.Temporary{Temporary: t, By: caller(), Begun: now.Truncate(time.Second)}, nil
}

// mistaken is a usage error with the hint of the language.
func mistaken(err error) error {
	var m *rules.Mistake
	if errors.As(err, &m) {
		return usageError(m.Hint, "%w", m)
	}
	return usageError("", "%w", err)
}

// put adds a rule, or prolongs the one about the same packets; before is when that
// would have ended.
func put(list []firewall.Temporary, t firewall.Temporary) (out []firewall.Temporary, before *firewall.Temporary) {
	i := slices.IndexFunc(list, func(o firewall.Temporary) bool { return o.Same(&t.Temporary) })
	if i < 0 {
		return append(list, t), nil
	}
	old := list[i]
	t.Name = old.Name
	list[i] = t
	return list, &old
}

// caller names who runs the command: who logged in, which sudo does not change.
func caller() string {
	const unset = "4294967295"
	id := strconv.Itoa(os.Getuid())
	if b, err := os.ReadFile("/proc/self/loginuid"); err == nil {
		if login := strings.TrimSpace(string(b)); login != "" && login != unset {
			id = login
		}
	}
	if u, err := user.LookupId(id); err == nil {
		return u.Username
	}
	return "user " + id
}

// endText says when a rule ends that was made for so long.
func endText(t *rules.Temporary, within time.Duration) string {
	if t.Expires.IsZero() {
		return "until deadlight unblock " + t.What() + ", also after a reboot"
	}
	return fmt.Sprintf("until %s (%s)", clock(t.Expires), spanText(within))
}

// instead says what the end was before.
func instead(before *firewall.Temporary) string {
	switch {
	case before == nil:
		return ""
	case before.Expires.IsZero():
		return ", no more without an end"
	}
	return ", no more until " + clock(before.Expires)
}

// temporaryOf gives the temporary rules that stand beside what was last applied in
// the network namespace of the calling thread, for commands that judge packets.
// None where nothing is applied, or the state is not ours to read.
func temporaryOf(dir string) (list []firewall.Temporary, err error) {
	h, err := openHost(dir, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	last, err := h.state.Settle(h.look, h.here)
	if errors.Is(err, firewall.ErrNoState) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return h.temporary(last), nil
}

// temporary are the rules beside what a record says, those that have ended among
// them: the kernel has their chains still.
func (h *host) temporary(r *firewall.Record) []firewall.Temporary {
	if r == nil || h.elsewhere(r) {
		return nil
	}
	return r.Temporary
}

// withTemporary compiles a policy with temporary rules beside it, and gives these
// by the names they have there.
func withTemporary(rs *rules.Ruleset, list []firewall.Temporary) (*rules.Ruleset, []firewall.Temporary) {
	if len(list) == 0 {
		return rs, nil
	}
	p, list := firewall.Beside(rs.Policy, list)
	return rules.Compile(p), list
}

// withThose is a policy with the temporary rules beside what is applied here.
func withThose(e env, dir string, rs *rules.Ruleset) *rules.Ruleset {
	rs, _ = withTemporary(rs, temporaryHere(e, dir))
	return rs
}

// temporaryHere are the temporary rules of this host; where they cannot be read it
// warns of that.
func temporaryHere(e env, dir string) []firewall.Temporary {
	list, err := temporaryOf(dir)
	if err != nil && !errors.Is(err, firewall.ErrPermission) {
		printf(e.stderr, "deadlight: warning: whether there are temporary rules cannot be told: %s\n", oneLine(firstLine(err)))
	}
	return list
}

// temporaryJSON is a rule for some time, in no file.
type temporaryJSON struct {
	Kind      string     `json:"kind"` // open or block
	Name      string     `json:"name"`
	Protocol  string     `json:"protocol,omitempty"` // of an opening
	Port      uint16     `json:"port,omitempty"`     // of an opening
	From      []string   `json:"from"`               // empty: anywhere
	Interface string     `json:"interface,omitempty"`
	Ends      *time.Time `json:"ends,omitempty"`         // by the kernel's own clock where it holds the rule; absent: not by itself
	Left      int        `json:"left_seconds,omitempty"` // until it ends
	InForce   bool       `json:"in_force"`               // the kernel holds it
	By        string     `json:"by"`
	Begun     time.Time  `json:"begun"`
	Comment   string     `json:"comment,omitempty"`

	what string
	ban  bool
}

// temporaries describes the rules of a record that have not ended.
func temporaries(r *firewall.Record, is *firewall.Snapshot) []temporaryJSON {
	out := []temporaryJSON{}
	now := time.Now()
	for _, t := range firewall.Running(r.Temporary, now) {
		j := temporaryJSON{
			Kind: "open", Name: t.Name, From: []string{}, Interface: t.Interface, By: t.By, Begun: t.Begun, Comment: t.Comment, what: t.What(), ban: t.IsBan(),
		}
		if t.Block {
			j.Kind = "block"
		} else {
			j.Protocol, j.Port = t.Protocol.String(), t.Port
		}
		for _, a := range t.From {
			j.From = append(j.From, a.String())
		}
		end, there := is.Ends(&t.Temporary)
		if j.InForce = there; !there {
			end = t.Expires
		}
		if !end.IsZero() {
			end = end.UTC().Truncate(time.Second)
			j.Ends, j.Left = &end, int(max(end.Sub(now), 0)/time.Second)
		}
		out = append(out, j)
	}
	return out
}

// text is a line of deadlight status.
func (j *temporaryJSON) text() string {
	out := j.Kind + " " + j.what + ", "
	switch {
	case !j.InForce:
		out += "NOT in force: the kernel does not hold it"
	case j.Ends == nil:
		out += "until deadlight unblock, also after a reboot"
	default:
		out += spanText(time.Duration(j.Left)*time.Second) + " left"
	}
	out += ", by " + j.By
	if j.Comment != "" {
		out += ", " + j.Comment
	}
	return out
}

// printTemporary is the section of deadlight status.
func printTemporary(w io.Writer, list []temporaryJSON) {
	const most = 20 // blocks of single addresses
	title, bans := "temporary", 0
	for i := range list {
		if list[i].ban {
			if bans++; bans > most && list[i].InForce {
				continue
			}
		}
		printf(w, "%-9s %s\n", title, oneLine(list[i].text()))
		title = ""
	}
	if bans > most {
		printf(w, "%-9s %d addresses are blocked in all: deadlight status --json lists each\n", title, bans)
	}
}
