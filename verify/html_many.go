package verify

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// mostMaps bounds the hosts of a page whose ports are drawn: a map takes some 20 KB.
const mostMaps = 100

// WriteHTML writes one page that needs nothing else: a table of the hosts, those that
// fail first, then what was found on each, folded. The ports of the first hundred
// are drawn, those of the others listed.
func (m *Many) WriteHTML(w io.Writer, when time.Time) error {
	p := &page{}
	flush := func() error {
		_, err := io.WriteString(w, p.b.String())
		p.b.Reset()
		return err
	}
	// In this order.
	all := func(fn func(*Brief) error) error {
		for _, v := range []Verdict{Fail, Inconclusive, Pass} {
			if err := m.of(v, func(b *Brief) error {
				if err := fn(b); err != nil {
					return err
				}
				return flush()
			}); err != nil {
				return err
			}
		}
		return nil
	}
	hosts := m.Hosts.Pass + m.Hosts.Fail + m.Hosts.Inconclusive
	var says strings.Builder
	m.conclusion(&says)
	p.begin(count(hosts, "host", "hosts"), m.Verdict, says.String())
	p.add("<dl><dt>Hosts</dt><dd>%s pass, %s fail, %s could not be told</dd><dt>When</dt><dd>%s to %s</dd></dl>\n",
		thousands(m.Hosts.Pass), thousands(m.Hosts.Fail), thousands(m.Hosts.Inconclusive),
		m.Began.Format("2006-01-02 15:04:05 MST"), when.Format("2006-01-02 15:04:05 MST"))
	if m.Resumed > 0 {
		p.add("<p>%s done by a run that was interrupted.</p>\n", count(m.Resumed, "host was", "hosts were"))
	}
	p.add("<h2>Hosts</h2>\n<table>\n<tr><th>Host</th><th>Addresses</th><th>Policy</th><th>Verdict</th><th>Findings</th><th>Open</th><th></th></tr>\n")
	n := 0
	if err := all(func(b *Brief) error {
		n++
		var open []string
		for _, key := range sweepKeys {
			if ports := b.States[key].Open; ports != "" {
				open = append(open, key+" "+shorten(ports, 60))
			}
		}
		p.add("<tr><td><a href=\"#h%d\">%s</a></td><td>%s</td><td>%s</td><td class=\"%s\">%s</td><td>%s</td><td class=\"ports\">%s</td><td>%s</td></tr>\n",
			n, b.Name, b.Target, b.Policy, b.Verdict.String(), b.Verdict, thousands(b.wrong()), strings.Join(open, "; "), b.Why)
		return nil
	}); err != nil {
		return err
	}
	p.add("</table>\n<h2>Each host</h2>\n")
	if hosts > mostMaps {
		p.add("<p>The ports of the first %d hosts are drawn, those of the others listed.</p>\n", mostMaps)
	}
	p.legend(false, false)
	n = 0
	if err := all(func(b *Brief) error {
		n++
		p.brief(b, fmt.Sprintf("h%d", n), n <= mostMaps)
		return nil
	}); err != nil {
		return err
	}
	p.add("</body>\n</html>\n")
	return flush()
}

// brief writes what is known of a host, folded.
func (p *page) brief(b *Brief, id string, draw bool) {
	p.add("<details id=\"%s\"><summary>%s: <b>%s</b></summary>\n", id, b.title(), b.Verdict)
	if len(b.Findings) > 0 {
		p.add("<table>\n<tr><th>Ports</th><th>Expected</th><th>Observed</th><th>Reason</th><th>Rule</th><th>Probe</th><th>At</th></tr>\n")
		for i := range b.Findings {
			f := &b.Findings[i]
			if i == mostRows {
				break
			}
			p.add("<tr><td class=\"fail\">%s/%s</td><td>%s</td><td class=\"%s\">%s</td><td>%s</td><td>%s</td><td>%s</td><td>%s</td></tr>\n",
				shorten(f.Ports, 200), f.Protocol, f.Expected, f.Observed, f.Observed, f.Reason, f.Rule, f.Probe, f.Address)
		}
		p.add("</table>\n")
		if n := len(b.Findings) - mostRows; n > 0 {
			p.add("<p>and %s; the JSON report lists every one</p>\n", count(n, "more line", "more lines"))
		}
	}
	if draw {
		p.maps(b.States, nil, nil)
	} else {
		for _, key := range sweepKeys {
			if states, ok := b.States[key]; ok {
				p.add("<p>%s</p>\n", sweepName(key))
				p.states(states)
			}
		}
	}
	if len(b.Notes) > 0 {
		p.add("<ul>\n")
		for _, n := range b.Notes {
			p.add("<li>%s</li>\n", n)
		}
		p.add("</ul>\n")
	}
	p.add("</details>\n")
}
