package main

// Many hosts from another machine: it gets one copy of this program and all there is
// to know, and sends back a line for each host that is done.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"deadlight/verify"
)

// fromVantageMany is the command that runs on a machine that looks for another one.
const fromVantageMany = "from-vantage-many"

// manyRequest is what the far side needs: nothing is read there.
type manyRequest struct {
	Policies map[string]policyFiles `json:"policies"`
	Hosts    []farHost              `json:"hosts"`
	Look     lookFlags              `json:"look"`
	Earlier  int                    `json:"earlier"`
	Vantage  string                 `json:"vantage"`
}

// policyFiles are a policy with its includes and lists.
type policyFiles struct {
	Files map[string][]byte   `json:"files"` // null: not there
	Globs map[string][]string `json:"globs"`
}

type farHost struct {
	Targets string `json:"targets"`
	Policy  string `json:"policy"`
}

// farNews is a line of the far side.
type farNews struct {
	Host  int           `json:"host"`
	Brief *verify.Brief `json:"brief,omitempty"` // nil: how far it is
	Sent  uint64        `json:"sent"`
	Done  float64       `json:"done"`
}

// farEvery is how often the far side says how far it is.
const farEvery = 200 * time.Millisecond

// lookAtManyOverSSH is [verify.LookAtMany] from another machine.
func lookAtManyOverSSH(ctx context.Context, e env, v verify.SSHVantage, hosts []target, policies map[string]*targetPolicy, look lookFlags, earlier int,
	each func(int, *verify.Brief) error, progress func(uint64, float64)) error {
	request := manyRequest{Policies: map[string]policyFiles{}, Look: look, Earlier: earlier, Vantage: v.String()}
	for i := range hosts {
		t := &hosts[i]
		request.Hosts = append(request.Hosts, farHost{strings.ReplaceAll(t.String(), " ", ""), t.policy})
		from := policies[t.policy].from
		p := policyFiles{from.read, map[string][]string{}}
		for _, g := range from.globs {
			p.Globs[g.Pattern] = g.Names
		}
		request.Policies[t.policy] = p
	}
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	news := &farLines{stop: stop}
	next := 0
	news.take = func(line []byte) error {
		var n farNews
		if err := json.Unmarshal(line, &n); err != nil {
			return fmt.Errorf("%w: %s says what this version does not understand: %w", verify.ErrVantage, v, err)
		}
		if n.Brief == nil {
			progress(n.Sent, n.Done)
			return nil
		}
		if n.Host != next || next == len(hosts) {
			return fmt.Errorf("%w: %s tells of host %d when %d is due", verify.ErrVantage, v, n.Host, next)
		}
		next++
		return each(n.Host, n.Brief)
	}
	code, err := v.Run(ctx, "/proc/self/exe", []string{fromVantageMany}, b, news, e.stderr)
	switch {
	case news.err != nil:
		return news.err
	case errors.Is(err, verify.ErrVantage):
		return refused(err, "try it by hand: ssh "+v.Host+" uname -sm")
	case err != nil:
		return err
	case code != exitOK:
		return silently(code) // it has said why
	case next != len(hosts):
		return fmt.Errorf("%w: %s told of %d hosts of %d", verify.ErrVantage, v, next, len(hosts))
	}
	return nil
}

// farLines takes what the far side prints apart.
type farLines struct {
	take func(line []byte) error
	stop context.CancelFunc
	rest []byte
	err  error
}

// longestLine is more than the report of any host takes, whose findings are folded.
const longestLine = 16 << 20

// Write implements [io.Writer].
func (l *farLines) Write(p []byte) (int, error) {
	if l.err != nil {
		return len(p), nil // until it has stopped
	}
	l.rest = append(l.rest, p...)
	for l.err == nil {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		switch {
		case !ok && len(l.rest) > longestLine:
			l.err, l.rest = fmt.Errorf("%w: it tells of a host in more than %d MB", verify.ErrVantage, longestLine>>20), nil
			l.stop()
			return len(p), nil
		case !ok:
			return len(p), nil
		}
		if l.err = l.take(line); l.err != nil {
			l.stop()
		}
		l.rest = rest
	}
	return len(p), nil
}

func newFromVantageManyCommand(e env) *cobra.Command {
	return &cobra.Command{
		Use:    fromVantageMany,
		Hidden: true, // verify --vantage ssh:// --targets starts it
		Short:  "Look at hosts for another machine, as standard input says",
		Args:   cobra.MaximumNArgs(1), // the address of who asks
		RunE: func(c *cobra.Command, _ []string) error {
			return lookAtManyForAnother(c.Context(), e)
		},
	}
}

// lookAtManyForAnother is the far side of lookAtManyOverSSH.
func lookAtManyForAnother(ctx context.Context, e env) error {
	var r manyRequest
	ctx, gone, err := takeRequest(ctx, e, &r)
	if err != nil {
		return err
	}
	defer gone()
	policies := map[string]*targetPolicy{}
	for name, p := range r.Policies {
		rs, problems := parseFiles(name, sentFiles(vantageRequest{Files: p.Files, Globs: p.Globs}))
		if rs == nil {
			return unusable(e, problems, "nothing probed") // the near side has read it: another version
		}
		policies[name] = &targetPolicy{rules: rs}
	}
	var hosts []target
	for _, h := range r.Hosts {
		list, err := farTarget(h, policies)
		if err != nil {
			return err
		}
		hosts = append(hosts, list)
	}
	ports, canaries, err := r.Look.what()
	if err != nil {
		return err
	}
	out := json.NewEncoder(e.stdout)
	var told time.Time
	err = verify.LookAtMany(ctx, verify.ManyConfig{
		Hosts: lookHosts(hosts, policies, r.Look.Thorough), Ports: ports, Canaries: canaries, In: r.Look.In, MaxRate: r.Look.MaxRate,
		Connect: r.Look.Connect, Earlier: r.Earlier,
		Progress: func(sent uint64, done float64) {
			if time.Since(told) >= farEvery {
				told = time.Now()
				_ = out.Encode(farNews{Sent: sent, Done: done}) // the next host tells if nobody listens
			}
		},
		Each: func(i int, report *verify.Report) error {
			if report.Vantage != "" {
				report.Vantage = fmt.Sprintf("%s: %s", r.Vantage, report.Vantage)
			}
			return out.Encode(farNews{Host: i, Brief: report.Brief("", "", time.Time{})})
		},
	})
	if err != nil {
		return lookError(err)
	}
	return nil
}

// farTarget reads a host of a request.
func farTarget(h farHost, policies map[string]*targetPolicy) (target, error) {
	if policies[h.Policy] == nil {
		return target{}, usageError("", "the request has no policy %q", h.Policy)
	}
	list, err := aTarget(h.Targets)
	return target{addresses: list, policy: h.Policy}, err
}
