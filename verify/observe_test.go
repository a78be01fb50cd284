package verify

import (
	"strings"
	"testing"
)

// Where nothing is enforced no run passes, and the report says why in its last line;
// what stops a port all the same is a finding.
func TestUnenforced(t *testing.T) {
	rs := compileText(t, "[default]\nenforce = false\n[open.web]\nports = 80\n")
	few := allPorts()[:2000]
	w := furnished(t, compiled(t, rs), "0")
	r := lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}})
	if r.Verdict != Inconclusive || !r.Unenforced || len(r.Findings) > 0 || !r.exact {
		t.Fatalf("verdict %s, unenforced %t, exact %t:\n%s", r.Verdict, r.Unenforced, r.exact, text(t, r))
	}
	said := text(t, r)
	lines := strings.Split(strings.TrimSpace(said), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "INCONCLUSIVE: NOTHING IS ENFORCED: 8,000 ports") {
		t.Errorf("the last line is %q", last)
	}
	if strings.Contains(said, `""`) || !strings.Contains(said, `80/tcp`) {
		t.Errorf("what is listed, and only that, stands as an opening:\n%s", said)
	}
	if err := w.Command(t.Context(), []string{"nft", "add table ip other; add chain ip other in { type filter hook input priority 0; }; add rule ip other in tcp dport 443 drop"}, nil, nil); err != nil {
		t.Fatal(err)
	}
	r = lookAt(t, w, HostConfig{Rules: rs, Ports: Ports{few, few}})
	if r.Verdict != Fail || !r.Unenforced || len(r.Findings) != 1 || r.Findings[0].Port != 443 {
		t.Errorf("verdict %s:\n%s", r.Verdict, text(t, r))
	}
}
