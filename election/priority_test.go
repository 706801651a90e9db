package election

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"leasehold/control"
	"leasehold/e2e/sim/simetcd"
)

// recorded are callbacks that a recorder learns of, too, as the daemon's does.
type recorded struct {
	*testCallbacks
	recorder *control.Recorder
	lease    atomic.Int64
}

func (r *recorded) Leased(id int64, ttl time.Duration) {
	r.testCallbacks.Leased(id, ttl)
	if id == 0 {
		r.recorder.Left()
	} else {
		r.lease.Store(id)
	}
}

func (r *recorded) Entered(key string, created int64) {
	r.testCallbacks.Entered(key, created)
	r.recorder.Joined(r.lease.Load(), false)
}

// record has a candidate write its record, with this priority.
func record(cfg *Config, h *testCallbacks, priority int) {
	recorder := control.NewRecorder(control.RecorderConfig{
		Election: cfg.Election,
		Candidate: control.Candidate{
			Identity: cfg.Identity, Priority: priority, Ready: true,
		},
		Logger: cfg.Logger, Changed: func() {},
	})
	cfg.Beside = func(ctx context.Context, etcd *Client) { recorder.Run(ctx, etcd) }
	cfg.Callbacks = &recorded{testCallbacks: h, recorder: recorder}
}

// orders are all orders of some candidates.
func orders(names string) (all []string) {
	if len(names) < 2 {
		return []string{names}
	}
	for i := range names {
		for _, rest := range orders(names[:i] + names[i+1:]) {
			all = append(all, names[i:i+1]+rest)
		}
	}
	return all
}

// priorities5 are those of five candidates.
var priorities5 = map[string]int{"a": 90, "b": 50, "c": 50, "d": 20, "e": 20}

// inOrder has the five join in that order, in a bubble.
func inOrder(
	t *testing.T, order string, failback time.Duration,
	test func(all map[string]*testCandidate),
) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := &adoptRig{t: t, etcd: simetcd.New(simetcd.Config{}), start: time.Now()}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		all := map[string]*testCandidate{}
		for name := range strings.SplitSeq(order, "") {
			all[name] = newTestCandidate(t, r.etcd.Endpoints(), name,
				func(cfg *Config, h *testCallbacks) {
					cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
					cfg.Failback = failback
					record(cfg, h, priorities5[name])
				})
			all[name].waitFor("queued", func(s Snapshot) bool {
				return s.LeaseID != 0 && s.Leader != nil
			})
		}
		test(all)
	})
}

// leader is who leads.
func leader(all map[string]*testCandidate) (name string) {
	for n, c := range all {
		if c.Snapshot().State == Leading {
			name += n
		}
	}
	return name
}

// Whatever the order in which five candidates have joined, one with the highest priority of those
// that are left leads next. With -short, some orders must do.
func TestPriority_EveryOrder(t *testing.T) {
	t.Parallel()
	for i, order := range orders("abcde") {
		if testing.Short() && i%12 > 0 {
			continue
		}
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			inOrder(t, order, -1, func(all map[string]*testCandidate) {
				time.Sleep(5 * testTTL)
				led := leader(all)
				if led != order[:1] {
					t.Fatalf("%q leads", led)
				}
				all[led].stop(nil)
				all[led].waitForReturn()
				delete(all, led)
				time.Sleep(testTTL / 10)
				led = leader(all)
				for name, priority := range priorities5 {
					if all[name] != nil && priorities5[led] < priority {
						t.Errorf("%q leads, and %q is there", led, name)
					}
				}
			})
		})
	}
}

// With fail-back, the one with the highest priority leads at last. The lead moves only to one with
// a higher priority, and never twice within the time. Those of the same priority change nothing
// when they change places.
func TestPriority_EveryOrderFailsBack(t *testing.T) {
	t.Parallel()
	const failback = 6 * testTTL
	for i, order := range orders("abcde") {
		if testing.Short() && i%12 > 0 || strings.Index(order, "b") > strings.Index(order, "c") ||
			strings.Index(order, "d") > strings.Index(order, "e") {
			continue
		}
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			inOrder(t, order, failback, func(all map[string]*testCandidate) {
				led, since, moves := leader(all), time.Now(), 0
				for range 250 {
					time.Sleep(testTTL / 10)
					now := leader(all)
					if now == led || now == "" {
						continue
					}
					if took := time.Since(since); took < failback-testTTL/10 ||
						priorities5[now] <= priorities5[led] {
						t.Fatalf("%q leads after %q, %v later", now, led, took)
					}
					led, since = now, time.Now()
					moves++
				}
				if led != "a" || moves > 2 {
					t.Errorf("%q leads after %d moves", led, moves)
				}
			})
		})
	}
}
