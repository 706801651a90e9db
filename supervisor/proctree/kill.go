//go:build linux

package proctree

import "golang.org/x/sys/unix"

// KillDescendants kills every descendant of root except those in except. It stops all of them
// before it kills the first, so that none can fork when another exits. It reports whether any lived
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

// signalMarked sends sig to each marked process through a pidfd. It reads the parent again after it
// has opened the pidfd. The parent must be the same, or root, which is the new parent of orphans.
// Otherwise the pid may be a stranger's by now, and the next scan decides.
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
			// A child of ours. Only we reap it, so the pid is still its own. And /proc may hide it.
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
			} else { // there is no free descriptor: use a plain kill after the same check
				_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			}
		}
		if errno == 0 {
			CloseRaw(int(pidfd))
		}
	}
}

// mostListed bounds how many processes KillListed kills.
const mostListed = 256

// KillListed kills the descendants of root that the kernel's lists of children show, except those
// in except. It is far faster than a scan of the process table. It proves nothing, because it does
// not see what forks meanwhile, or gets another parent.
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
