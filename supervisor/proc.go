//go:build linux

package supervisor

import (
	"errors"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Now is the time since boot, suspend included (CLOCK_BOOTTIME). Every deadline is a reading of it.
func Now() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic("clock_gettime: " + err.Error()) // CLOCK_BOOTTIME exists since Linux 2.6.39
	}
	return time.Duration(ts.Nano())
}

// maxProcesses bounds the table of a scan. Where a host has more processes, a later scan sees the rest,
// for what the earlier one saw is dead by then.
const maxProcesses = 1 << 17

// scanner reads /proc. Its buffers exist from the start and nothing in it allocates, for it runs on the guard's kill path;
// the kernel gives the pages only once they are used.
type scanner struct {
	proc int // directory descriptor of /proc
	self int

	dirents []byte
	stat    [512]byte
	path    [64]byte
	environ []byte

	pid, ppid []int32
	member    []bool
	n         int
}

func newScanner() (*scanner, error) {
	proc, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// A /proc of another PID namespace would show strangers under our children's numbers.
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(unix.Getpid()) {
		_ = unix.Close(proc)
		return nil, errors.New("/proc does not show this PID namespace: mount it anew (mount -t proc proc /proc)")
	}
	return &scanner{
		proc:    proc,
		self:    unix.Getpid(),
		dirents: make([]byte, 32<<10),
		pid:     make([]int32, maxProcesses),
		ppid:    make([]int32, maxProcesses),
		member:  make([]bool, maxProcesses),
	}, nil
}

func (s *scanner) close() { _ = unix.Close(s.proc) }

// procPath writes /proc-relative "PID/name" (or "PID/task/TID/name") into the scanner's buffer, with the final NUL.
func (s *scanner) procPath(pid int, middle string, tid int, name string) *byte {
	b := strconv.AppendInt(s.path[:0], int64(pid), 10)
	b = append(b, middle...)
	if tid != 0 {
		b = strconv.AppendInt(b, int64(tid), 10)
	}
	b = append(b, name...)
	b = append(b, 0)
	return &b[0]
}

// openat opens a path under /proc without allocating.
func (s *scanner) openat(path *byte, flags int) (int, unix.Errno) {
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(s.proc), uintptr(unsafe.Pointer(path)), uintptr(flags|unix.O_CLOEXEC), 0, 0, 0)
	return int(fd), errno
}

func rawRead(fd int, b []byte) int {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return -1
		}
		return int(n)
	}
}

func rawClose(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// parent reads the parent of pid from /proc/PID/stat, 0 if there is no such process.
func (s *scanner) parent(pid int) int {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/stat"), unix.O_RDONLY)
	if errno != 0 {
		return 0
	}
	n := rawRead(fd, s.stat[:])
	rawClose(fd)
	if n <= 0 {
		return 0
	}
	b := s.stat[:n]
	// The name stands in parentheses and may hold anything, so the last closing one ends it (proc_pid_stat(5)).
	i := len(b) - 1
	for i >= 0 && b[i] != ')' {
		i--
	}
	i += 4 // ") S "
	if i < 4 || i >= len(b) {
		return 0
	}
	ppid, _ := parseInt(b[i:])
	return ppid
}

// parseInt reads a decimal number at the start of b and returns it with its length.
func parseInt(b []byte) (v, n int) {
	for n < len(b) && b[n] >= '0' && b[n] <= '9' {
		v = v*10 + int(b[n]-'0')
		n++
	}
	return v, n
}

// eachEntry calls f for every entry of the directory fd whose name is a number, until f returns false.
func (s *scanner) eachEntry(fd int, f func(s *scanner, id int) bool) {
	_, _ = unix.Seek(fd, 0, unix.SEEK_SET)
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&s.dirents[0])), uintptr(len(s.dirents)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || n == 0 {
			return
		}
		b := s.dirents[:n]
		for len(b) > 19 {
			reclen := int(b[16]) | int(b[17])<<8
			name := b[19:reclen]
			if id, digits := parseInt(name); digits > 0 && name[digits] == 0 {
				if !f(s, id) {
					return
				}
			}
			b = b[reclen:]
		}
	}
}

// scan reads the process table.
func (s *scanner) scan() {
	s.n = 0
	s.eachEntry(s.proc, func(s *scanner, pid int) bool {
		if ppid := s.parent(pid); ppid != 0 && s.n < len(s.pid) {
			s.pid[s.n], s.ppid[s.n], s.member[s.n] = int32(pid), int32(ppid), false
			s.n++
		}
		return true
	})
}

// index finds pid in the table, which is in the order of /proc: ascending.
func (s *scanner) index(pid int32) int {
	lo, hi := 0, s.n
	for lo < hi {
		if mid := (lo + hi) / 2; s.pid[mid] < pid {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo < s.n && s.pid[lo] == pid {
		return lo
	}
	return -1
}

// markDescendants marks every process that descends from root, but for those in except and what descends from them.
// It returns how many there are.
func (s *scanner) markDescendants(root int, except ...int) int {
	count := 0
	for changed := true; changed; {
		changed = false
		for i := range s.n {
			if s.member[i] {
				continue
			}
			if int(s.ppid[i]) != root {
				if j := s.index(s.ppid[i]); j < 0 || !s.member[j] {
					continue
				}
			}
			excepted := false
			for _, e := range except {
				excepted = excepted || int(s.pid[i]) == e
			}
			if excepted {
				continue
			}
			s.member[i], changed = true, true
			count++
		}
	}
	return count
}

// killDescendants kills every descendant of root but those in except. All are stopped before the first is killed, so that
// none can answer the death of another by a fork. It returns how many of them had not ended yet, zombies of which every
// thread has gone left out.
func (s *scanner) killDescendants(root int, except ...int) int {
	s.scan()
	if s.markDescendants(root, except...) == 0 {
		return 0
	}
	s.signalMarked(unix.SIGSTOP)
	return s.signalMarked(unix.SIGKILL)
}

// signalMarked sends sig to each marked process through a pidfd. Its parent is read again after the pidfd was opened:
// where that has changed, the pid may be a stranger's by now, and the next scan decides. It returns how many live.
func (s *scanner) signalMarked(sig unix.Signal) int {
	alive := 0
	for i := range s.n {
		if !s.member[i] {
			continue
		}
		pid := int(s.pid[i])
		pidfd, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(pid), 0, 0)
		if errno == unix.ESRCH || s.parent(pid) != int(s.ppid[i]) {
			if errno == 0 {
				rawClose(int(pidfd))
				alive++
			}
			continue
		}
		if errno != 0 { // no descriptor to be had: a plain kill, under the same check, is better than none
			_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			alive++
			continue
		}
		signalPidfd(int(pidfd), sig)
		if !pidfdEnded(int(pidfd)) {
			alive++
		}
		rawClose(int(pidfd))
	}
	return alive
}

// pidfdEnded says if the process has ended, all its threads included (pidfd_open(2): readable then).
func pidfdEnded(pidfd int) bool {
	fds := [1]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	var now unix.Timespec
	n, _, _ := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds[0])), 1, uintptr(unsafe.Pointer(&now)), 0, 0, 0)
	return n == 1
}

func signalPidfd(pidfd int, sig unix.Signal) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PIDFD_SEND_SIGNAL, uintptr(pidfd), uintptr(sig), 0, 0, 0, 0)
}

// children counts the children of this process, but for those in except: zombies count until they are reaped.
// It reads the kernel's own list (proc_tid_children(5)); that can leave out a child only when another is reaped while
// it is read, and none is reaped but by the caller. Where the kernel has no such list the process table serves.
func (s *scanner) children(except ...int) int {
	dir, errno := s.openat(s.procPath(s.self, "/task", 0, ""), unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		return s.childrenByScan(except...)
	}
	count, known := 0, true
	s.eachEntry(dir, func(s *scanner, tid int) bool {
		fd, errno := s.openat(s.procPath(s.self, "/task/", tid, "/children"), unix.O_RDONLY)
		if errno != 0 {
			known = false
			return false
		}
		count += s.countList(fd, except)
		rawClose(fd)
		return true
	})
	rawClose(dir)
	if !known {
		return s.childrenByScan(except...)
	}
	return count
}

// countList counts the numbers in fd that are not in except.
func (s *scanner) countList(fd int, except []int) int {
	count, v, digits := 0, 0, 0
	for {
		n := rawRead(fd, s.stat[:])
		if n <= 0 {
			return count
		}
		for _, c := range s.stat[:n] {
			if c >= '0' && c <= '9' {
				v = v*10 + int(c-'0')
				digits++
				continue
			}
			if digits > 0 {
				count++
				for _, e := range except {
					if v == e {
						count--
					}
				}
			}
			v, digits = 0, 0
		}
	}
}

func (s *scanner) childrenByScan(except ...int) int {
	s.scan()
	count := 0
	for i := range s.n {
		if int(s.ppid[i]) != s.self {
			continue
		}
		count++
		for _, e := range except {
			if int(s.pid[i]) == e {
				count--
			}
		}
	}
	return count
}

// killByEnvironment kills every process whose environment has the entry, e.g. LEASEHOLD_LEASE_ID=1f. It finds what is left
// of a job whose guard is gone, unless it wiped its environment or belongs to another user. It returns how many there were.
func (s *scanner) killByEnvironment(entry string) int {
	if s.environ == nil {
		s.environ = make([]byte, 256<<10)
	}
	count := 0
	s.scan()
	for i := range s.n {
		pid := int(s.pid[i])
		if pid == s.self || !s.hasEnvironment(pid, entry) {
			continue
		}
		pidfd, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(pid), 0, 0)
		if errno != 0 {
			continue
		}
		if s.hasEnvironment(pid, entry) { // read again, now that the pidfd pins the process
			signalPidfd(int(pidfd), unix.SIGKILL)
			count++
		}
		rawClose(int(pidfd))
	}
	return count
}

func (s *scanner) hasEnvironment(pid int, entry string) bool {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/environ"), unix.O_RDONLY)
	if errno != 0 {
		return false
	}
	defer rawClose(fd)
	n := 0
	for n < len(s.environ) {
		m := rawRead(fd, s.environ[n:])
		if m <= 0 {
			break
		}
		n += m
	}
	b := s.environ[:n]
	for len(b) >= len(entry) {
		if string(b[:len(entry)]) == entry && (len(b) == len(entry) || b[len(entry)] == 0) {
			return true
		}
		i := 0
		for i < len(b) && b[i] != 0 {
			i++
		}
		if i == len(b) {
			break
		}
		b = b[i+1:]
	}
	return false
}
