package control

import (
	"fmt"
	"slices"
	"testing"

	"go.etcd.io/etcd/api/v3/mvccpb"
)

// TestWatch: what changes in etcd becomes events. The changes of one revision count as one.
func TestWatch(t *testing.T) {
	var got []string
	w := &Watch{Election: "jobs", Show: func(e Event) error {
		got = append(got, fmt.Sprintf("%d %s %s %s %d %d", e.Revision, e.Kind, e.What, e.Identity,
			e.Token, e.Candidates))
		return nil
	}}
	expect := func(want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		got = nil
	}
	candidate := func(lease, created int64, identity string) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{
			Key: fmt.Appendf(nil, "jobs/%x", lease), Value: []byte(identity), Lease: lease,
			CreateRevision: created, ModRevision: created,
		}
	}
	value := func(key string, created, mod int64, v Value) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{
			Key: []byte(key), Value: Encode(v), CreateRevision: created, ModRevision: mod,
		}
	}
	change := func(revision int64, kind mvccpb.Event_EventType, kvs ...*mvccpb.KeyValue) {
		t.Helper()
		var events []*mvccpb.Event
		for _, kv := range kvs {
			events = append(events, &mvccpb.Event{Type: kind, Kv: kv})
		}
		if err := w.Changed(revision, events); err != nil {
			t.Error(err)
		}
	}
	put, del := mvccpb.Event_PUT, mvccpb.Event_DELETE
	a, b, c := candidate(10, 3, "a"), candidate(11, 5, "b"), candidate(12, 8, "c")

	_ = w.State(5, false, []*mvccpb.KeyValue{b, a})
	expect("5 leader leads a 3 2")
	change(6, put, value(Prefix("jobs")+"other", 1, 6, &Hold{})) // a stranger's, in no queue
	change(8, put, c)
	expect("8 candidates joined c 8 3")

	// A hold names who goes on. Nobody follows.
	hold, held := HoldOf("jobs"), &Hold{By: "me", Token: 3}
	change(9, put, value(hold, 9, 9, held))
	expect("9 hold held  0 3")
	change(10, put, value(hold, 9, 10, held)) // another one
	expect("10 hold held  0 3")
	change(11, del, a)
	expect("11 candidates left a 3 2", "11 leader nobody  0 2")
	change(12, del, value(hold, 0, 12, held))
	expect("12 hold released  0 2", "12 leader leads b 5 2")

	// A switchover. Its transaction deletes several keys at once.
	asked, d := SwitchoverOf("jobs"), candidate(13, 14, "d")
	change(13, put, value(asked, 13, 13, &Switchover{ID: "1", To: "d", By: "me"}))
	change(14, put, d)
	change(15, put, value(asked, 13, 15, &Switchover{ID: "1", To: "d", Answer: Accepted}))
	expect("13 switchover asked  0 2", "14 candidates joined d 14 3",
		"15 switchover accepted  0 3")
	change(16, del, b, c)
	expect("16 candidates left b 5 1", "16 candidates left c 8 1", "16 leader leads d 14 1")
	change(17, del, value(asked, 0, 17, &Switchover{}))
	expect("17 switchover gone  0 1")

	// A key that no candidate made is first in the queue once d has gone: nobody leads.
	change(18, put, &mvccpb.KeyValue{Key: []byte("jobs/x"), CreateRevision: 18, ModRevision: 18})
	change(19, put, candidate(14, 19, "e"))
	change(20, del, d)
	expect("19 candidates joined e 19 2", "20 candidates left d 14 1", "20 leader nobody  0 1")

	// Changes are gone: what is different since is told.
	_ = w.State(30, true, []*mvccpb.KeyValue{candidate(20, 25, "f"), candidate(21, 26, "g\xff")})
	expect("30 compacted resumed  0 2", "30 candidates left e 19 2",
		"30 candidates joined f 25 2", "30 candidates joined g� 26 2", "30 leader leads f 25 2")
	// A candidate that made its key anew is another one.
	change(31, put, candidate(20, 31, "f"))
	expect("31 candidates left f 25 2", "31 candidates joined f 31 2", "31 leader leads g� 26 2")

	w = &Watch{Election: "jobs", Show: w.Show}
	_ = w.State(2, false, nil)
	expect("2 leader nobody  0 0")
}
