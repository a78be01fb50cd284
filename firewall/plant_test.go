package firewall

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"deadlight/verify"
)

func TestPlantRedirect(t *testing.T) {
	w, err := verify.NewWorld(verify.WorldConfig{Host4: netip.MustParseAddr("203.0.113.10"), Links: []string{"eth0"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Host(func() error {
		c, err := Dial(nil)
		if err != nil {
			return err
		}
		return errors.Join(c.PlantRedirect(Redirect{From: 8081, To: 80}), c.Close())
	}); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := w.Command(t.Context(), []string{"nft", "list", "ruleset"}, &got, os.Stderr); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"table inet planted {", "type nat hook prerouting priority dstnat; policy accept;", "tcp dport 8081 redirect to :80"} {
		if !strings.Contains(got.String(), want) {
			t.Errorf("no %q in\n%s", want, got.String())
		}
	}
}

// The namespace that a process was started in may be the machine's.
func TestPlantRedirectRefuses(t *testing.T) {
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	c, err := Dial(own)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.PlantRedirect(Redirect{From: 8081, To: 80}); !errors.Is(err, ErrNamespace) {
		t.Errorf("got %v, want a refusal", err)
	}
	if s, err := c.Snapshot(plantedTable); err != nil || s.Present {
		t.Errorf("planted all the same: %v, %v", s.Present, err)
	}
}
