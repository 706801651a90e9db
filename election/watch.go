package election

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Why a watch is given up.
var (
	errUnanswered = errors.New("the watch is not answered")
	errSuspect    = errors.New("the member that serves the watch does not renew the lease")
	errBehind     = errors.New("the watch lags behind the other members")
)

// watchConn is a watch of the queue, which one member serves.
type watchConn struct {
	queue    *queue
	member   *member
	client   *clientv3.Client // of the member
	watcher  clientv3.Watcher
	events   clientv3.WatchChan
	interval time.Duration // of the tick; both halves of the liveness check take one

	seen       int64 // the latest revision that the member has reported
	unanswered int   // ticks since its last answer
	behind     bool  // our key has been put, and who is ahead of it could not be read
	// complete is the number of the connection whose member is known to show all deletions; 0: it
	// is not known; incomplete: it may have missed one.
	complete atomic.Int64

	looked  time.Duration   // when the first key was last read, once in a TTL
	look    chan queueEntry // the result of such a read, while one is under way; else nil
	looking sync.WaitGroup
}

// follow watches the queue, until the watch ends or the member is suspect.
func (q *queue) follow(ctx context.Context) error {
	w := &watchConn{queue: q, interval: min(q.cfg.timing.RenewInterval(), HeartbeatInterval/2)}
	// The member that answers first serves the watch. Any key will do. But the request asks for the
	// whole prefix, because a candidate that may not read all keys must not join.
	anyKey := wholePrefix(q.cfg.prefix)
	anyKey.Limit, anyKey.KeysOnly = 1, true
	from, answer, err := q.ask(ctx, w.interval, anyKey)
	if err != nil {
		return err
	}
	client, err := from.open()
	if err != nil {
		return err
	}
	w.member, w.client, w.watcher = from, client, clientv3.NewWatcher(client)
	w.seen = answer.Header.Revision
	defer q.cfg.members.closing.Go(func() { _ = w.watcher.Close() })
	defer w.looking.Wait()
	wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	w.looking.Go(func() { w.askVersion(wctx) }) // meanwhile
	// Watch returns when the member has answered. So what we read after that is at least as new as
	// the beginning of the watch.
	answered := time.AfterFunc(w.interval, cancel)
	w.events = w.watcher.Watch(wctx, q.cfg.prefix,
		clientv3.WithPrefix(), clientv3.WithFilterPut(), clientv3.WithFragment())
	if !answered.Stop() {
		q.cfg.members.reset(from)
		return errUnanswered
	}
	if err := q.loadAhead(ctx); err != nil {
		return err
	}
	q.mu.Lock()
	q.watched, q.err, q.conn = true, nil, w
	w.seen = max(w.seen, q.revision)
	poke(q.changed)
	q.mu.Unlock()
	return w.run(ctx, wctx)
}

// run follows the watch. ctx is the queue's, wctx the watch's own.
func (w *watchConn) run(ctx, wctx context.Context) error {
	q := w.queue
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	w.looked = q.cfg.now()
	for {
		q.heartbeat()
		select {
		case <-ctx.Done():
			return nil
		case m := <-q.suspects:
			// Also if there is no other member: an etcd that stops waits for its watches to end.
			if m == w.member {
				return errSuspect
			}
		case <-q.puts:
			if !q.isLoaded() {
				w.load(ctx)
			}
		case resp, ok := <-w.events:
			if !ok {
				return errors.New("the watch has ended")
			}
			if err := resp.Err(); err != nil {
				return fmt.Errorf("watch the queue: %w", err)
			}
			w.unanswered, w.seen = 0, max(w.seen, resp.Header.Revision)
			q.apply(resp.Events, w.isComplete())
		case <-tick.C:
			if err := w.tick(ctx, wctx); err != nil {
				return err
			}
		}
	}
}

// load reads who is ahead of us. Meanwhile no event is received, so the liveness check begins
// again.
func (w *watchConn) load(ctx context.Context) {
	w.behind = w.queue.loadAhead(ctx) != nil
	w.unanswered = 0
}

// tick reads the first key now and then, and asks whether the watch is still served.
func (w *watchConn) tick(ctx, wctx context.Context) error {
	q := w.queue
	select {
	case gone := <-w.look:
		if gone != (queueEntry{}) && q.isAhead(gone) {
			q.cfg.members.reset(w.member)
			return errBehind
		}
		w.looked, w.look = q.cfg.now(), nil
	default:
	}
	switch {
	case w.behind:
		w.load(ctx)
	case w.look == nil && q.cfg.now()-w.looked > q.cfg.timing.TTL:
		// In goroutines of their own: the watch must not wait for them.
		found := make(chan queueEntry, 1)
		w.look = found
		w.looking.Go(func() { found <- q.lookAtHead(wctx, w.interval) })
		w.looking.Go(func() { w.askVersion(wctx) })
	}
	q.heartbeat()
	if w.unanswered++; w.unanswered > 1 {
		// etcd does not answer a request for progress while nothing was written since the watch
		// began (with the revision after the read; so does the client's after a broken connection).
		// Then the watch can't have missed anything either.
		if w.isUpToDate(wctx) {
			w.unanswered = 0
			return nil
		}
		q.cfg.members.reset(w.member)
		return errUnanswered
	}
	pctx, cancel := context.WithTimeout(wctx, w.interval)
	defer cancel()
	_ = w.watcher.RequestProgress(pctx) // after an error no answer comes, and that is noticed
	return nil
}

// isUpToDate reports whether the member answers and has nothing newer than the watch has shown.
func (w *watchConn) isUpToDate(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	conn, err := w.member.conn()
	if err != nil {
		return false
	}
	resp, err := pb.NewKVClient(conn).Range(ctx,
		&pb.RangeRequest{Key: []byte(w.queue.cfg.own), KeysOnly: true, Serializable: true})
	return err == nil && resp.Header.Revision <= w.seen
}

// lookAtHead reads the first key and our own, over all members. The leader may have given its key
// another value. And anybody may have written to either key without its lease: such a key never
// goes by itself. The watch shows neither, because it shows only deletions. (Old versions of etcd
// do not even show all of these.)
//
// If the first key is gone, lookAtHead returns its entry. The watch should show the deletion by the
// next tick. If it does not, its member lags behind the others although it answers. A read that
// fails does no harm, because another one follows.
func (q *queue) lookAtHead(ctx context.Context, timeout time.Duration) (gone queueEntry) {
	v, _ := q.view()
	if !v.isBehind() {
		return queueEntry{}
	}
	type answer struct {
		header    *pb.ResponseHeader
		head, own []*mvccpb.KeyValue
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	got, err := hedge(ctx, q.cfg.members, q.cfg.timing.hedgeDelay(),
		func(ctx context.Context, m *member) (answer, error) {
			header, kvs, err := m.readAll(ctx,
				&pb.RangeRequest{Key: []byte(v.head.key)}, &pb.RangeRequest{Key: []byte(q.cfg.own)})
			if err != nil {
				return answer{}, err
			}
			return answer{header, kvs[0], kvs[1]}, nil
		})
	if err != nil {
		return queueEntry{}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case got.header.Revision < q.revision: // an old etcd may show the past
		return queueEntry{}
	case len(got.own) == 0 || got.own[0].CreateRevision != q.created:
		q.cfg.lost(ErrKeyDeleted)
	case !newQueueEntry(q.cfg.prefix, got.own[0]).candidate:
		q.cfg.lost(ErrKeyOverwritten)
	}
	now, there := q.entries[v.head.key]
	switch {
	case !there || now.created != v.head.created:
		return queueEntry{}
	case len(got.head) == 0 || got.head[0].CreateRevision != now.created:
		return now
	}
	if found := newQueueEntry(q.cfg.prefix, got.head[0]); found != now {
		q.entries[v.head.key] = found
		poke(q.changed)
	}
	return queueEntry{}
}

// isAhead reports whether the entry is still ahead of us, as far as we know.
func (q *queue) isAhead(e queueEntry) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.entries[e.key] == e
}
