//go:build linux

package scenario_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

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

// queue is what etcd has of the election: keys, leases and create revisions.
func (tr *trial) queue() string {
	tr.Helper()
	keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", tr.election+"/", "-w", "fields")
	tr.must(err)
	_, keys, _ = strings.Cut(keys, `"Key"`) // the header has etcd's revision
	return keys
}

// sameJob fails unless all that ever ran of the election is this job, and runs.
func (tr *trial) sameJob(job harness.Life) {
	tr.Helper()
	for _, l := range tr.witness.Lives() {
		if l.Token != job.Token || l.Candidate != job.Candidate || !l.Alive() {
			tr.Errorf("another job, or one that has exited: %+v", l)
		}
	}
}

// outOfMemory has the kernel kill a candidate's elector for its memory.
func (tr *trial) outOfMemory(c *candidate) {
	tr.Helper()
	dir, err := os.MkdirTemp("/sys/fs/cgroup/memory", "e2e-")
	tr.must(err)
	tr.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), waitTimeout)
		defer cancel()
		if err := harness.Until(ctx, func() error { return os.Remove(dir) }); err != nil {
			tr.Error(err)
		}
	})
	write := func(file, text string) {
		tr.must(os.WriteFile(filepath.Join(dir, file), []byte(text), 0))
	}
	write("memory.limit_in_bytes", "64k") // for what it asks for from now on
	elector, err := c.Elector()
	tr.must(err)
	write("cgroup.procs", strconv.Itoa(elector))
}

// TestReplaced: an elector that is killed, crashes or hangs is replaced. The leader's job runs on
// in the same term, under the same lease, and the standby keeps its place.
func TestReplaced(t *testing.T) {
	t.Parallel()
	signalled := func(sig syscall.Signal) func(*trial, *candidate) {
		return func(tr *trial, c *candidate) { tr.must(c.signalElector(sig)) }
	}
	ways := []struct {
		name string
		lose func(*trial, *candidate)
	}{
		{"killed", signalled(syscall.SIGKILL)},
		{"hung", signalled(syscall.SIGSTOP)},
		{"crashed", signalled(syscall.SIGABRT)}, // it writes the stacks of all goroutines first
		{"out of memory", (*trial).outOfMemory},
	}
	for _, u := range users() {
		for _, way := range ways {
			t.Run(u.name+"/"+way.name, func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = 5 * time.Second
				leader, standby, job := tr.pair("")
				third := tr.start("c", "")
				tr.waitStatus(third, "/standby", http.StatusOK)
				before, queue := tr.status(leader), tr.queue()
				for _, c := range []*candidate{leader, standby} {
					began := time.Now()
					way.lose(tr, c)
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
				tr.sameJob(job)
				if now := tr.queue(); now != queue {
					t.Errorf("the queue was %s, and is %s", queue, now)
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
	t.Parallel()
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

// TestReplaced_TLSAndAuth: the next elector gets the certificates and the token. To check the
// password would take etcd 79 ms, each time.
func TestReplaced_TLSAndAuth(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		name      string
		tls, auth bool
	}{{"tls", true, false}, {"auth", false, true}, {"both", true, true}} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			dir, err := harness.TempDir("leasehold-certs-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			var cluster harness.ClusterConfig
			var env []string
			if row.tls {
				if cluster.TLS, err = harness.NewCerts(dir); err != nil {
					t.Fatal(err)
				}
				env = []string{
					"LEASEHOLD_TLS_CA_FILE=" + cluster.TLS.CAFile,
					"LEASEHOLD_TLS_CERT_FILE=" + cluster.TLS.ClientCertFile,
					"LEASEHOLD_TLS_KEY_FILE=" + cluster.TLS.ClientKeyFile,
				}
			}
			tr := newTrial(t, users()[1], cluster)
			tr.ttl = 5 * time.Second
			with := []change{variables(env...)}
			if row.auth {
				with = append(with, tr.enableAuth())
			}
			leader := tr.start("a", "", with...)
			job := tr.waitJob(leader)
			standby := tr.start("b", "", with...)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			before, err := tr.etcd.Members[0].Metric(tr.ctx, authentications)
			tr.must(err)
			for _, c := range []*candidate{leader, standby} {
				tr.lastElector(c)
				tr.waitRenewals(c, 2)
			}
			after, err := tr.etcd.Members[0].Metric(tr.ctx, authentications)
			tr.must(err)
			if after != before || row.auth && before == 0 {
				t.Errorf("%v authentications before, %v after", before, after)
			}
			tr.waitStatus(leader, "/leader", http.StatusOK)
			tr.waitStatus(standby, "/standby", http.StatusOK)
			tr.sameJob(job)
			tr.finish()
		})
	}
}

// TestReplaced_Stopping: a stop that is under way goes on. It takes no longer than its grace, and
// the daemon exits as if nothing had happened.
func TestReplaced_Stopping(t *testing.T) {
	t.Parallel()
	const grace = 3 * time.Second
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			leader, standby, job := tr.pair("ignore-term",
				variables("LEASEHOLD_STOP_GRACE="+grace.String()))
			tr.waitStatus(leader, "/leader", http.StatusOK)
			began := harness.Now()
			tr.must(leader.Signal(syscall.SIGTERM))
			tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
			tr.must(leader.signalElector(syscall.SIGKILL))
			tr.waitReplaced(leader, 1)
			tr.waitRenewals(leader, 1)
			if s := tr.status(leader); s.Job.State != "stopping" {
				t.Errorf("the job is %s", s.Job.State)
			}
			took := tr.waitDead(job) - began
			if took < grace-100*time.Millisecond || took > grace+time.Second {
				t.Errorf("the job was dead %v after SIGTERM, want %v", took, grace)
			}
			if next := tr.waitNext(job, soon); next.Candidate != standby.Identity {
				t.Errorf("%s leads, want %s", next.Candidate, standby.Identity)
			}
			tr.waitExit(leader, 0)
			tr.finish()
		})
	}
}

// TestReplaced_Unreachable: the deadlines of the job do not wait for an elector that cannot reach
// etcd, and it does not move them.
func TestReplaced_Unreachable(t *testing.T) {
	t.Parallel()
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			tr.ttl = 5 * time.Second
			leader, standby, job := tr.pair("ignore-term")
			tr.waitRenewals(leader, 2)
			leader.SetReachable(false)
			asked := harness.Now() // the answer is of a moment between this
			valid := time.Duration(tr.status(leader).Lease.ValidFor * float64(time.Second))
			answered := harness.Now() // and this
			killBy := valid - tr.ttl/10
			tr.must(leader.signalElector(syscall.SIGKILL))
			tr.waitReplaced(leader, 1)
			if died := tr.waitDead(job); died < asked+killBy-100*time.Millisecond ||
				died > answered+killBy+tr.ttl/10 {
				t.Errorf("the job was dead %v after kill-by", died-asked-killBy)
			}
			if next := tr.waitNext(job, waitTimeout); next.Candidate != standby.Identity {
				t.Errorf("%s leads, want %s", next.Candidate, standby.Identity)
			}
			leader.SetReachable(true)
			tr.waitStatus(leader, "/standby", http.StatusOK)
			tr.finish()
		})
	}
}

// TestReplaced_Probes: nobody who asks is refused through fifty replacements. The guard holds the
// socket, and who connects meanwhile is answered by the next elector. Only a request that an
// elector had accepted when it was killed may be lost with it.
func TestReplaced_Probes(t *testing.T) {
	if testing.Short() {
		t.Skip("takes half a minute")
	}
	const daemons, each = 25, 2 // at the third the guard gives up
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	tr.ttl = 30 * time.Second
	var asked, lost atomic.Int64
	ctx, stop := context.WithCancel(tr.ctx)
	defer stop()
	var clients sync.WaitGroup
	ask := func(c *candidate) {
		once := &http.Client{
			Timeout:   waitTimeout,
			Transport: &http.Transport{DisableKeepAlives: true}, // a connection each time
		}
		for ctx.Err() == nil {
			resp, err := once.Get("http://" + c.Listen + "/livez")
			asked.Add(1)
			switch {
			case errors.Is(err, syscall.ECONNREFUSED):
				t.Errorf("%s: %v", c.Identity, err)
			case err != nil:
				lost.Add(1)
			case resp.StatusCode != http.StatusOK:
				t.Errorf("%s: %s", c.Identity, resp.Status)
			}
			if err == nil {
				_ = resp.Body.Close()
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	var all []*candidate
	for n := range daemons {
		c := tr.start(fmt.Sprintf("c%d", n), "")
		tr.waitStatus(c, "/readyz", http.StatusOK)
		all = append(all, c)
	}
	job := tr.waitJob(all[0])
	for _, c := range all {
		clients.Go(func() { ask(c) })
	}
	for _, c := range all {
		tr.lastElector(c)
	}
	for _, c := range all {
		tr.waitStatus(c, "/readyz", http.StatusOK)
	}
	stop()
	clients.Wait()
	t.Logf("%d requests, %d lost with their elector", asked.Load(), lost.Load())
	if lost.Load() > daemons*each {
		t.Error("more were lost than electors were killed")
	}
	tr.sameJob(job)
	tr.finish()
}
