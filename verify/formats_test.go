package verify

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/png"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// shown is a report with something of everything, and text that wants to break out.
func shown() *Report {
	return &Report{
		Schema: 1, Verdict: Fail, Target: "192.0.2.1 </title><script>alert(1)</script>", Vantage: "outside \"of\" it\x1b[31m", Proof: "packets",
		Bound: 2.5e-7, Seconds: 1.25, Probes: 131070, Counts: Counts{Open: 6, Filtered: 65000},
		States: map[string]States{
			"tcp4": {Open: "22,80,8192-8447", Closed: "443,16384-16639", Filtered: "1-21,23-79,81-442,444-8191,8448-16383,16640-60000", Rejected: "60001-62000", Unknown: "62001-65535"},
			"udp6": {Filtered: "1-65535"},
		},
		Openings: []Opening{
			{"ipv4", "tcp", 80, "web", Open}, {"ipv4", "tcp", 443, "web", Closed}, {"ipv4", "tcp", 22, "ssh <b>", Open},
			{"ipv4", "tcp", 16384 + 128, "middle", Closed},
		},
		Restrictions: []Restriction{
			{Rule: "ssh <b>", Interface: "eth0", From: "10.0.0.1", To: "192.0.2.1", Place: "inside", Open: "22/tcp", OK: true},
			{Rule: "ssh <b>", Interface: "eth0", From: "11.0.0.1", To: "192.0.2.1", Place: "beside", Open: "22/tcp"},
		},
		Findings: []Finding{
			{Family: "ipv4", Address: "192.0.2.1", Protocol: "tcp", Port: 8192, Probe: "syn from 192.0.2.9", Expected: "filtered", Observed: Open, Reason: "syn-ack", Expect: "p<i>.toml:11", source: "192.0.2.9"},
			{Family: "ipv4", Address: "192.0.2.1", Protocol: "tcp", Port: 8193, Probe: "syn from 192.0.2.9", Expected: "filtered", Observed: Open, Reason: "syn-ack", source: "192.0.2.9"},
			{Family: "ipv4", Address: "192.0.2.1", Protocol: "tcp", Port: 62001, Probe: "syn from 192.0.2.9", Expected: "filtered", Observed: Unknown, Reason: "path not proven", source: "192.0.2.9"},
			{Protocol: "tcp", Port: 81, Expected: "open", Observed: Filtered, Reason: "no probe of this limited opening passed", Rule: "limited"},
		},
		Expects: []Expected{
			{Place: "p<i>.toml:7", Port: "22/tcp", From: "10.0.0.1", To: "192.0.2.1", Expected: "open", Observed: Closed, Result: "met", Reason: "rst"},
			{Place: "p<i>.toml:11", Port: "8192/tcp", From: "192.0.2.9", To: "192.0.2.1", Interface: "eth0", Expected: "filtered", Observed: Open, Result: "failed", Reason: "syn-ack"},
			{Place: "p<i>.toml:15", Port: "25/tcp", From: "192.0.2.8", To: "192.0.2.1", Expected: "filtered", Result: "unknown", Reason: "path not proven"},
			{Place: "p<i>.toml:19", Port: "53/udp", From: "192.0.2.9", To: "192.0.2.1", Expected: "filtered", Observed: Filtered, Result: "unproved", Reason: "no response"},
			{Place: "p<i>.toml:23", Port: "gre", From: "192.0.2.9", Expected: "open", Result: "unprobed", Reason: "only those of TCP and UDP are sent"},
		},
		Notes: []string{"a note & more"},
	}
}

// What JUnit's readers know, read strictly.
type junitFile struct {
	XMLName  xml.Name `xml:"testsuites"`
	Tests    int      `xml:"tests,attr"`
	Failures int      `xml:"failures,attr"`
	Errors   int      `xml:"errors,attr"`
	Suites   []struct {
		Name     string `xml:"name,attr"`
		Tests    int    `xml:"tests,attr"`
		Failures int    `xml:"failures,attr"`
		Errors   int    `xml:"errors,attr"`
		Skipped  int    `xml:"skipped,attr"`
		Cases    []struct {
			Class   string `xml:"classname,attr"`
			Name    string `xml:"name,attr"`
			Failure *struct {
				Message string `xml:"message,attr"`
			} `xml:"failure"`
			Error *struct {
				Message string `xml:"message,attr"`
			} `xml:"error"`
			Skipped *struct {
				Message string `xml:"message,attr"`
			} `xml:"skipped"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

func TestJUnit(t *testing.T) {
	var b bytes.Buffer
	if err := shown().WriteJUnit(&b); err != nil {
		t.Fatal(err)
	}
	var f junitFile
	if err := xml.Unmarshal(b.Bytes(), &f); err != nil {
		t.Fatalf("%v\n%s", err, b.Bytes())
	}
	var got []string
	failures, errs, tests := 0, 0, 0
	for _, s := range f.Suites {
		skipped := 0
		for _, c := range s.Cases {
			tests++
			line := s.Name + ": " + c.Name
			switch {
			case c.Failure != nil:
				failures++
				line += " FAILED " + c.Failure.Message
			case c.Error != nil:
				errs++
				line += " ERROR " + c.Error.Message
			case c.Skipped != nil:
				skipped++
				line += " SKIPPED " + c.Skipped.Message
			}
			got = append(got, line)
		}
		if s.Skipped != skipped {
			t.Errorf("%s says that it skipped %d of %d", s.Name, s.Skipped, skipped)
		}
	}
	want := []string{
		"tcp4: 80/tcp is reachable: web, open",
		"tcp4: 443/tcp is reachable: web, closed",
		"tcp4: 22/tcp is reachable: ssh <b>, open",
		"tcp4: 16512/tcp is reachable: middle, closed",
		"tcp4: ports that nothing lists FAILED 3 ports are not as the policy says",
		"tcp4: 8192/tcp at 192.0.2.1: syn from 192.0.2.9 FAILED expected filtered, observed open: syn-ack, [[expect]] at p<i>.toml:11",
		"tcp4: 8193/tcp at 192.0.2.1: syn from 192.0.2.9 FAILED expected filtered, observed open: syn-ack",
		"tcp4: 62001/tcp at 192.0.2.1: syn from 192.0.2.9 ERROR expected filtered, observed unknown: path not proven",
		"udp6: ports that nothing lists",
		"other: 81/tcp FAILED expected open, observed filtered: no probe of this limited opening passed (limited)",
		"restricted: ssh <b> from 10.0.0.1 to 192.0.2.1 by eth0 (inside)",
		"restricted: ssh <b> from 11.0.0.1 to 192.0.2.1 by eth0 (beside) FAILED reachable: 22/tcp; silent: ",
		"expect: p<i>.toml:7: 22/tcp from 10.0.0.1 to 192.0.2.1 is open",
		"expect: p<i>.toml:11: 8192/tcp from 192.0.2.9 to 192.0.2.1 by eth0 is filtered FAILED observed open: syn-ack",
		"expect: p<i>.toml:15: 25/tcp from 192.0.2.8 to 192.0.2.1 is filtered ERROR observed unknown: path not proven",
		"expect: p<i>.toml:19: 53/udp from 192.0.2.9 to 192.0.2.1 is filtered SKIPPED unproved: no response",
		"expect: p<i>.toml:23: gre from 192.0.2.9 is open SKIPPED unprobed: only those of TCP and UDP are sent",
		"verdict: 192.0.2.1 </title><script>alert(1)</script> FAILED FAIL: 3 findings in 0 ports, 1 of 5 expectations met (1 not probed, 1 unproved), 1.3s",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if f.Tests != tests || f.Failures != failures || f.Errors != errs {
		t.Errorf("it says %d %d %d of %d %d %d", f.Tests, f.Failures, f.Errors, tests, failures, errs)
	}
}

// A reader of JUnit files that is not ours takes it as well.
func TestJUnitReader(t *testing.T) {
	file := filepath.Join(t.TempDir(), "report.xml")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(shown().WriteJUnit(out), out.Close()); err != nil {
		t.Fatal(err)
	}
	const read = `
import sys
from junitparser import JUnitXml
x = JUnitXml.fromfile(sys.argv[1])
print(x.tests, x.failures, x.errors, len([c for s in x for c in s if c.result]))`
	got, err := exec.Command("/usr/bin/python3", "-c", read, file).CombinedOutput()
	if err != nil {
		t.Fatalf("install python3-junitparser, or use .ci/test: %v\n%s", err, got)
	}
	if string(got) != "18 7 2 11\n" {
		t.Errorf("it reads %s", got)
	}
}

func TestMarkup(t *testing.T) {
	for in, want := range map[string]string{
		"a<b>&\"'":     "a&lt;b&gt;&amp;&#34;&#39;",
		"a\x1b[1m\x00": "a\ufffd[1m\ufffd",
		"\xff\u0085":   "\ufffd\ufffd",
		"é\t\n":        "é\t\n",
	} {
		if got := markup(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// The page is looked at in a browser: the cells of the map have the colours of the
// states, and nothing of what it quotes is run or taken for markup.
func TestHTML(t *testing.T) {
	r := shown()
	for port := uint16(30001); port < 30100; port += 7 {
		r.Findings = append(r.Findings, Finding{Family: "ipv6", Address: "2001:db8::1", Protocol: "udp", Port: port, Probe: "datagram from 2001:db8::9", Expected: "filtered", Observed: Closed, Reason: "port-unreachable", Interface: "eth0", source: "2001:db8::9"})
	}
	r.Restrictions = append(r.Restrictions, Restriction{Rule: "vendor", Interface: "eth0", From: "2001:db8:5:7fff:ffff:ffff:ffff:ffff", To: "2001:db8:5:7fff:ffff:ffff:ffff:fffe",
		Place: "inside", Open: "9100/tcp,9101/tcp,9102/tcp", Silent: "53/udp,9099/tcp,9103/tcp", OK: true})
	r.Since = &Since{Verdict: Pass, Changes: []StateChange{{"tcp4", Filtered, Open, "8192-8447"}}}
	var page bytes.Buffer
	if err := r.WriteHTML(&page, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	for _, banned := range []string{"<script", "src=", "href=", "url(", "<b>;", "\x1b"} {
		if strings.Contains(page.String(), banned) {
			t.Errorf("the page holds %q", banned)
		}
	}
	for _, want := range []string{"FAIL", "2026-01-02 03:04:05 UTC", "8192/tcp", "8193/tcp", "a note &amp; more", "ssh &lt;b&gt;", "not as it says", "2e-07",
		"17 findings: reachable, though the policy does not open them", "1 port of which nothing can be said",
		"Tests of the policy: 1 of 5 expectations met (1 not probed, 1 unproved)", "p&lt;i&gt;.toml:11", "9100-9102/tcp", "9099,<wbr>9103/tcp,<wbr> 53/udp", "only those of TCP and UDP are sent"} {
		if !strings.Contains(page.String(), want) {
			t.Errorf("the page holds no %q", want)
		}
	}
	// The map alone, a port four pixels wide.
	const scale = 4
	text := page.String()
	from, to := strings.Index(text, "<svg"), strings.Index(text, "</svg>")
	style := text[strings.Index(text, "<style>") : strings.Index(text, "</style>")+len("</style>")]
	alone := fmt.Sprintf("<!doctype html>%s<style>body{margin:0;padding:0;max-width:none}svg{width:%dpx!important;display:block}</style>%s", style, 256*scale, text[from:to+len("</svg>")])
	img := screenshot(t, alone, 256*scale, 256*scale)
	colours := map[State]color.RGBA{Open: {0x15, 0x65, 0xc0, 255}, Closed: {0xef, 0x8e, 0x1d, 255}, Rejected: {0x8e, 0x5b, 0xd0, 255}, Filtered: {0x1f, 0x6f, 0x43, 255}, Unknown: {0x8a, 0x8f, 0x98, 255}}
	states, err := r.States["tcp4"].byPort()
	if err != nil {
		t.Fatal(err)
	}
	wrong := 0
	for port, state := range states {
		if near(port, r) {
			continue // a ring is drawn over it
		}
		x, y := int(port&255)*scale+scale/2, int(port>>8)*scale+scale/2
		if got := color.RGBAModel.Convert(img.At(x, y)); got != colours[state] {
			if wrong++; wrong < 5 {
				t.Errorf("port %d is %v on the map, want %v for %s", port, got, colours[state], state)
			}
		}
	}
	// The ring of a listed port that stands alone in its state.
	ring := color.RGBAModel.Convert(img.At(126*scale, 66*scale))
	if ring == colours[Closed] || ring == colours[Filtered] {
		t.Errorf("no ring around a listed port: %v", ring)
	}
	// The frame around a finding.
	frame := 0
	for x := range 16 * scale {
		if got := color.RGBAModel.Convert(img.At(x, 29*scale)); got == (color.RGBA{0xff, 0x17, 0x44, 255}) {
			frame++
		}
	}
	if frame == 0 {
		t.Error("no frame around a finding")
	}
	// Nothing sticks out on a telephone, on paper or on a desk.
	for _, width := range []int{400, 717, 1280} {
		if got := laidOut(t, strings.ReplaceAll(text, "<details>", "<details open>"), width); got > width {
			t.Errorf("the page is %d wide on a screen of %d", got, width)
		}
	}
	// The whole page, as a person sees it.
	whole := screenshot(t, text, 1200, 1600)
	red := 0
	for x := range 1200 {
		if got := color.RGBAModel.Convert(whole.At(x, 30)).(color.RGBA); got == (color.RGBA{0xb7, 0x1c, 0x1c, 255}) {
			red++
		}
	}
	if red < 600 {
		t.Errorf("the verdict is no red banner: %d pixels", red)
	}
}

// near reports whether the ring of a listed port or of a finding may touch the cell
// of a port.
func near(port uint16, r *Report) bool {
	var ringed []uint16
	for _, o := range r.Openings {
		ringed = append(ringed, o.Port)
	}
	for _, f := range r.Findings {
		ringed = append(ringed, f.Port)
	}
	for _, at := range ringed {
		dx, dy := int(port&255)-int(at&255), int(port>>8)-int(at>>8)
		if max(dx, -dx) <= 5 && max(dy, -dy) <= 5 {
			return true
		}
	}
	return false
}

// laidOut says how wide a page is when its window has some width.
func laidOut(t *testing.T, page string, width int) int {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "outer.html")
	outer := fmt.Sprintf(`<!doctype html><iframe id=f style="width:%dpx;height:900px;border:0" srcdoc="%s"></iframe>
<script>document.getElementById("f").onload=function(){document.body.id="wide"+this.contentDocument.documentElement.scrollWidth}</script>`, width, html.EscapeString(page))
	if err := os.WriteFile(file, []byte(outer), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(dir, "profile"),
		"--dump-dom", "file://"+file).Output()
	if err != nil {
		t.Fatalf("install chromium, or use .ci/test: %v", err)
	}
	found := regexp.MustCompile(`<body id="wide(\d+)"`).FindSubmatch(out)
	if found == nil {
		t.Fatalf("the page was not laid out:\n%.500s", out)
	}
	n, err := strconv.Atoi(string(found[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func screenshot(t *testing.T, page string, width, height int) image.Image {
	t.Helper()
	dir := t.TempDir()
	file, shot := filepath.Join(dir, "page.html"), filepath.Join(dir, "page.png")
	if err := os.WriteFile(file, []byte(page), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--user-data-dir="+filepath.Join(dir, "profile"),
		"--hide-scrollbars", "--force-device-scale-factor=1", "--blink-settings=preferredColorScheme=1",
		fmt.Sprintf("--window-size=%d,%d", width, height), "--screenshot="+shot, "file://"+file).CombinedOutput()
	if err != nil {
		t.Fatalf("install chromium, or use .ci/test: %v\n%s", err, out)
	}
	f, err := os.Open(shot)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func TestSince(t *testing.T) {
	read := func(r *Report) *Report {
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := ReadReport(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	old := shown()
	old.Verdict = Pass
	old.States = map[string]States{"tcp4": {Open: "22", Filtered: "1-21,23-8300"}, "tcp6": {Filtered: "1-65535"}}
	s, err := shown().Compare(read(old))
	if err != nil {
		t.Fatal(err)
	}
	want := &Since{Verdict: Pass, Changes: []StateChange{{"tcp4", Filtered, Open, "80,8192-8300"}, {"tcp4", Filtered, Closed, "443"}}}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
	if s, err := shown().Compare(read(shown())); err != nil || len(s.Changes) > 0 || s.Unlike != "" {
		t.Errorf("a report against itself: %+v %v", s, err)
	}
	old.Target, old.Proof = "198.51.100.1", "host"
	if s, err := shown().Compare(read(old)); err != nil || s.Unlike != "target was 198.51.100.1; proof was host" {
		t.Errorf("another host: %+v %v", s, err)
	}
	for _, bad := range []string{"", "{}", "[]", `{"schema":2,"states":{}}`, `{"schema":1,"verdict":"good","states":{}}`, `{"schema":1,"states":{"tcp4":{"open":"1"}}}`, `{"schema":1,"verdict":"pass"}`,
		`{"schema":1,"verdict":"pass","states":{"tcp5":{}}}`, `{"schema":1,"verdict":"pass","states":{"tcp4":{"open":"1-"}}}`,
		`{"schema":1,"verdict":"pass","states":{"tcp4":{"open":"1","closed":"1-2"}}}`, `{"schema":1,"verdict":"pass","states":{"tcp4":{"open":"70000"}}}`,
		`{"schema":1,"verdict":"pass","states":{"tcp4":{"open":"9-1"}}}`} {
		if _, err := ReadReport(strings.NewReader(bad)); !errors.Is(err, ErrNotReport) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// FuzzReport reads anything as an older report.
func FuzzReport(f *testing.F) {
	b, err := json.Marshal(shown())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"schema":1,"verdict":"pass","states":{"tcp4":{"open":"1-65535"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ReadReport(bytes.NewReader(b))
		if err != nil {
			return
		}
		s, err := r.Compare(r)
		if err != nil || len(s.Changes) > 0 {
			t.Fatalf("against itself: %+v %v", s, err)
		}
		if err := errors.Join(r.WriteHTML(io.Discard, time.Time{}), r.WriteText(io.Discard)); err != nil {
			t.Fatal(err)
		}
		var x bytes.Buffer
		if err := r.WriteJUnit(&x); err != nil {
			t.Fatal(err)
		}
		if err := xml.Unmarshal(x.Bytes(), new(junitFile)); err != nil {
			t.Fatalf("%v\n%s", err, x.Bytes())
		}
	})
}
