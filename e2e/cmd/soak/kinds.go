//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// kind is a sort of fault, and how often it comes.
type kind struct {
	name   string
	weight int
	on     *target
	// from and to bound how long it lasts, in TTLs or in margins. 0: it is done at once.
	from, to  float64
	inMargins bool
	// fault makes the fault for what was hit, and tells the checker what it excuses.
	fault   func(x *executor, h *hit) fault.Fault
	details func(drawn) string // for the schedule; may be nil
}

var kinds = []kind{
	{name: "guard-killed", weight: 6, on: &aDaemon, fault: killed(harness.Guard)},
	{name: "elector-killed", weight: 6, on: &aDaemon, fault: killed(harness.Elector)},
	{name: "guard-hung", weight: 4, on: &aDaemon, from: 0.02, to: 1.2, fault: hung(harness.Guard)},
	{
		name: "elector-hung", weight: 4, on: &aDaemon, from: 0.02, to: 1.4,
		fault: hung(harness.Elector),
	},
	{name: "spawner-killed", weight: 4, on: &aDaemon, fault: killed(harness.Spawner)},
	{
		name: "spawner-hung", weight: 3, on: &aDaemon, from: 0.02, to: 1.4,
		fault: hung(harness.Spawner),
	},
	{
		name: "suspend-briefly", weight: 3, on: &aDaemon, from: 0.1, to: 0.8, inMargins: true,
		fault: suspended,
	},
	{name: "suspend", weight: 2, on: &aDaemon, from: 1, to: 1.5, fault: suspended},
	{name: "stop", weight: 5, on: &aDaemon, fault: just(fault.Stop)},
	{name: "stop-twice", weight: 2, on: &aDaemon, fault: just(fault.StopTwice)},
	{
		name: "link-unreachable", weight: 5, on: &aLink, from: 0.1, to: 1.6,
		fault: ofLinks(fault.Unreachable),
	},
	{
		name: "link-one-way-out", weight: 2, on: &aLink, from: 0.1, to: 1.6,
		fault: ofLinks(fault.OutboundLost),
	},
	{
		name: "link-one-way-in", weight: 2, on: &aLink, from: 0.1, to: 1.6,
		fault: ofLinks(fault.InboundLost),
	},
	{
		name: "link-lossy", weight: 3, on: &aLink, from: 0.3, to: 2,
		fault: func(x *executor, h *hit) fault.Fault {
			return fault.Lossy(h.loss, x.reached(h.drawn)...)
		},
		details: func(f drawn) string { return fmt.Sprintf(", %d %%", f.loss) },
	},
	{
		name: "link-flapping", weight: 3, on: &aLink, from: 0.5, to: 2,
		fault: func(x *executor, h *hit) fault.Fault {
			return fault.Flapping(h.period, x.reached(h.drawn)...)
		},
		details: func(f drawn) string { return fmt.Sprintf(", every %v", f.period) },
	},
	{
		name: "member-killed", weight: 4, on: &aMember, from: 0.1, to: 1.2,
		fault: ofMember(fault.MemberKilled),
	},
	{name: "member-paused", weight: 4, on: &aMember, from: 0.1, to: 1.5, fault: memberPaused},
	{
		name: "member-isolated", weight: 3, on: &aMember, from: 0.1, to: 1.2,
		fault: ofMember(fault.MemberIsolated),
	},
	{
		name: "members-killed", weight: 1, on: &allMembers, from: 0.05, to: 0.3,
		fault: func(_ *executor, h *hit) fault.Fault { return fault.MembersKilled(h.taken...) },
	},
	{
		name: "etcd-leader-moved", weight: 3, on: &etcdByOperator, fault: just(fault.LeaderMoved),
		details: func(f drawn) string { return " to " + memberName(f.index) },
	},
	{
		name: "compacted", weight: 3, on: &etcdByOperator,
		fault: func(_ *executor, h *hit) fault.Fault {
			if !h.defrag {
				h.on.Member = nil
			}
			return fault.Compacted()
		},
		details: func(f drawn) string {
			if !f.defrag {
				return ""
			}
			return ", and " + memberName(f.index) + " defragmented"
		},
	},
	{name: "key-deleted", weight: 4, on: &anElection, fault: just(fault.KeyDeleted)},
	{name: "lease-revoked", weight: 4, on: &anElection, fault: just(fault.LeaseRevoked)},
	{
		name: "cpu-starved", weight: 3, on: &theMachine, from: 0.3, to: 0.8, fault: cpuStarved,
		details: func(f drawn) string { return fmt.Sprintf(" by %d busy loops", f.loops) },
	},
}

// just is a fault of which the checker need not know.
func just(f func() fault.Fault) func(*executor, *hit) fault.Fault {
	return func(*executor, *hit) fault.Fault { return f() }
}

func killed(p harness.Process) func(*executor, *hit) fault.Fault {
	return func(x *executor, h *hit) fault.Fault {
		if p == harness.Guard {
			x.check.tell(func(e *excuses) { e.killed[h.candidate.name] = harness.Now() })
		}
		return fault.Killed(p)
	}
}

func hung(p harness.Process) func(*executor, *hit) fault.Fault {
	return func(x *executor, h *hit) fault.Fault {
		if p == harness.Guard {
			x.check.tell(func(e *excuses) { e.stopped[h.candidate.name] = harness.Now() })
		}
		return fault.Hung(p)
	}
}

// suspended has nothing start on the machine meanwhile: a fork in there would wait for the thaw.
func suspended(x *executor, h *hit) fault.Fault {
	f, c := fault.Suspended(), h.candidate
	freeze, thaw := f.Inject, f.Recover
	f.Inject = func(ctx context.Context, on *fault.Target) error {
		c.starting.Lock()
		defer x.check.tell(func(e *excuses) { e.freezes(c.name) })
		return freeze(ctx, on)
	}
	f.Recover = func(ctx context.Context, on *fault.Target) error {
		defer c.starting.Unlock()
		x.check.tell(func(e *excuses) { e.thaws(c.name) })
		return thaw(ctx, on)
	}
	return f
}

func ofLinks(f func(...*harness.Member) fault.Fault) func(*executor, *hit) fault.Fault {
	return func(x *executor, h *hit) fault.Fault { return f(x.reached(h.drawn)...) }
}

func ofMember(f func(fault.Which) fault.Fault) func(*executor, *hit) fault.Fault {
	return func(*executor, *hit) fault.Fault { return f(fault.Given) }
}

// memberPaused tells of leases that etcd's old leader may expire when it goes on, though they were
// renewed elsewhere (https://github.com/etcd-io/etcd/issues/15247). That is as if an operator had
// revoked them.
func memberPaused(x *executor, h *hit) fault.Fault {
	f := fault.MemberPaused(fault.Given)
	resume := f.Recover
	f.Recover = func(ctx context.Context, on *fault.Target) error {
		if h.led && h.lasts > x.ttl*7/10 {
			unreached := ""
			for _, m := range x.members {
				if m != h.member && m.away() {
					unreached = "etcd's other members were not all there"
				}
			}
			now := harness.Now()
			x.check.did(action{
				at: now, until: now + 3*time.Second, unreached: unreached,
				cause: fmt.Sprintf("a leader of etcd went on after a pause of %v", h.lasts),
			})
		}
		return resume(ctx, on)
	}
	return f
}

func cpuStarved(_ *executor, h *hit) fault.Fault {
	path := filepath.Join(os.Getenv(cgroupVariable), fmt.Sprintf("starved-%d", h.number))
	cgroup, err := harness.CgroupAt(path)
	if err != nil {
		return fault.Fault{Inject: func(context.Context, *fault.Target) error { return err }}
	}
	return fault.CPUStarved(cgroup, h.loops)
}
