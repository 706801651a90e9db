//go:build linux

package guard

import (
	"fmt"
	"runtime"
	"runtime/metrics"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/ipc"
)

// loop is the guard. Each round looks at the clock first, kills what is due, and only then receives
// messages. It waits only in poll, and allocates nothing while a job runs or is killed.
func (g *guard) loop() (Exit, error) {
	for {
		now := boottime.Now()
		g.act(now)
		if g.finished() {
			return g.exit()
		}
		g.tidy(now)
		g.poll()
		g.receive()
	}
}

// act does what is due at this time.
func (g *guard) act(now time.Duration) {
	g.job.serveDeadlines(now)
	g.serveSpawnerSilence(now)
	g.serveElectorDeadlines(now)
	g.serveReloadDeadlines(now)
	g.hook.serveDeadline(g, now)
	if g.job.state == jobKilling {
		g.job.killRound()
	}
}

// receive acts on what poll has found.
func (g *guard) receive() {
	g.receiveSignals()
	if g.watched[watchPipe].Revents != 0 {
		g.receiveFromElector()
	}
	g.receiveFromSpawner()
	g.receiveFromStarter()
	g.job.freezerDone(boottime.Now())
	g.receiveRequest()
	g.reap()
}

// finished reports whether the guard may exit. It has the order of every end: first the elector has
// exited, then nothing of the job is left, and only then the lease of a lost elector is revoked.
// Go lets one fork wait for the other. So the revoking process waits for a fork under way, but not
// for one that hangs.
func (g *guard) finished() bool {
	switch e := &g.elector; {
	case e.state != electorGone:
		return false
	case g.job.state != jobIdle:
		return false
	case e.revoker != 0:
		return false
	case g.known.Lease.ID == 0, e.announced && g.known.Lease.Releasing:
		return true
	case g.starter.busy > 0 && boottime.Now() < g.starter.busyBy:
		return false
	}
	g.startRevoke()
	return g.elector.revoker == 0
}

// exit is what Run returns.
func (g *guard) exit() (Exit, error) {
	switch {
	case g.elector.announced:
		return g.elector.exit, nil
	case g.forced: // all that was asked for is done
		return Exit{Why: "planned stop; the elector was killed", Forced: true}, nil
	case g.spawner.lost:
		return Exit{}, fmt.Errorf("the spawner is %w", ErrLost)
	}
	return Exit{}, fmt.Errorf("the elector is %w", ErrLost)
}

// The places in guard.watched.
const (
	watchTimer   = iota
	watchPipe    // from the elector
	watchWake    // a signal is pending
	watchElector // its exit
	watchSpawner // its socket
	watchAsker   // who wants a reload
	watchedLen
)

// poll waits for the next thing to do. While a kill is under way that is soon.
func (g *guard) poll() {
	g.armTimer(g.nextDeadline())
	// If the elector has exited and can't be reaped, a tracer holds it as a zombie. A SIGCHLD comes
	// when the tracer lets it go. Every other round does not watch it, and sleeps for a while.
	held := g.elector.pid != 0 && g.watched[watchElector].Revents != 0
	g.watch(held)
	var timeout *unix.Timespec
	var soon unix.Timespec
	switch {
	case g.unreaped:
		timeout = &soon
	case g.job.state == jobKilling:
		left := max(g.job.nextRound-boottime.Now(), 0)
		soon = unix.NsecToTimespec(int64(min(left, 100*time.Millisecond)))
		timeout = &soon
	case held:
		soon = unix.NsecToTimespec(int64(50 * time.Millisecond))
		timeout = &soon
	}
	_, _, _ = unix.Syscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&g.watched[0])), watchedLen,
		uintptr(unsafe.Pointer(timeout)), 0, 0, 0)
	if g.watched[watchTimer].Revents != 0 {
		_, _ = unix.Read(g.timer, g.scratch[:8])
		g.armedFor = 0
	}
}

// armTimer sets the timer to a moment since boot.
func (g *guard) armTimer(next time.Duration) {
	if next == g.armedFor {
		return
	}
	spec := unix.ItimerSpec{}
	if next != forever {
		spec.Value = unix.NsecToTimespec(int64(max(next, 1)))
	}
	_ = unix.TimerfdSettime(g.timer, unix.TFD_TIMER_ABSTIME, &spec, nil)
	g.armedFor = next
}

// watch lists what poll waits for. poll ignores a descriptor of -1.
func (g *guard) watch(held bool) {
	watched := func(fd int, on bool) unix.PollFd {
		if !on {
			fd = -1
		}
		return unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	}
	g.watched = [watchedLen]unix.PollFd{
		watchTimer:   watched(g.timer, true),
		watchPipe:    watched(g.elector.in, !g.elector.pipeEnded),
		watchWake:    watched(g.wakeR, true),
		watchElector: watched(g.elector.pidfd, g.elector.pid != 0 && !held),
		watchSpawner: watched(g.spawner.sock, g.spawner.pid != 0),
		watchAsker:   watched(g.reload.asker, g.reload.state == reloadAsked),
	}
}

// nextDeadline is the earliest moment at which act has something to do.
func (g *guard) nextDeadline() time.Duration {
	next := min(g.job.nextDeadline(), g.nextElectorDeadline(), g.nextReloadDeadline(),
		g.hook.nextDeadline())
	if g.spawner.awaited && g.job.state != jobKilling {
		next = min(next, g.spawner.checkedAt+g.spawnerTimeout(0)/3)
	}
	return next
}

// maxReaps bounds how many children a round reaps. Each time the kernel looks through all living
// children, and a guard that is process 1 also has the orphans of others.
const maxReaps = 64

// reap reaps the children that have exited: our own, and the orphans that have become ours.
func (g *guard) reap() {
	g.unreaped = false
	for range maxReaps {
		pid, ws, errno := wait(-1)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || pid == 0 {
			return
		}
		switch pid {
		case g.elector.pid:
			g.electorExited(ws)
		case g.spawner.pid, g.spawner.zombie:
			if g.receiveFromSpawner(); g.spawner.pid != 0 { // its last messages first
				g.spawnerExited()
			}
			g.spawner.zombie = 0
			g.listChildren()
		case g.elector.revoker:
			g.revokerExited(ws)
		case g.reload.pid:
			g.checkExited(ws)
		case g.job.pid:
			g.job.firstExited(ws)
		case g.hook.pid:
			g.hook.exited(g, ws)
		default:
			g.reload.reaped, g.reload.status = pid, ws // it may be the check or a hook, just forked
		}
	}
	g.unreaped = true
}

// wait reaps a child of any kind that has exited. It never blocks.
func wait(pid int) (int, unix.WaitStatus, unix.Errno) {
	var ws unix.WaitStatus
	got, _, errno := unix.RawSyscall6(unix.SYS_WAIT4, uintptr(pid), uintptr(unsafe.Pointer(&ws)),
		unix.WNOHANG|unix.WALL, 0, 0, 0)
	return int(got), ws, errno
}

// listChildren lists the children that are not the job's.
func (g *guard) listChildren() {
	g.children = g.children[:0]
	e, s := &g.elector, g.spawner
	for _, pid := range [...]int{e.pid, s.pid, s.zombie, e.revoker, g.reload.pid, g.hook.pid} {
		if pid != 0 {
			g.children = append(g.children, pid)
		}
	}
}

// tidy does what can wait until a job has been gone for a while: it prepares the next start, and
// collects the garbage, which must not happen while a job lives. A collection would also wait for a
// fork that is under way. What is due is done after the next ping, long before another message asks
// for a start.
func (g *guard) tidy(now time.Duration) {
	if g.job.state != jobIdle || g.elector.state != electorRunning || now < g.tidyAt ||
		g.starter.busy > 0 {
		return
	}
	pipe := []unix.PollFd{{Fd: int32(g.elector.in), Events: unix.POLLIN}}
	if n, _ := unix.Poll(pipe, 0); n != 0 { // perhaps a start
		return
	}
	g.tidyAt = now + time.Minute
	g.spawner.send(ipc.SpawnerPrepare, 0)
	select {
	case g.sweep <- int(atomic.LoadInt32(&g.spawner.area.leaf)):
	default: // it has not come to the last one yet
	}
	if metrics.Read(g.heap[:]); g.heap[0].Value.Uint64() > 4<<20 { // this stops no other thread
		runtime.GC()
	}
}
