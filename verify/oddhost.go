package verify

// The odd probes of a host that looks at itself. They come from strangers of their
// own, one of each family, to whom nothing else goes, so that all that they set off
// can be turned back before it comes to a wire: any protocol, port and ICMP error.

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// oddHostViews has one view for every local address of the host, by the interface of
// the sweep. It says what is left out. It runs in the host.
func oddHostViews(cfg HostConfig, s *surroundings, o *Outlook) (views []View, left []string, err error) {
	b := &outlookBuilder{rs: cfg.Rules}
	for i := range o.Views {
		sweep := &o.Views[i]
		if !sweep.Sweep {
			continue
		}
		family := kindOf(sweep.Path.Dst)
		if !s.diverts {
			left = append(left, "those over "+family+": this kernel has no egress hook by which what they set off could be turned back (Linux 5.16)")
			continue
		}
		encrypts, err := encrypts(sweep.Path.Dst.Is4())
		if err != nil {
			return nil, nil, err
		}
		if encrypts {
			left = append(left, "those over "+family+": IPsec policies could carry what they set off out of the host")
			continue
		}
		candidates := candidates4()
		if sweep.Path.Dst.Is6() {
			candidates = candidates6()
		}
		list := append(b.unnamed(candidates), candidates...)
		n := slices.IndexFunc(list, func(a netip.Addr) bool {
			taken := slices.ContainsFunc(o.Views, func(v View) bool { return v.Path.Src == a })
			return !taken && !s.busy[a] && s.reaches(sweep.In, a)
		})
		if n < 0 {
			left = append(left, "those over "+family+": every stranger's address that could be used is in use")
			continue
		}
		to := s.localAddresses(sweep.In, sweep.Path.Dst)
		if more := len(to) - mostAddresses; more > 0 {
			left = append(left, "those to "+count(more, "more address", "more addresses")+" of the host over "+family)
			to = to[:mostAddresses]
		}
		for _, a := range to {
			v := View{In: sweep.In, Sweep: a == sweep.Path.Dst, Path: Path{Src: list[n], Dst: a}}
			v.Path.Canaries = canaries(newExpecter(cfg.Rules, &v), &v.Path)
			if v.Sweep {
				v.Path.Canaries = append(v.Path.Canaries, cfg.Canaries...)
			}
			views = append(views, v)
		}
	}
	return views, left, nil
}

// encrypts reports whether the host has IPsec policies for what leaves: they change
// where a packet goes ahead of every hook of an interface.
func encrypts(is4 bool) (bool, error) {
	family := netlink.FAMILY_V6
	if is4 {
		family = netlink.FAMILY_V4
	}
	list, err := netlink.XfrmPolicyList(family)
	switch {
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EAFNOSUPPORT):
		return false, nil // the kernel has no IPsec
	case err != nil:
		return false, fmt.Errorf("list IPsec policies: %w", err)
	}
	return slices.ContainsFunc(list, func(p netlink.XfrmPolicy) bool { return p.Dir == netlink.XFRM_DIR_OUT }), nil
}

// strangersOf are the paths of the strangers that some views have.
func strangersOf(views []View) []Path {
	var out []Path
	for i := range views {
		if views[i].Sweep {
			out = append(out, views[i].Path)
		}
	}
	return out
}

// keepStraight leaves those views whose answers leave the host where they are turned
// back, and names the addresses of the others.
func (e *entrance) keepStraight(views []View, s *surroundings) (kept []View, left []string, err error) {
	err = e.host(func() error {
		for _, v := range views {
			// One that is known on its link only has no route of its own.
			if v.Path.Dst.IsLinkLocalUnicast() && v.Path.Dst.Is6() || e.comesBack(v.Path.Dst, v.Path.Src, s) {
				v.Path.Link = e.link(v.In)
				kept = append(kept, v)
			} else {
				left = append(left, fmt.Sprintf("those to %s: its answers leave by a way of their own (ip rule)", v.Path.Dst))
			}
		}
		return nil
	})
	return kept, left, err
}

// sendOdd sends the odd probes of a host that looks at itself.
func sendOdd(ctx context.Context, cfg HostConfig, e *entrance, s *surroundings, o *Outlook, views []View) (_ *odd, proof *oddProof, err error) {
	run := planOdd(oddConfig{
		rules: cfg.Rules, views: views, swept: cfg.Ports, all: cfg.all || len(cfg.Ports.TCP) == 65535 && len(cfg.Ports.UDP) == 65535,
		many: true, witnessed: !cfg.PacketsOnly, entire: cfg.PacketsOnly, listening: s.listens,
		level: cfg.Thorough, budget: oddBudget(o.Views), taken: taken(o.Views), maxRate: cfg.MaxRate,
	})
	var wait time.Duration
	if err := cfg.Host(func() error {
		wait = reassemblyTime(false)
		return nil
	}); err != nil {
		return nil, nil, err
	}
	if !cfg.PacketsOnly {
		if run.witness, err = armOddWitness(cfg.Host, run.sources(), run.marks()); err != nil {
			return nil, nil, err
		}
		defer func() { err = errors.Join(err, run.witness.remove()) }()
	}
	if err := e.outside(run.open); err != nil {
		return nil, nil, err
	}
	defer run.close()
	if err := run.run(ctx, wait); err != nil || cfg.PacketsOnly {
		return run, nil, err
	}
	if proof, err = run.witness.proof(); err == nil && run.unfinished(proof) {
		// When the host gives up on what it holds, it may say so.
		err = run.sleep(ctx, wait)
	}
	return run, proof, err
}

// unfinished reports whether the host may hold fragments that somebody kept the rest
// of from being put to.
func (o *odd) unfinished(p *oddProof) bool {
	return slices.ContainsFunc(o.probes, func(x *oddProbe) bool {
		if !x.kind.pieces || x.kind.level > 1 || p.arrived[x.mark()] == 0 {
			return false
		}
		whole, passed := p.whole[x.mark()], p.passed[x.mark()]
		sendings := x.sent / uint64(len(x.kind.frames(x)))
		if x.dst.Is4() {
			return whole != sendings && passed != sendings // put together ahead of the rules, or behind them
		}
		return whole != sendings && passed != x.sent // behind them no hook sees it
	})
}

// hangUp ends the connections that probes have half opened on the host, and that their
// reset did not end: it would go on answering. It runs in the host.
func hangUp(ours func(addr netip.Addr, port uint16) bool) error {
	const most = 130 * time.Second // tcp_synack_retries is 5, and each wait twice the one before
	for until := time.Now().Add(most); ; {
		left, again := 0, 10*time.Millisecond // the kernel ends them soon
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, err := netlink.SocketDiagTCP(family)
			if errors.Is(err, unix.ENOENT) {
				continue // the kernel has no such protocol
			}
			if err != nil {
				return fmt.Errorf("list sockets: %w", err)
			}
			for _, x := range sockets {
				a, ok := netip.AddrFromSlice(x.ID.Destination)
				if !ok || x.State != tcpSynRecv || !ours(a.Unmap(), x.ID.DestinationPort) {
					continue
				}
				left++
				switch err := destroy(x); {
				case errors.Is(err, unix.EOPNOTSUPP): // CONFIG_INET_DIAG_DESTROY
					again = time.Second // it gives them up by itself
				case err != nil && !errors.Is(err, unix.ENOENT):
					return fmt.Errorf("end a connection of a probe: %w", err)
				}
			}
		}
		switch {
		case left == 0:
			return nil
		case time.Now().After(until):
			return fmt.Errorf("%s of the probes half open", count(left, "connection is", "connections are"))
		}
		time.Sleep(again)
	}
}

// destroy ends a socket (linux/inet_diag.h, struct inet_diag_req_v2).
func destroy(x *netlink.Socket) error {
	b := []byte{x.Family, unix.IPPROTO_TCP, 0, 0}
	b = binary.NativeEndian.AppendUint32(b, 1<<tcpSynRecv)
	b = binary.BigEndian.AppendUint16(b, x.ID.SourcePort)
	b = binary.BigEndian.AppendUint16(b, x.ID.DestinationPort)
	for _, ip := range []net.IP{x.ID.Source, x.ID.Destination} {
		if x.Family == unix.AF_INET {
			ip = ip.To4()
		}
		b = append(b, ip...)
		b = append(b, make([]byte, 16-len(ip))...)
	}
	b = binary.NativeEndian.AppendUint32(b, x.ID.Interface)
	for _, c := range x.ID.Cookie {
		b = binary.NativeEndian.AppendUint32(b, c)
	}
	req := nl.NewNetlinkRequest(unix.SOCK_DESTROY, unix.NLM_F_ACK)
	req.AddRawData(b)
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// oddHostNote says what of the odd probes was left out.
func oddHostNote(cfg HostConfig, o *odd, left []string) string {
	if cfg.Thorough <= 0 {
		return oddNote(cfg.Thorough)
	}
	left = append(left, "those across a reload (deadlight try has them)")
	if cfg.Thorough == 1 {
		left = append(left, "a lone first fragment (--thorough 2)")
	}
	if o != nil {
		if o.cfg.entire {
			left = append(left, "fragments (--proof packets)")
		}
		if !o.cfg.all {
			left = append(left, "ICMP and protocols other than TCP and UDP (--ports)")
		}
		var in []string
		for i := range o.cfg.views {
			if name := o.cfg.views[i].In; !slices.Contains(in, name) {
				in = append(in, name)
			}
		}
		left = append(left, "those by other interfaces than "+strings.Join(in, ", "))
	}
	return "adversarial probes left out: " + strings.Join(left, "; ")
}
