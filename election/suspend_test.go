package election

import (
	"context"
	"errors"
	"testing"
	"time"
)

// suspends runs a candidate whose work is frozen at stop-at.
func (r *adoptRig) suspends(name string, adopt *Adoption) *testCandidate {
	r.t.Helper()
	return newTestCandidate(r.t, r.etcd.Endpoints(), name, func(cfg *Config, h *testCallbacks) {
		cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
		cfg.Adopt = adopt
		h.suspends.Store(true)
	})
}

// stop stops all of etcd, and start starts it again: it has lost nothing.
func (r *adoptRig) stop() {
	for m := range 3 {
		r.etcd.Stop(m + 1)
	}
}

func (r *adoptRig) startEtcd() {
	for m := range 3 {
		r.etcd.Start(m + 1)
	}
	r.etcd.Elect(2)
}

// All of etcd is away for far longer than a TTL: the term goes on.
func TestSuspend(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		a := r.suspends("a", nil)
		term := a.waitForTerm()
		b := r.run("b", nil, nil)
		b.waitForState(Standby)
		for range 2 {
			r.stop()
			s := a.waitForState(Suspended)
			if r.now() != s.Deadlines.StopAt || !s.Leading {
				t.Errorf("suspended at %v: %+v", r.now(), s)
			}
			calls, _ := a.extensions()
			time.Sleep(10 * testTTL)
			if now, d := a.extensions(); now != calls || len(a.ended) != 0 {
				t.Errorf("without etcd, extended to %+v; the term has ended: %d", d, len(a.ended))
			}
			r.startEtcd()
			a.waitForState(Leading)
			a.waitForExtensions(1)
			a.expectLeading(term)
			if s := a.Snapshot(); s.Leader.Token != term.Token || r.now() >= s.Deadlines.StopAt {
				t.Errorf("it goes on: %+v", s)
			}
		}
		if len(a.terms)+len(b.terms) != 0 {
			t.Error("another term has begun")
		}
	})
}

// What ends a term, ends it while it is suspended.
func TestSuspend_Ends(t *testing.T) {
	planned, lostEither := errors.New("planned"), errors.Join(ErrLeaseLost, ErrKeyDeleted)
	for name, test := range map[string]struct {
		end   func(*adoptRig, *testCandidate, Term)
		cause error
		lost  bool
	}{
		"key deleted": {func(r *adoptRig, _ *testCandidate, term Term) {
			r.startEtcd()
			r.etcd.DeleteKey(term.Key)
		}, ErrKeyDeleted, true},
		"lease revoked": {func(r *adoptRig, _ *testCandidate, term Term) {
			r.startEtcd()
			r.etcd.RevokeLease(term.LeaseID)
		}, lostEither, true}, // by a renewal, or by the watch
		"key overwritten": {func(r *adoptRig, _ *testCandidate, term Term) {
			r.startEtcd()
			r.etcd.OverwriteKey(term.Key)
		}, ErrKeyOverwritten, false},
		"planned": {func(_ *adoptRig, a *testCandidate, _ Term) {
			a.stop(planned)
		}, planned, false},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *adoptRig) {
				a := r.suspends("a", nil)
				term := a.waitForTerm()
				r.stop()
				a.waitForState(Suspended)
				calls, _ := a.extensions()
				test.end(r, a, term)
				if end := a.waitForEnd(); !errors.Is(test.cause, end.cause) {
					t.Errorf("the term ended with %v", end.cause)
				}
				select {
				case <-term.Lost:
				default:
					if test.lost {
						t.Error("nobody was told that the next leader may be starting")
					}
				}
				if now, d := a.extensions(); now != calls {
					t.Errorf("extended to %+v", d)
				}
			})
		})
	}
}

// Work that can't be frozen ends at stop-at.
func TestSuspend_Refused(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		a := r.run("a", nil, nil)
		a.waitForTerm()
		r.stop()
		if end := a.waitForEnd(); !errors.Is(end.cause, ErrContactLost) {
			t.Errorf("the term ended with %v", end.cause)
		}
		r.startEtcd()
		a.waitForTerm()
	})
}

// A renewal does not revive a term whose work could not be frozen.
func TestSuspend_NotFrozen(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		a := r.suspends("a", nil)
		a.waitForTerm()
		r.stop()
		a.waitForState(Suspended)
		a.suspends.Store(false)
		calls, _ := a.extensions()
		r.startEtcd()
		if end := a.waitForEnd(); !errors.Is(end.cause, ErrContactLost) {
			t.Errorf("the term ended with %v", end.cause)
		}
		if now, d := a.extensions(); now != calls {
			t.Errorf("extended to %+v", d)
		}
	})
}

// The next process finds the term suspended, and goes on with it.
func TestSuspend_Adopted(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		record := r.killLeader("a")
		r.stop()
		time.Sleep(5 * testTTL)
		a := r.suspends("a", &record)
		term := a.waitForTerm()
		a.waitForState(Suspended)
		time.Sleep(5 * testTTL)
		if n, d := a.extensions(); n > 0 {
			t.Errorf("without a renewal, extended to %+v", d)
		}
		r.startEtcd()
		a.waitForState(Leading)
		a.waitForExtensions(2)
		a.expectLeading(term)
	})
}

// A term ends with its work: that could not be frozen in time, for example, and was killed.
func TestSuspend_LeadReturns(t *testing.T) {
	inBubble(t, func(t *testing.T, r *adoptRig) {
		gone := make(chan struct{})
		a := newTestCandidate(t, r.etcd.Endpoints(), "a", func(cfg *Config, h *testCallbacks) {
			cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer("a"), r.now
			h.suspends.Store(true)
			h.lead = func(ctx context.Context, _ Term) error {
				select {
				case <-gone:
				case <-ctx.Done():
				}
				return nil
			}
		})
		first := a.waitForTerm()
		r.stop()
		a.waitForState(Suspended)
		close(gone)
		a.waitForEnd()
		a.waitForState(Connecting)
		r.startEtcd()
		if next := a.waitForTerm(); next.LeaseID == first.LeaseID || next.Token <= first.Token {
			t.Errorf("the next term is %+v, after %+v", next, first)
		}
	})
}
