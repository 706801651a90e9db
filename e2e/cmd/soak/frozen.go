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

// frozenJob is the time in which the job of a term was frozen, as far as it was seen.
type frozenJob struct {
	check.Interval
	term   *check.Term
	end    frozenEnd
	judged bool
}

// frozenEnd is how such a time has ended.
type frozenEnd string

const (
	stillFrozen  frozenEnd = ""
	thawed       frozenEnd = "is thawed"
	killedFrozen frozenEnd = "has exited, frozen"
	// unknownEnd: nobody looked for a while, and then it had been killed. It may have been thawed
	// before, and have run.
	unknownEnd frozenEnd = "has exited, frozen or thawed"
)

// watchFrozen tells the checker of each time in which the candidate's job is frozen, until ctx
// ends.
func (c *candidate) watchFrozen(ctx context.Context) {
	defer harness.RealTime(1)()
	var job *harness.Cgroup // that is frozen
	var known *frozenJob    // nil: none is
	// seen is just before the last look that has shown it frozen.
	pause, seen := unix.NsecToTimespec(int64(2*time.Millisecond)), time.Duration(0)
	for ctx.Err() == nil {
		_ = unix.Nanosleep(&pause, nil)
		began := harness.Now()
		if known == nil {
			if job = c.frozenCgroup(); job != nil {
				seen, known = began, c.run.check.jobFrozen(c.name, harness.Now())
			}
			continue
		}
		there, asked, killed := len(job.Processes()) > 0, job.FreezeAsked(), job.Killed()
		ended := harness.Now() // the look, which may have been interrupted
		switch end := endOf(there, asked, killed, ended-seen); end {
		case stillFrozen:
			seen = began
		case killedFrozen:
			c.run.check.jobThawed(known, ended, end)
			known = nil
		default:
			c.run.check.jobThawed(known, seen, end)
			known = nil
		}
	}
}

// endOf is what a look shows of a job that was seen frozen so long before: whether it is there, is
// asked to be frozen, and has got SIGKILL.
func endOf(there, asked, killed bool, since time.Duration) frozenEnd {
	switch {
	case there && asked:
		return stillFrozen
	case there && !killed:
		return thawed
	case since >= unseen:
		return unknownEnd
	case there:
		return stillFrozen // It runs no more, and has yet to exit.
	}
	return killedFrozen
}

// frozenCgroup finds the cgroup of a job of the candidate that is frozen, or nil. One that is empty
// has had its job, and has yet to be removed.
func (c *candidate) frozenCgroup() *harness.Cgroup {
	// The pattern is a good one.
	found, _ := filepath.Glob(filepath.Join(c.machine.Cgroup.Path, "run-*", "leasehold-*"))
	for _, path := range found {
		if job := (&harness.Cgroup{Path: path}); job.Frozen() &&
			len(job.Processes()) > 0 {
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
func (k *checker) jobThawed(f *frozenJob, at time.Duration, end frozenEnd) {
	k.mu.Lock()
	defer k.mu.Unlock()
	f.To, f.end = max(f.From, at), end
	k.noteAt(at, "the %v, %s", f.term, end)
}

// mayRun is from when on the job may have run again: never, if it was killed.
func (f *frozenJob) mayRun() time.Duration {
	if f.end == killedFrozen {
		return check.Forever
	}
	return f.To
}

// mayRest is until when the job may not have run: for ever, unless it was seen thawed.
func (f *frozenJob) mayRest() time.Duration {
	if f.end == thawed {
		return f.To
	}
	return check.Forever
}

// frozenIn is when the job of a term could not run. Where nobody knows whether it ran, nobody is
// blamed for it.
func (k *checker) frozenIn(t *check.Term) (all check.Intervals) {
	for _, f := range k.frozen {
		if f.term == t {
			all = append(all, check.Interval{From: f.From, To: f.mayRest()})
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
		k.counts.Frozen++
		switch f.end {
		case killedFrozen:
			k.counts.KilledFrozen++
		case unknownEnd:
			k.counts.UnknownFrozen++
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
