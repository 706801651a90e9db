//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// done is a fault as it was carried out.
type done struct {
	drawn
	check.Interval
}

// executor carries the schedule out, one step at a time in a single goroutine, so that faults that
// last overlap and steps do not.
type executor struct {
	*run
	ctx     context.Context
	pending []recovery
	busy    sync.WaitGroup // with what an operator does
}

// recovery is the end of a fault that lasts.
type recovery struct {
	at time.Duration
	do func() error
}

// hit is what a fault of the schedule is for.
type hit struct {
	drawn
	on        *fault.Target
	whom      string            // for the time line
	candidate *candidate        // nil unless it is for one
	member    *member           // the same
	led       bool              // the member leads etcd
	taken     []*harness.Member // those of a fault of several
	victims   []*victim         // those which the fault keeps from hearing of things at once
}

// target is what faults are for. Without choose they need nothing.
type target struct {
	members   bool // an index in the schedule is that of a member
	links     bool // to the members of the schedule
	takesTerm bool // from whoever leads; some of the faults wait for the end of all others
	mayVanish bool // before it is hit: it is a process
	// byOperator: an operator does it, who waits for etcd while other faults begin.
	byOperator bool
	name       func(index int) string // nil where it is for nobody in particular
	// choose completes the hit. It reports whether there is anything to hit now.
	choose func(x *executor, h *hit) bool
}

var (
	// One fault at a time is for a daemon's processes, or for a member of etcd.
	aDaemon        = target{name: candidateName, mayVanish: true, choose: chooseDaemon}
	aLink          = target{name: candidateName, links: true, choose: chooseLink}
	aMember        = target{name: memberName, members: true, choose: chooseMember}
	allMembers     = target{members: true, choose: chooseAllMembers}
	etcdByOperator = target{members: true, byOperator: true, choose: chooseByIndex}
	anElection     = target{takesTerm: true, byOperator: true}
	theMachine     = target{}
)

func chooseDaemon(x *executor, h *hit) bool {
	c := x.chooseCandidate(h.drawn, func(c *candidate) bool { return !c.hit() && c.running() != nil })
	if c == nil {
		return false
	}
	d := c.running()
	if d == nil {
		return false
	}
	h.candidate, h.whom, h.on.Machine = c, c.name, d.Machine
	h.victims = []*victim{&c.victim}
	return true
}

func chooseLink(x *executor, h *hit) bool {
	c := x.chooseCandidate(h.drawn, func(*candidate) bool { return true })
	h.candidate, h.whom, h.on.Machine = c, c.name, c.machine
	h.victims = []*victim{&c.links}
	return true
}

func chooseMember(x *executor, h *hit) bool {
	leader := x.etcdLeader()
	if h.leader && leader != nil && !leader.hit() {
		h.member = leader
	}
	for i := range x.members {
		if m := x.members[(h.index+i)%memberCount]; h.member == nil && !m.hit() {
			h.member = m
		}
	}
	if h.member == nil {
		return false
	}
	h.whom, h.on.Member, h.led = h.member.Name, h.member.Member, h.member == leader
	if h.led {
		h.whom += ", which leads"
	}
	h.victims = []*victim{&h.member.victim}
	return true
}

func chooseAllMembers(x *executor, h *hit) bool {
	for _, m := range x.members {
		if !m.hit() {
			h.taken, h.victims = append(h.taken, m.Member), append(h.victims, &m.victim)
		}
	}
	return true
}

func chooseByIndex(x *executor, h *hit) bool {
	h.on.Member = x.members[h.index].Member
	return true
}

// reached are the members whose links a fault is for.
func (x *executor) reached(f drawn) (members []*harness.Member) {
	for _, m := range f.reach {
		members = append(members, x.members[m].Member)
	}
	return members
}

// execute returns when the last fault is over.
func (r *run) execute(ctx context.Context) (err error) {
	x := &executor{run: r, ctx: ctx}
	defer x.busy.Wait()
	defer func() {
		for _, p := range x.pending { // only after an error there are any
			_ = p.do() // there is an error already
		}
	}()
	r.faulted.From = harness.Now()
	for i := 0; i < len(r.schedule) || len(x.pending) > 0; {
		next := check.Forever
		if i < len(r.schedule) {
			next = r.faulted.From + r.schedule[i].at
		}
		slices.SortStableFunc(x.pending, func(a, b recovery) int { return int(a.at - b.at) })
		recovers := len(x.pending) > 0 && x.pending[0].at <= next
		if recovers {
			next = x.pending[0].at
		}
		if err := harness.Wait(ctx, next-harness.Now()); err != nil {
			return err
		}
		if recovers {
			do := x.pending[0].do
			x.pending = x.pending[1:]
			err = do()
		} else {
			err = x.begin(r.schedule[i])
			i++
		}
		if err != nil {
			return err
		}
	}
	x.busy.Wait()
	r.faulted.To = harness.Now()
	r.check.note("the last fault is over")
	return context.Cause(ctx)
}

// begin injects a fault.
func (x *executor) begin(f drawn) error {
	now, n := harness.Now(), len(x.done)
	x.done = append(x.done, done{drawn: f, Interval: check.Interval{From: now, To: now}})
	h := &hit{drawn: f, on: &fault.Target{Testbed: x.Testbed, TTL: x.ttl, Trial: f.number}}
	switch {
	case f.on.choose != nil && !f.on.choose(x, h):
		x.idle(n, f, errors.New("there is nothing to hit"))
		return nil
	case f.on.byOperator:
		x.operate(n, h)
		return nil
	}
	x.check.note("#%d: %s", f.number, f.describe(h.whom))
	made := f.fault(x, h)
	ctx, cancel := context.WithTimeout(x.ctx, harness.WaitTimeout)
	defer cancel()
	switch err := made.Start(ctx, h.on); {
	case err != nil && f.on.mayVanish:
		x.idle(n, f, err)
		return made.End(ctx, h.on)
	case err != nil:
		return fmt.Errorf("fault %d, %s: %w", f.number, f.name, err)
	}
	if f.lasts > 0 {
		for _, v := range h.victims {
			v.begin()
		}
		x.pending = append(x.pending, recovery{now + f.lasts, func() error {
			return x.recover(n, h, made)
		}})
	}
	return nil
}

// recover ends a fault that has lasted long enough.
func (x *executor) recover(n int, h *hit, of fault.Fault) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(x.ctx), harness.WaitTimeout)
	defer cancel()
	err := of.End(ctx, h.on)
	for _, v := range h.victims {
		v.end()
	}
	x.done[n].To = harness.Now()
	x.check.note("  #%d is over: %s", h.number, h.describe(h.whom))
	return err
}

// idle notes a fault that came to nothing.
func (x *executor) idle(n int, f drawn, why error) {
	x.check.note("  #%d came to nothing: %s: %v", f.number, f.describe(""), why)
	x.check.tell(func(e *excuses) { e.idle[n] = true })
}

// chooseCandidate finds whom a fault is for.
func (x *executor) chooseCandidate(f drawn, free func(*candidate) bool) *candidate {
	if f.leader {
		leader := x.check.leading()
		for _, c := range x.candidates {
			if c.name == leader && free(c) {
				return c
			}
		}
	}
	for i := range x.candidates {
		if c := x.candidates[(f.index+i)%candidateCount]; free(c) {
			return c
		}
	}
	return nil
}

// etcdLeader asks all members at once; one that hangs does not answer.
func (x *executor) etcdLeader() *member {
	ctx, cancel := context.WithTimeout(x.ctx, 300*time.Millisecond)
	defer cancel()
	leads := make([]bool, memberCount)
	var asking sync.WaitGroup
	for i, m := range x.members {
		asking.Go(func() { leads[i] = m.Leads(ctx) })
	}
	asking.Wait()
	if i := slices.Index(leads, true); i >= 0 {
		return x.members[i]
	}
	return nil
}

const (
	operatorWaits = 2 * time.Second
	// etcdWorks is how long etcd may still work on a request that nobody waits for any more: five
	// seconds and two elections (its ServerConfig.ReqTimeout).
	etcdWorks = 7 * time.Second
)

// operate does what an operator would, who waits for etcd while other faults begin. That it does
// not work out in the middle of them is no error.
func (x *executor) operate(n int, h *hit) {
	inject := x.inject
	if h.drawn.on.takesTerm {
		unreached := x.unreached()
		inject = func(ctx context.Context, h *hit) error { return x.takeTerm(ctx, h, unreached) }
	} else {
		x.check.note("#%d: %s", h.number, h.describe(""))
	}
	x.busy.Go(func() {
		ctx, cancel := context.WithTimeout(x.ctx, operatorWaits)
		defer cancel()
		if err := inject(ctx, h); err != nil {
			x.idle(n, h.drawn, err)
		}
	})
}

func (x *executor) inject(ctx context.Context, h *hit) error {
	return h.fault(x, h).Start(ctx, h.on)
}

// takeTerm takes the leadership from whoever leads, as an operator could. unreached says why some
// candidates may not hear of it at once.
func (x *executor) takeTerm(ctx context.Context, h *hit, unreached map[string]string) error {
	first := append(clientv3.WithFirstCreate(), clientv3.WithPrefix())
	got, err := x.Client.Get(ctx, election+"/", first...)
	if err != nil {
		return err
	}
	if len(got.Kvs) == 0 {
		return errors.New("nobody leads")
	}
	key := got.Kvs[0]
	leader := string(key.Value)
	h.on.Leading = harness.Leading{Key: string(key.Key), Lease: clientv3.LeaseID(key.Lease)}
	whom := fmt.Sprintf("%s, token %d", leader, key.CreateRevision)
	x.check.note("#%d: %s", h.number, h.describe(whom))
	now := harness.Now()
	n := x.check.did(action{
		at: now, until: now + operatorWaits + etcdWorks + x.ttl,
		token: key.CreateRevision, cause: h.name, unreached: unreached[leader],
	})
	if err := x.inject(ctx, h); err != nil {
		return err
	}
	x.check.worked(n)
	return nil
}

// unreached says of candidates why they may not hear at once of what etcd does.
func (x *executor) unreached() map[string]string {
	why := map[string]string{}
	for _, c := range x.candidates {
		if slices.ContainsFunc(x.members, (*member).away) {
			why[c.name] = "etcd's members were not all there"
		}
		if c.away() || c.links.away() {
			why[c.name] = "its daemon or its links were under another fault"
		}
	}
	return why
}

// victim is what faults keep from hearing of things at once. The executor's goroutine alone
// touches it.
type victim struct {
	faults int           // that last
	last   time.Duration // when the last one ended
}

func (v *victim) begin() { v.faults++ }

func (v *victim) end() {
	v.faults--
	v.last = harness.Now()
}

func (v *victim) hit() bool { return v.faults > 0 }

// away reports whether a fault lasts, or has ended just now.
func (v *victim) away() bool {
	return v.hit() || v.last != 0 && harness.Now() < v.last+recovers
}
