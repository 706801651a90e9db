package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// session is one lease, from before its grant until after its revocation, and the key bound to it.
type session struct {
	candidate *Candidate // whose heartbeat it marks
	run       *run
	cfg       *Config
	log       *slog.Logger
	state     *machine
	members   *members

	id     int64
	key    string
	timing Timing // zero until the lease is granted
	lease  *lease
	queue  *queue
	// steering is what people have written, and steered has room for one: that has changed.
	steering *steering
	steered  chan struct{}
	changed  chan struct{}  // room for one: a renewal counted, stop-at passed, the key was not put
	running  sync.WaitGroup // what ends with the session
	created  atomic.Int64   // our key's create revision; 0: it is not known to be put
	// handover is to whom we hand over when the job has exited; nil: to whoever is next.
	handover *handover
	led      bool // a term has begun
	// adopted: the lease is that of a process before us. announced: that one has announced its
	// release.
	adopted, announced bool

	mu          sync.Mutex
	closing     bool          // from now on we remove our key ourselves
	gone        chan struct{} // closed when the key or the lease is lost
	lostCause   error         // set before that
	trouble     error         // why the last renewal did not count
	campaignErr error         // why the key was not put
}

func newSession(c *Candidate, r *run) *session {
	s := &session{
		candidate: c, run: r, cfg: &c.cfg, log: c.log, state: c.state, members: r.members,
		id: newLeaseID(), changed: make(chan struct{}, 1), gone: make(chan struct{}),
		steered: make(chan struct{}, 1),
	}
	s.steering = newSteering(s.cfg.Election, func() {
		poke(s.changed)
		poke(s.steered)
	})
	s.key = s.cfg.keyOf(s.id)
	return s
}

// newLeaseID chooses the id of a lease: positive, as etcd's own ids are, and random, so that nobody
// else chooses the same.
func newLeaseID() int64 { return 1 + rand.Int64N(1<<63-1) }

// start takes part in the election with a new lease, until that is lost or its term is over. It
// returns nil if another session has to follow.
func (s *session) start(ctx context.Context) error {
	s.candidate.heartbeat()
	s.state.campaigningAgain()
	s.run.leftovers.wait(ctx)
	if err := s.waitUntilFit(ctx); err != nil {
		return unlessStopped(ctx, err)
	}
	if ctx.Err() == nil {
		return s.open(ctx, s.takePart)
	}
	return nil
}

// open opens the watch, takes part in the election, and releases the lease. ctx is that of Run, and
// sctx ends with the session.
func (s *session) open(
	ctx context.Context, takePart func(ctx, sctx context.Context) error,
) error {
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer s.running.Wait()
	defer cancel()

	// The watch of the queue is opened while the lease is being granted, before our key is put. So
	// it sees all that happens to the key, and at once: a watch that begins in the past is served
	// only every 100 ms. It ends before the lease is revoked, so that many candidates that leave at
	// the same moment get no events for each other.
	qctx, stopQueue := context.WithCancel(sctx)
	defer stopQueue()
	s.startQueue(qctx)
	s.candidate.queue.Store(s.queue)
	defer s.candidate.queue.Store(nil)

	err := takePart(ctx, sctx)
	// Not deferred: if that panics, somebody may still work under the lease.
	if failed := s.release(ctx, stopQueue); failed != nil {
		err = failed
	}
	return err
}

// takePart gets a lease, waits and leads.
func (s *session) takePart(ctx, sctx context.Context) error {
	wctx, stop := s.waitContext(ctx)
	defer stop()
	nested := s.lookForNested(wctx)
	s.cfg.Callbacks.Leased(s.id, s.cfg.TTL)
	g, err := s.join(wctx)
	if err != nil {
		return unlessStopped(ctx, err)
	}
	if g.ttl != s.cfg.TTL {
		s.cfg.Callbacks.Leased(s.id, g.ttl)
	}
	s.timing = s.cfg.Timing(g.ttl)
	deadlines := s.timing.From(g.sent)
	s.state.leased(s.id, g.ttl, deadlines)
	s.startLease(sctx, leaseConfig{
		granted: g, deadlines: deadlines, next: g.sent + s.timing.RenewInterval() - s.early(),
	})
	if ctx.Err() != nil {
		return nil
	}
	if err := s.refuseNested(wctx, nested); err != nil {
		return unlessStopped(ctx, err)
	}
	created, err := s.standby(wctx, sctx)
	if ctx.Err() != nil || err != nil || created == 0 {
		return unlessStopped(ctx, err)
	}
	return s.lead(ctx, sctx, created)
}

// unlessStopped returns err, or nil if the context of Run has ended: that is a planned stop.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = nil
	}
	return err
}

// waitContext returns a context that also ends when it is too late to be elected.
func (s *session) waitContext(ctx context.Context) (context.Context, context.CancelFunc) {
	wait := s.cfg.Wait
	switch {
	case s.run.elected || wait < 0:
		return context.WithCancel(ctx)
	case wait == 0:
		wait = s.cfg.TTL // to join and look takes that long only if something is wrong
	}
	return context.WithTimeout(ctx, max(0, s.run.started+wait-s.cfg.Now()))
}

// triesOnce reports whether the candidate gives up if it cannot lead at once.
func (s *session) triesOnce() bool { return s.cfg.Wait == 0 && !s.run.elected }

func (s *session) startQueue(ctx context.Context) {
	heartbeat := &s.candidate.heartbeats.queue
	s.queue = newQueue(queueConfig{
		prefix: s.cfg.prefix(), own: s.key, near: s.cfg.Near, members: s.members,
		steering: s.steering,
		timing:   s.cfg.Timing(s.cfg.TTL),
		timeout:  s.cfg.requestTimeout(),
		now:      s.cfg.Now, heartbeat: heartbeat, lost: s.lost,
	})
	s.running.Go(func() {
		defer heartbeat.stop()
		s.queue.run(ctx)
	})
}

// early is by how much to renew before the interval is over.
func (s *session) early() time.Duration { return rand.N(s.timing.RenewInterval() / 5) }

// startLease renews the lease. What it knows at the beginning is in cfg.
func (s *session) startLease(ctx context.Context, cfg leaseConfig) {
	heartbeat := &s.candidate.heartbeats.lease
	cfg.id, cfg.key, cfg.timing = s.id, s.key, s.timing
	cfg.endpoints = func() (all []endpoint) {
		for _, m := range s.members.all() {
			all = append(all, steered{m, s.steering})
		}
		return all
	}
	cfg.current, cfg.now, cfg.early = &s.members.current, s.cfg.Now, s.early
	cfg.events, cfg.metrics, cfg.heartbeat = s, s.candidate.metrics, heartbeat
	s.lease = newLease(cfg)
	s.running.Go(func() {
		defer heartbeat.stop()
		s.lease.run(ctx)
	})
}

// join gets the lease, however long that takes.
func (s *session) join(ctx context.Context) (g granted, err error) {
	err = s.keepTrying(ctx, leaseFails, "ask for a lease", func() (err error) {
		g, err = s.grant(ctx)
		return err
	})
	return g, err
}

// keepTrying makes a request until it succeeds. It returns ErrUnreachable if ctx ends first.
func (s *session) keepTrying(
	ctx context.Context, fails failing, what string, request func() error,
) error {
	var wait retry
	for {
		s.candidate.heartbeat()
		err := request()
		s.candidate.heartbeat()
		if err == nil {
			s.run.outage.over(fails)
			return nil
		}
		reason := what + ": " + s.cfg.explain(err)
		if ctx.Err() == nil {
			s.state.connecting(reason)
			s.run.outage.fails(fails, notInElection, reason)
			wait.most = Timing{TTL: s.cfg.TTL}.mostPause(err)
			s.candidate.sleep(ctx, wait.next())
		}
		if ctx.Err() != nil || s.triesOnce() {
			return fmt.Errorf("%w: %s", ErrUnreachable, reason)
		}
	}
}

// granted is a lease as etcd granted it.
type granted struct {
	ttl, sent time.Duration
	raftTerm  uint64 // of the renewal, if one was made in place of the grant; else 0
}

// grant asks for a lease with an id that we have chosen. So we can revoke it even if no reply
// comes.
func (s *session) grant(ctx context.Context) (granted, error) {
	// A stop does not cancel it: the revocation would overtake the grant, find no lease, and then
	// the grant would leave one.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.requestTimeout())
	defer cancel()
	seconds := int64((s.cfg.TTL + time.Second - 1) / time.Second)
	ask := func(ctx context.Context, m *member) (granted, error) {
		conn, err := m.conn()
		if err != nil {
			return granted{}, err
		}
		sent := s.cfg.Now()
		resp, err := pb.NewLeaseClient(conn).LeaseGrant(ctx,
			&pb.LeaseGrantRequest{TTL: seconds, ID: s.id})
		switch err = rpctypes.Error(err); {
		case errors.Is(err, rpctypes.ErrLeaseExist):
			// The same request was sent before, and its answer is delayed or lost. A renewal shows
			// what was granted.
			sent = s.cfg.Now()
			renewed, err := m.renew(ctx, s.id)
			return granted{renewed.ttl, sent, renewed.raftTerm}, err
		case err != nil:
			return granted{}, err
		case resp.Error != "":
			return granted{}, errors.New(resp.Error)
		}
		return granted{ttl: time.Duration(resp.TTL) * time.Second, sent: sent}, nil
	}
	return hedge(ctx, s.members, s.cfg.hedgeDelay(), ask)
}

// release removes the key and revokes the lease, whether or not we know that they exist. It is the
// last thing that the session does in etcd. It fails only if that could not be announced.
func (s *session) release(ctx context.Context, stopQueue func()) error {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	stopQueue()
	timeout := s.cfg.requestTimeout()
	if s.timing.TTL != 0 {
		timeout = min(timeout, s.timing.RenewInterval())
	}
	left := &leaving{
		lease: s.id, created: s.created.Load(), handover: s.handover,
		announce: s.cfg.Callbacks.Releasing,
	}
	if s.announced {
		left.announce = nil
	}
	if left.created != 0 || s.adopted {
		left.key = s.key
	}
	if s.led {
		left.exited = s.cfg.exited(s.id)
	}
	err := left.revoke(context.WithoutCancel(ctx), s.members, timeout, s.cfg.hedgeDelay())
	then := "trying again as long as the daemon runs"
	switch {
	case errors.As(err, &announceError{}):
		return fmt.Errorf("announce the release of the lease %x: %w", s.id, err)
	case err == nil:
		s.cfg.Callbacks.Leased(0, 0)
	case ctx.Err() != nil:
		then = "the lease will expire" // this was the last attempt
	default:
		s.run.leftovers.add(left)
	}
	if err != nil && s.timing.TTL != 0 {
		s.log.Warn("key and lease not removed, "+then,
			"lease", fmt.Sprintf("%x", s.id), "err", s.cfg.explain(err))
	}
	s.candidate.heartbeat()
	s.state.leased(0, 0, Deadlines{})
	return nil
}

// put learns from the campaign that our key is in etcd.
func (s *session) put(created int64) {
	before := s.created.Swap(created)
	if before != 0 && before != created {
		s.lost(ErrKeyDeleted) // the campaign has put it again
		return
	}
	if before == 0 {
		s.cfg.Callbacks.Entered(s.key, created)
	}
	s.mu.Lock()
	s.campaignErr = nil
	s.mu.Unlock()
	s.queue.put(created)
}

// renewed implements leaseEvents.
func (s *session) renewed(d Deadlines) {
	s.mu.Lock()
	s.trouble = nil
	s.mu.Unlock()
	if s.state.get().State == Suspended && !s.cfg.Callbacks.Suspend() {
		s.state.termEnded(ErrContactLost)
	}
	if s.state.renewed(d) {
		s.cfg.Callbacks.Extended(d)
	}
	s.state.publish()
	s.run.outage.over(leaseFails)
	poke(s.changed)
	poke(s.queue.awake)
	prepareMessages() // an elector that takes the place of another has not done it yet
}

// contactLost implements leaseEvents.
func (s *session) contactLost() {
	if !s.cfg.Callbacks.Suspend() || !s.state.suspended() {
		s.state.termEnded(ErrContactLost)
	}
	poke(s.changed)
}

// lost implements leaseEvents. The queue calls it too.
func (s *session) lost(cause error) {
	s.mu.Lock()
	known := s.closing || s.lostCause != nil
	if !known {
		s.lostCause = cause
		close(s.gone)
	}
	s.mu.Unlock()
	if !known {
		s.state.termEnded(cause)
	}
}

// isLost reports whether the key or the lease is lost.
func (s *session) isLost() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// suspect implements leaseEvents.
func (s *session) suspect(endpoint int, abandoned, late bool, err error) {
	m := s.members.all()[endpoint]
	if !late {
		s.notRenewed(&memberError{m.name(), err})
	}
	if abandoned && s.members.auth != nil && s.members.auth.busy() {
		return // perhaps it waits for a token
	}
	if abandoned {
		s.members.reset(m)
	}
	// If a member refuses too many requests, or a token, its watch may still work.
	if abandoned || unavailable(err) {
		s.queue.suspect(m)
	}
}

// notRenewed says why the lease is not renewed yet.
func (s *session) notRenewed(trouble error) {
	s.mu.Lock()
	s.trouble = trouble
	s.mu.Unlock()
	message := "lease not renewed, trying again"
	if len(s.members.all()) > 1 {
		message += " at another endpoint"
	}
	s.run.outage.fails(leaseFails, message, s.cfg.explain(trouble))
}
