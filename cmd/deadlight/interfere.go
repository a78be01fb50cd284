package main

import (
	"io"
	"strings"

	"deadlight/firewall"
)

// What others do beside the policy, as status and plan show it.

// interferenceJSON is one thing outside of Deadlight's table that bears on the
// verdict of the policy.
type interferenceJSON struct {
	Severity string   `json:"severity"`          // breaks, may or note
	Unknown  bool     `json:"unknown,omitempty"` // it could not be judged
	Kind     string   `json:"kind"`
	Where    string   `json:"where"`
	Rule     string   `json:"rule"`
	Ports    []string `json:"ports"`
	Fact     string   `json:"fact"`
	Advice   string   `json:"advice"`
}

// interferences makes the model of a list; text is made from it.
func interferences(list []firewall.Interference) []interferenceJSON {
	out := []interferenceJSON{}
	for _, i := range list {
		out = append(out, interferenceJSON{
			Severity: string(i.Severity), Unknown: i.Unknown, Kind: i.Kind, Where: i.Where, Rule: i.Rule,
			Ports: append([]string{}, i.Ports...), Fact: i.Fact, Advice: i.Advice,
		})
	}
	return out
}

// printInterferences renders the list for people; an empty one is not mentioned.
func printInterferences(w io.Writer, list []interferenceJSON) {
	const mostPorts = 12
	if len(list) == 0 {
		return
	}
	printf(w, "Beside deadlight:\n")
	for _, i := range list {
		place := i.Where
		if i.Rule != "" {
			place += ": " + i.Rule
		}
		printf(w, "  %-6s  %s\n", i.Severity, oneLine(place))
		fact := i.Fact
		switch n := len(i.Ports); {
		case n > mostPorts:
			fact = strings.Join(i.Ports[:mostPorts], ", ") + " and " + plural(n-mostPorts, "more range") + ". " + fact
		case n > 0:
			fact = strings.Join(i.Ports, ", ") + ". " + fact
		}
		printf(w, "          %s\n", oneLine(fact))
		if i.Advice != "" {
			printf(w, "          = hint: %s\n", oneLine(i.Advice))
		}
	}
}

// interferenceCode is the exit code that a list asks for: what breaks the policy
// or may is a finding, what could not be judged cannot be told, notes are fine.
func interferenceCode(list []interferenceJSON) int {
	code := exitOK
	for _, i := range list {
		switch {
		case i.Severity == string(firewall.Note):
		case !i.Unknown:
			return exitFindings
		default:
			code = exitRefused
		}
	}
	return code
}
