// Package verify looks at a host from outside and says, port by port, what it
// saw: open, closed, rejected, filtered or unknown, and why it says so. What it
// expects of each probe is what [rules.Ruleset.Decide] says of it.
//
// It looks at a throw-away host ([Rehearse]), at the host it runs on
// ([LookAtHost]), or at others from here ([Look], [LookAtMany]) or from another
// machine ([SSHVantage]).
//
// It never imports package firewall: the witness shares no code with the
// accused. Silence counts as evidence only while canaries prove the path alive;
// without them the answer is "unknown", never "filtered". What it puts into a host
// to see better (a tripwire, a way in for the probes, a way back for the answers)
// is apart from the host's own, and goes with the run or is removed by the next.
// It never changes a rule of anybody else, and sends nothing to a machine that was
// not named but the question for the next hop.
package verify
