/*
 * One machine: is its job gone before its lease is?
 *
 * These are steps 5 to 9 of docs/safety.md, the part of the protocol that is within one machine:
 * elector, guard and spawner, what is under way between them, and the job. Any one of the three
 * may crash or hang at any step, and one that hangs may go on at any step. etcd is nothing but the
 * time of the lease. As soon as the lease is gone, the job of another candidate may start.
 *
 * leasehold.pml has what is between machines, and assumes of each what this model shows.
 *
 * The job is its first process, and all others that descend from it. These are one bit, because
 * whoever kills does so until none is left. There is no cgroup, so they have to be found by
 * descent: a cgroup only adds to what a kill reaches. A process of the job may exit at any time.
 * So a kill matters only where time waits for it (see prompt), and in the proof that nothing is
 * left. That is why the elector's first SIGKILL of an overdue job is not here: it comes sooner, and
 * proves nothing. A second signal is the end of the grace.
 *
 * Time is in ticks of the machine's clock. TTL is what is left of the lease with the clock's drift
 * taken off. Between the processes there is one message of each kind at a time. That is enough: an
 * answer is awaited before the next start, and of two extensions the later one counts.
 *
 * A line that begins with @ is for the reader of a trace. tick is not part of the state.
 * Each switch (-DNO_KILL_BY) is in switches.tsv.
 */

#ifndef TTL
#define TTL	5
#endif
#ifndef MARGIN
#define MARGIN	2	/* from kill-by to the lease's end */
#endif
#ifndef LOSS
#define LOSS	1	/* loss grace: from stop-at to kill-by */
#endif

mtype = { up, hung, down };

/* The candidate's states, as in election/state.go. */
mtype = { connecting, leading, stopping };
/* The job as the guard has it (supervisor/guard/job.go): stopping, and */
mtype = { idle, forking, running, killing };
/* and as the elector has it (supervisor/job.go): running, stopping, and */
mtype = { none, starting, backoff, exited };

/* etcd */
bit lease;
byte left;	/* of it, as the elector knows it */
bit other;	/* the job of another candidate is alive */

/* The elector */
mtype elector = up;
mtype candidate = connecting;
mtype handle = none;
bit standsIn;	/* it kills in the place of the guard, which is lost */

/* From the elector to the guard */
bit askStart, askExtend, announced;
byte askUntil;	/* the lease's end that the message has */
byte askStop;	/* 1: stop, 2: kill at once */

/* The guard */
mtype guard = up;
mtype guardJob = idle;
byte until;	/* the lease's end, as the guard knows it */
bit unanswered;	/* the spawner has not yet reported the result of the start */
bit firstKnown;	/* the first process is known to live */
bit childless;	/* the spawner has reported that nothing of the job is left */
bit lostElector;	/* given up */
bit lostSpawner;	/* its end was seen */

/* From the guard to the elector */
bit reportsStarted, reportsExited, reportsGone;

/* To the spawner */
bit orderStart, orderKill;	/* by the guard */
bit orderClose;	/* by the elector: kill, and start nothing more */
bit cancelled;	/* in memory that guard and spawner share */

/* The spawner */
mtype spawner = up;
bit closed;	/* it starts nothing more */
bit kills;
bit owesGone;	/* to the guard, which has asked for a kill */
byte fork;	/* 1: the last check is made; 2: forked, the result of the exec is not yet known */
bit unreaped;	/* the first process has exited, and this is not reported yet */

/* From the spawner */
bit saysStarted, saysRefused, saysGone;
byte saysExited;	/* 1: others are left, 2: none is */
bit saysDone;	/* to the elector */

/* The job */
bit first, others;

/* The tick is only for replays (spin -DREPLAY -t). It is no part of a state. */
#ifdef REPLAY
hidden int tick;
#define oneTick	tick++
#else
#define tick	0
#define oneTick	skip
#endif

/*
 * For the question whether the job runs again (-DLIVE): at any moment all faults may come to an
 * end. What hangs then goes on hanging, except a guard whose elector has exited: nobody but systemd
 * watches that one. Time passes only when there is nothing else to do.
 */
#ifdef LIVE
bit calm;
#define faults	(!calm)
#define nothingElse	(!calm || timeout)
ltl again { [] (calm -> <> first) }
#else
#define faults	true
#define nothingElse	true
#endif

#define inTime(t)	((t) > MARGIN + LOSS)	/* before stop-at */
#define pastKillBy(t)	((t) <= MARGIN)
#define alive		(first || others)

/* Every change of a state. The table of those seen is no part of the state. */
#ifdef RECORD
c_decl {
\#include "transitions.h"
}
#define record(m, from, to)	c_code { saw(#m, #from, #to); }
#else
#define record(m, from, to)	skip
#endif
#define transit(m, variable, from, to) \
	assert(variable == from); \
	variable = to; \
	record(m, from, to)

/* Whether a search by descent finds the others. */
#if defined(ESCAPES)
#define found	false
#elif defined(NO_SUBREAPER)
#define found	(others && first)
#else
#define found	others
#endif

/* What a kill can reach. */
#ifdef FIRST_ONLY
#define visible	first
#else
#define visible	(first || found)
#endif

inline firstExits() {
	first = 0;
	unreaped = (spawner != down)
}

inline killAll() {
	if
	:: first -> firstExits()
	:: else
	fi;
#ifndef FIRST_ONLY
	if
	:: found -> others = 0
	:: else
	fi
#endif
}

/* The kernel kills the first process with the spawner, unless the job has cleared its death signal,
   which is not modelled. All others become children of the guard. */
inline spawnerEnds() {
	spawner = down; first = 0; unreaped = 0; fork = 0; kills = 0; closed = 0; owesGone = 0;
	orderStart = 0; orderKill = 0; orderClose = 0
}

/* Nobody else starts a job before that. */
inline endLease() {
	lease = 0; left = 0
}

inline revokeLease() {
#ifndef ONLY_JOBS
	assert(!alive);	/* never revoked before the job has exited */
#endif
	endLease()
}

/* ---- etcd, and the job of another candidate ---- */

proctype Etcd() {
end:	do
	:: d_step { lease && left == 0 ->
		printf("@ %d etcd drops the lease, which has expired\n", tick);
		endLease() }
	:: d_step { faults && !lease && !other ->
		printf("@ %d b.job starts\n", tick);
		assert(!alive);	/* never two jobs */
		other = 1 }
	:: d_step { other ->
		printf("@ %d b.job exits\n", tick);
		other = 0 }
	od
}

/* ---- the elector ---- */

#define handleAlive	(handle == starting || handle == running || handle == stopping)

/* The run is about to end, or to be ended. */
inline handleStops() {
	if
	:: handle == starting -> transit(handle, handle, starting, stopping)
	:: handle == running -> transit(handle, handle, running, stopping)
	:: handle == backoff -> transit(handle, handle, backoff, exited)
	:: else
	fi
}

/* It takes a silent guard for hung from a margin before kill-by on: before the kill-by that the
   guard knows, for it has answered pings until it hung. */
#define mustStandIn	(guard == down || guard == hung && handleAlive && \
	(until <= 2 * MARGIN || handle != running || !first))

/* The spawner has reported that nothing is left, or it has exited, and nothing more is found. */
#ifdef STAND_IN_UNPROVEN
#define provenByElector	true
#else
#define provenByElector	(saysDone || spawner == down && !first)
#endif

proctype Elector() {
end:	do
	:: d_step { elector == up && !standsIn && candidate == connecting && !lease && !other ->
		printf("@ %d a.elector has a lease, and leads\n", tick);
		lease = 1; left = TTL;
		transit(candidate, candidate, connecting, leading) }

	:: d_step { elector == up && !standsIn && candidate == leading && !handleAlive &&
		(faults || inTime(left)) &&
		!askStart && !reportsStarted && !reportsExited && !reportsGone ->
		printf("@ %d a.elector asks the guard for the job\n", tick);
		askStart = 1; askUntil = left;
		askExtend = 0; askStop = 0;	/* those of the job before do nothing any more */
		if
		:: handle == none -> transit(handle, handle, none, starting)
		:: handle == backoff -> transit(handle, handle, backoff, starting)
		:: handle == exited -> transit(handle, handle, exited, starting)
		fi }

	/* A renewal that counts. Those past stop-at only keep the next leader waiting. */
	:: d_step { elector == up && candidate != connecting && lease && inTime(left) && left < TTL ->
		printf("@ %d a.elector counts a renewal\n", tick);
		left = TTL;
		if
		:: handleAlive && !standsIn -> askExtend = 1; askUntil = left
		:: else
		fi }

	/* The term ends: a stop, stop-at has passed, or the lease or the key is lost. */
	:: d_step { elector == up && candidate == leading &&
		(faults || !lease || !inTime(left) || standsIn) ->
		printf("@ %d a.elector ends its term\n", tick);
		transit(candidate, candidate, leading, stopping);
		if
		:: handleAlive && !standsIn -> askStop = 1
		:: else
		fi;
		handleStops() }
	:: d_step { faults && elector == up && candidate == stopping && handleAlive && !standsIn &&
		askStop < 2 ->
		printf("@ %d a.elector asks for a kill at once\n", tick);
		askStop = 2 }

	/* The guard's messages */
	:: d_step { elector == up && !standsIn && reportsStarted ->
		reportsStarted = 0;
		if
		:: handle == starting -> transit(handle, handle, starting, running)
		:: else -> assert(handle == stopping)
		fi }
	:: d_step { elector == up && !standsIn && reportsExited && !reportsStarted ->
		reportsExited = 0;
		assert(handleAlive);
		handleStops() }
	:: d_step { elector == up && !standsIn && reportsGone && !reportsStarted && !reportsExited ->
		printf("@ %d a.elector learns that the job is gone\n", tick);
		reportsGone = 0;
		if
		:: handle == starting -> transit(handle, handle, starting, exited)
		:: handle == stopping -> transit(handle, handle, stopping, exited)
		fi }
	/* The job has exited by itself, and is to be started again. */
	:: d_step { elector == up && !standsIn && candidate == leading && handle == exited ->
		transit(handle, handle, exited, backoff) }

	/* Nothing of the job is left. */
	:: d_step { elector == up && candidate == stopping && !handleAlive ->
		printf("@ %d a.elector revokes its lease\n", tick);
		revokeLease();
		transit(candidate, candidate, stopping, connecting) }
	/* The planned end of the daemon, or its end because the guard is lost. */
	:: d_step { elector == up && candidate == connecting && !handleAlive && (faults || standsIn) ->
		printf("@ %d a.elector exits\n", tick);
		elector = down; announced = !standsIn }

#ifndef NO_STAND_IN
	/* The guard has exited, or hangs while it has something to do: to start the job, to follow the
	   exit of its first process, to kill. A margin before kill-by is soon enough. */
	:: d_step { elector == up && !standsIn && mustStandIn ->
		printf("@ %d a.elector learns that the guard is lost, and kills in its place\n", tick);
		standsIn = 1; orderClose = (spawner != down);
		if
		:: handleAlive -> handleStops()
		:: else
		fi }
#endif
	/* It kills what it finds by descent from the spawner, and then the guard. */
	:: d_step { elector == up && standsIn && spawner != down && visible ->
		printf("@ %d a.elector kills the job\n", tick);
		killAll() }
	:: d_step { elector == up && standsIn && provenByElector && (handleAlive || guard != down) ->
		printf("@ %d a.elector kills the guard\n", tick);
		guard = down;
		if
		:: handle == stopping -> transit(handle, handle, stopping, exited)
		:: else
		fi }
	od
}

/* ---- the guard ---- */

/* Begins the kill. */
inline beginKill() {
	if
	:: unanswered -> cancelled = 1
	:: else
	fi;
	if
	:: !childless && !lostSpawner && guardJob != idle && guardJob != killing -> orderKill = 1
	:: else
	fi;
	if
	:: guardJob == forking -> transit(guard, guardJob, forking, killing)
	:: guardJob == running -> transit(guard, guardJob, running, killing)
	:: guardJob == stopping -> transit(guard, guardJob, stopping, killing)
	:: else
	fi
}

inline beginStop() {
	if
	:: guardJob == forking -> transit(guard, guardJob, forking, stopping)
	:: guardJob == running -> transit(guard, guardJob, running, stopping)
	:: else
	fi
}

inline loseElector() {
	elector = down; lostElector = 1; standsIn = 0;
	beginKill()
}

#define canEnd	(guardJob == forking || guardJob == running || guardJob == stopping)

#ifdef REVIVES
#define mayExtend	(guardJob != idle)
#else
#define mayExtend	(guardJob != idle && inTime(until))
#endif

/* The proof that nothing of the job is left. */
#ifdef UNANSWERED_IS_GONE
#define answered	true
#else
#define answered	(!unanswered)
#endif
#ifdef EXIT_IS_GONE
#define proven	(answered && !firstKnown)
#else
#define proven	(answered && !firstKnown && (lostSpawner -> !(first || found) : childless))
#endif

#define finds	(visible && (spawner != down || lostSpawner))
#define mayExit	(elector == down && (lostElector || announced) && guardJob == idle)

proctype Guard() {
end:	do
	/* The elector's messages */
	:: d_step { guard == up && askStart && guardJob == idle && !lostElector && !lostSpawner ->
		printf("@ %d a.guard asks the spawner for the job\n", tick);
		askStart = 0; until = askUntil;
		unanswered = 1; childless = 0; cancelled = 0; firstKnown = 0;
		orderStart = 1;
		saysGone = 0; owesGone = 0;	/* of the job before */
		transit(guard, guardJob, idle, forking) }
	:: d_step { guard == up && askStart && (lostElector || lostSpawner) -> askStart = 0 }
	:: d_step { guard == up && askExtend && !askStart ->
		askExtend = 0;
		if
		:: mayExtend -> printf("@ %d a.guard extends the job's deadlines\n", tick);
			until = askUntil
		:: else
		fi }
	:: d_step { guard == up && askStop == 1 && !askStart && canEnd ->
		printf("@ %d a.guard sends the stop signal\n", tick);
		askStop = 0;
		beginStop() }
	:: d_step { guard == up && askStop == 2 && !askStart && canEnd ->
		printf("@ %d a.guard begins the kill: the lease is lost\n", tick);
		askStop = 0;
		beginKill() }
	:: d_step { guard == up && askStop && !askStart && !canEnd -> askStop = 0 }

	/* The user asks for the end of the daemon. The elector learns of it meanwhile. */
	:: d_step { faults && guard == up && (guardJob == forking || guardJob == running) ->
		printf("@ %d a.guard sends the stop signal: the daemon stops\n", tick);
		beginStop() }

	/* Its own clock */
	:: d_step { guard == up && (guardJob == forking || guardJob == running) && !inTime(until) ->
		printf("@ %d a.guard sends the stop signal: stop-at has passed\n", tick);
		beginStop() }
#ifndef NO_KILL_BY
	:: d_step { guard == up && canEnd && pastKillBy(until) ->
		printf("@ %d a.guard begins the kill: kill-by has passed\n", tick);
		beginKill() }
#endif
	/* The first process has exited, and the spawner does not report it. */
	:: d_step { guard == up && canEnd && firstKnown && !first && spawner != down ->
		printf("@ %d a.guard begins the kill: the first process has exited\n", tick);
		beginKill() }
	/* The grace is over, or a second signal came. */
	:: d_step { guard == up && canEnd && (faults || guardJob == stopping) ->
		printf("@ %d a.guard begins the kill: the grace is over\n", tick);
		beginKill() }

	/* The spawner's messages */
	:: d_step { guard == up && saysStarted ->
		printf("@ %d a.guard learns that the job has started\n", tick);
		saysStarted = 0; unanswered = 0; firstKnown = 1; reportsStarted = 1;
		if
		:: guardJob == forking -> transit(guard, guardJob, forking, running)
		:: else
		fi }
	:: d_step { guard == up && saysRefused ->
		printf("@ %d a.guard learns that the start was refused\n", tick);
		saysRefused = 0; unanswered = 0; childless = 1;
		if
		:: reportsExited = !cancelled
		fi;
		beginKill() }
	:: d_step { guard == up && saysExited && !saysStarted ->
		printf("@ %d a.guard learns that the first process has exited\n", tick);
		childless = (saysExited == 2); saysExited = 0; unanswered = 0; firstKnown = 0;
		reportsExited = 1;
		beginKill() }
	:: d_step { guard == up && saysGone && !saysStarted && !saysExited && !saysRefused ->
		saysGone = 0; childless = 1; unanswered = 0 }

	/* The kill */
	:: d_step { guard == up && guardJob == killing && finds ->
		printf("@ %d a.guard kills the job\n", tick);
		killAll() }
	:: d_step { guard == up && guardJob == killing && proven ->
		printf("@ %d a.guard has proof that nothing of the job is left\n", tick);
		reportsGone = 1; until = 0; childless = 0; orderKill = 0; unanswered = 0; cancelled = 0;
		transit(guard, guardJob, killing, idle) }

	/* The others */
#ifndef GUARD_IGNORES_ELECTOR
	:: d_step { guard == up && elector == down && !lostElector &&
		(!announced || guardJob != idle) ->
		printf("@ %d a.guard learns that the elector has exited\n", tick);
		loseElector() }
	:: d_step { guard == up && elector == hung && (guardJob == idle || pastKillBy(until)) ->
		printf("@ %d a.guard kills the elector, which is silent\n", tick);
		loseElector() }
#endif
#ifndef SPAWNER_HANG_IGNORED
	:: d_step { guard == up && spawner == hung && (orderStart || orderKill || unanswered ||
		guardJob == killing && !childless) ->
		printf("@ %d a.guard kills the spawner, which hangs\n", tick);
		spawnerEnds() }
#endif
#ifndef SPAWNER_EXIT_IGNORED
	:: d_step { guard == up && spawner == down && !lostSpawner && !saysStarted && !saysExited &&
		!saysRefused ->
		printf("@ %d a.guard learns that the spawner has exited\n", tick);
		lostSpawner = 1; unanswered = 0;
		if
		:: firstKnown -> firstKnown = 0; reportsExited = 1
		:: else
		fi;
		loseElector() }
#endif

	/* The end of a daemon whose elector has exited: the lease is revoked, if that succeeds. */
	:: d_step { guard == up && mayExit && lease ->
		printf("@ %d a.guard revokes the lease of the lost elector, and exits\n", tick);
		revokeLease();
		guard = down; spawnerEnds() }
	:: d_step { guard == up && mayExit ->
		printf("@ %d a.guard exits\n", tick);
		guard = down; spawnerEnds() }
	od
}

/* ---- the spawner ---- */

/* What the last check before the fork looks at. */
#ifdef STARTS_LATE
#define pastStopAt	false
#else
#define pastStopAt	(!inTime(until))
#endif
#ifdef STARTS_CANCELLED
#define isCancelled	false
#else
#define isCancelled	cancelled
#endif
#define tooLate	(closed || isCancelled || pastStopAt)

proctype Spawner() {
end:	do
	:: d_step { spawner == up && orderStart && fork == 0 && !kills ->
		orderStart = 0;
		if
		:: tooLate || first -> printf("@ %d a.spawner refuses the start\n", tick);
			saysRefused = 1
		:: else -> printf("@ %d a.spawner makes the last check\n", tick);
			fork = 1
		fi }
	:: d_step { spawner == up && fork == 1 ->
		printf("@ %d a.job starts\n", tick);
		assert(!other);	/* never two jobs */
		fork = 2; first = 1 }
	:: d_step { spawner == up && fork == 2 ->
		fork = 0; saysStarted = 1 }
	/* The command can't be executed. */
	:: d_step { faults && spawner == up && fork == 2 && !others ->
		fork = 0; first = 0; unreaped = 0; saysRefused = 1 }
	:: d_step { spawner == up && unreaped && fork == 0 ->
		unreaped = 0; saysExited = (found -> 1 : 2) }

	/* It is asked to kill. */
	:: d_step { spawner == up && orderKill && !orderStart && fork != 1 ->
		orderKill = 0; kills = 1; owesGone = 1 }
	:: d_step { spawner == up && orderClose && fork != 1 -> orderClose = 0; kills = 1; closed = 1 }
#ifndef GUARD_EXIT_IGNORED
	:: d_step { spawner == up && guard == down && !closed && fork != 1 ->
		printf("@ %d a.spawner learns that the guard has exited\n", tick);
		kills = 1; closed = 1 }
#endif
	:: d_step { spawner == up && kills && visible ->
		printf("@ %d a.spawner kills the job\n", tick);
		killAll() }
	/* Nothing is left. When the guard has exited too, the spawner exits. */
	:: d_step { spawner == up && (kills || closed && guard == down) && !first && !found &&
		!unreaped && fork == 0 ->
		kills = 0; saysDone = saysDone || closed;
		saysGone = owesGone; owesGone = 0;
		if
		:: guard == down -> spawnerEnds()
		:: else
		fi }
	od
}

/* ---- the job ---- */

proctype Job() {
end:	do
	:: d_step { faults && first && fork == 0 && !others ->
		printf("@ %d a.job forks\n", tick);
		others = 1 }
	:: d_step { (faults || guardJob == stopping) && first && fork == 0 ->
		printf("@ %d a.job first process exits\n", tick);
		firstExits() }
	:: d_step { faults && others -> others = 0 }
	od
}

/* ---- faults and time ---- */

/*
 * Time waits for a process that does not hang, but only where a delay could do harm: at kill-by for
 * the guard, and within the margin for whoever acts in the place of one that is lost. This is the
 * assumption that the kernel runs them, and carries out SIGKILL, within the margin.
 */
#ifdef NO_KILL_BY
#define guardKillsBy	false
#else
#define guardKillsBy	(canEnd && pastKillBy(until))
#endif
#ifdef SPAWNER_EXIT_IGNORED
#define guardSeesSpawner	false
#else
#define guardSeesSpawner	(spawner == down && !lostSpawner)
#endif
#ifdef SPAWNER_HANG_IGNORED
#define guardSeesHang	false
#else
#define guardSeesHang	(spawner == hung && guardJob == killing && (unanswered || !childless))
#endif
#ifdef NO_STAND_IN
#define electorStandsIn	false
#else
#define electorStandsIn	(mustStandIn && !standsIn)
#endif
#ifdef GUARD_EXIT_IGNORED
#define spawnerSeesGuard	false
#else
#define spawnerSeesGuard	(guard == down && !closed)
#endif

#define guardOwes	(guard == up && (guardKillsBy || guardJob == killing && finds))
#define guardOwesMore	(guard == up && guardJob != idle && (guardSeesSpawner || guardSeesHang))
#define electorOwes	(elector == up && (electorStandsIn || standsIn && spawner != down && visible))
#define spawnerOwes	(spawner == up && (orderStart || orderKill || orderClose || fork > 0 || \
	spawnerSeesGuard || kills && visible))

#ifdef KERNEL_LATE
#define prompt	true
#else
#define prompt	(!(pastKillBy(left) && guardOwes) && \
	!(left < MARGIN && (guardOwesMore || electorOwes || spawnerOwes)))
#endif

#define oneLess(t)	t = (t > 0 -> t - 1 : 0)

/*
 * Which of them may fail. A guard that the elector has given up counts as lost, even if it goes on.
 * With -DTWO_FAULTS the elector may also fail beside one of the others, before it or after it. Of
 * guard and spawner one has to live: see BOTH_KILLED.
 */
#ifdef ESCAPES	/* None of them fails: what the trace shows is the escape alone. */
#define allWell	false
#else
#define allWell	(elector == up && guard == up && spawner == up && !standsIn)
#endif
#ifdef TWO_FAULTS
#define electorFails	(elector == up && \
	(guard == down && spawner == up || guard == up && !standsIn))
#define guardCrashes	(guard == up && spawner == up && !standsIn)
#define spawnerFails	guardCrashes
#else
#define electorFails	allWell
#define guardCrashes	allWell
#define spawnerFails	allWell
#endif
#ifdef BOTH_KILLED	/* Guard and spawner may be killed at the same moment. */
#define spawnerCrashes	(elector == up && guard != hung && spawner == up && !standsIn)
#else
#define spawnerCrashes	spawnerFails
#endif

proctype World() {
end:	do
	:: d_step { nothingElse && prompt && left > 0 ->
		oneTick;
		oneLess(left);
		oneLess(until);
		oneLess(askUntil) }

	/* One of the three crashes or hangs, while the other two are well. */
	:: d_step { faults && electorFails ->
		printf("@ %d a.elector crashes\n", tick); elector = down }
	:: d_step { faults && guardCrashes ->
		printf("@ %d a.guard crashes\n", tick); guard = down }
	:: d_step { faults && spawnerCrashes ->
		printf("@ %d a.spawner crashes\n", tick); spawnerEnds() }
	:: d_step { faults && electorFails ->
		printf("@ %d a.elector hangs\n", tick); elector = hung }
	:: d_step { faults && allWell ->
		printf("@ %d a.guard hangs\n", tick); guard = hung }
	:: d_step { faults && spawnerFails ->
		printf("@ %d a.spawner hangs\n", tick); spawner = hung }
	/* One that hangs goes on. */
	:: d_step { faults && elector == hung ->
		printf("@ %d a.elector goes on\n", tick);
		elector = up }
	:: d_step { (faults || elector == down) && guard == hung ->
		printf("@ %d a.guard goes on\n", tick); guard = up }
	:: d_step { faults && spawner == hung ->
		printf("@ %d a.spawner goes on\n", tick);
		spawner = up }

#ifdef LIVE
	:: d_step { !calm -> calm = 1 }
#endif

	/* Whoever started the daemon starts it again. */
	:: d_step { elector == down && guard == down && spawner == down ->
		printf("@ %d world a's daemon starts again\n", tick);
		elector = up; guard = up; spawner = up;
		candidate = connecting; handle = none; standsIn = 0;
		askStart = 0; askExtend = 0; askUntil = 0; askStop = 0; announced = 0;
		guardJob = idle; until = 0; unanswered = 0; firstKnown = 0; childless = 0;
		lostElector = 0; lostSpawner = 0;
		reportsStarted = 0; reportsExited = 0; reportsGone = 0;
		orderStart = 0; orderKill = 0; orderClose = 0; cancelled = 0;
		saysStarted = 0; saysRefused = 0; saysGone = 0; saysExited = 0; saysDone = 0 }
	od
}

init {
	atomic {
		run World(); run Etcd(); run Elector(); run Guard(); run Spawner(); run Job()
	}
}
