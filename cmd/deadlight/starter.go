package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"deadlight/rules"
)

// A starter policy from what listens now: what the outside reaches today stays
// open, and no more. The text holds nothing of the host but what is escaped.

// starter is what a policy is drawn from; its fields are the host, or a test.
type starter struct {
	sockets   []listener
	units     map[int]string // by pid
	nics      []nic
	sessions  []session
	runs      []uint16  // of ports that other tables may send on
	ephemeral [2]uint16 // the ports that clients are given
	now       time.Time
	asked     inquiry

	wants  []want
	closed []string // lines on what is not opened
}

// want is a socket, or a run of ports that is sent on, with what the outside
// reaches of it now.
type want struct {
	listener
	hi        uint16 // the last port of a run
	published bool
	only      string // confined to this interface; "": to none
}

// reachable is what of one port the outside reaches over one family.
type reachable struct {
	anywhere bool                           // on every interface, named or not, and every address
	on       map[string]bool                // interfaces, with every address
	to       map[netip.Addr]bool            // addresses, by every interface
	pairs    map[string]map[netip.Addr]bool // both
}

// Interfaces that engines make for their guests.
var guestBridges = [...]string{"virbr*", "podman*", "lxdbr*", "incusbr*", "docker*", "br-*", "cni*"}

// plainName is an interface that a policy can name without further ado.
var plainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.@-]{0,14}$`)

// policy writes it.
func (s *starter) policy() (string, error) {
	s.choose()
	for i := range s.wants {
		for _, v4 := range []bool{true, false} {
			for _, p := range s.wants[i].packets(s, v4) {
				s.asked.note(p.packet)
			}
		}
	}
	for _, p := range s.echo() {
		s.asked.note(p)
	}
	left, err := s.asked.run()
	if err != nil {
		return "", err
	}
	return s.admit(s.text(s.tables(), left))
}

// choose takes the sockets that come into question.
func (s *starter) choose() {
	for _, l := range s.sockets {
		client := l.Protocol == rules.UDP && l.Port >= s.ephemeral[0] && l.Port <= s.ephemeral[1] && l.Inode != 0
		switch {
		case l.loopback():
			s.leave(l, "loopback only")
		case l.Protocol == rules.UDP && (l.Port == 68 || l.Port == 546):
			s.leave(l, "answers to the DHCP client are always admitted, see [dhcp]")
		case client && !s.works(l):
			s.leave(l, "a port of the range that clients are given, which changes; answers pass without an opening")
		case l.Device != "" && !plainName.MatchString(l.Device):
			s.leave(l, "its interface has a name that is not written here")
		default:
			w := want{listener: l, hi: l.Port, only: l.Device}
			for _, n := range s.nics {
				if w.only == "" && slices.Contains(n.addrs, l.Addr) && isGuestBridge(n.name) {
					w.only = n.name
				}
			}
			s.wants = append(s.wants, w)
		}
	}
	if s.runs == nil {
		return
	}
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
		cuts := slices.Clone(s.runs)
		for _, l := range s.sockets {
			if l.Protocol == p {
				cuts = append(cuts, l.Port, max(l.Port+1, 1)) // behind the last port comes the first again
			}
		}
		slices.Sort(cuts)
		cuts = slices.Compact(cuts)
		for i, lo := range cuts {
			hi := uint16(65535)
			if i+1 < len(cuts) {
				hi = cuts[i+1] - 1
			}
			s.wants = append(s.wants, want{listener: listener{Protocol: p, Addr: netip.IPv6Unspecified(), Port: lo}, hi: hi, published: true})
		}
	}
}

func isGuestBridge(name string) bool {
	for _, p := range guestBridges {
		if plainName.MatchString(name) && rules.MatchInterface(p, name) {
			return true
		}
	}
	return false
}

// works reports whether the caller works through a socket.
func (s *starter) works(l listener) bool {
	return slices.ContainsFunc(s.sessions, func(o session) bool { return o.Protocol == l.Protocol && o.Local.Port() == l.Port })
}

// leave notes what is not opened.
func (s *starter) leave(l listener, why string) {
	at := netip.AddrPortFrom(l.Addr, l.Port).String()
	if l.Device != "" {
		at += " by " + l.Device
	}
	line := fmt.Sprintf("%s %s at %s: %s", rules.PortName(l.Protocol, l.Port), s.who(l), at, why)
	if !slices.Contains(s.closed, line) {
		s.closed = append(s.closed, line)
	}
}

// probe is a packet that shows whether an interface or an address is open.
type probe struct {
	entry
	packet rules.Packet
}

// packets are those that a want is judged by, over one family: to every address
// of every interface, and by an interface that nobody names.
func (w *want) packets(s *starter, v4 bool) []probe {
	if !w.takes(v4) {
		return nil
	}
	var at []entry
	first := nowhere(!v4)
	for _, n := range s.nics {
		if w.only != "" && n.name != w.only {
			continue
		}
		own := n.all(v4)
		if a, ok := n.own(v4); ok && first == nowhere(!v4) && !a.IsLinkLocalUnicast() {
			first = a
		}
		switch {
		case w.Addr.IsUnspecified():
			for _, a := range own {
				at = append(at, entry{n.name, a})
			}
		case len(own) > 0 && (!w.Addr.IsLinkLocalUnicast() || slices.Contains(n.addrs, w.Addr)):
			at = append(at, entry{n.name, w.Addr})
		}
	}
	if w.only == "" && !w.Addr.IsLinkLocalUnicast() {
		if !w.Addr.IsUnspecified() {
			first = w.Addr
		}
		at = append(at, entry{"", first})
	}
	var out []probe
	for _, e := range at {
		out = append(out, probe{e, e.packet(w.Protocol, w.Port, stranger(!v4), s.now)})
		if e.from() != stranger(!v4) {
			out = append(out, probe{e, e.packet(w.Protocol, w.Port, e.from(), s.now)})
		}
	}
	return out
}

// all gives the addresses of a family.
func (p nic) all(v4 bool) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(p.addrs), func(a netip.Addr) bool { return a.Is4() != v4 })
}

// echo are pings.
func (s *starter) echo() []rules.Packet {
	var out []rules.Packet
	for _, v4 := range []bool{true, false} {
		at := []entry{{"", nowhere(!v4)}}
		for _, n := range s.nics {
			for _, a := range n.all(v4) {
				at = append(at, entry{n.name, a})
			}
		}
		for _, e := range at {
			p := e.packet(rules.ICMPv4, 0, e.from(), s.now)
			p.SrcPort, p.ICMPType = 0, 8
			if !v4 {
				p.Protocol, p.ICMPType = rules.ICMPv6, 128
			}
			out = append(out, p)
		}
	}
	return out
}

// reach says what of a want is open now over one family, and what closes the rest.
func (s *starter) reach(w *want, v4 bool) (open reachable, closed map[string][]string) {
	open = reachable{on: map[string]bool{}, to: map[netip.Addr]bool{}, pairs: map[string]map[netip.Addr]bool{}}
	closed = map[string][]string{} // interfaces by what closes them
	bad := map[entry]bool{}
	all := w.packets(s, v4)
	for _, p := range all {
		j := s.asked.answer(p.packet)
		ok := accepts(j) && (!w.published || j.Moved)
		bad[p.entry] = bad[p.entry] || !ok
		if !ok && (!w.published || j != nil && j.Moved && unsure(j)) {
			why := "cannot be told: too many packets to ask about"
			switch {
			case j == nil:
			case unsure(j):
				why = "cannot be told: it hinges on " + stepText(j.By)
			default:
				why = "closed now by " + stepText(j.By)
			}
			if p.in != "" && !slices.Contains(closed[why], p.in) {
				closed[why] = append(closed[why], p.in)
			}
		}
	}
	names, free := map[string]bool{}, false // interfaces with something open; the one that nobody names
	whole := map[string]bool{}
	for e, no := range bad {
		if e.in == "" {
			free = !no
			continue
		}
		if _, seen := whole[e.in]; !seen {
			whole[e.in] = true
		}
		whole[e.in] = whole[e.in] && !no && plainName.MatchString(e.in)
		names[e.in] = names[e.in] || !no
	}
	everywhere := free && !slices.Contains(slices.Collect(maps.Values(whole)), false)
	single := !w.Addr.IsUnspecified()
	switch {
	case everywhere && single:
		open.to[w.Addr] = true
	case everywhere:
		open.anywhere = true
	default:
		for e, no := range bad {
			switch {
			case no || e.in == "" || !plainName.MatchString(e.in):
			case whole[e.in] && !single:
				open.on[e.in] = true
			default:
				if open.pairs[e.in] == nil {
					open.pairs[e.in] = map[netip.Addr]bool{}
				}
				open.pairs[e.in][e.dst] = true
			}
		}
	}
	return open, closed
}

// sentOn says which rule publishes a want, and to where.
func (s *starter) sentOn(w *want) string {
	for _, p := range slices.Concat(w.packets(s, true), w.packets(s, false)) {
		if j := s.asked.answer(p.packet); accepts(j) && j.Moved {
			to := ""
			if j.Target.IsValid() {
				to = " to " + j.Target.String()
			}
			return fmt.Sprintf("%s/%s: %s sends it on%s", rules.PortRange{Lo: w.Port, Hi: w.hi}, w.Protocol, mover(j), to)
		}
	}
	return "published by another table"
}

// add joins what two sockets of one port have open, and leaves out what is in it
// twice.
func (r *reachable) add(o reachable) {
	r.anywhere = r.anywhere || o.anywhere
	maps.Copy(r.on, o.on)
	maps.Copy(r.to, o.to)
	for in, to := range o.pairs {
		if r.pairs[in] == nil {
			r.pairs[in] = map[netip.Addr]bool{}
		}
		maps.Copy(r.pairs[in], to)
	}
	if r.anywhere {
		clear(r.on)
		clear(r.to)
		clear(r.pairs)
	}
	for in, to := range r.pairs {
		maps.DeleteFunc(to, func(a netip.Addr, _ bool) bool { return r.on[in] || r.to[a] })
		if len(to) == 0 {
			delete(r.pairs, in)
		}
	}
}

// scope is where a table opens.
type scope struct {
	interfaces, to string // joined; "": every one
	v4, v6         bool
}

// everyone is every address of its families.
func (s scope) everyone() []string {
	var out []string
	if s.v4 {
		out = append(out, "0.0.0.0/0")
	}
	if s.v6 {
		out = append(out, "::/0")
	}
	return out
}

// scopes gives a table's worth each.
func scopes(v4, v6 reachable) []scope {
	found := map[[2]string]scope{}
	put := func(interfaces, to []string, is4 bool) {
		slices.Sort(interfaces)
		slices.Sort(to)
		key := [2]string{strings.Join(interfaces, " "), strings.Join(to, " ")}
		s := found[key]
		s.interfaces, s.to = key[0], key[1]
		s.v4, s.v6 = s.v4 || is4, s.v6 || !is4
		found[key] = s
	}
	texts := func(m map[netip.Addr]bool) (out []string) {
		for a := range m {
			out = append(out, a.String())
		}
		return out
	}
	for is4, r := range map[bool]reachable{true: v4, false: v6} {
		if r.anywhere {
			put(nil, nil, is4)
		}
		if len(r.on) > 0 {
			put(slices.Collect(maps.Keys(r.on)), nil, is4)
		}
		if len(r.to) > 0 {
			put(nil, texts(r.to), is4)
		}
		for in, to := range r.pairs {
			put([]string{in}, texts(to), is4)
		}
	}
	return slices.SortedFunc(maps.Values(found), func(a, b scope) int {
		return cmp.Or(cmp.Compare(a.interfaces, b.interfaces), cmp.Compare(a.to, b.to))
	})
}

// opening is an [open.*] table in the making.
type opening struct {
	owner    string // the name before it is made unique
	scope    scope
	admin    bool
	ports    map[rules.Protocol][]rules.PortRange
	comments map[rules.Protocol][]string
}

// lowest orders openings by their first port, that of TCP first: no two openings of
// one place have one in common.
func (o *opening) lowest() int {
	out := math.MaxInt
	for p, ranges := range o.ports {
		for _, r := range ranges {
			out = min(out, int(r.Lo)+int(p)<<17)
		}
	}
	return out
}

// tables makes openings of the wants.
func (s *starter) tables() []*opening {
	type key struct {
		protocol rules.Protocol
		lo, hi   uint16
	}
	type shared struct {
		open  [2]reachable // of IPv4 and IPv6
		first *want
		by    []string
	}
	ports := map[key]*shared{}
	for i := range s.wants {
		w := &s.wants[i]
		k := key{w.Protocol, w.Port, w.hi}
		p := ports[k]
		if p == nil {
			empty := func() reachable {
				return reachable{on: map[string]bool{}, to: map[netip.Addr]bool{}, pairs: map[string]map[netip.Addr]bool{}}
			}
			p = &shared{open: [2]reachable{empty(), empty()}}
		}
		any := false
		for f, v4 := range []bool{true, false} {
			open, closed := s.reach(w, v4)
			p.open[f].add(open)
			any = any || open.anywhere || len(open.on)+len(open.to)+len(open.pairs) > 0
			for _, why := range slices.Sorted(maps.Keys(closed)) {
				if !w.published {
					s.leave(w.listener, why+", for what comes by "+strings.Join(closed[why], ", "))
				}
			}
		}
		if !any {
			if !w.published && !slices.ContainsFunc(s.closed, func(c string) bool {
				return strings.HasPrefix(c, rules.PortName(w.Protocol, w.Port)+" ")
			}) {
				s.leave(w.listener, "no interface with a plain name has an address of its family")
			}
			continue
		}
		ports[k] = p
		if p.first == nil {
			p.first = w
		}
		by := s.who(w.listener) + " at " + netip.AddrPortFrom(w.Addr, w.Port).String()
		if w.published {
			by = s.sentOn(w)
		}
		if !slices.Contains(p.by, by) {
			p.by = append(p.by, by)
		}
	}
	tables := map[string]*opening{}
	keys := slices.SortedFunc(maps.Keys(ports), func(a, b key) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.lo, b.lo))
	})
	for _, k := range keys {
		p := ports[k]
		for _, sc := range scopes(p.open[0], p.open[1]) {
			o := &opening{owner: s.name(p.first), scope: sc, admin: k.lo == k.hi && rules.IsAdminPort(k.protocol, k.lo) || k.lo != k.hi}
			id := fmt.Sprint(o.owner, "\x00", o.scope, o.admin)
			if tables[id] == nil {
				o.ports, o.comments = map[rules.Protocol][]rules.PortRange{}, map[rules.Protocol][]string{}
				tables[id] = o
			}
			o = tables[id]
			o.ports[k.protocol] = append(o.ports[k.protocol], rules.PortRange{Lo: k.lo, Hi: k.hi})
			for _, by := range p.by {
				if !slices.Contains(o.comments[k.protocol], by) {
					o.comments[k.protocol] = append(o.comments[k.protocol], by)
				}
			}
		}
	}
	return slices.SortedFunc(maps.Values(tables), func(a, b *opening) int {
		first := func(o *opening) int {
			if o.owner == "ssh" {
				return 0
			}
			return 1
		}
		return cmp.Or(first(a)-first(b), cmp.Compare(a.owner, b.owner), cmp.Compare(a.scope.interfaces, b.scope.interfaces), cmp.Compare(a.scope.to, b.scope.to),
			cmp.Compare(a.lowest(), b.lowest()))
	})
}
