package election

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/sim/simetcd"
)

// adoptRig has a simulated etcd and a test's candidates, in a bubble.
type adoptRig struct {
	t     *testing.T
	etcd  *simetcd.Cluster
	start time.Time
	near  int // Config.Near
}

func inBubble(t *testing.T, test func(t *testing.T, r *adoptRig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &adoptRig{t: t, etcd: simetcd.New(simetcd.Config{}), start: time.Now()}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		test(t, r)
	})
}

func (r *adoptRig) now() time.Duration { return time.Hour + time.Since(r.start) }

// run runs a candidate. nil: it adopts nothing. If the term that it adopts has a job, Lead returns
// when that is gone.
func (r *adoptRig) run(name string, adopt *Adoption, gone <-chan struct{}) *testCandidate {
	r.t.Helper()
	return newTestCandidate(r.t, r.etcd.Endpoints(), name, func(cfg *Config, h *testCallbacks) {
		cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
		cfg.Adopt, cfg.Near = adopt, r.near
		h.lead = func(ctx context.Context, t Term) error {
			if t.Adopted && gone != nil {
				<-gone
				return nil
			}
			<-ctx.Done()
			return nil
		}
	})
}

var errKilled = errors.New("killed")

// kill ends the candidate as SIGKILL does: nothing that it has in etcd is released.
func (r *adoptRig) kill(c *testCandidate) {
	r.t.Helper()
	c.mu.Lock()
	c.releasingFails = errKilled
	c.mu.Unlock()
	c.stop(errKilled)
	if err := c.waitForReturn(); !errors.Is(err, errKilled) {
		r.t.Fatalf("Run returned %v", err)
	}
}

// killLeader runs a candidate that leads, and kills it. It returns what is known of it.
func (r *adoptRig) killLeader(name string) Adoption {
	r.t.Helper()
	c := r.run(name, nil, nil)
	term := c.waitForTerm()
	time.Sleep(testTTL)
	record := Adoption{
		LeaseID: term.LeaseID, TTL: term.Timing.TTL, Created: term.Token, Leading: true,
		Deadlines: c.Snapshot().Deadlines,
	}
	r.kill(c)
	return record
}

func (r *adoptRig) expectLease(id int64, want bool) {
	r.t.Helper()
	if got := r.etcd.HasLease(id); got != want {
		r.t.Errorf("etcd has the lease %x: %v", id, got)
	}
}

func (c *testCandidate) expectCalls(leased []int64, entered int, releasing ...int64) {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.leased, leased) || len(c.entered) != entered ||
		!slices.Equal(c.releasing, releasing) {
		c.t.Errorf("calls of Leased: %x, Entered: %v, Releasing: %x; want %x, %d, %x",
			c.leased, c.entered, c.releasing, leased, entered, releasing)
	}
}

func TestAdopt_Leading(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		record := r.killLeader("a")
		b := r.run("b", nil, nil)
		b.waitForState(Standby)
		a := r.run("a", &record, nil)
		term := a.waitForTerm()
		if !term.Adopted || term.Token != record.Created || term.LeaseID != record.LeaseID ||
			term.Deadlines != record.Deadlines || term.Key != fmt.Sprintf("jobs/%x", term.LeaseID) {
			t.Errorf("the term is %+v, of %+v", term, record)
		}
		began := r.now()
		a.waitForExtensions(1)
		if took := r.now() - began; took > 50*ms {
			t.Errorf("the first renewal took %v", took)
		}
		time.Sleep(10 * testTTL)
		a.expectLeading(term)
		if s := b.Snapshot(); s.State != Standby || s.Leader.Token != term.Token {
			t.Errorf("the standby: %+v", s)
		}
		a.expectCalls(nil, 0)
		a.stop(nil)
		if next := b.waitForTerm(); next.Adopted {
			t.Errorf("the next term: %+v", next)
		}
		a.waitForReturn()
		a.expectCalls([]int64{0}, 0, term.LeaseID)
		r.expectLease(term.LeaseID, false)
	})
}

// Until a renewal counts, the deadlines of the record are those that hold.
func TestAdopt_LeadingUnreachable(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		record := r.killLeader("a")
		for m := range 3 {
			r.etcd.Isolate(m + 1)
		}
		a := r.run("a", &record, nil)
		a.waitForTerm()
		end := a.waitForEnd()
		if !errors.Is(end.cause, ErrContactLost) || r.now() != record.Deadlines.StopAt {
			t.Errorf("the term ended with %v at %v, and stop-at is %v",
				end.cause, r.now(), record.Deadlines.StopAt)
		}
		if n, d := a.extensions(); n > 0 {
			t.Errorf("extended to %+v", d)
		}
		for m := range 3 {
			r.etcd.Heal(m + 1)
		}
		r.etcd.Elect(1)
	})
}

// A term that is over is not revived. Its lease is renewed until its job has exited.
func TestAdopt_Over(t *testing.T) {
	for want, change := range map[error]func(*adoptRig, *Adoption){
		ErrContactLost: func(r *adoptRig, a *Adoption) { a.Deadlines.StopAt = r.now() - 1 },
		ErrEnded:       func(_ *adoptRig, a *Adoption) { a.Ending = true },
		ErrLeaseLost:   func(_ *adoptRig, a *Adoption) { a.Releasing = true },
	} {
		inBubble(t, func(t *testing.T, r *adoptRig) {
			record := r.killLeader("a")
			change(r, &record)
			gone := make(chan struct{})
			a := r.run("a", &record, gone)
			term := a.waitForTerm()
			time.Sleep(2 * testTTL)
			if s := a.Snapshot(); s.Leading || s.State != Stopping {
				t.Errorf("%v: %+v", want, s)
			}
			if n, _ := a.extensions(); n > 0 && !errors.Is(want, ErrEnded) {
				t.Errorf("%v: extended", want)
			}
			select {
			case <-term.Lost:
				if !errors.Is(want, ErrLeaseLost) {
					t.Errorf("%v: lost", want)
				}
			default:
				if errors.Is(want, ErrLeaseLost) {
					t.Errorf("%v: not lost", want)
				}
			}
			r.expectLease(record.LeaseID, true)
			a.expectCalls(nil, 0)
			close(gone)
			if end := a.waitForEnd(); !errors.Is(end.cause, want) {
				t.Errorf("the term ended with %v, want %v", end.cause, want)
			}
			next := a.waitForTerm()
			if next.Adopted || next.Token <= record.Created {
				t.Errorf("the next term: %+v", next)
			}
			r.expectLease(record.LeaseID, false)
			announced := []int64{record.LeaseID}
			if record.Releasing {
				announced = nil
			}
			a.expectCalls([]int64{0, next.LeaseID}, 1, announced...)
		})
	}
}

// What has happened to key and lease meanwhile is seen at once.
func TestAdopt_Lost(t *testing.T) {
	for name, lose := range map[string]func(r *adoptRig, a Adoption){
		"deleted": func(r *adoptRig, a Adoption) {
			r.etcd.DeleteKey(fmt.Sprintf("jobs/%x", a.LeaseID))
		},
		"overwritten": func(r *adoptRig, a Adoption) {
			r.etcd.OverwriteKey(fmt.Sprintf("jobs/%x", a.LeaseID))
		},
		"revoked": func(r *adoptRig, a Adoption) { r.etcd.RevokeLease(a.LeaseID) },
	} {
		for _, leading := range []bool{true, false} {
			inBubble(t, func(t *testing.T, r *adoptRig) {
				record := r.killLeader("a")
				lose(r, record)
				began := r.now()
				record.Leading = leading
				a := r.run("a", &record, nil)
				if leading {
					a.waitForTerm()
					a.waitForEnd()
					if took := r.now() - began; took > 50*ms {
						t.Errorf("%s: seen after %v", name, took)
					}
				}
				next := a.waitForTerm()
				if next.Adopted || next.Token <= record.Created || r.now()-began > 200*ms {
					t.Errorf("%s: the next term after %v: %+v", name, r.now()-began, next)
				}
			})
		}
	}
}

// What etcd grants is known to whoever hands the lease on.
func TestLeased_GrantedTTL(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		c := newTestCandidate(t, r.etcd.Endpoints(), "a", func(cfg *Config, _ *testCallbacks) {
			cfg.Dial, cfg.Now, cfg.TTL = r.etcd.Dialer("a"), r.now, 4500*ms // whole seconds only
		})
		term := c.waitForTerm()
		c.mu.Lock()
		defer c.mu.Unlock()
		if !slices.Equal(c.leased, []int64{term.LeaseID, term.LeaseID}) || c.ttl != 5*time.Second {
			t.Errorf("Leased was called with %x, at last with %v", c.leased, c.ttl)
		}
	})
}

// A standby keeps its place.
func TestAdopt_Standby(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		a := r.run("a", nil, nil)
		a.waitForTerm()
		b := r.run("b", nil, nil)
		s := b.waitForState(Standby)
		b.mu.Lock()
		record := Adoption{LeaseID: s.LeaseID, TTL: s.TTL, Created: b.entered[0].Token}
		b.mu.Unlock()
		c := r.run("c", nil, nil)
		c.waitForState(Standby)
		r.kill(b)
		b = r.run("b", &record, nil)
		s = b.waitForState(Standby)
		if s.Leader == nil || s.Leader.Identity != "a" || s.LeaseID != record.LeaseID {
			t.Errorf("snapshot: %+v", s)
		}
		time.Sleep(3 * testTTL)
		a.stop(nil)
		term := b.waitForTerm()
		if term.Adopted || term.Token != record.Created || term.LeaseID != record.LeaseID {
			t.Errorf("the term is %+v, of %+v", term, record)
		}
		b.expectCalls(nil, 0)
	})
}

// Nobody leads with a lease whose release may be under way, or with a key that is not known to be
// put.
func TestAdopt_Releases(t *testing.T) {
	for _, record := range []Adoption{{Releasing: true}, {}} {
		inBubble(t, func(t *testing.T, r *adoptRig) {
			old := r.killLeader("a")
			record.LeaseID, record.TTL = old.LeaseID, old.TTL
			announced := []int64{old.LeaseID}
			if record.Releasing {
				record.Created, announced = old.Created, nil
			}
			a := r.run("a", &record, nil)
			term := a.waitForTerm()
			if term.Adopted || term.LeaseID == old.LeaseID || term.Token <= old.Created {
				t.Errorf("the term is %+v, of %+v", term, record)
			}
			r.expectLease(old.LeaseID, false)
			a.expectCalls([]int64{0, term.LeaseID}, 1, announced...)
		})
	}
}

// Without an announcement nothing is released.
func TestReleasing_Fails(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		record := r.killLeader("a") // its Releasing fails
		time.Sleep(time.Second)
		r.expectLease(record.LeaseID, true)
		if created := r.etcd.Created(fmt.Sprintf("jobs/%x", record.LeaseID)); created == 0 {
			t.Error("the key was deleted")
		}
	})
}

// Releasing is called once, also if the release has to be repeated.
func TestReleasing_Once(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		record := r.killLeader("a")
		record.Created = 0
		for m := range 3 {
			r.etcd.Isolate(m + 1)
		}
		record.Leading = false
		a := r.run("a", &record, nil)
		time.Sleep(2 * time.Second)
		for m := range 3 {
			r.etcd.Heal(m + 1)
		}
		r.etcd.Elect(1)
		a.waitForTerm()
		a.mu.Lock()
		defer a.mu.Unlock()
		if n := len(a.releasing); n == 0 || a.releasing[0] != record.LeaseID ||
			slices.Contains(a.releasing[1:], record.LeaseID) {
			t.Errorf("Releasing was called with %x, the lease is %x", a.releasing, record.LeaseID)
		}
	})
}

// etcd's Campaign deletes its key when it is cancelled. Ours must not: that is not announced.
func TestCampaign_DeletesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		cfg := testConfig(t, r.etcd.Endpoints(), "a")
		cfg.Dial = r.etcd.Dialer("a")
		members, err := newMembers(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer members.close()
		conn, err := members.all()[0].conn()
		if err != nil {
			t.Fatal(err)
		}
		grant := &pb.LeaseGrantRequest{ID: testLeaseID, TTL: 60}
		if _, err := pb.NewLeaseClient(conn).LeaseGrant(t.Context(), grant); err != nil {
			t.Fatal(err)
		}
		put := make(chan int64, 1)
		election, err := newElection(t.Context(), "jobs", testLeaseID, &campaignKV{
			members: members, hedgeDelay: time.Second, timeout: time.Second,
			put: func(created int64) { put <- created },
			waitUntilFirst: func(ctx context.Context) error {
				<-ctx.Done()
				return ctx.Err()
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- election.Campaign(clientv3.WithRequireLeader(ctx), "a") }()
		created := <-put
		cancel() // unlike the context of the session
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Campaign returned %v", err)
		}
		time.Sleep(time.Second)
		if got := r.etcd.Created("jobs/1"); got != created {
			t.Errorf("the key has the create revision %d, want %d", got, created)
		}
	})
}

// panicking has a bug on the goroutine of Run.
type panicking struct {
	*testCallbacks
	released int
}

func (p *panicking) Leased(int64, time.Duration) { panic("a bug") }

func (p *panicking) Releasing(int64) error {
	p.released++
	return nil
}

// A candidate that panics gives nothing back: its work may not have ended.
func TestCandidate_PanicReleasesNothing(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		cfg := testConfig(t, r.etcd.Endpoints(), "a")
		p := &panicking{testCallbacks: &testCallbacks{}}
		cfg.Election, cfg.Dial, cfg.Now, cfg.Callbacks = "jobs", r.etcd.Dialer("a"), r.now, p
		c, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Error("there was no panic")
				}
			}()
			_ = c.Run(t.Context())
		}()
		if p.released != 0 {
			t.Error("a release was announced")
		}
	})
}
