package election

import (
	"context"
	"errors"
	"time"
)

// lead begins a term, and returns when it has ended. Meanwhile the lease is renewed.
func (s *session) lead(ctx, sctx context.Context, created int64) error {
	lctx, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	s.lease.confirmFrom(created)
	s.lease.leads.Store(true)
	t := &term{end: end, lost: make(chan struct{})}
	deadlines, begun := s.state.elected(t,
		Entry{Identity: s.cfg.Identity, Key: s.key, Token: created})
	if !begun {
		return nil // it took too long to learn that we won
	}
	s.run.elected = true
	s.run.outage.over(queueFails)
	if s.isLost() { // before the term began
		s.state.termEnded(s.lostCause)
	}
	return s.leadTerm(ctx, lctx, sctx, Term{
		Key: s.key, Token: created, LeaseID: s.id,
		Deadlines: deadlines, Timing: s.timing, Lost: t.lost,
	})
}

// obeyHold ends the term if a hold wants that.
func (s *session) obeyHold(token int64) {
	s.publishHold()
	if !s.steering.mayLead(token) {
		s.state.termEnded(ErrHeld)
	}
}

// leadTerm calls Lead, and returns when the term has ended. lctx is the context of Lead,
// and sctx ends with the session.
func (s *session) leadTerm(ctx, lctx, sctx context.Context, t Term) error {
	s.led = true
	led := make(chan error, 1)
	go func() {
		growStack()
		led <- s.cfg.Callbacks.Lead(lctx, t)
	}()
	s.obeyHold(t.Token) // it may have come since the win
	tick := time.NewTimer(0)
	defer tick.Stop()
	stop := ctx.Done()
	plans := make(chan plan, 1)
	planning, served := false, false
	order := s.newPriorities()
	for {
		s.candidate.heartbeat()
		tick.Reset(idleTick)
		select {
		case <-stop:
			stop = nil
			s.state.termEnded(context.Cause(ctx))
		case <-tick.C:
		case <-s.changed:
			s.obeyHold(t.Token)
			asked, ok := s.steering.requested(t.Token, s.adopted && !served)
			if ok && !planning && !order.busy {
				planning = true
				s.running.Go(func() { plans <- s.planSwitchover(sctx, asked) })
			}
			if lctx.Err() == nil && !planning && s.state.get().State == Leading {
				order.look(sctx, s)
			}
		case <-s.candidate.fitness.changed:
			order.next = 0 // to whom could we hand over?
			poke(s.changed)
		case l := <-order.done:
			if order.busy = false; lctx.Err() == nil {
				order.settle(sctx, s, l)
			}
			poke(s.changed) // a request may wait for that
		case p := <-order.back:
			if order.busy = false; lctx.Err() == nil && s.isStill(p) &&
				s.serve(p) && p.unfit {
				s.candidate.fitness.left(s.cfg.Now())
			}
			poke(s.changed)
		case p := <-plans:
			planning = false
			served = s.serve(p)
		case <-s.queue.changed:
			v, _ := s.queue.view()
			s.state.queueChanged(v.leader(), v.blocker)
		case err := <-led:
			switch { // Lead may have learned of the end before we did
			case ctx.Err() != nil:
				s.state.termEnded(context.Cause(ctx))
			case s.cfg.Now() >= s.state.get().Deadlines.StopAt:
				s.state.termEnded(ErrContactLost)
			}
			cause := context.Cause(lctx)
			s.state.leadReturned(cause)
			s.cfg.Callbacks.Ended(cause, err)
			if cause != nil && errors.Is(err, cause) {
				return nil // Lead failed only because the term ended
			}
			return err
		}
	}
}
