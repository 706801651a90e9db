//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/check"
	"leasehold/e2e/harness"
)

// expectCommand runs a subcommand that has to end with that code, and to say this.
func (tr *trial) expectCommand(code int, want string, args ...string) {
	tr.Helper()
	if got, said := tr.command(args...); got != code || !strings.Contains(said, want) {
		tr.Errorf("leasehold %q: %d, %s; want %d, %q", args, got, said, code, want)
	}
}

// untouched fails unless the job goes on, and waits for a renewal first.
func (tr *trial) untouched(c *candidate, job harness.Life) {
	tr.Helper()
	tr.waitRenewals(c, 1)
	lives := tr.witness.Lives()
	if last := lives[len(lives)-1]; last.Token != job.Token || !last.Alive() {
		tr.Errorf("the last job: %+v, want %+v", last, job)
	}
}

// noOverlap fails if two jobs ever lived at once.
func (tr *trial) noOverlap() {
	tr.Helper()
	for _, o := range check.Overlaps(tr.witness.Lives()) {
		if !tr.outside(o) {
			tr.Error(o)
		}
	}
}

// waitCandidates waits until etcd has the records of so many candidates.
func (tr *trial) waitCandidates(n int) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", "leasehold/v1/")
		if got := strings.Count(keys, "/candidates/"); err == nil && got != n {
			err = fmt.Errorf("%d records", got)
		}
		return err
	}))
}

// queue waits until the queue is this one, the leader first.
func (tr *trial) waitQueue(want string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		_, said := tr.command("status")
		var names []string
		for line := range strings.Lines(said) {
			if f := strings.Fields(line); len(f) == 7 && f[0] != "#" {
				names = append(names, f[1])
			}
		}
		if got := strings.Join(names, ""); got != want {
			return fmt.Errorf("the queue is %s, want %s", got, want)
		}
		return nil
	}))
}

func TestSwitchover(t *testing.T) {
	tr := ordinary(t)
	all, job := tr.startAll("abc")
	tr.waitCandidates(3)

	// To the next one.
	tr.expectCommand(0, `"b" leads, token `, "switchover")
	next := tr.waitNext(job, waitTimeout)
	if next.Candidate != "b" {
		t.Errorf("%s leads, want b", next.Candidate)
	}
	tr.waitQueue("bca") // who led queues again
	tr.untouched(all[1], next)

	// Refusals leave the job untouched.
	tr.expectCommand(1, `there is no candidate "x" that waits`, "switchover", "--to", "x")
	tr.commands("held", "hold")
	tr.expectCommand(1, "the election is held by ", "switchover")
	tr.commands("released", "release")
	tr.expectCommand(0, `"b" leads already`, "switchover", "--to", "b")
	tr.untouched(all[1], next)

	// Nobody waits.
	for _, c := range []*candidate{all[0], all[2]} {
		tr.must(c.Signal(syscall.SIGTERM))
		tr.waitExit(c, 0)
	}
	tr.expectCommand(1, "refused: nobody waits", "switchover")
	tr.untouched(all[1], next)
	tr.noOverlap()
	tr.finish()
}

// To a named one from the middle of a queue of five. Those ahead of it queue again, and so does who
// led.
func TestSwitchover_To(t *testing.T) {
	tr := ordinary(t)
	all, job := tr.startAll("abcde")
	tr.waitCandidates(5)
	tr.waitQueue("abcde")
	tr.expectCommand(0, `"d" leads, token `, "switchover", "--to", "d")
	next := tr.waitNext(job, waitTimeout)
	if next.Candidate != "d" {
		t.Errorf("%s leads, want d", next.Candidate)
	}
	for _, c := range all {
		tr.waitStatus(c, "/readyz", http.StatusOK)
	}
	tr.untouched(all[3], next)
	tr.noOverlap()
	tr.finish()
}

// A stubborn job gets its grace, and is killed.
func TestSwitchover_StubbornJob(t *testing.T) {
	tr := ordinary(t)
	a := tr.start("a", "ignore-term", variables("LEASEHOLD_STOP_GRACE=1s"))
	job := tr.waitJob(a)
	b := tr.start("b", "")
	tr.waitStatus(b, "/standby", http.StatusOK)
	began := harness.Now()
	tr.expectCommand(0, `"b" leads`, "switchover", "--to", "b")
	if took := tr.waitDead(job) - began; took < time.Second {
		t.Errorf("the job was killed after %v, and its grace is a second", took)
	}
	tr.waitNext(job, waitTimeout)
	tr.noOverlap()
	tr.finish()
}

// The target goes while the job stops: whoever is next leads.
func TestSwitchover_TargetDies(t *testing.T) {
	tr := ordinary(t)
	a := tr.start("a", "ignore-term", variables("LEASEHOLD_STOP_GRACE=3s"))
	job := tr.waitJob(a)
	b := tr.start("b", "")
	tr.waitStatus(b, "/standby", http.StatusOK)
	c := tr.start("c", "")
	tr.waitStatus(c, "/standby", http.StatusOK)
	tr.waitCandidates(3)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tr.expectCommand(1, `"c" has gone meanwhile: "b" leads`, "switchover", "--to", "c")
	}()
	tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
	tr.must(c.Signal(syscall.SIGTERM))
	tr.waitExit(c, 0)
	<-done
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads, want b", next.Candidate)
	}
	tr.noOverlap()
	tr.finish()
}

// Two operators ask at once: one is refused, by the name of the other.
func TestSwitchover_TwoOperators(t *testing.T) {
	tr := ordinary(t)
	a := tr.start("a", "ignore-term", variables("LEASEHOLD_STOP_GRACE=2s"))
	job := tr.waitJob(a)
	tr.start("b", "")
	tr.waitCandidates(2)
	first := make(chan struct{})
	go func() {
		defer close(first)
		tr.expectCommand(0, `"b" leads`, "switchover")
	}()
	tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
	tr.expectCommand(1, " has asked for a switchover to the next one", "switchover")
	<-first
	tr.waitNext(job, waitTimeout)
	tr.noOverlap()
	tr.finish()
}

// A request that nobody serves is gone after its time.
func TestSwitchover_Unserved(t *testing.T) {
	tr := ordinary(t)
	tr.ttl = time.Minute
	all, job := tr.startAll("ab")
	all[0].SetReachable(false)
	tr.expectCommand(75, `"a" has not answered; the request is withdrawn`,
		"switchover", "--timeout", "3s")
	keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", "leasehold/v1/")
	tr.must(err)
	if strings.Contains(keys, "/switchover") {
		t.Errorf("left in etcd: %s", keys)
	}
	all[0].SetReachable(true)
	tr.untouched(all[0], job)
	tr.finish()
}

// Other programs in the queue: a switchover may go to one, and passes none. It would not notice
// that its key is gone.
func TestSwitchover_Strangers(t *testing.T) {
	tr := ordinary(t)
	all, job := tr.startAll("a")
	stranger := tr.etcd.EtcdctlCommand(tr.etcd.Endpoints(), "elect", tr.election, "stranger")
	child, err := harness.StartChild("etcdctl elect", nil, stranger)
	tr.must(err)
	t.Cleanup(child.Kill)
	tr.waitQueue("astranger")
	b := tr.start("b", "")
	tr.waitStatus(b, "/standby", http.StatusOK)
	tr.waitCandidates(2)
	tr.expectCommand(1, `ahead of "b" wait others that can't be passed, because they are no`+
		` candidates of leasehold's: "stranger"`, "switchover", "--to", "b")
	tr.untouched(all[0], job)
	tr.expectCommand(1, `refused: the next in line, "stranger", has no record`, "switchover")
	tr.expectCommand(0, `"stranger" leads`, "switchover", "--to", "stranger")
	tr.waitDead(job)
	tr.must(child.Signal(syscall.SIGINT))
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads, want b", next.Candidate)
	}
	tr.noOverlap()
	tr.stop() // the lease of etcdctl stays until it expires
}

// etcd's leader changes just when somebody asks.
func TestSwitchover_EtcdLeaderChanges(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{Size: 3})
	tr.ttl = 5 * time.Second
	_, job := tr.startAll("abc")
	leader, err := tr.etcd.Leader(tr.ctx)
	tr.must(err)
	tr.must(leader.Signal(syscall.SIGKILL))
	tr.expectCommand(0, `"b" leads`, "switchover", "--to", "b")
	if next := tr.waitNext(job, waitTimeout); next.Candidate != "b" {
		t.Errorf("%s leads, want b", next.Candidate)
	}
	tr.must(leader.Start())
	tr.must(tr.etcd.WaitHealthy(tr.ctx))
	tr.noOverlap()
	tr.finish()
}

// The candidate with the highest priority leads next, whatever the order in which they joined, and
// gets the lead back once it has been ready for long enough.
func TestPriority(t *testing.T) {
	tr := ordinary(t)
	start := func(identity, priority string) *candidate {
		return tr.start(identity, "", variables(
			"LEASEHOLD_PRIORITY="+priority, "LEASEHOLD_FAILBACK=20s"))
	}
	a := start("a", "90")
	job := tr.waitJob(a)
	for _, c := range []struct{ identity, priority string }{{"b", "50"}, {"c", "20"}, {"d", "70"}} {
		tr.waitStatus(start(c.identity, c.priority), "/standby", http.StatusOK)
	}
	tr.waitNextInLine("d")
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	next := tr.waitNext(job, waitTimeout)
	if next.Candidate != "d" {
		t.Errorf("%s leads, want d", next.Candidate)
	}
	began := harness.Now()
	tr.waitStatus(start("e", "90"), "/standby", http.StatusOK)
	last := tr.waitNext(next, waitTimeout)
	if took := harness.Now() - began; last.Candidate != "e" || took < 20*time.Second {
		t.Errorf("%s leads after %v, want e after 20s", last.Candidate, took)
	}
	tr.noOverlap()
	tr.finish()
}

// A candidate with the priority 0 never leads: not alone, not if the leader goes, not on request.
func TestPriority_Never(t *testing.T) {
	tr := ordinary(t)
	never := tr.start("never", "", variables("LEASEHOLD_PRIORITY=0"))
	tr.waitStatus(never, "/readyz", http.StatusServiceUnavailable)
	tr.waitStatus(never, "/livez", http.StatusOK)
	tr.waitLog(never, "candidate never leads: LEASEHOLD_PRIORITY is 0")
	a := tr.start("a", "")
	job := tr.waitJob(a)
	tr.expectCommand(1, "", "switchover", "--to", "never")
	tr.must(a.Signal(syscall.SIGTERM))
	tr.waitExit(a, 0)
	tr.waitDead(job)
	tr.expectCommand(1, "", "status") // nobody leads, and nobody waits
	if _, said := tr.command("status"); strings.Contains(said, "never") {
		t.Errorf("status: %s", said)
	}
	tr.finish()
}

// waitNextInLine waits until this one is the second in the queue.
func (tr *trial) waitNextInLine(want string) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		_, said := tr.command("status")
		for line := range strings.Lines(said) {
			if f := strings.Fields(line); len(f) > 1 && f[0] == "2" && f[1] == want {
				return nil
			}
		}
		return fmt.Errorf("status: %s", said)
	}))
}
