package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// Severity says how much an [Interference] matters.
type Severity string

// The severities, worst first.
const (
	Breaks Severity = "breaks" // it drops what the policy opens, or can open what it closes
	May    Severity = "may"    // it could change a verdict
	Note   Severity = "note"   // harmless as far as it can be judged, or intended
)

// Interference is one thing outside Deadlight's table that bears on the verdict
// of the policy in this network namespace.
type Interference struct {
	Severity Severity
	// Unknown says that it could not be judged: it may be harmless.
	Unknown bool
	Kind    string   // "drop", "answers", "rewrite", "notrack", "redirect", "proxy", "copy", "offload", "chain", "legacy", "tc", "xdp", "tcx", "unit", "script"
	Where   string   // "table ip filter, chain INPUT", "interface eth0", "ufw.service"
	Rule    string   // what there does it: a rule, a policy, a line of a file; may be empty
	Ports   []string // of the policy, that it bears on: "443/tcp", "esp"
	Fact    string   // a plain sentence
	Advice  string   // what to do about it
}

// ID tells one interference from another, whatever ports it bears on now.
func (i Interference) ID() string { return i.Kind + " at " + i.Where + ": " + i.Rule }

// HostFiles are the files that Interference reads.
type HostFiles struct {
	// Root is the root directory with the units and scripts that may flush the
	// ruleset. nil: they are not looked at, as of another network namespace than
	// that of process 1 they say nothing.
	Root fs.FS
	// Net holds ip_tables_names and ip6_tables_names; nil: those of the namespace.
	Net fs.FS
}

// Interference lists what outside of Deadlight's table may change what the
// policy says of packets that arrive, worst first: chains of other tables that
// stop what the policy opens, or answers to it; what rewrites packets before or
// after they are judged; tables of legacy iptables; tc filters, XDP and tcx
// programs on the interfaces that the policy names (all but loopback when an
// opening names none); units and scripts that flush the ruleset. What cannot be
// judged is listed as such.
//
// Openings are tried with representative packets, the first of a flow and the
// answer to it: every port of a range of up to 128, a longer one cut where
// foreign rules name ports; one source of each list; on each interface, in each
// family in which it has an address beyond the link. Without a ruleset no packet
// can be tried, and chains that can drop are listed as not judged.
//
// Units count as enabled when systemd's directories say that another unit wants
// or requires them, or such a unit pulls them in; what programs that are no
// scripts run is not seen.
//
// Not seen: eBPF on cgroups and sockets, netkit devices, classful qdiscs that
// drop, what hardware does by itself, and other hosts on the way.
//
// Errors to test for: [ErrPermission].
func (c *Conn) Interference(rs *rules.Ruleset, host HostFiles) ([]Interference, error) {
	const tries = 10
	var out []Interference
	err := errTorn
	for i := 0; i < tries && errors.Is(err, errTorn); i++ {
		out, err = c.foreign(rs)
	}
	if err != nil {
		return nil, fmt.Errorf("look for interference: %w", err)
	}
	err = c.inside(func() error {
		out = append(out, legacyInterference(host.Net)...)
		out = append(out, linkInterference(rs)...)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for interference: %w", err)
	}
	if host.Root != nil {
		out = append(out, unitInterference(host.Root)...)
	}
	rank := []Severity{Breaks, May, Note}
	slices.SortStableFunc(out, func(a, b Interference) int {
		return cmp.Compare(slices.Index(rank, a.Severity), slices.Index(rank, b.Severity))
	})
	return out, nil
}

// alone reports whether there is no table but ours: then ten thousand rules need
// not be read to find nothing.
func (c *Conn) alone() (bool, error) {
	ours, others := 0, 0
	err := c.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, unix.AF_UNSPEC, nil, func(r reply) error {
		if attrText(r.attrs, unix.NFTA_TABLE_NAME) == rules.TableName {
			ours++
		} else {
			others++
		}
		return nil
	})
	return others == 0 && ours <= 1, err
}

// foreign judges the chains of other tables, at one generation.
func (c *Conn) foreign(rs *rules.Ruleset) ([]Interference, error) {
	gen, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if alone, err := c.alone(); err != nil || alone {
		return nil, err
	}
	k, err := c.liveRules()
	if err != nil {
		return nil, err
	}
	arp, err := c.liveTables(familyARP)
	if err != nil {
		return nil, err
	}
	k.tables = slices.DeleteFunc(append(k.tables, arp...), func(t *liveTable) bool {
		return t.dormant || t.isOurs()
	})
	host, notes := c.lookAround()
	found := newFindings()
	for _, n := range notes {
		if !strings.HasPrefix(n, "not walked") { // the tables of legacy iptables are listed by themselves
			found.add(Interference{Severity: May, Unknown: true, Kind: "chain", Where: "this host", Fact: "Could not tell: " + n + "."})
		}
	}
	if rs != nil && len(k.tables) > 0 {
		if err := (&trial{rs: rs, rules: k, host: host, conn: c, found: found}).run(); err != nil {
			return nil, err
		}
	}
	for _, t := range k.tables {
		for _, ch := range t.bases {
			found.scan(ch, rs != nil)
		}
	}
	now, err := c.Generation()
	if err != nil {
		return nil, err
	}
	if now.ID != gen.ID {
		return nil, errTorn
	}
	return found.list(), nil
}

// HostFiles gives the files that bear on the namespace of the socket: with the
// root directory of this machine if it is that of process 1, whose units and
// scripts run there, else without.
func (c *Conn) HostFiles() HostFiles {
	first, err := stat("/proc/1/ns/net")
	var own unix.Stat_t
	if err != nil || unix.Fstat(int(c.ns.Fd()), &own) != nil || first.Dev != own.Dev || first.Ino != own.Ino {
		return HostFiles{}
	}
	return HostFiles{Root: os.DirFS("/")}
}
