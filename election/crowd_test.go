package election

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

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
// before.
func TestCrowd_KeyLost(t *testing.T) {
	for name, broken := range map[string]bool{"watched": false, "not watched": true} {
		t.Run(name, func(t *testing.T) {
			crowd(t, func(r *adoptRig, _ *earlyNetwork, all []*testCandidate) {
				f := all[5]
				lost := f.Snapshot()
				if broken {
					for m := range 3 {
						r.etcd.Disconnect("f", m+1)
					}
				}
				r.etcd.DeleteKey("jobs/" + hex(lost.LeaseID))
				time.Sleep(testTTL / 10)
				if s := f.Snapshot(); s.State != Standby || s.LeaseID == lost.LeaseID {
					t.Errorf("the candidate has not queued again: %+v", s)
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
