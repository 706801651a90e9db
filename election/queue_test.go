package election

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

func kv(key string, created, lease int64) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{
		Key:            []byte(key),
		CreateRevision: created,
		ModRevision:    created,
		Lease:          lease,
	}
}

func del(key string, revision int64) []*clientv3.Event {
	return []*clientv3.Event{
		{
			Type: clientv3.EventTypeDelete,
			Kv:   &mvccpb.KeyValue{Key: []byte(key), ModRevision: revision},
		},
	}
}

func newTestQueue(lost func(error)) *queue {
	return newQueue(queueConfig{
		prefix: "e/", own: "e/a", lost: lost, now: func() time.Duration { return 0 },
	})
}

func TestQueue_OwnKey(t *testing.T) {
	ranked := func(q *queue, keys ...*mvccpb.KeyValue) {
		q.put(6)
		q.setAhead(append(keys, kv("e/9", 3, 9)), 9)
	}
	seen := func(q *queue, events []*clientv3.Event) { q.apply(events, true) }
	own, gone := kv("e/a", 6, 10), del("e/a", 10)
	others := append(del("e/9", 10), del("e/b", 11)...)
	for name, test := range map[string]struct {
		act  func(*queue)
		lost bool
	}{
		"not there yet":               {func(q *queue) { seen(q, del("e/9", 6)) }, false},
		"put":                         {func(q *queue) { ranked(q, own) }, false},
		"put and deleted before read": {func(q *queue) { ranked(q) }, true},
		"put, deleted and made anew":  {func(q *queue) { ranked(q, kv("e/a", 8, 10)) }, true},
		"deleted":                     {func(q *queue) { ranked(q, own); seen(q, gone) }, true},
		"deleted before ranked":       {func(q *queue) { q.put(6); seen(q, del("e/a", 7)) }, true},
		"read again":                  {func(q *queue) { ranked(q, own); ranked(q, own) }, false},
		"gone, seen late":             {func(q *queue) { ranked(q, own); ranked(q) }, true},
		"others deleted":              {func(q *queue) { ranked(q, own); seen(q, others) }, false},
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
	ahead := func(want int, known bool) {
		t.Helper()
		if n, first, ok := q.ahead(2); n != want || len(first) != min(want, 2) || ok != known {
			t.Errorf("%d keys are ahead, the first are %q, known %v, want %d", n, first, ok, want)
		}
	}
	ahead(0, false)
	q.setAhead(
		[]*mvccpb.KeyValue{
			kv("e/9", 3, 9),
			kv("e/a", 8, 10),
			kv("e/hand", 5, 0),
			kv("e/n/b", 6, 11),
		},
		10,
	)
	ahead(3, true)
	v, _ = q.view()
	if l := v.leader(); l == nil || l.Key != "e/9" || l.Token != 3 {
		t.Errorf("leader %+v", l)
	}
	if v.blocker == nil || v.blocker.Key != "e/hand" {
		t.Errorf("blocker %+v", v.blocker)
	}
	// What the watch tells late of a time before the read is known already.
	q.apply(del("e/9", 2), true)
	if v, _ = q.view(); v.leader() == nil {
		t.Error("an old deletion counts against a key that was made anew")
	}
	q.apply(del("e/9", 11), true)
	if v, _ = q.view(); v.isNext() {
		t.Errorf("two keys ahead: %+v", v)
	}
	q.apply(del("e/hand", 12), true)
	v, _ = q.view()
	if !v.isNext() {
		t.Errorf("one key ahead: %+v", v)
	}
	if l := v.leader(); l != nil || v.blocker == nil || v.blocker.Key != "e/n/b" ||
		!strings.Contains(v.blocker.Why, "'e/n'") {
		t.Errorf("leader %+v, blocker %+v", l, v.blocker)
	}
	q.apply(del("e/n/b", 13), true)
	if v, _ = q.view(); v.leader().Key != "e/a" || v.blocker != nil {
		t.Errorf("view %+v", v)
	}
	ahead(0, true)
}

// Why it could not be read who is ahead is shown until it is.
func TestQueue_NotRead(t *testing.T) {
	ms, err := newMembers(Config{
		Endpoints: []string{"http://127.0.0.1:1"}, DialTimeout: time.Second,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ms.close()
	q := newQueue(queueConfig{
		prefix: "e/", own: "e/a", members: ms, timeout: time.Second,
		now: func() time.Duration { return 0 }, heartbeat: new(heartbeat), lost: func(error) {},
	})
	q.put(8)
	if err := q.loadAhead(t.Context()); err == nil {
		t.Fatal("read of nobody")
	}
	if _, err := q.view(); err == nil || len(q.changed) != 1 {
		t.Errorf("shown: %v, changes %d", err, len(q.changed))
	}
	q.setAhead([]*mvccpb.KeyValue{kv("e/a", 8, 10)}, 10)
	if _, err := q.view(); err != nil {
		t.Errorf("shown after the read: %v", err)
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
	q.apply(del("e/7", 11), true)
	expect(false, "one ahead")
	q.apply(del("e/9", 12), true)
	expect(true, "none ahead")
	q.setAhead([]*mvccpb.KeyValue{kv("e/a", 8, 10)}, 13)
	expect(true, "read again")

	q = newTestQueue(func(error) {})
	q.put(8)
	q.setAhead(nil, 9)
	expect(false, "our key is gone")
}
