/*
 * One machine whose guard survives its elector: may a new elector go on with the old one's lease?
 *
 * If an elector exits or hangs, or is to be replaced by another binary, the guard kills it and
 * starts another. The new one adopts the lease, the key and the job, from a record that the guard
 * hands to it. Both electors may have requests under way to etcd, and messages to the guard.
 *
 * machines.pml has the processes of a machine, and leasehold.pml has etcd and the queue. Of both
 * there is here what a replacement touches. The spawner does not hang, and the guard and the
 * spawner do not fail at the same moment: machines.pml has that.
 *
 * Nothing has to happen: see leasehold.pml. Only time waits, for kills that are due. The guard may
 * replace an elector at any time, also one that is well: that is a reload. The process that checks
 * a reload only renews the lease, and reads. So it is not here: see below for its renewal. The
 * guard may also give up at any time: it kills the job, and has the lease revoked. So replacements
 * are not counted.
 *
 * What is one step here, and why nothing is lost by that:
 * - Joining, with a lease and a key. An elector that was killed on its way leaves a lease that
 *   nobody knows to have a key. The next elector revokes it: it has no job.
 * - The read that verifies a win, or confirms a renewal, and what follows from it.
 * - A renewal that comes late or twice is the same, whoever sent it: it renews the lease.
 *
 * An elector is in place 0. Place 1 is empty, unless a switch lets the old one go on.
 *
 * Time is in ticks. A line that begins with @ is for the reader of a trace.
 * Each switch (-DRECORD_EARLY) is in switches.tsv.
 */

#ifndef TTL
#define TTL	4
#endif
#ifndef MARGIN
#define MARGIN	2	/* from kill-by to the lease's end */
#endif
#ifndef LOSS
#define LOSS	0	/* loss grace: from stop-at to kill-by */
#endif

#if defined(OLD_LIVES) || defined(LATE_START)
#define PLACES	2
#else
#define PLACES	1
#endif

/* A process. An elector that is new waits for its record. */
mtype = { down, new, up, hung };

/* What an elector does. */
mtype = { out, waiting, term, ending, leaving };

/* The job as the guard has it */
mtype = { idle, alive, stopping, killing };

/* A renewal */
#define IDLE	0
#define SENT	1
#define ACKED	2	/* etcd has renewed the lease; a read has to confirm that */

/* etcd */
bit lease;
byte remains;	/* of it */
bit revoke;	/* a request to revoke it, or to delete the key, is under way */

/* Another candidate */
bit bLease, bJob;
bit bFirst;	/* its key is older than our newest one */
bit bLed;	/* it has started a job since our key was made, so its token is higher */

/* The electors */
mtype elector[PLACES] = down;
mtype does[PLACES] = out;
byte left[PLACES];	/* until the lease's end, as the elector knows it */
byte renewal[PLACES];
byte worth[PLACES];	/* for how long the lease holds if the renewal counts */
bit hasJob[PLACES];	/* it has asked for the job, and does not know it to be gone */
bit knowsExit[PLACES];	/* the job has exited in this term */
bit knowsStop[PLACES];	/* the daemon has to stop */

/* From an elector to the guard */
bit askStart[PLACES], askExtend[PLACES];
byte askUntil[PLACES];
byte askStop[PLACES];	/* 1: stop, 2: kill at once */
bit saysLeaving[PLACES];	/* it is going to revoke its lease */

/* From the guard to the elector in place 0 */
bit tellGone, tellStop;
bit goneFirst;	/* both are on the way, and tellGone was sent first */

/* The guard */
mtype guard = down;
mtype job = idle;
byte until;	/* the lease's end, as the guard knows it */
bit gaveUp;	/* it does not replace the elector any more */
bit exiting;	/* the elector has announced its exit */
/* and what it hands on in the record, besides the job's state and deadlines: */
bit knowsLease;	/* the lease's id */
bit announced;	/* the release of that lease was announced */
bit exitKnown;	/* how the job has exited in this term */
bit stop;	/* the user has asked for the end of the daemon */

#ifdef RECORD_EARLY
bit early;	/* a record was made, for an elector that was started beside the old one */
mtype earlyJob = idle;
bit earlyAnnounced, earlyExit, earlyLease;
byte earlyUntil;
#endif

/* The process in place 0 as the guard has it. From its record on it runs. */
#ifdef RECORD
mtype = { starting, running, gone };
mtype process = starting;
c_decl {
\#include "transitions.h"
}
#define record(from, to)	c_code { saw("elector", #from, #to); }
#define becomes(to) \
	if \
	:: process == starting && to != starting -> record(starting, to) \
	:: process == running -> record(running, to) \
	:: process == ending && to != ending -> record(ending, to) \
	:: else \
	fi; \
	process = to
#define first(state)	process = state
#else
#define becomes(to)	skip
#define first(state)	skip
#endif

/* The spawner and the job */
bit fork;	/* the spawner is asked to start it */
bit runs;

/* Of etcd's leaders: another one was elected, and the former one may still answer. */
#ifdef ADOPTS_UNCONFIRMED
bit former;
#else
#define former	false
#endif

/* No renewal of the elector that adopts has counted yet. */
#if defined(ADOPTS_UNCONFIRMED) || defined(ADOPTION_COUNTS) || defined(STANDS_IN_LATER)
bit adopts;
#define setAdopts(to)	adopts = to
#else
#define adopts	false
#define setAdopts(to)	skip
#endif

#ifdef REPLAY
hidden int tick;
#define oneTick	tick++
#else
#define tick	0
#define oneTick	skip
#endif

/*
 * For the question whether the job runs again (-DLIVE): at any moment all faults may come to an
 * end. Then time passes only when there is nothing else to do. A daemon that has exited is started
 * again.
 */
#ifdef LIVE
bit calm;
#define faults	(!calm)
#define nothingElse	(!calm || timeout)
ltl again { [] (calm -> <> (runs && !stop)) }
#else
#define faults	true
#define nothingElse	true
#endif

#define inTime(t)	((t) > MARGIN + LOSS)	/* before stop-at */
#define pastKillBy(t)	((t) <= MARGIN)
#define isFirst	(lease && (!bLease || !bFirst))
#define someJob	(runs || fork)

inline who(e) {
	if
	:: e == 0 -> printf("@ %d a.elector ", tick)
	:: else -> printf("@ %d a.replaced ", tick)
	fi
}

inline endLease() {
	lease = 0; remains = 0; revoke = 0
}

/* ---- etcd, and the other candidate ---- */

proctype Etcd() {
end:	do
	:: d_step { lease && remains == 0 ->
		printf("@ %d etcd drops the lease, which has expired\n", tick);
		endLease() }
	:: d_step { revoke && lease ->
		printf("@ %d etcd revokes the lease\n", tick);
#ifndef ONLY_JOBS
		assert(!someJob);	/* never revoked before the job has exited */
#endif
		endLease() }
	:: d_step { revoke && faults -> revoke = 0 }
	/* A renewal comes late, or twice. */
	:: d_step { faults && lease && remains < TTL -> remains = TTL }
#ifdef ADOPTS_UNCONFIRMED
	:: d_step { faults && !former ->
		printf("@ %d etcd elects a new leader\n", tick);
		former = 1 }
#endif

	/* The other candidate. It gives up its lease only when its job has exited. */
	:: d_step { faults && !bLease ->
		printf("@ %d b.elector gets a lease, and is in the queue\n", tick);
		bLease = 1; bFirst = 0 }
	:: d_step { faults && bLease && !bJob && (bFirst || !lease) ->
		printf("@ %d b.job starts\n", tick);
		assert(!runs);	/* never two jobs */
		bJob = 1; bLed = bLed || !bFirst }
	:: d_step { bLease && (faults || bFirst) ->
		if
		:: bJob -> printf("@ %d b.job exits\n", tick)
		:: else
		fi;
		printf("@ %d b.elector revokes its lease\n", tick);
		bJob = 0; bLease = 0; bFirst = 0 }
	od
}

/* ---- the electors ---- */

/* How long the lease holds, when a renewal counts. */
#ifdef ADOPTION_COUNTS
#define holds(e)	(adopts -> TTL : worth[e])
#else
#define holds(e)	worth[e]
#endif

inline count(e) {
	who(e); printf("counts the renewal: the lease holds for %d ticks\n", holds(e));
	if
	:: holds(e) > left[e] -> left[e] = holds(e)
	:: else
	fi;
	if
	:: does[e] == term && hasJob[e] -> askExtend[e] = 1; askUntil[e] = left[e]
	:: else
	fi;
	renewal[e] = IDLE; worth[e] = 0;
	setAdopts(0)
}

/* Past stop-at nothing revives a term. A standby has none. */
#define mayCount(e)	(does[e] == waiting || inTime(left[e]))
#define renews(e)	(does[e] == waiting || does[e] == term || does[e] == ending)

/* It gives the lease up. First it says so to the guard. */
inline leave(e) {
	does[e] = leaving; left[e] = 0; renewal[e] = IDLE; worth[e] = 0;
#ifndef ANNOUNCED_LATE
	saysLeaving[e] = 1
#endif
}

#define noMessages(e)	(!askStart[e] && !askExtend[e] && !askStop[e] && !saysLeaving[e])
#define messagesRead(e)	(guard == down || noMessages(e) && (e != 0 || !tellGone))

/* The guard is gone, or hangs when it should have killed the job. */
#ifdef STANDS_IN_LATER
#define watches(e)	(!adopts)
#else
#define watches(e)	true
#endif
#define standsIn(e)	(guard == down && (does[e] == term || hasJob[e]))
#define mustStandIn(e)	(guard == hung && someJob && until < MARGIN && watches(e))

proctype Elector(byte e) {
end:	do
	:: d_step { elector[e] == up && guard != down && does[e] == out && !lease && !knowsStop[e] &&
		messagesRead(e) ->
		who(e); printf("has a lease, and is in the queue\n");
		lease = 1; remains = TTL; bFirst = bLease; bLed = 0;
		does[e] = waiting; left[e] = TTL; knowsExit[e] = 0;
		knowsLease = 1; announced = 0; exitKnown = 0 }

	/* A renewal */
	:: d_step { elector[e] == up && renews(e) && renewal[e] == IDLE && left[e] < TTL &&
		mayCount(e) && (lease || former && adopts) ->
		who(e); printf("sends a renewal\n");
		renewal[e] = SENT; worth[e] = TTL }
	:: d_step { renewal[e] == SENT && lease ->
		printf("@ %d etcd renews the lease\n", tick);
		renewal[e] = ACKED; remains = TTL }
	:: d_step { elector[e] == up && renewal[e] == ACKED && lease && mayCount(e) ->
		printf("@ %d etcd answers a: its key is there, in the same raft term\n", tick);
		count(e) }
	:: d_step { elector[e] == up && renewal[e] != IDLE && (faults || !lease || !mayCount(e)) ->
		renewal[e] = IDLE; worth[e] = 0 }
#ifdef ADOPTS_UNCONFIRMED
	:: d_step { elector[e] == up && renewal[e] == SENT && former && adopts && mayCount(e) ->
		printf("@ %d etcd acknowledges the renewal, by a former leader\n", tick);
		count(e) }
#endif

	/* The lease is gone. */
	:: d_step { elector[e] == up && !lease && (does[e] == waiting || does[e] == term ||
		does[e] == ending && hasJob[e] && askStop[e] < 2 && job != killing && !tellGone &&
		guard != down) ->
		who(e); printf("learns that its lease is gone\n");
		if
		:: does[e] == waiting -> leave(e)
		:: does[e] != waiting && hasJob[e] -> does[e] = ending; askStop[e] = 2
		:: else -> does[e] = ending
		fi }

	/* A read shows that no key is older, and confirms the last renewal. */
	:: d_step { elector[e] == up && does[e] == waiting && isFirst && inTime(left[e]) &&
		!knowsExit[e] && !knowsStop[e] && guard != down ->
		who(e); printf("leads: its key is the oldest\n");
		does[e] = term }
	:: d_step { elector[e] == up && does[e] == waiting &&
		(faults || knowsExit[e] || knowsStop[e] || guard == down) ->
		who(e); printf("leaves the queue\n");
		leave(e) }

	/* The term */
	:: d_step { elector[e] == up && does[e] == term && !hasJob[e] && inTime(left[e]) &&
		!knowsExit[e] && !knowsStop[e] && messagesRead(e) && guard != down ->
		who(e); printf("asks the guard for the job\n");
		assert(!stop || tellStop || e != 0);	/* never started after a stop */
		hasJob[e] = 1; askStart[e] = 1; askUntil[e] = left[e] }
	:: d_step { elector[e] == up && does[e] == term &&
		(faults || knowsStop[e] || knowsExit[e] && !hasJob[e] || !inTime(left[e]) ||
		guard == down) ->
		who(e); printf("ends its term\n");
		does[e] = ending;
		if
		:: hasJob[e] && askStop[e] == 0 -> askStop[e] = 1
		:: else
		fi }
	:: d_step { elector[e] == up && does[e] == ending && !hasJob[e] && messagesRead(e) ->
		who(e); printf("is about to revoke its lease\n");
		leave(e) }

	/* The release */
	:: d_step { elector[e] == up && does[e] == leaving && lease && !revoke ->
		who(e); printf("asks etcd to revoke its lease\n");
		revoke = 1 }
#ifdef ANNOUNCED_LATE
	:: d_step { elector[e] == up && does[e] == leaving && !saysLeaving[e] && !announced ->
		saysLeaving[e] = 1 }
#endif
	:: d_step { elector[e] == up && does[e] == leaving && !lease && messagesRead(e) ->
		does[e] = out; knowsLease = 0; announced = 0; exitKnown = 0; knowsExit[e] = 0 }
	:: d_step { elector[e] == up && does[e] == out && messagesRead(e) &&
		(knowsStop[e] || guard == down) ->
		who(e); printf("exits\n");
		elector[e] = down; knowsStop[e] = 0;
		exiting = exiting || e == 0 && guard != down }

	/* The guard's messages */
	:: d_step { e == 0 && elector[e] == up && tellGone && (!tellStop || goneFirst) ->
		tellGone = 0; goneFirst = 0; hasJob[e] = 0;
#ifndef RESTARTS
		knowsExit[e] = 1
#endif
		}
	:: d_step { e == 0 && elector[e] == up && tellStop && !goneFirst ->
		tellStop = 0; knowsStop[e] = 1 }

	/* The guard is lost. Spawner and elector kill the job. */
	:: d_step { elector[e] == up && standsIn(e) && !someJob ->
		who(e); printf("has proof that nothing of the job is left\n");
		hasJob[e] = 0; does[e] = ending; askStop[e] = 0; askStart[e] = 0; askExtend[e] = 0;
		tellGone = 0; goneFirst = 0 }
	:: d_step { elector[e] == up && mustStandIn(e) ->
		who(e); printf("kills the job\n");
		who(e); printf("kills the guard, which hangs\n");
		runs = 0; fork = 0; guard = down }
	:: d_step { elector[e] == up && guard == down && someJob ->
		who(e); printf("kills the job\n");
		runs = 0; fork = 0 }
	od
}

/* ---- the guard ---- */

inline beginKill() {
	if
	:: job == alive || job == stopping -> job = killing
	:: else
	fi
}

/* The new elector and its record */
#ifdef RECORD_EARLY
#define recordJob	(early -> earlyJob : job)
#define recordAnnounced	(early -> earlyAnnounced : announced)
#define recordExit	(early -> earlyExit : exitKnown)
#define recordLease	(early -> earlyLease : knowsLease)
#define recordUntil	(early -> earlyUntil : until)
#else
#ifdef JOB_UNKNOWN
#define recordJob	idle
#else
#define recordJob	job
#endif
#if defined(LEAVING_IGNORED)
#define recordAnnounced	false
#elif defined(AFTER_JOBS_ONLY)
#define recordAnnounced	exitKnown
#else
#define recordAnnounced	announced
#endif
#ifdef EXIT_UNKNOWN
#define recordExit	false
#else
#define recordExit	exitKnown
#endif
#define recordLease	knowsLease
#define recordUntil	until
#endif

#ifdef STOP_UNKNOWN
#define recordStop	false
#else
#define recordStop	stop
#endif

inline adopt() {
	setAdopts(1);
	knowsStop[0] = recordStop;
	if
	:: !recordLease -> does[0] = out
	:: recordLease && recordAnnounced -> does[0] = leaving
	:: recordLease && !recordAnnounced && recordJob == idle ->
		does[0] = waiting; knowsExit[0] = recordExit
	:: recordLease && !recordAnnounced && recordJob == alive ->
		does[0] = term; hasJob[0] = 1; left[0] = recordUntil
	:: else ->
		does[0] = ending; hasJob[0] = 1; left[0] = recordUntil
	fi
}

/* Nothing is expected of the elector in place 0 any more. */
inline clearElector() {
	does[0] = out; left[0] = 0; renewal[0] = IDLE; worth[0] = 0; hasJob[0] = 0;
	knowsExit[0] = 0; knowsStop[0] = 0;
	askStart[0] = 0; askExtend[0] = 0; askUntil[0] = 0; askStop[0] = 0; saysLeaving[0] = 0;
	tellGone = 0; tellStop = 0; goneFirst = 0
}

#ifdef DEADLINES_WAIT
#define ownClock	(elector[0] == up || elector[0] == hung)
#else
#define ownClock	true
#endif

#ifdef UNDRAINED
#define drained	true
#elif defined(LATE_START)
#define drained	(!askStop[0] && !askExtend[0] && !saysLeaving[0])
#else
#define drained	noMessages(0)
#endif

/* The elector is known to have exited. */
#ifdef OLD_LIVES
#define ended	(elector[0] == down || elector[0] == hung && elector[1] == down)
#else
#define ended	(elector[0] == down)
#endif

#ifdef GIVES_UP_UNPROVEN
#define proven	(job == idle || job == killing)
#else
#define proven	(job == idle)
#endif

proctype Guard() {
end:	do
	/* Messages. Those of an elector that has exited are read too. */
	:: d_step { guard == up && job == idle && askStart[0] && !tellGone ->
		printf("@ %d a.guard asks the spawner for the job\n", tick);
		askStart[0] = 0; until = askUntil[0]; job = (stop -> stopping : alive); fork = 1 }
#ifdef LATE_START
	:: d_step { guard == up && job == idle && askStart[1] ->
		printf("@ %d a.guard asks the spawner for the job, as the replaced elector wanted\n", tick);
		askStart[1] = 0; until = askUntil[1]; job = alive; fork = 1 }
#endif
	:: d_step { guard == up && askExtend[0] && !askStart[0] ->
		askExtend[0] = 0;
		if
		:: job != idle && inTime(until) ->
			printf("@ %d a.guard extends the job's deadlines\n", tick);
			until = askUntil[0]
		:: else
		fi }
	:: d_step { guard == up && askStop[0] && !askStart[0] ->
		if
		:: askStop[0] == 1 && job == alive -> printf("@ %d a.guard sends the stop signal\n", tick);
			job = stopping
		:: askStop[0] == 2 -> printf("@ %d a.guard begins the kill: the lease is lost\n", tick);
			beginKill()
		:: else
		fi;
		askStop[0] = 0 }
	:: d_step { guard == up && saysLeaving[0] -> saysLeaving[0] = 0; announced = knowsLease }

	/* Its own clock */
	:: d_step { guard == up && job == alive && !inTime(until) && ownClock ->
		printf("@ %d a.guard sends the stop signal: stop-at has passed\n", tick);
		job = stopping }
	:: d_step { guard == up && (job == alive || job == stopping) && pastKillBy(until) && ownClock ->
		printf("@ %d a.guard begins the kill: kill-by has passed\n", tick);
		job = killing }
	:: d_step { guard == up && job == stopping ->
		printf("@ %d a.guard begins the kill: the grace is over\n", tick);
		job = killing }

	/* The job exits by itself, the start is refused, or the kill is under way. */
	:: d_step { guard == up && (job == alive || job == stopping) && !someJob -> job = killing }
	:: d_step { guard == up && job == killing && runs ->
		printf("@ %d a.guard kills the job\n", tick);
		runs = 0 }
	:: d_step { guard == up && job == killing && !someJob ->
		printf("@ %d a.guard has proof that nothing of the job is left\n", tick);
		job = idle; until = 0;
#ifndef RESTARTS
		exitKnown = 1;
#endif
		if
		:: elector[0] == up || elector[0] == hung -> tellGone = 1
		:: else
		fi }

	/* The elector */
	:: d_step { guard == up && (elector[0] == hung || faults && elector[0] == up) && !exiting ->
		printf("@ %d a.guard kills the elector\n", tick);
		elector[0] = down; renewal[0] = IDLE; worth[0] = 0;
		becomes(ending) }
	:: d_step { guard == up && ended && !exiting && !gaveUp && drained ->
		printf("@ %d a.guard starts another elector\n", tick);
#if PLACES > 1
		elector[1] = elector[0];
		does[1] = does[0]; left[1] = left[0]; renewal[1] = renewal[0]; worth[1] = worth[0];
		hasJob[1] = hasJob[0]; knowsExit[1] = knowsExit[0]; knowsStop[1] = knowsStop[0];
		askStart[1] = askStart[0]; askUntil[1] = askUntil[0];
#endif
		clearElector();
		elector[0] = new;
		becomes(starting) }
	:: d_step { guard == up && elector[0] == new ->
		printf("@ %d a.guard hands the record to the new elector\n", tick);
		elector[0] = up;
		adopt();
		becomes(running)
#ifdef RECORD_EARLY
		;
		early = 0; earlyJob = idle; earlyAnnounced = 0; earlyExit = 0; earlyLease = 0;
		earlyUntil = 0
#endif
		}
#ifdef RECORD_EARLY
	:: d_step { guard == up && elector[0] == up && !early && noMessages(0) ->
		printf("@ %d a.guard makes the record for the elector that is to come\n", tick);
		early = 1; earlyJob = job; earlyAnnounced = announced; earlyExit = exitKnown;
		earlyLease = knowsLease; earlyUntil = until }
#endif
	:: d_step { faults && guard == up && elector[0] == down && !exiting && !gaveUp && drained ->
		printf("@ %d a.guard gives up\n", tick);
		clearElector();
		gaveUp = 1;
		becomes(gone);
		beginKill() }
	:: d_step { guard == up && gaveUp && proven ->
		printf("@ %d a.guard exits, and the lease is revoked\n", tick);
		revoke = lease && knowsLease; guard = down }
	:: d_step { guard == up && exiting && job == idle ->
		printf("@ %d a.guard exits\n", tick);
		becomes(gone);
		guard = down }
	od
}

/* ---- the spawner, and the job ---- */

proctype Spawner() {
end:	do
	/* The last check */
	:: d_step { fork && guard != down && job != killing && inTime(until) ->
		printf("@ %d a.job starts\n", tick);
		assert(!bJob);	/* never two jobs */
		assert(!bLed);	/* tokens rise */
#ifndef RESTARTS
		assert(!exitKnown);	/* never run again in one term */
#endif
		fork = 0; runs = 1 }
	:: d_step { fork && (job == killing || !inTime(until)) -> fork = 0 }
#ifndef NO_SPAWNER_KILL
	:: d_step { guard == down && someJob ->
		printf("@ %d a.spawner learns that the guard has exited\n", tick);
		printf("@ %d a.spawner kills the job\n", tick);
		fork = 0; runs = 0 }
#endif
	:: d_step { runs && (faults || job == stopping) ->
		printf("@ %d a.job exits\n", tick);
		runs = 0 }
	od
}

/* ---- faults and time ---- */

/* Time waits for kills that are due, and for a start whose last check is made. */
#ifdef NO_SPAWNER_KILL
#define spawnerOwes	false
#else
#define spawnerOwes	(guard == down && someJob)
#endif
#define guardOwes	(guard == up && pastKillBy(until) && ownClock && job != idle && someJob)
#define electorOwes	(elector[0] == up && (mustStandIn(0) || guard == down && someJob))
#define prompt	(!guardOwes && !(until < MARGIN && (spawnerOwes || electorOwes)))

#define oneLess(t)	t = (t > 0 -> t - 1 : 0)

#if PLACES > 1
#define allDown	(elector[0] == down && elector[1] == down && guard == down && !someJob)
#else
#define allDown	(elector[0] == down && guard == down && !someJob)
#endif

proctype World() {
end:	do
	:: d_step { nothingElse && prompt ->
		oneTick;
		oneLess(remains); oneLess(until);
		oneLess(left[0]); oneLess(worth[0]); oneLess(askUntil[0])
#if PLACES > 1
		;
		oneLess(left[1]); oneLess(worth[1]); oneLess(askUntil[1])
#endif
#ifdef RECORD_EARLY
		;
		oneLess(earlyUntil)
#endif
		}

	/* A new elector crashes, too, or the guard while it replaces it. */
	:: d_step { faults && guard != hung && (elector[0] == up || elector[0] == new) ->
		printf("@ %d a.elector crashes\n", tick);
		elector[0] = down; renewal[0] = IDLE; worth[0] = 0 }
	:: d_step { faults && guard != hung && elector[0] == up ->
		printf("@ %d a.elector hangs\n", tick);
		elector[0] = hung }
	:: d_step { (faults || guard == down) && elector[0] == hung ->
		printf("@ %d a.elector goes on\n", tick);
		elector[0] = up }
	:: d_step { faults && guard == up ->
		printf("@ %d a.guard crashes\n", tick);
		guard = down }
	/* Not while there is no elector. */
	:: d_step { faults && guard == up && elector[0] == up ->
		printf("@ %d a.guard hangs\n", tick);
		guard = hung }
	:: d_step { (faults || !mustStandIn(0)) && guard == hung ->
		printf("@ %d a.guard goes on\n", tick);
		guard = up }
#if PLACES > 1
	:: d_step { elector[1] == hung ->
		printf("@ %d a.replaced goes on\n", tick);
		elector[1] = up }
#endif
	/* The user asks for the end of the daemon. */
	:: d_step { faults && guard == up && !stop ->
		printf("@ %d operator asks the daemon to stop\n", tick);
		stop = 1;
		/* The guard does not wait for the elector. */
		if
		:: job == alive -> job = stopping
		:: else
		fi;
		tellStop = (elector[0] == up || elector[0] == hung);
		goneFirst = tellStop && tellGone }
#ifdef LIVE
	:: d_step { !calm -> calm = 1 }
#endif

	/* An elector that was waiting for its record exits with the guard. */
	:: d_step { guard == down && elector[0] == new -> elector[0] = down }
	/* The daemon is started, or started again. */
	:: d_step { allDown ->
		printf("@ %d world a's daemon starts\n", tick);
		clearElector();
		setAdopts(0);
		elector[0] = up; guard = up; job = idle; until = 0; gaveUp = 0; exiting = 0;
		knowsLease = 0; announced = 0; exitKnown = 0; stop = 0;
		first(starting);
		becomes(running) }
	od
}

init {
	atomic {
		run World(); run Etcd(); run Spawner(); run Guard();
#if PLACES > 1
		run Elector(1);
#endif
		run Elector(0)
	}
}
