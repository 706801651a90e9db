/*
 * The hook after the job: has it undone what the job has done, before the lease is gone?
 *
 * These are steps P1 to P4 of docs/safety.md, within one machine. The job has done something that
 * outlives it: an address is on the machine. Only a run of the hook takes it away. As soon as the
 * lease is gone, the job of another candidate may start, and the address is on its machine.
 *
 * What machines.pml shows is one step here: a start, a renewal that reaches the guard, and the proof
 * that nothing of the job is left. Elector, guard and spawner crash or hang at any step, also two of
 * them, as far as the assumptions of safety.md allow.
 *
 * Time is in ticks, as in machines.pml. A hook takes TAKES at most, and HOOK is its time limit. It is
 * that much longer because a run that ends with its process begins anew.
 *
 * Each switch (-DHOOK_OUTSIDE) is in switches.tsv.
 */

#ifndef TTL
#define TTL	9
#endif
#ifndef MARGIN
#define MARGIN	2
#endif
#ifndef LOSS
#define LOSS	1
#endif
#ifndef HOOK
#define HOOK	4
#endif
#ifndef TAKES
#define TAKES	1
#endif

/* kill-by, as what is left of the lease then */
#ifdef HOOK_OUTSIDE
#define KILL_BY	MARGIN
#else
#define KILL_BY	(MARGIN + HOOK)
#endif

mtype = { up, hung, down };
mtype = { idle, running, killing, postStop };

bit lease;
byte left;	/* of it */
bit other;	/* the job of another candidate is alive */

mtype guard = up, elector = up, spawner = up;
mtype guardJob = idle;
bit job;	/* something of it is alive */
bit address;	/* is on this machine */
bit standsIn;	/* the elector kills in the place of the guard */
bit orphaned;	/* the spawner knows that the guard has exited */
bit due;	/* the spawner: something was started, after which the hook has not run */

/* Runs of the hook, by who has asked: the ticks that each may still take, and one more; 0: none. */
byte byGuard, bySpawner;

#ifdef REPLAY
hidden int tick;
#define oneTick	tick++
#else
#define tick	0
#define oneTick	skip
#endif

#define inTime(t)	((t) > KILL_BY + LOSS)
#define pastKillBy(t)	((t) <= KILL_BY)

inline revokeLease() {
#ifndef ONLY_JOBS
	assert(!job && !address && !byGuard && !bySpawner);	/* never revoked before the hook is over */
#endif
	lease = 0; left = 0
}

/* A run ends well: the address is gone. If the job is alive, it may put it there again. */
inline ends(which) {
	which = 0; address = 0
}

#ifdef STAND_IN_UNAWAITED
#define hookOver	true
#else
#define hookOver	(!due && !bySpawner)
#endif

proctype Etcd() {
end:	do
	:: d_step { lease && left == 0 ->
		printf("@ %d etcd drops the lease, which has expired\n", tick);
		lease = 0 }
	:: d_step { !lease && !other ->
		printf("@ %d b.job starts, with the address\n", tick);
		assert(!job && !address);	/* never on two machines */
		other = 1 }
	:: d_step { other -> printf("@ %d b.job exits\n", tick); other = 0 }
	od
}

proctype Elector() {
end:	do
	:: d_step { elector == up && !standsIn && !lease && !other && guard == up && spawner == up &&
		guardJob == idle ->
		printf("@ %d a.elector has a lease, and leads\n", tick);
		lease = 1; left = TTL }
	:: d_step { elector == up && !standsIn && lease && inTime(left) && left < TTL ->
		printf("@ %d a.elector counts a renewal\n", tick);
		left = TTL }
	:: d_step { elector == up && !standsIn && lease && guard == up && spawner == up &&
		guardJob == idle && inTime(left) ->
		printf("@ %d a.job starts\n", tick);
		guardJob = running; job = 1; due = 1 }
	:: d_step { elector == up && !standsIn && lease && guard == up && guardJob == idle ->
		printf("@ %d a.elector revokes its lease\n", tick);
		revokeLease() }

	/* The guard is lost, or hangs when the job should be gone. */
	:: d_step { elector == up && !standsIn && (guard == down || guard == hung &&
		guardJob != idle && left <= KILL_BY + MARGIN) ->
		printf("@ %d a.elector kills in the place of the guard\n", tick);
		standsIn = 1 }
	:: d_step { elector == up && standsIn && job ->
		printf("@ %d a.elector kills the job\n", tick);
		job = 0 }
	:: d_step { elector == up && standsIn && !job && guard != down ->
		printf("@ %d a.elector kills the guard\n", tick);
		guard = down; byGuard = 0 }
	:: d_step { elector == up && standsIn && !job && guard == down && hookOver ->
		printf("@ %d a.elector revokes its lease, and exits\n", tick);
		if
		:: lease && !other -> revokeLease()
		:: else
		fi;
		elector = down; standsIn = 0 }
	od
}

proctype Guard() {
end:	do
	/* A stop, kill-by, the exit of the job, or the loss of another process. */
	:: d_step { guard == up && guardJob == running ->
		printf("@ %d a.guard begins the kill\n", tick);
		guardJob = killing }
	:: d_step { guard == up && guardJob == killing && job ->
		printf("@ %d a.guard kills the job\n", tick);
		job = 0 }
	:: d_step { guard == up && guardJob == killing &&
#ifndef HOOK_BEFORE_EXIT
		!job &&
#endif
		!byGuard ->
		printf("@ %d a.guard runs the hook\n", tick);
		guardJob = postStop; byGuard = TAKES + 1 }
#ifdef HOOK_UNAWAITED
	:: d_step { guard == up && guardJob == postStop && !job -> guardJob = idle }
#endif
	:: d_step { byGuard ->
		printf("@ %d a.guard has run the hook\n", tick);
		ends(byGuard) }
	:: d_step { guard == up && guardJob == postStop && !byGuard && job -> job = 0 }
	:: d_step { guard == up && guardJob == postStop && !byGuard && !job ->
		due = 0; guardJob = idle }

	/* The elector is replaced, or given up. */
	:: d_step { guard == up && elector != up && !standsIn ->
		printf("@ %d a.guard replaces the elector\n", tick);
		elector = up }
	:: d_step { guard == up && elector != up && !standsIn && guardJob == idle ->
		printf("@ %d a.guard revokes the lease, and exits\n", tick);
		if
		:: lease && !other -> revokeLease()
		:: else
		fi;
		guard = down; spawner = down; elector = down; due = 0 }
	:: d_step { guard == up && spawner == hung ->
		printf("@ %d a.guard kills the spawner\n", tick);
		spawner = down; job = 0 }
	/* Without a spawner the daemon ends. */
	:: d_step { guard == up && spawner == down && guardJob == idle && !standsIn ->
		printf("@ %d a.guard revokes the lease, and exits\n", tick);
		if
		:: lease && !other -> revokeLease()
		:: else
		fi;
		guard = down; elector = down; due = 0 }
	od
}

#ifdef HUNG_ELECTOR_AWAITED
#define spawnersTurn	(elector != hung)
#else
#define spawnersTurn	true
#endif
#ifdef SPAWNER_FORGETS
#define spawnerRuns	false
#else
#define spawnerRuns	(due && !bySpawner && spawnersTurn)
#endif

proctype Spawner() {
end:	do
	:: d_step { spawner == up && guard == down && !orphaned ->
		printf("@ %d a.spawner learns that the guard has exited\n", tick);
		orphaned = 1 }
	:: d_step { spawner == up && orphaned && job ->
		printf("@ %d a.spawner kills the job\n", tick);
		job = 0 }
	:: d_step { spawner == up && orphaned && !job && spawnerRuns ->
		printf("@ %d a.spawner runs the hook\n", tick);
		bySpawner = TAKES + 1 }
	:: d_step { bySpawner ->
		printf("@ %d a.spawner has run the hook\n", tick);
		ends(bySpawner); due = 0 }
	:: d_step { spawner == up && orphaned && !job && !due && !bySpawner ->
		printf("@ %d a.spawner exits\n", tick);
		spawner = down; orphaned = 0 }
#ifdef SPAWNER_FORGETS
	:: d_step { spawner == up && orphaned && !job -> spawner = down; orphaned = 0; due = 0 }
#endif
	od
}

proctype Job() {
end:	do
	:: d_step { job && !address -> printf("@ %d a.job adds the address\n", tick); address = 1 }
	:: d_step { job -> printf("@ %d a.job exits\n", tick); job = 0 }
	od
}

/*
 * Time waits for what is due, at kill-by for the guard, and within the margin for whoever stands in
 * for it. A run of the hook is over in its time.
 */
#define guardOwes	(guard == up && (guardJob == running || guardJob == killing || \
	guardJob == postStop && !byGuard && job))
#define electorOwes	(elector == up && (guard != up && guardJob != idle && !standsIn || \
	standsIn && (job || guard != down)))
#define spawnerOwes	(spawner == up && (guard == down && !orphaned || \
	orphaned && (job || spawnerRuns)))
#define prompt	(byGuard != 1 && bySpawner != 1 && \
	!(pastKillBy(left) && guardOwes) && \
	!(left < KILL_BY && (electorOwes || spawnerOwes || guard == up && spawner == hung)))

#define oneLess(t)	t = (t > 0 -> t - 1 : 0)

proctype World() {
end:	do
	:: d_step { prompt && left > 0 ->
		oneTick;
		oneLess(left);
		oneLess(byGuard); oneLess(bySpawner) }

	/* Of guard and spawner one lives. If the guard hangs, the elector lives. */
	:: d_step { guard == up && spawner == up && !standsIn ->
		printf("@ %d a.guard crashes\n", tick);
		guard = down; byGuard = 0 }
	:: d_step { guard == up && spawner == up && elector == up && !standsIn ->
		printf("@ %d a.guard hangs\n", tick);
		guard = hung }
	:: d_step { guard == hung -> printf("@ %d a.guard goes on\n", tick); guard = up }
	:: d_step { elector != down && (guard == up || guard == down && spawner == up) ->
		printf("@ %d a.elector crashes\n", tick);
		elector = down;
		if
		:: guard == down -> standsIn = 0
		:: else
		fi }
	:: d_step { elector == up && guard != hung && (spawner == up || guard == up) ->
		printf("@ %d a.elector hangs\n", tick);
		elector = hung }
	:: d_step { elector == hung -> printf("@ %d a.elector goes on\n", tick); elector = up }
	:: d_step { spawner == up && guard == up && !standsIn ->
		printf("@ %d a.spawner crashes\n", tick);
		spawner = down; job = 0 }
	:: d_step { spawner == up && guard == up && !standsIn ->
		printf("@ %d a.spawner hangs\n", tick);
		spawner = hung }

	/* The next daemon runs the hook before it does anything else. */
	:: d_step { elector == down && guard == down && spawner == down && !bySpawner ->
		printf("@ %d world a's daemon starts again\n", tick);
		address = 0; elector = up; guard = up; spawner = up; guardJob = idle;
		standsIn = 0; orphaned = 0; due = 0 }
	od
}

init {
	atomic {
		run World(); run Etcd(); run Elector(); run Guard(); run Spawner(); run Job()
	}
}
