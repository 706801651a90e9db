//go:build linux

package guard

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/check"
	"leasehold/supervisor/ipc"
	"leasehold/supervisor/proctree"
)

// hook is the hook that follows the job, as the guard runs it: in the state post-stop, after the
// exit of the job is proven, and before the lease is given back. The starter forks its runner. If
// the guard is lost, the runner ends, and the spawner runs the hook anew.
type hook struct {
	askingR, askingW int // a pipe that ends with the guard

	due    bool
	env    []string      // what it has besides its Env
	until  time.Duration // its time is up
	by     time.Duration // what is left of it, or of its runner, is not waited for
	pid    int           // of the runner; 0: none
	killed bool          // the runner was, because it hangs
	again  time.Duration // when to look what a runner has left, and start another one; 0: not now
	err    error         // how the last runner ended
}

// hookRequest asks the starter for a runner.
type hookRequest struct {
	until time.Duration
	env   []string
}

// hookAnswer is a runner that was forked, or why there is none.
type hookAnswer struct {
	until time.Duration
	pid   int
	err   error
}

// hookSlack is what a runner may need besides the time of its hook.
func (c *Config) hookSlack() time.Duration { return min(500*time.Millisecond, c.Margin/2) }

// openHook makes what the hook needs, and runs it once: what a daemon before this one has started
// may need it still. It reports whether it has succeeded. Nothing else runs yet, so it waits.
func (g *guard) openHook() (ok bool, err error) {
	h := &g.hook
	if g.cfg.PostStop == nil {
		return true, nil
	}
	var asking [2]int
	if err := unix.Pipe2(asking[:], unix.O_CLOEXEC); err != nil {
		return false, err
	}
	h.askingR, h.askingW = asking[0], asking[1]
	g.cfg.PostStop.Env = slices.DeleteFunc(slices.Clone(g.cfg.Env), func(entry string) bool {
		return !isHooks(entry)
	})
	term := ipc.Start{}.Environment(g.cfg.Election, g.cfg.Identity)[:2] // there is no term
	until := boottime.Now() + g.cfg.PostStop.Timeout
	pid, err := g.cfg.PostStop.Start(until, h.askingR, append(term, ipc.ReasonStartup)...)
	if err == nil {
		var ws unix.WaitStatus
		ws, err = waitFor(pid, g.cfg.PostStop.Timeout+g.cfg.hookSlack())
		if err == nil {
			err = g.cfg.PostStop.Exited(ws)
		}
	}
	if err != nil {
		for end := boottime.Now() + time.Second; g.procs.KillDescendants(g.procs.Self) &&
			boottime.Now() < end; {
			time.Sleep(time.Millisecond)
		}
		g.log.Error(check.HookFailed, "err", err)
	}
	return err == nil, nil
}

// waitFor waits for the exit of a child. When its time is up, it kills it.
func waitFor(pid int, within time.Duration) (ws unix.WaitStatus, err error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(pidfd) }()
	for end := boottime.Now() + within; ; {
		left := end - boottime.Now()
		if proctree.PidfdExited(pidfd) || left <= 0 {
			break
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}},
			int(left.Milliseconds())+1)
	}
	proctree.SignalPidfd(pidfd, unix.SIGKILL) // unless it has exited
	for {
		if _, err = unix.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			return ws, err
		}
	}
}

// begin has the hook run for a job of which nothing is left.
func (h *hook) begin(g *guard, now time.Duration) {
	h.due, h.killed, h.until = true, false, now+g.cfg.PostStop.Timeout
	h.by = h.until + g.cfg.hookSlack()
	h.env = append(g.job.start.Environment(g.cfg.Election, g.cfg.Identity), ipc.ReasonStop)
	h.ask(g)
}

func (h *hook) ask(g *guard) {
	h.again, h.err = 0, errNotForked
	g.starter.hookAsked.Store(&hookRequest{h.until, h.env})
	g.starter.askFork(askHook, h.by)
}

var (
	errNotForked = errors.New("it could not be started in time")
	errHangs     = errors.New("the process that runs it hangs")
)

// receiveHook takes the runner that was asked for. One that comes too late, maybe when another job
// runs, does not run the hook any more, and exits.
func (g *guard) receiveHook() {
	a := g.starter.hookForked.Swap(nil)
	if a == nil {
		return
	}
	g.starter.busy--
	h := &g.hook
	switch {
	case !h.due || a.until != h.until:
		return
	case a.err != nil:
		h.runnerEnded(g, fmt.Errorf("%w: %w", check.ErrNotRun, a.err))
		return
	}
	h.pid = a.pid
	g.listChildren()
	// If it has exited already, the loop may have reaped it before it knew its pid.
	switch pid, ws, errno := wait(a.pid); {
	case pid == a.pid:
		h.exited(g, ws)
	case errno == unix.ECHILD && g.reload.reaped == a.pid:
		h.exited(g, g.reload.status)
	case errno == unix.ECHILD:
		h.exited(g, unix.WaitStatus(unix.SIGKILL))
	}
}

// exited: the runner has exited.
func (h *hook) exited(g *guard, ws unix.WaitStatus) {
	h.pid = 0
	g.listChildren()
	h.runnerEnded(g, g.cfg.PostStop.Exited(ws))
}

// runnerEnded: if the hook has succeeded, nothing of it is left. Else its runner may have been
// killed, or crashed.
func (h *hook) runnerEnded(g *guard, err error) {
	if h.err = err; err == nil {
		h.end(g)
		return
	}
	h.again = boottime.Now()
	if errors.Is(err, check.ErrNotRun) {
		h.again += min(g.cfg.PostStop.Timeout/20, 100*time.Millisecond)
	}
}

// end: the hook is over. With it the job is.
func (h *hook) end(g *guard) {
	if h.err != nil {
		g.log.Error(check.HookFailed, "err", h.err)
	}
	h.due, h.again, h.pid = false, 0, 0
	g.listChildren()
	g.spawner.post(ipc.SpawnerHookDone, 0)
	g.job.transition(jobIdle, "the hook is over")
}

// serveDeadline kills a runner that hangs, and what is left of a hook. A process that the kernel
// does not let exit is not waited for, and neither is a runner that is not forked in time.
func (h *hook) serveDeadline(g *guard, now time.Duration) {
	switch {
	case now < h.nextDeadline():
	case h.again != 0 && now < h.by && h.isLeft(g):
		h.again = now + 5*time.Millisecond
	case h.again != 0 && now < h.until && errors.Is(h.err, check.ErrNotRun):
		h.ask(g)
	case h.pid != 0 && !h.killed:
		g.log.Error("the process that runs LEASEHOLD_POST_STOP hangs: killing it")
		_ = unix.Kill(h.pid, unix.SIGKILL) // only we reap it
		h.killed, h.by, h.err = true, now+time.Second, errHangs
	default:
		h.end(g)
	}
}

// isLeft kills what a runner has left. Children that the starter has just forked are not ours to
// kill.
func (h *hook) isLeft(g *guard) bool {
	left, known := g.procs.Children(g.noNewPrivs, g.children...)
	if g.starter.busy == 0 && (!known || left > 0) {
		g.procs.KillDescendants(g.procs.Self, g.children...)
	}
	return !known || left > 0
}

// nextDeadline is when serveDeadline has something to do.
func (h *hook) nextDeadline() time.Duration {
	switch {
	case !h.due:
		return forever
	case h.again != 0:
		return h.again
	}
	return h.by
}
