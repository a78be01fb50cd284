package firewall

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Netfilter verdicts (uapi/linux/netfilter.h).
const (
	nfDrop   = 0
	nfAccept = 1
)

// nfTableComment is NFTNL_UDATA_TABLE_COMMENT (libnftnl, udata.h).
const nfTableComment userdata.Type = 0

// encoded is a table as netlink messages. The elements of sets are encoded when
// they are asked for: most of the time they are in the kernel already.
type encoded struct {
	table   message
	objects []encodedObject // counters and limits
	chains  []encodedChain
	sets    []encodedSet
	now     time.Time
}

type encodedObject struct {
	name string // kind and name
	message
}

type encodedChain struct {
	name string
	message
	rules []message
	from  *rules.Chain
}

type encodedSet struct {
	set *rules.Set
	message
}

// elements gives the messages that fill a set, which has that name in the kernel.
func (e *encoded) elements(table, name string, s *rules.Set) []message {
	left := s.Left(e.now)
	if left == 0 {
		return nil // its time is over
	}
	w := elementWriter{table: table, name: name, set: s, left: left, typ: unix.NFT_MSG_NEWSETELEM, flags: unix.NLM_F_CREATE, what: "elements"}
	w.bans(s.Bans, e.now)
	w.all()
	return w.out
}

// content gives what a set shall hold.
func (e *encoded) content(set string) *rules.Set {
	for _, s := range e.sets {
		if s.set.Name == set {
			return s.set
		}
	}
	return nil
}

// small gives all messages but the elements of large sets, in the order in which
// an empty table can take them. Objects stand first: rules name them.
func (e *encoded) small() []message {
	out := []message{e.table}
	for _, o := range e.objects {
		out = append(out, o.message)
	}
	for _, ch := range e.chains {
		out = append(out, ch.message)
	}
	for _, s := range e.sets {
		out = append(out, s.message)
	}
	for _, s := range e.sets {
		if !s.set.Large() {
			out = append(out, e.elements(rules.TableName, s.set.Name, s.set)...)
		}
	}
	for _, ch := range e.chains {
		out = append(out, ch.rules...)
	}
	return out
}

// encode writes what expires with the time that is left at now.
func encode(t *rules.Table, now time.Time) (*encoded, error) {
	e := &encoded{now: now}
	b := attrString(nil, unix.NFTA_TABLE_NAME, t.Name)
	b = attr(b, nftaTableUserdata, userdata.AppendString(nil, nfTableComment, t.Comment))
	// Flags of 0 wake up a table that somebody made dormant.
	b = attr32(b, unix.NFTA_TABLE_FLAGS, 0)
	e.table = message{typ: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attrs: b, what: "table inet " + t.Name}
	for _, name := range t.Counters {
		e.objects = append(e.objects, encodeCounter(t.Name, name))
	}
	for _, l := range t.Limits {
		e.objects = append(e.objects, encodeLimit(t.Name, l))
	}
	for i := range t.Sets {
		e.sets = append(e.sets, encodedSet{&t.Sets[i], encodeSet(t.Name, t.Sets[i].Name, &t.Sets[i])})
	}
	for i := range t.Chains {
		ch := encodedChain{name: t.Chains[i].Name, from: &t.Chains[i], message: encodeChain(t.Name, &t.Chains[i])}
		for k, r := range t.Chains[i].Rules {
			m, err := encodeRule(t.Name, ch.name, r, sameName)
			if err != nil {
				return nil, fmt.Errorf("rule %d of chain %s: %w", k+1, ch.name, err)
			}
			ch.rules = append(ch.rules, m)
		}
		e.chains = append(e.chains, ch)
	}
	return e, nil
}

func encodeCounter(table, name string) encodedObject {
	b := attrString(nil, unix.NFTA_OBJ_TABLE, table)
	b = attrString(b, unix.NFTA_OBJ_NAME, name)
	b = attr32(b, unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER)
	b = nest(b, unix.NFTA_OBJ_DATA, nil)
	return encodedObject{"counter " + name, message{typ: unix.NFT_MSG_NEWOBJ, flags: unix.NLM_F_CREATE, attrs: b, what: "counter " + name}}
}

func encodeLimit(table string, l rules.Limit) encodedObject {
	limit := limitOf(l.Rate)
	data := attr(nil, unix.NFTA_LIMIT_RATE, binary.BigEndian.AppendUint64(nil, limit.Rate))
	data = attr(data, unix.NFTA_LIMIT_UNIT, binary.BigEndian.AppendUint64(nil, uint64(limit.Unit)))
	data = attr32(data, unix.NFTA_LIMIT_BURST, limit.Burst)
	data = attr32(data, unix.NFTA_LIMIT_TYPE, uint32(limit.Type))
	b := attrString(nil, unix.NFTA_OBJ_TABLE, table)
	b = attrString(b, unix.NFTA_OBJ_NAME, l.Name)
	b = attr32(b, unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_LIMIT)
	b = nest(b, unix.NFTA_OBJ_DATA, data)
	return encodedObject{"limit " + l.Name, message{typ: unix.NFT_MSG_NEWOBJ, flags: unix.NLM_F_CREATE, attrs: b, what: "limit " + l.Name}}
}

func limitOf(r rules.Rate) *expr.Limit {
	return &expr.Limit{Type: expr.LimitTypePkts, Rate: r.Limit, Unit: expr.LimitTime(r.Per / time.Second), Burst: r.Burst}
}

func hookNumber(h rules.Hook) uint32 {
	return map[rules.Hook]uint32{
		rules.Prerouting: unix.NF_INET_PRE_ROUTING, rules.Input: unix.NF_INET_LOCAL_IN,
		rules.Forward: unix.NF_INET_FORWARD, rules.Output: unix.NF_INET_LOCAL_OUT,
	}[h]
}

func encodeChain(table string, ch *rules.Chain) message {
	b := attrString(nil, unix.NFTA_CHAIN_TABLE, table)
	b = attrString(b, unix.NFTA_CHAIN_NAME, ch.Name)
	if ch.Base != nil {
		hook := attr32(nil, unix.NFTA_HOOK_HOOKNUM, hookNumber(ch.Base.Hook))
		hook = attr32(hook, unix.NFTA_HOOK_PRIORITY, uint32(int32(ch.Base.Priority)))
		b = nest(b, unix.NFTA_CHAIN_HOOK, hook)
		policy := uint32(nfDrop)
		if ch.Base.Accept {
			policy = nfAccept
		}
		b = attr32(b, unix.NFTA_CHAIN_POLICY, policy)
		b = attrString(b, unix.NFTA_CHAIN_TYPE, "filter")
	}
	return message{typ: unix.NFT_MSG_NEWCHAIN, flags: unix.NLM_F_CREATE, attrs: b, what: "chain " + ch.Name}
}

func dataType(t rules.SetType) nftables.SetDatatype {
	switch t {
	case rules.TypeKnock:
		return nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	case rules.TypeKnock4:
		return nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	case rules.TypeKnock6:
		return nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService)
	}
	return map[rules.SetType]nftables.SetDatatype{
		rules.TypePort: nftables.TypeInetService, rules.TypeIPv4: nftables.TypeIPAddr, rules.TypeIPv6: nftables.TypeIP6Addr,
		rules.TypeIfname: nftables.TypeIFName, rules.TypeICMP: nftables.TypeICMPType,
		rules.TypeICMPv6: nftables.TypeICMP6Type, rules.TypeFibAddr: nftables.TypeFIBAddr,
		rules.TypeProtocol: nftables.TypeInetProto, rules.TypeNfproto: nftables.TypeNFProto,
	}[t]
}

// nft reads the byte order of a set's key from its user data (NFTNL_UDATA_SET_KEYBYTEORDER).
const (
	hostEndian = 1
	bigEndian  = 2
)

// sameName leaves the names of sets as they are.
func sameName(set string) string { return set }

func encodeSet(table, name string, s *rules.Set) message {
	var flags uint32
	if s.Interval {
		flags |= unix.NFT_SET_INTERVAL
	}
	if s.Targets != nil {
		flags |= unix.NFT_SET_MAP
	}
	if s.Meter {
		flags |= unix.NFT_SET_EVAL
	}
	if s.Timed() {
		flags |= unix.NFT_SET_TIMEOUT
	}
	kt := dataType(s.Type)
	b := attrString(nil, unix.NFTA_SET_TABLE, table)
	b = attrString(b, unix.NFTA_SET_NAME, name)
	b = attr32(b, unix.NFTA_SET_FLAGS, flags)
	b = attr32(b, unix.NFTA_SET_KEY_TYPE, kt.GetNFTMagic())
	b = attr32(b, unix.NFTA_SET_KEY_LEN, kt.Bytes)
	// The transaction's own number; names tell sets apart.
	b = attr32(b, unix.NFTA_SET_ID, 1)
	if s.Targets != nil {
		b = attr32(b, unix.NFTA_SET_DATA_TYPE, unix.NFT_DATA_VERDICT)
		b = attr32(b, unix.NFTA_SET_DATA_LEN, 0)
	}
	if n := s.Size(); n > 0 {
		b = nest(b, unix.NFTA_SET_DESC, attr32(nil, unix.NFTA_SET_DESC_SIZE, uint32(n)))
	}
	if s.MeterTimeout > 0 {
		b = attr(b, unix.NFTA_SET_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(s.MeterTimeout.Milliseconds())))
	}
	order := uint32(bigEndian)
	if s.Type == rules.TypeIfname || s.Type == rules.TypeFibAddr || s.Type == rules.TypeNfproto {
		order = hostEndian
	}
	b = attr(b, unix.NFTA_SET_USERDATA, userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, order))
	return message{typ: unix.NFT_MSG_NEWSET, flags: unix.NLM_F_CREATE, attrs: b, what: "set " + s.Name}
}

// ifnameKey is a name as meta iifname loads it: IFNAMSIZ bytes, zero-padded.
func ifnameKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// after adds one to a big-endian number; nil when it overflows, i.e. when an
// interval has no end.
func after(b []byte) []byte {
	for i := len(b) - 1; i >= 0; i-- {
		b[i]++
		if b[i] != 0 {
			return b
		}
	}
	return nil
}

// encodeRule writes a rule; real gives the names that its sets have in the kernel.
func encodeRule(table, chain string, r rules.Rule, real func(set string) string) (message, error) {
	w := ruleWriter{family: rules.Both, real: real}
	for _, e := range r.Exprs {
		w.add(e)
	}
	return w.message(table, chain, r.Comment)
}

// message is the rule that was written.
func (w *ruleWriter) message(table, chain, comment string) (message, error) {
	if w.err != nil {
		return message{}, w.err
	}
	b := attrString(nil, unix.NFTA_RULE_TABLE, table)
	b = attrString(b, unix.NFTA_RULE_CHAIN, chain)
	var list []byte
	for _, x := range w.out {
		data, err := expr.Marshal(unix.NFPROTO_INET, x)
		if err != nil {
			return message{}, err
		}
		list = nest(list, unix.NFTA_LIST_ELEM, data)
	}
	b = nest(b, unix.NFTA_RULE_EXPRESSIONS, list)
	if comment != "" {
		b = attr(b, unix.NFTA_RULE_USERDATA, userdata.AppendString(nil, userdata.TypeComment, comment))
	}
	return message{
		typ: unix.NFT_MSG_NEWRULE, flags: unix.NLM_F_CREATE | unix.NLM_F_APPEND, attrs: b,
		what: fmt.Sprintf("rule %q in chain %s", comment, chain),
	}, nil
}

// ruleWriter turns the parts of a rule into kernel expressions. Like nft, it
// tests for the family and protocol of a header before it reads from it.
type ruleWriter struct {
	out      []expr.Any
	family   rules.Family
	protocol rules.Protocol
	real     func(set string) string
	err      error
}

const reg = unix.NFT_REG_1

func (w *ruleWriter) emit(e ...expr.Any) { w.out = append(w.out, e...) }

func (w *ruleWriter) add(e rules.Expr) {
	switch e := e.(type) {
	case rules.Match:
		w.load(e.Field)
		w.match(e)
	case rules.MatchSet:
		w.load(e.Field)
		if e.Bits > 0 {
			size := uint32(4)
			if e.Field == rules.IP6Saddr || e.Field == rules.IP6Daddr || e.Field == rules.CtOriginalIP6Daddr {
				size = 16
			}
			w.emit(&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: size, Mask: net.CIDRMask(e.Bits, int(8*size)), Xor: make([]byte, size)})
		}
		w.emit(&expr.Lookup{SourceRegister: reg, SetName: w.real(e.Set), Invert: e.Not})
	case rules.VerdictMap:
		w.load(e.Field)
		w.emit(&expr.Lookup{SourceRegister: reg, SetName: w.real(e.Map), DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true})
	case rules.Count:
		// The library sends the name without its NUL; the kernel reads it back with one.
		w.emit(&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: e.Counter + "\x00"})
	case rules.WithinLimit:
		w.emit(&expr.Objref{Type: unix.NFT_OBJECT_LIMIT, Name: e.Limit + "\x00"})
	case rules.WithinRate:
		w.emit(limitOf(e.Rate))
	case rules.MeterAdd:
		w.meter(e)
	case rules.Tally:
		w.tally(e)
	case rules.LogPacket:
		w.log(e)
	case rules.RejectWith:
		if e.TCPReset {
			w.emit(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST})
		} else {
			w.emit(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED})
		}
	case rules.Verdict:
		kind := map[rules.VerdictKind]expr.VerdictKind{
			rules.VerdictAccept: expr.VerdictAccept, rules.VerdictDrop: expr.VerdictDrop, rules.VerdictReturn: expr.VerdictReturn,
			rules.VerdictJump: expr.VerdictJump, rules.VerdictGoto: expr.VerdictGoto,
		}[e.Kind]
		w.emit(&expr.Verdict{Kind: kind, Chain: e.Chain})
	default:
		w.err = fmt.Errorf("no encoding for %T", e)
	}
}

// meter notes a source, IPv6 by /64, and goes on while it keeps within the limit.
func (w *ruleWriter) meter(m rules.MeterAdd) {
	w.load(m.Field)
	if m.Field == rules.IP6Saddr {
		net := mask(netip.PrefixFrom(netip.IPv6Unspecified(), 64))
		w.emit(&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 16, Mask: net, Xor: make([]byte, 16)})
	}
	set := &expr.Dynset{SrcRegKey: reg, SetName: w.real(m.Set)}
	if m.Rate != nil {
		set.Operation, set.Exprs = unix.NFT_DYNSET_OP_UPDATE, []expr.Any{limitOf(*m.Rate)}
	} else {
		set.Operation, set.Exprs = unix.NFT_DYNSET_OP_ADD, []expr.Any{&expr.Connlimit{Count: uint32(m.Connections)}}
	}
	w.emit(set)
}

// tally counts a packet under a key, whose parts stand side by side.
func (w *ruleWriter) tally(t rules.Tally) {
	at := uint32(0) // in registers of 4 bytes
	for _, f := range t.Key {
		to := unix.NFT_REG32_00 + at
		if at%4 == 0 {
			to = reg + at/4 // as the kernel calls it
		}
		w.loadTo(to, f)
		at++
		if f == rules.IP6Saddr {
			at += 3
		}
	}
	w.emit(&expr.Dynset{SrcRegKey: reg, SetName: w.real(t.Set), Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}})
}

func (w *ruleWriter) log(l rules.LogPacket) {
	e := &expr.Log{Key: 1 << unix.NFTA_LOG_PREFIX, Data: []byte(l.Prefix)}
	if l.Group != nil {
		e.Key |= 1 << unix.NFTA_LOG_GROUP
		e.Group = *l.Group
	} else {
		// The kernel fills in warning; written, it reads back equal.
		e.Key |= 1 << unix.NFTA_LOG_LEVEL
		e.Level = expr.LogLevelWarning
	}
	w.emit(e)
}

func equal(data []byte) *expr.Cmp { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: data} }

// require tests for a family or a transport protocol once in a rule.
func (w *ruleWriter) require(f rules.Family, p rules.Protocol) {
	if f != rules.Both && w.family != f {
		w.emit(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg})
		if f == rules.IPv4 {
			w.emit(equal([]byte{unix.NFPROTO_IPV4}))
		} else {
			w.emit(equal([]byte{unix.NFPROTO_IPV6}))
		}
		w.family = f
	}
	if p != 0 && w.protocol != p {
		w.emit(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}, equal([]byte{byte(p)}))
		w.protocol = p
	}
}

func (w *ruleWriter) load(f rules.Field) { w.loadTo(reg, f) }

// loadTo reads a field into a register. Offsets: RFC 791, 8200, 9293, 768, 792.
func (w *ruleWriter) loadTo(to uint32, f rules.Field) {
	w.require(f.NeedsFamily(), f.NeedsProtocol())
	payload := func(base expr.PayloadBase, offset, length uint32) {
		w.emit(&expr.Payload{OperationType: expr.PayloadLoad, DestRegister: to, Base: base, Offset: offset, Len: length})
	}
	network, transport := expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	switch f {
	case rules.MetaIifname:
		w.emit(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: to})
	case rules.MetaNfproto:
		w.emit(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: to})
	case rules.MetaL4proto:
		w.emit(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: to})
	case rules.IPSaddr:
		payload(network, 12, 4)
	case rules.IPDaddr:
		payload(network, 16, 4)
	case rules.IP6Hoplimit:
		payload(network, 7, 1)
	case rules.IP6Saddr:
		payload(network, 8, 16)
	case rules.IP6Daddr:
		payload(network, 24, 16)
	case rules.UDPSport:
		payload(transport, 0, 2)
	case rules.TCPDport, rules.UDPDport, rules.SCTPDport, rules.THDport:
		payload(transport, 2, 2)
	case rules.TCPFlags:
		payload(transport, 13, 1)
	case rules.ICMPTypeField, rules.ICMPv6TypeField:
		payload(transport, 0, 1)
	case rules.ICMPCodeField, rules.ICMPv6CodeField:
		payload(transport, 1, 1)
	case rules.CtState:
		w.emit(&expr.Ct{Key: expr.CtKeySTATE, Register: to})
	case rules.CtStatus:
		w.emit(&expr.Ct{Key: expr.CtKeySTATUS, Register: to})
	case rules.CtDirection:
		w.emit(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: to})
	case rules.CtOriginalProtoDst:
		w.emit(&expr.Ct{Key: expr.CtKeyPROTODST, Register: to, OptDirection: true, Direction: rules.DirOriginal})
	case rules.CtOriginalIPDaddr:
		w.emit(&expr.Ct{Key: expr.CtKeyDSTIP, Register: to, OptDirection: true, Direction: rules.DirOriginal})
	case rules.CtOriginalIP6Daddr:
		w.emit(&expr.Ct{Key: expr.CtKeyDSTIP6, Register: to, OptDirection: true, Direction: rules.DirOriginal})
	case rules.FibDaddrType:
		w.emit(&expr.Fib{Register: to, ResultADDRTYPE: true, FlagDADDR: true})
	case rules.MetaOifname:
		w.emit(&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: to})
	case rules.MetaSkuid:
		w.emit(&expr.Meta{Key: expr.MetaKeySKUID, Register: to})
	case rules.MetaSkgid:
		w.emit(&expr.Meta{Key: expr.MetaKeySKGID, Register: to})
	case rules.FibDaddrOifname:
		w.emit(&expr.Fib{Register: to, ResultOIFNAME: true, FlagDADDR: true})
	default:
		w.err = fmt.Errorf("no encoding for field %d", f)
	}
}

// match compares the register.
func (w *ruleWriter) match(m rules.Match) {
	native := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	switch m.Field {
	case rules.MetaSkuid, rules.MetaSkgid:
		id, err := lookupID(m.Field, m.Name)
		if err != nil {
			w.err = err
			return
		}
		w.emit(equal(native(id)))
	case rules.MetaIifname, rules.MetaOifname, rules.FibDaddrOifname:
		if prefix, wild := strings.CutSuffix(m.Name, "*"); wild {
			w.compare(m, []byte(prefix))
		} else {
			w.compare(m, ifnameKey(m.Name))
		}
	case rules.IPSaddr, rules.IPDaddr, rules.IP6Saddr, rules.IP6Daddr:
		addr := m.Prefix.Masked().Addr().AsSlice()
		if !m.Prefix.IsSingleIP() {
			w.emit(&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(addr)), Mask: mask(m.Prefix), Xor: make([]byte, len(addr))})
		}
		w.emit(equal(addr))
	case rules.CtState, rules.CtStatus:
		w.emit(&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: native(m.Number), Xor: native(0)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: native(0)})
	case rules.TCPFlags:
		w.emit(&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 1, Mask: []byte{rules.FlagsMask}, Xor: []byte{0}})
		w.compare(m, []byte{byte(m.Number)})
	case rules.FibDaddrType:
		w.emit(equal(native(m.Number)))
	case rules.CtOriginalProtoDst, rules.TCPDport, rules.UDPDport, rules.UDPSport:
		w.emit(equal(binary.BigEndian.AppendUint16(nil, uint16(m.Number))))
	default:
		w.emit(equal([]byte{byte(m.Number)}))
	}
	switch m.Field {
	case rules.MetaNfproto:
		w.family = rules.IPv4
		if m.Number == rules.NfprotoIPv6 {
			w.family = rules.IPv6
		}
	case rules.MetaL4proto:
		w.protocol = rules.Protocol(m.Number)
	}
}

// compare ends a match that may be turned round.
func (w *ruleWriter) compare(m rules.Match, data []byte) {
	cmp := equal(data)
	if m.Not {
		cmp.Op = expr.CmpOpNeq
	}
	w.emit(cmp)
}

// lookupID finds the number of a user or group; a number stands for itself.
func lookupID(f rules.Field, name string) (uint32, error) {
	if n, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(n), nil
	}
	var id string
	if f == rules.MetaSkuid {
		u, err := user.Lookup(name)
		if err != nil {
			return 0, &NameError{"user", name, err}
		}
		id = u.Uid
	} else {
		g, err := user.LookupGroup(name)
		if err != nil {
			return 0, &NameError{"group", name, err}
		}
		id = g.Gid
	}
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("number of %q: %w", name, err)
	}
	return uint32(n), nil
}

func mask(p netip.Prefix) []byte {
	b := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return b
}
