//go:build linux

package guard

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// newElectorGuard is a testGuard that can start electors. Each of them is the test binary, runs no
// test, and exits at once. The job runs, unless idle is set.
func newElectorGuard(t *testing.T, idle bool) *testGuard {
	t.Helper()
	g := newTestGuard(t)
	g.cfg.StopSignal = unix.SIGURG // which does not end the process that stands for the job
	g.cfg.Elector = []string{"elector", "-test.list=^$"}
	if err := g.openStarter(); err != nil {
		t.Fatal(err)
	}
	g.leased(ipc.Lease{ID: 7, TTL: time.Second})
	if !idle {
		g.start()
		g.started()
	}
	return g
}

// electorsStay has the electors that follow sleep until the test ends. One that exits at once may
// be seen to be lost before it is seen to run.
func (g *testGuard) electorsStay() {
	g.t.Helper()
	var err error
	if g.starter.image.fd, err = g.starter.openBinary("/bin/sh"); err != nil {
		g.t.Fatal(err)
	}
	g.starter.argv = []string{"sh", "-c", "exec sleep 1000"}
	g.t.Cleanup(func() {
		g.until("no fork", func() bool { return g.elector.state != electorStarting })
		if g.elector.pid > 0 {
			_ = unix.Kill(g.elector.pid, unix.SIGKILL)
		}
	})
}

// electorDies lets the elector exit, with all that it has said in its pipe.
func (g *testGuard) electorDies() {
	g.t.Helper()
	// Its end of the pipe is closed by its exit. The number stays ours.
	if err := unix.Dup3(g.timer, g.out.FD, unix.O_CLOEXEC); err != nil {
		g.t.Fatal(err)
	}
	_ = unix.Kill(g.elector.pid, unix.SIGKILL)
}

// until lets the loop turn until f is true.
func (g *testGuard) until(what string, f func() bool) {
	g.t.Helper()
	for end := boottime.Now() + 20*time.Second; !f(); {
		if boottime.Now() > end {
			g.t.Fatalf("%s: the elector is %s, the job %s", what, g.elector.state, g.job.state)
		}
		g.act(boottime.Now())
		g.poll()
		g.receive()
	}
}

// TestElector_Lost: which elector is replaced, and what becomes of the job.
func TestElector_Lost(t *testing.T) {
	releasing := ipc.Lease{ID: 7, Releasing: true}
	for _, c := range []struct {
		name     string
		idle     bool
		event    func(g *testGuard)
		replaced bool
		job      jobState
	}{
		{"leading", false, func(*testGuard) {}, true, jobRunning},
		{"standby", true, func(*testGuard) {}, true, jobIdle},
		{"stopping", false, func(g *testGuard) { g.stop(time.Hour) }, true, jobStopping},
		{"stop in the pipe", false, func(g *testGuard) {
			_ = g.out.Send(ipc.Stop{Grace: time.Hour})
		}, true, jobStopping},
		{"release in the pipe", true, func(g *testGuard) {
			_ = g.out.Send(releasing)
		}, true, jobIdle},
		{"release while the job lives", false, func(g *testGuard) {
			_ = g.out.Send(releasing)
		}, false, jobKilling},
		{"announced", true, func(g *testGuard) {
			_ = g.out.Send(ipc.Exiting{Code: 5})
		}, false, jobIdle},
		{"announced while the job lives", false, func(g *testGuard) {
			_ = g.out.Send(ipc.Exiting{})
		}, false, jobKilling},
		{"garbage in the pipe", false, func(g *testGuard) {
			_, _ = unix.Write(g.out.FD, []byte("\x01\x00"))
		}, false, jobKilling},
		{"one stop signal", false, (*testGuard).term, true, jobStopping},
		{"two stop signals", false, func(g *testGuard) {
			g.signal(unix.SIGTERM)
			g.signal(unix.SIGTERM)
		}, false, jobKilling},
		{"the spawner was told to kill", false, func(g *testGuard) {
			g.spawner.area.closed = 1
		}, false, jobKilling},
		{"two replaced half a minute ago", false, func(g *testGuard) {
			now := boottime.Now()
			g.elector.replacedAt = [2]time.Duration{now - 31*time.Second, now - 30*time.Second}
		}, false, jobKilling},
		{"two replaced a while ago", false, func(g *testGuard) {
			now := boottime.Now()
			g.elector.replacedAt = [2]time.Duration{now - 61*time.Second, now - 30*time.Second}
		}, true, jobRunning},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newElectorGuard(t, c.idle)
			g.electorsStay()
			old := g.elector.pid
			c.event(g)
			g.electorDies()
			g.until("lost", func() bool { return g.elector.pid != old })
			if replaced := g.elector.state == electorStarting; replaced != c.replaced {
				t.Fatalf("the elector is %s", g.elector.state)
			}
			if g.job.state != c.job {
				t.Errorf("the job is %s, want %s", g.job.state, c.job)
			}
			if c.replaced {
				g.until("replaced", func() bool { return g.elector.state == electorRunning })
			}
		})
	}
}

// TestElector_Silent: an elector that hangs is killed and replaced. The job is left alone.
func TestElector_Silent(t *testing.T) {
	g := newElectorGuard(t, false)
	g.electorsStay()
	g.job.stopAt = boottime.Now() + g.cfg.TTL/3 // its silence counts from now on
	g.heardFromElector(boottime.Now() - g.cfg.TTL)
	_ = unix.Kill(g.elector.pid, unix.SIGSTOP)
	for range 2 {
		g.serveElectorDeadlines(g.elector.checkAt)
		if g.elector.state != electorRunning {
			t.Fatal("the elector is not checked three times")
		}
	}
	g.serveElectorDeadlines(g.elector.checkAt)
	if g.elector.state != electorEnding {
		t.Fatalf("the elector is %s", g.elector.state)
	}
	g.electorDies()
	g.until("replaced", func() bool { return g.elector.state == electorRunning })
	if g.job.state != jobRunning || g.known.Silent != 1 || g.known.Exited != 0 {
		t.Errorf("the job is %s, %d electors were silent", g.job.state, g.known.Silent)
	}
}

// TestElector_SilentUnderALongTTL: it is killed in half the time of the unit's watchdog (30 s),
// which would end the job too.
func TestElector_SilentUnderALongTTL(t *testing.T) {
	for _, idle := range []bool{false, true} {
		g := newElectorGuard(t, idle)
		g.cfg.TTL = time.Hour
		g.job.stopAt, g.job.killBy = forever, forever
		now := boottime.Now()
		g.heardFromElector(now)
		for range 3 {
			g.serveElectorDeadlines(g.elector.checkAt)
		}
		if after := g.elector.checkAt - now; g.elector.state != electorEnding ||
			after > 15*time.Second {
			t.Errorf("idle %v: the elector is %s after %v", idle, g.elector.state, after)
		}
		g.electorDies()
		g.until("replaced", func() bool { return g.elector.state == electorRunning })
	}
}

// TestElector_NotInTime: if no elector can be forked in time, the guard gives up, and does not wait
// for the fork. What is forked then is killed.
func TestElector_NotInTime(t *testing.T) {
	g := newElectorGuard(t, false)
	defer closeAll(g.starter.askW)
	g.starter.askW = -1 // nobody forks
	g.electorDies()
	g.until("lost", func() bool { return g.elector.state == electorStarting })
	g.serveElectorDeadlines(g.elector.startBy)
	if g.elector.state != electorGone || g.job.state != jobKilling {
		t.Fatalf("the elector is %s, the job %s", g.elector.state, g.job.state)
	}
	g.nothingLeft()
	if g.finished() {
		t.Error("the lease is not revoked, and the fork may be over soon")
	}
	p, err := g.starter.fork()
	if err != nil {
		t.Fatal(err)
	}
	g.starter.answer.Store(&starterAnswer{p, nil})
	g.receiveFromStarter()
	if g.elector.pid != 0 || g.starter.busy != 0 {
		t.Errorf("an elector runs: %d", g.elector.pid)
	}
}

// TestElector_ForkFails: a fork that fails, as at the limit of processes, is tried again. The job
// goes on meanwhile.
func TestElector_ForkFails(t *testing.T) {
	g := newElectorGuard(t, false)
	ask := g.starter.askW
	g.starter.askW = -1
	g.electorDies()
	g.until("lost", func() bool { return g.elector.state == electorStarting })
	g.starter.answer.Store(&starterAnswer{err: unix.EAGAIN})
	g.receiveFromStarter()
	if g.elector.state != electorStarting || g.job.state != jobRunning {
		t.Fatalf("the elector is %s, the job %s", g.elector.state, g.job.state)
	}
	g.starter.askW = ask
	g.serveElectorDeadlines(g.nextElectorDeadline())
	g.until("replaced", func() bool { return g.elector.state == electorRunning })
}

// TestElector_OnlyPingsCount: an elector whose loop hangs sends no pings. What another loop of it
// sends does not keep it.
func TestElector_OnlyPingsCount(t *testing.T) {
	g := newElectorGuard(t, false)
	for m, counts := range map[any]bool{
		ipc.Extend{StopAt: 1, KillBy: 2}: false,
		ipc.Ready{}:                      false,
		ipc.Ping{Number: 1}:              true,
	} {
		g.elector.heardAt = 0
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
		out := ipc.Outbox{FD: pipe[1]}
		if err := out.Send(m); err != nil {
			t.Fatal(err)
		}
		if _, err := g.elector.inbox.Fill(pipe[0]); err != nil {
			t.Fatal(err)
		}
		closeAll(pipe[:]...)
		g.takeMessages()
		if heard := g.elector.heardAt != 0; heard != counts {
			t.Errorf("%#v counts: %v", m, heard)
		}
	}
}

// TestElector_ExitsWithItsLease: the lease is revoked also if the elector that announced its exit
// has not released it.
func TestElector_ExitsWithItsLease(t *testing.T) {
	for _, released := range []bool{false, true} {
		g := newElectorGuard(t, true)
		g.leased(ipc.Lease{ID: 8, TTL: time.Second, Releasing: released})
		g.elector.announced = true
		g.electorDies()
		g.until("gone", func() bool { return g.elector.state == electorGone })
		revoked := false
		g.cfg.Revoke = func(lease int64, _ time.Duration) []string {
			revoked = lease == 8
			return []string{"revoke", "-test.list=^$"}
		}
		if g.finished() != released || revoked == released {
			t.Errorf("released %v: revoked %v", released, revoked)
		}
		if g.elector.revoker != 0 {
			_, _, _ = wait(g.elector.revoker)
		}
	}
}

// TestElector_Record: what the guard tells the next elector is what it got from the last one, and
// what the job does.
func TestElector_Record(t *testing.T) {
	g := newElectorGuard(t, true)
	g.leased(ipc.Lease{ID: 8, TTL: time.Second})
	for _, m := range []any{
		ipc.Entered{Key: "k", Created: 9},
		ipc.Restarts{Count: 1, Failures: 2, Backoff: 3},
		ipc.Lease{ID: 8, TTL: time.Minute},
	} {
		if err := g.out.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	g.receiveFromElector()
	g.start()
	g.started()
	record := func() ipc.Record {
		t.Helper()
		r := g.known
		g.job.record(&r)
		return r
	}
	r, j := record(), &g.job
	if r.Lease != (ipc.Lease{ID: 8, TTL: time.Minute}) || r.Entered.Created != 9 ||
		r.Restarts.Failures != 2 || r.Starts != 1 || r.StartedAt == 0 {
		t.Errorf("the record is %+v", r)
	}
	if r.Job != ipc.JobRunning || r.PID != j.pid || r.StopAt != j.stopAt || r.KillBy != j.killBy ||
		r.Serial != j.serial || r.Ordered {
		t.Errorf("while the job runs, the record is %+v", r)
	}
	g.stop(time.Minute)
	if r = record(); r.Job != ipc.JobEnding || !r.Ordered || r.Due != j.graceEnd {
		t.Errorf("while the job stops, the record is %+v", r)
	}
	if g.stop(time.Hour); j.graceEnd != r.Due {
		t.Error("another elector lengthens the grace")
	}
	g.exited()
	g.nothingLeft()
	if r = record(); r.Job != ipc.JobIdle || r.LastExit.At == 0 || !r.LastExit.Ordered ||
		r.Serial != 2 || r.StopAt != 0 {
		t.Errorf("after the job's end, the record is %+v", r)
	}
	g.leased(ipc.Lease{ID: 8, Releasing: true})
	g.leased(ipc.Lease{ID: 8, TTL: time.Minute})
	if r = record(); !r.Lease.Releasing || r.Lease.TTL != time.Minute {
		t.Errorf("a release is taken back: %+v", r.Lease)
	}
	if g.start(); g.job.alive() || !g.elector.givenUp {
		t.Error("a job is started under a lease that is given back")
	}
	g.leased(ipc.Lease{ID: 9})
	if r = record(); r.Lease.Releasing || r.Entered.Created != 0 || r.Starts != 0 {
		t.Errorf("under a new lease, the record is %+v", r)
	}
}
