//go:build linux

package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// Config is what a guard needs to know.
type Config struct {
	Path       string   // the job's executable
	Argv       []string // its arguments, the name first
	Env        []string // its environment, to which the term's variables are added
	Election   string
	Identity   string
	TTL        time.Duration // as configured; bounds how long a silent elector is borne
	Margin     time.Duration // of the lease; bounds how long a silent spawner is borne after kill-by
	StopSignal unix.Signal
	NewPrivs   bool // the job may gain privileges, although what has gained them may not be killed

	Elector  []string                                         // argv of the elector; guard and cgroup are added
	Probe    []string                                         // argv of a process that sleeps
	Revoke   func(lease int64, within time.Duration) []string // argv of the process that revokes a lease; it reads the elector's token from its standard input
	Signals  <-chan os.Signal                                 // every signal that the process catches
	Children <-chan os.Signal                                 // SIGCHLD, apart, so that a flood of them displaces no other
	Ignored  []unix.Signal                                    // what the job ignores from its start; all else has its default
	Notify   func(state string)                               // tells systemd; never blocks
	Stopping string                                           // what it is told when a stop is asked for
	Turned   func()                                           // guard and elector both turn: for systemd's watchdog; never blocks
	Logger   *slog.Logger                                     // never blocks
}

// Exit codes of the guard that are no one else's (sysexits.h).
const (
	ExitInternal = 70 // elector or spawner lost: worth a restart
	ExitOS       = 71 // a process could not be started
)

// hurry is the time that the elector has to give the lease back after a second signal, and the revoking process after it.
const hurry = time.Second

const forever = time.Duration(1<<63 - 1)

// guard is the dead-man's switch. One locked thread runs loop; it alone waits for children and sends signals.
type guard struct {
	cfg     Config
	log     *slog.Logger
	cgroup  *proctree.Cgroup // nil: none
	procs   *proctree.Scanner
	spawner *spawner

	timer    int // timerfd on CLOCK_BOOTTIME
	wakeR    int // bytes from other goroutines, which mean: look
	wakeW    int
	in       int // the pipe pair: in and outbox
	inbox    ipc.Inbox
	outbox   ipc.Outbox
	fds      [6]unix.PollFd
	armed    time.Duration
	wakeBuf  [64]byte
	children []int // those that are not the job's: elector, spawner, revoke
	unreaped bool  // there may be more children to wait for

	noNewPrivs bool     // the job runs so
	sweep      chan int // cgroups before this one are not needed any more

	elector     int  // pid, 0: reaped
	electorFd   int  // pidfd
	electorGone bool // ended, or given up
	exitCode    int  // announced by the elector
	exitText    string
	exiting     bool
	lost        string        // which process of ours was lost, for the last line of the log
	inShut      bool          // the elector's pipe is at its end
	heard       time.Duration // when the elector last spoke
	look        time.Duration // when its silence is looked at next
	strikes     int

	lease    int64
	leaseTTL time.Duration
	tokenBuf [ipc.MaxText]byte
	token    []byte // in tokenBuf: what etcd takes for the elector's password
	revoke   int    // pid of the revoking process
	revokeBy time.Duration

	job      job
	pending  [65]atomic.Int32 // signals that were caught and wait for the loop, by number
	signals  int              // TERM and INT received
	serial   int32            // of the last start
	hurryBy  time.Duration    // after the second of them: when the elector must have ended; 0: there was none
	hurried  bool             // it had not
	tidyAt   time.Duration
	lateness time.Duration
}

// job is the state of the supervised command. The zero value: none.
type job struct {
	serial  int32 // of the start
	forking bool  // the spawner has not yet told what came of the start
	pid     int   // the first process; 0 once it has exited
	pidfd   int
	ended   time.Duration // when pidfd told of its exit, while the spawner has not
	alone   bool          // the spawner has seen that nothing of the job is left
	alive   bool          // from the request to start until dead
	started bool
	status  unix.WaitStatus

	stopAt, killBy, stopBy time.Duration
	stopping               bool // the stop signal was sent (or waits for the start)
	stopSince              time.Duration

	kill      ipc.KillReason // NotKilled: it is not being killed
	killSince time.Duration
	complain  time.Duration
	rounds    int
	nextRound time.Duration
}

// Run runs the guard until the elector has ended and nothing of the job is alive, and returns the process's exit code.
// It must be called once, from the main goroutine.
func Run(cfg Config) int {
	// A collection starts threads and makes the loop wait. What is allocated is little, and collected while no job lives.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(math.MaxInt64) // GOMEMLIMIT, meant for the job, would bring it back
	// With a processor to spare for each goroutine the loop never waits for one when a system call returns.
	runtime.GOMAXPROCS(6)
	runtime.LockOSThread()
	g := &guard{cfg: cfg, log: cfg.Logger, electorFd: -1, lost: "the elector", sweep: make(chan int, 1)}
	if code := g.open(); code != 0 {
		return code
	}
	defer g.close()
	return g.loop()
}

// open makes everything that the loop needs, so that the loop makes nothing.
func (g *guard) open() int {
	fail := func(deed string, err error) int {
		g.log.Error(deed, "err", err)
		g.close()
		return ExitOS
	}
	var err error
	g.timer, g.wakeR, g.wakeW, g.in, g.outbox.FD = -1, -1, -1, -1, -1
	g.inShut = true
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fail("become a child subreaper", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fail("set dumpable", err)
	}
	if g.procs, err = proctree.NewScanner(); err != nil {
		return fail("read /proc", err)
	}
	g.procs.Yield = g.readElector
	g.cgroup, err = proctree.NewCgroup(g.cfg.Probe)
	if errors.Is(err, proctree.ErrLeftover) {
		return fail("kill what a predecessor left", err)
	}
	if err != nil {
		g.log.Info("the job gets no cgroup of its own; its processes are found by their parentage", "reason", err.Error())
	}
	if g.timer, err = unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		return fail("make a timer", err)
	}
	var wake, toElector, fromElector [2]int
	for _, p := range []*[2]int{&wake, &toElector, &fromElector} {
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			return fail("make a pipe", err)
		}
	}
	g.wakeR, g.wakeW, g.in, g.outbox.FD = wake[0], wake[1], fromElector[0], toElector[1]

	g.noNewPrivs = g.wantsNoNewPrivs()
	if hidden := proctree.ProcHidden(); hidden != "" {
		g.log.Info("/proc hides processes: those of the job that it hides are found as children of the spawner", "mount_option", hidden)
	}
	if g.spawner, err = newSpawner(g.cfg, g.cgroup, g.procs.Proc, g.noNewPrivs); err != nil {
		return fail("start the spawner", err)
	}
	g.spawner.tell(ipc.SpawnerPrepare, 0)
	if g.cgroup != nil {
		go func() {
			for newest := range g.sweep {
				g.cgroup.Sweep(newest)
			}
		}()
	}
	go g.relaySignals()
	warmThreads(4)

	argv := append(append([]string{}, g.cfg.Elector...), strconv.Itoa(unix.Getpid()), strconv.Itoa(g.spawner.pid))
	if g.cgroup != nil {
		argv = append(argv, g.cgroup.Dir)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open "+os.DevNull, err)
	}
	g.inShut = false
	g.elector, err = syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{uintptr(null), 1, 2, uintptr(toElector[0]), uintptr(fromElector[1]), uintptr(g.spawner.elector), uintptr(g.spawner.pidfd)},
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &g.electorFd},
	})
	_ = unix.Close(null)
	_ = unix.Close(toElector[0])
	_ = unix.Close(fromElector[1])
	_ = unix.Close(g.spawner.elector)
	g.spawner.elector = -1
	if err != nil {
		g.elector = 0
		return fail("start the elector", err)
	}
	g.listen(boottime.Now())
	g.tidyAt = boottime.Now() + time.Second
	g.children = make([]int, 0, 3)
	g.listChildren()
	g.privileges()
	return 0
}

// close gives back what open made. The job is dead by now.
func (g *guard) close() {
	if g.spawner != nil {
		g.spawner.close()
	}
	if g.cgroup != nil {
		g.cgroup.Remove()
	}
	if g.procs != nil {
		g.procs.Close()
	}
	for _, fd := range []int{g.timer, g.wakeR, g.wakeW, g.in, g.outbox.FD, g.electorFd} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// privileges asks for what makes the loop's thread punctual, where it is permitted.
func (g *guard) privileges() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil {
		// Below a finite limit the lock would hold until that is reached, and then no memory could be had. With a limit of 0 it takes
		// a CAP_IPC_LOCK that counts, which one of a user namespace does not.
		none := unix.Rlimit{Max: limit.Max}
		if limit.Cur == unix.RLIM_INFINITY || unix.Setrlimit(unix.RLIMIT_MEMLOCK, &none) == nil {
			_ = unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
			_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit) // the job inherits it
		}
	}
	fifo := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Priority: 1}
	if unix.SchedSetAttr(0, &fifo, 0) == nil {
		return
	}
	nice := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Flags: unix.SCHED_FLAG_RESET_ON_FORK, Nice: -10}
	_ = unix.SchedSetAttr(0, &nice, 0)
}

// warmThreads makes the runtime create n threads and keep them, for where a fork storm has used up the process limit a
// thread that can't be created ends the process.
func warmThreads(n int) {
	var ready, done sync.WaitGroup
	ready.Add(n)
	for range n {
		done.Go(func() {
			runtime.LockOSThread() // a goroutine of its own thread while it waits for the others
			ready.Done()
			ready.Wait()
			runtime.UnlockOSThread()
		})
	}
	done.Wait()
}

// wantsNoNewPrivs reports whether the job must not gain privileges: without CAP_KILL a set-user-id process is out of our reach. A
// cgroup is no help, for such a process can leave it.
func (g *guard) wantsNoNewPrivs() bool {
	if proctree.HasCapability(unix.CAP_KILL) {
		return false
	}
	if !g.cfg.NewPrivs {
		g.log.Info("the job runs with no_new_privs: without CAP_KILL a set-user-id process could not be killed")
		return true
	}
	if set, _ := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); set == 0 {
		g.log.Warn("LEASEHOLD_NO_NEW_PRIVS=off, and the daemon lacks CAP_KILL: " +
			"a set-user-id process of the job that can't be killed may run beside the next job")
	}
	return false
}

// relaySignals hands what the runtime catches to the loop. The numbers wait in counters, so that none is lost to a full pipe.
func (g *guard) relaySignals() {
	for {
		var s os.Signal
		select {
		case s = <-g.cfg.Signals:
		case s = <-g.cfg.Children:
		}
		if n, ok := s.(syscall.Signal); ok && int(n) < len(g.pending) {
			g.pending[n].Add(1)
			g.poke()
		}
	}
}

// poke wakes the loop. A full pipe means that it has enough to wake up for.
func (g *guard) poke() { _, _ = unix.Write(g.wakeW, wakeByte) }

var wakeByte = []byte{0}

// loop is the guard. Each turn looks at the clock first, kills what is to be killed, and only then hears what there is to hear.
func (g *guard) loop() int {
	for {
		now := boottime.Now()
		g.serveDeadlines(now)
		g.serveElectorSilence(now)
		if g.job.kill != ipc.NotKilled {
			g.killRound()
		}
		if g.ended() {
			return g.exit()
		}
		g.poll()
		g.hear()
		g.hearSpawner()
		g.reap()
		g.tidy(now)
	}
}

// poll waits for the next thing to do. While a kill is under way that is soon.
func (g *guard) poll() {
	next := g.nextDeadline()
	if next != g.armed {
		spec := unix.ItimerSpec{}
		if next != forever {
			spec.Value = unix.NsecToTimespec(int64(max(next, 1)))
		}
		_ = unix.TimerfdSettime(g.timer, unix.TFD_TIMER_ABSTIME, &spec, nil)
		g.armed = next
	}
	// An elector that has exited and can't be reaped is a zombie that a tracer holds: the tracer's end comes as a SIGCHLD. It is not
	// polled in every other turn, which sleeps for a while.
	held := g.elector != 0 && g.fds[3].Revents != 0
	g.fds = [6]unix.PollFd{
		{Fd: int32(g.timer), Events: unix.POLLIN},
		{Fd: int32(g.in), Events: unix.POLLIN},
		{Fd: int32(g.wakeR), Events: unix.POLLIN},
		{Fd: int32(g.electorFd), Events: unix.POLLIN},
		{Fd: -1, Events: unix.POLLIN},
		{Fd: int32(g.spawner.sock), Events: unix.POLLIN},
	}
	if g.inShut {
		g.fds[1].Fd = -1
	}
	if g.elector == 0 || held {
		g.fds[3].Fd = -1
	}
	if g.job.pid != 0 && g.job.ended == 0 { // else it would wake us again and again
		g.fds[4].Fd = int32(g.job.pidfd)
	}
	if g.spawner.pid == 0 {
		g.fds[5].Fd = -1
	}
	var timeout *unix.Timespec
	var soon unix.Timespec
	switch {
	case g.unreaped:
		timeout = &soon
	case g.job.kill != ipc.NotKilled:
		soon = unix.NsecToTimespec(int64(min(max(g.job.nextRound-boottime.Now(), 0), 100*time.Millisecond)))
		timeout = &soon
	case held:
		soon = unix.NsecToTimespec(int64(50 * time.Millisecond))
		timeout = &soon
	}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&g.fds[0])), uintptr(len(g.fds)), uintptr(unsafe.Pointer(timeout)), 0, 0, 0)
	if g.fds[0].Revents != 0 {
		_, _ = unix.Read(g.timer, g.wakeBuf[:8])
		g.armed = 0
	}
	if g.fds[4].Revents != 0 {
		g.job.ended = boottime.Now()
	}
}

// nextDeadline is the earliest of all that the clock alone brings about.
func (g *guard) nextDeadline() time.Duration {
	next := forever
	if j := &g.job; j.alive && j.kill == ipc.NotKilled {
		next = min(next, j.killBy)
		if !j.stopping {
			next = min(next, j.stopAt)
		} else {
			next = min(next, j.stopBy)
		}
	}
	if j := &g.job; j.kill == ipc.NotKilled && j.ended != 0 {
		next = min(next, j.ended+exitPause)
	}
	if g.spawner.waiting && g.job.kill == ipc.NotKilled {
		next = min(next, g.spawner.looked+g.spawnerPause(0)/3)
	}
	if g.elector != 0 && !g.electorGone {
		next = min(next, g.look)
		if g.hurryBy != 0 && !g.job.alive {
			next = min(next, g.hurryBy)
		}
	}
	if g.revoke != 0 {
		next = min(next, g.revokeBy)
	}
	return next
}

// serveDeadlines does what stop-at, kill-by and the grace demand.
func (g *guard) serveDeadlines(now time.Duration) {
	j := &g.job
	if j.alive && j.kill == ipc.NotKilled {
		switch {
		case now >= j.killBy:
			g.beginKill(ipc.KilledKillBy)
			g.late(now - j.killBy)
		case j.stopping && now >= j.stopBy:
			g.beginKill(ipc.KilledGrace)
			g.late(now - j.stopBy)
		case !j.stopping && now >= j.stopAt:
			g.beginStop(now, forever)
			g.late(now - j.stopAt)
			g.log.Warn("stop-at has passed without a renewal: the job is told to stop", "signal", g.cfg.StopSignal.String(), "kill_by_in", (j.killBy - now).Round(time.Millisecond).String())
		}
	}
	if j.alive && j.kill == ipc.NotKilled && j.ended != 0 && now >= j.ended+exitPause {
		g.log.Warn("the job's first process has exited and is not reaped: something traces it, or the spawner hangs", "pid", j.pid)
		g.beginKill(ipc.KilledLeftover)
	}
	g.serveSpawnerSilence(now)
	if g.hurryBy != 0 && now >= g.hurryBy && !g.job.alive && g.elector != 0 && !g.electorGone {
		g.log.Error("the elector has not ended within " + hurry.String() + " of the second signal: it is killed")
		g.hurried = true
		g.loseElector()
	}
	if g.revoke != 0 && now >= g.revokeBy {
		_ = unix.Kill(g.revoke, unix.SIGKILL)
		g.revokeBy = now + time.Second // it may be frozen
	}
}

// exitPause is for how long the spawner may take to tell of an exit that the guard sees.
const exitPause = time.Second

// spawnerPause is for how long the spawner may do nothing of what it was asked for. Where kill-by has passed, or the next leader may
// be starting, that is half the margin, for the guard needs the rest to kill all by itself.
func (g *guard) spawnerPause(now time.Duration) time.Duration {
	if j := &g.job; j.kill == ipc.KilledLost || j.kill != ipc.NotKilled && now >= j.killBy {
		return max(g.cfg.Margin/2, 50*time.Millisecond) // what a busy processor may keep it from turning
	}
	return max(g.cfg.TTL/3, time.Second)
}

// serveSpawnerSilence gives up a spawner that was asked for something and does not turn. All of the job falls to the guard then. As
// with the elector, its silence must outlast three looks.
func (g *guard) serveSpawnerSilence(now time.Duration) {
	s := g.spawner
	switch pause := g.spawnerPause(now); {
	case !s.waiting:
	case s.hasTurned(now):
		s.waiting = g.job.kill != ipc.NotKilled && !g.job.alone // a spawner that kills turns again and again
	case now >= s.looked+pause/3:
		s.looked = now
		if s.missed++; s.missed >= 3 {
			g.log.Error("the spawner hangs: it is killed", "elapsed", (now - s.turned).String())
			s.waiting = false
			s.kill()
		}
	}
}

// late keeps how late a deadline was served, and tells it. What it led to is under way already.
func (g *guard) late(d time.Duration) {
	g.lateness = max(g.lateness, d)
	g.tell(ipc.TimerLatency{By: d})
}

// listen notes that the elector has spoken. While a job lives it may be silent until kill-by, else for a TTL.
func (g *guard) listen(now time.Duration) {
	g.heard, g.strikes = now, 0
	if g.job.alive {
		g.look = max(g.job.killBy, now+g.cfg.TTL/10)
	} else {
		g.look = now + max(g.cfg.TTL, 5*time.Second)
	}
}

// serveElectorSilence gives up an elector that says nothing. Its silence must outlast three looks, so that a pause of the
// guard's own, or of the host, is not held against it.
func (g *guard) serveElectorSilence(now time.Duration) {
	if g.elector == 0 || g.electorGone || now < g.look {
		return
	}
	g.look = now + g.cfg.TTL/10
	if g.strikes++; g.strikes < 3 {
		return
	}
	g.log.Error("the elector is silent: it is killed", "elapsed", (now - g.heard).String())
	g.loseElector()
}

// loseElector kills the elector, if it still lives, and the job with it.
func (g *guard) loseElector() {
	if g.elector != 0 {
		proctree.SignalPidfd(g.electorFd, unix.SIGKILL)
	}
	g.electorGone = true
	if g.job.alive && g.job.kill == ipc.NotKilled {
		g.beginKill(ipc.KilledElector)
	}
}

// beginStop asks the job to stop and has it killed at stopBy, or at kill-by if that is earlier.
func (g *guard) beginStop(now, stopBy time.Duration) {
	j := &g.job
	j.stopBy = stopBy
	if j.stopping {
		return
	}
	j.stopping, j.stopSince = true, now
	if j.pid != 0 {
		proctree.SignalPidfd(j.pidfd, g.cfg.StopSignal)
	}
}

// beginKill starts the kill. The first blow falls here, before anything else is done.
func (g *guard) beginKill(reason ipc.KillReason) {
	j := &g.job
	if !j.alive || j.kill != ipc.NotKilled {
		return
	}
	if j.forking {
		atomic.StoreInt32(&g.spawner.area.cancelled, j.serial)
	}
	if !j.alone && g.spawner.pid != 0 {
		g.spawner.tell(ipc.SpawnerKill, j.serial)
	}
	if reason != ipc.KilledLeftover {
		g.strike()
	}
	j.kill, j.killSince, j.rounds = reason, boottime.Now(), 0
	j.complain = j.killSince + 10*time.Second
}

// strike kills everything that can be named without reading the process table. The cgroup comes last, for the kernel may keep its
// killer waiting (cgroup_mutex); the spawner kills by descent beside it.
func (g *guard) strike() {
	if g.job.pid != 0 {
		proctree.SignalPidfd(g.job.pidfd, unix.SIGKILL)
	}
	if g.cgroup == nil || g.spawner.pid == 0 {
		g.procs.KillListed(g.root(), g.children...)
	}
	if g.cgroup != nil {
		g.cgroup.KillAll()
	}
}

// root is the process from which all of the job descends.
func (g *guard) root() int {
	if g.spawner.pid != 0 {
		return g.spawner.pid
	}
	return g.procs.Self
}

// killRound kills what is left and looks if that was all.
func (g *guard) killRound() {
	j := &g.job
	g.hearSpawner()
	g.reap()
	if g.dead() {
		g.buried()
		return
	}
	began := boottime.Now()
	if began < j.nextRound {
		return
	}
	g.strike()
	// Reading the process table takes milliseconds. Where the first process or the cgroup is all there is, that is lost time.
	if j.rounds++; j.rounds > 8 || g.cgroup == nil && j.pid == 0 {
		g.procs.KillDescendants(g.root(), g.children...)
	}
	j.nextRound = began + g.roundPause(boottime.Now()-began)
	g.hearSpawner()
	g.reap()
	if g.dead() {
		g.buried()
		return
	}
	if now := boottime.Now(); now >= j.complain {
		j.complain = now + 10*time.Second
		g.log.Error("the job can't be killed; the lease is held on to", "elapsed", (now - j.killSince).Round(time.Second).String(), "pid", j.pid)
	}
}

// roundPause is the time from the beginning of a round to the next one. The first follow each other at once: what was killed is gone
// after some 100 µs. Thousands of processes take seconds to exit, and need the processor for that: most of it is left to them
// where the kernel has killed them all at one stroke, and half of it where they may still fork.
func (g *guard) roundPause(took time.Duration) time.Duration {
	pause, share := 100*time.Microsecond, 1
	switch r := g.job.rounds; {
	case r > 1000:
		pause = 100 * time.Millisecond
	case r > 100:
		pause = 5 * time.Millisecond
	case r > 10:
		pause = time.Millisecond
	}
	if g.cgroup != nil {
		share = 4
	}
	return took + max(pause, time.Duration(share)*took)
}

// dead reports whether nothing of the job is left: no start under way, nothing in the cgroup, and no child of the spawner, or of ours
// where the spawner is gone. A process state would not do: a process whose main thread has gone shows Z while its other threads run.
func (g *guard) dead() bool {
	j := &g.job
	switch {
	case j.forking || j.pid != 0 || g.cgroup != nil && g.cgroup.Populated():
		return false
	case g.spawner.pid != 0:
		return j.alone
	}
	left, known := g.procs.Children(g.noNewPrivs, g.children...)
	return known && left == 0
}

// buried tells of the job's death.
func (g *guard) buried() {
	j := &g.job
	now := boottime.Now()
	elapsed := now - j.killSince
	if j.stopping {
		elapsed = now - j.stopSince
	}
	if j.pidfd >= 0 && j.started {
		proctree.CloseRaw(j.pidfd)
	}
	reason := j.kill
	if reason == ipc.KilledLeftover && j.rounds == 0 {
		reason = ipc.NotKilled
	}
	g.tell(ipc.Gone{Elapsed: elapsed, Reason: reason, Ordered: j.stopping || reason != ipc.NotKilled && reason != ipc.KilledLeftover})
	attrs := []any{"elapsed", elapsed.String()}
	if j.started {
		attrs = append(attrs, "exit_code", proctree.ExitOf(j.status).Code, "signal", proctree.ExitOf(j.status).Signal)
	}
	if reason != ipc.NotKilled {
		attrs = append(attrs, "reason", reason.Label())
	}
	if g.lateness > 0 {
		attrs = append(attrs, "guard_lateness", g.lateness.String())
	}
	g.log.Info("the job is dead", attrs...)
	g.lateness = 0
	g.job = job{}
	g.spawner.waiting = false
	if g.signals > 1 {
		g.hurryBy = now + hurry // until now it was needed, to renew the lease
	}
	// An elector whose job is dead pings once a second.
	g.strikes, g.look = 0, max(g.look, now+3*time.Second)
	g.tidyAt = now + time.Second
}

// tell sends a message to the elector. One that does not read is as good as dead. One that has closed its end is at its end:
// the pidfd will tell.
func (g *guard) tell(message any) {
	if g.electorGone || !errors.Is(g.outbox.Send(message), ipc.ErrFull) {
		return
	}
	g.log.Error("the elector does not read: it is killed")
	g.loseElector()
}

// hear takes in signals and messages.
func (g *guard) hear() {
	if g.fds[2].Revents != 0 {
		_, _ = unix.Read(g.wakeR, g.wakeBuf[:])
		for n := range g.pending {
			for ; g.pending[n].Load() > 0; g.pending[n].Add(-1) {
				g.signal(unix.Signal(n))
			}
		}
	}
	if g.fds[1].Revents != 0 {
		g.readElector()
	}
}

// readElector takes in the elector's messages. It is called in the middle of a long kill too, for a ping must not wait for that.
// End-of-file decides nothing: the pidfd tells if the elector is gone, and its silence if it is no use.
func (g *guard) readElector() {
	if g.inShut {
		return
	}
	if _, err := g.inbox.Fill(g.in); err != nil {
		g.inShut = true
		return
	}
	for {
		m, ok := g.inbox.Next()
		if !ok {
			return
		}
		g.message(m)
		g.listen(boottime.Now())
	}
}

// signal acts on a signal that the guard received.
func (g *guard) signal(s unix.Signal) {
	switch s {
	case unix.SIGCHLD: // the loop reaps at each turn
	case unix.SIGTERM, unix.SIGINT:
		if g.signals++; g.signals == 1 {
			g.cfg.Notify(g.cfg.Stopping)
		}
		if g.signals == 2 {
			g.hurryBy = boottime.Now() + hurry
			g.revokeBy = min(g.revokeBy, g.hurryBy+hurry)
		}
		if g.signals > 1 {
			g.beginKill(ipc.KilledSignal)
		}
		g.tell(ipc.Signal{Signal: s})
	case unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGQUIT:
		if g.job.pid != 0 {
			proctree.SignalPidfd(g.job.pidfd, s)
		}
	}
}

// message acts on a message of the elector's.
func (g *guard) message(m ipc.Message) {
	j := &g.job
	now := boottime.Now()
	switch m.Kind {
	case ipc.KindPing:
		g.tell(ipc.Pong(m.Ping()))
		g.cfg.Turned()
	case ipc.KindReady:
		g.cfg.Notify("READY=1")
	case ipc.KindStatus:
		g.cfg.Notify("STATUS=" + m.Status().Text)
	case ipc.KindLease:
		lease := m.Lease()
		g.lease, g.leaseTTL = lease.ID, lease.TTL
	case ipc.KindToken:
		g.token = append(g.tokenBuf[:0], m.Token().Value...)
	case ipc.KindStart:
		g.start(m.Start())
	case ipc.KindExtend:
		// Once stop-at has passed, nothing moves the deadlines of this job any more. A planned stop is another thing.
		if j.alive && now < j.stopAt {
			later := m.Extend()
			j.stopAt, j.killBy = later.StopAt, later.KillBy
			atomic.StoreInt64(&g.spawner.area.stopAt, int64(later.StopAt)) // for a start that is still under way
		}
	case ipc.KindStop:
		switch grace := m.Stop().Grace; {
		case !j.alive || j.kill != ipc.NotKilled:
		case grace == 0:
			g.beginKill(ipc.KilledLost)
		case grace == ipc.UntilKillBy:
			g.beginStop(now, forever)
		default:
			g.beginStop(now, now+grace)
		}
	case ipc.KindExiting:
		exiting := m.Exiting()
		g.exiting, g.exitCode, g.exitText = true, exiting.Code, exiting.Why
	}
}

// start has the job started, unless it is too late.
func (g *guard) start(m ipc.Start) {
	if g.electorGone {
		return
	}
	if g.job.alive {
		g.log.Error("the elector asks for a start while the job lives: it is killed")
		g.loseElector()
		return
	}
	serial := g.serial + 1
	g.serial = serial
	g.job = job{serial: serial, forking: true, pidfd: -1, alive: true, stopAt: m.StopAt, killBy: m.KillBy, stopBy: forever}
	if err := g.spawner.setTerm(termEnvironment(g.cfg, m)); err != nil {
		g.refused(int32(unix.E2BIG))
		return
	}
	atomic.StoreInt64(&g.spawner.area.stopAt, int64(m.StopAt))
	g.spawner.tell(ipc.SpawnerStart, serial)
	if g.signals > 1 {
		g.beginKill(ipc.KilledSignal)
	}
}

// hearSpawner takes in what the spawner says.
func (g *guard) hearSpawner() {
	for g.spawner.pid != 0 {
		fd, ok := g.spawner.hear()
		if !ok {
			if (g.fds[5].Revents&unix.POLLHUP != 0 || g.job.kill != ipc.NotKilled) && proctree.PidfdExited(g.spawner.pidfd) {
				g.spawnerEnded() // though a tracer may keep it from being reaped
			}
			return
		}
		m, j := g.spawner.got, &g.job
		if !j.alive || m.Serial != j.serial { // an answer to a kill that was not needed any more
			if fd >= 0 {
				proctree.CloseRaw(fd)
			}
			continue
		}
		switch m.Kind {
		case ipc.SpawnerStarted:
			g.started(int(m.Value), fd)
		case ipc.SpawnerRefused:
			j.alone = true // it has no child yet, or no more
			g.refused(m.Value)
		case ipc.SpawnerExited:
			j.alone, j.forking = m.Extra == 1, false
			g.jobEnded(unix.WaitStatus(m.Value))
		case ipc.SpawnerGone:
			j.alone, j.forking = true, false
			if j.pid != 0 {
				g.jobEnded(unix.WaitStatus(unix.SIGKILL))
			}
		}
	}
}

// started follows a start that has come to its exec.
func (g *guard) started(pid, pidfd int) {
	j := &g.job
	j.forking, j.started, j.pid, j.pidfd = false, true, pid, pidfd
	g.tell(ipc.Started{PID: pid})
	switch {
	case j.kill != ipc.NotKilled:
		g.strike()
	case j.stopping:
		proctree.SignalPidfd(j.pidfd, g.cfg.StopSignal)
	}
}

// refused follows a start that came to nothing.
func (g *guard) refused(errno int32) {
	j := &g.job
	j.forking = false
	if errno == ipc.SpawnerTooLate {
		j.stopping, j.stopSince = true, boottime.Now() // by us, and not by itself
	} else {
		err := unix.Errno(errno)
		g.tell(ipc.Refused{Code: startCode(err), Why: err.Error()})
		g.log.Error(fmt.Sprintf("start job %q", g.cfg.Path), "err", err)
	}
	g.beginKill(ipc.KilledLeftover)
}

// startCode is the exit code of a job that could not be started, as a shell has it.
func startCode(err error) int {
	switch {
	case errors.Is(err, unix.ENOENT):
		return 127
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return ExitOS
	}
	return 126
}

// reapsPerRound bounds for how long a round reaps. The kernel looks through all children that live each time, and a guard that is
// process 1 has those of others.
const reapsPerRound = 64

// reap waits for the children that have exited: our own, and the orphans that fall to us.
func (g *guard) reap() {
	g.unreaped = false
	for range reapsPerRound {
		var ws unix.WaitStatus
		pid, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, ^uintptr(0), uintptr(unsafe.Pointer(&ws)), unix.WNOHANG|unix.WALL, 0, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || pid == 0 {
			return
		}
		switch int(pid) {
		case g.elector:
			g.electorEnded(ws)
		case g.spawner.pid, g.spawner.zombie:
			if g.hearSpawner(); g.spawner.pid != 0 { // its last words first
				g.spawnerEnded()
			}
			g.spawner.zombie = 0
			g.listChildren()
		case g.revoke:
			g.revokeEnded(ws)
		case g.job.pid:
			g.jobEnded(ws)
		}
	}
	g.unreaped = true
}

// spawnerEnded follows the end of the spawner. The kernel has killed the job's first process, and what descends from that falls to us.
func (g *guard) spawnerEnded() {
	j := &g.job
	g.spawner.pid, g.spawner.zombie, g.spawner.waiting, g.lost = 0, g.spawner.pid, false, "the spawner"
	g.listChildren()
	j.forking = false
	if j.pid != 0 {
		var ws unix.WaitStatus
		if pid, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, uintptr(j.pid), uintptr(unsafe.Pointer(&ws)), unix.WNOHANG|unix.WALL, 0, 0, 0); errno == unix.ECHILD || int(pid) == j.pid {
			g.jobEnded(ws) // reaped by the spawner, which could not tell any more, or just now
		}
	}
	if g.exiting && !j.alive {
		return
	}
	g.exiting = false
	g.log.Error("the spawner has ended: the job is killed and the lease revoked")
	g.beginKill(ipc.KilledSpawner)
	g.loseElector()
}

// jobEnded follows the end of the first process: with it ends the job, and what it left behind is killed.
func (g *guard) jobEnded(ws unix.WaitStatus) {
	j := &g.job
	j.pid, j.ended, j.status = 0, 0, ws
	exit := proctree.ExitOf(ws)
	g.tell(ipc.Exited(exit))
	g.beginKill(ipc.KilledLeftover)
}

// electorEnded tells an elector that has said goodbye from one that was lost.
func (g *guard) electorEnded(ws unix.WaitStatus) {
	g.elector = 0
	g.listChildren()
	for !g.inShut { // its last words may still be in the pipe
		if more, err := g.inbox.Fill(g.in); !more || err != nil {
			break
		}
		for m, ok := g.inbox.Next(); ok; m, ok = g.inbox.Next() {
			if m.Kind == ipc.KindExiting || m.Kind == ipc.KindLease || m.Kind == ipc.KindToken {
				g.message(m)
			}
		}
	}
	g.inShut = true
	if g.exiting && !g.job.alive {
		g.electorGone = true
		return
	}
	g.exiting = false
	g.loseElector()
	g.log.Error("the elector has ended: the job is killed and the lease revoked", "exit_code", proctree.ExitOf(ws).Code, "signal", proctree.ExitOf(ws).Signal)
}

// listChildren lists the children that are not the job's.
func (g *guard) listChildren() {
	g.children = g.children[:0]
	for _, pid := range [...]int{g.elector, g.spawner.pid, g.spawner.zombie, g.revoke} {
		if pid != 0 {
			g.children = append(g.children, pid)
		}
	}
}

// ended says if there is nothing left to do. When the elector was lost the lease is revoked first, and never before the job is dead.
func (g *guard) ended() bool {
	if g.elector != 0 || g.job.alive || g.revoke != 0 || !g.electorGone {
		return false
	}
	if g.exiting || g.lease == 0 {
		return true
	}
	g.startRevoke()
	return g.revoke == 0
}

func (g *guard) startRevoke() {
	lease := g.lease
	g.lease = 0
	within := max(g.leaseTTL, g.cfg.TTL)
	if g.hurryBy != 0 {
		within = 2 * hurry
	}
	// The token goes by a pipe, where no other user can read it. It fits into that whole.
	var token [2]int
	err := unix.Pipe2(token[:], unix.O_CLOEXEC)
	if err == nil {
		_, _ = unix.Write(token[1], g.token) // without it the revoking process takes the password
		_ = unix.Close(token[1])
		g.revoke, err = syscall.ForkExec("/proc/self/exe", g.cfg.Revoke(lease, within), &syscall.ProcAttr{
			Env: os.Environ(), Files: []uintptr{uintptr(token[0]), 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
		})
		_ = unix.Close(token[0])
	}
	if err != nil {
		g.revoke = 0
		g.log.Error("the lease could not be revoked and will expire", "lease", strconv.FormatInt(lease, 16), "err", err)
		return
	}
	g.revokeBy = boottime.Now() + within
	g.listChildren()
}

func (g *guard) revokeEnded(ws unix.WaitStatus) {
	g.revoke = 0
	g.listChildren()
	if proctree.ExitOf(ws).Code != 0 {
		g.log.Warn("the lease could not be revoked and will expire", "exit_code", proctree.ExitOf(ws).Code, "signal", proctree.ExitOf(ws).Signal)
	}
}

// exit is the process's exit code.
func (g *guard) exit() int {
	if g.exiting {
		level := slog.LevelInfo
		if g.exitCode != 0 {
			level = slog.LevelError
		}
		g.log.Log(context.Background(), level, "exiting: "+g.exitText, "exit_code", g.exitCode)
		return g.exitCode
	}
	if g.hurried { // nothing of what was asked for is left undone
		g.log.Warn("exiting: planned stop; the elector was killed", "exit_code", 0)
		return 0
	}
	g.log.Error(g.lost+" is lost: exiting to be started again", "exit_code", ExitInternal)
	return ExitInternal
}

// tidy does, a while after a job's death, what nobody waits for: it gets ready for the next start, and does what the garbage
// collector may not do while a job lives.
func (g *guard) tidy(now time.Duration) {
	if g.job.alive || g.electorGone || now < g.tidyAt {
		return
	}
	g.tidyAt = now + time.Minute
	g.spawner.tell(ipc.SpawnerPrepare, 0)
	select {
	case g.sweep <- int(atomic.LoadInt32(&g.spawner.area.leaf)):
	default: // it has not come to the last one yet
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 4<<20 {
		runtime.GC()
	}
}

// termEnvironment is what the job's environment has of its term.
func termEnvironment(cfg Config, t ipc.Start) []string {
	return []string{
		"LEASEHOLD_ELECTION=" + cfg.Election,
		"LEASEHOLD_IDENTITY=" + cfg.Identity,
		"LEASEHOLD_KEY=" + t.Key,
		"LEASEHOLD_FENCING_TOKEN=" + strconv.FormatInt(t.Token, 10),
		"LEASEHOLD_LEASE_ID=" + strconv.FormatInt(t.LeaseID, 16),
	}
}
