package main

import (
	"time"

	"github.com/spf13/cobra"

	"deadlight/rules"
)

func newShowCommand(e env) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "show [POLICY]",
		GroupID: groupWrite,
		Short:   "Print the compiled ruleset as nft text",
		Long: `Prints the table a policy compiles to as nft text, for reading and for review.
nft -c -f accepts it. Deadlight itself never runs nft.`,
		Example: "  deadlight show configs/webserver.toml | nft -c -f -",
		Args:    atMostPolicy,
		RunE: func(_ *cobra.Command, args []string) error {
			rs, err := readPolicy(e, policyArg(args), "nothing to show")
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(e.stdout, tableJSON(&rs.Table))
			}
			return rs.Table.WriteNFT(e.stdout, time.Now())
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

// shown is the object of `show --json`: the table that a policy compiles to.
type shown struct {
	Schema   int         `json:"schema"`
	Family   string      `json:"family"`
	Table    string      `json:"table"`
	Counters []string    `json:"counters"` // their names
	Sets     []setJSON   `json:"sets"`
	Chains   []chainJSON `json:"chains"`
}

// chainJSON is a chain; hook, priority and policy are those of a base chain.
type chainJSON struct {
	Name     string     `json:"name"`
	Hook     string     `json:"hook,omitempty"`
	Priority *int       `json:"priority,omitempty"`
	Policy   string     `json:"policy,omitempty"`
	Rules    []ruleJSON `json:"rules"`
}

// ruleJSON is a rule of a chain.
type ruleJSON struct {
	Comment string `json:"comment"` // kind and name of the rule of the policy: "open ssh"
	Text    string `json:"text"`    // as nft writes it
}

// setJSON is a set or a verdict map.
type setJSON struct {
	Name     string   `json:"name"`
	Type     string   `json:"type"`
	Elements []string `json:"elements"`
	Chains   []string `json:"chains,omitempty"` // of a verdict map, parallel to elements
}

func tableJSON(t *rules.Table) *shown {
	out := &shown{Schema: 1, Family: "inet", Table: t.Name, Counters: append([]string{}, t.Counters...), Sets: []setJSON{}, Chains: []chainJSON{}}
	for i := range t.Sets {
		s := &t.Sets[i]
		elements := s.Elements()
		if elements == nil {
			elements = []string{} // not null
		}
		out.Sets = append(out.Sets, setJSON{s.Name, s.Type.String(), elements, s.Targets})
	}
	for i := range t.Chains {
		ch := &t.Chains[i]
		j := chainJSON{Name: ch.Name, Rules: []ruleJSON{}}
		if ch.Base != nil {
			j.Hook, j.Priority, j.Policy = ch.Base.Hook.String(), &ch.Base.Priority, "drop"
			if ch.Base.Accept {
				j.Policy = "accept"
			}
		}
		for _, r := range ch.Rules {
			j.Rules = append(j.Rules, ruleJSON{r.Comment, r.NFT()})
		}
		out.Chains = append(out.Chains, j)
	}
	return out
}
