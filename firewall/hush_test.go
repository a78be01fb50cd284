package firewall

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// awaitListeners waits until as many sockets of the namespace listen.
func awaitListeners(t *testing.T, want int) {
	t.Helper()
	var list []Listener
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var err error
		if list, err = Listeners(); err != nil {
			t.Fatal(err)
		}
		if len(list) == want {
			return
		}
	}
	t.Fatalf("%d listen, want %d: %v", len(list), want, list)
}

// A watch stops listening while it is asked to, and finds afterwards what was
// done meanwhile.
func TestGuardHushes(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		d := guard(t, ruleset(t, little), GuardOptions{})
		d.await(ReportClean)
		awaitListeners(t, 1)
		d.applied.hushed.Store(true)
		awaitListeners(t, 0)
		nft(t, "insert rule inet deadlight gate accept")
		d.applied.hushed.Store(false)
		d.await(ReportDrift)
		awaitListeners(t, 1)
	})
}

func TestHush(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	a, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	hushed := func() bool {
		b, err := OpenState(dir)
		if err != nil {
			t.Fatal(err)
		}
		is, err := b.Hushed()
		if err != nil {
			t.Fatal(err)
		}
		return is
	}
	if hushed() {
		t.Error("hushed before anything was written")
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	done, err := a.Hush()
	if err != nil {
		t.Fatal(err)
	}
	if !hushed() {
		t.Error("not hushed")
	}
	if err := done(); err != nil {
		t.Fatal(err)
	}
	if hushed() {
		t.Error("still hushed")
	}
}

// A load of many elements asks for silence, one of a few does not.
func TestManyElementsAreLoadedInSilence(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		c := dial(t)
		asked, ended := 0, 0
		c.Hush = func(n int) (func() error, error) {
			asked = n
			return func() error { ended++; return nil }, nil
		}
		mustApply(t, c, listRuleset(t, listPolicy, networks(100)))
		if asked != 0 {
			t.Errorf("asked for %d elements", asked)
		}
		lines := make([]string, 2*manyElements)
		for i := range lines {
			lines[i] = fmt.Sprintf("10.%d.%d.%d", i>>15, i>>7&0xff, i&0x7f*2)
		}
		mustApply(t, c, listRuleset(t, listPolicy, lines))
		if asked < len(lines)*9/10 || ended != 1 {
			t.Errorf("asked for %d elements of %d, ended %d times", asked, len(lines), ended)
		}
	})
}
