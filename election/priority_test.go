package election

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/control"
	"leasehold/e2e/harness"
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

func (r *recorded) Extended(d Deadlines) {
	r.testCallbacks.Extended(d)
	r.recorder.Renewed()
}

func (r *recorded) Lead(ctx context.Context, term Term) error {
	r.recorder.Began(term.Token, term.Adopted)
	return r.testCallbacks.Lead(ctx, term)
}

func (r *recorded) Ended(cause, err error) {
	r.testCallbacks.Ended(cause, err)
	r.recorder.Ended("stopped", 0, nil)
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

// distinctOrders are the 30 orders of the five that differ: two of the same priority may change
// places.
func distinctOrders() (all []string) {
	for _, order := range orders("abcde") {
		if strings.Index(order, "b") < strings.Index(order, "c") &&
			strings.Index(order, "d") < strings.Index(order, "e") {
			all = append(all, order)
		}
	}
	return all
}

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
	for i, order := range distinctOrders() {
		if testing.Short() && i%3 > 0 {
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

// newRecorded runs a candidate on a real etcd, with a record.
func newRecorded(
	t *testing.T, cluster *harness.Cluster, election, name string, ttl time.Duration, priority int,
) *testCandidate {
	t.Helper()
	return newTestCandidate(t, cluster.Endpoints(), name, func(cfg *Config, h *testCallbacks) {
		cfg.Election, cfg.TTL = election, ttl
		record(cfg, h, priority)
	})
}

// waitUntilNext waits until only the leader is ahead of the candidate.
func (c *testCandidate) waitUntilNext() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	if err := harness.Until(ctx, func() error {
		if ahead, first, known := c.Ahead(5); !known || ahead != 1 {
			return fmt.Errorf("ahead of %s: %d, %q", c.cfg.Identity, ahead, first)
		}
		return nil
	}); err != nil {
		c.t.Fatal(err)
	}
}

// TestPriority_RealEtcd: the orders that differ with a real etcd, six of them chosen at random.
// With ORDERS=all in the environment, all.
func TestPriority_RealEtcd(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	// With a short one, the 200 candidates of another test may cost the leader its term.
	const ttl = 10 * time.Second
	all := distinctOrders()
	if os.Getenv("ORDERS") != "all" {
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		all = all[:6]
	}
	for _, order := range all {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			all := map[string]*testCandidate{}
			for name := range strings.SplitSeq(order, "") {
				all[name] = newRecorded(t, cluster, order, name, ttl, priorities5[name])
				all[name].waitFor("queued", func(s Snapshot) bool {
					return s.State == Standby || s.State == Leading
				})
			}
			next := all["a"]
			if order[0] == 'a' { // it leads, and c is as good as b, and has come later
				next = all["b"]
			}
			next.waitUntilNext()
			all[order[:1]].stop(nil)
			next.waitForTerm()
		})
	}
}

// TestPriority_Crowd: 200 candidates of the same priority write nothing while nothing happens, and
// a few keys when the leader goes.
func TestPriority_Crowd(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	const ttl = 15 * time.Second
	first := newRecorded(t, cluster, "crowd", "first", ttl, 50)
	first.waitForTerm()
	var all []*testCandidate
	for i := range 199 {
		c := newRecorded(t, cluster, "crowd", fmt.Sprintf("c%03d", i), ttl, 50)
		c.waitForState(Standby)
		all = append(all, c)
	}
	client, err := cluster.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	count := func(prefix string) (n, revision int64) {
		got, err := client.Get(t.Context(), prefix, clientv3.WithPrefix(),
			clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		return got.Count, got.Header.Revision
	}
	until(t, func() error {
		records, _ := count(control.Candidates("crowd"))
		terms, _ := count(control.History("crowd"))
		if records != 200 || terms != 1 {
			return fmt.Errorf("%d records, and %d terms in the history", records, terms)
		}
		return nil
	})
	// written is how many revisions come with something, and until all that follows is over.
	written := func(what func(), over time.Duration) int64 {
		_, before := count("")
		what()
		time.Sleep(over) // nothing tells that nothing more comes
		_, after := count("")
		return after - before
	}
	if n := written(func() {}, ttl*5/4); n != 0 {
		t.Errorf("%d revisions while nothing happens", n)
	}
	// The key and the lease go, the history gets an end and a beginning.
	if n := written(func() {
		first.stop(nil)
		all[0].waitForTerm()
	}, 4*time.Second); n < 3 || n > 5 {
		t.Errorf("%d revisions when the leader stops, want 3 to 5", n)
	}
	if n := written(func() {
		all[0].mu.Lock()
		all[0].releasingFails = errKilled
		all[0].mu.Unlock()
		all[0].stop(errKilled)
		_ = all[0].waitForReturn()
		all[1].waitForTerm()
	}, 4*time.Second); n < 2 || n > 4 {
		t.Errorf("%d revisions when the leader is killed, want 2 to 4", n)
	}
}

// Each of many candidates is moved once for one with a higher priority, and a few at a time.
func TestPriority_MovesEachOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &adoptRig{t: t, etcd: simetcd.New(simetcd.Config{}), start: time.Now()}
		t.Cleanup(r.etcd.Close)
		r.etcd.Elect(1)
		var all []*testCandidate
		for i := range 42 {
			name, priority := fmt.Sprintf("c%02d", i), 50
			if i == 41 {
				priority = 90
			}
			c := newTestCandidate(t, r.etcd.Endpoints(), name, func(cfg *Config, h *testCallbacks) {
				cfg.Election, cfg.Dial, cfg.Now = "jobs", r.etcd.Dialer(name), r.now
				record(cfg, h, priority)
			})
			c.waitFor("queued", func(s Snapshot) bool {
				return s.State == Standby || s.State == Leading
			})
			all = append(all, c)
		}
		moves := func(c *testCandidate) int {
			c.mu.Lock()
			defer c.mu.Unlock()
			return len(c.entered) - 1
		}
		passed := all[1:41]
		for look, before := 0, 0; look < 20; look++ {
			time.Sleep(testTTL)
			now := 0
			for _, c := range passed {
				now += moves(c)
			}
			if now-before > 2*mostMoved { // a TTL may have two looks
				t.Errorf("%d moved within a TTL", now-before)
			}
			before = now
		}
		for _, c := range passed {
			if n := moves(c); n != 1 {
				t.Errorf("%s was moved %d times", c.cfg.Identity, n)
			}
		}
		if ahead, _, known := all[41].Ahead(1); !known || ahead != 1 || moves(all[0]) != 0 {
			t.Errorf("%d are ahead of the best one", ahead)
		}
	})
}
