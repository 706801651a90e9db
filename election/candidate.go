package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// Candidate takes part in an election.
//
//	Run ── session ── standby ── lead     one goroutine
//	          ├─ lease.run                renews; each attempt has a goroutine of its own
//	          ├─ queue.run                reads and watches the election's keys
//	          ├─ campaign                 while standby: puts the key, waits, verifies
//	          └─ Callbacks.Lead           while leading
//
// What each type owns: Candidate the configuration, the state machine and the metrics; run what
// outlasts a session; session one lease and the key bound to it; term what Lead needs to know.
type Candidate struct {
	cfg        Config
	log        *slog.Logger
	metrics    *metrics
	state      *machine
	heartbeats heartbeats
	fitness    fitness
	queue      atomic.Pointer[queue] // of the session that runs; nil: none does
}

// New checks the configuration, as far as that can be done without etcd.
func New(cfg Config) (*Candidate, error) {
	if err := cfg.Timing(cfg.TTL).Validate(); err != nil {
		return nil, err
	}
	if cfg.Election == "" {
		return nil, errors.New("no election")
	}
	if a := cfg.Adopt; a != nil && a.LeaseID != 0 && a.TTL <= 0 {
		return nil, fmt.Errorf("the lease %x to be adopted has the TTL %v", a.LeaseID, a.TTL)
	}
	if _, err := newMembers(cfg); err != nil {
		return nil, err
	}
	c := &Candidate{cfg: cfg, log: cfg.Logger, fitness: fitness{changed: make(chan struct{}, 1)}}
	c.state = newMachine(cfg)
	var err error
	c.metrics, err = newMetrics(cfg.Registerer, c.Snapshot, cfg.Now)
	c.state.metrics = c.metrics
	return c, err
}

// Snapshot returns what the candidate knows now.
func (c *Candidate) Snapshot() Snapshot {
	s := c.state.get()
	s.LastHeartbeat = c.heartbeats.oldest()
	c.fitness.show(&s)
	return s
}

// Ahead returns how many keys are ahead of ours, and the identities of the first ones, n at most.
// known is false as long as that is not read. In a long queue it is of some seconds ago.
func (c *Candidate) Ahead(n int) (count int, first []string, known bool) {
	if q := c.queue.Load(); q != nil {
		return q.ahead(n)
	}
	return 0, nil, false
}

// run is what one call of Run keeps from session to session.
type run struct {
	members   *members
	leftovers *leftovers
	outage    *outage
	started   time.Duration
	elected   bool // at least once
	// nestedChecked: we have looked, and there was no election within or around ours.
	nestedChecked bool
}

// Run takes part in the election until ctx ends, which is a planned stop: the term, if one runs,
// ends with the cause of ctx, and when Lead has returned the lease is revoked. Run returns nil
// then. It returns ErrNotElected or ErrUnreachable, with the cause, when Config.Wait has passed, or
// what Lead or Callbacks.Releasing returned.
func (c *Candidate) Run(ctx context.Context) error {
	members, err := newMembers(c.cfg)
	if err != nil {
		return err
	}
	defer members.close()
	defer c.heartbeats.run.stop()
	if c.cfg.Adopt == nil { // else the first renewal comes before
		prepareMessages()
	}
	defer c.startBeside(ctx, members)()
	r := &run{
		members: members, started: c.cfg.Now(),
		leftovers: newLeftovers(context.WithoutCancel(ctx), members, &c.cfg),
		outage:    &outage{log: c.log, now: c.cfg.Now},
	}
	defer r.leftovers.close()
	if id := c.cfg.Recovered; id != 0 {
		// The request may arrive at any time later. Our own lease has another id.
		r.leftovers.add(&leaving{lease: id, key: c.cfg.keyOf(id), exited: c.cfg.exited(id)})
	}
	adoption := c.cfg.Adopt
	for {
		s := newSession(c, r)
		start := s.start
		if adoption != nil && adoption.LeaseID != 0 {
			start = s.adopt(*adoption)
		}
		adoption = nil
		err := start(ctx)
		var resigned *Backoff
		switch {
		case errors.As(err, &resigned):
			c.state.connecting(fmt.Sprintf("resigned, campaigning again in %v",
				resigned.For.Round(time.Millisecond)))
			c.sleep(ctx, resigned.For)
		case err != nil:
			return err
		}
		if ctx.Err() != nil {
			c.state.runEnded()
			return nil
		}
	}
}

// idleTick is for how long a loop has nothing to do before it wakes up for a heartbeat. A renewal
// comes before, unless the TTL is long or etcd does not answer.
const idleTick = HeartbeatInterval * 4 / 5

// heartbeat marks a heartbeat of Run's loop.
func (c *Candidate) heartbeat() { c.heartbeats.run.mark(c.cfg.Now()) }

// sleep waits, and marks heartbeats of Run's loop meanwhile.
func (c *Candidate) sleep(ctx context.Context, d time.Duration) {
	pauseWith(ctx, d, c.heartbeat)
}

// pauseWith waits, and marks heartbeats meanwhile.
func pauseWith(ctx context.Context, d time.Duration, heartbeat func()) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	tick := time.NewTicker(HeartbeatInterval / 2)
	defer tick.Stop()
	for {
		heartbeat()
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-tick.C:
		}
	}
}

// requestTimeout bounds a request that is made over all members.
func (cfg *Config) requestTimeout() time.Duration {
	return min(max(cfg.TTL/5, 2*cfg.DialTimeout), HeartbeatInterval/2)
}

// hedgeDelay is for requests that are made before we know which TTL etcd grants.
func (cfg *Config) hedgeDelay() time.Duration { return Timing{TTL: cfg.TTL}.hedgeDelay() }

// heartbeats are those of the candidate's loops.
type heartbeats struct{ run, lease, queue heartbeat }

// heartbeat is when a loop last began a round, in time since boot; 0: it does not run.
type heartbeat struct{ last atomic.Int64 }

func (h *heartbeat) mark(now time.Duration) { h.last.Store(int64(now)) }
func (h *heartbeat) stop()                  { h.last.Store(0) }

// oldest returns the heartbeat of the loop whose last one is the oldest; 0: none runs.
func (h *heartbeats) oldest() (oldest time.Duration) {
	for _, h := range []*heartbeat{&h.run, &h.lease, &h.queue} {
		if t := time.Duration(h.last.Load()); t != 0 && (oldest == 0 || t < oldest) {
			oldest = t
		}
	}
	return oldest
}

// retry is a wait between attempts: none at first, then 100 ms doubling to most.
type retry struct {
	pause time.Duration
	most  time.Duration // 0: a second
}

func (r *retry) sleep(ctx context.Context) { pause(ctx, r.next()) }

// next returns how long to wait before the next attempt.
func (r *retry) next() time.Duration {
	now := min(r.pause, cmp.Or(r.most, time.Second))
	r.pause = max(2*now, 100*time.Millisecond)
	if now == 0 {
		return 0
	}
	return now*4/5 + rand.N(now*2/5)
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// poke sends to a channel that has room for one, unless it is full.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
