package firewall

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// What the chains of others can do, read from their rules without a packet.

// chainEffects are what the rules that a base chain leads to can do; each holds the
// first rule that does.
type chainEffects struct {
	stops   *liveRule // drop, reject, a program decides
	moves   *liveRule // writes an address, a port or the protocol
	untrack *liveRule
	nat     *liveRule // dnat, redirect
	proxy   *liveRule // tproxy, synproxy
	queue   *liveRule
	forward *liveRule // fwd
	copy    *liveRule // dup
	offload *liveRule // flow add
}

// reached gives the chains that a base chain leads to, itself first. Where a map
// holds the verdicts, every chain of the table may be next.
func (t *liveTable) reached(base string) []string {
	out := []string{base}
	for i := 0; i < len(out); i++ {
		for _, r := range t.rules[out[i]] {
			for _, e := range r.exprs {
				next := jump(e)
				if next == nil && verdictLookup(e) {
					for _, chain := range sortedKeys(t.rules) {
						if !slices.ContainsFunc(t.bases, func(b *liveChain) bool { return b.title == chain }) {
							next = append(next, chain)
						}
					}
				}
				for _, chain := range next {
					if !slices.Contains(out, chain) {
						out = append(out, chain)
					}
				}
			}
		}
	}
	return out
}

func (t *liveTable) reaches(base, chain string) bool {
	return slices.Contains(t.reached(base), chain)
}

// jump gives the chain that an expression names.
func jump(e liveExpr) []string {
	if e.name != "immediate" {
		return nil
	}
	v := attrOf(attrOf(e.data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
	if chain := attrText(v, unix.NFTA_VERDICT_CHAIN); chain != "" {
		return []string{chain}
	}
	return nil
}

func verdictLookup(e liveExpr) bool {
	dreg := attrOf(e.data, unix.NFTA_LOOKUP_DREG)
	return e.name == "lookup" && dreg != nil && be32(dreg) == unix.NFT_REG_VERDICT
}

// effects reads the rules that a base chain leads to.
func (ch *liveChain) effects() chainEffects {
	var out chainEffects
	put := func(into **liveRule, r *liveRule) {
		if *into == nil {
			*into = r
		}
	}
	for _, chain := range ch.table.reached(ch.title) {
		for _, r := range ch.table.rules[chain] {
			for i, e := range r.exprs {
				switch e.name {
				case "immediate":
					v := attrOf(attrOf(e.data, unix.NFTA_IMMEDIATE_DATA), unix.NFTA_DATA_VERDICT)
					if code := attrOf(v, unix.NFTA_VERDICT_CODE); len(code) >= 4 && be32(code) == verdictDrop {
						put(&out.stops, r)
					}
				case "lookup":
					if verdictLookup(e) { // what its elements say is not read
						put(&out.stops, r)
					}
				case "reject":
					put(&out.stops, r)
				case "queue":
					put(&out.queue, r)
				case "payload":
					if moves(r.exprs[:i], e.data, ch.table.family) {
						put(&out.moves, r)
					}
				case "notrack":
					put(&out.untrack, r)
				case "redir":
					put(&out.nat, r)
				case "nat":
					if attrNumber(e.data, unix.NFTA_NAT_TYPE) == unix.NFT_NAT_DNAT {
						put(&out.nat, r)
					}
				case "tproxy", "synproxy":
					put(&out.proxy, r)
				case "fwd":
					put(&out.forward, r)
				case "dup":
					put(&out.copy, r)
				case "flow_offload":
					put(&out.offload, r)
				case "target":
					switch attrText(e.data, unix.NFTA_TARGET_NAME) {
					case "REJECT", "DROP":
						put(&out.stops, r)
					case "", "standard":
						if info := attrOf(e.data, unix.NFTA_TARGET_INFO); len(info) >= 4 && int32(binary.NativeEndian.Uint32(info)) == -verdictDrop-1 {
							put(&out.stops, r)
						}
					case "NFQUEUE":
						put(&out.queue, r)
					case "NOTRACK":
						put(&out.untrack, r)
					case "CT": // struct xt_ct_target_info: flags, of which XT_CT_NOTRACK is the first
						if info := attrOf(e.data, unix.NFTA_TARGET_INFO); len(info) >= 2 && binary.NativeEndian.Uint16(info)&1 != 0 {
							put(&out.untrack, r)
						}
					case "DNAT", "REDIRECT", "NETMAP":
						put(&out.nat, r)
					case "TPROXY", "SYNPROXY":
						put(&out.proxy, r)
					case "TEE":
						put(&out.copy, r)
					}
				}
			}
		}
	}
	return out
}

// moves reports whether a payload expression writes addresses, ports or the
// protocol.
func moves(before []liveExpr, data []byte, family byte) bool {
	if attrOf(data, unix.NFTA_PAYLOAD_SREG) == nil {
		return false
	}
	base, at, n := attrNumber(data, unix.NFTA_PAYLOAD_BASE), attrNumber(data, unix.NFTA_PAYLOAD_OFFSET), attrNumber(data, unix.NFTA_PAYLOAD_LEN)
	kept := keptBytes(before, base, at, n)
	writes := func(lo, hi uint32) bool {
		for i := max(lo, at); i < min(hi, at+n); i++ {
			if !kept[i] {
				return true
			}
		}
		return false
	}
	switch base {
	case unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		return writes(0, 4)
	case unix.NFT_PAYLOAD_NETWORK_HEADER:
		v4, v6 := writes(ip4Protocol, ip4Protocol+1) || writes(ip4Src, ip4Dst+4), writes(ip6Next, ip6Next+1) || writes(ip6Src, ip6Dst+16)
		switch family {
		case unix.NFPROTO_IPV4:
			return v4
		case unix.NFPROTO_IPV6:
			return v6
		}
		return v4 || v6
	}
	return true // the link header, or what cannot be placed
}

// keptBytes are those that a write puts back as they were: nft reads two bytes,
// masks one of them and writes both, since checksums go by pairs.
func keptBytes(before []liveExpr, base, at, n uint32) map[uint32]bool {
	out := map[uint32]bool{}
	if len(before) < 2 {
		return out
	}
	read, masked := before[len(before)-2], before[len(before)-1]
	if read.name != "payload" || masked.name != "bitwise" || attrOf(read.data, unix.NFTA_PAYLOAD_DREG) == nil ||
		attrNumber(read.data, unix.NFTA_PAYLOAD_BASE) != base || attrNumber(read.data, unix.NFTA_PAYLOAD_OFFSET) != at {
		return out
	}
	mask, xor := dataValue(masked.data, unix.NFTA_BITWISE_MASK), dataValue(masked.data, unix.NFTA_BITWISE_XOR)
	for i := range min(len(mask), len(xor), int(n)) {
		out[at+uint32(i)] = mask[i] == 0xff && xor[i] == 0
	}
	return out
}

// namedPorts are the numbers of two bytes that foreign rules and sets name, and
// what follows them: where a verdict may change within a range of ports.
func (k *liveRules) namedPorts(sets elementReader) ([]uint16, error) {
	var out []uint16
	add := func(v []byte) {
		if len(v) == 2 {
			n := be16(v)
			out = append(out, n, n+1)
		}
	}
	for _, t := range k.tables {
		for _, list := range t.rules {
			for _, r := range list {
				for _, e := range r.exprs {
					switch e.name {
					case "cmp":
						add(dataValue(e.data, unix.NFTA_CMP_DATA))
					case "range":
						add(dataValue(e.data, unix.NFTA_RANGE_FROM_DATA))
						add(dataValue(e.data, unix.NFTA_RANGE_TO_DATA))
					case "match":
						info, from, to := attrOf(e.data, unix.NFTA_MATCH_INFO), 0, 0
						switch attrText(e.data, unix.NFTA_MATCH_NAME) {
						case "multiport":
							from, to = 2, 32
						case "tcp", "udp": // ends of the source ports, then of the others (struct xt_tcp, xt_udp)
							from, to = 0, 8
						}
						for i := from; i < to && len(info) >= to; i += 2 {
							add(binary.BigEndian.AppendUint16(nil, binary.NativeEndian.Uint16(info[i:])))
						}
					}
				}
			}
		}
		for _, name := range sortedKeys(t.sets) {
			set := t.sets[name]
			if set.keyLen != 2 && !slices.Contains(set.fields, 2) {
				continue
			}
			all, err := sets.allElements(t, set)
			if err != nil {
				return nil, err
			}
			for _, el := range all {
				for _, end := range []uint16{unix.NFTA_SET_ELEM_KEY, walkElemKeyEnd} {
					for _, part := range set.parts(dataValue(el, end)) {
						add(part)
					}
				}
			}
		}
	}
	slices.Sort(out)
	return slices.DeleteFunc(slices.Compact(out), func(n uint16) bool { return n == 0 }), nil
}

// parts takes the key of a concatenation apart: each begins at a register.
func (s *liveSet) parts(key []byte) [][]byte {
	if len(s.fields) == 0 {
		return [][]byte{key}
	}
	var out [][]byte
	at := 0
	for _, n := range s.fields {
		if n <= 0 || at+n > len(key) {
			break
		}
		out = append(out, key[at:at+n])
		at += (n + 3) &^ 3
	}
	return out
}

// gatePriority is where Deadlight's gate stands at prerouting.
const gatePriority = priorityDstNAT - 10

// ahead reports whether a base chain sees packets before the gate does.
func (ch *liveChain) ahead() bool {
	switch {
	case ch.early():
		return true
	case ch.typ == "nat": // they run together, at their own place
		return false
	}
	return ch.table.judges() && ch.hook == unix.NF_INET_PRE_ROUTING && ch.priority <= gatePriority
}

// leaving reports whether a base chain sees what this host sends.
func (ch *liveChain) leaving() bool {
	if ch.table.family == unix.NFPROTO_NETDEV {
		return ch.hook != ingressNetdev
	}
	return ch.table.judges() && (ch.hook == unix.NF_INET_LOCAL_OUT || ch.hook == unix.NF_INET_POST_ROUTING)
}

func (ch *liveChain) onward() bool { return ch.table.judges() && ch.hook == unix.NF_INET_FORWARD }

// ruleName writes a rule in the words of nft.
func (t *liveTable) ruleName(r *liveRule) string {
	words := newRuleWords(t.family)
	for _, e := range r.exprs {
		words.add(e)
	}
	words.finish()
	if r.comment != "" {
		words.say("comment %s", quoted(r.comment))
	}
	return fmt.Sprintf("%s (handle %d)", words.text(), r.handle)
}

// scan lists what a base chain can do. What the trial has found of it is not
// said again.
func (f *findings) scan(ch *liveChain, tried bool) {
	t, e := ch.table, ch.effects()
	list := func(s Severity, kind string, r *liveRule, fact, advice string) {
		i := Interference{Severity: s, Kind: kind, Where: t.where(ch.title), Fact: fact, Advice: advice}
		if r != nil {
			i.Rule = t.ruleName(r)
			if advice == "" {
				i.Advice = t.remedy(ch.title, r.handle)
			}
		}
		f.add(i)
	}
	looked := fmt.Sprintf("Look whether it is meant: nft -a list chain %s.", strings.Replace(strings.TrimPrefix(t.where(ch.title), "table "), ", chain", "", 1))
	if r := e.moves; r != nil {
		switch {
		case ch.leaving():
			list(May, "rewrite", r, "It writes addresses or ports of packets that leave: answers may not reach whom they are for.", looked)
		case ch.ahead():
			list(Breaks, "rewrite", r, "It writes addresses or ports before the policy judges: a closed port can be reached through an open one.",
				"Use a nat chain, which runs after the policy has judged, or remove the rule.")
		default:
			list(May, "rewrite", r, "It writes addresses or ports after the policy has judged: who is admitted to one port may reach another.", looked)
		}
	}
	if r := e.untrack; r != nil && (ch.ahead() || ch.leaving()) && ch.priority < priorityConntrack {
		list(May, "notrack", r, "It hides packets from connection tracking: answers to what this host began are then judged like a stranger's packets, and dropped unless their port is open.", looked)
	}
	if r := e.nat; r != nil && !ch.leaving() {
		list(Note, "redirect", r, "It sends packets on to another port or host; the policy has judged them before, by the port on the wire.", "Nothing: list the port on the wire in the policy, not the one behind it.")
	}
	if r := e.proxy; r != nil {
		list(May, "proxy", r, "A proxy answers or takes packets over (tproxy, synproxy): whom it answers is not the policy's decision alone.", looked)
	}
	if r := e.forward; r != nil {
		list(May, "redirect", r, "It sends packets out by another interface (fwd): the policy does not see them.", looked)
	}
	if r := e.copy; r != nil {
		list(Note, "copy", r, "It sends copies of packets elsewhere (dup); what the policy says of the packets stands.", looked)
	}
	if r := e.offload; r != nil {
		list(May, "offload", r, "It puts flows into a flowtable: their packets pass by the policy, and closing a published port does not end them.", "Leave published flows out of the flowtable, or end them with conntrack -D.")
	}
	f.scanStops(ch, &e, tried, list)
}

// scanStops lists chains that can stop packets, as far as the trial has not.
func (f *findings) scanStops(ch *liveChain, e *chainEffects, tried bool, list func(Severity, string, *liveRule, string, string)) {
	t := ch.table
	if f.hit[ch] || e.stops == nil && e.queue == nil && !ch.drop {
		return
	}
	what := "drops some packets"
	switch {
	case e.queue != nil && e.stops == nil && !ch.drop:
		what = "lets a program judge some packets"
	case ch.drop:
		what = "drops what it does not admit"
	}
	if program, _ := t.keeper(); program != "" {
		what += " (rules of " + program + ")"
	}
	rule := e.stops
	if rule == nil {
		rule = e.queue
	}
	add := func(s Severity, unknown bool, fact, advice string) {
		i := Interference{Severity: s, Unknown: unknown, Kind: "drop", Where: t.where(ch.title), Fact: fact, Advice: advice}
		if rule != nil {
			i.Rule = t.ruleName(rule)
		} else {
			i.Rule = "policy drop"
		}
		f.add(i)
	}
	const stands = " What the policy closes stays closed."
	switch {
	case t.family == familyARP:
		add(May, true, "Could not tell: it "+what+" of ARP, without which no IPv4 neighbour reaches this host.", t.remedy(ch.title, 0))
	case t.family == unix.NFPROTO_BRIDGE:
		add(May, true, "Could not tell: it "+what+" between the ports of a bridge, before the policy sees them.", t.remedy(ch.title, 0))
	case t.family == unix.NFPROTO_NETDEV && ch.leaving():
		add(May, true, fmt.Sprintf("Could not tell: it %s that leave by %s, answers perhaps among them.", what, ch.on()), t.remedy(ch.title, 0))
	case ch.early() && slices.ContainsFunc(ch.devices, f.untried(tried)):
		add(May, true, fmt.Sprintf("Could not tell: it %s that enter by %s, before the policy judges.", what, ch.on()), t.remedy(ch.title, 0))
	case !tried:
		add(May, true, "Could not tell without a policy: it "+what+"."+stands, "Apply a policy, or name one.")
	case ch.onward():
		add(Note, false, "It "+what+" on their way to containers or other hosts; for this host it says nothing.", "")
	case ch.leaving():
		add(Note, false, "It "+what+" that leave, but no answer of the openings that were tried.", "")
	case !ch.judgesInbound():
		add(May, true, "Could not tell: it "+what+", in a place that is not walked.", t.remedy(ch.title, 0))
	default:
		add(Note, false, "It "+what+", but none that the openings of the policy were tried with."+stands, "")
	}
}

// untried tells devices that no packet of the trial has entered by.
func (f *findings) untried(tried bool) func(device string) bool {
	return func(device string) bool {
		return !tried || !slices.ContainsFunc(sortedKeys(f.by), func(in string) bool { return rules.MatchInterface(device, in) })
	}
}

// judgesInbound reports whether the trial walks the chain.
func (ch *liveChain) judgesInbound() bool {
	return ch.early() || ch.table.judges() && (ch.hook == unix.NF_INET_PRE_ROUTING || ch.hook == unix.NF_INET_LOCAL_IN || strings.HasPrefix(hookName(ch.hook), "forward"))
}
