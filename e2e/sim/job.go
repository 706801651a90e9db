package sim

import (
	"fmt"
	"time"

	elect "leasehold/election"
)

// job is a job and the guard's part of it. It follows supervisor/guard/job.go: the elector moves
// the deadlines until stop-at; at stop-at the job gets the stop signal; at kill-by, at the end of
// its grace, or if the lease or the elector is lost, it is killed. It takes a seeded time to exit.
// The world's lock guards it.
type job struct {
	d     *daemon
	token int64
	lease int64
	key   string

	started   time.Duration   // by the world's clock
	deadlines elect.Deadlines // by the daemon's clock
	graceEnd  time.Duration   // the same
	stopTakes time.Duration   // from the stop signal to the exit
	killTakes time.Duration
	stopping  bool
	killing   bool
	exitAt    time.Duration // by the world's clock
	wake      *time.Timer
	gone      chan struct{} // closed when the job has exited
	result    error         // what Lead returns
}

const forever = time.Duration(1<<63 - 1)

// startJob starts the job of a term, or returns nil if stop-at has passed.
func (d *daemon) startJob(t elect.Term) *job {
	if d.clock.now() >= t.Deadlines.StopAt {
		return nil
	}
	j := &job{
		d: d, token: t.Token, lease: t.LeaseID, key: t.Key, started: d.w.now(),
		deadlines: t.Deadlines, graceEnd: forever, exitAt: forever,
		stopTakes: time.Duration(d.random.Float64() * float64(4*t.Timing.LossGrace)),
		killTakes: time.Duration(d.random.Float64() * float64(killBound(t.Timing))),
		gone:      make(chan struct{}),
	}
	j.wake = time.AfterFunc(forever, func() {
		d.w.mu.Lock()
		defer d.w.mu.Unlock()
		j.serve()
	})
	before := d.job
	d.job = j
	d.w.check.started(j, before)
	if d.guard.stop {
		j.stop(d.w.s.TTL, errStop.Error())
	}
	j.serve()
	return j
}

// killBound is what a kill may take at most, by docs/safety.md, with clocks that drift.
func killBound(t elect.Timing) time.Duration {
	fast, slow := 1+maxDrift, 1-maxDrift
	return time.Duration(float64(t.TTL)/fast - float64(t.TTL-t.Margin)/slow)
}

func (j *job) alive() bool {
	select {
	case <-j.gone:
		return false
	default:
		return true
	}
}

// extend moves the deadlines, unless stop-at has passed.
func (j *job) extend(d elect.Deadlines) {
	if j.d.clock.now() < j.deadlines.StopAt {
		j.deadlines = d
	}
	j.serve()
}

// stop sends the stop signal. The job is killed when the grace is over, or at kill-by.
func (j *job) stop(grace time.Duration, why string) {
	if grace != forever { // guard and elector may both ask
		j.graceEnd = min(j.graceEnd, j.d.clock.now()+grace)
	}
	if !j.stopping && !j.killing && j.alive() {
		j.d.note("job %d is asked to stop: %s", j.token, why)
		j.stopping = true
		j.exitAt = j.d.w.now() + j.stopTakes
	}
	j.serve()
}

func (j *job) kill(why string) {
	if !j.killing && j.alive() {
		j.d.note("job %d is killed: %s", j.token, why)
		j.killing = true
		j.exitAt = min(j.exitAt, j.d.w.now()+j.killTakes)
	}
	j.serve()
}

// vanish ends the job at once: its machine is gone.
func (j *job) vanish() {
	j.exitAt = 0
	j.serve()
}

// serve does what is due, and sets the timer for what comes next.
func (j *job) serve() {
	if !j.alive() {
		return
	}
	now := j.d.clock.now()
	switch {
	case j.d.w.now() >= j.exitAt:
		j.d.note("job %d has exited", j.token)
		j.wake.Stop()
		close(j.gone)
		return
	case j.killing:
	case now >= j.deadlines.KillBy:
		j.kill("kill-by")
		return
	case now >= j.graceEnd:
		j.kill("grace over")
		return
	case !j.stopping && now >= j.deadlines.StopAt:
		j.stop(forever, "stop-at")
		return
	}
	next := j.exitAt - j.d.w.now()
	if !j.killing {
		due := min(j.deadlines.KillBy, j.graceEnd)
		if !j.stopping {
			due = min(due, j.deadlines.StopAt)
		}
		next = min(next, j.d.clock.in(due-now))
	}
	j.wake.Reset(next)
}

func (j *job) String() string { return fmt.Sprintf("job %d of %s", j.token, j.d.name) }
