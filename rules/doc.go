// Package rules turns the bytes of a policy file into a [Policy], and a Policy
// into a [Ruleset]: the tables, chains, sets and maps that Deadlight keeps in
// the kernel. [Ruleset.Decide] says what must happen to a packet.
//
// It promises that a Policy is valid, that [Compile] cannot fail, that two equal
// policies give equal Rulesets on every machine, and that every problem of a
// policy is told at once, with its place. Rules that stand beside a policy for some
// time, in no file, become part of it: [Policy.With].
//
// It is pure: no kernel, no clock, no environment, and files only through the
// reader it is handed. Decide reads the policy and never the compiled table, so
// that the two can be held against each other.
package rules
