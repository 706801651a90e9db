package election

import (
	"context"
	"fmt"
	"time"
)

// SetUnfit says why the candidate must not become leader; "": it may. A standby that is unfit
// leaves the queue, and queues again when it is fit. A leader goes on.
func (c *Candidate) SetUnfit(why string) {
	c.unfitWhy.Store(&why)
	poke(c.fitChanged)
}

// unfit is why the candidate must not become leader, or "".
func (c *Candidate) unfit() string {
	if why := c.unfitWhy.Load(); why != nil {
		return *why
	}
	return ""
}

// waitUntilFit waits, outside of the queue, until the candidate may lead. It returns ErrNotElected
// if the time to be elected is over before.
func (s *session) waitUntilFit(ctx context.Context) error {
	wctx, stop := s.waitContext(ctx)
	defer stop()
	tick := time.NewTicker(idleTick)
	defer tick.Stop()
	for why := s.candidate.unfit(); why != ""; why = s.candidate.unfit() {
		s.candidate.heartbeat()
		s.state.connecting("unfit: " + why)
		select {
		case <-wctx.Done():
			return fmt.Errorf("%w: unfit: %s", ErrNotElected, why)
		case <-s.candidate.fitChanged:
		case <-tick.C:
		}
	}
	return nil
}
