package firewall

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// BenchmarkHeal shows how long a foreign `nft flush ruleset` stays in force: from
// the kernel's news of it to its news of the heal, and as a prober outside sees
// it, from the first to the last datagram that reaches a listener on a closed
// port. The first five heals of a Guard are at once, so each gets a new one.
func BenchmarkHeal(b *testing.B) {
	var many strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&many, "[open.r%d]\nports = [%d]\nfrom = [\"10.%d.%d.0/24\", \"2001:db8:%x::/48\"]\n", i, 10000+i, i/256, i%256, i)
	}
	for _, policy := range []struct{ name, text string }{{"everything", everything}, {"1000_rules", many.String()}} {
		b.Run(policy.name, func(b *testing.B) { benchmarkHeal(b, ruleset(b, policy.text)) })
	}
}

func benchmarkHeal(b *testing.B, rs *rules.Ruleset) {
	w := newWire(b)
	target := targetOf(b, rs)
	w.apply(rs)
	var listener *net.UDPConn
	var witness *Monitor
	w.inHost(func() (err error) {
		if witness, err = dialMonitor(nil, rules.TableName, monitorBuffer); err != nil {
			return err
		}
		listener, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4zero, Port: 9999})
		return err
	})
	defer witness.Close()
	var mu sync.Mutex
	var arrived []time.Time
	var wg sync.WaitGroup
	wg.Add(2)
	go func() {
		defer wg.Done()
		for buf := make([]byte, 64); ; {
			if _, err := listener.Read(buf); err != nil {
				return
			}
			mu.Lock()
			arrived = append(arrived, time.Now())
			mu.Unlock()
		}
	}()
	ctx, cancel := context.WithCancel(b.Context())
	const every = 200 * time.Microsecond
	go func() {
		defer wg.Done()
		link := w.Link("eth0")
		for port := uint16(0); ctx.Err() == nil; port++ {
			p := &packet{Packet: rules.Packet{In: "eth0", Src: netip.MustParseAddr("198.51.100.200"), Dst: host4, Protocol: rules.UDP, SrcPort: port, DstPort: 9999}}
			if err := unix.Sendto(w.socket, frame(link, p.bytes()), 0, &unix.SockaddrLinklayer{Ifindex: link.Index}); err != nil {
				b.Errorf("probe: %v", err)
				return
			}
			time.Sleep(every)
		}
	}()
	batches := make(chan Batch, 100)
	wg.Add(1)
	go func() {
		defer wg.Done()
		for {
			batch, err := witness.Next(ctx)
			if err != nil {
				return
			}
			if len(batch.Touches) > 0 {
				batches <- batch
			}
		}
	}()
	var inside, outside []time.Duration
	for b.Loop() {
		applied := &record{}
		applied.set(target)
		reports := make(chan Report, 100)
		var g *Guard
		w.inHost(func() (err error) {
			g, err = NewGuard(nil, applied, GuardOptions{Heal: true, Interval: time.Hour, Report: func(r Report) { reports <- r }})
			return err
		})
		guarded, stop := context.WithCancel(b.Context())
		ended := make(chan error, 1)
		go func() { ended <- g.Run(guarded) }()
		await := func(want ReportKind) {
			for r := range reports {
				if r.Kind == want {
					return
				}
				if r.Kind != ReportDrift {
					b.Fatalf("%s: %v %v", r.Kind, r.Differences, r.Err)
				}
			}
		}
		await(ReportClean)
		mu.Lock()
		arrived = nil
		mu.Unlock()
		w.run("", "nft", "flush", "ruleset")
		await(ReportHealed)
		flushed := <-batches
		healed := <-batches
		if !flushed.Urgent() || flushed.Generation.Comm != "nft" || healed.Generation.ID != flushed.Generation.ID+1 {
			b.Fatalf("the witness heard %+v, then %+v", flushed.Generation, healed.Generation)
		}
		inside = append(inside, healed.At.Sub(flushed.At))
		time.Sleep(50 * time.Millisecond) // what came is read late on a busy machine
		mu.Lock()
		if n := len(arrived); n > 0 {
			outside = append(outside, arrived[n-1].Sub(arrived[0])+every)
		} else {
			outside = append(outside, 0)
		}
		mu.Unlock()
		stop()
		<-ended
		if err := g.Close(); err != nil {
			b.Fatal(err)
		}
	}
	cancel()
	listener.Close()
	wg.Wait()
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	for name, all := range map[string][]time.Duration{"inside": inside, "outside": outside} {
		slices.Sort(all)
		b.ReportMetric(ms(all[len(all)/2]), name+"-median-ms")
		b.ReportMetric(ms(all[len(all)-1]), name+"-max-ms")
	}
	b.ReportMetric(0, "ns/op") // with the start of nft and of the guard: says nothing
}
