//go:build linux

package guard

import (
	"errors"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// starter forks electors, on a thread of its own. A fork holds its thread until the exec has
// returned: a millisecond, or for ever if a file system hangs. The loop must not wait for that,
// because it has to kill when a deadline passes. It asks by a byte in a pipe, and not by a channel:
// to wake a goroutine, the runtime may want a new thread.
//
// The first elector is forked before the loop runs. A replacement leaves some kilobytes of garbage,
// which is collected when no job lives.
type starter struct {
	argv  []string
	env   []string
	files []uintptr // of the elector; its two ends of the pipes are filled in

	null       int
	askR, askW int  // a byte asks for an elector
	busy       bool // it was asked, and has not answered; the loop's own
	answer     atomic.Pointer[starterAnswer]
}

// starterAnswer is an elector that was forked, or why there is none.
type starterAnswer struct {
	electorProcess
	err error
}

// electorProcess is an elector, and our ends of its pipes.
type electorProcess struct{ pid, pidfd, in, out int }

// The places of the elector's descriptors. What there is none of is /dev/null, so that no other
// file gets its number.
const (
	electorIn       = 3 // the pipe pair
	electorOut      = 4
	electorSpawner  = 5 // the socket to the spawner
	electorPidfd    = 6 // of the spawner
	electorListener = 7 // to serve on
	electorFile     = 8 // the state file
)

// openStarter makes the starter and its thread.
func (g *guard) openStarter() error {
	s := &g.starter
	var err error
	if s.null, err = unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: os.DevNull, Err: err}
	}
	var ask [2]int
	if err := unix.Pipe2(ask[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	s.askR, s.askW = ask[0], ask[1]
	s.env = os.Environ()
	s.argv = append(append([]string{}, g.cfg.Elector...), strconv.Itoa(unix.Getpid()),
		strconv.Itoa(g.spawner.pid))
	if g.cgroup != nil {
		s.argv = append(s.argv, g.cgroup.Dir)
	}
	s.files = []uintptr{
		uintptr(s.null), 1, 2, electorIn: 0, electorOut: 0,
		electorSpawner: uintptr(g.spawner.elector), electorPidfd: uintptr(g.spawner.pidfd),
		electorListener: uintptr(s.null), electorFile: uintptr(s.null),
	}
	if g.listener >= 0 {
		s.files[electorListener] = uintptr(g.listener)
	}
	if g.stateFd >= 0 {
		s.files[electorFile] = uintptr(g.stateFd)
	}
	go g.runStarter()
	return nil
}

// runStarter forks an elector for each byte, until the pipe is closed. The thread stays: its
// children count as the guard's, whichever thread has forked them.
func (g *guard) runStarter() {
	runtime.LockOSThread()
	s := &g.starter
	var b [1]byte
	for {
		n, err := unix.Read(s.askR, b[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 {
			_ = unix.Close(s.askR)
			return
		}
		p, err := s.fork()
		s.answer.Store(&starterAnswer{p, err})
		_, _ = unix.Write(g.wakeW, wakeByte)
	}
}

// ask asks for an elector. It never blocks.
func (s *starter) ask() {
	s.busy = true
	_, _ = unix.Write(s.askW, wakeByte)
}

// fork forks an elector.
func (s *starter) fork() (p electorProcess, err error) {
	var toElector, fromElector [2]int
	if err := unix.Pipe2(toElector[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return p, err
	}
	if err := unix.Pipe2(fromElector[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		closeAll(toElector[:]...)
		return p, err
	}
	s.files[electorIn], s.files[electorOut] = uintptr(toElector[0]), uintptr(fromElector[1])
	p = electorProcess{pidfd: -1, in: fromElector[0], out: toElector[1]}
	p.pid, err = syscall.ForkExec("/proc/self/exe", s.argv, &syscall.ProcAttr{
		Env: s.env, Files: s.files,
		Sys: &syscall.SysProcAttr{Setsid: true, PidFD: &p.pidfd},
	})
	closeAll(toElector[0], fromElector[1])
	if err != nil {
		closeAll(p.in, p.out)
	}
	return p, err
}

func closeAll(fds ...int) {
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// startFirst forks the first elector.
func (g *guard) startFirst() error {
	p, err := g.starter.fork()
	if err != nil {
		return err
	}
	g.electorForked(p)
	return nil
}

// receiveFromStarter takes the elector that was asked for.
func (g *guard) receiveFromStarter() {
	a := g.starter.answer.Swap(nil)
	if a == nil {
		return
	}
	e := &g.elector
	g.starter.busy = false
	switch {
	case e.state != electorStarting: // given up meanwhile; without a Record it does nothing
		if a.err == nil {
			_ = unix.PidfdSendSignal(a.pidfd, unix.SIGKILL, nil, 0)
			closeAll(a.pidfd, a.in, a.out)
		}
	case a.err != nil:
		g.log.Warn("another elector can't be started: trying again", "err", a.err)
		e.askAt = boottime.Now() + askAgain
	default:
		g.electorForked(a.electorProcess)
		// If it has exited already, the loop may have reaped it before it knew its pid.
		if pid, ws, errno := wait(a.pid); pid == a.pid || errno == unix.ECHILD {
			g.electorExited(ws)
		}
	}
}

// closeStarter ends its thread, unless it hangs in a fork.
func (g *guard) closeStarter() { closeAll(g.starter.null, g.starter.askW) }
