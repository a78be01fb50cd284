package verify

// Where the answers to a vantage leave by a real interface, a table of our own
// turns them into its namespace before they reach a wire. Like the tripwire's, the
// kernel removes it with the socket that made it. It stands ahead of every queueing
// discipline and tc filter, so that nobody's need be touched.

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// diversion turns what leaves by an interface to any of some addresses, and answers
// the vantage, into another interface.
type diversion struct {
	link  string
	addrs []netip.Addr
	to    int // index
}

// seclusion keeps some addresses off every wire: whatever goes to them is turned into
// another interface, by whatever it leaves, and what comes from them is not sent on.
// Nobody else may have the addresses.
type seclusion struct {
	addrs []netip.Addr
	links []hostLink
	to    int // index
}

// diverter is the table `netdev deadlight_probe`.
type diverter struct {
	conn  *nftables.Conn
	table *nftables.Table
}

// armDiverter puts the table into the network namespace that in runs in. ports are
// those that the vantage sends from, besides those of its canaries.
func armDiverter(in Runner, ports []uint16, list []diversion, apart seclusion) (*diverter, error) {
	d := &diverter{table: &nftables.Table{Name: tripwireTable, Family: nftables.TableFamilyNetdev, Flags: nftables.TableFlagOwner}}
	err := in(func() error {
		here, err := threadNetNS()
		if err != nil {
			return err
		}
		d.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
			return readyForTripwire(c, here)
		}))
		if err != nil {
			return err
		}
		if err := d.compose(ports, list); err != nil {
			return err
		}
		if err := d.seclude(apart); err != nil {
			return err
		}
		return d.conn.Flush()
	})
	if err != nil {
		d.close()
		return nil, fmt.Errorf("divert answers: %w", err)
	}
	return d, nil
}

// canDivert reports whether the kernel has what a diverter needs: Linux 5.16, or
// an older one into which it was taken back.
func canDivert(in Runner) (bool, error) {
	d, err := armDiverter(in, []uint16{1}, []diversion{{link: "lo", addrs: parseAddrs("192.0.2.1", "2001:db8::1"), to: 1}}, seclusion{})
	switch {
	case err == nil:
		return true, d.remove()
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT):
		return false, nil
	}
	return false, err
}

const (
	etherIPv4, etherIPv6 = unix.ETH_P_IP, unix.ETH_P_IPV6
	ipv4DstOffset        = 16
	ipv6DstOffset        = 24
	ipv4SrcOffset        = 12
	ipv6SrcOffset        = 8
	icmp6Errors          = 128 // types below it (RFC 4443)
)

func (d *diverter) compose(ports []uint16, list []diversion) error {
	d.conn.CreateTable(d.table)
	answers := &nftables.Set{Table: d.table, Name: "ports", KeyType: nftables.TypeInetService}
	var elements []nftables.SetElement
	for _, p := range ports {
		elements = append(elements, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)})
	}
	if err := d.conn.AddSet(answers, elements); err != nil {
		return err
	}
	for i, v := range list {
		first := nftables.ChainPriority(-1 << 30)
		accept := nftables.ChainPolicyAccept
		chain := d.conn.AddChain(&nftables.Chain{
			Table: d.table, Name: fmt.Sprintf("egress%d", i), Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookEgress, Priority: &first, Policy: &accept, Device: v.link,
		})
		turn := d.conn.AddChain(&nftables.Chain{Table: d.table, Name: fmt.Sprintf("turn%d", i)})
		d.turn(turn, v.to)
		for _, f := range []struct {
			name    string
			ether   uint16
			offset  uint32
			keyType nftables.SetDatatype
			is4     bool
		}{{"four", etherIPv4, ipv4DstOffset, nftables.TypeIPAddr, true}, {"six", etherIPv6, ipv6DstOffset, nftables.TypeIP6Addr, false}} {
			var keys []nftables.SetElement
			for _, a := range v.addrs {
				if a.Is4() == f.is4 {
					keys = append(keys, nftables.SetElement{Key: a.AsSlice()})
				}
			}
			if keys == nil {
				continue
			}
			set := &nftables.Set{Table: d.table, Name: fmt.Sprintf("%s%d", f.name, i), KeyType: f.keyType}
			if err := d.conn.AddSet(set, keys); err != nil {
				return err
			}
			d.rule(chain,
				&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg0},
				&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.BigEndian.PutUint16(f.ether)},
				&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: f.offset, Len: f.keyType.Bytes, DestRegister: reg0},
				&expr.Lookup{SourceRegister: reg0, SetName: set.Name},
				&expr.Verdict{Kind: expr.VerdictGoto, Chain: turn.Name})
		}
	}
	return nil
}

// seclude adds a chain for every interface.
func (d *diverter) seclude(apart seclusion) error {
	for _, f := range []struct {
		name     string
		ether    uint16
		src, dst uint32
		keyType  nftables.SetDatatype
		is4      bool
	}{{"apart4", etherIPv4, ipv4SrcOffset, ipv4DstOffset, nftables.TypeIPAddr, true}, {"apart6", etherIPv6, ipv6SrcOffset, ipv6DstOffset, nftables.TypeIP6Addr, false}} {
		var keys []nftables.SetElement
		for _, a := range apart.addrs {
			if a.Is4() == f.is4 {
				keys = append(keys, nftables.SetElement{Key: a.AsSlice()})
			}
		}
		if keys == nil {
			continue
		}
		if err := d.conn.AddSet(&nftables.Set{Table: d.table, Name: f.name, KeyType: f.keyType}, keys); err != nil {
			return err
		}
		for i, l := range apart.links {
			first := nftables.ChainPriority(-1 << 30)
			accept := nftables.ChainPolicyAccept
			chain := d.conn.AddChain(&nftables.Chain{
				Table: d.table, Name: fmt.Sprintf("%s_%d", f.name, i), Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookEgress, Priority: &first, Policy: &accept, Device: l.name,
			})
			about := func(offset uint32, then ...expr.Any) []expr.Any {
				return append([]expr.Any{
					&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: reg0},
					&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.BigEndian.PutUint16(f.ether)},
					&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.keyType.Bytes, DestRegister: reg0},
					&expr.Lookup{SourceRegister: reg0, SetName: f.name},
				}, then...)
			}
			if l.ether { // what has no such header cannot enter ours
				d.rule(chain, about(f.dst,
					&expr.Immediate{Register: reg0, Data: binaryutil.NativeEndian.PutUint32(uint32(apart.to))},
					&expr.Dup{RegAddr: reg0, RegDev: reg0, IsRegDevSet: true},
					&expr.Verdict{Kind: expr.VerdictDrop})...)
			}
			d.rule(chain, about(f.dst, &expr.Verdict{Kind: expr.VerdictDrop})...)
			d.rule(chain, about(f.src, &expr.Verdict{Kind: expr.VerdictDrop})...)
		}
	}
	return nil
}

// turn adds the rules that tell answers to the vantage from what else goes to its
// addresses, which may belong to somebody.
func (d *diverter) turn(c *nftables.Chain, to int) {
	protocol := func(p rules.Protocol) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{byte(p)}},
		}
	}
	header := func(offset, length uint32) expr.Any {
		return &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length, DestRegister: reg0}
	}
	away := []expr.Any{
		&expr.Immediate{Register: reg0, Data: binaryutil.NativeEndian.PutUint32(uint32(to))},
		&expr.Dup{RegAddr: reg0, RegDev: reg0, IsRegDevSet: true},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
		d.rule(c, slices.Concat(protocol(p), []expr.Any{header(dstPortOffset, 2), &expr.Lookup{SourceRegister: reg0, SetName: "ports"}}, away)...)
	}
	d.rule(c, slices.Concat(protocol(rules.TCP), []expr.Any{
		header(dstPortOffset, 2),
		&expr.Range{Op: expr.CmpOpEq, Register: reg0, FromData: binaryutil.BigEndian.PutUint16(canaryPortLow), ToData: binaryutil.BigEndian.PutUint16(canaryPortHigh)},
	}, away)...)
	d.rule(c, slices.Concat(protocol(rules.ICMPv4), away)...)
	// Not neighbour discovery: the address may be a neighbour's.
	d.rule(c, slices.Concat(protocol(rules.ICMPv6), []expr.Any{
		header(0, 1), &expr.Cmp{Op: expr.CmpOpLt, Register: reg0, Data: []byte{icmp6Errors}},
	}, away)...)
	d.rule(c, slices.Concat(protocol(rules.ICMPv6), []expr.Any{
		header(0, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: []byte{icmp6EchoReply}},
	}, away)...)
}

func (d *diverter) rule(c *nftables.Chain, exprs ...expr.Any) {
	d.conn.AddRule(&nftables.Rule{Table: d.table, Chain: c, Exprs: exprs})
}

// remove takes the table away.
func (d *diverter) remove() error {
	d.conn.DelTable(d.table)
	err := d.conn.Flush()
	d.close()
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove diversion of answers: %w", err)
	}
	return nil
}

func (d *diverter) close() {
	if d.conn != nil {
		_ = d.conn.CloseLasting()
	}
}
