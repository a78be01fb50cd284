package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"deadlight/verify"
)

// auditProbing runs audit --verify on a host and gives what it says and its exit code.
func auditProbing(t *testing.T, w *verify.World, file string, more ...string) (out string, code int) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	err := w.Command(t.Context(), append([]string{"deadlight", "audit", "--verify", file}, more...), &stdout, &stderr)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	if code > exitFindings {
		t.Logf("stderr: %s", stderr.String())
	}
	return stdout.String(), code
}

// Beside what the policy and the rules say stands what a probe saw; what stops a port
// where no rule that audit reads does is a finding of the probe alone.
func TestAuditVerify(t *testing.T) {
	w, _, file := ownHost(t, ownPolicy)
	if err := w.Host(func() error {
		for _, at := range []string{"0.0.0.0:80", "0.0.0.0:5432", "127.0.0.1:6379", "[::]:22"} {
			network := "tcp"
			if at[0] != '[' {
				network = "tcp4"
			}
			l, err := net.Listen(network, at)
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close() })
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	out, code := auditProbing(t, w, file, "--json")
	var a struct {
		Findings []findingJSON
		Probe    struct{ Verdict, Proof string }
	}
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if code != exitOK || len(a.Findings) > 0 || a.Probe.Verdict != "pass" || a.Probe.Proof != "host" {
		t.Errorf("exit %d: %+v", code, a)
	}
	text, code := auditProbing(t, w, file)
	want := map[string]string{
		"0.0.0.0:80":     "open",
		"0.0.0.0:5432":   "filtered",
		"127.0.0.1:6379": "-",
		"[::]:22":        "filtered over IPv4 from ",
	}
	for at, probed := range want {
		i := slices.IndexFunc(strings.Split(text, "\n"), func(line string) bool {
			f := strings.Fields(line)
			return len(f) > 6 && f[1] == at && strings.HasPrefix(strings.Join(f[6:], " "), probed) // behind PROCESS (PID) USER UNIT
		})
		if i < 0 {
			t.Errorf("%s: no line says that it was seen %s:\n%s", at, probed, text)
		}
	}
	if code != exitOK || !strings.Contains(text, "open over IPv4 from 198.51.100.") || !strings.Contains(text, "probed: pass, against ") {
		t.Errorf("exit %d:\n%s", code, text)
	}

	// What probes knocked at is not counted as knocks.
	if status := own(t, w, "sh", "-c", "nft list set inet deadlight knocks"); strings.Contains(status, "elements") {
		t.Errorf("the probes stand among those who knocked:\n%.300s", status)
	}

	own(t, w, "sh", "-c", "iptables-legacy -I INPUT -p tcp --dport 80 -j DROP")
	text, code = auditProbing(t, w, file)
	if code != exitFindings || !strings.Contains(text, "PROBED  80/tcp expected open, and a probe found it filtered") || !strings.Contains(text, "probed: fail, against ") {
		t.Errorf("exit %d:\n%s", code, text)
	}
}
