package election

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"leasehold/e2e/harness"
)

// newTestRoads starts a proxy in front of each member.
func newTestRoads(t *testing.T, cluster *harness.Cluster) (roads []*harness.Proxy, endpoints []string) {
	for _, url := range cluster.Endpoints() {
		road := harness.NewTestProxy(t, url)
		roads = append(roads, road)
		endpoints = append(endpoints, "http://"+road.Addr())
	}
	return roads, endpoints
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

func TestCandidate_BlackHole(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	registry := prometheus.NewRegistry()
	a := newTestCandidate(t, endpoints, "a", func(cfg *Config, _ *testHolder) { cfg.Registerer = registry })
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	a.waitForExtensions(1)
	roads[0].Cut(harness.BothWays)
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
	roads[0].Recover()
	a.waitForState(Standby)
	waitForLeases(t, cluster, a.Snapshot().LeaseID, b.Snapshot().LeaseID)
	for sample, want := range map[string]float64{
		"leasehold_losses_total contact_lost": 1, "leasehold_losses_total key_deleted": 0, "leasehold_losses_total lease_lost": 0,
		"leasehold_terms_total": 1, "leasehold_leader": 0,
	} {
		if got := gather(t, registry)[sample]; got != want {
			t.Errorf("%s is %v, want %v", sample, got, want)
		}
	}
	m := gather(t, registry)
	if m["leasehold_lease_renewals_total ok"] < 2 || m["leasehold_lease_renewals_total abandoned"]+m["leasehold_lease_renewals_total failed"] < 1 || m["leasehold_lease_valid_seconds"] <= 0 {
		t.Errorf("metrics: %v", m)
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

// Renewals go on after stop-at while Lead has not returned, and revive nothing.
func TestCandidate_ContactComesBackAfterStopAt(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	release := make(chan struct{})
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testHolder) {
		h.lead = func(ctx context.Context, _ Term) error {
			<-ctx.Done()
			<-release
			return nil
		}
	})
	first := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	roads[0].Cut(harness.BothWays)
	a.waitForState(Stopping)
	calls, _ := a.extensions()
	roads[0].Recover()
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
func TestCandidate_StopsInTheDark(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	a := newTestCandidate(t, endpoints, "a", nil)
	a.waitForTerm()
	b := newTestCandidate(t, endpoints, "b", nil)
	b.waitForState(Standby)
	roads[0].Cut(harness.BothWays)
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
	cluster := newTestEtcd(t)
	slow := func(cfg *Config, _ *testHolder) { cfg.TTL = 10 * time.Second }
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
		t.Error("the standby has not kept its place")
	}
}

// Where nobody writes to etcd a watch that was opened again has no progress to tell of. That is no reason to open it once more.
func TestCandidate_QuietAfterARestart(t *testing.T) {
	cluster := newTestEtcd(t)
	long := func(cfg *Config, _ *testHolder) { cfg.TTL = 5 * time.Second }
	a := newTestCandidate(t, cluster.Endpoints(), "a", long)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", long)
	b.waitForState(Standby)
	if err := cluster.Members[0].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	watches := func() float64 {
		// Before the first one there is no such sample.
		n, _ := cluster.Members[0].Metric(t.Context(), `grpc_server_started_total{grpc_method="Watch"`)
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
			t.Fatalf("%v watches were opened again within six intervals in which nothing happened", n)
		}
	}
}

// The watch of a standby goes on after etcd has compacted what it missed.
func TestCandidate_Compaction(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	long := func(cfg *Config, _ *testHolder) { cfg.TTL = 20 * time.Second }
	a := newTestCandidate(t, cluster.Endpoints(), "a", long)
	a.waitForTerm()
	b := newTestCandidate(t, endpoints, "b", long)
	b.waitForState(Standby)
	roads[0].Cut(harness.BothWays)
	a.stop(nil)
	a.waitForReturn()
	for i := range 3 {
		etcdctl(t, cluster, "put", "other", fmt.Sprint(i))
	}
	r, err := Query(t.Context(), testConfig(t, cluster.Endpoints(), ""))
	if err != nil || len(r.Queue) != 1 {
		t.Fatalf("query: %+v, %v", r, err)
	}
	revision := strings.Split(strings.Split(etcdctl(t, cluster, "get", "other", "-w", "json"), `"revision":`)[1], ",")[0]
	etcdctl(t, cluster, "compact", revision)
	roads[0].Drop()
	roads[0].Recover()
	b.waitForTerm()
}

func newTestCluster3(t *testing.T) *harness.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	return harness.NewTestCluster(t, harness.ClusterConfig{Size: 3})
}

// From a TTL of 5 s up, losing one member touches no term, whichever it is and however it is lost.
func TestCandidate_MemberLost(t *testing.T) {
	cluster := newTestCluster3(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	lease := b.waitForState(Standby).LeaseID
	for _, m := range cluster.Members {
		leader, err := cluster.Leader(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		a.waitForExtensions(4)
		if m == leader {
			// It must not wake: a leader of the past that slept for longer than a TTL can revoke leases that were renewed
			// with its successor (https://github.com/etcd-io/etcd/issues/15247), and nothing can be done about it here.
			m.Kill()
			err = m.Start()
		} else {
			err = m.Continue()
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := cluster.WaitHealthy(t.Context()); err != nil {
			t.Fatal(err)
		}
		a.waitForExtensions(2)
		a.expectLeading(term)
	}
	leader, err := cluster.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	leader.Kill()
	a.waitForExtensions(4)
	a.expectLeading(term)
	// With that member gone everything still works.
	a.stop(nil)
	if term := b.waitForTerm(); term.LeaseID != lease {
		t.Error("the standby has not kept its place")
	}
}

// The longer the TTL, the longer a renewal can wait for a member that hangs on an open connection; a request can not. Nothing
// takes a TTL: not a planned stop, which has to revoke, nor to win, nor to join again.
func TestCandidate_HungMember_LongTTL(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	for _, test := range []struct {
		name       string
		ttl        time.Duration
		size, hung int
		leader     bool // etcd's leader is among those that hang
	}{
		{"a follower", time.Minute, 3, 1, false},
		{"the leader of etcd", 5 * time.Minute, 3, 1, true},
		{"two of five, 1 min", time.Minute, 5, 2, false},
		{"two of five, 5 min", 5 * time.Minute, 5, 2, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			testHungMember(t, harness.NewTestCluster(t, harness.ClusterConfig{Size: test.size}), test.ttl, test.hung, test.leader)
		})
	}
}

func testHungMember(t *testing.T, cluster *harness.Cluster, ttl time.Duration, hung int, withLeader bool) {
	leader, err := cluster.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// Those that will hang are the first ones, in the order in which candidates ask.
	members := slices.Clone(cluster.Members)
	slices.SortStableFunc(members, func(a, b *harness.Member) int {
		if (a == leader) == (b == leader) {
			return 0
		}
		if (a == leader) == withLeader {
			return -1
		}
		return 1
	})
	// Until all have a connection to the first one the others are out of reach, so that it is asked first afterwards.
	var roads []*harness.Proxy
	var endpoints []string
	for _, m := range members {
		road := harness.NewTestProxy(t, m.ClientURL)
		roads = append(roads, road)
		endpoints = append(endpoints, "http://"+road.Addr())
	}
	again := make(chan struct{})
	long := func(cfg *Config, h *testHolder) {
		cfg.TTL = ttl
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-again:
			case <-ctx.Done():
			}
			return nil
		}
	}
	for _, road := range roads[1:] {
		road.Cut(harness.BothWays)
	}
	a := newTestCandidate(t, endpoints, "a", long)
	a.waitForTerm()
	b := newTestCandidate(t, endpoints, "b", long)
	b.waitForState(Standby)
	for _, road := range roads[1:] {
		road.Recover()
	}
	for _, m := range members[:hung] {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := cluster.Leader(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Each of these waits is half a TTL of a minute at most. That the watch is on a hung member a standby notices after two
	// intervals of 2.5 s.
	began := harness.Now()
	again <- struct{}{} // a resigns, and joins again behind b
	b.waitForTerm()
	t.Logf("to revoke and to win: %v", harness.Now()-began)
	a.waitForState(Standby)
	t.Logf("to join again: %v", harness.Now()-began)
	began = harness.Now()
	b.stop(nil)
	b.waitForReturn()
	t.Logf("to stop: %v", harness.Now()-began)
	a.waitForTerm()
	t.Logf("the planned hand-over: %v", harness.Now()-began)
}

// A watch is silent on a member that went dark. The standby finds out and watches on another.
func TestCandidate_StandbyOnADarkMember(t *testing.T) {
	cluster := newTestCluster3(t)
	roads, endpoints := newTestRoads(t, cluster)
	b := newTestCandidate(t, endpoints, "b", nil)
	term := b.waitForTerm()
	for i := range roads {
		c := newTestCandidate(t, endpoints, fmt.Sprint("c", i), nil)
		c.waitForState(Standby)
		for j, road := range roads {
			if j != i {
				road.Cut(harness.BothWays)
			}
		}
		began := harness.Now()
		b.stop(nil)
		next := c.waitForTerm()
		took := harness.Now() - began
		t.Logf("hand-over with two of three members dark: %v", took)
		if took > testTTL {
			t.Errorf("hand-over took %v", took)
		}
		if next.Token <= term.Token {
			t.Errorf("token %d follows %d", next.Token, term.Token)
		}
		b, term = c, next
		for _, road := range roads {
			road.Recover()
		}
	}
}

// When etcd comes back from an outage that outlasts every lease it gives those it had their full time again. The standby has
// kept its place, and the old leader's lease, which nobody wants, stands in nobody's way.
func TestCandidate_OutageLongerThanTheLease(t *testing.T) {
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
			t.Errorf("a loop last turned %v ago", harness.Now()-s.LastHeartbeat)
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
		t.Error("the standby has not kept its place")
	}
	if took := harness.Now() - began; took > testTTL*4/5 {
		t.Errorf("leads %v after etcd came back", took)
	}
	a.waitForState(Standby)
	waitForLeases(t, cluster, lease, a.Snapshot().LeaseID)
}

// A grant whose reply was lost leaves no lease behind.
func TestCandidate_LostGrantReply(t *testing.T) {
	t.Run("stopped", func(t *testing.T) { testLostGrantReply(t, true) })
	t.Run("healed", func(t *testing.T) { testLostGrantReply(t, false) })
}

func testLostGrantReply(t *testing.T, stop bool) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	again := make(chan struct{})
	granting := make(chan int64, 100)
	lose := false // set before the second session, whose Leased sees it
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testHolder) {
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-again:
			case <-ctx.Done():
			}
			return nil
		}
		h.onLeased = func(id int64) {
			if id == 0 {
				return
			}
			if lose {
				lose = false
				roads[0].Cut(harness.ToClient)
			}
			granting <- id
		}
	})
	a.waitForTerm()
	<-granting
	lose = true
	again <- struct{}{}
	lost := <-granting
	waitForLeases(t, cluster, lost) // etcd has granted it
	a.waitFor("refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "ask for a lease") })
	if stop {
		a.stop(nil)
		a.waitForReturn()
		waitForLeases(t, cluster) // it was revoked, although that was not answered either
		return
	}
	roads[0].Recover()
	waitForLeases(t, cluster, a.waitForTerm().LeaseID)
}

func TestCandidate_Auth(t *testing.T) {
	cluster := newTestEtcd(t)
	ctx := t.Context()
	password := "secret"
	withAuth := func(cfg *Config, _ *testHolder) {
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return password, nil }
	}
	// Before auth is enabled the user name does no harm.
	early := newTestCandidate(t, cluster.Endpoints(), "early", withAuth)
	term := early.waitForTerm()
	if err := cluster.EnableAuth(ctx, "candidate", password, t.Name()+"/"); err != nil {
		t.Fatal(err)
	}
	early.waitForExtensions(2)
	early.expectLeading(term)
	authenticated := func() float64 {
		t.Helper()
		n, err := cluster.Members[0].Metric(ctx, `grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", withAuth)
	a.waitForState(Standby)
	before := authenticated()
	early.waitForExtensions(8)
	if n := authenticated() - before; n != 0 {
		t.Errorf("%v authentications for 8 renewals of two candidates", n)
	}
	early.stop(nil)
	a.waitForTerm()

	wrong := newTestCandidate(t, cluster.Endpoints(), "wrong", func(cfg *Config, _ *testHolder) {
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "guess", nil }
	})
	s := wrong.waitFor("refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "authentication failed") })
	if s.State != Connecting || strings.Contains(s.Reason, "guess") {
		t.Errorf("snapshot: %+v", s)
	}
	if _, err := Query(ctx, func() Config { cfg := testConfig(t, cluster.Endpoints(), ""); withAuth(&cfg, nil); return cfg }()); err != nil {
		t.Errorf("query: %v", err)
	}
}

// Tokens that are not used for a second expire here, so that every renewal finds its own expired, and so does every watch that is
// opened when a predecessor goes.
func TestCandidate_TokensExpire(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{Flags: []string{"--auth-token-ttl=1"}})
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()+"/"); err != nil {
		t.Fatal(err)
	}
	withAuth := func(cfg *Config, _ *testHolder) {
		cfg.TTL = 15 * time.Second
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "secret", nil }
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", withAuth)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", withAuth)
	b.waitForState(Standby)
	c := newTestCandidate(t, cluster.Endpoints(), "c", withAuth)
	c.waitForState(Standby)
	a.waitForExtensions(2)
	a.expectLeading(term)
	// c's predecessor goes: it has to watch another key.
	b.stop(nil)
	b.waitForReturn()
	a.waitForExtensions(1)
	a.stop(nil)
	c.waitForTerm()
}

// A refused renewal says nothing of the member's watch: to open that again has etcd read the whole queue.
func TestCandidate_RefusedRenewalKeepsTheWatch(t *testing.T) {
	cluster := newTestEtcd(t)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()+"/"); err != nil {
		t.Fatal(err)
	}
	root, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints(), Username: "root", Password: "root-secret"})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	registry := prometheus.NewRegistry()
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testHolder) {
		cfg.TTL, cfg.Registerer = 15*time.Second, registry
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "secret", nil }
	})
	term := a.waitForTerm()
	a.waitForExtensions(1)
	watches := func() float64 {
		t.Helper()
		n, err := cluster.Members[0].Metric(t.Context(), `grpc_server_started_total{grpc_method="Watch"`)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := watches()
	if _, err := root.UserChangePassword(t.Context(), "candidate", "other"); err != nil { // and its tokens are no good any more
		t.Fatal(err)
	}
	until(t, func() error {
		if n := gather(t, registry)["leasehold_lease_renewals_total failed"]; n < 1 {
			return fmt.Errorf("no renewal was refused")
		}
		return nil
	})
	if _, err := root.UserChangePassword(t.Context(), "candidate", "secret"); err != nil {
		t.Fatal(err)
	}
	a.waitForExtensions(2)
	a.expectLeading(term)
	if n := watches() - before; n != 0 {
		t.Errorf("%v watches were opened again", n)
	}
}

// A lease that could not be revoked keeps nobody waiting once it can be, though it does not expire. What makes etcd refuse that
// here, and all else that a candidate does nothing of, is a role that may only read for a while.
func TestCandidate_LeaseNotRevoked(t *testing.T) {
	cluster := newTestEtcd(t)
	election := t.Name() + "/"
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", election); err != nil {
		t.Fatal(err)
	}
	allow := func(what string) {
		t.Helper()
		if _, err := cluster.Etcdctl(t.Context(), "role", "grant-permission", "--prefix", "candidates", what, election); err != nil {
			t.Fatal(err)
		}
	}
	over := make(chan struct{})
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, h *testHolder) {
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "secret", nil }
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-over:
			case <-ctx.Done():
			}
			return nil
		}
	})
	first := a.waitForTerm()
	keeps := cluster.EtcdctlCommand(cluster.Endpoints(), "lease", "keep-alive", fmt.Sprintf("%x", first.LeaseID))
	if err := keeps.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = keeps.Process.Kill()
		_ = keeps.Wait() // by SIGKILL, or when the lease was gone
	}()
	allow("read")
	over <- struct{}{}
	a.waitFor("refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "permission denied") })
	allow("readwrite")
	if second := a.waitForTerm(); second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	waitForLeases(t, cluster, a.Snapshot().LeaseID)
}

// While a lease that could not be revoked is left, the holder is told of no other: it can revoke only the one it knows of.
func TestCandidate_LeaseNotRevoked_HolderKnowsIt(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	over, told := make(chan struct{}), make(chan int64, 100)
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testHolder) {
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-over:
			case <-ctx.Done():
			}
			return nil
		}
		h.onLeased = func(id int64) { told <- id }
	})
	first := a.waitForTerm()
	if id := <-told; id != first.LeaseID {
		t.Fatalf("told of the lease %x", id)
	}
	roads[0].Cut(harness.BothWays)
	over <- struct{}{}
	a.waitFor("done with the session", func(s Snapshot) bool { return s.Reason == "campaigning again" })
	select {
	case id := <-told:
		t.Fatalf("told of the lease %x", id)
	case <-time.After(200 * time.Millisecond): // a tenth of what is waited for it at most
	}
	roads[0].Recover()
	a.waitForTerm()
	waitForLeases(t, cluster, a.Snapshot().LeaseID)
}

// A planned stop makes a last attempt to revoke what an earlier session left.
func TestCandidate_LeaseNotRevoked_PlannedStop(t *testing.T) {
	cluster := newTestEtcd(t)
	roads, endpoints := newTestRoads(t, cluster)
	over := make(chan struct{})
	a := newTestCandidate(t, endpoints, "a", func(cfg *Config, h *testHolder) {
		cfg.TTL = time.Minute // it can't have expired
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-over:
			case <-ctx.Done():
			}
			return nil
		}
	})
	first := a.waitForTerm()
	waitForLeases(t, cluster, first.LeaseID)
	roads[0].Cut(harness.BothWays)
	over <- struct{}{}
	a.waitFor("done with the session", func(s Snapshot) bool { return s.Reason == "campaigning again" })
	a.stop(nil)
	roads[0].Recover()
	if err := a.waitForReturn(); err != nil {
		t.Errorf("Run after a planned stop: %v", err)
	}
	if leases, err := cluster.Leases(t.Context()); err != nil || len(leases) != 0 {
		t.Errorf("leases in etcd: %v, %v", leases, err)
	}
}

func TestCandidate_TLS(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{TLS: certs})
	road := harness.NewTestProxy(t, cluster.Endpoints()[0])
	withTLS := func(cfg *Config, _ *testHolder) {
		cfg.TLS = TLS{CAFile: certs.CAFile, CertFile: certs.ClientCertFile, KeyFile: certs.ClientKeyFile}
	}
	a := newTestCandidate(t, []string{"https://" + road.Addr()}, "a", withTLS)
	term := a.waitForTerm()
	if err := certs.IssueClient(4711); err != nil {
		t.Fatal(err)
	}
	road.Drop()
	a.waitForExtensions(2)
	a.expectLeading(term)

	stranger := newTestCandidate(t, cluster.Endpoints(), "stranger", nil)
	stranger.waitFor("refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "certificate") })
	if _, err := New(func() Config {
		cfg := testConfig(t, cluster.Endpoints(), "")
		cfg.TLS.CAFile = "/nowhere"
		return cfg
	}()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("New with a CA file that is not there: %v", err)
	}
}

// Each handshake shows the certificate that is in the file then.
func TestCredentials_FilesAreReadAgain(t *testing.T) {
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	server, err := tls.LoadX509KeyPair(certs.ServerCertFile, certs.ServerKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(certs.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	creds, err := newCredentials(TLS{CAFile: certs.CAFile, CertFile: certs.ClientCertFile, KeyFile: certs.ClientKeyFile, ServerName: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	for _, serial := range []int64{1001, 1002} {
		if err := certs.IssueClient(serial); err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		seen := make(chan string, 1)
		go func() {
			conn := tls.Server(there, &tls.Config{
				Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, NextProtos: []string{"h2"},
			})
			if err := conn.Handshake(); err != nil {
				seen <- err.Error()
				return
			}
			seen <- conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
		}()
		conn, _, err := creds.ClientHandshake(t.Context(), "somewhere.else:2379", here)
		if err != nil {
			t.Fatal(err)
		}
		if got := <-seen; got != fmt.Sprint(serial) {
			t.Errorf("the server saw serial %s, want %d", got, serial)
		}
		there.Close() // first, or the other end waits for its last word to be read
		conn.Close()
	}
}

func TestCandidate_LeaksNothing(t *testing.T) {
	cluster := newTestEtcd(t)
	results := make(chan error)
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(_ *Config, h *testHolder) {
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
