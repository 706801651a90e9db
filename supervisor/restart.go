//go:build linux

package supervisor

import (
	"math/rand/v2"
	"time"
)

// Restart says what follows when the job ends by itself while its candidate leads.
type Restart string

// The forms of Restart.
const (
	RestartAlways    Restart = "always"
	RestartOnFailure Restart = "on-failure"
	RestartNever     Restart = "never"
)

const (
	quickRun     = 10 * time.Second // a job that ended sooner than this ended quickly
	firstBackoff = 500 * time.Millisecond
	maxBackoff   = 30 * time.Second
)

// restarter decides what follows the end of a job. It outlives terms: if a candidate resigns
// because its job keeps failing, and is elected again at once, the backoff goes on.
type restarter struct {
	mode  Restart
	limit int // quick failures in a row before the candidate resigns; 0: never

	failures int
	backoff  time.Duration
	jitter   func() float64 // in [0, 1)
}

func newRestarter(mode Restart, limit int) *restarter {
	return &restarter{mode: mode, limit: limit, jitter: rand.Float64}
}

// after returns how long to wait before the next start. An *ExitError means that there is none, and
// a *ResignError that another candidate should try.
func (r *restarter) after(exit ExitError, ran time.Duration) (time.Duration, error) {
	if r.mode == RestartNever || r.mode == RestartOnFailure && exit.Code == 0 {
		return 0, &exit
	}
	switch {
	case ran >= quickRun:
		r.failures, r.backoff = 0, 0
	case exit.Code == 0:
		r.failures = 0
	default:
		r.failures++
	}
	r.backoff = min(max(2*r.backoff, firstBackoff), maxBackoff)
	delay := time.Duration(float64(r.backoff) * (0.8 + 0.4*r.jitter()))
	if r.limit > 0 && r.failures >= r.limit {
		r.failures = 0
		return 0, &ResignError{After: delay, Last: exit}
	}
	return delay, nil
}
