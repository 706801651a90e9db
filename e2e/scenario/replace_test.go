//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/harness"
)

// waitReplaced waits until n electors of a candidate were replaced.
func (tr *trial) waitReplaced(c *candidate, n float64) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		got, err := c.Metric(tr.ctx, "leasehold_elector_replacements_total")
		if err == nil && got != n {
			err = fmt.Errorf("%v electors of %s were replaced, want %v", got, c.Identity, n)
		}
		return err
	}))
}

// lastElector kills as many electors of a candidate as its guard replaces within a minute.
func (tr *trial) lastElector(c *candidate) {
	tr.Helper()
	for n := range 2 {
		tr.must(c.signalElector(syscall.SIGKILL))
		tr.waitReplaced(c, float64(n+1))
	}
}

// loseElectors kills one more: the guard gives up.
func (tr *trial) loseElectors(c *candidate) {
	tr.Helper()
	tr.lastElector(c)
	tr.must(c.signalElector(syscall.SIGKILL))
}

// TestReplaced: an elector that is killed or hangs is replaced. The leader's job runs on in the
// same term, under the same lease, and the standby keeps its place.
func TestReplaced(t *testing.T) {
	for _, u := range users() {
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
			t.Run(u.name+"/"+unix.SignalName(sig), func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = 5 * time.Second
				leader, standby, job := tr.pair("")
				third := tr.start("c", "")
				tr.waitStatus(third, "/standby", http.StatusOK)
				before := tr.status(leader)
				for _, c := range []*candidate{leader, standby} {
					began := time.Now()
					tr.must(c.signalElector(sig))
					tr.waitReplaced(c, 1)
					tr.waitRenewals(c, 2)
					t.Logf("the elector of %s is replaced, and has renewed twice, after %v",
						c.Identity, time.Since(began))
				}
				after := tr.status(leader)
				tr.waitStatus(leader, "/leader", http.StatusOK)
				switch {
				case after.Leader == nil || after.Lease == nil || after.Job.PID == nil:
					t.Fatalf("%+v", after)
				case *after.Leader != *before.Leader, after.Lease.ID != before.Lease.ID,
					*after.Job.PID != *before.Job.PID, after.Job.State != "running":
					t.Errorf("before %+v of %+v, after %+v of %+v",
						before.Job, before.Leader, after.Job, after.Leader)
				}
				for _, l := range tr.witness.Lives() {
					if l.Token != job.Token || !l.Alive() {
						t.Errorf("another job, or one that has exited: %+v", l)
					}
				}
				tr.must(leader.Signal(syscall.SIGTERM))
				next := tr.waitNext(job, soon)
				if next.Candidate != standby.Identity {
					t.Errorf("%s leads, want %s", next.Candidate, standby.Identity)
				}
				tr.waitExit(leader, 0)
				tr.finish()
			})
		}
	}
}

// TestReplaced_TooOften: at the third within a minute the daemon gives up, and another one leads.
func TestReplaced_TooOften(t *testing.T) {
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			leader, standby, job := tr.pair("")
			tr.loseElectors(leader)
			if next := tr.waitNext(job, soon); next.Candidate != standby.Identity {
				t.Errorf("%s leads, want %s", next.Candidate, standby.Identity)
			}
			tr.waitExit(leader, 70)
			tr.finish()
		})
	}
}
