//go:build linux

package proctree

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"leasehold/internal/boottime"
)

// cgroupPrefix is how the job's cgroup is named: a random part follows.
const cgroupPrefix = "leasehold-"

// Cgroup is the job's own cgroup (v2). The process that makes it holds an exclusive lock on its
// directory while it lives. If another process gets a shared lock, the maker has exited and the
// directory is a leftover. The mode of the directory is 0700, so that no other user can open and
// lock it. The parent would not do, because anybody can lock it.
//
// Each start gets a new leaf inside it. Since Linux 6.14 the kernel kills at once whatever is
// cloned into a cgroup that was ever killed by cgroup.kill (seen with 6.18: the fork compares the
// kill counts of two different cgroups).
type Cgroup struct {
	Dir     string
	FD      int      // the directory, locked by its maker
	Leaves  int      // number of the newest leaf that was made here
	Freezer *Freezer // nil: it was not asked for
	kill    int      // cgroup.kill
	events  int      // cgroup.events
	buf     [256]byte
}

// NewCgroup makes a cgroup below our own. A probe process proves that a process can be started in
// it and killed with it. First, NewCgroup kills and removes what lost predecessors have left beside
// it. The error wraps ErrLeftover if that fails. With freezer set, the probe also proves that the
// process can be frozen, and killed while it is, and there is a Freezer.
func NewCgroup(probe []string, freezer bool) (*Cgroup, error) {
	parent, err := OwnCgroup()
	if err != nil {
		return nil, err
	}
	if err := removeLeftovers(parent); err != nil {
		return nil, err
	}
	c, err := makeCgroup(parent)
	if err != nil {
		return nil, err
	}
	if freezer {
		err = c.openFreezer()
	}
	if err == nil {
		err = c.probe(probe)
	}
	if err != nil {
		if c.Freezer != nil {
			c.Freezer.close()
		}
		c.Remove()
		return nil, err
	}
	return c, nil
}

// makeCgroup makes a cgroup and locks it. Until it is locked it looks like a leftover, and another
// guard that starts may remove it. Then makeCgroup makes another one.
func makeCgroup(parent string) (*Cgroup, error) {
	for try := 1; ; try++ {
		dir, err := os.MkdirTemp(parent, cgroupPrefix)
		if err != nil {
			return nil, err
		}
		c, err := OpenCgroup(dir)
		if err == nil {
			err = unix.Flock(c.FD, unix.LOCK_EX|unix.LOCK_NB)
		}
		removed := unix.Access(dir, unix.F_OK) != nil // perhaps before we had the lock
		if err == nil && !removed {
			return c, nil
		}
		if c != nil {
			c.close()
		}
		_ = os.Remove(dir)
		if try == 100 || !removed && !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("make a cgroup in %s: %w", parent, cmp.Or(err,
				error(unix.ENOENT)))
		}
	}
}

// OpenCgroup opens an existing cgroup. The elector opens the guard's with it.
func OpenCgroup(dir string) (*Cgroup, error) {
	c := &Cgroup{Dir: dir, FD: -1, kill: -1, events: -1}
	for _, f := range []struct {
		fd    *int
		name  string
		flags int
	}{
		{&c.FD, "", unix.O_RDONLY | unix.O_DIRECTORY},
		{&c.kill, "cgroup.kill", unix.O_WRONLY}, // Linux 5.14
		{&c.events, "cgroup.events", unix.O_RDONLY},
	} {
		fd, err := unix.Open(filepath.Join(dir, f.name), f.flags|unix.O_CLOEXEC, 0)
		if err != nil {
			c.close()
			return nil, &os.PathError{Op: "open", Path: filepath.Join(dir, f.name), Err: err}
		}
		*f.fd = fd
	}
	return c, nil
}

func (c *Cgroup) close() {
	for _, fd := range []int{c.FD, c.kill, c.events} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// Remove removes and closes the cgroup and those that the job made inside it. It must be empty. The
// Freezer stays open, because a thread may be in it.
func (c *Cgroup) Remove() {
	removeTree(c.Dir)
	c.close() // and with it the lock
}

// KillAll sends SIGKILL to everything in the cgroup.
func (c *Cgroup) KillAll() {
	c.buf[0] = '1'
	_, _, _ = unix.RawSyscall(unix.SYS_WRITE, uintptr(c.kill), uintptr(unsafe.Pointer(&c.buf[0])),
		1)
}

// KillAllBlocking is KillAll for a process with other goroutines: the kernel may make the caller
// wait.
func (c *Cgroup) KillAllBlocking() { _, _ = unix.Write(c.kill, []byte{'1'}) }

// Populated reports whether there is a process in the cgroup. If that can't be read, the cgroup
// counts as populated, unless it is gone: only an empty cgroup can be removed.
func (c *Cgroup) Populated() bool {
	n, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(c.events),
		uintptr(unsafe.Pointer(&c.buf[0])), uintptr(len(c.buf)), 0, 0, 0)
	if errno != 0 {
		return errno != unix.ENODEV
	}
	return !bytes.Contains(c.buf[:n], populatedZero)
}

var populatedZero = []byte("populated 0")

// waitEmpty waits until nothing is left in the cgroup, killing it again and again.
func (c *Cgroup) waitEmpty(d time.Duration) bool {
	for end := boottime.Now() + d; ; c.KillEach() {
		c.KillAll()
		if !c.Populated() {
			return true
		}
		if boottime.Now() > end {
			return false
		}
		fds := []unix.PollFd{{Fd: int32(c.events), Events: unix.POLLPRI}}
		_, _ = unix.Poll(fds, 10)
	}
}

// Sweep removes the cgroups of starts before the one with the number newest. The spawner has
// removed those in which the job made no others.
func (c *Cgroup) Sweep(newest int) {
	entries, _ := os.ReadDir(c.Dir)
	for _, e := range entries {
		if n, err := strconv.Atoi(e.Name()); err == nil && n < newest {
			removeTree(filepath.Join(c.Dir, e.Name()))
		}
	}
}

// leaf makes a new cgroup for one start and opens it for CLONE_INTO_CGROUP. The spawner makes the
// leaves of the job by itself.
func (c *Cgroup) leaf() (int, error) {
	c.Leaves++
	dir := filepath.Join(c.Dir, strconv.Itoa(c.Leaves))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return -1, err
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	return fd, nil
}

// probe starts a process in the cgroup, checks that it runs, kills it by the cgroup and checks that
// it is gone.
func (c *Cgroup) probe(argv []string) error {
	leaf, err := c.leaf()
	if err != nil {
		return err
	}
	defer func() {
		_ = unix.Close(leaf)
		c.Sweep(c.Leaves + 1)
	}()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	defer func() { _ = unix.Close(pipe[0]) }()
	pid, err := syscall.ForkExec("/proc/self/exe", argv, &syscall.ProcAttr{
		Env: []string{}, Files: []uintptr{^uintptr(0), uintptr(pipe[1])},
		Sys: &syscall.SysProcAttr{
			Setsid: true, Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: leaf,
		},
	})
	_ = unix.Close(pipe[1])
	if err != nil {
		return fmt.Errorf("start a process in %s: %w", c.Dir, err)
	}
	runs := c.receives(pipe[0], 5*time.Second) && c.Populated()
	var freezerErr error
	if runs && c.Freezer != nil {
		freezerErr = c.Freezer.probe(pid)
	}
	empty := c.waitEmpty(2 * time.Second)
	if !empty {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	var ws unix.WaitStatus
	for {
		if _, err := unix.Wait4(pid, &ws, 0, nil); err != unix.EINTR {
			break
		}
	}
	switch {
	case !runs:
		return fmt.Errorf("a process in %s does not run", c.Dir)
	case freezerErr != nil:
		return fmt.Errorf("freeze a process in %s: %w", c.Dir, freezerErr)
	case !empty || !ws.Signaled() || ws.Signal() != unix.SIGKILL:
		return fmt.Errorf("%s does not kill the processes in it", c.Dir)
	case c.Freezer != nil:
		return c.Freezer.Set(false)
	}
	return nil
}

// receives waits for a byte from the pipe fd.
func (c *Cgroup) receives(fd int, d time.Duration) bool {
	for end := boottime.Now() + d; boottime.Now() < end; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, _ := unix.Poll(fds, int((end-boottime.Now()).Milliseconds())+1); n == 1 {
			n, _ := unix.Read(fd, c.buf[:1])
			return n == 1
		}
	}
	return false
}

// ErrUnavailable means that the system has no such cgroup, and will not have it at the next start.
var ErrUnavailable = errors.New("not available here")

// IsLasting reports whether an error of NewCgroup would be the same at the next start.
func IsLasting(err error) bool {
	var path *os.PathError
	missing := errors.As(err, &path) && path.Op == "open" && errors.Is(err, unix.ENOENT)
	return missing || errors.Is(err, ErrUnavailable) || errors.Is(err, os.ErrPermission) ||
		errors.Is(err, unix.EROFS) || errors.Is(err, unix.ENOSYS)
}

// ErrLeftover means that a predecessor's job may be alive, so that no other job may be started.
var ErrLeftover = errors.New("a job whose guard is gone may be alive")

// removeLeftovers kills and removes the cgroups whose maker is gone: those on which it gets a
// shared lock. Guards that start at the same time share the lock, so each of them waits until the
// leftover is empty.
func removeLeftovers(parent string) error {
	// As MkdirTemp names them.
	dirs, _ := filepath.Glob(filepath.Join(parent, cgroupPrefix+"[0-9]*"))
	for _, dir := range dirs {
		c, err := OpenCgroup(dir)
		if err != nil {
			continue // gone meanwhile, or another user's
		}
		if unix.Flock(c.FD, unix.LOCK_SH|unix.LOCK_NB) != nil {
			c.close()
			continue
		}
		if !c.waitEmpty(10 * time.Second) {
			c.close()
			return fmt.Errorf("%w: %s can't be emptied: see its cgroup.procs", ErrLeftover, dir)
		}
		c.Remove()
	}
	return nil
}

// removeTree removes a cgroup and those inside it, the innermost first.
func removeTree(dir string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if e.IsDir() {
			removeTree(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}
