//go:build linux

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// class is what an overlap is counted as.
type class string

const (
	afterAction class = "after an operator's action, the old leader within reach"
	unreached   class = "after an operator's action, the old leader out of reach"
	starved     class = "after an operator's action, the machine starved"
	afterThaw   class = "after a thaw past the TTL, from the thaw on"
	slowThaw    class = "after a thaw past the TTL, the machine starved"
	guardLate   class = "the machine starved, and the guard served kill-by later than its margin"
	unexcused   class = "outside of every exception"
)

// bound is for how long an overlap may last. See verdict for how long afterAction may, and
// killedLate for guardLate.
func (s settings) bound(c class) time.Duration {
	switch c {
	case unexcused:
		return 0
	case afterThaw:
		return s.margin()
	}
	return s.ttl
}

// margin is leasehold's own default.
func (s settings) margin() time.Duration { return max(s.ttl/10, 200*time.Millisecond) }

// action is a term taken away under its leader's feet, by an operator or by etcd.
type action struct {
	at    time.Duration
	token int64  // 0: of whichever term it hit
	whom  string // the candidate that led; "": nobody knows
	hit   bool   // that term's job was alive
	cause string
	until time.Duration // when two jobs can last begin to live at once by it
	// unreached is what may have kept the old leader from learning of it, or "".
	unreached string
}

// excuses are what the checker is told of faults.
type excuses struct {
	frozen  map[string]check.Intervals  // by candidate
	last    map[[2]string]time.Duration // when a kind of fault last hit a candidate
	actions []*action
	samples []sample // of the kernel's account of CPU pressure
}

// begins notes a fault, just before it is injected.
func (k *checker) begins(i *injection) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := harness.Now()
	k.noteAt(now, "#%d: %v", i.number, i.drawn)
	k.excuses.last[[2]string{i.name, i.whom}] = now
	k.disturbs(i.mayEnd)
	if !i.losesElector() {
		return
	}
	for _, a := range k.excuses.actions { // one that it has had no time to learn of
		if a.whom == i.whom && a.unreached == "" && now < a.at+noticedIn {
			a.unreached = "its elector was lost"
		}
	}
}

func (k *checker) freezes(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	frozen := check.Interval{From: harness.Now(), To: check.Forever}
	k.excuses.frozen[candidate] = append(k.excuses.frozen[candidate], frozen)
}

func (k *checker) thaws(candidate string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	frozen := k.excuses.frozen[candidate]
	frozen[len(frozen)-1].To = harness.Now()
}

// did is told before an action is done.
func (k *checker) did(a *action) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, t := range k.terms {
		a.hit = a.hit || t.Token == a.token && t.Alive()
	}
	k.excuses.actions = append(k.excuses.actions, a)
}

// worked is told when etcd has said that the action is done. By then the old leader, wherever it
// is, has renewed its lease for the last time.
func (k *checker) worked(a *action) {
	k.mu.Lock()
	defer k.mu.Unlock()
	a.until = harness.Now() + k.ttl
}

// actionOn finds the action that may have taken a term by a moment: the one on that term if there
// is one.
func (e *excuses) actionOn(token int64, at time.Duration) *action {
	var window *action
	for _, a := range e.actions {
		switch {
		case at < a.at || at > a.until:
		case a.token == token:
			return a
		case a.token == 0:
			window = a
		}
	}
	return window
}

// after is what overlaps after an action are counted as, and why. On a starved machine they say
// little of leasehold: a job that has got its SIGKILL is seen dead only when it has a processor to
// end on.
func (e *excuses) after(a *action) (c class, why string) {
	stalled := e.stalled(a.at, a.at)
	switch {
	case a.unreached != "":
		return unreached, fmt.Sprintf(" (%s; %s)", a.cause, a.unreached)
	case stalled > 0.5:
		return starved, fmt.Sprintf(" (%s; processes waited for a processor %.0f %% of the time)",
			a.cause, 100*stalled)
	}
	return afterAction, fmt.Sprintf(" (%s)", a.cause)
}

// classify finds the exception under which the earlier term's job may have been alive at a moment
// together with a later one.
func (k *checker) classify(earlier *check.Term, at time.Duration) (c class, why string) {
	a := k.excuses.actionOn(earlier.Token, at)
	if a != nil && (a.token != 0 || k.taken(a, earlier, at)) {
		return k.excuses.after(a)
	}
	for _, f := range k.excuses.frozen[earlier.Candidate] {
		long := f.Length() >= k.margin() && f.From >= earlier.Start
		if long && f.To <= at && at <= f.To+k.margin() {
			return afterThaw, fmt.Sprintf(" (frozen for %v until %v before)", f.Length(), at-f.To)
		}
	}
	// A guard that was stopped is no excuse: its elector stands in for it.
	hung := k.excuses.last[[2]string{guardHung, earlier.Candidate}]
	if hung != 0 && hung >= earlier.Start {
		return unexcused, " (its guard had been stopped)"
	}
	if late := k.killedLate(earlier); late > 0 {
		return guardLate, fmt.Sprintf(" (by %v)", late)
	}
	return unexcused, ""
}

// killedLate is by how much the guard of a term was late when it killed the job at kill-by: only
// that lets two jobs live at once. It is 0 if that is within the margin, or if the machine was not
// starved from kill-by until the kill: then there was nothing that kept the guard from it.
func (k *checker) killedLate(t *check.Term) time.Duration {
	if t.Alive() {
		return 0
	}
	ended := k.wall(t.End)
	late := check.Latency(check.Between(check.KillByLatencies(k.log(t.Candidate)),
		ended.Add(-time.Second), ended.Add(k.ttl+time.Second)))
	if late <= k.margin() || !k.excuses.starved(t.End-late, t.End, k.margin()) {
		return 0
	}
	return late
}

// wrote is what a candidate wrote about a moment, until a TTL later. A second is for the log.
func (k *checker) wrote(what func(log string) []check.Entry, t *check.Term, at time.Duration,
) []check.Entry {
	around := k.wall(at)
	return check.Between(what(k.log(t.Candidate)),
		around.Add(-time.Second), around.Add(k.ttl+time.Second))
}

// taken reports whether etcd took the term away by an action of its own, of which nobody knows whom
// it hit: the candidate wrote so, or it was out of reach and its lease had time left by its own
// account.
func (k *checker) taken(a *action, t *check.Term, at time.Duration) bool {
	if a.unreached == "" {
		return len(k.wrote(check.TermTaken, t, at)) > 0
	}
	deadline, known := k.leases.deadlineOf(t)
	return !known || at < deadline
}

// sample is the kernel's account of the time in which some process of the machine waited for a
// processor.
type sample struct {
	at      time.Duration
	stalled time.Duration // since the machine's start
}

const (
	sampleEvery = 50 * time.Millisecond
	// around is by how much a time is widened before it is asked whether the machine was starved.
	around = 100 * time.Millisecond
)

// sample takes a sample. Without the kernel's account there are none.
func (e *excuses) sample(now time.Duration) {
	if n := len(e.samples); n > 0 && now <= e.samples[n-1].at+sampleEvery {
		return
	}
	data, _ := os.ReadFile("/proc/pressure/cpu")
	some, _, _ := strings.Cut(string(data), "\n")
	_, total, _ := strings.Cut(some, "total=")
	if us, err := strconv.ParseInt(total, 10, 64); err == nil {
		e.samples = append(e.samples, sample{now, time.Duration(us) * time.Microsecond})
	}
}

// starved reports whether processes waited for a processor for most of a time. If a virtual machine
// stands still, none of them waits by its account: then no sample was taken for as long as a pause.
func (e *excuses) starved(from, to, pause time.Duration) bool {
	for i, s := range e.samples {
		if i > 0 && s.at > from && e.samples[i-1].at < to && s.at-e.samples[i-1].at > pause {
			return true
		}
	}
	return e.stalled(from, to) > 0.5
}

// stalled is the share of a time, widened to the samples around it, in which processes waited.
func (e *excuses) stalled(from, to time.Duration) float64 {
	from, to = from-around, to+around
	var first, last sample
	for _, s := range e.samples {
		if s.at <= from || first.at == 0 {
			first = s
		}
		last = s
		if s.at >= to {
			break
		}
	}
	if last.at <= first.at {
		return 0
	}
	return float64(last.stalled-first.stalled) / float64(last.at-first.at)
}
