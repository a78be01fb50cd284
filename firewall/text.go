package firewall

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// What the kernel holds, for people: one line in the words of the nft program.
// Nothing that is not understood is left out, and nothing that a terminal would
// obey goes through.

// maxText bounds a line: names and data in the kernel may be long.
const maxText = 4000

// ruleTextOf writes a rule of a table of any family, given the attributes of its
// NFT_MSG_NEWRULE message. A set without a name of its own is written by its
// elements, as far as elements gives them.
func ruleTextOf(family byte, attrs []byte, elements func(set string) []string) string {
	r := newRuleWords(family)
	r.elements = elements
	for _, e := range expressions(attrOf(attrs, unix.NFTA_RULE_EXPRESSIONS)) {
		r.add(e)
	}
	r.finish()
	if note := ruleNote(attrOf(attrs, unix.NFTA_RULE_USERDATA)); note != "" {
		r.say("comment %s", quoted(note))
	}
	return r.text()
}

// quoted writes a string of somebody else's.
func quoted(s string) string { return strconv.Quote(s) }

// identifier writes a name as nft does, but quotes one that nft could not read.
func identifier(s string) string {
	for i := range len(s) {
		c := s[i]
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_-./", c) >= 0) {
			return quoted(s)
		}
	}
	if s == "" {
		return quoted(s)
	}
	return s
}

// cutText keeps a line to maxText bytes.
func cutText(s string) string {
	if len(s) <= maxText {
		return s
	}
	s = s[:maxText-3]
	for len(s) > 0 && !utf8.ValidString(s[max(0, len(s)-utf8.UTFMax):]) {
		s = s[:len(s)-1]
	}
	return s + "…"
}

// loaded is what an expression has put into a register.
type loaded struct {
	text     string
	kind     kind
	size     int
	seq      int
	slot     int // the word that says it when nothing uses it
	used     bool
	mask     []byte // not yet written: the value is ANDed with it
	place    *place // of bytes of a packet
	merge    *merged
	constant []byte
	tests    string // what a comparison with it tells: "l4proto", "nfproto", "protocol"
	named    bool   // it is a yes or no with a word of its own
}

// merged is a value of which some bits were replaced.
type merged struct{ mask, xor []byte }

// head reports whether the value is only the first bytes of an address.
func (v *loaded) head() bool { return isAddress(v.kind) && v.size < v.kind.size }

func isAddress(k kind) bool {
	return k.name == kindOf(kindIPv4).name || k.name == kindOf(kindIPv6).name
}

// shown is the value where it stands for itself.
func (v *loaded) shown() string {
	switch {
	case v.constant != nil:
		return v.kind.text(v.constant)
	case v.head() && v.place != nil:
		return place{base: v.place.base, from: v.place.from, to: v.place.to}.raw()
	case v.mask != nil && v.place != nil && len(v.kind.bits) == 0:
		if part, _, ok := v.place.within(v.mask); ok {
			s, _ := part.text()
			return s
		}
	}
	if v.mask != nil {
		return v.text + " & " + v.maskText()
	}
	return v.text
}

func (v *loaded) maskText() string {
	k := v.kind
	if len(k.bits) > 0 {
		s := k.text(v.mask)
		if strings.Contains(s, ",") {
			s = "(" + strings.ReplaceAll(s, ",", " | ") + ")"
		}
		return s
	}
	if k.write != nil {
		return k.text(v.mask)
	}
	return maskKind(k).text(v.mask)
}

// maskKind writes a number where its bits count.
func maskKind(k kind) kind {
	if len(k.bits) > 0 || k.write != nil {
		return k
	}
	return kind{host: k.host, hex: k.hex}
}

// ruleWords builds the text of one rule, expression by expression.
type ruleWords struct {
	family        byte   // of the table
	link, network string // the headers as the rule has tested them: "ether", "ip", "ip6"
	protocol      byte
	words         []string
	tests         map[string]int // the word that a header makes superfluous
	regs          [16]*loaded    // by the word where they begin
	seq, consumed int
	lower         lowerBound
	elements      func(set string) []string
}

// lowerBound is a comparison that may turn out to be the first half of a range.
type lowerBound struct {
	of   *loaded
	word int
	from []byte
}

func newRuleWords(family byte) *ruleWords {
	r := &ruleWords{tests: map[string]int{}, family: family}
	switch family {
	case unix.NFPROTO_NETDEV, unix.NFPROTO_BRIDGE:
		r.link = "ether"
	case unix.NFPROTO_IPV4:
		r.network = "ip"
	case unix.NFPROTO_IPV6:
		r.network = "ip6"
	case unix.NFPROTO_ARP:
		r.network = "arp"
	}
	return r
}

func (r *ruleWords) say(format string, args ...any) int {
	r.words = append(r.words, fmt.Sprintf(format, args...))
	return len(r.words) - 1
}

func (r *ruleWords) text() string {
	var out []string
	for _, w := range r.words {
		if w != "" {
			out = append(out, w)
		}
	}
	return cutText(strings.Join(out, " "))
}

// words4 is the number of register words that n bytes take.
func words4(n int) int { return max(1, (n+3)/4) }

// load puts a value into a register.
func (r *ruleWords) load(reg uint32, v *loaded) {
	at := offset(reg)
	if at < 0 {
		r.say("[%s in register %d]", v.shown(), reg)
		return
	}
	r.seq++
	v.seq, v.slot = r.seq, r.say("")
	for i := at / 4; i < len(r.regs) && i < at/4+words4(v.size); i++ {
		r.reveal(r.regs[i])
		r.regs[i] = nil
	}
	r.regs[at/4] = v
}

// reveal writes a value that nothing used.
func (r *ruleWords) reveal(v *loaded) {
	if v != nil && !v.used {
		r.words[v.slot] = "[" + v.shown() + "]"
		v.used = true
	}
}

func (r *ruleWords) finish() {
	for _, v := range r.regs {
		r.reveal(v)
	}
}

// one gives the value that begins at a register, or nil.
func (r *ruleWords) one(reg uint32) *loaded {
	at := offset(reg)
	if at < 0 || r.regs[at/4] == nil {
		return nil
	}
	v := r.regs[at/4]
	v.used = true
	return v
}

// several gives the values that stand side by side from a register on: as many
// as n bytes take, or, below 0, all that were loaded since the last use.
func (r *ruleWords) several(reg uint32, n int) []*loaded {
	at := offset(reg)
	if at < 0 {
		return nil
	}
	var out []*loaded
	for i, left := at/4, n; i < len(r.regs) && r.regs[i] != nil; {
		v := r.regs[i]
		if len(out) > 0 && (n >= 0 && left <= 0 || n < 0 && v.seq <= r.consumed) {
			break
		}
		v.used = true
		out = append(out, v)
		i += words4(v.size)
		left -= 4 * words4(v.size)
	}
	r.consumed = r.seq
	return out
}

// key writes what a lookup takes from a register on.
func (r *ruleWords) key(reg uint32) string {
	vs := r.several(reg, -1)
	if len(vs) == 0 {
		return fmt.Sprintf("[register %d]", reg)
	}
	var out []string
	for _, v := range vs {
		out = append(out, v.shown())
	}
	return strings.Join(out, " . ")
}

// operand writes what a statement takes from a register, as the kind it makes of it.
func (r *ruleWords) operand(reg uint32, k kind) string {
	v := r.one(reg)
	if v == nil {
		return fmt.Sprintf("[register %d]", reg)
	}
	r.consumed = r.seq
	if v.constant != nil {
		if k.size > 0 && k.size < len(v.constant) {
			return k.text(v.constant[:k.size])
		}
		return k.text(v.constant)
	}
	return v.shown()
}

// set writes what a lookup looks in.
func (r *ruleWords) set(name string) string {
	const anonymous, most = "__", 40
	if r.elements == nil || !strings.HasPrefix(name, anonymous) {
		return "@" + identifier(name)
	}
	list := r.elements(name)
	if len(list) == 0 {
		return "@" + identifier(name)
	}
	if len(list) > most {
		return fmt.Sprintf("{ %s, … %d more }", strings.Join(list[:most], ", "), len(list)-most)
	}
	return "{ " + strings.Join(list, ", ") + " }"
}

// drop removes the test that a header implies.
func (r *ruleWords) drop(header string) {
	if i, ok := r.tests[header]; ok {
		r.words[i] = ""
		delete(r.tests, header)
	}
}

// unknown shows an expression as it is. It may have written any register.
func (r *ruleWords) unknown(e liveExpr) {
	r.finish()
	r.regs = [16]*loaded{}
	r.say("%s", opaque(e))
}

func opaque(e liveExpr) string { return fmt.Sprintf("[%s %s]", identifier(e.name), hexText(e.data)) }
