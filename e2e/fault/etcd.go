//go:build linux

package fault

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

// Which says which member of etcd a fault is for.
type Which string

// The members. Which of the followers it is changes from trial to trial, so that
// those are hit that the candidates are connected to.
const (
	Given    Which = ""            // the target's
	Follower Which = "member"      // one that follows
	Leader   Which = "etcd-leader" // etcd's leader
)

func (w Which) name() string { return string(cmp.Or(w, Follower)) }

// choose sets the target's member.
func (w Which) choose(ctx context.Context, on *Target) error {
	if w == Given {
		return nil
	}
	leader, err := on.Etcd.Leader(ctx)
	if err != nil {
		return err
	}
	on.Member = leader
	if w == Follower {
		followers := on.Etcd.Except(leader)
		on.Member = followers[on.Trial%len(followers)]
	}
	on.Begin()
	return nil
}

// MemberKilled kills a member, and starts it again.
func MemberKilled(w Which) Fault {
	return Fault{
		Name: w.name() + "-killed",
		Inject: Step(w.choose).Then(func(_ context.Context, on *Target) error {
			on.Member.Kill()
			return nil
		}),
		Recover: func(_ context.Context, on *Target) error { return on.Member.Start() },
	}
}

// Silence is for how long Verify of MemberPaused listens.
const Silence = time.Second

// MemberPaused has a member hang (SIGSTOP): its connections stay.
func MemberPaused(w Which) Fault {
	return Fault{
		Name: w.name() + "-paused",
		Inject: Step(w.choose).Then(func(_ context.Context, on *Target) error {
			return on.Member.Pause()
		}),
		Recover: func(_ context.Context, on *Target) error { return on.Member.Continue() },
		Verify: func(ctx context.Context, on *Target) error {
			silent, cancel := context.WithTimeout(ctx, Silence)
			defer cancel()
			if _, err := on.Member.Metric(silent, "etcd_server_is_leader"); err == nil {
				return fmt.Errorf("etcd member %s answers, and should hang", on.Member.Name)
			}
			<-silent.Done()
			return ctx.Err()
		},
	}
}

// MemberCut cuts a member off from the others and from the candidates.
func MemberCut(w Which) Fault { return cutOff(w, w.name()+"-cut", (*Target).machines) }

// MemberIsolated cuts a member off from the others, but not from the candidates.
func MemberIsolated(w Which) Fault {
	none := func(*Target) []*harness.Machine { return nil }
	return cutOff(w, w.name()+"-isolated", none)
}

func cutOff(w Which, name string, also func(*Target) []*harness.Machine) Fault {
	var loss *harness.Loss
	return Fault{
		Name: name,
		Inject: Step(w.choose).Then(func(_ context.Context, on *Target) (err error) {
			others := on.Etcd.Nodes(on.Etcd.Except(on.Member)...)
			for _, m := range also(on) {
				others = append(others, m.Node)
			}
			loss, err = on.Network.Cut(harness.LinksBetween(on.Member.Node, others...)...)
			return err
		}),
		Recover: func(context.Context, *Target) error { return loss.End() },
		Verify:  dropped,
	}
}

// Deposing has a fault of etcd's leader last until etcd has another.
func Deposing(f Fault) Fault {
	f.Verify = f.Verify.Then(func(ctx context.Context, on *Target) error {
		ctx, cancel := context.WithTimeout(ctx, harness.WaitTimeout)
		defer cancel()
		_, err := on.Etcd.Successor(ctx, on.Member)
		return err
	})
	return f
}

// Repeated injects a fault that often, each time after a pause.
func Repeated(f Fault, times int, pause time.Duration) Fault {
	once := f.Inject
	f.Inject = func(ctx context.Context, on *Target) error {
		for range times {
			if err := harness.Wait(ctx, pause); err != nil {
				return err
			}
			if err := once(ctx, on); err != nil {
				return err
			}
		}
		return nil
	}
	return f
}

// LeaderMoved moves etcd's leadership to the target's member, or else to the next
// one, as `etcdctl move-leader` does.
func LeaderMoved() Fault {
	return Fault{Name: "etcd-leader-moved", Inject: func(ctx context.Context, on *Target) error {
		to := on.Member
		if to == nil {
			old, err := on.Etcd.Leader(ctx)
			if err != nil {
				return err
			}
			all := on.Etcd.Members
			to = all[(slices.Index(all, old)+1)%len(all)]
		}
		return on.Etcd.MoveLeader(ctx, to)
	}}
}

// AllRestarted restarts all members, one after the other.
func AllRestarted() Fault {
	return Fault{Name: "all-restarted", Inject: func(ctx context.Context, on *Target) error {
		for i := range on.Etcd.Members {
			m := on.Etcd.Members[(on.Trial+i)%len(on.Etcd.Members)]
			if err := m.Restart(ctx); err != nil {
				return err
			}
		}
		return nil
	}}
}

// MembersKilled kills some members at once, and starts them again.
func MembersKilled(members ...*harness.Member) Fault {
	return membersKilled("members-killed", func(*Target) []*harness.Member { return members })
}

// QuorumLost kills all members but one, and starts them again.
func QuorumLost() Fault {
	return membersKilled("quorum-lost", func(on *Target) []*harness.Member {
		return on.Etcd.Except(on.Etcd.Members[on.Trial%len(on.Etcd.Members)])
	})
}

// AllStopped is an outage of all of etcd.
func AllStopped() Fault {
	return membersKilled("all-stopped", func(on *Target) []*harness.Member {
		return on.Etcd.Members
	})
}

func membersKilled(name string, which func(*Target) []*harness.Member) Fault {
	return Fault{
		Name: name,
		Inject: func(_ context.Context, on *Target) error {
			for _, m := range which(on) {
				m.Kill()
			}
			return nil
		},
		Recover: func(_ context.Context, on *Target) error {
			var err error
			for _, m := range which(on) {
				err = errors.Join(err, m.Start())
			}
			return err
		},
	}
}

// AllRestartedAtOnce is an outage of all of etcd, shorter than the renewal budget:
// from a renewal that was due just then to stop-at.
func AllRestartedAtOnce() Fault {
	inject := func(ctx context.Context, on *Target) error {
		all := MembersKilled(on.Etcd.Members...)
		err := errors.Join(all.Inject(ctx, on), all.Recover(ctx, on))
		if err := errors.Join(err, on.Etcd.WaitHealthy(ctx)); err != nil {
			return err
		}
		outage := harness.Now() - on.Began
		on.Figure("outage", outage)
		if budget := on.TTL / 2; outage > budget {
			return fmt.Errorf("etcd was away for %v, and this fault is of up to %v", outage, budget)
		}
		return nil
	}
	return Fault{Name: "all-restarted-at-once", Inject: inject}
}

// Stray is the prefix of keys that belong to no election.
const Stray = "operator/"

// Compacted compacts what has passed, and defragments the target's member, if there is one.
func Compacted() Fault {
	return Fault{Name: "compacted", Inject: func(ctx context.Context, on *Target) error {
		got, err := on.Client.Get(ctx, Stray+"compaction")
		if err == nil {
			_, err = on.Client.Compact(ctx, got.Header.Revision)
		}
		if err == nil && on.Member != nil {
			_, err = on.Client.Defragment(ctx, on.Member.ClientURL)
		}
		return err
	}}
}

// CompactedUnwatched takes all watches' past away: their connections are closed,
// new ones hear nothing, and meanwhile etcd's revision goes on and what was before
// is compacted. The machines must have proxies.
func CompactedUnwatched() Fault {
	const key = Stray + "compaction"
	return Fault{Name: "compaction", Inject: func(ctx context.Context, on *Target) error {
		for _, m := range on.machines() {
			m.SetReachable(false)
			for _, p := range m.Proxies {
				p.Drop()
			}
		}
		var revisions []int64
		for range 21 {
			put, err := on.Client.Put(ctx, key, "")
			if err != nil {
				return err
			}
			revisions = append(revisions, put.Header.Revision)
		}
		_, err := on.Client.Compact(ctx, revisions[20], clientv3.WithCompactPhysical())
		for _, m := range on.Etcd.Members {
			if err == nil {
				_, err = on.Client.Defragment(ctx, m.ClientURL)
			}
		}
		if err != nil {
			return err
		}
		_, err = on.Client.Get(ctx, key, clientv3.WithRev(revisions[0]))
		if !errors.Is(err, rpctypes.ErrCompacted) {
			return fmt.Errorf("a read of the past gets %w, and it should be compacted", err)
		}
		on.Figure("compacted", harness.Now()-on.Began)
		for _, m := range on.machines() {
			m.SetReachable(true)
		}
		return nil
	}}
}
