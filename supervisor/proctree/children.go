//go:build linux

package proctree

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// Children counts the children of this process, except those in except. Zombies count until they
// are reaped. ok is false if something could not be read. Without the kernel's lists of children it
// reads the process table. With noNewPrivs set, a child that may gain privileges does not count,
// because it can't descend from the job: somebody has put it into the container in which this is
// process 1.
func (s *Scanner) Children(noNewPrivs bool, except ...int) (count int, ok bool) {
	s.broken = false
	counts := func(s *Scanner, child int) {
		if !contains(except, child) && (!noNewPrivs || !s.mayGainPrivileges(child)) {
			count++
		}
	}
	listed := s.eachChild(s.Self, counts)
	if listed || s.broken {
		return count, !s.broken
	}
	s.scan()
	count = 0
	for i := range s.n {
		if int(s.ppid[i]) == s.Self {
			counts(s, int(s.pid[i]))
		}
	}
	return count, !s.broken
}

// mayGainPrivileges reports whether the process is known to run without no_new_privs.
func (s *Scanner) mayGainPrivileges(pid int) bool {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/status"), unix.O_RDONLY)
	if errno != 0 {
		return false
	}
	n, _ := rawRead(fd, s.status[:])
	CloseRaw(fd)
	return bytes.Contains(s.status[:n], noNewPrivsOff)
}

var noNewPrivsOff = []byte("\nNoNewPrivs:\t0\n")

// eachChild calls f for every child of pid that the kernel's own lists show (proc_tid_children(5)),
// zombies included. A list can leave out a child only if another child is reaped while the list is
// read. Only the caller reaps our own children. eachChild returns false if a thread has no list:
// either the thread has ended, and its children become those of another thread, or the kernel has
// no such lists.
func (s *Scanner) eachChild(pid int, f func(s *Scanner, child int)) (listed bool) {
	dir, errno := s.openat(s.procPath(pid, "/task", 0, ""), unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		s.broken = s.broken || !gone(errno) || pid == s.Self
		return false
	}
	listed = true
	s.eachThread(dir, func(s *Scanner, tid int) bool {
		fd, errno := s.openat(s.procPath(pid, "/task/", tid, "/children"), unix.O_RDONLY)
		switch {
		case errno == unix.ENOENT:
			listed = false
		case errno != 0:
			s.broken = true
		default:
			s.eachListed(fd, f)
			CloseRaw(fd)
		}
		return true
	})
	CloseRaw(dir)
	return listed
}

func contains(list []int, v int) bool {
	for _, e := range list {
		if v == e {
			return true
		}
	}
	return false
}

// eachListed calls f for each of the numbers in fd.
func (s *Scanner) eachListed(fd int, f func(s *Scanner, v int)) {
	for v, digits := 0, 0; ; {
		n, errno := rawRead(fd, s.stat[:])
		if errno != 0 {
			s.broken = s.broken || !gone(errno)
			return
		}
		if n == 0 {
			return
		}
		for _, c := range s.stat[:n] {
			if c >= '0' && c <= '9' {
				v = v*10 + int(c-'0')
				digits++
				continue
			}
			if digits > 0 {
				f(s, v)
			}
			v, digits = 0, 0
		}
	}
}
