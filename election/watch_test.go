package election

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"leasehold/e2e/harness"
)

// newRunningQueue follows the queue e, in which our own key has so many others ahead of it. It
// returns its create revision too.
func newRunningQueue(
	t *testing.T, cluster *harness.Cluster, ttl time.Duration, ahead int,
) (*queue, int64) {
	t.Helper()
	ms, err := newMembers(testConfig(t, cluster.Endpoints(), "a"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ms.close)
	client, err := ms.all()[0].open()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := pb.NewLeaseClient(
		client.ActiveConnection(),
	).LeaseGrant(
		t.Context(), &pb.LeaseGrantRequest{ID: 0xa, TTL: 600},
	); err != nil {
		t.Fatal(err)
	}
	for i := range ahead {
		if _, err := client.Put(t.Context(), fmt.Sprintf("e/%d", i), ""); err != nil {
			t.Fatal(err)
		}
	}
	put, err := client.Put(t.Context(), "e/a", "", clientv3.WithLease(0xa))
	if err != nil {
		t.Fatal(err)
	}
	q := newQueue(queueConfig{
		prefix: "e/", own: "e/a", members: ms, timing: Timing{TTL: ttl}, now: harness.Now,
		timeout: time.Second, heartbeat: new(heartbeat), lost: func(err error) { t.Error(err) },
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { q.run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return q, put.Header.Revision
}

// A candidate must not wait for ever for an event that does not come.
func TestQueue_NoticesWhatTheWatchHasMissed(t *testing.T) {
	t.Parallel()
	q, own := newRunningQueue(t, newTestEtcd(t), time.Second, 0)
	q.put(own)
	waitForHead := func(key string) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for v, _ := q.view(); v.own == nil || v.head.key != key; v, _ = q.view() {
			select {
			case <-q.changed:
			case <-deadline:
				t.Fatalf("head %+v, want %s", v.head, key)
			}
		}
	}
	waitForHead("e/a")
	q.mu.Lock()
	q.entries = slices.Insert(q.entries, 0, queueEntry{key: "e/gone", created: 1})
	q.mu.Unlock()
	waitForHead("e/a")
}

// Those that have lost their watches at the same time do not come back at the same time, the more
// of them there are. The first in the queue, which matter, come back first.
func TestQueue_ComesBackSpread(t *testing.T) {
	for _, test := range []struct {
		keys      int
		ttl, want time.Duration
	}{
		{1, 15 * time.Second, 10 * ms},
		{2, 15 * time.Second, 20 * ms},
		{50, 15 * time.Second, 500 * ms},
		{1000, 15 * time.Second, 3 * time.Second},
		{1000, 5 * time.Minute, HeartbeatInterval / 2},
	} {
		q := newTestQueue(func(error) {})
		q.cfg.timing.TTL = test.ttl
		q.entries = make([]queueEntry, test.keys)
		least, most := time.Hour, time.Duration(0)
		for range 1000 {
			d := q.spread()
			least, most = min(least, d), max(most, d)
		}
		if most > test.want || most < test.want*4/5 || least > test.want/5 {
			t.Errorf(
				"%d keys are read after %v to %v, want 0 to %v", test.keys, least, most, test.want,
			)
		}
	}
}

// The watch of a queue of forty is opened again after 100 ms on average, with this TTL.
func TestQueue_WatchEnds_ComesBackSpread(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	q, own := newRunningQueue(t, cluster, time.Second, 40)
	q.put(own)
	// served waits until there is a watch, and that one is another than the last.
	served := func(last *watchConn) *watchConn {
		for began := time.Now(); time.Since(began) < 20*time.Second; time.Sleep(ms) {
			q.mu.Lock()
			current := q.conn
			q.mu.Unlock()
			if current != nil && current != last {
				return current
			}
		}
		t.Fatal("no watch is opened")
		return nil
	}
	most := time.Duration(0)
	for range 10 {
		last := served(nil)
		time.Sleep(
			2 * q.cfg.timing.RenewInterval(),
		) // a watch that ends as soon as it has begun is another matter
		began := harness.Now()
		q.suspect(last.member)
		served(last)
		most = max(most, harness.Now()-began)
	}
	t.Logf("the longest of 10 pauses: %v", most)
	if most < 50*ms { // by chance: one time in a million
		t.Errorf("the watch was opened again within %v each of 10 times", most)
	}
}

// refusing is an etcd that refuses every watch.
type refusing struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	refused chan struct{} // room for one
}

func (*refusing) Range(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
	return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 1}}, nil
}

func (s *refusing) Watch(
	stream grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse],
) error {
	for {
		r, err := stream.Recv()
		if err != nil || r.GetCreateRequest() == nil {
			return err
		}
		if err := stream.Send(&pb.WatchResponse{
			Header: &pb.ResponseHeader{Revision: 1}, WatchId: -1, Created: true, Canceled: true,
			CancelReason: rpctypes.ErrGRPCInvalidAuthToken.Error(),
		}); err != nil {
			return err
		}
		poke(s.refused)
	}
}

// A watch that is refused while its candidate leaves keeps no goroutine. The bubble waits for all.
func TestQueue_WatchRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		etcd := &refusing{refused: make(chan struct{}, 1)}
		listener := bufconn.Listen(1 << 16)
		server := grpc.NewServer()
		pb.RegisterKVServer(server, etcd)
		pb.RegisterWatchServer(server, etcd)
		var serving sync.WaitGroup
		serving.Go(func() { _ = server.Serve(listener) })
		defer serving.Wait()
		defer server.Stop()
		cfg := testConfig(t, []string{"http://etcd"}, "a")
		cfg.Dial = func(ctx context.Context, _ string) (net.Conn, error) {
			return listener.DialContext(ctx)
		}
		for range 500 {
			ms, err := newMembers(cfg)
			if err != nil {
				t.Fatal(err)
			}
			q := newQueue(queueConfig{
				prefix: "jobs/", own: "jobs/a", members: ms, timing: NewTiming(testTTL, -1, -1, 0),
				now: func() time.Duration { return 0 }, heartbeat: new(heartbeat),
				lost: func(error) {},
			})
			ctx, cancel := context.WithCancel(t.Context())
			var running sync.WaitGroup
			running.Go(func() { q.run(ctx) })
			<-etcd.refused
			cancel()
			running.Wait()
			ms.close()
			ms.closing.Wait()
		}
	})
}
