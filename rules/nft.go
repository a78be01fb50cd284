package rules

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"time"
)

// WriteNFT writes the table as nft text that replaces whatever table of that
// name is loaded: for reading, for `nft -c -f` and for review in a diff. The
// product itself never runs nft. Chains come first, because nft 1.0.6 wants
// them declared before a map that jumps to them.
//
// Openings that expire are written with the time that is left at now.
func (t *Table) WriteNFT(w io.Writer, now time.Time) error {
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "table inet %s\ndelete table inet %s\n\ntable inet %s {\n\tcomment %q\n", t.Name, t.Name, t.Name, t.Comment)
	for _, c := range t.Counters {
		fmt.Fprintf(b, "\n\tcounter %s {\n\t}\n", c)
	}
	for _, l := range t.Limits {
		fmt.Fprintf(b, "\n\tlimit %s {\n\t\trate %s\n\t}\n", l.Name, l.Rate.nft())
	}
	for i := range t.Chains {
		t.Chains[i].write(b)
	}
	for i := range t.Sets {
		t.Sets[i].write(b, now)
	}
	fmt.Fprintln(b, "}")
	return b.Flush()
}

func (c *Chain) write(b *bufio.Writer) {
	fmt.Fprintf(b, "\n\tchain %s {\n", c.Name)
	if c.Base != nil {
		policy := "drop"
		if c.Base.Accept {
			policy = "accept"
		}
		fmt.Fprintf(b, "\t\ttype filter hook %s priority %d; policy %s;\n", c.Base.Hook, c.Base.Priority, policy)
	}
	for _, r := range c.Rules {
		fmt.Fprintf(b, "\t\t%s\n", r.NFT())
	}
	fmt.Fprintln(b, "\t}")
}

// NFT gives the rule as one line of nft text.
func (r Rule) NFT() string {
	var words []string
	for _, e := range r.Exprs {
		words = append(words, e.nft())
	}
	if r.Comment != "" {
		words = append(words, "comment "+nftString(r.Comment))
	}
	return strings.Join(words, " ")
}

func (s *Set) write(b *bufio.Writer, now time.Time) {
	kind, typ := "set", s.Type.String()
	if s.Targets != nil {
		kind, typ = "map", typ+" : verdict"
	}
	fmt.Fprintf(b, "\n\t%s %s {\n\t\ttype %s\n", kind, s.Name, typ)
	if n := s.Size(); n > 0 {
		fmt.Fprintf(b, "\t\tsize %d\n", n)
	}
	if flags := s.flags(); len(flags) > 0 {
		fmt.Fprintf(b, "\t\tflags %s\n", strings.Join(flags, ","))
	}
	if s.MeterTimeout > 0 {
		fmt.Fprintf(b, "\t\ttimeout %ds\n", seconds(s.MeterTimeout))
	}
	if left := s.Left(now); s.Len() > 0 && left != 0 {
		s.writeElements(b, now)
	}
	fmt.Fprintf(b, "\t}\n")
}

func (s *Set) writeElements(b *bufio.Writer, now time.Time) {
	fmt.Fprintf(b, "\t\telements = {")
	sep := " "
	for i, e := range s.Elements() {
		left := s.Left(now)
		if s.Bans != nil {
			left = s.Bans[i].Left(now)
		}
		fmt.Fprint(b, sep, e)
		if left > 0 {
			fmt.Fprintf(b, " timeout %ds", seconds(left))
		}
		if s.Targets != nil {
			fmt.Fprint(b, " : jump ", s.Targets[i])
		}
		sep = ", "
		if i%8 == 7 {
			sep = ",\n\t\t\t"
		}
	}
	fmt.Fprintf(b, " }\n")
}

// flags are the nft flags of the set.
func (s *Set) flags() []string {
	var out []string
	if s.Interval {
		out = append(out, "interval")
	}
	if s.Meter {
		out = append(out, "dynamic")
	}
	if s.Timed() {
		out = append(out, "timeout")
	}
	return out
}

// Left is how long the elements have to live at now: 0 when their time is over,
// negative when they stay for ever.
func (s *Set) Left(now time.Time) time.Duration { return leftUntil(s.Until, now) }

// Left is how long a ban has to last at now: 0 when its time is over, negative when
// it stays for ever.
func (b *Ban) Left(now time.Time) time.Duration { return leftUntil(b.Expires, now) }

// Timed reports whether elements of the set can vanish by themselves.
func (s *Set) Timed() bool { return s.MeterTimeout > 0 || !s.Until.IsZero() || s.Bans != nil }

func leftUntil(end, now time.Time) time.Duration {
	if end.IsZero() {
		return -1
	}
	left := end.Sub(now)
	if left > farAway {
		return -1
	}
	return max(left, 0)
}

// farAway is as good as never, and within what a duration holds.
const farAway = 200 * 365 * 24 * time.Hour

// longestTimeout is what nft 1.0.6 surely reads; more it calls too large.
const longestTimeout = 365 * 24 * time.Hour

// seconds rounds up: an opening may end late by less than a second.
func seconds(d time.Duration) int64 {
	return int64((min(d, longestTimeout) + time.Second - 1) / time.Second)
}

// Elements gives the set's elements as nft writes them.
func (s *Set) Elements() []string {
	var out []string
	for _, p := range s.Ports {
		out = append(out, p.String())
	}
	for a := range s.Addrs.All() {
		if !s.Interval {
			a.Hi = a.Lo // of a prefix the key is its first address
		}
		out = append(out, a.String())
	}
	for i := range s.Bans {
		out = append(out, s.Bans[i].Addr.String())
	}
	for _, n := range s.Names {
		out = append(out, nftString(n))
	}
	for _, c := range s.Codes {
		switch {
		case s.Type == TypeNfproto && c == NfprotoIPv4:
			out = append(out, "ipv4")
		case s.Type == TypeNfproto:
			out = append(out, "ipv6")
		default:
			out = append(out, fmt.Sprint(c))
		}
	}
	return out
}

// String writes an address, the prefix that is exactly the range, or "lo-hi".
func (r AddrRange) String() string {
	if r.Lo == r.Hi {
		return r.Lo.String()
	}
	if p, ok := r.Prefix(); ok {
		return p.String()
	}
	return r.Lo.String() + "-" + r.Hi.String()
}

// nftString writes an nft string: nft knows no escapes, so what could end one is
// left out. Policy strings hold no control characters.
func nftString(s string) string { return `"` + strings.ReplaceAll(s, `"`, "'") + `"` }

func (m Match) nft() string {
	not := ""
	if m.Not {
		not = "!= "
	}
	switch m.Field {
	case TCPFlags:
		return fmt.Sprintf("%s & (fin | syn | rst | ack) %s%s", m.Field, not, map[uint32]string{FlagSYN: "syn"}[m.Number])
	case MetaIifname, MetaOifname, FibDaddrOifname, MetaSkuid, MetaSkgid:
		return fmt.Sprintf("%s %s%s", m.Field, not, nftString(m.Name))
	case IPSaddr, IPDaddr, IP6Saddr, IP6Daddr:
		if m.Prefix.IsSingleIP() {
			return fmt.Sprintf("%s %s", m.Field, m.Prefix.Addr())
		}
		return fmt.Sprintf("%s %s", m.Field, m.Prefix)
	case MetaNfproto:
		return fmt.Sprintf("%s %s", m.Field, map[uint32]string{NfprotoIPv4: "ipv4", NfprotoIPv6: "ipv6"}[m.Number])
	case CtDirection:
		return fmt.Sprintf("%s %s", m.Field, [...]string{"original", "reply"}[m.Number])
	case CtState:
		return fmt.Sprintf("%s %s", m.Field, map[uint32]string{
			StateInvalid: "invalid", StateEstablished: "established", StateRelated: "related", StateNew: "new", StateUntracked: "untracked"}[m.Number])
	case CtStatus:
		return fmt.Sprintf("%s %s", m.Field, map[uint32]string{StatusDNAT: "dnat"}[m.Number])
	case FibDaddrType:
		return fmt.Sprintf("%s %s", m.Field, map[uint32]string{
			AddrUnicast: "unicast", AddrLocal: "local", AddrBroadcast: "broadcast", AddrAnycast: "anycast", AddrMulticast: "multicast"}[m.Number])
	}
	return fmt.Sprintf("%s %d", m.Field, m.Number)
}

func (m MatchSet) nft() string {
	left, op := m.Field.String(), ""
	if m.Bits > 0 {
		left += " & " + netmask(m.Field == IPSaddr || m.Field == IPDaddr || m.Field == CtOriginalIPDaddr, m.Bits).String()
		op = "== " // nft writes it only here
	}
	if m.Not {
		op = "!= "
	}
	return fmt.Sprintf("%s %s@%s", left, op, m.Set)
}

func (m VerdictMap) nft() string { return fmt.Sprintf("%s vmap @%s", m.Field, m.Map) }

func (m MeterAdd) nft() string {
	key := m.Field.String()
	if m.Field == IP6Saddr {
		key += " and ffff:ffff:ffff:ffff::"
	}
	if m.Rate != nil {
		return fmt.Sprintf("update @%s { %s limit rate %s }", m.Set, key, m.Rate.nft())
	}
	return fmt.Sprintf("add @%s { %s ct count %d }", m.Set, key, m.Connections)
}

func (t Tally) nft() string {
	key := make([]string, len(t.Key))
	for i, f := range t.Key {
		key[i] = f.String()
	}
	return fmt.Sprintf("update @%s { %s counter }", t.Set, strings.Join(key, " . "))
}

// nft writes "10/minute burst 5 packets".
func (r Rate) nft() string {
	unit := map[time.Duration]string{time.Second: "second", time.Minute: "minute", time.Hour: "hour", 24 * time.Hour: "day"}[r.Per]
	return fmt.Sprintf("%d/%s burst %d packets", r.Limit, unit, r.Burst)
}

func (l WithinLimit) nft() string { return fmt.Sprintf("limit name %q", l.Limit) }

func (l WithinRate) nft() string { return "limit rate " + l.Rate.nft() }

func (l LogPacket) nft() string {
	if l.Group != nil {
		return fmt.Sprintf("log prefix %s group %d", nftString(l.Prefix), *l.Group)
	}
	return "log prefix " + nftString(l.Prefix)
}

func (c Count) nft() string { return fmt.Sprintf("counter name %q", c.Counter) }

func (r RejectWith) nft() string {
	if r.TCPReset {
		return "reject with tcp reset"
	}
	return "reject with icmpx type admin-prohibited"
}

func (v Verdict) nft() string {
	switch v.Kind {
	case VerdictAccept:
		return "accept"
	case VerdictDrop:
		return "drop"
	case VerdictReturn:
		return "return"
	case VerdictJump:
		return "jump " + v.Chain
	}
	return "goto " + v.Chain
}
