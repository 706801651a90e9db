package election

import (
	"errors"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
	"leasehold/e2e/sim/simetcd"
)

// earlyNetwork counts each candidate's requests, and loses those of a candidate, or of one method.
type earlyNetwork struct {
	mu       sync.Mutex
	requests map[string]int
	cut      string
}

func (n *earlyNetwork) verdict(client, _, method string) simetcd.Verdict {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests[client+method]++
	down := client == n.cut || client+method == n.cut
	return simetcd.Verdict{DropRequest: down, DropAnswer: down}
}

func (n *earlyNetwork) set(cut string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
}

// take returns how many transactions and reads the candidate has asked for since the last call.
func (n *earlyNetwork) take(client string) (txns, reads int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	txns = n.requests[client+pb.KV_Txn_FullMethodName]
	reads = n.requests[client+pb.KV_Range_FullMethodName]
	clear(n.requests)
	return txns, reads
}

func hex(lease int64) string { return strconv.FormatInt(lease, 16) }

// earlyQueue runs three candidates. The first one leads.
func earlyQueue(
	t *testing.T, test func(r *adoptRig, n *earlyNetwork, a, b, c *testCandidate),
) {
	t.Helper()
	earlyQueueAt(t, "", "", test)
}

// earlyQueueAt is earlyQueue with etcd's version, and with what is lost from the beginning.
func earlyQueueAt(
	t *testing.T, version, cut string,
	test func(r *adoptRig, n *earlyNetwork, a, b, c *testCandidate),
) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := &earlyNetwork{requests: map[string]int{}, cut: cut}
		r := &adoptRig{
			t: t, start: time.Now(),
			etcd: simetcd.New(simetcd.Config{Network: n.verdict, Version: version}),
		}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		a := r.run("a", nil, nil)
		a.waitForTerm()
		b := r.run("b", nil, nil)
		b.waitForState(Standby)
		c := r.run("c", nil, nil)
		c.waitForState(Standby)
		time.Sleep(testTTL)
		test(r, n, a, b, c)
	})
}

// The next in line has confirmed its renewals, and starts without a read.
func TestEarlyStart(t *testing.T) {
	earlyQueue(t, func(_ *adoptRig, n *earlyNetwork, a, b, _ *testCandidate) {
		s := b.Snapshot()
		n.take("")
		a.stop(nil)
		if term := b.waitForTerm(); term.Deadlines != s.Deadlines {
			t.Errorf("the term begins with %+v, and the last renewal gave %+v", term.Deadlines,
				s.Deadlines)
		}
		if txns, reads := n.take("b"); txns != 0 || reads != 0 {
			t.Errorf("the next in line made %d transactions and %d reads to win", txns, reads)
		}
	})
}

// If somebody else deletes the leader's key, or revokes its lease, the next in line leaves that
// leader time to kill its job, and then reads.
func TestEarlyStart_DeletedByOthers(t *testing.T) {
	for name, remove := range map[string]func(r *adoptRig, lease int64) bool{
		"key": func(r *adoptRig, lease int64) bool {
			return r.etcd.DeleteKey("jobs/" + hex(lease))
		},
		"lease": func(r *adoptRig, lease int64) bool { return r.etcd.RevokeLease(lease) },
	} {
		t.Run(name, func(t *testing.T) {
			earlyQueue(t, func(r *adoptRig, n *earlyNetwork, a, b, _ *testCandidate) {
				n.take("")
				began := time.Now()
				if !remove(r, a.Snapshot().LeaseID) {
					t.Fatal("nothing was removed")
				}
				b.waitForTerm()
				wait := NewTiming(testTTL, -1, -1, 0).exitWait()
				if took := time.Since(began); took < wait || took > 2*wait {
					t.Errorf("the next term began after %v, want %v", took, wait)
				}
				if txns, _ := n.take("b"); txns != 1 {
					t.Errorf("%d transactions to win, want 1", txns)
				}
			})
		})
	}
}

// Whoever becomes the next in line confirms a renewal at once.
func TestEarlyStart_NextInLine(t *testing.T) {
	earlyQueue(t, func(_ *adoptRig, n *earlyNetwork, a, b, c *testCandidate) {
		a.stop(nil)
		b.waitForTerm()
		time.Sleep(testTTL / 100)
		n.take("")
		b.stop(nil)
		c.waitForTerm()
		if txns, _ := n.take("c"); txns != 0 {
			t.Errorf("%d reads to win, a moment after the last change", txns)
		}
	})
}

// Only the next in line confirms its renewals, so that a crowd costs etcd nothing more.
func TestEarlyStart_OnlyTheNextConfirms(t *testing.T) {
	earlyQueue(t, func(_ *adoptRig, n *earlyNetwork, _, b, c *testCandidate) {
		for _, test := range []struct {
			of   string
			want bool
		}{{"b", true}, {"c", false}} {
			n.take("")
			time.Sleep(2 * testTTL)
			if txns, _ := n.take(test.of); txns >= 10 != test.want {
				t.Errorf("%s has made %d reads in 10 intervals", test.of, txns)
			}
		}
		for _, s := range []*testCandidate{b, c} {
			s.waitForState(Standby)
		}
	})
}

// takesOver stops a, and fails unless b, the next in line, needs so many transactions to win.
func (n *earlyNetwork) takesOver(t *testing.T, a, b *testCandidate, want int) {
	t.Helper()
	n.take("")
	a.stop(nil)
	b.waitForTerm()
	if txns, _ := n.take("b"); txns != want {
		t.Errorf("%d transactions to win, want %d", txns, want)
	}
}

// If the watch may miss a deletion, or if that is not known, the next in line reads before it
// starts.
func TestEarlyStart_Version(t *testing.T) {
	unanswered := "b" + pb.Maintenance_Status_FullMethodName
	for name, test := range map[string]struct {
		version, cut string
		txns         int
	}{
		"old":     {"3.5.17", "", 1},
		"new":     {"3.5.18", "", 0},
		"unknown": {"3.7.3", unanswered, 1},
	} {
		t.Run(name, func(t *testing.T) {
			earlyQueueAt(t, test.version, test.cut,
				func(_ *adoptRig, n *earlyNetwork, a, b, _ *testCandidate) {
					n.takesOver(t, a, b, test.txns)
				})
		})
	}
}

// A member that comes back may have another version. It is asked again within a TTL. An answer by
// another connection than that of the watch proves nothing.
func TestEarlyStart_VersionOfAnotherConnection(t *testing.T) {
	for name, test := range map[string]struct {
		again, another bool
		txns           int
	}{
		"unknown": {false, false, 1}, "asked again": {true, false, 0},
		"asked by another connection": {true, true, 1},
	} {
		t.Run(name, func(t *testing.T) {
			earlyQueue(t, func(r *adoptRig, n *earlyNetwork, a, b, _ *testCandidate) {
				n.set("b" + pb.Maintenance_Status_FullMethodName)
				for m := range 3 {
					r.etcd.Disconnect("b", m+1)
				}
				time.Sleep(testTTL / 20)
				if test.another {
					q := b.queue.Load()
					q.mu.Lock()
					q.conn.member.connections.Add(1)
					q.mu.Unlock()
				}
				if test.again {
					n.set("")
					time.Sleep(3 * testTTL / 2)
				}
				n.takesOver(t, a, b, test.txns)
			})
		})
	}
}

func TestShowsAllDeletions(t *testing.T) {
	for version, want := range map[string]bool{
		"3.4.35": false, "3.4.36": true, "3.5.17": false, "3.5.18": true, "3.5.35": true,
		"3.6.0-rc.5": false, "3.6.0": true, "3.6.0+git": true, "3.7.0-rc.0": true, "3.10.0": true,
		"4.0.0": true, "3.3.99": false, "2.9.9": false, "3.6": false, "": false, "x": false,
	} {
		if got := showsAllDeletions(version); got != want {
			t.Errorf("%q: %v", version, got)
		}
	}
}

// Whoever has lost its key does not start when all are gone that were ahead of it: also if it hears
// of both in one message, or by a read, because etcd has compacted the events.
func TestEarlyStart_KeyLost(t *testing.T) {
	for name, compacted := range map[string]bool{"events": false, "compacted": true} {
		t.Run(name, func(t *testing.T) {
			earlyQueue(t, func(r *adoptRig, n *earlyNetwork, a, b, c *testCandidate) {
				lost := b.Snapshot()
				n.set("b")
				r.etcd.Disconnect("b", 1)
				r.etcd.DeleteKey("jobs/" + hex(lost.LeaseID))
				r.etcd.DeleteKey("jobs/" + hex(a.Snapshot().LeaseID))
				if compacted {
					r.etcd.Compact()
				}
				next := c.waitForTerm()
				time.Sleep(testTTL / 20)
				n.set("")
				s := b.waitFor("standby again", func(s Snapshot) bool {
					return s.State == Standby && s.LeaseID != lost.LeaseID
				})
				if len(b.terms) != 0 || s.Leader == nil || s.Leader.Token != next.Token {
					t.Errorf("terms: %d, the standby's snapshot: %+v", len(b.terms), s)
				}
			})
		})
	}
}

// A standby whose last renewal is old does not trust its watch: another renewal has to count first.
func TestEarlyStart_NotFresh(t *testing.T) {
	earlyQueue(t, func(r *adoptRig, n *earlyNetwork, a, b, _ *testCandidate) {
		n.set("b" + pb.Lease_LeaseKeepAlive_FullMethodName)
		time.Sleep(testTTL * 2 / 5)
		s := b.Snapshot()
		r.etcd.DeleteKey("jobs/" + hex(a.Snapshot().LeaseID))
		time.Sleep(testTTL / 20)
		if len(b.terms) != 0 {
			t.Error("a term has begun by an old renewal")
		}
		n.set("")
		term := b.waitForTerm()
		if term.LeaseID != s.LeaseID || term.Deadlines.StopAt <= s.Deadlines.StopAt {
			t.Errorf("the term begins with %+v, and before the win it was %+v", term.Deadlines,
				s.Deadlines)
		}
	})
}

// With a real etcd: its transactions are the release and the read that confirms the first renewal.
// An old one has that of the win too.
func TestCandidate_EarlyStart(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testCallbacks) {
		cfg.TTL = 5 * time.Minute // it confirms nothing meanwhile
	})
	a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", func(cfg *Config, _ *testCallbacks) {
		cfg.TTL = 15 * time.Second // one renewal falls into what is counted
	})
	renewed := b.waitForState(Standby).Deadlines
	txns := func() float64 {
		n, err := cluster.Members[0].Metric(
			t.Context(), `grpc_server_started_total{grpc_method="Txn"`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	b.waitFor("renewed", func(s Snapshot) bool { return s.Deadlines.StopAt > renewed.StopAt })
	before := txns()
	a.stop(nil)
	first := b.waitForTerm().Deadlines
	b.waitFor("confirmed", func(s Snapshot) bool { return s.Deadlines.StopAt > first.StopAt })
	want := 2.0
	if !showsAllDeletions(versionOf(t, cluster)) {
		want++
	}
	if n := txns() - before; n != want {
		t.Errorf("%v transactions until the next one had confirmed, want %v", n, want)
	}
}

func versionOf(t *testing.T, cluster *harness.Cluster) string {
	t.Helper()
	_, status := statusOf(t, cluster)
	return status.Version
}

// statusOf asks the first member, with a client that ends with the test.
func statusOf(
	t *testing.T, cluster *harness.Cluster,
) (*clientv3.Client, *clientv3.StatusResponse) {
	t.Helper()
	client, err := cluster.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	status, err := client.Status(t.Context(), cluster.Endpoints()[0])
	if err != nil {
		t.Fatal(err)
	}
	return client, status
}

// A standby whose own deletion the watch has missed learns of it by the look at the first key.
func TestQueue_OwnKeyMissed(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		leader := r.run("a", nil, nil).waitForTerm()
		cfg := testConfig(t, r.etcd.Endpoints(), "b")
		cfg.Dial = r.etcd.Dialer("b")
		ms, err := newMembers(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer ms.close()
		var lost error
		q := newQueue(queueConfig{
			prefix: "jobs/", own: "jobs/b", members: ms, timing: NewTiming(testTTL, -1, -1, 0),
			now: r.now, heartbeat: new(heartbeat), lost: func(cause error) { lost = cause },
		})
		q.put(leader.Token + 1)
		q.setAhead([]*mvccpb.KeyValue{
			kv(leader.Key, leader.Token, leader.Token), kv("jobs/b", leader.Token+1, 0xb),
		}, leader.Token)
		if _, _ = q.look(t.Context(), time.Second, "", false); !errors.Is(lost, ErrKeyDeleted) {
			t.Errorf("lost: %v", lost)
		}
	})
}

// The watch alone is not enough.
func TestSession_StartsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, hang)
		s := &session{
			cfg: &Config{Now: l.now}, lease: l.lease, timing: l.timing,
			state: newMachine(Config{Now: l.now}), gone: make(chan struct{}),
			queue: newQueue(queueConfig{}),
		}
		s.queue.proven = true
		expect := func(want bool, what string) {
			t.Helper()
			if got := s.startsEarly(); got != want {
				t.Errorf("%s: starts early: %v", what, got)
			}
		}
		s.state.leased(testLeaseID, l.timing.TTL, l.timing.From(0))
		expect(true, "with the grant alone")
		l.raftTerm.Store(1)
		expect(false, "unconfirmed")
		l.raftTerm.Store(0)
		time.Sleep(l.timing.RenewInterval()*3/2 - time.Nanosecond)
		expect(true, "confirmed")
		time.Sleep(time.Nanosecond)
		expect(false, "not fresh")
		s.state.leased(testLeaseID, l.timing.TTL, l.timing.From(l.now()))
		expect(true, "fresh again")
		s.queue.proven = false
		expect(false, "a deletion may have been missed")
		s.queue.proven = true
		s.lost(ErrKeyDeleted)
		expect(false, "lost")
	})
}
