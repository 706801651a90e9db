package election

import (
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

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
	synctest.Test(t, func(t *testing.T) {
		n := &earlyNetwork{requests: map[string]int{}}
		r := &adoptRig{
			t: t, etcd: simetcd.New(simetcd.Config{Network: n.verdict}), start: time.Now(),
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

// The next in line has confirmed its renewals, and starts without a read. The one behind it has
// not, and so it reads.
func TestEarlyStart(t *testing.T) {
	earlyQueue(t, func(_ *adoptRig, n *earlyNetwork, a, b, c *testCandidate) {
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
		b.stop(nil)
		c.waitForTerm()
		if txns, _ := n.take("c"); txns != 1 {
			t.Errorf("a candidate whose renewal is not confirmed made %d reads to win", txns)
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
			if _, reads := n.take(test.of); reads >= 10 != test.want {
				t.Errorf("%s has made %d reads in 10 intervals", test.of, reads)
			}
		}
		for _, s := range []*testCandidate{b, c} {
			s.waitForState(Standby)
		}
	})
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

// With a real etcd: its transactions are those of a release, and of the next key.
func TestCandidate_EarlyStart(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
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
	b.waitForTerm()
	if n := txns() - before; n != 1 {
		t.Errorf("%v transactions until the next one led, want that of the release", n)
	}
}

// The watch alone is not enough.
func TestSession_StartsEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newTestLease(t, 7, hang)
		s := &session{
			cfg: &Config{Now: l.now}, lease: l.lease, timing: l.timing,
			state: newMachine(Config{Now: l.now}), gone: make(chan struct{}),
		}
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
		s.lost(ErrKeyDeleted)
		expect(false, "lost")
	})
}
