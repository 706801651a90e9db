//go:build linux

package proctree

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// Freezer freezes all that is in a Cgroup. A frozen process runs no instruction of its own. It can
// be killed. The calls may block: the kernel makes whoever changes a cgroup wait for others that do
// (cgroup_mutex). One goroutine at a time may use it.
type Freezer struct {
	freeze int // cgroup.freeze
	Events int // cgroup.events: POLLPRI shows a change
	// inside is how /proc/PID/cgroup begins for a process in the cgroup.
	inside []byte
	procs  *Scanner
	buf    [4096]byte
}

// openFreezer opens the cgroup's freezer.
func (c *Cgroup) openFreezer() error {
	f := &Freezer{freeze: -1, Events: -1}
	var err error
	if f.procs, err = NewScanner(); err != nil {
		return err
	}
	c.Freezer = f
	for _, file := range []struct {
		fd    *int
		name  string
		flags int
	}{
		{&f.freeze, "cgroup.freeze", unix.O_WRONLY}, // Linux 5.2
		{&f.Events, "cgroup.events", unix.O_RDONLY},
	} {
		path := filepath.Join(c.Dir, file.name)
		fd, err := unix.Open(path, file.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		*file.fd = fd
	}
	return nil
}

func (f *Freezer) close() {
	f.procs.Close()
	for _, fd := range []int{f.freeze, f.Events} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// Set has the kernel freeze or thaw all of the cgroup. A return does not mean that it is frozen:
// see Frozen.
func (f *Freezer) Set(frozen bool) error {
	f.buf[0] = '0'
	if frozen {
		f.buf[0] = '1'
	}
	for {
		if _, err := unix.Write(f.freeze, f.buf[:1]); err != unix.EINTR {
			return err
		}
	}
}

// Frozen reports whether every process in the cgroup is frozen. A thread in uninterruptible sleep
// is not. It runs no instruction of its own, but the kernel may still work for it, and it may go on
// for a moment before it is frozen.
func (f *Freezer) Frozen() bool {
	n, err := unix.Pread(f.Events, f.buf[:], 0)
	return err == nil && bytes.Contains(f.buf[:n], frozenOne)
}

var frozenOne = []byte("frozen 1")

// Outside finds a process that descends from root, and of which a thread is, or could be, outside
// the cgroup. Such a process runs on. It returns its pid, 0 if there is none, and -1 if something
// could not be read. A single search that finds none proves nothing: see Scanner.
func (f *Freezer) Outside(root int) int {
	s := f.procs
	s.scan()
	s.markDescendants(root)
	for i := range s.n {
		if s.member[i] && s.alive[i] && !f.isInside(int(s.pid[i])) {
			return int(s.pid[i])
		}
	}
	if s.broken {
		return -1
	}
	return 0
}

// isInside reports whether all threads of the process are in the cgroup, or have exited. If the
// main thread has exited, the kernel moves only the others to another cgroup. And a thread may be
// moved alone (cgroup.threads).
func (f *Freezer) isInside(pid int) bool {
	dir, errno := f.procs.openat(f.procs.procPath(pid, "/task", 0, ""), unix.O_RDONLY|
		unix.O_DIRECTORY)
	if errno != 0 {
		return gone(errno)
	}
	inside := true
	f.procs.eachThread(dir, func(_ *Scanner, tid int) bool {
		inside = f.threadIsInside(pid, tid)
		return inside
	})
	CloseRaw(dir)
	return inside
}

func (f *Freezer) threadIsInside(pid, tid int) bool {
	s := f.procs
	fd, errno := s.openat(s.procPath(pid, "/task/", tid, "/cgroup"), unix.O_RDONLY)
	n := 0
	if errno == 0 {
		n, errno = rawRead(fd, f.buf[:])
		CloseRaw(fd)
	}
	if errno != 0 {
		return gone(errno)
	}
	for line := range bytes.Lines(f.buf[:n]) { // those of cgroup v1 are among them
		if rest, ok := bytes.CutPrefix(line, f.inside); ok && len(rest) > 0 &&
			(rest[0] == '/' || rest[0] == '\n') {
			return true
		}
	}
	return false
}

// probe freezes the process pid, which is in a leaf of the cgroup, and leaves it frozen. It learns
// from it how /proc shows that a process is in the cgroup.
func (f *Freezer) probe(pid int) error {
	if hidden := ProcHidden(); hidden != "" {
		return fmt.Errorf("%w: /proc hides processes (%s), which may be outside the cgroup",
			ErrUnavailable, hidden)
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return err
	}
	path, err := cgroupPath(string(text))
	if err != nil {
		return err
	}
	f.inside = []byte("0::" + filepath.Dir(path)) // the leaf's parent
	if err := f.Set(true); err != nil {
		return err
	}
	for end := boottime.Now() + 2*time.Second; !f.Frozen(); {
		if boottime.Now() > end {
			return errors.New("cgroup.events does not show it frozen")
		}
		_, _ = unix.Poll(nil, 1)
	}
	if !f.isInside(pid) || f.isInside(unix.Getpid()) {
		return errors.New("/proc does not show which processes are in the cgroup")
	}
	return nil
}
