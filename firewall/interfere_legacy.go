package firewall

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// legacyInterference lists the tables of iptables-legacy, which nf_tables cannot
// show.
func legacyInterference(files fs.FS) []Interference {
	if files == nil {
		files = os.DirFS("/proc/thread-self/net")
	}
	var out []Interference
	for _, f := range [...]struct{ file, tool string }{{"ip_tables_names", "iptables-legacy"}, {"ip6_tables_names", "ip6tables-legacy"}} {
		b, err := fs.ReadFile(files, f.file)
		i := Interference{Severity: May, Unknown: true, Kind: "legacy", Where: f.tool}
		switch tables := strings.Fields(string(b)); {
		case errors.Is(err, fs.ErrNotExist):
			continue // the kernel has none
		case err != nil:
			i.Fact = fmt.Sprintf("Could not tell whether it has tables: %v.", err)
		case len(tables) == 0:
			continue
		default:
			i.Rule = "tables " + strings.Join(tables, ", ")
			i.Fact = "It has tables beside nf_tables, whose rules are not read here: they can drop what the policy opens. What the policy closes stays closed, unless its table raw or mangle rewrites packets."
			i.Advice = fmt.Sprintf("Look with %s-save; iptables-nft takes such rules over, where they can be judged.", f.tool)
		}
		out = append(out, i)
	}
	return out
}
