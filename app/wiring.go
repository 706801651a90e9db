//go:build linux

package app

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"syscall"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/boottime"
	"leasehold/internal/quote"
	"leasehold/supervisor"
)

// electionConfig is the part of the configuration that concerns etcd.
func electionConfig(cfg config.Config, log *slog.Logger) election.Config {
	c := election.Config{
		Endpoints: cfg.Endpoints, Election: cfg.Election, Identity: cfg.Identity,
		TTL: cfg.TTL.Duration, LossGrace: cfg.LossGrace.Or(-1), Margin: cfg.Margin.Or(-1), Wait: cfg.Wait.Or(-1),
		DialTimeout: cfg.DialTimeout.Duration,
		TLS:         election.TLS{CAFile: cfg.TLS.CAFile, CertFile: cfg.TLS.CertFile, KeyFile: cfg.TLS.KeyFile, ServerName: cfg.TLS.ServerName},
		Now:         boottime.Now,
		Logger:      log,
	}
	if cfg.Username != "" {
		c.Username, c.Password = cfg.Username, cfg.ReadPassword
	}
	return c
}

func newCandidate(cfg config.Config, log *slog.Logger, registry *prometheus.Registry, holder election.Callbacks, changed chan struct{},
	authenticated func(token string),
) (*election.Candidate, error) {
	c := electionConfig(cfg, log)
	c.Authenticated = authenticated
	c.Registerer, c.Callbacks, c.Changed = registry, holder, func() { signalChange(changed) }
	return election.New(c)
}

func signalChange(changed chan<- struct{}) {
	select {
	case changed <- struct{}{}:
	default:
	}
}

// addServer binds the health endpoint before anything runs, so that a port in use is told before any campaign.
func addServer(g *run.Group, cfg config.Config, log *slog.Logger, registry *prometheus.Registry, snapshot func() health.Snapshot) error {
	if cfg.Listen == "off" {
		return nil
	}
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("LEASEHOLD_LISTEN: the health endpoint can't be bound, choose another address, or off: %w", err)
	}
	name, _, _ := net.SplitHostPort(cfg.Listen) // sound, or nothing could be bound
	server := health.New(health.Config{
		Logger: log, Registry: registry, Snapshot: snapshot, Now: boottime.Now, Version: build.Version, Name: name,
	})
	ctx, cancel := context.WithCancel(context.Background())
	g.Add(func() error { return server.Run(ctx, listener) }, func(error) { cancel() })
	return nil
}

// addStatus tells systemd at each change what the candidate does. It is one line, for a leader may have any name, and
// systemd takes each line for an order.
func addStatus(g *run.Group, candidate *election.Candidate, changed <-chan struct{}, tell func(text string)) {
	stop := make(chan struct{})
	g.Add(func() error {
		last := ""
		for {
			if text := quote.Printable(statusText(candidate.Snapshot())); text != last {
				tell(text)
				last = text
			}
			select {
			case <-changed:
			case <-stop:
				return nil
			}
		}
	}, func(error) { close(stop) })
}

func statusText(s election.Snapshot) string {
	switch {
	case s.State == election.Connecting:
		return "connecting to etcd: " + s.Reason
	case s.State == election.Standby && s.Leader != nil:
		return "standby, leader is " + s.Leader.Identity
	case s.State == election.Standby:
		return "standby, no leader is known"
	case s.State == election.Leading && s.Leader != nil:
		return fmt.Sprintf("leading, token %d", s.Leader.Token)
	}
	return string(s.State)
}

// turning says if the candidate's loops turn.
func turning(s election.Snapshot) error {
	// Zero: they have yet to begin.
	if idle := boottime.Now() - s.LastHeartbeat; s.LastHeartbeat != 0 && idle > 2*election.HeartbeatInterval {
		return fmt.Errorf("the election's loops have not turned for %s", idle.Round(time.Second))
	}
	return nil
}

// healthSnapshot says what the endpoint needs to know in the endpoint's words.
func healthSnapshot(cfg config.Config, c election.Snapshot) health.Snapshot {
	s := health.Snapshot{
		Election: cfg.Election, Identity: cfg.Identity,
		State: string(c.State), Reason: c.Reason, Since: c.Since,
		LeaseID: c.LeaseID, TTL: c.TTL, StopAt: c.Deadlines.StopAt, End: c.Deadlines.End,
		Leading: c.Leading, Live: turning(c),
		Job: health.Job{State: string(supervisor.JobNone)},
	}
	if c.Leader != nil {
		s.Leader = &health.Leader{Identity: c.Leader.Identity, Key: c.Leader.Key, Token: c.Leader.Token}
	}
	if c.Blocker != nil {
		s.Blocker = &health.Blocker{Key: c.Blocker.Key, Why: c.Blocker.Why, Remedy: c.Blocker.Remedy}
	}
	return s
}

func healthJob(j supervisor.Job) health.Job {
	h := health.Job{State: string(j.State), PID: j.PID, StartedAt: j.StartedAt, Restarts: j.Restarts}
	if j.LastExit != nil {
		h.LastExit = &health.Exit{Code: j.LastExit.Code, At: j.LastExit.At}
		if j.LastExit.Signal != 0 {
			h.LastExit.Signal = unix.SignalName(syscall.Signal(j.LastExit.Signal))
		}
	}
	return h
}
