package election

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// fitness is whether a candidate may lead.
type fitness struct {
	changed chan struct{} // room for one: SetUnfit was called

	mu     sync.Mutex
	why    string        // not; "": it may
	since  time.Duration // when that began
	waits  time.Duration // for how long a leader does not hand over because of that
	stays  time.Time     // until when that is
	moves  int           // hand-overs because of that, within rest of each other
	latest time.Duration // the last of them
}

// A leader that is unfit hands over when Config.FitnessRound is over. But if it has done so before
// within rest, it must have been unfit for firstWait more, and twice as long each time: a check
// that passes and fails in turn must not move the job again and again.
const (
	firstWait = time.Minute
	maxWait   = 32 * time.Minute
	rest      = 2 * time.Hour
)

// SetUnfit says why the candidate must not become leader; "": it may. A standby that is unfit
// leaves the queue, and queues again when it is fit. A leader hands over to one that is fit, and
// goes on if there is none.
func (c *Candidate) SetUnfit(why string) {
	f := &c.fitness
	f.mu.Lock()
	if f.why == "" {
		f.since = c.cfg.Now()
		f.waits = f.wait(f.since, c.cfg.FitnessRound)
		f.stays = time.Now().Add(f.waits)
	}
	f.why = why
	f.mu.Unlock()
	poke(f.changed)
}

// unfit is why the candidate must not become leader, or "".
func (f *fitness) unfit() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.why
}

// show adds to a snapshot what is known.
func (f *fitness) show(s *Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s.Unfit = f.why
	if f.why != "" && s.Leading {
		s.StaysUntil = f.stays
	}
}

// wait is how long a leader must have been unfit until it hands over. round is Config.FitnessRound.
// f.mu is held.
func (f *fitness) wait(now, round time.Duration) time.Duration {
	if f.moves > 0 && now-f.latest > rest {
		f.moves = 0
	}
	if f.moves == 0 {
		return round
	}
	return round + min(firstWait<<min(f.moves-1, 10), maxWait)
}

// wantsToLeave reports whether a leader is to hand over, and why.
func (f *fitness) wantsToLeave(now time.Duration) (why string, wants bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.why, f.why != "" && now-f.since >= f.waits
}

// left notes that the leader hands over because it is unfit.
func (f *fitness) left(now time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.moves, f.latest = f.moves+1, now
}

// waitUntilFit waits, outside of the queue, until the candidate may lead. It returns ErrNotElected
// if the time to be elected is over before.
func (s *session) waitUntilFit(ctx context.Context) error {
	wctx, stop := s.waitContext(ctx)
	defer stop()
	tick := time.NewTicker(idleTick)
	defer tick.Stop()
	for why := s.candidate.fitness.unfit(); why != ""; why = s.candidate.fitness.unfit() {
		s.candidate.heartbeat()
		s.state.connecting("unfit: " + why)
		select {
		case <-wctx.Done():
			return fmt.Errorf("%w: unfit: %s", ErrNotElected, why)
		case <-s.candidate.fitness.changed:
		case <-tick.C:
		}
	}
	return nil
}
