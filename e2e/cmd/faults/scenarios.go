//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

const (
	syncDelay = 400 * time.Millisecond // of each sync on a slow disk
	longPause = 8 * time.Second        // of a member of etcd
	// shortPause of etcd's leader is so much shorter than the TTL that a lease
	// which was to be renewed when it began has not expired when it ends.
	shortPause = 3 * time.Second
	// overBudget is for how long a member must be away so that a leader who
	// depends on it has lost contact by then, at TTL 5 s.
	overBudget = 5 * time.Second
	syncing    = "--unsafe-no-fsync=false"

	orphans    = 4000
	gigabytes  = 4
	memoryLeft = 400 // MiB: the kernel need kill nobody, and can't keep every program's pages
)

// noPeers have no such process.
var noPeers = []string{harness.StockLoop.Name, harness.EtcdctlLock.Name}

var three = etcd{Members: 3}

// scenarios is the table.
var scenarios = slices.Concat(
	daemonScenarios, jobScenarios, linkScenarios, etcdScenarios, operatorScenarios, machineScenarios)

// of gives a fault of the library its parameter.
func of[T any](f func(T) fault.Fault, with T) func() fault.Fault {
	return func() fault.Fault { return f(with) }
}

var daemonScenarios = []Scenario{
	{
		Name: "stop", Group: "daemon", About: "planned stop (SIGTERM)",
		Fault: fault.Stop, Isolation: EveryoneAlone, CI: true, User: true,
	},
	{
		Name: "guard-killed", Group: "daemon",
		About: "the daemon (of ours, the guard) is killed with SIGKILL",
		Fault: of(fault.Killed, harness.Guard), Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "guard-hung", Group: "daemon", About: "the daemon (of ours, the guard) hangs (SIGSTOP)",
		Fault: of(fault.Hung, harness.Guard), Isolation: OursAlone, User: true,
	},
	{
		Name: "guard-hung-unreachable", Group: "daemon",
		About: "the daemon (of ours, the guard) hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Guard), CI: true, User: true,
	},
	{
		Name: "elector-killed", Group: "daemon",
		About: "the elector, the guard's child, is killed with SIGKILL", Without: noPeers,
		Fault: of(fault.Killed, harness.Elector), Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "elector-hung", Group: "daemon", About: "the elector hangs (SIGSTOP)",
		Fault: of(fault.Hung, harness.Elector), Without: noPeers, User: true,
	},
	{
		Name: "elector-hung-unreachable", Group: "daemon",
		About: "the elector hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Elector), Without: noPeers,
	},
	{
		Name: "spawner-killed", Group: "daemon",
		About: "the spawner, between guard and job, is killed with SIGKILL", Without: noPeers,
		Fault: of(fault.Killed, harness.Spawner), Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "spawner-hung-unreachable", Group: "daemon",
		About: "the spawner hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Spawner), Without: noPeers, User: true,
	},
}

// jobScenarios are jobs that don't end as they should, at a planned stop and when
// the guard itself is killed.
var jobScenarios = slices.Concat(
	unruly("ignore-term", "ignores SIGTERM", "ignore-term", ", grace 0.5 s", ""),
	unruly("daemonize", "has forked twice and called setsid (daemonized)", "daemonize", "", "daemon"),
	unruly("fork-bomb", "is a fork bomb, ten chains at a time", "fork-bomb=10", "", ""),
	unruly("setsid-child", "leaves a child in a session of its own, which ignores SIGTERM",
		"setsid", "", "setsid"),
	[]Scenario{
		{
			Name: "gigabytes", Group: "job",
			About: "the job has 4 GB of memory to free; etcd becomes unreachable",
			Job: job{
				Words: []string{fmt.Sprintf("memory=%d", gigabytes)},
				Ready: waitForMemory, ByThreads: true,
			},
			Fault: unreachable, Isolation: EveryoneAlone,
		},
		{
			Name: "orphans", Group: "job", About: "the job has thousands of orphans and three fork " +
				"loops; etcd is unreachable and the deadline passes",
			Job: job{
				Words: []string{fmt.Sprintf("orphans=%d", orphans), "fork-bomb=3"},
				Ready: waitForOrphans, ByThreads: true,
			},
			Fault: unreachable, Check: timerLatency,
			Without: noPeers, Isolation: EveryoneAlone, CI: true,
		},
	})

// unruly are the two scenarios of a job. Where a stop is not obeyed, its grace is
// part of the figure.
func unruly(name, does, word, grace, role string) []Scenario {
	j := job{Words: []string{word}, Ready: waitForRole(role)}
	return []Scenario{
		{
			Name: name + "-stop", Group: "job",
			About: fmt.Sprintf("the job %s; planned stop%s", does, grace),
			Job:   j, Fault: fault.Stop, Isolation: OursAlone,
		},
		{
			Name: name + "-killed", Group: "job",
			About: fmt.Sprintf("the job %s; the guard is killed", does),
			Job:   j, Fault: of(fault.Killed, harness.Guard), Isolation: OursAlone,
			CI: name == "fork-bomb", User: true,
		},
	}
}

func unreachable() fault.Fault { return fault.Unreachable() }

// linkScenarios are faults of the links between the leader and etcd. The standby's
// are never touched.
var linkScenarios = []Scenario{
	{
		Name: "link-unreachable", Group: "link", About: "etcd is unreachable: every packet is lost",
		Etcd: three, Fault: unreachable, CI: true, User: true,
	},
	{
		Name: "link-one-way-out", Group: "link",
		About: "packets to etcd are lost, those from etcd arrive",
		Etcd:  three, Fault: func() fault.Fault { return fault.OutboundLost() },
	},
	{
		Name: "link-one-way-in", Group: "link",
		About: "packets from etcd are lost, those to etcd arrive",
		Etcd:  three, Fault: func() fault.Fault { return fault.InboundLost() }, CI: true,
	},
	{
		Name: "link-slow", Group: "link", About: "the link to etcd is slow: 200 ms longer each way",
		Etcd: three, Proxied: true, Expect: NoFailover,
		Fault: of(fault.Slow, 200*time.Millisecond), Duration: 6 * time.Second,
	},
	{
		Name: "link-lossy", Group: "link", About: "the link to etcd loses 30 % of the packets each " +
			"way, for 8 s; TCP may stall for longer than the budget",
		Etcd: three, Expect: MayFailover, Fault: lossy, Duration: 8 * time.Second,
	},
	{
		Name: "link-lossy-long", Group: "link", About: "the same for 20 s, with the default TTL",
		Etcd: three, TTL: 15 * time.Second, Expect: MayFailover,
		Fault: lossy, Duration: 20 * time.Second,
	},
	{
		Name: "link-flapping", Group: "link",
		About: "etcd is unreachable for a second and reachable for a second, five times",
		Etcd:  three, Expect: NoFailover, Duration: 9500 * time.Millisecond,
		Fault: func() fault.Fault { return fault.Flapping(time.Second) },
	},
}

func lossy() fault.Fault { return fault.Lossy(30) }

func deposing(f func(fault.Which) fault.Fault) func() fault.Fault {
	return func() fault.Fault { return fault.Deposing(f(fault.Leader)) }
}

// etcdScenarios are faults of etcd itself.
var etcdScenarios = []Scenario{
	{
		Name: "member-killed", Group: "etcd",
		About: "a member that follows is killed, and started again after 5 s",
		Etcd:  three, Expect: NoFailover,
		Fault: of(fault.MemberKilled, fault.Follower), Duration: overBudget,
	},
	{
		Name: "member-paused", Group: "etcd", About: "a member that follows hangs for 8 s (SIGSTOP)",
		Etcd: three, Expect: NoFailover, CI: true, User: true,
		Fault: of(fault.MemberPaused, fault.Follower), Duration: longPause - fault.Silence,
	},
	{
		Name: "member-cut", Group: "etcd",
		About: "a member that follows is cut off from everybody for 5 s",
		Etcd:  three, Expect: NoFailover,
		Fault: of(fault.MemberCut, fault.Follower), Duration: overBudget,
	},
	{
		Name: "etcd-leader-killed", Group: "etcd",
		About: "etcd's leader is killed, and started again after 5 s",
		Etcd:  three, Expect: NoFailover, CI: true, User: true,
		Fault: deposing(fault.MemberKilled), Duration: overBudget,
	},
	{
		Name: "etcd-leader-paused", Group: "etcd",
		About: "etcd's leader hangs for 3 s, less than the rest of any lease's TTL",
		Etcd:  three, Expect: NoFailover,
		Fault: of(fault.MemberPaused, fault.Leader), Duration: shortPause - fault.Silence,
	},
	{
		Name: "etcd-leader-paused-long", Group: "etcd",
		About: "etcd's leader hangs for 4.5 to 8 s, until leases have expired for it: when it wakes " +
			"it may revoke them though they are renewed elsewhere (etcd #15247)",
		Etcd: three, Expect: MayFailover, Promise: Outside,
		Duration: time.Millisecond, // the fault itself takes as long as it lasts
		Fault: func() fault.Fault {
			paused := fault.Deposing(fault.MemberPaused(fault.Leader))
			return fault.Lasting(paused, 4500*time.Millisecond-fault.Silence, longPause-fault.Silence)
		},
	},
	{
		Name: "etcd-leader-cut", Group: "etcd",
		About: "etcd's leader is cut off from everybody for 5 s",
		Etcd:  three, Expect: NoFailover, Fault: deposing(fault.MemberCut), Duration: overBudget,
	},
	{
		Name: "etcd-leader-isolated", Group: "etcd",
		About: "etcd's leader is cut off from the other members, but not from the candidates, for 5 s",
		Etcd:  three, Expect: NoFailover, Fault: deposing(fault.MemberIsolated), Duration: overBudget,
	},
	{
		Name: "etcd-leader-moved", Group: "etcd",
		About: "etcd's leadership is moved on five times, once a second (etcdctl move-leader)",
		Etcd:  three, Expect: NoFailover,
		Fault: func() fault.Fault { return fault.Repeated(fault.LeaderMoved(), 5, time.Second) },
	},
	{
		Name: "all-restarted", Group: "etcd",
		About: "all members are restarted, one after the other",
		Etcd:  three, Expect: NoFailover, Fault: fault.AllRestarted,
	},
	{
		Name: "all-restarted-at-once", Group: "etcd",
		About: "all members are killed at once, and started again",
		Etcd:  three, Expect: NoFailover, Fault: fault.AllRestartedAtOnce,
	},
	{
		Name: "quorum-lost", Group: "etcd",
		About: "two of three members are killed, and started again after 8 s",
		Etcd:  three, Fault: fault.QuorumLost, Duration: longPause, Check: noJobWithoutQuorum,
	},
	{
		Name: "stale-acknowledgement", Group: "etcd", About: "the leader reaches only one member, " +
			"etcd's leader, and that hangs for most of the leader's time",
		Etcd: three, Expect: MayFailover, Fault: of(fault.StaleAcknowledgement, fault.Rejoined),
	},
	{
		Name: "stale-acknowledgement-unreachable", Group: "etcd",
		About: "the same, and the member is unreachable as soon as it has woken",
		Etcd:  three, Fault: of(fault.StaleAcknowledgement, fault.CutOffAgain),
	},
	{
		Name: "stale-acknowledgement-isolated", Group: "etcd", About: "the same, and when it wakes it " +
			"can't hear that another leads, and acknowledges renewals for another second",
		Etcd: three, Fault: of(fault.StaleAcknowledgement, fault.Isolated),
	},
	{
		Name: "stale-acknowledgement-isolated-long", Group: "etcd", About: "the same with a long TTL",
		Etcd: three, TTL: 20 * time.Second, Fault: of(fault.StaleAcknowledgement, fault.Isolated),
	},
	{
		Name: "disk-slow", Group: "etcd", About: "the disk of one member is slow: 400 ms longer for " +
			"each sync, while keys are written",
		Etcd: etcd{Members: 3, Flags: syncing}, Expect: NoFailover,
		Fault: disksSlow(1), Duration: longPause,
	},
	{
		Name: "disks-slow", Group: "etcd", About: "the disks of all members are, so that etcd takes a " +
			"second and more for whatever it is asked",
		Etcd: etcd{Members: 3, Flags: syncing}, Expect: MayFailover,
		Fault: disksSlow(3), Duration: longPause,
	},
	{
		Name: "compaction", Group: "etcd", About: "all that has passed is compacted and each member " +
			"defragmented, while no watch is connected",
		Etcd: three, Proxied: true, Expect: NoFailover, Fault: fault.CompactedUnwatched,
	},
	{
		Name: "token-expiry", Group: "etcd", About: "auth tokens expire, one after the other",
		Etcd: etcd{Members: 3, Flags: "--auth-token-ttl=1", Auth: true}, TTL: 10 * time.Second,
		Expect: NoFailover, Fault: fault.TokensExpire,
	},
}

func disksSlow(members int) func() fault.Fault {
	return func() fault.Fault { return fault.DisksSlow(members, syncDelay) }
}

// operatorScenarios are what somebody does to the election by hand. Etcd hands the
// leadership on at once, and the old leader learns of it at the same moment as the
// next one: nobody can promise more than that it is quick.
var operatorScenarios = []Scenario{
	{
		Name: "lease-revoked", Group: "operator",
		About: "the leader's lease is revoked (etcdctl lease revoke)", Promise: Operator,
		Fault: fault.LeaseRevoked, Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "key-deleted", Group: "operator",
		About: "the leader's key is deleted (etcdctl del)", Promise: Operator,
		Fault: fault.KeyDeleted, Isolation: OursAlone, CI: true, User: true,
	},
}

// machineScenarios are faults of the whole machine.
var machineScenarios = []Scenario{
	{
		Name: "starved-cpu", Group: "machine",
		About: "64 busy loops on the machine, while etcd is unreachable and the deadline passes",
		Fault: unreachable, Isolation: ScenarioAlone, User: true,
		Stress: func(context.Context, *runner) (*fault.Stress, error) {
			return startStress(64, fault.BusyLoop...)
		},
	},
	{
		Name: "starved-memory", Group: "machine",
		About: "nearly all memory is taken while etcd is unreachable and the deadline passes",
		Fault: unreachable, Isolation: EveryoneAlone, Stress: takeMemory,
	},
	wallClock("wall-clock-forward", "is set an hour forward", time.Hour),
	wallClock("wall-clock-back", "is set an hour back", -time.Hour),
	{
		Name: "suspend", Group: "machine", About: "the leader's machine is suspended past its TTL and " +
			"resumed (all its processes frozen and thawed)",
		Promise: Outside, Job: job{ByThreads: true},
		Fault: fault.Suspended, Duration: untilNextJob, Isolation: OursAlone, CI: true,
	},
}

func wallClock(name, does string, by time.Duration) Scenario {
	return Scenario{
		Name: name, Group: "machine", About: "the leader's wall clock " + does,
		Without: []string{harness.EtcdctlLock.Name}, Expect: NoFailover,
		Fault:    func() fault.Fault { return fault.WallClockJumps(name, by) },
		Duration: 6 * time.Second,
	}
}

func startStress(n int, command ...string) (*fault.Stress, error) {
	cgroup, err := harness.NewCgroup(cgroupPrefix)
	if err != nil {
		return nil, err
	}
	return fault.StartStress(cgroup, n, command...)
}

func takeMemory(ctx context.Context, r *runner) (*fault.Stress, error) {
	s, err := startStress(1, r.programs.Testjob, fmt.Sprintf("leave=%d", memoryLeft))
	if err != nil {
		return nil, err
	}
	// A virtual machine may have to get its memory from its host first.
	const long = 10 * harness.WaitTimeout
	err = harness.Within(ctx, long, "memory is not full", func(ctx context.Context) error {
		return s.WaitFor(ctx, "full")
	})
	if err != nil {
		s.End()
	}
	return s, err
}

// waitForRole waits until the job has the descendant that it is to have.
func waitForRole(role string) func(context.Context, *Trial) error {
	if role == "" {
		return nil
	}
	return func(ctx context.Context, t *Trial) error {
		otherwise := "no process in the role " + role
		return harness.Within(ctx, harness.WaitTimeout, otherwise, func(ctx context.Context) error {
			return t.Witness.Wait(ctx, func(lives []harness.Life) bool {
				return slices.ContainsFunc(lives, func(l harness.Life) bool { return l.Role == role })
			})
		})
	}
}

// waitForOrphans waits until the orphans are there.
func waitForOrphans(ctx context.Context, t *Trial) error {
	const long = 3 * harness.WaitTimeout
	return harness.UntilWithin(ctx, long, "the job has too few orphans", func() error {
		spawner, err := t.Machine.Pid(harness.Spawner)
		if err != nil {
			return err
		}
		if n := len(harness.Children(spawner)); n < orphans {
			return fmt.Errorf("%d orphans", n)
		}
		return nil
	})
}

// timerLatency reads from the leader's log how late the guard served a deadline.
// The guard writes it when all orphans have been reaped. There is none where the
// elector's stop came first.
func timerLatency(ctx context.Context, t *Trial) error {
	const long = 3 * harness.WaitTimeout
	return harness.UntilWithin(ctx, long, "the leader's job has not ended", func() error {
		ended := func(e check.Entry) bool { return e.Match != "started" }
		if !slices.ContainsFunc(check.JobStates(t.Machine.Log()), ended) {
			return errors.New("its log does not say so")
		}
		if all := check.TimerLatencies(t.Machine.Log()); len(all) > 0 {
			t.Figure("timer latency", check.Latency(all))
		}
		return nil
	})
}

// waitForMemory waits until the job has touched all its memory.
func waitForMemory(ctx context.Context, t *Trial) error {
	const long = 3 * harness.WaitTimeout
	return harness.UntilWithin(ctx, long, "the job's memory is not touched", func() error {
		statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", t.Job.Pid))
		if err != nil {
			return err
		}
		resident, err := strconv.Atoi(strings.Fields(string(statm))[1])
		if err == nil && resident*os.Getpagesize() < gigabytes<<30 {
			err = fmt.Errorf("%d MiB are touched", resident*os.Getpagesize()>>20)
		}
		return err
	})
}

// noJobWithoutQuorum: that leasehold's job ended in time shows when its lease is
// taken by the time of the last renewal. Etcd itself could not have told it
// anything.
func noJobWithoutQuorum(_ context.Context, t *Trial) error {
	if !t.Of.Ours() {
		return nil
	}
	var end time.Duration
	for _, term := range t.history() {
		if term.Alive() {
			t.violated("a job of %s runs when etcd has had no quorum for %v",
				term.Candidate, harness.Now()-t.Began)
		}
		end = max(end, term.End)
	}
	if took := end - t.Began; took > t.TTL {
		t.violated("the job ended %v after etcd had lost its quorum, after the lease's end", took)
	}
	return nil
}
