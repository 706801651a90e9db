//go:build linux

package supervisor

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// newTakeover makes a Supervisor that has this Record.
func newTakeover(t *testing.T, mode Restart, r ipc.Record) *Supervisor {
	t.Helper()
	s := newTestSupervisor(t)
	s.restart, s.record = newTestRestarter(mode, 3), r
	s.takeOver()
	return s
}

// exited is the end of a job that had this code, a second ago.
func exited(code int) ipc.RecordedExit {
	return ipc.RecordedExit{
		Exited: ipc.Exited{Code: code}, At: boottime.Now() - time.Second, Ran: time.Second,
	}
}

func TestTakeOver_Job(t *testing.T) {
	lease := ipc.Lease{ID: 7, TTL: time.Hour}
	for _, c := range []struct {
		name   string
		record ipc.Record
		state  JobState
	}{
		{"first elector", ipc.Record{}, JobNone},
		{"standby", ipc.Record{Lease: lease, Exited: 1}, JobNone},
		{"forking", ipc.Record{Lease: lease, Job: ipc.JobForking}, JobStarting},
		{"running", ipc.Record{Lease: lease, Job: ipc.JobRunning, PID: 8}, JobRunning},
		{"ending", ipc.Record{Lease: lease, Job: ipc.JobEnding, Ordered: true}, JobStopping},
		{"exited", ipc.Record{Lease: lease, StartedAt: 1, LastExit: exited(5)}, JobExited},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTakeover(t, RestartAlways, c.record)
			if got := s.Snapshot(); got.State != c.state || got.PID != c.record.PID {
				t.Errorf("%+v, want the state %s", got, c.state)
			}
		})
	}
}

// TestTakeOver_Run: a job that lives already is seen to its end, also if that comes before the term
// is taken over.
func TestTakeOver_Run(t *testing.T) {
	running := ipc.Record{
		Lease: ipc.Lease{ID: 7}, Entered: ipc.Entered{Key: "k", Created: 9}, StartedAt: 1,
		Job: ipc.JobRunning, PID: 8, StopAt: 10, KillBy: 11, Due: forever,
	}
	ending := running
	ending.Job, ending.PID, ending.Ordered = ipc.JobEnding, 0, true
	leftover := ending
	leftover.Ordered, leftover.LastExit = false, exited(6)
	for _, c := range []struct {
		name   string
		record ipc.Record
		events []func(*Supervisor)
		want   error
	}{
		{"exits by itself", running, []func(s *Supervisor){
			func(s *Supervisor) { s.firstExited(ipc.Exited{Code: 5}) },
			func(s *Supervisor) { s.gone(ipc.Gone{}) },
		}, &ExitError{}},
		{"the guard ends it", running, []func(s *Supervisor){
			func(s *Supervisor) { s.firstExited(ipc.Exited{Code: 5}) },
			func(s *Supervisor) { s.gone(ipc.Gone{Ordered: true}) },
		}, nil},
		{"was being stopped", ending, []func(s *Supervisor){
			func(s *Supervisor) { s.gone(ipc.Gone{}) },
		}, nil},
		{"has left something behind", leftover, []func(s *Supervisor){
			func(s *Supervisor) { s.gone(ipc.Gone{Reason: ipc.KilledLeftover}) },
		}, &ExitError{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTakeover(t, RestartNever, c.record)
			for _, event := range c.events {
				event(s)
			}
			err := s.Supervise(t.Context(), Term{LeaseID: 7, Adopted: true}, nil)
			var exit *ExitError
			if (c.want != nil) != errors.As(err, &exit) {
				t.Errorf("%v, want %T", err, c.want)
			}
			if got := s.job.term; got.StopAt != 10 || got.KillBy != 11 {
				t.Errorf("the term has the deadlines %v and %v", got.StopAt, got.KillBy)
			}
		})
	}
}

// TestTakeOver_NoSecondStop: the grace of a job that is being stopped does not begin again.
func TestTakeOver_NoSecondStop(t *testing.T) {
	s := newTakeover(t, RestartNever, ipc.Record{
		Lease: ipc.Lease{ID: 7}, Job: ipc.JobEnding, Ordered: true, Due: 5, KillBy: 6,
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("the term had ended"))
	s.gone(ipc.Gone{Ordered: true})
	grace := func(error) time.Duration { t.Error("a grace was asked for"); return 0 }
	if err := s.Supervise(ctx, Term{LeaseID: 7, Adopted: true}, grace); err != nil {
		t.Error(err)
	}
	s.stopFor(context.Cause(ctx), grace)
	if s.job.due != 5 {
		t.Errorf("the job is due at %v", s.job.due)
	}
}

// TestTakeOver_Restart: the restart policy decides on what the elector before us may not have
// decided any more.
func TestTakeOver_Restart(t *testing.T) {
	lease := ipc.Lease{ID: 7}
	releasing := ipc.Lease{ID: 7, Releasing: true}
	ordered := exited(1)
	ordered.Ordered = true
	failures := ipc.Restarts{Count: 2, Failures: 2, Backoff: time.Second}
	for _, c := range []struct {
		name    string
		mode    Restart
		record  ipc.Record
		ended   bool
		decided bool
		resigns bool
	}{
		{
			"never", RestartNever,
			ipc.Record{Lease: lease, Starts: 1, LastExit: exited(1)},
			true, false, false,
		},
		{
			"never, lease given back", RestartNever,
			ipc.Record{LastExit: exited(1)},
			true, false, false,
		},
		{"never, being given back", RestartNever, ipc.Record{
			Lease: releasing, Starts: 1, LastExit: exited(1),
		}, true, false, false},
		{
			"success", RestartOnFailure,
			ipc.Record{Lease: lease, Starts: 1, LastExit: exited(0)},
			true, false, false,
		},
		{
			"failure", RestartOnFailure,
			ipc.Record{Lease: lease, Starts: 1, LastExit: exited(1)},
			false, true, false,
		},
		{"failure, lease being given back", RestartOnFailure, ipc.Record{
			Lease: releasing, Starts: 1, LastExit: exited(1),
		}, false, false, false},
		{"failure, another lease", RestartOnFailure, ipc.Record{
			Lease: lease, LastExit: exited(1),
		}, false, false, false},
		{
			"stopped", RestartNever,
			ipc.Record{Lease: lease, Starts: 1, LastExit: ordered},
			false, false, false,
		},
		{"too many", RestartAlways, ipc.Record{
			Lease: lease, Starts: 3, LastExit: exited(1), Restarts: failures,
		}, false, true, true},
		{"not started", RestartNever, ipc.Record{Lease: lease}, false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newTakeover(t, c.mode, c.record)
			if ended := s.Ended() != nil; ended != c.ended {
				t.Errorf("ended: %v", ended)
			}
			if _, ok := s.decision(Term{LeaseID: 8}); ok {
				t.Error("it is decided for another lease")
			}
			s = newTakeover(t, c.mode, c.record)
			d, decided := s.decision(Term{LeaseID: 7})
			var resign *ResignError
			if decided != c.decided || errors.As(d.err, &resign) != c.resigns {
				t.Errorf("decided: %v, %+v", decided, d)
			}
		})
	}
}

// TestTakeOver_Backoff: the pause before the next start counts from the job's exit.
func TestTakeOver_Backoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTakeover(t, RestartAlways, ipc.Record{
			Lease: ipc.Lease{ID: 7}, Starts: 1, LastExit: exited(1),
			Restarts: ipc.Restarts{Count: 4, Failures: 1, Backoff: time.Second},
		})
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		if err := s.Supervise(ctx, Term{LeaseID: 7}, func(error) time.Duration {
			s.gone(ipc.Gone{Ordered: true})
			return 0
		}); err != nil {
			t.Error(err)
		}
		// Two seconds from the exit, which was one ago.
		asked := s.job.askedAt
		if took := time.Since(began); took != 1500*time.Millisecond || asked == 0 {
			t.Errorf("it took %v, start asked at %v", took, asked)
		}
		if got := s.Snapshot().Restarts; got != 5 {
			t.Errorf("%d restarts", got)
		}
	})
}

func TestTakeOver_Metrics(t *testing.T) {
	s := newTestSupervisor(t)
	registry := prometheus.NewRegistry()
	s.metrics, s.restart = newMetrics(registry), newTestRestarter(RestartAlways, 0)
	s.record = ipc.Record{Exited: 3, Silent: 2}
	s.takeOver()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "leasehold_elector_replacements_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			got[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
		}
	}
	if got["exited"] != 3 || got["silent"] != 2 {
		t.Errorf("replaced: %v", got)
	}
}

// TestFirstProcess_OldSerial: what the spawner has sent to an elector before us is dropped.
func TestFirstProcess_OldSerial(t *testing.T) {
	s := newTakeover(t, RestartAlways, ipc.Record{Serial: 3})
	open := func() int {
		fd, err := unix.PidfdOpen(unix.Getpid(), 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	old := open()
	s.firstProcess(ipc.SpawnerMessage{Serial: 2, Value: 8}, old)
	if _, err := unix.FcntlInt(uintptr(old), unix.F_GETFD, 0); s.job.pidfd >= 0 || err == nil {
		t.Errorf("an old pidfd is kept: %d, %v", s.job.pidfd, err)
	}
	s.firstProcess(ipc.SpawnerMessage{Serial: 3, Value: 9}, open())
	if s.job.pidfd < 0 || s.job.pidfdPid != 9 {
		t.Errorf("the pidfd is %d, of %d", s.job.pidfd, s.job.pidfdPid)
	}
	s.job.closePidfd()
}
