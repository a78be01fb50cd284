// Package firewall puts a compiled ruleset into the kernel and reads back what
// the kernel holds. It is the only package that writes the host's rules, and it
// writes one table, `inet deadlight`, and no other. Only into a throw-away host
// does it plant a hole, for the self-test of the verifier: [Conn.PlantRedirect].
//
// What packets meet changes in one netlink transaction and in place: base chains
// stay hooked, and no packet finds the host open in between. Sets that change are
// made before it and removed after it; lists of blocked addresses, and large ones
// in which nothing else changes, take and lose elements where they are. Success
// means that the table was read back and is what was meant; of sets too large for
// that, a mark, the kernel's count and a sample.
//
// What was applied is kept in a directory, whole at every instant, so that the
// kernel can be held against it: see [State]. Beside the table only conntrack is
// written, on a first apply: [Conn.Seed]. All else of the kernel is read, for what
// bears on the policy from outside ([Conn.Interference]) and what it does to a
// packet ([Conn.Walk]).
//
// It never runs another program and never touches a network namespace but the
// one it was dialled in.
package firewall
