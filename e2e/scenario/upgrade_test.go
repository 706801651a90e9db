//go:build linux

package scenario_test

import (
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// TestUntouched_Upgrade: etcd is upgraded member by member, from $ETCD_BEFORE to the etcd under
// test, and led by members of both. The job has one life through it.
func TestUntouched_Upgrade(t *testing.T) {
	before := os.Getenv("ETCD_BEFORE")
	if before == "" {
		t.Skip("skipped: $ETCD_BEFORE names no etcd to upgrade from (make test-etcd-versions)")
	}
	t.Parallel()
	etcd, err := harness.FindEtcd(t.Context(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	after := etcd.Server
	etcd.Server = before
	tr := newTrial(t, users()[1], harness.ClusterConfig{Etcd: etcd, Size: 3})
	tr.ttl = 5 * time.Second
	tr.must(tr.etcd.WaitVersion(tr.ctx, clusterVersion(t, before)))
	leader, standby, job := tr.pair("")
	for i, m := range tr.etcd.Members {
		tr.must(m.Upgrade(tr.ctx, after))
		tr.waitRenewals(leader, 2)
		if i < 2 { // members of both versions lead etcd
			for _, to := range []*harness.Member{m, tr.etcd.Members[2]} {
				tr.must(tr.etcd.MoveLeader(tr.ctx, to))
				tr.waitRenewals(leader, 2)
			}
		}
	}
	tr.must(tr.etcd.WaitVersion(tr.ctx, clusterVersion(t, after)))
	tr.waitRenewals(leader, 2)
	lives := tr.witness.Lives()
	if len(lives) != 1 || !lives[0].Alive() || lives[0].Pid != job.Pid {
		t.Fatalf("the job was moved: %v", tr.summary())
	}
	tr.waitStatus(leader, "/leader", http.StatusOK)
	tr.must(leader.Stop())
	tr.waitExit(leader, 0)
	if next := tr.waitNext(job, waitTimeout); next.Candidate != standby.Identity {
		t.Errorf("the next job is %v, want that of %s", next, standby.Identity)
	}
	tr.finish()
}

// clusterVersion is what the members of a cluster of this etcd agree on.
func clusterVersion(t *testing.T, server string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), server, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	minor := regexp.MustCompile(`\d+\.\d+`).Find(out)
	return string(minor) + ".0"
}
