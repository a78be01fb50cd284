package verify

import (
	"bytes"
	"errors"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"deadlight/rules"

	"golang.org/x/sys/unix"
)

// testGate is the shape of the product's ruleset: a gate before DNAT that drops,
// beside it a foreign redirect and a foreign chain that drops later.
const testGate = `
table inet deadlight {
	comment "managed by deadlight"
	chain gate {
		type filter hook prerouting priority -110; policy drop;
		tcp dport { 22, 443, 8443 } counter accept
		udp dport 53 counter accept
		meta nfproto ipv6 udp dport 5353 counter accept
		counter drop
	}
}
table inet foreign {
	chain rewrite {
		type nat hook prerouting priority -100; policy accept;
		tcp dport 8443 redirect to :9
	}
	chain late {
		type filter hook input priority 100; policy accept;
		tcp dport 443 drop
	}
}
`

// nft runs the tool inside the host, as a witness that shares no code with us.
func nft(t *testing.T, w *World, stdin string, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	if err := w.Host(func() error {
		cmd := exec.Command("nft", args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
		return cmd.Run()
	}); err != nil {
		t.Fatalf("nft %v: %v\n%s", args, err, out.String())
	}
	return out.String()
}

func armTestTripwire(t *testing.T, w *World, ports ...uint16) *Tripwire {
	t.Helper()
	trip, err := ArmTripwire(w.Host, ports)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { trip.Remove() })
	return trip
}

var (
	testSrc4 = netip.MustParseAddr("203.0.113.50")
	testSrc6 = netip.MustParseAddr("2001:db8:50::50")
)

func TestTripwireNamesExactlyWhatPassed(t *testing.T) {
	w := newTestWorld(t, "eth0")
	nft(t, w, testGate, "-f", "-")
	trip := armTestTripwire(t, w, 20001, 20002, 20003)
	wire := newTestWire(t, w.Link("eth0"))
	const n = 3000 // ports 1-3000, and the high ones below
	sent := map[rules.Protocol]map[uint16]uint64{rules.TCP: {20003: 0}, rules.UDP: {20003: 0}}
	for _, path := range []struct {
		src, dst netip.Addr
		port     uint16
	}{{testSrc4, testHost4, 20001}, {testSrc6, testHost6, 20002}} {
		for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
			for port := uint16(1); port <= n; port++ {
				wire.send(t, path.src, path.dst, p, path.port, port)
			}
			for _, port := range []uint16{5353, 8443, 65535} {
				wire.send(t, path.src, path.dst, p, path.port, port)
			}
			wire.send(t, path.src, path.dst, p, path.port+100, 22) // nobody's source port
			sent[p][path.port] = n + 3
		}
	}

	arrived, err := trip.Arrived()
	if err != nil {
		t.Fatal(err)
	}
	for p, counts := range sent {
		for port, want := range counts {
			if got, ok := arrived[p][port]; !ok || got != want {
				t.Errorf("%v from %d: %d arrived, %v, want %d", p, port, got, ok, want)
			}
		}
		if len(arrived[p]) != 3 {
			t.Errorf("%v: %v, want three source ports", p, arrived[p])
		}
	}

	gate, err := trip.GatePassed()
	if err != nil {
		t.Fatal(err)
	}
	wantGate := []Passage{
		{20001, 22, rules.TCP, false}, {20001, 443, rules.TCP, false}, {20001, 8443, rules.TCP, false}, {20001, 53, rules.UDP, false},
		{20002, 22, rules.TCP, true}, {20002, 443, rules.TCP, true}, {20002, 8443, rules.TCP, true}, {20002, 53, rules.UDP, true}, {20002, 5353, rules.UDP, true},
	}
	if !slices.Equal(gate, wantGate) {
		t.Errorf("passed the gate: %v\nwant %v", gate, wantGate)
	}
	// 443 is dropped behind the gate; 8443 is 9 by now, and still 8443 on the wire.
	want := slices.DeleteFunc(slices.Clone(wantGate), func(p Passage) bool { return p.DstPort == 443 })
	passed, err := trip.Passed()
	if err != nil || !slices.Equal(passed, want) {
		t.Errorf("passed: %v, %v\nwant %v", passed, err, want)
	}
}

// Untracked and invalid packets have no original port, and forwarded ones end elsewhere.
func TestTripwireSeesOddPaths(t *testing.T) {
	w := newTestWorld(t, "eth0", "docker0")
	nft(t, w, `
table inet odd {
	chain raw { type filter hook prerouting priority -300; tcp dport 100-199 notrack; }
	chain rewrite { type nat hook prerouting priority -100; ip daddr 198.51.100.1 tcp dport 300 dnat ip to 172.17.0.2:80; }
}
`, "-f", "-")
	if err := w.Host(func() error { return setNetSysctl("ipv4/ip_forward", "1") }); err != nil {
		t.Fatal(err)
	}
	if err := w.Route(netip.MustParsePrefix("172.17.0.0/16"), "docker0"); err != nil {
		t.Fatal(err)
	}
	trip := armTestTripwire(t, w, 20001)
	wire := newTestWire(t, w.Link("eth0"))
	for _, port := range []uint16{150, 300, 400} {
		wire.send(t, testSrc4, testHost4, rules.TCP, 20001, port)
	}
	xmas := testFrame(wire.link, testSrc4, testHost4, rules.TCP, 20001, 500)
	xmas[14+20+13] = 0x29 // a checksum that conntrack does not like either: invalid
	if _, err := unix.Write(wire.fd, xmas); err != nil {
		t.Fatal(err)
	}
	want := []Passage{{20001, 150, rules.TCP, false}, {20001, 300, rules.TCP, false}, {20001, 400, rules.TCP, false}, {20001, 500, rules.TCP, false}}
	for name, read := range map[string]func() ([]Passage, error){"gate": trip.GatePassed, "all": trip.Passed} {
		if got, err := read(); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v\nwant %v", name, got, err, want)
		}
	}
}

func TestTripwireReportsOverflow(t *testing.T) {
	w := newTestWorld(t, "eth0")
	trip, err := armTripwire(w.Host, []uint16{20001}, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer trip.Remove()
	wire := newTestWire(t, w.Link("eth0"))
	for _, n := range []int{16, 17} {
		for port := 1; port <= n; port++ {
			wire.send(t, testSrc4, testHost4, rules.UDP, 20001, uint16(port))
		}
		for name, read := range map[string]func() ([]Passage, error){"gate": trip.GatePassed, "all": trip.Passed} {
			got, err := read()
			if full := n > 16; len(got) != 16 || errors.Is(err, ErrTripwireFull) != full {
				t.Errorf("%d probes, %s: %d passages, %v; want 16 and overflow %v", n, name, len(got), err, full)
			}
		}
	}
}

// The tested ruleset is the same before, while and after, to the byte.
func TestTripwireLeavesOthersAlone(t *testing.T) {
	w := newTestWorld(t, "eth0")
	nft(t, w, testGate, "-f", "-")
	before := nft(t, w, "", "list", "ruleset")
	trip := armTestTripwire(t, w, 20001, 20002)
	if got := nft(t, w, "", "list", "table", "inet", "deadlight"); !strings.Contains(before, got) {
		t.Errorf("while armed:\n%s\nbefore:\n%s", got, before)
	}
	listing := nft(t, w, "", "list", "table", "inet", "deadlight_probe")
	for _, want := range []string{
		"tcp . 20001", "udp . 20002",
		"type inet_service . inet_service . inet_proto",
		"size 262144",
		"hook prerouting priority raw - 10; policy accept;",
		"hook prerouting priority dstnat - 9; policy accept;",
		"hook input priority 1073741824; policy accept;",
		"hook forward priority 1073741824; policy accept;",
		"add @passed4 { ct original proto-src . ct original proto-dst . meta l4proto } accept",
		"add @gate6 { th sport . th dport . meta l4proto } accept",
	} {
		if !strings.Contains(listing, want) {
			t.Errorf("no %q in the listing", want)
		}
	}
	if strings.Contains(listing, "drop") {
		t.Error("the tripwire drops something")
	}
	if t.Failed() || testing.Verbose() {
		t.Log(listing)
	}
	if _, err := ArmTripwire(w.Host, []uint16{20009}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("a second tripwire: %v, want EEXIST", err)
	}
	if err := trip.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := trip.Remove(); err != nil {
		t.Errorf("removed twice: %v", err)
	}
	if _, err := trip.Passed(); !errors.Is(err, unix.EBADF) {
		t.Errorf("read after removal: %v, want an error", err)
	}
	if after := nft(t, w, "", "list", "ruleset"); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
}

// A verifier that dies takes its table along.
func TestTripwireDiesWithItsSocket(t *testing.T) {
	w := newTestWorld(t, "eth0")
	trip := armTestTripwire(t, w, 20001)
	if got := nft(t, w, "", "list", "tables"); !strings.Contains(got, tripwireTable) {
		t.Fatalf("not armed: %s", got)
	}
	if err := trip.conn.CloseLasting(); err != nil {
		t.Fatal(err)
	}
	var got string
	for range 100 {
		if got = nft(t, w, "", "list", "tables"); got == "" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("still there: %s", got)
}

// Neither an innocent set of source ports nor a world elsewhere is written to.
func TestTripwireRefusals(t *testing.T) {
	w := newTestWorld(t, "eth0")
	for _, ports := range [][]uint16{nil, {}, {0}, {20001, 0}} {
		if _, err := ArmTripwire(w.Host, ports); err == nil {
			t.Errorf("armed for %v", ports)
		}
	}
	here, err := threadNetNS()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Host(func() error {
		_, err := newSetReader(here)
		return err
	}); err == nil || !strings.Contains(err.Error(), "another network") {
		t.Errorf("a socket of the host for the outside: %v, want a refusal", err)
	}
	failing := func(func() error) error { return unix.EPERM }
	if _, err := ArmTripwire(failing, []uint16{20001}); !errors.Is(err, unix.EPERM) {
		t.Errorf("error %v, want that of the runner", err)
	}
}

// Thousands of listeners must not push the tripwire's socket out of select's reach.
func TestTripwireBesideThousandsOfListeners(t *testing.T) {
	w := newTestWorld(t, "eth0")
	l, err := Listen(w.Host, SpreadPorts(nil, 1500), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	trip := armTestTripwire(t, w, 20001)
	if _, err := trip.Passed(); err != nil {
		t.Error(err)
	}

	var files []int
	defer func() {
		for _, fd := range files {
			unix.Close(fd)
		}
	}()
	for len(files) == 0 || files[len(files)-1] < lowFDs {
		fd, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, fd)
	}
	if _, err := ArmTripwire(newTestWorldElsewhere(t), []uint16{20001}); !errors.Is(err, unix.EMFILE) {
		t.Errorf("no low descriptor left: %v, want EMFILE", err)
	}
}

func newTestWorldElsewhere(t *testing.T) Runner { return newTestWorld(t, "eth0").Host }

// Everything passes: the worst case for the sets and for reading them.
func TestTripwireEveryPortPasses(t *testing.T) {
	w := newTestWorld(t, "eth0")
	trip := armTestTripwire(t, w, 20001, 20002)
	wire := newTestWire(t, w.Link("eth0"))
	began := time.Now()
	for _, path := range []struct {
		src, dst netip.Addr
		port     uint16
	}{{testSrc4, testHost4, 20001}, {testSrc6, testHost6, 20002}} {
		for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
			for port := 1; port < 1<<16; port++ {
				wire.send(t, path.src, path.dst, p, path.port, uint16(port))
			}
		}
	}
	t.Logf("sent in %v", time.Since(began))
	began = time.Now()
	arrived, err := trip.Arrived()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("arrivals read in %v", time.Since(began))
	for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
		for _, port := range []uint16{20001, 20002} {
			if got := arrived[p][port]; got != 65535 {
				t.Errorf("%v from %d: %d arrived", p, port, got)
			}
		}
	}
	for name, read := range map[string]func() ([]Passage, error){"gate": trip.GatePassed, "all": trip.Passed} {
		began = time.Now()
		got, err := read()
		t.Logf("%s: %d read in %v", name, len(got), time.Since(began))
		if err != nil || len(got) != 4*65535 {
			t.Fatalf("%s: %d passages, %v", name, len(got), err)
		}
		i := 0
		for _, v6 := range []bool{false, true} {
			for _, p := range []rules.Protocol{rules.TCP, rules.UDP} {
				for port := 1; port < 1<<16; port++ {
					want := Passage{20001, uint16(port), p, v6}
					if v6 {
						want.SrcPort = 20002
					}
					if got[i] != want {
						t.Fatalf("%s: passage %d is %v, want %v", name, i, got[i], want)
					}
					i++
				}
			}
		}
	}
}
