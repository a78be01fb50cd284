package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"deadlight/firewall"
	"deadlight/rules"
	"deadlight/verify"
)

// killPolicy is one of two policies without a rule in common but the open port.
func killPolicy(name string, first, rules int) string {
	var b strings.Builder
	b.WriteString("version = 1\n[open.web]\nports = 80\n")
	fmt.Fprintf(&b, "[block.bad]\nfrom = \"@bad\"\n[set.bad]\naddresses = [\"198.18.%d.0/24\", \"2001:db8:%x::/48\"]\n", rules%250, first)
	for i := range rules {
		fmt.Fprintf(&b, "[open.%s%d]\nports = %d\nfrom = [\"10.%d.%d.%d\", \"2001:db8:%x::%x\"]\n", name, i, first+i, i>>8, i&255, len(name), first, i)
	}
	return b.String()
}

// knocker sends SYNs to a port, by both families in turn, and counts what comes
// back from there.
type knocker struct {
	sent, answers atomic.Int64
	stop          chan struct{}
	done          sync.WaitGroup
	err           error
}

func newKnocker(t *testing.T, l *lab, port uint16) *knocker {
	t.Helper()
	link := l.Link("eth0")
	const every = uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8 // in network order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: every, Ifindex: link.Index}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50000}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 32<<20),
	); err != nil {
		t.Fatal(err)
	}
	s := &knocker{stop: make(chan struct{})}
	s.done.Add(2)
	go func() {
		defer s.done.Done()
		for n := 0; ; n++ {
			select {
			case <-s.stop:
				return
			default:
			}
			src, dst := netip.AddrFrom4([4]byte{198, 51, 100, byte(n / 100000)}), l.host4
			if n%2 == 1 {
				src, dst = netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0, 0x99, 15: byte(n / 100000)}), l.host6
			}
			f := synFrame(link, netip.AddrPortFrom(src, uint16(10000+n/2%50000)), netip.AddrPortFrom(dst, port))
			if err := unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: link.Index}); err != nil {
				s.err = err
				return
			}
			s.sent.Add(1)
			if n%10 == 9 {
				time.Sleep(time.Millisecond)
			}
		}
	}()
	go func() {
		defer s.done.Done()
		buf := make([]byte, 2048)
		for {
			n, from, err := unix.Recvfrom(fd, buf, 0)
			select {
			case <-s.stop:
				return
			default:
			}
			if err != nil {
				continue // nothing came
			}
			if a, ok := from.(*unix.SockaddrLinklayer); ok && a.Pkttype != unix.PACKET_OUTGOING && n >= 54 {
				f := buf[:n]
				if f[12] == 0x08 && f[23] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(f[34:]) == port ||
					f[12] == 0x86 && n >= 74 && f[20] == unix.IPPROTO_TCP && binary.BigEndian.Uint16(f[54:]) == port {
					s.answers.Add(1)
				}
			}
		}
	}()
	t.Cleanup(func() {
		close(s.stop)
		s.done.Wait()
		unix.Close(fd)
		if s.err != nil {
			t.Error(s.err)
		}
	})
	return s
}

// synFrame is the first packet of a connection.
func synFrame(l verify.Link, from, to netip.AddrPort) []byte {
	tcp := make([]byte, 20)
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12], tcp[13], tcp[14] = 5<<4, 2, 0x40
	pseudo := slices.Concat(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, byte(len(tcp)), 0, unix.IPPROTO_TCP}, tcp)
	binary.BigEndian.PutUint16(tcp[16:], inetSum(pseudo))
	f := slices.Concat([]byte(l.Dst), []byte(l.Src))
	if to.Addr().Is4() {
		ip := slices.Concat([]byte{0x45, 0, 0, 40, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0}, from.Addr().AsSlice(), to.Addr().AsSlice())
		binary.BigEndian.PutUint16(ip[10:], inetSum(ip))
		return slices.Concat(f, []byte{0x08, 0x00}, ip, tcp)
	}
	ip := slices.Concat([]byte{0x60, 0, 0, 0, 0, 20, unix.IPPROTO_TCP, 64}, from.Addr().AsSlice(), to.Addr().AsSlice())
	return slices.Concat(f, []byte{0x86, 0xdd}, ip, tcp)
}

// inetSum is the Internet checksum (RFC 1071) of an even number of bytes.
func inetSum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

var elementList = regexp.MustCompile(`(?s)elements = \{ (.*?) \}`)

// tableOf is the table as nft lists it, without counts, its parts and the
// elements of its sets in order, and sets by their first names: a table that was
// reached in steps holds them in another order and by other names.
func tableOf(t *testing.T, l *lab) string {
	t.Helper()
	var out bytes.Buffer
	if err := l.Command(t.Context(), []string{"nft", "-s", "list", "table", "inet", "deadlight"}, &out, os.Stderr); err != nil {
		t.Fatalf("%v: the host has no table", err)
	}
	text := elementList.ReplaceAllStringFunc(withoutKnocks(strings.ReplaceAll(out.String(), "_alt", "")), func(s string) string {
		elements := strings.Split(elementList.FindStringSubmatch(s)[1], ",")
		for i := range elements {
			elements[i] = strings.Join(strings.Fields(elements[i]), " ")
		}
		slices.Sort(elements)
		return "elements = { " + strings.Join(elements, ", ") + " }"
	})
	parts := strings.Split(text, "\n\t}\n")
	slices.Sort(parts)
	return strings.Join(parts, "\n\t}\n")
}

// heldOf tells by which of the policies the kernel judges packets; -1: by none. What
// an apply prepared or has not cleared away when it was killed meets no packet.
func heldOf(t *testing.T, l *lab, files []string) int {
	t.Helper()
	held := -1
	if err := l.Host(func() error {
		conn, err := firewall.Dial(nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		is, err := conn.Snapshot(rules.TableName)
		if err != nil {
			return err
		}
		for i, file := range files {
			rs, _, err := parsePolicy(file)
			if err != nil {
				return err
			}
			meant, err := firewall.Meant(rs, time.Now())
			if err != nil {
				return err
			}
			if len(firewall.Diff(is, meant)) == 0 {
				held = i
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return held
}

// recorded names the policies of which the state holds the whole record, the last
// applied and the one that an apply did not come to the end of.
func recorded(t *testing.T, dir string) (good, next string) {
	t.Helper()
	s, err := firewall.OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	name := func(r *firewall.Record, err error) string {
		if errors.Is(err, firewall.ErrNoState) {
			return ""
		}
		if err != nil {
			t.Fatalf("the state does not read: %v", err)
		}
		rs, _, err := parsePolicy(r.Policy)
		if err != nil {
			t.Fatal(err)
		}
		meant, err := firewall.Meant(rs, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if d := firewall.Diff(r.Snapshot, meant); len(d) > 0 {
			t.Fatalf("the record of %s is of another table: %v", r.Policy, d)
		}
		return r.Policy
	}
	return name(s.Good()), name(s.Next())
}

// An apply that is killed at any instant leaves the old table or the new one,
// the next apply is as good as any, and no stranger ever gets an answer.
// The full count runs when the test is asked for by name: go test -run Soak.
func TestSoakKill(t *testing.T) {
	kills := 20
	if strings.Contains(flag.Lookup("test.run").Value.String(), "Soak") {
		kills = 200
	}
	l := newLab(t, labPolicy)
	dir := t.TempDir()
	state := filepath.Join(dir, "state")
	files := []string{filepath.Join(dir, "a.toml"), filepath.Join(dir, "b.toml")}
	for i, text := range []string{killPolicy("a", 10000, 400), killPolicy("bb", 20000, 1000)} {
		if err := os.WriteFile(files[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	apply := func(ctx context.Context, file string) error {
		return l.Host(func() error {
			cmd := exec.CommandContext(ctx, "deadlight", "apply", "--state-dir", state, file) // done: SIGKILL
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			var errs bytes.Buffer
			cmd.Stderr = &errs
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("apply %s: %w\n%s", filepath.Base(file), err, errs.Bytes())
			}
			return nil
		})
	}
	switchTo := func(i int) time.Duration {
		begun := time.Now()
		if err := apply(t.Context(), files[i]); err != nil {
			t.Fatal(err)
		}
		return time.Since(begun)
	}
	var want []string
	var usual time.Duration
	for i := range files {
		switchTo(i)
		want = append(want, tableOf(t, l))
	}
	if want[0] == want[1] {
		t.Fatal("the two policies make one table")
	}
	open, silent := newKnocker(t, l, 80), newKnocker(t, l, 3306) // somebody listens on both
	for i := range 4 {
		usual += switchTo(i%2) / 4
	}

	random := rand.New(rand.NewPCG(1, 2))
	now := 1 // which of the files holds
	killed, old := 0, 0
	span := usual * 12 / 10 // follows the load of the machine
	for i := range kills {
		next := 1 - now
		delay := time.Duration(random.Int64N(int64(span)))
		ctx, cancel := context.WithTimeout(t.Context(), delay)
		err := apply(ctx, files[next])
		cancel()
		var exit *exec.ExitError
		switch {
		case err == nil:
		case ctx.Err() != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL):
			killed++
		default:
			t.Fatal(err)
		}
		held := heldOf(t, l, files)
		switch {
		case err == nil && (held != next || tableOf(t, l) != want[next]):
			t.Fatalf("apply %d ended well, and the table is not what it says", i)
		case held == next:
			now = next
			span -= span / 20
		case held == now:
			old++
			span += span / 40
		default:
			t.Fatalf("kill %d, after %v: the table is neither the old nor the new one:\n%s", i, delay, tableOf(t, l))
		}
		good, pending := recorded(t, state)
		if !slices.Contains(files, good) || pending != "" && !slices.Contains(files, pending) {
			t.Fatalf("kill %d: the state holds %q, and next %q", i, good, pending)
		}
		if good != files[now] && pending != files[now] {
			t.Fatalf("kill %d: the state knows %q and %q, and the kernel holds %q", i, good, pending, files[now])
		}
		if i%10 == 9 { // what was left behind is in nobody's way
			switchTo(now)
			if tableOf(t, l) != want[now] {
				t.Fatalf("after kill %d apply does not make the table of its policy", i)
			}
			if good, pending = recorded(t, state); good != files[now] || pending != "" {
				t.Fatalf("after kill %d and an apply the state holds %q, and next %q", i, good, pending)
			}
		}
	}
	t.Logf("%d applies, usually %v: %d killed, %d of them before the transaction; %d SYNs to the closed port, %d answers",
		kills, usual.Round(time.Millisecond), killed, old, silent.sent.Load(), silent.answers.Load())
	if killed == 0 || old == kills {
		t.Errorf("%d of %d applies were killed, %d before their transaction: the instants are not spread", killed, kills, old)
	}
	if open.answers.Load() == 0 || silent.sent.Load() == 0 {
		t.Error("the open port is not heard: silence proves nothing")
	}
	if n := silent.answers.Load(); n > 0 {
		t.Errorf("the closed port answered %d times", n)
	}
}
