//go:build linux

package scenario_test

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
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

// A stubborn job gets its grace, and is killed. Its daemon ends with 76 if it may not start the job
// again.
func TestSwitchover_StubbornJob(t *testing.T) {
	tr := ordinary(t)
	a := tr.start("a", "ignore-term",
		variables("LEASEHOLD_STOP_GRACE=1s", "LEASEHOLD_RESTART=never"))
	job := tr.waitJob(a)
	b := tr.start("b", "")
	tr.waitStatus(b, "/standby", http.StatusOK)
	began := harness.Now()
	tr.expectCommand(0, `"b" leads`, "switchover", "--to", "b")
	if took := tr.waitDead(job) - began; took < time.Second {
		t.Errorf("the job was killed after %v, and its grace is a second", took)
	}
	tr.waitNext(job, waitTimeout)
	tr.waitExit(a, 76)
	tr.noOverlap()
	tr.finish()
}

// The target goes while the job stops: whoever is next leads. If it was killed, its lease has to
// expire first.
func TestSwitchover_TargetDies(t *testing.T) {
	for _, row := range []struct {
		name, grace string
		die         func(tr *trial, c *candidate)
		code        int
		says, next  string
	}{
		{"stopped", "3s", func(tr *trial, c *candidate) {
			tr.must(c.Signal(syscall.SIGTERM))
			tr.waitExit(c, 0)
		}, 1, `"c" has gone meanwhile: "b" leads`, "b"},
		{"killed", "1s", func(tr *trial, c *candidate) {
			tr.killAll(c)
		}, 0, `"c" leads`, "ab"},
	} {
		t.Run(row.name, func(t *testing.T) {
			tr := ordinary(t)
			a := tr.start("a", "ignore-term", variables("LEASEHOLD_STOP_GRACE="+row.grace))
			job := tr.waitJob(a)
			b := tr.start("b", "")
			tr.waitStatus(b, "/standby", http.StatusOK)
			c := tr.start("c", "")
			tr.waitStatus(c, "/standby", http.StatusOK)
			tr.waitCandidates(3)
			done := make(chan struct{})
			go func() {
				defer close(done)
				tr.expectCommand(row.code, row.says, "switchover", "--to", "c")
			}()
			tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
			row.die(tr, c)
			<-done
			next := tr.waitNext(job, waitTimeout)
			if !strings.Contains(row.next, next.Candidate) {
				t.Errorf("%s leads, want %s", next.Candidate, row.next)
			}
			tr.noRequest()
			tr.waitStatus(a, "/readyz", http.StatusOK)
			tr.waitStatus(b, "/readyz", http.StatusOK)
			tr.noOverlap()
			tr.finish()
		})
	}
}

// killAll kills all processes of a candidate at once: none of them sees that another has gone.
func (tr *trial) killAll(c *candidate) {
	tr.Helper()
	all := append(harness.Descendants(c.Guard()), c.Guard())
	for _, sig := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGKILL} {
		for _, pid := range all {
			tr.must(syscall.Kill(pid, sig))
		}
	}
	_, err := c.Wait(tr.waitContext(waitTimeout))
	tr.must(err)
}

// noRequest fails if etcd holds a request for a switchover.
func (tr *trial) noRequest() {
	tr.Helper()
	if tr.hasRequest() {
		tr.Error("a request for a switchover is left in etcd")
	}
}

// waitRequest waits until etcd has a request for a switchover, or none.
func (tr *trial) waitRequest(there bool) {
	tr.Helper()
	tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
		if tr.hasRequest() != there {
			return fmt.Errorf("there is a request: %v", !there)
		}
		return nil
	}))
}

// hasRequest reports whether etcd has a request for a switchover.
func (tr *trial) hasRequest() bool {
	tr.Helper()
	keys, err := tr.etcd.Etcdctl(tr.ctx, "get", "--prefix", "--keys-only", "leasehold/v1/")
	tr.must(err)
	return strings.Contains(keys, "/switchover")
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

var ledPattern = regexp.MustCompile(`leads, token (\d+); nobody led for`)

// Two operators ask at the same instant, again and again. Each request is granted or refused, at
// least one is granted, and the lead moves once for each that is.
func TestSwitchover_TwoOperatorsAtOnce(t *testing.T) {
	tr := ordinary(t)
	all, job := tr.startAll("abc")
	terms := func() (n int) {
		for _, c := range all {
			n += strings.Count(c.Log(), " to=leading ")
		}
		return n
	}
	for round := range 6 {
		tr.waitCandidates(3)
		var others []string
		for _, c := range all {
			tr.waitStatus(c, "/readyz", http.StatusOK)
			if c.Identity != job.Candidate {
				others = append(others, c.Identity)
			}
		}
		asked := [][]string{
			{"switchover", "--to", others[0]}, {"switchover", "--to", others[1]},
		}
		if round%2 > 0 { // to the next one, both
			asked = [][]string{{"switchover"}, {"switchover"}}
		}
		before := terms()
		var answers [2]struct {
			code int
			said string
		}
		var running sync.WaitGroup
		for i, args := range asked {
			running.Go(func() { answers[i].code, answers[i].said = tr.command(args...) })
		}
		running.Wait()
		tr.noRequest()
		granted, token := 0, int64(0)
		for i, a := range answers {
			t.Logf("%q: %d, %s", asked[i], a.code, a.said)
			led := ledPattern.FindStringSubmatch(a.said)
			switch {
			case a.code == 0 && led != nil:
				n, err := strconv.ParseInt(led[1], 10, 64)
				tr.must(err)
				granted, token = granted+1, max(token, n)
			case a.code == 1 && strings.Contains(a.said, "refused: "):
			default:
				tr.Errorf("%q: %d, %s", asked[i], a.code, a.said)
			}
		}
		if granted == 0 {
			tr.Fatal("none of them is granted")
		}
		var err error
		job, err = tr.witness.WaitForJob(tr.waitContext(waitTimeout), func(l harness.Life) bool {
			return l.Token == token
		})
		tr.must(err)
		tr.untouched(all[strings.Index("abc", job.Candidate)], job)
		if n := terms() - before; n != granted {
			tr.Errorf("%d are granted, and %d terms began: %s", granted, n, tr.summary())
		}
	}
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
	tr.noRequest()

	// So is that of a command which is killed.
	killed := tr.newCommand("switchover", "--timeout", "3s")
	tr.must(killed.Start())
	tr.waitRequest(true)
	tr.must(killed.Process.Kill())
	_ = killed.Wait() // it was killed
	tr.waitRequest(false)
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
// gets the lead back once it has been ready for long enough. One that comes every three seconds and
// is killed soon is never ready for that long: neither the job nor the queue moves. The daemon that
// has given back the lead ends with 76 if it may not start its job again.
func TestPriority(t *testing.T) {
	tr := ordinary(t)
	const failback = 8 * time.Second
	start := func(identity, priority string) *candidate {
		return tr.start(identity, "", variables("LEASEHOLD_RESTART=never",
			"LEASEHOLD_PRIORITY="+priority, "LEASEHOLD_FAILBACK="+failback.String()))
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
	b, d := tr.candidates[1], tr.candidates[3]
	moves := func() int { return strings.Count(b.Log(), "queue entry lost") }
	before, longest := moves(), time.Duration(0)
	if before == 0 {
		t.Error("b has not made room for d, or its log says it in other words")
	}
	for began := harness.Now(); harness.Now()-began < failback+4*tr.ttl; {
		came := harness.Now()
		x := start("x", "90")
		tr.waitStatus(x, "/standby", http.StatusOK)
		tr.waitRenewals(x, 2) // each a fifth of 3 s
		tr.killAll(x)
		longest = max(longest, harness.Now()-came)
		tr.must(harness.Wait(tr.ctx, max(0, came+3*time.Second-harness.Now())))
	}
	tr.untouched(d, next)
	// Its lease stays for a TTL, and a little longer. Whoever is there for two of them counts.
	if n := moves() - before; n > 0 && longest < tr.ttl-time.Second {
		t.Errorf("b has lost its place %d times; x was there for %v at most", n, longest)
	}
	began := harness.Now()
	tr.waitStatus(start("e", "90"), "/standby", http.StatusOK)
	last := tr.waitNext(next, waitTimeout)
	if took := harness.Now() - began; last.Candidate != "e" || took < failback {
		t.Errorf("%s leads after %v, want e after %v", last.Candidate, took, failback)
	}
	tr.waitExit(d, 76)
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
