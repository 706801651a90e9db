//go:build linux

package supervisor

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// JobState is what the job does, as the elector knows it.
//
//	none       start asked            started
//	backoff ----------------> starting -------> running
//	exited                       |                 |
//	  ^                          | stop asked, start refused,
//	  |                          | first process exited, guard lost
//	  |                          v                 |
//	  +---------------------- stopping <-----------+
//	   gone: exited; then backoff, if the job is to be started again
//
//	running <--- the guard has frozen the job, or has thawed it ---> frozen
//
// From frozen, the same leads to stopping as from running.
//
// Every method below with the name of an event takes it in any state. transition is the one place
// where the state changes. The guard's own states are in package guard.
type JobState string

// The states of the job.
const (
	JobNone     JobState = "none"     // never started in this process
	JobStarting JobState = "starting" // asked for
	JobRunning  JobState = "running"
	JobFrozen   JobState = "frozen"   // no instruction of it runs until the lease is renewed
	JobStopping JobState = "stopping" // it has its stop signal, or is being killed
	JobBackoff  JobState = "backoff"  // exited by itself, to be started again
	JobExited   JobState = "exited"   // nothing of it is left
)

// Job is the job as others see it.
type Job struct {
	State     JobState
	PID       int // 0: no first process
	StartedAt time.Time
	Starts    int // in the term, those that failed too
	Restarts  int
	LastExit  *LastExit
	Health    Health
}

// LastExit is how the job last exited.
type LastExit struct {
	proctree.Exit
	At time.Time
}

// ExitError means that the job exited by itself and is not started again.
type ExitError struct {
	proctree.Exit
	Refused string // why it could not be started; "": it was started
	// Unhealthy is why it was stopped; "": it exited by itself. Then Code is not 0.
	Unhealthy string
}

func (e *ExitError) Error() string {
	switch {
	case e.Refused != "":
		return "the job could not be started: " + e.Refused
	case e.Unhealthy != "":
		return "the job was unhealthy: " + e.Unhealthy
	case e.Signal != 0:
		return fmt.Sprintf("the job was killed by signal %d", e.Signal)
	}
	return fmt.Sprintf("the job exited with code %d", e.Code)
}

// job is the state of a run, from the request for its start until nothing of it is left. The mutex
// of the Supervisor guards it.
type job struct {
	shown Job
	term  Term
	exit  ExitError
	// ordered means that the elector ends the run: the job does not exit by itself.
	ordered bool
	ended   chan outcome // of this run; room for one

	askedAt time.Duration // when the start was asked for
	// due is when the guard has to kill the job because we asked for a stop; forever: we have not
	// asked.
	due time.Duration
	// known is the last kill-by that the guard has read for sure: it has answered a later ping.
	known time.Duration
	// frozen means that no instruction of the job runs, and that we have not asked for its thaw. So
	// it may outlast kill-by. (A guard that hangs is taken over all the same.)
	frozen bool

	health    jobHealth
	unhealthy *UnhealthyError // why we stop it; nil: for another reason, or not
	startsOf  int64           // the lease of shown.Starts
	serial    int32           // the spawner's messages about earlier starts are for others
	pidfd     int             // of the first process, from the spawner; -1: none
	pidfdPid  int             // its pid: the guard's message about the start may come later
	guardLost bool
}

// outcome is how a run ended.
type outcome struct {
	exit      ExitError
	byItself  bool
	unhealthy *UnhealthyError // why it was stopped; nil: it was not, or for another reason
	wellAt    time.Duration   // when it last was well, since boot; 0: never
}

// alive reports whether something of the job may run.
func (j *job) alive() bool {
	switch j.shown.State {
	case JobStarting, JobRunning, JobFrozen, JobStopping:
		return true
	}
	return false
}

// overdue is when the guard should have killed the job; forever: it need not.
func (j *job) overdue(margin time.Duration) time.Duration {
	due := j.due
	if !j.frozen {
		due = min(due, j.term.KillBy)
	}
	if due == forever {
		return forever
	}
	return due + margin/4
}

func (j *job) closePidfd() {
	if j.pidfd >= 0 {
		_ = unix.Close(j.pidfd)
		j.pidfd = -1
	}
}

// Snapshot is the job as it is now. It shows at once that the first process has exited, and does
// not wait for the guard's message: our own loops may hang.
func (s *Supervisor) Snapshot() Job {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	shown := j.shown
	known := j.pidfd >= 0 && j.pidfdPid == shown.PID
	runs := shown.State == JobRunning || shown.State == JobFrozen
	if runs && known && proctree.PidfdExited(j.pidfd) {
		shown.State = JobStopping
	}
	return shown
}

// startAsked begins a run. Its outcome is sent to the channel.
func (s *Supervisor) startAsked(t Term) (<-chan outcome, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	if j.guardLost {
		return nil, ErrGuardLost
	}
	j.term, j.askedAt, j.due, j.known = t, boottime.Now(), forever, t.KillBy
	j.exit, j.ordered, j.frozen, j.ended = ExitError{}, false, false, make(chan outcome, 1)
	j.unhealthy = nil
	s.healthBegins(ipc.JobReady{})
	if j.startsOf != t.LeaseID {
		j.startsOf, j.shown.Starts = t.LeaseID, 0
	}
	j.shown.Starts++
	s.transition(JobStarting, "elected")
	return j.ended, nil
}

// firstProcess: the spawner has started the job, or shows its first process to a new elector.
func (s *Supervisor) firstProcess(m ipc.SpawnerMessage, pidfd int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	if m.Serial < j.serial {
		if pidfd >= 0 {
			_ = unix.Close(pidfd)
		}
		return
	}
	j.closePidfd()
	j.pidfd, j.pidfdPid = pidfd, int(m.Value)
}

// stopAsked: we asked the guard to have the job killed by due.
func (s *Supervisor) stopAsked(why string, due time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	if !j.alive() {
		return // the run has just ended
	}
	j.ordered, j.due = true, min(j.due, due)
	s.transition(JobStopping, why)
}

// isOrdered reports whether the job is being stopped, and does not exit by itself.
func (s *Supervisor) isOrdered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.job.ordered
}

// started: the guard has started the job.
func (s *Supervisor) started(m ipc.Started) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics.starts.Inc()
	j := &s.job
	j.shown.PID, j.shown.StartedAt = m.PID, wallTime(m.At)
	switch j.shown.State {
	case JobStarting:
		s.transition(JobRunning, "started")
	case JobStopping: // a stop was asked for meanwhile
		s.transition(JobStopping, "started")
	default:
		s.invalid("started")
	}
}

// frozen: the guard has frozen the job.
func (s *Supervisor) frozen(m ipc.Frozen) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	// Else it gets, or has got, new deadlines, and runs.
	j.frozen = j.alive() && m.StopAt == j.term.StopAt
	switch j.shown.State {
	case JobRunning:
		s.metrics.freezes.Inc()
		j.health.freezes++
		s.transition(JobFrozen, "no renewal by stop-at")
	case JobFrozen, JobStopping: // the guard says so again; or a stop was asked for
	default:
		s.invalid("frozen")
	}
}

// thawed: the guard has thawed the job.
func (s *Supervisor) thawed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.job.shown.State {
	case JobFrozen:
		s.transition(JobRunning, "thawed")
	case JobRunning, JobStopping: // the same
	default:
		s.invalid("thawed")
	}
}

// ending: the guard stops or kills the job, maybe by its own clock.
func (s *Supervisor) ending() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.job.shown.State {
	case JobStarting, JobRunning, JobFrozen:
		s.transition(JobStopping, "the guard ends it")
	case JobStopping:
	default:
		s.invalid("ending")
	}
}

// refused: the guard could not start the job.
func (s *Supervisor) refused(m ipc.Refused) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	j.exit = ExitError{Exit: proctree.Exit{Code: m.Code}, Refused: m.Why}
	j.shown.LastExit = &LastExit{j.exit.Exit, time.Now().UTC()}
	switch j.shown.State {
	case JobStarting, JobStopping:
		s.transition(JobStopping, m.Why)
	default:
		s.invalid("refused")
	}
}

// firstExited: the first process has exited. What it left behind is killed.
func (s *Supervisor) firstExited(m ipc.Exited) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	j.exit = ExitError{Exit: proctree.Exit(m)}
	j.shown.PID, j.shown.LastExit = 0, &LastExit{j.exit.Exit, time.Now().UTC()}
	reason := exitReason(j.exit.Exit, !j.ordered && !s.stopped)
	if j.unhealthy != nil {
		reason = "unhealthy"
	}
	s.metrics.exits.WithLabelValues(reason).Inc()
	switch j.shown.State {
	case JobStarting, JobRunning, JobFrozen, JobStopping:
		s.transition(JobStopping, "first process exited")
	default:
		s.invalid("first process exited")
	}
}

// gone: nothing of the job is left. The guard also stops the job without us, by its own clock and
// at a second signal. Then the message has Ordered set.
func (s *Supervisor) gone(m ipc.Gone) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	if !j.alive() {
		s.invalid("gone")
		return
	}
	if m.Reason != ipc.NotKilled {
		s.metrics.kills.WithLabelValues(m.Reason.Label()).Inc()
	}
	s.metrics.stops.Observe(m.Elapsed.Seconds())
	j.closePidfd()
	j.shown.PID = 0
	s.transition(JobExited, "gone")
	j.ended <- outcome{
		exit: j.exit, byItself: !m.Ordered && (!j.ordered || j.unhealthy != nil),
		unhealthy: j.unhealthy, wellAt: j.health.wellAt,
	}
}

// restarting: the job exited by itself and is started again after a pause.
func (s *Supervisor) restarting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.job.shown.Restarts++
	s.transition(JobBackoff, "exited by itself")
}

// termOver: the term ended while nothing of the job was left.
func (s *Supervisor) termOver() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.transition(JobExited, "term over")
}

// guardIsLost: from now on the guard's deadlines stay as they are, and we do not report that the
// job runs. It returns whether something of the job may still run.
func (s *Supervisor) guardIsLost(why string) (alive bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	j.guardLost = true
	if alive = j.alive(); alive {
		s.transition(JobStopping, why)
	}
	return alive
}

// goneWithoutGuard: nothing of the job is left, and the guard is lost.
func (s *Supervisor) goneWithoutGuard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	j := &s.job
	j.closePidfd()
	if j.alive() {
		s.metrics.kills.WithLabelValues(ipc.KilledGuard.Label()).Inc()
		j.shown.PID = 0
		s.transition(JobExited, "killed in the guard's place")
	}
}

// invalid fails loudly: an event came in a state that can't have it. It has the job killed.
func (s *Supervisor) invalid(event string) {
	s.log.Error("event in a state that can't have it: killing the job",
		"event", event, "state", string(s.job.shown.State))
	s.send(ipc.Stop{})
	s.cfg.Changed()
}

// transition is the one place where the state of the job changes, and where that is logged, counted
// and published. The mutex is held.
func (s *Supervisor) transition(to JobState, why string) {
	j := &s.job
	from := j.shown.State
	j.shown.State = to
	up := 0.0
	if to == JobRunning {
		up = 1
	}
	s.metrics.up.Set(up)
	s.showHealth()
	if from != to {
		s.log.Debug("job state",
			"machine", "handle", "from", string(from), "to", string(to), "reason", why)
		if to == JobRunning && from != JobFrozen {
			s.log.Info("job started", "pid", j.shown.PID, "token", j.term.Token)
		}
	}
}

func exitReason(e proctree.Exit, byItself bool) string {
	switch {
	case !byItself:
		return "stopped"
	case e.Signal != 0:
		return "signal"
	case e.Code != 0:
		return "error"
	}
	return "ok"
}
