package sim

import (
	"fmt"
	"time"

	elect "leasehold/election"
)

// job is a job and the guard's part of it. It follows supervisor/guard/job.go: the elector moves
// the deadlines until stop-at; at stop-at the job gets the stop signal; at kill-by, at the end of
// its grace, or if the lease or the elector is lost, it is killed. It takes a seeded time to exit.
//
// In some daemons the job is frozen at stop-at. That takes a seeded time, and so does the thaw. A
// job that is not seen frozen at kill-by is killed. The world's lock guards it.
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
	freezing  bool            // it is to be frozen, and was not seen frozen
	frozen    bool            // it was seen frozen
	frozenAt  time.Duration   // by the world's clock: when it will be
	thaw      elect.Deadlines // what the guard has not come to yet
	thawAt    time.Duration   // by the world's clock: when it does; forever: there is nothing
	exitAt    time.Duration   // by the world's clock
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
		deadlines: t.Deadlines, graceEnd: forever, exitAt: forever, thawAt: forever,
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

// runs reports whether it can run an instruction.
func (j *job) runs() bool { return j.alive() && !j.frozen }

// extend moves the deadlines, unless stop-at has passed. If the job is frozen, or is being frozen,
// it takes the guard and its freezer a while to come to that.
func (j *job) extend(d elect.Deadlines) {
	j.serve() // stop-at may have passed just now
	switch {
	case j.freezing || j.frozen:
		j.thaw = d
		if j.thawAt == forever {
			j.thawAt = j.d.w.now() + j.freezerTakes()
		}
	case j.d.clock.now() < j.deadlines.StopAt:
		j.deadlines = d
	}
	j.serve()
}

// freezerTakes is how long guard and freezer take: most of the time little, else up to one and a
// half TTLs.
func (j *job) freezerTakes() time.Duration {
	ttl := float64(j.d.w.s.TTL)
	if part := j.d.random.Float64(); part > 0.7 {
		return time.Duration((part - 0.7) / 0.2 * ttl)
	}
	return time.Duration(j.d.random.Float64() * ttl / 50)
}

// freeze has the job frozen: stop-at has passed.
func (j *job) freeze() {
	j.d.note("job %d is to be frozen", j.token)
	j.freezing, j.thawAt, j.frozenAt = true, forever, j.d.w.now()+j.freezerTakes()
}

// serveFreezer thaws or freezes the job when it is time. New deadlines that have passed thaw
// nothing.
func (j *job) serveFreezer(now time.Duration) {
	if j.killing || !j.freezing && !j.frozen {
		return
	}
	if j.d.w.now() >= j.thawAt {
		j.thawAt = forever
		if now < j.thaw.StopAt {
			j.d.note("job %d is thawed", j.token)
			j.deadlines, j.freezing, j.frozen = j.thaw, false, false
			j.d.w.check.thawed(j)
		}
	}
	if j.freezing && j.d.w.now() >= j.frozenAt && now < j.deadlines.KillBy {
		j.d.note("job %d is frozen", j.token)
		j.freezing, j.frozen = false, true
	}
}

// nextOfFreezer is when serveFreezer has something to do, by the world's clock.
func (j *job) nextOfFreezer() time.Duration {
	switch {
	case j.killing:
		return forever
	case j.freezing:
		return min(j.thawAt, j.frozenAt)
	case j.frozen:
		return j.thawAt
	}
	return forever
}

// stop sends the stop signal. The job is killed when the grace is over, or at kill-by.
func (j *job) stop(grace time.Duration, why string) {
	if grace != forever { // guard and elector may both ask
		j.graceEnd = min(j.graceEnd, j.d.clock.now()+grace)
	}
	if (j.freezing || j.frozen) && !j.killing {
		j.kill(why)
		return
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
	j.serveFreezer(now)
	switch {
	case j.d.w.now() >= j.exitAt:
		j.d.note("job %d has exited", j.token)
		j.wake.Stop()
		close(j.gone)
		return
	case j.killing, j.frozen:
	case now >= j.deadlines.KillBy:
		j.kill("kill-by")
		return
	case now >= j.graceEnd:
		j.kill("grace over")
		return
	case j.stopping || j.freezing || now < j.deadlines.StopAt:
	case j.d.freezes:
		j.freeze()
	default:
		j.stop(forever, "stop-at")
		return
	}
	next := j.exitAt - j.d.w.now()
	if !j.killing && !j.frozen {
		due := min(j.deadlines.KillBy, j.graceEnd)
		if !j.stopping && !j.freezing {
			due = min(due, j.deadlines.StopAt)
		}
		next = min(next, j.d.clock.in(due-now))
	}
	if at := j.nextOfFreezer(); at != forever {
		next = min(next, max(1, at-j.d.w.now()))
	}
	j.wake.Reset(next)
}

func (j *job) String() string { return fmt.Sprintf("job %d of %s", j.token, j.d.name) }
