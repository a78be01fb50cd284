package main

import (
	"net"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"deadlight/configs"
	"deadlight/rules"
)

// What a shell offers when Tab is pressed: files of policies, and the ports and
// interfaces that the policy names. It only reads, and is silent when it cannot.

// addCompletions tells every command and flag what can stand there, by the words of
// its usage.
func addCompletions(root *cobra.Command) {
	for _, c := range root.Commands() {
		_, args, _ := strings.Cut(c.Use, " ")
		switch {
		case c.ValidArgsFunction != nil:
		case strings.Contains(args, "COMMAND"):
			c.ValidArgsFunction = policyThenCommand
		case strings.Contains(args, "POLICY"):
			c.ValidArgsFunction = onePolicy
		case strings.HasPrefix(args, "PORT"):
			c.ValidArgsFunction = onePort
		case strings.HasPrefix(args, "FILE"):
			c.ValidArgsFunction = anyFile
		case strings.HasPrefix(args, "[EXAMPLE"):
			c.ValidArgsFunction = oneExample
		default:
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
		for _, flags := range []*pflag.FlagSet{c.Flags(), c.PersistentFlags()} {
			flags.VisitAll(func(f *pflag.Flag) {
				if _, told := c.GetFlagCompletionFunc(f.Name); told || f.Value.Type() == "bool" {
					return
				}
				if err := c.RegisterFlagCompletionFunc(f.Name, flagValues(f)); err != nil {
					panic(err) // not a flag of the command
				}
			})
		}
	}
}

// flagValues gives what can stand behind a flag.
func flagValues(f *pflag.Flag) cobra.CompletionFunc {
	word, _ := pflag.UnquoteUsage(f)
	switch f.Name {
	case "policy":
		return tomlFile
	case "state-dir", "root":
		return func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
	case "in", "interface":
		return interfaceNames
	case "warnings":
		return cobra.FixedCompletions([]cobra.Completion{"show", "error"}, cobra.ShellCompDirectiveNoFileComp)
	case "ports":
		return someOf
	case "canary":
		return canaryPorts
	}
	words := map[string][]cobra.Completion{
		"format": formats(), "proof": {"host", "packets"}, "thorough": {"0", "1", "2"}, "vantage": {"netns", "ssh://"},
		"family": {"ipv4", "ipv6"}, "from": {"ufw", "firewalld", "iptables", "nft"},
	}
	if list, ok := words[f.Name]; ok && (f.Name != "from" || strings.Contains(f.Usage, "ufw")) {
		return cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp)
	}
	if word == "FILE" || f.Name == "since" || f.Name == "ssh-config" {
		return anyFile
	}
	return cobra.NoFileCompletions
}

func anyFile(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

func tomlFile(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return []cobra.Completion{"toml"}, cobra.ShellCompDirectiveFilterFileExt
}

func oneExample(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return configs.Names(), cobra.ShellCompDirectiveNoFileComp
}

func onePolicy(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return tomlFile(c, args, start)
}

func policyThenCommand(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return tomlFile(c, args, start)
}

// asked gives the policy that a command line is about; nil if it cannot be read.
func asked(c *cobra.Command, args []string) *rules.Policy {
	file := policyArg(args)
	if f := c.Flags().Lookup("policy"); f != nil {
		file = f.Value.String()
	}
	if fromPipe(file) {
		return nil // it can be read but once, and that is not for us
	}
	rs, _, err := parsePolicy(file)
	if err != nil || rs == nil {
		return nil
	}
	return rs.Policy
}

// onePort offers the ports of the policy, with the names of the rules that have them.
func onePort(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	const directive = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
	if len(args) > 0 {
		return nil, directive
	}
	p := asked(c, args)
	if p == nil {
		return nil, directive
	}
	return portsOf(p, start), directive
}

// portsOf offers the ports of a policy, in its order, with the names of the rules.
func portsOf(p *rules.Policy, start string) []cobra.Completion {
	var ports []string
	named := map[string][]string{}
	add := func(kind string, t *rules.Traffic) {
		note := func(port string) {
			if !strings.HasPrefix(port, start) || strings.Contains(port, " ") {
				return // "protocol 99" is no word that explain takes
			}
			if named[port] == nil {
				ports = append(ports, port)
			}
			named[port] = append(named[port], kind+" "+t.Name)
		}
		for _, on := range t.On {
			if on.Ports == nil {
				note(rules.PortName(on.Protocol, 0))
			}
			for _, r := range on.Ports {
				note(rules.PortName(on.Protocol, r.Lo)) // of a range, its first
			}
		}
	}
	for i := range p.Block {
		add("block", &p.Block[i].Traffic)
	}
	for i := range p.Open {
		add("open", &p.Open[i].Traffic)
	}
	var out []cobra.Completion
	for _, port := range ports {
		out = append(out, cobra.CompletionWithDesc(port, strings.Join(named[port], ", ")))
	}
	return out
}

// someOf offers what --ports takes: all of a protocol, or ports of the policy.
func someOf(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	before, last := "", start
	if i := strings.LastIndexByte(start, ','); i >= 0 {
		before, last = start[:i+1], start[i+1:]
	}
	var out []cobra.Completion
	for _, word := range []string{"all", "tcp", "udp"} {
		if strings.HasPrefix(word, last) {
			out = append(out, before+word)
		}
	}
	if p := asked(c, args); p != nil {
		for _, port := range portsOf(p, last) {
			if name, _, _ := strings.Cut(port, "\t"); strings.HasSuffix(name, "/tcp") || strings.HasSuffix(name, "/udp") {
				out = append(out, before+port)
			}
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// canaryPorts offers the numbers of the TCP ports that the policy opens or blocks.
func canaryPorts(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	if p := asked(c, args); p != nil {
		for _, port := range portsOf(p, start) {
			name, rule, _ := strings.Cut(port, "\t")
			if number, tcp := strings.CutSuffix(name, "/tcp"); tcp {
				out = append(out, cobra.CompletionWithDesc(number, rule))
			}
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// interfaceNames offers the interfaces that the policy names in full, and those of
// this host.
func interfaceNames(c *cobra.Command, args []string, start string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var out []cobra.Completion
	if p := asked(c, args); p != nil {
		add := func(t *rules.Traffic) {
			for _, name := range t.Interfaces {
				if !strings.HasSuffix(name, "*") && strings.HasPrefix(name, start) {
					out = append(out, name)
				}
			}
		}
		for i := range p.Block {
			add(&p.Block[i].Traffic)
		}
		for i := range p.Open {
			add(&p.Open[i].Traffic)
		}
	}
	if list, err := net.Interfaces(); err == nil {
		for _, i := range list {
			if i.Flags&net.FlagLoopback == 0 && strings.HasPrefix(i.Name, start) {
				out = append(out, i.Name)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
}
