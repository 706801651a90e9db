//go:build linux

package supervisor

import (
	"errors"
	"fmt"
	"time"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// An elector that exits or hangs is replaced, and the job runs on. The next one begins with what
// the guard knows: the Record. takeOver makes it our own, before anything else happens: before a
// message to the guard, a connection to etcd, or an answer to a probe.

// restartDecision is what the restart policy says of a job that ended before this elector began. It
// is for the next start under the same lease.
type restartDecision struct {
	lease int64 // 0: there is none
	exit  ExitError
	at    time.Duration // when to start the job again
	err   error         // not at all
}

// readRecord waits for the Record. If the pipe ends before it, the guard has exited. Then the
// spawner kills the job, and we have nothing to do: we know of no lease and no job.
func (s *Supervisor) readRecord() error {
	conn, err := s.pipe.SyscallConn()
	if err != nil {
		return err
	}
	for {
		for m, ok := s.inbox.Next(); ok; m, ok = s.inbox.Next() {
			switch m.Kind {
			case ipc.KindToken:
				s.authToken = string(m.Token().Value)
			case ipc.KindRecord:
				if s.record = m.Record(); s.record.Version != ipc.RecordVersion {
					return fmt.Errorf("the guard speaks version %d of the protocol, not %d",
						s.record.Version, ipc.RecordVersion)
				}
				return nil
			}
		}
		var fillErr error
		if err := conn.Read(func(fd uintptr) bool {
			var more bool
			more, fillErr = s.inbox.Fill(int(fd))
			return more || fillErr != nil
		}); err != nil || fillErr != nil {
			return fmt.Errorf("%w before it sent what it knows", ErrGuardLost)
		}
	}
}

// Record is what the guard knew when this elector began.
func (s *Supervisor) Record() ipc.Record { return s.record }

// AuthToken is etcd's authentication token of the elector before this one, or "".
func (s *Supervisor) AuthToken() string { return s.authToken }

// Ended is the job's end, if the job had ended for good when this elector began: the restart policy
// starts it no more. Else it is nil.
func (s *Supervisor) Ended() error {
	if s.ended == nil {
		return nil
	}
	return s.ended
}

// takeOver makes the Record our own.
func (s *Supervisor) takeOver() {
	r, j := &s.record, &s.job
	s.metrics.replaced(r.Exited, r.Silent, r.Reloaded)
	s.stopped = r.StopSignals > 0
	s.restarts = r.Restarts
	s.restart.failures, s.restart.backoff = r.Restarts.Failures, r.Restarts.Backoff
	j.serial, j.shown.Restarts, j.shown.PID = r.Serial, r.Restarts.Count, r.PID
	j.startsOf, j.shown.Starts = r.Lease.ID, r.Starts
	if r.StartedAt != 0 {
		j.shown.State, j.shown.StartedAt = JobExited, wallTime(r.StartedAt)
	}
	if e := r.LastExit; e.At != 0 {
		j.exit = ExitError{Exit: proctree.Exit(e.Exited)}
		if e.Errno != 0 {
			_, j.exit.Refused = ipc.Refusal(int32(e.Errno))
		}
		j.shown.State, j.shown.LastExit = JobExited, &LastExit{j.exit.Exit, wallTime(e.At)}
	}
	if r.Unhealthy {
		j.unhealthy = &UnhealthyError{"an elector before this one has found that"}
	}
	if r.Job == ipc.JobIdle {
		s.decideRestart()
	} else {
		s.takeOverJob()
	}
	if r.Exited+r.Silent+r.Reloaded > 0 {
		s.log.Info("elector takes the place of another one", "lease", fmt.Sprintf("%x", r.Lease.ID),
			"job", string(j.shown.State), "pid", j.shown.PID)
	}
}

// takeOverJob makes the job our own that lives already.
func (s *Supervisor) takeOverJob() {
	r, j := &s.record, &s.job
	switch r.Job {
	case ipc.JobForking:
		j.shown.State = JobStarting
	case ipc.JobRunning:
		j.shown.State = JobRunning
		s.metrics.up.Set(1)
	case ipc.JobFrozen:
		j.shown.State, j.frozen = JobFrozen, true
	default:
		j.shown.State = JobStopping
	}
	j.term = Term{
		Key: r.Entered.Key, Token: r.Entered.Created, LeaseID: r.Lease.ID,
		StopAt: r.StopAt, KillBy: r.KillBy,
	}
	j.askedAt, j.due, j.known, j.ordered = boottime.Now(), r.Due, r.KillBy, r.Ordered
	j.ended = make(chan outcome, 1)
	s.healthBegins(r.JobReady)
}

// decideRestart applies the restart policy to a job that ended by itself before this elector began.
// The elector before this one may have done so too, and may have exited before the start.
func (s *Supervisor) decideRestart() {
	r, j := &s.record, &s.job
	if r.LastExit.At == 0 || r.LastExit.Ordered {
		return
	}
	run := outcome{exit: j.exit, unhealthy: j.unhealthy}
	exit, ran := run.ended(r.LastExit.At-r.LastExit.Ran, r.LastExit.At)
	delay, err := s.restart.after(exit, ran)
	var final *ExitError
	switch {
	case errors.As(err, &final):
		s.ended = final
	case r.Starts > 0 && !r.Lease.Releasing: // else its term is over
		s.decided = restartDecision{r.Lease.ID, exit, r.LastExit.At + delay, err}
	}
}

// decision returns what decideRestart has decided for this term, once.
func (s *Supervisor) decision(t Term) (d restartDecision, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d, s.decided = s.decided, restartDecision{}
	if d.lease == 0 || d.lease != t.LeaseID {
		return d, false
	}
	s.job.term = t // renewals move its deadlines until the start
	return d, true
}

// join makes the run of a job that lives already part of the term. It returns the term with the
// deadlines of the job, and when the job was started.
func (s *Supervisor) join(t Term) (Term, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j, began := &s.job, s.record.StartedAt
	if s.record.Job == ipc.JobForking {
		began = j.askedAt
	}
	t.StopAt, t.KillBy = j.term.StopAt, j.term.KillBy
	j.term = t
	return t, began
}

// wallTime is a moment since boot as the clock on the wall shows it.
func wallTime(at time.Duration) time.Time {
	return time.Now().Add(at - boottime.Now()).UTC()
}
