package main

import (
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"deadlight/rules"
)

func newCheckCommand(e env) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "check [POLICY]",
		GroupID: groupWrite,
		Short:   "Say whether a policy is valid and what it opens",
		Long: `Reads a policy whole, reports every problem at once and lists what it opens.
Nothing is loaded and nothing needs root. POLICY defaults to ` + defaultPolicy + `.`,
		Example: "  deadlight check\n  deadlight check configs/webserver.toml --json",
		Args:    atMostPolicy,
		RunE: func(_ *cobra.Command, args []string) error {
			if asJSON {
				return checkJSON(e, policyArg(args))
			}
			return check(e, policyArg(args))
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func check(e env, file string) error {
	rs, err := readPolicy(e, file, "policy not loaded")
	if err != nil {
		return err
	}
	printf(e.stdout, "%s: valid, %s\n", printable(file), plural(len(rs.Policy.Open), "opening"))
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	for i := range rs.Policy.Open {
		o := &rs.Policy.Open[i]
		var protocols []string
		for _, p := range o.Protocols {
			protocols = append(protocols, p.String())
		}
		var ports []string
		for _, r := range o.Ports {
			ports = append(ports, r.String())
		}
		printf(w, "  open\t%s/%s\tfrom %s\t%q\n", strings.Join(ports, ","), strings.Join(protocols, "+"), fromWhere(o), o.Name)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	p := rs.Policy
	printf(e.stdout, "Every other TCP and UDP port: %s\n", map[rules.Action]string{
		rules.Drop: "dropped, filtered as seen from outside", rules.Reject: "rejected, the sender is told"}[p.Default.Input])
	if !p.ICMP.Echo {
		printf(e.stdout, "Echo requests (ping) are not answered\n")
	}
	return nil
}

// fromWhere says in words whom an opening admits.
func fromWhere(o *rules.Open) string {
	from := "anywhere"
	if !o.From.Any {
		var list []string
		for _, r := range o.From.Ranges {
			list = append(list, r.String())
		}
		for _, s := range o.From.Sets {
			list = append(list, "@"+s)
		}
		if n := len(list) - 6; n > 0 {
			list = append(list[:6], "…", plural(n, "more source"))
		}
		from = strings.Join(list, ", ")
	}
	if o.Family != rules.Both {
		from += " (" + o.Family.String() + ")"
	}
	if len(o.Interfaces) > 0 {
		from += " by " + strings.Join(o.Interfaces, ", ")
	}
	return from
}

// openJSON is one opening of `check --json`.
type openJSON struct {
	Port       string   `json:"port"` // "443" or "6000-6010"
	Protocol   string   `json:"protocol"`
	Family     string   `json:"family"` // ipv4, ipv6 or both
	Rule       string   `json:"rule"`
	From       []string `json:"from"`       // prefixes, ranges and @sets
	Interfaces []string `json:"interfaces"` // "*" is every interface
}

func checkJSON(e env, file string) error {
	rs, problems, err := parsePolicy(file)
	if err != nil {
		return err
	}
	out := struct {
		Schema   int             `json:"schema"`
		OK       bool            `json:"ok"`
		Problems []rules.Problem `json:"problems"`
		Opens    []openJSON      `json:"opens"`
	}{1, rs != nil, append([]rules.Problem{}, problems...), []openJSON{}}
	if rs != nil {
		for i := range rs.Policy.Open {
			out.Opens = append(out.Opens, opensOf(&rs.Policy.Open[i])...)
		}
	}
	if err := writeJSON(e.stdout, out); err != nil {
		return err
	}
	if rs == nil {
		return silently(exitUsage)
	}
	return nil
}

func opensOf(o *rules.Open) []openJSON {
	from := []string{}
	if o.From.Any {
		if o.Family.Has(true) {
			from = append(from, "0.0.0.0/0")
		}
		if o.Family.Has(false) {
			from = append(from, "::/0")
		}
	}
	for _, r := range o.From.Ranges {
		from = append(from, r.String())
	}
	for _, s := range o.From.Sets {
		from = append(from, "@"+s)
	}
	interfaces := slices.Clone(o.Interfaces)
	if len(interfaces) == 0 {
		interfaces = []string{"*"}
	}
	var out []openJSON
	for _, p := range o.Protocols {
		for _, r := range o.Ports {
			out = append(out, openJSON{r.String(), p.String(), o.Family.String(), o.Name, from, interfaces})
		}
	}
	return out
}
