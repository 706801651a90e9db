package election

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
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
	queue   *queue
	member  *member
	client  *clientv3.Client // of the member
	watcher clientv3.Watcher
	// interval is the longest time between two ticks. But the tick after a question comes after
	// answerWait: interval and answerWait together are never longer than HeartbeatInterval.
	interval, answerWait time.Duration
	ticked               time.Duration // when the last tick was

	// What is watched: the whole queue or, in a crowd, our own key and the marker.
	marker string             // "": the whole queue
	events clientv3.WatchChan // of the queue, or of our own key
	marked clientv3.WatchChan // of the marker; nil: there is none
	stop   context.CancelFunc // ends both

	seen       int64 // the latest revision that the member has reported
	unanswered int   // ticks since its last answer
	behind     bool  // our key has been put, and who is ahead of it could not be read
	// complete is the number of the connection whose member is known to show all deletions; 0: it
	// is not known; incomplete: it may have missed one.
	complete atomic.Int64

	looked  time.Duration // when the last look over all members ended, once in a TTL
	look    chan look     // the result of a look, while one is under way; else nil
	looking sync.WaitGroup
}

// follow watches the queue, until the watch ends or the member is suspect.
func (q *queue) follow(ctx context.Context) error {
	interval := q.cfg.timing.RenewInterval()
	w := &watchConn{
		queue: q, interval: min(interval, HeartbeatInterval*3/5),
		answerWait: min(interval, HeartbeatInterval*2/5),
	}
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
	w.stop = func() {}
	w.looking.Go(func() { w.askVersion(wctx) }) // meanwhile
	if err := w.watch(ctx, wctx); err != nil {
		return err
	}
	q.mu.Lock()
	q.watched, q.err, q.conn = true, nil, w
	poke(q.changed)
	q.mu.Unlock()
	return w.run(ctx, wctx)
}

// watch watches what has to be watched, in place of what is, and reads what has happened before.
// Meanwhile no event is received.
func (w *watchConn) watch(ctx, wctx context.Context) error {
	q := w.queue
	for {
		if err := w.open(wctx, q.marker()); err != nil {
			return err
		}
		q.heartbeat()
		if err := w.read(ctx); err != nil {
			return err
		}
		w.unanswered = 0
		if q.fits(w.marker) {
			return nil
		}
	}
}

// open opens the watch of the whole queue or, with a marker, those of our own key and of the
// marker. It returns when the member has answered. So what is read after that is at least as new as
// the beginning of the watch.
func (w *watchConn) open(wctx context.Context, marker string) error {
	q := w.queue
	ctx, stop := context.WithCancel(wctx)
	answered := time.AfterFunc(w.interval, stop)
	watch := func(key string, more ...clientv3.OpOption) clientv3.WatchChan {
		return w.watcher.Watch(ctx, key,
			append(more, clientv3.WithFilterPut(), clientv3.WithFragment())...)
	}
	var events, marked clientv3.WatchChan
	if marker == "" {
		events = watch(q.cfg.prefix, clientv3.WithPrefix())
	} else {
		events, marked = watch(q.cfg.own), watch(marker)
	}
	if !answered.Stop() {
		q.cfg.members.reset(w.member)
		return errUnanswered
	}
	w.stop() // not earlier: etcd's client ends a stream without a watch
	w.marker, w.events, w.marked, w.stop = marker, events, marked, stop
	return nil
}

// read reads who is ahead of us. In a crowd it looks whether the marker and our own key are there.
// It reads all only if that marker is gone, and we are not near the front.
func (w *watchConn) read(ctx context.Context) error {
	q := w.queue
	if w.marker != "" {
		l, err := q.look(ctx, w.interval, w.marker, false)
		w.seen = max(w.seen, l.revision)
		if err != nil || q.fits(w.marker) || q.marker() == "" {
			return err
		}
	}
	if err := q.loadAhead(ctx); err != nil {
		return err
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	w.seen = max(w.seen, q.revision)
	return nil
}

// run follows the watch. ctx is the queue's, wctx the watch's own.
func (w *watchConn) run(ctx, wctx context.Context) error {
	q := w.queue
	tick := time.NewTimer(w.interval)
	defer tick.Stop()
	w.looked = q.cfg.now()
	w.ticked = w.looked
	for {
		q.heartbeat()
		var err error
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
				err = w.load(ctx, wctx)
			}
		case resp, ok := <-w.events:
			err = w.receive(resp, ok)
		case resp, ok := <-w.marked:
			if err = w.receive(resp, ok); err == nil && !q.fits(w.marker) {
				err = w.advance(ctx, wctx)
			}
		case <-q.awake:
			// Not to wake up again soon. A question that is not answered yet keeps its time.
			if w.unanswered == 0 && q.cfg.now()-w.ticked > w.interval*3/4 {
				err = w.tick(ctx, wctx)
			}
		case <-tick.C:
			err = w.tick(ctx, wctx)
		}
		if err != nil {
			return err
		}
		tick.Reset(w.untilTick())
	}
}

// untilTick is the time until the next tick. Mostly a renewal comes before.
func (w *watchConn) untilTick() time.Duration {
	wait := w.interval
	if w.unanswered > 0 {
		wait = w.answerWait
	}
	return max(0, w.ticked+wait-w.queue.cfg.now())
}

// receive takes what the watch shows.
func (w *watchConn) receive(resp clientv3.WatchResponse, ok bool) error {
	if !ok {
		return errors.New("the watch has ended")
	}
	if err := resp.Err(); err != nil {
		return fmt.Errorf("watch the queue: %w", err)
	}
	w.unanswered, w.seen = 0, max(w.seen, resp.Header.Revision)
	w.queue.apply(resp.Events, w.marker == "" && w.isComplete())
	return nil
}

// advance looks where we stand when the marker is gone.
func (w *watchConn) advance(ctx, wctx context.Context) error {
	if w.queue.marker() != "" {
		_, _ = w.queue.look(ctx, w.interval, "", true) // after an error we watch more keys than necessary
		w.queue.heartbeat()
	}
	return w.watch(ctx, wctx)
}

// load reads who is ahead of us for the first time. Meanwhile no event is received, so the liveness
// check begins again.
func (w *watchConn) load(ctx, wctx context.Context) error {
	w.behind = w.queue.loadAhead(ctx) != nil
	w.unanswered = 0
	return w.fit(ctx, wctx)
}

// fit watches something else if it has to be something else by now.
func (w *watchConn) fit(ctx, wctx context.Context) error {
	if w.queue.fits(w.marker) {
		return nil
	}
	return w.watch(ctx, wctx)
}

// tick looks at the queue now and then, and asks whether the watch is still served.
func (w *watchConn) tick(ctx, wctx context.Context) error {
	q := w.queue
	w.ticked = q.cfg.now()
	shown := false // the member has answered, and has shown all that the watch would show
	select {
	case l := <-w.look:
		if l.gone != (queueEntry{}) && q.isAhead(l.gone) {
			q.cfg.members.reset(w.member)
			return errBehind
		}
		w.look = nil
		if !l.alone {
			w.looked = q.cfg.now()
		}
		if shown = w.marker != "" && l.from == w.member; shown {
			w.seen = max(w.seen, l.revision)
		}
	default:
	}
	err, due := w.fit(ctx, wctx), q.cfg.now()-w.looked > q.cfg.timing.TTL
	switch {
	case err != nil:
		return err
	case w.behind:
		if err := w.load(ctx, wctx); err != nil {
			return err
		}
	case w.look == nil && (w.marker != "" || due):
		// In goroutines of their own: the watch must not wait for them.
		found, marker := make(chan look, 1), w.marker
		w.look = found
		w.looking.Go(func() {
			// An error does no harm: another look follows.
			l, _ := q.look(wctx, w.interval, marker, !due)
			found <- l
		})
		w.looking.Go(func() { w.askVersion(wctx) })
	}
	q.heartbeat()
	if shown {
		w.unanswered = 0
		return nil
	}
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
	pctx, cancel := context.WithTimeout(wctx, w.answerWait)
	defer cancel()
	_ = w.watcher.RequestProgress(pctx) // after an error no answer comes, and that is noticed
	return nil
}

// isUpToDate reports whether the member answers and has nothing newer than the watch has shown.
func (w *watchConn) isUpToDate(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, w.answerWait)
	defer cancel()
	conn, err := w.member.conn()
	if err != nil {
		return false
	}
	resp, err := pb.NewKVClient(conn).Range(ctx,
		&pb.RangeRequest{Key: []byte(w.queue.cfg.own), KeysOnly: true, Serializable: true})
	return err == nil && resp.Header.Revision <= w.seen
}
