package rules

import (
	"strconv"
	"strings"
)

// checkInterface says what is wrong with the name of an interface, which may
// end in one *.
func checkInterface(s string) *complaint {
	// The kernel's rule (dev_valid_name), and what nft has no way to write.
	unwritable := func(c rune) bool { return c == '/' || c == ':' || c == '"' || c == ' ' || !strconv.IsPrint(c) }
	base := strings.TrimSuffix(s, "*")
	switch {
	case s == "":
		return &complaint{"interface name is empty", `write a name like "eth0" or "wg*"`}
	case s == "*":
		return &complaint{`interface "*" means every interface`, `leave it out, or write a prefix like "wg*"`}
	case strings.Contains(base, "*"):
		return &complaint{"interface " + quote(s) + " has a * that is not its end", `one * at the end is allowed, as in "wg*"`}
	case len(s) > 15:
		c := &complaint{"interface name " + quote(s) + " is longer than 15 bytes", "Linux has no such interface"}
		if strings.Contains(s, ",") {
			c.hint = `write a list: ["eth0", "eth1"]`
		}
		return c
	case s == "." || s == "..":
		return &complaint{"interface name " + quote(s) + " is not possible", "Linux has no such interface"}
	case strings.IndexFunc(s, unwritable) >= 0 || strings.Contains(s, ","):
		hint := "blanks, control characters and any of / : , \" cannot stand in it"
		if strings.ContainsAny(s, ", ") {
			hint = `write a list: ["eth0", "eth1"]`
		}
		return &complaint{"interface name " + quote(s) + " is not possible", hint}
	}
	return nil
}
