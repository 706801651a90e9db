//go:build linux

package main

import (
	"fmt"
	"slices"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// A leader whose elector is killed, hangs, or is replaced by a reload, keeps its job: another
// elector takes over. The job may be moved only if something else is wrong, too:
//
//   - another fault of that daemon, of its links or of etcd, an operator's action, or a starved
//     machine: at the same time, until shortly before, or afterwards;
//   - the third loss of an elector of that daemon within a minute, after which the guard gives up
//     (a reload does not count);
//   - the job ends by itself.

// kept is a job that must live on.
type kept struct {
	cause     string // the fault
	candidate string
	token     int64
	from      time.Duration // when its elector was lost
	until     time.Duration // a TTL later, or when something else goes wrong
}

// mostLost is how many electors a guard replaces within a minute.
const mostLost = 2

// losesElector reports whether the fault takes a daemon's elector.
func (i *injection) losesElector() bool {
	return i.name == electorKilled || i.name == electorHung || i.name == electorReloaded
}

// mayEnd reports whether a fault may be why the job of a candidate ends.
func (i *injection) mayEnd(candidate string) bool {
	return i.candidate == nil || i.candidate.name == candidate
}

// mustKeep reports whether nothing else is wrong when a fault has taken an elector.
func (r *run) mustKeep(of *injection) bool {
	if !r.steering.TryLock() {
		return false // a command is being carried out
	}
	r.steering.Unlock()
	lost := 0
	for _, i := range r.injected {
		if i == of || i.idle || !i.mayEnd(of.candidate.name) {
			continue
		}
		lasts := recovers
		if i.target == theCluster || i.target == anElection {
			lasts += operatorWaits // before etcd does it
		}
		if i.target == anElectionsFuture {
			lasts += commandTakes
		}
		if i.To == check.Forever || i.To > of.on.Began-lasts {
			return false
		}
		if i.losesElector() && i.name != electorReloaded && i.on.Machine == of.on.Machine &&
			i.From > of.on.Began-time.Minute {
			lost++
		}
	}
	// Others than we may have taken electors, too.
	now := time.Now()
	replaced := check.Between(check.Replacements(of.on.Machine.Log()),
		now.Add(-time.Minute), now.Add(time.Second))
	return of.name == electorReloaded || max(lost, len(replaced)) < mostLost
}

// keeps notes that the job of a candidate must live on, if it has one that does not end by itself.
func (k *checker) keeps(i *injection) {
	k.mu.Lock()
	defer k.mu.Unlock()
	at := i.on.Began
	for _, t := range k.terms {
		if t.Candidate == i.candidate.name && t.Start < at && (t.Alive() || t.End > at) &&
			!endsByItself(t) {
			k.kept = append(k.kept, &kept{
				cause: fmt.Sprintf("#%d: %v", i.number, i.drawn), candidate: t.Candidate,
				token: t.Token, from: at, until: at + k.ttl,
			})
		}
	}
}

// disturbs ends the time in which jobs must live on, for those that something else may end now.
func (k *checker) disturbs(mayEnd func(candidate string) bool) {
	now := harness.Now()
	for _, j := range k.kept {
		if mayEnd(j.candidate) {
			j.until = min(j.until, now)
		}
	}
}

// ends is told when the daemons are asked to end.
func (k *checker) ends() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.disturbs(func(string) bool { return true })
}

// judgeKept looks whether the jobs that must live on do so.
func (k *checker) judgeKept(now time.Duration, last bool) {
	k.kept = slices.DeleteFunc(k.kept, func(j *kept) bool {
		i := slices.IndexFunc(k.terms, func(t *check.Term) bool {
			return t.Token == j.token && t.Candidate == j.candidate
		})
		t := k.terms[i]
		again := slices.ContainsFunc(t.Lives, func(l harness.Life) bool {
			return l.Role == "job" && l.Started > j.from && l.Started < j.until
		})
		ended := !t.Alive() && t.End > j.from && t.End < j.until
		switch {
		case ended && k.excuses.actionOn(t.Token, t.End) != nil:
			return true
		case ended && t.End > j.from+k.ttl/4 && k.excuses.starved(j.from, t.End, k.margin()):
			k.counts.KeptStarved++ // the next elector came too late for stop-at
			return true
		case ended || again:
			k.violate([]string{j.candidate}, "the %v, has ended, or was started again, within %v "+
				"of the loss of its elector, and nothing else was wrong (%s)",
				t, harness.Now()-j.from, j.cause)
			return true
		case last || now > j.until+time.Second: // the witness may be late
			k.counts.Kept++
			return true
		}
		return false
	})
}
