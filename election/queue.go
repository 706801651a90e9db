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
	watched bool        // our key can be put: all that happens to it will be seen
	head    *queueEntry // whoever is first, leader or blocker
	own     *queueEntry // nil until it is known who is ahead of us
	blocker *Blocker    // the first one ahead of our own key
}

// leader returns the leader: whoever is first, if that is a candidate.
func (v view) leader() *Entry {
	if v.head == nil || !v.head.candidate {
		return nil
	}
	return v.head.entry()
}

// queue keeps in memory who is ahead of us, by one read when our key has been put, and one watch
// that was opened before. Whoever comes later is behind us and never matters to us, so the watch is
// of deletions only: that a candidate joins costs the others nothing, and a change of leader costs
// an event each. etcd's Election.Observe would cost a read and a watch per candidate at each
// change, and it never says that there is no leader.
//
// That one read is the only one of a join for which etcd reads the whole queue, as it does for
// whatever it sorts or filters.
type queue struct {
	cfg queueConfig
	// changed has room for one: somebody has to look at the view again.
	changed chan struct{}
	// suspects has room for one: a member that does not renew our lease.
	suspects chan *member
	// puts has room for one: our key has been put.
	puts chan struct{}
	// first is closed once no key is ahead of ours. None will be again: keys made later are behind.
	first chan struct{}

	mu       sync.Mutex
	watched  bool                  // it has been, at least once
	created  int64                 // our key's create revision; 0: not put yet
	entries  map[string]queueEntry // all that are ahead of our key, and that; nil: not read yet
	revision int64                 // at which entries were read
	err      error                 // why it is not being watched, or not read
	conn     *watchConn            // that serves the watch now, or served the last one
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

// run follows the queue until ctx ends. A watch that ends is no loss: it is opened again, on
// another member if need be, and meanwhile the lease's deadlines decide.
func (q *queue) run(ctx context.Context) {
	wait := retry{}
	for ctx.Err() == nil {
		started := q.cfg.now()
		err := q.follow(ctx)
		q.mu.Lock()
		q.err = err
		q.mu.Unlock()
		// A member that did not answer all the time may have too much to do: it would not help if
		// all of us came back at once.
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

// spread returns for how long to wait, by chance, before the queue is read again after its watch
// has ended: those of all others may have ended too, and each of them reads as many keys as are
// ahead of it. The first ones wait for next to nothing.
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

// loadAhead reads who is ahead of us, if our key has been put. An error is to be seen meanwhile.
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

// put says that our key is in etcd, with this create revision.
func (q *queue) put(created int64) {
	q.mu.Lock()
	q.created = created
	q.mu.Unlock()
	poke(q.puts)
}

// isLoaded reports whether it was read who is ahead of our key.
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

// signalFirst wakes waitUntilFirst if no key is ahead of ours. q.mu is held.
func (q *queue) signalFirst() {
	own, ok := q.entries[q.cfg.own]
	if !ok || own.created != q.created || len(q.entries) > 1 {
		return
	}
	select {
	case <-q.first:
	default:
		close(q.first)
	}
}

// setAhead takes over what loadAhead has read at that revision.
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
	q.signalFirst() // last: on one CPU whoever is woken last runs first, and the job is waiting
}

// apply takes over what a watch shows: deletions.
func (q *queue) apply(events []*clientv3.Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, event := range events {
		key := string(event.Kv.Key)
		if key == q.cfg.own {
			q.cfg.lost(ErrKeyDeleted)
		}
		// The key may have been made anew before it was read.
		if _, ahead := q.entries[key]; ahead && event.Kv.ModRevision > q.revision {
			delete(q.entries, key)
			poke(q.changed)
		}
	}
	q.signalFirst()
}

// suspect has the queue followed on another member, if it is followed on that one.
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
		v.own = &own
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
