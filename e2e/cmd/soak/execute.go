//go:build linux

package main

import (
	"cmp"
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

// injection is a fault of the schedule as it was carried out.
type injection struct {
	drawn
	check.Interval
	made      fault.Fault
	on        *fault.Target
	candidate *candidate        // nil unless it is for one
	members   []*harness.Member // that it is for, or to which the links are
	led       bool              // the member leads etcd
	victims   []any             // whom it keeps from hearing of things at once
	idle      bool              // it came to nothing
	calm      bool              // nothing else is wrong
}

// ends is when a fault that lasts is to end.
func (i *injection) ends() time.Duration { return i.From + i.lasts }

// execute carries a part of the schedule out and returns when the last fault is over. It takes one
// step at a time, so that faults that last overlap and steps do not.
func (r *run) execute(ctx context.Context, todo []drawn) error {
	defer r.busy.Wait()
	defer func() {
		for i := r.firstToEnd(); i != nil; i = r.firstToEnd() { // only after an error there are any
			_ = r.recover(ctx, i) // there is an error already
		}
	}()
	began := harness.Now() - todo[0].at
	r.faulted.From = cmp.Or(r.faulted.From, began+todo[0].at)
	for len(todo) > 0 || r.firstToEnd() != nil {
		begins, ends, first := check.Forever, check.Forever, r.firstToEnd()
		if len(todo) > 0 {
			begins = began + todo[0].at
		}
		if first != nil {
			ends = first.ends()
		}
		err := harness.Wait(ctx, min(begins, ends)-harness.Now())
		switch {
		case err != nil:
		case begins < ends:
			err = r.begin(ctx, todo[0])
			todo = todo[1:]
		default:
			err = r.recover(ctx, first)
		}
		if err != nil {
			return err
		}
	}
	r.busy.Wait()
	r.faulted.To = harness.Now()
	r.check.note("the last fault is over")
	return context.Cause(ctx)
}

// begin injects a fault.
func (r *run) begin(ctx context.Context, f drawn) error {
	now := harness.Now()
	i := &injection{
		drawn: f, Interval: check.Interval{From: now, To: now},
		on: &fault.Target{Testbed: r.Testbed, TTL: r.ttl, Trial: f.number},
	}
	r.injected = append(r.injected, i)
	if !r.choose(ctx, i) {
		r.idle(i, errors.New("there is nothing to hit"))
		return nil
	}
	if f.target == anElectionsFuture {
		r.steer(ctx, i)
		return nil
	}
	i.made = f.fault(r, i)
	if f.target == theCluster || f.target == anElection {
		r.operate(ctx, i)
		return nil
	}
	r.check.begins(i)
	ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
	defer cancel()
	switch err := i.made.Start(ctx, i.on); {
	case err != nil && f.target == aDaemon: // it has just ended
		r.idle(i, err)
		return i.made.End(ctx, i.on)
	case err != nil:
		return fmt.Errorf("fault %d, %s: %w", f.number, f.name, err)
	case f.lasts > 0:
		i.To = check.Forever
	}
	if i.losesElector() && r.implementation.Ours() && r.mustKeep(i) {
		r.check.keeps(i)
	}
	return nil
}

// recover ends a fault that has lasted long enough.
func (r *run) recover(ctx context.Context, i *injection) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), harness.WaitTimeout)
	defer cancel()
	err := i.made.End(ctx, i.on)
	i.To = harness.Now()
	r.check.note("  #%d is over: %v", i.number, i.drawn)
	return err
}

// idle notes a fault that came to nothing.
func (r *run) idle(i *injection, why error) {
	i.idle = true
	r.check.note("  #%d came to nothing: %v: %v", i.number, i.drawn, why)
}

// firstToEnd is the next of the faults that last, or nil.
func (r *run) firstToEnd() (first *injection) {
	for _, i := range r.injected {
		if i.To == check.Forever && (first == nil || i.ends() < first.ends()) {
			first = i
		}
	}
	return first
}

// choose finds what a fault is for. It reports whether there is anything to hit now.
func (r *run) choose(ctx context.Context, i *injection) bool {
	switch i.target {
	case aDaemon, aLink:
		leader := r.check.leading()
		c := pick(i, r.candidates,
			func(c *candidate) bool { return c.name == leader },
			func(c *candidate) bool {
				return i.target == aLink || !r.under(c, 0) && c.running() != nil
			})
		if c == nil {
			return false
		}
		i.candidate, i.whom, i.on.Machine, i.victims = c, c.name, c.machine, []any{c.machine}
		for _, m := range i.reach {
			i.members = append(i.members, r.Etcd.Members[m])
		}
		if i.target == aDaemon {
			d := c.running()
			if d == nil {
				return false
			}
			i.on.Machine, i.victims = d.Machine, []any{c}
		}
	case aMember:
		leader := r.etcdLeader(ctx)
		m := pick(i, r.Etcd.Members,
			func(m *harness.Member) bool { return m == leader },
			func(m *harness.Member) bool { return !r.under(m, 0) })
		if m == nil {
			return false
		}
		i.on.Member, i.whom, i.led, i.victims = m, m.Name, m == leader, []any{m}
		if i.led {
			i.whom += ", which leads"
		}
	case allMembers:
		for _, m := range r.Etcd.Members {
			if !r.under(m, 0) {
				i.members, i.victims = append(i.members, m), append(i.victims, m)
			}
		}
	case theCluster:
		i.on.Member = r.Etcd.Members[i.index]
	}
	return true
}

// pick finds the one that leads, if the fault is for that and it is free, or else the next free.
func pick[T any](of *injection, all []*T, leads, free func(*T) bool) (picked *T) {
	for i := range all {
		one := all[(of.index+i)%len(all)]
		if free(one) && (picked == nil || of.leader && leads(one)) {
			picked = one
		}
	}
	return picked
}

// under reports whether a fault keeps somebody from hearing of things at once, or did until less
// than that long ago. Without an elector a daemon hears of nothing.
func (r *run) under(victim any, since time.Duration) bool {
	after := harness.Now() - since
	return slices.ContainsFunc(r.injected, func(i *injection) bool {
		lasts := i.Length() > 0 || i.name == electorKilled
		return lasts && i.To > after && slices.Contains(i.victims, victim)
	})
}

// away reports whether one of the members is, or has been just now.
func (r *run) away(members []*harness.Member) bool {
	return slices.ContainsFunc(members, func(m *harness.Member) bool {
		return r.under(m, recovers)
	})
}

// etcdLeader asks all members at once; one that hangs does not answer.
func (r *run) etcdLeader(ctx context.Context) *harness.Member {
	ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	leads := make([]bool, memberCount)
	var asking sync.WaitGroup
	for i, m := range r.Etcd.Members {
		asking.Go(func() { leads[i] = m.Leads(ctx) })
	}
	asking.Wait()
	if i := slices.Index(leads, true); i >= 0 {
		return r.Etcd.Members[i]
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
func (r *run) operate(ctx context.Context, i *injection) {
	unreached := r.unreached()
	r.busy.Go(func() {
		ctx, cancel := context.WithTimeout(ctx, operatorWaits)
		defer cancel()
		var err error
		if i.target == anElection {
			err = r.takeTerm(ctx, i, unreached)
		} else {
			r.check.begins(i)
			err = i.made.Start(ctx, i.on)
		}
		if err != nil {
			r.idle(i, err)
		}
	})
}

// takeTerm takes the leadership from whoever leads, as an operator could. unreached says why some
// candidates may not hear of it at once.
func (r *run) takeTerm(ctx context.Context, i *injection, unreached map[string]string) error {
	first := append(clientv3.WithFirstCreate(), clientv3.WithPrefix())
	got, err := r.Client.Get(ctx, election+"/", first...)
	if err != nil {
		return err
	}
	if len(got.Kvs) == 0 {
		return errors.New("nobody leads")
	}
	key, now := got.Kvs[0], harness.Now()
	leader := string(key.Value)
	i.on.Leading = harness.Leading{Key: string(key.Key), Lease: clientv3.LeaseID(key.Lease)}
	i.whom = fmt.Sprintf("%s, token %d", leader, key.CreateRevision)
	r.check.begins(i)
	a := &action{
		at: now, until: now + operatorWaits + etcdWorks + r.ttl,
		token: key.CreateRevision, whom: leader, cause: i.name, unreached: unreached[leader],
	}
	r.check.did(a)
	if err := i.made.Start(ctx, i.on); err != nil {
		return err
	}
	r.check.worked(a)
	return nil
}

// unreached says of candidates why they may not hear at once of what etcd does.
func (r *run) unreached() map[string]string {
	why := map[string]string{}
	for _, c := range r.candidates {
		if r.away(r.Etcd.Members) {
			why[c.name] = "etcd's members were not all there"
		}
		if r.under(c, recovers) || r.under(c.machine, recovers) {
			why[c.name] = "its daemon or its links were under another fault"
		}
	}
	return why
}
