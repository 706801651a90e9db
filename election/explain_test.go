package election

import (
	"context"
	"errors"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"leasehold/e2e/harness"
)

// A watch stays where a member refuses a renewal: only one that can't be used makes it move.
func TestUnavailable(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{rpctypes.Error(rpctypes.ErrGRPCRequestTooManyRequests), false},
		{rpctypes.Error(rpctypes.ErrGRPCInvalidAuthToken), false},
		{rpctypes.Error(rpctypes.ErrGRPCNoLeader), true},
		{status.Error(codes.Unavailable, "connection refused"), true},
		{&memberError{"m1", status.Error(codes.Unavailable, "connection refused")}, true},
		{authError{errors.New("wrong password")}, false},
		{context.DeadlineExceeded, false},
	} {
		if got := unavailable(c.err); got != c.want {
			t.Errorf("unavailable(%v) = %v", c.err, got)
		}
	}
}

// What etcd refuses, and what would help, stands in the reason and in what Query returns.
func TestExplain_Auth(t *testing.T) {
	cluster := newTestEtcd(t)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", "allowed/"); err != nil {
		t.Fatal(err)
	}
	password := func(p string) func() (string, error) {
		return func() (string, error) { return p, nil }
	}
	for name, test := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"role": {
			func(cfg *Config) { cfg.Username, cfg.Password = "candidate", password("secret") },
			`user "candidate" needs a role with %s permission on the prefix "` + t.Name() + `/"`,
		},
		"password": {
			func(cfg *Config) { cfg.Username, cfg.Password = "candidate", password("guess") },
			"user name or password is wrong",
		},
		"no user": {func(*Config) {}, "etcd demands a user name and a password"},
	} {
		cfg := testConfig(t, cluster.Endpoints(), "")
		test.change(&cfg)
		read := strings.ReplaceAll(test.want, "%s", "read")
		if _, err := query(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), read) {
			t.Errorf("%s: query: %v, want %s", name, err, read)
		}
		a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, _ *testCallbacks) {
			test.change(cfg)
		})
		readwrite := strings.ReplaceAll(test.want, "%s", "readwrite")
		a.waitFor(name, func(s Snapshot) bool { return strings.Contains(s.Reason, readwrite) })
		a.stop(nil)
		a.waitForReturn()
	}
}

// What listens at an endpoint may be anything, and what it answers reaches terminals.
func TestExplain_IsPrintable(t *testing.T) {
	cfg := &Config{Election: "e"}
	message := "\x1b[2J\n\u009b" + strings.Repeat("x", 1<<20)
	err := &memberError{"m1", status.Error(codes.Unknown, message)}
	if text := cfg.explain(err); !strings.HasPrefix(text, "m1: \ufffd[2J; \ufffdxxx") ||
		len(text) > 2200 {
		t.Errorf("%d bytes: %.99q", len(text), text)
	}
}

// A URL with the wrong scheme is told as such.
func TestExplain_Scheme(t *testing.T) {
	if testing.Short() {
		t.Skip("needs etcd")
	}
	certs, err := harness.NewCerts(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	secure := harness.NewTestCluster(t, harness.ClusterConfig{TLS: certs})
	open := harness.NewTestCluster(t, harness.ClusterConfig{})
	for _, test := range []struct {
		endpoint, from, to, want string
	}{
		{secure.Endpoints()[0], "https://", "http://", "begin with https:"},
		{open.Endpoints()[0], "http://", "https://", "begin with http:"},
	} {
		cfg := testConfig(t, []string{strings.Replace(test.endpoint, test.from, test.to, 1)}, "")
		for range 3 {
			_, err := query(t.Context(), cfg)
			t.Logf("%s: %v", cfg.Endpoints[0], err)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%s: %v, want %q", cfg.Endpoints[0], err, test.want)
			}
		}
	}
}
