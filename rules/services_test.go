package rules

import (
	"slices"
	"strings"
	"testing"
)

func TestServiceTable(t *testing.T) {
	names := make(map[string]string) // name → the first column of its lines
	seen := make(map[string]bool)
	for line := range strings.Lines(serviceTable) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		if len(f) < 2 {
			t.Errorf("%q has no port", line)
			continue
		}
		port, word, _ := strings.Cut(f[1], "/")
		if p, ok := protocolNumber(word); !ok || !p.hasPorts() {
			t.Errorf("%q: unknown protocol", line)
		}
		if r, bad := parsePorts(port); bad != nil || r.Lo != r.Hi {
			t.Errorf("%q: %q is not a port", line, port)
		}
		for _, name := range slices.Concat(f[:1], f[2:]) {
			if !isTableName(name) {
				t.Errorf("%q: %q cannot be a name", line, name)
			}
			if first, ok := names[name]; ok && first != f[0] {
				t.Errorf("%q: %q is also %q", line, name, first)
			}
			names[name] = f[0]
			if seen[name+" "+f[1]] {
				t.Errorf("%q stands twice", line)
			}
			seen[name+" "+f[1]] = true
		}
	}
	if len(names) < 300 {
		t.Errorf("%d services, want at least 300", len(names))
	}
	got := builtinServices()
	if len(got) != len(names) {
		t.Errorf("%d services are read, want %d", len(got), len(names))
	}
	for name, want := range map[string]string{
		"ssh": "22/tcp", "domain": "53/tcp, 53/udp", "https": "443/tcp, 443/udp", "postgres": "5432/tcp", "ntp": "123/udp",
		"m3ua": "2905/sctp", "amqp": "5672/tcp, 5672/sctp", "wireguard": "51820/udp",
	} {
		if on := portList(got[name]); on != want {
			t.Errorf("%s is %s, want %s", name, on, want)
		}
	}
}

// Each protocol is read by the word it is written with.
func TestProtocolWords(t *testing.T) {
	for _, word := range protocolWords() {
		if _, ok := protocolNumber(word); !ok && word != "any" {
			t.Errorf("%q is suggested, but not understood", word)
		}
	}
	for p := range 256 {
		if n, ok := protocolNumber(Protocol(p).String()); ok && int(n) != p {
			t.Errorf("%v is read as %v", Protocol(p), n)
		}
	}
}
