/* Two candidates and a lock, for the tests of the program that runs the real model. */
#ifndef TICKS
#define TICKS	3
#endif

bit lock, job[2];
byte tick;

#define name(i)	(97 + i)

proctype Candidate(byte i) {
	do
	:: d_step {
#ifndef NO_LOCK
		!lock &&
#endif
		!job[i] ->
		lock = 1;
		printf("@ %d etcd grants %c a lease\n", tick, name(i));
		job[i] = 1;
		printf("@ %d %c.job starts\n", tick, name(i));
		assert(!(job[0] && job[1])) /* never two jobs */ }
	:: d_step { job[i] ->
		job[i] = 0; lock = 0;
		printf("@ %d %c.job exits\n", tick, name(i));
		printf("@ %d etcd drops the lease of %c\n", tick, name(i)) }
	:: tick == TICKS -> break
	od
}

active proctype World() {
	run Candidate(0);
	run Candidate(1);
	do
	:: d_step { tick < TICKS -> tick++; printf("@ %d world a tick\n", tick) }
	:: tick == TICKS -> break
	od
#ifdef STUCK
	;
	lock == 2
#endif
}
