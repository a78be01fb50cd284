package firewall

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// Errors to test for with errors.Is. After each of them the ruleset is what it
// was before.
var (
	// ErrPermission: CAP_NET_ADMIN in the namespace is missing.
	ErrPermission = errors.New("no permission to change the firewall")
	// ErrStale: somebody else changed the ruleset between our look and our write.
	ErrStale = errors.New("the ruleset changed in the meantime")
	// ErrTooLarge: the transaction exceeds the socket buffer this user may have.
	ErrTooLarge = errors.New("the transaction is larger than net.core.wmem_max lets this user send")
	// ErrNamespace: the socket is not in the network namespace it was meant for.
	ErrNamespace = errors.New("refused: not the network namespace that was asked for")
)

// OpError is a change that the kernel refused. It unwraps to the errno.
type OpError struct {
	Op     string // what was to be changed: "rule \"open ssh\" in chain gate"
	Errno  syscall.Errno
	Detail string // the kernel's own words (extended ack), may be empty
}

func (e *OpError) Error() string {
	if e.Detail != "" {
		return fmt.Sprintf("%s: %s (%s)", e.Op, e.Errno.Error(), e.Detail)
	}
	return fmt.Sprintf("%s: %s", e.Op, e.Errno.Error())
}

// Unwrap gives the errno.
func (e *OpError) Unwrap() error { return e.Errno }

// TransactionError names every change of a transaction that the kernel refused.
// Nothing of it is in force.
type TransactionError struct{ Ops []*OpError }

func (e *TransactionError) Error() string {
	const most = 5
	var b strings.Builder
	b.WriteString("the kernel refused ")
	for i, op := range e.Ops {
		if i == most {
			fmt.Fprintf(&b, "; and %d more", len(e.Ops)-most)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(op.Error())
	}
	return b.String()
}

// Unwrap gives each refused change.
func (e *TransactionError) Unwrap() []error {
	var out []error
	for _, op := range e.Ops {
		out = append(out, op)
	}
	return out
}

// MismatchError says that the kernel took a transaction but holds something
// else than was meant.
type MismatchError struct{ Differences []Difference }

func (e *MismatchError) Error() string {
	var b strings.Builder
	b.WriteString("read back something else than was written")
	for i, d := range e.Differences {
		if i == 5 {
			fmt.Fprintf(&b, "; and %d more", len(e.Differences)-i)
			break
		}
		b.WriteString("; " + d.String())
	}
	return b.String()
}

// NameError says that a user or a group of the policy does not exist here.
type NameError struct {
	Kind, Name string // "user" or "group"
	Err        error
}

func (e *NameError) Error() string { return fmt.Sprintf("there is no %s %q here", e.Kind, e.Name) }

// Unwrap gives the error of os/user.
func (e *NameError) Unwrap() error { return e.Err }
