//go:build linux

package proctree

import "golang.org/x/sys/unix"

// KillDescendants kills every descendant of root but those in except. It stops all before it kills
// the first, so that none can answer the exit of another by a fork. It reports whether any lived
// when the table was read, or could not be read.
func (s *Scanner) KillDescendants(root int, except ...int) (left bool) {
	s.scan()
	if s.markDescendants(root, except...) == 0 {
		return s.broken
	}
	s.signalMarked(root, unix.SIGSTOP)
	s.signalMarked(root, unix.SIGKILL)
	return true
}

// signalMarked sends sig to each marked process through a pidfd. Its parent is read again after the
// pidfd was opened: it must be what it was, or root, to whom orphans fall; else the number may be a
// stranger's by now, and the next scan decides.
func (s *Scanner) signalMarked(root int, sig unix.Signal) {
	for i := range s.n {
		if i%256 == 255 {
			s.Yield()
		}
		if !s.member[i] || !s.alive[i] {
			continue
		}
		pid := int(s.pid[i])
		if int(s.ppid[i]) == s.Self {
			// A child of ours. Only we reap it, so that the number is not another's, and /proc may
			// hide it.
			_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			continue
		}
		pidfd, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(pid), 0, 0)
		if errno == unix.ESRCH {
			continue
		}
		if parent := s.parent(pid); parent != 0 && (parent == int(s.ppid[i]) || parent == root) {
			if errno == 0 {
				SignalPidfd(int(pidfd), sig)
			} else { // no descriptor to be had: a plain kill, after the same check, does instead
				_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			}
		}
		if errno == 0 {
			CloseRaw(int(pidfd))
		}
	}
}

// mostListed bounds for how long KillListed goes on.
const mostListed = 256

// KillListed kills what the kernel's lists of children show to descend from root, but for those in
// except. It is far quicker than to read the process table, and proves nothing: what forks
// meanwhile, or falls to another parent, is not seen.
func (s *Scanner) KillListed(root int, except ...int) {
	s.n = 0
	list := func(parent int) {
		s.eachChild(parent, func(s *Scanner, child int) {
			if s.n < mostListed && !contains(except, child) {
				s.add(int32(child), int32(parent), true, true)
			}
		})
	}
	list(root)
	for i := 0; i < s.n; i++ {
		list(int(s.pid[i]))
	}
	s.signalMarked(root, unix.SIGKILL)
}
