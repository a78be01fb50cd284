package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/configs"
	"deadlight/firewall"
)

func newInitCommand(e env) *cobra.Command {
	var observed bool
	c := &cobra.Command{
		Use:     "init [EXAMPLE]",
		GroupID: groupWrite,
		Short:   "Write a starter policy from what listens now, or an example",
		Long: `Prints a policy that opens what the outside reaches now, and no more: for every
socket that listens beyond loopback, and every port that another table publishes,
the running rules are asked whether they admit a stranger, by each interface. A
socket that is bound to one address or interface is opened there only; what a
firewall closes now, ports of clients and loopback are left as comments. Your own
SSH or mosh session stays admitted. Then it is yours: read it, take out what nobody
needs, and narrow the rest.

With --from-observed it proposes an opening for each port that somebody listens at
and that the policy in force does not open, to those who knocked there: apply a
policy with enforce = false, wait a few days, then ask. An attacker may have knocked
too.

With the name of an example, that is printed: ` + strings.Join(configs.Names(), ", ") + `.

Nothing is changed. It takes root to see the processes and the running rules; an
example takes none.`,
		Example: "  sudo deadlight init > policy.toml\n  deadlight init webserver > policy.toml\n  sudo deadlight init --from-observed",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageError("deadlight init --help", "one example at a time: %s", strings.Join(args[1:], " "))
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if observed && len(args) > 0 {
				return usageError("deadlight init --from-observed", "--from-observed takes no example: %s", args[0])
			}
			text, err := starterPolicy(args, observed)
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(e.stdout, text)
			return err
		},
	}
	c.Flags().BoolVar(&observed, "from-observed", false, "propose openings for who knocked where somebody listens")
	return c
}

// starterPolicy gives the text of init.
func starterPolicy(args []string, observed bool) (string, error) {
	if len(args) == 1 {
		b, err := configs.Read(args[0])
		if errors.Is(err, fs.ErrNotExist) {
			return "", usageError("there are "+strings.Join(configs.Names(), ", ")+"; without a name: what listens now", "there is no example %s", strconv.Quote(args[0]))
		}
		return string(b), err
	}
	draw := starterHere
	if observed {
		draw = observedHere
	}
	text, err := draw()
	var x *exitError
	switch {
	case errors.Is(err, firewall.ErrPermission):
		return "", refused(errors.New("the processes and the kernel's rules are not visible without root: what is open now cannot be told"),
			"sudo deadlight init, or an example: deadlight init minimal")
	case errors.As(err, &x):
		return "", err
	case err != nil:
		return "", refused(err, "")
	}
	return text, nil
}

// starterHere draws a policy from the network namespace of the calling thread.
func starterHere() (_ string, err error) {
	conn, err := firewall.Dial(nil)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	s, err := starterOf(conn)
	if err != nil {
		return "", err
	}
	return s.policy()
}

// starterOf looks at the network namespace of the calling thread.
func starterOf(conn *firewall.Conn) (_ *starter, err error) {
	s := &starter{units: map[int]string{}, now: time.Now(), asked: inquiry{ask: conn.WalkAll}}
	if s.runs, err = conn.PublishedRuns(); err != nil {
		return nil, err
	}
	if s.sockets, err = allListeners(); err != nil {
		return nil, err
	}
	for _, l := range s.sockets {
		if _, known := s.units[l.PID]; !known {
			s.units[l.PID] = unitOf("/proc", l.PID)
		}
	}
	if s.nics, err = nics(); err != nil {
		return nil, err
	}
	if s.sessions, err = operator(); err != nil {
		return nil, refused(fmt.Errorf("%w: the policy might not admit it", err), "run it from a login shell of that session, with sudo")
	}
	if s.ephemeral, err = clientPorts(); err != nil {
		return nil, err
	}
	return s, nil
}

// clientPorts is the range of ports that clients are given (ip(7)).
func clientPorts() (ports [2]uint16, err error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		return ports, err
	}
	if _, err := fmt.Sscan(string(b), &ports[0], &ports[1]); err != nil {
		return ports, fmt.Errorf("read the range of client ports: %w", err)
	}
	return ports, nil
}
