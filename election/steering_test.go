package election

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/control"
	"leasehold/e2e/sim/simetcd"
)

// operator is a client of people.
func (r *adoptRig) operator() *Client {
	r.t.Helper()
	cfg := testConfig(r.t, r.etcd.Endpoints(), "operator")
	cfg.Dial = r.etcd.Dialer("operator")
	client, err := Connect(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(client.Close)
	return client
}

func (r *adoptRig) hold(c *Client, h control.Hold) {
	r.t.Helper()
	h.By, h.Since = "eve", time.Now()
	if _, _, err := control.SetHold(r.t.Context(), c, "jobs", h, 0); err != nil {
		r.t.Fatal(err)
	}
}

func (r *adoptRig) release(c *Client) {
	r.t.Helper()
	if h, err := control.Release(r.t.Context(), c, "jobs"); err != nil || h == nil {
		r.t.Fatal(h, err)
	}
}

// expectHeld fails if the candidate begins to lead within two TTLs, or does not know why not.
func (c *testCandidate) expectHeld() {
	c.t.Helper()
	time.Sleep(2 * testTTL)
	if s := c.Snapshot(); s.State != Standby || s.Hold == nil || len(c.terms) > 0 ||
		s.Leader != nil {
		c.t.Errorf("%d terms: %+v", len(c.terms), s)
	}
}

// The next in line starts without a read, unless a hold came before its turn: just before, or when
// its connection was broken.
func TestHold_EarlyStart(t *testing.T) {
	for name, before := range map[string]func(r *adoptRig){
		"just before": func(*adoptRig) {},
		"connection broken": func(r *adoptRig) {
			for m := range 3 {
				r.etcd.Disconnect("b", m+1)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			earlyQueue(t, func(r *adoptRig, n *earlyNetwork, a, b, c *testCandidate) {
				operator := r.operator()
				before(r)
				r.hold(operator, control.Hold{})
				n.take("")
				a.stop(nil)
				b.expectHeld()
				c.expectHeld()
				r.release(operator)
				b.waitForTerm()
			})
		})
	}
}

// A leader goes on, and so does one that has just won when the hold is made.
func TestHold_LeaderGoesOn(t *testing.T) {
	earlyQueue(t, func(r *adoptRig, _ *earlyNetwork, a, b, _ *testCandidate) {
		operator := r.operator()
		r.hold(operator, control.Hold{})
		time.Sleep(2 * testTTL)
		if s := a.Snapshot(); s.State != Leading || s.Hold == nil {
			t.Errorf("the leader: %+v", s)
		}
		if s := b.Snapshot(); s.Leader == nil || s.Leader.Identity != "a" {
			t.Errorf("a standby: %+v", s)
		}
		r.hold(operator, control.Hold{Reason: "once more"}) // a leads still
		a.stop(nil)
		b.expectHeld()
		r.hold(operator, control.Hold{Reason: "and again"}) // b is the first, and must not lead
		b.expectHeld()
	})
}

// A leader resigns if the hold wants it, or names another leader: then it is older than the win.
func TestHold_LeaderResigns(t *testing.T) {
	for name, h := range map[string]control.Hold{
		"stop": {Stop: true}, "older than the win": {Token: 1},
	} {
		t.Run(name, func(t *testing.T) {
			earlyQueue(t, func(r *adoptRig, _ *earlyNetwork, a, b, _ *testCandidate) {
				operator := r.operator()
				if h.Token == 0 {
					h.Token = a.Snapshot().Leader.Token
				}
				_, err := operator.Txn(r.t.Context(), &pb.TxnRequest{Success: []*pb.RequestOp{
					{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
						Key: []byte(control.HoldOf("jobs")), Value: control.Encode(&h),
					}}},
				}})
				if err != nil {
					r.t.Fatal(err)
				}
				if end := a.waitForEnd(); !errors.Is(end.cause, ErrHeld) {
					t.Errorf("the term ends with %v", end.cause)
				}
				b.expectHeld()
				a.expectHeld()
			})
		})
	}
}

// What etcd sends on one stream at once, a hold and the deletion of the leader's key, is taken in
// its order.
func TestHold_OneInstant(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			r := &adoptRig{
				t: t, start: time.Now(), etcd: simetcd.New(simetcd.Config{Seed: seed}),
			}
			t.Cleanup(r.etcd.Close)
			r.etcd.Elect(1)
			a := r.run("a", nil, nil)
			a.waitForTerm()
			b := r.run("b", nil, nil)
			b.waitForState(Standby)
			time.Sleep(testTTL)
			operator := r.operator()
			r.hold(operator, control.Hold{Token: 1})
			r.etcd.DeleteKey("jobs/" + hex(a.Snapshot().LeaseID))
			b.expectHeld()
		})
	}
}

// What etcd's roles forbid to read any more, counts as gone: nobody would tell us of its end.
func TestHold_Denied(t *testing.T) {
	s := newSteering("e", func() {})
	s.learn(7, []*mvccpb.KeyValue{{
		Key: []byte(control.HoldOf("e")), Value: control.Encode(&control.Hold{}),
		CreateRevision: 5, ModRevision: 5,
	}})
	if s.mayStart(3) {
		t.Error("may start in spite of the hold")
	}
	s.deny(errors.New("forbidden"))
	if !s.mayStart(3) || s.theHold() != nil {
		t.Error("still held")
	}
	s.tryAgain()
	s.learn(6, []*mvccpb.KeyValue{{
		Key: []byte(control.HoldOf("e")), Value: control.Encode(&control.Hold{}),
		CreateRevision: 5, ModRevision: 5,
	}})
	if s.mayStart(3) {
		t.Error("may start in spite of the hold, which can be read again")
	}
}

// A stranger's hold names nobody. Whoever leads goes on, and whoever waits says that it is held.
func TestHold_Stranger(t *testing.T) {
	earlyQueue(t, func(r *adoptRig, _ *earlyNetwork, a, b, _ *testCandidate) {
		r.etcd.PutKey(control.HoldOf("jobs"), []byte("by hand"), 0)
		time.Sleep(testTTL)
		if s := a.Snapshot(); s.State != Leading {
			t.Errorf("the leader: %+v", s)
		}
		a.stop(nil)
		b.expectHeld()
		r.release(r.operator())
		b.waitForTerm()
	})
}

// In an empty queue nobody leads, so everybody who comes is held.
func TestHold_EmptyQueue(t *testing.T) {
	inBubble(t, func(_ *testing.T, r *adoptRig) {
		operator := r.operator()
		r.hold(operator, control.Hold{})
		a := r.run("a", nil, nil)
		a.expectHeld()
		r.release(operator)
		a.waitForTerm()
	})
}

// A hold that asks the leader to resign may name one that has not started. It gives up its key.
func TestHold_StopsWhoWaits(t *testing.T) {
	earlyQueue(t, func(r *adoptRig, _ *earlyNetwork, a, b, _ *testCandidate) {
		operator := r.operator()
		r.hold(operator, control.Hold{})
		a.stop(nil)
		b.expectHeld()
		before := b.Snapshot().LeaseID
		r.release(operator)
		r.put(operator, control.HoldOf("jobs"), &control.Hold{
			Stop: true, Token: r.etcd.Created("jobs/" + hex(before)),
		}, 0)
		time.Sleep(2 * testTTL)
		if s := b.Snapshot(); s.State != Standby || s.LeaseID == before || s.Leader != nil {
			t.Errorf("%+v", s)
		}
	})
}

// Reads run side by side, and one of them may learn that it is forbidden.
func TestSteering_DeniedBesideARead(*testing.T) {
	s := newSteering("jobs/backup", func() {})
	var reading sync.WaitGroup
	for range 2 {
		reading.Go(func() {
			for range 100 {
				s.deny(rpctypes.ErrPermissionDenied)
				s.bounds()
			}
		})
	}
	reading.Wait()
}
