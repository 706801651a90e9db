//go:build linux

package app

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/oklog/run"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/election"
	"leasehold/health"
	"leasehold/internal/boottime"
)

// elect campaigns and reports, and runs no job.
func elect() (code int) {
	caught := catchSignals()
	cfg, log, lines, err := configure("elect")
	if err != nil {
		leaveMessage(terminationLog, err.Error(), false)
		return exitConfig
	}
	defer func() { lines.end(code) }()
	if err := hideMemory(); err != nil {
		log.Error("set dumpable", "err", err)
		return exitOS
	}
	go caught.relayHangUps(log)

	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	changed := make(chan struct{}, 1)
	registry := prometheus.NewRegistry()
	if loss := election.NewTiming(cfg.TTL.Duration, cfg.LossGrace.Or(-1), -1).LossGrace; cfg.StopGrace.Duration < loss {
		log.Warn("LEASEHOLD_STOP_GRACE is shorter than LEASEHOLD_LOSS_GRACE: after a planned stop whoever asks has less time to stop than after a loss",
			"stop_grace", cfg.StopGrace.String(), "loss_grace", loss.String())
	}
	holder := &leaseHolder{grace: cfg.StopGrace.Duration, hurry: make(chan struct{})}
	candidate, err := newCandidate(cfg, log, registry, holder, changed, nil)
	if err != nil {
		log.Error("set up the candidate", "err", err)
		return exitConfig
	}
	snapshot := func() health.Snapshot { return healthSnapshot(cfg, candidate.Snapshot()) }
	notify, told := newNotifier()
	defer told()
	turned := newWatchdog()

	var g run.Group
	if err := addServer(&g, cfg, log, registry, snapshot); err != nil {
		log.Error("exiting: "+err.Error(), "exit_code", exitOS)
		return exitOS
	}
	g.Add(func() error { return candidate.Run(ctx) }, func(error) { cancel(errPlannedStop) })
	addStatus(&g, candidate, changed, func(text string) { notify("STATUS=" + text) })
	stop := make(chan struct{})
	g.Add(func() error {
		watchdog := time.NewTicker(time.Second)
		defer watchdog.Stop()
		for received := 0; ; {
			select {
			case <-stop:
				return nil
			case <-watchdog.C:
				if turning(candidate.Snapshot()) == nil {
					turned()
				}
			case s := <-caught.signals:
				if s != unix.SIGTERM && s != unix.SIGINT {
					continue
				}
				if received++; received == 1 {
					notify(stopping(cfg))
					cancel(errPlannedStop)
				} else if received == 2 {
					close(holder.hurry)
				}
			}
		}
	}, func(error) { close(stop) })
	notify("READY=1")
	end := endingOf(g.Run())
	level := slog.LevelInfo
	if end.code != 0 {
		level = slog.LevelError
	}
	log.Log(context.Background(), level, "exiting: "+end.text, "exit_code", end.code)
	return end.code
}

// A leaseHolder holds the lease for those who ask this daemon if it leads, and gives them the time to stop that a job would have.
type leaseHolder struct {
	grace time.Duration
	hurry chan struct{} // closed at a second signal
	end   atomic.Int64  // kill-by, in time since boot
}

func (h *leaseHolder) Leased(int64, time.Duration)   {}
func (h *leaseHolder) Extended(d election.Deadlines) { h.end.Store(int64(d.KillBy)) }

func (h *leaseHolder) Lead(ctx context.Context, t election.Term) error {
	h.end.Store(max(h.end.Load(), int64(t.Deadlines.KillBy)))
	<-ctx.Done()
	var hold time.Duration
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errPlannedStop):
		hold = h.grace
	case errors.Is(cause, election.ErrContactLost), errors.Is(cause, election.ErrKeyOverwritten):
		// Nobody else can lead yet: not before the lease ends, or not before the key is removed, which is for us to do.
		hold = time.Duration(h.end.Load()) - boottime.Now()
	}
	timer := time.NewTimer(hold)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-h.hurry:
	case <-t.Lost:
	}
	return nil
}
