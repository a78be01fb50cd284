package firewall

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// elementWriter writes the elements of a set into as many messages as the 64 KiB
// of an attribute ask for.
type elementWriter struct {
	table string
	name  string // of the set, in the kernel
	set   *rules.Set
	left  time.Duration // above 0: when the elements vanish by themselves
	typ   uint16        // NFT_MSG_NEWSETELEM or NFT_MSG_DELSETELEM
	flags uint16
	what  string

	out  []message
	buf  []byte // attributes of the message being written
	list int    // where its list of elements begins; 0: nothing is being written
}

const largestAttr = 1<<16 - 1<<10 // leaves room for an element and for the head

// all writes every element of the set but its bans.
func (w *elementWriter) all() {
	s := w.set
	target := func(i int) string {
		if s.Targets != nil {
			return s.Targets[i]
		}
		return ""
	}
	var b [2]byte
	for i, p := range s.Ports {
		binary.BigEndian.PutUint16(b[:], p.Lo)
		w.element(b[:], 0, target(i), w.left)
		if s.Interval && p.Hi != 1<<16-1 {
			binary.BigEndian.PutUint16(b[:], p.Hi+1)
			w.element(b[:], unix.NFT_SET_ELEM_INTERVAL_END, "", 0)
		}
	}
	w.addresses(s.Addrs.Len(), s.Addrs.At)
	for i, n := range s.Names {
		prefix, wild := strings.CutSuffix(n, "*")
		end := after(ifnameKey(n))
		if wild {
			end = ifnameKey(string(after([]byte(prefix))))
		}
		w.element(ifnameKey(prefix), 0, target(i), w.left)
		if s.Interval {
			w.element(end, unix.NFT_SET_ELEM_INTERVAL_END, "", 0)
		}
	}
	for i, c := range s.Codes {
		key := []byte{byte(c)}
		if s.Type == rules.TypeFibAddr {
			key = binary.NativeEndian.AppendUint32(nil, c)
		}
		w.element(key, 0, target(i), w.left)
	}
	w.flush()
}

// rangesPerMessage ranges of IPv6 addresses, the longest, fit into one message.
const rangesPerMessage = 1000

// addresses writes n ranges of a set without targets. Of many the messages are
// written only when they are sent.
func (w *elementWriter) addresses(n int, at func(i int) rules.AddrRange) {
	if n <= rangesPerMessage {
		for i := range n {
			w.addressRange(at(i))
		}
		return
	}
	w.flush()
	size := 12 + at(0).Lo.BitLen()/8
	if w.set.Interval {
		size = 2*size + 8
	}
	for first := 0; first < n; first += rangesPerMessage {
		end := min(first+rangesPerMessage, n)
		later := &elementWriter{table: w.table, name: w.name, set: w.set, left: w.left}
		w.out = append(w.out, message{
			typ: w.typ, flags: w.flags, what: w.what + " of set " + w.name, size: (end-first)*size + 128, many: end - first,
			write: func(b []byte) []byte {
				later.begin(b)
				for i := first; i < end; i++ {
					later.addressRange(at(i))
				}
				later.end()
				return later.buf
			},
		})
	}
}

func (w *elementWriter) ranges(list []rules.AddrRange) {
	w.addresses(len(list), func(i int) rules.AddrRange { return list[i] })
}

// bans writes addresses that each have an end of their own, but those that are over.
func (w *elementWriter) bans(list []rules.Ban, now time.Time) {
	for i := range list {
		if left := list[i].Left(now); left != 0 {
			w.element(list[i].Addr.AsSlice(), 0, "", left)
		}
	}
}

func (w *elementWriter) addressRange(r rules.AddrRange) {
	end, ok := endOf(r.Hi)
	ok = ok && w.set.Interval
	if r.Lo.Is4() {
		b := r.Lo.As4()
		w.element(b[:], 0, "", w.left)
		if ok {
			b = end.As4()
			w.element(b[:], unix.NFT_SET_ELEM_INTERVAL_END, "", 0)
		}
		return
	}
	b := r.Lo.As16()
	w.element(b[:], 0, "", w.left)
	if ok {
		b = end.As16()
		w.element(b[:], unix.NFT_SET_ELEM_INTERVAL_END, "", 0)
	}
}

// endOf is the address after the last one of a range; false when there is none.
func endOf(last netip.Addr) (netip.Addr, bool) {
	end := last.Next()
	return end, end.IsValid()
}

func (w *elementWriter) element(key []byte, flags uint32, target string, left time.Duration) {
	w.room()
	w.buf = appendElement(w.buf, key, flags, target, left)
}

// room begins a message where there is none, or none with room.
func (w *elementWriter) room() {
	if w.list > 0 && len(w.buf)-w.list > largestAttr {
		w.flush()
	}
	if w.list == 0 {
		w.begin(nil)
	}
}

func (w *elementWriter) begin(b []byte) {
	w.buf = attrString(b, unix.NFTA_SET_ELEM_LIST_TABLE, w.table)
	w.buf = attrString(w.buf, unix.NFTA_SET_ELEM_LIST_SET, w.name)
	w.list = len(w.buf)
	w.buf = append(w.buf, 0, 0, 0, 0)
}

func (w *elementWriter) end() {
	ne := binary.NativeEndian
	ne.PutUint16(w.buf[w.list:], uint16(len(w.buf)-w.list))
	ne.PutUint16(w.buf[w.list+2:], unix.NFTA_SET_ELEM_LIST_ELEMENTS|unix.NLA_F_NESTED)
	w.list = 0
}

func (w *elementWriter) flush() {
	if w.list == 0 {
		return
	}
	w.end()
	w.out = append(w.out, message{typ: w.typ, flags: w.flags, attrs: w.buf, what: w.what + " of set " + w.name})
}

// appendElement writes one element; a left above 0 is when it vanishes by itself.
func appendElement(b, key []byte, flags uint32, target string, left time.Duration) []byte {
	open := func(typ uint16) int {
		b = binary.NativeEndian.AppendUint16(b, 0)
		b = binary.NativeEndian.AppendUint16(b, typ|unix.NLA_F_NESTED)
		return len(b) - 4
	}
	shut := func(at int) { binary.NativeEndian.PutUint16(b[at:], uint16(len(b)-at)) }
	el := open(unix.NFTA_LIST_ELEM)
	k := open(unix.NFTA_SET_ELEM_KEY)
	b = attr(b, unix.NFTA_DATA_VALUE, key)
	shut(k)
	if flags != 0 {
		b = attr32(b, unix.NFTA_SET_ELEM_FLAGS, flags)
	}
	if left > 0 {
		b = attr(b, unix.NFTA_SET_ELEM_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(max(left.Milliseconds(), 1))))
	}
	if target != "" {
		jump := int32(unix.NFT_JUMP)
		data := open(unix.NFTA_SET_ELEM_DATA)
		verdict := open(unix.NFTA_DATA_VERDICT)
		b = attr32(b, unix.NFTA_VERDICT_CODE, uint32(jump))
		b = attrString(b, unix.NFTA_VERDICT_CHAIN, target)
		shut(verdict)
		shut(data)
	}
	shut(el)
	return b
}

// kernelCount is what the kernel counts of a set: of intervals their starts and
// ends, halved.
func kernelCount(s *rules.Set) int {
	n := s.Len()
	if last := s.Addrs.Len() - 1; last >= 0 && s.Interval {
		if _, ok := endOf(s.Addrs.At(last).Hi); !ok {
			n--
		}
	}
	return n
}
