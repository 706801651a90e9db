//go:build linux

package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// Term is what the supervisor needs to know of the term in which the job runs.
type Term struct {
	Key     string // of the candidate in etcd
	Token   int64  // the key's create revision
	LeaseID int64
	StopAt  time.Duration // readings of CLOCK_BOOTTIME, like KillBy
	KillBy  time.Duration
	// Lost is closed when the lease or the key is gone: then the job is killed at once. It may be
	// nil.
	Lost <-chan struct{}
	// Adopted means that the job of the term lives already, from an elector before this one.
	Adopted bool
}

// ResignError means that the job failed too often here: another candidate should try.
type ResignError struct {
	After time.Duration // before this one campaigns again
	Last  ExitError     // of the job
}

func (e *ResignError) Error() string {
	return fmt.Sprintf("the job keeps failing: resigning, back in the queue after %s",
		e.After.Round(time.Millisecond))
}

// Supervise runs the job for one term. It starts the job, or takes it over if the term is adopted.
// It starts it again as the restart policy says, and has it stopped when ctx ends. It returns when
// nothing of the job is left: ErrGuardLost, an *ExitError or a *ResignError if one of these ended
// it, else nil. grace returns the job's time to stop for the cause of ctx's end. Zero kills at
// once, because the lease is lost. Negative means until kill-by.
func (s *Supervisor) Supervise(
	ctx context.Context, t Term, grace func(cause error) time.Duration,
) error {
	began := boottime.Now()
	if t.Adopted {
		t, began = s.join(t)
	} else if d, ok := s.decision(t); ok && !s.over(ctx, t) {
		if d.err != nil {
			return d.err
		}
		if err := s.backOff(ctx, t, d.exit, max(0, d.at-began)); err != nil {
			return err
		}
		t, began = s.renewed(t), boottime.Now()
	}
	for t.Adopted || !s.over(ctx, t) {
		run, err := s.runOnce(ctx, t, grace)
		if err != nil || !run.byItself {
			return err
		}
		exit, ran := run.ended(began, boottime.Now())
		delay, err := s.restart.after(exit, ran)
		if err != nil {
			return err
		}
		if err := s.backOff(ctx, t, exit, delay); err != nil {
			return err
		}
		t, began = s.renewed(t), boottime.Now()
	}
	return nil
}

// renewed returns the term with its latest deadlines, for another start in it.
func (s *Supervisor) renewed(t Term) Term {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last := s.job.term; last.Token == t.Token {
		t.StopAt, t.KillBy = last.StopAt, last.KillBy
	}
	t.Adopted = false
	return t
}

// beginRun asks the guard for a start, unless the job lives already. The outcome of the run is sent
// to the channel.
func (s *Supervisor) beginRun(t Term) (<-chan outcome, error) {
	if t.Adopted {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.job.ended, nil
	}
	ended, err := s.startAsked(t)
	if err != nil {
		return nil, err
	}
	restarts := ipc.Restarts{
		Count: s.Snapshot().Restarts, Failures: s.restart.failures, Backoff: s.restart.backoff,
	}
	if restarts != s.restarts { // each message to the guard delays the start
		s.restarts = restarts
		s.send(restarts)
	}
	s.send(ipc.Start{
		Key: t.Key, Token: t.Token, LeaseID: t.LeaseID, StopAt: t.StopAt, KillBy: t.KillBy,
	})
	s.pingSoon()
	return ended, nil
}

// runOnce runs the job once, or sees a job that lives already to its end.
func (s *Supervisor) runOnce(
	ctx context.Context, t Term, grace func(cause error) time.Duration,
) (outcome, error) {
	ended, err := s.beginRun(t)
	if err != nil {
		return outcome{}, err
	}
	unhealthy, stop := s.startMonitor()
	defer stop()
	done, lost := ctx.Done(), t.Lost
	for {
		select {
		case <-lost:
			lost = nil
			s.send(ipc.Stop{})
			// The next leader may be starting. The guard kills all of the job, but has to wake up
			// first. So we send the first SIGKILL.
			s.stopAsked("lease lost", boottime.Now())
			s.killNow()
			s.pingSoon()
		case <-done:
			done = nil
			s.stopFor(context.Cause(ctx), grace)
		case why := <-unhealthy:
			if s.unhealthy(why) {
				s.stopFor(why, grace)
			}
		case <-s.guardGone:
			return outcome{}, ErrGuardLost
		case run := <-ended:
			// The term may have ended in the same instant, and we may have seen the job first.
			run.byItself = run.byItself && !s.over(ctx, t)
			return run, nil
		}
	}
}

// stopFor has the job stopped for this cause, unless it is being stopped already: also an elector
// before this one may have asked for that, or the guard's own clock.
func (s *Supervisor) stopFor(cause error, grace func(cause error) time.Duration) {
	if s.isOrdered() {
		return
	}
	g, due := grace(cause), forever
	if g >= 0 {
		due = boottime.Now() + g
	}
	s.stopAsked(cause.Error(), due)
	unhealthy := errors.As(cause, new(*UnhealthyError))
	s.send(ipc.Stop{Grace: max(g, ipc.UntilKillBy), Unhealthy: unhealthy})
	s.pingSoon()
}

// backOff waits before the next start. It returns ErrGuardLost if the guard is.
func (s *Supervisor) backOff(
	ctx context.Context, t Term, exit ExitError, delay time.Duration,
) error {
	s.restarting()
	level, text := slog.LevelInfo, "job exited by itself: starting it again"
	if exit.Unhealthy != "" {
		level, text = slog.LevelWarn, "job was unhealthy: starting it again"
	}
	if s.restart.failures > 1 {
		level, text = slog.LevelWarn, "job keeps failing: starting it again"
	}
	s.log.Log(ctx, level, text, "exit_code", exit.Code, "signal", exit.Signal,
		"backoff", delay.Round(time.Millisecond).String())
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-s.guardGone:
		return ErrGuardLost
	}
	if s.over(ctx, t) {
		s.termOver()
	}
	return nil
}

// over reports whether the term has ended: nothing may be started in it any more. Past stop-at a
// term goes on only for the sake of a job that is frozen.
func (s *Supervisor) over(ctx context.Context, t Term) bool {
	select {
	case <-ctx.Done():
		return true
	case <-t.Lost:
		return true
	default:
		return s.cfg.Freeze && boottime.Now() >= s.renewed(t).StopAt
	}
}
