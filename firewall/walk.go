package firewall

import (
	"bytes"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Verdict is what the kernel does with a packet.
type Verdict string

// The verdicts of a [Journey].
const (
	WalkAccept  Verdict = "accept"  // delivered, whether or not somebody listens
	WalkDrop    Verdict = "drop"    // silence
	WalkReject  Verdict = "reject"  // refused with an answer
	WalkUnknown Verdict = "unknown" // it hinges on something that cannot be told from here
)

// Step is a rule, or the policy of a base chain, that did something to the
// packet.
type Step struct {
	Family   string // inet, ip or ip6
	Table    string
	Chain    string
	Hook     string // of the base chain that led here: prerouting, input or forward
	Priority int    // of that base chain; lower runs earlier
	Handle   uint64 // of the rule; 0 is the policy of the chain
	Comment  string // of the rule
	Verdict  string // "accept", "drop", "reject", "jump web", "return", "policy drop", "rewrite", "unknown"
	Text     string // what matched, in words close to nft's; for people
}

// Journey is a packet's way through every table of the running kernel.
type Journey struct {
	Steps   []Step // in the order of the kernel
	Verdict Verdict
	By      Step     // what decided; of WalkUnknown the first rule that cannot be told; zero: no chain judges the packet
	Notes   []string // what was assumed, what cannot be seen from here
	// Moved says that rules wrote another destination, or may have; Target is where
	// the packet arrives then, as far as it can be told.
	Moved  bool
	Target netip.AddrPort
}

// String says it in one line: "table ip filter, chain INPUT: policy drop".
func (s Step) String() string {
	if s.Table == "" {
		return "no chain judges it"
	}
	out := fmt.Sprintf("table %s %s, chain %s: %s", s.Family, s.Table, s.Chain, s.Verdict)
	if s.Handle != 0 {
		out += fmt.Sprintf(" (handle %d", s.Handle)
		if s.Comment != "" {
			out += fmt.Sprintf(", %q", s.Comment)
		}
		out += ")"
	}
	if s.Text != "" {
		out += ": " + s.Text
	}
	return out
}

// Compare holds the kernel's verdict against the policy's decision. When they
// differ, first is the step to show: the one that stopped a packet that the
// policy admits, the first one of Deadlight's own table that admitted a packet
// that the policy does not (of any table when it has none), or the first one
// that cannot be told. A journey of unknown verdict is never the same.
func Compare(d rules.Decision, j *Journey) (same bool, first *Step) {
	want := map[rules.Outcome]Verdict{
		rules.OutcomeOpen: WalkAccept, rules.OutcomeFiltered: WalkDrop, rules.OutcomeRejected: WalkReject}[d.Outcome]
	if j.Verdict == want {
		return true, nil
	}
	if j.Verdict == WalkAccept {
		for i, s := range j.Steps {
			accepts := s.Verdict == "accept" || s.Verdict == "policy accept"
			if accepts && s.Family == "inet" && s.Table == rules.TableName {
				return false, &j.Steps[i]
			}
		}
	}
	return false, &j.By
}

// Walk says what the running ruleset, of every program, does to a packet that
// enters this host. It reads rules and looks single keys up in sets; it writes
// nothing and sends nothing. Limits, quotas and connection counts are taken as
// kept, and the notes say where that mattered. Errors to test for:
// [ErrPermission].
//
// Hooks and their order are those of net/netfilter/core.c and
// uapi/linux/netfilter_ipv4.h.
func (c *Conn) Walk(p rules.Packet) (*Journey, error) {
	all, err := c.WalkAll([]rules.Packet{p})
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// Priorities of the kernel's own hooks (uapi/linux/netfilter_ipv4.h).
const (
	priorityConntrack = -200
	priorityDstNAT    = -100
	prioritySrcNAT    = 100
)

// station is a place in a hook: one base chain, or all chains of type nat,
// which the kernel runs together whatever their own priorities say
// (nf_nat_register_fn, net/netfilter/nf_nat_core.c).
type station struct {
	priority int
	chains   []*liveChain
	nat      bool
}

// stations puts the base chains of a hook in order.
func (w *walker) stations(hook uint32) []station {
	var out []station
	nat := station{nat: true, priority: priorityDstNAT}
	if hook == unix.NF_INET_LOCAL_IN {
		nat.priority = prioritySrcNAT
	}
	for _, t := range w.rules.tables {
		if t.dormant || t.family == unix.NFPROTO_IPV4 && !w.p.v4 || t.family == unix.NFPROTO_IPV6 && w.p.v4 {
			continue
		}
		for _, ch := range t.bases {
			switch {
			case ch.hook != hook || !t.judges():
			case ch.typ == "nat":
				nat.chains = append(nat.chains, ch)
			default:
				out = append(out, station{priority: ch.priority, chains: []*liveChain{ch}})
			}
		}
	}
	if len(nat.chains) > 0 {
		// Of equal priorities the newest runs first (nf_hook_entries_grow).
		slices.Reverse(nat.chains)
		sort.SliceStable(nat.chains, func(i, j int) bool { return nat.chains[i].priority < nat.chains[j].priority })
	}
	slices.Reverse(out)
	if len(nat.chains) > 0 {
		out = append(out, nat)
	}
	sort.SliceStable(out, func(i, j int) bool { return out[i].priority < out[j].priority })
	return out
}

// run walks the hooks.
func (w *walker) run() *Journey {
	w.unwalked()
	var possible endings
	stopped := w.hook(unix.NF_INET_PRE_ROUTING, &possible)
	if !stopped {
		switch {
		case w.p.elsewhere == no:
			stopped = w.hook(unix.NF_INET_LOCAL_IN, &possible)
		case w.p.elsewhere == yes:
			w.note("the packet is sent on to another host: forward is walked instead of input, postrouting is not")
			w.setOut()
			stopped = w.hook(unix.NF_INET_FORWARD, &possible)
		default:
			possible.put(stateUnsure, Step{})
			if possible.doubt == nil {
				possible.doubt = w.rewriter
			}
			stopped = true
		}
	}
	if !stopped {
		possible.put(stateAccept, Step{})
	}
	return w.journey(possible)
}

// hook walks the stations of one hook; true means that no packet gets past it.
func (w *walker) hook(hook uint32, possible *endings) bool {
	w.at.Hook = hookName(hook)
	all := w.stations(hook)
	for i, s := range all {
		w.enter(hook, s.priority)
		before := w.rewrites
		w.sure = possible.empty()
		r := w.station(s)
		// Which of two equals runs first is a matter of registration, which nobody can ask for.
		peers := peersOf(all, i)
		if w.rewrites != before && len(peers) > 0 {
			w.note(fmt.Sprintf("order unknown: several chains share hook %s, priority %d, and one rewrites the packet", w.at.Hook, s.priority))
		}
		if r.has(stateAccept) {
			r.by[stateAccept] = nil
			possible.merge(r)
			continue
		}
		possible.merge(r)
		for _, k := range peers {
			if k > i {
				w.askPeer(all[k], possible)
			}
		}
		return true
	}
	return false
}

func peersOf(all []station, i int) []int {
	var out []int
	for k := range all {
		if k != i && all[k].priority == all[i].priority {
			out = append(out, k)
		}
	}
	return out
}

// askPeer asks a chain that may as well have been first whether it would have
// stopped the packet in another way.
func (w *walker) askPeer(s station, possible *endings) {
	steps, saved := len(w.steps), w.p.copyOf()
	w.sure = false
	r := w.station(s)
	w.p, w.steps = saved, w.steps[:steps]
	r.by[stateAccept] = nil
	for k := range r.by {
		if r.by[k] != nil && possible.by[k] == nil {
			w.note(fmt.Sprintf("order unknown: chains of hook %s share priority %d and answer differently", w.at.Hook, s.priority))
			if possible.doubt == nil {
				possible.doubt = r.by[k]
			}
			possible.by[k] = r.by[k]
		}
	}
}

// station runs one base chain, or the chains of type nat until one of them
// binds the flow.
func (w *walker) station(s station) endings {
	if !s.nat {
		return w.base(s.chains[0])
	}
	var out endings
	switch {
	case w.ct != ctNew:
		out.put(stateAccept, Step{}) // only the first packet of a flow meets them
		return out
	case w.in == "lo":
		w.note("chains of type nat are passed over: they saw this packet on its way out")
		out.put(stateAccept, Step{})
		return out
	}
	w.bound = no
	for _, ch := range s.chains {
		r := w.base(ch)
		accepted := r.has(stateAccept)
		if accepted {
			r.by[stateAccept] = nil
		}
		out.merge(r)
		if !accepted {
			return out
		}
		if w.bound == yes {
			break
		}
		w.sure = w.sure && out.empty() && w.bound == no
	}
	out.put(stateAccept, Step{})
	return out
}

// base runs a base chain with its policy.
func (w *walker) base(ch *liveChain) endings {
	w.at = Step{Family: ch.table.name(), Table: ch.table.title, Chain: ch.title, Hook: hookName(ch.hook), Priority: ch.priority}
	r := w.chain(ch.table, ch.title, 0, w.sure)
	if !r.has(stateFall) {
		return r
	}
	r.by[stateFall] = nil
	w.at.Chain = ch.title
	step := w.at
	if ch.drop {
		step.Verdict = "policy drop"
		w.step(step, w.sure && r.empty())
		r.put(stateDrop, step)
	} else {
		step.Verdict = "policy accept"
		w.step(step, w.sure && r.empty())
		r.put(stateAccept, step)
	}
	return r
}

func (w *walker) step(s Step, sure bool) {
	w.steps = append(w.steps, s)
	if sure && s.Verdict == "accept" {
		w.accepted = len(w.steps)
	}
}

// journey sums up what is possible.
func (w *walker) journey(possible endings) *Journey {
	j := &Journey{Steps: w.steps, Notes: w.notes}
	j.Moved, j.Target = w.diverted()
	words := map[ending]Verdict{stateAccept: WalkAccept, stateDrop: WalkDrop, stateReject: WalkReject}
	var found []ending
	for k := range possible.by {
		if possible.by[k] != nil {
			found = append(found, ending(k))
		}
	}
	if len(found) == 1 && words[found[0]] != "" {
		j.Verdict = words[found[0]]
		j.By = *possible.by[found[0]]
	} else {
		j.Verdict = WalkUnknown
		if possible.doubt != nil {
			j.By = *possible.doubt
		} else if s := possible.by[stateUnsure]; s != nil {
			j.By = *s
		}
	}
	if j.Verdict == WalkAccept && len(w.steps) > 0 {
		j.By = w.steps[len(w.steps)-1]
		if w.accepted > 0 {
			j.By = w.steps[w.accepted-1] // a rule says more than a policy
		}
	}
	return j
}

// diverted compares the packet's destination with the one it came for.
func (w *walker) diverted() (bool, netip.AddrPort) {
	was := newPacket(w.packet)
	dst, port := w.p.dst(), w.p.transport.slice(2, 2)
	same := func(a, b bits) bool { return bytes.Equal(a.val, b.val) && bytes.Equal(a.known, b.known) }
	if same(was.dst(), dst) && (!hasPorts(w.packet.Protocol) || same(was.transport.slice(2, 2), port)) {
		return false, netip.AddrPort{}
	}
	a, ok := addressIn(dst)
	if !ok || !port.complete() || !hasPorts(w.packet.Protocol) {
		return true, netip.AddrPort{}
	}
	return true, netip.AddrPortFrom(a, be16(port.val))
}

// unwalked names the chains that the packet may meet before netfilter's hooks
// of the IP layer.
func (w *walker) unwalked() {
	for _, t := range w.rules.tables {
		for _, ch := range t.bases {
			switch {
			case t.dormant:
			case t.family == unix.NFPROTO_BRIDGE && len(t.rules[ch.title]) > 0:
				w.note(fmt.Sprintf("not walked: table bridge %s, chain %s judges frames of bridge ports", t.title, ch.title))
			case t.family == unix.NFPROTO_NETDEV && ch.hook == ingressNetdev, t.family == unix.NFPROTO_INET && ch.hook == ingressInet:
				if w.in == "" || slices.Contains(ch.devices, w.in) {
					w.note(fmt.Sprintf("not walked: table %s %s, chain %s judges what enters by %s before", t.name(), t.title, ch.title, ch.on()))
				}
			}
		}
	}
}

// Ingress hooks (NF_NETDEV_INGRESS, NF_INET_INGRESS: uapi/linux/netfilter.h).
const (
	ingressNetdev = 0
	ingressInet   = 5
)

func hookName(h uint32) string {
	switch h {
	case unix.NF_INET_PRE_ROUTING:
		return "prerouting"
	case unix.NF_INET_LOCAL_IN:
		return "input"
	case unix.NF_INET_FORWARD:
		return "forward"
	case unix.NF_INET_LOCAL_OUT:
		return "output"
	case unix.NF_INET_POST_ROUTING:
		return "postrouting"
	}
	return fmt.Sprintf("hook %d", h)
}

// maxRules bounds the work: jumps fan out, and the kernel allows many.
const maxRules = math.MaxInt32 >> 8
