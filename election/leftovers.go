package election

import (
	"context"
	"errors"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"leasehold/control"
)

// leaving is what a session leaves in etcd.
type leaving struct {
	lease   int64
	key     string // "": it was not put
	created int64  // the key's create revision; 0: whichever it has
	// handover is to whom the key's candidate hands over; nil: to whoever is next.
	handover *handover
	// exited is put in the transaction that deletes the key, and says that the job has exited. So
	// whoever is next need not wait in case that somebody else has deleted the key. nil: the
	// candidate has not led, as far as we know.
	exited *pb.PutRequest
	// announce is called before the first request; nil: it was.
	announce func(lease int64) error
}

// exited is the request that puts the key by which the leader with that lease says that its job has
// exited.
func (cfg *Config) exited(lease int64) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(control.JobExitedOf(cfg.Election)), Lease: lease}
}

// announceError is why a release was not announced. Nothing is asked of etcd then.
type announceError struct{ error }

func (e announceError) Unwrap() error { return e.error }

// leavePause is for how long a leader does nothing when its key is gone: if the next job starts on
// the same machine, or etcd runs there, they need the processors.
const leavePause = 20 * time.Millisecond

// revoke gives up the key and the lease. The job has exited. It deletes the key first, by a request
// of its own: a key that was overwritten does not go with the lease, and would keep all others
// waiting for ever. The next leader waits only for the key.
//
// Nothing else asks etcd to delete our key or to revoke our lease. Such a request may arrive after
// this process has exited, and after any read of whoever takes the lease over. So it is announced
// first.
func (l *leaving) revoke(
	ctx context.Context, ms *members, timeout, hedgeDelay time.Duration,
) error {
	if l.announce != nil {
		if err := l.announce(l.lease); err != nil {
			return announceError{err}
		}
		l.announce = nil
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var keyErr error
	if l.key != "" {
		half, cancel := context.WithTimeout(ctx, timeout/2)
		_, keyErr = hedge(half, ms, hedgeDelay,
			func(ctx context.Context, m *member) (struct{}, error) {
				return struct{}{}, l.remove(ctx, m)
			})
		cancel()
		if keyErr == nil && l.exited != nil {
			pause(ctx, leavePause)
		}
	}
	_, err := hedge(ctx, ms, hedgeDelay,
		func(ctx context.Context, m *member) (struct{}, error) {
			return struct{}{}, m.revoke(ctx, l.lease)
		})
	return errors.Join(keyErr, err)
}

// remove deletes the key. If etcd refuses what is put with it (not permitted, no space, the lease
// is gone), it does without.
func (l *leaving) remove(ctx context.Context, m *member) error {
	err := l.removeAnd(ctx, m, l.exited)
	if err != nil && l.exited != nil && !MayPass(err) {
		err = l.removeAnd(ctx, m, nil)
	}
	return err
}

// removeAnd deletes the key, and puts another one. If it can't be handed over, whoever is next
// leads.
func (l *leaving) removeAnd(ctx context.Context, m *member, put *pb.PutRequest) error {
	if l.handover != nil {
		done, err := m.handOver(ctx, l.key, l.created, l.handover, put)
		if done || err != nil && (put != nil || MayPass(err)) {
			return err
		}
	}
	return m.remove(ctx, l.key, l.created, put)
}

// leftovers revokes the leases that could not be revoked when their sessions ended. The key of such
// a lease keeps all others waiting. It may last longer than a TTL: a renewal that was sent into a
// network partition can arrive long after.
type leftovers struct {
	members             *members
	timeout, hedgeDelay time.Duration
	timing              Timing
	ctx                 context.Context // ends with Run
	cancel              context.CancelFunc
	revoking            sync.WaitGroup
	last                chan struct{} // closed when the last one is revoked; nil: there was none
}

func newLeftovers(ctx context.Context, ms *members, cfg *Config) *leftovers {
	l := &leftovers{
		members: ms, timeout: cfg.requestTimeout(), hedgeDelay: cfg.hedgeDelay(),
		timing: Timing{TTL: cfg.TTL},
	}
	l.ctx, l.cancel = context.WithCancel(ctx)
	return l
}

// add goes on revoking. When Run ends there is one last attempt, as for the lease of a session that
// a planned stop ends.
func (l *leftovers) add(left *leaving) {
	done := make(chan struct{})
	l.last = done
	l.revoking.Go(func() {
		defer close(done)
		var wait retry
		for l.ctx.Err() == nil {
			err := left.revoke(l.ctx, l.members, l.timeout, l.hedgeDelay)
			if err == nil {
				return
			}
			wait.most = l.timing.mostPause(err)
			wait.sleep(l.ctx)
		}
		// Else it expires.
		_ = left.revoke(context.WithoutCancel(l.ctx), l.members, l.timeout, l.hedgeDelay)
	})
}

// wait waits until the last one is revoked, for at most the time that one request over all members
// may take. Otherwise our next key would wait for our own old one. Also, the callbacks know only
// one lease at a time, and until they learn of the next they can still revoke this one.
func (l *leftovers) wait(ctx context.Context) {
	if l.last == nil {
		return
	}
	timer := time.NewTimer(l.timeout)
	defer timer.Stop()
	select {
	case <-l.last:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// close returns after the last attempts.
func (l *leftovers) close() {
	l.cancel()
	l.revoking.Wait()
}
