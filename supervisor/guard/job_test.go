//go:build linux

package guard

import (
	"bytes"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// testGuard is a guard whose elector and spawner are played by the test. A process that sleeps
// stands for each of the three.
type testGuard struct {
	*guard
	t     *testing.T
	in    int // what the guard says to the elector
	inbox ipc.Inbox
	out   ipc.Outbox // to the guard
}

func newTestGuard(t *testing.T) *testGuard {
	t.Helper()
	g := newGuard(Config{
		TTL: time.Hour, Margin: time.Minute, StopSignal: unix.SIGTERM,
		StopGrace: time.Minute,
		Notify:    func(string) {}, Heartbeat: func() {},
		Logger: slog.New(slog.DiscardHandler),
	})
	var err error
	if g.procs, err = proctree.NewScanner(); err != nil {
		t.Fatal(err)
	}
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_BOOTTIME,
		unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	pipes := [3][2]int{}
	for i := range pipes {
		if err := unix.Pipe2(pipes[i][:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			t.Fatal(err)
		}
	}
	sockets, err := unix.Socketpair(unix.AF_UNIX,
		unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	g.wakeR, g.wakeW = pipes[0][0], pipes[0][1]
	g.elector.state, g.elector.pipeEnded = electorRunning, false
	g.elector.in, g.elector.outbox.FD = dup(t, pipes[1][0]), dup(t, pipes[2][1])
	g.elector.pid, g.elector.pidfd = newSleeper(t)
	g.elector.pidfd = dup(t, g.elector.pidfd)
	g.spawner = &spawner{sock: sockets[0], elector: sockets[1]}
	if err := g.spawner.layOut(g.cfg); err != nil {
		t.Fatal(err)
	}
	g.spawner.iov = receiveInto(&g.spawner.got)
	g.spawner.pid, g.spawner.pidfd = newSleeper(t)
	g.listChildren()
	g.heardFromElector(boottime.Now())
	t.Cleanup(func() {
		g.procs.Close()
		g.elector.closeProcess()
		g.closeStarter()
		fds := []int{g.timer, sockets[0], sockets[1]}
		for _, p := range pipes {
			fds = append(fds, p[:]...)
		}
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		_ = unix.Munmap(g.spawner.mem)
	})
	return &testGuard{guard: g, t: t, in: pipes[2][0], out: ipc.Outbox{FD: pipes[1][1]}}
}

// dup returns a copy of a descriptor, which the guard closes.
func dup(t *testing.T, fd int) int {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// newSleeper starts a process that sleeps.
func newSleeper(t *testing.T) (pid, pidfd int) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // the guard may have reaped it
		_ = unix.Close(pidfd)
	})
	return cmd.Process.Pid, pidfd
}

// The events, as the test brings them about.

func (g *testGuard) start() {
	g.job.startAsked(ipc.Start{
		Key: "key", StopAt: boottime.Now() + time.Hour,
		KillBy: boottime.Now() + 2*time.Hour,
	})
}

func (g *testGuard) started() {
	pid, pidfd := newSleeper(g.t)
	g.job.spawnerStarted(pid, dup(g.t, pidfd))
}

func (g *testGuard) refused(errno int32) { g.job.childless = true; g.job.refused(errno) }
func (g *testGuard) exited()             { g.job.childless = true; g.job.firstExited(0) }
func (g *testGuard) extend() {
	g.job.extended(ipc.Extend{StopAt: forever, KillBy: forever}, boottime.Now())
}
func (g *testGuard) lost() { g.job.stopAsked(ipc.Stop{}, boottime.Now()) }

func (g *testGuard) stop(grace time.Duration) {
	g.job.stopAsked(ipc.Stop{Grace: grace}, boottime.Now())
}

// term is the user's stop signal.
func (g *testGuard) term() { g.signal(unix.SIGTERM) }

func (g *testGuard) at(d time.Duration) { g.job.serveDeadlines(boottime.Now() + d) }

func (g *testGuard) round() { g.job.killRound() }

// nothingLeft lets the spawner say that nothing of the job is left.
func (g *testGuard) nothingLeft() {
	g.job.childless, g.job.pid, g.job.unanswered = true, 0, false
	g.job.killRound()
}

// freezing lets stop-at pass.
func (g *testGuard) freezing() {
	g.cfg.Freeze = true
	g.start()
	g.started()
	g.at(time.Hour)
}

// seenFrozen lets the freezer see, so much later, that the job is frozen.
func (g *testGuard) seenFrozen(d time.Duration) {
	g.freezer.done.Store(g.freezer.asked.Load())
	g.job.freezerDone(boottime.Now() + d)
}

func (g *testGuard) freezerDone() { g.seenFrozen(0) }

func (g *testGuard) frozen() { g.freezing(); g.freezerDone() }

func (g *testGuard) saidEnding() {
	g.t.Helper()
	if _, said := g.said(ipc.KindEnding); !said {
		g.t.Error("the elector does not know that the guard ends the job")
	}
}

// saidFrozen fails unless the guard has just said that the job is frozen, after a message with that
// stop-at.
func (g *testGuard) saidFrozen(stopAt time.Duration) {
	g.t.Helper()
	if m, said := g.said(ipc.KindFrozen); !said || m.Frozen().StopAt != stopAt {
		g.t.Errorf("said that the job is frozen: %v, after the stop-at %v, want %v",
			said, m.Frozen().StopAt, stopAt)
	}
}

func (g *testGuard) extendHour() {
	g.job.extended(ipc.Extend{
		StopAt: boottime.Now() + time.Hour, KillBy: boottime.Now() + 2*time.Hour,
	}, boottime.Now())
}

// said returns what the guard said last of the given kind.
func (g *testGuard) said(kind ipc.Kind) (last ipc.Message, ok bool) {
	g.t.Helper()
	for {
		if more, err := g.inbox.Fill(g.in); !more || err != nil {
			return last, ok
		}
		for m, more := g.inbox.Next(); more; m, more = g.inbox.Next() {
			if m.Kind == kind {
				last, ok = m.Clone(), true
			}
		}
	}
}

// TestJob_States: each event leads where the diagram says, and what the elector is told at the end
// is true.
func TestJob_States(t *testing.T) {
	type g = *testGuard
	for _, c := range []struct {
		name   string
		events []func(g)
		state  jobState
		gone   ipc.Gone // checked where the state is idle, but for the time
	}{
		{"starts", []func(g){g.start, g.started}, jobRunning, ipc.Gone{}},
		{"forks", []func(g){g.start}, jobForking, ipc.Gone{}},
		{
			"stop while running",
			[]func(g){g.start, g.started, func(g g) { g.stop(time.Hour) }},
			jobStopping,
			ipc.Gone{},
		},
		{
			"stop while forking",
			[]func(g){g.start, func(g g) { g.stop(time.Hour) }},
			jobStopping,
			ipc.Gone{},
		},
		{
			"started while stopping",
			[]func(g){g.start, func(g g) { g.stop(time.Hour) }, g.started},
			jobStopping,
			ipc.Gone{},
		},
		{
			"stop-at passed",
			[]func(g){g.start, g.started, func(g g) { g.at(time.Hour) }},
			jobStopping,
			ipc.Gone{},
		},
		{
			"extended",
			[]func(g){g.start, g.started, g.extend, func(g g) { g.at(3 * time.Hour) }},
			jobRunning,
			ipc.Gone{},
		},
		{
			"kill-by passed",
			[]func(g){g.start, g.started, func(g g) { g.at(2 * time.Hour) }},
			jobKilling,
			ipc.Gone{},
		},
		{
			"grace over",
			[]func(g){
				g.start, g.started, func(g g) { g.stop(time.Minute) },
				func(g g) { g.at(time.Minute) }, g.exited, g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledGrace, Ordered: true},
		},
		{
			"exits by itself",
			[]func(g){g.start, g.started, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{},
		},
		{
			"leaves something behind",
			[]func(g){
				g.start, g.started, func(g g) { g.job.firstExited(0) }, g.round,
				g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledLeftover},
		},
		{
			"exits when told",
			[]func(g){g.start, g.started, func(g g) { g.stop(time.Hour) }, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Ordered: true},
		},
		{
			"lease lost",
			[]func(g){g.start, g.started, g.lost, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledLost, Ordered: true},
		},
		{
			"start refused",
			[]func(g){g.start, func(g g) { g.refused(int32(unix.ENOENT)) }, g.nothingLeft},
			jobIdle,
			ipc.Gone{},
		},
		{
			"start too late",
			[]func(g){g.start, func(g g) { g.refused(ipc.SpawnerTooLate) }, g.nothingLeft},
			jobIdle,
			ipc.Gone{Ordered: true},
		},
		{
			"kill waits for the answer to the start",
			[]func(g){g.start, g.lost, func(g g) { g.job.childless = true }, g.round},
			jobKilling,
			ipc.Gone{},
		},
		{
			"start asked twice",
			[]func(g){g.start, g.started, g.start, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledElector, Ordered: true},
		},
		{
			"started twice",
			[]func(g){g.start, g.started, g.started, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledFault, Ordered: true},
		},
		{
			"second signal",
			[]func(g){
				g.start, g.started,
				func(g g) { g.signal(unix.SIGTERM); g.signal(unix.SIGTERM) }, g.exited,
				g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledSignal, Ordered: true},
		},
		{"the user stops it", []func(g){g.start, g.started, g.term}, jobStopping, ipc.Gone{}},
		{"the user stops it while forking", []func(g){g.start, g.term}, jobStopping, ipc.Gone{}},
		{"the user stops it before the start", []func(g){g.term, g.start}, jobStopping, ipc.Gone{}},
		{
			"exits when the user stops it",
			[]func(g){g.start, g.started, g.term, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Ordered: true},
		},
		{
			"the user stops it, and its grace is over",
			[]func(g){
				g.start, g.started, g.term, func(g g) { g.stop(time.Hour) },
				func(g g) { g.at(time.Minute) }, g.exited, g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledGrace, Ordered: true},
		},
		{
			"the user stops it after stop-at, and kill-by is later",
			[]func(g){
				g.start, g.started, func(g g) { g.at(time.Hour) }, g.term,
				func(g g) { g.at(time.Minute) }, g.exited, g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledGrace, Ordered: true},
		},
		{
			"the user stops it while it is killed",
			[]func(g){g.start, g.started, g.lost, g.term, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledLost, Ordered: true},
		},
		{
			"two signals before the start",
			[]func(g){
				g.term, g.term, g.start, func(g g) { g.refused(ipc.SpawnerTooLate) }, g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledSignal, Ordered: true},
		},
		{
			"the elector learns that kill-by has passed",
			[]func(g){g.freezing, func(g g) { g.at(2 * time.Hour) }, g.saidEnding},
			jobKilling,
			ipc.Gone{},
		},
		{
			"the elector learns that stop-at has passed",
			[]func(g){g.start, g.started, func(g g) { g.at(time.Hour) }, g.saidEnding},
			jobStopping,
			ipc.Gone{},
		},
		{"frozen", []func(g){g.frozen}, jobFrozen, ipc.Gone{}},
		{"not yet frozen", []func(g){g.freezing}, jobFreezing, ipc.Gone{}},
		{
			"frozen too late",
			[]func(g){g.freezing, func(g g) { g.seenFrozen(2 * time.Hour) }},
			jobFreezing,
			ipc.Gone{},
		},
		{
			"not frozen at kill-by",
			[]func(g){g.freezing, func(g g) { g.at(2 * time.Hour) }, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledKillBy, Ordered: true},
		},
		{
			"frozen at kill-by",
			[]func(g){g.frozen, func(g g) { g.at(100 * time.Hour) }},
			jobFrozen,
			ipc.Gone{},
		},
		{"thawing", []func(g){g.frozen, g.extend}, jobThawing, ipc.Gone{}},
		{"thawing before it was frozen", []func(g){g.freezing, g.extend}, jobThawing, ipc.Gone{}},
		{"thawed", []func(g){g.frozen, g.extend, g.freezerDone}, jobRunning, ipc.Gone{}},
		{
			"deadlines that have passed",
			[]func(g){
				g.frozen, func(g g) { g.saidFrozen(g.job.stopAt) },
				func(g g) { g.job.extended(ipc.Extend{KillBy: forever}, boottime.Now()) },
				func(g g) { g.saidFrozen(0) },
			},
			jobFrozen,
			ipc.Gone{},
		},
		{
			"deadlines that have passed, before it is seen frozen",
			[]func(g){
				g.freezing,
				func(g g) { g.job.extended(ipc.Extend{KillBy: forever}, boottime.Now()) },
				g.freezerDone, func(g g) { g.saidFrozen(0) },
			},
			jobFrozen,
			ipc.Gone{},
		},
		{
			"stop-at passes before it is thawed",
			[]func(g){g.frozen, g.extendHour, func(g g) { g.at(time.Hour) }},
			jobFreezing,
			ipc.Gone{},
		},
		{
			"kill-by passes before it is thawed",
			[]func(g){g.frozen, g.extendHour, func(g g) { g.at(2 * time.Hour) }},
			jobKilling,
			ipc.Gone{},
		},
		{
			"stop-at passes just before the deadlines come",
			[]func(g){
				func(g g) { g.cfg.Freeze = true }, g.start, g.started,
				func(g g) {
					g.job.extended(ipc.Extend{StopAt: forever, KillBy: forever},
						boottime.Now()+time.Hour)
				},
			},
			jobThawing,
			ipc.Gone{},
		},
		{
			"stop-at passes while forking",
			[]func(g){
				func(g g) { g.cfg.Freeze = true }, g.start, func(g g) { g.at(time.Hour) },
			},
			jobStopping,
			ipc.Gone{},
		},
		{
			"the user stops it while it is frozen",
			[]func(g){g.frozen, g.term, g.extend, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledFrozen, Ordered: true},
		},
		{"the user stops it while freezing", []func(g){g.freezing, g.term}, jobKilling, ipc.Gone{}},
		{
			"the user stops it while thawing",
			[]func(g){g.frozen, g.extend, g.term},
			jobKilling,
			ipc.Gone{},
		},
		{
			"somebody else thaws it",
			[]func(g){
				g.frozen, func(g g) { g.freezer.done.Store(0) },
				func(g g) { g.job.freezerDone(boottime.Now()) }, g.exited, g.nothingLeft,
			},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledThawed, Ordered: true},
		},
		{
			"a stop is asked for while it is frozen",
			[]func(g){g.frozen, func(g g) { g.stop(time.Hour) }},
			jobKilling,
			ipc.Gone{},
		},
		{
			"lease lost while frozen",
			[]func(g){g.frozen, g.lost, g.extend, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{Reason: ipc.KilledLost, Ordered: true},
		},
		{
			"it is killed by others while it is frozen",
			[]func(g){g.frozen, g.exited, g.nothingLeft},
			jobIdle,
			ipc.Gone{},
		},
		{
			"nothing to stop",
			[]func(g){func(g g) { g.stop(time.Hour) }, g.lost, g.extend},
			jobIdle,
			ipc.Gone{},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newTestGuard(t)
			var log bytes.Buffer
			g.log = slog.New(slog.NewTextHandler(&log, nil))
			for _, event := range c.events {
				event(g)
			}
			if g.job.state != c.state {
				t.Fatalf("the job is %s, want %s", g.job.state, c.state)
			}
			m, told := g.said(ipc.KindGone)
			if told != (c.state == jobIdle && g.starts > 0) && !g.elector.givenUp {
				t.Fatalf("the elector was told that the job is gone: %v", told)
			}
			got := m.Gone()
			got.Elapsed = 0
			// Without a stop or a kill it would read as how long the job ran.
			byItself := !got.Ordered && got.Reason == ipc.NotKilled
			if strings.Contains(log.String(), "job exited\" elapsed=") && byItself {
				t.Errorf("the job ended by itself: %s", &log)
			}
			if told && got != c.gone {
				t.Errorf("the elector was told %+v, want %+v", got, c.gone)
			}
		})
	}
}

// TestJob_ElectorHangsAtTheEnd: an elector that hangs while the daemon ends is replaced soon.
func TestJob_ElectorHangsAtTheEnd(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		g := newTestGuard(t)
		g.start()
		g.started()
		if stopped {
			g.term()
		}
		g.heardFromElector(boottime.Now())
		g.exited()
		g.nothingLeft()
		limit := ipc.Silence(g.cfg.TTL, true, time.Hour)
		if stopped {
			limit = 3 * time.Second
		}
		if wait := g.elector.checkAt - boottime.Now(); wait > limit || wait < limit-time.Second {
			t.Errorf("asked to stop %v: the elector may be silent for %v", stopped, wait)
		}
	}
}

// TestJob_ElectorIsSilentWhileFrozen: as long as without a job. On a busy machine an elector is
// silent for a while, and the third one that is replaced costs the job.
func TestJob_ElectorIsSilentWhileFrozen(t *testing.T) {
	g := newTestGuard(t)
	silent := func(want time.Duration, when string) {
		t.Helper()
		now := boottime.Now()
		g.heardFromElector(now)
		if got := g.elector.checkAt - now; got != want {
			t.Errorf("%s: the elector may be silent for %v, want %v", when, got, want)
		}
	}
	g.cfg.TTL = 5 * time.Second
	g.freezing()
	g.job.stopAt = boottime.Now()
	silent(500*time.Millisecond, "freezing")
	g.freezerDone()
	silent(2*time.Second, "frozen")
	g.job.extended(ipc.Extend{
		StopAt: boottime.Now() + time.Second, KillBy: boottime.Now() + time.Hour,
	}, boottime.Now())
	silent(500*time.Millisecond, "thawing")
}

// TestGuard_AllocatesNothing: neither while the job runs and the elector renews, nor while the job
// is killed and does not exit.
func TestGuard_AllocatesNothing(t *testing.T) {
	g := newTestGuard(t)
	g.start()
	g.started()
	number := int64(0)
	round := func() {
		number++
		_ = g.out.Send(ipc.Extend{
			StopAt: boottime.Now() + time.Hour,
			KillBy: boottime.Now() + 2*time.Hour,
		})
		_ = g.out.Send(ipc.Ping{Number: number})
		g.act(boottime.Now())
		g.poll()
		g.receive()
		_, _ = g.inbox.Fill(g.in)
		for _, ok := g.inbox.Next(); ok; _, ok = g.inbox.Next() {
		}
	}
	if allocs := testing.AllocsPerRun(200, round); allocs != 0 {
		t.Errorf("a round while the job runs allocates %v times", allocs)
	}
	if g.job.state != jobRunning || number < 200 {
		t.Fatalf("the job is %s after %d rounds", g.job.state, number)
	}
	g.lost()
	killRound := func() {
		for before := g.job.rounds; g.job.rounds == before; {
			g.act(boottime.Now())
			g.poll()
			g.receive()
		}
	}
	if allocs := testing.AllocsPerRun(20, killRound); allocs != 0 {
		t.Errorf("a round of the kill allocates %v times", allocs)
	}
	if g.job.state != jobKilling {
		t.Fatalf("the job is %s after %d rounds of the kill", g.job.state, g.job.rounds)
	}
}
