package election

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParents(t *testing.T) {
	for election, want := range map[string][]string{
		"a": nil, "a/b/c": {"a/b", "a"}, "/a/b": {"/a"}, "/a": nil,
	} {
		if got := parents(election); !slices.Equal(got, want) {
			t.Errorf("parents(%q) = %q, want %q", election, got, want)
		}
	}
	if got := parents(strings.Repeat("a/", 100) + "a"); len(got) != nestedParents {
		t.Errorf("%d parents", len(got))
	}
}

func TestIsNested(t *testing.T) {
	for _, test := range []struct {
		a, b string
		want bool
	}{
		{"a", "a", false},
		{"a", "ab", false},
		{"a/b", "a/c", false},
		{"a", "a/b", true},
		{"a/b/c", "a", true},
		{"/a", "/a/b", true},
		{"a", "/a", false},
	} {
		if got := isNested(test.a, test.b); got != test.want {
			t.Errorf("isNested(%q, %q) = %v", test.a, test.b, got)
		}
	}
}

// expectNested expects that Run has refused both elections by name.
func (c *testCandidate) expectNested(election, other string) {
	c.t.Helper()
	var nested *NestedError
	if err := c.waitForReturn(); !errors.As(err, &nested) || nested.Election != election ||
		nested.Other != other || !strings.HasPrefix(nested.Key, other+"/") {
		c.t.Errorf("Run returned %v, want %s and %s refused", err, election, other)
	}
}

func TestCandidate_NestedElections(t *testing.T) {
	cluster := newTestEtcd(t)
	in := func(election string) func(*Config, *testCallbacks) {
		return func(cfg *Config, _ *testCallbacks) { cfg.Election = election }
	}
	for _, test := range []struct{ leads, refused, beside string }{
		{"jobs", "jobs/backup", "jobs2"},
		{"jobs/backup", "jobs", "jobs2"},
		{"/1/jobs", "/1/jobs/2/3", "/1/4"},
		{"/1/jobs/2/3", "/1/jobs", "/1/4"},
	} {
		a := newTestCandidate(t, cluster.Endpoints(), "a", in(test.leads))
		term := a.waitForTerm()
		// The election's own candidates, those beside it, and keys of another form are no others.
		beside := newTestCandidate(t, cluster.Endpoints(), "b", in(test.beside))
		other := beside.waitForTerm()
		etcdctl(t, cluster, "put", test.refused+"/by hand", "")
		c := newTestCandidate(t, cluster.Endpoints(), "c", in(test.refused))
		c.expectNested(test.refused, test.leads)
		waitForLeases(t, cluster, term.LeaseID, other.LeaseID)
		etcdctl(t, cluster, "del", test.refused+"/by hand")
		a.stop(nil)
		a.waitForReturn()
		d := newTestCandidate(t, cluster.Endpoints(), "d", in(test.refused))
		d.waitForTerm()
		for _, c := range []*testCandidate{d, beside} {
			c.stop(nil)
			c.waitForReturn()
		}
	}
}

// Other clients' elections count too, however many candidates of its own the election has.
func TestCandidate_NestedElectionOfEtcdctl(t *testing.T) {
	cluster := newTestEtcd(t)
	lease := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
	for i := range 2 * nestedLimit { // as many as are read of a range, and more
		etcdctl(t, cluster, "put", fmt.Sprintf("%s/%016x", t.Name(), 1<<60+i), "", "--lease", lease)
	}
	elect := cluster.EtcdctlCommand(cluster.Endpoints(), "elect", t.Name()+"/nested", "x")
	start(t, elect)
	until(t, func() error {
		if etcdctl(t, cluster, "get", "--prefix", "--keys-only", t.Name()+"/nested/") == "" {
			return errors.New("etcdctl has no key yet")
		}
		return nil
	})
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	a.expectNested(t.Name(), t.Name()+"/nested")
}

// start runs the command until the test ends.
func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // by SIGKILL
	})
}

// Where etcd is down at start the check follows, and where the role does not reach the names around
// the election, only those within it are looked for.
func TestCandidate_NestedElections_Late(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", t.Name()+"/in/"); err != nil {
		t.Fatal(err)
	}
	withAuth := func(election string) func(*Config, *testCallbacks) {
		return func(cfg *Config, _ *testCallbacks) {
			cfg.Election, cfg.TTL = election, 15*time.Second
			cfg.Username = "candidate"
			cfg.Password = func() (string, error) { return "secret", nil }
		}
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", withAuth(t.Name()+"/in/most"))
	a.waitForTerm()
	if err := cluster.Members[0].Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	b := newTestCandidate(t, cluster.Endpoints(), "b", withAuth(t.Name()+"/in"))
	b.waitFor("refused", func(s Snapshot) bool {
		return strings.Contains(s.Reason, "connection refused")
	})
	if err := cluster.Members[0].Start(); err != nil {
		t.Fatal(err)
	}
	b.expectNested(t.Name()+"/in", t.Name()+"/in/most")
}

// The check costs one request, once.
func TestCandidate_NestedElections_Cost(t *testing.T) {
	cluster := newTestEtcd(t)
	resign := make(chan struct{})
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, h *testCallbacks) {
		cfg.TTL = 15 * time.Second // one renewal falls into what is counted of a term
		h.lead = func(ctx context.Context, _ Term) error {
			select {
			case <-resign:
			case <-ctx.Done():
			}
			return nil
		}
	})
	txns := func() float64 {
		t.Helper()
		n, err := cluster.Members[0].Metric(
			t.Context(), `grpc_server_started_total{grpc_method="Txn"`,
		)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	waitForConfirmed := func() {
		t.Helper()
		begun := a.waitForTerm().Deadlines
		a.waitFor("confirmed", func(s Snapshot) bool { return s.Deadlines.StopAt > begun.StopAt })
	}
	waitForConfirmed()
	first := txns()
	resign <- struct{}{}
	waitForConfirmed()
	// Of each session: put, a read of who is ahead, a confirming read, and the removal of the key.
	// Of the first one: the check.
	if second := txns() - first; first != 4 || second != 4 {
		t.Errorf("%v requests for the first term, %v for the second, want 4 and 4", first, second)
	}
}
