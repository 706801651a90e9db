package election

import (
	"context"
	"fmt"
	"math"
)

// unconfirmed is a raft term that no read has: we know of no renewal that counts, or not by which
// of etcd's leaders it was made.
const unconfirmed = math.MaxUint64

// adopt makes the session one with the lease and the key of a process before this one, and returns
// what it has to do with them, in place of start.
//
// What another process has sent may arrive at any time. A renewal does no harm, because it only
// lengthens the lease. A campaign that puts the key finds it there. Of a release we know, because
// it was announced before it was sent.
//
// Nothing that we are told counts as a renewal. The deadlines of a term go on, and a renewal of our
// own moves them only after a read has confirmed it. A standby has none until its first renewal.
func (s *session) adopt(a Adoption) func(ctx context.Context) error {
	s.id, s.key = a.LeaseID, s.cfg.keyOf(a.LeaseID)
	s.adopted, s.announced = true, a.Releasing
	s.timing = s.cfg.Timing(a.TTL)
	s.created.Store(a.Created)
	s.run.nestedChecked = a.Created != 0 // before the key was put
	s.log.Info("took over a lease", "lease", fmt.Sprintf("%x", s.id),
		"leading", a.Leading, "releasing", a.Releasing)
	goOn := s.queueAgain
	switch {
	case a.Leading:
		s.run.elected = true
		goOn = func(ctx, sctx context.Context) error { return s.leadOn(ctx, sctx, a) }
	case a.Releasing, a.Created == 0:
		return func(ctx context.Context) error { return s.release(ctx, func() {}) }
	}
	return func(ctx context.Context) error { return s.open(ctx, goOn) }
}

// adoptLease renews the lease, the first time at once. created is that of leaseConfig.
func (s *session) adoptLease(ctx context.Context, d Deadlines, created int64) {
	s.startLease(ctx, leaseConfig{
		granted:   granted{ttl: s.timing.TTL, raftTerm: unconfirmed},
		deadlines: d, created: created,
	})
}

// queueAgain keeps the place in the queue.
func (s *session) queueAgain(ctx, sctx context.Context) error {
	wctx, stop := s.waitContext(ctx)
	defer stop()
	s.state.leased(s.id, s.timing.TTL, Deadlines{})
	s.queue.put(s.created.Load())
	s.adoptLease(sctx, Deadlines{}, 0)
	created, err := s.standby(wctx, sctx)
	if ctx.Err() != nil || err != nil || created == 0 {
		return unlessStopped(ctx, err)
	}
	return s.lead(ctx, sctx, created)
}

// leadOn goes on with the term. Whatever has happened to it, its job may be alive. So Lead is
// called, and the lease is renewed until Lead returns.
func (s *session) leadOn(ctx, sctx context.Context, a Adoption) error {
	lctx, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	t := &term{end: end, lost: make(chan struct{})}
	s.state.leased(s.id, s.timing.TTL, a.Deadlines)
	s.state.adopted(t, Entry{Identity: s.cfg.Identity, Key: s.key, Token: a.Created})
	switch {
	case a.Releasing, a.Created == 0:
		s.lost(ErrLeaseLost) // or it may be at any moment
	case s.isLost(): // the watch was faster
		s.state.termEnded(s.lostCause)
	case s.cfg.Now() >= a.Deadlines.StopAt:
		s.contactLost()
	case a.Ending:
		s.state.termEnded(ErrEnded)
	}
	s.queue.put(a.Created)
	s.adoptLease(sctx, a.Deadlines, a.Created)
	s.lease.leads.Store(true)
	return s.leadTerm(ctx, lctx, sctx, Term{
		Key: s.key, Token: a.Created, LeaseID: s.id, Adopted: true,
		Deadlines: a.Deadlines, Timing: s.timing, Lost: t.lost,
	})
}
