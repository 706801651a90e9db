//go:build linux

package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/cli"
	"leasehold/config"
	"leasehold/election"
	"leasehold/internal/boottime"
	"leasehold/kubernetes"
	"leasehold/supervisor/recovery"
)

// runElect campaigns and reports, and runs no job.
//
//	state file ──→ term of the process before
//	                 v
//	config ──→ candidate (etcd) ──→ leaseCallbacks (hold the lease for whoever asked)
//	               ├──→ health server
//	               ├──→ endpoint of a Service
//	               └──→ status ──→ systemd
//	signals ──→ stop, or revoke at once
func runElect(build Build, call cli.Call) error {
	caught := catchSignals()
	if err := config.LoadFile(call.EnvFile); err != nil {
		return err
	}
	cfg, err := config.Load(config.ForElect)
	if err != nil {
		return err
	}
	log := newLog(cfg)
	if err := lookChecks(cfg); err != nil {
		return log.exit(err)
	}
	if err := hideMemory(); err != nil {
		return log.exit(fmt.Errorf("%w: set dumpable: %w", errSystem, err))
	}
	go caught.relayHangUps(log.Logger)
	systemd := newNotifier()
	defer systemd.flush()

	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	lease := &leaseCallbacks{grace: cfg.StopGrace.Duration, force: make(chan struct{})}
	before := lease.hold(cfg, log.Logger)
	defer lease.holder.Close(flushTime)
	d, err := wire(ctx, stop, parts{
		cfg: cfg, log: log.Logger, version: build.Version,
		metrics: newMetrics(cfg.Election), changed: make(chan struct{}, 1),
		callbacks: lease, account: kubernetes.AccountDir,
		configure: func(ec *election.Config) { ec.Adopt = before },
		status:    func(text string) { systemd.notify("STATUS=" + text) },
		listen: func(address string) (net.Listener, error) {
			return bind(context.Background(), address)
		},
	})
	if err != nil {
		return log.exit(err)
	}
	addSignals(d, caught, lease, func() {
		systemd.notify(stopping(cfg))
		stop(errPlannedStop)
	})
	log.start(build, cfg)
	if loss := cfg.Timing().LossGrace; cfg.StopGrace.Duration < loss {
		log.Warn("LEASEHOLD_STOP_GRACE is shorter than LEASEHOLD_LOSS_GRACE:"+
			" after a planned stop whoever asks has less time to stop than after a loss",
			"stop_grace", cfg.StopGrace.Duration, "loss_grace", loss)
	}
	systemd.notify("READY=1")
	return log.exit(d.group.Run())
}

// addSignals adds an actor. It stops the daemon at the first TERM or INT, and has the lease given
// back at once at the second. It also notifies systemd's watchdog while the candidate's loops run.
func addSignals(d *daemon, caught *caught, lease *leaseCallbacks, stop func()) {
	ended, alive := make(chan struct{}), newWatchdog()
	d.group.Add(func() error {
		watchdog := time.NewTicker(time.Second)
		defer watchdog.Stop()
		for received := 0; ; {
			select {
			case <-ended:
				return nil
			case <-watchdog.C:
				if live(d.candidate.Snapshot()) == nil {
					alive()
				}
			case s := <-caught.signals:
				if s != unix.SIGTERM && s != unix.SIGINT {
					continue
				}
				if received++; received == 1 {
					stop()
				} else if received == 2 {
					close(lease.force)
				}
			}
		}
	}, func(error) { close(ended) })
}

// leaseCallbacks holds the lease for the app that asks this daemon whether it leads. It gives the
// app the time to stop that a job would have.
type leaseCallbacks struct {
	holder *recovery.Holder
	grace  time.Duration
	force  chan struct{} // closed at a second signal
	end    atomic.Int64  // kill-by, in time since boot
}

// hold has the state file say which term we have. It returns that of the process before, to go on
// with it; nil: there is none.
func (l *leaseCallbacks) hold(cfg config.Config, log *slog.Logger) *election.Adoption {
	if cfg.StateDir == "" {
		return nil
	}
	timing := cfg.Timing()
	app := recovery.App{
		Election: cfg.Election, Identity: cfg.Identity,
		Contract: fmt.Sprintf(
			"endpoints %v, listen %s, TTL %v, loss grace %v, margin %v, stop grace %v",
			cfg.Endpoints, cfg.Listen, timing.TTL, timing.LossGrace, timing.Margin, l.grace),
	}
	_, port, _ := net.SplitHostPort(cfg.Listen)
	if cfg.Priority.N == 0 || port == "0" {
		log.Info("the state file is not used: LEASEHOLD_PRIORITY is 0," +
			" or LEASEHOLD_LISTEN has no fixed port")
		return nil
	}
	file, err := recovery.Open(cfg.StateDir)
	var before recovery.Term
	if err == nil {
		if before, err = file.Held(app); err != nil {
			log.Info("the lease of the process before is left alone", "reason", err.Error())
		}
		l.holder, err = file.Hold(app, before, log)
	}
	if err != nil {
		log.Warn("the state file is not used: if this process is killed, its lease has to expire",
			"err", err)
		return nil
	}
	log.Info("if this process is killed while it leads, the next one goes on with its term")
	if before.Lease == 0 {
		return nil
	}
	ec := cfg.ElectionConfig(log)
	timing = ec.Timing(before.TTL)
	l.extend(appEnd(timing, boottime.Now()))
	return &election.Adoption{
		LeaseID: before.Lease, TTL: before.TTL, Created: before.Token, Leading: true,
		Deadlines: election.Deadlines{
			StopAt: before.StopAt, KillBy: before.KillBy, End: before.KillBy + timing.Margin,
		},
	}
}

func (l *leaseCallbacks) Leased(int64, time.Duration) { l.holder.Leads(recovery.Term{}) }
func (l *leaseCallbacks) Entered(string, int64)       {}
func (l *leaseCallbacks) Ended(error, error)          {}
func (l *leaseCallbacks) Releasing(lease int64) error { return l.holder.Releasing(lease) }

// appEnd is until when an app may work after the last answer of a process before this one, which
// has started at that moment. Nobody but the app may know of that process' last renewal.
func appEnd(t election.Timing, started time.Duration) time.Duration {
	return t.From(started).KillBy
}

// extend moves kill-by, and never back.
func (l *leaseCallbacks) extend(killBy time.Duration) {
	for {
		end := l.end.Load()
		if int64(killBy) <= end || l.end.CompareAndSwap(end, int64(killBy)) {
			return
		}
	}
}

func (l *leaseCallbacks) Extended(d election.Deadlines) {
	l.extend(d.KillBy)
	l.holder.Extended(d.StopAt, d.KillBy)
}

func (l *leaseCallbacks) Suspend() bool { return false }

func (l *leaseCallbacks) Lead(ctx context.Context, t election.Term) error {
	l.extend(t.Deadlines.KillBy)
	if !t.Adopted { // else the file has it
		l.holder.Leads(recovery.Term{
			Lease: t.LeaseID, TTL: t.Timing.TTL, Token: t.Token,
			StopAt: t.Deadlines.StopAt, KillBy: t.Deadlines.KillBy,
		})
	}
	<-ctx.Done()
	var hold time.Duration
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errPlannedStop), errors.Is(cause, election.ErrHeld),
		errors.Is(cause, election.ErrSwitchover):
		hold = l.grace
	case errors.Is(cause, election.ErrContactLost), errors.Is(cause, election.ErrKeyOverwritten):
		// Nobody else can lead before the lease ends, or before the key is removed, which we do.
		hold = time.Duration(l.end.Load()) - boottime.Now()
	default:
		l.holder.Lost(t.LeaseID) // the next process must not lead under it
	}
	timer := time.NewTimer(hold)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-l.force:
	case <-t.Lost:
	}
	return nil
}
