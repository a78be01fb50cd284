package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"deadlight/verify"
)

const ownPolicy = `version = 1
[open.web]
ports = 80
interfaces = "eth0"
[open.lan]
ports = 9000
protocol = ["tcp", "udp"]
interfaces = "br0"
[open.ssh]
ports = 22
from = "198.51.100.0/24"
`

// ownHost is a host that verifies itself: packets are held against the way back.
func ownHost(t *testing.T, policy string) (w *verify.World, state, file string) {
	t.Helper()
	w, err := verify.NewWorld(verify.WorldConfig{
		Host4: netip.MustParseAddr("203.0.113.10"), Host6: netip.MustParseAddr("2001:db8:77::10"), Links: []string{"eth0", "br0"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	state, file = filepath.Join(t.TempDir(), "state"), filepath.Join(t.TempDir(), "policy.toml")
	if err := os.WriteFile(file, []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	own(t, w, "sh", "-c", `ip addr add 10.1.0.1/24 dev br0 && ip addr add fd01::1/64 dev br0 nodad
for i in all eth0 br0; do echo 1 >/proc/sys/net/ipv4/conf/$i/rp_filter; done`)
	own(t, w, "deadlight", "apply", "--state-dir", state, file)
	return w, state, file
}

// own runs a program on a host, which must succeed, and gives what it printed.
func own(t *testing.T, w *verify.World, argv ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if err := w.Command(t.Context(), argv, &out, &errs); err != nil {
		t.Fatalf("%s: %v\n%s%s", argv, err, out.String(), errs.String())
	}
	return out.String()
}

// holds is all of a host that a verification could change; what it was told of
// addresses on its links the kernel forgets by itself.
func holds(t *testing.T, w *verify.World, strays bool) string {
	t.Helper()
	out := own(t, w, "sh", "-c", `ip -d link; ip addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all
tc qdisc; tc filter show dev eth0 ingress; tc filter show dev eth0 egress; nft list ruleset; ip neigh`)
	// A run that is killed does not put back who knocked; that ages by itself.
	out = withoutKnocks(out)
	out = regexp.MustCompile(`packets \d+ bytes \d+`).ReplaceAllString(out, "")
	if !strays {
		out = regexp.MustCompile(`(?m)^.* lladdr 06:64:6c:76:.*\n`).ReplaceAllString(out, "")
	}
	return out
}

// TestSoakVerifyKill kills verifications at random instants: the host is as before,
// and the next one finds and removes what is left. The full count runs when the test
// is asked for by name: go test -run Soak.
func TestSoakVerifyKill(t *testing.T) {
	runs := 10
	if strings.Contains(flag.Lookup("test.run").Value.String(), "Soak") {
		runs = 50
	}
	w, state, file := ownHost(t, ownPolicy)
	before := holds(t, w, true)
	verification := []string{"verify", "--state-dir", state, "--ports", "1-3000/tcp,1-3000/udp", file}
	began := time.Now()
	own(t, w, append([]string{"deadlight"}, verification...)...)
	whole := time.Since(began)
	if after := holds(t, w, true); after != before {
		t.Fatalf("after a whole run the host was\n%s\nand is\n%s", before, after)
	}
	within := 0 // killed while they had something on the host
	for range runs {
		cmd := exec.Command("deadlight", verification...)
		cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
		if err := w.Host(cmd.Start); err != nil {
			t.Fatal(err)
		}
		time.Sleep(rand.N(whole))
		if strings.Contains(holds(t, w, true), "dlv0") {
			within++
		}
		_ = cmd.Process.Kill() // it may just have ended
		err := cmd.Wait()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		// The kernel takes namespaces down behind our back.
		var after string
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if after = holds(t, w, false); after == before || time.Now().After(end) {
				break
			}
		}
		if after != before {
			t.Fatalf("killed; the host was\n%s\nand is\n%s", before, after)
		}
	}
	t.Logf("%d of %d were killed while they had something on the host", within, runs)
	if within == 0 {
		t.Error("no run was killed in its midst")
	}
	own(t, w, append([]string{"deadlight"}, verification...)...)
	if after := holds(t, w, true); after != before {
		t.Errorf("after the last run the host was\n%s\nand is\n%s", before, after)
	}
	if out := own(t, w, "deadlight", "drift", "--state-dir", state); !strings.HasPrefix(out, "No drift") {
		t.Error(out)
	}
}

// withoutKnocks leaves out of a listing who knocked: any packet may.
func withoutKnocks(text string) string {
	return regexp.MustCompile(`(set knocks[46]?(?:_alt)? \{[^}]*?)\n\t\telements = \{[^}]*\}`).ReplaceAllString(text, "$1")
}
