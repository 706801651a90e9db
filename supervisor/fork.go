//go:build linux

package supervisor

import (
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

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
	now        func() time.Duration

	requests chan *start
	done     atomic.Pointer[start]
	wake     func()
}

// run serves requests until the process ends.
func (f *forker) run() {
	runtime.LockOSThread()
	// What the job inherits of the signal mask is this thread's. What it could inherit of ignored signals is none:
	// every signal has a handler here, and exec resets those.
	var none unix.Sigset_t
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &none, nil)
	if f.noNewPrivs {
		_ = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	for s := range f.requests {
		s.pid, s.pidfd, s.err = f.fork(s)
		f.done.Store(s)
		f.wake()
	}
}

func (f *forker) fork(s *start) (pid, pidfd int, err error) {
	attr := &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, PidFD: &pidfd}
	if f.cgroup != nil {
		leaf, err := f.cgroup.leaf()
		if err != nil {
			return 0, -1, err
		}
		defer func() { _ = unix.Close(leaf) }()
		attr.UseCgroupFD, attr.CgroupFD = true, leaf
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
