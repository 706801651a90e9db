package election

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"leasehold/e2e/harness"
)

func TestCandidate_Auth(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	ctx := t.Context()
	password := "secret"
	withAuth := func(cfg *Config, _ *testCallbacks) {
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
		n, err := cluster.Members[0].Metric(
			ctx, `grpc_server_handled_total{grpc_code="OK",grpc_method="Authenticate"`,
		)
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

	wrong := newTestCandidate(t, cluster.Endpoints(), "wrong", func(cfg *Config, _ *testCallbacks) {
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "guess", nil }
	})
	s := wrong.waitFor(
		"refused",
		func(s Snapshot) bool { return strings.Contains(s.Reason, "authentication failed") },
	)
	if s.State != Connecting || strings.Contains(s.Reason, "guess") {
		t.Errorf("snapshot: %+v", s)
	}
	cfg := testConfig(t, cluster.Endpoints(), "")
	withAuth(&cfg, nil)
	if _, err := query(ctx, cfg); err != nil {
		t.Errorf("query: %v", err)
	}
}

// Tokens that are not used for a second expire here, so that every renewal finds its own expired,
// and so does every watch that is opened when a predecessor goes.
func TestCandidate_TokensExpire(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	cluster := harness.NewTestCluster(
		t, harness.ClusterConfig{Flags: []string{"--auth-token-ttl=1"}},
	)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()+"/"); err != nil {
		t.Fatal(err)
	}
	withAuth := func(cfg *Config, _ *testCallbacks) {
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

// oldEtcd refuses an authentication with a token, as an etcd before 3.4.28 does if it does not know
// the token.
type oldEtcd struct{ pb.UnimplementedAuthServer }

func (oldEtcd) Authenticate(
	ctx context.Context, _ *pb.AuthenticateRequest,
) (*pb.AuthenticateResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if len(md.Get(rpctypes.TokenFieldNameGRPC)) > 0 {
		return nil, rpctypes.ErrGRPCInvalidAuthToken
	}
	return &pb.AuthenticateResponse{Header: &pb.ResponseHeader{}, Token: "new"}, nil
}

// serveAuth serves authentications until the test ends, and returns the endpoint.
func serveAuth(t *testing.T, etcd pb.AuthServer) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterAuthServer(server, etcd)
	go func() { _ = server.Serve(listener) }() // it ends with Stop
	t.Cleanup(server.Stop)
	return "http://" + listener.Addr().String()
}

// expectNewToken replaces the configuration's token. It asks the first endpoint first.
func expectNewToken(t *testing.T, cfg Config) {
	t.Helper()
	cfg.Username = "candidate"
	cfg.Password = func() (string, error) { return "secret", nil }
	ms, err := newMembers(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer ms.closing.Wait()
	defer ms.close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := ms.auth.replace(ctx, cfg.AuthToken, ms.all()[0]); err != nil {
		t.Fatal(err)
	}
	if token, _ := ms.auth.current(); token != "new" {
		t.Errorf("the token is %q, want new", token)
	}
}

// The token that is refused must not go with the request for a new one.
func TestAuth_AsksWithoutTheOldToken(t *testing.T) {
	cfg := testConfig(t, []string{serveAuth(t, oldEtcd{})}, "a")
	cfg.AuthToken = "old"
	expectNewToken(t, cfg)
}

// slowEtcd lets an authentication wait as long as wait says for that one of them, from 1 on, and
// then gives a token, or fails.
type slowEtcd struct {
	pb.UnimplementedAuthServer
	asked atomic.Int32
	wait  func(ctx context.Context, number int32) error
}

func (e *slowEtcd) Authenticate(
	ctx context.Context, _ *pb.AuthenticateRequest,
) (*pb.AuthenticateResponse, error) {
	if err := e.wait(ctx, e.asked.Add(1)); err != nil {
		return nil, err
	}
	return &pb.AuthenticateResponse{Header: &pb.ResponseHeader{}, Token: "new"}, nil
}

// A member that hangs while it checks a password must not keep a leader from its renewal. One that
// answers is the only one that is asked.
func TestAuth_AsksAnotherMember(t *testing.T) {
	t.Parallel()
	type wait = func(ctx context.Context, number int32) error
	good := func(context.Context, int32) error { return nil }
	hangs := func(ctx context.Context, _ int32) error {
		<-ctx.Done()
		return ctx.Err()
	}
	// etcd elects a leader when it is asked first.
	noLeader := func(_ context.Context, number int32) error {
		if number == 1 {
			return rpctypes.ErrGRPCLeaderChanged
		}
		return nil
	}
	for name, test := range map[string]struct {
		waits []wait
		asked []int32
		after time.Duration
	}{
		"it answers":            {[]wait{good, good}, []int32{1, 0}, 0},
		"it hangs":              {[]wait{hangs, good}, []int32{1, 1}, time.Second},
		"the other one, failed": {[]wait{noLeader, hangs}, []int32{2, 1}, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var servers []*slowEtcd
			var endpoints []string
			for _, wait := range test.waits {
				servers = append(servers, &slowEtcd{wait: wait})
				endpoints = append(endpoints, serveAuth(t, servers[len(servers)-1]))
			}
			cfg := testConfig(t, endpoints, "a")
			cfg.TTL = 5 * time.Second
			began := harness.Now()
			expectNewToken(t, cfg)
			if took := harness.Now() - began; took < test.after {
				t.Errorf("another one was asked within %v, want after %v", took, test.after)
			}
			for i, server := range servers {
				if n := server.asked.Load(); n != test.asked[i] {
					t.Errorf("member %d was asked %d times, want %d", i, n, test.asked[i])
				}
			}
		})
	}
}

// A refused renewal says nothing of the member's watch: to open that again has etcd read the whole
// queue.
func TestCandidate_RefusedRenewalKeepsTheWatch(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()+"/"); err != nil {
		t.Fatal(err)
	}
	root, err := clientv3.New(
		clientv3.Config{Endpoints: cluster.Endpoints(), Username: "root", Password: "root-secret"},
	)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	registry := prometheus.NewRegistry()
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testCallbacks) {
		cfg.TTL, cfg.Registerer = 15*time.Second, registry
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "secret", nil }
	})
	term := a.waitForTerm()
	a.waitForExtensions(1)
	watches := func() float64 {
		t.Helper()
		n, err := cluster.Members[0].Metric(
			t.Context(), `grpc_server_started_total{grpc_method="Watch"`,
		)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := watches()
	if _, err := root.UserChangePassword(
		t.Context(), "candidate", "other",
	); err != nil { // and its tokens are no good any more
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

// newTestEtcdOnOneCore starts an etcd of one member with auth, all of whose threads share a core.
func newTestEtcdOnOneCore(t *testing.T) *harness.Cluster {
	t.Helper()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	etcd, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "etcd")
	if err := os.WriteFile(
		script, fmt.Appendf(nil, "#!/bin/sh\nexec taskset -c 0 '%s' \"$@\"\n", etcd.Server), 0o700,
	); err != nil {
		t.Fatal(err)
	}
	etcd.Server = script
	cluster := harness.NewTestCluster(t, harness.ClusterConfig{Etcd: etcd})
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()); err != nil {
		t.Fatal(err)
	}
	return cluster
}

// A restart of etcd makes all simple tokens invalid. Etcd checks one password in 80 ms of a core,
// and checks it to the end although nobody waits any more: a fleet must not throw away what it has
// begun, or it never comes back. TEST_FLEET is how many leaders it has; docs/scale.md shows what
// was measured.
func TestCandidate_FleetAuthenticatesAfterARestart(t *testing.T) {
	fleet := 60 // it takes them 5 to 8 s to come back
	if n, err := strconv.Atoi(os.Getenv("TEST_FLEET")); err == nil {
		fleet = n
	}
	cluster := newTestEtcdOnOneCore(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(fleet)*1500*time.Millisecond)
	defer cancel()
	var all []*testCandidate
	waitForAll := func(since time.Duration) error {
		return harness.Until(ctx, func() error {
			for i, c := range all {
				// The renewal that counts was sent since.
				if s := c.Snapshot(); !s.Leading || s.Deadlines.End-s.TTL < since {
					return fmt.Errorf("candidate %d: %+v", i, s)
				}
			}
			return nil
		})
	}
	began := harness.Now()
	for i := range fleet {
		all = append(
			all,
			newTestCandidate(
				t,
				cluster.Endpoints(),
				fmt.Sprintf("c%d", i),
				func(cfg *Config, _ *testCallbacks) {
					cfg.Election += fmt.Sprintf("/%d", i)
					cfg.TTL = 15 * time.Second
					cfg.Username = "candidate"
					cfg.Password = func() (string, error) { return "secret", nil }
					cfg.Logger = slog.New(slog.DiscardHandler)
				},
			),
		)
	}
	if err := waitForAll(0); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d leaders began within %v", fleet, harness.Now()-began)
	stopped := harness.Now()
	if err := cluster.Members[0].Restart(ctx); err != nil {
		t.Fatal(err)
	}
	up := harness.Now()
	err := waitForAll(up)
	back := harness.Now()
	lost := 0
	for _, c := range all {
		lost += len(c.ended)
	}
	authenticated, errMetric := cluster.Members[0].Metric(
		ctx, `grpc_server_started_total{grpc_method="Authenticate"`,
	)
	t.Logf(
		"etcd was down for %v; all were back %v after its start; "+
			"%d terms were lost; %v authentications were begun",
		up-stopped, back-up, lost, authenticated,
	)
	if err := errors.Join(err, errMetric); err != nil {
		t.Error(err)
	}
	if authenticated > float64(2*fleet) {
		t.Errorf("%v authentications for %d candidates", authenticated, fleet)
	}
}

// A member that hangs takes nothing from a leader that has to authenticate for each renewal, and
// keeps nobody from joining.
func TestCandidate_TokensExpireWhileAMemberHangs(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("needs etcd")
	}
	cluster := harness.NewTestCluster(
		t, harness.ClusterConfig{Size: 3, Flags: []string{"--auth-token-ttl=1"}},
	)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()); err != nil {
		t.Fatal(err)
	}
	withAuth := func(cfg *Config, _ *testCallbacks) {
		cfg.TTL = 15 * time.Second
		cfg.Username, cfg.Password = "candidate", func() (string, error) { return "secret", nil }
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", withAuth)
	term := a.waitForTerm()
	for i, m := range cluster.Members {
		if err := m.Pause(); err != nil {
			t.Fatal(err)
		}
		b := newTestCandidate(t, cluster.Endpoints(), fmt.Sprintf("b%d", i), withAuth)
		b.waitForState(Standby)
		a.waitForExtensions(1)
		a.expectLeading(term)
		if err := m.Continue(); err != nil {
			t.Fatal(err)
		}
		a.waitForExtensions(1)
	}
	a.expectLeading(term)
}
