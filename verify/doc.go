// Package verify looks at a host from outside and says, port by port, what it
// saw: open, closed, rejected, filtered or unknown, and why it says so.
//
// It never imports package firewall: the witness shares no code with the
// accused. Silence counts as evidence only while canaries prove the path alive;
// without them the answer is "unknown", never "filtered".
package verify
