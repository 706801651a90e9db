//go:build linux

package app

import (
	"context"
	"fmt"
	"os"

	"leasehold/config"
	"leasehold/control"
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

// postStop is the hook that follows the job; nil: there is none.
func postStop(cfg config.Config) *check.Hook {
	if cfg.PostStop.Argv == nil {
		return nil
	}
	return &check.Hook{
		Runner: []string{"leasehold", roleHook}, Argv: cfg.PostStop.Argv,
		Timeout: cfg.Timing().PostStop, NewPrivs: cfg.NoNewPrivs == "off",
	}
}

// addFitness adds an actor that checks whether the candidate may lead. queued: it was fit when an
// elector before this one put its key.
func (d *daemon) addFitness(p parts, recorder *control.Recorder, queued bool) {
	if p.cfg.Priority.N == 0 {
		p.log.Info("candidate never leads: LEASEHOLD_PRIORITY is 0")
		d.candidate.SetUnfit("LEASEHOLD_PRIORITY is 0: it never leads")
		return
	}
	if p.cfg.Fitness.Cmd.Argv == nil {
		return
	}
	if !queued {
		d.candidate.SetUnfit("it is not checked yet")
	}
	ctx, cancel := context.WithCancel(context.Background())
	d.group.Add(func() error {
		probe := checkCommand(p.cfg, p.cfg.Fitness.Cmd).Probe
		check.Watch(ctx, probe, p.cfg.Fitness.Interval.Duration, p.cfg.Health.Retries.N, !queued,
			func(failed error) {
				recorder.SetReady(failed == nil)
				if failed == nil {
					p.log.Info("candidate is fit to lead")
					d.candidate.SetUnfit("")
					return
				}
				d.candidate.SetUnfit(failed.Error())
				text := "candidate is unfit: it does not lead until it is fit"
				attrs := []any{"reason", failed.Error()}
				switch s := d.candidate.Snapshot(); {
				case s.Leading && s.Hold != nil:
					text = "candidate is unfit: it goes on leading while the election is held"
				case s.Leading:
					text = "candidate is unfit: it hands over if somebody else is fit"
					attrs = append(attrs, "not_before", s.StaysUntil.UTC())
				}
				p.log.Warn(text, attrs...)
			})
		return nil
	}, func(error) { cancel() })
}

// lookChecks returns an error if the command of a check or a hook can't be found or executed, or if
// the service account can't be used.
func lookChecks(cfg config.Config) error {
	for name, command := range map[string]config.Command{
		"HEALTH_CMD": cfg.Health.Cmd, "FITNESS_CMD": cfg.Fitness.Cmd,
		"PRE_START": cfg.PreStart, "POST_STOP": cfg.PostStop,
	} {
		if command.Argv == nil {
			continue
		}
		if _, err := lookCommand(command.Argv[0]); err != nil {
			return fmt.Errorf("%s_%s: %w", config.Prefix, name, err)
		}
	}
	return lookAccount(cfg)
}
