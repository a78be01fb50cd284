package firewall

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// What it costs to judge each packet of a flow that a stranger began anew, against
// letting established flows pass and against no rules at all. One op is a transfer
// under each of the three, in turn, through a map of 5,000 ports; the ratios are of
// the medians.
func BenchmarkRecheck(b *testing.B) {
	const size = 256 << 20
	w := newWire(b)
	p := w.peer("eth0", stranger4, stranger6)
	w.run("", "nft", "delete", "table", "inet", "witness") // it looks at every packet, too
	l := listenTCP(b, w.inHost, 7)
	var ports []string
	for i := range 4999 {
		ports = append(ports, fmt.Sprint(1000+3*i))
	}
	policy := func(word string) func() {
		rs := ruleset(b, "[default]\nestablished = \""+word+"\"\n[open.many]\nports = [7, "+strings.Join(ports, ", ")+"]\nfrom = \"198.51.100.0/24\"\n")
		return func() { w.apply(rs) }
	}
	kinds := []struct {
		name string
		set  func()
		took []time.Duration
	}{
		{name: "none", set: func() {
			if _, err := w.conn.Remove("deadlight"); err != nil {
				b.Fatal(err)
			}
		}},
		{name: "keep", set: policy("keep")},
		{name: "recheck", set: policy("recheck")},
	}
	for b.Loop() {
		for i := range kinds {
			k := &kinds[i]
			k.set()
			near, far := connect(b, p.in, l, netip.AddrPortFrom(netip.MustParseAddr(stranger4), 0), netip.AddrPortFrom(host4, 7))
			transfer(b, near, far, size/8) // past slow start
			start := time.Now()
			transfer(b, near, far, size)
			k.took = append(k.took, time.Since(start))
			near.Close()
			far.Close()
		}
	}
	median := func(d []time.Duration) float64 {
		d = slices.Sorted(slices.Values(d))
		return d[len(d)/2].Seconds()
	}
	none := median(kinds[0].took)
	for _, k := range kinds {
		b.ReportMetric(size*8/1e9/median(k.took), k.name+"-Gbit/s")
	}
	for _, k := range kinds[1:] {
		b.ReportMetric(median(k.took)/none, k.name+"/none")
	}
	b.ReportMetric(median(kinds[2].took)/median(kinds[1].took), "recheck/keep")
}

// transfer moves so many bytes from one end to the other.
func transfer(b *testing.B, from, to net.Conn, size int) {
	b.Helper()
	sent := make(chan error, 1)
	go func() {
		chunk := make([]byte, 1<<17)
		for left := size; left > 0; left -= len(chunk) {
			if _, err := from.Write(chunk[:min(left, len(chunk))]); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	chunk := make([]byte, 1<<17)
	for got := 0; got < size; {
		n, err := to.Read(chunk)
		if err != nil {
			b.Fatal(err)
		}
		got += n
	}
	if err := <-sent; err != nil {
		b.Fatal(err)
	}
}
