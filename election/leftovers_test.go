package election

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"leasehold/e2e/harness"
)

// A grant whose reply was lost leaves no lease behind.
func TestCandidate_LostGrantReply(t *testing.T) {
	t.Parallel()
	t.Run("stopped", func(t *testing.T) { testLostGrantReply(t, true) })
	t.Run("healed", func(t *testing.T) { testLostGrantReply(t, false) })
}

func testLostGrantReply(t *testing.T, stop bool) {
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	again := make(chan struct{})
	granting := make(chan int64, 100)
	lose := false // set before the second session, whose Leased sees it
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testCallbacks) {
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
				proxies[0].Cut(harness.ToClient)
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
	a.waitFor(
		"refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "ask for a lease") },
	)
	if stop {
		a.stop(nil)
		a.waitForReturn()
		waitForLeases(t, cluster) // it was revoked, although that was not answered either
		return
	}
	proxies[0].Recover()
	waitForLeases(t, cluster, a.waitForTerm().LeaseID)
}

// A lease that could not be revoked keeps nobody waiting once it can be, though it does not expire.
// What makes etcd refuse that here, and all else that a candidate does nothing of, is a role that
// may only read for a while.
func TestCandidate_LeaseNotRevoked(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	election := t.Name() + "/"
	if err := cluster.EnableAuth(t.Context(), "candidate", "secret", election); err != nil {
		t.Fatal(err)
	}
	allow := func(what string) {
		t.Helper()
		if _, err := cluster.Etcdctl(
			t.Context(), "role", "grant-permission", "--prefix", "candidates", what, election,
		); err != nil {
			t.Fatal(err)
		}
	}
	over := make(chan struct{})
	a := newTestCandidate(t, cluster.Endpoints(), "a", func(cfg *Config, h *testCallbacks) {
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
	keeps := cluster.EtcdctlCommand(
		cluster.Endpoints(), "lease", "keep-alive", fmt.Sprintf("%x", first.LeaseID),
	)
	if err := keeps.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = keeps.Process.Kill()
		_ = keeps.Wait() // by SIGKILL, or when the lease was gone
	}()
	allow("read")
	over <- struct{}{}
	a.waitFor(
		"refused", func(s Snapshot) bool { return strings.Contains(s.Reason, "permission denied") },
	)
	allow("readwrite")
	if second := a.waitForTerm(); second.Token <= first.Token {
		t.Errorf("token %d follows %d", second.Token, first.Token)
	}
	waitForLeases(t, cluster, a.Snapshot().LeaseID)
}

// While a lease that could not be revoked is left, the callbacks are told of no other: it can
// revoke only the one it knows of.
func TestCandidate_LeaseNotRevoked_CallbacksKnowIt(t *testing.T) {
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	over, told := make(chan struct{}), make(chan int64, 100)
	a := newTestCandidate(t, endpoints, "a", func(_ *Config, h *testCallbacks) {
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
	proxies[0].Cut(harness.BothWays)
	over <- struct{}{}
	a.waitFor(
		"done with the session", func(s Snapshot) bool { return s.Reason == "campaigning again" },
	)
	select {
	case id := <-told:
		t.Fatalf("told of the lease %x", id)
	case <-time.After(200 * time.Millisecond): // a tenth of what is waited for it at most
	}
	proxies[0].Recover()
	a.waitForTerm()
	waitForLeases(t, cluster, a.Snapshot().LeaseID)
}

// A planned stop makes a last attempt to revoke what an earlier session left.
func TestCandidate_LeaseNotRevoked_PlannedStop(t *testing.T) {
	t.Parallel()
	cluster := newTestEtcd(t)
	proxies, endpoints := newTestProxies(t, cluster)
	over := make(chan struct{})
	a := newTestCandidate(t, endpoints, "a", func(cfg *Config, h *testCallbacks) {
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
	proxies[0].Cut(harness.BothWays)
	over <- struct{}{}
	a.waitFor(
		"done with the session", func(s Snapshot) bool { return s.Reason == "campaigning again" },
	)
	a.stop(nil)
	proxies[0].Recover()
	if err := a.waitForReturn(); err != nil {
		t.Errorf("Run after a planned stop: %v", err)
	}
	if leases, err := cluster.Leases(t.Context()); err != nil || len(leases) != 0 {
		t.Errorf("leases in etcd: %v, %v", leases, err)
	}
}

// An etcd that has no space left refuses what a leader puts when it leaves. It leaves nonetheless.
func TestCandidate_ReleaseWithoutSpace(t *testing.T) {
	cluster := newTestEtcd(t)
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	client, status := statusOf(t, cluster)
	if _, err := pb.NewMaintenanceClient(client.ActiveConnection()).Alarm(t.Context(),
		&pb.AlarmRequest{
			Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE,
			MemberID: status.Header.MemberId,
		}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Put(t.Context(), "x", ""); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("a put: %v", err)
	}
	cfg := testConfig(t, cluster.Endpoints(), "b")
	ms, err := newMembers(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer ms.close()
	left := leaving{lease: term.LeaseID, key: term.Key, exited: cfg.exited(term.LeaseID)}
	if err := left.revoke(t.Context(), ms, time.Minute, time.Minute); err != nil {
		t.Error(err)
	}
	waitForLeases(t, cluster)
	a.stop(nil)
}
