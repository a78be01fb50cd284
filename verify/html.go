package verify

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"deadlight/rules"
)

// WriteHTML writes the report as one page that needs nothing else: no script, no
// style sheet, no image beside it. Each sweep is a map of 256 by 256 ports, a port
// a cell, row by row. When is the time of the run.
func (r *Report) WriteHTML(w io.Writer, when time.Time) error {
	p := &page{}
	p.begin(r.Target, r.Verdict, append([]string{verdictWords[r.Verdict]}, r.headlines()...)...)
	p.add("<dl><dt>Host</dt><dd>%s</dd><dt>Seen from</dt><dd>%s</dd><dt>When</dt><dd>%s</dd><dt>Took</dt><dd>%.1f s, %s</dd></dl>\n",
		r.Target, r.Vantage, when.Format("2006-01-02 15:04:05 MST"), r.Seconds, count(int(r.Probes), "packet", "packets"))
	r.htmlFindings(p)
	r.htmlExpects(p)
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

// begin is the head of a page, with what it says in a line each.
func (p *page) begin(title string, v Verdict, says ...string) {
	p.add("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n")
	p.add("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n")
	p.add("<title>%s: %s</title>\n<style>%s</style>\n</head>\n<body>\n", title, strings.ToUpper(v.String()), raw(pageStyle))
	p.add("<header class=\"%s\"><h1>%s</h1>", v.String(), strings.ToUpper(v.String()))
	for _, s := range says {
		p.add("<p>%s</p>", s)
	}
	p.add("</header>\n")
}

var verdictWords = [...]string{
	Pass:         "Every port that was probed is as the policy says.",
	Inconclusive: "Nothing wrong was seen, but not everything could be told. This is not a pass.",
	Fail:         "The host is not as the policy says.",
}

// headlines say in a line each what was found, and what became of the tests.
func (r *Report) headlines() []string {
	var reachable, shut, behind, other, unknown int
	for _, f := range r.Findings {
		listed := f.Expected == rules.OutcomeOpen.String()
		answers := f.Observed == Open || f.Observed == Closed
		switch {
		case f.Observed == Unknown:
			unknown++
		case listed:
			shut++
		case answers:
			reachable++
		case f.Reason == PassedGate.String():
			behind++
		default:
			other++
		}
	}
	var out []string
	for _, x := range []struct {
		n         int
		one, many string
	}{
		{reachable, "finding: reachable, though the policy does not open it", "findings: reachable, though the policy does not open them"},
		{shut, "finding: not reachable, though the policy opens it", "findings: not reachable, though the policy opens them"},
		{behind, "finding: let in at the first line of defence, stopped at the second", "findings: let in at the first line of defence, stopped at the second"},
		{other, "finding: silent or refused, but not as the policy says", "findings: silent or refused, but not as the policy says"},
		{unknown, "port of which nothing can be said", "ports of which nothing can be said"},
	} {
		if x.n > 0 {
			out = append(out, count(x.n, x.one, x.many))
		}
	}
	if said := r.expectCount(); said != "" {
		out = append(out, "Tests of the policy: "+strings.TrimPrefix(said, ", "))
	}
	return out
}

// page is HTML being written: what is put into it is escaped, unless it is raw.
type page struct {
	b     strings.Builder
	heads []string // of the table that is being written
}

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
	p.add("<h2>Findings</h2>\n")
	p.head("Ports", "Expected", "Observed", "Reason", "Rule", "Seen from")
	for i, l := range lines {
		if i == mostRows {
			break
		}
		f := l.first
		ports, from := l.ends()
		rule := f.Rule
		if rule == "" && f.Expected != rules.OutcomeOpen.String() {
			rule = "none opens it"
		}
		if f.Expect != "" {
			rule += ", [[expect]] at " + f.Expect
		}
		p.row([]string{"fail", "", f.Observed.String()}, ports, l.expected(), f.Observed.String(), plainly(l.reason()), strings.TrimPrefix(rule, ", "), from)
	}
	p.add("</table>\n")
	if n := len(lines) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more line", "more lines"))
	}
}

// plainly puts a reason into words for who does not know the protocols.
func plainly(reason string) string {
	words := map[Reason]string{
		NoResponse: "nothing came back", PathNotProven: "nothing came back, and nothing proves that the way was open",
		SynAck: "a connection was accepted", TCPReset: "the host answered that nobody listens", UDPAnswer: "a service answered",
		PortUnreachable: "the host answered that nobody listens", AdminProhibited: "a firewall refused",
		PassedGate: "the first line of defence let it in, another stopped it", PassedFirewall: "every filter let it in",
	}
	for r, said := range words {
		if name := r.String(); reason == name || strings.HasPrefix(reason, name+" ") {
			return fmt.Sprintf("%s (%s)", said, reason)
		}
	}
	return reason
}

// head begins a table, and row adds a line to it, with a class for each cell. On
// narrow screens the cells of a line stand below each other, each with its heading.
func (p *page) head(names ...string) {
	p.heads = names
	p.add("<table class=\"wide\">\n<thead><tr>")
	for _, n := range names {
		p.add("<th>%s</th>", n)
	}
	p.add("</tr></thead>\n")
}

func (p *page) row(classes []string, cells ...string) {
	p.add("<tr>")
	for i, c := range cells {
		class := ""
		if i < len(classes) {
			class = classes[i]
		}
		if c != "" || p.heads[i] == "" {
			p.add("<td class=\"%s\" data-head=\"%s\">%s</td>", class, p.heads[i], raw(strings.ReplaceAll(markup(c), ",", ",<wbr>")))
		} else {
			p.add("<td class=\"none\"></td>")
		}
	}
	p.add("</tr>\n")
}

func (r *Report) htmlExpects(p *page) {
	if len(r.Expects) == 0 {
		return
	}
	p.add("<h2>Tests of the policy</h2>\n<p>Each [[expect]] of the policy, sent as a packet from the address that it names.</p>\n")
	p.head("Test", "Port", "From", "Expected", "Result", "Observed")
	for i := range r.Expects {
		if i == mostRows {
			break
		}
		x := &r.Expects[i]
		class, result, observed := "unknown", "not probed", x.Reason
		if x.Result != expectUnprobed {
			result = x.Result
			observed = fmt.Sprintf("%s: %s", x.Observed, plainly(x.Reason))
		}
		switch x.Result {
		case expectMet:
			class = "pass"
		case expectFailed:
			class = "fail"
		}
		from := x.From
		if x.Interface != "" {
			from += " by " + x.Interface
		}
		if x.To != "" {
			from += " to " + x.To
		}
		p.row([]string{"", "", "", "", class}, x.Place, x.Port, from, x.Expected, result, observed)
	}
	p.add("</table>\n")
	if n := len(r.Expects) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more", "more"))
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
	p.add("<h2>Ports</h2>\n<p>A map shows every port of a protocol, row by row: port 0 at the top left, 65535 at the bottom right.</p>\n")
	p.legend(true, len(r.Findings) > 0)
	p.maps(r.States, r.Openings, r.htmlWrong)
}

// legend explains the colours and the frames of the maps.
func (p *page) legend(rings, wrong bool) {
	p.add("<ul class=\"legend\">")
	for _, s := range []State{Open, Closed, Rejected, Filtered, Unknown} {
		p.add("<li><b class=\"%s\"></b>%s: %s</li>", s, s, stateWords[s])
	}
	if rings {
		p.add("<li><b class=\"ring\"></b>listed by the policy</li>")
	}
	if wrong {
		p.add("<li><b class=\"wrong\"></b>a finding</li>")
	}
	p.add("</ul>\n")
}

// maps draws the sweeps; mark, if not nil, adds to the map of each.
func (p *page) maps(sweeps map[string]States, openings []Opening, mark func(p *page, key string)) {
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
		if mark != nil {
			mark(p, key)
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

// stateWords say what each state means to who is outside.
var stateWords = [...]string{
	Unknown: "could not be told", Open: "something answers", Closed: "reachable, nobody listens",
	Rejected: "refused by a firewall", Filtered: "silent",
}

// htmlWrong frames the findings on the map of a sweep: those of a row that follow
// each other in one frame.
func (r *Report) htmlWrong(p *page, key string) {
	const most = 300
	var ports []uint16
	for i := range r.Findings {
		if f := &r.Findings[i]; f.sweep() == key && f.Port > 0 {
			ports = append(ports, f.Port)
		}
	}
	ports = union(nil, ports)
	for i, n := 0, 0; i < len(ports) && n < most; n++ {
		k := i + 1
		for k < len(ports) && ports[k] == ports[k-1]+1 && ports[k]&255 != 0 {
			k++
		}
		p.add("<rect class=\"wrong\" x=\"%d\" y=\"%d\" width=\"%d\" height=\"7\"><title>%s</title></rect>\n",
			int(ports[i]&255)-3, int(ports[i]>>8)-3, k-i+6, Ranges(ports[i:k]))
		i = k
	}
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
	// Both families in one line where they are alike.
	lines := map[Opening]int{}
	var order []Opening
	for _, o := range r.Openings {
		o.Family = ""
		if lines[o]++; lines[o] == 1 {
			order = append(order, o)
		}
	}
	p.add("<h2>Listed ports</h2>\n")
	p.head("Port", "Over", "Rule", "State", "Meaning")
	for i, o := range order {
		if i == mostRows {
			break
		}
		over := "IPv4 and IPv6"
		if lines[o] == 1 {
			j := slices.IndexFunc(r.Openings, func(x Opening) bool {
				x.Family = ""
				return x == o
			})
			over = map[string]string{"ipv4": "IPv4", "ipv6": "IPv6"}[r.Openings[j].Family]
		}
		p.row([]string{"", "", "", o.State.String()}, fmt.Sprintf("%d/%s", o.Port, o.Protocol), over, o.Rule, o.State.String(), stateWords[o.State])
	}
	p.add("</table>\n")
	if n := len(order) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more", "more"))
	}
}

// htmlRestrictions shows what is not as it says, and folds the rest.
func (r *Report) htmlRestrictions(p *page) {
	if len(r.Restrictions) == 0 {
		return
	}
	var wrong, right []Restriction
	for _, v := range r.Restrictions {
		if v.OK {
			right = append(right, v)
		} else {
			wrong = append(wrong, v)
		}
	}
	p.add("<h2>Restricted openings</h2>\n<p>What an opening shows to addresses that it admits (inside), to the first and last of them (edge) and to those next to them (beside).</p>\n")
	htmlViews(p, wrong, "not as it says", "fail")
	if len(right) > 0 {
		p.add("<details><summary>%s as the rules say</summary>\n", count(len(right), "view", "views"))
		htmlViews(p, right, "as it says", "pass")
		p.add("</details>\n")
	}
}

func htmlViews(p *page, views []Restriction, says, class string) {
	if len(views) == 0 {
		return
	}
	p.head("Rule", "From", "To", "By", "Which is", "Reachable", "Silent", "Result")
	for i, v := range views {
		if i == mostRows {
			break
		}
		p.row([]string{"", "ports", "ports", "", "", "ports", "ports", class}, v.Rule, v.From, v.To, v.Interface, v.Place, foldPorts(v.Open), foldPorts(v.Silent), says)
	}
	p.add("</table>\n")
	if n := len(views) - mostRows; n > 0 {
		p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more", "more"))
	}
}

// foldPorts writes "22/tcp,23/tcp,53/udp" as "22-23/tcp, 53/udp".
func foldPorts(list string) string {
	byProtocol := map[string][]uint16{}
	for _, part := range strings.Split(list, ",") {
		port, proto, ok := strings.Cut(part, "/")
		n, err := strconv.ParseUint(port, 10, 16)
		if !ok || err != nil || proto != "tcp" && proto != "udp" {
			return list // of an older report
		}
		byProtocol[proto] = append(byProtocol[proto], uint16(n))
	}
	return portLists(byProtocol)
}

func (r *Report) proofWords() string {
	proof := fmt.Sprintf("Probes were sent from %s and answers counted. Canaries, packets that must be answered, travelled with them", r.Vantage)
	if r.Bound > 0 && !r.exact {
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
:root{color-scheme:light dark;--open:#1565c0;--closed:#ef8e1d;--rejected:#8e5bd0;--filtered:#1f6f43;--unknown:#8a8f98;--line:#8884;
--opentext:#1565c0;--closedtext:#a85a00;--rejectedtext:#7a3fc4;--filteredtext:#1f6f43;--unknowntext:#5f6672;--failtext:#c62828}
@media(prefers-color-scheme:dark){:root{--opentext:#7db8ff;--closedtext:#ffb55c;--rejectedtext:#c9a4ff;--filteredtext:#6fce9b;--unknowntext:#aeb4bd;--failtext:#ff8a80}}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:0 auto;padding:1rem}
header{padding:.8rem 1.2rem;border-radius:.5rem;color:#fff}
header h1{margin:0}header p{margin:0}
header.pass{background:#1f6f43}header.fail{background:#b71c1c}header.inconclusive{background:#5f6672}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse}td,th{text-align:left;padding:.15rem .7rem;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
th,td:is(.open,.closed,.rejected,.filtered,.unknown,.pass){white-space:nowrap}
.maps{display:grid;grid-template-columns:repeat(auto-fit,minmax(16rem,1fr));gap:1.2rem}
figure{margin:0;min-width:0}figcaption{font-weight:600}svg{width:100%;background:#fff;overflow:visible}
.ports{overflow-wrap:anywhere;font-size:.85em}
path.open{fill:var(--open)}path.closed{fill:var(--closed)}path.rejected{fill:var(--rejected)}path.filtered{fill:var(--filtered)}path.unknown{fill:var(--unknown)}
rect.none{fill:#e3e5e8}rect.ring,rect.wrong{fill:none;stroke:#111;stroke-width:1;paint-order:stroke}rect.ring{outline:1px solid #fff}rect.wrong{stroke:#ff1744;stroke-width:2}
td.fail{color:var(--failtext);font-weight:600}td.open{color:var(--opentext);font-weight:600}td.closed{color:var(--closedtext);font-weight:600}td.rejected{color:var(--rejectedtext);font-weight:600}td.filtered,td.pass{color:var(--filteredtext)}td.unknown{color:var(--unknowntext)}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.4rem}.legend b{display:inline-block;width:.8em;height:.8em;margin-right:.4em;box-sizing:border-box}
b.open{background:var(--open)}b.closed{background:var(--closed)}b.rejected{background:var(--rejected)}b.filtered{background:var(--filtered)}b.unknown{background:var(--unknown)}b.ring{border:2px solid currentColor}b.wrong{border:2px solid #ff1744}
td.inconclusive{color:var(--unknowntext);font-weight:600}details{margin:.3rem 0}
summary{cursor:pointer;padding:.15rem 0}
@media(max-width:700px){
.wide,.wide tbody,.wide tr,.wide td{display:block}.wide thead,.wide td.none{display:none}
.wide tr{padding:.4rem 0;border-bottom:1px solid var(--line)}.wide td{border:0;padding:0 0 0 6.5rem;white-space:normal;overflow-wrap:anywhere}
.wide td::before{content:attr(data-head);float:left;margin-left:-6.5rem;width:6rem;color:var(--unknowntext);font-weight:400}
}
@media print{body{max-width:none;font-size:11px}tr,figure,header{break-inside:avoid}h2{break-after:avoid}.maps{grid-template-columns:repeat(4,1fr)}}
`
