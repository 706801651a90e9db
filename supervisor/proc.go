//go:build linux

package supervisor

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxProcesses bounds the table of a scan. Where a host has more processes, a later scan sees the rest,
// for what the earlier one saw is dead by then.
const maxProcesses = 1 << 17

// scanner reads /proc. Its buffers exist from the start and nothing in it allocates, for it runs on the guard's kill path;
// the kernel gives the pages only once they are used.
type scanner struct {
	proc    int // directory descriptor of /proc
	self    int
	started int // of this process, in clock ticks since boot

	entry   [48]byte // room for the longest name in /proc, and for two numbers at most
	dirents []byte
	stat    [1024]byte
	status  [4096]byte
	path    [64]byte

	// What the last scan showed. Each process is read as soon as the directory shows it, in the order of the numbers, and a
	// child's number is higher than its parent's: whatever lives when the scan ends has been seen, alive, or descends from one
	// that was. Only where the numbers start over in that moment does that fail, so that one clean scan alone proves nothing.
	pid, ppid []int32
	alive     []bool // when it was read
	member    []bool
	n         int
	broken    bool // something could not be read: what was not seen may be there all the same

	// breathe is called now and then in the middle of long work.
	breathe func()
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
	s := &scanner{
		proc:    proc,
		self:    unix.Getpid(),
		dirents: make([]byte, 4<<10),
		pid:     make([]int32, maxProcesses),
		ppid:    make([]int32, maxProcesses),
		alive:   make([]bool, maxProcesses),
		member:  make([]bool, maxProcesses),
		breathe: func() {},
	}
	s.started = s.process(s.self).started
	return s, nil
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

func rawRead(fd int, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// gone says if the error means that there is no such process any more. Any other leaves it unknown.
func gone(errno unix.Errno) bool { return errno == unix.ENOENT || errno == unix.ESRCH }

func rawClose(fd int) { _, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// process is what /proc/PID/stat says of a process. The zero value: there is none.
type process struct {
	ppid    int
	alive   bool // a thread of it has yet to end
	kernel  bool // it is a thread of the kernel's
	exiting bool // its main thread is at its end
	started int  // in clock ticks since boot
}

// parent reads the parent of pid, 0 if there is no such process.
func (s *scanner) parent(pid int) int { return s.process(pid).ppid }

func (s *scanner) process(pid int) process {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/stat"), unix.O_RDONLY)
	n := 0
	if errno == 0 {
		n, errno = rawRead(fd, s.stat[:])
		rawClose(fd)
	}
	if errno != 0 {
		s.broken = s.broken || !gone(errno)
		return process{}
	}
	b := s.stat[:n]
	// The name stands in parentheses and may hold anything, so the last closing one ends it (proc_pid_stat(5)).
	i := len(b) - 1
	for i >= 0 && b[i] != ')' {
		i--
	}
	if i < 0 || i+2 >= len(b) {
		return process{}
	}
	state := b[i+2]
	var p process
	threads := 0
	for j, field := i+1, 2; j < len(b)-1; j++ { // the name is field 2
		if b[j] != ' ' {
			continue
		}
		switch field++; field {
		case 4:
			p.ppid, _ = parseInt(b[j+1:])
		case 9:
			const pfExiting, pfKthread = 0x00000004, 0x00200000 // linux/sched.h
			flags, _ := parseInt(b[j+1:])
			p.exiting, p.kernel = flags&pfExiting != 0, flags&pfKthread != 0
		case 20:
			threads, _ = parseInt(b[j+1:])
		case 22:
			p.started, _ = parseInt(b[j+1:])
		}
	}
	// A process whose main thread has ended shows Z while others run.
	p.alive = state != 'Z' && state != 'X' || threads > 1
	return p
}

// parseInt reads a decimal number at the start of b and returns it with its length.
func parseInt(b []byte) (v, n int) {
	for n < len(b) && b[n] >= '0' && b[n] <= '9' {
		v = v*10 + int(b[n]-'0')
		n++
	}
	return v, n
}

// eachProcess calls f for every process, in the order of the numbers. The directory is read one entry at a time, for its next
// entry is whatever process has the next number at that moment: a child that was forked since is not passed over.
func (s *scanner) eachProcess(f func(s *scanner, pid int)) {
	_, _ = unix.Seek(s.proc, 0, unix.SEEK_SET)
	for count := 0; ; {
		b, ok := s.getdents(s.proc, s.entry[:])
		if !ok {
			return
		}
		first := int(b[16]) | int(b[17])<<8
		if pid, ok := entryNumber(b); ok {
			f(s, pid)
			if count++; count%256 == 0 {
				s.breathe()
			}
		}
		if len(b) > first { // there was room for two
			_, _ = unix.Seek(s.proc, int64(binary.NativeEndian.Uint64(b[8:])), unix.SEEK_SET)
		}
	}
}

// eachThread calls f for every entry of a task directory, until f returns false.
func (s *scanner) eachThread(dir int, f func(s *scanner, tid int) bool) {
	for {
		b, ok := s.getdents(dir, s.dirents)
		if !ok {
			return
		}
		for len(b) > 0 {
			if tid, ok := entryNumber(b); ok && !f(s, tid) {
				return
			}
			b = b[int(b[16])|int(b[17])<<8:]
		}
	}
}

// getdents reads entries of a directory (getdents64(2)). It is not ok at the end, and where it can't be read.
func (s *scanner) getdents(fd int, buf []byte) ([]byte, bool) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 || n == 0 {
			s.broken = s.broken || errno != 0 && !gone(errno)
			return nil, false
		}
		return buf[:n], true
	}
}

// entryNumber reads the name of the first directory entry in b as a number.
func entryNumber(b []byte) (int, bool) {
	name := b[19:]
	v, digits := parseInt(name)
	return v, digits > 0 && name[digits] == 0
}

// scan reads the process table.
func (s *scanner) scan() {
	s.n, s.broken = 0, false
	s.eachProcess(func(s *scanner, pid int) {
		p := s.process(pid)
		switch {
		case p.ppid == 0 || p.started < s.started: // the job is younger than we are
		case s.n == len(s.pid):
			s.broken = true
		default:
			s.pid[s.n], s.ppid[s.n], s.alive[s.n], s.member[s.n] = int32(pid), int32(p.ppid), p.alive, false
			s.n++
		}
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
// It returns how many of them lived when they were read.
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
			if s.alive[i] {
				count++
			}
		}
	}
	return count
}

// killDescendants kills every descendant of root but those in except. All are stopped before the first is killed, so that
// none can answer the death of another by a fork. It returns if any lived when the table was read, or could not be read.
func (s *scanner) killDescendants(root int, except ...int) (left bool) {
	s.scan()
	if s.markDescendants(root, except...) == 0 {
		return s.broken
	}
	s.signalMarked(root, unix.SIGSTOP)
	s.signalMarked(root, unix.SIGKILL)
	return true
}

// signalMarked sends sig to each marked process through a pidfd. Its parent is read again after the pidfd was opened: it must
// be what it was, or root, to whom orphans fall; else the number may be a stranger's by now, and the next scan decides.
func (s *scanner) signalMarked(root int, sig unix.Signal) {
	for i := range s.n {
		if i%256 == 255 {
			s.breathe()
		}
		if !s.member[i] || !s.alive[i] {
			continue
		}
		pid := int(s.pid[i])
		if int(s.ppid[i]) == s.self {
			// A child of ours. Only we reap it, so that the number is not another's, and /proc may hide it.
			_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			continue
		}
		pidfd, _, errno := unix.RawSyscall(unix.SYS_PIDFD_OPEN, uintptr(pid), 0, 0)
		if errno == unix.ESRCH {
			continue
		}
		if parent := s.parent(pid); parent != 0 && (parent == int(s.ppid[i]) || parent == root) {
			if errno == 0 {
				signalPidfd(int(pidfd), sig)
			} else { // no descriptor to be had: a plain kill, under the same check, is better than none
				_, _, _ = unix.RawSyscall(unix.SYS_KILL, uintptr(pid), uintptr(sig), 0)
			}
		}
		if errno == 0 {
			rawClose(int(pidfd))
		}
	}
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

// children counts the children of this process, but for those in except: zombies count until they are reaped. What can't be
// read is not known, and ok is false. Where the kernel has no lists of children the process table serves. With noNewPrivs set a
// child without that counts for nothing, for it can't descend from the job: somebody has put it into the container of which this
// is process 1.
func (s *scanner) children(noNewPrivs bool, except ...int) (count int, ok bool) {
	s.broken = false
	counts := func(s *scanner, child int) {
		if !contains(except, child) && (!noNewPrivs || !s.mayGainPrivileges(child)) {
			count++
		}
	}
	listed := s.eachChild(s.self, counts)
	if listed || s.broken {
		return count, !s.broken
	}
	s.scan()
	count = 0
	for i := range s.n {
		if int(s.ppid[i]) == s.self {
			counts(s, int(s.pid[i]))
		}
	}
	return count, !s.broken
}

// mayGainPrivileges reports whether the process is known to run without no_new_privs.
func (s *scanner) mayGainPrivileges(pid int) bool {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/status"), unix.O_RDONLY)
	if errno != 0 {
		return false
	}
	n, _ := rawRead(fd, s.status[:])
	rawClose(fd)
	return bytes.Contains(s.status[:n], noNewPrivsOff)
}

var noNewPrivsOff = []byte("\nNoNewPrivs:\t0\n")

// procHidden returns the mount option by which /proc hides the processes of others, or "".
func procHidden() string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	hidden := ""
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(strings.TrimSpace(line), " - ")
		fields, options := strings.Fields(before), strings.Fields(after)
		if len(fields) < 5 || fields[4] != "/proc" || len(options) < 3 {
			continue
		}
		hidden = "" // the last mount there is the one that is seen
		for option := range strings.SplitSeq(options[2], ",") {
			if value, ok := strings.CutPrefix(option, "hidepid="); ok && value != "0" && value != "off" {
				hidden = option
			}
		}
	}
	return hidden
}

// mostListed bounds for how long killListed goes on.
const mostListed = 256

// killListed kills what the kernel's lists of children show to descend from root, but for those in except. It is far
// quicker than to read the process table, and proves nothing: what forks meanwhile, or falls to another parent, is not seen.
func (s *scanner) killListed(root int, except ...int) {
	s.n = 0
	list := func(parent int) {
		s.eachChild(parent, func(s *scanner, child int) {
			if s.n < mostListed && !contains(except, child) {
				s.pid[s.n], s.ppid[s.n], s.alive[s.n], s.member[s.n] = int32(child), int32(parent), true, true
				s.n++
			}
		})
	}
	list(root)
	for i := 0; i < s.n; i++ {
		list(int(s.pid[i]))
	}
	s.signalMarked(root, unix.SIGKILL)
}

// eachChild calls f for every child of pid that the kernel's own lists show (proc_tid_children(5)); zombies are among them until
// they are reaped. A list can leave out a child only when another is reaped while it is read; of our own children none is but
// by the caller. It returns false if there is a thread without a list: that has ended, and hands its children on, or the kernel
// has none.
func (s *scanner) eachChild(pid int, f func(s *scanner, child int)) (listed bool) {
	dir, errno := s.openat(s.procPath(pid, "/task", 0, ""), unix.O_RDONLY|unix.O_DIRECTORY)
	if errno != 0 {
		s.broken = s.broken || !gone(errno) || pid == s.self
		return false
	}
	listed = true
	s.eachThread(dir, func(s *scanner, tid int) bool {
		fd, errno := s.openat(s.procPath(pid, "/task/", tid, "/children"), unix.O_RDONLY)
		switch {
		case errno == unix.ENOENT:
			listed = false
		case errno != 0:
			s.broken = true
		default:
			s.eachListed(fd, f)
			rawClose(fd)
		}
		return true
	})
	rawClose(dir)
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
func (s *scanner) eachListed(fd int, f func(s *scanner, v int)) {
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
