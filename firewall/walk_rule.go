package firewall

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// walker carries one packet through the hooks.
type walker struct {
	rules  *liveRules
	host   *hostView
	sets   elementReader
	packet rules.Packet
	in     string

	p    journeyPacket
	ct   tracking
	hk   uint32
	prio int

	sure     bool  // no earlier rule may have stopped the packet
	bound    truth // a chain of type nat has bound the flow
	rewrites int
	rewriter *Step // the first rule that may rewrite the destination
	at       Step
	steps    []Step
	accepted int // 1 + index of the last accepting rule in steps
	notes    []string
	budget   int
	err      error
}

// elementReader reads sets: one element by its key, or all of a small set.
type elementReader interface {
	element(t *liveTable, s *liveSet, key []byte) ([]byte, error)
	allElements(t *liveTable, s *liveSet) ([][]byte, error)
}

func newWalker(k *liveRules, h *hostView, p rules.Packet, sets elementReader) *walker {
	w := &walker{rules: k, host: h, sets: sets, packet: p, in: p.In, p: newPacket(p), budget: maxRules, sure: true}
	if w.in == "lo" {
		w.track() // it was tracked on its way out
	}
	return w
}

func (w *walker) note(s string) {
	if !slices.Contains(w.notes, s) {
		w.notes = append(w.notes, s)
	}
}

// enter brings the packet to a place in a hook: conntrack and NAT have their
// own places.
func (w *walker) enter(hook uint32, priority int) {
	w.hk, w.prio = hook, priority
	if w.ct == ctNone && (hook != unix.NF_INET_PRE_ROUTING || priority > priorityConntrack) {
		w.track()
	}
	w.p.nat = w.p.nat || hook != unix.NF_INET_PRE_ROUTING || priority > priorityDstNAT
}

// track lets conntrack look at the packet.
func (w *walker) track() {
	w.ct = firstState(w.packet)
	switch w.ct {
	case ctNew:
		w.p.original = w.p.flow(w.packet.Protocol)
	case ctReply:
		t := w.p.flow(w.packet.Protocol).inverse()
		for _, b := range []*bits{&t.src, &t.dst, &t.sport, &t.dport} {
			copy(b.soft, b.known)
			b.why = "the flow is not translated by NAT"
		}
		w.p.original = t
		w.p.ctMark = blank(4, "ct mark")
	case ctRelated:
		w.p.original = flowTuple{blank(16, ""), blank(16, ""), blank(2, ""), blank(2, "")}
		w.p.ctMark = blank(4, "ct mark")
	}
}

// ending is how a chain may end.
type ending uint8

const (
	stateFall ending = iota // its end, or return
	stateAccept
	stateDrop
	stateReject
	stateUnsure // something outside the rules decides
	endingKinds
)

// endings are every end that a chain may have, and the first rule that leaves a
// choice.
type endings struct {
	by    [endingKinds]*Step
	doubt *Step
}

func (r *endings) has(s ending) bool { return r.by[s] != nil }

func (r *endings) empty() bool { return r.by == [endingKinds]*Step{} }

func (r *endings) put(s ending, by Step) {
	if r.by[s] == nil {
		r.by[s] = &by
	}
}

func (r *endings) merge(o endings) {
	for s, by := range o.by {
		if by != nil && r.by[s] == nil {
			r.by[s] = by
		}
	}
	if r.doubt == nil {
		r.doubt = o.doubt
	}
}

// maxDepth is NFT_JUMP_STACK_SIZE (include/net/netfilter/nf_tables.h).
const maxDepth = 16

// chain runs the rules of a chain, in the manner of nft_do_chain
// (net/netfilter/nf_tables_core.c). Where a rule cannot be told, it goes both
// ways and keeps every end.
func (w *walker) chain(t *liveTable, title string, depth int, certain bool) endings {
	var res endings
	for _, rule := range t.rules[title] {
		w.budget--
		if depth >= maxDepth || w.budget < 0 || w.err != nil {
			w.at.Chain = title
			step := w.at
			step.Verdict, step.Text = string(WalkUnknown), "cannot tell: too many jumps"
			res.put(stateUnsure, step)
			if res.doubt == nil {
				res.doubt = &step
			}
			return res
		}
		w.at.Chain = title
		r := w.rule(t, rule, certain && res.empty())
		if r.met == no {
			continue
		}
		if r.met == maybe && r.effect() && res.doubt == nil {
			doubt := r.step
			doubt.Verdict, doubt.Text = string(WalkUnknown), "cannot tell: "+r.why+": "+doubt.Text
			res.doubt = &doubt
		}
		definite := r.met == yes
		if r.end == endNone {
			continue
		}
		for _, to := range r.ways() {
			switch to.end {
			case endNone:
				definite = false
			case endReturn:
				res.put(stateFall, r.step)
			case endAccept:
				res.put(stateAccept, r.step)
			case endDrop:
				res.put(stateDrop, r.step)
			case endReject:
				res.put(stateReject, r.step)
			case endUnsure:
				res.put(stateUnsure, r.step)
				if res.doubt == nil {
					doubt := r.step
					res.doubt = &doubt
				}
			case endJump, endGoto:
				sub := w.chain(t, to.target, depth+1, certain && r.met == yes && res.empty())
				if to.end == endJump {
					falls := sub.has(stateFall)
					sub.by[stateFall] = nil
					definite = definite && !falls
				}
				res.merge(sub)
			}
		}
		if definite {
			return res
		}
	}
	w.at.Chain = title
	res.put(stateFall, w.at)
	return res
}

// ruleEnd is what a rule does to the walk.
type ruleEnd uint8

const (
	endNone ruleEnd = iota
	endReturn
	endAccept
	endDrop
	endReject
	endJump
	endGoto
	endUnsure
	endChoice // one of several, which cannot be told
)

// way is an end of a rule, with the chain that it leads to.
type way struct {
	end    ruleEnd
	target string
}

// ways are the ends that a rule may have.
func (r *ruleRun) ways() []way {
	if r.end == endChoice {
		return r.choices
	}
	return []way{{r.end, r.target}}
}

// ruleRun is one rule at work.
type ruleRun struct {
	w       *walker
	t       *liveTable
	certain bool // the packet gets to this rule

	reg     registers
	missed  bool // a comparison failed
	doubted bool // one cannot be told
	guessed bool // one failed by an assumption
	assumes []string
	why     string // the first thing that cannot be told
	words   []string

	met     truth
	end     ruleEnd
	target  string
	choices []way // of endChoice
	rewrite bool
	touched bool // a statement would change the packet or its fate
	step    Step
}

func (r *ruleRun) effect() bool { return r.end != endNone || r.rewrite }

// over reports whether nothing after this expression counts.
func (r *ruleRun) over() bool { return r.missed || r.end != endNone }

// meet takes the answer of a comparison. soft: it rests on an assumption, which
// why names; of maybe, why says what it hinges on.
func (r *ruleRun) meet(t truth, soft bool, why string) {
	switch {
	case t == no && !soft:
		r.missed = true
	case t == no:
		r.guessed = true
	case t == maybe:
		r.doubted = true
		if r.why == "" {
			r.why = why
		}
	}
	if t != maybe && soft && !slices.Contains(r.assumes, why) {
		r.assumes = append(r.assumes, why)
	}
}

// acts reports whether statements take hold, as far as the rule has been read.
func (r *ruleRun) acts() bool { r.touched = true; return !r.guessed }

// sure reports whether a statement takes hold without doubt.
func (r *ruleRun) sure() bool { return r.certain && !r.doubted }

func (r *ruleRun) say(format string, args ...any) {
	r.words = append(r.words, fmt.Sprintf(format, args...))
}

// rule evaluates one rule.
func (w *walker) rule(t *liveTable, rule *liveRule, certain bool) *ruleRun {
	r := &ruleRun{w: w, t: t, certain: certain, reg: newRegisters()}
	for _, e := range rule.exprs {
		r.eval(e)
		if r.over() {
			break
		}
	}
	if r.touched && !r.missed {
		for _, a := range r.assumes {
			w.note("assumed: " + a)
		}
	}
	switch {
	case r.missed || r.guessed:
		r.met = no
		return r
	case r.doubted:
		r.met = maybe
	default:
		r.met = yes
	}
	r.step = w.at
	r.step.Handle, r.step.Comment = rule.handle, rule.comment
	r.step.Text = r.text()
	r.step.Verdict = r.verdict()
	if r.rewrite && w.rewriter == nil {
		step := r.step
		w.rewriter = &step
	}
	if r.effect() {
		shown := r.step
		if r.met == maybe {
			shown.Verdict, shown.Text = string(WalkUnknown), "cannot tell: "+r.why+": "+shown.Text
		}
		w.step(shown, certain && r.met == yes)
	}
	return r
}

// text leaves out, like nft, the tests that a field implies.
func (r *ruleRun) text() string {
	var out []string
	for _, word := range r.words {
		implied := ""
		switch test, value, _ := strings.Cut(word, " "); {
		case test != "meta":
		case strings.HasPrefix(value, "l4proto "):
			implied = strings.TrimPrefix(value, "l4proto ") + " "
		case value == "nfproto ipv4":
			implied = "ip "
		case value == "nfproto ipv6":
			implied = "ip6 "
		}
		if implied == "" || !slices.ContainsFunc(r.words, func(s string) bool { return strings.HasPrefix(s, implied) }) {
			out = append(out, word)
		}
	}
	return strings.Join(out, " ")
}

func (r *ruleRun) verdict() string {
	switch r.end {
	case endReturn:
		return "return"
	case endAccept:
		if r.rewrite {
			return "rewrite"
		}
		return "accept"
	case endDrop:
		return "drop"
	case endReject:
		return "reject"
	case endJump:
		return "jump " + r.target
	case endGoto:
		return "goto " + r.target
	case endUnsure, endChoice:
		return string(WalkUnknown)
	}
	if r.rewrite {
		return "rewrite"
	}
	return "continue"
}

// setVerdict takes a verdict of the kernel (enum nft_verdicts,
// uapi/linux/netfilter.h).
func (r *ruleRun) setVerdict(code int32, target string) {
	switch code {
	case unix.NFT_CONTINUE:
		return
	case unix.NFT_BREAK:
		r.missed = true
		return
	}
	if !r.acts() {
		return
	}
	r.target = target
	switch code {
	case unix.NFT_RETURN:
		r.end = endReturn
	case unix.NFT_JUMP:
		r.end = endJump
		r.say("jump %s", target)
	case unix.NFT_GOTO:
		r.end = endGoto
		r.say("goto %s", target)
	case verdictAccept:
		r.end = endAccept
		r.say("accept")
	case verdictDrop:
		r.end = endDrop
		r.say("drop")
	default:
		r.outside(fmt.Sprintf("verdict %d", code))
	}
}

// outside ends the rule with something that the ruleset does not say.
func (r *ruleRun) outside(what string) {
	if !r.acts() {
		return
	}
	r.end = endUnsure
	r.say("cannot tell: %s", what)
}

// registers are the 16 words of data that expressions share (struct nft_regs).
type registers struct {
	data  bits
	label [16]bits // about, why and kind of what starts at a word
}

func newRegisters() registers { return registers{data: blank(64, "")} }

// offset turns a register number into a place: NFT_REG_1 to 4 are of 16 bytes,
// NFT_REG32_00 and up of 4.
func offset(reg uint32) int {
	switch {
	case reg >= unix.NFT_REG_1 && reg <= unix.NFT_REG_4:
		return int(reg-unix.NFT_REG_1) * 16
	case reg >= unix.NFT_REG32_00 && reg <= unix.NFT_REG32_15:
		return int(reg-unix.NFT_REG32_00) * 4
	}
	return -1
}

func (g *registers) set(reg uint32, b bits) {
	at := offset(reg)
	if at < 0 {
		return
	}
	g.data.put(at, b, true)
	if tail := len(b.val) % 4; tail != 0 { // the kernel clears the rest of the word
		g.data.put(at+len(b.val), sure(make([]byte, 4-tail), "", asNumber), true)
	}
	g.label[at/4] = bits{about: b.about, why: b.why, kind: b.kind}
}

func (g *registers) get(reg uint32, n int) bits {
	at := offset(reg)
	if at < 0 || n < 0 || n > 64 {
		return blank(max(0, min(n, 64)), "")
	}
	b := g.data.slice(at, n)
	l := g.label[at/4]
	b.about, b.why, b.kind = l.about, l.why, l.kind
	for i := at/4 + 1; i < 16 && i*4 < at+n; i++ { // of a concatenation
		switch {
		case g.label[i].about == "":
		default:
			b.about += " . " + g.label[i].about
			b.kind = asNumber
		}
		if b.why == "" {
			b.why = g.label[i].why
		}
	}
	return b
}

// forget makes every register unknown: an expression that is not understood may
// have written any of them.
func (g *registers) forget() { *g = newRegisters() }

// Netfilter verdicts (uapi/linux/netfilter.h).
const (
	verdictDrop   = 0
	verdictAccept = 1
)
