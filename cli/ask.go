//go:build linux

package cli

import (
	"context"
	"errors"
	"time"

	"leasehold/config"
	"leasehold/health"
)

// ErrNoLeader ends status: the election has no leader, as was printed.
var ErrNoLeader = errors.New("there is no leader")

// statusTimeout bounds a question of status, whatever LEASEHOLD_DIAL_TIMEOUT is.
const statusTimeout = 10 * time.Second

// status prints the election as etcd has it.
func (p *Program) status(c Call) error {
	if c.Has("--watch") {
		return p.ask(c, p.watchStatus)
	}
	return p.ask(c, func(a asked) error {
		report, err := a.query(a.ctx)
		if err != nil {
			return &EtcdError{c.Command.Name, err}
		}
		err = p.printed(c, reportJSON(a.name, p.Version, report), reportText(a.name, report))
		if err == nil && report.Leader == nil {
			err = ErrNoLeader
		}
		return err
	})
}

// check asks the local daemon, for exec probes and images without curl.
func (p *Program) check(c Call) error {
	cfg, err := config.Load(config.ForCheck)
	if err != nil {
		return err
	}
	what := health.Checks()[0]
	if len(c.Args) == 1 {
		what = c.Args[0]
	}
	return health.Check(context.Background(), cfg.Listen, what, p.Stdout)
}
