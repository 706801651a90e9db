package election

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// progressInterval is how often a member is asked whether it has sent all that is old.
const progressInterval = 100 * time.Millisecond

// A Follower learns how keys change. An error of its methods ends Follow.
type Follower interface {
	// Ranges are those of the keys: the first key, and the end, which is no part of the range.
	Ranges() [][2]string
	// State comes first, with all keys as they were at that revision. It comes again, with gap, if
	// etcd no longer has the changes before that revision.
	State(revision int64, gap bool, kvs []*mvccpb.KeyValue) error
	// Changed comes with changes since, in the order of their revisions.
	Changed(revision int64, events []*mvccpb.Event) error
	// Lost says, once, that etcd does not answer any more. Follow goes on when it does.
	Lost(err error)
}

// A FutureError is a revision that etcd does not have yet. Now is the one that it has.
type FutureError struct{ Now int64 }

func (e *FutureError) Error() string {
	return fmt.Sprintf("etcd has only the revision %d yet", e.Now)
}

// Follow tells f of all changes from that revision on, 0: from now on, until ctx ends. If etcd
// never answers, that is an error.
func (c *Client) Follow(ctx context.Context, from int64, f Follower) error {
	w := &following{Follower: f, client: c, ranges: f.Ranges()}
	if from > 0 {
		w.startAt(max(1, from-1)) // 1 is the revision of an empty etcd, 0 stands for the latest one
	}
	var wait retry
	for {
		began := time.Now()
		err := w.run(ctx)
		if time.Since(began) > time.Minute {
			wait = retry{}
		}
		var future *FutureError
		switch {
		case ctx.Err() != nil, w.failed != nil:
			return cmp.Or(w.failed, ctx.Err())
		case errors.Is(err, rpctypes.ErrCompacted):
			continue
		case !w.known && !w.gap, errors.As(err, &future),
			errors.Is(err, rpctypes.ErrPermissionDenied), errors.Is(err, rpctypes.ErrAuthFailed):
			return err
		case !w.lost:
			w.lost = true
			w.Lost(err)
		}
		wait.sleep(ctx)
	}
}

// following is a call of Follow.
type following struct {
	Follower
	client *Client
	ranges [][2]string
	at     []int64 // of each range, the revision up to which its changes are known; nil: none yet
	known  bool    // the follower has got the state
	gap    bool    // and gets it again, because changes are gone
	lost   bool    // etcd does not answer
	failed error   // of the follower
}

func (w *following) startAt(revision int64) {
	w.at = slices.Repeat([]int64{revision}, len(w.ranges))
}

// run follows until the member that serves it is lost.
func (w *following) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// This also gets a token, if one is needed.
	now, err := w.now(ctx)
	if err != nil {
		return err
	}
	switch {
	case w.at == nil:
		w.startAt(now)
	case slices.Min(w.at) > now && !w.known && !w.gap:
		return &FutureError{now}
	case slices.Min(w.at) > now: // it is not the same etcd, or one from a backup
		w.startAt(now)
		w.known, w.gap = false, true
	}
	m := w.client.members.all()[w.client.current.Load()] // it has answered first
	// The connection is its own, with pings: a member that hangs shows only by missing answers.
	client, err := m.dial(grpc.WithKeepaliveParams(
		keepalive.ClientParameters{Time: pingEvery, Timeout: pingTimeout / 2}))
	if err != nil {
		return &memberError{m.name(), err}
	}
	defer w.client.members.closeClient(client)
	err = w.follow(ctx, client, now)
	return &memberError{m.name(), rpctypes.Error(err)}
}

// now returns the latest revision. It makes sure that all keys may be read.
func (w *following) now(ctx context.Context) (int64, error) {
	txn := &pb.TxnRequest{}
	for i := range w.ranges {
		r := w.keys(i)
		r.Limit, r.KeysOnly = 1, true
		txn.Success = append(txn.Success,
			&pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	}
	resp, err := w.client.Txn(ctx, txn)
	if err != nil {
		return 0, err
	}
	return resp.Header.Revision, nil
}

func (w *following) keys(i int) *pb.RangeRequest {
	return &pb.RangeRequest{Key: []byte(w.ranges[i][0]), RangeEnd: []byte(w.ranges[i][1])}
}

// follow follows over the client. now is a revision that its member has.
func (w *following) follow(ctx context.Context, client *clientv3.Client, now int64) error {
	if !w.known {
		err := w.readState(ctx, client)
		if errors.Is(rpctypes.Error(err), rpctypes.ErrCompacted) {
			w.gap = true
			err = cmp.Or(w.findOldest(ctx, client), err)
		}
		if err != nil {
			return err
		}
	}
	begin := slices.Min(w.at) + 1
	stream, err := w.watch(ctx, client, begin)
	if err != nil {
		return err
	}
	// etcd sends old changes of one range after the other. They wait until it has sent all of them.
	old := begin <= now
	asking, answered := context.WithCancel(ctx)
	defer answered()
	if old {
		go askProgress(asking, stream)
	}
	var waiting []*mvccpb.Event
	seen := slices.Clone(w.at)
	for {
		resp, err := stream.Recv()
		i := int(resp.GetWatchId()) - 1
		switch {
		case err != nil:
			return err
		case resp.CompactRevision > 0:
			w.startAt(resp.CompactRevision)
			w.known, w.gap = false, true
			return rpctypes.ErrCompacted
		case resp.Canceled:
			return errors.New(resp.CancelReason)
		case resp.Created:
			w.lost = false
		case i < 0: // an answer to askProgress
			if !old || resp.Header.Revision < now {
				continue
			}
			answered()
			if err := w.show(waiting); err != nil {
				return err
			}
			old, waiting = false, nil
			for i := range w.at {
				w.at[i] = max(seen[i], now)
			}
		case i < len(w.at) && len(resp.Events) > 0:
			events := slices.DeleteFunc(resp.Events, func(e *mvccpb.Event) bool {
				return e.Kv.ModRevision <= w.at[i] // shown before the connection broke
			})
			if len(events) > 0 {
				seen[i] = events[len(events)-1].Kv.ModRevision
			}
			if old {
				waiting = append(waiting, events...)
				continue
			}
			if err := w.show(events); err != nil {
				return err
			}
			w.at[i] = seen[i]
		}
	}
}

// readState reads all keys as they were at the revision where it begins. It makes no transaction of
// that, because etcd may have compacted the revision.
func (w *following) readState(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, w.client.timeout)
	defer cancel()
	var all []*mvccpb.KeyValue
	for i := range w.ranges {
		r := w.keys(i)
		r.Revision = slices.Min(w.at)
		resp, err := pb.NewKVClient(client.ActiveConnection()).Range(ctx, r)
		if err != nil {
			return err
		}
		all = append(all, resp.Kvs...)
	}
	w.startAt(slices.Min(w.at))
	if w.failed = w.State(w.at[0], w.gap, all); w.failed != nil {
		return w.failed
	}
	w.known, w.gap = true, false
	return nil
}

// findOldest finds the oldest revision that etcd has, and begins there.
func (w *following) findOldest(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithTimeout(ctx, w.client.timeout)
	defer cancel()
	stream, err := w.watch(ctx, client, 1)
	for err == nil {
		var resp *pb.WatchResponse
		if resp, err = stream.Recv(); resp.GetCompactRevision() > 0 {
			w.startAt(resp.CompactRevision)
			return nil
		}
	}
	return err
}

// watch opens a watch of each range. Their numbers begin with 1.
func (w *following) watch(
	ctx context.Context, client *clientv3.Client, from int64,
) (pb.Watch_WatchClient, error) {
	stream, err := pb.NewWatchClient(client.ActiveConnection()).Watch(
		clientv3.WithRequireLeader(ctx))
	for i := 0; err == nil && i < len(w.ranges); i++ {
		keys := w.keys(i)
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
			CreateRequest: &pb.WatchCreateRequest{
				Key: keys.Key, RangeEnd: keys.RangeEnd, StartRevision: from, WatchId: int64(i + 1),
			},
		}})
		if errors.Is(err, io.EOF) { // the stream has ended, and Recv returns the reason
			return stream, nil
		}
	}
	return stream, err
}

// askProgress asks, again and again, whether all old changes are sent: etcd answers only if they
// are.
func askProgress(ctx context.Context, stream pb.Watch_WatchClient) {
	for ctx.Err() == nil {
		err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{
			ProgressRequest: &pb.WatchProgressRequest{},
		}})
		if err != nil {
			return // Recv returns the reason
		}
		pause(ctx, progressInterval)
	}
}

// show tells the follower of changes, one revision after the other.
func (w *following) show(events []*mvccpb.Event) error {
	slices.SortStableFunc(events, func(a, b *mvccpb.Event) int {
		return cmp.Compare(a.Kv.ModRevision, b.Kv.ModRevision)
	})
	for len(events) > 0 {
		revision, n := events[0].Kv.ModRevision, 1
		for n < len(events) && events[n].Kv.ModRevision == revision {
			n++
		}
		if w.failed = w.Changed(revision, events[:n]); w.failed != nil {
			return w.failed
		}
		events = events[n:]
	}
	return nil
}
