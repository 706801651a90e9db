package election

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"leasehold/internal/quote"
)

// session is one lease, from before its grant until after its revocation, and the key bound to it.
type session struct {
	*runner
	id      int64
	key     string
	timing  Timing
	lease   *lease
	queue   *queue
	changed chan struct{} // room for one: a renewal counted, or stop-at passed
	running sync.WaitGroup

	mu        sync.Mutex
	lostOnce  bool
	lostCause error
	gone      chan struct{} // closed when the key or the lease is lost
	closing   bool          // from here on our key goes because we want it to
	trouble   error         // why the last renewal did not count

	created     atomic.Int64 // our key's create revision once it is put
	campaignErr error        // why the key could not be put the last time
}

// session takes part in the election with one lease, until that is lost or the term it led to is over. It returns nil for
// the next one to follow.
func (r *runner) session(ctx context.Context) error {
	r.turn()
	if r.Snapshot().State != Connecting {
		r.transition(Connecting, "campaigning again")
	}
	r.waitForLeftover(ctx)
	if ctx.Err() != nil {
		return nil
	}
	s := &session{
		runner: r, id: newLeaseID(), changed: make(chan struct{}, 1), gone: make(chan struct{}),
	}
	s.key = fmt.Sprintf("%s%x", r.prefix, s.id)
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer s.running.Wait()
	defer cancel()

	// The queue is watched from while the lease is being granted, and before our key is put: the watch then sees all that
	// happens to the key, and at once, whereas etcd serves a watch of the past only every 100 ms. It ends before the lease is
	// revoked, so that those who leave in a crowd are not told of each other.
	qctx, stopQueue := context.WithCancel(sctx)
	defer stopQueue()
	asked := NewTiming(r.cfg.TTL, r.cfg.LossGrace, r.cfg.Margin)
	s.queue = newQueue(r.prefix, s.key, r.members, asked, r.cfg.Now, &r.turns.queue, s.lost)
	s.running.Go(func() {
		defer r.turns.queue.Store(0)
		s.queue.run(qctx)
	})

	defer s.release(ctx, stopQueue)
	patient, stop := r.patient(ctx)
	defer stop()
	r.cfg.Callbacks.Leased(s.id, r.cfg.TTL)
	g, err := s.join(patient)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	}
	s.timing = NewTiming(g.ttl, r.cfg.LossGrace, r.cfg.Margin)
	r.update(func(snap *Snapshot) {
		snap.LeaseID, snap.TTL, snap.Deadlines = s.id, g.ttl, s.timing.From(g.sent)
	})
	endpoints := func() (all []endpoint) {
		for _, m := range r.members.all() {
			all = append(all, m)
		}
		return all
	}
	early := func() time.Duration { return rand.N(s.timing.RenewInterval() / 5) }
	s.lease = newLease(s.id, s.key, s.timing, g, endpoints, &r.members.current, r.cfg.Now, early, s, r.metrics, &r.turns.lease)
	s.running.Go(func() {
		defer r.turns.lease.Store(0)
		s.lease.run(sctx)
	})

	created, err := s.standby(patient, sctx)
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return err
	case created == 0:
		return nil
	}
	return s.lead(ctx, created)
}

// join gets the lease, however long that takes.
func (s *session) join(ctx context.Context) (granted, error) {
	var wait retry
	for {
		s.turn()
		g, err := s.grant(ctx, s.id)
		s.turn()
		if err == nil {
			return g, nil
		}
		reason := "ask for a lease: " + oneLine(err)
		if ctx.Err() == nil {
			s.failing(reason)
			wait.sleep(ctx)
		}
		if ctx.Err() != nil || s.cfg.Wait == 0 && !s.elected {
			return granted{}, fmt.Errorf("%w in time: %s", ErrNotElected, reason)
		}
	}
}

// newLeaseID chooses the id of a lease: positive, as etcd's own are, and not one that anybody else will choose.
func newLeaseID() int64 { return 1 + rand.Int64N(1<<63-1) }

// release revokes the lease and removes the key, whether or not we know it to exist, as the last thing that the session does in etcd.
func (s *session) release(ctx context.Context, stopQueue func()) {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	stopQueue()
	bound := s.requestTimeout()
	if s.timing.TTL != 0 {
		bound = min(bound, s.timing.RenewInterval())
	}
	left := leaving{s.id, s.key, s.created.Load()}
	err := s.revoke(context.WithoutCancel(ctx), left, bound)
	then := "trying again as long as the daemon runs"
	switch {
	case err == nil:
		s.cfg.Callbacks.Leased(0, 0)
	case ctx.Err() != nil:
		then = "the lease will expire" // this was the last attempt
	default:
		s.revokeLeftover(left)
	}
	if err != nil && s.timing.TTL != 0 {
		s.log.Warn("key and lease not removed, "+then, "lease", fmt.Sprintf("%x", s.id), "err", oneLine(err))
	}
	s.turn()
	s.update(func(snap *Snapshot) {
		snap.LeaseID, snap.TTL, snap.Deadlines, snap.Leader, snap.Blocker = 0, 0, Deadlines{}, nil, nil
	})
}

// renewed implements leaseEvents.
func (s *session) renewed(d Deadlines) {
	s.mu.Lock()
	s.trouble = nil
	s.mu.Unlock()
	s.Candidate.mu.Lock()
	s.snapshot.Deadlines = d
	extend := s.term != nil && !s.term.contactLost && !s.term.gone
	s.Candidate.mu.Unlock()
	if extend {
		s.cfg.Callbacks.Extended(d)
	}
	s.Candidate.changed()
	poke(s.changed)
}

// put learns from the campaign that our key is in etcd.
func (s *session) put(created int64) {
	if before := s.created.Swap(created); before != 0 && before != created {
		s.lost(ErrKeyDeleted) // and put again by a campaign that did not know
		return
	}
	s.queue.put(created)
}

// contactLost implements leaseEvents.
func (s *session) contactLost() {
	s.endTerm(ErrContactLost)
	poke(s.changed)
}

// lost implements leaseEvents. The queue calls it too.
func (s *session) lost(cause error) {
	s.mu.Lock()
	ours := s.closing || s.lostOnce
	if !ours {
		s.lostOnce, s.lostCause = true, cause
		close(s.gone)
	}
	s.mu.Unlock()
	if !ours {
		s.endTerm(cause)
	}
}

// suspect implements leaseEvents.
func (s *session) suspect(endpoint int, dead bool, err error) {
	m := s.members.all()[endpoint]
	s.mu.Lock()
	news := s.trouble == nil
	s.trouble = &memberError{m.name(), err}
	s.mu.Unlock()
	if news {
		s.log.Warn("lease not renewed, trying again at another endpoint", "err", &memberError{m.name(), err})
	}
	if dead && s.members.auth != nil && s.members.auth.busy() {
		return // it waits for a token, maybe
	}
	if dead {
		s.members.reset(m)
	}
	// A refusal, of too many requests or of a token, says nothing of the watch.
	if dead || unavailable(err) {
		s.queue.suspect(m)
	}
}

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// checked is the result of looking whether we lead.
type checked struct {
	first    bool   // no key under the prefix was created before ours
	created  int64  // our key's create revision; 0: it is gone
	lease    int64  // that our key is bound to
	raftTerm uint64 // of the member that answered
	err      error
}

// standby campaigns and waits. It returns the create revision of our key when that has won, or 0 when the session is over.
// ctx ends with Run's, or when it is too late to be elected; sctx with the session.
func (s *session) standby(ctx, sctx context.Context) (int64, error) {
	cctx, cancel := context.WithCancel(sctx)
	var campaigning sync.WaitGroup
	defer campaigning.Wait()
	defer cancel()
	election, err := newElection(cctx, s.cfg.Election, s.id, &campaignKV{
		members: s.members, hedgeDelay: s.timing.hedgeDelay(), timeout: s.requestTimeout(),
		put: s.put, waitUntilFirst: s.queue.waitUntilFirst,
	})
	if err != nil {
		return 0, err
	}
	won := make(chan int64, 1)
	tick := time.NewTicker(HeartbeatInterval / 2)
	defer tick.Stop()
	renewNext := func() { s.running.Go(func() { s.lease.renewNow(sctx) }) }
	begun, warned := false, ""
	for {
		s.turn()
		v, queueErr := s.queue.view()
		if v.watched && !begun {
			begun = true
			campaigning.Go(func() {
				if created := s.campaign(cctx, election, renewNext); created != 0 {
					won <- created
				}
			})
		}
		if s.cfg.Wait == 0 && !s.elected && v.own != nil && v.head.key != v.own.key {
			return 0, fmt.Errorf("%w: %s is ahead", ErrNotElected, quote.Shell(v.head.identity))
		}
		s.mu.Lock()
		trouble := errors.Join(queueErr, s.campaignErr)
		s.mu.Unlock()
		s.show(v, trouble)
		if v.blocker != nil && v.blocker.Key != warned {
			warned = v.blocker.Key
			s.log.Warn("a key ahead of ours will not go by itself, waiting until somebody deletes it",
				"key", v.blocker.Key, "reason", v.blocker.Why, "remedy", v.blocker.Remedy)
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%w in time", ErrNotElected)
		case <-s.gone:
			s.log.Warn("lost our place in the queue, campaigning again with a new lease", "reason", s.lostCause)
			s.transition(Connecting, s.lostCause.Error())
			return 0, nil
		case <-s.queue.changed:
		case <-s.changed:
		case <-tick.C:
		case created := <-won:
			return created, nil
		}
	}
}

// campaign puts our key, waits until no key is ahead of it, and verifies that. It returns our key's create revision when we have
// won, or 0 when we have lost the key or ctx has ended.
func (s *session) campaign(ctx context.Context, election *concurrency.Election, renewNext func()) (created int64) {
	var wait retry
	for {
		err := election.Campaign(clientv3.WithRequireLeader(ctx), s.cfg.Identity)
		if ctx.Err() != nil {
			return 0
		}
		s.mu.Lock()
		s.campaignErr = err
		s.mu.Unlock()
		if err == nil {
			break
		}
		// The key was not put, as far as we know. The next attempt finds it if it was.
		poke(s.changed)
		wait.sleep(ctx)
	}
	s.lease.confirmFrom(s.created.Load())
	for ctx.Err() == nil {
		got := s.check(ctx, renewNext)
		switch {
		case got.err == nil && got.created == 0:
			s.lost(ErrKeyDeleted)
			return 0
		case got.err == nil && got.lease != s.id:
			s.lost(ErrKeyOverwritten)
			return 0
		case got.err == nil && got.first:
			return got.created
		}
		pause(ctx, s.timing.repeatAfter())
	}
	return 0
}

// check looks whether we lead: Election.Campaign returns nil even when its own key is gone
// (https://github.com/etcd-io/etcd/issues/19597). That our key is the oldest which exists in a linearizable read proves by itself
// that we lead, for a key made later can never be older; and that it exists proves that the lease did when it was read. So where
// the last renewal that was due counts, and the read confirms it, its deadlines are as good as those of a leader in the middle of
// its term, and the next one follows the read, for etcd would serve it first and the job is waiting. Else there must be another
// renewal, that is confirmed as those of a leader are.
func (s *session) check(ctx context.Context, renewNext func()) checked {
	ctx, cancel := context.WithTimeout(ctx, s.requestTimeout())
	defer cancel()
	confirming := s.lease.confirms()
	fresh := confirming && s.cfg.Now() < s.Snapshot().Deadlines.End-s.timing.TTL+s.timing.RenewInterval()*3/2
	var renewed <-chan struct{}
	if confirming && !fresh {
		renewed = s.lease.renewNow(ctx)
	}
	oldest := &pb.RangeRequest{
		Key: []byte(s.prefix), RangeEnd: []byte(clientv3.GetPrefixRangeEnd(s.prefix)), KeysOnly: true,
		Limit: 1, SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_ASCEND,
	}
	own := &pb.RangeRequest{Key: []byte(s.key)} // with its lease: see read
	got, err := hedge(ctx, s.members, s.timing.hedgeDelay(), func(ctx context.Context, m *member) (checked, error) {
		header, head, ours, err := m.readBoth(ctx, oldest, own)
		if err != nil {
			return checked{}, err
		}
		c := checked{raftTerm: header.RaftTerm}
		if len(ours) > 0 {
			c.created, c.lease = ours[0].CreateRevision, ours[0].Lease
		}
		if len(head) > 0 {
			c.first = string(head[0].Key) == s.key
		}
		return c, nil
	})
	if err != nil {
		return checked{err: err}
	}
	if !got.first || got.lease != s.id {
		return got
	}
	if last := s.lease.raftTerm.Load(); fresh && (last == 0 || last == got.raftTerm) {
		renewNext()
		return got
	}
	if renewed == nil {
		s.lease.confirmFrom(got.created)
		renewed = s.lease.renewNow(ctx)
	}
	select {
	case <-renewed:
	case <-ctx.Done():
		got.err = errors.New("the lease was not renewed")
	}
	return got
}

// show publishes what a candidate that waits knows.
func (s *session) show(v view, trouble error) {
	s.mu.Lock()
	unrenewed := s.trouble
	s.mu.Unlock()
	switch {
	case s.cfg.Now() >= s.Snapshot().Deadlines.StopAt:
		reason := "the lease could not be renewed in time"
		if unrenewed != nil {
			reason += ": " + oneLine(unrenewed)
		}
		s.failing(reason)
	case v.own != nil:
		s.transition(Standby, "")
	case trouble != nil:
		s.failing("join the queue: " + oneLine(trouble))
	default:
		s.transition(Connecting, "joining the queue")
	}
	s.showQueue(v)
}

// showQueue publishes who leads, and what we wait for.
func (s *session) showQueue(v view) {
	leader := v.leader()
	s.Candidate.mu.Lock()
	snap := &s.snapshot
	if snap.Leading {
		// Ourselves: that was proven by more than a watch, which may be late.
		leader, v.blocker = snap.Leader, nil
	}
	newLeader := !same(snap.Leader, leader)
	changed := newLeader || !same(snap.Blocker, v.blocker)
	snap.Leader, snap.Blocker = leader, v.blocker
	s.Candidate.mu.Unlock()
	if newLeader && leader != nil {
		s.log.Info("leader changed", "leader", quote.Printable(leader.Identity), "token", leader.Token)
	}
	if changed {
		s.Candidate.changed()
	}
}

// same compares what the pointers point to.
func same[T comparable](a, b *T) bool { return a == b || a != nil && b != nil && *a == *b }

// lead begins a term, has it led, and returns when that has ended. The lease is renewed all the while.
func (s *session) lead(ctx context.Context, created int64) error {
	lctx, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	s.lease.confirmFrom(created)
	t := &term{end: end, lost: make(chan struct{})}
	s.Candidate.mu.Lock()
	deadlines := s.snapshot.Deadlines
	begun := s.cfg.Now() < deadlines.StopAt
	if begun {
		s.term = t
		s.snapshot.State, s.snapshot.Reason, s.snapshot.Since, s.snapshot.Leading = Leading, "", time.Now(), true
		s.snapshot.Leader, s.snapshot.Blocker = &Entry{Identity: s.cfg.Identity, Key: s.key, Token: created}, nil
	}
	s.Candidate.mu.Unlock()
	if !begun {
		return nil // it took too long to learn that we won
	}
	s.elected = true
	s.metrics.terms.Inc()
	s.log.Info("state changed", "from", Standby, "to", Leading, "token", created, "lease", fmt.Sprintf("%x", s.id), "ttl", s.timing.TTL)
	s.Candidate.changed()
	select {
	case <-s.gone: // before there was a term to be ended
		s.endTerm(s.lostCause)
	default:
	}
	led := make(chan error, 1)
	go func() {
		led <- s.cfg.Callbacks.Lead(lctx, Term{
			Key: s.key, Token: created, LeaseID: s.id, Deadlines: deadlines, Timing: s.timing, Lost: t.lost,
		})
	}()
	tick := time.NewTicker(HeartbeatInterval / 2)
	defer tick.Stop()
	stop := ctx.Done()
	for {
		s.turn()
		select {
		case <-stop:
			stop = nil
			s.endTerm(context.Cause(ctx))
		case <-tick.C:
		case <-s.changed:
		case <-s.queue.changed:
			v, _ := s.queue.view()
			s.showQueue(v)
		case err := <-led:
			if s.cfg.Now() >= s.Snapshot().Deadlines.StopAt {
				s.endTerm(ErrContactLost) // the holder's own clock was first
			}
			cause := context.Cause(lctx)
			s.Candidate.mu.Lock()
			s.term = nil
			s.snapshot.Leading = false
			s.Candidate.mu.Unlock()
			reason := ""
			if cause != nil {
				reason = cause.Error()
			}
			s.transition(Stopping, reason)
			if cause != nil && errors.Is(err, cause) {
				return nil // the term's own end is not a fault of Lead
			}
			return err
		}
	}
}
