package rules

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Temporary is a rule that stands beside a policy for some time, in no file: an
// opening of one port, or a block of addresses.
type Temporary struct {
	Name  string `json:"name"`
	Block bool   `json:"block,omitempty"`
	// Protocol and Port are of an opening; a block takes all of them.
	Protocol  Protocol    `json:"protocol,omitempty"`
	Port      uint16      `json:"port,omitempty"`
	From      []AddrRange `json:"from,omitempty"` // as of [Source.Ranges]; an opening without is for everyone
	Interface string      `json:"interface,omitempty"`
	Expires   time.Time   `json:"expires,omitzero"` // zero: not by itself
	Comment   string      `json:"comment,omitempty"`
}

// Mistake says what is wrong with a value that was not written in a policy.
type Mistake struct{ Summary, Hint string }

func (m *Mistake) Error() string { return m.Summary }

func mistake(c *complaint) error {
	if c == nil {
		return nil
	}
	return &Mistake{c.summary, c.hint}
}

// ParseAddresses reads an address, a network or a range as the policy writes them.
// Its errors are [*Mistake].
func ParseAddresses(s string) (AddrRange, error) {
	if strings.HasPrefix(s, "@") {
		return AddrRange{}, &Mistake{quote(s) + " is a set, not an address", addressHint}
	}
	r, bad := parseAddresses(s)
	if bad != nil && !strings.HasPrefix(bad.hint, "did you mean") && bad.hint != nameHint {
		bad.hint = addressHint // the others are about keys of a policy
	}
	return r, mistake(bad)
}

// Check says what is wrong with the words of a rule. Its error is a [*Mistake].
func (t *Temporary) Check() error {
	if t.Interface != "" {
		if bad := checkInterface(t.Interface); bad != nil {
			if strings.Contains(t.Interface, ",") {
				bad.hint = "one interface at a time"
			}
			return mistake(bad)
		}
	}
	return mistake(checkComment(t.Comment))
}

// checkComment says what is wrong with a comment.
func checkComment(s string) *complaint {
	if len(s) > maxComment {
		return &complaint{fmt.Sprintf("comment is %d bytes long", len(s)), fmt.Sprintf("%d bytes at most", maxComment)}
	}
	if !utf8.ValidString(s) {
		return &complaint{"comment is not UTF-8", "write it as one line of plain text"}
	}
	for _, c := range s {
		// Bidirectional controls make text look like what it is not.
		if unicode.IsControl(c) || unicode.Is(unicode.Bidi_Control, c) {
			return &complaint{fmt.Sprintf("comment holds the control character U+%04X", c), "write it as one line of plain text"}
		}
	}
	return nil
}

// Over reports whether a rule has ended by itself.
func (t *Temporary) Over(now time.Time) bool { return !t.Expires.IsZero() && !now.Before(t.Expires) }

// Same reports whether two are about the same packets.
func (t *Temporary) Same(o *Temporary) bool {
	return t.Block == o.Block && t.Protocol == o.Protocol && t.Port == o.Port && t.Interface == o.Interface && slices.Equal(t.From, o.From)
}

// bans is the name of the block that all temporary ones of single addresses are.
const bans = "tmp-hosts"

// IsBan reports whether a rule blocks a single address: it is then an element beside
// others of the sets of one block, however many there are.
func (t *Temporary) IsBan() bool {
	return t.Block && t.Interface == "" && len(t.From) == 1 && t.From[0].Lo == t.From[0].Hi
}

// BanSet names the set of the table that holds a ban.
func (t *Temporary) BanSet() string { return banSetName(t.Chain(), t.From[0].Lo.Is4()) }

func banSetName(chain string, v4 bool) string { return chain + "_from" + familySuffix(v4) }

// banSet makes the set of the bans of a family, which is there also when it is empty:
// another ban then changes nothing but elements.
func banSet(chain string, v4 bool, list []Ban) Set {
	s := Set{Name: banSetName(chain, v4), Type: TypeIPv6, Bans: []Ban{}}
	if v4 {
		s.Type = TypeIPv4
	}
	for _, b := range list {
		if b.Addr.Is4() == v4 {
			s.Bans = append(s.Bans, b)
		}
	}
	return s
}

// bansOf is the block that bans are: each address once, with its latest end.
func bansOf(name string, list []Temporary) Block {
	t := Traffic{Name: name, Any: true, To: Source{Any: true}, Bans: []Ban{}}
	for i := range list {
		if x := &list[i]; x.IsBan() {
			t.Bans = append(t.Bans, Ban{x.From[0].Lo, x.Expires})
			t.From.Ranges = append(t.From.Ranges, x.From[0])
		}
	}
	slices.SortFunc(t.Bans, func(a, b Ban) int {
		switch c := a.Addr.Compare(b.Addr); {
		case c != 0:
			return c
		case a.Expires.IsZero() != b.Expires.IsZero():
			if a.Expires.IsZero() {
				return -1
			}
			return 1
		}
		return b.Expires.Compare(a.Expires)
	})
	t.Bans = slices.CompactFunc(t.Bans, func(a, b Ban) bool { return a.Addr == b.Addr })
	t.From.Ranges = mergeAddrs(t.From.Ranges)
	return Block{t}
}

// Chain names the chain that the rule has in the table.
func (t *Temporary) Chain() string {
	if t.Block {
		return "block_" + t.Name
	}
	return "open_" + t.Name
}

// UntilSet names the set of the table whose elements end the rule.
func (t *Temporary) UntilSet() string { return t.Chain() + untilEnd }

const untilEnd = "_until"

// What says in words what the rule is about: "8443/tcp from 198.51.100.7".
func (t *Temporary) What() string {
	from := Source{Ranges: t.From}
	if t.Block {
		return from.String()
	}
	out := PortName(t.Protocol, t.Port) + " from "
	if t.From == nil {
		from.Any = true
	}
	out += from.String()
	if t.Interface != "" {
		out += " by " + t.Interface
	}
	return out
}

// traffic is the rule as a table of the policy.
func (t *Temporary) traffic() Traffic {
	out := Traffic{
		Name: t.Name, Any: t.Block, From: Source{Any: len(t.From) == 0, Ranges: mergeAddrs(t.From)}, To: Source{Any: true},
		Expires: t.Expires, Comment: t.Comment,
	}
	if !t.Block {
		out.On = []ProtoPorts{{Protocol: t.Protocol, Ports: []PortRange{{t.Port, t.Port}}}}
	}
	if t.Interface != "" {
		out.Interfaces = []string{t.Interface}
	}
	return out
}

// word is what the name of the rule is made of.
func (t *Temporary) word() string {
	s := fmt.Sprintf("%d-%s", t.Port, t.Protocol)
	if t.Block && len(t.From) > 0 {
		s = t.From[0].String()
	}
	const most = 40 // leaves room for a number
	s = "tmp-" + strings.Map(func(c rune) rune {
		if isTableName("a" + string(c)) {
			return c
		}
		return '-'
	}, s)
	return s[:min(len(s), most)]
}

// With is the policy with temporary rules behind its own; they have no place in a
// file. A rule without a name, or with one that the policy or another has, gets
// one; bans share theirs. What it gives second are the rules as they are named.
func (p *Policy) With(list []Temporary) (*Policy, []Temporary) {
	if len(list) == 0 {
		return p, nil
	}
	taken := map[string]bool{}
	for i := range p.Open {
		taken[p.Open[i].Name] = true
	}
	for i := range p.Block {
		taken[p.Block[i].Name] = true
	}
	out := *p
	out.Open, out.Block = slices.Clone(p.Open), slices.Clone(p.Block)
	list = slices.Clone(list)
	hosts := ""
	for i := range list {
		t := &list[i]
		if t.IsBan() {
			hosts = bans
			continue
		}
		base := t.word()
		if t.Name == "" || taken[t.Name] {
			t.Name = base
		}
		for n := 2; taken[t.Name]; n++ {
			t.Name = fmt.Sprintf("%s-%d", base, n)
		}
		taken[t.Name] = true
	}
	if hosts != "" {
		for n := 2; taken[hosts]; n++ {
			hosts = fmt.Sprintf("%s-%d", bans, n)
		}
		out.Block = append(out.Block, bansOf(hosts, list))
	}
	for i := range list {
		switch t := &list[i]; {
		case t.IsBan():
			t.Name = hosts
		case t.Block:
			out.Block = append(out.Block, Block{t.traffic()})
		default:
			out.Open = append(out.Open, Open{Traffic: t.traffic()})
		}
	}
	return &out, list
}
