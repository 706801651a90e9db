//go:build linux

package app

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/supervisor"
)

// healthSnapshot converts what the candidate knows to what the endpoint needs.
func healthSnapshot(cfg config.Config, c election.Snapshot) health.Snapshot {
	s := health.Snapshot{
		Election: cfg.Election, Identity: cfg.Identity,
		State: string(c.State), Reason: c.Reason, Since: c.Since,
		Unfit: unfit(c), LeaseID: c.LeaseID, TTL: c.TTL,
		StopAt: c.Deadlines.StopAt, KillBy: c.Deadlines.KillBy, End: c.Deadlines.End,
		Leading: c.Leading, Live: live(c),
		Job: health.Job{State: string(supervisor.JobNone)},
	}
	if c.Leader != nil {
		s.Leader = &health.Leader{
			Identity: c.Leader.Identity, Key: c.Leader.Key, Token: c.Leader.Token,
		}
	}
	if c.Blocker != nil {
		s.Blocker = &health.Blocker{
			Key: c.Blocker.Key, Why: c.Blocker.Why, Remedy: c.Blocker.Remedy,
		}
	}
	if h := c.Hold; h != nil {
		s.Hold = &health.Hold{
			By: h.By, Reason: h.Reason, Since: h.Since, Until: h.Until, Stop: h.Stop,
		}
	}
	s.ControlProblem = c.ControlProblem
	return s
}

// unfit says why the candidate must not become leader, and until when a leader does not hand over
// by itself.
func unfit(c election.Snapshot) string {
	if c.Unfit == "" || !c.StaysUntil.After(time.Now()) {
		return c.Unfit
	}
	return c.Unfit + "; it hands over by itself not before " +
		c.StaysUntil.UTC().Format(time.RFC3339)
}

func healthJob(j supervisor.Job) health.Job {
	h := health.Job{
		State: string(j.State), PID: j.PID, StartedAt: j.StartedAt,
		Starts: j.Starts, Restarts: j.Restarts, Health: string(j.Health),
	}
	if j.LastExit != nil {
		h.LastExit = &health.Exit{Code: j.LastExit.Code, At: j.LastExit.At}
		if j.LastExit.Signal != 0 {
			h.LastExit.Signal = unix.SignalName(syscall.Signal(j.LastExit.Signal))
		}
	}
	return h
}
