package main

import (
	"bytes"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"unicode/utf8"
)

// print renders the audit for people. What netstat --tcp --listening --numeric
// --programs says of a socket is in its line.
func (a *auditJSON) print(out io.Writer) error {
	if len(a.Sockets) == 0 {
		printf(out, "Nothing listens.\n")
	} else if err := a.printTable(out); err != nil {
		return err
	}
	for _, f := range a.Findings {
		if f.Kind == auditProbed {
			printf(out, "PROBED  %s/%s %s\n", f.Port, f.Protocol, oneLine(f.Fact))
		}
	}
	var hints []string
	for _, f := range a.Findings {
		if !slices.Contains(hints, f.Hint) && len(hints) < 8 {
			hints = append(hints, f.Hint)
		}
	}
	for _, h := range hints {
		printf(out, "= hint: %s\n", oneLine(h))
	}
	for _, n := range a.Notes {
		printf(out, "note: %s\n", oneLine(n))
	}
	printf(out, "%s\n", a.summary())
	return nil
}

// printTable prints one line a socket. On a terminal that is too narrow the
// columns that matter least are left out.
func (a *auditJSON) printTable(out io.Writer) error {
	for columns := 6; ; columns-- {
		var b bytes.Buffer
		w := newTable(&b)
		row := func(protocol, address, process, probed, outside, user, unit string) {
			cells := []string{protocol, address, process}
			if columns > 4 {
				cells = append(cells, user)
			}
			if columns > 5 {
				cells = append(cells, unit)
			}
			if a.Probe != nil {
				cells = append(cells, probed)
			}
			fmt.Fprintln(w, strings.Join(append(cells, outside), "\t"))
		}
		row("PROTO", "LOCAL ADDRESS", "PROCESS", "PROBED", "FROM OUTSIDE", "USER", "UNIT")
		for i := range a.Sockets {
			s := &a.Sockets[i]
			row(s.proto(), oneLine(s.at()), oneLine(s.holder()), oneLine(s.probedText()), oneLine(s.Text), oneLine(dash(s.User)), oneLine(dash(s.Unit)))
		}
		if err := w.Flush(); err != nil {
			return err
		}
		if columns == 4 || fits(out, b.String()) {
			_, err := out.Write(b.Bytes())
			return err
		}
	}
}

// fits reports whether no line is wider than the page; one without a width takes all.
func fits(out io.Writer, text string) bool {
	p, ok := out.(*page)
	if !ok || p.width == 0 {
		return true
	}
	for line := range strings.Lines(text) {
		if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > p.width {
			return false
		}
	}
	return true
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// proto is the protocol as netstat writes it: with a 6 for a socket of IPv6.
func (s *socketJSON) proto() string {
	if s.Address != "" && s.listener.Addr.Is6() {
		return s.Protocol + "6"
	}
	return s.Protocol
}

// at is the address as ss writes it: 0.0.0.0%eth0:67.
func (s *socketJSON) at() string {
	if s.Address == "" {
		return s.Ports
	}
	addr := s.listener.Addr
	if s.Interface == "" {
		text := netip.AddrPortFrom(addr, s.Port).String()
		if s.V6Only {
			text += " (IPv6 only)"
		}
		return text
	}
	if addr.Is6() {
		return fmt.Sprintf("[%s]%%%s:%d", addr, s.Interface, s.Port)
	}
	return fmt.Sprintf("%s%%%s:%d", addr, s.Interface, s.Port)
}

// holder names the process, or why it is not named.
func (s *socketJSON) holder() string {
	switch {
	case s.Address == "":
		return "-"
	case s.PID != 0:
		return fmt.Sprintf("%s (%d)", s.Process, s.PID)
	case s.listener.Inode == 0:
		return "kernel"
	}
	return "not visible"
}

// summary counts the verdicts.
func (a *auditJSON) summary() string {
	n := map[string]int{}
	listen := 0
	for _, s := range a.Sockets {
		n[s.Verdict]++
		if s.Address != "" {
			listen++
		}
	}
	parts := []string{plural(listen, "socket")}
	for _, v := range []struct{ verdict, text string }{
		{auditUnlisted, "REACHABLE THOUGH NOT LISTED"}, {auditStopped, "STOPPED"}, {auditUnknown, "cannot be told"},
		{auditFiltered, "not opened"}, {auditLoopback, "loopback only"}, {auditUnreachable, "not reachable"},
	} {
		if n[v.verdict] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n[v.verdict], v.text))
		}
	}
	if e := n[auditExposed] + n[auditWide]; e > 0 {
		parts = append(parts, fmt.Sprintf("%d exposed as intended", e))
	}
	if u := n[auditUnheard]; u > 0 {
		parts = append(parts, plural(u, "opening")+" nobody listens behind")
	}
	word := "ok"
	switch a.code() {
	case exitFindings:
		word = "FINDINGS"
	case exitRefused:
		word = "COULD NOT TELL"
	}
	if p := a.Probe; p != nil {
		parts = append(parts, fmt.Sprintf("probed: %s", p.Verdict))
	}
	return fmt.Sprintf("%s: %s, against %s", word, strings.Join(parts, ", "), oneLine(a.Policy))
}
