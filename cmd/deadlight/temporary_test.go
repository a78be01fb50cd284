package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"deadlight/firewall"
	"deadlight/rules"
)

// tempHost is a host with a policy, and a service on a port that it does not open.
type tempHost struct {
	*trialHost
	flows chan net.Conn // that the service has accepted
}

const tempPort = 18443

func newTempHost(t *testing.T) *tempHost {
	t.Helper()
	h := &tempHost{trialHost: newTrialHost(t), flows: make(chan net.Conn, 64)}
	for i, policy := range []string{"[open.web]\nports = 80\n", "[open.web]\nports = [80, 443]\n"} {
		if err := os.WriteFile(h.files[i], []byte("version = 1\n"+policy), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	h.must(t, "apply", h.files[0])
	var l net.Listener
	if err := h.Host(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", tempPort))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.flows <- c
		}
	}()
	return h
}

// dial begins a flow from the outside; nil: there is no answer. The port that is
// always open answers at the same time, or the test shows nothing.
func (h *tempHost) dial(t *testing.T, to netip.Addr) net.Conn {
	t.Helper()
	try := func(port uint16) net.Conn {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, port).String(), 700*time.Millisecond)
		var late net.Error
		if err != nil && !(errors.As(err, &late) && late.Timeout()) {
			t.Fatal(err) // refused or rejected is not silent
		}
		return errNil(c, err)
	}
	c := try(tempPort)
	if c == nil {
		control := try(80)
		if control == nil {
			t.Fatal("the port that is always open does not answer either")
		}
		control.Close()
	}
	return c
}

func errNil(c net.Conn, err error) net.Conn {
	if err != nil {
		return nil
	}
	return c
}

// tempFlow is a flow with both of its ends.
type tempFlow struct{ near, far net.Conn }

// flow begins a flow that must be admitted.
func (h *tempHost) flow(t *testing.T, to netip.Addr) tempFlow {
	t.Helper()
	near := h.dial(t, to)
	if near == nil {
		t.Fatalf("%s port %d does not answer", to, tempPort)
	}
	t.Cleanup(func() { near.Close() })
	for {
		select {
		case far := <-h.flows:
			if far.RemoteAddr().String() != near.LocalAddr().String() {
				far.Close() // of an earlier look
				continue
			}
			t.Cleanup(func() { far.Close() })
			f := tempFlow{near, far}
			if !f.lives(t) {
				t.Fatalf("a new flow to %s carries nothing", to)
			}
			return f
		case <-time.After(10 * time.Second):
			t.Fatal("the service has accepted nothing")
		}
	}
}

// lives reports whether the client is heard by the service.
func (f tempFlow) lives(t *testing.T) bool {
	t.Helper()
	if _, err := f.near.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := f.far.SetReadDeadline(time.Now().Add(700 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := io.ReadFull(f.far, make([]byte, 1))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n == 1
}

// opened reports who gets in: IPv4, IPv6.
func (h *tempHost) opened(t *testing.T) (v4, v6 bool) {
	t.Helper()
	out := [2]bool{}
	for i, to := range []netip.Addr{h.host4, h.host6} {
		if c := h.dial(t, to); c != nil {
			c.Close()
			out[i] = true
		}
	}
	return out[0], out[1]
}

func (h *tempHost) want(t *testing.T, when string, v4, v6 bool) {
	t.Helper()
	if got4, got6 := h.opened(t); got4 != v4 || got6 != v6 {
		t.Fatalf("%s: IPv4 gets in: %t, want %t; IPv6: %t, want %t", when, got4, v4, got6, v6)
	}
}

// end is when the state says that the opening ends, which the kernel must hold.
func (h *tempHost) end(t *testing.T) time.Time {
	t.Helper()
	for _, x := range h.settled(t).Temporary {
		if x.Port == tempPort {
			return x.Expires
		}
	}
	t.Fatal("the state knows no opening")
	return time.Time{}
}

// endsAt waits for the end of an opening, with no process of ours alive: nobody gets
// in behind it, and somebody does before it.
func (h *tempHost) endsAt(t *testing.T, end time.Time) {
	t.Helper()
	for {
		sent := time.Now()
		c := h.dial(t, h.host4)
		if c != nil {
			c.Close()
			if sent.After(end.Add(time.Second)) {
				t.Fatalf("open %s after its end", sent.Sub(end))
			}
			time.Sleep(20 * time.Millisecond)
			continue
		}
		if now := time.Now(); now.Before(end.Add(-10 * time.Millisecond)) {
			t.Fatalf("closed %s before its end", end.Sub(now))
		}
		break
	}
	time.Sleep(time.Until(end.Add(time.Second)))
	h.want(t, "after the end", false, false)
}

// An opening admits, keeps its end over an apply, a boot and a heal, and ends by
// itself with its flows.
func TestTemporaryOpening(t *testing.T) {
	h := newTempHost(t)
	h.want(t, "before", false, false)
	h.must(t, "open", fmt.Sprint(tempPort), "--for", "15s")
	flows := []tempFlow{h.flow(t, h.host4), h.flow(t, h.host6)}
	end := h.end(t)

	h.must(t, "apply", h.files[1])
	if e := h.end(t); !e.Equal(end) {
		t.Errorf("an apply moves the end from %s to %s", end, e)
	}
	h.want(t, "after an apply", true, true)

	if err := h.Command(t.Context(), []string{"nft", "delete", "table", "inet", "deadlight"}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	h.must(t, "apply", "--boot", h.files[1])
	if e := h.end(t); !e.Equal(end) {
		t.Errorf("a boot moves the end from %s to %s", end, e)
	}
	h.want(t, "after a boot", true, true)
	for _, f := range flows {
		if time.Now().Before(end.Add(-2*time.Second)) && !f.lives(t) {
			t.Error("a flow is cut before the end")
		}
	}

	h.endsAt(t, end)
	for _, f := range flows {
		if f.lives(t) {
			t.Error("a flow outlives the end")
		}
	}
	if list := h.settled(t).Temporary; len(firewall.Running(list, time.Now())) > 0 {
		t.Errorf("the state takes it for open still: %v", list)
	}
	// Nobody brings it back: neither an apply, nor a boot, nor a rollback.
	for _, again := range [][]string{{"apply", h.files[1]}, {"apply", "--boot", h.files[1]}, {"rollback"}, {"apply", h.files[0]}} {
		h.must(t, again...)
		h.want(t, "after "+strings.Join(again[:1], " "), false, false)
	}
}

// What watch puts back has the end that it had.
func TestTemporaryHealed(t *testing.T) {
	h := newTempHost(t)
	h.must(t, "open", fmt.Sprint(tempPort), "--for", "12s")
	end := h.end(t)
	ctx, stop := context.WithCancel(t.Context())
	watched := make(chan error, 1)
	var said lockedBuffer
	go func() {
		watched <- h.Command(ctx, []string{"deadlight", "watch", "--heal", "--state-dir", h.state}, &said, &said)
	}()
	await(t, "watch", func() bool { return strings.Contains(said.String(), "clean") })
	if err := h.Command(t.Context(), []string{"nft", "delete", "table", "inet", "deadlight"}, os.Stderr, os.Stderr); err != nil {
		t.Fatal(err)
	}
	await(t, "a heal", func() bool { return strings.Contains(said.String(), "healed") })
	stop()
	<-watched
	if e := h.end(t); !e.Equal(end) {
		t.Errorf("a heal moves the end from %s to %s", end, e)
	}
	h.endsAt(t, end)
}

// Blocks win over openings and end flows; what ends them lets in again; so does
// their own end.
func TestTemporaryBlock(t *testing.T) {
	h := newTempHost(t)
	h.must(t, "open", fmt.Sprint(tempPort), "--for", "1h", "--from", "203.0.113.0/24,2001:db8:77::/48")
	four, six := h.flow(t, h.host4), h.flow(t, h.host6)
	h.must(t, "block", peer4)
	if four.lives(t) {
		t.Error("a flow outlives a block")
	}
	if !six.lives(t) {
		t.Error("a block of IPv4 ends a flow over IPv6")
	}
	for _, to := range []netip.Addr{h.host4, h.host6} {
		// The control port is blocked too, so that it is asked for by the other family.
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(to, tempPort).String(), 700*time.Millisecond)
		if (err == nil) != to.Is6() {
			t.Errorf("with IPv4 blocked, %s: %v", to, err)
		}
		if c := errNil(c, err); c != nil {
			c.Close()
		}
	}
	h.must(t, "unblock", peer4)
	h.want(t, "unblocked", true, true)
	h.must(t, "block", "203.0.113.16/28", "--for", "3s")
	if c, err := net.DialTimeout("tcp", netip.AddrPortFrom(h.host4, tempPort).String(), 700*time.Millisecond); err == nil {
		c.Close()
		if ends := h.settled(t).Temporary[1].Expires; time.Now().Before(ends) {
			t.Error("a block of a network blocks nobody")
		}
	}
	time.Sleep(4 * time.Second)
	h.want(t, "after the end of a block", true, true)

	four = h.flow(t, h.host4)
	h.must(t, "close", fmt.Sprint(tempPort))
	h.want(t, "closed", false, false)
	if four.lives(t) || six.lives(t) {
		t.Error("a flow outlives a close")
	}
}

// An opening by an interface or from an address is for nobody else.
func TestTemporaryNarrow(t *testing.T) {
	h := newTempHost(t)
	port := fmt.Sprint(tempPort)
	h.must(t, "open", port, "--for", "1h", "--from", peer4)
	h.want(t, "from an IPv4 address", true, false)
	h.must(t, "close", port)
	h.must(t, "open", port, "--for", "1h", "--interface", "wg0")
	h.want(t, "by another interface", false, false)
	h.must(t, "open", port, "--for", "1h", "--interface", "eth*")
	h.want(t, "by this interface", true, true)
}

// The operator's own session is cut neither by a block nor by a close, unless
// asked for.
func TestTemporaryLockout(t *testing.T) {
	l := newSSHLab(t)
	host := l.host4.String()
	console := func(args ...string) {
		t.Helper()
		var errs bytes.Buffer
		if err := l.Command(t.Context(), append(append([]string{l.file("deadlight")}, args...), "--state-dir", l.file("state")), io.Discard, &errs); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, errs.String())
		}
	}
	console("apply", l.file("cuts.toml"))
	console("open", "2222", "--from", peer4, "--for", "1h")
	before := l.table(t)
	for command, want := range map[string]string{
		"block " + peer4:               `block "tmp-hosts" is temporary: an opening does not win over it`,
		"block 203.0.113.0/24":         `block "tmp-203.0.113.0-24" is temporary`,
		"close 2222":                   "hint: add \"" + peer4 + "\" to from of [open.ssh]",
		"block " + peer4 + " --for 1s": "or pass --accept-lockout",
	} {
		r := l.ssh(t, host, "%s", command)
		fact := "error: your own SSH session from " + peer4 + " to 2222/tcp by eth0 would be cut: "
		if r.code != "3" || !strings.Contains(r.out, fact) || !strings.Contains(r.out, want) {
			t.Errorf("%s: exit %s, want 3, %q and %q:\n%s", command, r.code, fact, want, r.out)
		}
	}
	if after := l.table(t); withoutTimes(after) != withoutTimes(before) {
		t.Errorf("refused, and the ruleset has changed:\n%s\n%s", before, after)
	}
	// Who is in by a temporary opening may apply what keeps it, and is told of its end.
	r := l.ssh(t, host, "%s", "apply cuts.toml")
	if want := `when open "tmp-2222-tcp" expires`; r.code != "0" || !strings.Contains(r.out, want) {
		t.Errorf("apply: exit %s, want 0 and %q:\n%s", r.code, want, r.out)
	}
	r = l.ssh(t, host, "%s", "block 192.0.2.9 --for 1h")
	if r.code != "0" {
		t.Errorf("a block of somebody else: exit %s:\n%s", r.code, r.out)
	}
	r = l.ssh(t, host, "%s", "block --accept-lockout "+peer4)
	if r.code != "0" || !strings.Contains(l.table(t), "elements = { "+peer4) {
		t.Errorf("--accept-lockout: exit %s:\n%s", r.code, r.out)
	}
}

// withoutTimes leaves out of a listing what runs down, and who knocked.
func withoutTimes(text string) string {
	var out []string
	for _, line := range strings.Split(withoutKnocks(text), "\n") {
		line, _, _ = strings.Cut(line, " expires ")
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// Whatever is killed at whatever instant, the state says what the kernel holds, and
// the next command works.
func TestTemporaryKill(t *testing.T) {
	h := newTrialHost(t)
	h.must(t, "apply", h.files[0])
	random := rand.New(rand.NewPCG(5, 6))
	commands := [][]string{
		{"open", "8443", "--for", "1h"}, {"close", "8443"}, {"block", "192.0.2.9"}, {"open", "8444", "--for", "1h"}, {"unblock", "192.0.2.9"}, {"close", "8444"},
	}
	begun := time.Now()
	for _, c := range commands {
		h.must(t, c...)
	}
	usual := time.Since(begun) / time.Duration(len(commands))
	killed := 0
	for i := range 24 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.Int64N(int64(usual*12/10))))
		err := h.deadlight(ctx, commands[i%len(commands)]...)
		if ctx.Err() != nil && err != nil {
			killed++
		} else if err != nil {
			t.Fatal(err)
		}
		cancel()
		r := h.settled(t) // what the kernel holds is what the state says, and nothing else
		holds := tableOf(t, h.lab)
		for _, x := range r.Temporary {
			if !strings.Contains(holds, x.Chain()) || x.IsBan() && !strings.Contains(holds, x.What()) {
				t.Fatalf("kill %d: the state says %s, and the kernel does not hold it", i, x.What())
			}
		}
	}
	if killed == 0 {
		t.Error("nothing was killed: this test shows nothing")
	}
	for _, c := range commands {
		h.must(t, c...)
	}
	if list := h.settled(t).Temporary; len(list) > 0 {
		t.Errorf("all is closed, and the state says %v", list)
	}
}

// What the kernel does to a packet is what the policy with the temporary rules
// decides: verify sees an opening as meant, and without the state as a finding.
func TestTemporaryVerified(t *testing.T) {
	h := newTempHost(t)
	h.must(t, "open", fmt.Sprint(tempPort), "--for", "1h", "--from", peer4)
	h.must(t, "open", "8080", "--for", "1h")
	for dir, want := range map[string]int{h.state: exitOK, filepath.Join(t.TempDir(), "none"): exitFindings} {
		var out bytes.Buffer
		err := h.Command(t.Context(), []string{"deadlight", "verify", h.files[0], "--ports", "tcp", "--state-dir", dir}, &out, &out)
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if code != want {
			t.Errorf("verify with %s exits with %d, want %d:\n%s", dir, code, want, out.String())
		}
	}
	r := h.settled(t)
	if names := []string{r.Temporary[0].Name, r.Temporary[1].Name}; names[0] != "tmp-18443-tcp" || names[1] != "tmp-8080-tcp" {
		t.Errorf("they are named %q", names)
	}
}

// A time is written as it is read.
func TestSpans(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "2h": 2 * time.Hour, "1d": day, "1d12h": 36 * time.Hour, "365d": 365 * day, "1h30m": 90 * time.Minute, "1.5h": 90 * time.Minute,
	} {
		got, err := parseSpan(text)
		if err != nil || got != want {
			t.Errorf("%s is read as %s, %v", text, got, err)
		}
		if again, err := parseSpan(spanText(got)); err != nil || again != got {
			t.Errorf("%s is written as %s", text, spanText(got))
		}
	}
	for _, text := range []string{"", "d", "1", "-1h", "1d-1h", "1dd", "99999999999d", "h", "1h1d", "1.5d", " 1h"} {
		if got, err := parseSpan(text); err == nil {
			t.Errorf("%q is read as %s", text, got)
		}
	}
	var v spanValue
	for _, text := range []string{"0s", "999ms", "366d", "365d1s"} {
		if err := v.Set(text); err == nil {
			t.Errorf("--for takes %s", text)
		}
	}
	if got := rules.MergeAddrs(nil); got != nil {
		t.Errorf("no addresses are %v", got)
	}
}

// There are never more rules than packets can be asked for one by one; as many as
// that work.
func TestTemporaryMost(t *testing.T) {
	h := newTempHost(t)
	change := func(n int) error {
		return h.Host(func() error {
			e := env{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard}
			_, _, err := changeTemporary(e, temporaryFlags{state: &h.state}, "deadlight block", func(*rules.Policy, []firewall.Temporary) ([]firewall.Temporary, error) {
				var list []firewall.Temporary
				for i := range n {
					a := netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 1})
					list = append(list, firewall.Temporary{Temporary: rules.Temporary{Block: true, From: []rules.AddrRange{{Lo: a, Hi: a.Next()}}}})
				}
				return list, nil
			})
			return err
		})
	}
	if err := change(mostTemporary); err != nil {
		t.Fatal(err)
	}
	if n := len(h.settled(t).Temporary); n != mostTemporary {
		t.Errorf("%d rules", n)
	}
	var x *exitError
	if err := change(mostTemporary + 1); !errors.As(err, &x) || x.code != exitRefused {
		t.Errorf("one more: %v", err)
	}
	begun := time.Now()
	h.must(t, "unblock", "10.0.0.1-10.0.0.2")
	t.Logf("one less takes %s", time.Since(begun).Round(time.Millisecond))
	if n := len(h.settled(t).Temporary); n != mostTemporary-1 {
		t.Errorf("%d rules", n)
	}
}

// Ten thousand addresses are blocked by one rule; one more, one less and one for
// longer are one element, whatever else the table holds. Each ends by itself.
func TestTemporaryBans(t *testing.T) {
	h := newTempHost(t)
	h.must(t, "open", fmt.Sprint(tempPort), "--for", "1h")
	change := func(n int) error {
		return h.Host(func() error {
			e := env{stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard}
			_, _, err := changeTemporary(e, temporaryFlags{state: &h.state}, "deadlight block", func(_ *rules.Policy, list []firewall.Temporary) ([]firewall.Temporary, error) {
				end := time.Now().Add(time.Hour).Truncate(time.Millisecond)
				for i := range n {
					a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
					list = append(list, firewall.Temporary{Temporary: rules.Temporary{Block: true, From: []rules.AddrRange{{Lo: a, Hi: a}}, Expires: end}})
				}
				return list, nil
			})
			return err
		})
	}
	var x *exitError
	if err := change(mostBans + 1); !errors.As(err, &x) || x.code != exitRefused {
		t.Errorf("more than there may be: %v", err)
	}
	if err := change(10_000); err != nil {
		t.Fatal(err)
	}
	nft := func(args ...string) string {
		t.Helper()
		var out bytes.Buffer
		if err := h.Command(t.Context(), append([]string{"nft"}, args...), &out, &out); err != nil {
			t.Fatalf("%v: %s", err, out.Bytes())
		}
		return out.String()
	}
	const set4 = "block_tmp-hosts_from4"
	elements := func() string { return nft("list", "set", "inet", "deadlight", set4) }
	// The handles of chains, rules and sets: what is written anew gets another.
	handles := func() string {
		var out []string
		for _, l := range strings.Split(nft("-a", "-t", "list", "table", "inet", "deadlight"), "\n") {
			if _, handle, ok := strings.Cut(l, "# handle "); ok {
				out = append(out, handle)
			}
		}
		return strings.Join(out, " ")
	}
	before := handles()
	begun := time.Now()
	h.must(t, "block", peer4, "--for", "1h")
	t.Logf("one more takes %s", time.Since(begun).Round(time.Millisecond))
	h.must(t, "block", "2001:db8:bad::9")
	h.must(t, "block", "10.0.0.7", "--for", "3h")
	h.must(t, "block", "10.0.0.8")
	h.must(t, "unblock", "10.0.0.9")
	if after := handles(); after != before {
		t.Errorf("more than elements was written: %s, before %s", after, before)
	}
	h.settled(t)
	text := elements()
	if strings.Contains(text, "10.0.0.9 ") || !strings.Contains(text, "10.0.0.7 timeout 2h59m") || strings.Contains(text, "10.0.0.8 timeout") || !strings.Contains(text, peer4+" timeout 59m") {
		t.Errorf("unexpected elements:\n%.2000s", text)
	}
	blocked := func(when string, want bool) {
		t.Helper()
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(h.host4, tempPort).String(), 700*time.Millisecond)
		if c := errNil(c, err); c != nil {
			c.Close()
		}
		if (err != nil) != want {
			t.Errorf("%s: %v", when, err)
		}
	}
	blocked("blocked", true)

	// They survive what replaces the policy, with their ends.
	ends := func() string {
		var out []string
		for _, x := range h.settled(t).Temporary {
			out = append(out, x.What()+" "+x.Expires.String())
		}
		return strings.Join(out, "\n")
	}
	was := ends()
	for _, again := range [][]string{{"apply", h.files[1]}, {"apply", h.files[0], "--confirm", "1h", "--no-wait"}, {"rollback"}, {"apply", "--boot", h.files[0]}} {
		h.must(t, again...)
		blocked("after "+again[0], true)
		if again[0] != "apply" || len(again) == 2 {
			if now := ends(); now != was {
				t.Errorf("after %s: other blocks or ends", again[0])
			}
		}
	}

	// Whoever takes one away by hand is told of, and undone by the next change.
	nft("delete", "element", "inet", "deadlight", set4, "{ "+peer4+" }")
	var said bytes.Buffer
	if err := h.Command(t.Context(), []string{"deadlight", "drift", "--state-dir", h.state}, &said, &said); err == nil || !strings.Contains(said.String(), peer4) {
		t.Errorf("drift: %v\n%s", err, said.Bytes())
	}
	h.must(t, "block", peer4, "--for", "3s")
	if !strings.Contains(elements(), peer4+" timeout 2s") {
		t.Error("what drift told of is not undone")
	}
	await(t, "the end of a block", func() bool { return !strings.Contains(elements(), peer4+" ") })
	blocked("after its end", false)
	h.settled(t)
}
