//go:build linux

package scenario_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"leasehold/e2e/harness"
)

// A switchable is a check that passes while a file is there, and counts how often it has run.
type switchable struct {
	tr        *trial
	file, log string
}

func (tr *trial) newCheck(t *testing.T) *switchable {
	t.Helper()
	dir, err := harness.TempDir("leasehold-health-")
	tr.must(err)
	tr.Cleanup(func() { _ = os.RemoveAll(dir) })
	tr.must(os.Chmod(dir, 0o777))
	c := &switchable{tr, filepath.Join(dir, "well"), filepath.Join(dir, "log")}
	c.pass()
	return c
}

func (c *switchable) pass() { c.tr.must(os.WriteFile(c.file, nil, 0o666)) }
func (c *switchable) fail() { c.tr.must(os.Remove(c.file)) }

// command is the check's command line.
func (c *switchable) command() string {
	return fmt.Sprintf("sh -c 'echo >> %s; test -e %s || { echo is ill; exit 1; }'", c.log, c.file)
}

func (c *switchable) runs() int {
	text, _ := os.ReadFile(c.log)
	return strings.Count(string(text), "\n")
}

// waitRuns waits until the check has run n times more.
func (c *switchable) waitRuns(n int) {
	c.tr.Helper()
	before := c.runs()
	c.tr.must(harness.Until(c.tr.waitContext(waitTimeout), func() error {
		if got := c.runs(); got < before+n {
			return fmt.Errorf("%d checks, want %d", got-before, n)
		}
		return nil
	}))
}

// healthSettings are for tests: three failures in a row, soon after each other.
func healthSettings(command string, more ...string) change {
	return variables(append([]string{
		"LEASEHOLD_HEALTH_CMD=" + command, "LEASEHOLD_HEALTH_INTERVAL=100ms",
		"LEASEHOLD_HEALTH_TIMEOUT=1s",
	}, more...)...)
}

// One failure, or two, do nothing. The third in a row has the job stopped and started again, in the
// same term.
func TestHealth_Flapping(t *testing.T) {
	t.Parallel()
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			t.Parallel()
			tr := newTrial(t, u, harness.ClusterConfig{})
			check := tr.newCheck(t)
			// Between a failure and the third one the test has two seconds to let it pass.
			leader := tr.start("a", "",
				healthSettings(check.command(), "LEASEHOLD_HEALTH_INTERVAL=1s"))
			job := tr.waitJob(leader)
			tr.waitStatus(leader, "/leader", http.StatusOK)
			before := tr.status(leader)
			if before.Job.Health == nil || *before.Job.Health != "healthy" || !before.Job.Ready {
				t.Errorf("%+v", before.Job)
			}
			said := func(what string, times int) {
				t.Helper()
				tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
					if n := strings.Count(leader.Log(), what); n < times {
						return fmt.Errorf("the log says %q %d times, want %d", what, n, times)
					}
					return nil
				}))
			}
			for n := range 2 { // the second time it counts anew
				check.fail()
				said("failures=1 retries=", n+1)
				check.pass()
				said("health check passes again", n+1)
				check.waitRuns(1)
			}
			tr.sameJob(job)
			check.fail()
			tr.waitDead(job)
			tr.waitStatus(leader, "/leader", http.StatusServiceUnavailable)
			check.pass()
			tr.waitStatus(leader, "/leader", http.StatusOK)
			after := tr.status(leader)
			if after.Job.Restarts == 0 || *after.Leader != *before.Leader {
				t.Errorf("before %+v, after %+v", before, after)
			}
			if !strings.Contains(leader.Log(), "is ill") {
				t.Error("the log does not say what the check has printed")
			}
			tr.finish()
		})
	}
}

// A job that hangs is found, killed at the end of its grace, and started again. After
// LEASEHOLD_RESTART_LIMIT of these, another candidate leads.
func TestHealth_HungJob(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	// The check finds a job that is stopped by its state in /proc.
	check := healthSettings(`sh -c 'for p in /proc/[0-9]*/stat; do `+
		`read -r pid comm state rest < $p && [ "$comm" = "(testjob)" ] && [ "$state" = T ] && `+
		`tr "\0" "\n" < /proc/$pid/environ | grep -qx "LEASEHOLD_ELECTION=$LEASEHOLD_ELECTION" && `+
		`exit 1; done 2>/dev/null; exit 0'`,
		"LEASEHOLD_RESTART_LIMIT=2", "LEASEHOLD_STOP_GRACE=200ms")
	a := tr.start("a", "", check)
	job := tr.waitJob(a)
	b := tr.start("b", "", check)
	tr.waitStatus(b, "/standby", http.StatusOK)
	for n := range 2 {
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if s := tr.status(a); s.Job.Restarts != n || !s.Job.Ready {
				return fmt.Errorf("%d restarts of %d", s.Job.Restarts, n)
			}
			return nil
		}))
		tr.must(syscall.Kill(*tr.status(a).Job.PID, syscall.SIGSTOP))
		if n == 0 {
			tr.waitDead(job)
		}
	}
	tr.waitStatus(b, "/leader", http.StatusOK)
	if log := a.Log(); !strings.Contains(log, "LEASEHOLD_RESTART_LIMIT is reached") {
		t.Error("the log of a does not say why it has resigned")
	}
	tr.finish()
}

// Another elector takes over what is known: nothing waits, and a job that is ill is still found.
func TestHealth_ElectorReplaced(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	check := tr.newCheck(t)
	a := tr.start("a", "", healthSettings(check.command(), "LEASEHOLD_HEALTH_START_PERIOD=1h"))
	job := tr.waitJob(a)
	tr.waitStatus(a, "/leader", http.StatusOK)
	tr.must(a.signalElector(syscall.SIGKILL))
	tr.waitReplaced(a, 1)
	if s := tr.status(a); s.Job.Health == nil || *s.Job.Health != "healthy" {
		t.Errorf("after the replacement: %+v", s.Job)
	}
	check.waitRuns(3)
	tr.sameJob(job)
	check.fail()
	tr.waitDead(job)
	check.pass()
	tr.waitStatus(a, "/leader", http.StatusOK)
	tr.finish()
}

// With LEASEHOLD_RESTART=never a job that is unhealthy ends the daemon, and not with 0.
func TestHealth_RestartNever(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	check := tr.newCheck(t)
	a := tr.start("a", "stop-code=0",
		healthSettings(check.command(), "LEASEHOLD_RESTART=never"))
	tr.waitJob(a)
	tr.waitStatus(a, "/leader", http.StatusOK)
	check.fail()
	tr.waitExit(a, 1)
	if !strings.Contains(a.Log(), "the job was unhealthy: exit code 1: is ill") {
		t.Error("the log does not say why the daemon has exited")
	}
	tr.finish()
}

// A frozen job is not unhealthy: no check runs while it is frozen.
func TestFreeze_HealthPauses(t *testing.T) {
	tr := newTrial(t, root(), harness.ClusterConfig{})
	tr.ttl = 5 * time.Second
	check := tr.newCheck(t)
	leader := tr.start("a", "", freezes, healthSettings(check.command()))
	job := tr.waitJob(leader)
	tr.waitStatus(leader, "/leader", http.StatusOK)
	start := tr.stopEtcd()
	tr.waitJobState(leader, "frozen")
	check.fail()
	before := check.runs()
	time.Sleep(2 * tr.ttl)                       // without etcd
	if after := check.runs(); after > before+1 { // one may have begun before
		t.Errorf("%d checks of a frozen job", after-before)
	}
	check.pass()
	start()
	tr.waitStatus(leader, "/leader", http.StatusOK)
	check.waitRuns(3)
	tr.sameJob(job)
	tr.finish()
}

// A job that answers by HTTP is found when it answers with an error, and when it hangs and does not
// answer at all.
func TestHealth_URL(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[1], harness.ClusterConfig{})
	const well, ill, hangs = 0, 1, 2
	var is atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch is.Load() {
		case ill:
			http.Error(w, "is ill", http.StatusInternalServerError)
		case hangs:
			<-r.Context().Done() // until the check has given up
		}
	}))
	t.Cleanup(server.Close)
	a := tr.start("a", "", variables("LEASEHOLD_HEALTH_URL="+server.URL,
		"LEASEHOLD_HEALTH_INTERVAL=100ms", "LEASEHOLD_HEALTH_TIMEOUT=1s"))
	tr.waitJob(a)
	tr.waitStatus(a, "/leader", http.StatusOK)
	for n, row := range []struct {
		how  int32
		said string
	}{
		{ill, "500 Internal Server Error: is ill"}, {hangs, " awaiting "},
	} {
		is.Store(row.how)
		tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
		tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
			if got := tr.status(a).Job.Restarts; got != n+1 {
				return fmt.Errorf("%d restarts, want %d", got, n+1)
			}
			return nil
		}))
		is.Store(well)
		tr.waitStatus(a, "/leader", http.StatusOK)
		if !strings.Contains(a.Log(), row.said) {
			t.Errorf("the log does not say %q", row.said)
		}
	}
	tr.finish()
}

// What an elector has decided is known to the next one: a job that it has stopped is started again
// in the same term, as if nothing else had happened.
func TestHealth_ElectorReplacedWhileItStops(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	check := tr.newCheck(t)
	a := tr.start("a", "ignore-term", healthSettings(check.command(),
		"LEASEHOLD_HEALTH_INTERVAL=1s", "LEASEHOLD_STOP_GRACE=2s", "LEASEHOLD_RESTART_LIMIT=4"))
	job := tr.waitJob(a)
	for range 2 { // After them the backoff is long enough to be seen: 2 s.
		tr.must(tr.witness.Tell(job, "exit 3"))
		again, err := tr.witness.WaitForJob(tr.waitContext(waitTimeout),
			func(l harness.Life) bool { return l.Started > job.Started })
		tr.must(err)
		job = again
	}
	tr.waitStatus(a, "/leader", http.StatusOK)
	token := tr.status(a).Leader.Token
	check.fail()
	tr.waitJobState(a, "stopping")
	tr.must(a.signalElector(syscall.SIGKILL))
	tr.waitReplaced(a, 1)
	tr.waitDead(job)
	tr.waitJobState(a, "backoff")
	tr.must(a.signalElector(syscall.SIGKILL))
	tr.waitReplaced(a, 2)
	tr.waitJobState(a, "running")
	if s := tr.status(a); s.Leader.Token != token {
		t.Errorf("the token was %d, and is %d", token, s.Leader.Token)
	}
	tr.waitLog(a, "LEASEHOLD_RESTART_LIMIT is reached") // that was the fourth one
	tr.finish()
}

// An elector that is lost while it starts a check leaves a child that holds its pipe for a moment.
// The job runs on.
func TestHealth_ElectorLostAtAFork(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	check := tr.newCheck(t)
	a := tr.start("a", "", healthSettings(check.command()))
	job := tr.waitJob(a)
	tr.waitStatus(a, "/leader", http.StatusOK)
	for n := range 2 { // the guard gives up at the third
		elector, err := a.Elector()
		tr.must(err)
		tr.must(killWithChild(tr, elector))
		tr.waitReplaced(a, float64(n+1))
		check.waitRuns(2)
	}
	tr.sameJob(job)
	tr.finish()
}

// killWithChild kills a process as soon as it has a child.
func killWithChild(tr *trial, pid int) error {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return err
	}
	var lists []*os.File
	for _, path := range tasks {
		if f, err := os.Open(path); err == nil {
			defer f.Close()
			lists = append(lists, f)
		}
	}
	busy := true // it may have one already
	for buf := make([]byte, 64); tr.ctx.Err() == nil; {
		has := false
		for _, f := range lists {
			n, _ := f.ReadAt(buf, 0)
			has = has || n > 0
		}
		if has && !busy {
			return syscall.Kill(pid, syscall.SIGKILL)
		}
		busy = has
	}
	return tr.ctx.Err()
}

// A candidate that is unfit is not in the queue, and says why. A leader that becomes unfit goes on
// until somebody else is fit, and hands over then.
func TestFitness(t *testing.T) {
	t.Parallel()
	for _, u := range users() {
		t.Run(u.name, func(t *testing.T) {
			tr := newTrial(t, u, harness.ClusterConfig{})
			fit := func(c *switchable) change {
				return variables("LEASEHOLD_FITNESS_CMD="+c.command(),
					"LEASEHOLD_FITNESS_INTERVAL=100ms", "LEASEHOLD_HEALTH_TIMEOUT=2s")
			}
			checkA, checkB := tr.newCheck(t), tr.newCheck(t)
			checkB.fail()
			a := tr.start("a", "", fit(checkA))
			job := tr.waitJob(a)
			b := tr.start("b", "", fit(checkB))
			tr.waitLog(b, "candidate is unfit: it does not lead until it is fit")
			if queue := tr.queue(); strings.Count(queue, `"Key"`) > 1 {
				t.Errorf("b is unfit, and in the queue: %s", queue)
			}
			_, body, err := b.Get(tr.ctx, "/readyz")
			if err != nil || !strings.Contains(body, "unfit: exit code 1: is ill") {
				t.Errorf("/readyz of b: %q, %v", body, err)
			}
			checkB.pass()
			tr.waitStatus(b, "/standby", http.StatusOK)
			tr.must(b.signalElector(syscall.SIGKILL)) // it keeps its place
			tr.waitReplaced(b, 1)
			tr.waitStatus(b, "/standby", http.StatusOK)
			checkB.fail()
			tr.waitLog(b, "unfit")
			tr.waitStatus(b, "/standby", http.StatusServiceUnavailable)
			checkA.fail() // nobody is fit: the job stays where it is
			tr.waitLog(a, "candidate is unfit: it hands over if somebody else is fit")
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				_, said := tr.command("status")
				if !strings.Contains(strings.Join(strings.Fields(said), " "), " 50 no ") {
					return errors.New(said)
				}
				return nil
			}))
			tr.waitStatus(a, "/readyz", http.StatusServiceUnavailable)
			tr.waitStatus(a, "/leader", http.StatusOK)
			tr.sameJob(job)
			checkB.pass() // now somebody is
			next := tr.waitNext(job, waitTimeout)
			if next.Candidate != "b" {
				t.Errorf("%s leads", next.Candidate)
			}
			tr.waitLog(a, "because this candidate is unfit: exit code 1: is ill")
			tr.waitStatus(b, "/leader", http.StatusOK)
			tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
			if queue := tr.queue(); strings.Count(queue, `"Key"`) > 1 {
				t.Errorf("a is unfit, and in the queue: %s", queue)
			}
			checkA.pass()
			tr.waitStatus(a, "/standby", http.StatusOK)
			tr.untouched(b, next)

			// Once more, it stays for a minute, and says so.
			tr.expectCommand(0, `"a" leads`, "switchover", "--to", "a")
			next = tr.waitNext(next, waitTimeout)
			tr.waitStatus(b, "/standby", http.StatusOK)
			said := strings.Count(a.Log(), " not_before=")
			checkA.fail()
			tr.must(harness.Until(tr.waitContext(waitTimeout), func() error {
				if n := strings.Count(a.Log(), " not_before="); n <= said {
					return fmt.Errorf("%d lines say until when it stays, want more", n)
				}
				return nil
			}))
			tr.waitStatus(a, "/readyz", http.StatusServiceUnavailable)
			for _, path := range []string{"/readyz", "/status"} {
				_, body, err := a.Get(tr.ctx, path)
				if err != nil || !strings.Contains(body, "; it hands over by itself not before ") {
					t.Errorf("%s of a: %s, %v", path, body, err)
				}
			}
			tr.untouched(a, next)
			checkA.pass()
			tr.waitStatus(a, "/readyz", http.StatusOK)
			tr.noOverlap()
			tr.finish()
		})
	}
}

// The same for elect.
func TestFitness_Elect(t *testing.T) {
	t.Parallel()
	tr := newTrial(t, users()[0], harness.ClusterConfig{})
	check := tr.newCheck(t)
	check.fail()
	a := tr.start("a", "", subcommand("elect"), variables("LEASEHOLD_STOP_GRACE=1s",
		"LEASEHOLD_FITNESS_CMD="+check.command(), "LEASEHOLD_FITNESS_INTERVAL=100ms"))
	tr.waitLog(a, "candidate is unfit")
	tr.waitStatus(a, "/leader", http.StatusServiceUnavailable)
	check.pass()
	tr.waitStatus(a, "/leader", http.StatusOK)
	tr.finish()
}
