package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Candidate takes part in an election.
//
//	Run ── session ── standby ── lead      one goroutine: it makes all transitions
//	          ├─ lease.run                 renews; each attempt has a goroutine of its own
//	          ├─ queue.run                 reads and watches the election's keys
//	          ├─ Election.Campaign         while standby
//	          └─ Callbacks.Lead               while leading
type Candidate struct {
	cfg     Config
	prefix  string // of the keys: the election's name and a slash
	log     *slog.Logger
	metrics *metrics
	turns   struct{ run, lease, queue atomic.Int64 } // since boot; 0: the loop does not run

	warned   string // the last reason warned of, and when that was; Run's goroutine alone uses both
	warnedAt time.Duration

	mu       sync.Mutex
	snapshot Snapshot
	term     *term // from before Lead is called until it has returned
}

// term is the leadership that Lead is told of.
type term struct {
	end         context.CancelCauseFunc
	over        bool // end was called
	contactLost bool // stop-at has passed
	lost        chan struct{}
	gone        bool // lost is closed
}

// New checks the configuration, as far as that can be done without etcd.
func New(cfg Config) (*Candidate, error) {
	if err := NewTiming(cfg.TTL, cfg.LossGrace, cfg.Margin).Validate(); err != nil {
		return nil, err
	}
	if cfg.Election == "" {
		return nil, errors.New("no election")
	}
	if _, err := newMembers(cfg); err != nil {
		return nil, err
	}
	c := &Candidate{cfg: cfg, prefix: cfg.Election + "/", log: cfg.Logger}
	c.snapshot = Snapshot{State: Connecting, Reason: "not started", Since: time.Now()}
	var err error
	c.metrics, err = newMetrics(cfg.Registerer, c.Snapshot, cfg.Now)
	return c, err
}

// Snapshot tells what the candidate knows now.
func (c *Candidate) Snapshot() Snapshot {
	c.mu.Lock()
	s := c.snapshot
	c.mu.Unlock()
	for _, turned := range []*atomic.Int64{&c.turns.run, &c.turns.lease, &c.turns.queue} {
		if t := time.Duration(turned.Load()); t != 0 && (s.LastHeartbeat == 0 || t < s.LastHeartbeat) {
			s.LastHeartbeat = t
		}
	}
	return s
}

// update changes the snapshot.
func (c *Candidate) update(change func(*Snapshot)) {
	c.mu.Lock()
	change(&c.snapshot)
	c.mu.Unlock()
	c.changed()
}

func (c *Candidate) changed() {
	if c.cfg.Changed != nil {
		c.cfg.Changed()
	}
}

// transition enters a state. The reason tells why the candidate is not in the election.
func (c *Candidate) transition(to State, reason string) {
	c.mu.Lock()
	from, old := c.snapshot.State, c.snapshot.Reason
	if from != to {
		c.snapshot.Since = time.Now()
	}
	c.snapshot.State, c.snapshot.Reason = to, reason
	c.mu.Unlock()
	if from == to && old == reason {
		return
	}
	if from != to {
		c.log.Info("state changed", "from", from, "to", to, "reason", reason)
	}
	c.changed()
}

// warnPause is the least time between two warnings of why the candidate can't take part.
const warnPause = 10 * time.Second

// failing enters Connecting because something fails, and warns of it: at each new reason, but not at every attempt.
func (c *Candidate) failing(reason string) {
	c.transition(Connecting, reason)
	if now := c.cfg.Now(); c.warned != reason && (c.warned == "" || now-c.warnedAt > warnPause) {
		c.warned, c.warnedAt = reason, now
		c.log.Warn("not in the election, trying again", "reason", reason)
	}
}

// endTerm ends the term that runs, if any. The first cause counts, but a loss is always passed on.
func (c *Candidate) endTerm(cause error) {
	c.mu.Lock()
	t := c.term
	if t == nil {
		c.mu.Unlock()
		return
	}
	first, lost := !t.over, errors.Is(cause, ErrLeaseLost) || errors.Is(cause, ErrKeyDeleted)
	if first {
		t.over = true
		c.snapshot.State, c.snapshot.Reason, c.snapshot.Leading, c.snapshot.Since = Stopping, cause.Error(), false, time.Now()
		t.end(cause)
	}
	if lost && !t.gone {
		t.gone = true
		close(t.lost)
	}
	if errors.Is(cause, ErrContactLost) {
		t.contactLost = true
	}
	c.mu.Unlock()
	if reason, ok := lossReasons[cause]; ok && first {
		c.metrics.losses.WithLabelValues(reason).Inc()
	}
	if first {
		c.log.Info("state changed", "from", Leading, "to", Stopping, "reason", cause)
		c.changed()
	}
}

// retry is a wait between attempts: none at first, then 100 ms doubling to 1 s.
type retry struct{ pause time.Duration }

func (r *retry) sleep(ctx context.Context) {
	if r.pause > 0 {
		pause(ctx, r.pause*4/5+rand.N(r.pause*2/5))
	}
	r.pause = min(max(2*r.pause, 100*time.Millisecond), time.Second)
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// Run takes part in the election until ctx ends, which is a planned stop: the term, if one runs, ends with the cause of ctx, and
// when Lead has returned the lease is revoked. Run returns nil then, ErrNotElected when the candidate was not elected in
// time, or what Lead returned.
func (c *Candidate) Run(ctx context.Context) error {
	ms, err := newMembers(c.cfg)
	if err != nil {
		return err
	}
	defer ms.close()
	defer c.turns.run.Store(0)
	r := &runner{Candidate: c, members: ms, started: c.cfg.Now()}
	leftovers, cancel := context.WithCancel(context.WithoutCancel(ctx))
	r.leftovers = leftovers
	defer r.revoking.Wait()
	defer cancel()
	for {
		err := r.session(ctx)
		var resigned *Backoff
		switch {
		case errors.As(err, &resigned):
			c.transition(Connecting, fmt.Sprintf("resigned, campaigning again in %v", resigned.For.Round(time.Millisecond)))
			r.sleep(ctx, resigned.For)
		case err != nil:
			return err
		}
		if ctx.Err() != nil {
			c.transition(Stopping, "")
			return nil
		}
	}
}

// runner is what one Run keeps from session to session.
type runner struct {
	*Candidate
	members *members
	started time.Duration
	elected bool // at least once

	// leftovers ends when Run returns, and with it what is revoking.
	leftovers context.Context
	revoking  sync.WaitGroup
	leftover  chan struct{} // closed when the last of them is revoked; nil: there was none
}

// turn marks that the loop of Run has turned.
func (r *runner) turn() { r.turns.run.Store(int64(r.cfg.Now())) }

// sleep waits, and turns meanwhile.
func (r *runner) sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	tick := time.NewTicker(HeartbeatInterval / 2)
	defer tick.Stop()
	for {
		r.turn()
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case <-tick.C:
		}
	}
}

// patient returns a context that also ends when it is too late to be elected.
func (r *runner) patient(ctx context.Context) (context.Context, context.CancelFunc) {
	wait := r.cfg.Wait
	switch {
	case r.elected || wait < 0:
		return context.WithCancel(ctx)
	case wait == 0:
		wait = r.cfg.TTL // to join and look takes that long only when something is wrong
	}
	return context.WithTimeout(ctx, max(0, r.started+wait-r.cfg.Now()))
}

// requestTimeout bounds a request that is made over all members.
func (c *Candidate) requestTimeout() time.Duration {
	return min(max(c.cfg.TTL/5, 2*c.cfg.DialTimeout), HeartbeatInterval/2)
}

func (c *Candidate) hedgeDelay() time.Duration { return Timing{TTL: c.cfg.TTL}.hedgeDelay() }

// granted is a lease as etcd granted it.
type granted struct {
	ttl, sent time.Duration
	raftTerm  uint64 // of the member that only says so; 0 where a majority has granted it
}

// grant asks for the lease with our own id, so that it can be revoked even if no reply ever comes.
func (r *runner) grant(ctx context.Context, id int64) (granted, error) {
	// Not called off by a stop: a revocation would overtake the grant, find no lease, and leave one behind.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.requestTimeout())
	defer cancel()
	return hedge(ctx, r.members, r.hedgeDelay(), func(ctx context.Context, m *member) (granted, error) {
		conn, err := m.conn()
		if err != nil {
			return granted{}, err
		}
		seconds := int64((r.cfg.TTL + time.Second - 1) / time.Second)
		sent := r.cfg.Now()
		resp, err := pb.NewLeaseClient(conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: seconds, ID: id})
		switch err = rpctypes.Error(err); {
		case errors.Is(err, rpctypes.ErrLeaseExist):
			// The same request was sent before, and its answer is late or lost. What came of it a renewal tells.
			sent = r.cfg.Now()
			renewed, err := m.renew(ctx, id)
			return granted{renewed.ttl, sent, renewed.term}, err
		case err != nil:
			return granted{}, err
		case resp.Error != "":
			return granted{}, errors.New(resp.Error)
		}
		return granted{ttl: time.Duration(resp.TTL) * time.Second, sent: sent}, nil
	})
}

// leaving is what a session leaves in etcd.
type leaving struct {
	lease   int64
	key     string
	created int64 // the key's create revision; 0: it was not put
}

// revoke gives up the key and the lease. The job has exited. The key goes by itself, and first: one that was overwritten does not
// go with the lease, and would keep all others waiting for ever; and the next leader waits for no more than the key.
func (r *runner) revoke(ctx context.Context, l leaving, bound time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	var keyErr error
	if l.created != 0 {
		half, cancel := context.WithTimeout(ctx, bound/2)
		_, keyErr = hedge(half, r.members, r.hedgeDelay(), func(ctx context.Context, m *member) (struct{}, error) {
			return struct{}{}, m.remove(ctx, l.key, l.created)
		})
		cancel()
	}
	_, err := hedge(ctx, r.members, r.hedgeDelay(), func(ctx context.Context, m *member) (struct{}, error) {
		return struct{}{}, m.revoke(ctx, l.lease)
	})
	return errors.Join(keyErr, err)
}

// revokeLeftover goes on revoking a lease that could not be revoked when its session ended. Its key keeps all others waiting, and
// that it expires in a TTL is not certain: a renewal that was sent into a dark network can arrive long after. When Run ends there is
// one last attempt, as for the lease of a session that a planned stop ends.
func (r *runner) revokeLeftover(l leaving) {
	done := make(chan struct{})
	r.leftover = done
	r.revoking.Go(func() {
		defer close(done)
		var wait retry
		for r.leftovers.Err() == nil {
			if r.revoke(r.leftovers, l, r.requestTimeout()) == nil {
				return
			}
			wait.sleep(r.leftovers)
		}
		_ = r.revoke(context.WithoutCancel(r.leftovers), l, r.requestTimeout()) // else it expires
	})
}

// waitForLeftover waits for such a lease to be revoked, for as long as one request over all members may take. Behind a key of our
// own we would only stand in our own way; and until the holder is told of another lease it is this one that it can revoke.
func (r *runner) waitForLeftover(ctx context.Context) {
	if r.leftover == nil {
		return
	}
	select {
	case <-r.leftover:
	case <-time.After(r.requestTimeout()):
	case <-ctx.Done():
	}
}

// oneLine makes an error of many lines fit into a sentence. Where all requests wait for one token they fail alike.
func oneLine(err error) string {
	return strings.Join(slices.Compact(strings.Split(err.Error(), "\n")), "; ")
}
