//go:build linux

package main

import (
	"slices"
	"time"

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

	startAgain = 500 * time.Millisecond // after a kill, as a supervisor would

	heldFor     = 3 * time.Second       // a hold
	commandTime = 30 * time.Millisecond // a command needs about that
	// leavingTTL: a leader hands over to nobody that it has not seen for two TTLs.
	leavingTTL = 3 * time.Second

	memoryLeft = 400 // MiB: the kernel need kill nobody, and can't keep every program's pages
)

var (
	one     = etcd{Members: 1}
	three   = etcd{Members: 3}
	syncing = etcd{Members: 3, Flags: "--unsafe-no-fsync=false"}

	// noPeers have no such process.
	noPeers = []string{harness.NaiveClient.Name, harness.EtcdctlLock.Name}
)

// of gives a fault of the library its parameter.
func of[T any](f func(T) fault.Fault, with T) func() fault.Fault {
	return func() fault.Fault { return f(with) }
}

func deposing(f func(fault.Which) fault.Fault) func() fault.Fault {
	return func() fault.Fault { return fault.Deposing(f(fault.Leader)) }
}

func unreachable() fault.Fault { return fault.Unreachable() }

func lossy() fault.Fault { return fault.Lossy(30) }

// scenarios is the table.
var scenarios = withFreeze(slices.Concat(
	in("daemon", one, daemonScenarios...), in("job", one, jobScenarios...),
	in("link", three, linkScenarios...), in("etcd", three, etcdScenarios...),
	in("operator", one, operatorScenarios...), in("command", one, commandScenarios...),
	in("machine", one, machineScenarios...)))

var daemonScenarios = []Scenario{
	{
		Name: "stop", About: "planned stop (SIGTERM)",
		Fault: fault.Stop, Isolation: EveryoneAlone, CI: true, User: true,
	},
	{
		Name:  "switchover",
		About: "leasehold switchover to the next in line, from the start of the command on",
		Fault: fault.Switchover, Without: noPeers, Check: switched,
		Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "guard-killed", About: "the daemon (of ours, the guard) is killed with SIGKILL",
		Fault: of(fault.Killed, harness.Guard), Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "guard-hung", About: "the daemon (of ours, the guard) hangs (SIGSTOP)",
		Fault: of(fault.Hung, harness.Guard), Isolation: OursAlone, User: true,
	},
	{
		Name:  "guard-hung-unreachable",
		About: "the daemon (of ours, the guard) hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Guard), CI: true, User: true,
	},
	{
		Name: "elector-killed", About: "the elector, the guard's child, is killed with SIGKILL",
		Fault: of(fault.Killed, harness.Elector), Without: noPeers,
		Replaced: true, Expect: NoFailover, Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "elector-killed-tls-auth", About: "the same, with TLS, and with user and password",
		Fault: of(fault.Killed, harness.Elector), Without: noPeers,
		Etcd:     etcd{Members: 1, Auth: true, TLS: true},
		Replaced: true, Expect: NoFailover, Isolation: OursAlone,
	},
	{
		Name: "elector-killed-standby", About: "the elector of the standby is killed",
		Fault: of(fault.Killed, harness.Elector), Without: noPeers, Check: keptPlace,
		Standby: true, Replaced: true, Expect: NoFailover, User: true,
	},
	{
		Name: "elector-killed-stopping", About: "the elector is killed while a job that ignores " +
			"SIGTERM is stopped; planned stop, grace 0.5 s",
		Job:   job{Words: []string{"ignore-term"}},
		Fault: of(fault.StopElectorKilled, stopGrace/3), Without: noPeers, Check: stoppedInOrder,
		Isolation: OursAlone, User: true,
	},
	{
		Name: "elector-killed-unreachable", About: "the elector is killed, and etcd is unreachable",
		Fault: of(fault.KilledUnreachable, harness.Elector), Without: noPeers, Check: inBudget,
		User: true,
	},
	{
		Name: "elector-killed-thrice", About: "three electors of the daemon are killed, each as " +
			"soon as it has taken the place of the one before",
		Fault: of(fault.ElectorsKilled, 3), Without: noPeers, Check: gaveUp,
		Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "elector-hung", About: "the elector hangs (SIGSTOP)",
		Fault: of(fault.Hung, harness.Elector), Without: noPeers,
		Replaced: true, Expect: NoFailover, User: true,
	},
	{
		Name: "elector-hung-unreachable", About: "the elector hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Elector), Without: noPeers, Check: inBudget,
	},
	{
		Name: "elector-reloaded", About: "leasehold reload replaces the elector",
		Fault: fault.Reloaded, Without: noPeers,
		Replaced: true, Expect: NoFailover, CI: true, User: true,
	},
	{
		Name:  "spawner-killed",
		About: "the spawner, between guard and job, is killed with SIGKILL",
		Fault: of(fault.Killed, harness.Spawner), Without: noPeers,
		Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "spawner-hung-unreachable", About: "the spawner hangs, and etcd is unreachable",
		Fault: of(fault.HungUnreachable, harness.Spawner), Without: noPeers, User: true,
	},
	{
		Name: "all-killed", About: "the daemon with all its processes and the job are killed at " +
			"once; the daemon is started again after 0.5 s, with its state file",
		Fault: of(fault.AllKilledStarted, startAgain), Check: recovered,
		Isolation: OursAlone, User: true,
	},
}

// jobScenarios are jobs that don't end as they should, at a planned stop and when
// the guard itself is killed.
var jobScenarios = slices.Concat(
	unruly("ignore-term", "ignores SIGTERM", "ignore-term", ", grace 0.5 s", ""),
	unruly("daemonize", "has forked twice and called setsid (daemonized)",
		"daemonize", "", "daemon"),
	unruly("fork-bomb", "is a fork bomb, ten chains at a time", "fork-bomb=10", "", ""),
	unruly("setsid-child", "leaves a child in a session of its own, which ignores SIGTERM",
		"setsid", "", "setsid"),
	[]Scenario{
		{
			Name:  "gigabytes",
			About: "the job has 4 GB of memory to free; etcd becomes unreachable",
			Job:   job{Words: []string{"memory=4"}, Ready: hasTouched(4 << 30), ByThreads: true},
			Fault: unreachable, Isolation: EveryoneAlone,
		},
		{
			Name: "orphans", About: "the job has thousands of orphans and three fork " +
				"loops; etcd is unreachable and the deadline passes",
			Job: job{
				Words: []string{"orphans=4000", "fork-bomb=3"}, Ready: hasOrphans(4000),
				ByThreads: true,
			},
			Fault: unreachable, Check: timerLatency,
			Without: noPeers, Isolation: EveryoneAlone, CI: true,
		},
	})

// unruly are the two scenarios of a job. Where a stop is not obeyed, its grace is
// part of the figure.
func unruly(name, does, word, grace, role string) []Scenario {
	j := job{Words: []string{word}, Ready: hasRole(role)}
	return []Scenario{
		{
			Name: name + "-stop", About: "the job " + does + "; planned stop" + grace,
			Job: j, Fault: fault.Stop, Isolation: OursAlone,
		},
		{
			Name: name + "-killed", About: "the job " + does + "; the guard is killed",
			Job: j, Fault: of(fault.Killed, harness.Guard), Isolation: OursAlone,
			CI: name == "fork-bomb", User: true,
		},
	}
}

// linkScenarios are faults of the links between the leader and etcd. The standby's
// are never touched.
var linkScenarios = []Scenario{
	{
		Name: "link-unreachable", About: "etcd is unreachable: every packet is lost",
		Fault: unreachable, CI: true, User: true,
	},
	{
		Name: "link-one-way-out", About: "packets to etcd are lost, those from etcd arrive",
		Fault: func() fault.Fault { return fault.OutboundLost() },
	},
	{
		Name: "link-one-way-in", About: "packets from etcd are lost, those to etcd arrive",
		Fault: func() fault.Fault { return fault.InboundLost() }, CI: true,
	},
	{
		Name: "link-slow", About: "the link to etcd is slow: 200 ms longer each way",
		Fault: of(fault.Slow, 200*time.Millisecond), Duration: 6 * time.Second,
		Proxied: true, Expect: NoFailover,
	},
	{
		Name: "link-lossy", About: "the link to etcd loses 30 % of the packets each " +
			"way, for 8 s; TCP may stall for longer than the budget",
		Fault: lossy, Duration: 8 * time.Second, Expect: MayFailover,
	},
	{
		Name: "link-lossy-long", About: "the same for 20 s, with the default TTL",
		Fault: lossy, Duration: 20 * time.Second, TTL: 15 * time.Second, Expect: MayFailover,
	},
	{
		Name:  "link-flapping",
		About: "etcd is unreachable for a second and reachable for a second, five times",
		Fault: func() fault.Fault { return fault.Flapping(time.Second) }, Expect: NoFailover,
		Duration: 9500 * time.Millisecond,
	},
}

// etcdScenarios are faults of etcd itself.
var etcdScenarios = []Scenario{
	{
		Name:  "member-killed",
		About: "a member that follows is killed, and started again after 5 s",
		Fault: of(fault.MemberKilled, fault.Follower), Duration: overBudget, Expect: NoFailover,
	},
	{
		Name: "member-paused", About: "a member that follows hangs for 8 s (SIGSTOP)",
		Fault: of(fault.MemberPaused, fault.Follower), Duration: longPause - fault.Silence,
		Expect: NoFailover, CI: true, User: true,
	},
	{
		Name: "member-cut", About: "a member that follows is cut off from everybody for 5 s",
		Fault: of(fault.MemberCut, fault.Follower), Duration: overBudget, Expect: NoFailover,
	},
	{
		Name: "etcd-leader-killed", About: "etcd's leader is killed, and started again after 5 s",
		Fault: deposing(fault.MemberKilled), Duration: overBudget,
		Expect: NoFailover, CI: true, User: true,
	},
	{
		Name:  "etcd-leader-paused",
		About: "etcd's leader hangs for 3 s, less than the rest of any lease's TTL",
		Fault: of(fault.MemberPaused, fault.Leader), Duration: shortPause - fault.Silence,
		Expect: NoFailover,
	},
	{
		Name: "etcd-leader-paused-long",
		About: "etcd's leader hangs for 4.5 to 8 s, until leases have expired for it: " +
			"when it wakes it may revoke them though they are renewed elsewhere (etcd #15247)",
		Fault: deposing(fault.MemberPaused), Duration: 4500*time.Millisecond - fault.Silence,
		Longest: longPause - fault.Silence, Expect: MayFailover, Promise: Outside,
	},
	{
		Name: "etcd-leader-cut", About: "etcd's leader is cut off from everybody for 5 s",
		Fault: deposing(fault.MemberCut), Duration: overBudget, Expect: NoFailover,
	},
	{
		Name: "etcd-leader-isolated",
		About: "etcd's leader is cut off from the other members, but not from the candidates, " +
			"for 5 s",
		Fault: deposing(fault.MemberIsolated), Duration: overBudget, Expect: NoFailover,
	},
	{
		Name:   "etcd-leader-moved",
		About:  "etcd's leadership is moved on five times, once a second (etcdctl move-leader)",
		Fault:  func() fault.Fault { return fault.Repeated(fault.LeaderMoved(), 5, time.Second) },
		Expect: NoFailover,
	},
	{
		Name: "all-restarted", About: "all members are restarted, one after the other",
		Fault: fault.AllRestarted, Expect: NoFailover,
	},
	{
		Name: "all-restarted-at-once", About: "all members are killed at once, and started again",
		Fault: fault.AllRestartedAtOnce, Expect: NoFailover,
	},
	{
		Name: "quorum-lost", About: "two of three members are killed, and started again after 8 s",
		Fault: fault.QuorumLost, Duration: longPause, Check: noJobWithoutQuorum,
	},
	{
		Name: "all-stopped", About: "all members are killed, and started again after two TTLs",
		Fault: fault.AllStopped, Duration: 10 * time.Second,
	},
	{
		Name: "stale-acknowledgement", About: "the leader reaches only one member, " +
			"etcd's leader, and that hangs for most of the leader's time",
		Fault: of(fault.StaleAcknowledgement, fault.Rejoined), Expect: MayFailover,
	},
	{
		Name:  "stale-acknowledgement-unreachable",
		About: "the same, and the member is unreachable as soon as it has woken",
		Fault: of(fault.StaleAcknowledgement, fault.CutOffAgain),
	},
	{
		Name: "stale-acknowledgement-isolated", About: "the same, and when it wakes it " +
			"can't hear that another leads, and acknowledges renewals for another second",
		Fault: of(fault.StaleAcknowledgement, fault.Isolated),
	},
	{
		Name: "stale-acknowledgement-isolated-long", About: "the same with a long TTL",
		Fault: of(fault.StaleAcknowledgement, fault.Isolated), TTL: 20 * time.Second,
	},
	{
		Name: "disk-slow", About: "the disk of one member is slow: 400 ms longer for " +
			"each sync, while keys are written",
		Fault: func() fault.Fault { return fault.DisksSlow(1, syncDelay) }, Duration: longPause,
		Etcd: syncing, Expect: NoFailover,
	},
	{
		Name: "disks-slow", About: "the disks of all members are, so that etcd takes a " +
			"second and more for whatever it is asked",
		Fault: func() fault.Fault { return fault.DisksSlow(3, syncDelay) }, Duration: longPause,
		Etcd: syncing, Expect: MayFailover,
	},
	{
		Name: "compaction", About: "all that has passed is compacted and each member " +
			"defragmented, while no watch is connected",
		Fault: fault.CompactedUnwatched, Proxied: true, Expect: NoFailover,
	},
	{
		Name: "token-expiry", About: "auth tokens expire, one after the other",
		Fault: fault.TokensExpire, TTL: 10 * time.Second,
		Etcd: etcd{Members: 3, Flags: "--auth-token-ttl=1", Auth: true}, Expect: NoFailover,
	},
}

// operatorScenarios are what somebody does to the election by hand. Etcd hands the
// leadership on at once, and the old leader learns of it at the same moment as the
// next one: nobody can promise more than that it is quick.
var operatorScenarios = []Scenario{
	{
		Name: "lease-revoked", About: "the leader's lease is revoked (etcdctl lease revoke)",
		Fault: fault.LeaseRevoked, Promise: Operator, Isolation: OursAlone, CI: true, User: true,
	},
	{
		Name: "key-deleted", About: "the leader's key is deleted (etcdctl del)",
		Fault: fault.KeyDeleted, Promise: Operator, Isolation: OursAlone, CI: true, User: true,
	},
}

// while has a fault while a leader stops a job that does not stop by itself.
func while(stopping func(fault.Fault) fault.Fault, f func() fault.Fault) func() fault.Fault {
	return func() fault.Fault { return stopping(fault.Delayed(stopGrace/3, f())) }
}

func killed(p harness.Process) func() fault.Fault { return of(fault.Killed, p) }

// ofTarget has a fault of the candidate that is to lead next.
func ofTarget(f func() fault.Fault) func() fault.Fault {
	return func() fault.Fault { return fault.OfStandby(f()) }
}

// whileReleased is a hold in which the leader's guard is killed, and a fault during the release.
func whileReleased(releasing func() fault.Fault) func() fault.Fault {
	return func() fault.Fault {
		return fault.Held(fault.Killed(harness.Guard), fault.AtAnyTime(commandTime, releasing()))
	}
}

// stubborn is a job that takes all of its grace to stop.
var stubborn = job{Words: []string{"ignore-term"}}

// commandScenarios are commands by which an operator steers the election, and reasons for which a
// leader hands over by itself, each with a fault.
var commandScenarios = []Scenario{
	{
		Name: "switchover-elector-killed",
		About: "leasehold switchover, and the leader's elector is killed while a job that " +
			"ignores SIGTERM is stopped, grace 0.5 s",
		Job: stubborn, Fault: while(fault.SwitchedOver, killed(harness.Elector)),
		Without: noPeers, Check: switched, Isolation: OursAlone, User: true,
	},
	{
		Name: "switchover-guard-killed", About: "the same, and the leader's guard is killed",
		Job: stubborn, Fault: while(fault.SwitchedOver, killed(harness.Guard)),
		Without: noPeers, Check: switched, Isolation: OursAlone, User: true,
	},
	{
		Name: "switchover-target-killed",
		About: "the same, and the guard of the candidate that is to lead next is killed: the old " +
			"leader leads again",
		Job: stubborn, Fault: while(fault.SwitchedOver, ofTarget(killed(harness.Guard))),
		Without: noPeers, Isolation: OursAlone, User: true,
	},
	{
		Name:  "switchover-etcd-leader-killed",
		About: "the same, and etcd's leader is killed; it is started again at the end",
		Job:   stubborn, Etcd: three,
		Fault:   while(fault.SwitchedOver, of(fault.MemberKilled, fault.Leader)),
		Without: noPeers,
	},
	{
		Name: "hold-guard-killed", About: "leasehold hold, then the leader's guard is killed; " +
			"leasehold release after 3 s: nobody leads before",
		Fault: func() fault.Fault {
			return fault.Held(fault.Killed(harness.Guard), fault.Fault{})
		},
		Duration: heldFor, Without: noPeers, Check: notBeforeRelease,
		Isolation: OursAlone, User: true,
	},
	{
		Name: "hold-for-guard-killed", About: "leasehold hold --for 3s, then the leader's guard " +
			"is killed: nobody leads before the time is over",
		Fault: func() fault.Fault {
			return fault.HeldFor(heldFor, fault.Killed(harness.Guard))
		},
		Without: noPeers, Check: notBeforeHoldOver, User: true,
	},
	{
		Name: "hold-stop-elector-killed",
		About: "leasehold hold --stop, and the leader's elector is killed while a job that " +
			"ignores SIGTERM is stopped, grace 0.5 s; leasehold release after 3 s: nobody leads " +
			"before",
		Job: stubborn, Fault: while(fault.HeldStop, killed(harness.Elector)),
		Duration: heldFor, Without: noPeers, Check: notBeforeRelease, User: true,
	},
	{
		Name: "hold-stop-guard-killed", About: "the same, and the leader's guard is killed",
		Job: stubborn, Fault: while(fault.HeldStop, killed(harness.Guard)),
		Duration: heldFor, Without: noPeers, Check: notBeforeRelease, User: true,
	},
	{
		Name: "release-elector-killed",
		About: "leasehold hold, then the leader's guard is killed; leasehold release after 3 s, " +
			"and meanwhile the elector of the candidate that is to lead next is killed",
		Fault:    whileReleased(ofTarget(killed(harness.Elector))),
		Duration: heldFor, Without: noPeers, Check: notBeforeRelease, User: true,
	},
	{
		Name: "release-etcd-leader-killed",
		About: "the same, but etcd's leader is killed, and started again when the command " +
			"has ended",
		Etcd: three, Fault: whileReleased(of(fault.MemberKilled, fault.Leader)),
		Duration: heldFor, Without: noPeers, Check: notBeforeRelease,
	},
	{
		Name: "failback-target-killed", About: "the leader hands over to a candidate with a " +
			"higher priority, whose guard is killed while a job that ignores SIGTERM is stopped, " +
			"grace 0.5 s: the old leader leads again; from the leader's state stopping on",
		Job: stubborn, Fault: while(fault.FailedBack, ofTarget(killed(harness.Guard))),
		TTL: leavingTTL, Without: noPeers, User: true,
	},
	{
		Name:  "failback-target-elector-killed",
		About: "the same, and its elector is killed: it leads all the same",
		Job:   stubborn, Fault: while(fault.FailedBack, ofTarget(killed(harness.Elector))),
		TTL: leavingTTL, Without: noPeers, Check: switched, User: true,
	},
	{
		Name: "unfit-elector-killed", About: "the leader becomes unfit and hands over, and its " +
			"elector is killed while a job that ignores SIGTERM is stopped, grace 0.5 s; from " +
			"the leader's state stopping on",
		Job: stubborn, Fault: while(fault.Unfit, killed(harness.Elector)),
		TTL: leavingTTL, Without: noPeers, Check: switched, User: true,
	},
	{
		Name: "unfit-guard-killed", About: "the same, and the leader's guard is killed",
		Job: stubborn, Fault: while(fault.Unfit, killed(harness.Guard)),
		TTL: leavingTTL, Without: noPeers, Check: switched, User: true,
	},
}

// machineScenarios are faults of the whole machine.
var machineScenarios = []Scenario{
	{
		Name:  "starved-cpu",
		About: "64 busy loops on the machine, while etcd is unreachable and the deadline passes",
		Fault: unreachable, User: true,
		Stress: func(cgroup *harness.Cgroup, _ *harness.Programs) fault.Fault {
			return fault.CPUStarved(cgroup, 64)
		},
	},
	{
		Name:  "starved-memory",
		About: "nearly all memory is taken while etcd is unreachable and the deadline passes",
		Fault: unreachable, Isolation: EveryoneAlone,
		Stress: func(cgroup *harness.Cgroup, programs *harness.Programs) fault.Fault {
			return fault.MemoryTaken(cgroup, programs.Testjob, memoryLeft)
		},
	},
	wallClock("wall-clock-forward", "is set an hour forward", time.Hour),
	wallClock("wall-clock-back", "is set an hour back", -time.Hour),
	{
		Name: "suspend", About: "the leader's machine is suspended past its TTL and " +
			"resumed (all its processes frozen and thawed)",
		Fault: fault.Suspended, Duration: untilNextJob, Job: job{ByThreads: true},
		Promise: Outside, Isolation: OursAlone, CI: true,
	},
}

func wallClock(name, does string, by time.Duration) Scenario {
	return Scenario{
		Name: name, About: "the leader's wall clock " + does,
		Fault: of(fault.WallClockJumps, by), Duration: 6 * time.Second,
		Without: []string{harness.EtcdctlLock.Name}, Expect: NoFailover,
	}
}
