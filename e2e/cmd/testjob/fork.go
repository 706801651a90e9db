//go:build linux

package main

import (
	"errors"
	"runtime"
	"runtime/debug"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// A forked process goes on in this file with one thread and without the runtime's others: it
// allocates nothing and makes raw system calls only.

// forksLife is after how long the kernel kills what was forked here, if nobody else does.
const forksLife = time.Minute

// sigevent is sigevent(3type) as the kernel reads it.
type sigevent struct {
	_      uint64
	signal int32
	notify int32 // 0: SIGEV_SIGNAL
	_      [12]int32
}

// rawFork returns 0 in the child and less than 0 when it could not fork. The kernel kills the
// child at the end. Where Go's runtime had asked this thread to yield, the child does so at its
// next call of a function that checks the stack, and waits for ever for threads that it doesn't
// have. Until the timer is set it calls none.
func rawFork(end time.Duration) int {
	event, timer := sigevent{signal: int32(unix.SIGKILL)}, int32(0)
	at := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(end))}
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return -1
	}
	if pid == 0 {
		_, _, _ = unix.RawSyscall(unix.SYS_TIMER_CREATE, unix.CLOCK_BOOTTIME,
			uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&timer)))
		_, _, _ = unix.RawSyscall6(unix.SYS_TIMER_SETTIME, uintptr(timer), unix.TIMER_ABSTIME,
			uintptr(unsafe.Pointer(&at)), 0, 0, 0)
	}
	return int(pid)
}

func rawExit() {
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
}

// rawSleep ends the process where the witness or the process's time has ended.
func rawSleep(d time.Duration, witness int, end time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
	if boottime.Now() > end {
		rawExit()
	}
	if witness < 0 {
		return
	}
	poll := unix.PollFd{Fd: int32(witness)}
	var none unix.Timespec
	_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&poll)), 1,
		uintptr(unsafe.Pointer(&none)), 0, 0, 0)
	if poll.Revents&unix.POLLHUP != 0 {
		rawExit()
	}
}

// forking calls f with the number that a behaviour has, the descriptor of the connection to the
// witness, or -1, and the moment at which all that is forked must end.
func forking(f func(n, witness int, end time.Duration) error) func(*process, string) error {
	return func(p *process, n string) error {
		fd := -1
		if p.witness != nil {
			fd = int(p.witness.Fd())
		}
		return f(number(n), fd, boottime.Now()+forksLife)
	}
}

// forkBomb starts n chains. In each there is one process at a time, which forks its successor and
// ends: whoever kills by pid is always a step behind.
func forkBomb(n, witness int, end time.Duration) error {
	debug.SetGCPercent(-1)
	for range n {
		if rawFork(end) != 0 {
			continue
		}
		for {
			rawSleep(5*time.Millisecond, witness, end)
			if rawFork(end) > 0 {
				rawExit()
			}
		}
	}
	return nil
}

func startFill(n, witness int, end time.Duration) error {
	go fill(n, witness, end)
	return nil
}

// fill keeps n children, or as many as the kernel allows.
func fill(n, witness int, end time.Duration) {
	runtime.LockOSThread()
	debug.SetGCPercent(-1)
	for children := 0; ; {
		if children < n {
			switch pid := rawFork(end); {
			case pid == 0:
				for {
					rawSleep(100*time.Millisecond, witness, end)
				}
			case pid > 0:
				children++
				continue
			}
		}
		rawSleep(time.Millisecond, witness, end)
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 || err != nil {
				break
			}
			children--
		}
	}
}

// leaveOrphans leaves n idle processes behind. They hold no connection to the witness: thousands
// take seconds to exit, though SIGKILL has reached them at once. They call no function of Go's:
// see rawFork.
func leaveOrphans(n, witness int, end time.Duration) error {
	for range n {
		switch pid := rawFork(end); {
		case pid == 0:
			_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(witness), 0, 0)
			for {
				_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0)
			}
		case pid < 0:
			return errors.New("no more processes can be forked")
		}
	}
	return nil
}
