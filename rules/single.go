package rules

import (
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// The tables that stand once.

var defaultSchema = schema[draft]{
	{name: "input", also: []string{"incoming", "inbound", "policy", "action"}, read: func(r *reader, v named, d *draft) {
		s := r.oneOf(v, "drop", "reject")
		if s == "reject" {
			d.Default.Input = Reject
		}
		d.Default.Pos = r.pos(v.span())
	}},
	{name: "published", also: []string{"docker", "containers"}, read: func(r *reader, v named, d *draft) {
		d.Default.IgnorePublished = r.oneOf(v, "drop", "ignore") == "ignore"
	}},
	{name: "output", also: []string{"outgoing", "outbound", "egress"}, read: func(r *reader, v named, d *draft) {
		switch r.oneOf(v, "accept", "drop", "reject") {
		case "drop":
			d.Default.Output = Drop
		case "reject":
			d.Default.Output = Reject
		}
	}},
	{name: "forward", also: []string{"forwarding", "routed"}, read: func(r *reader, v named, d *draft) {
		d.Default.DropForward = r.oneOf(v, "ignore", "drop") == "drop"
	}},
	{name: "established", also: []string{"related", "flows"}, read: func(r *reader, v named, d *draft) {
		d.Default.KeepFlows = r.oneOf(v, "recheck", "keep") == "keep"
	}},
	{name: "enforce", also: []string{"enforcing"}, read: func(r *reader, v named, d *draft) {
		if b, ok := r.boolean(v); ok {
			d.Default.Observe = !b
		}
	}},
}

var publishedSchema = schema[draft]{
	{name: "interfaces", also: []string{"interface", "iface", "dev"}, read: func(r *reader, v named, d *draft) {
		d.Published.Interfaces = r.interfaces(v, "leave interfaces out for the default")
	}},
}

var icmpSchema = schema[draft]{
	{name: "echo", also: []string{"ping", "echo-request"}, below: rateSchema.paths(), read: func(r *reader, v named, d *draft) {
		d.ICMP.Pos = r.pos(v.span())
		d.ICMP.Echo, d.ICMP.Rate = r.switched(v, rateSchema)
	}},
}

var dhcpSchema = schema[draft]{
	{name: "client", read: func(r *reader, v named, d *draft) {
		d.DHCP.Pos = r.pos(v.span())
		switch b := v.v.(type) {
		case bool:
			d.DHCP.Client = b
		case string, []any:
			d.DHCP.Interfaces = r.interfaces(v, "write client = false to admit no DHCP")
		default:
			r.errorf(v.span(), "", "client must be true, false, the name of an interface or a list of those, not %s", v.kind())
		}
	}},
}

var logSchema = schema[draft]{
	{name: "dropped", also: []string{"drop", "drops", "denied", "blocked"}, below: logRateSchema.paths(), read: func(r *reader, v named, d *draft) {
		d.Log.Dropped, d.Log.Rate = r.switched(v, logRateSchema)
		if d.Log.Rate != nil {
			d.Log.Rate.PerSource = false
		}
	}},
	{name: "prefix", read: func(r *reader, v named, d *draft) { d.Log.Prefix = r.prefix(v) }},
	{name: "group", also: []string{"nflog"}, read: func(r *reader, v named, d *draft) {
		if n, ok := r.integer(v, 0, 65535); ok {
			group := uint16(n)
			d.Log.Group = &group
		}
	}},
	{name: "knocks", also: []string{"count", "counters"}, read: func(r *reader, v named, d *draft) {
		if b, ok := r.boolean(v); ok {
			d.Log.Knocks = b
		}
	}},
}

// maxPrefix is what the kernel's log leaves room for beside our own words.
const maxPrefix = 64

// prefix reads what each line of the log begins with.
func (r *reader) prefix(v named) string {
	s, ok := r.str(v)
	if !ok {
		return ""
	}
	if len(s) > maxPrefix {
		r.errorf(v.span(), fmt.Sprintf("%d bytes at most", maxPrefix), "prefix is %d bytes long", len(s))
	}
	for _, c := range s {
		// nft has no way to write a quote in a string, and $ begins a variable.
		if !strconv.IsPrint(c) || strings.ContainsRune("\"'`\\$", c) {
			r.errorf(v.span(), "write plain text without quotes, \\ and $", "prefix cannot hold %s", strconv.QuoteRune(c))
			break
		}
	}
	return s
}

var verifySchema = schema[draft]{
	{name: "vantage", also: []string{"from", "host", "probe"}, read: func(r *reader, v named, d *draft) {
		s, ok := r.str(v)
		if !ok {
			return
		}
		if bad := checkVantage(s); bad != nil {
			r.report(Error, v.span(), *bad)
		}
		d.Verify.Vantage = s
	}},
	{name: "thorough", also: []string{"thoroughness", "level"}, read: func(r *reader, v named, d *draft) {
		n, _ := r.integer(v, 0, 2)
		d.Verify.Thorough = int(n)
	}},
}

// checkVantage says what is wrong with a place to look from. What it lets pass
// can be given to ssh as an argument.
func checkVantage(s string) *complaint {
	if s == "netns" {
		return nil
	}
	hint := `write "netns" or "ssh://user@host"`
	rest, ok := strings.CutPrefix(s, "ssh://")
	if !ok {
		return &complaint{"unknown vantage " + quote(s), hint}
	}
	bad := &complaint{"vantage " + quote(s) + " is not of the form ssh://user@host", hint}
	u, err := url.Parse(s)
	if err != nil || u.User == nil || u.Scheme+"://"+u.User.Username()+"@"+u.Host != s {
		if err == nil && u.User == nil && rest != "" && u.Path == "" {
			bad.hint = fmt.Sprintf("name the user: %s", quote("ssh://probe@"+rest))
		}
		return bad
	}
	const plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	user, host, port := u.User.Username(), u.Hostname(), u.Port()
	_, noAddr := netip.ParseAddr(host)
	switch n, err := strconv.Atoi(port); {
	case user == "" || strings.Trim(user, plain) != "" || user[0] == '-':
		return bad
	case host == "" || noAddr != nil && (strings.Trim(host, plain) != "" || host[0] == '-'):
		return bad
	case strings.HasSuffix(u.Host, ":") || port != "" && (err != nil || n < 1 || n > 65535):
		return &complaint{"vantage " + quote(s) + " has no port from 1 to 65535 after the colon", portHint}
	}
	return nil
}
