package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"leasehold/e2e/sim/simetcd"
)

// crowd runs six candidates in this order: a, which leads, to f. Two keys may be ahead of whoever
// watches the whole queue. So d, e and f stand in a crowd. Their markers are b, c and d.
func crowd(t *testing.T, test func(r *adoptRig, n *earlyNetwork, all []*testCandidate)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &earlyNetwork{requests: map[string]int{}}
		r := &adoptRig{
			t: t, start: time.Now(), near: 2,
			etcd: simetcd.New(simetcd.Config{Network: n.verdict}),
		}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		var all []*testCandidate
		for _, name := range []string{"a", "b", "c", "d", "e", "f"} {
			c := r.run(name, nil, nil)
			c.waitFor("in the queue", func(s Snapshot) bool {
				return s.State == Standby || s.State == Leading
			})
			all = append(all, c)
		}
		time.Sleep(2 * testTTL)
		test(r, n, all)
	})
}

// leads fails unless all others say within an interval, as long as a look takes to come, that the
// first one leads.
func (r *adoptRig) leads(all []*testCandidate) {
	r.t.Helper()
	term := all[0].waitForTerm()
	time.Sleep(testTTL/5 + 50*ms)
	for _, c := range all {
		if s := c.Snapshot(); s.Leader == nil || s.Leader.Token != term.Token {
			r.t.Errorf("%s says that %+v leads", c.cfg.Identity, s.Leader)
		}
	}
}

// A change of leader reaches those far behind when they look, and they ask for nothing before.
func TestCrowd_ChangeOfLeader(t *testing.T) {
	crowd(t, func(r *adoptRig, n *earlyNetwork, all []*testCandidate) {
		r.leads(all)
		for len(all) > 1 {
			before := all[len(all)-1].Snapshot()
			n.take("")
			all[0].stop(nil)
			all[0].waitForReturn()
			if txns, reads := n.take("f"); len(all) == 6 && txns+reads > 1 {
				t.Errorf("the last one has made %d transactions and %d reads", txns, reads)
			}
			if s := all[len(all)-1].Snapshot(); len(all) == 6 && *s.Leader != *before.Leader {
				t.Errorf("the last one has heard of it at once: %+v", s.Leader)
			}
			all = all[1:]
			r.leads(all)
		}
	})
}

// Whoever follows a crowd that leaves at once gets to lead at once.
func TestCrowd_Leaves(t *testing.T) {
	for _, leaving := range []string{"abcde", "bcde", "abde", "bce", "acd"} {
		t.Run(leaving, func(t *testing.T) {
			crowd(t, func(r *adoptRig, _ *earlyNetwork, all []*testCandidate) {
				<-all[0].terms
				var left []*testCandidate
				for i, c := range all {
					if slices.Contains([]byte(leaving), "abcdef"[i]) {
						c.stop(nil)
					} else {
						left = append(left, c)
					}
				}
				if leaving[0] != 'a' {
					time.Sleep(testTTL)
					left[0].stop(nil)
					left = left[1:]
				}
				began := r.now()
				term := left[0].waitForTerm()
				if took := r.now() - began; took > testTTL/20 {
					t.Errorf("the next one leads after %v", took)
				}
				left[0].terms <- term
				r.leads(left)
			})
		})
	}
}

// In a crowd, too, a candidate learns at once that its key is lost, also if its watch broke just
// before, or has to begin anew.
func TestCrowd_KeyLost(t *testing.T) {
	for _, test := range []struct {
		name              string
		broken, compacted bool
	}{{"watched", false, false}, {"broken", true, false}, {"compacted", true, true}} {
		t.Run(test.name, func(t *testing.T) {
			crowd(t, func(r *adoptRig, n *earlyNetwork, all []*testCandidate) {
				f := all[5]
				lost := f.Snapshot()
				if test.broken {
					n.set("f")
					for m := range 3 {
						r.etcd.Disconnect("f", m+1)
					}
				}
				r.etcd.DeleteKey("jobs/" + hex(lost.LeaseID))
				if test.compacted {
					r.etcd.Compact()
				}
				n.set("")
				time.Sleep(testTTL / 10)
				if s := f.Snapshot(); s.State != Standby || s.LeaseID == lost.LeaseID {
					t.Errorf("the candidate has not queued again: %+v", s)
				}
			})
		})
	}
}

// crowdQueue is a queue that nobody follows: the leader, the keys m0 to m9, of which etcd has none,
// and jobs/b. One key may be ahead of whoever watches the whole queue.
func crowdQueue(
	t *testing.T, r *adoptRig, leader Term, lost *error,
) (q *queue, keys []*mvccpb.KeyValue) {
	t.Helper()
	cfg := testConfig(t, r.etcd.Endpoints(), "b")
	cfg.Dial = r.etcd.Dialer("b")
	ms, err := newMembers(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ms.close)
	q = newQueue(queueConfig{
		prefix: "jobs/", own: "jobs/b", near: 1, members: ms, timing: NewTiming(testTTL, -1, -1, 0),
		now: r.now, heartbeat: new(heartbeat), lost: func(cause error) { *lost = cause },
		timeout: time.Second,
	})
	keys = append(keys, kv(leader.Key, leader.Token, leader.LeaseID))
	for i := range int64(10) {
		keys = append(keys, kv(fmt.Sprintf("jobs/m%d", i), leader.Token+1+i, 0))
	}
	keys = append(keys, kv("jobs/b", leader.Token+20, 0xb))
	q.put(leader.Token + 20)
	return q, keys
}

// A look in a crowd shows that our own key is gone, that blockers are, and that a key is another
// one by now.
func TestCrowd_Look(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		leader := r.run("a", nil, nil).waitForTerm()
		var lost error
		q, keys := crowdQueue(t, r, leader, &lost)
		q.setAhead(keys, leader.Token)
		if v, _ := q.view(); v.blocker == nil || v.blocker.Key != "jobs/m0" {
			t.Errorf("blocker %+v", v.blocker)
		}
		if _, err := q.look(t.Context(), time.Second, "jobs/m9", true); err != nil {
			t.Error(err)
		}
		v, _ := q.view()
		if v.blocker != nil || v.ahead != 1 || v.head.key != leader.Key {
			t.Errorf("after the look: %+v, head %+v, blocker %+v", v, v.head, v.blocker)
		}
		if !errors.Is(lost, ErrKeyDeleted) {
			t.Errorf("lost: %v", lost)
		}
		keys[0].CreateRevision--
		q.setAhead(keys, leader.Token)
		if l, err := q.look(t.Context(), time.Second, "", true); err != nil || l.lost {
			t.Errorf("look: %+v, %v", l, err)
		}
		if v, _ := q.view(); v.ahead != 0 {
			t.Errorf("a key that was made anew counts as the old one: %+v", v.head)
		}
		select {
		case <-q.first:
			t.Error("a look in a crowd has woken the campaign")
		default:
		}
	})
}

// If no look succeeds for longer than a TTL, the view says why.
func TestCrowd_Unseen(t *testing.T) {
	q, now := newTestQueue(func(error) {}), time.Duration(0)
	q.cfg.now, q.cfg.timing.TTL = func() time.Duration { return now }, testTTL
	for _, test := range []struct {
		after time.Duration
		crowd bool
		err   error
		want  bool
	}{
		{testTTL, true, errPast, false},
		{2 * testTTL, true, errPast, true},
		{3 * testTTL, true, nil, false},
		{4 * testTTL, true, errPast, false},
		{5 * testTTL, false, errPast, false},
	} {
		now = test.after
		q.keepLook(test.crowd, test.err)
		if v, _ := q.view(); v.unseen != nil != test.want {
			t.Errorf("%+v: %v", test, v.unseen)
		}
	}
}

// A watch in a crowd that begins anew reads whether our own key has gone meanwhile.
func TestCrowd_BeginsAnew(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		leader := r.run("a", nil, nil).waitForTerm()
		var lost error
		q, keys := crowdQueue(t, r, leader, &lost)
		q.setAhead(keys, leader.Token)
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { q.run(ctx) })
		time.Sleep(testTTL / 10) // the first look follows after a fifth
		cancel()
		running.Wait()
		if !errors.Is(lost, ErrKeyDeleted) {
			t.Errorf("lost: %v", lost)
		}
	})
}

// If a hundred keys have gone, all are read. It does not matter how slowly etcd answers.
func TestCrowd_ManyGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var delay atomic.Int64
		r := &adoptRig{t: t, start: time.Now(), etcd: simetcd.New(simetcd.Config{
			Network: func(_, _, _ string) simetcd.Verdict {
				return simetcd.Verdict{AnswerDelay: time.Duration(delay.Load())}
			},
		})}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		a := r.run("a", nil, nil)
		a.waitForTerm()
		members, err := newMembers(a.cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer members.close()
		client, err := members.all()[0].open()
		if err != nil {
			t.Fatal(err)
		}
		for i := range 900 {
			if _, err := client.Put(t.Context(), fmt.Sprintf("jobs/n%d", i), ""); err != nil {
				t.Fatal(err)
			}
		}
		b := r.run("b", nil, nil)
		b.waitForState(Standby)
		time.Sleep(2 * testTTL)
		delay.Store(int64(150 * ms))
		time.Sleep(2 * testTTL)
		for i := range 900 {
			r.etcd.DeleteKey(fmt.Sprintf("jobs/n%d", i))
		}
		began := r.now()
		a.stop(nil)
		b.waitForTerm()
		if took := r.now() - began; took > testTTL {
			t.Errorf("the next one leads after %v", took)
		}
	})
}

// In a crowd, too, a watch whose member or whose stream hangs is opened anew.
func TestCrowd_WatchHangs(t *testing.T) {
	for name, test := range map[string]struct {
		cut    string
		within time.Duration
	}{
		"stream": {"b" + pb.Watch_Watch_FullMethodName, 3 * testTTL},
		"member": {"", testTTL * 4 / 5},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := &earlyNetwork{requests: map[string]int{}}
				r := &adoptRig{
					t: t, start: time.Now(),
					etcd: simetcd.New(simetcd.Config{Network: n.verdict}),
				}
				t.Cleanup(r.etcd.Close)
				r.etcd.Elect(1)
				leader := r.run("a", nil, nil).waitForTerm()
				var lost error
				q, keys := crowdQueue(t, r, leader, &lost)
				client, err := q.cfg.members.all()[0].open()
				if err != nil {
					t.Fatal(err)
				}
				for _, kv := range keys[1:] {
					if _, err := client.Put(t.Context(), string(kv.Key), ""); err != nil {
						t.Fatal(err)
					}
				}
				q.put(leader.Token + int64(len(keys)) - 1)
				ctx, cancel := context.WithCancel(context.Background())
				var running sync.WaitGroup
				running.Go(func() { q.run(ctx) })
				defer running.Wait()
				defer cancel()
				time.Sleep(testTTL)
				served := func() *watchConn {
					q.mu.Lock()
					defer q.mu.Unlock()
					return q.conn
				}
				before := served()
				if before == nil || before.marker == "" {
					t.Fatalf("no watch in a crowd: %+v", before)
				}
				n.set(test.cut)
				if test.cut == "" {
					hung := slices.Index(q.cfg.members.all(), before.member)
					r.etcd.Elect(1 + (hung+1)%3) // the others go on
					r.etcd.Pause(1 + hung)
				}
				r.etcd.DeleteKey("jobs/other") // the revision moves by what the leader does too
				r.run("c", nil, nil)
				time.Sleep(test.within)
				n.set("")
				if test.cut != "" {
					time.Sleep(testTTL) // now it can be opened anew
				}
				if served() == before {
					t.Errorf("the same watch is in use after %v", test.within)
				}
			})
		})
	}
}

// With a real etcd: how many events a change costs, and how many watches there are.
func TestQueue_Crowd(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	const ahead = 90
	q, own := newRunningQueue(t, cluster, 5*time.Second, ahead)
	metric := func(name string) float64 {
		n, err := cluster.Members[0].Metric(t.Context(), "etcd_debugging_mvcc_"+name)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	waitForWatches := func(want float64) {
		t.Helper()
		until(t, func() error {
			if n := metric("watcher_total"); n != want {
				return fmt.Errorf("%v watches, want %v", n, want)
			}
			return nil
		})
	}
	waitForWatches(1)
	q.put(own)
	waitForWatches(2)
	client, err := cluster.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	remove := func(from, to int) {
		t.Helper()
		for i := from; i < to; i++ {
			if _, err := client.Delete(t.Context(), fmt.Sprintf("e/%d", i)); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitForAhead := func(first string, atMost int) {
		t.Helper()
		deadline := time.After(30 * time.Second)
		for v, _ := q.view(); v.head.key != first || v.ahead > atMost; v, _ = q.view() {
			select {
			case <-q.changed:
			case <-deadline:
				t.Fatalf("first %+v, %d ahead", v.head, v.ahead)
			}
		}
	}
	// The marker is e/82. Many of the first ones go: a look finds who is the first now.
	remove(0, 60)
	waitForAhead("e/60", ahead-60)
	if n := metric("events_total"); n != 0 {
		t.Errorf("%v events although the marker is there", n)
	}
	remove(70, ahead-Near+1) // the marker too
	waitForAhead("e/60", 10+Near-1)
	waitForWatches(2)
	if n := metric("events_total"); n != 1 {
		t.Errorf("%v events for the marker", n)
	}
	remove(60, 70)
	waitForAhead("e/83", Near-1)
	waitForWatches(1)
	before := metric("events_total")
	remove(ahead-Near+1, ahead)
	if err := q.waitUntilFirst(t.Context()); err != nil || !q.isProven() {
		t.Errorf("proven: %v, %v", q.isProven(), err)
	}
	if n := metric("events_total") - before; n != Near-1 {
		t.Errorf("%v events near the front, want %d", n, Near-1)
	}
}
