package election

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// view is what the queue shows a candidate.
type view struct {
	watched bool        // the watch is open: our key can be put
	head    *queueEntry // whoever is first, leader or blocker
	own     *queueEntry // nil until we know who is ahead of us
	ahead   int         // how many keys are, if own is known
	blocker *Blocker    // the first one ahead of our own key
}

// leader returns the leader: whoever is first, if that is a candidate.
func (v view) leader() *Entry {
	if v.head == nil || !v.head.candidate {
		return nil
	}
	return v.head.entry()
}

// queue keeps in memory who is ahead of us. It reads that once, after our key has been put, and has
// a watch that was opened before. Candidates that come later are behind us and never matter to us,
// so the watch is only for deletions. So a candidate that joins costs the others nothing, and a
// change of leader costs each an event. etcd's Election.Observe would cost each candidate a read
// and a watch at each change, and it never reports that there is no leader.
//
// Only for this one read of a join does etcd read the whole queue, as for every request that sorts
// or filters.
type queue struct {
	cfg queueConfig
	// changed has room for one: the view has changed.
	changed chan struct{}
	// suspects has room for one: a member that does not renew our lease.
	suspects chan *member
	// puts has room for one: our key has been put.
	puts chan struct{}
	// first is closed once no key is ahead of ours. That is final: keys made later are behind us.
	// If our key was lost before that, lost has been called by then, unless proven is false.
	first chan struct{}

	mu       sync.Mutex
	watched  bool                  // it has been, at least once
	created  int64                 // our key's create revision; 0: not put yet
	entries  map[string]queueEntry // our key and all keys ahead of it; nil: not read yet
	revision int64                 // at which entries were read
	proven   bool                  // when first is closed: no deletion can have been missed
	err      error                 // why it is not being watched, or not read
	conn     *watchConn            // the watch that is open, or the last one
}

type queueConfig struct {
	prefix    string // with the slash
	own       string // our key
	members   *members
	timing    Timing
	timeout   time.Duration // of reading who is ahead: a long queue takes its time
	now       func() time.Duration
	heartbeat *heartbeat
	// lost is called when our key is lost. It must not block.
	lost func(cause error)
}

func newQueue(cfg queueConfig) *queue {
	return &queue{
		cfg: cfg, changed: make(chan struct{}, 1), suspects: make(chan *member, 1),
		puts: make(chan struct{}, 1), first: make(chan struct{}),
	}
}

// run follows the queue until ctx ends. If the watch ends, the term does not: the watch is opened
// again, on another member if necessary, and meanwhile the lease's deadlines decide.
func (q *queue) run(ctx context.Context) {
	wait := retry{}
	for ctx.Err() == nil {
		started := q.cfg.now()
		err := q.follow(ctx)
		q.mu.Lock()
		q.err = err
		q.mu.Unlock()
		// A member that did not answer may have too much to do. It would not help if all candidates
		// came back at once.
		age := q.cfg.now() - started
		if age > q.cfg.timing.TTL ||
			age > q.cfg.timing.RenewInterval() && !errors.Is(err, errUnanswered) {
			wait = retry{}
		}
		pause(ctx, q.spread())
		q.heartbeat()
		wait.sleep(ctx)
	}
}

func (q *queue) heartbeat() { q.cfg.heartbeat.mark(q.cfg.now()) }

// spread returns a random time to wait before the queue is read again after its watch has ended.
// The watches of all others may have ended too, and each candidate reads as many keys as are ahead
// of it. The first ones in the queue hardly wait.
func (q *queue) spread() time.Duration {
	q.mu.Lock()
	keys := len(q.entries)
	q.mu.Unlock()
	most := min(time.Duration(keys)*10*time.Millisecond,
		q.cfg.timing.RenewInterval(), HeartbeatInterval/2)
	return rand.N(1 + most)
}

// ask reads over all members, and returns which has answered.
func (q *queue) ask(
	ctx context.Context, timeout time.Duration, what *pb.RangeRequest,
) (*member, *pb.RangeResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	type answer struct {
		from *member
		resp *pb.RangeResponse
	}
	got, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (answer, error) {
			conn, err := m.conn()
			if err != nil {
				return answer{}, err
			}
			resp, err := pb.NewKVClient(conn).Range(ctx, what)
			return answer{m, resp}, rpctypes.Error(err)
		})
	q.heartbeat()
	if err != nil {
		return nil, nil, fmt.Errorf("read the queue: %w", err)
	}
	return got.from, got.resp, nil
}

// loadAhead reads who is ahead of us, if our key has been put. An error is also kept for view.
func (q *queue) loadAhead(ctx context.Context) error {
	q.mu.Lock()
	created := q.created
	q.mu.Unlock()
	if created == 0 {
		return nil
	}
	ahead := wholePrefix(q.cfg.prefix)
	ahead.MaxCreateRevision = created
	_, resp, err := q.ask(ctx, q.cfg.timeout, ahead)
	if err != nil {
		q.mu.Lock()
		q.err = err
		q.mu.Unlock()
		poke(q.changed)
		return err
	}
	q.setAhead(resp.Kvs, resp.Header.Revision)
	return nil
}

// put notes that our key is in etcd, with this create revision.
func (q *queue) put(created int64) {
	q.mu.Lock()
	q.created = created
	q.mu.Unlock()
	poke(q.puts)
}

// isLoaded reports whether we have read who is ahead of our key.
func (q *queue) isLoaded() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.entries != nil
}

// waitUntilFirst returns nil once no key is ahead of ours.
func (q *queue) waitUntilFirst(ctx context.Context) error {
	select {
	case <-q.first:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// isProven reports whether it is certain that no key is ahead of ours, and that ours was there when
// the last one went. It is asked when waitUntilFirst has returned.
func (q *queue) isProven() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.proven
}

// signalFirst wakes waitUntilFirst if no key is ahead of ours. complete: no deletion was missed.
// q.mu is held.
func (q *queue) signalFirst(complete bool) {
	own, ok := q.entries[q.cfg.own]
	if !ok || own.created != q.created || len(q.entries) > 1 {
		return
	}
	select {
	case <-q.first:
	default:
		q.proven = complete
		close(q.first)
	}
}

// setAhead keeps what loadAhead has read at that revision.
func (q *queue) setAhead(kvs []*mvccpb.KeyValue, revision int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.err, q.revision, q.entries = nil, revision, make(map[string]queueEntry, len(kvs))
	for _, kv := range kvs {
		e := newQueueEntry(q.cfg.prefix, kv)
		q.entries[e.key] = e
	}
	switch own := q.entries[q.cfg.own]; {
	case own.created != q.created:
		q.cfg.lost(ErrKeyDeleted)
	case !own.candidate:
		q.cfg.lost(ErrKeyOverwritten)
	}
	poke(q.changed)
	// Last: on one CPU the goroutine that is woken last runs first, and the job is waiting.
	q.signalFirst(true)
}

// apply removes the keys whose deletion the watch shows. complete: it shows all deletions.
func (q *queue) apply(events []*clientv3.Event, complete bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, event := range events {
		key := string(event.Kv.Key)
		if key == q.cfg.own {
			q.cfg.lost(ErrKeyDeleted)
		}
		// The key may have been deleted and made again before it was read.
		if _, ahead := q.entries[key]; ahead && event.Kv.ModRevision > q.revision {
			delete(q.entries, key)
			poke(q.changed)
		}
	}
	q.signalFirst(complete)
}

// suspect moves the watch to another member, if that member serves it.
func (q *queue) suspect(m *member) {
	select {
	case q.suspects <- m:
	default:
	}
}

func (q *queue) view() (view, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	v := view{watched: q.watched}
	if own, ok := q.entries[q.cfg.own]; ok {
		v.own, v.ahead = &own, len(q.entries)-1
	}
	var head, ahead queueEntry
	for _, e := range q.entries {
		if head.created == 0 || e.created < head.created {
			head = e
		}
		if v.own != nil && e.created < v.own.created && !e.candidate &&
			(ahead.created == 0 || e.created < ahead.created) {
			ahead = e
		}
	}
	if head.created != 0 {
		v.head = &head
	}
	if ahead.created != 0 {
		v.blocker = ahead.blocker()
	}
	return v, q.err
}
