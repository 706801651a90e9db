//go:build linux

package main

import (
	"context"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// A job that is frozen on loss of contact may outlast its lease, and live beside the next one. It
// must not run an instruction until it is thawed. If it is killed instead, it must not have run
// again. When a job is frozen, the kernel says. That it did not run, its heartbeats show.

// heartbeat has each process of a job tell the witness that it runs.
const heartbeat = "heartbeat=20ms"

// unseen is the time between two looks at a frozen job from which on more may have happened to it
// than one of them shows: on a starved machine the looks come late.
const unseen = 10 * time.Millisecond

// frozenJob is the time in which the job of a term was frozen.
type frozenJob struct {
	check.Interval
	term   *check.Term
	killed bool // while it was frozen: it never ran again
	judged bool
}

// watchFrozen tells the checker of each time in which the candidate's job is frozen, until ctx
// ends.
func (c *candidate) watchFrozen(ctx context.Context) {
	defer harness.RealTime(1)()
	var job *harness.Cgroup // that is frozen
	var known *frozenJob    // nil: none is
	pause, frozen := unix.NsecToTimespec(int64(2*time.Millisecond)), time.Duration(0)
	for ctx.Err() == nil {
		_ = unix.Nanosleep(&pause, nil)
		now := harness.Now()
		switch {
		case known == nil:
			if job = c.frozenCgroup(); job != nil {
				frozen = harness.Now()
				known = c.run.check.jobFrozen(c.name, frozen)
			}
		case len(job.Processes()) == 0:
			if now-frozen < unseen {
				c.run.check.jobThawed(known, now, true)
			} else { // it may have been thawed, and have run
				c.run.check.jobThawed(known, frozen, false)
			}
			known = nil
		case job.FreezeAsked(), job.Killed():
			frozen = now
		default:
			c.run.check.jobThawed(known, frozen, false)
			known = nil
		}
	}
}

// frozenCgroup finds the cgroup of a job of the candidate that is frozen, or nil.
func (c *candidate) frozenCgroup() *harness.Cgroup {
	// The pattern is a good one.
	found, _ := filepath.Glob(filepath.Join(c.machine.Cgroup.Path, "run-*", "leasehold-*"))
	for _, path := range found {
		if job := (&harness.Cgroup{Path: path}); job.Frozen() {
			return job
		}
	}
	return nil
}

// jobFrozen takes the moment from which on the candidate's job is frozen. It returns nil if no job
// of it lives: a daemon tries at its start whether it can freeze one.
func (k *checker) jobFrozen(candidate string, at time.Duration) *frozenJob {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms {
		if t.Candidate == candidate && t.Alive() {
			k.noteAt(at, "the %v, is frozen", t)
			since := check.Interval{From: at, To: check.Forever}
			f := &frozenJob{Interval: since, term: t}
			k.frozen = append(k.frozen, f)
			return f
		}
	}
	return nil
}

// jobThawed takes the end of that: when the job was last seen frozen, or had exited, killed while
// it was.
func (k *checker) jobThawed(f *frozenJob, at time.Duration, killed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f.To, f.killed = at, killed
	how := "is thawed"
	if killed {
		how = "has exited, frozen"
	}
	k.noteAt(at, "the %v, %s", f.term, how)
}

// mayRun is from when on the job may have run again: never, if it was killed.
func (f *frozenJob) mayRun() time.Duration {
	if f.killed {
		return check.Forever
	}
	return f.To
}

// frozenIn is when the job of a term could not run.
func (k *checker) frozenIn(t *check.Term) (all check.Intervals) {
	for _, f := range k.frozen {
		if f.term == t {
			all = append(all, check.Interval{From: f.From, To: f.mayRun()})
		}
	}
	return all
}

// judgeFrozen looks whether jobs that were frozen have run meanwhile.
func (k *checker) judgeFrozen(now time.Duration, last bool) {
	for _, f := range k.frozen {
		// What a process has sent may come late.
		if f.judged || f.To == check.Forever || now < f.To+time.Second && !last {
			continue
		}
		f.judged = true
		if k.counts.Frozen++; f.killed {
			k.counts.KilledFrozen++
		}
		for _, l := range f.term.Lives {
			for _, at := range l.Heartbeats {
				if at > f.From && at < f.mayRun() {
					k.violate([]string{f.term.Candidate}, "the %v, ran at %v, and was frozen "+
						"since %v", f.term, at-k.began, f.From-k.began)
				}
			}
		}
	}
}

// heldFrozen finds when a candidate's job was frozen from before a question was sent until after
// its answer, or nil. Whether it still is must be known for some time longer: a job that is being
// thawed counts as one that runs.
func (k *checker) heldFrozen(y *yes, now time.Duration) *frozenJob {
	i := slices.IndexFunc(k.frozen, func(f *frozenJob) bool {
		return f.term.Candidate == y.candidate && f.From < y.sent &&
			y.received+noticedIn < min(f.To, now)
	})
	if i < 0 {
		return nil
	}
	return k.frozen[i]
}
