package main

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"deadlight/cmd/deadlight/importer"
)

func newImportCommand(e env) *cobra.Command {
	var o importer.Options
	c := &cobra.Command{
		Use:     "import [FILE...]",
		GroupID: groupWrite,
		Short:   "Make a policy of the rules of another firewall",
		Long: `Reads the rules of ufw, firewalld, iptables or nftables and prints a policy.

FILE is the output of iptables-save and ip6tables-save (both, for both families;
that of ipset save may be added), of nft -j list ruleset, /etc/ufw or
/etc/firewalld; - is standard input. Which it is shows by its content. Without a
FILE the configuration of this host is read: that of ufw or firewalld, whichever is
switched on, or which --from names.

The policy admits no flow that the original denied. What it cannot say, or what
cannot be told for sure, stays shut and is listed with its line: on stderr, and as
a comment in the policy. Nothing is loaded and nothing needs root but reading the
files.`,
		Example: `  sudo deadlight import --from ufw > policy.toml
  deadlight import /mnt/etc/ufw > policy.toml
  sudo iptables-save > v4; sudo ip6tables-save > v6; deadlight import v4 v6 > policy.toml
  sudo nft -j list ruleset | deadlight import - > policy.toml
  deadlight import /etc/firewalld | deadlight check /dev/stdin`,
		RunE: func(_ *cobra.Command, args []string) error {
			if o.Format != "" && !slices.Contains(importer.Formats(), o.Format) {
				return usageError("", "--from takes %s, not %q", strings.Join(importer.Formats(), ", "), o.Format)
			}
			if o.Family != "" && o.Family != "ipv4" && o.Family != "ipv6" {
				return usageError("", "--family takes ipv4 or ipv6, not %q", o.Family)
			}
			if len(args) == 0 {
				dir, err := configuredHere(o.Format)
				if err != nil {
					return err
				}
				args = []string{dir}
			}
			return importRules(e, args, o)
		},
	}
	c.Flags().StringVar(&o.Format, "from", "", "ufw, firewalld, iptables or nft; default: by the content")
	c.Flags().StringVar(&o.Family, "family", "", "ipv4 or ipv6: what iptables rules are for, if nothing in them tells")
	return c
}

// configuredHere is the directory of the firewall of this host: the one named, or
// the one that is switched on.
func configuredHere(format string) (string, error) {
	switch format {
	case "ufw", "firewalld":
		return "/etc/" + format, nil
	case "iptables":
		return "", usageError("(sudo iptables-save; sudo ip6tables-save) | deadlight import -", "the rules of iptables are in the kernel: name the output of iptables-save")
	case "nft":
		return "", usageError("sudo nft -j list ruleset | deadlight import -", "the rules of nft are in the kernel: name the output of nft -j list ruleset")
	}
	on, err := importer.SwitchedOn("/")
	switch {
	case err != nil:
		return "", refused(err, "sudo deadlight import")
	case len(on) == 0:
		return "", usageError("sudo nft -j list ruleset | deadlight import -, or: sudo iptables-save | deadlight import -", "neither ufw nor firewalld is switched on here: name the rules to import")
	case len(on) > 1:
		return "", usageError("deadlight import --from "+on[0], "%s are switched on here: say which to import", strings.Join(on, " and "))
	}
	return "/etc/" + on[0], nil
}

func importRules(e env, names []string, o importer.Options) error {
	o.Stdin = e.stdin
	p, err := importer.Import(names, o)
	if err != nil {
		return usageError("", "%w: nothing imported", err)
	}
	for _, n := range p.Notes {
		printf(e.stderr, "%s\n", printable("warning: "+n.String()))
	}
	printf(e.stdout, "%s", p.Text)
	if len(p.Notes) > 0 {
		printf(e.stderr, "deadlight: %s not as in the original: each stands above, and in the policy\n", plural(len(p.Notes), "place"))
	}
	return nil
}
