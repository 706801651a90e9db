//go:build linux

package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/quote"
)

var (
	// ErrNoLeader ends status: the election has no leader, as was printed.
	ErrNoLeader = errors.New("there is no leader")
	// ErrNoReport ends status: etcd does not answer, or refuses.
	ErrNoReport = errors.New("status")
)

// status prints the election as etcd has it.
func (p *Program) status(c Call) error {
	if len(c.Args) == 1 {
		if err := os.Setenv(config.Prefix+"_ELECTION", c.Args[0]); err != nil {
			return &UsageError{Hint: "status can't ask for that election: its name holds a NUL"}
		}
	}
	cfg, err := config.Load(config.ForStatus)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	log := slog.New(cfg.Log.Handler(p.Stderr, cfg.Log.Level.Level))
	report, err := election.Query(ctx, cfg.ElectionConfig(log))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoReport, err)
	}
	text := reportText(cfg.Election, report)
	if c.Has("--json") {
		text, err = quote.JSON(reportJSON(cfg.Election, p.Version, report), "")
	}
	if err == nil {
		_, err = io.WriteString(p.Stdout, text)
	}
	switch {
	case err != nil:
		return fmt.Errorf("print the election: %w", err)
	case report.Leader == nil:
		return ErrNoLeader
	}
	return nil
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
