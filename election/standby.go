package election

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"

	"leasehold/internal/quote"
)

// standby campaigns and waits. It returns the create revision of our key when we have won, or 0
// when the session is over. ctx ends with Run's context, or when Config.Wait is over. sctx ends
// with the session.
func (s *session) standby(ctx, sctx context.Context) (int64, error) {
	cctx, cancel := context.WithCancel(sctx)
	var campaigning sync.WaitGroup
	defer campaigning.Wait()
	defer cancel()
	election, err := newElection(cctx, s.cfg.Election, s.id, &campaignKV{
		members: s.members, hedgeDelay: s.timing.hedgeDelay(), timeout: s.cfg.requestTimeout(),
		put: s.put, waitUntilFirst: s.queue.waitUntilFirst,
	})
	if err != nil {
		return 0, err
	}
	won := make(chan int64, 1)
	renewNext := func(after time.Duration) {
		s.running.Go(func() {
			pause(sctx, after)
			s.lease.renewNow(sctx)
		})
	}
	campaign := func() {
		if created := s.campaign(cctx, election, renewNext); created != 0 {
			won <- created
		}
	}
	tick := time.NewTimer(0)
	defer tick.Stop()
	begun, next, warned := false, false, ""
	for {
		s.candidate.heartbeat()
		v, trouble := s.look()
		if s.candidate.fitness.unfit() != "" {
			return 0, nil // we leave the queue, and wait in waitUntilFit
		}
		if v.watched && !begun {
			begun = true
			campaigning.Go(campaign)
		}
		v.hold = s.heldFor(v)
		if s.triesOnce() && (v.isBehind() || v.own != nil && v.hold != nil) {
			return 0, v.notElected()
		}
		if h := v.hold; h != nil && h.Stop && !v.isBehind() && v.own != nil &&
			h.Token == v.own.created {
			return 0, nil // it takes us for the leader: resign as one
		}
		if (v.isNext() || s.steering.isTarget(s.key)) && !next {
			next = true
			s.lease.confirmFrom(s.created.Load())
			if !s.lease.isConfirmed() {
				renewNext(0) // the leader may go at any moment
			}
		}
		s.show(v, trouble)
		if v.blocker != nil && v.blocker.Key != warned {
			warned = v.blocker.Key
			v.blocker.warn(s.log)
		}
		tick.Reset(idleTick)
		select {
		case <-ctx.Done():
			return 0, s.waitOver(v, trouble)
		case <-s.gone:
			s.state.entryLost(s.lostCause)
			return 0, nil
		case <-s.queue.changed:
		case <-s.changed:
		case <-s.candidate.fitness.changed:
		case <-tick.C:
		case created := <-won:
			if s.candidate.fitness.unfit() != "" {
				return 0, nil
			}
			return created, nil
		}
	}
}

// look returns what the queue shows, and why we are not in it yet.
func (s *session) look() (view, error) {
	v, err := s.queue.view()
	s.mu.Lock()
	defer s.mu.Unlock()
	return v, errors.Join(err, s.campaignErr)
}

// show publishes what the waiting candidate knows.
func (s *session) show(v view, trouble error) {
	outage := s.run.outage
	s.publishHold()
	// This comes first, so that a snapshot of a standby always has the leader too.
	s.state.queueChanged(v.leader(), v.blocker)
	switch {
	case s.cfg.Now() >= s.state.get().Deadlines.StopAt:
		s.state.connecting(s.unrenewed())
	case v.own != nil && v.unseen != nil:
		s.state.queued()
		outage.fails(queueFails, "who leads could not be read, trying again",
			s.cfg.explain(v.unseen))
	case v.own != nil:
		s.state.queued()
		outage.over(queueFails)
	case trouble != nil:
		reason := "join the queue: " + s.cfg.explain(trouble)
		s.state.connecting(reason)
		outage.fails(queueFails, notInElection, reason)
	default:
		s.state.connecting("joining the queue")
	}
}

// unrenewed returns why a standby's lease may have expired.
func (s *session) unrenewed() string {
	reason := "the lease could not be renewed in time"
	if s.state.get().Deadlines == (Deadlines{}) {
		reason = "the lease that was taken over is not renewed yet"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.trouble != nil {
		reason += ": " + s.cfg.explain(s.trouble)
	}
	return reason
}

// waitOver returns why the candidate was not elected in time.
func (s *session) waitOver(v view, trouble error) error {
	switch {
	case s.cfg.Now() >= s.state.get().Deadlines.StopAt:
		return fmt.Errorf("%w: %s", ErrUnreachable, s.unrenewed())
	case v.isBehind(), v.own != nil && v.hold != nil:
		return v.notElected()
	case trouble != nil:
		return fmt.Errorf("%w: join the queue: %s", ErrUnreachable, s.cfg.explain(trouble))
	case v.own == nil && s.created.Load() != 0:
		// etcd answers, but who is ahead is still being read.
		return fmt.Errorf("%w: the queue could not be joined in time", ErrNotElected)
	}
	return fmt.Errorf("%w: no answer in time", ErrUnreachable)
}

// isBehind reports whether a key is ahead of ours.
func (v view) isBehind() bool { return v.own != nil && v.head.key != v.own.key }

// isNext reports whether only one key is ahead of ours, or none.
func (v view) isNext() bool { return v.own != nil && v.ahead <= 1 }

// notElected returns who or what is ahead.
func (v view) notElected() error {
	if v.blocker != nil {
		return fmt.Errorf("%w: the key %s is ahead: %s",
			ErrNotElected, v.blocker.Key, v.blocker.Why)
	}
	if v.hold != nil {
		return fmt.Errorf("%w: %s", ErrNotElected, HoldText(v.hold))
	}
	return fmt.Errorf("%w: %s is ahead", ErrNotElected, quote.Shell(v.head.identity))
}

// waitForTurn puts our key, unless the process before us has, and waits until no key is ahead of
// it. If somebody has deleted the key since, it must not be put again.
func (s *session) waitForTurn(ctx context.Context, election *concurrency.Election) error {
	if s.adopted {
		return s.queue.waitUntilFirst(ctx)
	}
	return election.Campaign(clientv3.WithRequireLeader(ctx), s.cfg.Identity)
}

// startPause is for how long a leader that starts early leaves the processors to its job, before it
// renews. Nothing waits for that renewal: the last one was confirmed.
const startPause = 10 * time.Millisecond

// campaign puts our key, waits until no key is ahead of it, and verifies that, unless that is known
// already. It returns our key's create revision when we have won, or 0 when we have lost the key or
// ctx has ended.
func (s *session) campaign(
	ctx context.Context, election *concurrency.Election, renewNext func(after time.Duration),
) (created int64) {
	var wait retry
	for {
		started := s.cfg.Now()
		err := s.waitForTurn(ctx, election)
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
		if s.created.Load() != 0 && s.cfg.Now()-started > s.timing.RenewInterval() {
			wait = retry{} // it has waited for its turn
		}
		wait.most = s.timing.mostPause(err)
		wait.sleep(ctx)
	}
	s.lease.confirmFrom(s.created.Load())
	if s.waitForExit(ctx) && s.startsEarly() && s.steering.mayStart(s.created.Load()) {
		renewNext(startPause)
		return s.created.Load()
	}
	for s.waitWhileHeld(ctx) == nil {
		got, err := s.verifyFirst(ctx, renewNext)
		switch {
		case err != nil:
		case got.created == 0:
			s.lost(ErrKeyDeleted)
			return 0
		case got.lease != s.id:
			s.lost(ErrKeyOverwritten)
			return 0
		case got.first && s.steering.mayStart(got.created):
			return got.created
		case got.first:
			continue // the same read has shown a hold
		}
		pause(ctx, s.timing.repeatAfter())
	}
	return 0
}

// waitWhileHeld waits until no hold keeps us from leading. It returns an error if ctx ends first.
func (s *session) waitWhileHeld(ctx context.Context) error {
	for !s.steering.mayStart(s.created.Load()) {
		select {
		case <-s.steered:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// waitForExit waits until the leader that was ahead of us has said that its job has exited, and
// returns true, also if nobody was ahead. If that leader has not deleted its key itself, or is of
// an older version, it says nothing: then it waits for a moment, in which the leader learns that
// its key is gone, and kills its job.
func (s *session) waitForExit(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, s.timing.exitWait())
	defer cancel()
	for gone := s.queue.lastGone(); gone != 0 && !s.steering.hasExited(gone); {
		select {
		case <-s.steered:
		case <-ctx.Done():
			return false
		}
	}
	return true
}

// startsEarly reports whether the queue alone proves that we lead, so that nothing has to be read.
// It has shown that no key is ahead of ours. If it is proven, it shows the loss of our key no later
// than what has happened after that. So our key was the oldest one, and still is: it goes with its
// lease, and that holds if the last renewal is confirmed. docs/safety.md has the whole argument.
//
// It must be called after confirmFrom, and after the queue has shown that.
func (s *session) startsEarly() bool {
	return s.queue.isProven() && s.lease.isConfirmed() && s.isFresh() && !s.isLost()
}

// isFresh reports whether the last renewal that counts is recent.
func (s *session) isFresh() bool {
	sent := s.state.get().Deadlines.End - s.timing.TTL
	return s.cfg.Now() < sent+s.timing.RenewInterval()*3/2
}

// verification is what a linearizable read shows of our key.
type verification struct {
	first    bool   // no key under the prefix was created before ours
	created  int64  // our key's create revision; 0: it is gone
	lease    int64  // that our key is bound to
	raftTerm uint64 // of the member that answered
}

// verifyFirst verifies that we lead, because Election.Campaign returns nil even if its own key is
// gone (https://github.com/etcd-io/etcd/issues/19597). If our key is the oldest one in a
// linearizable read, we lead: a key made later can never be older. That the key exists also proves
// that the lease existed at the time of the read. So if the last renewal is recent and the read
// confirms it, its deadlines are as good as those of any leader. The next renewal is then sent
// after the read: etcd would serve it first, and the job is waiting. Otherwise we need another
// renewal, and confirm it as a leader does.
func (s *session) verifyFirst(
	ctx context.Context, renewNext func(after time.Duration),
) (verification, error) {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.requestTimeout())
	defer cancel()
	fresh := s.isFresh()
	var renewed <-chan struct{}
	if !fresh {
		renewed = s.lease.renewNow(ctx)
	}
	got, err := hedge(ctx, s.members, s.timing.hedgeDelay(), s.readFirst)
	if err != nil || !got.first || got.lease != s.id {
		return got, err
	}
	if last := s.lease.raftTerm.Load(); fresh && (last == 0 || last == got.raftTerm) {
		renewNext(0)
		return got, nil
	}
	if renewed == nil {
		s.lease.confirmFrom(got.created)
		renewed = s.lease.renewNow(ctx)
	}
	select {
	case <-renewed:
		return got, nil
	case <-ctx.Done():
		return got, errors.New("the lease was not renewed")
	}
}

// readFirst reads which key is the oldest, and our own.
func (s *session) readFirst(ctx context.Context, m *member) (verification, error) {
	oldest := wholePrefix(s.cfg.prefix())
	oldest.KeysOnly, oldest.Limit = true, 1
	oldest.SortTarget, oldest.SortOrder = pb.RangeRequest_CREATE, pb.RangeRequest_ASCEND
	own := &pb.RangeRequest{Key: []byte(s.key)} // with its lease: see read
	header, kvs, err := s.steering.readAll(ctx, m, oldest, own)
	if err != nil {
		return verification{}, err
	}
	v := verification{raftTerm: header.RaftTerm}
	if len(kvs[0]) > 0 {
		v.first = string(kvs[0][0].Key) == s.key
	}
	if len(kvs[1]) > 0 {
		v.created, v.lease = kvs[1][0].CreateRevision, kvs[1][0].Lease
	}
	return v, nil
}
