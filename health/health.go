// Package health reports over HTTP what is true now: to load balancers, kubelets, people and
// Prometheus.
//
// The server computes each answer from one snapshot and one reading of the clock, both taken when
// it serves the request. It never asks etcd. In particular, /leader compares the lease's own
// deadline with the clock. So it never answers "leader" once stop-at has passed, even if everything
// else in the daemon hangs. It cannot promise how long an answer stays true: a client acts on it
// later. The fencing token is for that.
package health

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"leasehold/internal/quote"
)

// States of a candidate.
const (
	Connecting = "connecting"
	Standby    = "standby"
	Leading    = "leading"
	Suspended  = "suspended"
	Stopping   = "stopping"
)

// JobRunning is the only state of the job in which /leader answers 200.
const JobRunning = "running"

// Snapshot is what the daemon knows at one moment, from memory. Its deadlines are readings of the
// clock in Config.Now.
type Snapshot struct {
	Election string
	Identity string
	State    string // Connecting, Standby, Leading, Suspended or Stopping.
	Reason   string // Why the candidate is not in the election, for people. Holds no secrets.
	Since    time.Time
	Unfit    string  // Why the candidate must not become leader; "": it may.
	Leader   *Leader // Nil when none is known.
	Queue    *Queue  // Nil when it is not known.

	LeaseID int64 // 0 without a lease.
	TTL     time.Duration

	StopAt, KillBy, End time.Duration // Zero without a lease.

	Leading  bool // A term runs, neither lost nor resigned; StopAt may have passed.
	Suspends bool // StopAt does not end the term: the job is frozen then.

	JobWanted bool // False if the daemon runs no job.
	Job       Job

	Live    error // Nil while the elector's loops send heartbeats.
	Blocker *Blocker
	Hold    *Hold // Nil: there is none, or it can't be read.
	// ControlProblem is why the keys beside the election can't be used. Holds no secrets.
	ControlProblem string
}

// Leader is the candidate that leads, as etcd has it.
type Leader struct {
	Identity string `json:"identity" desc:"its name"`
	Key      string `json:"key" desc:"its key in etcd"`
	Token    int64  `json:"token" desc:"its fencing token: that key's create revision"`
}

// Queue is what is ahead of the candidate's key. In a long queue it is of some seconds ago.
type Queue struct {
	Ahead int      `json:"ahead" desc:"how many keys are ahead of this candidate's"`
	First []string `json:"first" desc:"the identities of the first of them, eight at most"`
}

// Job is the state of the job.
type Job struct {
	State     string    // none, starting, running, frozen, stopping, backoff or exited.
	PID       int       // 0 when no process runs.
	StartedAt time.Time // Zero before the first start.
	Starts    int       // In the term; not shown.
	Restarts  int
	LastExit  *Exit
	Health    string // starting, healthy or unhealthy; "" if it is not checked.
}

// Health of a job that is checked.
const (
	HealthStarting = "starting"
	HealthGood     = "healthy"
)

// Exit is how a job ended.
type Exit struct {
	Code   int    // Counts only if Signal is "".
	Signal string // Such as SIGKILL.
	At     time.Time
}

// Blocker is a key ahead of ours in the election that will not go away by itself.
type Blocker struct {
	Key    string `json:"key" desc:"that key"`
	Why    string `json:"why" desc:"why it stays"`
	Remedy string `json:"remedy" desc:"the command that ends the wait; \"\" while its lease lives"`
}

// Hold keeps everybody from becoming leader.
type Hold struct {
	By, Reason   string
	Since, Until time.Time // Zero: not known; until it is released.
	Stop         bool      // The leader resigns, too.
}

// update changes the state if a deadline has passed. The elector's own timers do the same. But a
// request that is served just before them, or while they hang, must not get the old state. wall is
// the time of day at the moment now.
func (s Snapshot) update(now time.Duration, wall time.Time) Snapshot {
	over := func(deadline time.Duration) bool { return deadline != 0 && now >= deadline }
	switch {
	case s.State == Leading && s.Leading && over(s.StopAt):
		s.State, s.Since = Stopping, wall.Add(s.StopAt-now)
		if s.Suspends {
			s.State = Suspended
		}
		s.Reason = "contact with etcd lost: stop-at has passed"
	case s.State == Standby && over(s.End):
		s.State, s.Since = Connecting, wall.Add(s.End-now)
		s.Reason = "contact with etcd lost: the lease has expired"
	}
	if over(s.End) {
		s.Queue = nil // Our key is gone.
		if s.Leading {
			s.Leader = nil // It was us. We can't know who leads now.
		}
	}
	return s
}

// Only the methods below decide what is true. Each returns nil for yes, or the reason for no. They
// expect an updated snapshot.

func (s Snapshot) live() error { return s.Live }

// ready: in the election, waiting or leading, and fit.
func (s Snapshot) ready() error {
	if s.Unfit != "" {
		return errors.New("unfit: " + s.Unfit)
	}
	switch s.State {
	case Standby, Leading:
		return nil
	default:
		return s.because(s.State)
	}
}

// leader: a term runs, its stop-at has not passed, and the job runs and is healthy, if the daemon
// has one.
func (s Snapshot) leader(now time.Duration) error {
	switch {
	case s.State != Leading:
		return s.because(s.State)
	case !s.Leading:
		return errors.New("the term has ended")
	case now >= s.StopAt:
		return errors.New("stop-at has passed")
	case s.JobWanted && s.Job.State != JobRunning:
		return fmt.Errorf("leading, but the job is not running: %s", cmp.Or(s.Job.State, "none"))
	case s.JobWanted && s.Job.Health == HealthStarting:
		return errors.New("leading, but the job is not ready yet")
	case s.JobWanted && !s.Job.ready():
		return errors.New("leading, but the job is " + s.Job.Health)
	}
	return nil
}

// Leads reports whether /leader would answer 200 at the moment now.
func (s Snapshot) Leads(now time.Duration) bool { return s.leader(now) == nil }

// ready reports whether the job runs, is ready and is healthy, as far as that is checked.
func (j Job) ready() bool {
	return j.State == JobRunning && (j.Health == "" || j.Health == HealthGood)
}

// standby: waiting in the queue.
func (s Snapshot) standby() error {
	if s.State != Standby {
		return s.because(s.State)
	}
	return nil
}

func (s Snapshot) because(state string) error {
	switch {
	case s.Reason != "" && state != Standby && state != Leading:
		return fmt.Errorf("%s: %s", state, s.Reason)
	case s.Hold != nil && state == Standby && s.Leader == nil:
		return fmt.Errorf("standby: held by %s", quote.Printable(cmp.Or(s.Hold.By, "somebody")))
	case s.Leader != nil && state == Standby:
		return fmt.Errorf("standby: %s leads", quote.Printable(s.Leader.Identity))
	}
	return errors.New(cmp.Or(state, "no state yet"))
}

// validFor is how long the lease is sure to last.
func (s Snapshot) validFor(now time.Duration) time.Duration { return max(0, s.End-now) }
