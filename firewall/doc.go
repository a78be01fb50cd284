// Package firewall puts a compiled ruleset into the kernel and reads back what
// the kernel holds. It is the only package that writes the host's rules, and it
// writes one table, `inet deadlight`, and no other.
//
// A change is one netlink transaction: the kernel takes all of it or nothing.
// It replaces rules, sets and maps in place, so that the base chains stay
// hooked and no packet finds the host open in between. Success means that the
// table was read back and is what was meant.
//
// What was applied is kept in a directory, whole at every instant, so that the
// kernel can be held against it: see [State].
//
// It never runs another program and never touches a network namespace but the
// one it was dialled in.
package firewall
