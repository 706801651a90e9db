//go:build linux

package guard

import (
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
	"leasehold/supervisor/reload"
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
	image image     // of electors; the loop changes it only while none is being forked
	files []uintptr // of the elector; its two ends of the pipes are filled in

	null       int
	askR, askW int           // a number says what is asked for
	asked      [4]byte       // the last one; the loop's own
	busy       int           // forks that were asked for, and not answered; the loop's own
	busyBy     time.Duration // when the last of them should be over
	answer     atomic.Pointer[starterAnswer]

	checkArgv   []string // of the process that checks a reload
	settings    int      // what it gets as descriptor 4; -1: nothing
	result      int      // what it leaves is there; -1: there is none
	checked     image    // its binary and, once it is read, what it has left
	checkForked atomic.Pointer[checkAnswer]
	checkRead   atomic.Pointer[checkAnswer]

	hookAsked  atomic.Pointer[hookRequest]
	hookForked atomic.Pointer[hookAnswer]
}

// What the starter is asked for. From 0 on it is a descriptor to be closed: that of a binary, where
// the kernel may have much to do if it was deleted.
const (
	askElector int32 = -1 - iota
	askCheck         // a process that checks a reload
	askRead          // what that has left
	askHook          // the hook that follows the job
)

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
	electorNotify   = 9 // the job's notifications
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
	s.image.env, s.image.version = os.Environ(), g.cfg.Reload.Version
	s.argv = append(append([]string{}, g.cfg.Elector...), strconv.Itoa(unix.Getpid()),
		strconv.Itoa(g.spawner.pid))
	if g.cgroup != nil {
		s.argv = append(s.argv, g.cgroup.Dir)
	}
	s.files = []uintptr{
		uintptr(s.null), 1, 2, electorIn: 0, electorOut: 0,
		electorSpawner: uintptr(g.spawner.elector), electorPidfd: uintptr(g.spawner.pidfd),
		electorListener: uintptr(s.null), electorFile: uintptr(s.null),
		electorNotify: uintptr(s.null),
	}
	if g.listener >= 0 {
		s.files[electorListener] = uintptr(g.listener)
	}
	if g.notify >= 0 {
		s.files[electorNotify] = uintptr(g.notify)
	}
	if g.stateFd >= 0 {
		s.files[electorFile] = uintptr(g.stateFd)
	}
	go g.runStarter()
	return nil
}

// runStarter does what each number asks for, until the pipe is closed. The thread stays: its
// children count as the guard's, whichever thread has forked them. With it the process ends that
// checks a reload. By the thread's name whoever asks for a reload knows a guard.
func (g *guard) runStarter() {
	runtime.LockOSThread()
	name := append([]byte(reload.ThreadName), 0)
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name[0])), 0, 0, 0)
	s := &g.starter
	var b [4]byte
	for {
		n, err := unix.Read(s.askR, b[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != len(b) {
			_ = unix.Close(s.askR)
			return
		}
		switch what := int32(binary.NativeEndian.Uint32(b[:])); what {
		case askElector:
			p, err := s.fork()
			s.answer.Store(&starterAnswer{p, err})
		case askCheck:
			s.checkForked.Store(s.forkCheck(g.cfg.Reload))
		case askHook:
			asked := s.hookAsked.Load()
			pid, err := g.cfg.PostStop.Start(asked.until, g.hook.askingR, asked.env...)
			s.hookForked.Store(&hookAnswer{asked.until, pid, err})
		case askRead:
			s.checkRead.Store(s.readCheck())
		default:
			_ = unix.Close(int(what))
			continue
		}
		_, _ = unix.Write(g.wakeW, wakeByte)
	}
}

// ask asks for an elector. It never blocks, as all that follow.
func (s *starter) ask(by time.Duration) { s.askFork(askElector, by) }

func (s *starter) askFork(what int32, by time.Duration) {
	s.busy++
	s.busyBy = max(s.busyBy, by)
	s.post(what)
}

// close has descriptors closed; -1: none.
func (s *starter) close(fd int) {
	if fd >= 0 {
		s.post(int32(fd))
	}
}

func (s *starter) post(what int32) {
	binary.NativeEndian.PutUint32(s.asked[:], uint32(what))
	_, _ = unix.Write(s.askW, s.asked[:])
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
	p.pid, err = syscall.ForkExec(s.image.path(), s.argv, &syscall.ProcAttr{
		Env: s.image.env, Files: s.files,
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
	g.receiveCheck()
	g.receiveHook()
	a := g.starter.answer.Swap(nil)
	if a == nil {
		return
	}
	e := &g.elector
	g.starter.busy--
	switch {
	case e.state != electorStarting: // given up meanwhile; without a Record it does nothing
		if a.err == nil {
			_ = unix.PidfdSendSignal(a.pidfd, unix.SIGKILL, nil, 0)
			closeAll(a.pidfd, a.in, a.out)
		}
	case a.err != nil:
		g.log.Warn("another elector can't be started: trying again", "err", a.err)
		if g.reload.state == reloadStarting {
			g.restore("can't be started: " + a.err.Error())
		}
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
func (g *guard) closeStarter() {
	closeAll(g.starter.null, g.starter.askW, g.starter.image.fd, g.reload.before.fd)
	closeAll(g.hook.askingR, g.hook.askingW)
}
