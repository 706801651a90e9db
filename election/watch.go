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

// forbiddenRetry is how often we look whether etcd's roles allow by now what they forbade.
const forbiddenRetry = 5 * time.Minute

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
	// steered is of what people have written, near the front. observe has seen what it brings. nil:
	// it is not watched.
	steered clientv3.WatchChan
	asked   time.Duration // when we last tried to watch that
	// opened is the number of their stream; 0: it is not sure that they have the same.
	opened int64
	stop   context.CancelFunc // ends all

	seen       int64         // the latest revision that the member has reported
	unanswered int           // ticks since its last answer
	heard      time.Duration // when the watch last showed or answered something
	behind     bool          // our key has been put, and who is ahead of it has to be read
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
	q.cfg.steering.tryAgain()
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
	if err := w.watch(ctx, wctx, q.marker()); err != nil {
		return err
	}
	q.mu.Lock()
	q.watched, q.err, q.conn = true, nil, w
	poke(q.changed)
	q.mu.Unlock()
	return w.run(ctx, wctx)
}

// watch watches the marker, or the whole queue, in place of what is watched. Then it reads what
// that does not show. If something else has to be watched by then, it goes on with that. Meanwhile
// no event is received.
func (w *watchConn) watch(ctx, wctx context.Context, marker string) error {
	q := w.queue
	for {
		if err := w.open(wctx, marker); err != nil {
			return err
		}
		q.heartbeat()
		if err := w.read(ctx); err != nil {
			return err
		}
		w.unanswered, w.heard = 0, q.cfg.now()
		if q.fits(w.marker) {
			return nil
		}
		marker = q.marker()
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
	before := w.member.streams.Load()
	var events, marked, steered clientv3.WatchChan
	if marker == "" {
		steered = w.watchSteering(ctx)
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
	w.steered, w.opened = steered, w.member.streams.Load()
	if w.opened > before+1 {
		w.opened = 0
	}
	return nil
}

// watchSteering watches what people have written, unless etcd's roles forbid that.
func (w *watchConn) watchSteering(ctx context.Context) clientv3.WatchChan {
	s := w.queue.cfg.steering
	if s == nil || s.whyDenied() != nil {
		return nil
	}
	w.member.observer.Store(s)
	first, end := s.bounds()
	return w.watcher.Watch(ctx, first, clientv3.WithRange(end), clientv3.WithFragment())
}

// receiveSteered takes the end of that watch. etcd ends it at once if its roles forbid it.
func (w *watchConn) receiveSteered(
	ctx context.Context, resp clientv3.WatchResponse, ok bool,
) error {
	if ok && resp.Err() == nil {
		return nil
	}
	q := w.queue
	w.steered = nil
	ctx, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	_, _, err := q.cfg.steering.readAll(ctx, w.member, &pb.RangeRequest{Key: []byte(q.cfg.own)})
	q.heartbeat()
	if err == nil && q.cfg.steering.whyDenied() == nil {
		err = errors.New("the watch of the hold has ended")
	}
	return err
}

// read reads who is ahead of us. In a crowd it only looks whether the marker and our own key are
// there, unless the marker is gone.
func (w *watchConn) read(ctx context.Context) error {
	q := w.queue
	if marker, ok := q.entry(w.marker); ok {
		cctx, cancel := context.WithTimeout(ctx, w.interval)
		defer cancel()
		got, err := q.check(cctx, []queueEntry{marker}, false)
		q.heartbeat()
		w.seen = max(w.seen, got.revision)
		if err != nil || len(got.gone) == 0 && q.fits(w.marker) {
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
	w.ticked, w.asked = w.looked, w.looked
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
		case resp, ok := <-w.steered:
			err = w.receiveSteered(wctx, resp, ok)
		case resp, ok := <-w.marked:
			if err = w.receive(resp, ok); err == nil && !q.fits(w.marker) {
				// We may be near the front. That one read shows, and if it is so, it is
				// the one that has to follow the opening.
				err = w.watch(ctx, wctx, "")
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
	w.unanswered, w.heard = 0, w.queue.cfg.now()
	w.seen = max(w.seen, resp.Header.Revision)
	w.queue.apply(resp.Events, w.marker == "" && w.isComplete())
	return nil
}

// load reads who is ahead of us. Meanwhile no event is received, so the liveness check begins
// again.
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
	return w.watch(ctx, wctx, w.queue.marker())
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
		w.behind = w.behind || l.lost
		q.keepLook(w.marker != "", l.err)
		shown = w.marker != "" && l.from == w.member
	default:
	}
	err, due := w.fit(ctx, wctx), q.cfg.now()-w.looked > q.cfg.timing.TTL
	switch {
	case err != nil:
		return err
	case q.cfg.steering.isDenied() && q.cfg.now()-w.asked > forbiddenRetry:
		w.asked = q.cfg.now()
		q.cfg.steering.tryAgain()
		if w.marker == "" {
			return w.watch(ctx, wctx, "")
		}
	case w.marker == "" && !w.isOrdered():
		return w.watch(ctx, wctx, "")
	case w.behind:
		if err := w.load(ctx, wctx); err != nil {
			return err
		}
	case w.look == nil && (w.marker != "" || due):
		// In goroutines of their own: the watch must not wait for them.
		found, marker := make(chan look, 1), w.marker
		w.look = found
		w.looking.Go(func() {
			l, err := q.look(wctx, w.interval, marker, !due) // another one follows
			l.err = err
			found <- l
		})
		w.looking.Go(func() { w.askVersion(wctx) })
	}
	q.heartbeat()
	// In a crowd the looks suffice. But once in a TTL the watch itself has to answer. It may hang
	// although its member answers. And etcd's client goes on with the last revision that it knows
	// when a connection is back: it should not be an old one.
	if shown && q.cfg.now()-w.heard < q.cfg.timing.TTL {
		w.unanswered = 0
		return nil
	}
	if w.unanswered++; w.unanswered > 1 {
		// etcd does not answer a request for progress while nothing was written since the watch
		// began (with the revision after the read; so does the client's after a broken connection).
		// Then the watch can't have missed anything either.
		if w.isUpToDate(wctx) {
			w.unanswered, w.heard = 0, q.cfg.now()
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
