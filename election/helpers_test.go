package election

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"leasehold/e2e/harness"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The tests that run side by side wait for leases to run out most of the time, so that more of
	// them fit than there are processors.
	if err := flag.Set("test.parallel", "6"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// testTTL is the TTL of the candidates in these tests: the shortest of which losing one etcd member
// takes nothing away.
const testTTL = 5 * time.Second

// testCallbacks stands for what a daemon does with its leadership.
type testCallbacks struct {
	// onLeased and lead may be set before the candidate runs. Without lead a term lasts until its
	// context ends.
	onLeased func(id int64)
	lead     func(context.Context, Term) error

	terms  chan Term // each term that begins
	ended  chan ended
	causes chan error // why each term ended, for the candidate

	mu             sync.Mutex
	leased         []int64
	ttl            time.Duration // of the last one
	entered        []Entry
	releasing      []int64
	releasingFails error
	extended       Deadlines
	suspends       atomic.Bool
	calls          int
}

// ended is the end of a term as Lead sees it.
type ended struct {
	at    time.Duration
	cause error
}

func (h *testCallbacks) Leased(id int64, ttl time.Duration) {
	h.mu.Lock()
	h.leased, h.ttl = append(h.leased, id), ttl
	h.mu.Unlock()
	if h.onLeased != nil {
		h.onLeased(id)
	}
}

func (h *testCallbacks) Entered(key string, created int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.entered = append(h.entered, Entry{Key: key, Token: created})
}

func (h *testCallbacks) Releasing(lease int64) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.releasing = append(h.releasing, lease)
	return h.releasingFails
}

func (h *testCallbacks) Extended(d Deadlines) {
	h.mu.Lock()
	h.extended = d
	h.calls++
	h.mu.Unlock()
}

func (h *testCallbacks) Suspend() bool { return h.suspends.Load() }

func (h *testCallbacks) extensions() (int, Deadlines) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.calls, h.extended
}

func (h *testCallbacks) Lead(ctx context.Context, term Term) error {
	h.terms <- term
	var err error
	if h.lead != nil {
		err = h.lead(ctx, term)
	} else {
		<-ctx.Done()
	}
	h.ended <- ended{harness.Now(), context.Cause(ctx)}
	return err
}

func (h *testCallbacks) Ended(cause, _ error) { h.causes <- cause }

// testCandidate is a candidate that runs until its test ends.
type testCandidate struct {
	*Candidate
	*testCallbacks
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
		Endpoints:   endpoints,
		Election:    strings.ReplaceAll(t.Name(), "/", "-"),
		Identity:    identity,
		TTL:         testTTL,
		LossGrace:   -1,
		Margin:      -1,
		Wait:        -1,
		Failback:    -1,
		DialTimeout: time.Second,
		Now:         harness.Now,
		Logger: slog.New(
			slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}),
		).With(
			"identity", identity,
		),
		Registerer: prometheus.NewRegistry(),
	}
}

// newTestCandidate runs a candidate. The configuration may be changed before that.
func newTestCandidate(
	t *testing.T, endpoints []string, identity string, change func(*Config, *testCallbacks),
) *testCandidate {
	t.Helper()
	c := &testCandidate{
		testCallbacks: &testCallbacks{
			terms: make(chan Term, 1000), ended: make(chan ended, 1000),
			causes: make(chan error, 1000),
		},
		t: t, done: make(chan struct{}), updates: make(chan struct{}, 1),
	}
	cfg := testConfig(t, endpoints, identity)
	cfg.Callbacks = c.testCallbacks
	cfg.Changed = func() { poke(c.updates) }
	if change != nil {
		change(&cfg, c.testCallbacks)
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

// newTestEtcd starts an etcd of one member.
func newTestEtcd(t *testing.T) *harness.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	return harness.NewTestCluster(t, harness.ClusterConfig{})
}

func etcdctl(t *testing.T, cluster *harness.Cluster, args ...string) string {
	t.Helper()
	out, err := cluster.Etcdctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// waitForLeases waits until etcd has these leases and no others.
func waitForLeases(t *testing.T, cluster *harness.Cluster, want ...int64) {
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
	if err := harness.Until(ctx, f); err != nil {
		t.Fatal(err)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// waitForBlocker waits until a key keeps the candidate waiting, for a reason that contains why.
func (c *testCandidate) waitForBlocker(why string) Snapshot {
	c.t.Helper()
	s := c.waitFor("blocked", func(s Snapshot) bool {
		return s.Blocker != nil && s.State == Standby // which is published after the blocker
	})
	if !strings.Contains(s.Blocker.Why, why) || s.Leader != nil {
		c.t.Errorf("%s: snapshot %+v, blocker %+v", why, s, s.Blocker)
	}
	return s
}

func etcdctlDir(cluster *harness.Cluster) string {
	return filepath.Dir(cluster.EtcdctlCommand(nil, "version").Path)
}

// newTestProxies starts a proxy in front of each member.
func newTestProxies(
	t *testing.T, cluster *harness.Cluster,
) (proxies []*harness.Proxy, endpoints []string) {
	for _, url := range cluster.Endpoints() {
		proxy := harness.NewTestProxy(t, url)
		proxies = append(proxies, proxy)
		endpoints = append(endpoints, "http://"+proxy.Addr())
	}
	return proxies, endpoints
}

// waitForExtensions waits until the term was extended so many times more.
func (c *testCandidate) waitForExtensions(n int) {
	c.t.Helper()
	before, _ := c.extensions()
	until(c.t, func() error {
		if len(c.ended) != 0 {
			c.t.Fatalf("the term has ended: %+v", <-c.ended)
		}
		if now, _ := c.extensions(); now < before+n {
			return fmt.Errorf("%d renewals, want %d", now-before, n)
		}
		return nil
	})
}

// expectLeading fails if the term has ended.
func (c *testCandidate) expectLeading(term Term) {
	c.t.Helper()
	if s := c.Snapshot(); !s.Leading || s.LeaseID != term.LeaseID || len(c.ended) != 0 {
		c.t.Fatalf("the term has ended: %+v", s)
	}
}

// gather returns the values of counters and gauges by name and label value.
func gather(t *testing.T, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	samples := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			samples[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return samples
}

func newTestCluster3(t *testing.T) *harness.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	return harness.NewTestCluster(t, harness.ClusterConfig{Size: 3})
}

// query reads the election of that configuration.
func query(ctx context.Context, cfg Config) (Report, error) {
	client, err := Connect(cfg)
	if err != nil {
		return Report{}, err
	}
	defer client.Close()
	return client.Query(ctx)
}
