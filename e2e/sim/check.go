package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	elect "leasehold/election"
)

// checker checks what must hold. The world's lock guards it.
type checker struct {
	w          *world
	violations []string
	terms      int
	token      int64 // the highest of all jobs
	actions    []action
	told       map[*job]bool
	recovery   time.Duration
}

// action is what an operator did to a candidate whose key was the oldest. It excuses the job of
// that candidate, for as long as the job can live by its last renewal. The job may be started after
// it, because the candidate learns of it later, but not long after it: see lateStart.
type action struct {
	lease int64 // the candidate's
	deed  deed
	at    time.Duration
}

type deed string

// An overwritten key excuses nothing: it keeps its create revision, and so keeps all others waiting
// until its candidate has ended the job and removed it.
const (
	keyDeleted   deed = "key deleted"
	leaseRevoked deed = "lease revoked"
)

// did notes what was done to the lease or the key of a candidate that leads, as far as etcd knows.
// What is done to the same candidate after that counts from the same moment.
func (c *checker) did(lease int64, leads bool, what deed) {
	at := c.w.now()
	for _, a := range c.actions {
		if a.lease == lease {
			at, leads = a.at, true
			break
		}
	}
	if leads {
		c.actions = append(c.actions, action{lease, what, at})
	}
}

// excused reports whether such an action is the reason for what happens to the job now.
func (c *checker) excused(j *job, by ...deed) bool {
	return slices.ContainsFunc(c.actions, func(a action) bool {
		return a.lease == j.lease && slices.Contains(by, a.deed) &&
			j.started <= a.at+c.lateStart() && c.w.now() <= a.at+c.w.s.TTL
	})
}

// lateStart is how long after it has lost its key a candidate may start a job. A candidate that
// starts early has had a renewal confirmed within one and a half intervals, so its key was there
// then. Any other has read its key in a request that took 2.5 s at most. The rest is for clocks and
// for messages that travel.
func (c *checker) lateStart() time.Duration {
	return max(c.w.s.TTL*3/10, 2500*time.Millisecond) + 100*time.Millisecond
}

func (c *checker) violation(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	c.w.note("CHECK", "%s", text)
	c.violations = append(c.violations, fmt.Sprintf("at %.6f s: %s", c.w.now().Seconds(), text))
}

// report is violation for a caller that does not hold the world's lock.
func (c *checker) report(format string, args ...any) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	c.violation(format, args...)
}

// started is called when a job starts. It has the token of the one before if it is started again in
// its term.
func (c *checker) started(j, before *job) {
	c.terms++
	j.d.note("job %d starts, lease %x", j.token, j.lease)
	again := before != nil && before.token == j.token && before.lease == j.lease
	rises := j.token > c.token || again && j.token == c.token
	if before != nil && before.alive() {
		c.violation("%v starts beside %v", j, before)
	}
	if !rises && !c.excused(j, keyDeleted, leaseRevoked) {
		c.violation("%v starts after one with the token %d", j, c.token)
	}
	if hold := c.w.hold; hold != nil && hold.Token != j.token && !again &&
		!c.excused(j, keyDeleted, leaseRevoked) {
		c.violation("%v starts, and the hold names %d", j, hold.Token)
	}
	c.token = max(c.token, j.token)
	c.overlaps(j)
}

// thawed is called when a job runs again.
func (c *checker) thawed(j *job) {
	if j.token < c.token && !c.excused(j, keyDeleted, leaseRevoked) {
		c.violation("%v is thawed after one with the token %d has started", j, c.token)
	}
	if j.d.guard.stop {
		c.violation("%v is thawed, and the daemon was asked to stop", j)
	}
	c.look(j.d)
}

// overlaps checks that no other job runs beside this one. Only the job with the lower token may, if
// an operator has ended its term: by that the other one has won.
func (c *checker) overlaps(j *job) {
	for _, d := range c.w.daemons {
		other := d.job
		if other == nil || other == j || !other.runs() {
			continue
		}
		older := j
		if other.token < j.token {
			older = other
		}
		if !c.excused(older, keyDeleted, leaseRevoked) {
			c.once(j, "%v is alive beside %v", j, other)
		}
	}
}

// once reports one violation a job.
func (c *checker) once(j *job, format string, args ...any) {
	if c.told == nil {
		c.told = map[*job]bool{}
	}
	if !c.told[j] {
		c.told[j] = true
		c.violation(format, args...)
	}
}

// watch checks again and again.
func (c *checker) watch(stop chan struct{}) {
	tick := time.NewTicker(50*time.Millisecond + 11)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			c.w.mu.Lock()
			for _, d := range c.w.daemons {
				c.look(d)
			}
			c.w.mu.Unlock()
		}
	}
}

// look checks one daemon.
func (c *checker) look(d *daemon) {
	if j := d.job; j != nil && j.runs() {
		c.overlaps(j)
		if !c.w.cluster.HasLease(j.lease) && !c.excused(j, leaseRevoked) {
			c.once(j, "etcd has dropped the lease %x, and %v is alive", j.lease, j)
		}
	}
	if d.elector == nil {
		return
	}
	s := d.elector.candidate.Snapshot()
	if !s.Leading || d.clock.now() >= s.Deadlines.StopAt {
		return
	}
	if j := d.job; j != nil && j.lease == s.LeaseID && c.excused(j, keyDeleted, leaseRevoked) {
		return
	}
	if created := c.w.cluster.Created(s.Leader.Key); created != s.Leader.Token {
		c.violation("%s says that it leads with token %d, and etcd has its key with %d",
			d.name, s.Leader.Token, created)
	}
}

// settled checks that without faults one job runs in time, and goes on, and that all others wait
// behind it, also one whose key is deleted. If the leader's key is deleted, its job is killed at
// once. Then it takes one member of etcd away, or the leader from etcd: from a TTL of 5 s up that
// moves no job, and nobody is kept out of the election.
func (c *checker) settled() {
	began := c.w.now()
	c.settle("the last fault")
	c.recovery = c.w.now() - began
	time.Sleep(c.w.s.TTL) // what a fault began may still end a term
	leads := c.settle("a TTL after the last fault")
	if leads == nil || !c.stays(leads, "without a fault") {
		return
	}
	r := c.w.random("settled")
	if !c.replaceAll(leads, r) {
		return
	}
	if c.deleteStandby(leads, r.IntN(Daemons)); !c.stays(leads, "a standby's key was deleted") {
		return
	}
	c.deleteLeader(leads)
	leads = c.settle("the leader's key was deleted")
	if leads == nil || c.w.s.TTL < 5*time.Second {
		return
	}
	m := 1 + r.IntN(3)
	without := []func(int) string{
		c.w.cluster.Pause, c.w.cluster.Stop, c.w.cluster.Isolate, c.w.cluster.Elect,
	}[r.IntN(4)](m)
	if !c.stays(leads, without) {
		return
	}
	again := c.w.daemons[r.IntN(Daemons)]
	again.stop()
	if !again.waitDown(4 * c.w.s.TTL) {
		c.report("%s: %s does not end", without, again.name)
	}
	again.start()
	c.settle(without + ", and a restart of " + again.name)
}

// replaceAll replaces the leader's elector, and those of all others. That moves no job, and changes
// no place in the queue.
func (c *checker) replaceAll(leads *job, r *rand.Rand) bool {
	before := c.w.queue()
	order := append([]int{before[0]}, r.Perm(Daemons)...)
	for _, i := range order {
		most := min(c.w.s.TTL*2/5, 300*time.Millisecond+time.Duration(r.Int64N(int64(c.w.s.TTL))))
		c.w.daemons[i].replace(time.Duration(r.Int64N(int64(most))))
		time.Sleep(time.Duration(r.Int64N(int64(c.w.s.TTL))))
	}
	if !c.stays(leads, "all electors were replaced") {
		return false
	}
	if after := c.w.queue(); !slices.Equal(before, after) {
		c.report("the queue was %v, and is %v when all electors were replaced", before, after)
		return false
	}
	return true
}

// deleteStandby deletes the key of a standby: it has to queue again.
func (c *checker) deleteStandby(leads *job, from int) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	d := c.w.daemons[from]
	if d == leads.d {
		d = c.w.daemons[(from+1)%Daemons]
	}
	c.w.note("oper", "deletes the key of %s, a standby", d.name)
	c.w.cluster.DeleteKey(keyOf(d.guard.lease))
}

// deleteLeader deletes the key of the leader. Its watch shows that at once; its next renewal would
// take up to a fifth of the TTL.
func (c *checker) deleteLeader(leads *job) {
	c.w.mu.Lock()
	c.w.note("oper", "deletes the key of %s, which leads", leads.d.name)
	c.did(leads.lease, true, keyDeleted)
	c.w.cluster.DeleteKey(leads.key)
	c.w.mu.Unlock()
	time.Sleep(50 * time.Millisecond)
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	if leads.alive() && !leads.killing {
		c.violation("%v is not killed at once when its key is deleted", leads)
	}
}

// settle waits until all daemons are in order, and returns the job that runs; nil: it takes too
// long.
func (c *checker) settle(after string) (leads *job) {
	atMost := 4*c.w.s.TTL + 20*time.Second
	var why string
	for end := c.w.now() + atMost; leads == nil; {
		if c.w.now() > end {
			c.report("%v after %s: %s", atMost, after, why)
			return nil
		}
		time.Sleep(100 * time.Millisecond)
		c.w.removeAbandoned()
		leads, why = c.order()
	}
	return leads
}

// stays reports whether the job runs on for some TTLs.
func (c *checker) stays(leads *job, although string) bool {
	time.Sleep(2 * c.w.s.TTL)
	now, why := c.order()
	if now != leads {
		c.report("%s: %v does not go on: %s", although, leads, why)
	}
	return now == leads
}

// order returns the job that runs if one candidate leads and all others wait, or why not.
func (c *checker) order() (leads *job, why string) {
	c.w.mu.Lock()
	defer c.w.mu.Unlock()
	var wrong []string
	for _, d := range c.w.daemons {
		if d.elector == nil {
			wrong = append(wrong, d.name+" does not run")
			continue
		}
		s := d.elector.candidate.Snapshot()
		if s.State == elect.Leading && d.job.runs() && leads == nil {
			leads = d.job
		} else if s.State != elect.Standby || s.Leader == nil || s.Blocker != nil {
			wrong = append(wrong, fmt.Sprintf("%s is %s %s", d.name, s.State, s.Reason))
		}
	}
	if leads == nil {
		wrong = append(wrong, "nobody leads")
	}
	if len(wrong) > 0 {
		return nil, strings.Join(wrong, ", ")
	}
	return leads, ""
}
