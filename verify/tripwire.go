package verify

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sync"
	"time"

	"deadlight/rules"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Passage is a probe that was seen behind a filter: the ports it bore on the
// wire, whatever a DNAT or a redirect made of them.
type Passage struct {
	SrcPort, DstPort uint16
	Protocol         rules.Protocol
	IPv6             bool
}

// ErrTripwireFull says that more probes passed than the tripwire could note:
// what it names passed, what it does not name may have.
var ErrTripwireFull = errors.New("more probes passed than could be noted")

// Tripwire is a table of our own beside the tested one. It drops nothing and
// notes which probes arrived, which passed the gate and which passed every
// filter. Probes are told by their source port; what arrives over loopback is
// none.
//
// The kernel removes the table with the socket that made it, so that a killed
// verifier leaves nothing behind.
type Tripwire struct {
	conn  *nftables.Conn
	table *nftables.Table
	dump  *setReader
	once  sync.Once
	err   error
}

const (
	tripwireTable = "deadlight_probe"
	// passagesEach is room for every port of both protocols of one source port.
	passagesEach = 1 << 17
	// passagesMost bounds the kernel memory of one set: some 40 MB if all of it is used.
	passagesMost = 1 << 19
)

// ArmTripwire puts the table into a network namespace that in runs in. srcPorts
// are the source ports of the run, over TCP and over UDP; no honest flow should
// have them. EEXIST in the error chain says that another verification runs.
func ArmTripwire(in Runner, srcPorts []uint16) (*Tripwire, error) {
	return armTripwire(in, srcPorts, uint32(min(passagesMost, passagesEach*len(srcPorts))))
}

// ArmTripwireFor is [ArmTripwire] where others send too: only what comes from one of
// some addresses is noted.
func ArmTripwireFor(in Runner, srcPorts []uint16, from []netip.Addr) (*Tripwire, error) {
	return armTripwire(in, srcPorts, uint32(min(passagesMost, passagesEach*len(srcPorts))), from...)
}

func armTripwire(in Runner, srcPorts []uint16, size uint32, from ...netip.Addr) (*Tripwire, error) {
	ports := slices.Clone(srcPorts)
	slices.Sort(ports)
	ports = slices.Compact(ports)
	if len(ports) == 0 || ports[0] == 0 {
		return nil, errors.New("arm tripwire: no source ports, or port 0 among them")
	}
	return armTable(in, func(t *Tripwire) error { return t.compose(ports, size, from) })
}

// armTable makes our table, which compose queues.
func armTable(in Runner, compose func(*Tripwire) error) (*Tripwire, error) {
	t := &Tripwire{table: &nftables.Table{
		Name:   tripwireTable,
		Family: nftables.TableFamilyINet,
		Flags:  nftables.TableFlagOwner,
	}}
	// Dialled inside, on a thread that cannot move: a descriptor of a namespace
	// that is dialled later may be another one's by then.
	err := in(func() error {
		here, err := threadNetNS()
		if err != nil {
			return err
		}
		if t.dump, err = newSetReader(here); err != nil {
			return err
		}
		t.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
			return readyForTripwire(c, here)
		}))
		if err != nil {
			return err
		}
		// The kernel says "not permitted" for a table of another owner, as it does for a lack of rights.
		if _, err := t.conn.ListTableOfFamily(tripwireTable, nftables.TableFamilyINet); err == nil {
			return unix.EEXIST
		}
		t.conn.CreateTable(t.table) // refuses one that is there
		if err := compose(t); err != nil {
			return err
		}
		return t.conn.Flush()
	})
	if err != nil {
		t.close()
		if errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("arm tripwire: another verification runs here: %w", err)
		}
		return nil, fmt.Errorf("arm tripwire: %w", err)
	}
	return t, nil
}

// readyForTripwire checks a socket before the first write goes through it.
func readyForTripwire(c *netlink.Conn, want nsID) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) {
		if fd >= lowFDs {
			inner = fmt.Errorf("descriptor %d: %w", fd, unix.EMFILE) // the library's select(2) would panic
			return
		}
		inner = socketInNS(int(fd), want)
	}); err != nil {
		return err
	}
	if inner != nil {
		return inner
	}
	// With options of our own the library leaves the buffers alone.
	if err := c.SetWriteBuffer(4 << 20); err != nil {
		return err
	}
	return c.SetReadBuffer(4 << 20)
}

// socketInNS refuses a socket of another network namespace.
func socketInNS(fd int, want nsID) error {
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return fmt.Errorf("identify network of socket: %w", err)
	}
	defer unix.Close(ns)
	var st unix.Stat_t
	if err := unix.Fstat(ns, &st); err != nil {
		return fmt.Errorf("identify network of socket: %w", err)
	}
	if got := (nsID{uint64(st.Dev), st.Ino}); got != want {
		return errors.New("the socket is in another network")
	}
	return nil
}

// Registers (NFT_REG_1 and the 4-byte ones behind it): where a concatenation
// of up to four components lies.
const (
	reg0 = unix.NFT_REG_1
	reg1 = unix.NFT_REG32_01
	reg2 = unix.NFT_REG32_02
)

// compose queues what notes the probes of sweeps, as one transaction.
func (t *Tripwire) compose(ports []uint16, size uint32, from []netip.Addr) error {
	if err := t.sendersOf(from); err != nil {
		return err
	}

	source, err := nftables.ConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	if err != nil {
		return err
	}
	passage, err := nftables.ConcatSetType(nftables.TypeInetService, nftables.TypeInetService, nftables.TypeInetProto)
	if err != nil {
		return err
	}
	var one, both, protocols []nftables.SetElement
	for _, p := range ports {
		one = append(one, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)})
	}
	for _, protocol := range []rules.Protocol{rules.TCP, rules.UDP} {
		protocols = append(protocols, nftables.SetElement{Key: []byte{byte(protocol)}})
		for _, p := range ports {
			key := append([]byte{byte(protocol), 0, 0, 0}, binaryutil.BigEndian.PutUint16(p)...)
			both = append(both, nftables.SetElement{Key: append(key, 0, 0)}) // each component padded to four bytes
		}
	}
	for _, s := range []struct {
		set      nftables.Set
		elements []nftables.SetElement
	}{
		{nftables.Set{Name: "sources", KeyType: source, Concatenation: true}, both},
		{nftables.Set{Name: "arrived_tcp", KeyType: nftables.TypeInetService, Counter: true}, one},
		{nftables.Set{Name: "arrived_udp", KeyType: nftables.TypeInetService, Counter: true}, one},
		{nftables.Set{Name: "lost_gate", KeyType: nftables.TypeInetProto, Counter: true}, protocols},
		{nftables.Set{Name: "lost_passed", KeyType: nftables.TypeInetProto, Counter: true}, protocols},
		{nftables.Set{Name: "gate4", KeyType: passage, Concatenation: true, Dynamic: true, Size: size}, nil},
		{nftables.Set{Name: "gate6", KeyType: passage, Concatenation: true, Dynamic: true, Size: size}, nil},
		{nftables.Set{Name: "passed4", KeyType: passage, Concatenation: true, Dynamic: true, Size: size}, nil},
		{nftables.Set{Name: "passed6", KeyType: passage, Concatenation: true, Dynamic: true, Size: size}, nil},
	} {
		s.set.Table = t.table
		if err := t.conn.AddSet(&s.set, s.elements); err != nil {
			return err
		}
	}

	for _, where := range []string{"gate", "passed"} {
		untracked := t.chain("untracked_"+where, nil, 0)
		t.note(untracked, where, func(reg uint32, offset uint32) expr.Any {
			return &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2, DestRegister: reg}
		})
		tracked := t.chain("note_"+where, nil, 0)
		// Without an entry there is no original port: the packet's own has to do.
		t.rule(tracked,
			&expr.Ct{Key: expr.CtKeySTATE, Register: reg0},
			&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 4, Xor: make([]byte, 4),
				Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitINVALID | expr.CtStateBitUNTRACKED)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: reg0, Data: make([]byte, 4)},
			&expr.Verdict{Kind: expr.VerdictGoto, Chain: untracked.Name})
		t.note(tracked, where, func(reg uint32, offset uint32) expr.Any {
			key := expr.CtKeyPROTOSRC
			if offset == dstPortOffset {
				key = expr.CtKeyPROTODST
			}
			return &expr.Ct{Key: key, Register: reg, Direction: expr.CtDirOriginal}
		})
	}

	// Behind defragmentation (-400), before anybody could drop.
	arrive := t.chain("arrive", nftables.ChainHookPrerouting, -310)
	t.notLoopback(arrive)
	t.onlySenders(arrive, len(from) > 0)
	for _, protocol := range []rules.Protocol{rules.TCP, rules.UDP} {
		match := []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{byte(protocol)}},
		}
		if protocol == rules.TCP {
			// The resets by which the prober takes back an opened connection are no probes:
			// counted, one could hide a probe that was lost.
			match = append(match,
				&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: tcpFlagsOffset, Len: 1, DestRegister: reg0},
				&expr.Bitwise{SourceRegister: reg0, DestRegister: reg0, Len: 1, Mask: []byte{tcpReset}, Xor: []byte{0}},
				&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{0}})
		}
		t.rule(arrive, append(match,
			&expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: srcPortOffset, Len: 2, DestRegister: reg0},
			&expr.Lookup{SourceRegister: reg0, SetName: "arrived_" + protocol.String()})...)
	}
	for _, base := range []struct {
		name, note string
		hook       *nftables.ChainHook
		priority   nftables.ChainPriority
	}{
		{"gate", "note_gate", nftables.ChainHookPrerouting, -109}, // right behind the gate, before DNAT
		{"input", "note_passed", nftables.ChainHookInput, 1 << 30},
		{"forward", "note_passed", nftables.ChainHookForward, 1 << 30},
	} {
		chain := t.chain(base.name, base.hook, base.priority)
		t.notLoopback(chain)
		t.onlySenders(chain, len(from) > 0)
		t.rule(chain, &expr.Verdict{Kind: expr.VerdictJump, Chain: base.note})
	}
	return nil
}

// Offsets in the TCP and the UDP header.
const (
	srcPortOffset = 0
	dstPortOffset = 2

	tcpFlagsOffset = 13
	tcpReset       = 0x04
)

// chain adds a base chain, or a plain one where hook is nil.
func (t *Tripwire) chain(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	c := &nftables.Chain{Name: name, Table: t.table}
	if hook != nil {
		accept := nftables.ChainPolicyAccept
		c.Type, c.Hooknum, c.Priority, c.Policy = nftables.ChainTypeFilter, hook, &priority, &accept
	}
	return t.conn.AddChain(c)
}

func (t *Tripwire) rule(c *nftables.Chain, exprs ...expr.Any) {
	t.conn.AddRule(&nftables.Rule{Table: t.table, Chain: c, Exprs: exprs})
}

// notLoopback lets what never was on a wire go.
func (t *Tripwire) notLoopback(c *nftables.Chain) {
	t.rule(c,
		&expr.Meta{Key: expr.MetaKeyIIFTYPE, Register: reg0},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint16(unix.ARPHRD_LOOPBACK)},
		&expr.Verdict{Kind: expr.VerdictAccept})
}

// probeSender is a set of addresses of one family, and where packets bear theirs.
type probeSender struct {
	name    string
	nfproto byte
	offset  uint32
	key     nftables.SetDatatype
}

func probeSenders() []probeSender {
	return []probeSender{
		{"senders4", unix.NFPROTO_IPV4, 12, nftables.TypeIPAddr},
		{"senders6", unix.NFPROTO_IPV6, 8, nftables.TypeIP6Addr},
	}
}

// sendersOf adds the sets of the addresses that probes come from.
func (t *Tripwire) sendersOf(from []netip.Addr) error {
	if len(from) == 0 {
		return nil
	}
	for _, s := range probeSenders() {
		var elements []nftables.SetElement
		seen := map[netip.Addr]bool{}
		for _, a := range from {
			if !seen[a] && a.BitLen() == int(s.key.Bytes)*8 {
				seen[a] = true
				elements = append(elements, nftables.SetElement{Key: a.AsSlice()})
			}
		}
		if err := t.conn.AddSet(&nftables.Set{Table: t.table, Name: s.name, KeyType: s.key}, elements); err != nil {
			return err
		}
	}
	return nil
}

// onlySenders lets go what comes from anybody else.
func (t *Tripwire) onlySenders(c *nftables.Chain, known bool) {
	if !known {
		return
	}
	for _, s := range probeSenders() {
		t.rule(c,
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{s.nfproto}},
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: s.offset, Len: s.key.Bytes, DestRegister: reg0},
			&expr.Lookup{SourceRegister: reg0, SetName: s.name, Invert: true},
			&expr.Verdict{Kind: expr.VerdictAccept})
	}
}

// note adds the rules that put a probe into the sets of a place. An add that
// fails, because the set is full or memory is short, ends its rule only, so
// that the packet comes to the last one and is counted as lost.
func (t *Tripwire) note(c *nftables.Chain, where string, port func(reg, offset uint32) expr.Any) {
	isProbe := func(then ...expr.Any) []expr.Any {
		return append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
			port(reg1, srcPortOffset),
			&expr.Lookup{SourceRegister: reg0, SetName: "sources"},
		}, then...)
	}
	for _, family := range []struct {
		nfproto byte
		set     string
	}{{unix.NFPROTO_IPV4, where + "4"}, {unix.NFPROTO_IPV6, where + "6"}} {
		t.rule(c, isProbe(
			&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{family.nfproto}},
			port(reg0, srcPortOffset),
			port(reg1, dstPortOffset),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg2},
			&expr.Dynset{SrcRegKey: reg0, SetName: family.set, Operation: uint32(unix.NFT_DYNSET_OP_ADD)},
			&expr.Verdict{Kind: expr.VerdictAccept})...)
	}
	t.rule(c, isProbe(
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Lookup{SourceRegister: reg0, SetName: "lost_" + where})...)
}

// Arrived counts the packets that came in from each source port of the run,
// before any filter but a driver's or tc's could drop them: probes, canaries and
// resets alike.
func (t *Tripwire) Arrived() (map[rules.Protocol]map[uint16]uint64, error) {
	arrived := map[rules.Protocol]map[uint16]uint64{}
	for _, protocol := range []rules.Protocol{rules.TCP, rules.UDP} {
		counts := map[uint16]uint64{}
		if err := t.dump.each("arrived_"+protocol.String(), 2, func(key []byte, packets uint64) {
			counts[binary.BigEndian.Uint16(key)] = packets
		}); err != nil {
			return nil, fmt.Errorf("read tripwire: %w", err)
		}
		arrived[protocol] = counts
	}
	return arrived, nil
}

// GatePassed names the probes that passed the gate, whatever stopped them behind
// it; see [Tripwire.Passed].
func (t *Tripwire) GatePassed() ([]Passage, error) { return t.passages("gate") }

// Passed names the probes that passed the last filter of input or forward, each
// once, ordered by family, protocol and ports. With [ErrTripwireFull] it still
// names those it knows.
func (t *Tripwire) Passed() ([]Passage, error) { return t.passages("passed") }

func (t *Tripwire) passages(where string) ([]Passage, error) {
	var found []Passage
	for _, v6 := range []bool{false, true} {
		set := where + "4"
		if v6 {
			set = where + "6"
		}
		if err := t.dump.each(set, 12, func(key []byte, _ uint64) {
			found = append(found, Passage{
				SrcPort:  binary.BigEndian.Uint16(key),
				DstPort:  binary.BigEndian.Uint16(key[4:]),
				Protocol: rules.Protocol(key[8]),
				IPv6:     v6,
			})
		}); err != nil {
			return nil, fmt.Errorf("read tripwire: %w", err)
		}
	}
	slices.SortFunc(found, func(a, b Passage) int {
		return cmp.Compare(a.order(), b.order())
	})
	// Last, so that no loss goes unseen that came while the sets were read.
	var lost uint64
	if err := t.dump.each("lost_"+where, 1, func(_ []byte, packets uint64) { lost += packets }); err != nil {
		return nil, fmt.Errorf("read tripwire: %w", err)
	}
	if lost > 0 {
		return found, fmt.Errorf("read tripwire: %w: %d packets", ErrTripwireFull, lost)
	}
	return found, nil
}

// order makes one number of a passage, family first.
func (p Passage) order() uint64 {
	n := uint64(p.Protocol)<<32 | uint64(p.SrcPort)<<16 | uint64(p.DstPort)
	if p.IPv6 {
		n |= 1 << 40
	}
	return n
}

// Remove takes our table away and no other. Later calls give the same answer.
func (t *Tripwire) Remove() error {
	t.once.Do(func() {
		t.conn.DelTable(t.table)
		if err := t.conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			t.err = fmt.Errorf("remove tripwire: %w", err)
		}
		t.close()
	})
	return t.err
}

// close ends the sockets, and with them what is left of the table.
func (t *Tripwire) close() {
	if t.conn != nil {
		_ = t.conn.CloseLasting()
	}
	if t.dump != nil {
		t.dump.close()
	}
}

// setReader reads whole sets of the tripwire. The library would take seconds for
// 131,070 elements: the kernel walks a set anew for every buffer it fills, and
// the library's buffers are small.
type setReader struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

// The kernel fills at most 32 KiB at a time (netlink_dump of net/netlink/af_netlink.c).
const dumpBuffer = 1 << 16

// newSetReader opens its socket in the calling thread's namespace, which must be want.
func newSetReader(want nsID) (*setReader, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	r := &setReader{fd: fd, buf: make([]byte, dumpBuffer)}
	timeout := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	if err := errors.Join(
		socketInNS(fd, want),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout),
	); err != nil {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *setReader) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}

// errDumpTorn says that somebody changed the ruleset during a dump.
var errDumpTorn = errors.New("the ruleset changed meanwhile")

// each calls yield for every element of a set, with its key of size bytes and,
// where the set counts, its packets.
func (r *setReader) each(set string, size int, yield func(key []byte, packets uint64)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 {
		return fmt.Errorf("set %s: %w", set, unix.EBADF)
	}
	type element struct {
		key     string
		packets uint64
	}
	for try := 0; ; try++ {
		var all []element
		err := r.dump(set, func(key []byte, packets uint64) error {
			if len(key) != size {
				return fmt.Errorf("a key of %d bytes", len(key))
			}
			all = append(all, element{string(key), packets})
			return nil
		})
		if errors.Is(err, errDumpTorn) && try < 20 {
			continue
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", set, err)
		}
		for _, e := range all {
			yield([]byte(e.key), e.packets)
		}
		return nil
	}
}

// dump asks for one set and reads all answers (linux/netlink.h,
// linux/netfilter/nf_tables.h).
func (r *setReader) dump(set string, yield func(key []byte, packets uint64) error) error {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(tripwireTable + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(set + "\x00")},
	})
	if err != nil {
		return err
	}
	r.seq++
	request := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+4+len(attrs)))
	request = binary.NativeEndian.AppendUint16(request, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM)
	request = binary.NativeEndian.AppendUint16(request, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	request = binary.NativeEndian.AppendUint32(request, r.seq)
	request = binary.NativeEndian.AppendUint32(request, 0)
	request = append(request, unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0)
	if err := unix.Sendto(r.fd, append(request, attrs...), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}

	var broken error // read on to the end all the same, or the next dump finds the rest
	for {
		n, from, err := unix.Recvfrom(r.fd, r.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if a, ok := from.(*unix.SockaddrNetlink); !ok || a.Pid != 0 {
			continue // only the kernel is believed
		}
		for b := r.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			kind := binary.NativeEndian.Uint16(b[4:])
			flags := binary.NativeEndian.Uint16(b[6:])
			if size < unix.SizeofNlMsghdr || size > len(b) {
				return errors.New("an answer is cut short")
			}
			body := b[unix.SizeofNlMsghdr:size]
			ours := binary.NativeEndian.Uint32(b[8:]) == r.seq
			b = b[min((size+3)&^3, len(b)):]
			if !ours {
				continue // of a dump that was given up
			}
			if flags&unix.NLM_F_DUMP_INTR != 0 && broken == nil {
				broken = errDumpTorn
			}
			switch {
			case kind == unix.NLMSG_ERROR || kind == unix.NLMSG_DONE:
				if len(body) >= 4 {
					if code := int32(binary.NativeEndian.Uint32(body)); code == -int32(unix.EINTR) {
						return errDumpTorn
					} else if code < 0 && code > math.MinInt32 {
						return unix.Errno(-code)
					}
				}
				return broken
			case len(body) >= 4 && broken == nil:
				broken = eachElement(body[4:], yield)
			}
		}
	}
}

// eachElement walks the elements of one message.
func eachElement(b []byte, yield func(key []byte, packets uint64) error) error {
	return eachAttr(b, func(kind uint16, list []byte) error {
		if kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return nil
		}
		return eachAttr(list, func(_ uint16, element []byte) error {
			var key []byte
			var packets uint64
			if err := eachAttr(element, func(kind uint16, b []byte) error {
				switch kind {
				case unix.NFTA_SET_ELEM_KEY:
					return eachAttr(b, func(kind uint16, value []byte) error {
						if kind == unix.NFTA_DATA_VALUE {
							key = value
						}
						return nil
					})
				case unix.NFTA_SET_ELEM_EXPR:
					return eachAttr(b, func(kind uint16, data []byte) error {
						if kind != unix.NFTA_EXPR_DATA {
							return nil
						}
						return eachAttr(data, func(kind uint16, value []byte) error {
							if kind == unix.NFTA_COUNTER_PACKETS && len(value) == 8 {
								packets = binary.BigEndian.Uint64(value)
							}
							return nil
						})
					})
				}
				return nil
			}); err != nil {
				return err
			}
			return yield(key, packets)
		})
	})
}

// eachAttr walks netlink attributes, without their flags.
func eachAttr(b []byte, yield func(kind uint16, value []byte) error) error {
	for len(b) >= unix.SizeofNlAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return errors.New("an answer is cut short")
		}
		const flags = unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
		if err := yield(binary.NativeEndian.Uint16(b[2:])&^flags, b[unix.SizeofNlAttr:size]); err != nil {
			return err
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}
