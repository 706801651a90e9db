//go:build linux

package config

import (
	"log/slog"

	"leasehold/election"
	"leasehold/internal/boottime"
)

// ElectionConfig returns the part of the configuration that concerns etcd.
func (c *Config) ElectionConfig(log *slog.Logger) election.Config {
	ec := election.Config{
		Endpoints: c.Endpoints, Election: c.Election, Identity: c.Identity,
		TTL: c.TTL.Duration, LossGrace: c.LossGrace.Or(-1), Margin: c.Margin.Or(-1),
		Wait: c.Wait.Or(-1), DialTimeout: c.DialTimeout.Duration,
		TLS: election.TLS{
			CAFile: c.TLS.CAFile, CertFile: c.TLS.CertFile, KeyFile: c.TLS.KeyFile,
			ServerName: c.TLS.ServerName,
		},
		Failback: c.Failback.Or(-1),
		Now:      boottime.Now,
		Logger:   log,
	}
	if c.Username != "" {
		ec.Username, ec.Password = c.Username, c.ReadPassword
	}
	return ec
}

// Timing is how a lease is divided if etcd grants the TTL that it is asked for.
func (c *Config) Timing() election.Timing {
	return election.NewTiming(c.TTL.Duration, c.LossGrace.Or(-1), c.Margin.Or(-1))
}
