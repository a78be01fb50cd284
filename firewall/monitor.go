package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Monitor hears of every nftables transaction in one network namespace as soon
// as the kernel has committed it. It is not for concurrent use.
type Monitor struct {
	table string
	conn  *Conn // owns the socket and the proof of its namespace
	file  *os.File
	raw   syscall.RawConn
	buf   []byte
	lost  bool    // messages were dropped, and the queue is not empty yet
	batch Batch   // of the transaction whose end has not come yet
	queue []Batch // of one message from the kernel
}

// Batch is what one transaction did to one table.
type Batch struct {
	Generation Generation // with the process that made it
	Touches    []Touch    // in the order in which they came; nil: other tables only
	// Lost: the kernel dropped messages before this one. What was changed, and by
	// whom, is not known: only a look at the whole table tells.
	Lost bool
	At   time.Time // when it was heard of
}

// Touch is a kind of change to an object of the table.
type Touch struct {
	Action string // "add" (which a change is, too) or "remove"
	Kind   string // "table", "chain", "rule", "set", "element", "object", "flowtable"
	Name   string // of the chain for a rule, of the set for an element
	Count  int
}

// Urgent reports whether the table, or a chain of it, is gone: nothing may filter
// then.
func (b *Batch) Urgent() bool {
	gone := map[Touch]bool{}
	for _, t := range b.Touches {
		if t.Kind == "table" || t.Kind == "chain" {
			gone[Touch{Kind: t.Kind, Name: t.Name}] = t.Action == "remove"
		}
	}
	for _, g := range gone {
		if g {
			return true
		}
	}
	return false
}

// monitorBuffer holds what a foreign transaction of some 100,000 elements says
// while we are busy. The kernel takes the memory only while it is in use.
const monitorBuffer = 32 << 20

// dialMonitor opens a Monitor for a table of the inet family, in the namespace
// that [Dial] would go to, with so many bytes of room for events.
func dialMonitor(ns *os.File, table string, buffer int) (*Monitor, error) {
	c, err := Dial(ns)
	if err != nil {
		return nil, err
	}
	m := &Monitor{table: table, conn: c, buf: make([]byte, maxRecv)}
	if err := m.subscribe(buffer); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

func (m *Monitor) subscribe(buffer int) error {
	if err := grow(m.conn.fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, buffer); err != nil {
		return fmt.Errorf("set up the netfilter socket: %w", err)
	}
	err := unix.SetsockoptInt(m.conn.fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.NFNLGRP_NFTABLES)
	if err == unix.EPERM {
		return ErrPermission
	}
	if err != nil {
		return fmt.Errorf("subscribe to changes of the ruleset: %w", err)
	}
	// A file of the runtime's poller: a wait ends with its context.
	fd, err := unix.FcntlInt(uintptr(m.conn.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("subscribe to changes of the ruleset: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return errors.Join(fmt.Errorf("subscribe to changes of the ruleset: %w", err), unix.Close(fd))
	}
	m.file = os.NewFile(uintptr(fd), "nftables events")
	if m.raw, err = m.file.SyscallConn(); err != nil {
		return fmt.Errorf("subscribe to changes of the ruleset: %w", err)
	}
	return nil
}

// Pause stops listening, and Resume begins again: what happened meanwhile is not
// heard of. They may be called while Next waits.
func (m *Monitor) Pause() error { return m.member(unix.NETLINK_DROP_MEMBERSHIP) }

// Resume ends a Pause.
func (m *Monitor) Resume() error { return m.member(unix.NETLINK_ADD_MEMBERSHIP) }

func (m *Monitor) member(how int) error {
	if err := unix.SetsockoptInt(m.conn.fd, unix.SOL_NETLINK, how, unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to changes of the ruleset: %w", err)
	}
	return nil
}

// Close ends the subscription.
func (m *Monitor) Close() error {
	err := m.conn.Close()
	if m.file != nil {
		err = errors.Join(err, m.file.Close())
	}
	return err
}

// Next waits for the next transaction. Lost messages are no error: see
// [Batch.Lost]. After an error the Monitor is of no more use.
func (m *Monitor) Next(ctx context.Context) (Batch, error) {
	stop := context.AfterFunc(ctx, func() { _ = m.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for len(m.queue) == 0 {
		if err := ctx.Err(); err != nil {
			return Batch{}, err
		}
		if err := m.read(); err != nil {
			if ctx.Err() != nil {
				return Batch{}, ctx.Err()
			}
			return Batch{}, fmt.Errorf("read changes of the ruleset: %w", err)
		}
	}
	b := m.queue[0]
	m.queue = m.queue[1:]
	return b, nil
}

// read takes one message of the socket.
func (m *Monitor) read() error {
	var n int
	var from unix.Sockaddr
	var err error
	waited := m.raw.Read(func(fd uintptr) bool {
		n, from, err = unix.Recvfrom(int(fd), m.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		// Once something was lost the end of the queue is news as well.
		return err != unix.EAGAIN || m.lost
	})
	switch {
	case waited != nil:
		return waited
	case err == unix.EINTR:
		return nil
	case err == unix.ENOBUFS:
		m.lost = true
		return nil
	case err == unix.EAGAIN:
		// The kernel drops everything until an overflown queue is empty: only a look
		// from now on sees what comes of it.
		m.lost = false
		m.batch = Batch{}
		m.queue = append(m.queue, Batch{Lost: true, At: time.Now()})
		return nil
	case err != nil:
		return err
	case n > len(m.buf):
		m.lost = true
		return nil
	}
	if k, ok := from.(*unix.SockaddrNetlink); !ok || k.Pid != 0 {
		return nil // not from the kernel
	}
	return m.take(m.buf[:n])
}

// take decodes what the kernel sent; the end of a transaction puts its batch in
// the queue.
func (m *Monitor) take(b []byte) error {
	ne := binary.NativeEndian
	for len(b) >= nlmsgHeader {
		l := int(ne.Uint32(b))
		if l < nlmsgHeader || l > len(b) {
			return errors.New("broken message")
		}
		msg, typ := b[:l], ne.Uint16(b[4:])
		b = b[min(len(b), (l+3)&^3):]
		if typ>>8 != unix.NFNL_SUBSYS_NFTABLES || l < headers {
			continue
		}
		family, attrs := msg[nlmsgHeader], msg[headers:]
		if typ&0xff == unix.NFT_MSG_NEWGEN {
			m.batch.Generation, m.batch.At = generation(attrs), time.Now()
			m.queue = append(m.queue, m.batch)
			m.batch = Batch{}
			continue
		}
		if family == unix.NFPROTO_INET {
			m.touch(typ&0xff, attrs)
		}
	}
	return nil
}

func generation(attrs []byte) Generation {
	var g Generation
	for t, v := range attributes(attrs) {
		switch t {
		case unix.NFTA_GEN_ID:
			g.ID = be32(v)
		case unix.NFTA_GEN_PROC_PID:
			g.PID = be32(v)
		case unix.NFTA_GEN_PROC_NAME:
			g.Comm = cString(v)
		}
	}
	return g
}

func (m *Monitor) touch(typ uint16, attrs []byte) {
	var t Touch
	var name uint16 // the attribute that holds it; attribute 1 is the table in all of them
	switch typ {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		t.Kind = "table"
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		t.Kind, name = "chain", unix.NFTA_CHAIN_NAME
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		t.Kind, name = "rule", unix.NFTA_RULE_CHAIN
	case unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET:
		t.Kind, name = "set", unix.NFTA_SET_NAME
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		t.Kind, name = "element", unix.NFTA_SET_ELEM_LIST_SET
	case unix.NFT_MSG_NEWOBJ, unix.NFT_MSG_DELOBJ:
		t.Kind, name = "object", unix.NFTA_OBJ_NAME
	case unix.NFT_MSG_NEWFLOWTABLE, unix.NFT_MSG_DELFLOWTABLE:
		t.Kind, name = "flowtable", nftaFlowName
	default:
		return
	}
	switch typ {
	case unix.NFT_MSG_DELTABLE, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_DELRULE, unix.NFT_MSG_DELSET,
		unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_DELOBJ, unix.NFT_MSG_DELFLOWTABLE:
		t.Action = "remove"
	default:
		t.Action = "add"
	}
	const table = 1
	for k, v := range attributes(attrs) {
		switch {
		case k == table && cString(v) != m.table:
			return
		case k == name && name != 0:
			t.Name = cString(v)
		}
	}
	if t.Kind == "table" {
		t.Name = m.table
	}
	// Elements and rules come in rows.
	if i := len(m.batch.Touches) - 1; i >= 0 {
		last := m.batch.Touches[i]
		last.Count = 0
		if last == t {
			m.batch.Touches[i].Count++
			return
		}
	}
	t.Count = 1
	m.batch.Touches = append(m.batch.Touches, t)
}
