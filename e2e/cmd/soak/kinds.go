//go:build linux

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// kind is a sort of fault.
type kind struct {
	weight   int // how often it comes
	name     string
	target   target
	from, to float64 // for how many TTLs it lasts. 0: it is done at once
	fault    injector
	details  string // for the schedule, see drawn.String
}

// injector makes a fault for what was chosen.
type injector func(*run, *injection) fault.Fault

// target is what a fault is for.
type target int

const (
	aDaemon           target = iota // or one of its processes; one fault of these at a time
	aLink                           // of a candidate's machine to members of etcd
	aMember                         // of etcd; one fault of these at a time
	allMembers                      // that are under no fault yet
	theCluster                      // an operator does it
	anElection                      // an operator takes the term from whoever leads
	anElectionsFuture               // an operator says who may lead next: see steer.go
	theMachine                      // on which everything runs
)

// The checker looks for these by name.
const (
	guardKilled, guardHung     = "guard-killed", "guard-hung"
	electorKilled, electorHung = "elector-killed", "elector-hung"
	electorReloaded            = "elector-reloaded"
)

// Each has its weight, name, target, how long it lasts at least and at most, and what it does.
var kinds = []kind{
	{6, guardKilled, aDaemon, 0, 0, with(fault.Killed, harness.Guard), ""},
	{6, electorKilled, aDaemon, 0, 0, with(fault.Killed, harness.Elector), ""},
	{4, guardHung, aDaemon, 0.02, 1.2, with(fault.Hung, harness.Guard), ""},
	{4, electorHung, aDaemon, 0.02, 1.4, with(fault.Hung, harness.Elector), ""},
	{4, electorReloaded, aDaemon, 0.2, 0.5, reloaded, ""},
	{4, "spawner-killed", aDaemon, 0, 0, with(fault.Killed, harness.Spawner), ""},
	{3, "spawner-hung", aDaemon, 0.02, 1.4, with(fault.Hung, harness.Spawner), ""},
	{3, "all-killed", aDaemon, 0, 0, just(fault.AllKilled), ""},
	{3, "suspend-briefly", aDaemon, 0.01, 0.08, suspended, ""}, // for less than the margin
	{2, "suspend", aDaemon, 1, 1.5, suspended, ""},
	{5, "stop", aDaemon, 0, 0, just(fault.Stop), ""},
	{2, "stop-twice", aDaemon, 0, 0, just(fault.StopTwice), ""},
	{5, "link-unreachable", aLink, 0.1, 2, ofMembers(fault.Unreachable), ""},
	{2, "link-one-way-out", aLink, 0.1, 1.6, ofMembers(fault.OutboundLost), ""},
	{2, "link-one-way-in", aLink, 0.1, 1.6, ofMembers(fault.InboundLost), ""},
	{3, "link-lossy", aLink, 0.3, 2, lossy, ", LOSS %"},
	{3, "link-flapping", aLink, 0.5, 2, flapping, ", every PERIOD"},
	{4, "member-killed", aMember, 0.1, 1.2, with(fault.MemberKilled, fault.Given), ""},
	{4, "member-paused", aMember, 0.1, 1.5, memberPaused, ""},
	{3, "member-isolated", aMember, 0.1, 1.2, with(fault.MemberIsolated, fault.Given), ""},
	{1, "members-killed", allMembers, 0.05, 0.3, ofMembers(fault.MembersKilled), ""},
	{3, "members-killed-long", allMembers, 0.8, 1.5, ofMembers(fault.MembersKilled), ""},
	{3, "etcd-leader-moved", theCluster, 0, 0, just(fault.LeaderMoved), " to MEMBER"},
	{3, "compacted", theCluster, 0, 0, compacted, "DEFRAG"},
	{4, "key-deleted", anElection, 0, 0, just(fault.KeyDeleted), ""},
	{4, "lease-revoked", anElection, 0, 0, just(fault.LeaseRevoked), ""},
	{3, "cpu-starved", theMachine, 0.3, 0.8, cpuStarved, " by LOOPS busy loops"},
}

func just(f func() fault.Fault) injector {
	return func(*run, *injection) fault.Fault { return f() }
}

func with[T any](f func(T) fault.Fault, what T) injector {
	return func(*run, *injection) fault.Fault { return f(what) }
}

func ofMembers(f func(...*harness.Member) fault.Fault) injector {
	return func(_ *run, i *injection) fault.Fault { return f(i.members...) }
}

func lossy(_ *run, i *injection) fault.Fault { return fault.Lossy(i.loss, i.members...) }

func flapping(_ *run, i *injection) fault.Fault { return fault.Flapping(i.period, i.members...) }

func compacted(_ *run, i *injection) fault.Fault {
	if !i.defrag {
		i.on.Member = nil
	}
	return fault.Compacted()
}

// reloaded has the reload go on while the fault lasts, and then waits for its outcome. A daemon
// whose etcd does not answer, or that is at its end, refuses it.
func reloaded(r *run, i *injection) fault.Fault {
	f, ended := fault.Reloaded(), make(chan error, 1)
	reload := f.Inject
	f.Inject = func(ctx context.Context, on *fault.Target) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), i.lasts+operatorWaits)
		go func() {
			defer cancel()
			ended <- reload(ctx, on)
		}()
		return nil
	}
	f.Recover = func(context.Context, *fault.Target) error {
		if err := <-ended; err != nil {
			r.idle(i, err)
		}
		return nil
	}
	return f
}

// suspended has nothing start on the machine meanwhile: a fork in there would wait for the thaw.
func suspended(r *run, i *injection) fault.Fault {
	f, c := fault.Suspended(), i.candidate
	freeze, thaw := f.Inject, f.Recover
	f.Inject = func(ctx context.Context, on *fault.Target) error {
		c.starting.Lock()
		defer r.check.freezes(c.name)
		return freeze(ctx, on)
	}
	f.Recover = func(ctx context.Context, on *fault.Target) error {
		defer c.starting.Unlock()
		r.check.thaws(c.name)
		return thaw(ctx, on)
	}
	return f
}

// memberPaused tells of leases that etcd's old leader may expire when it goes on, though they were
// renewed elsewhere (https://github.com/etcd-io/etcd/issues/15247). That is as if an operator had
// revoked them.
func memberPaused(r *run, i *injection) fault.Fault {
	f := fault.MemberPaused(fault.Given)
	resume := f.Recover
	f.Recover = func(ctx context.Context, on *fault.Target) error {
		if i.led && i.lasts > r.ttl*7/10 {
			unreached := ""
			if r.away(r.Etcd.Except(on.Member)) {
				unreached = "etcd's other members were not all there"
			}
			now := harness.Now()
			r.check.did(&action{
				at: now, until: now + 3*time.Second, unreached: unreached,
				cause: fmt.Sprintf("a leader of etcd went on after a pause of %v", i.lasts),
			})
		}
		return resume(ctx, on)
	}
	return f
}

func cpuStarved(r *run, i *injection) fault.Fault {
	path := filepath.Join(r.cgroup.Path, fmt.Sprintf("starved-%d", i.number))
	cgroup, err := harness.CgroupAt(path)
	if err != nil {
		return fault.Fault{Inject: func(context.Context, *fault.Target) error { return err }}
	}
	return fault.CPUStarved(cgroup, i.loops)
}
