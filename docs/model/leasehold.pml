/*
 * Two candidates and one etcd: may two jobs ever run at once?
 *
 * This is the protocol of docs/safety.md between machines: steps 1 to 5, 9 and 10. What happens
 * within one machine is in machines.pml. Here a machine keeps what that model shows of it: its job
 * has exited before its lease can end, and before its lease is revoked.
 *
 * Nothing has to happen. Every step may be taken at any time, or never. So a process that hangs is
 * one that takes no steps, a message that is delayed is one that is not received yet, and an etcd
 * without a leader is one that does nothing. Only time waits: for the kill of a job whose lease is
 * about to end. A crash needs no step of its own either: the job exits, and the lease is left (the
 * request to revoke it is lost) or revoked.
 *
 * Time is in ticks. The leader's clock may be slower than that of etcd's leader: by DRIFT ticks in
 * a TTL. So, in ticks of the candidate, a lease lives for only TTL - DRIFT. That is how drift is
 * modelled: the clocks of the two candidates are never compared, each only with etcd's.
 *
 * What is one step here, and why nothing is lost by that:
 * - A standby's renewal, from its sending to the moment when it counts. Also the request for a
 *   lease and its key. If the answer came later, the candidate would know less: a lease that ends
 *   sooner. Whoever knows less does nothing that it could not do anyway. (-DSTANDBY_RENEWALS has
 *   renewals that a standby sends and that are answered after its win.)
 * - The read that verifies a win, the decision to lead, and the request for the job. Between that
 *   request and the start of the job any time may pass, so the read may be as old.
 * - The read that confirms a leader's renewal, and its counting, for the same reason.
 * - A former leader's acknowledgement of a leader's renewal, and the read that refuses it.
 *
 * -DEARLY_START is what the daemon does if it can: a standby whose last renewal is confirmed, as a
 * leader's is, starts when its watch shows that nobody is ahead, without another read. The first in
 * the queue need not know yet that it is the first. From then on people treat it as a leader.
 * Without -DEARLY_START each win is proven by the read.
 *
 * There is no bound on the number of leases, terms, renewals, faults, or etcd's leaders.
 *
 * A line that begins with @ is for the reader of a trace: the tick, who, and what.
 * Each switch (-DNO_WIN_READ) is in switches.tsv.
 */

#ifndef TTL
#define TTL	4	/* of a lease */
#endif
#ifndef MARGIN
#define MARGIN	2	/* from kill-by to the lease's end */
#endif
#ifndef LOSS
#define LOSS	0	/* loss grace: from stop-at to kill-by */
#endif
#ifndef DRIFT
#define DRIFT	1	/* what the leader's clock loses in a TTL, by etcd's clock */
#endif
#ifndef SLOTS
#define SLOTS	1	/* a leader's renewals under way at a time */
#endif

#ifdef CLOCK_DRIFTS
#define LIFE	(TTL - MARGIN)	/* more drift than the margin has room for */
#else
#define LIFE	(TTL - DRIFT)
#endif

/* The candidate's states, as in election/state.go. */
mtype = { connecting, standby, leading, stopping };

/* What the candidate does. A standby may show that it is connecting, see below. */
#define OUT	0	/* it has no lease, or none that it knows of */
#define WAITING	1	/* it is in the queue */
#define TERM	2	/* it leads: the guard was asked for the job */
#define ENDING	3	/* the term is over, the job may still live */

/* A leader's renewal */
#define IDLE	0	/* there is none */
#define SENT	1	/* under way to etcd */
#define ACKED	2	/* etcd's leader has renewed the lease; a read has to confirm that */
#define FORMER	3	/* a former leader has acknowledged it, and no read refuses that */

/* What a standby's last renewal rests on. */
#define OTHER	0	/* another raft term than that of etcd's leader */
#define SAME	1
#define GRANT	2	/* a majority granted the lease, or a read has confirmed the renewal */

/* etcd. A lease and its key are one here: who deletes the key makes the same trouble. */
bit lease[2];		/* it exists */
byte remains[2];	/* of it */
bit older;		/* whose newest key is the older one */
bit former;		/* a former leader of etcd may still answer: another one was elected */

/*
 * For reads that a former leader answers (-DSTALE_READS, -DSTALE_WIN_READ): it has the key of i. A
 * key that was made after the election of its successor it never sees, and of one that was deleted
 * after that it does not learn.
 */
#if defined(STALE_READS) || defined(STALE_WIN_READ)
bit has[2];
#define formerHas(i)	has[i] = has[i] || lease[i]
#define madeKey(i)	has[i] = 0
#else
#define formerHas(i)	skip
#define madeKey(i)	skip
#endif

/* On the way */
bit event[2];		/* of the watch: nobody is ahead */
bit revoke[2];		/* the request to revoke the lease */
byte request[2 * SLOTS];	/* the renewals: of candidate i from SLOTS * i on */
byte worth[2 * SLOTS];	/* for how long the lease holds if the renewal counts */

/* The candidates */
mtype state[2] = connecting;
byte does[2];
byte left[2];		/* until the lease's end, as the candidate knows it */
byte basis[2];
bit start[2];		/* the guard was asked to start the job, and has not */
bit job[2];		/* it is alive */
bit newest[2];		/* no job with a higher token has been started */

/*
 * For the question how long two jobs may live if somebody deletes a leader's key or revokes its
 * lease (-DOPERATOR -DOVERLAP): the ticks since then. Both jobs may be alive only for less than a TTL
 * after that.
 */
#ifdef OVERLAP
byte overtime[2];	/* it counts to TTL */
#endif

/* The tick is only for replays (spin -DREPLAY -t). It is no part of a state. */
#ifdef REPLAY
hidden int tick;
#define oneTick	tick++
#else
#define tick	0
#define oneTick	skip
#endif

/*
 * For the question whether somebody leads again (-DLIVE): at any moment all faults may come to an
 * end. Then messages arrive, people leave etcd alone, and time passes only when there is nothing
 * else to do.
 */
#ifdef LIVE
bit calm;
#define faults	(!calm)
#define nothingElse	(!calm || timeout)
ltl again { [] (calm -> <> (job[0] || job[1])) }
#else
#define faults	true
#define nothingElse	true
#endif

#define NAME(i)	(97 + i)	/* a or b */
#define inTime(t)	((t) > MARGIN + LOSS)	/* before stop-at */
#define first(i)	(lease[i] && (!lease[1-i] || older == i))

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

inline forget(r) {
	request[r] = IDLE; worth[r] = 0
}

inline forgetAll(i) {
	forget(SLOTS*i);
	forget(SLOTS*i + SLOTS - 1)
}

/*
 * The watch shows events in the order in which they happened. If our own key was deleted before the
 * last one ahead of it, we learn of that first. So the event says: when nobody was ahead any more,
 * our key was there.
 */
#ifdef EVENTS_UNORDERED
#define isThere(i)	true
#else
#define isThere(i)	lease[i]
#endif

/* The lease is gone, and the key with it. The other one's watch shows that, at some time. */
inline deleteKey(i) {
	lease[i] = 0;
	remains[i] = 0;
	forgetAll(i);
	if
	:: isThere(1-i) && does[1-i] == WAITING -> event[1-i] = 1
	:: else
	fi
}

/* The session is over: the lease is revoked, whether or not the candidate knows that it exists. */
inline release(i) {
#ifndef ONLY_JOBS
	assert(!job[i] && !start[i]);	/* never revoked before the job has exited */
#endif
	printf("@ %d %c.elector asks etcd to revoke its lease\n", tick, NAME(i));
	revoke[i] = lease[i];
	does[i] = OUT; left[i] = 0; basis[i] = OTHER; event[i] = 0; newest[i] = 0;
#ifdef OVERLAP
	overtime[i] = 0;
#endif
	forgetAll(i)
}

/* The candidate campaigns again, in the same process. */
inline campaignAgain(i) {
	if
	:: state[i] == connecting -> transit(candidate, state[i], connecting, connecting)
	:: state[i] == standby -> transit(candidate, state[i], standby, connecting)
	:: state[i] == stopping -> transit(candidate, state[i], stopping, connecting)
	fi
}

/* Past stop-at nothing revives a term. */
#ifdef REVIVES
#define mayCount(i)	true
#else
#define mayCount(i)	inTime(left[i])
#endif

/* A renewal counts from the moment when it was sent. An earlier one changes nothing. */
inline count(i, r) {
#ifdef ARRIVAL_COUNTS
	worth[r] = TTL;
#endif
	printf("@ %d %c.elector counts the renewal: the lease holds for %d ticks\n", tick, NAME(i),
		worth[r]);
	if
	:: worth[r] > left[i] -> left[i] = worth[r]
	:: else
	fi;
	forget(r)
}

/* The guard starts the job. */
inline begin(i) {
	printf("@ %d %c.job starts\n", tick, NAME(i));
#if !defined(ONLY_TOKENS) && !defined(OVERLAP)
	assert(!job[1-i]);	/* never two jobs */
#endif
#ifndef OVERLAP
	assert(newest[i]);	/* tokens rise */
#endif
	newest[1-i] = newest[1-i] && older == i;
	start[i] = 0; job[i] = 1
}

/* What people do not do: revoke the lease of a candidate that leads. */
#ifdef OPERATOR
#define mayRevoke(i)	true
#elif defined(EARLY_START) && !defined(HEAD_REVOKED)
#define mayRevoke(i)	(does[i] < TERM && !job[i] && !(does[i] == WAITING && first(i)))
#else
#define mayRevoke(i)	(does[i] < TERM && !job[i])
#endif

#ifdef RELEASE_UNPROVEN
#define exited(i)	(!start[i])
#else
#define exited(i)	(!job[i] && !start[i])
#endif

/* A former leader's acknowledgement counts, because no read refuses it. */
#ifdef UNCONFIRMED_COUNTS
#define unrefused	true
#elif defined(STALE_READS)
#define unrefused	has[i]
#else
#define unrefused	false
#endif

proctype Etcd(byte i) {
end:	do
	:: d_step { revoke[i] && lease[i] ->
		printf("@ %d etcd revokes the lease of %c\n", tick, NAME(i));
		revoke[i] = 0; deleteKey(i) }
	/* The request to revoke it is lost, or comes when the lease is gone. */
	:: d_step { revoke[i] && (faults || !lease[i]) -> revoke[i] = 0 }
	:: d_step { lease[i] && remains[i] == 0 ->
		printf("@ %d etcd drops the lease of %c: it has expired\n", tick, NAME(i));
		deleteKey(i) }
#ifdef EXPIRES_EARLY
	:: d_step { lease[i] && former ->
		printf("@ %d etcd drops the lease of %c early: a former leader missed its renewals\n",
			tick, NAME(i));
		deleteKey(i) }
#endif
	:: d_step { faults && lease[i] && mayRevoke(i) ->
#ifdef KEY_UNREAD
		printf("@ %d operator deletes the key of %c\n", tick, NAME(i));
#else
		printf("@ %d operator revokes the lease of %c\n", tick, NAME(i));
#endif
		deleteKey(i) }
	od
}

/* The read that follows a renewal looks for our key. If only the key was deleted, etcd goes on
   renewing the lease. */
#ifdef KEY_UNREAD
#define mayRenew(i)	true
#else
#define mayRenew(i)	lease[i]
#endif

/* Who sends renewals that are answered later: a leader, or also the standby that becomes one. */
#ifdef STANDBY_RENEWALS
#define maySend(i)	(does[i] >= WAITING)
#else
#define maySend(i)	(does[i] >= TERM)
#endif

/* A renewal of a leader, until it counts or is lost. */
proctype Renewal(byte i; byte r) {
end:	do
	:: d_step { maySend(i) && request[r] == IDLE && left[i] < TTL && (faults || mayCount(i)) &&
		(mayRenew(i) || unrefused) ->
		printf("@ %d %c.elector sends a renewal\n", tick, NAME(i));
		request[r] = SENT; worth[r] = TTL }
	:: d_step { request[r] == SENT && mayRenew(i) ->
		printf("@ %d etcd renews the lease of %c\n", tick, NAME(i));
		remains[i] = (lease[i] -> LIFE : 0); request[r] = ACKED }
	/* The request arrives twice. */
	:: d_step { faults && request[r] == SENT && lease[i] -> remains[i] = LIFE }

	/* The read that confirms it: our key is there, and the raft term is the same. */
	:: d_step { request[r] == ACKED && does[i] >= TERM && mayCount(i) ->
#ifdef KEY_UNREAD
		printf("@ %d etcd answers %c, in the same raft term\n", tick, NAME(i));
#else
		printf("@ %d etcd answers %c: its key is there, in the same raft term\n", tick, NAME(i));
#endif
		count(i, r) }

	/* A former leader acknowledges it, and nobody else learns of it. */
#ifdef UNCONFIRMED_COUNTS
	:: d_step { request[r] == SENT && does[i] >= TERM && former && mayCount(i) ->
		printf("@ %d etcd acknowledges the renewal of %c, by a former leader\n", tick, NAME(i));
		count(i, r) }
#endif
#ifdef STANDBY_ANSWER_COUNTS
	:: d_step { does[i] == WAITING && request[r] == IDLE && former ->
		printf("@ %d %c.elector sends a renewal\n", tick, NAME(i));
		printf("@ %d etcd acknowledges the renewal of %c, by a former leader\n", tick, NAME(i));
		request[r] = FORMER; worth[r] = TTL }
	:: d_step { request[r] == FORMER && does[i] >= TERM && mayCount(i) -> count(i, r) }
#endif
#ifdef STALE_READS
	:: d_step { request[r] == SENT && former && has[i] ->
		printf("@ %d etcd acknowledges the renewal of %c, by a former leader\n", tick, NAME(i));
		request[r] = FORMER }
	:: d_step { request[r] == FORMER && does[i] >= TERM && mayCount(i) ->
		printf("@ %d etcd answers %c, by a former leader: its key is there, in the same raft term\n",
			tick, NAME(i));
		count(i, r) }
#endif
	:: d_step { request[r] == SENT && former && !unrefused ->
		printf("@ %d etcd acknowledges the renewal of %c, by a former leader\n", tick, NAME(i));
		printf("@ %d %c.elector reads another raft term: the renewal does not count\n", tick,
			NAME(i));
		forget(r) }

	/* The request or an answer is lost, or it is given up. */
	:: d_step { request[r] != IDLE && (faults || !mayCount(i)) -> forget(r) }
	od
}

/* What the read shows: no key is older, and the last renewal is of the same raft term. */
#if defined(NO_WIN_READ)
#define verified(i)	true
#elif defined(WIN_UNCONFIRMED)
#define verified(i)	first(i)
#elif defined(STALE_WIN_READ)
#define verified(i)	(has[i] || first(i) && basis[i] != OTHER)
#else
#define verified(i)	(first(i) && basis[i] != OTHER)
#endif

inline lead(i) {
	does[i] = TERM; start[i] = 1; event[i] = 0; basis[i] = OTHER;
	if
	:: state[i] == connecting -> transit(candidate, state[i], connecting, leading)
	:: state[i] == standby -> transit(candidate, state[i], standby, leading)
	fi
}

/* Whether the next in line may start without another read (-DEARLY_START). */
#ifdef STANDBY_UNCONFIRMED
#define confirmed(i)	true
#else
#define confirmed(i)	(basis[i] == GRANT)
#endif

#ifdef LEADER_UNWATCHED
#define watched(i)	false
#else
#define watched(i)	true
#endif

proctype Elector(byte i) {
end:	do
	/* It joins the queue when no earlier lease of its own is left. The code waits for that only for
	   one request's time. Then its new key waits behind its old one. That is not modelled. */
	:: d_step { does[i] == OUT && !job[i] && !lease[i] && !revoke[i] ->
		printf("@ %d %c.elector gets a lease, and is in the queue\n", tick, NAME(i));
		lease[i] = 1; remains[i] = LIFE; older = 1-i; newest[i] = 1; event[i] = !lease[1-i];
		madeKey(i);
		does[i] = WAITING; left[i] = TTL; basis[i] = GRANT;
		transit(candidate, state[i], connecting, standby) }
	/* It gets the lease, but not the answer. */
	:: d_step { faults && does[i] == OUT && !job[i] && !lease[i] && !revoke[i] ->
		printf("@ %d etcd grants %c a lease, and the answer is lost\n", tick, NAME(i));
		lease[i] = 1; remains[i] = LIFE; older = 1-i; madeKey(i);
		transit(candidate, state[i], connecting, connecting) }

	/* A standby's renewal: it counts; it arrives, and the answer is lost; a former leader
	   acknowledges it. */
	:: d_step { does[i] == WAITING && lease[i] && (left[i] < TTL || basis[i] == OTHER) ->
		printf("@ %d %c.elector renews its lease\n", tick, NAME(i));
		remains[i] = LIFE; left[i] = TTL; basis[i] = SAME }
	:: d_step { faults && does[i] == WAITING && lease[i] -> remains[i] = LIFE }
	:: d_step { does[i] == WAITING && former && left[i] < TTL ->
		printf("@ %d %c.elector counts a renewal that a former leader of etcd acknowledged\n", tick,
			NAME(i));
		left[i] = TTL; basis[i] = OTHER }

	/* A standby whose lease could not be renewed in time shows that it is connecting. */
	:: d_step { does[i] == WAITING && state[i] == standby && !inTime(left[i]) ->
		transit(candidate, state[i], standby, connecting) }
	:: d_step { does[i] == WAITING && state[i] == connecting && inTime(left[i]) ->
		transit(candidate, state[i], connecting, standby) }

#ifndef NO_LOSS_NOTICE
	/* The watch, or the answer to a renewal, shows that the lease is gone. */
	:: d_step { does[i] == WAITING && !lease[i] ->
		printf("@ %d %c.elector learns that its lease is gone\n", tick, NAME(i));
		release(i); campaignAgain(i) }
#endif

	/* It has won: nobody is ahead by the watch, and a read verifies that. The read also confirms
	   the last renewal. */
	:: d_step { does[i] == WAITING && event[i] && inTime(left[i]) && verified(i) ->
		printf("@ %d %c.elector learns that nobody is ahead\n", tick, NAME(i));
#ifndef NO_WIN_READ
		printf("@ %d etcd answers %c: its key is the oldest\n", tick, NAME(i));
#endif
		printf("@ %d %c.elector leads, and asks the guard for the job\n", tick, NAME(i));
		lead(i) }
#ifdef EARLY_START
	/* Its last renewal is confirmed, and the watch shows that nobody is ahead. That is enough. */
	:: d_step { does[i] == WAITING && event[i] && inTime(left[i]) && confirmed(i) ->
		printf("@ %d %c.elector learns that nobody is ahead\n", tick, NAME(i));
		printf("@ %d %c.elector leads without a read, and asks the guard for the job\n", tick,
			NAME(i));
		lead(i) }
	/* It renews as a leader does: a read shows that its key is there, in the same raft term. */
	:: d_step { does[i] == WAITING && lease[i] && (left[i] < TTL || basis[i] != GRANT) ->
		printf("@ %d %c.elector renews its lease, and a read confirms that\n", tick, NAME(i));
		remains[i] = LIFE; left[i] = TTL; basis[i] = GRANT }
#endif
#ifdef COMPACTION_MISSED
	/* The watch has missed events, since etcd has compacted them. It begins anew with a read, and
	   that looks only at who is ahead. */
	:: d_step { does[i] == WAITING && !event[i] && !lease[1-i] ->
		printf("@ %d %c.elector reads the queue anew: nobody is ahead\n", tick, NAME(i));
		event[i] = 1 }
#endif
	/* It has won after stop-at, or ends its session for another reason. */
	:: d_step { faults && does[i] == WAITING -> release(i); campaignAgain(i) }

	/* The job has exited by itself, and is started again in the same term. */
	:: d_step { does[i] == TERM && !job[i] && !start[i] && inTime(left[i]) ->
		printf("@ %d %c.elector asks the guard for the job again\n", tick, NAME(i));
		start[i] = 1 }

	/* The term ends: stop-at has passed, the lease is gone, the job has exited, or a stop. No step
	   waits for the leader's watch. Without it only stop-at ends the term for certain. */
	:: d_step { does[i] == TERM && (faults || watched(i) && !lease[i] || !inTime(left[i])) ->
		printf("@ %d %c.elector ends its term\n", tick, NAME(i));
		does[i] = ENDING; transit(candidate, state[i], leading, stopping) }
	:: d_step { does[i] == ENDING && exited(i) -> release(i); campaignAgain(i) }

	/* The daemon stops, and starts anew. A new process begins in state connecting. */
	:: d_step { faults && does[i] != TERM && !start[i] && (does[i] != ENDING || exited(i)) ->
		release(i);
		if
		:: state[i] == connecting -> transit(candidate, state[i], connecting, stopping)
		:: state[i] == standby -> transit(candidate, state[i], standby, stopping)
		:: state[i] == stopping -> transit(candidate, state[i], stopping, stopping)
		fi;
		state[i] = connecting }
	od
}

proctype Guard(byte i) {
end:	do
#ifdef STARTS_LATE
	:: d_step { start[i] && !job[i] -> begin(i) }
#else
	/* The last check before the fork: stop-at has not passed. */
	:: d_step { start[i] && !job[i] && inTime(left[i]) -> begin(i) }
#endif
	:: d_step { start[i] && (faults || !inTime(left[i]) || does[i] != TERM) ->
		printf("@ %d %c.guard does not start the job\n", tick, NAME(i));
		start[i] = 0 }
	/* The job exits by itself, is stopped, or is killed. */
	:: d_step { job[i] && (faults || does[i] != TERM || !inTime(left[i])) ->
		printf("@ %d %c.job exits\n", tick, NAME(i));
		job[i] = 0 }
	od
}

/*
 * The machine has killed the job while the lease still holds, however its clock drifts.
 * machines.pml shows why.
 */
#ifdef NO_KILL_BY
#define killed(i)	true
#elif defined(KERNEL_LATE)	/* The kill takes all of the margin: no part is left for the drift. */
#define killed(i)	(!job[i] || left[i] > 1)
#else
#define killed(i)	(!job[i] || left[i] > DRIFT + 1)
#endif

#define oneLess(t)	t = (t > 0 -> t - 1 : 0)

inline tickOf(i) {
#ifdef OVERLAP
	overtime[i] = (lease[i] || does[i] < TERM || overtime[i] == TTL -> overtime[i] :
		overtime[i] + 1);
	assert(!job[i] || !job[1-i] || overtime[i] < TTL);	/* never two jobs */
#endif
	oneLess(left[i]);
	oneLess(remains[i]);
	oneLess(worth[SLOTS*i])
#if SLOTS > 1
	;
	oneLess(worth[SLOTS*i + 1])
#endif
}

/* etcd's next leader gives each lease its whole TTL. Who reads from now on sees the next raft
   term. So no renewal of the one before counts any more. */
inline elected(i) {
#ifdef LEASES_SHORTENED
	remains[i] = (remains[i] > 0 -> 1 : 0);
#else
	remains[i] = (lease[i] -> LIFE : 0);
#endif
	formerHas(i);
	basis[i] = (basis[i] == SAME -> OTHER : basis[i]);
	if
	:: request[SLOTS*i] == ACKED -> forget(SLOTS*i)
	:: else
	fi
#if SLOTS > 1
	;
	if
	:: request[SLOTS*i + 1] == ACKED -> forget(SLOTS*i + 1)
	:: else
	fi
#endif
}

proctype World() {
end:	do
	:: d_step { nothingElse && killed(0) && killed(1) -> oneTick; tickOf(0); tickOf(1) }
	:: d_step { faults ->
		printf("@ %d etcd elects a new leader\n", tick);
		former = 1; elected(0); elected(1) }
#ifdef LIVE
	:: d_step { !calm -> calm = 1; former = 0 }
#endif
	od
}

init {
	atomic {
		run World();
		run Renewal(1, SLOTS); run Renewal(0, 0);
#if SLOTS > 1
		run Renewal(1, SLOTS + 1); run Renewal(0, 1);
#endif
		run Etcd(1); run Etcd(0);
		run Guard(1); run Guard(0);
		run Elector(1); run Elector(0)	/* the last one comes first in the shortest traces */
	}
}
