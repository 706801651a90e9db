//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	ossignal "os/signal"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/config"
	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/quote"
	"leasehold/supervisor"
)

// A jobHolder runs the job for the candidate.
type jobHolder struct {
	handle *supervisor.Handle
	cfg    config.Config
	margin atomic.Int64
	// stopping says if the daemon was told to stop: the job may have ended for that before the term has.
	stopping func() bool
}

func (h *jobHolder) Leased(id int64, ttl time.Duration) { h.handle.Lease(id, ttl) }
func (h *jobHolder) Extended(d election.Deadlines)      { h.handle.Extend(d.StopAt, d.KillBy) }
func (h *jobHolder) grantedMargin() time.Duration       { return time.Duration(h.margin.Load()) }

func (h *jobHolder) Lead(ctx context.Context, t election.Term) error {
	h.margin.Store(int64(t.Timing.Margin))
	err := h.handle.Supervise(ctx, supervisor.Term{
		Key: t.Key, Token: t.Token, LeaseID: t.LeaseID, StopAt: t.Deadlines.StopAt, KillBy: t.Deadlines.KillBy, Lost: t.Lost,
	}, func(cause error) time.Duration {
		switch {
		case errors.Is(cause, errPlannedStop):
			return h.cfg.StopGrace.Duration
		case errors.Is(cause, election.ErrContactLost):
			return -1 // until kill-by
		}
		return 0
	})
	var resign *supervisor.ResignError
	switch {
	case errors.As(err, &resign):
		return &election.Backoff{For: resign.After}
	case err == nil && h.cfg.Restart == string(supervisor.RestartNever) && !h.stopping() && !h.handle.Snapshot().StartedAt.IsZero():
		return errLost
	}
	return err
}

// elector is the guard's child: etcd, HTTP, decisions.
//
//	config → candidate (etcd) → handle (the job, by way of the guard)
//	             └──────────────────┴→ server (what is true now)
//
// The candidate and the handle are one actor, since their order at the end matters: the candidate revokes its lease when the
// job is dead, and the handle listens until then.
func elector(args []string) int {
	// The guard alone hears what the user says; what reaches us directly is dropped.
	ossignal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGQUIT)
	cfg, log, lines, err := configure("run")
	if err != nil {
		return exitConfig
	}
	defer lines.Flush(flushTime)
	guardPid, err := strconv.Atoi(args[0])
	spawnerPid, err2 := strconv.Atoi(args[1])
	if errors.Join(err, err2) != nil {
		fmt.Fprint(os.Stderr, usageHint([]string{roleElector}))
		return exitUsage
	}
	cgroupDir := ""
	if len(args) > 2 {
		cgroupDir = args[2]
	}

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	changed := make(chan struct{}, 1)
	registry := prometheus.NewRegistry()
	holder := &jobHolder{cfg: cfg, stopping: func() bool { return ctx.Err() != nil }}
	holder.margin.Store(int64(election.NewTiming(cfg.TTL.Duration, -1, cfg.Margin.Or(-1)).Margin))
	var candidate *election.Candidate
	handle, err := supervisor.Connect(supervisor.HandleConfig{
		In: 3, Out: 4, SpawnerSock: 5, SpawnerPidfd: 6, Guard: guardPid, Spawner: spawnerPid, CgroupDir: cgroupDir,
		TTL: cfg.TTL.Duration, Margin: holder.grantedMargin,
		Restart: supervisor.Restart(cfg.Restart), RestartLimit: cfg.RestartLimit.N,
		Signal:  func(unix.Signal) { cancel(errPlannedStop) },
		Turning: func() bool { return turning(candidate.Snapshot()) == nil },
		Changed: func() { signalChange(changed) },
		Logger:  log, Registerer: registry,
	})
	if err != nil {
		log.Error("connect to the guard", "err", err)
		return exitInternal
	}
	holder.handle = handle
	end := func() ending {
		candidate, err = newCandidate(cfg, log, registry, holder, changed, handle.Token)
		if err != nil {
			return ending{exitConfig, "set up the candidate: " + err.Error()}
		}
		snapshot := func() health.Snapshot {
			s := healthSnapshot(cfg, candidate.Snapshot())
			s.JobWanted, s.Job = true, healthJob(handle.Snapshot())
			return s
		}
		var g run.Group
		if err := addServer(&g, cfg, log, registry, snapshot); err != nil {
			return ending{exitOS, err.Error()}
		}
		guardGone, stop := make(chan struct{}), make(chan struct{})
		g.Add(func() error { return campaignWithJob(ctx, cancel, candidate, handle, guardGone) }, func(error) { cancel(errPlannedStop) })
		// The endpoint is given up before the lease is, which may take long: whoever is started in our place wants to listen.
		g.Add(func() error {
			select {
			case <-guardGone:
				return supervisor.ErrGuardGone
			case <-stop:
				return nil
			}
		}, func(error) { close(stop) })
		addStatus(&g, candidate, changed, handle.Status)
		handle.Ready()
		err := g.Run()
		if errors.Is(err, supervisor.ErrGuardGone) { // the last line is ours, then
			log.Error("exiting: "+err.Error(), "exit_code", exitInternal)
		}
		return endingOf(err)
	}()
	handle.Status(quote.Printable("exiting: " + end.text)) // the unit restarts nothing where the code is the job's own
	handle.Exit(end.code, end.text)
	return end.code
}

// campaignWithJob runs the candidate, and beside it the handle until the candidate is done. It closes guardGone if the guard is,
// once the job is dead.
func campaignWithJob(ctx context.Context, cancel context.CancelCauseFunc, candidate *election.Candidate, handle *supervisor.Handle,
	guardGone chan<- struct{},
) error {
	handleCtx, stop := context.WithCancel(context.Background())
	handleDone := make(chan error, 1)
	go func() {
		err := handle.Run(handleCtx)
		if err != nil {
			cancel(err)
		}
		if errors.Is(err, supervisor.ErrGuardGone) {
			close(guardGone)
		}
		handleDone <- err
	}()
	err := candidate.Run(ctx)
	stop()
	return errors.Join(<-handleDone, err)
}
