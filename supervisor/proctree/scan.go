//go:build linux

package proctree

import (
	"encoding/binary"
	"errors"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxProcesses bounds the table of a scan. If a host has more processes, a later scan sees the
// rest, because those of the earlier one have exited by then.
const maxProcesses = 1 << 17

// Scanner reads /proc. Its buffers exist from the start and nothing in it allocates, because it
// runs on the guard's kill path. The kernel provides the pages only when they are used.
type Scanner struct {
	Proc int // directory descriptor of /proc
	Self int // pid of this process

	// Yield is called now and then in the middle of long work.
	Yield func()

	started int // of this process, in clock ticks since boot

	entry   [48]byte // room for the longest name in /proc, and for two numbers at most
	dirents []byte
	stat    [1024]byte
	status  [4096]byte
	path    [64]byte

	// What the last scan showed. It reads each process as soon as the directory shows it, in the
	// order of the pids, and a child's pid is higher than its parent's. So every process that lives
	// when the scan ends was seen alive, or descends from one that was. That fails only if the pids
	// start over during the scan. So one clean scan alone proves nothing.
	pid, ppid []int32
	alive     []bool // when it was read
	member    []bool
	n         int
	broken    bool // something could not be read, so there may be processes that were not seen
}

// NewScanner fails if /proc does not show this PID namespace.
func NewScanner() (*Scanner, error) {
	proc, err := unix.Open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	// A /proc of another PID namespace would show strangers under our children's numbers.
	if self, err := os.Readlink("/proc/self"); err != nil || self != strconv.Itoa(unix.Getpid()) {
		_ = unix.Close(proc)
		return nil, errors.New("/proc does not show this PID namespace: " +
			"mount it anew (mount -t proc proc /proc)")
	}
	s := &Scanner{
		Proc:    proc,
		Self:    unix.Getpid(),
		dirents: make([]byte, 4<<10),
		pid:     make([]int32, maxProcesses),
		ppid:    make([]int32, maxProcesses),
		alive:   make([]bool, maxProcesses),
		member:  make([]bool, maxProcesses),
		Yield:   func() {},
	}
	s.started = s.process(s.Self).started
	return s, nil
}

// Close closes the scanner.
func (s *Scanner) Close() { _ = unix.Close(s.Proc) }

// procPath writes /proc-relative "PID/name" (or "PID/task/TID/name") into the Scanner's buffer,
// with the final NUL.
func (s *Scanner) procPath(pid int, middle string, tid int, name string) *byte {
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
func (s *Scanner) openat(path *byte, flags int) (int, unix.Errno) {
	fd, _, errno := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(s.Proc),
		uintptr(unsafe.Pointer(path)), uintptr(flags|unix.O_CLOEXEC), 0, 0, 0)
	return int(fd), errno
}

func rawRead(fd int, b []byte) (int, unix.Errno) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(&b[0])),
			uintptr(len(b)))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// gone reports whether the error means that there is no such process any more. Any other error
// leaves that open.
func gone(errno unix.Errno) bool { return errno == unix.ENOENT || errno == unix.ESRCH }

// process is what /proc/PID/stat says of a process. The zero value: there is none.
type process struct {
	ppid    int
	alive   bool // at least one thread of it has not ended
	kernel  bool // it is a thread of the kernel's
	exiting bool // its main thread is at its end
	started int  // in clock ticks since boot
}

// parent reads the parent of pid, 0 if there is no such process.
func (s *Scanner) parent(pid int) int { return s.process(pid).ppid }

func (s *Scanner) process(pid int) process {
	fd, errno := s.openat(s.procPath(pid, "", 0, "/stat"), unix.O_RDONLY)
	n := 0
	if errno == 0 {
		n, errno = rawRead(fd, s.stat[:])
		CloseRaw(fd)
	}
	if errno != 0 {
		s.broken = s.broken || !gone(errno)
		return process{}
	}
	return parseStat(s.stat[:n])
}

// parseStat reads the text of /proc/PID/stat (proc_pid_stat(5)).
func parseStat(b []byte) process {
	// The name stands in parentheses and may hold anything, so the last closing one ends it.
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

// eachProcess calls f for every process, in the order of the pids. It reads the directory one entry
// at a time. The kernel's next entry is the process that has the next pid at that moment. So no
// child that was forked meanwhile is left out.
func (s *Scanner) eachProcess(f func(s *Scanner, pid int)) {
	_, _ = unix.Seek(s.Proc, 0, unix.SEEK_SET)
	for count := 0; ; {
		b, ok := s.getdents(s.Proc, s.entry[:])
		if !ok {
			return
		}
		first := int(b[16]) | int(b[17])<<8
		if pid, ok := entryNumber(b); ok {
			f(s, pid)
			if count++; count%256 == 0 {
				s.Yield()
			}
		}
		if len(b) > first { // it has read two entries
			_, _ = unix.Seek(s.Proc, int64(binary.NativeEndian.Uint64(b[8:])), unix.SEEK_SET)
		}
	}
}

// eachThread calls f for every entry of a task directory, until f returns false.
func (s *Scanner) eachThread(dir int, f func(s *Scanner, tid int) bool) {
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

// getdents reads entries of a directory (getdents64(2)). It returns false at the end, and if the
// directory can't be read.
func (s *Scanner) getdents(fd int, buf []byte) ([]byte, bool) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_GETDENTS64, uintptr(fd),
			uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
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

// add lists one process.
func (s *Scanner) add(pid, ppid int32, alive, member bool) {
	s.pid[s.n], s.ppid[s.n], s.alive[s.n], s.member[s.n] = pid, ppid, alive, member
	s.n++
}

// scan reads the process table.
func (s *Scanner) scan() {
	s.n, s.broken = 0, false
	s.eachProcess(func(s *Scanner, pid int) {
		p := s.process(pid)
		switch {
		case p.ppid == 0 || p.started < s.started: // the job is younger than we are
		case s.n == len(s.pid):
			s.broken = true
		default:
			s.add(int32(pid), int32(p.ppid), p.alive, false)
		}
	})
}

// Descends reports whether the process descends from ancestor, as /proc shows it. A process that
// has been reaped descends from nobody.
func Descends(pid, ancestor int) bool {
	for range 3 { // a parent may exit between two reads: then its child has another one
		for p, gone := pid, false; !gone && p > 0; {
			text, err := os.ReadFile("/proc/" + strconv.Itoa(p) + "/stat")
			if gone = err != nil; gone {
				break
			}
			if p = parseStat(text).ppid; p == ancestor {
				return true
			}
		}
	}
	return false
}

// index finds pid in the table, which is in the order of /proc: ascending.
func (s *Scanner) index(pid int32) int {
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

// markDescendants marks every process that descends from root, except those in except and their
// descendants. It returns how many of them lived when they were read.
func (s *Scanner) markDescendants(root int, except ...int) int {
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
