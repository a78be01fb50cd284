// Package rules turns the bytes of a policy file into a [Policy], and a Policy
// into a [Ruleset]: the tables, chains, sets and maps that Deadlight keeps in
// the kernel. [Ruleset.Decide] says what must happen to a packet.
//
// It is pure: no kernel, no clock, no environment, and files only through the
// reader it is handed. The same bytes always give the same Ruleset.
package rules
