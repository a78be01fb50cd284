package firewall

// A hole that the self-test of the verifier plants in its own throw-away host.

import (
	"errors"
	"fmt"
	"os"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"deadlight/rules"
)

// plantedTable is the table of a planted redirect, and the name of its chain.
const plantedTable = "planted"

// Redirect sends what comes in for one TCP port to another one of the host.
type Redirect struct{ From, To uint16 }

// PlantRedirect adds a table that nobody but the self-test of the verifier wants:
// it stands for what other programs do. It can only reach a throw-away host: it
// refuses, with [ErrNamespace], unless this process is the first of a PID
// namespace and c is in another network namespace than the one that the process
// was started in.
func (c *Conn) PlantRedirect(r Redirect) error {
	if err := c.throwAway(); err != nil {
		return err
	}
	gen, err := c.Generation()
	if err != nil {
		return err
	}
	table := attrString(nil, unix.NFTA_TABLE_NAME, plantedTable)
	hook := attr32(nil, unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_PRE_ROUTING)
	// The kernel runs every nat chain at this place, whatever its own priority says
	// (nf_nat_register_fn).
	dstnat := int32(-100)
	hook = attr32(hook, unix.NFTA_HOOK_PRIORITY, uint32(dstnat))
	chain := attrString(nil, unix.NFTA_CHAIN_TABLE, plantedTable)
	chain = attrString(chain, unix.NFTA_CHAIN_NAME, plantedTable)
	chain = nest(chain, unix.NFTA_CHAIN_HOOK, hook)
	chain = attrString(chain, unix.NFTA_CHAIN_TYPE, "nat")
	w := &ruleWriter{}
	w.add(rules.Match{Field: rules.TCPDport, Number: uint32(r.From)})
	w.emit(
		&expr.Immediate{Register: reg, Data: binaryutil.BigEndian.PutUint16(r.To)},
		&expr.Redir{RegisterProtoMin: reg})
	rule, err := w.message(plantedTable, plantedTable, "")
	if err != nil {
		return err
	}
	return c.transact(gen.ID, []message{
		{typ: unix.NFT_MSG_NEWTABLE, flags: unix.NLM_F_CREATE, attrs: table, what: "table inet " + plantedTable},
		{typ: unix.NFT_MSG_NEWCHAIN, flags: unix.NLM_F_CREATE, attrs: chain, what: "chain planted"},
		rule,
	})
}

// throwAway refuses every namespace that this process did not make itself. The
// thread group leader never leaves the namespace that the process began in.
func (c *Conn) throwAway() error {
	if os.Getpid() != 1 {
		return fmt.Errorf("%w: this process is not isolated", ErrNamespace)
	}
	var own, there unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/self/ns/net", &own), unix.Fstat(int(c.ns.Fd()), &there)); err != nil {
		return fmt.Errorf("%w: %w", ErrNamespace, err)
	}
	if own.Dev == there.Dev && own.Ino == there.Ino {
		return fmt.Errorf("%w: this process was started in it", ErrNamespace)
	}
	return nil
}
