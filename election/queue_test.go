package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

func kv(key string, created, lease int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(key), CreateRevision: created, ModRevision: created, Lease: lease}
}

func del(key string, revision int64) []*clientv3.Event {
	return []*clientv3.Event{{Type: clientv3.EventTypeDelete, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision}}}
}

func newTestQueue(lost func(error)) *queue {
	return newQueue(queueConfig{prefix: "e/", own: "e/a", lost: lost})
}

func TestQueue_OwnKey(t *testing.T) {
	ranked := func(q *queue, own ...*mvccpb.KeyValue) {
		q.put(6)
		q.setAhead(append(own, kv("e/9", 3, 9)), 9)
	}
	for name, test := range map[string]struct {
		act  func(*queue)
		lost bool
	}{
		"not there yet":                {func(q *queue) { q.apply(del("e/9", 6)) }, false},
		"put":                          {func(q *queue) { ranked(q, kv("e/a", 6, 10)) }, false},
		"put and deleted before read":  {func(q *queue) { ranked(q) }, true},
		"put, deleted and made anew":   {func(q *queue) { ranked(q, kv("e/a", 8, 10)) }, true},
		"deleted":                      {func(q *queue) { ranked(q, kv("e/a", 6, 10)); q.apply(del("e/a", 10)) }, true},
		"deleted before it was ranked": {func(q *queue) { q.put(6); q.apply(del("e/a", 7)) }, true},
		"read again":                   {func(q *queue) { ranked(q, kv("e/a", 6, 10)); ranked(q, kv("e/a", 6, 10)) }, false},
		"gone, seen late":              {func(q *queue) { ranked(q, kv("e/a", 6, 10)); ranked(q) }, true},
		"others deleted":               {func(q *queue) { ranked(q, kv("e/a", 6, 10)); q.apply(del("e/9", 10)); q.apply(del("e/b", 11)) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			lost := false
			q := newTestQueue(func(error) { lost = true })
			test.act(q)
			if lost != test.lost {
				t.Errorf("lost: %v, want %v", lost, test.lost)
			}
		})
	}
}

func TestQueue_View(t *testing.T) {
	q := newTestQueue(func(error) {})
	q.put(8)
	v, _ := q.view()
	if v.own != nil {
		t.Errorf("own place before it is known who is ahead: %+v", v)
	}
	q.setAhead([]*mvccpb.KeyValue{kv("e/9", 3, 9), kv("e/a", 8, 10), kv("e/hand", 5, 0), kv("e/n/b", 6, 11)}, 10)
	v, _ = q.view()
	if l := v.leader(); l == nil || l.Key != "e/9" || l.Token != 3 {
		t.Errorf("leader %+v", l)
	}
	if v.blocker == nil || v.blocker.Key != "e/hand" {
		t.Errorf("blocker %+v", v.blocker)
	}
	// What the watch tells late of a time before the read is known already.
	q.apply(del("e/9", 2))
	if v, _ = q.view(); v.leader() == nil {
		t.Error("an old deletion counts against a key that was made anew")
	}
	q.apply(del("e/9", 11))
	q.apply(del("e/hand", 12))
	v, _ = q.view()
	if l := v.leader(); l != nil || v.blocker == nil || v.blocker.Key != "e/n/b" || !strings.Contains(v.blocker.Why, "'e/n'") {
		t.Errorf("leader %+v, blocker %+v", l, v.blocker)
	}
	q.apply(del("e/n/b", 13))
	if v, _ = q.view(); v.leader().Key != "e/a" || v.blocker != nil {
		t.Errorf("view %+v", v)
	}
}

// A campaign is woken when no key is ahead of ours, and not before.
func TestQueue_First(t *testing.T) {
	q := newTestQueue(func(error) {})
	expect := func(want bool, what string) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		select {
		case <-q.first:
			if err := q.waitUntilFirst(t.Context()); err != nil || !want {
				t.Errorf("%s: first, %v", what, err)
			}
		default:
			if err := q.waitUntilFirst(ctx); !errors.Is(err, context.Canceled) || want {
				t.Errorf("%s: not first, %v", what, err)
			}
		}
	}
	expect(false, "not put")
	q.put(8)
	expect(false, "not read")
	q.setAhead([]*mvccpb.KeyValue{kv("e/9", 3, 9), kv("e/7", 6, 7), kv("e/a", 8, 10)}, 10)
	expect(false, "two ahead")
	q.apply(del("e/7", 11))
	expect(false, "one ahead")
	q.apply(del("e/9", 12))
	expect(true, "none ahead")
	q.setAhead([]*mvccpb.KeyValue{kv("e/a", 8, 10)}, 13)
	expect(true, "read again")

	q = newTestQueue(func(error) {})
	q.put(8)
	q.setAhead(nil, 9)
	expect(false, "our key is gone")
}

func TestHedge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const hedgeDelay = 100 * time.Millisecond
		refused := errors.New("refused")
		for _, test := range []struct {
			name    string
			answers []func(context.Context) error
			took    time.Duration
			from    int32
			err     error
		}{
			{"at once", []func(context.Context) error{answerIn(10, nil), answerIn(0, nil)}, 10 * ms, 0, nil},
			{"unanswered", []func(context.Context) error{answerIn(1e6, nil), answerIn(10, nil)}, 110 * ms, 1, nil},
			{"failed", []func(context.Context) error{answerIn(10, refused), answerIn(10, nil)}, 20 * ms, 1, nil},
			{"two unanswered", []func(context.Context) error{answerIn(1e6, nil), answerIn(1e6, nil), answerIn(5, nil)}, 205 * ms, 2, nil},
			{"all failed", []func(context.Context) error{answerIn(10, refused), answerIn(10, refused)}, 20 * ms, 0, refused},
			{"none", []func(context.Context) error{answerIn(1e6, nil), answerIn(1e6, nil)}, time.Second, 1, context.DeadlineExceeded},
		} {
			members := &members{}
			for i := range test.answers {
				members.known = append(members.known, &member{endpoint: string(rune('a' + i))})
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			_, err := hedge(ctx, members, hedgeDelay, func(ctx context.Context, m *member) (int, error) {
				return 0, test.answers[m.endpoint[0]-'a'](ctx)
			})
			if took := time.Since(began); took != test.took || !errors.Is(err, test.err) || members.current.Load() != test.from {
				t.Errorf("%s: %v after %v from %d", test.name, err, took, members.current.Load())
			}
			cancel()
			synctest.Wait()
		}
	})
}

// However long the delay, all members are asked in time.
func TestHedge_AsksAllInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 2500 * ms
		for _, test := range []struct {
			members, hung int
			took          time.Duration
		}{{3, 1, 833333333}, {5, 2, 1000 * ms}, {5, 4, 2000 * ms}} {
			members := &members{}
			for range test.members {
				members.known = append(members.known, &member{})
			}
			ctx, cancel := context.WithTimeout(t.Context(), bound)
			began := time.Now()
			_, err := hedge(ctx, members, 15*time.Second, func(ctx context.Context, m *member) (int, error) {
				if slices.Index(members.known, m) < test.hung {
					return 0, answerIn(1e6, nil)(ctx)
				}
				return 0, nil
			})
			if took := time.Since(began); err != nil || took != test.took {
				t.Errorf("%d of %d members hung: %v after %v, want an answer after %v", test.hung, test.members, err, took, test.took)
			}
			cancel()
			synctest.Wait()
		}
	})
}

func answerIn(millis int, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-time.After(time.Duration(millis) * ms):
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// newRunningQueue follows the queue e, in which our own key has so many others ahead of it. It returns its create revision too.
func newRunningQueue(t *testing.T, cluster *harness.Cluster, ttl time.Duration, ahead int) (*queue, int64) {
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
	if _, err := pb.NewLeaseClient(client.ActiveConnection()).LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: 0xa, TTL: 600}); err != nil {
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
		heartbeat: new(heartbeat), lost: func(err error) { t.Error(err) },
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
	q.entries["e/gone"] = queueEntry{key: "e/gone", created: 1}
	q.mu.Unlock()
	waitForHead("e/a")
}

// Those that have lost their watches at the same time do not come back at the same time, the more of them there are. The first in
// the queue, which matter, come back first.
func TestQueue_ComesBackSpread(t *testing.T) {
	for _, test := range []struct {
		keys      int
		ttl, want time.Duration
	}{{1, 15 * time.Second, 10 * ms}, {2, 15 * time.Second, 20 * ms}, {50, 15 * time.Second, 500 * ms}, {1000, 15 * time.Second, 3 * time.Second}, {1000, 5 * time.Minute, HeartbeatInterval / 2}} {
		q := newTestQueue(func(error) {})
		q.cfg.timing.TTL = test.ttl
		q.entries = map[string]queueEntry{}
		for i := range test.keys {
			q.entries[fmt.Sprint(i)] = queueEntry{}
		}
		least, most := time.Hour, time.Duration(0)
		for range 1000 {
			d := q.spread()
			least, most = min(least, d), max(most, d)
		}
		if most > test.want || most < test.want*4/5 || least > test.want/5 {
			t.Errorf("%d keys are read after %v to %v, want 0 to %v", test.keys, least, most, test.want)
		}
	}
}

// The watch of a queue of forty is opened again after 100 ms on average, with this TTL.
func TestQueue_WatchEnds_ComesBackSpread(t *testing.T) {
	cluster := newTestEtcd(t)
	q, own := newRunningQueue(t, cluster, time.Second, 40)
	q.put(own)
	// served waits until there is a watch, and that one is another than the last.
	served := func(last *watchConn) *watchConn {
		for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(ms) {
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
		time.Sleep(2 * q.cfg.timing.RenewInterval()) // a watch that ends as soon as it has begun is another matter
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
