//go:build linux

package scenario_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// Nothing can keep two jobs apart when an operator takes the key or the lease
// away: the next leader is told at the same moment. The old job must be dead
// almost at once all the same, and the next one must come.
func TestLost_ByAnOperator(t *testing.T) {
	t.Parallel()
	losses := []struct {
		name   string
		args   func(s status) []string
		reason string
		within time.Duration // the next job starts
	}{
		{"key deleted", func(s status) []string {
			return []string{"del", s.Leader.Key}
		}, "key_deleted", soon},
		{"lease revoked", func(s status) []string {
			return []string{"lease", "revoke", s.Lease.ID}
		}, "", soon},
		// The leader's own reads show that, and the key goes once the job has exited.
		{"key overwritten", func(s status) []string {
			return []string{"put", s.Leader.Key, "somebody"}
		}, "key_overwritten", waitTimeout},
	}
	for _, u := range users() {
		for _, l := range losses {
			for _, behaviour := range []string{"", "ignore-term"} {
				t.Run(fmt.Sprintf("%s/%s/%s", u.name, l.name, behaviour), func(t *testing.T) {
					t.Parallel()
					tr := newTrial(t, u, harness.ClusterConfig{})
					leader, standby, job := tr.pair(behaviour)
					_, err := tr.etcd.Etcdctl(tr.ctx, l.args(tr.status(leader))...)
					tr.must(err)
					next := tr.waitNext(job, l.within)
					end := tr.waitDead(job)
					if late := end - next.Started; late > time.Second {
						t.Errorf("the old job died %v after the next one's start", late)
					} else {
						t.Logf("the old job died %v after the next one's start", late)
					}
					tr.waitStatus(leader, "/standby", http.StatusOK)
					losses := fmt.Sprintf("leasehold_losses_total{reason=%q", l.reason)
					n, err := leader.Metric(tr.ctx, losses)
					if l.reason != "" && (err != nil || n != 1) {
						t.Errorf("losses because of %s: %v, %v", l.reason, n, err)
					}
					tr.must(standby.Signal(syscall.SIGTERM))
					if again := tr.waitNext(next, waitTimeout); again.Candidate != leader.Identity {
						t.Errorf("the job runs on %s, want %s again",
							again.Candidate, leader.Identity)
					}
					tr.finish()
				})
			}
		}
	}
}

// The exec of a job can hang (a file system that doesn't answer). If it comes
// back after the deadline, the job must not have a life.
func TestNeverTwoJobs_ExecHangsPastTheDeadline(t *testing.T) {
	t.Parallel()
	hang := func(
		t *testing.T, u user, change func(tr *trial, cfg *harness.CandidateConfig),
		hung func(tr *trial, c *candidate) (release func()),
	) {
		neverTwo(t, func(t *testing.T) *trial {
			tr := newTrial(t, u, harness.ClusterConfig{})
			first := tr.start("a", "")
			job := tr.waitJob(first)
			second := tr.start("b", "", func(cfg *harness.CandidateConfig) {
				if change != nil {
					change(tr, cfg)
				}
			})
			tr.waitStatus(second, "/standby", http.StatusOK)
			release := hung(tr, second)
			tr.must(first.Signal(syscall.SIGTERM))
			tr.waitDead(job)
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if s := tr.status(second); s.State != "leading" {
					return fmt.Errorf("candidate b is %s", s.State)
				}
				return nil
			}))
			third := tr.start("c", "")
			tr.waitStatus(third, "/standby", http.StatusOK)
			second.SetReachable(false)
			next := tr.waitNext(job, waitTimeout)
			if next.Candidate != "c" {
				t.Errorf("the next job is of %s, want c", next.Candidate)
			}
			release()
			second.SetReachable(true)
			tr.waitStatus(second, "/standby", http.StatusOK)
			for _, l := range tr.witness.Lives() {
				if l.Candidate == "b" {
					t.Errorf("the job of b had a life after its deadline: %+v", l)
				}
			}
			tr.finish()
			return tr
		})
	}

	t.Run("frozen cgroup", func(t *testing.T) {
		t.Parallel()
		hang(t, user{name: "root", root: true}, nil, func(tr *trial, c *candidate) func() {
			var freeze string
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				dir, err := c.jobCgroup()
				freeze = filepath.Join(dir, "cgroup.freeze")
				return err
			}))
			tr.must(os.WriteFile(freeze, []byte("1"), 0))
			return func() { _ = os.WriteFile(freeze, []byte("0"), 0) } // the cgroup may be gone
		})
	})

	// open, and so execve, of a file waits while another process holds a write
	// lease on it, for /proc/sys/fs/lease-break-time (45 s).
	for _, u := range users() {
		t.Run("file lease/"+u.name, func(t *testing.T) {
			t.Parallel()
			var path string
			hang(t, u, func(tr *trial, cfg *harness.CandidateConfig) {
				dir, err := harness.TempDir("leasehold-hang-")
				tr.must(err)
				tr.Cleanup(func() { _ = os.RemoveAll(dir) })
				program, err := os.ReadFile(cfg.Job[0])
				tr.must(err)
				path = filepath.Join(dir, "testjob")
				tr.must(os.WriteFile(path, program, 0o755))
				cfg.Job[0] = path
			}, func(tr *trial, _ *candidate) func() {
				file, err := os.OpenFile(path, os.O_RDWR, 0)
				tr.must(err)
				tr.Cleanup(func() { _ = file.Close() }) // closing gives the lease up
				// Another test that forks at this moment holds the file for an instant.
				tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
					_, err := unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
					return err
				}))
				return func() { _ = file.Close() }
			})
		})
	}
}

// TestNothingLeft: whatever way a daemon ends, no lease and no key stays, with
// a TTL so long that none can have run out.
func TestNothingLeft(t *testing.T) {
	t.Parallel()
	ends := []struct {
		name string
		code int
		do   func(tr *trial, c *candidate)
	}{
		{"SIGTERM", 0, func(tr *trial, c *candidate) { tr.must(c.Signal(syscall.SIGTERM)) }},
		{"SIGINT", 0, func(tr *trial, c *candidate) { tr.must(c.Signal(syscall.SIGINT)) }},
		{"two SIGTERM", 0, func(tr *trial, c *candidate) {
			tr.must(errors.Join(c.Signal(syscall.SIGTERM), c.Signal(syscall.SIGTERM)))
		}},
		{"guard killed", 128 + 9, func(tr *trial, c *candidate) {
			tr.must(c.Signal(syscall.SIGKILL))
		}},
		{"electors killed", 70, func(tr *trial, c *candidate) { tr.loseElectors(c) }},
	}
	for _, u := range users() {
		for _, end := range ends {
			t.Run(u.name+"/"+end.name, func(t *testing.T) {
				t.Parallel()
				tr := newTrial(t, u, harness.ClusterConfig{})
				tr.ttl = time.Minute
				leader, standby, job := tr.pair("ignore-term")
				end.do(tr, standby)
				tr.waitExit(standby, end.code)
				tr.must(harness.Until(tr.waitContext(revokeTimeout), func() error {
					leases, err := tr.etcd.Leases(tr.ctx)
					if err == nil && len(leases) != 1 {
						err = fmt.Errorf("leases %q, want the leader's alone", leases)
					}
					return err
				}))
				end.do(tr, leader)
				tr.waitExit(leader, end.code)
				tr.waitDead(job)
				tr.nothingLeft()
			})
		}
	}
}

// While the daemon is cut off, /leader says no from stop-at on, and never while
// another leads.
func TestLeaderEndpoint_TurnsAtStopAt(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	tr.ttl = 10 * time.Second
	leader, standby, job := tr.pair("ignore-term")
	tr.waitStatus(leader, "/leader", http.StatusOK)
	tr.waitRenewals(leader, 1)
	leader.SetReachable(false)
	cut := harness.Now()
	tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
	turned := harness.Now()
	// s is at most TTL/5 before the cut, and stop-at is TTL - margin - loss grace after s.
	const (
		margin    = time.Second
		lossGrace = 2 * time.Second
		renewal   = 2 * time.Second
		slack     = margin - 100*time.Millisecond // of this test: it asks now and then
	)
	stopAt := tr.ttl - margin - lossGrace
	if late := turned - (cut + stopAt); late > slack {
		t.Errorf("/leader turned %v later than stop-at can have been", late)
	}
	if early := cut + stopAt - renewal - turned; early > slack {
		t.Errorf("/leader turned %v earlier than stop-at can have been", early)
	}
	if terms := check.NewHistory(tr.witness.Lives()); terms[0].End != 0 {
		t.Error("the job, which ignores SIGTERM, died before its loss grace was over")
	}
	end := tr.waitDead(job)
	if killed := end - turned; killed > lossGrace+slack {
		t.Errorf("the job died %v after stop-at, want %v", killed, lossGrace)
	}
	tr.waitNext(job, waitTimeout)
	tr.waitStatus(standby, "/leader", http.StatusOK)
	if code, _, err := leader.Get(tr.ctx, "/leader"); code != http.StatusServiceUnavailable {
		t.Errorf("/leader of the old leader: %d, %v", code, err)
	}
	leader.SetReachable(true)
	tr.waitStatus(leader, "/standby", http.StatusOK)
	tr.finish()
}

// etcdctl's elect is a candidate like any other, and sees leasehold as one.
func TestInterop_EtcdctlElect(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	leader := tr.start("a", "")
	job := tr.waitJob(leader)

	listen := func() (out string, err error) {
		// It goes on until the time-out. On a busy machine it says nothing in a second.
		for wait := time.Second; out == "" && wait < waitTimeout; wait *= 2 {
			ctx, cancel := context.WithTimeout(tr.ctx, wait)
			out, err = tr.etcd.Etcdctl(ctx, "elect", "--listen", tr.election)
			cancel()
		}
		if out != "" {
			err = nil // it was ended by the time-out, after it had said who leads
		}
		return out, err
	}
	out, err := listen()
	tr.must(err)
	if want := tr.status(leader).Leader.Key + "\n" + leader.Identity + "\n"; out != want {
		t.Errorf("etcdctl elect --listen prints %q, want %q", out, want)
	}

	other := tr.etcd.EtcdctlCommand(tr.etcd.Endpoints(), "elect", tr.election, "other")
	says, err := other.StdoutPipe()
	tr.must(err)
	tr.must(other.Start())
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		keys, err := tr.etcd.Etcdctl(tr.ctx,
			"get", "--prefix", "--sort-by=create", "--print-value-only", tr.election)
		if err == nil && keys != "a\nother\n" {
			err = fmt.Errorf("candidates %q", keys)
		}
		return err
	}))
	second := tr.start("b", "")
	tr.waitStatus(second, "/standby", http.StatusOK)
	tr.must(leader.Signal(syscall.SIGTERM))
	tr.waitExit(leader, 0)
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if s := tr.status(second); s.Name != "other" {
			return fmt.Errorf("candidate b says that %q leads", s.Name)
		}
		return nil
	}))
	// Before it knows that it leads, it would leave its key behind.
	_, err = bufio.NewReader(says).ReadString('\n')
	tr.must(err)
	tr.must(other.Process.Signal(os.Interrupt))
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("the next job is of %s, want b", next.Candidate)
	}
	_ = other.Wait()
	tr.stop() // etcdctl leaves leases behind, so that there is nothing to be said of leasehold's
}

// What others wrote below the election's prefix never crashes a candidate, and
// is named where it blocks one for ever.
func TestForeignKeys(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	huge := make([]byte, 60<<10) // the longest argument that a command takes is 128 KiB
	for i := range huge {
		huge[i] = 'x'
	}
	for key, value := range map[string]string{
		"/zzz": "not a lease id", "/": "", "/binary": "\x01\xff\xfe", "/huge": string(huge),
		"/deeper/1234abcd": "a nested election", "x/1": "another election with the same beginning",
	} {
		_, err := tr.etcd.Etcdctl(tr.ctx, "put", "--", tr.election+key, value)
		tr.must(err)
	}
	c := tr.start("a", "")
	tr.waitStatus(c, "/livez", http.StatusOK)
	var blocker string
	for range 5 { // each of them is named, one after the other
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			s := tr.status(c)
			if s.Blocker == nil || s.Blocker.Key == blocker {
				return fmt.Errorf("no new blocker: %+v", s)
			}
			blocker = s.Blocker.Key
			return nil
		}))
		if code, _, err := c.Get(tr.ctx, "/livez"); code != http.StatusOK {
			t.Errorf("/livez: %d, %v", code, err)
		}
		deleted, err := tr.etcd.Etcdctl(tr.ctx, "del", blocker)
		tr.must(err)
		if deleted != "1\n" {
			t.Fatalf("etcdctl has deleted %q of %s", deleted, blocker)
		}
	}
	tr.waitJob(c)
	var s map[string]json.RawMessage
	_, body, err := c.Get(tr.ctx, "/status")
	tr.must(err)
	tr.must(json.Unmarshal([]byte(body), &s))
	if string(s["blocker"]) != "null" {
		t.Errorf("blocker while leading: %s", s["blocker"])
	}
	tr.must(c.Signal(syscall.SIGTERM))
	tr.waitExit(c, 0)
}

// TestElect_KeyOverwritten: the key keeps all others waiting until it is removed.
// So whoever asks has the time to stop.
func TestElect_KeyOverwritten(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	a := tr.start("a", "", subcommand("elect"))
	tr.waitStatus(a, "/leader", http.StatusOK)
	b := tr.start("b", "", subcommand("elect"))
	tr.waitStatus(b, "/standby", http.StatusOK)
	key := tr.status(a).Leader.Key
	_, err := tr.etcd.Etcdctl(tr.ctx, "put", key, "x")
	tr.must(err)
	tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
	turned := harness.Now()
	tr.waitStatus(b, "/leader", http.StatusOK)
	const lossGrace = time.Second // a fifth of the TTL
	if gap := harness.Now() - turned; gap < lossGrace*9/10 {
		t.Errorf("the next one leads %v after /leader turned, want %v at least", gap, lossGrace)
	}
	tr.finish()
}
