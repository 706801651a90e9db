//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/fault"
	"leasehold/e2e/harness"
)

// root is who may make a cgroup for the job.
func root() user { return users()[0] }

// freezes has a daemon freeze its job on loss of contact, and not stop it.
var freezes = variables("LEASEHOLD_CONTACT_LOSS=freeze")

// heartbeat has the job's processes tell the witness that they run.
const heartbeat = "heartbeat=5ms"

// stopEtcd kills all members of etcd, and returns what starts them again with what they knew.
func (tr *trial) stopEtcd() (start func()) {
	tr.Helper()
	for _, m := range tr.etcd.Members {
		m.Kill()
	}
	return func() {
		tr.Helper()
		for _, m := range tr.etcd.Members {
			tr.must(m.Start())
		}
		tr.must(tr.etcd.WaitHealthy(tr.waitContext(waitTimeout)))
	}
}

// waitJobState waits until the job of a candidate is in a state.
func (tr *trial) waitJobState(c *candidate, state string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if is := tr.status(c).Job.State; is != state {
			return fmt.Errorf("the job of %s is %s, not %s", c.Identity, is, state)
		}
		return nil
	}))
}

// now is what the witness knows by now of a process.
func (tr *trial) now(l harness.Life) harness.Life {
	tr.Helper()
	for _, now := range tr.witness.Lives() {
		if now.Pid == l.Pid && now.Started == l.Started {
			return now
		}
	}
	tr.Fatalf("the witness has forgotten %+v", l)
	return l
}

// frozen is what cgroup.events says of a candidate's job.
func (tr *trial) frozen(c *candidate) bool {
	tr.Helper()
	dir, err := c.jobCgroup()
	tr.must(err)
	events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	tr.must(err)
	return strings.Contains(string(events), "frozen 1")
}

// twoTTLs waits until two TTLs after a moment.
func (tr *trial) twoTTLs(after time.Duration) {
	tr.Helper()
	tr.must(harness.Wait(tr.ctx, after+2*tr.ttl-harness.Now()))
}

// TestFreeze_EtcdStopped: all of etcd stops for two TTLs and starts again. That is one life of the
// job, in one term. It runs no instruction while it is frozen.
func TestFreeze_EtcdStopped(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	leader, standby, job := tr.pair(heartbeat, freezes)
	before, queue := tr.status(leader), tr.queue()
	stopped := harness.Now()
	start := tr.stopEtcd()
	tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
	tr.waitJobState(leader, "frozen")
	from := harness.Now()
	if s := tr.status(leader); s.State != "suspended" || *s.Job.PID != *before.Job.PID {
		t.Errorf("while the job is frozen: %+v", s)
	}
	tr.waitStatus(leader, "/readyz", http.StatusServiceUnavailable)
	tr.twoTTLs(stopped)
	if !tr.frozen(leader) || !tr.alive(job) {
		t.Fatal("the job is not frozen any more")
	}
	to := harness.Now()
	start()
	tr.waitStatus(leader, "/leader", http.StatusOK)
	tr.ran(job, from, to)
	after := tr.status(leader)
	if *after.Leader != *before.Leader || after.Lease.ID != before.Lease.ID ||
		*after.Job.PID != *before.Job.PID || after.Job.State != "running" ||
		after.Job.Restarts != 0 || after.State != "leading" {
		t.Errorf("before %+v, after %+v", before, after)
	}
	tr.waitStatus(standby, "/standby", http.StatusOK)
	tr.sameJob(job)
	if now := tr.queue(); now != queue {
		t.Errorf("the queue was %s, and is %s", queue, now)
	}
	tr.finish()
}

// hangEtcd has all members of etcd hang (SIGSTOP), and returns what ends that.
func (tr *trial) hangEtcd() (resume func()) {
	tr.Helper()
	for _, m := range tr.etcd.Members {
		tr.must(m.Pause())
	}
	return func() {
		tr.Helper()
		for _, m := range tr.etcd.Members {
			tr.must(m.Continue())
		}
	}
}

// TestFreeze_EtcdHangs: all of etcd hangs. For less than a TTL that is one life of the job. A
// reload is refused meanwhile. After two TTLs etcd expires the lease as soon as it goes on: the
// frozen job is killed without having run again, and the next one has another token.
func TestFreeze_EtcdHangs(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{Size: 3})
	tr.ttl = 5 * time.Second
	reloadPrograms(t) // to build them takes longer than etcd may hang
	leader, standby, job := tr.pair(heartbeat, freezes)
	before := tr.status(leader)
	elector, err := leader.Elector()
	tr.must(err)
	resume := tr.hangEtcd()
	tr.waitJobState(leader, "frozen")
	from := harness.Now()
	code, said := tr.reload(0, strconv.Itoa(leader.Guard()))
	if code != 1 || !strings.Contains(said, "the job is frozen: try again when it runs") {
		t.Errorf("reload: %d, %q", code, said)
	}
	to := harness.Now()
	resume()
	tr.waitStatus(leader, "/leader", http.StatusOK)
	tr.ran(job, from, to)
	tr.sameJob(job)
	if after := tr.status(leader); *after.Leader != *before.Leader ||
		after.Lease.ID != before.Lease.ID || *after.Job.PID != *before.Job.PID {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if again, err := leader.Elector(); err != nil || again != elector {
		t.Errorf("the elector was %d, and is %d, %v", elector, again, err)
	}

	f := frozenPair{leader: leader, standby: standby, job: job}
	hung := harness.Now()
	resume = tr.hangEtcd()
	tr.waitJobState(leader, "frozen")
	f.since = harness.Now()
	tr.twoTTLs(hung)
	if !tr.frozen(leader) || !tr.alive(job) {
		t.Fatal("the job is not frozen any more")
	}
	resume()
	tr.waitNext(job, waitTimeout)
	tr.neverThawed(f)
	tr.finish()
}

// frozenPair is a pair whose leader has lost contact with etcd, so that its job is frozen. recover
// ends that. since is a moment after the freeze.
func (tr *trial) frozenPair(behaviour string) (f frozenPair) {
	tr.Helper()
	f.leader, f.standby, f.job = tr.pair(heartbeat+" "+behaviour, freezes)
	f.recover = tr.inject(fault.Unreachable(), f.leader)
	tr.waitJobState(f.leader, "frozen")
	f.since = harness.Now()
	return f
}

type frozenPair struct {
	leader, standby *candidate
	job             harness.Life
	recover         func()
	since           time.Duration
}

// neverThawed fails unless the job was killed without having run again, and no other ran beside it.
// It is frozen, or has been killed, since f.since. Until then it counts as running.
func (tr *trial) neverThawed(f frozenPair) {
	tr.Helper()
	tr.waitDead(f.job)
	lives := tr.witness.Lives()
	for i, l := range lives {
		if l.Token != f.job.Token || l.Candidate != f.job.Candidate {
			continue
		}
		for _, at := range l.Heartbeats {
			if at > f.since {
				tr.Errorf("the job ran %v after it was frozen", at-f.since)
			}
		}
		lives[i].End = min(l.End, f.since)
	}
	if both := check.Overlaps(lives); len(both) > 0 {
		tr.Error(both)
	}
}

// TestFreeze_AnotherLeads: the lease expires while the job is frozen, and another candidate is
// elected. When the first one reaches etcd again, its job is killed, and never thawed.
func TestFreeze_AnotherLeads(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	f := tr.frozenPair("")
	next := tr.waitNext(f.job, waitTimeout)
	time.Sleep(tr.ttl) // both for a while
	if !tr.alive(f.job) || !tr.frozen(f.leader) {
		t.Error("the job is not frozen any more, and nobody knows whether the lease is lost")
	}
	f.recover()
	tr.neverThawed(f)
	tr.waitStatus(f.leader, "/standby", http.StatusOK)
	waitLogged(tr, f.leader, "job killed: lease lost")
	tr.sameLeader(f.standby, next)
	tr.finish()
}

// sameLeader fails unless the candidate leads with that job.
func (tr *trial) sameLeader(c *candidate, job harness.Life) {
	tr.Helper()
	tr.waitStatus(c, "/leader", http.StatusOK)
	if s := tr.status(c); s.Leader.Token != job.Token {
		tr.Errorf("%s leads with token %d, and its job has %d",
			c.Identity, s.Leader.Token, job.Token)
	}
}

// TestFreeze_KeyDeleted: somebody deletes the key while the job is frozen. The lease lives.
func TestFreeze_KeyDeleted(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 10 * time.Second
	f := tr.frozenPair("")
	_, err := tr.etcd.Etcdctl(tr.ctx, "del", tr.status(f.leader).Leader.Key)
	tr.must(err)
	tr.waitNext(f.job, soon)
	f.recover()
	tr.neverThawed(f)
	tr.waitStatus(f.leader, "/standby", http.StatusOK)
	tr.finish()
}

// TestFreeze_Stopped: the user ends the daemon while the job is frozen. The job can't act on a
// signal. It is killed at once, and never thawed.
func TestFreeze_Stopped(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	f := tr.frozenPair("ignore-term")
	asked := harness.Now()
	tr.must(f.leader.Signal(syscall.SIGTERM))
	tr.neverThawed(f)
	if took := tr.waitDead(f.job) - asked; took > soon {
		t.Errorf("the frozen job was killed %v after SIGTERM", took)
	}
	waitLogged(tr, f.leader, "job killed: asked to stop while it was frozen")
	tr.waitExit(f.leader, 0)
	f.recover()
	tr.waitNext(f.job, waitTimeout)
	tr.finish()
}

// TestFreeze_ProcessLost: one of the daemon's processes is lost while the job is frozen. If it is
// the elector, another one thaws the job when etcd answers. Else the job is killed frozen.
func TestFreeze_ProcessLost(t *testing.T) {
	for _, way := range []struct {
		process harness.Process
		signal  syscall.Signal
		code    int // of the daemon; -1: it lives
	}{
		{harness.Elector, syscall.SIGKILL, -1},
		{harness.Elector, syscall.SIGSTOP, -1},
		{harness.Guard, syscall.SIGKILL, 137},
		{harness.Guard, syscall.SIGSTOP, 137},
		{harness.Spawner, syscall.SIGKILL, 70},
	} {
		t.Run(fmt.Sprintf("%s %v", way.process, way.signal), func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, root(), harness.ClusterConfig{})
			tr.ttl = 5 * time.Second
			leader, standby, job := tr.pair(heartbeat, freezes)
			f := frozenPair{leader: leader, standby: standby, job: job}
			stopped := harness.Now()
			start := tr.stopEtcd()
			tr.waitJobState(leader, "frozen")
			f.since = harness.Now()
			pid, err := leader.Pid(way.process)
			tr.must(err)
			tr.must(syscall.Kill(pid, way.signal))
			if way.code < 0 {
				tr.waitReplaced(leader, 1)
				tr.waitJobState(leader, "frozen")
				tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
				tr.twoTTLs(stopped)
				to := harness.Now()
				start()
				tr.waitStatus(leader, "/leader", http.StatusOK)
				tr.ran(job, f.since, to)
				tr.sameJob(job)
				tr.finish()
				return
			}
			// Without etcd: nobody asks for it.
			tr.neverThawed(f)
			start()
			tr.waitExit(leader, way.code)
			tr.sameLeader(standby, tr.waitNext(job, waitTimeout))
			tr.finish()
		})
	}
}

// TestFreeze_NotInTime: a job of which a process runs on, or is in uninterruptible sleep, is not
// frozen. It is killed at kill-by, as one that does not stop.
func TestFreeze_NotInTime(t *testing.T) {
	for _, way := range []struct{ name, behaviour string }{
		{"uninterruptible sleep", ""},
		{"left its cgroup", "daemonize leave-cgroup"},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, root(), harness.ClusterConfig{})
			tr.ttl = 5 * time.Second
			f := frozenPair{}
			f.leader, f.standby, f.job = tr.pair(heartbeat+" "+way.behaviour, freezes)
			wake := func() {}
			if way.behaviour == "" {
				wake = sleepUninterruptibly(tr, f.job.Pid)
			} else {
				tr.waitRoles(f.job, "daemon")
			}
			f.recover = tr.inject(fault.Unreachable(), f.leader)
			waitLogged(tr, f.leader, "job is being frozen")
			killBy := harness.Now() + tr.ttl/5
			waitLogged(tr, f.leader, "to=killing reason=\"kill-by has passed\"")
			if late := harness.Now() - killBy; late > tr.ttl/10 || late < -tr.ttl/10 {
				t.Errorf("the job was killed %v after kill-by", late)
			}
			tr.waitNext(f.job, waitTimeout)
			wake()
			f.since = killBy + tr.ttl/10
			tr.neverThawed(f)
			f.recover()
			tr.waitStatus(f.leader, "/standby", http.StatusOK)
			tr.finish()
		})
	}
}

// TestFreeze_ThawedByOthers: somebody else thaws the job. It is killed at once.
func TestFreeze_ThawedByOthers(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	f := tr.frozenPair("")
	dir, err := f.leader.jobCgroup()
	tr.must(err)
	thawed := harness.Now()
	tr.must(os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte("0"), 0))
	if took := tr.waitDead(f.job) - thawed; took > soon {
		t.Errorf("the job was dead %v after somebody had thawed it", took)
	}
	waitLogged(tr, f.leader, "job killed: somebody else has thawed it")
	f.recover()
	tr.waitNext(f.job, waitTimeout)
	tr.finish()
}

// TestFreeze_Unkillable: a job that could not be frozen, and can't be killed, is no leader's job,
// although etcd answers again and renews the lease.
func TestFreeze_Unkillable(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	leader, standby, job := tr.pair(heartbeat, freezes)
	wake := sleepUninterruptibly(tr, job.Pid)
	stopped := harness.Now()
	start := tr.stopEtcd()
	waitLogged(tr, leader, "job could not be frozen in time")
	tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
	tr.twoTTLs(stopped)
	start()
	for range 3 {
		tr.waitRenewals(leader, 1)
		if s := tr.status(leader); s.State != "stopping" || s.Job.State != "stopping" {
			t.Errorf("the job can't be killed, and the candidate is %+v", s)
		}
		if code, body, err := leader.Get(tr.ctx, "/leader"); err != nil ||
			code != http.StatusServiceUnavailable {
			t.Errorf("/leader: %d %s %v", code, body, err)
		}
	}
	if !tr.alive(job) {
		t.Fatal("the job has exited")
	}
	wake()
	tr.sameLeader(standby, tr.waitNext(job, waitTimeout))
	if both := check.Overlaps(tr.witness.Lives()); len(both) > 0 {
		t.Error(both)
	}
	tr.finish()
}

// TestFreeze_Refused: a job without a cgroup can't be frozen. Where /proc hides processes, nobody
// knows whether one has left it. Both are known at the start.
func TestFreeze_Refused(t *testing.T) {
	for _, way := range []struct {
		name string
		user user
		with func(*trial, *harness.CandidateConfig)
		says string
	}{
		{"no cgroup", users()[1], func(*trial, *harness.CandidateConfig) {}, "cgroup"},
		{"hidepid", root(), func(tr *trial, cfg *harness.CandidateConfig) {
			tr.wrap(cfg, "unshare", "--mount", "sh", "-c",
				`mount -t proc -o hidepid=2 proc /proc && exec "$0" "$@"`)
		}, "hidepid"},
	} {
		t.Run(way.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, way.user, harness.ClusterConfig{})
			c := tr.start("a", "", freezes, func(cfg *harness.CandidateConfig) {
				way.with(tr, cfg)
			})
			tr.waitExit(c, 78)
			for _, text := range []string{
				"LEASEHOLD_CONTACT_LOSS=freeze", way.says, "Delegate=yes",
				"set LEASEHOLD_CONTACT_LOSS=stop",
			} {
				if log := c.Log(); !strings.Contains(log, text) {
					t.Errorf("without %q: %s", text, log)
				}
			}
			tr.nothingLeft()
		})
	}
}

// ran fails unless the job ran before and after an interval, and never within.
func (tr *trial) ran(job harness.Life, from, to time.Duration) {
	tr.Helper()
	tr.must(tr.witness.Wait(tr.waitContext(waitTimeout), func([]harness.Life) bool {
		beats := tr.now(job).Heartbeats
		return len(beats) > 0 && beats[len(beats)-1] > to
	}))
	ran := check.Interval{}
	for _, at := range tr.now(job).Heartbeats {
		switch {
		case at < from:
			ran.From = at
		case at > to && ran.To == 0:
			ran.To = at
		case at <= to:
			tr.Errorf("the job ran %v after it was frozen, and was thawed after %v",
				at-from, to-from)
		}
	}
	tr.Logf("frozen for %v", ran.Length())
}
