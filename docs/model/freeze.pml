/*
 * One machine whose job is frozen when contact with etcd is lost: when may it be thawed?
 *
 * At stop-at the guard freezes the job's cgroup instead of stopping the job. If it has not seen the
 * job frozen by kill-by, it kills it. A frozen job runs no instruction. So it may outlast the
 * lease, and time does not wait for its kill. When etcd answers again, the elector renews the
 * lease, reads its key, and sends the guard the new deadlines. That is the request to thaw: there
 * is no other. If the key is gone, the job is killed while it is frozen.
 *
 * The freezer is a thread of the guard. The kernel may make it wait at any step, also between its
 * check of the clock and the thaw, and also while the rest of the guard hangs. Meanwhile the guard
 * goes on: it takes the job for one that runs.
 *
 * replace.pml has the guard that replaces its elector, with all that may go wrong there. Here the
 * guard replaces it too, at any time, or gives up. The announcement of a release is one step with
 * the decision to release, and all messages of an elector that has exited are read: replace.pml has
 * the rest. As there, the spawner does not hang, and nothing has to happen. Only time waits, for
 * kills that are due, also of a job that is about to be thawed.
 *
 * An etcd that cannot be reached, has no leader, or is stopped, is one that takes no step. A lease
 * is dropped at some time after its end, or never: a new leader of etcd may have given it its
 * whole TTL.
 *
 * A process of the job may be killed while it is frozen, also by others (for want of memory).
 *
 * Time is in ticks. A line that begins with @ is for the reader of a trace.
 * Each switch (-DTHAW_UNTIMED) is in switches.tsv.
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

/* A process */
mtype = { down, up, hung };

/* What the elector does. */
mtype = { out, waiting, term, ending, leaving };

/* The job as the guard has it. thawing: the freezer is asked to thaw it */
mtype = { idle, alive, freezing, frozen, thawing, stopping, killing };

/* A renewal */
#define IDLE	0
#define SENT	1
#define ACKED	2	/* etcd has renewed the lease; a read has to confirm that */

/* etcd */
bit lease;
bit key;	/* ours, with the create revision that the elector knows */
byte remains;	/* of the lease */
bit revoke;	/* a request to revoke it is under way */

/* Another candidate */
bit bLease, bJob;
bit bFirst;	/* its key is older than our newest one */
bit bLed;	/* it has started a job since our key was made, so its token is higher */

/* The elector */
mtype elector = down;
mtype does = out;
byte left;	/* until the lease's end, as the elector knows it */
byte renewal;
byte worth;	/* for how long the lease holds if the renewal counts */
bit hasJob;	/* it has asked for the job, and does not know it to be gone */
bit knowsStop;	/* the daemon has to stop */

/* From the elector to the guard */
bit askStart, askExtend;
byte askUntil;
byte askStop;	/* 1: stop, 2: kill at once */

/* From the guard to the elector */
bit tellGone, tellStop;
bit goneFirst;	/* both are on the way, and tellGone was sent first */

/* The guard */
mtype guard = down;
mtype job = idle;
byte until;	/* the lease's end, as the guard knows it */
bit gaveUp;	/* it does not replace the elector any more */
bit exiting;	/* the elector has announced its exit */
bit knowsLease;
bit announced;	/* the release of that lease */
bit stop;	/* the user has asked for the end of the daemon */

/* The spawner, the job, and its cgroup */
bit fork;	/* the spawner is asked to start it */
bit runs;	/* it has not exited */
bit freezer;	/* cgroup.freeze has 1 */
bit checked;	/* the freezer has checked the deadlines, and is about to write 0 */
bit isFrozen;	/* all of the cgroup is frozen */

/* A former leader of etcd may still answer. */
#ifdef THAW_UNCONFIRMED
bit former;
#else
#define former	false
#endif

#ifdef LEAVES_CGROUP
bit outside;	/* a process of the job has left the cgroup */
#else
#define outside	false
#endif

#ifdef REPLAY
hidden int tick;
#define oneTick	tick++
#else
#define tick	0
#define oneTick	skip
#endif

/* Changes of a state that only a frozen job has. Those seen are no part of the state. */
#ifdef RECORD
c_decl {
\#include "transitions.h"
}
#define record(m, from, to)	c_code { saw(#m, #from, #to); }
#else
#define record(m, from, to)	skip
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
#else
#define faults	true
#define nothingElse	true
#endif

/* No process crashes, hangs or is replaced: a trace that needs no such fault is found sooner. */
#ifdef WELL
#define fails	false
#else
#define fails	faults
#endif
#if defined(WELL) && !defined(THAW_UNWATCHED)
#define hangs	false
#else
#define hangs	faults
#endif

#define inTime(t)	((t) > MARGIN + LOSS)	/* before stop-at */
#define pastKillBy(t)	((t) <= MARGIN)
#define canRun	(runs && (!isFrozen || outside))	/* it can run an instruction */
#define someJob	(runs || fork)

#ifdef LIVE
#ifdef THAW_REFUSED
#define mayEnd	(job == frozen && runs)
#else
#define mayEnd	true
#endif
ltl again { [] (calm -> <> (canRun && !stop)) }
#endif

inline endLease() {
	lease = 0; key = 0; remains = 0; revoke = 0
}

inline jobEnds() {
	runs = 0; isFrozen = 0
#ifdef LEAVES_CGROUP
	;
	outside = 0
#endif
}

inline thaw() {
	assert(!bJob);	/* never two jobs */
	assert(!bLed);	/* tokens rise */
	isFrozen = 0
}

/* ---- etcd, people, and the other candidate ---- */

/* A frozen job's key may be deleted, until the elector has read it and asks for the thaw: while
   /leader answers 503. */
#if defined(LEAVES_CGROUP) || defined(THAWED_BY_OTHERS) || defined(THAW_UNCONFIRMED)
#define mayDelete	false
#else
#define mayDelete	(isFrozen && job == frozen && !inTime(left) && !askExtend)
#endif

/* There is no other candidate, and no renewal until all faults end: the trace is shorter. */
#ifdef THAW_REFUSED
#define joins	false
#define renewable	calm
#else
#define joins	faults
#define renewable	lease
#endif

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
	/* A renewal comes late, or twice, or a new leader of etcd gives the lease its whole TTL. */
	:: d_step { faults && lease && remains < TTL -> remains = TTL }
#ifdef THAW_UNCONFIRMED
	:: d_step { faults && !former ->
		printf("@ %d etcd elects a new leader\n", tick);
		former = 1 }
#endif
	:: d_step { faults && key && mayDelete ->
		printf("@ %d operator deletes the key of a\n", tick);
		key = 0 }

	/* The other candidate. It gives up its lease only when its job has exited. */
	:: d_step { joins && !bLease ->
		printf("@ %d b.elector gets a lease, and is in the queue\n", tick);
		bLease = 1; bFirst = 0 }
	:: d_step { faults && bLease && !bJob && (bFirst || !key) ->
		printf("@ %d b.job starts\n", tick);
		assert(!canRun);	/* never two jobs */
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

/* ---- the elector ---- */

#define isSuspended	(elector == up && does == term && hasJob && !inTime(left))

/* The term is over, or lost. */
inline endTerm() {
	if
	:: isSuspended -> record(candidate, suspended, stopping)
	:: else
	fi;
	does = ending
}

inline count() {
#ifdef THAW_FROM_ANSWER
	worth = (job == frozen -> TTL : worth);
#endif
	printf("@ %d a.elector counts the renewal: the lease holds for %d ticks\n", tick, worth);
	if
	:: isSuspended && inTime(worth) -> record(candidate, suspended, leading)
	:: else
	fi;
	if
	:: worth > left -> left = worth
	:: else
	fi;
	if
	:: does == term && hasJob -> askExtend = 1; askUntil = left
	:: else
	fi;
	renewal = IDLE; worth = 0
}

/* Past stop-at a term goes on only for the sake of a job, which the guard has frozen or kills. */
#define mayCount	(does == waiting || does == term && hasJob || inTime(left))

/* The read that follows a renewal looks for our key. */
#ifdef THAW_KEY_UNREAD
#define isThere	lease
#else
#define isThere	key
#endif

inline leave() {
	does = leaving; left = 0; renewal = IDLE; worth = 0;
	announced = knowsLease
}

/* When it may give up its lease. */
#ifdef FROZEN_IS_GONE
#define jobless	(!hasJob || job == frozen)
#else
#define jobless	(!hasJob)
#endif

#define noMessages	(!askStart && !askExtend && !askStop)
#define messagesRead	(guard == down || noMessages && !tellGone)

/* The guard is gone, or hangs although it is due to kill the job, or is about to thaw it. */
#ifdef THAW_UNWATCHED
#define hungWithJob	(guard == hung && someJob && !isFrozen)
#else
#define hungWithJob	(guard == hung && someJob && job != frozen)
#endif
#define mustStandIn	(hungWithJob && until < MARGIN)

proctype Elector() {
end:	do
	:: d_step { elector == up && guard != down && does == out && !lease && !knowsStop &&
		messagesRead ->
		printf("@ %d a.elector has a lease, and is in the queue\n", tick);
		lease = 1; key = 1; remains = TTL; bFirst = bLease; bLed = 0;
		does = waiting; left = TTL; knowsLease = 1; announced = 0 }

	/* A renewal */
	:: d_step { elector == up && (does == waiting || does == term) && renewal == IDLE &&
		left < TTL && mayCount && (faults || isThere) &&
		(renewable || former && job == frozen) ->
		printf("@ %d a.elector sends a renewal\n", tick);
		renewal = SENT; worth = TTL }
	:: d_step { renewal == SENT && lease ->
		printf("@ %d etcd renews the lease\n", tick);
		renewal = ACKED; remains = TTL }
	:: d_step { elector == up && renewal == ACKED && isThere && mayCount ->
#ifdef THAW_KEY_UNREAD
		printf("@ %d etcd answers a, in the same raft term\n", tick);
#else
		printf("@ %d etcd answers a: its key is there, in the same raft term\n", tick);
#endif
		count() }
	:: d_step { elector == up && renewal != IDLE && (faults || !isThere || !mayCount) ->
		renewal = IDLE; worth = 0 }
#ifdef THAW_UNCONFIRMED
	:: d_step { elector == up && renewal == SENT && former && job == frozen && mayCount ->
		printf("@ %d etcd acknowledges the renewal, by a former leader\n", tick);
		count() }
#endif
#ifdef KEY_PUT_ANEW
	:: d_step { elector == up && job == frozen && does == term && !key && !lease && !bLease ->
		printf("@ %d a.elector has a lease, and puts its key anew: nobody leads\n", tick);
		lease = 1; key = 1; remains = TTL; bFirst = 0;
		left = TTL; askExtend = 1; askUntil = left }
#endif

	/* The key is gone. */
	:: d_step { elector == up && !isThere && (does == waiting || does == term ||
		does == ending && hasJob && askStop < 2 && job != killing && !tellGone &&
		guard != down) ->
		printf("@ %d a.elector learns that its key is gone\n", tick);
		if
		:: does == waiting -> leave()
		:: does != waiting && hasJob -> endTerm(); askStop = 2
		:: else -> does = ending
		fi }

	/* A read shows that no key is older, and confirms the last renewal. */
	:: d_step { elector == up && does == waiting && key && !(bLease && bFirst) && inTime(left) &&
		!knowsStop && guard != down ->
		printf("@ %d a.elector leads: its key is the oldest\n", tick);
		does = term }
	:: d_step { elector == up && does == waiting && (faults || knowsStop || guard == down) ->
		printf("@ %d a.elector leaves the queue\n", tick);
		leave() }

	/* The term */
	:: d_step { elector == up && does == term && !hasJob && inTime(left) && !knowsStop &&
		messagesRead && guard != down ->
		printf("@ %d a.elector asks the guard for the job\n", tick);
		hasJob = 1; askStart = 1; askUntil = left }
	:: d_step { elector == up && does == term &&
		(faults || knowsStop || !hasJob && !inTime(left) || guard == down) ->
		printf("@ %d a.elector ends its term\n", tick);
		endTerm();
		if
		:: hasJob && askStop == 0 -> askStop = 1
		:: else
		fi }
	:: d_step { elector == up && does == ending && jobless && messagesRead ->
		printf("@ %d a.elector is about to revoke its lease\n", tick);
		leave() }
#ifdef FROZEN_IS_GONE
	:: d_step { elector == up && does == term && hasJob && job == frozen ->
		printf("@ %d a.elector takes the frozen job for gone\n", tick);
		leave() }
#endif

	/* The release */
	:: d_step { elector == up && does == leaving && lease && !revoke ->
		printf("@ %d a.elector asks etcd to revoke its lease\n", tick);
		revoke = 1 }
	:: d_step { elector == up && does == leaving && !lease && messagesRead ->
		does = out; knowsLease = 0; announced = 0 }
	:: d_step { elector == up && does == out && messagesRead && (knowsStop || guard == down) ->
		printf("@ %d a.elector exits\n", tick);
		elector = down; knowsStop = 0;
		exiting = guard != down }

	/* The guard's messages */
	:: d_step { elector == up && tellGone && (!tellStop || goneFirst) ->
		tellGone = 0; goneFirst = 0; hasJob = 0 }
	:: d_step { elector == up && tellStop && !goneFirst -> tellStop = 0; knowsStop = 1 }

	/* The guard is lost. Spawner and elector kill the job. A guard that hangs is lost also while
	   the job is frozen. */
	:: d_step { elector == up && guard == down && (does == term || hasJob) && !someJob ->
		printf("@ %d a.elector has proof that nothing of the job is left\n", tick);
		hasJob = 0; does = ending; askStop = 0; askStart = 0; askExtend = 0;
		tellGone = 0; goneFirst = 0 }
	:: d_step { elector == up && (mustStandIn || guard == hung && job == frozen) ->
		printf("@ %d a.elector kills the job\n", tick);
		printf("@ %d a.elector kills the guard, which hangs\n", tick);
		jobEnds(); fork = 0; guard = down }
	:: d_step { elector == up && guard == down && someJob ->
		printf("@ %d a.elector kills the job\n", tick);
		jobEnds(); fork = 0 }
	od
}

/* ---- the guard ---- */

#define canEnd	(job == alive || job == freezing || job == frozen || job == thawing || \
	job == stopping)

inline beginKill() {
	if
	:: job == freezing -> record(guard, freezing, killing)
	:: job == frozen -> record(guard, frozen, killing); record(handle, frozen, stopping)
	:: job == thawing -> record(guard, thawing, killing); record(handle, frozen, stopping)
	:: else
	fi;
	if
	:: canEnd -> job = killing
	:: else
	fi
}

#define freezeFrom(state) \
	record(guard, state, freezing); \
	job = freezing; freezer = 1

/* New deadlines for a job that is frozen, or is being frozen. The guard checks them when they
   come, and the freezer before the thaw. */
#ifdef THAW_UNTIMED
#define ahead(t)	true
#elif defined(THAWS_PAST_STOP_AT)
#define ahead(t)	(!pastKillBy(t))
#else
#define ahead(t)	(inTime(t))
#endif
#ifdef STOP_FORGOTTEN
#define mayThaw	ahead(askUntil)
#elif defined(THAW_REFUSED)
#define mayThaw	false
#else
#define mayThaw	(ahead(askUntil) && !stop)
#endif

/* The guard takes the job for frozen. */
#ifdef FREEZE_UNSEEN
#define seenFrozen	true
#else
#define seenFrozen	(isFrozen && !checked)
#endif
#ifdef FREEZER_AWAITED
#define freezeFails	false
#else
#define freezeFails	(job == freezing && pastKillBy(until))
#endif

inline adopt() {
	knowsStop = stop;
	if
	:: !knowsLease -> does = out
	:: knowsLease && announced -> does = leaving
	:: knowsLease && !announced && job == idle -> does = waiting
	:: knowsLease && !announced && (job == stopping || job == killing) ->
		does = ending; hasJob = 1; left = until
	:: else ->
		does = term; hasJob = 1; left = until
	fi
}

/* Nothing is expected of the elector any more. */
inline clearElector() {
	does = out; left = 0; renewal = IDLE; worth = 0; hasJob = 0; knowsStop = 0;
	askStart = 0; askExtend = 0; askUntil = 0; askStop = 0;
	tellGone = 0; tellStop = 0; goneFirst = 0
}

#define acts	(guard == up)

proctype Guard() {
end:	do
	/* Messages. Those of an elector that has exited are read too. */
	:: d_step { acts && job == idle && askStart && !tellGone ->
		printf("@ %d a.guard asks the spawner for the job\n", tick);
		askStart = 0; until = askUntil; job = (stop -> stopping : alive); fork = 1 }
	:: d_step { acts && askExtend && !askStart ->
		askExtend = 0;
		if
		:: (job == alive || job == stopping || job == thawing) && inTime(until) ->
			printf("@ %d a.guard extends the job's deadlines\n", tick);
			until = askUntil
		:: (job == freezing || job == frozen) && mayThaw ->
			printf("@ %d a.guard asks for the thaw of the job: it has new deadlines\n", tick);
			if
			:: job == freezing -> record(guard, freezing, thawing)
			:: else -> record(guard, frozen, thawing)
			fi;
			until = askUntil; job = thawing
		:: else
		fi }

	/* The freezer. */
	:: d_step { acts && job == thawing && freezer && !checked && ahead(until) ->
		printf("@ %d a.guard is about to thaw the job\n", tick);
		checked = 1 }
	:: d_step { guard != down && checked ->
		printf("@ %d a.guard thaws the job\n", tick);
		if
		:: job == freezing || job == thawing -> assert(!stop)	/* never thawed after a stop */
		:: else
		fi;
		checked = 0; freezer = (job == freezing);
		if
		:: runs && isFrozen -> thaw()
		:: else
		fi }
	:: d_step { acts && job == thawing && !freezer ->
		printf("@ %d a.guard has seen that the job is thawed\n", tick);
		record(guard, thawing, running); record(handle, frozen, running);
		job = alive }

	:: d_step { acts && askStop && !askStart && !askExtend ->
		if
		:: askStop == 1 && job == alive -> printf("@ %d a.guard sends the stop signal\n", tick);
			job = stopping
		:: askStop == 1 && (job == freezing || job == frozen || job == thawing) ->
			printf("@ %d a.guard begins the kill: the frozen job's term is over\n", tick);
			beginKill()
		:: askStop == 2 -> printf("@ %d a.guard begins the kill: the lease is lost\n", tick);
			beginKill()
		:: else
		fi;
		askStop = 0 }

	/* Its own clock. A job whose start is not answered yet is not frozen. */
	:: d_step { acts && job == alive && !inTime(until) ->
		if
		:: runs -> printf("@ %d a.guard freezes the job: stop-at has passed\n", tick);
			freezeFrom(running)
		:: else -> job = stopping
		fi }
#ifndef THAW_UNTIMED
	:: d_step { acts && job == thawing && !inTime(until) ->
		printf("@ %d a.guard freezes the job again: stop-at has passed\n", tick);
		freezeFrom(thawing) }
#endif
	:: d_step { acts && job == freezing && seenFrozen && !pastKillBy(until) ->
		printf("@ %d a.guard has seen that the job is frozen\n", tick);
		record(guard, freezing, frozen); record(handle, running, frozen);
		job = frozen }
	:: d_step { acts && ((job == alive || job == stopping || job == thawing) &&
		pastKillBy(until) || freezeFails) ->
		printf("@ %d a.guard begins the kill: kill-by has passed\n", tick);
		beginKill() }
	:: d_step { acts && job == stopping ->
		printf("@ %d a.guard begins the kill: the grace is over\n", tick);
		job = killing }

	/* The job exits by itself, the start is refused, or the kill is under way. */
	:: d_step { acts && canEnd && !someJob -> beginKill() }
	:: d_step { acts && job == killing && runs ->
		printf("@ %d a.guard kills the job\n", tick);
		jobEnds() }
	:: d_step { acts && job == killing && !someJob ->
		printf("@ %d a.guard has proof that nothing of the job is left\n", tick);
		job = idle; until = 0; freezer = checked;
		tellGone = (elector != down) }

	/* The elector */
	:: d_step { acts && (elector == hung || fails && elector == up) && !exiting ->
		printf("@ %d a.guard kills the elector\n", tick);
		elector = down; renewal = IDLE; worth = 0 }
	:: d_step { acts && elector == down && !exiting && !gaveUp && noMessages ->
		printf("@ %d a.guard starts another elector, and hands the record to it\n", tick);
		clearElector();
		elector = up;
		adopt() }
	:: d_step { faults && acts && elector == down && !exiting && !gaveUp && noMessages ->
		printf("@ %d a.guard gives up\n", tick);
		clearElector();
		gaveUp = 1;
		beginKill() }
	:: d_step { acts && gaveUp && job == idle ->
		printf("@ %d a.guard exits, and the lease is revoked\n", tick);
		revoke = lease && knowsLease; guard = down }
	:: d_step { acts && exiting && job == idle ->
		printf("@ %d a.guard exits\n", tick);
		guard = down }
	od
}

/* ---- the spawner, the job, and the kernel ---- */

proctype Spawner() {
end:	do
	/* The last check */
	:: d_step { fork && guard != down && job != killing && inTime(until) ->
		printf("@ %d a.job starts\n", tick);
		assert(!bJob);	/* never two jobs */
		assert(!bLed);	/* tokens rise */
		fork = 0; runs = 1 }
	:: d_step { fork && (job == killing || !inTime(until)) -> fork = 0 }
	:: d_step { guard == down && someJob ->
		printf("@ %d a.spawner learns that the guard has exited\n", tick);
		printf("@ %d a.spawner kills the job\n", tick);
		fork = 0; jobEnds() }

	:: d_step { runs && (faults || job == stopping) ->
		printf("@ %d a.job exits\n", tick);
		jobEnds() }
#ifdef LEAVES_CGROUP
	:: d_step { canRun && !outside ->
		printf("@ %d a.job leaves its cgroup\n", tick);
		outside = 1 }
#endif
	/* All of the cgroup is frozen at some time after cgroup.freeze was written, or never. */
	:: d_step { runs && freezer && !isFrozen ->
#ifdef LEAVES_CGROUP
		printf("@ %d a.job is frozen, except for what is outside the cgroup\n", tick);
#else
		printf("@ %d a.job is frozen\n", tick);
#endif
		isFrozen = 1 }
#ifdef THAWED_BY_OTHERS
	:: d_step { isFrozen && job == frozen ->
		printf("@ %d operator thaws the job of a\n", tick);
		freezer = 0;
		thaw() }
#endif
	od
}

/* ---- faults and time ---- */

/* Time waits for kills of a job that can run an instruction, and for one that is about to be
   thawed. A frozen job's kill may take any time. */
#ifdef FREEZER_AWAITED
#define canWait	(job == freezing || job == frozen)
#else
#define canWait	(job == frozen)
#endif
#define guardOwes	(guard == up && job != idle && !canWait && pastKillBy(until) && \
	(fork || canRun || job == thawing || job == freezing || checked))
#define spawnerOwes	(guard == down && (fork || canRun))
#define electorOwes	(elector == up && (mustStandIn && \
	(fork || canRun || job == thawing || checked) || \
	guard == down && (fork || canRun)))
#define prompt	(!guardOwes && !(until < MARGIN && (spawnerOwes || electorOwes)))

#define oneLess(t)	t = (t > 0 -> t - 1 : 0)

proctype World() {
end:	do
	:: d_step { nothingElse && prompt ->
		oneTick;
		if
		:: elector == up && does == term && hasJob && left == MARGIN + LOSS + 1 ->
			record(candidate, leading, suspended)
		:: else
		fi;
		oneLess(remains); oneLess(until); oneLess(left); oneLess(worth); oneLess(askUntil) }

	/* A new elector crashes, too, or the guard while it replaces it. */
	:: d_step { fails && guard != hung && elector == up ->
		printf("@ %d a.elector crashes\n", tick);
		elector = down; renewal = IDLE; worth = 0 }
	:: d_step { fails && guard != hung && elector == up ->
		printf("@ %d a.elector hangs\n", tick);
		elector = hung }
	:: d_step { (faults || guard == down) && elector == hung ->
		printf("@ %d a.elector goes on\n", tick);
		elector = up }
	:: d_step { fails && guard == up ->
		printf("@ %d a.guard crashes\n", tick);
		guard = down }
	/* Not while there is no elector. */
	:: d_step { hangs && guard == up && elector == up ->
		printf("@ %d a.guard hangs\n", tick);
		guard = hung }
	:: d_step { (faults || !mustStandIn) && guard == hung ->
		printf("@ %d a.guard goes on\n", tick);
		guard = up }
	/* The user asks for the end of the daemon. */
	:: d_step { faults && acts && !stop ->
		printf("@ %d operator asks the daemon to stop\n", tick);
		stop = 1; tellStop = (elector != down); goneFirst = tellStop && tellGone;
		/* The guard does not wait for the elector. */
		if
		:: job == alive -> job = stopping
#ifndef STOP_FORGOTTEN
		:: job == freezing || job == frozen || job == thawing -> beginKill()
#endif
		:: else
		fi }
#ifdef LIVE
	:: d_step { !calm && mayEnd -> calm = 1 }
#endif

	/* The daemon is started, or started again. */
	:: d_step { elector == down && guard == down && !someJob ->
		printf("@ %d world a's daemon starts\n", tick);
		clearElector();
		elector = up; guard = up; job = idle; until = 0; freezer = 0; checked = 0; gaveUp = 0; exiting = 0;
		knowsLease = 0; announced = 0; stop = 0 }
	od
}

init {
	atomic {
		run World(); run Etcd(); run Spawner(); run Guard(); run Elector()
	}
}
