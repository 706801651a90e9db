//go:build linux

package proctree

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// PidfdExited reports whether the process has exited, all its threads included (pidfd_open(2): it
// is readable then).
func PidfdExited(pidfd int) bool {
	fds := [1]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	var now unix.Timespec
	n, _, _ := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), 1,
		uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return n == 1
}

// SignalPidfd sends a signal to the process. One that has exited gets none.
func SignalPidfd(pidfd int, sig unix.Signal) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PIDFD_SEND_SIGNAL, uintptr(pidfd), uintptr(sig), 0, 0, 0, 0)
}

// CloseRaw closes a descriptor by a raw system call: Go's runtime could make the caller wait.
func CloseRaw(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// Exit is how a process exited.
type Exit struct {
	Code   int // as a shell has it: 128+n for a signal
	Signal int // 0: none ended it
}

// ExitOf decodes a wait status.
func ExitOf(ws unix.WaitStatus) Exit {
	if ws.Signaled() {
		return Exit{Code: 128 + int(ws.Signal()), Signal: int(ws.Signal())}
	}
	return Exit{Code: ws.ExitStatus()}
}
