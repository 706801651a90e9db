//go:build linux

package supervisor

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
)

// GuardConfig is what a guard needs to know.
type GuardConfig struct {
	Path       string   // the job's executable
	Argv       []string // its arguments, the name first
	Env        []string // its environment, to which the term's variables are added
	Election   string
	Identity   string
	TTL        time.Duration // as configured; bounds how long a silent elector is borne
	StopSignal unix.Signal

	Elector  []string                                         // argv of the elector; guard and cgroup are added
	Probe    []string                                         // argv of a process that sleeps
	Revoke   func(lease int64, within time.Duration) []string // argv of the process that revokes a lease
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
	ExitInternal = 70 // elector or guard lost: worth a restart
	ExitOS       = 71 // a process could not be started
)

// Kill reasons, as the logs and leasehold_job_kills_total{reason} have them.
const (
	killNone      = iota
	killGrace     // the grace of a planned stop was over
	killBy        // kill-by passed
	killLost      // the lease or the key is lost
	killElector   // the elector is gone
	killSignal    // a second signal
	killLeftover  // the first process ended and left others behind
	killGuardGone // the elector killed the job in the guard's stead
)

// KillReasons are the values of the reason label.
var killReasons = [...]string{"none", "grace", "kill_by", "lost", "elector_gone", "second_signal", "left_behind", "guard_gone"}

var errTooLate = errors.New("stop-at has passed")

const forever = time.Duration(1<<63 - 1)

// guard is the dead-man's switch. One locked thread runs loop; it alone waits for children and sends signals.
type guard struct {
	cfg    GuardConfig
	log    *slog.Logger
	cgroup *cgroup // nil: none
	procs  *scanner
	forker *forker

	timer    int // timerfd on CLOCK_BOOTTIME
	wakeR    int // bytes from other goroutines, which mean: look
	wakeW    int
	in, out  int // the pipe pair
	inbox    inbox
	sendBuf  [maxMessage]byte
	fds      [5]unix.PollFd
	armed    time.Duration
	wakeBuf  [64]byte
	children []int // those that are not the job's: elector, revoke

	elector     int  // pid, 0: reaped
	electorFd   int  // pidfd
	electorGone bool // ended, or given up
	exitCode    int  // announced by the elector
	exitText    string
	exiting     bool
	inShut      bool          // the elector's pipe is at its end
	heard       time.Duration // when the elector last spoke
	look        time.Duration // when its silence is looked at next
	strikes     int

	lease    int64
	leaseTTL time.Duration
	revoke   int // pid of the revoking process
	revokeBy time.Duration

	job      job
	pending  [65]atomic.Int32 // signals that were caught and wait for the loop, by number
	signals  int              // TERM and INT received
	tidyAt   time.Duration
	lateness time.Duration
}

// job is the state of the supervised command. The zero value: none.
type job struct {
	forking *start
	pid     int // the first process; 0 once reaped
	pidfd   int
	alive   bool // from the request to start until dead
	started bool
	status  unix.WaitStatus

	stopAt, killBy, stopBy time.Duration
	stopping               bool // the stop signal was sent (or waits for the start)
	stopSince              time.Duration

	kill      int // reason; killNone: not being killed
	killSince time.Duration
	complain  time.Duration
	rounds    int
}

// RunGuard runs the guard until the elector has ended and nothing of the job is alive, and returns the process's exit code.
// It must be called once, from the main goroutine.
func RunGuard(cfg GuardConfig) int {
	// A collection starts threads and makes the loop wait. What is allocated is little, and collected while no job lives.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(math.MaxInt64) // GOMEMLIMIT, meant for the job, would bring it back
	// With a processor to spare for each goroutine the loop never waits for one when a system call returns.
	runtime.GOMAXPROCS(6)
	runtime.LockOSThread()
	g := &guard{cfg: cfg, log: cfg.Logger, elector: 0, electorFd: -1}
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
	g.timer, g.wakeR, g.wakeW, g.in, g.out = -1, -1, -1, -1, -1
	g.inShut = true
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fail("become a child subreaper", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fail("set dumpable", err)
	}
	if g.procs, err = newScanner(); err != nil {
		return fail("read /proc", err)
	}
	g.procs.breathe = g.readElector
	g.cgroup, err = newCgroup(g.cfg.Probe)
	if errors.Is(err, errLeftover) {
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
	g.wakeR, g.wakeW, g.in, g.out = wake[0], wake[1], fromElector[0], toElector[1]

	g.forker = &forker{cgroup: g.cgroup, ignored: g.cfg.Ignored, now: Now, requests: make(chan *start, 2), wake: g.poke}
	if g.cgroup == nil && !hasCapability(unix.CAP_KILL) {
		g.forker.noNewPrivs = true
		g.log.Info("the job runs with no_new_privs: without a cgroup or CAP_KILL, a set-user-id process could not be killed")
	}
	go g.forker.run()
	go g.relaySignals()
	warmThreads(4)

	argv := append(append([]string{}, g.cfg.Elector...), strconv.Itoa(unix.Getpid()))
	if g.cgroup != nil {
		argv = append(argv, g.cgroup.dir)
	}
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail("open "+os.DevNull, err)
	}
	g.inShut = false
	g.elector, err = syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: []uintptr{uintptr(null), 1, 2, uintptr(toElector[0]), uintptr(fromElector[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &g.electorFd},
	})
	_ = unix.Close(null)
	_ = unix.Close(toElector[0])
	_ = unix.Close(fromElector[1])
	if err != nil {
		g.elector = 0
		return fail("start the elector", err)
	}
	g.listen(Now())
	g.tidyAt = Now() + time.Second
	g.children = append(make([]int, 0, 2), g.elector)
	g.privileges()
	return 0
}

// close gives back what open made. The job is dead by now.
func (g *guard) close() {
	if g.cgroup != nil {
		g.cgroup.remove()
	}
	if g.procs != nil {
		g.procs.close()
	}
	for _, fd := range []int{g.timer, g.wakeR, g.wakeW, g.in, g.out, g.electorFd} {
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

// hasCapability says if this process has the capability in effect (capget(2)).
func hasCapability(capability int) bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
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
		now := Now()
		g.serveDeadlines(now)
		g.serveElectorSilence(now)
		if g.job.kill != killNone {
			g.killRound()
		}
		if g.ended() {
			return g.exit()
		}
		g.poll()
		g.hear()
		g.takeStart()
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
	g.fds = [5]unix.PollFd{
		{Fd: int32(g.timer), Events: unix.POLLIN},
		{Fd: int32(g.in), Events: unix.POLLIN},
		{Fd: int32(g.wakeR), Events: unix.POLLIN},
		{Fd: int32(g.electorFd), Events: unix.POLLIN},
		{Fd: -1, Events: unix.POLLIN},
	}
	if g.inShut {
		g.fds[1].Fd = -1
	}
	if g.elector == 0 || g.electorGone && g.job.forking != nil {
		g.fds[3].Fd = -1
	}
	if g.job.pid != 0 {
		g.fds[4].Fd = int32(g.job.pidfd)
	}
	var timeout *unix.Timespec
	var soon unix.Timespec
	if g.job.kill != killNone {
		// The first rounds follow each other at once: what was killed is gone after some 100 µs.
		pause := 100 * time.Microsecond
		switch r := g.job.rounds; {
		case r > 1000:
			pause = 100 * time.Millisecond
		case r > 100:
			pause = 5 * time.Millisecond
		case r > 10:
			pause = time.Millisecond
		}
		soon = unix.NsecToTimespec(int64(pause))
		timeout = &soon
	}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&g.fds[0])), uintptr(len(g.fds)), uintptr(unsafe.Pointer(timeout)), 0, 0, 0)
	if g.fds[0].Revents != 0 {
		_, _ = unix.Read(g.timer, g.wakeBuf[:8])
		g.armed = 0
	}
}

// nextDeadline is the earliest of all that the clock alone brings about.
func (g *guard) nextDeadline() time.Duration {
	next := forever
	if j := &g.job; j.alive && j.kill == killNone {
		next = min(next, j.killBy)
		if !j.stopping {
			next = min(next, j.stopAt)
		} else {
			next = min(next, j.stopBy)
		}
	}
	if g.elector != 0 && !g.electorGone {
		next = min(next, g.look)
	}
	if g.revoke != 0 {
		next = min(next, g.revokeBy)
	}
	return next
}

// serveDeadlines does what stop-at, kill-by and the grace demand.
func (g *guard) serveDeadlines(now time.Duration) {
	j := &g.job
	if j.alive && j.kill == killNone {
		switch {
		case now >= j.killBy:
			g.beginKill(killBy)
			g.late(now - j.killBy)
		case j.stopping && now >= j.stopBy:
			g.beginKill(killGrace)
			g.late(now - j.stopBy)
		case !j.stopping && now >= j.stopAt:
			g.beginStop(now, forever)
			g.late(now - j.stopAt)
			g.log.Warn("stop-at has passed without a renewal: the job is told to stop", "signal", g.cfg.StopSignal.String(), "kill_by_in", (j.killBy - now).Round(time.Millisecond).String())
		}
	}
	if g.revoke != 0 && now >= g.revokeBy {
		_ = unix.Kill(g.revoke, unix.SIGKILL)
	}
}

// late keeps how late a deadline was served, and tells it. What it led to is under way already.
func (g *guard) late(d time.Duration) {
	g.lateness = max(g.lateness, d)
	g.tell(message{kind: msgLateness, a: int64(d)})
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
		signalPidfd(g.electorFd, unix.SIGKILL)
	}
	g.electorGone = true
	if g.job.alive && g.job.kill == killNone {
		g.beginKill(killElector)
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
		signalPidfd(j.pidfd, g.cfg.StopSignal)
	}
}

// beginKill starts the kill. The first blow falls here, before anything else is done.
func (g *guard) beginKill(reason int) {
	j := &g.job
	if !j.alive || j.kill != killNone {
		return
	}
	if j.forking != nil {
		j.forking.cancelled.Store(true)
	}
	if reason != killLeftover {
		g.strike()
	}
	j.kill, j.killSince, j.rounds = reason, Now(), 0
	j.complain = j.killSince + 10*time.Second
}

// strike kills everything that can be named without reading the process table.
func (g *guard) strike() {
	if g.job.pid != 0 {
		signalPidfd(g.job.pidfd, unix.SIGKILL)
	}
	if g.cgroup != nil {
		g.cgroup.killAll()
	} else {
		g.procs.killListed(g.children...)
	}
}

// killRound kills what is left and looks if that was all.
func (g *guard) killRound() {
	j := &g.job
	g.reap()
	if g.dead() {
		g.buried()
		return
	}
	g.strike()
	// Reading the process table takes milliseconds. Where the first process or the cgroup is all there is, that is lost time.
	if j.rounds++; j.rounds > 8 || g.cgroup == nil && j.pid == 0 {
		g.procs.killDescendants(g.procs.self, g.children...)
	}
	g.reap()
	if g.dead() {
		g.buried()
		return
	}
	if now := Now(); now >= j.complain {
		j.complain = now + 10*time.Second
		g.log.Error("the job can't be killed; the lease is held on to", "elapsed", (now - j.killSince).Round(time.Second).String(), "pid", j.pid)
	}
}

// dead says if nothing of the job is left: no child but our own, nothing in the cgroup, and no start under way.
// A process state would not do: a process whose main thread has gone shows Z while its other threads run.
func (g *guard) dead() bool {
	j := &g.job
	if j.forking != nil || j.pid != 0 || g.cgroup != nil && g.cgroup.populated() {
		return false
	}
	left, known := g.procs.children(g.children...)
	return known && left == 0
}

// buried tells of the job's death.
func (g *guard) buried() {
	j := &g.job
	now := Now()
	elapsed := now - j.killSince
	if j.stopping {
		elapsed = now - j.stopSince
	}
	if j.pidfd >= 0 && j.started {
		rawClose(j.pidfd)
	}
	reason := j.kill
	if reason == killLeftover && j.rounds == 0 {
		reason = killNone
	}
	asked := int64(0)
	if j.stopping || reason != killNone && reason != killLeftover {
		asked = 1
	}
	g.tell(message{kind: msgDead, a: int64(elapsed), b: int64(reason), c: asked})
	attrs := []any{"elapsed", elapsed.String()}
	if j.started {
		attrs = append(attrs, "exit_code", ExitOf(j.status).Code, "signal", ExitOf(j.status).Signal)
	}
	if reason != killNone {
		attrs = append(attrs, "reason", killReasons[reason])
	}
	if g.lateness > 0 {
		attrs = append(attrs, "guard_lateness", g.lateness.String())
	}
	g.log.Info("the job is dead", attrs...)
	g.lateness = 0
	g.job = job{}
	// An elector whose job is dead pings once a second.
	g.strikes, g.look = 0, max(g.look, now+3*time.Second)
	g.tidyAt = now + time.Second
}

// tell sends a message to the elector. One that does not read is as good as dead. One that has closed its end is at its end:
// the pidfd will tell.
func (g *guard) tell(m message) {
	if g.electorGone || !errors.Is(send(g.out, &g.sendBuf, m), errFull) {
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
	// While a start is under way nothing is reaped, but the elector's end is not waited for.
	if g.fds[3].Revents != 0 && g.job.forking != nil && !g.electorGone {
		g.loseElector()
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
	if _, err := g.inbox.fill(g.in); err != nil {
		g.inShut = true
		return
	}
	for {
		m, ok := g.inbox.next()
		if !ok {
			return
		}
		g.message(m)
		g.listen(Now())
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
		if g.signals > 1 {
			g.beginKill(killSignal)
		}
		g.tell(message{kind: msgSignal, a: int64(s)})
	case unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH, unix.SIGQUIT:
		if g.job.pid != 0 {
			signalPidfd(g.job.pidfd, s)
		}
	}
}

// message acts on a message of the elector's.
func (g *guard) message(m message) {
	j := &g.job
	now := Now()
	switch m.kind {
	case msgPing:
		g.tell(message{kind: msgPong, a: m.a})
		g.cfg.Turned()
	case msgReady:
		g.cfg.Notify("READY=1")
	case msgStatus:
		g.cfg.Notify("STATUS=" + string(m.text))
	case msgLease:
		g.lease, g.leaseTTL = m.a, time.Duration(m.b)
	case msgStart:
		g.start(m)
	case msgExtend:
		// Once stop-at has passed, nothing moves the deadlines of this job any more. A planned stop is another thing.
		if j.alive && now < j.stopAt {
			j.stopAt, j.killBy = time.Duration(m.a), time.Duration(m.b)
		}
	case msgStop:
		switch {
		case !j.alive || j.kill != killNone:
		case m.a == 0:
			g.beginKill(killLost)
		case m.a == untilKillBy:
			g.beginStop(now, forever)
		default:
			g.beginStop(now, now+time.Duration(m.a))
		}
	case msgExit:
		g.exiting, g.exitCode, g.exitText = true, int(m.a), string(m.text)
	}
}

// start has the job started, unless it is too late.
func (g *guard) start(m message) {
	if g.electorGone {
		return
	}
	if g.job.alive {
		g.log.Error("the elector asks for a start while the job lives: it is killed")
		g.loseElector()
		return
	}
	term := Term{Key: string(m.text), Token: m.b, LeaseID: m.a}
	s := &start{path: g.cfg.Path, argv: g.cfg.Argv, env: jobEnvironment(g.cfg, term), stopAt: time.Duration(m.c), pidfd: -1}
	g.job = job{forking: s, pidfd: -1, alive: true, stopAt: time.Duration(m.c), killBy: time.Duration(m.d), stopBy: forever}
	g.forker.requests <- s // never full: there is one job at a time, and one preparation before it
	if g.signals > 1 {
		g.beginKill(killSignal)
	}
}

// takeStart looks if the start is done.
func (g *guard) takeStart() {
	j := &g.job
	if j.forking == nil || g.forker.done.Load() != j.forking {
		return
	}
	s := j.forking
	j.forking = nil
	if s.err != nil {
		j.pidfd = -1
		if errors.Is(s.err, errTooLate) {
			j.stopping, j.stopSince = true, Now() // by us, and not by itself
		} else {
			g.tell(message{kind: msgRefused, a: int64(startCode(s.err)), text: []byte(s.err.Error())})
			g.log.Error(fmt.Sprintf("start job %q", g.cfg.Path), "err", s.err)
		}
		g.beginKill(killLeftover)
		return
	}
	j.pid, j.pidfd, j.started = s.pid, s.pidfd, true
	g.tell(message{kind: msgStarted, a: int64(s.pid)})
	switch {
	case j.kill != killNone:
		g.strike()
	case j.stopping:
		signalPidfd(j.pidfd, g.cfg.StopSignal)
	}
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

// reap waits for every child that has ended. While a start is under way it doesn't: the forker waits for a child whose exec
// failed by its pid, and the first process's status must not be taken before its pid is known.
func (g *guard) reap() {
	for g.job.forking == nil {
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
		case g.revoke:
			g.revokeEnded(ws)
		case g.job.pid:
			g.jobEnded(ws)
		}
	}
}

// jobEnded follows the end of the first process: with it ends the job, and what it left behind is killed.
func (g *guard) jobEnded(ws unix.WaitStatus) {
	j := &g.job
	j.pid, j.status = 0, ws
	exit := ExitOf(ws)
	g.tell(message{kind: msgExited, a: int64(exit.Code), b: int64(exit.Signal)})
	g.beginKill(killLeftover)
}

// electorEnded tells an elector that has said goodbye from one that was lost.
func (g *guard) electorEnded(ws unix.WaitStatus) {
	g.elector = 0
	g.listChildren()
	for !g.inShut { // its last words may still be in the pipe
		if more, err := g.inbox.fill(g.in); !more || err != nil {
			break
		}
		for m, ok := g.inbox.next(); ok; m, ok = g.inbox.next() {
			if m.kind == msgExit || m.kind == msgLease {
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
	g.log.Error("the elector has ended: the job is killed and the lease revoked", "exit_code", ExitOf(ws).Code, "signal", ExitOf(ws).Signal)
}

// listChildren lists the children that are not the job's.
func (g *guard) listChildren() {
	g.children = g.children[:0]
	for _, pid := range []int{g.elector, g.revoke} {
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
	pid, err := syscall.ForkExec("/proc/self/exe", g.cfg.Revoke(lease, within), &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		g.log.Error("the lease could not be revoked and will expire", "lease", strconv.FormatInt(lease, 16), "err", err)
		return
	}
	g.revoke, g.revokeBy = pid, Now()+within
	g.listChildren()
}

func (g *guard) revokeEnded(ws unix.WaitStatus) {
	g.revoke = 0
	g.listChildren()
	if ExitOf(ws).Code != 0 {
		g.log.Warn("the lease could not be revoked and will expire", "exit_code", ExitOf(ws).Code, "signal", ExitOf(ws).Signal)
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
	g.log.Error("the elector is lost: exiting to be started again", "exit_code", ExitInternal)
	return ExitInternal
}

// tidy does, a while after a job's death, what nobody waits for: it gets ready for the next start, and does what the garbage
// collector may not do while a job lives.
func (g *guard) tidy(now time.Duration) {
	if g.job.alive || g.electorGone || now < g.tidyAt {
		return
	}
	g.tidyAt = now + time.Minute
	select {
	case g.forker.requests <- nil:
	default: // it has not come to the last one yet
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 4<<20 {
		runtime.GC()
	}
}

// jobEnvironment is the daemon's environment, less what is the daemon's alone, plus the term.
func jobEnvironment(cfg GuardConfig, t Term) []string {
	return append(append(make([]string, 0, len(cfg.Env)+5), cfg.Env...),
		"LEASEHOLD_ELECTION="+cfg.Election,
		"LEASEHOLD_IDENTITY="+cfg.Identity,
		"LEASEHOLD_KEY="+t.Key,
		"LEASEHOLD_FENCING_TOKEN="+strconv.FormatInt(t.Token, 10),
		leaseEntry(t.LeaseID),
	)
}

// leaseEntry is the entry of the environment by which an orphan of the job is known.
func leaseEntry(lease int64) string { return "LEASEHOLD_LEASE_ID=" + strconv.FormatInt(lease, 16) }
