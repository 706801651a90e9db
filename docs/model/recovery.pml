/*
 * Everything lost at once: may the next daemon revoke the lease of the one before?
 *
 * With STATE_DIR a daemon keeps a small file: boot id, namespaces, the cgroup of its jobs, election
 * and lease. All processes of the daemon hold the file's lock. The next daemon that gets the lock
 * proves by the file that the old job has exited, and revokes the old lease. Otherwise the lease
 * has to expire.
 *
 * While a process of the daemon lives, the job has exited before its lease can end: machines.pml
 * shows that. If all are killed at once, a job that has left its cgroup survives: BOTH_KILLED in
 * safety.md. So here a lease expires only when its job has exited. The question is whether recovery
 * revokes one earlier. That has nothing to do with clocks, so there is no time here.
 *
 * Where the daemon runs is chosen at the beginning:
 * - isInit: the guard is process 1 of its container. If it ends, the kernel ends all in there.
 * - sees: the next daemon is in the same namespaces: it sees the old processes and their cgroup.
 * - mayLeave: the job has the right to leave its cgroup.
 *
 * There are two leases: the daemon's, and that of the daemon before. The guard is guard and elector
 * in one. The request to revoke may come late, also when the next daemon has crashed: it names the
 * old lease, whose job has exited for good. So it is not kept beyond a crash.
 *
 * A line that begins with @ is for the reader of a trace. Each switch (-DLOCK_IGNORED) is in
 * switches.tsv.
 */

/* Where it runs */
bit isInit, sees, mayLeave;

/* etcd */
bit lease[2];
bit other;	/* the job of another candidate is alive */

/* The daemon */
bit guard, spawner;	/* they live, and hold the lock */
bit current;	/* its lease */
bit joined;	/* it has one, or had one that it does not know to be gone */
bit fork;	/* the spawner is about to start the job */

/* The job of each lease */
bit inside[2];	/* in the cgroup of its start */
bit outside[2];	/* it has left that */

/* The file */
bit written;
bit names;	/* the lease */
bit namesCgroup;	/* the cgroup that it names has all starts under that lease */
bit earlierBoot;	/* the machine was started again since */

/* The next daemon */
mtype = { absent, started, locked, emptied, revoking };
mtype next = absent;
bit copy;	/* it was started with a copy of the file, here or on another machine */

#ifdef LIVE
bit calm;
#define faults	(!calm)
ltl again { [] (calm -> <> (inside[0] || inside[1] || outside[0] || outside[1])) }
#else
#define faults	true
#endif

#define tick	0
#define forking(i)	(fork && current == i)
#define alive(i)	(inside[i] || outside[i] || forking(i))
#define noJob	(!inside[0] && !inside[1] && !outside[0] && !outside[1])

/* A file is bound to its place: it names its own inode. So a copy is refused. */
#ifdef COPY_TRUSTED
#define refused	false
#else
#define refused	copy
#endif

/* Who holds the lock */
#if defined(LOCK_IGNORED)
#define lockFree	true
#elif defined(SPAWNER_UNLOCKED)
#define lockFree	(copy || !guard)
#else
#define lockFree	(copy || !guard && !spawner)
#endif

/* What proves that the job of the old lease has exited, once the lock is free */
#ifdef NAMESPACE_ASSUMED
#define endedWithInit	(isInit || !sees)
#else
#define endedWithInit	isInit
#endif
#ifdef CGROUP_ALONE
#define cgroupHasAll	sees
#else
#define cgroupHasAll	(sees && !mayLeave)
#endif
#ifdef REVOKES_FIRST
#define proven	(next == locked)
#else
#define proven	(next == locked && (earlierBoot || copy || endedWithInit) || \
	next == emptied && cgroupHasAll)
#endif

proctype Etcd() {
end:	do
	:: d_step { lease[0] && !guard && !alive(0) ->
		printf("@ %d etcd drops the lease, which has expired\n", tick);
		lease[0] = 0 }
	:: d_step { lease[1] && !guard && !alive(1) ->
		printf("@ %d etcd drops the lease, which has expired\n", tick);
		lease[1] = 0 }
	:: d_step { guard && lease[1-current] && !alive(1-current) ->
		printf("@ %d etcd drops the old lease, which has expired\n", tick);
		lease[1-current] = 0 }
	:: d_step { faults && !lease[0] && !lease[1] && !other ->
		printf("@ %d b.job starts\n", tick);
		assert(noJob);	/* never two jobs */
		other = 1 }
	:: d_step { other ->
		printf("@ %d b.job exits\n", tick);
		other = 0 }
	od
}

/* ---- a daemon that runs as ever ---- */

proctype Guard() {
end:	do
	/* It waits for its turn behind the old lease. */
	:: d_step { guard && !joined && !lease[1-current] ->
		printf("@ %d a.elector has a lease, and is in the queue\n", tick);
		lease[current] = 1; joined = 1;
		written = 1; names = current; namesCgroup = 0; earlierBoot = 0 }
	/* The file names the cgroup before a job is in it. The old job of this machine has exited, or
	   its lease would be there. */
	:: d_step { guard && spawner && joined && lease[current] && !lease[1-current] && !other &&
		!alive(current) ->
		printf("@ %d a.guard asks the spawner for the job\n", tick);
		fork = 1;
#ifdef WRITTEN_LATE
		namesCgroup = 0
#else
		namesCgroup = 1
#endif
		}
#ifdef WRITTEN_LATE
	:: d_step { guard && inside[current] && !namesCgroup ->
		namesCgroup = 1 }
#endif
	/* It kills the job, the spawner helps, and it goes on, or gives up its lease. */
	:: d_step { faults && guard && spawner && joined && alive(current) ->
		printf("@ %d a.guard kills the job\n", tick);
		inside[current] = 0; outside[current] = 0; fork = 0 }
	:: d_step { faults && guard && joined && !alive(current) ->
		printf("@ %d a.elector revokes its lease\n", tick);
		lease[current] = 0; joined = 0 }
	:: d_step { guard && joined && !lease[current] && alive(current) ->
		printf("@ %d a.guard kills the job\n", tick);
		inside[current] = 0; outside[current] = 0; fork = 0 }
	:: d_step { guard && joined && !lease[current] && !alive(current) -> joined = 0 }
	/* A planned end */
	:: d_step { faults && guard && !joined ->
		printf("@ %d a.guard exits\n", tick);
		guard = 0; spawner = 0 }
	od
}

proctype Spawner() {
end:	do
	:: d_step { spawner && fork ->
		printf("@ %d a.job starts\n", tick);
		assert(!other && !inside[1-current] && !outside[1-current]);	/* never two jobs */
		fork = 0; inside[current] = 1 }
	/* The guard has exited: it kills the job, proves that, and exits. It is the parent of all that
	   it has started, so it finds also what has left the cgroup. */
	:: d_step { spawner && !guard && alive(current) ->
		printf("@ %d a.spawner kills the job\n", tick);
		inside[current] = 0; outside[current] = 0; fork = 0 }
	:: d_step { spawner && !guard && !alive(current) ->
		printf("@ %d a.spawner exits\n", tick);
		spawner = 0 }
	od
}

proctype Job(byte i) {
end:	do
	:: d_step { faults && inside[i] && mayLeave && !outside[i] ->
		printf("@ %d a.job leaves its cgroup\n", tick);
		outside[i] = 1;
		if
		:: inside[i] = 0
		:: skip
		fi }
	:: d_step { faults && inside[i] ->
		if
		:: !outside[i] -> printf("@ %d a.job exits\n", tick)
		:: else
		fi;
		inside[i] = 0 }
	/* What nobody looks after exits some time, too. */
	:: d_step { (faults || !guard || i != current) && (inside[i] || outside[i]) ->
		printf("@ %d a.job exits\n", tick);
		inside[i] = 0; outside[i] = 0 }
	od
}

/* ---- the next daemon ---- */

inline forgetNext() {
	next = absent; copy = 0
}

proctype Next() {
end:	do
	/* It is started when the old one has exited, or while that one still runs. */
	:: d_step { next == absent && (faults || !guard) ->
		printf("@ %d a.next starts\n", tick);
		next = started }
	:: d_step { faults && next == absent && written ->
		printf("@ %d a.next starts, with a copy of the file\n", tick);
		next = started; copy = 1 }
	:: d_step { next == started && lockFree && !refused ->
		printf("@ %d a.next has the lock of the file\n", tick);
		next = locked }
	/* It can't have the lock, or the file is refused. It is a candidate like any other. */
	:: d_step { next == started && (guard && !copy || refused) -> forgetNext() }

	/* It kills what is left in the cgroup, where it sees that. */
	:: d_step { next == locked && written && sees && !copy ->
		printf("@ %d a.next kills what is left in the cgroup\n", tick);
		if
		:: namesCgroup -> inside[names] = 0
		:: else
		fi;
		next = emptied }
	:: d_step { (next == locked || next == emptied) && written && lease[names] &&
		proven ->
		printf("@ %d a.next asks etcd to revoke the old lease\n", tick);
		next = revoking }
	:: d_step { next == revoking ->
		printf("@ %d etcd revokes the lease\n", tick);
#ifndef ONLY_JOBS
		assert(!alive(names));	/* never revoked before the job has exited */
#endif
		lease[names] = 0;
		next = emptied }

	/* It is the daemon from now on. */
	:: d_step { (next == locked || next == emptied) && !copy && !guard && !spawner &&
		!lease[1-current] ->
		printf("@ %d world a's daemon starts again\n", tick);
		current = 1-current; joined = 0; guard = 1; spawner = 1; fork = 0;
		forgetNext() }
	/* It crashes, or ends, or its copy was of no use. */
	:: d_step { (faults || copy) && next != absent ->
		printf("@ %d a.next crashes\n", tick);
		forgetNext() }
	od
}

/* ---- faults ---- */

/* The kernel ends the container, before anybody starts the next. */
#ifdef CONTAINER_OUTLIVED
#define endsContainer	false
#else
#define endsContainer	isInit
#endif

inline containerEnds() {
	if
	:: endsContainer -> spawner = 0; fork = 0; inside[current] = 0; outside[current] = 0
	:: else
	fi
}

proctype World() {
end:	do
	:: d_step { faults && guard ->
		printf("@ %d a.guard crashes\n", tick);
		guard = 0;
		containerEnds() }
	/* All are killed at once. The kernel kills the job's first process with its parent. */
	:: d_step { faults && (guard || spawner) ->
		printf("@ %d a.guard crashes, and the spawner too\n", tick);
		guard = 0; spawner = 0; fork = 0;
		containerEnds() }
	:: d_step { faults && written && !earlierBoot ->
		printf("@ %d world a's machine starts again\n", tick);
		guard = 0; spawner = 0; fork = 0; joined = 0;
		inside[0] = 0; inside[1] = 0; outside[0] = 0; outside[1] = 0;
		earlierBoot = 1;
		forgetNext() }
#ifdef LIVE
	:: d_step { !calm -> calm = 1; copy = 0 }
#endif
	od
}

init {
	atomic {
		if
		:: isInit = 1; sees = 0
		:: isInit = 0; sees = 0
		:: isInit = 0; sees = 1
		fi;
		if
		:: mayLeave = 0
		:: mayLeave = 1
		fi;
		run World(); run Etcd(); run Next(); run Job(1); run Job(0); run Spawner(); run Guard()
	}
}
