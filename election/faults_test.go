package election

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"leasehold/e2e/harness"
)

func TestCandidate_BlackHole(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	registry := prometheus.NewRegistry()
	a := newTestCandidate(
		t, endpoints, "a", func(cfg *Config, _ *testCallbacks) { cfg.Registerer = registry },
	)
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	a.waitForExtensions(1)
	proxies[0].Cut(harness.BothWays)
	end := a.waitForEnd()
	if !errors.Is(end.cause, ErrContactLost) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	select {
	case <-first.Lost:
		t.Error("Term.Lost is closed though the lease still holds")
	default:
	}
	_, d := a.extensions()
	if late := end.at - d.StopAt; late < 0 || late > 200*time.Millisecond {
		t.Errorf("the term ended %v after stop-at", late)
	}
	if d.KillBy-d.StopAt != testTTL/5 || d.End-d.KillBy != testTTL/10 {
		t.Errorf("deadlines %+v", d)
	}
	b.waitForTerm()
	if now := harness.Now(); now < d.End {
		t.Errorf("the next leader starts %v before the lease's end", d.End-now)
	}
	s := a.waitForState(Connecting)
	if s.Reason == "" {
		t.Error("no reason for not being in the election")
	}
	proxies[0].Recover()
	a.waitForState(Standby)
	waitForLeases(t, cluster, a.Snapshot().LeaseID, b.Snapshot().LeaseID)
	for sample, want := range map[string]float64{
		"leasehold_losses_total contact_lost": 1,
		"leasehold_losses_total key_deleted":  0,
		"leasehold_losses_total lease_lost":   0,
		"leasehold_terms_total":               1,
		"leasehold_leader":                    0,
	} {
		if got := gather(t, registry)[sample]; got != want {
			t.Errorf("%s is %v, want %v", sample, got, want)
		}
	}
	// The new lease may not have been renewed yet.
	until(t, func() error {
		m := gather(t, registry)
		const renewals = "leasehold_lease_renewals_total "
		if m[renewals+"ok"] < 2 || m[renewals+"abandoned"]+m[renewals+"failed"] < 1 ||
			m["leasehold_lease_valid_seconds"] <= 0 {
			return fmt.Errorf("metrics: %v", m)
		}
		return nil
	})
}

// Renewals go on after stop-at while Lead has not returned, and revive nothing.
func TestCandidate_ContactComesBackAfterStopAt(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	release := make(chan struct{})
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testCallbacks) {
		h.lead = func(ctx context.Context, _ Term) error {
			<-ctx.Done()
			<-release
			return nil
		}
	})
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	proxies[0].Cut(harness.BothWays)
	a.waitForState(Stopping)
	calls, _ := a.extensions()
	proxies[0].Recover()
	// The lease lives on well beyond what it had when the term ended.
	s := a.Snapshot()
	a.waitFor("renewed", func(now Snapshot) bool { return now.Deadlines.StopAt > s.Deadlines.End })
	if s := a.Snapshot(); s.Leading || s.State != Stopping {
		t.Errorf("the term was revived: %+v", s)
	}
	if now, _ := a.extensions(); now != calls {
		t.Error("the term was extended after its end")
	}
	if len(b.terms) != 0 {
		t.Error("a successor leads while something is still alive")
	}
	close(release)
	if second := b.waitForTerm(); second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	a.waitForState(Standby)
}

// Whatever etcd does not answer, Run returns.
func TestCandidate_StopsWhileUnreachable(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	a := newTestCandidate(t, endpoints, "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, endpoints, "b", nil)
	b.waitForState(Standby)
	proxies[0].Cut(harness.BothWays)
	c := newTestCandidate(t, endpoints, "c", nil)
	for _, c := range []*testCandidate{a, b, c} {
		began := harness.Now()
		c.stop(nil)
		c.waitForReturn()
		if took := harness.Now() - began; took > 3*time.Second {
			t.Errorf("Run returned after %v", took)
		}
	}
}

func TestCandidate_EtcdRestarted(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	slow := func(cfg *Config, _ *testCallbacks) { cfg.TTL = 10 * time.Second }
	a := newTestCandidate(t, cluster.Endpoints(), "a", slow)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", slow)
	old := b.waitForState(Standby)
	if err := cluster.Members[0].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.waitForExtensions(2)
	a.expectLeading(term)
	a.stop(nil)
	if term := b.waitForTerm(); term.LeaseID != old.LeaseID {
		t.Error("the standby has not kept its queue entry")
	}
}

// Where nobody writes to etcd a watch that was opened again has no progress to tell of. That is no
// reason to open it once more.
func TestCandidate_QuietAfterARestart(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	// A single member takes up to 3 s to lead again.
	long := func(cfg *Config, _ *testCallbacks) { cfg.TTL = 10 * time.Second }
	a := newTestCandidate(t, cluster.Endpoints(), "a", long)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", long)
	b.waitForState(Standby)
	if err := cluster.Members[0].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	watches := func() float64 {
		// Before the first one there is no such sample.
		n, _ := cluster.Members[0].Metric(
			t.Context(), `grpc_server_started_total{grpc_method="Watch"`,
		)
		return n
	}
	for attempt := 1; ; attempt++ {
		before := watches()
		a.waitForExtensions(6) // one an interval; silence is noticed after two
		a.expectLeading(term)
		n := watches() - before
		if n == 0 && before > 0 {
			break
		}
		if attempt == 4 { // the first ones are there to reconnect
			t.Fatalf(
				"%v watches were opened again within six intervals in which nothing happened", n,
			)
		}
	}
}

// The watch of a standby goes on after etcd has compacted what it missed.
func TestCandidate_Compaction(t *testing.T) {
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	long := func(cfg *Config, _ *testCallbacks) { cfg.TTL = 20 * time.Second }
	a := newTestCandidate(t, cluster.Endpoints(), "a", long)
	a.waitForTerm()
	b := newTestCandidate(t, endpoints, "b", long)
	b.waitForState(Standby)
	proxies[0].Cut(harness.BothWays)
	a.stop(nil)
	a.waitForReturn()
	for i := range 3 {
		etcdctl(t, cluster, "put", "other", fmt.Sprint(i))
	}
	r, err := query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
	if err != nil || len(r.Queue) != 1 {
		t.Fatalf("query: %+v, %v", r, err)
	}
	_, rest, _ := strings.Cut(etcdctl(t, cluster, "get", "other", "-w", "json"), `"revision":`)
	revision, _, _ := strings.Cut(rest, ",")
	etcdctl(t, cluster, "compact", revision)
	proxies[0].Drop()
	proxies[0].Recover()
	b.waitForTerm()
}

// When etcd comes back from an outage that outlasts every lease it gives those it had their full
// time again. The standby has kept its queue entry, and the old leader's lease, which nobody wants,
// stands in nobody's way.
func TestCandidate_OutageLongerThanTheLease(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	lease := b.waitForState(Standby).LeaseID
	cluster.Members[0].Kill()
	if end := a.waitForEnd(); !errors.Is(end.cause, ErrContactLost) {
		t.Errorf("the term's context ended with %v", end.cause)
	}
	if s := b.waitForState(Connecting); !strings.Contains(s.Reason, "connection refused") {
		t.Errorf("reason %q", s.Reason)
	}
	for _, c := range []*testCandidate{a, b} {
		if s := c.waitForState(Connecting); harness.Now()-s.LastHeartbeat > HeartbeatInterval {
			t.Errorf("the last heartbeat was %v ago", harness.Now()-s.LastHeartbeat)
		}
	}
	if err := cluster.Members[0].Start(); err != nil {
		t.Fatal(err)
	}
	if err := cluster.WaitHealthy(t.Context()); err != nil {
		t.Fatal(err)
	}
	began := harness.Now()
	if term := b.waitForTerm(); term.LeaseID != lease {
		t.Error("the standby has not kept its queue entry")
	}
	if took := harness.Now() - began; took > testTTL*4/5 {
		t.Errorf("leads %v after etcd came back", took)
	}
	a.waitForState(Standby)
	waitForLeases(t, cluster, lease, a.Snapshot().LeaseID)
}

func TestCandidate_LeaksNothing(t *testing.T) {
	cluster := newTestEtcd(t)
	results := make(chan error)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testCallbacks) {
		h.lead = func(context.Context, Term) error { return <-results }
	})
	count := func() int {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return runtime.NumGoroutine()
	}
	few := 0
	for i := range 60 {
		a.waitForTerm()
		if i == 10 {
			few = count()
		}
		results <- nil
	}
	a.waitForTerm()
	until(t, func() error {
		if many := count(); many > few+5 {
			return fmt.Errorf("%d goroutines after 10 terms, %d after 60", few, many)
		}
		return nil
	})
	waitForLeases(t, cluster, a.Snapshot().LeaseID)
	close(results)
	a.stop(nil)
}
