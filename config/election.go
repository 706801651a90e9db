//go:build linux

package config

import (
	"log/slog"
	"time"

	"leasehold/election"
	"leasehold/internal/boottime"
)

// ElectionConfig returns the part of the configuration that concerns etcd.
func (c *Config) ElectionConfig(log *slog.Logger) election.Config {
	ec := election.Config{
		Endpoints: c.Endpoints, Election: c.Election, Identity: c.Identity,
		TTL: c.TTL.Duration, LossGrace: c.LossGrace.Or(-1), Margin: c.Margin.Or(-1),
		PostStop: c.postStopTimeout(),
		Wait:     c.Wait.Or(-1), DialTimeout: c.DialTimeout.Duration,
		TLS: election.TLS{
			CAFile: c.TLS.CAFile, CertFile: c.TLS.CertFile, KeyFile: c.TLS.KeyFile,
			ServerName: c.TLS.ServerName,
		},
		Failback:     c.Failback.Or(-1),
		FitnessRound: c.fitnessRound(),
		Now:          boottime.Now,
		Logger:       log,
	}
	if c.Username != "" {
		ec.Username, ec.Password = c.Username, c.ReadPassword
	}
	return ec
}

// Timing is how a lease is divided if etcd grants the TTL that it is asked for.
func (c *Config) Timing() election.Timing {
	return election.NewTiming(c.TTL.Duration, c.LossGrace.Or(-1), c.Margin.Or(-1),
		c.postStopTimeout())
}

// postStopTimeout is the time of the hook that follows the job; 0: there is none; negative: the
// default.
func (c *Config) postStopTimeout() time.Duration {
	if c.PostStop.Argv == nil {
		return 0
	}
	return c.PostStopTimeout.Or(-1)
}

// fitnessRound is how long it may take until candidates with these settings see that they are unfit
// for the same reason.
func (c *Config) fitnessRound() time.Duration {
	if c.Fitness.Cmd.Argv == nil {
		return 0
	}
	return time.Duration(c.Health.Retries.N) *
		(c.Fitness.Interval.Duration + c.Health.Timeout.Duration)
}
