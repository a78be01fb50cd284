package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"

	"deadlight/firewall"
)

// lockedNamespace runs fn on a thread of a network namespace, or of a new one
// for nil, and hands the namespace out.
func lockedNamespace(t *testing.T, ns *os.File, fn func(ns *os.File)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends here
		var err error
		if ns != nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		} else if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns, err = os.Open("/proc/thread-self/ns/net")
		}
		if err != nil {
			t.Errorf("network namespace: %v", err)
			return
		}
		fn(ns)
	}()
	<-done
}

// The service manager hears when the first comparison is done, what the state
// is, that we live and that we stop; node_exporter's own library reads what we
// wrote.
func TestWatchTellsSystemdAndNodeExporter(t *testing.T) {
	dir := t.TempDir()
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	t.Setenv("WATCHDOG_USEC", "100000")
	heard := func(want string) string {
		t.Helper()
		buf := make([]byte, 1<<12)
		for {
			if err := socket.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
				t.Fatal(err)
			}
			n, err := socket.Read(buf)
			if err != nil {
				t.Fatalf("no %s: %v", want, err)
			}
			if got := string(buf[:n]); strings.HasPrefix(got, want) {
				return got
			} else if strings.HasPrefix(got, "READY") || strings.HasPrefix(got, "STOPPING") {
				t.Fatalf("%q before %q", got, want)
			}
		}
	}
	policy, file, state := filepath.Join(dir, "policy.toml"), filepath.Join(dir, "deadlight.prom"), filepath.Join(dir, "state")
	if err := os.WriteFile(policy, []byte("version = 1\n[open.web]\nports = 80\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var ns *os.File
	lockedNamespace(t, nil, func(own *os.File) {
		ns = own
		var out bytes.Buffer
		if code := run([]string{"apply", "--state-dir", state, policy}, env{stdout: &out, stderr: &out}); code != 0 {
			t.Errorf("apply: exit %d: %s", code, out.Bytes())
		}
	})
	if t.Failed() {
		return
	}
	defer ns.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var log bytes.Buffer // read after the end
	go lockedNamespace(t, ns, func(*os.File) {
		ended <- watch(ctx, env{stderr: &log}, state, firewall.GuardOptions{Heal: true, Interval: time.Hour}, file)
	})
	if got := heard("READY=1"); !strings.Contains(got, "\nSTATUS=clean: ") {
		t.Errorf("ready: %q", got)
	}
	lockedNamespace(t, ns, func(*os.File) {
		if out, err := exec.Command("nft", "flush", "ruleset").CombinedOutput(); err != nil {
			t.Errorf("nft: %v %s", err, out)
		}
	})
	if got := heard("STATUS=healed: "); !strings.Contains(got, "changed by nft (pid ") {
		t.Errorf("status: %q", got)
	}
	heard("WATCHDOG=1")
	cancel()
	heard("STOPPING=1")
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("watch: %v", err)
	}
	families := parseMetrics(t, file)
	want := map[string]float64{"deadlight_drift": 0, "deadlight_heals_total": 1, "deadlight_events_lost_total": 0}
	for name, value := range want {
		if got := families[name]; got == nil || number(got.Metric[0]) != value {
			t.Errorf("%s = %v, want %v", name, got, value)
		}
	}
	if n := number(families["deadlight_events_total"].Metric[0]); n < 1 {
		t.Errorf("deadlight_events_total = %v", n)
	}
	if at := number(families["deadlight_last_check_timestamp_seconds"].Metric[0]); time.Since(time.Unix(int64(at), 0)).Abs() > time.Hour {
		t.Errorf("deadlight_last_check_timestamp_seconds = %v", at)
	}
	if f := families["deadlight_packets_total"]; f == nil || len(f.Metric) < 3 || f.Metric[0].Label[0].GetName() != "counter" {
		t.Errorf("deadlight_packets_total = %v", f)
	}
	if !strings.Contains(log.String(), "drift: 1 difference") {
		t.Errorf("log:\n%s", log.Bytes())
	}
	// deadlight drift knows who it was, afterwards.
	noted, err := os.ReadFile(filepath.Join(state, "actors"))
	if err != nil || !bytes.Contains(noted, []byte("nft")) {
		t.Errorf("noted: %s, %v", noted, err)
	}
}

func parseMetrics(t *testing.T, file string) map[string]*dto.MetricFamily {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(f)
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func number(m *dto.Metric) float64 { return m.GetCounter().GetValue() + m.GetGauge().GetValue() }

func TestMetricsAreReplacedWhole(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.prom")
	m := newMetrics(file)
	for n := range uint64(3) {
		stats := firewall.Stats{Transactions: n, Lost: n, Heals: n, Generation: 7, Drift: n == 1}
		if err := m.write(stats, map[string]firewall.Counter{"c_dropped": {Packets: n}, "odd\"\n\xff": {Packets: n}}); err != nil {
			t.Fatal(err)
		}
		families := parseMetrics(t, file)
		if len(families) != 7 {
			t.Errorf("%d families", len(families))
		}
		if got := number(families["deadlight_heals_total"].Metric[0]); got != float64(n) {
			t.Errorf("heals = %v, want %d", got, n)
		}
		if got := number(families["deadlight_packets_total"].Metric[0]); got != float64(n) {
			t.Errorf("packets = %v, want %d", got, n)
		}
	}
	if err := newMetrics(filepath.Join(t.TempDir(), "none", "a.prom")).write(firewall.Stats{}, nil); err == nil {
		t.Error("a directory that is not there is no error")
	}
}

func TestDaemonLog(t *testing.T) {
	now := time.Unix(1000, 0)
	var b bytes.Buffer
	l := &daemonLog{w: &b, journal: true, now: func() time.Time { return now }, left: 2}
	for range 4 {
		l.print(levelError, "%s", "x")
	}
	now = now.Add(time.Second)
	l.print(levelInfo, "y")
	want := "<3>deadlight: x\n<3>deadlight: x\n<4>deadlight: 2 lines not logged: too much happens\n<6>deadlight: y\n"
	if b.String() != want {
		t.Errorf("log:\n%s", b.String())
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if toJournal(f, "") || toJournal(f, "1:2") || toJournal(&b, "") {
		t.Error("a file that the journal did not name is taken for it")
	}
}

// A process chooses its own name and arguments.
func TestWatchEscapesWhatAProcessSays(t *testing.T) {
	_, text := sentence(firewall.Report{Kind: firewall.ReportDrift, By: []firewall.Actor{{PID: 1, Comm: "a\nb", Command: "\x1b[2Jx\n<3>deadlight: forged"}}})
	if strings.ContainsAny(text, "\n\x1b") {
		t.Errorf("%q", text)
	}
}
