package verify

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// WriteHTML writes the report as one page that needs nothing else: no script, no
// style sheet, no image beside it. Each sweep is a map of 256 by 256 ports, a port
// a cell, row by row. When is the time of the run.
func (r *Report) WriteHTML(w io.Writer, when time.Time) error {
	p := &page{}
	p.head(r.Target, r.Verdict, verdictWords[r.Verdict])
	p.add("<dl><dt>Host</dt><dd>%s</dd><dt>Seen from</dt><dd>%s</dd><dt>When</dt><dd>%s</dd><dt>Took</dt><dd>%.1f s, %s</dd></dl>\n",
		r.Target, r.Vantage, when.Format("2006-01-02 15:04:05 MST"), r.Seconds, count(int(r.Probes), "packet", "packets"))
	r.htmlFindings(p)
	r.htmlMaps(p)
	r.htmlSince(p)
	r.htmlOpenings(p)
	r.htmlRestrictions(p)
	p.add("<h2>How it was proven</h2>\n<p>%s</p>\n", r.proofWords())
	if len(r.Notes) > 0 {
		p.add("<h2>What the verdict does not cover</h2>\n<ul>\n")
		for _, n := range r.Notes {
			p.add("<li>%s</li>\n", n)
		}
		p.add("</ul>\n")
	}
	p.add("</body>\n</html>\n")
	_, err := io.WriteString(w, p.b.String())
	return err
}

// head begins a page.
func (p *page) head(title string, v Verdict, says string) {
	p.add("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n")
	p.add("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n")
	p.add("<title>%s: %s</title>\n<style>%s</style>\n</head>\n<body>\n", title, strings.ToUpper(v.String()), raw(pageStyle))
	p.add("<header class=\"%s\"><h1>%s</h1><p>%s</p></header>\n", v.String(), strings.ToUpper(v.String()), says)
}

var verdictWords = [...]string{
	Pass:         "Every port that was probed is as the policy says.",
	Inconclusive: "Nothing wrong was seen, but not everything could be told. This is not a pass.",
	Fail:         "The host is not as the policy says.",
}

// page is HTML being written: what is put into it is escaped, unless it is raw.
type page struct{ b strings.Builder }

type raw string

func (p *page) add(format string, args ...any) {
	for i, a := range args {
		switch a := a.(type) {
		case string:
			args[i] = markup(a)
		case raw:
			args[i] = string(a)
		case fmt.Stringer:
			args[i] = markup(a.String())
		}
	}
	fmt.Fprintf(&p.b, format, args...)
}

// mostRows bounds the tables of the page; the JSON has every row.
const mostRows = 2000

func (r *Report) htmlFindings(p *page) {
	if len(r.Findings) == 0 {
		return
	}
	lines := r.folded()
	p.add("<h2>Findings</h2>\n<table>\n<tr><th>Ports</th><th>Expected</th><th>Observed</th><th>Reason</th><th>Rule</th><th>Seen from</th></tr>\n")
	for i, l := range lines {
		if i == mostRows {
			break
		}
		f := l.first
		ports, from := l.ends()
		p.add("<tr><td class=\"fail\">%s</td><td>%s</td><td class=\"%s\">%s</td><td>%s</td><td>%s</td><td>%s</td></tr>\n",
			ports, l.expected(), f.Observed, f.Observed, l.reason(), f.Rule, from)
	}
	p.add("</table>\n")
	if n := len(lines) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more line", "more lines"))
	}
}

func (r *Report) htmlSince(p *page) {
	if r.Since == nil {
		return
	}
	p.add("<h2>Since the older report</h2>\n")
	if r.Since.Unlike != "" {
		p.add("<p>The older report is of something else: %s</p>\n", r.Since.Unlike)
	}
	if len(r.Since.Changes) == 0 {
		p.add("<p>No port that both reports probed changed; the verdict was %s.</p>\n", r.Since.Verdict)
		return
	}
	p.add("<table>\n<tr><th>Sweep</th><th>Was</th><th>Is</th><th>Ports</th></tr>\n")
	for _, c := range r.Since.Changes {
		p.add("<tr><td>%s</td><td class=\"%s\">%s</td><td class=\"%s\">%s</td><td>%s</td></tr>\n", sweepName(c.Sweep), c.Was, c.Was, c.Is, c.Is, shorten(c.Ports, 200))
	}
	p.add("</table>\n")
}

// sweepName is a key of [Report.States] in words; "" of no key.
func sweepName(key string) string {
	return map[string]string{"tcp4": "TCP over IPv4", "tcp6": "TCP over IPv6", "udp4": "UDP over IPv4", "udp6": "UDP over IPv6"}[key]
}

func (r *Report) htmlMaps(p *page) {
	p.add("<h2>Ports</h2>\n")
	p.legend(true)
	p.maps(r.States, r.Openings)
}

func (p *page) legend(rings bool) {
	p.add("<p class=\"legend\">")
	for _, s := range []State{Open, Closed, Rejected, Filtered, Unknown} {
		p.add("<span><b class=\"%s\"></b>%s</span> ", s, s)
	}
	if rings {
		p.add("<span><b class=\"ring\"></b>listed by the policy</span>")
	}
	p.add("</p>\n")
}

// maps draws the sweeps.
func (p *page) maps(sweeps map[string]States, openings []Opening) {
	p.add("<div class=\"maps\">\n")
	for _, key := range sweepKeys {
		states, ok := sweeps[key]
		if !ok {
			continue
		}
		p.add("<figure><svg viewBox=\"0 0 256 256\" role=\"img\" aria-label=\"%s\" shape-rendering=\"crispEdges\">\n", sweepName(key))
		p.add("<rect class=\"none\" width=\"256\" height=\"256\"/>\n")
		for s := Unknown; s <= Filtered; s++ {
			if path := mapPath(states.of(s)); path != "" {
				p.add("<path class=\"%s\" d=\"%s\"/>\n", s, path)
			}
		}
		for _, o := range openings {
			if o.Protocol+o.Family[3:] == key {
				p.add("<rect class=\"ring\" x=\"%d\" y=\"%d\" width=\"5\" height=\"5\"><title>%d/%s %s</title></rect>\n",
					int(o.Port&255)-2, int(o.Port>>8)-2, o.Port, o.Protocol, o.Rule)
			}
		}
		p.add("</svg><figcaption>%s</figcaption>\n", sweepName(key))
		p.states(states)
		p.add("</figure>\n")
	}
	p.add("</div>\n")
}

// states lists the ports of a sweep.
func (p *page) states(states States) {
	p.add("<table>\n")
	for _, s := range []State{Open, Closed, Rejected, Filtered, Unknown} {
		if ports := states.of(s); ports != "" {
			p.add("<tr><td class=\"%s\">%s</td><td class=\"ports\">%s</td></tr>\n", s, s, shorten(ports, 400))
		}
	}
	p.add("</table>")
}

// mapPath draws the cells of ports that a list names: those of a row that follow
// each other in one stroke.
func mapPath(list string) string {
	ports, err := parseRanges(list)
	if err != nil {
		return "" // our own lists parse
	}
	var b strings.Builder
	for i := 0; i < len(ports); {
		k := i + 1
		for k < len(ports) && ports[k] == ports[k-1]+1 && ports[k]&255 != 0 {
			k++
		}
		fmt.Fprintf(&b, "M%d %dh%dv1h-%dz", ports[i]&255, ports[i]>>8, k-i, k-i)
		i = k
	}
	return b.String()
}

func (r *Report) htmlOpenings(p *page) {
	if len(r.Openings) == 0 {
		return
	}
	p.add("<h2>Listed ports</h2>\n<table>\n<tr><th>Port</th><th>Family</th><th>Rule</th><th>State</th><th></th></tr>\n")
	for i, o := range r.Openings {
		if i == mostRows {
			break
		}
		says := ""
		if o.State == Closed {
			says = "reachable, but nobody listens"
		}
		p.add("<tr><td>%d/%s</td><td>%s</td><td>%s</td><td class=\"%s\">%s</td><td>%s</td></tr>\n", o.Port, o.Protocol, o.Family, o.Rule, o.State, o.State, says)
	}
	p.add("</table>\n")
	if n := len(r.Openings) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more", "more"))
	}
}

func (r *Report) htmlRestrictions(p *page) {
	if len(r.Restrictions) == 0 {
		return
	}
	p.add("<h2>Restricted openings</h2>\n<table>\n<tr><th>Rule</th><th>From</th><th>To</th><th>By</th><th>Which is</th><th>Reachable</th><th>Silent</th><th></th></tr>\n")
	for i, v := range r.Restrictions {
		if i == mostRows {
			break
		}
		says, class := "as it says", "pass"
		if !v.OK {
			says, class = "not as it says", "fail"
		}
		p.add("<tr><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td><td class=\"%s\">%s</td></tr>\n",
			v.Rule, v.From, v.To, v.Interface, v.Place, v.Open, v.Silent, class, says)
	}
	p.add("</table>\n")
}

func (r *Report) proofWords() string {
	proof := fmt.Sprintf("Probes were sent from %s and answers counted. Canaries, packets that must be answered, travelled with them", r.Vantage)
	if r.Bound > 0 {
		proof += fmt.Sprintf("; from their loss the chance that any TCP answer was missed is at most %.0e.", r.Bound)
	} else {
		proof += "; every TCP probe was seen to arrive."
	}
	if r.Proof == "host" {
		proof += " On the host itself a temporary table noted which probes arrived and which passed every filter."
	} else {
		proof += " Over UDP silence cannot tell a filter from a service that does not answer."
	}
	return proof
}

const pageStyle = `
:root{color-scheme:light dark;--open:#1565c0;--closed:#ef8e1d;--rejected:#8e5bd0;--filtered:#1f6f43;--unknown:#8a8f98;--line:#8884}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem}
header{padding:.8rem 1.2rem;border-radius:.5rem;color:#fff}
header h1{margin:0}header p{margin:0}
header.pass{background:#1f6f43}header.fail{background:#b71c1c}header.inconclusive{background:#5f6672}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dt{font-weight:600}dd{margin:0}
table{border-collapse:collapse}td,th{text-align:left;padding:.15rem .7rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:anywhere}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:1.2rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;background:#fff}
.ports{overflow-wrap:anywhere;font-size:.85em}
path.open{fill:var(--open)}path.closed{fill:var(--closed)}path.rejected{fill:var(--rejected)}path.filtered{fill:var(--filtered)}path.unknown{fill:var(--unknown)}
rect.none{fill:#e3e5e8}rect.ring{fill:none;stroke:#111;stroke-width:1}
td.fail{color:#c62828;font-weight:600}td.open{color:var(--open);font-weight:600}td.closed{color:var(--closed);font-weight:600}td.rejected{color:var(--rejected);font-weight:600}td.filtered,td.pass{color:var(--filtered)}td.unknown{color:var(--unknown)}
td.inconclusive{color:var(--unknown);font-weight:600}summary{cursor:pointer;padding:.15rem 0}details{margin:.3rem 0}
.legend span{margin-right:1rem}.legend b{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
b.open{background:var(--open)}b.closed{background:var(--closed)}b.rejected{background:var(--rejected)}b.filtered{background:var(--filtered)}b.unknown{background:var(--unknown)}b.ring{border:2px solid currentColor;box-sizing:border-box}
`
