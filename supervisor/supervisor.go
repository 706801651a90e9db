//go:build linux

// Package supervisor runs the job while this candidate leads, and sees to it that the job is dead before anybody else's can run.
//
// It is spread over three processes. The guard is what the user started: it holds the deadlines and kills. The elector, its child,
// holds a Handle, through which it asks for a start, hands on later deadlines, and learns of the job's end. The spawner, a child of
// the guard's too, starts the job, and is the parent of all that the job leaves behind.
// Whichever of them is lost, the others kill the job.
//
// Promised: once a deadline has passed, or one of the three is gone, every process of the job is killed, and "dead" is said
// only when the kernel shows none: no child of the spawner, nothing in the job's cgroup.
//
// Not promised: anything about work that the job gave to another daemon; a job in uninterruptible sleep dies when that ends,
// and until then its death is not claimed. When guard and spawner are killed in one moment, what has left the job's cgroup is missed.
package supervisor

import (
	"errors"
	"fmt"
	"time"

	"leasehold/supervisor/proctree"
)

// JobState is what the job is doing.
type JobState string

// The states of the job.
const (
	JobNone     JobState = "none"     // never started in this process
	JobStarting JobState = "starting" // asked for
	JobRunning  JobState = "running"
	JobStopping JobState = "stopping" // told to stop, or being killed
	JobBackoff  JobState = "backoff"  // ended by itself, to be started again
	JobExited   JobState = "exited"   // dead
)

// Term is what the job is told of the term that it runs in.
type Term struct {
	Key     string // of the candidate in etcd
	Token   int64  // the key's create revision
	LeaseID int64
	StopAt  time.Duration // readings of CLOCK_BOOTTIME, like KillBy
	KillBy  time.Duration
	// Lost is closed when the lease or the key is gone: whatever still runs is killed at once. It may be nil.
	Lost <-chan struct{}
}

// ExitError says that the job ended by itself and is not started again.
type ExitError struct {
	proctree.Exit
	Refused string // why it could not be started, where that is so
}

func (e *ExitError) Error() string {
	switch {
	case e.Refused != "":
		return "the job could not be started: " + e.Refused
	case e.Signal != 0:
		return fmt.Sprintf("the job was ended by signal %d", e.Signal)
	}
	return fmt.Sprintf("the job ended with code %d", e.Code)
}

// ErrGuardGone says that the guard is gone or hung. The job is dead by the time it is returned.
var ErrGuardGone = errors.New("the guard is gone")

// ResignError says that the job failed too often here: another candidate should try.
type ResignError struct {
	After time.Duration // before this one campaigns again
}

func (e *ResignError) Error() string {
	return fmt.Sprintf("the job keeps failing: resigning, back in the queue after %s", e.After.Round(time.Millisecond))
}
