package election

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

func TestQuery(t *testing.T) {
	cluster := newTestEtcd(t)
	cfg := testConfig(t, cluster.Endpoints(), "")
	if r, err := query(t.Context(), cfg); err != nil || r.Leader != nil || len(r.Queue) != 0 {
		t.Errorf("an empty election: %+v, %v", r, err)
	}
	a := newTestCandidate(t, cluster.Endpoints(), "a", nil)
	term := a.waitForTerm()
	b := newTestCandidate(t, cluster.Endpoints(), "b", nil)
	b.waitForState(Standby)
	cut := harness.NewTestProxy(t, cluster.Endpoints()[0])
	cut.Cut(harness.BothWays)
	cfg.Endpoints = []string{"http://127.0.0.1:1", "http://" + cut.Addr(), cluster.Endpoints()[0]}
	for range 5 { // the order is random
		r, err := query(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if r.Leader == nil || *r.Leader != (Entry{"a", term.Key, term.Token}) ||
			r.LeaseID != term.LeaseID || r.LeaseLeft <= 0 || r.LeaseLeft > testTTL ||
			len(r.Queue) != 2 ||
			r.Queue[1].Identity != "b" {
			t.Errorf("query: %+v", r)
		}
	}
	cfg.Endpoints = cfg.Endpoints[:2]
	began := harness.Now()
	if _, err := query(t.Context(), cfg); err == nil || harness.Now()-began > 3*time.Second {
		t.Errorf("no member answers: %v after %v", err, harness.Now()-began)
	}
}

func TestRevoke(t *testing.T) {
	cluster := newTestEtcd(t)
	cut := harness.NewTestProxy(t, cluster.Endpoints()[0])
	cut.Cut(harness.BothWays)
	cfg := testConfig(t, []string{"http://" + cut.Addr()}, "")
	id := strings.Fields(etcdctl(t, cluster, "lease", "grant", "600"))[1]
	lease, err := strconv.ParseInt(id, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if err := Revoke(ctx, cfg, lease); err == nil {
		t.Error("revoked though etcd is unreachable")
	}
	waitForLeases(t, cluster, lease)
	done := make(chan error)
	go func() { done <- Revoke(t.Context(), cfg, lease) }()
	cut.Recover()
	if err := <-done; err != nil {
		t.Error(err)
	}
	waitForLeases(t, cluster)
	key := fmt.Sprintf("%s/%x", cfg.Election, lease)
	etcdctl(t, cluster, "put", key, "somebody")
	if err := Revoke(t.Context(), cfg, lease); err != nil {
		t.Errorf("a lease that is gone: %v", err)
	}
	if out := etcdctl(t, cluster, "get", key); out != "" {
		t.Errorf("the candidate's key, overwritten, is still there: %s", out)
	}
}
