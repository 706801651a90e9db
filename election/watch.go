package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// forbiddenRetry is how often we look whether etcd's roles allow by now what they forbade.
const forbiddenRetry = 5 * time.Minute

// Why a watch is given up.
var (
	errUnanswered = errors.New("the watch is not answered")
	errSuspect    = errors.New("the member that serves the watch does not renew the lease")
	errBehind     = errors.New("the watch lags behind the other members")
)

// watchConn is a watch of the queue: a stream, which one member serves. If the stream breaks, the
// watch ends, and another one begins anew.
//
// The Watcher of etcd's client is not used. It would open a stream that breaks again, and go on
// with what was missed, in any order. Its answers pass through three goroutines. And it leaves one
// for ever if a watch is refused at the moment when it is closed.
type watchConn struct {
	queue      *queue
	member     *member
	conn       *grpc.ClientConn // of the member
	connection int64            // its number, see member.connections
	stream     pb.Watch_WatchClient
	answers    chan *pb.WatchResponse // in the order of their arrival; closed when the stream ends
	ended      error                  // why the stream has ended, set before that
	stop       context.CancelFunc     // ends the stream
	running    sync.WaitGroup         // what ends with the watch
	// interval is the longest time between two ticks. But the tick after a question comes after
	// answerWait: interval and answerWait together are never longer than HeartbeatInterval.
	interval, answerWait time.Duration
	ticked               time.Duration // when the last tick was

	// What is watched: the whole queue or, in a crowd, our own key and the marker. Near the front
	// also what people have written, unless etcd's roles forbid that.
	marker string // "": the whole queue
	// first and last are the ids of the watches on the stream that are in use. Those before are
	// canceled. steers is that of what people have written; 0: it is not watched.
	first, last, steers int64
	asked               time.Duration // when we last tried to watch that

	unanswered int           // ticks since the last answer
	heard      time.Duration // when the watch last showed or answered something
	behind     bool          // our key has been put, and who is ahead of it has to be read
	// complete is whether the member shows all deletions; nil: that is not known.
	complete atomic.Pointer[bool]

	looked time.Duration // when the last look over all members ended, once in a TTL
	look   chan look     // the result of a look, while one is under way; else nil
}

// follow watches the queue, until the watch ends or the member is suspect.
func (q *queue) follow(ctx context.Context) error {
	interval := q.cfg.timing.RenewInterval()
	w := &watchConn{
		queue: q, interval: min(interval, HeartbeatInterval*3/5),
		answerWait: min(interval, HeartbeatInterval*2/5),
		answers:    make(chan *pb.WatchResponse),
	}
	// The member that answers first serves the watch. Any key will do. But the request asks for the
	// whole prefix, because a candidate that may not read all keys must not join. It also gets a
	// token, if one is needed.
	anyKey := wholePrefix(q.cfg.prefix)
	anyKey.Limit, anyKey.KeysOnly = 1, true
	q.cfg.steering.tryAgain()
	from, err := q.ask(ctx, w.interval, anyKey)
	if err != nil {
		return err
	}
	conn, err := from.conn()
	if err != nil {
		return err
	}
	w.member, w.conn, w.connection = from, conn, from.connections.Load()
	defer w.running.Wait()
	wctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer stop()
	w.stop = stop
	w.running.Go(func() { w.askVersion(wctx) }) // meanwhile
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
		if err := w.open(ctx, wctx, marker); err != nil {
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
// the beginning of the watch, and shows all that has been received meanwhile.
func (w *watchConn) open(ctx, wctx context.Context, marker string) error {
	answered := time.AfterFunc(w.interval, w.stop)
	refused, err := w.create(wctx, marker)
	if !answered.Stop() {
		w.queue.cfg.members.reset(w.member)
		return errUnanswered
	}
	w.queue.heartbeat()
	if err == nil && refused != nil {
		err = w.steeringRefused(ctx, refused)
	}
	return err
}

// create asks for the watches, and for the end of those before, and waits until the member has
// answered. refused: it refuses the watch of what people have written.
func (w *watchConn) create(wctx context.Context, marker string) (refused, err error) {
	if w.stream == nil {
		w.stream, err = pb.NewWatchClient(w.conn).Watch(wctx)
		if err != nil {
			return nil, w.failed(err)
		}
		w.running.Go(func() { w.receive(wctx) })
	}
	before := w.first
	w.marker, w.first, w.steers = marker, w.last+1, 0
	for _, r := range w.wanted() {
		w.last++
		r.WatchId = w.last
		err = cmp.Or(err, w.send(&pb.WatchRequest{
			RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: r},
		}))
	}
	for id := before; id > 0 && id < w.first; id++ {
		err = cmp.Or(err, w.send(&pb.WatchRequest{
			RequestUnion: &pb.WatchRequest_CancelRequest{
				CancelRequest: &pb.WatchCancelRequest{WatchId: id},
			},
		}))
	}
	// etcd answers in the order of the requests. Mostly it does not say which one it refuses.
	for id := w.first; id <= w.last && err == nil; {
		resp := <-w.answers
		switch {
		case resp == nil || !resp.Created:
			err = w.over(resp) // the read that follows shows what it shows
			continue
		case resp.Canceled && id == w.steers:
			refused = w.failed(errors.New(resp.CancelReason))
		case resp.Canceled:
			err = w.failed(errors.New(resp.CancelReason))
		}
		id++
	}
	return refused, err
}

// wanted returns what has to be watched.
func (w *watchConn) wanted() []*pb.WatchCreateRequest {
	cfg := &w.queue.cfg
	noPut := []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NOPUT}
	if w.marker != "" {
		return []*pb.WatchCreateRequest{
			{Key: []byte(cfg.own), Filters: noPut}, {Key: []byte(w.marker), Filters: noPut},
		}
	}
	all := wholePrefix(cfg.prefix)
	whole := &pb.WatchCreateRequest{Key: all.Key, RangeEnd: all.RangeEnd, Filters: noPut}
	s := cfg.steering
	if s == nil || s.isDenied() {
		return []*pb.WatchCreateRequest{whole}
	}
	// What people have written comes first: etcd keeps the events of a watch until it has answered
	// that the watch is created.
	w.steers = w.first
	first, end := s.bounds()
	return []*pb.WatchCreateRequest{{Key: []byte(first), RangeEnd: []byte(end)}, whole}
}

func (w *watchConn) failed(err error) error {
	return fmt.Errorf("watch the queue: %w", rpctypes.Error(err))
}

// send sends a request. It does not wait for the member: gRPC has room for thousands of them. If
// the stream has ended, answers shows that.
func (w *watchConn) send(r *pb.WatchRequest) error {
	if err := w.stream.Send(r); err != nil && !errors.Is(err, io.EOF) {
		return w.failed(err)
	}
	return nil
}

// receive receives the answers, until the stream ends.
func (w *watchConn) receive(wctx context.Context) {
	defer close(w.answers)
	for {
		resp, err := w.stream.Recv()
		if err != nil {
			w.ended = err
			return
		}
		select {
		case w.answers <- resp:
		case <-wctx.Done():
			w.ended = wctx.Err()
			return
		}
	}
}

// steeringRefused looks whether etcd's roles forbid the watch of what people have written. Then we
// do without. An old etcd does not say why it refuses a watch.
func (w *watchConn) steeringRefused(ctx context.Context, refused error) error {
	cfg := &w.queue.cfg
	w.steers = 0
	ctx, cancel := context.WithTimeout(ctx, w.interval)
	defer cancel()
	_, _, err := cfg.steering.readAll(ctx, w.member, &pb.RangeRequest{Key: []byte(cfg.own)})
	w.queue.heartbeat()
	if err == nil && !cfg.steering.isDenied() {
		err = refused
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
		if err != nil || len(got.gone) == 0 && q.fits(w.marker) {
			return err
		}
	}
	return q.loadAhead(ctx)
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
		case resp := <-w.answers:
			err = w.take(resp)
			if err == nil && !q.fits(w.marker) {
				// The marker is gone, and we may be near the front. That one read shows, and if
				// it is so, it is the one that has to follow the opening.
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

// take takes what the watch shows.
func (w *watchConn) take(resp *pb.WatchResponse) error {
	if err := w.over(resp); err != nil || w.isOld(resp) {
		return err
	}
	w.unanswered, w.heard = 0, w.queue.cfg.now()
	if w.steers > 0 && resp.WatchId == w.steers {
		w.queue.cfg.steering.observe(resp.Events)
	} else {
		w.queue.apply(resp.Events, w.marker == "" && w.isComplete())
	}
	return nil
}

// isOld reports whether the answer is about a watch that is not in use any more. An answer about
// the whole stream has a negative id.
func (w *watchConn) isOld(resp *pb.WatchResponse) bool {
	return resp.WatchId >= 0 && resp.WatchId < w.first
}

// over returns why the watch has ended, if the answer says so. nil: the stream has ended.
func (w *watchConn) over(resp *pb.WatchResponse) error {
	switch {
	case resp == nil:
		return w.failed(w.ended)
	case w.isOld(resp):
		return nil
	case resp.CompactRevision > 0:
		return w.failed(rpctypes.ErrCompacted)
	case resp.Canceled:
		return w.failed(errors.New(cmp.Or(resp.CancelReason, "etcd has canceled it")))
	}
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
	case w.behind:
		if err := w.load(ctx, wctx); err != nil {
			return err
		}
	case w.look == nil && (w.marker != "" || due):
		// In goroutines of their own: the watch must not wait for them.
		found, marker := make(chan look, 1), w.marker
		w.look = found
		w.running.Go(func() {
			l, err := q.look(wctx, w.interval, marker, !due) // another one follows
			l.err = err
			found <- l
		})
		w.running.Go(func() { w.askVersion(wctx) })
	}
	q.heartbeat()
	// In a crowd the looks suffice. But once in a TTL the watch itself has to answer: it may hang
	// although its member answers.
	if shown && q.cfg.now()-w.heard < q.cfg.timing.TTL {
		w.unanswered = 0
		return nil
	}
	// etcd answers if it has sent all that the watches show.
	if w.unanswered++; w.unanswered > 1 {
		q.cfg.members.reset(w.member)
		return errUnanswered
	}
	return w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{
		ProgressRequest: &pb.WatchProgressRequest{},
	}})
}
