//go:build linux

package app

import (
	"fmt"
	"os"

	"leasehold/config"
	"leasehold/health"
	"leasehold/supervisor"
	"leasehold/supervisor/check"
)

// healthConfig says how the supervisor knows the job's health.
func healthConfig(cfg config.Config) supervisor.HealthConfig {
	h := supervisor.HealthConfig{
		Interval: cfg.Health.Interval.Duration, Retries: cfg.Health.Retries.N,
		StartPeriod: cfg.Health.StartPeriod.Duration,
		Notify:      cfg.Notify == "ready", Watchdog: cfg.Watchdog.Duration,
	}
	switch {
	case cfg.Health.Cmd.Argv != nil:
		h.Check = checkCommand(cfg, cfg.Health.Cmd).Probe
	case cfg.Health.URL != "":
		h.Check = health.Probe(cfg.Health.URL, cfg.Health.Timeout.Duration)
	}
	return h
}

// checkCommand is a check by a command. It has the environment that the job has, without what
// tells of the term: a check is none of the job's processes, and must not be taken for one.
func checkCommand(cfg config.Config, command config.Command) *check.Command {
	return &check.Command{
		Runner: []string{"leasehold", roleCheck}, Argv: command.Argv,
		Env: append(jobEnvironment(os.Environ()),
			config.Prefix+"_ELECTION="+cfg.Election, config.Prefix+"_IDENTITY="+cfg.Identity),
		Timeout: cfg.Health.Timeout.Duration, NewPrivs: cfg.NoNewPrivs == "off",
	}
}

// lookChecks returns an error if the command of a check can't be found or executed.
func lookChecks(cfg config.Config) error {
	for name, command := range map[string]config.Command{"HEALTH_CMD": cfg.Health.Cmd} {
		if command.Argv == nil {
			continue
		}
		if _, err := lookCommand(command.Argv[0]); err != nil {
			return fmt.Errorf("%s_%s: %w", config.Prefix, name, err)
		}
	}
	return nil
}
