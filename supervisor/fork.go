//go:build linux

package supervisor

import (
	"runtime"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// start is one request to start the job, and what came of it.
type start struct {
	path      string
	argv, env []string
	stopAt    time.Duration
	cancelled atomic.Bool // set by the guard: don't start any more

	pid, pidfd int
	err        error
}

// forker starts jobs from a thread of its own: a fork holds its thread until exec has returned, which a slow file system
// can delay for ever, and PR_SET_PDEATHSIG is bound to the thread that forked, so that this one must live as long as the guard.
type forker struct {
	cgroup     *cgroup
	noNewPrivs bool
	ignored    []unix.Signal // these stay so for the job
	now        func() time.Duration

	requests chan *start // nil: get ready for the next
	done     atomic.Pointer[start]
	wake     func()
	leaf     int // the cgroup of the next start, made ahead of it; -1: none
	leafErr  error
	used     bool // it has been started in, or was not made
}

// run serves requests until the process ends.
func (f *forker) run() {
	runtime.LockOSThread()
	// What the job inherits of the signal mask is this thread's. Signals that have a handler here are reset by exec.
	var none unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &none, nil)
	resetIgnored(f.ignored)
	if f.noNewPrivs {
		_ = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	f.leaf, f.used = -1, true
	f.prepare()
	for s := range f.requests {
		if s == nil {
			f.prepare()
			continue
		}
		s.pid, s.pidfd, s.err = f.fork(s)
		f.done.Store(s)
		f.wake()
	}
}

// prepare makes the cgroup for the next start, unless it is there. The job before is dead.
func (f *forker) prepare() {
	if f.cgroup == nil || !f.used {
		return
	}
	if f.leaf >= 0 {
		_ = unix.Close(f.leaf)
	}
	f.leaf, f.leafErr = f.cgroup.leaf()
	f.used = f.leaf < 0
}

func (f *forker) fork(s *start) (pid, pidfd int, err error) {
	attr := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: &pidfd}
	if f.cgroup != nil {
		f.prepare()
		if f.leaf < 0 {
			return 0, -1, f.leafErr
		}
		f.used = true
		attr.UseCgroupFD, attr.CgroupFD = true, f.leaf
	}
	if s.cancelled.Load() || f.now() >= s.stopAt {
		return 0, -1, errTooLate
	}
	pid, err = syscall.ForkExec(s.path, s.argv, &syscall.ProcAttr{Env: s.env, Files: []uintptr{0, 1, 2}, Sys: attr})
	if err != nil {
		return 0, -1, err
	}
	return pid, pidfd, nil
}

// resetIgnored gives the default to the signals that were ignored when this process was started and have no handler in Go's
// runtime, but for those to keep: the job would inherit that. They are those that C libraries keep for themselves (32 to 34).
func resetIgnored(keep []unix.Signal) {
	const sigIgn, words = 1, 4 // of struct sigaction, whose first word is the handler on all systems that Go runs on but MIPS
	for sig := uintptr(1); sig <= 64; sig++ {
		var old, deflt [words]uintptr
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&old)), 8, 0, 0)
		if errno == 0 && old[0] == sigIgn && !slices.Contains(keep, unix.Signal(sig)) {
			_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&deflt)), 0, 8, 0, 0)
		}
	}
}
