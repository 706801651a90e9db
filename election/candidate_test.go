package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"leasehold/e2e"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTTL is the TTL of the candidates in these tests: the shortest of which losing one etcd member takes nothing away.
const testTTL = 5 * time.Second

// testHolder stands for what a daemon does with its leadership.
type testHolder struct {
	// onLeased and lead may be set before the candidate runs. Without lead a term lasts until its context ends.
	onLeased func(id int64)
	lead     func(context.Context, Term) error

	terms chan Term // each term that begins
	ended chan ended

	mu       sync.Mutex
	leased   []int64
	extended Deadlines
	calls    int
}

// ended is the end of a term as Lead sees it.
type ended struct {
	at    time.Duration
	cause error
}

func (h *testHolder) Leased(id int64, ttl time.Duration) {
	h.mu.Lock()
	h.leased = append(h.leased, id)
	h.mu.Unlock()
	if h.onLeased != nil {
		h.onLeased(id)
	}
}

func (h *testHolder) Extended(d Deadlines) {
	h.mu.Lock()
	h.extended = d
	h.calls++
	h.mu.Unlock()
}

func (h *testHolder) extensions() (int, Deadlines) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls, h.extended
}

func (h *testHolder) Lead(ctx context.Context, term Term) error {
	h.terms <- term
	var err error
	if h.lead != nil {
		err = h.lead(ctx, term)
	} else {
		<-ctx.Done()
	}
	h.ended <- ended{e2e.Now(), context.Cause(ctx)}
	return err
}

// testCandidate is a candidate that runs until its test ends.
type testCandidate struct {
	*Candidate
	*testHolder
	t       *testing.T
	stop    context.CancelCauseFunc
	done    chan struct{} // closed when Run has returned
	err     error         // what it returned
	updates chan struct{}
}

func testConfig(t *testing.T, endpoints []string, identity string) Config {
	level := slog.LevelWarn
	if testing.Verbose() {
		level = slog.LevelDebug
	}
	return Config{
		Endpoints: endpoints, Election: strings.ReplaceAll(t.Name(), "/", "-"), Identity: identity,
		TTL: testTTL, LossGrace: -1, Margin: -1, Wait: -1, DialTimeout: time.Second,
		Now:        e2e.Now,
		Logger:     slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level})).With("identity", identity),
		Registerer: prometheus.NewRegistry(),
	}
}

// newTestCandidate runs a candidate. The configuration may be changed before that.
func newTestCandidate(t *testing.T, endpoints []string, identity string, change func(*Config, *testHolder)) *testCandidate {
	t.Helper()
	c := &testCandidate{
		testHolder: &testHolder{terms: make(chan Term, 1000), ended: make(chan ended, 1000)},
		t:          t, done: make(chan struct{}), updates: make(chan struct{}, 1),
	}
	cfg := testConfig(t, endpoints, identity)
	cfg.Holder = c.testHolder
	cfg.Changed = func() { poke(c.updates) }
	if change != nil {
		change(&cfg, c.testHolder)
	}
	var err error
	if c.Candidate, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(context.Background())
	c.stop = stop
	go func() {
		defer close(c.done)
		c.err = c.Run(ctx)
	}()
	t.Cleanup(func() {
		stop(errors.New("test ends"))
		select {
		case <-c.done:
		case <-time.After(15 * time.Second):
			t.Errorf("%s: Run does not return", identity)
		}
	})
	return c
}

// waitForTerm waits until the candidate leads.
func (c *testCandidate) waitForTerm() Term {
	c.t.Helper()
	select {
	case term := <-c.terms:
		return term
	case <-c.done:
		c.t.Fatalf("Run returned %v instead of leading", c.err)
	case <-time.After(30 * time.Second):
		c.t.Fatalf("no term begins: %+v", c.Snapshot())
	}
	panic("unreachable")
}

// waitForEnd waits until Lead has returned.
func (c *testCandidate) waitForEnd() ended {
	c.t.Helper()
	select {
	case e := <-c.ended:
		return e
	case <-time.After(30 * time.Second):
		c.t.Fatalf("the term does not end: %+v", c.Snapshot())
	}
	panic("unreachable")
}

// waitFor waits for a snapshot.
func (c *testCandidate) waitFor(what string, good func(Snapshot) bool) Snapshot {
	c.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		if s := c.Snapshot(); good(s) {
			return s
		}
		select {
		case <-c.updates:
		case <-timeout:
			c.t.Fatalf("not %s: %+v", what, c.Snapshot())
		}
	}
}

func (c *testCandidate) waitForState(state State) Snapshot {
	c.t.Helper()
	return c.waitFor(string(state), func(s Snapshot) bool { return s.State == state })
}

// waitForReturn waits until Run has returned.
func (c *testCandidate) waitForReturn() error {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(30 * time.Second):
		c.t.Fatalf("Run does not return: %+v", c.Snapshot())
	}
	return c.err
}

// one is an etcd of one member that most tests share. Every test has an election of its own.
var one struct {
	sync.Mutex
	cluster *e2e.Cluster
}

func sharedCluster(t *testing.T) *e2e.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	return e2e.NewTestCluster(t, e2e.ClusterConfig{})
}

func etcdctl(t *testing.T, cluster *e2e.Cluster, args ...string) string {
	t.Helper()
	out, err := cluster.Etcdctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// waitForLeases waits until etcd has these leases and no others.
func waitForLeases(t *testing.T, cluster *e2e.Cluster, want ...int64) {
	t.Helper()
	var ids []string
	for _, id := range want {
		ids = append(ids, fmt.Sprintf("%016x", id))
	}
	slices.Sort(ids)
	until(t, func() error {
		got, err := cluster.Leases(t.Context())
		if err != nil {
			return err
		}
		for i := range got {
			got[i] = fmt.Sprintf("%016s", got[i])
		}
		slices.Sort(got)
		if !slices.Equal(got, ids) {
			return fmt.Errorf("leases in etcd: %v, want %v", got, ids)
		}
		return nil
	})
}

func until(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := e2e.Until(ctx, f); err != nil {
		t.Fatal(err)
	}
}

func TestCandidate_PlannedHandOver(t *testing.T) {
	cluster := sharedCluster(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	first := a.waitForTerm()
	if s := a.Snapshot(); !s.Leading || s.State != Leading || s.LeaseID != first.LeaseID || s.TTL != testTTL {
		t.Errorf("snapshot while leading: %+v", s)
	}
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	s := b.waitForState(Standby)
	if s.Leader == nil || s.Leader.Identity != "a" || s.Leader.Token != first.Token || s.Leading {
		t.Errorf("snapshot of the standby: %+v", s)
	}
	cause := errors.New("planned")
	a.stop(cause)
	end := a.waitForEnd()
	if end.cause != cause {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	second := b.waitForTerm()
	t.Logf("hand-over: %v after Lead returned", e2e.Now()-end.at)
	if err := a.waitForReturn(); err != nil {
		t.Errorf("Run after a planned stop: %v", err)
	}
	if second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	waitForLeases(t, cluster, second.LeaseID)
	b.stop(cause)
	b.waitForReturn()
	waitForLeases(t, cluster)
	if out := etcdctl(t, cluster, "get", "--prefix", "--keys-only", ""); out != "" {
		t.Errorf("keys left in etcd: %s", out)
	}
	a.testHolder.mu.Lock()
	if want := []int64{first.LeaseID, 0}; !slices.Equal(a.leased, want) {
		t.Errorf("Leased was called with %v, want %v", a.leased, want)
	}
	a.testHolder.mu.Unlock()
}

var _ = os.Getenv
